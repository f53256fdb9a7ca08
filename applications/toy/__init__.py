"""Classification with cross-entropy: weights of tasks and of samples, learned by bilevel descent."""
