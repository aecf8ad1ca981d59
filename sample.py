"""From a prompt to a base video at native size to a refined video at the size you ask for.

    python sample.py                                                          the bundled tiny model, on any CPU
    python sample.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "…" --size 1920x1088              on a GPU
"""
import argparse
import hashlib
import json
import platform
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import freeswim
import model

try:
    import resource
except ImportError:  # Windows
    resource = None


@dataclass
class Preset:
    """What a checkpoint was trained for, and the settings that suit it."""

    height: int  # pixels, native
    width: int  # pixels, native
    frames: int  # 4k + 1
    fps: int  # frames per second
    base_shift: float  # flow shift of the base generation
    flow_shift: float  # flow shift of the refinement
    strength: float  # share of the steps that the refinement runs
    guidance: float
    text_length: int  # tokens: what a prompt is padded to with zeros, which the cross-attention sees
    prompt: str
    negative_prompt: str


CAT = "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage."
BLUR = "overexposed, static, blurred details, subtitles, worst quality, low quality, deformed, still picture, cluttered"
FISH = ("a small orange striped fish swims right and a small purple spotted fish swims left above a sandy floor with "
        "seaweed and bubbles")

PRESETS = {  # by the width of the transformer, in channels
    240: Preset(128, 192, 17, 16, base_shift=3.0, flow_shift=3.0, strength=0.5, guidance=3.5,
                text_length=32, prompt=FISH, negative_prompt=""),  # the bundled one
    1536: Preset(480, 832, 81, 16, base_shift=3.0, flow_shift=9.0, strength=0.7, guidance=5.0,
                 text_length=512, prompt=CAT, negative_prompt=BLUR),  # Wan2.1 1.3B
    5120: Preset(720, 1280, 81, 16, base_shift=5.0, flow_shift=9.0, strength=0.7, guidance=5.0,
                 text_length=512, prompt=CAT, negative_prompt=BLUR),  # Wan2.1 14B
}


def fail(message):
    """One line that names the value and the mend; exit status 2."""
    print(f"sample.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("--model", default=str(Path(__file__).parent / "tiny"), metavar="FOLDER_OR_HUB_ID", help="Diffusers layout")
    add("--prompt", help="what to show")
    add("--negative-prompt", help="what not to show")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", metavar="WIDTHxHEIGHT", help="of the refined video, in pixels, multiples of 16")
    size.add_argument("--scale", type=float, default=2.0, help="of the refined video over the native one (default 2)")
    add("--frames", type=int, help="4k + 1")
    add("--steps", type=int, default=50, help="of the whole noise schedule (default 50)")
    add("--strength", type=float, help="share of the steps that the refinement runs")
    add("--guidance", type=float, help="scale of the classifier-free guidance")
    add("--flow-shift", type=float, help="of the refinement's noise schedule")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument("--cache-interval", type=int, default=5, metavar="K",
                       help="run the full path every K steps (default 5)")
    cache.add_argument("--no-cache", dest="cache_interval", action="store_const", const=None,
                       help="run it at every step, and for the negative prompt too")
    add("--seed", type=int, default=0)
    add("--fps", type=int, help="frames per second of the videos")
    add("--base-video", metavar="FILE", help="refine this clip instead of generating one")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="of the transformer and the text encoder")
    add("--output", default="output", metavar="FOLDER")
    add("--compare", action="store_true", help="also full attention and windows without override, in one picture")
    return parser.parse_args()


def settle(args):
    """Fill in what the model's preset decides and refuse what cannot work, before any long work. Returns the model's
    folder, its preset, and the refined height and width in pixels."""
    if args.device.split(":")[0] not in ("cpu", "cuda"):
        fail(f"--device {args.device}: choose cpu or cuda")
    if args.device != "cpu" and not torch.cuda.is_available():
        fail(f"--device {args.device}: PyTorch sees no GPU here; use --device cpu")
    if not Path(args.model).is_dir() and args.model.count("/") != 1:
        fail(f"--model {args.model}: no such folder, and not a hub id like Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    folder = model.download(args.model)
    if not (folder / "transformer" / "config.json").is_file():
        fail(f"--model {args.model}: no transformer/config.json in {folder}; a model in Diffusers layout is needed")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if width not in PRESETS:
        fail(f"--model {args.model}: a transformer {width} wide is not Wan2.1 text-to-video (1536: 1.3B, 5120: 14B)")
    preset = PRESETS[width]
    for name in ("prompt", "negative_prompt", "frames", "strength", "guidance", "flow_shift", "fps"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name))
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")

    if not args.prompt.strip():
        fail("--prompt is empty: say what to show")
    if args.frames < 1 or args.frames % 4 != 1:
        fail(f"--frames {args.frames}: Wan takes 4k + 1 frames, such as {max(args.frames // 4 * 4, 0) + 1}")
    if not 0 < args.strength <= 1 or int(args.steps * args.strength) < 1:
        fail(f"--strength {args.strength} of --steps {args.steps}: at least one step must run, and at most all")
    for name in ("cache_interval", "fps", "flow_shift", "guidance"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1000:
            fail(f"--{name.replace('_', '-')} {value}: must be above 0 and below 1000")
    if args.size:
        try:
            width, height = map(int, args.size.lower().split("x"))
        except ValueError:
            fail(f"--size {args.size}: write it like {2 * preset.width}x{2 * preset.height}")
    else:
        width, height = (round(side * args.scale / 16) * 16 for side in (preset.width, preset.height))
    nearest = max(preset.width, round(width / 16) * 16), max(preset.height, round(height / 16) * 16)
    if (width, height) != nearest:
        fail(f"size {width}x{height}: Wan takes multiples of 16, here from {preset.width}x{preset.height} on; "
             f"the nearest is --size {nearest[0]}x{nearest[1]}")
    args.size = f"{width}x{height}"
    return folder, preset, height, width


@contextmanager
def stage(name, device, record):
    """Time a stage and note its seconds and peak memory in `record`: of the GPU's tensors, or of the process so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.time()
    yield
    peak = 0  # unknown
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    elif resource:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    record[name] = {"seconds": round(time.time() - start, 2), "peak_memory_gib": round(peak / 2**30, 3) or None}


def unknown_words(tokenizer, prompt):
    """The words of a prompt that the tokenizer has no token for: the bundled model's knows few."""
    prompt = model.clean_prompt(prompt)
    encoding = tokenizer.encode(prompt)
    spans = zip(encoding.tokens, encoding.offsets)
    return [prompt[start:end] for token, (start, end) in spans if token == "<unk>"]


def read_video(file, frames):
    """The first frames of a video file, (1, 3, F, H, W) in [-1, 1]."""
    try:
        clip = np.stack([frame for frame, _ in zip(imageio.imiter(file), range(frames))])
    except (OSError, ValueError) as error:
        fail(f"--base-video {file}: cannot be read as a video ({str(error).splitlines()[0]})")
    if len(clip) < frames:
        fail(f"--base-video {file}: has {len(clip)} frames; use --frames {(len(clip) - 1) // 4 * 4 + 1}")
    return torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def to_frames(video):
    """(1, 3, F, H, W) in [-1, 1] to uint8 (F, H, W, 3)."""
    return ((video[0] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu().numpy()


def write_video(file, frames, fps):
    """Write beside, then rename: under the final name there is never half a video."""
    part = file.with_name("part-" + file.name)
    imageio.imwrite(part, frames, fps=fps, codec="libx264", pixelformat="yuv420p", quality=9, macro_block_size=1)
    part.replace(file)


def comparison(clips):
    """One picture of {label: frames (F, H, W, 3)}: a strip each, of three frames and an enlarged part of the middle
    one. The part is where the last clip's middle frame has the strongest edges, a third of the frame high and wide."""
    count, height, width, _ = next(iter(clips.values())).shape
    gray = torch.from_numpy(list(clips.values())[-1][count // 2]).float().mean(-1)
    edges = (gray[1:, 1:] - gray[:-1, 1:]).abs() + (gray[1:, 1:] - gray[1:, :-1]).abs()
    rows, columns = height // 3, width // 3
    energy = torch.nn.functional.avg_pool2d(edges[None, None], (rows, columns), stride=8)[0, 0]
    y, x = (8 * int(i) for i in divmod(int(energy.argmax()), energy.shape[1]))
    strips = []
    for label, frames in clips.items():
        strip = Image.fromarray(np.concatenate([frames[0], frames[count // 2], frames[-1]], axis=1))
        part = Image.fromarray(frames[count // 2][y : y + rows, x : x + columns])
        whole = Image.new("RGB", (4 * width, height))
        whole.paste(strip)
        whole.paste(part.resize((width, height), Image.Resampling.NEAREST), (3 * width, 0))
        font = ImageFont.load_default(height // 16)
        ImageDraw.Draw(whole).text((8, 4), label, "white", font, stroke_width=2, stroke_fill="black")
        strips.append(np.asarray(whole))
    return Image.fromarray(np.concatenate(strips))


def main():
    args = parse_arguments()
    folder, preset, height, width = settle(args)
    device, dtype, record = torch.device(args.device), getattr(torch, args.dtype), {}
    base = read_video(args.base_video, args.frames) if args.base_video else None
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    print(f"{args.prompt}\n{preset.width}x{preset.height} to {width}x{height}, {args.frames} frames, on {args.device}")

    def bar(name, total):
        progress = tqdm(total=total, desc=name, unit="step")

        def on_step(step, latents):
            progress.update()
            if step + 1 == total:
                progress.close()

        return on_step

    def tiles(name):
        return partial(tqdm, desc=name, unit="tile")

    with stage("text", device, record):
        tokenizer = model.load_tokenizer(folder / "tokenizer", preset.text_length)
        encoder = model.TextEncoder.from_pretrained(folder / "text_encoder", device, dtype)
        text, negative = model.encode_prompt(encoder, tokenizer, [args.prompt, args.negative_prompt]).split(1)
    unknown = unknown_words(tokenizer, args.prompt)
    if unknown:
        print(f"this model has never seen the words: {', '.join(unknown)}", file=sys.stderr)
    with stage("load", device, record):
        transformer = model.WanTransformer.from_pretrained(folder / "transformer", device, dtype)
        vae = model.WanVAE.from_pretrained(folder / "vae", device)

    if base is None:
        shape = 1, 16, args.frames // 4 + 1, preset.height // 8, preset.width // 8
        with stage("base", device, record):
            base_latents = freeswim.generate(
                transformer, text, negative, shape, steps=args.steps, flow_shift=preset.base_shift,
                guidance=args.guidance, generator=torch.Generator().manual_seed(args.seed),
                on_step=bar("base", args.steps),
            )
            base = vae.decode(base_latents, progress=tiles("decode base")).cpu()
    write_video(output / "base.mp4", to_frames(base), args.fps)

    with stage("encode", device, record):
        upscaled = freeswim.upsample(base, height, width)
        latents = vae.encode(upscaled.to(device), progress=tiles("encode"))

    def refined(name, **settings):
        with stage(name, device, record):
            refined_latents = freeswim.refine(
                transformer, latents, text, negative, native=(preset.height // 16, preset.width // 16),
                steps=args.steps, strength=args.strength, flow_shift=args.flow_shift, guidance=args.guidance,
                generator=torch.Generator().manual_seed(args.seed + 1),
                on_step=bar(name, int(args.steps * args.strength)), **settings,
            )
        with stage(f"decode {name}", device, record):
            return refined_latents, to_frames(vae.decode(refined_latents, progress=tiles(f"decode {name}")))

    result, frames = refined("refine", cache_interval=args.cache_interval)
    write_video(output / "freeswim.mp4", frames, args.fps)
    clips = {"base, upscaled": to_frames(upscaled)}
    if args.compare:
        clips["full attention"] = refined("full attention", window="full", override=False)[1]
        clips["clipped window"] = refined("clipped window", window="clipped", override=False)[1]
        clips["inward window"] = refined("inward window", override=False)[1]
    clips["FreeSwim"] = frames
    comparison(clips).save(output / "comparison.png")

    record = {
        "settings": vars(args),
        "latents_sha256": hashlib.sha256(result.cpu().numpy().tobytes()).hexdigest(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "stages": record,
    }
    (output / "run.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    for name in ("base.mp4", "freeswim.mp4", "comparison.png", "run.json"):
        print(output / name)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(" ".join(str(error).split()))
