"""Measures what the invisible mark survives, how often it is found where none is, its quality and its speed.

`python -m perf.watermark --photographs FOLDER --work out/watermark.jsonl` measures clip after clip and writes a line
for each; a run that was stopped goes on behind the last. `--report perf/results/watermark.json` then counts.

The clips: drawn faces of `training/data` at 720x400 and at 96x96, each of its own identity, and photographs at 720x400,
over which a camera moves slowly. Each clip has a key and numbers of its own. Photographs: every picture of the folder
with at least 250x140 pixels, in turn, each time another part. The run of record used those of scikit-image 0.26.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
import click
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.config import FPS
from live_avatar.errors import InputError
from live_avatar.watermark.code import TILE, code_of
from live_avatar.watermark.detect import FALSE_ALARM, READINGS, Views, find, read, turned
from live_avatar.watermark.embed import SMOOTH_STRENGTH, STRENGTH, Watermark
from live_avatar.watermark.frames import read_frames
from live_avatar.watermark.key import CHECK_BITS, SYMBOLS, Origin, WatermarkKey
from training.data.clips import render
from training.data.face import Face
from training.data.identity import draw_identity
from training.data.split import Part, Split, generator

LARGE: Final = (400, 720)
SMALL: Final = (96, 96)
LARGE_FRAMES: Final = 25
SMALL_FRAMES: Final = 150
STREAM_FRAMES: Final = 300
"""Length of the stream of which ten seconds are recorded."""
RECORDED_FRAMES: Final = 250
CROP: Final = 0.9
SHORT_CHECK_BITS: Final = 8
"""Bits of the check that a count of readings can test: they agree by chance once in 256."""
SHORT_READINGS: Final = 1_000
"""Readings of a clip that are counted so, at random shifts."""
SHORT_CHECK: Final = slice(SYMBOLS - CHECK_BITS // 8, SYMBOLS - CHECK_BITS // 8 + SHORT_CHECK_BITS // 8)

Attack = Callable[[Array, Path, np.random.Generator], None]


# ---- Clips


def faces(seed: int, frames: int, height: int, width: int) -> Array:
    """A drawn face that talks, uint8 [frames, height, width, 3], with the wall behind it widened to the sides."""
    side = min(height, width)
    mouth = np.abs(np.sin(np.arange(frames)[:, None] * (0.7, 0.23) + seed))
    face = Face(draw_identity(Split.TRAIN, seed), side)
    drawn = np.stack(list(render(face, mouth, generator(Split.TRAIN, seed, Part.MOTION))))
    left, top = (width - side) // 2, (height - side) // 2
    return np.pad(drawn, [(0, 0), (top, height - side - top), (left, width - side - left), (0, 0)], mode="edge")


def photograph(path: Path, seed: int, frames: int, height: int, width: int) -> Array:
    """A slow pan over a part of a photograph, uint8 [frames, height, width, 3]."""
    random = np.random.default_rng(seed)
    picture = Image.open(path).convert("RGB")
    scale = random.uniform(1.1, 1.5) * max(height / picture.height, width / picture.width)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    spare = np.array([picture.width - width, picture.height - height])
    middle, reach = spare / 2 * random.uniform(0.8, 1.2, 2), np.minimum(12, spare * 0.3)
    turns = np.sin(np.arange(frames)[:, None] / FPS / random.uniform(1.0, 2.5, 2))
    return np.stack(
        [
            np.asarray(
                picture.transform((width, height), Image.Transform.AFFINE, (1, 0, x, 0, 1, y), Image.Resampling.BICUBIC)
            )
            for x, y in middle + reach * turns
        ]
    )


# ---- Attacks


def encode(frames: Array | Sequence[Array], path: Path, crf: int, fps: int = FPS) -> None:
    """H.264 by libx264, preset veryfast, with even sides."""
    height, width = (side - side % 2 for side in frames[0].shape[:2])
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def resized(frames: Array, height: int, width: int) -> Array:
    """Bicubic by FFmpeg, uint8 [n, height, width, 3]."""
    pictures = (av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in frames)
    return np.stack(
        [p.reformat(width, height, interpolation=Interpolation.BICUBIC).to_ndarray(format="rgb24") for p in pictures]
    )


def scaled(factor: float) -> Attack:
    """Another size, then CRF 23."""

    def attack(frames: Array, path: Path, random: np.random.Generator) -> None:
        height, width = (round(factor * side) for side in frames.shape[1:3])
        encode(resized(frames, height, width), path, 23)

    return attack


def cropped(back: bool) -> Attack:
    """A tenth of width and height is cut off somewhere, then CRF 23; back: the rest is stretched to the old size."""

    def attack(frames: Array, path: Path, random: np.random.Generator) -> None:
        height, width = frames.shape[1:3]
        rows, columns = round(CROP * height), round(CROP * width)
        top, left = random.integers(0, height - rows + 1), random.integers(0, width - columns + 1)
        part = frames[:, top : top + rows, left : left + columns]
        encode(resized(part, height, width) if back else part, path, 23)

    return attack


def coded(crf: int) -> Attack:
    return lambda frames, path, random: encode(frames, path, crf)


def jpeg(frames: Array, path: Path, random: np.random.Generator) -> None:
    """One frame as a JPEG of quality 70."""
    Image.fromarray(frames[random.integers(len(frames))]).save(path, "JPEG", quality=70)


def recording(frames: Array, path: Path, random: np.random.Generator) -> None:
    """Ten seconds out of a stream at CRF 23, played at 1.37 times its size on a grey screen, recorded at 30 frames per
    second and CRF 23."""
    encode(frames, path, 23)
    start = int(random.integers(0, len(frames) - RECORDED_FRAMES + 1))
    with av.open(str(path)) as container:
        played = [f.to_ndarray(format="rgb24") for n, f in enumerate(container.decode(video=0)) if n >= start]
    height, width = (round(1.37 * side) for side in played[0].shape[:2])
    rows, columns = height + 48, width + 64
    if len(frames[0]) == SMALL[0]:
        rows, columns = 2 * height, 2 * width
    top, left = int(random.integers(0, rows - height)), int(random.integers(0, columns - width))
    screen = np.full((rows, columns, 3), 96, dtype=np.uint8)
    shown = []
    for frame in played[:RECORDED_FRAMES]:
        screen[top : top + height, left : left + width] = resized(frame[None], height, width)[0]
        shown.append(screen.copy())
    times = np.arange(RECORDED_FRAMES * 30 // FPS) * FPS // 30
    encode([shown[time] for time in times], path, 23, fps=30)


def turned_picture(frames: Array, path: Path, random: np.random.Generator) -> None:
    """Turned by two degrees, then CRF 23."""
    turn = Image.Resampling.BICUBIC
    encode([np.asarray(Image.fromarray(frame).rotate(2, turn)) for frame in frames], path, 23)


ATTACKS: Final[dict[str, Attack]] = {
    "H.264 CRF 23": coded(23),
    "H.264 CRF 28": coded(28),
    "half size": scaled(0.5),
    "double size": scaled(2.0),
    "10 % crop": cropped(back=False),
    "10 % crop, stretched": cropped(back=True),
    "JPEG 70, one frame": jpeg,
    "10 s recording of the screen": recording,
}
REMOVERS: Final[dict[str, Attack]] = {
    "H.264 CRF 35": coded(35),
    "mirrored": lambda frames, path, random: encode(frames[:, :, ::-1], path, 23),
    "turned by 2 degrees": turned_picture,
    "a third of the size": scaled(1 / 3),
}
"""Attacks that the mark is not made for."""
LONG: Final = ("double size", "10 s recording of the screen")
GROUPS: Final[tuple[dict[str, Attack], ...]] = (
    {name: attack for name, attack in ATTACKS.items() if name not in LONG},
    {name: ATTACKS[name] for name in LONG},
    REMOVERS,
)
"""Attacks that are tried together, each group on all clips before the next. With the last group, clips without a mark
are searched."""
LARGE_LONG_CLIPS: Final = 20
"""The groups behind the first take long, and are tried on so many of the large clips only."""


# ---- One clip


def measure(kind: str, seed: int, frames: Array, group: int) -> dict[str, Any]:
    """The figures of one clip after the attacks of a group."""
    random = np.random.default_rng([seed, group])
    key = WatermarkKey(random.bytes(32))
    origin = Origin(int(random.integers(2**16)), int(random.integers(2**48)))
    mark = Watermark(key, origin, *frames.shape[1:3])
    began_s = time.process_time()
    marked = mark.apply(frames, 0)
    apply_s = time.process_time() - began_s
    record: dict[str, Any] = {
        "kind": kind,
        "seed": seed,
        "group": group,
        "psnr_db": psnr(frames, marked),
        "fps": len(frames) / apply_s,
        "attacks": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip"
        for name, attack in GROUPS[group].items():
            is_short = attack is recording and len(frames) < STREAM_FRAMES
            attack(mark.apply(_there_and_back(frames, STREAM_FRAMES), 0) if is_short else marked, file, random)
            began_s = time.process_time()
            found = find(key, read_frames(file).evidence)
            record["attacks"][name] = {
                "found": found is not None and found.origin == origin,
                "wrong": found is not None and found.origin != origin,
                "z": None if found is None else round(found.z, 1),
                "seconds": round(time.process_time() - began_s, 1),
            }
        if group == len(GROUPS) - 1:
            encode(frames, file, 23)
            record["without_mark"] = without_mark(file, random)
    return record


def psnr(frames: Array, marked: Array) -> float:
    """Peak signal-to-noise ratio in decibels, over all values."""
    squares = [np.mean(np.square(a.astype(np.float32) - b)) for a, b in zip(frames, marked, strict=True)]
    return float(10 * np.log10(255**2 / np.mean(squares)))


def without_mark(file: Path, random: np.random.Generator) -> dict[str, Any]:
    """Searches a file without a mark by a random key; counts readings whose check agrees in its first bits."""
    key, seen = WatermarkKey(random.bytes(32)), read_frames(file).evidence
    began_s = time.process_time()
    alarm = find(key, seen) is not None
    seconds = time.process_time() - began_s
    code = code_of(key)
    waves = Views(seen.mean(), code).waves((1.0, 1.0))
    agreeing = 0
    for shift in random.integers(TILE, size=(SHORT_READINGS, 2)):
        symbols = read(code, turned(code, waves, (shift[0], shift[1])))
        true = key.symbols(Origin(*_numbers(symbols)))
        agreeing += bool((true == symbols)[SHORT_CHECK].all())
    return {"alarm": alarm, "readings": SHORT_READINGS, "agreeing": agreeing, "search_s": round(seconds, 1)}


def _numbers(symbols: Array) -> tuple[int, int]:
    data = bytes(int(symbol) for symbol in symbols)
    return int.from_bytes(data[:2]), int.from_bytes(data[2:8])


def _there_and_back(frames: Array, count: int) -> Array:
    """Frames played forwards and backwards until there are `count`."""
    turn = np.concatenate([np.arange(len(frames)), np.arange(len(frames) - 2, 0, -1)])
    repeated: Array = frames[np.resize(turn, count)]
    return repeated


# ---- All clips


def clips(photographs: Sequence[Path], count: int) -> Iterator[tuple[str, int, Callable[[], Array]]]:
    """Kind, number and frames of each clip; of the large ones every third is a photograph."""
    for seed in range(count):
        if seed % 3 == 2:
            path = photographs[seed // 3 % len(photographs)]
            yield f"photograph {path.stem}", seed, lambda p=path, s=seed: photograph(p, s, LARGE_FRAMES, *LARGE)  # type: ignore[misc]
        else:
            yield "face 720x400", seed, lambda s=seed: faces(s, LARGE_FRAMES, *LARGE)  # type: ignore[misc]
        yield "face 96x96", seed, lambda s=seed: faces(s, SMALL_FRAMES, *SMALL)  # type: ignore[misc]


def usable(folder: Path) -> list[Path]:
    """The photographs of a folder, by name. Raises `InputError` if there is none."""
    found = []
    for path in sorted(folder.iterdir()):
        try:
            with Image.open(path) as picture:
                if picture.width >= 250 and picture.height >= 140:
                    found.append(path)
        except OSError:
            continue
    if not found:
        raise InputError(f"{folder} has no picture of at least 250x140 pixels; give a folder of photographs.")
    return found


def report(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the lines of all clips count to."""
    records = joined(lines)
    groups = {
        "faces 720x400": [r for r in records if r["kind"] == "face 720x400"],
        "photographs 720x400": [r for r in records if r["kind"].startswith("photograph")],
        "faces 96x96": [r for r in records if r["kind"] == "face 96x96"],
    }
    unmarked = [r["without_mark"] for r in records if "without_mark" in r]
    readings, agreeing = (sum(r[name] for r in unmarked) for name in ("readings", "agreeing"))
    return {
        "strength": {"textured": STRENGTH, "smooth": SMOOTH_STRENGTH},
        "groups": {name: _group(some) for name, some in groups.items() if some},
        "false_alarms": {
            "files_without_mark": len(unmarked),
            "alarms": sum(r["alarm"] for r in unmarked),
            "wrong_numbers": sum(a["wrong"] for r in records for a in r["attacks"].values()),
            "searches_of_marked_files": sum(len(r["attacks"]) for r in records),
            "bound_for_a_file": FALSE_ALARM,
            "readings_for_a_file": READINGS,
            "check_bits": CHECK_BITS,
            "readings": readings,
            f"readings_that_agree_in_{SHORT_CHECK_BITS}_bits": agreeing,
            "expected_by_chance": readings / 2**SHORT_CHECK_BITS,
        },
    }


def joined(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record for each clip, of which each group of attacks has a line."""
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for line in lines:
        before = records.get((line["kind"], line["seed"]), {"attacks": {}})
        attacks = {**before["attacks"], **line["attacks"]}
        records[line["kind"], line["seed"]] = {**before, **line, "attacks": attacks}
    return list(records.values())


def _group(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    attacks = {}
    for name in (*ATTACKS, *REMOVERS):
        some = [r["attacks"][name] for r in records if name in r["attacks"]]
        z = [a["z"] for a in some if a["found"]]
        attacks[name] = {
            "clips": len(some),
            "found": sum(a["found"] for a in some),
            "z_median": float(np.median(z)) if z else None,
            "seconds_median": float(np.median([a["seconds"] for a in some])) if some else None,
        }
    lost: dict[str, list[str]] = {}
    for record in records:
        for name, attack in record["attacks"].items():
            if not attack["found"]:
                lost.setdefault(name, []).append(f"{record['kind']} {record['seed']}")
    return {
        "clips": len(records),
        "psnr_db_least": min(r["psnr_db"] for r in records),
        "psnr_db_median": float(np.median([r["psnr_db"] for r in records])),
        "fps_median": float(np.median([r["fps"] for r in records])),
        "fps_least": min(r["fps"] for r in records),
        "search_without_mark_s": [r["without_mark"]["search_s"] for r in records if "without_mark" in r],
        "attacks": attacks,
        "lost": lost,
    }


def table(counted: Mapping[str, Any]) -> str:
    """The figures as a Markdown table: how many of how many clips still show their mark."""
    groups = counted["groups"]
    lines = [f"| | {' | '.join(groups)} |", f"|---|{'---|' * len(groups)}"]
    for name in (*ATTACKS, *REMOVERS):
        cells = [group["attacks"][name] for group in groups.values()]
        shares = (f"{cell['found']} of {cell['clips']}" for cell in cells)
        lines.append(f"| {name} | {' | '.join(shares)} |")
    for title, name, form in (
        ("PSNR, least", "psnr_db_least", "{:.1f} dB"),
        ("PSNR, median", "psnr_db_median", "{:.1f} dB"),
        ("frames/s, median", "fps_median", "{:,.0f}"),
    ):
        lines.append(f"| {title} | {' | '.join(form.format(group[name]) for group in groups.values())} |")
    return "\n".join(lines)


@click.command()
@click.option("--photographs", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--work", type=click.Path(path_type=Path), default="out/watermark.jsonl", show_default=True)
@click.option("--clips", "count", type=click.IntRange(min=1), default=100, show_default=True, help="Of each size.")
@click.option("--minutes", type=float, default=1e9, help="Stop after so long; another run goes on.")
@click.option("--report", "output", type=click.Path(path_type=Path), help="Count what is there, and write JSON.")
def main(photographs: Path, work: Path, count: int, minutes: float, output: Path | None) -> None:
    """Attack marked clips, and count where the mark is found."""
    work.parent.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in work.read_text().splitlines()] if work.exists() else []
    done = {(r["kind"], r["seed"], r["group"]) for r in records}
    end_s = time.monotonic() + 60 * minutes
    pictures = usable(photographs)
    for group in range(len(GROUPS)):
        for kind, seed, frames in clips(pictures, count):
            is_skipped = group > 0 and kind != "face 96x96" and seed >= LARGE_LONG_CLIPS
            if is_skipped or (kind, seed, group) in done or time.monotonic() > end_s:
                continue
            records.append(measure(kind, seed, frames(), group))
            with work.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
            print(kind, seed, " ".join("1" if a["found"] else "0" for a in records[-1]["attacks"].values()), flush=True)
    if output:
        counted = report(records)
        output.write_text(json.dumps(counted, indent=1) + "\n")
        print(f"{table(counted)}\nWrote {output} ({len(joined(records))} clips).")


if __name__ == "__main__":
    main()
