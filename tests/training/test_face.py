"""Drawn faces: what the pose moves, what the looks colour, and who belongs to which split."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest

from training.data.canvas import mix
from training.data.face import Face, Pose
from training.data.identity import BACKGROUNDS, HAIR, SKIN, STYLES, Identity, draw_identity, split_of
from training.data.split import Split

SIZE = 48
UNIT = SIZE / 96


@pytest.fixture(scope="module")
def face() -> Face:
    return Face(draw_identity(Split.TRAIN, 1), SIZE)


def change(face: Face, pose: Pose) -> np.ndarray:
    """Where a pose differs from the neutral one, bool [H, W]."""
    return np.abs(face.frame(pose).astype(int) - face.frame(Pose())).max(2) > 20


def middle(where: np.ndarray) -> tuple[float, float]:
    """Mean column and row of the places that changed, in units."""
    rows, columns = np.nonzero(where)
    return columns.mean() / UNIT, rows.mean() / UNIT


def identities(split: Split, count: int) -> list[Identity]:
    return [draw_identity(split, seed) for seed in range(count)]


def test_opening_changes_the_mouth_and_the_chin_alone(face):
    where = change(face, Pose(opening=1.0))
    x, y = middle(where)
    assert abs(x - 48) < 2
    assert 62 < y < 74
    assert not where[: round(56 * UNIT)].any()


def test_lids_change_the_eyes_alone(face):
    where = change(face, Pose(lid=1.0))
    assert where.any()
    rows = np.flatnonzero(where.any(1)) / UNIT
    assert rows.min() > 35
    assert rows.max() < 52


def test_sway_moves_the_head_and_leaves_wall_and_clothes(face):
    where = change(face, Pose(x=2.0, angle=3.0))
    assert where[: round(60 * UNIT)].any()
    assert not where[:, : round(8 * UNIT)].any()
    assert not where[-2:].any()


def test_the_head_moves_as_the_pose_says(face):
    still, moved = face.frame(Pose()).astype(int), face.frame(Pose(x=4.0)).astype(int)
    inside = np.s_[round(40 * UNIT) : round(60 * UNIT), round(36 * UNIT) : round(60 * UNIT)]
    np.testing.assert_allclose(moved[inside], np.roll(still, round(4 * UNIT), axis=1)[inside], atol=1)


def test_a_positive_angle_turns_the_head_clockwise_about_the_neck(face):
    def eyes(angle: float) -> float:
        shut, opened = (face.frame(Pose(lid=lid, angle=angle)).astype(int) for lid in (1.0, 0.0))
        return middle(np.abs(shut - opened).max(2) > 20)[0]

    assert eyes(10.0) - eyes(0.0) == pytest.approx(40 * np.sin(np.radians(10.0)), abs=1.5)


@pytest.mark.parametrize("size", [96, 100, 64])
def test_any_size_is_drawn(size):
    face = Face(draw_identity(Split.TEST, 0), size)
    frame = face.frame(Pose(opening=0.5))
    assert (frame.shape, frame.dtype) == ((size, size, 3), np.uint8)


def test_a_larger_picture_shows_the_same():
    identity = draw_identity(Split.TRAIN, 2)
    small, large = Face(identity, 48).frame(Pose(0.6)), Face(identity, 96).frame(Pose(0.6))
    shrunk = large.reshape(48, 2, 48, 2, 3).mean((1, 3))
    assert np.abs(shrunk - small).mean() < 4


@pytest.mark.parametrize("seed", range(6))
def test_colours_are_those_of_the_looks(seed):
    identity = draw_identity(Split.TRAIN, seed)
    frame = Face(identity, SIZE).frame(Pose()).astype(float)

    def at(x: float, y: float) -> np.ndarray:
        return frame[round(y * UNIT), round(x * UNIT)]

    assert np.abs(at(4, 30) - BACKGROUNDS[identity.looks["background"]]).max() < 45
    skin = SKIN[identity.looks["skin"]]
    assert np.abs(at(48, 50) - mix(skin, (96, 36, 30), 0.1)).max() < 40
    top = skin if identity.looks["style"] == "bald" else HAIR[identity.looks["hair"]]
    assert np.abs(at(56, 18) - top).max() < 40


@pytest.mark.parametrize("split", Split)
def test_an_identity_belongs_to_its_split_and_is_a_function_of_its_seed(split):
    drawn = identities(split, 40)
    assert all(split_of(one.looks) is split for one in drawn)
    assert drawn == identities(split, 40)
    assert len({tuple(one.looks.items()) for one in drawn}) > 30


def test_splits_share_no_identity():
    sets = [{tuple(one.looks.items()) for one in identities(split, 60)} for split in Split]
    assert all(not one & other for one, other in combinations(sets, 2))


def test_prompts_name_the_looks_in_several_ways():
    drawn = identities(Split.TRAIN, 60)
    for one in drawn:
        assert one.looks["background"] in one.prompt
        assert one.looks["person"] in one.prompt
        assert ("bald" if one.looks["style"] == "bald" else one.looks["hair"]) in one.prompt
        assert (f"{one.looks['glasses']} glasses" in one.prompt) == (one.looks["glasses"] != "no")
    assert len({one.prompt.split()[0] for one in drawn}) > 1


@pytest.mark.parametrize("person", STYLES)
def test_every_style_is_drawn_otherwise(person):
    identity = draw_identity(Split.TRAIN, 0)

    def picture(style: str) -> bytes:
        looks = {**identity.looks, "person": person, "style": style}
        return Face(dataclasses.replace(identity, looks=looks), SIZE).frame(Pose()).tobytes()

    assert len({picture(style) for style in STYLES[person]}) == len(STYLES[person])
