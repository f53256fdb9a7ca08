"""Every choice a user can make, for tests that are the product of cases and choices."""

import tempfile

import pytest
import torch

import bilevel as bl

# Files of sweeps appear here for as long as a sweep runs; the tests of storage look for leftovers.
FOLDER = tempfile.gettempdir()

CHECKPOINTINGS = [
    bl.Checkpointing(),
    bl.Checkpointing(block=None),
    bl.Checkpointing(snapshots=1),
    bl.Checkpointing(snapshots=2),
    bl.Checkpointing(snapshots=1, block=2),
    bl.Checkpointing(snapshots=2, block=2, storage=bl.OnHost()),
    bl.Checkpointing(block=3),
    bl.Checkpointing(snapshots=2, storage=bl.OnDisk(FOLDER)),
    bl.Checkpointing(block=2, storage=bl.OnDisk(FOLDER)),
    bl.Checkpointing(block=100),
]

# One for each way through a sweep, for what does not depend on the schedule: steps advanced and
# then taped one at a time; all of them taped on the way forward; several blocks of several steps,
# reached again from snapshots kept elsewhere; a short block advanced and a long one taped at once.
PATHS = [CHECKPOINTINGS[i] for i in (0, 1, 5, 6)]


def covering(cases, every):
    """Cases with checkpointings; the rest of the product is `slow`.

    A case and a schedule meet in three places only: where a step is advanced or taped, where states
    inside a block are told apart, and where one is stored. So each case is swept by the first three
    ways of `PATHS`, and the cases `every` by all: `TELLING` in one test of a sweep that is reversed
    at once and in one of a sweep kept for later, one case where more is asked of the same sweeps.
    """
    return [
        pytest.param(
            case,
            checkpointing,
            marks=[] if case in every or checkpointing in PATHS[:3] else pytest.mark.slow,
            id=f"{case!r}-{checkpointing!r}",
        )
        for case in cases
        for checkpointing in CHECKPOINTINGS
    ]


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.02),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.02, maximize=True),
}


def lbfgs(parameters):
    """Until the cost changes no more; that finds a minimiser to half the digits of float64."""
    return torch.optim.LBFGS(
        parameters,
        max_iter=100,
        history_size=60,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )
