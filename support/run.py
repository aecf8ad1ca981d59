"""A run and its folder: whatever was computed is there, so that nothing is computed twice.

Every file is written under another name, flushed to the disk and renamed: under its own name there
is only ever a whole one. Under torchrun every process has a Run. The first one writes, and all of
them get what it has read.
"""

import json
import os
import platform
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import model
from support import RunError, UserError, parallel

try:
    import fcntl
    import resource
except ImportError:  # Windows: no lock, no peak memory
    fcntl = None
    resource = None


@dataclass
class RunRecord:
    """What run.json holds."""

    settings: dict  # {option: value}
    computed: str  # WIDTHxHEIGHT in pixels, of which the middle is written
    fingerprints: dict  # {option: a few letters}; also of "weights" and of the "clip"
    stages: dict  # {name: {"seconds", "peak_memory_gib"}}
    files: list  # what the run writes
    sound: list | None = None  # where the clip's sound begins and ends, in seconds
    versions: dict = field(default_factory=dict)
    device: str = ""
    latents_sha256: str = ""  # of the refined latents

    def to_json(self):
        return json.dumps(asdict(self), indent=1)


def read_record(folder):
    """The RunRecord of a folder, with every field that a run needs. Raises UserError if there is
    none."""
    try:
        content = model.read_json(Path(folder) / "run.json")
        record = RunRecord(
            settings=content["settings"],
            computed=content["computed"],
            fingerprints=content["fingerprints"],
            stages=content["stages"],
            files=content["files"],
            sound=content.get("sound"),
        )
        check_types(record)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: no run is there; its run.json is missing or broken ({error!s:.200}); "
            "begin anew"
        ) from None
    return record


def check_types(record):
    for name in ("settings", "fingerprints", "stages"):
        if not isinstance(getattr(record, name), dict):
            raise TypeError(f"{name} is not an object")
    if not isinstance(record.files, list):
        raise TypeError("files is not a list")
    for name, stage in record.stages.items():
        if not isinstance(stage["seconds"], (int, float)):
            raise TypeError(f"the seconds of {name} are not a number")


# --------------------------------------------------------------------------------------------------
# The output folder


def check_output(plan):
    """Raise UserError if something in the output folder would be lost: another run, a file that no
    run wrote, or the clip itself. Returns the files there that a run wrote."""
    output = plan.output
    parent = nearest_existing(output)
    if not parent.is_dir():
        kind = "no folder" if parent.exists() else "a link to nothing"
        raise UserError(f"--output {output}: {parent} is {kind}; choose another folder")
    if not os.access(parent, os.W_OK):
        raise UserError(f"--output {output}: {parent} is read-only; choose another folder")

    written = []
    if (output / "run.json").exists():
        written = read_record(output).files
    for name in plan.record.files:
        file = output / name
        if plan.base_video is not None and is_same_file(plan.base_video, file):
            raise UserError(
                f"--base-video {plan.base_video}: would be overwritten; choose another --output"
            )
        if os.path.lexists(file) and name not in written:
            raise UserError(
                f"--output {output}: {name} is there, which no run wrote; move it, or choose "
                "another folder"
            )
    is_new = not plan.resumes
    if written and is_new and not plan.overwrite:
        raise UserError(
            f"--output {output}: holds a run already; go on with --resume {output}, or say "
            "--overwrite"
        )
    if is_new:
        check_space(plan, parent)
    return written


def nearest_existing(path):
    """The path itself, or the nearest folder above it that exists. A link to nothing does."""
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def is_same_file(file, other):
    return os.path.exists(file) and os.path.exists(other) and os.path.samefile(file, other)


def check_space(plan, folder):
    """Raise UserError unless the disk has room for all that will be written: the state (latents of
    the refinement six times over: start, history, and one that is being written; the base clip) and
    the videos, at most 2 bytes a pixel."""
    height, width = plan.computed
    native_height, native_width = plan.native
    latent_frames = plan.frames // 4 + 1
    latents = 4 * 16 * latent_frames * (height // 8) * (width // 8)  # bytes
    variants = 4 if plan.compare else 1
    pixels = plan.frames * (native_height * native_width + height * width)
    needed = 6 * latents * variants + 3 * pixels
    free = shutil.disk_usage(folder).free
    if needed > free:
        unit, name = (2**30, "GiB") if needed > 2**30 else (2**20, "MiB")
        raise UserError(
            f"--output {plan.output}: about {needed / unit:.1f} {name} will be written, but "
            f"{free / unit:.1f} are free; choose another disk, or a smaller --size"
        )


def lock(folder):
    """Keep other runs out of a folder for as long as this process lives, or the descriptor that is
    returned is open."""
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"--output {folder}: another run is writing there; choose another folder"
        ) from None
    return descriptor


# --------------------------------------------------------------------------------------------------
# The run


class Run:
    """A run of a `plan` on a `device`. Nothing is written before `begin`."""

    def __init__(self, plan, device):
        self.plan = plan
        self.device = device
        self.output = plan.output
        self.state = plan.output / "state"
        self.lock = None  # a descriptor of the folder, in the process that writes
        self.relief = "free some, or begin with a lower --size or --frames"  # if memory is full
        self.record = plan.record
        self.record.device = device_name(device)
        self.record.versions = {"python": platform.python_version(), "torch": torch.__version__}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def begin(self):
        """Make the folder and its run.json, and keep other runs out from now on."""
        if not parallel.is_first():
            return
        self.output.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.output)
        written = check_output(self.plan)  # once more, now that nobody else can write there
        for folder in (self.output, self.state):
            for file in [*folder.glob("part-*"), *folder.glob(".tmp*")]:  # left by a kill
                file.unlink(missing_ok=True)
        if self.plan.overwrite:
            for name in written:
                if name != "state":
                    (self.output / name).unlink(missing_ok=True)
            for file in self.state.glob("*.safetensors"):
                file.unlink(missing_ok=True)
        self.write_record()
        self.state.mkdir(exist_ok=True)

    def write(self, name, writer):
        """Let `writer(file)` write the file `name` of the folder. Raises RunError, with the way on,
        if it cannot."""
        if not parallel.is_first():
            return
        file = self.output / name
        part = file.with_name("part-" + file.name)
        try:
            part.touch()
            mode = part.stat().st_mode
            writer(part)
            part.chmod(mode)  # safetensors gives its files another
            with open(part, "rb+") as written:
                os.fsync(written.fileno())
            part.replace(file)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{file} cannot be written ({error!s:.200}); {self.resume_hint()}"
            ) from None
        finally:
            part.unlink(missing_ok=True)

    def write_record(self):
        text = self.record.to_json()
        self.write("run.json", lambda file: file.write_text(text, encoding="utf-8"))

    def save(self, name, tensors):
        """Keep a dict of tensors."""
        on_cpu = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        self.write(f"state/{name}.safetensors", partial(save_file, on_cpu))

    def load(self, name, *keys):
        """The dict of tensors that was saved under `name`, or None. Raises UserError unless it has
        the `keys`."""
        file = self.state / f"{name}.safetensors"
        try:
            tensors = parallel.from_first(lambda: load_file(file) if file.is_file() else None)
            if tensors is None:
                return None
            missing = [key for key in keys if key not in tensors]
            if missing:
                raise KeyError(missing[0])
        except (SafetensorError, KeyError, OSError) as error:
            raise UserError(
                f"{file} is damaged ({error!s:.99}); delete it, and it is computed again"
            ) from None
        return {key: tensor.to(self.device) for key, tensor in tensors.items()}

    def load_or_compute(self, name, compute, key="latents"):
        """The tensor saved under `name`. If there is none, `compute(progress)` gives it, with a bar
        for its loop."""
        tensors = self.load(name, key)
        if tensors is None:
            with self.stage(name) as progress:
                tensors = {key: compute(progress)}
            self.save(name, tensors)
        if parallel.is_first():
            (self.state / f"{name}-progress.safetensors").unlink(missing_ok=True)
        return tensors[key].to(self.device)

    @contextmanager
    def stage(self, name):
        """Note a stage's seconds, of all tries, and its peak memory. Yields a progress bar."""
        start = time.time()
        reset_peak_memory(self.device)
        try:
            yield partial(tqdm, desc=name, disable=not parallel.is_first())
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # or what is queued counts for the next stage
        except RunError:  # a file cannot be written
            raise
        except (MemoryError, RuntimeError) as error:
            raise explained(error, name, self.relief, self.resume_hint()) from None
        finally:
            before = self.record.stages.get(name, {"seconds": 0})
            seconds = before["seconds"] + time.time() - start
            self.record.stages[name] = {
                "seconds": round(seconds, 2),
                "peak_memory_gib": round(peak_memory(self.device) / 2**30, 3),
            }
            if self.lock is not None:
                self.write_record()

    def resume_hint(self):
        if not (self.output / "run.json").is_file():
            return "nothing had been computed yet"
        return f"--resume {self.output} goes on from the last saved step"


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or "cpu"


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device):
    """Bytes, of the GPU in this stage or of the process so far; 0 where the system cannot tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def explained(error, stage, relief, hint):
    """What to raise for an error of PyTorch, which has one exception for much: a RunError with the
    stage and the way on, or the error itself, if it is a bug."""
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if out_of_memory or "t allocate memory" in str(error):
        return RunError(f'out of memory in the stage "{stage}": {relief}; {hint}')
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return RunError(f'another process ended in the stage "{stage}"; {hint}')
    return error
