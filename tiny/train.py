"""Train the bundled model from nothing but world.py: `python -m tiny.train --work FOLDER`.

Three stages, each bounded by minutes or clips and each resumed from FOLDER when the command is
repeated with larger bounds: the VAE on small windows of clips at several magnifications; sets of
encoded clips, whole scenes and windows; then the text encoder and the transformer together, by flow
matching. `--start MODEL` begins with the weights of an earlier run, and what its latents mean
stays. The result is written into this folder in Diffusers layout, in bfloat16. It trains model.py's
own classes. Every number is logged to FOLDER/log.txt. On several GPUs, `torchrun --nproc-per-node N
-m -- tiny.train --work FOLDER` (with the `--`, or torchrun takes `--start` for its own): each makes
as many clips and as large batches, and gradients are averaged.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from freeswim import upsample, window_size, window_start
from model import (
    Block,
    TextEncoder,
    WanTransformer,
    WanVAE,
    checkpoint_name,
    load_tokenizer,
    read_weights,
    tokenize,
)
from support import processes
from support.compiled import CompiledBlock
from tiny import world

HERE = Path(__file__).parent
RANK = processes.rank()
RANKS = int(os.environ.get("WORLD_SIZE", 1))  # this process, and how many
TRANSFORMER = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.35.2",
    "num_attention_heads": 5,
    "attention_head_dim": 48,
    "num_layers": 8,
    "ffn_dim": 960,
    "text_dim": 96,
    "freq_dim": 256,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "added_kv_proj_dim": None,
    "image_dim": None,
    "pos_embed_seq_len": None,
    "rope_max_seq_len": 1024,
}
VAE = {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": "0.35.2",
    "base_dim": 16,
    "decoder_base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "dropout": 0.0,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
TEXT = {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "d_model": 96,
    "d_kv": 24,
    "d_ff": 192,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 64,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu_new",
    "is_gated_act": True,
    "is_encoder_decoder": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "dropout_rate": 0.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# tokens: no caption is longer. The cross-attention sees the zeros after it: sampling needs as many
TEXT_LENGTH = 32
# What is seen, of scenes at which multiple of the native size, and its share of the transformer's
# batches. Wan was trained at several sizes too, and a full attention that never saw a larger grid
# repeats the scene in it. And a window of a large frame is a close-up: a model that never saw any
# puts a floor and a fish into every window.
SETS = {
    ("scene", 1): 0.3,
    ("scene", 1.5): 0.05,
    ("scene", 2): 0.12,
    ("scene", 3): 0.05,
    ("window", 1.5): 0.04,
    ("window", 2): 0.06,
    ("window", 3): 0.05,
    ("part", 2): 0.2,
    ("part", 3): 0.13,
}
# Parts are any piece of a scene, of one of these rows and columns of tokens. In a refinement every
# token is in the middle of its own window: a model that saw windows of one size goes by how far
# their edges are, and errs.
PARTS = (6, 9), (8, 12), (9, 13), (12, 18), (12, 9)
# What noise, before the flow shift. A refinement of the paper's strength begins at 0.7; above it,
# where the places of fish are decided, close-ups would teach base clips to cut fish off at the
# border, or to show one more there. Windows have a caption of what they show, parts the whole
# scene's, as a refinement's windows do.
HIGHEST = {"scene": 1.0, "window": 0.75, "part": 0.75}


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder of the state and the log")
    add("--output", type=Path, default=HERE, help="folder of the result (default: this one)")
    add(
        "--start",
        type=Path,
        metavar="MODEL",
        help="folder of a model to begin with, such as this one",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="of scenes and noise: another one for each run that goes on",
    )
    add("--vae-minutes", type=float, default=9)
    add(
        "--vae-learning-rate",
        type=float,
        default=2e-3,
        help="at its highest; less to go on from trained weights",
    )
    add("--vae-batch", type=int, default=16, help="windows in a step")
    add(
        "--clips",
        type=int,
        default=40000,
        help="as many as fit the pixels of this many of the native size",
    )
    add("--minutes", type=float, default=6, help="of the transformer's training")
    add(
        "--batch",
        type=int,
        default=192,
        help="clips of the native size in a step; fewer of the larger ones",
    )
    add("--learning-rate", type=float, default=1e-3, help="of the transformer, at its highest")
    add("--height", type=int, default=128, help="native, in pixels")
    add("--width", type=int, default=192)
    add("--frames", type=int, default=17)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def schedule(progress, step, warmup=100):
    """Learning rate factor: a short warm-up, constant, then a cosine to nothing over the second
    half."""
    return min(1, (step + 1) / warmup) * (
        1 if progress < 0.5 else 0.5 + 0.5 * math.cos(math.pi * (2 * progress - 1))
    )


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`, for all matrices of a shape at once:
    one after the other, 80 small ones took longer than all the rest of a step.
    (https://kellerjordan.github.io/posts/muon)"""

    def __init__(self, matrices, lr, weight_decay=0.01, momentum=0.95):
        shapes = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        groups = [{"params": alike} for alike in shapes.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices = group["params"]
            rate = group["lr"]
            momentum = group["momentum"]
            gradient = torch.stack([matrix.grad for matrix in matrices])
            average = self.state[matrices[0]].setdefault("average", torch.zeros_like(gradient))
            average.lerp_(gradient, 1 - momentum)
            update = orthogonal(gradient.lerp(average, momentum))
            torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
            torch._foreach_add_(
                matrices, list(update), alpha=-rate * 0.2 * math.sqrt(max(update.shape[1:]))
            )


def orthogonal(matrices):
    """Matrices (N, rows, columns) with singular values near 1, by five Newton-Schulz steps in
    bfloat16."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315), x, beta=3.4445
        )
    return (x.mT if tall else x).to(matrices.dtype)


def same(tensor):
    """The first process's, in all of them."""
    if RANKS > 1:
        dist.broadcast(tensor, 0)
    return tensor


def average_gradients(net):
    gradients = [weight.grad for weight in net.parameters() if weight.grad is not None]
    joined = parameters_to_vector(gradients)
    dist.all_reduce(joined)
    vector_to_parameters(joined / RANKS, gradients)


def train(name, net, loss_of, minutes, learning_rate, args, log):
    """Minimise `loss_of(step)` for some minutes of training in all, resuming from the state in
    args.work.

    Returns the number of steps. `net` ends with the exponential moving average of its weights. The
    matrices of the transformer's blocks are trained by Muon, all else by AdamW.
    """
    file = args.work / f"{name}.pt"
    for weight in net.parameters():
        same(weight.data)
    matrices = []
    others = []
    for key, weight in net.named_parameters():
        (matrices if "transformer.blocks" in key and weight.ndim == 2 else others).append(weight)
    optimizers = [
        torch.optim.AdamW(others, learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ]
    if matrices:
        optimizers.append(Muon(matrices, learning_rate))
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    step = 0
    before = 0.0  # seconds of earlier runs
    if file.is_file():
        state = torch.load(file, map_location=args.device, weights_only=True)
        net.load_state_dict(state["net"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        average.load_state_dict(state["average"])
        step = state["step"]
        before = state["seconds"]

    def save():
        state = {
            "net": net.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "average": average.state_dict(),
            "step": step,
            "seconds": seconds,
        }
        torch.save(state, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)

    total = 0.0
    resumed_at = step
    began = time.time()
    saved = time.time()
    while True:
        if step % 20 == 0:  # all processes look at one clock, and end together
            seconds = processes.from_first(lambda: before + time.time() - began)
            if seconds >= 60 * minutes:
                break
            for group in sum((optimizer.param_groups for optimizer in optimizers), []):
                group["lr"] = learning_rate * schedule(seconds / (60 * minutes), step)
            if time.time() - saved > 120:
                save()
                saved = time.time()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            loss = loss_of(step)
        net.zero_grad(set_to_none=True)
        loss.backward()
        if RANKS > 1:
            average_gradients(net)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average.update_parameters(net)
        total = total + loss.detach()
        step = step + 1
        if step % 100 == 0:
            log(f"{name} step {step} loss {total.item() / 100:.4f} minutes {seconds / 60:.1f}")
            total = 0.0
    if step > resumed_at:
        save()
    net.load_state_dict(average.module.state_dict())
    return step


def vae_windows(args, generator, size=64):
    """Windows of clips, (B, 3, F, size, size): of ten, six near a fish and two near a bubble, if it
    is there, magnified up to three times. Of all frames: a decoder that learned from shorter clips
    coloured noses and tails wrong near the end. Around all of a fish: one that saw little of what
    is before noses and behind tails did so anywhere."""
    frames = args.frames
    count = args.vae_batch
    scenes = world.sample_scenes(count, generator, frames)
    u = torch.rand(6, count, generator=generator)
    pixel = 1 / args.height / 3 ** torch.where(u[0] < 0.4, torch.zeros(count), u[1])
    fish = u[4] < 0.6
    bubble = (u[4] > 0.8) & (scenes["bubble_y"][:, 0] > 0)
    within = size / 2 * pixel
    scenes["bubbles"] = torch.where(bubble, 1, scenes["bubbles"])
    fish_x = world.fish_x(scenes, 2 * world.half_time(frames) * u[5][:, None])[:, 0]  # at any time
    near_fish = (
        fish_x + (u[2] - 0.5) * 1.4 * scenes["length"][:, 0],
        scenes["y"][:, 0] + (u[3] - 0.5) * 0.7 * scenes["length"][:, 0],
    )
    rise = scenes["bubble_speed"][:, 0] * world.half_time(frames)
    near_bubble = (
        scenes["bubble_x"][:, 0] + (u[2] - 0.5) * within,
        scenes["bubble_y"][:, 0] - rise + (u[3] - 0.5) * within,
    )
    x, y = (
        torch.where(fish, one, torch.where(bubble, other, anywhere)) - within
        for one, other, anywhere in zip(
            near_fish, near_bubble, (u[2] * world.WIDTH, u[3]), strict=True
        )
    )
    x = x.clamp(min=0).minimum(world.WIDTH - size * pixel)
    y = y.clamp(min=0).minimum(1 - size * pixel)
    to = lambda part: part.to(args.device)  # noqa: E731
    return world.render(
        {k: to(v) for k, v in scenes.items()}, size, size, frames, (to(x), to(y), to(pixel))
    )


def blurred(video, generator):
    """What the VAE meets in a refinement, of clips (B, 3, F, H, W): as if they had been made at a
    half or a third of their size and resized bilinearly, with colours that are a little off here
    and there."""
    parts = 2 + torch.randint(0, 2, (1,), generator=generator).item()
    frames = video.transpose(1, 2).flatten(0, 1)
    height, width = video.shape[-2:]
    small = F.interpolate(frames, (height // parts, width // parts), mode="area")
    smooth = upsample(small.unflatten(0, (len(video), -1)).transpose(1, 2), height, width)
    off = (
        0.15
        * torch.rand(len(video), 1, 1, 1, 1, generator=generator)
        * torch.randn(len(video), 3, 3, 5, 5, generator=generator)
    )
    return (smooth + F.interpolate(off.to(video), video.shape[2:], mode="trilinear")).clamp(-1, 1)


def vae_loss(vae, video):
    """L1 and L2 of pixels, L1 of their differences in space and time, and a little of the latents'
    divergence from normal. What stands out from its surroundings weighs more: bubbles and spots are
    few pixels, and would be lost. So does the first frame, which has no past to be made from. And
    so do places of the wrong colour, by their square: a pink snout that comes out orange is few
    pixels too. Latents are decoded with some noise, as a transformer's are not exact either."""
    mean, logvar = vae.encode_chunk(video, {}).float().chunk(2, dim=1)
    logvar = logvar.clamp(-12, 4)
    latents = mean + torch.randn_like(mean) * (0.05 + (0.5 * logvar).exp())
    error = vae.decode_chunk(latents, {}).float() - video
    around = F.avg_pool3d(video, (1, 9, 9), stride=1, padding=(0, 4, 4), count_include_pad=False)
    weight = 1 + 8 * (video - around).abs().amax(1, keepdim=True)
    weight = torch.cat([4 * weight[:, :, :1], weight[:, :, 1:]], dim=2)
    weight = weight / weight.mean()
    space = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    time = error.diff(dim=2).abs().mean()
    pixels = (weight * (error.abs() + 2 * error.square())).mean()
    colour = F.avg_pool3d(error, (1, 8, 8), stride=(1, 4, 4)).square().sum(1).mean()
    return pixels + 0.5 * space + 0.25 * time + 20 * colour + 3e-4 * divergence


def reconstruction(vae, args, scale):
    """Of held-out clips with bubbles, at a multiple of the native size: PSNR in dB, and the share
    of the bubbles' contrast that is left."""
    scenes = world.sample_scenes(3, torch.Generator().manual_seed(10**6), args.frames)
    scenes = {key: value.to(args.device) for key, value in scenes.items()}
    without, video = (
        world.render(
            scenes | {"bubbles": torch.full_like(scenes["bubbles"], there)},
            args.height * scale,
            args.width * scale,
            args.frames,
        )
        for there in (0, 1)
    )
    decoded = vae.decode(vae.encode(video), tiled=False)
    kept = ((decoded - without) * (video - without)).sum() / (video - without).square().sum()
    return 10 * math.log10(4 / (decoded - video).square().mean().item()), kept.item()


def cut(clips, rows, columns, generator=None):
    """Of each of (B, 16, T, h, w) latents the window of a random token, so many rows and columns of
    tokens large: (B, 16, T, 2 rows, 2 columns), and their tops and lefts (B,) in tokens. As in a
    refinement, windows move inward at borders, and are cut from latents: where a window ends, no
    frame does, and the encoder padded nothing."""
    count = len(clips)
    height = clips.shape[3] // 2  # in tokens
    width = clips.shape[4] // 2
    row = torch.randint(height, (count,), generator=generator)
    column = torch.randint(width, (count,), generator=generator)
    top = window_start(row, height, rows)
    left = window_start(column, width, columns)
    windows = []
    for clip, y, x in zip(clips, top.tolist(), left.tolist(), strict=True):
        latent_rows = slice(2 * y, 2 * (y + rows))
        latent_columns = slice(2 * x, 2 * (x + columns))
        windows.append(clip[:, :, latent_rows, latent_columns])
    return torch.stack(windows), top, left


def cut_windows(latents, scenes, scale, args, generator):
    """Of large scenes and their latents (B, 16, T, h, w), as many windows as fill them: latents and
    captions of what is seen."""
    rows = window_size(args.height // 16)  # in tokens, of 16 pixels
    columns = window_size(args.width // 16)
    pixel = torch.full((len(latents),), 1 / (args.height * scale))
    windows = []
    text = []
    for _ in range(int(scale**2)):
        pieces, top, left = cut(latents, rows, columns, generator)
        windows.append(pieces)
        text += world.captions(
            scenes,
            (16 * pixel * left, 16 * pixel * top, pixel),
            (16 * rows, 16 * columns),
            args.frames,
        )
    return torch.cat(windows), text


def encoded_clips(vae, tokenizer, shown, scale, args, log):
    """Latents (clips, 16, T, h, w), not normalised, and token ids and masks (clips, L) of random
    scenes at a multiple of the native size, the larger, the fewer, or of windows of such scenes."""
    file = args.work / f"clips-{shown}-{scale}.pt"
    if not file.is_file():
        shape = (int(args.height * scale), int(args.width * scale))
        count = int(32 / scale**2)
        share = SETS[shown, scale] + (SETS.get(("part", scale), 0) if shown == "scene" else 0)
        generator = torch.Generator().manual_seed(
            10**4 * args.seed + 1000 * RANK + list(SETS).index((shown, scale))
        )
        parts = []
        for _ in range(math.ceil(args.clips * share / scale**2 / count)):
            scenes = world.sample_scenes(count, generator, args.frames)
            video = world.render(
                {key: value.to(args.device) for key, value in scenes.items()}, *shape, args.frames
            )
            with (
                torch.no_grad(),
                torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"),
            ):
                latents = vae.encode_chunk(video, {}).chunk(2, dim=1)[0].bfloat16().cpu()
            text = world.captions(scenes, frames=args.frames)
            if shown == "window":
                latents, text = cut_windows(latents, scenes, scale, args, generator)
            parts.append((latents, *tokenize(tokenizer, text)))
        joined = [torch.cat(column) for column in zip(*parts, strict=True)]
        log(
            f"{len(joined[0])} clips encoded, {shown} at {scale} times the native size, "
            f"such as: {text[0]!r}"
        )
        torch.save(joined, file)
    return [part.to(args.device) for part in torch.load(file, weights_only=True)]


def write(net, config, folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    weights = {
        checkpoint_name(type(net), key): value.bfloat16().cpu().contiguous()
        for key, value in net.state_dict().items()
    }
    save_file(weights, folder / f"{name}.safetensors", metadata={"format": "pt"})


def train_vae(args, log):
    if (
        args.start
    ):  # its encoder stays, so that a transformer that learned from its latents still fits
        vae = WanVAE.from_pretrained(args.start / "vae")
        for part in (vae.post_quant_conv, vae.decoder):
            part.requires_grad_()
    else:
        vae = WanVAE(VAE)
        vae.quant_conv.bias.data[
            VAE["z_dim"] :
        ] = -6  # log variances: little noise at first, or nothing comes through
    vae.to(args.device)

    def loss_of(step):
        generator = torch.Generator().manual_seed(10**7 * args.seed + RANKS * step + RANK)
        soft, true = vae_windows(args, generator).tensor_split([math.ceil(args.vae_batch / 4)])
        return vae_loss(vae, torch.cat([blurred(soft, generator), true]))

    steps = train("vae", vae, loss_of, args.vae_minutes, args.vae_learning_rate, args, log)
    for scale in (1, 2):
        psnr, kept = reconstruction(vae, args, scale)
        log(
            f"vae after {steps} steps, at {scale} times the native size: PSNR {psnr:.2f} "
            f"dB, bubbles at {kept:.0%}"
        )
    return vae


def new_transformer(block, config):
    """Random, so that its first prediction is nothing."""
    transformer = WanTransformer(config, block)
    for layer in transformer.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def train_transformer(sets, mean, std, tokenizer, text_config, args, log):
    """The text encoder and the transformer, as one ModuleDict, from the encoded clips."""
    block = Block if args.device == "cpu" else CompiledBlock  # twice as fast
    nets = torch.nn.ModuleDict(
        {"text": TextEncoder(text_config), "transformer": new_transformer(block, TRANSFORMER)}
    )
    if args.start:
        loaded = {
            "text": TextEncoder.from_pretrained(args.start / "text_encoder"),
            "transformer": WanTransformer.from_pretrained(args.start / "transformer"),
        }
        read_weights(loaded["text"], loaded["text"].sources, "cpu", torch.float32)
        for name, net in loaded.items():
            nets[name].load_state_dict(net.state_dict())
    nets.to(args.device)
    empty_ids, empty_mask = (part.to(args.device) for part in tokenize(tokenizer, [""]))
    kinds = torch.Generator().manual_seed(
        0
    )  # in all processes the same kind of clips, which takes equally long
    firsts = []  # of the first latent frame, the loss apart

    def flow_loss(step):
        """The squared error of the velocity at a random noise level; one prompt in ten is empty,
        for the guidance."""
        shown, scale = list(SETS)[
            torch.multinomial(torch.tensor(list(SETS.values())), 1, generator=kinds).item()
        ]
        clips, ids, masks = sets["scene" if shown == "part" else shown, scale]
        size = clips.shape[3] // 2, clips.shape[4] // 2  # in tokens
        if shown == "part":
            size = PARTS[torch.randint(len(PARTS), (1,), generator=kinds).item()]
        pixels = 256 * size[0] * size[1]  # of a frame: all steps have about as many
        count = max(1, int(args.batch * args.height * args.width / pixels))
        pick = torch.randint(len(clips), (count,), device=args.device)
        dropped = torch.rand(count, 1, device=args.device) < 0.1
        mask = torch.where(dropped, empty_mask, masks[pick])
        text = nets["text"](torch.where(dropped, empty_ids, ids[pick]), mask) * mask[..., None]
        windows, _, _ = cut(clips[pick], *size)
        clean = (windows.float() - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)
        u = torch.rand(count, device=args.device) * HIGHEST[shown]
        sigma = (3 * u / (1 + 2 * u)).view(-1, 1, 1, 1, 1)  # flow shift 3, as in the sampling
        noise = torch.randn_like(clean)
        velocity = nets["transformer"](
            (1 - sigma) * clean + sigma * noise, 1000 * sigma.flatten(), text
        )
        error = (velocity - (noise - clean)).square()
        first = error[:, :, 0].mean()
        later = error[:, :, 1:].mean()
        firsts.append(first.detach())
        if len(firsts) == 500:
            log(
                f"transformer step {step + 1}, first frame: loss "
                f"{torch.stack(firsts).mean().item():.4f}"
            )
            firsts.clear()
        return (
            2 * first + 4 * later
        ) / 6  # the first is twice as important: it alone is a frame of its own

    train("transformer", nets, flow_loss, args.minutes, args.learning_rate, args, log)
    return nets


def main():
    args = parse_arguments()
    processes.start()
    args.device = str(processes.device_of(args.device))
    if RANK > 0:  # its state, log and result are as the first's, or nobody's concern
        args.work = args.output = args.work / f"process {RANK}"
    args.work.mkdir(parents=True, exist_ok=True)

    def log(line):
        if RANK == 0:
            print(line, flush=True)
        with open(args.work / "log.txt", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    torch.manual_seed(100 * args.seed + RANK)
    vae = train_vae(args, log)
    (args.output / "tokenizer").mkdir(parents=True, exist_ok=True)
    words = world.build_tokenizer(args.output / "tokenizer" / "tokenizer.json")
    tokenizer = load_tokenizer(args.output / "tokenizer", TEXT_LENGTH)
    sets = {
        key: encoded_clips(vae, tokenizer, *key, args, log)
        for key in SETS
        if key[0] != "part" and (args.minutes > 0 or not args.start)
    }
    if args.start:  # its latents are kept
        mean, std = (part.flatten().to(args.device) for part in (vae.mean, vae.std))
    else:
        whole = sets["scene", 1][0].float()
        mean = same(whole.mean((0, 2, 3, 4)))
        std = same(whole.std((0, 2, 3, 4)))
    text_config = {**TEXT, "vocab_size": words}
    nets = train_transformer(sets, mean, std, tokenizer, text_config, args, log)

    for net, config, part in (
        (vae, {**VAE, "latents_mean": mean.tolist(), "latents_std": std.tolist()}, "vae"),
        (nets["transformer"], TRANSFORMER, "transformer"),
        (nets["text"], text_config, "text_encoder"),
    ):
        write(
            net,
            config,
            args.output / part,
            "model" if part == "text_encoder" else "diffusion_pytorch_model",
        )
    (args.output / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "WanPipeline",
                "_diffusers_version": "0.35.2",
                "text_encoder": ["transformers", "UMT5EncoderModel"],
                "tokenizer": ["transformers", "T5TokenizerFast"],
                "transformer": ["diffusers", "WanTransformer3DModel"],
                "vae": ["diffusers", "AutoencoderKLWan"],
            },
            indent=1,
        )
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
