"""The provenance of a video: a JSON object with what made it. Picture, prompt and masks appear only as hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from live_avatar.serving.served import Served
from live_avatar.watermark.key import Origin

GENERATOR: Final = "Live Avatar on Triton"
SESSION_NUMBER: Final = "session_number"
OPERATOR: Final = "operator"


@dataclass(frozen=True)
class ContentHashes:
    """SHA-256, in hex, of what a video was asked for with: picture, prompt, and a mask for each of several speakers."""

    picture: str
    prompt: str
    masks: tuple[str, ...] = ()

    @classmethod
    def of(cls, picture: bytes, prompt: str, masks: Iterable[bytes] = ()) -> ContentHashes:
        """Hashes picture and masks, as files, which may have tens of megabytes."""
        text = prompt.encode(errors="surrogatepass")
        return cls(_sha256(picture), _sha256(text), tuple(_sha256(mask) for mask in masks))

    @property
    def fields(self) -> dict[str, str | list[str]]:
        """As provenance and log lines name them; without masks there is no field for them."""
        masks = {"mask_sha256s": list(self.masks)} if self.masks else {}
        return {"picture_sha256": self.picture, "prompt_sha256": self.prompt, **masks}


@dataclass(frozen=True)
class ProvenanceWriter:
    """Writes the provenance of sessions. operator: the number of who serves, if there is one. sign: returns a statement
    with its signature."""

    served: Served
    operator: int | None = None
    sign: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None

    def write(self, session: int, contents: ContentHashes, seed: int) -> str:
        """The provenance of a session, whose number is also what its invisible mark carries."""
        statement = {
            "generator": GENERATOR,
            "version": self.served.version,
            "preset": self.served.preset,
            "artifacts": self.served.artifacts,
            SESSION_NUMBER: Origin(0, session).session_text,
            **({} if self.operator is None else {OPERATOR: self.operator}),
            "seed": seed,
            **contents.fields,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return json.dumps(statement if self.sign is None else self.sign(statement))


def origin_of(provenance: str) -> Origin | None:
    """The numbers that a mark carries, from a provenance with an operator; None without one."""
    fields = json.loads(provenance) if provenance else {}
    if OPERATOR not in fields:
        return None
    return Origin(fields[OPERATOR], int(fields[SESSION_NUMBER], 16))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
