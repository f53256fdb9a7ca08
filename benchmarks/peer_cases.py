"""Small problems on which a peer returns a wrong number, beside the truth and our answer.

Run with `make bench-peers`, or `python -m benchmarks.peer_cases` in an environment that has the
peers. Each row says what the installed version does, so that a row may also end in "right".
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bilevel as bl
from benchmarks.measure import machine
from benchmarks.peer_problems import (
    Captured,
    Mixed,
    Negated,
    Normalised,
    RootedOuter,
    Scalar,
    like,
    with_dead_feature,
    without_first_feature,
)
from benchmarks.peers import with_betty, with_boat, with_higher, with_torchopt
from benchmarks.peers.modules import Penalty, Run
from benchmarks.ridge import Ridge, relative_error

Answer = Tensor | str


@dataclass(frozen=True)
class Row:
    """What one peer says to one case."""

    case: str
    peer: str
    found: Answer
    truth: Answer
    ours: Answer

    @property
    def verdict(self) -> str:
        if isinstance(self.found, str):
            return "no number"
        if isinstance(self.truth, str):
            return "right" if self.found.isnan().any() else "**wrong**"
        if self.found.isnan().any():
            return "NaN"
        return "right" if torch.allclose(self.found, self.truth, rtol=1e-6) else "**wrong**"


def asked(run: Run) -> Answer:
    """What it returns, or the name of what it raises."""
    try:
        return run().detach()
    except Exception as error:  # whatever it raises is its answer
        return f"raises {type(error).__name__}"


def ours(
    problem: Any,
    method: bl.methods.HypergradientMethod,
    steps: int = 100,
    optimizer: bl.optim.InnerOptimizer | None = None,
) -> Answer:
    optimizer = optimizer or bl.optim.SGD(problem.step_size)
    objectives = bl.BilevelProblem(problem.inner, problem.outer)
    solver = bl.BilevelSolver(objectives, optimizer, steps, method, certificate=None)
    return asked(lambda: solver.hypergradient(problem.start, problem.alpha).gradient)


def linear_systems() -> Iterator[Row]:
    """Conjugate gradients on the smallest problems there are."""
    line, plane = Ridge.random(1), Ridge.random(2)
    point = Scalar(torch.tensor(-0.5, dtype=torch.float64))

    def betty(problem: Any, **settings: Any) -> Run:
        return with_betty.betty(problem, 100, {"type": "cg", **settings})

    for case, peer, problem, run in (
        ("one dimension", "boat CG", line, with_boat.cg(line, 100)),
        ("weight of shape ()", "torchopt CG", point, with_torchopt.cg(point, 100)),
        ("weight of shape ()", "torchopt Neumann", point, with_torchopt.neumann(point, 100)),
        ("weight of shape ()", "boat CG", point, with_boat.cg(point, 100)),
        ("CG returns the iterate before", "boat CG, d = 2", plane, with_boat.cg(plane, 100)),
        (
            "CG with another scale",
            "betty CG, cg_alpha 0.1, d = 1",
            line,
            betty(line, cg_iterations=5, cg_alpha=0.1),
        ),
        (
            "CG iterated on",
            "betty CG, 5 iterations, d = 1",
            line,
            betty(line, cg_iterations=5),
        ),
        (
            "CG turns along the residual before",
            "betty CG, 2 iterations, d = 2",
            plane,
            betty(plane, cg_iterations=2),
        ),
    ):
        yield Row(case, peer, asked(run), problem.exact, ours(problem, bl.Implicit()))


def dead_feature() -> Iterator[Row]:
    """Adam where one gradient is zero at every step."""
    problem, steps, rate = with_dead_feature(Ridge.random(3)), 20, 0.05
    adam = bl.optim.Adam(rate)
    rest = ours(without_first_feature(problem), bl.Unrolled(), steps, adam)
    truth = torch.cat([torch.zeros(1, dtype=torch.float64), rest])

    def theirs(params: Any, **_: float) -> torch.optim.Adam:
        return torch.optim.Adam(params, rate)

    def torchopt() -> Tensor:
        import torchopt

        return with_torchopt.unrolled(problem, steps, lambda **_: torchopt.adam(rate))()

    for peer, run in (
        ("torchopt", torchopt),
        ("betty", lambda: with_betty.unrolled(problem, steps, theirs)()),
        ("higher", lambda: with_higher.unrolled(problem, steps, theirs)()),
    ):
        mine = ours(problem, bl.MLM(), steps, adam)
        yield Row("Adam with a dead feature", peer, asked(run), truth, mine)


def not_a_number() -> Iterator[Row]:
    """An outer derivative that is NaN at a weight that stays zero."""
    problem = like(RootedOuter, with_dead_feature(Ridge.random(3)))
    for peer, make, method in (
        ("higher", with_higher.unrolled, bl.MLM()),
        ("boat RAD", with_boat.unrolled, bl.MLM()),
        ("torchopt CG", with_torchopt.cg, bl.Implicit()),
        ("boat CG", with_boat.cg, bl.Implicit()),
    ):
        found = asked(make(problem, 50))
        yield Row("NaN made 0", peer, found, "NaN, or an error", ours(problem, method, 50))


def maximised() -> Iterator[Row]:
    """`maximize=True` of `torch.optim.SGD`. We have no such option: one negates the objective."""
    ridge, steps = Ridge.random(3), 20
    gain = like(Negated, ridge)
    ascent = partial(torch.optim.SGD, maximize=True)

    def torchopt() -> Tensor:
        import torchopt

        return with_torchopt.unrolled(gain, steps, partial(torchopt.sgd, maximize=True))()

    for peer, run in (
        ("higher", lambda: with_higher.unrolled(gain, steps, ascent)()),
        ("boat RAD", lambda: with_boat.unrolled(gain, steps, ascent)()),
        ("betty", lambda: with_betty.unrolled(gain, steps, ascent)()),
        ("torchopt", torchopt),
    ):
        mine = ours(ridge, bl.MLM(), steps)
        yield Row("maximize=True", peer, asked(run), ridge.after(steps), mine)


def captured() -> Iterator[Row]:
    """The gradient, after `backward`, of a tensor that the inner objective closes over."""
    problem = like(Captured, Ridge.random(3))
    solve = with_torchopt.differentiable_solution(problem, 100)
    alpha = problem.alpha.clone().requires_grad_()
    problem.outer(solve(problem.start, alpha), alpha).backward()
    found = problem.penalty.grad
    found = "None" if found is None else found
    mine = ours(problem, bl.Implicit())
    yield Row("tensor caught by closure", "torchopt CG", found, problem.exact_in_penalty, mine)


def mixed() -> Iterator[Row]:
    """A complex and a real inner tensor side by side."""
    for operation in ("CG", "NS"):
        problem = Mixed()
        run = with_boat.boat(
            problem,
            Penalty(problem),
            lambda upper, lower, *params: lower.inner(params, upper()),
            lambda upper, lower, *params: lower.outer(params, upper()),
            optimizer=torch.optim.SGD(problem.parameters(), lr=problem.step_size),
            steps=100,
            operation=operation,
            iterations=100,
            tolerance=1e-10,
        )
        truth, mine = problem.as_real.exact, ours(problem, bl.Implicit())
        yield Row("complex and real weights", f"boat {operation}", asked(run), truth, mine)


def buffers() -> Iterator[Row]:
    """How far one hypergradient moves the running mean of the user's BatchNorm."""
    ridge = Ridge.random(3)

    def moved(model: Normalised) -> Tensor:
        return model.norm.running_mean.norm()

    def loss(model: nn.Module, X: Tensor, y: Tensor) -> Tensor:
        return (model(X) - y).square().mean() / 2

    def inner(upper: Penalty, lower: nn.Module, w: Tensor) -> Tensor:
        return loss(lower, ridge.X, ridge.y) + 0.5 * (upper().exp() * w**2).sum()

    def boat() -> Tensor:
        model = Normalised(ridge)
        with_boat.boat(
            model,
            Penalty(ridge),
            inner,
            lambda _upper, lower, _w: loss(lower, ridge.V, ridge.z),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            steps=20,
            operation="RAD",
            iterations=0,
            tolerance=0.0,
        )()
        return moved(model)

    def higher() -> Tensor:
        import higher as peer

        model, upper = Normalised(ridge), Penalty(ridge)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with peer.innerloop_ctx(model, optimizer) as (functional, differentiable):
            for _ in range(20):
                (w,) = functional.parameters()
                differentiable.step(inner(upper, functional, w))
            loss(functional, ridge.V, ridge.z).backward()
        return moved(model)

    def mine() -> Tensor:
        model = Normalised(ridge)
        params, call = bl.functional(model)

        def mean(p: Any, X: Tensor, y: Tensor) -> Tensor:
            return (call(p, X) - y).square().mean() / 2

        problem = bl.BilevelProblem(
            inner=lambda p, a, _: mean(p, ridge.X, ridge.y) + 0.5 * (a.exp() * p["w"] ** 2).sum(),
            outer=lambda p, _a, _: mean(p, ridge.V, ridge.z),
        )
        solver = bl.BilevelSolver(problem, bl.optim.SGD(0.1), 20, certificate=None)
        solver.hypergradient(params, ridge.alpha)
        return moved(model)

    untouched = torch.zeros((), dtype=torch.float64)
    for peer, run in (("boat RAD", boat), ("higher", higher)):
        yield Row("BatchNorm's running mean moved by", peer, asked(run), untouched, asked(mine))


def unconverged() -> Iterator[Row]:
    """Relative error after five inner steps. We are as wrong, and say so."""
    ridge, steps = Ridge.random(20), 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        objectives = bl.BilevelProblem(ridge.inner, ridge.outer)
        descent = bl.optim.SGD(ridge.step_size)
        solver = bl.BilevelSolver(objectives, descent, steps, bl.Implicit())
        said = solver.hypergradient(ridge.start, ridge.alpha)
    error = relative_error(said.gradient, ridge.exact)
    certificate = said.certificate
    mine = (
        f"{error:.3f}, estimated {certificate.error_estimate:.3f}, "
        f"trustworthy: {certificate.trustworthy}, corrected "
        f"{relative_error(certificate.corrected(), ridge.exact):.0e}"
    )
    for peer, make in (
        ("torchopt CG", with_torchopt.cg),
        ("boat CG", with_boat.cg),
        ("betty Neumann", with_betty.neumann),
    ):
        found = torch.tensor(relative_error(make(ridge, steps)(), ridge.exact))
        yield Row("error, not converged, no word said", peer, found, torch.tensor(0.0), mine)


GROUPS: tuple[Callable[[], Iterator[Row]], ...] = (
    linear_systems,
    dead_feature,
    not_a_number,
    maximised,
    captured,
    mixed,
    buffers,
    unconverged,
)


def written(answer: Answer) -> str:
    if isinstance(answer, str):
        return answer
    numbers = ", ".join(f"{float(x):.4g}" for x in answer.reshape(-1))
    return numbers if answer.numel() == 1 else f"({numbers})"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    for peer in ("betty", "torchopt"):  # of torch's functions that they use
        warnings.filterwarnings("ignore", module=peer)
    print(machine())
    print("\n| case | peer | its number | truth | ours | |\n|---|---|---|---|---|---|")
    for group in GROUPS:
        for row in group():
            answers = " | ".join(written(x) for x in (row.found, row.truth, row.ours))
            print(f"| {row.case} | {row.peer} | {answers} | {row.verdict} |")


if __name__ == "__main__":
    main()
