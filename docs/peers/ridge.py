"""Ridge regression with a decay for each weight: the problem of all programs here."""

import torch

torch.set_printoptions(precision=6)
X = torch.tensor([[1.0, 0, 2], [0, 1, -1], [1, 1, 0], [2, -1, 1]]).double()
Y = torch.tensor([1.0, 2, -1, 0]).double()
NEW_X = torch.tensor([[1.0, 1, 1], [0, 2, 1], [1, -1, 0]]).double()
NEW_Y = torch.tensor([1.0, 1, 0]).double()
START, DECAY = torch.zeros(3).double(), torch.full((3,), -1.0).double()


def inner(w, decay):
    return ((X @ w - Y) ** 2).mean() + (decay.exp() * w**2).sum()


def outer(w):
    return ((NEW_X @ w - NEW_Y) ** 2).mean()
