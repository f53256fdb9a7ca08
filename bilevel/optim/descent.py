"""Gradient descent, on its own or with momentum."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple, final

from torch import Tensor

from bilevel import tree
from bilevel.errors import ArgumentError
from bilevel.optim.rules import InnerOptimizer, Ranges, decay_term, decayed
from bilevel.settings import Setting, for_each, setting_at
from bilevel.tree import Tree


class Moving(NamedTuple):
    """State of `SGD` with momentum."""

    params: Tree
    velocity: Tree


@final
@dataclass(frozen=True)
class SGD(InnerOptimizer):
    r"""The rule of `torch.optim.SGD`: gradient descent, on its own or with momentum.

    .. math::
        g^{(t)} = \nabla_\theta f + \lambda\, \theta^{(t-1)}, \qquad
        v^{(t)} = \mu v^{(t-1)} + (1 - \tau)\, g^{(t)}, \qquad
        \theta^{(t)} = \theta^{(t-1)} - \eta v^{(t)}

    with :math:`v^{(1)} = g^{(1)}`; with `nesterov`, :math:`g^{(t)} + \mu v^{(t)}` in the place of
    :math:`v^{(t)}` (Polyak 1964; Nesterov 1983). Batches come from the problem: nothing here draws.

    Attributes:
        lr: eta > 0.
        momentum: mu in [0, 1).
        dampening: tau in [0, 1].
        weight_decay: lambda >= 0, as a term of the inner objective; `Implicit` counts it in.
        nesterov: whether to step along the velocity to come; needs momentum and no dampening.

    Raises:
        ArgumentError: if a setting is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2 + w**2,  # w(a) = a / 3
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> rule = bl.optim.SGD(0.1, momentum=0.9)
        >>> solver = bl.BilevelSolver(problem, rule, inner_steps=200)
        >>> zero = torch.tensor(0.0)
        >>> hyper = solver.hypergradient(zero, zero)
        >>> round(hyper.gradient.item(), 4)
        -0.6667
    """

    ranges: ClassVar[Ranges] = {
        "lr": {"above": 0},
        "momentum": {"least": 0, "below": 1},
        "dampening": {"least": 0, "most": 1},
        "weight_decay": {"least": 0},
    }
    lr: Setting = 1e-3
    momentum: Setting = 0.0
    dampening: Setting = 0.0
    weight_decay: Setting = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not (self._moves and _is_zero(self.dampening)):
            raise ArgumentError(
                "nesterov=True needs a momentum > 0 and dampening=0, got "
                f"momentum={self.momentum} and dampening={self.dampening}."
            )

    @cached_property
    def _moves(self) -> bool:
        """Whether there is a velocity."""
        return not _is_zero(self.momentum)

    def begin(self, params: Tree) -> Tree:  # noqa: D102
        return Moving(params, tree.zeros_like(params)) if self._moves else params

    def params(self, state: Tree) -> Tree:  # noqa: D102
        return state.params if self._moves else state

    def update(self, state: Tree, gradient: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        params = self.params(state)
        gradient = decayed(params, gradient, setting_at(self.weight_decay, control, t))
        lr = setting_at(self.lr, control, t)
        if not self._moves:
            return tree.moved(params, gradient, lr)
        momentum = for_each(setting_at(self.momentum, control, t), params, "momentum")
        velocity = tree.map_leaves(
            lambda v, g, m: None if v is None else m * v + g,
            state.velocity,
            self._damped(gradient, control, t),
            momentum,
        )
        along = velocity
        if self.nesterov:
            along = tree.map_leaves(
                lambda v, g, m: None if v is None else g + m * v, velocity, gradient, momentum
            )
        return Moving(tree.moved(params, along, lr), velocity)

    def _damped(self, gradient: Tree, control: Tree, t: int) -> Tree:
        # The first velocity is the gradient, without dampening, as in torch.
        if t == 1 or _is_zero(self.dampening):
            return gradient
        dampening = for_each(setting_at(self.dampening, control, t), gradient, "dampening")
        return tree.map_leaves(lambda g, d: None if g is None else (1 - d) * g, gradient, dampening)

    def residual(self, params: Tree, gradient: Tree, control: Tree, t: int) -> Tree:
        """The gradient of the inner objective with its decay."""
        return decayed(params, gradient, setting_at(self.weight_decay, control, t))

    def term(self, params: Tree, control: Tree, t: int) -> Tensor | float:
        """The decay, half of it times the squares of the params."""
        return decay_term(params, setting_at(self.weight_decay, control, t))


def _is_zero(setting: Setting) -> bool:
    return isinstance(setting, float | int) and setting == 0
