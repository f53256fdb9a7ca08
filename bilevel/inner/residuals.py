"""Residuals in the place of an inner objective, checked."""

from torch import Tensor

from bilevel import autodiff, tree
from bilevel.errors import StructureError
from bilevel.tree import Tree

NAME = "the inner residual"


def values(found: Tree, params: Tree, control: Tree) -> Tree:
    """A residual as a vector of the space of the params.

    Args:
        found: what the user's function returned.
        params: where it was evaluated.
        control: with which.

    Returns:
        The same, with None where the params have no variable.

    Raises:
        StructureError: if it is no tree like the params.
        LostGradientError: if it uses a tensor that requires grad and is no argument.
    """
    leaves, structure = tree.flatten(found)
    wanted, expected = tree.flatten(params)
    if structure == expected:
        kept = [y if tree.is_variable(x) else None for x, y in zip(wanted, leaves, strict=True)]
        like = [x if tree.is_variable(x) else None for x in wanted]
        if tree.alike(kept, like):
            # Where an argument has a graph of its own, whoever differentiates it looks.
            if not autodiff.is_taped((params, control)):
                autodiff.refuse_hidden(found, (), NAME)
            return tree.unflatten(structure, kept)
    counted = [
        sum(x.numel() for x in each if isinstance(x, Tensor) and tree.is_variable(x))
        for each in (leaves, wanted)
    ]
    few = "fewer" if counted[0] < counted[1] else "more"
    number = f"{counted[0]} equations for {counted[1]} unknowns, {few} than needed: "
    raise StructureError(
        f"{NAME} must return a tree like the params, "
        f"{number if counted[0] != counted[1] else ''}{tree.map_leaves(tree.kind, params)}, got "
        f"{tree.map_leaves(tree.kind, found)}."
    )
