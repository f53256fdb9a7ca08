"""Images of trained networks and of classical methods, and what they are worth.

Read `metrics`, `baselines`, `bart`, `methods`, `scoring`, `verdicts`, `scan_slices`,
`scanning`, `figures`, `kept`.
"""
