"""Algorithm 3 in one process: block by block, step by step. The oracle that the pipeline must equal.

Uses the same stages as the serving models, so on one runtime the two agree to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array
from live_avatar.config import KNOWN_AVATARS, SAMPLES_PER_FRAME, Preset, StreamConfig
from live_avatar.errors import InputError
from live_avatar.inputs.masks import check_masks, decode_scene
from live_avatar.pipeline.avatar import AvatarEncoder, avatar_key
from live_avatar.pipeline.conditioning import BlockInput, Conditioner
from live_avatar.pipeline.decoder import DecoderState, FrameDecoder
from live_avatar.pipeline.denoiser import Denoiser, Distance, all_steps
from live_avatar.pipeline.lru import LRU
from live_avatar.pipeline.sink import SinkSource, first_latent_frame, gives_sink, takes_sink
from live_avatar.runtime import Runtime


@dataclass(frozen=True)
class GeneratedBlock:
    """One block: its number from 0, its first frame on the speech's clock, clean latents, frames uint8 [n, H, W, 3]."""

    index: int
    first_frame: int
    latents: Array
    frames: Array


def cut_blocks(speech: Array, stream: StreamConfig) -> Iterator[Array]:
    """Blocks int16 [..., block_samples] of a whole speech, int16 [samples] or [speakers, samples]: as many as its
    frames need, with zeros after its end."""
    needed = -(-speech.shape[-1] // SAMPLES_PER_FRAME) + stream.lookahead_frames
    for start in range(0, needed * SAMPLES_PER_FRAME, stream.block_samples):
        block = speech[..., start : start + stream.block_samples]
        missing = stream.block_samples - block.shape[-1]
        yield np.pad(block, [*[(0, 0)] * (block.ndim - 1), (0, missing)])


class Generator:
    """All stages of a runtime, run one after another."""

    def __init__(self, runtime: Runtime) -> None:
        self.preset: Preset = runtime.preset
        self._encoder = AvatarEncoder(runtime)
        self._conditioner = Conditioner(runtime)
        self._denoiser = Denoiser(runtime, all_steps(self.preset.stream.steps))
        self._decoder = FrameDecoder(runtime)
        self._avatars: LRU[SinkSource] = LRU(KNOWN_AVATARS)

    def stream(
        self,
        image: bytes,
        prompt: str,
        seed: int,
        blocks: Iterator[Array],
        distance: Distance | None = None,
        masks: Sequence[bytes] = (),
    ) -> Iterator[GeneratedBlock]:
        """Yields a block for every block of speech, without end if `blocks` has none.

        With several speakers there is a mask for each (`inputs.masks`), and a block of speech is int16
        [speakers, block_samples]. Raises `InputError` for a picture, mask, prompt, seed or speech that cannot be used.
        """
        stream = self.preset.stream
        check_masks(masks, stream.speakers)
        weights = decode_scene(image, masks, stream.height, stream.width).weights if masks else None
        source = self._source(image, prompt)
        decoding = DecoderState(self._decoder.warm_up(source.motion))
        for given, latent in self._denoised(source, seed, blocks, distance, weights):
            yield GeneratedBlock(given.index, given.first_frame, latent, self._decoder.decode(decoding, latent))

    def latents(self, image: bytes, prompt: str, seed: int, blocks: Iterator[Array]) -> Iterator[Array]:
        """The clean latents of every block of one speaker, as in `stream`; no frame is decoded."""
        return (latent for _, latent in self._denoised(self._source(image, prompt), seed, blocks))

    def _source(self, image: bytes, prompt: str) -> SinkSource:
        return self._avatars.get(avatar_key(image, prompt), lambda: self._encoder.encode_image(image, prompt))

    def _denoised(
        self,
        source: SinkSource,
        seed: int,
        blocks: Iterator[Array],
        distance: Distance | None = None,
        weights: Array | None = None,
    ) -> Iterator[tuple[BlockInput, Array]]:
        stream = self.preset.stream
        conditioning = self._conditioner.open(seed, weights)
        denoising = self._denoiser.open(self._denoiser.prefill(source))
        first_clean = None
        for samples in blocks:
            given = self._conditioner.block(conditioning, samples)
            if takes_sink(given.index, stream):
                assert first_clean is not None
                denoising.sink = self._denoiser.prefill(source.replaced(first_clean))
            latent = self._denoiser.run(denoising, given.noise, given.audio, distance)
            if gives_sink(given.index, stream):
                first_clean = first_latent_frame(latent)
            yield given, latent

    def generate(
        self, image: bytes, prompt: str, seed: int, speech: Array, masks: Sequence[bytes] = ()
    ) -> Iterator[GeneratedBlock]:
        """Exactly the frames of a speech, int16 [samples], or [speakers, samples] with `masks` as `stream` takes them:
        one per started 40 ms. `InputError` if it is empty."""
        if speech.size == 0:
            raise InputError("the speech has 0 samples; there is nothing to say.")
        total = -(-speech.shape[-1] // SAMPLES_PER_FRAME)
        for block in self.stream(image, prompt, seed, cut_blocks(speech, self.preset.stream), masks=masks):
            kept = block.frames[max(0, -block.first_frame) : total - block.first_frame]
            if len(kept):
                yield GeneratedBlock(block.index, max(0, block.first_frame), block.latents, kept)
