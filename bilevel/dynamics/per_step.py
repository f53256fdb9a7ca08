"""Who receives what of a control, and how the gradient is gathered from those parts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_whole
from bilevel.errors import ArgumentError, LostGradientError, StructureError
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class PerStep:
    """A control with one tree per step: `step` and running costs receive theirs, theta_t.

    Any control that is not a `PerStep` is shared by all steps and given whole. In a `solve` a
    tensor that stands at several steps is one variable: ``n * [zero]`` is one number for all.

    Attributes:
        steps: theta_1, ..., theta_T.
        initial: theta_0, what `Dynamics.init` receives.
        shared: what every step shares; then `step` receives `(theta_t, shared)`.

    Example:
        >>> import torch, bilevel as bl
        >>> walk = bl.ControlProblem(
        ...     bl.Map(lambda x, u, t: x + u),
        ...     terminal=lambda x, control: x**2,
        ...     horizon=2,
        ...     running=lambda x, u, t: u**2,
        ... )
        >>> control = bl.PerStep([torch.tensor(0.5), torch.tensor(-1.0)])
        >>> bl.adjoint(walk, torch.tensor(1.0), control).gradient.steps
        (tensor(2.), tensor(-1.))
    """

    steps: Sequence[Tree]
    initial: Tree = None
    shared: Tree = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))

    @classmethod
    def unstack(cls, stacked: Tree, initial: Tree = None, shared: Tree = None) -> "PerStep":
        """One tree per entry of the leading axis, which every leaf of `stacked` has.

        Args:
            stacked: tree of tensors of shape ``(T, ...)``.
            initial: theta_0.
            shared: what every step shares.

        Returns:
            The control; differentiable in `stacked`.

        Raises:
            StructureError: if the leading axes differ or a leaf has none.

        Example:
            >>> import torch
            >>> PerStep.unstack(torch.tensor([1.0, 2.0])).steps
            (tensor(1.), tensor(2.))
        """
        leaves, structure = tree.flatten(stacked)
        lengths = {x.shape[0] if isinstance(x, Tensor) and x.ndim else None for x in leaves}
        if len(lengths) != 1 or None in lengths:
            raise StructureError(
                "PerStep.unstack needs every leaf to be a tensor with the same leading axis, got "
                f"lengths {sorted(lengths, key=str)}."
            )
        rows = zip(*(leaf.unbind(0) for leaf in leaves), strict=True)
        return cls([tree.unflatten(structure, list(row)) for row in rows], initial, shared)

    def shifted(self, by: int = 1) -> "PerStep":
        """The control of a receding horizon: the first steps are over, the last one is repeated.

        Args:
            by: steps that are over, at most T.

        Returns:
            theta_{1+by}, ..., theta_T, theta_T, ..., with the same `initial` and `shared`; repeated
            tensors are copies, so that an optimiser moves each on its own.

        Raises:
            ArgumentError: if `by` is no whole number from 0 to T.

        Example:
            >>> import torch
            >>> PerStep.unstack(torch.tensor([1.0, 2.0, 3.0])).shifted().steps
            (tensor(2.), tensor(3.), tensor(3.))
        """
        check_whole(by, "by")
        if by > len(self.steps):
            raise ArgumentError(f"by must be at most the {len(self.steps)} steps, got {by}.")
        last = [tree.copied(self.steps[-1]) for _ in range(by)] if by else []
        return PerStep([*self.steps[by:], *last], self.initial, self.shared)


_register: Any = optree.register_pytree_node  # its types ask for a Collection, its code does not
_register(
    PerStep,
    lambda c: ((c.steps, c.initial, c.shared), None, ("steps", "initial", "shared")),
    lambda _, children: PerStep(*children),
    path_entry_type=optree.GetAttrEntry,
    namespace=tree.NAMESPACE,
)


def step_control(control: Tree, t: int) -> Tree:
    """What step `t` (1..T) and the running cost at `t` receive of `control`."""
    if not isinstance(control, PerStep):
        return control
    theta = control.steps[t - 1]
    return theta if control.shared is None else (theta, control.shared)


def initial_control(control: Tree) -> Tree:
    """What `Dynamics.init` receives of `control`: theta_0, or all of a shared control."""
    return control.initial if isinstance(control, PerStep) else control


def check_control(control: Tree, horizon: int) -> None:
    """Refuse a control that does not fit the horizon."""
    check_whole(horizon, "horizon")
    if isinstance(control, PerStep) and len(control.steps) != horizon:
        raise StructureError(
            f"control.steps must have one entry per step, {horizon} for this horizon, "
            f"got {len(control.steps)}."
        )
    tree.check_leaves(control, "control")


class Look:
    """What a solve has seen read of its control, and how it speaks of what nothing read.

    One sweep need not read everything: a block that stochastic depth leaves out has gradient zero.
    What no sweep has read yet is refused, since most often it is a mistake: at once, or, where the
    look `waits` for a round of batches or tasks, when it is `settled`.
    """

    def __init__(self, words: str, control: Tree = None) -> None:
        """Start with nothing read of `control`; `words` ends "control['a'] reaches no ..."."""
        self.words, self.read, self.lost = words, set[int](), False
        self.structure = tree.flatten(control)[1]
        self.waits, self._missed = False, dict[int, str]()

    def miss(self, place: int, message: str) -> None:
        """Refuse a leaf that nothing has read; or note it, to be refused if nothing ever does."""
        if not self.waits:
            self.lost = True
            raise LostGradientError(message)
        self._missed[place] = message

    def settled(self) -> None:
        """The first full look is over: refuse what nothing has read."""
        self.waits = False
        for place, message in self._missed.items():
            if place not in self.read:
                self.lost = True
                raise LostGradientError(message)

    def state_dict(self) -> dict[str, Any]:
        """What was read so far."""
        return {"read": sorted(self.read)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.read = {*state["read"]}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Every gradient sum inside goes by this look."""
        token = _LOOK.set(self)
        try:
            yield
        finally:
            _LOOK.reset(token)

    def evaluated(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """`evaluate` by this look, asked again where another draw may read what was not read."""

        def patient(*arguments: Any) -> Any:
            for left in reversed(range(LOOKS)):
                self.lost = False
                try:
                    with self.on():
                        return evaluate(*arguments)
                except LostGradientError:
                    if not (self.lost and left):
                        raise
            raise AssertionError

        return patient


LOOKS = 8  # at most, before a variable counts as read by nothing
CONTROL_WORDS = "cost, neither directly nor through the dynamics"
BILEVEL_WORDS = "objective, neither directly nor through the inner steps"
_LOOK: ContextVar[Look | None] = ContextVar("look", default=None)


_SHORT = {torch.bfloat16, torch.float16}


def _long(total: Tensor) -> Tensor:
    return total.float() if total.dtype in _SHORT else total


class GradientSum:
    """A gradient in a control, gathered from the parts of the control that steps receive.

    Terms of a dtype of less than 32 bits are summed in 32, or those of thousands of steps are lost.
    """

    def __init__(self, control: Tree) -> None:
        """Start from nothing; `control` is the variable tree whose parts will be named."""
        self._control = control
        self._leaves, self._structure = tree.flatten(control)
        self._index = {id(leaf): i for i, leaf in enumerate(self._leaves)}
        self._sums: list[Tensor | None] = [None] * len(self._leaves)

    def add(self, part: Tree, vector: Tree) -> None:
        """Add `vector`, None where nothing is to be added, in the places of `part`."""
        for i, term in self._terms(part, vector):
            total = self._sums[i]
            self._sums[i] = term if total is None else _long(total) + term

    def subtract(self, part: Tree, vector: Tree) -> None:
        """Subtract `vector` in the places of `part`."""
        for i, term in self._terms(part, vector):
            total = self._sums[i]
            self._sums[i] = -term if total is None else _long(total) - term

    def _terms(self, part: Tree, vector: Tree) -> Iterator[tuple[int, Tensor]]:
        for leaf, term in zip(tree.leaves_of(part), tree.leaves_of(vector), strict=True):
            if term is not None:
                yield self._index[id(leaf)], term

    def sums(self) -> Tree:
        """What was gathered, None where nothing was."""
        pairs = zip(self._sums, self._leaves, strict=True)
        found = [x if x is None or x.dtype == leaf.dtype else x.to(leaf.dtype) for x, leaf in pairs]
        return tree.unflatten(self._structure, found)

    def gathered(self) -> list[Tensor | None]:
        """The leaves of `sums` with all their digits, as `load` takes them."""
        return [*self._sums]

    def load(self, sums: list[Tensor | None]) -> None:
        """Go on from what another gradient of such a control had `gathered`."""
        self._sums = [*sums]

    def total(self, *, zeros: bool = False) -> Tree:
        """The gradient of the whole problem; with `zeros`, zero where nothing was gathered."""
        if zeros:
            return tree.filled(self.sums(), self._control)
        look = _LOOK.get()
        if look is None or look.structure != self._structure:  # a sweep inside of another one
            look = Look(CONTROL_WORDS)
        look.read |= {i for i, total in enumerate(self._sums) if total is not None}
        for i, (leaf, total) in enumerate(zip(self._leaves, self._sums, strict=True)):
            if not tree.is_variable(leaf) or total is not None:
                continue
            if i not in look.read:
                name = tree.leaf_names(self._control, "control")[i]
                look.miss(
                    i,
                    f"{name} reaches no {look.words}, so that its gradient would be a silent "
                    "zero: use it, or leave it out of the control; a detach(), an argmax or a "
                    "comparison on the way cuts it off.",
                )
            self._sums[i] = tree.zeros_like(leaf)
        return self.sums()
