"""What a run will do, settled and checked before anything is loaded or written.

Everything a user can get wrong raises UserError here, in one line that names the value and the fix.
"""

import json
import math
import os
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from tokenizers import Tokenizer

import model
from support import UserError, hub, lora, media
from support.command_line import is_launched, option_name, parse_rate, parse_size
from support.run import RunRecord, check_output, read_record

# --------------------------------------------------------------------------------------------------
# Presets


@dataclass(frozen=True)
class Preset:
    """What a checkpoint was trained for, and the settings that suit it."""

    height: int  # pixels, native
    width: int  # pixels, native
    frames: int  # 4k + 1
    fps: int  # frames per second
    base_shift: float  # flow shift of the base generation
    flow_shift: float  # flow shift of the refinement
    compare_shift: float  # the same with --compare: one at which windows alone go wrong
    steps: int  # of the whole noise schedule
    strength: float  # share of them that the refinement runs
    guidance: float
    guidance_2: float | None  # of Wan2.2's second expert; None for the same
    text_length: int  # tokens to which prompts are padded with zeros, which cross-attention sees
    upright: bool  # whether it was also trained on frames higher than wide
    prompt: str
    negative_prompt: str


FISH = (
    "a large purple striped fish swims left and a small pink plain fish swims right above a sandy "
    "floor with bubbles"
)
CAT = (
    "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a "
    "spotlighted stage."
)
BLUR = (
    "overexposed, static, blurred details, subtitles, worst quality, low quality, deformed, still "
    "picture, cluttered"
)
BUNDLED = Preset(
    height=128,
    width=192,
    frames=17,
    fps=16,
    base_shift=3.0,
    flow_shift=1.0,
    compare_shift=6.0,
    steps=30,
    strength=0.7,
    guidance=2.0,
    guidance_2=None,
    text_length=32,
    upright=False,
    prompt=FISH,
    negative_prompt="",
)
WAN_1_3B = Preset(
    height=480,
    width=832,
    frames=81,
    fps=16,
    base_shift=3.0,
    flow_shift=9.0,
    compare_shift=9.0,
    steps=50,
    strength=0.7,
    guidance=5.0,
    guidance_2=None,
    text_length=512,
    upright=True,
    prompt=CAT,
    negative_prompt=BLUR,
)
WAN_14B = replace(WAN_1_3B, height=720, width=1280, base_shift=5.0)
WAN_2_2_14B = replace(WAN_14B, base_shift=12.0, steps=40, guidance=4.0, guidance_2=3.0)
PRESETS = {240: BUNDLED, 1536: WAN_1_3B, 5120: WAN_14B}  # by the transformer's width in channels


def find_preset(name, transformer, boundary):
    width = transformer.heads * transformer.head_dim
    if width not in PRESETS:
        raise UserError(
            f"--model {name}: its transformer is {width} wide; supported are {hub.SUPPORTED}, "
            "which are 1536 or 5120 wide"
        )
    if boundary is not None and width == 5120:
        return WAN_2_2_14B
    return PRESETS[width]


# --------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True)
class Plan:
    """All that is settled about a run. Sizes are (height, width) in pixels."""

    model: str  # a folder or a hub id
    folder: Path  # of the model's descriptions and tokenizer; weights may not be there yet
    preset: Preset
    tokenizer: Tokenizer
    prompt: str
    negative_prompt: str
    native: tuple[int, int]  # the model's own size, upright if the target is
    target: tuple[int, int]  # of the refined video
    computed: tuple[int, int]  # what is computed for it: multiples of 16 that cover it
    frames: int  # 4k + 1
    fps: Fraction  # of the videos that are written, frames per second
    base_video: str | None  # the clip to refine; None to generate one
    clip: media.Clip | None  # that clip, read; None if the run's state has it already
    steps: int  # of the whole noise schedule
    strength: float  # share of the steps that the refinement runs
    guidance: float
    guidance_2: float | None  # of Wan2.2's second expert; None for the same
    boundary: float | None  # timestep at which that one takes over; None if there is none
    lora_changes: dict  # what LoRA files add, {part of the model: {tensor: [lora.Change]}}
    base_shift: float  # flow shift of the base generation
    flow_shift: float  # flow shift of the refinement
    cache_interval: int | None  # steps from one full path to the next; None for no cache
    seed: int  # of the base clip's noise; the refinement's is one more
    compare: bool  # also run the ablations
    device: str  # "cpu", "cuda" or "cuda:N"
    dtype: str  # "float32" or "bfloat16", of transformer and text encoder
    vae_dtype: str  # "float32" or "float16"
    features: str | None  # where the cross-attention cache is, "gpu" or "cpu"; None: where it fits
    offload: bool | None  # whether weights are streamed from CPU memory; None: if they do not fit
    shard_weights: bool  # whether processes share the weights
    output: Path
    overwrite: bool
    resumes: bool  # whether it goes on with a run that was begun
    record: RunRecord  # what run.json will hold
    notes: tuple[str, ...]  # lines that the user should see

    @property
    def native_grid(self):
        """(rows, columns) of tokens of a native frame; a token is 16 x 16 pixels."""
        height, width = self.native
        return height // 16, width // 16

    @property
    def base_shape(self):
        """Shape of the base clip's latents; a latent is 8 x 8 pixels."""
        height, width = self.native
        return (1, 16, self.frames // 4 + 1, height // 8, width // 8)

    @property
    def tiled(self):
        """Whether the VAE works in tiles. Below 512 x 512, whole frames take little memory and are
        faster."""
        height, width = self.target
        return height * width > 512 * 512


DEFAULTS = {  # None is left to the model's preset, to the clip or to the machine
    "model": str(Path(__file__).resolve().parent.parent / "tiny"),
    "prompt": None,
    "negative_prompt": None,
    "size": None,
    "scale": 2.0,
    "frames": None,
    "fps": None,
    "seed": 0,
    "base_video": None,
    "start": 0.0,
    "steps": None,
    "strength": None,
    "guidance": None,
    "guidance_2": None,
    "lora": (),
    "lora_2": (),
    "flow_shift": None,
    "base_shift": None,
    "cache_interval": 5,
    "compare": False,
    "device": None,
    "dtype": None,
    "vae_dtype": None,
    "features": None,
    "offload": None,
    "shard_weights": False,
    "output": "output",
    "overwrite": False,
    "resume": None,
}
PLACEMENT = {"features", "offload", "shard_weights"}  # a run's result does not depend on them
NOT_RECORDED = {"output", "overwrite", "resume", *PLACEMENT}
CHANGEABLE = {"resume", "device", "compare", *PLACEMENT}  # what may be typed with --resume
AS_TYPED = (  # options that the plan has as they are
    "model",
    "prompt",
    "negative_prompt",
    "frames",
    "base_video",
    "steps",
    "strength",
    "guidance",
    "guidance_2",
    "base_shift",
    "flow_shift",
    "cache_interval",
    "seed",
    "compare",
    "device",
    "dtype",
    "vae_dtype",
    "features",
    "offload",
    "shard_weights",
    "overwrite",
)
FROM_PRESET = (
    "prompt",
    "negative_prompt",
    "frames",
    "steps",
    "strength",
    "base_shift",
)


def make_plan(typed):
    """The plan for the options that were `typed`, {name: value}. Needs no weights: of a model on
    the hub, only descriptions and tokenizer are fetched. Raises UserError for what cannot work."""
    begun = None  # the record of the run that is resumed
    if "resume" in typed:
        begun = read_record(typed["resume"])
        check_resumable(typed, begun)
    options = settle_options(typed, begun)
    check_names(options)
    settle_device(options)
    loras = settle_loras(options)
    folder = hub.find_model(options["model"])
    boundary = hub.boundary_of(folder)
    transformer = model.build(model.WanTransformer, folder / "transformer")
    preset = find_preset(options["model"], transformer, boundary)
    check_second_expert(options, boundary)
    lora_changes = find_lora_changes(transformer, loras)
    explicit_frames = options["frames"]
    notes = settle_flow_shift(options, preset)
    notes += settle_guidance(options, preset)
    fill_from_preset(options, preset)
    check_placement(options)
    check_steps(options)
    tokenizer = model.load_tokenizer(folder / "tokenizer", preset.text_length)
    notes += check_prompt(options["prompt"], tokenizer, preset)

    clip = None
    base_size = (preset.height, preset.width)
    if options["base_video"] is not None:
        clip, clip_notes = settle_clip(options, explicit_frames, begun)
        notes += clip_notes
    if clip is not None:
        base_size = tuple(clip.frames.shape[2:])
    if options["fps"] is None:
        options["fps"] = written_rate(preset.fps)

    native, target = settle_size(options, base_size, preset)
    if begun is None:
        check_size(target, native)
        notes += notes_on_size(target, native, base_size, preset)
    if clip is not None:
        check_clip_size(options["base_video"], base_size, target, native)
    height, width = target
    options["size"] = f"{width}x{height}"

    plan = Plan(
        folder=folder,
        preset=preset,
        tokenizer=tokenizer,
        boundary=boundary,
        lora_changes=lora_changes,
        native=native,
        target=target,
        computed=covered(target),
        clip=clip,
        fps=parse_rate(str(options["fps"])),
        output=Path(options["output"]),
        resumes=begun is not None,
        record=make_record(options, covered(target), clip, loras, begun),
        notes=tuple(notes),
        **{name: options[name] for name in AS_TYPED},
    )
    check_output(plan)
    return plan


def settle_flow_shift(options, preset):
    """The refinement's flow shift, and a note if --compare chooses another than usual."""
    if options["flow_shift"] is not None:
        return []
    options["flow_shift"] = preset.flow_shift
    if not options["compare"] or preset.compare_shift == preset.flow_shift:
        return []
    options["flow_shift"] = preset.compare_shift
    return [
        f"--compare refines at flow shift {preset.compare_shift:g}, where windows alone go wrong, "
        f"instead of {preset.flow_shift:g}; --flow-shift chooses another"
    ]


def settle_guidance(options, preset):
    """Guidance of both experts, and a note on LoRAs that want none."""
    notes = []
    has_lora = options["lora"] or options["lora_2"]
    is_typed = options["steps"] is not None or options["guidance"] is not None
    if has_lora and not is_typed and options["resume"] is None:
        notes.append(
            "a LoRA that was distilled to few steps needs few steps and no guidance: "
            "--steps 4 --guidance 1 --flow-shift 5 --base-shift 5"
        )
    if options["guidance"] is None:
        options["guidance"] = preset.guidance
        if options["guidance_2"] is None:
            options["guidance_2"] = preset.guidance_2
    return notes


def settle_loras(options):
    """The files that --lora and --lora-2 name, {option: [Lora]}. Names become absolute."""
    loras = {}
    for name in ("lora", "lora_2"):
        loras[name] = [lora.parse_lora(option_name(name), text) for text in options[name]]
        options[name] = [f"{found.file}:{found.weight:g}" for found in loras[name]]
    return loras


def find_lora_changes(transformer, loras):
    """What the files add to each of the transformers."""
    return {
        "transformer": lora.find_changes(transformer, loras["lora"]),
        "transformer_2": lora.find_changes(transformer, loras["lora_2"]),
    }


def check_second_expert(options, boundary):
    """Raise UserError for an option of Wan2.2's second expert where there is none."""
    for name in ("guidance_2", "lora_2"):
        if options[name] and boundary is None:
            raise UserError(
                f"{option_name(name)}: this model has one transformer; only Wan2.2-T2V-A14B has "
                "a second one"
            )


def fill_from_preset(options, preset):
    for name in FROM_PRESET:
        if options[name] is None:
            options[name] = getattr(preset, name)
    on_cpu = options["device"] == "cpu"
    if options["dtype"] is None:
        options["dtype"] = "float32" if on_cpu else "bfloat16"
    if options["vae_dtype"] is None:
        options["vae_dtype"] = "float32" if on_cpu else "float16"


def written_rate(fps):
    """A frame rate as run.json has it: 16 or "24000/1001"."""
    fps = Fraction(fps)
    return fps.numerator if fps.denominator == 1 else str(fps)


# --------------------------------------------------------------------------------------------------
# Options


def settle_options(typed, begun):
    """Every option, {name: value}: what was typed, else what the resumed run has, else the
    default. Paths are absolute, so a run can be resumed from anywhere."""
    recorded = {} if begun is None else begun.settings
    options = {**DEFAULTS, **recorded, **typed}
    if options["resume"] is not None:
        options["output"] = options["resume"]
    for name in ("prompt", "negative_prompt"):
        if options[name] is not None:
            options[name] = to_text(options[name])
    if Path(options["model"]).is_dir():
        options["model"] = str(Path(options["model"]).resolve())
    if options["base_video"] is not None:
        options["base_video"] = str(Path(options["base_video"]).absolute())
    if "fps" in typed:
        options["fps"] = written_rate(parse_rate(typed["fps"]))
    return options


def check_names(options):
    """Raise UserError for a folder whose name safetensors cannot open."""
    for name in ("model", "output"):
        try:
            os.fsencode(options[name]).decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(
                f"{option_name(name)} {options[name]}: the name is not UTF-8; rename the folder"
            ) from None


def to_text(argument):
    """A prompt as Unicode, whatever the encoding that Python took the command line for."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument


def check_resumable(typed, begun):
    """Raise UserError unless the resumed run goes on with the settings that it began with."""
    for name in typed:
        if name not in CHANGEABLE:
            raise UserError(
                f"{option_name(name)} cannot change what --resume {typed['resume']} goes on with"
            )
    for name in DEFAULTS.keys() - NOT_RECORDED - CHANGEABLE:
        value = begun.settings.get(name, DEFAULTS[name])
        if begun.fingerprints.get(name) != fingerprint(value):
            raise UserError(
                f"--resume {typed['resume']}: its {name} is not what it began with ({value}); "
                "fix run.json, or begin anew"
            )


def fingerprint(value):
    return hub.fingerprint_of_text(json.dumps(value))


def settle_device(options):
    count = torch.cuda.device_count()
    if options["device"] is None:
        options["device"] = "cuda" if count > 0 else "cpu"
    device = options["device"]
    if device != "cpu":
        number = int(device.partition(":")[2] or 0)
        if number >= count:
            raise UserError(f"--device {device}: choose cpu; PyTorch sees {count} GPUs here")


def check_placement(options):
    several = is_launched()
    if options["vae_dtype"] == "float16" and options["device"] == "cpu":
        raise UserError("--vae-dtype float16: needs a GPU; on a CPU, choose float32")
    if options["shard_weights"] and not several:
        raise UserError(
            "--shard-weights: needs several processes; start them with "
            "torchrun --nproc-per-node N sample.py ..."
        )
    if options["offload"] and (several or options["device"] == "cpu"):
        raise UserError(
            "--offload: is for one process and a GPU; several share their weights with "
            "--shard-weights"
        )


def check_steps(options):
    steps, strength = options["steps"], options["strength"]
    if int(steps * strength) < 1:
        raise UserError(f"--strength {strength} of --steps {steps}: at least one step must run")


def check_prompt(prompt, tokenizer, preset):
    """Notes on words that the model does not know, and on those that are cut off."""
    cleaned = model.clean_prompt(prompt)
    if not cleaned:
        raise UserError(f"--prompt {prompt!r} is empty: say what to show")
    encoding = tokenizer.encode(cleaned)
    unknown = []
    for token, (first, last) in zip(encoding.tokens, encoding.offsets, strict=True):
        if token == "<unk>":
            unknown.append(cleaned[first:last])
    notes = []
    if unknown:
        notes.append(f"this model has never seen the words: {', '.join(unknown)}")
    if encoding.overflowing:
        end = max(last for _, last in encoding.offsets)
        cut = cleaned[end:].strip()
        notes.append(
            f"the prompt is too long, {preset.text_length} tokens are read; cut off is: {cut}"
        )
    return notes


# --------------------------------------------------------------------------------------------------
# The clip


def settle_clip(options, explicit_frames, begun):
    """The clip to refine, and notes on it. Settles the number of frames and the frame rate. A
    resumed run whose state has the clip already gets None."""
    file = options["base_video"]
    if begun is not None and not clip_has_to_be_read(options, begun):
        return None, []
    clip = media.read_clip(file, options["frames"], options["start"])
    notes = list(clip.notes)
    count = len(clip.frames)
    if count < options["frames"]:
        fitting = (count - 1) // 4 * 4 + 1
        if explicit_frames is not None:
            raise UserError(
                f"--frames {explicit_frames}: {file} has {count} frames; use --frames {fitting}, "
                "or leave it out"
            )
        clip = media.shortened(clip, fitting)
        if count > 1:
            notes.append(f"the clip has {count} frames, of which {fitting} are used (4k + 1)")
        options["frames"] = fitting
    if clip.fps is not None:
        own_rate = written_rate(clip.fps)
        if options["fps"] is None:
            options["fps"] = own_rate
        if options["fps"] != own_rate and clip.has_sound:
            notes.append(f"the clip's sound is left out, because --fps is not its own {own_rate}")
            clip = replace(clip, has_sound=False)
    return clip, notes


def clip_has_to_be_read(options, begun):
    """Whether a resumed run still needs the clip's file. Raises UserError if it is not the file
    that the run began with."""
    file = Path(options["base_video"])
    in_state = (Path(options["output"]) / "state" / "clip.safetensors").is_file()
    if file.is_file():
        if begun.fingerprints.get("clip") != hub.fingerprint_of_file(file):
            raise UserError(
                f"--resume {options['output']}: its clip {file} is not the one it began with; put "
                "that back, or begin anew"
            )
    elif not in_state:
        raise UserError(
            f"--resume {options['output']}: its clip {file} is gone; put it back, or begin anew"
        )
    return not in_state


# --------------------------------------------------------------------------------------------------
# Sizes


def settle_size(options, base_size, preset):
    """The model's native size and the size of the refined video, from --size or --scale."""
    native = (preset.height, preset.width)
    if options["size"] is not None:
        target = parse_size(options["size"])
    else:
        target = size_from_scale(options["scale"], base_size, native)
    return turned(native, target), target


def size_from_scale(scale, base_size, native):
    """The size with the base clip's proportions and `scale` times the native area, sides even, and
    never less than native."""
    rows, columns = base_size
    side = scale * math.sqrt(native[0] * native[1])  # of a square of that area
    height = side * math.sqrt(rows / columns)
    width = side * math.sqrt(columns / rows)
    least_height, least_width = turned(native, (height, width))
    enlarge = max(1, least_height / height, least_width / width)
    return 2 * round(enlarge * height / 2), 2 * round(enlarge * width / 2)


def turned(native, target):
    """The native size, upright if the target is."""
    short, long = sorted(native)
    height, width = target
    return (long, short) if height > width else (short, long)


def check_size(target, native):
    """Raise UserError unless both sides are even and at least native."""
    height, width = target
    nearest_height = max(native[0], 2 * round(height / 2))
    nearest_width = max(native[1], 2 * round(width / 2))
    if target != (nearest_height, nearest_width):
        raise UserError(
            f"--size {width}x{height}: sides must be even, and at least "
            f"{native[1]}x{native[0]}; the nearest "
            f"is --size {nearest_width}x{nearest_height}"
        )


def check_clip_size(file, base_size, target, native):
    rows, columns = base_size
    height, width = target
    used_rows, used_columns = media.cropped(base_size, target)
    if used_rows > height or used_columns > width:
        raise UserError(
            f"--base-video {file}: is {columns}x{rows}, larger than the {width}x{height} to be "
            "made of it; give a larger --size or --scale"
        )
    if 4 * rows * columns < native[0] * native[1]:
        raise UserError(
            f"--base-video {file}: is {columns}x{rows}, far below the model's "
            f"{native[1]}x{native[0]}; use a larger one"
        )


def notes_on_size(target, native, base_size, preset):
    height, width = target
    notes = []
    if height > width and not preset.upright:
        notes.append("this model has never seen frames higher than wide")
    stretch = (width / height) / (native[1] / native[0])
    growth = max(width / native[1], height / native[0])
    if not 0.5 <= stretch <= 2 or growth > 5:
        notes.append(
            f"{width}x{height} is far from {native[1]}x{native[0]}, and from anything that this "
            "model has seen"
        )
    rows, columns = base_size
    used_rows, used_columns = media.cropped(base_size, target)
    if used_rows * used_columns < 0.99 * rows * columns:  # the rest is rounding
        notes.append(
            f"the base clip, {columns}x{rows}, is cropped in the middle to "
            f"{used_columns}x{used_rows}"
        )
    return notes


def covered(target):
    """The smallest multiples of 16 that cover the target."""
    height, width = target
    return (height + 15) // 16 * 16, (width + 15) // 16 * 16


# --------------------------------------------------------------------------------------------------
# The record


def fingerprints_of_loras(loras):
    """{"lora FILE": a few letters}."""
    found = {}
    for lora_file in [*loras["lora"], *loras["lora_2"]]:
        found[f"lora {lora_file.file}"] = hub.fingerprint_of_file(lora_file.file)
    return found


def check_same_loras(options, loras, begun):
    """Raise UserError if a LoRA of the resumed run is another file now."""
    for name, value in fingerprints_of_loras(loras).items():
        if begun.fingerprints.get(name) != value:
            raise UserError(
                f"--resume {options['output']}: its {name} is not what it began with; put that "
                "back, or begin anew"
            )


def make_record(options, computed, clip, loras, begun):
    """What run.json holds of a run."""
    settings = {name: options[name] for name in sorted(DEFAULTS.keys() - NOT_RECORDED)}
    fingerprints = {name: fingerprint(value) for name, value in settings.items()}
    fingerprints |= fingerprints_of_loras(loras)
    stages = {}
    sound = None
    if begun is not None:
        stages = begun.stages
        sound = begun.sound
        for name in ("clip", "weights"):
            if name in begun.fingerprints:
                fingerprints[name] = begun.fingerprints[name]
        check_same_loras(options, loras, begun)
    elif clip is not None:
        fingerprints["clip"] = hub.fingerprint_of_file(Path(options["base_video"]))
        if clip.has_sound:
            sound = [str(clip.times[0]), str(clip.end)]
    files = ["run.json", "base.mp4", "freeswim.mp4", "comparison.png", "state"]
    if options["frames"] == 1:
        files.append("freeswim.png")
    height, width = computed
    return RunRecord(
        settings=settings,
        computed=f"{width}x{height}",
        fingerprints=fingerprints,
        stages=stages,
        sound=sound,
        files=files,
    )
