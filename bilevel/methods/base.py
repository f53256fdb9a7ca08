"""What a method for hypergradients is, and what it answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from bilevel.autodiff import Linearisation
from bilevel.linear.operator import LinearResult
from bilevel.methods.instance import Instance, OuterGradient, Warm
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False)
class Truncation:
    """What a method left out of the sum (8) over the inner steps.

    Attributes:
        steps: inner steps whose terms were left out.
        error: bound of the norm of what they add up to, relative to that of the whole
            hypergradient; None if nothing is known about it.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> zero, three = torch.tensor(0.0), torch.tensor(3.0)
        >>> instance = Instance(problem, bl.optim.SGD(0.5), 40, params=zero, control=three)
        >>> bl.MLM(last=10).find(instance).truncation.steps  # of 40, 10 were swept
        30
    """

    steps: int
    error: float | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a method knows of its error without second derivatives.

    Attributes:
        better: a hypergradient of the next order.
        unsettled: what further inner steps would still change, as the last ones tell.
        residual: relative residual of the worst inner problem.
        rounding: what part of the differences that tell the multiplier is rounding.
        reason: why the comparison says nothing; empty if it does.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> zero, three = torch.tensor(0.0), torch.tensor(3.0)
        >>> instance = Instance(problem, bl.optim.SGD(0.5), 40, params=zero, control=three)
        >>> found = bl.Penalty().find(instance)
        >>> abs(float(found.compare().better) - 4) < 0.1  # 2 (a - 1)
        True
    """

    better: Tree
    unsettled: Tree
    residual: float
    rounding: float = 0.0
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Found:
    """What a method answers; everything detached.

    Attributes:
        value: F at the inner solution that was reached.
        gradient: the hypergradient, the structure of the control.
        warm: where the inner iteration came to.
        outer: F and its gradients at the last params, where they were taken.
        linear: how the linear system was solved, where there was one.
        linearisation: of the residual at the last params, where it was built.
        truncation: what was left out; None if nothing was.
        flaw: why the gradient is not that of the problem, whatever it is judged against; empty if
            nothing speaks against it.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> zero, three = torch.tensor(0.0), torch.tensor(3.0)
        >>> instance = Instance(problem, bl.optim.SGD(0.5), 40, params=zero, control=three)
        >>> found = bl.Implicit().find(instance)
        >>> found.value, found.gradient, found.linear.converged
        (tensor(4.), tensor(4.), True)
    """

    value: Tensor
    gradient: Tree
    warm: Warm
    outer: OuterGradient | None = None
    linear: LinearResult | None = None
    linearisation: Linearisation | None = None
    truncation: Truncation | None = None
    flaw: str = ""
    compare: Callable[[], Comparison] | None = None


class HypergradientMethod(ABC):
    """How the multipliers of the inner iteration are found; a frozen dataclass.

    Example:
        A method of one's own, here that of another under a clock:

        >>> import dataclasses, time, torch, bilevel as bl
        >>> @dataclasses.dataclass(frozen=True)
        ... class Timed(HypergradientMethod):
        ...     method: HypergradientMethod
        ...
        ...     def find(self, instance):
        ...         begun = time.perf_counter()
        ...         found = self.method.find(instance)
        ...         print("more than 0 s:", time.perf_counter() > begun)
        ...         return found
        >>> problem = bl.BilevelProblem(
        ...     inner=lambda w, a, batch: (w - a) ** 2 / 2,
        ...     outer=lambda w, a, batch: (w - 1) ** 2,
        ... )
        >>> solver = bl.BilevelSolver(
        ...     problem, bl.optim.SGD(0.5), inner_steps=40, method=Timed(bl.MLM())
        ... )
        >>> solver.hypergradient(torch.tensor(0.0), torch.tensor(3.0)).gradient
        more than 0 s: True
        tensor(4.)
    """

    # Whether it differentiates or makes inner steps of its own, beside those to the solution.
    steps: ClassVar[bool] = True
    needs_objective: ClassVar[bool] = False  # whether it evaluates the inner objective itself

    @abstractmethod
    def find(self, instance: Instance) -> Found:
        """The hypergradient.

        Args:
            instance: problem, point and batches.

        Returns:
            It, and what was reached on the way.

        Raises:
            LostGradientError: if nothing reads a part of the control.
            ArgumentError: if the method does not apply to the instance.
        """

    def find_each(self, instances: Sequence[Instance]) -> list[Found]:
        """Those of several outer objectives of one inner iteration, which is made once.

        Args:
            instances: alike but for their outer objectives.

        Returns:
            One answer each.
        """
        first, *others = instances
        made = replace(first, known=first.iterated)
        return [self.find(made), *(self.find(replace(x, known=made.known)) for x in others)]

    @property
    def sees_steps(self) -> bool:
        """Whether it differentiates every inner step, and so what is counted on the way."""
        return False
