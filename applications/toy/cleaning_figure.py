"""The figure of data hyper-cleaning, drawn without a screen."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from applications.pictures import blank_figure, save_figure
from applications.toy.cleaning import CLEANED, CleaningResult
from applications.toy.figures import GREY, LEARNED, bar


def draw_cleaning(path: Path, result: CleaningResult) -> None:
    """Learned weights of right and wrong labels, the descent, and accuracies with their spread.

    Args:
        path: PNG file, replaced if it exists.
        result: of all seeds.

    Raises:
        InputError: if the file cannot be written.
    """
    figure = blank_figure(12, 3.6)
    axes: Any = figure.subplots(1, 3, width_ratios=[1, 0.8, 1.3])
    _histogram(axes[0], result)
    for run in result.runs:
        axes[1].plot(range(1, len(run.values) + 1), run.values, color=LEARNED)
        axes[1].axvline(run.updates, color=GREY, linewidth=1, linestyle="--")
    axes[1].set(xlabel="update of the weights", ylabel="validation loss (outer objective)")
    axes[1].set_title("The descent (dashed: updates\nchosen on held-out data)", fontsize=9)
    _bars(axes[2], result)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    k = len(result.runs)
    wrong = float(torch.stack([run.wrong.double().mean() for run in result.runs]).mean())
    figure.suptitle(
        f"Data hyper-cleaning: {result.data}, {result.settings.model} model, "
        f"{result.settings.parts[0]} training samples, {100 * wrong:.0f} % of the labels wrong; "
        + ("1 seed" if k == 1 else f"{k} seeds"),
        fontsize=10,
    )
    save_figure(path, figure)


def _histogram(axis: Any, result: CleaningResult) -> None:
    weights = torch.cat([run.weights for run in result.runs])
    wrong = torch.cat([run.wrong for run in result.runs])
    bins = np.linspace(0, 1, 26)
    for chosen, colour, name in ((~wrong, LEARNED, "right"), (wrong, "#ef6548", "wrong")):
        axis.hist(weights[chosen].numpy(), bins, color=colour, alpha=0.7, label=f"{name} labels")
    axis.axvline(0.5, color="black", linewidth=1, linestyle=":")
    axis.set(xlabel="learned weight", ylabel="training samples")
    axis.set_title(f"Learned weights, F1 {float(result.cleaning('f1').mean()):.3f}", fontsize=9)
    axis.legend(fontsize=8, frameon=False)


def _bars(axis: Any, result: CleaningResult) -> None:
    """One bar a way of training, a dot a seed."""
    ways = list(result.runs[0].accuracies)
    lowest = 100.0
    for i, way in enumerate(ways):
        found = 100 * result.accuracy(way)
        lowest = min(lowest, float(found.min()))
        bar(axis, i, found, LEARNED if way == CLEANED else GREY)
    left = max(0.0, 5 * np.floor(lowest / 5) - 5)
    labels = [f"{way}  {100 * float(result.accuracy(way).mean()):.1f} %" for way in ways]
    axis.set_yticks(range(len(ways)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(left, 100)
    axis.set_xlabel(f"test accuracy [%] (axis from {left:.0f})")
    axis.set_title("What the weights are worth", fontsize=9)
