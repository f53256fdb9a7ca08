"""What a rule of the inner iteration is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from torch import Tensor
from torch.nn import Module

from bilevel import tree
from bilevel.errors import ArgumentError
from bilevel.settings import ByStep, Setting, check_setting, for_each, setting_at
from bilevel.tree import Tree

Ranges = dict[str, dict[str, float]]  # of each setting, as `check_range` takes it


class InnerOptimizer(ABC):
    """One rule for the inner steps. A subclass is a frozen dataclass with a learning rate `lr`.

    Its *state* is what one step hands to the next: the params, or a tree that holds them. Every
    setting may be a number, a function of the control, which then is learned, or a `ByStep`.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2 + w**2,  # w(a) = a / 3
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Descent(bl.optim.InnerOptimizer):
        ...     lr: float = 0.2
        ...
        ...     def update(self, state, gradient, control, t):
        ...         return state - self.lr * gradient
        >>> solver = bl.BilevelSolver(problem, Descent(), inner_steps=60)
        >>> zero = torch.tensor(0.0)
        >>> hyper = solver.hypergradient(zero, zero)
        >>> round(hyper.gradient.item(), 4)
        -0.6667
    """

    lr: Setting
    symmetric: ClassVar[bool] = True  # whether the derivative of `residual` in the params is
    ranges: ClassVar[Ranges] = {"lr": {"above": 0}}
    reversible: ClassVar[bool] = True  # whether steps can be differentiated, and made one by one
    of_roots: ClassVar[bool] = (
        False  # whether `update` may get a residual in the place of a gradient
    )

    def __new__(cls, *arguments: Any, **settings: Any) -> Self:  # noqa: ARG004
        """Refuse params, which optimisers of torch take first."""
        first = arguments[0] if arguments else None
        first_is_lr = getattr(cls, "__match_args__", ())[:1] == ("lr",)
        if first_is_lr and isinstance(first, Iterator | Module | list | tuple | Mapping):
            raise ArgumentError(
                f"{cls.__name__} takes no params, and came with {type(first).__name__}: those that "
                f"hypergradient or solve gets are trained. Write {cls.__name__}(0.1)."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, value in self._settings():
            check_setting(value, name, **self.ranges[name])

    def _settings(self) -> Iterator[tuple[str, Setting]]:
        for name in self.ranges:
            value = getattr(self, name)
            for part in value if isinstance(value, tuple) else (value,):
                yield name, part

    def begin(self, params: Tree) -> Tree:
        """The state before the first step; by default the params."""
        return params

    def params(self, state: Tree) -> Tree:
        """The params in a state; by default all of it."""
        return state

    def point(self, state: Tree) -> Tree:
        """Where a step takes the gradient; by default at the params."""
        return self.params(state)

    @property
    def separable(self) -> bool:
        """Whether a step moves what lies along the first axis of leaves each on its own."""
        return True

    @property
    def searches(self) -> bool:
        """Whether `searched` is to be asked before each step."""
        return False

    def searched(
        self,
        state: Tree,
        gradient: Tree,  # noqa: ARG002
        control: Tree,  # noqa: ARG002
        t: int,  # noqa: ARG002
        value: Callable[[Tree], Tensor],  # noqa: ARG002
    ) -> Tree:
        """The state with the step size that a line search finds; by default as it is.

        Args:
            state: before the step.
            gradient: as `update` gets it.
            control: the outer variable.
            t: the step.
            value: of the inner objective.

        Returns:
            The state that `update` goes on from.
        """
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

    def step(
        self,
        state: Tree,
        gradient: Callable[[Tree], Tree],
        control: Tree,
        batch: Any,  # noqa: ARG002
        t: int,
    ) -> Tree:
        """The state after inner step t; by default `update` by the gradient at the params.

        Args:
            state: before.
            gradient: of the inner objective, as a function of the params; or the residual.
            control: the outer variable.
            batch: of the step.
            t: the step.

        Returns:
            The state after.
        """
        return self.update(state, gradient(self.params(state)), control, t)

    def check(self, params: Tree, control: Tree, t: int) -> None:  # noqa: ARG002
        """Refuse settings that are out of range where an iteration starts.

        Args:
            params: where.
            control: what learned settings are read from, detached.
            t: the step, as in `update`.

        Raises:
            ArgumentError: naming the setting.
        """
        for name, value in self._settings():
            if callable(value) or isinstance(value, ByStep):  # constants were checked when made
                check_setting(setting_at(value, control, t), name, **self.ranges[name])

    def residual(self, params: Tree, gradient: Tree, control: Tree, t: int) -> Tree:  # noqa: ARG002
        """What vanishes at the inner solution; by default the gradient of the inner objective."""
        return gradient

    def on_kink(self, params: Tree, gradient: Tree, control: Tree, t: int) -> bool:  # noqa: ARG002
        """Whether `update` has no derivative at the params; smooth rules have one everywhere."""
        return False

    def term(self, params: Tree, control: Tree, t: int) -> Tensor | float:  # noqa: ARG002
        """What the rule itself adds to the inner objective, a decay say; by default nothing."""
        return 0.0

    def placed(self, state: Tree, params: Tree) -> Tree:
        """A state with other params; by default one that is made of them, or named in it so."""
        return params if self.params(state) is state else state._replace(params=params)

    @property
    def residual_is_gradient(self) -> bool:
        """Whether the control enters `residual` through the inner objective alone."""
        decay = getattr(self, "weight_decay", 0.0)
        return self.symmetric and not (callable(decay) or isinstance(decay, ByStep))

    def scaled(self, factor: float) -> Self:
        """The same rule with its learning rate multiplied by `factor`."""
        lr = self.lr
        if isinstance(lr, ByStep):
            scaled: Setting = ByStep(lambda t: _times(lr.value(t), factor))
        else:
            scaled = _times(lr, factor)
        return replace(self, lr=scaled)  # pyright: ignore[reportArgumentType]


def _times(lr: Any, factor: float) -> Any:
    if callable(lr):
        return lambda control: tree.map_leaves(lambda x: x * factor, lr(control))
    return lr * factor


def decayed(params: Tree, gradient: Tree, decay: Any) -> Tree:
    """`gradient + decay * params`: the gradient with a decay of the params in the objective."""
    if isinstance(decay, float | int) and not decay:
        return gradient
    each = for_each(decay, params, "weight_decay")
    return tree.map_leaves(
        lambda p, g, d: g if g is None or d is None else g + d * p, params, gradient, each
    )


def decay_term(params: Tree, decay: Any) -> Tensor | float:
    """Half the decay times the squares of the params: what `decayed` is the gradient of."""
    if isinstance(decay, float | int) and not decay:
        return 0.0
    each = for_each(decay, params, "weight_decay")
    pairs = zip(tree.leaves_of(params), tree.leaves_of(each), strict=True)
    return sum((d * (p * p.conj()).real).sum() for p, d in pairs if d is not None) / 2
