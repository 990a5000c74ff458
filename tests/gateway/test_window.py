"""The order in which blocks enter the pipe."""

from __future__ import annotations

import asyncio

import pytest

from live_avatar.gateway.window import AHEAD_BLOCKS, BLOCK_S, PipeWindow
from live_avatar.serving.gateway_settings import Limits

LIMITS = Limits(max_sessions=8, idle_s=30.0, pipe_blocks=4, lone_blocks=6)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Pipe:
    """A window, and which blocks have entered in which order."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.window = PipeWindow(LIMITS, self.clock)
        self.entered: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    def ask(self, session: str, blocks: int) -> None:
        """A session that has so many blocks to send."""

        async def send() -> None:
            for _ in range(blocks):
                await self.window.enter(session)
                self.entered.append(session)

        self.tasks.append(asyncio.create_task(send()))

    async def settle(self) -> list[str]:
        """Those that have entered since the last call."""
        for _ in range(20):
            await asyncio.sleep(0)
        entered, self.entered = self.entered, []
        return entered

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def run(test: object) -> None:
    async def main() -> None:
        pipe = Pipe()
        try:
            await test(pipe)  # type: ignore[operator]
        finally:
            await pipe.close()

    asyncio.run(main())


def test_a_session_alone_fills_the_pipe_and_no_more():
    async def alone(pipe: Pipe) -> None:
        pipe.window.join("a")
        pipe.ask("a", 20)
        assert await pipe.settle() == ["a"] * LIMITS.lone_blocks
        pipe.window.exit("a")
        assert await pipe.settle() == ["a"]

    run(alone)


def test_sessions_that_are_ahead_share_the_pipe():
    async def shared(pipe: Pipe) -> None:
        for name in ("a", "b"):
            pipe.window.join(name)
            pipe.ask(name, 20)
        entered = await pipe.settle()
        # Both are in real time at first; after that each has its share.
        assert sorted(set(entered)) == ["a", "b"]
        for name in entered:
            pipe.window.exit(name)
        for _ in range(4):
            entered = await pipe.settle()
            assert (entered.count("a"), entered.count("b")) == (2, 2)
            for name in entered:
                pipe.window.exit(name)

    run(shared)


def test_a_session_in_real_time_never_waits_for_one_that_is_ahead():
    async def beside(pipe: Pipe) -> None:
        for name in ("greedy", "spoken"):
            pipe.window.join(name)
        pipe.ask("greedy", 1000)
        await pipe.settle()
        for block in range(10):
            pipe.clock.now_s = block * BLOCK_S
            pipe.ask("spoken", 1)
            assert "spoken" in await pipe.settle(), block
            pipe.window.exit("spoken")

    run(beside)


def test_silence_is_no_credit_for_a_burst():
    """A session that was silent for a minute, and then sends all at once, is ahead as any other."""

    async def credit(pipe: Pipe) -> None:
        for name in ("silent", "other"):
            pipe.window.join(name)
        pipe.clock.now_s = 60.0
        pipe.ask("silent", 100)
        assert await pipe.settle() == ["silent"] * AHEAD_BLOCKS

    run(credit)


def test_a_burst_within_the_tolerance_counts_as_real_time():
    async def burst(pipe: Pipe) -> None:
        for name in ("a", "b"):
            pipe.window.join(name)
        pipe.ask("a", AHEAD_BLOCKS)
        assert await pipe.settle() == ["a"] * AHEAD_BLOCKS

    run(burst)


def test_an_end_frees_the_places():
    async def ended(pipe: Pipe) -> None:
        pipe.window.join("a")
        pipe.ask("a", 20)
        await pipe.settle()
        pipe.window.join("b")
        pipe.window.leave("a")
        assert pipe.window.inside() == 0
        pipe.ask("b", 3)
        assert await pipe.settle() == ["a", "b", "b", "b"]  # the block of "a" waits no longer, and takes no place

    run(ended)


def test_a_waiter_that_is_cancelled_holds_no_place():
    async def cancelled(pipe: Pipe) -> None:
        pipe.window.join("a")
        pipe.ask("a", LIMITS.lone_blocks)
        await pipe.settle()
        waiter = asyncio.create_task(pipe.window.enter("a"))
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        pipe.window.exit("a")
        pipe.ask("a", 1)
        assert await pipe.settle() == ["a"]
        assert pipe.window.inside() == LIMITS.lone_blocks

    run(cancelled)
