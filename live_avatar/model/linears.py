"""Which linears of the transformer a LoRA adapts and FP8 quantizes, by their names."""

from __future__ import annotations

import re

LORA_TARGET = re.compile(r"\.(q|k|v|o|ffn\.0|ffn\.2)$")

# Linears that the released code's FP8 mode leaves as they are, by parts of their names.
RELEASE_KEEPS = (
    "text_embedding",
    "time_embedding",
    "time_projection",
    "head.head",
    "casual_audio_encoder.encoder.final_linear",
)


def is_lora_target(linear: str) -> bool:
    """Whether a LoRA adapts the linear of that name, such as `blocks.0.self_attn.q` (spec section 14)."""
    return LORA_TARGET.search(linear) is not None


def is_fp8(linear: str) -> bool:
    """Whether an FP8 export quantizes the linear of that name, such as `blocks.0.ffn.2`.

    These are the targets of a LoRA. The released code also quantizes the AdaLN linears (spec section 15): they compute
    shift and scale of three tokens, so quantizing them saves little, and their error reaches every value of the layer.
    The head, the embeddings, the modulation, the audio encoder and attention itself are not quantized.
    """
    return is_lora_target(linear)


def is_fp8_weight(tensor: str) -> bool:
    """Whether the tensor of that name is the weight of a linear that an FP8 export quantizes."""
    return tensor.endswith(".weight") and is_fp8(tensor.removesuffix(".weight"))


def is_fp8_in_release(linear: str) -> bool:
    """Whether the released code's FP8 mode quantizes the linear of that name."""
    return not any(part in linear for part in RELEASE_KEEPS)
