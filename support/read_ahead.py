"""Have the system read a model's weights into memory while the command still imports PyTorch and
tries kernels: from a cold disk, reading takes longer than everything else before the first step.
Weights are read, not only announced by posix_fadvise, which the system follows for few pages.
Nothing here needs PyTorch."""

import json
import os
import threading
from pathlib import Path

PARTS = ("transformer", "text_encoder", "vae")  # in the order in which they are read
CHUNK = 2**24  # bytes


def begin(typed):
    """Read ahead for the options that were `typed`, in a thread that ends with the process. What
    cannot be read is left to those who need it."""
    thread = threading.Thread(target=read, args=(typed,), daemon=True)
    thread.start()


def read(typed):
    try:
        folder = find_folder(model_of(typed))
        if folder is not None:
            read_files(weights_of(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass


def model_of(typed):
    """What --model names, or the run that is resumed recorded; None if neither does."""
    if "resume" in typed:
        record = Path(typed["resume"]) / "run.json"
        if not record.is_file():
            return None
        return json.loads(record.read_text(encoding="utf-8"))["settings"].get("model")
    return typed.get("model")


def find_folder(name):
    """The folder of a model here, or in the cache of the hub; None if it is in neither."""
    if name is None:
        return None
    if Path(name).is_dir():
        return Path(name)
    repository = name.partition("@")[0].replace("/", "--")
    snapshots = cache_of_hub() / f"models--{repository}" / "snapshots"
    found = sorted(snapshots.glob("*"), key=lambda folder: folder.stat().st_mtime)
    return found[-1] if found else None


def home_of_hub():
    """Where Hugging Face's libraries keep their files."""
    default = Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HOME", default)).expanduser()


def cache_of_hub():
    return Path(os.environ.get("HF_HUB_CACHE", home_of_hub() / "hub"))


def weights_of(folder):
    files = []
    for part in PARTS:
        files.extend(sorted((folder / part).glob("*.safetensors")))
    return files


def read_files(files):
    """Read these files, as far as they fit into half of the free memory: more would push out what
    was read first. The system keeps what was read."""
    left = free_memory() // 2
    buffer = bytearray(CHUNK)
    for file in files:
        with open(file, "rb", buffering=0) as content:
            count = CHUNK
            while count > 0 and left > 0:
                count = content.readinto(buffer)
                left -= count


def free_memory():
    """Bytes of CPU memory that are not in use."""
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0
