"""The one room that differentiates, with respect to Re<., .>, as torch has gradients.

A *variable tree* is a detached alias of a tree whose variables require grad: what is computed from
it is a graph of its own, connected to nothing the caller holds. Read `graphs`, `gradients`,
`linearisation`, `reversible`.
"""

from bilevel.autodiff.gradients import gradient, pull, pushforward, value_and_gradient
from bilevel.autodiff.graphs import (
    is_taped,
    paused,
    recording,
    refuse_hidden,
    told_apart,
    variables,
)
from bilevel.autodiff.linearisation import Linearisation
from bilevel.autodiff.reversible import Reversible, no_transforms, reversible

__all__ = ["Linearisation", "Reversible", "gradient", "is_taped", "no_transforms", "paused"]
__all__ += ["pull", "pushforward", "recording", "refuse_hidden", "reversible", "told_apart"]
__all__ += ["value_and_gradient", "variables"]
