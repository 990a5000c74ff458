"""What `live-avatar generate` puts into its video, as a server does: provenance and the invisible mark."""

from __future__ import annotations

import json
from pathlib import Path

import click

from live_avatar.arrays import Array
from live_avatar.serving.provenance import ContentHashes, ProvenanceWriter
from live_avatar.serving.served import Served
from live_avatar.version import __version__
from live_avatar.watermark.embed import Watermark
from live_avatar.watermark.key import Origin, WatermarkKey, new_session, read_key
from live_avatar_client.media import provenance_metadata

WITHOUT_ARTIFACTS = "none: torch networks"


class Markings:
    """The markings of one video. `told`: what the user is told of them."""

    def __init__(self, key: WatermarkKey | None, operator: int | None) -> None:
        self._key, self._operator, self._session = key, operator, new_session()
        self._mark: Watermark | None = None
        self._frames = 0
        self.told = "" if key is None else f", session {Origin(0, self._session).session_text}"

    @classmethod
    def read(cls, watermark: Path | None, operator: int | None) -> Markings:
        """The markings of the options. Raises `WatermarkError` for a key that cannot be used."""
        if (watermark is None) != (operator is None):
            raise click.UsageError("--watermark and --operator go together; give both, or none")
        return cls(None if watermark is None else read_key(watermark), operator)

    def metadata(self, preset: str, artifacts: str | None, contents: ContentHashes, seed: int) -> dict[str, str]:
        """The metadata of the video file. artifacts: their fingerprint, None without artifacts."""
        served = Served(__version__, preset, artifacts or WITHOUT_ARTIFACTS, "generate", 1)
        statement = ProvenanceWriter(served, self._operator).write(self._session, contents, seed)
        return provenance_metadata(json.loads(statement))

    def mark(self, frames: Array) -> Array:
        """Frames uint8 [n, H, W, 3] with the mark, if there is a key."""
        if self._key is None or self._operator is None:
            return frames
        if self._mark is None:
            self._mark = Watermark(self._key, Origin(self._operator, self._session), *frames.shape[1:3])
        marked = self._mark.apply(frames, self._frames)
        self._frames += len(frames)
        return marked
