"""Avatars: latents of a picture, features of a prompt, and the cache key of both."""

from __future__ import annotations

import numpy as np
import pytest

from live_avatar.config import MOTION_LATENTS
from live_avatar.pipeline.avatar import AvatarEncoder, avatar_key
from live_avatar.runtime.torch_runtime import TorchRuntime
from tests.support.networks import SMALL


@pytest.fixture(scope="module")
def encoder(small_runtime: TorchRuntime) -> AvatarEncoder:
    return AvatarEncoder(small_runtime)


def test_an_avatar_has_the_steps_inputs(encoder: AvatarEncoder, picture: bytes) -> None:
    avatar = encoder.encode_image(picture, "one")
    h, w = SMALL.stream.latent_height, SMALL.stream.latent_width
    assert avatar.reference.shape == (1, 16, 1, h, w)
    assert avatar.motion.shape == (1, 16, MOTION_LATENTS, h, w)
    assert avatar.text.shape == (SMALL.dit.text_len, SMALL.dit.text_dim)
    assert np.array_equal(avatar.reference, avatar.motion[:, :, :1])
    other = encoder.encode_image(picture, "two")
    assert np.array_equal(other.reference, avatar.reference)
    assert not np.array_equal(other.text, avatar.text)


def test_a_prompt_that_is_no_utf8_makes_an_avatar_all_the_same(encoder: AvatarEncoder, picture: bytes) -> None:
    assert np.isfinite(encoder.encode_image(picture, "half \ud800").text).all()


def test_the_key_of_an_avatar_is_of_its_contents(picture: bytes) -> None:
    keys = {avatar_key(picture, "one"), avatar_key(picture, "two"), avatar_key(picture + b"\0", "one")}
    assert len(keys) == 3
    assert {len(key) for key in keys} == {32}
    assert avatar_key(bytes(picture), "one") in keys
    assert avatar_key(b"a", "b") != avatar_key(b"ab", "")
