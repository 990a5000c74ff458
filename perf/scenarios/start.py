"""The start of a session with new avatars and with a known one.

The parts of TTFF are those of the session's own stages. A new avatar is prepared before its session, beside the pipe:
that time is in `rest_s`. With four frames in a response, TTFF counts from the client's connection to the first of them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from perf.figures import FirstFrame, first_frame
from perf.load import Speaker
from perf.report import GREEN, axes, save
from perf.scenario import Context, Figures, Scenario, check
from perf.scenarios.realtime import MOST_OVER_PARTS

REPEATS, QUICK_REPEATS = 9, 2
MOST_OVER_PARTS_AT_HAND = 1.25
"""Without the wait for a block the parts are 70 to 150 ms, and serving adds 13 to 16."""
KNOWN = "A person whom the server knows by now."


def measure(context: Context) -> Figures:
    repeats = QUICK_REPEATS if context.quick else REPEATS
    begun_s = time.monotonic()
    with context.server() as target, tempfile.TemporaryDirectory() as scratch:
        ready_s = time.monotonic() - begun_s
        speaker = Speaker(target, Path(scratch))
        first = speaker.spoken(1, prompt="The first person after the start.")[0]
        speaker.spoken(1, prompt=KNOWN)
        new = [f"Person number {n} of seed {context.seed}." for n in range(repeats)]
        prompts = {"new": new, "known": [KNOWN] * repeats}
        spoken = {kind: [_spoken(speaker, prompt) for prompt in of] for kind, of in prompts.items()}
        prompts["new"] = [f"{prompt} Again, as another." for prompt in new]
        at_hand = {kind: [_at_hand(speaker, prompt) for prompt in of] for kind, of in prompts.items()}
        prompts["new"] = [f"{prompt} And as a third one." for prompt in new]
        by_latent = {kind: [speaker.first_frames(prompt=prompt) for prompt in of] for kind, of in prompts.items()}
    figures: Figures = {
        "repeats": repeats,
        "server_ready_s": None if context.url else ready_s,
        "first_after_the_start_ttff_s": first.received_s - first.begun_s,
        "spoken": {kind: _summary(found) for kind, found in spoken.items()},
        "speech_at_hand": {kind: _summary(found) for kind, found in at_hand.items()},
        "first_frames_of_speech_at_hand": {kind: _times(found) for kind, found in by_latent.items()},
        "checks": [
            _check("spoken", spoken["known"], MOST_OVER_PARTS),
            _check("at hand", at_hand["known"], MOST_OVER_PARTS_AT_HAND),
        ],
    }
    ways = {"spoken": spoken, "at hand": at_hand}
    _picture(context, {f"{how}, {kind}": found for how, of in ways.items() for kind, found in of.items()})
    return figures


def _spoken(speaker: Speaker, prompt: str) -> FirstFrame:
    """START when the client connects, speech in chunks of 20 ms: the avatar is prepared during the speech."""
    blocks = speaker.spoken(1, prompt=prompt)
    return first_frame(blocks[0], speaker.intervals(blocks))


def _at_hand(speaker: Speaker, prompt: str) -> FirstFrame:
    """START with the first block: all work lies between request and answer."""
    run = speaker.analyzed(1, rate=1.0, prompt=prompt)
    return first_frame(run.blocks[0], speaker.intervals(run.blocks))


def _summary(found: Sequence[FirstFrame]) -> Figures:
    """Means of the parts, which add up; for TTFF also the median and the largest."""
    parts = ("ttff_s", "block_wait_s", "denoising_s", "decoding_s", "rest_s")
    means = {part: fmean(getattr(one, part) for one in found) for part in parts}
    return {**means, **_times([one.ttff_s for one in found]), "over_parts": _over_parts(found)}


def _times(ttff_s: Sequence[float]) -> Figures:
    return {"ttff_median_s": median(ttff_s), "ttff_longest_s": max(ttff_s)}


def _over_parts(found: Sequence[FirstFrame]) -> float:
    return median(one.over_parts for one in found)


def _check(how: str, found: Sequence[FirstFrame], at_most: float) -> Figures:
    what = f"TTFF by the sum of its parts, speech {how}, known avatar"
    return check(what, _over_parts(found), at_most=at_most)


def _picture(context: Context, found: dict[str, list[FirstFrame]]) -> None:
    plot = axes("TTFF and its parts (means)", "seconds", "")
    names, left = list(found)[::-1], [0.0] * len(found)
    shown = {"block_wait_s": "#d5dbe5", "denoising_s": "#3b6fd4", "decoding_s": GREEN, "rest_s": "#c4513a"}
    for part, colour in shown.items():
        widths = [fmean(getattr(one, part) for one in found[name]) for name in names]
        plot.barh(names, widths, left=left, color=colour, label=part.removesuffix("_s").replace("_", " "))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    plot.legend(frameon=False, loc="lower right")
    save(plot, context.picture("start"))


SCENARIO = Scenario("start", "TTFF and its parts: avatars that are new to the server, and one that it knows", measure)
