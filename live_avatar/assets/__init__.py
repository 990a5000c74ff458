"""What the package ships: the weights of the tiny preset, the hardware profiles, and the demo's inputs, a drawn face
and six seconds of synthetic speech."""

from pathlib import Path

_FOLDER = Path(__file__).parent

SPEECH = _FOLDER / "speech.wav"
PORTRAIT = _FOLDER / "portrait.png"
DEMO_PROMPT = "a red-haired woman in a yellow shirt, orange background"
PORTRAITS = {
    "Robin": PORTRAIT,
    **{name: _FOLDER / "portraits" / f"{name.lower()}.png" for name in ("Ada", "Omar", "Mei")},
}
"""Faces to choose from, by a name."""
TINY_WEIGHTS = _FOLDER / "tiny"
PROFILES = _FOLDER / "profiles"
