"""From a prompt to a base video at the model's own size, and to a refined video at the size you ask
for.

    python sample.py                                      the bundled tiny model, on any CPU
    python sample.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "..." --size 1920x1080
    python sample.py --base-video clip.mp4 --prompt "what it shows"       refine your own clip
    python sample.py --resume output                      go on with a run that was stopped
    torchrun --nproc-per-node 8 sample.py ...             one run on the GPUs of a machine

Whatever a run has computed is in the folder `state` of its output, so nothing is computed twice.

The bundled model knows the words: a and above bubbles fish floor large left orange pink plain
purple red right sandy seaweed small spotted striped swims with yellow. Try
    a large red striped fish swims right above a sandy floor with bubbles
    a small yellow plain fish swims left above a sandy floor with seaweed
    a large pink spotted fish swims left above a sandy floor
"""

import sys

from support import read_ahead
from support.options import parse_arguments
from support.processes import fail, handle_signals, protect_streams, set_allocator

if __name__ == "__main__":  # before the imports below, which take seconds
    protect_streams()
    handle_signals()
    ARGUMENTS = parse_arguments(__doc__, sys.argv[1:], fail)
    set_allocator()
    read_ahead.begin(ARGUMENTS)

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch

import freeswim
import model
from support import RunError, UserError, embeddings, hub, lora, media, offload, processes
from support.experts import Experts
from support.plan import make_plan, needs_negative
from support.run import Run


def main(arguments):
    plan = processes.from_first(partial(make_plan, arguments))
    with Run(plan, processes.device_of(plan.options.device)) as run:
        models, prompts = load_models(plan, run)
        run.begin()  # all is in order: from here on, files are written
        run.save("text", prompts)
        handle_signals(run.resume_hint())
        announce(plan, run)

        base = make_base_clip(plan, models, run, prompts)
        upscaled = upscale(plan, run, base)
        latents = encode(plan, models, run, upscaled)
        strips = {"base clip, enlarged": media.sample_frames(crop(plan, upscaled))}
        del base, upscaled  # as large as the refined clip

        for name, variant in variants(plan, models).items():
            refined = refine(plan, models, run, prompts, latents, name, variant)
            video = decode(plan, models, run, refined, name)
            strips[variant.label] = media.sample_frames(video)
            if name == "refine":
                write_refined(plan, run, video, refined)
            del video  # on a GPU, the next refinement needs its memory

        with run.stage("write"):
            run.write("comparison.png", partial(media.write_comparison, strips=strips))
        run.write_record()
    for name in run.record.files:
        if name != "state" and processes.is_first():
            print(plan.output / name)


# --------------------------------------------------------------------------------------------------
# Models


@dataclass
class Models:
    transformer: Any  # or Wan2.2's two, as Experts
    vae: model.WanVAE
    tiled: bool  # whether the VAE works in tiles
    window_attention: Callable  # prepares the window path's, like freeswim.grouped_window
    cache: Any  # the cross-attention cache


def load_models(plan, run):
    """The transformer and the VAE, each shared by all processes if there are several; and the
    embedded prompts, for which the text encoder was in memory before."""
    options = plan.options
    folder = processes.once_per_host(partial(hub.download, options.model, weights=True))
    hub.check_weights(options.model, folder)  # all parts are whole, or refused, before one is read
    fingerprints = check_files(plan, run, folder)
    placement = offload.plan_memory(plan, run.device)
    run.advise(offload.relief(placement, run.device))
    with ThreadPoolExecutor(max_workers=1) as pool:
        # They are tried while the text encoder streams from the disk.
        kernels = pool.submit(choose_kernels, plan, run.device)
        prompts = embed_prompts(plan, folder, fingerprints, run)
    with run.stage("load"):
        kernels = kernels.result()
        load = partial(load_transformer, plan, run.device, folder, kernels, placement)
        if plan.boundary is None:
            transformer = load("transformer")
        else:
            load = partial(load_expert, load)
            transformer = Experts(load, plan.boundary, like=plan.parts.transformer)
        vae, tiled = load_vae(plan, run, folder, placement)
        cache = offload.CacheOnCPU(run.device) if placement.cache_on_cpu else {}
    return Models(transformer, vae, tiled, kernels.window_attention, cache), prompts


def check_files(plan, run, folder):
    """The fingerprints of the model's files. Raises UserError if they are not those that a resumed
    run began with, or not the same on all hosts."""
    fingerprints = hub.fingerprints_of_model(folder)
    processes.check_equal(
        fingerprints,
        f"--model {plan.options.model}: its files are not the same on all hosts; copy them anew",
    )
    run.check_weights(fingerprints)
    return fingerprints


@dataclass
class Kernels:
    """What suits the device."""

    block: type  # of the transformer
    full_attention: Callable
    window_attention: Callable
    sequence: Any = None  # how several processes share the tokens


def choose_kernels(plan, device):
    """The fastest ones that work on this device."""
    kernels = Kernels(model.Block, model.full_attention, freeswim.grouped_window)
    if device.type == "cuda":
        from support import attention, compiled  # PyTorch's compiler takes seconds to import

        if device.index is not None:
            torch.cuda.set_device(device)  # which every thread has to do for itself
        dtype = getattr(torch, plan.options.dtype)
        head_dim = plan.parts.transformer.head_dim
        kernels.block = compiled.choose_block(device, dtype)
        kernels.full_attention = attention.choose_full_attention(device, dtype, head_dim)
        kernels.window_attention = attention.choose_window(device, dtype, head_dim)
    if processes.are_several():
        from support.sequence_parallel import SequenceParallel

        sequence = SequenceParallel(plan.parts.transformer.heads)
        kernels.sequence = sequence
        kernels.full_attention = sequence.attention(kernels.full_attention)
        kernels.window_attention = sequence.window_attention(kernels.window_attention)
    return kernels


def load_transformer(plan, device, folder, kernels, placement, name):
    """The transformer in the part `name` of a model, with its LoRAs, where it was planned."""
    parts = {"block": kernels.block, "attention": kernels.full_attention}
    if kernels.sequence is not None:
        from support.sequence_parallel import SequenceParallelTransformer, load_sharded

        parts["sequence"] = kernels.sequence
        load = SequenceParallelTransformer.from_pretrained
        if plan.options.shard_weights:
            load = load_sharded
    elif placement.stream_weights:
        load = offload.load_streamed
    else:
        load = model.WanTransformer.from_pretrained
    adjust = None
    if plan.lora_changes[name]:
        adjust = partial(lora.merge, plan.lora_changes[name], device)
    return load(folder / name, device, getattr(torch, plan.options.dtype), adjust, **parts)


def load_expert(load, name):
    """One of Wan2.2's two transformers, by `load(name)`. Lines say so, as it may take a while."""
    noise = "high" if name == "transformer" else "low"
    processes.say(f"loading the expert for {noise} noise")
    start = time.time()
    transformer = load(name)
    processes.say(f"it took {time.time() - start:.1f} s to load")
    return transformer


def load_vae(plan, run, folder, placement):
    """The VAE, and whether it works in tiles."""
    tiles = run.choose_vae_tiles(partial(offload.choose_vae_tiles, plan, run.device, placement))
    parts = offload.VAE_TILES[tiles]
    if processes.are_several():
        from support.sequence_parallel import SharedTiles

        parts = parts | {"share": SharedTiles()}
    if run.device.type == "cuda":
        from support import compiled

        half = plan.options.vae_dtype == "float16"
        vae = compiled.load_vae(folder / "vae", run.device, half, **parts)
    else:
        vae = model.WanVAE.from_pretrained(folder / "vae", run.device, **parts)
    return vae, tiles != "whole"


# --------------------------------------------------------------------------------------------------
# Text


def embed_prompts(plan, folder, fingerprints, run):
    """Text embeddings, (1, L, text_dim) each: {"text"}, and {"negative"} if there is guidance."""
    text_dim = plan.parts.transformer.config["text_dim"]
    shape = (1, plan.preset.text_length, text_dim)
    prompts = None
    if plan.begun is not None:
        prompts = run.load("text", dict.fromkeys(prompts_of(plan), shape))
    if prompts is None:
        with run.stage("text"):
            compute = partial(compute_embeddings, plan, folder, fingerprints, run.device)
            prompts = processes.from_first(compute)
    return {name: tensor.to(run.device) for name, tensor in prompts.items()}


def prompts_of(plan):
    """The prompts that are needed. Guidance 1 needs no negative one."""
    prompts = {"text": plan.options.prompt}
    if needs_negative(plan.options):
        prompts["negative"] = plan.options.negative_prompt
    return prompts


def compute_embeddings(plan, folder, fingerprints, device):
    """Those of prompts that were embedded before, by a model with these `fingerprints`, come from
    the user's cache folder."""
    folder = folder / "text_encoder"
    prompts = prompts_of(plan)
    texts = list(prompts.values())
    worth_keeping = embeddings.is_worth_keeping(folder)
    found = None
    if worth_keeping:
        key = embeddings.key_of(fingerprints, texts, plan.options)
        found = embeddings.load(key, plan.preset.text_length)
    if found is None:
        dtype = getattr(torch, plan.options.dtype)
        encoder = model.TextEncoder.from_pretrained(folder, device, dtype)
        found = model.encode_prompt(encoder, plan.tokenizer, texts).cpu()
        if not found.isfinite().all():
            raise UserError(f"{folder}: gives numbers that are not finite; fetch it again")
        if worth_keeping:
            embeddings.keep(key, found)
    return dict(zip(prompts, found.split(1), strict=True))


def announce(plan, run):
    native_height, native_width = plan.native
    height, width = plan.target
    for note in plan.notes:
        processes.say(note)
    if plan.begun is not None and plan.begun.threads not in (0, run.record.threads):
        processes.say(
            f"this run began with {plan.begun.threads} CPU threads and goes on with "
            f"{run.record.threads}: last digits may differ"
        )
    processes.say(plan.options.prompt)
    processes.say(
        f"{native_width}x{native_height} to {width}x{height}, {plan.options.frames} frames, on "
        f"{run.record.device}; if it ends early, go on with --resume {plan.output}"
    )


# --------------------------------------------------------------------------------------------------
# The stages of a clip. What takes long is kept in the run's folder


def make_base_clip(plan, models, run, prompts):
    """The clip to refine, (1, 3, F, H, W) in [-1, 1] on the CPU: given, or generated."""
    if plan.options.base_video is not None:
        shape = (plan.options.frames, 3, None, None)
        clip = run.load_or_compute("clip", partial(read_clip, plan), shape, key="clip")
        base = media.to_video(clip.cpu())
    else:
        shape = plan.latents_shape(plan.native)
        latents = run.load_or_compute("base", partial(generate, plan, models, prompts), shape)
        with run.stage("decode base") as progress:
            base = models.vae.decode(latents, models.tiled, progress).cpu()
            check_finite("the video is", base)
    with run.stage("write"):
        run.write("base.mp4", partial(media.write_video, video=base, fps=plan.fps))
    return base


def read_clip(plan, progress):
    """The frames of the given clip, read by the first process, which alone may have it."""
    options = plan.options

    def read():
        return media.read_clip(options.base_video, options.frames, options.start).frames

    return processes.from_first(read)


def noise_generator(seed):
    """PyTorch's generator on the CPU, of whose seed only 32 bits count. The other bits are mixed
    in, so seeds of up to 32 bits give what they give anywhere."""
    high = seed >> 32
    mixed = seed ^ (high * 0x9E3779B1)
    return torch.Generator().manual_seed(mixed % 2**32)


def generate(plan, models, prompts, progress):
    options = plan.options
    return freeswim.generate(
        models.transformer,
        prompts["text"],
        prompts.get("negative"),
        plan.latents_shape(plan.native),
        steps=options.steps,
        flow_shift=options.base_shift,
        guidance=options.guidance,
        guidance_2=options.guidance_2,
        generator=noise_generator(options.seed),
        progress=progress,
    )


def upscale(plan, run, base):
    """The base clip, cropped to the target's proportions and enlarged, with its edges repeated up
    to what is computed."""
    with run.stage("upsample"):
        cropped = media.center_crop(base, *media.crop_size(base.shape[-2:], plan.target))
        enlarged = freeswim.upsample(cropped, *plan.target)
        return media.pad(enlarged, *plan.computed)


def encode(plan, models, run, video):
    """Its latents, no noise added."""

    def compute(progress):
        latents = models.vae.encode(video, models.tiled, progress)
        check_finite("the VAE's latents are", latents)
        return latents

    return run.load_or_compute("encode", compute, plan.latents_shape(plan.computed))


@dataclass
class Variant:
    """A way to refine a clip."""

    label: str  # in comparison.png
    window_attention: Callable
    override: bool = True
    cache_interval: int | None = None


def variants(plan, models):
    """What is computed, by the name of its state: FreeSwim and, with --compare, what is left of it
    without its parts."""
    window = models.window_attention
    interval = plan.options.cache_interval
    chosen = {"refine": Variant("FreeSwim", window, cache_interval=interval)}
    if plan.options.compare:
        full = partial(freeswim.no_window, attention=models.transformer.full_attention)
        clipped = partial(window, border="clipped")
        chosen["full attention"] = Variant("full attention, no windows", full, override=False)
        chosen["clipped window"] = Variant("clipped windows, no override", clipped, override=False)
        chosen["inward window"] = Variant("inward windows, no override", window, override=False)
    return chosen


def refine(plan, models, run, prompts, latents, name, variant):
    """Refined latents. The state of the steps so far is kept under `name`-progress."""
    options = plan.options
    state_name = f"{name}-progress"

    def compute(progress):
        return freeswim.refine(
            models.transformer,
            latents,
            prompts["text"],
            prompts.get("negative"),
            native=plan.native_grid,
            steps=options.steps,
            strength=options.strength,
            flow_shift=options.flow_shift,
            guidance=options.guidance,
            guidance_2=options.guidance_2,
            cache_interval=variant.cache_interval,
            generator=noise_generator(options.seed + 1),
            override=variant.override,
            window_attention=variant.window_attention,
            cross_attention_cache=models.cache,
            progress=progress,
            state=run.load(state_name),
            save=partial(run.save, state_name),
        )

    try:
        refined = run.load_or_compute(name, compute, latents.shape)
    except freeswim.StateError as error:
        raise run.damaged(state_name, error) from None
    models.cache.clear()  # the VAE needs its memory
    return refined


def decode(plan, models, run, latents, name):
    """The video at the target's size, (1, 3, F, H, W) in [-1, 1]."""
    with run.stage(f"decode {name}") as progress:
        video = models.vae.decode(latents, models.tiled, progress)
        check_finite("the video is", video)
        return crop(plan, video)


def check_finite(what, tensor):
    """Raise NotFiniteError if the VAE overflowed."""
    if not model.is_finite(tensor):
        raise freeswim.NotFiniteError(f"{what} not finite")


def crop(plan, video):
    """The part of what is computed that was asked for."""
    return media.center_crop(video, *plan.target)


def write_refined(plan, run, video, latents):
    run.note_latents(hashlib.sha256(latents.cpu().numpy().tobytes()).hexdigest())
    write = partial(media.write_video, video=video, fps=plan.fps, sound=read_sound(plan))
    with run.stage("write"):
        run.write("freeswim.mp4", write)
        if plan.options.frames == 1:
            run.write("freeswim.png", partial(media.write_picture, video=video))


def read_sound(plan):
    """The sound of the clip's frames that are used, if it has any."""
    if plan.sound is None or not processes.is_first():
        return None
    begin, end = plan.sound
    try:
        return media.read_sound(plan.options.base_video, Fraction(begin), Fraction(end))
    except OSError as error:
        processes.say(f"the clip's sound cannot be carried over: {error}")
        return None


if __name__ == "__main__":
    processes.start()
    try:
        main(ARGUMENTS)
    except (UserError, model.CheckpointError) as error:
        processes.fail_once(str(error))
    except PermissionError as error:
        processes.fail_once(f"{error.filename}: permission denied")
    except RunError as error:
        processes.fail_once(str(error), status=1)
