"""Time of gradients and Hessian-vector products against autograd, of certificates, of schedules.

Run with `python -m benchmarks.speed [--repeats 21] [--json FILE]`. Times are seconds that the
process computed, on one thread; ratios are medians over pairs of runs.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import bilevel as bl
from benchmarks.measure import MIB, machine, median_ratio, paired_times, save, show
from benchmarks.problems import (
    Case,
    autograd,
    difference,
    double_backward,
    layers,
    multipliers,
    ridge,
    tangent_sweep,
    through_rollout,
)
from benchmarks.ridge import Ridge
from bilevel.sweeps.memory import LiveBytes

Row = dict[str, object]
GRAPHS, STATES, BLOCKS = (
    bl.Checkpointing(block=None),
    bl.Checkpointing(),
    bl.Checkpointing(block=10),
)


def cases() -> list[tuple[Case, str]]:
    """Tiny, medium and heavy steps, each with a budget of about a tenth of its graph."""
    return [
        (ridge(20, 100), "200 KiB"),
        (ridge(300, 200), "2 MiB"),
        (layers(256, 64, 200), "8 MiB"),
        (layers(256, 256, 100), "16 MiB"),
    ]


def compare(
    case: Case, repeats: int, name: str, runs: dict[str, Callable[[], list[Tensor]]]
) -> list[Row]:
    """Times of `runs` in turn; the first is the reference."""
    times = paired_times(list(runs.values()), repeats, clock=time.process_time)
    expected = next(iter(runs.values()))()
    return [
        {
            "": case.name,
            name: label,
            "ms": 1e3 * timing.median,
            "ratio": median_ratio(timing, times[0]),
            "difference": difference(run(), expected),
        }
        for (label, run), timing in zip(runs.items(), times, strict=True)
    ]


def gradients(case: Case, budget: str, repeats: int) -> list[Row]:
    runs = {
        "autograd": lambda: autograd(case),
        "adjoint, graphs kept": lambda: multipliers(case, GRAPHS),
        "adjoint, states kept": lambda: multipliers(case, STATES),
        "adjoint, states at every tenth step": lambda: multipliers(case, BLOCKS),
        f"adjoint, {budget}": lambda: multipliers(case, bl.Budget(budget)),
        "rollout, graphs kept": lambda: through_rollout(case, GRAPHS),
        "rollout, states kept": lambda: through_rollout(case, STATES),
    }
    return compare(case, repeats, "gradient", runs)


def products(case: Case, repeats: int) -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    direction = [
        torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in case.leaves
    ]
    runs = {
        "double backward": lambda: double_backward(case, direction),
        "hvp, graphs kept": lambda: tangent_sweep(case, direction, GRAPHS),
        "hvp, states kept": lambda: tangent_sweep(case, direction, STATES),
        "hvp, states at every tenth step": lambda: tangent_sweep(case, direction, BLOCKS),
    }
    return compare(case, repeats, "Hessian-vector product", runs)


def schedules() -> list[Row]:
    """Planning and walking through schedules: nothing is quadratic in T."""
    rows = []
    for horizon in (1000, 10_000, 100_000):
        began = time.process_time()
        plan = bl.plan(horizon, 2**20, 1000, 2000)
        planned = time.process_time() - began
        schedule = plan.schedule(horizon)
        began = time.process_time()
        n_actions = sum(1 for _ in schedule.actions())
        rows.append(
            {
                "T": horizon,
                "snapshots": schedule.snapshots,
                "block": schedule.block,
                "forward steps / T": schedule.forward_steps / horizon,
                "actions": n_actions,
                "plan ms": 1e3 * planned,
                "walk ms": 1e3 * (time.process_time() - began),
            }
        )
    return rows


def long_runs(repeats: int) -> list[Row]:
    """A small problem, 100 000 steps: live bytes are those of the schedule, whatever T."""
    rows = []
    for horizon in (1000, 10_000, 100_000):
        case = layers(4, 8, horizon, shared=True)
        run = partial(multipliers, case, bl.Budget("1 MiB"))
        (timing,) = paired_times([run], min(repeats, 3), 0, time.process_time)
        with LiveBytes() as live:  # the profiler's record of so many steps takes gigabytes itself
            run()
        rows.append(
            {
                "T": horizon,
                "state bytes": case.start.nbytes,
                "budget MiB": 1.0,
                "live MiB": live.peak / MIB,
                "s": timing.median,
                "us a step": 1e6 * timing.median / horizon,
            }
        )
    return rows


def certificates(repeats: int) -> list[Row]:
    """A hypergradient with its certificate beside one without: ridge, d = 20, T = 100."""
    case = Ridge.random(20)
    problem = bl.BilevelProblem(case.inner, case.outer)
    rows: list[Row] = []
    for name, method in {
        "MLM, states": bl.MLM(bl.Checkpointing()),
        "MLM, graphs": bl.MLM(GRAPHS),
        "Unrolled": bl.Unrolled(),
        "Implicit": bl.Implicit(),
    }.items():
        solvers = [
            bl.BilevelSolver(problem, bl.optim.SGD(case.step_size), 100, method, certificate)
            for certificate in (None, bl.AgainstMinimiser())
        ]
        runs = [partial(solver.hypergradient, case.start, case.alpha) for solver in solvers]
        bare, certified = paired_times(runs, repeats, clock=time.process_time)
        certificate = runs[1]().certificate
        assert certificate is not None
        rows.append(
            {
                "method": name,
                "ms": 1e3 * bare.median,
                "with certificate": median_ratio(certified, bare),
                "passes": certificate.products,
                "trusted": certificate.trustworthy,
            }
        )
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", help="where to save what was found")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    found: dict[str, list[Row]] = {"gradients": [], "products": []}
    for case, budget in cases():
        found["gradients"] += (rows := gradients(case, budget, arguments.repeats))
        show(rows)
        found["products"] += (rows := products(case, arguments.repeats))
        show(rows)
    for name, rows in (
        ("certificates", certificates(arguments.repeats)),
        ("schedules", schedules()),
        ("long", long_runs(arguments.repeats)),
    ):
        found[name] = rows
        show(rows)
    save(arguments.json, dict(found))


if __name__ == "__main__":
    main()
