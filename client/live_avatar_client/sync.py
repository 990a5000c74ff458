"""The blocking session, for programs with threads, over grpc's blocking API."""

import math
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

import grpc
from tritonclient.grpc import service_pb2_grpc

from . import wire
from .base import CLOSE_GRACE_S, LONGEST_WAIT_S, BaseSession, closed_error, open_channel, require_chunks
from .core import SessionCore, Steps
from .messages import Block, Pixels

_T = TypeVar("_T")


class AvatarSession(BaseSession):
    """One avatar speaking one speech; use it in a `with` statement, once.

    `send`, `interrupt` and the iterators may be used from different threads. The session's own threads do not keep it:
    one that is dropped without `close` is given up.
    """

    def _set_up(self) -> None:
        self._lock = self._changed = threading.Condition()
        self._requests: queue.SimpleQueue[wire.Message | None] = queue.SimpleQueue()
        self._reader: threading.Thread | None = None
        self._timer: threading.Thread | None = None
        self._feeder: threading.Thread | None = None

    def __enter__(self) -> Self:
        with self._update() as core:
            core.open()
        self._channel = open_channel(self.url, self._tls)
        try:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
            self._check_server(stub)
        except BaseException:
            self._channel.close()
            raise
        self._call = stub.ModelStreamInfer(iter(self._requests.get, None), metadata=self._metadata)
        session: Held = weakref.ref(self)
        changed, steps, call, channel = self._changed, self._core.keep_time(), self._call, self._channel
        self._reader = _started(lambda: _read(session, call, channel), "reader")
        self._timer = _started(lambda: _run_while_held(session, changed, steps), "timer")
        self._dropped = weakref.finalize(self, _give_up, self._process, self._core, changed, self._requests, call)
        self._dropped.atexit = False  # the connection ends with the process
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Block]:
        """Yield blocks of frames until the last frame of the speech."""
        while (block := self._run(self._core.next_block())) is not None:
            yield block

    def frames(self) -> Iterator[tuple[float, Pixels]]:
        """Yield each frame's timestamp in seconds and its pixels [height, width, 3]."""
        for block in self:
            yield from block.timed_frames()

    def send(self, pcm: object, *, speaker: int | None = None, wait: bool = True) -> None:
        """Send a chunk of speech of any size: mono, 16 kHz, int16, or float32 in [-1, 1] (clipped beyond).

        In a session of several speakers it is the speech of `speaker`, while the others are silent; a dict such as
        `{0: pcm, 1: other}` is speech at the same time, the shorter one padded with silence.
        Waits while the session's limits are reached; raises SendTimeout when that takes too long. With
        `wait=False` it raises SessionBusy, and takes nothing, if the chunk cannot be sent now.
        """
        self._run(self._core.send(pcm, speaker=speaker, wait=wait))

    def interrupt(self) -> None:
        """Stop the avatar's speech: drop the speech that was not sent, and mark the frames of sent speech as stale.

        The next chunk begins a new speech; frame numbers go on. A waiting `send` returns.
        """
        with self._update() as core:
            core.interrupt()

    def end(self) -> None:
        """Declare the speech complete; the iterators end after its last frame."""
        with self._update() as core:
            core.end()

    def keep_alive(self) -> None:
        """Send a keep-alive now; the session sends one by itself after `keep_alive_s` without a request."""
        with self._update() as core:
            core.keep_alive()

    def stream(self, chunks: Iterable[object]) -> Iterator[Block]:
        """Send chunks from a thread of its own, end the speech after them, and yield the blocks.

        Errors of `chunks` are raised here. The thread cannot be stopped while it waits for a
        chunk: after the session has closed it ends with the next chunk.
        """
        require_chunks(chunks, Iterable)
        session: Held = weakref.ref(self)
        changed, core = self._changed, self._core
        self._feeder = _started(lambda: _feed(session, changed, core, chunks), "feeder")
        yield from self

    def close(self) -> None:
        """Cancel all unanswered requests and free the session; leaving the `with` statement does it."""
        if self._reader is None or self._timer is None or not self._is_of_this_process():
            return
        self._dropped.detach()
        self._begin_close()
        try:
            self._reader.join(CLOSE_GRACE_S)
        finally:
            self._call.cancel()
            self._channel.close()
        self._reader.join()
        self._timer.join()
        if self._feeder is not None:
            self._feeder.join(CLOSE_GRACE_S)

    def _check_server(self, stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
        timeout_s = self._connect_timeout_s
        try:
            ready = stub.ModelReady(wire.READY_REQUEST, timeout=timeout_s, metadata=self._metadata)
            wire.check_ready(self.url, ready)
            tensors = stub.ModelMetadata(wire.METADATA_REQUEST, timeout=timeout_s, metadata=self._metadata)
            wire.check_metadata(self.url, tensors, speakers=self._speakers)
        except grpc.RpcError as error:
            raise self._connect_error(error) from error

    def _run(self, steps: Steps[_T]) -> _T:
        """Run an operation of the core; wait between its steps."""
        with self._update():
            while True:
                try:
                    deadline_s = next(steps)
                except StopIteration as done:
                    result: _T = done.value
                    return result
                if not self._flush():
                    self._changed.wait(min(deadline_s - time.monotonic(), LONGEST_WAIT_S))

    def _write(self, message: wire.Message | None) -> None:
        self._requests.put(message)

    def _notify(self) -> None:
        self._changed.notify_all()


# What the session's threads do. They hold the session only while they change it.

Held: TypeAlias = weakref.ref[AvatarSession]


def _read(held: Held, call: Any, channel: grpc.Channel) -> None:
    """Hand the server's answers to the session until the stream ends."""
    error: grpc.RpcError | None = None
    try:
        for message in call:
            if session := held():
                session._receive(message)
            del session
    except grpc.RpcError as caught:
        error = caught
    if session := held():
        session._receive_close(error)
    else:
        channel.close()


def _feed(held: Held, changed: threading.Condition, core: SessionCore, chunks: Iterable[object]) -> None:
    """Send the chunks, and end the speech after them."""
    failure: BaseException | None = None
    try:
        for chunk in chunks:
            # No time limit: the reader of the blocks sets the pace.
            if not _run_while_held(held, changed, core.send(chunk, timeout_s=math.inf)):
                return
        if session := held():
            session.end()
    except BaseException as error:
        failure = error
    if failure and (session := held()):
        with session._update():
            core.fail(failure)


def _run_while_held(held: Held, changed: threading.Condition, steps: Steps[None]) -> bool:
    """Go through steps as `AvatarSession._run` does, while anybody holds the session; return whether that is so."""
    with changed:
        while session := held():
            try:
                deadline_s = next(steps)
            except BaseException as end:
                with session._update():  # sends and tells what the last step has changed
                    if isinstance(end, StopIteration):
                        return True
                    raise
            is_sent = session._flush()
            del session
            if not is_sent and held():
                changed.wait(min(deadline_s - time.monotonic(), LONGEST_WAIT_S))
    return False


def _give_up(
    process: int,
    core: SessionCore,
    changed: threading.Condition,
    requests: queue.SimpleQueue[wire.Message | None],
    call: Any,
) -> None:
    """End what is under way for a session that nobody holds any more."""
    if process != os.getpid():
        return
    with changed:
        core.fail(closed_error())
        changed.notify_all()
    requests.put(None)
    call.cancel()


def _started(target: Callable[[], object], name: str) -> threading.Thread:
    thread = threading.Thread(target=target, name=f"live-avatar-{name}", daemon=True)
    thread.start()
    return thread
