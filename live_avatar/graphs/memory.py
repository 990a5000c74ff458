"""Memory of a preset, in bytes, from its sizes alone: what each process holds once, what each session adds, and what
each avatar that it remembers.

For engines (`runtime/tensorrt_runtime.py`): every engine has its own copy of its weights, so a step's process holds the
transformer twice, for the step and for the prefill (of the released model in bfloat16 26 GiB each), unless the prefill
keeps its weights on the host. TensorRT's activation memory is known only to a built engine; here stands the limit of
its scratch space.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from live_avatar.config import LATENT_CHANNELS, MOTION_LATENTS, Preset
from live_avatar.errors import CapacityError, ConfigError
from live_avatar.graphs.contract import Contract, Extent, GraphTensor, contracts, step_name
from live_avatar.model.linears import is_fp8_weight

KIB, MIB, GIB = 2**10, 2**20, 2**30
WORKSPACE_BYTES = 2 * GIB
"""Most scratch space that an engine may take beside its weights and tensors."""
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "uint8": 1}
SAMPLE_BYTES = 2  # of the speech that conditioning keeps, int16

# Stages by the names of their models in Triton; a denoising stage is the range of its steps, counted from 1.
Stage = str | range
CONDITIONING, DECODER = "conditioning", "vae_decoder"

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


def step_memory(preset: Preset, prefill_on_host: bool = False, fp8: bool = False) -> Memory:
    """A denoising step with its prefill; with `fp8` their large linears take a byte per weight."""
    prefill = {} if prefill_on_host else {"weights of the prefill": _dit_bytes(preset, NOT_IN_PREFILL, fp8)}
    return session_memory(preset, range(1, 2), _contracts(preset)).beside(
        {
            "weights of the step": _dit_bytes(preset, NOT_IN_STEP, fp8),
            **prefill,
            "scratch space of two engines": 2 * WORKSPACE_BYTES,
        }
    )


def decoder_memory(preset: Preset) -> Memory:
    """The VAE's decoder; its state is there twice while it is renewed."""
    return session_memory(preset, DECODER, _contracts(preset)).beside(
        {
            "weights of two engines": 2 * sum(size for _, size in _weights(preset, "vae", "decoder")),
            "scratch space of two engines": 2 * WORKSPACE_BYTES,
        }
    )


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
        return _step_sessions(agreed[step_name(stage[0])], agreed["dit_prefill"], len(stage))
    raise ConfigError(
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
    agreed = agreed or _contracts(preset)
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


def _step_sessions(step: Contract, prefill: Contract, steps: int) -> Memory:
    """So many steps in one process: each has a ring, and they run one after another."""
    blocks = _bytes(step.outputs, step)
    ring = _bytes((spec for spec in step.inputs if spec.name.startswith("history")), step)
    sink = _bytes(prefill.outputs, prefill)
    return Memory(
        "a denoising step" if steps == 1 else f"{steps} denoising steps",
        {
            "keys and values of the current block": blocks,
            "copies of a history that is not full": ring - blocks,
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


def _bytes(specs: Iterable[GraphTensor], contract: Contract) -> int:
    """Bytes of the resident tensors among these, at the largest extents."""
    total = 0
    for spec in specs:
        if spec.resident:
            total += BYTES[spec.dtype] * math.prod(contract.shape(spec, Extent.MAX))
    return total


def _dit_bytes(preset: Preset, without: Collection[str], fp8: bool) -> int:
    """Weights of the transformer but for some parts, and the modulation of a timestep, which is float32."""
    dit = preset.dit
    modulation = (6 * dit.num_layers + (0 if "head" in without else 2)) * dit.dim * BYTES["float32"]
    shrunk = BYTES[preset.precision] if fp8 else 1
    return modulation + sum(
        size // shrunk if is_fp8_weight(name) else size for name, size in _weights(preset, "dit", without=without)
    )


def _weights(preset: Preset, part: str, only: str = "", without: Collection[str] = ()) -> Iterator[tuple[str, int]]:
    """Names and bytes of a network's parameters."""
    for name, size in _parameters(preset)[part].items():
        if name.startswith(only) and not any(f".{unused}." in f".{name}." for unused in without):
            yield name, size


@cache
def _contracts(preset: Preset) -> Mapping[str, Contract]:
    return contracts(preset)


@cache
def _parameters(preset: Preset) -> Mapping[str, Mapping[str, int]]:
    """Bytes of every parameter of every network."""
    from live_avatar.model.networks import meta_networks  # here alone: reading shapes from a manifest needs no torch

    return {
        part: {name: tensor.numel() * tensor.element_size() for name, tensor in network.named_parameters()}
        for part, network in meta_networks(preset).parts().items()
    }
