"""Memory and time of long horizons: multiplier sweeps within a budget against autograd.

Run with `python -m benchmarks.memory [--repeats 7] [--heavy] [--activation tanh] [--json FILE]`, or
with `--figure FILE` for memory and time against the number of steps. Live bytes are beyond the
gradient; times are seconds that the process computed.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import bilevel as bl
from benchmarks.measure import MIB, machine, median_ratio, paired_times, peak_live_bytes, save, show
from benchmarks.problems import (
    ACTIVATIONS,
    Case,
    autograd,
    difference,
    layers,
    multipliers,
    segments,
)


def choices(case: Case, budget: str) -> dict[str, Callable[[], list[Tensor]]]:
    return {
        "autograd": lambda: autograd(case),
        "torch checkpoint": lambda: segments(case),
        f"MLM, {budget}": lambda: multipliers(case, bl.Budget(budget)),
        "MLM, states kept": lambda: multipliers(case),
        "MLM, graphs kept": lambda: multipliers(case, bl.Checkpointing(block=None)),
    }


def table(case: Case, budget: str, repeats: int) -> list[dict[str, object]]:
    """Time, live bytes and the difference of the gradients."""
    runs = choices(case, budget)
    expected = autograd(case)
    gradient = sum(part.nbytes for part in expected)
    times = paired_times(list(runs.values()), repeats, warm_up=1, clock=time.process_time)
    rows = []
    for (name, run), timing in zip(runs.items(), times, strict=True):
        # Autograd and torch's checkpoint also hold a copy of theta, which is not counted.
        copies = 0 if name.startswith("MLM") else gradient
        rows.append(
            {
                case.name: name,
                "seconds": timing.median,
                "ratio": median_ratio(timing, times[0]),
                "live MiB": (peak_live_bytes(run) - gradient - copies) / MIB,
                "difference": difference(run(), expected),
            }
        )
    return rows


def against_horizon(budget: str, repeats: int) -> list[dict[str, object]]:
    """Live bytes and time for horizons up to 10 000; the weights are shared by all steps."""
    rows = []
    for horizon in (10, 30, 100, 300, 1000, 3000, 10_000):
        case = layers(128, 64, horizon, shared=True)
        runs = choices(case, budget)
        del runs["MLM, graphs kept"]
        n = repeats if horizon < 3000 else 1
        times = paired_times(list(runs.values()), n, warm_up=1, clock=time.process_time)
        for (name, run), timing in zip(runs.items(), times, strict=True):
            row = {"": name, "T": horizon, "seconds": timing.median}
            rows.append({**row, "live MiB": peak_live_bytes(run) / MIB})
            show(rows[-1:])
    return rows


COLOURS = ("#444444", "#b8860b", "#1f77b4", "#c0392b")


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Two panels, log-log: memory and time against the number of steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"})
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    names = list(dict.fromkeys(row[""] for row in rows))
    for panel, key, label in (
        (panels[0], "live MiB", "peak of live memory [MiB]"),
        (panels[1], "seconds", "time of one gradient [s]"),
    ):
        ends = []
        for name, colour in zip(names, COLOURS, strict=True):
            mine = [row for row in rows if row[""] == name]
            x, y = [row["T"] for row in mine], [row[key] for row in mine]
            panel.plot(x, y, "o-", color=colour, markersize=3, linewidth=1.4)
            ends.append((y[-1], x[-1], name, colour))
        panel.set(xscale="log", yscale="log", xlabel="number of steps T", ylabel=label)
        panel.set_xlim(8, 140_000)
        panel.set_xticks([10, 100, 1000, 10_000], ["10", "100", "1000", "10 000"])
        _label(panel, ends)
        panel.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _label(panel: object, ends: list[tuple]) -> None:
    """Names at the ends of the lines, kept a line of text apart."""
    low, high = panel.get_ylim()
    line = (high / low) ** 0.06
    tops = [y for y, *_ in sorted(ends)]
    for k in range(1, len(tops)):
        tops[k] = max(tops[k], tops[k - 1] * line)
    excess = max(tops[-1] / high * line**0.5, 1.0)
    for (_, x, name, colour), y in zip(sorted(ends), tops, strict=True):
        panel.annotate(
            name,
            (x, y / excess),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )


def main() -> None:
    """Print a table; with `--figure`, draw memory and time against the number of steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", default="64 MiB")
    parser.add_argument("--heavy", action="store_true", help="256 x 256, T = 300")
    # A float64 tanh costs as much as the product: then half of the time is the forward, and an
    # evaluation repeated weighs more.
    parser.add_argument("--activation", choices=ACTIVATIONS, default="relu")
    parser.add_argument("--figure", type=Path, help="draw against T instead, SVG or PNG")
    parser.add_argument("--json", help="where to save what was found")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    if arguments.figure:
        rows = against_horizon("8 MiB", arguments.repeats)
        draw(rows, arguments.figure)
        save(arguments.json, {"horizons": rows})
        return
    sizes = (256, 256, 300) if arguments.heavy else (1024, 64, 1000)
    case = layers(*sizes, arguments.activation)
    found = bl.sweeps.measure(case.problem, case.start, case.control)
    budget = bl.Budget(arguments.budget)
    plan = bl.plan(
        case.horizon,
        budget.bytes,
        found.state_bytes,
        found.graph_bytes,
        working_bytes=found.working_bytes,
    )
    print(f"measured {found}\n{arguments.budget}: {plan}")
    rows = table(case, arguments.budget, arguments.repeats)
    show(rows)
    save(arguments.json, {"sizes": sizes, "rows": rows})


if __name__ == "__main__":
    main()
