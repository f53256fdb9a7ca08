"""What a GPU makes of it, in one run: training steps, storages, reconstruction, control, sweeps.

Run with `make cuda`, or `python -m benchmarks.gpu [PART ...] [--device cuda] [--small]
[--json FILE]`; `--small` is a short run on a CPU, which shows that the script works. Nothing is
read or downloaded: scans are made of smooth random images. Each part says what it measured as soon
as it is done.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bilevel as bl
from applications.mri.network.architecture import light, paper
from applications.mri.network.reconstruction import Loss, Network
from applications.mri.physics.operators import fft2c, ifft2c, rss
from applications.mri.sampling import CartesianRandom
from applications.mri.training.examples import moved
from benchmarks.measure import MIB, machine, peak_live_bytes, save, show

SIZES = ((256, 8), (320, 15))  # pixels a side, coils
REPEATS = 5


class Bench:
    """A device, and how runs on it are measured."""

    def __init__(self, device: str, *, small: bool) -> None:
        self.device, self.small = torch.device(device), small
        self.on_gpu = self.device.type == "cuda"

    def there(self, values: Any) -> Any:
        """A tree on the device."""
        return bl.tree.map_leaves(
            lambda x: x.to(self.device) if isinstance(x, Tensor) else x, values
        )

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Median of several runs, after one."""
        found = []
        for _ in range(1 + (1 if self.small else REPEATS)):
            self.synchronise()
            began = time.perf_counter()
            run()
            self.synchronise()
            found.append(time.perf_counter() - began)
        return statistics.median(found[1:])

    def mebibytes(self, run: Callable[[], object]) -> float:
        """Most memory of tensors alive at once, beyond what was alive before."""
        if not self.on_gpu:
            return peak_live_bytes(run) / MIB
        self.synchronise()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        kept = run()
        self.synchronise()
        del kept
        return (torch.cuda.max_memory_allocated(self.device) - before) / MIB

    def rows(self, runs: dict[str, Callable[[], object]]) -> list[dict[str, object]]:
        """Seconds and memory of each, and their ratios to the first; what does not fit is said."""
        found: list[dict[str, object]] = []
        for name, run in runs.items():
            try:
                row = {"": name, "s": self.seconds(run), "MiB": self.mebibytes(run)}
            except torch.OutOfMemoryError:
                row = {"": name, "s": "does not fit", "MiB": "does not fit"}
            first = found[0] if found else row
            for key in ("s", "MiB"):
                known = isinstance(row[key], float) and isinstance(first[key], float)
                row[f"{key} ratio"] = row[key] / first[key] if known else ""
            found.append(row)
        return found


def scan(size: int, coils: int) -> tuple[Tensor, Tensor]:
    """K-space of a smooth random image seen by smooth coils, and a mask."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(coils + 1, 6, 6, generator=generator, dtype=torch.complex64)
    smooth = torch.zeros(coils + 1, size, size, dtype=torch.complex64)
    corner = size // 2 - 3
    smooth[:, corner : corner + 6, corner : corner + 6] = low
    images = ifft2c(smooth)
    coil_images = images[:1].abs() * images[1:]
    kspace = fft2c(coil_images / coil_images.abs().max())
    kspace += 1e-3 * torch.randn(kspace.shape, generator=generator, dtype=kspace.dtype)
    return kspace, CartesianRandom(4.0, 0.08).mask((size, size), generator)


def training_problem(
    bench: Bench, network: Network, size: int, coils: int
) -> tuple[bl.ControlProblem, Any, bl.PerStep]:
    kspace, mask = scan(size, coils)
    prepared = moved(network.prepare(kspace[None], mask), str(bench.device))
    images = ifft2c(kspace).to(bench.device)
    problem, start = network.training_problem(prepared, images[None], rss(images)[None], Loss())
    return problem, start, bench.there(network.controls())


def autograd(
    problem: bl.ControlProblem, start: Any, control: bl.PerStep, *, segments: bool
) -> list[Any]:
    """The gradient by a plain loop; with `segments`, each phase under torch's checkpoint."""
    theta = bl.tree.map_leaves(
        lambda x: x.clone().requires_grad_() if isinstance(x, Tensor) else x, control
    )
    state, cost = problem.dynamics.init(start, theta.initial), 0.0
    for t in range(1, problem.horizon + 1):
        own = theta.steps[t - 1]

        def phase(state: Any, own: Any = own, t: int = t) -> tuple[Any, Any]:
            running = problem.running(state, own, t) if problem.running else 0.0
            return problem.dynamics.step(state, own, t), running

        state, running = checkpoint(phase, state, use_reentrant=False) if segments else phase(state)
        cost = cost + running
    leaves = [x for x in bl.tree.leaves_of(theta) if isinstance(x, Tensor)]
    return [*torch.autograd.grad(cost + problem.terminal(state, theta), leaves, allow_unused=True)]


def training(bench: Bench) -> dict[str, object]:
    """One training step of each preset and size."""
    found: dict[str, object] = {}
    for size, coils in ((32, 2),) if bench.small else SIZES:
        for name, network in (("paper", Network(paper(coils))), ("light", Network(light()))):
            problem, start, control = training_problem(bench, network, size, coils)
            given = problem, start, control

            def swept(block: int | None, given: Any = given) -> Any:
                return bl.adjoint(*given, checkpointing=bl.Checkpointing(block=block)).gradient

            runs = {
                "autograd": lambda given=given: autograd(*given, segments=False),
                "torch checkpoint": lambda given=given: autograd(*given, segments=True),
                "MLM, states kept": lambda swept=swept: swept(1),
                "MLM, graphs kept": lambda swept=swept: swept(None),
            }
            title = f"training step, {name}, {size} x {size} x {coils}, T = {problem.horizon}"
            found[title] = told(title, bench.rows(runs))
    return found


def storages(bench: Bench) -> dict[str, object]:
    """Whether copies to the host run beside the computation: a sweep with and without them."""
    n, horizon = (64, 9) if bench.small else (2048, 64)
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(n, n, generator=generator) / n**0.5).to(bench.device)
    state = torch.randn(n, 8 if bench.small else n, generator=generator).to(bench.device)
    problem = bl.ControlProblem(
        bl.Map(lambda u, c, t: torch.tanh(c @ u)), lambda u, c: u.square().mean(), horizon
    )

    def swept(storage: bl.sweeps.Storage) -> Any:
        kept = bl.Checkpointing(block=1, storage=storage)
        return bl.adjoint(problem, state, weights, checkpointing=kept).gradient

    runs = {"InMemory": lambda: swept(bl.InMemory()), "OnHost": lambda: swept(bl.OnHost())}
    title = f"storages, state {state.shape[0]} x {state.shape[1]} float32, T = {horizon}"
    return {title: told(title, bench.rows(runs))}


def reconstruction(bench: Bench) -> dict[str, object]:
    """Seconds a slice."""
    rows = []
    for size, coils in ((32, 2),) if bench.small else SIZES:
        for name, network in (("paper", Network(paper(coils))), ("light", Network(light()))):
            kspace, mask = scan(size, coils)
            prepared = moved(network.prepare(kspace[None], mask), str(bench.device))
            run = partial(network.reconstruct, prepared, bench.there(network.controls()))
            rows.append({"": f"{name}, {size} x {size} x {coils}", "s a slice": bench.seconds(run)})
    return {"reconstruct": told("reconstruct", rows)}


def control(bench: Bench) -> dict[str, object]:
    """Linear-quadratic problems side by side."""
    batch, horizon, n, m = (8, 5, 3, 2) if bench.small else (1024, 50, 12, 4)
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    A = (torch.eye(n, dtype=torch.float64) + 0.05 * torch.randn(n, n, **options)).to(bench.device)
    B = (0.3 * torch.randn(n, m, **options)).to(bench.device)
    start = torch.randn(batch, n, **options).to(bench.device)
    steps = [start.new_zeros(batch, m) for _ in range(horizon)]

    def problem(total: Callable[[Tensor], Tensor]) -> bl.ControlProblem:
        return bl.ControlProblem(
            bl.Map(lambda u, c, t: u @ A.T + c @ B.T),
            lambda u, c: 5 * total(u.square()),
            horizon,
            lambda u, c, t: total(u.square()) / 2 + total(c.square()) / 20,
        )

    together = problem(torch.sum)
    gradient = bench.seconds(lambda: bl.adjoint(together, start, bl.PerStep(steps)).gradient)
    rows: list[dict[str, object]] = [{"": "one gradient of all", "s": gradient}]
    riccati = getattr(bl, "Riccati", None)
    if riccati is not None:
        each = problem(lambda x: x.sum())
        solver = bl.ControlSolver(each, riccati(batched=True))
        solved = bench.seconds(lambda: solver.solve(bl.PerStep(steps), start, steps=2))
        rows.append({"": "Riccati, all solved", "s": solved})
    title = f"linear-quadratic, {batch} problems, T = {horizon}, n = {n}, m = {m}"
    return {title: told(title, rows)}


def metagradient(bench: Bench) -> dict[str, object]:
    """A metagradient against the training run that it goes through."""
    width, steps, samples = (16, 5, 32) if bench.small else (512, 100, 1024)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(bench.device)

    x, y = draw(samples, 64), draw(samples)
    params = {"in": draw(64, width) / 8, "out": draw(width) / width**0.5}

    def loss(w: Any, weights: Tensor, _: object) -> Tensor:
        return (weights * (torch.tanh(x @ w["in"]) @ w["out"] - y).square()).mean()

    def judged(w: Any, _control: Tensor, _: object) -> Tensor:
        return (torch.tanh(x @ w["in"]) @ w["out"] + y).square().mean()

    problem, weights = bl.BilevelProblem(loss, judged), x.new_ones(samples)
    rule = bl.optim.Adam(1e-3)
    methods = {"graphs kept": bl.MLM(bl.Checkpointing(block=None)), "states kept": bl.MLM()}
    solvers = {
        name: bl.BilevelSolver(problem, rule, steps, method, certificate=None)
        for name, method in methods.items()
    }
    runs: dict[str, Callable[[], object]] = {
        "training alone": lambda: solvers["states kept"].advance(params, weights)
    }
    for name, solver in solvers.items():
        runs[f"metagradient, {name}"] = lambda s=solver: s.hypergradient(params, weights).gradient
    title = f"metagradient, {steps} steps of Adam, width {width}, {samples} samples"
    return {title: told(title, bench.rows(runs))}


def told(title: str, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    print(title)
    show(rows)
    return rows


PARTS: Sequence[Callable[[Bench], dict[str, object]]] = (
    *(training, storages, reconstruction, control, metagradient),
)


def main() -> None:
    """Measure all parts, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *(part.__name__ for part in PARTS)])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    bench = Bench(arguments.device, small=arguments.small)
    print(machine())
    print(torch.cuda.get_device_name(bench.device) if bench.on_gpu else "no GPU: on the CPU")
    found: dict[str, object] = {}
    for part in PARTS:
        if not arguments.parts or part.__name__ in arguments.parts:
            found |= part(bench)
    save(arguments.json, found)


if __name__ == "__main__":
    main()
