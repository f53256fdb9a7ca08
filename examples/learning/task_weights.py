r"""
Which tasks help which? Learned weights and correlation
=======================================================

Six sets of training digits: two upright, two turned by a quarter, one half turned, and one with
random labels. Two classifiers are wanted, one for upright digits and one for turned ones, each
judged by few examples. A weight for each pair of training set and goal is learned, and the matrix
of weights says what is related to what.
"""

# %%
# Six training tasks, two validation tasks
# ----------------------------------------
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import bilevel as bl

N_TRAIN, N_VALIDATION, N_TEST = 60, 40, 400
UPDATES = 25
generator = torch.Generator().manual_seed(0)
images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
order = torch.randperm(len(images), generator=generator)
images, labels = images[order].double().reshape(-1, 8, 8) / 16, labels[order]
used = 0


def draw(n: int, turned: int = 0) -> tuple[Tensor, Tensor]:
    """The next n digits, of which so many are turned."""
    global used
    x, y = images[used : used + n], labels[used : used + n]
    used += n
    return torch.cat([x[:turned].rot90(dims=(1, 2)), x[turned:]]).flatten(1), y


train = {
    "upright 1": draw(N_TRAIN),
    "upright 2": draw(N_TRAIN),
    "turned 1": draw(N_TRAIN, turned=N_TRAIN),
    "turned 2": draw(N_TRAIN, turned=N_TRAIN),
    "half turned": draw(N_TRAIN, turned=N_TRAIN // 2),
    "random labels": (
        draw(N_TRAIN)[0],
        torch.randint(10, (N_TRAIN,), generator=generator),
    ),
}
validation = {
    "upright": draw(N_VALIDATION),
    "turned": draw(N_VALIDATION, turned=N_VALIDATION),
}
test = {"upright": draw(N_TEST), "turned": draw(N_TEST, turned=N_TEST)}

# %%
# The weighted problem
# --------------------
# Two functions give the losses of one model on all tasks. With ``n_validations`` there is a column
# of weights, and a model of its own, for each goal; all are solved together. The entropy keeps
# weights spread where the validation digits do not tell two sets apart.
Samples = dict[str, tuple[Tensor, Tensor]]


def losses(params: Tensor, tasks: Samples) -> Tensor:
    """Cross-entropy of a linear classifier on each task, shape (tasks,)."""
    return torch.stack(
        [F.cross_entropy(x @ params, y) for x, y in tasks.values()]
    )


weights = bl.TaskWeights(
    n_tasks=len(train), n_validations=len(validation), entropy=0.1
)
problem = bl.weighted_problem(
    lambda params, _batch: losses(params, train) + 5e-3 * params.square().sum(),
    lambda params, _batch: losses(params, validation),
    weights,
)
solver = bl.BilevelSolver(
    problem, bl.optim.SGD(0.5, momentum=0.9), 80, bl.Implicit()
)
blank = torch.zeros(64, 10, dtype=torch.float64)
equal = weights.initial(torch.float64)
solution = solver.solve(
    weights.stacked(blank),
    equal,
    lambda leaves: torch.optim.Adam(leaves, 0.3),
    UPDATES,
)
print(solution.hypergradient.certificate)


# %%
# What the weights are worth
# --------------------------
def accuracies(alpha: Tensor) -> dict[str, float]:
    """Share of test digits classified right, each goal by its own model."""
    found = solver.optimizer.params(
        solver.advance(weights.stacked(blank), alpha).state
    )
    return {
        goal: float(((x @ params).argmax(1) == y).double().mean())
        for params, (goal, (x, y)) in zip(found, test.items(), strict=True)
    }


before, after = accuracies(equal), accuracies(solution.control)
for goal in test:
    print(
        f"{goal}: {before[goal]:.1%} with equal weights, "
        f"{after[goal]:.1%} with learned ones"
    )

# %%
# The figure
# ----------
# Each column sums to one. Sets of the other orientation and random labels get nothing; what is half
# turned is worth something to both.
correlation = weights.correlation(
    solution.control, list(train), list(validation)
)
figure, axes = plt.subplots(figsize=(5, 4.5))
correlation.plot(axes)
# sphinx_gallery_alt = "Weights of six training sets for two goals: own orientation only"
plt.show()

# %%
upright, turned = correlation.matrix.T
assert upright[:2].sum() > 0.7
assert turned[2:4].sum() > 0.7
assert correlation.matrix[4].min() > 0.1  # half turned
assert correlation.matrix[-1].max() < 0.02  # random labels
assert all(after[goal] > before[goal] for goal in test)
