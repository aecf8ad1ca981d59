"""The diffusion transformer against Diffusers' WanTransformer3DModel, both from the same random
checkpoint."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from oracle import relative, seeded
from parity import randomise

from model import WanTransformer, checkpoint_name, rotary_table

BASE = dict(
    num_attention_heads=2, attention_head_dim=32, num_layers=3, ffn_dim=96, text_dim=40, freq_dim=32
)

# name: (configuration, batch, (T, H, W) in tokens, text tokens, timesteps)
CASES = {
    "ordinary": (BASE, 1, (3, 4, 6), 12, [437]),
    "head_dim 128": (
        BASE | dict(attention_head_dim=128, num_layers=2, freq_dim=256),
        1,
        (2, 4, 5),
        16,
        [999],
    ),
    "odd grid": (BASE | dict(num_attention_heads=3, attention_head_dim=20), 1, (5, 7, 3), 9, [1]),
    "one frame": (BASE | dict(attention_head_dim=48, ffn_dim=200), 1, (1, 6, 5), 12, [0]),
    "batch of two": (
        BASE | dict(num_attention_heads=4, attention_head_dim=24),
        2,
        (3, 5, 4),
        20,
        [850, 113],
    ),
    "long axes": (BASE | dict(num_layers=1), 1, (2, 1, 150), 7, [600]),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """The folder of a random checkpoint, inputs that bfloat16 holds exactly, and Diffusers' float32
    result."""
    config, batch, (frames, height, width), length, timesteps = CASES[request.param]
    folder = tmp_path_factory.mktemp("transformer")
    randomise(WanTransformer3DModel(**config)).save_pretrained(folder)
    draw = seeded(1)
    latents = torch.randn(batch, 16, frames, 2 * height, 2 * width, generator=draw).bfloat16()
    text = torch.randn(batch, length, config["text_dim"], generator=draw).bfloat16()
    text[:, length // 2 :] = 0  # as after the end of a prompt; cross-attention is not masked
    inputs = latents, torch.tensor(timesteps), text
    return folder, inputs, reference(folder, inputs, torch.float32)[1]


@torch.no_grad()
def reference(folder, inputs, dtype):
    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
    latents, timestep, text = inputs
    return model, model(latents.to(dtype), timestep, text.to(dtype)).sample.float()


@torch.no_grad()
def ours(folder, inputs, dtype):
    model = WanTransformer.from_pretrained(folder, dtype=dtype)
    latents, timestep, text = inputs
    return model, model(latents.float(), timestep, text.float())


def test_float32(case):
    folder, inputs, expected = case
    _, velocity = ours(folder, inputs, torch.float32)
    assert velocity.dtype == torch.float32
    for one, other in zip(velocity, expected, strict=True):  # each clip of the batch by itself
        assert relative(one, other) <= 1e-5


def test_bfloat16(case):
    """No farther from the float32 result than Diffusers, give or take a fifth; the same tensors
    stay in float32."""
    folder, inputs, exact = case
    their_model, theirs = reference(folder, inputs, torch.bfloat16)
    our_model, velocity = ours(folder, inputs, torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in their_model.state_dict().items()}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    assert {
        checkpoint_name(WanTransformer, name): tensor.dtype
        for name, tensor in our_model.state_dict().items()
    } == dtypes
    assert velocity.dtype == torch.float32
    error = relative(velocity, exact)
    allowed = 1.2 * relative(theirs, exact)
    print(f"relative error in bfloat16: {error:.5f}, Diffusers' {allowed / 1.2:.5f}")
    assert 0 < error <= allowed


def test_attention_is_the_callers(case):
    """`attention` gets (B, heads, N, head_dim) with time innermost, once per block, and its result
    is what counts."""
    folder, (latents, timestep, text), expected = case
    model = WanTransformer.from_pretrained(folder)
    batch, _, frames, rows, columns = latents.shape
    height = rows // 2
    width = columns // 2
    shapes = []

    def each_frame_alone(query, key, value):
        shapes.append(tuple(query.shape))
        parts = (
            x.unflatten(2, (height * width, frames)).transpose(2, 3) for x in (query, key, value)
        )
        attended = torch.nn.functional.scaled_dot_product_attention(
            *parts
        )  # (B, heads, T, H*W, head_dim)
        return attended.transpose(2, 3).flatten(2, 3)

    with torch.no_grad():
        velocity = model(latents, timestep, text, each_frame_alone)
        shape = batch, model.heads, height * width * frames, model.head_dim
        assert shapes == [shape] * len(model.blocks)
        if frames == 1:
            assert relative(velocity, expected) <= 1e-5
            return
        # Rotary positions are relative and frames do not see each other: a frame has the same
        # velocity alone.
        for t in range(frames):
            alone = model(latents[:, :, t : t + 1], timestep, text)
            assert relative(velocity[:, :, t : t + 1], alone) <= 1e-5


@pytest.mark.parametrize("head_dim", [6, 10, 16, 20, 22, 24, 28, 46, 48, 128])
def test_rotary_split_is_wans(head_dim):
    """As Wan's own code computes it: tables for d - 4 * (d // 6), 2 * (d // 6) and 2 * (d // 6)
    channels, joined, then split into c - 2 * (c // 3), c // 3 and c // 3 pairs of c = d // 2."""
    frames, height, width = grid = (3, 4, 5)
    third = 2 * (head_dim // 6)
    tables = []
    for channels in (head_dim - 2 * third, third, third):
        frequency = 1 / 10000 ** (torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        tables.append(torch.outer(torch.arange(5, dtype=torch.float64), frequency))
    pairs = head_dim // 2
    sizes = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    by_frame, by_row, by_column = torch.cat(tables, dim=1).split(sizes, dim=1)
    expected = torch.empty(height, width, frames, pairs, dtype=torch.float64)
    for h in range(height):
        for w in range(width):
            for t in range(frames):
                expected[h, w, t] = torch.cat([by_frame[t], by_row[h], by_column[w]])
    cos, sin = rotary_table(grid, head_dim, "cpu")
    assert (cos.squeeze(1) - expected.cos().flatten(0, 2)).abs().max() <= 1e-6
    assert (sin.squeeze(1) - expected.sin().flatten(0, 2)).abs().max() <= 1e-6
