"""Options of `live-avatar export` that decide before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.synthetic import official_preset, write_checkpoint
from live_avatar.assets import PORTRAIT
from live_avatar.cli.checkpoint_options import chosen_checkpoint
from live_avatar.config import TINY, Preset
from tests.cli.support import assert_refused, invoke


def test_engines_need_tensorrt_and_the_export_says_what_to_do_without(tmp_path: Path) -> None:
    result = invoke("export", "--target", "tensorrt", "--output", tmp_path / "a")
    words = ("engines cannot be built here: TensorRT cannot be imported", "--target onnx --precision bfloat16")
    assert_refused(result, *words, "python -m export.engines")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_a_gpu_is_refused_with_the_sum(tmp_path: Path) -> None:
    result = invoke("export", "--target", "tensorrt", "--gpu-memory-gib", "0.5", "--output", tmp_path / "a")
    assert_refused(result, "of preset tiny with 1 sessions does not fit 0.5 GiB", " = ", "take a larger GPU")


@pytest.mark.parametrize(("option", "value"), [("--gpu-memory-gib", "80"), ("--compute-capability", "8.9")])
def test_options_of_engines_without_engines_are_a_mistake(tmp_path: Path, option: str, value: str) -> None:
    result = invoke("export", option, value, "--output", tmp_path / "a")
    assert_refused(result, f"{option} is for --target tensorrt or tensorrt-rtx; leave it out")


def test_tensorrt_builds_for_no_other_gpu(tmp_path: Path) -> None:
    words = ("--target", "tensorrt", "--compute-capability", "8.9", "--output", tmp_path / "a")
    message = "TensorRT builds for the GPU of this machine, not for compute capability 8.9; leave --compute-capability"
    assert_refused(invoke("export", *words), message, "or give --target tensorrt-rtx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("capability", ["9.0", "8", "sm89", ""])
def test_a_compute_capability_that_the_compiler_lacks_is_refused_before_the_export(
    tmp_path: Path, capability: str
) -> None:
    words = ("--target", "tensorrt-rtx", "--compute-capability", capability, "--output", tmp_path / "a")
    message = f"does not compile for compute capability {capability!r}, only for 7.5, 8.0, 8.6, 8.9, 12.0, 12.1"
    assert_refused(invoke("export", *words), "TensorRT-RTX 1.7.1.116", message, "or build on that GPU")
    assert list(tmp_path.iterdir()) == []


def test_a_precision_that_the_gpu_lacks_is_refused_before_the_export(tmp_path: Path) -> None:
    words = ("--target", "tensorrt-rtx", "--compute-capability", "7.5", "--output", tmp_path / "a")
    message = "these graphs are in bfloat16, which GPUs have from compute capability 8.0 on, not 7.5; export with"
    assert_refused(invoke("export", *words), message)


def test_an_fp8_cache_is_refused_before_the_export_for_a_gpu_without_fp8(tmp_path: Path) -> None:
    words = ("--target", "tensorrt-rtx", "--compute-capability", "8.6", "--output", tmp_path / "a")
    message = (
        "past keys and values are in fp8, which GPUs have from compute capability 8.9 on, not 8.6; export without "
        "--kv-cache-dtype for that GPU"
    )
    assert_refused(invoke("export", "--kv-cache-dtype", "fp8", *words), message)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_type_of_the_cache_names_those_there_are(tmp_path: Path) -> None:
    result = invoke("export", "--kv-cache-dtype", "fp4", "--output", tmp_path / "a")
    assert_refused(
        result, "Invalid value for '--kv-cache-dtype': 'fp4' is not 'fp8'", "see `live-avatar export --help`"
    )


def test_without_a_gpu_its_compute_capability_may_be_named(tmp_path: Path) -> None:
    result = invoke("export", "--target", "tensorrt-rtx", "--output", tmp_path / "a")
    assert_refused(
        result, "engines cannot be built here: GPU 0 does not exist", "Or name the GPU's --compute-capability"
    )


def test_an_alpha_without_an_adapter_is_a_mistake(tmp_path: Path) -> None:
    result = invoke("export", "--lora-alpha", "64", "--output", tmp_path / "a")
    assert_refused(result, "--lora-alpha requires --lora; give the adapter's file")


def test_a_picture_and_a_size_contradict(tmp_path: Path) -> None:
    result = invoke("export", "--like", PORTRAIT, "--height", "96", "--output", tmp_path / "a")
    assert_refused(result, "--like sets height and width; leave --height and --width out")


def test_the_14b_preset_asks_for_its_files(tmp_path: Path) -> None:
    result = invoke("export", "--preset", "s2v-14b", "--output", tmp_path / "a")
    assert_refused(result, "preset s2v-14b needs the official checkpoint", "--checkpoint", "python -m export.synthetic")


def test_a_preset_of_other_sizes_than_the_folder_names_the_size(tmp_path: Path) -> None:
    write_checkpoint(official_preset(TINY, {"layers": 1}), tmp_path / "weights", seed=None)
    words = ("--checkpoint", tmp_path / "weights", "--output", tmp_path / "a")
    result = invoke("export", "--preset", "s2v-14b", *words)
    assert_refused(result, "has dit dim 128, but preset s2v-14b has 5120; leave --preset out")


@pytest.mark.parametrize("speakers", ["0", "5", "two"])
def test_a_picture_has_one_to_four_speakers(tmp_path: Path, speakers: str) -> None:
    result = invoke("export", "--speakers", speakers, "--output", tmp_path / "a")
    assert_refused(result, "Invalid value for '--speakers'", "see `live-avatar export --help`")


def test_speakers_and_the_type_of_the_cache_become_part_of_the_preset() -> None:
    given = {"preset_name": "tiny", "speakers": 3, "width": 192, "kv_cache_dtype": "fp8"}
    others = ("checkpoint", "lora", "lora_alpha", "precision", "height", "like", "lookahead_ms", "sink_update_block")
    unset = dict.fromkeys((*others, "steps", "sigmas"))
    chosen = chosen_checkpoint(**unset, **given, drop_idle_step=False).preset
    assert chosen == TINY.with_stream(speakers=3, width=192).with_kv_cache_dtype("fp8")
    assert Preset.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen
