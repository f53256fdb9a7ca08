"""Rules of the inner iteration, named and parametrised as in `torch.optim`, differentiable.

Read `rules`, what one is; then `descent` and `adaptive`; `roots`, for residuals in the place of
objectives; `given`, for solutions from elsewhere.
"""

from bilevel.optim.adaptive import Adam, AdamW
from bilevel.optim.descent import SGD, ProximalGradient
from bilevel.optim.given import Given
from bilevel.optim.roots import Anderson, FixedPoint, NewtonKrylov
from bilevel.optim.rules import InnerOptimizer

__all__ = ["SGD", "Adam", "AdamW", "Anderson", "FixedPoint", "Given", "InnerOptimizer"]
__all__ += ["NewtonKrylov", "ProximalGradient"]
