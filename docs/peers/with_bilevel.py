import bilevel as bl
from docs.peers.ridge import DECAY, START, inner, outer

problem = bl.BilevelProblem(
    inner=lambda w, decay, batch: inner(w, decay),
    outer=lambda w, decay, batch: outer(w),
)
solver = bl.BilevelSolver(problem, bl.optim.SGD(0.1), inner_steps=100)
found = solver.hypergradient(START, DECAY)
print(found.gradient)
print(found.certificate)
