"""The files of a folder of videos: their split, their captions and the pictures beside them."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from live_avatar.errors import InputError
from live_avatar.inputs.text import clean_prompt
from live_avatar.json_files import read_json
from training.data.split import Split

NO_VIDEOS = frozenset({
    ".bmp", ".csv", ".gif", ".jpeg", ".jpg", ".json", ".jsonl", ".md", ".png", ".srt", ".tsv", ".txt", ".vtt", ".webp",
    ".xml", ".yaml", ".yml", ".zip",
})  # fmt: skip
"""Endings of files that are passed over; every other file is tried."""
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Source:
    """A file. number: its place in the sorted list of all parts. name: its path in the folder, with slashes."""

    number: int
    name: str
    path: Path
    bytes: int
    split: Split


def list_sources(folder: Path, validation_share: float) -> list[Source]:
    """All files below a folder that may be videos, in the order of their names.

    `validation_share` of them, at least one if there are two, belong to the validation split: those whose names have
    the smallest hashes, so every part draws the same line. Raises `InputError` for a folder without files.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give the folder that holds the videos.")
    found = sorted(
        (path.relative_to(folder).as_posix(), path)
        for place, folders, names in os.walk(folder)
        for path in (Path(place) / name for name in names)
        if path.suffix.lower() not in NO_VIDEOS and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise InputError(f"{folder} has no video; give the folder that holds the videos.")
    count = max(math.ceil(len(found) * validation_share), 1) if validation_share and len(found) > 1 else 0
    validation = set(sorted((name for name, _ in found), key=_hash)[:count])
    return [
        Source(number, name, path, path.stat().st_size, Split.VALIDATION if name in validation else Split.TRAIN)
        for number, (name, path) in enumerate(found)
    ]


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()


def listing_digest(sources: Sequence[Source]) -> str:
    """A digest of names and sizes."""
    lines = "".join(f"{source.name}\t{source.bytes}\n" for source in sources)
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


def read_captions(path: Path) -> dict[str, str]:
    """Captions by file name, from a JSON object. Raises `InputError` for anything else."""
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({error}); give an object of captions by file name."
        ) from error
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise InputError(f'{path} is no object of texts; expected {{"NAME.mp4": "A woman talks.", ...}}.')
    return values


def caption_of(sources: Sequence[Source], captions: Mapping[str, str], prompt: str | None) -> dict[str, str]:
    """The caption of every source by name: its own, or else `prompt`. Raises `InputError` if one has neither."""
    known = {name: captions.get(name, prompt) for name in (source.name for source in sources)}
    lacking = [name for name, caption in known.items() if caption is None]
    if lacking:
        raise InputError(
            f"{len(lacking)} files have no caption, such as {lacking[0]}; add them to --captions, or give --prompt "
            "for those without one."
        )
    for name, caption in known.items():
        try:
            clean_prompt(caption or "")
        except InputError as error:
            raise InputError(f"the caption of {name} cannot be used: {error}") from error
    return {name: caption for name, caption in known.items() if caption is not None}


def picture_beside(source: Source) -> Path | None:
    """The picture of the same name in the same folder."""
    beside = (source.path.with_suffix(ending) for ending in PICTURE_ENDINGS)
    return next((path for path in beside if path.is_file()), None)
