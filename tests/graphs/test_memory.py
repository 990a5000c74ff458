"""Sums of memory against the sizes that the reference states, and against real graphs and caches."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from live_avatar.arrays import Array
from live_avatar.config import S2V_14B, TINY, DiTConfig, Preset
from live_avatar.errors import CapacityError, ConfigError
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.graphs.contract import BLOCK_TOKENS, DIT, SINK_TOKENS, TEXT, contracts
from live_avatar.graphs.memory import (
    CONDITIONING,
    DECODER,
    ENCODER,
    GIB,
    MIB,
    Memory,
    Stage,
    decoder_memory,
    denoiser_memory,
    fitting_sessions,
    host_available_bytes,
    process_memory,
    require_room,
    require_sessions,
    session_memory,
    workspace_bytes,
)
from live_avatar.inputs.speech import SpeechWindow
from live_avatar.pipeline.decoder import FrameDecoder
from live_avatar.pipeline.denoiser import Denoiser, all_steps, one_step
from live_avatar.pipeline.kv_cache import KVRing
from live_avatar.runtime.host import host_zeros
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from tests.support.networks import drawn_source

LARGE = S2V_14B.with_precision("bfloat16")
ONE, ALL = one_step(1), all_steps(4)
SIZES = {1: 4, 16: 2, 7: 8, 9: 1}  # of ONNX types


def test_a_ring_of_the_large_model_is_three_quarters_of_the_references() -> None:
    """Spec section 11: 10.4 GB for 4 blocks of 3168 tokens, of which ours stores the 3 past ones."""
    assert denoiser_memory(LARGE, ONE).per_session["ring"] == 12_672 * 5120 * 2 * 2 * 40 * 3 // 4
    assert denoiser_memory(LARGE, ONE).per_session["ring"] == pytest.approx(10.4e9 * 3 / 4, rel=0.01)


def test_a_sink_of_the_large_model_is_the_references_condition_cache() -> None:
    """Spec section 11: 2640 tokens, 2.2 GB; the text keys and values of 512 tokens are counted with it."""
    assert denoiser_memory(LARGE, ONE).per_session["sink and text"] == (2640 + 512) * 5120 * 2 * 2 * 40
    assert denoiser_memory(LARGE, ONE).per_session["sink and text"] * 2640 / 3152 == pytest.approx(2.2e9, rel=0.02)


def test_a_decoder_state_of_the_large_model_is_the_references() -> None:
    """Spec section 13: 151,328 numbers for each latent pixel, about 1.28 GB in bf16 at 704x384."""
    assert decoder_memory(LARGE).per_session["state"] == 151_328 * 88 * 48 * 2
    assert decoder_memory(LARGE).per_session["state"] == pytest.approx(1.28e9, rel=0.01)


def test_weights_of_the_large_model() -> None:
    """Of 16.30 billion parameters the transformer has 13.85, once for all steps; text and tokens have 2.2."""
    shared = denoiser_memory(LARGE, ONE).shared
    assert shared["weights of the transformer"] == pytest.approx(27.7e9, rel=0.01)
    assert shared["weights of text and tokens"] == pytest.approx(4.3e9, rel=0.03)
    four = denoiser_memory(LARGE, ALL)
    assert {name: size for name, size in four.shared.items() if name in shared and name != "modulation"} == {
        name: size for name, size in shared.items() if name != "modulation"
    }
    assert four.per_session["rings"] == 4 * denoiser_memory(LARGE, ONE).per_session["ring"]
    assert decoder_memory(LARGE).shared["weights of two engines"] < 2 * 126_892_531 * 2


def test_fp8_takes_a_byte_for_each_weight_that_it_quantizes() -> None:
    """Per step and layer 6 of the 8 attention projections and the feed-forward; 12 injectors of 4 projections."""
    dit = LARGE.dit
    quantized = dit.num_layers * (6 * dim_square(dit) + 2 * dit.dim * dit.ffn_dim) + 12 * 4 * dim_square(dit)
    low, high = denoiser_memory(LARGE, ONE, fp8=True), denoiser_memory(LARGE, ONE)
    text = dit.num_layers * 2 * dim_square(dit)
    for part, numbers in (("weights of the transformer", quantized), ("weights of text and tokens", text)):
        assert high.shared[part] - low.shared[part] == numbers
    assert {**low.shared, **high.shared} == dict(high.shared)
    assert low.per_session == high.per_session
    require_room(LARGE, 40, 1, fp8=True)
    with pytest.raises(CapacityError, match=r"does not fit 40 GiB: .*; take a larger GPU"):
        require_room(LARGE, 40, 1)


def dim_square(dit: DiTConfig) -> int:
    return dit.dim * dit.dim


def graph_bytes(artifacts: Artifacts, component: str) -> int:
    graph = onnx.load(artifacts.graph_path(component), load_external_data=False).graph
    return sum(math.prod(tensor.dims) * SIZES[tensor.data_type] for tensor in graph.initializer)


def test_weights_are_those_of_the_graphs(artifacts: Artifacts) -> None:
    """Within 2 to 5 %: a graph has some constants more, and two graphs embed latents."""
    step, decoder = denoiser_memory(TINY, ONE).shared, decoder_memory(TINY).shared
    assert step["weights of the transformer"] == pytest.approx(graph_bytes(artifacts, DIT), rel=0.02)
    small = sum(graph_bytes(artifacts, name) for name in (BLOCK_TOKENS, SINK_TOKENS, TEXT))
    assert step["weights of text and tokens"] == pytest.approx(small, rel=0.05)
    assert decoder["weights of two engines"] == pytest.approx(2 * graph_bytes(artifacts, "vae_decoder"), rel=0.05)


def test_a_session_takes_what_its_caches_have(onnx_runtime: OnnxRuntime) -> None:
    denoiser = Denoiser(onnx_runtime, ONE)
    state = denoiser.open(denoiser.prefill(drawn_source(TINY, 1)))
    memory = denoiser_memory(TINY, ONE).per_session
    assert memory["sink and text"] == sum(array.nbytes for array in state.sink.values())
    tokens = TINY.stream.past_blocks * TINY.stream.block_tokens
    assert memory["ring"] == 2 * TINY.dit.num_layers * tokens * TINY.dit.dim * 4


def test_a_decoder_and_conditioning_keep_what_is_counted(onnx_runtime: OnnxRuntime) -> None:
    given = drawn_source(TINY, 1)
    slots = FrameDecoder(onnx_runtime).warm_up(given.motion)
    assert decoder_memory(TINY).per_session["state"] == sum(array.nbytes for array in slots.values())
    memory = session_memory(TINY, CONDITIONING, {}).per_session
    assert memory["latents and text"] == given.motion.nbytes + given.text.nbytes
    window = SpeechWindow(TINY.stream)
    for _ in range(TINY.stream.speech_window_blocks + 1):
        heard = window.push(np.zeros(TINY.stream.block_samples, dtype=np.int16))
    assert memory["speech"] == 2 * heard.size


def test_sixteen_bits_halve_the_caches() -> None:
    full, half = denoiser_memory(TINY, ONE), denoiser_memory(TINY.with_precision("bfloat16"), ONE)
    assert [2 * size for size in half.per_session.values()] == list(full.per_session.values())


def test_an_fp8_cache_halves_the_ring_and_nothing_else() -> None:
    """Of a history that is not full, two of three blocks are copied at most."""
    plain, fp8 = (denoiser_memory(LARGE.with_kv_cache_dtype(dtype), ONE) for dtype in (None, "fp8"))
    assert 2 * fp8.per_session["ring"] == plain.per_session["ring"]
    copies = "copies of a history that is not full"
    assert (3 * fp8.shared[copies], 3 * plain.shared[copies]) == (
        2 * fp8.per_session["ring"],
        2 * plain.per_session["ring"],
    )
    assert {**fp8.shared, copies: plain.shared[copies]} == plain.shared
    assert fp8.per_session["sink and text"] == plain.per_session["sink and text"]
    assert fp8.per_avatar == plain.per_avatar


def test_a_ring_in_fp8_takes_what_is_counted() -> None:
    preset = TINY.with_kv_cache_dtype("fp8")
    taken: list[int] = []

    def zeros(shape: tuple[int, ...], dtype: str) -> Array:
        taken.append(host_zeros(shape, dtype).nbytes)
        return host_zeros(shape, dtype)

    KVRing(preset, zeros)
    assert denoiser_memory(preset, ONE).per_session["ring"] == sum(taken)


def test_the_sum_is_spelled_out() -> None:
    memory = Memory("a stage", {"weights": 2 * GIB}, {"ring": GIB // 2})
    assert memory.spelled(3) == "weights 2.00 GiB + 3 x ring 512.00 MiB = 3.50 GiB"
    assert memory.total(3) == 3.5 * GIB


def test_the_sum_of_a_small_preset_is_in_mib() -> None:
    memory = Memory("a stage", {}, {"ring": 2 * MIB}, {"sink": MIB // 4})
    assert memory.spelled(3) == "3 x ring 2.00 MiB = 6.00 MiB"
    assert memory.spelled(3, 2) == "3 x ring 2.00 MiB + 2 x sink of an avatar 256.00 KiB = 6.50 MiB"
    assert memory.total(3, 2) == 6.5 * MIB


@pytest.mark.parametrize(("memory_gib", "sessions"), [(math.nan, 1), (0.0, 1), (-8.0, 1), (80.0, 0)])
def test_numbers_that_mean_nothing_are_refused(memory_gib: float, sessions: int) -> None:
    message = (
        rf"^{sessions} sessions on a GPU of {memory_gib:g} GiB; expected at least 1 session and more than 0 GiB\.$"
    )
    with pytest.raises(ConfigError, match=message):
        require_room(TINY, memory_gib, sessions)


def test_what_fits_is_accepted() -> None:
    require_room(LARGE, 79.6, 3)


@pytest.mark.parametrize(
    ("preset", "memory_gib", "sessions", "stage"),
    [
        (LARGE, 79.6, 4, "a denoising step"),
        (S2V_14B, 79.6, 1, "a denoising step"),
        (replace(LARGE, dit=TINY.dit, speech=TINY.speech, text=TINY.text), 5, 1, "the VAE decoder"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_sum(
    preset: Preset, memory_gib: float, sessions: int, stage: str
) -> None:
    message = (
        rf"{stage} of preset s2v-14b with {sessions} sessions does not fit {memory_gib:g} GiB: weights of .* \+ .* \+ "
        rf"{sessions} x .* = [\d.]+ GiB; take a larger GPU, fewer sessions, 16 bits or FP8\."
    )
    with pytest.raises(CapacityError, match=message):
        require_room(preset, memory_gib, sessions)


def test_sessions_of_one_gpu_that_runs_everything() -> None:
    """Algorithm 3 on GPUs of 80, 96 and 141 GB, whose driver shows so many GiB; no avatar is remembered beside them."""
    stages = (CONDITIONING, ALL, DECODER, ENCODER)

    def fitting(fp8: bool, text_on_host: bool, fp8_cache: bool = False) -> list[int]:
        preset = LARGE.with_kv_cache_dtype("fp8" if fp8_cache else None)
        processes = [process_memory(preset, stage, fp8, text_on_host) for stage in stages]
        found = [fitting_sessions(processes, gib, avatars=0) for gib in (79.6, 95.6, 140.4)]
        for sessions, gib in zip(found, (79.6, 95.6, 140.4), strict=True):
            assert sum(process.total(sessions) for process in processes) <= gib * GIB or sessions == 0
            assert sum(process.total(sessions + 1) for process in processes) > gib * GIB
        return found

    assert fitting(fp8=False, text_on_host=False) == [0, 0, 2]
    assert fitting(fp8=False, text_on_host=True) == [0, 1, 2]
    assert fitting(fp8=True, text_on_host=False) == [0, 1, 2]
    assert fitting(fp8=True, text_on_host=True) == [1, 1, 3]
    assert fitting(fp8=False, text_on_host=False, fp8_cache=True) == [1, 1, 4]
    assert fitting(fp8=False, text_on_host=True, fp8_cache=True) == [1, 2, 4]
    assert fitting(fp8=True, text_on_host=False, fp8_cache=True) == [1, 2, 5]
    assert fitting(fp8=True, text_on_host=True, fp8_cache=True) == [2, 3, 5]
    with pytest.raises(ConfigError, match="there is no stage 'nose'"):
        process_memory(LARGE, "nose")


def test_sessions_of_a_gpu_with_one_step() -> None:
    """On 79.6 GiB with one remembered avatar, as docs/real_model.md has them."""

    def fitting(fp8: bool, dtype: str | None) -> int:
        return fitting_sessions([denoiser_memory(LARGE.with_kv_cache_dtype(dtype), ONE, fp8)], 79.6, avatars=1)

    assert [fitting(fp8, dtype) for fp8, dtype in ((False, None), (True, None), (True, "fp8"))] == [3, 5, 8]


def bytes_of(preset: Preset, stage: Stage, sessions: int, avatars: int) -> int:
    return session_memory(preset, stage, contracts(preset)).total(sessions, avatars)


def test_the_sessions_of_a_gpu_are_refused_with_the_sum() -> None:
    needed = bytes_of(LARGE, one_step(3), 2, 1)
    require_sessions(LARGE, 2, 1, needed, [one_step(3)])
    message = (
        r"^2 sessions and 1 known avatars of preset s2v-14b need 31\.37 GiB, but 31\.37 GiB are free, enough for 1 "
        r"sessions: a denoising step: keys and values of the current block 2\.42 GiB \+ copies of a history that is "
        r"not full 4\.83 GiB \+ sink that replaces another 2\.40 GiB \+ 2 x ring 7\.25 GiB \+ 2 x sink and text "
        r"2\.40 GiB \+ 1 x sink and text of an avatar 2\.40 GiB = 31\.37 GiB; take fewer sessions "
        r"\(--max-sessions\), fewer known avatars \(--known-avatars\) or more memory\.$"
    )
    with pytest.raises(CapacityError, match=message):
        require_sessions(LARGE, 2, 1, needed - 1, [one_step(3)])


@pytest.mark.slow
def test_a_host_holds_the_sessions_of_all_stages() -> None:
    stages = [CONDITIONING, *map(one_step, ALL), DECODER]
    needed = sum(bytes_of(TINY, stage, 4, 16) for stage in stages)
    require_sessions(TINY, 4, 16, needed)
    require_sessions(TINY, 4, 16, needed, stages, contracts(TINY))
    with pytest.raises(CapacityError) as caught:
        require_sessions(TINY, 4, 16, needed - 1)
    sentence = str(caught.value)
    assert f"need {needed / MIB:.2f} MiB, but {needed / MIB:.2f} MiB are free, enough for 3 sessions: " in sentence
    spelled = [part.partition(": ")[0] for part in sentence.split("sessions: ", 1)[1].split("; ")[:3]]
    assert spelled == ["conditioning", "4 times a denoising step", "the VAE decoder"]


def test_no_room_for_the_avatars_is_room_for_no_session() -> None:
    with pytest.raises(CapacityError, match=r"but 0\.00 KiB are free, enough for 0 sessions"):
        require_sessions(TINY, 1, 16, 0)


@pytest.mark.parametrize(("sessions", "avatars"), [(0, 1), (-3, 1), (1, -1)])
def test_numbers_of_sessions_that_mean_nothing_are_refused(sessions: int, avatars: int) -> None:
    message = rf"^{sessions} sessions and {avatars} known avatars; expected at least 1 session and 0 known avatars\.$"
    with pytest.raises(ConfigError, match=message):
        require_sessions(TINY, sessions, avatars, GIB)


def test_scratch_space_grows_with_the_picture() -> None:
    """The released size has the limits that were measured for it; a smaller picture has them too."""
    assert workspace_bytes(S2V_14B, "vae_decoder") == 5 * GIB // 4
    large = S2V_14B.with_stream(height=2 * S2V_14B.stream.height)
    assert workspace_bytes(large, "vae_decoder") == 5 * GIB // 2
    assert workspace_bytes(large, "speech_encoder") == workspace_bytes(S2V_14B, "speech_encoder")
    assert workspace_bytes(TINY, "vae_decoder") == 5 * GIB // 4
    assert decoder_memory(large).shared["scratch space"] == 2 * decoder_memory(S2V_14B).shared["scratch space"]


def test_a_stage_that_is_none_is_refused() -> None:
    for stage in ("nose", range(4, 6), range(2, 2)):
        message = (
            rf"^there is no stage {re.escape(repr(stage))}; preset tiny has conditioning, denoising steps 1 to 4 and"
        )
        with pytest.raises(ConfigError, match=message):
            require_sessions(TINY, 1, 1, GIB, [stage])


def test_steps_in_one_process_share_all_but_their_rings() -> None:
    one, three = (session_memory(LARGE, steps, contracts(LARGE)) for steps in (range(1, 2), range(2, 5)))
    assert (three.shared, three.per_avatar) == (one.shared, one.per_avatar)
    assert three.per_session == {
        "rings": 3 * one.per_session["ring"],
        "sink and text": one.per_session["sink and text"],
    }


def test_this_machine_has_memory_and_not_more_than_all() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < host_available_bytes() <= int(total.split()[1]) * 1024


def machine(root: Path, groups: str, files: dict[str, str]) -> int:
    """What is available where the kernel says 1000 MiB are, in given control groups."""
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  1024000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "proc/self").mkdir()
    (root / "proc/self/cgroup").write_text(groups)
    return host_available_bytes(root)


def test_without_control_groups_the_kernels_figure_holds(tmp_path: Path) -> None:
    assert machine(tmp_path, "0::/\n", {}) == 1000 * MIB


def test_a_control_group_leaves_less_and_file_pages_are_free(tmp_path: Path) -> None:
    files = {"memory.max": f"{500 * MIB}\n", "memory.current": f"{200 * MIB}\n"}
    files["memory.stat"] = f"anon 1\ninactive_file {50 * MIB}\n"
    placed = {f"sys/fs/cgroup/a/{name}": text for name, text in files.items()}
    assert machine(tmp_path, "0::/a/b\n", placed) == 350 * MIB


def test_a_control_group_without_a_limit_leaves_what_the_kernel_does(tmp_path: Path) -> None:
    files = {"memory.max": "max\n", "memory.current": "5\n", "memory.stat": "inactive_file 0\n"}
    assert machine(tmp_path, "0::/\n", {f"sys/fs/cgroup/{name}": text for name, text in files.items()}) == 1000 * MIB


def test_a_control_group_of_version_1_seen_from_inside_a_container(tmp_path: Path) -> None:
    """Its path is the host's; what is mounted is the container's own group."""
    files = {"memory.limit_in_bytes": f"{300 * MIB}\n", "memory.usage_in_bytes": f"{310 * MIB}\n"}
    files["memory.stat"] = f"inactive_file 0\ntotal_inactive_file {20 * MIB}\n"
    placed = {f"sys/fs/cgroup/memory/{name}": text for name, text in files.items()}
    assert machine(tmp_path, "5:cpu:/x\n4:memory:/pods/7\n0::/\n", placed) == 10 * MIB


def test_a_control_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"memory.max": "1\n", "memory.current": "5\n", "memory.stat": "inactive_file 0\n"}
    assert machine(tmp_path, "0::/\n", {f"sys/fs/cgroup/{name}": text for name, text in files.items()}) == 0
