"""The command's options: one table. The parser, the help, the defaults, the check of values, what
run.json records and what may change with --resume all follow from it. Nothing here needs PyTorch,
whose import takes seconds.

A new option is one row here and one use, where the plan or a stage reads it.
"""

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from support import UserError
from support.presets import defaults_of

# --------------------------------------------------------------------------------------------------
# Types: from the text that was typed to the value that run.json records. They raise
# ArgumentTypeError, with a message that begins with the text


class Refused(argparse.ArgumentTypeError):
    """A value that an option does not take."""


def text(typed):
    """A prompt as Unicode, whatever the encoding that Python took the command line for."""
    try:
        return os.fsencode(typed).decode("utf-8")
    except UnicodeError:
        return typed


def filled(typed):
    if typed == "":
        raise Refused("is empty: give it a value, or leave it out")
    return typed


def path(typed):
    """A file or folder, `~` expanded. What no file system takes is refused here, because every
    question about such a path would raise OSError."""
    name = os.path.expanduser(filled(typed))
    encoded = os.fsencode(name)
    parts = encoded.split(b"/")
    if len(encoded) > LONGEST_PATH or max(len(part) for part in parts) > LONGEST_NAME:
        raise Refused(f"{shorten(typed)}: the name is too long; use a shorter one")
    return name


LONGEST_PATH = 3800  # bytes; Linux takes 4095, and names are added for what is in a folder
LONGEST_NAME = 255  # bytes


def folder(typed):
    name = path(typed)
    try:
        os.fsencode(name).decode("utf-8")
    except UnicodeDecodeError:  # safetensors could not open files in it
        raise Refused(f"{typed}: the name is not UTF-8; rename the folder") from None
    return name


def shorten(typed):
    return typed if len(typed) <= 100 else typed[:100] + "…"


def whole(low, high):
    """The type of whole numbers from `low` to `high`."""
    return number(int, low, high)


def real(low, high, meaning=""):
    """The type of numbers from `low`, which may have a `meaning`, to `high`."""
    return number(float, low, high, meaning)


def number(kind, low, high, meaning=""):
    def parse(typed):
        try:
            value = kind(filled(typed))
        except ValueError:
            wanted = "whole number" if kind is int else "number"
            raise Refused(f"{shorten(typed)}: must be a {wanted}") from None
        if not low <= value <= high:
            raise Refused(f"{value}: must be from {low}{meaning} to {high}")
        return value

    return parse


def frame_count(typed):
    frames = whole(1, 10**6)(typed)
    if frames % 4 != 1:
        nearest = frames // 4 * 4 + 1
        raise Refused(f"{frames}: Wan takes 4k + 1 frames, such as {nearest}")
    return frames


def size(typed):
    """ "1920x1080", also written 1920*1080 or 1920×1080, as "1920x1080"."""
    match = re.fullmatch(r"(\d{1,6})[x*×](\d{1,6})", filled(typed).lower())
    if match is None:
        raise Refused(f"{shorten(typed)}: write it like 384x256 or 1920x1080")
    width, height = match.groups()
    return f"{int(width)}x{int(height)}"


def parse_size(written):
    """ "1920x1080" as (height, width)."""
    width, height = written.split("x")
    return int(height), int(width)


def frame_rate(typed):
    """ "24", "23.976" or "24000/1001" as 24, "2997/125" or "24000/1001"."""
    match = re.fullmatch(r"\d{1,9}/0*[1-9]\d{0,8}|\d{1,9}(\.\d{0,20})?", filled(str(typed)))
    if match is None:
        raise Refused(f"{shorten(typed)}: write it like 24, 23.976 or 24000/1001")
    rate = Fraction(typed)
    if not Fraction(1, 1000) <= rate <= 1000:
        raise Refused(f"{typed}: must be from 0.001 to 1000")
    return written_rate(rate)


def written_rate(fps):
    """A frame rate as run.json has it: 16 or "24000/1001". A video's clock has limits, so the
    nearest fraction with a small denominator is taken."""
    rate = Fraction(fps).limit_denominator(10**5)
    return rate.numerator if rate.denominator == 1 else str(rate)


def device(typed):
    if not re.fullmatch(r"cpu|cuda|cuda:\d{1,4}", filled(typed)):
        raise Refused(f"{shorten(typed)}: choose cpu, cuda or cuda:N")
    return typed


def one_of(*values):
    """The type of a few names."""

    def parse(typed):
        if typed not in values:
            raise Refused(f"{shorten(filled(typed))}: choose {' or '.join(values)}")
        return typed

    return parse


# --------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Option:
    name: str  # as in Python: --cache-interval is cache_interval
    help: str  # {presets} stands for the presets' values
    type: Callable = text
    metavar: str | None = None
    default: Any = None  # None is left to the preset, the clip or the machine
    kind: str = "value"  # or "list", which may be typed several times, "flag" or "yes or no"
    instead_of: str | None = None  # another option, with which it cannot be typed
    recorded: bool = True  # in run.json
    may_change: bool = False  # with --resume
    by_device: bool = False  # chosen anew if a run goes on on another kind of device


BUNDLED_MODEL = str(Path(__file__).resolve().parent.parent / "tiny")
GROUPS = {
    "what to make": (
        Option(
            "model",
            "a model in Diffusers layout; of the hub also as owner/name@revision (default: the "
            "bundled one)",
            folder,
            "FOLDER_OR_HUB_ID",
            default=BUNDLED_MODEL,
        ),
        Option("prompt", "what to show (default: an example)", text, "TEXT"),
        Option(
            "negative_prompt",
            "what not to show (default: what Wan's authors advise; none for the bundled model)",
            text,
            "TEXT",
        ),
        Option(
            "size",
            "of the refined video, in pixels: even, and at least the model's own size",
            size,
            "WIDTHxHEIGHT",
        ),
        Option(
            "scale",
            "refined size over the model's own, when --size is not given",
            real(1, 100, ", the model's own size (192x128 with the bundled one),"),
            "FACTOR",
            default=2.0,
            instead_of="size",
        ),
        Option("frames", "4k + 1 (default: {presets})", frame_count, "N"),
        Option(
            "fps",
            "frames per second, such as 24 or 24000/1001 (default: {presets}, or the clip's own)",
            frame_rate,
            "RATE",
        ),
        Option("seed", "of the noise", whole(0, 2**63 - 1), "N", default=0),
        Option(
            "lora",
            "merge a LoRA into the transformer: a file, a folder of PEFT, or a file of the hub as "
            "owner/name/file (default weight: 1)",
            path,
            "FILE[:WEIGHT]",
            default=(),
            kind="list",
        ),
        Option(
            "lora_2",
            "the same for Wan2.2's second expert",
            path,
            "FILE[:WEIGHT]",
            default=(),
            kind="list",
        ),
    ),
    "your own clip": (
        Option(
            "base_video",
            "refine this video or picture instead of generating one; needs --prompt",
            path,
            "FILE",
        ),
        Option("start", "where in the video to begin", real(0, 10**6), "SECONDS", default=0.0),
    ),
    "quality and speed": (
        Option("steps", "of the whole noise schedule (default: {presets})", whole(1, 1000), "N"),
        Option(
            "strength",
            "share of the steps that the refinement runs, up to 1 (default: {presets})",
            real(1e-3, 1),
            "SHARE",
        ),
        Option(
            "guidance",
            "of the classifier-free guidance; 1 skips the negative prompt (default: {presets})",
            real(1e-3, 1000),
            "SCALE",
        ),
        Option(
            "guidance_2",
            "the same for Wan2.2's second expert (default: {presets}, or --guidance if typed)",
            real(1e-3, 1000),
            "SCALE",
        ),
        Option(
            "flow_shift",
            "of the refinement's noise schedule (default: {presets})",
            real(1e-3, 1000),
            "SHIFT",
        ),
        Option(
            "base_shift",
            "of the base clip's noise schedule (default: {presets})",
            real(1e-3, 1000),
            "SHIFT",
        ),
        Option("cache_interval", "run the full path every K steps", whole(1, 1000), "K", default=5),
        Option(
            "no_cache",
            "run it at every step, and for the negative prompt too",
            default=False,
            kind="flag",
            instead_of="cache_interval",
            recorded=False,
        ),
        Option(
            "compare",
            "also full attention, and windows without override, in comparison.png",
            default=False,
            kind="flag",
            may_change=True,
        ),
    ),
    "where it runs": (
        Option(
            "device",
            "cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)",
            device,
            "DEVICE",
            may_change=True,
        ),
        Option(
            "dtype",
            "of the transformer and text encoder: float32 or bfloat16 (default: bfloat16 on a "
            "GPU, else float32)",
            one_of("float32", "bfloat16"),
            "DTYPE",
            by_device=True,
        ),
        Option(
            "vae_dtype",
            "of the VAE: float32 or float16 (default: float16 on a GPU, else float32)",
            one_of("float32", "float16"),
            "DTYPE",
            by_device=True,
        ),
        Option(
            "cache_device",
            "where the cross-attention cache is kept: gpu or cpu (default: on the GPU if it fits)",
            one_of("gpu", "cpu"),
            "DEVICE",
            recorded=False,
            may_change=True,
        ),
        Option(
            "offload",
            "stream the transformer's weights from CPU memory (default: if they do not fit)",
            kind="yes or no",
            recorded=False,
            may_change=True,
        ),
        Option(
            "shard_weights",
            "under torchrun: spread the transformer's weights over the GPUs",
            default=False,
            kind="flag",
            recorded=False,
            may_change=True,
        ),
    ),
    "the run": (
        Option(
            "output",
            "where everything is written",
            folder,
            "FOLDER",
            default="output",
            recorded=False,
        ),
        Option(
            "overwrite",
            "even if the folder holds another run",
            default=False,
            kind="flag",
            recorded=False,
        ),
        Option(
            "resume",
            "go on with the run in this output folder, with its settings",
            folder,
            "FOLDER",
            recorded=False,
            may_change=True,
        ),
    ),
}
OPTIONS = {option.name: option for group in GROUPS.values() for option in group}
RENAMED = {"--features": "--cache-device"}  # old names


def flag(name):
    return "--" + name.replace("_", "-")


# --------------------------------------------------------------------------------------------------
# From the command line


def parse_arguments(description, arguments, fail):
    """The options that were typed, {name: value}. Calls `fail(message)`, which does not return, for
    what cannot be, whatever the model."""

    def refuse(message):
        fail(explain(message, arguments))

    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = refuse
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            add_argument(group, option)
    typed = vars(parser.parse_args(arguments))
    try:
        check_combinations(typed)
    except UserError as error:
        fail(str(error))
    if typed.pop("no_cache", False):
        typed["cache_interval"] = None
    return typed


def add_argument(group, option):
    words = option.help
    if "{presets}" in words:
        words = words.replace("{presets}", defaults_of(option.name))
    elif option.kind == "value" and option.default is not None and "default" not in words:
        default = str(option.default).removesuffix(".0")
        words += f" (default: {default})"
    if option.kind == "flag":
        group.add_argument(flag(option.name), action="store_true", help=words)
    elif option.kind == "yes or no":
        action = argparse.BooleanOptionalAction
        group.add_argument(flag(option.name), action=action, help=words)
    else:
        action = "append" if option.kind == "list" else "store"
        group.add_argument(
            flag(option.name), type=option.type, action=action, metavar=option.metavar, help=words
        )


def explain(message, arguments):
    """argparse's message, with the fix."""
    message = re.sub(r"^argument (--[\w-]+)(/--[\w-]+)?: ", r"\1 ", message)
    for old, new in RENAMED.items():
        if any(argument.split("=")[0] == old for argument in arguments):
            return f"{old} is now called {new}"
    for option, value in zip(arguments, arguments[1:], strict=False):
        if "expected one argument" in message and message.startswith(f"{option} "):
            return f"{message}; a value that begins with a dash is written {option}={value}"
    return message


def check_combinations(typed):
    """Raise UserError for options that cannot be typed together, or need another."""
    for name in typed:
        other = OPTIONS[name].instead_of
        if other in typed:
            raise UserError(f"{flag(name)}: not allowed with {flag(other)}; choose one of them")
    resumes = "resume" in typed
    if "base_video" in typed and "prompt" not in typed and not resumes:
        raise UserError(
            "--base-video needs --prompt: say what the clip shows, because the refinement draws "
            "its details from that"
        )
    if "start" in typed and "base_video" not in typed and not resumes:
        raise UserError(f"--start {typed['start']:g}: needs --base-video, in which to begin")


# --------------------------------------------------------------------------------------------------
# From and to run.json


def recorded_names():
    return [option.name for option in OPTIONS.values() if option.recorded]


def check_recorded(name, value):
    """The value of an option that run.json holds. Raises ValueError unless it is one that the
    option may have, and as it is recorded."""
    option = OPTIONS[name]
    if option.kind in ("flag", "yes or no"):
        if not isinstance(value, bool):
            raise ValueError(value)
    elif option.kind == "list":
        for item in value if isinstance(value, (list, tuple)) else [None]:
            check_text(option, item)
    elif value is not None:
        check_text(option, value)
    elif option.default is not None and name != "cache_interval":  # None: no cache
        raise ValueError(value)
    return value


def check_text(option, value):
    """Raise ValueError unless `value` is what the option's type makes of the same in words."""
    try:
        same = option.type(str(value)) == value
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None
    if not same or isinstance(value, bool):
        raise ValueError(value)


def check_may_change(typed, same_device):
    """Raise UserError for an option that cannot change what a resumed run goes on with.
    `same_device`: whether it goes on on the kind of device on which it began."""
    for name in typed:
        option = OPTIONS[name]
        allowed = option.may_change or (option.by_device and not same_device)
        if not allowed:
            raise UserError(
                f"{flag(name)} cannot change what --resume {typed['resume']} goes on with"
            )
