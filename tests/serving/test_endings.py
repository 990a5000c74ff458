"""Every way in which a session can end, on real servers: what the client is told, and that nothing stays behind.

After each ending every stage must hold no session, the ending must be counted once by its reason, and new sessions
must take all slots at once and get right frames. The stages say how many sessions they hold, and fail when asked
to, by `faults/model.py`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton

from live_avatar.arrays import Array
from live_avatar.assets import PORTRAIT
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.pipeline.generator import Generator
from live_avatar.serving import metrics, repository
from live_avatar.serving.models import ENCODER_KIND, Kind
from live_avatar.serving.server import TritonServer, serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar.serving.supervisor import WITHOUT_PROXY
from live_avatar_client import AvatarSession, SessionFailed, SessionRefused
from live_avatar_client.protocol import ErrorCode
from tests.cli.support import served, wait_until
from tests.conftest import noise_speech
from tests.serving.conftest import generated
from tests.serving.raw import BLOCK, NOTHING, raw_session
from tests.serving.support import (
    KEEP_ALIVE_S,
    STAGES,
    assert_every_slot_serves,
    bystander,
    changes,
    frames_in,
    frames_of,
    frames_until,
    scrape,
    series,
    speech_of,
    spoken,
)

SESSIONS = 2
MANY = 20
IDLE_S = 15.0
"""Much longer than a session without keep-alives is silent in these tests, also on a busy machine."""
DRAIN_S = 10.0
FAULTY_MODEL = Path(__file__).parent / "faults" / "model.py"
# A client that speaks for ever, in a process of its own.
ENDLESS_CLIENT = """
import sys
import numpy as np
from live_avatar_client import AvatarSession
with AvatarSession(sys.argv[1], image=sys.argv[2], idle=True) as session:
    for block in session:
        print(len(block.frames), flush=True)
"""

Ending = Callable[..., AbstractContextManager[None]]


@pytest.fixture(scope="module")
def faulty(artifacts: Artifacts) -> Iterator[TritonServer]:
    """A server of two sessions, with a short idle limit, whose stages fail when asked to."""
    faulty_code, served_code = FAULTY_MODEL.read_text(), repository.model_file

    def model_file(kind: Kind) -> str:
        return served_code(kind) if kind is ENCODER_KIND else faulty_code

    options = ServerOptions(artifacts.folder, max_sessions=SESSIONS, idle_seconds=IDLE_S).on_free_ports()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repository, "model_file", model_file)
        with serving(options) as running:
            yield running


@pytest.fixture
def url(faulty: TritonServer) -> str:
    return faulty.options.url


@pytest.fixture
def ending(faulty: TritonServer, picture: bytes, speech: Array, expected: Array) -> Ending:
    @contextmanager
    def check(**reasons: int) -> Iterator[None]:
        """Sessions end inside the `with`, so many for each reason, and leave nothing behind."""
        before = scrape(faulty)
        yield
        wait_until(lambda: held(faulty) == 0 and scrape(faulty)[series(metrics.SESSIONS_LIVE)] == 0)
        after = scrape(faulty)
        assert changes(before, after, metrics.SESSIONS_ENDED) == reasons
        assert after[series(metrics.SESSIONS_FREE)] == SESSIONS
        assert_every_slot_serves(faulty, picture, speech, expected)

    return check


def held(server: TritonServer, stages: Sequence[str] = STAGES) -> float:
    """Sessions that stages hold, all together."""
    numbers = scrape(server)
    return sum(numbers[f'test_sessions_held{{stage="{stage}"}}'] for stage in stages)


def ended(server: TritonServer, reason: str) -> float:
    return scrape(server)[series(metrics.SESSIONS_ENDED, reason)]


def fault(stage: str, block: int) -> int:
    """The JPEG quality that asks a stage to fail at a block, from 1 on; 0 asks for a memory that is full."""
    return 10 * (STAGES.index(stage) + 1) + block


def is_ready(options: ServerOptions) -> tuple[bool, bool]:
    """What the server says over HTTP and over gRPC."""
    try:
        with WITHOUT_PROXY.open(f"http://{options.host}:{options.http_port}/v2/health/ready", timeout=30.0) as answer:
            http = answer.status == 200
    except OSError:
        http = False
    with triton.InferenceServerClient(options.url) as client:
        return http, client.is_server_ready(client_timeout=30.0)


def speak_on(session: AvatarSession) -> None:
    """A block every now and then, until the server has had enough."""
    while True:
        spoken(session, BLOCK)
        time.sleep(0.1)


# 1. END


def test_end_frees_everything(
    faulty: TritonServer, url: str, picture: bytes, speech: Array, expected: Array, ending: Ending
) -> None:
    with ending(completed=1, abandoned=1, ended=1):
        with AvatarSession(url, image=picture, prompt="hello", seed=3, keep_alive_s=KEEP_ALIVE_S) as session:
            frames = frames_of(list(session.stream([speech_of(speech, 0, 6)])))
        assert np.array_equal(frames, frames_until(expected, 6))
        with AvatarSession(url, image=picture, keep_alive_s=KEEP_ALIVE_S) as session:
            spoken(session, speech)
        with raw_session(url) as raw:  # says END without a reason
            raw.ask(BLOCK, picture, start=True)
        wait_until(lambda: held(faulty) == 0, limit_s=IDLE_S - 0.5)  # at once


def test_a_session_may_have_the_id_of_one_that_has_ended(
    url: str, picture: bytes, speech: Array, expected: Array, oracle: Generator, ending: Ending
) -> None:
    """Nothing of the first is left to be met by the second, whose blocks come faster than the pipe takes them."""
    other = noise_speech(0.48, seed=21)
    others = generated(oracle, picture, "another", 4, other)  # before the session, which must not be silent for long
    with ending(ended=2), raw_session(url) as raw:
        first = raw.ask(other, picture, b"another", start=True, seed=4)
        assert np.array_equal(frames_in(first), frames_until(others, 1))
        assert len(frames_in(raw.ask(NOTHING, end=True))) == 0
        raw.send(speech_of(speech, 0, 1), picture, b"hello", start=True, seed=3)
        for block in range(1, 7):
            raw.send(speech_of(speech, block, block + 1))
        frames = [frames_in(raw.answer()) for _ in range(7)]
        assert np.array_equal(np.concatenate(frames), frames_until(expected, 7))


# 2. and 3. The client is gone


def test_a_cancelled_call(url: str, picture: bytes, speech: Array, expected: Array, ending: Ending) -> None:
    with (
        ending(disconnected=1, completed=1),
        bystander(url, picture, speech, expected),
        raw_session(url) as raw,
    ):
        raw.ask(BLOCK, picture, start=True)
        for _ in range(6):
            raw.send(BLOCK)
        raw.answer()
        raw.vanish()


def test_a_killed_client(
    faulty: TritonServer, url: str, picture: bytes, speech: Array, expected: Array, ending: Ending
) -> None:
    with ending(disconnected=1, completed=1), bystander(url, picture, speech, expected):
        with subprocess.Popen(
            [sys.executable, "-c", ENDLESS_CLIENT, url, PORTRAIT], stdout=subprocess.PIPE, text=True
        ) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "12\n"
            before = ended(faulty, "disconnected")
            client.kill()
        assert client.returncode == -signal.SIGKILL
        wait_until(lambda: ended(faulty, "disconnected") == before + 1, limit_s=IDLE_S - 0.5)  # at once


@pytest.mark.slow
def test_a_client_that_goes_after_end_is_not_lost(url: str, picture: bytes, speech: Array, ending: Ending) -> None:
    """It need not wait for the answer to END: what it said is the reason."""
    with ending(abandoned=1), raw_session(url) as raw:
        raw.ask(BLOCK, picture, start=True)
        for block in range(6):
            raw.send(speech_of(speech, block, block + 1))
        raw.send(NOTHING, end=True, end_reason="abandoned")
        time.sleep(0.2)  # it is on its way
        raw.vanish()


# 4. The client says nothing


def test_a_silent_session_is_dropped_and_one_that_is_kept_alive_is_not(
    faulty: TritonServer, url: str, picture: bytes, speech: Array, expected: Array, ending: Ending
) -> None:
    """The one that is kept alive was the first to speak, so it has said nothing for longer than the other."""
    with (
        ending(silent=1, completed=1),
        AvatarSession(url, image=picture, prompt="hello", seed=3, keep_alive_s=KEEP_ALIVE_S) as kept,
        AvatarSession(url, image=picture, keep_alive_s=600.0) as silent,
    ):
        first = spoken(kept, speech_of(speech, 0, 1))
        spoken(silent, BLOCK)
        dropped = ended(faulty, "silent")
        wait_until(lambda: ended(faulty, "silent") == dropped + 1)
        wait_until(lambda: scrape(faulty)[series(metrics.SESSIONS_LIVE)] == 1)
        wait_until(lambda: held(faulty, ["rolling_sink"]) <= 1)  # its sink, that nobody took
        with pytest.raises(SessionFailed, match=rf"silent for more than {IDLE_S:g} s, so it has ended; start a new"):
            spoken(silent, BLOCK)
        kept.send(speech_of(speech, 1, 2))
        kept.end()
        assert np.array_equal(frames_of([first, *kept]), frames_until(expected, 2))


# 5. An id belongs to its stream


def is_unknown(session: int | str, error: object) -> bool:
    return str(error).startswith(f"[FAILED_PRECONDITION] session {session} is not open on this stream: ")


def test_an_unknown_id(url: str, picture: bytes, speech: Array, expected: Array, ending: Ending) -> None:
    with ending(completed=1), bystander(url, picture, speech, expected), raw_session(url) as raw:
        for end in (False, True):
            assert is_unknown(raw.session, raw.ask(BLOCK, end=end))


@pytest.mark.slow
def test_a_start_on_a_live_id_changes_nothing(
    url: str, picture: bytes, speech: Array, expected: Array, ending: Ending
) -> None:
    with ending(ended=1), raw_session(url) as raw:
        raw.ask(speech_of(speech, 0, 1), picture, b"hello", start=True, seed=3)
        sentence = f"[INVALID_ARGUMENT] session {raw.session} is live already; start the new session under another"
        for end in (False, True):
            assert sentence in raw.ask(speech_of(speech, 0, 1), picture, b"another", start=True, end=end, seed=4)
        frames = [frames_in(raw.ask(speech_of(speech, block, block + 1))) for block in (1, 2)]
        assert np.array_equal(np.concatenate(frames), expected[12:36])


@pytest.mark.slow
def test_one_id_on_two_streams(url: str, picture: bytes, speech: Array, expected: Array, ending: Ending) -> None:
    """Who guesses an id reaches nothing of it, and the owner misses nothing: elsewhere it is another session."""
    with ending(ended=2), raw_session(url) as owner, raw_session(url, owner.session) as guesser:
        frames = [frames_in(owner.ask(speech_of(speech, 0, 1), picture, b"hello", start=True, seed=3))]
        for audio, end in ((BLOCK, False), (NOTHING, False), (NOTHING, True), (BLOCK, True)):
            assert is_unknown(owner.session, guesser.ask(audio, end=end))
        own = [frames_in(guesser.ask(speech_of(speech, 0, 1), picture, b"hello", start=True, seed=3))]
        for block in (1, 2):
            frames.append(frames_in(owner.ask(speech_of(speech, block, block + 1))))
            own.append(frames_in(guesser.ask(speech_of(speech, block, block + 1))))
        for each in (frames, own):
            assert np.array_equal(np.concatenate(each), frames_until(expected, 3))


@pytest.mark.slow
def test_requests_after_end_are_answered(
    url: str, picture: bytes, speech: Array, expected: Array, ending: Ending
) -> None:
    """However soon they come; the next session with the id may be among them."""
    with ending(ended=2), raw_session(url) as raw:
        raw.send(BLOCK, picture, start=True)
        raw.send(NOTHING, end=True)
        for audio, end in ((NOTHING, True), (BLOCK, False)):
            raw.send(audio, end=end)
        raw.send(speech_of(speech, 0, 1), picture, b"hello", start=True, seed=3)
        assert [len(frames_in(raw.answer())) for _ in range(2)] == [12, 0]
        for _ in range(2):
            assert is_unknown(raw.session, raw.answer())
        assert np.array_equal(frames_in(raw.answer()), frames_until(expected, 1))


@pytest.mark.slow
def test_requests_of_a_session_that_was_refused_are_answered(url: str, picture: bytes, ending: Ending) -> None:
    """They are more than a session may have queued."""
    with ending(ended=1), raw_session(url) as raw:
        raw.send(BLOCK, b"no picture", start=True)
        for _ in range(MANY):
            raw.send(BLOCK)
        assert "[INVALID_ARGUMENT]" in raw.answer()
        for _ in range(MANY):
            assert f"[FAILED_PRECONDITION] session {raw.session} is not open" in raw.answer()
        assert len(frames_in(raw.ask(BLOCK, picture, start=True))) == 12


# 6. A stage raises


@pytest.mark.parametrize(
    "stage",
    [
        *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("conditioning", "dit_step_1", "dit_step_4")),
        "dit_step_3",
        "vae_decoder",
    ],
)
def test_a_stage_that_raises_ends_that_session_alone(
    faulty: TritonServer, url: str, picture: bytes, speech: Array, expected: Array, ending: Ending, stage: str
) -> None:
    """The blocks before it are right; those that are under way behind it are answered with an error too."""
    before = scrape(faulty)
    with ending(failed=1, completed=1), bystander(url, picture, speech, expected), raw_session(url) as raw:
        raw.send(speech_of(speech, 0, 1), picture, b"hello", start=True, seed=3, jpeg_quality=fault(stage, 3))
        for block in range(1, MANY):
            raw.send(speech_of(speech, block % 6, block % 6 + 1))
        frames = [frames_in(raw.answer()) for _ in range(2)]
        assert np.array_equal(np.concatenate(frames), frames_until(expected, 2))
        sentence = f"stage {stage} at block 3 failed (RuntimeError: the device fell off)"
        assert f"[FAILED] {sentence}; end the session and start a new one." in raw.answer()
        for _ in range(MANY - 3):
            assert sentence in raw.answer()
        raw.ask(NOTHING, end=True, end_reason="failed")
    assert changes(before, scrape(faulty), metrics.FAILURES) == {stage: 1}


# 7. A stage's process is killed


def process_of(server: TritonServer, stage: str) -> int:
    """Process id of a stage: a child of Triton whose command names the model."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_text().split("\0")
        except OSError:  # it ended meanwhile
            continue
        if parent == server.process.pid and any(word.endswith(f"/{stage}/1/model.py") for word in command):
            return int(folder.name)
    raise AssertionError(f"{stage} has no process")


@pytest.mark.parametrize("stage", ["dit_step_2", pytest.param("conditioning", marks=pytest.mark.slow)])
def test_a_killed_stage_comes_back_without_a_restart(
    faulty: TritonServer, url: str, picture: bytes, speech: Array, expected: Array, stage: str
) -> None:
    wait_until(lambda: is_ready(faulty.options) == (True, True) and held(faulty) == 0)
    server, process = faulty.process.pid, process_of(faulty, stage)
    with (
        AvatarSession(url, image=picture, keep_alive_s=KEEP_ALIVE_S, answer_timeout_s=60.0) as quiet,
        AvatarSession(url, image=picture, keep_alive_s=KEEP_ALIVE_S, answer_timeout_s=60.0) as speaking,
    ):
        spoken(quiet, BLOCK)
        speaking.send(speech_of(speech, 0, 6))
        next(iter(speaking))
        os.kill(process, signal.SIGKILL)  # with blocks of one under way
        wait_until(lambda: is_ready(faulty.options) == (False, False))
        for session in (quiet, speaking):
            with pytest.raises(SessionFailed, match=r"(open|start) a new session"):
                speak_on(session)
    wait_until(lambda: is_ready(faulty.options) == (True, True))
    assert faulty.process.pid == server
    assert faulty.is_running()
    assert process_of(faulty, stage) != process
    assert scrape(faulty)[series(metrics.STARTS, stage)] == 2
    wait_until(lambda: held(faulty) == 0)
    assert scrape(faulty)[series(metrics.SESSIONS_FREE)] == SESSIONS
    assert_every_slot_serves(faulty, picture, speech, expected)


# 8. SIGTERM


@pytest.mark.slow
def test_sigterm_lets_live_sessions_end_and_then_ends_them(
    tmp_path: Path, artifacts: Artifacts, picture: bytes, speech: Array, expected: Array
) -> None:
    with (
        served(tmp_path / "temporary", artifacts, "--drain-seconds", DRAIN_S) as (running, options),
        AvatarSession(options.url, image=picture, prompt="hello", seed=3) as ends,
        AvatarSession(options.url, image=picture, prompt="hello", seed=3) as stays,
        ThreadPoolExecutor(1) as waiting,
    ):
        first, _ = (spoken(session, speech_of(speech, 0, 1)) for session in (ends, stays))
        assert is_ready(options) == (True, True)
        terminated_s = time.monotonic()
        result = waiting.submit(running.end, signal.SIGTERM)
        wait_until(lambda: is_ready(options) == (False, False), limit_s=DRAIN_S)
        with AvatarSession(options.url, image=picture) as late, pytest.raises(SessionRefused) as refused:
            spoken(late, BLOCK)
        assert refused.value.code is ErrorCode.UNAVAILABLE
        assert "shutting down and takes no new sessions; connect again to reach another one." in str(refused.value)
        ends.send(speech_of(speech, 1, 4))
        ends.end()
        assert np.array_equal(frames_of([first, *ends]), frames_until(expected, 4))
        with pytest.raises(SessionFailed, match="shutting down; reconnect, and start a new session to go on") as failed:
            speak_on(stays)
        assert failed.value.code is ErrorCode.UNAVAILABLE
        assert time.monotonic() - terminated_s >= DRAIN_S
        code, said = result.result()
        assert code == 0, said
        assert "Traceback" not in said
        assert running.left() == []


@pytest.mark.slow
def test_sigterm_waits_for_the_last_frames_and_no_longer(
    tmp_path: Path, artifacts: Artifacts, picture: bytes, speech: Array, expected: Array
) -> None:
    """The pipe is full when the only session says END."""
    with (
        served(tmp_path / "temporary", artifacts, "--drain-seconds", 600) as (running, options),
        AvatarSession(options.url, image=picture, prompt="hello", seed=3) as session,
        ThreadPoolExecutor(1) as waiting,
    ):
        session.send(speech)
        session.end()
        first = next(iter(session))
        result = waiting.submit(running.end, signal.SIGTERM)
        assert np.array_equal(frames_of([first, *session]), expected)
        assert result.result()[0] == 0
        assert running.left() == []


# 9. A stage without memory


def test_a_stage_whose_memory_is_full_refuses_at_admission(
    faulty: TritonServer, url: str, picture: bytes, speech: Array, expected: Array, ending: Ending
) -> None:
    before = scrape(faulty)
    with ending(failed=1, completed=1), bystander(url, picture, speech, expected), raw_session(url) as raw:
        error = raw.ask(NOTHING, picture, b"hello", start=True, jpeg_quality=fault("dit_step_2", 0))
        sentence = (
            r"\[UNAVAILABLE\] stage dit_step_2 has 0.* free, and a session takes .* there; try again later or else"
        )
        assert re.search(sentence, error), error
        raw.ask(NOTHING, end=True, end_reason="failed")
    assert changes(before, scrape(faulty), metrics.SESSIONS_REFUSED) == {"memory": 1}
