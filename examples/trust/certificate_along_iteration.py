r"""
A certificate along an inner iteration
======================================

After few inner steps a hypergradient is wrong; after many it is right. Nobody tells how many are
enough, but the certificate of each hypergradient estimates its error, without knowing the truth.
Here the truth is known, so that the estimate can be judged.
"""

# %%
# The problem
# -----------
# Logistic regression with a decay for each of 20 coefficients; none of it has a closed form.
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import functional as F

import bilevel as bl

N_SAMPLES, N_FEATURES = 80, 20
INNER_STEPS = (5, 10, 20, 40, 80, 160, 320)
generator = torch.Generator().manual_seed(0)
truth = torch.randn(N_FEATURES, generator=generator, dtype=torch.float64)


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(
        N_SAMPLES, N_FEATURES, generator=generator, dtype=torch.float64
    )
    noise = torch.randn(N_SAMPLES, generator=generator, dtype=torch.float64)
    return x, (x @ truth + noise > 0).double()


train, validation = data(), data()


def loss(w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return F.binary_cross_entropy_with_logits(inputs @ w, labels)


problem = bl.BilevelProblem(
    inner=lambda w, a, _batch: (
        loss(w, train) + (a.exp() * w.square()).sum() / 2
    ),
    outer=lambda w, _a, _batch: loss(w, validation),
)
start = torch.zeros(N_FEATURES, dtype=torch.float64)
control = torch.full((N_FEATURES,), -4.0, dtype=torch.float64)


def hypergradient(inner_steps: int) -> bl.solution.Hypergradient:
    solver = bl.BilevelSolver(
        problem, bl.optim.SGD(1.0), inner_steps, on_failure="ignore"
    )
    return solver.hypergradient(start, control)


# %%
# Three numbers at each length
# ----------------------------
# The error that is estimated, the true error, and that of ``corrected()``, a better hypergradient
# that the certificate finds on its way. The truth is the hypergradient of 2000 steps.
exact = hypergradient(2000).gradient


def distance(gradient: Tensor) -> float:
    return float((gradient - exact).norm() / exact.norm())


found = [hypergradient(steps) for steps in INNER_STEPS]
estimated = [one.certificate.error_estimate for one in found]
true = [distance(one.gradient) for one in found]
corrected = [distance(one.certificate.corrected()) for one in found]
trusted = [one.certificate.trustworthy for one in found]

print("steps  estimate  true error  corrected  verdict")
for row in zip(INNER_STEPS, estimated, true, corrected, trusted, strict=True):
    steps, *errors, verdict = row
    print(
        f"{steps:5}",
        *(f"{x:9.1e}" for x in errors),
        "trustworthy" if verdict else "not trustworthy",
    )

# %%
# A certificate prints as a sentence.
print(found[2].certificate)

# %%
# The figure
# ----------
# The estimate follows the true error over five orders of magnitude. Above two per cent (the dotted
# line, ``trust``) a hypergradient is not trusted; ``solve`` would warn. The corrected one is right
# long before.
figure, axes = plt.subplots()
axes.loglog(
    INNER_STEPS,
    estimated,
    "o-",
    color="C0",
    linewidth=5,
    alpha=0.4,
    label="estimated",
)
axes.loglog(INNER_STEPS, true, "o-", color="C1", label="true")
axes.loglog(
    INNER_STEPS, corrected, "s--", color="C2", label="true, of corrected()"
)
axes.axhline(0.02, color="C3", linestyle=":", label="trust")
axes.set(xlabel="inner steps", ylabel="relative error of the hypergradient")
axes.legend()
# sphinx_gallery_alt = "Estimated and true error fall together with the number of inner steps"
plt.show()

# %%
for estimate, error, better, verdict in zip(
    estimated, true, corrected, trusted, strict=True
):
    assert 0.5 < estimate / error < 2
    assert better < 0.5 * error
    assert verdict == (estimate <= 0.02)
