"""Adam and AdamW."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.errors import UnsupportedError
from bilevel.optim.rules import InnerOptimizer, Ranges, decay_term, decayed
from bilevel.settings import Setting, setting_at
from bilevel.tree import Tree


class Moments(NamedTuple):
    """State of `Adam`; moments of complex leaves are those of their real and imaginary parts."""

    params: Tree
    first: Tree
    second: Tree


class _ByMoments(InnerOptimizer):
    """What Adam and AdamW share: everything but where the decay acts.

    Their derivative is finite where a gradient is zero (a dead feature), where that of the square
    root is not.
    """

    ranges: ClassVar[Ranges] = {
        "lr": {"above": 0},
        "betas": {"least": 0, "below": 1},
        "eps": {"above": 0},
        "weight_decay": {"least": 0},
    }
    coupled: ClassVar[bool]  # whether the decay is part of the gradient, or of the direction
    betas: tuple[Setting, Setting]
    eps: Setting
    weight_decay: Setting

    def begin(self, params: Tree) -> Tree:
        zeros = tree.map_leaves(lambda p: None if p is None else _real(p), tree.zeros_like(params))
        return Moments(params, zeros, zeros)

    def params(self, state: Tree) -> Tree:
        return state.params

    def update(self, state: Tree, gradient: Tree, control: Tree, t: int) -> Tree:
        b1, b2 = (setting_at(beta, control, t) for beta in self.betas)
        eps, lr = setting_at(self.eps, control, t), setting_at(self.lr, control, t)
        decay = setting_at(self.weight_decay, control, t)
        if self.coupled:
            gradient = decayed(state.params, gradient, decay)
        real = tree.map_leaves(lambda g: None if g is None else _real(g), gradient)
        first = tree.map_leaves(
            lambda m, g: None if g is None else b1 * m + (1 - b1) * g, state.first, real
        )
        second = tree.map_leaves(
            lambda v, g: None if g is None else b2 * v + (1 - b2) * g * g, state.second, real
        )

        def along(p: Any, m: Tensor | None, v: Tensor | None) -> Tensor | None:
            if m is None or v is None:
                return None
            # At v = 0 the root has no derivative, but m / (root + eps) has: that of m / eps.
            positive = v > 0
            root = torch.where(positive, torch.where(positive, v, 1).sqrt(), 0)
            d = m / (root / _root(1 - b2**t) + eps) / (1 - b1**t)
            return torch.view_as_complex(d) if p.is_complex() else d

        direction = tree.map_leaves(along, state.params, first, second)
        if not self.coupled:
            direction = decayed(state.params, direction, decay)
        return Moments(tree.moved(state.params, direction, lr), first, second)


@final
@dataclass(frozen=True)
class Adam(_ByMoments):
    """The rule of `torch.optim.Adam` (Kingma & Ba 2015, arXiv 1412.6980).

    Attributes:
        lr: > 0.
        betas: decay of the two moments, in [0, 1).
        eps: > 0, added to the root of the second moment.
        weight_decay: >= 0, as a term of the inner objective; `Implicit` counts it in.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2 + w**2,  # w(a) = a / 3
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> rule = bl.optim.Adam(0.05)
        >>> solver = bl.BilevelSolver(problem, rule, 400, bl.Implicit(), certificate=None)
        >>> zero = torch.tensor(0.0)
        >>> round(solver.hypergradient(zero, zero).gradient.item(), 2)
        -0.67
    """

    coupled: ClassVar[bool] = True
    lr: Setting = 1e-3
    betas: tuple[Setting, Setting] = (0.9, 0.999)
    eps: Setting = 1e-8
    weight_decay: Setting = 0.0

    def residual(self, params: Tree, gradient: Tree, control: Tree, t: int) -> Tree:
        """The gradient of the inner objective with its decay."""
        return decayed(params, gradient, setting_at(self.weight_decay, control, t))

    def term(self, params: Tree, control: Tree, t: int) -> Tensor | float:
        """The decay, half of it times the squares of the params."""
        return decay_term(params, setting_at(self.weight_decay, control, t))


@final
@dataclass(frozen=True)
class AdamW(_ByMoments):
    """The rule of `torch.optim.AdamW` (Loshchilov & Hutter 2019, arXiv 1711.05101).

    Attributes:
        lr: > 0.
        betas: decay of the two moments, in [0, 1).
        eps: > 0, added to the root of the second moment.
        weight_decay: decoupled decay >= 0. `Implicit` needs it to be 0: there, use `Adam`, whose
            decay is a term of the inner objective.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2 + w**2,  # w(a) = a / 3
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> # Any number may be a function of the control.
        >>> rule = bl.optim.AdamW(lambda a: 0.1, weight_decay=0.0)
        >>> solver = bl.BilevelSolver(problem, rule, 20, certificate=bl.AgainstSteps())
        >>> found = solver.hypergradient(torch.tensor(0.5), torch.tensor(0.0))
        >>> found.certificate.trustworthy
        True
    """

    coupled: ClassVar[bool] = False
    lr: Setting = 1e-3
    betas: tuple[Setting, Setting] = (0.9, 0.999)
    eps: Setting = 1e-8
    weight_decay: Setting = 1e-2

    def residual(self, params: Tree, gradient: Tree, control: Tree, t: int) -> Tree:  # noqa: ARG002
        """The gradient; refuses a decoupled decay, which has no objective."""
        if not (isinstance(self.weight_decay, float | int) and self.weight_decay == 0):
            raise UnsupportedError(
                "the limit of AdamW with decoupled weight_decay is no minimiser of the inner "
                "objective, so that it has no residual: use Adam, whose weight_decay is part of "
                "the objective, or take Unrolled() or MLM() with certificate=None or "
                "AgainstSteps()."
            )
        return gradient


def _root(x: Any) -> Any:
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def _real(leaf: Tensor) -> Tensor:
    return torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
