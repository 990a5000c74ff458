"""A session's new sink on its way: put, sent down, prefilled ahead where there is room, never waited for in vain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.pipeline.sink import SinkSource
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving import metrics
from live_avatar.serving.conditioning import ConditioningStage
from live_avatar.serving.control import Control
from live_avatar.serving.resources import SessionRoom
from live_avatar.serving.rolling_sink import ABSENT, FAILED, READY, WAIT_LIMIT_S, RollingSink, SinkReceiver
from live_avatar.serving.sessions import SessionLimits
from live_avatar.serving.stage import StageRequest, StageResponse
from live_avatar.serving.tensors import FAILURE, SINK_KEY, SINK_REFERENCE, read_text
from live_avatar_client.protocol import BLOCK_SAMPLES
from tests.serving.pipe import IDLE_S, NOTHING, SESSION, Pipe
from tests.serving.recording import RecordingMeter


def test_the_sink_travels_as_soon_as_it_is_there(pipe: Pipe, opening: dict[str, Array], speech: Array) -> None:
    sink_rows = []
    for block in range(6):
        given = opening if block == 0 else {}
        tensors = pipe.condition(speech[BLOCK_SAMPLES * block : BLOCK_SAMPLES * (block + 1)], start=block == 0, **given)
        sink_rows.append(len(tensors[SINK_REFERENCE]))
        pipe.denoise(tensors, start=block == 0)
    assert [block + 1 for block, rows in enumerate(sink_rows) if rows] == [1, 2]


class Prefills:
    """Counts the prefills of step 1, and drives sessions through the steps block by block."""

    def __init__(self, pipe: Pipe, opening: dict[str, Array], speech: Array, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.works = True
        self._pipe, self._opening, self._speech = pipe, opening, speech
        self._blocks: dict[int, int] = {}
        prefill = pipe.steps[0]._denoiser.prefill

        def counted(source: SinkSource) -> dict[str, Array]:
            self.count += 1
            if not self.works:
                raise RuntimeError("the device fell off")
            return prefill(source)

        monkeypatch.setattr(pipe.steps[0]._denoiser, "prefill", counted)

    def blocks(self, upto: int, session: int = SESSION, end: bool = False) -> str:
        """Runs the session's next blocks, up to block `upto` (from 1); says what failed at the last."""
        failure = ""
        for block in range(self._blocks.get(session, 0), upto):
            failure = self._block(block, session, end and block == upto - 1)
        self._blocks[session] = 0 if end else upto
        return failure

    def _block(self, block: int, session: int, end: bool) -> str:
        speech, start = self._speech[BLOCK_SAMPLES * block : BLOCK_SAMPLES * (block + 1)], block == 0
        tensors = self._pipe.condition(speech, start, end, session, **(self._opening if start else {}))
        return read_text(self._pipe.denoise(tensors, start=start, end=end, session=session)[FAILURE])

    def ahead(self) -> float:
        """How many sinks took effect in step 1 that had been prefilled before."""
        return self._pipe.count(metrics.SINKS_AHEAD, "dit_step_1")


@pytest.fixture
def prefills(pipe: Pipe, opening: dict[str, Array], speech: Array, monkeypatch: pytest.MonkeyPatch) -> Prefills:
    return Prefills(pipe, opening, speech, monkeypatch)


def test_a_new_sink_is_prefilled_behind_an_earlier_block(prefills: Prefills, pipe: Pipe) -> None:
    prefills.blocks(upto=2)
    assert prefills.count == 2, "of the picture, and behind block 2"
    state = pipe.steps[0].sessions.get(SESSION).state
    first = state.sink
    prefills.blocks(upto=4)
    assert state.sink is first, "until its block"
    prefills.blocks(upto=5)
    assert state.sink is not first
    assert (prefills.count, prefills.ahead()) == (2, 1)


def test_every_session_has_its_sink_ahead_where_there_is_room(prefills: Prefills) -> None:
    prefills.blocks(upto=2)
    prefills.blocks(upto=2, session=6)
    assert prefills.count == 3, "one of the picture, which they share, and one of each"
    prefills.blocks(upto=5)
    prefills.blocks(upto=5, session=6)
    assert (prefills.count, prefills.ahead()) == (3, 2)


def test_without_room_one_sink_is_ahead_and_gives_way_to_one_whose_block_has_come(
    prefills: Prefills, pipe: Pipe, onnx_runtime: OnnxRuntime
) -> None:
    """So that no more memory is needed than for one sink that replaces another."""
    prefills.blocks(upto=2)
    prefills.blocks(upto=1, session=6)
    pipe.steps[0]._room = SessionRoom("dit_step_1", onnx_runtime, 2**60)
    prefills.blocks(upto=4, session=6)
    assert prefills.count == 2
    prefills.blocks(upto=5, session=6)
    assert (prefills.count, prefills.ahead()) == (3, 0), "with its own block"
    prefills.blocks(upto=5)
    assert (prefills.count, prefills.ahead()) == (4, 1), "it had to go, and was prefilled again behind block 3"


def test_a_sink_ahead_goes_with_its_session(prefills: Prefills) -> None:
    prefills.blocks(upto=2)
    prefills.blocks(upto=3, end=True)
    prefills.blocks(upto=2, session=6)
    assert prefills.count == 3, "there is room ahead again"


def test_an_end_prefills_nothing(prefills: Prefills) -> None:
    prefills.blocks(upto=2, end=True)
    assert prefills.count == 1


def test_a_prefill_that_fails_ahead_is_tried_again_until_its_own_block(prefills: Prefills) -> None:
    """Behind an answer nobody can be told; with its own block the client is."""
    prefills.blocks(upto=1)
    prefills.works = False
    assert prefills.blocks(upto=4) == ""
    assert prefills.count == 4
    assert "stage dit_step_1 at block 5 failed (RuntimeError: the device fell off)" in prefills.blocks(upto=5)


def alone(
    runtime: OnnxRuntime,
    sinks: RollingSink,
    control: Control,
    sleep: Callable[[float], None] = lambda seconds: None,
    wait_limit_s: float = WAIT_LIMIT_S,
) -> ConditioningStage:
    receiver = SinkReceiver(sinks, control, sleep, wait_limit_s)
    return ConditioningStage(runtime, RecordingMeter(), receiver, SessionLimits(IDLE_S, known_avatars=1))


def begun(stage: ConditioningStage, opening: dict[str, Array], speech: Array, blocks: int) -> int:
    """Opens the session, sends some blocks of it, and tells under which key its new sink is awaited."""
    given: list[dict[str, Array]] = [opening, *({} for _ in range(blocks - 1))]
    answers = [
        stage.handle(StageRequest(SESSION, number == 0, False, {"AUDIO": speech[:BLOCK_SAMPLES], **inputs}))
        for number, inputs in enumerate(given)
    ]
    return int(answers[-1].outputs[SINK_KEY][0])


def block(stage: ConditioningStage, audio: Array) -> StageResponse:
    return stage.handle(StageRequest(SESSION, False, False, {"AUDIO": audio}))


LATENT_FRAME = np.ones((1, 16, 1, 12, 12), dtype=np.float32)


def test_conditioning_waits_for_the_sink_and_no_longer(
    onnx_runtime: OnnxRuntime, opening: dict[str, Array], speech: Array
) -> None:
    sinks, naps = RollingSink(IDLE_S), []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            sinks.put(key, LATENT_FRAME)

    stage = alone(onnx_runtime, sinks, Control(None), sleep)
    key = begun(stage, opening, speech, 4)
    fifth = block(stage, speech[:BLOCK_SAMPLES])
    assert len(naps) == 3
    assert np.array_equal(fifth.outputs[SINK_REFERENCE], LATENT_FRAME)
    assert fifth.waited_s > 0

    stage = alone(onnx_runtime, RollingSink(IDLE_S), Control(None), wait_limit_s=0.0)
    begun(stage, opening, speech, 4)
    failure = read_text(block(stage, speech[:BLOCK_SAMPLES]).outputs[FAILURE])
    assert "session 5: block 1 gave no new sink within 0 s, or was lost" in failure


def test_the_sink_is_fetched_before_the_rolling_sink_forgets_it(
    onnx_runtime: OnnxRuntime, opening: dict[str, Array], speech: Array
) -> None:
    sinks = RollingSink(IDLE_S)
    stage = alone(onnx_runtime, sinks, Control(None), lambda seconds: pytest.fail("nothing to wait for"))
    key = begun(stage, opening, speech, 1)
    sinks.put(key, LATENT_FRAME)
    paused = block(stage, NOTHING)  # a keep-alive in a pause
    assert np.array_equal(paused.outputs[SINK_REFERENCE], LATENT_FRAME)
    assert sinks.take(key)[0] == ABSENT
    for _ in range(4):
        assert len(block(stage, speech[:BLOCK_SAMPLES]).outputs[SINK_REFERENCE]) == 0, "it is sent once"


def test_an_id_used_again_gets_its_own_sink(
    onnx_runtime: OnnxRuntime, opening: dict[str, Array], speech: Array
) -> None:
    sinks = RollingSink(IDLE_S)
    stage = alone(onnx_runtime, sinks, Control(None))
    first = begun(stage, opening, speech, 1)
    stage.handle(StageRequest(SESSION, False, True, {"AUDIO": NOTHING}))
    second = begun(stage, opening, speech, 4)
    sinks.put(first, LATENT_FRAME)  # of the session that has ended, late
    sinks.put(second, 2 * LATENT_FRAME)
    assert np.array_equal(block(stage, speech[:BLOCK_SAMPLES]).outputs[SINK_REFERENCE], 2 * LATENT_FRAME)


def test_no_one_waits_for_a_sink_that_was_lost_with_its_stage(
    onnx_runtime: OnnxRuntime, tmp_path: Path, opening: dict[str, Array], speech: Array
) -> None:
    control = Control(tmp_path)
    stage = alone(onnx_runtime, RollingSink(IDLE_S), control, lambda seconds: control.advance_reload_epoch())
    begun(stage, opening, speech, 4)
    failure = read_text(block(stage, speech[:BLOCK_SAMPLES]).outputs[FAILURE])
    assert "was lost with a stage that had to be loaded again; end it and start a new one" in failure


@pytest.mark.parametrize("operation", ["put", "fail"])
def test_rolling_sink_gives_once(operation: str) -> None:
    sinks = RollingSink(IDLE_S)
    latent = np.ones((1, 16, 1, 2, 2), dtype=np.float32)
    assert sinks.take(SESSION)[0] == ABSENT
    if operation == "put":
        sinks.put(SESSION, latent)
    else:
        sinks.fail(SESSION)
    state, given = sinks.take(SESSION)
    assert state == {"put": READY, "fail": FAILED}[operation]
    assert len(given) == (1 if operation == "put" else 0)
    assert sinks.take(SESSION)[0] == ABSENT
