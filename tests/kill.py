"""Kill a run at random moments, go on with it, and compare: `python tests/kill.py [KILLS]` (50
unless told).

A small run of the bundled model is killed (SIGKILL) again and again, and resumed each time, until
it comes to its end; then a new one is begun, until enough kills were made. The final latents must
be those of a run that was never killed, bit for bit, whatever files the kills left behind. Prints
where the kills struck. An earlier version of this code: 50 kills in 15 runs of 12 s, over all
stages, and 15 times the same latents.
"""

import collections
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from command import latents, start

SETTINGS = [
    "--size",
    "224x144",
    "--frames",
    "5",
    "--steps",
    "12",
    "--strength",
    "0.8",
    "--cache-interval",
    "2",
    "--device",
    "cpu",
]
STAGES = [
    "run.json",
    "state/base.safetensors",
    "state/encode.safetensors",
    "state/refine-progress.safetensors",
    "state/refine.safetensors",
    "freeswim.mp4",
]  # in the order of appearance


def finish(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def begin_or_resume(output):
    return start(
        *(
            ["--resume", output]
            if (output / "run.json").exists()
            else [*SETTINGS, "--output", output]
        )
    )


def check(output, expected):
    assert latents(output) == expected, f"{output} has other latents"
    assert not [*output.rglob(".*")], "half a file was left"


def at_every_stage(folder):
    """One run, killed as soon as each of STAGES is there."""
    finish(start(*SETTINGS, "--output", folder / "whole"))
    output = folder / "killed"
    for file in STAGES:
        process = begin_or_resume(output)
        while not (output / file).exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.kill()
        process.communicate()
    finish(begin_or_resume(output))
    check(output, latents(folder / "whole"))


def furthest(folder):
    """The newest whole file that a killed run has left behind."""
    files = [
        file
        for file in folder.rglob("*")
        if file.is_file() and not file.parent.name.startswith(".")
    ]
    return max(files, key=lambda file: file.stat().st_mtime_ns).name if files else "nothing"


def main(kills, folder):
    draw = random.Random(0)
    struck = collections.Counter()
    began = time.time()
    finish(start(*SETTINGS, "--output", folder / "whole"))
    seconds = time.time() - began
    runs = 0
    while struck.total() < kills:
        runs += 1
        output = folder / str(runs)
        while True:
            process = begin_or_resume(output)
            try:
                process.wait(draw.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                struck[furthest(output)] += 1
            else:
                finish(process)
                break
        check(output, latents(folder / "whole"))
    print(
        f"{struck.total()} kills in {runs} runs of {seconds:.0f} s, the latents always "
        f"the same. The newest file "
        "that the killed left: "
        + ", ".join(f"{name} {count}" for name, count in struck.most_common())
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 50, Path(folder))
