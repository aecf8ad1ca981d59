"""The functions that others build on: what does not fit is a ValueError that says so."""

from functools import partial

import pytest
import torch
from references import load, refined

from freeswim import generate, grouped_window, predict_cached, predict_dual, refine, window_start
from model import clean_prompt, encode_prompt


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
