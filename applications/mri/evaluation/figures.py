"""Figures of reconstructions, their errors and their multipliers, drawn without a screen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from applications.errors import InputError
from applications.files import write_whole
from applications.mri.evaluation.metrics import Convention, score
from applications.outputs import DRAWN
from applications.pictures import blank_figure, save_figure

_ERROR_GAIN = 5


@dataclass(frozen=True, eq=False)
class Panel:
    """One slice as several methods show it.

    Attributes:
        title: what it is, in lines; stands below the reference.
        images: magnitude images by method.
        reference: magnitude image, or None where no reference exists.
    """

    title: str
    images: Mapping[str, Tensor]
    reference: Tensor | None = None


def draw_reconstructions(
    path: Path, panels: Sequence[Panel], multipliers: Mapping[int, Tensor], title: str
) -> None:
    """Images and errors times 5, the multipliers |lambda_t| below.

    Args:
        path: PNG file, replaced if it exists.
        panels: slices, one or more, all with the same methods.
        multipliers: root sums of squares over the coils of lambda_t of one slice, by t.
        title: of the figure.

    Raises:
        InputError: if the file cannot be written.
    """
    methods = list(panels[0].images)
    n_columns = max(len(methods) + 1, len(multipliers))
    n_rows = 2 * len(panels) + 1
    figure = blank_figure(2.3 * n_columns, 2.45 * n_rows + 0.4)
    axes: Any = figure.subplots(n_rows, n_columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, panel in enumerate(panels):
        _show_panel(panel, axes[2 * i], axes[2 * i + 1])
    for column, (t, multiplier) in enumerate(multipliers.items()):
        label = rf"$|\lambda_{{{t}}}|$, max {float(multiplier.max()):.1e}"
        _show(axes[-1][column], multiplier, label, _peak(multiplier), cmap="magma")
    figure.suptitle(title, fontsize=10)
    save_figure(path, figure, dpi=110)


def draw_errors(path: Path, panel: Panel) -> None:
    """The images of all methods beside the reference, errors times 5 below.

    Args:
        path: PNG file, replaced if it exists.
        panel: a slice with its reference.

    Raises:
        InputError: if the file cannot be written.
    """
    n_columns = len(panel.images) + 1
    figure = blank_figure(2.3 * n_columns, 5.2)
    axes: Any = figure.subplots(2, n_columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    _show_panel(panel, axes[0], axes[1])
    save_figure(path, figure, dpi=110)


def draw_image(path: Path, image: Tensor) -> None:
    """One magnitude image as a PNG file, one pixel a pixel.

    Args:
        path: PNG file, replaced if it exists.
        image: shape ``(rows, columns)``.

    Raises:
        InputError: if the file cannot be written, or the image is not finite.
    """
    from matplotlib.image import imsave

    if not bool(torch.isfinite(image).all()):
        raise InputError(f"{path}: the image must be finite, it is not; use other weights.")

    drawn = BytesIO()
    shown = {"cmap": "gray", "vmin": 0, "vmax": _peak(image)}
    imsave(drawn, image.numpy(), format="png", metadata=DRAWN, **shown)
    write_whole(path, drawn.getvalue())


def _show_panel(panel: Panel, images: Any, errors: Any) -> None:
    """A slice as all methods show it, in one row of axes, and the errors in another."""
    reference = panel.reference
    if reference is None:
        reference = list(panel.images.values())[-1]
    peak = _peak(reference)
    _show(images[0], reference, "reference", peak)
    title = "\n".join(part for line in panel.title.splitlines() for part in wrap(line, 30))
    errors[0].text(0.0, 0.95, title, fontsize=8, va="top", transform=errors[0].transAxes)
    for column, (name, image) in enumerate(panel.images.items(), start=1):
        _show(images[column], image, f"{name}\n{_psnr(reference, image)}", peak)
        error = _ERROR_GAIN * (image - reference).abs()
        _show(errors[column], error, f"error x {_ERROR_GAIN}", peak)


def _show(axis: Any, image: Tensor, label: str, peak: float, cmap: str = "gray") -> None:
    axis.imshow(image.numpy(), cmap=cmap, vmin=0, vmax=peak, interpolation="nearest")
    axis.set_title(label, fontsize=8)


def _peak(image: Tensor) -> float:
    """White: nearly the largest value, so that single bright pixels do not darken the rest."""
    return float(np.quantile(image.numpy(), 0.998)) or 1.0


def _psnr(reference: Tensor, image: Tensor) -> str:
    found = score(reference[None], image[None], Convention.SLICE)
    return f"{found.psnr:.1f} dB ({found.convention})"
