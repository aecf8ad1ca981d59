"""A run and its folder: whatever was computed is there, so that nothing is computed twice.

Every file is written beside its place, flushed to the disk and renamed: under its name there is
only ever a whole one. Under torchrun every process has a Run; the first one writes, and all of them
get what it has read.
"""

import json
import os
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from support.checks import claim, explained, peak_memory
from support.parallel import from_first, rank


class Run:
    """`output` is its folder, `device` where its tensors go, `record` what its run.json holds."""

    def __init__(self, output, device, record):
        self.output, self.state, self.device, self.record = (
            Path(output),
            Path(output) / "state",
            device,
            record,
        )
        self.lock = (
            None  # a descriptor of the folder, in the process that writes, from `begin` to `end`
        )

    def end(self):
        self.lock = None if self.lock is None else os.close(self.lock)

    def begin(self, check, clear):
        """Make the folder and its run.json, and keep other runs out while this process lives.
        `check()` is made again under the lock, and gives the files that a run has left; `clear`
        removes them."""
        if rank() == 0:
            self.output.mkdir(parents=True, exist_ok=True)
            self.lock = claim(self.output)
            left = [self.output / name for name in check() if name != "state"] + [
                *self.state.glob("*.safetensors")
            ]
            halves = [
                *self.output.glob("part-*"),
                *self.state.glob("part-*"),
                *self.state.glob(".tmp*"),
            ]
            for file in halves + left * clear:
                file.unlink(missing_ok=True)
            self.write_record()
            self.state.mkdir(exist_ok=True)

    def write(self, name, writer):
        """Let `writer(file)` write the file `name` of the folder. Raises OSError, with the way on,
        if it cannot."""
        if rank() > 0:
            return
        part = (self.output / name).with_name("part-" + Path(name).name)
        try:
            part.touch()
            mode = part.stat().st_mode
            writer(part)
            part.chmod(mode)  # safetensors gives its files another
            with open(part, "rb+") as written:
                os.fsync(written.fileno())
            part.replace(self.output / name)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{self.output / name} cannot be written ({error!s:.200}); {self.resume_hint()}"
            ) from None
        finally:
            part.unlink(missing_ok=True)

    def write_record(self):
        self.write(
            "run.json",
            lambda file: file.write_text(
                json.dumps(self.record, indent=1, ensure_ascii=False), encoding="utf-8"
            ),
        )

    def save(self, name, tensors):
        """Keep a dict of tensors."""
        tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        self.write(f"state/{name}.safetensors", partial(save_file, tensors))

    def load(self, name, *keys):
        """The dict of tensors that was saved under `name`, or None. Raises ValueError unless it has
        the `keys`."""
        file = self.state / f"{name}.safetensors"
        try:
            tensors = from_first(lambda: load_file(file) if file.is_file() else None)
            return tensors and {key: tensors[key].to(self.device) for key in (*keys, *tensors)}
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{file} is damaged ({error!s:.99}); delete it, and it is computed again"
            ) from None

    def load_or_compute(self, name, compute):
        """The tensor saved under `name`; if there is none, `compute(progress)` gives it, with a bar
        for its loop."""
        tensors = self.load(name, "latents")
        if tensors is None:
            with self.stage(name) as progress:
                tensors = {"latents": compute(progress)}
            self.save(name, tensors)
        if rank() == 0:
            (self.state / f"{name}-progress.safetensors").unlink(missing_ok=True)
        return tensors["latents"].to(self.device)

    @contextmanager
    def stage(self, name):
        """Note a stage's seconds, of all tries, and peak memory, of the GPU or of the process so
        far. Yields a bar."""
        on_gpu, start = self.device.type == "cuda", time.time()
        on_gpu and torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield partial(tqdm, desc=name, disable=rank() > 0)
            on_gpu and torch.cuda.synchronize(
                self.device
            )  # else what was only queued would count for the next stage
        except (MemoryError, RuntimeError) as error:
            raise explained(error, name, self.resume_hint()) from None
        finally:
            peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else peak_memory()
            seconds = (
                time.time() - start + self.record["stages"].get(name, {"seconds": 0})["seconds"]
            )
            self.record["stages"][name] = {
                "seconds": round(seconds, 2),
                "peak_memory_gib": round(peak / 2**30, 3),
            }
            if self.lock is not None:
                self.write_record()

    def resume_hint(self):
        begun = (self.output / "run.json").is_file()
        return (
            f"--resume {self.output} goes on from the last saved step"
            if begun
            else "nothing had been computed yet"
        )
