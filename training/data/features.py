"""The parts of a drawn face, each drawn on a canvas from an identity's looks. Lengths are the canvas's units."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from live_avatar.arrays import Array
from training.data.canvas import Canvas, Colour, Point, ellipse, mix
from training.data.identity import BACKGROUNDS, CLOTHES, EYES, HAIR, SKIN, Identity

HEAD = (48.0, 46.0)
RADII = (23.5, 31.0)
MOUTH = (48.0, 61.5)
"""Middle of the closed mouth."""
OPEN_UP, OPEN_DOWN = 2.0, 10.5
"""How far the lips part at opening 1."""
HALF_WIDTHS = (6.5, 12.5)
"""Half the mouth's width at width 0 and 1."""
EYE_HEIGHT, EYE_DISTANCE = 44.0, 10.0
EYE_RADII = (4.6, 3.9)
RESTING_LID = 0.12
"""How much of an open eye its lid covers."""

WHITE: Colour = (250, 250, 250)
BLACK: Colour = (34, 30, 36)
INSIDE: Colour = (54, 14, 24)
TEETH: Colour = (240, 236, 230)
TONGUE: Colour = (122, 36, 50)
_BLUSH: Colour = (224, 92, 92)
_LIPS: Colour = (192, 58, 72)

_ALONG = np.linspace(-1, 1, 33)
"""From the left corner of the mouth to the right one."""
_ROUND = np.sqrt(1 - _ALONG**2)

_HAIRLINES: dict[str, Callable[[Array], Array]] = {
    "long": lambda u: 24 + 18 * np.abs(u) ** 1.6,
    "bob": lambda u: 26 + 11 * np.abs(u + 0.4) ** 1.7,
    "bun": lambda u: 27 + 14 * u**2,
    "curly": lambda u: 30 + 1.6 * np.cos(5 * np.pi * u) + 7 * u**4,
    "fringe": lambda u: 35.5 + 0.5 * np.cos(9 * np.pi * u) + 3 * u**4,
    "short": lambda u: 27 + 10 * u**6,
    "parted": lambda u: 24 + 7 * np.abs(u - 0.45) ** 1.5 + 14 * u**10,
    "spiky": lambda u: 27 + 3.0 * np.abs((3.5 * u) % 1 - 0.5) + 10 * u**6,
}
"""Height of the hair's edge on the forehead, from the left temple at -1 to the right one at 1, by style."""

_HAIR_BOTTOMS = {"bob": 72, "fringe": 84, "long": 96}
"""Length of the hair behind the neck."""


class Features:
    """The looks of one identity as colours and lengths, with the drawing of each part."""

    def __init__(self, identity: Identity) -> None:
        looks = identity.looks
        hair, skin, clothes, background = identity.tints
        self.hair = _tinted(HAIR[looks["hair"]], hair)
        self.skin = _tinted(SKIN[looks["skin"]], skin)
        self.clothes = _tinted(CLOTHES[looks["clothes"]], clothes)
        self.background = _tinted(BACKGROUNDS[looks["background"]], background)
        self._eyes = EYES[looks["eyes"]]
        self._woman = looks["person"] == "woman"
        self._style = looks["style"]
        self._glasses = looks["glasses"]
        self._identity = identity
        self._shadow = mix(self.skin, (96, 36, 30), 0.28)
        self._lips = mix(self.skin, _LIPS, 0.62 if self._woman else 0.38)

    def draw_body(self, canvas: Canvas) -> None:
        """Neck, shoulders and clothes."""
        shade = mix(self.clothes, BLACK, 0.25)
        canvas.polygon(ellipse((48, 112), 45, 28), self.clothes)
        canvas.ellipse((48, 84.5), 14, 7.5, shade)
        canvas.polygon([(38.5, 66), (57.5, 66), (58.5, 86), (48, 91), (37.5, 86)], self.skin)
        canvas.ellipse((48, 84.5), 11.8, 5.6, self.skin)
        canvas.glow(ellipse((48, 72), 16, 11), 2.5, self._shadow, 0.9)

    def draw_back_hair(self, canvas: Canvas) -> None:
        """Hair and other parts behind head and neck."""
        bottom = _HAIR_BOTTOMS.get(self._style)
        if bottom is not None:
            ends = [(79, bottom - 6), (73, bottom), (23, bottom), (17, bottom - 6)]
            canvas.polygon(self._outline(4.5), self.hair)
            canvas.polygon([(20, 40), (76, 40), *ends], self.hair)
            canvas.glow(ellipse((48, min(bottom, 84)), 20, 14), 4, BLACK, 0.3)
        elif self._style == "bun":
            canvas.ellipse((48, 11), 10, 9, self.hair)
            canvas.glow(ellipse((48, 17), 11, 5), 1.5, BLACK, 0.3)
        elif self._style == "curly":
            reach = 205 if self._woman else 168
            for angle in np.radians(np.arange(-90 - reach / 2, -89 + reach / 2, reach / 12)):
                middle = (HEAD[0] + 26 * np.cos(angle), HEAD[1] - 1 + 31 * np.sin(angle))
                canvas.ellipse(middle, 8.5, 8.5, self.hair)

    def draw_head(self, canvas: Canvas) -> None:
        """Ears, face, nose, cheeks and the hair in front: all but eyes and mouth."""
        rx = RADII[0] * self._identity.width
        for side in (-1, 1):
            canvas.ellipse((HEAD[0] + side * rx, 49), 4.2, 6.2, mix(self.skin, self._shadow, 0.35))
            canvas.ellipse((HEAD[0] + side * rx, 49.5), 2.2, 3.8, self._shadow)
        canvas.polygon(self._outline(), self.skin)
        canvas.glow(ellipse((42, 36), 15, 14), 5, WHITE, 0.18)
        canvas.glow(self._jaw(), 2.2, self._shadow, 0.6)
        for side in (-1, 1):
            canvas.glow(ellipse((48 + side * 14.5, 55), 4.6, 3.4), 1.8, _BLUSH, 0.42 if self._woman else 0.22)
        self._draw_nose(canvas)
        if self._style != "bald":
            self._draw_front_hair(canvas)

    def draw_eyes(self, canvas: Canvas, lid: float) -> None:
        """Eyes, brows and glasses. lid: 0 open, 1 shut."""
        for side in (-1, 1):
            middle = (48 + side * (EYE_DISTANCE + 0.7 * self._identity.eye_distance), EYE_HEIGHT)
            self._draw_eye(canvas, middle, lid)
            self._draw_brow(canvas, middle, side)
            self._draw_glass(canvas, middle, side)

    def draw_mouth(self, canvas: Canvas, opening: float, width: float) -> None:
        """Lips, and between them the dark inside with teeth and tongue. opening and width: 0..1."""
        size = 1 + 0.06 * self._identity.mouth_size
        half = size * np.interp(width, [0, 1], HALF_WIDTHS)
        upper_lip, lower_lip = (1.9, 2.5) if self._woman else (1.3, 1.8)
        smile = 1.0 - (0.25 * half) * _ALONG**2
        x = MOUTH[0] + half * _ALONG
        upper = MOUTH[1] + smile - size * OPEN_UP * opening * _ROUND
        lower = MOUTH[1] + smile + size * OPEN_DOWN * opening * _ROUND
        bow = 1 - 0.35 * np.exp(-((_ALONG / 0.16) ** 2))
        canvas.polygon(_between(x, upper - upper_lip * bow * _ROUND, lower + lower_lip * _ROUND), self._lips)
        gloss = lower + lower_lip * _ROUND * np.array([[0.45], [0.8]])
        canvas.polygon(_between(x[10:-10], *gloss[:, 10:-10]), mix(self._lips, WHITE, 0.25))
        canvas.polygon(_between(x, upper, lower), INSIDE)
        height = lower - upper
        middle = slice(5, -5)
        canvas.polygon(_between(x[middle], (upper + 0.64 * height)[middle], lower[middle]), TONGUE)
        canvas.polygon(_between(x[middle], upper[middle], (upper + 0.24 * height)[middle]), TEETH)
        canvas.line(np.stack([x, upper], 1), 0.7, mix(self._lips, INSIDE, 0.6))

    def _outline(self, grown: float = 0.0) -> Array:
        """Points around the face, narrower at the chin, [n, 2]; the first is at the right, the next below it."""
        angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
        rx, ry = RADII[0] * self._identity.width + grown, RADII[1] * self._identity.height + grown
        narrow = 1 - 0.1 * np.maximum(0, np.sin(angles)) ** 2
        return np.stack([HEAD[0] + rx * np.cos(angles) * narrow, HEAD[1] + ry * np.sin(angles)], 1)

    def _jaw(self) -> Array:
        """The face's lower edge, a crescent, [n, 2]."""
        outer = self._outline(1.0)[2:47]
        return np.concatenate([outer, (HEAD + (outer - HEAD) * (0.97, 0.93))[::-1]])

    def _draw_nose(self, canvas: Canvas) -> None:
        canvas.glow([(47.5, 46), (50.8, 54), (48, 55.5), (45.6, 54)], 1.2, self._shadow, 0.5)
        for side in (-1, 1):
            canvas.ellipse((48 + side * 1.7, 55), 0.8, 0.55, self._shadow)

    def _draw_front_hair(self, canvas: Canvas) -> None:
        reach = 4 if self._style in ("short", "parted", "spiky") else 1
        outline = self._outline(3.4)
        outer = outline.take(range(48 - reach, 97 + reach), axis=0, mode="wrap")  # from the left over the top
        along = np.linspace(0.94, -0.94, 61)
        x = HEAD[0] + RADII[0] * self._identity.width * along
        inner = np.stack([x, _HAIRLINES[self._style](along)], 1)
        canvas.polygon(np.concatenate([_spiky(outer) if self._style == "spiky" else outer, inner]), self.hair)
        canvas.glow(ellipse((39, 20), 9, 3), 2.2, WHITE, 0.25)

    def _draw_eye(self, canvas: Canvas, middle: Point, lid: float) -> None:
        rx, ry = EYE_RADII
        canvas.ellipse(middle, rx, ry, WHITE)
        canvas.ellipse((middle[0], middle[1] + 0.3), 3.1, 3.1, self._eyes)
        canvas.ellipse((middle[0], middle[1] + 0.3), 1.6, 1.6, BLACK)
        canvas.ellipse((middle[0] - 1.0, middle[1] - 0.8), 0.8, 0.8, WHITE)
        x = middle[0] + 1.05 * rx * _ALONG
        top = middle[1] - 1.1 * ry * _ROUND
        edge = top + 2.15 * (RESTING_LID + (1 - RESTING_LID) * lid) * ry * _ROUND
        canvas.polygon(_between(x, top, edge), mix(self.skin, self._shadow, 0.3))
        canvas.line(np.stack([x, edge], 1), 0.9 if self._woman else 0.6, mix(BLACK, self.skin, 0.15))

    def _draw_brow(self, canvas: Canvas, middle: Point, side: int) -> None:
        tilt = 0.8 * self._identity.brow_tilt
        x = middle[0] + 5.5 * _ALONG
        y = middle[1] - 8.0 + 1.4 * _ALONG**2 + tilt * side * _ALONG
        canvas.line(np.stack([x, y], 1), 1.2 if self._woman else 1.9, mix(self.hair, BLACK, 0.35))

    def _draw_glass(self, canvas: Canvas, middle: Point, side: int) -> None:
        if self._glasses == "no":
            return
        power = 1.0 if self._glasses == "round" else 0.45
        rim = ellipse((0, 0), 1, 1)
        rim = np.sign(rim) * np.abs(rim) ** power * (7.4, 6.2) + middle
        canvas.line(np.concatenate([rim, rim[:1]]), 0.9, BLACK)
        canvas.line([(middle[0] - side * 7.4, middle[1] - 1), (48, middle[1] - 1.8)], 0.9, BLACK)
        canvas.line([(middle[0] + side * 7.4, middle[1] - 1), (48 + side * 24, middle[1] - 1)], 0.9, BLACK)


def _tinted(colour: Colour, tint: Colour) -> Colour:
    red, green, blue = (min(255, max(0, value + change)) for value, change in zip(colour, tint, strict=True))
    return red, green, blue


def _between(x: Array, upper: Array, lower: Array) -> Array:
    """Outline of the area between two curves over x, [2 n, 2]."""
    return np.concatenate([np.stack([x, upper], 1), np.stack([x, lower], 1)[::-1]])


def _spiky(outer: Array) -> Array:
    """An outline with spikes: groups of its upper points are moved outwards."""
    grown = np.where(np.arange(len(outer)) % 6 < 3, 0.0, 0.16)[:, None]
    return outer + grown * (outer - HEAD) * (outer[:, 1:] < HEAD[1] - 10)
