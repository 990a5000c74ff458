"""Signed statements: a JSON object with a signature and the certificates of who signed it.

The key is ECDSA on P-256, with a certificate whose authority the reader trusts. The same pair signs the C2PA manifests
of videos, so its certificate is of the profile that C2PA asks for.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from live_avatar.errors import SigningError

SIGNATURE: Final = "signature"
"""The field of a statement that holds its signature."""
MOST_CERTIFICATES: Final = 5
TRIAL_DAYS: Final = 365
MAX_NAME_CHARS: Final = 50
"""A name in a certificate has at most 64, and that of the authority is longer."""
BEFORE: Final = dt.timedelta(hours=1)
"""How long before it is made a certificate is valid: clocks differ."""
_HASH: Final = hashes.SHA256()
_MAKE: Final = "`live-avatar signing-key NAME` makes a pair for a try"


class Standing(StrEnum):
    """What a signature is worth."""

    TRUSTED = "trusted"
    """The statement is unchanged, and an authority that the reader trusts has certified its signer."""
    UNTRUSTED = "untrusted"
    """The statement is unchanged since somebody signed it, but nothing says that the signer is who it claims."""
    INVALID = "invalid"
    """The statement was changed after it was signed, or the signature is none."""
    ABSENT = "absent"


@dataclass(frozen=True)
class Verdict:
    """Whether a statement's signature is right, and the name in its certificate."""

    standing: Standing
    signer: str = ""


class Signer:
    """Signs statements with a private key and its certificates, the signer's own first."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificates: Sequence[x509.Certificate]) -> None:
        self._key = key
        encoded = (one.public_bytes(serialization.Encoding.DER) for one in certificates)
        self._certificates = [base64.b64encode(one).decode() for one in encoded]

    def sign(self, statement: Mapping[str, Any]) -> dict[str, Any]:
        """The statement with its signature."""
        value = self._key.sign(_canonical(statement), ec.ECDSA(_HASH))
        signature = {"certificates": self._certificates, "value": base64.b64encode(value).decode()}
        return {**statement, SIGNATURE: signature}


def read_signer(certificate: Path, key: Path) -> Signer:
    """The signer of two PEM files. Raises `SigningError` for files that are no such pair, or not valid now."""
    chain = _read_certificates(certificate)
    content = _read(key, "private key")
    try:
        private = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError) as error:  # TypeError: a password is needed
        raise SigningError(f"{key} holds no private key (PEM, without a password); {_MAKE}.") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey) or not isinstance(private.curve, ec.SECP256R1):
        raise SigningError(f"{key} holds a key of another kind than ECDSA on P-256; {_MAKE}.")
    if chain[0].public_key() != private.public_key():
        raise SigningError(f"{certificate} and {key} do not belong together; give the certificate of this key.")
    now = dt.datetime.now(dt.UTC)
    if not chain[0].not_valid_before_utc <= now <= chain[0].not_valid_after_utc:
        raise SigningError(
            f"the certificate {certificate} is valid from {chain[0].not_valid_before_utc:%Y-%m-%d} to "
            f"{chain[0].not_valid_after_utc:%Y-%m-%d}, not today; give one that is valid."
        )
    return Signer(private, chain)


def read_authorities(path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file. Raises `SigningError` if it has none."""
    return _read_certificates(path)


def verdict(statement: Mapping[str, Any], authorities: Sequence[x509.Certificate]) -> Verdict:
    """What the signature of a statement is worth for somebody who trusts these authorities."""
    if SIGNATURE not in statement:
        return Verdict(Standing.ABSENT)
    try:
        chain, value = _signature(statement[SIGNATURE])
        public = chain[0].public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey):
            return Verdict(Standing.INVALID)
        public.verify(value, _canonical(statement), ec.ECDSA(_HASH))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, KeyError, TypeError):
        return Verdict(Standing.INVALID)
    signer = _name(chain[0])
    try:
        made = dt.datetime.fromisoformat(str(statement.get("created")))
        trusted = _leads_to(chain, authorities, made)
    except (ValueError, TypeError):
        trusted = False
    return Verdict(Standing.TRUSTED if trusted else Standing.UNTRUSTED, signer)


def make_pair(name: str, folder: Path) -> tuple[Path, Path, Path]:
    """Writes a certificate with its key, and the authority's certificate: NAME.pem, NAME.key, NAME-ca.pem.

    The authority's key is thrown away, so it certifies nothing else. Raises `SigningError` for a name that no
    certificate can have, and if a file is there already or cannot be written.
    """
    if not 1 <= len(name) <= MAX_NAME_CHARS or "/" in name or not name.isprintable():
        raise SigningError(
            f"the name {name[:60]!r} does not fit; give 1 to {MAX_NAME_CHARS} printable characters without a slash."
        )
    paths = folder / f"{name}.pem", folder / f"{name}.key", folder / f"{name}-ca.pem"
    if existing := [path for path in paths if path.exists()]:
        raise SigningError(f"{existing[0]} exists; give another name, or remove it.")
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = _certificate(f"{name} (authority)", authority_key, None, authority_key)
    own = _certificate(name, key, authority, authority_key)
    contents = [one.public_bytes(serialization.Encoding.PEM) for one in (own, authority)]
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for path, content, mode in zip(
        paths, (contents[0] + contents[1], private, contents[1]), (0o644, 0o600, 0o644), strict=True
    ):
        _write_new(path, content, mode)
    return paths


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: x509.Certificate | None, issuer_key: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    """A certificate of an authority, or with an issuer one for signing, as C2PA wants it."""
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, name), x509.NameAttribute(NameOID.COMMON_NAME, name)]
    )
    now, is_authority = dt.datetime.now(dt.UTC), issuer is None
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BEFORE)
        .not_valid_after(now + dt.timedelta(days=TRIAL_DAYS))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                **usage,
                digital_signature=not is_authority,
                key_cert_sign=is_authority,
                crl_sign=is_authority,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if not is_authority:
        made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return made.sign(issuer_key, _HASH)


def _leads_to(chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate], made: dt.datetime) -> bool:
    """Whether the chain was valid when the statement was made, and ends below one of the authorities."""
    for number, one in enumerate(chain):
        if not one.not_valid_before_utc <= made <= one.not_valid_after_utc:
            return False
        if any(_is_issued(one, authority) for authority in authorities):
            return True
        if not _is_issued(one, *chain[number + 1 : number + 2]):
            return False
    return False


def _is_issued(certificate: x509.Certificate, issuer: x509.Certificate | None = None) -> bool:
    if issuer is None:
        return False
    try:
        certificate.verify_directly_issued_by(issuer)
        constraints = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound):
        return False
    return constraints.ca


def _signature(field: Any) -> tuple[list[x509.Certificate], bytes]:
    encoded = field["certificates"]
    if not isinstance(encoded, list) or not 1 <= len(encoded) <= MOST_CERTIFICATES:
        raise ValueError("not a chain of certificates")
    chain = [x509.load_der_x509_certificate(base64.b64decode(one, validate=True)) for one in encoded]
    return chain, base64.b64decode(field["value"], validate=True)


def _canonical(statement: Mapping[str, Any]) -> bytes:
    """The bytes that are signed: everything but the signature, as JSON in one form."""
    signed = {name: value for name, value in statement.items() if name != SIGNATURE}
    return json.dumps(signed, sort_keys=True, separators=(",", ":")).encode()


def _name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else certificate.subject.rfc4514_string()


def _read_certificates(path: Path) -> list[x509.Certificate]:
    content = _read(path, "certificate")
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise SigningError(f"{path} holds no certificate (PEM); {_MAKE}.") from error


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SigningError(f"the {what} {path} cannot be read ({error.strerror}); {_MAKE}.") from error


def _write_new(path: Path, content: bytes, mode: int) -> None:
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
    except FileExistsError as error:
        raise SigningError(f"{path} exists; give another name, or remove it.") from error
    except OSError as error:
        raise SigningError(f"{path} cannot be written ({error.strerror}); give a name in a writable folder.") from error
