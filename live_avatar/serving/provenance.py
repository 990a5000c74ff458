"""The provenance of a video: a JSON object with what made it. Picture and prompt appear only as hashes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from live_avatar.serving.served import Served
from live_avatar.signing import Signer
from live_avatar.watermark.key import Origin

GENERATOR: Final = "Live Avatar on Triton"
SESSION_NUMBER: Final = "session_number"
OPERATOR: Final = "operator"


@dataclass(frozen=True)
class ProvenanceWriter:
    """Writes the provenance of sessions. operator: the number of who serves, if there is one. signer: signs it."""

    served: Served
    operator: int | None = None
    signer: Signer | None = None

    def write(self, session: int, picture_sha256: str, prompt_sha256: str, seed: int) -> str:
        """The provenance of a session, whose number is also what its invisible mark carries."""
        statement = {
            "generator": GENERATOR,
            "version": self.served.version,
            "preset": self.served.preset,
            "artifacts": self.served.artifacts,
            SESSION_NUMBER: Origin(0, session).session_text,
            **({} if self.operator is None else {OPERATOR: self.operator}),
            "seed": seed,
            "picture_sha256": picture_sha256,
            "prompt_sha256": prompt_sha256,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return json.dumps(statement if self.signer is None else self.signer.sign(statement))


def origin_of(provenance: str) -> Origin | None:
    """The numbers that a mark carries, from a provenance with an operator; None without one."""
    fields = json.loads(provenance) if provenance else {}
    if OPERATOR not in fields:
        return None
    return Origin(fields[OPERATOR], int(fields[SESSION_NUMBER], 16))
