"""How far a hypergradient can be trusted, against the minimiser or against the steps made.

Read `certificate`, then `against_steps`; `correction` is Newton's method for `against_minimiser`.
"""

from bilevel.certificates.against_minimiser import AgainstMinimiser, Constants
from bilevel.certificates.against_steps import AgainstSteps
from bilevel.certificates.certificate import Certificate, Certifier

__all__ = ["AgainstMinimiser", "AgainstSteps", "Certificate", "Certifier", "Constants"]
