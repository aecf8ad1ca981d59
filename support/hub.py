"""Models: a folder here or a repository on the hub, what kind it is, and which weights it has."""

import hashlib
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import model
from support import UserError

SUPPORTED = "Wan2.1 text-to-video (1.3B, 14B) and Wan2.2-T2V-A14B"
PARTS = {
    "transformer": model.WanTransformer,
    "transformer_2": model.WanTransformer,  # only Wan2.2-T2V-A14B has it
    "text_encoder": model.TextEncoder,
    "vae": model.WanVAE,
}
REVISIONS = {  # the commits that this code was written for
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "0fad780a534b6463e45facd96134c9f345acfa5b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "38ec498cb3208fb688890f8cc7e94ede2cbd7f68",
}


def find_model(name):
    """The folder of a model with its descriptions and its tokenizer: `name` itself if that is a
    folder, else a snapshot from the hub, without weights. Raises UserError if there is none."""
    is_folder = Path(name).is_dir()
    if not is_folder and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(
            f"--model {name}: no such folder, and no hub id like Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    folder = download(name, weights=False)
    check_pipeline(name, folder)
    return folder


def read_index(folder):
    """The content of a model's model_index.json, or of none."""
    file = folder / "model_index.json"
    return model.read_json(file) if file.is_file() else {}


def parts_of(folder):
    """The parts that a model has, {name: class}."""
    parts = dict(PARTS)
    if boundary_of(folder) is None:
        del parts["transformer_2"]
    return parts


def boundary_of(folder):
    """The timestep at which Wan2.2's first transformer hands over to the second; None if there is
    only one. Raises UserError if the model does not say."""
    index = read_index(folder)
    if index.get("transformer_2") in (None, [None, None]):
        return None
    ratio = index.get("boundary_ratio")
    if not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
        raise UserError(
            f"--model {folder}: has two transformers, but its boundary_ratio is {ratio!r:.99}; "
            "it must be a number between 0 and 1"
        )
    return 1000 * ratio


def check_pipeline(name, folder):
    """Raise UserError or CheckpointError unless the folder describes a model that is supported."""
    index = read_index(folder)
    kind = index.get("_class_name", "WanPipeline")
    if index.get("expand_timesteps"):
        kind = "Wan2.2-TI2V"
    if kind != "WanPipeline":
        raise UserError(f"--model {name}: is a {kind:.99}; supported are {SUPPORTED}")
    transformer = model.build(model.WanTransformer, folder / "transformer")
    if boundary_of(folder) is not None:
        second = model.build(model.WanTransformer, folder / "transformer_2")
        if second.config != transformer.config:
            raise UserError(f"--model {name}: its two transformers differ; they are of two models")
    encoder = model.build(model.TextEncoder, folder / "text_encoder")
    model.build(model.WanVAE, folder / "vae")
    if encoder.shared.embedding_dim != transformer.config["text_dim"]:
        raise UserError(
            f"--model {name}: its text encoder is {encoder.shared.embedding_dim} wide, but its "
            f"transformer reads {transformer.config['text_dim']}; they are of different models"
        )


def download(name, weights):
    """The folder of a model: `name` itself if it is one, else the hub's snapshot of that id,
    fetched if needed. Without `weights`, only descriptions and the tokenizer: a few MB that tell
    whether the rest is worth fetching."""
    if Path(name).is_dir():
        return Path(name)
    revision = REVISIONS.get(name)
    wanted = ["model_index.json", "scheduler/*.json", "tokenizer/tokenizer.json"]
    for part in PARTS:
        wanted.append(f"{part}/*.json")
        if weights:
            wanted.append(f"{part}/*.safetensors")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: {hub_problem(error, revision)}") from None


def hub_problem(error, revision):
    """What went wrong with the hub, and what helps."""
    wanted = "" if revision is None else f" (commit {revision})"
    reason = f"{type(error).__name__}: {str(error)[:200]}"
    if isinstance(error, GatedRepoError):
        return "you have no access yet; ask for it on its page, then log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"the hub has no{wanted or ' such version'}; download it and give the folder"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or you have no access; check the id, or log in"
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"is not in the cache{wanted}, and the hub cannot be reached; check the network and "
            f"HF_HUB_OFFLINE, or give a folder ({reason})"
        )
    return f"cannot be fetched from the hub{wanted} ({reason}); check the id, or give a folder"


def check_weights(name, folder):
    """Raise CheckpointError or UserError unless all weights of a model are there. Only headers are
    read."""
    try:
        for part, cls in parts_of(folder).items():
            model.find_weights(model.build(cls, folder / part), folder / part)
    except model.CheckpointError as error:
        if Path(name).is_dir():
            raise
        raise UserError(
            f"--model {name}: its snapshot in the cache is incomplete ({error}); run again with "
            f"access to the hub, or delete {folder} first"
        ) from None


WHOLE = 2**26  # bytes; of a larger file, a fingerprint covers samples
SAMPLES = 512
SAMPLE_SIZE = 2**14  # bytes


def fingerprint_of_weights(folder):
    """A few letters that tell a model's weights from others, from the sizes and contents of its
    safetensors files. Links are followed."""
    digest = hashlib.sha256()
    for part in PARTS:
        for file in sorted((folder / part).glob("*.safetensors")):
            digest.update(f"{part}/{file.name}".encode(errors="surrogateescape"))
            add_file(digest, file)
    return digest.hexdigest()[:16]


def fingerprint_of_text(text):
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def fingerprint_of_file(file):
    digest = hashlib.sha256()
    add_file(digest, file)
    return digest.hexdigest()[:16]


def add_file(digest, file):
    """Add a file's size and content to a digest: all of it, or samples spread over it."""
    size = file.stat().st_size
    digest.update(f"{size}".encode())
    with open(file, "rb") as content:
        if size <= WHOLE:
            digest.update(content.read())
            return
        for index in range(SAMPLES):
            content.seek(size * index // SAMPLES)
            digest.update(content.read(SAMPLE_SIZE))
