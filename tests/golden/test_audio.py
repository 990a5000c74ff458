"""Audio encoder with and without prefix, and whole-file bucketing (golden `audio`)."""

from __future__ import annotations

from typing import Any

import torch

from live_avatar.model.dit import CausalDiT
from tests.golden.conftest import Golden
from tests.support.whole_file_features import bucket_features, features_30hz
from tests.tolerances import INTERPOLATED_AUDIO, PORT


def test_encoder_without_prefix(dit: CausalDiT, audio: Golden) -> None:
    local, global_tokens = dit.casual_audio_encoder.encode(audio["encoder2/in/features"][0])
    audio.check("encoder2/out/tokens", local, PORT)
    audio.check("encoder2/out/global", global_tokens, PORT)


def test_encoder_of_a_block(dit: CausalDiT, audio: Golden) -> None:
    states = audio["encoder/in/block_audio"][0]
    local, global_tokens = dit.casual_audio_encoder(states)
    audio.check("encoder/used/tokens", local, PORT)
    audio.check("encoder/used/global", global_tokens, PORT)
    prefixed = torch.cat([states[:, :, :1].expand(-1, -1, 73), states], dim=2)
    local, global_tokens = dit.casual_audio_encoder.encode(prefixed)
    audio.check("encoder/out/tokens", local, PORT)
    audio.check("encoder/out/global", global_tokens, PORT)


def test_bucketing(audio: Golden, golden_config: dict[str, Any]) -> None:
    hidden = audio.array("bucket/in/hidden_states")
    at_30hz = features_30hz(hidden)
    audio.check("bucket/out/features_30fps", at_30hz, INTERPOLATED_AUDIO)
    features, columns, clips = bucket_features(hidden, golden_config["audio"]["infer_frames"])
    audio.check("bucket/out/audio_emb", features, INTERPOLATED_AUDIO)
    audio.check("bucket/out/sample_indices", columns, 0)
    assert clips == int(audio.metadata["num_repeat"])
