"""An unrolled network as a dynamics: complex sparse signals from few measurements.

Each phase is a `torch.nn.Module` that takes a gradient step on the measurements and shrinks what
it gets (a learned ISTA). Algorithm 2 trains it; plain autograd finds the same gradient.
"""

# %% One phase, and synthetic data
import torch
from torch import Tensor, nn

import bilevel as bl

N_SIGNAL, N_MEASURED, N_PHASES, BATCH = 24, 16, 4, 64
generator = torch.Generator().manual_seed(0)


def complex_normal(*shape: int) -> Tensor:
    """Real and imaginary part of variance 1/2 each."""
    return torch.randn(shape, generator=generator, dtype=torch.complex128)


class Phase(nn.Module):
    """x -> shrink(x - W (A x - y)), with a learned complex W and a learned real threshold."""

    def __init__(self, operator: Tensor) -> None:
        """Begin as ISTA: W = A^H / |A|^2."""
        super().__init__()
        self.weight = nn.Parameter(operator.mH / torch.linalg.matrix_norm(operator, 2) ** 2)
        self.threshold = nn.Parameter(torch.tensor(0.05, dtype=torch.float64))

    def forward(self, x: Tensor, operator: Tensor, measured: Tensor) -> Tensor:
        """The next estimate, shape (batch, signal)."""
        x = x - (x @ operator.mT - measured) @ self.weight.mT
        size = (x.real**2 + x.imag**2 + 1e-12).sqrt()
        return x * torch.relu(1 - self.threshold / size)


matrix = complex_normal(N_MEASURED, N_SIGNAL) / N_MEASURED**0.5


def draw() -> tuple[Tensor, Tensor]:
    """Signals with about three entries that are not zero, and their measurements."""
    support = torch.rand(BATCH, N_SIGNAL, generator=generator) < 3 / N_SIGNAL
    signal = complex_normal(BATCH, N_SIGNAL) * support
    return signal, signal @ matrix.mT


# %% The network as a dynamics: what a sample holds constant is its context, the rest its state
phases = [Phase(matrix) for _ in range(N_PHASES)]


def build(batch: tuple[Tensor, Tensor]) -> tuple[bl.ControlProblem, Tensor]:
    """The control problem of one batch, and u(0)."""
    signal, measured = batch

    def squared_error(x: Tensor, _control: bl.PerStep) -> Tensor:
        return (x - signal).abs().square().sum(dim=1).mean()

    dynamics = bl.Phases(phases, context=(matrix, measured))
    return bl.ControlProblem(dynamics, squared_error, N_PHASES), torch.zeros_like(signal)


untrained = bl.Phases(phases).controls()
test = draw()

# %% Theorem 1: the multiplier sweep finds the gradient of plain autograd
problem, start = build(test)
by_multipliers = bl.adjoint(problem, start, untrained)

x = start
for phase in phases:
    x = phase(x, matrix, test[1])
problem.terminal(x, untrained).backward()

gradient_error = 0.0
for phase, found in zip(phases, by_multipliers.gradient.steps, strict=True):
    for name, parameter in phase.named_parameters():
        difference = (parameter.grad - found[name]).abs().max() / parameter.grad.abs().max()
        gradient_error = max(gradient_error, float(difference))
print(f"largest relative difference from autograd: {gradient_error:.1e}")

# %% Algorithm 2: one batch an update
solver = bl.ControlSolver(build, lambda leaves: torch.optim.Adam(leaves, 1e-2))
solution = solver.solve(untrained, batches=[draw() for _ in range(50)], steps=300)

# %% The trained weights go back into the modules
bl.Phases(phases).load(solution.control)
cost_before = float(by_multipliers.cost)
cost = float(bl.adjoint(*build(test), bl.Phases(phases).controls()).cost)
print(f"squared error of new signals: {cost_before:.3f} before, {cost:.3f} after training")
