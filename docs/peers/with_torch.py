import torch

from docs.peers.ridge import DECAY, START, inner, outer

decay = DECAY.clone().requires_grad_()
w = START.clone().requires_grad_()
for _ in range(100):
    (slope,) = torch.autograd.grad(inner(w, decay), w, create_graph=True)
    w = w - 0.1 * slope
print(torch.autograd.grad(outer(w), decay)[0])
