"""A Live Avatar server for tests: real gRPC on a free local port, with frames from a formula.

It checks requests like the real server and refuses them with the same codes.
"""

import io
import json
import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from .base import CHANNEL_OPTIONS
from .cutter import Samples, silence
from .messages import Pixels
from .protocol import (
    API_KEY_HEADER,
    AUDIO,
    BLOCK_SAMPLES,
    DEFAULT_JPEG_QUALITY,
    END_REASON_PARAMETER,
    FRAME_FORMAT_PARAMETER,
    FRAMES_PER_BLOCK,
    FRAMES_PER_RESPONSE,
    FRAMES_PER_RESPONSE_PARAMETER,
    INPUTS,
    JPEG_QUALITY_PARAMETER,
    LABEL_PARAMETER,
    MAX_JPEG_QUALITY,
    MIN_JPEG_QUALITY,
    MODEL_NAME,
    OUTPUTS,
    PROMPT,
    REFERENCE_IMAGE,
    SAMPLES_PER_FRAME,
    SEED_PARAMETER,
    SPEAKER_MASKS,
    TOKEN_PARAMETER,
    ErrorCode,
    FrameFormat,
    TensorSpec,
    format_error,
)
from .speakers import mixed
from .wire import Message, get_tensor, put_tensor

_MAX_STREAMS: Final = 16

SAMPLE_PROVENANCE: Final = {"generator": "fake avatar server", "version": "0", "seed": 0}
"""The provenance of a session with seed 0."""

SAMPLE_IMAGE: Final = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a494441"
    "54789c636800000082008177cd72b60000000049454e44ae426082"
)
"""A PNG file of one gray pixel."""


def sample_speech(samples: int) -> Samples:
    """Return noise that gets louder, so that no two frames sound alike; always the same for one length."""
    noise = np.random.default_rng(samples).uniform(-1, 1, samples)
    speech: Samples = (noise * np.linspace(0, 32767, samples)).astype(np.int16)
    return speech


@dataclass
class ReceivedSession:
    """Everything that the server received for one sequence."""

    image: bytes
    prompt: str
    seed: int
    frame_format: str
    jpeg_quality: int
    label: str
    token: str
    masks: tuple[bytes, ...] = ()
    frames_per_response: int = FRAMES_PER_BLOCK
    blocks: list[Samples] = field(default_factory=list)
    keep_alives: int = 0
    failed: bool = False
    ended: bool = False
    end_reason: str = ""

    @property
    def speech(self) -> Samples:
        """All samples of its blocks, including the padding; of several speakers [speakers, samples]."""
        return np.concatenate([silence(0, max(1, len(self.masks))), *self.blocks], axis=-1)


def synthetic_frame(number: int, seed: int, speech: Samples, height: int, width: int) -> Pixels:
    """Return frame `number`: red is the number, green the seed, blue the loudness of its 640 samples.

    Each is taken modulo 256. Frames before and after the speech are silent.
    """
    start = number * SAMPLES_PER_FRAME
    heard = speech[max(start, 0) : max(start + SAMPLES_PER_FRAME, 0)].astype(np.int32)
    loudness = int(np.abs(heard).mean()) >> 7 if len(heard) else 0
    color = np.array([number % 256, seed % 256, loudness % 256], np.uint8)
    return np.broadcast_to(color, (height, width, 3))


class FakeAvatarServer:
    """A server that answers at `url` while its `with` statement lasts.

    Args:
        height, width: the size of its frames.
        lookahead_frames: how many frames the video lags behind the speech.
        delay_s: its working time for a block.
        refuse: refuse every session as UNAVAILABLE with this message.
        fail_at_block: end each session with FAILED at this block, counted from 0.
        vanish_at_block: cut the connection at this block.
        model_name: the name of its model.
        api_key: the key that clients must send.
        speakers: how many people are in the pictures; several need a mask each.
        credentials: certificates; with them it speaks only TLS.
    """

    def __init__(
        self,
        *,
        height: int = 32,
        width: int = 48,
        lookahead_frames: int = 0,
        delay_s: float = 0.0,
        refuse: str | None = None,
        fail_at_block: int | None = None,
        vanish_at_block: int | None = None,
        model_name: str = MODEL_NAME,
        api_key: str | None = None,
        speakers: int = 1,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.height = height
        self.width = width
        self.lookahead_frames = lookahead_frames
        self.delay_s = delay_s
        self.refuse = refuse
        self.fail_at_block = fail_at_block
        self.vanish_at_block = vanish_at_block
        self.model_name = model_name
        self.api_key = api_key
        self.speakers = speakers
        self.credentials = credentials
        self.url = ""
        self.sessions: list[ReceivedSession] = []
        """Every session that was accepted, in order."""
        self.ended_ids: set[int] = set()
        """The sequence ids that were ended, including refused sessions."""
        self.streams = 0
        """How many streams are open."""
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._live: dict[int, ReceivedSession] = {}

    def __enter__(self) -> Self:
        self._workers = futures.ThreadPoolExecutor(_MAX_STREAMS, "fake-avatar-server")
        self._server = grpc.server(self._workers, options=CHANNEL_OPTIONS)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Servicer(self), self._server)
        self.url = f"127.0.0.1:{self._add_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _add_port(self, address: str) -> int:
        if self.credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, self.credentials)

    def stop(self) -> None:
        """Cut every connection and close the port, like a server that is killed."""
        self._stopping.set()
        self._server.stop(grace=None).wait()
        self._workers.shutdown()

    def answers(self, request: Message) -> list[Message]:
        """Return every ModelStreamInferResponse to one ModelInferRequest."""
        try:
            responses = self._answers(request)
        except _RefusalError as refusal:
            text = f"in ensemble '{MODEL_NAME}', [request id: {request.id or '<id_unknown>'}] {refusal}"
            return [service_pb2.ModelStreamInferResponse(error_message=text)]
        finally:
            if request.parameters["sequence_end"].bool_param:
                self._end(request)
        return [service_pb2.ModelStreamInferResponse(infer_response=response) for response in responses]

    def count_stream(self, change: int) -> None:
        """Take note that a stream was opened (1) or closed (-1)."""
        with self._lock:
            self.streams += change

    def blocks_of(self, request: Message) -> int:
        """Return how many blocks the request's session has sent."""
        session = self._live.get(request.parameters["sequence_id"].int64_param)
        return len(session.blocks) if session else 0

    def _end(self, request: Message) -> None:
        sequence_id = request.parameters["sequence_id"].int64_param
        self.ended_ids.add(sequence_id)
        session = self._live.get(sequence_id)
        if session is not None and session.token == request.parameters[TOKEN_PARAMETER].string_param:
            session.ended = True
            session.end_reason = request.parameters[END_REASON_PARAMETER].string_param
            del self._live[sequence_id]

    def _answers(self, request: Message) -> list[Message]:
        sequence_id = request.parameters["sequence_id"].int64_param
        audio = _audio(request, self.speakers)
        if request.parameters["sequence_start"].bool_param:
            self._start(sequence_id, request)
        session = self._live.get(sequence_id)
        if session is None:
            raise _RefusalError(ErrorCode.FAILED_PRECONDITION, f"sequence {sequence_id} had no START; send it")
        if session.token != request.parameters[TOKEN_PARAMETER].string_param:
            message = f"the token is not that of sequence {sequence_id}; send the one of its START"
            raise _RefusalError(ErrorCode.INVALID_ARGUMENT, message)
        if not len(audio):
            at_an_end = [request.parameters[name].bool_param for name in ("sequence_start", "sequence_end")]
            session.keep_alives += not any(at_an_end)
            return [self._response(request, [], session, first=0)]
        number = len(session.blocks)
        if session.failed or number == self.fail_at_block:
            session.failed = True
            raise _RefusalError(ErrorCode.FAILED, f"stage dit_step_2 failed at block {number}: on purpose")
        session.blocks.append(audio)
        self._stopping.wait(self.delay_s)
        first = number * FRAMES_PER_BLOCK - self.lookahead_frames
        frames, count = self._frames(session, first), session.frames_per_response
        return [
            self._response(request, frames[at : at + count], session, first + at)
            for at in range(0, FRAMES_PER_BLOCK, count)
        ]

    def _start(self, sequence_id: int, request: Message) -> None:
        if self.refuse is not None:
            raise _RefusalError(ErrorCode.UNAVAILABLE, self.refuse)
        if sequence_id in self._live:
            raise _RefusalError(ErrorCode.INVALID_ARGUMENT, f"sequence {sequence_id} is live; send START once")
        image = _input(request, REFERENCE_IMAGE)
        if image is None or not len(image):
            raise _RefusalError(
                ErrorCode.INVALID_ARGUMENT, "REFERENCE_IMAGE has 0 bytes; send a PNG, JPEG or WebP file"
            )
        frame_format = request.parameters[FRAME_FORMAT_PARAMETER].string_param or FrameFormat.RAW.value
        if frame_format not in tuple(FrameFormat):
            raise _RefusalError(ErrorCode.INVALID_ARGUMENT, f"frame_format is {frame_format!r}; send 'raw' or 'jpeg'")
        quality = request.parameters[JPEG_QUALITY_PARAMETER].int64_param or DEFAULT_JPEG_QUALITY
        if not MIN_JPEG_QUALITY <= quality <= MAX_JPEG_QUALITY:
            raise _RefusalError(ErrorCode.INVALID_ARGUMENT, f"jpeg_quality is {quality}; send 1 to 95")
        name = FRAMES_PER_RESPONSE_PARAMETER
        frames_per_response = request.parameters[name].int64_param or FRAMES_PER_BLOCK
        if frames_per_response not in FRAMES_PER_RESPONSE:
            raise _RefusalError(ErrorCode.INVALID_ARGUMENT, f"{name} is {frames_per_response}; send 4 or 12")
        masks = _input(request, SPEAKER_MASKS)
        count = 0 if masks is None else len(masks)
        if count != (self.speakers if self.speakers > 1 else 0):
            message = f"{count} masks came for {self.speakers} speakers; give one for each of several"
            raise _RefusalError(ErrorCode.INVALID_ARGUMENT, message)
        prompt = _input(request, PROMPT)
        session = ReceivedSession(
            image=image.tobytes(),
            prompt="" if prompt is None else prompt[0].decode(),
            seed=request.parameters[SEED_PARAMETER].int64_param,
            frame_format=frame_format,
            jpeg_quality=quality,
            label=request.parameters[LABEL_PARAMETER].string_param,
            token=request.parameters[TOKEN_PARAMETER].string_param,
            masks=() if masks is None else tuple(masks),
            frames_per_response=frames_per_response,
        )
        self._live[sequence_id] = session
        self.sessions.append(session)

    def _frames(self, session: ReceivedSession, first: int) -> list[Pixels]:
        numbers = range(first, first + FRAMES_PER_BLOCK)
        speech = mixed(session.speech)
        return [synthetic_frame(n, session.seed, speech, self.height, self.width) for n in numbers]

    def _response(self, request: Message, frames: list[Pixels], session: ReceivedSession, first: int) -> Message:
        is_jpeg = session.frame_format == FrameFormat.JPEG
        raw = np.zeros((0, self.height, self.width, 3), np.uint8)
        if frames and not is_jpeg:
            raw = np.stack(frames)
        jpegs = [_jpeg(frame, session.jpeg_quality) for frame in frames] if is_jpeg else []
        is_start = request.parameters["sequence_start"].bool_param
        provenance = json.dumps({**SAMPLE_PROVENANCE, "seed": session.seed}).encode() if is_start else b""
        sizes = np.array([len(file) for file in jpegs], np.int64)
        files, text = (_as_uint8(content) for content in (b"".join(jpegs), provenance))
        arrays: tuple[NDArray[Any], ...] = (raw, files, np.array([first]), text, sizes)
        message = service_pb2.ModelInferResponse(model_name=MODEL_NAME, id=request.id)
        for spec, array in zip(OUTPUTS, arrays, strict=True):
            put_tensor(message.outputs, message.raw_output_contents, spec, array)
        return message


class _RefusalError(Exception):
    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(format_error(code, message))


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The KServe methods that a client of this library calls."""

    def __init__(self, server: FakeAvatarServer) -> None:
        self._server = server

    def ServerLive(self, request: Message, context: grpc.ServicerContext) -> Message:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request: Message, context: grpc.ServicerContext) -> Message:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=True)

    def ModelReady(self, request: Message, context: grpc.ServicerContext) -> Message:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=request.name == self._server.model_name)

    def ModelMetadata(self, request: Message, context: grpc.ServicerContext) -> Message:  # noqa: N802
        message = service_pb2.ModelMetadataResponse(name=self._server.model_name, versions=["1"])
        inputs = INPUTS if self._server.speakers == 1 else (*INPUTS, SPEAKER_MASKS)
        for specs, tensors in ((inputs, message.inputs), (OUTPUTS, message.outputs)):
            for spec in specs:
                tensors.add(name=spec.name, datatype=spec.datatype, shape=spec.dims)
        return message

    def ModelInfer(self, request: Message, context: grpc.ServicerContext) -> Message:  # noqa: N802
        self._require_key(context)
        context.abort(grpc.StatusCode.NOT_FOUND, f"the fake server has no model {request.model_name!r}")

    def ModelStreamInfer(  # noqa: N802
        self, requests: Iterator[Message], context: grpc.ServicerContext
    ) -> Iterator[Message]:
        self._require_key(context)
        if not context.add_callback(lambda: self._server.count_stream(-1)):
            return  # the client has gone already
        self._server.count_stream(1)
        for request in requests:
            if self._server.blocks_of(request) == self._server.vanish_at_block:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the fake server vanished on purpose")
            yield from self._server.answers(request)

    def _require_key(self, context: grpc.ServicerContext) -> None:
        keys = [value for name, value in context.invocation_metadata() if name == API_KEY_HEADER]
        if self._server.api_key not in (None, *keys):
            words = f"This protocol is restricted, expecting header '{API_KEY_HEADER}'"
            context.abort(grpc.StatusCode.UNAVAILABLE, words)


def _input(request: Message, spec: TensorSpec) -> NDArray[Any] | None:
    return get_tensor(request.inputs, request.raw_input_contents, spec)


def _audio(request: Message, speakers: int) -> Samples:
    """[samples], or [speakers, samples] of several."""
    audio = _input(request, AUDIO)
    block = speakers * BLOCK_SAMPLES
    if audio is None or len(audio) not in (0, block):
        got = "missing or not INT16 [n]" if audio is None else f"of {len(audio)} samples"
        raise _RefusalError(ErrorCode.INVALID_ARGUMENT, f"AUDIO is {got}; send INT16 [{block}] or [0]")
    return audio if speakers == 1 or not len(audio) else audio.reshape(speakers, -1)


def _as_uint8(content: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(content, np.uint8)


def _jpeg(frame: Pixels, quality: int) -> bytes:
    from PIL import Image  # an optional dependency: only JPEG sessions need it

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(file, "JPEG", quality=quality)
    return file.getvalue()
