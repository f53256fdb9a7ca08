"""The command line `bilevel-mri`.

Read `shared`, `demo_figure`, `demo`, `reports`, `scans`, `train`, `meta`, `app`.
"""
