"""One log line when a session starts and one when it ends: who made which video, with nothing of its content.

The session's number ties a video to a caller: the video's provenance and its invisible mark carry the same number.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field

from live_avatar.serving.provenance import ContentHashes
from live_avatar.watermark.key import Origin

log = logging.getLogger(__name__)


@dataclass
class SessionRecord:
    """A session as the log shows it. session: Triton's sequence id. number: what its video says of itself, in its
    provenance and its invisible mark."""

    session: int
    number: int
    key: str
    peer: str
    seed: int
    frame_format: str
    avatar: str
    hashes: ContentHashes
    blocks: int = 0
    began_s: float = field(default_factory=time.monotonic)


class AuditLog:
    """Writes the lines as text, or as JSON objects; the hashes only if the operator asks for them."""

    def __init__(self, as_json: bool, with_hashes: bool) -> None:
        self._as_json = as_json
        self._with_hashes = with_hashes

    def started(self, record: SessionRecord) -> None:
        self._write(record, "started", {"avatar": record.avatar, "format": record.frame_format})

    def ended(self, record: SessionRecord, cause: str, detail: str) -> None:
        facts: dict[str, object] = {
            "cause": cause,
            "blocks": record.blocks,
            "seconds": round(time.monotonic() - record.began_s, 3),
        }
        self._write(record, "ended", facts | ({"detail": detail} if detail else {}))

    def refused(self, session: int, key: str, peer: str, reason: str) -> None:
        self._line(session, "refused", {"key": key, "peer": peer, "reason": reason})

    def _write(self, record: SessionRecord, event: str, facts: dict[str, object]) -> None:
        who: dict[str, object] = {
            "key": record.key,
            "session_number": Origin(0, record.number).session_text,
            "peer": record.peer,
            "seed": record.seed,
        }
        if self._with_hashes:
            who |= record.hashes.fields
        self._line(record.session, event, who | facts)

    def _line(self, session: int, event: str, facts: dict[str, object]) -> None:
        if self._as_json:
            log.info("%s", json.dumps({"event": f"session {event}", "session": session, **facts}))
        else:
            named = " ".join(
                f"{name}={json.dumps(value) if name == 'detail' else value}" for name, value in facts.items()
            )
            log.info("session %d %s: %s", session, event, named)
