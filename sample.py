"""From a prompt to a base video at native size to a refined video at the size you ask for.

    python sample.py                                                          the bundled tiny model, on any CPU
    python sample.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "…" --size 1920x1080              on a GPU
    python sample.py --resume output                                       go on with a run that was stopped
    torchrun --nproc-per-node 8 sample.py …                                one run on the GPUs of a machine

Whatever a run has computed is in the folder `state` of its output, so that nothing is computed
twice.

The bundled model knows the words: a and above bubbles fish floor large left orange pink plain purple red right sandy
seaweed small spotted striped swim swims two with yellow. Try
    a large red striped fish swims right above a sandy floor with bubbles
    a small yellow plain fish swims left above a sandy floor with seaweed
    a large pink spotted fish swims left above a sandy floor
    a small red spotted fish swims left and a large yellow plain fish swims right above a sandy floor with seaweed
    a large purple striped fish swims left and a small orange plain fish swims right above a sandy floor with bubbles
"""

import os
import signal
import sys


def stop(number, frame, message="nothing had been computed yet"):
    """Ctrl-C and SIGTERM end the command with one line, even while the imports below take their
    seconds."""
    if os.environ.get("RANK", "0") == "0":
        print(f"\nsample.py: stopped; {message}", file=sys.stderr)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)

import argparse
import hashlib
import platform
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import freeswim
import model
from support import checks, media, memory, parallel
from support.run import Run


@dataclass
class Preset:
    """What a checkpoint was trained for, and the settings that suit it."""

    height: int  # pixels, native
    width: int  # pixels, native
    frames: int  # 4k + 1
    fps: float  # frames per second
    base_shift: float  # flow shift of the base generation
    flow_shift: float  # flow shift of the refinement
    steps: int  # of the whole noise schedule
    strength: float  # share of them that the refinement runs
    guidance: float
    text_length: (
        int  # tokens: what a prompt is padded to with zeros, which the cross-attention sees
    )
    tall: bool  # was it trained on frames of the native size turned upright, too?
    prompt: str
    negative_prompt: str


CAT = "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage."
BLUR = "overexposed, static, blurred details, subtitles, worst quality, low quality, deformed, still picture, cluttered"
FISH = (
    "a large purple striped fish swims left and a small pink plain fish swims right above a sandy floor with "
    "bubbles"
)
PRESETS = {  # by the width of the transformer, in channels
    240: Preset(
        128,
        192,
        17,
        16,
        base_shift=3.0,
        flow_shift=1.0,
        steps=30,
        strength=0.7,
        guidance=2.0,
        text_length=32,
        tall=False,
        prompt=FISH,
        negative_prompt="",
    ),  # the bundled one
    1536: Preset(
        480,
        832,
        81,
        16,
        base_shift=3.0,
        flow_shift=9.0,
        steps=50,
        strength=0.7,
        guidance=5.0,
        text_length=512,
        tall=True,
        prompt=CAT,
        negative_prompt=BLUR,
    ),  # Wan2.1 1.3B
    5120: Preset(
        720,
        1280,
        81,
        16,
        base_shift=5.0,
        flow_shift=9.0,
        steps=50,
        strength=0.7,
        guidance=5.0,
        text_length=512,
        tall=True,
        prompt=CAT,
        negative_prompt=BLUR,
    ),  # Wan2.1 14B
}
PARTS = {
    "transformer": model.WanTransformer,
    "text_encoder": model.TextEncoder,
    "vae": model.WanVAE,
}
COMPARED = {  # with --compare: what each ingredient does
    "full attention": lambda window: freeswim.no_window,
    "clipped window": lambda window: partial(window, border="clipped"),
    "inward window": lambda window: window,
}


def fail(message, status=2):
    """One line that names the value and the mend."""
    print(f"sample.py: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


def parse_arguments():
    """What was typed, {name: value}, and the defaults of everything; None is left to the model's
    preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = fail
    add = parser.add_argument
    add(
        "--model",
        metavar="FOLDER_OR_HUB_ID",
        default=str(Path(__file__).parent / "tiny"),
        help="Diffusers layout (default: the bundled one)",
    )
    add("--prompt", help="what to show")
    add("--negative-prompt", help="what not to show")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--size", metavar="WIDTHxHEIGHT", help="of the refined video, in pixels, even"
    )
    size.add_argument(
        "--scale",
        type=float,
        default=2.0,
        help="of the refined video to the native one (%(default)s)",
    )
    add("--frames", type=int, help="4k + 1")
    add("--steps", type=int, help="of the whole noise schedule")
    add("--strength", type=float, help="share of the steps that the refinement runs")
    add("--guidance", type=float, help="scale of the classifier-free guidance")
    add("--flow-shift", type=float, help="of the refinement's noise schedule")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache-interval",
        type=int,
        metavar="K",
        default=5,
        help="run the full path every K steps (%(default)s)",
    )
    cache.add_argument(
        "--no-cache",
        dest="cache_interval",
        action="store_const",
        const=None,
        help="run it at every step, and for the negative prompt too",
    )
    add("--seed", type=int, default=0, help="of the noise (%(default)s)")
    add("--fps", type=float, help="frames per second of the videos")
    add(
        "--base-video", metavar="FILE", help="refine this clip or picture instead of generating one"
    )
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu (%(default)s)",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="of the transformer and the text encoder")
    add(
        "--output",
        metavar="FOLDER",
        default="output",
        help="where everything is written (%(default)s)",
    )
    add("--overwrite", action="store_true", help="even if the output folder holds another run")
    add(
        "--resume",
        metavar="FOLDER",
        help="go on with the run in this output folder, with its settings",
    )
    add(
        "--compare",
        action="store_true",
        help="also full attention and windows without override, in one picture",
    )
    add(
        "--features",
        choices=("gpu", "cpu"),
        help="where what the cache keeps is (default: where it fits)",
    )
    add(
        "--offload",
        action=argparse.BooleanOptionalAction,
        help="stream the transformer's weights from the CPU (default: if they do not fit beside the rest)",
    )
    add(
        "--shard-weights",
        action="store_true",
        help="under torchrun: spread the transformer's weights over the GPUs",
    )
    defaults = vars(parser.parse_args([]))
    typed = vars(parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(defaults, ...))))
    return {name: value for name, value in typed.items() if value is not ...}, defaults


# --------------------------------------------------------------------------------------------------
# What is checked before anything is loaded, fetched or written

WHERE = {"features", "offload", "shard_weights"}  # a run's results do not depend on them
ELSEWHERE = {"output", "overwrite", "resume", *WHERE}  # not settings of the run
CHANGEABLE = {"resume", "device", "compare", *WHERE}  # what may be said beside --resume


def check(typed, defaults):
    """All settings and what follows from them, as one namespace. Raises ValueError, naming the
    value and the mend, for whatever cannot work. Needs no weight: of a model on the hub, only
    descriptions and tokenizer are fetched."""
    for name in (
        name for name, value in typed.items() if value == "" and name != "negative_prompt"
    ):
        raise ValueError(f"--{name.replace('_', '-')} is empty: give it a value, or leave it out")
    begun = checks.read_record(typed["resume"]) if "resume" in typed else None
    for name in typed.keys() - CHANGEABLE if begun else ():
        raise ValueError(
            f"--{name.replace('_', '-')} cannot change what --resume {typed['resume']} goes on with"
        )
    args = argparse.Namespace(
        **{**defaults, **(begun["settings"] if begun else {}), **typed}, begun=begun, notes=[]
    )
    args.output = args.resume or args.output
    settings = {name: getattr(args, name) for name in defaults.keys() - ELSEWHERE}
    checks.check_unchanged(
        args, {name: value for name, value in settings.items() if name not in CHANGEABLE}
    )
    number = re.fullmatch(r"cpu|cuda:?(\d*)", args.device)
    if not number or args.device != "cpu" and int(number[1] or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {args.device}: choose cpu or, PyTorch sees {torch.cuda.device_count()} here, a GPU"
        )
    check_model(args)
    for name in (
        "prompt",
        "negative_prompt",
        "frames",
        "steps",
        "strength",
        "guidance",
        "flow_shift",
    ):
        setattr(
            args,
            name,
            getattr(args.preset, name) if getattr(args, name) is None else getattr(args, name),
        )
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    args.tokenizer = model.load_tokenizer(args.folder / "tokenizer", args.preset.text_length)
    if not model.clean_prompt(args.prompt):
        raise ValueError(f"--prompt {args.prompt!r} is empty: say what to show")
    checks.check_values(args)
    args.clip, total, shape = None, args.frames, (args.preset.height, args.preset.width)
    if args.base_video and not begun:
        args.base_video = str(Path(args.base_video).absolute())
        args.clip, fps, total = media.read_clip(args.base_video, args.frames)
        shape, args.fps = args.clip.shape[2:], args.fps or fps
    args.fps = args.fps or args.preset.fps
    checks.plan_size(args, shape, total)
    args.files = ["run.json", "base.mp4", "freeswim.mp4", "comparison.png", "state"]
    args.files += ["freeswim.png"] if args.frames == 1 else []
    checks.check_folder(args, args.files)
    args.notes += checks.notes_on_prompt(args)
    args.settings = {name: getattr(args, name) for name in sorted(settings)}
    return args


def check_model(args):
    """Sets the model's folder, as far as it is here, and its preset."""
    if Path(args.model).is_dir():
        args.model = str(Path(args.model).resolve())
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", args.model):
        raise ValueError(
            f"--model {args.model}: no such folder, and no hub id like Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    args.folder = checks.download(args.model, weights=False)
    index = args.folder / "model_index.json"
    index = model.read_json(index) if index.is_file() else {}
    kind = index.get("_class_name", "WanPipeline")
    if index.get("transformer_2", [None, None]) != [None, None]:
        kind += " with two transformers (Wan2.2)"
    if kind != "WanPipeline":
        raise ValueError(
            f"--model {args.model}: is a {kind}; supported is the WanPipeline of Wan2.1 text-to-video"
        )
    transformer, encoder, _ = (model.build(cls, args.folder / part) for part, cls in PARTS.items())
    if encoder.shared.embedding_dim != transformer.config["text_dim"]:
        raise ValueError(
            f"--model {args.model}: its text encoder is {encoder.shared.embedding_dim} wide, but its "
            f"transformer reads {transformer.config['text_dim']}; they are of different models"
        )
    width = transformer.heads * transformer.head_dim
    if width not in PRESETS:
        raise ValueError(
            f"--model {args.model}: a transformer {width} wide is not Wan2.1 text-to-video (1536 or 5120)"
        )
    args.preset = PRESETS[width]


# --------------------------------------------------------------------------------------------------
# The run


def load_models(args, folder, device, dtype):
    """The transformer and the VAE, each shared by all processes if there are several, and what
    `refine` uses here."""
    parts = {part: model.build(cls, folder / part) for part, cls in PARTS.items()}
    for part, empty in parts.items():  # all of them are in order, or refused, before any is loaded
        model.find_weights(empty, folder / part)
    memory.plan_memory(args, parts["transformer"], dtype, device)
    window, transformer_class = freeswim.grouped_window, model.WanTransformer
    if device.type == "cuda":
        from support import fast  # it imports PyTorch's compiler, which takes seconds

        window = fast.window_for(device, dtype, parts["transformer"].head_dim)
        transformer_class = fast.transformer_for(device)
    suited = {
        "window_attention": window,
        "cross_attention_cache": memory.CacheOnCPU(device) if args.features == "cpu" else None,
    }
    if "RANK" in os.environ:
        return (
            parallel.SharedTransformer.from_pretrained(
                folder / "transformer", device, dtype, args.shard_weights
            ),
            parallel.SharedVAE.from_pretrained(folder / "vae", device),
            suited,
        )
    transformer = transformer_class.from_pretrained(
        folder / "transformer", "cpu" if args.offload else device, dtype
    )
    if args.offload:
        memory.stream_blocks(transformer, device)
    return transformer, model.WanVAE.from_pretrained(folder / "vae", device), suited


def embed_prompts(args, folder, device, dtype):
    encoder = model.TextEncoder.from_pretrained(folder / "text_encoder", device, dtype)
    embeddings = model.encode_prompt(
        encoder, args.tokenizer, [args.prompt, args.negative_prompt]
    ).cpu()
    if not embeddings.isfinite().all():
        raise ValueError(
            f"{folder / 'text_encoder'}: gives numbers that are not finite; fetch it again"
        )
    return dict(zip(("text", "negative"), embeddings.split(1), strict=True))


def main(typed, defaults):
    args = parallel.from_first(lambda: check(typed, defaults))
    device, dtype = parallel.device_of(args.device), getattr(torch, args.dtype)
    folder = parallel.once_per_host(lambda: checks.download(args.model))
    record = {
        "settings": args.settings,
        "computed": "x".join(
            map(str, reversed(args.computed))
        ),  # pixels; of them, the middle is written
        "fingerprints": {
            name: checks.fingerprint(x) for name, x in {**args.settings, "weights": folder}.items()
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "cpu",
        "stages": args.begun["stages"] if args.begun else {},
        "files": args.files,
    }
    checks.check_unchanged(args, {"weights": folder})
    run = Run(args.output, device, record)
    with run.stage("load"):
        models = load_models(args, folder, device, dtype)
    prompts = run.load("text", "text", "negative") if args.begun else None
    if prompts is None:
        with run.stage("text"):
            prompts = parallel.from_first(lambda: embed_prompts(args, folder, device, dtype))
    run.begin(
        lambda: checks.check_folder(args, args.files), clear=args.overwrite
    )  # all is known to be in order now
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(stop, message=run.resume_hint()))
    try:
        run.save("text", prompts)
        make_videos(
            run, args, *models, {name: tensor.to(device) for name, tensor in prompts.items()}
        )
    finally:
        run.end()


def make_videos(run, args, transformer, vae, suited, prompts):
    """The way of a clip: base, upsampled, encoded, refined, decoded, written; nothing is computed
    twice."""
    (height, width), native, first = args.target, args.native, parallel.rank() == 0
    for line in (
        *args.notes,
        args.prompt,
        f"{native[1]}x{native[0]} to {width}x{height}, {args.frames} frames, on "
        f"{run.device}; should it end early, go on with --resume {run.output}",
    ):
        parallel.say(line)
    sampling = dict(**prompts, steps=args.steps, guidance=args.guidance)
    tiled = (
        height * width > 2**18
    )  # less than 512 x 512 takes little memory, and tiles would be slower

    if args.base_video:
        base = media.to_video(run.load_or_compute("clip", lambda progress: args.clip).cpu())
    else:
        shape = 1, 16, args.frames // 4 + 1, native[0] // 8, native[1] // 8
        latents = run.load_or_compute(
            "base",
            lambda progress: freeswim.generate(
                transformer,
                **sampling,
                shape=shape,
                flow_shift=args.preset.base_shift,
                generator=torch.Generator().manual_seed(args.seed),
                progress=progress,
            ),
        )
        with run.stage("decode base") as progress:
            base = vae.decode(latents, tiled, progress).cpu()
    run.write("base.mp4", lambda file: media.write_video(file, base, args.fps))
    with run.stage("upsample"):
        base = media.middle(base, *media.cropped(base.shape[-2:], args.target))
        upscaled = media.pad(freeswim.upsample(base, height, width), *args.computed)
    clips = {"base, upscaled": media.sample_frames(media.middle(upscaled, height, width))}
    clean = run.load_or_compute("encode", lambda progress: vae.encode(upscaled, tiled, progress))
    del base, upscaled

    variants = {"refine": dict(cache_interval=args.cache_interval)}
    for name, window in COMPARED.items() if args.compare else ():
        variants[name] = {
            "override": False,
            "window_attention": window(suited["window_attention"]),
        }
    for name, options in variants.items():
        latents = run.load_or_compute(
            name,
            lambda progress: freeswim.refine(
                transformer,
                clean,
                **sampling,
                native=(native[0] // 16, native[1] // 16),
                strength=args.strength,
                flow_shift=args.flow_shift,
                generator=torch.Generator().manual_seed(args.seed + 1),
                progress=progress,
                state=run.load(f"{name}-progress", "step", "latents"),
                save=partial(run.save, f"{name}-progress"),
                **(suited | options),
            ),
        )
        with run.stage(f"decode {name}") as progress:
            video = media.middle(vae.decode(latents, tiled, progress), height, width)
        if first:
            clips["FreeSwim" if name == "refine" else name] = media.sample_frames(video)
        if name == "refine":
            run.record["latents_sha256"] = hashlib.sha256(
                latents.cpu().numpy().tobytes()
            ).hexdigest()
            for file in (file for file in args.files if file.startswith("freeswim.")):
                run.write(file, lambda part: media.write_video(part, video, args.fps))
        del video
    run.write("comparison.png", lambda file: media.comparison(clips).save(file))
    run.write_record()
    if first:
        print(*(run.output / name for name in args.files if name != "state"), sep="\n")


if __name__ == "__main__":
    parallel.start()
    try:
        main(*parse_arguments())
    except ValueError as error:
        fail(str(error))
    except (OSError, MemoryError) as error:
        fail(str(error), status=1)
