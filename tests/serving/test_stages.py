"""The stages in plain arrays, without a server: chains, failures, gaps, idle sessions, the rolling sink."""

from __future__ import annotations

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.config import TINY
from live_avatar.errors import CapacityError, InputError, SessionError
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving import conditioning
from live_avatar.serving.conditioning import ConditioningStage
from live_avatar.serving.dit_step import DiTStepStage
from live_avatar.serving.rolling_sink import ABSENT, FAILED, READY, RollingSink
from live_avatar.serving.stage import NO_BLOCK, SessionTable, StageRequest
from live_avatar.serving.tensors import BLOCK, LATENT, SINK_REFERENCE
from live_avatar.serving.vae_decoder import VAEDecoderStage

SESSION = 5
IDLE_S = 30.0
NOTHING = np.zeros(0, dtype=np.int16)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Pipe:
    """All stages in a row, as the ensemble wires them; the rolling sink is the real one."""

    def __init__(self, runtime: OnnxRuntime, max_sessions: int = 2) -> None:
        self.sinks = RollingSink(IDLE_S)
        self.conditioning = ConditioningStage(runtime, self.sinks, IDLE_S, max_sessions)
        self.steps = [DiTStepStage(runtime, step, self.sinks, IDLE_S) for step in range(1, 5)]
        self.decoder = VAEDecoderStage(runtime, IDLE_S)

    def condition(self, audio: Array, start: bool = False, end: bool = False, **inputs: Array) -> dict[str, Array]:
        request = StageRequest(SESSION, start, end, {"AUDIO": audio, **inputs}, {"seed": 3} if start else {})
        return self.conditioning.handle(request).outputs

    def denoise(
        self, tensors: dict[str, Array], upto: int = 4, start: bool = False, end: bool = False
    ) -> dict[str, Array]:
        for stage in self.steps[:upto]:
            tensors = tensors | stage.handle(StageRequest(SESSION, start, end, tensors)).outputs
        return tensors

    def run(self, audio: Array, start: bool = False, end: bool = False, **inputs: Array) -> Array:
        """One block through everything -> frames."""
        tensors = self.denoise(self.condition(audio, start, end, **inputs), start=start, end=end)
        return self.decoder.handle(StageRequest(SESSION, start, end, tensors)).outputs["FRAMES"]


@pytest.fixture
def pipe(onnx_runtime: OnnxRuntime) -> Pipe:
    return Pipe(onnx_runtime)


@pytest.fixture
def opening(picture: bytes) -> dict[str, Array]:
    image = np.frombuffer(picture, dtype=np.uint8)
    return {"REFERENCE_IMAGE": image, "PROMPT": np.array([b"hello"], dtype=np.object_)}


def test_the_chain_makes_the_generators_frames(
    pipe: Pipe, opening: dict[str, Array], speech: Array, expected: Array
) -> None:
    frames = [pipe.run(speech[:7680], start=True, **opening)]
    for block in range(1, 6):
        frames.append(pipe.run(speech[7680 * block : 7680 * (block + 1)], end=block == 5))
    assert np.array_equal(np.concatenate(frames), expected[:72])
    with pytest.raises(SessionError, match="is not open here: it was never started, has ended, or was silent"):
        pipe.run(speech[:7680])


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
    assert np.array_equal(pipe.run(speech[:7680]), expected[:12])


def test_the_sink_travels_with_the_blocks_that_need_it(pipe: Pipe, opening: dict[str, Array], speech: Array) -> None:
    carried = []
    for block in range(6):
        given = opening if block == 0 else {}
        tensors = pipe.condition(speech[7680 * block : 7680 * (block + 1)], start=block == 0, **given)
        carried.append(len(tensors[SINK_REFERENCE]))
        pipe.denoise(tensors, start=block == 0)
    update = TINY.stream.sink_update_block
    assert update is not None
    assert [block + 1 for block, rows in enumerate(carried) if rows] == [1, update]


def test_a_failed_stage_remembers_and_tells_conditioning(
    pipe: Pipe, opening: dict[str, Array], speech: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.denoise(pipe.condition(speech[:7680], start=True, **opening), start=True)
    pipe.sinks.take(SESSION)
    tensors = pipe.condition(speech[7680 : 2 * 7680])

    def fail(*_: object) -> Array:
        raise RuntimeError("the device fell off")

    with monkeypatch.context() as broken:
        broken.setattr(pipe.steps[1]._denoiser, "run", fail)
        with pytest.raises(RuntimeError, match="fell off"):
            pipe.denoise(tensors, upto=2)
    later = pipe.condition(speech[2 * 7680 : 3 * 7680])
    with pytest.raises(SessionError, match=r"session 5 has failed \(step 2, block 2: the device fell off\); end it"):
        pipe.denoise(later, upto=2)
    assert pipe.sinks.take(SESSION)[0] == FAILED, "so that conditioning does not wait for a sink that never comes"


def test_a_gap_is_noticed_downstream(pipe: Pipe, opening: dict[str, Array], speech: Array) -> None:
    pipe.run(speech[:7680], start=True, **opening)
    pipe.condition(speech[7680 : 2 * 7680])  # lost on its way
    with pytest.raises(SessionError, match="brings block 3 where block 2 was due, because an earlier block failed"):
        pipe.run(speech[2 * 7680 : 3 * 7680])


def test_conditioning_waits_for_the_sink_and_no_longer(
    onnx_runtime: OnnxRuntime, opening: dict[str, Array], speech: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    sinks = RollingSink(IDLE_S)
    latent = np.ones((1, 16, 1, 12, 12), dtype=np.float32)
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            sinks.put(SESSION, latent)

    stage = ConditioningStage(onnx_runtime, sinks, IDLE_S, 1, sleep)
    blocks = [stage.handle(StageRequest(SESSION, True, False, {"AUDIO": speech[:7680], **opening}))]
    blocks += [stage.handle(StageRequest(SESSION, False, False, {"AUDIO": speech[:7680]})) for _ in range(4)]
    assert len(naps) == 3
    assert np.array_equal(blocks[4].outputs[SINK_REFERENCE], latent)
    assert blocks[4].waited_s > 0

    monkeypatch.setattr(conditioning, "SINK_WAIT_LIMIT_S", 0.0)
    stage = ConditioningStage(onnx_runtime, RollingSink(IDLE_S), IDLE_S, 1, sleep)
    stage.handle(StageRequest(SESSION, True, False, {"AUDIO": speech[:7680], **opening}))
    for _ in range(3):
        stage.handle(StageRequest(SESSION, False, False, {"AUDIO": speech[:7680]}))
    with pytest.raises(SessionError, match="block 1 gave no new sink within 0 s; end it and start a new one"):
        stage.handle(StageRequest(SESSION, False, False, {"AUDIO": speech[:7680]}))


def test_a_refused_request_leaves_no_session(pipe: Pipe, opening: dict[str, Array], speech: Array) -> None:
    with pytest.raises(InputError, match="no REFERENCE_IMAGE"):
        pipe.condition(speech[:7680], start=True)
    assert pipe.run(speech[:7680], start=True, **opening).shape == (12, 96, 96, 3)


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
    opened(table, 3)
    assert 1 not in table
    assert len(table) == 2
    with pytest.raises(SessionError, match=r"session 1 is not open.*silent for more than 30 s; start a new session"):
        table.get(1)


def test_table_makes_nothing_for_a_refused_session() -> None:
    table: SessionTable[str] = SessionTable(IDLE_S, limit=1)
    opened(table, 1)
    made: list[int] = []
    with pytest.raises(CapacityError):
        table.open(2, lambda: str(made.append(2)))
    assert made == []


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
