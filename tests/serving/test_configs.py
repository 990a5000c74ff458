"""Every `config.pbtxt`, parsed with Triton's own protobuf, against the protocol and against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from live_avatar import config
from live_avatar.inputs import image, text
from live_avatar.pipeline import conditioning
from live_avatar.serving import tensors
from live_avatar.serving.repository import MODEL_REPOSITORY
from live_avatar_client import protocol

MODELS = sorted(path.name for path in MODEL_REPOSITORY.iterdir() if path.is_dir())
# Steps and placement of every profile: the GPU of each step, then that of the encoders and the decoder; None: a CPU.
PROFILES: dict[str, tuple[tuple[int | None, ...], int | None]] = {
    "cpu": ((None, None, None, None), None),
    "cpu-3-steps": ((None, None, None), None),
    "h800x1": ((0, 0, 0, 0), 0),
    "h800x4": ((0, 1, 2), 3),
    "h800x5": ((0, 1, 2, 3), 4),
}
SINK = "rolling_sink"
ENCODER = "avatar_encoder"
AUXILIARY_MODELS = (SINK, ENCODER)


def parsed(model: str, profile: str) -> model_config_pb2.ModelConfig:
    text = (MODEL_REPOSITORY / model / "configs" / f"{profile}.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


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


@pytest.mark.parametrize("profile", PROFILES)
def test_the_models_of_a_profile_have_its_file_and_no_other_model_has(profile: str) -> None:
    """Triton falls back to config.pbtxt in silence where the file is missing."""
    having = {path.parents[1].name for path in MODEL_REPOSITORY.glob(f"*/configs/{profile}.pbtxt")}
    assert having == {protocol.MODEL_NAME, *stages(profile)}
    for model in having:
        config = parsed(model, profile)
        assert config.max_batch_size == 0
        assert config.platform == "ensemble" or config.backend == "python"


def test_there_are_no_files_but_those_of_the_profiles() -> None:
    assert {path.stem for path in MODEL_REPOSITORY.glob("*/configs/*")} == set(PROFILES)
    assert set(MODELS) == {protocol.MODEL_NAME, *stages("cpu")}


@pytest.mark.parametrize("model", MODELS)
def test_the_default_is_the_cpu_profile(model: str) -> None:
    """Triton falls back to config.pbtxt in silence, so it must be one of the profiles."""
    default = MODEL_REPOSITORY / model / "config.pbtxt"
    assert default.read_bytes() == (MODEL_REPOSITORY / model / "configs" / "cpu.pbtxt").read_bytes()


@pytest.mark.parametrize("profile", PROFILES)
def test_the_ensemble_takes_audio_and_an_avatar_and_gives_what_clients_get(profile: str) -> None:
    config = parsed(protocol.MODEL_NAME, profile)
    inputs = {"AUDIO": (protocol.AUDIO.datatype, protocol.AUDIO.dims, False)}
    for name in (tensors.AVATAR_KEY, tensors.PROVENANCE_IN):
        inputs[name] = ("UINT8", (-1,), True)
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
    steps, ends = PROFILES[profile]
    places = [ends, *steps, ends, None, ends]
    models = ["conditioning", *(f"dit_step_{i}" for i in range(1, len(steps) + 1)), "vae_decoder", *AUXILIARY_MODELS]
    assert stages(profile) == models
    for model, gpu in zip(models, places, strict=True):
        [group] = parsed(model, profile).instance_group
        kind = model_config_pb2.ModelInstanceGroup.Kind.Name(group.kind)
        assert (kind, list(group.gpus), group.count) == (
            ("KIND_CPU", [], 1) if gpu is None else ("KIND_GPU", [gpu], 1)
        ), model


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_differ_in_place_and_in_numbers_of_sessions_and_avatars_alone(profile: str) -> None:
    for model in stages(profile):
        ours, cpu = parsed(model, profile), parsed(model, "cpu")
        for one in (ours, cpu):
            one.ClearField("instance_group")
            one.parameters.pop("max_sessions", None)
            one.parameters.pop("known_avatars", None)
        assert ours == cpu, model


@pytest.mark.parametrize("profile", PROFILES)
def test_limits_agree(profile: str) -> None:
    """One idle limit everywhere; candidates far above the sessions, for those that were left without an end."""
    configs = {model: parsed(model, profile) for model in stages(profile)}
    sequences = {model: c.sequence_batching for model, c in configs.items() if c.HasField("sequence_batching")}
    assert list(sequences) == chain(profile)
    idle_s = {s.max_sequence_idle_microseconds / 1e6 for s in sequences.values()}
    assert idle_s == {float(configs[SINK].parameters["idle_limit_s"].string_value)}
    limits = {
        int(c.parameters["max_sessions"].string_value) for c in configs.values() if "max_sessions" in c.parameters
    }
    assert len(limits) == 1
    [sessions] = limits
    assert all(s.oldest.max_candidate_sequences >= 4 * sessions for s in sequences.values())


@pytest.mark.parametrize("model", stages("cpu"))
def test_model_files_only_re_export(model: str) -> None:
    lines = (Path(MODEL_REPOSITORY) / model / "1" / "model.py").read_text().split("\n")
    code = [line for line in lines if line and not line.startswith("__all__")]
    assert len(code) == 1
    assert code[0].startswith("from live_avatar.serving.triton_model import ")
    assert code[0].endswith(" as TritonPythonModel")


def test_core_and_client_state_the_same_numbers() -> None:
    """Neither may import the other, so each has its own; here they meet."""
    assert image.MAX_BYTES == protocol.MAX_IMAGE_BYTES
    assert image.MAX_PIXELS == protocol.MAX_IMAGE_PIXELS
    assert text.MAX_CHARS == protocol.MAX_PROMPT_CHARS
    assert conditioning.MAX_SEED == protocol.MAX_SEED
    assert (config.SAMPLE_RATE_HZ, config.FPS) == (protocol.SAMPLE_RATE_HZ, protocol.FPS)
    for preset in config.PRESETS.values():
        assert preset.stream.block_samples == protocol.BLOCK_SAMPLES
        assert preset.stream.block_frames == protocol.FRAMES_PER_BLOCK
