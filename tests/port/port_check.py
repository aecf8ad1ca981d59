"""Compares a port's tensors with the reference: `python tests/port/port_check.py YOUR.safetensors`.

Put into YOUR file whatever you have, by the names of tests/reference/README.md; a batch of one may
stay. There is a line for each: what is wrong comes first, and of that what is computed first, with
the place in our code to look at. Exits with 1 if anything is wrong, with 2 if there is nothing to
compare.
"""

import re
import sys
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

PORT = Path(__file__).parent
REFERENCE = PORT.parent / "reference"
PLACES = {  # in the order of the computation: what the names begin with, and where our code does it
    r"umt5\.(ids|mask)": "model.py: tokenize",
    r"umt5\.embedded": "model.py: TextEncoder.forward",
    r"umt5\.layer": "model.py: TextLayer.attention, position_bias",
    r"umt5\.final": "model.py: TextEncoder.forward",
    r"vae\.video": "tests/port/write_steps.py: vae_steps",
    r"vae\.encode\.(chunk|history)": "model.py: WanVAE.encode_chunk, CausalConv3d, Downsample",
    r"vae\.decode\.(chunk|history)": "model.py: WanVAE.decode_chunk, CausalConv3d, Upsample",
    r"unipc\.levels": "freeswim.py: FlowUniPC.__init__",
    r"dit\.patches": "model.py: WanTransformer.embed; tokens stand in (h, w, t) order",
    r"dit\.time": "model.py: WanTransformer.embed",
    r"dit\.modulation": "model.py: WanTransformer.embed",
    r"dit\.text": "model.py: WanTransformer.embed",
    r"dit\.rotary": "model.py: rotary_table",
    r"dit\.block0\.modulated": "model.py: Block.self_attention, modulate",
    r"dit\.block0\.(query|key)\.linear": "model.py: Attention.forward",
    r"dit\.block0\.value": "model.py: Attention.forward",
    r"dit\.block0\.(query|key)\.norm": "model.py: Attention.forward; the norms span all heads",
    r"dit\.block0\.(query|key)\.rotated": "model.py: rotate",
    r"dit\.block0\.attended": "freeswim.py: inward_mask, dense_window, attention_scale",
    r"dit\.block0\.self_attention": "model.py: Block.self_attention",
    r"dit\.block0\.cross_attention": (
        "model.py: Block.cross_attention; freeswim.py: predict_dual, of the full path"
    ),
    r"dit\.block\d+\.full_tokens": "freeswim.py: predict_dual; model.py: Block.feed_forward",
    r"dit\.block\d+\.window_tokens": "freeswim.py: predict_dual; model.py: Block.feed_forward",
    r"dit\.velocity": "model.py: WanTransformer.unembed",
    r"mask": "freeswim.py: inward_mask",
    r"dual_full": "model.py: WanTransformer.forward",
    r"(dual|guide)_window": "freeswim.py: predict_dual",
    r"(reuse|window_only)_": "freeswim.py: predict_cached; model.py: WanTransformer.forward",
    r"unipc\.latents": "freeswim.py: FlowUniPC.step, predictor, corrector",
    r"encoded": "model.py: WanVAE.encode, tiles; freeswim.py: upsample",
    r"init_latents": "freeswim.py: FlowUniPC.add_noise",
    r"refine\.step": "freeswim.py: refine",
    r"refine\.cache": "freeswim.py: refine, predict_cached",
    r"decoded": "model.py: WanVAE.decode, tiles",
}


def reference():
    """All that a port can compare with, {name: array}, in the order of the computation."""
    odd = load_file(REFERENCE / "odd" / "expected.safetensors")
    found = load_file(PORT / "steps.safetensors") | {"refine.cache3": odd["cache3.latents"]}
    found |= {f"refine.step{index}": latents for index, latents in enumerate(odd["nocache.trace"])}
    found |= {
        name: x for name, x in odd.items() if any(re.match(pattern, name) for pattern in PLACES)
    }
    return {name: found[name] for name in sorted(found, key=lambda name: (rank(name), name))}


def rank(name):
    return next(index for index, pattern in enumerate(PLACES) if re.match(pattern, name))


def off(actual, expected):
    """The norm of the difference over that of what is expected."""
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def compare(port):
    """Of every array of a port: whether it is wrong, its name, and the line that says so; what is
    wrong first."""
    known, places = reference(), list(PLACES.values())
    lines = [
        (True, name, f"UNKNOWN {name}: no such name; tests/reference/README.md has them all")
        for name in sorted(port.keys() - known.keys())
    ]
    for name, expected in ((name, known[name]) for name in known if name in port):
        place, limit = places[rank(name)], 1e-3 if name.startswith("refine") else 1e-4
        actual = port[name].astype(np.float64)
        if (
            actual.size != expected.size
            or actual.shape[-expected.ndim :] != expected.shape[-actual.ndim :]
        ):
            lines.append(
                (
                    True,
                    name,
                    f"WRONG {name}: is {actual.shape}, should be {expected.shape}; see {place}",
                )
            )
            continue
        error = off(actual, expected.astype(np.float64).reshape(actual.shape))
        wrong = not error <= limit
        lines.append(
            (
                wrong,
                name,
                f"{'WRONG' if wrong else 'right'} {name}: {error:.1e} off, at most {limit:.0e}"
                + f"; see {place}" * wrong,
            )
        )
    return sorted(
        lines, key=lambda line: not line[0]
    )  # stable: the order of the computation is kept


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 2 * (len(sys.argv) != 2 or sys.argv[1] not in ("-h", "--help"))
    try:
        lines = compare(load_file(sys.argv[1]))
    except (OSError, SafetensorError) as error:
        print(
            f"port_check.py: {sys.argv[1]} is no safetensors file ({error}); write one "
            f"with your tensors",
            file=sys.stderr,
        )
        return 2
    print(*(line for *_, line in lines), sep="\n")
    return 2 if not lines else int(any(wrong for wrong, *_ in lines))


if __name__ == "__main__":
    sys.exit(main())
