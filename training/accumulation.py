"""Block-wise gradient accumulation (Algorithm 2): the gradient of a rollout with the memory of one block.

A block's graph begins at its detached history and its noisy latents, so each graph can be built, used and freed alone.
All blocks share the scene. It is detached: gradients accumulate there and flow back into its graph once at the end.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from training.roles import Role
from training.rollout import Roller, Rollout, RolloutInput
from training.window import Scene


class Cut:
    """A detached scene; `flow_back` sends its accumulated gradients into the graph."""

    def __init__(self, scene: Scene) -> None:
        self._ends: list[tuple[Tensor, Tensor]] = []
        self.scene = scene.mapped(self._end)

    def _end(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:  # frozen parts, if only adapters are trained
            return tensor
        leaf = tensor.detach().requires_grad_()
        self._ends.append((tensor, leaf))
        return leaf

    def flow_back(self) -> None:
        reached = [(tensor, leaf.grad) for tensor, leaf in self._ends if leaf.grad is not None]
        torch.autograd.backward([tensor for tensor, _ in reached], [gradient for _, gradient in reached])


def backward_by_blocks(roller: Roller, dit: Role, given: RolloutInput, made: Rollout, gradient: Tensor) -> None:
    """Adds the parameters' gradients of a loss that has this gradient, [1, 16, F, h, w], at the latents.

    `made` is the rollout of `given` without graph; the passes of its exit step are run again, one by one.
    """
    window, place, step = roller.window, given.place, given.exit_step
    cut = Cut(dit(lambda network: window.open(network, given.clip, made.late)))
    for index, part in enumerate(window.blocks_of(gradient)):
        latent, past = made.inputs[index], made.written[:index]
        run = partial(window.block, scene=cut.scene, place=place, index=index, level=roller.levels[step])
        velocity, _ = dit(partial(run, latent=latent, past=past))
        roller.predicted(latent, velocity, step).backward(part)
    cut.flow_back()
