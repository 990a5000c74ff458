"""Memory of a preset, in bytes, from its sizes alone: what each process holds once, what each session adds, and what
each avatar that it remembers.

For engines (`runtime/tensorrt_runtime.py`): every engine has its own copy of its weights. A process that runs denoising
steps has one transformer for all of them and for the sink. The graphs of a process share their activation memory. Only
a built engine knows its size; here stands the limit of its scratch space.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from live_avatar.config import LATENT_CHANNELS, MOTION_LATENTS, TINY_DECODER, Preset
from live_avatar.errors import CapacityError, ConfigError
from live_avatar.graphs.contract import (
    BLOCK,
    BLOCK_TOKENS,
    BYTES,
    DECODERS,
    DIT,
    SINK,
    SINK_TOKENS,
    TEXT,
    Contract,
    Extent,
    GraphTensor,
    contracts,
)
from live_avatar.model.linears import is_fp8_weight

KIB, MIB, GIB = 2**10, 2**20, 2**30
WORKSPACE_BYTES, SMALL_WORKSPACE_BYTES = 2 * GIB, GIB // 4
"""Most scratch space that an engine may take beside its weights and tensors: the transformer, and small graphs."""
PER_PIXEL_BYTES = {
    DIT: WORKSPACE_BYTES,
    "vae_encoder": 13 * GIB // 4,
    "vae_decoder": 5 * GIB // 4,
    "vae_decoder_warm_up": 9 * GIB // 2,
}
"""At 704x384 TensorRT-RTX 1.7 needs 3.05 GiB for a picture, 1.16 for a latent, and 4.37 for a warm-up."""
WORKSPACE_PIXELS = 704 * 384
"""Pictures for which these limits hold. These components need more for larger ones, in proportion."""
SAMPLE_BYTES = 2  # of the speech that conditioning keeps, int16

# Stages by the names of their models in Triton; a denoising stage is the range of its steps, counted from 1.
Stage = str | range
CONDITIONING, DECODER, ENCODER = "conditioning", "vae_decoder", "avatar_encoder"

SMALL_GRAPHS = (BLOCK_TOKENS, SINK_TOKENS, TEXT)
# Parts of the transformer that its graph does without, and those of them that the small graphs have.
IN_SMALL_GRAPHS = (
    "text_embedding",
    "frame_packer",
    "patch_embedding",
    "cond_encoder",
    "trainable_cond_mask",
    "cross_attn.k",
    "cross_attn.v",
    "cross_attn.norm_k",
)
ELSEWHERE = ("casual_audio_encoder", "time_embedding", "time_projection", "modulation")


def workspace_bytes(preset: Preset, component: str) -> int:
    """Most scratch space of a component's engine."""
    limit = PER_PIXEL_BYTES.get(component)
    if limit is None:
        return SMALL_WORKSPACE_BYTES
    pixels = preset.stream.height * preset.stream.width
    return max(limit, -(-limit * pixels // WORKSPACE_PIXELS))


def readable(size: int) -> str:
    """Bytes in the largest unit that they fill."""
    unit, name = next(((u, n) for u, n in ((GIB, "GiB"), (MIB, "MiB")) if size >= u), (KIB, "KiB"))
    return f"{size / unit:.2f} {name}"


@dataclass(frozen=True)
class Memory:
    """One process: bytes that it holds in any case, that every session adds, and every avatar that it remembers beside
    them, by what they are."""

    stage: str
    shared: Mapping[str, int]
    per_session: Mapping[str, int]
    per_avatar: Mapping[str, int] = field(default_factory=dict)

    def total(self, sessions: int, avatars: int = 0) -> int:
        each = sessions * sum(self.per_session.values()) + avatars * sum(self.per_avatar.values())
        return sum(self.shared.values()) + each

    def spelled(self, sessions: int, avatars: int = 0) -> str:
        """The sum, term by term."""
        terms = [f"{part} {readable(size)}" for part, size in self.shared.items()]
        terms += [f"{sessions} x {part} {readable(size)}" for part, size in self.per_session.items()]
        if avatars:
            terms += [f"{avatars} x {part} of an avatar {readable(size)}" for part, size in self.per_avatar.items()]
        return f"{' + '.join(terms)} = {readable(self.total(sessions, avatars))}"

    def beside(self, loaded: Mapping[str, int]) -> Memory:
        """The same process with what it has loaded."""
        return replace(self, shared={**loaded, **self.shared})


def denoiser_memory(preset: Preset, steps: range, fp8: bool = False) -> Memory:
    """A process that runs denoising steps; with `fp8` their large linears take a byte per weight."""
    small = sum(_fp8_bytes(preset, name, size, fp8) for name, size in _weights(preset, "dit", only=IN_SMALL_GRAPHS))
    without = (*IN_SMALL_GRAPHS, *ELSEWHERE)
    large = sum(_fp8_bytes(preset, name, size, fp8) for name, size in _weights(preset, "dit", without=without))
    return session_memory(preset, steps, contracts(preset)).beside(
        {
            "weights of the transformer": large,
            "weights of text and tokens": small,
            "modulation": (1 + len(steps)) * (6 * preset.dit.num_layers + 2) * preset.dit.dim * BYTES["float32"],
            **_scratch(preset, DIT, *SMALL_GRAPHS),
        }
    )


def _scratch(preset: Preset, *components: str) -> dict[str, int]:
    """That of the graph that needs most: the graphs of a process share it, because they run one after another."""
    return {"scratch space": max(workspace_bytes(preset, component) for component in components)}


def decoder_memory(preset: Preset) -> Memory:
    """The VAE's decoder or the tiny one; its state is there twice while it is renewed."""
    part = "vae" if preset.tae is None else TINY_DECODER
    return session_memory(preset, DECODER, contracts(preset)).beside(
        {
            "weights of two engines": 2 * _part_bytes(preset, part, ("decoder",)),
            **_scratch(preset, *DECODERS),
        }
    )


def conditioning_memory(preset: Preset) -> Memory:
    """The encoders of speech. Its sessions live on the host."""
    return Memory(
        CONDITIONING,
        {
            "weights": _part_bytes(preset, "speech") + _part_bytes(preset, "dit", ("casual_audio_encoder",)),
            **_scratch(preset, "speech_encoder", "audio_tokens"),
        },
        {},
    )


def encoder_memory(preset: Preset, text_on_host: bool = False) -> Memory:
    """The encoders of pictures and prompts; the text encoder's weights may stay on the host."""
    text = 0 if text_on_host else _part_bytes(preset, "text")
    return Memory(
        "the avatar encoder",
        {
            "weights of the text encoder": text,
            "weights of the VAE": _part_bytes(preset, "vae", ("encoder",)),
            **_scratch(preset, "text_encoder", "vae_encoder"),
        },
        {},
    )


def process_memory(preset: Preset, stage: Stage, fp8: bool = False, text_on_host: bool = False) -> Memory:
    """The process of a stage, the avatar encoder included. Raises `ConfigError` for a stage that the preset lacks."""
    if isinstance(stage, range):
        return denoiser_memory(preset, stage, fp8)
    if stage == ENCODER:
        return encoder_memory(preset, text_on_host)
    if stage == CONDITIONING:
        return conditioning_memory(preset)
    if stage == DECODER:
        return decoder_memory(preset)
    raise _no_stage(preset, stage)


def fitting_sessions(processes: Collection[Memory], gpu_memory_gib: float, avatars: int = 1) -> int:
    """Sessions for which a GPU has room with all these processes, each with so many remembered avatars; 0 if it has
    room for none."""
    held = sum(process.total(0, avatars) for process in processes)
    each = sum(process.total(1) - process.total(0) for process in processes)
    return max(0, int((gpu_memory_gib * GIB - held) // each))


def session_memory(preset: Preset, stage: Stage, agreed: Mapping[str, Contract]) -> Memory:
    """What the sessions cost a stage after it has loaded: their states, and the tensors of the request in work.

    A session shares an avatar's memory until it has its own, but may keep that of one no longer remembered, so both are
    counted in full. `agreed` are the preset's contracts; those in a manifest need no torch. Raises `ConfigError` for a
    stage that the preset does not have.
    """
    if stage == CONDITIONING:
        return _conditioning_sessions(preset)
    if stage == DECODER:
        return _decoder_sessions(agreed[DECODER])
    if isinstance(stage, range) and 1 <= stage.start < stage.stop <= preset.stream.steps + 1:
        return _denoiser_sessions(agreed[DIT], agreed[TEXT], len(stage))
    raise _no_stage(preset, stage)


def _no_stage(preset: Preset, stage: Stage) -> ConfigError:
    return ConfigError(
        f"there is no stage {stage!r}; preset {preset.name} has {CONDITIONING}, denoising steps 1 to "
        f"{preset.stream.steps} and {DECODER}."
    )


def require_sessions(
    preset: Preset,
    sessions: int,
    known_avatars: int,
    available_bytes: int,
    stages: Collection[Stage] = (),
    agreed: Mapping[str, Contract] | None = None,
) -> None:
    """Raises `CapacityError`, with the sum, if so many sessions and remembered avatars outgrow a memory.

    `available_bytes` is what that memory has free when the weights are loaded; `stages` are those that live in it (none
    named: all, each step a stage, on one host). `agreed` as in `session_memory`; without it torch works the contracts
    out. Raises `ConfigError` for numbers that mean nothing.
    """
    if sessions < 1 or known_avatars < 0:
        raise ConfigError(
            f"{sessions} sessions and {known_avatars} known avatars; expected at least 1 session and 0 known avatars."
        )
    agreed = agreed or contracts(preset)
    memories = [session_memory(preset, stage, agreed) for stage in stages or _stages(preset)]
    needed = sum(memory.total(sessions, known_avatars) for memory in memories)
    if needed > available_bytes:
        room = available_bytes - sum(memory.total(0, known_avatars) for memory in memories)
        fitting = max(0, room // sum(memory.total(1) - memory.total(0) for memory in memories))
        raise CapacityError(
            f"{sessions} sessions and {known_avatars} known avatars of preset {preset.name} need {readable(needed)}, "
            f"but {readable(available_bytes)} are free, enough for {fitting} sessions: "
            f"{_spelled(memories, sessions, known_avatars)}; take fewer sessions (--max-sessions), fewer known avatars "
            "(--known-avatars) or more memory."
        )


def host_available_bytes(root: Path = Path("/")) -> int:
    """Memory of this machine that this process and its children may still take, in bytes.

    What Linux counts as available, or less if a control group (v1 or v2), its own or one above it, leaves less. `root`
    is where /proc and /sys are found.
    """
    fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return max(0, min([available, *_group_bytes(root)]))


def _stages(preset: Preset) -> list[Stage]:
    return [CONDITIONING, *(range(step, step + 1) for step in range(1, preset.stream.steps + 1)), DECODER]


def _denoiser_sessions(dit: Contract, text: Contract, steps: int) -> Memory:
    """So many steps in one process: each has a ring, and they run one after another."""
    block = _bytes((spec for spec in dit.outputs if spec.resident), dit, BLOCK)
    sink = _bytes((spec for spec in dit.outputs if spec.resident), dit, SINK) + _bytes(text.outputs, text)
    ring = _bytes((spec for spec in dit.inputs if spec.name.startswith("history")), dit, BLOCK)
    ranges = dit.profiles[BLOCK]
    past_blocks = ranges["history_tokens"][Extent.MAX] // ranges["tokens"][Extent.MAX]
    return Memory(
        "a denoising step" if steps == 1 else f"{steps} denoising steps",
        {
            "keys and values of the current block": max(block, sink),
            "copies of a history that is not full": ring - ring // past_blocks,
            "sink that replaces another": sink,
        },
        {"ring" if steps == 1 else "rings": steps * ring, "sink and text": sink},
        {"sink and text": sink},
    )


def _decoder_sessions(decoder: Contract) -> Memory:
    state = _bytes(decoder.outputs, decoder)
    return Memory("the VAE decoder", {"state that replaces another": state}, {"state": state}, {"state": state})


def _conditioning_sessions(preset: Preset) -> Memory:
    """Its graphs keep nothing from call to call; their memory while they run is not counted."""
    stream, dit = preset.stream, preset.dit
    motion = LATENT_CHANNELS * MOTION_LATENTS * stream.latent_height * stream.latent_width
    avatar = {"latents and text": (motion + dit.text_len * dit.text_dim) * BYTES["float32"]}
    speech = SAMPLE_BYTES * stream.speech_window_blocks * stream.block_samples
    return Memory("conditioning", {}, {"speech": speech, **avatar})


def _spelled(memories: Iterable[Memory], sessions: int, avatars: int) -> str:
    """The sums of several stages; equal ones, as those of the steps are, once."""
    counts = Counter((memory.stage, memory.spelled(sessions, avatars)) for memory in memories)
    return "; ".join(
        f"{stage}: {spelled}" if count == 1 else f"{count} times {stage}: {spelled}"
        for (stage, spelled), count in counts.items()
    )


def _group_bytes(root: Path) -> Iterator[int]:
    """What each control group that this process is in leaves free; pages of files that it can drop count as free."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                names = ("memory.max", "memory.current", "inactive_file")
                yield from _left(root / "sys/fs/cgroup", path, *names)
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                yield from _left(root / "sys/fs/cgroup/memory", path, *names)


def _left(mount: Path, group: str, limit: str, usage: str, droppable: str) -> Iterator[int]:
    """From a group to the top; inside a container only the top may be there, and is the container's own."""
    folder = mount / group.lstrip("/")
    for place in (folder, *folder.parents):
        with suppress(OSError, ValueError, KeyError):  # the top has no limit in v2, and "max" is none
            facts = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            used = int((place / usage).read_text()) - int(facts[droppable])
            yield int((place / limit).read_text()) - used
        if place == mount:
            return


def require_room(preset: Preset, gpu_memory_gib: float, sessions: int, fp8: bool = False) -> None:
    """Raises `CapacityError`, with the sum, if a step or the decoder with that many sessions outgrows a GPU.

    Raises `ConfigError` for a memory or a number of sessions that is not positive.
    """
    if not gpu_memory_gib > 0 or sessions < 1:  # so written that NaN is refused
        raise ConfigError(
            f"{sessions} sessions on a GPU of {gpu_memory_gib:g} GiB; expected at least 1 session and more than 0 GiB."
        )
    for memory in (denoiser_memory(preset, range(1, 2), fp8), decoder_memory(preset)):
        if memory.total(sessions) > gpu_memory_gib * GIB:
            raise CapacityError(
                f"{memory.stage} of preset {preset.name} with {sessions} sessions does not fit {gpu_memory_gib:g} GiB: "
                f"{memory.spelled(sessions)}; take a larger GPU, fewer sessions, 16 bits or FP8."
            )


def _bytes(specs: Iterable[GraphTensor], contract: Contract, profile: str | None = None) -> int:
    """Bytes of the resident tensors among these, at the largest extents of a profile."""
    return sum(
        BYTES[spec.dtype] * math.prod(contract.shape(spec, Extent.MAX, profile)) for spec in specs if spec.resident
    )


def _fp8_bytes(preset: Preset, name: str, size: int, fp8: bool) -> int:
    """Bytes of a weight; one per number if FP8 is on and quantizes it."""
    return size // BYTES[preset.precision] if fp8 and is_fp8_weight(name) else size


def _part_bytes(preset: Preset, part: str, only: Collection[str] = ()) -> int:
    return sum(size for _, size in _weights(preset, part, only))


def _weights(
    preset: Preset, network: str, only: Collection[str] = (), without: Collection[str] = ()
) -> Iterator[tuple[str, int]]:
    """Names and bytes of a network's parameters, of all parts or of those named."""

    def has(parts: Collection[str], name: str) -> bool:
        return any(f".{part}." in f".{name}." for part in parts)

    for name, size in _parameters(preset)[network].items():
        if (not only or has(only, name)) and not has(without, name):
            yield name, size


@cache
def _parameters(preset: Preset) -> Mapping[str, Mapping[str, int]]:
    """Bytes of every parameter of every network."""
    from live_avatar.model.networks import meta_networks  # here alone: reading shapes from a manifest needs no torch

    return {
        part: {name: tensor.numel() * tensor.element_size() for name, tensor in network.named_parameters()}
        for part, network in meta_networks(preset).parts().items()
    }
