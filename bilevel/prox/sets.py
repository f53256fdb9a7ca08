r"""Projections: the proximal operators of the indicators of sets.

Where a component stands exactly on the border of a set, the derivative is that from inside.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bilevel import tree
from bilevel.checks import check_whole, refuse_setting
from bilevel.errors import ArgumentError, StructureError, UnsupportedError
from bilevel.prox.operators import Box, Prox, any_tie, like, nothing_of_a_set, tied
from bilevel.settings import Setting, check_setting
from bilevel.tree import Tree

Axes = int | tuple[int, ...] | None


def outside(prox: Prox, params: Tree, control: Tree) -> Tensor:
    """0 where the params are in a set, to rounding; infinite elsewhere."""
    moved = prox(params, 1.0, control)
    pairs = zip(tree.leaves_of(params), tree.leaves_of(moved), strict=True)
    far = [_apart(x.detach(), y.detach()) for x, y in pairs if tree.is_variable(x)]
    return (
        torch.where(torch.stack(far).any(), math.inf, 0.0) if far else torch.zeros((), device="cpu")
    )


def _apart(x: Tensor, y: Tensor) -> Tensor:
    rounding = 1e3 * torch.finfo(x.dtype).eps * (1 + torch.linalg.vector_norm(x))
    return torch.linalg.vector_norm(x - y) > rounding


def one_step(step_size: Any, prox: Prox) -> None:
    """Refuse a step size of its own for each entry: the operator couples them."""
    for size in tree.leaves_of(step_size):
        if isinstance(size, Tensor) and size.ndim:
            raise UnsupportedError(
                f"{type(prox).__name__} couples the entries of a leaf, which therefore need one "
                f"step size, got a tensor of shape {tuple(size.shape)}; take a number a leaf."
            )


def real_only(x: Tensor, prox: Prox) -> None:
    """Refuse complex leaves where entries are compared."""
    if x.is_complex():
        raise StructureError(
            f"{type(prox).__name__} orders its params, got a {x.dtype} leaf: complex numbers have "
            "no order; constrain real and imaginary parts as two leaves."
        )


def check_axes(dim: Any) -> None:
    """Refuse what names no axes."""
    for axis in dim if isinstance(dim, tuple) else (dim,):
        if axis is not None:
            check_whole(axis, "dim", -64)


def from_the_end(dim: Axes) -> bool:
    """Whether axes are counted from the last one, so that one more in front changes nothing."""
    return dim is not None and all(a < 0 for a in (dim if isinstance(dim, tuple) else (dim,)))


def axes_of(x: Tensor, dim: Axes, prox: Prox) -> tuple[int, ...]:
    """The axes of a leaf that are meant; an error if it has them not, or nothing along them."""
    axes = tuple(range(x.ndim)) if dim is None else dim if isinstance(dim, tuple) else (dim,)
    if any(not -x.ndim <= axis < x.ndim for axis in axes):
        raise StructureError(
            f"{type(prox).__name__}(dim={dim}) needs leaves that have that axis, got one of shape "
            f"{tuple(x.shape)}; give another dim, or None for the whole leaf."
        )
    return axes


@final
@dataclass(frozen=True)
class NonNegative(Prox):
    """The indicator of x >= 0. Real params only.

    Example:
        >>> NonNegative()(torch.tensor([-0.5, 0.3]), 0.1, None)
        tensor([0.0000, 0.3000])
    """

    @property
    def separable(self) -> bool:  # noqa: D102
        return True

    def __call__(self, params: Tree, step_size: Any, control: Tree) -> Tree:  # noqa: D102
        tree.map_leaves(lambda x: real_only(x, self) if tree.is_variable(x) else None, params)
        return _HALF(params, step_size, control)

    def value(self, params: Tree, control: Tree) -> Tensor:
        """See `Prox`; 0 inside, infinite outside."""
        return outside(self, params, control)

    def term(self, params: Tree, control: Tree) -> float:  # noqa: ARG002, D102
        return 0.0

    def on_kink(self, params: Tree, step_size: Any, control: Tree, slack: Tree) -> bool:  # noqa: D102
        return _HALF.on_kink(params, step_size, control, slack)


_HALF = Box(lower=0.0)


@final
@dataclass(frozen=True)
class Simplex(Prox):
    r"""The indicator of x >= 0, :math:`\sum_i x_i = c`: shares, probabilities, a portfolio.

    Attributes:
        total: c > 0; a number, a tensor, or a function of the control.
        dim: the axis along which entries are added, one simplex for each place of the others; None
            for the whole leaf.

    Raises:
        ArgumentError: if the total is not positive.

    Example:
        >>> Simplex()(torch.tensor([0.7, 0.5, -1.0]), 0.1, None)
        tensor([0.6000, 0.4000, 0.0000])
    """

    total: Setting = 1.0
    dim: int | None = -1

    def __post_init__(self) -> None:
        check_setting(self.total, "total", above=0)
        if isinstance(self.dim, tuple):
            raise ArgumentError(f"dim must be one axis, or None, got {self.dim}.")
        check_axes(self.dim)

    @property
    def separable(self) -> bool:  # noqa: D102
        return from_the_end(self.dim)

    def __call__(self, params: Tree, step_size: Any, control: Tree) -> Tree:  # noqa: D102
        one_step(step_size, self)
        totals = like(self.total, params, control, "total")
        return tree.map_leaves(
            lambda x, c: x if c is None else torch.where(*self._split(x, c), 0), params, totals
        )

    def _split(self, x: Tensor, total: Any) -> tuple[Tensor, Tensor]:
        """Which entries are on the support, and the entries less what is too much."""
        real_only(x, self)
        (axis,) = axes_of(x.reshape(-1) if self.dim is None else x, self.dim, self)
        flat = (x.reshape(-1) if self.dim is None else x).movedim(axis, -1)
        if not flat.numel():
            raise StructureError(
                f"Simplex needs at least one entry to share the total, got a leaf of shape "
                f"{tuple(x.shape)}."
            )
        total = torch.as_tensor(total, dtype=x.dtype, device=x.device)
        total = total.unsqueeze(-1) if total.ndim else total
        # The support is found by sorting and is piecewise constant; the rest is differentiated.
        sums, known = flat.detach(), total.detach()
        ordered = sums.sort(dim=-1, descending=True).values
        counts = torch.arange(1, flat.shape[-1] + 1, dtype=x.dtype, device=x.device)
        level = (ordered.cumsum(-1) - known) / counts
        n = (ordered >= level).sum(-1, keepdim=True).clamp(min=1)
        support = sums >= level.gather(-1, n - 1)
        level = (torch.where(support, flat, 0).sum(-1, keepdim=True) - total) / support.sum(
            -1, keepdim=True
        )
        back = (lambda y: y.reshape(x.shape)) if self.dim is None else _moved_back(axis)
        return back(support), back(flat - level)

    def value(self, params: Tree, control: Tree) -> Tensor:
        """See `Prox`; 0 inside, infinite outside."""
        return outside(self, params, control)

    def term(self, params: Tree, control: Tree) -> float:  # noqa: ARG002, D102
        return nothing_of_a_set(self, self.total)

    def on_kink(  # noqa: D102
        self,
        params: Tree,
        step_size: Any,  # noqa: ARG002
        control: Tree,
        slack: Tree,
    ) -> bool:
        totals = like(self.total, params, control, "total")
        less = tree.map_leaves(
            lambda x, c: x if c is None else x - self._split(x, c)[1], params, totals
        )
        levels = tree.map_leaves(lambda y, c: None if c is None else y, less, totals)
        return any_tie(tied, params, levels, slack)

    def check(self, params: Tree, control: Tree) -> None:  # noqa: D102
        totals = like(self.total, params, control, "total")
        check_setting(totals, "total", above=0)
        tree.map_leaves(lambda x, c: None if c is None else self._split(x, c), params, totals)


def _moved_back(axis: int) -> Callable[[Tensor], Tensor]:
    return lambda y: y.movedim(-1, axis)


@final
@dataclass(frozen=True, eq=False)
class Affine(Prox):
    r"""The indicator of A x = b, along the last axis of a leaf: a smooth projection, with no ties.

    .. math:: \mathrm{prox}(z) = z - A^+ (A z - b)

    Attributes:
        A: matrix of shape ``(m, n)``, real or complex, of any rank; or a function of the control.
        b: shape ``(m,)``, or ``(..., m)`` for leaves of shape ``(..., n)``; a tensor, or a function
            of the control.

    Raises:
        ArgumentError: if they are empty, do not fit, or no x has A x = b.

    Example:
        >>> Affine(torch.ones(1, 2), torch.tensor([1.0]))(
        ...     torch.tensor([3.0, 1.0]), 0.1, None
        ... )
        tensor([ 1.5000, -0.5000])
    """

    A: Tensor | Callable[[Tree], Tensor]
    b: Tensor | Callable[[Tree], Tensor]
    _inverse: Tensor | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        for name in ("A", "b"):
            value = getattr(self, name)
            if not (callable(value) or isinstance(value, Tensor)):
                raise ArgumentError(
                    f"{name} must be a tensor or a function of the control, got "
                    f"{type(value).__name__}."
                )
            if isinstance(value, Tensor):
                refuse_setting(value, name)
        if isinstance(self.A, Tensor):
            self._check_matrix(self.A)
            object.__setattr__(self, "_inverse", torch.linalg.pinv(self.A))
            if isinstance(self.b, Tensor):
                self._check_feasible(self.A, self.b)

    @property
    def separable(self) -> bool:  # noqa: D102
        return True

    def __call__(self, params: Tree, step_size: Any, control: Tree) -> Tree:  # noqa: D102
        one_step(step_size, self)
        A, b = self._given(control)
        inverse = torch.linalg.pinv(A) if self._inverse is None else self._inverse
        return tree.map_leaves(
            lambda x: _projected(x, A, b, inverse) if tree.is_variable(x) else x, params
        )

    def _given(self, control: Tree) -> tuple[Tensor, Tensor]:
        A, b = self.A, self.b
        return A if isinstance(A, Tensor) else A(control), b if isinstance(b, Tensor) else b(
            control
        )

    def _check_matrix(self, A: Tensor) -> None:
        if not tree.is_variable(A) or A.ndim != 2 or not A.numel():
            raise ArgumentError(
                "A must be a matrix of floating-point or complex numbers with at least one row "
                f"and one column, got {tree.kind(A)}; without constraint leave the prox out."
            )
        if not bool(A.isfinite().all()):
            raise ArgumentError("A must be finite.")

    def _check_feasible(self, A: Tensor, b: Tensor) -> None:
        if not tree.is_variable(b) or not b.ndim or b.shape[-1] != A.shape[0]:
            raise ArgumentError(
                f"b must be a tensor of shape ({A.shape[0]},), one number a row of A, got "
                f"{tree.kind(b)}."
            )
        kind = torch.promote_types(A.dtype, b.dtype)
        A, b = A.to(kind), b.to(kind)
        nearest = (b @ torch.linalg.pinv(A).mT) @ A.mT
        left = float(torch.linalg.vector_norm(nearest - b))
        size = float(torch.linalg.vector_norm(b))
        if not left <= 1e3 * torch.finfo(kind).eps * max(A.shape) * size:
            raise ArgumentError(
                "no x has A x = b: the rows of A are dependent and b contradicts them, by "
                f"{left:.1e} of |b| = {size:.1e}; take out a row, or change b."
            )

    def value(self, params: Tree, control: Tree) -> Tensor:
        """See `Prox`; 0 inside, infinite outside."""
        return outside(self, params, control)

    def term(self, params: Tree, control: Tree) -> float:  # noqa: ARG002, D102
        return nothing_of_a_set(self, self.A, self.b)

    def check(self, params: Tree, control: Tree) -> None:  # noqa: D102
        A, b = self._given(control)
        self._check_matrix(A)
        self._check_feasible(A, b)
        for x in tree.leaves_of(params):
            if tree.is_variable(x) and (not x.ndim or x.shape[-1] != A.shape[1]):
                raise StructureError(
                    f"Affine needs leaves whose last axis has {A.shape[1]} entries, the columns of "
                    f"A, got shape {tuple(x.shape)}; prox.Product constrains some leaves alone."
                )
            if tree.is_variable(x) and A.is_complex() and not x.is_complex():
                raise StructureError(
                    f"a complex A constrains complex params, got {x.dtype}: stack its real and "
                    "imaginary parts as rows of a real A."
                )


def _projected(x: Tensor, A: Tensor, b: Tensor, inverse: Tensor) -> Tensor:
    A, b, inverse = A.to(x), b.to(x), inverse.to(x)
    return x - (x @ A.mT - b) @ inverse.mT


@final
@dataclass(frozen=True)
class Ball(Prox):
    r"""The indicator of :math:`|x - c|_2 \le r`; complex params too.

    Attributes:
        radius: r > 0; a number, a tensor, or a function of the control.
        center: c; a number, a tensor, a tree like the params, or a function of the control.
        dim: the axes that make one vector, one ball for each place of the others; None for the
            whole leaf.

    Raises:
        ArgumentError: if the radius is not positive.

    Example:
        >>> Ball(1.0)(torch.tensor([3.0, 4.0]), 0.1, None)
        tensor([0.6000, 0.8000])
    """

    radius: Setting = 1.0
    center: Setting = 0.0
    dim: Axes = None

    def __post_init__(self) -> None:
        check_setting(self.radius, "radius", above=0)
        check_setting(self.center, "center")
        check_axes(self.dim)

    @property
    def separable(self) -> bool:  # noqa: D102
        return from_the_end(self.dim)

    def __call__(self, params: Tree, step_size: Any, control: Tree) -> Tree:  # noqa: D102
        one_step(step_size, self)

        def inside(x: Any, r: Any, c: Any) -> Any:
            if r is None:
                return x
            away, length, r = self._lengths(x, r, c)
            out = length > r
            return torch.where(out, c + away * (r / torch.where(out, length, 1)), x)

        return tree.map_leaves(inside, params, *self._settings(params, control))

    def _settings(self, params: Tree, control: Tree) -> tuple[Tree, Tree]:
        radius = like(self.radius, params, control, "radius")
        return radius, like(self.center, params, control, "center")

    def _lengths(self, x: Tensor, r: Any, c: Any) -> tuple[Tensor, Tensor, Tensor]:
        away = x - c
        axes = axes_of(x, self.dim, self)
        r = torch.as_tensor(r, dtype=x.real.dtype, device=x.device)
        if r.ndim:  # one for each place of the other axes
            for axis in sorted(axis % x.ndim for axis in axes):
                r = r.unsqueeze(axis)
        return away, length_of(away, axes), r

    def value(self, params: Tree, control: Tree) -> Tensor:
        """See `Prox`; 0 inside, infinite outside."""
        return outside(self, params, control)

    def term(self, params: Tree, control: Tree) -> float:  # noqa: ARG002, D102
        return nothing_of_a_set(self, self.radius, self.center)

    def on_kink(  # noqa: D102
        self,
        params: Tree,
        step_size: Any,  # noqa: ARG002
        control: Tree,
        slack: Tree,
    ) -> bool:
        def tie(x: Any, r: Any, c: Any, s: Any) -> bool:
            if r is None:
                return False
            _, length, r = self._lengths(x, r, c)
            return bool(tied(length, r, length_of(s, axes_of(x, self.dim, self))).any())

        found = tree.map_leaves(tie, params, *self._settings(params, control), slack)
        return any(tree.leaves_of(found))

    def check(self, params: Tree, control: Tree) -> None:  # noqa: D102
        radius, center = self._settings(params, control)
        check_setting(radius, "radius", above=0)
        check_setting(center, "center")


def length_of(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Norm along axes, which are kept; its derivative at 0 is 0."""
    square = x.real**2 + x.imag**2 if x.is_complex() else x**2
    total = square.sum(axes, keepdim=True) if axes else square
    positive = total > 0
    return torch.where(positive, torch.where(positive, total, 1).sqrt(), 0)
