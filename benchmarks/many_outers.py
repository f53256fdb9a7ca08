"""Hypergradients of M outer objectives in one sweep against M sweeps.

Sample weights of a 20-32-5 network trained by k steps of gradient descent, and M validation
losses, each on data of its own; and ridge regression, d = 300. Gradients agree to rounding.
Processor time, one thread.

Run with `python -m benchmarks.many_outers [--outers 32] [--steps 30] [--repeats 3]`.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from benchmarks.columns import Params, scores
from benchmarks.measure import machine, median_ratio, paired_times, show

Case = tuple[bl.BilevelProblem, bl.optim.InnerOptimizer, object, Tensor, list[Callable]]


def network(m: int, samples: int = 256) -> Case:
    """Problem, rule, params, control and outer objectives."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    teacher, x, checks = draw(20, 5), draw(samples, 20), draw(m, 64, 20)
    y, y_checks = (x @ teacher).argmax(-1), (checks @ teacher).argmax(-1)
    params = {
        "w1": draw(20, 32) / 20**0.5,
        "b1": torch.zeros(32),
        "w2": draw(32, 5) / 32**0.5,
        "b2": torch.zeros(5),
    }

    def inner(p: Params, a: Tensor, batch: object) -> Tensor:
        return (torch.sigmoid(a) * cross_entropy(scores(p, x), y, reduction="none")).mean()

    def outer(p: Params, a: Tensor, batch: object, j: int) -> Tensor:
        return cross_entropy(scores(p, checks[j]), y_checks[j])

    outers: list[Callable] = [lambda p, a, batch, j=j: outer(p, a, batch, j) for j in range(m)]
    return bl.BilevelProblem(inner, outers[0]), bl.optim.SGD(0.5), params, draw(samples), outers


def ridge(m: int, d: int = 300, samples: int = 600) -> Case:
    """Problem, rule, params, control and outer objectives."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X, y, goals = draw(samples, d), draw(samples), draw(m, d)

    def inner(w: Tensor, a: Tensor, batch: object) -> Tensor:
        return ((X @ w - y) ** 2).mean() / 2 + (a.exp() * w**2).sum() / 2

    outers: list[Callable] = [lambda w, a, batch, g=g: ((w - g) ** 2).sum() for g in goals]
    return bl.BilevelProblem(inner, outers[0]), bl.optim.SGD(0.2), 0 * draw(d), draw(d), outers


def main() -> None:
    """Print times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    rows: list[dict[str, object]] = []
    for make in (network, ridge):
        problem, rule, params, control, outers = make(arguments.outers)
        for method in (bl.MLM(), bl.MLM(bl.Checkpointing(block=None)), bl.Unrolled()):
            given = rule, arguments.steps, method

            def one_by_one(
                problem: bl.BilevelProblem = problem,
                given: tuple = given,
                params: object = params,
                control: Tensor = control,
                outers: list[Callable] = outers,
            ) -> list[Tensor]:
                return [
                    bl.BilevelSolver(bl.BilevelProblem(problem.inner, outer), *given, None)
                    .hypergradient(params, control)
                    .gradient
                    for outer in outers
                ]

            solver = bl.BilevelSolver(problem, *given, None)
            together = partial(solver.hypergradients, params, control, outers)
            runs = [one_by_one, together]
            times = paired_times(runs, arguments.repeats, 1, time.process_time)
            a = torch.stack(one_by_one())
            b = torch.stack([found.gradient for found in together()])
            rows.append(
                {
                    "problem": make.__name__,
                    "method": repr(method)[:40],
                    "one by one s": times[0].median,
                    "together s": times[1].median,
                    "ratio": median_ratio(times[1], times[0]),
                    "difference": float((a - b).norm() / a.norm()),
                }
            )
    show(rows)


if __name__ == "__main__":
    main()
