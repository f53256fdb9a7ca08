"""The penalty path against implicit differentiation: error, estimate, time.

Ridge regression, logistic regression with a decay for each weight, and hyper-cleaning: weights of
the samples of a multinomial logistic regression, 40 % of whose labels are drawn at random. Truth is
`Implicit` at a far more converged inner solution. float64, one thread, processor time.

Run with `python -m benchmarks.first_derivatives [--repeats 3]`.
"""

import argparse
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import bilevel as bl
from benchmarks.measure import machine, median_ratio, paired_times, show

CERTIFICATE = bl.AgainstMinimiser()
STRENGTHS = (8.0, 32.0, 64.0, 128.0, 512.0, 2048.0)


@dataclass(frozen=True)
class Case:
    """A problem at a point, and its hypergradient."""

    name: str
    problem: bl.BilevelProblem
    rule: bl.optim.InnerOptimizer
    steps: int
    params: Tensor
    control: Tensor

    def solver(
        self,
        method: bl.methods.HypergradientMethod,
        certificate: bl.certificates.Certifier | None = CERTIFICATE,
    ) -> bl.BilevelSolver:
        """The solver of the case."""
        given = self.problem, self.rule, self.steps, method, certificate
        return bl.BilevelSolver(*given, on_failure="ignore")

    def truth(self) -> Tensor:
        """By a linear system solved to rounding at an inner solution of four times the steps."""
        method = bl.Implicit(bl.linear.CG(rtol=1e-13))
        solver = bl.BilevelSolver(self.problem, self.rule, 4 * self.steps, method, None, "ignore")
        return solver.hypergradient(self.params, self.control).gradient


def ridge(draw: partial) -> Case:
    """Ridge regression, d = 100."""
    X, y, V, z = draw(300, 100), draw(300), draw(300, 100), draw(300)
    problem = bl.BilevelProblem(
        lambda w, a, batch: ((X @ w - y) ** 2).mean() / 2 + (a.exp() * w**2).sum() / 2,
        lambda w, a, batch: ((V @ w - z) ** 2).mean() / 2,
    )
    return Case("ridge", problem, bl.optim.SGD(0.15), 300, 0 * draw(100), draw(100) - 1)


def logistic(draw: partial) -> Case:
    """Logistic regression, d = 64."""
    X, V, truth = draw(400, 64), draw(400, 64), draw(64)
    y, z = (X @ truth > 0).double(), (V @ truth + draw(400) > 0).double()
    problem = bl.BilevelProblem(
        lambda w, a, batch: binary_cross_entropy_with_logits(X @ w, y) + (a.exp() * w**2).sum() / 2,
        lambda w, a, batch: binary_cross_entropy_with_logits(V @ w, z),
    )
    return Case("logistic", problem, bl.optim.SGD(1.0, 0.9), 300, 0 * draw(64), 0.3 * draw(64) - 4)


def cleaning(draw: partial) -> Case:
    """Weights of 500 samples, 40 % of whose labels are drawn at random."""
    teacher, X, V = draw(20, 5), draw(500, 20), draw(200, 20)
    y, z = (X @ teacher).argmax(-1), (V @ teacher).argmax(-1)
    wrong = torch.rand(500, generator=torch.Generator().manual_seed(1)) < 0.4
    y = torch.where(wrong, torch.randint(5, (500,), generator=torch.Generator().manual_seed(2)), y)

    def inner(w: Tensor, a: Tensor, batch: object) -> Tensor:
        each = cross_entropy(X @ w, y, reduction="none")
        return (torch.sigmoid(a) * each).mean() + 5e-3 * (w**2).sum()

    problem = bl.BilevelProblem(inner, lambda w, a, batch: cross_entropy(V @ w, z))
    return Case("cleaning", problem, bl.optim.SGD(1.0, 0.9), 400, 0 * draw(20, 5), 0 * draw(500))


def relative(found: Tensor, truth: Tensor) -> float:
    """Error of a hypergradient."""
    return float((found - truth).norm() / truth.norm())


def main() -> None:
    """Print errors, estimates over a grid of strengths and orders, and times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    rows: list[dict[str, object]] = []
    times: list[dict[str, object]] = []
    for make in (ridge, logistic, cleaning):
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        case = make(draw)
        truth, given = case.truth(), (case.params, case.control)
        chosen = case.solver(bl.Penalty()).hypergradient(*given)
        fixed = case.solver(bl.Penalty(64.0)).hypergradient(*given)
        ratios = []
        for order in (1, 2, 3):
            for strength in STRENGTHS:
                found = case.solver(bl.Penalty(strength, order)).hypergradient(*given)
                error = relative(found.gradient, truth)
                ratios.append(found.certificate.error_estimate / error)
        within = sum(0.5 <= r <= 2 for r in ratios)
        rows.append(
            {
                "problem": case.name,
                "chosen strength": relative(chosen.gradient, truth),
                "its estimate": chosen.certificate.error_estimate,
                "strength 64": relative(fixed.gradient, truth),
                "estimates within 2 x": f"{within} of {len(ratios)}",
                "smallest": min(ratios),
                "largest": max(ratios),
            }
        )
        methods = [bl.Implicit(bl.linear.CG(rtol=1e-8)), bl.Penalty(64.0), bl.Penalty()]
        runs = [
            partial(case.solver(method, c).hypergradient, *given)
            for c in (None, CERTIFICATE)
            for method in methods
        ]
        taken = paired_times(runs, arguments.repeats, 1, time.process_time)
        times.append(
            {
                "problem": case.name,
                "Implicit(CG) s": taken[0].median,
                "Penalty(64) ratio": median_ratio(taken[1], taken[0]),
                "Penalty() ratio": median_ratio(taken[2], taken[0]),
                "certified Implicit s": taken[3].median,
                "certified Penalty(64) ratio": median_ratio(taken[4], taken[3]),
                "certified Penalty() ratio": median_ratio(taken[5], taken[3]),
            }
        )
    show(rows)
    show(times)


if __name__ == "__main__":
    main()
