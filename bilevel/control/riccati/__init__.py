"""Newton's method for control problems by the Riccati sweep, many problems side by side.

Read `settings`; how a problem becomes numbers: `layout`, `controls`, `mapping`, `stages`; then
`linearisation`, `box` and `sweep`, `bounds`, and the iteration: `newton`, `solving`.
"""

from bilevel.control.riccati.constraints import Constraints
from bilevel.control.riccati.settings import Riccati

__all__ = ["Constraints", "Riccati"]
