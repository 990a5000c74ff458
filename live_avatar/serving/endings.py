"""Why a session ended; the metric of conditioning and the log of the VAE decoder both ask here."""

from __future__ import annotations

from collections.abc import Mapping

from live_avatar.serving.control import Phase
from live_avatar.serving.failures import PipeError
from live_avatar.serving.metrics import EndCause
from live_avatar_client.protocol import END_REASON_PARAMETER, EndReason, ErrorCode


def requested_cause(parameters: Mapping[str, object]) -> EndCause:
    """The cause of an end that the client asked for, from the parameters of its request."""
    reason = str(parameters.get(END_REASON_PARAMETER, ""))
    return EndCause(reason) if reason in tuple(EndReason) else EndCause.ENDED


def failure_cause(failure: PipeError, phase: Phase) -> EndCause:
    """The cause of an end by a failure; a server that is closing ends its sessions with UNAVAILABLE."""
    is_shutdown = phase is Phase.CLOSING and failure.code is ErrorCode.UNAVAILABLE
    return EndCause.SHUTDOWN if is_shutdown else EndCause.FAILED
