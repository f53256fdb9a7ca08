import torch
import torchopt

from docs.peers.ridge import DECAY, START, inner, outer

stationary = torch.func.grad(lambda w, decay: inner(w, decay))
linear = torchopt.linear_solve.solve_cg(rtol=1e-8)


@torchopt.diff.implicit.custom_root(stationary, argnums=1, solve=linear)
def solve(w, decay):
    for _ in range(100):
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            (slope,) = torch.autograd.grad(inner(w, decay), w)
        w = (w - 0.1 * slope).detach()
    return w


decay = DECAY.clone().requires_grad_()
print(torch.autograd.grad(outer(solve(START, decay)), decay)[0])
