"""The components as torch modules whose arguments and results stand in the order of their contracts.

Each is thin: it puts shapes and pixel types around one network of `dit.py`, `vae.py` or `transformers`. They are what
is exported, and what the torch runtime runs.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from live_avatar.config import MOTION_LATENTS, Preset
from live_avatar.graphs.contract import BLOCK_TOKENS, DIT, SINK_TOKENS, TEXT, contracts
from live_avatar.model.audio import AudioTokens
from live_avatar.model.dit import KV, Conditions, Modulation
from live_avatar.model.networks import Networks
from live_avatar.model.streaming import StreamingDecoder


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
    """picture [1, 3, 1, H, W] -> motion [1, 16, 19, h, w]: the latents of that picture held for 73 frames."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.vae = networks.vae

    def forward(self, picture: Tensor) -> Tensor:
        return self.vae.encode_still(picture, MOTION_LATENTS)


class _Decoder(nn.Module):
    """The VAE or the tiny decoder, under the name of its part: so its weights are found."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self._part, network = networks.decoder
        self.add_module(self._part, network)

    @property
    def network(self) -> StreamingDecoder:
        return cast(StreamingDecoder, self.get_submodule(self._part))


class VAEDecoderWarmUp(_Decoder):
    """The first latents of a stream [1, 16, W, h, w] -> its state; their frames are not made."""

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network.warm_up(latents))


class VAEDecoder(_Decoder):
    """latents [1, 16, 1, h, w] and state -> frames uint8 [4, H, W, 3] and the new state."""

    def forward(self, latents: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        video, new_state = self.network.decode(latents, state)
        pixels = ((video[0].clamp(-1, 1) + 1) * 127.5).round()
        return (pixels.permute(1, 2, 3, 0).to(torch.uint8), *new_state)


class BlockTokens(nn.Module):
    """latent [1, 16, F, h, w] of a noisy block -> tokens [F, S, C]."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.dit = networks.dit

    def forward(self, latent: Tensor) -> Tensor:
        return self.dit.noisy_tokens(latent, None)[0].unflatten(0, (latent.shape[2], -1))


class SinkTokens(nn.Module):
    """reference [1, 16, 1, h, w] and motion [1, 16, 19, h, w] -> tokens [1, Nc, C]."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.dit = networks.dit

    def forward(self, reference: Tensor, motion: Tensor) -> Tensor:
        return self.dit.sink_tokens(reference, motion)


class TextKV(nn.Module):
    """text [text_len, text_dim] -> text keys and values of every layer."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.dit = networks.dit

    def forward(self, text: Tensor) -> tuple[Tensor, ...]:
        return _flat(self.dit.text_kv(text))


class DiT(nn.Module):
    """The transformer over the tokens of a block or of a sink; see `contract` for the order of the caches."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.dit = networks.dit

    def forward(
        self,
        tokens: Tensor,
        audio_local: Tensor,
        audio_global: Tensor,
        audio_weight: Tensor,
        modulation: Tensor,
        head_modulation: Tensor,
        phase: Tensor,
        sink_turn: Tensor,
        *kv: Tensor,
    ) -> tuple[Tensor, ...]:
        text, sink, history = _thirds(kv)
        past = tuple(tensor.to(sink[0].dtype) for tensor in history)  # the ring may be in FP8, of scale 1
        audio = AudioTokens(audio_local, audio_global, audio_weight.flatten(1, 2)[..., None])
        patches, written = self.dit(
            tokens.flatten(0, 1)[None],
            Conditions(_pairs(text), _pairs(sink), [_pairs(past)], audio),
            Modulation(modulation, head_modulation),
            phase.flatten(1, 2),
            sink_turn,
        )
        return (patches.view(*tokens.shape[:2], -1), *_flat(written))


def _thirds(kv: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
    size = len(kv) // 3
    return kv[:size], kv[size : 2 * size], kv[2 * size :]


def build_components(preset: Preset, networks: Networks) -> dict[str, nn.Module]:
    """Every component of the preset by its contract's name."""
    components: dict[str, nn.Module] = {
        "speech_encoder": SpeechEncoder(networks),
        "audio_tokens": AudioTokenizer(networks),
        "text_encoder": TextEncoder(networks),
        "vae_encoder": VAEEncoder(networks),
        "vae_decoder_warm_up": VAEDecoderWarmUp(networks),
        "vae_decoder": VAEDecoder(networks),
        BLOCK_TOKENS: BlockTokens(networks),
        SINK_TOKENS: SinkTokens(networks),
        TEXT: TextKV(networks),
        DIT: DiT(networks),
    }
    assert components.keys() == contracts(preset).keys()
    return {name: component.eval() for name, component in components.items()}
