"""JSON files that others have written."""

from __future__ import annotations

from pathlib import Path

import pytest

from live_avatar.json_files import read_json


def test_a_document_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text('{"name": "ä"}', encoding="utf-8")
    assert read_json(path) == {"name": "ä"}


@pytest.mark.parametrize("start", ["[", '{"a":'])
def test_a_document_that_is_nested_too_deeply_is_a_value_error(tmp_path: Path, start: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(start * 100_000)
    with pytest.raises(ValueError, match="it is nested too deeply"):
        read_json(path)
