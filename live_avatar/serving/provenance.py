"""The provenance of a video: a JSON object with what made it. Picture and prompt appear only as hashes."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime

from live_avatar.serving.served import Served


def provenance(served: Served, image: bytes, prompt: str, seed: int) -> str:
    fields = {
        "generator": "Live Avatar on Triton",
        "version": served.version,
        "preset": served.preset,
        "artifacts": served.artifacts,
        "seed": seed,
        "picture_sha256": hashlib.sha256(image).hexdigest(),
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return json.dumps(fields)
