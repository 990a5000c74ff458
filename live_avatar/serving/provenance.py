"""The provenance of a video: a JSON object with what made it. Picture and prompt appear only as hashes."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from live_avatar.serving.served import Served


def provenance(served: Served, picture_sha256: str, prompt_sha256: str, seed: int) -> str:
    fields = {
        "generator": "Live Avatar on Triton",
        "version": served.version,
        "preset": served.preset,
        "artifacts": served.artifacts,
        "seed": seed,
        "picture_sha256": picture_sha256,
        "prompt_sha256": prompt_sha256,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return json.dumps(fields)
