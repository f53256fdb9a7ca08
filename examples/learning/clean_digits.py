r"""
Find wrong labels: a weight for each sample
===========================================

Half of eight hundred digits get a label at random. Training on them as they are teaches the
mistakes too. But a hundred more, whose labels were checked, can tell which of the eight hundred do
harm. Each of those gets a weight, and the weights are learned so that a classifier trained with
them does well on the checked ones (data hyper-cleaning, Franceschi et al. 2017, arXiv 1703.01785).
"""

# %%
# Digits with wrong labels
# ------------------------
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import bilevel as bl

N_NOISY, N_CHECKED, N_STEPS, UPDATES = 800, 100, 50, 40
generator = torch.Generator().manual_seed(0)
images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
order = torch.randperm(len(images), generator=generator)
images, labels = images[order].float() / 16, labels[order]

noisy, true = images[:N_NOISY], labels[:N_NOISY]
random = torch.randint(10, (N_NOISY,), generator=generator)
given = torch.where(
    torch.rand(N_NOISY, generator=generator) < 0.5, random, true
)
wrong = given != true  # nobody tells the solver
checked = (
    images[N_NOISY : N_NOISY + N_CHECKED],
    labels[N_NOISY : N_NOISY + N_CHECKED],
)
test = images[N_NOISY + N_CHECKED :], labels[N_NOISY + N_CHECKED :]


# %%
# The problem
# -----------
# The control is one number a sample, whose sigmoid is the weight. The params are those of a linear
# classifier.
def losses(
    params: dict[str, Tensor], inputs: Tensor, targets: Tensor
) -> Tensor:
    scores = inputs @ params["weight"] + params["bias"]
    return F.cross_entropy(scores, targets, reduction="none")


def training(
    params: dict[str, Tensor], alpha: Tensor, _batch: object
) -> Tensor:
    decay = 1e-3 * params["weight"].square().sum()
    return (alpha.sigmoid() * losses(params, noisy, given)).mean() + decay


def validating(
    params: dict[str, Tensor], _alpha: Tensor, _batch: object
) -> Tensor:
    return losses(params, *checked).mean()


# %%
# The solver
# ----------
# The inner problem is convex. ``solve`` goes on from the last classifier at each update, so that
# fifty steps are enough for the implicit method, which keeps no trajectory.
solver = bl.BilevelSolver(
    bl.BilevelProblem(training, validating),
    bl.optim.SGD(1.0, momentum=0.9),
    inner_steps=N_STEPS,
    method=bl.Implicit(bl.linear.CG(rtol=1e-2)),
    certificate=None,
)
blank = {"weight": torch.zeros(64, 10), "bias": torch.zeros(10)}
equal = torch.zeros(N_NOISY)
solution = solver.solve(
    blank, equal, lambda leaves: torch.optim.Adam(leaves, 0.2), UPDATES
)
weights = solution.control.sigmoid()

# %%
# Which labels are wrong?
# -----------------------
# The verdict is a weight below one half, where all weights began.
judged = weights < 0.5
precision = float((judged & wrong).sum() / judged.sum())
recall = float((judged & wrong).sum() / wrong.sum())
print(f"of {int(wrong.sum())} wrong labels {recall:.1%} are found")
print(f"of {int(judged.sum())} verdicts {precision:.1%} are right")


# %%
# What the weights are worth
# --------------------------
def accuracy(params: dict[str, Tensor]) -> float:
    scores = test[0] @ params["weight"] + params["bias"]
    return float((scores.argmax(1) == test[1]).float().mean())


def trained(alpha: Tensor) -> dict[str, Tensor]:
    """The classifier of given weights, from nothing."""
    return bl.adapt(
        bl.optim.SGD(1.0, momentum=0.9),
        blank,
        lambda params: training(params, alpha, None),
        200,
    )


checked_alone = bl.adapt(
    bl.optim.SGD(1.0, momentum=0.9),
    blank,
    lambda params: (
        losses(params, *checked).mean() + 1e-3 * params["weight"].square().sum()
    ),
    200,
)
accuracies = {
    "equal weights": accuracy(trained(equal)),
    "checked labels alone": accuracy(checked_alone),
    "learned weights": accuracy(trained(solution.control)),
    "wrong labels left out": accuracy(trained(torch.where(wrong, -20.0, 20.0))),
}
for name, share in accuracies.items():
    print(f"{name:22} test accuracy {share:.1%}")

# %%
# The figure
# ----------
# The first eight digits whose labels are judged wrong, then the first eight that are judged right,
# with the labels that were given and their weights; blue labels are true. Below, all weights.
figure = plt.figure(figsize=(6, 5.4))
shown, histogram = figure.subfigures(2, 1, height_ratios=[4, 5])
chosen = torch.cat([judged.nonzero()[:8, 0], (~judged).nonzero()[:8, 0]])
for axes, k in zip(shown.subplots(2, 8).flat, chosen.tolist(), strict=True):
    axes.imshow(noisy[k].reshape(8, 8).numpy(), cmap="gray")
    axes.set_title(
        f"“{given[k]}”\n{weights[k]:.2f}",
        fontsize="small",
        color="C1" if wrong[k] else "C0",
    )
    axes.axis("off")
axes = histogram.subplots()
bins = torch.linspace(0, 1, 21).tolist()
axes.hist(
    weights[~wrong].tolist(),
    bins,
    color="C0",
    alpha=0.6,
    label="label is right",
)
axes.hist(
    weights[wrong].tolist(), bins, color="C1", alpha=0.6, label="label is wrong"
)
axes.set(xlabel="learned weight", ylabel="digits")
axes.legend()
# sphinx_gallery_alt = "Digits with their labels and weights; weights of wrong labels are near zero"
plt.show()

# %%
assert min(precision, recall) > 0.85
assert accuracies["learned weights"] > accuracies["equal weights"] + 0.03
assert accuracies["learned weights"] > accuracies["checked labels alone"]
