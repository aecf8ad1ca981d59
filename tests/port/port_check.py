"""Compares a port with the reference: `python tests/port/port_check.py YOURS.safetensors`.

Put into YOURS whatever you have, by the names of tests/reference/README.md. A batch of one may
stay, and any floating-point dtype. There is a line for each tensor. What is wrong comes first, in
the order of the computation, with the place in our code to look at; names that are not known come
after what is right. The last lines count what is right, wrong and not given. Exits with 0 if
nothing is wrong, with 1 if anything is, with 2 if the file cannot be compared. Needs the packages
numpy and safetensors.
"""

import difflib
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
    from safetensors import SafetensorError, deserialize, safe_open
    from safetensors.numpy import load_file
except ImportError as error:
    print(f"port_check.py: {error}; pip install numpy safetensors", file=sys.stderr)
    sys.exit(2)

PORT = Path(__file__).parent
REFERENCE = PORT.parent / "reference"

# What names begin with: relative errors, as tests/port/README.md explains them.
LIMITS = {
    "norm.": 1e-5,
    "umt5.": 2e-5,
    "upsampled": 1e-5,
    "vae.": 3e-5,
    "dit.patches": 1e-5,
    "dit.text": 1e-5,
    "dit.rotary.": 1e-5,
    "rotary.far.": 1e-6,
    "unipc.": 2e-6,
    "encoded": 3e-5,
    "decoded": 1e-4,
    "base.": 1e-4,
    "refine.": 1e-4,
    "": 5e-5,
}
ROUNDING = {"BF16": 4e-3, "F16": 5e-4}  # at least so much is allowed for tensors of these dtypes
ZERO_LIMIT = 1e-6  # where the reference is all zeros, absolute

PLACES = {  # what names begin with: where our code computes it
    r"umt5\.(ids|mask)": "model.py: tokenize",
    r"umt5\.embedded": "model.py: TextEncoder.forward",
    r"umt5\.bias": "model.py: position_bias",
    r"umt5\.layer": "model.py: TextLayer.attention, position_bias",
    r"umt5\.final": "model.py: TextEncoder.forward",
    r"umt5\.text": "model.py: encode_prompt",
    r"umt5\.small": "model.py: TextLayer.__init__, TextEncoder.__init__; epsilons of norms",
    r"norm\.(input|layer|rms)": "model.py: modulate, Attention.__init__",
    r"norm\.vae": "model.py: ChannelNorm",
    r"upsampled": "freeswim.py: upsample",
    r"vae\.video": "tests/port/write_steps.py: vae_steps",
    r"vae\.encode\.downsample": "model.py: Downsample",
    r"vae\.encode\.": (
        "model.py: WanVAE.encode_chunk, ResidualBlock, FrameAttention, CausalConv3d, Downsample"
    ),
    r"vae\.encoded": "model.py: WanVAE.encode; the posterior mean, normalised",
    r"vae\.decode\.upsample": "model.py: Upsample",
    r"vae\.decode\.": (
        "model.py: WanVAE.decode_chunk, ResidualBlock, FrameAttention, CausalConv3d, Upsample"
    ),
    r"vae\.decoded": "model.py: WanVAE.decode; clamped to [-1, 1]",
    r"vae\.(tiled|strip)\.": "model.py: tiles_along_axis, blending_weight",
    r"mask": "freeswim.py: window_mask",
    r"dit\.patches": "model.py: WanTransformer.embed; tokens stand in (h, w, t) order",
    r"dit\.(time|modulation|text)": "model.py: WanTransformer.embed",
    r"dit\.rotary": "model.py: rotary_table",
    r"dit\.block0\.(full\.)?modulated": "model.py: Block.self_attention, modulate",
    r"dit\.block0\.(full\.)?(query\.linear|key\.linear|value)": "model.py: Attention.forward",
    r"dit\.block0\.(full\.)?(query|key)\.norm": (
        "model.py: Attention.forward; the norms span all heads"
    ),
    r"dit\.block0\.(full\.)?(query|key)\.rotated": "model.py: apply_rotary",
    r"dit\.block0\.attended": "freeswim.py: window_mask, dense_window, attention_scale",
    r"dit\.block0\.full\.attended": "model.py: full_attention; freeswim.py: attention_scale",
    r"dit\.block0\.(full\.)?self_attention": "model.py: Block.self_attention",
    r"dit\.block0\.cross": (
        "model.py: Block.cross_attention; freeswim.py: predict_dual, of the full path"
    ),
    r"dit\.block0\.ffn": "model.py: Block.feed_forward_chunk",
    r"dit\.block\d+\.(full|window)_tokens": "freeswim.py: predict_dual; model.py: Block",
    r"dit\.unpatchify": "model.py: WanTransformer.final_layer",
    r"dit\.velocity": "model.py: WanTransformer.unembed",
    r"dual_full": "model.py: WanTransformer.forward",
    r"(dual|guide)_window": "freeswim.py: predict_dual",
    r"(reuse|window_only)_": "freeswim.py: predict_cached; model.py: WanTransformer.forward",
    r"zeros\.velocity": "model.py: Block.cross_attention; zeros after the text are seen",
    r"small\.(modulated|ffn|velocity)": "model.py: modulate; its epsilon",
    r"small\.(query|key|cross\.key)\.norm": "model.py: Attention.__init__; epsilons of the norms",
    r"small\.cross\.query\.norm": "model.py: Block.cross_attention, Attention.__init__; epsilons",
    r"bfloat16\.velocity": "model.py: read_weights; stored in bfloat16, computed in float32",
    r"rotary\.far": "model.py: rotary_angles; angles in float64",
    r"unipc\.(levels|timesteps)": "freeswim.py: FlowUniPC.__init__",
    r"unipc\.latents": "freeswim.py: FlowUniPC.step, predictor, corrector",
    r"(base|refine)\.noise": "freeswim.py: draw_noise; an input",
    r"base\.step": "freeswim.py: generate; with the ordinary attention scale",
    r"encoded": "model.py: WanVAE.encode",
    r"init_latents": "freeswim.py: FlowUniPC.add_noise",
    r"refine\.step": "freeswim.py: refine",
    r"decoded": "model.py: WanVAE.decode",
    r"refine\.(cache|ids)|cache\d+\.latents": (
        "freeswim.py: refine, steps_that_read_cache, predict_cached"
    ),
    r"nocache\.": "freeswim.py: refine",
    r"(latents|timestep)(_next)?|text|negative|video": "tests/reference/README.md: an input",
}


class Line(NamedTuple):
    name: str
    wrong: bool
    text: str


# --------------------------------------------------------------------------------------------------
# Reading


@cache
def reference():
    """What a port has to get right, {name: array}, in the order of the computation."""
    file = PORT / "steps.safetensors"
    with safe_open(file, "np") as steps:
        order = json.loads(steps.metadata()["order"])
    odd = load_file(REFERENCE / "odd" / "expected.safetensors")
    known = odd | load_file(file)
    known["refine.cache3"] = odd["cache3.latents"]
    for index, latents in enumerate(odd["nocache.trace"]):
        known[f"refine.step{index}"] = latents
    return {name: known[name] for name in order}


def other_tensors():
    """What can be compared as well: inputs, and values that have another name too."""
    odd = load_file(REFERENCE / "odd" / "expected.safetensors")
    required = reference()
    return {name: value for name, value in odd.items() if name not in required}


def place_of(name):
    """Where our code computes a value."""
    for pattern, place in PLACES.items():
        if re.match(pattern, name):
            return place
    raise KeyError(name)


DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_port(file):
    """{name: float64 array} of a port's file, and {name: dtype in the file}. Raises ValueError for
    what cannot be compared."""
    port = {}
    dtypes = {}
    for name, entry in deserialize(Path(file).read_bytes()):
        dtype = entry["dtype"]
        data = bytes(entry["data"])
        if dtype == "BF16":  # the upper half of a float32
            upper = np.frombuffer(data, np.uint16).astype(np.uint32)
            value = (upper << 16).view(np.float32)
        elif dtype in DTYPES:
            value = np.frombuffer(data, DTYPES[dtype])
        else:
            raise ValueError(f"{name} is of dtype {dtype}; write real numbers, such as float32")
        port[name] = value.reshape(entry["shape"]).astype(np.float64)
        dtypes[name] = dtype
    if not port:
        raise ValueError("it holds no tensors; write those that you have")
    return port, dtypes


# --------------------------------------------------------------------------------------------------
# Comparing


def off(actual, expected):
    """The norm of the difference over that of what is expected; the largest difference where that
    is all zeros."""
    size = np.linalg.norm(expected)
    if size == 0:
        return np.abs(actual).max()
    return np.linalg.norm(actual - expected) / size


def compare(port, dtypes=None):
    """A Line for each array of a port: what is wrong, what is right, what is not known. `dtypes`
    are those in which they were stored, by default float32."""
    dtypes = dtypes or {}
    known = reference() | other_tensors()
    wrong = []
    right = []
    for name, expected in known.items():
        if name not in port:
            continue
        actual = np.asarray(port[name], np.float64)
        line = compare_one(name, actual, expected.astype(np.float64), dtypes.get(name))
        if line.wrong:
            wrong.append(line)
        else:
            right.append(line)
    unknown = []
    for name in sorted(port.keys() - known.keys()):
        unknown.append(Line(name, False, f"unknown {name}: {hint_for(name, known)}"))
    return wrong + right + unknown


def hint_for(name, known):
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if closest:
        return f"is it {closest[0]}?"
    return "tests/reference/README.md has all names"


def compare_one(name, actual, expected, dtype=None):
    place = place_of(name)
    if without_batch(actual.shape) != without_batch(expected.shape):
        text = f"WRONG {name}: is {actual.shape}, should be {expected.shape}; see {place}"
        return Line(name, True, text)
    actual = actual.reshape(expected.shape)
    not_finite = ~np.isfinite(actual)
    if not_finite.any():
        first = tuple(map(int, np.argwhere(not_finite)[0]))
        count = not_finite.sum()
        text = f"WRONG {name}: {count} of {actual.size} are not finite, first {first}; see {place}"
        return Line(name, True, text)
    error = off(actual, expected)
    limit = limit_of(name) if expected.any() else ZERO_LIMIT
    limit = max(limit, ROUNDING.get(dtype, 0))
    figures = f"{format_error(error, limit)} off, at most {limit:.0e}"
    if error <= limit:
        return Line(name, False, f"right {name}: {figures}")
    return Line(name, True, f"WRONG {name}: {figures}; see {place}")


def format_error(error, limit):
    """An error with as many digits as tell it from its limit."""
    if f"{error:.1e}" == f"{limit:.1e}" and error != limit:
        return f"{error:.3e}"
    return f"{error:.1e}"


def limit_of(name):
    for beginning, limit in LIMITS.items():
        if name.startswith(beginning):
            return limit


def without_batch(shape):
    """A shape without leading dimensions of one, because a batch of one may stay."""
    shape = list(shape)
    while shape and shape[0] == 1:
        del shape[0]
    return shape


def summary(lines, port):
    """The last lines: how many are right, wrong and not given, and the names of these."""
    required = reference()
    missing = [name for name in required if name not in port]
    wrong = sum(line.wrong for line in lines)
    right = sum(line.text.startswith("right ") for line in lines)
    text = f"{right} right, {wrong} wrong, {len(missing)} of {len(required)} not given"
    if missing:
        text += f":\n{', '.join(shorten(missing))}"
    return text


def shorten(names):
    """Names, of which those of one chunk's history are one: vae.encode.history0.*"""
    found = {}
    for name in names:
        match = re.match(r"vae\.\w+\.history\d\.", name)
        found[f"{match[0]}*" if match else name] = True
    return list(found)


def main(arguments):
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("port_check.py: give one safetensors file, or --help", file=sys.stderr)
        return 2
    file = arguments[0]
    try:
        port, dtypes = read_port(file)
    except OSError as error:
        print(f"port_check.py: {file}: {error.strerror}", file=sys.stderr)
        return 2
    except (SafetensorError, ValueError) as error:
        message = " ".join(str(error).split())
        print(f"port_check.py: {file}: {message:.300}", file=sys.stderr)
        return 2
    lines = compare(port, dtypes)
    for line in lines:
        print(line.text)
    print(summary(lines, port))
    return int(any(line.wrong for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
