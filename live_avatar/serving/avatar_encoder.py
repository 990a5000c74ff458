"""Encodes the picture and the prompt of a new session. Not part of the ensemble: the gateway calls it before START.

It has a process of its own, so that the blocks of live sessions do not wait behind a new picture.
"""

from __future__ import annotations

from live_avatar.arrays import Arrays
from live_avatar.errors import InputError
from live_avatar.pipeline.avatar import AvatarEncoder
from live_avatar.runtime import Runtime
from live_avatar.serving.metrics import Meter
from live_avatar.serving.stage import StageRequest, StageResponse, StatelessStage
from live_avatar.serving.tensors import PIXELS, SINK_MOTION, SINK_TEXT
from live_avatar_client import protocol

STAGE = "avatar_encoder"
PROMPT = protocol.PROMPT.name


class AvatarEncoderStage(StatelessStage):
    """PIXELS and PROMPT -> SINK_MOTION and SINK_TEXT."""

    def __init__(self, runtime: Runtime, meter: Meter) -> None:
        super().__init__(STAGE, meter)
        self._encoder = AvatarEncoder(runtime)

    def work(self, request: StageRequest) -> StageResponse:
        source = self._encoder.encode(request.inputs[PIXELS], _read_prompt(request.inputs))
        return StageResponse({SINK_MOTION: source.motion, SINK_TEXT: source.text})


def _read_prompt(inputs: Arrays) -> str:
    if inputs[PROMPT].size != 1:
        raise InputError(f"PROMPT has {inputs[PROMPT].size} strings; send one.")
    try:
        return bytes(inputs[PROMPT].reshape(-1)[0]).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"PROMPT is not UTF-8 ({error}); encode it as UTF-8.") from error
