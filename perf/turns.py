"""Stages that take turns: a model repository in which some of them share one processor, as on one GPU.

Triton's rate limiter lets a model run only while it holds its resources; a resource of one piece, which several models
ask for, is a processor that they share. Knows the model repository's files; knows no server.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from live_avatar.errors import InputError
from live_avatar.serving.server import MODEL_REPOSITORY

FLAGS = ("--rate-limit=execution_count",)
"""What Triton must be told, or it ignores the resources."""


def taking_turns(stages: Collection[str], profile: str, folder: Path) -> Path:
    """A copy of the model repository in `folder`, whose `stages` share one processor in that profile.

    Raises `InputError` for a stage that the profile does not have.
    """
    repository = folder / "models"
    shutil.copytree(MODEL_REPOSITORY, repository)
    for stage in stages:
        path = repository / stage / "configs" / f"{profile}.pbtxt"
        if not path.is_file():
            raise InputError(f"profile {profile} has no stage {stage!r}; name models of the repository.")
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        for instance in config.instance_group:
            setattr(instance.rate_limiter.resources.add(), "global", True)
            instance.rate_limiter.resources[-1].name = "processor"
            instance.rate_limiter.resources[-1].count = 1
        path.write_text(text_format.MessageToString(config))
    return repository
