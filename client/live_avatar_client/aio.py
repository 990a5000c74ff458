"""The session for asyncio, over grpc's asyncio API; it starts no thread."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from types import TracebackType
from typing import Self, TypeVar

import grpc
from tritonclient.grpc import service_pb2_grpc

from . import wire
from .base import CLOSE_GRACE_S, LONGEST_WAIT_S, BaseSession, open_async_channel, status_of
from .core import Steps
from .messages import Block, Pixels

_T = TypeVar("_T")


class AsyncAvatarSession(BaseSession):
    """One avatar speaking one speech; use it in an `async with` statement, once.

    `send`, `interrupt` and the iterators may be used from different tasks of one event loop.
    """

    def _set_up(self) -> None:
        self._lock = contextlib.nullcontext()
        self._changed = asyncio.Event()
        self._requests: asyncio.Queue[wire.Message | None] = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None
        self._timer: asyncio.Task[None] | None = None
        self._feeder: asyncio.Task[None] | None = None

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
        self._call = stub.ModelStreamInfer(self._outgoing(), metadata=self._metadata)
        self._reader = asyncio.create_task(self._read(stub), name="live-avatar-reader")
        self._timer = asyncio.create_task(self._run(self._core.keep_time()), name="live-avatar-timer")
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

    async def send(self, pcm: object, *, wait: bool = True) -> None:
        """Send a chunk of speech of any size: mono, 16 kHz, int16, or float32 in [-1, 1] (clipped beyond).

        Waits while the session's limits are reached; raises SendTimeout when that takes too long. With
        `wait=False` it raises SessionBusy, and takes nothing, if the chunk cannot be sent now.
        """
        await self._run(self._core.send(pcm, wait=wait))

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
        self._feeder = asyncio.create_task(self._feed(chunks), name="live-avatar-feeder")
        async for block in self:
            yield block

    async def close(self) -> None:
        """Cancel all unanswered requests and free the session; leaving the `async with` statement does it."""
        if self._reader is None:
            return
        self._begin_close()
        tasks = [task for task in (self._reader, self._timer, self._feeder) if task is not None]
        try:
            await asyncio.wait(tasks[:1], timeout=CLOSE_GRACE_S)
        finally:
            self._call.cancel()
            for task in tasks:
                task.cancel()
            await self._channel.close(None)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _check_server(self, stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
        timeout_s = self._connect_timeout_s
        try:
            ready = await stub.ModelReady(wire.READY_REQUEST, timeout=timeout_s, metadata=self._metadata)
            wire.check_ready(self.url, ready)
            tensors = await stub.ModelMetadata(wire.METADATA_REQUEST, timeout=timeout_s, metadata=self._metadata)
            wire.check_metadata(self.url, tensors)
        except grpc.RpcError as error:
            raise self._connect_error(error) from error

    async def _outgoing(self) -> AsyncIterator[wire.Message]:
        while (message := await self._requests.get()) is not None:
            yield message

    async def _read(self, stub: service_pb2_grpc.GRPCInferenceServiceStub) -> None:
        try:
            async for message in self._call:
                self._receive(message)
        except grpc.RpcError as error:
            self._receive_close(await self._cause_of(error, stub))
        else:
            self._receive_close(None)

    async def _cause_of(self, error: grpc.RpcError, stub: service_pb2_grpc.GRPCInferenceServiceStub) -> grpc.RpcError:
        """Ask again why the stream broke: grpc's asyncio API loses the reason when a write was pending."""
        if status_of(error)[0] is grpc.StatusCode.INTERNAL:
            try:
                await stub.ModelInfer(wire.EMPTY_REQUEST, timeout=CLOSE_GRACE_S, metadata=self._metadata)
            except grpc.RpcError as cause:
                if status_of(cause)[0] is grpc.StatusCode.UNAVAILABLE:
                    return cause
        return error

    async def _feed(self, chunks: AsyncIterable[object] | Iterable[object]) -> None:
        try:
            async for chunk in _each(chunks):
                # No time limit: the reader of the blocks sets the pace.
                await self._run(self._core.send(chunk, timeout_s=math.inf))
            await self.end()
        except Exception as error:
            with self._update() as core:
                core.fail(error)

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
                    await self._wait(min(deadline_s - time.monotonic(), LONGEST_WAIT_S))

    async def _wait(self, timeout_s: float) -> None:
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    def _write(self, message: wire.Message | None) -> None:
        self._requests.put_nowait(message)

    def _notify(self) -> None:
        self._changed.set()


async def _each(chunks: AsyncIterable[object] | Iterable[object]) -> AsyncIterator[object]:
    if isinstance(chunks, AsyncIterable):
        async for chunk in chunks:
            yield chunk
    else:
        for chunk in chunks:
            yield chunk
