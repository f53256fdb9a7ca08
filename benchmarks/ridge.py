"""Ridge regression whose penalty is the control: every hypergradient known without autograd."""

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

CG_RTOL = 1e-8  # relative residual that every conjugate gradient solver is asked for


class Problem(Protocol):
    """What is needed to ask any library for a hypergradient."""

    @property
    def alpha(self) -> Tensor: ...
    @property
    def start(self) -> Tensor: ...
    @property
    def step_size(self) -> float: ...
    @property
    def outer_slope_size(self) -> float: ...
    @property
    @functools.cached_property
    def cg_iterations(self) -> int: ...
    def inner(self, w: Tensor, alpha: Tensor) -> Tensor: ...
    def outer(self, w: Tensor, alpha: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Ridge:
    """Inner f = |X w - y|^2 / 2n + sum exp(alpha) w^2 / 2, outer |V w - z|^2 / 2m.

    `alpha` is a scalar, or one number a weight.
    """

    X: Tensor
    y: Tensor
    V: Tensor
    z: Tensor
    alpha: Tensor

    @classmethod
    def random(cls, d: int, *, scalar: bool = False, seed: int = 0) -> "Ridge":
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        n = 2 * d
        truth = normal(d) / d**0.5
        X, V = normal(n, d), normal(n, d)
        y, z = X @ truth + 0.3 * normal(n), V @ truth + 0.3 * normal(n)
        alpha = 0.5 * normal(d) - 1
        return cls(X, y, V, z, alpha.mean() if scalar else alpha)

    def inner(self, w: Tensor, alpha: Tensor, _batch: Any = None) -> Tensor:
        residual = self.X @ w - self.y
        return 0.5 * (residual @ residual) / len(self.y) + 0.5 * (alpha.exp() * w**2).sum()

    def outer(self, w: Tensor, _alpha: Tensor, _batch: Any = None) -> Tensor:
        residual = self.V @ w - self.z
        return 0.5 * (residual @ residual) / len(self.z)

    @property
    def start(self) -> Tensor:
        return self.X.new_zeros(self.X.shape[1])

    @functools.cached_property
    def hessian(self) -> Tensor:
        penalty = self.alpha.exp() * torch.ones_like(self.start)
        return self.X.T @ self.X / len(self.y) + torch.diag(penalty)

    @functools.cached_property
    def step_size(self) -> float:
        """The best constant one, 2 / (L + mu)."""
        eigenvalues = torch.linalg.eigvalsh(self.hessian)
        return float(2 / (eigenvalues[0] + eigenvalues[-1]))

    @property
    def minimiser(self) -> Tensor:
        return torch.linalg.solve(self.hessian, self.X.T @ self.y / len(self.y))

    def outer_slope(self, w: Tensor) -> Tensor:
        return self.V.T @ (self.V @ w - self.z) / len(self.z)

    @functools.cached_property
    def outer_slope_size(self) -> float:
        return float(self.outer_slope(self.minimiser).norm())

    def _to_control(self, by_weight: Tensor) -> Tensor:
        return by_weight if self.alpha.ndim else by_weight.sum()

    @property
    def exact(self) -> Tensor:
        """Hypergradient at the exact inner minimiser, by the implicit function theorem."""
        w = self.minimiser
        q = torch.linalg.solve(self.hessian, self.outer_slope(w))
        return self._to_control(-q * self.alpha.exp() * w)

    def after(self, steps: int) -> Tensor:
        """Hypergradient of the value after some steps, by a loop over dw / dalpha."""
        w, slope = self.start, torch.zeros_like(self.hessian)
        rhs, penalty = self.X.T @ self.y / len(self.y), self.alpha.exp()
        for _ in range(steps):
            slope = slope - self.step_size * (self.hessian @ slope + torch.diag(penalty * w))
            w = w - self.step_size * (self.hessian @ w - rhs)
        return self._to_control(slope.T @ self.outer_slope(w))

    @functools.cached_property
    def cg_iterations(self) -> int:
        """What conjugate gradients need here for a relative residual of `CG_RTOL`."""
        b = self.outer_slope(self.minimiser)
        residual, direction, size = b, b, b @ b
        for k in range(1, 10 * len(b)):
            product = self.hessian @ direction
            residual = residual - size / (direction @ product) * product
            size, before = residual @ residual, size
            if size <= CG_RTOL**2 * (b @ b):
                return k
            direction = residual + size / before * direction
        raise RuntimeError("conjugate gradients did not converge on the benchmark problem")


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())
