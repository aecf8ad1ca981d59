"""The flow solver and the base generation against Diffusers."""

import pytest
import torch
from oracle import relative, seeded
from references import REFERENCE

from freeswim import FlowUniPC, generate
from model import WanTransformer

diffusers = pytest.importorskip("diffusers")

SCHEDULES = [
    (steps, flow_shift, strength)
    for steps in (1, 2, 3, 10, 50)
    for flow_shift in (3.0, 5.0, 9.0)
    for strength in (0.3, 0.5, 0.7, 1.0)
    if int(steps * strength) > 0
]


def unipc(flow_shift):
    """The scheduler as Wan's scheduler_config.json sets it: beyond Diffusers' defaults, it only
    asks for flow."""
    return diffusers.UniPCMultistepScheduler(
        solver_order=2,
        solver_type="bh2",
        predict_x0=True,
        lower_order_final=True,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=flow_shift,
        final_sigmas_type="zero",
    )


@pytest.mark.parametrize("steps, flow_shift, strength", SCHEDULES)
def test_solver_is_diffusers(steps, flow_shift, strength):
    kept = int(steps * strength)
    scheduler = unipc(flow_shift)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(steps - kept)
    solver = FlowUniPC(steps, flow_shift, strength)

    timesteps = scheduler.timesteps[steps - kept :]
    assert solver.timesteps == timesteps.tolist()
    assert solver.sigmas.dtype == torch.float32
    assert solver.sigmas.shape == (kept + 1,)
    assert (solver.sigmas - scheduler.sigmas[steps - kept :]).abs().max() <= 1e-6
    assert solver.sigmas[-1] == 0

    clean, noise, *velocities = torch.randn(kept + 2, 1, 4, 2, 6, 6, generator=seeded(steps))
    ours = solver.add_noise(clean, noise)
    theirs = scheduler.add_noise(clean, noise, timesteps[:1])
    assert relative(ours, theirs) <= 1e-6
    for timestep, velocity in zip(timesteps, velocities, strict=True):
        ours = solver.step(velocity, ours)
        theirs = scheduler.step(velocity, timestep, theirs).prev_sample
        assert ours.dtype == torch.float32
        assert relative(ours, theirs) <= 1e-6


@pytest.mark.parametrize(
    "name, clips, grid, steps, flow_shift, guidance",
    [
        ("wide", 1, (3, 4, 6), 10, 3.0, 5.0),
        ("wide", 2, (1, 3, 2), 3, 5.0, 7.5),
        ("odd", 1, (2, 3, 5), 4, 3.0, 5.0),
    ],
)
def test_generation_is_diffusers(name, clips, grid, steps, flow_shift, guidance):
    folder = REFERENCE / name / "transformer"
    frames, height, width = grid
    draw = seeded(3)
    text, negative = torch.randn(2, clips, 512, 24, generator=draw)
    text[:, 20:] = 0
    negative[:, 7:] = 0  # as after the end of a prompt

    pipeline = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=diffusers.WanTransformer3DModel.from_pretrained(folder),
        scheduler=unipc(flow_shift),
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=negative,
        height=16 * height,
        width=16 * width,
        num_frames=4 * (frames - 1) + 1,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=seeded(11),
        output_type="latent",
    ).frames

    transformer = WanTransformer.from_pretrained(folder)
    wrapped = []
    latents = generate(
        transformer,
        text,
        negative,
        (clips, 16, frames, 2 * height, 2 * width),
        steps=steps,
        flow_shift=flow_shift,
        guidance=guidance,
        generator=seeded(11),
        progress=lambda steps: wrapped.extend(steps) or steps,
    )
    assert relative(latents, expected) <= 1e-4
    assert len(wrapped) == steps
