r"""
A weight decay for each layer of your own network
=================================================

A network with more weights than samples fits the noise. Weight decay holds it back, but how much,
and in which layer? Trying values takes a training for each, and a grid over three layers takes
many. The hypergradient of the validation loss tells how all three should move at once.
"""

# %%
# Your network and your data
# --------------------------
# Any ``torch.nn.Module``, and tensors or a map-style ``Dataset``. The points of two classes
# overlap: even the best boundary is wrong in about one point of ten.
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torch.nn import functional as F

import bilevel as bl

N_STEPS, UPDATES = 100, 15


def points(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = make_moons(n, noise=0.35, random_state=seed)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


train, validation, test = (
    points(40, seed=0),
    points(200, seed=1),
    points(4000, seed=2),
)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
)

# %%
# Two objectives
# --------------
# ``functional`` gives the network as a plain function of its parameters. The inner objective is
# what the training minimises; the outer one judges the result. The control is the logarithm of the
# decay of each weight matrix.
params, call = bl.functional(model)
matrices = [name for name in params if name.endswith("weight")]


def training(
    params: dict[str, Tensor], control: dict[str, Tensor], batch: tuple
) -> Tensor:
    inputs, labels = batch
    decay = sum(
        control[name].exp() * params[name].square().sum() for name in matrices
    )
    return F.cross_entropy(call(params, inputs), labels) + decay / 2


def validating(
    params: dict[str, Tensor], _control: dict[str, Tensor], batch: tuple
) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(call(params, inputs), labels)


# %%
# The solver
# ----------
# The training is 100 steps of Adam on minibatches, at a rate that falls to zero. ``Minibatches``
# shuffles as a ``DataLoader`` does, but finds the batch of each step again, which the sweep
# backwards needs. The steps made are the model, whether they have converged or not:
# ``AgainstSteps`` says so.
rate = bl.ByStep(lambda t: 0.05 * (1 - (t - 1) / N_STEPS))
solver = bl.BilevelSolver(
    bl.BilevelProblem(training, validating),
    bl.optim.Adam(rate),
    inner_steps=N_STEPS,
    method=bl.MLM(),
    certificate=bl.AgainstSteps(),
)
batches = bl.Minibatches(train, size=20, seed=0)
little = {name: torch.tensor(-8.0) for name in matrices}  # a decay of 3e-4
path = []
solution = solver.solve(
    params,
    little,
    lambda leaves: torch.optim.Adam(leaves, lr=0.4, betas=(0.5, 0.9)),
    steps=UPDATES,
    batches=[(batches, validation)],
    callback=lambda progress: path.append(
        [float(progress.control[name]) for name in matrices]
    ),
)
print(solution)

# %%
# Before and after
# ----------------
# Test points were seen by neither objective. The learned network goes back into the module.
before = solver.optimizer.params(solver.advance(params, little, batches).state)
after = solution.params
solution.load_into(model)


def accuracy(params: dict[str, Tensor]) -> float:
    inputs, labels = test
    return float((call(params, inputs).argmax(1) == labels).float().mean())


print(
    f"test accuracy {accuracy(before):.1%} with little decay, "
    f"{accuracy(after):.1%} with learned"
)

# %%
# The figure
# ----------
# With little decay one class is an island in the other, drawn around the samples at hand. With
# learned decays it is one region again, near the half moon that the points come from. Below, the
# decays on their way: the second layer needs three times as much as the first.
grid = torch.cartesian_prod(
    torch.linspace(-2, 3, 120), torch.linspace(-1.6, 2.1, 120)
)
figure = plt.figure(figsize=(6, 6.5))
panels = figure.subplot_mosaic([["before", "after"], ["path", "path"]])
for name, found in (("before", before), ("after", after)):
    share = call(found, grid).softmax(1)[:, 1].reshape(120, 120).T.numpy()
    panels[name].contourf(
        share,
        [0, 0.5, 1],
        extent=(-2, 3, -1.6, 2.1),
        colors=["C0", "C1"],
        alpha=0.25,
    )
    for label in (0, 1):
        inside = train[0][train[1] == label]
        panels[name].plot(
            inside[:, 0], inside[:, 1], "o", color=f"C{label}", markersize=4
        )
    panels[name].set(
        title=f"{name}: {accuracy(found):.1%}",
        xlabel="input 1",
        ylabel="input 2",
    )
updates = range(1, UPDATES + 1)
for k, layer in enumerate(("first", "second", "third")):
    panels["path"].semilogy(
        updates,
        torch.tensor(path)[:, k].exp(),
        f"C{k + 2}",
        label=f"{layer} layer",
    )
panels["path"].set(xlabel="update", ylabel="weight decay")
panels["path"].legend()
# sphinx_gallery_alt = "Decision regions before and after, and the decay of each layer by update"
plt.show()

# %%
assert accuracy(after) > accuracy(before) + 0.02
assert solution.value < 0.85 * solution.values[0]
