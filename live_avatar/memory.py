"""GPU memory of a preset, in bytes, from its sizes alone: what each process holds once, and what each session adds.

For engines (`runtime/tensorrt_runtime.py`): every engine has its own copy of its weights, so a step's process holds
the transformer twice, for the step and for the prefill (of the released model in bfloat16 26 GiB each), unless the
prefill keeps its weights on the host. TensorRT's activation memory is known only to a built engine; here stands the
limit of its scratch space. Knows no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from live_avatar.config import Preset
from live_avatar.contract import Contract, TensorSpec, contracts, step_name
from live_avatar.errors import CapacityError, ConfigError

GIB = 2**30
WORKSPACE_BYTES = 2 * GIB
"""Most scratch space that an engine may take beside its weights and tensors."""
GREATEST = 2  # entry of a symbolic dimension's range
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "uint8": 1}

# Parts of the transformer that a graph does without; its modulation is a constant of the graph.
NOT_IN_STEP = (
    "text_embedding",
    "frame_packer",
    "casual_audio_encoder",
    "time_embedding",
    "time_projection",
    "modulation",
    "cross_attn.k",
    "cross_attn.v",
    "cross_attn.norm_k",
)
NOT_IN_PREFILL = (
    "audio_injector",
    "casual_audio_encoder",
    "cond_encoder",
    "head",
    "time_embedding",
    "time_projection",
    "modulation",
)


@dataclass(frozen=True)
class Memory:
    """One process: bytes that it holds in any case, and bytes that every session adds, by what they are."""

    stage: str
    shared: Mapping[str, int]
    per_session: Mapping[str, int]

    def total(self, sessions: int) -> int:
        return sum(self.shared.values()) + sessions * sum(self.per_session.values())

    def spelled(self, sessions: int) -> str:
        """The sum in GiB, term by term."""
        terms = [f"{name} {size / GIB:.2f}" for name, size in self.shared.items()]
        terms += [f"{sessions} x {name} {size / GIB:.2f}" for name, size in self.per_session.items()]
        return f"{' + '.join(terms)} = {self.total(sessions) / GIB:.2f} GiB"


def step_memory(preset: Preset, prefill_on_host: bool = False, fp8: bool = False) -> Memory:
    """A denoising step with its prefill; with `fp8` their large linears take a byte per weight."""
    agreed = contracts(preset)
    step, prefill = agreed[step_name(1)], agreed["dit_prefill"]
    blocks = _bytes(step.outputs, step)
    ring = _bytes((spec for spec in step.inputs if spec.name.startswith("history")), step)
    sink = _bytes(prefill.outputs, prefill)
    return Memory(
        "a denoising step",
        {
            "weights of the step": _dit_bytes(preset, NOT_IN_STEP, fp8),
            **({} if prefill_on_host else {"weights of the prefill": _dit_bytes(preset, NOT_IN_PREFILL, fp8)}),
            "keys and values of the current block": blocks,
            "copies of a history that is not full": ring - blocks,
            "sink that replaces another": sink,
            "scratch space of two engines": 2 * WORKSPACE_BYTES,
        },
        {"ring": ring, "sink and text": sink},
    )


def decoder_memory(preset: Preset) -> Memory:
    """The VAE's decoder; its state is there twice while it is renewed."""
    decoder = contracts(preset)["vae_decoder"]
    state = _bytes(decoder.outputs, decoder)
    return Memory(
        "the VAE decoder",
        {
            "weights of two engines": 2 * sum(size for _, size in _weights(preset, "vae", "decoder")),
            "state that replaces another": state,
            "scratch space of two engines": 2 * WORKSPACE_BYTES,
        },
        {"state": state},
    )


def require_room(
    preset: Preset, gpu_memory_gib: float, sessions: int, weights_on_host: Collection[str] = (), fp8: bool = False
) -> None:
    """Raises `CapacityError`, with the sum, if a step or the decoder with that many sessions outgrows a GPU.

    Raises `ConfigError` for a memory or a number of sessions that is not positive.
    """
    if not gpu_memory_gib > 0 or sessions < 1:  # so written that NaN is refused
        raise ConfigError(
            f"{sessions} sessions on a GPU of {gpu_memory_gib:g} GiB; expected at least 1 session and more than 0 GiB."
        )
    on_host = "dit_prefill" in weights_on_host
    remedy = "" if on_host else ", or the prefill's weights on the host (--weights-on-host dit_prefill)"
    for memory, more in ((step_memory(preset, on_host, fp8), remedy), (decoder_memory(preset), "")):
        if memory.total(sessions) > gpu_memory_gib * GIB:
            raise CapacityError(
                f"{memory.stage} of preset {preset.name} with {sessions} sessions does not fit {gpu_memory_gib:g} GiB: "
                f"{memory.spelled(sessions)}; take a larger GPU, fewer sessions or 16 bits{more}."
            )


def fitting_on_host(preset: Preset, gpu_memory_gib: float | None, sessions: int, fp8: bool = False) -> tuple[str, ...]:
    """Components whose weights must stay on the host for that many sessions to fit a GPU; none if its size is unknown.

    Raises `CapacityError`, with the sum, if they do not fit in any case.
    """
    if gpu_memory_gib is None or step_memory(preset, fp8=fp8).total(sessions) <= gpu_memory_gib * GIB:
        on_host: tuple[str, ...] = ()
    else:
        on_host = ("dit_prefill",)
    if gpu_memory_gib is not None:
        require_room(preset, gpu_memory_gib, sessions, on_host, fp8)
    return on_host


def _bytes(specs: Iterable[TensorSpec], contract: Contract) -> int:
    """Bytes of the resident tensors among these, at the greatest extents."""
    total = 0
    for spec in specs:
        if spec.resident:
            total += BYTES[spec.dtype] * math.prod(contract.shape(spec, GREATEST))
    return total


def _dit_bytes(preset: Preset, without: Collection[str], fp8: bool) -> int:
    """Weights of the transformer but for some parts, and the modulation of a timestep, which is float32."""
    dit = preset.dit
    modulation = (6 * dit.num_layers + (0 if "head" in without else 2)) * dit.dim * BYTES["float32"]
    shrunk = BYTES[preset.precision] if fp8 else 1
    return modulation + sum(
        size // shrunk if _is_quantised(name) else size for name, size in _weights(preset, "dit", without=without)
    )


def _is_quantised(name: str) -> bool:
    """Whether an FP8 export makes a byte of every number of this weight (`export/fp8.py`)."""
    from live_avatar.lora import TARGET  # here alone: it needs torch

    return name.endswith(".weight") and TARGET.search(name.removesuffix(".weight")) is not None


def _weights(preset: Preset, part: str, only: str = "", without: Collection[str] = ()) -> Iterator[tuple[str, int]]:
    """Names and bytes of a network's parameters."""
    for name, size in _parameters(preset)[part].items():
        if name.startswith(only) and not any(f".{unused}." in f".{name}." for unused in without):
            yield name, size


@cache
def _parameters(preset: Preset) -> Mapping[str, Mapping[str, int]]:
    """Bytes of every parameter of every network."""
    from live_avatar.components import outline  # here alone: reading shapes from a manifest needs no torch

    return {
        part: {name: tensor.numel() * tensor.element_size() for name, tensor in network.named_parameters()}
        for part, network in outline(preset).parts().items()
    }
