"""A run and its folder: nothing that is there is lost, whatever ends a run, and what has changed is
noticed."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import kill
import pytest
import torch
from command import ROOT, SMALL, latents, parse, record, refused, run, run_here, start
from safetensors.torch import load_file, save_file

from freeswim import FlowUniPC
from support.plan import make_plan


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """A finished run, in this process, with its own copy of the model."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(checkpoint, folder / "model")
    run_here(
        "--model", folder / "model", "--output", folder / "output", *SMALL, "--cache-interval", 2
    )
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of its output."""
    return shutil.copytree(finished / "output", tmp_path / "output")


def wait_for(file, process):
    while not file.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


# --------------------------------------------------------------------------------------------------
# What is there is kept


def test_a_run_is_not_overwritten_unasked(finished, copy):
    before = {file: file.stat().st_mtime_ns for file in copy.rglob("*")}
    with refused("--resume", "--overwrite"):
        run_here("--model", finished / "model", "--output", copy)
    with pytest.raises(SystemExit):  # the first mistake is not hidden behind the second
        run_here("--model", finished / "model", "--output", copy, "--frames", 6)
    assert {file: file.stat().st_mtime_ns for file in copy.rglob("*")} == before


@pytest.mark.parametrize("name", ["base.mp4", "freeswim.mp4", "comparison.png", "state"])
def test_what_no_run_wrote_is_not_touched(finished, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine", encoding="utf-8")
    for more in ([], ["--overwrite"]):
        with refused(name, "no run wrote"):
            run_here("--model", finished / "model", "--output", tmp_path / "run", *SMALL, *more)
    assert (tmp_path / "run" / name).read_text(encoding="utf-8") == "mine"
    assert len([*(tmp_path / "run").iterdir()]) == 1


def test_overwriting_removes_only_what_a_run_wrote(finished, copy):
    (copy / "notes.txt").write_text("mine", encoding="utf-8")
    (copy / "state" / "notes.txt").write_text("mine", encoding="utf-8")
    (copy / "state" / "full attention.safetensors").write_bytes(b"of the run before")
    run_here("--model", finished / "model", "--output", copy, *SMALL, "--seed", 1, "--overwrite")
    assert (
        (copy / "notes.txt").read_text(encoding="utf-8")
        == (copy / "state" / "notes.txt").read_text(encoding="utf-8")
        == "mine"
    )
    assert not (copy / "state" / "full attention.safetensors").exists()
    assert latents(copy) != latents(finished / "output")


def test_an_input_is_never_overwritten(finished, copy):
    clip = (copy / "base.mp4").read_bytes()
    for file in (copy / "base.mp4", copy.parent / "link.mp4"):
        if not file.exists():
            file.symlink_to(copy / "base.mp4")
        with refused(file, "would be overwritten"):
            run_here(
                "--model",
                finished / "model",
                "--output",
                copy,
                "--prompt",
                "a red fish",
                "--base-video",
                file,
                "--frames",
                5,
                "--overwrite",
            )
    assert (copy / "base.mp4").read_bytes() == clip


def test_a_link_to_nothing_is_called_so(finished, tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    with refused(tmp_path / "run", "link to nothing"):
        run_here("--model", finished / "model", "--output", tmp_path / "run")


def test_two_runs_do_not_share_a_folder(finished, tmp_path):
    output = tmp_path / "run"
    arguments = ["--model", finished / "model", "--output", output, *SMALL]
    process = start(*arguments, "--steps", 1000)
    wait_for(output / "state" / "text.safetensors", process)
    for more in (["--overwrite"], []):
        with refused(output):
            run_here(*arguments, *more)
    with refused("another run is writing there"):
        run_here("--resume", output)
    process.kill()
    process.communicate()
    before = record(output)
    run_here(*arguments, "--overwrite")  # the lock has died with it
    assert record(output)["settings"]["steps"] == 4 != before["settings"]["steps"]


def test_a_folder_that_was_just_made_can_be_used(finished, tmp_path):
    """A kill between making the folder and its run.json leaves it empty, but for half a file."""
    part = tmp_path / "run" / ".freeswim-0123456789abcdef.part"
    part.mkdir(parents=True)
    (part / "run.json").write_text("{", encoding="utf-8")
    run_here("--model", finished / "model", "--output", tmp_path / "run", *SMALL)
    assert not part.exists()


# --------------------------------------------------------------------------------------------------
# Resuming


def test_a_state_is_taken_up_where_it_was(finished, copy):
    """Resuming really starts at the saved step: with another state in its place, other latents come
    out."""
    expected = latents(copy)
    clean = load_file(copy / "state" / "encode.safetensors")["latents"]
    (copy / "state" / "refine.safetensors").unlink()
    sigmas = FlowUniPC(4, 1.0, 0.7).sigmas
    state = {"step": torch.tensor(0), "latents": clean, "sigmas": sigmas}
    identity = {"run": record(copy)["id"]}
    save_file(state, copy / "state" / "refine-progress.safetensors", identity)
    run_here("--resume", copy)
    assert latents(copy) != expected
    for name in ("refine", "encode", "base"):  # without its latents, all is computed again
        (copy / "state" / f"{name}.safetensors").unlink()
    seconds = record(copy)["stages"]["base"]["seconds"]
    run_here("--resume", copy, "--compare")
    assert latents(copy) == expected
    assert record(copy)["stages"]["base"]["seconds"] > seconds  # of both tries
    assert (copy / "state" / "inward window.safetensors").exists()


@pytest.mark.parametrize(
    "name, value",
    [
        ("prompt", "a red fish"),
        ("size", "240x160"),
        ("frames", 9),
        ("steps", "4"),
        ("dtype", "bfloat16"),
        ("seed", 7),
        ("model", "elsewhere"),
    ],
)
def test_edited_settings_are_noticed(copy, name, value):
    content = record(copy)
    content["settings"][name] = value
    (copy / "run.json").write_text(json.dumps(content), encoding="utf-8")
    with refused(f"its {name} is not"):
        run_here("--resume", copy)


@pytest.mark.parametrize(
    "field, value",
    [
        ("stages", {"base": {"seconds": "3"}}),
        ("stages", [1]),
        ("settings", 3),
        ("files", None),
        ("fingerprints", {}),
    ],
)
def test_a_damaged_record_is_named(copy, field, value):
    (copy / "run.json").write_text(json.dumps(record(copy) | {field: value}), encoding="utf-8")
    with refused("--resume" if field == "fingerprints" else "run.json"):
        run_here("--resume", copy)


def test_other_weights_are_noticed(finished, copy):
    file = finished / "model" / "vae" / "model.safetensors"
    before = file.read_bytes()
    try:
        weights = load_file(file)
        weights = {name: tensor + 1 for name, tensor in weights.items()}
        save_file(weights, file)
        with refused("its weights are not", finished / "model"):
            run_here("--resume", copy)
    finally:
        file.write_bytes(before)
    run_here("--resume", copy)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: os.truncate(file, 100),
        lambda file: file.write_bytes(b""),
        lambda file: save_file({"other": torch.ones(1)}, file),
    ],
)
@pytest.mark.parametrize("name", ["text", "base", "encode", "refine"])
def test_damaged_state_is_named(copy, name, damage):
    file = copy / "state" / f"{name}.safetensors"
    damage(file)
    with refused(file, "damaged", "delete it"):
        run_here("--resume", copy)
    file.unlink()
    run_here("--resume", copy)


def test_killed_at_every_stage_a_run_goes_on_to_the_same_latents(tmp_path):
    kill.at_every_stage(tmp_path)


# --------------------------------------------------------------------------------------------------
# What ends a run: one line with the way on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on(finished, tmp_path, number):
    output = tmp_path / "run"
    process = start("--model", finished / "model", "--output", output, *SMALL, "--steps", 300)
    wait_for(output / "state" / "refine-progress.safetensors", process)
    process.send_signal(number)
    errors = process.communicate()[1].replace("\r", "\n").splitlines()
    assert process.returncode == 128 + number
    assert not any("Traceback" in line for line in errors)
    assert f"sample.py: stopped; --resume {output} goes on from the last saved step" in errors
    assert not (output / "freeswim.mp4").exists()
    assert not [*output.rglob(".*")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_even_while_importing(tmp_path, number):
    process = start("--output", tmp_path / "run")
    while "libtorch" not in open(f"/proc/{process.pid}/maps", encoding="utf-8").read():
        assert process.poll() is None
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == 128 + number
    assert output == ""
    assert errors.split("\n") == ["", "sample.py: stopped; nothing had been computed yet", ""]


def test_out_of_memory_names_the_stage_and_the_way_on(finished, copy):
    """The clip at 16000x16000 is 15 GB; the process may have 8."""
    output = copy.parent / "large"
    status, _, errors = run(
        "--model",
        finished / "model",
        "--output",
        output,
        "--prompt",
        "a red fish",
        "--base-video",
        copy / "base.mp4",
        "--size",
        "16000x16000",
        "--frames",
        "5",
        "--device",
        "cpu",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2),
    )
    assert status == 1
    assert not any("Traceback" in line for line in errors)
    assert '"upsample"' in errors[-1]
    assert "--size" in errors[-1]
    assert f"--resume {output}" in errors[-1]
    assert (output / "base.mp4").exists()


@pytest.mark.parametrize("limit", [2**14, 60_000])
def test_a_full_disk_is_named_and_nothing_is_lost(finished, tmp_path, limit):
    """Files may have 16 KiB, less than the text embeddings take, or 60 kB, which base latents do
    not."""
    output = tmp_path / "run"
    limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    status, _, errors = run(
        "--model", finished / "model", "--output", output, *SMALL, preexec_fn=limited
    )
    assert status == 1
    assert not any("Traceback" in line for line in errors)
    assert re.search(rf"cannot be written.*; --resume {output} goes on", errors[-1])
    assert not [*output.rglob(".*")]
    run_here("--resume", output)
    assert latents(output)


@pytest.mark.parametrize("limit", [2_000, 100_000])
def test_half_a_video_is_noticed(tmp_path, limit):
    """An encoder on a full disk ends without a word, and leaves half a file."""
    script = f"""
import resource, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from support import media
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
media.write_video({str(tmp_path / "a.mp4")!r}, torch.rand(1, 3, 17, 128, 192) * 2 - 1, 16)"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8")
    assert result.returncode == 1
    assert "OSError: the encoder wrote half of it" in result.stderr


def test_little_disk_need_is_told_in_mib(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20, 2**10)
    )
    with refused("MiB will be written", "--size"):
        make_plan(parse("--model", finished / "model", "--output", tmp_path / "run", *SMALL))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_out_of_memory_on_a_gpu_is_survived(checkpoint, tmp_path):
    """Another process (this one) holds all but 1 GiB of the GPU; when it has let go, the run goes
    on to the end."""
    arguments = [
        "--model",
        checkpoint,
        "--steps",
        "4",
        "--size",
        "3072x2048",
        "--frames",
        "5",
        "--dtype",
        "bfloat16",
    ]
    free, _ = torch.cuda.mem_get_info()
    hoard = torch.empty(free - 2**30, dtype=torch.uint8, device="cuda")
    status, _, errors = run(*arguments, "--output", tmp_path / "run")
    assert status == 1
    assert "out of memory in the stage" in errors[-1]
    assert "--size" in errors[-1]
    del hoard
    torch.cuda.empty_cache()
    assert run("--resume", tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "freeswim.mp4").is_file()
