"""The bundled model: whole, in the layout that others read too, and it learned its colours."""
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from oracle import relative
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

from freeswim import generate
from model import TextEncoder, WanTransformer, WanVAE, encode_prompt, load_tokenizer
from tiny import world
from tiny.train import TEXT_LENGTH

TINY = Path(__file__).parent.parent / "tiny"
PROMPTS = [f"a large {colour} plain fish swims right above a sandy floor" for colour in world.COLOURS]


@pytest.fixture(scope="module")
def transformer():
    return WanTransformer.from_pretrained(TINY / "transformer")


@pytest.fixture(scope="module")
def vae():
    return WanVAE.from_pretrained(TINY / "vae")


@pytest.fixture(scope="module")
def text():
    encoder = TextEncoder.from_pretrained(TINY / "text_encoder")
    return encode_prompt(encoder, load_tokenizer(TINY / "tokenizer", TEXT_LENGTH), [*PROMPTS, ""])


def test_it_is_small():
    files = [file for file in TINY.rglob("*") if file.suffix in (".json", ".safetensors")]
    assert sum(file.stat().st_size for file in files) <= 25e6
    for file in TINY.rglob("*.safetensors"):
        assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(file).values())


@torch.no_grad()
def test_diffusers_and_transformers_read_it_as_we_do(transformer, vae, text):
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 2, 16, 24, generator=draw)
    timestep = torch.tensor([600])
    theirs = WanTransformer3DModel.from_pretrained(TINY / "transformer")
    expected = theirs(latents, timestep, text[:1]).sample
    assert relative(transformer(latents, timestep, text[:1]), expected) <= 1e-5

    theirs = AutoencoderKLWan.from_pretrained(TINY / "vae")
    expected = theirs.decode(latents * vae.std + vae.mean).sample
    assert relative(vae.decode(latents), expected) <= 1e-5

    theirs = UMT5EncoderModel.from_pretrained(TINY / "text_encoder")
    tokens = load_tokenizer(TINY / "tokenizer", TEXT_LENGTH).encode(PROMPTS[0])
    count = sum(tokens.attention_mask)
    expected = theirs(torch.tensor([tokens.ids[:count]])).last_hidden_state
    assert relative(text[:1, :count], expected) <= 1e-5


def test_captions_are_made_of_words_that_it_knows():
    known = json.loads((TINY / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    for caption in world.captions(world.sample_scenes(200, torch.Generator().manual_seed(0))):
        assert set(caption.split()) <= set(known)


def test_the_vae_gives_back_a_clip_that_it_never_saw(vae):
    scenes = world.sample_scenes(1, torch.Generator().manual_seed(10**6 + 1))
    video = world.render(scenes, 128, 192)
    error = (vae.decode(vae.encode(video)) - video).square().mean()
    assert 10 * math.log10(4 / error) >= 30  # dB


def test_a_prompted_fish_has_its_colour(transformer, vae, text):
    count = len(PROMPTS)
    latents = generate(transformer, text[:-1], text[-1:].expand(count, -1, -1), (count, 16, 5, 16, 24), steps=12,
                       guidance=3.5, generator=torch.Generator().manual_seed(0))
    frame = vae.decode(latents[:, :, :3])[:, :, -1] / 2 + 0.5  # (5, 3, 128, 192)
    palette = torch.tensor(list(world.COLOURS.values())).view(1, -1, 3, 1, 1)
    share = ((frame[:, None] - palette).norm(dim=2) < 0.25).float().mean((2, 3))  # of the pixels: prompts x colours
    right = share.argmax(dim=1) == torch.arange(count)
    assert right.sum() >= count - 1 and (share.amax(1) > 0.01).all(), share  # this first version may miss one
