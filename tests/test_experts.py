"""Wan2.2's two transformers, and guidance 1, against Diffusers and against one transformer."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from command import SMALL, latents, record, run_here
from oracle import relative, seeded
from parity import randomise
from references import REFERENCE, load
from safetensors.torch import save_file

from freeswim import FlowUniPC, generate, refine, steps_that_read_cache
from model import WanTransformer, build, checkpoint_name
from support import UserError, hub
from support.experts import Experts
from support.presets import WAN_2_2_14B, WAN_14B, find_preset

FOLDERS = {
    "transformer": REFERENCE / "odd" / "transformer",
    "transformer_2": REFERENCE / "odd" / "transformer",
}
BOUNDARY = 875


def two_experts(changes_second=True, **options):
    """Experts of the reference set `odd`, the second with other weights."""

    def load_one(name):
        transformer = WanTransformer.from_pretrained(FOLDERS[name], **options)
        if name == "transformer_2" and changes_second:
            randomise(transformer, seed=2)
        return transformer

    return Experts(load_one, BOUNDARY, like=build(WanTransformer, FOLDERS["transformer"]))


class One(WanTransformer):
    """A transformer that changes hands with itself, to count steps as experts do."""

    boundary = BOUNDARY


def texts():
    draw = seeded(1)
    return torch.randn(2, 1, 12, 24, generator=draw)


# --------------------------------------------------------------------------------------------------
# Base clips


@pytest.mark.parametrize(
    "guidance, guidance_2", [(4.0, 3.0), (2.0, None), (3.0, 1.0), (1.0, 1.0), (4.0, 4.0)]
)
def test_base_latents_are_diffusers(guidance, guidance_2):
    diffusers = pytest.importorskip("diffusers")
    theirs = []
    for name in FOLDERS:
        ours = two_experts().load(name)
        network = diffusers.WanTransformer3DModel.from_pretrained(FOLDERS[name])
        state = {
            checkpoint_name(WanTransformer, key): value for key, value in ours.state_dict().items()
        }
        network.load_state_dict(state)
        theirs.append(network.eval())
    pipeline = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderKLWan.from_pretrained(REFERENCE / "odd" / "vae"),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        transformer=theirs[0],
        transformer_2=theirs[1],
        boundary_ratio=BOUNDARY / 1000,
    )
    pipeline.set_progress_bar_config(disable=True)
    text, negative = texts()
    shape = (1, 16, 2, 8, 10)
    noise = torch.randn(shape, generator=seeded(0))
    expected = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=negative,
        height=64,
        width=80,
        num_frames=5,
        num_inference_steps=6,
        guidance_scale=guidance,
        guidance_scale_2=guidance_2,
        latents=noise,
        output_type="latent",
    ).frames
    result = generate(
        two_experts(),
        text,
        negative,
        shape,
        steps=6,
        flow_shift=5.0,
        guidance=guidance,
        guidance_2=guidance_2,
        generator=seeded(0),
    )
    assert relative(result, expected) <= 1e-5


def test_both_experts_serve():
    """The schedule of the test above crosses the boundary."""
    timesteps = FlowUniPC(6, 5.0).timesteps
    assert timesteps[0] >= BOUNDARY > timesteps[-1]


# --------------------------------------------------------------------------------------------------
# Refinements


def refined(transformer, **options):
    case = load("odd")
    settings = {"steps": 10, "strength": 0.9, "flow_shift": 9.0, "guidance": 2.0, "native": (4, 3)}
    return refine(
        transformer,
        case.expected["encoded"],
        case.expected["text"],
        case.expected["negative"],
        generator=seeded(0),
        **settings | options,
    )


@pytest.mark.parametrize("options", [{}, {"override": False}, {"cache_interval": 1}])
def test_equal_experts_give_what_one_transformer_gives(options):
    one = WanTransformer.from_pretrained(FOLDERS["transformer"])
    two = two_experts(changes_second=False)
    assert torch.equal(refined(one, **options), refined(two, **options))


def test_equal_experts_with_a_cache():
    """Equal where the change does not interrupt the cache: with an interval that the change is a
    multiple of."""
    timesteps = FlowUniPC(10, 9.0, 0.9).timesteps
    change = sum(t >= BOUNDARY for t in timesteps)
    assert 1 < change < len(timesteps)
    one = WanTransformer.from_pretrained(FOLDERS["transformer"])
    two = two_experts(changes_second=False)
    expected = refined(one, cache_interval=change)
    assert torch.equal(refined(two, cache_interval=change), expected)
    assert not torch.equal(
        refined(two, cache_interval=change + 1), refined(one, cache_interval=change + 1)
    )


def test_the_full_path_runs_where_the_second_expert_takes_over():
    timesteps = [990, 950, 900, 880, 860, 700, 500, 300, 100]
    two = two_experts()
    assert steps_that_read_cache(two, timesteps, 3) == {1, 2, 5, 6, 8}  # it takes over at step 4
    one = WanTransformer.from_pretrained(FOLDERS["transformer"])
    assert steps_that_read_cache(one, timesteps, 3) == {1, 2, 4, 5, 7, 8}
    assert steps_that_read_cache(two, timesteps, 1) == set()


def test_different_experts_both_matter():
    results = [refined(two_experts(), cache_interval=2)]
    for name in FOLDERS:
        results.append(refined(two_experts().load(name), cache_interval=2))
    assert relative(results[0], results[1]) > 1e-2
    assert relative(results[0], results[2]) > 1e-2


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_resuming_around_the_change(offset):
    """Just before it, exactly at it, and after it, without a cache so that every step is saved."""
    states = []
    expected = refined(two_experts(), save=states.append)
    change = sum(t >= BOUNDARY for t in FlowUniPC(10, 9.0, 0.9).timesteps)
    state = {name: value.clone() for name, value in states[change + offset].items()}
    assert torch.equal(refined(two_experts(), state=state), expected)


def test_resuming_at_the_change_with_a_cache():
    states = []
    expected = refined(two_experts(), cache_interval=4, save=states.append)
    change = sum(t >= BOUNDARY for t in FlowUniPC(10, 9.0, 0.9).timesteps)
    at_change = [state for state in states if int(state["step"]) == change]
    assert len(at_change) == 1
    resumed = refined(two_experts(), cache_interval=4, state=at_change[0])
    assert torch.equal(resumed, expected)


def test_memory_never_holds_both():
    alive = weakref.WeakSet()
    loaded = []

    def load_one(name):
        assert len(alive) == 0, "the other expert is still in memory"
        transformer = WanTransformer.from_pretrained(FOLDERS[name])
        alive.add(transformer)
        loaded.append(name)
        return transformer

    gc.disable()  # nothing may depend on when Python collects
    try:
        experts = Experts(load_one, BOUNDARY, like=build(WanTransformer, FOLDERS["transformer"]))
        text, negative = texts()
        generate(experts, text, negative, (1, 16, 2, 8, 10), steps=6, flow_shift=5.0)
        refined(experts, cache_interval=2)
        refined(experts)
    finally:
        gc.enable()
    assert loaded == ["transformer", "transformer_2"] * 3


def test_the_swap_does_not_depend_on_the_caller():
    """Whatever the caller keeps, only one is in memory; and one that fails to load leaves none."""
    alive = weakref.WeakSet()
    fails = []

    def load_one(name):
        if fails:
            raise RuntimeError("no memory")
        transformer = WanTransformer.from_pretrained(FOLDERS[name])
        alive.add(transformer)
        return transformer

    experts = Experts(load_one, BOUNDARY, like=build(WanTransformer, FOLDERS["transformer"]))
    experts.select_expert(999)
    experts.select_expert(100)
    assert len(alive) == 1
    fails.append(True)
    with pytest.raises(RuntimeError):
        experts.select_expert(999)
    assert len(alive) == 0
    fails.clear()
    experts.select_expert(100)
    assert len(alive) == 1


# --------------------------------------------------------------------------------------------------
# Guidance 1


@pytest.mark.parametrize("options", [{}, {"cache_interval": 2}, {"override": False}])
def test_without_guidance_no_negative_pass_is_computed(options, monkeypatch):
    one = WanTransformer.from_pretrained(FOLDERS["transformer"])
    passes = []
    embed = one.embed
    monkeypatch.setattr(one, "embed", lambda *given: passes.append(1) or embed(*given))
    refined(one, guidance=1, **options)
    assert len(passes) == 9
    text, _ = texts()
    generate(one, text, None, (1, 16, 2, 8, 10), steps=6, guidance=1)
    assert len(passes) == 15
    with pytest.raises(ValueError, match="guidance 3 needs a negative prompt"):
        generate(one, text, None, (1, 16, 2, 8, 10), steps=6, guidance=1, guidance_2=3)


def test_the_command_encodes_no_negative_prompt(checkpoint, tmp_path):
    for name, negative in (("one", "a pink fish"), ("two", "seaweed")):
        arguments = ["--model", checkpoint, "--output", tmp_path / name, *SMALL]
        run_here(*arguments, "--guidance", 1, "--negative-prompt", negative)
        run_here("--resume", tmp_path / name)
    assert latents(tmp_path / "one") == latents(tmp_path / "two")


# --------------------------------------------------------------------------------------------------
# The command


def write_experts(checkpoint, folder, boundary_ratio=0.875, **changes):
    """A model with a second transformer of other weights."""
    shutil.copytree(checkpoint, folder)
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    transformer = randomise(WanTransformer.from_pretrained(folder / "transformer"), seed=3)
    weights = {}
    for name, value in transformer.state_dict().items():
        weights[checkpoint_name(WanTransformer, name)] = value.contiguous()
    save_file(weights, folder / "transformer_2" / "model.safetensors")
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": boundary_ratio,
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index | changes), encoding="utf-8")
    return folder


def test_the_command(checkpoint, tmp_path, capsys):
    folder = write_experts(checkpoint, tmp_path / "model")
    arguments = ["--model", folder, *SMALL, "--flow-shift", 9, "--base-shift", 5]
    run_here(*arguments, "--output", tmp_path / "run", "--guidance", 2, "--guidance-2", 3)
    errors = capsys.readouterr().err
    assert errors.count("loading the expert for high noise") == 2  # base clip and refinement
    assert errors.count("loading the expert for low noise") == 2
    settings = record(tmp_path / "run")["settings"]
    assert (settings["guidance"], settings["guidance_2"]) == (2, 3)
    before = latents(tmp_path / "run")
    for name in ("base", "refine"):
        (tmp_path / "run" / "state" / f"{name}.safetensors").unlink()
        run_here("--resume", tmp_path / "run")
        assert latents(tmp_path / "run") == before
    run_here(*arguments, "--output", tmp_path / "same", "--guidance", 2)
    assert latents(tmp_path / "same") != before


def test_exchanged_weights_of_the_second_expert_are_noticed(checkpoint, tmp_path):
    folder = write_experts(checkpoint, tmp_path / "model")
    run_here("--model", folder, *SMALL, "--output", tmp_path / "run")
    for part in ("transformer", "transformer_2"):
        file = folder / part / "model.safetensors"
        file.rename(tmp_path / part)
    shutil.copy(tmp_path / "transformer", folder / "transformer" / "model.safetensors")
    shutil.copy(tmp_path / "transformer", folder / "transformer_2" / "model.safetensors")
    with pytest.raises(UserError, match="weights are not those it began with"):
        run_here("--resume", tmp_path / "run")


def test_the_preset_is_that_of_wan_2_2():
    assert find_preset(5120, two_experts=True) is WAN_2_2_14B
    assert find_preset(5120, two_experts=False) is WAN_14B
    preset = WAN_2_2_14B
    assert (preset.width, preset.height, preset.frames, preset.steps) == (1280, 720, 81, 40)
    assert (preset.base_shift, preset.flow_shift) == (12, 9)
    assert (preset.guidance, preset.guidance_2) == (4, 3)


REFUSED = {
    "no boundary": ({"boundary_ratio": None}, "boundary_ratio is None"),
    "boundary a word": ({"boundary_ratio": "high"}, "boundary_ratio is 'high'"),
    "boundary too high": ({"boundary_ratio": 875}, "boundary_ratio is 875"),
    "I2V": ({"_class_name": "WanImageToVideoPipeline"}, "supported are .* Wan2.2-T2V-A14B"),
    "S2V": ({"_class_name": "WanSpeechToVideoPipeline"}, "supported are .* Wan2.2-T2V-A14B"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused(checkpoint, tmp_path, name):
    changes, named = REFUSED[name]
    folder = write_experts(checkpoint, tmp_path / "model", **changes)
    with pytest.raises(UserError, match=named):
        run_here("--model", folder, *SMALL, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_experts_of_two_models_are_refused(checkpoint, tmp_path):
    folder = write_experts(checkpoint, tmp_path / "model")
    file = folder / "transformer_2" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"num_layers": 2}), encoding="utf-8")
    with pytest.raises(UserError, match="its two transformers differ"):
        run_here("--model", folder, *SMALL, "--output", tmp_path / "run")


@pytest.mark.parametrize("part", ["config.json", "model.safetensors"])
def test_a_missing_second_expert_is_named(checkpoint, tmp_path, part):
    folder = write_experts(checkpoint, tmp_path / "model")
    (folder / "transformer_2" / part).unlink()
    with pytest.raises(ValueError, match="transformer_2"):
        run_here("--model", folder, *SMALL, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_guidance_2_needs_a_second_expert(checkpoint, tmp_path):
    with pytest.raises(UserError, match="--guidance-2: this model has one transformer"):
        run_here("--model", checkpoint, "--guidance-2", 2, "--output", tmp_path / "run")


def test_the_published_index_is_understood(tmp_path):
    """As in Wan-AI/Wan2.2-T2V-A14B-Diffusers, without what is not read."""
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.35.0.dev0",
        "boundary_ratio": 0.875,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    assert hub.boundary_of(tmp_path) == 875
    assert list(hub.parts_of(tmp_path)) == ["transformer", "transformer_2", "text_encoder", "vae"]
    index["transformer_2"] = [None, None]
    index["boundary_ratio"] = None
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    assert hub.boundary_of(tmp_path) is None
