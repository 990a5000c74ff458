"""A room of LiveKit without a server."""

from __future__ import annotations

from livekit import rtc


class StubRoom:
    """As much of a room as the AvatarRunner asks for: it is connected, and takes tracks."""

    def __init__(self) -> None:
        self.local_participant = self
        self.tracks: list[rtc.Track] = []

    def isconnected(self) -> bool:
        return True

    def on(self, *_: object) -> None: ...

    def off(self, *_: object) -> None: ...

    async def publish_track(self, track: rtc.Track, _: object) -> StubRoom:
        self.tracks.append(track)
        return self

    async def wait_for_subscription(self) -> None: ...
