"""Writes tests/port/steps.safetensors: our code taken apart, value by value, for ports to compare
with.

    python tests/port/write_steps.py OUT.safetensors

tests/reference/README.md describes the values. Other tests show that this code agrees with
the references, and tests/port/test_port.py that the file is what this script writes. The order of
the computation is in the file's metadata, under "order".

With a folder, `python tests/port/write_steps.py OUT.safetensors FOLDER`, it also writes the model
tests/reference/bfloat16 there: the transformer of the set `odd` with one block, in bfloat16.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
from references import REFERENCE, as_clip, load, refined

from freeswim import FlowUniPC, draw_noise, generate, predict_dual, upsample
from model import (
    ChannelNorm,
    TextEncoder,
    WanTransformer,
    WanVAE,
    checkpoint_name,
    read_json,
    rotary_table,
)


class Notes:
    """Values by name, in the order in which they were computed. Of several, the first counts."""

    def __init__(self):
        self.found = {}
        self.order = []

    def add(self, name, value):
        if name not in self.found:
            self.found[name] = value.detach().clone().contiguous()
            self.order.append(name)

    def place(self, *names):
        """Here in the order belong values that are in the authors' files."""
        self.order.extend(names)

    def watch(self, module, name):
        """Note the output of a module whenever it is called."""

        def hook(module, inputs, output):
            self.add(name, output[0] if output.shape[0] == 1 else output)

        return module.register_forward_hook(hook)


def text_steps(notes):
    """UMT5, layer by layer, on the small random one in reference/umt5, for a text long enough to
    reach the last buckets of distances."""
    encoder = TextEncoder.from_pretrained(REFERENCE / "umt5")
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(2, 40, (1, 32), generator=draw)
    ids[:, 25] = 1  # the end of the text
    ids[:, 26:] = 0
    mask = (ids > 0).long()
    notes.add("umt5.ids", ids[0])
    notes.add("umt5.mask", mask[0])
    with encoder.loaded("shared", "cpu") as table:
        x = table(ids)
    notes.add("umt5.embedded", x[0])
    for index in range(len(encoder.layers)):
        with encoder.loaded(f"layers.{index}", "cpu", torch.float32) as layer:
            notes.add(f"umt5.bias{index}", layer.position_bias(ids.shape[1], "cpu"))
            x = layer(x, mask)
            notes.add(f"umt5.layer{index}", x[0])
    with encoder.loaded("final_norm", "cpu", torch.float32) as norm:
        x = norm(x)
    notes.add("umt5.final", x[0])
    assert torch.equal(x, encoder(ids, mask))
    text = x * mask[..., None]
    notes.add("umt5.text", text[0])
    notes.add("umt5.small", small_text(ids, mask)[0])
    return text


def small_text(ids, mask):
    """Embeddings by the same encoder, with what the table and the layers add divided by 1000: then
    the epsilons of all norms matter."""
    config = read_json(REFERENCE / "umt5" / "config.json")
    encoder = TextEncoder(config).eval()
    state = {}
    for name, value in load_file(REFERENCE / "umt5" / "model.safetensors").items():
        is_divided = name.endswith(("shared.weight", "SelfAttention.o.weight", "wo.weight"))
        state[name] = value / 1000 if is_divided else value
    for name, parameter in encoder.named_parameters():
        parameter.copy_(state[checkpoint_name(TextEncoder, name)])
    return encoder(ids, mask) * mask[..., None]


def norm_steps(notes):
    """Norms of numbers so small that their epsilons matter."""
    small = 1e-3 * torch.randn(8, 60, generator=torch.Generator().manual_seed(5))
    notes.add("norm.input", small)
    notes.add("norm.layer", torch.nn.functional.layer_norm(small, (60,), eps=1e-6))
    notes.add("norm.rms", torch.nn.RMSNorm(60, 1e-6)(small))
    as_channels = 1e-2 * small.T[None, :, :, None, None].double()
    notes.add("norm.vae", ChannelNorm(60).double()(as_channels)[0, :, :, 0, 0].T.float())


def vae_steps(notes):
    """A corner of the set `wide`'s video, a chunk at a time, with what every layer remembers after
    it; then frames of several tiles."""
    case = load("wide")
    vae = case.vae
    whole = as_clip(case.expected["video"])
    video = whole[..., :16, :24]
    notes.add("upsampled", upsample(video[:, :, :1], 20, 30)[0])
    notes.add("vae.video", video[0])
    layers = {layer: checkpoint_name(WanVAE, name) for name, layer in vae.named_modules()}

    def note_history(prefix, history):
        for layer, past in history.items():
            notes.add(f"{prefix}.{layers[layer]}", past[0])

    down = [layer for layer in vae.encoder.down_blocks if hasattr(layer, "time_conv")][1]
    up = vae.decoder.up_blocks[0].upsamplers[0]

    def note_both_sides(layer, name):
        def before(layer, inputs):
            notes.add(f"{name}.before", inputs[0][0])

        def after(layer, inputs, output):
            notes.add(f"{name}.after", output[0])

        return layer.register_forward_pre_hook(before), layer.register_forward_hook(after)

    history = {}
    means = []
    for t, chunk in enumerate(video.split((1, 4, 4), dim=2)):
        hooks = note_both_sides(down, "vae.encode.downsample") if t == 1 else ()
        mean, _ = vae.encode_chunk(chunk, history).chunk(2, dim=1)
        for hook in hooks:
            hook.remove()
        note_history(f"vae.encode.history{t}", history)
        notes.add(f"vae.encode.chunk{t}", mean[0])
        means.append(mean)
    encoded = vae.encode(video)
    notes.add("vae.encoded", encoded[0])
    history = {}
    for t, mean in enumerate(means):
        hooks = note_both_sides(up, "vae.decode.upsample") if t == 1 else ()
        frames = vae.decode_chunk(mean, history)
        for hook in hooks:
            hook.remove()
        note_history(f"vae.decode.history{t}", history)
        notes.add(f"vae.decode.chunk{t}", frames[0])
    assert torch.equal(encoded, (torch.cat(means, 2) - vae.mean) / vae.std)
    decoded = vae.decode(encoded)
    notes.add("vae.decoded", decoded[0])
    notes.add("upsampled.decoded", upsample(decoded, 20, 30)[0])

    repeated = whole[:, :, :1].repeat(1, 1, 1, 3, 2)
    latents = vae.encode(repeated[..., :264, :272])
    notes.add("vae.tiled.encoded", latents[0])
    notes.add("vae.tiled.decoded", vae.decode(latents)[0, :, :, 184:])
    latents = vae.encode(repeated[..., :208, :400])
    notes.add("vae.strip.encoded", latents[0])
    notes.add("vae.strip.decoded", vae.decode(latents)[0, :, :, 184:])


def noting(notes, attend, prefix):
    """An attention of (B, heads, N, head_dim) that notes its inputs and its output."""

    def attend_and_note(query, key, value):
        attended = attend(query, key, value)
        notes.add(f"{prefix}query.rotated", query.transpose(1, 2)[0])
        notes.add(f"{prefix}key.rotated", key.transpose(1, 2)[0])
        notes.add(f"{prefix}attended", attended.transpose(1, 2).flatten(2)[0])
        return attended

    return attend_and_note


def watch_self_attention(notes, block, prefix):
    """Hooks that note what its layers compute."""
    layer = block.self_attn

    def note_input(layer, inputs):
        notes.add(f"{prefix}modulated", inputs[0][0])

    hooks = [layer.to_q.register_forward_pre_hook(note_input)]
    for name, part in (
        ("query.linear", layer.to_q),
        ("key.linear", layer.to_k),
        ("value", layer.to_v),
        ("query.norm", layer.norm_q),
        ("key.norm", layer.norm_k),
    ):
        hooks.append(notes.watch(part, f"{prefix}{name}"))
    return hooks


def transformer_steps(notes, case):
    """`freeswim.predict_dual` on the set's `latents`, both paths, part by part."""
    notes.place("mask")
    net = case.transformer
    given = case.expected
    latents = given["latents"]
    timestep = given["timestep"]
    text = given["text"]
    tokens, time_emb, modulation, context, rotary, _ = net.embed(latents, timestep, text)
    notes.add("dit.patches", tokens[0])
    notes.add("dit.time", time_emb[0])
    notes.add("dit.modulation", modulation[0])
    notes.add("dit.text", context[0])
    notes.add("dit.rotary.cos", rotary[0].squeeze(1))
    notes.add("dit.rotary.sin", rotary[1].squeeze(1))

    window_tokens = tokens
    full_tokens = tokens
    for index, block in enumerate(net.blocks):
        is_first = index == 0
        attend_window = noting(notes, case.window, "dit.block0.") if is_first else case.window
        attend_full = noting(notes, case.full, "dit.block0.full.") if is_first else case.full
        hooks = watch_self_attention(notes, block, "dit.block0.") if is_first else []
        window_tokens = block.self_attention(window_tokens, modulation, rotary, attend_window)
        for hook in hooks:
            hook.remove()
        if is_first:
            notes.add("dit.block0.self_attention", window_tokens[0])
        hooks = watch_self_attention(notes, block, "dit.block0.full.") if is_first else []
        full_tokens = block.self_attention(full_tokens, modulation, rotary, attend_full)
        if is_first:
            notes.add("dit.block0.full.self_attention", full_tokens[0])
            hooks.append(notes.watch(block.cross_attn.norm_q, "dit.block0.cross.query.norm"))
            hooks.append(notes.watch(block.cross_attn.norm_k, "dit.block0.cross.key.norm"))
            hooks.append(notes.watch(block.ffn[1], "dit.block0.ffn.hidden"))
        cross_output = block.cross_attention(full_tokens, context)
        if is_first:
            notes.add("dit.block0.cross_attention", cross_output[0])
        full_tokens = block.feed_forward(full_tokens + cross_output, modulation)
        notes.add(f"dit.block{index}.full_tokens", full_tokens[0])
        window_tokens = block.feed_forward(window_tokens + cross_output, modulation)
        notes.add(f"dit.block{index}.window_tokens", window_tokens[0])
        for hook in hooks:
            hook.remove()
    hook = notes.watch(net.proj_out, "dit.unpatchify")
    velocity = net.unembed(window_tokens, time_emb, tuple(case.meta["grid"]))
    hook.remove()
    notes.add("dit.velocity", velocity[0])
    expected = predict_dual(net, latents, timestep, text, case.window, case.full)
    assert torch.equal(velocity, expected)

    notes.place("dual_full", "dual_window", "dual_window_negative")
    notes.place("guide_window", "reuse_window", "window_only_negative")
    ended = text * (torch.arange(text.shape[1]) < 7)[:, None]
    notes.add("zeros.velocity", net(latents, timestep, ended, case.window)[0])
    small_steps(notes, case)
    stored = WanTransformer.from_pretrained(REFERENCE / "bfloat16")
    notes.add("bfloat16.velocity", stored(latents, timestep, text, case.window)[0])


def small_steps(notes, case):
    """The dual pass with all that makes or changes tokens, and all queries and keys, divided by
    1000: then the epsilons of all norms matter."""
    net = WanTransformer.from_pretrained(REFERENCE / "odd" / "transformer")
    divided = [net.patch_embedding]
    for block in net.blocks:
        for attention in (block.self_attn, block.cross_attn):
            divided += [attention.to_q, attention.to_k, attention.to_out]
        divided.append(block.ffn[2])
    for layer in divided:
        layer.weight.div_(1000)
        layer.bias.div_(1000)

    def note_input(layer, inputs):
        notes.add("small.modulated", inputs[0][0])

    block = net.blocks[0]
    hooks = [
        block.self_attn.to_q.register_forward_pre_hook(note_input),
        notes.watch(block.self_attn.norm_q, "small.query.norm"),
        notes.watch(block.self_attn.norm_k, "small.key.norm"),
        notes.watch(block.cross_attn.norm_q, "small.cross.query.norm"),
        notes.watch(block.cross_attn.norm_k, "small.cross.key.norm"),
        notes.watch(block.ffn[1], "small.ffn.hidden"),
    ]
    given = case.expected
    inputs = (given["latents"], given["timestep"], given["text"])
    velocity = predict_dual(net, *inputs, case.window, case.full)
    for hook in hooks:
        hook.remove()
    notes.add("small.velocity", velocity[0])


def rotary_steps(notes):
    """Far out, float32 is too coarse for the angles: the last 21 tokens of a wide grid."""
    cos, sin = rotary_table((21, 2, 960), 128, "cpu")
    notes.add("rotary.far.cos", cos[-21:].squeeze(1))
    notes.add("rotary.far.sin", sin[-21:].squeeze(1))


def timestep_steps(notes):
    """Of whole schedules, where rounding in float32 would show."""
    found = []
    for steps in (4, 6, 10, 20, 35, 50):
        for flow_shift in (1.0, 3.0, 5.0, 9.0):
            found += FlowUniPC(steps, flow_shift).timesteps
    notes.add("unipc.timesteps", torch.tensor(found))


def solver_steps(notes, case):
    """All steps of UniPC, from the noised clip and away from the clean one: any velocity shows the
    solver at work."""
    meta = case.meta
    latents = case.expected["init_latents"]
    solver = FlowUniPC(meta["steps"], meta["flow_shift"], meta["strength"])
    notes.add("unipc.levels", solver.sigmas)
    away = latents - case.expected["encoded"]
    for index in range(len(solver.timesteps)):
        latents = solver.step((index + 1) * away, latents)
        notes.add(f"unipc.latents{index}", latents[0])


def base_steps(notes, case):
    """A base clip of the native size."""
    rows, columns = case.meta["native"]
    shape = (1, 16, 2, 2 * rows, 2 * columns)
    notes.add("base.noise", draw_noise(shape, torch.Generator().manual_seed(6), "cpu")[0])
    texts = (case.expected["text"], case.expected["negative"])
    trace = []

    # Each step calls the transformer twice, with the latents that the step before has left.
    def note_latents(transformer, inputs):
        trace.append(inputs[0])

    hook = case.transformer.register_forward_pre_hook(note_latents)
    draw = torch.Generator().manual_seed(6)
    settings = {"steps": 3, "flow_shift": 3.0, "guidance": case.meta["guidance"]}
    latents = generate(case.transformer, *texts, shape, generator=draw, **settings)
    hook.remove()
    for index, latents_before in enumerate([*trace[2::2], latents]):
        notes.add(f"base.step{index}", latents_before[0])


def refinement_steps(notes, case, text):
    """What the authors' files do not have: interval 2, and the text that text_steps encoded."""
    notes.place("encoded")
    draw = torch.Generator().manual_seed(case.meta["noise_seed"])
    noise = draw_noise(case.expected["encoded"].shape, draw, "cpu")
    notes.add("refine.noise", noise[0])
    notes.place("init_latents")
    for index in range(len(case.meta["timesteps"])):
        notes.place(f"refine.step{index}")
    notes.place("decoded")
    notes.add("refine.cache2", refined(case, cache_interval=2)[0])
    notes.place("refine.cache3")
    case.expected["text"] = text
    notes.add("refine.ids", refined(case, cache_interval=3)[0])


@torch.no_grad()
def steps():
    """{name: tensor}, and the order of the computation."""
    notes = Notes()
    norm_steps(notes)
    text = text_steps(notes)
    vae_steps(notes)
    odd = load("odd")
    transformer_steps(notes, odd)
    rotary_steps(notes)
    timestep_steps(notes)
    solver_steps(notes, odd)
    base_steps(notes, odd)
    refinement_steps(notes, odd, text)
    return notes.found, notes.order


def write_bfloat16(folder):
    """The transformer of the set `odd` with one block, stored in bfloat16."""
    odd = REFERENCE / "odd" / "transformer"
    folder.mkdir(parents=True)
    config = read_json(odd / "config.json") | {"num_layers": 1}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (file,) = odd.glob("*.safetensors")
    state = {}
    for name, value in load_file(file).items():
        if not name.startswith("blocks.") or name.startswith("blocks.0."):
            state[name] = value.bfloat16()
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def main(file, folder=None):
    if folder is not None:
        write_bfloat16(Path(folder))
    found, order = steps()
    save_file(found, file, {"order": json.dumps(order)})


if __name__ == "__main__":
    main(*sys.argv[1:])
