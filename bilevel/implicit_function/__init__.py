"""Any solution as a function that autograd and `torch.func` differentiate.

Read `question`, `systems`, `equations`, `function`.
"""

from bilevel.implicit_function.function import implicit

__all__ = ["implicit"]
