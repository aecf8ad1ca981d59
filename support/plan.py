"""The plan of a run: every option resolved and checked, in sizes and counts, before anything is
loaded or written.

What a user can get wrong and only the model, the clip or the machine shows raises UserError here,
in one line that names the value and the fix.
"""

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer

import freeswim
import model
from support import UserError, hub, lora, media, processes
from support.options import (
    OPTIONS,
    check_may_change,
    check_recorded,
    flag,
    parse_size,
    recorded_names,
    written_rate,
)
from support.presets import SUPPORTED, Preset, find_preset
from support.run import RunRecord, check_output, check_space, read_record


@dataclass(frozen=True)
class Plan:
    """The options, and what follows from them. Sizes are (height, width) in pixels."""

    options: SimpleNamespace  # one value for each row of support/options.py
    folder: Path  # of the model's descriptions and tokenizer; weights may not be there yet
    parts: hub.Parts  # the model's parts, without weights
    preset: Preset
    tokenizer: Tokenizer
    lora_changes: dict  # what LoRA files add, {part of the model: {tensor: [lora.Change]}}
    native: tuple[int, int]  # the model's own size, portrait if the target is
    target: tuple[int, int]  # of the refined video
    computed: tuple[int, int]  # what is computed for it: whole tokens that cover it
    base_size: tuple[int, int]  # of the base clip: native, or the given clip's
    sound: tuple[str, str] | None  # where the given clip's sound begins and ends, in seconds
    begun: RunRecord | None  # the record of the run that is resumed
    fingerprints: dict  # of settings, LoRAs and clip, {name: short hash}
    notes: tuple[str, ...]  # lines that the user should see

    @property
    def output(self):
        return Path(self.options.output)

    @property
    def boundary(self):
        """The timestep at which Wan2.2's second expert takes over; None if there is one."""
        return self.parts.boundary

    @property
    def same_device(self):
        """Whether a resumed run goes on on the kind of device on which it began."""
        return kind_of(self.options.device) == kind_of(self.begun.settings.get("device"))

    @property
    def fps(self):
        return Fraction(self.options.fps)

    @property
    def native_grid(self):
        """(rows, columns) of tokens of a native frame."""
        height, width = self.native
        return height // self.parts.token_size, width // self.parts.token_size

    @property
    def latent_frames(self):
        return self.options.frames // 4 + 1

    def latents_shape(self, size):
        """Shape of the latents of a clip of this size."""
        height, width = size
        pixels = self.parts.latent_size
        channels = self.parts.transformer.channels
        return (1, channels, self.latent_frames, height // pixels, width // pixels)


def make_plan(typed):
    """The plan for the options that were `typed`, {name: value}. Needs no weights: of a model on
    the hub, only descriptions and tokenizer are fetched, and a LoRA only after every other check.
    Raises UserError for what cannot work."""
    begun = read_record(typed["resume"]) if "resume" in typed else None
    known, notes = known_options(typed, begun)
    folder = hub.find_model(known["model"])
    parts = hub.describe(known["model"], folder)
    preset = find_preset(parts.transformer.dim, parts.boundary is not None)
    check_model(known, parts, preset)
    tokenizer = model.load_tokenizer(folder / "tokenizer", preset.text_length)

    base_size = (preset.height, preset.width)
    if known["base_video"] is not None and begun is None:
        base_size = media.read_size(known["base_video"], known["start"])
    native, target = resolve_size(known, base_size, preset)
    if known["base_video"] is None:
        base_size = native
    if begun is None:
        check_size(target, native)
    clip = None
    if known["base_video"] is not None:
        if begun is None:
            check_clip_size(known["base_video"], base_size, target, native)
        clip, clip_notes = read_clip(known, preset, begun)
        notes += clip_notes
    options = resolve_options(known, preset, clip, target)
    check_steps(options)
    check_placement(options)
    notes += notes_on_prompts(typed, options, tokenizer, preset)
    notes += notes_on_experts(options, parts)
    if begun is None:
        notes += notes_on_settings(typed, options, preset)
        notes += notes_on_size(target, native, base_size, preset)

    computed = round_up(target, parts.token_size)
    check_output(options, begun)
    if begun is None:
        check_space(options, parts, computed, base_size)
        check_sides(target, base_size)

    loras = find_loras(options)  # last, because they may have to be fetched
    return Plan(
        options=options,
        folder=folder,
        parts=parts,
        preset=preset,
        tokenizer=tokenizer,
        lora_changes=lora.find_all_changes(parts.transformer, loras),
        native=native,
        target=target,
        computed=computed,
        base_size=base_size,
        sound=find_sound(options, clip, begun),
        begun=begun,
        fingerprints=find_fingerprints(options, loras, begun),
        notes=tuple(notes),
    )


# --------------------------------------------------------------------------------------------------
# Options


def known_options(typed, begun):
    """The value of every option before the model is known, {name: value}, and notes: what was
    typed, else what the resumed run has, else the table's default. Paths are absolute, so a run can
    be resumed from anywhere."""
    known = {name: option.default for name, option in OPTIONS.items()}
    notes = []
    if begun is None:
        known |= typed
        known["device"] = resolve_device(known["device"])
    else:
        recorded = check_settings(typed["resume"], begun)
        device = resolve_device(typed.get("device", recorded["device"]))
        same_device = kind_of(device) == kind_of(recorded["device"])
        check_may_change(typed, same_device)
        if not same_device:
            recorded["dtype"] = None
            recorded["vae_dtype"] = None
            notes.append(
                f"this run began on {recorded['device']} and goes on on {device}: the data types "
                "are chosen anew, and its last digits will differ"
            )
        known |= recorded | typed
        known["device"] = device
        known["output"] = typed["resume"]
    if Path(known["model"]).is_dir():
        known["model"] = str(Path(known["model"]).resolve())
    if known["base_video"] is not None:
        known["base_video"] = str(Path(known["base_video"]).absolute())
    for name in ("lora", "lora_2"):
        known[name] = [lora.absolute(flag(name), written) for written in known[name]]
    return known, notes


def kind_of(device):
    return None if device is None else device.split(":")[0]


def resolve_device(device):
    """The device of the run. Raises UserError if this machine does not have it."""
    count = torch.cuda.device_count()
    if device is None:
        return "cuda" if count > 0 else "cpu"
    if device == "cpu":
        return device
    number = device.partition(":")[2]
    if processes.are_several() and number:
        raise UserError(
            f"--device {device}: torchrun gives each process a GPU of its own; use --device cuda"
        )
    if int(number or 0) >= count:
        raise UserError(f"--device {device}: choose cpu; PyTorch sees {count} GPUs here")
    return device


def check_settings(folder, begun):
    """The settings of the run that is resumed, {option: value}, each as it began. An option that
    was not there yet has its default. Raises UserError for one that was changed by hand."""
    settings = {}
    for name in recorded_names():
        option = OPTIONS[name]
        is_new = name not in begun.settings and name not in begun.fingerprints
        if is_new:
            settings[name] = option.default
            continue
        value = begun.settings.get(name)
        try:
            settings[name] = check_recorded(name, value)
        except ValueError:
            raise UserError(changed_by_hand(folder, name, value)) from None
        if not option.may_change and begun.fingerprints.get(name) != fingerprint(value):
            raise UserError(changed_by_hand(folder, name, value))
    return settings


def changed_by_hand(folder, name, value):
    return (
        f"--resume {folder}: its {name} is not what it began with ({value!r:.99}); fix run.json, "
        "or begin anew"
    )


def fingerprint(value):
    return hub.fingerprint_of_text(json.dumps(value))


def resolve_options(known, preset, clip, target):
    """Every option with its value: the known one, else the preset's, the clip's or the device's."""
    options = SimpleNamespace(**known)
    if options.compare and options.flow_shift is None:
        options.flow_shift = preset.compare_shift
    if clip is not None:
        options.frames = clip.count
        if options.fps is None and clip.fps is not None:
            options.fps = written_rate(clip.fps)
    for name in known:
        # A guidance that was typed is that of both experts.
        is_typed = name == "guidance_2" and known["guidance"] is not None
        if getattr(options, name) is None and hasattr(preset, name) and not is_typed:
            setattr(options, name, getattr(preset, name))
    on_cpu = options.device == "cpu"
    if options.dtype is None:
        options.dtype = "float32" if on_cpu else "bfloat16"
    if options.vae_dtype is None:
        options.vae_dtype = "float32" if on_cpu else "float16"
    height, width = target
    options.size = f"{width}x{height}"
    return options


# --------------------------------------------------------------------------------------------------
# Checks


def check_model(known, parts, preset):
    """Raise UserError for a model that is not supported, or options that it does not have."""
    if preset is None:
        raise UserError(
            f"--model {known['model']}: its transformer is {parts.transformer.dim} wide; supported "
            f"are {SUPPORTED}, which are 1536, 3072 or 5120 wide"
        )
    for name in ("guidance_2", "lora_2"):
        if known[name] and parts.boundary is None:
            raise UserError(
                f"{flag(name)}: this model has one transformer; only Wan2.2-T2V-A14B has a second "
                "one"
            )


def check_steps(options):
    if int(options.steps * options.strength) < 1:
        raise UserError(
            f"--strength {options.strength} of --steps {options.steps}: at least one step must run"
        )


def check_placement(options):
    several = processes.are_several()
    if options.vae_dtype == "float16" and options.device == "cpu":
        raise UserError("--vae-dtype float16: needs a GPU; on a CPU, choose float32")
    if options.shard_weights and not several:
        raise UserError(
            "--shard-weights: needs several processes; start them with "
            "torchrun --nproc-per-node N sample.py ..."
        )
    if options.offload and (several or options.device == "cpu"):
        raise UserError(
            "--offload: is for one process and a GPU; several share their weights with "
            "--shard-weights"
        )


# --------------------------------------------------------------------------------------------------
# Notes: what was asked for and has no effect, or may surprise


def notes_on_prompts(typed, options, tokenizer, preset):
    """Notes on words that the model does not know, and on those that are cut off. Raises UserError
    for an empty prompt."""
    if not model.clean_prompt(options.prompt):
        raise UserError(f"--prompt {options.prompt!r} is empty: say what to show")
    notes = notes_on_prompt("the prompt", options.prompt, tokenizer, preset)
    if needs_negative(options):
        negative = options.negative_prompt
        notes += notes_on_prompt("the negative prompt", negative, tokenizer, preset)
    elif "negative_prompt" in typed:
        notes.append("--negative-prompt has no effect: at guidance 1 it is not used")
    return notes


def notes_on_prompt(name, prompt, tokenizer, preset):
    cleaned = model.clean_prompt(prompt)
    encoding = tokenizer.encode(cleaned)
    unknown = []
    for token, (first, last) in zip(encoding.tokens, encoding.offsets, strict=True):
        if token == "<unk>" or token in preset.untrained_words:
            unknown.append(cleaned[first:last])
    notes = []
    if unknown:
        notes.append(f"this model has never seen the words: {', '.join(unknown)}")
    if encoding.overflowing:
        end = max(last for _, last in encoding.offsets)
        cut = cleaned[end:].strip()
        notes.append(f"{name} is too long, {preset.text_length} tokens are read; cut off is: {cut}")
    return notes


def needs_negative(options):
    """Whether classifier-free guidance reads the negative prompt."""
    return options.guidance != 1 or options.guidance_2 not in (None, 1)


def notes_on_experts(options, parts):
    """Notes on what only one of Wan2.2's experts has, and on an expert that no step reaches."""
    if parts.boundary is None:
        return []
    notes = []
    if options.lora and not options.lora_2:
        notes.append("--lora is for the expert of high noise; the other has none without --lora-2")
    if options.lora_2 and not options.lora:
        notes.append("--lora-2 is for the expert of low noise; the other has none without --lora")
    solver = freeswim.FlowUniPC(options.steps, options.flow_shift, options.strength)
    timesteps = list(solver.timesteps)
    if options.base_video is None:
        timesteps += freeswim.FlowUniPC(options.steps, options.base_shift).timesteps
    if options.lora and max(timesteps) < parts.boundary:
        notes.append("--lora has no effect: no step is left to the expert of high noise")
    if options.lora_2 and min(timesteps) >= parts.boundary:
        notes.append("--lora-2 has no effect: no step is left to the expert of low noise")
    return notes


def notes_on_settings(typed, options, preset):
    notes = []
    has_lora = options.lora or options.lora_2
    if has_lora and "steps" not in typed and "guidance" not in typed:
        notes.append(
            "a LoRA that was distilled to few steps needs few steps and no guidance: "
            "--steps 4 --guidance 1 --flow-shift 5 --base-shift 5"
        )
    if "flow_shift" not in typed and options.flow_shift != preset.flow_shift:
        notes.append(
            f"--compare refines at flow shift {preset.compare_shift:g}, where windows alone go "
            f"wrong, instead of {preset.flow_shift:g}; --flow-shift chooses another"
        )
    if options.frames > preset.frames:
        notes.append(
            f"{options.frames} frames are more than the {preset.frames} that this model was "
            "trained on; it may repeat itself"
        )
    return notes


def notes_on_size(target, native, base_size, preset):
    height, width = target
    notes = []
    if height > width and not preset.portrait:
        notes.append("this model has never seen frames higher than wide")
    stretch = (width / height) / (native[1] / native[0])
    growth = max(width / native[1], height / native[0])
    if not 0.5 <= stretch <= 2 or growth > 5:
        notes.append(
            f"{width}x{height} is far from {native[1]}x{native[0]}, and from anything that this "
            "model has seen"
        )
    rows, columns = base_size
    used_rows, used_columns = media.crop_size(base_size, target)
    if used_rows * used_columns < 0.99 * rows * columns:  # the rest is rounding
        notes.append(
            f"the base clip, {columns}x{rows}, is cropped in the middle to "
            f"{used_columns}x{used_rows}"
        )
    return notes


# --------------------------------------------------------------------------------------------------
# The clip


def read_clip(known, preset, begun):
    """What is known of the clip to refine, and notes on it. All of it is decoded once, so that
    damage shows before any work. None if a resumed run has it in its state."""
    file = known["base_video"]
    if begun is not None:
        check_same_clip(known, begun)
        return None, []
    most = known["frames"] or preset.frames
    clip = media.read_clip(file, most, known["start"])
    notes = list(clip.notes)
    if clip.count < most:
        fitting = (clip.count - 1) // 4 * 4 + 1
        if known["frames"] is not None:
            raise UserError(
                f"--frames {most}: {file} has {clip.count} frames; use --frames {fitting}, "
                "or leave it out"
            )
        if clip.count > 1:
            notes.append(f"the clip has {clip.count} frames, of which {fitting} are used (4k + 1)")
        clip = media.truncate(clip, fitting)
    return media.without_frames(clip), notes + notes_on_sound(known, clip)


def notes_on_sound(known, clip):
    if clip.has_sound and not keeps_its_rate(known, clip):
        own_rate = written_rate(clip.fps)
        return [f"the clip's sound is left out, because --fps is not its own {own_rate}"]
    return []


def keeps_its_rate(options, clip):
    return options["fps"] in (None, written_rate(clip.fps))


def find_sound(options, clip, begun):
    """Where the clip's sound begins and ends, in seconds; None if it is not carried over."""
    if begun is not None:
        return begun.sound
    if clip is None or not clip.has_sound or options.fps != written_rate(clip.fps):
        return None
    return (str(clip.times[0]), str(clip.end))


def check_same_clip(known, begun):
    """Raise UserError unless a resumed run's clip is the file that it began with, or in its
    state."""
    file = Path(known["base_video"])
    in_state = (Path(known["output"]) / "state" / "clip.safetensors").is_file()
    if file.is_file():
        if begun.fingerprints.get("clip") != hub.fingerprint_of_file(file):
            raise UserError(
                f"--resume {known['output']}: its clip {file} is not the one it began with; put "
                "that back, or begin anew"
            )
    elif not in_state:
        raise UserError(
            f"--resume {known['output']}: its clip {file} is gone; put it back, or begin anew"
        )


# --------------------------------------------------------------------------------------------------
# Sizes


def resolve_size(known, base_size, preset):
    """The model's native size and the size of the refined video, from --size or --scale."""
    native = (preset.height, preset.width)
    if known["size"] is not None:
        target = parse_size(known["size"])
    else:
        target = size_from_scale(known["scale"], base_size, native)
    return turn(native, target), target


def size_from_scale(scale, base_size, native):
    """The size with the base clip's proportions and `scale` times the native area, sides even, and
    never less than native."""
    rows, columns = base_size
    side = scale * math.sqrt(native[0] * native[1])  # of a square of that area
    height = side * math.sqrt(rows / columns)
    width = side * math.sqrt(columns / rows)
    least_height, least_width = turn(native, (height, width))
    enlarge = max(1, least_height / height, least_width / width)
    return 2 * round(enlarge * height / 2), 2 * round(enlarge * width / 2)


def turn(native, target):
    """The native size, portrait if the target is."""
    short, long = sorted(native)
    height, width = target
    return (long, short) if height > width else (short, long)


def round_up(target, multiple):
    """The smallest multiples that cover the target."""
    height, width = target
    rows = (height + multiple - 1) // multiple
    columns = (width + multiple - 1) // multiple
    return rows * multiple, columns * multiple


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
    """Raise UserError if a clip is too large or too small to be refined to the target."""
    rows, columns = base_size
    height, width = target
    used_rows, used_columns = media.crop_size(base_size, target)
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


def check_sides(target, base_size):
    """Raise UserError if a video is larger than its encoder takes."""
    height, width = target
    if max(height, width, *base_size) > media.LONGEST_SIDE:
        raise UserError(
            f"--size {width}x{height}: H.264 videos have sides of at most {media.LONGEST_SIDE}; "
            "choose a smaller one"
        )


# --------------------------------------------------------------------------------------------------
# LoRAs and fingerprints


def find_loras(options):
    """The files that --lora and --lora-2 name, {part of the model: [Lora]}."""
    return {
        "transformer": [lora.find("--lora", written) for written in options.lora],
        "transformer_2": [lora.find("--lora-2", written) for written in options.lora_2],
    }


def find_fingerprints(options, loras, begun):
    """Short hashes of all that the run depends on but its weights, {name: hash}. Raises UserError
    if a resumed run began with another LoRA."""
    fingerprints = {}
    for name in recorded_names():
        fingerprints[name] = fingerprint(getattr(options, name))
    for found in [*loras["transformer"], *loras["transformer_2"]]:
        name = f"lora {found.name}"
        fingerprints[name] = found.fingerprint()
        if begun is not None and begun.fingerprints.get(name) != fingerprints[name]:
            raise UserError(
                f"--resume {options.output}: its {name} is not what it began with; put that back, "
                "or begin anew"
            )
    if begun is not None and "clip" in begun.fingerprints:
        fingerprints["clip"] = begun.fingerprints["clip"]
    elif options.base_video is not None:
        fingerprints["clip"] = hub.fingerprint_of_file(Path(options.base_video))
    return fingerprints
