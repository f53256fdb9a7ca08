"""Random vectors of a space of trees, and steps for differences."""

import torch

from bilevel import tree
from bilevel.tree import Tree


def random_like(values: Tree, generator: torch.Generator) -> Tree:
    """A vector of the space of `values` with normal entries, drawn on the CPU."""
    return tree.map_leaves(
        lambda x: (
            torch.randn(x.shape, dtype=x.dtype, generator=generator, device="cpu").to(x.device)
            if tree.is_variable(x)
            else None
        ),
        values,
    )


def unit_like(values: Tree, generator: torch.Generator) -> Tree:
    """A random vector of norm 1."""
    vector = random_like(values, generator)
    size = tree.norm(vector)
    return tree.map_leaves(lambda x: None if x is None else x / size, vector)


def difference_step(control: Tree) -> float:
    """Where rounding and curvature weigh alike in a central difference."""
    return eps_of(control) ** (1 / 3) * max(1.0, tree.norm(control))


def eps_of(values: Tree) -> float:
    """Rounding of the coarsest dtype in a tree."""
    return max(torch.finfo(x.dtype).eps for x in tree.leaves_of(values) if tree.is_variable(x))
