"""The outer loop: a control moved along its gradient by a torch optimiser.

Read `descent`, the loop; `leaves` is what it moves, `batches` what it is fed, `watching` what it
shows and says.
"""

from bilevel.outer.descent import Loop
from bilevel.outer.leaves import Leaves
from bilevel.outer.watching import Progress

__all__ = ["Leaves", "Loop", "Progress"]
