"""Mistakes that ports make: `python tests/port/port_traps.py` makes one after the other in a copy
of tests/port/port_numpy.py, and prints which tensor tests/port/port_check.py names first, and how
far that one is off.
"""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

HERE = Path(__file__).parent
TESTS = HERE.parent
sys.path[:0] = [str(HERE), str(TESTS), str(TESTS.parent)]
import port_check

PORT = HERE / "port_numpy.py"


class Trap(NamedTuple):
    mistake: str
    seen_in: str  # the tensor that is named first
    changes: tuple  # (what is replaced in the port, by what), each there once


EXACT_GELU = "(lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))))"
SECOND_LAYER = "vae.encode.history0.encoder.down_blocks.2.conv1"
TIME_CONV = "vae.decode.history0.decoder.up_blocks.0.upsamplers.0.time_conv"

TRAPS = [
    # The text encoder
    Trap(
        "UMT5: the farthest bucket not clamped",
        "umt5.bias0",
        (
            ("bucket = min(bucket, half - 1)", "pass"),
            ("= table[bucket]", "= table[min(bucket, 2 * half - 1)]"),
        ),
    ),
    Trap(
        "UMT5: one table of distances for all layers",
        "umt5.bias1",
        (
            (
                'f"encoder.block.{layer}.layer.0.SelfAttention.relative',
                'f"encoder.block.0.layer.0.SelfAttention.relative',
            ),
        ),
    ),
    Trap(
        "UMT5: query - key instead of key - query",
        "umt5.bias0",
        (("if key > query:", "if key < query:"),),
    ),
    Trap(
        "UMT5: scores divided by sqrt(d)",
        "umt5.layer0",
        (("key) + bias  # not divided by sqrt(d)", "key) / math.sqrt(query.shape[2]) + bias"),),
    ),
    Trap(
        "UMT5: gate and up exchanged",
        "umt5.layer0",
        (("gate = gelu(normed", "gate = (normed"), ("(gate * up)", "(gate * gelu(up))")),
    ),
    Trap(
        "UMT5: an exact GELU",
        "umt5.layer0",
        (("gate = gelu(", f"gate = {EXACT_GELU}("),),
    ),
    Trap(
        "UMT5: what comes out after the text not set to zero",
        "umt5.text",
        (("x = x * (mask > 0)[:, None]", "x = x * 1"),),
    ),
    Trap(
        "UMT5: an epsilon of 1e-5",
        "umt5.small",
        (
            (
                'rms_norm(x, weights[f"{attention}.layer_norm.weight"])',
                'rms_norm(x, weights[f"{attention}.layer_norm.weight"], 1e-5)',
            ),
        ),
    ),
    # Norms
    Trap(
        "layer norm with an epsilon of 1e-5",
        "norm.layer",
        (("bias=0.0, eps=1e-6", "bias=0.0, eps=1e-5"),),
    ),
    Trap(
        "root-mean-square norm with an epsilon of 1e-5",
        "norm.rms",
        (("def rms_norm(x, weight, eps=1e-6)", "def rms_norm(x, weight, eps=1e-5)"),),
    ),
    Trap(
        "the VAE's norm with an epsilon of 1e-12",
        "norm.vae",
        (("np.sqrt(mean_square + 1e-24)", "np.sqrt(mean_square + 1e-12)"),),
    ),
    # The VAE
    Trap(
        "frames enlarged with aligned corners",
        "upsampled",
        (
            (
                "(np.arange(length) + 0.5) * old / length - 0.5",
                "np.arange(length) * (old - 1) / (length - 1)",
            ),
        ),
    ),
    Trap(
        "the VAE's norm subtracts a mean",
        "norm.vae",
        (
            (
                "mean_square = (x**2).mean(0, keepdims=True)",
                "x = x - x.mean(0, keepdims=True)\n    mean_square = (x**2).mean(0, keepdims=True)",
            ),
        ),
    ),
    Trap(
        "downsampling pads left and top",
        SECOND_LAYER,
        (("(0, 1), (0, 1)))  # right and bottom only", "(1, 0), (1, 0)))"),),
    ),
    Trap(
        "the last 16 channels of the moments for the mean",
        "vae.encode.chunk0",
        (("return moments[:16]", "return moments[16:]"),),
    ),
    Trap(
        "time downsampled with a memory of zeros, not of frame 0",
        "vae.encode.history0.encoder.down_blocks.3",
        (
            (
                "past = history.get(name)\n    history[name] = x[:, -1:]\n",
                "past = history.get(name)\n    history[name] = 0 * x[:, -1:]\n",
            ),
        ),
    ),
    Trap(
        "time upsampled with a memory of frame 0, not of zeros",
        TIME_CONV,
        (
            (
                "history[conv] = np.zeros((x.shape[0], 2, *x.shape[2:]))  # not the first frame",
                "history[conv] = np.concatenate([x, x], axis=1)",
            ),
        ),
    ),
    Trap(
        "the time convolution's output taken as (C, 2)",
        "vae.decode.upsample.after",
        (
            (
                "pairs.reshape(2, channels, frames, height, width).transpose(1, 2, 0, 3, 4)",
                "pairs.reshape(channels, 2, frames, height, width).transpose(0, 2, 1, 3, 4)",
            ),
        ),
    ),
    Trap(
        "tiles blended without the finished tile above",
        "vae.tiled.encoded",
        (("if i > 0:", "if i > 99:"),),
    ),
    Trap(
        "tiles blended over one pixel less",
        "vae.tiled.encoded",
        (("share = index / overlap", "share = index / (overlap - 1)"),),
    ),
    Trap(
        "tiles only along the axis that is too long",
        "vae.strip.encoded",
        (
            (
                "for top in range(0, x.shape[2], stride):",
                "for top in range(0, x.shape[2] if x.shape[2] > tile else 1, stride):",
            ),
        ),
    ),
    Trap(
        "short last tiles faded in over the whole overlap",
        "vae.strip.encoded",
        (
            ("    overlap = min(overlap,", "    whole = overlap\n    overlap = min(overlap,"),
            ("share = index / overlap", "share = index / whole"),
        ),
    ),
    Trap(
        "pixels from 0 to 1",
        "upsampled",
        (("/ 127.5 - 1", "/ 255"),),
    ),
    Trap(
        "pixels rounded to 8 bits before they are enlarged",
        "upsampled.decoded",
        (
            (
                "enlarge(decoded, 20, 30)",
                "enlarge(np.round((decoded + 1) * 127.5) / 127.5 - 1, 20, 30)",
            ),
        ),
    ),
    Trap(
        "means and deviations exchanged",
        "vae.encoded",
        (("return (latents - mean) / std", "return (latents - std) / mean"),),
    ),
    Trap(
        "latents sampled, instead of the mean",
        "vae.encoded",
        (
            (
                "return (latents - mean) / std",
                "noise = np.random.default_rng(0).normal(size=latents.shape)\n"
                "    return (latents + 0.1 * noise - mean) / std",
            ),
        ),
    ),
    Trap(
        "decoded pixels not clamped",
        "vae.decoded",
        (("return video.clip(-1, 1)", "return video"),),
    ),
    Trap(
        "no scale in the VAE's attention",
        "vae.encode.history0.encoder.mid_block.resnets.1.conv1",
        (("softmax(query.T @ key / math.sqrt(channels))", "softmax(query.T @ key)"),),
    ),
    # The transformer
    Trap(
        "a window of native size, though that is even",
        "mask",
        (("size = min(2 * (native // 2) + 1, length)", "size = min(native, length)"),),
    ),
    Trap(
        "a window that is clipped at the borders",
        "mask",
        (
            (
                "mask[h, w, top : top + rows, left : left + columns] = True",
                "mask[h, w, max(h - rows // 2, 0) : h + rows // 2 + 1,"
                " max(w - columns // 2, 0) : w + columns // 2 + 1] = True",
            ),
        ),
    ),
    Trap(
        "tokens in (t, h, w) order, positions and windows in (h, w, t)",
        "dit.patches",
        (
            (".transpose(2, 4, 1, 0, 3, 5)", ".transpose(1, 2, 4, 0, 3, 5)"),
            (
                "patches.reshape(rows // 2, columns // 2, frames, 2, 2, 16)",
                "patches.reshape(frames, rows // 2, columns // 2, 2, 2, 16)"
                ".transpose(1, 2, 0, 3, 4, 5)",
            ),
        ),
    ),
    Trap(
        "in a patch, channels last on the way in",
        "dit.patches",
        ((".transpose(2, 4, 1, 0, 3, 5)", ".transpose(2, 4, 1, 3, 5, 0)"),),
    ),
    Trap(
        "sines before cosines in the timestep embedding",
        "dit.time",
        (("[np.cos(phase), np.sin(phase)]", "[np.sin(phase), np.cos(phase)]"),),
    ),
    Trap(
        "no SiLU before the time projection",
        "dit.modulation",
        (('"condition_embedder.time_proj", silu(time))', '"condition_embedder.time_proj", time)'),),
    ),
    Trap(
        "an exact GELU for the text",
        "dit.text",
        (("text = gelu(", f"text = {EXACT_GELU}("),),
    ),
    Trap(
        "the rotary split with its longest part last, not first",
        "dit.rotary.cos",
        (
            ("[np.outer(frame, by_frame)", "[np.outer(frame, by_position)"),
            ("np.outer(column, by_position)]", "np.outer(column, by_frame)]"),
        ),
    ),
    Trap(
        "query and key normalised head by head",
        "dit.block0.query.norm",
        (
            (
                'query = rms_norm(query, weights[f"{block}.attn1.norm_q.weight"])',
                "query = rms_norm(by_heads(query, heads),"
                ' weights[f"{block}.attn1.norm_q.weight"].reshape(heads, -1))'
                ".reshape(query.shape)",
            ),
        ),
    ),
    Trap(
        "a rotation of halves instead of neighbouring pairs",
        "dit.block0.query.rotated",
        (
            ("first = x[..., 0::2]", "first = x[..., : x.shape[-1] // 2]"),
            ("second = x[..., 1::2]", "second = x[..., x.shape[-1] // 2 :]"),
            ("rotated = np.stack(", "rotated = np.concatenate("),
        ),
    ),
    Trap(
        "the ordinary attention scale",
        "dit.block0.attended",
        (
            (
                'math.sqrt(math.log(2 * tokens, tokens) / config["attention_head_dim"])',
                'config["attention_head_dim"] ** -0.5',
            ),
        ),
    ),
    Trap(
        "windows in the full path too",
        "dit.block0.full.attended",
        (
            (
                "six, heads, angles, scale, None, note_full)",
                "six, heads, angles, scale, mask, note_full)",
            ),
        ),
    ),
    Trap(
        "a norm without weights before the cross-attention",
        "dit.block0.cross.query.norm",
        (
            (
                'layer_norm(tokens, weights[f"{block}.norm2.weight"], '
                'weights[f"{block}.norm2.bias"])',
                "layer_norm(tokens)",
            ),
        ),
    ),
    Trap(
        "the window path's own cross-attention",
        "dit.block0.cross.query.norm",
        (
            (
                "content = cross_attention(weights, block, full, text, heads, note_window)",
                "content = cross_attention(weights, block, window, text, heads, note_window)",
            ),
        ),
    ),
    Trap(
        "no norm of the cross-attention's key",
        "dit.block0.cross.key.norm",
        (('key = rms_norm(key, weights[f"{block}.attn2.norm_k.weight"])', "key = key * 1"),),
    ),
    Trap(
        "the refinement's scale in the cross-attention too",
        "dit.block0.cross_attention",
        (
            (
                "scale = (query.shape[1] // heads) ** -0.5",
                "scale = 1.05 * (query.shape[1] // heads) ** -0.5",
            ),
        ),
    ),
    Trap(
        "an exact GELU in the feed-forward network",
        "dit.block0.ffn.hidden",
        (("hidden = gelu(", f"hidden = {EXACT_GELU}("),),
    ),
    Trap(
        "the projected time in the last layer",
        "dit.unpatchify",
        (
            (
                'weights["scale_shift_table"][0] + time ',
                'weights["scale_shift_table"][0] + silu(time) ',
            ),
        ),
    ),
    Trap(
        "in a patch, channels first on the way out",
        "dit.velocity",
        (
            (
                "patches.reshape(rows // 2, columns // 2, frames, 2, 2, 16)\n",
                "patches.reshape(rows // 2, columns // 2, frames, 16, 2, 2)"
                ".transpose(0, 1, 2, 4, 5, 3)\n",
            ),
        ),
    ),
    Trap(
        "the zeros after the text masked",
        "dit.block0.cross_attention",
        (
            ("    text = gelu(linear", "    embed.seen = text.any(axis=1)\n    text = gelu(linear"),
            ("attend(*parts, scale).reshape", "attend(*parts, scale, embed.seen[None]).reshape"),
        ),
    ),
    Trap(
        "an epsilon of 1e-5 before the self-attention",
        "small.modulated",
        (
            (
                "modulation[:3]\n    x = layer_norm(tokens)",
                "modulation[:3]\n    x = layer_norm(tokens, eps=1e-5)",
            ),
        ),
    ),
    Trap(
        "an epsilon of 1e-5 for the query",
        "small.query.norm",
        (('norm_q.weight"])  # over all heads', 'norm_q.weight"], 1e-5)'),),
    ),
    Trap(
        "an epsilon of 1e-5 for the key",
        "small.key.norm",
        (
            (
                'key = rms_norm(key, weights[f"{block}.attn1.norm_k.weight"])',
                'key = rms_norm(key, weights[f"{block}.attn1.norm_k.weight"], 1e-5)',
            ),
        ),
    ),
    Trap(
        "an epsilon of 1e-5 before the cross-attention",
        "small.cross.query.norm",
        (('weights[f"{block}.norm2.bias"])', 'weights[f"{block}.norm2.bias"], 1e-5)'),),
    ),
    Trap(
        "an epsilon of 1e-5 for the cross-attention's query",
        "small.cross.query.norm",
        (
            (
                'query = rms_norm(query, weights[f"{block}.attn2.norm_q.weight"])',
                'query = rms_norm(query, weights[f"{block}.attn2.norm_q.weight"], 1e-5)',
            ),
        ),
    ),
    Trap(
        "an epsilon of 1e-5 for the cross-attention's key",
        "small.cross.key.norm",
        (
            (
                'key = rms_norm(key, weights[f"{block}.attn2.norm_k.weight"])',
                'key = rms_norm(key, weights[f"{block}.attn2.norm_k.weight"], 1e-5)',
            ),
        ),
    ),
    Trap(
        "an epsilon of 1e-5 before the feed-forward network",
        "small.ffn.hidden",
        (
            (
                "modulation[3:]\n    x = layer_norm(tokens)",
                "modulation[3:]\n    x = layer_norm(tokens, eps=1e-5)",
            ),
        ),
    ),
    Trap(
        "an epsilon of 1e-5 in the last layer",
        "small.velocity",
        (('"proj_out", layer_norm(tokens)', '"proj_out", layer_norm(tokens, eps=1e-5)'),),
    ),
    Trap(
        "computed in the bfloat16 in which weights are stored",
        "bfloat16.velocity",
        (
            (
                '    latents = given["latents"]\n',
                '    latents = given["latents"].copy()\n'
                "    latents.view(np.uint32)[:] &= 0xFFFF0000\n",
            ),
        ),
    ),
    Trap(
        "rotary angles in float32",
        "rotary.far.cos",
        (
            (
                "frame, row, column = positions.T",
                "frame, row, column = positions.T * np.float32(1)",
            ),
            (
                "return 10000.0 ** (-np.arange(0, channels, 2) / channels)",
                "exponents = np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels)\n"
                "    return np.float32(10000) ** -exponents",
            ),
        ),
    ),
    # The solver, the base clip and the refinement
    Trap(
        "the schedule in float32",
        "unipc.timesteps",
        (
            (
                "levels = 0.999 * (1 - np.arange(steps) / steps)",
                "levels = 0.999 * (1 - np.arange(steps, dtype=np.float32) / np.float32(steps))",
            ),
        ),
    ),
    Trap(
        "the refinement's attention scale in the base clip too",
        "base.step0",
        (
            (
                'scale = config["attention_head_dim"] ** -0.5',
                'scale = 1.05 * config["attention_head_dim"] ** -0.5',
            ),
        ),
    ),
    Trap(
        "noise levels that begin at 1, not at 0.999",
        "unipc.timesteps",
        (("levels = 0.999 * (1", "levels = 0.999999 * (1"),),  # at 1 itself, it divides by 0
    ),
    Trap(
        "noise levels truncated like the timesteps",
        "unipc.levels",
        (
            (
                "return levels.astype(np.float32).astype(np.float64), timesteps",
                "return np.floor(1000 * levels) / 1000, timesteps",
            ),
        ),
    ),
    Trap(
        "no corrector",
        "unipc.latents1",
        (("if index > 0:  # the last step", "if index > 99:  # the last step"),),
    ),
    Trap(
        "order 2 in the last step too",
        "unipc.latents4",
        (("min(2, len(levels) - 1 - index, index + 1)", "min(2, index + 1)"),),
    ),
    Trap(
        "a timestep that is not truncated",
        "unipc.timesteps",
        (("timesteps = (1000 * levels).astype(int)", "timesteps = 1000 * levels"),),
    ),
    Trap(
        "guidance counted from the positive prompt",
        "refine.step0",
        (
            (
                'return uncond + meta["guidance"] * (cond - uncond)',
                'return cond + meta["guidance"] * (cond - uncond)',
            ),
        ),
    ),
    Trap(
        "without cache, the negative prompt on the window path alone",
        "refine.step0",
        (("mask, dual=cache_interval is None)", "mask, dual=False)"),),
    ),
    Trap(
        "with a cache, the negative prompt on the full path too",
        "refine.cache2",
        (("mask, dual=cache_interval is None)", "mask, dual=is_dual)"),),
    ),
    Trap(
        "cache steps counted over the whole schedule",
        "refine.cache2",
        (
            (
                "is_dual = cache_interval is None or index % cache_interval == 0",
                "is_dual = cache_interval is None or index in (0, 1, 3)",  # of all, 3, 4 and 6
            ),
        ),
    ),
]


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


def first_line(trap):
    """What the checker says first of a port with this mistake."""
    port = altered(PORT, *trap.changes).steps()
    return port_check.compare(port)[0]


def main():
    print("| mistake | seen first in | off by |\n|---|---|---|")
    for trap in TRAPS:
        line = first_line(trap)
        print(f"| {trap.mistake} | `{line.name}` | {how_far(line)} |")


def how_far(line):
    """From a line such as "WRONG mask: 4.5e-01 off, at most 5e-05; see …": 4.5e-01."""
    if "not finite" in line.text:
        return "not finite"
    if "should be" in line.text:
        return "another shape"
    return re.search(r": (\S+) off,", line.text)[1]


if __name__ == "__main__":
    main()
