r"""Inner optimisers as dynamics: :math:`\theta^{(t)} = \Phi(\theta^{(t-1)}, \alpha)`.

An optimiser says how a gradient moves its state; `InnerIteration` puts it together with the inner
objective into a `Dynamics` whose control is the outer variable, shared by all steps.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self, final

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.dynamics.dynamics import Dynamics
from bilevel.errors import ArgumentError, DivergenceError, UnsupportedError
from bilevel.inner.problem import BilevelProblem, ByStep, at_step
from bilevel.prox.operators import Prox
from bilevel.tree import Tree

# A number, a function of the control (so that it can be learned), or a `ByStep` of either. A
# function returns a scalar tensor, or a tree like the params.
Setting = float | Callable[[Tree], Any] | ByStep


class InnerOptimizer(ABC):
    """One rule for the inner steps. A subclass is a frozen dataclass with a `step_size`.

    Its *state* is what one step hands to the next: the params, or a tree that holds them.
    """

    step_size: Setting
    symmetric: ClassVar[bool] = True  # whether the derivative of `residual` in the params is

    def begin(self, params: Tree) -> Tree:
        """The state before the first step; by default the params."""
        return params

    def params(self, state: Tree) -> Tree:
        """The params in a state; by default all of it."""
        return state

    @abstractmethod
    def update(self, state: Tree, gradient: Tree, control: Tree, t: int) -> Tree:
        """The state after inner step t = 1, 2, ..., differentiable in all arguments.

        Args:
            state: before.
            gradient: of the inner objective in the params; None for leaves that do not move.
            control: the outer variable.
            t: the step, counted from the first of a warm start's history.

        Returns:
            The state after.
        """

    def check(self, params: Tree, control: Tree, t: int) -> None:  # noqa: ARG002
        """Refuse settings that are out of range where an iteration starts.

        Args:
            params: where.
            control: what learned settings are read from, detached.
            t: the step, as in `update`.

        Raises:
            ArgumentError: naming the setting.
        """
        check_setting(setting_at(self.step_size, control, t), "step_size")

    def residual(self, params: Tree, gradient: Tree, control: Tree, t: int) -> Tree:  # noqa: ARG002
        """What vanishes at the inner solution; by default the gradient of the inner objective."""
        return gradient

    def scaled(self, factor: float) -> Self:
        """The same rule with its step size multiplied by `factor`."""
        size = self.step_size
        if isinstance(size, ByStep):
            scaled: Setting = ByStep(lambda t: _times(size.value(t), factor))
        else:
            scaled = _times(size, factor)
        return replace(self, step_size=scaled)  # pyright: ignore[reportArgumentType]


def _times(size: Any, factor: float) -> Any:
    if callable(size):
        return lambda control: tree.map_leaves(lambda x: x * factor, size(control))
    return size * factor


def setting_at(setting: Setting, control: Tree, t: int) -> Any:
    """A number, a scalar tensor, or a tree like the params."""
    value = at_step(setting, t)
    return value(control) if callable(value) else value


def check_setting(value: Any, name: str, *, below: float = math.inf, zero: bool = False) -> None:
    """Refuse numbers outside (0, below), or [0, below); functions are checked when they are used.

    Args:
        value: a setting, or what one came to.
        name: what the user calls it.
        below: bound.
        zero: whether 0 is allowed.

    Raises:
        ArgumentError: naming the setting.
    """
    if isinstance(value, ByStep) or callable(value):
        return
    autodiff.refuse_setting(value, name)
    for x in tree.leaves_of(value):
        if x is None:  # in the place of an integer leaf
            continue
        smallest, largest = (float(x.min()), float(x.max())) if isinstance(x, Tensor) else (x, x)
        if not ((smallest > 0 or (zero and smallest == 0)) and largest < below):
            bounds = f"{'>=' if zero else '>'} 0" + (f" and < {below:g}" if below < 1e300 else "")
            came = f"{smallest:g}" if smallest == largest else f"{smallest:g} to {largest:g}"
            raise ArgumentError(f"{name} must be {bounds}, got {came}.")


def descend(params: Tree, direction: Tree, size: Any) -> Tree:
    """`params - size * direction`; None in the direction leaves a leaf as it is."""
    if isinstance(size, float | int):
        if isinstance(params, Tensor):
            return torch.sub(params, direction, alpha=size)
        return tree.map_leaves(
            lambda p, d: p if d is None else torch.sub(p, d, alpha=size), params, direction
        )
    if isinstance(size, Tensor):
        return tree.map_leaves(lambda p, d: p if d is None else p - size * d, params, direction)
    return tree.map_leaves(lambda p, d, s: p if d is None else p - s * d, params, direction, size)


@final
@dataclass(frozen=True)
class GradientDescent(InnerOptimizer):
    r"""Gradient descent, :math:`\theta^{(t)} = \theta^{(t-1)} - \eta \nabla_\theta f`.

    Attributes:
        step_size: eta > 0; a number, a function of the control, or a `ByStep` of either.

    Raises:
        ArgumentError: if it is out of range.
    """

    step_size: Setting

    def __post_init__(self) -> None:
        """Check the field."""
        check_setting(self.step_size, "step_size")

    def update(self, state: Tree, gradient: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        return descend(state, gradient, setting_at(self.step_size, control, t))


class Moving(NamedTuple):
    """State of `HeavyBall`."""

    params: Tree
    velocity: Tree


@final
@dataclass(frozen=True)
class HeavyBall(InnerOptimizer):
    r"""Descent with momentum.

    .. math::
        v^{(t)} = \mu v^{(t-1)} + \nabla_\theta f, \qquad
        \theta^{(t)} = \theta^{(t-1)} - \eta v^{(t)}

    The rule of `torch.optim.SGD` with momentum (Polyak 1964).

    Attributes:
        step_size: eta > 0, as in `GradientDescent`.
        momentum: mu in [0, 1), likewise.

    Raises:
        ArgumentError: if a setting is out of range.
    """

    step_size: Setting
    momentum: Setting = 0.9

    def __post_init__(self) -> None:
        """Check the fields."""
        check_setting(self.step_size, "step_size")
        check_setting(self.momentum, "momentum", below=1, zero=True)

    def begin(self, params: Tree) -> Tree:  # noqa: D102
        return Moving(params, tree.zeros_like(params))

    def params(self, state: Tree) -> Tree:  # noqa: D102
        return state.params

    def update(self, state: Tree, gradient: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        momentum = setting_at(self.momentum, control, t)
        if isinstance(momentum, float | int | Tensor):
            velocity = tree.map_leaves(
                lambda v, g: None if v is None else momentum * v + g, state.velocity, gradient
            )
        else:
            velocity = tree.map_leaves(
                lambda v, g, m: None if v is None else m * v + g, state.velocity, gradient, momentum
            )
        size = setting_at(self.step_size, control, t)
        return Moving(descend(state.params, velocity, size), velocity)

    def check(self, params: Tree, control: Tree, t: int) -> None:  # noqa: D102
        super().check(params, control, t)
        momentum = setting_at(self.momentum, control, t)
        check_setting(momentum, "momentum", below=1, zero=True)


class Moments(NamedTuple):
    """State of `Adam`; moments of complex leaves are those of their real and imaginary parts."""

    params: Tree
    first: Tree
    second: Tree


@final
@dataclass(frozen=True)
class Adam(InnerOptimizer):
    """The rule of `torch.optim.Adam`, with `weight_decay` that of `torch.optim.AdamW`.

    Kingma & Ba 2015, arXiv 1412.6980; Loshchilov & Hutter 2019, arXiv 1711.05101. Its derivative
    is finite where a gradient is zero (a dead feature), where that of the square root is not.

    Attributes:
        step_size: > 0, as in `GradientDescent`.
        betas: decay of the two moments, in [0, 1).
        eps: > 0, added to the root of the second moment.
        weight_decay: decoupled decay >= 0. `Implicit` needs it to be 0: there, add the decay to
            the inner objective.

    Raises:
        ArgumentError: if a setting is out of range.
    """

    step_size: Setting = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields."""
        check_setting(self.step_size, "step_size")
        for beta in self.betas:
            check_setting(beta, "each of betas", below=1, zero=True)
        check_setting(self.eps, "eps")
        check_setting(self.weight_decay, "weight_decay", zero=True)

    def begin(self, params: Tree) -> Tree:  # noqa: D102
        zeros = tree.map_leaves(lambda p: None if p is None else _real(p), tree.zeros_like(params))
        return Moments(params, zeros, zeros)

    def params(self, state: Tree) -> Tree:  # noqa: D102
        return state.params

    def update(self, state: Tree, gradient: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        b1, b2 = self.betas
        size = setting_at(self.step_size, control, t)
        real = tree.map_leaves(lambda g: None if g is None else _real(g), gradient)
        first = tree.map_leaves(
            lambda m, g: None if g is None else b1 * m + (1 - b1) * g, state.first, real
        )
        second = tree.map_leaves(
            lambda v, g: None if g is None else b2 * v + (1 - b2) * g * g, state.second, real
        )

        def direction(p: Any, m: Tensor | None, v: Tensor | None) -> Tensor | None:
            if m is None or v is None:
                return None
            # At v = 0 the root has no derivative, but m / (root + eps) has: that of m / eps.
            positive = v > 0
            root = torch.where(positive, torch.where(positive, v, 1).sqrt(), 0)
            d = m / (root / math.sqrt(1 - b2**t) + self.eps) / (1 - b1**t)
            d = torch.view_as_complex(d) if p.is_complex() else d
            return d + self.weight_decay * p if self.weight_decay else d

        moved = tree.map_leaves(direction, state.params, first, second)
        return Moments(descend(state.params, moved, size), first, second)

    def residual(self, params: Tree, gradient: Tree, control: Tree, t: int) -> Tree:
        """See `InnerOptimizer`; refuses a decoupled decay, which has no objective."""
        if self.weight_decay:
            raise UnsupportedError(
                "the limit of Adam with decoupled weight_decay is no minimiser of the inner "
                "objective, so that it has no residual: add the decay to the inner objective and "
                "use weight_decay=0, or take Unrolled() or MLM() with certificate=None or "
                "target=Iterate()."
            )
        return super().residual(params, gradient, control, t)


def _real(leaf: Tensor) -> Tensor:
    return torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf


@final
@dataclass(frozen=True)
class ProximalGradient(InnerOptimizer):
    r"""Forward-backward steps.

    .. math:: \theta^{(t)} = \mathrm{prox}_{\eta p}(\theta^{(t-1)} - \eta \nabla_\theta f)

    The minimised function is f + p: the inner objective f is smooth, the penalty p may not be.
    `Implicit` then solves with the derivative of the fixed point equation, which is not symmetric:
    it needs GMRES or NormalCG.

    Attributes:
        step_size: eta > 0, as in `GradientDescent`.
        prox: of p: `L1`, `L2`, `Box`, whose weights may be functions of the control.

    Raises:
        ArgumentError: if a setting is not what it should be.
    """

    symmetric: ClassVar[bool] = False
    step_size: Setting
    prox: Prox

    def __post_init__(self) -> None:
        """Check the fields."""
        check_setting(self.step_size, "step_size")
        if not isinstance(self.prox, Prox):
            raise ArgumentError(
                f"prox must be L1(...), L2(...) or Box(...), got {type(self.prox).__name__}."
            )

    def update(self, state: Tree, gradient: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        size = setting_at(self.step_size, control, t)
        return self.prox(descend(state, gradient, size), size, control)

    def check(self, params: Tree, control: Tree, t: int) -> None:  # noqa: D102
        super().check(params, control, t)
        self.prox.check(params, control)

    def residual(self, params: Tree, gradient: Tree, control: Tree, t: int) -> Tree:
        """The params minus what one step makes of them."""
        return tree.subtract(params, self.update(params, gradient, control, t))


@dataclass(frozen=True, eq=False)
class InnerIteration(Dynamics):
    """The inner steps of a bilevel problem as a dynamics; its control is the outer variable.

    Attributes:
        problem: the objectives.
        optimizer: the rule.
        batch: constant, or a `ByStep`.
        offset: inner steps made before, where the iteration goes on from a state.
        goes_on: whether the observation is a state of the optimiser instead of params to start at.
    """

    problem: BilevelProblem
    optimizer: InnerOptimizer
    batch: Any = None
    offset: int = 0
    goes_on: bool = False

    def init(self, observation: Tree, control: Tree) -> Tree:  # noqa: D102
        state = self._first(observation, control)
        params, settings = self.optimizer.params(state), tree.detach(control)
        self.optimizer.check(params, settings, self.offset + 1)
        return state

    def _first(self, observation: Tree, control: Tree) -> Tree:
        if self.goes_on:
            return observation
        if self.problem.start is None:
            return self.optimizer.begin(observation)
        start = self.problem.start(observation, control)
        tree.check_like(start, observation, "params", "start must return params like those given")
        return self.optimizer.begin(start)

    def step(self, state: Tree, control: Tree, t: int) -> Tree:  # noqa: D102
        try:
            gradient = self.gradient(self.optimizer.params(state), control, t, check=t == 1)
        except DivergenceError as error:
            raise DivergenceError(f"inner step {t}: {error}") from error
        return self.optimizer.update(state, gradient, control, self.offset + t)

    def readout(self, state: Tree) -> Tree:  # noqa: D102
        return self.optimizer.params(state)

    def gradient(self, params: Tree, control: Tree, t: int, *, check: bool = False) -> Tree:
        """Gradient of the inner objective in the params, with the batch of step `t`.

        Args:
            params: where.
            control: the outer variable.
            t: the step.
            check: look whether the objective closes over a tensor that requires grad.

        Returns:
            A vector of the space of the params, attached to the graph of the arguments.
        """
        inner, batch = self.problem.inner, at_step(self.batch, self.offset + t)
        return autodiff.gradient(
            lambda p, c: inner(p, c, batch), params, control, name="inner objective", check=check
        )

    def residual(self, params: Tree, control: Tree, t: int) -> Tree:
        """What vanishes at the inner solution, with the batch of step `t`."""
        found = self.gradient(params, control, t)
        return self.optimizer.residual(params, found, control, self.offset + t)
