"""prox."""
