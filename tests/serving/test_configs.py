"""Every `config.pbtxt` of a profile, parsed with Triton's own protobuf, against the protocol and against each other."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc.model_config_pb2 import ModelParameter

from live_avatar import config
from live_avatar.inputs import image, masks, text
from live_avatar.pipeline import conditioning
from live_avatar.serving import tensors
from live_avatar.serving.models import model_config
from live_avatar.serving.profiles import load_profile, profile_names
from live_avatar.serving.repository import write_repository
from live_avatar.serving.steps import steps_text
from live_avatar_client import protocol
from tests.cli.support import assert_refused, invoke

PROFILES = profile_names()

SINK = "rolling_sink"
ENCODER = "avatar_encoder"
AUXILIARY_MODELS = (SINK, ENCODER)
COMMITTED = Path(__file__).parents[2] / "model_repository"


@cache
def configs(profile: str) -> dict[str, model_config_pb2.ModelConfig]:
    """The configurations of a profile by model, as Triton reads them."""
    with TemporaryDirectory() as folder:
        write_repository(load_profile(profile), Path(folder))
        return {
            path.parent.name: text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
            for path in Path(folder).glob("*/config.pbtxt")
        }


def parsed(model: str, profile: str) -> model_config_pb2.ModelConfig:
    return configs(profile)[model]


def chain(profile: str) -> list[str]:
    return [step.model_name for step in parsed(protocol.MODEL_NAME, profile).ensemble_scheduling.step]


def stages(profile: str) -> list[str]:
    return [*chain(profile), *AUXILIARY_MODELS]


def signature(specs: object) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """name -> (type as the protocol names it, dims, optional)."""
    made = {}
    for spec in specs:  # type: ignore[attr-defined]
        datatype = model_config_pb2.DataType.Name(spec.data_type).removeprefix("TYPE_")
        optional = bool(getattr(spec, "optional", False))
        made[spec.name] = ({"STRING": "BYTES"}.get(datatype, datatype), tuple(spec.dims), optional)
    return made


def files(folder: Path) -> dict[str, str]:
    """Contents by name, without what Python compiled."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix(): path.read_text() for path in found}


def test_the_committed_repository_is_what_the_cpu_profile_makes(tmp_path: Path) -> None:
    """If it is not: `rm -r model_repository; live-avatar repository --profile cpu --output model_repository`."""
    written = write_repository(load_profile("cpu"), tmp_path)
    assert files(COMMITTED) == files(tmp_path)
    assert sorted(written) == sorted({path.name for path in COMMITTED.iterdir()} - {protocol.MODEL_NAME})


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    write_repository(load_profile("cpu"), tmp_path)
    code = tmp_path / "conditioning" / "1" / "model.py"
    code.write_text("changed")
    (tmp_path / "vae_decoder" / "config.pbtxt").unlink()
    write_repository(load_profile("cpu"), tmp_path)
    assert code.read_text() == "changed"
    assert (tmp_path / "vae_decoder" / "config.pbtxt").is_file()


def test_a_new_repository_takes_no_folder_with_contents(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    result = invoke("repository", "--profile", "gpux2", "--output", folder)
    assert (result.exit_code, result.stdout) == (0, f"Wrote {folder} (profile gpux2).\n")
    assert {path.name for path in folder.iterdir()} == {protocol.MODEL_NAME, *stages("gpux2")}
    again = invoke("repository", "--profile", "gpux2", "--output", folder)
    assert_refused(again, f"{folder} is not empty; remove it, or choose another --output.")
    file = folder / protocol.MODEL_NAME / "config.pbtxt"
    assert_refused(
        invoke("repository", "--profile", "cpu", "--output", file),
        f"cannot write {file} (Not a directory); choose another --output.",
    )


def test_a_server_keeps_sequences_longer_than_its_gateway_keeps_sessions() -> None:
    profile = load_profile("cpu").limited(max_sessions=500, idle_seconds=5)
    config = model_config(profile.chain[1], profile, idle_margin_s=30)
    assert config.sequence_batching.max_sequence_idle_microseconds == 35_000_000
    assert config.sequence_batching.oldest.max_candidate_sequences == 2000
    assert config.parameters["max_sessions"].string_value == "500"


@pytest.mark.parametrize("profile", PROFILES)
def test_the_ensemble_takes_audio_and_an_avatar_and_gives_what_clients_get(profile: str) -> None:
    config = parsed(protocol.MODEL_NAME, profile)
    inputs = {"AUDIO": (protocol.AUDIO.datatype, protocol.AUDIO.dims, False)}
    for name in (tensors.AVATAR_KEY, tensors.PROVENANCE_IN):
        inputs[name] = ("UINT8", (-1,), True)
    inputs[tensors.SPEAKER_WEIGHTS] = ("FP32", (-1, -1), True)
    for name, (datatype, dims, _) in signature(parsed(ENCODER, profile).output).items():
        inputs[name] = (datatype, dims, True)
    assert signature(config.input) == inputs
    assert signature(config.output) == {t.name: (t.datatype, t.dims, t.optional) for t in protocol.OUTPUTS}


@pytest.mark.parametrize("profile", PROFILES)
def test_the_wiring_connects_tensors_of_one_type(profile: str) -> None:
    ensemble = parsed(protocol.MODEL_NAME, profile)
    known = signature(ensemble.input)
    for step in ensemble.ensemble_scheduling.step:
        model = parsed(step.model_name, profile)
        inputs, outputs = signature(model.input), signature(model.output)
        assert set(step.input_map) == set(inputs), f"{step.model_name}: inputs left unconnected"
        for name, tensor in step.input_map.items():
            assert known[tensor] == inputs[name], f"{step.model_name}.{name} from {tensor}"
        known |= {tensor: outputs[name] for name, tensor in step.output_map.items()}
    for name, spec in signature(ensemble.output).items():
        assert known[name] == spec


@pytest.mark.parametrize("profile", PROFILES)
def test_every_model_stands_in_its_place(profile: str) -> None:
    chosen = load_profile(profile)
    places = {place.name: place for place in chosen.chain}
    gpus = {name: place.gpu for name, place in places.items()} | {SINK: None, ENCODER: chosen.encoder_gpu}
    assert stages(profile) == list(gpus)
    for model, gpu in gpus.items():
        config = parsed(model, profile)
        [group] = config.instance_group
        kind = model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind)
        assert (kind, list(group.gpus), group.count) == (
            ("KIND_CPU", [], 1) if gpu is None else ("KIND_GPU", [gpu], 1)
        ), model
        assert (config.backend, config.max_batch_size) == ("python", 0)
        steps = places[model].steps if model in places else None
        assert dict(config.parameters).get("steps") == (steps and ModelParameter(string_value=steps_text(steps)))


@pytest.mark.parametrize("profile", PROFILES)
def test_limits_agree(profile: str) -> None:
    """One idle limit everywhere; candidates far above the sessions, for those that were left without an end."""
    models = {model: parsed(model, profile) for model in stages(profile)}
    sequences = {model: c.sequence_batching for model, c in models.items() if c.HasField("sequence_batching")}
    assert list(sequences) == chain(profile)
    idle_s = {s.max_sequence_idle_microseconds / 1e6 for s in sequences.values()}
    assert idle_s == {float(models[SINK].parameters["idle_limit_s"].string_value)}
    limits = {int(c.parameters["max_sessions"].string_value) for c in models.values() if "max_sessions" in c.parameters}
    assert len(limits) == 1
    [sessions] = limits
    assert all(s.oldest.max_candidate_sequences >= 4 * sessions for s in sequences.values())


@pytest.mark.parametrize("model", stages("cpu"))
def test_model_files_only_re_export(model: str) -> None:
    lines = (COMMITTED / model / "1" / "model.py").read_text().split("\n")
    code = [line for line in lines if line and not line.startswith("__all__")]
    assert len(code) == 1
    assert code[0].startswith("from live_avatar.serving.triton_model import ")
    assert code[0].endswith(" as TritonPythonModel")


def test_core_and_client_state_the_same_numbers() -> None:
    """Neither may import the other, so each has its own; here they meet."""
    assert image.MAX_BYTES == protocol.MAX_IMAGE_BYTES
    assert masks.MAX_MASK_BYTES == protocol.MAX_MASK_BYTES
    assert image.MAX_PIXELS == protocol.MAX_IMAGE_PIXELS
    assert text.MAX_CHARS == protocol.MAX_PROMPT_CHARS
    assert conditioning.MAX_SEED == protocol.MAX_SEED
    assert (config.SAMPLE_RATE_HZ, config.FPS) == (protocol.SAMPLE_RATE_HZ, protocol.FPS)
    for preset in config.PRESETS.values():
        assert preset.stream.block_samples == protocol.BLOCK_SAMPLES
        assert preset.stream.block_frames == protocol.FRAMES_PER_BLOCK
