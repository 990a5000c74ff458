"""The networks of a preset as torch modules, on the meta device until weights replace their parameters.

Limits: reads no files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from live_avatar.config import NETWORK_NAMES, TINY_DECODER, Preset, SpeechEncoderConfig, TextEncoderConfig
from live_avatar.model.attention import Linear, attend
from live_avatar.model.casts import in_type
from live_avatar.model.dit import CausalDiT
from live_avatar.model.tae import TAE
from live_avatar.model.vae import VAE


@dataclass(frozen=True)
class Networks:
    """The networks of a preset, with their weights. tae: the tiny decoder, if the preset has it."""

    dit: CausalDiT
    vae: VAE
    speech: nn.Module
    text: nn.Module
    tae: TAE | None = None

    def parts(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {name: getattr(self, name) for name in NETWORK_NAMES}
        return parts if self.tae is None else {**parts, TINY_DECODER: self.tae}

    @property
    def decoder(self) -> tuple[str, VAE | TAE]:
        """What makes frames of latents, and the name of its part."""
        return ("vae", self.vae) if self.tae is None else (TINY_DECODER, self.tae)


def speech_network(config: SpeechEncoderConfig, attention: torch.dtype = torch.float32) -> nn.Module:
    """The wav2vec2 encoder of `transformers`, in the variant of xlsr-53 (layer norms everywhere, stable order).

    attention: type of queries, keys and values; everything else is float32.
    """
    from transformers import AttentionInterface, Wav2Vec2Config, Wav2Vec2Model

    def attention_in_type(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, dropout: float = 0.0, **unused: object
    ) -> tuple[Tensor, None]:
        """[B, N, L, D] each -> [B, L, N, D] float32. `transformers` makes a mask that allows everything for its own
        functions, with which TensorRT finds no fused kernel; for this one it makes none."""
        return in_type(attend(query, key, in_type(value, attention), dropout).transpose(1, 2), torch.float32), None

    name = f"live_avatar_{attention}".replace(".", "_")
    AttentionInterface.register(name, attention_in_type)
    settings = Wav2Vec2Config(
        **asdict(config),
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
        apply_spec_augment=False,
        layerdrop=0.0,
    )
    settings._attn_implementation = name
    return Wav2Vec2Model(settings).eval()


def text_network(config: TextEncoderConfig) -> nn.Module:
    """The UMT5 encoder of `transformers`."""
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {name: value for name, value in asdict(config).items() if name != "tokenizer"}
    return UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu", use_cache=False)).eval()


def meta_dit(preset: Preset) -> CausalDiT:
    """The transformer alone, of the preset's sizes and types on the meta device."""
    with torch.device("meta"):
        dit = CausalDiT(preset.dit)
    for module in dit.modules():
        if isinstance(module, Linear):
            module.to(getattr(torch, preset.precision))
    return dit


def meta_networks(preset: Preset) -> Networks:
    """Networks of the preset's sizes and types on torch's meta device: no weights, and no memory for them."""
    # Of the types with fused attention, float16 is nearer to float32; the normalised speech is far from its limits.
    heard = torch.float32 if preset.precision == "float32" else torch.float16
    with torch.device("meta"):
        networks = Networks(
            meta_dit(preset).eval(),
            VAE(preset.vae).eval(),
            speech_network(preset.speech, heard),
            text_network(preset.text),
            None if preset.tae is None else TAE(preset.tae).eval(),
        )
    networks.speech.to("meta")  # transformers makes `masked_spec_embed` on the CPU whatever the device
    large = getattr(torch, preset.precision)
    for network in (networks.vae, networks.tae):
        for parameter in () if network is None else network.parameters():
            parameter.data = parameter.data.to(large)
    if preset.precision != "float16":  # UMT5's activations leave the range of float16
        networks.text.to(large)
    return networks


def replace_parameters(module: nn.Module, made: Callable[[str, Tensor], Tensor]) -> None:
    """Puts `made(name, parameter)` in the place of every parameter; tied ones stay tied, under their first name."""
    new = {
        id(parameter): nn.Parameter(made(name, parameter), requires_grad=False)
        for name, parameter in module.named_parameters()
    }
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = new[id(parameter)]
