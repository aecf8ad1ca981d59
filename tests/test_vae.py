"""The causal video VAE against Diffusers' AutoencoderKLWan; tiling, streaming, gradients and
memory."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLWan
from oracle import relative, seeded
from parity import peak_memory, randomise

from model import WanVAE, checkpoint_name

WIDTHS = {
    "narrow": dict(base_dim=4, num_res_blocks=1),
    "as Wan": dict(base_dim=6, num_res_blocks=2),
    "uneven": dict(base_dim=6, decoder_base_dim=4, num_res_blocks=1),
}

# (widths, frames, height, width). Tiles are 256 pixels wide and start every 192, whatever is left
# at the end: so 272 is a whole tile and one of 80 pixels, 208 with a larger other side is 208 and
# 16, 400 is 256, 208 and 16.
SMALL = [
    ("as Wan", 1, 64, 96),
    ("narrow", 5, 64, 96),
    ("uneven", 9, 72, 40),
    ("as Wan", 17, 64, 96),
    ("narrow", 5, 256, 256),
]
LARGE = [
    ("narrow", 17, 272, 48),
    ("uneven", 9, 272, 208),
    ("narrow", 5, 208, 400),
    ("narrow", 1, 320, 272),
    ("as Wan", 1, 400, 592),
    ("narrow", 1, 8, 768),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Ours and Diffusers' for each set of widths, from the same random checkpoint."""

    def pair(config, contrast):
        folder = tmp_path_factory.mktemp("vae")
        theirs = randomise(AutoencoderKLWan(**config))
        theirs.decoder.conv_out.weight.data *= contrast
        theirs.decoder.conv_out.bias.data *= contrast
        theirs.save_pretrained(folder)
        return WanVAE.from_pretrained(folder), theirs

    # At low contrast no pixel leaves [-1, 1], where clamping would hide errors.
    return {name: pair(config, 0.1) for name, config in WIDTHS.items()} | {
        "garish": pair(WIDTHS["narrow"], 2)
    }


def random_video(frames, height, width, batch=1):
    video = torch.rand(batch, 3, frames, height, width, generator=seeded(2))
    return video * 2 - 1


def random_latents(frames, height, width, batch=1):
    draw = seeded(3)
    return torch.randn(batch, 16, (frames + 3) // 4, height // 8, width // 8, generator=draw)


def statistics(theirs):
    """Mean and standard deviation of each latent channel, (16, 1, 1, 1), from the configuration."""
    return (
        torch.tensor(theirs.config[name]).view(-1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )


@torch.no_grad()
def reference_encode(theirs, video, tiled):
    theirs.use_tiling = tiled
    mean, std = statistics(theirs)
    return (theirs.encode(video).latent_dist.mode() - mean) / std


@torch.no_grad()
def reference_decode(theirs, latents, tiled):
    """The video, in [-1, 1] only if untiled: Diffusers does not clamp what it puts together from
    tiles."""
    theirs.use_tiling = tiled
    mean, std = statistics(theirs)
    return theirs.decode(latents * std + mean).sample


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("widths, frames, height, width", SMALL + LARGE)
def test_encode(pairs, widths, frames, height, width, tiled):
    ours, theirs = pairs[widths]
    video = random_video(frames, height, width)
    expected = reference_encode(theirs, video, tiled)
    assert relative(ours.encode(video, tiled=tiled), expected) <= 1e-5


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("widths, frames, height, width", SMALL + LARGE)
def test_decode(pairs, widths, frames, height, width, tiled):
    ours, theirs = pairs[widths]
    latents = random_latents(frames, height, width)
    expected = reference_decode(theirs, latents, tiled)
    assert expected.abs().max() < 1  # nothing was clamped, nor would be
    assert relative(ours.decode(latents, tiled=tiled), expected) <= 1e-5


def test_tiling_shows(pairs):
    """Tiles and the whole frame differ by far more than the tolerance, or the tests above would
    prove little."""
    _, theirs = pairs["narrow"]
    video = random_video(1, 208, 400)
    latents = random_latents(1, 208, 400)
    encoded = reference_encode(theirs, video, tiled=True)
    assert relative(encoded, reference_encode(theirs, video, tiled=False)) > 1e-3
    decoded = reference_decode(theirs, latents, tiled=True)
    assert relative(decoded, reference_decode(theirs, latents, tiled=False)) > 1e-3


def test_batch(pairs):
    ours, theirs = pairs["narrow"]
    video = random_video(5, 48, 32, batch=2)
    latents = random_latents(5, 48, 32, batch=2)
    for one, other in zip(ours.encode(video), reference_encode(theirs, video, False), strict=True):
        assert relative(one, other) <= 1e-5
    for one, other in zip(
        ours.decode(latents), reference_decode(theirs, latents, False), strict=True
    ):
        assert relative(one, other) <= 1e-5


@pytest.mark.parametrize("height, width", [(64, 48), (32, 272)])
def test_decoded_video_is_clamped(pairs, height, width):
    ours, theirs = pairs["garish"]
    latents = random_latents(5, height, width)
    video = ours.decode(latents)
    expected = reference_decode(theirs, latents, True).clamp(-1, 1)
    assert (expected.abs() == 1).float().mean() > 0.1
    assert relative(video, expected) <= 1e-5


@pytest.mark.parametrize(
    "shape", [(1, 3, 4, 64, 64), (1, 3, 6, 64, 64), (1, 3, 5, 60, 64), (1, 3, 5, 64, 100)]
)
def test_sizes_that_do_not_fit_are_refused(pairs, shape):
    with pytest.raises(ValueError) as error:
        pairs["narrow"][0].encode(torch.zeros(shape))
    assert f"{shape[2]} frames of {shape[4]}x{shape[3]}" in str(error.value)


# A clip of 17 frames, cut in every way that streaming allows; latents likewise.
@pytest.mark.parametrize("sizes", [(17,), (1, 16), (5, 12), (9, 8), (1, 4, 8, 4), (1, 4, 4, 4, 4)])
@torch.no_grad()
def test_chunks_of_any_length(pairs, sizes):
    ours, theirs = pairs["as Wan"]
    video = random_video(17, 40, 56)
    latents = random_latents(17, 40, 56)
    mean, std = statistics(theirs)

    history = {}
    moments = torch.cat(
        [ours.encode_chunk(chunk, history) for chunk in video.split(sizes, dim=2)], dim=2
    )
    theirs.use_tiling = False
    assert relative(moments, theirs.encode(video).latent_dist.parameters) <= 1e-5
    normalised = (moments[:, :16] - mean) / std
    assert relative(normalised, ours.encode(video)) <= 1e-5

    history = {}
    latent_sizes = [(size + 3) // 4 for size in sizes]
    chunks = (latents * std + mean).split(latent_sizes, dim=2)
    frames = torch.cat([ours.decode_chunk(chunk, history) for chunk in chunks], dim=2)
    assert relative(frames, reference_decode(theirs, latents, False)) <= 1e-5
    assert relative(frames, ours.decode(latents)) <= 1e-5


def test_gradients(pairs):
    """As training runs it, the whole clip in one chunk: autograd reaches every parameter, with the
    gradient that Diffusers' streamed evaluation has. In float64, because a gradient is a sum over
    all pixels (but Diffusers passes through float32 when it upsamples)."""
    ours, theirs = (copy.deepcopy(model).double().requires_grad_() for model in pairs["as Wan"])
    theirs.use_tiling = False
    video = random_video(9, 24, 32).double()
    latents = random_latents(9, 24, 32).double()
    results = ours.encode_chunk(video, {}), ours.decode_chunk(latents, {})
    expected = theirs.encode(video).latent_dist.parameters, theirs.decode(latents).sample
    directions = [torch.randn_like(result) for result in results]
    torch.autograd.backward(results, directions)
    torch.autograd.backward(expected, directions)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 0, name
        expected = gradients[checkpoint_name(WanVAE, name)]
        assert relative(parameter.grad, expected) <= 1e-5, name


DECODE = """
vae = model.WanVAE.from_pretrained(sys.argv[1])
vae.decode(torch.randn(1, 16, int(sys.argv[2]), 16, 16))
"""
ENCODE = """
vae = model.WanVAE.from_pretrained(sys.argv[1])
vae.encode(torch.rand(1, 3, 4 * int(sys.argv[2]) - 3, 128, 128))
"""


@pytest.mark.parametrize("script", [DECODE, ENCODE], ids=["decode", "encode"])
def test_memory_does_not_grow_with_the_clip(tmp_path, script):
    """72 frames more cost the 14.2 MB that they take themselves and nothing else. 2 MB are allowed,
    for the latents and for the pages that each run of the process rounds up otherwise (1 MB was
    seen); a second copy of the clip would cost 14.2 and keeping the features of the widest layer
    38. Nine frames are the shortest clip in which every layer has a past to remember."""
    randomise(AutoencoderKLWan(base_dim=8, num_res_blocks=1)).save_pretrained(tmp_path)
    clip = {
        latents: 3 * (4 * latents - 3) * 128 * 128 * 4 for latents in (3, 21)
    }  # bytes of 9 and of 81 frames
    short, long = (peak_memory(script, tmp_path, latents) - size for latents, size in clip.items())
    print(f"peak beyond the clip: {short / 1e6:.1f} MB for 9 frames, {long / 1e6:.1f} MB for 81")
    assert long - short <= 2e6
