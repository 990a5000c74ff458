"""The stages in plain arrays, without a server: chains, failures, ends, known avatars."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.errors import CapacityError, InputError, SessionError, ShutdownError
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving import metrics
from live_avatar.serving.control import Phase
from live_avatar.serving.failures import PipeError, describe
from live_avatar.serving.metrics import EndCause, RefusalReason
from live_avatar.serving.resources import SessionRoom
from live_avatar.serving.rolling_sink import FAILED
from live_avatar.serving.sessions import SessionTable
from live_avatar.serving.stage import StageRequest
from live_avatar.serving.tensors import AVATAR_KEY, BLOCK, LATENT, NO_BLOCK, SINK_KEY, SINK_REFERENCE, read_text
from live_avatar_client.protocol import BLOCK_SAMPLES, ErrorCode
from tests.serving.pipe import IDLE_S, NOTHING, SESSION, Pipe


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_chain_makes_the_generators_frames(
    pipe: Pipe, opening: dict[str, Array], speech: Array, expected: Array
) -> None:
    frames = [pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening)]
    for block in range(1, 6):
        frames.append(pipe.run(speech[BLOCK_SAMPLES * block : BLOCK_SAMPLES * (block + 1)], end=block == 5))
    assert np.array_equal(np.concatenate(frames), expected[:72])
    assert pipe.live() == [0] * 6
    with pytest.raises(SessionError, match="is not open here: it was never started, has ended, was lost"):
        pipe.run(speech[:BLOCK_SAMPLES])


def test_zero_rows_pass_through(pipe: Pipe, opening: dict[str, Array]) -> None:
    assert pipe.run(NOTHING, start=True, **opening).shape == (0, 96, 96, 3)
    assert pipe.run(NOTHING).shape == (0, 96, 96, 3)
    tensors = pipe.condition(NOTHING)
    assert tensors[BLOCK] == NO_BLOCK
    assert len(tensors[LATENT]) == len(tensors[SINK_REFERENCE]) == 0


def test_a_start_without_speech_prepares_every_stage(
    pipe: Pipe, opening: dict[str, Array], speech: Array, expected: Array
) -> None:
    tensors = pipe.condition(NOTHING, start=True, **opening)
    assert tensors[BLOCK] == NO_BLOCK
    assert len(tensors[SINK_REFERENCE]) == 1
    pipe.decoder.handle(StageRequest(SESSION, True, False, pipe.denoise(tensors, start=True)))
    assert np.array_equal(pipe.run(speech[:BLOCK_SAMPLES]), expected[:12])


def test_a_failure_ends_the_session_in_every_stage_behind_it(
    pipe: Pipe, opening: dict[str, Array], speech: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening)

    def fail(*_: object) -> Array:
        raise RuntimeError("the device fell off")

    with monkeypatch.context() as broken:
        broken.setattr(pipe.steps[1]._denoiser, "run", fail)
        tensors = pipe.denoise(pipe.condition(speech[BLOCK_SAMPLES : 2 * BLOCK_SAMPLES]))
        key = int(tensors[SINK_KEY][0])
    with pytest.raises(PipeError) as raised:
        pipe.decode(tensors)
    assert str(raised.value) == (
        "stage dit_step_2 at block 2 failed (RuntimeError: the device fell off); end the session and start a new one."
    )
    assert raised.value.code is ErrorCode.FAILED
    assert pipe.live() == [1, 1, 0, 0, 0, 0], "those before it learn of it by END"
    assert pipe.sinks.take(key)[0] == FAILED, "so that conditioning does not wait for a sink that never comes"
    assert [pipe.count(metrics.FAILURES, f"dit_step_{step}") for step in (1, 2, 3)] == [0, 1, 0]

    with pytest.raises(PipeError, match=r"session 5 has failed \(stage dit_step_2 at block 2 failed"):
        pipe.run(speech[2 * BLOCK_SAMPLES : 3 * BLOCK_SAMPLES])
    with pytest.raises(PipeError, match="session 5 has failed"):
        pipe.run(NOTHING, end=True)
    assert pipe.live() == [0] * 6
    assert pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening).shape == (12, 96, 96, 3)


def test_a_gap_is_noticed_downstream(pipe: Pipe, opening: dict[str, Array], speech: Array) -> None:
    pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening)
    pipe.condition(speech[BLOCK_SAMPLES : 2 * BLOCK_SAMPLES])  # lost on its way
    with pytest.raises(PipeError, match="brings block 3 where block 2 was due, because an earlier block failed"):
        pipe.run(speech[2 * BLOCK_SAMPLES : 3 * BLOCK_SAMPLES])


def test_conditioning_that_fails_ends_the_session_everywhere(
    pipe: Pipe, opening: dict[str, Array], speech: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening)
    with monkeypatch.context() as broken:
        broken.setattr(pipe.conditioning._conditioner, "block", lambda *_: 1 / 0)
        with pytest.raises(
            PipeError, match=r"stage conditioning at block 2 failed \(ZeroDivisionError: division by zero"
        ):
            pipe.run(speech[:BLOCK_SAMPLES])
    assert pipe.live() == [0] * 6
    assert pipe.count(metrics.SESSIONS_ENDED, reason=EndCause.FAILED) == 1
    assert pipe.count(metrics.SESSIONS_LIVE) == 0
    with pytest.raises(PipeError, match="session 5 has failed"):
        pipe.run(NOTHING, end=True)  # goes all the way, since every batcher has a place for the session
    assert pipe.count(metrics.SESSIONS_ENDED, reason=EndCause.FAILED) == 1, "counted once"


def test_a_start_whose_first_block_fails_leaves_nothing_behind(
    pipe: Pipe, opening: dict[str, Array], speech: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(pipe.conditioning._conditioner, "block", lambda *_: 1 / 0)
        with pytest.raises(PipeError, match=r"stage conditioning at block 1 failed \(ZeroDivisionError"):
            pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening)
    assert pipe.live() == [0] * 6
    assert pipe.count(metrics.SESSIONS_ADMITTED) == pipe.count(metrics.SESSIONS_ENDED, reason=EndCause.FAILED) == 1
    with pytest.raises(PipeError, match="session 5 has failed"):
        pipe.run(NOTHING, end=True)
    assert pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening).shape == (12, 96, 96, 3)


@pytest.mark.parametrize(
    ("error", "reason", "failures"),
    [(MemoryError("no room"), RefusalReason.MEMORY, 1), (RuntimeError("no such device"), None, 1)],
)
def test_an_avatar_that_cannot_be_made_opens_no_session(
    pipe: Pipe,
    opening: dict[str, Array],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: RefusalReason | None,
    failures: int,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(pipe.conditioning._conditioner, "avatar", fail)
    with pytest.raises(type(error)):
        pipe.condition(NOTHING, start=True, **opening)
    assert pipe.live() == [0] * 6
    assert pipe.count(metrics.FAILURES) == failures
    refused = [one for one in RefusalReason if pipe.count(metrics.SESSIONS_REFUSED, reason=one)]
    assert refused == ([] if reason is None else [reason])


def test_a_stage_without_room_refuses_at_the_start(
    pipe: Pipe, onnx_runtime: OnnxRuntime, opening: dict[str, Array]
) -> None:
    pipe.steps[2]._room = SessionRoom("dit_step_3", onnx_runtime, 2**60)
    said = (
        r"stage dit_step_3 has [\d.]+ [KMG]iB of memory free, and a session takes 1073741824\.00 GiB there; try again"
    )
    with pytest.raises(PipeError, match=said) as raised:
        pipe.run(NOTHING, start=True, **opening)
    assert raised.value.code is ErrorCode.UNAVAILABLE
    assert pipe.count(metrics.SESSIONS_REFUSED, "dit_step_3", reason=RefusalReason.MEMORY) == 1
    with pytest.raises(PipeError):
        pipe.run(NOTHING, end=True)
    assert pipe.live() == [0] * 6


def test_memory_that_runs_out_on_the_way_is_told_as_such() -> None:
    told = describe(MemoryError("cannot have 5 GiB"), "dit_step_1", 6)
    assert told.code is ErrorCode.UNAVAILABLE
    assert str(told) == (
        "stage dit_step_1 at block 7 has no memory left (cannot have 5 GiB); try again later or elsewhere."
    )


def test_known_avatars_skip_encoder_prefill_and_warm_up(
    pipe: Pipe, opening: dict[str, Array], speech: Array, expected: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.run(NOTHING, start=True, end=True, **opening)
    with monkeypatch.context() as idle:
        for worker, work in (
            (pipe.conditioning._conditioner, "avatar"),
            *((step._denoiser, "prefill") for step in pipe.steps),
            (pipe.decoder._decoder, "warm_up"),
        ):
            idle.setattr(worker, work, lambda *_: pytest.fail("work that was done before"))
        first = pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening)
        assert pipe.run(speech[:BLOCK_SAMPLES], start=True, session=6, **opening).tobytes() == first.tobytes()
    one, other = (session.state.sink for session in map(pipe.steps[0].sessions.get, (5, 6)))
    assert one is other, "shared until the sink update"
    frames = [first, *(pipe.run(speech[BLOCK_SAMPLES * block : BLOCK_SAMPLES * (block + 1)]) for block in range(1, 6))]
    assert np.array_equal(np.concatenate(frames), expected[:72])
    assert pipe.steps[0].sessions.get(6).state.sink is other, "the other session's sink is as it was"
    for stage in pipe.meters:
        assert (pipe.count(metrics.AVATAR_HITS, stage), pipe.count(metrics.AVATAR_MISSES, stage)) == (2, 1)
        assert pipe.count(metrics.AVATARS, stage) == 1


def test_an_avatar_is_known_by_picture_and_prompt(pipe: Pipe, opening: dict[str, Array]) -> None:
    other = {**opening, "PROMPT": np.array([b"another"], dtype=np.object_)}
    keys = [
        pipe.condition(NOTHING, start=True, end=True, **given)[AVATAR_KEY].tobytes()
        for given in (opening, other, opening)
    ]
    assert keys[0] == keys[2] != keys[1]
    assert pipe.count(metrics.AVATAR_MISSES) == 3, "room for one"
    assert len(pipe.condition(NOTHING, start=True, **opening)[AVATAR_KEY]) == 32
    assert len(pipe.condition(NOTHING)[AVATAR_KEY]) == 0


def test_the_answer_to_start_says_what_makes_the_video(pipe: Pipe, opening: dict[str, Array]) -> None:
    provenance = json.loads(read_text(pipe.condition(NOTHING, start=True, **opening)["PROVENANCE"]))
    assert (provenance["seed"], provenance["preset"], provenance["artifacts"]) == (3, "tiny", "abc")
    assert provenance["prompt_sha256"] == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert len(pipe.condition(NOTHING)["PROVENANCE"]) == 0


def test_a_draining_server_refuses_new_sessions_and_a_closing_one_ends_the_live(
    pipe: Pipe, opening: dict[str, Array], speech: Array
) -> None:
    pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening)
    assert pipe.control.live_sessions == 1
    pipe.control.set_phase(Phase.DRAINING)
    with pytest.raises(
        ShutdownError, match="shutting down and takes no new sessions; connect again to reach another one"
    ):
        pipe.condition(NOTHING, start=True, session=6, **opening)
    assert pipe.count(metrics.SESSIONS_REFUSED, reason=RefusalReason.SHUTDOWN) == 1
    assert pipe.count(metrics.SESSIONS_FREE) == 0
    assert pipe.run(speech[BLOCK_SAMPLES : 2 * BLOCK_SAMPLES]).shape == (12, 96, 96, 3)
    pipe.control.set_phase(Phase.CLOSING)
    with pytest.raises(
        PipeError, match="this server is shutting down; reconnect, and start a new session to go on"
    ) as raised:
        pipe.run(speech[:BLOCK_SAMPLES])
    assert raised.value.code is ErrorCode.UNAVAILABLE
    assert pipe.live() == [0] * 6
    assert pipe.control.live_sessions == 0
    assert pipe.count(metrics.SESSIONS_ENDED, reason=EndCause.SHUTDOWN) == 1


def test_a_session_that_ends_while_the_server_closes_has_ended(pipe: Pipe, opening: dict[str, Array]) -> None:
    pipe.run(NOTHING, start=True, **opening)
    pipe.control.set_phase(Phase.CLOSING)
    assert len(pipe.run(NOTHING, end=True)) == 0
    assert pipe.count(metrics.SESSIONS_ENDED, reason=EndCause.ENDED) == 1


@pytest.mark.parametrize(
    ("parameters", "cause"),
    [
        ({}, EndCause.ENDED),
        ({"end_reason": "completed"}, EndCause.COMPLETED),
        ({"end_reason": "abandoned"}, EndCause.ABANDONED),
        ({"end_reason": "silent"}, EndCause.ENDED),
        ({"end_reason": 7}, EndCause.ENDED),
    ],
)
def test_ends_are_counted_by_their_reason(
    pipe: Pipe, opening: dict[str, Array], parameters: dict[str, object], cause: EndCause
) -> None:
    pipe.condition(NOTHING, start=True, **opening)
    assert (pipe.count(metrics.SESSIONS_LIVE), pipe.count(metrics.SESSIONS_FREE)) == (1, 1)
    pipe.conditioning.handle(StageRequest(SESSION, False, True, {"AUDIO": NOTHING}, parameters))
    ended = {reason: pipe.count(metrics.SESSIONS_ENDED, reason=reason) for reason in EndCause}
    assert ended == {reason: float(reason is cause) for reason in EndCause}
    assert (pipe.count(metrics.SESSIONS_LIVE), pipe.count(metrics.SESSIONS_FREE)) == (0, 2)


def test_a_silent_session_is_dropped_and_counted(
    onnx_runtime: OnnxRuntime, tmp_path: Path, opening: dict[str, Array]
) -> None:
    idle_s = 0.05
    pipe = Pipe(onnx_runtime, tmp_path, idle_s)
    pipe.run(NOTHING, start=True, **opening)
    time.sleep(2 * idle_s)
    for stage in pipe.stages():
        stage.sweep(keep=SESSION)
    assert pipe.live() == [1] * 6
    for stage in pipe.stages():
        stage.sweep()
    assert pipe.live() == [0] * 6
    assert pipe.count(metrics.SESSIONS_ENDED, reason=EndCause.SILENT) == 1
    assert (pipe.count(metrics.SESSIONS_LIVE), pipe.control.live_sessions) == (0, 0)


def test_a_session_belongs_to_the_token_that_opened_it(pipe: Pipe, opening: dict[str, Array], speech: Array) -> None:
    def ask(token: object, **flags: bool) -> dict[str, Array]:
        given = opening if flags.get("start") else {}
        request = StageRequest(
            SESSION, flags.get("start", False), False, {"AUDIO": speech[:BLOCK_SAMPLES], **given}, {"token": token}
        )
        return pipe.conditioning.handle(request).outputs

    assert ask("mine", start=True)[BLOCK] == 0
    for other in ("yours", ""):
        with pytest.raises(
            InputError, match="session 5 was opened with another token, so it belongs to another client"
        ):
            ask(other)
    with pytest.raises(InputError, match="parameter token is 7; it must be a string of at most 256 characters"):
        ask(7)
    assert ask("mine")[BLOCK] == 1, "the owner goes on"


def test_all_sessions_are_lost_with_a_stage(pipe: Pipe, opening: dict[str, Array], speech: Array) -> None:
    pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening)
    for stage in pipe.stages():
        stage.drop_all()
    assert pipe.live() == [0] * 6
    assert pipe.count(metrics.SESSIONS_ENDED, reason=EndCause.FAILED) == 1
    assert pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening).shape == (12, 96, 96, 3)


def test_a_refused_request_leaves_no_session(pipe: Pipe, opening: dict[str, Array], speech: Array) -> None:
    with pytest.raises(InputError, match="no REFERENCE_IMAGE"):
        pipe.condition(speech[:BLOCK_SAMPLES], start=True)
    assert pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening).shape == (12, 96, 96, 3)


def opened(table: SessionTable[str], *sessions: int) -> None:
    for session in sessions:
        table.open(session, lambda: "state")


def test_table_refuses_at_its_limit_and_frees_by_its_own_clock() -> None:
    clock = Clock()
    table: SessionTable[str] = SessionTable(IDLE_S, limit=2, clock=clock)
    opened(table, 1, 2)
    with pytest.raises(CapacityError, match="all 2 sessions of this server are taken; try again later or elsewhere"):
        opened(table, 3)
    clock.now_s = IDLE_S
    assert table.get(2) == "state"
    clock.now_s = IDLE_S + 1
    assert table.sweep() == [(1, "state")]
    opened(table, 3)
    assert 1 not in table
    assert len(table) == 2
    with pytest.raises(SessionError, match=r"session 1 is not open.*silent for more than 30 s; start a new session"):
        table.get(1)


def test_table_frees_the_slot_of_a_failed_session_and_remembers_it() -> None:
    clock = Clock()
    table: SessionTable[str] = SessionTable(IDLE_S, limit=1, clock=clock)
    opened(table, 1)
    table.fail(1, "first")
    table.fail(1, "second")
    opened(table, 2)
    with pytest.raises(SessionError, match=r"session 1 has failed \(first\); end it and start a new one"):
        table.get(1)
    clock.now_s = IDLE_S + 1
    assert table.sweep() == [(2, "state")], "what has failed is forgotten in silence"
    with pytest.raises(SessionError, match="session 1 is not open here"):
        table.get(1)


def test_time_in_which_no_one_could_be_heard_is_no_silence() -> None:
    clock = Clock()
    table: SessionTable[str] = SessionTable(IDLE_S, clock=clock)
    opened(table, 1)
    clock.now_s = IDLE_S + 10
    table.extend_idle(15)
    assert table.sweep() == []
    clock.now_s = IDLE_S + 16
    assert table.sweep() == [(1, "state")]


def test_table_makes_nothing_for_a_refused_session() -> None:
    table: SessionTable[str] = SessionTable(IDLE_S, limit=1)
    opened(table, 1)
    made: list[int] = []
    with pytest.raises(CapacityError):
        table.open(2, lambda: str(made.append(2)))
    assert made == []
