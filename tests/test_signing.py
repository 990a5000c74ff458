"""Signed statements: what a signature is worth, and the pairs of files that can sign."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from live_avatar import signing
from live_avatar.errors import SigningError
from live_avatar.signing import Standing, make_pair, read_authorities, read_signer, verdict

NOW = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
STATEMENT = {"generator": "Live Avatar", "session_number": "00000000abcd", "created": NOW}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    return make_pair("studio", tmp_path)


def authorities(pair: tuple[Path, Path, Path]) -> list[x509.Certificate]:
    return read_authorities(pair[2])


def test_a_statement_is_trusted_by_who_trusts_its_authority(pair: tuple[Path, Path, Path]) -> None:
    signed = read_signer(*pair[:2]).sign(STATEMENT)
    assert {**STATEMENT, "signature": signed["signature"]} == signed
    found = verdict(signed, authorities(pair))
    assert (found.standing, found.signer) == (Standing.TRUSTED, "studio")
    assert verdict(signed, []).standing is Standing.UNTRUSTED


def test_another_authority_of_the_same_name_is_not_trusted(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make_pair("studio", tmp_path / "other")
    assert verdict(read_signer(*other[:2]).sign(STATEMENT), authorities(pair)).standing is Standing.UNTRUSTED


def test_a_statement_without_a_signature_says_so(pair: tuple[Path, Path, Path]) -> None:
    assert verdict(STATEMENT, authorities(pair)).standing is Standing.ABSENT


@pytest.mark.parametrize("change", [{"session_number": "00000000abce"}, {"more": 1}, {"created": "2020-01-01"}])
def test_a_changed_statement_is_invalid(pair: tuple[Path, Path, Path], change: dict[str, Any]) -> None:
    signed = read_signer(*pair[:2]).sign(STATEMENT)
    assert verdict({**signed, **change}, authorities(pair)).standing is Standing.INVALID


@pytest.mark.parametrize(
    "signature",
    [None, 3, "text", {}, {"certificates": [], "value": ""}, {"certificates": ["AAAA"], "value": "AAAA"}, {"value": 1}],
)
def test_a_signature_that_is_none_is_invalid(pair: tuple[Path, Path, Path], signature: object) -> None:
    assert verdict({**STATEMENT, "signature": signature}, authorities(pair)).standing is Standing.INVALID


def test_a_statement_from_outside_the_certificates_days_is_not_trusted(pair: tuple[Path, Path, Path]) -> None:
    old = read_signer(*pair[:2]).sign({**STATEMENT, "created": "2001-01-01T00:00:00+00:00"})
    assert verdict(old, authorities(pair)).standing is Standing.UNTRUSTED


def test_an_expired_certificate_does_not_sign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(signing, "TRIAL_DAYS", -1)
    monkeypatch.setattr(signing, "BEFORE", dt.timedelta(days=30))
    certificate, key, _ = make_pair("old", tmp_path)
    with pytest.raises(SigningError, match=r"old.pem is valid from .* to .*, not today; give one that is valid"):
        read_signer(certificate, key)


def test_a_pair_is_never_overwritten(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SigningError, match=r"studio.pem exists; give another name, or remove it"):
        make_pair("studio", tmp_path)
    assert pair[1].stat().st_mode & 0o777 == 0o600


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SigningError, match=r"cannot be written \(No such file.*; give a name in a writable"):
        make_pair("studio", tmp_path / "missing")


def test_files_that_are_no_pair_are_refused(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    certificate, key, _ = pair
    other = make_pair("other", tmp_path)
    text = tmp_path / "text"
    text.write_text("Hello.")
    with pytest.raises(SigningError, match=r"do not belong together; give the certificate of this key"):
        read_signer(certificate, other[1])
    with pytest.raises(SigningError, match=r"text holds no private key \(PEM, without a password\)"):
        read_signer(certificate, text)
    with pytest.raises(SigningError, match=r"text holds no certificate \(PEM\); .*signing-key"):
        read_signer(text, key)
    with pytest.raises(SigningError, match=r"the private key .*missing cannot be read \(No such file"):
        read_signer(certificate, tmp_path / "missing")


def test_other_kinds_of_keys_are_refused(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    password = serialization.BestAvailableEncryption(b"secret")
    for key, protection, words in (
        (rsa.generate_private_key(65537, 2048), serialization.NoEncryption(), "another kind than ECDSA on P-256"),
        (ec.generate_private_key(ec.SECP256R1()), password, "no private key"),
    ):
        content = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(SigningError, match=words):
            read_signer(pair[0], tmp_path / "key")


@pytest.mark.parametrize("name", ["", "a" * 51, "a/b", "a\nb"])
def test_a_name_that_no_certificate_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SigningError, match="does not fit; give 1 to 50 printable characters without a slash"):
        make_pair(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_pair_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "studio-ca.pem").touch()
    with pytest.raises(SigningError, match=r"studio-ca\.pem exists; give another name"):
        make_pair("studio", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["studio-ca.pem"]


def test_the_longest_name_makes_a_pair(tmp_path: Path) -> None:
    certificate, key, _ = make_pair("a" * 50, tmp_path)
    read_signer(certificate, key)
