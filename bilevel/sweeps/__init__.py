"""Sweeps in the memory that one chooses: what is kept of a trajectory, where, and when.

Read `storage` (and the two slower places, `host` and `disk`), `schedule`, `checkpointing`; then
`randomness`, `block`, `determinism` and `trajectory`, which executes a schedule; `memory` measures
and plans.
"""

from bilevel.sweeps.checkpointing import Budget, Checkpointing, plan
from bilevel.sweeps.disk import OnDisk
from bilevel.sweeps.host import OnHost
from bilevel.sweeps.memory import LiveBytes, Measurement, measure
from bilevel.sweeps.randomness import is_look
from bilevel.sweeps.schedule import Schedule
from bilevel.sweeps.storage import InMemory, Snapshots, Storage

__all__ = ["Budget", "Checkpointing", "InMemory", "LiveBytes", "Measurement", "OnDisk", "OnHost"]
__all__ += ["Schedule", "Snapshots", "Storage", "is_look", "measure", "plan"]
