"""Files from strangers: valid ones, how they are spoiled, and what becomes of them when read.

Read `valid`, `spoiled`, `invented`, `judged`; `benchmarks.fuzz` runs many of them.
"""
