"""A user's function of one problem and one step, called on many at once.

By `torch.vmap`; where a function cannot be mapped (it asks for `t` as a number, it branches on a
value), it is called once for each, and the results are stacked.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.tree import Tree


class NeedsNumberError(TypeError):
    """A function asked for the step's number where there are many steps at once."""


class Time:
    """The number t of many steps at once: arithmetic and torch functions go through.

    What needs a number (an index of a list, a key, a branch) raises, so that the function is called
    step by step. A plain tensor in the place of t would be hashed by its identity, and 0.1 t would
    be rounded to float32.
    """

    def __init__(self, number: Tensor) -> None:
        """Of float64 numbers, as t times a number is in Python."""
        self.number = number

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        if function is Tensor.__getitem__ and isinstance(args[1], Time):
            return args[0][args[1].number.long()]
        args, kwargs = tree.map_leaves(_number, (list(args), dict(kwargs or {})))
        return function(*args, **kwargs)


def _number(x: Any) -> Any:
    return x.number if isinstance(x, Time) else x


def _operator(name: str, *, whole: bool) -> Callable[..., Any]:
    def apply(self: Time, *others: Any) -> Any:
        found = getattr(self.number, name)(*map(_number, others))
        # t - 1 is a number of a step too, and may be an index.
        stays = whole and all(isinstance(x, int | Time) for x in others)
        return Time(found) if stays else found

    return apply


def _refused(self: Time, *_: Any) -> Any:  # noqa: ARG001
    raise NeedsNumberError("the step's number is wanted as a Python number")


# What of whole numbers is a whole number, what is not, and what is not to be had.
_WHOLE = ["add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "neg", "pos", "abs"]
_REAL = ["truediv", "rtruediv", "rfloordiv", "rmod", "pow", "rpow"]
_REAL += ["lt", "le", "gt", "ge", "eq", "ne"]
_NONE = ["hash", "index", "int", "float", "bool", "str", "repr", "format", "len", "iter"]
_NONE += ["round", "trunc", "floor", "ceil"]
for _name in _WHOLE:
    setattr(Time, f"__{_name}__", _operator(f"__{_name}__", whole=True))
for _name in _REAL:
    setattr(Time, f"__{_name}__", _operator(f"__{_name}__", whole=False))
for _name in _NONE:
    setattr(Time, f"__{_name}__", _refused)


class Mapped:
    """Functions of one element, called on many: by `torch.vmap`, or one after another.

    Attributes:
        together: whether the next call tries all at once.
    """

    def __init__(self) -> None:
        self.together = True

    def over(self, function: Callable[..., Any], columns: Tree, n: int) -> Any:
        """`function` of each of `n` elements; its outputs stacked.

        Args:
            function: of one element of `columns`; returns a tensor or a tuple of tensors.
            columns: a list of trees of tensors with a leading axis of length `n`.
            n: how many.

        Returns:
            The outputs, with a leading axis.
        """
        if n > 1 and self.together:
            found = self.attempt(function, columns)
            if found is not None:
                return found
        rows = [function(*tree.map_leaves(lambda x, i=i: x[i], columns)) for i in range(n)]
        if n == 1:
            return tree.map_leaves(lambda x: x.unsqueeze(0), rows[0])
        return tree.map_leaves(lambda *xs: torch.stack(xs), rows[0], *rows[1:])

    def attempt(self, function: Callable[..., Any], columns: Tree) -> Any:
        """`function` of all elements at once; None, from then on, where it cannot be mapped."""
        # torch would flatten the trees leaf by leaf in Python, on each level once more.
        leaves, structure = tree.flatten(columns)

        def flat(*elements: Any) -> Any:
            return function(*tree.unflatten(structure, [*elements]))

        try:
            return torch.func.vmap(flat)(*leaves)
        except Exception:  # whatever a user's function raises: one by one it tells why
            self.together = False
            return None


class Fixed:
    """Leaves that are not variables: those that differ from problem to problem are mapped over."""

    def __init__(self, leaves: list[Any], *, batched: bool) -> None:
        """With `batched`, tensors among `leaves` have a leading axis; others are for all."""
        self._leaves = leaves
        self._places = [i for i, x in enumerate(leaves) if batched and isinstance(x, Tensor)]

    @property
    def columns(self) -> list[Tensor]:
        """The tensors that are mapped over."""
        return [self._leaves[i] for i in self._places]

    def same(self, other: "Fixed") -> bool:
        """Whether both hold the same leaves, none of them mapped over."""
        pairs = zip(self._leaves, other._leaves, strict=True)
        return not self._places and all(
            torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs
        )

    def of(self, elements: list[Tensor]) -> list[Any]:
        """All leaves of one element."""
        if not self._places:
            return self._leaves
        leaves = list(self._leaves)
        for i, x in zip(self._places, elements, strict=True):
            leaves[i] = x
        return leaves
