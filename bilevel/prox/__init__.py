"""Proximal operators: the part of an inner objective that need not be smooth."""

from bilevel.prox.operators import L1, L2, Box, Prox

__all__ = ["L1", "L2", "Box", "Prox"]
