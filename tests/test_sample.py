"""The command line, run as a person runs it, on a random checkpoint: what it writes, and what it refuses."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch
from safetensors.torch import save_file

from model import TextEncoder, WanTransformer, WanVAE, checkpoint_name
from tiny import world

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "tests" / "reference" / "wide"
UMT5 = json.loads((ROOT / "tests" / "wan2.1-t2v-1.3b" / "text_encoder" / "config.json").read_text())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random model as wide as the bundled one, so that it has its preset, but shallow."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "tokenizer").mkdir()
    words = world.build_tokenizer(folder / "tokenizer" / "tokenizer.json")
    transformer = json.loads((REFERENCE / "transformer" / "config.json").read_text())
    transformer |= {"num_attention_heads": 5, "attention_head_dim": 48, "num_layers": 1}
    text = UMT5 | {"vocab_size": words, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    vae = json.loads((REFERENCE / "vae" / "config.json").read_text())
    torch.manual_seed(0)
    for part, cls, config in (
        ("transformer", WanTransformer, transformer), ("vae", WanVAE, vae), ("text_encoder", TextEncoder, text),
    ):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
        weights = {checkpoint_name(name): value for name, value in cls(config).state_dict().items()}
        save_file(weights, folder / part / "model.safetensors")
    return folder


def run(*arguments):
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def first_run(checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    result = run("--model", checkpoint, "--output", output, "--size", "224x144", "--frames", 5, "--steps", 3,
                 "--prompt", "a red shark", "--compare")
    assert result.returncode == 0, result.stderr
    return output, result


def test_it_writes_what_it_says(first_run):
    output, result = first_run
    assert sorted(file.name for file in output.iterdir()) == ["base.mp4", "comparison.png", "freeswim.mp4", "run.json"]
    assert imageio.imread(output / "base.mp4").shape == (5, 128, 192, 3)
    assert imageio.imread(output / "freeswim.mp4").shape == (5, 144, 224, 3)
    strips = ("upscaled", "full attention", "clipped window", "inward window", "FreeSwim")
    assert imageio.imread(output / "comparison.png").shape == (len(strips) * 144, 4 * 224, 3)
    for file in ("base.mp4", "freeswim.mp4", "comparison.png", "run.json"):
        assert str(output / file) in result.stdout
    for stage in ("base", "decode base", "encode", "refine", "full attention", "decode refine"):
        assert f"{stage}: 100%" in result.stderr, "a progress bar that runs to its end"
    assert "shark" in result.stderr, "a word that the model does not know is named"


def test_run_json_tells_everything(first_run):
    output, _ = first_run
    record = json.loads((output / "run.json").read_text())
    expected = {"prompt": "a red shark", "negative_prompt": "", "size": "224x144", "frames": 5, "steps": 3, "seed": 0,
                "strength": 0.5, "guidance": 3.5, "flow_shift": 3.0, "cache_interval": 5, "fps": 16, "device": "cpu",
                "dtype": "float32", "base_video": None}
    assert expected.items() <= record["settings"].items()
    assert record["versions"]["torch"] == torch.__version__
    for stage in ("text", "load", "base", "encode", "refine", "decode refine"):
        assert record["stages"][stage]["seconds"] >= 0 and record["stages"][stage]["peak_memory_gib"] > 0


def test_a_seed_gives_the_same_latents_bit_for_bit(checkpoint, first_run, tmp_path):
    def latents(name, *arguments):
        result = run("--model", checkpoint, "--output", tmp_path / name, "--size", "224x144", "--frames", 5,
                     "--steps", 3, "--prompt", "a red shark", *arguments)
        assert result.returncode == 0, result.stderr
        return json.loads((tmp_path / name / "run.json").read_text())["latents_sha256"]

    expected = json.loads((first_run[0] / "run.json").read_text())["latents_sha256"]
    assert latents("again") == expected
    assert latents("other", "--seed", 1) != expected


def test_an_existing_clip_is_refined(checkpoint, first_run, tmp_path):
    clip = tmp_path / "clip.mp4"
    shutil.copy(first_run[0] / "freeswim.mp4", clip)
    result = run("--model", checkpoint, "--output", tmp_path / "run", "--base-video", clip, "--frames", 5,
                 "--steps", 3, "--scale", 1.5, "--no-cache")
    assert result.returncode == 0, result.stderr
    assert imageio.imread(tmp_path / "run" / "base.mp4").shape == (5, 144, 224, 3)
    assert imageio.imread(tmp_path / "run" / "freeswim.mp4").shape == (5, 192, 288, 3)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["cache_interval"] is None and "base" not in record["stages"]


REFUSED = [  # what is typed, and what the one line of the answer must name: the value and the mend
    (["--size", "1920x1080"], ["1920x1080", "1920x1088"]),
    (["--size", "200x130"], ["200x130", "192x128"]),
    (["--size", "128x64"], ["128x64", "192x128"]),
    (["--size", "large"], ["large", "384x256"]),
    (["--scale", "0.5"], ["192x128"]),
    (["--frames", "8"], ["8", "4k + 1"]),
    (["--frames", "-3"], ["-3", "4k + 1"]),
    (["--strength", "0"], ["strength 0"]),
    (["--strength", "1.5"], ["strength 1.5"]),
    (["--steps", "1"], ["steps 1", "at least one"]),
    (["--cache-interval", "0"], ["cache-interval 0"]),
    (["--guidance", "-1"], ["guidance -1"]),
    (["--seed", "x"], ["seed", "x"]),
    (["--prompt", " "], ["prompt is empty"]),
    (["--device", "abacus"], ["abacus", "cpu"]),
    (["--dtype", "int8"], ["int8", "bfloat16"]),
    (["--model", "no/such/folder"], ["no/such/folder", "hub id"]),
    (["--model", str(ROOT / "tests")], ["transformer/config.json"]),
    (["--base-video", str(ROOT / "README.md")], ["README.md", "video"]),
    (["--base-video", "nowhere.mp4"], ["nowhere.mp4"]),
    (["--sizes", "1x1"], ["--sizes"]),
]
if not torch.cuda.is_available():
    REFUSED.append((["--device", "cuda"], ["cuda", "cpu"]))


@pytest.mark.parametrize("arguments, named", REFUSED, ids=[" ".join(arguments)[-30:] for arguments, _ in REFUSED])
def test_bad_input_is_named_at_once(checkpoint, tmp_path, arguments, named):
    result = run("--model", checkpoint, "--output", tmp_path / "run", *arguments)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    for words in named:
        assert words in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_short_clip_is_refused_with_the_length_that_it_has(checkpoint, first_run, tmp_path):
    result = run("--model", checkpoint, "--output", tmp_path / "run", "--base-video", first_run[0] / "base.mp4")
    assert result.returncode == 2 and "--frames 5" in result.stderr
    assert not (tmp_path / "run").exists()
