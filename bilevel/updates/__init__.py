"""One update of an outer descent: what it asks a method, what it finds, what it remembers.

Read `asking`, `accumulated`, `tasks`, `history`.
"""

from bilevel.updates.accumulated import mean_of
from bilevel.updates.history import History
from bilevel.updates.tasks import Tasks

__all__ = ["History", "Tasks", "mean_of"]
