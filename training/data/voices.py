"""The speakers: espeak-ng's languages and variants, each variant in one split.

Variants that differ only in a few numbers are in the same split. Whispering, echoing and robot variants are not used.
"""

from __future__ import annotations

import numpy as np

from live_avatar_client.espeak import Voice
from training.data.split import Split

VARIANTS = {
    Split.TRAIN: (
        *("f1", "f2", "f4", "aunty", "Andrea", "Alicia", "belinda", "linda", "shelby", "steph", "steph2", "steph3"),
        *("m1", "m2", "m3", "m4", "m6", "Alex", "Andy", "Denis", "Diogo", "Henrique", "miguel", "Gene", "Jacky"),
        *("Marco", "Mario", "Michael", "gustave", "Mike", "norbert", "john", "pablo", "antonio", "rob", "robert"),
        *("victor", "max"),
    ),
    Split.VALIDATION: ("f3", "grandma", "ed", "m5", "marcelo"),
    Split.TEST: ("Annie", "f5", "Nguyen", "m7", "m8", "paul", "Lee", "travis"),
}
LANGUAGES = {
    Split.TRAIN: ("en-us", "en", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029"),
    Split.VALIDATION: ("en-us", "en"),
    Split.TEST: ("en-us", "en", "en-gb-scotland"),
}


def draw_voice(split: Split, generator: np.random.Generator) -> Voice:
    """A random speaker of the split, with a random tempo, pitch and vocal tract."""
    language = generator.choice(LANGUAGES[split])
    variant = generator.choice(VARIANTS[split])
    return Voice(
        name=f"{language}+{variant}",
        rate_wpm=int(generator.integers(120, 221)),
        pitch=int(generator.integers(20, 81)),
        tract=round(float(generator.uniform(0.9, 1.12)), 3),
    )
