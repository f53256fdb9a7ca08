"""What meta-training and transfer found, drawn."""

from pathlib import Path
from typing import Any

import torch

import bilevel as bl
from applications.mri.meta.results import Experiment, with_spread
from applications.mri.meta.settings import Ablation
from applications.mri.meta.transfer_results import Transfer
from applications.pictures import blank_figure, save_figure
from applications.records import spread

_LEARNED = (Ablation.MATRIX, Ablation.VECTOR, Ablation.PENALTY)


def draw_meta(path: Path, experiment: Experiment) -> None:
    """Heat maps of the learned weights, and the scores of every way with their spread.

    Args:
        path: PNG file, replaced if it exists.
        experiment: all that was found.

    Raises:
        InputError: if the file cannot be written.
    """
    ways = experiment.settings.ablations
    shown = [experiment.correlation(one) for one in _LEARNED if one in ways]
    titles = [f"learned {one}" for one in _LEARNED if one in ways]
    n = len(experiment.trained)
    widths = [0.8 + 0.7 * len(one.validations) for one in shown]
    bars = 4.2 if experiment.tested else 0.0
    names = 0.09 * max(map(len, experiment.trained))
    figure = blank_figure(1.2 + names + sum(widths) + bars, 2.6 + 0.35 * max(n, len(ways)))
    columns = [*widths, *([bars] if bars else [])]
    if not columns:
        columns = [4.0]
    axes: Any = figure.subplots(1, len(columns), squeeze=False, width_ratios=columns)[0]
    largest = max((float(one.matrix.max()) for one in shown), default=1.0)
    for axis, title, one in zip(axes, titles, shown, strict=False):
        one.plot(axis, largest)
        axis.set_title(title, fontsize=9)
    for axis in axes[1 : len(shown)]:  # the names are those of the first
        axis.set(yticks=[], ylabel="")
    if bars:
        _bars(axes[-1], experiment)
    seeds = experiment.settings.seeds
    figure.suptitle(
        "Weights of training tasks"
        + (f", mean over {seeds} seeds" if seeds > 1 else "")
        + "; a column sums to 1",
        fontsize=10,
    )
    save_figure(path, figure)


def _bars(axis: Any, experiment: Experiment) -> None:
    """Mean PSNR of each way over the validation tasks' test slices, a dot a seed."""
    ways = experiment.settings.ablations
    zero = sum(experiment.zero_filled[name].psnr for name in experiment.tested)
    axis.axvline(zero / len(experiment.tested), color="black", linestyle=":", linewidth=1)
    for i, way in enumerate(ways):
        found = [one.psnr for one in experiment.means(way)]
        mean = sum(found) / len(found)
        axis.errorbar(mean, i, xerr=spread(found), fmt="s", color="#4292c6", capsize=3)
        axis.plot(found, [i] * len(found), "o", color="black", markersize=2.5)
        axis.text(mean, i - 0.2, with_spread(found, 2), ha="center", fontsize=8)
    axis.set_yticks(range(len(ways)), ways)
    axis.set_ylim(len(ways) - 0.5, -0.7)
    convention = experiment.means(ways[0])[0].convention
    axis.set_xlabel(f"PSNR [dB], convention {convention}; dotted: zero-filled")
    axis.set_title("validation tasks, test slices", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def draw_transfer(path: Path, found: Transfer) -> None:
    """Heat maps of weights and of gains in PSNR, and curves of adaptation to unseen tasks.

    Args:
        path: PNG file, replaced if it exists.
        found: what was measured.

    Raises:
        InputError: if the file cannot be written.
    """
    tasks = (*found.seen, *found.unseen)
    learned = found.learned or {}
    validated = tuple(next(iter(learned.values()), {}))
    adapted = [t for t in found.unseen or found.seen if t in next(iter(found.curves.values()))]
    widths = [0.8 + 0.6 * len(validated)] * bool(learned) + [1.2 + 0.7 * len(tasks)]
    widths += [3.6] * bool(adapted)
    names = 0.09 * max(map(len, found.models))
    height = 2.8 + 0.32 * len(found.models)
    figure = blank_figure(1.6 + 2 * names + sum(widths), height)
    axes: Any = list(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
    if learned:
        rows = torch.tensor([[row[name] for name in validated] for row in learned.values()])
        axis = axes.pop(0)
        bl.tasks.Correlation(rows, tuple(learned), validated).plot(axis)
        axis.set_title("learned weights", fontsize=9)
    _gains(axes.pop(0), found, tasks)
    if adapted:
        _curves(axes[0], found, adapted)
    save_figure(path, figure)


def _gains(axis: Any, found: Transfer, tasks: tuple[str, ...]) -> None:
    gains = torch.tensor([[found.gain(model, task) for task in tasks] for model in found.models])
    labels = tuple(f"{name} (unseen)" if name in found.unseen else name for name in tasks)
    bl.tasks.Correlation(gains, found.models, labels).plot(axis)
    axis.set(xlabel="task", ylabel="model")
    axis.set_title(
        "measured transfer: PSNR [dB] above\nthe mean of models of single tasks", fontsize=9
    )


def _curves(axis: Any, found: Transfer, tasks: list[str]) -> None:
    steps = found.settings.steps
    for model in found.models:
        style = "-" if model not in found.trained else ":"
        places = range(len(steps))
        axis.plot(places, found.curve(model, tasks), style, marker="o", markersize=3, label=model)
    axis.set_xticks(range(len(steps)), steps)
    axis.set_xlabel(f"steps on {found.settings.slices} slices of the task")
    axis.set_ylabel("PSNR [dB]")
    kind = "unseen" if found.unseen else "seen"
    axis.set_title(f"adaptation, mean over {len(tasks)} {kind} tasks", fontsize=9)
    axis.legend(fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)
