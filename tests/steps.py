"""Steps that misbehave, and a count of what graphs hold."""

import weakref

import torch
from torch.autograd.graph import saved_tensors_hooks


class Graphs:
    """Counts tensors that live graphs hold: each is packed as a token, and tokens are counted."""

    class Token:
        def __init__(self, value):
            self.value = value

    def __init__(self):
        self.live = weakref.WeakSet()
        self.hooks = saved_tensors_hooks(self._pack, lambda token: token.value)

    def _pack(self, value):
        token = self.Token(value.detach())
        self.live.add(token)
        return token


class Noise:
    """A step that draws from a generator of its own, which no sweep can restore."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(4)

    def __call__(self, u, c, t):
        noise = torch.randn(3, generator=self.generator, dtype=u.dtype)
        return torch.tanh(c * u + noise)
