"""What the tests of the method measure with: definitions spelled out, as slow as they please, none
of the code under test in them."""

from itertools import product

import torch


def seeded(seed):
    """A generator of random numbers."""
    return torch.Generator().manual_seed(seed)


def relative(actual, expected):
    """The deviation as a fraction of the size of what was expected (Euclidean norms)."""
    shapes = (tuple(actual.shape), tuple(expected.shape))
    assert shapes[0] == shapes[1], f"{shapes[0]} instead of {shapes[1]}"
    actual = actual.detach().cpu().double()
    expected = expected.detach().cpu().double()
    error = actual - expected
    return (error.norm() / expected.norm()).item()


def seen(position, length, size, border="inward"):
    """The positions that a query at `position` sees on an axis of `length`: of all runs of
    min(size, length) the one whose centre is nearest; or, if "clipped", whatever of the centred
    window lies on the axis."""
    if border == "clipped":
        return [other for other in range(length) if abs(other - position) <= size // 2]

    def distance(run):
        """Twice that of its centre from the position."""
        return abs(run[0] + run[-1] - 2 * position)

    size = min(size, length)
    runs = []
    for start in range(length - size + 1):
        runs.append(range(start, start + size))
    return list(min(runs, key=distance))


def window_mask(height, width, window, border="inward"):
    """May the query token see the key token? bool (height*width, height*width), filled in query by
    query."""
    mask = torch.zeros(height, width, height, width, dtype=torch.bool)
    for row, column in product(range(height), range(width)):
        rows = torch.tensor(seen(row, height, window[0], border))
        columns = torch.tensor(seen(column, width, window[1], border))
        mask[row, column, rows[:, None], columns] = True
    return mask.flatten(2).flatten(0, 1)


def token_mask(grid, window, border="inward"):
    """`window_mask` for the tokens of a clip, `grid` = (T, H, W), in (h, w, t) order: time is never
    windowed."""
    frames, height, width = grid
    mask = window_mask(height, width, window, border)
    mask = mask.repeat_interleave(frames, dim=0)
    return mask.repeat_interleave(frames, dim=1)


def window_attention(query, key, value, mask, scale=None):
    """Softmax attention as in the textbook, in float64; (B, heads, N, head_dim) each, `mask` (N,
    N)."""
    query = query.double()
    key = key.double()
    value = value.double()
    if scale is None:
        scale = query.shape[-1] ** -0.5
    scores = query @ key.transpose(-1, -2) * scale
    shares = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return shares @ value
