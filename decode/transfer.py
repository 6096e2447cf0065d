"""From the host to the device without waiting: a round waits for its card once, when it reads what was decided."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np


def to_device(values: Sequence[Any] | np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of numbers; `torch.tensor(values, device=device)` would wait for all that the card has still to do."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
