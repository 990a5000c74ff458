"""What is served, and how many sessions are live: for `live-avatar doctor`, the logs and the provenance of videos."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from live_avatar.serving.control import Control, Phase
from live_avatar.serving.stage import StageRequest, StageResponse
from live_avatar.serving.tensors import text_tensor
from live_avatar_client import protocol


@dataclass(frozen=True)
class Served:
    """Version of this program, name of the preset, fingerprint of the artifacts, profile, sessions at once."""

    version: str
    preset: str
    artifacts: str
    profile: str
    max_sessions: int


class Status:
    """Answers anyone who may send requests; keeps no sessions."""

    def __init__(self, served: Served, control: Control) -> None:
        self._served = served
        self._control = control

    def handle(self, request: StageRequest) -> StageResponse:
        """STATUS, a JSON object."""
        status = asdict(self._served) | {
            "live_sessions": self._control.live_sessions,
            "draining": self._control.phase is not Phase.SERVING,
        }
        return StageResponse({protocol.STATUS.name: text_tensor(json.dumps(status))})

    def sweep(self, keep: int | None = None) -> None:
        """Has no sessions to drop."""

    def extend_idle(self, seconds: float) -> None:
        """Has no sessions whose silence could count."""

    def drop_all(self) -> None:
        """Has no sessions to lose."""
