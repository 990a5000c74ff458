"""All stages in a row, in plain arrays and without a server, for tests to drive block by block."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from live_avatar.arrays import Array
from live_avatar.pipeline.avatar import AvatarEncoder, avatar_key
from live_avatar.pipeline.denoiser import one_step
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving import metrics
from live_avatar.serving.conditioning import ConditioningStage
from live_avatar.serving.control import Control
from live_avatar.serving.denoising import DenoiserStage
from live_avatar.serving.resources import SessionRoom
from live_avatar.serving.rolling_sink import RollingSink, SinkReceiver
from live_avatar.serving.sessions import SessionLimits
from live_avatar.serving.stage import StageRequest
from live_avatar.serving.tensors import AVATAR_KEY, SINK_MOTION, SINK_TEXT
from live_avatar.serving.vae_decoder import VAEDecoderStage
from tests.serving.recording import RecordingMeter

SESSION = 5
IDLE_S = 30.0
NOTHING = np.zeros(0, dtype=np.int16)


def avatar_tensors(runtime: OnnxRuntime, picture: bytes, prompt: str) -> dict[str, Array]:
    """What the gateway sends for an avatar with START."""
    source = AvatarEncoder(runtime).encode_image(picture, prompt)
    return {
        AVATAR_KEY: np.frombuffer(avatar_key(picture, prompt), dtype=np.uint8),
        SINK_MOTION: source.motion,
        SINK_TEXT: source.text,
    }


class Pipe:
    """All stages in a row, as the ensemble wires them; the rolling sink is the real one."""

    def __init__(self, runtime: OnnxRuntime, folder: Path, idle_s: float = IDLE_S) -> None:
        self.sinks = RollingSink(IDLE_S)
        self.control = Control(folder)
        self.meters = {
            name: RecordingMeter() for name in ("conditioning", *(f"dit_step_{i}" for i in range(1, 5)), "vae_decoder")
        }
        room = SessionRoom("any", runtime, 0)
        limits = SessionLimits(idle_s, known_avatars=1)
        self.conditioning = ConditioningStage(
            runtime, self.meters["conditioning"], SinkReceiver(self.sinks, self.control), limits
        )
        self.steps = [
            DenoiserStage(runtime, one_step(step), self.sinks, self.meters[f"dit_step_{step}"], room, limits)
            for step in range(1, 5)
        ]
        self.decoder = VAEDecoderStage(runtime, self.meters["vae_decoder"], room, limits)

    def condition(
        self, audio: Array, start: bool = False, end: bool = False, session: int = SESSION, **inputs: Array
    ) -> dict[str, Array]:
        parameters = {"seed": 3} if start else {}
        request = StageRequest(session, start, end, {"AUDIO": audio, **inputs}, parameters)
        return self.conditioning.handle(request).outputs

    def denoise(
        self,
        tensors: dict[str, Array],
        upto: int = 4,
        start: bool = False,
        end: bool = False,
        session: int = SESSION,
        since: int = 0,
    ) -> dict[str, Array]:
        for stage in self.steps[since:upto]:
            response = stage.handle(StageRequest(session, start, end, tensors))
            tensors = tensors | response.outputs
            if response.after_response is not None:
                with suppress(RuntimeError):  # the answer has been given
                    response.after_response()
        return tensors

    def run(self, audio: Array, **others: Any) -> Array:
        """One block through everything -> frames; the other arguments are those of `respond`."""
        return self.respond(audio, **others)["FRAMES"]

    def respond(
        self,
        audio: Array,
        start: bool = False,
        end: bool = False,
        session: int = SESSION,
        options: Mapping[str, object] | None = None,
        **inputs: Array,
    ) -> dict[str, Array]:
        """One request through everything -> the outputs of the last stage, which gets the options with START."""
        tensors = self.condition(audio, start, end, session, **inputs)
        tensors = self.denoise(tensors, start=start, end=end, session=session)
        return self.decoder.handle(StageRequest(session, start, end, tensors, options or {})).outputs

    def stages(self) -> list[ConditioningStage | DenoiserStage | VAEDecoderStage]:
        return [self.conditioning, *self.steps, self.decoder]

    def live(self) -> list[int]:
        """Sessions that each stage holds."""
        return [len(stage.sessions) for stage in self.stages()]

    def count(self, metric: metrics.Metric, stage: str = "conditioning", **labels: str) -> float:
        return self.meters[stage].of(metric, **labels)
