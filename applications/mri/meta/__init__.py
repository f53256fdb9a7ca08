"""Meta-training by Algorithm 3: learned weights of tasks, and transfer between them.

Read `settings`, `losses`, `agreeing_descent`, `solvers`, `learning`, `results`, `experiment`,
`transfer_results`, `transfer`, `figures`.
"""
