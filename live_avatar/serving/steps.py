"""Ranges of denoising steps: how a profile and a model's parameter write them, and the name of their stage.

Steps are counted from 1. A range is `"2"` or `"1-2"` in text, `range(2, 3)` or `range(1, 3)` in the program.
"""

from __future__ import annotations

import re
from typing import Final

from live_avatar.errors import ConfigError

STEPS_PARAMETER: Final = "steps"
"""The parameter of a denoising model that says which steps it runs."""
RANGE = re.compile(r"([1-9][0-9]{0,2})(?:-([1-9][0-9]{0,2}))?")


def read_steps(text: str) -> range:
    """The steps that a text names. Raises `ConfigError` for a text that names none."""
    found = RANGE.fullmatch(text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if last < first:
        raise ConfigError(f'steps = {text!r} is no range of steps; write one such as "2" or "1-4", counted from 1.')
    return range(first, last + 1)


def steps_text(steps: range) -> str:
    """The text that `read_steps` reads."""
    return str(steps[0]) if len(steps) == 1 else f"{steps[0]}-{steps[-1]}"


def stage_name(steps: range) -> str:
    """Name of the stage, and of its model in Triton."""
    return f"dit_step_{steps[0]}" if len(steps) == 1 else f"dit_steps_{steps[0]}_{steps[-1]}"
