"""A machine without the programs is told what to install, in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.k8s.programs import missing, program, tool


def test_all_that_is_missing_is_named_at_once(tmp_path: Path):
    assert missing(str(tmp_path)) == (
        "bwrap, haproxy, nginx, openssl, prometheus, promtool are not installed; run `apt-get install "
        "--no-install-recommends bubblewrap haproxy nginx-light openssl prometheus` as root, and again."
    )


def test_what_is_there_is_not_named(tmp_path: Path):
    for name in ("bwrap", "haproxy", "openssl", "prometheus", "promtool"):
        (tmp_path / name).touch(mode=0o755)
    said = missing(str(tmp_path))
    assert said.startswith("nginx is not installed; run `apt-get install --no-install-recommends nginx-light`")
    (tmp_path / "nginx").touch(mode=0o755)
    assert missing(str(tmp_path)) == ""


def test_a_test_that_needs_one_fails_with_the_sentence(tmp_path: Path):
    with pytest.raises(pytest.fail.Exception, match="nginx is not installed"):
        program("nginx", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=r"there is no .*/kubeadm; run `make install`"):
        tool("kubeadm")
