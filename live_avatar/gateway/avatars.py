"""Prepares avatars beside the pipe, and remembers those of each caller for a while.

An avatar is remembered for the caller that brought it, under a random key that the steps and the decoder use for their
own caches. So the time that a start takes tells a caller nothing about the avatars of others.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from live_avatar.arrays import Array
from live_avatar.serving.gateway_settings import Limits
from live_avatar.serving.provenance import ContentHashes

KEY_BYTES = 32


@dataclass(frozen=True)
class AvatarSource:
    """A picture, a prompt and the masks of several speakers, with their hashes."""

    picture: bytes
    prompt: str
    hashes: ContentHashes
    masks: tuple[bytes, ...] = ()

    @classmethod
    async def of(cls, picture: bytes, prompt: str, masks: tuple[bytes, ...] = ()) -> AvatarSource:
        """Hashes them in a thread."""
        return cls(picture, prompt, await asyncio.to_thread(ContentHashes.of, picture, prompt, masks), masks)


@dataclass(frozen=True)
class Avatar:
    """What START carries of a picture, prompt and masks. key: 32 random bytes, the same for each session with this
    avatar. weights: of the speakers, [0, S] without masks."""

    key: bytes
    motion: Array
    text: Array
    weights: Array


@dataclass
class _Entry:
    """waiting: sessions that need it now."""

    avatar: asyncio.Task[Avatar]
    used_s: float
    waiting: int = 0


class Avatars:
    """The avatars of all callers. make: motion, text and weights of a source."""

    def __init__(
        self,
        make: Callable[[AvatarSource], Awaitable[tuple[Array, Array, Array]]],
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make = make
        self._limits = limits
        self._clock = clock
        self._entries: OrderedDict[tuple[str, ContentHashes], _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    async def get(self, owner: str, source: AvatarSource) -> tuple[Avatar, bool]:
        """The avatar, and whether it was remembered for `owner`. Raises what `make` raises, and remembers no error."""
        self.forget_old()
        name = (owner, source.hashes)
        entry = self._entries.get(name)
        known = entry is not None
        if entry is None:
            entry = _Entry(asyncio.create_task(self._encode(source)), self._clock())
            self._entries[name] = entry
        entry.waiting += 1
        try:
            # Shielded: another session may wait for the same avatar.
            avatar = await asyncio.shield(entry.avatar)
        except BaseException as error:
            # Callers that start and leave must not pile up avatars that nobody needs.
            is_needed = isinstance(error, asyncio.CancelledError) and (entry.waiting > 1 or _is_made(entry.avatar))
            if not is_needed:
                entry.avatar.cancel()
                if self._entries.get(name) is entry:
                    del self._entries[name]
            raise
        finally:
            entry.waiting -= 1
        entry.used_s = self._clock()
        if name in self._entries:
            self._entries.move_to_end(name)
        while len(self._entries) > self._limits.known_avatars:
            self._entries.popitem(last=False)
        return avatar, known

    def forget_old(self) -> None:
        """Drops the avatars that nobody has used for the operator's time."""
        limit_s = self._clock() - self._limits.known_avatar_s
        for name in [name for name, entry in self._entries.items() if entry.avatar.done() and entry.used_s < limit_s]:
            del self._entries[name]

    async def _encode(self, source: AvatarSource) -> Avatar:
        return Avatar(secrets.token_bytes(KEY_BYTES), *await self._make(source))


def _is_made(avatar: asyncio.Task[Avatar]) -> bool:
    return avatar.done() and not avatar.cancelled() and avatar.exception() is None
