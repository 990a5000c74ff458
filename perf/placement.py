"""The processor of each stage and the number of sessions of a hardware profile, from the model repository's files."""

from __future__ import annotations

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from live_avatar.errors import ConfigError
from live_avatar.serving.repository import CHAIN_MODEL, MODEL_REPOSITORY
from live_avatar_client.protocol import MODEL_NAME


def placement(profile: str) -> dict[str, str]:
    """The stages in order, each with its processor: `gpu0`, `gpu1`, ... or `cpu`. Raises `ConfigError` for a profile
    that does not exist."""
    return {stage: _processor(config(stage, profile)) for stage in stages(profile)}


def stages(profile: str) -> list[str]:
    """The models of the profile's ensemble, in order."""
    path = MODEL_REPOSITORY / MODEL_NAME / "configs" / f"{profile}.pbtxt"
    if not path.is_file():
        there = sorted(found.stem for found in path.parent.glob("*.pbtxt"))
        raise ConfigError(f"there is no profile {profile!r}; choose one of {', '.join(there)}.")
    return CHAIN_MODEL.findall(path.read_text())


def session_limit(profile: str) -> int:
    """Sessions that the profile admits; its memory sets the limit."""
    return int(config("conditioning", profile).parameters["max_sessions"].string_value)


def config(stage: str, profile: str) -> model_config_pb2.ModelConfig:
    """A stage's configuration in the profile."""
    path = MODEL_REPOSITORY / stage / "configs" / f"{profile}.pbtxt"
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def _processor(model: model_config_pb2.ModelConfig) -> str:
    gpus = model.instance_group[0].gpus
    return f"gpu{gpus[0]}" if gpus else "cpu"
