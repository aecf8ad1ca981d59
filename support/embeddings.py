"""Text embeddings of prompts that were embedded before, in the user's cache folder. Wan's text
encoder has 21 GiB, and the embeddings of a prompt a few hundred KiB."""

import hashlib
import json
import os
import secrets

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from support.read_ahead import home_of_hub

LARGE = 2**30  # bytes; a smaller encoder is as quick as the cache


def is_worth_keeping(folder):
    """Whether a `text_encoder/` folder is large enough."""
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    return sum(sizes) >= LARGE


def key_of(fingerprints, prompts, options):
    """A hash of all that embeddings depend on: the prompts, which are embedded together, the
    model's files (by their `fingerprints`, of hub.fingerprints_of_model), and how it computes."""
    described = {
        "prompts": prompts,
        "files": fingerprints,
        "dtype": options.dtype,
        "device": options.device.split(":")[0],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    text = json.dumps(described)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_of(key):
    return home_of_hub() / "freeswim" / f"{key}.safetensors"


def load(key, length):
    """Embeddings (B, length, D) that were kept under a key, or None."""
    try:
        tensors = load_file(file_of(key))
        embeddings = tensors["embeddings"]
    except (OSError, SafetensorError, KeyError):
        return None
    padding = length - embeddings.shape[1]
    if padding < 0 or not embeddings.isfinite().all():
        return None
    return torch.nn.functional.pad(embeddings, (0, 0, 0, padding))


def keep(key, embeddings):
    """Keep embeddings (B, L, D), without the zeros at the end of all of them. A folder that cannot
    be written is no error: they are computed again."""
    is_used = embeddings.ne(0).any(dim=2).any(dim=0)  # of tokens, by any prompt
    length = 1
    if is_used.any():
        length = int(is_used.nonzero().max()) + 1
    used = embeddings[:, :length].contiguous()
    file = file_of(key)
    temporary = file.with_name(f".{key}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"embeddings": used}, temporary)
        os.replace(temporary, file)
    except (OSError, SafetensorError):
        temporary.unlink(missing_ok=True)
