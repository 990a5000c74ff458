"""The stages in plain arrays, without a server: chains, failures, ends, known avatars."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.errors import InputError, SessionError
from live_avatar.inputs.image import decode_pixels
from live_avatar.pipeline.avatar import AvatarEncoder
from live_avatar.pipeline.sink import SinkSource
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving import metrics
from live_avatar.serving.avatar_encoder import AvatarEncoderStage
from live_avatar.serving.failures import PipeError, describe
from live_avatar.serving.resources import SessionRoom
from live_avatar.serving.rolling_sink import FAILED
from live_avatar.serving.sessions import SessionTable
from live_avatar.serving.stage import StageRequest
from live_avatar.serving.tensors import (
    AVATAR_KEY,
    BLOCK,
    LATENT,
    NO_BLOCK,
    PIXELS,
    SINK_KEY,
    SINK_MOTION,
    SINK_REFERENCE,
    SINK_TEXT,
    read_text,
    text_tensor,
)
from live_avatar_client.protocol import BLOCK_SAMPLES, ErrorCode
from tests.serving.pipe import IDLE_S, NOTHING, SESSION, Pipe, avatar_tensors
from tests.serving.recording import RecordingMeter


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
        pipe.decoder.handle(StageRequest(SESSION, False, False, tensors))
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


def test_a_block_is_fetched_four_frames_at_a_time(
    pipe: Pipe, opening: dict[str, Array], speech: Array, expected: Array
) -> None:
    pipe.run(NOTHING, start=True, options={"frames_per_response": 4}, **opening)
    got, first_frames = [], []
    for block in range(2):
        for audio in (speech[BLOCK_SAMPLES * block : BLOCK_SAMPLES * (block + 1)], NOTHING, NOTHING):
            outputs = pipe.respond(audio)
            got.append(outputs["FRAMES"])
            first_frames.append(int(outputs["FIRST_FRAME"][0]))
    assert np.array_equal(np.concatenate(got), expected[:24])
    assert first_frames == [0, 4, 8, 12, 16, 20]
    keep_alive = pipe.respond(NOTHING)
    assert (len(keep_alive["FRAMES"]), int(keep_alive["FIRST_FRAME"][0])) == (0, 0)
    assert pipe.meters["vae_decoder"].of(metrics.FRAMES) == 24


def test_a_block_before_the_frames_of_the_one_before(pipe: Pipe, opening: dict[str, Array], speech: Array) -> None:
    pipe.run(NOTHING, start=True, options={"frames_per_response": 4}, **opening)
    pipe.run(speech[:BLOCK_SAMPLES])
    with pytest.raises(
        PipeError,
        match="brings block 2 while 8 frames of the one before were not fetched; send a request without samples for "
        "each response before the next block",
    ):
        pipe.run(speech[BLOCK_SAMPLES : 2 * BLOCK_SAMPLES])


@pytest.mark.parametrize("value", [0, 8, "4", True])
def test_a_number_of_frames_that_no_response_has(pipe: Pipe, opening: dict[str, Array], value: object) -> None:
    with pytest.raises(PipeError, match=r"parameter frames_per_response is .*; it must be 4 or 12\."):
        pipe.run(NOTHING, start=True, options={"frames_per_response": value}, **opening)


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
    with pytest.raises(PipeError, match="session 5 has failed"):
        pipe.run(NOTHING, end=True)  # goes all the way, since every batcher has a place for the session
    assert pipe.count(metrics.FAILURES) == 1, "counted once"


def test_a_start_whose_first_block_fails_leaves_nothing_behind(
    pipe: Pipe, opening: dict[str, Array], speech: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(pipe.conditioning._conditioner, "block", lambda *_: 1 / 0)
        with pytest.raises(PipeError, match=r"stage conditioning at block 1 failed \(ZeroDivisionError"):
            pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening)
    assert pipe.live() == [0] * 6
    with pytest.raises(PipeError, match="session 5 has failed"):
        pipe.run(NOTHING, end=True)
    assert pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening).shape == (12, 96, 96, 3)


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
    with pytest.raises(PipeError):
        pipe.run(NOTHING, end=True)
    assert pipe.live() == [0] * 6


def test_memory_that_runs_out_on_the_way_is_told_as_such() -> None:
    told = describe(MemoryError("cannot have 5 GiB"), "dit_step_1", 6)
    assert told.code is ErrorCode.UNAVAILABLE
    assert str(told) == (
        "stage dit_step_1 at block 7 has no memory left (cannot have 5 GiB); try again later or elsewhere."
    )


def test_known_avatars_skip_prefill_and_warm_up(
    pipe: Pipe, opening: dict[str, Array], speech: Array, expected: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.run(NOTHING, start=True, **opening)
    pipe.run(NOTHING, end=True)
    with monkeypatch.context() as idle:
        for worker, work in (
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
    for stage in list(pipe.meters)[1:]:
        assert (pipe.count(metrics.AVATAR_HITS, stage), pipe.count(metrics.AVATAR_MISSES, stage)) == (2, 1)
        assert pipe.count(metrics.AVATARS, stage) == 1


def test_avatar_key_and_provenance_are_forwarded_with_start(pipe: Pipe, opening: dict[str, Array]) -> None:
    provenance = text_tensor('{"seed": 3}')
    answer = pipe.condition(NOTHING, start=True, **opening, PROVENANCE_IN=provenance)
    assert np.array_equal(answer[AVATAR_KEY], opening[AVATAR_KEY])
    assert read_text(answer["PROVENANCE"]) == '{"seed": 3}'
    later = pipe.condition(NOTHING)
    assert len(later[AVATAR_KEY]) == len(later["PROVENANCE"]) == 0


def test_a_known_avatar_gives_way_to_a_new_one(
    pipe: Pipe, onnx_runtime: OnnxRuntime, opening: dict[str, Array], picture: bytes
) -> None:
    other = avatar_tensors(onnx_runtime, picture, "another")
    for given in (opening, other, opening):
        pipe.run(NOTHING, start=True, **given)
        pipe.run(NOTHING, end=True)
    assert pipe.count(metrics.AVATAR_MISSES, "dit_step_1") == 3, "room for one"


def test_a_step_answers_start_before_it_makes_the_sink(
    pipe: Pipe, opening: dict[str, Array], speech: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So all steps make it at once. One that fails is tried again with the first block, whose client is told."""
    tensors = {n: tensor.copy() for n, tensor in pipe.condition(NOTHING, start=True, **opening).items()}
    step, answered = pipe.steps[0], []
    expected = step._denoiser.prefill(SinkSource.of(opening[SINK_MOTION], opening[SINK_TEXT]))
    prefill = step._denoiser.prefill

    def fail_once(source: SinkSource) -> dict[str, Array]:
        assert answered, "the answer waits for the sink"
        monkeypatch.setattr(step._denoiser, "prefill", prefill)
        raise RuntimeError("the GPU has failed")

    monkeypatch.setattr(step._denoiser, "prefill", fail_once)
    response = step.handle(StageRequest(SESSION, True, False, tensors))
    answered.append(response)
    for tensor in tensors.values():
        tensor.fill(0)  # Triton's memory holds another request by then
    assert response.after_response is not None
    with pytest.raises(RuntimeError, match="the GPU has failed"):
        response.after_response()
    step.handle(StageRequest(SESSION, False, False, pipe.condition(speech[:BLOCK_SAMPLES])))
    made = step.sessions.get(SESSION).state.sink
    assert all(np.array_equal(made[name], array) for name, array in expected.items())


def test_the_avatar_is_kept_beyond_its_request(pipe: Pipe, opening: dict[str, Array], speech: Array) -> None:
    """Triton's memory holds another request by the time the new sink is made of it."""
    given = {name: tensor.copy() for name, tensor in opening.items()}
    pipe.run(speech[:BLOCK_SAMPLES], start=True, **given)
    for tensor in given.values():
        tensor[:] = 0
    tensors = pipe.condition(speech[BLOCK_SAMPLES : 2 * BLOCK_SAMPLES])
    assert np.array_equal(tensors[SINK_MOTION], opening[SINK_MOTION])
    assert np.array_equal(tensors[SINK_TEXT], opening[SINK_TEXT])


def encode(
    runtime: OnnxRuntime, pixels: Array, *prompts: bytes, meter: RecordingMeter | None = None
) -> dict[str, Array]:
    inputs = {PIXELS: pixels, "PROMPT": np.array(prompts, dtype=np.object_)}
    stage = AvatarEncoderStage(runtime, meter or RecordingMeter())
    return stage.handle(StageRequest(0, False, False, inputs)).outputs


def test_the_avatar_encoder_gives_what_a_start_takes(
    onnx_runtime: OnnxRuntime, picture: bytes, opening: dict[str, Array]
) -> None:
    made = encode(onnx_runtime, decode_pixels(picture, 96, 96), b"hello")
    assert made.keys() == {SINK_MOTION, SINK_TEXT}
    assert all(np.array_equal(tensor, opening[name]) for name, tensor in made.items())


@pytest.mark.parametrize(
    ("shape", "prompts", "message"),
    [
        (
            (96, 95, 3),
            (b"hello",),
            r"^the picture is uint8 \[96, 95, 3\]; preset tiny takes uint8 \[96, 96, 3\]: scale",
        ),
        ((96, 96, 3), (b"one", b"two"), r"^PROMPT has 2 strings; send one\.$"),
        ((96, 96, 3), (b"\xff",), r"^PROMPT is not UTF-8 \(.*\); encode it as UTF-8\.$"),
        ((96, 96, 3), (b"a" * 2001,), r"2001"),
    ],
)
def test_the_avatar_encoder_refuses(
    onnx_runtime: OnnxRuntime, shape: tuple[int, ...], prompts: tuple[bytes, ...], message: str
) -> None:
    meter = RecordingMeter()
    with pytest.raises(InputError, match=message):
        encode(onnx_runtime, np.zeros(shape, dtype=np.uint8), *prompts, meter=meter)
    assert meter.of(metrics.FAILURES) == 0


def test_an_avatar_encoder_that_fails_is_counted(
    onnx_runtime: OnnxRuntime, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AvatarEncoder, "encode", lambda *_: 1 / 0)
    meter = RecordingMeter()
    with pytest.raises(ZeroDivisionError):
        encode(onnx_runtime, decode_pixels(picture, 96, 96), b"hello", meter=meter)
    assert meter.of(metrics.FAILURES) == 1


def test_a_silent_session_is_dropped(onnx_runtime: OnnxRuntime, tmp_path: Path, opening: dict[str, Array]) -> None:
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


def test_all_sessions_are_lost_with_a_stage(pipe: Pipe, opening: dict[str, Array], speech: Array) -> None:
    pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening)
    for stage in pipe.stages():
        stage.drop_all()
    assert pipe.live() == [0] * 6
    assert pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening).shape == (12, 96, 96, 3)


def test_a_refused_request_leaves_no_session(pipe: Pipe, opening: dict[str, Array], speech: Array) -> None:
    with pytest.raises(InputError, match=r"^the first request of a session has no AVATAR; send the avatar with it\.$"):
        pipe.condition(speech[:BLOCK_SAMPLES], start=True)
    assert pipe.run(speech[:BLOCK_SAMPLES], start=True, **opening).shape == (12, 96, 96, 3)


def opened(table: SessionTable[str], *sessions: int) -> None:
    for session in sessions:
        table.open(session, lambda: "state")


def test_table_drops_idle_sessions_by_its_own_clock() -> None:
    clock = Clock()
    table: SessionTable[str] = SessionTable(IDLE_S, clock=clock)
    opened(table, 1, 2)
    clock.now_s = IDLE_S
    assert table.get(2) == "state"
    clock.now_s = IDLE_S + 1
    assert table.sweep() == [(1, "state")]
    opened(table, 3)
    assert 1 not in table
    assert len(table) == 2
    with pytest.raises(SessionError, match=r"session 1 is not open.*silent for more than 30 s; start a new session"):
        table.get(1)


def test_table_remembers_a_failed_session() -> None:
    clock = Clock()
    table: SessionTable[str] = SessionTable(IDLE_S, clock=clock)
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
