"""Makes the demo's assets anew: `python -m live_avatar.assets.make_assets`.

The portrait is drawn from the shapes below with Pillow; the speech is synthesised by espeak-ng. Nothing here
is read at run time: the package ships the results.
"""

import io
import shutil
import subprocess
import wave
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from live_avatar.assets import PORTRAIT, SPEECH

Point = tuple[float, float]
Array = NDArray[np.float64]

PORTRAIT_SIZE = 512  # pixels, and the unit of every coordinate below
SUPERSAMPLING = 4

BACKGROUND, HALO = "#8fc7bf", "#a9d8cf"
SKIN, SKIN_SHADE, BLUSH = "#f2c6a2", "#dda27d", "#ec9a86"
HAIR, HAIR_SHADE, HAIR_LIGHT = "#4b2e26", "#371f1a", "#6b4436"
SWEATER, SWEATER_SHADE = "#d9674c", "#bd5039"
EYE_WHITE, IRIS, INK = "#fffaf4", "#5b7f5a", "#2b1b18"
LIP_UPPER, LIP_LOWER, LIP_LINE = "#c4605a", "#d5766d", "#8f3d3b"

SPEECH_TEXT = "Hello. I am a live avatar. You speak, and I move my lips while the words arrive."
ESPEAK = ("espeak-ng", "-v", "en-us+Annie", "-s", "150", "--stdout", SPEECH_TEXT)
SPEECH_RATE_HZ = 16_000
SPEECH_PEAK = 10 ** (-3 / 20)  # -3 dBFS
SILENCE = 0.01  # of the peak: quieter than this at either end is cut away
MARGIN_S = 0.1
FADE_S = 0.02


class Canvas:
    """A supersampled picture on which filled splines are drawn in portrait coordinates."""

    def __init__(self, colour: str) -> None:
        side = PORTRAIT_SIZE * SUPERSAMPLING
        self.image = Image.new("RGB", (side, side), colour)

    def mask(self, outline: Sequence[Point], blur: float = 0.0) -> Image.Image:
        """The inside of a polygon as an 8-bit mask, its edge softened by `blur` portrait pixels."""
        mask = Image.new("L", self.image.size, 0)
        ImageDraw.Draw(mask).polygon([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in outline], fill=255)
        return mask.filter(ImageFilter.GaussianBlur(blur * SUPERSAMPLING)) if blur else mask

    def fill(
        self,
        outline: Sequence[Point],
        colour: str,
        *,
        opacity: float = 1.0,
        blur: float = 0.0,
        inside: Sequence[Point] | None = None,
    ) -> None:
        """Paint the polygon, clipped to another one where `inside` is given."""
        mask = self.mask(outline, blur)
        if inside is not None:
            mask = ImageChops.multiply(mask, self.mask(inside))
        self.image.paste(colour, (0, 0), mask.point(lambda value: int(value * opacity)))

    def finished(self) -> Image.Image:
        return self.image.resize((PORTRAIT_SIZE, PORTRAIT_SIZE), Image.Resampling.LANCZOS)


def as_points(array: Array) -> list[Point]:
    return [(float(x), float(y)) for x, y in array]


def catmull_rom(a: Array, b: Array, c: Array, d: Array, t: Array) -> Array:
    """The curve from b (t = 0) to c (t = 1), where a comes before and d after."""
    curve: Array = 2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
    return 0.5 * curve


def spline(points: Sequence[Point], steps: int = 24) -> list[Point]:
    """The closed Catmull-Rom curve through the points."""
    p = np.asarray(points, dtype=np.float64)
    t = np.linspace(0.0, 1.0, steps, endpoint=False)[:, None]
    curve: list[Point] = []
    for i in range(len(p)):
        a, b, c, d = (p[(i + k) % len(p)] for k in (-1, 0, 1, 2))
        curve += as_points(catmull_rom(a, b, c, d, t))
    return curve


def ellipse(cx: float, cy: float, rx: float, ry: float) -> list[Point]:
    angle = np.linspace(0.0, 2 * np.pi, 180, endpoint=False)
    return as_points(np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1))


def stroke(points: Sequence[Point], width: float) -> list[Point]:
    """The outline of a brush stroke through the points: full in the middle, fine at both ends."""
    p = np.asarray(points, dtype=np.float64)
    along = np.linspace(0.0, len(p) - 1.0, 60)
    padded = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    i = np.minimum(along.astype(int), len(p) - 2)
    t = (along - i)[:, None]
    a, b, c, d = (padded[i + k] for k in range(4))
    middle = catmull_rom(a, b, c, d, t)
    tangent = np.gradient(middle, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    half = 0.5 * width * np.sin(np.linspace(0.0, np.pi, 60))[:, None] ** 0.6
    edge = np.concatenate([middle + normal * half, (middle - normal * half)[::-1]])
    return as_points(edge)


def mirrored(points: Sequence[Point]) -> list[Point]:
    """The points of the left half, followed by their mirror images from the last to the first."""
    return [*points, *[(PORTRAIT_SIZE - x, y) for x, y in reversed(points)]]


def flipped(points: Sequence[Point]) -> list[Point]:
    return [(PORTRAIT_SIZE - x, y) for x, y in points]


FACE = spline(mirrored([(236, 120), (186, 144), (165, 200), (166, 262), (180, 314), (208, 350), (238, 368)]))
SHOULDERS = spline(mirrored([(216, 404), (168, 420), (106, 438), (66, 470), (46, 540), (40, 600), (200, 620)]))


def draw_back(canvas: Canvas) -> None:
    """What lies behind the face: halo, the hair's back, neck and sweater."""
    canvas.fill(ellipse(256, 250, 214, 214), HALO)
    hair = mirrored([(240, 58), (180, 72), (138, 120), (118, 196), (110, 290), (116, 352), (150, 384), (206, 388)])
    canvas.fill(spline(hair), HAIR_SHADE)
    neck = spline(mirrored([(214, 310), (212, 360), (210, 400), (196, 424), (214, 470)]))
    canvas.fill(SHOULDERS, SWEATER)
    canvas.fill(spline(mirrored([(206, 396), (188, 418), (206, 452), (240, 466)])), SWEATER_SHADE)
    canvas.fill(neck, SKIN, inside=ellipse(256, 380, 62, 72))
    canvas.fill(ellipse(256, 338, 74, 58), SKIN_SHADE, opacity=0.8, inside=neck)
    sleeve = [(128, 470), (134, 500), (130, 540)]
    canvas.fill(stroke(sleeve, 5), SWEATER_SHADE)
    canvas.fill(stroke(flipped(sleeve), 5), SWEATER_SHADE)


def draw_face(canvas: Canvas) -> None:
    for ear in (ellipse(164, 252, 17, 27), ellipse(348, 252, 17, 27)):
        canvas.fill(ear, SKIN_SHADE)
    canvas.fill(FACE, SKIN)
    for cheek in (ellipse(200, 290, 24, 16), ellipse(312, 290, 24, 16)):
        canvas.fill(cheek, BLUSH, opacity=0.55, blur=9, inside=FACE)
    canvas.fill(stroke([(261, 236), (266, 262), (270, 279), (256, 285), (246, 281)], 4), SKIN_SHADE)


def draw_eye(canvas: Canvas, cx: float, outward: int) -> None:
    """One eye and its brow; `outward` is -1 for the eye on the left of the picture and 1 for the other."""

    def at(*points: Point) -> list[Point]:
        return [(cx + outward * x, 238 + y) for x, y in points]

    white = spline(at((-24, 4), (-13, -10), (2, -15), (16, -9), (25, 1), (14, 10), (0, 13), (-13, 11)))
    canvas.fill(white, EYE_WHITE)
    canvas.fill(ellipse(cx, 238, 14, 15), IRIS, inside=white)
    canvas.fill(ellipse(cx, 238, 7.5, 8), INK, inside=white)
    canvas.fill(ellipse(cx + 4.5, 232.5, 4, 4), "#ffffff", inside=white)
    canvas.fill(stroke(at((-26, 5), (-14, -11), (2, -17), (17, -11), (30, -3)), 5.5), INK)
    canvas.fill(stroke(at((-12, 13), (0, 14.5), (14, 11)), 1.8), SKIN_SHADE)
    canvas.fill(stroke(at((-25, -31), (-8, -40), (12, -40), (31, -30)), 7), HAIR)


def draw_mouth(canvas: Canvas) -> None:
    bow = mirrored([(220, 317.5), (235, 313.5), (248, 312), (255, 315)])
    canvas.fill(
        spline([*mirrored([(224, 318.5), (238, 322.5), (255, 324.5)]), (276, 332), (256, 337), (236, 332)]),
        LIP_LOWER,
    )
    canvas.fill(spline([*bow, (276, 322.5), (256, 325), (236, 322.5)]), LIP_UPPER)
    canvas.fill(stroke([(215, 315), (234, 322), (256, 324.5), (278, 322), (297, 315)], 3.2), LIP_LINE)
    canvas.fill(stroke([(244, 347), (256, 349), (268, 347)], 3), SKIN_SHADE, opacity=0.7)


def draw_hair(canvas: Canvas) -> None:
    """The front of a bob with a side parting."""
    left_rim = [(290, 84), (240, 68), (184, 82), (144, 128), (124, 204), (116, 296), (124, 356)]
    left_edge = [(150, 373), (168, 340), (164, 282), (164, 226), (178, 186), (214, 160), (262, 134)]
    right_rim = [(276, 76), (324, 80), (364, 118), (385, 172), (394, 236), (397, 306), (387, 357)]
    right_edge = [(361, 373), (344, 338), (348, 282), (348, 226), (336, 176), (310, 142), (284, 116)]
    canvas.fill(spline([*left_rim, *left_edge]), HAIR)
    canvas.fill(spline([*right_rim, *right_edge]), HAIR)
    for strand in (
        [(268, 96), (214, 108), (170, 148), (150, 208)],
        [(238, 86), (190, 102), (156, 146)],
        [(312, 98), (348, 128), (366, 186)],
    ):
        canvas.fill(stroke(strand, 5), HAIR_LIGHT)


def draw_portrait() -> Image.Image:
    canvas = Canvas(BACKGROUND)
    draw_back(canvas)
    draw_face(canvas)
    draw_eye(canvas, 213, -1)
    draw_eye(canvas, 299, 1)
    draw_mouth(canvas)
    draw_hair(canvas)
    return canvas.finished()


def resampled(samples: Array, from_hz: int, to_hz: int) -> Array:
    """Band-limited resampling of a whole clip, by cutting or padding its spectrum."""
    count = round(len(samples) * to_hz / from_hz)
    spectrum = np.fft.rfft(samples)[: count // 2 + 1]
    return np.fft.irfft(spectrum, count) * (count / len(samples))


def finished_speech(samples: Array) -> NDArray[np.int16]:
    """Silence cut to a margin, faded at both ends, peak at -3 dBFS, as int16."""
    loud = np.flatnonzero(np.abs(samples) > SILENCE * np.abs(samples).max())
    margin = round(MARGIN_S * SPEECH_RATE_HZ)
    clip = samples[max(loud[0] - margin, 0) : loud[-1] + margin]
    clip = clip - clip.mean()
    ramp = np.linspace(0.0, 1.0, round(FADE_S * SPEECH_RATE_HZ))
    clip[: len(ramp)] *= ramp
    clip[-len(ramp) :] *= ramp[::-1]
    scale: float = SPEECH_PEAK * np.iinfo(np.int16).max / np.abs(clip).max()
    finished: NDArray[np.int16] = (clip * scale).round().astype(np.int16)
    return finished


def synthesise_speech() -> NDArray[np.int16]:
    if shutil.which(ESPEAK[0]) is None:
        raise SystemExit(
            f"speech.wav was left as it is: the program {ESPEAK[0]!r} was not found on PATH. "
            "Install it (on Debian and Ubuntu: apt-get install espeak-ng) and run this again."
        )
    spoken = subprocess.run(ESPEAK, check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(spoken)) as reader:
        rate_hz, data = reader.getframerate(), reader.readframes(reader.getnframes())
    samples = np.frombuffer(data, dtype="<i2").astype(np.float64)
    return finished_speech(resampled(samples, rate_hz, SPEECH_RATE_HZ))


def write_speech(samples: NDArray[np.int16]) -> None:
    with wave.open(str(SPEECH), "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SPEECH_RATE_HZ)
        writer.writeframes(samples.astype("<i2").tobytes())


def main() -> None:
    draw_portrait().save(PORTRAIT, optimize=True)
    write_speech(synthesise_speech())


if __name__ == "__main__":
    main()
