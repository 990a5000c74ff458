"""Limits of sessions, and the avatars that are remembered."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.errors import CapacityError, InputError, ShutdownError
from live_avatar.gateway.admission import Admission, Phase
from live_avatar.gateway.avatars import Avatar, Avatars, AvatarSource
from live_avatar.serving.gateway_settings import Limits


def limits(**changes: object) -> Limits:
    values: dict[str, object] = {"max_sessions": 3, "idle_s": 30.0, "pipe_blocks": 4, "lone_blocks": 6}
    return Limits(**(values | changes))  # type: ignore[arg-type]


def admission(**changes: object) -> Admission:
    made = Admission(limits(**changes), lambda: now_s[0])
    made.is_pipe_ready = True
    return made


now_s = [100.0]


def test_no_more_sessions_than_the_server_takes():
    door = admission()
    for caller in ("a", "b", "a"):
        door.open(caller)
    assert (door.live, door.free) == (3, 0)
    with pytest.raises(CapacityError, match="all 3 sessions of this server are taken; try again later or elsewhere"):
        door.open("c")
    door.close("a")
    assert door.free == 1
    door.open("c")


def test_no_more_sessions_than_a_key_may_have():
    door = admission(sessions_per_key=1)
    door.open("a")
    with pytest.raises(CapacityError, match="all 1 sessions of key a are taken; end one of them"):
        door.open("a")
    door.open("b")
    door.close("a")
    door.open("a")


def test_no_more_starts_within_a_minute_than_a_key_may_have():
    door = admission(starts_per_minute=2, max_sessions=100)
    for _ in range(2):
        door.open("a")
    now_s[0] += 20.0
    with pytest.raises(CapacityError, match=r"key a has started 2 sessions within a minute.*try again in 40 s"):
        door.open("a")
    door.open("b")
    now_s[0] += 41.0
    door.open("a")


def test_a_server_that_shuts_down_takes_no_sessions_and_then_ends_those_it_has():
    door = admission()
    door.check_phase()
    door.check_continue()
    door.phase = Phase.DRAINING
    assert (door.is_ready, door.free) == (False, 0)
    with pytest.raises(ShutdownError, match="takes no new sessions; connect again to reach another one"):
        door.check_phase()
    door.check_continue()
    door.phase = Phase.CLOSING
    with pytest.raises(ShutdownError, match="shutting down; reconnect, and start a new session"):
        door.check_continue()


def test_a_session_that_had_its_place_before_the_drain_starts():
    """Its avatar is prepared meanwhile."""
    door = admission()
    door.open("a")
    door.phase = Phase.DRAINING
    door.check_admitted()
    door.phase = Phase.CLOSING
    with pytest.raises(ShutdownError, match="shutting down; reconnect"):
        door.check_admitted()
    door.phase, door.is_pipe_ready = Phase.SERVING, False
    with pytest.raises(CapacityError, match="a stage of this server is being started"):
        door.check_admitted()


def test_no_session_starts_while_a_stage_is_away():
    door = admission()
    door.is_pipe_ready = False
    assert not door.is_ready
    with pytest.raises(CapacityError, match="a stage of this server is being started; try again later"):
        door.check_phase()


class Encoder:
    """Counts what it encodes, and fails for the picture `bad`."""

    def __init__(self) -> None:
        self.calls: list[tuple[bytes, str]] = []

    async def __call__(self, source: AvatarSource) -> tuple[Array, Array, Array]:
        self.calls.append((source.picture, source.prompt))
        await asyncio.sleep(0)
        if source.picture == b"bad":
            raise InputError("no picture")
        return np.zeros(1, np.float32), np.zeros(2, np.float32), np.zeros((0, 1), np.float32)


async def get(avatars: Avatars, owner: str, picture: bytes, prompt: str) -> tuple[Avatar, bool]:
    return await avatars.get(owner, await AvatarSource.of(picture, prompt))


def test_an_avatar_is_remembered_for_its_owner_alone():
    async def main() -> None:
        encoder = Encoder()
        avatars = Avatars(encoder, limits(), lambda: now_s[0])
        first, known = await get(avatars, "a", b"picture", "prompt")
        assert (known, len(first.key)) == (False, 32)
        again, known = await get(avatars, "a", b"picture", "prompt")
        assert (known, again.key) == (True, first.key)
        for owner, picture, prompt in (("b", b"picture", "prompt"), ("a", b"other", "prompt"), ("a", b"picture", "x")):
            other, known = await get(avatars, owner, picture, prompt)
            assert not known
            assert other.key != first.key, "another's caches in the steps would tell the time"
        assert len(encoder.calls) == 4

    asyncio.run(main())


def test_two_sessions_that_want_one_avatar_at_once_encode_it_once():
    async def main() -> None:
        encoder = Encoder()
        avatars = Avatars(encoder, limits())
        made = await asyncio.gather(*(get(avatars, "a", b"picture", "prompt") for _ in range(3)))
        assert len(encoder.calls) == 1
        assert len({avatar.key for avatar, _ in made}) == 1

    asyncio.run(main())


def test_an_error_is_not_remembered():
    async def main() -> None:
        encoder = Encoder()
        avatars = Avatars(encoder, limits())
        for _ in range(2):
            with pytest.raises(InputError):
                await get(avatars, "a", b"bad", "prompt")
        assert len(encoder.calls) == 2
        assert len(avatars) == 0

    asyncio.run(main())


def test_avatars_are_forgotten_by_number_and_by_time():
    async def main() -> None:
        encoder = Encoder()
        avatars = Avatars(encoder, limits(known_avatars=2, known_avatar_s=10.0), lambda: now_s[0])
        for picture in (b"1", b"2", b"1", b"3"):
            await get(avatars, "a", picture, "")
        assert len(avatars) == 2
        assert (await get(avatars, "a", b"1", ""))[1]
        assert not (await get(avatars, "a", b"2", ""))[1]
        now_s[0] += 11.0
        avatars.forget_old()
        assert len(avatars) == 0

    asyncio.run(main())


def test_avatars_of_callers_that_leave_do_not_pile_up():
    async def main() -> None:
        running: list[bytes] = []

        async def make(source: AvatarSource) -> tuple[Array, Array, Array]:
            running.append(source.picture)
            try:
                await asyncio.sleep(30)
            finally:
                running.remove(source.picture)
            raise AssertionError

        avatars = Avatars(make, limits())
        waiting = [asyncio.create_task(get(avatars, "a", picture, "")) for picture in (b"1", b"1", b"2")]
        while len(running) < 2:
            await asyncio.sleep(0.01)
        for task, left in zip(waiting, ([b"1", b"2"], [b"2"], []), strict=True):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(0)
            assert running == left
        assert len(avatars) == 0

    asyncio.run(main())


def test_other_masks_make_another_avatar():
    async def main() -> None:
        avatars = Avatars(Encoder(), limits())
        keys = []
        for masks in ((b"1", b"2"), (b"2", b"1"), (b"12", b""), (b"1", b"2")):
            avatar, _ = await avatars.get("a", await AvatarSource.of(b"picture", "prompt", masks))
            keys.append(avatar.key)
        assert keys[3] == keys[0]
        assert len(set(keys)) == 3

    asyncio.run(main())
