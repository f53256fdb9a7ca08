"""What it costs to keep a long sweep on its way: processor time, checkpoints and bytes.

`python -m benchmarks.kept_sweep 1000` takes the metagradient of so many steps of Adam, of a small
network whose samples have weights, without keeping it and with checkpoints ever so many steps.
Time is that of the process, so that other work on the machine counts little.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import bilevel as bl
from bilevel.outer import checkpoints, keeping


class Kept:
    """Measures what keeping takes, while it is on."""

    def __init__(self) -> None:
        self.seconds, self.times, self.bytes = 0.0, 0, 0
        save, write = keeping.Kept.save, checkpoints.Folder._written

        def saved(*given: Any) -> None:
            began = time.process_time()
            save(*given)
            self.seconds, self.times = self.seconds + time.process_time() - began, self.times + 1

        def written(*given: Any) -> Path:
            path = write(*given)
            self.bytes += path.stat().st_size
            return path

        keeping.Kept.save = saved  # pyright: ignore[reportAttributeAccessIssue]
        checkpoints.Folder._written = written  # pyright: ignore[reportAttributeAccessIssue]


def problem(steps: int) -> tuple[bl.BilevelSolver, Any, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh())
    model.append(nn.Linear(128, 1))
    params, call = bl.functional(model)
    x, y = torch.randn(512, 64), torch.randn(512, 1)
    batches = bl.Minibatches((x, y, torch.arange(512)), 128, seed=0)

    def inner(params: Any, weights: Tensor, batch: Any) -> Tensor:
        inputs, targets, index = batch
        losses = mse_loss(call(params, inputs), targets, reduction="none")
        return (weights[index] * losses[:, 0]).mean()

    def outer(params: Any, weights: Tensor, batch: Any) -> Tensor:
        return mse_loss(call(params, x), y)

    method = bl.MLM(bl.Checkpointing(snapshots=40, block=10))
    solver = bl.BilevelSolver(
        bl.BilevelProblem(inner, outer), bl.optim.Adam(1e-3), steps, method, certificate=None
    )
    return solver, (params, torch.ones(512), batches), torch.ones(512)


def main(steps: int = 1000) -> None:
    torch.set_num_threads(1)
    solver, given, _ = problem(steps)
    problem(20)[0].hypergradient(*given)
    kept = Kept()
    print("| every | processor seconds | of them keeping | checkpoints | MB written |")
    print("|---|---|---|---|---|")
    first = None
    for every in (None, steps // 2, steps // 5, steps // 20):
        kept.seconds, kept.times, kept.bytes = 0.0, 0, 0
        with tempfile.TemporaryDirectory() as folder:
            keep = None if every is None else bl.Keep(folder, every=every)
            began = time.process_time()
            found = solver.hypergradient(*given, keep=keep)
            spent = time.process_time() - began
        first = found.gradient if first is None else first
        assert torch.equal(found.gradient, first)
        share, size = 100 * kept.seconds / spent, kept.bytes / 1e6
        print(f"| {every} | {spent:.2f} | {share:.2f} % | {kept.times} | {size:.0f} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
