"""Triton behind the gateway: one stream per session, the avatar encoder, and what callers may ask about the model.

No call to Triton is ever cancelled: Triton 2.51 can end with a fault when a stream with a request under way is
cancelled. A stream ends with an END that is answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar, cast

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from live_avatar.arrays import Array
from live_avatar.errors import InputError, ServerError
from live_avatar.gateway.frames import FramePool
from live_avatar.gateway.requests import Message
from live_avatar.serving.failures import PipeError
from live_avatar.serving.tensors import AVATAR_ENCODER, PIXELS, SINK_MOTION, SINK_TEXT
from live_avatar_client.protocol import MODEL_NAME, PROMPT, ErrorCode, explain_error, parse_error

log = logging.getLogger(__name__)

EOF: Final[Any] = grpc.aio.EOF  # type: ignore[attr-defined]
SERVICE: Final = "/inference.GRPCInferenceService/"
ASK_LIMIT_S: Final = 5.0
T = TypeVar("T")
UNLIMITED: Final = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class Closed:
    """Stands in a stream's answers for its end, with the reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class PipeStream:
    """The stream of one session. `answers` has each serialized response, then one `Closed`."""

    def __init__(self, call: Any) -> None:
        self.answers: asyncio.Queue[bytes | Closed] = asyncio.Queue()
        self._requests: asyncio.Queue[Message | None] = asyncio.Queue()
        self._call = call
        self._over = asyncio.Event()
        self._writer = asyncio.create_task(self._write())
        self._reader = asyncio.create_task(self._read())

    def send(self, request: Message) -> None:
        """Sends a `ModelInferRequest`; their number is bounded by who calls."""
        self._requests.put_nowait(request)

    def finish(self) -> None:
        """No request follows; the answers that are under way still come."""
        self._requests.put_nowait(None)

    async def wait_closed(self) -> None:
        """Returns when Triton has answered everything and closed the stream, or when it was abandoned."""
        await self._over.wait()

    def abandon(self) -> None:
        """Nobody waits for the stream any more: a stage has died, and Triton may never answer what it had."""
        self._over.set()

    def on_closed(self, act: Callable[[], None]) -> None:
        """Calls `act` when Triton has closed the stream, if it ever does."""
        self._reader.add_done_callback(lambda _: act())

    async def _write(self) -> None:
        try:
            while (request := await self._requests.get()) is not None:
                await self._call.write(request)
            await self._call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # the reader sees the same end, with its reason

    async def _read(self) -> None:
        reason = "Triton has closed the stream"
        try:
            while (response := await self._call.read()) is not EOF:
                self.answers.put_nowait(response)
        except grpc.RpcError as error:
            reason = f"Triton is gone ({error.details()})" if isinstance(error, grpc.aio.AioRpcError) else str(error)
        self._over.set()
        self.answers.put_nowait(Closed(reason))
        self._requests.put_nowait(None)


class _Encoder:
    """The process of the avatar encoder. It takes one avatar at a time; the others wait here, and go when their caller
    goes. `lost` has an error once the process is gone, with what it had."""

    def __init__(self) -> None:
        self.free = asyncio.Semaphore(1)
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Pipe:
    """Connection to the Triton at `target`, a gRPC address. answer_s: how long an avatar may take to be encoded."""

    def __init__(self, target: str, answer_s: float) -> None:
        self._answer_s = answer_s
        self._encoder = _Encoder()
        options = [*UNLIMITED, ("grpc.enable_http_proxy", 0)]
        # Any, because the type stubs ask for arguments that have defaults.
        self._channel = cast(Any, grpc.aio.insecure_channel(target, options=options))
        self._stream = self._channel.stream_stream(
            SERVICE + "ModelStreamInfer", request_serializer=service_pb2.ModelInferRequest.SerializeToString
        )
        pb = service_pb2
        self._infer = self._call("ModelInfer", pb.ModelInferRequest, pb.ModelInferResponse)
        self._statistics = self._call("ModelStatistics", pb.ModelStatisticsRequest, pb.ModelStatisticsResponse)
        self._register = self._call(
            "SystemSharedMemoryRegister", pb.SystemSharedMemoryRegisterRequest, pb.SystemSharedMemoryRegisterResponse
        )
        self._unregister = self._call(
            "SystemSharedMemoryUnregister",
            pb.SystemSharedMemoryUnregisterRequest,
            pb.SystemSharedMemoryUnregisterResponse,
        )

    def _call(self, name: str, request: Any, response: Any) -> Any:
        return self._channel.unary_unary(
            SERVICE + name, request_serializer=request.SerializeToString, response_deserializer=response.FromString
        )

    async def register(self, frames: FramePool) -> None:
        """Makes Triton know the region of the frames; without it they come through the socket."""
        request = frames.registration()
        if request is None:
            return
        forget = service_pb2.SystemSharedMemoryUnregisterRequest(name=request.name)  # of a try that seemed to fail
        try:
            await self._unregister(forget, timeout=ASK_LIMIT_S)
            await self._register(request, timeout=ASK_LIMIT_S)
            frames.is_registered = True
        except grpc.RpcError as error:
            log.warning("frames come from Triton without shared memory: %s", _details(error))

    def open(self) -> PipeStream:
        return PipeStream(self._stream())

    async def statistics(self) -> Message:
        """The `ModelStatisticsResponse` of the ensemble. Raises `ServerError` if Triton does not answer."""
        try:
            return await self._statistics(service_pb2.ModelStatisticsRequest(name=MODEL_NAME), timeout=ASK_LIMIT_S)
        except grpc.RpcError as error:
            raise ServerError(f"Triton gives no statistics ({_details(error)}); try again later.") from error

    async def encode_avatar(self, pixels: Array, prompt: str) -> tuple[Array, Array]:
        """SINK_MOTION and SINK_TEXT of a picture, uint8 [H, W, 3], and a prompt.

        Raises `InputError` for a prompt that cannot be used, `PipeError` if the encoder fails or does not answer.
        """
        request = service_pb2.ModelInferRequest(model_name=AVATAR_ENCODER)
        request.inputs.add(name=PIXELS, datatype="UINT8", shape=pixels.shape)
        request.raw_input_contents.append(pixels.tobytes())
        text = prompt.encode()
        request.inputs.add(name=PROMPT.name, datatype="BYTES", shape=[1])
        request.raw_input_contents.append(len(text).to_bytes(4, "little") + text)
        encoder = self._encoder
        turn = asyncio.ensure_future(encoder.free.acquire())
        try:
            await self._or_lost(encoder, turn)
        except BaseException:
            if turn.done() and not turn.cancelled():
                encoder.free.release()
            raise
        call = asyncio.ensure_future(self._infer(request))
        call.add_done_callback(partial(_note_encoded, encoder))
        try:
            # Shielded: a caller that goes away must not cancel a call to Triton.
            response = await self._or_lost(encoder, asyncio.shield(call))
        except grpc.RpcError as error:
            code, sentence = parse_error(_details(error))
            if code is ErrorCode.INVALID_ARGUMENT:
                raise InputError(sentence) from error
            raise PipeError(code or ErrorCode.FAILED, explain_error(sentence)) from error
        arrays = {
            tensor.name: np.frombuffer(content, np.float32).reshape(tuple(tensor.shape))
            for tensor, content in zip(response.outputs, response.raw_output_contents, strict=True)
        }
        return arrays[SINK_MOTION], arrays[SINK_TEXT]

    async def _or_lost(self, encoder: _Encoder, work: asyncio.Future[T]) -> T:
        """The result of the work. Cancels it and raises `PipeError` if the encoder is lost first, or takes too long."""
        try:
            either: list[asyncio.Future[Any]] = [work, encoder.lost]
            await asyncio.wait(either, timeout=self._answer_s, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return await work
            if encoder.lost.done():
                await encoder.lost
            text = f"the server has not encoded the picture for {self._answer_s:g} s; try again later or elsewhere."
            raise PipeError(ErrorCode.FAILED, text)
        finally:
            work.cancel()

    def lose_encoder(self, error: PipeError) -> None:
        """Ends all that waits for the encoder, whose process is gone; another one comes."""
        self._encoder.lost.set_exception(error)
        self._encoder.lost.exception()  # nobody may wait
        self._encoder = _Encoder()

    async def close(self) -> None:
        await self._channel.close()


def _note_encoded(encoder: _Encoder, call: asyncio.Future[Any]) -> None:
    encoder.free.release()
    if not call.cancelled():
        call.exception()  # a caller that has gone does not take it


def _details(error: grpc.RpcError) -> str:
    return str(error.details()) if isinstance(error, grpc.aio.AioRpcError) else str(error)
