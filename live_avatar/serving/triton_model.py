"""The Triton side of the stages: the only module that touches `triton_python_backend_utils`.

Each folder of `model_repository/` re-exports one class from here. It turns Triton requests into
`StageRequest`s, errors into Triton errors with a code, a meter's numbers into Triton's metrics, and writes the trace.
What a stage does is in its own module.
"""

from __future__ import annotations

import asyncio  # noqa: F401 - Triton's stub would import it after a stage's first answer, while the first session waits
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from live_avatar.arrays import Array
from live_avatar.errors import InputError, SessionError
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.graphs.memory import require_sessions, session_memory
from live_avatar.runtime import Runtime
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving import (
    ARTIFACTS_VARIABLE,
    CONTROL_VARIABLE,
    FLOOR_VARIABLE,
    LABEL_FONT_VARIABLE,
    LOG_MARK,
    PROFILE_VARIABLE,
    TRACE_VARIABLE,
    TURNS_VARIABLE,
)
from live_avatar.serving.conditioning import ConditioningStage
from live_avatar.serving.control import Control
from live_avatar.serving.dit_step import DiTStepStage
from live_avatar.serving.metrics import BLOCKS, BUSY, STARTS, Kind, Metric
from live_avatar.serving.resources import SessionRoom
from live_avatar.serving.rolling_sink import FAIL, NOTHING, PUT, TAKE, RollingSink
from live_avatar.serving.stage import NO_BLOCK, Stage, StageRequest, StageResponse, describe
from live_avatar.serving.status import Served, Status
from live_avatar.serving.tensors import LATENT, OPERATION, SESSION, STATE, read_text
from live_avatar.serving.trace import TraceWriter
from live_avatar.serving.turns import turn_of
from live_avatar.serving.vae_decoder import VAEDecoderStage
from live_avatar.version import __version__
from live_avatar_client.protocol import ErrorCode, SequenceFlag, format_error

log = logging.getLogger(__name__)

LOG_FORMAT = f"%(asctime)s{LOG_MARK}%(message)s"
MARGIN_S = 10.0
SWEEP_S = 1.0  # at most so long after the idle limit a session is dropped

# Triton's own codes by name: the backend fills `pb_utils` only after it has imported the model.
TRITON_CODES = {ErrorCode.INVALID_ARGUMENT: "INVALID_ARG", ErrorCode.UNAVAILABLE: "UNAVAILABLE"}


class TritonMeter:
    """A stage's numbers on Triton's `/metrics`. A family is made when it is first used, and must be kept."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[str, ...], Any] = {}

    def declare(self, metric: Metric, **labels: str) -> None:
        self._of(metric, labels)

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        self._of(metric, labels).increment(value)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        self._of(metric, labels).set(value)

    def observe(self, metric: Metric, value: float) -> None:
        self._of(metric, {}).observe(value)

    def _of(self, metric: Metric, labels: dict[str, str]) -> Any:
        if "stage" in metric.labels:
            labels = {**labels, "stage": self._stage}
        strings = {name: str(labels[name]) for name in metric.labels}
        key = (metric.name, *strings.values())
        if key not in self._series:
            buckets = {"buckets": list(metric.buckets)} if metric.kind is Kind.HISTOGRAM else {}
            self._series[key] = self._family(metric).Metric(labels=strings, **buckets)
        return self._series[key]

    def _family(self, metric: Metric) -> Any:
        if metric.name not in self._families:
            kind = getattr(pb_utils.MetricFamily, metric.kind.upper())
            self._families[metric.name] = pb_utils.MetricFamily(name=metric.name, description=metric.help, kind=kind)
        return self._families[metric.name]


class TritonSinkClient:
    """Calls the `rolling_sink` model from inside another stage (business logic scripting)."""

    def put(self, session: int, latent: Array) -> None:
        self._call(PUT, session, latent)

    def fail(self, session: int) -> None:
        self._call(FAIL, session, NOTHING)

    def take(self, session: int) -> tuple[str, Array]:
        response = self._call(TAKE, session, NOTHING)
        state = read_text(pb_utils.get_output_tensor_by_name(response, STATE).as_numpy())
        return state, pb_utils.get_output_tensor_by_name(response, LATENT).as_numpy().copy()

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
            why = response.error().message()
            raise SessionError(f"the rolling sink could not {operation}: {why}; end the session and start a new one.")
        return response


class StageModel:
    """A stage as a Triton python model; subclasses make the stage."""

    def initialize(self, args: dict[str, str]) -> None:
        """Called by Triton once, with the model's name and configuration."""
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=LOG_FORMAT)
        self.name = args["model_name"]
        self._config = json.loads(args["model_config"])
        self._input_names = [spec["name"] for spec in self._config["input"]]
        self._trace = TraceWriter.from_environment(self.name, os.environ.get(TRACE_VARIABLE))
        self._floor_s = float(os.environ.get(FLOOR_VARIABLE, "0"))
        self._turn = turn_of(self.name, os.environ.get(TURNS_VARIABLE))
        self._gpu = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        self.meter = TritonMeter(self.name)
        self._control = Control(Path(os.environ[CONTROL_VARIABLE]) if os.environ.get(CONTROL_VARIABLE) else None)
        self._reload_epoch = self._control.reload_epoch
        self._stage = self.make_stage()
        self._require_sessions()
        self.meter.add(STARTS)
        self.meter.declare(BLOCKS)
        self.meter.declare(BUSY)
        self._busy = threading.Lock()
        self._over = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="sweeper", daemon=True)
        self._sweeper.start()

    def make_stage(self) -> Stage:
        raise NotImplementedError

    def execute(self, requests: list[Any]) -> list[Any]:
        """Called by Triton for every request, one session's in order."""
        with self._busy, self._turn():
            return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        """Called by Triton before it ends the process."""
        self._over.set()
        self._sweeper.join()
        self._trace.close()

    def _sweep(self) -> None:
        """Drops silent sessions also when no request comes; a stage at work does it by itself."""
        while not self._over.wait(SWEEP_S):
            if self._busy.acquire(blocking=False):
                try:
                    self._drop_lost_sessions()
                    self._stage.sweep()
                except Exception:  # the next turn comes all the same
                    log.exception("stage %s could not drop silent sessions", self.name)
                finally:
                    self._busy.release()

    def _drop_lost_sessions(self) -> None:
        """Drops what was lost with another stage's process."""
        reload_epoch = self._control.reload_epoch
        if reload_epoch != self._reload_epoch:
            self._reload_epoch = reload_epoch
            self._stage.drop_all()

    def _respond(self, request: Any) -> Any:
        """The answer; None if it is on its way already, because there was work to do behind it."""
        started_s = time.monotonic()
        try:
            plain = self._stage_request(request)
            self._drop_lost_sessions()
            self._stage.sweep(keep=plain.session)
            response = self._stage.handle(plain)
            if response.block != NO_BLOCK:
                time.sleep(max(0.0, started_s + self._floor_s - time.monotonic()))
            self._count(plain.session, response, started_s, time.monotonic() - response.waited_s)
            answer = self._answer(response)
        except Exception as error:
            return pb_utils.InferenceResponse(output_tensors=[], error=self._error(error))
        finally:
            self._stage.extend_idle(time.monotonic() - started_s)
        if response.after_response is None:
            return answer
        request.get_response_sender().send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        self._run_after_response(response.after_response)
        return None

    def _run_after_response(self, work: Callable[[], object]) -> None:
        started_s = time.monotonic()
        try:
            work()
        except Exception:  # the answer has been given
            log.exception("stage %s could not do its work behind a block", self.name)
        seconds = time.monotonic() - started_s
        self.meter.add(BUSY, seconds)
        self._stage.extend_idle(seconds)

    def _count(self, session: int, response: StageResponse, started_s: float, ended_s: float) -> None:
        self.meter.add(BUSY, ended_s - started_s)
        if response.block != NO_BLOCK:
            self.meter.add(BLOCKS)
        self._trace.busy(session, response.block, started_s, ended_s)

    def _stage_request(self, request: Any) -> StageRequest:
        inputs = {}
        for name in self._input_names:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                inputs[name] = tensor.as_numpy()
        session, flags = request.correlation_id(), request.flags()
        if not isinstance(session, int):
            raise InputError(f"the sequence id is {str(session)[:60]!r}; it must be an integer.")
        return StageRequest(
            session=session,
            start=bool(flags & SequenceFlag.START),
            end=bool(flags & SequenceFlag.END),
            inputs=inputs,
            parameters=json.loads(request.parameters() or "{}"),
        )

    def _answer(self, response: StageResponse) -> Any:
        outputs = [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in response.outputs.items()]
        return pb_utils.InferenceResponse(output_tensors=outputs)

    def _error(self, error: Exception) -> Any:
        failure = describe(error, self.name, NO_BLOCK)
        code = getattr(pb_utils.TritonError, TRITON_CODES.get(failure.code, "INTERNAL"))
        return pb_utils.TritonError(format_error(failure.code, str(failure)), code)

    # What stages are made of.

    @cached_property
    def artifacts(self) -> Artifacts:
        """The artifacts that `live-avatar serve` names in the environment."""
        return load_artifacts(Path(os.environ[ARTIFACTS_VARIABLE]))

    @cached_property
    def runtime(self) -> Runtime:
        """The artifacts' graphs, on the instance's GPU or on the CPU."""
        if self._gpu is None:
            return OnnxRuntime(self.artifacts, warm=True)
        from live_avatar.runtime.tensorrt_runtime import TensorRTRuntime

        return TensorRTRuntime(self.artifacts, self._gpu)

    @property
    def room(self) -> SessionRoom:
        """What one more session takes of this stage's memory."""
        memory = session_memory(self.artifacts.preset, self.name, self.artifacts.contracts)
        return SessionRoom(self.name, self.runtime, sum(memory.per_session.values()))

    def _require_sessions(self) -> None:
        """Raises `CapacityError` if a GPU has not the room for all sessions, now that the weights are there.

        On a host, whose memory all stages share, `live-avatar serve` has worked out the sum beforehand.
        """
        if self._gpu is not None and "max_sessions" in self._config["parameters"]:
            preset, free = self.artifacts.preset, self.runtime.free_bytes()
            sessions = int(self.parameter("max_sessions"))
            require_sessions(preset, sessions, self.known_avatars, free, [self.name], self.artifacts.contracts)

    @property
    def known_avatars(self) -> int:
        return int(self.parameter("known_avatars"))

    @property
    def label_font(self) -> Path | None:
        font = os.environ.get(LABEL_FONT_VARIABLE)
        return Path(font) if font else None

    @property
    def served(self) -> Served:
        return Served(
            __version__,
            self.artifacts.preset.name,
            self.artifacts.fingerprint,
            os.environ.get(PROFILE_VARIABLE, "unknown"),
            int(self.parameter("max_sessions")),
        )

    def parameter(self, name: str) -> str:
        return str(self._config["parameters"][name]["string_value"])

    @property
    def idle_limit_s(self) -> float:
        """The sequence batcher's own limit, so that slot and state are freed after the same silence."""
        return int(self._config["sequence_batching"]["max_sequence_idle_microseconds"]) / 1e6


class ConditioningModel(StageModel):
    def make_stage(self) -> Stage:
        return ConditioningStage(
            self.runtime,
            TritonSinkClient(),
            self.idle_limit_s,
            self.served,
            self.meter,
            self._control,
            self.known_avatars,
            self.label_font,
        )


class DiTStepModel(StageModel):
    def make_stage(self) -> Stage:
        step = int(self.name.rsplit("_", 1)[1])
        return DiTStepStage(
            self.runtime, step, TritonSinkClient(), self.idle_limit_s, self.meter, self.room, self.known_avatars
        )


class VAEDecoderModel(StageModel):
    def make_stage(self) -> Stage:
        return VAEDecoderStage(
            self.runtime, self.idle_limit_s, self.meter, self.room, self._control, self.known_avatars, self.label_font
        )


class RollingSinkModel(StageModel):
    def make_stage(self) -> Stage:
        # A session fetches its sink with a request, which it may send just before its own limit.
        return RollingSink(2 * float(self.parameter("idle_limit_s")) + MARGIN_S)


class StatusModel(StageModel):
    def make_stage(self) -> Stage:
        return Status(self.served, self._control)
