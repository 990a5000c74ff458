"""The stages as Triton models: the only module that uses `triton_python_backend_utils`.

The file `1/model.py` of each model re-exports one class from here. A class converts Triton requests to `StageRequest`s,
errors to Triton errors with a code and metrics to Triton's metrics, and writes the trace.
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
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from live_avatar.arrays import Array
from live_avatar.errors import ArtifactError, InputError, SessionError
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.graphs.memory import Stage as MemoryStage
from live_avatar.graphs.memory import require_sessions, session_memory
from live_avatar.runtime import Runtime
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving import LOG_MARK
from live_avatar.serving.avatar_encoder import AvatarEncoderStage
from live_avatar.serving.conditioning import ConditioningStage
from live_avatar.serving.control import Control
from live_avatar.serving.denoising import DenoiserStage
from live_avatar.serving.failures import describe
from live_avatar.serving.metrics import BLOCKS, BUSY, STARTS, Kind, Metric
from live_avatar.serving.resources import SessionRoom
from live_avatar.serving.rolling_sink import FAIL, NOTHING, PUT, TAKE, RollingSink, SinkReceiver
from live_avatar.serving.sessions import SessionLimits
from live_avatar.serving.settings import StageSettings
from live_avatar.serving.stage import Stage, StageRequest, StageResponse
from live_avatar.serving.steps import STEPS_PARAMETER, read_steps
from live_avatar.serving.tensors import (
    LATENT,
    NO_BLOCK,
    OPERATION,
    ROLLING_SINK,
    SESSION,
    STATE,
    read_text,
)
from live_avatar.serving.trace import TraceWriter
from live_avatar.serving.turns import turn_of
from live_avatar.serving.vae_decoder import Marking, VAEDecoderStage
from live_avatar.watermark.key import read_key
from live_avatar_client.protocol import ErrorCode, SequenceFlag, format_error

log = logging.getLogger(__name__)

LOG_FORMAT = f"%(asctime)s{LOG_MARK}%(message)s"
MARGIN_S = 10.0
LOWEST_PRIORITY = 19
"""Niceness of the avatar encoder on a CPU, so that live sessions do not wait for it. On a GPU the priority of a CUDA
stream holds inside one process only; between processes it takes MPS and its CUDA_MPS_CLIENT_PRIORITY."""
SWEEP_S = 1.0  # a session is dropped at most this long after its idle limit

# Triton's own codes by name: the backend fills `pb_utils` only after it has imported the model.
TRITON_CODES = {ErrorCode.INVALID_ARGUMENT: "INVALID_ARG", ErrorCode.UNAVAILABLE: "UNAVAILABLE"}


class TritonMeter:
    """Reports a stage's metrics on Triton's `/metrics`. Triton drops a family without references, so all are kept."""

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

    def put(self, key: int, latent: Array) -> None:
        self._call(PUT, key, latent)

    def fail(self, key: int) -> None:
        self._call(FAIL, key, NOTHING)

    def take(self, key: int) -> tuple[str, Array]:
        response = self._call(TAKE, key, NOTHING)
        state = read_text(pb_utils.get_output_tensor_by_name(response, STATE).as_numpy())
        return state, pb_utils.get_output_tensor_by_name(response, LATENT).as_numpy().copy()

    def _call(self, operation: str, key: int, latent: Array) -> Any:
        request = pb_utils.InferenceRequest(
            model_name=ROLLING_SINK,
            requested_output_names=[STATE, LATENT],
            inputs=[
                pb_utils.Tensor(OPERATION, np.array([operation.encode()], dtype=np.object_)),
                pb_utils.Tensor(SESSION, np.array([key], dtype=np.uint64)),
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
        self._settings = StageSettings.from_environment(os.environ)
        self._trace = TraceWriter.to_folder(self.name, self._settings.trace)
        self._turn = turn_of(self.name, self._settings.turns)
        self._gpu = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None
        self.meter = TritonMeter(self.name)
        self._control = Control(self._settings.control)
        self._reload_epoch = self._control.reload_epoch
        self._stage = self.make_stage()
        self._require_sessions()
        self.meter.add(STARTS)
        self.meter.declare(BLOCKS)
        self.meter.declare(BUSY)
        self._busy = threading.Lock()
        self._busy_since_s: float | None = None
        self._over = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="sweeper", daemon=True)
        self._sweeper.start()

    def make_stage(self) -> Stage:
        raise NotImplementedError

    def execute(self, requests: list[Any]) -> list[Any]:
        """Called by Triton for every request, one session's in order."""
        self._busy_since_s = time.monotonic()
        try:
            with self._busy, self._turn():
                return [self._respond(request) for request in requests]
        finally:
            self._busy_since_s = None

    def finalize(self) -> None:
        """Called by Triton before it ends the process."""
        self._over.set()
        self._sweeper.join()
        self._trace.close()

    def _sweep(self) -> None:
        """Drops idle sessions while no request comes; `_respond` does it with every request. Tells the supervisor that
        the stage works: the sign stays the same during one request."""
        while not self._over.wait(SWEEP_S):
            self._control.beat(self.name, self._busy_since_s or time.monotonic())
            if self._busy.acquire(blocking=False):
                try:
                    self._drop_lost_sessions()
                    self._stage.sweep()
                except Exception:  # the next sweep still follows
                    log.exception("stage %s could not drop idle sessions", self.name)
                finally:
                    self._busy.release()

    def _drop_lost_sessions(self) -> None:
        """Drops all sessions if another stage was loaded again since the last call."""
        reload_epoch = self._control.reload_epoch
        if reload_epoch != self._reload_epoch:
            self._reload_epoch = reload_epoch
            self._stage.drop_all()

    def _respond(self, request: Any) -> Any:
        """The answer; None if it was sent already, because work follows it."""
        started_s = time.monotonic()
        try:
            plain = self._stage_request(request)
            self._drop_lost_sessions()
            self._stage.sweep(keep=plain.session)
            response = self._stage.handle(plain)
            if _ends_block(response):
                time.sleep(max(0.0, started_s + self._settings.stage_floor_s - time.monotonic()))
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
        except Exception:  # the answer was sent already
            log.exception("stage %s failed in its work after a response", self.name)
        seconds = time.monotonic() - started_s
        self.meter.add(BUSY, seconds)
        self._stage.extend_idle(seconds)

    def _count(self, session: int, response: StageResponse, started_s: float, ended_s: float) -> None:
        self.meter.add(BUSY, ended_s - started_s)
        if _ends_block(response):
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
            abandoned=self._control.is_abandoned(session),
        )

    def _answer(self, response: StageResponse) -> Any:
        outputs = [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in response.outputs.items()]
        return pb_utils.InferenceResponse(output_tensors=outputs)

    def _error(self, error: Exception) -> Any:
        failure = describe(error, self.name, NO_BLOCK)
        code = getattr(pb_utils.TritonError, TRITON_CODES.get(failure.code, "INTERNAL"))
        return pb_utils.TritonError(format_error(failure.code, str(failure)), code)

    @cached_property
    def artifacts(self) -> Artifacts:
        """The artifacts that `live-avatar serve` names in the environment.

        Raises `ArtifactError` if they were exchanged since the server was started.
        """
        artifacts = load_artifacts(self._settings.artifacts)
        if self._settings.manifest not in (None, artifacts.manifest_sha256):
            found, expected = artifacts.manifest_sha256[:12], self._settings.manifest[:12]
            raise ArtifactError(
                f"{artifacts.folder} is not what this server was started with: its manifest is {found} instead of "
                f"{expected}; put the old artifacts back, or start the server again."
            )
        return artifacts

    @cached_property
    def runtime(self) -> Runtime:
        """The artifacts' graphs, on the instance's GPU or on the CPU."""
        if self._gpu is None:
            return OnnxRuntime(self.artifacts, warm=True)
        from live_avatar.runtime.tensorrt_runtime import TensorRTRuntime

        return TensorRTRuntime(self.artifacts, self._gpu)

    @property
    def memory_stage(self) -> MemoryStage:
        """The stage as `graphs.memory` knows it."""
        return self.name

    @property
    def room(self) -> SessionRoom:
        """The memory that one more session needs in this stage."""
        memory = session_memory(self.artifacts.preset, self.memory_stage, self.artifacts.contracts)
        return SessionRoom(self.name, self.runtime, sum(memory.per_session.values()))

    def _require_sessions(self) -> None:
        """Raises `CapacityError` if the GPU has no memory for all sessions after its weights were loaded.

        On a CPU, `live-avatar serve` has checked the sum of all stages before it started them.
        """
        if self._gpu is not None and "max_sessions" in self._config["parameters"]:
            preset, free = self.artifacts.preset, self.runtime.free_bytes()
            sessions = int(self.parameter("max_sessions"))
            require_sessions(preset, sessions, self.known_avatars, free, [self.memory_stage], self.artifacts.contracts)

    @property
    def known_avatars(self) -> int:
        """Avatars whose work the stage keeps; 0 in a stage that has no such parameter."""
        return int(self.parameter("known_avatars")) if "known_avatars" in self._config["parameters"] else 0

    def parameter(self, name: str) -> str:
        return str(self._config["parameters"][name]["string_value"])

    @property
    def limits(self) -> SessionLimits:
        """The idle limit is that of the sequence batcher, so that a sequence and its state are freed together. The
        gateway ends silent sessions before; a session is dropped here if its end never came."""
        idle_s = int(self._config["sequence_batching"]["max_sequence_idle_microseconds"]) / 1e6
        return SessionLimits(idle_s, self.known_avatars)


class ConditioningModel(StageModel):
    def make_stage(self) -> Stage:
        sinks = SinkReceiver(TritonSinkClient(), self._control)
        return ConditioningStage(self.runtime, self.meter, sinks, self.limits)


class DenoiserModel(StageModel):
    @property
    def memory_stage(self) -> range:
        """The steps that the stage runs."""
        return read_steps(self.parameter(STEPS_PARAMETER))

    def make_stage(self) -> Stage:
        sinks = TritonSinkClient()
        return DenoiserStage(self.runtime, self.memory_stage, sinks, self.meter, self.room, self.limits)


class VAEDecoderModel(StageModel):
    def make_stage(self) -> Stage:
        settings = self._settings
        key = None if settings.watermark is None else read_key(settings.watermark)
        marking = Marking(key, settings.label, settings.label_font)
        return VAEDecoderStage(self.runtime, self.meter, self.room, self.limits, marking)


class RollingSinkModel(StageModel):
    def make_stage(self) -> Stage:
        # A session fetches its sink with a request, which may come just before the session's own idle limit.
        return RollingSink(2 * float(self.parameter("idle_limit_s")) + MARGIN_S)


class AvatarEncoderModel(StageModel):
    def make_stage(self) -> Stage:
        if self._gpu is None:
            os.nice(LOWEST_PRIORITY)
        return AvatarEncoderStage(self.runtime, self.meter)


def _ends_block(response: StageResponse) -> bool:
    return response.block != NO_BLOCK and response.is_last
