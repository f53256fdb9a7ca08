"""The outer loop: a control moved along its gradient by a torch optimiser.

Read `descent`, the loop; `watching` is what it shows and says.
"""

from bilevel.outer.descent import Loop
from bilevel.outer.watching import Progress

__all__ = ["Loop", "Progress"]
