"""What is faster, or takes less of a GPU's memory, gives the same numbers. On a CPU, the same code
runs without its streams; tests/test_gpu.py runs it with them."""

import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention
from oracle import relative, token_mask, window_attention
from references import load, refined

import freeswim
import model
from support import fast, memory


@pytest.fixture(scope="module")
def case():
    return load("odd")


@torch.no_grad()
def test_rotation_as_compilers_see_it():
    """In real numbers; but for the order of two roundings, it is the same."""
    x, rotary = torch.randn(2, 24, 3, 20), model.rotary_table((2, 3, 4), 20, "cpu")
    compiled = torch.compile(model.rotate, backend="eager", fullgraph=True)
    assert relative(compiled(x, rotary), model.rotate(x, rotary)) <= 1e-6
    assert (
        compiled(x.bfloat16(), rotary).dtype
        == model.rotate(x.bfloat16(), rotary).dtype
        == torch.bfloat16
    )


@torch.no_grad()
def test_feed_forward_in_pieces():
    block = model.Block(32, 2, 64, 1e-6)
    tokens, modulation = torch.randn(2, 50, 32), torch.randn(2, 6, 32)
    whole = block.feed_forward(tokens, modulation)
    largest = []
    block.ffn[0].register_forward_hook(
        lambda layer, inputs, output: largest.append(output.shape[1])
    )
    block.piece = 7
    assert (block.feed_forward(tokens, modulation) - whole).abs().max() <= 1e-6 * whole.abs().max()
    assert largest == 7 * [7] + [1]


@pytest.mark.parametrize("kind", ["inward", "clipped"])
@pytest.mark.parametrize(
    "grid, window",
    [((3, 8, 14), (5, 7)), ((2, 4, 5), (7, 9)), ((1, 6, 10), (9, 3)), ((4, 8, 8), (5, 5))],
)
@pytest.mark.parametrize(
    "options", [{}, freeswim.FLEX_OPTIONS[9], freeswim.FLEX_OPTIONS["flash-attn-4"]]
)
def test_what_flex_attention_is_told(monkeypatch, grid, window, kind, options):
    """On a CPU, without a compiler, FlexAttention replaced by its definition: the mask, its blocks
    (as PyTorch finds them by looking at all pairs), the heads in groups, the filled last block, and
    what is cut off again. tests/test_gpu.py has the true one."""

    def flex_attention(query, key, value, block_mask, scale, kernel_options):
        assert query.shape[1] <= 4 and query.is_contiguous() and kernel_options is options
        tokens, (size, _) = query.shape[2], block_mask.BLOCK_SIZE
        assert tokens % size == 0 and tokens % 128 == 0
        index = torch.arange(tokens)
        visible = block_mask.mask_mod(0, 0, index[:, None], index)
        seen, own = (
            torch.zeros(tokens, tokens, dtype=torch.bool),
            math.prod(grid) // size,
        )  # blocks without filling
        theirs = create_block_mask(block_mask.mask_mod, None, None, tokens, tokens, "cpu", size)
        assert block_mask.seq_lengths == theirs.seq_lengths
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
            ours, expected = getattr(block_mask, name), getattr(theirs, name)
            assert (ours.dtype, ours.shape, ours.stride()) == (
                expected.dtype,
                expected.shape,
                expected.stride(),
            )
            assert torch.equal(ours[0, 0, :own], expected[0, 0, :own])
        for row in range(tokens // size):
            block = slice(row * size, (row + 1) * size)
            for counts, indices, mask in (
                (block_mask.kv_num_blocks, block_mask.kv_indices, visible[block]),
                (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, visible[block] | True),
            ):
                for other in indices[0, 0, row, : counts[0, 0, row]].tolist():
                    keys = slice(other * size, (other + 1) * size)
                    seen[block, keys] = mask[:, keys]
        real = math.prod(grid)
        assert torch.equal(seen[:real], visible[:real])
        attended = window_attention(query, key, value, seen, scale)
        return torch.where(seen.any(-1)[:, None], attended, 0.0).float()

    create_block_mask = torch.nn.attention.flex_attention.create_block_mask
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "flex_attention", flex_attention)
    query, key, value = torch.randn(
        3, 2, 6, math.prod(grid), 8, generator=torch.Generator().manual_seed(1)
    )
    attended = freeswim.flex_window(grid, window, 0.37, kind, "cpu", options)(query, key, value)
    expected = window_attention(query, key, value, token_mask(grid, window, kind), 0.37)
    assert relative(attended, expected) <= 1e-6


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", ["inward", "clipped"])
def test_the_true_flex_attention_on_a_cpu(kind):
    """Compiled for a CPU, it reads the same lists of blocks as on a GPU."""
    grid, window = (5, 12, 14), (5, 7)
    query, key, value = torch.randn(
        3, 1, 2, math.prod(grid), 16, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        attended = freeswim.flex_window(grid, window, 0.37, kind, "cpu", {"BLOCK_M": 64})(
            query, key, value
        )
    expected = window_attention(query, key, value, token_mask(grid, window, kind), 0.37)
    assert relative(attended, expected) <= 1e-5


def test_without_flash_attention_a_line_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if not installed
    assert fast.window_for(torch.device("cuda"), torch.bfloat16, 128) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Triton" in said and "flash_attn" in said
    assert (
        fast.window_for(torch.device("cuda"), torch.float32, 128) is None
        and capsys.readouterr().err == ""
    )


def test_refine_takes_another_window(case):
    prepared = []

    def prepare(*arguments):
        prepared.append(arguments)
        return freeswim.dense_window(*arguments)

    result = refined(case, prepare=prepare)
    assert len(prepared) == 1
    assert (result - refined(case)).abs().max() <= 1e-5 * result.abs().max()


@pytest.mark.parametrize("interval", [1, 3])
def test_features_on_the_cpu(case, interval):
    features = memory.FeaturesOnCPU("cpu")
    for k in (interval, 2):  # the second time, it holds features of the first
        assert torch.equal(
            refined(case, cache_interval=k, features=features), refined(case, cache_interval=k)
        )
    assert len(features) == len(case.transformer.blocks)
    larger = freeswim.upsample(case.expected["encoded"], 20, 22)
    for latents in (larger, None):  # and of another size
        expected = refined(case, latents, cache_interval=2)
        assert torch.equal(refined(case, latents, cache_interval=2, features=features), expected)


def test_streamed_blocks(case):
    expected = refined(case, cache_interval=2)
    streamed = load("odd")
    memory.stream_blocks(streamed.transformer, torch.device("cpu"))
    assert torch.equal(refined(streamed, cache_interval=2), expected)
    slots = {id(block) for block in streamed.transformer.blocks}
    assert len(slots) == 2 <= len(streamed.transformer.blocks)


@pytest.mark.parametrize(
    "free, typed, expected",
    [
        (40, {}, ("gpu", False)),
        (20, {}, ("cpu", False)),
        (20, dict(cache_interval=None), ("gpu", False)),
        (8, {}, ("cpu", True)),
        (8, dict(offload=False), ("cpu", False)),
        (40, dict(features="cpu", offload=True), ("cpu", True)),
        (20, dict(features="gpu"), ("gpu", True)),
    ],
)
def test_memory_is_planned(monkeypatch, capsys, free, typed, expected):
    """The 1.3B model at 1088x1920 and 81 frames: features take 14.7 GiB, weights 2.6."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**30, 141 * 2**30))
    settings = (
        dict(features=None, offload=None, cache_interval=5, frames=81, computed=(1088, 1920))
        | typed
    )
    args = SimpleNamespace(**settings)
    config = model.read_json(Path(__file__).parent / "wan2.1-t2v-1.3b/transformer/config.json")
    with torch.device("meta"):
        transformer = model.WanTransformer(config)
    memory.plan_memory(args, transformer, torch.bfloat16, torch.device("cuda"))
    assert (args.features, args.offload) == expected
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"of {free}" in said
