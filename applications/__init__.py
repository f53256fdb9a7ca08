"""Applications built on `bilevel` as any user would build them, and what they share.

Read `errors`, `files`, `records`, `settings`, `pictures`, `options`, `command_line`.
"""
