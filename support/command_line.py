"""What the command needs before PyTorch is imported, which takes seconds: options, Ctrl-C, and
output that nobody may be reading."""

import argparse
import os
import re
import signal
import sys
from fractions import Fraction

from support import UserError


def fail(message, status=2):
    """Print an error in one line, in the first process only, and exit."""
    if rank() == 0:
        print(f"sample.py: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


# --------------------------------------------------------------------------------------------------
# Processes. torchrun starts several, and numbers them in the environment


def is_launched():
    return "RANK" in os.environ


def rank():
    """The number of this process, of all hosts."""
    return int(os.environ.get("RANK", 0))


def local_rank():
    """Its number on this host."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size():
    """How many processes there are, on all hosts."""
    return int(os.environ.get("WORLD_SIZE", 1))


# --------------------------------------------------------------------------------------------------
# Signals and streams


def handle_signals(hint="nothing had been computed yet"):
    """From now on Ctrl-C and SIGTERM end the command with one line and this hint."""

    def stop(number, frame):
        if rank() == 0:
            print(f"\nsample.py: stopped; {hint}", file=sys.stderr)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


class PatientStream:
    """An output stream that never ends a run. What it cannot encode is escaped; when its reader has
    gone away, it goes on into nothing."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            return self.discard(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.discard("")

    def discard(self, text):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.stream.fileno())  # at exit, Python flushes this descriptor too
        os.close(nothing)
        return len(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def protect_streams():
    """Make standard output and standard error patient, also where they are closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed: the descriptor must not be given to another file
            stream = open(os.devnull, "w", encoding="utf-8")
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, PatientStream(stream))


def set_allocator():
    """Let the segments of PyTorch's GPU memory grow, so that less of it is lost between tensors:
    81 frames of 3840x2160 fit into 24 GB only then. To be called before PyTorch is imported; what
    the user has set stays."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second one is older
    is_set = any(name in os.environ for name in names)
    if sys.platform == "linux" and not is_set:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


# --------------------------------------------------------------------------------------------------
# Options

RANGES = {  # lowest and highest value
    "frames": (1, 10**6),
    "steps": (1, 1000),
    "seed": (0, 2**63 - 1),
    "strength": (1e-3, 1),
    "guidance": (1e-3, 1000),
    "guidance_2": (1e-3, 1000),
    "flow_shift": (1e-3, 1000),
    "base_shift": (1e-3, 1000),
    "cache_interval": (1, 1000),
    "scale": (1, 100),
    "start": (0, 10**6),
}


MEANINGS = {"scale": ", the model's own size (192x128 with the bundled one),"}  # of the lowest


def parse_arguments(description, arguments=None):
    """The options that were typed, {name: value}; all others are left to the settings. Exits with
    one line if a value cannot be, whatever the model."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = fail
    what_to_make = parser.add_argument_group("what to make")
    add_what_to_make(what_to_make)
    add_loras(what_to_make)
    add_own_clip(parser.add_argument_group("your own clip"))
    add_quality(parser.add_argument_group("quality and speed"))
    add_where(parser.add_argument_group("where it runs"))
    add_run(parser.add_argument_group("the run"))
    options = vars(parser.parse_args(arguments))
    try:
        check_options(options)
    except ValueError as error:
        fail(str(error))
    return options


def check_options(options):
    """Raise UserError, naming the option and the fix, for a value that cannot be."""
    for name, value in options.items():
        option = option_name(name)
        if value in ("", [""]) and name != "negative_prompt":
            raise UserError(f"{option} is empty: give it a value, or leave it out")
        if name in RANGES and value is not None:
            low, high = RANGES[name]
            meaning = MEANINGS.get(name, "")
            if not low <= value <= high:
                raise UserError(f"{option} {value}: must be from {low}{meaning} to {high}")
    frames = options.get("frames", 1)
    if frames % 4 != 1:
        nearest = frames // 4 * 4 + 1
        raise UserError(f"--frames {frames}: Wan takes 4k + 1 frames, such as {nearest}")
    if "size" in options:
        parse_size(options["size"])
    if "fps" in options:
        parse_rate(options["fps"])
    device = options.get("device", "cpu")
    if not re.fullmatch(r"cpu|cuda|cuda:\d{1,4}", device):
        raise UserError(f"--device {device}: choose cpu, cuda or cuda:N")
    if "resume" not in options and "base_video" in options and "prompt" not in options:
        raise UserError(
            "--base-video needs --prompt: say what the clip shows, because the refinement draws "
            "its details from that"
        )
    if "start" in options and "base_video" not in options and "resume" not in options:
        raise UserError(f"--start {options['start']}: needs --base-video, in which to begin")


def option_name(name):
    return "--" + name.replace("_", "-")


def parse_size(text):
    """ "1920x1080" as (height, width)."""
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text.lower())
    if match is None:
        raise UserError(f"--size {text}: write it like 384x256 or 1920x1080")
    width, height = match.groups()
    return int(height), int(width)


def parse_rate(text):
    """Frames per second, "24", "23.976" or "24000/1001", as a fraction."""
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--fps {text}: write it like 24, 23.976 or 24000/1001") from None
    if not Fraction(1, 1000) <= rate <= 1000:
        raise UserError(f"--fps {text}: must be from 0.001 to 1000")
    return rate


def add_what_to_make(group):
    add = group.add_argument
    add(
        "--model",
        metavar="FOLDER_OR_HUB_ID",
        help="a model in Diffusers layout (default: the bundled one)",
    )
    add("--prompt", metavar="TEXT", help="what to show (default: an example)")
    add(
        "--negative-prompt",
        metavar="TEXT",
        help="what not to show (default: what Wan's authors advise; none for the bundled model)",
    )
    shape = group.add_mutually_exclusive_group()
    shape.add_argument(
        "--size",
        metavar="WIDTHxHEIGHT",
        help="of the refined video, in pixels: even, and at least the model's own size",
    )
    shape.add_argument(
        "--scale",
        type=float,
        metavar="FACTOR",
        help="refined size over the model's own, when --size is not given (default: 2)",
    )
    add(
        "--frames",
        type=int,
        metavar="N",
        help="4k + 1 (default: 17 with the bundled model, 81 with Wan)",
    )
    add(
        "--fps",
        metavar="RATE",
        help="frames per second, such as 24 or 24000/1001 (default: 16, or the clip's own)",
    )
    add("--seed", type=int, metavar="N", help="of the noise (default: 0)")


def add_loras(group):
    add = group.add_argument
    add(
        "--lora",
        action="append",
        metavar="FILE[:WEIGHT]",
        help="merge a LoRA into the transformer, also FILE of the hub as owner/name/file; may be "
        "given several times (default weight: 1)",
    )
    add(
        "--lora-2",
        action="append",
        metavar="FILE[:WEIGHT]",
        help="the same for Wan2.2's second expert",
    )


def add_own_clip(group):
    add = group.add_argument
    add(
        "--base-video",
        metavar="FILE",
        help="refine this video or picture instead of generating one; needs --prompt",
    )
    add(
        "--start",
        type=float,
        metavar="SECONDS",
        help="where in the video to begin (default: 0)",
    )


def add_quality(group):
    add = group.add_argument
    add(
        "--steps",
        type=int,
        metavar="N",
        help="of the whole noise schedule (default: 30 with the bundled model, 50 with Wan2.1, 40 "
        "with Wan2.2)",
    )
    add(
        "--strength",
        type=float,
        metavar="SHARE",
        help="share of the steps that the refinement runs, up to 1 (default: 0.7)",
    )
    add(
        "--guidance",
        type=float,
        metavar="SCALE",
        help="of the classifier-free guidance; 1 skips the negative prompt (default: 2 with the "
        "bundled model, 5 with Wan2.1, 4 with Wan2.2)",
    )
    add(
        "--guidance-2",
        type=float,
        metavar="SCALE",
        help="the same for Wan2.2's second expert (default: 3, or --guidance if that is given)",
    )
    add(
        "--flow-shift",
        type=float,
        metavar="SHIFT",
        help="of the refinement's noise schedule (default: 1 with the bundled model, 9 with Wan)",
    )
    add(
        "--base-shift",
        type=float,
        metavar="SHIFT",
        help="of the base clip's noise schedule (default: 3; 5 with Wan2.1 14B, 12 with Wan2.2)",
    )
    cache = group.add_mutually_exclusive_group()
    cache.add_argument(
        "--cache-interval",
        type=int,
        metavar="K",
        help="run the full path every K steps (default: 5)",
    )
    cache.add_argument(
        "--no-cache",
        dest="cache_interval",
        action="store_const",
        const=None,
        help="run it at every step, and for the negative prompt too",
    )
    add(
        "--compare",
        action="store_true",
        help="also full attention, and windows without override, in comparison.png",
    )


def add_where(group):
    add = group.add_argument
    add(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the transformer and text encoder (default: bfloat16 on a GPU, else float32)",
    )
    add(
        "--vae-dtype",
        choices=("float32", "float16"),
        help="of the VAE (default: float16 on a GPU, else float32)",
    )
    add(
        "--features",
        choices=("gpu", "cpu"),
        help="where the cross-attention cache is kept (default: on the GPU if it fits)",
    )
    add(
        "--offload",
        action=argparse.BooleanOptionalAction,
        help="stream the transformer's weights from CPU memory (default: if they do not fit)",
    )
    add(
        "--shard-weights",
        action="store_true",
        help="under torchrun: spread the transformer's weights over the GPUs",
    )


def add_run(group):
    add = group.add_argument
    add(
        "--output",
        metavar="FOLDER",
        help="where everything is written (default: output)",
    )
    add("--overwrite", action="store_true", help="even if the folder holds another run")
    add(
        "--resume",
        metavar="FOLDER",
        help="go on with the run in this output folder, with its settings",
    )
