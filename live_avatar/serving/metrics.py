"""All metrics of the service: name, kind, labels and description.

The stages report through a `Meter` to Triton, the gateway by itself; the gateway's `/metrics` shows both.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """One family. `buckets` are upper bounds, of a histogram alone."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


class RefusalReason(StrEnum):
    """Why a session was not admitted."""

    FULL = "full"
    MEMORY = "memory"
    INPUT = "input"
    SHUTDOWN = "shutdown"


class EndCause(StrEnum):
    """Why a session ended, as the server saw it. What the client says it wanted is `protocol.EndReason`."""

    ENDED = "ended"
    """END came without a reason."""
    COMPLETED = "completed"
    ABANDONED = "abandoned"
    FAILED = "failed"
    """A stage failed, or the client had met an error."""
    DISCONNECTED = "disconnected"
    """The stream ended without END: the client was killed, or the network was cut."""
    SILENT = "silent"
    """The client sent nothing, or read nothing, for the idle limit."""
    TOO_LONG = "too_long"
    """It has lasted as long as a session may."""
    SHUTDOWN = "shutdown"


INFO: Final = Metric(
    "live_avatar_info",
    Kind.GAUGE,
    "Always 1; the labels say what is served.",
    ("version", "preset", "artifacts", "profile"),
)
SESSIONS_LIMIT: Final = Metric("live_avatar_sessions_limit", Kind.GAUGE, "Sessions that the server takes at once.")
SESSIONS_LIVE: Final = Metric("live_avatar_sessions_live", Kind.GAUGE, "Sessions that are open now.")
SESSIONS_FREE: Final = Metric(
    "live_avatar_sessions_free", Kind.GAUGE, "Sessions that could be opened now; 0 while the server drains."
)
SESSIONS_ADMITTED: Final = Metric("live_avatar_sessions_admitted_total", Kind.COUNTER, "Sessions opened.")
SESSIONS_REFUSED: Final = Metric(
    "live_avatar_sessions_refused_total",
    Kind.COUNTER,
    "Sessions not opened, by reason: full, memory, input, shutdown.",
    ("reason",),
)
SESSIONS_ENDED: Final = Metric(
    "live_avatar_sessions_ended_total",
    Kind.COUNTER,
    "Sessions ended, by reason: completed, abandoned, failed, ended, disconnected, silent, too_long, shutdown.",
    ("reason",),
)
STREAMS: Final = Metric("live_avatar_streams_open", Kind.GAUGE, "Streams of callers that are open now.")
PIPE_BLOCKS: Final = Metric("live_avatar_pipe_blocks", Kind.GAUGE, "Blocks between the gateway and their callers now.")
KNOWN_AVATARS: Final = Metric("live_avatar_known_avatars", Kind.GAUGE, "Avatars that the gateway remembers.")
AVATARS_PREPARED: Final = Metric(
    "live_avatar_avatars_prepared_total",
    Kind.COUNTER,
    "Sessions by avatar: known, or new, which means decoded and encoded.",
    ("avatar",),
)
AVATAR_TIME: Final = Metric(
    "live_avatar_avatar_seconds",
    Kind.HISTOGRAM,
    "Time to decode a new picture and to encode it with its prompt.",
    buckets=(0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0),
)
BLOCKS: Final = Metric(
    "live_avatar_blocks_total", Kind.COUNTER, "Blocks of speech that a stage has processed.", ("stage",)
)
BUSY: Final = Metric(
    "live_avatar_stage_busy_seconds_total",
    Kind.COUNTER,
    "Time that a stage spent processing, excluding rejected requests.",
    ("stage",),
)
STEPS: Final = Metric(
    "live_avatar_stage_steps",
    Kind.GAUGE,
    "Denoising steps that a stage runs for every block; stages that do not denoise have no such series.",
    ("stage",),
)
FAILURES: Final = Metric(
    "live_avatar_stage_failures_total", Kind.COUNTER, "Sessions that failed in a stage.", ("stage",)
)
STARTS: Final = Metric(
    "live_avatar_stage_starts_total",
    Kind.COUNTER,
    "Times a stage's process was started; 1 unless one died.",
    ("stage",),
)
FRAMES: Final = Metric("live_avatar_frames_total", Kind.COUNTER, "Video frames generated.")
LATENCY: Final = Metric(
    "live_avatar_latency_seconds",
    Kind.HISTOGRAM,
    "From the arrival of a block of speech at the first stage to its frames at the last; to the first of them, if the "
    "session asks for four in a response.",
    buckets=(0.05, 0.1, 0.15, 0.2, 0.3, 0.48, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0),
)
FIRST_BLOCK: Final = Metric(
    "live_avatar_first_block_seconds",
    Kind.HISTOGRAM,
    "Latency of a session's first block. If it comes with START, prefill and warm-up of a new avatar are included, "
    "encoding its picture is not.",
    buckets=(0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0),
)
AVATAR_HITS: Final = Metric(
    "live_avatar_avatar_cache_hits_total",
    Kind.COUNTER,
    "Sessions whose avatar was cached (prefill in a step, warm-up in the decoder), by stage.",
    ("stage",),
)
AVATAR_MISSES: Final = Metric(
    "live_avatar_avatar_cache_misses_total", Kind.COUNTER, "Sessions whose avatar was not cached, by stage.", ("stage",)
)
AVATARS: Final = Metric("live_avatar_avatar_cache_entries", Kind.GAUGE, "Avatars in the cache of a stage.", ("stage",))
SINK_UPDATES: Final = Metric(
    "live_avatar_sink_updates_total", Kind.COUNTER, "Sinks replaced by a session's own first latent frame."
)
SINKS_AHEAD: Final = Metric(
    "live_avatar_sinks_ahead_total",
    Kind.COUNTER,
    "New sinks that a step prefilled ahead of their block; each of the others delays its block.",
    ("stage",),
)

METRICS: Final = (
    INFO,
    SESSIONS_LIMIT,
    SESSIONS_LIVE,
    SESSIONS_FREE,
    SESSIONS_ADMITTED,
    SESSIONS_REFUSED,
    SESSIONS_ENDED,
    BLOCKS,
    BUSY,
    STEPS,
    FAILURES,
    STARTS,
    FRAMES,
    LATENCY,
    FIRST_BLOCK,
    AVATAR_HITS,
    AVATAR_MISSES,
    AVATARS,
    SINK_UPDATES,
    SINKS_AHEAD,
    STREAMS,
    PIPE_BLOCKS,
    KNOWN_AVATARS,
    AVATARS_PREPARED,
    AVATAR_TIME,
)

GATEWAY_METRICS: Final = (
    INFO,
    SESSIONS_LIMIT,
    SESSIONS_LIVE,
    SESSIONS_FREE,
    SESSIONS_ADMITTED,
    SESSIONS_REFUSED,
    SESSIONS_ENDED,
    STREAMS,
    PIPE_BLOCKS,
    KNOWN_AVATARS,
    AVATARS_PREPARED,
    AVATAR_TIME,
)
"""Those that the gateway reports; the stages report the others."""


class Meter(Protocol):
    """Receives a stage's metrics, and adds the label `stage`."""

    def declare(self, metric: Metric, **labels: str) -> None:
        """Creates a series at 0."""
        ...

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Adds to a counter."""
        ...

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Sets a gauge."""
        ...

    def observe(self, metric: Metric, value: float) -> None:
        """Puts a value into a histogram."""
        ...


def read_series(page: str) -> dict[str, float]:
    """The values on a page of `/metrics`, by series as it is written there."""
    named = (line.rpartition(" ") for line in page.splitlines() if line and not line.startswith("#"))
    return {series: float(value) for series, _, value in named}
