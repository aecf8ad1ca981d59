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
THREADS = 4  # a disk behind a network serves several reads at once, but each of them slowly


def begin(typed):
    """Read ahead for the options that were `typed`, in threads that end with the process. What
    cannot be read is left to those who need it."""
    for number in range(THREADS):
        thread = threading.Thread(target=read, args=(typed, number), daemon=True)
        thread.start()


def read(typed, number):
    """Read every THREADS-th chunk of the weights, from the chunk `number` on."""
    try:
        folder = find_folder(model_of(typed))
        free = free_memory()
        if folder is not None and free is not None:
            # More would push out of memory what was read first.
            chunks = chunks_of(weights_of(folder), most=free // 2)
            read_chunks(chunks[number::THREADS])
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


def chunks_of(files, most):
    """Where the chunks of these files begin, [(file, byte)], for as many bytes as `most`."""
    chunks = []
    for file in files:
        for start in range(0, file.stat().st_size, CHUNK):
            chunks.append((file, start))
    return chunks[: most // CHUNK]


def read_chunks(chunks):
    """Read these chunks. The system keeps what was read."""
    buffer = bytearray(CHUNK)
    for file, start in chunks:
        with open(file, "rb", buffering=0) as content:
            content.seek(start)
            content.readinto(buffer)


def free_memory():
    """Bytes of CPU memory that are not in use; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:  # no Linux
        return None
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None
