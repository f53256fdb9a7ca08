"""Figures drawn without a screen, and written whole."""

from io import BytesIO
from pathlib import Path
from typing import Any

from applications.files import write_whole
from applications.outputs import DRAWN


def blank_figure(width: float, height: float) -> Any:
    """An empty `matplotlib.figure.Figure` of so many inches, which needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(path: Path, figure: Any, dpi: int = 130) -> None:
    """Write a figure.

    Args:
        path: PNG file, replaced if it exists.
        figure: what is drawn.
        dpi: pixels an inch.

    Raises:
        InputError: if the file cannot be written.
    """
    drawn = BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png", metadata=DRAWN)
    write_whole(path, drawn.getvalue())
