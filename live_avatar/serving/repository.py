"""The model repository that Triton loads, written from a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from live_avatar.errors import ServerError
from live_avatar.serving.models import Kind, beside_the_pipe, ensemble_config, kind_of, model_config
from live_avatar.serving.profiles import Profile
from live_avatar_client.protocol import MODEL_NAME

IDLE_MARGIN_S: Final = 30.0
"""How much longer the pipe keeps an idle session than the gateway, which ends it: for those that a gateway has left
behind."""
HEADER: Final = "# Made by `live-avatar repository --profile {profile}`; change the profile, and make it again.\n"
MODEL_FILE: Final = """\
from live_avatar.serving.triton_model import {code} as TritonPythonModel

__all__ = ["TritonPythonModel"]
"""


def model_file(kind: Kind) -> str:
    """The file `1/model.py` of a model."""
    return MODEL_FILE.format(code=kind.code)


def write_repository(profile: Profile, folder: Path, idle_margin_s: float = 0.0) -> list[str]:
    """Writes a profile's model repository into `folder`, or what is missing there; returns the names of the models,
    each of which has a process.

    idle_margin_s: as in `models.model_config`.
    """
    places = [*profile.chain, *beside_the_pipe(profile)]
    for place in places:
        _write(folder / place.name / "config.pbtxt", _text(model_config(place, profile, idle_margin_s), profile))
        _write(folder / place.name / "1" / "model.py", model_file(kind_of(place)))
    _write(folder / MODEL_NAME / "config.pbtxt", _text(ensemble_config(profile), profile))
    _write(folder / MODEL_NAME / "1" / ".gitkeep", "")  # Triton wants the folder, and git keeps none that is empty
    return [place.name for place in places]


def write_new_repository(profile: Profile, folder: Path) -> None:
    """Writes a profile's model repository into a new folder, for a Triton of one's own. Raises `ServerError` if the
    folder has contents, or cannot be written."""
    try:
        if folder.exists() and any(folder.iterdir()):
            raise ServerError(f"{folder} is not empty; remove it, or choose another --output.")
        write_repository(profile, folder)
    except OSError as error:
        raise ServerError(f"cannot write {folder} ({error.strerror}); choose another --output.") from error


def _text(config: model_config_pb2.ModelConfig, profile: Profile) -> str:
    text = text_format.MessageToString(config, use_short_repeated_primitives=True)
    return HEADER.format(profile=profile.name) + text


def _write(path: Path, text: str) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
