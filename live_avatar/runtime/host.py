"""Resident arrays of the runtimes whose memory is the host's."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from live_avatar.arrays import Array

OTHER_TYPES: Mapping[str, type] = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}
"""What numpy knows by `ml_dtypes` alone."""


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """The numpy type of a contract's type name; some are not numpy's own."""
    return np.dtype(OTHER_TYPES.get(name, name))


def host_zeros(shape: tuple[int, ...], dtype: str) -> Array:
    return np.zeros(shape, dtype=numpy_dtype(dtype))
