"""Rules of the inner iteration, named and parametrised as in `torch.optim`, differentiable.

Read `rules`, what one is; then `descent`, `proximal` and `adaptive`; `around` has rules around
rules, and `torch_rules` makes one of a `torch.optim` optimiser.
"""

from bilevel.optim.adaptive import Adam, AdamW
from bilevel.optim.around import ByLeaf, Clipped
from bilevel.optim.descent import SGD
from bilevel.optim.proximal import ProximalGradient
from bilevel.optim.rules import InnerOptimizer
from bilevel.optim.torch_rules import like

__all__ = ["SGD", "Adam", "AdamW", "ByLeaf", "Clipped", "InnerOptimizer", "ProximalGradient"]
__all__ += ["like"]
