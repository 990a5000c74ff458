"""Records what visitors are shown as MP4 files in memory, and hands each out once.

A recording has the blocks that were sent, one behind the other, so that sound and picture belong together whatever the
network does. Nothing is written to disk. A file that nobody fetches is forgotten after a minute.
"""

import asyncio
import io
import logging
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from ..errors import AvatarError, InvalidInput, MediaError
from ..media import MEDIA_FAULTS, Mp4Encoder, provenance_metadata
from ..messages import Block
from ..protocol import FPS
from .guard import network

if TYPE_CHECKING:
    from ..credentials import ContentCredentials

PATH: Final = "/recordings"
MAX_RECORDING_S: Final = 300
MAX_RECORDING_BYTES: Final = 64 * 1024 * 1024
MOST_RECORDINGS: Final = 8
"""That are made or wait to be fetched, of all visitors: each takes memory, and a tenth of a core at 720x400."""
MOST_OF_AN_ADDRESS: Final = 2
KEPT_S: Final = 60.0
"""How long a file waits to be fetched."""
_MOST_WAITING: Final = 150
"""Blocks that wait to be encoded: 24 s."""
_TITLE: Final = "recording.mp4"
_COMPLETE: Final = "it is complete up to here"
_LOG: Final = logging.getLogger("live_avatar_client.web")


class Film:
    """An MP4 in memory that grows block by block. Its methods take long and are called from a thread."""

    def __init__(self, credentials: "ContentCredentials | None") -> None:
        self.frames = 0
        self._credentials = credentials
        self._file = io.BytesIO()
        self._encoder: Mp4Encoder | None = None
        self._provenance: Mapping[str, Any] = {}

    @property
    def size_bytes(self) -> int:
        return self._file.getbuffer().nbytes

    def add(self, block: Block, provenance: Mapping[str, Any]) -> None:
        """Append the frames of a block and their sound; `provenance` counts with the first."""
        for jpeg in block.jpegs:
            frame = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
            if self._encoder is None:
                self._provenance, metadata = provenance, provenance_metadata(provenance)
                height, width, _ = frame.shape
                self._encoder = Mp4Encoder(self._file, width, height, has_sound=True, metadata=metadata)
            self._encoder.write_frame(frame)
            self.frames += 1
        if self._encoder is not None:
            self._encoder.write_sound(block.audio)

    def finish(self) -> bytes:
        """Complete the file and return it, signed if there are credentials; b"" without a frame."""
        if self._encoder is None:
            return b""
        self._encoder.finish()
        if self._credentials is None:
            return self._file.getvalue()
        signed = io.BytesIO()
        self._file.seek(0)
        self._credentials.sign(self._file, signed, _TITLE, self._provenance)
        return signed.getvalue()

    def close(self) -> None:
        if self._encoder is not None:
            self._encoder.close()


class Recording:
    """One recording, from its start until its file is fetched."""

    def __init__(self, credentials: "ContentCredentials | None") -> None:
        self.token = secrets.token_urlsafe(16)
        self.file = b""
        """The MP4, when the recording has ended with one."""
        self.sentence = ""
        """Why it ended although nobody asked for it, or why there is no file."""
        self.ended = asyncio.Event()
        self.is_wanted = False
        """Whether the visitor has ended it, and is waiting for the file."""
        self._film = Film(credentials)
        self._blocks: asyncio.Queue[tuple[Block, Mapping[str, Any]] | None] = asyncio.Queue()
        self._is_open = True

    @property
    def path(self) -> str:
        """Where the file is fetched."""
        return f"{PATH}/{self.token}"

    def add(self, block: Block, provenance: Mapping[str, Any]) -> None:
        """Take a block that was sent; never waits."""
        if not self._is_open:
            return
        self._blocks.put_nowait((block, provenance))
        if self._blocks.qsize() > _MOST_WAITING:
            self._stop(f"the page's server is too busy to record; {_COMPLETE}")

    def stop(self) -> None:
        """Let the recording end with the blocks that it has, because the visitor wants it."""
        self.is_wanted = True
        self._stop("")

    async def run(self) -> None:
        """Encode the blocks to the end; then `ended` is set."""
        try:
            while item := await self._blocks.get():
                await asyncio.to_thread(self._film.add, *item)
                self._stop_at_a_limit()
            self.file = await asyncio.to_thread(self._film.finish)
            if not self.file:
                self.sentence = "nothing was shown that could be recorded; record for longer"
        except (*MEDIA_FAULTS, MediaError) as fault:
            _LOG.error("a recording has failed: %s", fault)
        finally:
            if not self.file and self._film.frames:
                self.sentence = "the recording has failed; tell the page's operator"
            self._is_open = False
            self._film.close()
            self.ended.set()

    def _stop(self, sentence: str) -> None:
        if self._is_open:
            self._is_open, self.sentence = False, sentence
            self._blocks.put_nowait(None)

    def _stop_at_a_limit(self) -> None:
        if self._film.frames >= MAX_RECORDING_S * FPS:
            self._cut(f"the recording has {MAX_RECORDING_S} s, the limit; {_COMPLETE}")
        elif self._film.size_bytes >= MAX_RECORDING_BYTES:
            self._cut(f"the recording has {MAX_RECORDING_BYTES} bytes, the limit; {_COMPLETE}")

    def _cut(self, sentence: str) -> None:
        """Stop without the blocks that wait."""
        while not self._blocks.empty():
            self._blocks.get_nowait()
        self._is_open = True
        self._stop(sentence)


class Recordings:
    """All recordings that are made or wait to be fetched."""

    def __init__(self, credentials: "ContentCredentials | None") -> None:
        self._credentials = credentials
        self._open: dict[str, tuple[Recording, str]] = {}
        """By token, with the address of the visitor."""
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, address: str) -> Recording:
        """Start a recording for a visitor; raise InvalidInput when there are too many."""
        name = network(address)
        if sum(name == other for _, other in self._open.values()) >= MOST_OF_AN_ADDRESS:
            raise InvalidInput(
                f"your address has {MOST_OF_AN_ADDRESS} recordings, the limit; save one of them, and try again"
            )
        if len(self._open) >= MOST_RECORDINGS:
            raise InvalidInput(f"the page makes {MOST_RECORDINGS} recordings, the limit; try again in a minute")
        recording = Recording(self._credentials)
        self._open[recording.token] = recording, name
        task = asyncio.create_task(self._keep(recording))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return recording

    async def fetch(self, token: str) -> Recording:
        """End a recording and wait for its file, which can be fetched once; raise AvatarError if there is none."""
        recording, _ = self._open.get(token, (None, ""))
        if recording is None:
            raise InvalidInput(f"there is no such recording; a file is kept for {KEPT_S:g} s and can be saved once")
        recording.stop()
        await recording.ended.wait()
        self._open.pop(token, None)
        if not recording.file:
            raise AvatarError(recording.sentence)
        return recording

    async def _keep(self, recording: Recording) -> None:
        await recording.run()
        await asyncio.sleep(KEPT_S)
        self._open.pop(recording.token, None)
