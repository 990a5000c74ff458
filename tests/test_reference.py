"""Citations of the reference document lead to one of its sections or quirks."""

import re
from pathlib import Path

from tests.support.repository import ROOT, tracked_files

REFERENCE = ROOT / "docs" / "reference.md"
SUFFIXES = {".py", ".md", ".yaml", ".yml"}
LEAST_CITATIONS = 50

SECTIONS_CITED = re.compile(
    r"\bspec(?:ification)?\s+(?:sections?\s+)?(\d+(?:(?:\s+to\s+|,\s+(?:and\s+)?|\s+and\s+)\d+)*)"
)
QUIRK_CITED = re.compile(r"\bQ(\d+)\b")
SECTION = re.compile(r"^## (\d+)\. ", re.MULTILINE)
QUIRK = re.compile(r"^\| Q(\d+) \|", re.MULTILINE)


def cited(text: str) -> set[str]:
    """Sections ("7") and quirks ("Q7") that a text cites; a range "2 to 4" cites both ends and what lies between."""
    found = {f"Q{number}" for number in QUIRK_CITED.findall(text)}
    for numbers in SECTIONS_CITED.findall(text):
        found |= set(re.findall(r"\d+", numbers))
        for first, last in re.findall(r"(\d+)\s+to\s+(\d+)", numbers):
            found |= {str(number) for number in range(int(first), int(last) + 1)}
    return found


def entries() -> set[str]:
    """Sections and quirks that the document has."""
    text = REFERENCE.read_text(encoding="utf-8")
    return set(SECTION.findall(text)) | {f"Q{number}" for number in QUIRK.findall(text)}


def citations() -> dict[Path, set[str]]:
    files = [path for path in tracked_files() if path.suffix in SUFFIXES or path.name == "Makefile"]
    own = {REFERENCE, Path(__file__)}
    return {path: cited(path.read_text(encoding="utf-8")) for path in files if path not in own}


def test_every_citation_leads_to_an_entry_of_the_reference():
    known = entries()
    lost = [f"{path.relative_to(ROOT)} cites {entry}" for path, found in citations().items() for entry in found - known]
    assert lost == []


def test_the_search_finds_the_citations():
    assert sum(len(found) for found in citations().values()) >= LEAST_CITATIONS
    text = "(spec 7, Q9) spec sections 2 to 4, spec section 6 and 8; specs 99"
    assert cited(text) == {
        "7",
        "Q9",
        "2",
        "3",
        "4",
        "6",
        "8",
    }


def test_a_wrong_citation_is_found():
    assert cited("see spec section 99 and quirk Q99") - entries() == {"99", "Q99"}
