"""Several GPUs compared with one, in the same run:

    torchrun --nproc-per-node N tests/bench/several.py [TABLE ...]

The tables are step, exchange and vae; without a name, all of them. The first process works alone
while the others wait, then all of them share the work. Random weights of the 1.3B's dimensions in
bfloat16, 81 frames of 1920x1088. Passes of three blocks are timed; a step is worked out from them
for 30, as all blocks are alike. Memory is the allocated peak of one GPU.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

BENCH = Path(__file__).parent
sys.path[:0] = [str(BENCH), str(BENCH.parent), str(BENCH.parent.parent)]
from speed import (
    HD,
    HEAD_DIM,
    HEADS,
    LAYERS,
    PUBLISHED,
    SCALE,
    WINDOW,
    expected_memory,
    inputs,
    random_transformer,
    with_all_blocks,
    without_blocks,
)

from freeswim import predict_cached, predict_dual
from model import WanTransformer, full_attention
from support import attention, compiled, sequence_parallel

BLOCKS = 3
REPEATS = 2


def say(*words):
    if dist.get_rank() == 0:
        print(*words, flush=True)


def clock(function, together):
    """Seconds of the faster of two calls, after one that compiles, and the peak in GiB."""
    function()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        if together:
            dist.barrier()
        start = time.time()
        function()
        torch.cuda.synchronize()
        times.append(time.time() - start)
    return min(times), torch.cuda.max_memory_allocated() / 2**30


@dataclass
class Step:
    """Seconds of a step with cache interval 5 and without a cache, the peak of memory in GiB, and
    the peak that support/offload.py expects where all processes share the work."""

    cached: float
    uncached: float
    peak: float
    expected: float


def measure_step(full, window_attention, together):
    parts = {"attention": full}
    transformer_class = WanTransformer
    if together:
        sequence = sequence_parallel.SequenceParallel(HEADS)
        parts = {"attention": sequence.attention(full), "sequence": sequence}
        window_attention = sequence.window_attention(window_attention)
        transformer_class = sequence_parallel.SequenceParallelTransformer
    block = compiled.CompiledBlock
    transformer = random_transformer(block, BLOCKS, cls=transformer_class, **parts)
    given = inputs(HD)
    attend = window_attention(HD, WINDOW, SCALE)
    attend_full = partial(transformer.full_attention, scale=SCALE)
    cache = {}
    peaks = []

    def seconds_of(function):
        seconds, peak = clock(function, together)
        peaks.append(peak)
        return seconds

    outside = seconds_of(partial(without_blocks, transformer, *given))

    def for_all_blocks(function):
        return with_all_blocks(seconds_of(function), outside, BLOCKS)

    dual = for_all_blocks(partial(predict_dual, transformer, *given, attend, attend_full, cache))
    cached = for_all_blocks(partial(predict_cached, transformer, *given, attend, cache))
    window = for_all_blocks(partial(transformer, *given, attend))
    return Step(
        cached=(dual + 4 * cached) / 5 + window,
        uncached=2 * dual,
        peak=max(peaks),
        expected=expected_memory(transformer, HD, False, False) / 2**30,
    )


def step_table():
    say(f"\n| {LAYERS} blocks | step, cache 5, s | step, no cache, s | peak, GiB |")
    say("|---|---|---|---|")
    choices = {
        "Triton": (full_attention, attention.tuned_window),
        "flash-attn-4": (attention.flash_full_attention, attention.flash_window),
    }
    for name, (full, window_attention) in choices.items():
        try:
            attention.try_window(window_attention, torch.device("cuda"), torch.bfloat16, HEAD_DIM)
        except Exception as error:  # not installed, or not for this GPU
            say(f"without {name}: {type(error).__name__}: {str(error)[:99]}")
            continue
        one = None
        if dist.get_rank() == 0:
            one = measure_step(full, window_attention, together=False)
            say(f"| one process, {name} | {one.cached:.2f} | {one.uncached:.2f} | {one.peak:.1f} |")
        dist.barrier()
        several = measure_step(full, window_attention, together=True)
        if one is not None:
            say(
                f"| {dist.get_world_size()} processes, {name} | "
                f"{several.cached:.2f}, {one.cached / several.cached:.2f} times as fast | "
                f"{several.uncached:.2f}, {one.uncached / several.uncached:.2f} times | "
                f"{several.peak:.2f}, expected {several.expected:.2f} |"
            )
        dist.barrier()


def exchange_table():
    """One all-to-all of queries from tokens to heads; a self-attention has four."""
    say("\n| exchange of one tensor | bytes sent by each | ms | GB/s |\n|---|---|---|---|")
    ranks = dist.get_world_size()
    num_tokens = math.prod(HD)
    shape = (1, HEADS, num_tokens // ranks, HEAD_DIM)
    query = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    times = 10
    num_tokens = num_tokens // ranks * ranks

    def exchange_often():
        for _ in range(times):
            sequence_parallel.all_to_all(query, 1, 2, num_tokens)

    seconds, _ = clock(exchange_often, together=True)
    seconds = seconds / times
    sent = query.numel() * query.element_size() * (ranks - 1) // ranks
    say(
        f"| (1, {HEADS}, {shape[2]}, {HEAD_DIM}) | {sent} | {1000 * seconds:.2f} | "
        f"{sent / seconds / 1e9:.0f} |"
    )


def vae_table():
    say("\n| VAE, 17 frames of 1920x1088 | encode, s | decode, s | peak, GiB |\n|---|---|---|---|")
    video = torch.rand(1, 3, 17, 1088, 1920, device="cuda") * 2 - 1
    latents = torch.randn(1, 16, 5, 136, 240, device="cuda")
    config = json.loads((PUBLISHED / "vae" / "config.json").read_text(encoding="utf-8"))
    for together in (False, True):
        if together or dist.get_rank() == 0:
            torch.manual_seed(0)
            with torch.device("cuda"):
                share = sequence_parallel.SharedTiles() if together else None
                vae = compiled.FastVAE(config, share=share).eval().requires_grad_(False)
            vae.use_channels_last()
            encode, _ = clock(partial(vae.encode, video), together)
            decode, peak = clock(partial(vae.decode, latents), together)
            name = f"{dist.get_world_size()} processes" if together else "one process"
            say(f"| {name}, TF32 | {encode:.2f} | {decode:.2f} | {peak:.1f} |")
        dist.barrier()


TABLES = {"step": step_table, "exchange": exchange_table, "vae": vae_table}


@torch.no_grad()
def main():
    unknown = set(sys.argv[1:]) - TABLES.keys()
    if unknown:
        sys.exit(f"no such table: {', '.join(unknown)}; there are {', '.join(TABLES)}")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    say(torch.cuda.get_device_name(), "PyTorch", torch.__version__, time.strftime("%Y-%m-%d"))
    for name in sys.argv[1:] or TABLES:
        TABLES[name]()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
