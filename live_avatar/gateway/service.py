"""The gRPC service for callers: KServe v2, of which only the calls named here exist.

Every call is served as a stream, because grpc reads the message of a unary call before its handler runs: here nothing
is read before the caller's key is known.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from tritonclient.grpc import model_config_pb2, service_pb2

from live_avatar.errors import InputError, ServerError
from live_avatar.gateway.admission import Phase
from live_avatar.gateway.context import Caller, SessionContext
from live_avatar.gateway.keys import ANONYMOUS, KeyRing
from live_avatar.gateway.requests import Message, check_size, inputs_of
from live_avatar.gateway.streams import CallerStream
from live_avatar.serving import metrics
from live_avatar_client import protocol
from live_avatar_client.protocol import MODEL_NAME, STATUS_MODEL

SERVER_NAME: Final = "live-avatar"
SERVICE: Final = "/inference.GRPCInferenceService/"
HEALTH_CHECK: Final = "/grpc.health.v1.Health/Check"
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"
"""A `HealthCheckResponse`, serialized."""
ADMIN_KEY_HEADER: Final = "triton-grpc-protocol-admin-key"
SMALL_BYTES: Final = 64 * 1024
"""Size of a message that carries no picture."""
SPARE_STREAMS: Final = 8
"""Streams that a key may have beside those of its sessions: for starts that are refused, and ends on their way."""
READ_LIMIT_S: Final = 10.0

Handler = Callable[["_Call"], Awaitable[None]]


@dataclass(frozen=True)
class Keys:
    """The keys of callers, and of operators for statistics and configuration; without the latter the callers' do."""

    callers: KeyRing
    admin: KeyRing | None = None


class _Call:
    """One call: its context, and its messages as bytes."""

    def __init__(self, messages: AsyncIterator[bytes], context: Any) -> None:
        self.messages = messages
        self.context = context
        self.metadata = {str(key): value for key, value in context.invocation_metadata() or ()}

    async def read(self, kind: Any) -> Any:
        """The message of a unary call. Ends the call with an error if none comes, or one that is no `kind`."""
        try:
            async with asyncio.timeout(READ_LIMIT_S):
                content = await anext(self.messages)
        except (TimeoutError, StopAsyncIteration):
            await self.context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message; send one.")
            raise
        if len(content) > SMALL_BYTES:
            text = (
                f"the message has {len(content)} bytes, and this call takes at most {SMALL_BYTES}; send a smaller one."
            )
            await self.context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        return await self.parse(kind, content)

    async def parse(self, kind: Any, content: bytes) -> Any:
        try:
            return kind.FromString(content)
        except (DecodeError, RecursionError):
            text = f"the message is no {kind.DESCRIPTOR.name}; send one of KServe v2."
            await self.context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)

    async def write(self, message: Message) -> None:
        await self.context.write(message.SerializeToString())


class GatewayService(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Answers callers from the sessions of `context`."""

    def __init__(self, context: SessionContext, keys: Keys, idle_s: float) -> None:
        self._context = context
        self._keys = keys
        self._idle_s = idle_s
        self._streams: dict[CallerStream, asyncio.Task[Any]] = {}
        self._handlers: dict[str, Handler] = {
            HEALTH_CHECK: self._health_check,
            SERVICE + "ServerLive": self._server_live,
            SERVICE + "ServerReady": self._server_ready,
            SERVICE + "ServerMetadata": self._server_metadata,
            SERVICE + "ModelReady": self._model_ready,
            SERVICE + "ModelMetadata": self._model_metadata,
            SERVICE + "ModelConfig": self._model_config,
            SERVICE + "ModelStatistics": self._model_statistics,
            SERVICE + "ModelInfer": self._model_infer,
            SERVICE + "ModelStreamInfer": self._model_stream_infer,
        }

    def service(self, details: Any) -> Any:
        handler = self._handlers.get(details.method)
        if handler is None:
            return None

        async def serve(messages: AsyncIterator[bytes], context: Any) -> None:
            await handler(_Call(messages, context))

        return grpc.stream_stream_rpc_method_handler(serve)

    def check(self) -> None:
        """Ends sessions that are silent, too long or left without an answer, and streams whose caller has stopped
        reading."""
        now_s = time.monotonic()
        for stream, task in list(self._streams.items()):
            if stream.check(now_s):
                task.cancel()
        for session in list(self._context.live):
            if session.is_too_long(now_s):
                session.end_too_long()
            elif session.is_unanswered(now_s):
                session.end_unanswered()
        self._context.avatars.forget_old()
        self._context.meter.set(metrics.PIPE_BLOCKS, self._context.window.inside())
        self._context.report()

    # Calls that need no key: a load balancer asks them.

    async def _health_check(self, call: _Call) -> None:
        """gRPC's own health protocol; the name of a service in the request counts for nothing."""
        await call.read(service_pb2.ServerReadyRequest)
        await call.context.write(SERVING if self._context.admission.is_ready else NOT_SERVING)

    async def _server_live(self, call: _Call) -> None:
        await call.read(service_pb2.ServerLiveRequest)
        await call.write(service_pb2.ServerLiveResponse(live=True))

    async def _server_ready(self, call: _Call) -> None:
        await call.read(service_pb2.ServerReadyRequest)
        await call.write(service_pb2.ServerReadyResponse(ready=self._context.admission.is_ready))

    async def _server_metadata(self, call: _Call) -> None:
        await call.read(service_pb2.ServerMetadataRequest)
        version = self._context.provenance.served.version
        message = service_pb2.ServerMetadataResponse(name=SERVER_NAME, version=version, extensions=["sequence"])
        await call.write(message)

    async def _model_ready(self, call: _Call) -> None:
        request = await call.read(service_pb2.ModelReadyRequest)
        is_ready = request.name in (MODEL_NAME, STATUS_MODEL) and self._context.admission.is_pipe_ready
        await call.write(service_pb2.ModelReadyResponse(ready=is_ready))

    async def _model_metadata(self, call: _Call) -> None:
        await self._expect_model(call, (await call.read(service_pb2.ModelMetadataRequest)).name)
        message = service_pb2.ModelMetadataResponse(name=MODEL_NAME, versions=["1"], platform=SERVER_NAME)
        inputs = inputs_of(self._context.speakers)
        for tensors, specs in ((message.inputs, inputs), (message.outputs, protocol.OUTPUTS)):
            for spec in specs:
                tensors.add(name=spec.name, datatype=spec.datatype, shape=spec.dims)
        await call.write(message)

    # Calls of operators

    async def _model_config(self, call: _Call) -> None:
        await self._expect_admin(call)
        await self._expect_model(call, (await call.read(service_pb2.ModelConfigRequest)).name)
        await call.write(service_pb2.ModelConfigResponse(config=model_config(self._idle_s, self._context.speakers)))

    async def _model_statistics(self, call: _Call) -> None:
        await self._expect_admin(call)
        name = (await call.read(service_pb2.ModelStatisticsRequest)).name
        if name:
            await self._expect_model(call, name)
        try:
            await call.write(await self._context.pipe.statistics())
        except ServerError as error:
            await call.context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

    # Calls of callers

    async def _model_infer(self, call: _Call) -> None:
        await self._caller(call)
        request = await call.read(service_pb2.ModelInferRequest)
        if request.model_name == MODEL_NAME:
            text = f"model {MODEL_NAME} answers on a stream only; send its requests with ModelStreamInfer."
            await call.context.abort(grpc.StatusCode.UNIMPLEMENTED, text)
        await self._expect_model(call, request.model_name, STATUS_MODEL)
        content = json.dumps(self.status()).encode()
        message = service_pb2.ModelInferResponse(model_name=STATUS_MODEL, model_version="1", id=request.id[:256])
        message.outputs.add(name=protocol.STATUS.name, datatype=protocol.STATUS.datatype, shape=[len(content)])
        message.raw_output_contents.append(content)
        await call.write(message)

    async def _model_stream_infer(self, call: _Call) -> None:
        caller = await self._caller(call)
        if (full := self._full(caller)) is not None:
            await call.context.abort(grpc.StatusCode.UNAVAILABLE, full)
        stream = CallerStream(caller, self._context, call.context.write)
        task = asyncio.current_task()
        assert task is not None
        self._streams[stream] = task
        self._report()

        async def messages() -> AsyncIterator[Message]:
            async for content in call.messages:
                try:
                    message = stream_message(content)
                except InputError as error:
                    await stream.refuse_unread(error)
                else:
                    yield message

        try:
            await stream.serve(messages())
        finally:
            del self._streams[stream]
            self._report()

    def _full(self, caller: Caller) -> str | None:
        """Why a caller may open no stream now, before anything of it is read; None if it may."""
        limits = self._context.limits
        if len(self._streams) >= limits.streams:
            return f"all {limits.streams} streams of this server are open; try again later or elsewhere."
        if limits.sessions_per_key is not None:
            own = sum(stream.caller.name == caller.name for stream in self._streams)
            most = limits.sessions_per_key + SPARE_STREAMS
            if own >= most:
                return f"all {most} streams of key {caller.name} are open; close one of them or try again later."
        return None

    def _report(self) -> None:
        self._context.meter.set(metrics.STREAMS, len(self._streams))

    def status(self) -> dict[str, Any]:
        """What the model `status` says."""
        admission = self._context.admission
        is_draining = admission.phase is not Phase.SERVING
        return asdict(self._context.provenance.served) | {"live_sessions": admission.live, "draining": is_draining}

    # Keys

    async def _caller(self, call: _Call) -> Caller:
        """Who calls. Ends the call before anything is read if the key is not one of the server's."""
        peer = str(call.context.peer())
        key = _key(call.metadata, protocol.API_KEY_HEADER)
        name = self._keys.callers.caller(key)
        if name is None:
            await self._abort_key(call, protocol.API_KEY_HEADER)
        assert name is not None
        # Without keys everybody has the same name, so avatars are remembered per connection, unless they are shared.
        by_name = name != ANONYMOUS or self._context.limits.share_avatars
        owner = f"key {name}" if by_name else peer
        return Caller(name, owner, peer, lambda: self._keys.callers.caller(key) == name)

    async def _expect_admin(self, call: _Call) -> None:
        if self._keys.admin is None:
            await self._caller(call)
        elif self._keys.admin.caller(_key(call.metadata, ADMIN_KEY_HEADER)) is None:
            await self._abort_key(call, ADMIN_KEY_HEADER)

    async def _abort_key(self, call: _Call, header: str) -> None:
        text = f"This protocol is restricted, expecting header '{header}' with a key of this server."
        await call.context.abort(grpc.StatusCode.UNAUTHENTICATED, text)

    async def _expect_model(self, call: _Call, name: str, expected: str = MODEL_NAME) -> None:
        if name != expected:
            text = f"there is no model {name[:60]!r}; use {expected!r}."
            await call.context.abort(grpc.StatusCode.NOT_FOUND, text)


def stream_message(content: bytes) -> Message:
    """A message of a stream. Raises `InputError` for one that is not even parsed: the others of the stream go on."""
    check_size(content)
    try:
        return service_pb2.ModelInferRequest.FromString(content)
    except (DecodeError, RecursionError) as error:
        raise InputError("the message is no ModelInferRequest; send one of KServe v2.") from error


def model_config(idle_s: float, speakers: int) -> Message:
    """The model as callers see it: one model with sessions, whatever it is made of. perf_analyzer reads this."""
    config = model_config_pb2.ModelConfig(name=MODEL_NAME, platform=SERVER_NAME, backend=SERVER_NAME)
    config.version_policy.latest.num_versions = 1
    config.sequence_batching.max_sequence_idle_microseconds = round(idle_s * 1e6)
    for spec in inputs_of(speakers):
        config.input.add(name=spec.name, data_type=_data_type(spec), dims=spec.dims, optional=spec.optional)
    for spec in protocol.OUTPUTS:
        config.output.add(name=spec.name, data_type=_data_type(spec), dims=spec.dims)
    return config


def _data_type(spec: protocol.TensorSpec) -> int:
    return int(model_config_pb2.DataType.Value("TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"))


def _key(metadata: dict[str, Any], header: str) -> str | None:
    """The key in a call's metadata: in the header of older clients, or as a bearer token."""
    value = metadata.get(header)
    if value is None and header == protocol.API_KEY_HEADER:
        scheme, _, token = str(metadata.get("authorization", "")).partition(" ")
        value = token if scheme.lower() == "bearer" else None
    return value if isinstance(value, str) else None
