"""Long runs: what 2000 updates do to live tensors, resident memory and the time of an update.

`python -m benchmarks.soak` runs `BilevelSolver` with `MLM` and with `Implicit`, and the training of
the MRI network, each with batches whose size changes all the time. Figures are of four quarters of
the run: tensors that are alive at the end of it, resident size there, and the median time of an
update. Flat is: equal tensors, memory within 3 %, times within what the machine gives.
"""

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.mri.data import SliceDataset, Volume, write_volume
from applications.mri.network.architecture import paper
from applications.mri.network.reconstruction import Network
from applications.mri.physics.operators import ifft2c, rss
from applications.mri.sampling import CartesianRandom
from applications.mri.simulation.simulate import simulate
from applications.mri.training.settings import TrainingSettings
from applications.mri.training.training import train


@dataclass
class Watch:
    """Looks four times at a run."""

    updates: int
    times: list[float] = field(default_factory=list)
    tensors: list[int] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)

    def __call__(self, _progress: Any) -> None:
        self.times.append(time.perf_counter())
        quarter = self.updates // 4
        if len(self.times) % quarter:
            return
        latest = self.times[-quarter:]
        steps = [b - a for a, b in pairwise(latest)]
        gc.collect()
        self.medians.append(statistics.median(steps))
        self.tensors.append(sum(isinstance(x, Tensor) for x in gc.get_objects()))
        self.resident.append(_resident())

    def row(self, name: str) -> str:
        tensors = " ".join(map(str, self.tensors))
        resident = " ".join(f"{x:.1f}" for x in self.resident)
        times = " ".join(f"{1e3 * x:.2f}" for x in self.medians)
        return f"| {name} | {tensors} | {resident} | {times} |"


def _resident() -> float:
    """Of this process [MiB]."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def bilevel(method: bl.methods.HypergradientMethod, updates: int) -> Watch:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 20, generator=generator)
    y = x @ torch.randn(20, generator=generator)

    def batches() -> Iterator[Any]:
        while True:
            for size in (7, 64, 19, 128, 33):
                rows = torch.randint(200, (size,), generator=generator)
                yield (x[rows], y[rows]), (x[: 2 * size], y[: 2 * size])

    def inner(w: Tensor, a: Tensor, batch: Any) -> Tensor:
        return ((batch[0] @ w - batch[1]) ** 2).mean() + (a.sigmoid() * w**2).sum()

    def outer(w: Tensor, a: Tensor, batch: Any) -> Tensor:
        return ((batch[0] @ w - batch[1]) ** 2).mean()

    watch = Watch(updates)
    solver = bl.BilevelSolver(
        bl.BilevelProblem(inner, outer), bl.optim.Adam(0.01), 3, method, on_failure="ignore"
    )
    with tempfile.TemporaryDirectory() as folder:
        solver.solve(
            *(torch.zeros(20), torch.zeros(20)),
            steps=updates,
            batches=batches(),
            callback=watch,
            keep=bl.Keep(folder),
        )
    return watch


def training(updates: int) -> Watch:
    watch = Watch(updates)
    network = Network(replace(paper(2), n_phases=2, filters=2, features=2, feature_kernel=3), 1)
    settings = TrainingSettings(samplings=(CartesianRandom(2, 0.25),), steps=updates, warmup=5)
    with tempfile.TemporaryDirectory() as name:
        folder, generator = Path(name), torch.Generator().manual_seed(0)
        for i, size in enumerate((16, 24, 20)):
            image = torch.zeros(size, size)
            image[4:-4, 3:-3] = 0.8
            one = simulate(image, 2, generator, noise_std=1e-3).kspace[None]
            write_volume(folder / f"{i}.h5", Volume(one, rss(ifft2c(one))))
        keep = bl.Keep(folder / "state")
        slices = SliceDataset(folder)
        train(network, network.controls(), slices, settings, watch, keep=keep)
    return watch


def main(updates: int = 2000) -> None:
    torch.set_num_threads(1)
    runs: dict[str, Callable[[int], Watch]] = {
        "MLM": lambda n: bilevel(bl.MLM(), n),
        "Implicit": lambda n: bilevel(bl.Implicit(), n),
        "train": training,
    }
    print("| | live tensors, by quarters | resident MiB | ms an update |\n|---|---|---|---|")
    for name, run in runs.items():
        print(run(updates).row(name), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
