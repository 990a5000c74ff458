"""Pictures decoded in processes that may die: good ones, hostile ones, and what such a process cannot do."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.assets import PORTRAIT
from live_avatar.errors import CapacityError, InputError
from live_avatar.gateway import pictures
from live_avatar.gateway.pictures import PictureDecoder
from live_avatar.gateway.sandbox import SYSTEM_CALLS, Limits, filter_code
from live_avatar.inputs.image import decode_pixels
from live_avatar.inputs.masks import Scene, decode_scene
from tests.support.pictures import encoded, jpeg_of_scans

SIZE = (96, 96)
PATIENT = Limits(cpu_s=60, wall_s=600)
"""The limits of memory, and time enough on a busy machine."""


def decoded(data: bytes, limits: Limits = PATIENT) -> Array:
    async def decode() -> Array:
        return (await PictureDecoder(limits=limits).decode(data, *SIZE)).pixels

    return asyncio.run(decode())


@pytest.mark.parametrize(
    "data",
    [
        PORTRAIT.read_bytes(),
        encoded(Image.effect_noise((200, 300), 50).convert("RGB"), "JPEG", progressive=True),
        encoded(Image.effect_noise((200, 300), 50).convert("RGBA"), "WEBP"),
    ],
    ids=["png", "jpeg", "webp"],
)
def test_a_good_picture_is_what_it_is_in_this_process(data: bytes) -> None:
    assert np.array_equal(decoded(data), decode_pixels(data, *SIZE))


def test_a_refusal_has_the_sentence_of_this_process() -> None:
    with pytest.raises(InputError, match=r"^the reference image \(5 bytes, beginning b'hello'\) is not a PNG, JPEG or"):
        decoded(b"hello")
    with pytest.raises(InputError, match=r"^the reference image has 0 bytes; send"):
        decoded(b"")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_the_largest_picture_is_decoded_within_the_limits(file_format: str) -> None:
    """Its sides are those of the largest in pixels; every format takes memory of its own."""
    options = {"PNG": {"compress_level": 1}, "JPEG": {}, "WEBP": {"method": 0}}[file_format]
    data = encoded(Image.new("RGB", (8000, 8000), (9, 100, 200)), file_format, **options)
    assert decoded(data).shape == (*SIZE, 3)


def test_a_header_that_promises_much_takes_nothing() -> None:
    """WebP, 8000 x 8000 in lossless form, and nothing behind the header."""
    bits = (8000 - 1) | (8000 - 1) << 14
    body = b"WEBPVP8L" + struct.pack("<IBI", 5 + 8, 0x2F, bits) + bytes(9)
    with pytest.raises(
        InputError, match=r"^the reference image \(\d+ bytes\) is damaged \(.*\); send the whole file\.$"
    ):
        decoded(b"RIFF" + struct.pack("<I", len(body)) + body)


def test_a_picture_that_needs_too_much_memory() -> None:
    data = encoded(Image.new("L", (5000, 5000)), "JPEG")
    with pytest.raises(InputError, match=r"^the reference image is 5000x5000 pixels, more than there is memory for; "):
        decoded(data, limits=replace(PATIENT, memory_mib=50))


TOO_LONG = r"\(\d+ bytes\) takes longer to decode than the 60 s that a picture may take; save it again as a plain"


def test_a_picture_that_takes_too_long() -> None:
    with pytest.raises(InputError, match=TOO_LONG):
        decoded(jpeg_of_scans(8000, 50), limits=replace(PATIENT, wall_s=0.01))


@pytest.mark.parametrize("ending", [signal.SIGXCPU, signal.SIGKILL])
def test_a_picture_that_takes_too_much_of_the_cpu(monkeypatch: pytest.MonkeyPatch, ending: signal.Signals) -> None:
    """The kernel ends the process with one of these; that it does is the next test's."""
    started = monkeypatch_children(monkeypatch, lambda process: os.kill(process.pid, ending))
    with pytest.raises(InputError, match=TOO_LONG):
        decoded(jpeg_of_scans(8000, 50))
    assert len(started) == 1


def test_a_limited_process_ends_after_its_cpu_time() -> None:
    program = "from live_avatar.gateway import sandbox\nsandbox.enter(sandbox.Limits(cpu_s=1))\nwhile True:\n    pass\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=600)
    assert done.returncode in (-signal.SIGXCPU, -signal.SIGKILL), done


def test_a_decoder_that_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    started = monkeypatch_children(monkeypatch, lambda process: os.kill(process.pid, signal.SIGSEGV))
    with pytest.raises(InputError, match=r"ended its decoder \(exit code -11\); save it again as a plain PNG"):
        decoded(jpeg_of_scans(8000, 50))
    assert len(started) == 1


def test_a_caller_that_leaves_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started = monkeypatch_children(monkeypatch, lambda process: None)

    async def leave() -> None:
        decoding = asyncio.create_task(PictureDecoder(limits=PATIENT).decode(jpeg_of_scans(8000, 50), *SIZE))
        while not started:
            await asyncio.sleep(0.01)
        decoding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await decoding

    asyncio.run(leave())
    assert [process.exitcode for process in started] == [-signal.SIGKILL]


def test_the_line_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    started = monkeypatch_children(monkeypatch, lambda process: None)

    async def crowd(decode: Callable[[bytes, int, int], Awaitable[Scene]]) -> list[object]:
        return await asyncio.gather(*(decode(PORTRAIT.read_bytes(), *SIZE) for _ in range(4)), return_exceptions=True)

    async def meet() -> list[object]:
        return await crowd(PictureDecoder(at_once=1, waiting=2, limits=PATIENT).decode)

    outcomes = asyncio.run(meet())
    assert [type(outcome) for outcome in outcomes] == [Scene, Scene, Scene, CapacityError]
    assert str(outcomes[-1]).startswith("2 pictures wait to be decoded, the most that this server lets wait; try again")
    assert len(started) == 3


def monkeypatch_children(monkeypatch: pytest.MonkeyPatch, then: Callable[[Any], object]) -> list[Any]:
    """Notes the processes that are started, and does something with each."""
    started: list[Any] = []
    exchange = pictures._Child._exchange

    def noted(child: pictures._Child) -> bytes:
        started.append(child._process)
        then(child._process)
        return exchange(child)

    monkeypatch.setattr(pictures._Child, "_exchange", noted)
    return started


@pytest.mark.parametrize(
    "attempt",
    [
        "open('/etc/hostname')",
        "open('/dev/null', 'w')",
        "socket.socket()",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 0)",
        "threading.Thread(target=print).start()",
    ],
)
def test_a_limited_process_reaches_nothing(attempt: str) -> None:
    program = (
        "import os, socket, threading\n"
        "from live_avatar.gateway import sandbox\n"
        "sandbox.enter(sandbox.Limits())\n"
        "try:\n"
        f"    {attempt}\n"
        "except (OSError, RuntimeError) as error:\n"
        "    os.write(1, type(error).__name__.encode())\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=True)
    assert done.stdout in (b"PermissionError", b"RuntimeError", b"OSError"), done


@pytest.mark.parametrize("machine", SYSTEM_CALLS)
def test_the_filter_allows_its_calls_and_no_other(machine: str) -> None:
    """Interprets the program; the kernel runs it for one machine only."""
    architecture, calls = SYSTEM_CALLS[machine]
    code = list(struct.iter_unpack("=HBBI", filter_code(architecture, calls)))

    def verdict(called_on: int, number: int) -> int:
        at, loaded = 0, 0
        while True:
            kind, if_equal, if_not, value = code[at]
            at += 1
            if kind == 0x20:
                loaded = {0: number, 4: called_on}[value]
            elif kind == 0x15:
                at += if_equal if loaded == value else if_not
            else:
                return int(value)

    assert {number for number in range(600) if verdict(architecture, number) == 0x7FFF0000} == set(calls.values())
    assert verdict(architecture, 1000) == 0x00050001
    assert verdict(architecture ^ 1, 0) == 0x80000000


def test_the_process_has_nothing_open_but_its_connection() -> None:
    """Standard output is where the gateway reports to `live-avatar serve`, and standard error is the log."""
    program = (
        "import os\n"
        "from live_avatar.gateway.pictures import _keep_only\n"
        "_, kept = os.pipe()\n"
        "kept = os.dup2(1, kept)\n"
        "_keep_only(kept)\n"
        "print('forged', flush=True)\n"
        "os.write(2, b'forged')\n"
        "open_now = {}\n"
        "for number in range(64):\n"
        "    try:\n"
        "        open_now[number] = os.readlink(f'/proc/self/fd/{number}')\n"
        "    except OSError:\n"
        "        pass\n"
        "del open_now[kept]\n"
        "os.write(kept, repr(sorted(open_now.items())).encode())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=True)
    assert done.stdout.decode() == str([(standard, "/dev/null") for standard in (0, 1, 2)])
    assert done.stderr == b""


def decoded_scene(*masks: bytes) -> Scene:
    return asyncio.run(PictureDecoder(limits=PATIENT).decode(PORTRAIT.read_bytes(), *SIZE, masks))


def test_masks_are_decoded_with_their_picture() -> None:
    mask = encoded(Image.linear_gradient("L").resize((512, 512)))
    scene, expected = (
        decoded_scene(b"0,0,20,20", mask),
        decode_scene(PORTRAIT.read_bytes(), (b"0,0,20,20", mask), *SIZE),
    )
    assert np.array_equal(scene.pixels, expected.pixels)
    assert np.array_equal(scene.weights, expected.weights)
    assert scene.weights.shape == (2, 36)


def test_a_bad_mask_has_the_sentence_of_this_process() -> None:
    with pytest.raises(
        InputError, match=r"^the mask of speaker 1 begins with b'hello'; give a PNG of the picture's size"
    ):
        decoded_scene(b"0,0,20,20", b"hello")


@pytest.mark.parametrize("masks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_largest_masks_are_decoded_within_the_limits(masks: int) -> None:
    large = encoded(Image.new("L", (8000, 8000), 255))
    scene = asyncio.run(PictureDecoder(limits=PATIENT).decode(large, *SIZE, (large,) * masks))
    assert np.array_equal(scene.weights, np.ones((masks, 36)))
