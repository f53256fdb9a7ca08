"""Figures of learned weights and of what they are worth, drawn without a screen."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bilevel as bl
from applications.pictures import blank_figure, save_figure
from applications.records import spread
from applications.toy.cleaning import CLEANED, CleaningResult
from applications.toy.task_results import Result

LEARNED, GREY = "#4292c6", "#bdbdbd"  # what was learned, and what it is compared with
_REFERENCE = ("oracle",)  # knows what is to be learned


def draw_task_weights(path: Path, result: Result) -> None:
    """The true relation, the learned weights, and accuracies with their spread.

    Args:
        path: PNG file, replaced if it exists.
        result: of all seeds; weights are shown in the mean over them.

    Raises:
        InputError: if the file cannot be written.
    """
    n, m = result.related.shape
    matrix = torch.stack([run.matrix.sigma for run in result.runs]).mean(0)
    vector = torch.stack([run.vector.sigma for run in result.runs]).mean(0)[:, None]
    truth = result.related / result.related.sum(0)
    largest = float(torch.cat([matrix, vector, truth], 1).max())
    width = 0.62 * m
    figure = blank_figure(7.6 + 2 * width, 2.9 + 0.3 * n)
    axes: Any = figure.subplots(1, 4, width_ratios=[width, width, 0.7, 4.6])
    maps = (
        (truth, result.validations, "Truth:\nequal weights on related tasks"),
        (matrix, result.validations, "Learned matrix:\none model a validation task"),
        (vector, ("all tasks",), "Learned\nvector"),
    )
    for axis, (values, names, title) in zip(axes, maps, strict=False):
        bl.tasks.Correlation(values, result.tasks, names).plot(axis, largest)
        axis.set_title(title, fontsize=9)
    for axis in axes[1:3]:  # the names are those of the first
        axis.set(yticks=[], ylabel="")
    axes[2].set_xlabel("")
    _bars(axes[3], result)
    k = len(result.runs)
    seeds = "1 seed" if k == 1 else f"mean over {k} seeds"
    sizes = result.settings.tasks
    figure.suptitle(
        f"Which training tasks help which validation task? {result.data}: {n} tasks of "
        f"{sizes.train} samples, weighed by {sizes.validation} validation samples each; {seeds}.\n"
        "turned: images by 90 degrees; mislabelled: classes renamed; random labels: no rule. "
        "Weights of a column sum to 1.",
        fontsize=10,
    )
    save_figure(path, figure)


def bar(axis: Any, row: int, found: Tensor, colour: str, hatch: str | None = None) -> None:
    """The mean over seeds with its spread, a dot a seed."""
    mean, error = float(found.mean()), spread(found)
    axis.barh(row, mean, color=colour, hatch=hatch, edgecolor="white")
    axis.errorbar(mean, row, xerr=error, color="black", capsize=3, linewidth=1)
    axis.plot(found.tolist(), [row] * len(found), "o", color="black", markersize=2.5)


def _bars(axis: Any, result: Result) -> None:
    """One bar a way of training, a dot a seed."""
    ways = list(result.runs[0].accuracies)
    for i, way in enumerate(ways):
        found = 100 * result.accuracy(way)
        colour = LEARNED if way.startswith("learned") else GREY
        bar(axis, i, found, colour, hatch="///" if way in _REFERENCE else None)
        text = f"{float(found.mean()):.1f} ± {spread(found):.1f} %"
        axis.text(2, i, text, va="center", fontsize=8)
    axis.set_yticks(range(len(ways)), ways)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("test accuracy [%], mean over validation tasks")
    axis.set_title(
        "What the weights are worth\n(dots: seeds; bars: mean ± standard deviation)", fontsize=9
    )
    axis.spines[["top", "right"]].set_visible(False)


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
    _bars_of_cleaning(axes[2], result)
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


def _bars_of_cleaning(axis: Any, result: CleaningResult) -> None:
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
