"""The two reference sets, `reference/wide` and `reference/odd`: what the authors' code computed, in
float32 on a CPU, with two tiny random models. The authors hard-code 1560 native tokens, whatever
the model; so `scale_tokens` is 1560."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from oracle import seeded
from safetensors import safe_open
from safetensors.torch import load_file

from freeswim import attention_scale, dense_window, refine, window_size
from model import WanTransformer, WanVAE, full_attention

REFERENCE = Path(__file__).parent / "reference"


def names(case):
    """Of the expected tensors of a set."""
    with safe_open(REFERENCE / case / "expected.safetensors", "pt") as tensors:
        return sorted(tensors.keys())


REFINEMENTS = [
    (case, name) for case in ("wide", "odd") for name in names(case) if name.endswith(".latents")
]


def interval_of(tensor):
    """The cache interval of a refinement: of "cache5.latents" 5, of "nocache.latents" None."""
    return (
        None
        if tensor == "nocache.latents"
        else int(tensor.removeprefix("cache").removesuffix(".latents"))
    )


def load(name):
    """A reference set: its models, its expected tensors, and what the authors' settings make of
    them."""
    folder = REFERENCE / name
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    transformer = WanTransformer.from_pretrained(folder / "transformer")
    scale = attention_scale(transformer.head_dim, meta["attention_base_tokens"])
    rows, columns = meta["native"]
    window = (window_size(rows), window_size(columns))
    return SimpleNamespace(
        meta=meta,
        expected=load_file(folder / "expected.safetensors"),
        transformer=transformer,
        vae=WanVAE.from_pretrained(folder / "vae"),
        window_size=window,
        window=dense_window(tuple(meta["grid"]), window, scale=scale),
        full=partial(full_attention, scale=scale),
    )


def refined(case, latents=None, **options):
    """The refinement with the settings of the reference set, but for `options`."""
    meta = case.meta
    expected = case.expected
    settings = {
        name: meta[name] for name in ("native", "steps", "strength", "flow_shift", "guidance")
    }
    settings |= {
        "scale_tokens": meta["attention_base_tokens"],
        "generator": seeded(meta["noise_seed"]),
    }
    latents = expected["encoded"] if latents is None else latents
    return refine(
        case.transformer, latents, expected["text"], expected["negative"], **(settings | options)
    )


def as_clip(video):
    """uint8 (F, H, W, 3) to (1, 3, F, H, W) in [-1, 1]."""
    return video.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
