"""LoRA files, merged into the transformer's weights while they are read.

A LoRA adds weight * alpha / rank * up @ down to a matrix. Files name these parts in several ways:
those of Diffusers and PEFT, of Wan's own code (with `diffusion_model.` in ComfyUI), and of
kohya-ss's trainers. No name is taken apart: every tensor of the transformer lists what it may be
called. Everything that could be wrong is found from the files' headers.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download

import model
from support import UserError
from support.hub import hub_problem

PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.")
KINDS = {  # how a name ends: the tensor that is changed, and which part of the change this is
    ".lora_A.weight": (".weight", "down"),
    ".lora_B.weight": (".weight", "up"),
    ".lora_down.weight": (".weight", "down"),
    ".lora_up.weight": (".weight", "up"),
    ".alpha": (".weight", "alpha"),
    ".diff": (".weight", "difference"),
    ".diff_b": (".bias", "difference"),
    ".diff_m": (".modulation", "difference"),
}
UNSUPPORTED = {  # parts of names: what they belong to
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with a core",
    "oft_": "OFT",
    "boft_": "BOFT",
    "lora_embedding": "a LoRA of embeddings",
    "reshape_weight": "a LoRA that reshapes weights",
    "set_weight": "a LoRA that replaces weights",
}
WAN_NAMES = {  # ours: those of Wan's own code
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.": ".o.",
    ".norm2.": ".norm3.",
    "time_embedder.": "time_embedding.",
    "text_embedder.": "text_embedding.",
    "time_proj.": "time_projection.1.",
    "proj_out.": "head.head.",
    ".scale_shift_table": ".modulation",
}


@dataclass(frozen=True)
class Lora:
    """A file that --lora or --lora-2 names."""

    option: str  # which of them
    file: Path
    weight: float


@dataclass(frozen=True)
class Change:
    """What one file adds to one tensor."""

    file: Path
    weight: float
    parts: dict  # {"down", "up", "alpha" or "difference": name in the file}
    alpha: float | None  # from the file's metadata


# --------------------------------------------------------------------------------------------------
# Options


def parse_lora(option, text):
    """FILE or FILE:WEIGHT as a Lora. Raises UserError for a weight that is not a number."""
    file = text
    weight = 1.0
    if not text.endswith(".safetensors") and ":" in text:
        file, _, number = text.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise UserError(f"{option} {text}: the weight {number} is not a number")
    return Lora(option, find_file(option, file), weight)


def find_file(option, name):
    """A local file, or one of the hub, as in owner/name/file.safetensors."""
    file = Path(name)
    if file.exists():
        return file.absolute()
    on_hub = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)/(.+\.safetensors)", name)
    if on_hub is None:
        raise UserError(f"{option} {name}: no such file; give a .safetensors file")
    repository, path = on_hub.groups()
    try:
        return Path(hf_hub_download(repository, path))
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {name}: no such file, and {hub_problem(error, None)}") from None


# --------------------------------------------------------------------------------------------------
# Names


def names_in_files(transformer):
    """What the tensors of a transformer are called in LoRA files, {name: ours}."""
    names = {}
    for ours in transformer.state_dict():
        wan = "head.modulation" if ours == "scale_shift_table" else ours
        for part, theirs in WAN_NAMES.items():
            wan = wan.replace(part, theirs)
        module, _, end = wan.rpartition(".")
        names[model.checkpoint_name(type(transformer), ours)] = ours
        names[wan] = ours
        names[f"lora_unet_{module.replace('.', '_')}.{end}"] = ours
    return names


def place(key, names):
    """Our tensor that an entry of a file changes, and which part of the change it is; None and the
    part if there is no such tensor, None and None if it is no part of a LoRA."""
    name = key.replace(".default.", ".")  # PEFT's name for an adapter without a name
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    for ending, (tensor_ending, part) in KINDS.items():
        if name.endswith(ending):
            return names.get(name.removesuffix(ending) + tensor_ending), part
    return None, None


# --------------------------------------------------------------------------------------------------
# Finding and checking


def find_changes(transformer, loras):
    """What files add to which tensors of a transformer, {our name: [Change]}. Only headers are
    read. Raises UserError, naming file and entry, for what cannot be merged exactly."""
    names = names_in_files(transformer)
    shapes = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    changes = {}
    for lora in loras:
        header, alpha = read_file(lora)
        for ours, parts in group_by_tensor(lora, header, names).items():
            check_parts(lora, parts, header, shapes[ours])
            changes.setdefault(ours, []).append(Change(lora.file, lora.weight, parts, alpha))
    return changes


def read_file(lora):
    """Shapes by name, and the alpha of the metadata or None."""
    try:
        header = model.read_header(lora.file)
        with model.opened(lora.file) as tensors:
            metadata = tensors.metadata() or {}
    except model.CheckpointError as error:
        raise UserError(f"{lora.option} {error}") from None
    shapes = {}
    for name, (dtype, shape) in header.items():
        if dtype not in model.FLOATS:
            refuse(lora, f"{name} is {dtype}, not floating-point numbers")
        shapes[name] = shape
    return shapes, alpha_of(lora, metadata)


def alpha_of(lora, metadata):
    """The alpha that Diffusers keeps in the metadata, as JSON. Raises UserError for kinds of LoRA
    that it names and that are not supported."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
        alpha = config.get("lora_alpha")
        alpha = None if alpha is None else float(alpha)
    except (ValueError, TypeError, AttributeError):
        refuse(lora, "its metadata cannot be read")
    if config.get("use_dora"):
        refuse(lora, "is DoRA, which is not supported")
    if config.get("use_rslora"):
        refuse(lora, "is rsLoRA, which is not supported")
    if config.get("alpha_pattern"):
        refuse(lora, "has an alpha_pattern, which is not supported")
    return alpha


def group_by_tensor(lora, header, names):
    """{our name: {part: name in the file}}."""
    for key in header:
        for part, kind in UNSUPPORTED.items():
            if part in key:
                refuse(lora, f"{key} is of {kind}, which is not supported")
    placed = {key: place(key, names) for key in header}
    if all(part in (None, "alpha") for _, part in placed.values()):
        refuse(lora, f"holds no LoRA, but {list(header)!s:.200}")
    grouped = {}
    for key, (ours, part) in placed.items():
        if ours is None:
            refuse(lora, f"{key} fits nothing in this transformer; is it for another model?")
        parts = grouped.setdefault(ours, {})
        if part in parts:
            refuse(lora, f"{key} and {parts[part]} are the same")
        parts[part] = key
    return grouped


def check_parts(lora, parts, header, wanted):
    """Raise UserError unless the parts make a change of the shape that is wanted."""
    if "difference" in parts:
        key = parts["difference"]
        if header[key] != wanted:
            refuse(lora, f"{key} is {header[key]}, but should be {wanted}")
    if "alpha" in parts and math.prod(header[parts["alpha"]]) != 1:
        refuse(lora, f"{parts['alpha']} is {header[parts['alpha']]}, but should be one number")
    if "up" not in parts and "down" not in parts:
        if "difference" not in parts:
            refuse(lora, f"{parts['alpha']} has no matrices to scale")
        return
    for part, other in (("up", "down"), ("down", "up")):
        if part not in parts:
            refuse(lora, f"{parts[other]} is there, but not the {part} matrix that belongs to it")
    up = header[parts["up"]]
    down = header[parts["down"]]
    are_matrices = len(up) >= 2 and len(down) >= 2
    if not are_matrices or math.prod(up[1:]) != down[0]:
        refuse(lora, f"{parts['up']} {up} and {parts['down']} {down} do not fit each other")
    made = (up[0], math.prod(down[1:]))
    if made != (wanted[0], math.prod(wanted[1:])):
        refuse(lora, f"{parts['up']} {up} by {down} does not fit a tensor of {wanted}")


def refuse(lora, problem):
    raise UserError(f"{lora.option} {lora.file}: {problem}")


# --------------------------------------------------------------------------------------------------
# Merging


def merge(changes, device, name, tensor):
    """The transformer's tensor `name` with all changes to it, in float32 on `device`; the tensor
    itself if there are none."""
    if name not in changes:
        return tensor
    merged = tensor.to(device).float()
    for change in changes[name]:
        with model.opened(change.file) as tensors:
            parts = {}
            for part, key in change.parts.items():
                parts[part] = tensors.get_tensor(key).to(device).float()
        if "difference" in parts:
            merged = merged + change.weight * parts["difference"]
        if "up" in parts:
            up = parts["up"].flatten(1)
            down = parts["down"].flatten(1)
            scale = change.weight * alpha_over_rank(change, parts)
            merged = merged + scale * (up @ down).view_as(merged)
    return merged


def alpha_over_rank(change, parts):
    rank = parts["down"].shape[0]
    if "alpha" in parts:
        return parts["alpha"].item() / rank
    if change.alpha is not None:
        return change.alpha / rank
    return 1.0
