"""The components as torch modules whose arguments and results stand in the order of their contracts.

Thin: each puts positions, shapes and pixel types around one network of `dit.py`, `vae.py` or `transformers`. What is
exported, and what the torch runtime runs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from live_avatar.config import Preset, StreamConfig
from live_avatar.graphs.contract import contracts, step_name
from live_avatar.model import rope
from live_avatar.model.audio import AudioTokens
from live_avatar.model.dit import KV, CausalDiT, Conditions, Modulation
from live_avatar.model.networks import Networks
from live_avatar.model.schedule import make_schedule


def _pairs(flat: tuple[Tensor, ...]) -> KV:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _flat(kv: KV) -> tuple[Tensor, ...]:
    return tuple(tensor for pair in kv for tensor in pair)


class SpeechEncoder(nn.Module):
    """samples [1, n], normalised -> hidden [K, T, A]: embedding output and every layer's, at 50 Hz."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.speech = networks.speech

    def forward(self, samples: Tensor) -> Tensor:
        return torch.cat(self.speech(samples, output_hidden_states=True).hidden_states)


class AudioTokenizer(nn.Module):
    """states [K, A, 4F] of one block -> audio_local [F, n + 1, C], audio_global [F, C]."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.dit = networks.dit

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.dit.casual_audio_encoder(states)


class TextEncoder(nn.Module):
    """token_ids, token_mask [1, text_len] -> text [text_len, text_dim] with zero rows for padding."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.text = networks.text

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        features = self.text(input_ids=token_ids, attention_mask=token_mask).last_hidden_state[0].float()
        return features * token_mask[0, :, None].to(features.dtype)


class VAEEncoder(nn.Module):
    """frames [1, 3, 4, H, W] and a stream's state (none for the first frame, [1, 3, 1, H, W]) -> latent, new state."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.vae = networks.vae

    def forward(self, frames: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        latent, new_state = self.vae.encode(frames, state or None)
        return (latent, *new_state)


class VAEDecoderFirst(nn.Module):
    """The first latent of a stream -> its state; the frame belongs to the warm-up and is not made."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.vae = networks.vae

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.vae.decode(latents, None)[1])


class VAEDecoder(nn.Module):
    """latents [1, 16, F, h, w] and state -> frames uint8 [4F, H, W, 3] and the new state."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.vae = networks.vae

    def forward(self, latents: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        video, new_state = self.vae.decode(latents, state)
        pixels = ((video[0].clamp(-1, 1) + 1) * 127.5).round()
        return (pixels.permute(1, 2, 3, 0).to(torch.uint8), *new_state)


class Phases(nn.Module):
    """Rotary phases of a geometry: space is constant, time comes in (spec section 4).

    `frames` latent frames are denoised together; those of a block if it is left out.
    """

    block_space: Tensor
    sink_space: Tensor
    motion_time: Tensor

    def __init__(self, stream: StreamConfig, head_dim: int, frames: int | None = None) -> None:
        super().__init__()
        height, width = stream.latent_height, stream.latent_width
        self.tokens = stream.frame_tokens
        frame = rope.frame_grid(height, width, np.zeros(1))
        motion = rope.motion_grid(height, width)
        sink = rope.concatenate(frame, motion)
        for name, value in (
            (
                "block_space",
                np.tile(
                    rope.space_phase(frame.rows, frame.columns, head_dim), (1, frames or stream.frames_per_block, 1)
                ),
            ),
            ("sink_space", rope.space_phase(sink.rows, sink.columns, head_dim)),
            ("motion_time", rope.time_phase(motion.frames, head_dim)),
        ):
            self.register_buffer(name, torch.from_numpy(value), persistent=False)

    def block(self, time: Tensor) -> Tensor:
        """time [2, F, n_t] -> [2, F * S, D/2]."""
        return torch.cat([time.repeat_interleave(self.tokens, dim=1), self.block_space], dim=-1)

    def sink(self, time: Tensor) -> Tensor:
        """time [2, 1, n_t] of the reference -> [2, Nc, D/2]; motion tokens keep their positions (quirk Q8)."""
        reference = time.expand(-1, self.tokens, -1)
        return torch.cat([torch.cat([reference, self.motion_time], dim=1), self.sink_space], dim=-1)


class ConstantModulation(nn.Module):
    """A timestep's modulation as constants."""

    layers: Tensor
    head: Tensor

    def __init__(self, dit: CausalDiT, timestep: float) -> None:
        super().__init__()
        with torch.no_grad():
            value = dit.modulation(timestep)
        self.register_buffer("layers", value.layers, persistent=False)
        self.register_buffer("head", value.head, persistent=False)

    @property
    def value(self) -> Modulation:
        return Modulation(self.layers, self.head)


class DiTPrefill(nn.Module):
    """reference, motion, text -> text and sink keys and values of every layer, sink keys un-rotated."""

    phase: Tensor

    def __init__(self, networks: Networks, preset: Preset) -> None:
        super().__init__()
        self.dit = networks.dit
        head_dim = preset.dit.head_dim
        time = torch.from_numpy(rope.time_phase(np.array([rope.REFERENCE_POSITION]), head_dim))
        self.register_buffer("phase", Phases(preset.stream, head_dim).sink(time), persistent=False)
        self.folded = ConstantModulation(networks.dit, 0.0)

    def forward(self, reference: Tensor, motion: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        text_kv = self.dit.text_kv(text)
        return (
            *_flat(text_kv),
            *_flat(self.dit.prefill(reference, motion, text_kv, self.folded.value, self.phase)),
        )


class DiTStep(nn.Module):
    """One denoising step at its own timestep; see `contract` for the order of the caches."""

    def __init__(self, networks: Networks, preset: Preset, timestep: float) -> None:
        super().__init__()
        self.dit = networks.dit
        self.phases = Phases(preset.stream, preset.dit.head_dim)
        self.folded = ConstantModulation(networks.dit, timestep)

    def forward(
        self,
        latent: Tensor,
        audio_local: Tensor,
        audio_global: Tensor,
        block_phase: Tensor,
        sink_phase: Tensor,
        *kv: Tensor,
    ) -> tuple[Tensor, ...]:
        text, sink, history = (_pairs(part) for part in _thirds(kv))
        audio = AudioTokens(audio_local[None], audio_global[None])
        velocity, written = self.dit(
            latent,
            Conditions(text, sink, history, audio),
            self.folded.value,
            self.phases.block(block_phase),
            self.phases.sink(sink_phase),
        )
        return (velocity, *_flat(written))


def _thirds(kv: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
    size = len(kv) // 3
    return kv[:size], kv[size : 2 * size], kv[2 * size :]


def build_components(preset: Preset, networks: Networks) -> dict[str, nn.Module]:
    """Every component of the preset by its contract's name."""
    schedule = make_schedule(preset.stream)
    encoder = VAEEncoder(networks)
    components: dict[str, nn.Module] = {
        "speech_encoder": SpeechEncoder(networks),
        "audio_tokens": AudioTokenizer(networks),
        "text_encoder": TextEncoder(networks),
        "vae_encoder_first": encoder,
        "vae_encoder": encoder,
        "vae_decoder_first": VAEDecoderFirst(networks),
        "vae_decoder": VAEDecoder(networks),
        "dit_prefill": DiTPrefill(networks, preset),
    }
    for step, timestep in enumerate(schedule.timesteps, start=1):
        components[step_name(step)] = DiTStep(networks, preset, timestep)
    assert components.keys() == contracts(preset).keys()
    return {name: component.eval() for name, component in components.items()}
