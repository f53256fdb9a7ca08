"""All columns of a weight matrix together against one column after another.

N training tasks, M validation tasks, a 20-32-5 network for each column: the gradient in alpha
through k steps of gradient descent. The losses of the tasks are written in the two usual ways: one
after another (`torch.stack`), or all tasks in one batch.

Run with `python -m benchmarks.columns [--columns 16] [--tasks 8] [--steps 20] [--samples 16 64]`.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from benchmarks.measure import machine, median_ratio, paired_times

Params = dict[str, Tensor]


def scores(params: Params, x: Tensor) -> Tensor:
    """The network."""
    hidden = torch.tanh(torch.addmm(params["b1"], x, params["w1"]))
    return torch.addmm(params["b2"], hidden, params["w2"])


def stacked(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Losses of tasks one after another."""
    return torch.stack([cross_entropy(scores(params, a), b) for a, b in zip(x, y, strict=True)])


def batched(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Losses of all tasks in one batch."""
    each = cross_entropy(scores(params, x.flatten(0, 1)), y.flatten(), reduction="none")
    return each.reshape(y.shape).mean(-1)


def make(
    columns: bl.tasks.Evaluation,
    losses: Callable[[Params, Tensor, Tensor], Tensor],
    arguments: argparse.Namespace,
    samples: int,
) -> tuple[bl.BilevelProblem, Params, Tensor]:
    """Problem, params and alpha; tasks are classifications by linear teachers."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=getattr(torch, arguments.dtype))
    n, m = arguments.tasks, arguments.columns
    teachers, x, x_validation = draw(n, 20, 5), draw(n, samples, 20), draw(m, samples, 20)
    y = (x @ teachers).argmax(-1)
    y_validation = (x_validation @ teachers[torch.arange(m) % n]).argmax(-1)
    weights = bl.TaskWeights(n, m)
    problem = bl.weighted_problem(
        lambda params, batch: losses(params, x, y),
        lambda params, batch: losses(params, x_validation, y_validation),
        weights,
        columns,
    )
    one = {
        "w1": draw(20, 32) / 20**0.5,
        "b1": 0 * draw(32),
        "w2": draw(32, 5) / 32**0.5,
        "b2": 0 * draw(5),
    }
    return problem, weights.stacked(one), draw(n, m)


def main() -> None:
    """Print times, their ratio and the difference of the gradients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--columns", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64], help="of a task")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    descent = bl.optim.SGD(0.5)

    def gradient(
        problem: bl.BilevelProblem,
        params: Params,
        alpha: Tensor,
        method: bl.methods.HypergradientMethod,
    ) -> Tensor:
        solver = bl.BilevelSolver(problem, descent, arguments.steps, method, certificate=None)
        return solver.hypergradient(params, alpha).gradient

    print(machine())
    print(
        f"N = {arguments.tasks}, M = {arguments.columns}, {arguments.steps} steps, "
        f"{arguments.dtype}; medians of {arguments.repeats}"
    )
    print(
        f"{'losses':8} {'samples':>7} {'method':9} {'looped s':>9} {'vmapped s':>10} {'faster':>7} "
        f"{'difference':>11}"
    )
    for losses in (stacked, batched):
        for samples in arguments.samples:
            for method in (bl.Unrolled(), bl.MLM()):
                runs = [
                    partial(gradient, *make(columns, losses, arguments, samples), method)
                    for columns in (bl.Looped(), bl.Vmapped())
                ]
                looped, vmapped = paired_times(runs, arguments.repeats)
                a, b = (run() for run in runs)
                print(
                    f"{losses.__name__:8} {samples:7} {type(method).__name__:9} "
                    f"{looped.median:9.3f} {vmapped.median:10.3f} "
                    f"{median_ratio(looped, vmapped):7.2f} "
                    f"{float((a - b).norm() / a.norm()):11.1e}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
