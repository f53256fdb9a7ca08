r"""
Learn the data: ten images that teach all digits
================================================

Train a classifier on ten images, one a digit, and it will do badly on the others, whichever ten
are chosen. But which ten images would be best, if they may be any images at all? The pixels are an
outer variable: the inner training sees only the ten, and is judged on six hundred real digits.
"""

# %%
# Real digits
# -----------
# 1797 images of 8 x 8 pixels that come with scikit-learn.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

import bilevel as bl

N_REAL, N_STEPS, UPDATES = 600, 40, 60
generator = torch.Generator().manual_seed(0)
images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
order = torch.randperm(len(images), generator=generator)
images, labels = images[order].float() / 16, labels[order]
real = images[:N_REAL], labels[:N_REAL]
test = images[N_REAL:], labels[N_REAL:]
classes = torch.arange(10)


# %%
# The problem
# -----------
# The params are a linear classifier, the control is ten images.
def loss(params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(inputs @ params["weight"] + params["bias"], targets)


problem = bl.BilevelProblem(
    inner=lambda params, taught, _batch: loss(params, taught, classes),
    outer=lambda params, _taught, _batch: loss(params, *real),
)
solver = bl.BilevelSolver(
    problem,
    bl.optim.SGD(1.0),
    inner_steps=N_STEPS,
    method=bl.MLM(),
    certificate=bl.AgainstSteps(),
)
blank = {"weight": torch.zeros(64, 10), "bias": torch.zeros(10)}

# %%
# Learning the images
# -------------------
# They begin as ten real ones.
chosen = torch.stack([real[0][real[1] == digit][0] for digit in range(10)])
solution = solver.solve(
    blank, chosen, lambda leaves: torch.optim.Adam(leaves, 0.05), UPDATES
)


# %%
# What they teach
# ---------------
# For comparison: the same classifier trained on all six hundred real images, to the end.
def accuracy(params: dict[str, Tensor]) -> float:
    scores = test[0] @ params["weight"] + params["bias"]
    return float((scores.argmax(1) == test[1]).float().mean())


def taught(images: Tensor) -> dict[str, Tensor]:
    return solver.optimizer.params(solver.advance(blank, images).state)


everything = bl.adapt(
    bl.optim.SGD(1.0), blank, lambda params: loss(params, *real), steps=500
)
accuracies = {
    "ten real images": accuracy(taught(chosen)),
    "ten learned images": accuracy(taught(solution.control)),
    "six hundred real images": accuracy(everything),
}
for name, share in accuracies.items():
    print(f"{name:24} test accuracy {share:.1%}")

# %%
# The figure
# ----------
# The learned images are no digits any more. Each shows where its digit has ink that others have
# not, and is darker than paper where others have ink.
figure = plt.figure(figsize=(6, 5.6))
above, below = figure.subfigures(2, 1)
for part, name, shown in (
    (above, "ten real images", chosen),
    (below, "ten learned images", solution.control),
):
    part.suptitle(
        f"{name}: test accuracy {accuracies[name]:.1%}", fontsize="medium"
    )
    for k, axes in enumerate(part.subplots(2, 5).flat):
        axes.imshow(
            shown[k].reshape(8, 8).numpy(), cmap="gray", vmin=-0.3, vmax=1
        )
        axes.axis("off")
# sphinx_gallery_alt = "Ten real digits and the ten images that were learned from them"
plt.show()

# %%
assert accuracies["ten learned images"] > accuracies["ten real images"] + 0.15
assert (
    accuracies["ten learned images"]
    > accuracies["six hundred real images"] - 0.02
)
