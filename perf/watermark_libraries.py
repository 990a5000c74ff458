"""Measures other libraries for invisible marks on one photograph: speed, quality, and what a mark of 64 bits survives.

They belong to nothing else here, so they get an environment of their own:

`pip install --no-deps invisible-watermark==0.2.0 blind-watermark==0.4.4 opencv-python-headless PyWavelets`, beside the
packages of this project, and then `python -m perf.watermark_libraries --photograph coffee.png`, which prints a Markdown
table. The run of record used `coffee` of scikit-image 0.26.
"""

from __future__ import annotations

import importlib
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from PIL import Image

from live_avatar.arrays import Array
from perf.watermark import CROP, LARGE, psnr, resized

BITS: Final = 64
FRAMES: Final = 5
"""So many times the photograph is marked, for the speed."""

Put = Callable[[Array, Array], Array]
"""Puts bits [64] into a picture uint8 [H, W, 3], blue first as OpenCV has it."""
Get = Callable[[Array], Array]
"""Reads bits [64] from a picture."""


def invisible_watermark(method: str) -> tuple[Put, Get]:
    """A method of the package invisible-watermark."""
    library = importlib.import_module("imwatermark")

    def put(picture: Array, bits: Array) -> Array:
        encoder = library.WatermarkEncoder()
        encoder.set_watermark("bits", bits.tolist())
        return np.asarray(encoder.encode(picture, method))

    return put, lambda picture: np.asarray(library.WatermarkDecoder("bits", BITS).decode(picture, method))


def blind_watermark() -> tuple[Put, Get]:
    """The package blind-watermark."""
    library = importlib.import_module("blind_watermark")

    def put(picture: Array, bits: Array) -> Array:
        mark = library.WaterMark(password_img=1, password_wm=1)
        mark.read_img(img=picture)
        mark.read_wm(bits.astype(bool), mode="bit")
        return np.asarray(np.clip(np.round(mark.embed()), 0, 255).astype(np.uint8))

    def get(picture: Array) -> Array:
        mark = library.WaterMark(password_img=1, password_wm=1)
        return np.asarray(mark.extract(embed_img=picture, wm_shape=BITS, mode="bit")) > 0.5

    return put, get


def jpeg(picture: Array) -> Array:
    """Through a JPEG of quality 70."""
    file = io.BytesIO()
    Image.fromarray(picture[..., ::-1]).save(file, "JPEG", quality=70)
    return np.array(Image.open(file))[..., ::-1].copy()


def cropped(picture: Array) -> Array:
    """Without a tenth of its height and width, at the top and on the left."""
    height, width = (round((1 - CROP) * side) for side in picture.shape[:2])
    return picture[height:, width:].copy()


ATTACKS: Final[Mapping[str, Callable[[Array], Array]]] = {
    "JPEG 70": jpeg,
    "half size": lambda picture: resized(picture[None], picture.shape[0] // 2, picture.shape[1] // 2)[0],
    "10 % crop": cropped,
}


def measure(put: Put, get: Get, picture: Array) -> dict[str, Any]:
    """Frames per second of one core, PSNR, and the wrong bits after each attack; chance gives 32."""
    bits = np.random.default_rng(1).integers(0, 2, BITS)
    began_s = time.process_time()
    for _ in range(FRAMES):
        marked = put(picture, bits)
    passed_s = time.process_time() - began_s
    wrong = {name: int(np.sum(get(attack(marked)).astype(int) != bits)) for name, attack in ATTACKS.items()}
    return {"fps": FRAMES / passed_s, "psnr_db": psnr(picture[None], marked[None]), "wrong": wrong}


def table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as a Markdown table."""
    lines = [f"| library | frames/s | PSNR | {' | '.join(ATTACKS)} |", f"|---|---|---|{'---|' * len(ATTACKS)}"]
    for name, one in measured.items():
        wrong = " | ".join(str(one["wrong"][attack]) for attack in ATTACKS)
        lines.append(f"| {name} | {one['fps']:.2g} | {one['psnr_db']:.1f} dB | {wrong} |")
    return "\n".join(lines)


@click.command()
@click.option("--photograph", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True)
def main(photograph: Path) -> None:
    """Mark a photograph with each library, and count wrong bits."""
    try:
        importlib.import_module("cv2").setNumThreads(1)
        libraries = {
            "invisible-watermark, `dwtDct`": invisible_watermark("dwtDct"),
            "invisible-watermark, `dwtDctSvd`": invisible_watermark("dwtDctSvd"),
            "blind-watermark": blind_watermark(),
        }
    except ImportError as error:
        raise click.ClickException(
            f"{error.name} is not installed; install the libraries as the head of this module says, in an environment "
            "of their own"
        ) from error
    picture = np.array(Image.open(photograph).convert("RGB").resize(LARGE[::-1], Image.Resampling.LANCZOS))
    blue_first = np.ascontiguousarray(picture[..., ::-1])
    print(table({name: measure(put, get, blue_first) for name, (put, get) in libraries.items()}))


if __name__ == "__main__":
    main()
