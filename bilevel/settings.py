"""Numbers that a rule or a penalty is told: constant, learned, or changing with the step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bilevel import tree
from bilevel.checks import check_range, refuse_setting
from bilevel.errors import ArgumentError, StructureError
from bilevel.tree import Tree


class Stepwise:
    """What is another at each inner step t = 1, 2, ..., and the same whenever t is asked for."""

    # No abstract base class: each step asks for this type several times, and those answer slowly.

    def at(self, t: int) -> Any:
        """What step t gets."""
        raise NotImplementedError


@dataclass(frozen=True)
class ByStep(Stepwise):
    """A setting that changes with the inner step: a batch, a learning rate.

    Attributes:
        value: what step t = 1, 2, ... uses; a deterministic function of t, since sweeps ask again.
            With a warm start t goes on counting where the last solve ended.

    Raises:
        ArgumentError: if it is not a function.

    Example:
        >>> batches = ["a", "b", "c"]
        >>> at_step(ByStep(lambda t: batches[t % 3]), 4)
        'b'
    """

    value: Callable[[int], Any]

    def __post_init__(self) -> None:
        if not callable(self.value):
            raise ArgumentError(
                f"ByStep takes a function of the step t = 1, 2, ..., got "
                f"{type(self.value).__name__}; a constant is given as it is."
            )

    def at(self, t: int) -> Any:  # noqa: D102
        return _asked(self.value, t, t)


# A number, a tensor, or a function of the control (so that it can be learned) that returns a scalar
# tensor or a tree like the params; or a `ByStep` of any of them.
Setting = float | Tensor | Callable[[Tree], Any] | ByStep


def at_step(setting: Any, t: int) -> Any:
    """What `setting` is at inner step `t`: itself, unless it is `Stepwise`."""
    return setting.at(t) if isinstance(setting, Stepwise) else setting


def setting_at(setting: Setting, control: Tree, t: int) -> Any:
    """A number, a tensor, or a tree like the params: `setting` at step `t` and a control."""
    value = at_step(setting, t)
    if not callable(value):
        return value
    return _asked(value, control, t) if isinstance(setting, ByStep) else value(control)


def _asked(function: Callable[[Any], Any], argument: Any, t: int) -> Any:
    """What a function of the user's gives for step `t`; a list that is too short is named."""
    try:
        return function(argument)
    except (LookupError, StopIteration) as error:
        raise ArgumentError(
            f"a ByStep has nothing for inner step {t} ({type(error).__name__}: {error}): give it "
            "every step t = 1, 2, ..., as rates[(t - 1) % len(rates)] does, or begin each inner "
            "iteration at step 1 by warm_start=False; with a warm start t goes on counting."
        ) from error


def for_each(value: Any, params: Tree, name: str) -> Tree:
    """The value of a setting for each leaf of the params; None for leaves that are no variables."""
    if isinstance(value, float | int | Tensor):
        return tree.map_leaves(lambda x: value if tree.is_variable(x) else None, params)
    structure, expected = tree.flatten(value)[1], tree.flatten(params)[1]
    if structure != expected:
        raise StructureError(
            f"{name} must be a scalar, or a tree like the params, {expected}, got {structure}."
        )
    return value


def check_setting(value: Any, name: str, **bounds: float) -> None:
    """Refuse what is no setting, or is out of range; functions are checked when they are used."""
    if isinstance(value, ByStep) or callable(value):
        return
    for x in tree.leaves_of(value):
        # None in a tree stands in the place of a leaf that is no variable.
        nothing = x is None and value is not None
        if isinstance(x, bool) or not (nothing or isinstance(x, float | int | Tensor)):
            raise ArgumentError(
                f"{name} must be a number, a tensor or a function of the control, got "
                f"{type(x).__name__}."
            )
    refuse_setting(value, name)
    if bounds:
        check_range(value, name, **bounds)
