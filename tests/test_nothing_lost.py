"""Hostile folders, edited records and foreign states: no file is lost, no wrong state is taken."""

import json
import shutil

import pytest
import torch
from command import SMALL, latents, record, refused, run, run_here
from oracle import seeded
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model
from support import hub, processes
from support import run as run_module
from support.plan import fingerprint


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """A finished run with its own copy of the model."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(checkpoint, folder / "model")
    arguments = ["--model", folder / "model", *SMALL, "--cache-interval", 2]
    run_here(*arguments, "--output", folder / "output")
    run_here(*arguments, "--output", folder / "other", "--seed", 5)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished / "output", tmp_path / "output")


def edit_record(folder, **changes):
    content = record(folder) | changes
    (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")


def edit_setting(folder, name, value):
    """As somebody who also fixes the fingerprint."""
    content = record(folder)
    content["settings"][name] = value
    content["fingerprints"][name] = fingerprint(value)
    (folder / "run.json").write_text(json.dumps(content), encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Files of the user

MINE = ["part-one.mp4", ".tmp-notes", "part-run.json", "mine.safetensors"]


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_files_with_names_like_temporary_ones_stay(finished, tmp_path, more):
    output = tmp_path / "run"
    (output / "part-folder").mkdir(parents=True)
    (output / "part-folder" / "file").write_text("mine", encoding="utf-8")
    for name in MINE:
        (output / name).write_text("mine", encoding="utf-8")
    run_here("--model", finished / "model", "--output", output, *SMALL, *more)
    for name in (*MINE, "part-folder/file"):
        assert (output / name).read_text(encoding="utf-8") == "mine"


def test_a_clip_called_part_stays(finished, copy, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    clip = shutil.copy(copy / "base.mp4", output / "part-clip.mp4")
    arguments = ["--model", finished / "model", *SMALL, "--prompt", "a red fish"]
    run_here(*arguments, "--base-video", clip, "--output", output)
    assert (output / "part-clip.mp4").is_file()


def test_overwriting_leaves_what_others_put_into_state(finished, copy):
    (copy / "state" / "mine.safetensors").write_text("mine", encoding="utf-8")
    (copy / "freeswim.png").write_text("mine", encoding="utf-8")  # this run has no picture
    run_here("--model", finished / "model", "--output", copy, *SMALL, "--overwrite", "--seed", 3)
    assert (copy / "state" / "mine.safetensors").read_text(encoding="utf-8") == "mine"
    assert (copy / "freeswim.png").read_text(encoding="utf-8") == "mine"


def test_overwriting_deletes_only_names_that_a_run_writes(finished, copy):
    outside = copy.parent / "outside.txt"
    inside = copy / "notes.txt"
    for file in (outside, inside):
        file.write_text("mine", encoding="utf-8")
    files = [*record(copy)["files"], str(outside), "../outside.txt", "notes.txt"]
    edit_record(copy, files=files)
    run_here("--model", finished / "model", "--output", copy, *SMALL, "--overwrite")
    assert outside.read_text(encoding="utf-8") == inside.read_text(encoding="utf-8") == "mine"


def test_a_kill_while_overwriting_leaves_a_folder_that_works(finished, copy, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(run):
        raise Killed

    arguments = ["--model", finished / "model", "--output", copy, *SMALL]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_module.Run, "write_record", killed)
        run_here(*arguments, "--overwrite", "--seed", 9)
    saved = shutil.copytree(copy, copy.parent / "saved")
    run_here("--resume", copy)  # the old run is computed again
    assert latents(copy) == latents(finished / "output")
    run_here("--model", finished / "model", "--output", saved, *SMALL, "--overwrite")


# --------------------------------------------------------------------------------------------------
# Records that were edited


def test_overwrite_among_the_settings_has_no_effect(copy):
    edit_setting(copy, "overwrite", True)
    before = {file.name: file.stat().st_mtime_ns for file in (copy / "state").iterdir()}
    run_here("--resume", copy)
    after = {file.name: file.stat().st_mtime_ns for file in (copy / "state").iterdir()}
    assert {"base.safetensors", "refine.safetensors"} <= before.keys() & after.keys()
    assert after["base.safetensors"] == before["base.safetensors"]


@pytest.mark.parametrize(
    "name, value",
    [
        ("device", 3),
        ("device", "abacus"),
        ("steps", "4"),
        ("steps", True),
        ("steps", 10**9),
        ("guidance", [2]),
        ("lora", "x"),
        ("lora", [3]),
        ("size", "huge"),
        ("compare", "yes"),
        ("model", None),
        ("fps", {}),
    ],
)
def test_settings_that_no_run_records_are_refused(copy, name, value):
    edit_setting(copy, name, value)
    with refused(f"its {name} is not what it began with"):
        run_here("--resume", copy)


@pytest.mark.parametrize(
    "field, value",
    [
        ("files", {"a": 1}),
        ("sound", ["1", "x"]),
        ("sound", [1]),
        ("threads", "two"),
        ("id", 4),
        ("fingerprints", {"steps": 3}),
        ("stages", {"base": {}}),
        ("vae_tiles", 7),
    ],
)
def test_fields_that_no_run_records_are_refused(copy, field, value):
    edit_record(copy, **{field: value})
    with refused("its run.json is broken"):
        run_here("--resume", copy)


def test_a_run_of_before_an_option_existed_goes_on(copy):
    """Without a setting and its fingerprint, the option has its default."""
    before = latents(copy)
    content = record(copy)
    for name in ("start", "lora_2", "seed"):
        del content["settings"][name]
        del content["fingerprints"][name]
    (copy / "run.json").write_text(json.dumps(content), encoding="utf-8")
    (copy / "state" / "refine.safetensors").unlink()
    run_here("--resume", copy)
    assert latents(copy) == before


def test_a_run_of_a_gpu_goes_on_on_the_cpu(copy, capsys):
    edit_setting(copy, "device", "cuda")
    edit_setting(copy, "vae_dtype", "float16")
    edit_setting(copy, "dtype", "bfloat16")
    (copy / "state" / "refine.safetensors").unlink()
    run_here("--resume", copy, "--device", "cpu")
    assert "this run began on cuda and goes on on cpu" in capsys.readouterr().err
    settings = record(copy)["settings"]
    assert (settings["dtype"], settings["vae_dtype"]) == ("float32", "float32")
    run_here("--resume", copy)  # now it is a run of the CPU


# --------------------------------------------------------------------------------------------------
# Other runs' states, and other configurations


@pytest.mark.parametrize("name", ["text", "base", "encode", "refine"])
def test_the_state_of_another_seed_is_refused(finished, copy, name):
    file = f"{name}.safetensors"
    shutil.copy(finished / "other" / "state" / file, copy / "state" / file)
    with refused(file, "of another run", "delete it"):
        run_here("--resume", copy)


def rewrite_state(copy, name, change):
    """Change the tensors of a state, which stays one of this run."""
    file = copy / "state" / f"{name}.safetensors"
    tensors = load_file(file)
    change(tensors)
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(whole, file, {"run": record(copy)["id"]})


@pytest.mark.parametrize("name", ["base", "encode", "refine"])
@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: t["latents"].view(-1)[0].fill_(float("nan")), "are not finite"),
        (lambda t: t.update(latents=t["latents"][..., :-2]), "its latents are"),
        (lambda t: t.update(other=t.pop("latents")), "has no latents"),
    ],
)
def test_states_that_do_not_fit_are_refused(copy, name, change, named):
    rewrite_state(copy, name, change)
    with refused(f"{name}.safetensors", named, "delete it"):
        run_here("--resume", copy)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: t.pop("sigmas"), "no sigmas"),
        (lambda t: t.pop("start"), "no start"),
        (lambda t: t.pop("x0"), "no x0"),
        (lambda t: t.pop("step"), "no step"),
        (lambda t: t.update(x0=t["x0"][..., :-2]), "x0 of shape"),
        (lambda t: t.update(sigmas=t["sigmas"] * 0.9), "other steps"),
        (lambda t: t.update(step=torch.tensor(77)), "step is none of"),
    ],
)
def test_progress_that_cannot_be_taken_up_is_refused(finished, checkpoint, tmp_path, change, named):
    output = tmp_path / "run"
    saved = []
    save = run_module.Run.save

    def stopped(run, name, tensors):
        save(run, name, tensors)
        saved.append(name)
        if saved.count("refine-progress") == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module.Run, "save", stopped)
        run_here("--model", finished / "model", "--output", output, *SMALL, "--no-cache")
    rewrite_state(output, "refine-progress", change)
    before = sorted(output.rglob("*"))
    with refused("refine-progress.safetensors", named, "delete it"):
        run_here("--resume", output)
    assert sorted(output.rglob("*")) == before
    (output / "state" / "refine-progress.safetensors").unlink()
    run_here("--resume", output)


def test_states_carry_their_run(copy):
    for file in (copy / "state").iterdir():
        with safe_open(file, "pt") as content:
            assert content.metadata()["run"] == record(copy)["id"]


@pytest.mark.parametrize(
    "part, change",
    [
        ("transformer", {"num_attention_heads": 10, "attention_head_dim": 24}),
        ("vae", {"latents_std": [1.5] * 16}),
    ],
)
def test_another_configuration_is_noticed(finished, copy, part, change):
    file = finished / "model" / part / "config.json"
    before = file.read_text(encoding="utf-8")
    try:
        file.write_text(json.dumps(json.loads(before) | change), encoding="utf-8")
        with refused("its configuration are not"):
            run_here("--resume", copy)
    finally:
        file.write_text(before, encoding="utf-8")


def test_another_run_in_between_is_noticed(finished, copy, monkeypatch):
    """It overwrites the folder after the record was read, and before the lock is held."""
    lock = run_module.lock

    def late(folder):
        shutil.copy(finished / "other" / "run.json", copy / "run.json")
        return lock(folder)

    monkeypatch.setattr(run_module, "lock", late)
    with refused("another run has written there meanwhile"):
        run_here("--resume", copy)


def test_other_threads_are_said(copy, capsys):
    assert record(copy)["threads"] == torch.get_num_threads()
    edit_record(copy, threads=99)
    run_here("--resume", copy)
    assert "this run began with 99 CPU threads" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# No black videos


def test_guidance_that_overflows_ends_the_run(finished, tmp_path):
    """Before a video is written."""
    folder = shutil.copytree(finished / "model", tmp_path / "model")
    file = folder / "transformer" / "model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.weight"] *= 1e30
    save_file(tensors, file)
    output = tmp_path / "run"
    arguments = ["--model", folder, "--output", output, *SMALL]
    status, _, errors = run(*arguments, "--guidance", 1000)
    assert status == 2
    assert "Traceback" not in "\n".join(errors)
    assert 'in the stage "base", latents are not finite after step' in errors[-1]
    assert "LoRA weight or --guidance" in errors[-1]
    assert not [*output.glob("*.mp4")]


def test_a_video_that_is_not_finite_ends_the_run(finished, tmp_path, monkeypatch):
    def overflowing(vae, latents, history):
        return torch.full((1, 3, 1, 8 * latents.shape[3], 8 * latents.shape[4]), torch.nan)

    monkeypatch.setattr(model.WanVAE, "decode_chunk", overflowing)
    arguments = ["--model", finished / "model", "--output", tmp_path / "run", *SMALL]
    with refused('in the stage "decode base", the video is not finite', "--vae-dtype"):
        run_here(*arguments, "--frames", 1)
    assert not [*(tmp_path / "run").glob("*.mp4")]


# --------------------------------------------------------------------------------------------------
# What has no effect is said


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--guidance", 1, "--negative-prompt", "seaweed"], "--negative-prompt has no effect"),
        (["--negative-prompt", "a fish " * 40], "the negative prompt is too long"),
        (["--negative-prompt", "a shark"], "never seen the words: shark"),
        (["--prompt", "two fish swim"], "never seen the words: two, swim"),
        (["--frames", 21], "21 frames are more than the 17"),
    ],
)
def test_notes(finished, tmp_path, capsys, arguments, named):
    few = ["--model", finished / "model", "--size", "192x128", "--steps", 2, "--device", "cpu"]
    run_here(*few, "--frames", 1, *arguments, "--output", tmp_path / "run")
    assert named in capsys.readouterr().err


def test_seeds_far_apart_differ():
    from sample import noise_generator

    def draw(seed):
        return torch.randn(4, generator=noise_generator(seed)).tolist()

    for seed in (0, 7, 2**32 - 1):
        assert draw(seed) == torch.randn(4, generator=seeded(seed)).tolist()
    assert draw(7) != draw(7 + 2**32) != draw(7 + 2**33)
    draw(2**63)


# --------------------------------------------------------------------------------------------------
# Messages


def test_terminal_escapes_are_not_echoed(finished, tmp_path, capsys):
    few = ["--model", finished / "model", "--size", "192x128", "--steps", 2, "--device", "cpu"]
    prompt = "a fish \x1b[31m\x07\u202e"
    run_here(*few, "--frames", 1, "--prompt", prompt, "--output", tmp_path / "run")
    printed = capsys.readouterr().err
    assert "\x1b[31m" not in printed.replace("\x1b[A", "")
    assert "\\x1b[31m" in printed
    assert record(tmp_path / "run")["settings"]["prompt"] == prompt


def test_printable_leaves_ordinary_text():
    line = "très 大 — “fish”…"
    assert processes.printable(line) == line


@pytest.mark.parametrize(
    "status, named",
    [(403, "refuses access"), (429, "too many requests"), (500, "problem of its own")],
)
def test_what_helps_against_a_status_of_the_hub(status, named):
    class Response:
        status_code = status
        headers = {}
        request = None

    error = hub.HfHubHTTPError(f"{status}", response=Response())
    message = hub.hub_problem(error, None)
    assert named in message
    assert "check the id" not in message
