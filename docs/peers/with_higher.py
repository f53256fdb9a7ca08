import higher
import torch

from docs.peers.ridge import DECAY, START, inner, outer


class Weights(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(START.clone())

    def forward(self, decay):
        return inner(self.w, decay)


decay = DECAY.clone().requires_grad_()
model = Weights()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
    for _ in range(100):
        diffopt.step(fmodel(decay))
    (w,) = fmodel.parameters()
    print(torch.autograd.grad(outer(w), decay)[0])
