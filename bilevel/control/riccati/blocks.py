r"""Recursions over the steps in blocks, where a call costs more than its arithmetic.

The steps of a block are joined, those of all blocks side by side; one pass goes from block to block
over what was joined, and one inside of all blocks at once. With T steps in blocks of k that is
T / k + 2 k calls after one another in the place of T; the result is the same but for rounding.
"""

import torch
from torch import Tensor

SMALL = 1500  # numbers of the matrices of one step, of all problems, up to which calls cost most


def block_of(horizon: int, numbers: int) -> int:
    """Steps of a block; 1 for none."""
    if numbers > SMALL or horizon < 20:
        return 1
    # Steps are added where blocks do not come out even, which costs about as much as two.
    calls = {k: -(-horizon // k) + 3 * k + 2 * bool(horizon % k) for k in range(2, 33)}
    return min(calls, key=lambda k: calls[k])


def affine(A: Tensor, r: Tensor, last: Tensor) -> Tensor:
    """x_t = A_t x_{t+1} + r_t for t = T-1..0.

    Args:
        A: ``(b, T, n, n)``.
        r: ``(b, T, n)``.
        last: x_T, ``(b, n)``.

    Returns:
        x_0, ..., x_T, ``(b, T + 1, n)``.
    """
    b, horizon, n = r.shape
    k = block_of(horizon, b * n * n)
    if k == 1 or not n:
        return _plain(A, r, last)
    extra = -horizon % k
    if extra:
        identity = torch.eye(n, dtype=A.dtype, device=A.device).expand(b, extra, n, n)
        A, r = torch.cat([identity, A], 1), torch.cat([r.new_zeros(b, extra, n), r], 1)
    blocks = (horizon + extra) // k
    inside = A.reshape(b * blocks, k, n, n), r.reshape(b * blocks, k, n)
    # (x, 1) -> A x + r, joined from the last step of a block to its first.
    joined = torch.eye(n, n + 1, dtype=A.dtype, device=A.device).expand(b * blocks, n, n + 1)
    columns = torch.nn.functional.pad(inside[1].unsqueeze(3), (n, 0))
    for j in range(k - 1, -1, -1):
        joined = torch.baddbmm(columns[:, j], inside[0][:, j], joined)
    joined = joined.view(b, blocks, n, n + 1)
    ends = _plain(joined[..., :n], joined[..., n], last)
    every = _plain(*inside, ends[:, 1:].reshape(b * blocks, n))
    found = every[:, :k].reshape(b, blocks * k, n)
    return torch.cat([found[:, extra:], last.unsqueeze(1)], 1)


def _plain(A: Tensor, r: Tensor, last: Tensor) -> Tensor:
    x, found = last.unsqueeze(2), [last.unsqueeze(2)]
    matrices, columns = A.unbind(1), r.unsqueeze(3).unbind(1)
    for matrix, column in zip(reversed(matrices), reversed(columns), strict=True):
        x = torch.baddbmm(column, matrix, x)
        found.append(x)
    return torch.stack(found[::-1], 1).squeeze(3)


def joined_steps(maps: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of k steps as one step, whose control is that of all of them.

    Args:
        maps: F_t, ``(b, k, N, N + m)``.
        steps: H_t, ``(b, k, N + m, N + m)``.

    Returns:
        F and H of each, ``(b, N, N + k m)`` and ``(b, N + k m, N + k m)``.
    """
    b, k, N, both = maps.shape
    m = both - N
    own = torch.eye(k * m, dtype=maps.dtype, device=maps.device).view(k, 1, m, k * m)
    own = torch.nn.functional.pad(own, (N, 0)).expand(k, b, m, N + k * m).unbind(0)
    x = torch.eye(N, N + k * m, dtype=maps.dtype, device=maps.device).expand(b, N, N + k * m)
    total = maps.new_zeros(b, N + k * m, N + k * m)
    for mine, F, H in zip(own, maps.unbind(1), steps.unbind(1), strict=True):
        z = torch.cat([x, mine], 1)
        total = torch.baddbmm(total, z.mT, torch.bmm(H, z))
        x = torch.bmm(F, z)
    return x, total


def padded(maps: Tensor, steps: Tensor, extra: int) -> tuple[Tensor, Tensor]:
    """Steps with `extra` ones before, which change nothing and cost their control alone."""
    if not extra:
        return maps, steps
    b, _, N, both = maps.shape
    still = torch.eye(N, both, dtype=maps.dtype, device=maps.device)
    cost = maps.new_zeros(both, both)
    cost[N:, N:].diagonal().fill_(1)
    before = still.expand(b, extra, N, both), cost.expand(b, extra, both, both)
    return torch.cat([before[0], maps], 1), torch.cat([before[1], steps], 1)
