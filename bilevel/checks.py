"""Checks of what users pass: counts, ranges, kinds, choices, scalars; each written once."""

import math
from collections.abc import Callable, Sequence
from inspect import signature
from numbers import Integral
from types import MethodType
from typing import Any

from torch import Tensor

from bilevel import tree
from bilevel.errors import ArgumentError, StructureError
from bilevel.tree import Tree


def is_whole(value: Any, least: float = 0) -> bool:
    """Whether `value` is an integer, one of NumPy's or Python's but no boolean, from `least` on."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_whole(
    value: Any, name: str, least: int = 0, *, optional: bool = False, advice: str = ""
) -> None:
    """Refuse what is no whole number from `least` on, or None where that is optional."""
    if is_whole(value, least) or (optional and value is None):
        return
    needed = f"a whole number >= {least}{', or None' if optional else ''}"
    raise ArgumentError(f"{name} must be {needed}, got {value!r}{advice and f': {advice}'}.")


def check_range(
    value: Any,
    name: str,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """Refuse numbers outside a range, and those that are not finite."""
    for x in tree.leaves_of(value):
        if x is None:
            continue
        if isinstance(x, bool) or not isinstance(x, float | int | Tensor):
            raise ArgumentError(f"{name} must be a number, got {type(x).__name__}.")
        low, high = (float(x.min()), float(x.max())) if isinstance(x, Tensor) else (x, x)
        if (
            (above is None or low > above)
            and (least is None or low >= least)
            and high < (math.inf if below is None else below)
            and (most is None or high <= most)
        ):
            continue
        bounds = {">": above, ">=": least, "<": below, "<=": most}
        needed = [f"{sign} {bound:g}" for sign, bound in bounds.items() if bound is not None]
        finite = [] if below is not None or most is not None else ["finite"]
        came = f"{low:g}" if low == high or math.isnan(low) else f"{low:g} to {high:g}"
        raise ArgumentError(f"{name} must be {' and '.join(needed + finite)}, got {came}.")


def check_kind(value: Any, kind: Any, name: str, wanted: str) -> None:
    """Refuse what is not of a kind; a class in the place of its instance is named as such."""
    if not isinstance(value, kind):
        came = f"the class {_named(value)}" if isinstance(value, type) else _named(type(value))
        raise ArgumentError(f"{name} must be {wanted}, got {came}.")


def _named(kind: type) -> str:
    """The name of a class, with its home where one of ours may be called the same."""
    home = kind.__module__
    return f"torch.optim.{kind.__name__}" if home.startswith("torch.optim") else kind.__name__


def check_arguments(function: Callable[..., Any], name: str, *arguments: str) -> None:
    """Refuse a function that cannot be called with these positional arguments."""
    code = getattr(function, "__code__", None)  # to look at a signature takes as long as a step
    count = len(arguments) + isinstance(function, MethodType)
    if code is not None and code.co_argcount == count and not code.co_kwonlyargcount:
        return
    try:
        found = signature(function)
    except (TypeError, ValueError):  # some callables have no signature to look at
        return
    try:
        found.bind(*arguments)
    except TypeError as error:
        raise ArgumentError(
            f"{name} is called as {name}({', '.join(arguments)}), and that does not fit "
            f"{found}: {error}. Let it take these arguments in this order."
        ) from None


def takes(function: Callable[..., Any], *arguments: str) -> bool:
    """Whether a function is known to take these positional arguments."""
    try:
        signature(function).bind(*arguments)
    except (TypeError, ValueError):
        return False
    return True


def check_choice(value: Any, choices: Sequence[str], name: str) -> None:
    """Refuse anything but one of a few words."""
    if value not in choices:
        *first, last = map(repr, choices)
        raise ArgumentError(f"{name} must be {', '.join(first)} or {last}, got {value!r}.")


def check_scalar(value: Any, name: str) -> Tensor:
    """`value` if it is a real scalar tensor."""
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        whole = isinstance(value, Tensor) and not tree.is_variable(value)
        advice = (
            "; an argmax or a count has no gradient, take a loss that is smooth" if whole else ""
        )
        raise StructureError(
            f"{name} must return a real scalar tensor of shape (), got {tree.kind(value)}{advice}."
        )
    return value


def refuse_setting(value: Tree, name: str) -> None:
    """Refuse a setting that requires grad: it is no argument, so its gradient would be lost."""
    if any(isinstance(x, Tensor) and x.requires_grad for x in tree.leaves_of(value)):
        raise ArgumentError(
            f"{name} is a tensor that requires grad, which no gradient would reach: make it part "
            f"of the control, and pass a function such as lambda control: control['{name}']."
        )
