"""What runs of several seeds have in common."""

from collections.abc import Sequence

import torch
from torch import Tensor


def spread(values: Tensor | Sequence[float]) -> float:
    """Standard deviation over seeds, 0 of a single one.

    Args:
        values: one a seed.

    Returns:
        That of the sample, with n - 1.
    """
    if len(values) < 2:
        return 0.0
    return float(torch.as_tensor(values, dtype=torch.float64).std())
