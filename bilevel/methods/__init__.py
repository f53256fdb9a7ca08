"""The ways of finding the multipliers of an inner iteration."""
