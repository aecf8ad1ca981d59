"""Models: a folder here or a repository on the hub, what kind it is, and which weights it has."""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import model
from support import UserError
from support.presets import SUPPORTED

PARTS = {
    "transformer": model.WanTransformer,
    "transformer_2": model.WanTransformer,  # only Wan2.2-T2V-A14B has it
    "text_encoder": model.TextEncoder,
    "vae": model.WanVAE,
}
PIPELINES = ("WanPipeline", "WanVideoToVideoPipeline")  # in Diffusers; they have the same parts
REVISIONS = {  # the commits that this code was written for
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "0fad780a534b6463e45facd96134c9f345acfa5b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "38ec498cb3208fb688890f8cc7e94ede2cbd7f68",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "b8fff7315c768468a5333511427288870b2e9635",
}
EXAMPLE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@dataclass(frozen=True)
class Parts:
    """The parts of a model as its folder describes them, without weights (on the meta device)."""

    transformer: model.WanTransformer
    vae: model.WanVAE
    boundary: float | None  # timestep at which Wan2.2's second expert takes over; None: only one

    @property
    def latent_size(self):
        """Pixels along each side of a latent."""
        return self.vae.spatial_factor

    @property
    def token_size(self):
        """Pixels along each side of a token."""
        return self.latent_size * self.transformer.config["patch_size"][1]


# --------------------------------------------------------------------------------------------------
# Finding a model


def find_model(name):
    """The folder of a model with its descriptions and its tokenizer: `name` itself if that is a
    folder, else a snapshot from the hub, without weights. Raises UserError if there is none."""
    path = Path(name)
    if path.is_dir():
        check_layout(name, path)
    elif path.exists():
        raise UserError(f"--model {name}: is one file; {what_to_give(path)}")
    else:
        check_hub_id(name)
    return download(name, weights=False)


def what_to_give(file):
    """What is needed in the place of a single file."""
    needed = f"give a folder in Diffusers layout, or a hub id like {EXAMPLE}"
    if file.suffix.lower() == ".gguf":
        return f"GGUF weights are quantized, which is not supported; {needed}"
    return needed


def check_layout(name, folder):
    """Raise UserError for a folder that is known not to be in Diffusers layout, or not the whole
    model."""
    if (folder / "transformer" / "config.json").exists() or (folder / "model_index.json").exists():
        return
    if (folder / "config.json").is_file() and folder.name in PARTS:
        raise UserError(f"--model {name}: is one part of a model; give the whole, {folder.parent}")
    snapshots = sorted(folder.glob("snapshots/*/model_index.json"))
    if snapshots:
        raise UserError(
            f"--model {name}: is a cache of the hub; give the snapshot in it, "
            f"{snapshots[-1].parent}"
        )
    inner = sorted(folder.glob("*/model_index.json"))
    inner += sorted(folder.glob("models--*/snapshots/*/model_index.json"))
    if inner:
        raise UserError(
            f"--model {name}: has no transformer/config.json; give the model in it, "
            f"{inner[-1].parent}"
        )
    if any(folder.glob("*.pth")) or any(folder.glob("diffusion_pytorch_model*.safetensors")):
        raise UserError(
            f"--model {name}: is in the layout of Wan's own code; use the repository of that model "
            f"whose name ends in -Diffusers, like {EXAMPLE}"
        )
    if any(folder.glob("*.gguf")):
        raise UserError(f"--model {name}: holds {what_to_give(Path('model.gguf'))}")


def check_hub_id(name):
    """Raise UserError for what cannot be a model on the hub, before the network is asked."""
    if name.lower().endswith((".safetensors", ".gguf", ".pth", ".bin", ".ckpt")):
        raise UserError(f"--model {name}: no such file; {what_to_give(Path(name))}")
    repository, _, revision = name.partition("@")
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repository)
    if not is_id or ("@" in name and not re.fullmatch(r"[\w./-]+", revision)):
        raise UserError(f"--model {name}: no such folder, and no hub id like {EXAMPLE}")
    if repository.startswith("Wan-AI/") and not repository.endswith("-Diffusers"):
        raise UserError(
            f"--model {name}: is in the layout of Wan's own code; use {repository}-Diffusers"
        )


def download(name, weights):
    """The folder of a model: `name` itself if it is one, else the hub's snapshot of that id,
    fetched if needed. Without `weights`, only descriptions and the tokenizer: a few MB that tell
    whether the rest is worth fetching."""
    if Path(name).is_dir():
        return Path(name)
    repository, _, revision = name.partition("@")
    revision = revision or REVISIONS.get(repository)
    wanted = ["model_index.json", "scheduler/*.json", "tokenizer/tokenizer.json"]
    for part in PARTS:
        wanted.append(f"{part}/*.json")
        if weights:
            wanted.append(f"{part}/*.safetensors")
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=wanted)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name}: {hub_problem(error, revision)}") from None
    return Path(folder)


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
    if isinstance(error, EntryNotFoundError):
        return "the hub's repository has no such file; check its name"
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, HfHubHTTPError) and status is not None:
        return f"{help_for_status(status)} ({reason})"
    if isinstance(error, ValueError):
        return f"cannot be fetched from the hub{wanted} ({reason}); check the id, or give a folder"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be fetched from the hub{wanted} ({reason}); check the disk and its space"
    return (
        f"cannot be fetched from the hub{wanted}, as the connection broke; run again, and what has "
        f"arrived is not fetched twice ({reason})"
    )


def help_for_status(status):
    """What helps against an HTTP status of the hub."""
    if status in (401, 403):
        return (
            f"the hub refuses access ({status}); log in with `hf auth login`, or change the token"
        )
    if status == 429:
        return "the hub has had too many requests from here (429); wait a few minutes, or log in"
    if status >= 500:
        return f"the hub has a problem of its own ({status}); run again later"
    return f"the hub answers with status {status}; run again later, or give a folder"


# --------------------------------------------------------------------------------------------------
# What kind of model it is


def describe(name, folder):
    """The Parts of a model. Raises UserError or CheckpointError unless the folder describes a model
    that is supported, of parts that belong together."""
    index = read_index(folder)
    kind = index.get("_class_name", "WanPipeline")
    if kind not in PIPELINES:
        raise UserError(f"--model {name}: is a {kind!s:.99}; supported are {SUPPORTED}")
    transformer = model.build(model.WanTransformer, folder / "transformer")
    boundary = boundary_of(folder)
    if boundary is not None:
        second = model.build(model.WanTransformer, folder / "transformer_2")
        if second.config != transformer.config:
            raise UserError(f"--model {name}: its two transformers differ; they are of two models")
    encoder = model.build(model.TextEncoder, folder / "text_encoder")
    vae = model.build(model.WanVAE, folder / "vae")
    if encoder.shared.embedding_dim != transformer.config["text_dim"]:
        raise UserError(
            f"--model {name}: its text encoder is {encoder.shared.embedding_dim} wide, but its "
            f"transformer reads {transformer.config['text_dim']}; they are of different models"
        )
    if vae.channels != transformer.channels:
        raise UserError(
            f"--model {name}: its VAE has {vae.channels} latent channels, but its transformer "
            f"{transformer.channels}; they are of different models"
        )
    return Parts(transformer, vae, boundary)


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


# --------------------------------------------------------------------------------------------------
# Fingerprints: short hashes that identify files

WHOLE = 2**26  # bytes; of a larger file, a fingerprint covers samples
SAMPLES = 512
SAMPLE_SIZE = 2**14  # bytes


def fingerprints_of_model(folder):
    """Of a model's weights, and of the files that describe it. Links are followed."""
    weights = hashlib.sha256()
    configuration = hashlib.sha256()
    add_named_file(configuration, folder, folder / "model_index.json")
    add_named_file(configuration, folder, folder / "tokenizer" / "tokenizer.json")
    for part in PARTS:
        add_named_file(configuration, folder, folder / part / "config.json")
        for file in sorted((folder / part).glob("*.safetensors")):
            if not file.name.startswith("."):
                add_named_file(weights, folder, file)
    return {"weights": weights.hexdigest()[:16], "configuration": configuration.hexdigest()[:16]}


def fingerprint_of_text(text):
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def fingerprint_of_file(file):
    digest = hashlib.sha256()
    add_file(digest, file)
    return digest.hexdigest()[:16]


def add_named_file(digest, folder, file):
    """Add a file's name in a folder, and its size and content, if it is there."""
    if file.is_file():
        digest.update(str(file.relative_to(folder)).encode(errors="surrogateescape"))
        add_file(digest, file)


def add_file(digest, file):
    """Add a file's size and content to a digest: all of it, or samples spread over it."""
    size = file.stat().st_size
    digest.update(f"{size}".encode())
    if size <= WHOLE:
        digest.update(file.read_bytes())
        return
    starts = [size * index // SAMPLES for index in range(SAMPLES)]
    # A cold disk serves many scattered reads at once, but each of them slowly.
    with ThreadPoolExecutor(max_workers=32) as pool:
        for sample in pool.map(partial(read_sample, file), starts):
            digest.update(sample)


def read_sample(file, start):
    with open(file, "rb") as content:
        content.seek(start)
        return content.read(SAMPLE_SIZE)
