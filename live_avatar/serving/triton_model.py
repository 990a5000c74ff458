"""The Triton side of the stages: the only module that touches `triton_python_backend_utils`.

Each folder of `model_repository/` re-exports one class from here. It turns Triton requests into
`StageRequest`s, errors into Triton errors with a code, and writes the trace. What a stage does is in its
own module.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from live_avatar.arrays import Array
from live_avatar.artifacts import load_artifacts
from live_avatar.errors import CapacityError, InputError, LiveAvatarError, SessionError
from live_avatar.runtime import Runtime
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving import ARTIFACTS_VARIABLE, FLOOR_VARIABLE, TRACE_VARIABLE
from live_avatar.serving.conditioning import ConditioningStage
from live_avatar.serving.dit_step import DiTStepStage
from live_avatar.serving.rolling_sink import FAIL, NOTHING, PUT, TAKE, RollingSink
from live_avatar.serving.stage import NO_BLOCK, Stage, StageRequest, StageResponse
from live_avatar.serving.tensors import LATENT, OPERATION, SESSION, STATE
from live_avatar.serving.trace import TraceWriter
from live_avatar.serving.vae_decoder import VAEDecoderStage
from live_avatar_client.protocol import ErrorCode, SequenceFlag, format_error

log = logging.getLogger(__name__)

# Triton's own codes by name: the backend fills `pb_utils` only after it has imported the model.
ERROR_CODES: tuple[tuple[type[Exception], ErrorCode, str], ...] = (
    (InputError, ErrorCode.INVALID_ARGUMENT, "INVALID_ARG"),
    (CapacityError, ErrorCode.UNAVAILABLE, "UNAVAILABLE"),
    (SessionError, ErrorCode.FAILED_PRECONDITION, "INTERNAL"),
)


class TritonSinkClient:
    """Calls the `rolling_sink` model from inside another stage (business logic scripting)."""

    def put(self, session: int, latent: Array) -> None:
        self._call(PUT, session, latent)

    def fail(self, session: int) -> None:
        self._call(FAIL, session, NOTHING)

    def take(self, session: int) -> tuple[str, Array]:
        response = self._call(TAKE, session, NOTHING)
        state = pb_utils.get_output_tensor_by_name(response, STATE).as_numpy().reshape(-1)[0]
        return bytes(state).decode(), pb_utils.get_output_tensor_by_name(response, LATENT).as_numpy().copy()

    def _call(self, operation: str, session: int, latent: Array) -> Any:
        request = pb_utils.InferenceRequest(
            model_name="rolling_sink",
            requested_output_names=[STATE, LATENT],
            inputs=[
                pb_utils.Tensor(OPERATION, np.array([operation.encode()], dtype=np.object_)),
                pb_utils.Tensor(SESSION, np.array([session], dtype=np.uint64)),
                pb_utils.Tensor(LATENT, latent),
            ],
        )
        response = request.exec()
        if response.has_error():
            raise SessionError(f"the rolling sink could not {operation}: {response.error().message()}")
        return response


class StageModel:
    """A stage as a Triton python model; subclasses make the stage."""

    def initialize(self, args: dict[str, str]) -> None:
        """Called by Triton once, with the model's name and configuration."""
        self.name = args["model_name"]
        self._config = json.loads(args["model_config"])
        self._input_names = [spec["name"] for spec in self._config["input"]]
        self._trace = TraceWriter.from_environment(self.name, os.environ.get(TRACE_VARIABLE))
        self._floor_s = float(os.environ.get(FLOOR_VARIABLE, "0"))
        self._gpu = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        self._stage = self.make_stage()

    def make_stage(self) -> Stage:
        raise NotImplementedError

    def execute(self, requests: list[Any]) -> list[Any]:
        """Called by Triton for every request, one session's in order."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            started_s = time.monotonic()
            response = self._stage.handle(self._plain(request))
            if response.block != NO_BLOCK:
                time.sleep(max(0.0, started_s + self._floor_s - time.monotonic()))
            ended_s = time.monotonic() - response.waited_s
            self._trace.busy(request.correlation_id(), response.block, started_s, ended_s)
            return self._answer(response)
        except Exception as error:
            return pb_utils.InferenceResponse(output_tensors=[], error=self._error(error))

    def _plain(self, request: Any) -> StageRequest:
        inputs = {}
        for name in self._input_names:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                inputs[name] = tensor.as_numpy()
        flags = request.flags()
        return StageRequest(
            session=request.correlation_id(),
            start=bool(flags & SequenceFlag.START),
            end=bool(flags & SequenceFlag.END),
            inputs=inputs,
            parameters=json.loads(request.parameters() or "{}"),
        )

    def _answer(self, response: StageResponse) -> Any:
        outputs = [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in response.outputs.items()]
        return pb_utils.InferenceResponse(output_tensors=outputs)

    def _error(self, error: Exception) -> Any:
        for kind, code, triton_code in ERROR_CODES:
            if isinstance(error, kind):
                return pb_utils.TritonError(format_error(code, str(error)), getattr(pb_utils.TritonError, triton_code))
        if not isinstance(error, LiveAvatarError):
            log.exception("stage %s failed", self.name)
        message = f"stage {self.name} failed ({type(error).__name__}: {error}); end the session and start a new one."
        return pb_utils.TritonError(format_error(ErrorCode.FAILED, message), pb_utils.TritonError.INTERNAL)

    # What stages are made of.

    def runtime(self) -> Runtime:
        """The artifacts that `live-avatar serve` names in the environment, on the instance's GPU or on the CPU."""
        artifacts = load_artifacts(Path(os.environ[ARTIFACTS_VARIABLE]))
        if self._gpu is None:
            return OnnxRuntime(artifacts)
        from live_avatar.runtime.tensorrt_runtime import TensorRTRuntime

        return TensorRTRuntime(artifacts, self._gpu)

    def parameter(self, name: str) -> str:
        return str(self._config["parameters"][name]["string_value"])

    @property
    def idle_limit_s(self) -> float:
        """The sequence batcher's own limit, so that slot and state are freed after the same silence."""
        return int(self._config["sequence_batching"]["max_sequence_idle_microseconds"]) / 1e6


class ConditioningModel(StageModel):
    def make_stage(self) -> Stage:
        sessions = int(self.parameter("max_sessions"))
        return ConditioningStage(self.runtime(), TritonSinkClient(), self.idle_limit_s, sessions)


class DiTStepModel(StageModel):
    def make_stage(self) -> Stage:
        step = int(self.name.rsplit("_", 1)[1])
        return DiTStepStage(self.runtime(), step, TritonSinkClient(), self.idle_limit_s)


class VAEDecoderModel(StageModel):
    def make_stage(self) -> Stage:
        return VAEDecoderStage(self.runtime(), self.idle_limit_s)


class RollingSinkModel(StageModel):
    def make_stage(self) -> Stage:
        return RollingSink(float(self.parameter("idle_limit_s")))
