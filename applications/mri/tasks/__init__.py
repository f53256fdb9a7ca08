"""Tasks: scans by role, each with a sampling, from a list that a user writes."""
