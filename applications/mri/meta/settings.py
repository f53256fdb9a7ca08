"""How a network and its task weights are trained."""

from dataclasses import dataclass, field
from enum import StrEnum

import bilevel as bl
from applications.errors import InputError
from applications.mri.network.reconstruction import Loss
from applications.mri.training.precision import check_device
from applications.settings import MOST_RATE, Method, Written, check_counts, check_positive, setting


class Ablation(StrEnum):
    """How training tasks are weighed."""

    UNIFORM = "uniform"
    VECTOR = "vector"
    MATRIX = "matrix"
    PENALTY = "penalty"


class Rule(StrEnum):
    """How the weights of the network move."""

    ADAM = "adam"
    HEAVY_BALL = "heavy-ball"
    SGD = "sgd"

    def at(self, step_size: float | bl.ByStep) -> bl.optim.InnerOptimizer:
        """The optimiser of the library."""
        match self:
            case Rule.ADAM:
                return bl.optim.Adam(step_size, (0.9, 0.99))
            case Rule.HEAVY_BALL:
                return bl.optim.SGD(step_size, momentum=0.9)
            case Rule.SGD:
                return bl.optim.SGD(step_size)


@dataclass(frozen=True)
class MetaSettings:
    """How to train.

    Attributes:
        seconds: time of one training [s]; None: as long as the evaluations take.
        evaluations: network losses of one slice that one training evaluates, those of sweeps
            included; None: as many as the seconds allow. Trainings compared share one budget.
        method: how hypergradients are found.
        optimizer: of the network.
        inner_steps: k, of the network an update of the task weights.
        learning_rate: of the network at its peak; it rises over `warmup` steps, and falls as a
            cosine of the share of the budget that is spent.
        warmup: inner steps.
        outer_rate: length of a step of alpha at most, see `agreeing_descent`.
        outer_clip: norm of a hypergradient, relative to the outer objective, from which on a step
            has that length; of shorter ones it is in proportion.
        learn_share: share of the budget in which alpha moves; in the rest the network is trained
            with the task weights as they are, which costs half as much a step. The penalty method
            moves both to the end.
        batch: slices a task in a minibatch.
        crop: image rows of a training slice [pixels], 0: all.
        entropy: of `bilevel.TaskWeights`.
        floor: the least weight of a task, of `bilevel.TaskWeights`.
        penalty: lambda of the penalty method.
        penalty_rate: of Adam on alpha, in the penalty method.
        loss: weights of the terms of a training loss.
        checkpointing: of the sweeps through the phases, and of MLM through the inner steps.
        seed: of minibatches.
        device: where to train, as torch names it: `"cpu"`, `"cuda"`, `"cuda:1"`.

    Raises:
        InputError: if nothing limits the training, or a setting is out of range.
    """

    seconds: float | None = setting(None, "Of each training, at most.")
    evaluations: int | None = setting(
        None, "Losses of a slice that each training evaluates, at most."
    )
    method: Method = setting(Method.MLM, "Of hypergradients.")
    optimizer: Rule = setting(Rule.ADAM, "Of the network.")
    inner_steps: int = setting(5, "Of the network an update.", least=1)
    learning_rate: float = setting(3e-3, "Of the network at its peak.")
    warmup: int = 20
    outer_rate: float = setting(0.7, "Length of a step of the task weights at most.")
    outer_clip: float = setting(0.1, "Relative hypergradient whose step has that length.")
    learn_share: float = setting(0.2, "Of the budget, in which task weights move.")
    batch: int = setting(1, "Slices a task in a minibatch.", least=1)
    crop: int = setting(32, "Rows of a training crop, 0: none.", least=0)
    entropy: float = setting(0.0, "Reward of spread weights.", least=0)
    floor: float = setting(0.0, "Least weight of a task.", least=0)
    penalty: float = setting(1.0, "lambda of the penalty method.")
    penalty_rate: float = setting(0.1, "Of Adam on its task weights.")
    loss: Loss = field(default_factory=Loss)
    checkpointing: bl.Checkpointing = setting(
        bl.Checkpointing,
        "Keep the graphs of all phases: faster, and more memory.",
        name="keep_graphs",
        written=Written(
            bool, False, lambda keep: bl.Checkpointing(block=None) if keep else bl.Checkpointing()
        ),
    )
    seed: int = setting(0, "Of everything that is random.")
    device: str = setting("cpu", "Where to train, cpu or cuda.")

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.seconds is None and self.evaluations is None:
            raise InputError("a training needs a budget, seconds or evaluations, got neither.")
        check_device(self.device)
        given = [x for x in ("seconds", "evaluations") if getattr(self, x) is not None]
        check_positive(self, *given, "outer_clip", "penalty")
        check_positive(self, "learning_rate", "outer_rate", "penalty_rate", most=MOST_RATE)
        check_counts(self, "inner_steps", "batch")
        if not 0 < self.learn_share <= 1:
            raise InputError(f"learn_share must be > 0 and <= 1, got {self.learn_share}.")
        if self.crop < 0 or self.warmup < 0:
            raise InputError(f"crop and warmup must be >= 0, got {self.crop} and {self.warmup}.")
