"""Resident arrays of the runtimes whose memory is the host's."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from live_avatar.arrays import Array


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """The numpy type of a contract's type name; bfloat16 is not numpy's own."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def host_zeros(shape: tuple[int, ...], dtype: str) -> Array:
    return np.zeros(shape, dtype=numpy_dtype(dtype))
