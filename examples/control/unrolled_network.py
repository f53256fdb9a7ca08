r"""
Train an unrolled network by multipliers
========================================

Complex signals with few non-zero entries are to be found from few measurements,
:math:`y = A x`. Each phase of the network takes a gradient step on the measurements and shrinks
what it gets: a learned version of the iterative shrinkage algorithm (ISTA). The phases are the
steps of a dynamics, their weights are the control, and Algorithm 2 trains them: forward sweep,
multiplier sweep, one step of an optimiser.
"""

# %%
# One phase
# ---------
# An ordinary ``torch.nn.Module``. Its first input is the state, the others belong to the sample.
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import bilevel as bl

N_SIGNAL, N_MEASURED, N_PHASES, BATCH = 24, 16, 4, 64
UPDATES = 300
generator = torch.Generator().manual_seed(0)


def complex_normal(*shape: int) -> Tensor:
    """Real and imaginary part of variance 1/2 each."""
    return torch.randn(shape, generator=generator, dtype=torch.complex128)


class Phase(nn.Module):
    """x -> shrink(x - W (A x - y)), W and a real threshold being learned."""

    def __init__(self, operator: Tensor) -> None:
        """Begin as ISTA: W = A^H / |A|^2."""
        super().__init__()
        self.weight = nn.Parameter(
            operator.mH / torch.linalg.matrix_norm(operator, 2) ** 2
        )
        self.threshold = nn.Parameter(torch.tensor(0.05, dtype=torch.float64))

    def forward(self, x: Tensor, operator: Tensor, measured: Tensor) -> Tensor:
        """The next estimate, shape (batch, signal)."""
        x = x - (x @ operator.mT - measured) @ self.weight.mT
        size = (x.real**2 + x.imag**2 + 1e-12).sqrt()
        return x * torch.relu(1 - self.threshold / size)


# %%
# The control problem of a batch
# ------------------------------
matrix = complex_normal(N_MEASURED, N_SIGNAL) / N_MEASURED**0.5
phases = [Phase(matrix) for _ in range(N_PHASES)]


def draw() -> tuple[Tensor, Tensor]:
    """Signals with three entries or so that are not 0, and measurements."""
    support = torch.rand(BATCH, N_SIGNAL, generator=generator) < 3 / N_SIGNAL
    signal = complex_normal(BATCH, N_SIGNAL) * support
    return signal, signal @ matrix.mT


def build(batch: tuple[Tensor, Tensor]) -> tuple[bl.ControlProblem, Tensor]:
    """The control problem of one batch, and u(0)."""
    signal, measured = batch

    def squared_error(x: Tensor, _control: bl.PerStep) -> Tensor:
        return (x - signal).abs().square().sum(dim=1).mean()

    dynamics = bl.Phases(phases, context=(matrix, measured))
    return bl.ControlProblem(
        dynamics, squared_error, N_PHASES
    ), torch.zeros_like(signal)


# %%
# Theorem 1: the gradient is that of autograd
# -------------------------------------------
untrained = bl.Phases(phases).controls()
test = draw()
problem, start = build(test)
by_multipliers = bl.adjoint(problem, start, untrained, keep_states=True)

x = start
for phase in phases:
    x = phase(x, matrix, test[1])
problem.terminal(x, untrained).backward()

gradient_error = 0.0
for phase, found in zip(phases, by_multipliers.gradient.steps, strict=True):
    for name, parameter in phase.named_parameters():
        difference = (
            parameter.grad - found[name]
        ).abs().max() / parameter.grad.abs().max()
        gradient_error = max(gradient_error, float(difference))
print(f"largest relative difference from autograd: {gradient_error:.1e}")

# %%
# Training
# --------
# One batch an update. The trained weights go back into the modules.
solver = bl.ControlSolver(build, lambda leaves: torch.optim.Adam(leaves, 1e-2))
solution = solver.solve(
    untrained, batches=[draw() for _ in range(50)], steps=UPDATES
)
bl.Phases(phases).load(solution.control)

trained = bl.adjoint(problem, start, solution.control, keep_states=True)
cost_before, cost = float(by_multipliers.cost), float(trained.cost)
print(
    f"squared error of new signals: {cost_before:.3f} before, "
    f"{cost:.3f} after training"
)

# %%
# The figure
# ----------
# The error of new signals phase by phase, and one signal. ISTA would go on for hundreds of phases;
# the trained network does with four.
signal = test[0]
before, after = (
    torch.stack(
        [(x - signal).abs().square().sum(1).mean() for x in swept.states]
    )
    for swept in (by_multipliers, trained)
)
figure, (top, bottom) = plt.subplots(2, 1, figsize=(6, 6))
top.semilogy(before, "o-", color="C1", label="untrained: ISTA")
top.semilogy(after, "o-", color="C0", label="trained")
top.set(
    xlabel="phase t", ylabel="mean squared error", xticks=range(N_PHASES + 1)
)
top.legend()
one = int(signal.abs().gt(0).sum(1).eq(3).nonzero()[0])
places = range(N_SIGNAL)
bottom.bar(
    places,
    signal[one].abs().tolist(),
    color="0.5",
    alpha=0.5,
    label="true signal",
)
bottom.plot(
    places,
    by_multipliers.final_state[one].abs(),
    "x",
    color="C1",
    label="untrained",
)
bottom.plot(
    places, trained.final_state[one].abs(), "o", color="C0", label="trained"
)
bottom.set(xlabel="entry", ylabel="magnitude")
bottom.legend()
# sphinx_gallery_alt = "Error by phase, and one sparse signal as found before and after training"
plt.show()

# %%
assert gradient_error < 1e-12
assert cost < 0.25 * cost_before
