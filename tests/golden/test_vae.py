"""Encoding and streamed decoding (golden `vae`)."""

from __future__ import annotations

from torch import Tensor

from live_avatar.config import TEMPORAL_STRIDE
from live_avatar.model.vae import VAE
from tests.golden.conftest import Golden
from tests.tolerances import PORT


def encode(model: VAE, frames: Tensor) -> Tensor:
    """[1, 3, T, H, W] -> all latents; surplus frames are dropped as the reference drops them."""
    surplus = (frames.shape[2] - 1) % TEMPORAL_STRIDE
    return model.encode(frames[:, :, : frames.shape[2] - surplus], None)[0]


def test_encode(vae_model: VAE, vae: Golden) -> None:
    vae.check("encode/image", encode(vae_model, vae["in/image"]), PORT)
    for count in (5, 73):
        repeated = vae["in/image"].expand(-1, -1, count, -1, -1)
        vae.check(f"encode/image_x{count}", encode(vae_model, repeated), PORT)
        vae.check(f"encode/image_x{count}", vae_model.encode_still(vae["in/image"], 1 + count // 4), PORT)
    vae.check("encode/clip", encode(vae_model, vae["in/clip"]), PORT)


def test_normalisation_constants(vae_model: VAE, vae: Golden) -> None:
    vae.check("mean", vae_model.mean.flatten(), 1e-6)
    vae.check("std", vae_model.std.flatten(), 1e-6)


def test_streamed_decode(vae_model: VAE, vae: Golden) -> None:
    frames, state = vae_model.decode(vae["stream/chunk0_motion/latents"], None)
    vae.check("stream/chunk0_motion/frames", frames.clamp(-1, 1), PORT)
    blocks = sum(key.startswith("stream/block") and key.endswith("latents") for key in vae.keys)
    for block in range(blocks):
        frames, state = vae_model.decode(vae[f"stream/block{block}/latents"], state)
        vae.check(f"stream/block{block}/frames", frames.clamp(-1, 1), PORT)
        if block == 0:
            vae.check("stream/block0/frames_unclamped", frames, PORT)


def test_fresh_stream_of_one_latent(vae_model: VAE, vae: Golden) -> None:
    frames, _ = vae_model.decode(vae["stream_single/latents"], None)
    vae.check("stream_single/frames", frames.clamp(-1, 1), PORT)


def test_slots_are_as_the_reference_counts_them(vae_model: VAE, vae: Golden) -> None:
    _, decoder = vae_model.decode(vae["stream_single/latents"], None)
    assert len(decoder) == int(vae.metadata["decoder_cache_used"])
    _, encoder = vae_model.encode(vae["in/image"], None)
    assert len(encoder) == 24  # spec section 13
