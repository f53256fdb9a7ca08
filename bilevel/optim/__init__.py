"""Rules of the inner iteration, named and parametrised as in `torch.optim`, differentiable.

Read `rules`, what one is; then `descent`, `proximal` and `adaptive`; `around` has rules around
rules, and `torch_rules` makes one of a `torch.optim` optimiser; `roots` are for residuals in the
place of objectives, and `given` is for solutions from elsewhere.
"""

from bilevel.optim.adaptive import Adam, AdamW
from bilevel.optim.around import ByLeaf, Clipped
from bilevel.optim.descent import SGD
from bilevel.optim.given import Given
from bilevel.optim.proximal import ProximalGradient
from bilevel.optim.roots import Anderson, FixedPoint, NewtonKrylov
from bilevel.optim.rules import InnerOptimizer
from bilevel.optim.torch_rules import like

__all__ = ["SGD", "Adam", "AdamW", "Anderson", "ByLeaf", "Clipped", "FixedPoint", "Given"]
__all__ += ["InnerOptimizer", "NewtonKrylov", "ProximalGradient", "like"]
