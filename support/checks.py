"""What is checked before anything is loaded, fetched or written, so that no work is lost, nor
anything that was there.

Each of these raises ValueError in one line that names the value and the mend.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download

from model import clean_prompt, read_json
from support import media

try:
    import fcntl
    import resource
except ImportError:  # Windows: no lock, no peak memory
    fcntl = resource = None


REVISIONS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "0fad780a534b6463e45facd96134c9f345acfa5b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "38ec498cb3208fb688890f8cc7e94ede2cbd7f68",
}


def download(name, weights=True):
    """The folder of a model: `name` itself if it is one, else the hub's snapshot of that id,
    fetched if needed. Without `weights`, only descriptions and the tokenizer: a few MB that tell
    whether the rest is worth fetching."""
    if Path(name).is_dir():
        return Path(name)
    wanted = ["model_index.json", "scheduler/*.json", "tokenizer/tokenizer.json"]
    for part in ("transformer", "vae", "text_encoder"):
        wanted += [f"{part}/*.json", f"{part}/*.safetensors"][: 1 + weights]
    try:
        return Path(snapshot_download(name, revision=REVISIONS.get(name), allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {name}: cannot be fetched from the hub ({error!r:.200}); check the id, or give a "
            "folder"
        ) from None


RANGES = {
    "frames": (1, 10**6),
    "steps": (1, 1000),
    "seed": (0, 2**63 - 1),
    "strength": (1e-3, 1),
    "guidance": (1e-3, 1000),
    "flow_shift": (1e-3, 1000),
    "cache_interval": (1, 1000),
    "fps": (1e-3, 1000),
}


def check_values(args):
    """Refuse what cannot be, or would end at once."""
    if args.shard_weights and "RANK" not in os.environ:
        raise ValueError(
            "--shard-weights: needs several processes; start them with torchrun --nproc-per-node N …"
        )
    if args.offload and ("RANK" in os.environ or args.device == "cpu"):
        raise ValueError(
            "--offload: is for one process and a GPU; spread weights over several with --shard-weights"
        )
    for name, (low, high) in RANGES.items():
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: must be from {low} to {high}"
            )
    if args.frames % 4 != 1:
        raise ValueError(
            f"--frames {args.frames}: Wan takes 4k + 1 frames, such as {args.frames // 4 * 4 + 1}"
        )
    if int(args.steps * args.strength) < 1:
        raise ValueError(
            f"--strength {args.strength} of --steps {args.steps}: at least one step must run"
        )


def plan_size(args, shape, total):
    """Settle the size of the refined video, `args.target`, what is computed for it,
    `args.computed`, and the model's native size, each (height, width) in pixels. `shape` is that of
    the base clip, of whose frames there are `total`.

    Any even size from native on is taken: multiples of 16 are computed, and the middle is kept.
    Without --size it has the clip's proportions and --scale times the native area. Whatever is
    higher than wide turns the native size."""
    preset, (rows, columns) = args.preset, shape
    if args.size:
        try:
            width, height = map(int, args.size.lower().split("x"))
        except ValueError:
            raise ValueError(
                f"--size {args.size}: write it like {2 * preset.width}x{2 * preset.height}"
            ) from None
    elif 1 <= args.scale <= 100:
        side = args.scale * math.sqrt(preset.height * preset.width)  # of a square
        width, height = (
            2 * round(side * math.sqrt(part) / 2) for part in (columns / rows, rows / columns)
        )
    else:
        raise ValueError(
            f"--scale {args.scale}: must be from 1, which is {preset.width}x{preset.height}, to 100"
        )
    args.native = low, narrow = sorted((preset.height, preset.width), reverse=height > width)
    nearest = max(narrow, 2 * round(width / 2)), max(low, 2 * round(height / 2))
    if args.size and not args.begun and (width, height) != nearest:
        raise ValueError(
            f"--size {args.size}: sides are even, and from {narrow}x{low} on; the nearest is --size "
            f"{nearest[0]}x{nearest[1]}"
        )
    args.size, args.target = f"{width}x{height}", (height, width)
    args.computed = tuple(-(-side // 16) * 16 for side in args.target)
    if height > width and not preset.tall:
        args.notes.append("this model has never seen frames higher than wide")
    if not 0.5 <= width / height * low / narrow <= 2 or max(width / narrow, height / low) > 5:
        args.notes.append(
            f"{args.size} is far from {narrow}x{low}, and from anything that this model has seen"
        )
    new_rows, new_columns = media.cropped((rows, columns), args.target)
    if args.base_video and not args.begun:
        mend = f"--base-video {args.base_video}: is {columns}x{rows}, "
        if new_rows > height or new_columns > width:
            raise ValueError(
                f"{mend}larger than the {args.size} to be made of it; give a larger --size or --scale"
            )
        if 4 * rows * columns < low * narrow:
            raise ValueError(f"{mend}far below the model's {narrow}x{low}; use a larger one")
        if total > args.frames:
            args.notes.append(
                f"of the clip's {total} frames, the last {total - args.frames} are left out"
            )
    if new_rows * new_columns < 0.99 * rows * columns:  # else it is for rounding
        args.notes.append(
            f"the base clip, {columns}x{rows}, is cropped in the middle to {new_columns}x{new_rows}"
        )


def notes_on_prompt(args):
    """Lines about the words that the model has never seen, and those that it does not read any
    more."""
    prompt = clean_prompt(args.prompt)
    encoding = args.tokenizer.encode(prompt)
    unknown = [
        prompt[slice(*span)]
        for token, span in zip(encoding.tokens, encoding.offsets, strict=True)
        if token == "<unk>"
    ]
    cut = prompt[max(end for _, end in encoding.offsets) :].strip() if encoding.overflowing else ""
    return [f"this model has never seen the words: {', '.join(unknown)}"] * bool(unknown) + [
        f"the prompt is too long, {args.preset.text_length} tokens are read; cut off is: {cut}"
    ] * bool(cut)


def read_record(output):
    """What the run.json in a folder holds, with every field that a run needs."""
    try:
        record = read_json(Path(output) / "run.json")
        kinds = {"settings": dict, "fingerprints": dict, "stages": dict, "files": list}
        if any(type(record[name]) is not kind for name, kind in kinds.items()):
            raise TypeError("a field is of another type")
        for stage in record["stages"].values():
            stage["seconds"] + 0.0
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{output}: no run is there; its run.json is missing or broken ({error!s:.200}); begin anew"
        ) from None


def check_unchanged(args, settings):
    """Refuse to resume with settings that are not those the run began with."""
    for name, value in settings.items():
        if args.begun and args.begun["fingerprints"].get(name) != fingerprint(value):
            raise ValueError(
                f"--resume {args.output}: its {name} is not what it began with ({value}); mend run.json, "
                "or begin anew"
            )


def check_folder(args, files):
    """Refuse a folder where something would be lost: another run, a file that no run wrote, or the
    clip itself. Returns the files there that a run wrote."""
    output = Path(args.output)
    there = next(
        parent
        for parent in (output.absolute(), *output.absolute().parents)
        if os.path.lexists(parent)
    )
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = (
            "a link to nothing"
            if not there.exists()
            else "no folder"
            if not there.is_dir()
            else "read-only"
        )
        raise ValueError(f"--output {output}: {there} is {what}; choose another folder")
    written = read_record(output)["files"] if (output / "run.json").exists() else []
    for name in files:
        if (
            args.clip is not None
            and (output / name).exists()
            and os.path.samefile(args.base_video, output / name)
        ):
            raise ValueError(
                f"--base-video {args.base_video}: would be overwritten; choose another --output"
            )
        if os.path.lexists(output / name) and name not in written:
            raise ValueError(
                f"--output {output}: {name} is there, which no run wrote; move it, or take another"
            )
    if written and not (args.begun or args.overwrite):
        raise ValueError(
            f"--output {output}: holds a run already; go on with --resume {output}, or say --overwrite"
        )
    # The state: latents of the refinement six times over (start, history, and one that is being
    # written), the base clip; then the videos, at most 2 bytes per pixel.
    (height, width), (low, narrow) = args.computed, args.native
    latents = 16 * (args.frames // 4 + 1) * (height // 8) * (width // 8) * 4
    needed = 6 * latents * (4 if args.compare else 1) + 3 * args.frames * (
        low * narrow + height * width
    )
    free = shutil.disk_usage(there).free
    if needed > free and not args.begun:
        unit, name = (2**30, "GiB") if needed > 2**30 else (2**20, "MiB")
        raise ValueError(
            f"--output {output}: about {needed / unit:.1f} {name} will be written, but {free / unit:.1f} "
            "are free; choose another disk, or a smaller --size"
        )
    return written


def fingerprint(value):
    """A few letters that tell one setting from another; of a folder, its weights, by the sizes,
    headers and middles of the safetensors files."""
    files = [] if not isinstance(value, Path) else sorted(value.rglob("*.safetensors"))
    parts = [json.dumps(value).encode()] if not isinstance(value, Path) else []
    for file in files:
        with open(file, "rb") as opened:
            size, length = file.stat().st_size, int.from_bytes(opened.read(8), "little")
            parts += [f"{file.relative_to(value)} {size}".encode(), opened.read(min(length, size))]
            opened.seek(size // 2)
            parts.append(opened.read(2**16))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def claim(folder):
    """Keep other runs out of a folder, for as long as this process lives or the descriptor returned
    is open."""
    if not fcntl:
        return os.open(os.devnull, os.O_RDONLY)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"--output {folder}: another run is writing there; choose another folder"
        ) from None
    return descriptor


def peak_memory():
    """Of this process so far, in bytes; 0 where the system does not tell."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else 0


def explained(error, stage, hint):
    """What to raise for an error of PyTorch's, which has one exception for much: with the stage and
    the way on."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "t allocate memory" in str(
        error
    ):
        return MemoryError(
            f'out of memory in the stage "{stage}": free some, or begin with a lower --size or '
            f"--frames; {hint}"
        )
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return ConnectionError(f'another process ended in the stage "{stage}"; {hint}')
    return error
