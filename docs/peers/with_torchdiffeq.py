import torch
from torchdiffeq import odeint_adjoint


class Pendulum(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.damping = torch.nn.Parameter(torch.tensor(0.3).double())

    def forward(self, time, state):
        angle, speed = state
        return speed, -torch.sin(angle) - self.damping * speed


model = Pendulum()
state = (torch.tensor(1.0).double(), torch.tensor(0.0).double())
times = torch.tensor([0.0, 4.0]).double()
options = {"step_size": 0.1}
angle, speed = odeint_adjoint(
    model, state, times, method="midpoint", options=options
)
angle[-1].square().backward()
print(model.damping.grad)
