"""Classification with cross-entropy: weights of tasks and samples, learned by bilevel descent."""
