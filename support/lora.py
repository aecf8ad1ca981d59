"""LoRA files, merged into the transformer's weights while they are read.

A LoRA adds weight * alpha / rank * up @ down to a matrix. Files name these parts in several ways:
those of Diffusers and PEFT, of Wan's own code (with a prefix in ComfyUI, DiffSynth and VideoX-Fun),
and of kohya-ss's trainers. No name is taken apart: every tensor of the transformer lists what it
may be called. What is wrong is found from the files' headers, before a tensor is read; only numbers
that are not finite show later.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

import model
from support import UserError
from support.hub import fingerprint_of_file, fingerprint_of_text, hub_problem

PREFIXES = ("base_model.model.", "pipe.dit.", "transformer.", "diffusion_model.", "model.")
KINDS = {  # how a name ends: the tensor that is changed, and which part of the change this is
    ".lora_A.weight": (".weight", "down"),
    ".lora_B.weight": (".weight", "up"),
    ".lora_B.bias": (".bias", "bias of up"),
    ".lora_down.weight": (".weight", "down"),
    ".lora_up.weight": (".weight", "up"),
    ".lora.down.weight": (".weight", "down"),
    ".lora.up.weight": (".weight", "up"),
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
    "modules_to_save": "a LoRA that replaces modules",
}
ELSEWHERE = {  # parts of names: what they belong to, in other models
    "lora_te": "the text encoder, to which no LoRA is applied",
    "text_encoder": "the text encoder, to which no LoRA is applied",
    "k_img": "the image layers of an image-to-video model",
    "v_img": "the image layers of an image-to-video model",
    "add_k_proj": "the image layers of an image-to-video model",
    "add_v_proj": "the image layers of an image-to-video model",
    "img_emb": "the image layers of an image-to-video model",
    "image_embedder": "the image layers of an image-to-video model",
    "vace": "the control layers of a VACE model",
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
ADAPTER = "adapter_model.safetensors"  # as PEFT saves a LoRA, with its settings next to it:
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Lora:
    """A file that --lora or --lora-2 names."""

    option: str  # which of them
    file: Path
    weight: float
    name: str = ""  # as recorded: the file, or what it is called on the hub
    config: Path | None = None  # PEFT's settings, if they are in a file of their own

    def fingerprint(self):
        found = fingerprint_of_file(self.file)
        if self.config is not None:
            found = fingerprint_of_text(found + fingerprint_of_file(self.config))
        return found


@dataclass(frozen=True)
class Settings:
    """What a file's metadata, or PEFT's file next to it, says of alpha. Without it, alpha is what
    the file's own tensors say, or the rank."""

    alpha: float | None = None
    rank: float | None = None  # for which that alpha is meant, if it is said
    alpha_pattern: tuple = ()  # pairs of a pattern for modules' names, and their alpha
    divides_by_root: bool = False  # rsLoRA: alpha / sqrt(rank)


@dataclass(frozen=True)
class Change:
    """What one file adds to one tensor."""

    lora: Lora
    parts: dict  # {"down", "up", "bias of up", "alpha" or "difference": name in the file}
    alpha: float | None  # unless it is one of the parts; None: the rank
    rank: int  # of up @ down
    divides_by_root: bool


# --------------------------------------------------------------------------------------------------
# Options


def parse(option, written):
    """FILE or FILE:WEIGHT as (name, weight). Raises UserError for a weight that is not a number."""
    name, colon, number = written.rpartition(":")
    if not colon or written.endswith(".safetensors"):
        return written, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        if Path(written).exists():
            return written, 1.0
        raise UserError(f"{option} {written}: the weight {number} is not a number")
    return name, weight


def absolute(option, written):
    """The same, with the path of a local file absolute and the weight in full. Raises UserError if
    there is no such file, and it is no name of one on the hub."""
    name, weight = parse(option, written)
    if Path(name).exists():
        return f"{Path(name).absolute()}:{weight!r}"
    if name_on_hub(name) is None:
        raise UserError(
            f"{option} {name}: no such file; give a .safetensors file, a folder of PEFT, or a file "
            "of the hub as owner/name/file.safetensors"
        )
    return f"{name}:{weight!r}"


def name_on_hub(name):
    """(repository, file) of owner/name/file.safetensors, or None."""
    match = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)/(.+\.safetensors)", name)
    return None if match is None else match.groups()


def find(option, written):
    """The Lora that an option names, fetched from the hub if it is there."""
    name, weight = parse(option, written)
    file = Path(name)
    if not file.exists():
        return fetch(option, name, weight)
    if file.is_dir():
        if not (file / ADAPTER).is_file():
            raise UserError(f"{option} {name}: is a folder without PEFT's {ADAPTER}; give a file")
        file = file / ADAPTER
    settings = file.with_name(ADAPTER_CONFIG)
    config = settings if settings.is_file() and is_of_peft(option, file) else None
    return Lora(option, file, weight, name, config)


def is_of_peft(option, file):
    """Whether PEFT wrote a file, so the settings next to it are its own."""
    if file.name == ADAPTER:
        return True
    try:
        names = model.read_header(file)
    except model.CheckpointError as error:
        raise UserError(f"{option} {error}") from None
    return any(name.startswith("base_model.model.") for name in names)


def fetch(option, name, weight):
    found = name_on_hub(name)
    if found is None:
        raise UserError(f"{option} {name}: no such file")
    repository, path = found
    config = None
    try:
        file = Path(hf_hub_download(repository, path))
        if file.name == ADAPTER:
            config = fetch_config(repository, path)
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {name}: no such file, and {hub_problem(error, None)}") from None
    return Lora(option, file, weight, name, config)


def fetch_config(repository, path):
    try:
        return Path(hf_hub_download(repository, path.removesuffix(ADAPTER) + ADAPTER_CONFIG))
    except EntryNotFoundError:
        return None


# --------------------------------------------------------------------------------------------------
# Names


def names_in_files(transformer):
    """What the tensors of a transformer are called in LoRA files, {name: ours}."""
    names = {}
    for ours in transformer.state_dict():
        wan = "head.modulation" if ours == "scale_shift_table" else ours
        for part, theirs in WAN_NAMES.items():
            wan = wan.replace(part, theirs)
        diffusers = model.checkpoint_name(type(transformer), ours)
        for name in (diffusers, wan):
            names[name] = ours
            module, _, end = name.rpartition(".")
            kohya = module.replace(".", "_")
            names[f"lora_unet_{kohya}.{end}"] = ours
            names[f"lora_unet__{kohya}.{end}"] = ours  # VideoX-Fun
            names[f"lora_transformer_{kohya}.{end}"] = ours
    return names


def without_prefixes(key):
    """A name without its prefixes, of which some files have two in a row."""
    shorter = key
    for prefix in PREFIXES:
        shorter = shorter.removeprefix(prefix)
    if shorter != key:
        return without_prefixes(shorter)
    return key


def find_target(key, names):
    """Our tensor that an entry of a file changes, and which part of the change it is; None and the
    part if there is no such tensor, None and None if it is no part of a LoRA."""
    name = re.sub(r"\.(lora_[AB])\.[^.]+\.(weight|bias)$", r".\1.\2", key)  # an adapter's name
    name = without_prefixes(name)
    for ending, (tensor_ending, part) in KINDS.items():
        if name.endswith(ending):
            return names.get(name.removesuffix(ending) + tensor_ending), part
    return None, None


# --------------------------------------------------------------------------------------------------
# Finding and checking


def find_all_changes(transformer, loras):
    """`find_changes` for {part of the model: [Lora]}."""
    return {part: find_changes(transformer, files) for part, files in loras.items()}


def find_changes(transformer, loras):
    """What files add to which tensors of a transformer, {our name: [Change]}. Only headers are
    read. Raises UserError, naming file and entry, for what cannot be merged exactly."""
    names = names_in_files(transformer)
    shapes = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    changes = {}
    for lora in loras:
        header, settings = read_file(lora)
        grouped = group_by_tensor(lora, header, names)
        for ours, parts in grouped.items():
            check_parts(lora, parts, header, shapes[ours])
            if "bias of up" in parts:  # it is scaled as the matrices are
                weight = ours.removesuffix("bias") + "weight"
                parts = with_scale_of(lora, parts, grouped.get(weight, {}))
            changes.setdefault(ours, []).append(make_change(lora, settings, parts, header))
    return changes


def with_scale_of(lora, parts, matrices):
    """The parts of a bias, with those of the matrices that its scale depends on."""
    if "down" not in matrices:
        refuse(lora, f"{parts['bias of up']} is there, but not its matrices")
    found = dict(parts)
    for part in ("down", "alpha"):
        if part in matrices:
            found[part] = matrices[part]
    return found


def make_change(lora, settings, parts, header):
    if "down" not in parts:
        return Change(lora, parts, None, 1, False)
    down = parts["down"]
    rank = header[down][0]
    if settings.rank is not None and settings.rank != rank:
        refuse(lora, f"its metadata says rank {settings.rank:g}, but {down} has {rank}")
    module = without_prefixes(down).partition(".lora")[0]
    alpha = settings.alpha
    for pattern, value in settings.alpha_pattern:
        if re.match(rf"(.*\.)?({pattern})$", module):  # as in PEFT
            alpha = value
            break
    return Change(lora, parts, alpha, rank, settings.divides_by_root)


def read_file(lora):
    """Shapes by name, and the Settings."""
    try:
        header = model.read_header(lora.file)
        with model.opened(lora.file) as tensors:
            metadata = tensors.metadata() or {}
    except model.CheckpointError as error:
        raise UserError(f"{lora.option} {error}") from None
    shapes = {}
    for name, (dtype, shape) in header.items():
        is_alpha = name.endswith(".alpha")
        if dtype not in model.FLOATS and not (is_alpha and dtype in INTEGERS):
            refuse(lora, f"{name} is {dtype}, {model.kind_of_numbers(dtype)}")
        shapes[name] = shape
    return shapes, find_settings(lora, metadata)


INTEGERS = ("I64", "I32", "I16", "I8", "U8")  # an alpha may be one


def find_settings(lora, metadata):
    """The Settings that PEFT's file, Diffusers' metadata or plain metadata give. Raises UserError
    for kinds of LoRA that they name and that are not supported."""
    if lora.config is not None:
        try:
            return settings_of(lora, model.read_json(lora.config))
        except model.CheckpointError as error:
            raise UserError(f"{lora.option} {error}") from None
    config = {}
    if "lora_adapter_metadata" in metadata:  # Diffusers writes PEFT's settings there, as JSON
        try:
            entries = json.loads(metadata["lora_adapter_metadata"])
            config = {key.removeprefix("transformer."): value for key, value in entries.items()}
        except (ValueError, AttributeError, RecursionError):
            refuse(lora, "its metadata cannot be read")
    elif "lora_alpha" in metadata:
        config = {"lora_alpha": metadata["lora_alpha"]}
    elif "alpha" in metadata and "rank" in metadata:
        config = {"lora_alpha": metadata["alpha"], "rank": metadata["rank"]}
    return settings_of(lora, config)


# PEFT's settings with which a merged LoRA would not be exact, if they say anything.
REFUSED_SETTINGS = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "modules_to_save": "modules that are replaced",
    "layer_replication": "layers that are repeated",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "LoRA of parameters",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "fan_in_fan_out": "transposed matrices",
}
# With another start, training changed the weights as well as the LoRA.
STARTS_FROM_THE_WEIGHTS = (True, False, None, "gaussian", "default", "eva", "orthogonal")


def settings_of(lora, config):
    """The Settings of PEFT's LoraConfig, {field: value}."""
    kind = config.get("peft_type") or "LORA"
    if kind != "LORA":
        refuse(lora, f"is a {kind!s:.40}, which is not supported; LORA is")
    for field, meaning in REFUSED_SETTINGS.items():
        if config.get(field):
            refuse(lora, f"is trained with {field} ({meaning}), which is not supported")
    start = config.get("init_lora_weights")
    if start not in STARTS_FROM_THE_WEIGHTS:
        refuse(lora, f"is trained with init_lora_weights {start!r:.40}, which is not supported")
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        refuse(lora, f"its alpha_pattern is {pattern!r:.40}")
    for field in ("use_rslora", "alpha_pattern"):
        if config.get(field) and config.get("lora_alpha") is None:
            refuse(lora, f"its metadata has {field}, but no lora_alpha")
    pairs = []
    for modules, value in pattern.items():
        try:
            re.compile(modules)
        except re.error:
            refuse(lora, f"its alpha_pattern has {modules!r:.40}, which is no pattern")
        pairs.append((modules, to_number(lora, "alpha_pattern", value)))
    return Settings(
        alpha=to_number(lora, "lora_alpha", config.get("lora_alpha")),
        rank=to_number(lora, "rank", config.get("rank")),
        alpha_pattern=tuple(pairs),
        divides_by_root=bool(config.get("use_rslora")),
    )


def to_number(lora, name, value):
    if value is None:
        return None
    try:
        number = float(value)
    except (ValueError, TypeError):
        number = math.nan
    if not math.isfinite(number):
        refuse(lora, f"its metadata has {name} {value!r:.40}, which is not a number")
    return number


def group_by_tensor(lora, header, names):
    """{our name: {part: name in the file}}."""
    for key in header:
        for part, kind in UNSUPPORTED.items():
            if part in key:
                refuse(lora, f"{key} is of {kind}, which is not supported")
    for key in header:
        for part, kind in ELSEWHERE.items():
            if part in key:
                refuse(lora, f"{key} is for {kind}; it is of another model")
    targets = {key: find_target(key, names) for key in header}
    if all(part in (None, "alpha") for _, part in targets.values()):
        refuse(lora, f"holds no LoRA, but {list(header)!s:.200}")
    grouped = {}
    for key, (ours, part) in targets.items():
        if ours is None:
            refuse(lora, f"{key} fits nothing in this transformer; is it for another model?")
        parts = grouped.setdefault(ours, {})
        if part in parts:
            refuse(lora, f"{key} and {parts[part]} are the same")
        parts[part] = key
    return grouped


def check_parts(lora, parts, header, wanted):
    """Raise UserError unless the parts make a change of the shape that is wanted."""
    for part in ("difference", "bias of up"):
        if part in parts and header[parts[part]] != wanted:
            refuse(lora, f"{parts[part]} is {header[parts[part]]}, but should be {wanted}")
    if "alpha" in parts and math.prod(header[parts["alpha"]]) != 1:
        refuse(lora, f"{parts['alpha']} is {header[parts['alpha']]}, but should be one number")
    if "up" not in parts and "down" not in parts:
        if "alpha" in parts and "difference" not in parts:
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
    if down[0] == 0:
        refuse(lora, f"{parts['down']} {down} has rank 0")
    made = (up[0], math.prod(down[1:]))
    if made != (wanted[0], math.prod(wanted[1:])):
        refuse(lora, f"{parts['up']} {up} by {down} does not fit a tensor of {wanted}")


def refuse(lora, problem):
    raise UserError(f"{lora.option} {lora.file}: {problem}")


# --------------------------------------------------------------------------------------------------
# Merging


def merge(changes, device, name, tensor):
    """The transformer's tensor `name` with all changes to it, in float32 on `device`; the tensor
    itself if there are none. Raises UserError, naming the LoRA, for numbers that are not finite."""
    if name not in changes:
        return tensor
    merged = tensor.to(device).float()
    for change in changes[name]:
        parts = read_parts(change, device)
        if "difference" in parts:
            merged = merged + change.lora.weight * parts["difference"]
        if "up" in parts:
            up = parts["up"].flatten(1)
            down = parts["down"].flatten(1)
            merged = merged + scale_of(change, parts) * (up @ down).view_as(merged)
        if "bias of up" in parts:
            merged = merged + scale_of(change, parts) * parts["bias of up"]
        if not model.is_finite(merged):
            refuse(
                change.lora,
                f"changes {name} to numbers that are not finite; is its weight, "
                f"{change.lora.weight:g}, too large?",
            )
    return merged


def read_parts(change, device):
    """The parts of a change, {part: float32 tensor}."""
    parts = {}
    with model.opened(change.lora.file) as tensors:
        for part, key in change.parts.items():
            parts[part] = tensors.get_tensor(key).to(device).float()
            if not model.is_finite(parts[part]):
                refuse(change.lora, f"{key} holds numbers that are not finite")
    return parts


def scale_of(change, parts):
    """What multiplies up @ down."""
    if "alpha" in parts:
        alpha = parts["alpha"].item()
    elif change.alpha is not None:
        alpha = change.alpha
    else:
        return change.lora.weight
    divisor = math.sqrt(change.rank) if change.divides_by_root else change.rank
    return change.lora.weight * alpha / divisor
