"""What a server serves: for its status, its metrics and the provenance of videos."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Served:
    """Version of this program, name of the preset, fingerprint of the artifacts, profile, sessions at once."""

    version: str
    preset: str
    artifacts: str
    profile: str
    max_sessions: int
