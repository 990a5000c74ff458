"""Speech features of a block become audio tokens, and audio tokens move the latents (spec section 7).

`AudioEncoder` and `AudioInjector` are networks of the DiT's checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from live_avatar.config import TEMPORAL_STRIDE, DiTConfig
from live_avatar.model.attention import Attention, Linear
from live_avatar.model.casts import in_type

PREFIX_COLUMNS = 1
"""Copies of a block's first column put before it. The released code uses 73 and drops 19 outputs; any
4m + 1 copies with m + 1 dropped outputs give the same tokens, and one is the cheapest."""
ADAIN_EPS = 1e-5


@dataclass(frozen=True)
class AudioTokens:
    """Audio of one block for `n` speakers.

    local: [n, F, num_audio_token + 1, C]; global_tokens: [n, F, C]; weight: how much each speaker moves each token,
    [n, F * S, 1], or None for 1.
    """

    local: Tensor
    global_tokens: Tensor
    weight: Tensor | None = None


class CausalConv1d(nn.Module):
    """Kernel 3, with the first column repeated on the past side."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size=3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """[b, T, in] -> [b, T', out], T' = (T - 1) // stride + 1."""
        x = x.transpose(1, 2)
        x = torch.cat([x[:, :, :1], x[:, :, :1], x], dim=2)
        return self.conv(x).transpose(1, 2)


class MotionEncoder(nn.Module):
    """The convolutions of the audio encoder, shared by local and global tokens."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        quarter = config.dim // 4
        self.groups = config.num_audio_token
        self.eps = config.eps
        self.conv1_local = CausalConv1d(config.audio_dim, quarter * self.groups)
        self.conv1_global = CausalConv1d(config.audio_dim, quarter)
        self.conv2 = CausalConv1d(quarter, config.dim // 2, stride=2)
        self.conv3 = CausalConv1d(config.dim // 2, config.dim, stride=2)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, config.dim))
        self.final_linear = nn.Linear(config.dim, config.dim)

    def _activate(self, x: Tensor) -> Tensor:
        return F.silu(F.layer_norm(x, x.shape[-1:], eps=self.eps))

    def _tail(self, x: Tensor) -> Tensor:
        """[b, T, C/4] -> [b, T', C] at a quarter of the rate."""
        x = self._activate(self.conv2(self._activate(x)))
        return self._activate(self.conv3(x))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[T, A] mixed features -> local [T', groups + 1, C] and global [T', C] tokens."""
        x = features[None]
        local = self.conv1_local(x)[0].unflatten(-1, (self.groups, -1)).transpose(0, 1)  # [groups, T, C/4]
        local = self._tail(local).transpose(0, 1)  # [T', groups, C]
        padding = self.padding_tokens[0].expand(local.shape[0], -1, -1)
        global_tokens = self.final_linear(self._tail(self.conv1_global(x))[0])
        return torch.cat([local, padding], dim=1), global_tokens


class AudioEncoder(nn.Module):
    """Mixes the speech encoder's states and turns a block's columns into tokens per latent frame."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(1, config.audio_states, 1, 1))
        self.encoder = MotionEncoder(config)

    def mix(self, states: Tensor) -> Tensor:
        """[K, A, T] states -> [T, A], weighted by SiLU(weights)."""
        weights = F.silu(self.weights[0])
        return ((weights * states).sum(0) / weights.sum(0)).transpose(0, 1)

    def encode(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[K, A, T] states -> local [T', n + 1, C], global [T', C]; no prefix."""
        return self.encoder(self.mix(states))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[K, A, 4F] columns of one block -> local [F, n + 1, C], global [F, C].

        The context starts afresh in every block, with copies of its first column (quirk Q9, matched).
        """
        prefixed = torch.cat([states[:, :, :1].expand(-1, -1, PREFIX_COLUMNS), states], dim=2)
        dropped = (PREFIX_COLUMNS - 1) // TEMPORAL_STRIDE + 1
        local, global_tokens = self.encode(prefixed)
        return local[dropped:], global_tokens[dropped:]


class AdaIN(nn.Module):
    """LayerNorm whose shift and scale come from the global audio token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = Linear(dim, 2 * dim)

    def forward(self, x: Tensor, global_tokens: Tensor) -> Tensor:
        """x [F, S, C], global_tokens [F, C] -> [F, S, C]."""
        shift, scale = in_type(self.linear(F.silu(global_tokens)), torch.float32)[:, None].chunk(2, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=ADAIN_EPS) * (1 + scale) + shift


class AudioInjector(nn.Module):
    """Cross-attention from the tokens of a latent frame to its audio tokens, after chosen layers."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.index = {layer: i for i, layer in enumerate(config.audio_inject_layers)}
        count = len(self.index)
        self.injector = nn.ModuleList(Attention(config.dim, config.num_heads, config.eps) for _ in range(count))
        self.injector_adain_layers = nn.ModuleList(AdaIN(config.dim) for _ in range(count))

    def _residual(self, injector: int, frames: Tensor, local: Tensor, global_tokens: Tensor) -> Tensor:
        attention = cast(Attention, self.injector[injector])
        normed = cast(AdaIN, self.injector_adain_layers[injector])(frames, global_tokens)
        return attention.across(normed, local)

    def forward(self, layer: int, x: Tensor, audio: AudioTokens) -> Tensor:
        """x [1, F * S, C] -> the same with each speaker's residual added by its weight."""
        if layer not in self.index:
            return x
        latent_frames = audio.global_tokens.shape[1]
        frames = x.view(latent_frames, -1, x.shape[-1])
        for speaker in range(audio.local.shape[0]):
            residual = self._residual(self.index[layer], frames, audio.local[speaker], audio.global_tokens[speaker])
            residual = residual.flatten(0, 1)[None]
            x = x + (residual if audio.weight is None else residual * audio.weight[speaker])
        return x
