import logging

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.logging.logger_base import get_logger
from betty.problems import ImplicitProblem

from docs.peers.ridge import DECAY, START, inner, outer

get_logger().setLevel(logging.ERROR)


class Tensor(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(value.clone())

    def forward(self):
        return self.value


class Outer(ImplicitProblem):
    def get_batch(self):
        return ()

    def training_step(self, batch):
        return outer(self.inner())

    def custom_optimizer_step(self):
        print(self.module.value.grad)


class Inner(ImplicitProblem):
    def get_batch(self):
        return ()

    def training_step(self, batch):
        return inner(self(), self.outer())


def made(kind, name, value, config):
    module = Tensor(value)
    return kind(
        name=name,
        config=config,
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        train_data_loader=[None],
    )


up = made(Outer, "outer", DECAY, Config(type="darts", retain_graph=True))
settings = Config(
    type="neumann", neumann_iterations=100, neumann_alpha=0.1, unroll_steps=100
)
low = made(Inner, "inner", START, settings)
Engine(
    config=EngineConfig(train_iters=100),
    problems=[up, low],
    dependencies={"u2l": {up: [low]}, "l2u": {low: [up]}},
).run()
