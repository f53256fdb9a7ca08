"""The command line `bilevel-mri`.

Read `shared`, `demo`, `scans`, `train`, `meta`, `app`.
"""
