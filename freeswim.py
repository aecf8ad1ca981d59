"""FreeSwim (arXiv 2511.14712): ultra-high-resolution video from a pretrained video diffusion
transformer, without training.

A base clip is generated at native size, the size the model was trained on. It is then upsampled,
noised, and denoised again at the large size. Two paths run through the transformer there:

- The window path. Each token attends to a window about as large as a native frame, which is as much
  as tokens saw in training. This gives sharp detail, but a window knows nothing of the rest of the
  frame, so on its own this path repeats the subject.
- The full path, with ordinary attention over the whole frame. It decides what goes where: in every
  block, its cross-attention output replaces the window path's.

The cross-attention output changes slowly from step to step, so it can be cached for several steps.

Shapes: B clips, T latent frames, H x W tokens per frame, N = T * H * W tokens, D channels, L text
tokens. Latents have Z channels, 16 in most models. One token is a patch of 2 x 2 latents, in most
models 16 x 16 pixels. Tokens are ordered (h, w, t), time innermost. A `grid` is (T, H, W). A
`window` is (rows, columns) of tokens, both odd; it spans all frames.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from model import WanTransformer, full_attention, is_finite

Grid = tuple[int, int, int]  # T, H, W
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of query, key and value


class StateError(ValueError):
    """A saved state that `refine` cannot go on from. The message says what is wrong with it."""


class NotFiniteError(ArithmeticError):
    """Latents that are not finite. The message says after which step."""


# --------------------------------------------------------------------------------------------------
# Inward windows (paper, section 3.2)


def window_size(native_length: int) -> int:
    """Length of a window along one axis: that of a native frame, in tokens, rounded up to an odd
    number: the query is in the middle. 480p has 30 x 52 tokens; its window is 31 x 53.
    """
    return 2 * (native_length // 2) + 1


def window_start(position: Tensor, length: int, size: int, border: str = "inward") -> Tensor:
    """Where the window of the query at `position` starts, along an axis of `length` tokens.

    "inward" moves a window at the border inward: it stays on the axis and keeps its size. "clipped"
    leaves it centred on the query: the part before 0 or after `length` is lost. `position` is an
    int tensor. Raises ValueError for another border.
    """
    if border not in ("inward", "clipped"):
        raise ValueError(f"border is {border!r}, but must be 'inward' or 'clipped'")
    start = position - size // 2
    if border == "inward":
        start = start.clamp(0, max(length - size, 0))
    return start


def in_window(query_position, key_position, length, size, border="inward"):
    """Whether the query's window contains the key, along one axis. Positions are int tensors."""
    start = window_start(query_position, length, size, border)
    return (start <= key_position) & (key_position < start + size)


def window_mask(height: int, width: int, window: tuple[int, int], border: str = "inward") -> Tensor:
    """Which positions of a frame may see which: bool (H*W, H*W), queries by keys, row-major."""
    row = torch.arange(height)
    column = torch.arange(width)
    rows = in_window(row[:, None], row, height, window[0], border)  # (H, H)
    columns = in_window(column[:, None], column, width, window[1], border)  # (W, W)
    mask = rows[:, None, :, None] & columns[None, :, None, :]  # (H, W, H, W)
    return mask.reshape(height * width, height * width)


def dense_window(
    grid: Grid, window: tuple[int, int], scale: float | None = None, border="inward", device="cpu"
) -> Attend:
    """Window attention by its definition, with one N x N mask. For small N.

    Like `grouped_window` and `flex_window` at the end of this file, which are faster, it prepares
    and returns a function `attend(query, key, value)`. Inputs and output are (B, heads, N,
    head_dim).
    """
    frames, height, width = grid
    mask = window_mask(height, width, window, border).to(device)
    mask = mask.repeat_interleave(frames, dim=0).repeat_interleave(frames, dim=1)  # (N, N)

    def attend(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

    return attend


def no_window(grid, window, scale=None, border="inward", device="cpu", attention=full_attention):
    """Full attention in the place of a window attention, for ablations."""
    return partial(attention, scale=scale)


def attention_scale(head_dim: int, native_tokens: int) -> float:
    """Softmax scale of the refinement's self-attention in both paths: sqrt(log_n(2n) / head_dim),
    where n is the number of tokens in a native frame. The ordinary scale is sqrt(1 / head_dim)."""
    return math.sqrt(math.log(2 * native_tokens, native_tokens) / head_dim)


# --------------------------------------------------------------------------------------------------
# Dual path with cross-attention override (paper, section 3.3 and Figure 2)


def predict_dual(
    transformer: WanTransformer,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    attend_window: Attend,
    attend_full: Attend,
    cache: dict | None = None,
) -> Tensor:
    """The window path's velocity, with its cross-attention output replaced by the full path's in
    every block. float32, in the shape of `latents`, (B, Z, T, 2H, 2W).

    `timestep` is (B,) and `text` (B, L, text_dim). With a `cache`, a dict, the cross-attention
    outputs, (B, N, D), are kept there by block.
    """
    window_tokens, time_emb, modulation, context, rotary, grid = transformer.embed(
        latents, timestep, text
    )
    full_tokens = window_tokens  # both paths start from the same latents
    last = len(transformer.blocks) - 1
    for index, block in enumerate(transformer.prefetch(transformer.blocks)):
        window_tokens = block.self_attention(window_tokens, modulation, rotary, attend_window)
        full_tokens = block.self_attention(full_tokens, modulation, rotary, attend_full)
        cross_output = block.cross_attention(full_tokens, context)
        if cache is not None:
            cache[index] = cross_output
        if index < last:  # nothing reads the full path after its last cross-attention
            full_tokens = block.feed_forward(full_tokens + cross_output, modulation)
        window_tokens = window_tokens + cross_output
        del cross_output  # as large as all tokens, so it goes before the feed-forward network
        window_tokens = block.feed_forward(window_tokens, modulation)
    return transformer.unembed(window_tokens, time_emb, grid)


def predict_cached(
    transformer: WanTransformer,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    attend_window: Attend,
    cache: dict,
) -> Tensor:
    """The window path's velocity, with cross-attention outputs from the `cache` that an earlier
    `predict_dual` filled. Arguments and result are as there. Raises ValueError if the cache is
    empty."""
    if len(cache) < len(transformer.blocks):
        raise ValueError(
            f"the cross-attention cache holds {len(cache)} of {len(transformer.blocks)} blocks; "
            "predict_dual has to fill it first"
        )
    tokens, time_emb, modulation, _, rotary, grid = transformer.embed(latents, timestep, text)
    for index, block in enumerate(transformer.prefetch(transformer.blocks)):
        tokens = block.self_attention(tokens, modulation, rotary, attend_window)
        tokens = block.feed_forward(tokens + cache[index], modulation)
    return transformer.unembed(tokens, time_emb, grid)


# --------------------------------------------------------------------------------------------------
# From text to a base clip, and from a base clip to a refined one


@torch.no_grad()
def generate(
    transformer: WanTransformer,
    text: Tensor,
    negative: Tensor | None,
    shape: tuple[int, ...],
    *,
    steps: int = 50,
    flow_shift: float = 3.0,
    guidance: float = 5.0,
    guidance_2: float | None = None,
    generator: Generator | list[Generator] | None = None,
    progress: Callable = iter,
) -> Tensor:
    """Latents of a base clip, float32, of `shape` (B, Z, T, 2H, 2W), which should be native.

    `text` and `negative` are text embeddings, (B, L, text_dim). With `guidance` 1 the negative pass
    is skipped, and `negative` may be None. `guidance_2` is that of Wan2.2's second expert, by
    default the same. `generator` is a CPU generator, so a seed gives the same noise on every
    device, or a list of them, one for each clip. `progress` may wrap the list of steps, like tqdm.
    Raises ValueError for what cannot work, and NotFiniteError if the latents overflow.
    """
    check_guidance(guidance, guidance_2, negative)
    solver = FlowUniPC(steps, flow_shift)
    latents = draw_noise(shape, generator, text.device)
    for t in progress(solver.timesteps):
        transformer.select_expert(t)
        timestep = torch.full((shape[0],), t, device=text.device)
        guidance_scale = guidance_at(t, transformer, guidance, guidance_2)
        velocity = transformer(latents, timestep, text)
        if guidance_scale != 1:
            uncond = transformer(latents, timestep, negative)
            velocity = uncond + guidance_scale * (velocity - uncond)
        latents = solver.step(velocity, latents)
        check_finite(latents, solver)
    return latents


def guidance_at(t, transformer, guidance, guidance_2):
    """The guidance at timestep `t`, which differs between Wan2.2's experts."""
    if guidance_2 is None or t >= transformer.boundary:
        return guidance
    return guidance_2


def upsample(video: Tensor, height: int, width: int) -> Tensor:
    """Resize the frames of (B, 3, F, H, W) bilinearly: half-pixel centres, no antialiasing."""
    batch = video.shape[0]
    frames = video.transpose(1, 2).flatten(0, 1)  # (B*F, 3, H, W)
    frames = F.interpolate(frames, (height, width), mode="bilinear", align_corners=False)
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


@torch.no_grad()
def refine(
    transformer: WanTransformer,
    latents: Tensor,
    text: Tensor,
    negative: Tensor | None,
    *,
    native: tuple[int, int],
    steps: int = 50,
    strength: float = 0.7,
    flow_shift: float = 9.0,
    guidance: float = 5.0,
    guidance_2: float | None = None,
    cache_interval: int | None = None,
    scale_tokens: int | None = None,
    generator: Generator | list[Generator] | None = None,
    override: bool = True,
    window_attention: Callable[..., Attend] | None = None,
    cross_attention_cache: dict | None = None,
    progress: Callable = iter,
    state: dict[str, Tensor] | None = None,
    save: Callable[[dict[str, Tensor]], None] | None = None,
) -> Tensor:
    """Refined latents, float32, in the shape of `latents`, (B, Z, T, 2H, 2W): the upsampled clip,
    encoded, no noise added.

    `native` is (rows, columns) of tokens of a native frame. `text`, `negative`, `guidance`,
    `guidance_2`, `generator` and `progress` are as in `generate`. The last int(steps * strength)
    steps run.
    `scale_tokens` is the n of `attention_scale`, by default the tokens of a native frame (the
    authors' code has 1560, whatever the model).

    `cache_interval` (paper, section 3.4): None runs the full path at every step, for both prompts.
    With k it runs every k steps, for the positive prompt only. The steps in between reuse its
    cached outputs, and the negative prompt takes the plain window path. Where Wan2.2's second
    expert takes over, the full path runs, and the interval counts from there.

    For studies: `override=False` runs the window path alone, and `window_attention` is a function
    like `dense_window` that prepares another attention. For memory: `cross_attention_cache` is a
    dict, or any object that can be indexed by block and has a length. For resuming: `save(state)`
    is called with a dict of tensors before every step that does not read the cache. With such a
    `state`, on the device of `latents`, a later call goes on from there.

    Raises ValueError for what cannot work, StateError for a `state` of another refinement, and
    NotFiniteError if the latents overflow.
    """
    check_refinement(latents, native, cache_interval)
    check_guidance(guidance, guidance_2, negative)
    attend_window, attend_full = prepare_attention(
        transformer, latents, native, scale_tokens, window_attention
    )
    window_path = partial(transformer, attend=attend_window)
    both_paths = partial(
        predict_dual, transformer, attend_window=attend_window, attend_full=attend_full
    )
    cache = {} if cross_attention_cache is None else cross_attention_cache

    solver = FlowUniPC(steps, flow_shift, strength)
    reading_steps = set()
    if override and cache_interval is not None:
        reading_steps = steps_that_read_cache(transformer, solver.timesteps, cache_interval)
    if state is None:
        latents = solver.add_noise(latents, draw_noise(latents.shape, generator, latents.device))
    else:
        latents = resume(state, latents, solver, reading_steps)

    remaining = list(enumerate(solver.timesteps))[solver.index :]
    for step, t in progress(remaining):
        transformer.select_expert(t)
        if save is not None and step not in reading_steps:
            save({"latents": latents, **solver.state_dict()})

        if not override:  # windows alone (section 3.2)
            predict_cond = window_path
            predict_uncond = window_path
        elif cache_interval is None:  # both paths, for both prompts (section 3.3)
            predict_cond = both_paths
            predict_uncond = both_paths
        elif step not in reading_steps:  # both paths, which fill the cache (section 3.4)
            predict_cond = partial(both_paths, cache=cache)
            predict_uncond = window_path
        else:  # the window path with the cache
            predict_cond = partial(
                predict_cached, transformer, attend_window=attend_window, cache=cache
            )
            predict_uncond = window_path

        timestep = torch.full((latents.shape[0],), t, device=latents.device)
        guidance_scale = guidance_at(t, transformer, guidance, guidance_2)
        velocity = predict_cond(latents, timestep, text)
        if guidance_scale != 1:
            uncond = predict_uncond(latents, timestep, negative)
            velocity = uncond + guidance_scale * (velocity - uncond)
        latents = solver.step(velocity, latents)
        check_finite(latents, solver)
    return latents


def steps_that_read_cache(transformer, timesteps, cache_interval):
    """The steps, counted from the first that runs, that reuse cached cross-attention outputs. At
    the others the full path runs: at the first step of an expert, because cached outputs belong to
    the network that made them, and at every `cache_interval`-th from there."""
    reading = set()
    expert_before = None
    for step, t in enumerate(timesteps):
        is_first_expert = t >= transformer.boundary
        if is_first_expert != expert_before:
            start = step
        if (step - start) % cache_interval != 0:
            reading.add(step)
        expert_before = is_first_expert
    return reading


def prepare_attention(transformer, latents, native, scale_tokens, window_attention):
    """The self-attentions of the window path and of the full path, for latents of this shape."""
    _, _, frames, height, width = latents.shape
    grid = (frames, height // 2, width // 2)
    window = (window_size(native[0]), window_size(native[1]))
    if scale_tokens is None:
        scale_tokens = native[0] * native[1]
    scale = attention_scale(transformer.head_dim, scale_tokens)
    if window_attention is None:
        window_attention = flex_window if latents.is_cuda else grouped_window
    attend_window = window_attention(grid, window, scale, device=latents.device)
    attend_full = partial(transformer.full_attention, scale=scale)
    return attend_window, attend_full


def draw_noise(shape, generator, device):
    """Normal noise, float32, drawn on the CPU and moved to `device`. `generator` is None, a CPU
    generator, or a list of them, one for each clip."""
    if not isinstance(generator, list):
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return noise.to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators were given for {shape[0]} clips")
    clips = []
    for clip_generator in generator:
        clips.append(draw_noise((1, *shape[1:]), clip_generator, device))
    return torch.cat(clips)


def check_guidance(guidance, guidance_2, negative):
    for guidance_scale in (guidance, guidance_2):
        if guidance_scale not in (None, 1) and negative is None:
            raise ValueError(
                f"guidance {guidance_scale} needs a negative prompt; only guidance 1 does not"
            )


def check_refinement(latents, native, cache_interval):
    if latents.ndim != 5 or latents.shape[3] % 2 or latents.shape[4] % 2:
        raise ValueError(f"latents are {tuple(latents.shape)}, but should be (B, Z, T, 2H, 2W)")
    if min(native) < 2:
        raise ValueError(f"native is {native} tokens, but must be at least (2, 2)")
    height = latents.shape[3] // 2
    width = latents.shape[4] // 2
    if native[0] > height and native[1] > width:
        raise ValueError(
            f"native is {native} tokens, more than the {height} x {width} of the latents; it is "
            "(rows, columns) of tokens, not pixels"
        )
    if cache_interval is not None and cache_interval < 1:
        raise ValueError(f"cache_interval is {cache_interval}, but must be None or at least 1")


def check_finite(latents, solver):
    """Raise NotFiniteError, rather than go on to a black video."""
    if not is_finite(latents):
        raise NotFiniteError(
            f"latents are not finite after step {solver.index} of {len(solver.timesteps)}"
        )


def resume(state, latents, solver, reading_steps):
    """The latents of a state, to which the solver is set. Raises StateError if it is of another
    refinement."""
    solver.load_state_dict(state)
    for name in ("latents", "start", "x0", "x0_before"):
        tensor = state.get(name)
        if tensor is not None and tensor.shape != latents.shape:
            raise StateError(
                f"the state has {name} of shape {tuple(tensor.shape)}, "
                f"but the clip has {tuple(latents.shape)}"
            )
    if "latents" not in state:
        raise StateError("the state has no latents")
    if solver.index in reading_steps:
        raise StateError(
            f"step {solver.index} of the state reads the cross-attention cache, which a state does "
            "not hold; was it saved with another cache_interval?"
        )
    return state["latents"]


# --------------------------------------------------------------------------------------------------
# The flow solver


class FlowUniPC:
    """UniPC (arXiv 2302.04867) for flow matching: it predicts x0, the clean latents, has order 2
    and B(h) = e^h - 1, and takes its first and last step with order 1.

    Latents at noise level sigma are (1 - sigma) * x0 + sigma * noise, and the model's velocity is
    noise - x0. Of `steps` steps, the last int(steps * strength) run. `sigmas` holds a level for
    each of them and a final 0. `timesteps` is what the model is told: 1000 * sigma, rounded down.
    Everything after the grid of levels is float32, as in Diffusers.
    """

    def __init__(self, steps: int, flow_shift: float, strength: float = 1.0):
        kept = int(steps * strength)
        if not 1 <= kept <= steps:
            raise ValueError(
                f"strength {strength} keeps {kept} of {steps} steps, but at least 1 must run"
            )
        sigmas = 0.999 * (1 - torch.arange(steps, dtype=torch.float64, device="cpu") / steps)
        sigmas = flow_shift * sigmas / (1 + (flow_shift - 1) * sigmas)
        sigmas = sigmas[steps - kept :]
        self.timesteps = (1000 * sigmas).long().tolist()
        self.sigmas = F.pad(sigmas, (0, 1)).float()  # a final 0
        self.lambdas = torch.log(1 - self.sigmas) - torch.log(self.sigmas)  # half the log SNR
        self.index = 0  # of the step to come
        self.start = None  # the latents that the last step started from
        self.x0 = None  # predicted at the level where the last step started
        self.x0_before = None  # predicted one level before that

    def add_noise(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Clean latents, noised to the first level."""
        return (1 - self.sigmas[0]) * latents + self.sigmas[0] * noise

    def step(self, velocity: Tensor, latents: Tensor) -> Tensor:
        """From latents at one level, and the model's velocity there, to latents at the next."""
        x0 = latents - self.sigmas[self.index] * velocity
        if self.index > 0:
            latents = self.corrector(x0)
        self.start = latents
        self.x0_before = self.x0
        self.x0 = x0
        latents = self.predictor()
        self.index += 1
        return latents

    def predictor(self):
        """UniP: the next latents, from x0 at this level and at the one before (equation 3)."""
        i = self.index
        first = i == 0  # there is no level before it
        last = i == len(self.timesteps) - 1  # h is infinite
        if first or last:
            return self.advance(i, self.x0)
        return self.advance(i, self.x0 + self.expected_change(i) / 2)

    def corrector(self, x0_next):
        """UniC: the last step once more, now that x0 is known at its end (equation 9)."""
        i = self.index - 1
        change = x0_next - self.x0
        if i == 0:
            return self.advance(i, self.x0 + change / 2)
        h = self.lambdas[i + 1] - self.lambdas[i]
        r = (self.lambdas[i - 1] - self.lambdas[i]) / h
        phi_1 = torch.expm1(-h)
        phi_2 = -phi_1 / h - 1
        phi_3 = -phi_2 / h - 1 / 2
        # Weights a and b that make the step exact for an x0 that is quadratic in lambda: they solve
        # a + b = phi_2 / phi_1 and r * a + b = 2 * phi_3 / phi_1 (R_p(h) a_p B(h) = phi_p(h)).
        a = (phi_2 - 2 * phi_3) / phi_1 / (1 - r)
        b = phi_2 / phi_1 - a
        mixed = a * self.expected_change(i) + b * change
        return self.advance(i, self.x0 + mixed)

    def expected_change(self, i):
        """How much x0 changes over step i if it goes on as it did over step i - 1."""
        h = self.lambdas[i + 1] - self.lambdas[i]
        r = (self.lambdas[i - 1] - self.lambdas[i]) / h
        return (self.x0_before - self.x0) / r

    def advance(self, i, x0):
        """The latents after step i, exact if x0 is constant during the step."""
        h = self.lambdas[i + 1] - self.lambdas[i]
        noisy_part = self.sigmas[i + 1] / self.sigmas[i] * self.start
        return noisy_part - (1 - self.sigmas[i + 1]) * torch.expm1(-h) * x0

    def state_dict(self) -> dict[str, Tensor]:
        """What `load_state_dict` needs to go on from here: a dict of tensors."""
        state = {"step": torch.tensor(self.index), "sigmas": self.sigmas}
        if self.index > 0:
            state["start"] = self.start
            state["x0"] = self.x0
        if self.index > 1:
            state["x0_before"] = self.x0_before
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises StateError unless it is a whole state of these noise levels."""
        for name in ("step", "sigmas"):
            if name not in state:
                raise StateError(f"the state has no {name}")
        sigmas = state["sigmas"].to(self.sigmas.device)
        if not torch.equal(sigmas, self.sigmas):
            raise StateError("the state is of other steps, another strength or another flow_shift")
        step = state["step"]
        if step.numel() != 1 or int(step) not in range(len(self.timesteps)):
            raise StateError(f"the state's step is none of {len(self.timesteps)}")
        self.index = int(step)
        needed = {"start": 1, "x0": 1, "x0_before": 2}  # from which step on
        for name, first_step in needed.items():
            if self.index >= first_step and name not in state:
                raise StateError(f"the state has no {name}")
        self.start = state.get("start")
        self.x0 = state.get("x0")
        self.x0_before = state.get("x0_before")


# --------------------------------------------------------------------------------------------------
# Window attention for large N: the same results, without an N x N mask


def grouped_window(
    grid: Grid, window: tuple[int, int], scale: float | None = None, border="inward", device="cpu"
) -> Attend:
    """Window attention on any device: queries that share a window attend to it together."""
    frames, height, width = grid
    row_groups = queries_by_window(height, window[0], border)
    column_groups = queries_by_window(width, window[1], border)

    def attend(query, key, value):
        query = query.unflatten(2, (height, width, frames))  # (B, heads, H, W, T, head_dim)
        key = key.unflatten(2, (height, width, frames))
        value = value.unflatten(2, (height, width, frames))
        attended = torch.empty_like(query)
        for query_columns, key_columns in column_groups:
            # One copy for all rows: a window's rows are then contiguous slices of it.
            column_key = key[:, :, :, key_columns].contiguous()
            column_value = value[:, :, :, key_columns].contiguous()
            for query_rows, key_rows in row_groups:
                group = query[:, :, query_rows, query_columns]
                result = F.scaled_dot_product_attention(
                    group.flatten(2, 4),
                    column_key[:, :, key_rows].flatten(2, 4),
                    column_value[:, :, key_rows].flatten(2, 4),
                    scale=scale,
                )
                attended[:, :, query_rows, query_columns] = result.view_as(group)
        return attended.flatten(2, 4)

    return attend


def queries_by_window(length, size, border):
    """Runs of neighbouring queries that have the same window, along one axis: a list of (queries,
    keys), two slices each. The queries near a border share a window; the others have their own."""
    starts = window_start(torch.arange(length), length, size, border).tolist()
    windows = [(max(start, 0), min(start + size, length)) for start in starts]
    runs = []
    first = 0
    for position in range(1, length + 1):
        if position == length or windows[position] != windows[first]:
            runs.append((slice(first, position), slice(*windows[first])))
            first = position
    return runs


# FlexAttention's options that were fastest on H100 and H200. Other GPUs get its defaults.
HOPPER_OPTIONS = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "USE_TMA": True}
# Kernels want query, key and value contiguous. A few heads at a time, these copies are small beside
# all tokens: at 3840x2160, four heads of 128 take 0.65 GiB each in bfloat16.
HEADS_AT_A_TIME = 4


def few_heads_at_a_time(attend):
    """An attention that hands its heads to `attend`, another one, a few at a time."""
    # A kernel is compiled by itself, not as a part of a compiled transformer block.
    attend = torch.compiler.disable(attend, recursive=False)

    def attend_all(query, key, value, **options):
        attended = torch.empty_like(query)
        for first in range(0, query.shape[1], HEADS_AT_A_TIME):
            heads = slice(first, first + HEADS_AT_A_TIME)
            attended[:, heads] = attend(query[:, heads], key[:, heads], value[:, heads], **options)
        return attended

    return torch.compiler.disable(attend_all, recursive=False)


def flex_window(
    grid: Grid,
    window: tuple[int, int],
    scale: float | None = None,
    border: str = "inward",
    device="cuda",
    options: dict | None = None,
) -> Attend:
    """Window attention on a GPU: one FlexAttention kernel that skips the blocks of the N x N mask
    in which nothing is visible. `options` are the kernel's; the default suits the device.

    This is why time is innermost in the order of tokens. The mask does not depend on time, so a
    block of 64 tokens covers about four positions, and few blocks are only partly visible.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    frames, height, width = grid
    num_tokens = frames * height * width
    if options is None:
        options = flex_options(device)
    block_size = options.get("BLOCK_M", 128)

    def visible(batch, head, query_index, key_index):
        query_row = query_index // (width * frames)
        key_row = key_index // (width * frames)
        query_column = query_index // frames % width
        key_column = key_index // frames % width
        in_rows = in_window(query_row, key_row, height, window[0], border)
        in_columns = in_window(query_column, key_column, width, window[1], border)
        return in_rows & in_columns

    make_mask = compile_for_each_shape(create_block_mask)
    mask = make_mask(visible, None, None, num_tokens, num_tokens, device, block_size)
    compiled_attention = compile_for_each_shape(flex_attention)

    def attend(query, key, value):
        return compiled_attention(
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            block_mask=mask,
            scale=scale,
            kernel_options=options,
        )

    return few_heads_at_a_time(attend)


def flex_options(device):
    """FlexAttention's options for a device."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        return HOPPER_OPTIONS
    return {}


def compile_for_each_shape(function):
    """`function` compiled anew for each shape. By default PyTorch would stop compiling after eight
    shapes, without a word, and hold all N x N pairs in memory."""
    compiled = torch.compile(function, dynamic=False, fullgraph=True)
    return torch._dynamo.config.patch(recompile_limit=2**16)(compiled)
