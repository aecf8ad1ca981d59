"""What the tests of the method measure with: definitions spelled out, as slow as they please, none
of the code under test in them."""

from itertools import product

import torch


def relative(actual, expected):
    """The deviation as a fraction of the size of what was expected (Euclidean norms)."""
    assert actual.shape == expected.shape, (
        f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    )
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return ((actual - expected).norm() / expected.norm()).item()


def seen(position, length, size, border="inward"):
    """The positions that a query at `position` sees on an axis of `length`: of all runs of
    min(size, length) the one whose centre is nearest; or, if "clipped", whatever of the centred
    window lies on the axis."""
    if border == "clipped":
        return [other for other in range(length) if abs(other - position) <= size // 2]
    size = min(size, length)
    runs = [range(start, start + size) for start in range(length - size + 1)]
    return list(min(runs, key=lambda run: abs(run[0] + run[-1] - 2 * position)))


def window_mask(height, width, window, border="inward"):
    """May the query token see the key token? bool (height*width, height*width), filled in query by
    query."""
    mask = torch.zeros(height, width, height, width, dtype=torch.bool)
    for row, column in product(range(height), range(width)):
        rows, columns = seen(row, height, window[0], border), seen(column, width, window[1], border)
        mask[row, column, torch.tensor(rows)[:, None], torch.tensor(columns)] = True
    return mask.flatten(2).flatten(0, 1)


def token_mask(grid, window, border="inward"):
    """`window_mask` for the tokens of a clip, `grid` = (T, H, W), in (h, w, t) order: time is never
    windowed."""
    frames, height, width = grid
    mask = window_mask(height, width, window, border)
    return mask.repeat_interleave(frames, dim=0).repeat_interleave(frames, dim=1)


def window_attention(query, key, value, mask, scale=None):
    """Softmax attention as in the textbook, in float64; (B, heads, N, head_dim) each, `mask` (N,
    N)."""
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ value
