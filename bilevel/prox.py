"""Proximal operators (placeholder until the branch lands)."""

from abc import ABC


class Prox(ABC):
    """Proximal operator."""
