"""The measurement of the invisible mark: how clips are counted, on records made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from live_avatar.errors import InputError
from perf.watermark import ATTACKS, GROUPS, clips, faces, report, table, usable


def record(kind: str, seed: int, found: bool) -> dict[str, Any]:
    attack = {"found": found, "wrong": False, "z": 20.0 if found else None, "seconds": 0.5}
    return {"kind": kind, "seed": seed, "psnr_db": 43.0 + seed, "fps": 500.0, "attacks": dict.fromkeys(ATTACKS, attack)}


def test_what_is_lost_is_named() -> None:
    unmarked = {"alarm": False, "readings": 1000, "agreeing": 4, "search_s": 3.0}
    counted = report(
        [
            record("face 720x400", 0, True) | {"without_mark": unmarked},
            record("face 720x400", 1, False),
            record("photograph grass", 2, True),
        ]
    )
    group = counted["groups"]["faces 720x400"]
    assert group["attacks"]["half size"] == {"clips": 2, "found": 1, "z_median": 20.0, "seconds_median": 0.5}
    assert group["lost"]["half size"] == ["face 720x400 1"]
    assert (group["psnr_db_least"], group["fps_median"]) == (43.0, 500.0)
    assert counted["groups"]["photographs 720x400"]["attacks"]["half size"]["found"] == 1
    assert "faces 96x96" not in counted["groups"]
    assert "| half size | 1 of 2 | 1 of 1 |\n" in table(counted)
    alarms = counted["false_alarms"]
    assert (alarms["files_without_mark"], alarms["alarms"], alarms["readings"]) == (1, 0, 1000)
    assert alarms["searches_of_marked_files"] == 3 * len(ATTACKS)


def test_each_group_of_attacks_has_a_line_of_its_own() -> None:
    usual, long = record("face 96x96", 0, True), record("face 96x96", 0, False)
    usual["attacks"] = {name: usual["attacks"][name] for name in GROUPS[0]}
    long["attacks"] = dict.fromkeys(GROUPS[1] | GROUPS[2], long["attacks"]["half size"])
    unmarked = {"alarm": False, "readings": 1000, "agreeing": 4, "search_s": 3.0}
    counted = report([usual, record("face 96x96", 1, True), long | {"without_mark": unmarked}])
    group = counted["groups"]["faces 96x96"]
    assert group["clips"] == 2
    assert group["attacks"]["half size"]["found"] == 2
    assert (group["attacks"]["double size"]["clips"], group["attacks"]["double size"]["found"]) == (2, 1)
    assert (group["attacks"]["mirrored"]["clips"], group["attacks"]["mirrored"]["found"]) == (1, 0)
    assert counted["false_alarms"]["files_without_mark"] == 1


def test_every_third_large_clip_is_a_photograph(tmp_path: Path) -> None:
    names = [kind for kind, _, _ in clips([tmp_path / "grass.png"], 3)]
    assert names == ["face 720x400", "face 96x96"] * 2 + ["photograph grass", "face 96x96"]


def test_a_face_fills_the_frame_and_moves() -> None:
    drawn = faces(1, 2, 96, 160)
    assert drawn.shape == (2, 96, 160, 3)
    assert (drawn[0] != drawn[1]).any()


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (96, 96)).save(tmp_path / "small.png")
    (tmp_path / "text").write_text("Hello.")
    with pytest.raises(InputError, match="has no picture of at least 250x140 pixels; give a folder of photographs"):
        usable(tmp_path)
