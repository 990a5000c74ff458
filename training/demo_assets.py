"""Makes the demo's assets again: `python -m training.demo_assets`.

No network was trained on the face of the portrait or the voice of the speech, which espeak-ng synthesises. The package
ships the results; this module is not used at run time.
"""

import io
import shutil
import subprocess
import wave

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from live_avatar.assets import PORTRAIT, PORTRAITS, SPEECH
from training.data.face import Face, Pose
from training.data.identity import draw_identity
from training.data.split import Split

Array = NDArray[np.float64]

PORTRAIT_SEED = 16
PORTRAIT_SIZE = 512  # pixels
FURTHER_SEEDS = {"Ada": 40, "Omar": 47, "Mei": 53}
FURTHER_SIZE = 256
SPEECH_TEXT = "Hello. I am a live avatar. You speak, and I move my lips while the words arrive."
ESPEAK = ("espeak-ng", "-v", "en-us+Annie", "-s", "150", "--stdout", SPEECH_TEXT)
SPEECH_RATE_HZ = 16_000
SPEECH_PEAK = 10 ** (-3 / 20)  # -3 dBFS
SILENCE = 0.01  # share of the peak; quieter samples at both ends are cut
MARGIN_S = 0.1
FADE_S = 0.02


def draw_portrait(seed: int = PORTRAIT_SEED, size: int = PORTRAIT_SIZE) -> Image.Image:
    """A face at rest, the demo's unless told otherwise; `live_avatar.assets.DEMO_PROMPT` is the prompt of that one."""
    face = Face(draw_identity(Split.TEST, seed), size)
    return Image.fromarray(face.frame(Pose()))


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
    for name, seed in FURTHER_SEEDS.items():
        draw_portrait(seed, FURTHER_SIZE).save(PORTRAITS[name], optimize=True)
    write_speech(synthesise_speech())


if __name__ == "__main__":
    main()
