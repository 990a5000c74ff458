"""The ways in which a session of the soak ends: by the client library, or by raw requests that it would not send."""

from __future__ import annotations

import hashlib
import io
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Self

import grpc
import numpy as np
from tritonclient.grpc import service_pb2_grpc

from live_avatar.arrays import Array
from live_avatar_client.base import call_metadata, open_channel
from live_avatar_client.errors import AvatarError, SessionFailed, SessionRefused
from live_avatar_client.messages import Opening, Request, Response
from live_avatar_client.protocol import (
    BLOCK_SAMPLES,
    FRAMES_PER_BLOCK,
    MAX_SEQUENCE_ID,
    SEED_PARAMETER,
    EndReason,
    ErrorCode,
    FrameFormat,
    parse_error,
)
from live_avatar_client.wire import Message, decode_response, encode_request
from perf.soak_sessions import FULL, NOTHING, Ending, SoakSession

CALL_S = 300.0


class Unexpected(Exception):  # noqa: N818 - it is a finding of the soak
    """The server did not react as this ending requires."""


class RawStream:
    """A client of single requests, valid or not, on its own stream; it waits for each answer."""

    def __init__(self, session: SoakSession, sequence_id: int | None = None) -> None:
        self.sequence_id = sequence_id or secrets.randbelow(MAX_SEQUENCE_ID) + 1
        self.said = 0
        self._session = session
        self._token = secrets.token_hex(16)
        self._channel = open_channel(session.context.url)
        self._messages: list[Message] = []
        self._given = threading.Semaphore(0)
        self._over = False
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        metadata = call_metadata(session.context.api_key)
        self._call = stub.ModelStreamInfer(self._requests(), timeout=CALL_S, metadata=metadata)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the session in any state, unless the call is cancelled."""
        with suppress(AvatarError, grpc.RpcError):
            if not self._over:
                self.ask(self.request(NOTHING, end=EndReason.FAILED if kind else EndReason.COMPLETED))
        self.cancel()

    def request(self, audio: Array, *, start: bool = False, end: EndReason | None = None) -> Message:
        utterance = self._session.utterance
        opening = Opening(utterance.image, utterance.prompt, utterance.seed, FrameFormat.RAW) if start else None
        return encode_request(Request(self.sequence_id, self._token, audio, opening, end))

    def start(self) -> None:
        self.ask(self.request(NOTHING, start=True))

    def say(self, blocks: int) -> None:
        """Sends the next blocks of the utterance and checks their frames."""
        for _ in range(blocks):
            answer = self.ask(self.request(self._session.utterance.speech[self.said]))
            self.said += 1
            self._session.compare(
                answer.first_frame, [frame.tobytes() for frame in answer.frames], self._session.utterance.frames
            )

    def ask(self, message: Message) -> Response:
        """Raises `SessionRefused` or `SessionFailed` for an error."""
        self._send(message)
        answer = next(self._call)
        if not answer.error_message:
            return decode_response(answer.infer_response)
        code, sentence = parse_error(answer.error_message)
        raise (SessionRefused if FULL in sentence else SessionFailed)(sentence, code)

    def refused(self, message: Message, code: ErrorCode) -> None:
        """Sends a request that the server must refuse with the code."""
        try:
            self.ask(message)
        except SessionFailed as error:
            if error.code is not code:
                raise
        else:
            raise Unexpected("the server answered what it should have refused")

    def cancel(self) -> None:
        self._over = True
        self._given.release()
        self._call.cancel()
        self._channel.close()

    def send_and_cancel(self) -> None:
        """Cancels the call with a block in flight."""
        self._send(self.request(self._session.utterance.speech[self.said]))
        self.cancel()

    def _send(self, message: Message) -> None:
        self._messages.append(message)
        self._given.release()

    def _requests(self) -> Iterator[Message]:
        while True:
            self._given.acquire()
            if self._over and not self._messages:
                return
            yield self._messages.pop(0)


def completed(session: SoakSession) -> None:
    frames = 0
    with session.client() as client:
        for block in client.stream(session.speech()):
            session.check(block)
            frames += len(block)
    if frames != session.blocks * FRAMES_PER_BLOCK:
        raise Unexpected(f"{frames} frames came for {session.blocks} blocks")


def closed(session: SoakSession) -> None:
    wanted = session.rng.randint(0, session.blocks - 1)
    with session.client() as client:
        for _, block in zip(range(wanted), client.stream(session.speech()), strict=False):
            session.check(block)


def interrupted(session: SoakSession) -> None:
    """Says some blocks and half of one, which is dropped at the interrupt; goes on with the rest of the utterance."""
    before = session.rng.randint(1, session.blocks)
    said = session.utterance.speech_of(session.blocks)
    cut = before * BLOCK_SAMPLES
    with session.client() as client:
        client.send(np.concatenate([said[:cut], said[: BLOCK_SAMPLES // 2]]))
        client.interrupt()
        client.send(said[cut:])
        client.end()
        frames = 0
        for block in client:
            session.check(block)
            frames += len(block)
            if block.stale != (block.first_frame < before * FRAMES_PER_BLOCK):
                raise Unexpected(f"stale is {block.stale} of frame {block.first_frame}, interrupted at block {before}")
    if frames != session.blocks * FRAMES_PER_BLOCK:
        raise Unexpected(f"{frames} frames came for {session.blocks} blocks, interrupted at block {before}")


def idle(session: SoakSession) -> None:
    """Short, because its frames must be generated: the places of the silence are not known before."""
    spoken = session.utterance.speech_of(min(session.blocks, 3))
    with session.client(idle=True) as client:
        time.sleep(session.rng.uniform(0.0, 1.5))
        client.send(spoken)
        time.sleep(session.rng.uniform(0.0, 1.5))
        client.send(spoken[:BLOCK_SAMPLES])
        client.end()
        blocks = list(client)
    heard = np.concatenate([block.audio for block in blocks])
    expected = session.context.oracle.frames(session.utterance, heard)
    session = replace(session, blocks=len(heard) // BLOCK_SAMPLES)
    for block in blocks:
        session.compare(block.first_frame, [frame.tobytes() for frame in block.frames], expected)


def cancelled(session: SoakSession) -> None:
    with RawStream(session) as stream:
        stream.start()
        stream.say(session.rng.randint(0, session.blocks - 1))
        stream.send_and_cancel()


CLIENT = """
import hashlib, io, sys
import numpy as np
from live_avatar_client import AvatarSession
from live_avatar_client.errors import AvatarError
given = np.load(io.BytesIO(sys.stdin.buffer.read()))
try:
    url, prompt, seed, key = sys.argv[1:]
    avatar = {"image": given["image"].tobytes(), "prompt": prompt, "seed": int(seed)}
    with AvatarSession(url, **avatar, api_key=key or None) as session:
        for block in session.stream([given["speech"]]):
            print(block.first_frame, *(hashlib.sha256(frame).hexdigest() for frame in block.frames), flush=True)
except AvatarError as error:
    print(type(error).__name__, error, flush=True)
"""


def killed(session: SoakSession) -> None:
    """A client in a separate process gets SIGKILL."""
    utterance, given = session.utterance, io.BytesIO()
    np.savez(given, image=np.frombuffer(utterance.image, dtype=np.uint8), speech=utterance.speech_of(session.blocks))
    arguments = (session.context.url, utterance.prompt, str(utterance.seed), session.context.api_key or "")
    command = [sys.executable, "-c", CLIENT, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        try:
            client.stdin.write(given.getvalue())
            client.stdin.close()
            for _ in range(session.rng.randint(1, session.blocks)):
                first, *rest = client.stdout.readline().decode().split(maxsplit=1) or ["nothing"]
                if not first.isdecimal():
                    words = " ".join([first, *rest])
                    raise (SessionRefused if FULL in words else SessionFailed)(words)
                _compare_hashes(session, int(first), rest[0].split())
        finally:
            client.kill()


def _compare_hashes(session: SoakSession, first: int, hashes: Sequence[str]) -> None:
    frames = session.utterance.frames[first : first + len(hashes)]
    expected = [hashlib.sha256(frame.tobytes()).hexdigest().encode() for frame in frames]
    session.context.results.compare(session.ending, first, [word.encode() for word in hashes], expected)


def silent(session: SoakSession) -> None:
    with RawStream(session) as stream:
        stream.start()
        stream.say(session.blocks - 1)
        time.sleep(session.context.idle_s + 2.0)
        stream.refused(stream.request(session.utterance.speech[stream.said]), ErrorCode.FAILED_PRECONDITION)


def started_twice(session: SoakSession) -> None:
    """A second START is refused; the session goes on."""
    with RawStream(session) as stream:
        stream.start()
        before = session.rng.randint(0, session.blocks)
        stream.say(before)
        stream.refused(stream.request(NOTHING, start=True), ErrorCode.INVALID_ARGUMENT)
        stream.say(session.blocks - before)


def unknown(session: SoakSession) -> None:
    with RawStream(session) as stream:
        stream.refused(stream.request(session.utterance.speech[0]), ErrorCode.FAILED_PRECONDITION)


def other_stream(session: SoakSession) -> None:
    """Another stream uses the id, with END or without; the session goes on."""
    with RawStream(session) as stream:
        stream.start()
        before = session.rng.randint(0, session.blocks)
        stream.say(before)
        intruder = RawStream(session, stream.sequence_id)
        try:
            end = session.rng.choice((None, EndReason.COMPLETED))
            intruder.refused(intruder.request(session.utterance.speech[0], end=end), ErrorCode.FAILED_PRECONDITION)
        finally:
            intruder.cancel()
        stream.say(session.blocks - before)


def bad_input(session: SoakSession) -> None:
    """An invalid START, or a block of a wrong length, after which the session goes on."""
    with RawStream(session) as stream:
        message = stream.request(NOTHING, start=True)
        match session.rng.choice(("picture", "seed", "prompt", "block")):
            case "picture":
                bad = encode_request(
                    Request(stream.sequence_id, "t", NOTHING, Opening(b"no picture", "", 0, FrameFormat.RAW), None)
                )
                stream.refused(bad, ErrorCode.INVALID_ARGUMENT)
            case "seed":
                message.parameters[SEED_PARAMETER].string_param = "seven"
                stream.refused(message, ErrorCode.INVALID_ARGUMENT)
            case "prompt":
                message.raw_input_contents[-1] = b"\x02\x00\x00\x00\xff\xfe"
                stream.refused(message, ErrorCode.INVALID_ARGUMENT)
            case _:
                stream.ask(message)
                stream.refused(stream.request(session.utterance.speech[0][:-1]), ErrorCode.INVALID_ARGUMENT)
                stream.say(session.blocks)


ENDINGS: dict[Ending, Callable[[SoakSession], None]] = {
    Ending.COMPLETED: completed,
    Ending.CLOSED: closed,
    Ending.INTERRUPTED: interrupted,
    Ending.IDLE: idle,
    Ending.CANCELLED: cancelled,
    Ending.KILLED: killed,
    Ending.SILENT: silent,
    Ending.STARTED_TWICE: started_twice,
    Ending.UNKNOWN: unknown,
    Ending.OTHER_STREAM: other_stream,
    Ending.BAD_INPUT: bad_input,
    Ending.DRAINED: completed,
}
