"""Images of trained networks and of classical methods, and what they are worth.

Read `metrics`, `baselines`, `methods`, `scoring`, `scanning`, `figures`, `kept`.
"""
