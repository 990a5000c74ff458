"""The causal video diffusion transformer, with every state passed in and out (spec sections 2 to 6).

`CausalDiT` carries the official parameter names, so an official state dict loads as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from live_avatar.config import PATCH, DiTConfig
from live_avatar.model.attention import Attention, Linear, rotate
from live_avatar.model.audio import AudioEncoder, AudioInjector, AudioTokens
from live_avatar.model.casts import in_type
from live_avatar.model.motion import FramePacker

KV = list[tuple[Tensor, Tensor]]
"""Keys and values of every layer, [1, N, L, D] each."""

NOISY, REFERENCE, MOTION = 0, 1, 2  # rows of `trainable_cond_mask`


@dataclass(frozen=True)
class Modulation:
    """What a timestep adds to the network: `layers` [layers, 6, C] and `head` [2, C], both complete."""

    layers: Tensor
    head: Tensor


@dataclass(frozen=True)
class Conditions:
    """What tokens attend to beside themselves, as keys and values of every layer, and the audio that moves them.

    sink: keys rotated to their positions in the prefill. history: rotated keys of the past blocks, in one or several
    parts. Both may have no tokens (L = 0). audio: None moves nothing.
    """

    text: KV
    sink: KV
    history: Sequence[KV]
    audio: AudioTokens | None = None


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class TransformerBlock(nn.Module):
    """One transformer layer: self-attention, text attention, feed-forward."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))
        self.self_attn = Attention(config.dim, config.num_heads, config.eps)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = Attention(config.dim, config.num_heads, config.eps)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            Linear(config.ffn_dim, config.dim),
        )

    def text_kv(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded text [1, text_len, C] -> this layer's text keys and values."""
        return self.cross_attn.key_value(embedded)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        phase: Tensor,
        text: tuple[Tensor, Tensor],
        past: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [1, L, C], modulation [6, C], phase [2, L, D/2], past: rotated keys and values seen beside x.

        Returns x (float32), and its rotated keys and values in the type of caches.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6)
        attention = self.self_attn
        normed = _modulated(x, shift1, scale1, self.eps)
        value = attention.value(normed)
        key = in_type(rotate(attention.key(normed), phase), value.dtype)
        keys = torch.cat([*(k for k, _ in past), key], dim=2)
        values = torch.cat([*(v for _, v in past), value], dim=2)
        x = x + gate1 * attention(rotate(attention.query(normed), phase), keys, values)
        x = x + self.cross_attn(self.cross_attn.query(self.norm3(x)), *text)
        x = x + gate2 * self.ffn(_modulated(x, shift2, scale2, self.eps))
        return x, (key, value)


class Head(nn.Module):
    """Last norm and projection to the 2x2 patch of every token."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.head = nn.Linear(config.dim, PATCH * PATCH * config.in_dim)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [1, L, C], modulation [2, C] -> [1, L, 4 * 16]."""
        shift, scale = modulation.chunk(2)
        return self.head(_modulated(x, shift, scale, self.eps))


class CausalDiT(nn.Module):
    """The network; sizes from the config, nothing on `self` changes in a call."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, (1, PATCH, PATCH)
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=patch, stride=patch)
        self.cond_encoder = nn.Conv3d(config.cond_dim, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.trainable_cond_mask = nn.Embedding(3, dim)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.casual_audio_encoder = AudioEncoder(config)  # "casual" is the checkpoint's spelling
        self.audio_injector = AudioInjector(config)
        self.frame_packer = FramePacker(dim)

    @property
    def layers(self) -> list[TransformerBlock]:
        """The transformer layers under their own type."""
        return cast(list[TransformerBlock], list(self.blocks))

    def modulation(self, timestep: float) -> Modulation:
        """Modulation of every layer and of the head at one timestep (spec section 3, steps 2, 4, 5)."""
        half = self.config.freq_dim // 2
        angles = timestep * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        feature = torch.cat([angles.cos(), angles.sin()]).to(self.head.modulation)
        embedding = self.time_embedding(feature)
        projected = self.time_projection(embedding).unflatten(0, (6, -1))
        layers = torch.stack([block.modulation[0] + projected for block in self.layers])
        return Modulation(layers, self.head.modulation[0] + embedding)

    def text_kv(self, text: Tensor) -> KV:
        """[text_len, text_dim] features, zero rows for padding -> text keys and values.

        The padding rows go through the embedding and take part unmasked (quirk Q2, matched).
        """
        embedded = self.text_embedding(text)[None]
        return [block.text_kv(embedded) for block in self.layers]

    def noisy_tokens(self, latent: Tensor, pose: Tensor | None) -> Tensor:
        """[1, 16, F, h, w] -> [1, F * S, C]; without pose the pose branch still adds its bias (Q3)."""
        tokens = self.patch_embedding(latent).flatten(2).transpose(1, 2)
        posed = self.cond_encoder.bias if pose is None else self.cond_encoder(pose).flatten(2).transpose(1, 2)
        return tokens + posed + self.trainable_cond_mask.weight[NOISY]

    def sink_tokens(self, reference: Tensor, motion: Tensor) -> Tensor:
        """Reference [1, 16, 1, h, w] and motion [1, 16, n, h, w] latents -> [1, Nc, C]."""
        tokens = self.patch_embedding(reference).flatten(2).transpose(1, 2)
        mask = self.trainable_cond_mask.weight
        return torch.cat([tokens + mask[REFERENCE], self.frame_packer(motion) + mask[MOTION]], dim=1)

    def forward(
        self, tokens: Tensor, conditions: Conditions, modulation: Modulation, phase: Tensor, sink_turn: Tensor
    ) -> tuple[Tensor, KV]:
        """Tokens [1, L, C] of a block or of a sink -> patches [1, L, 4 * 16], and their rotated keys and values.

        phase [2, L, D/2] at the tokens' positions; sink_turn [2, Nc, D/2] rotates the sink's keys from their positions
        in the prefill to the rolled ones.
        """
        x = tokens
        written: KV = []
        for index in range(len(self.blocks)):
            x, key_value = self.layer(index, x, conditions, modulation.layers, phase, sink_turn)
            written.append(key_value)
        return self.head(x, modulation.head), written

    def layer(
        self, index: int, x: Tensor, conditions: Conditions, modulation: Tensor, phase: Tensor, sink_turn: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Layer `index` and the audio injected after it; modulation [layers, 6, C], the rest as in `forward`."""
        sink_key, sink_value = conditions.sink[index]
        past = [*(part[index] for part in conditions.history), (rotate(sink_key, sink_turn), sink_value)]
        x, written = self.layers[index](x, modulation[index], phase, conditions.text[index], past)
        if conditions.audio is not None:
            x = self.audio_injector(index, x, conditions.audio)
        return x, written

    def prefill(self, reference: Tensor, motion: Tensor, text: KV, modulation: Modulation, phase: Tensor) -> KV:
        """Keys and values of the sink in every layer (spec section 6).

        `modulation` is that of timestep 0, `phase` [2, Nc, D/2] has the reference at position 30. The keys come rotated
        by it. The released code rotates them later (quirk Q6), which is the same, because rotations add up.
        """
        nothing = [(key[:, :, :0], value[:, :, :0]) for key, value in text]
        conditions = Conditions(text, nothing, ())
        return self(self.sink_tokens(reference, motion), conditions, modulation, phase, phase[:, :0])[1]

    def denoise(
        self,
        latent: Tensor,
        conditions: Conditions,
        modulation: Modulation,
        phase: Tensor,
        sink_turn: Tensor,
        pose: Tensor | None = None,
    ) -> tuple[Tensor, KV]:
        """Velocity [1, 16, F, h, w] of one noisy block, and the block's rotated keys and values (spec section 3).

        The history holds the past blocks at this same noise level. pose: latents [1, 16, F, h, w], or None for no
        pose video.
        """
        patches, written = self(self.noisy_tokens(latent, pose), conditions, modulation, phase, sink_turn)
        return unpatchify(patches, latent.shape), written


def unpatchify(tokens: Tensor, shape: torch.Size) -> Tensor:
    """[1, F * S, 2 * 2 * 16] with channels fastest -> [1, 16, F, h, w] (spec section 3, step 6)."""
    _, channels, frames, height, width = shape
    grid = tokens.reshape(1, frames, height // PATCH, width // PATCH, PATCH, PATCH, channels)
    return grid.permute(0, 6, 1, 2, 4, 3, 5).reshape(1, channels, frames, height, width)
