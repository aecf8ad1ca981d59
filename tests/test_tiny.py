"""The aquarium and the model that learned it: scenes, captions, the detector that counts fish, the
weights.

With other weights, `python tests/test_tiny.py` records again what a short run with them gives."""

import hashlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from oracle import relative
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).parent.parent))
from freeswim import generate, refine, upsample
from model import TextEncoder, WanTransformer, WanVAE, encode_prompt, load_tokenizer
from support.presets import BUNDLED
from tiny import world
from tiny.ablate import asked_for, at_border, frechet, judge, looked_at, patch_features, sharpness
from tiny.train import Muon, cut_windows

TINY = Path(__file__).parent.parent / "tiny"
RECORDED = Path(__file__).parent / "reference" / "tiny.safetensors"
AQUARIUM = Path(__file__).parent / "reference" / "aquarium.safetensors"
PROMPTS = [
    f"a large {colour} plain fish swims right above a sandy floor" for colour in world.COLOURS
]


@pytest.fixture(scope="module")
def transformer():
    return WanTransformer.from_pretrained(TINY / "transformer")


@pytest.fixture(scope="module")
def vae():
    return WanVAE.from_pretrained(TINY / "vae")


@pytest.fixture(scope="module")
def text():
    return embeddings()


def embeddings():
    """Of the prompts, and of the empty one."""
    encoder = TextEncoder.from_pretrained(TINY / "text_encoder")
    return encode_prompt(
        encoder, load_tokenizer(TINY / "tokenizer", BUNDLED.text_length), [*PROMPTS, ""]
    )


def test_scenes_are_those_that_the_model_was_trained_on():
    """Their captions, and their pictures up to the last grey level, as they were recorded."""
    with safe_open(AQUARIUM, "pt") as recorded:
        metadata = recorded.metadata()
        frames = recorded.get_tensor("frames")
        of_windows = recorded.get_tensor("windows")
    scenes = world.sample_scenes(40, torch.Generator().manual_seed(11))
    draw = torch.Generator().manual_seed(12)
    left = torch.rand(40, generator=draw)
    top = torch.rand(40, generator=draw) / 2
    window = (left, top, torch.full((40,), 1 / 160))
    assert world.captions(scenes) == json.loads(metadata["captions"])
    in_windows = world.captions(scenes, window, (64, 96))
    assert in_windows == json.loads(metadata["captions of windows"])

    few = {name: value[:3] for name, value in scenes.items()}
    assert grey_levels_off(world.render(few, 64, 96, 5), frames) <= 1
    few_windows = [part[:3] for part in window]
    assert grey_levels_off(world.render(few, 64, 96, 5, few_windows), of_windows) <= 1


def grey_levels_off(video, recorded):
    """Between every fourth frame of clips in [-1, 1], and recorded ones, uint8."""
    levels = ((video[:, :, ::4] + 1) * 127.5).round()
    return (levels - recorded).abs().max()


def test_a_scene_is_the_same_at_every_size():
    scenes = world.sample_scenes(3, torch.Generator().manual_seed(0))
    again = world.sample_scenes(3, torch.Generator().manual_seed(0))
    small, large = world.render(scenes, 64, 96, 5), world.render(again, 192, 288, 5)
    assert torch.equal(small, world.render(again, 64, 96, 5))
    error = F.avg_pool3d(large, (1, 3, 3)) - small
    assert error.square().mean() < 2e-3 and 0.1 < small.std()
    window = (
        torch.full((3,), 0.5),
        torch.full((3,), 0.25),
        torch.full((3,), 1 / 192),
    )  # a part, as it is in the whole
    part = world.render(scenes, 48, 64, 5, window)
    assert (part - large[..., 48:96, 96:160]).abs().max() < 1e-3


def test_bubbles_rise_where_no_fish_is():
    scenes = world.sample_scenes(60, torch.Generator().manual_seed(2))
    none, there = torch.zeros(60, dtype=torch.long), torch.ones(60, dtype=torch.long)
    water, bubbles, fish = (
        world.render(scenes | {"seaweed": none} | change, 64, 96)
        for change in (
            {"fish": none, "bubbles": none},
            {"fish": none, "bubbles": there},
            {"bubbles": none},
        )
    )
    bubbles, fish = ((clip - water).abs().amax(1) > 0.05 for clip in (bubbles, fish))
    assert (bubbles.flatten(1).any(1).float().mean() > 0.9) and fish.flatten(1).any(1).all()
    assert not (bubbles & fish).any()


def test_captions_say_what_is_there():
    scenes = world.sample_scenes(50, torch.Generator().manual_seed(0))
    for row, caption in enumerate(world.captions(scenes)):
        fish = caption.split(" above ")[0].split(" and ")
        assert len(fish) == scenes["fish"][row]
        for one, words in enumerate(fish):
            _, size, colour, pattern, _, _, side = words.split()
            assert (size == "large") == (scenes["length"][row, one] > 0.5)
            assert list(world.COLOURS).index(colour) == scenes["colour"][row, one]
            assert world.PATTERNS.index(pattern) == scenes["pattern"][row, one]
            assert (side == "right") == (scenes["direction"][row, one] > 0)
        for thing in ("seaweed", "bubbles"):
            assert (thing in caption) == bool(scenes[thing][row])


def test_captions_of_close_ups_say_what_is_seen():
    """A window on the whole scene shows all of it; one on a fish shows that, large; one on water
    alone, nothing."""
    scenes = world.sample_scenes(200, torch.Generator().manual_seed(1))
    zero, half = torch.zeros(200), 16 / world.FPS / 2
    assert world.captions(scenes, (zero, zero, zero + 1 / 128), (128, 192)) == world.captions(
        scenes
    )
    x = scenes["x"][:, 0] + scenes["direction"][:, 0] * scenes["speed"][:, 0] * half
    pixel = scenes["length"][:, 0] / 192
    captions = world.captions(
        scenes, (x - 96 * pixel, scenes["y"][:, 0] - 64 * pixel, pixel), (128, 192)
    )
    for row, caption in enumerate(captions):
        colour, pattern = (
            list(world.COLOURS)[scenes["colour"][row, 0]],
            world.PATTERNS[scenes["pattern"][row, 0]],
        )
        assert caption.startswith(f"a large {colour} {pattern} fish swims ")
    alone = {key: value[scenes["fish"] == 1] for key, value in scenes.items()}
    away = torch.where(alone["x"][:, 0] < 0.75, 1.2, 0.0)  # far from the fish, above the floor
    captions = world.captions(
        alone, (away, zero[: len(away)], zero[: len(away)] + 0.3 / 192), (128, 192)
    )
    assert (
        set(captions) <= {"", "with seaweed", "with bubbles", "with seaweed and bubbles"}
        and "" in captions
    )


def test_training_windows_are_cut_where_their_captions_say():
    """Of latents that hold their own row and column; scenes are 256 x 384 pixels."""
    scenes = world.sample_scenes(20, torch.Generator().manual_seed(2))
    rows, columns = torch.arange(32.0)[:, None].expand(32, 48), torch.arange(48.0).expand(32, 48)
    latents = torch.stack([rows, columns])[None, :, None].expand(20, 2, 5, 32, 48)
    args = SimpleNamespace(height=128, width=192, frames=17)
    windows, text = cut_windows(latents, scenes, 2, args, torch.Generator().manual_seed(0))
    (top, left), count = windows[:, :, 0, 0, 0].T, 80  # four windows of each scene
    assert (
        windows.shape == (count, 2, 5, 18, 26)
        and (top.max(), left.max()) == (14, 22)
        and (left % 2 == 0).all()
    )
    assert torch.equal(
        windows[:, 0], (top[:, None] + torch.arange(18))[:, None, :, None].expand(count, 5, 18, 26)
    )
    assert torch.equal(
        windows[:, 1], (left[:, None] + torch.arange(26))[:, None, None].expand(count, 5, 18, 26)
    )
    four = {key: value.repeat(4, *[1] * (value.ndim - 1)) for key, value in scenes.items()}
    assert text == world.captions(
        four, (left / 32, top / 32, torch.full((count,), 1 / 256)), (144, 208)
    )


def test_the_detector_is_right_on_true_clips():
    scenes = world.sample_scenes(40, torch.Generator().manual_seed(5 * 10**6))
    verdicts = []
    for start in range(0, 40, 4):
        part = {key: value[start : start + 4] for key, value in scenes.items()}
        frames = looked_at(world.render(part, 128, 192))
        verdicts += [judge(clip, asked_for(part, row)) for row, clip in enumerate(frames)]
    share = {
        name: sum(verdict[name] for verdict in verdicts) / len(verdicts) for name in verdicts[0]
    }
    assert share["extra fish"] == 0
    assert (
        min(share["count"], share["colours"], share["direction"]) >= 0.975
        and share["pattern"] >= 0.9
    ), share


def test_the_detector_sees_what_is_wrong():
    scenes = world.sample_scenes(40, torch.Generator().manual_seed(5 * 10**6))
    row = int((scenes["fish"] == 1).nonzero()[0])
    scenes = {key: value[row : row + 1] for key, value in scenes.items()}
    video = world.render(scenes, 256, 384)

    def verdict(video, **changes):
        return judge(looked_at(video)[0], asked_for(scenes | changes, 0))

    assert verdict(video) == {
        "extra fish": 0,
        "count": 1,
        "colours": 1,
        "direction": 1,
        "pattern": 1,
    }
    twice = verdict(
        torch.cat([video, video], dim=-1)
    )  # the fish in each half, as a naive window would draw it
    assert twice["extra fish"] == 1 and twice["count"] == twice["colours"] == 0
    assert verdict(video, colour=(scenes["colour"] + 1) % 5)["colours"] == 0
    backwards = verdict(video.flip(2))
    assert backwards["direction"] == 0 and backwards["count"] == 1
    for other in {0, 1, 2} - {scenes["pattern"][0, 0].item()}:
        assert verdict(video, pattern=torch.full_like(scenes["pattern"], other))["pattern"] == 0


def test_distances_of_detail():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5000, 4, generator=draw)
    assert frechet(a, b) < 0.01
    assert abs(frechet(a, b + 3) - 36) < 1  # the squared distance of the means,
    assert abs(frechet(a, 2 * b) - 4) < 0.3  # and of the standard deviations
    frames = torch.rand(1, 3, 128, 192, generator=draw)
    assert sharpness(frames) > 3 * sharpness(F.avg_pool2d(frames, 3, 1, 1))
    border, inside = at_border(patch_features(frames))
    assert len(inside) == 3 * 7 and len(border) == 7 * 11 - 3 * 7


def test_muon_for_many_matrices_is_muon_for_each():
    draw = torch.Generator().manual_seed(0)
    start = [
        torch.randn(shape, generator=draw) for shape in ((16, 16), (16, 16), (48, 16), (16, 48))
    ]
    ours, theirs = ([part.clone().requires_grad_() for part in start] for _ in range(2))
    settings = {"lr": 1e-2, "weight_decay": 0.01}
    optimizers = (
        Muon(ours, **settings),
        torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = other.grad = torch.randn(one.shape, generator=draw)
        for optimizer in optimizers:
            optimizer.step()
    for one, other, before in zip(ours, theirs, start, strict=True):  # in bfloat16, that is
        assert relative(one.detach() - before, other.detach() - before) <= 1e-2


def test_it_is_small():
    files = [file for file in TINY.rglob("*") if file.suffix in (".json", ".safetensors")]
    assert sum(file.stat().st_size for file in files) <= 25e6
    for file in TINY.rglob("*.safetensors"):
        assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(file).values())


def test_the_card_tells_which_weights_these_are():
    card = (TINY / "README.md").read_text(encoding="utf-8")
    for file in TINY.rglob("*.safetensors"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in card


@torch.no_grad()
def short_run(transformer, vae, text):
    """A base clip of 5 frames in 4 steps, and 3 steps of its refinement at one and a half times the
    size."""
    settings = dict(guidance=3.5, flow_shift=3.0, generator=torch.Generator().manual_seed(0))
    base = generate(transformer, text[:1], text[-1:], (1, 16, 2, 16, 24), steps=4, **settings)
    clean = vae.encode(upsample(vae.decode(base), 192, 288), tiled=False)
    refined = refine(
        transformer,
        clean,
        text[:1],
        text[-1:],
        native=(8, 12),
        steps=6,
        strength=0.5,
        cache_interval=2,
        **settings,
    )
    return {"base": base, "refined": refined}


def test_a_short_run_gives_the_recorded_latents(transformer, vae, text):
    latents, recorded = short_run(transformer, vae, text), load_file(RECORDED)
    assert relative(latents["base"], recorded["base"]) <= 1e-3
    assert relative(latents["refined"], recorded["refined"]) <= 1e-3


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
    tokens = load_tokenizer(TINY / "tokenizer", BUNDLED.text_length).encode(PROMPTS[0])
    count = sum(tokens.attention_mask)
    expected = theirs(torch.tensor([tokens.ids[:count]])).last_hidden_state
    assert relative(text[:1, :count], expected) <= 1e-5


def test_captions_are_made_of_words_that_it_knows():
    known = json.loads((TINY / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))[
        "model"
    ]["vocab"]
    for caption in world.captions(world.sample_scenes(200, torch.Generator().manual_seed(0))):
        assert set(caption.split()) <= set(known)


def test_the_vae_gives_back_a_clip_that_it_never_saw(vae):
    scenes = world.sample_scenes(1, torch.Generator().manual_seed(10**6 + 1))
    video = world.render(scenes, 128, 192)
    error = (vae.decode(vae.encode(video)) - video).square().mean()
    assert 10 * math.log10(4 / error) >= 33  # dB


def test_a_prompted_fish_has_its_colour(transformer, vae, text):
    count = len(PROMPTS)
    latents = generate(
        transformer,
        text[:-1],
        text[-1:].expand(count, -1, -1),
        (count, 16, 5, 16, 24),
        steps=12,
        guidance=BUNDLED.guidance,
        generator=torch.Generator().manual_seed(0),
    )
    frame = vae.decode(latents[:, :, :3])[:, :, -1] / 2 + 0.5  # (5, 3, 128, 192)
    palette = torch.tensor(list(world.COLOURS.values())).view(1, -1, 3, 1, 1)
    share = (
        ((frame[:, None] - palette).norm(dim=2) < 0.25).float().mean((2, 3))
    )  # of the pixels: prompts x colours
    right = share.argmax(dim=1) == torch.arange(count)
    assert right.all() and (share.amax(1) > 0.01).all(), share


if __name__ == "__main__":
    models = (
        cls.from_pretrained(TINY / part)
        for cls, part in ((WanTransformer, "transformer"), (WanVAE, "vae"))
    )
    save_file(short_run(*models, embeddings()), RECORDED)
