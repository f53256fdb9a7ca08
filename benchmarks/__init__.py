"""Benchmarks, run by hand; each prints its table and the machine it ran on."""
