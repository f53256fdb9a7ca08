"""What counts as a whole number: integers, and not the booleans that Python takes for integers."""

from typing import Any


def is_whole(value: Any, least: float = 0) -> bool:
    """Whether `value` is an integer and at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
