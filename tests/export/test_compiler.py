"""NVIDIA's compiler, TensorRT-RTX, builds engines of every graph of the project, which takes no GPU.

What it reads, types, shapes and profiles are thereby right; and where a contract does not allow an attention to fall
apart, it has one fused kernel.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from export.engines import main
from export.synthetic import made_up_calibration
from live_avatar.config import TINY
from live_avatar.errors import ExportError
from live_avatar.exporter.build import export_artifacts
from live_avatar.exporter.engines import EngineOptions, build_engines
from live_avatar.graphs.artifacts import MANIFEST, Artifacts, load_artifacts
from live_avatar.graphs.contract import DIT, contracts
from live_avatar.graphs.engines import FOLDER, Target, read_engines
from live_avatar.graphs.flavours import TENSORRT_RTX
from live_avatar.weights.checkpoint import open_checkpoint
from perf.compiled import measure
from tests.export.conftest import LEAST

VERSION = "1.7.1.116"
SIXTEEN_BITS = LEAST.with_precision("bfloat16")
SMALL = ("audio_tokens", "dit_block_tokens")


def options(*components: str, capabilities: tuple[str, ...] = ("8.9",), rebuild: bool = False) -> EngineOptions:
    return EngineOptions(TENSORRT_RTX, capabilities, components, rebuild=rebuild)


def build(artifacts: Artifacts, chosen: EngineOptions) -> list[str]:
    """What building told of its progress; a GPU is asked for by nobody."""
    told: list[str] = []
    build_engines(artifacts.folder, chosen, told.append, open_device=lambda index: pytest.fail("a GPU was opened"))
    return told


@pytest.fixture
def copied(artifacts: Artifacts, tmp_path: Path) -> Artifacts:
    shutil.copytree(artifacts.folder, tmp_path / "tiny", copy_function=os.link)
    return load_artifacts(tmp_path / "tiny")


def test_engines_for_named_gpus_are_kept_while_they_serve(copied: Artifacts) -> None:
    build(copied, options(*SMALL, capabilities=("8.9", "12.0")))
    record = read_engines(copied)["audio_tokens"]
    assert record.target == Target("tensorrt-rtx", VERSION, ("8.9", "12.0"), None)
    assert record.bytes == (copied.folder / FOLDER / "audio_tokens.plan").stat().st_size > 0
    assert build(copied, options(*SMALL, capabilities=("12.0",))) == [f"{name}: up to date" for name in SMALL]
    (told, _) = build(copied, options("audio_tokens", capabilities=("8.6",)))
    assert told == (
        f"audio_tokens: was built by TensorRT-RTX {VERSION} for compute capability 8.9, 12.0, but this is TensorRT-RTX "
        f"{VERSION} for compute capability 8.6; building with TensorRT-RTX {VERSION} for compute capability 8.6"
    )


def test_the_command_builds_and_keeps(copied: Artifacts) -> None:
    words = ["--artifacts", str(copied.folder), "--target", "tensorrt-rtx", "--compute-capability", "8.9"]
    words += ["--components", "audio_tokens"]
    first, second = (CliRunner().invoke(main, words) for _ in range(2))
    assert (first.exit_code, second.exit_code) == (0, 0), first.output
    assert "audio_tokens: has not been built; building with TensorRT-RTX" in first.output
    assert second.output == "audio_tokens: up to date\n"


def with_fp8(artifacts: Artifacts) -> Artifacts:
    """A folder that says that its transformer is in FP8."""
    path = artifacts.folder / MANIFEST
    manifest = json.loads(path.read_text())
    path.unlink()  # a link to the shared one
    path.write_text(json.dumps({**manifest, "fp8": {"calibrated_on_blocks": 1}}))
    return load_artifacts(artifacts.folder)


def test_fp8_is_refused_for_a_gpu_without_it(copied: Artifacts) -> None:
    message = (
        r"these graphs are in fp8, which GPUs have from compute capability 8.9 on, not 8.6; export without --fp8 for "
        r"that GPU"
    )
    with pytest.raises(ExportError, match=message):
        build(with_fp8(copied), options(capabilities=("8.9", "8.6")))
    assert not (copied.folder / FOLDER).exists()


def change_manifest(artifacts: Artifacts, section: str, **changes: object) -> None:
    path = artifacts.folder / MANIFEST
    manifest = json.loads(path.read_text())
    manifest[section].update(changes)
    path.unlink()  # a link to the shared one
    path.write_text(json.dumps(manifest))


def test_an_fp8_cache_is_refused_for_a_gpu_without_fp8(copied: Artifacts) -> None:
    change_manifest(copied, "preset", kv_cache_dtype="fp8")
    message = (
        r"past keys and values are in fp8, which GPUs have from compute capability 8.9 on, not 8.0; export without "
        r"--kv-cache-dtype for that GPU"
    )
    with pytest.raises(ExportError, match=message):
        build(load_artifacts(copied.folder), options(capabilities=("8.0",)))
    assert not (copied.folder / FOLDER).exists()


def test_without_the_package_the_message_has_the_command(copied: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    message = (
        r"engines cannot be built here: TensorRT-RTX cannot be imported \(.*\); install it with `pip install "
        r"'tensorrt-rtx-cu12>=1.7'`"
    )
    with pytest.raises(ExportError, match=message):
        build(copied, options())


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 1 MB, as on a disk that is full then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_leaves_the_engines_that_were_built(copied: Artifacts) -> None:
    message = (
        r"engines cannot be written \(File too large\); make room or make it writable, and give the same command "
        r"again: the engines that were built are kept"
    )
    with pytest.raises(ExportError, match=message):
        build(copied, options("dit_block_tokens", "audio_tokens"))
    assert read_engines(copied).keys() == {"dit_block_tokens"}
    assert sorted(os.listdir(copied.folder / FOLDER)) == ["dit_block_tokens.plan", "engines.json", "lock"]


def test_ctrl_c_keeps_what_was_built(copied: Artifacts) -> None:
    words = ["-m", "export.engines", "--artifacts", str(copied.folder), "--target", "tensorrt-rtx"]
    words += ["--compute-capability", "8.9", "--components", "dit_block_tokens", "--components", "dit"]
    told = []
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            told.append(line.rstrip())
            if line.startswith("dit: "):
                process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
    assert told[-1] == "interrupted; built and kept: dit_block_tokens; the same command builds the rest"
    assert read_engines(copied).keys() == {"dit_block_tokens"}
    assert sorted(os.listdir(copied.folder / FOLDER)) == ["dit_block_tokens.plan", "engines.json", "lock"]


@pytest.fixture(scope="module")
def compiled(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """The tiny preset in float32, whose folder of engines the tests fill."""
    folder = tmp_path_factory.mktemp("compiled") / "tiny"
    shutil.copytree(artifacts.folder, folder, copy_function=os.link)
    return load_artifacts(folder)


SECONDS = ("speech_encoder", "vae_encoder", "vae_decoder_warm_up", "vae_decoder", "dit")
"""Components whose compilation in float32 takes seconds; those of the smaller preset are compiled in any case."""


@pytest.mark.parametrize(
    "component",
    [pytest.param(name, marks=pytest.mark.slow if name in SECONDS else ()) for name in contracts(TINY)],
)
def test_every_graph_in_float32_compiles(compiled: Artifacts, component: str) -> None:
    build(compiled, options(component))
    assert read_engines(compiled)[component].bytes > 0


@pytest.fixture(scope="module")
def sixteen_bits(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """bfloat16, with the transformer's linears in FP8."""
    folder = tmp_path_factory.mktemp("compiled") / "fp8"
    return export_artifacts(open_checkpoint(SIXTEEN_BITS), folder, lambda line: None, made_up_calibration(SIXTEEN_BITS))


@pytest.mark.parametrize("component", contracts(TINY))
def test_every_graph_in_bfloat16_and_fp8_compiles(sixteen_bits: Artifacts, component: str) -> None:
    build(sixteen_bits, options(component))
    assert read_engines(sixteen_bits)[component].bytes > 0


@pytest.mark.slow
def test_the_transformer_with_an_fp8_cache_has_the_same_fused_attentions(
    sixteen_bits: Artifacts, tmp_path: Path
) -> None:
    """FP8 weights in both; the casts of past keys and values are part of the kernels that join them."""
    preset = SIXTEEN_BITS.with_kv_cache_dtype("fp8")
    cached = export_artifacts(open_checkpoint(preset), tmp_path / "fp8", lambda line: None, made_up_calibration(preset))
    plain, ours = (measure(made.folder, DIT, "8.9") for made in (sixteen_bits, cached))
    assert ours["fused_attentions"] == plain["fused_attentions"] == plain["attentions"] > 0
    assert ours["kernels"] == plain["kernels"]
    assert ours["plan_bytes"] > 0


def test_attention_is_fused_but_where_the_contract_has_a_reason(sixteen_bits: Artifacts, artifacts: Artifacts) -> None:
    reasons = {name: contract.decomposable for name, contract in sixteen_bits.contracts.items()}
    assert {name for name, reason in reasons.items() if reason} == {name for name in reasons if name.startswith("vae_")}
    assert reasons["vae_decoder"] == (
        "one head of 4 channels over one frame: fused kernels take heads of 12 to 256 channels, and at least two heads "
        "or frames"
    )
    assert artifacts.contracts["dit"].decomposable == "there is no fused kernel in float32"


def test_an_attention_that_is_not_fused_is_told_in_the_compilers_words(compiled: Artifacts) -> None:
    strict = replace(compiled.contracts["text_encoder"], decomposable="")
    change_manifest(compiled, "contracts", text_encoder=strict.to_dict())
    message = (
        rf"TensorRT-RTX {VERSION} cannot build text_encoder: .*Attention operation was not supported by a dedicated "
        rf"kernel.*; see whether .*, and for an attention without a fused kernel docs/real_model.md"
    )
    with pytest.raises(ExportError, match=message):
        build(load_artifacts(compiled.folder), options("text_encoder", rebuild=True))
