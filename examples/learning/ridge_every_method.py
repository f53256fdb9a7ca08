r"""
Every method on one problem, against the closed form
====================================================

Ridge regression with a decay for each coefficient: the one inner problem whose solution, and so
whose hypergradient, can be written down. Here each method of the library finds that hypergradient
from the same inner iteration. How far is it from the truth, and what does it cost?
"""

# %%
# The problem
# -----------
# :math:`f(w, a) = \tfrac{1}{2n} |X w - y|^2 + \tfrac12 \sum_i e^{a_i} w_i^2` on training data, and
# the error on validation data as the outer objective.
import time
from statistics import median

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bilevel as bl

N_SAMPLES, N_FEATURES = 60, 20
INNER_STEPS = (3, 10, 30, 60, 100, 200, 300)
REPEATS = 3
generator = torch.Generator().manual_seed(0)
truth = torch.randn(N_FEATURES, generator=generator, dtype=torch.float64)


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(
        N_SAMPLES, N_FEATURES, generator=generator, dtype=torch.float64
    )
    return x, x @ truth + torch.randn(
        N_SAMPLES, generator=generator, dtype=torch.float64
    )


train, validation = data(), data()


def error(w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (x @ w - y).square().mean() / 2


problem = bl.BilevelProblem(
    inner=lambda w, a, _batch: (
        error(w, train) + (a.exp() * w.square()).sum() / 2
    ),
    outer=lambda w, _a, _batch: error(w, validation),
)
start = torch.zeros(N_FEATURES, dtype=torch.float64)
control = torch.full((N_FEATURES,), -2.0, dtype=torch.float64)

# %%
# The closed form
# ---------------
# The minimiser solves :math:`H w = X^T y / n` with :math:`H = X^T X / n + \mathrm{diag}(e^a)`. With
# :math:`H q = \nabla F`, the hypergradient is :math:`-q_i e^{a_i} w_i`.
x, y = train
hessian = x.T @ x / N_SAMPLES + control.exp().diag()
w = torch.linalg.solve(hessian, x.T @ y / N_SAMPLES)
x, y = validation
q = torch.linalg.solve(hessian, x.T @ (x @ w - y) / N_SAMPLES)
exact = -q * control.exp() * w

# %%
# Every method
# ------------
# The method is one argument of the solver. Certificates are off, so that times are those of the
# methods alone.
methods = {
    "Unrolled()": bl.Unrolled(),
    "MLM()": bl.MLM(),
    "MLM(last=20)": bl.MLM(last=20),
    "Implicit()": bl.Implicit(),
    "OneStep()": bl.OneStep(),
}
errors: dict[str, list[float]] = {name: [] for name in methods}
seconds: dict[str, list[float]] = {name: [] for name in methods}
for name, method in methods.items():
    for steps in INNER_STEPS:
        solver = bl.BilevelSolver(
            problem,
            bl.optim.SGD(0.4),
            steps,
            method,
            certificate=None,
            on_failure="ignore",
        )
        taken = []
        for _ in range(REPEATS):
            began = time.process_time()
            gradient = solver.hypergradient(start, control).gradient
            taken.append(time.process_time() - began)
        errors[name].append(float((gradient - exact).norm() / exact.norm()))
        seconds[name].append(median(taken))

print(f"after {INNER_STEPS[-1]} steps  relative error  milliseconds")
for name in methods:
    print(f"{name:16} {errors[name][-1]:14.1e} {1e3 * seconds[name][-1]:13.1f}")

# %%
# The figure
# ----------
# ``Unrolled`` and ``MLM`` are the same number, found in two ways: the derivative of the steps made.
# ``Unrolled`` keeps the graphs of all steps; ``MLM`` keeps the states here, and takes the time to
# build each graph again (``MLM(bl.Checkpointing(block=None))`` keeps them too). ``Implicit`` is the
# derivative of the minimiser, as if it had been reached: it needs no trajectory and the least time,
# down to the tolerance of its linear solver. ``MLM(last=20)`` leaves out what is older than 20
# steps, and stops where that matters. ``OneStep`` never comes near: it is at best a direction.
figure, panels = plt.subplots(2, 1, figsize=(6, 7))
for k, name in enumerate(methods):
    style = {
        "color": f"C{k}",
        "linewidth": 4 if k == 0 else 1.8,
        "alpha": 0.4 if k == 0 else 1,
    }
    panels[0].loglog(INNER_STEPS, errors[name], "o-", label=name, **style)
    panels[1].loglog(
        [1e3 * s for s in seconds[name]], errors[name], "o-", **style
    )
panels[0].set(xlabel="inner steps", ylabel="relative error")
panels[1].set(
    xlabel="time of a hypergradient [ms of processor]", ylabel="relative error"
)
panels[0].legend()
# sphinx_gallery_alt = "Relative error of five methods against inner steps and against time"
plt.show()

# %%
assert (
    max(errors[name][-1] for name in ("Unrolled()", "MLM()", "Implicit()"))
    < 1e-8
)
pairs = zip(errors["Unrolled()"], errors["MLM()"], strict=True)
assert max(abs(a - b) for a, b in pairs) < 1e-12  # Theorem 1
assert errors["OneStep()"][-1] > 0.1
