r"""
A deep equilibrium model
========================

A layer that is repeated until nothing changes has one depth: that of its equilibrium
:math:`z = \Phi(z, x; \theta)`. No step on the way there has to be kept. Here such a layer learns
two spirals; its equilibrium is found by Anderson acceleration and differentiated by its equation.
"""

# %%
# The data
# --------
import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import bilevel as bl

N_EACH, WIDTH = 60, 16
UPDATES = 100
generator = torch.Generator().manual_seed(0)


def spirals(n: int) -> tuple[Tensor, Tensor]:
    angle = 3 * math.pi * torch.rand(2, n, generator=generator) ** 0.5
    turn = angle + torch.tensor([[0.0], [math.pi]])
    points = (angle / (3 * math.pi))[..., None] * torch.stack(
        [turn.cos(), turn.sin()], -1
    )
    points = points + 0.015 * torch.randn(2, n, 2, generator=generator)
    labels = torch.arange(2.0)[:, None].expand(2, n)
    return 3 * points.reshape(-1, 2), labels.reshape(-1)


train, test = spirals(N_EACH), spirals(300)


# %%
# The layer and its equilibrium
# -----------------------------
# :math:`\Phi(z) = \tanh(W z + U x + b)` contracts where the norm of W is below 1, which a scaling
# keeps. The inner problem is its residual: it minimises nothing.
def layer(z: Tensor, theta: dict[str, Tensor], x: Tensor) -> Tensor:
    size = torch.linalg.matrix_norm(theta["inner"], 2)
    inner = theta["inner"] * (0.98 / size.clamp_min(0.98))
    return torch.tanh(z @ inner.T + x @ theta["input"].T + theta["shift"])


def loss(
    z: Tensor, theta: dict[str, Tensor], batch: tuple[Tensor, Tensor]
) -> Tensor:
    scores = z @ theta["output"] + theta["offset"]
    fit = torch.nn.functional.binary_cross_entropy_with_logits(scores, batch[1])
    return fit + 1e-4 * sum(part.square().sum() for part in theta.values())


problem = bl.BilevelProblem(
    residual=lambda z, theta, batch: z - layer(z, theta, batch[0]), outer=loss
)
shapes = {
    "inner": (WIDTH, WIDTH),
    "input": (WIDTH, 2),
    "shift": (WIDTH,),
    "output": (WIDTH,),
}
theta = {
    name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    for name, shape in shapes.items()
}
theta |= {"inner": 2 * theta["inner"], "offset": torch.tensor(0.0)}

# %%
# Two ways to the equilibrium
# ---------------------------
# The residual against the number of evaluations of the layer: plain repetition, and Anderson
# acceleration, which combines the last five points. This layer contracts well by itself, so that
# little is to be gained.
start = torch.zeros(2 * N_EACH, WIDTH)
falls = {}
for name, rule in {
    "plain": bl.optim.FixedPoint(),
    "Anderson": bl.optim.Anderson(),
}.items():
    falls[name] = []
    solver = bl.BilevelSolver(problem, rule, 1, bl.Implicit(), certificate=None)
    warm = None
    for _ in range(25):
        warm = solver.advance(start, theta, train, warm)
        z = rule.params(warm.state)
        falls[name].append(float((z - layer(z, theta, train[0])).norm()))

# %%
# Training
# --------
# Each equilibrium begins where the last one ended. One certificate at the end looks whether the
# gradient is that of the equilibrium, and not of some point on the way.
solver = bl.BilevelSolver(
    problem,
    bl.optim.Anderson(),
    inner_steps=40,
    method=bl.Implicit(),
    certificate=None,
)
solution = solver.solve(
    start,
    theta,
    lambda leaves: torch.optim.Adam(leaves, 0.03),
    steps=UPDATES,
    batches=[(train, train)],
    inner_tolerance=1e-3,
)
judged = bl.BilevelSolver(
    problem, bl.optim.Anderson(), 60, bl.Implicit()
).hypergradient(solution.params, solution.control, train, train)
print(judged.certificate)


def scores(x: Tensor) -> Tensor:
    z = torch.zeros(len(x), WIDTH)
    for _ in range(100):
        z = layer(z, solution.control, x)
    return z @ solution.control["output"] + solution.control["offset"]


accuracy = float(((scores(test[0]) > 0) == test[1].bool()).float().mean())
print(f"accuracy on other points: {accuracy:.1%}")

# %%
# The figure
# ----------
figure, panels = plt.subplots(2, 1, figsize=(6, 8))
for name, residuals in falls.items():
    panels[0].semilogy(range(1, 26), residuals, label=name)
panels[0].set(xlabel="evaluations of the layer", ylabel="residual")
panels[0].legend()
axis = torch.linspace(-3.2, 3.2, 80)
grid = torch.cartesian_prod(axis, axis)
height = scores(grid).sigmoid().reshape(80, 80).T.numpy()
panels[1].contourf(
    axis.numpy(), axis.numpy(), height, levels=11, cmap="coolwarm"
)
colours = train[1].numpy()
panels[1].scatter(
    *train[0].T.numpy(), c=colours, cmap="coolwarm", edgecolors="black", s=14
)
panels[1].set(
    xlabel="first coordinate", ylabel="second coordinate", aspect="equal"
)
# sphinx_gallery_alt = "Residuals of two iterations, and the two spirals with the learned boundary"
plt.show()

# %%
reached = {
    name: sum(x > 1e-4 for x in residuals) for name, residuals in falls.items()
}
assert reached["Anderson"] < reached["plain"]
assert judged.certificate.trustworthy
assert accuracy > 0.9
