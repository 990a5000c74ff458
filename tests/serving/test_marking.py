"""What an operator puts on the frames of all sessions: the invisible mark, the label, and a signed provenance."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.errors import ConfigError, InputError, SigningError, WatermarkError
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving.label import Label
from live_avatar.serving.provenance import origin_of
from live_avatar.serving.server import TritonServer, serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar.signing import Standing, make_pair, read_authorities, verdict
from live_avatar.watermark.detect import Evidence, find
from live_avatar.watermark.embed import Watermark
from live_avatar.watermark.key import make_key, read_key
from live_avatar_client import AvatarSession
from live_avatar_client.protocol import FRAMES_PER_BLOCK

OPERATOR = 7
LABEL = "AI-generated"
LINE = re.compile(r"session \d+ started: key=anonymous session_number=([0-9a-f]{12}) ")


class Marked:
    """A server that marks, labels and signs, and what its log says."""

    def __init__(self, folder: Path, artifacts: Artifacts) -> None:
        make_key(folder / "mark.key")
        certificate, key, self.authority = make_pair("studio", folder)
        self.key = read_key(folder / "mark.key")
        self.log: list[str] = []
        self.options = ServerOptions(
            artifacts.folder,
            watermark=folder / "mark.key",
            operator=OPERATOR,
            label=LABEL,
            sign_certificate=certificate,
            sign_key=key,
        ).on_free_ports()
        self.server: TritonServer

    def video(self, picture: bytes, speech: Array, **options: object) -> tuple[Array, dict[str, object]]:
        """The frames of a session with prompt "hello" and seed 3, and its provenance."""
        session = AvatarSession(self.server.options.url, image=picture, prompt="hello", seed=3, **options)  # type: ignore[arg-type]
        with session:
            frames = np.concatenate([block.frames for block in session.stream([speech])])
        return frames, dict(session.provenance or {})


@pytest.fixture(scope="module")
def marked(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Marked]:
    made = Marked(tmp_path_factory.mktemp("marked"), artifacts)
    with serving(made.options, made.log.append) as made.server:
        yield made


def blocks_marked(mark: Watermark, frames: Array) -> Array:
    """Frames marked block by block, as the decoder does."""
    starts = range(0, len(frames), FRAMES_PER_BLOCK)
    return np.concatenate([mark.apply(frames[start : start + FRAMES_PER_BLOCK], start) for start in starts])


def test_raw_frames_are_the_oracles_with_label_and_mark(
    marked: Marked, picture: bytes, speech: Array, expected: Array
) -> None:
    """The caller's own label does not replace the operator's."""
    frames, provenance = marked.video(picture, speech, label="Mine")
    height, width = expected.shape[1:3]
    origin = origin_of(json.dumps(provenance))
    assert origin is not None
    assert origin.operator == OPERATOR
    labelled = Label(LABEL, height, width).draw(expected)
    assert np.array_equal(frames, blocks_marked(Watermark(marked.key, origin, height, width), labelled)[: len(frames)])


def test_the_mark_is_found_in_jpeg_frames_and_names_the_session(marked: Marked, picture: bytes, speech: Array) -> None:
    session = AvatarSession(marked.server.options.url, image=picture, prompt="hello", frame_format="jpeg")
    evidence = Evidence()
    with session:
        jpegs = [jpeg for block in session.stream([speech]) for jpeg in block.jpegs]
    for number, jpeg in enumerate(jpegs):
        evidence.add(np.asarray(Image.open(io.BytesIO(jpeg)).convert("L")), number / 25)
    found = find(marked.key, evidence)
    assert found is not None
    assert found.origin == origin_of(json.dumps(dict(session.provenance or {})))


def test_the_provenance_is_signed_and_the_log_has_its_number(marked: Marked, picture: bytes, speech: Array) -> None:
    _, first = marked.video(picture, speech[:7680])
    _, second = marked.video(picture, speech[:7680])
    assert first["session_number"] != second["session_number"]
    trusted = read_authorities(marked.authority)
    assert verdict(first, trusted).standing is Standing.TRUSTED
    assert verdict({**first, "session_number": second["session_number"]}, trusted).standing is Standing.INVALID
    numbers = [found[1] for line in marked.log if (found := LINE.search(line))]
    assert numbers[-2:] == [first["session_number"], second["session_number"]]


def test_without_the_options_nothing_is_marked_or_signed(
    url: str, picture: bytes, speech: Array, expected: Array
) -> None:
    with AvatarSession(url, image=picture, prompt="hello", seed=3) as session:
        frames = np.concatenate([block.frames for block in session.stream([speech])])
    assert np.array_equal(frames, expected[: len(frames)])
    assert "operator" not in (session.provenance or {})
    assert "signature" not in (session.provenance or {})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"watermark": "text"}, ConfigError, "--watermark is .*, but --operator is not given; give both, or none"),
        ({"operator": 7}, ConfigError, "--operator is 7, but --watermark is not given"),
        ({"watermark": "text", "operator": 7}, WatermarkError, "text holds no watermark key"),
        ({"sign_key": "text"}, ConfigError, "--sign-key is .*, but --sign-certificate is not given"),
        ({"sign_key": "text", "sign_certificate": "text"}, SigningError, "text holds no certificate"),
        ({"label": "A" * 64}, InputError, "shorten it"),
        ({"label": ""}, InputError, "the label '' is blank"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    artifacts: Artifacts, tmp_path: Path, options: dict[str, object], error: type[Exception], words: str
) -> None:
    (tmp_path / "text").write_text("Hello.")
    paths = {name: tmp_path / "text" if value == "text" else value for name, value in options.items()}
    with pytest.raises(error, match=words), serving(ServerOptions(artifacts.folder, **paths)):  # type: ignore[arg-type]
        pass
