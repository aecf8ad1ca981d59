"""From a prompt to a base video at native size to a refined video at the size you ask for.

    python sample.py                                                          the bundled tiny model, on any CPU
    python sample.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "…" --size 1920x1088              on a GPU
    python sample.py --resume output                                       go on with a run that was stopped
    torchrun --nproc-per-node 8 sample.py …                                one run on the GPUs of a machine

Whatever a run has computed is in the folder `state` of its output, so that nothing is computed twice.
"""
import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
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


RANK = int(os.environ.get("RANK", 0))  # of this process, if torchrun has started several


def say(message):
    """One line on standard error."""
    if RANK > 0:  # the first process has most likely the same to say, and torchrun then ends the others
        time.sleep(3)
        message = f"process {RANK}: {message}"
    print(f"sample.py: {message}", file=sys.stderr, flush=True)


def fail(message):
    """One line that names the value and the mend; exit status 2."""
    say(message)
    raise SystemExit(2)


RESULTS = ("base.mp4", "freeswim.mp4", "comparison.png", "run.json")
DEFAULTS = {  # None: the model's preset decides
    "model": str(Path(__file__).parent / "tiny"), "prompt": None, "negative_prompt": None, "size": None, "scale": 2.0,
    "frames": None, "steps": 50, "strength": None, "guidance": None, "flow_shift": None, "cache_interval": 5, "seed": 0,
    "fps": None, "base_video": None, "device": "cuda" if torch.cuda.is_available() else "cpu", "dtype": None,
    "output": "output", "overwrite": False, "compare": False, "shard_weights": False,
}


def parse_arguments():
    """What was typed, as a dict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    parser.error = fail
    add = parser.add_argument
    add("--model", metavar="FOLDER_OR_HUB_ID", help="Diffusers layout (default: the bundled one)")
    add("--prompt", help="what to show")
    add("--negative-prompt", help="what not to show")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", metavar="WIDTHxHEIGHT", help="of the refined video, in pixels, multiples of 16")
    size.add_argument("--scale", type=float, help="of the refined video over the native one (default 2)")
    add("--frames", type=int, help="4k + 1")
    add("--steps", type=int, help="of the whole noise schedule (default 50)")
    add("--strength", type=float, help="share of the steps that the refinement runs")
    add("--guidance", type=float, help="scale of the classifier-free guidance")
    add("--flow-shift", type=float, help="of the refinement's noise schedule")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument("--cache-interval", type=int, metavar="K", help="run the full path every K steps (default 5)")
    cache.add_argument("--no-cache", dest="cache_interval", action="store_const", const=None,
                       help="run it at every step, and for the negative prompt too")
    add("--seed", type=int, help="of the noise (default 0)")
    add("--fps", type=int, help="frames per second of the videos")
    add("--base-video", metavar="FILE", help="refine this clip instead of generating one")
    add("--device", help="cuda or cpu (default: cuda if there is one)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the transformer and the text encoder")
    add("--output", metavar="FOLDER", help="where everything is written (default: output)")
    add("--overwrite", action="store_true", help="even if the output folder holds another run")
    add("--resume", metavar="FOLDER", help="go on with the run in this output folder, with its settings")
    add("--compare", action="store_true", help="also full attention and windows without override, in one picture")
    add("--shard-weights", action="store_true", help="under torchrun: spread the transformer's weights over the GPUs")
    return vars(parser.parse_args())


def settings(typed):
    """What was typed, over the defaults, or over the settings of the run to resume."""
    if "resume" not in typed:
        return argparse.Namespace(**{**DEFAULTS, **typed}, resume=None, stages={})
    for name in typed.keys() - {"resume", "device", "compare", "shard_weights"}:
        fail(f"--{name.replace('_', '-')} cannot change what --resume {typed['resume']} goes on with; begin anew")
    try:
        begun = json.loads((Path(typed["resume"]) / "run.json").read_text())
        return argparse.Namespace(**{**DEFAULTS, **begun["settings"], **typed, "output": typed["resume"]},
                                  stages=dict(begun["stages"]))
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"--resume {typed['resume']}: no run is there (its run.json is missing or broken); begin with --output")


def settle(args):
    """Fill in what the model's preset decides and refuse what cannot work, before any long work. Returns the model's
    folder, its preset, and the refined height and width in pixels."""
    output = Path(args.output)
    if ((output / "run.json").exists() or (output / "state").exists()) and not (args.resume or args.overwrite):
        fail(f"--output {output}: holds a run already; go on with it by --resume {output}, or say --overwrite")
    if args.device.split(":")[0] not in ("cpu", "cuda"):
        fail(f"--device {args.device}: choose cpu or cuda")
    if args.shard_weights and not dist.is_initialized():
        fail("--shard-weights: needs several processes; start them with torchrun --nproc-per-node N sample.py …")
    if args.device != "cpu" and not torch.cuda.is_available():
        fail(f"--device {args.device}: PyTorch sees no GPU here; use --device cpu")
    if not Path(args.model).is_dir() and args.model.count("/") != 1:
        fail(f"--model {args.model}: no such folder, and not a hub id like Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    if Path(args.model).is_dir():
        args.model = str(Path(args.model).resolve())
    if args.base_video:
        args.base_video = str(Path(args.base_video).resolve())
    try:
        folder = model.download(args.model)
    except (OSError, ValueError) as error:
        fail(f"--model {args.model}: no such model on the hub, or the hub cannot be reached ({type(error).__name__}); "
             "check the id, or give a folder")
    index = folder / "model_index.json"
    index = model.read_json(index) if index.is_file() else {}
    kind = index.get("_class_name", "WanPipeline")
    if index.get("transformer_2", [None, None]) != [None, None]:
        kind += " with two transformers (Wan2.2)"
    if kind != "WanPipeline":
        fail(f"--model {args.model}: is a {kind}; supported is the WanPipeline of Wan2.1 text-to-video, 1.3B or 14B")
    transformer, _ = model.empty_model(model.WanTransformer, folder / "transformer")
    model.empty_model(model.WanVAE, folder / "vae")
    encoder, _ = model.empty_model(model.TextEncoder, folder / "text_encoder")
    if encoder.shared.embedding_dim != transformer.text_embedder[0].in_features:
        fail(f"--model {args.model}: its text encoder is {encoder.shared.embedding_dim} wide, but its transformer "
             f"reads {transformer.text_embedder[0].in_features}; they are of different models")
    width = transformer.heads * transformer.head_dim
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
    if not 0 < args.steps <= 1000:
        fail(f"--steps {args.steps}: must be from 1 to 1000")
    if not 0 <= args.seed < 2**63:
        fail(f"--seed {args.seed}: must be from 0 to 2^63 - 1")
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
        if not 0 < args.scale <= 100:
            fail(f"--scale {args.scale}: must be above 0, and at most 100")
        width, height = (round(side * args.scale / 16) * 16 for side in (preset.width, preset.height))
    nearest = max(preset.width, round(width / 16) * 16), max(preset.height, round(height / 16) * 16)
    if (width, height) != nearest:
        fail(f"size {width}x{height}: Wan takes multiples of 16, here from {preset.width}x{preset.height} on; "
             f"the nearest is --size {nearest[0]}x{nearest[1]}")
    args.size = f"{width}x{height}"
    # The state: latents of the refinement six times over (start, history, and one that is being written), the base
    # clip; then the videos, at most 2 bytes per pixel.
    latents = 16 * (args.frames // 4 + 1) * (height // 8) * (width // 8) * 4
    pixels = args.frames * (preset.height * preset.width + height * width)
    needed = 6 * latents * (4 if args.compare else 1) + 3 * pixels
    there = next(parent for parent in (output.resolve(), *output.resolve().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        fail(f"--output {output}: nothing can be written to {there}; choose another folder")
    free = shutil.disk_usage(there).free
    if needed > free:
        fail(f"--output {output}: about {needed / 2**30:.1f} GiB will be written, but {free / 2**30:.1f} GiB are free; "
             "choose another disk, or a smaller --size")
    return folder, preset, height, width


@contextmanager
def stage(name, device, stages):
    """Time a stage and note its seconds and peak memory in `stages`: of the GPU's tensors, or of the process so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.time()
    try:
        yield
    except BaseException as error:
        error.add_note(name)
        raise
    peak = 0  # unknown
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    elif resource:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    stages[name] = {"seconds": round(time.time() - start, 2), "peak_memory_gib": round(peak / 2**30, 3) or None}


@contextmanager
def whole(file):
    """A place beside `file` to write to; what was written there then takes the name `file` at once, so that under it
    there is only ever a whole file, even if the power fails."""
    part = file.with_name("part-" + file.name)
    yield part
    with open(part, "rb+") as written:
        os.fsync(written.fileno())
    part.replace(file)


def first(function):
    """`function`, run by the first process only."""
    return function if RANK == 0 else lambda *args: None


def from_first(compute):
    """What `compute` gives in the first process, in every process."""
    result = [first(compute)()]
    if dist.is_initialized():
        dist.broadcast_object_list(result, device="cpu")
    return result[0]


@first
def write_json(file, content):
    with whole(file) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


@first
def write_tensors(file, tensors):
    with whole(file) as part:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)


@first
def write_video(file, frames, fps):
    with whole(file) as part:
        imageio.imwrite(part, frames, fps=fps, codec="libx264", pixelformat="yuv420p", quality=9, macro_block_size=1)


@first
def write_picture(file, picture):
    with whole(file) as part:
        picture.save(part)


def kept(file, compute, device):
    """The tensors in `file`; if it is not there, they are computed, and written to it."""
    tensors = from_first(lambda: load_file(file) if file.is_file() else None)
    if tensors is None:
        tensors = compute()
        write_tensors(file, tensors)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def way_on(output):
    """What is said at the end of a run that was stopped."""
    saved = (Path(output) / "run.json").is_file()
    return f"--resume {output} goes on from the last saved step" if saved else "nothing had been computed yet"


def unknown_words(tokenizer, prompt):
    """The words of a prompt that the tokenizer has no token for: the bundled model's knows few."""
    prompt = model.clean_prompt(prompt)
    encoding = tokenizer.encode(prompt)
    spans = zip(encoding.tokens, encoding.offsets)
    return [prompt[start:end] for token, (start, end) in spans if token == "<unk>"]


def cut_words(tokenizer, prompt):
    """The end of a prompt that has more tokens than the model reads, or nothing."""
    prompt = model.clean_prompt(prompt)
    encoding = tokenizer.encode(prompt)
    return prompt[max(end for _, end in encoding.offsets) :].strip() if encoding.overflowing else ""


def read_video(file, frames):
    """The first frames of a video file, uint8 (F, H, W, 3)."""
    try:
        clip = np.stack([frame for frame, _ in zip(imageio.imiter(file), range(frames))])
    except (OSError, ValueError) as error:
        fail(f"--base-video {file}: cannot be read as a video ({str(error).splitlines()[0]})")
    if len(clip) < frames:
        fail(f"--base-video {file}: has {len(clip)} frames; use --frames {(len(clip) - 1) // 4 * 4 + 1}")
    height, width = clip.shape[1:3]
    if height % 2 or width % 2:
        fail(f"--base-video {file}: is {width}x{height}, but videos have even sides; scale it to "
             f"{width // 2 * 2}x{height // 2 * 2} first")
    return torch.from_numpy(clip)


def to_video(frames):
    """uint8 (F, H, W, 3) to (1, 3, F, H, W) in [-1, 1]."""
    return frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def to_frames(video):
    """(1, 3, F, H, W) in [-1, 1] to uint8 (F, H, W, 3)."""
    return ((video[0] + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu().numpy()


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


def begin(typed):
    """All that is checked before anything is loaded or written: settings, the model's folder, its preset, its
    tokenizer, the refined height and width, and the clip of --base-video."""
    args = settings(typed)
    folder, preset, height, width = settle(args)
    clip = None
    if args.base_video and not (args.resume and (Path(args.output) / "state" / "clip.safetensors").is_file()):
        clip = {"frames": read_video(args.base_video, args.frames)}
    tokenizer = model.load_tokenizer(folder / "tokenizer", preset.text_length)
    unknown, cut = unknown_words(tokenizer, args.prompt), cut_words(tokenizer, args.prompt)
    if unknown:
        print(f"this model has never seen the words: {', '.join(unknown)}", file=sys.stderr)
    if cut:
        print(f"the prompt is too long, {preset.text_length} tokens are read; cut off is: {cut}", file=sys.stderr)
    return args, folder, preset, tokenizer, height, width, clip


@first
def make_folders(args):
    output, state = Path(args.output), Path(args.output) / "state"
    state.mkdir(parents=True, exist_ok=True)
    for file in state.glob(".tmp*"):  # safetensors' own, of a run that was killed while it wrote
        file.unlink()
    if args.overwrite:
        for file in (*state.glob("*.safetensors"), *(output / name for name in RESULTS)):
            file.unlink(missing_ok=True)


def main(typed):
    args, folder, preset, tokenizer, height, width, clip = from_first(lambda: begin(typed))
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if dist.is_initialized() and device.type == "cuda":  # each process of this machine has its own
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    output, state, stages = Path(args.output), Path(args.output) / "state", args.stages
    tiled = height * width > 2**18  # less than 512 x 512 takes little memory, and tiles would be slower
    with stage("load", device, stages):
        load = model.load_sharded if args.shard_weights else model.WanTransformer.from_pretrained
        transformer = load(folder / "transformer", device, dtype)
        vae = model.WanVAE.from_pretrained(folder / "vae", device)
    if dist.is_initialized():
        model.share_tokens(transformer)
        model.share_tiles(vae)

    def embeddings():
        encoder = model.TextEncoder.from_pretrained(folder / "text_encoder", device, dtype)
        both = model.encode_prompt(encoder, tokenizer, [args.prompt, args.negative_prompt])
        if not both.isfinite().all():
            fail(f"{folder / 'text_encoder'}: gives numbers that are not finite; fetch it again")
        return dict(zip(("text", "negative"), both.cpu().split(1)))

    # Nothing is written before all is known to be in order.
    text_file = state / "text.safetensors"
    prompts = from_first(lambda: load_file(text_file) if args.resume and text_file.is_file() else None)
    if prompts is None:
        with stage("text", device, stages):
            prompts = from_first(embeddings)
    make_folders(args)
    elsewhere = "output", "overwrite", "shard_weights"
    run = {
        "settings": {name: vars(args)[name] for name in DEFAULTS if name not in elsewhere},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "stages": stages,  # filled as they end
    }
    write_json(output / "run.json", run)
    write_tensors(text_file, prompts)
    prompts = {name: embedding.to(device) for name, embedding in prompts.items()}
    print(f"{args.prompt}\n{preset.width}x{preset.height} to {width}x{height}, {args.frames} frames, on {args.device}; "
          f"should it end early, go on with --resume {output}", flush=True)

    @contextmanager
    def timed(name):
        with stage(name, device, stages):
            yield
        write_json(output / "run.json", run)

    @contextmanager
    def bar(name, total, done=0):
        with tqdm(total=total, desc=name, unit="step", initial=done, disable=RANK > 0) as progress:
            yield lambda step, latents: progress.update()

    def tiles(name):
        return partial(tqdm, desc=name, unit="tile", disable=RANK > 0)

    def generated():
        shape = 1, 16, args.frames // 4 + 1, preset.height // 8, preset.width // 8
        with timed("base"), bar("base", args.steps) as on_step:
            return {"latents": freeswim.generate(
                transformer, **prompts, shape=shape, steps=args.steps, flow_shift=preset.base_shift,
                guidance=args.guidance, generator=torch.Generator().manual_seed(args.seed), on_step=on_step,
            )}

    if args.base_video:
        base_video = to_video(kept(state / "clip.safetensors", lambda: clip, "cpu")["frames"])
    else:
        latents = kept(state / "base.safetensors", generated, device)["latents"]
        with timed("decode base"):
            base_video = vae.decode(latents, tiled, tiles("decode base")).cpu()
    write_video(output / "base.mp4", to_frames(base_video), args.fps)
    with timed("upsample"):
        upscaled = freeswim.upsample(base_video, height, width)

    def encoded():
        with timed("encode"):
            return {"latents": vae.encode(upscaled.to(device), tiled, tiles("encode"))}

    def refined(name, **settings):
        progress = state / f"{name}-progress.safetensors"

        def computed():
            clean = kept(state / "encoded.safetensors", encoded, device)["latents"]
            begun = from_first(lambda: load_file(progress) if progress.is_file() else None)
            begun = begun and {name: tensor.to(device) for name, tensor in begun.items()}
            done = int(begun["step"]) if begun else 0
            with timed(name), bar(name, int(args.steps * args.strength), done) as on_step:
                return {"latents": freeswim.refine(
                    transformer, clean, **prompts, native=(preset.height // 16, preset.width // 16), steps=args.steps,
                    strength=args.strength, flow_shift=args.flow_shift, guidance=args.guidance,
                    generator=torch.Generator().manual_seed(args.seed + 1), state=begun,
                    save=partial(write_tensors, progress), on_step=on_step, **settings,
                )}

        latents = kept(state / f"{name}.safetensors", computed, device)["latents"]
        progress.unlink(missing_ok=True)
        with timed(f"decode {name}"):
            return latents, to_frames(vae.decode(latents, tiled, tiles(f"decode {name}")))

    latents, frames = refined("refine", cache_interval=args.cache_interval)
    write_video(output / "freeswim.mp4", frames, args.fps)
    clips = {"base, upscaled": to_frames(upscaled)}
    if args.compare:
        clips["full attention"] = refined("full attention", window="full", override=False)[1]
        clips["clipped window"] = refined("clipped window", window="clipped", override=False)[1]
        clips["inward window"] = refined("inward window", override=False)[1]
    clips["FreeSwim"] = frames
    write_picture(output / "comparison.png", comparison(clips))
    run["latents_sha256"] = hashlib.sha256(latents.cpu().numpy().tobytes()).hexdigest()
    write_json(output / "run.json", run)
    for name in RESULTS:
        print(output / name)


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
    typed = parse_arguments()
    output = typed.get("resume") or typed.get("output", DEFAULTS["output"])
    try:
        main(typed)
    except (ValueError, OSError) as error:
        fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        say(f"stopped; {way_on(output)}")
        raise SystemExit(130)
    except (MemoryError, RuntimeError) as error:
        # PyTorch's allocator for the CPU has no exception of its own, and its connections between processes neither.
        stage_name = " ".join(getattr(error, "__notes__", ["start"]))
        if (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
                or "not enough memory" in str(error)):
            say(f"out of memory in the stage \"{stage_name}\": free some, or begin with a lower --size or --frames; "
                f"{way_on(output)}")
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            say(f"another process ended in the stage \"{stage_name}\"; {way_on(output)}")
        else:
            raise
        raise SystemExit(1)
