"""One solve on several processes: batches split over them, inner params in parts.

Read `wire` (who talks, and what happens when one falls silent), `agreement` (whether all hold the
same), `replicas`; `parts`, `portions` (batches) and `objectives`.
"""

from bilevel.parallel.objectives import Alone, Averaged, check_mean, refuse_shards, shared
from bilevel.parallel.portions import Portion, Shares, own
from bilevel.parallel.replicas import Replicas, decided, together

__all__ = ["Alone", "Averaged", "Portion", "Replicas", "Shares", "check_mean", "decided", "own"]
__all__ += ["refuse_shards", "shared", "together"]
