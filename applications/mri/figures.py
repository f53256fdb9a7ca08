"""Figures of reconstructions, their errors and their multipliers, drawn without a screen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

_ERROR_GAIN = 5


@dataclass(frozen=True, eq=False)
class Panel:
    """One slice as several methods show it.

    Attributes:
        title: what it is.
        reference: magnitude image, or None where no reference exists.
        images: magnitude images by method.
    """

    title: str
    reference: Tensor | None
    images: Mapping[str, Tensor]


def draw_reconstructions(
    path: Path, panels: Sequence[Panel], multipliers: Sequence[Tensor], title: str
) -> None:
    """Images and errors times 5 of each panel, and below the multipliers |lambda_t|.

    Args:
        path: PNG file, replaced if it exists.
        panels: one or more, with the same methods.
        multipliers: root sums of squares over the coils of lambda_0, ..., lambda_T of one slice.
        title: of the figure.
    """
    methods = list(panels[0].images)
    n_columns = max(len(methods) + 1, len(multipliers))
    n_rows = sum(1 if panel.reference is None else 2 for panel in panels) + 1
    figure = Figure(figsize=(2.3 * n_columns, 2.45 * n_rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(n_rows, n_columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    row = 0
    for panel in panels:
        top = panel.images[methods[-1]] if panel.reference is None else panel.reference
        peak = float(np.quantile(top.numpy(), 0.998))
        if panel.reference is not None:
            _show(axes[row][0], panel.reference, f"{panel.title}\nreference", peak)
        for column, name in enumerate(methods, start=1):
            image = panel.images[name]
            label = name if panel.reference is not None else f"{panel.title}\n{name}"
            if panel.reference is not None:
                label = f"{name}\n{_psnr(panel.reference, image):.1f} dB"
            _show(axes[row][column], image, label, peak)
            if panel.reference is not None:
                error = (image - panel.reference).abs()
                _show(axes[row + 1][column], error * _ERROR_GAIN, f"error x {_ERROR_GAIN}", peak)
        row += 1 if panel.reference is None else 2
    for t, multiplier in enumerate(multipliers):
        peak = float(np.quantile(multiplier.numpy(), 0.995)) or 1.0
        label = rf"$|\lambda_{t}|$, max {float(multiplier.max()):.1e}"
        _show(axes[row][t], multiplier, label, peak, cmap="magma")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def draw_image(path: Path, image: Tensor) -> None:
    """One magnitude image as a PNG file, one pixel a pixel.

    Args:
        path: PNG file, replaced if it exists.
        image: shape ``(rows, columns)``.
    """
    from matplotlib.image import imsave

    peak = float(np.quantile(image.numpy(), 0.999)) or 1.0
    imsave(path, image.numpy(), cmap="gray", vmin=0, vmax=peak)


def _show(axis: Any, image: Tensor, label: str, peak: float, cmap: str = "gray") -> None:
    axis.imshow(image.numpy(), cmap=cmap, vmin=0, vmax=peak, interpolation="nearest")
    axis.set_title(label, fontsize=8)


def _psnr(reference: Tensor, image: Tensor) -> float:
    error = (image - reference).square().mean()
    return float(10 * (reference.max().square() / error).log10())
