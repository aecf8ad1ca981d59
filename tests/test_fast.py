"""What is faster, or takes less of a GPU's memory, gives the same numbers. On a CPU, the same code
runs without its streams; tests/test_gpu.py runs it with them."""

import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention
from oracle import relative, seeded, token_mask, window_attention
from parity import TESTS, empty_transformer, empty_vae, plan_for
from references import REFERENCE, load, refined

import freeswim
import model
from support import attention, compiled, offload, processes


@pytest.fixture(scope="module")
def case():
    return load("odd")


@torch.no_grad()
def test_rotation_as_compilers_see_it():
    """In real numbers. Apart from the order of two roundings, it is the same."""
    x = torch.randn(2, 24, 3, 20)
    rotary = model.rotary_table((2, 3, 4), 20, "cpu")
    assert (
        relative(model.apply_rotary_real(x, rotary), model.apply_rotary_complex(x, rotary)) <= 1e-6
    )
    rotate = torch.compile(model.apply_rotary, backend="eager", fullgraph=True)
    assert relative(rotate(x, rotary), model.apply_rotary(x, rotary)) <= 1e-6
    assert (
        rotate(x.bfloat16(), rotary).dtype
        == model.apply_rotary(x.bfloat16(), rotary).dtype
        == torch.bfloat16
    )


@torch.no_grad()
def test_feed_forward_in_chunks():
    block = model.Block(32, 2, 64, 1e-6)
    tokens = torch.randn(2, 50, 32)
    modulation = torch.randn(2, 6, 32)
    whole = block.feed_forward(tokens, modulation)
    largest = []
    block.ffn[0].register_forward_hook(
        lambda layer, inputs, output: largest.append(output.shape[1])
    )
    block.chunk = 7
    assert (block.feed_forward(tokens, modulation) - whole).abs().max() <= 1e-6 * whole.abs().max()
    assert largest == 7 * [7] + [1]


@pytest.mark.parametrize("border", ["inward", "clipped"])
@pytest.mark.parametrize(
    "grid, window",
    [((3, 8, 14), (5, 7)), ((2, 4, 5), (7, 9)), ((1, 6, 10), (9, 3)), ((4, 8, 8), (5, 5))],
)
@pytest.mark.parametrize("options", [{}, freeswim.HOPPER_OPTIONS, attention.FLASH_OPTIONS])
def test_what_flex_attention_is_told(monkeypatch, grid, window, border, options):
    """On a CPU, without a compiler, FlexAttention replaced by its definition: the mask, its blocks
    (as PyTorch finds them by looking at all pairs), the heads in groups, the filled last block, and
    what is cut off again. tests/test_gpu.py has the true one."""

    def flex_attention(query, key, value, block_mask, scale, kernel_options):
        assert query.shape[1] <= 4
        assert query.is_contiguous()
        assert kernel_options is options
        tokens = query.shape[2]
        size, _ = block_mask.BLOCK_SIZE
        assert tokens % size == 0
        assert tokens % 128 == 0
        index = torch.arange(tokens)
        visible = block_mask.mask_mod(0, 0, index[:, None], index)
        seen = torch.zeros(tokens, tokens, dtype=torch.bool)
        own = math.prod(grid) // size  # blocks without filling
        theirs = create_block_mask(block_mask.mask_mod, None, None, tokens, tokens, "cpu", size)
        assert block_mask.seq_lengths == theirs.seq_lengths
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
            ours = getattr(block_mask, name)
            expected = getattr(theirs, name)
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
    query, key, value = torch.randn(3, 2, 6, math.prod(grid), 8, generator=seeded(1))
    attended = attention.tuned_window(grid, window, 0.37, border, "cpu", options)(query, key, value)
    expected = window_attention(query, key, value, token_mask(grid, window, border), 0.37)
    assert relative(attended, expected) <= 1e-6


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("border", ["inward", "clipped"])
@pytest.mark.parametrize("window_attention", [freeswim.flex_window, attention.tuned_window])
def test_the_true_flex_attention_on_a_cpu(window_attention, border):
    """Compiled for a CPU, both versions agree with the dense mask, at several sizes in a row."""
    draw = seeded(1)
    for grid, window in (((5, 12, 14), (5, 7)), ((3, 6, 10), (9, 3))):
        inputs = torch.randn(3, 1, 2, math.prod(grid), 16, generator=draw)
        attend = window_attention(grid, window, 0.37, border, "cpu", {"BLOCK_M": 64})
        with torch.no_grad():
            attended = attend(*inputs)
        expected = freeswim.dense_window(grid, window, 0.37, border)(*inputs)
        assert relative(attended, expected) <= 1e-5


def broken_window(grid, window, scale=None, border="inward", device="cpu"):
    raise RuntimeError("no\ncompiler " + 1000 * "x")


def wrong_window(grid, window, scale=None, border="inward", device="cpu"):
    return freeswim.grouped_window(grid, window, 2.0, border, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_window_that_agrees_is_taken(monkeypatch, capsys, dtype):
    """And one line says which, and why not the ones before it."""
    windows = {"broken": broken_window, "wrong": wrong_window, "right": freeswim.grouped_window}
    monkeypatch.setattr(attention, "WINDOWS", windows)
    found = attention.choose_window(torch.device("cpu"), dtype, 16)
    assert found is freeswim.grouped_window
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert len(printed) < 400
    assert printed.startswith(
        "window attention by right; not broken: RuntimeError: no compiler xxx"
    )
    assert "; not wrong: ValueError: its result is off by " in printed


def test_without_flash_attention_the_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if not installed
    with pytest.raises(ImportError):
        attention.flash_window((1, 2, 2), (1, 1), device="cpu")
    assert list(attention.WINDOWS.values())[-1] is freeswim.grouped_window  # needs no compiler


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_transformer_is_the_same():
    case = load("odd")
    block = compiled.choose_block(torch.device("cpu"), torch.float32)
    assert block is compiled.CompiledBlock
    expected = refined(case, cache_interval=2)
    folder = REFERENCE / "odd" / "transformer"
    case.transformer = model.WanTransformer.from_pretrained(folder, block=block)
    assert relative(refined(case, cache_interval=2), expected) <= 1e-5


def test_without_a_compiler_blocks_run_as_they_are(monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(compiled.CompiledBlock, "self_attention", fail)
    assert compiled.choose_block(torch.device("cpu"), torch.float32) is model.Block
    assert "uncompiled, and slower: RuntimeError: Failed to find" in capsys.readouterr().err


def standing_in(query, key, value, softmax_scale=None):
    """What flash_attn.cute.flash_attn_func takes and gives, (B, N, heads, head_dim), by PyTorch."""
    parts = [part.transpose(1, 2) for part in (query, key, value)]
    attended = torch.nn.functional.scaled_dot_product_attention(*parts, scale=softmax_scale)
    return attended.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("error", [0, 0.1])
def test_full_attention_through_flash_attention(monkeypatch, capsys, error):
    """With a package that stands in for it: taken if it agrees, and used in every full path."""
    called = []

    def flash_attn_func(*parts, softmax_scale=None):
        called.append(softmax_scale)
        attended, _ = standing_in(*parts, softmax_scale=softmax_scale)
        return attended + error, None

    package = SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(cute=package))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package)
    found = attention.choose_full_attention(torch.device("cpu"), torch.float32, 20)
    printed = capsys.readouterr().err
    if error:
        assert found is model.full_attention
        assert (
            "full attention by PyTorch; not flash-attn-4: ValueError: its result is off" in printed
        )
        return
    assert found is attention.flash_full_attention
    assert "full attention by flash-attn-4" in printed

    case = load("odd")
    expected = refined(case)
    called.clear()
    folder = REFERENCE / "odd" / "transformer"
    case.transformer = model.WanTransformer.from_pretrained(folder, attention=found)
    assert relative(refined(case), expected) <= 1e-5
    assert set(called) == {freeswim.attention_scale(20, 1560)}
    called.clear()
    given = case.expected
    case.transformer(given["latents"], given["timestep"], given["text"])
    assert called == [None] * len(case.transformer.blocks)  # 3 heads at once


def test_refine_takes_another_window(case):
    prepared = []

    def prepare(*arguments, device):
        prepared.append(arguments)
        return freeswim.dense_window(*arguments, device=device)

    result = refined(case, window_attention=prepare)
    assert len(prepared) == 1
    assert (result - refined(case)).abs().max() <= 1e-5 * result.abs().max()


@pytest.mark.parametrize("interval", [1, 3])
def test_the_cache_on_the_cpu(case, interval):
    cache = offload.CacheOnCPU("cpu")
    for k in (interval, 2):  # the second time, it holds what the first has left
        assert torch.equal(
            refined(case, cache_interval=k, cross_attention_cache=cache),
            refined(case, cache_interval=k),
        )
    assert len(cache) == len(case.transformer.blocks)
    larger = freeswim.upsample(case.expected["encoded"], 20, 22)
    for latents in (larger, None):  # and of another size
        expected = refined(case, latents, cache_interval=2)
        assert torch.equal(
            refined(case, latents, cache_interval=2, cross_attention_cache=cache), expected
        )
    cache.clear()
    assert len(cache) == 0
    again = refined(case, cache_interval=interval, cross_attention_cache=cache)
    assert torch.equal(again, refined(case, cache_interval=interval))


def test_streamed_blocks(case):
    expected = refined(case, cache_interval=2)
    streamed = load("odd")
    folder = REFERENCE / "odd" / "transformer"
    transformer = offload.load_streamed(folder, torch.device("cpu"), torch.float32)
    streamed.transformer = transformer
    assert torch.equal(refined(streamed, cache_interval=2), expected)
    slots = {id(block) for block in transformer.prefetch(transformer.blocks)}
    assert len(slots) == 2 <= len(transformer.blocks)


def pretend_free(monkeypatch, gpu, cpu=1000):
    """GiB of memory."""
    free = int(gpu * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 141 * 2**30))
    monkeypatch.setattr(offload, "free_memory", lambda: int(cpu * 2**30))


def plan_of_1080p(**options):
    """81 frames of 1920x1088."""
    return plan_for(empty_transformer(), empty_vae(), (21, 68, 120), **options)


@pytest.mark.parametrize(
    "free, typed, expected, lines",
    [
        (40, {}, ("gpu", False), 1),
        (20, {}, ("cpu", False), 1),
        (20, dict(cache_interval=None), ("gpu", False), 1),
        (8, {}, ("cpu", True), 1),
        (8, dict(offload=False), ("cpu", False), 2),  # it may not fit
        (40, dict(cache_device="cpu", offload=True), ("cpu", True), 1),
        (20, dict(cache_device="gpu"), ("gpu", True), 2),  # it may not fit
    ],
)
def test_memory_is_planned(monkeypatch, capsys, free, typed, expected, lines):
    """The 1.3B model at 1088x1920 and 81 frames: the cache takes 14.7 GiB, weights 2.6."""
    pretend_free(monkeypatch, free)
    placement = offload.plan_memory(plan_of_1080p(**typed), torch.device("cuda"))
    cache_device, stream_weights = expected
    assert placement == offload.Placement(cache_device == "cpu", stream_weights)
    printed = capsys.readouterr().err
    assert printed.count("\n") == lines
    assert f"of {free}" in printed


WAN_VAE = model.build(model.WanVAE, TESTS / "wan2.1-t2v-1.3b" / "vae")  # without memory


def plan_of_decoding(vae, **options):
    """As much of a plan as the VAE's memory depends on: 81 frames of 1920x1088, or other ones."""
    plan = plan_of_1080p(frames=81, **options)
    plan.parts.vae = vae
    plan.parts.latent_size = vae.spatial_factor
    plan.target = plan.computed
    return plan


@pytest.mark.parametrize("free, tiles", [(40, "whole"), (27, "whole"), (24, "64"), (5, "32")])
def test_vae_tiles_are_as_large_as_fits(monkeypatch, free, tiles):
    """Next to the transformer's weights, 2.6 GiB; whole frames take 23.0."""
    pretend_free(monkeypatch, free)
    plan = plan_of_decoding(WAN_VAE)
    on_gpu = offload.Placement(cache_on_cpu=False, stream_weights=False)
    assert offload.choose_vae_tiles(plan, torch.device("cuda"), on_gpu) == tiles


@pytest.mark.parametrize("free", [11.5, 15.5, 23.5])
def test_cards_of_12_to_24_gigabytes_do_the_same(monkeypatch, free):
    """So tests/README.md needs the peak of one of them."""
    pretend_free(monkeypatch, free)
    plan = plan_of_decoding(WAN_VAE)
    placement = offload.plan_memory(plan, torch.device("cuda"))
    assert placement == offload.Placement(cache_on_cpu=True, stream_weights=False)
    assert offload.choose_vae_tiles(plan, torch.device("cuda"), placement) == "64"


def test_several_processes_need_tiles_to_share(monkeypatch):
    pretend_free(monkeypatch, 79)
    pretend_to_be_one_of(monkeypatch, "2")
    on_gpu = offload.Placement(cache_on_cpu=False, stream_weights=False)
    plan = plan_of_decoding(WAN_VAE)
    assert offload.choose_vae_tiles(plan, torch.device("cuda"), on_gpu) == "64"


@pytest.mark.parametrize("height, tiles", [(512, "whole"), (544, "32")])
def test_on_a_cpu_small_frames_are_whole(height, tiles):
    plan = plan_of_decoding(WAN_VAE)
    plan.target = (height, 512)
    nothing = offload.Placement(cache_on_cpu=False, stream_weights=False)
    assert offload.choose_vae_tiles(plan, torch.device("cpu"), nothing) == tiles


@pytest.mark.parametrize(
    "folder, frames, peak", [("wan2.1-t2v-1.3b", 81, 22.6), ("wan2.2-ti2v-5b", 121, 23.3)]
)
def test_the_vaes_memory_is_near_what_was_measured(folder, frames, peak):
    """GiB of whole frames of 1920x1088, without the transformer's weights: tests/README.md."""
    vae = model.build(model.WanVAE, TESTS / folder / "vae")
    plan = plan_of_decoding(vae)
    plan.options.frames = frames
    height, width = plan.computed
    expected = offload.vae_memory(plan, height * width) + offload.vae_weights(plan)
    assert 1 <= expected / 2**30 / peak <= 1.15


@pytest.mark.parametrize(
    "free, typed, expected",  # tests/README.md: 7.0 GiB complete, 6.5 do not
    [
        (7.0, {}, None),
        (6.5, {}, "take 6.9 GiB, and 6.5 are free; if memory runs out, begin with a lower --size"),
        (8.0, {"offload": False}, "take 9.3 GiB, and 8.0 are free; if memory runs out, go on with"),
        (
            20.0,
            {"cache_device": "gpu"},
            "take 21.1 GiB, and 20.0 are free; if memory runs out, go on",
        ),
    ],
)
def test_a_line_says_when_memory_may_run_out(monkeypatch, capsys, free, typed, expected):
    pretend_free(monkeypatch, free)
    offload.plan_memory(plan_of_1080p(**typed), torch.device("cuda"))
    warnings = capsys.readouterr().err.splitlines()[1:]
    if expected is None:
        assert warnings == []
    else:
        assert len(warnings) == 1
        assert expected in warnings[0]


@pytest.mark.parametrize(
    "gpu, cpu, typed, expected",  # the cache takes 15.0 GiB, the blocks' weights 3.8
    [
        (40, 1, {}, None),
        (12, 16, {}, None),
        (12, 14, {}, (15.0, "begin with --no-cache")),
        (12, 14, {"cache_interval": None}, None),
        (7, 16, {}, (18.8, "begin with --no-cache")),
        (40, 2, {"offload": True}, (3.8, "free some")),
    ],
)
def test_a_line_says_when_cpu_memory_may_run_out(monkeypatch, capsys, gpu, cpu, typed, expected):
    pretend_free(monkeypatch, gpu, cpu)
    offload.plan_memory(plan_of_1080p(**typed), torch.device("cuda"))
    warnings = capsys.readouterr().err.splitlines()[1:]
    if expected is None:
        assert warnings == []
    else:
        gibibytes, advice = expected
        assert warnings == [
            f"this may take {gibibytes} GiB of CPU memory, and {cpu}.0 are free; "
            f"if the system ends the run, {advice}"
        ]


@pytest.mark.parametrize(
    "size, pinned", [(0, 0), (1, 1), (3, 4), (2**29, 2**29), (2**29 + 1, 2**30)]
)
def test_pinned_memory_is_a_power_of_two(size, pinned):
    """As at::CachingHostAllocator has it."""
    assert offload.pinned_size(size) == pinned


def test_processes_of_a_host_share_its_memory(monkeypatch, capsys):
    """Together they keep one cache."""
    pretend_to_be_one_of(monkeypatch, 2)
    pretend_free(monkeypatch, gpu=40, cpu=14)
    offload.plan_memory(plan_of_1080p(cache_device="cpu"), torch.device("cuda"))
    assert "take 15.0 GiB of CPU memory" in capsys.readouterr().err


def test_where_the_system_does_not_say_what_is_free(monkeypatch, capsys):
    pretend_free(monkeypatch, gpu=12)
    monkeypatch.setattr(offload, "free_memory", lambda: None)
    offload.plan_memory(plan_of_1080p(), torch.device("cuda"))
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "ranks, tensors",  # of 12, 6 and 2 heads, 4 are attended at a time
    [(1, 8 + 7 * 4 / 12), (2, 8 + 7 * 4 / 6 + 3.5), (8, 8 + 7 + 3.5)],
)
def test_several_ranks_need_less_each(monkeypatch, ranks, tensors):
    """Each has its share of the tokens and of their cache, and all weights unless these are spread
    too."""
    alone = offload.memory_needed(plan_of_1080p())
    pretend_to_be_one_of(monkeypatch, ranks)
    each = offload.memory_needed(plan_of_1080p())
    assert each.cache == alone.cache / ranks
    assert each.blocks == alone.blocks
    assert each.working == pytest.approx(tensors * each.cache_of_block)
    assert each.working <= alone.working
    spread = offload.memory_needed(plan_of_1080p(shard_weights=True))
    assert spread.blocks == pytest.approx(alone.blocks / ranks + 2 * alone.block)


def pretend_to_be_one_of(monkeypatch, ranks):
    """As if torchrun had started this process."""
    for name in processes.TORCHRUN:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))


def test_several_ranks_never_stream_weights(monkeypatch, capsys):
    """They spread them instead."""
    pretend_to_be_one_of(monkeypatch, 2)
    pretend_free(monkeypatch, 1)
    placement = offload.plan_memory(plan_of_1080p(), torch.device("cuda"))
    assert placement == offload.Placement(cache_on_cpu=True, stream_weights=False)
    assert "cache on the CPU, weights on the GPU" in capsys.readouterr().err


def test_what_helps_when_memory_is_full(monkeypatch):
    gpu = torch.device("cuda")
    everything = offload.Placement(cache_on_cpu=False, stream_weights=False)
    without_cache = offload.Placement(cache_on_cpu=True, stream_weights=False)
    nothing = offload.Placement(cache_on_cpu=True, stream_weights=True)
    assert "--cache-device cpu" in offload.relief(everything, gpu)
    assert "--offload" in offload.relief(without_cache, gpu)
    assert offload.relief(nothing, gpu) == "begin with a lower --size or --frames"
    assert "free some" in offload.relief(everything, torch.device("cpu"))
    pretend_to_be_one_of(monkeypatch, 2)
    assert "--shard-weights" in offload.relief(without_cache, gpu)


# --------------------------------------------------------------------------------------------------
# The VAE


@pytest.fixture
def uncompiled():
    """What is compiled on a GPU runs as it is written."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("tiles_at_once", [1, 3, 4])
def test_the_fast_vae_is_the_vae(uncompiled, case, tiles_at_once):
    """In float32, in tiles, several of them at once."""
    folder = REFERENCE / "wide" / "vae"
    tiles = {"tile": 8, "stride": 6}
    plain = model.WanVAE.from_pretrained(folder, **tiles)
    tiles["tiles_at_once"] = tiles_at_once
    quick = compiled.load_vae(folder, torch.device("cpu"), False, **tiles)
    assert type(quick) is compiled.FastVAE
    names = list(plain.state_dict())
    assert list(quick.state_dict()) == names
    video = torch.rand(2, 3, 5, 136, 168, generator=seeded(0)) * 2 - 1
    latents = plain.encode(video)
    assert relative(quick.encode(video), latents) <= 1e-5
    assert relative(quick.decode(latents), plain.decode(latents)) <= 1e-5


def test_the_fast_vae_stays_channels_last(uncompiled, monkeypatch):
    """What goes into convolutions over time, and what they remember of a chunk, needs no copy."""
    vae = compiled.load_vae(REFERENCE / "wide" / "vae", torch.device("cpu"), False)
    convolve = model.CausalConv3d.forward
    formats = []

    def convolve_as_on_a_gpu(x, weight, bias, padding):
        result = torch.nn.functional.conv3d(x, weight, bias, padding=(0, *padding))
        return result.contiguous(memory_format=torch.channels_last_3d)  # as cuDNN gives it

    monkeypatch.setattr(model, "conv3d_by_conv2d", convolve_as_on_a_gpu)

    def noting(layer, x, history):
        formats.append(x.is_contiguous(memory_format=torch.channels_last_3d))
        past = history.get(layer)
        if past is not None:
            formats.append(past.is_contiguous(memory_format=torch.channels_last_3d))
        return convolve(layer, x, history)

    monkeypatch.setattr(model.CausalConv3d, "forward", noting)
    history = {}
    for frames in (1, 4, 4):
        vae.encode_chunk(torch.rand(1, 3, frames, 32, 48), history)
    assert len(formats) > 30
    assert all(formats)
    formats.clear()
    history = {}
    for _ in range(3):
        vae.decode_chunk(torch.rand(1, 16, 1, 4, 6), history)
    assert len(formats) > 30
    assert all(formats)


def test_tiles_in_groups():
    """Neighbours of one size together, all in order."""
    vae = load("wide").vae
    tiles = vae.tiles(60, 130, 1, True, torch.zeros(1))
    for count in (1, 2, 4):
        groups = model.tile_groups(tiles, count)
        assert [tile for group in groups for tile in group] == tiles
        assert all(len({tile.size for tile in group}) == 1 for group in groups)
        assert max(len(group) for group in groups) == count


def test_the_vae_in_float16(uncompiled):
    """Much nearer to float32 than bfloat16 is, and in float32 where it overflows."""
    folder = REFERENCE / "wide" / "vae"
    plain = load("wide").vae
    rough = model.WanVAE.from_pretrained(folder, dtype=torch.bfloat16)
    half = compiled.load_vae(folder, torch.device("cpu"), True, tiles_at_once=4)
    video = torch.rand(1, 3, 5, 64, 96, generator=seeded(0)) * 2 - 1
    latents = plain.encode(video)
    encoded = half.encode(video)
    assert encoded.dtype == torch.float32
    assert 1e-6 < relative(encoded, latents) <= 0.25 * relative(rough.encode(video), latents)
    decoded = plain.decode(latents)
    error = relative(half.decode(latents), decoded)
    assert 1e-6 < error <= 0.25 * relative(rough.decode(latents.bfloat16()), decoded)

    last = half.in_float16.decoder.conv_out
    last.bias.data.fill_(torch.inf)  # as an overflow would
    assert relative(half.decode(latents), plain.decode(latents)) <= 1e-5
    half.in_float16.quant_conv.bias.data.fill_(torch.inf)
    assert relative(half.encode(video), latents) <= 1e-5


def test_without_a_compiler_the_vae_is_the_plain_one(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiled, "compiled_norm_silu", broken)
    folder = REFERENCE / "wide" / "vae"
    vae = compiled.load_vae(folder, torch.device("cpu"), True, tiles_at_once=4)
    assert type(vae) is model.WanVAE
    assert "the VAE runs uncompiled" in capsys.readouterr().err
