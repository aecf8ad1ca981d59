"""What is fast, and beside what: `python tests/bench.py` on a GPU, `--quick` on a CPU (a minute).

On a GPU, with random weights of the 1.3B dimensions in bfloat16 at 1088x1920 and 81 frames: window attention beside
full attention of each kind that PyTorch has and beside FlexAttention in (t, h, w) order, as the authors run it; a step
with and without cache, for blocks as they are and compiled, from the time of three blocks. On a CPU: the bundled VAE
beside Diffusers' with the same weights.
"""
import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from freeswim import attention_scale, flex_window, grouped_window, predict
from model import WanTransformer, WanVAE, full_attention
from support.fast import CompiledTransformer

GRID, WINDOW, HEADS, HEAD_DIM, LAYERS = (21, 68, 120), (31, 53), 12, 128, 30


def measure(function, repeats=3):
    """Median seconds, and the peak of allocated memory in GiB beyond what was there."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, seconds = torch.cuda.memory_allocated(), []
    for _ in range(repeats):
        start = time.time()
        function()
        torch.cuda.synchronize()
        seconds.append(time.time() - start)
    return sorted(seconds)[repeats // 2], (torch.cuda.max_memory_allocated() - before) / 2**30


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def report(name, function, flops=None, **options):
    try:
        seconds, peak = measure(function, **options)
    except Exception as error:  # what this PyTorch or GPU has not
        return print(f"| {name} | {type(error).__name__}: {str(error)[:60]!r} | | |", flush=True)
    rate = f"{flops / seconds / 1e12:.0f}" if flops else ""
    print(f"| {name} | {1000 * seconds:.1f} | {peak:.2f} | {rate} |", flush=True)
    return seconds


def time_major_window(grid, window):
    """The window as the authors have it: tokens in (t, h, w) order, default blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    frames, height, width = grid

    def visible(batch, head, query, key):
        row, column = query // width % height, query % width
        top = (row - window[0] // 2).clamp(0, height - window[0])
        left = (column - window[1] // 2).clamp(0, width - window[1])
        seen_row, seen_column = key // width % height, key % width
        return ((seen_row >= top) & (seen_row < top + window[0])
                & (seen_column >= left) & (seen_column < left + window[1]))

    tokens = math.prod(grid)
    mask = torch.compile(create_block_mask)(visible, None, None, tokens, tokens, "cuda")
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)


def attention_table():
    print("\n| one self-attention | ms | GiB | TFLOP/s |\n|---|---|---|---|")
    tokens = math.prod(GRID)
    query, key, value = (torch.randn(1, HEADS, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    full_flops = 4 * tokens**2 * HEADS * HEAD_DIM
    window_flops = full_flops * WINDOW[0] * WINDOW[1] / (GRID[1] * GRID[2])  # of the exact window
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        def full(backend=backend):
            with sdpa_kernel([backend]):
                full_attention(query, key, value)
        report(f"full, {backend.name}", full, full_flops)
    attend = time_major_window(GRID, WINDOW)
    report("window, (t, h, w)", lambda: attend(query, key, value), window_flops)
    start = time.time()
    attend = flex_window(GRID, WINDOW)
    first = attend(query, key, value)
    torch.cuda.synchronize()
    print(f"| ours: preparation and first call | {1000 * (time.time() - start):.0f} | | |")
    report("window, ours", lambda: attend(query, key, value), window_flops)
    expected = grouped_window(GRID, WINDOW, device="cuda")(query[:, :1], key[:, :1], value[:, :1])
    print(f"\nours from the groups: {relative(first[:, :1], expected):.1e}")
    start = time.time()
    flex_window(GRID, WINDOW)(query, key, value)
    torch.cuda.synchronize()
    print(f"the same window prepared again, and called: {time.time() - start:.2f} s", flush=True)


def random_transformer(cls, layers, dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = json.loads((HERE / "wan2.1-t2v-1.3b" / "transformer" / "config.json").read_text())
    with torch.device("cuda"):
        transformer = cls(config | {"num_layers": layers}).eval().requires_grad_(False)
    for name, parameter in transformer.named_parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
        if not any(part in name for part in cls.FLOAT32):
            parameter.data = parameter.data.to(dtype)
    return transformer


def step_table(layers=3):
    print("\n| one pass, three blocks | ms | GiB | |\n|---|---|---|---|", flush=True)
    frames, height, width = GRID
    latents = torch.randn(1, 16, frames, 2 * height, 2 * width, device="cuda")
    timestep, text = torch.tensor([900], device="cuda"), torch.randn(1, 512, 4096, device="cuda")
    scale = attention_scale(HEAD_DIM, 1560)
    window, full = flex_window(GRID, WINDOW, scale), partial(full_attention, scale=scale)
    results = {}
    for cls in (WanTransformer, CompiledTransformer):
        transformer, features = random_transformer(cls, layers), {}
        run = partial(predict, transformer, latents, timestep, text, window)
        embedding = report(f"{cls.__name__}: no block", lambda: transformer.embed(latents, timestep, text))
        start = time.time()
        run(full, features), run(), run(features=features)
        torch.cuda.synchronize()
        print(f"| {cls.__name__}: the first passes | {1000 * (time.time() - start):.0f} | | |", flush=True)
        seconds = {name: report(f"{cls.__name__}: {name}", function) for name, function in {
            "both paths": lambda: run(full), "window, kept features": lambda: run(features=features),
            "window, own text": lambda: run()}.items()}
        each = {name: (value - embedding) / layers for name, value in seconds.items()}
        cached = LAYERS * (each["both paths"] / 5 + 4 / 5 * each["window, kept features"] + each["window, own text"])
        uncached = LAYERS * 2 * each["both paths"]
        print(f"\n{cls.__name__}, a step of {LAYERS} blocks: {cached:.1f} s with cache interval 5, {uncached:.1f} s "
              "without\n", flush=True)
        results[cls] = run(full)
    exact = random_transformer(WanTransformer, 1, torch.float32)
    small = latents[:, :, :3]
    with torch.backends.cudnn.flags(allow_tf32=False):
        grid = (3, height, width)
        attends = flex_window(grid, WINDOW, scale), full
        expected = predict(exact, small, timestep, text, *attends)
        for cls in (WanTransformer, CompiledTransformer):
            low = predict(random_transformer(cls, 1), small, timestep, text, *attends)
            print(f"{cls.__name__}: bfloat16 from float32 {relative(low, expected):.3e}")


def vae_table():
    from diffusers import AutoencoderKLWan

    print("| bundled VAE, 17 frames of 192x128, CPU | ours, s | Diffusers, s | from Diffusers' |\n|---|---|---|---|")
    ours, theirs = WanVAE.from_pretrained(HERE.parent / "tiny" / "vae"), AutoencoderKLWan.from_pretrained(
        HERE.parent / "tiny" / "vae")
    video = torch.rand(1, 3, 17, 128, 192, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = ours.encode(video)

    def seconds(function):
        times = []
        for _ in range(3):
            start = time.time()
            result = function()
            times.append(time.time() - start)
        return sorted(times)[1], result

    for name, mine, other in (
        ("encode", lambda: ours.encode(video),
         lambda: (theirs.encode(video).latent_dist.mode() - ours.mean) / ours.std),
        ("decode", lambda: ours.decode(latents),
         lambda: theirs.decode(latents * ours.std + ours.mean).sample.clamp(-1, 1)),
    ):
        (own, result), (rival, expected) = seconds(mine), seconds(other)
        print(f"| {name} | {own:.2f} | {rival:.2f}, {rival / own:.1f} times | {relative(result, expected):.1e} |")


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    if parser.parse_args().quick:
        vae_table()
    else:
        print(torch.cuda.get_device_name(), "PyTorch", torch.__version__, flush=True)
        attention_table()
        torch.cuda.empty_cache()
        step_table()


if __name__ == "__main__":
    main()
