"""The problem as the modules that some peers want."""

from collections.abc import Callable

from torch import Tensor, nn

from benchmarks.ridge import Problem

Run = Callable[[], Tensor]


class Weights(nn.Module):
    """The inner variable as a module whose forward is the inner objective."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem, self.w = problem, nn.Parameter(problem.start)

    def forward(self, alpha: Tensor) -> Tensor:
        return self.problem.inner(self.w, alpha)


class Penalty(nn.Module):
    """The control as a module."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.alpha = nn.Parameter(problem.alpha.clone())

    def forward(self) -> Tensor:
        return self.alpha
