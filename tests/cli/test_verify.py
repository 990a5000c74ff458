"""`live-avatar verify`, `watermark-key` and `signing-key`: what is said of files of every kind, and the exit codes."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from pathlib import Path

import c2pa
import pytest
from PIL import Image

from live_avatar import signing
from live_avatar.arrays import Array
from live_avatar.serving.provenance import ContentHashes, ProvenanceWriter
from live_avatar.serving.served import Served
from live_avatar.signing import make_pair, read_signer
from live_avatar.watermark.embed import Watermark
from live_avatar.watermark.key import Origin, read_key
from live_avatar_client import credentials
from live_avatar_client.credentials import ContentCredentials
from live_avatar_client.errors import MediaError
from live_avatar_client.media import Mp4Writer, provenance_metadata
from perf.watermark import encode, faces
from tests.cli.support import assert_refused, invoke

ORIGIN = Origin(7, 0xABC)


class Studio:
    """An operator's keys, and a signed video with a mark."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        assert invoke("watermark-key", folder / "mark.key").exit_code == 0
        assert invoke("signing-key", "studio", "--folder", folder).exit_code == 0
        self.key, self.authority = folder / "mark.key", folder / "studio-ca.pem"
        self.pair = folder / "studio.pem", folder / "studio.key"
        self.frames: Array = Watermark(read_key(self.key), ORIGIN, 288, 384).apply(faces(4, 10, 288, 384), 0)
        self.video = self.write("signed.mp4", ContentCredentials(*self.pair))

    def statement(self, session: int = ORIGIN.session) -> dict[str, object]:
        served = Served("0.1", "tiny", "fingerprint", "cpu", 1)
        writer = ProvenanceWriter(served, ORIGIN.operator, read_signer(*self.pair).sign)
        return dict(json.loads(writer.write(session, ContentHashes("a" * 64, "b" * 64), 3)))

    def write(self, name: str, credentials: ContentCredentials | None, session: int = ORIGIN.session) -> Path:
        metadata = provenance_metadata(self.statement(session))
        with Mp4Writer(self.folder / name, 384, 288, metadata=metadata, credentials=credentials) as video:
            video.write(self.frames)
        return self.folder / name


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(tmp_path_factory.mktemp("studio"))


def verified(*arguments: object) -> tuple[int, str]:
    """The exit code of `verify`, and what it prints."""
    result = invoke("verify", *arguments)
    assert result.stderr == "", result.stderr
    return result.exit_code, result.stdout


def test_a_signed_video_shows_its_origin(studio: Studio) -> None:
    code, said = verified(studio.video, "--watermark", studio.key, "--trust", studio.authority)
    assert code == 0
    assert "made by Live Avatar on Triton, version 0.1, preset tiny, artifacts fingerprint, session number" in said
    assert said.count("signed by studio, whom --trust certifies") == 2
    assert "in the metadata (GB 45438-2025)" in said
    assert "operator 7, session 000000000abc; agreement" in said
    assert said.endswith("This video was made by AI, by the server of operator 7 in session 000000000abc.\n")


def test_the_librarys_own_reader_finds_the_manifest_valid(studio: Studio) -> None:
    with c2pa.Reader(str(studio.video)) as reader:
        assert reader.get_validation_state() == "Valid"
        manifest = reader.get_active_manifest()
    actions = next(one for one in manifest["assertions"] if one["label"].startswith("c2pa.actions"))
    assert actions["data"]["actions"][0]["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    statement = next(one["data"] for one in manifest["assertions"] if one["label"] == "org.live-avatar.provenance")
    assert statement["session_number"] == "000000000abc"
    assert statement["signature"]["value"]


def test_a_manifest_that_names_no_ai_is_not_taken_for_one(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a camera."""
    with monkeypatch.context() as camera:
        camera.setattr(credentials, "AI_GENERATED", "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture")
        photographed = studio.write("camera.mp4", ContentCredentials(*studio.pair))
    code, said = verified(photographed, "--trust", studio.authority)
    assert code == 0
    assert said.endswith("shows who signed this file; it does not say that AI made it.\n")
    assert verified(studio.video, "--trust", studio.authority)[1].endswith(
        "made by AI, as its signed manifest shows.\n"
    )


def test_json_is_for_machines(studio: Studio) -> None:
    code, said = verified(studio.video, "--watermark", studio.key, "--trust", studio.authority, "--json")
    report = json.loads(said)
    assert code == report["exit_code"] == 0
    assert (report["manifest"]["state"], report["manifest"]["signer"]) == ("trusted", "studio")
    assert report["statement"] == {"standing": "trusted", "signer": "studio"}
    assert (report["mark"]["operator"], report["mark"]["session_number"]) == (7, "000000000abc")
    assert report["mark"]["z"] > 10
    assert report["mark"]["false_alarm_bound"] < 1e-6


def test_a_signer_that_nobody_trusts_shows_nothing(studio: Studio) -> None:
    code, said = verified(studio.video)
    assert code == 1
    assert said.count("signed by somebody who calls itself studio; no authority of --trust certifies it") == 2
    assert "not looked for; give --watermark KEYFILE" in said
    assert said.endswith("Nothing here shows where this file comes from.\n")


def test_a_remux_leaves_the_mark(studio: Studio) -> None:
    """Encoded again, without metadata, and a single frame as a JPEG."""
    encode(studio.frames, studio.folder / "again.mp4", 23)
    Image.fromarray(studio.frames[0]).save(studio.folder / "frame.jpg", quality=80)
    for name in ("again.mp4", "frame.jpg"):
        code, said = verified(studio.folder / name, "--watermark", studio.key)
        assert code == 0
        assert "says            nothing of itself" in said
        assert "C2PA manifest   none" in said
        assert "operator 7, session 000000000abc" in said


def test_a_copied_statement_proves_nothing(studio: Studio) -> None:
    unsigned = studio.write("unsigned.mp4", None)
    code, said = verified(unsigned, "--trust", studio.authority)
    assert code == 1
    assert "The server's statement is genuine, but nothing ties it to this video" in said
    code, said = verified(
        studio.write("other.mp4", None, session=5), "--trust", studio.authority, "--watermark", studio.key
    )
    assert code == 3
    assert "it says session 000000000005, but its pixels carry session 000000000abc" in said


def test_a_changed_video_is_altered(studio: Studio) -> None:
    content = bytearray(studio.video.read_bytes())
    content[content.rindex(b"mdat") + 600] ^= 1
    changed = studio.folder / "changed.mp4"
    changed.write_bytes(content)
    code, said = verified(changed, "--trust", studio.authority)
    assert code == 3
    assert "invalid: the file is not as it was signed" in said
    assert said.endswith("This file was altered after it was signed, or what it says is forged.\n")


def test_a_truncated_video_is_altered_but_its_mark_is_found(studio: Studio) -> None:
    content = studio.video.read_bytes()
    cut = studio.folder / "cut.mp4"
    cut.write_bytes(content[: len(content) * 95 // 100])
    code, said = verified(cut, "--trust", studio.authority, "--watermark", studio.key)
    assert code == 3
    assert "the rest is damaged" in said
    assert "operator 7, session 000000000abc" in said


def test_another_operators_key_and_a_video_that_is_not_ours(studio: Studio, tmp_path: Path) -> None:
    invoke("watermark-key", tmp_path / "other.key")
    plain = tmp_path / "plain.mp4"
    encode(faces(5, 3, 96, 160), plain, 23)
    for file in (studio.folder / "frame.jpg", plain):
        code, said = verified(file, "--watermark", tmp_path / "other.key")
        assert code == 1
        assert "no mark of this key; it was made without one, by another key's holder, or its mark was" in said


def test_files_that_cannot_be_used(studio: Studio, tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("No video.")
    assert_refused(invoke("verify", text), "is no video or picture that can be read", "give an MP4, JPEG or PNG")
    assert_refused(invoke("verify", tmp_path / "missing"), "missing does not exist; give a video or a picture")
    assert_refused(invoke("verify", studio.video, "--watermark", text), "text.mp4 holds no watermark key")
    assert_refused(invoke("verify", studio.video, "--trust", text), "text.mp4 holds no certificate (PEM)")


def test_videos_of_hostile_metadata(studio: Studio) -> None:
    metadata = {"description": '{"generator": "\\u001b[31m", "signature": 7}', "AIGC": "[" * 5000}
    with Mp4Writer(studio.folder / "hostile.mp4", 96, 96, metadata=metadata) as video:
        video.write(faces(1, 1, 96, 96))
    code, said = verified(studio.folder / "hostile.mp4")
    assert code == 3
    assert "\x1b" not in said


# ---- Signing a video


def test_an_expired_certificate_signs_no_video(studio: Studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(signing, "TRIAL_DAYS", -1)
    monkeypatch.setattr(signing, "BEFORE", dt.timedelta(days=30))
    certificate, key, _ = make_pair("old", tmp_path)
    words = r"cannot be signed with .*old.pem.* a certificate for signing that is valid today"
    video = Mp4Writer(tmp_path / "o.mp4", 96, 96, credentials=ContentCredentials(certificate, key))
    with pytest.raises(MediaError, match=words), video:
        video.write(faces(1, 1, 96, 96))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".key", ".pem", ".pem"]


def test_a_command_that_could_not_sign_does_not_begin(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(signing, "TRIAL_DAYS", -1)
    monkeypatch.setattr(signing, "BEFORE", dt.timedelta(days=30))
    certificate, key, _ = make_pair("old", tmp_path)
    files = ("--audio", "none.wav", "--image", "none.png", "--output", tmp_path / "o.mp4")
    for command in ("generate", "stream"):
        refused = invoke(command, *files, "--sign-certificate", certificate, "--sign-key", key)
        assert_refused(refused, "old.pem is valid from", "not today; give one that is valid")
        refused = invoke(command, *files, "--sign-certificate", certificate, "--sign-key", studio.key)
        assert_refused(refused, "mark.key holds no private key")


def test_files_that_cannot_sign(studio: Studio, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"the certificate .*missing' cannot be read .*; pass a PEM file"):
        ContentCredentials(tmp_path / "missing", studio.pair[1])
    shutil.copy(studio.key, tmp_path / "text")
    with pytest.raises(MediaError, match=r"cannot sign .*; pass a certificate and its ECDSA P-256 key as PEM files"):
        ContentCredentials(tmp_path / "text", tmp_path / "text")
