"""Rules of the inner iteration, named and parametrised as in `torch.optim`, differentiable.

Read `rules`, what one is; then `descent` and `adaptive`.
"""

from bilevel.optim.adaptive import Adam, AdamW
from bilevel.optim.descent import SGD, ProximalGradient
from bilevel.optim.rules import InnerOptimizer

__all__ = ["SGD", "Adam", "AdamW", "InnerOptimizer", "ProximalGradient"]
