"""Measures a stream from its received blocks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

from .errors import InvalidInput
from .messages import Block


@dataclass(frozen=True)
class StreamStats:
    """Speed and latency of a stream."""

    frames: int
    duration_s: float
    """From the first block sent to the last block received."""
    fps: float
    """Frames per second in that time; at most about 25 for speech sent in real time."""
    ttff_s: float
    """Time to first frame: from the first sample given to `send` to the first block received. It is the sum of:"""
    ttff_block_wait_s: float
    """the time until the first block of audio was complete,"""
    ttff_client_wait_s: float
    """the time until it was sent,"""
    ttff_server_s: float
    """and the time until its frames arrived: network, queue, model and look-ahead."""
    latency_p50_s: float
    """Audio to frame: from a block's last sample sent to its frames received."""
    latency_p95_s: float
    latency_max_s: float

    @classmethod
    def from_blocks(cls, blocks: Iterable[Block]) -> Self:
        """Measure all blocks of one session, in order; `blocks` may be a generator."""
        times = [(len(b), b.audio_started_at_s, b.audio_complete_at_s, b.sent_at_s, b.received_at_s) for b in blocks]
        if not times:
            raise InvalidInput("there are 0 blocks to measure; pass the blocks of a session with speech")
        counts, started_at_s, complete_at_s, sent_at_s, received_at_s = np.array(times).T
        p50_s, p95_s, max_s = np.percentile(received_at_s - sent_at_s, [50, 95, 100])
        duration_s = float(received_at_s[-1] - sent_at_s[0])
        return cls(
            frames=int(counts.sum()),
            duration_s=duration_s,
            fps=float(counts.sum()) / duration_s,
            ttff_s=float(received_at_s[0] - started_at_s[0]),
            ttff_block_wait_s=float(complete_at_s[0] - started_at_s[0]),
            ttff_client_wait_s=float(sent_at_s[0] - complete_at_s[0]),
            ttff_server_s=float(received_at_s[0] - sent_at_s[0]),
            latency_p50_s=float(p50_s),
            latency_p95_s=float(p95_s),
            latency_max_s=float(max_s),
        )
