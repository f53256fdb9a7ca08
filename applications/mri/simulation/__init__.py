"""Multi-coil scans simulated from magnitude images.

Read `anatomy`, `coils`, `local_phase`, `simulate`, `views`, `phantoms`.
"""
