"""What each trap of a port costs: `python tests/port/port_traps.py` walks into one after the other,
in a copy of tests/port/port_numpy.py, and prints how far the refined latents of the reference set
`odd` are off without cache, and where tests/port/port_check.py sees it first. Those of the VAE,
which the port has not, are walked into in a copy of model.py.
"""

import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
TESTS = HERE.parent
sys.path[:0] = [str(HERE), str(TESTS), str(TESTS.parent)]
import port_check
import port_numpy
from port_check import off
from references import as_clip, load

import freeswim

# name: the value that port_check finds first, then what is replaced in the port by what
TRAPS = {
    "tokens in (t, h, w) order, positions and windows in (h, w, t)": (
        "dit.patches",
        (".transpose(2, 4, 1, 0, 3, 5)", ".transpose(1, 2, 4, 0, 3, 5)"),
        (
            "patches.reshape(*grid[1:], frames, 2, 2, 16).transpose(5, 2, 0, 3, 1, 4)",
            "patches.reshape(*grid, 2, 2, 16).transpose(5, 0, 1, 3, 2, 4)",
        ),
    ),
    "the rotary split with its longest part last, not first": (
        "dit.rotary.cos",
        (
            "split = head_dim - 2 * share, share, share",
            "split = share, share, head_dim - 2 * share",
        ),
    ),
    "a rotation of halves instead of neighbouring pairs": (
        "dit.block0.key.rotated",
        (
            "(x[..., 0::2] + 1j * x[..., 1::2])",
            "(x[..., : x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2 :])",
        ),
        (
            "np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)",
            "np.concatenate([pairs.real, pairs.imag], -1)",
        ),
    ),
    "query and key normalised head by head": (
        "dit.block0.key.norm",
        (
            'rms_norm(y, weights[f"{block}.attn1.norm_{part}.weight"])',
            "rms_norm(y.reshape(len(y), heads, -1),"
            ' weights[f"{block}.attn1.norm_{part}.weight"].reshape(heads, -1)).reshape(y.shape)',
        ),
    ),
    "a window of native size, though that is even": (
        "dit.block0.attended",
        ("size = min(2 * (native_size // 2) + 1, length)", "size = min(native_size, length)"),
    ),
    "a window that is clipped at the borders": (
        "dit.block0.attended",
        (
            "top : top + rows, left : left + columns",
            "max(h - rows // 2, 0) : h + rows // 2 + 1, "
            "max(w - columns // 2, 0) : w + columns // 2 + 1",
        ),
    ),
    "the ordinary attention scale": (
        "dit.block0.attended",
        (
            'math.sqrt(math.log(2 * tokens, tokens) / config["attention_head_dim"])',
            'config["attention_head_dim"] ** -0.5',
        ),
    ),
    "the window path's own cross-attention": (
        "dit.block0.cross_attention",
        (
            'note_here("cross_attention", content)',
            'note_here("cross_attention", content := cross_attention('
            "weights, block, window, text, heads))",
        ),
    ),
    "noise levels that begin at 1, not at 0.999": (
        "unipc.levels",
        (
            "levels = 0.999 * (1 - np.arange(steps) / steps)",
            "levels = 0.999999 * (1 - np.arange(steps) / steps)",
        ),
    ),  # at 1 itself, the solver divides by 0
    "noise levels truncated like the timesteps": (
        "unipc.levels",
        (".astype(np.float32).astype(np.float64)", " // 0.001 / 1000"),
    ),
    "a timestep that is not truncated": (
        "refine.step0",
        ("int(1000 * levels[index])", "1000 * levels[index]"),
    ),
    "the negative prompt with the full path, despite the cache": (
        "refine.cache3",
        ("cache_interval is None)\n", "index % (cache_interval or 1) == 0)\n"),
    ),
}


def altered(file, *changes):
    """The module in a file, with parts of its text replaced."""
    text = Path(file).read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, f"{file} has {text.count(old)} of {old}"
        text = text.replace(old, new)
    module = ModuleType(Path(file).stem)
    module.__file__ = str(file)
    exec(compile(text, str(file), "exec"), module.__dict__)
    return module


def without_zeros(port):
    """How far the refinement is off if, of a text of 7 tokens, the zeros after it are cut off;
    masking is the same."""
    weights, config, meta, given = port.load()
    run = partial(port.refine, weights, config, meta, given["init_latents"])
    text, negative = (given[name] * (np.arange(12) < 7)[:, None] for name in ("text", "negative"))
    (*_, right), (*_, wrong) = run(text, negative), run(text[:7], negative[:7])
    return off(wrong, right)


@torch.no_grad()
def vae_traps():
    """What each trap makes of a clip, and what it should be."""
    case = load("wide")
    wrong = altered(
        TESTS.parent / "model.py",
        (
            "torch.zeros_like(first).expand(-1, -1, 2, -1, -1)",
            "first.expand(-1, -1, 2, -1, -1)",
        ),
    )
    vae = wrong.WanVAE.from_pretrained(TESTS / "reference" / "wide" / "vae")
    latents, clip = case.expected["nocache.latents"], as_clip(case.expected["video"])
    yield (
        "temporal upsampling that remembers frame 0, not zeros",
        vae.decode(latents),
        case.vae.decode(latents),
    )
    frames = clip[0].transpose(0, 1)
    resize = partial(F.interpolate, frames, (208, 364), mode="bilinear")
    right = freeswim.upsample(clip, 208, 364)[0].transpose(0, 1)
    yield "upsampling with aligned corners", resize(align_corners=True), right
    yield "upsampling with antialiasing", resize(align_corners=False, antialias=True), right
    yield "upsampling bicubically", F.interpolate(frames, (208, 364), mode="bicubic"), right


def main():
    print("| trap | refined latents off by | port_check sees first |\n|---|---|---|")
    right = port_numpy.steps()
    for name, (_, *changes) in TRAPS.items():
        steps = altered(HERE / "port_numpy.py", *changes).steps()
        end = "refine.cache3" if "cache" in name else "refine.step4"
        print(
            f"| {name} | {off(steps[end], right[end]):.1e} | `{port_check.compare(steps)[0][1]}` |"
        )
    print(f"| the zeros after the text cut off, or masked | {without_zeros(port_numpy):.1e} | |")
    for name, wrong, right in vae_traps():
        print(f"| {name} | clip: {off(wrong.numpy(), right.numpy()):.1e} | |")


if __name__ == "__main__":
    main()
