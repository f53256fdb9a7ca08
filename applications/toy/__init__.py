"""Classification with cross-entropy: weights of tasks and samples, learned by bilevel descent.

Read `idx`, `data`, `models`, `tasks`, `task_results`, `task_weights`, `cleaning`, `hyper_cleaning`,
`figures`, `cli`.
"""
