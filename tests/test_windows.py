"""The windows: the mask by its definition, and window attention, fast and slow, against a
textbook's."""

import random

import pytest
import torch
from oracle import relative, seeded, seen, token_mask, window_attention, window_mask
from references import load
from torch.utils._python_dispatch import TorchDispatchMode

import freeswim
from freeswim import dense_window, grouped_window

# (grid (T, H, W), window (rows, cols)): ordinary, odd sizes, windows larger than one axis or both,
# single tokens.
CASES = [
    ((3, 8, 14), (5, 7)),
    ((2, 9, 7), (3, 5)),
    ((1, 13, 11), (7, 3)),
    ((5, 6, 5), (3, 3)),
    ((2, 5, 33), (3, 9)),
    ((2, 31, 6), (9, 5)),
    ((3, 6, 10), (9, 3)),
    ((3, 10, 6), (3, 9)),
    ((2, 4, 5), (7, 9)),
    ((2, 1, 12), (3, 5)),
    ((2, 12, 1), (5, 3)),
    ((4, 7, 9), (1, 1)),
    ((4, 7, 9), (1, 5)),
    ((3, 1, 1), (1, 1)),
    ((3, 1, 1), (5, 5)),
]


@pytest.mark.parametrize("name", ["wide", "odd"])
def test_mask_is_the_authors(name):
    case = load(name)
    mask = freeswim.window_mask(*case.meta["grid"][1:], case.window_size)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, case.expected["mask"].bool())


def random_windows(count):
    """Grids and windows at random: often the window is larger than an axis, sometimes it is one row
    or column."""
    draw = random.Random(0)
    sizes = [
        [draw.randint(1, 10), draw.randint(1, 10), draw.randint(0, 6), draw.randint(0, 6)]
        for _ in range(count)
    ]
    return [
        (height, width, (2 * rows + 1, 2 * columns + 1)) for height, width, rows, columns in sizes
    ]


SINGLES = [
    (1, 1, (1, 1)),
    (1, 1, (3, 7)),
    (1, 9, (1, 3)),
    (9, 1, (3, 1)),
    (9, 8, (1, 5)),
    (9, 8, (1, 1)),
]


@pytest.mark.parametrize("height, width, window", [*SINGLES, *random_windows(60)])
def test_mask_keeps_its_definition(height, width, window):
    mask = freeswim.window_mask(height, width, window)
    assert mask.shape == (height * width, height * width)
    for query in range(height * width):
        visible = mask[query].view(height, width)
        rows = visible.any(dim=1).nonzero().flatten()
        columns = visible.any(dim=0).nonzero().flatten()
        assert visible.sum() == len(rows) * len(columns)  # a rectangle
        axes = (rows, query // width, height, window[0]), (columns, query % width, width, window[1])
        for positions, own, length, size in axes:
            assert len(positions) == min(size, length)
            assert positions[-1] - positions[0] == len(positions) - 1  # without gaps
            assert own in positions
            before = own - positions[0]
            after = positions[-1] - own
            assert (
                before >= after or positions[0] == 0
            )  # sees less before it than after it only at the border
            assert after >= before or positions[-1] == length - 1
            assert positions.tolist() == seen(own, length, size)  # and so the tests' own oracle


@pytest.mark.parametrize("builder", [dense_window, grouped_window])
@pytest.mark.parametrize("border", ["inward", "clipped"])
@pytest.mark.parametrize("grid, window", CASES)
def test_window_attention_is_the_textbooks(builder, grid, window, border):
    frames, height, width = grid
    draw = seeded(1)
    query, key, value = torch.randn(3, 2, 3, frames * height * width, 20, generator=draw)
    for scale in (None, 0.37):
        expected = window_attention(query, key, value, token_mask(grid, window, border), scale)
        attended = builder(grid, window, scale=scale, border=border)(query, key, value)
        assert attended.dtype == torch.float32
        assert relative(attended, expected) <= 1e-5


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("border", ["inward", "clipped"])
def test_groups_never_hold_the_mask_of_the_whole_clip(border):
    grid = (3, 48, 48)
    window = (5, 7)
    tokens = 3 * 48 * 48
    query, key, value = torch.randn(3, 1, 1, tokens, 8)
    with LargestTensor() as dense:
        slow = dense_window(grid, window, border=border)(query, key, value)
    with LargestTensor() as grouped:
        fast = grouped_window(grid, window, border=border)(query, key, value)
    assert dense.elements >= tokens**2  # the measure does see a mask
    assert grouped.elements <= tokens**2 / 20
    assert relative(fast, slow) <= 1e-5


def test_clipped_and_inward_differ_at_the_border_only():
    inward = freeswim.window_mask(9, 12, (5, 7))
    clipped = window_mask(9, 12, (5, 7), "clipped")
    same = (inward == clipped).all(dim=1).view(9, 12)
    inside = torch.zeros(9, 12, dtype=torch.bool)
    inside[2:-2, 3:-3] = True
    assert torch.equal(same, inside)
