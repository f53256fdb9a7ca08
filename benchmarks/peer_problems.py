"""Small problems with a known hypergradient on which libraries have been seen to fail."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ridge import Ridge


@dataclass(frozen=True, eq=False)
class Scalar:
    """f = (w - 2)^2 / 2 + exp(alpha) w^2 / 2 and F = (w - 1)^2 / 2 with a weight of shape ()."""

    alpha: Tensor
    step_size: float = 0.3
    outer_slope_size: float = 1.0
    cg_iterations: int = 1

    def inner(self, w: Tensor, alpha: Tensor, _batch: Any = None) -> Tensor:
        return 0.5 * (w - 2) ** 2 + 0.5 * alpha.exp() * w**2

    def outer(self, w: Tensor, _alpha: Tensor, _batch: Any = None) -> Tensor:
        return 0.5 * (w - 1) ** 2

    @property
    def start(self) -> Tensor:
        return torch.zeros_like(self.alpha)

    @property
    def exact(self) -> Tensor:
        curvature = 1 + self.alpha.exp()
        w = 2 / curvature
        return -(w - 1) * self.alpha.exp() * w / curvature


def like(kind: type[Ridge], ridge: Ridge) -> Any:
    return kind(ridge.X, ridge.y, ridge.V, ridge.z, ridge.alpha)


def with_dead_feature(ridge: Ridge) -> Ridge:
    """The first feature is zero in the training data, and its weight stays where it starts."""
    X = ridge.X.clone()
    X[:, 0] = 0
    return Ridge(X, ridge.y, ridge.V, ridge.z, ridge.alpha)


def without_first_feature(ridge: Ridge) -> Ridge:
    return Ridge(ridge.X[:, 1:], ridge.y, ridge.V[:, 1:], ridge.z, ridge.alpha[1:])


class Negated(Ridge):
    """A gain to be maximised instead of a loss to be minimised."""

    def inner(self, w: Tensor, alpha: Tensor, _batch: Any = None) -> Tensor:
        return -super().inner(w, alpha)


class RootedOuter(Ridge):
    """The outer objective takes a root of w^2, whose derivative torch has as NaN at 0."""

    def outer(self, w: Tensor, alpha: Tensor, _batch: Any = None) -> Tensor:
        return super().outer(w, alpha) + 0.1 * (w**2).sqrt().sum()


class Captured(Ridge):
    """A second penalty, exp(penalty) |w|^2 / 2, reaches the inner objective by closure."""

    @cached_property
    def penalty(self) -> Tensor:
        return torch.full_like(self.alpha[0], -1.0).requires_grad_()

    def inner(self, w: Tensor, alpha: Tensor, _batch: Any = None) -> Tensor:
        return super().inner(w, alpha) + 0.5 * self.penalty.exp() * (w**2).sum()

    @property
    def exact_in_penalty(self) -> Tensor:
        weight = self.penalty.detach().exp()
        hessian = self.hessian + weight * torch.eye(len(self.start), dtype=weight.dtype)
        w = torch.linalg.solve(hessian, self.X.T @ self.y / len(self.y))
        return -weight * w @ torch.linalg.solve(hessian, self.outer_slope(w))


class Mixed(nn.Module):
    """Ridge regression with complex weights and a real offset; forward is the inner objective."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.complex128)

        self.X, self.y, self.V, self.z = normal(6, 2), normal(6), normal(6, 2), normal(6)
        self.start = normal(2) * 0, torch.zeros((), dtype=torch.float64)
        self.alpha = torch.tensor(-0.3, dtype=torch.float64)
        self.w, self.offset = nn.Parameter(self.start[0]), nn.Parameter(self.start[1])
        self.step_size = self.as_real.step_size

    def inner(self, params: tuple[Tensor, Tensor], alpha: Tensor, _batch: Any = None) -> Tensor:
        w, offset = params
        loss = (self.X @ w + offset - self.y).abs().square().sum() / 24
        return loss + 0.5 * alpha.exp() * (w.abs().square().sum() + offset**2)

    def outer(self, params: tuple[Tensor, Tensor], _alpha: Tensor, _batch: Any = None) -> Tensor:
        w, offset = params
        return (self.V @ w + offset - self.z).abs().square().sum() / 24

    @property
    def as_real(self) -> Ridge:
        """The same problem in real and imaginary parts."""

        def rows(X: Tensor) -> Tensor:
            one = torch.ones(len(X), 1, dtype=torch.float64)
            above, below = (X.real, -X.imag, one), (X.imag, X.real, 0 * one)
            return torch.cat([torch.cat(above, 1), torch.cat(below, 1)])

        y, z = (torch.cat([x.real, x.imag]) for x in (self.y, self.z))
        return Ridge(rows(self.X), y, rows(self.V), z, self.alpha)


class Normalised(nn.Module):
    """A linear model behind a BatchNorm, whose buffers follow what it is applied to."""

    def __init__(self, ridge: Ridge) -> None:
        super().__init__()
        self.ridge = ridge
        d = len(ridge.start)
        self.norm = nn.BatchNorm1d(d, affine=False, dtype=torch.float64)
        self.w = nn.Parameter(ridge.start)

    def forward(self, X: Tensor) -> Tensor:
        return self.norm(X) @ self.w
