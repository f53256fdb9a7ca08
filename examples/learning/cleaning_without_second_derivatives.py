r"""
Cleaning labels without second derivatives
==========================================

Fused kernels, compiled models and sharded ones often have a first derivative and no second. The
penalty path needs no more: it solves the inner problem once as it is, and a few times with a small
part of the outer objective added. Here it learns which labels of a training set are wrong, through
a loss whose backward cannot be differentiated.
"""

# %%
# Two classes, a third of the labels wrong
# ----------------------------------------
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import bilevel as bl

generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def label(points: Tensor) -> Tensor:
    """Above or below a wave."""
    return (points[:, 1] > (1.5 * points[:, 0]).sin()).double()


frequencies, phases = (
    1.2 * normal(2, 60),
    6.28 * torch.rand(60, generator=generator).double(),
)


def features(points: Tensor) -> Tensor:
    """Sixty random waves, so that the model is linear in its params."""
    return (points @ frequencies + phases).cos() / 60**0.5


train, clean = 1.5 * normal(240, 2), 1.5 * normal(80, 2)
wrong = torch.rand(240, generator=generator) < 0.33
X, y = features(train), torch.where(wrong, 1 - label(train), label(train))
V, z = features(clean), label(clean)


# %%
# A loss that is differentiated once
# ----------------------------------
# It stands for any fused kernel: the gradient is computed with the value, and autograd cannot go
# through it a second time.
class FusedLoss(torch.autograd.Function):
    """Binary cross-entropy of each sample, with its gradient."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(scores.sigmoid() - labels)
        return torch.nn.functional.binary_cross_entropy_with_logits(
            scores, labels, reduction="none"
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return slope * gradient, None


problem = bl.BilevelProblem(
    inner=lambda w, a, _batch: (
        (a.sigmoid() * FusedLoss.apply(X @ w, y)).mean() + 1e-3 * (w**2).sum()
    ),
    outer=lambda w, _a, _batch: FusedLoss.apply(V @ w, z).mean(),
)
rule = bl.optim.SGD(8.0, momentum=0.9)
weights, params = (
    torch.zeros(240, dtype=torch.float64),
    torch.zeros(60, dtype=torch.float64),
)

try:
    bl.BilevelSolver(problem, rule, 150, bl.Implicit()).hypergradient(
        params, weights
    )
except bl.BilevelError as error:
    print(f"Implicit: {error}")

# %%
# The penalty path, and what it knows of its error
# ------------------------------------------------
# The strength may be chosen by hand or left to the method. The certificate compares the order that
# was asked for with the next one; it takes no second derivative either.
reference = bl.BilevelProblem(
    inner=lambda w, a, _batch: (
        (
            a.sigmoid()
            * torch.nn.functional.binary_cross_entropy_with_logits(
                X @ w, y, reduction="none"
            )
        ).mean()
        + 1e-3 * (w**2).sum()
    ),
    outer=lambda w, _a, _batch: (
        torch.nn.functional.binary_cross_entropy_with_logits(V @ w, z)
    ),
)
exact = bl.BilevelSolver(reference, rule, 600, bl.Implicit()).hypergradient(
    params, weights
)
strengths = [2.0**k for k in range(3, 13, 2)]
errors: dict[int, list[float]] = {}
estimates: dict[int, list[float]] = {}
for order in (1, 2, 3):
    errors[order], estimates[order] = [], []
    for strength in strengths:
        method = bl.Penalty(strength, order)
        found = bl.BilevelSolver(
            problem, rule, 150, method, on_failure="ignore"
        ).hypergradient(params, weights)
        difference = (
            found.gradient - exact.gradient
        ).norm() / exact.gradient.norm()
        errors[order].append(float(difference))
        estimates[order].append(found.certificate.error_estimate)
chosen = bl.BilevelSolver(problem, rule, 150, bl.Penalty()).hypergradient(
    params, weights
)
difference = (chosen.gradient - exact.gradient).norm() / exact.gradient.norm()
print(f"strength left to the method: relative error {float(difference):.1e}")
print("certificate:", chosen.certificate)

# %%
# Learning the weights
# --------------------
solver = bl.BilevelSolver(problem, rule, 150, bl.Penalty(256.0))
found = solver.solve(
    params, weights, lambda leaves: torch.optim.Adam(leaves, 0.5), steps=15
)
learned = found.control.sigmoid()
print(
    f"mean weight of wrong labels {learned[wrong].mean():.2f}, of the others "
    f"{learned[~wrong].mean():.2f}"
)

# %%
# Above: points are true errors, lines what the certificate says. Below: the learned weights.
figure, (above, below) = plt.subplots(2, 1, figsize=(6, 7))
for order, colour in zip((1, 2, 3), ("C0", "C1", "C2"), strict=True):
    above.loglog(
        strengths, estimates[order], colour, label=f"order {order}, estimate"
    )
    above.loglog(strengths, errors[order], "o", color=colour)
above.set(xlabel="strength", ylabel="relative error")
above.legend()
below.hist(
    [learned[~wrong].numpy(), learned[wrong].numpy()],
    bins=20,
    label=["label as it is", "label wrong"],
    stacked=True,
)
below.set(xlabel="learned weight of a sample", ylabel="samples")
below.legend()
# sphinx_gallery_alt = "Estimates lie on the errors of three orders; wrong labels weigh little"
plt.show()

# %%
assert float(difference) < 1e-3
assert learned[wrong].mean() < 0.5 * learned[~wrong].mean()
for order in (1, 2, 3):
    for estimate, error in zip(estimates[order], errors[order], strict=True):
        assert estimate > error / 3
