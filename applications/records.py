"""What experiments tell: their progress, settings as plain values, and the spread over seeds."""

import platform
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Report = Callable[[str, float], None]  # (stage, share of it done)


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


def describe(settings: object) -> dict[str, object]:
    """Settings as plain values, for a record of how a result was reached."""
    return {
        name: value if _is_plain(value) else repr(value) for name, value in vars(settings).items()
    }


def machine() -> dict[str, object]:
    """What a time was taken on."""
    processor = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return {"torch": torch.__version__, "threads": threads, "processor": processor}


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
