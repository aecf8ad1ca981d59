"""A run and its folder: whatever was computed is kept, and nothing is computed twice.

Every file is written in a temporary folder next to its place, flushed to the disk and renamed:
under its own name there is only ever a whole one. Nothing is ever deleted but what a run has
written. Of several processes every one has a Run; the first one writes, and all of them get what it
has read.
"""

import json
import os
import platform
import re
import secrets
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import freeswim
import model
from support import RunError, UserError, processes
from support.options import recorded_names

try:
    import fcntl
    import resource
except ImportError:  # Windows: no lock, no peak memory
    fcntl = None
    resource = None

VARIANTS = ("refine", "full attention", "clipped window", "inward window")  # with --compare, all
FILES = ("run.json", "base.mp4", "freeswim.mp4", "comparison.png", "state")
PICTURE = "freeswim.png"  # too, if there is one frame
STATES = ("text", "clip", "base", "encode")  # and of each variant: NAME and NAME-progress


def files_of(options):
    """The names that a run writes in its folder."""
    if options.frames == 1:
        return [*FILES, PICTURE]
    return [*FILES]


@dataclass
class RunRecord:
    """What run.json holds."""

    settings: dict  # {option: value}
    computed: str  # WIDTHxHEIGHT in pixels, of which the middle is written
    fingerprints: dict  # {option: short hash}; also of "weights", "configuration" and the "clip"
    stages: dict  # {name: {"seconds", "peak_memory_gib"}}
    files: list  # what the run writes
    sound: list | None = None  # where the clip's sound begins and ends, in seconds
    vae_tiles: str | None = None  # how the VAE divides frames
    versions: dict = field(default_factory=dict)
    device: str = ""
    threads: int = 0  # of PyTorch on the CPU: with others, sums are rounded otherwise
    latents_sha256: str = ""  # of the refined latents
    id: str = ""  # which run it is; what it keeps in `state` carries it

    def to_json(self):
        return json.dumps(asdict(self), indent=1)


def make_record(plan, device):
    """The record of a plan: a new one, or that of the run that is resumed, with what may change."""
    options = plan.options
    height, width = plan.computed
    record = RunRecord(
        settings={name: getattr(options, name) for name in sorted(recorded_names())},
        computed=f"{width}x{height}",
        fingerprints=dict(plan.fingerprints),
        stages={},
        files=files_of(options),
        sound=plan.sound,
        versions={"python": platform.python_version(), "torch": torch.__version__},
        device=device_name(device),
        threads=torch.get_num_threads(),
        id=secrets.token_hex(8),
    )
    begun = plan.begun
    if begun is not None:
        for name in ("weights", "configuration"):
            if name in begun.fingerprints:
                record.fingerprints[name] = begun.fingerprints[name]
        record.stages = dict(begun.stages)
        if plan.same_device:
            record.vae_tiles = begun.vae_tiles
        record.id = begun.id
    return record


# --------------------------------------------------------------------------------------------------
# Reading run.json, which somebody may have edited


def read_record(folder):
    """The RunRecord of a folder. Raises UserError if there is none, or if it is not valid."""
    file = Path(folder) / "run.json"
    if not os.path.lexists(file):
        raise UserError(f"{folder}: no run is there, as it has no run.json; begin a new one")
    try:
        content = model.read_json(file)
        known = {entry.name for entry in fields(RunRecord)}
        record = RunRecord(**{name: content[name] for name in content if name in known})
        check_types(record)
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{folder}: its run.json is broken ({error!s:.200}); restore it, or begin anew with "
            "another --output"
        ) from None
    return record


def check_types(record):
    """Raise TypeError or ValueError for an invalid field."""
    for entry in fields(RunRecord):
        value = getattr(record, entry.name)
        if not isinstance(value, entry.type):
            raise TypeError(f"{entry.name} is {value!r:.40}")
    for name, value in record.fingerprints.items():
        if not isinstance(value, str):
            raise TypeError(f"the fingerprint of {name} is {value!r:.40}")
    for name, stage in record.stages.items():
        if type(stage["seconds"]) not in (int, float):
            raise TypeError(f"the seconds of {name} are not a number")
    if record.sound is not None:
        begin, end = record.sound
        if Fraction(str(begin)) > Fraction(str(end)):
            raise ValueError(f"sound is {record.sound!r:.40}")


# --------------------------------------------------------------------------------------------------
# The output folder


def check_output(options, begun):
    """Raise UserError if something in the output folder would be lost: another run, a file that no
    run wrote, or the clip itself."""
    output = Path(options.output)
    parent = nearest_existing(output)
    if not parent.is_dir():
        kind = "no folder" if parent.exists() else "a link to nothing"
        raise UserError(f"--output {output}: {parent} is {kind}; choose another folder")
    if not os.access(parent, os.W_OK):
        raise UserError(f"--output {output}: {parent} is read-only; choose another folder")

    written = []
    if os.path.lexists(output / "run.json"):
        written = read_record(output).files
    for name in files_of(options):
        file = output / name
        if options.base_video is not None and is_same_file(options.base_video, file):
            raise UserError(
                f"--base-video {options.base_video}: would be overwritten; choose another --output"
            )
        if os.path.lexists(file) and name not in written:
            raise UserError(
                f"--output {output}: {name} is there, which no run wrote; move it, or choose "
                "another folder"
            )
    if written and begun is None and not options.overwrite:
        raise UserError(
            f"--output {output}: holds a run already; go on with --resume {output}, or say "
            "--overwrite"
        )


def nearest_existing(path):
    """The path itself, or the nearest folder above it that exists. A link to nothing does."""
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def is_same_file(file, other):
    return os.path.exists(file) and os.path.exists(other) and os.path.samefile(file, other)


def check_space(options, parts, computed, base_size):
    """Raise UserError unless the disk has room for all that will be written: the state (latents of
    the refinement six times over: start, history, and one that is being written; the base clip) and
    the videos, at most 2 bytes a pixel."""
    height, width = computed
    base_height, base_width = base_size
    latent_frames = options.frames // 4 + 1
    latent_pixels = parts.latent_size**2
    channels = parts.transformer.channels
    latents = 4 * channels * latent_frames * height * width // latent_pixels  # bytes
    variants = len(VARIANTS) if options.compare else 1
    pixels = options.frames * (base_height * base_width + height * width)
    needed = 6 * latents * variants + 3 * pixels
    free = shutil.disk_usage(nearest_existing(Path(options.output))).free
    if needed > free:
        unit, name = (2**30, "GiB") if needed > 2**30 else (2**20, "MiB")
        raise UserError(
            f"--output {options.output}: about {needed / unit:.1f} {name} will be written, but "
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


TEMPORARY = re.compile(r"\.freeswim-[0-9a-f]{16}\.part")  # a folder; nobody else has such names


def delete_temporary(folder):
    """Delete the temporary folders that killed runs have left in a folder."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if TEMPORARY.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)


def delete_old_run(output):
    """Delete what a run has written in this folder, but its run.json, which the new one replaces: a
    kill meanwhile leaves a folder that can be resumed or overwritten."""
    if not (output / "run.json").is_file():
        return
    written = read_record(output).files
    names = []
    for name in (*FILES, PICTURE):
        is_video = name not in ("run.json", "state")
        if is_video and name in written:
            names.append(name)
    for state in (*STATES, *VARIANTS):
        names.append(f"state/{state}.safetensors")
        names.append(f"state/{state}-progress.safetensors")
    for name in names:
        file = output / name
        if file.is_file() or file.is_symlink():
            file.unlink()


# --------------------------------------------------------------------------------------------------
# The run


class Run:
    """A run of a `plan` on a `device`. Nothing is written before `begin`. A resumed run holds its
    folder's lock from the start."""

    def __init__(self, plan, device):
        self.plan = plan
        self.device = device
        self.output = plan.output
        self.state = plan.output / "state"
        self.lock = None  # a descriptor of the folder, in the process that writes
        self.has_begun = False
        self.relief = "free some, or begin with a lower --size or --frames"  # if memory is full
        self.record = make_record(plan, device)

    def __enter__(self):
        if self.plan.begun is not None:
            processes.from_first(self.keep_others_out)
        return self

    def __exit__(self, *error):
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def keep_others_out(self):
        """Take the folder's lock. Raises UserError if another run has it, or has replaced the
        record that this one was planned from."""
        self.lock = lock(self.output)
        if self.plan.begun is not None and read_record(self.output) != self.plan.begun:
            raise UserError(
                f"--resume {self.output}: another run has written there meanwhile; try again"
            )

    def check_weights(self, fingerprints):
        """Note the fingerprints of the model's files, {"weights", "configuration"}. Raises
        UserError if a resumed run began with others."""
        for name, fingerprint in fingerprints.items():
            if self.record.fingerprints.setdefault(name, fingerprint) != fingerprint:
                raise UserError(
                    f"--resume {self.output}: its {name} are not those it began with "
                    f"({self.plan.options.model}); put them back, or begin anew"
                )

    def note_latents(self, sha256):
        """Note the hash of the refined latents."""
        self.record.latents_sha256 = sha256

    def choose_vae_tiles(self, choose):
        """How the VAE divides frames: as a resumed run began, else as `choose()` says."""
        if self.record.vae_tiles is None:
            self.record.vae_tiles = choose()
        return self.record.vae_tiles

    def advise(self, relief):
        """Note what helps if memory is full."""
        self.relief = relief

    def begin(self):
        """Make the folder and its run.json, and keep other runs out from now on."""
        if processes.is_first():
            self.output.mkdir(parents=True, exist_ok=True)
            if self.lock is None:
                self.keep_others_out()
                check_output(self.plan.options, self.plan.begun)  # nobody else can write there now
            delete_temporary(self.output)
            delete_temporary(self.state)
            if self.plan.begun is None:
                delete_old_run(self.output)
            self.write_record()
            self.state.mkdir(exist_ok=True)
        self.has_begun = True

    def write(self, name, writer):
        """Let `writer(file)` write the file `name` of the folder. Raises RunError, with the way on,
        if it cannot."""
        if not processes.is_first():
            return
        file = self.output / name
        temporary = file.parent / f".freeswim-{secrets.token_hex(8)}.part"
        part = temporary / file.name
        try:
            temporary.mkdir()
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
            shutil.rmtree(temporary, ignore_errors=True)

    def write_record(self):
        text = self.record.to_json()
        self.write("run.json", lambda file: file.write_text(text, encoding="utf-8"))

    def state_file(self, name):
        return self.state / f"{name}.safetensors"

    def save(self, name, tensors):
        """Keep a dict of tensors."""
        on_cpu = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        identity = {"run": self.record.id}
        writer = partial(save_file, on_cpu, metadata=identity)
        self.write(f"state/{name}.safetensors", writer)

    def load(self, name, shapes=None):
        """The dict of tensors that this run has saved under `name`, or None. Raises UserError for
        what it has not saved, or unless it holds the `shapes`, {key: shape}."""
        tensors = processes.from_first(partial(self.read_state, name, shapes or {}))
        if tensors is None:
            return None
        return {key: tensor.to(self.device) for key, tensor in tensors.items()}

    def read_state(self, name, shapes):
        file = self.state_file(name)
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as content:
                identity = (content.metadata() or {}).get("run", "")
                if identity != self.record.id:
                    raise ValueError("it is of another run")
                tensors = {key: content.get_tensor(key) for key in content.keys()}
            for key, shape in shapes.items():
                if key not in tensors:
                    raise ValueError(f"it has no {key}")
                if not has_shape(tensors[key], shape):
                    raise ValueError(f"its {key} are {list(tensors[key].shape)}, not {list(shape)}")
            for key, tensor in tensors.items():
                if tensor.is_floating_point() and not model.is_finite(tensor):
                    raise ValueError(f"its {key} are not finite")
        except (SafetensorError, ValueError, OSError) as error:
            raise self.damaged(name, error) from None
        return tensors

    def damaged(self, name, reason):
        """What to raise for a state that cannot be used."""
        return UserError(
            f"{self.state_file(name)} is damaged ({reason!s:.150}); delete it, and it is computed "
            "again"
        )

    def load_or_compute(self, name, compute, shape, key="latents"):
        """The tensor saved under `name`, of this shape. If there is none, `compute(progress)` gives
        it, with a bar for its loop."""
        tensors = self.load(name, {key: shape})
        if tensors is None:
            with self.stage(name) as progress:
                tensors = {key: compute(progress)}
            self.save(name, tensors)
        if processes.is_first():
            self.state_file(f"{name}-progress").unlink(missing_ok=True)
        return tensors[key].to(self.device)

    @contextmanager
    def stage(self, name):
        """Note a stage's seconds and its peak memory, of all tries. Yields a progress bar."""
        start = time.time()
        reset_peak_memory(self.device)
        try:
            yield partial(tqdm, desc=name, disable=not processes.is_first())
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # or what is queued counts for the next stage
        except (UserError, RunError, freeswim.StateError):
            raise
        except freeswim.NotFiniteError as error:
            raise UserError(
                f'in the stage "{name}", {error}: the likely cause is an extreme LoRA weight or '
                "--guidance; begin anew with a smaller one (or, if the VAE overflowed, with "
                "--vae-dtype float32)"
            ) from None
        except Exception as error:
            raise explain(error, name, self.relief, self.resume_hint()) from None
        finally:
            before = self.record.stages.get(name, {"seconds": 0, "peak_memory_gib": 0})
            seconds = before["seconds"] + time.time() - start
            peak = max(before["peak_memory_gib"], peak_memory(self.device) / 2**30)
            self.record.stages[name] = {
                "seconds": round(seconds, 2),
                "peak_memory_gib": round(peak, 3),
            }
            if self.has_begun:
                self.write_record()

    def resume_hint(self):
        if not (self.output / "run.json").is_file():
            return "nothing had been computed yet"
        return f"--resume {self.output} goes on from the last saved step"


def has_shape(tensor, shape):
    """Whether a tensor has this shape, in which None stands for any length."""
    if tensor.ndim != len(shape):
        return False
    pairs = zip(tensor.shape, shape, strict=True)
    return all(wanted is None or length == wanted for length, wanted in pairs)


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


# How libraries say that memory is full: PyTorch on a CPU and when it pins memory, CUDA and Triton,
# cuBLAS and cuDNN.
MEMORY_IS_FULL = ("t allocate memory", "out of memory", "_ALLOC_FAILED", "not enough memory")


def explain(error, stage, relief, hint):
    """What to raise for an error in a stage: a RunError with the stage and the way on, where memory
    is full or another process has ended; else the error itself, as it is a bug. PyTorch raises
    RuntimeError for many causes."""
    message = str(error)
    is_full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if is_full or any(words in message for words in MEMORY_IS_FULL):
        return RunError(f'out of memory in the stage "{stage}": {relief}; {hint}')
    if isinstance(error, torch.distributed.DistError) or "gloo" in message:
        return RunError(f'another process ended in the stage "{stage}"; {hint}')
    return error
