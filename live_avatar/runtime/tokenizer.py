"""The tokenizer of an artifacts folder."""

from __future__ import annotations

from live_avatar.graphs.artifacts import Artifacts
from live_avatar.inputs.text import Tokenizer, make_tokenizer


def verified_tokenizer(artifacts: Artifacts) -> Tokenizer:
    """Raises `ArtifactError` if the preset needs a file that is missing, damaged, or not that of the manifest."""
    file = artifacts.tokenizer
    with artifacts.verified([] if file is None else [file.name]):
        return make_tokenizer(artifacts.preset, file)
