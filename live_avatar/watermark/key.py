"""The secret of an operator, and the numbers that a mark carries."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from live_avatar.arrays import Array
from live_avatar.errors import WatermarkError

OPERATOR_BITS: Final = 16
SESSION_BITS: Final = 48
CHECK_BITS: Final = 32
SYMBOLS: Final = (OPERATOR_BITS + SESSION_BITS + CHECK_BITS) // 8
"""Bytes that a mark carries: the numbers, and a check that only the holder of the key can make."""
PREFIX: Final = "live-avatar-watermark:"
_LINE: Final = re.compile(rf"{PREFIX}([0-9a-f]{{64}})\s*")
MAX_KEY_BYTES: Final = 4096


@dataclass(frozen=True)
class Origin:
    """Where a video was made. operator: 0 to 65535. session: a number below 2**48, drawn for each session."""

    operator: int
    session: int

    def __post_init__(self) -> None:
        for name, number, bits in (("operator", self.operator, OPERATOR_BITS), ("session", self.session, SESSION_BITS)):
            if not 0 <= number < 2**bits:
                raise WatermarkError(f"the {name}'s number is {number}; give one from 0 to {2**bits - 1}.")

    @property
    def session_text(self) -> str:
        """The session's number as logs and reports show it: 12 hexadecimal digits."""
        return f"{self.session:012x}"


def new_session() -> int:
    """A random number for a session."""
    return secrets.randbits(SESSION_BITS)


@dataclass(frozen=True, repr=False)
class WatermarkKey:
    """The secret from which the mark's pattern and its check follow. secret: 32 bytes."""

    secret: bytes

    def bytes_for(self, purpose: str, count: int) -> Array:
        """`count` bytes uint8 that follow from the secret and the purpose, the same everywhere."""
        stream = hashlib.shake_256(self.secret + purpose.encode()).digest(count)
        return np.frombuffer(stream, dtype=np.uint8)

    def symbols(self, origin: Origin) -> Array:
        """The bytes that a mark carries, uint8 [SYMBOLS]: both numbers and their check."""
        numbers = (origin.operator << SESSION_BITS | origin.session).to_bytes((OPERATOR_BITS + SESSION_BITS) // 8)
        return np.frombuffer(numbers + self._check(numbers), dtype=np.uint8)

    def origin(self, symbols: Array) -> Origin | None:
        """The numbers in the bytes of a mark [SYMBOLS]; None if their check is wrong."""
        data = symbols.astype(np.uint8).tobytes()
        numbers, check = data[: -CHECK_BITS // 8], data[-CHECK_BITS // 8 :]
        if not hmac.compare_digest(self._check(numbers), check):
            return None
        value = int.from_bytes(numbers)
        return Origin(value >> SESSION_BITS, value & (2**SESSION_BITS - 1))

    def _check(self, numbers: bytes) -> bytes:
        return hmac.digest(self.secret, b"check" + numbers, "sha256")[: CHECK_BITS // 8]


def read_key(path: Path) -> WatermarkKey:
    """The key in a file that `make_key` wrote. Raises `WatermarkError` for any other file."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_KEY_BYTES + 1).decode("ascii", errors="replace")
    except OSError as error:
        raise WatermarkError(
            f"the watermark key {path} cannot be read ({error.strerror}); make one with "
            f"`live-avatar watermark-key {path}`."
        ) from error
    if not (found := _LINE.fullmatch(text)):
        raise WatermarkError(
            f"{path} holds no watermark key; expected one line, {PREFIX} and 64 hexadecimal digits. Make a key with "
            "`live-avatar watermark-key FILE`."
        )
    return WatermarkKey(bytes.fromhex(found[1]))


def make_key(path: Path) -> WatermarkKey:
    """Writes a new key to a new file that only its owner can read. Raises `WatermarkError` if that cannot be."""
    secret = secrets.token_bytes(32)
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{PREFIX}{secret.hex()}\n")
    except FileExistsError as error:
        raise WatermarkError(
            f"{path} exists; a key that marked videos must be kept, so give the name of a new file."
        ) from error
    except OSError as error:
        raise WatermarkError(f"{path} cannot be written ({error.strerror}); give a writable path.") from error
    return WatermarkKey(secret)
