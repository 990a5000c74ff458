"""The session for asyncio, over grpc's asyncio API; it starts no thread."""

import asyncio
import contextlib
import math
import os
import time
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Iterable
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

import grpc
from tritonclient.grpc import service_pb2_grpc

from . import wire
from .base import (
    CLOSE_GRACE_S,
    LONGEST_WAIT_S,
    BaseSession,
    closed_error,
    open_async_channel,
    require_chunks,
    status_of,
)
from .core import SessionCore, Steps
from .messages import Block, Pixels

_T = TypeVar("_T")


class AsyncAvatarSession(BaseSession):
    """One avatar speaking one speech; use it in an `async with` statement, once.

    `send`, `interrupt` and the iterators may be used from different tasks of one event loop. The session's own tasks do
    not keep it: one that is dropped without `close` is given up.
    """

    def _set_up(self) -> None:
        self._lock = contextlib.nullcontext()
        self._changed = asyncio.Event()
        self._requests: asyncio.Queue[wire.Message | None] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        """The reader, the timer and the feeder."""

    async def __aenter__(self) -> Self:
        with self._update() as core:
            core.open()
        self._channel = open_async_channel(self.url, self._tls)
        try:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
            await self._check_server(stub)
        except BaseException:
            await self._channel.close(None)
            raise
        self._call = stub.ModelStreamInfer(_outgoing(self._requests), metadata=self._metadata)
        session: Held = weakref.ref(self)
        self._start(_read(session, self._call, stub, self._channel), "reader")
        self._start(_keep_time(session, self._changed, self._core), "timer")
        loop = asyncio.get_running_loop()
        self._dropped = weakref.finalize(self, _give_up, self._process, loop, self._core, self._call, self._tasks)
        self._dropped.atexit = False  # the connection ends with the process
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncIterator[Block]:
        """Yield blocks of frames until the last frame of the speech."""
        while (block := await self._run(self._core.next_block())) is not None:
            yield block

    async def frames(self) -> AsyncIterator[tuple[float, Pixels]]:
        """Yield each frame's timestamp in seconds and its pixels [height, width, 3]."""
        async for block in self:
            for timed_frame in block.timed_frames():
                yield timed_frame

    async def send(self, pcm: object, *, speaker: int | None = None, wait: bool = True) -> None:
        """Send a chunk of speech of any size: mono, 16 kHz, int16, or float32 in [-1, 1] (clipped beyond).

        In a session of several speakers it is the speech of `speaker`, while the others are silent; a dict such as
        `{0: pcm, 1: other}` is speech at the same time, the shorter one padded with silence.
        Waits while the session's limits are reached; raises SendTimeout when that takes too long. With
        `wait=False` it raises SessionBusy, and takes nothing, if the chunk cannot be sent now.
        """
        await self._run(self._core.send(pcm, speaker=speaker, wait=wait))

    async def interrupt(self) -> None:
        """Stop the avatar's speech: drop the speech that was not sent, and mark the frames of sent speech as stale.

        The next chunk begins a new speech; frame numbers go on. A waiting `send` returns.
        """
        with self._update() as core:
            core.interrupt()

    async def end(self) -> None:
        """Declare the speech complete; the iterators end after its last frame."""
        with self._update() as core:
            core.end()

    async def keep_alive(self) -> None:
        """Send a keep-alive now; the session sends one by itself after `keep_alive_s` without a request."""
        with self._update() as core:
            core.keep_alive()

    async def stream(self, chunks: AsyncIterable[object] | Iterable[object]) -> AsyncIterator[Block]:
        """Send chunks from a task of its own, end the speech after them, and yield the blocks.

        Errors of `chunks` are raised here.
        """
        require_chunks(chunks, (AsyncIterable, Iterable))
        self._start(_feed(weakref.ref(self), self._changed, self._core, chunks), "feeder")
        async for block in self:
            yield block

    async def close(self) -> None:
        """Cancel all unanswered requests and free the session; leaving the `async with` statement does it."""
        if not self._tasks or not self._is_of_this_process():
            return
        self._dropped.detach()
        self._begin_close()
        try:
            await asyncio.wait(self._tasks[:1], timeout=CLOSE_GRACE_S)
        finally:
            self._call.cancel()
            for task in self._tasks:
                task.cancel()
            await self._channel.close(None)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._tasks.append(asyncio.create_task(work, name=f"live-avatar-{name}"))

    async def _check_server(self, stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
        timeout_s = self._connect_timeout_s
        try:
            ready = await stub.ModelReady(wire.READY_REQUEST, timeout=timeout_s, metadata=self._metadata)
            wire.check_ready(self.url, ready)
            tensors = await stub.ModelMetadata(wire.METADATA_REQUEST, timeout=timeout_s, metadata=self._metadata)
            wire.check_metadata(self.url, tensors, speakers=self._speakers)
        except grpc.RpcError as error:
            raise self._connect_error(error) from error

    async def _cause_of(self, error: grpc.RpcError, stub: service_pb2_grpc.GRPCInferenceServiceStub) -> grpc.RpcError:
        """Ask again why the stream broke: grpc's asyncio API loses the reason when a write was pending."""
        if status_of(error)[0] is grpc.StatusCode.INTERNAL:
            try:
                await stub.ModelInfer(wire.EMPTY_REQUEST, timeout=CLOSE_GRACE_S, metadata=self._metadata)
            except grpc.RpcError as cause:
                if status_of(cause)[0] is grpc.StatusCode.UNAVAILABLE:
                    return cause
        return error

    async def _run(self, steps: Steps[_T]) -> _T:
        """Run an operation of the core; wait between its steps."""
        with self._update():
            while True:
                try:
                    deadline_s = next(steps)
                except StopIteration as done:
                    result: _T = done.value
                    return result
                if not self._flush():
                    await _wait(self._changed, deadline_s)

    def _write(self, message: wire.Message | None) -> None:
        self._requests.put_nowait(message)

    def _notify(self) -> None:
        self._changed.set()


# What the session's tasks do. They hold the session only while they change it.

Held: TypeAlias = weakref.ref[AsyncAvatarSession]


async def _outgoing(requests: asyncio.Queue[wire.Message | None]) -> AsyncIterator[wire.Message]:
    while (message := await requests.get()) is not None:
        yield message


async def _read(
    held: Held, call: Any, stub: service_pb2_grpc.GRPCInferenceServiceStub, channel: grpc.aio.Channel
) -> None:
    """Hand the server's answers to the session until the stream ends."""
    error: grpc.RpcError | None = None
    try:
        async for message in call:
            if session := held():
                session._receive(message)
            del session
    except grpc.RpcError as caught:
        error = caught
    finally:
        if not held():
            await channel.close(None)
    if session := held():
        session._receive_close(None if error is None else await session._cause_of(error, stub))


async def _keep_time(held: Held, changed: asyncio.Event, core: SessionCore) -> None:
    await _run_while_held(held, changed, core.keep_time())


async def _feed(
    held: Held, changed: asyncio.Event, core: SessionCore, chunks: AsyncIterable[object] | Iterable[object]
) -> None:
    """Send the chunks, and end the speech after them."""
    failure: Exception | None = None
    try:
        async for chunk in _each(chunks):
            # No time limit: the reader of the blocks sets the pace.
            if not await _run_while_held(held, changed, core.send(chunk, timeout_s=math.inf)):
                return
        if session := held():
            await session.end()
    except Exception as error:
        failure = error
    if failure and (session := held()):
        with session._update():
            core.fail(failure)


async def _run_while_held(held: Held, changed: asyncio.Event, steps: Steps[None]) -> bool:
    """Go through steps as the session's `_run` does, as long as anybody holds it; return whether that is so."""
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
            await _wait(changed, deadline_s)
    return False


async def _wait(changed: asyncio.Event, deadline_s: float) -> None:
    changed.clear()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(min(deadline_s - time.monotonic(), LONGEST_WAIT_S)):
            await changed.wait()


def _give_up(
    process: int,
    loop: asyncio.AbstractEventLoop,
    core: SessionCore,
    call: Any,
    tasks: list[asyncio.Task[None]],
) -> None:
    """End what is under way for a session that nobody holds any more; called by whatever thread lets go of it."""

    def end() -> None:
        core.fail(closed_error())
        call.cancel()
        for task in tasks[1:]:  # the reader closes the channel
            task.cancel()

    if process == os.getpid():
        with contextlib.suppress(RuntimeError):  # a loop that is closed has cancelled everything
            loop.call_soon_threadsafe(end)


async def _each(chunks: AsyncIterable[object] | Iterable[object]) -> AsyncIterator[object]:
    if isinstance(chunks, AsyncIterable):
        async for chunk in chunks:
            yield chunk
    else:
        for chunk in chunks:
            yield chunk
