"""The portrait that the demo shows is the face that it says."""

from __future__ import annotations

import numpy as np
from PIL import Image

from live_avatar.assets import DEMO_PROMPT, PORTRAIT
from training.data.identity import draw_identity
from training.data.split import Split
from training.demo_assets import PORTRAIT_SEED, draw_portrait


def test_the_portrait_is_a_face_of_the_test_split():
    with Image.open(PORTRAIT) as shipped:
        difference = np.asarray(shipped).astype(int) - np.asarray(draw_portrait())
    assert np.abs(difference).max() <= 1  # rounding of another processor


def test_the_prompt_names_that_face():
    assert draw_identity(Split.TEST, PORTRAIT_SEED).prompt == DEMO_PROMPT
