"""Signs MP4 files with a C2PA manifest (Content Credentials) and reads manifests, with c2pa-python (extra `c2pa`)."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Final

try:
    import c2pa
except ImportError as error:
    raise ImportError(
        "live_avatar_client.credentials needs c2pa-python; install it with: pip install 'live-avatar-client[c2pa]'"
    ) from error

from .errors import MediaError

__all__ = ["PROVENANCE_LABEL", "ContentCredentials", "Manifest", "ManifestState", "read_manifest"]

PROVENANCE_LABEL: Final = "org.live-avatar.provenance"
"""The manifest's assertion with the server's statement, as `AvatarSession.provenance` has it."""
AI_GENERATED: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_GENERATOR: Final = "Live Avatar on Triton"
_MP4: Final = "video/mp4"


class ContentCredentials:
    """A certificate with its private key, which sign videos.

    Args:
        certificate: PEM file, the signer's certificate first, then those between it and its authority.
        key: PEM file of its private key, ECDSA on P-256, without a password.

    Raises MediaError for files that cannot be read or are no such pair. Whether the certificate is valid on this day is
    known when a video is signed.
    """

    def __init__(self, certificate: str | os.PathLike[str], key: str | os.PathLike[str]) -> None:
        self._certificate = Path(certificate)
        chain, private = _read(self._certificate, "certificate"), _read(Path(key), "private key")
        try:
            info = c2pa.C2paSignerInfo(c2pa.C2paSigningAlg.ES256, chain, private, None)
            self._signer = c2pa.Signer.from_info(info)
        except (c2pa.C2paError, ValueError) as error:
            raise MediaError(
                f"{os.fspath(certificate)!r} and {os.fspath(key)!r} cannot sign ({error}); pass a certificate and its "
                "ECDSA P-256 key as PEM files"
            ) from error

    def sign(self, source: BinaryIO, target: BinaryIO, title: str, provenance: Mapping[str, Any]) -> None:
        """Write the MP4 in `source` with a manifest to `target`, which must be readable as well.

        Raises MediaError if the certificate cannot be used.
        """
        try:
            with c2pa.Builder(manifest(title, provenance)) as builder:
                builder.sign(self._signer, _MP4, source, target)
        except c2pa.C2paError as error:
            raise MediaError(
                f"the video {title!r} cannot be signed with {os.fspath(self._certificate)!r} ({error}); pass a "
                "certificate for signing that is valid today"
            ) from error


def manifest(title: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the definition of a manifest: who made the video, that an AI did, and what the server says of it."""
    agent = {"name": str(provenance.get("generator", _GENERATOR)), "version": str(provenance.get("version", "unknown"))}
    created = {"action": "c2pa.created", "digitalSourceType": AI_GENERATED, "softwareAgent": agent}
    assertions = [{"label": "c2pa.actions", "data": {"actions": [created]}}]
    if provenance:
        assertions.append({"label": PROVENANCE_LABEL, "data": dict(provenance)})
    return {"claim_generator_info": [agent], "title": title, "format": _MP4, "assertions": assertions}


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MediaError(
            f"the {what} {os.fspath(path)!r} cannot be read ({error.strerror}); pass a PEM file"
        ) from error


class ManifestState(StrEnum):
    """What the manifest of a file is worth."""

    TRUSTED = "trusted"
    """The file is as it was signed, and an authority that the reader trusts has certified the signer."""
    UNTRUSTED = "untrusted"
    """The file is as it was signed, but nothing says that the signer is who it claims."""
    INVALID = "invalid"
    """The file or its manifest was changed after it was signed, or cannot be read."""


@dataclass(frozen=True)
class Manifest:
    """What the C2PA manifest of a file says. signer: the name in its certificate. provenance: the server's statement,
    empty without one. is_ai: it says that an AI made the file. problems: codes and sentences of what is wrong, of the
    library."""

    state: ManifestState
    signer: str = ""
    generator: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    is_ai: bool = False
    problems: tuple[str, ...] = ()


def read_manifest(path: Path, authorities: str | None = None) -> Manifest | None:
    """Return what the manifest in a file says; None if the file has none.

    `authorities` are certificates (PEM) that the caller trusts; without them no signer is.
    """
    kind = _kind(path)
    if kind is None:
        return None
    settings = {"verify": {"verify_trust": True}, "trust": {"trust_anchors": authorities} if authorities else {}}
    try:
        context = c2pa.Context.from_dict(settings)
        with path.open("rb") as file, c2pa.Reader(kind, file, context=context) as reader:
            return _manifest(json.loads(reader.json()), reader.get_validation_state())
    except c2pa.C2paError as error:
        if str(error).startswith(("ManifestNotFound", "JumbfNotFound")):
            return None
        return Manifest(ManifestState.INVALID, problems=(str(error),))


def _manifest(store: dict[str, Any], validation: str | None) -> Manifest:
    active = store.get("manifests", {}).get(store.get("active_manifest"), {})
    signature, generators = active.get("signature_info", {}), active.get("claim_generator_info") or [{}]
    provenance = [one["data"] for one in active.get("assertions", []) if one.get("label") == PROVENANCE_LABEL]
    states = {"Trusted": ManifestState.TRUSTED, "Valid": ManifestState.UNTRUSTED}
    return Manifest(
        states.get(validation or "", ManifestState.INVALID),
        str(signature.get("common_name") or signature.get("issuer") or ""),
        " ".join(str(generators[0][name]) for name in ("name", "version") if name in generators[0]),
        provenance[0] if provenance and isinstance(provenance[0], dict) else {},
        any(action.get("digitalSourceType") == AI_GENERATED for action in _actions(active)),
        tuple(f"{one['code']}: {one.get('explanation', '')}" for one in store.get("validation_status", [])),
    )


def _actions(active: dict[str, Any]) -> list[dict[str, Any]]:
    labels = ("c2pa.actions", "c2pa.actions.v2")
    assertions = [one["data"] for one in active.get("assertions", []) if one.get("label") in labels]
    return [action for data in assertions for action in data.get("actions", [])]


def _kind(path: Path) -> str | None:
    """Return the media type of a file that may have a manifest, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(12)
    for kind, place, magic in ((_MP4, 4, b"ftyp"), ("image/jpeg", 0, b"\xff\xd8\xff"), ("image/png", 0, b"\x89PNG")):
        if start[place : place + len(magic)] == magic:
            return kind
    return None
