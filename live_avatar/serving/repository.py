"""The model repository that Triton loads: the models of one profile, with the limits that the operator has set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from live_avatar.serving.tensors import AVATAR_ENCODER
from live_avatar_client.protocol import MODEL_NAME

MODEL_REPOSITORY = Path(__file__).parents[2] / "model_repository"
CANDIDATES = 4
"""Sequences that a batcher takes per session, so that a new session does not wait for those that were left without an
end."""
IDLE_MARGIN_S = 30.0
AUXILIARY_MODELS: Final = ("rolling_sink", AVATAR_ENCODER)
"""Models that are served in addition to those of the ensemble."""
CHAIN_MODEL = re.compile(r'model_name: "(\w+)"')


def profiles(repository: Path) -> list[str]:
    """Names of the hardware profiles."""
    return sorted(path.stem for path in repository.glob(f"{MODEL_NAME}/configs/*.pbtxt"))


def chain(repository: Path, profile: str) -> list[str]:
    """The models that a profile's ensemble calls, in order."""
    return CHAIN_MODEL.findall((repository / MODEL_NAME / "configs" / f"{profile}.pbtxt").read_text())


@dataclass(frozen=True)
class ProfileModels:
    """The models of one profile in `repository`. A limit of None keeps the value of the profile."""

    repository: Path
    profile: str
    max_sessions: int | None = None
    known_avatars: int | None = None
    idle_seconds: float | None = None

    def config(self, model: str) -> model_config_pb2.ModelConfig:
        """A model's configuration in the profile, with the limits applied."""
        path = self.repository / model / "configs" / f"{self.profile}.pbtxt"
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        limits = {
            "max_sessions": self.max_sessions,
            "known_avatars": self.known_avatars,
            "idle_limit_s": self.idle_seconds,
        }
        for name, value in limits.items():
            if value is not None and name in config.parameters:
                config.parameters[name].string_value = str(value)
        if config.HasField("sequence_batching"):
            batching = config.sequence_batching
            if self.idle_seconds is not None:
                batching.max_sequence_idle_microseconds = round(self.idle_seconds * 1e6)
            if self.max_sessions is not None:
                candidates = max(batching.oldest.max_candidate_sequences, CANDIDATES * self.max_sessions)
                batching.oldest.max_candidate_sequences = candidates
        return config

    def write(self, folder: Path) -> Path:
        """Writes a model repository into `folder`, or what is missing there; returns `folder`."""
        for model in (MODEL_NAME, *AUXILIARY_MODELS, *chain(self.repository, self.profile)):
            place = folder / model
            place.mkdir(parents=True, exist_ok=True)
            config = self.config(model)
            if config.HasField("sequence_batching"):
                # The gateway ends idle sessions; the pipe drops those that a gateway has left behind.
                config.sequence_batching.max_sequence_idle_microseconds += round(IDLE_MARGIN_S * 1e6)
            if not (file := place / "config.pbtxt").exists():
                file.write_text(text_format.MessageToString(config))
            if model == MODEL_NAME:
                place.joinpath("1").mkdir(exist_ok=True)
            elif not (version := place / "1").exists():
                version.symlink_to(self.repository.resolve() / model / "1")
        return folder
