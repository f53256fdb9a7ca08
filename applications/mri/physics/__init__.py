"""The physics of a scan: transforms, masks, coils, and what their data have in common.

Read `masks`, `operators`, `measured`, `coil_counts`, `consistency`, `wavelets`, `l1_spirit`.
"""
