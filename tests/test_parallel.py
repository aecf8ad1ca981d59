"""Several processes give what one gives. They run under torchrun, on the CPU, and on all GPUs that
there are."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import ROOT, SMALL, latents, parse, run_here
from oracle import relative
from safetensors.torch import load_file
from test_fast import pretend_to_be_one_of

from support import UserError, processes
from support.plan import make_plan

SETTINGS = [*SMALL, "--cache-interval", "2"]


def torchrun(ranks, *command):
    """A started torchrun, in a session of its own."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            *map(str, command),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        start_new_session=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process):
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize(
    "device, ranks", [("cpu", 2), ("cpu", 3), ("cuda", torch.cuda.device_count())]
)
def test_ranks_agree_with_one(device, ranks):
    if ranks == 0:
        pytest.skip("needs a CUDA device")
    output = finish(torchrun(ranks, ROOT / "tests" / "ranks.py", device))
    assert all(f"rank {rank} of {ranks} agrees" in output for rank in range(ranks))


def test_a_numbered_gpu_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda", "cuda:1"):
        assert processes.device_of(name) == torch.device(name)
    assert chosen == [torch.device("cuda:1")]


def refined(folder):
    return load_file(folder / "state" / "refine.safetensors")["latents"]


def test_the_command_runs_on_two_and_is_resumed_on_one_or_three(tmp_path):
    alone = tmp_path / "alone"
    together = tmp_path / "together"
    run_here(*SETTINGS, "--output", alone)
    output = finish(torchrun(2, ROOT / "sample.py", *SETTINGS, "--output", together))
    assert output.count("freeswim.mp4") == 1  # only one of them speaks
    assert sorted(file.name for file in together.rglob("*")) == sorted(
        file.name for file in alone.rglob("*")
    )
    assert relative(refined(together), refined(alone)) <= 1e-5
    for name in ("refine", "encode"):
        (together / "state" / f"{name}.safetensors").unlink()
    finish(torchrun(3, ROOT / "sample.py", "--resume", together))
    assert relative(refined(together), refined(alone)) <= 1e-5
    (together / "state" / "refine.safetensors").unlink()
    run_here("--resume", together)
    assert relative(refined(together), refined(alone)) <= 1e-5
    assert latents(together)


def test_spread_weights_in_bfloat16(tmp_path):
    arguments = [
        *SETTINGS,
        "--guidance",
        "1",
        "--dtype",
        "bfloat16",
        "--output",
    ]  # more amplifies what is rounded
    run_here(*arguments, tmp_path / "alone")
    finish(torchrun(2, ROOT / "sample.py", *arguments, tmp_path / "together", "--shard-weights"))
    assert (
        relative(refined(tmp_path / "together"), refined(tmp_path / "alone")) <= 0.02
    )  # bfloat16 rounds to 0.4%


def test_bad_input_is_said_once(tmp_path):
    process = torchrun(2, ROOT / "sample.py", "--frames", "6", "--output", tmp_path / "run")
    output, _ = process.communicate()
    assert process.returncode != 0
    assert output.count("sample.py: ") - output.count("sample.py: error") >= 1
    assert output.count("--frames 6: Wan takes") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_dies_all_end(tmp_path, victim):
    output = tmp_path / "run"
    process = torchrun(2, ROOT / "sample.py", *SETTINGS, "--steps", "1000", "--output", output)
    while not (output / "state" / "text.safetensors").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    children = (
        Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    )
    ranks = {
        int(environment(child)["RANK"]): int(child)
        for child in children
        if "RANK" in environment(child)
    }
    os.kill(ranks[victim], signal.SIGKILL)
    text, _ = process.communicate()  # or the test never ends
    assert process.returncode != 0
    assert not (output / "freeswim.mp4").exists()
    assert f"--resume {output}" in text
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def environment(pid):
    """A running process's environment variables."""
    entries = Path(f"/proc/{pid}/environ").read_text(encoding="utf-8").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def test_two_train_one_model(tmp_path):
    """With clips of their own, they end with the same weights; the latents mean what they meant at
    the start."""
    finish(
        torchrun(
            2,
            "-m",
            "--",
            "tiny.train",
            "--start",
            ROOT / "tiny",
            "--work",
            tmp_path,
            "--output",
            tmp_path / "model",
            "--device",
            "cpu",
            "--height",
            "64",
            "--width",
            "96",
            "--frames",
            "5",
            "--vae-batch",
            "1",
            "--vae-minutes",
            "0.01",
            "--clips",
            "8",
            "--batch",
            "2",
            "--minutes",
            "0.01",
        )
    )
    before = ROOT / "tiny"
    one = tmp_path / "model"
    other = tmp_path / "process 1"
    for part in ("vae", "text_encoder", "transformer"):
        start, first, second = (
            next((folder / part).glob("*.safetensors")).read_bytes()
            for folder in (before, one, other)
        )
        assert first == second != start
    statistics = [
        json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        for folder in (before, one)
    ]
    assert statistics[0] == statistics[1]
    clips = [torch.load(folder / "clips-scene-1.pt")[0] for folder in (tmp_path, other)]
    assert not torch.equal(*clips)


# --------------------------------------------------------------------------------------------------
# Several hosts: whoever fails says why, once


@pytest.mark.parametrize(
    "fault, named",
    [
        ("damaged", "vae/model.safetensors is damaged here"),
        ("different", "its files are not the same on all hosts"),
    ],
)
def test_a_fault_in_another_process_is_said_once(tmp_path, fault, named):
    script = [ROOT / "tests" / "hosts.py", fault]
    process = torchrun(3, *script, *SETTINGS, "--output", tmp_path / "run")
    output, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    assert output.count(named) == 1
    assert not (tmp_path / "run" / "base.mp4").exists()


def test_two_hosts_make_one_clip(tmp_path):
    """Two torchruns, as one on each host."""
    agents = []
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--nproc-per-node", "1", "--node-rank", str(node)]
        command += ["--master-addr", "127.0.0.1", "--master-port", "29613"]
        command += [str(ROOT / "sample.py"), *SETTINGS, "--output", str(tmp_path / "run")]
        agents.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )
    printed = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert "".join(printed).count("freeswim.mp4") == 1
    run_here(*SETTINGS, "--output", tmp_path / "alone")
    assert relative(refined(tmp_path / "run"), refined(tmp_path / "alone")) <= 1e-5


@pytest.mark.parametrize("count, named", [(1, "has started 2 processes on a host with 1 GPUs")])
def test_more_processes_than_gpus(monkeypatch, count, named):
    pretend_to_be_one_of(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=named):
        processes.device_of("cuda")


def test_a_numbered_gpu_under_torchrun_is_refused(monkeypatch, checkpoint, tmp_path):
    pretend_to_be_one_of(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="--device cuda:1: torchrun gives each process a GPU"):
        make_plan(parse("--model", checkpoint, "--device", "cuda:1", "--output", tmp_path / "run"))


def test_a_stray_rank_means_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert not processes.are_several()
    assert processes.is_first()
    assert processes.world_size() == 1
