"""Figures of learned weights and of what they are worth, drawn without a screen."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from applications.pictures import blank_figure, save_figure
from applications.seeds import spread
from applications.toy.task_weights import Result

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
    _heat(axes[0], truth, "Truth:\nequal weights on related tasks", result.validations, largest)
    _heat(
        axes[1], matrix, "Learned matrix:\none model a validation task", result.validations, largest
    )
    _heat(axes[2], vector, "Learned\nvector", ("all tasks",), largest)
    axes[0].set_yticks(range(n), result.tasks)
    axes[0].set_ylabel("training task")
    for axis in axes[:2]:
        axis.set_xlabel("validation task")
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


def _heat(axis: Any, values: Tensor, title: str, names: tuple[str, ...], largest: float) -> None:
    axis.imshow(values.tolist(), cmap="Blues", vmin=0, vmax=largest, aspect="auto")
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            colour = "white" if value > 0.6 * largest else "black"
            text = "0" if value < 5e-3 else f"{value:.2f}"
            axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks([])
    axis.set_title(title, fontsize=9)


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
