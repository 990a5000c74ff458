"""Shards are read by number from any storage, in an order that follows from the position alone; damage is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import fsspec
import pytest
import torch

from live_avatar.errors import CheckpointError
from tests.training.conftest import SMALL, drawn_clip
from training.data.split import Split
from training.encoded import STORED, EncodedClip
from training.errors import TrainingError
from training.matching import draw_index
from training.prepare import SILENCE, part_folder, verify
from training.shard_writer import ShardWriter, journals
from training.shards import CLIPS, INDEX, ShardedClips, conditions, stored_tensors

BLOCKS = 2
COUNT = 7


def clip_of(number: int) -> EncodedClip:
    return drawn_clip(BLOCKS, seed=number)


def write_shards(output: Path, shard_bytes: int = 150_000) -> Path:
    """`COUNT` clips of noise, the last two for validation."""
    import hashlib

    from safetensors.torch import save

    folder = part_folder(output, 0, 1)
    writer = ShardWriter(folder, shard_bytes)
    for number in range(COUNT):
        facts = {"split": "train" if number < COUNT - 2 else "validation"}
        writer.add(f"{number:08d}", stored_tensors(clip_of(number)), facts)
    writer.finish()
    shards, lines = [], ""
    for shard, entries in journals(folder):
        digest = hashlib.sha256(shard.read_bytes()).hexdigest()
        shards.append({"file": f"{folder.name}/{shard.name}", "bytes": shard.stat().st_size, "sha256": digest})
        lines += "".join(json.dumps(entry) + "\n" for entry in entries)
    silence = save({"silence": clip_of(0).silence})
    (folder / SILENCE).write_bytes(silence)
    (output / CLIPS).write_text(lines)
    index = {
        "format": 1,
        "conditions": conditions(SMALL, BLOCKS),
        "counts": {},
        "weights": {},
        "silence": {"key": "silence", "file": f"{folder.name}/{SILENCE}", "offset": 0, "bytes": len(silence),
                    "sha256": hashlib.sha256(silence).hexdigest()},
        "shards": shards,
        "clips_sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "parts": [],
    }  # fmt: skip
    (output / INDEX).write_text(json.dumps(index))
    return output


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards")


def opened(url: object, split: Split = Split.TRAIN, **changes: int) -> ShardedClips:
    return ShardedClips(str(url), split, SMALL, **{"blocks": BLOCKS, **changes})


def test_clips_come_back_to_the_rounding_of_float16(shards: Path) -> None:
    assert len(list(shards.glob("part-*/clips-*.tar"))) > 1
    clips = opened(shards)
    assert len(clips) == COUNT - 2
    for number in (0, 4):
        for name in ("reference", "silence", *STORED):
            ours, theirs = getattr(clips[number], name), getattr(clip_of(number), name)
            assert ours.dtype == torch.float32
            assert torch.equal(ours, theirs.half().float()), name
    assert torch.equal(opened(shards, Split.VALIDATION)[1].latents, clip_of(COUNT - 1).latents.half().float())
    assert len(opened(shards, Split.VALIDATION, most=1)) == 1
    with pytest.raises(IndexError, match=r"clip 5 is outside 0\.\.4"):
        clips[5]


def test_padding_of_the_text_is_not_stored(shards: Path) -> None:
    clip = clip_of(0)
    text = torch.cat([clip.text[:3], torch.zeros_like(clip.text[3:])])
    stored = stored_tensors(dataclasses.replace(clip, text=text))
    assert stored["text"].shape == (3, SMALL.dit.text_dim)
    assert stored_tensors(dataclasses.replace(clip, text=torch.zeros_like(text)))["text"].shape[0] == 1


def test_a_url_of_fsspec_is_read_like_a_folder(shards: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/bucket/shards", recursive=True)
    try:
        remote = opened("memory://bucket/shards")
        assert all(torch.equal(remote[i].states, opened(shards)[i].states) for i in range(len(remote)))
        assert verify("memory://bucket/shards")[1] == COUNT
    finally:
        memory.rm("/bucket", recursive=True)


def test_every_pass_has_each_clip_once_in_an_order_of_its_own(shards: Path) -> None:
    clips = opened(shards)
    passes = [[clips.at(position) for position in range(start, start + 5)] for start in range(0, 50, 5)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in passes)
    assert len({tuple(one) for one in passes}) > 5
    assert [opened(shards, seed=1).at(position) for position in range(5)] != passes[0]


def test_any_number_of_processes_goes_on_at_the_exact_clip(shards: Path) -> None:
    """Four processes stop after step 3; two, and one, that open the shards anew take the clips that four would have."""
    batch, steps = 4, 8

    def taken(world: int, first: int, last: int) -> list[set[int]]:
        """Positions and clips of each step, by all its processes."""
        clips = opened(shards)
        return [
            {
                (position := (step - 1) * batch + place) * 100
                + draw_index(clips, torch.Generator().manual_seed(position), position)
                for rank in range(world)
                for place in range(rank, batch, world)
            }
            for step in range(first, last + 1)
        ]

    whole = taken(4, 1, steps)
    assert taken(4, 1, 3) + taken(2, 4, steps) == whole
    assert taken(4, 1, 3) + taken(1, 4, 5) + taken(4, 6, steps) == whole


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"height": 96},
            r"was made with latents \[1, 16, 6, 8, 8\], but this run has \[1, 16, 6, 12, 8\]; give the pre",
        ),
        (
            {"speech_window_blocks": 3},
            r"was made with speech_window_blocks 4, but this run has 3; give the preset, size",
        ),
    ],
)
def test_shards_of_another_size_or_stream_are_refused(shards: Path, changes: dict[str, int], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        ShardedClips(str(shards), Split.TRAIN, SMALL.with_stream(**changes), BLOCKS)


def test_shards_of_other_blocks_and_widths_are_refused(shards: Path) -> None:
    with pytest.raises(CheckpointError, match="was made with blocks 2, but this run has 3"):
        opened(shards, blocks=3)
    wide = dataclasses.replace(
        SMALL,
        dit=dataclasses.replace(SMALL.dit, audio_dim=64),
        speech=dataclasses.replace(SMALL.speech, hidden_size=64),
    )
    with pytest.raises(
        CheckpointError, match=r"was made with states \[2, 5, 48, 12\], but this run has \[2, 5, 64, 12\]"
    ):
        ShardedClips(str(shards), Split.TRAIN, wide, BLOCKS)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.8])
def test_a_flipped_byte_is_found_in_reading_and_by_verify(shards: Path, share: float) -> None:
    shard = min(shards.glob("part-*/clips-*.tar"))
    data = bytearray(shard.read_bytes())
    place = 600 + int(share * (len(data) - 4000))
    data[place] ^= 16
    shard.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"clips-000000.tar is damaged in 0000000\d, bytes \d+ to \d+; copy that file"
    ):
        verify(str(shards))
    clips = opened(shards)
    with pytest.raises(CheckpointError, match=r"clips-000000.tar is damaged in clip \d, bytes \d+ to \d+; copy"):
        [clips[number] for number in range(len(clips))]
    assert len(list(shards.glob("part-*/clips-*.tar"))) > 1


def test_a_flipped_byte_outside_the_clips_is_found_by_verify(shards: Path) -> None:
    shard = min(shards.glob("part-*/clips-*.tar"))
    data = bytearray(shard.read_bytes())
    data[3] ^= 1  # in the name of the first member
    shard.write_bytes(data)
    with pytest.raises(TrainingError, match=r"clips-000000.tar is damaged outside its clips, which are whole; copy"):
        verify(str(shards))


def test_whole_shards_are_verified(shards: Path) -> None:
    assert verify(str(shards)) == (len(list(shards.glob("part-*/clips-*.tar"))), COUNT)


def test_a_shard_that_is_cut_off_or_missing_is_named(shards: Path) -> None:
    shard = max(shards.glob("part-*/clips-*.tar"))
    shard.write_bytes(shard.read_bytes()[:900])
    with pytest.raises(CheckpointError, match=r"tar is damaged in"):
        verify(str(shards))
    shard.unlink()
    with pytest.raises(
        TrainingError, match=rf"{shard.name} cannot be read \(No such file or directory\); copy it there"
    ):
        verify(str(shards))


def test_a_folder_without_an_index_or_with_another_one_is_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"none/index.json cannot be read \(No such file or directory\); copy it"):
        opened(tmp_path / "none")
    (shards / CLIPS).write_text((shards / CLIPS).read_text().replace("train", "trial"))
    with pytest.raises(
        CheckpointError, match=r"clips.jsonl is not the file that index.json describes; copy both again"
    ):
        opened(shards)
    index = (shards / INDEX).read_text()
    (shards / INDEX).write_text(index.replace('"format": 1', '"format": 2'))
    with pytest.raises(
        CheckpointError, match=r"index.json has format 2, expected 1; make it with python -m training.pre"
    ):
        opened(shards)
    for text in ("{", "[]", "{}"):
        (shards / INDEX).write_text(text)
        with pytest.raises(
            CheckpointError, match=r"index.json is no index of shards \(.+\); make it with python -m tr"
        ):
            opened(shards)


def test_a_protocol_that_nobody_knows_is_named() -> None:
    with pytest.raises(
        TrainingError, match=r"shards nowhere://x cannot be opened \(.+\); give a folder, or a URL whose"
    ):
        opened("nowhere://x")


def test_a_split_without_clips_is_named(tmp_path: Path) -> None:
    output = write_shards(tmp_path / "shards")
    lines = (output / CLIPS).read_text().replace("validation", "train")
    (output / CLIPS).write_text(lines)
    import hashlib

    index = json.loads((output / INDEX).read_text())
    (output / INDEX).write_text(json.dumps({**index, "clips_sha256": hashlib.sha256(lines.encode()).hexdigest()}))
    with pytest.raises(TrainingError, match="has no clip of the validation split; make shards of more files"):
        opened(output, Split.VALIDATION)
