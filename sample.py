"""From a prompt to a base video at the model's own size, and to a refined video at the size you ask
for.

    python sample.py                                      the bundled tiny model, on any CPU
    python sample.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "..." --size 1920x1080
    python sample.py --base-video clip.mp4 --prompt "what it shows"       refine your own clip
    python sample.py --resume output                      go on with a run that was stopped
    torchrun --nproc-per-node 8 sample.py ...             one run on the GPUs of a machine

Whatever a run has computed is in the folder `state` of its output, so nothing is computed twice.

The bundled model knows the words: a and above bubbles fish floor large left orange pink plain
purple red right sandy seaweed small spotted striped swim swims two with yellow. Try
    a large red striped fish swims right above a sandy floor with bubbles
    a small yellow plain fish swims left above a sandy floor with seaweed
    a large pink spotted fish swims left above a sandy floor
"""

from support.command_line import (
    fail,
    handle_signals,
    parse_arguments,
    protect_streams,
    set_allocator,
)

if __name__ == "__main__":  # before the imports below, which take seconds
    protect_streams()
    handle_signals()
    ARGUMENTS = parse_arguments(__doc__)
    set_allocator()

import hashlib
import time
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch

import freeswim
import model
from support import RunError, UserError, hub, lora, media, memory, parallel
from support.experts import Experts
from support.run import Run
from support.settings import make_plan


def main(arguments):
    plan = parallel.from_first(partial(make_plan, arguments))
    with Run(plan, parallel.device_of(plan.device)) as run:
        models = load_models(plan, run)
        prompts = embed_prompts(plan, models, run)
        run.begin()  # all is in order: from here on, files are written
        run.save("text", prompts)
        handle_signals(run.resume_hint())
        announce(plan, run)

        base = make_base_clip(plan, models, run, prompts)
        upscaled = upscale(plan, run, base)
        latents = encode(plan, models, run, upscaled)
        strips = {"base clip, enlarged": media.sample_frames(middle(plan, upscaled))}
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
    for name in plan.record.files:
        if name != "state" and parallel.is_first():
            print(plan.output / name)


@dataclass
class Models:
    folder: Any  # where the weights are
    transformer: Any  # or Wan2.2's two, as Experts
    vae: Any
    window_attention: Any  # prepares the window path's attention, like freeswim.grouped_window
    cache: Any  # the cross-attention cache


def load_models(plan, run):
    """The transformer and the VAE, each shared by all processes if there are several."""
    folder = parallel.once_per_host(partial(hub.download, plan.model, weights=True))
    hub.check_weights(plan.model, folder)  # all parts are whole, or refused, before one is loaded
    check_same_weights(plan, folder)
    device = run.device
    several = parallel.is_launched()
    with run.stage("load"):
        transformer_class = parallel.SharedTransformer if several else model.WanTransformer
        vae_class = parallel.SharedVAE if several else model.WanVAE
        window_attention = freeswim.grouped_window
        load_vae = partial(vae_class.from_pretrained, folder / "vae", device)
        empty = model.build(transformer_class, folder / "transformer")
        placement = memory.plan_memory(plan, empty, device)
        run.relief = memory.relief(placement, device)
        if device.type == "cuda":
            from support import fast  # it imports PyTorch's compiler, which takes seconds

            kind = (device, getattr(torch, plan.dtype), empty.head_dim)
            transformer_class = fast.transformer_for(*kind, transformer_class)
            window_attention = fast.window_for(*kind)
            half = plan.vae_dtype == "float16"
            tiles_at_once = 1 if placement.is_tight else 4
            load_vae = partial(
                fast.load_vae, vae_class, folder / "vae", device, half, tiles_at_once
            )

        load = partial(load_transformer, plan, device, folder, transformer_class, placement)
        if plan.boundary is None:
            transformer = load("transformer")
        else:
            like = model.build(transformer_class, folder / "transformer")
            transformer = Experts(partial(load_expert, load), plan.boundary, like)
        vae = load_vae()
        cache = memory.CacheOnCPU(device) if placement.cache_on_cpu else {}
    return Models(folder, transformer, vae, window_attention, cache)


def load_transformer(plan, device, folder, transformer_class, placement, name):
    """The transformer in the part `name` of a model, with its LoRAs, where it was planned."""
    options = {"shard": plan.shard_weights} if parallel.is_launched() else {}
    if plan.lora_changes[name]:
        options["adjust"] = partial(lora.merge, plan.lora_changes[name], device)
    transformer = transformer_class.from_pretrained(
        folder / name,
        device="cpu" if placement.stream_weights else device,
        dtype=getattr(torch, plan.dtype),
        **options,
    )
    if placement.stream_weights:
        memory.stream_blocks(transformer, device)
    return transformer


def load_expert(load, name):
    """One of Wan2.2's two transformers, by `load(name)`. Lines say so, as it may take a while."""
    noise = "high" if name == "transformer" else "low"
    parallel.say(f"loading the expert for {noise} noise")
    start = time.time()
    transformer = load(name)
    parallel.say(f"it took {time.time() - start:.1f} s to load")
    return transformer


def check_same_weights(plan, folder):
    """Raise UserError if a resumed run began with other weights."""
    fingerprint = hub.fingerprint_of_weights(folder)
    before = plan.record.fingerprints.setdefault("weights", fingerprint)
    if before != fingerprint:
        raise UserError(
            f"--resume {plan.output}: its weights are not those it began with ({folder}); put them "
            "back, or begin anew"
        )


def embed_prompts(plan, models, run):
    """Text embeddings, (1, L, text_dim) each: {"text"}, and {"negative"} if there is guidance."""
    prompts = run.load("text", *prompts_of(plan)) if plan.resumes else None
    if prompts is None:
        with run.stage("text"):
            prompts = parallel.from_first(partial(compute_embeddings, plan, models, run.device))
    return {name: tensor.to(run.device) for name, tensor in prompts.items()}


def prompts_of(plan):
    """The prompts that are needed. Guidance 1 needs no negative one."""
    prompts = {"text": plan.prompt}
    if plan.guidance != 1 or plan.guidance_2 not in (None, 1):
        prompts["negative"] = plan.negative_prompt
    return prompts


def compute_embeddings(plan, models, device):
    folder = models.folder / "text_encoder"
    encoder = model.TextEncoder.from_pretrained(folder, device, getattr(torch, plan.dtype))
    prompts = prompts_of(plan)
    embeddings = model.encode_prompt(encoder, plan.tokenizer, list(prompts.values())).cpu()
    if not embeddings.isfinite().all():
        raise UserError(f"{folder}: gives numbers that are not finite; fetch it again")
    return dict(zip(prompts, embeddings.split(1), strict=True))


def announce(plan, run):
    native_height, native_width = plan.native
    height, width = plan.target
    for note in plan.notes:
        parallel.say(note)
    parallel.say(plan.prompt)
    parallel.say(
        f"{native_width}x{native_height} to {width}x{height}, {plan.frames} frames, on "
        f"{run.record.device}; if it ends early, go on with --resume {plan.output}"
    )


# --------------------------------------------------------------------------------------------------
# The stages of a clip. What takes long is kept in the run's folder


def make_base_clip(plan, models, run, prompts):
    """The clip to refine, (1, 3, F, H, W) in [-1, 1] on the CPU: given, or generated."""
    if plan.base_video is not None:
        clip = run.load_or_compute("clip", lambda progress: plan.clip.frames, key="clip")
        base = media.to_video(clip.cpu())
    else:
        latents = run.load_or_compute("base", partial(generate, plan, models, prompts))
        with run.stage("decode base") as progress:
            base = models.vae.decode(latents, plan.tiled, progress).cpu()
    with run.stage("write"):
        run.write("base.mp4", partial(media.write_video, video=base, fps=plan.fps))
    return base


def generate(plan, models, prompts, progress):
    return freeswim.generate(
        models.transformer,
        prompts["text"],
        prompts.get("negative"),
        plan.base_shape,
        steps=plan.steps,
        flow_shift=plan.base_shift,
        guidance=plan.guidance,
        guidance_2=plan.guidance_2,
        generator=torch.Generator().manual_seed(plan.seed),
        progress=progress,
    )


def upscale(plan, run, base):
    """The base clip, cropped to the target's proportions and enlarged, with its edges repeated up
    to what is computed."""
    with run.stage("upsample"):
        cropped = media.center_crop(base, *media.cropped(base.shape[-2:], plan.target))
        enlarged = freeswim.upsample(cropped, *plan.target)
        return media.pad(enlarged, *plan.computed)


def encode(plan, models, run, video):
    """Its latents, no noise added."""

    def compute(progress):
        return models.vae.encode(video, plan.tiled, progress)

    return run.load_or_compute("encode", compute)


@dataclass
class Variant:
    """A way to refine a clip."""

    label: str  # in comparison.png
    window_attention: Any
    override: bool = True
    cache_interval: int | None = None


def variants(plan, models):
    """What is computed, by the name of its state: FreeSwim and, with --compare, what is left of it
    without its parts."""
    window = models.window_attention
    chosen = {"refine": Variant("FreeSwim", window, cache_interval=plan.cache_interval)}
    if plan.compare:
        clipped = partial(window, border="clipped")
        chosen["full attention"] = Variant(
            "full attention, no windows", freeswim.no_window, override=False
        )
        chosen["clipped window"] = Variant("clipped windows, no override", clipped, override=False)
        chosen["inward window"] = Variant("inward windows, no override", window, override=False)
    return chosen


def refine(plan, models, run, prompts, latents, name, variant):
    """Refined latents. The state of the steps so far is kept under `name`-progress."""
    state_name = f"{name}-progress"

    def compute(progress):
        return freeswim.refine(
            models.transformer,
            latents,
            prompts["text"],
            prompts.get("negative"),
            native=plan.native_grid,
            steps=plan.steps,
            strength=plan.strength,
            flow_shift=plan.flow_shift,
            guidance=plan.guidance,
            guidance_2=plan.guidance_2,
            cache_interval=variant.cache_interval,
            generator=torch.Generator().manual_seed(plan.seed + 1),
            override=variant.override,
            window_attention=variant.window_attention,
            cross_attention_cache=models.cache,
            progress=progress,
            state=run.load(state_name, "step", "latents"),
            save=partial(run.save, state_name),
        )

    refined = run.load_or_compute(name, compute)
    models.cache.clear()  # the VAE needs its memory
    return refined


def decode(plan, models, run, latents, name):
    """The video at the target's size, (1, 3, F, H, W) in [-1, 1]."""
    with run.stage(f"decode {name}") as progress:
        return middle(plan, models.vae.decode(latents, plan.tiled, progress))


def middle(plan, video):
    """The part of what is computed that was asked for."""
    return media.center_crop(video, *plan.target)


def write_refined(plan, run, video, latents):
    run.record.latents_sha256 = hashlib.sha256(latents.cpu().numpy().tobytes()).hexdigest()
    write = partial(media.write_video, video=video, fps=plan.fps, sound=read_sound(plan))
    with run.stage("write"):
        run.write("freeswim.mp4", write)
        if plan.frames == 1:
            run.write("freeswim.png", partial(media.write_picture, video=video))


def read_sound(plan):
    """The sound of the clip's frames that are used, if it has any."""
    if plan.record.sound is None or not parallel.is_first():
        return None
    begin, end = plan.record.sound
    try:
        return media.read_sound(plan.base_video, Fraction(begin), Fraction(end))
    except OSError as error:
        parallel.say(f"the clip's sound cannot be carried over: {error}")
        return None


if __name__ == "__main__":
    parallel.start()
    try:
        main(ARGUMENTS)
    except (UserError, model.CheckpointError) as error:
        fail(str(error))
    except PermissionError as error:
        fail(f"{error.filename}: permission denied")
    except RunError as error:
        fail(str(error), status=1)
