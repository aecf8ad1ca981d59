"""The functions that others build on: what does not fit is a ValueError that says so."""

from functools import partial

import pytest
import torch
from references import REFERENCE, load, refined

from freeswim import (
    NotFiniteError,
    StateError,
    generate,
    grouped_window,
    predict_cached,
    predict_dual,
    refine,
    window_start,
)
from model import TextEncoder, WanTransformer, WanVAE, clean_prompt, encode_prompt


@pytest.fixture(scope="module")
def case():
    return load("odd")


@pytest.mark.parametrize(
    "change",
    [
        {"latents": lambda x: x[:, :1]},  # one channel
        {"latents": lambda x: x[..., :-1]},  # an odd side
        {"latents": lambda x: torch.cat([x, x])},  # another batch
        {"text": lambda x: torch.cat([x, x])},
        {"timestep": lambda x: int(x[0])},
        {"timestep": lambda x: x[0]},
        {"timestep": lambda x: torch.cat([x, x])},
    ],
    ids=lambda change: next(iter(change)),
)
def test_inputs_of_a_pass(case, change):
    inputs = {name: case.expected[name] for name in ("latents", "timestep", "text")}
    inputs |= {name: alter(inputs[name]) for name, alter in change.items()}
    with pytest.raises(ValueError, match="should be"):
        predict_dual(case.transformer, *inputs.values(), case.window, case.full)
    with pytest.raises(ValueError, match="should be"):
        case.transformer(*inputs.values())


def test_an_empty_cache(case):
    inputs = [case.expected[name] for name in ("latents", "timestep", "text")]
    with pytest.raises(ValueError, match="cache holds 0"):
        predict_cached(case.transformer, *inputs, case.window, {})


@pytest.mark.parametrize("native", [(0, 4), (1, 1), (3, 1)])
def test_native_size(case, native):
    with pytest.raises(ValueError, match="native"):
        refined(case, native=native)


def test_border_and_steps(case):
    with pytest.raises(ValueError, match="'tilted'"):
        refined(case, window_attention=partial(grouped_window, border="tilted"))
    with pytest.raises(ValueError, match="'tilted'"):
        window_start(torch.arange(3), 3, 3, "tilted")
    with pytest.raises(ValueError, match="1 steps"):
        refined(case, steps=1)
    with pytest.raises(ValueError, match="latents"):
        refine(
            case.transformer,
            case.expected["encoded"][0],
            case.expected["text"],
            case.expected["negative"],
            native=(3, 4),
        )


def test_a_state_between_refreshes_of_the_cache(case):
    states = []
    whole = refined(case, cache_interval=3, save=states.append)
    assert [int(state["step"]) for state in states] == [0, 3]
    assert torch.equal(refined(case, cache_interval=3, state=states[1]), whole)
    with pytest.raises(ValueError, match="step 3"):
        refined(case, cache_interval=2, state=states[1])


@pytest.mark.parametrize(
    "steps, strength", [(100, 0.29), (50, 0.7), (10, 0.3), (100, 0.57), (20, 0.55)]
)
def test_as_many_steps_remain_as_in_diffusers(steps, strength):
    """Rounded down, even where the product lies a hair below a whole number: Diffusers' pipeline
    does the same."""
    from diffusers import WanVideoToVideoPipeline

    from freeswim import FlowUniPC

    stub = type("Stub", (), {"scheduler": type("Scheduler", (), {"order": 1})})
    timesteps, _ = WanVideoToVideoPipeline.get_timesteps(
        stub, steps, list(range(steps)), strength, "cpu"
    )
    assert len(FlowUniPC(steps, 9.0, strength).timesteps) == len(timesteps)


def test_prompts_are_a_list():
    with pytest.raises(ValueError, match="a fish"):
        encode_prompt(None, None, "a fish")
    assert clean_prompt("&nbsp;") == ""


@pytest.mark.parametrize("interval", [0, -1])
def test_cache_interval(case, interval):
    with pytest.raises(ValueError, match=f"cache_interval is {interval}"):
        refined(case, cache_interval=interval)


def test_latents_of_odd_size(case):
    with pytest.raises(ValueError, match="latents are"):
        refined(case, latents=case.expected["encoded"][..., :-1])


@pytest.mark.parametrize(
    "change",
    [{"steps": 12}, {"strength": 0.4}, {"flow_shift": 8.0}],
    ids=lambda change: str(change),
)
def test_a_state_of_another_schedule(case, change):
    states = []
    refined(case, save=states.append)
    with pytest.raises(ValueError, match="state is of other steps"):
        refined(case, state=states[1], **change)


def test_a_state_of_another_size(case):
    states = []
    refined(case, save=states.append)
    with pytest.raises(ValueError, match="the state has latents of shape"):
        refined(case, latents=case.expected["encoded"][:, :, :1], state=states[1])


def test_no_negative_prompt_with_guidance(case):
    text = case.expected["text"]
    with pytest.raises(ValueError, match="guidance 5.0 needs a negative prompt"):
        generate(case.transformer, text, None, (1, 16, 1, 4, 4), steps=2)
    with pytest.raises(ValueError, match="guidance 2 needs a negative prompt"):
        refine(case.transformer, case.expected["encoded"], text, None, native=(3, 4), guidance=2)


def test_as_many_generators_as_clips(case):
    draws = [torch.Generator(), torch.Generator()]
    with pytest.raises(ValueError, match="2 generators were given for 1 clips"):
        refined(case, generator=draws)


# --------------------------------------------------------------------------------------------------
# What is easily taken for something else


def test_native_size_in_pixels(case):
    with pytest.raises(ValueError, match="of tokens, not pixels"):
        refined(case, native=(480, 832))


def test_a_state_lacks_something(case):
    states = []
    whole = refined(case, save=states.append)
    state = states[2]
    for name in ("sigmas", "start", "x0", "x0_before", "latents", "step"):
        rest = {key: value for key, value in state.items() if key != name}
        with pytest.raises(StateError, match=f"no {name}"):
            refined(case, state=rest)
    assert torch.equal(refined(case, state=state), whole)


def test_latents_that_overflow(case):
    with pytest.raises(NotFiniteError, match="latents are not finite after step 1 of"):
        refined(case, guidance=1e38)
    text = case.expected["text"]
    with pytest.raises(NotFiniteError, match="after step 1 of 2"):
        generate(case.transformer, text, 2 * text, (1, 16, 1, 4, 4), steps=2, guidance=1e39)


@pytest.mark.parametrize(
    "video",
    [
        torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8),
        torch.full((1, 3, 1, 16, 16), torch.nan),
        torch.zeros(3, 1, 16, 16),
        torch.zeros(1, 1, 1, 16, 16),
    ],
)
def test_what_cannot_be_encoded(case, video):
    with pytest.raises(ValueError, match="video"):
        case.vae.encode(video)


def test_a_vae_in_half_precision_takes_latents_in_float32():
    vae = WanVAE.from_pretrained(REFERENCE / "wide" / "vae", dtype=torch.bfloat16)
    assert vae.decode(torch.zeros(1, 16, 1, 2, 2)).dtype == torch.bfloat16
    assert vae.encode(torch.zeros(1, 3, 1, 16, 16)).dtype == torch.bfloat16


def test_a_transformer_that_was_cast(case):
    cast = WanTransformer.from_pretrained(REFERENCE / "odd" / "transformer").to(torch.bfloat16)
    given = [case.expected[name] for name in ("latents", "timestep", "text")]
    with pytest.raises(ValueError, match="have to stay in float32; choose the dtype in"):
        cast(*given)


def test_a_streamed_encoder_cannot_be_moved():
    encoder = TextEncoder.from_pretrained(REFERENCE / "umt5")
    with pytest.raises(ValueError, match="streamed TextEncoder cannot be moved"):
        encoder.to("cpu")


def test_a_layer_of_the_encoder_is_freed_when_it_fails(monkeypatch):
    encoder = TextEncoder.from_pretrained(REFERENCE / "umt5")

    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(type(encoder.layers[0]), "forward", fail)
    with pytest.raises(RuntimeError):
        encoder(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))
    assert all(parameter.is_meta for parameter in encoder.parameters())
