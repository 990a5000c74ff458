"""The demo's inputs, shipped with the package: a drawn face and six seconds of synthetic speech."""

from pathlib import Path

_FOLDER = Path(__file__).parent

SPEECH = _FOLDER / "speech.wav"
PORTRAIT = _FOLDER / "portrait.png"
DEMO_PROMPT = "A friendly woman with dark bobbed hair talks to the camera against a plain teal background."
