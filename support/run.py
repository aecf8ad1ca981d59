"""A run and its folder: whatever was computed is there, so that nothing is computed twice.

Every file is written beside its place, flushed to the disk and renamed: under its name there is only ever a whole one.
Under torchrun every process has a Run; the first one writes, and all of them get what it has read.
"""
import json
import os
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from model import read_json
from support.parallel import from_first, rank

try:
    import resource
except ImportError:  # Windows
    resource = None


RESULTS = ("base.mp4", "freeswim.mp4", "comparison.png", "run.json")


def read_record(output):
    """The content of the run.json in a folder. Raises ValueError if there is none."""
    try:
        record = read_json(Path(output) / "run.json")
        assert isinstance(record["settings"], dict) and isinstance(record["stages"], dict)
        return record
    except (ValueError, KeyError, AssertionError):
        raise ValueError(f"--resume {output}: no run is there (its run.json is missing or broken); begin with --output"
                         ) from None


class Run:
    """`output` is its folder, `device` where its tensors go, `record` what its run.json holds."""

    def __init__(self, output, device, record):
        self.output, self.device, self.record = Path(output), device, record

    def begin(self, overwrite):
        """Make the folder and its run.json; with `overwrite`, remove what another run has left there."""
        state = self.output / "state"
        if rank() == 0:
            state.mkdir(parents=True, exist_ok=True)
            for file in (*state.glob(".tmp*"), *(state.glob("*") if overwrite else ())):  # .tmp: safetensors' own
                file.unlink()
            for name in RESULTS if overwrite else ():
                (self.output / name).unlink(missing_ok=True)
        self.write_record()

    def write(self, name, writer):
        """Let `writer(file)` write the file `name` of the folder."""
        if rank() > 0:
            return
        file = self.output / name
        part = file.with_name("part-" + file.name)
        writer(part)
        with open(part, "rb+") as written:
            os.fsync(written.fileno())
        part.replace(file)

    def write_record(self):
        text = json.dumps(self.record, indent=1, ensure_ascii=False) + "\n"
        self.write("run.json", lambda file: file.write_text(text))

    def save(self, name, tensors):
        """Keep a dict of tensors in state/`name`.safetensors."""
        tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        self.write(f"state/{name}.safetensors", lambda file: save_file(tensors, file))

    def load(self, name):
        """The dict of tensors that was saved under `name`, or None."""
        file = self.output / "state" / f"{name}.safetensors"
        tensors = from_first(lambda: load_file(file) if file.is_file() else None)
        return tensors and {key: tensor.to(self.device) for key, tensor in tensors.items()}

    def load_or_compute(self, name, compute):
        """The tensor that was saved under `name`. If there is none, `compute(progress)` gives it, in a stage of its own;
        `progress` wraps an iterable in a bar."""
        tensors = self.load(name)
        if tensors is None:
            with self.stage(name) as progress:
                tensors = {"latents": compute(progress)}
            self.save(name, tensors)
        if rank() == 0:
            (self.output / "state" / f"{name}-progress.safetensors").unlink(missing_ok=True)
        return tensors["latents"].to(self.device)

    @contextmanager
    def stage(self, name):
        """Note the seconds of a stage, of all tries together, and its peak memory: of the GPU's tensors, or of the
        process so far. Yields a progress bar. What ends it early is told with the way on."""
        on_gpu, start = self.device.type == "cuda", time.time()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield partial(tqdm, desc=name, disable=rank() > 0)
        except (MemoryError, RuntimeError) as error:
            # PyTorch's allocator for the CPU has no exception of its own, and its connections neither.
            text = str(error)
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in text and "alloc" in text:
                raise MemoryError(f"out of memory in the stage \"{name}\": free some, or begin with a lower --size or "
                                  f"--frames; {self.resume_hint()}") from None
            if isinstance(error, dist.DistError) or "gloo" in text:
                raise ConnectionError(f"another process ended in the stage \"{name}\"; {self.resume_hint()}") from None
            raise
        if on_gpu:
            torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else resource and (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
        before = self.record["stages"].get(name, {"seconds": 0})["seconds"]
        self.record["stages"][name] = {"seconds": round(before + time.time() - start, 2),
                                       "peak_memory_gib": peak and round(peak / 2**30, 3)}

    def resume_hint(self):
        saved = (self.output / "run.json").is_file()
        return f"--resume {self.output} goes on from the last saved step" if saved else "nothing had been computed yet"
