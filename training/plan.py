"""Memory and time of a run of adapters before it is started: `python -m training.plan --config C --gpus 8`.

The plan makes the passes of a training step on tensors without memory (torch's meta device), at the sizes of the
configuration. It counts the bytes that are alive and the operations, so the code that trains is also the model of it.
The last line is the plan as JSON. A run that does not fit is refused with the sum.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from live_avatar.config import MOTION_LATENTS, Preset
from live_avatar.errors import ConfigError
from live_avatar.model.dit import CausalDiT
from training import stage1, stage2
from training.accumulation import backward_by_blocks
from training.command import FILE, Number, reported
from training.config import AdapterConfig, DistillationStage, DiTStage, load
from training.dmd import Scores
from training.encoded import EncodedClip
from training.errors import TrainingError
from training.lora import GENERATOR
from training.matching import Sample
from training.memory import LiveBytes
from training.roles import FAKE, Role, SharedBase, empty_base
from training.rollout import Roller, Rollout, RolloutInput
from training.stage1 import ForcingLoss
from training.stage2 import make_roller
from training.teacher import score_loss
from training.window import Place, Window, part

GIB = 2**30
META = torch.device("meta")
NAMES = {stage1.NAME: (GENERATOR,), stage2.NAME: (GENERATOR, FAKE)}
"""Adapters of the stages."""
SHALLOW = 4  # layers that are all run
PLACE = Place(1, 30)
LEVEL = 0.5  # any: it changes no size
GROUPS_AT_ONCE = 2  # a layer in use, and the one that is gathered meanwhile
RESERVE_GIB = 6.0
"""What a plan leaves free by default, for CUDA's context, NCCL and the allocator's gaps; an assumption."""
PEAK_TFLOPS = 989.0
"""Dense bfloat16 of an H100 or H800 (NVIDIA's data sheet)."""
UTILISATION = 0.4
"""Share of the peak that is reached; an assumption."""
PAPER_GPU_DAYS = 500.0
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: what it holds between steps, and the most that a step adds.

    base: its part of the frozen base. adapters, moments, average: its parts of them. gradients: of the adapter that is
    updated. gathered: whole layers in use. activations: everything else in the pass that needs most.
    """

    base: int
    adapters: int
    moments: int
    average: int
    gradients: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class StagePlan:
    """A stage: its memory, the pass that needs most, and operations of one step for one clip."""

    stage: str
    memory: Memory
    fullest_pass: str
    clip_flops: int
    gpu_days: float


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Inside, attention is fused, so its scores are never in memory; on the meta device torch would not fuse it."""
    torchs = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        made: Tensor = FLASH(query, key, value, 0.0, False, scale=1.0)[0]
        return made

    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = torchs


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of everything that runs while it is open, by torch's own formulas.

    torch's `FlopCounterMode` keeps tensors alive, which the count of live bytes would see.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is FLASH:
            self.count += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        elif packet is FLASH_BACKWARD:
            self.count += sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
        elif packet in flop_registry:
            self.count += flop_registry[packet](*args, **(kwargs or {}), out_val=made)
        return made


@dataclass(frozen=True)
class Counts:
    """The most live bytes and the operations of each pass."""

    bytes: dict[str, int]
    flops: dict[str, int]


class Passes:
    """Makes passes without values, and counts each.

    Gradients of parameters are freed as they come, and counted apart.
    """

    def __init__(self, network: nn.Module) -> None:
        self.counts = Counts({}, {})
        self._live = LiveBytes()
        self._live.leave_out(network.parameters())
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_free)

    @contextmanager
    def counted(self) -> Iterator[None]:
        with _fused_attention(), self._live:
            yield

    def make(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of a pass, which is counted under its name."""
        self._live.restart()
        with Operations() as operations:
            made = work()
        self.counts.bytes[name] = self._live.peak
        self.counts.flops[name] = operations.count
        return made


def _free(parameter: Tensor) -> None:
    parameter.grad = None


def _clip(system: Preset, blocks: int) -> EncodedClip:
    stream, dit = system.stream, system.dit
    grid = (stream.latent_height, stream.latent_width)
    empty = partial(torch.empty, device=META)
    states = empty(blocks, dit.audio_states, dit.audio_dim, stream.block_frames)
    motion = empty(1, 16, MOTION_LATENTS, *grid)
    latents = empty(1, 16, blocks * stream.frames_per_block, *grid)
    return EncodedClip(motion[:, :, :1], motion, empty(dit.text_len, dit.text_dim), states, states, latents)


def _forcing(system: Preset, settings: DiTStage, base: SharedBase) -> Counts:
    """The passes of stage 1."""
    window = Window(system, settings.blocks, META)
    loss = ForcingLoss(window, torch.ones(1, 1, 1, 1, 1, device=META), settings.far_share)
    draw = torch.Generator().manual_seed(0)
    sample = Sample(part(_clip(system, settings.blocks), 0, settings.blocks), 0, _always())
    dit = base.role(GENERATOR)
    passes = Passes(base.network)
    with passes.counted():
        passes.make("window", lambda: dit(partial(loss, sample=sample, draw=draw, spoken=True)).backward())
    return passes.counts


def _always() -> torch.Generator:
    """Draws of which the first is below a half, so the sink is replaced."""
    draw = torch.Generator()
    seed = next(seed for seed in range(100) if torch.rand((), generator=draw.manual_seed(seed)).item() < 0.5)
    return draw.manual_seed(seed)


def _distilling(config: AdapterConfig, system: Preset, base: SharedBase) -> Counts:
    """The passes of stage 2, with the longest rollout, and one of the shortest for its operations."""
    settings = config.stage2
    roller = make_roller(system, settings)
    window = Window(system, settings.blocks, META, settings.rolls)
    roller = Roller(window, roller.rules)
    dit, real, fake = base.role(GENERATOR), base.role(None), base.role(FAKE)
    draw = torch.Generator().manual_seed(0)
    passes = Passes(base.network)
    clip = part(_clip(system, settings.blocks), 0, settings.blocks)
    given = RolloutInput(clip, PLACE, window.noise(draw), roller.steps - 1, replaces=True)
    with passes.counted():
        first = replace(given, exit_step=0)
        passes.make("short rollout", lambda: dit(lambda network: roller.roll_out(network, first, draw)))
        made = passes.make("rollout", lambda: dit(lambda network: roller.roll_out(network, given, draw)))
        passes.make("fake score", lambda: _fake_score(fake, window, given, made))
        scores = Scores(window, real, fake, settings.guidance)
        noise = window.noise(draw)
        slope = passes.make("scores", lambda: scores.gradient(clip, PLACE, made.latents, noise, LEVEL))
        passes.make("generator", lambda: _generator(settings.accumulate, roller, dit, given, made, slope))
    return passes.counts


def _fake_score(fake: Role, window: Window, given: RolloutInput, made: Rollout) -> None:
    weight, noise = torch.ones(1, 1, 1, 1, 1, device=META), torch.empty_like(made.latents)

    def loss(network: CausalDiT) -> Tensor:
        scene = window.open(network, given.clip)
        return score_loss(network, window, scene, given.place, made.latents, noise, LEVEL, weight)

    fake(loss).backward()


def _generator(accumulate: bool, roller: Roller, dit: Role, given: RolloutInput, made: Rollout, slope: Tensor) -> None:
    if accumulate:
        backward_by_blocks(roller, dit, given, made, slope)
        return
    kept = dit(lambda network: roller.roll_out(network, given, torch.Generator(), gradient=True))
    kept.latents.backward(slope)


def _bytes(parameters: Iterator[Tensor] | list[Tensor]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def _held(base: SharedBase, names: tuple[str, ...], shards: int, averages: bool) -> dict[str, int]:
    """Bytes of a process between steps, and of gradients and gathered layers."""
    network = base.network
    apart = _bytes([layer.modulation for layer in network.layers])
    frozen = _bytes([one for one in network.parameters() if not one.requires_grad]) - apart
    adapters = [_bytes(list(base.role(name).module.parameters())) for name in names]
    injector = network.audio_injector
    groups = [*network.layers, *injector.injector, *injector.injector_adain_layers, network.text_embedding]
    groups += [network.time_embedding, network.time_projection, network.casual_audio_encoder, network.frame_packer]
    largest = sorted((_bytes(list(group.parameters())) for group in groups), reverse=True)
    return {
        "base": -(-frozen // shards) + apart,
        "adapters": -(-sum(adapters) // shards),
        "moments": 2 * -(-sum(adapters) // shards),
        "average": -(-sum(adapters) // shards) if averages else 0,
        "gradients": -(-max(adapters) // shards),
        "gathered": sum(largest[:GROUPS_AT_ONCE]) if shards > 1 else 0,
    }


def make_plan(config: AdapterConfig, name: str, gpus: int, tflops: float, utilisation: float) -> StagePlan:
    """The plan of stage `name` on so many GPUs. Raises `ConfigError` for a number that does not fit."""
    settings: DiTStage = getattr(config, name)
    if settings.batch % gpus:
        raise ConfigError(
            f"a batch of {settings.batch} clips cannot be split evenly among {gpus} processes; make {name}.batch a "
            "multiple of them."
        )
    shards = config.shard_ranks or gpus
    if gpus % shards:
        raise ConfigError(
            f"{gpus} processes cannot be split evenly into groups of {shards}, which share one copy of the base; set "
            "shard_ranks to a divisor of their number."
        )
    system = config.system
    counts = _counts(config, system, name)
    flops = counts.flops["window"] if name == stage1.NAME else _distillation_flops(counts.flops, config.stage2)
    fullest = max(counts.bytes, key=counts.bytes.__getitem__)
    names = NAMES[name]
    held = _held(empty_base(config, system, names), names, shards, settings.ema > 0)
    seconds = flops * settings.batch * settings.steps / (tflops * 1e12 * utilisation)
    return StagePlan(name, Memory(**held, activations=counts.bytes[fullest]), fullest, flops, seconds / 86_400)


def _counts(config: AdapterConfig, system: Preset, name: str) -> Counts:
    """Of all passes. Both counts are linear in the layers and in the injectors, so a deep network is not run whole."""

    def of(layers: int, injectors: tuple[int, ...]) -> Counts:
        dit = replace(system.dit, num_layers=layers, audio_inject_layers=injectors)
        cut = replace(system, dit=dit)
        base = empty_base(config, cut, NAMES[name])
        if name == stage1.NAME:
            return _forcing(cut, config.stage1, base)
        return _distilling(config, cut, base)

    layers, injectors = system.dit.num_layers, len(system.dit.audio_inject_layers)
    if layers <= SHALLOW or injectors < 2:
        return of(layers, system.dit.audio_inject_layers)
    least, deeper, more = of(2, (1,)), of(3, (2,)), of(3, (0, 2))

    def extended(part: str) -> dict[str, int]:
        one, two, three = (getattr(counts, part) for counts in (least, deeper, more))
        return {
            key: one[key] + (layers - 2) * (two[key] - one[key]) + (injectors - 1) * (three[key] - two[key])
            for key in one
        }

    return Counts(extended("bytes"), extended("flops"))


def _distillation_flops(flops: Mapping[str, int], settings: DistillationStage) -> int:
    """Of a step for one clip; exit steps have equal probability, so the mean rollout is between the extremes."""
    rollout = (flops["short rollout"] + flops["rollout"]) // 2
    return settings.fake_steps * (rollout + flops["fake score"]) + flops["scores"] + flops["generator"]


def table(plans: list[StagePlan]) -> str:
    """Markdown: a column for every stage."""
    lines = [f"| GiB per GPU | {' | '.join(plan.stage for plan in plans)} |", "|---" * (1 + len(plans)) + "|"]
    for key in asdict(plans[0].memory):
        lines.append(f"| {key} | {' | '.join(f'{asdict(plan.memory)[key] / GIB:.2f}' for plan in plans)} |")
    lines.append(f"| **sum** | {' | '.join(f'{plan.memory.total / GIB:.2f}' for plan in plans)} |")
    lines.append(f"| fullest pass | {' | '.join(plan.fullest_pass for plan in plans)} |")
    lines.append(f"| PFLOP of a step, one clip | {' | '.join(f'{plan.clip_flops / 1e15:.2f}' for plan in plans)} |")
    lines.append(f"| GPU days | {' | '.join(f'{plan.gpu_days:.1f}' for plan in plans)} |")
    return "\n".join(lines)


def check_fit(plan: StagePlan, gpu_bytes: int, reserve: int) -> None:
    """Raises `TrainingError` with the sum if a stage does not fit."""
    if plan.memory.total + reserve <= gpu_bytes:
        return
    parts = " + ".join(f"{key} {value / GIB:.1f}" for key, value in {**asdict(plan.memory), "reserve": reserve}.items())
    raise TrainingError(
        f"{plan.stage} needs {(plan.memory.total + reserve) / GIB:.1f} GiB on each GPU, which has "
        f"{gpu_bytes / GIB:.1f}: {parts} (the fullest pass is {plan.fullest_pass}). Take more GPUs for one copy of the "
        "base (shard_ranks), or fewer blocks, a smaller picture or a smaller rank."
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "path", type=FILE, required=True, help="TOML file, such as training/configs/s2v_14b.toml.")
@click.option("--gpus", type=click.IntRange(min=1), required=True, help="Number of GPUs, one process each.")
@click.option("--gpu-memory-gib", type=Number(min=0), help="Memory of a GPU; a run that needs more is refused.")
@click.option("--reserve-gib", type=Number(min=0), default=RESERVE_GIB, show_default=True,
              help="Memory of it that is left free.")  # fmt: skip
@click.option("--tflops", type=Number(min=0, min_open=True), default=PEAK_TFLOPS, show_default=True,
              help="Peak of a GPU.")  # fmt: skip
@click.option("--utilisation", type=Number(0, 1, min_open=True), default=UTILISATION, show_default=True,
              help="Share of the peak that is reached.")  # fmt: skip
def main(
    path: Path, gpus: int, gpu_memory_gib: float | None, reserve_gib: float, tflops: float, utilisation: float
) -> None:
    """Plan memory and time of both stages of a run of adapters."""
    with reported():
        config = load(path)
        if not isinstance(config, AdapterConfig):
            raise ConfigError(f"{path} has no key 'checkpoint'; a plan is of a run that trains adapters of one.")
        names = (stage1.NAME, stage2.NAME)
        plans = [make_plan(config, name, gpus, tflops, utilisation) for name in names]
        days = sum(plan.gpu_days for plan in plans)
        click.echo(table(plans))
        click.echo(
            f"{days:.0f} GPU days at {utilisation:.0%} of {tflops:g} TFLOPS; the paper reports {PAPER_GPU_DAYS:.0f}, "
            f"which the same operations take at {utilisation * days / PAPER_GPU_DAYS:.0%}."
        )
        click.echo(json.dumps({"config": str(path), "gpus": gpus, "stages": [_facts(plan) for plan in plans]}))
        if gpu_memory_gib is not None:
            for plan in plans:
                check_fit(plan, round(gpu_memory_gib * GIB), round(reserve_gib * GIB))


def _facts(plan: StagePlan) -> dict[str, Any]:
    return {**asdict(plan), "total_bytes": plan.memory.total}


if __name__ == "__main__":
    main()
