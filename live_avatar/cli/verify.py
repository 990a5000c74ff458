"""What a file shows of its origin, for `live-avatar verify`: what it says, who signed that, and the mark in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import av

from live_avatar.serving.provenance import OPERATOR, SESSION_NUMBER
from live_avatar.signing import Standing, Verdict, read_authorities, verdict
from live_avatar.watermark.detect import FALSE_ALARM, Found, find
from live_avatar.watermark.frames import read_frames
from live_avatar.watermark.key import read_key
from live_avatar_client.credentials import Manifest, ManifestState, read_manifest
from live_avatar_client.text import printable

PROVEN: Final = 0
UNPROVEN: Final = 1
ALTERED: Final = 3

STATEMENT_WORDS: Final = {
    Standing.TRUSTED: "signed by {signer}, whom --trust certifies",
    Standing.UNTRUSTED: "signed by somebody who calls itself {signer}; no authority of --trust certifies it",
    Standing.INVALID: "its signature is wrong: it was changed after it was signed, or is forged",
    Standing.ABSENT: "not signed, so anybody may have written it",
}
MANIFEST_WORDS: Final = {
    ManifestState.TRUSTED: f"valid, {STATEMENT_WORDS[Standing.TRUSTED]}",
    ManifestState.UNTRUSTED: f"valid, {STATEMENT_WORDS[Standing.UNTRUSTED]}",
    ManifestState.INVALID: "invalid: the file is not as it was signed",
}


@dataclass(frozen=True)
class Report:
    """What was found in a file.

    claims: the provenance in its manifest, else in its metadata. statement: of the claims. is_labelled: whether it has
    the implicit label of GB 45438-2025. searched: whether a key was given to look for a mark.
    """

    claims: Mapping[str, Any]
    statement: Verdict
    manifest: Manifest | None
    is_labelled: bool
    searched: bool
    mark: Found | None
    frames: int
    damaged: bool
    contradictions: tuple[str, ...] = field(default=())

    @property
    def exit_code(self) -> int:
        """0: a mark or a trusted manifest shows the origin. 3: something was altered. 1: nothing shows it. The server's
        statement alone shows nothing, since it can be copied from another video."""
        is_invalid = self.manifest is not None and self.manifest.state is ManifestState.INVALID
        if is_invalid or self.statement.standing is Standing.INVALID or self.contradictions:
            return ALTERED
        is_signed = self.manifest is not None and self.manifest.state is ManifestState.TRUSTED
        return PROVEN if self.mark or is_signed else UNPROVEN


def examine(path: Path, key: Path | None, trust: Path | None) -> Report:
    """Looks at a file. Raises `WatermarkError` or `SigningError` for a file, key or authority that cannot be used."""
    secret = None if key is None else read_key(key)
    authorities = [] if trust is None else read_authorities(trust)
    seen = read_frames(path)
    manifest = read_manifest(path, None if trust is None else trust.read_text(errors="replace"))
    entries = _metadata(path)
    claims = (manifest.provenance if manifest else {}) or _object(entries.get("description", ""))
    claims = claims if "generator" in claims else {}
    mark = None if secret is None else find(secret, seen.evidence)
    return Report(
        claims=claims,
        statement=verdict(claims, authorities),
        manifest=manifest,
        is_labelled=str(_object(entries.get("AIGC", "")).get("Label")) == "1",
        searched=secret is not None,
        mark=mark,
        frames=seen.evidence.frames,
        damaged=seen.damaged,
        contradictions=_contradictions(claims, mark),
    )


def as_lines(report: Report, path: Path) -> list[str]:
    """The report for people: a line for each thing, and a sentence at the end."""
    lines = [f"file            {printable(str(path))}: {_frames(report)}", f"says            {_claims(report.claims)}"]
    if report.claims:
        lines.append(f"statement       {_worded(STATEMENT_WORDS[report.statement.standing], report.statement.signer)}")
    lines += [
        f"C2PA manifest   {_manifest(report.manifest)}",
        f"AI label        {'in the metadata (GB 45438-2025)' if report.is_labelled else 'none in the metadata'}",
        f"invisible mark  {_mark(report)}",
        *(f"contradiction   {one}" for one in report.contradictions),
        _verdict(report),
    ]
    return lines


def as_json(report: Report) -> str:
    """The report for machines."""
    mark = report.mark
    return json.dumps(
        {
            "exit_code": report.exit_code,
            "frames": report.frames,
            "damaged": report.damaged,
            "claims": dict(report.claims) or None,
            "statement": asdict(report.statement),
            "manifest": None if report.manifest is None else asdict(report.manifest),
            "aigc_label": report.is_labelled,
            "mark": {
                "searched": report.searched,
                "found": mark is not None,
                "operator": mark and mark.origin.operator,
                "session_number": mark and mark.origin.session_text,
                "z": mark and round(mark.z, 1),
                "scale": mark and [round(side, 3) for side in mark.scale],
                "alternating": mark and mark.alternating,
                "false_alarm_bound": FALSE_ALARM,
            },
            "contradictions": list(report.contradictions),
        },
        indent=1,
    )


def _metadata(path: Path) -> dict[str, str]:
    """The metadata of a media file; empty if FFmpeg cannot read any."""
    try:
        with path.open("rb") as file, av.open(file, "r", metadata_errors="replace") as container:
            return dict(container.metadata)
    except (av.FFmpegError, OSError, ValueError):
        return {}


def _object(text: str) -> dict[str, Any]:
    """The JSON object in a text; empty for any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _contradictions(claims: Mapping[str, Any], mark: Found | None) -> tuple[str, ...]:
    """Where what the file says is not what its pixels carry."""
    if mark is None or SESSION_NUMBER not in claims:
        return ()
    said, carried = printable(str(claims[SESSION_NUMBER])), mark.origin.session_text
    found = [] if said == carried else [f"it says session {said}, but its pixels carry session {carried}"]
    if claims.get(OPERATOR, mark.origin.operator) != mark.origin.operator:
        said = printable(str(claims[OPERATOR]))
        found.append(f"it says operator {said}, but its pixels carry operator {mark.origin.operator}")
    return tuple(found)


def _frames(report: Report) -> str:
    read = "a picture" if report.frames == 1 else f"{report.frames} frames read"
    return f"{read}, the rest is damaged" if report.damaged else read


def _claims(claims: Mapping[str, Any]) -> str:
    if not claims:
        return "nothing of itself"
    named = ("version", "preset", "artifacts", SESSION_NUMBER, OPERATOR, "created")
    facts = ", ".join(f"{name.replace('_', ' ')} {printable(str(claims[name]))}" for name in named if name in claims)
    return f"made by {printable(str(claims['generator']))}, {facts}"


def _manifest(manifest: Manifest | None) -> str:
    if manifest is None:
        return "none"
    worded = _worded(MANIFEST_WORDS[manifest.state], manifest.signer)
    problems = [] if manifest.state is not ManifestState.INVALID else [printable(one) for one in manifest.problems]
    return f"{worded} ({'; '.join(problems)})" if problems else worded


def _worded(words: str, signer: str) -> str:
    return words.format(signer=printable(signer) or "nobody")


def _mark(report: Report) -> str:
    if not report.searched:
        return "not looked for; give --watermark KEYFILE"
    if report.mark is None:
        return "no mark of this key; it was made without one, by another key's holder, or its mark was destroyed"
    mark = report.mark
    return (
        f"operator {mark.origin.operator}, session {mark.origin.session_text}; agreement {mark.z:.1f} standard "
        f"deviations, chance of a false alarm below {FALSE_ALARM:.1g}"
    )


def _verdict(report: Report) -> str:
    if report.exit_code == ALTERED:
        return "This file was altered after it was signed, or what it says is forged."
    if report.mark is not None:
        origin = report.mark.origin
        return (
            f"This video was made by AI, by the server of operator {origin.operator} in session {origin.session_text}."
        )
    if report.exit_code == PROVEN and report.manifest is not None:
        if report.manifest.is_ai:
            return "This file was made by AI, as its signed manifest shows."
        return "The signed manifest shows who signed this file; it does not say that AI made it."
    if report.statement.standing is Standing.TRUSTED:
        return "The server's statement is genuine, but nothing ties it to this video; it may be copied from another."
    return "Nothing here shows where this file comes from."
