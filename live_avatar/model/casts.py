"""Changes of a tensor's type."""

from __future__ import annotations

import torch
from torch import Tensor


def in_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in that type. One that has it is left alone: torch.export would keep two nodes for a cast that does nothing."""
    return x if x.dtype == dtype else x.to(dtype)
