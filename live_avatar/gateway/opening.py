"""Opens a session: whether it is admitted, its avatar, and what START carries into the pipe."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array
from live_avatar.errors import CapacityError, InputError, LiveAvatarError, ShutdownError
from live_avatar.gateway.audit import SessionRecord
from live_avatar.gateway.avatars import Avatar, AvatarSource
from live_avatar.gateway.context import Caller, SessionContext
from live_avatar.gateway.requests import CallerRequest
from live_avatar.inputs.masks import check_masks
from live_avatar.serving import metrics
from live_avatar.serving.failures import PipeError
from live_avatar.serving.metrics import RefusalReason
from live_avatar.serving.options import SessionOptions
from live_avatar.serving.tensors import (
    AVATAR_KEY,
    PROVENANCE_IN,
    SINK_MOTION,
    SINK_TEXT,
    SPEAKER_WEIGHTS,
    text_tensor,
)
from live_avatar.watermark.key import new_session
from live_avatar_client.protocol import ErrorCode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opening:
    """A session that is admitted. tensors: what START carries beside the caller's own: name, type, value. provenance:
    what START carries too, and a block that came with it."""

    record: SessionRecord
    tensors: list[tuple[str, str, Array]]
    provenance: list[tuple[str, str, Array]]
    options: SessionOptions


async def open_session(context: SessionContext, caller: Caller, start: CallerRequest, sequence: int) -> Opening:
    """Admits a session and prepares its avatar. Raises what the caller is to be told; then nothing is admitted."""
    context.admission.check_phase()
    if start.picture is None:
        raise InputError("the first request of a session has no REFERENCE_IMAGE; send the picture with it.")
    masks = start.masks or ()
    check_masks(masks, context.speakers)
    if not caller.is_allowed():
        raise InputError("the key of this stream is no longer one of the server's; open a stream with another key.")
    context.admission.open(caller.name)
    try:
        chosen = await asyncio.to_thread(context.options.read, start.parameters)  # to draw a label takes long
        source = await AvatarSource.of(start.picture, start.prompt or "", masks)
        avatar, known = await context.avatars.get(caller.owner, source)
        context.admission.check_admitted()  # the avatar may have taken long
    except BaseException:
        context.admission.close(caller.name)
        context.report()
        raise
    novelty = "known" if known else "new"
    number = new_session()
    record = SessionRecord(
        sequence, number, caller.name, caller.peer, chosen.seed, chosen.frame_format.value, novelty, source.hashes
    )
    context.meter.add(metrics.AVATARS_PREPARED, avatar=novelty)
    context.meter.add(metrics.SESSIONS_ADMITTED)
    context.audit.started(record)
    provenance = text_tensor(context.provenance.write(number, source.hashes, chosen.seed))
    return Opening(record, _tensors(avatar), [(PROVENANCE_IN, "UINT8", provenance)], chosen)


def note_refused(context: SessionContext, caller: Caller, sequence: int, error: Exception, text: str) -> None:
    """Counts a start that was refused, or logs one that failed unexpectedly."""
    reason = _refusal_reason(error)
    if reason is None:
        log.error("session %d could not be opened: %s", sequence, text, exc_info=error)
        return
    context.meter.add(metrics.SESSIONS_REFUSED, reason=reason)
    context.audit.refused(sequence, caller.name, caller.peer, reason)


def _tensors(avatar: Avatar) -> list[tuple[str, str, Array]]:
    weights = [(SPEAKER_WEIGHTS, "FP32", avatar.weights)] if len(avatar.weights) else []
    return [
        *weights,
        (AVATAR_KEY, "UINT8", np.frombuffer(avatar.key, dtype=np.uint8)),
        (SINK_MOTION, "FP32", avatar.motion),
        (SINK_TEXT, "FP32", avatar.text),
    ]


def _refusal_reason(error: Exception) -> RefusalReason | None:
    match error:
        case ShutdownError():
            return RefusalReason.SHUTDOWN
        case CapacityError():
            return RefusalReason.FULL
        case InputError():
            return RefusalReason.INPUT
        case PipeError(code=ErrorCode.UNAVAILABLE):
            return RefusalReason.MEMORY
    return None if not isinstance(error, LiveAvatarError) else RefusalReason.INPUT
