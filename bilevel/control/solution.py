"""What a solver of control problems returns."""

from dataclasses import dataclass

from torch import Tensor, nn

from bilevel.control.adjoint import Adjoint
from bilevel.control.lagrangian import KKT
from bilevel.dynamics.modules import load_into
from bilevel.records import Record
from bilevel.tree import Tree


@dataclass(frozen=True, eq=False, repr=False)
class ConstraintReport(Record):
    """How constraints are met; with a batch, with a leading axis.

    At a solution the derivative of J and the multipliers times the constraints vanishes. A
    multiplier says by how much J falls if its constraint is loosened by one.

    Attributes:
        inequality: multipliers, shape ``(T, k)``, not negative.
        equality: multipliers, ``(T, k)``.
        end_inequality: multipliers, ``(k,)``.
        end_equality: multipliers, ``(k,)``.
        violation: the largest.
        weight: of squared violations, at the end.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.ControlProblem(
        ...     bl.Map(lambda u, c, t: u + c),
        ...     lambda u, c: ((u - 2) ** 2).sum(),
        ...     horizon=2,
        ...     running=lambda u, c, t: 0.1 * (c**2).sum(),
        ... )
        >>> limits = bl.control.Constraints(end_equality=lambda u, c: u - 1)
        >>> solver = bl.ControlSolver(problem, bl.Riccati(constraints=limits))
        >>> zero = torch.zeros(1, dtype=torch.float64)
        >>> found = solver.solve(bl.PerStep([zero, zero]), zero)
        >>> found.adjoint.final_state, bool(found.constraints.violation < 1e-6)
        (tensor([1.0000], dtype=torch.float64), True)
    """

    inequality: Tensor
    equality: Tensor
    end_inequality: Tensor
    end_equality: Tensor
    violation: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class ControlSolution(Record):
    """The control found, and how.

    Attributes:
        control: the last control, detached.
        cost: J at the last control; with batches, as last evaluated, NaN if never.
        gradient_norm: norm of (8) at the last control; with batches, as last evaluated.
        costs: J before each update.
        gradient_norms: of (8), before each update.
        steps: updates made.
        converged: whether the gradient norm came down to the tolerance.
        reason: why it ended, in words.
        adjoint: states, multipliers and gradient at the last control; None with batches. With
            replicas states and multipliers are those of this process.
        kkt: residuals of the optimality conditions (5a-c) there; None with batches or replicas.
        products: of the Hessian, in each iteration of `NewtonCG`; None by another optimiser.
        shifts: of the Hessian before each update; None but by `Riccati`.
        constraints: their multipliers and violation; None without. With them, gradient and
            multipliers are those of the Lagrangian that the constraints are a part of.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.ControlProblem(
        ...     bl.Map(lambda u, c, t: u + c), lambda u, c: (u - 3) ** 2, horizon=3
        ... )
        >>> found = bl.ControlSolver(problem, bl.NewtonCG()).solve(
        ...     torch.tensor(0.0), torch.tensor(0.0), steps=20, tolerance=1e-5
        ... )
        >>> found.control, found.converged, found.kkt.stationarity < 1e-5
        (tensor(1.), True, True)
    """

    control: Tree
    cost: float
    gradient_norm: float
    costs: list[float]
    gradient_norms: list[float]
    steps: int
    converged: bool
    reason: str
    adjoint: Adjoint | None
    kkt: KKT | None
    products: list[int] | None = None
    shifts: list[float] | None = None
    constraints: ConstraintReport | None = None

    def load_into(self, model: nn.Module) -> None:
        """Copy the control, params of `functional(model)`, into the model.

        Args:
            model: whose parameters they are; frozen ones and buffers stay.

        Raises:
            StructureError: if names, shapes or dtypes differ; then nothing is copied. A `PerStep`
                goes back into its modules by `Phases.load`.
        """
        load_into(model, self.control, "control")


@dataclass(frozen=True, eq=False, repr=False)
class BatchSolution(Record):
    """What `Riccati(batched=True)` found of B problems; fields as in `ControlSolution`.

    Attributes:
        control: the last controls, with a leading axis.
        cost: J of each, shape ``(B,)``.
        gradient_norm: norm of (8), of what bounds leave free, ``(B,)``.
        costs: before each round of updates, ``(B,)`` each.
        gradient_norms: the same of the gradients.
        steps: updates that each made, ``(B,)``.
        converged: which ones are at a minimum, ``(B,)``.
        reason: why each ended, in words.
        adjoint: states, multipliers and gradients, with a leading axis; None if something else
            ended the solve.
        kkt: residuals of the optimality conditions, of all problems together; None likewise.
        shifts: of the Hessians before each round of updates, ``(B,)`` each.
        constraints: their multipliers and violation; None without.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.ControlProblem(
        ...     bl.Map(lambda u, c, t: u + c),
        ...     lambda u, c: ((u - 1) ** 2).sum(),
        ...     horizon=2,
        ...     running=lambda u, c, t: 0.5 * (c**2).sum(),
        ... )
        >>> solver = bl.ControlSolver(problem, bl.Riccati(batched=True))
        >>> starts = torch.tensor([[0.0], [1.0], [3.0]])
        >>> found = solver.solve(bl.PerStep([torch.zeros(3, 1)] * 2), starts)
        >>> found.converged, found.cost
        (tensor([True, True, True]), tensor([0.2000, 0.0000, 0.8000]))
    """

    control: Tree
    cost: Tensor
    gradient_norm: Tensor
    costs: list[Tensor]
    gradient_norms: list[Tensor]
    steps: Tensor
    converged: Tensor
    reason: list[str]
    adjoint: Adjoint | None
    kkt: KKT | None
    shifts: list[Tensor]
    constraints: ConstraintReport | None
