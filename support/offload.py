"""More than a GPU holds: the cross-attention cache and weights in CPU memory, copied while the GPU
computes, and what of it a run will need.

Copies run in a stream of their own, from pinned memory, so they and the computation need not wait
for each other. On a CPU, streams do nothing, and the same code copies at once.
"""

import copy
import math
from dataclasses import dataclass

import torch

from freeswim import HEADS_AT_A_TIME
from model import WanTransformer, build, find_weights, read_weights
from support.processes import are_several, local_world_size, say, world_size
from support.read_ahead import free_memory


def pin(tensor):
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


class Copies:
    """Copies in a stream of their own. `start` begins them when the computation has done all that
    is queued; after `wait`, its later work waits for the copies."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.streams = torch.get_device_module(self.device)
        if self.device.type == "cuda":
            self.stream = self.streams.Stream(self.device)
        else:
            self.stream = self.streams.Stream()

    def computation(self):
        """The stream of the computation, on this device, which need not be the current one."""
        if self.device.type == "cuda":
            return self.streams.current_stream(self.device)
        return self.streams.current_stream()

    def start(self, targets, sources):
        self.stream.wait_stream(self.computation())
        with self.streams.stream(self.stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)

    def wait(self):
        self.computation().wait_stream(self.stream)


class CacheOnCPU:
    """A cross-attention cache of `freeswim.refine`, {block: (B, N, D)}, in CPU memory. Outputs of a
    block leave while it goes on, and come back while the block before it runs."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.kept = {}
        self.copies = Copies(self.device)
        # What is on its way. A tensor has to live until it has arrived.
        self.moving_index = None
        self.moving = None

    def __len__(self):
        return len(self.kept)

    def __setitem__(self, index, outputs):
        self.copies.wait()  # those before have left: only now may their memory be used again
        if index not in self.kept or self.kept[index].shape != outputs.shape:
            self.kept[index] = pin(torch.empty_like(outputs, device="cpu"))
        self.copies.start([self.kept[index]], [outputs])
        self.moving_index = None
        self.moving = outputs

    def __getitem__(self, index):
        if self.moving_index != index:
            self.fetch(index)
        self.copies.wait()
        outputs = self.moving
        if index + 1 in self.kept:
            self.fetch(index + 1)
        return outputs

    def clear(self):
        self.copies.wait()
        self.kept.clear()
        self.moving_index = None
        self.moving = None

    def fetch(self, index):
        outputs = torch.empty_like(self.kept[index], device=self.device)
        self.copies.start([outputs], [self.kept[index]])
        self.moving_index = index
        self.moving = outputs


# --------------------------------------------------------------------------------------------------
# Weights


class StreamedWeights:
    """The `prefetch` of a transformer whose blocks have their weights in CPU memory. Two blocks are
    on the GPU: the one that runs, and the next."""

    def __init__(self, device):
        self.device = device
        self.copies = Copies(device)
        self.slots = []

    def __call__(self, blocks):
        if not self.slots:
            self.prepare(blocks)
        self.send(blocks, 0)
        for index in range(len(blocks)):
            self.copies.wait()
            if index + 1 < len(blocks):
                # To the slot of the block before, whose work is all queued.
                self.send(blocks, index + 1)
            yield self.slots[index % 2]

    def prepare(self, blocks):
        for parameter in blocks.parameters():
            parameter.data = pin(parameter.data)
        for _ in range(2):
            self.slots.append(copy.deepcopy(blocks[0]).to(self.device))

    def send(self, blocks, index):
        slot = self.slots[index % 2]
        self.copies.start(slot.parameters(), blocks[index].parameters())


def load_streamed(folder, device, dtype, adjust=None, **parts):
    """A transformer whose blocks' weights stay in CPU memory, and are streamed to the device.
    `parts` are the constructor's."""
    prefetch = StreamedWeights(device)
    transformer = build(WanTransformer, folder, prefetch=prefetch, **parts)
    of_blocks = {}
    rest = {}
    for name, source in find_weights(transformer, folder).items():
        if name.startswith("blocks."):
            of_blocks[name] = source
        else:
            rest[name] = source
    read_weights(transformer, of_blocks, "cpu", dtype, adjust=adjust)
    return read_weights(transformer, rest, device, dtype, adjust=adjust)


# --------------------------------------------------------------------------------------------------
# What a run will need


@dataclass(frozen=True)
class Placement:
    """Where a run keeps what is large."""

    cache_on_cpu: bool
    stream_weights: bool

    @property
    def is_tight(self):
        """Whether the GPU cannot hold everything."""
        return self.cache_on_cpu or self.stream_weights


def plan_memory(plan, device):
    """The Placement of a run: what the user has said, else what fits into the GPU's free memory. A
    line says so, and another one if that may not fit either."""
    if device.type == "cpu":
        return Placement(cache_on_cpu=False, stream_weights=False)
    options = plan.options
    free, _ = torch.cuda.mem_get_info(device)
    needed = memory_needed(plan)
    cache_on_cpu = options.cache_device == "cpu"
    if options.cache_device is None:
        cache_on_cpu = needed.on_gpu() > free
    stream_weights = options.offload
    if stream_weights is None:
        stream_weights = not are_several() and needed.on_gpu(cache_on_cpu) > free
    say(
        f"cache on the {'CPU' if cache_on_cpu else 'GPU'}, "
        f"weights on the {'CPU' if stream_weights else 'GPU'}: all on the GPU would take about "
        f"{needed.on_gpu() / 2**30:.0f} GiB of {free / 2**30:.0f}"
    )
    placement = Placement(cache_on_cpu, stream_weights)
    expected = needed.on_gpu(cache_on_cpu, stream_weights)
    if expected > free:  # not refused, as the peak may be a few percent lower
        say(
            f"this may take {expected / 2**30:.1f} GiB, and {free / 2**30:.1f} are free; if memory "
            f"runs out, {relief(placement, device)}"
        )
    warn_of_cpu_memory(needed, placement)
    return placement


def warn_of_cpu_memory(needed, placement):
    """A line, if what a run keeps in CPU memory may not fit. The system would end the run without a
    word."""
    of_process = needed.on_cpu(placement.cache_on_cpu, placement.stream_weights)
    expected = of_process * local_world_size()
    free = free_memory()
    if free is None or expected <= free:
        return
    advice = "begin with --no-cache" if placement.cache_on_cpu else "free some"
    say(
        f"this may take {expected / 2**30:.1f} GiB of CPU memory, and {free / 2**30:.1f} are free; "
        f"if the system ends the run, {advice}"
    )


def relief(placement, device):
    """What helps next when memory is full."""
    smaller = "a lower --size or --frames"
    if device.type == "cpu":
        return f"free some, or begin with {smaller}"
    if not placement.cache_on_cpu:
        return f"go on with --cache-device cpu, or begin with {smaller}"
    if not placement.stream_weights:
        if are_several():
            return f"go on with --shard-weights, or begin with {smaller}"
        return f"go on with --offload, or begin with {smaller}"
    return f"begin with {smaller}"


@dataclass(frozen=True)
class Needed:
    """Bytes that one process needs on its GPU, and in CPU memory for what is kept there."""

    blocks: float  # weights of the transformer's blocks
    block: float  # those of one
    other_weights: float  # its other weights, and the VAE's
    working: float  # tensors of all its tokens
    cache: float  # cross-attention outputs of all blocks
    cache_of_block: float
    pinned_blocks: int  # the blocks' weights in CPU memory
    pinned_cache: int  # the cache there

    def on_gpu(self, cache_on_cpu=False, stream_weights=False):
        cache = self.cache_of_block if cache_on_cpu else self.cache
        return self.weights(stream_weights) + self.working + cache

    def on_cpu(self, cache_on_cpu, stream_weights):
        cache = self.pinned_cache if cache_on_cpu else 0
        weights = self.pinned_blocks if stream_weights else 0
        return cache + weights

    def weights(self, stream_weights=False):
        return (2 * self.block if stream_weights else self.blocks) + self.other_weights


# What `working_tensors` adds up, fitted to peaks that tests/bench measured: speed.py estimate and
# several.py.
BLOCK_TENSORS = 8  # in any case
ATTENTION_TENSORS = 7  # more, if attention took all heads at a time
EXCHANGED_TENSORS = 3.5  # more, if there are several processes


def working_tensors(heads):
    """How many tensors of all its tokens a process needs at most, without the cache."""
    heads_of_process = math.ceil(heads / world_size())
    at_a_time = min(HEADS_AT_A_TIME, heads_of_process) / heads_of_process
    count = BLOCK_TENSORS + ATTENTION_TENSORS * at_a_time
    if are_several():
        count += EXCHANGED_TENSORS
    return count


# Bytes that kernels and libraries take for themselves: with 6.5 GiB free, a run whose tensors took
# 5.9 ran out of memory, and with 7.0 it completed.
SPARE = 450 * 10**6


def vae_weights(plan):
    """Bytes of the VAE's weights: float32, and a float16 copy if it computes in that."""
    itemsize = 4 if plan.options.vae_dtype == "float32" else 4 + 2
    return itemsize * sum(parameter.numel() for parameter in plan.parts.vae.parameters())


def memory_needed(plan):
    """The Needed of a plan."""
    options = plan.options
    transformer = plan.parts.transformer
    height, width = plan.computed
    token_size = plan.parts.token_size
    itemsize = getattr(torch, options.dtype).itemsize
    num_tokens = plan.latent_frames * (height // token_size) * (width // token_size)
    tokens = num_tokens * transformer.dim * itemsize / world_size()  # bytes
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    sizes = [parameter.numel() for parameter in transformer.blocks[0].parameters()]
    of_block = sum(sizes)
    count = len(transformer.blocks)
    blocks = count * of_block
    if options.shard_weights:
        blocks = blocks / world_size() + 2 * of_block  # its share, and the two that are in use
    cache_of_block = 0 if options.cache_interval is None else tokens
    other_weights = (parameters - count * of_block) * itemsize + vae_weights(plan) + SPARE
    return Needed(
        blocks=blocks * itemsize,
        block=of_block * itemsize,
        other_weights=other_weights,
        working=working_tensors(transformer.heads) * tokens,
        cache=count * cache_of_block,
        cache_of_block=cache_of_block,
        pinned_blocks=count * sum(pinned_size(size * itemsize) for size in sizes),
        pinned_cache=count * pinned_size(cache_of_block),
    )


def pinned_size(size):
    """Bytes that PyTorch takes for a pinned tensor of so many: the next power of two."""
    if size == 0:
        return 0
    return 2 ** math.ceil(math.log2(size))


# --------------------------------------------------------------------------------------------------
# How the VAE divides frames

VAE_TILES = {  # sizes in latents
    "whole": {},
    "64": {"tile": 64, "stride": 56},
    "32": {"tile": 32, "stride": 24},  # Diffusers', and the class's own
}
WHOLE_ON_CPU = 512 * 512  # pixels; larger frames would take much memory
MOST_ELEMENTS = 2**31  # of a tensor, which kernels address with 32 bits

# Fitted to peaks that tests/bench measured: speed.py vae. While a VAE decodes, it holds about as
# many tensors of its widest stage, over the four frames of a latent.
VAE_TENSORS = 13
SHORTCUT_TENSORS = 3  # more in Wan2.2-TI2V-5B's, whose stages keep a shortcut of their input


def choose_vae_tiles(plan, device, placement):
    """How the VAE of a run divides frames, as a key of VAE_TILES: as little as fits into the GPU's
    free memory next to the transformer's weights. Whole frames have no seams and are the fastest.
    Processes that share the tiles need some."""
    height, width = plan.computed
    if device.type == "cpu":
        target_height, target_width = plan.target
        return "whole" if target_height * target_width <= WHOLE_ON_CPU else "32"
    free, _ = torch.cuda.mem_get_info(device)
    left = free - memory_needed(plan).weights(placement.stream_weights)
    side = VAE_TILES["64"]["tile"] * plan.parts.latent_size
    addressable = 6 * vae_channels(plan) * height * width < MOST_ELEMENTS
    if not are_several() and addressable and vae_memory(plan, height * width) <= left:
        return "whole"
    if vae_memory(plan, min(side, height) * min(side, width)) <= left:
        return "64"
    return "32"


def vae_channels(plan):
    """Numbers for each pixel in the VAE's widest stage, which is as fine as what it works on:
    pixels or patches."""
    config = plan.parts.vae.config
    return max(config["base_dim"], config["decoder_base_dim"]) / plan.parts.vae.patch**2


def vae_memory(plan, pixels):
    """Bytes that decoding needs on top of all weights, with tiles of so many pixels."""
    height, width = plan.computed
    frames = plan.options.frames
    itemsize = getattr(torch, plan.options.vae_dtype).itemsize
    canvas = 3 * frames * height * width * 4  # the video, float32
    decoded = 3 * frames * pixels * itemsize  # of a tile
    tensors = VAE_TENSORS
    if plan.parts.vae.config.get("is_residual"):
        tensors += SHORTCUT_TENSORS
    working = tensors * 4 * vae_channels(plan) * pixels * itemsize
    return canvas + decoded + working
