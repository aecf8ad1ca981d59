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
from oracle import relative, seeded
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).parent.parent))
from freeswim import generate, refine, upsample
from model import TextEncoder, WanTransformer, WanVAE, encode_prompt, load_tokenizer
from support.presets import BUNDLED
from tiny import world
from tiny.ablate import (
    asked_for,
    at_border,
    frechet,
    judge,
    looked_at,
    patch_features,
    rows_of,
    sharpness,
)
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
    scenes = world.sample_scenes(40, seeded(11))
    draw = seeded(12)
    left = torch.rand(40, generator=draw)
    top = torch.rand(40, generator=draw) / 2
    window = (left, top, torch.full((40,), 1 / 160))
    assert world.captions(scenes) == json.loads(metadata["captions"])
    in_windows = world.captions(scenes, window, (64, 96))
    assert in_windows == json.loads(metadata["captions of windows"])

    few = rows_of(scenes, 0, 3)
    whole = world.render(few, 64, 96, 5)
    assert grey_levels_off(whole, frames) <= 1
    few_windows = [part[:3] for part in window]
    seen = world.render(few, 64, 96, 5, few_windows)
    assert grey_levels_off(seen, of_windows) <= 1


def grey_levels_off(video, recorded):
    """Between every fourth frame of clips in [-1, 1], and recorded ones, uint8."""
    frames = video[:, :, ::4]
    levels = ((frames + 1) * 127.5).round()
    return (levels - recorded).abs().max()


def test_a_scene_is_the_same_at_every_size():
    scenes = world.sample_scenes(3, seeded(0))
    again = world.sample_scenes(3, seeded(0))
    small = world.render(scenes, 64, 96, 5)
    large = world.render(again, 192, 288, 5)
    assert torch.equal(small, world.render(again, 64, 96, 5))
    error = F.avg_pool3d(large, (1, 3, 3)) - small
    assert error.square().mean() < 2e-3
    assert 0.1 < small.std()
    # A part, as it is in the whole
    window = (torch.full((3,), 0.5), torch.full((3,), 0.25), torch.full((3,), 1 / 192))
    part = world.render(scenes, 48, 64, 5, window)
    difference = part - large[..., 48:96, 96:160]
    assert difference.abs().max() < 1e-3


def test_bubbles_rise_where_no_fish_is():
    scenes = world.sample_scenes(60, seeded(2))
    none = torch.zeros(60, dtype=torch.long)
    ones = torch.ones(60, dtype=torch.long)
    empty = scenes | {"seaweed": none, "fish": none, "bubbles": none}
    water = world.render(empty, 64, 96)

    def changed_by(**things):
        """Which pixels these things change."""
        clip = world.render(empty | things, 64, 96)
        return (clip - water).abs().amax(1) > 0.05

    bubbles = changed_by(bubbles=ones)
    fish = changed_by(fish=scenes["fish"])
    has_bubbles = bubbles.flatten(1).any(1)
    assert has_bubbles.float().mean() > 0.9
    assert fish.flatten(1).any(1).all()
    assert not (bubbles & fish).any()


def test_captions_say_what_is_there():
    scenes = world.sample_scenes(50, seeded(0))
    for row, caption in enumerate(world.captions(scenes)):
        fish = caption.split(" above ")[0].split(" and ")
        assert len(fish) == scenes["fish"][row]
        for one, words in enumerate(fish):
            _, size, colour, pattern, _, _, side = words.split()
            assert (size == "large") == (scenes["length"][row, one] > 0.5)
            fish_there = asked_for(scenes, row)[one]
            assert colour == fish_there["colour"]
            assert pattern == fish_there["pattern"]
            assert (side == "right") == (fish_there["direction"] > 0)
        for thing in ("seaweed", "bubbles"):
            assert (thing in caption) == bool(scenes[thing][row])


def test_captions_of_close_ups_say_what_is_seen():
    """A window on the whole scene shows all of it; one on a fish shows that, large; one on water
    alone, nothing."""
    scenes = world.sample_scenes(200, seeded(1))
    zero = torch.zeros(200)
    half = 16 / world.FPS / 2
    whole = (zero, zero, zero + 1 / 128)
    assert world.captions(scenes, whole, (128, 192)) == world.captions(scenes)
    x = world.fish_x(scenes, half)[:, 0]
    y = scenes["y"][:, 0]
    pixel = scenes["length"][:, 0] / 192
    around_fish = (x - 96 * pixel, y - 64 * pixel, pixel)
    captions = world.captions(scenes, around_fish, (128, 192))
    for row, caption in enumerate(captions):
        colour = list(world.COLOURS)[scenes["colour"][row, 0]]
        pattern = world.PATTERNS[scenes["pattern"][row, 0]]
        assert caption.startswith(f"a large {colour} {pattern} fish swims ")
    is_alone = scenes["fish"] == 1
    alone = {name: value[is_alone] for name, value in scenes.items()}
    is_left = alone["x"][:, 0] < 0.75
    away = torch.where(is_left, 1.2, 0.0)  # far from the fish, above the floor
    zero = torch.zeros(len(away))
    on_water = (away, zero, zero + 0.3 / 192)
    captions = world.captions(alone, on_water, (128, 192))
    assert set(captions) <= {"", "with seaweed", "with bubbles", "with seaweed and bubbles"}
    assert "" in captions


def test_training_windows_are_cut_where_their_captions_say():
    """Of latents that hold their own row and column; scenes are 256 x 384 pixels."""
    scenes = world.sample_scenes(20, seeded(2))
    positions = positions_of(32, 48)
    latents = positions[None, :, None].expand(20, 2, 5, 32, 48)
    args = SimpleNamespace(height=128, width=192, frames=17)
    windows, text = cut_windows(latents, scenes, 2, args, seeded(0))
    top, left = windows[:, :, 0, 0, 0].T
    count = 80  # four windows of each scene
    assert windows.shape == (count, 2, 5, 18, 26)
    assert (top.max(), left.max()) == (14, 22)
    assert (left % 2 == 0).all()
    corners = windows[:, :, :1, :1, :1]
    expected = positions_of(18, 26)[None, :, None]
    assert torch.equal(windows - corners, expected.expand_as(windows))
    four = {name: torch.cat([value] * 4) for name, value in scenes.items()}
    pixel = torch.full((count,), 1 / 256)
    of_windows = (left / 32, top / 32, pixel)
    assert text == world.captions(four, of_windows, (144, 208))


def positions_of(height, width):
    """The row and the column of each position, (2, height, width)."""
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width).expand(height, width)
    return torch.stack([rows, columns]).float()


def test_the_detector_is_right_on_true_clips():
    scenes = world.sample_scenes(40, seeded(5 * 10**6))
    verdicts = []
    for start in range(0, 40, 4):
        part = rows_of(scenes, start, start + 4)
        frames = looked_at(world.render(part, 128, 192))
        for row, clip in enumerate(frames):
            verdicts.append(judge(clip, asked_for(part, row)))
    share = {}
    for name in verdicts[0]:
        total = sum(verdict[name] for verdict in verdicts)
        share[name] = total / len(verdicts)
    assert share["extra fish"] == 0
    for name in ("count", "colours", "direction"):
        assert share[name] >= 0.975
    assert share["pattern"] >= 0.9


def test_the_detector_sees_what_is_wrong():
    scenes = world.sample_scenes(40, seeded(5 * 10**6))
    row = int((scenes["fish"] == 1).nonzero()[0])
    scenes = rows_of(scenes, row, row + 1)
    video = world.render(scenes, 256, 384)

    def verdict(video, **changes):
        frames = looked_at(video)[0]
        wanted = asked_for(scenes | changes, 0)
        return judge(frames, wanted)

    assert verdict(video) == {
        "extra fish": 0,
        "count": 1,
        "colours": 1,
        "direction": 1,
        "pattern": 1,
    }
    # The fish in each half, as a naive window would draw it
    twice = verdict(torch.cat([video, video], dim=-1))
    assert twice["extra fish"] == 1
    assert twice["count"] == twice["colours"] == 0
    other_colour = (scenes["colour"] + 1) % 5
    assert verdict(video, colour=other_colour)["colours"] == 0
    backwards = verdict(video.flip(2))
    assert backwards["direction"] == 0
    assert backwards["count"] == 1
    pattern = scenes["pattern"]
    for other in {0, 1, 2} - {pattern[0, 0].item()}:
        other_pattern = torch.full_like(pattern, other)
        assert verdict(video, pattern=other_pattern)["pattern"] == 0


def test_distances_of_detail():
    draw = seeded(0)
    a, b = torch.randn(2, 5000, 4, generator=draw)
    assert frechet(a, b) < 0.01
    assert abs(frechet(a, b + 3) - 36) < 1  # the squared distance of the means,
    assert abs(frechet(a, 2 * b) - 4) < 0.3  # and of the standard deviations
    frames = torch.rand(1, 3, 128, 192, generator=draw)
    blurred = F.avg_pool2d(frames, 3, 1, 1)
    assert sharpness(frames) > 3 * sharpness(blurred)
    border, inside = at_border(patch_features(frames))
    assert len(inside) == 3 * 7
    assert len(border) == 7 * 11 - 3 * 7


def test_muon_for_many_matrices_is_muon_for_each():
    draw = seeded(0)
    shapes = ((16, 16), (16, 16), (48, 16), (16, 48))
    start = [torch.randn(shape, generator=draw) for shape in shapes]
    ours = [part.clone().requires_grad_() for part in start]
    theirs = [part.clone().requires_grad_() for part in start]
    settings = {"lr": 1e-2, "weight_decay": 0.01}
    optimizers = (
        Muon(ours, **settings),
        torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=draw)
            other.grad = one.grad
        for optimizer in optimizers:
            optimizer.step()
    for one, other, before in zip(ours, theirs, start, strict=True):  # in bfloat16, that is
        ours_moved = one.detach() - before
        theirs_moved = other.detach() - before
        assert relative(ours_moved, theirs_moved) <= 1e-2


def test_it_is_small():
    size = 0
    for file in TINY.rglob("*"):
        if file.suffix in (".json", ".safetensors"):
            size += file.stat().st_size
    assert size <= 25e6
    for file in TINY.rglob("*.safetensors"):
        for tensor in load_file(file).values():
            assert tensor.dtype == torch.bfloat16


def test_the_card_tells_which_weights_these_are():
    card = (TINY / "README.md").read_text(encoding="utf-8")
    for file in TINY.rglob("*.safetensors"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in card


@torch.no_grad()
def short_run(transformer, vae, text):
    """A base clip of 5 frames in 4 steps, and 3 steps of its refinement at one and a half times the
    size."""
    settings = dict(guidance=3.5, flow_shift=3.0, generator=seeded(0))
    prompt = text[:1]
    negative = text[-1:]
    shape = (1, 16, 2, 16, 24)
    base = generate(transformer, prompt, negative, shape, steps=4, **settings)
    enlarged = upsample(vae.decode(base), 192, 288)
    clean = vae.encode(enlarged, tiled=False)
    refined = refine(
        transformer,
        clean,
        prompt,
        negative,
        native=(8, 12),
        steps=6,
        strength=0.5,
        cache_interval=2,
        **settings,
    )
    return {"base": base, "refined": refined}


def test_a_short_run_gives_the_recorded_latents(transformer, vae, text):
    latents = short_run(transformer, vae, text)
    recorded = load_file(RECORDED)
    assert relative(latents["base"], recorded["base"]) <= 1e-3
    assert relative(latents["refined"], recorded["refined"]) <= 1e-3


@torch.no_grad()
def test_diffusers_and_transformers_read_it_as_we_do(transformer, vae, text):
    draw = seeded(0)
    latents = torch.randn(1, 16, 2, 16, 24, generator=draw)
    timestep = torch.tensor([600])
    theirs = WanTransformer3DModel.from_pretrained(TINY / "transformer")
    expected = theirs(latents, timestep, text[:1]).sample
    assert relative(transformer(latents, timestep, text[:1]), expected) <= 1e-5

    theirs = AutoencoderKLWan.from_pretrained(TINY / "vae")
    expected = theirs.decode(latents * vae.std + vae.mean).sample
    assert relative(vae.decode(latents), expected) <= 1e-5

    theirs = UMT5EncoderModel.from_pretrained(TINY / "text_encoder")
    tokenizer = load_tokenizer(TINY / "tokenizer", BUNDLED.text_length)
    tokens = tokenizer.encode(PROMPTS[0])
    count = sum(tokens.attention_mask)
    ids = torch.tensor([tokens.ids[:count]])
    expected = theirs(ids).last_hidden_state
    assert relative(text[:1, :count], expected) <= 1e-5


def test_captions_are_made_of_words_that_it_knows():
    file = TINY / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    known = tokenizer["model"]["vocab"]
    for caption in world.captions(world.sample_scenes(200, seeded(0))):
        assert set(caption.split()) <= set(known)


def test_the_vae_gives_back_a_clip_that_it_never_saw(vae):
    scenes = world.sample_scenes(1, seeded(10**6 + 1))
    video = world.render(scenes, 128, 192)
    decoded = vae.decode(vae.encode(video))
    error = (decoded - video).square().mean()
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
        generator=seeded(0),
    )
    video = vae.decode(latents[:, :, :3])
    frame = video[:, :, -1] / 2 + 0.5  # (5, 3, 128, 192)
    palette = torch.tensor(list(world.COLOURS.values()))
    difference = frame[:, None] - palette[None, :, :, None, None]
    is_near = difference.norm(dim=2) < 0.25
    share = is_near.float().mean((2, 3))  # of the pixels: prompts x colours
    assert share.argmax(dim=1).tolist() == list(range(count))
    assert share.amax(1).min() > 0.01


if __name__ == "__main__":
    recorded = short_run(
        WanTransformer.from_pretrained(TINY / "transformer"),
        WanVAE.from_pretrained(TINY / "vae"),
        embeddings(),
    )
    save_file(recorded, RECORDED)
