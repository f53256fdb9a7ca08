"""Multi-coil scans simulated from magnitude images.

Read `anatomy`, `coils`, `simulate`, `views`, `phantoms`.
"""
