"""The estimate of `against_minimiser` in numbers: whole, leaf by leaf, and column by column."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from bilevel import tree
from bilevel.certificates.correction import Correction, Point, distance, ratio, smallest
from bilevel.certificates.curvature import Curvature
from bilevel.linear.operator import LinearResult
from bilevel.methods.instance import Instance
from bilevel.tree import Tree

NEGLIGIBLE = 1e-6  # of the whole hypergradient: a leaf whose true derivative is zero

Part = Callable[[Tree], Tree]  # of a vector of the space of the control


@dataclass(frozen=True, eq=False)
class Judged:
    """What the certificate is made of.

    Attributes:
        size: norm of h.
        error: e.
        missed: E1.
        corrected: h+.
        unsolved_effect: what is left of the system for q+ does to h+, relative.
        by_part: relative error of each leaf and column, where there is more than one.
        small: parts that are negligible beside the whole, error included.
        adjoint: norm of q+.
        unsolved: norm of b - J^* q+ at the params.
        beside: norm of h - (d - C^* q+) there.
    """

    size: float
    error: float
    missed: float
    corrected: Tree
    unsolved_effect: float
    by_part: dict[str, float]
    small: set[str]
    adjoint: float
    unsolved: float
    beside: float

    @property
    def corrected_size(self) -> float:
        """Norm of h+."""
        return tree.norm(self.corrected)

    @property
    def estimate(self) -> float:
        """Of the relative error of the whole; none where there is nothing to be wrong."""
        if not self.error + self.missed:
            return 0.0
        return ratio(self.error + self.missed, self.corrected_size - self.missed)

    def untrusted(self, trust: float) -> tuple[str, float] | None:
        """The worst part whose error is above `trust`, if there is one."""
        bad = {n: e for n, e in self.by_part.items() if not e <= trust and n not in self.small}
        name = max(bad, key=lambda n: bad[n], default="")
        return (name, bad[name]) if bad else None


def judge(
    here: Point, moved: Correction, solved: LinearResult, curvature: Curvature, h: Tree
) -> Judged:
    """The estimate, from h and its correction."""
    there, q = moved.point, solved.solution
    (b, d), (b_new, d_new) = here.outer, there.outer
    applied, pulled, pulled_new = here.transposed.apply(q), here.mixed(q), there.mixed(q)
    corrected = tree.subtract(d_new, pulled_new)
    left = tree.subtract(b_new, there.transposed.apply(q))  # computed: solvers track, and drift
    # J_+^* q_+ is b_+ but for the residual, which is counted beside it.
    change = distance(b_new, b) + distance(b_new, applied)
    mu = min(moved.convexity, smallest(solved, b_new))
    length = distance(there.params, here.params)
    further = ratio(there.size, mu * length) if length else 0.0
    flat, shift = _along_flattest(there, curvature, left)
    if length and shift > 0:
        further = max(further, shift / length)
    size, coupled = there.coupling(pulled_new)
    slope, bent = tree.subtract(d_new, d), tree.subtract(pulled_new, pulled)

    def through(part: Part) -> float:  # |C_+| / mu
        return ratio(tree.norm(part(coupled)), size * mu) if size else 0.0

    def left_over(part: Part) -> float:
        return through(part) * tree.norm(left) + tree.norm(part(flat))

    def missed(part: Part) -> float:
        changes = tree.norm(part(slope)) + tree.norm(part(bent))
        return further * (changes + through(part) * change) + left_over(part)

    difference, whole = tree.subtract(h, corrected), tree.norm(corrected)
    by_part, small = {}, set()
    for name, part in parts(here.instance):
        error, own, e1 = tree.norm(part(difference)), tree.norm(part(corrected)), missed(part)
        by_part[name] = ratio(error + e1, own - e1) if error + e1 else 0.0
        if own + error + e1 <= NEGLIGIBLE * whole:
            small.add(name)
    return Judged(
        tree.norm(h),
        tree.norm(difference),
        missed(_whole),
        corrected,
        ratio(left_over(_whole), whole),
        by_part,
        small,
        tree.norm(q),
        distance(b, applied),
        distance(h, tree.subtract(d, pulled)),
    )


def _along_flattest(there: Point, curvature: Curvature, left: Tree) -> tuple[Tree, float]:
    """What the flattest direction met hides: its part of h+, and how far the params may be off."""
    # A solve that begins at b may never see a direction in which b has hardly a part, and the
    # smallest eigenvalue with it; what is left there is divided by that eigenvalue.
    v = curvature.vector
    if v is None:
        return tree.map_leaves(lambda _: None, there.instance.control), 0.0
    value = max(abs(curvature.smallest), there.eps * curvature.largest) or 1.0
    factor = float(tree.inner(v, left)) / value
    flat = tree.map_leaves(lambda x: None if x is None else x * factor, there.mixed(v))
    # In a direction that is flat, as along the orbit of a symmetry, no distance is defined.
    seen = curvature.smallest > math.sqrt(there.eps) * curvature.largest
    return flat, abs(float(tree.inner(v, there.residual.value))) / value if seen else 0.0


def _whole(vector: Tree) -> Tree:
    return vector


def parts(instance: Instance) -> Iterator[tuple[str, Part]]:
    """The leaves of the control, and the columns of those that have one each."""
    control, columns = instance.control, instance.problem.columns
    leaves = tree.leaves_of(control)
    for i, (name, leaf) in enumerate(zip(tree.leaf_names(control, "control"), leaves, strict=True)):
        if not tree.is_variable(leaf):
            continue
        yield name, lambda vector, i=i: tree.leaves_of(vector)[i]
        if columns is not None and leaf.ndim > 1 and leaf.shape[-1] == columns:
            for j in range(columns):
                yield f"{name}[..., {j}]", lambda vector, i=i, j=j: _column(vector, i, j)


def _column(vector: Tree, i: int, j: int) -> Tensor | None:
    leaf = tree.leaves_of(vector)[i]
    return None if leaf is None else leaf[..., j]
