"""Runs killed at random times, and resumed: what they end with against runs that nobody killed.

`python -m benchmarks.kill_and_resume 100` makes that many cycles, in turn over both solvers and the
commands that keep their state; a second argument, such as `Solver`, is part of the names of some.
In a cycle a run is forked, and SIGKILL, SIGTERM or SIGINT comes at a random time of it; then it
goes on in another process, is perhaps killed again, and at last is left to end. Results must be
equal in every bit, times apart. Every start is a process of its own, forked from one that has torch
loaded, with one thread.
"""

import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.figure as figure_module
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import applications.mri.commands.meta as meta_commands
import applications.mri.commands.train as train_commands
import bilevel as bl
from applications.keeping import going_on
from applications.mri.commands.app import app as mri
from applications.mri.network.architecture import paper
from applications.mri.network.reconstruction import Network
from applications.mri.network.weights import Trained, save_weights
from applications.toy.cli import app as toy

assert figure_module  # loaded once, before processes are forked
F64 = torch.float64
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TASK = "name={},anatomy=brain_t1_axial,size=24,coils=2,acceleration=2,center=0.25,roles={}"
TASKS = (
    *("--task", TASK.format("head", "train+validation+test")),
    *("--task", TASK.format("more", "train+test")),
)

Run = Callable[[Path], None]  # makes a run in a folder, or goes on with it


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 12, dtype=F64, generator=generator)
    return x, torch.tanh(x @ torch.randn(12, dtype=F64, generator=generator))


def bilevel_run(
    solver_of: Callable[[bl.BilevelProblem], bl.BilevelSolver], make: Any, within: int | None = None
) -> Run:
    """A decay a weight, learned on shuffled batches, by an outer objective that draws at random."""
    x, y = _data()

    def inner(w: Tensor, a: Tensor, batch: Any) -> Tensor:
        inputs, targets = batch
        return ((inputs @ w - targets) ** 2).mean() + (a.sigmoid() * w**2).sum()

    def outer(w: Tensor, a: Tensor, batch: Any) -> Tensor:
        inputs, targets = batch
        noise = 0.01 * torch.randn(len(targets), dtype=F64)
        return ((inputs @ w - targets + noise) ** 2).mean()

    def run(folder: Path) -> None:
        torch.manual_seed(0)
        own = torch.Generator().manual_seed(1)
        loaders = (
            DataLoader(TensorDataset(x, y), 20, shuffle=True),
            DataLoader(TensorDataset(x, y), 25, shuffle=True, generator=own),
        )
        found = solver_of(bl.BilevelProblem(inner, outer)).solve(
            *(torch.zeros(12, dtype=F64), torch.zeros(12, dtype=F64)),
            make,
            steps=60,
            batches=loaders,
            scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 80),
            keep=bl.Keep(folder / "state", every=7, within=within),
            resume=True,
        )
        _write(folder, found.control, found.params, found.warm.state, found.values)

    return run


def control_run(make: Any, *, batched: bool) -> Run:
    """A noisy network steered to targets."""
    generator = torch.Generator().manual_seed(0)
    targets = list(torch.randn(9, 8, dtype=F64, generator=generator))

    def step(u: Tensor, c: Any, t: int) -> Tensor:
        return torch.tanh(u @ c["A"] + c["b"]) + 0.01 * torch.randn_like(u)

    def build(target: Tensor) -> tuple[bl.ControlProblem, Tensor]:
        cost = lambda u, c: ((u - target) ** 2).sum() + 0.1 * (c["A"] ** 2).sum()  # noqa: E731
        return bl.ControlProblem(bl.Map(step), cost, 10), torch.ones(8, dtype=F64)

    def run(folder: Path) -> None:
        torch.manual_seed(0)
        control = {"A": torch.eye(8, dtype=F64), "b": torch.zeros(8, dtype=F64)}
        kept = {"keep": bl.Keep(folder / "state", every=4), "resume": True}
        if batched:
            solver = bl.ControlSolver(build, make)
            found = solver.solve(control, batches=targets, accumulate=2, steps=40, **kept)
        else:
            problem, start = build(targets[0])
            solver = bl.ControlSolver(problem, make)
            found = solver.solve(control, start, steps=12, **kept)
        _write(folder, found.control, found.costs)

    return run


def sweep_run(checkpointing: Any) -> Run:
    """One long noisy sweep, forward and back."""
    generator = torch.Generator().manual_seed(0)
    control = {"A": 0.5 * torch.randn(16, 16, dtype=F64, generator=generator)}

    def step(u: Tensor, c: Any, t: int) -> Tensor:
        return torch.tanh(u @ c["A"] + 1 / t) + 0.1 * torch.randn_like(u)

    def run(folder: Path) -> None:
        torch.manual_seed(0)
        found = bl.adjoint(
            bl.ControlProblem(
                bl.Map(step), lambda u, c: (u**2).sum(), 1000, lambda u, c, t: (u**2).mean()
            ),
            torch.ones(16, dtype=F64),
            control,
            checkpointing=checkpointing,
            keep=bl.Keep(folder / "state", every=100),
            resume=True,
        )
        _write(folder, found.cost, found.gradient, found.final_state, torch.rand(3))

    return run


def _write(folder: Path, *parts: Any) -> None:
    tensors = [x for part in parts for x in bl.tree.leaves_of(part)]
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(repr(x.tolist() if isinstance(x, Tensor) else x).encode())
    (folder / "results.json").write_text(json.dumps(digest.hexdigest()))


def command(app: Any, *arguments: Any, out: str = "out") -> Run:
    def run(folder: Path) -> None:
        app([str(x) for x in (*arguments, "--out", folder / out, "--resume", "--threads", 1)])

    return run


def cases(folder: Path) -> dict[str, Run]:
    """Runs by name; `folder` is for what they begin with."""
    every = partial(going_on, every=2)  # short runs: else they would hardly keep anything
    train_commands.going_on = meta_commands.going_on = every
    network = Network(replace(paper(2), n_phases=2, filters=2, features=2, feature_kernel=3), 1)
    weights = folder / "w.safetensors"
    save_weights(weights, Trained(network, network.controls(), {}))
    begin = ("--init", weights)
    adam = partial(torch.optim.Adam, lr=0.05)
    lbfgs = partial(torch.optim.LBFGS, lr=0.1, max_iter=2)
    small = ("--evaluations", 60, "--inner-steps", 2, "--crop", 0)
    solver = partial(bl.BilevelSolver, on_failure="ignore")
    return {
        "BilevelSolver, Implicit, inner Adam": bilevel_run(
            lambda p: solver(p, bl.optim.Adam(0.05), 10, bl.Implicit()), adam
        ),
        "BilevelSolver, MLM, momentum, LBFGS": bilevel_run(
            lambda p: solver(p, bl.optim.SGD(0.05, 0.9), 10, bl.MLM(), None), lbfgs
        ),
        "ControlSolver, Adam, accumulate": control_run(adam, batched=True),
        "ControlSolver, NewtonCG": control_run(
            bl.NewtonCG(bl.linear.CG(max_steps=4)), batched=False
        ),
        "sweep, states kept": sweep_run(None),
        "sweep, a budget": sweep_run(bl.Budget("400 KiB")),
        "sweep, blocks on disk": sweep_run(
            bl.Checkpointing(snapshots=3, block=20, storage=bl.OnDisk(folder))
        ),
        "BilevelSolver, MLM, kept within updates": bilevel_run(
            lambda p: solver(p, bl.optim.Adam(0.05), 10, bl.MLM(), None), adam, within=5
        ),
        "bilevel-mri train": command(
            mri, "train", *TASKS, *begin, "--steps", 16, "--validate-every", 3, out="w"
        ),
        "bilevel-mri meta-train": command(mri, "meta-train", *TASKS, *begin, *small),
        "bilevel-mri transfer": command(mri, "transfer", *TASKS, *begin, "--evaluations", 40),
        "bilevel-toy task-weights": command(
            *(toy, "task-weights", "--seeds", 2, "--updates", 12, "--fit-steps", 20),
            *("--tasks", 1, "--train", 20, "--inner-steps", 5),
        ),
        "bilevel-toy hyper-cleaning": command(
            *(toy, "hyper-cleaning", "--train", 60, "--validation", 40, "--test", 60),
            *("--updates", 16),
        ),
    }


def started(run: Run, folder: Path) -> int:
    """The process of a run."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        run(folder)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
    except KeyboardInterrupt:
        code = 130
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, limit: float | None = None) -> int | None:
    """Its code, negative for a signal; None if it goes on after a time."""
    until = None if limit is None else time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, 0 if until is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if until is not None and time.monotonic() > until:
            return None
        time.sleep(0.002)


def results(folder: Path) -> dict[str, Any]:
    """What a run left, times apart: values of JSON, and the bits of weights."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if "state" in inside.parts or not path.is_file() or "scans" in inside.parts:
            continue
        if path.suffix == ".json":
            found[str(inside)] = _timeless(json.loads(path.read_text()))
        elif path.suffix == ".safetensors" or path.name == "w":
            found[str(inside)] = _tensors(path)
    return found


def _tensors(path: Path) -> str:
    """Tensors of a file of weights, and what it says of them; their order in it may differ."""
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            digest.update(name.encode() + file.get_tensor(name).numpy().tobytes())
        for _, text in sorted((file.metadata() or {}).items()):
            digest.update(json.dumps(_timeless(json.loads(text)), sort_keys=True).encode())
    return digest.hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k != "seconds"}
    return [_timeless(x) for x in value] if isinstance(value, list) else value


def cycle(run: Run, whole: dict[str, Any], seconds: float, draws: random.Random) -> tuple[str, int]:
    """One run, killed and resumed until it ends; what was wrong, and how often it was killed."""
    with tempfile.TemporaryDirectory() as name:
        folder, kills = Path(name), 0
        for _ in range(draws.choice((1, 1, 2, 3))):
            child = started(run, folder)
            code = ended(child, draws.uniform(0.02, 1.0) * seconds)
            if code is None:
                number = draws.choice(SIGNALS)
                os.kill(child, number)
                code = ended(child)
                kills += 1
                if code not in (0, 130, 143, -number):
                    return f"code {code} after signal {number}: {_said(folder)}", kills
            elif code:
                return f"code {code}: {_said(folder)}", kills
            if not code and (folder / "log").exists() and not _resumable(folder):
                break
        else:
            code = ended(started(run, folder))
            if code:
                return f"code {code} when it went on: {_said(folder)}", kills
        left = list(folder.rglob(".writing-*"))
        found = results(folder)
        if found != whole:
            names = [n for n in {**found, **whole} if found.get(n) != whole.get(n)]
            return f"other results: {', '.join(names)}", kills
        return ("temporaries were left" if left else ""), kills


def _resumable(folder: Path) -> bool:
    """Whether a run that ended may be asked again: those of solvers, which leave their state."""
    return (folder / "state").exists()


def _said(folder: Path) -> str:
    log = folder / "log"
    return log.read_text()[-1500:] if log.exists() else ""


def main(cycles: int, only: str = "", seed: int = 0) -> None:
    torch.set_num_threads(1)
    draws, wrong = random.Random(seed), 0
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as name:
        runs = {name: run for name, run in cases(Path(name)).items() if only in name}
        known: dict[str, tuple[dict[str, Any], float]] = {}
        for i in range(cycles):
            case = list(runs)[i % len(runs)]
            if case not in known:
                place = Path(name) / f"whole-{i}"
                place.mkdir()
                began = time.monotonic()
                code = ended(started(runs[case], place))
                assert code == 0, f"{case}: {_said(place)}"
                known[case] = results(place), time.monotonic() - began
            message, kills = cycle(runs[case], *known[case], draws)
            counts[case, "cycles"] += 1
            counts[case, "kills"] += kills
            if message:
                wrong += 1
                print(f"WRONG {i} {case}: {message}", flush=True)
            print(f"{i + 1} {case}: killed {kills} times", flush=True)
        for case in known:
            print(f"{case}: {counts[case, 'cycles']} cycles, {counts[case, 'kills']} kills")
    print(f"{cycles} cycles, {wrong} wrong")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]) if given else 100, *given[1:2])
