"""Wan2.2-TI2V-5B: its VAE, its base clips and its refinement against Diffusers and against dense
windows, with small random models; its published names and shapes; and the command."""

import json
import shutil
from functools import partial

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from command import ROOT, latents, record, refused, run_here
from oracle import relative, seeded
from parity import TESTS, randomise, write_random_model
from safetensors.torch import save_file
from test_lora import lora_for
from test_parallel import finish, refined, torchrun

from freeswim import dense_window, generate, refine
from model import WanTransformer, WanVAE, build, checkpoint_name
from support import hub
from support.offload import load_streamed
from support.presets import WAN_2_2_5B, find_preset

diffusers = pytest.importorskip("diffusers")
PUBLISHED = TESTS / "wan2.2-ti2v-5b"
TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "num_layers": 3,
    "ffn_dim": 96,
    "text_dim": 40,
    "freq_dim": 32,
    "in_channels": 48,
    "out_channels": 48,
}


def published(part):
    return json.loads((PUBLISHED / part / "config.json").read_text(encoding="utf-8"))


def small_vae_config(**changes):
    narrow = {"base_dim": 4, "decoder_base_dim": 8, "num_res_blocks": 1}
    return published("vae") | narrow | changes


def make_pair(cls, config, folder):
    """Ours and Diffusers', from the same random checkpoint."""
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    theirs = randomise(cls(**settings))
    if cls is diffusers.AutoencoderKLWan:
        theirs.decoder.conv_out.weight.data *= 0.05  # no pixel is clamped, which would hide errors
        theirs.decoder.conv_out.bias.data *= 0.05
    theirs.save_pretrained(folder)
    ours = WanVAE if cls is diffusers.AutoencoderKLWan else WanTransformer
    return ours.from_pretrained(folder), theirs


# --------------------------------------------------------------------------------------------------
# Published names and shapes


@pytest.mark.parametrize(
    "part, ours, theirs",
    [
        ("transformer", WanTransformer, "WanTransformer3DModel"),
        ("vae", WanVAE, "AutoencoderKLWan"),
    ],
)
def test_names_and_shapes_are_the_published_ones(part, ours, theirs):
    settings = {name: value for name, value in published(part).items() if name[0] != "_"}
    with torch.device("meta"):
        expected = getattr(diffusers, theirs)(**settings).state_dict()
    built = build(ours, PUBLISHED / part).state_dict()
    shapes = {checkpoint_name(ours, name): tensor.shape for name, tensor in built.items()}
    assert shapes == {name: tensor.shape for name, tensor in expected.items()}


# --------------------------------------------------------------------------------------------------
# The VAE

VAES = {
    "narrow": {},
    "two blocks": {"base_dim": 6, "decoder_base_dim": 10, "num_res_blocks": 2},
    "other multipliers": {"decoder_base_dim": 4, "dim_mult": [2, 2, 4, 2]},
}


@pytest.fixture(scope="module", params=VAES)
def vaes(request, tmp_path_factory):
    config = small_vae_config(**VAES[request.param])
    return make_pair(diffusers.AutoencoderKLWan, config, tmp_path_factory.mktemp("vae"))


def random_video(frames, height, width):
    draw = seeded(2)
    return torch.rand(1, 3, frames, height, width, generator=draw) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize(
    "frames, height, width",
    [(1, 64, 96), (5, 64, 96), (9, 48, 80), (17, 32, 64), (5, 16, 16)],
)
def test_whole_frames_are_diffusers(vaes, frames, height, width):
    ours, theirs = vaes
    video = random_video(frames, height, width)
    mean = torch.tensor(theirs.config.latents_mean).view(-1, 1, 1, 1)
    std = torch.tensor(theirs.config.latents_std).view(-1, 1, 1, 1)
    expected = (theirs.encode(video).latent_dist.mode() - mean) / std
    encoded = ours.encode(video, tiled=False)
    assert relative(encoded, expected) <= 1e-5
    decoded = theirs.decode(expected * std + mean).sample
    assert decoded.abs().max() < 1
    assert relative(ours.decode(expected, tiled=False), decoded) <= 1e-5


def test_tiles_are_whole_frames_away_from_seams(tmp_path):
    """A tile sees zeros behind its border, so it differs near there: less, the farther away."""
    make_pair(diffusers.AutoencoderKLWan, small_vae_config(), tmp_path)
    whole = WanVAE.from_pretrained(tmp_path)
    tiled = WanVAE.from_pretrained(tmp_path, tile=32, stride=24)
    draw = seeded(3)
    # So far from a border, only attention within frames still tells.
    for attention in (whole, tiled):
        for block in (attention.encoder.mid_block, attention.decoder.mid_block):
            block.attentions[0].proj.weight.data.zero_()
    latents = torch.randn(1, 48, 2, 20, 44, generator=draw)
    expected = whole.decode(latents, tiled=False)
    decoded = tiled.decode(latents, tiled=True)
    assert relative(decoded[..., : 16 * 12], expected[..., : 16 * 12]) <= 1e-5
    assert relative(decoded, expected) < 0.2
    video = random_video(5, 320, 704)
    expected = whole.encode(video, tiled=False)
    encoded = tiled.encode(video, tiled=True)
    assert relative(encoded[..., :12], expected[..., :12]) <= 1e-5
    assert relative(encoded, expected) < 0.2


# --------------------------------------------------------------------------------------------------
# Base clips and refinements


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformer")
    config = TRANSFORMER | {"image_dim": None, "added_kv_proj_dim": None}
    return make_pair(diffusers.WanTransformer3DModel, config, folder)


def texts():
    draw = seeded(1)
    return torch.randn(2, 1, 7, 40, generator=draw)


@pytest.mark.parametrize("steps, guidance", [(4, 5.0), (4, 1.0), (9, 3.0)])
def test_base_latents_are_diffusers(transformers, tmp_path, steps, guidance):
    ours, theirs = transformers
    _, vae = make_pair(diffusers.AutoencoderKLWan, small_vae_config(), tmp_path)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    pipeline = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=scheduler,
        transformer=theirs,
        expand_timesteps=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    text, negative = texts()
    shape = (1, 48, 2, 4, 6)
    noise = torch.randn(shape, generator=seeded(0))
    expected = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=negative,
        height=64,
        width=96,
        num_frames=5,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise,
        output_type="latent",
    ).frames
    draw = seeded(0)
    settings = {"steps": steps, "flow_shift": 5.0, "guidance": guidance, "generator": draw}
    assert relative(generate(ours, text, negative, shape, **settings), expected) <= 1e-4


@pytest.mark.parametrize("interval", [None, 1, 2])
def test_a_refinement_is_that_of_dense_windows(transformers, interval):
    ours, _ = transformers
    text, negative = texts()
    encoded = torch.randn(1, 48, 2, 14, 18, generator=seeded(4))
    run = partial(refine, ours, encoded, text, negative, native=(4, 5), steps=5)
    run = partial(run, cache_interval=interval)
    draw = seeded(0)
    dense = run(generator=draw, window_attention=dense_window)
    assert relative(run(generator=seeded(0)), dense) <= 1e-5


# --------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model of one layer, as wide as the published one, with a small VAE."""
    folder = tmp_path_factory.mktemp("model")
    write_random_model(folder, heads=24, head_dim=128)
    shutil.copy(PUBLISHED / "model_index.json", folder / "model_index.json")
    file = folder / "transformer" / "config.json"
    transformer = json.loads(file.read_text(encoding="utf-8"))
    transformer |= {"in_channels": 48, "out_channels": 48, "ffn_dim": 64}
    torch.manual_seed(0)
    parts = [("transformer", WanTransformer, transformer), ("vae", WanVAE, small_vae_config())]
    for part, cls, config in parts:
        (folder / part / "config.json").write_text(json.dumps(config), encoding="utf-8")
        weights = {}
        for name, tensor in cls(config).state_dict().items():
            weights[checkpoint_name(cls, name)] = tensor
        save_file(weights, folder / part / "model.safetensors")
    return folder


FEW = ["--prompt", "a large red fish", "--frames", 1, "--steps", 2, "--device", "cpu"]


def test_the_preset():
    assert find_preset(3072, two_experts=False) is WAN_2_2_5B
    preset = WAN_2_2_5B
    assert (preset.width, preset.height, preset.frames, preset.fps) == (1280, 704, 121, 24)
    assert (preset.base_shift, preset.flow_shift, preset.steps) == (5, 9, 50)
    assert (preset.guidance, preset.guidance_2, preset.text_length) == (5, None, 512)


def test_the_command(folder, tmp_path):
    output = tmp_path / "run"
    run_here("--model", folder, *FEW, "--size", "1300x720", "--output", output)
    assert record(output)["computed"] == "1312x736"
    assert imageio.imread(output / "base.mp4").shape == (1, 704, 1280, 3)
    assert imageio.imread(output / "freeswim.mp4").shape == (1, 720, 1300, 3)
    assert record(output)["settings"]["fps"] == 24
    before = latents(output)
    (output / "state" / "refine.safetensors").unlink()
    run_here("--resume", output)
    assert latents(output) == before


def test_frames_higher_than_wide(folder, tmp_path):
    output = tmp_path / "run"
    run_here("--model", folder, *FEW, "--size", "704x1280", "--output", output)
    assert imageio.imread(output / "base.mp4").shape == (1, 1280, 704, 3)


def test_a_clip_with_a_lora_and_a_comparison(folder, tmp_path):
    picture = tmp_path / "picture.png"
    draw = np.random.default_rng(0)
    imageio.imwrite(picture, draw.integers(0, 256, (704, 1280, 3), dtype=np.uint8))
    lora_for(folder, tmp_path / "lora.safetensors")
    given = ["--model", folder, *FEW, "--base-video", picture, "--size", "1300x720", "--compare"]
    run_here(*given, "--output", tmp_path / "plain")
    run_here(*given, "--output", tmp_path / "merged", "--lora", tmp_path / "lora.safetensors")
    assert latents(tmp_path / "plain") != latents(tmp_path / "merged")
    strip_height = 720
    height, _, _ = imageio.imread(tmp_path / "plain" / "comparison.png").shape
    assert height == 5 * strip_height  # the base clip, FreeSwim, and three ways without its parts


def test_two_processes_with_sharded_weights(folder, tmp_path):
    given = ["--model", folder, *FEW, "--size", "1300x720", "--output"]
    run_here(*given, tmp_path / "alone")
    finish(torchrun(2, ROOT / "sample.py", *given, tmp_path / "together", "--shard-weights"))
    assert relative(refined(tmp_path / "together"), refined(tmp_path / "alone")) <= 1e-5


def test_streamed_weights(folder):
    """As on a small GPU; on a CPU the same code copies at once."""
    device = torch.device("cpu")
    plain = WanTransformer.from_pretrained(folder / "transformer")
    streamed = load_streamed(folder / "transformer", device, torch.float32)
    inputs = (torch.randn(1, 48, 1, 4, 6), torch.tensor([500.0]))
    text = torch.randn(1, 7, plain.config["text_dim"])
    with torch.no_grad():
        assert torch.equal(streamed(*inputs, text), plain(*inputs, text))


def test_parts_of_two_models_are_refused(folder, checkpoint, tmp_path):
    mixed = shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(mixed / "vae")
    shutil.copytree(checkpoint / "vae", mixed / "vae")
    with refused("its VAE has 16 latent channels, but its transformer 48", "different models"):
        run_here("--model", mixed, *FEW, "--output", tmp_path / "run")


def test_its_revision_is_pinned():
    assert len(hub.REVISIONS["Wan-AI/Wan2.2-TI2V-5B-Diffusers"]) == 40
