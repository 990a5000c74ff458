"""Decodes the pictures of callers and their masks, each picture in a process of its own that may die."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from typing import Final

import numpy as np
from PIL import Image

from live_avatar.errors import CapacityError, InputError
from live_avatar.gateway import sandbox
from live_avatar.gateway.sandbox import Limits
from live_avatar.inputs.image import check_bytes
from live_avatar.inputs.masks import Scene, decode_scene, token_count

AT_ONCE: Final = 2
WAITING: Final = 16
PIXELS, SENTENCE = b"\0", b"\1"  # first byte of an answer
WEIGHT: Final = np.dtype(np.float32)
MAX_SENTENCE_BYTES: Final = 1000
JOIN_S: Final = 1.0  # for a process that has closed its connection

Image.init()  # all modules of Pillow: the process that decodes may open no file


class PictureDecoder:
    """Decodes up to `at_once` pictures at a time; `waiting` more may wait."""

    def __init__(self, at_once: int = AT_ONCE, waiting: int = WAITING, limits: Limits | None = None) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        ensure_running()
        self._slots = asyncio.Semaphore(at_once)
        self._line = waiting
        self._waiting = 0
        self._limits = limits or Limits()

    async def decode(self, data: bytes, height: int, width: int, masks: Sequence[bytes] = ()) -> Scene:
        """PNG, JPEG or WebP bytes -> uint8 [height, width, 3], and the weights of masks: what `decode_scene` gives.

        Raises `InputError` for what cannot be decoded within the limits, `CapacityError` if too many pictures wait.
        """
        check_bytes(data)
        await self._enter_line()
        try:
            files = (data, *masks)
            child = _Child(self._context, files, height, width, self._limits.times(len(files)))
            work = asyncio.ensure_future(asyncio.to_thread(child.run))
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                child.kill()
                with suppress(InputError):
                    await work
                raise
        finally:
            self._slots.release()

    async def _enter_line(self) -> None:
        """Takes one of the slots."""
        if self._slots.locked() and self._waiting >= self._line:
            raise CapacityError(
                f"{self._waiting} pictures wait to be decoded, the most that this server lets wait; try again later or "
                "elsewhere."
            )
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1


class _Child:
    """One picture and its process."""

    _lock: Final = threading.Lock()  # multiprocessing looks at all children whenever one is started

    def __init__(
        self,
        context: multiprocessing.context.ForkServerContext,
        files: Sequence[bytes],
        height: int,
        width: int,
        limits: Limits,
    ) -> None:
        self._files = files
        self._shape = (height, width, 3)
        self._weights_shape = (len(files) - 1, token_count(height, width))
        self._pixel_bytes = int(np.prod(self._shape))
        self._scene_bytes = self._pixel_bytes + WEIGHT.itemsize * int(np.prod(self._weights_shape))
        self._limits = limits
        self._ours, theirs = context.Pipe()
        self._theirs = theirs
        self._process = context.Process(target=_decode, args=(theirs, len(files), height, width, limits), daemon=True)
        self._is_killed = False

    def run(self) -> Scene:
        """Decodes in the process; blocks. Raises `InputError`."""
        watch = threading.Timer(self._limits.wall_s, self.kill)
        try:
            with self._lock:
                self._process.start()
            self._theirs.close()
            watch.start()
            return self._read(self._exchange())
        finally:
            watch.cancel()
            self._ours.close()
            self._end()

    def kill(self) -> None:
        self._is_killed = True
        with suppress(AttributeError, ValueError):  # not started yet, or ended already
            self._process.kill()

    def _exchange(self) -> bytes:
        """Sends the picture and its masks; the answer is empty if the process died."""
        try:
            for file in self._files:
                self._ours.send_bytes(file)
            return self._ours.recv_bytes(len(PIXELS) + max(self._scene_bytes, MAX_SENTENCE_BYTES))
        except (EOFError, OSError):
            return b""

    def _read(self, answer: bytes) -> Scene:
        kind, content = answer[:1], answer[1:]
        if kind == PIXELS and len(content) == self._scene_bytes:
            pixels, weights = content[: self._pixel_bytes], content[self._pixel_bytes :]
            return Scene(
                np.frombuffer(pixels, dtype=np.uint8).reshape(self._shape),
                np.frombuffer(weights, dtype=WEIGHT).reshape(self._weights_shape),
            )
        if kind == SENTENCE:
            raise InputError(content.decode(errors="replace"))
        raise InputError(self._reason())

    def _reason(self) -> str:
        self._end(JOIN_S)
        code = self._process.exitcode
        remedy = "save it again as a plain PNG, JPEG or WebP, or scale it down."
        masks = len(self._files) - 1
        size = f"{len(self._files[0])} bytes" + (f", with {masks} masks" if masks else "")
        if self._is_killed or code in (-signal.SIGXCPU, -signal.SIGKILL):
            return (
                f"the reference image ({size}) takes longer to decode than the {self._limits.cpu_s} s "
                f"that {'they' if masks else 'a picture'} may take; {remedy}"
            )
        return f"the reference image ({size}) ended its decoder (exit code {code}); {remedy}"

    def _end(self, wait_s: float = 0.0) -> None:
        """Ends the process, after so long if it does not end by itself."""
        with self._lock:
            if self._process.pid is not None:
                self._process.join(wait_s)
                self._process.kill()
                self._process.join()


def _decode(connection: Connection, files: int, height: int, width: int, limits: Limits) -> None:
    """The process: takes a picture and masks, gives pixels and weights, or the sentence of an `InputError`."""
    _keep_only(connection.fileno())
    picture, *masks = [connection.recv_bytes() for _ in range(files)]
    sandbox.enter(limits)
    try:
        scene = decode_scene(picture, masks, height, width)
        answer = PIXELS + scene.pixels.tobytes() + scene.weights.tobytes()
    except InputError as error:
        answer = SENTENCE + str(error).encode()[:MAX_SENTENCE_BYTES]
    connection.send_bytes(answer)


def _keep_only(descriptor: int) -> None:
    """Closes everything else that is open: the gateway's log and its reports to `live-avatar serve` among them."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number != descriptor:
            with suppress(OSError):  # the listing's own
                os.close(number)
