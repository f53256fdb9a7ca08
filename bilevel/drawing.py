"""Figures by matplotlib, which is imported where one is asked for."""

from typing import Any

from bilevel.errors import UnsupportedError


def new_figure(width: float, height: float, *, name: str, instead: str) -> Any:
    """An empty figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            f"{name} needs matplotlib: pip install matplotlib, or read {instead}."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")
