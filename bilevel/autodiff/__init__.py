"""The one room that differentiates, with respect to Re<., .>, as torch has gradients.

A *variable tree* is a detached alias of a tree whose variables require grad: what is computed from
it is a graph of its own, connected to nothing the caller holds. Read `junctions`, `graphs`,
`gradients`, `linearisation`, `nested`, `reversible`; `series` are junctions of several
functions.
"""

from bilevel.autodiff.gradients import (
    gradient,
    pull,
    pull_each,
    pushforward,
    rows,
    value_and_gradient,
    write_rows,
)
from bilevel.autodiff.graphs import (
    Cast,
    autocast_as,
    autocasts,
    forget_casts,
    is_on,
    is_taped,
    paused,
    recording,
    refuse_hidden,
    refuse_inside,
    told_apart,
    variables,
)
from bilevel.autodiff.junctions import Mean, meeting, seam
from bilevel.autodiff.linearisation import Linearisation
from bilevel.autodiff.nested import (
    Dims,
    Function,
    alive,
    at_places,
    followed,
    forwards_again,
    leading,
    mapped,
    member,
    placed,
    pull_at,
    pull_in,
    push_at,
    push_in,
    put,
    sheltered,
    transformed,
    undirected,
    value_and_pull_at,
    varies,
)
from bilevel.autodiff.reversible import Reversible, no_transforms, reversible
from bilevel.autodiff.series import in_turn

__all__ = [
    "Cast",
    "Linearisation",
    "Mean",
    "Reversible",
    "gradient",
    "is_on",
    "is_taped",
    "no_transforms",
    "paused",
    "pull_at",
    "push_at",
    "write_rows",
]
__all__ += ["autocast_as", "autocasts", "forget_casts", "in_turn", "meeting", "pull", "pull_each"]
__all__ += ["pushforward", "recording", "refuse_hidden", "refuse_inside", "reversible", "rows"]
__all__ += ["seam", "told_apart"]
__all__ += ["value_and_gradient", "variables"]
__all__ += ["Dims", "Function", "alive", "forwards_again", "leading", "mapped", "member", "placed"]
__all__ += [
    "at_places",
    "followed",
    "pull_in",
    "push_in",
    "put",
    "sheltered",
    "transformed",
    "undirected",
    "value_and_pull_at",
    "varies",
]
