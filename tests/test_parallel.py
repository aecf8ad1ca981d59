"""Several processes give what one gives. They run under torchrun, on the CPU."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from oracle import relative
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SETTINGS = ["--size", "224x144", "--frames", "5", "--steps", "4", "--cache-interval", "2", "--device", "cpu"]


def torchrun(ranks, *command):
    """A started torchrun, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
         *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_agree_with_one(ranks):
    output = finish(torchrun(ranks, ROOT / "tests" / "ranks.py"))
    assert all(f"rank {rank} of {ranks} agrees" in output for rank in range(ranks))


def latents(folder):
    return load_file(folder / "state" / "refine.safetensors")["latents"]


def test_the_command_runs_on_two_and_is_resumed_on_one_or_three(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    subprocess.run([sys.executable, ROOT / "sample.py", *SETTINGS, "--output", alone], check=True, capture_output=True)
    output = finish(torchrun(2, ROOT / "sample.py", *SETTINGS, "--shard-weights", "--output", together))
    assert output.count("freeswim.mp4") == 1  # only one of them speaks
    assert sorted(file.name for file in together.rglob("*")) == sorted(file.name for file in alone.rglob("*"))
    assert relative(latents(together), latents(alone)) <= 1e-5
    for ranks in (1, 3):
        (together / "state" / "refine.safetensors").unlink()
        (together / "state" / "encoded.safetensors").unlink()
        finish(torchrun(ranks, ROOT / "sample.py", "--resume", together))
        assert relative(latents(together), latents(alone)) <= 1e-5


def test_bad_input_is_said_once(tmp_path):
    process = torchrun(2, ROOT / "sample.py", "--frames", "6", "--output", tmp_path / "run")
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and output.count("sample.py: --frames 6") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_dies_all_end(tmp_path, victim):
    output = tmp_path / "run"
    process = torchrun(2, ROOT / "sample.py", *SETTINGS, "--steps", "1000", "--output", output)
    while not (output / "state" / "text.safetensors").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {int(environment(child)["RANK"]): int(child) for child in children if "RANK" in environment(child)}
    began = time.time()
    os.kill(ranks[victim], signal.SIGKILL)
    text, _ = process.communicate(timeout=60)
    assert time.time() - began < 10 and process.returncode != 0
    assert f"--resume {output}" in text
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def environment(pid):
    """A running process's environment variables."""
    entries = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)
