"""A stage as it is served, that fails when a session asks for it, and tells how many sessions it holds.

Written in place of `1/model.py` of each stage. A session asks by the JPEG quality of its START, which
raw frames do not need: its tens are the number of the stage in `STAGES`, from 1 on, and its ones the block at which the
device falls off; with block 0 the memory of the stage is full at the start.
"""

from __future__ import annotations

import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from live_avatar.arrays import Array, Arrays
from live_avatar.runtime import Graph, Runtime
from live_avatar.serving.stage import StageRequest
from live_avatar.serving.tensors import LATENT
from live_avatar.serving.triton_model import (
    ConditioningModel,
    DenoiserModel,
    RollingSinkModel,
    StageModel,
    VAEDecoderModel,
)
from live_avatar_client.protocol import JPEG_QUALITY_PARAMETER

HELD_POLL_S = 0.1
STAGE = Path(__file__).parents[1].name
STAGES = ("conditioning", "dit_step_1", "dit_step_2", "dit_step_3", "dit_step_4", "vae_decoder")
MODELS: dict[str, type[StageModel]] = {
    "conditioning": ConditioningModel,
    "rolling_sink": RollingSinkModel,
    "vae_decoder": VAEDecoderModel,
}


class FaultyGraph:
    def __init__(self, graph: Graph, model: TritonPythonModel) -> None:
        self._graph = graph
        self._model = model

    def run(self, inputs: Arrays) -> dict[str, Array]:
        if self._model.is_due and self._model.block:
            raise RuntimeError("the device fell off")
        return self._graph.run(inputs)


class FaultyRuntime:
    def __init__(self, runtime: Runtime, model: TritonPythonModel) -> None:
        self._runtime = runtime
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def graph(self, component: str) -> FaultyGraph:
        return FaultyGraph(self._runtime.graph(component), self._model)

    def free_bytes(self) -> int:
        return 0 if self._model.is_due and not self._model.block else self._runtime.free_bytes()


class TritonPythonModel(MODELS.get(STAGE, DenoiserModel)):
    def initialize(self, args: dict[str, str]) -> None:
        self.is_due, self.block = False, 0
        self._plans: dict[int, int] = {}
        self._blocks: dict[int, int] = {}
        super().initialize(args)
        family = pb_utils.MetricFamily("test_sessions_held", "States that a stage holds.", pb_utils.MetricFamily.GAUGE)
        self._held = family, family.Metric(labels={"stage": self.name})
        self._teller = threading.Thread(target=self._tell, daemon=True)
        self._teller.start()

    def finalize(self) -> None:
        super().finalize()
        self._teller.join()

    @cached_property
    def runtime(self) -> FaultyRuntime:
        return FaultyRuntime(super().runtime, self)

    def _stage_request(self, request: Any) -> StageRequest:
        plain = super()._stage_request(request)
        has_speech = "AUDIO" in plain.inputs and plain.inputs["AUDIO"].size > 0
        has_speech |= LATENT in plain.inputs and len(plain.inputs[LATENT]) > 0
        if plain.start:
            self._plans[plain.session] = int(plain.parameters.get(JPEG_QUALITY_PARAMETER, 0))
            self._blocks[plain.session] = 0
        self.block = self._blocks[plain.session] = self._blocks.get(plain.session, 0) + has_speech
        number = STAGES.index(self.name) + 1 if self.name in STAGES else 0
        here = number > 0 and self._plans.get(plain.session) == 10 * number + self.block
        self.is_due = here and (plain.start or has_speech)
        return plain

    def _tell(self) -> None:
        """Sets the gauge, between requests."""
        while not self._over.wait(HELD_POLL_S):
            if self._busy.acquire(blocking=False):
                try:
                    self._held[1].set(len(self._table()))
                finally:
                    self._busy.release()

    def _table(self) -> Any:
        return self._stage._sinks if STAGE == "rolling_sink" else self._stage.sessions
