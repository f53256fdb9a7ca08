"""A control as the numbers of each step, and those that every step shares."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel import tree
from bilevel.control.riccati.layout import Layout
from bilevel.dynamics.per_step import PerStep
from bilevel.errors import StructureError, UnsupportedError
from bilevel.outer.leaves import Leaves
from bilevel.tree import Tree

OTHERS = "NewtonCG, or a torch optimiser such as LBFGS, takes it"


@dataclass(frozen=True, eq=False)
class Point:
    """A control in numbers.

    Attributes:
        own: of each step alone, shape ``(B, T, m)``.
        shared: of several steps, of the start, or of a control that is no `PerStep`: ``(B, q)``.
    """

    own: Tensor
    shared: Tensor

    def at(self, i: Tensor) -> "Point":
        """Some of the problems."""
        return Point(self.own[i], self.shared[i])


class Controls:
    """Takes controls apart into a `Point`, and puts what a step receives together again.

    A variable that stands in one place of one step is the step's own. Every other one (`shared`,
    `initial`, all of a control that is no `PerStep`, a tensor tied over the steps) is shared, a
    part of the state that stays as it is.

    Attributes:
        m: numbers of a step's own.
        q: numbers that are shared.
    """

    def __init__(self, control: Tree, horizon: int, batch: int | None) -> None:
        """Look at a control that fits the horizon; with a `batch`, leaves have that first axis."""
        self.leaves, self.horizon, self.batch = Leaves(control, copy=False), horizon, batch
        self._given, self._n = control, 1 if batch is None else batch
        self._check_batch()
        indices = self._indices = self.leaves.spread([*range(len(self.leaves))])
        self._per_step = isinstance(control, PerStep)
        steps = control.steps if isinstance(control, PerStep) else ()
        rows = [tree.leaves_of(step) for step in (indices.steps if self._per_step else ())]
        self._check_steps(steps)
        count = Counter(i for i in tree.leaves_of(indices) if i is not None)
        own = {i for row in rows for i in row if i is not None and count[i] == 1}
        self._own_rows = [[i for i in row if i in own] for row in rows]
        self._shared = [i for i in range(len(self.leaves)) if i not in own]
        self._plan = self._step_plan(rows, own)
        dtype = torch.float32
        for each in {x.dtype for x in self.leaves}:
            dtype = torch.promote_types(dtype, each.to_real())
        self.dtype, self.device = dtype, self.leaves[0].device
        batched = batch is not None
        first = [self.leaves[i] for i in self._own_rows[0]] if rows else []
        common = [self.leaves[i] for i in self._shared]
        self.own, self.common = (
            Layout(leaves, batched=batched, dtype=dtype, device=self.device)
            for leaves in (first, common)
        )
        # The common case costs least: a step's control is one real vector.
        self._plain = self.own.is_one and [kind for kind, _ in self._plan] == ["own"]
        self._bare = self._plain and all(isinstance(step, Tensor) for step in steps[:1])
        self.m, self.q = self.own.width, self.common.width
        self._step_structure = tree.flatten(steps[0])[1] if steps else None
        self._places = {i: k for k, i in enumerate(self._shared)}
        # The leaves that are not variables, in the order of each part.
        self.step_constants = [[] if self._bare else _constants(step) for step in steps]
        ids = indices if not self._per_step else (indices.initial, indices.shared)
        self._rest_ids, self._rest = tree.flatten(ids)
        whole = control if not self._per_step else (control.initial, control.shared)
        self.rest_constants = _constants(whole)

    def _check_batch(self) -> None:
        if self.batch is None:
            return
        for i, x in enumerate(tree.leaves_of(self._given)):
            if isinstance(x, Tensor) and (not x.ndim or x.shape[0] != self.batch):
                name = tree.leaf_names(self._given, "control")[i]
                raise StructureError(
                    f"batched=True: {name} must have the leading axis of the observation, "
                    f"{self.batch} problems, got shape {tuple(x.shape)}."
                )

    def _check_steps(self, steps: Any) -> None:
        for t, step in enumerate(steps, 1):
            if not tree.alike(step, steps[0]):
                raise UnsupportedError(
                    f"Riccati needs steps of one structure and shape, got another at t = {t} than "
                    f"at t = 1; {OTHERS}."
                )

    def _step_plan(self, rows: list[list[Any]], own: set[int]) -> list[tuple[str, int]]:
        """Where each leaf of a step comes from."""
        plan: list[tuple[str, int]] = []
        n_own = n_constant = 0
        for column in zip(*rows, strict=True):
            if column[0] is None:
                plan.append(("constant", n_constant))
                n_constant += 1
            elif all(i in own for i in column):
                plan.append(("own", n_own))
                n_own += 1
            elif len(set(column)) == 1:
                plan.append(("shared", column[0]))
            else:
                raise UnsupportedError(
                    "Riccati needs a tensor of the control in one step, or in the same place of "
                    f"every step, got one that some steps share: clone it there, or {OTHERS}."
                )
        return plan

    def point(self, control: Tree) -> Point:
        """The numbers of a control like the one given."""
        places = zip(tree.leaves_of(self._indices), tree.leaves_of(control), strict=True)
        values = dict(reversed([(i, x) for i, x in places if i is not None]))
        n, lead = self._n, self.batch is not None

        def given(i: int) -> Tensor:
            return values[i].detach() if lead else values[i].detach().unsqueeze(0)

        shared = self.common.vectors([given(i) for i in self._shared], n)
        if not self._own_rows:
            return Point(shared.new_zeros(n, self.horizon, 0), shared)
        if self._plain:
            own = torch.stack([values[row[0]] for row in self._own_rows], int(lead)).detach()
            return Point(own if lead else own.unsqueeze(0), shared)
        rows = [self.own.vectors([given(i) for i in row], n) for row in self._own_rows]
        return Point(torch.stack(rows, 1), shared)

    def control(self, point: Point, *, spread: bool = False) -> Tree:
        """The control of a point, like the one given; with `spread`, as a vector of its space."""
        values: list[Any] = [None] * len(self.leaves)
        lead = self.batch is not None
        own = point.own[0].unbind(0) if self._plain and not lead else point.own.unbind(1)
        for row, numbers in zip(self._own_rows, own, strict=False):
            if self._plain:
                values[row[0]] = numbers
                continue
            for i, x in zip(row, self._trees(self.own, numbers), strict=True):
                values[i] = x
        for i, x in zip(self._shared, self._trees(self.common, point.shared), strict=True):
            values[i] = x
        return self.leaves.spread(values) if spread else self.leaves.tree_of(values)

    def _trees(self, layout: Layout, numbers: Tensor) -> list[Tensor]:
        if self.batch is None:
            return layout.tree(numbers[0], [])
        return layout.trees(numbers, [])

    def received(self, own: Tensor, shared: list[Tensor], constants: Any, rest: Any) -> Tree:
        """What a step and its running cost receive, of one problem's numbers.

        Args:
            own: shape ``(m,)``.
            shared: `pieces` of the shared numbers.
            constants: of the step.
            rest: constants of what is shared.

        Returns:
            theta_t, or (theta_t, shared), or all of a shared control.
        """
        if not self._per_step:
            return self._whole(shared, rest)
        theta = self._step(own, shared, constants)
        if self._given.shared is None:
            return theta
        _, common = self._whole(shared, rest)
        return theta, common

    def _step(self, own: Tensor, shared: list[Tensor], constants: Any) -> Tree:
        if self._bare:
            return own
        pieces = self.own.tree(own, [])
        leaves = [
            pieces[i]
            if kind == "own"
            else shared[self._places[i]]
            if kind == "shared"
            else constants[i]
            for kind, i in self._plan
        ]
        assert self._step_structure is not None
        return tree.unflatten(self._step_structure, leaves)

    def pieces(self, shared: Tensor) -> list[Tensor]:
        """The shared variables of one problem's numbers."""
        return self.common.tree(shared, [])

    def _whole(self, shared: list[Tensor], rest: Any) -> Tree:
        constants = iter(rest)
        leaves = [next(constants) if i is None else shared[self._places[i]] for i in self._rest_ids]
        return tree.unflatten(self._rest, leaves)

    def initial(self, shared: list[Tensor], rest: Any) -> Tree:
        """What `init` receives."""
        whole = self._whole(shared, rest)
        return whole[0] if self._per_step else whole

    def all_of(self, own: Tensor, shared: list[Tensor], constants: Any, rest: Any) -> Tree:
        """What the terminal cost receives."""
        if not self._per_step:
            return self._whole(shared, rest)
        if self._bare:
            return PerStep([*own.unbind(0)], *self._whole(shared, rest))
        steps = [
            self._step(x, shared, fixed) for x, fixed in zip(own.unbind(0), constants, strict=True)
        ]
        return PerStep(steps, *self._whole(shared, rest))


def _constants(values: Tree) -> list[Any]:
    return [x for x in tree.leaves_of(values) if not tree.is_variable(x)]
