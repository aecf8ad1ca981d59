"""Writes tests/port/steps.safetensors: our code taken apart, value by value, for ports to
compare with.

    python tests/port/write_steps.py OUT.safetensors

What the values are, tests/reference/README.md tells. Other tests show that this code agrees with
the references, and tests/port/test_port.py that the file is what this script writes.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
from references import REFERENCE, as_clip, load

from freeswim import FlowUniPC, predict_dual
from model import TextEncoder, WanVAE, checkpoint_name


def transformer_steps(case):
    """`freeswim.predict_dual` on the set's `latents`, both paths, part by part."""
    found, net, given = {}, case.transformer, case.expected
    latents, timestep = given["latents"], given["timestep"]
    tokens, time, modulation, text, rotary = net.embed(latents, timestep, given["text"])
    found |= {"patches": tokens, "time": time, "modulation": modulation, "text": text}
    found |= {"rotary.cos": rotary[0].squeeze(1), "rotary.sin": rotary[1].squeeze(1)}

    def keep(name, value):  # the first is block 0's, and the window path's
        found.setdefault(f"block0.{name}", value)

    attention = net.blocks[0].self_attn
    layers = {
        "query.linear": attention.to_q,
        "key.linear": attention.to_k,
        "value": attention.to_v,
        "query.norm": attention.norm_q,
        "key.norm": attention.norm_k,
    }
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output, name=name: keep(name, output))
        for name, layer in layers.items()
    ]
    hooks += [
        attention.to_q.register_forward_hook(
            lambda layer, inputs, output: keep("modulated", *inputs)
        )
    ]

    def noted_window(query, key, value):  # (B, heads, N, head_dim); noted as (N, heads, head_dim)
        attended = case.window(query, key, value)
        keep("query.rotated", query.transpose(1, 2)), keep("key.rotated", key.transpose(1, 2))
        keep("attended", attended.transpose(1, 2).flatten(2))
        return attended

    window = full = tokens
    for index, block in enumerate(net.blocks):
        window = block.self_attention(window, modulation, rotary, noted_window)
        keep("self_attention", window)
        full = block.self_attention(full, modulation, rotary, case.full)
        content = block.cross_attention(full, text)
        keep("cross_attention", content)
        full = block.feed_forward(full + content, modulation)
        window = block.feed_forward(window + content, modulation)
        found |= {f"block{index}.full_tokens": full, f"block{index}.window_tokens": window}
    for hook in hooks:
        hook.remove()
    frames, height, width = case.meta["grid"]
    found["velocity"] = net.unembed(window, time, (frames, height, width))
    expected = predict_dual(net, latents, timestep, given["text"], case.window, case.full)
    assert torch.equal(found["velocity"], expected)
    return {f"dit.{name}": value[0] if len(value) == 1 else value for name, value in found.items()}


def solver_steps(case):
    """Three steps of UniPC, from the noised clip and away from the clean one: any velocity shows
    the solver at work."""
    meta, latents = case.meta, case.expected["init_latents"]
    solver = FlowUniPC(meta["steps"], meta["flow_shift"], meta["strength"])
    found, away = {"unipc.levels": solver.sigmas}, latents - case.expected["encoded"]
    for index in range(3):
        latents = solver.step((index + 1) * away, latents)
        found[f"unipc.latents{index}"] = latents[0]
    return found


def vae_steps(case):
    """A corner of the set's video through the VAE, a chunk at a time, with what every layer
    remembers after it."""
    vae = case.vae
    layers = {layer: checkpoint_name(WanVAE, name) for name, layer in vae.named_modules()}
    video = as_clip(case.expected["video"])[..., :16, :24]
    found, history, means = {"vae.video": video[0]}, {}, []

    def remember(name):
        found.update(
            {f"{name}.{layers[layer]}": past[0].clone() for layer, past in history.items()}
        )

    for t in range(3):
        chunk = video[:, :, :1] if t == 0 else video[:, :, 4 * t - 3 : 4 * t + 1]
        mean, _ = vae.encode_chunk(chunk, history).chunk(2, dim=1)
        found[f"vae.encode.chunk{t}"] = mean[0]
        remember(f"vae.encode.history{t}")
        means.append(mean)
    history.clear()
    for t, mean in enumerate(means):
        found[f"vae.decode.chunk{t}"] = vae.decode_chunk(mean, history)[0]
        remember(f"vae.decode.history{t}")
    assert torch.equal(vae.encode(video)[0], ((torch.cat(means, 2) - vae.mean) / vae.std)[0])
    return found


def text_steps():
    """UMT5, layer by layer, on the small random one in reference/umt5."""
    encoder = TextEncoder.from_pretrained(REFERENCE / "umt5")
    ids = torch.tensor([[7, 31, 2, 19, 38, 11, 1] + 5 * [0]])
    mask = (ids > 0).long()
    found = {"umt5.ids": ids[0], "umt5.mask": mask[0]}
    names = {"shared": "umt5.embedded", "final_norm": "umt5.final"}
    names |= {f"layers.{index}": f"umt5.layer{index}" for index in range(len(encoder.layers))}
    for part, name in names.items():
        encoder.get_submodule(part).register_forward_hook(
            lambda module, inputs, output, name=name: found.update({name: output[0]})
        )
    encoder(ids, mask)
    return found


@torch.no_grad()
def steps():
    odd = load("odd")
    return {
        name: value.contiguous()
        for name, value in (
            transformer_steps(odd) | solver_steps(odd) | vae_steps(load("wide")) | text_steps()
        ).items()
    }


if __name__ == "__main__":
    save_file(steps(), sys.argv[1])
