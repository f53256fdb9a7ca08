"""How well a cleaner finds the wrong labels."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cleaning:
    """Weights of samples against the truth.

    Attributes:
        f1: harmonic mean of precision and recall of "weight below one half" as the verdict that a
            label is wrong; 1 is perfect.
        precision: share of wrong labels among those so judged.
        recall: share so judged of the wrong labels.
        wrong_mass: share of the total weight that lies on wrong labels.
    """

    f1: float
    precision: float
    recall: float
    wrong_mass: float


def judge(weights: Tensor, wrong: Tensor) -> Cleaning:
    """Compares weights with the truth.

    Args:
        weights: of the samples, shape ``(n,)``, in [0, 1].
        wrong: whose labels are wrong, shape ``(n,)``, bool.

    Returns:
        The figures; a ratio of nothing to nothing is 1 where nothing was missed.
    """
    judged = weights < 0.5
    hits, n_judged, n_wrong = (int(x.sum()) for x in (judged & wrong, judged, wrong))
    return Cleaning(
        2 * hits / (n_judged + n_wrong) if n_judged + n_wrong else 1.0,
        hits / n_judged if n_judged else 1.0,
        hits / n_wrong if n_wrong else 1.0,
        float(weights[wrong].sum() / weights.sum()),
    )
