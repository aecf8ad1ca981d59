"""FreeSwim (arXiv 2511.14712): ultra-high-resolution video from a pretrained video diffusion
transformer, no training.

A base clip of native size is upsampled, noised and denoised again at the large size. There, every
token attends only to a window of native size that moves inward at the borders (so that it sees what
it saw in training), while a second path with full attention decides the content: its
cross-attention output overrides the window path's. That output changes slowly from step to step, so
that it can be kept for several steps.

Letters in shapes are those of model.py. `grid` is (T, H, W) and `window` (rows, columns), both odd;
time has no window.
"""

import itertools
import math
from functools import partial

import torch
import torch.nn.functional as F

from model import full_attention

# --------------------------------------------------------------------------------------------------
# Inward windows (paper, section 3.2), then attention within them, three times the same: each
# function prepares an `attend` from query, key and value, each (B, heads, N, head_dim) with tokens
# in (h, w, t) order, to attended values


def window_spans(length, size, kind="inward"):
    """For every position of an axis, the start and the end of what it sees; int64 (length,) each.
    An "inward" window moves inward at a border and keeps its size; a "clipped" one is cut off. A
    window larger than the axis sees all of it."""
    start = torch.arange(length) - size // 2
    if kind == "inward":
        start = start.clamp(0, max(length - size, 0))
    return start.clamp(min=0), (start + size).clamp(max=length)


def inward_mask(height, width, window, kind="inward"):
    """May a query position see a key position? bool (height * width, height * width), both row by
    row."""

    def axis(length, size):
        (start, end), key = window_spans(length, size, kind), torch.arange(length)
        return (start[:, None] <= key) & (key < end[:, None])  # (query, key)

    rows, columns = axis(height, window[0]), axis(width, window[1])
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(
        height * width, height * width
    )


def dense_window(grid, window, scale=None, kind="inward", device="cpu"):
    """Window attention to read and to test against: one mask of N x N, so N = T*H*W must be small."""
    mask = inward_mask(*grid[1:], window, kind).to(device)
    mask = mask.repeat_interleave(grid[0], 0).repeat_interleave(
        grid[0], 1
    )  # every frame sees every frame
    return lambda query, key, value: F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale
    )


def grouped_window(grid, window, scale=None, kind="inward", device="cpu"):
    """Window attention on any device, without a mask: queries that share a window attend to it
    together. Of each axis, the positions near a border share one, the others have their own. Memory
    is that of one window's columns."""
    frames, height, width = grid

    def shared(length, size):
        spans = list(
            zip(*(ends.tolist() for ends in window_spans(length, size, kind)), strict=True)
        )
        runs = ([*run] for _, run in itertools.groupby(range(length), key=spans.__getitem__))
        return [(slice(run[0], run[-1] + 1), slice(*spans[run[0]])) for run in runs]

    all_rows, all_columns = shared(height, window[0]), shared(width, window[1])

    def attend(query, key, value):
        query, key, value = (x.unflatten(2, (height, width, frames)) for x in (query, key, value))
        attended = torch.empty_like(query)  # (B, heads, H, W, T, head_dim)
        for columns, seen_columns in all_columns:
            seen_key, seen_value = (x[:, :, :, seen_columns].contiguous() for x in (key, value))
            for rows, seen_rows in all_rows:  # views of these copies
                part = query[:, :, rows, columns]
                attended[:, :, rows, columns] = F.scaled_dot_product_attention(
                    part.flatten(2, 4),
                    seen_key[:, :, seen_rows].flatten(2, 4),
                    seen_value[:, :, seen_rows].flatten(2, 4),
                    scale=scale,
                ).view_as(part)
        return attended.flatten(2, 4)

    return attend


# FlexAttention's options, as measured, by GPU generation (major compute capability): 9 is H100 and
# H200
FLEX_OPTIONS = {
    9: dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3, USE_TMA=True),
    "flash-attn-4": dict(BACKEND="FLASH"),
}  # where that package is installed, support/fast.py prefers it


def flex_window(grid, window, scale=None, kind="inward", device="cuda", options=None):
    """Window attention on a GPU: one FlexAttention kernel that visits only the blocks of the mask
    that it needs. The mask does not depend on time. With time innermost, a block of 64 tokens is a
    few positions over all frames, so that few blocks are visited in vain: this is why tokens stand
    in (h, w, t) order."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    options = (
        FLEX_OPTIONS.get(torch.cuda.get_device_capability(device)[0], {})
        if options is None
        else options
    )
    frames, height, width = grid
    rows, columns = (
        (min(sizes) for sizes in zip(window, grid[1:], strict=True)) if kind == "inward" else window
    )
    size, fill = (
        options.get("BLOCK_M", 128),
        -(tokens := math.prod(grid)) % 128,
    )  # whole blocks are a tenth faster

    # A row and a column are one number, row * 2**14 + column, so that both are compared at once.
    def place(key):
        row, column = key // frames // width, key // frames % width
        return torch.where(
            row < height, row * 2**14 + column, 2**29
        )  # what fills the last block is far from all

    def start(query):  # of its window
        row, column = (
            query // frames // width - window[0] // 2,
            query // frames % width - window[1] // 2,
        )
        if kind == "inward":
            row, column = row.clamp(0, height - rows), column.clamp(0, width - columns)
        return row * 2**14 + column

    if "BACKEND" in options:  # FLASH knows no division: the numbers are looked up
        places, starts = (
            number(torch.arange(tokens + fill, device=device)).int() for number in (place, start)
        )
        place, start = lambda key: places[key], lambda query: starts[query]

    def visible(batch, head, query, key):
        ahead = place(key) - start(
            query
        )  # a key before the window makes this negative, one behind it the rest below:
        rest = (
            (rows - 1) * 2**14 + columns - 1 - ahead
        )  # then bit 30 is set, or bit 13 if it is so in columns alone
        return (ahead | rest) & (2**30 + 2**13) == 0

    def attend(query, key, value):
        attended = torch.empty_like(query)
        groups = (
            part.split(4, dim=1) for part in (query, key, value, attended)
        )  # of 4 heads: indices fit 32 bits
        for *parts, result in zip(*groups, strict=True):
            parts = (F.pad(part, (0, 0, 0, fill)) for part in parts)
            result.copy_(
                compiled(*parts, block_mask=block_mask, scale=scale, kernel_options=options)[
                    :, :, :tokens
                ]
            )
        return attended

    # Which blocks of tokens see one another? Those of whose positions some do, or all: then the
    # mask need not be asked.
    token = torch.arange(0, tokens + fill, size)[:, None] + torch.tensor(
        [*range(0, size, frames), size - 1]
    )
    positions = token.clamp(max=tokens - 1).to(device) // frames  # (blocks, few)
    some = every = inward_mask(height, width, window, kind).to(device)
    for _ in range(
        2
    ):  # queries, then keys; contiguous, as the kernel reads the lists row after row in memory
        some, every = some[positions].any(1).T.contiguous(), every[positions].all(1).T.contiguous()
    every[:, tokens // size :] = False  # what fills the last block is never seen
    lists = (
        part[None, None].int()
        for blocks in (some & ~every, every)
        for part in (blocks.sum(1), blocks.int().argsort(dim=1, descending=True, stable=True))
    )
    block_mask = BlockMask.from_kv_blocks(*lists, size, visible)
    # Run eagerly, it would hold all N x N pairs. Left to itself, PyTorch does that after 8 shapes,
    # without a word.
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    compiled = torch._dynamo.config.patch(recompile_limit=2**16)(compiled)
    return torch.compiler.disable(
        attend, recursive=False
    )  # where blocks are compiled, it is not a part of them


def attention_scale(head_dim, native_tokens):
    """The refinement's self-attention scale, sqrt(log_n(2n) / head_dim), for n tokens per native
    frame."""
    return math.sqrt(math.log(2 * native_tokens, native_tokens) / head_dim)


# --------------------------------------------------------------------------------------------------
# The dual path with cross-attention override (paper, section 3.3 and Figure 2)


def predict(transformer, latents, timestep, text, attend_window, attend_full=None, features=None):
    """The velocity that the window path predicts, float32, in the shape of `latents`, (B, 16, T,
    2H, 2W). `timestep` is (B,), `text` (B, L, text_dim); `attend_window` and `attend_full` are the
    two paths' self-attentions.

    With `attend_full`, the full path runs beside the window path, and its cross-attention outputs
    take the place of the window path's; they are kept in the dict `features`, {block: (B, N, D)},
    if one is given. Without it, those of `features` take it (ValueError if there are none). Without
    either, the window path has its own."""
    if attend_full is None and features is not None and len(features) < len(transformer.blocks):
        raise ValueError(
            "features hold nothing yet: the full path has to run first, with attend_full"
        )
    _, _, frames, height, width = latents.shape
    window_tokens, time, modulation, text, rotary = transformer.embed(latents, timestep, text)
    full_tokens = window_tokens  # both paths start from the same latents
    for index, block in enumerate(transformer.blocks):
        window_tokens = block.self_attention(window_tokens, modulation, rotary, attend_window)
        if attend_full is not None:
            full_tokens = block.self_attention(full_tokens, modulation, rotary, attend_full)
            content = block.cross_attention(full_tokens, text)
            if index + 1 < len(
                transformer.blocks
            ):  # what follows the last cross-attention is never used
                full_tokens = block.feed_forward(full_tokens + content, modulation)
            if features is not None:
                features[index] = content
        elif features is not None:
            content = features[index]
        else:
            content = block.cross_attention(window_tokens, text)
        window_tokens = block.feed_forward(window_tokens + content, modulation)
        del content  # as large as all tokens: not needed any more
    return transformer.unembed(window_tokens, time, (frames, height // 2, width // 2))


# --------------------------------------------------------------------------------------------------
# The flow solver


class FlowUniPC:
    """UniPC (arXiv 2302.04867) for flow matching: order 2, B(h) = e^h - 1, predicting the clean
    latents, first order at both ends. Of `steps` steps, the last int(steps * strength) are kept. A
    noisy latent is (1 - sigma) * clean + sigma * noise. `sigmas` holds one per kept step and a
    final 0, `timesteps` what the model is told: 1000 * sigma rounded down. All arithmetic after the
    grid is float32, as in the references."""

    def __init__(self, steps, flow_shift, strength=1.0):
        if not 1 <= int(steps * strength) <= steps:
            raise ValueError(
                f"{steps} steps at strength {strength}: between 1 and {steps} steps must remain"
            )
        sigmas = 0.999 * (1 - torch.arange(steps, dtype=torch.float64) / steps)
        sigmas = flow_shift * sigmas / (1 + (flow_shift - 1) * sigmas)
        sigmas = sigmas[steps - int(steps * strength) :]
        self.timesteps = (1000 * sigmas).long().tolist()
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)]).float()
        self.log_snr = torch.log(1 - self.sigmas) - torch.log(
            self.sigmas
        )  # UniPC's time, without end
        self.index = 0
        self.start = None  # the latents that the last step started from
        self.clean = []  # the last two predictions of the clean latents, newest first

    def add_noise(self, latents, noise):
        """Clean latents at the first kept noise level."""
        return (1 - self.sigmas[0]) * latents + self.sigmas[0] * noise

    def state(self, latents):
        """What `resume` needs to go on from these latents: a dict of tensors."""
        history = {
            "start": self.start,
            **{f"clean.{age}": clean for age, clean in enumerate(self.clean)},
        }
        return {"step": torch.tensor(self.index), "latents": latents} | (
            history if self.index > 0 else {}
        )

    def resume(self, state):
        """Go on from a `state`; returns its latents."""
        self.index, self.start = int(state["step"]), state.get("start")
        self.clean = [state[f"clean.{age}"] for age in range(2) if f"clean.{age}" in state]
        return state["latents"]

    def step(self, velocity, latents):
        """From the latents at one noise level, and the model's velocity there, to those at the
        next; float32."""
        clean = latents - self.sigmas[self.index] * velocity
        if self.index > 0:  # UniC: do the last step again, now that its end is known as well
            latents = self.advance(self.index - 1, self.start, clean)
        self.start, self.clean = latents, [clean, *self.clean[:1]]
        latents = self.advance(self.index, latents)  # UniP
        self.index += 1
        return latents

    def advance(self, index, latents, end=None):
        """One step from noise level `index` to the next (UniPC, equations 3 and 9, written for
        order at most 2). `end` is the prediction of the clean latents at the next level, if known:
        the corrector."""
        sigma, next_sigma = self.sigmas[index], self.sigmas[index + 1]
        order = min(2, len(self.timesteps) - index, index + 1)
        now, *before = self.clean
        h = self.log_snr[index + 1] - self.log_snr[index]
        slope = 0
        if order == 2:
            r = (self.log_snr[index - 1] - self.log_snr[index]) / h
            past = (before[0] - now) / r
        if end is None and order == 2:
            slope = past / 2
        elif end is not None and order == 1:
            slope = (end - now) / 2
        elif (
            end is not None
        ):  # both differences, weighted so that quadratics are integrated exactly
            phi_1 = torch.expm1(-h)
            phi_2 = -phi_1 / h - 1
            phi_3 = -phi_2 / h - 1 / 2
            weight = (phi_2 - 2 * phi_3) / phi_1 / (1 - r)
            slope = weight * past + (phi_2 / phi_1 - weight) * (end - now)
        return next_sigma / sigma * latents - (1 - next_sigma) * torch.expm1(-h) * (now + slope)


# --------------------------------------------------------------------------------------------------
# From text to a base clip, from a base clip to a refined one


@torch.no_grad()
def generate(
    transformer,
    text,
    negative,
    shape,
    *,
    steps=50,
    flow_shift=3.0,
    guidance=5.0,
    generator=None,
    progress=iter,
):
    """Latents of a base clip, float32, of `shape` (B, 16, T, 2H, 2W), which should be the native
    size. `text` and `negative` are (B, L, text_dim); `generator` is a CPU generator, so that a seed
    gives the same noise on every device. `progress` may wrap the list of steps, as tqdm does."""
    solver = FlowUniPC(steps, flow_shift)
    latents = torch.randn(shape, generator=generator).to(text.device)
    for t in progress(solver.timesteps):
        timestep = torch.full(shape[:1], t, device=text.device)
        velocity, unguided = (transformer(latents, timestep, prompt) for prompt in (text, negative))
        latents = solver.step(unguided + guidance * (velocity - unguided), latents)
    return latents


def upsample(video, height, width):
    """Resize the frames of (B, 3, F, H, W) bilinearly, half-pixel centres, no antialiasing."""
    frames = video.transpose(1, 2).flatten(0, 1)
    frames = F.interpolate(frames, (height, width), mode="bilinear", align_corners=False)
    return frames.unflatten(0, (video.shape[0], -1)).transpose(1, 2)


@torch.no_grad()
def refine(
    transformer,
    latents,
    text,
    negative,
    *,
    native,
    steps=50,
    strength=0.7,
    flow_shift=9.0,
    guidance=5.0,
    cache_interval=None,
    scale_tokens=None,
    generator=None,
    kind="inward",
    override=True,
    prepare=None,
    features=None,
    progress=iter,
    state=None,
    save=None,
):
    """Refined latents, float32, in the shape of `latents`, (B, 16, T, 2H, 2W): the upsampled clip,
    encoded and clean.

    `native` is (rows, columns) of tokens of a native frame; `text`, `negative`, `generator` and
    `progress` are as in `generate`. The last int(steps * strength) steps run. Both paths'
    self-attentions are scaled for `scale_tokens` tokens per frame, by default the native ones.

    `cache_interval=None` runs both paths at every step, for the negative prompt too. With k, the
    full path runs every k steps, for the prompt only, and its features serve until the next; the
    negative prompt's window path has its own cross-attention (paper, section 3.4). The window's
    `kind` may also be "clipped" or "full", and `override` off, to see what each ingredient does.
    Raises ValueError if no step remains, or for another `kind`. `prepare` makes the window
    attention (`flex_window` on a GPU, else `grouped_window`), `features` keeps features (a dict).

    `save(state)` is called with a dict of tensors before every step at which no kept features are
    needed; with that `state`, a later call goes on from there, and gives the same latents."""
    if kind not in ("inward", "clipped", "full"):
        raise ValueError(f"kind is {kind!r}, but should be 'inward', 'clipped' or 'full'")
    if min(native) < 2 or latents.ndim != 5:
        raise ValueError(
            f"native {native} should be from (2, 2) on, latents {[*latents.shape]} (B, 16, T, 2H, 2W)"
        )
    solver = FlowUniPC(steps, flow_shift, strength)
    batch, _, frames, height, width = latents.shape
    scale = attention_scale(transformer.head_dim, scale_tokens or native[0] * native[1])
    attend_full = attend_window = partial(full_attention, scale=scale)
    if kind != "full":
        prepare = prepare or (flex_window if latents.is_cuda else grouped_window)
        window = tuple(
            2 * (tokens // 2) + 1 for tokens in native
        )  # odd: 31 x 53 for 480p, which has 30 x 52 tokens
        attend_window = prepare(
            (frames, height // 2, width // 2), window, scale, kind, latents.device
        )

    latents = (
        solver.resume(state)
        if state is not None
        else solver.add_noise(
            latents, torch.randn(latents.shape, generator=generator).to(latents.device)
        )
    )
    features = None if not (override and cache_interval) else {} if features is None else features
    if features is not None and solver.index % cache_interval:
        raise ValueError(
            f"state of step {solver.index} lacks the features that cache_interval {cache_interval} needs"
        )
    for step, t in progress(list(enumerate(solver.timesteps))[solver.index :]):
        renewed = step % (cache_interval or 1) == 0
        if save is not None and renewed:
            save(solver.state(latents))
        timestep = torch.full((batch,), t, device=latents.device)
        dual = attend_full if override and renewed else None
        velocity = predict(transformer, latents, timestep, text, attend_window, dual, features)
        dual = attend_full if override and not cache_interval else None
        unguided = predict(transformer, latents, timestep, negative, attend_window, dual)
        latents = solver.step(unguided + guidance * (velocity - unguided), latents)
    return latents
