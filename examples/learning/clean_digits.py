r"""
Find wrong labels: a weight for each sample
===========================================

Half of six hundred digits get a label at random. Training on them as they are teaches the mistakes
too. But some hundred digits with labels that were checked can tell which of the six hundred do
harm: each gets a weight, and the weights are learned so that a classifier trained with them does
well on the checked ones (data hyper-cleaning, Franceschi et al. 2017, arXiv 1703.01785).
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

N_NOISY, N_CHECKED, N_STEPS, UPDATES = 600, 200, 50, 40
generator = torch.Generator().manual_seed(0)
images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
order = torch.randperm(len(images), generator=generator)
images, labels = images[order].float() / 16, labels[order]

noisy, true = images[:N_NOISY], labels[:N_NOISY]
random = torch.randint(10, (N_NOISY,), generator=generator)
given = torch.where(torch.rand(N_NOISY, generator=generator) < 0.5, random, true)
wrong = given != true  # nobody tells the solver
checked = images[N_NOISY : N_NOISY + N_CHECKED], labels[N_NOISY : N_NOISY + N_CHECKED]
test = images[N_NOISY + N_CHECKED :], labels[N_NOISY + N_CHECKED :]


# %%
# The problem
# -----------
# The control is one number a sample, whose sigmoid is the weight. The params are those of a linear
# classifier.
def losses(params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    scores = inputs @ params["weight"] + params["bias"]
    return F.cross_entropy(scores, targets, reduction="none")


def training(params: dict[str, Tensor], alpha: Tensor, _batch: object) -> Tensor:
    decay = 1e-3 * params["weight"].square().sum()
    return (alpha.sigmoid() * losses(params, noisy, given)).mean() + decay


def validating(params: dict[str, Tensor], _alpha: Tensor, _batch: object) -> Tensor:
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
import time
t=time.process_time()
solution = solver.solve(blank, equal, lambda leaves: torch.optim.Adam(leaves, 0.2), UPDATES)
weights = solution.control.sigmoid()
def accuracy(params):
    scores = test[0] @ params["weight"] + params["bias"]
    return float((scores.argmax(1) == test[1]).float().mean())
print(time.process_time()-t, solution.values[::8])
trained=lambda a: solver.optimizer.params(solver.advance(blank,a,None).state)
print(accuracy(trained(equal)), accuracy(solution.params), accuracy(trained(torch.where(wrong,-9.,9.))))
judged=weights<0.5
print(float((judged&wrong).sum()/judged.sum()), float((judged&wrong).sum()/wrong.sum()), wrong.float().mean())
p=bl.adapt(bl.optim.SGD(1.0,momentum=.9),blank,lambda p: losses(p,*checked).mean()+1e-3*p["weight"].square().sum(),200); print("checked only",accuracy(p))
