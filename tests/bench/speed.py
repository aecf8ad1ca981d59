"""What is fast, and compared with what. `python tests/bench/speed.py` prints these tables, on a
GPU; name some to have only those:

    attention   one window attention at 1080p, full attention, and the authors' order
    step        a block, a step and 35 steps at 1080p: plain, compiled, with flash-attn-4
    memory      the peak of a pass: with the cache, without, with cache or weights on the CPU
    14b         the same with the dimensions of the 14B, weights resident and on the CPU
    5b          steps of Wan2.2-TI2V-5B, 121 frames, at 1088x1920 and 2112x3840
    4k          attention and a step at 2160x3840, compared with float32 at sampled positions
    40heads     the 14B's attentions at 2160x3840, whose tensors have more than 2**31 elements
    vae         encode and decode at 1080p, and Diffusers'
    estimate    the peak of a step, and what the command expects before it starts
    gpus        a step on several GPUs, projected from one GPU and from the bytes exchanged

`--quick` times the bundled VAE and Diffusers' on a CPU, in a minute. Transformers have the
dimensions of Wan2.1 1.3B (or 14B), random weights in bfloat16, and 81 frames. Passes of few blocks
are timed where all would take minutes; a step is worked out from them, as all blocks are alike.
Memory is the allocated peak.
"""

import argparse
import json
import math
import sys
import time
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]
from oracle import relative
from parity import plan_for

from freeswim import (
    attention_scale,
    flex_window,
    grouped_window,
    predict_cached,
    predict_dual,
)
from model import Block, WanTransformer, WanVAE, checkpoint_name, full_attention
from support.attention import (
    choose_full_attention,
    flash_full_attention,
    flash_window,
    try_window,
    tuned_window,
)
from support.compiled import CompiledBlock, FastVAE
from support.offload import (
    SPARE,
    VAE_TILES,
    CacheOnCPU,
    StreamedWeights,
    memory_needed,
    vae_memory,
    vae_weights,
)

PUBLISHED = TESTS / "wan2.1-t2v-1.3b"
PUBLISHED_5B = TESTS / "wan2.2-ti2v-5b"
HD = (21, 68, 120)  # (T, H, W) in tokens
UHD = (21, 135, 240)
WINDOW = (31, 53)  # (rows, columns) of tokens
HEADS = 12
HEAD_DIM = 128
LAYERS = 30
B14 = {"num_attention_heads": 40, "ffn_dim": 13824}
B5 = json.loads((PUBLISHED_5B / "transformer" / "config.json").read_text(encoding="utf-8"))
B5_WINDOW = (23, 41)
B5_HD = (31, 34, 60)
B5_UHD = (31, 66, 120)
SCALE = attention_scale(HEAD_DIM, 1560)


def clock(function):
    """Seconds, the peak of allocated memory in GiB, and the result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.time()
    result = function()
    torch.cuda.synchronize()
    return time.time() - start, torch.cuda.max_memory_allocated() / 2**30, result


def report(name, function, repeats=3, flops=None):
    """A row of a table: the first call, which compiles, the median of others, their peak memory,
    and TFLOP/s. Returns the seconds and the result."""
    try:
        first, _, result = clock(function)
        times = []
        for _ in range(repeats):
            del result
            seconds, peak, result = clock(function)
            times.append(seconds)
    except Exception as error:  # what this PyTorch or GPU has not
        print(f"| {name} | {type(error).__name__}: {str(error)[:80]!r} | | | |", flush=True)
        return math.nan, None
    seconds = sorted(times)[repeats // 2]
    rate = f"{flops / seconds / 1e12:.0f}" if flops else ""
    print(f"| {name} | {1000 * seconds:.1f} | {first:.1f} | {peak:.1f} | {rate} |", flush=True)
    return seconds, result


def table(title, last=""):
    print(
        f"\n| {title} | ms | first call, s | peak, GiB | {last} |\n|---|---|---|---|---|",
        flush=True,
    )


def time_major_window(grid, window):
    """The window as the authors have it: tokens in (t, h, w) order, default blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    frames, height, width = grid

    def visible(batch, head, query, key):
        row = query // width % height
        column = query % width
        top = (row - window[0] // 2).clamp(0, height - window[0])
        left = (column - window[1] // 2).clamp(0, width - window[1])
        seen_row = key // width % height
        seen_column = key % width
        return (
            (seen_row >= top)
            & (seen_row < top + window[0])
            & (seen_column >= left)
            & (seen_column < left + window[1])
        )

    tokens = math.prod(grid)
    mask = torch.compile(create_block_mask)(visible, None, None, tokens, tokens, "cuda")
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


@cache
def windows(grid):
    """The window attentions that work here, by name; the fastest one is last."""
    found = {
        "plain FlexAttention": flex_window(grid, WINDOW, SCALE),
        "Triton": tuned_window(grid, WINDOW, SCALE),
    }
    try:
        try_window(flash_window, torch.device("cuda"), torch.bfloat16, HEAD_DIM)
        found["flash-attn-4"] = flash_window(grid, WINDOW, SCALE)
    except Exception as error:  # not installed, or not for this GPU
        print(f"without flash-attn-4: {type(error).__name__}: {str(error)[:80]}")
    return found


def random_parts(grid):
    shape = 1, HEADS, math.prod(grid), HEAD_DIM
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def full_attentions():
    """The full attentions that work here, by name."""
    found = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        found[backend.name] = sdpa_kernel([backend])(full_attention)
    chosen = choose_full_attention(torch.device("cuda"), torch.bfloat16, HEAD_DIM)
    if chosen is flash_full_attention:
        found["flash-attn-4"] = flash_full_attention
    return found


def attention_table():
    found = full_attentions()
    table("one self-attention, 1080p", "TFLOP/s")
    parts = random_parts(HD)
    flops = 4 * math.prod(HD) ** 2 * HEADS * HEAD_DIM
    seconds = {}
    for name, attend in found.items():
        full = partial(attend, *parts, SCALE)
        seconds[name], _ = report(f"full, {name}", full, flops=flops)
        if math.isnan(seconds[name]):  # it failed
            del seconds[name]
    best = min(seconds, key=seconds.get)

    share = WINDOW[0] * WINDOW[1] / (HD[1] * HD[2])  # of all pairs, the exact window's
    time_major = partial(time_major_window(HD, WINDOW), *parts)
    report("window, (t, h, w) order", time_major, flops=share * flops)
    first_head = [part[:, :1] for part in parts]
    expected = grouped_window(HD, WINDOW, SCALE)(*first_head)
    off = {}
    for name, attend in windows(HD).items():
        window = partial(attend, *parts)
        _, attended = report(f"window, ours, {name}", window, flops=share * flops)
        off[name] = f"{relative(attended[:, :1], expected):.1e}"
    floor = 1000 * seconds[best] * share
    print(f"| floor: the window's pairs at the rate of {best} | {floor:.1f} | | | |")
    print(f"\noff from the groups: {off}")

    report("window, ours, groups of queries", partial(grouped_window(HD, WINDOW, SCALE), *parts), 1)
    for prepare in (flex_window, tuned_window):
        for grid in (HD, UHD, HD):
            preparing, peak, _ = clock(partial(prepare, grid, WINDOW, SCALE))
            print(f"{prepare.__name__} prepared for {grid}: {preparing:.1f} s, peak {peak:.1f} GiB")


def random_transformer(
    block, layers, dtype=torch.bfloat16, changes=None, cls=WanTransformer, **parts
):
    """A transformer of such blocks on the GPU. `changes` are of its config, `parts` the
    constructor's."""
    config = json.loads((PUBLISHED / "transformer" / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    with torch.device("meta"):
        config = config | (changes or {}) | {"num_layers": layers}
        transformer = cls(config, block=block, **parts).eval().requires_grad_(False)
    state = {}
    for name, like in transformer.state_dict().items():
        tensor = 0.02 * torch.randn(like.shape, device="cuda")
        if like.ndim == 1:
            tensor = tensor + 1
        stays = any(part in name for part in transformer.FLOAT32)
        state[name] = tensor if stays else tensor.to(dtype)
    transformer.load_state_dict(state, assign=True)
    return transformer


def streamed_transformer(layers, changes=None):
    """A compiled one whose blocks' weights are in CPU memory."""
    prefetch = StreamedWeights(torch.device("cuda"))
    transformer = random_transformer(CompiledBlock, layers, changes=changes, prefetch=prefetch)
    transformer.blocks.to("cpu")
    return transformer


def inputs(grid, channels=16):
    """Latents, timestep and text."""
    frames, height, width = grid
    torch.manual_seed(0)
    return (
        torch.randn(1, channels, frames, 2 * height, 2 * width, device="cuda"),
        torch.tensor([900], device="cuda"),
        torch.randn(1, 512, 4096, device="cuda"),
    )


FULL = partial(full_attention, scale=SCALE)


def passes(transformer, grid, window, name, repeats=3):
    """Print a row for each kind of pass; return one of what a step, and 35, take."""
    given = inputs(grid, transformer.channels)
    layers = len(transformer.blocks)
    cache = {}
    attend_full = partial(transformer.full_attention, scale=SCALE)
    dual = partial(predict_dual, transformer, *given, window, attend_full, cache)
    cached = partial(predict_cached, transformer, *given, window, cache)
    without = partial(without_blocks, transformer, *given)
    outside, _ = report(f"{name}: no block", without, repeats)
    both, _ = report(f"{name}: both paths", dual, repeats)
    kept, _ = report(f"{name}: window, cached", cached, repeats)
    own, _ = report(f"{name}: window, own text", partial(transformer, *given, window), repeats)
    both = with_all_blocks(both, outside, layers)
    kept = with_all_blocks(kept, outside, layers)
    own = with_all_blocks(own, outside, layers)
    return (
        f"| {name} | {(both + 4 * kept) / 5 + own:.1f} | {2 * both:.1f} | "
        f"{7 * both + 28 * kept + 35 * own:.0f} | "
        f"{35 * 2 * both:.0f} |"
    )


def with_all_blocks(seconds, outside, layers):
    """Seconds of a pass with LAYERS blocks, from those with `layers` and with none (`outside`)."""
    return (seconds - outside) / layers * LAYERS + outside


def without_blocks(transformer, *given):
    """A pass through what is before and behind the blocks."""
    blocks = transformer.blocks
    transformer.blocks = torch.nn.ModuleList()
    velocity = transformer(*given)
    transformer.blocks = blocks
    return velocity


STEPS = (
    f"\n| seconds, {LAYERS} blocks | step, cache 5 | step, no cache | 35 steps, cache 5 | "
    f"no cache |\n"
    "|---|---|---|---|---|"
)


def step_table():
    table("one pass, 1080p, three blocks")
    found = windows(HD)
    choices = [  # block, window attention, full attention
        (Block, "Triton", full_attention),
        (CompiledBlock, "Triton", full_attention),
    ]
    if "flash-attn-4" in found:
        choices.append((CompiledBlock, "flash-attn-4", full_attention))
        choices.append((CompiledBlock, "flash-attn-4", flash_full_attention))
    rows = []
    for block, window, full in choices:
        transformer = random_transformer(block, 3, attention=full)
        name = f"{block.__name__}, {window}, {full.__name__}"
        rows.append(passes(transformer, HD, found[window], name))
    print(STEPS, *rows, sep="\n", flush=True)
    rounding_table()


def rounding_table():
    """How far two blocks in bfloat16 are from float32, for three frames."""
    latents, *rest = inputs(HD)
    latents = latents[:, :, :3]
    grid = (3, *HD[1:])
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact_transformer = random_transformer(Block, 2, torch.float32)
        attends = (flex_window(grid, WINDOW, SCALE), FULL)
        exact = predict_dual(exact_transformer, latents, *rest, *attends)
        print("\n| two blocks in bfloat16 | from float32 |\n|---|---|")
        for block in (Block, CompiledBlock):
            for name, window in windows(grid).items():
                transformer = random_transformer(block, 2)
                velocity = predict_dual(transformer, latents, *rest, window, FULL)
                print(f"| {block.__name__}, {name} | {relative(velocity, exact):.3e} |", flush=True)


def estimate_table(layers=4):
    """The peak that a pass takes, and what support/offload.py expects."""
    print(
        f"\n| {layers} blocks | cache | weights | peak, GiB | expected | ratio |\n"
        "|---|---|---|---|---|---|",
        flush=True,
    )
    cases = [  # model, grid, pixels of a token, changes
        ("1.3B", HD, 16, {}),
        ("1.3B", UHD, 16, {}),
        ("14B", HD, 16, B14),
        ("TI2V-5B", B5_HD, 32, B5),
        ("TI2V-5B", B5_UHD, 32, B5),
    ]
    for name, grid, pixels, changes in cases:
        for cache_on_cpu, stream in ((False, False), (True, False), (True, True)):
            torch.cuda.empty_cache()
            if stream:
                transformer = streamed_transformer(layers, changes)
            else:
                transformer = random_transformer(CompiledBlock, layers, changes=changes)
            expected = expected_memory(transformer, grid, cache_on_cpu, stream)
            peak = refinement_peak(transformer, grid, cache_on_cpu)
            del transformer
            height = pixels * grid[1]
            width = pixels * grid[2]
            print(
                f"| {name}, {width}x{height} | {'CPU' if cache_on_cpu else 'GPU'} | "
                f"{'CPU' if stream else 'GPU'} | {peak / 2**30:.2f} | {expected / 2**30:.2f} | "
                f"{expected / peak:.3f} |",
                flush=True,
            )


def expected_memory(transformer, grid, cache_on_cpu, stream):
    no_vae = torch.nn.Module()
    needed = memory_needed(plan_for(transformer, no_vae, grid))
    return needed.on_gpu(cache_on_cpu, stream) - SPARE


def refinement_peak(transformer, grid, cache_on_cpu):
    """Bytes at the most in a step that fills the cache, and in one that reads it."""
    latents, timestep, text = inputs(grid, transformer.channels)
    attend = tuned_window(grid, WINDOW, SCALE)
    cache = CacheOnCPU("cuda") if cache_on_cpu else {}
    given = (transformer, latents, timestep, text, attend)
    predict_dual(*given, FULL, cache)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    predict_dual(*given, FULL, cache)
    transformer(latents, timestep, text, attend)
    predict_cached(*given, cache)
    return torch.cuda.max_memory_allocated()


def memory_table():
    table(f"one pass, 1080p, all {LAYERS} blocks, compiled")
    given = inputs(HD)
    window = list(windows(HD).values())[-1]
    transformer = random_transformer(CompiledBlock, LAYERS)
    dual = partial(predict_dual, transformer, *given, window, FULL)
    report("without cache: both paths", dual, 1)
    for name, kept in (("the GPU", {}), ("the CPU", CacheOnCPU("cuda"))):
        report(f"cache on {name}: both paths", partial(dual, kept), 1)
        cached = partial(predict_cached, transformer, *given, window, kept)
        report(f"cache on {name}: window, cached", cached)
        del cached, kept
    del transformer, dual
    transformer = streamed_transformer(LAYERS)
    report("weights on the CPU: window, own text", partial(transformer, *given, window))


def memory_14b_table():
    table("one pass, 1080p, 4 of the 14B's 40 blocks, compiled")
    given = inputs(HD)
    window = list(windows(HD).values())[-1]
    for name in ("resident", "on the CPU"):
        if name == "resident":
            transformer = random_transformer(CompiledBlock, 4, changes=B14)
        else:
            transformer = streamed_transformer(4, B14)
        dual = partial(predict_dual, transformer, *given, window, FULL)
        report(f"weights {name}: both paths", dual, 1)
        own = partial(transformer, *given, window)
        report(f"weights {name}: window, own text", own, 1)
        del dual, own, transformer


def ti2v_5b_table():
    rows = []
    for size, grid in (("1920x1088", B5_HD), ("3840x2112", B5_UHD)):
        table(f"one pass of Wan2.2-TI2V-5B, {size}, 121 frames, two blocks")
        window = tuned_window(grid, B5_WINDOW, SCALE)
        transformer = random_transformer(CompiledBlock, 2, changes=B5)
        rows.append(passes(transformer, grid, window, f"TI2V-5B, {size}", 1))
    print(STEPS, *rows, sep="\n", flush=True)


def sampled_attention(parts, sample, window=None):
    """Attention in float32 for the queries at `sample` alone: to all keys, or to those of its
    inward window. (heads, len(sample), head_dim)"""
    query, key, value = parts
    rows = []
    for index in sample.tolist():
        seen = slice(None) if window is None else seen_tokens(index, window)
        keys = key[0, :, seen].float()
        scores = query[0, :, index, None].float() @ keys.transpose(1, 2) * SCALE
        rows.append(scores.softmax(-1) @ value[0, :, seen].float())
    return torch.cat(rows, 1)


def seen_tokens(index, window):
    """The tokens in the inward window of a token, by the definition."""
    frames, height, width = UHD
    row = index // frames // width
    column = index // frames % width
    top = min(max(row - window[0] // 2, 0), height - window[0])
    left = min(max(column - window[1] // 2, 0), width - window[1])
    grid = torch.arange(math.prod(UHD), device="cuda").view(height, width, frames)
    return grid[top : top + window[0], left : left + window[1]].flatten()


def uhd_table():
    parts = random_parts(UHD)
    sample = torch.randint(math.prod(UHD), (200,), generator=torch.Generator().manual_seed(0))
    found = windows(UHD)
    table("2160x3840")
    errors = {}
    exact = sampled_attention(parts, sample)
    for name, attend in full_attentions().items():
        if name != "FLASH_ATTENTION":  # half as fast
            _, attended = report(f"full attention: {name}", partial(attend, *parts, SCALE), 1)
            errors[name] = f"{relative(attended[0, :, sample], exact):.1e}"
    exact = sampled_attention(parts, sample, WINDOW)
    for name, attend in found.items():
        _, attended = report(f"window attention: {name}", partial(attend, *parts), 1)
        errors[f"windows by {name}"] = f"{relative(attended[0, :, sample], exact):.1e}"
    del parts, attended

    full = flash_full_attention if "flash-attn-4" in found else full_attention
    transformer = random_transformer(CompiledBlock, 1, attention=full)
    block = transformer.blocks[0]
    tokens = torch.randn(1, math.prod(UHD), HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    modulation = torch.randn(1, 6, HEADS * HEAD_DIM, device="cuda")
    whole = block.feed_forward(tokens, modulation)
    part = block.feed_forward(tokens[:, sample], modulation)
    error = relative(whole[:, sample], part)
    errors["feed-forward, from the same positions alone"] = f"{error:.1e}"
    del tokens, whole
    fastest = list(found.values())[-1]
    print(STEPS, passes(transformer, UHD, fastest, "one block", 1), sep="\n")
    print(f"\noff from float32 at 200 positions, all heads: {errors}", flush=True)


def forty_heads_table():
    """Whether PyTorch's kernels are right where 32 bits cannot address all elements."""
    heads = B14["num_attention_heads"]
    sample = torch.randint(math.prod(UHD), (6,), generator=torch.Generator().manual_seed(0))

    def random_tokens(count):
        tokens = torch.randn(1, count, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        return tokens.transpose(1, 2)

    table("14B, 2160x3840")
    query = random_tokens(math.prod(UHD))
    for name, count in (("cross-attention", 512), ("full attention", math.prod(UHD))):
        parts = (query, random_tokens(count), random_tokens(count))
        attend = partial(full_attention, *parts, SCALE)
        _, attended = report(f"{name}, {query.numel():.1e} elements", attend, 1)
        error = relative(attended[0, :, sample], sampled_attention(parts, sample))
        print(f"off from float32 at {len(sample)} positions, all heads: {error:.1e}", flush=True)


def vae_table():
    """Plain, fast in TF32, and fast in float16, all compared with plain float32 without TF32."""
    table("VAE, 17 frames of 1920x1088")
    config = json.loads((PUBLISHED / "vae" / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    with torch.device("cuda"):
        plain = WanVAE(config).eval().requires_grad_(False)
        video = torch.rand(1, 3, 17, 1088, 1920) * 2 - 1
    with torch.backends.cudnn.flags(allow_tf32=False):
        latents = plain.encode(video)
        decoded = plain.decode(latents)
    off = {}
    for name, vae in (
        ("plain, TF32", plain),
        ("fast, TF32, a tile at a time", like_vae(config, plain)),
        ("fast, TF32, four at a time", like_vae(config, plain, tiles_at_once=4)),
        ("fast, float16, a tile at a time", in_float16(like_vae(config, plain))),
        ("fast, float16, four at a time", in_float16(like_vae(config, plain, tiles_at_once=4))),
    ):
        _, ours = report(f"encode: {name}", partial(vae.encode, video), 1)
        _, pixels = report(f"decode: {name}", partial(vae.decode, latents), 1)
        off[name] = f"{relative(ours, latents):.1e}, {relative(pixels, decoded):.1e}"
    print(f"\noff from float32, encode and decode: {off}", flush=True)
    diffusers_rows(config, plain, video, latents)
    vae_tiles_table()


def vae_tiles_table():
    """The ways in which the command divides frames, with the expected peak."""
    configs = {
        "Wan2.1": (PUBLISHED, (1088, 1920), 81),
        "Wan2.2-TI2V-5B": (PUBLISHED_5B, (1088, 1920), 121),
    }
    for name, (folder, size, frames) in configs.items():
        table(f"VAE of {name}, {frames} frames of {size[1]}x{size[0]}, float16", "expected, GiB")
        config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        video = torch.rand(1, 3, frames, *size) * 2 - 1
        whole = None
        for tiles, parts in VAE_TILES.items():
            torch.manual_seed(0)
            with torch.device("cuda"):
                vae = FastVAE(config, **parts).eval().requires_grad_(False)
            vae.use_channels_last()
            vae.use_float16()
            plan = SimpleNamespace(
                computed=size,
                options=SimpleNamespace(frames=frames, vae_dtype="float16"),
                parts=SimpleNamespace(vae=vae),
            )
            side = parts.get("tile", 10**6) * vae.spatial_factor
            pixels = min(side, size[0]) * min(side, size[1])
            expected = (vae_memory(plan, pixels) + vae_weights(plan)) / 2**30
            tiled = tiles != "whole"
            _, latents = report(f"encode, {tiles}", partial(vae.encode, video, tiled), 1)
            if whole is None:
                whole = latents
            decode = partial(vae.decode, whole, tiled)
            report(f"decode, {tiles}, expected {expected:.1f} GiB", decode, 1)
            print(f"encoded: {relative(latents, whole):.1e} from whole frames", flush=True)
            del vae, latents


def like_vae(config, plain, **parts):
    """A fast VAE with the same weights."""
    with torch.device("cuda"):
        vae = FastVAE(config, **parts).eval().requires_grad_(False)
    vae.load_state_dict(plain.state_dict())
    vae.use_channels_last()
    return vae


def in_float16(vae):
    vae.use_float16()
    return vae


def diffusers_rows(config, ours, video, latents):
    from diffusers import AutoencoderKLWan

    with torch.device("cuda"):
        theirs = AutoencoderKLWan.from_config(config).eval().requires_grad_(False)
    theirs.enable_tiling()
    state = {checkpoint_name(WanVAE, name): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(state)
    raw = latents * ours.std.to("cuda") + ours.mean.to("cuda")
    report("encode: Diffusers'", lambda: theirs.encode(video).latent_dist.mode(), 1)
    report("decode: Diffusers'", lambda: theirs.decode(raw).sample, 1)


def quick_table():
    from diffusers import AutoencoderKLWan

    print("| bundled VAE, 17 frames of 192x128, CPU | ours, s | Diffusers, s | from Diffusers' |")
    print("|---|---|---|---|")
    ours = WanVAE.from_pretrained(ROOT / "tiny" / "vae")
    theirs = AutoencoderKLWan.from_pretrained(ROOT / "tiny" / "vae")
    video = torch.rand(1, 3, 17, 128, 192, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = ours.encode(video)

    def encode_theirs():
        return (theirs.encode(video).latent_dist.mode() - ours.mean) / ours.std

    def decode_theirs():
        return theirs.decode(latents * ours.std + ours.mean).sample.clamp(-1, 1)

    quick_row("encode", partial(ours.encode, video), encode_theirs)
    quick_row("decode", partial(ours.decode, latents), decode_theirs)


def quick_row(name, ours, theirs):
    own, result = median_seconds(ours)
    rival, expected = median_seconds(theirs)
    error = relative(result, expected)
    print(f"| {name} | {own:.2f} | {rival:.2f}, {rival / own:.1f} times | {error:.1e} |")


def median_seconds(function):
    times = []
    for _ in range(3):
        start = time.time()
        result = function()
        times.append(time.time() - start)
    return sorted(times)[1], result


def projection_table(window=0.1081, full=0.333, step=10.14, link=161e9, network=50e9):
    """Seconds of one H100 by the tables above and by several.py, compiled, with Triton windows;
    bytes a second of an exchange between two GPUs as several.py measures it, copies included, and
    of the network to another host. Nothing is overlapped. tests/ranks.py counts bytes."""
    print("\n| GPUs | most heads on one | sent by each in a step | a step |\n|---|---|---|---|")
    # In every block, in the mean: the window, that of the negative prompt, and the full path.
    attentions = 2 + 1 / 5
    attention = LAYERS * (2 * window + full / 5)
    parts = 4 * math.prod(HD) * HEADS * HEAD_DIM * 2  # bytes: query, key, value and the result
    for ranks, remote in ((2, 0), (4, 0), (8, 0), (16, 8 / 15)):  # the last on two hosts
        heads = math.ceil(HEADS / ranks)
        sent = LAYERS * attentions * parts * (ranks - 1) / ranks**2
        trading = sent * ((1 - remote) / link + remote / network)
        seconds = attention * heads / HEADS + (step - attention) / ranks + trading
        print(
            f"| {ranks} | {heads} of {HEADS} | {sent / 1e9:.1f} GB, {trading:.2f} s | "
            f"{seconds:.1f} s, {step / seconds:.1f} times faster |"
        )


TABLES = {
    "attention": attention_table,
    "step": step_table,
    "memory": memory_table,
    "14b": memory_14b_table,
    "5b": ti2v_5b_table,
    "4k": uhd_table,
    "40heads": forty_heads_table,
    "vae": vae_table,
    "estimate": estimate_table,
    "gpus": projection_table,
}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)} (default: all)"
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    unknown = set(args.tables) - TABLES.keys()
    if unknown:
        parser.error(f"no such table: {', '.join(unknown)}")
    if args.quick:
        return quick_table()
    if args.tables != ["gpus"]:
        print(
            torch.cuda.get_device_name(),
            "PyTorch",
            torch.__version__,
            time.strftime("%Y-%m-%d"),
            flush=True,
        )
    for name in args.tables or TABLES:
        TABLES[name]()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
