"""Streamed speech: the window, its normalisation, and which moment each video frame hears."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.config import TINY, StreamConfig
from live_avatar.errors import InputError
from live_avatar.inputs.speech import (
    NORMALISATION_EPS,
    PCM_SCALE,
    SpeechWindow,
    interpolate,
    trained_columns,
)
from live_avatar.runtime.torch_runtime import TorchRuntime
from tests.conftest import noise_speech
from tests.support.whole_file_features import bucket_features, features_30hz
from tests.tolerances import FLOAT32

STREAM = TINY.stream
BLOCK = STREAM.block_samples
FEATURE_SAMPLES = 320  # 50 Hz


def blocks_of(samples: Array) -> list[Array]:
    return list(samples.reshape(-1, BLOCK))


def with_lookahead(lookahead_ms: int) -> StreamConfig:
    return replace(STREAM, lookahead_ms=lookahead_ms)


def features_of(runtime: TorchRuntime, stream: StreamConfig, blocks: list[Array]) -> list[Array]:
    """Features [K, frames, A] of every block, as the conditioner makes them."""
    window, graph = SpeechWindow(stream), runtime.graph("speech_encoder")
    made = []
    for block in blocks:
        hidden = graph.run({"samples": window.push(block)})["hidden"]
        made.append(interpolate(hidden, window.positions(hidden.shape[1])))
    return made


@pytest.mark.parametrize("count", range(1, 8))
def test_the_window_is_the_newest_speech_normalised_by_all_of_it(count: int) -> None:
    speech = noise_speech(count * 0.48) + np.int16(500)
    window = SpeechWindow(STREAM)
    for block in blocks_of(speech):
        seen = window.push(block)
    whole = speech.astype(np.float64) / PCM_SCALE
    expected = (whole - whole.mean()) / np.sqrt(whole.var() + NORMALISATION_EPS)
    kept = min(count, STREAM.speech_window_blocks) * BLOCK
    assert seen.dtype == np.float32
    assert seen.shape == (1, kept)
    np.testing.assert_allclose(seen[0], expected[-kept:], rtol=0, atol=FLOAT32)


def test_the_window_is_the_same_whatever_came_in_which_order_before_it() -> None:
    blocks = blocks_of(noise_speech(0.48 * 8))
    one, other = SpeechWindow(STREAM), SpeechWindow(STREAM)
    last = blocks[4:]
    for window, order in ((one, [0, 1, 2, 3]), (other, [3, 1, 0, 2])):
        for i in order:
            window.push(blocks[i])
    for block in last:
        a, b = one.push(block), other.push(block)
    assert np.array_equal(a, b)  # integer sums: exactly


@pytest.mark.parametrize("count", range(1, 8))
def test_without_lookahead_a_block_hears_exactly_its_own_time(small_runtime: TorchRuntime, count: int) -> None:
    blocks = blocks_of(noise_speech(0.48 * 8))
    longer = [*blocks[:count], *blocks_of(-noise_speech(0.48 * 2, seed=1))]
    before = features_of(small_runtime, STREAM, blocks[:count])
    after = features_of(small_runtime, STREAM, longer)[:count]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(features.shape == (5, 12, 48) for features in before)


def absolute_positions(stream: StreamConfig, blocks: int) -> dict[int, tuple[float, int]]:
    """For each video frame: where in the whole speech it reads (50 Hz) and how many samples had been heard."""
    window, found = SpeechWindow(stream), {}
    silence = np.zeros(BLOCK, dtype=np.int16)
    for pushed in range(1, blocks + 1):
        samples = window.push(silence).shape[1]
        features = TINY.speech.feature_count(samples)
        positions = window.positions(features)
        assert positions.shape == (stream.block_frames,)
        assert positions.min() >= 0
        assert positions.max() <= features - 1
        start = (pushed * BLOCK - samples) / FEATURE_SAMPLES
        for i, position in enumerate(positions):
            found[window.first_frame + i] = (start + float(position), pushed * BLOCK)
    return found


@pytest.mark.parametrize("lookahead_ms", [0, 40, 120, 480, 1000, 1440])
def test_every_frame_reads_its_moment_and_lookahead_hears_exactly_that_much_later(lookahead_ms: int) -> None:
    stream = with_lookahead(lookahead_ms)
    found = absolute_positions(stream, blocks=11)
    ahead = stream.lookahead_frames
    assert sorted(found) == list(range(-ahead, 11 * 12 - ahead))
    for frame, (position, heard) in found.items():
        assert heard == ((frame + ahead) // 12 + 1) * BLOCK
        oldest = max(0, heard - stream.speech_window_blocks * BLOCK) / FEATURE_SAMPLES
        newest = heard / FEATURE_SAMPLES - 2  # the last feature that all samples under it have been heard for
        read = int(trained_columns(np.array(frame))) * 50 / 30
        assert position == pytest.approx(min(max(read, oldest), newest), abs=1e-9), f"frame {frame}"
        assert not ahead or read <= newest, f"frame {frame} is cut short in spite of look-ahead"
        assert abs(position - 2 * max(frame, 0)) <= 1  # 50 Hz features, 25 Hz frames


def test_frames_inside_the_lookahead_have_negative_numbers() -> None:
    window = SpeechWindow(with_lookahead(120))
    window.push(np.zeros(BLOCK, dtype=np.int16))
    assert window.first_frame == -3
    assert window.positions(23)[:4].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("window_blocks", [1, 2, 4, 10])
def test_the_window_never_grows_beyond_its_bound(window_blocks: int) -> None:
    window = SpeechWindow(replace(STREAM, speech_window_blocks=window_blocks))
    lengths = [window.push(np.zeros(BLOCK, dtype=np.int16)).shape[1] for _ in range(window_blocks + 3)]
    assert lengths == [min(i, window_blocks) * BLOCK for i in range(1, window_blocks + 4)]


@pytest.mark.parametrize(
    ("block", "found"),
    [
        (np.zeros(BLOCK, dtype=np.float32), r"float32 \[7680\]"),
        (np.zeros(BLOCK - 1, dtype=np.int16), r"int16 \[7679\]"),
        (np.zeros((1, BLOCK), dtype=np.int16), r"int16 \[1, 7680\]"),
        (np.zeros(0, dtype=np.int16), r"int16 \[0\]"),
    ],
)
def test_a_block_of_another_type_or_length_is_refused_and_not_counted(block: Array, found: str) -> None:
    window = SpeechWindow(STREAM)
    expected = rf"a block of speech is {found}; expected int16 \[7680\], 16 kHz mono, the last block padded with zeros"
    with pytest.raises(InputError, match=expected):
        window.push(block)
    window.push(np.zeros(BLOCK, dtype=np.int16))
    assert window.first_frame == 0


def test_hours_of_speech_take_no_more_memory_and_stay_in_range() -> None:
    window = SpeechWindow(with_lookahead(120))
    loud = np.full(BLOCK, 32_767, dtype=np.int16)
    loud[::2] = -32_768
    sizes = {}
    for count in range(1, 3001):
        seen = window.push(loud)
        positions = window.positions(95)
        if count >= 10:
            assert 0 <= positions.min() <= positions.max() <= 94
            assert np.isfinite(seen[0, ::997]).all()
        if count in (500, 3000):
            sizes[count] = len(pickle.dumps(window))
    assert abs(sizes[3000] - sizes[500]) < 10_000
    assert abs(seen).max() == pytest.approx(1, abs=1e-4)


def test_positions_repeat_every_five_blocks_for_ever() -> None:
    """60 frames are 72 columns: what a block reads inside its window depends on its number mod 5 alone."""
    window, fresh = SpeechWindow(STREAM), []
    for number in range(40):
        window.push(np.zeros(BLOCK, dtype=np.int16))
        if number >= 10:
            fresh.append(window.positions(95))
    for number, positions in enumerate(fresh[5:]):
        np.testing.assert_allclose(positions, fresh[number], rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [0, 1, -32_768, 32_767])
def test_a_constant_signal_gives_finite_numbers(small_runtime: TorchRuntime, value: int) -> None:
    window = SpeechWindow(STREAM)
    for _ in range(2):
        seen = window.push(np.full(BLOCK, value, dtype=np.int16))
    assert np.array_equal(seen, np.zeros((1, 2 * BLOCK), dtype=np.float32))
    hidden = small_runtime.graph("speech_encoder").run({"samples": seen})["hidden"]
    assert np.isfinite(hidden).all()


def test_interpolation_reads_between_columns_and_never_past_the_last() -> None:
    hidden = np.float32([[[0.0], [10.0], [30.0]]])
    read = interpolate(hidden, np.array([0.0, 0.25, 1.5, 2.0]))
    assert read.dtype == np.float32
    np.testing.assert_allclose(read[0, :, 0], [0, 2.5, 20, 30], atol=FLOAT32)


def test_30hz_columns_of_frames_are_rounded_and_never_tied() -> None:
    frames = np.arange(-10, 100_000)
    assert np.array_equal(trained_columns(frames), np.rint(1.2 * frames).astype(np.int64))
    assert int(trained_columns(np.array(10**12))) == 12 * 10**11


@pytest.mark.parametrize(("features", "count"), [(50, 30), (205, 122), (410, 245), (820, 491), (206, 123), (2, 1)])
def test_30hz_features_have_the_references_count(features: int, count: int) -> None:
    assert features_30hz(np.zeros((1, features, 1), dtype=np.float32)).shape[1] == count


@pytest.mark.parametrize(("columns", "clips"), [(57, 1), (58, 2), (288, 6)])
def test_whole_file_bucketing_makes_the_references_number_of_clips(columns: int, clips: int) -> None:
    total = next(n for n in range(1, 1000) if int(n / 50.0 * 30) == columns)
    features, picked, made = bucket_features(np.ones((1, total, 1), dtype=np.float32), clip_frames=48)
    assert made == clips
    assert features.shape == (1, 1, 1, 48 * clips)
    inside = picked < columns
    assert np.array_equal(features[0, 0, 0], inside.astype(np.float32))
