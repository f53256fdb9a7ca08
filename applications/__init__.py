"""Applications built on `bilevel` as any user would build them."""
