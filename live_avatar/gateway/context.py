"""Who calls, and what all sessions of the gateway share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from live_avatar.gateway.admission import Admission
from live_avatar.gateway.audit import AuditLog
from live_avatar.gateway.avatars import Avatars
from live_avatar.gateway.frames import FramePool
from live_avatar.gateway.metrics import GatewayMeter
from live_avatar.gateway.pipe import Pipe
from live_avatar.gateway.window import PipeWindow
from live_avatar.serving import metrics
from live_avatar.serving.control import Control
from live_avatar.serving.gateway_settings import Limits
from live_avatar.serving.options import OptionsReader
from live_avatar.serving.provenance import ProvenanceWriter

if TYPE_CHECKING:
    from live_avatar.gateway.sessions import Session


@dataclass(frozen=True)
class Caller:
    """Who opened a stream. name: of its key, or `anonymous`. owner: whose avatars it may reuse. peer: its address.

    is_allowed: whether its key is still one of the server's; a stream may last longer than its key.
    """

    name: str
    owner: str
    peer: str
    is_allowed: Callable[[], bool] = lambda: True


@dataclass
class SessionContext:
    """What all sessions of the gateway share."""

    pipe: Pipe
    window: PipeWindow
    admission: Admission
    avatars: Avatars
    options: OptionsReader
    meter: GatewayMeter
    audit: AuditLog
    provenance: ProvenanceWriter
    speakers: int
    limits: Limits
    frames: FramePool
    control: Control
    live: set[Session] = field(default_factory=set)
    closing: dict[asyncio.Task[None], Session] = field(default_factory=dict)

    def report(self) -> None:
        """Sets the gauges."""
        self.meter.set(metrics.SESSIONS_LIVE, self.admission.live)
        self.meter.set(metrics.SESSIONS_FREE, self.admission.free)
        self.meter.set(metrics.KNOWN_AVATARS, len(self.avatars))
