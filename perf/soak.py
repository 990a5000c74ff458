"""The soak: sessions of random length, pace and ending come and go on a real server, and every frame is checked.

`make soak MINUTES=60` prints a line a minute and a summary, and writes the report as JSON. Ctrl-C or SIGTERM ends it
early, with the report of what was run. Exit code 1: a frame was wrong, a session ended as it should not, a slot was
lost, a process stayed behind, or memory grows by more than the bound (by more than three standard errors).

The expected frames are the generator's, on the same graphs: a pool of takes (avatar, prompt, seed, speech) is made
before the run, and the model is causal, so that a session which says the first blocks of a take gets its first frames.
Needs Linux, and artifacts without look-ahead. Knows the server through its process id, its ports and its drain.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import click
import grpc
import numpy as np
from PIL import Image, ImageOps
from tritonclient.grpc import service_pb2_grpc

from live_avatar import interrupts
from live_avatar.arrays import Array
from live_avatar.artifacts import load_artifacts
from live_avatar.assets import PORTRAIT
from live_avatar.environment import environment
from live_avatar.errors import LiveAvatarError
from live_avatar.generator import Generator
from live_avatar.label import Label
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving.server import ServerOptions, TritonServer, serving
from live_avatar.serving.supervisor import WITHOUT_PROXY
from live_avatar_client import AvatarSession, Block
from live_avatar_client.base import open_channel
from live_avatar_client.core import Opening, Request, Response
from live_avatar_client.errors import AvatarError, SessionFailed, SessionRefused
from live_avatar_client.protocol import (
    BLOCK_SAMPLES,
    FRAMES_PER_BLOCK,
    MAX_SEQUENCE_ID,
    SEED_PARAMETER,
    EndReason,
    ErrorCode,
    FrameFormat,
    parse_error,
)
from live_avatar_client.status import server_status
from live_avatar_client.wire import Message, decode_response, encode_request
from perf.growth import MIB, Process, Slope, fit, group, own_cpu_s, private_mib, shared_mib

SESSIONS = 4
KNOWN_AVATARS = 4
AVATARS = 6  # more than the server remembers
TAKES_PER_AVATAR = 3
TAKE_BLOCKS = 20
IDLE_S = 4.0
BLOCK_S = 0.48
ANSWER_S = 30.0
CALL_S = 120.0
SAMPLE_S, PROGRESS_S, TICK_S = 10.0, 60.0, 1.0
OUTAGE_S = 150.0
RESTORE_S = 60.0
AFTER_OUTAGE_S = 2.0
DRAIN_S = 4.0
VICTIM = "dit_step_2"
"""The stage that is killed after the warm-up; the others keep one process each, whose memory makes a long series."""
WARM_UP = 1 / 3
LEAST_SAMPLES = 30
MOST_CREDIT_S = 10.0
MOST_SHOWN = 20
NOTHING = np.zeros(0, dtype=np.int16)
FULL = "sessions of this server are taken"
SHUTTING_DOWN = "shutting down"
HANGS = ("AnswerTimeout", "SendTimeout", "DEADLINE_EXCEEDED")


class Unexpected(Exception):  # noqa: N818 - it is a finding of the soak
    """The server did something else than what this ending asks for."""


# ---- What is said, and what must be seen


@dataclass(frozen=True)
class Take:
    """Somebody who says something: int16 [blocks, samples] -> uint8 [frames, H, W, 3]."""

    image: bytes
    prompt: str
    seed: int
    speech: Array
    frames: Array

    def speech_of(self, blocks: int) -> Array:
        return self.speech[:blocks].reshape(-1)


@dataclass(frozen=True)
class Look:
    """In what form the frames are wanted; a quality of 0 is for raw ones."""

    jpeg_quality: int = 0
    label: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """As the client takes them."""
        chosen = {"frame_format": FrameFormat.JPEG, "jpeg_quality": self.jpeg_quality} if self.jpeg_quality else {}
        return {**chosen, "label": self.label}

    def of(self, frames: Array) -> list[bytes]:
        """Every frame as the bytes that a client gets for it."""
        if self.label and len(frames):
            frames = Label(self.label, frames.shape[1], frames.shape[2]).draw(frames)
        return [_jpeg(frame, self.jpeg_quality) if self.jpeg_quality else frame.tobytes() for frame in frames]


LOOKS = (Look(), Look(), Look(), Look(label="AI-generated"), Look(90), Look(60, "AI"))


class Oracle:
    """Expected frames: of the beginning of a take from the pool, of anything else made by `generate` at once."""

    def __init__(self, generate: Callable[[Take, Array], Array]) -> None:
        self._generate = generate
        self._lock = threading.Lock()

    def frames(self, take: Take, heard: Array) -> Array:
        """Of int16 [samples], whole blocks, as the server heard them."""
        if len(heard) % BLOCK_SAMPLES:
            raise ValueError(f"{len(heard)} samples are no whole blocks of {BLOCK_SAMPLES}; the last one is not known")
        blocks = heard.reshape(-1, BLOCK_SAMPLES)
        if len(blocks) <= len(take.speech) and np.array_equal(blocks, take.speech[: len(blocks)]):
            return take.frames[: len(blocks) * FRAMES_PER_BLOCK]
        with self._lock:
            return self._generate(take, blocks)


def generate(generator: Generator, take: Take, blocks: Array) -> Array:
    made = generator.stream(take.image, take.prompt, take.seed, iter(blocks))
    return np.concatenate([block.frames for block in made])


def make_takes(generator: Generator, seed: int) -> Iterator[Take]:
    rng = np.random.default_rng(seed)
    for avatar, image in enumerate(pictures(AVATARS)):
        for _ in range(TAKES_PER_AVATAR):
            loudness = rng.integers(300, 6000)
            speech = (rng.standard_normal((TAKE_BLOCKS, BLOCK_SAMPLES)) * loudness).astype(np.int16)
            take = Take(image, f"person {avatar}, speaking", int(rng.integers(2**31)), speech, NOTHING)
            yield replace(take, frames=generate(generator, take, speech))


def pictures(count: int) -> list[bytes]:
    """The portrait, tinted."""
    grey = Image.open(PORTRAIT).convert("L")
    tints = [(255 - 20 * n, 160 + 15 * n, 130 + 20 * n) for n in range(count)]
    return [_encoded(ImageOps.colorize(grey, "black", tint), "PNG") for tint in tints]


def _jpeg(frame: Array, quality: int) -> bytes:
    return _encoded(Image.fromarray(frame), "JPEG", quality=quality)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---- What was seen


class Ending(StrEnum):
    """How a session ends, or what its client does meanwhile."""

    COMPLETED = "completed"
    CLOSED = "closed early"
    INTERRUPTED = "interrupted"
    IDLE = "idle between words"
    CANCELLED = "call cancelled"
    KILLED = "client killed"
    SILENT = "silent"
    STARTED_TWICE = "started twice"
    UNKNOWN = "unknown id"
    OTHER_TOKEN = "other token"
    BAD_INPUT = "bad input"
    DRAINED = "live in the drain"


class Outcome(StrEnum):
    """What its client saw."""

    EXPECTED = "expected"
    FULL = "refused, full"
    LOST = "lost with a stage"
    HUNG = "no answer"
    SHUT_DOWN = "ended by the drain"
    UNEXPECTED = "unexpected"


class Tally:
    """Counts of all sessions and frames, from many threads."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[Ending, Outcome]] = Counter()
        self.frames = 0
        self.wrong_frames = 0
        self.findings: list[str] = []
        self._lock = threading.Lock()

    def ended(self, ending: Ending, outcome: Outcome, why: str) -> None:
        with self._lock:
            self.outcomes[ending, outcome] += 1
            if outcome in (Outcome.UNEXPECTED, Outcome.HUNG):
                self.findings.append(f"{ending}: {why}")

    def compare(self, ending: Ending, first: int, got: Sequence[bytes], expected: Sequence[bytes]) -> None:
        """Frames from number `first` on, with as many of the expected ones; more than there are is wrong as well."""
        wrong = [first + n for n, frame in enumerate(got) if n >= len(expected) or frame != expected[n]]
        with self._lock:
            self.frames += len(got)
            self.wrong_frames += len(wrong)
            if wrong:
                self.findings.append(f"{ending}: frames {wrong[0]} to {wrong[-1]}, {len(wrong)} of them wrong")

    def count(self, outcome: Outcome) -> int:
        return sum(number for (_, seen), number in list(self.outcomes.items()) if seen is outcome)

    def table(self) -> dict[str, dict[str, int]]:
        rows: defaultdict[str, dict[str, int]] = defaultdict(dict)
        for (ending, outcome), number in sorted(self.outcomes.items()):
            rows[ending.value][outcome.value] = number
        return dict(rows)


class Counters:
    """Counters that begin again at 0 when a stage's process is replaced, summed up over its processes."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self._last: dict[str, float] = {}

    def update(self, scraped: Mapping[str, float]) -> None:
        for name, value in scraped.items():
            before = self._last.get(name, 0.0)
            self.totals[name] += int(value - before if value >= before else value)
            self._last[name] = value


def scrape(port: int) -> dict[str, float]:
    """The project's own series of /metrics by name and labels."""
    with WITHOUT_PROXY.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    split = (line.rpartition(" ") for line in lines if line.startswith("live_avatar_"))
    return {name: float(value) for name, _, value in split}


# ---- Clients


@dataclass
class World:
    """What all clients share."""

    url: str
    oracle: Oracle
    takes: Sequence[Take]
    tally: Tally = field(default_factory=Tally)
    begun_s: float = field(default_factory=time.monotonic)
    outages: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of the times in which a stage was down."""

    def lost_a_stage(self, begun: float, ended: float) -> bool:
        return any(begun < end + AFTER_OUTAGE_S and ended > start for start, end in self.outages)


@dataclass(frozen=True)
class Visit:
    """One session to be: who says how many blocks of what, and how it ends."""

    world: World
    rng: random.Random
    ending: Ending
    take: Take
    blocks: int
    look: Look = field(default_factory=Look)

    @classmethod
    def random(cls, world: World, rng: random.Random) -> Visit:
        ending = rng.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))[0]
        look = rng.choice(LOOKS) if ending in (Ending.COMPLETED, Ending.CLOSED) else Look()
        return cls(world, rng, ending, rng.choice(world.takes), rng.randint(1, TAKE_BLOCKS), look)

    def check(self, block: Block) -> None:
        """Frames of a session that says the take's words."""
        frames = list(block.jpegs) or [frame.tobytes() for frame in block.frames]
        self.compare(block.first_frame, frames, self.take.frames)

    def compare(self, first: int, frames: Sequence[bytes], expected: Array) -> None:
        expected = expected[: self.blocks * FRAMES_PER_BLOCK][first : first + len(frames)]
        self.world.tally.compare(self.ending, first, frames, self.look.of(expected))

    def speech(self) -> Iterator[Array]:
        """The take's blocks at a pace of their own."""
        waits = self.rng.choice((_at_once, _in_real_time, _slowly, _in_bursts))(self.rng)
        for block in self.take.speech[: self.blocks]:
            time.sleep(next(waits))
            yield block

    def session(self, **options: Any) -> AvatarSession:
        take = self.take
        return AvatarSession(
            self.world.url,
            image=take.image,
            prompt=take.prompt,
            seed=take.seed,
            keep_alive_s=1.0,
            answer_timeout_s=ANSWER_S,
            **self.look.options,
            **options,
        )

    def run(self) -> None:
        """Does it, and counts what came of it."""
        begun = time.monotonic()
        try:
            ENDINGS[self.ending](self)
        except (AvatarError, grpc.RpcError, OSError, Unexpected) as error:
            why = f"{type(error).__name__}: {error}"
            ran = f"{begun - self.world.begun_s:.1f} to {time.monotonic() - self.world.begun_s:.1f} s"
            self.world.tally.ended(self.ending, self._outcome(why, begun), f"{why[:400]} ({ran})")
        else:
            self.world.tally.ended(self.ending, Outcome.EXPECTED, "")

    def _outcome(self, why: str, begun: float) -> Outcome:
        if FULL in why:
            return Outcome.FULL
        if any(sign in why for sign in HANGS):
            return Outcome.HUNG
        if self.world.lost_a_stage(begun, time.monotonic()):
            return Outcome.LOST
        drained = self.ending is Ending.DRAINED and SHUTTING_DOWN in why
        return Outcome.SHUT_DOWN if drained else Outcome.UNEXPECTED


def _at_once(rng: random.Random) -> Iterator[float]:
    while True:
        yield 0.0


def _in_real_time(rng: random.Random) -> Iterator[float]:
    while True:
        yield BLOCK_S


def _slowly(rng: random.Random) -> Iterator[float]:
    while True:
        yield rng.uniform(0.3, 1.5)


def _in_bursts(rng: random.Random) -> Iterator[float]:
    while True:
        yield rng.uniform(0.5, 2.5)
        yield from (0.0 for _ in range(rng.randint(1, 5)))


class RawStream:
    """A client without manners: single requests on a stream of its own, each answered before the next."""

    def __init__(self, visit: Visit, session: int | None = None) -> None:
        self.session = session or secrets.randbelow(MAX_SEQUENCE_ID) + 1
        self.said = 0
        self._visit = visit
        self._token = secrets.token_hex(16)
        self._channel = open_channel(visit.world.url)
        self._messages: list[Message] = []
        self._given = threading.Semaphore(0)
        self._over = False
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._call = stub.ModelStreamInfer(self._requests(), timeout=CALL_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the session in whatever state it is, unless the call is cancelled."""
        with suppress(AvatarError, grpc.RpcError):
            if not self._over:
                self.ask(self.request(NOTHING, end=EndReason.FAILED if kind else EndReason.COMPLETED))
        self.cancel()

    def request(self, audio: Array, *, start: bool = False, end: EndReason | None = None) -> Message:
        take = self._visit.take
        opening = Opening(take.image, take.prompt, take.seed, FrameFormat.RAW) if start else None
        return encode_request(Request(self.session, self._token, audio, opening, end))

    def start(self) -> None:
        self.ask(self.request(NOTHING, start=True))

    def say(self, blocks: int) -> None:
        """Says the next blocks of the take, and checks what comes."""
        for _ in range(blocks):
            answer = self.ask(self.request(self._visit.take.speech[self.said]))
            self.said += 1
            self._visit.compare(
                answer.first_frame, [frame.tobytes() for frame in answer.frames], self._visit.take.frames
            )

    def ask(self, message: Message) -> Response:
        """Raises `SessionRefused` or `SessionFailed` for an error."""
        self._send(message)
        answer = next(self._call)
        if not answer.error_message:
            return decode_response(answer.infer_response)
        code, sentence = parse_error(answer.error_message)
        raise (SessionRefused if FULL in sentence else SessionFailed)(sentence, code)

    def refused(self, message: Message, *codes: ErrorCode | None) -> None:
        """Asks for something that the server must refuse with one of the codes; None is Triton's own refusal."""
        try:
            self.ask(message)
        except SessionFailed as error:
            if error.code not in codes:
                raise
        else:
            raise Unexpected("the server answered what it should have refused")

    def cancel(self) -> None:
        self._over = True
        self._given.release()
        self._call.cancel()
        self._channel.close()

    def send_and_cancel(self) -> None:
        """Leaves with a block on its way."""
        self._send(self.request(self._visit.take.speech[self.said]))
        self.cancel()

    def _send(self, message: Message) -> None:
        self._messages.append(message)
        self._given.release()

    def _requests(self) -> Iterator[Message]:
        while True:
            self._given.acquire()
            if self._over and not self._messages:
                return
            yield self._messages.pop(0)


# ---- Endings


def completed(visit: Visit) -> None:
    frames = 0
    with visit.session() as session:
        for block in session.stream(visit.speech()):
            visit.check(block)
            frames += len(block)
    if frames != visit.blocks * FRAMES_PER_BLOCK:
        raise Unexpected(f"{frames} frames came for {visit.blocks} blocks")


def closed(visit: Visit) -> None:
    wanted = visit.rng.randint(0, visit.blocks - 1)
    with visit.session() as session:
        for block, _ in zip(session.stream(visit.speech()), range(wanted), strict=False):
            visit.check(block)


def interrupted(visit: Visit) -> None:
    """Says a part and half a block, which is dropped; goes on with what follows in the take."""
    before = visit.rng.randint(1, visit.blocks)
    said = visit.take.speech_of(visit.blocks)
    cut = before * BLOCK_SAMPLES
    with visit.session() as session:
        session.send(np.concatenate([said[:cut], said[: BLOCK_SAMPLES // 2]]))
        session.interrupt()
        session.send(said[cut:])
        session.end()
        for block in session:
            visit.check(block)
            if block.stale != (block.first_frame < before * FRAMES_PER_BLOCK):
                raise Unexpected(f"stale is {block.stale} of frame {block.first_frame}, interrupted at block {before}")


def idle(visit: Visit) -> None:
    """Short, as its frames have to be made for it: nobody knows beforehand when there will be silence."""
    spoken = visit.take.speech_of(min(visit.blocks, 3))
    with visit.session(idle=True) as session:
        time.sleep(visit.rng.uniform(0.0, 1.5))
        session.send(spoken)
        time.sleep(visit.rng.uniform(0.0, 1.5))
        session.send(spoken[:BLOCK_SAMPLES])
        session.end()
        blocks = list(session)
    heard = np.concatenate([block.audio for block in blocks])
    expected = visit.world.oracle.frames(visit.take, heard)
    visit = replace(visit, blocks=len(heard) // BLOCK_SAMPLES)
    for block in blocks:
        visit.compare(block.first_frame, [frame.tobytes() for frame in block.frames], expected)


def cancelled(visit: Visit) -> None:
    with RawStream(visit) as stream:
        stream.start()
        stream.say(visit.rng.randint(0, visit.blocks - 1))
        stream.send_and_cancel()


CLIENT = """
import hashlib, io, sys
import numpy as np
from live_avatar_client import AvatarSession
from live_avatar_client.errors import AvatarError
given = np.load(io.BytesIO(sys.stdin.buffer.read()))
try:
    url, prompt, seed = sys.argv[1:]
    with AvatarSession(url, image=given["image"].tobytes(), prompt=prompt, seed=int(seed)) as session:
        for block in session.stream([given["speech"]]):
            print(block.first_frame, *(hashlib.sha256(frame).hexdigest() for frame in block.frames), flush=True)
except AvatarError as error:
    print(type(error).__name__, error, flush=True)
"""


def killed(visit: Visit) -> None:
    """A client in a process of its own gets SIGKILL."""
    take, given = visit.take, io.BytesIO()
    np.savez(given, image=np.frombuffer(take.image, dtype=np.uint8), speech=take.speech_of(visit.blocks))
    command = [sys.executable, "-c", CLIENT, visit.world.url, take.prompt, str(take.seed)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        try:
            client.stdin.write(given.getvalue())
            client.stdin.close()
            for line, _ in zip(client.stdout, range(visit.rng.randint(1, visit.blocks)), strict=False):
                first, *rest = line.decode().split(maxsplit=1)
                if not first.isdecimal():
                    raise (SessionRefused if FULL in line.decode() else SessionFailed)(line.decode())
                _compare_hashes(visit, int(first), rest[0].split())
        finally:
            client.kill()


def _compare_hashes(visit: Visit, first: int, hashes: Sequence[str]) -> None:
    frames = visit.take.frames[first : first + len(hashes)]
    expected = [hashlib.sha256(frame.tobytes()).hexdigest().encode() for frame in frames]
    visit.world.tally.compare(visit.ending, first, [word.encode() for word in hashes], expected)


def silent(visit: Visit) -> None:
    with RawStream(visit) as stream:
        stream.start()
        stream.say(visit.blocks - 1)
        time.sleep(IDLE_S + 2.0)
        stream.refused(stream.request(visit.take.speech[stream.said]), None, ErrorCode.FAILED_PRECONDITION)


def started_twice(visit: Visit) -> None:
    """The second START is refused, on the stream of the first or on another; the session goes on."""
    with RawStream(visit) as stream:
        stream.start()
        before = visit.rng.randint(0, visit.blocks)
        stream.say(before)
        if visit.rng.random() < 0.5:
            stream.refused(stream.request(NOTHING, start=True), ErrorCode.INVALID_ARGUMENT)
        else:
            _intrude(visit, stream.session, start=True)
        stream.say(visit.blocks - before)


def unknown(visit: Visit) -> None:
    with RawStream(visit) as stream:
        stream.refused(stream.request(visit.take.speech[0]), None, ErrorCode.FAILED_PRECONDITION)


def other_token(visit: Visit) -> None:
    with RawStream(visit) as stream:
        stream.start()
        before = visit.rng.randint(0, visit.blocks)
        stream.say(before)
        _intrude(visit, stream.session)
        stream.say(visit.blocks - before)


def _intrude(visit: Visit, session: int, *, start: bool = False) -> None:
    """Another connection uses the id, without END: that is refused as well, but Triton ends the sequence."""
    intruder = RawStream(visit, session)
    try:
        audio = NOTHING if start else visit.take.speech[0]
        intruder.refused(intruder.request(audio, start=start), ErrorCode.INVALID_ARGUMENT)
    finally:
        intruder.cancel()


def bad_input(visit: Visit) -> None:
    """Something that START refuses, or a block of a wrong length, after which the session goes on."""
    with RawStream(visit) as stream:
        message = stream.request(NOTHING, start=True)
        match visit.rng.choice(("picture", "seed", "prompt", "block")):
            case "picture":
                bad = encode_request(
                    Request(stream.session, "t", NOTHING, Opening(b"no picture", "", 0, FrameFormat.RAW), None)
                )
                stream.refused(bad, ErrorCode.INVALID_ARGUMENT)
            case "seed":
                message.parameters[SEED_PARAMETER].string_param = "seven"
                stream.refused(message, ErrorCode.INVALID_ARGUMENT)
            case "prompt":
                message.raw_input_contents[-1] = b"\x02\x00\x00\x00\xff\xfe"
                stream.refused(message, ErrorCode.INVALID_ARGUMENT)
            case _:
                stream.ask(message)
                stream.refused(stream.request(visit.take.speech[0][:-1]), ErrorCode.INVALID_ARGUMENT)
                stream.say(visit.blocks)


WEIGHTS: dict[Ending, float] = {
    Ending.COMPLETED: 10,
    Ending.CLOSED: 3,
    Ending.INTERRUPTED: 2,
    Ending.IDLE: 1,
    Ending.CANCELLED: 2,
    Ending.KILLED: 0.5,
    Ending.SILENT: 1.5,
    Ending.STARTED_TWICE: 1.5,
    Ending.UNKNOWN: 1,
    Ending.OTHER_TOKEN: 1.5,
    Ending.BAD_INPUT: 2,
}
ENDINGS: dict[Ending, Callable[[Visit], None]] = {
    Ending.COMPLETED: completed,
    Ending.CLOSED: closed,
    Ending.INTERRUPTED: interrupted,
    Ending.IDLE: idle,
    Ending.CANCELLED: cancelled,
    Ending.KILLED: killed,
    Ending.SILENT: silent,
    Ending.STARTED_TWICE: started_twice,
    Ending.UNKNOWN: unknown,
    Ending.OTHER_TOKEN: other_token,
    Ending.BAD_INPUT: bad_input,
    Ending.DRAINED: completed,
}


# ---- The run


class Governor:
    """Keeps the mean of the CPU time that server and clients take at so many cores: no session starts beyond."""

    def __init__(self, cores: float) -> None:
        self.used_s = 0.0
        self._cores = cores
        self._credit_s = MOST_CREDIT_S
        self._last_cpu_s: float | None = None
        self._last_s = time.monotonic()
        self._go = threading.Event()

    def update(self, cpu_s: float, now_s: float) -> None:
        """Takes note of the CPU time so far; less than before means that a process is gone."""
        used = 0.0 if self._last_cpu_s is None else max(cpu_s - self._last_cpu_s, 0.0)
        self.used_s += used
        self._credit_s = min(self._credit_s + self._cores * (now_s - self._last_s) - used, MOST_CREDIT_S)
        self._last_cpu_s, self._last_s = cpu_s, now_s
        if self._credit_s > 0:
            self._go.set()
        else:
            self._go.clear()

    def wait(self, limit_s: float) -> bool:
        return self._go.wait(limit_s)


@dataclass
class Series:
    """Samples of one process, or of /dev/shm."""

    times_s: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)


class Memory:
    """Samples of every process, by name and process id; a process that is replaced begins a new series."""

    def __init__(self, triton: int) -> None:
        self.series: defaultdict[tuple[str, int], Series] = defaultdict(Series)
        self._triton = triton

    def sample(self, processes: Iterable[Process], now_s: float) -> None:
        for process in processes:
            self._add(process.name, process.pid, private_mib(process.pid), now_s, process.threads)
        self._add("the soak itself", os.getpid(), private_mib(os.getpid()), now_s, threading.active_count())
        with suppress(OSError):  # Triton has ended
            self._add("/dev/shm", 0, shared_mib(self._triton), now_s, 0)

    def now(self, name: str) -> float:
        """The last sample of a name, in MiB."""
        return next((one.mib[-1] for (known, _), one in reversed(list(self.series.items())) if known == name), 0.0)

    def findings(self, from_s: float) -> list[dict[str, Any]]:
        """What each series did, and the slope from `from_s` on where it is long enough to have one."""
        return [
            {
                "name": name,
                "samples": len(one.mib),
                "first_mib": round(one.mib[0], 2),
                "last_mib": round(one.mib[-1], 2),
                "most_mib": round(max(one.mib), 2),
                "threads_first": one.threads[0],
                "threads_last": one.threads[-1],
                "slope": asdict(slope) if (slope := slope_after(one, from_s)) else None,
            }
            for (name, _), one in self.series.items()
        ]

    def _add(self, name: str, pid: int, mib: float | None, now_s: float, threads: int) -> None:
        if mib is not None:
            one = self.series[name, pid]
            one.times_s.append(now_s)
            one.mib.append(mib)
            one.threads.append(threads)


def slope_after(series: Series, from_s: float) -> Slope | None:
    """The slope of what was sampled from `from_s` on; None for too little."""
    late = [pair for pair in zip(series.times_s, series.mib, strict=True) if pair[0] >= from_s]
    return fit(*zip(*late, strict=True)) if len(late) >= LEAST_SAMPLES else None


@dataclass
class Stop:
    """The end of the run, for its threads."""

    at_s: float
    event: threading.Event = field(default_factory=threading.Event)

    def come(self) -> bool:
        return self.event.is_set() or time.monotonic() >= self.at_s


class Soak:
    """One run against a running server."""

    def __init__(self, server: TritonServer, world: World, seconds: float, seed: int, cores: float) -> None:
        self.server = server
        self.world = world
        self.governor = Governor(cores)
        self.memory = Memory(server.process.pid)
        self.counters = Counters()
        self.restores_s: list[float] = []
        self.kills: list[tuple[float, str]] = []
        self.begun_s = time.monotonic()
        self._seconds = seconds
        self._seed = seed
        self._stop = Stop(self.begun_s + seconds)

    def run(self) -> bool:
        """Returns whether it ran to its end; all its clients are gone afterwards."""
        threads = [threading.Thread(target=self._visit, args=(n,), daemon=True) for n in range(SESSIONS + 1)]
        threads.append(threading.Thread(target=self._kill_stages, daemon=True))
        for thread in threads:
            thread.start()
        try:
            self._watch()
            return True
        except KeyboardInterrupt:
            return False
        finally:
            self._stop.event.set()
            for thread in threads:
                thread.join(CALL_S)

    def slots_lost(self) -> int:
        """Once nobody is left: what is not free, by metrics or status, after the idle limit at the latest."""
        deadline = time.monotonic() + IDLE_S + 10.0
        while True:
            free = scrape(self.server.options.metrics_port).get("live_avatar_sessions_free", 0.0)
            live = server_status(self.server.options.url).live_sessions
            lost = max(SESSIONS - int(free), SESSIONS if live is None else live)
            if not lost or time.monotonic() > deadline:
                return lost
            time.sleep(0.5)

    def zombies(self) -> list[str]:
        return [process.name for process in group(self.server.process.pid) if process.zombie]

    def drain(self) -> dict[str, Any]:
        """Drains with live sessions: a short one ends by itself, the long ones are ended, a new one is refused."""
        rng = random.Random(self._seed)
        takes = [rng.choice(self.world.takes) for _ in range(3)]
        lengths = (TAKE_BLOCKS, TAKE_BLOCKS, 3)
        threads = [
            threading.Thread(target=_RealTime(self.world, rng, Ending.DRAINED, take, blocks).run, daemon=True)
            for take, blocks in zip(takes, lengths, strict=True)
        ]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        late = threading.Timer(1.0, Visit(self.world, rng, Ending.DRAINED, takes[0], 1).run)
        late.start()
        live = server_status(self.server.options.url).live_sessions
        by_themselves = self.server.drain(DRAIN_S)
        for thread in (*threads, late):
            thread.join(CALL_S)
        seen = {outcome.value: self.world.tally.outcomes[Ending.DRAINED, outcome] for outcome in Outcome}
        return {"live_before": live, "all_ended_by_themselves": by_themselves, "clients_saw": seen}

    def _visit(self, number: int) -> None:
        rng = random.Random(self._seed * 1000 + number)
        while not self._stop.come():
            if self.governor.wait(0.5):
                Visit.random(self.world, rng).run()
                self._stop.event.wait(rng.expovariate(4.0))

    def _watch(self) -> None:
        sample_s = progress_s = self.begun_s
        while not self._stop.come():
            now_s, processes = time.monotonic(), group(self.server.process.pid)
            self.governor.update(sum(process.cpu_s for process in processes) + own_cpu_s(), now_s)
            if now_s >= sample_s:
                sample_s += SAMPLE_S
                self.memory.sample(processes, now_s)
                with suppress(OSError):
                    self.counters.update(scrape(self.server.options.metrics_port))
            if now_s >= progress_s:
                progress_s += PROGRESS_S
                click.echo(self._progress(now_s))
            self._stop.event.wait(TICK_S)

    def _progress(self, now_s: float) -> str:
        tally, minutes = self.world.tally, (now_s - self.begun_s) / 60
        mib = self.memory.now
        return (
            f"{minutes:5.1f} min: {tally.outcomes.total()} sessions, "
            f"{tally.frames} frames, {tally.wrong_frames} wrong, "
            f"{tally.count(Outcome.UNEXPECTED)} unexpected; {len(self.kills)} stages killed; "
            f"MiB: Triton {mib('triton'):.1f}, vae_decoder {mib('vae_decoder'):.1f}, /dev/shm {mib('/dev/shm'):.1f}; "
            f"{self.governor.used_s / max(now_s - self.begun_s, 1.0):.2f} cores"
        )

    def _kill_stages(self) -> None:
        rng = random.Random(self._seed)
        pause_s = min(OUTAGE_S, self._seconds / 5)
        while not self._stop.event.wait(rng.uniform(0.7, 1.0) * pause_s) and not self._stop.come():
            warm = time.monotonic() - self.begun_s > WARM_UP * self._seconds
            stages = [one for one in group(self.server.process.pid) if one.stage]
            chosen = [one for one in stages if one.name == VICTIM] if warm else stages
            if chosen:
                self._kill(rng.choice(chosen))

    def _kill(self, stage: Process) -> None:
        begun_s = time.monotonic()
        self.world.outages.append((begun_s, float("inf")))
        self.kills.append((round(begun_s - self.begun_s, 1), stage.name))
        os.kill(stage.pid, signal.SIGKILL)
        while time.monotonic() < begun_s + RESTORE_S:
            time.sleep(0.5)  # the supervisor looks four times a second
            if self._is_back(stage):
                self.restores_s.append(time.monotonic() - begun_s)
                break
        else:
            self.world.tally.findings.append(f"{stage.name} was not back {RESTORE_S:g} s after it was killed")
        self.world.outages[-1] = (begun_s, time.monotonic())

    def _is_back(self, stage: Process) -> bool:
        again = [one for one in group(self.server.process.pid) if one.name == stage.name and one.pid != stage.pid]
        with suppress(AvatarError):
            return bool(again) and server_status(self.server.options.url).ready
        return False


@dataclass(frozen=True)
class _RealTime(Visit):
    """A session that lasts as long as it speaks."""

    def speech(self) -> Iterator[Array]:
        for block in self.take.speech[: self.blocks]:
            time.sleep(BLOCK_S)
            yield block


def failures(report: Mapping[str, Any], bound: float) -> list[str]:
    """What is wrong, a sentence each."""
    wrong = [f"{report[name]} {name.replace('_', ' ')}" for name in FAULTS if report[name]]
    for one in report["memory"]:
        if one["slope"] is not None and Slope(**one["slope"]).exceeds(bound):
            grows = f"{one['slope']['mib_per_hour']:.1f} +- {one['slope']['error']:.1f} MiB per hour"
            wrong.append(f"{one['name']} grows by {grows}, more than {bound:g}")
    return wrong


FAULTS = (
    "wrong_frames",
    "unexpected_ends",
    "sessions_without_answer",
    "stages_not_restored",
    "slots_lost",
    "zombies",
    "processes_left_behind",
)


def summary(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"{report['sessions']} sessions in {report['minutes']:.1f} minutes, {report['frames']} frames checked"
    for name in FAULTS:
        yield f"  {name.replace('_', ' ')}: {report[name]}"
    yield "What the clients saw:"
    for ending, outcomes in report["outcomes"].items():
        yield f"  {ending:20} " + ", ".join(f"{outcome} {number}" for outcome, number in outcomes.items())
    yield "Private memory, and shared files, MiB (first, last; slope per hour after the warm-up):"
    for one in report["memory"]:
        slope = one["slope"]
        shown = f"{slope['mib_per_hour']:+.2f} +- {slope['error']:.2f}" if slope else "too short"
        threads = f"{one['threads_first']} to {one['threads_last']} threads"
        yield f"  {one['name']:16} {one['first_mib']:8.1f} {one['last_mib']:8.1f}  {shown}, {threads}"
    yield f"Stages killed: {report['stages_killed']}, back after {report['restored_s']} s"
    yield f"Drain: {report['drain']}"
    yield from report["findings"]


def soak(
    options: ServerOptions, log: Callable[[str], None], world: World, minutes: float, seed: int, cores: float
) -> dict[str, Any]:
    """Starts a server, of which every line goes to `log`, runs, and reports."""
    with serving(options, log) as server:
        leader = server.process.pid
        run = Soak(server, world, minutes * 60, seed, cores)
        finished = run.run()
        ran_s = time.monotonic() - run.begun_s
        slots_lost, zombies = run.slots_lost(), run.zombies()
        with suppress(OSError):
            run.counters.update(scrape(options.metrics_port))
        drain = run.drain()
    tally = world.tally
    counted = {name: number for name, number in sorted(run.counters.totals.items()) if "_bucket" not in name}
    return {
        "minutes": round(ran_s / 60, 2),
        "finished": finished,
        "seed": seed,
        "sessions_limit": SESSIONS,
        "clients": SESSIONS + 1,
        "idle_limit_s": IDLE_S,
        "avatars": {"known_to_the_server": KNOWN_AVATARS, "used": AVATARS, "takes": len(world.takes)},
        "mean_cores": round(run.governor.used_s / ran_s, 3),
        "sessions": tally.outcomes.total(),
        "frames": tally.frames,
        "wrong_frames": tally.wrong_frames,
        "unexpected_ends": tally.count(Outcome.UNEXPECTED),
        "sessions_without_answer": tally.count(Outcome.HUNG),
        "stages_not_restored": len(run.kills) - len(run.restores_s),
        "slots_lost": slots_lost,
        "zombies": len(zombies),
        "processes_left_behind": len(group(leader)),
        "outcomes": tally.table(),
        "stages_killed": run.kills,
        "restored_s": [round(seconds, 1) for seconds in run.restores_s],
        "drain": drain,
        "memory": run.memory.findings(run.begun_s + WARM_UP * ran_s),
        "metrics": {name: number for name, number in counted.items() if "_total" in name or "_count" in name},
        "findings": tally.findings[:MOST_SHOWN],
        "environment": environment("nvidia-pytriton", "onnxruntime", "numpy", "grpcio"),
    }


def prepare(artifacts: Path, seed: int) -> tuple[Oracle, list[Take]]:
    """The oracle and its pool, of which the progress is shown."""
    generator = Generator(OnnxRuntime(load_artifacts(artifacts)))
    stream = generator.preset.stream
    if stream.lookahead_frames:
        raise click.ClickException(
            f"the artifacts look {stream.lookahead_ms} ms ahead, so that frames of a beginning are not those of the "
            "whole; export some with --lookahead-ms 0."
        )
    begun_s = time.monotonic()
    takes = list(make_takes(generator, seed))
    size_mib = sum(take.frames.nbytes for take in takes) / MIB
    click.echo(
        f"{len(takes)} takes of {TAKE_BLOCKS} blocks made in {time.monotonic() - begun_s:.0f} s, {size_mib:.0f} MiB"
    )
    return Oracle(lambda take, blocks: generate(generator, take, blocks)), takes


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0.5), default=60.0, show_default=True, help="How long to run.")
@click.option(
    "--artifacts",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("artifacts/tiny"),
    show_default=True,
    help="Folder made by `live-avatar export`.",
)
@click.option("--report", "path", type=click.Path(path_type=Path), help="Also write the report to this JSON file.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sessions' choices and the speech.")
@click.option("--cores", type=float, default=1.3, show_default=True, help="CPU cores to keep busy in the mean.")
@click.option(
    "--bound",
    type=float,
    default=10.0,
    show_default=True,
    help="Growth of a process, in MiB per hour, that is too much.",
)
@click.option("--log", type=click.File("w", lazy=False), default=os.devnull, help="File for the server's log.")
def main(
    minutes: float, artifacts: Path, path: Path | None, seed: int, cores: float, bound: float, log: IO[str]
) -> None:
    """Let sessions of every kind come and go, and check every frame and the server's memory."""
    interrupts.catch()
    options = ServerOptions(
        artifacts, max_sessions=SESSIONS, idle_seconds=IDLE_S, known_avatars=KNOWN_AVATARS
    ).on_free_ports()
    try:
        oracle, takes = prepare(artifacts, seed)
        report = soak(options, partial(click.echo, file=log), World(options.url, oracle, takes), minutes, seed, cores)
    except LiveAvatarError as problem:
        raise click.ClickException(str(problem)) from problem
    wrong = failures(report, bound)
    report |= {"bound_mib_per_hour": bound, "failures": wrong}
    for line in summary(report):
        click.echo(line)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    for sentence in wrong:
        click.echo(f"WRONG: {sentence}")
    click.echo("failed" if wrong else "passed")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
