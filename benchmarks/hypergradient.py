"""Time and error of one hypergradient, ours and the peers', on ridge regression.

Run with `make bench-peers`, or `python -m benchmarks.hypergradient [--control scalar|vector]
[--repeats 31] [--dimensions 20 300]` in an environment that has the peers.

Inner problem |X w - y|^2 / 2n + sum exp(alpha) w^2 / 2, gradient descent from zero; outer problem
the loss on other data; float64, one thread, processor time. Unrolled rows are compared with the
hypergradient of the value after those steps, by a loop over sensitivities; implicit rows with the
closed form. "blocks" keeps every eighth state, and the graph of eight steps at a time.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

import bilevel as bl
from benchmarks.measure import Timing, machine, median_ratio, paired_times
from benchmarks.peers import bare, with_betty, with_boat, with_higher, with_torchopt
from benchmarks.peers.modules import Run
from benchmarks.ridge import CG_RTOL, Ridge, relative_error

STEPS = {20: 100, 300: 200}
WRONG = 1e-6  # relative error from which on a number counts as wrong here


def ours(method: bl.methods.HypergradientMethod, *, certified: bool = False) -> Callable:
    """A maker like those of the peers."""

    def make(ridge: Ridge, steps: int) -> Run:
        problem = bl.BilevelProblem(ridge.inner, ridge.outer)
        descent = bl.optim.SGD(ridge.step_size)
        solver = bl.BilevelSolver(problem, descent, steps, method, certificate=None)
        if certified:
            solver = bl.BilevelSolver(problem, descent, steps, method)
        start = ridge.start
        return lambda: solver.hypergradient(start, ridge.alpha).gradient

    return make


CG = bl.linear.CG(rtol=CG_RTOL)
ROWS: dict[str, dict[str, Callable]] = {
    "unrolled": {
        "torch, a loop": bare.unrolled,
        "higher": with_higher.unrolled,
        "torchopt": with_torchopt.unrolled,
        "boat NGD + RAD": with_boat.unrolled,
        "betty iterative": with_betty.unrolled,
        "bilevel Unrolled": ours(bl.Unrolled()),
        "bilevel MLM, graphs": ours(bl.MLM(bl.Checkpointing(block=None))),
        "bilevel MLM, blocks": ours(bl.MLM(bl.Checkpointing(block=8))),
        "bilevel MLM, states": ours(bl.MLM()),
    },
    "implicit": {
        "torch, a loop + CG": bare.implicit,
        "torchopt CG": with_torchopt.cg,
        "torchopt Neumann": with_torchopt.neumann,
        "boat NGD + CG": with_boat.cg,
        "boat NGD + Neumann": with_boat.neumann,
        "betty CG": with_betty.cg,
        "betty Neumann": with_betty.neumann,
        "bilevel Implicit(CG)": ours(bl.Implicit(CG)),
        "bilevel, certified": ours(bl.Implicit(CG), certified=True),
        "bilevel OneStep": ours(bl.OneStep()),
    },
}
APPROXIMATE = {"bilevel OneStep"}  # by intention, so never the yardstick

# (what, against what, at most, in which dimensions)
TARGETS = (
    ("bilevel Unrolled", None, 1.05, (20, 300)),
    ("bilevel Implicit(CG)", None, 1.05, (20, 300)),
    ("bilevel MLM, graphs", "bilevel Unrolled", 1.1, (20, 300)),
    ("bilevel MLM, blocks", "bilevel Unrolled", 1.8, (20, 300)),
    ("bilevel MLM, states", "bilevel Unrolled", 1.8, (20, 300)),
    ("bilevel, certified", "bilevel Implicit(CG)", 1.25, (20,)),
)


@dataclass(frozen=True)
class Row:
    """One way of finding the hypergradient: time, and error against the truth of its mode."""

    name: str
    mode: str
    timing: Timing | None
    error: float
    note: str = ""

    @property
    def right(self) -> bool:
        return self.timing is not None and self.error < WRONG and self.name not in APPROXIMATE


def measure(ridge: Ridge, steps: int, repeats: int) -> list[Row]:
    """Every row, timed in turn."""
    truth = {"unrolled": ridge.after(steps), "implicit": ridge.exact}
    found: dict[str, tuple[str, Run, float]] = {}
    failed: list[Row] = []
    for mode, makers in ROWS.items():
        for name, make in makers.items():
            try:
                run = make(ridge, steps)
                run()
                error = relative_error(run().detach(), truth[mode])
            except ImportError as missing:
                failed.append(Row(name, mode, None, math.nan, f"not installed: {missing}"))
            else:
                found[name] = mode, run, error
    runs = [run for _, run, _ in found.values()]
    times = paired_times(runs, repeats, clock=time.process_time)
    rows = [
        Row(name, mode, timing, error)
        for (name, (mode, _, error)), timing in zip(found.items(), times, strict=True)
    ]
    return rows + failed


def fastest(rows: list[Row], mode: str) -> Row:
    """The fastest of the rows of a mode that found the right number."""
    right = [(row.timing.median, row) for row in rows if row.mode == mode and row.right]
    return min(right, key=lambda pair: pair[0])[1]


def report(rows: list[Row], d: int) -> None:
    """Print the table, and what was to be reached."""
    by_name = {row.name: row for row in rows}
    for mode in ROWS:
        best = fastest(rows, mode)
        print(f"\n| {mode} | median ms | ratio to the fastest | relative error | |")
        print("|---|---|---|---|---|")
        for row in [row for row in rows if row.mode == mode]:
            if row.timing is None:
                print(f"| {row.name} | | | | {row.note} |")
                continue
            mark = "" if row.right else "approximate" if row.name in APPROXIMATE else "**wrong**"
            ratio = median_ratio(row.timing, best.timing)
            times = f"{1e3 * row.timing.median:.2f} | {ratio:.2f}"
            print(f"| {row.name} | {times} | {row.error:.1e} | {mark} |")
    print()
    for name, against, limit, dimensions in TARGETS:
        row = by_name.get(name)
        if row is None or d not in dimensions:
            continue
        yardstick = by_name[against] if against else fastest(rows, row.mode)
        ratio = median_ratio(row.timing, yardstick.timing)
        verdict = "reached" if ratio <= limit else "NOT REACHED"
        print(f"{name}: {ratio:.2f} x {yardstick.name}, to reach {limit}: {verdict}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--control", choices=("scalar", "vector"), default="vector")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument(
        "--dimensions", type=int, nargs="+", choices=tuple(STEPS), default=(20, 300)
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for peer in ("betty", "torchopt"):  # of torch's functions that they use
        warnings.filterwarnings("ignore", module=peer)
    print(machine())
    for d in arguments.dimensions:
        ridge = Ridge.random(d, scalar=arguments.control == "scalar")
        gap = relative_error(ridge.after(STEPS[d]), ridge.exact)
        print(
            f"\nd = {d}, T = {STEPS[d]}, {arguments.control} control, CG to {CG_RTOL:g} "
            f"({ridge.cg_iterations} iterations), after T steps {gap:.0e} from the minimiser's"
        )
        report(measure(ridge, STEPS[d], arguments.repeats), d)


if __name__ == "__main__":
    main()
