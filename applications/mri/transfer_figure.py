"""Learned correlation beside measured transfer, and how fast models adapt, drawn."""

from pathlib import Path
from typing import Any

from applications.mri.transfer_results import Transfer
from applications.pictures import blank_figure, save_figure


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
        rows = [[row[name] for name in validated] for row in learned.values()]
        _heat(axes.pop(0), rows, tuple(learned), validated, "learned weights", "Blues", "{:.2f}")
    gains = [[found.gain(model, task) for task in tasks] for model in found.models]
    labels = [f"{name} (unseen)" if name in found.unseen else name for name in tasks]
    title = "measured transfer: PSNR [dB] above\nthe mean of models of single tasks"
    _heat(axes.pop(0), gains, found.models, tuple(labels), title, "RdBu", "{:+.2f}")
    if adapted:
        _curves(axes[0], found, adapted)
    save_figure(path, figure)


def _heat(
    axis: Any,
    rows: list[list[float]],
    names: tuple[str, ...],
    columns: tuple[str, ...],
    title: str,
    colours: str,
    form: str,
) -> None:
    largest = max(abs(value) for row in rows for value in row) or 1.0
    lowest = -largest if colours == "RdBu" else 0
    axis.imshow(rows, cmap=colours, vmin=lowest, vmax=largest, aspect="auto")
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            colour = "white" if abs(value) > 0.6 * largest else "black"
            axis.text(j, i, form.format(value), ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.set_title(title, fontsize=9)


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
