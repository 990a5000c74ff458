"""Engines on device memory give what ONNX Runtime gives, to the bit; the stand-in runs them at the bound addresses."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from live_avatar.arrays import Array
from live_avatar.config import TINY
from live_avatar.errors import ArtifactError
from live_avatar.exporter.build import export_artifacts
from live_avatar.exporter.engines import EngineOptions, build_engines
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.graphs.contract import Extent, kv_names
from live_avatar.graphs.digests import file_sha256
from live_avatar.graphs.engines import RECORDS, Target, engine_path, read_engines, write_engines
from live_avatar.graphs.flavours import TENSORRT, TENSORRT_RTX
from live_avatar.pipeline.decoder import DecoderState, FrameDecoder
from live_avatar.pipeline.denoiser import Denoiser, DenoiserState, one_step
from live_avatar.pipeline.generator import Generator, cut_blocks
from live_avatar.pipeline.kv_cache import KVRing
from live_avatar.runtime import tensorrt_runtime
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.runtime.tensorrt_runtime import CudaDevice, TensorRTRuntime, open_library
from live_avatar.weights.checkpoint import open_checkpoint
from tests.conftest import noise_speech
from tests.export.conftest import FP8_CACHE
from tests.support import fake_tensorrt_rtx
from tests.support.artifacts import exported_once
from tests.support.fake_tensorrt import HostDevice, install
from tests.support.networks import drawn_block, drawn_source

BLOCKS = 7


@pytest.fixture(scope="module")
def built(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artifacts]:
    """The tiny preset with engines, that of the text encoder with its weights on the host; tests must not change it."""
    folder = tmp_path_factory.mktemp("engines") / "tiny"
    shutil.copytree(artifacts.folder, folder, copy_function=os.link)
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch)
        build_engines(folder, EngineOptions(weights_on_host=("text_encoder",)), lambda line: None, HostDevice)
        yield load_artifacts(folder)


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def runtime(built: Artifacts, device: HostDevice) -> TensorRTRuntime:
    return TensorRTRuntime(built, 0, lambda index: device)


class Session:
    """One session of a step on two runtimes, with inputs of its own."""

    def __init__(self, ours: Denoiser, theirs: Denoiser, seed: int) -> None:
        self.steps = (ours, theirs)
        given = drawn_source(ours.preset, seed)
        self.states = [step.open(step.prefill(given)) for step in self.steps]
        self._random = np.random.default_rng(seed)

    def run(self) -> None:
        """The next block, on both; they must agree."""
        latent, audio = drawn_block(self.steps[0].preset, self._random)
        ours, theirs = (step.run(state, latent, audio) for step, state in zip(self.steps, self.states, strict=True))
        assert np.array_equal(ours, theirs)

    def replace_sink(self, seed: int) -> None:
        for step, state in zip(self.steps, self.states, strict=True):
            state.sink = step.prefill(drawn_source(step.preset, seed))


@pytest.fixture
def steps(runtime: TensorRTRuntime, onnx_runtime: OnnxRuntime) -> tuple[Denoiser, Denoiser]:
    return Denoiser(runtime, one_step(2)), Denoiser(onnx_runtime, one_step(2))


def test_a_session_gives_the_same_bits_and_is_captured_once(
    steps: tuple[Denoiser, Denoiser], device: HostDevice
) -> None:
    session = Session(*steps, seed=1)
    full = TINY.stream.past_blocks
    for block in range(BLOCKS):
        session.run()
        assert device.captures == (block >= full)
    assert device.replays == BLOCKS - full - 1


def test_interleaved_sessions_share_an_engine(steps: tuple[Denoiser, Denoiser], device: HostDevice) -> None:
    early, late = Session(*steps, seed=1), Session(*steps, seed=2)
    for _ in range(2):
        early.run()
    for _ in range(BLOCKS):
        early.run()
        late.run()
    assert device.captures == 2


def test_a_replaced_sink_is_seen(steps: tuple[Denoiser, Denoiser], device: HostDevice) -> None:
    session = Session(*steps, seed=1)
    for _ in range(5):
        session.run()
    before = [tensor.clone() for tensor in session.states[0].sink.values()]  # kept, so that its addresses stay taken
    held = session.states[0].sink
    session.replace_sink(seed=9)
    for _ in range(3):
        session.run()
    assert device.captures == 2
    assert all(torch.equal(old, kept) for old, kept in zip(before, held.values(), strict=True))


def test_a_new_session_at_the_addresses_of_an_ended_one_is_not_mistaken_for_it(
    steps: tuple[Denoiser, Denoiser], device: HostDevice
) -> None:
    ended = Session(*steps, seed=1)
    for _ in range(5):
        ended.run()
    old = ended.states[0]
    places = [*old.rings[0].history().values()]
    follower = Session(*steps, seed=2)
    rings = iter([tensor.zero_() for tensor in places])
    for name, tensor in follower.states[0].sink.items():
        old.sink[name].copy_(tensor)
    follower.states[0] = DenoiserState([KVRing(TINY, lambda shape, dtype: next(rings))], old.sink)
    captured = device.captures
    for _ in range(BLOCKS):
        follower.run()
    assert device.captures == captured  # the addresses are known: only the contents are others


def test_a_bounded_number_of_captures_is_kept(
    steps: tuple[Denoiser, Denoiser], device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_runtime, "KEPT_CAPTURES", 2)
    sessions = [Session(*steps, seed=seed) for seed in range(3)]
    for session in sessions:
        for _ in range(TINY.stream.window_blocks):
            session.run()
    assert device.captures == 3
    sessions[2].run()
    sessions[1].run()
    assert device.captures == 3
    sessions[0].run()  # was dropped, being the least recently used
    assert device.captures == 4


def test_caches_stay_on_the_device(runtime: TensorRTRuntime) -> None:
    step = Denoiser(runtime, one_step(1))
    state = step.open(step.prefill(drawn_source(TINY, 1)))
    assert all(
        isinstance(tensor, torch.Tensor) for tensor in (*state.sink.values(), *state.rings[0].history().values())
    )
    assert state.rings[0].history()["history_k.0"].dtype == torch.float32


def test_two_streams_of_frames_decode_to_the_same_pixels(runtime: TensorRTRuntime, onnx_runtime: OnnxRuntime) -> None:
    decoders = FrameDecoder(runtime), FrameDecoder(onnx_runtime)
    motions = [drawn_source(TINY, seed).motion for seed in (1, 2)]
    states = [[DecoderState(decoder.warm_up(motion)) for motion in motions] for decoder in decoders]
    random = np.random.default_rng(3)
    for _ in range(3):
        for stream in range(len(motions)):
            latents = random.standard_normal((1, *TINY.stream.latent_shape), dtype=np.float32)
            slots = states[0][stream].slots
            before = {name: tensor.clone() for name, tensor in slots.items()}
            ours, theirs = (decoder.decode(states[i][stream], latents) for i, decoder in enumerate(decoders))
            assert np.array_equal(ours, theirs)
            assert all(torch.equal(before[name], tensor) for name, tensor in slots.items())


def test_host_outputs_are_not_overwritten_by_the_next_run(runtime: TensorRTRuntime) -> None:
    graph = runtime.graph("vae_encoder")
    picture = np.zeros((1, 3, 1, TINY.stream.height, TINY.stream.width), dtype=np.float32)
    first = graph.run({"picture": picture})["motion"]
    kept = first.copy()
    graph.run({"picture": picture + 1})
    assert np.array_equal(first, kept)


def test_the_whole_system_gives_the_same_frames(
    runtime: TensorRTRuntime, onnx_runtime: OnnxRuntime, picture: bytes
) -> None:
    """All graphs, with the sink replaced at block 5 and a speech window that is not yet full."""

    def frames(chosen: Any) -> list[Array]:
        blocks = cut_blocks(noise_speech(4.0), TINY.stream)
        stream = Generator(chosen).stream(picture, "a person speaking", 5, blocks)
        return [block.frames for block in islice(stream, 6)]

    ours, theirs = frames(runtime), frames(onnx_runtime)
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_a_session_in_float16_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = export_artifacts(open_checkpoint(TINY.with_precision("float16")), tmp_path / "half", lambda line: None)
    install(monkeypatch, "10.15.1.29")
    build_engines(made.folder, EngineOptions(), lambda line: None, HostDevice)
    ours, theirs = TensorRTRuntime(made, 0, HostDevice), OnnxRuntime(made)
    session = Session(Denoiser(ours, one_step(2)), Denoiser(theirs, one_step(2)), seed=1)
    for _ in range(BLOCKS):
        session.run()
    assert session.states[0].rings[0].history()["history_k.0"].dtype == torch.float16


@pytest.mark.slow
def test_a_session_with_an_fp8_cache_gives_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = exported_once(tmp_path_factory, FP8_CACHE)
    made = shutil.copytree(shared.folder, tmp_path / "fp8", copy_function=os.link)
    install(monkeypatch)
    build_engines(made, EngineOptions(), lambda line: None, HostDevice)
    ours, theirs = TensorRTRuntime(load_artifacts(made), 0, HostDevice), OnnxRuntime(shared)
    session = Session(Denoiser(ours, one_step(2)), Denoiser(theirs, one_step(2)), seed=1)
    for _ in range(BLOCKS):
        session.run()
    ring = session.states[0].rings[0].history()["history_k.0"]
    assert ring.dtype == torch.float8_e4m3fn


def block_inputs(runtime: TensorRTRuntime, **extents: int) -> dict[str, Any]:
    """Zeros for a full block, with other extents where they are given."""
    contract = runtime._artifacts.contracts["dit"]
    ranges = {name: size[Extent.MAX] for name, size in contract.profiles["block"].items()} | extents
    inputs: dict[str, Any] = {}
    for spec in contract.inputs:
        shape = [ranges[n] if isinstance(n, str) else n for n in spec.shape]
        inputs[spec.name] = torch.zeros(shape) if spec.resident else np.zeros(shape, np.float32)
    return inputs


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": torch.zeros(3, 36, 127)}, r"tokens is float32 \[3, 36, 127\], expected float32 \['frames', "),
        ({"phase": np.zeros((2, 3, 36, 16), np.float64)}, r"phase is float64 .* expected float32"),
        ({"audio_global": np.zeros((3, 128), np.float32)}, r"audio_global is float32 \[3, 128\], expected"),
        ({"audio_global": np.zeros((1, 2, 128), np.float32)}, r"audio_global is float32 \[1, 2, 128\], expected"),
        (
            {"history_v.0": torch.zeros(1, 4, 5, 32)},
            r"history_v.0 is float32 \[1, 4, 5, 32\], expected float32 \[1, 4, 'history_tokens', 32\]; "
            r"use artifacts and a program of one version",
        ),
    ],
)
def test_inputs_that_break_the_contract_are_refused(
    runtime: TensorRTRuntime, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=f"dit: {message}"):
        runtime.graph("dit").run({**block_inputs(runtime), **changed})


def test_extents_of_no_profile_are_refused(runtime: TensorRTRuntime) -> None:
    most = runtime._artifacts.contracts["dit"].profiles["block"]["history_tokens"][Extent.MAX]
    for extents in ({"history_tokens": most + 1}, {"sink_tokens": 0}):
        message = r"dit has no profile for frames 3, .*; it has block, sink: use artifacts and a program of one version"
        with pytest.raises(ArtifactError, match=message):
            runtime.graph("dit").run(block_inputs(runtime, **extents))


def test_an_engine_of_another_tensorrt_is_refused(built: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "10.16.1.11")
    message = (
        r"was built by TensorRT 11.4.0.106 on stand-in \(compute capability 9.0\), but this is TensorRT 10.16.1.11 on "
        r"stand-in \(compute capability 9.0\); run `python -m export.engines"
    )
    with pytest.raises(ArtifactError, match=message):
        TensorRTRuntime(built, 0, HostDevice).graph("dit")


def test_an_engine_of_another_gpu_is_refused(built: Artifacts, device: HostDevice) -> None:
    device.gpu, device.compute_capability = "another", "8.9"
    with pytest.raises(ArtifactError, match=r"but this is TensorRT 11.4.0.106 on another \(compute capability 8.9\)"):
        TensorRTRuntime(built, 0, lambda index: device).graph("dit")


@pytest.mark.parametrize("name", ["dit.onnx", "dit.weights"])
def test_an_engine_of_another_graph_or_other_weights_is_refused(built: Artifacts, name: str) -> None:
    files = {**built.manifest["files"], name: {"bytes": 1, "digest": "0"}}
    other = replace(built, manifest={**built.manifest, "files": files})
    with pytest.raises(ArtifactError, match=rf"dit.plan was built from another {name}; run"):
        TensorRTRuntime(other, 0, HostDevice).graph("dit")


@pytest.fixture
def damaged(built: Artifacts, tmp_path: Path) -> Artifacts:
    """A copy whose engines a test may change."""
    shutil.copytree(built.folder, tmp_path / "copy")
    return load_artifacts(tmp_path / "copy")


def test_a_folder_without_engines_is_refused(artifacts: Artifacts) -> None:
    message = r"engines has no engines; run `python -m export.engines --artifacts .*tiny` on this machine"
    with pytest.raises(ArtifactError, match=message):
        TensorRTRuntime(artifacts, 0, HostDevice)


def test_an_engine_that_was_not_built_is_refused(damaged: Artifacts) -> None:
    write_engines(damaged, {name: engine for name, engine in read_engines(damaged).items() if name != "dit"})
    message = (
        r"dit.plan has not been built; run `python -m export.engines --artifacts .*copy --target tensorrt` on this"
    )
    with pytest.raises(ArtifactError, match=message):
        TensorRTRuntime(damaged, 0, HostDevice).graph("dit")


def test_engines_of_two_flavours_are_refused(damaged: Artifacts) -> None:
    engines = read_engines(damaged)
    other = Target(TENSORRT_RTX.name, fake_tensorrt_rtx.VERSION, ("8.9",), None)
    write_engines(damaged, {**engines, "dit": replace(engines["dit"], target=other)})
    message = (
        r"engines has engines of tensorrt and tensorrt-rtx, expected those of one; build all with one --target: "
        r"`python -m export.engines"
    )
    with pytest.raises(ArtifactError, match=message):
        TensorRTRuntime(damaged, 0, HostDevice)


def test_a_cut_engine_is_refused(damaged: Artifacts) -> None:
    path = engine_path(damaged, "dit")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=rf"dit.plan has {size - 1} bytes, but {size} were written; run"):
        TensorRTRuntime(damaged, 0, HostDevice).graph("dit")


def record(artifacts: Artifacts, path: Path) -> None:
    """Writes the engine's record as if its file had been built as it is."""
    engines = read_engines(artifacts)
    engines[path.stem] = replace(engines[path.stem], digest=file_sha256(path))
    write_engines(artifacts, engines)


def test_an_altered_engine_of_the_same_size_is_refused(damaged: Artifacts) -> None:
    path = engine_path(damaged, "dit")
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    message = (
        r"dit.plan has digest [0-9a-f]{12}, expected [0-9a-f]{12}, so it was changed after it was built; "
        r"remove it; run .*export.engines"
    )
    with pytest.raises(ArtifactError, match=message):
        TensorRTRuntime(damaged, 0, HostDevice).graph("dit")


def test_an_engine_that_tensorrt_refuses_is_refused_with_its_words(damaged: Artifacts) -> None:
    path = engine_path(damaged, "dit")
    path.write_bytes(b"x" * path.stat().st_size)
    record(damaged, path)
    message = r"dit.plan cannot be loaded \(6: The engine plan file is not compatible .*\); run"
    with pytest.raises(ArtifactError, match=message):
        TensorRTRuntime(damaged, 0, HostDevice).graph("dit")


def test_an_engine_with_other_tensors_is_refused(built: Artifacts) -> None:
    other = replace(built, contracts={**built.contracts, "dit": built.contracts["dit_text"]})
    with pytest.raises(ArtifactError, match=r"dit.plan has other inputs and outputs than its contract; run"):
        TensorRTRuntime(other, 0, HostDevice).graph("dit")


@pytest.mark.parametrize(
    "text",
    [
        '{"dit": {"bytes": 1}}',
        pytest.param('{"dit":' * 100_000, id="nested too deeply"),
    ],
)
def test_a_damaged_record_is_refused(damaged: Artifacts, text: str) -> None:
    path = damaged.folder / "engines" / RECORDS
    path.write_text(text)
    with pytest.raises(
        ArtifactError, match=r"engines.json is not a record of engines \(.*\); remove the folder and run"
    ):
        TensorRTRuntime(damaged, 0, HostDevice)


def test_without_tensorrt_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    message = r"TensorRT cannot be imported \(.*\); install it with `pip install 'tensorrt-cu13>=10.15'`, or run"
    with pytest.raises(ArtifactError, match=message):
        open_library(TENSORRT)


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "10.13.3.9")
    with pytest.raises(
        ArtifactError, match=r"this is TensorRT 10.13.3.9, too old for the graphs; install 10.15 or newer with `pip"
    ):
        open_library(TENSORRT)


def test_without_a_gpu_the_message_says_so() -> None:
    with pytest.raises(ArtifactError, match=r"GPU 99 does not exist, torch .* sees \d+ GPUs; run this on a machine"):
        CudaDevice(99)


@pytest.fixture(scope="module")
def built_rtx(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artifacts]:
    """The tiny preset with engines of TensorRT-RTX for two compute capabilities; tests must not change it."""
    folder = tmp_path_factory.mktemp("engines") / "rtx"
    shutil.copytree(artifacts.folder, folder, copy_function=os.link)
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_tensorrt_rtx.install(monkeypatch)
        options = EngineOptions(TENSORRT_RTX, capabilities=("8.9", "12.0"))
        build_engines(folder, options, lambda line: None)
        yield load_artifacts(folder)


@pytest.fixture
def ada(device: HostDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HostDevice:
    """A GPU that the engines of `built_rtx` are for, of a user with an empty cache folder."""
    device.gpu, device.compute_capability = "NVIDIA L40S", "8.9"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fake_tensorrt_rtx.IExecutionContext, "finished", [])
    return device


@pytest.fixture
def copied_rtx(built_rtx: Artifacts, tmp_path: Path) -> Artifacts:
    shutil.copytree(built_rtx.folder, tmp_path / "copy", copy_function=os.link)
    return load_artifacts(tmp_path / "copy")


def test_engines_compiled_ahead_of_time_give_the_same_bits(
    copied_rtx: Artifacts, ada: HostDevice, onnx_runtime: OnnxRuntime
) -> None:
    runtime = TensorRTRuntime(copied_rtx, 0, lambda index: ada)
    session = Session(Denoiser(runtime, one_step(2)), Denoiser(onnx_runtime, one_step(2)), seed=1)
    for _ in range(BLOCKS):
        session.run()
    assert ada.captures == 1


def run_audio_tokens(artifacts: Artifacts, device: HostDevice) -> None:
    graph = TensorRTRuntime(artifacts, 0, lambda index: device).graph("audio_tokens")
    (spec,) = artifacts.contracts["audio_tokens"].inputs
    for _ in range(2):
        graph.run({spec.name: np.zeros(spec.shape, np.float32)})


def test_kernels_are_finished_once_and_kept_for_the_next_start(copied_rtx: Artifacts, ada: HostDevice) -> None:
    finished = fake_tensorrt_rtx.IExecutionContext.finished
    run_audio_tokens(copied_rtx, ada)
    assert len(finished) == 1
    assert [path.name for path in (copied_rtx.folder / "engines").glob("*kernels*")] == ["audio_tokens.kernels"]
    run_audio_tokens(copied_rtx, ada)
    assert len(finished) == 1


def test_kernels_of_another_version_are_finished_again(copied_rtx: Artifacts, ada: HostDevice) -> None:
    place = copied_rtx.folder / "engines" / "audio_tokens.kernels"
    place.write_bytes(b"1.6.0.0\nall of them")
    run_audio_tokens(copied_rtx, ada)
    assert len(fake_tensorrt_rtx.IExecutionContext.finished) == 1
    assert place.read_bytes().startswith(fake_tensorrt_rtx.VERSION.encode())


def test_kernels_go_to_the_users_cache_where_the_folder_of_engines_cannot_be_written(
    copied_rtx: Artifacts, ada: HostDevice, tmp_path: Path
) -> None:
    (copied_rtx.folder / "engines" / "audio_tokens.kernels").mkdir()  # refuses a file, whoever runs the test
    for _ in range(2):
        run_audio_tokens(copied_rtx, ada)
    assert len(fake_tensorrt_rtx.IExecutionContext.finished) == 1
    (kept,) = (tmp_path / "cache" / "live-avatar" / "kernels").iterdir()
    assert kept.name == read_engines(copied_rtx)["audio_tokens"].digest


def test_kernels_that_can_be_kept_nowhere_are_no_fault(
    copied_rtx: Artifacts, ada: HostDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied_rtx.folder / "engines" / "audio_tokens.kernels").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        run_audio_tokens(copied_rtx, ada)
    assert len(fake_tensorrt_rtx.IExecutionContext.finished) == 2


def test_an_engine_for_other_compute_capabilities_is_refused(built_rtx: Artifacts, ada: HostDevice) -> None:
    ada.gpu, ada.compute_capability = "NVIDIA RTX A6000", "8.6"
    message = (
        r"dit.plan was built by TensorRT-RTX 1.7.1.116 for compute capability 8.9, 12.0, but this is TensorRT-RTX "
        r"1.7.1.116 on NVIDIA RTX A6000 \(compute capability 8.6\); run `python -m export.engines .* --target "
        r"tensorrt-rtx` on this machine"
    )
    with pytest.raises(ArtifactError, match=message):
        TensorRTRuntime(built_rtx, 0, lambda index: ada).graph("dit")


def test_engines_whose_library_is_not_installed_are_refused_with_the_command(
    built_rtx: Artifacts, ada: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    message = r"TensorRT-RTX cannot be imported \(.*\); install it with `pip install 'tensorrt-rtx-cu12>=1.7'`"
    with pytest.raises(ArtifactError, match=message):
        TensorRTRuntime(built_rtx, 0, lambda index: ada)


def test_names_of_caches_are_resident(built: Artifacts) -> None:
    """What the runtime keeps on the device is exactly caches, states, modulation, and tokens on their way."""
    resident = {spec.name for contract in built.contracts.values() for spec in contract.inputs if spec.resident}
    prefixes = {name.split(".")[0] for name in resident}
    assert prefixes == {
        "state",
        "tokens",
        "modulation",
        "head_modulation",
        *(f"{kind}_{part}" for kind in ("text", "sink", "history") for part in "kv"),
    }
    assert set(kv_names("history", TINY.dit.num_layers)) <= resident
