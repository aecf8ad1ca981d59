"""From a prompt to a base video at native size to a refined video at the size you ask for.

    python sample.py                                                          the bundled tiny model, on any CPU
    python sample.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "…" --size 1920x1080              on a GPU
    python sample.py --resume output                                       go on with a run that was stopped
    torchrun --nproc-per-node 8 sample.py …                                one run on the GPUs of a machine

Whatever a run has computed is in the folder `state` of its output, so that nothing is computed twice.
"""
import os
import signal
import sys


def stop(number, frame, message="nothing had been computed yet"):
    """Ctrl-C and SIGTERM end the command with one line, even while the imports below take their seconds."""
    if os.environ.get("RANK", "0") == "0":
        print(f"\nsample.py: stopped; {message}", file=sys.stderr)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)

import argparse
import hashlib
import math
import platform
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

import freeswim
import model
from support import media, parallel
from support.run import RESULTS, Run, read_record


@dataclass
class Preset:
    """What a checkpoint was trained for, and the settings that suit it."""

    height: int  # pixels, native
    width: int  # pixels, native
    frames: int  # 4k + 1
    fps: float  # frames per second
    base_shift: float  # flow shift of the base generation
    flow_shift: float  # flow shift of the refinement
    strength: float  # share of the steps that the refinement runs
    guidance: float
    text_length: int  # tokens: what a prompt is padded to with zeros, which the cross-attention sees
    tall: bool  # was it trained on frames of the native size turned upright, too?
    prompt: str
    negative_prompt: str


CAT = "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage."
BLUR = "overexposed, static, blurred details, subtitles, worst quality, low quality, deformed, still picture, cluttered"
FISH = ("a small orange striped fish swims right and a small purple spotted fish swims left above a sandy floor with "
        "seaweed and bubbles")

PRESETS = {  # by the width of the transformer, in channels
    240: Preset(128, 192, 17, 16, base_shift=3.0, flow_shift=3.0, strength=0.5, guidance=3.5,
                text_length=32, tall=False, prompt=FISH, negative_prompt=""),  # the bundled one
    1536: Preset(480, 832, 81, 16, base_shift=3.0, flow_shift=9.0, strength=0.7, guidance=5.0,
                 text_length=512, tall=True, prompt=CAT, negative_prompt=BLUR),  # Wan2.1 1.3B
    5120: Preset(720, 1280, 81, 16, base_shift=5.0, flow_shift=9.0, strength=0.7, guidance=5.0,
                 text_length=512, tall=True, prompt=CAT, negative_prompt=BLUR),  # Wan2.1 14B
}
REVISIONS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "0fad780a534b6463e45facd96134c9f345acfa5b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "38ec498cb3208fb688890f8cc7e94ede2cbd7f68",
}
COMPARED = {  # with --compare: what each ingredient does
    "full attention": dict(kind="full", override=False),
    "clipped window": dict(kind="clipped", override=False),
    "inward window": dict(override=False),
}


def fail(message):
    """One line that names the value and the mend; exit status 2."""
    print(f"sample.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_arguments():
    """What was typed, {name: value}, and the defaults of everything; None is left to the model's preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("--model", metavar="FOLDER_OR_HUB_ID", default=str(Path(__file__).parent / "tiny"),
        help="Diffusers layout (default: the bundled one)")
    add("--prompt", help="what to show")
    add("--negative-prompt", help="what not to show")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", metavar="WIDTHxHEIGHT", help="of the refined video, in pixels, even")
    size.add_argument("--scale", type=float, default=2.0, help="of the refined video over the native one (%(default)s)")
    add("--frames", type=int, help="4k + 1")
    add("--steps", type=int, default=50, help="of the whole noise schedule (%(default)s)")
    add("--strength", type=float, help="share of the steps that the refinement runs")
    add("--guidance", type=float, help="scale of the classifier-free guidance")
    add("--flow-shift", type=float, help="of the refinement's noise schedule")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument("--cache-interval", type=int, metavar="K", default=5,
                       help="run the full path every K steps (%(default)s)")
    cache.add_argument("--no-cache", dest="cache_interval", action="store_const", const=None,
                       help="run it at every step, and for the negative prompt too")
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add("--fps", type=float, help="frames per second of the videos")
    add("--base-video", metavar="FILE", help="refine this clip or picture instead of generating one")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu (%(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the transformer and the text encoder")
    add("--output", metavar="FOLDER", default="output", help="where everything is written (%(default)s)")
    add("--overwrite", action="store_true", help="even if the output folder holds another run")
    add("--resume", metavar="FOLDER", help="go on with the run in this output folder, with its settings")
    add("--compare", action="store_true", help="also full attention and windows without override, in one picture")
    add("--shard-weights", action="store_true", help="under torchrun: spread the transformer's weights over the GPUs")
    defaults = vars(parser.parse_args([]))
    typed = vars(parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(defaults, ...))))
    return {name: value for name, value in typed.items() if value is not ...}, defaults


def download(name, weights=True):
    """The folder of a model: `name` itself if it is one, else the hub's snapshot of that id, fetched if needed. Without
    `weights`, only descriptions and the tokenizer: a few MB that tell whether the rest is worth fetching."""
    if Path(name).is_dir():
        return Path(name)
    wanted = ["model_index.json", "scheduler/*.json", "tokenizer/tokenizer.json"]
    for part in ("transformer", "vae", "text_encoder"):
        wanted += [f"{part}/*.json", f"{part}/*.safetensors"][: 1 + weights]
    try:
        return Path(snapshot_download(name, revision=REVISIONS.get(name), allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {name}: no such model on the hub, or the hub cannot be reached "
                         f"({type(error).__name__}); check the id, or give a folder") from None


# ---------------------------------------------------------------------------------------------------------------------
# What is checked before anything is loaded, fetched or written


def check(typed, defaults):
    """All settings and what follows from them, as one namespace. Raises ValueError, naming the value and the mend, for
    whatever cannot work. Needs no weight: of a model on the hub, only descriptions and tokenizer are fetched."""
    begun = read_record(typed["resume"]) if "resume" in typed else None
    for name in typed.keys() - {"resume", "device", "compare", "shard_weights"} if begun else ():
        raise ValueError(f"--{name.replace('_', '-')} cannot change what --resume {typed['resume']} goes on with; "
                         "begin anew")
    args = argparse.Namespace(**{**defaults, **(begun["settings"] if begun else {}), **typed}, begun=begun)
    args.output = args.resume or args.output
    if args.device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device {args.device}: choose cpu or cuda")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: PyTorch sees no GPU here; use --device cpu")
    if args.shard_weights and "RANK" not in os.environ:
        raise ValueError("--shard-weights: needs several processes; start them with torchrun --nproc-per-node N …")
    check_model(args)
    for name in ("prompt", "negative_prompt", "frames", "strength", "guidance", "flow_shift"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(args.preset, name))
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    if not model.clean_prompt(args.prompt):
        raise ValueError("--prompt is empty: say what to show")
    if args.frames < 1 or args.frames % 4 != 1:
        raise ValueError(f"--frames {args.frames}: Wan takes 4k + 1 frames, such as {max(args.frames // 4 * 4, 0) + 1}")
    if not 0 < args.steps <= 1000:
        raise ValueError(f"--steps {args.steps}: must be from 1 to 1000")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed}: must be from 0 to 2^63 - 1")
    if not 0 < args.strength <= 1 or int(args.steps * args.strength) < 1:
        raise ValueError(f"--strength {args.strength} of --steps {args.steps}: at least one step must run, at most all")
    for name in ("cache_interval", "fps", "flow_shift", "guidance"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < 1000:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0 and below 1000")
    args.tokenizer = model.load_tokenizer(args.folder / "tokenizer", args.preset.text_length)
    args.clip = check_clip(args)
    args.fps = args.fps or args.preset.fps
    check_size(args)
    return args


def check_model(args):
    """Sets the model's folder, as far as it is here, and its preset."""
    if not Path(args.model).is_dir() and args.model.count("/") != 1:
        raise ValueError(f"--model {args.model}: no such folder, and no hub id like Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    if Path(args.model).is_dir():
        args.model = str(Path(args.model).resolve())
    args.folder = download(args.model, weights=False)
    index = args.folder / "model_index.json"
    index = model.read_json(index) if index.is_file() else {}
    kind = index.get("_class_name", "WanPipeline")
    if index.get("transformer_2", [None, None]) != [None, None]:
        kind += " with two transformers (Wan2.2)"
    if kind != "WanPipeline":
        raise ValueError(f"--model {args.model}: is a {kind}; supported is the WanPipeline of Wan2.1 text-to-video")
    transformer = model.build(model.WanTransformer, args.folder / "transformer")
    model.build(model.WanVAE, args.folder / "vae")
    encoder = model.build(model.TextEncoder, args.folder / "text_encoder")
    if encoder.shared.embedding_dim != transformer.config["text_dim"]:
        raise ValueError(f"--model {args.model}: its text encoder is {encoder.shared.embedding_dim} wide, but its "
                         f"transformer reads {transformer.config['text_dim']}; they are of different models")
    width = transformer.heads * transformer.head_dim
    if width not in PRESETS:
        raise ValueError(f"--model {args.model}: a transformer {width} wide is not Wan2.1 text-to-video (1536 or 5120)")
    args.preset = PRESETS[width]


def check_clip(args):
    """The clip of --base-video, or None if there is none to read."""
    if not args.base_video or (args.begun and (Path(args.output) / "state" / "clip.safetensors").is_file()):
        return None
    args.base_video = str(Path(args.base_video).resolve())
    clip, fps, total = media.read_clip(args.base_video, args.frames)
    if len(clip) < args.frames:
        raise ValueError(f"--base-video {args.base_video}: has {total} frames; use --frames {(total - 1) // 4 * 4 + 1}")
    height, width = clip.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"--base-video {args.base_video}: is {width}x{height}, but videos have even sides; scale it to "
                         f"{width // 2 * 2}x{height // 2 * 2} first")
    return clip


def check_size(args):
    """Sets the size of the refined video, (height, width), and the native size."""
    preset = args.preset
    args.native = preset.height, preset.width
    if args.size:
        try:
            width, height = map(int, args.size.lower().split("x"))
        except ValueError:
            raise ValueError(f"--size {args.size}: write it like {2 * preset.width}x{2 * preset.height}") from None
    else:
        if not 0 < args.scale <= 100:
            raise ValueError(f"--scale {args.scale}: must be above 0, and at most 100")
        width, height = (round(side * args.scale / 16) * 16 for side in (preset.width, preset.height))
    nearest = max(preset.width, round(width / 16) * 16), max(preset.height, round(height / 16) * 16)
    if (width, height) != nearest:
        raise ValueError(f"size {width}x{height}: Wan takes multiples of 16, here from {preset.width}x{preset.height} "
                         f"on; the nearest is --size {nearest[0]}x{nearest[1]}")
    args.size, args.target = f"{width}x{height}", (height, width)
    # The state: latents of the refinement six times over (start, history, and one that is being written), the base
    # clip; then the videos, at most 2 bytes per pixel.
    latents = 16 * (args.frames // 4 + 1) * (height // 8) * (width // 8) * 4
    pixels = args.frames * (preset.height * preset.width + height * width)
    needed = 6 * latents * (4 if args.compare else 1) + 3 * pixels
    output = Path(args.output)
    there = next(parent for parent in (output.resolve(), *output.resolve().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--output {output}: nothing can be written to {there}; choose another folder")
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ValueError(f"--output {output}: about {needed / 2**30:.1f} GiB will be written, but {free / 2**30:.1f} "
                         "GiB are free; choose another disk, or a smaller --size")
    if ((output / "run.json").exists() or (output / "state").exists()) and not (args.begun or args.overwrite):
        raise ValueError(f"--output {output}: holds a run already; go on with it by --resume {output}, or say "
                         "--overwrite")


def tell_about_prompt(tokenizer, prompt, length):
    """Name the words that the model has never seen, and those that it does not read any more."""
    prompt = model.clean_prompt(prompt)
    encoding = tokenizer.encode(prompt)
    unknown = [prompt[slice(*span)] for token, span in zip(encoding.tokens, encoding.offsets) if token == "<unk>"]
    if unknown:
        print(f"this model has never seen the words: {', '.join(unknown)}", file=sys.stderr)
    if encoding.overflowing:
        cut = prompt[max(end for _, end in encoding.offsets) :].strip()
        print(f"the prompt is too long, {length} tokens are read; cut off is: {cut}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def load_models(args, folder, device, dtype):
    """The transformer and the VAE, each shared by all processes if there are several."""
    model.find_weights(model.build(model.TextEncoder, folder / "text_encoder"), folder / "text_encoder")  # or refused
    if "RANK" not in os.environ:
        return (model.WanTransformer.from_pretrained(folder / "transformer", device, dtype),
                model.WanVAE.from_pretrained(folder / "vae", device))
    return (parallel.SharedTransformer.from_pretrained(folder / "transformer", device, dtype, args.shard_weights),
            parallel.SharedVAE.from_pretrained(folder / "vae", device))


def embed_prompts(args, folder, device, dtype):
    encoder = model.TextEncoder.from_pretrained(folder / "text_encoder", device, dtype)
    embeddings = model.encode_prompt(encoder, args.tokenizer, [args.prompt, args.negative_prompt]).cpu()
    if not embeddings.isfinite().all():
        raise ValueError(f"{folder / 'text_encoder'}: gives numbers that are not finite; fetch it again")
    return dict(zip(("text", "negative"), embeddings.split(1)))


def main(typed, defaults):
    args = parallel.from_first(lambda: check(typed, defaults))
    (height, width), (native_height, native_width) = args.target, args.native
    device, dtype = parallel.device_of(args.device), getattr(torch, args.dtype)
    settings = {name: vars(args)[name] for name in defaults.keys() - {"output", "overwrite", "resume", "shard_weights"}}
    run = Run(args.output, device, {
        "settings": dict(sorted(settings.items())),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "stages": args.begun["stages"] if args.begun else {},
    })
    folder = parallel.once_per_host(lambda: download(args.model))
    with run.stage("load"):
        transformer, vae = load_models(args, folder, device, dtype)
    prompts = run.load("text")
    if prompts is None:
        with run.stage("text"):
            prompts = parallel.from_first(lambda: embed_prompts(args, folder, device, dtype))
    run.begin(args.overwrite)  # nothing was written before all was known to be in order
    signal.signal(signal.SIGINT, partial(stop, message=run.resume_hint()))
    signal.signal(signal.SIGTERM, partial(stop, message=run.resume_hint()))
    run.save("text", prompts)
    if parallel.rank() == 0:
        tell_about_prompt(args.tokenizer, args.prompt, args.preset.text_length)
        print(f"{args.prompt}\n{native_width}x{native_height} to {width}x{height}, {args.frames} frames, on "
              f"{args.device}; should it end early, go on with --resume {args.output}", flush=True)
    sampling = {name: tensor.to(device) for name, tensor in prompts.items()}
    sampling |= dict(steps=args.steps, guidance=args.guidance)
    tiled = height * width > 2**18  # less than 512 x 512 takes little memory, and tiles would be slower

    if args.base_video:
        clip = run.load_or_compute("clip", lambda progress: args.clip)
        base = media.to_video(clip.cpu())
    else:
        shape = 1, 16, args.frames // 4 + 1, native_height // 8, native_width // 8
        latents = run.load_or_compute("base", lambda progress: freeswim.generate(
            transformer, **sampling, shape=shape, flow_shift=args.preset.base_shift,
            generator=torch.Generator().manual_seed(args.seed), progress=progress))
        with run.stage("decode base") as progress:
            base = vae.decode(latents, tiled, progress).cpu()
    run.write("base.mp4", lambda file: media.write_video(file, base, args.fps))
    with run.stage("upsample"):
        upscaled = freeswim.upsample(base, height, width)
    clips = {"base, upscaled": media.sample_frames(upscaled)}
    clean = run.load_or_compute("encode", lambda progress: vae.encode(upscaled, tiled, progress))
    del base, upscaled

    for name, options in ({"refine": dict(cache_interval=args.cache_interval)} | COMPARED if args.compare else
                          {"refine": dict(cache_interval=args.cache_interval)}).items():
        latents = run.load_or_compute(name, lambda progress: freeswim.refine(
            transformer, clean, **sampling, native=(native_height // 16, native_width // 16), strength=args.strength,
            flow_shift=args.flow_shift, generator=torch.Generator().manual_seed(args.seed + 1), progress=progress,
            state=run.load(f"{name}-progress"), save=partial(run.save, f"{name}-progress"), **options))
        with run.stage(f"decode {name}") as progress:
            video = vae.decode(latents, tiled, progress)
        clips[name] = media.sample_frames(video)
        if name == "refine":
            run.record["latents_sha256"] = hashlib.sha256(latents.cpu().numpy().tobytes()).hexdigest()
            run.write("freeswim.mp4", lambda file: media.write_video(file, video, args.fps))
        del video
    run.write("comparison.png", lambda file: media.comparison(clips).save(file))
    run.write_record()
    if parallel.rank() == 0:
        print(*(run.output / name for name in RESULTS), sep="\n")


if __name__ == "__main__":
    parallel.start()
    try:
        main(*parse_arguments())
    except ValueError as error:
        fail(" ".join(str(error).split()))
    except (OSError, MemoryError) as error:
        print(f"sample.py: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1)
