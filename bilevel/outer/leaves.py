"""The variables of a control as an optimiser moves them: each tensor once, and by name."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel import autodiff, tree
from bilevel.errors import ArgumentError, DivergenceError, StructureError
from bilevel.tree import Tree


class Leaves(list[Tensor]):
    """A copy of the variables of a control: the list that a factory of optimisers gets.

    They come in the order of the tree, dictionaries by sorted key. A tensor that stands in several
    places is one variable: it is in the list once, moves by the sum of its gradients, and stands in
    all its places in what is returned. Clone it where the places should move on their own.

    Attributes:
        control: the tree of these very tensors, to pick from by name: `leaves.control["rate"]`.
        named: pairs of a name such as ``control['rate']`` and a tensor, which `torch.optim` takes.

    Raises:
        StructureError: if a leaf is no tensor, or two share memory in different shapes.
        ArgumentError: if there is no variable.

    Example:
        >>> leaves = Leaves({"weights": torch.zeros(3), "rate": torch.tensor(0.1)})
        >>> [name for name, _ in leaves.named]
        ["control['rate']", "control['weights']"]
        >>> by_name = [
        ...     {"params": leaves.control["weights"]},
        ...     {"params": leaves.control["rate"], "lr": 1e-3},
        ... ]
        >>> [group["lr"] for group in torch.optim.SGD(by_name, 0.5).param_groups]
        [0.5, 0.001]
    """

    def __init__(self, control: Tree, *, copy: bool = True) -> None:
        """Copy it; without `copy` the variables are those of the control, for who only looks."""
        tree.check_leaves(control, "control")
        places, self._structure = tree.flatten(control)
        firsts: dict[Any, int] = {}  # memory -> the place where it came first
        self._index: list[int | None] = []  # place -> variable
        self._places: list[Any] = []
        self._variables: list[tuple[int, Tensor]] = []  # where each came first, and itself
        for i, leaf in enumerate(places):
            if not tree.is_variable(leaf):
                self._index.append(None)
                self._places.append(leaf)
                continue
            first = firsts.setdefault(_memory(leaf), i)
            if first == i:
                self._index.append(len(self._variables))
                own = leaf.detach().clone().requires_grad_() if copy else leaf
                self._variables.append((i, own))
            elif _same(leaf, places[first]):
                self._index.append(self._index[first])
            else:
                names = tree.leaf_names(control, "control")
                raise StructureError(
                    f"{names[i]} shares memory with {names[first]}, {tree.kind(leaf)} with "
                    f"{tree.kind(places[first])}, and an update would part them: put one of them "
                    "into the control and view it where it is used, or clone one."
                )
            self._places.append(self._variables[self._index[i] or 0][1])
        if not self._variables:
            raise ArgumentError(
                f"control must hold a floating-point or complex tensor, got {control!r}."
            )
        super().__init__(x for _, x in self._variables)
        self.control = tree.unflatten(self._structure, self._places)

    @cached_property
    def named(self) -> list[tuple[str, Tensor]]:
        """Pairs of a name and a variable; names take their time, where there are many leaves."""
        names = tree.leaf_names(self.control, "control")
        return [(names[i], x) for i, x in self._variables]

    @property
    def tied(self) -> bool:
        """Whether a variable stands in more than one place."""
        return sum(i is not None for i in self._index) > len(self)

    def gathered(self, vector: Tree) -> list[Any]:
        """One entry a variable: the sum of what `vector` holds in its places."""
        sums: list[Any] = [None] * len(self)
        for i, term in zip(self._index, tree.leaves_of(vector), strict=True):
            if i is not None and term is not None:
                sums[i] = term if sums[i] is None else sums[i] + term
        return sums

    def spread(self, values: list[Any]) -> Tree:
        """The vector with an entry of `values` in each place of its variable."""
        return tree.unflatten(
            self._structure, [None if i is None else values[i] for i in self._index]
        )

    def tree_of(self, values: list[Tensor]) -> Tree:
        """A control of these values, its other leaves as they came; tied where it was tied."""
        at = zip(self._index, self._places, strict=True)
        return tree.unflatten(self._structure, [x if i is None else values[i] for i, x in at])

    def now(self) -> Tree:
        """The control where it stands, detached; it shares memory with the variables."""
        return self.tree_of([x.detach() for x in self])

    def assign(self, values: Tree) -> None:
        """Take the values that `project` returned."""
        if values is None:
            raise StructureError(
                "project must return the projected control, got None: return the tree, also where "
                "it was changed in place."
            )
        tree.check_like(
            values, self.control, "control", "project must return a control like its own"
        )
        firsts: list[Any] = [None] * len(self)
        for place, (i, value) in enumerate(zip(self._index, tree.leaves_of(values), strict=True)):
            if i is None:
                continue
            if firsts[i] is not None and not torch.equal(firsts[i], value):
                raise StructureError(
                    f"project gave {tree.leaf_names(self.control, 'control')[place]} another value "
                    f"than {self.named[i][0]}, which is the same variable: project both alike."
                )
            firsts[i] = value
        with autodiff.paused():
            for old, new in zip(self, firsts, strict=True):
                old.copy_(new)

    def check_finite(self, step: int) -> None:
        """Refuse a control that an update made infinite or NaN."""
        for name, x in self.named:
            if not bool(x.detach().isfinite().all()):
                raise DivergenceError(
                    f"iteration {step}: {name} is not finite after the update, although cost and "
                    "gradient were; take a smaller learning rate, or look at project and scheduler."
                )


def _memory(leaf: Tensor) -> Any:
    """Where its entries lie: equal for one tensor in two places, and for views of its beginning."""
    if leaf.layout != torch.strided or not leaf.data_ptr():
        return id(leaf)
    return leaf.data_ptr(), leaf.device


def _same(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    return (
        tree.alike(a, b)
        and a.stride() == b.stride()
        and (a.is_conj(), a.is_neg()) == (b.is_conj(), b.is_neg())
    )
