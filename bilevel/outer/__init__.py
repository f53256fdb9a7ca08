"""The outer loop: a control moved along its gradient by a torch optimiser.

Read `descent`, the loop; `leaves` is what it moves, `batches` what it is fed, `watching` what it
shows and says. `keep` says how a run outlives a fault, `keeping` sees to it: `running` gathers the
state, `encoding` takes it apart, and `checkpoints` writes it.
"""

from bilevel.outer.descent import Loop
from bilevel.outer.encoding import Trees
from bilevel.outer.keep import Keep, Restore
from bilevel.outer.keeping import Kept, opened
from bilevel.outer.leaves import Leaves
from bilevel.outer.signals import Interrupts
from bilevel.outer.watching import Progress

__all__ = ["Interrupts", "Keep", "Kept", "Leaves", "Loop", "Progress", "Restore", "Trees"]
__all__ += ["opened"]
