"""Streams through causal networks: every layer with a history reads it from the caller and hands back the new one.

A state is a list of slots, one for each such layer in the order of execution. Inside, frames are a batch: [T, C, h, w].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Temporal:
    """A layer that sees `history` frames before its input, and makes `growth` frames of each."""

    history: int = 0
    growth: int = 1


class FeatureCache:
    """The slots of one pass, read and written in the order of the layers. Without slots the stream begins.

    first: whether the earliest frame of this pass is the first of the stream.
    """

    def __init__(self, slots: Sequence[Tensor] | None) -> None:
        self.first = slots is None
        self._slots: Iterator[Tensor] | None = None if slots is None else iter(slots)
        self.out: list[Tensor] = []

    def exchange(
        self, x: Tensor, frames: int, stride: int = 1, before: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """The slot's `frames` frames before x [T, C, h, w], None for zeros, and x; keeps the newest frames instead.

        stride: frames that the layer takes for each that it makes; before: the slot where the stream begins, None for
        zeros.
        """
        history = before if self._slots is None else next(self._slots)
        self.out.append((x if x.shape[0] >= frames else with_history(x, history, frames))[-frames:])
        return history, x

    def behind_first(self, first: Tensor, made: Tensor) -> Tensor:
        """What was made of later frames, behind the first one if this pass still has it."""
        return torch.cat([first, made]) if self.first else made

    def beside(self, x: Tensor, made: Tensor) -> Tensor:
        """Those frames of x that `made` was made of, for the identity path around layers."""
        return x


class HeldCache(FeatureCache):
    """A stream of frames that all show the same picture: only those whose features differ are computed.

    Behind a layer with a history, features change for as many frames more as it looks back, and stay the same from
    then on. So x holds the frames that change, at least, and its last one stands for all that follow. `out` is of no
    use.
    """

    def __init__(self, later: int) -> None:
        super().__init__(None)
        self._later = later  # frames after the first, at the rate of the layer that comes next

    def exchange(
        self, x: Tensor, frames: int, stride: int = 1, before: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        history, _ = super().exchange(x, frames, stride, before)
        changing = x.shape[0] + frames + stride - 1
        most = self._later if stride > 1 else 1 + self._later  # time resampling leaves the first one alone
        self._later //= stride
        return history, held(x, min(changing + -changing % stride, most))

    def beside(self, x: Tensor, made: Tensor) -> Tensor:
        return held(x, made.shape[0])


class NewestCache(FeatureCache):
    """The first pass of a stream, of which the state alone is wanted: each layer makes the newest frames that the later
    ones need.

    needed: for every slot, as `frames_needed` counts them.
    """

    def __init__(self, needed: Sequence[int]) -> None:
        super().__init__(None)
        self._needed = iter(needed)

    def exchange(
        self, x: Tensor, frames: int, stride: int = 1, before: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        history, _ = super().exchange(x, frames, stride, before)
        left_out = x.shape[0] - next(self._needed)
        if left_out <= 0:
            return history, x
        self.first = False
        newest = with_history(x, history, frames)[left_out:]
        return newest[:frames], newest[frames:]

    def beside(self, x: Tensor, made: Tensor) -> Tensor:
        return x[-made.shape[0] :]


def with_history(x: Tensor, history: Tensor | None, frames: int) -> Tensor:
    """The `frames` frames before x, zeros for None, and x."""
    return torch.cat([x.new_zeros(frames, *x.shape[1:]) if history is None else history, x])


def held(x: Tensor, frames: int) -> Tensor:
    """The first `frames` frames of x, whose last one is repeated if it has fewer."""
    missing = frames - x.shape[0]
    return torch.cat([x, x[-1:].expand(missing, -1, -1, -1)]) if missing > 0 else x[:frames]


def frames_needed(layers: Iterable[Temporal]) -> list[int]:
    """Frames that each layer with a history must make, so that the slots behind it become those of the whole stream.

    layers: in the order of execution. The last one makes two frames that nobody needs: so the numbers are even, as
    `causal_conv` likes them.
    """
    needed, made = 2, []
    for layer in reversed(list(layers)):
        needed = -(-needed // layer.growth)
        if layer.history:
            made.append(needed)
            needed += layer.history
    return made[::-1]


@runtime_checkable
class Streamed(Protocol):
    """A layer that runs in a stream, with its own history or with those of its parts."""

    def stream(self, x: Tensor, cache: FeatureCache) -> Tensor: ...


def run_stream(layers: Iterable[nn.Module], x: Tensor, cache: FeatureCache) -> Tensor:
    """Runs the layers in order; those that have a history take it from the cache."""
    for layer in layers:
        x = layer.stream(x, cache) if isinstance(layer, Streamed) else layer(x)
    return x


class StreamingDecoder(nn.Module):
    """Latents -> frames as a stream, by the submodule `decoder`."""

    def decode(self, latents: Tensor, state: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Latents [1, 16, T, h, w] -> frames [1, 3, T', 8h, 8w] in -1..1, not clamped, and the stream's new state.

        T' = 4 T; with state None, at the start of a stream, T' = 4 T - 3.
        """
        cache = FeatureCache(state)
        return self._frames(latents, cache), cache.out

    def warm_up(self, latents: Tensor) -> list[Tensor]:
        """The state of a stream after its first latents [1, 16, T, h, w].

        It differs in rounding only from the one that decoding them gives. Layers near the frames remember few of them,
        so most of their work is left out.
        """
        layers = (layer for layer in self.get_submodule("decoder").modules() if isinstance(layer, Temporal))
        cache = NewestCache(frames_needed(layers))
        self._frames(latents, cache)
        return cache.out

    def _frames(self, latents: Tensor, cache: FeatureCache) -> Tensor:
        """`decode` with the cache that carries the state."""
        raise NotImplementedError
