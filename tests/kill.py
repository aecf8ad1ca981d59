"""Kill a run at random moments, go on with it, and compare: `python tests/kill.py [KILLS]` (50 unless told).

A small run of the bundled model is killed (SIGKILL) again and again, and resumed each time, until it comes to its end;
then a new one is begun, until enough kills were made. The final latents must be those of a run that was never killed,
bit for bit, whatever files the kills left behind. Prints where the kills struck.
"""
import collections
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETTINGS = ["--size", "224x144", "--frames", "5", "--steps", "12", "--strength", "0.8", "--cache-interval", "2",
            "--device", "cpu"]


def start(*arguments):
    command = [sys.executable, ROOT / "sample.py", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def latents_of(folder):
    return json.loads((folder / "run.json").read_text())["latents_sha256"]


def furthest(folder):
    """The newest whole file that a killed run has left behind."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(("part-", ".tmp"))]
    return max(files, key=lambda file: file.stat().st_mtime_ns).name if files else "nothing"


def main(kills, folder):
    draw, struck = random.Random(0), collections.Counter()
    began = time.time()
    finish(start(*SETTINGS, "--output", folder / "whole"))
    seconds, expected = time.time() - began, latents_of(folder / "whole")
    runs = 0
    while struck.total() < kills:
        runs += 1
        output = folder / str(runs)
        while True:
            begun = (output / "run.json").exists()
            process = start("--resume", output) if begun else start(*SETTINGS, "--output", output)
            try:
                process.wait(draw.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                struck[furthest(output)] += 1
            else:
                finish(process)
                break
        assert latents_of(output) == expected, f"run {runs} has other latents"
        assert not [*output.rglob("part-*"), *output.rglob(".tmp*")], "half a file was left"
    print(f"{struck.total()} kills in {runs} runs of {seconds:.0f} s, the latents always the same. The newest file "
          "that the killed left: " + ", ".join(f"{name} {count}" for name, count in struck.most_common()))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 50, Path(folder))
