"""How hypergradients are found, as the command lines name it."""

from enum import StrEnum

import bilevel as bl


class Method(StrEnum):
    """How hypergradients are found."""

    IMPLICIT = "implicit"
    MLM = "mlm"
    UNROLLED = "unrolled"
    ONE_STEP = "one-step"

    @property
    def chosen(self) -> bl.methods.HypergradientMethod:
        """The method of the library."""
        methods = {
            Method.IMPLICIT: bl.Implicit(bl.linear.CG(rtol=1e-3)),
            Method.MLM: bl.MLM(),
            Method.UNROLLED: bl.Unrolled(),
            Method.ONE_STEP: bl.OneStep(),
        }
        return methods[self]
