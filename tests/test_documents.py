"""The documents: relative links lead to files, the README is short, and its animated picture is small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.support.repository import ROOT, tracked_files

README = ROOT / "README.md"
MAX_WORDS = 600
MAX_PICTURE_BYTES = 1_000_000
FENCE = re.compile(r"^( *)```.*?^\1```", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def documents() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".md"]


def links(document: Path) -> list[str]:
    """The relative links of a document, outside its code blocks."""
    found = LINK.findall(FENCE.sub("", document.read_text(encoding="utf-8")))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_relative_link_leads_to_a_file_and_a_heading():
    dead = []
    for document in documents():
        for link in links(document):
            name, _, anchor = link.partition("#")
            target = (document.parent / name).resolve() if name else document
            if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
                dead.append(f"{document.relative_to(ROOT)}: {link}")
    assert dead == []


def test_every_document_of_docs_is_in_the_index():
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / link).resolve() for link in links(index)}
    assert [path.name for path in documents() if path.parent == index.parent and path not in {*listed, index}] == []


def test_the_readme_is_short():
    words = len(README.read_text(encoding="utf-8").split())
    assert words <= MAX_WORDS, f"README.md has {words} words, expected {MAX_WORDS} at most; move some to docs/"


def test_the_readme_shows_a_small_moving_picture():
    moving = []
    for link in links(README):
        if link.endswith((".webp", ".gif")):
            with Image.open(ROOT / link) as picture:
                moving.append((ROOT / link).stat().st_size if getattr(picture, "is_animated", False) else 0)
    if not moving:
        pytest.fail("README.md has no animated picture; make one with python -m perf.animate")
    assert all(0 < size < MAX_PICTURE_BYTES for size in moving)
