"""The command line, run as a person runs it, on a random checkpoint: what it writes, and what it refuses."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio.v3 as imageio
import kill
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from parity import split_weights, write_random_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random model as wide as the bundled one, so that it has its preset, but shallow."""
    folder = tmp_path_factory.mktemp("model")
    write_random_model(folder, heads=5, head_dim=48)
    return folder


def run(*arguments):
    command = [sys.executable, str(ROOT / "sample.py"), *map(str, arguments)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=offline)


@pytest.fixture(scope="session")
def first_run(checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    result = run("--model", checkpoint, "--output", output, "--size", "224x144", "--frames", 5, "--steps", 3,
                 "--prompt", "a red shark", "--compare")
    assert result.returncode == 0, result.stderr
    return output, result


def test_it_writes_what_it_says(first_run):
    output, result = first_run
    assert sorted(file.name for file in output.iterdir()) == [
        "base.mp4", "comparison.png", "freeswim.mp4", "run.json", "state"]
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
    (["--resume", "nowhere"], ["nowhere", "run.json"]),
    (["--resume", "nowhere", "--steps", "9"], ["--steps", "nowhere"]),
    (["--output", str(ROOT / "README.md" / "run")], ["README.md", "choose another"]),
    (["--frames", "401", "--size", "80000x80000"], ["GiB", "--size"]),
    (["--scale", "nan"], ["scale nan"]),
    (["--scale", "1e9"], ["scale 1000000000.0", "100"]),
    (["--steps", "1000000"], ["steps 1000000", "1000"]),
    (["--seed", "-1"], ["seed -1"]),
    (["--guidance", "nan"], ["guidance nan"]),
    (["--strength", "0.01", "--steps", "50"], ["strength 0.01", "at least one"]),
    (["--no-cache", "--cache-interval", "2"], ["--cache-interval", "--no-cache"]),
    (["--model", "nobody/nothing"], ["nobody/nothing", "hub"]),
]
if not torch.cuda.is_available():
    REFUSED.append((["--device", "cuda"], ["cuda", "cpu"]))


@pytest.fixture(scope="module")
def refusals(checkpoint, tmp_path_factory):
    """The runs of REFUSED and BROKEN, two at a time since most of each is imports: {row: (output folder, future)}."""

    def bad_input(folder, arguments):
        standard = [] if "--resume" in arguments else ["--model", checkpoint, "--output", folder / "run"]
        return timed_run(*standard, *arguments)

    def broken(folder, change):
        shutil.copytree(checkpoint, folder / "model")
        change(folder / "model")
        return timed_run("--model", folder / "model", "--output", folder / "run", "--prompt", "a fish")

    def timed_run(*arguments):
        began = time.time()
        return run(*arguments), time.time() - began

    with ThreadPoolExecutor(2) as pool:
        rows = {}
        for row, (arguments, _) in enumerate(REFUSED):
            folder = tmp_path_factory.mktemp("row")
            rows[row] = folder / "run", pool.submit(bad_input, folder, arguments)
        for name, (change, _) in BROKEN.items():
            folder = tmp_path_factory.mktemp("row")
            rows[name] = folder / "run", pool.submit(broken, folder, change)
        yield rows


def assert_refused(refusal, named):
    output, future = refusal
    result, seconds = future.result()
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.stderr
    for words in named:
        assert words in result.stderr
    assert not output.exists()
    assert seconds < 15  # on a busy machine; it is 3 on a quiet one, most of it imports


@pytest.mark.parametrize("row", range(len(REFUSED)), ids=[" ".join(arguments)[-30:] for arguments, _ in REFUSED])
def test_bad_input_is_named_at_once(refusals, row):
    assert_refused(refusals[row], REFUSED[row][1])


def test_clips_that_cannot_be_refined_are_refused(checkpoint, tmp_path):
    imageio.imwrite(tmp_path / "odd.gif", np.random.default_rng(0).integers(0, 255, (9, 77, 101, 3), np.uint8))
    (tmp_path / "empty.mp4").write_bytes(b"")
    for clip, words in (("odd.gif", ["101x77", "100x76"]), ("empty.mp4", ["empty.mp4", "video"])):
        arguments = ["--frames", 5, "--base-video", tmp_path / clip]
        result = run("--model", checkpoint, "--output", tmp_path / "run", *arguments)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
        assert all(word in result.stderr for word in words)
        assert not (tmp_path / "run").exists()


def rewrite(file, **changes):
    """Change fields of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def retensor(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def shard(folder, **changes):
    """Split a part's file into two shards with an index, then change the index: {tensor: file or None}."""
    split_weights(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"] | changes
    rewrite(index, weight_map={name: file for name, file in weight_map.items() if file is not None})


NORM, BIAS = "blocks.0.attn2.norm_k.weight", "proj_out.bias"
T, V, E = "transformer", "vae", "text_encoder"
BROKEN = {  # what is done to a checkpoint, and what the one line of the answer must name
    **{f"{part} is missing": (lambda folder, part=part: shutil.rmtree(folder / part), [part]) for part in (T, V, E)},
    **{f"{part} has no weights": (lambda folder, part=part: (folder / part / "model.safetensors").unlink(),
                                  [part, "none"]) for part in (T, V, E)},
    **{f"{part} is empty": (lambda folder, part=part: (folder / part / "model.safetensors").write_bytes(b""),
                            [part, "fetch it again"]) for part in (T, V, E)},
    **{f"{part} is cut off": (
        lambda folder, part=part: os.truncate(folder / part / "model.safetensors", 9000),
        [part, "fetch it again"]) for part in (T, V, E)},
    **{f"{part} holds NaN": (
        lambda folder, part=part, name=name: retensor(folder / part / "model.safetensors",
                                                      lambda t: t[name].view(-1)[0].fill_(float("nan"))),
        [part, "not finite"]) for part, name in ((T, NORM), (V, "quant_conv.bias"),
                                                  (E, "encoder.final_layer_norm.weight"))},
    "infinite": (lambda f: retensor(f / T / "model.safetensors", lambda t: t[BIAS][3].fill_(float("inf"))),
                 [BIAS, "not finite"]),
    "not safetensors": (lambda f: (f / T / "model.safetensors").write_text("hello, " * 1000), ["fetch it again"]),
    "a pickle": (lambda f: (f / T / "model.safetensors").rename(f / T / "model.bin"), ["model.bin", "safetensors"]),
    "tensor missing": (lambda f: retensor(f / T / "model.safetensors", lambda t: t.pop(NORM)), [NORM, "missing"]),
    "tensor extra": (lambda f: retensor(f / V / "model.safetensors", lambda t: t.update(stray=torch.ones(2))),
                     ["stray", "not part"]),
    "tensor misshapen": (lambda f: retensor(f / T / "model.safetensors", lambda t: t.update({NORM: torch.ones(7)})),
                         [NORM, "(7,)"]),
    "tensor of integers": (lambda f: retensor(f / T / "model.safetensors", lambda t: t.update({NORM: t[NORM].long()})),
                           [NORM, "I64"]),
    "config not JSON": (lambda f: (f / T / "config.json").write_text("{"), ["config.json", "not JSON"]),
    "config a list": (lambda f: (f / V / "config.json").write_text("[1]"), ["config.json", "not an object"]),
    "field missing": (lambda f: rewrite(f / T / "config.json", num_layers=None), ["num_layers", "None"]),
    "field a word": (lambda f: rewrite(f / T / "config.json", ffn_dim="wide"), ["ffn_dim", "'wide'"]),
    "field negative": (lambda f: rewrite(f / E / "config.json", num_layers=-1), ["num_layers", "-1"]),
    "field absurd": (lambda f: rewrite(f / T / "config.json", num_layers=10**9), ["num_layers", "1000000000"]),
    "vocabulary absurd": (lambda f: rewrite(f / E / "config.json", vocab_size=10**15), ["vocab_size"]),
    "means too few": (lambda f: rewrite(f / V / "config.json", latents_mean=[0.0]), ["latents_mean", "16"]),
    "std zero": (lambda f: rewrite(f / V / "config.json", latents_std=[0.0] * 16), ["latents_std"]),
    "another width": (lambda f: rewrite(f / T / "config.json", num_attention_heads=3),
                      ["scale_shift_table", "(1, 2, 144)"]),
    "image to video": (lambda f: rewrite(f / T / "config.json", image_dim=1280), ["image_dim", "1280"]),
    "image to video, by index": (
        lambda f: (f / "model_index.json").write_text('{"_class_name": "WanImageToVideoPipeline"}'),
        ["WanImageToVideoPipeline", "text-to-video"]),
    "VACE": (lambda f: rewrite(f / T / "config.json", _class_name="WanVACETransformer3DModel"), ["WanVACE"]),
    "Wan2.2": (lambda f: (f / "model_index.json").write_text(
        '{"_class_name": "WanPipeline", "transformer_2": ["diffusers", "WanTransformer3DModel"]}'), ["Wan2.2"]),
    "Wan2.2's VAE": (lambda f: rewrite(f / V / "config.json", z_dim=48), ["z_dim", "48"]),
    "no tokenizer": (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "tokenizer broken": (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{}"), ["tokenizer.json"]),
    "index points outside": (lambda f: shard(f / T, **{NORM: "../../secret.safetensors"}), [NORM, "secret"]),
    "index points to nothing": (lambda f: shard(f / T, **{NORM: "c.safetensors"}), ["c.safetensors"]),
    "index leaves one out": (lambda f: shard(f / T, **{NORM: None}), [NORM]),
    "index has one too many": (lambda f: shard(f / T, stray="a.safetensors"), ["stray"]),
    "two files, no index": (lambda f: shutil.copy(f / T / "model.safetensors", f / T / "more.safetensors"),
                            ["2", "index"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_named_at_once(refusals, name):
    assert_refused(refusals[name], BROKEN[name][1])


def test_shards_are_read(checkpoint, tmp_path):
    """What BROKEN breaks works when it is whole."""
    shutil.copytree(checkpoint, tmp_path / "model")
    shard(tmp_path / "model" / T)
    result = run("--model", tmp_path / "model", "--output", tmp_path / "run", "--steps", 2, "--frames", 1,
                 "--prompt", "a fish " * 40)
    assert result.returncode == 0, result.stderr
    assert "too long, 32 tokens are read; cut off is: fish a fish" in result.stderr


def test_a_short_clip_is_refused_with_the_length_that_it_has(checkpoint, first_run, tmp_path):
    result = run("--model", checkpoint, "--output", tmp_path / "run", "--base-video", first_run[0] / "base.mp4")
    assert result.returncode == 2 and "--frames 5" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_unasked(checkpoint, first_run):
    output, _ = first_run
    before = (output / "freeswim.mp4").stat().st_mtime_ns
    result = run("--model", checkpoint, "--output", output)
    assert result.returncode == 2 and "--resume" in result.stderr and "--overwrite" in result.stderr
    assert (output / "freeswim.mp4").stat().st_mtime_ns == before


def test_killed_anywhere_a_run_goes_on_to_the_same_latents(tmp_path):
    kill.main(4, tmp_path)


def test_an_interrupted_run_says_how_to_go_on(checkpoint, tmp_path):
    output = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, ROOT / "sample.py", "--model", checkpoint, "--output", output, "--steps", "300"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (output / "state" / "refine-progress.safetensors").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    errors = process.communicate()[1].replace("\r", "\n")
    assert process.returncode == 130 and "Traceback" not in errors
    assert f"sample.py: stopped; --resume {output} goes on from the last saved step" in errors.splitlines()
    assert not (output / "freeswim.mp4").exists()


def test_out_of_memory_names_the_stage_and_the_way_on(checkpoint, first_run, tmp_path):
    """The clip at 20000x20000 is 24 GB; the process may have 8."""
    output = tmp_path / "run"
    arguments = ["--base-video", first_run[0] / "base.mp4", "--size", "20000x20000", "--frames", "5", "--device", "cpu"]
    result = subprocess.run(
        [sys.executable, ROOT / "sample.py", "--model", checkpoint, "--output", output, *arguments],
        capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2))
    assert result.returncode == 1, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert '"upsample"' in line and "--size" in line and f"--resume {output}" in line
    assert "Traceback" not in result.stderr and (output / "base.mp4").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_out_of_memory_on_a_gpu_is_survived(checkpoint, tmp_path):
    """Another process (this one) holds all but 1 GiB of the GPU; when it has let go, the run goes on to the end."""
    arguments = ["--model", checkpoint, "--steps", "4", "--size", "3072x2048", "--frames", "5", "--dtype", "bfloat16"]
    free, _ = torch.cuda.mem_get_info()
    hoard = torch.empty(free - 2**30, dtype=torch.uint8, device="cuda")
    result = run(*arguments, "--output", tmp_path / "run")
    assert result.returncode == 1, result.stderr
    assert "out of memory in the stage" in result.stderr and "--size" in result.stderr
    assert "Traceback" not in result.stderr
    del hoard
    torch.cuda.empty_cache()
    assert run("--resume", tmp_path / "run").returncode == 0
    assert (tmp_path / "run" / "freeswim.mp4").is_file()


def test_a_state_is_taken_up_where_it_was(checkpoint, first_run, tmp_path):
    """Resuming really starts at the saved step: with another state in its place, other latents come out."""
    output = tmp_path / "run"
    shutil.copytree(first_run[0], output)
    expected = json.loads((output / "run.json").read_text())["latents_sha256"]
    noise = load_file(output / "state" / "encoded.safetensors")["latents"]
    (output / "state" / "refine.safetensors").unlink()
    save_file({"step": torch.tensor(0), "latents": noise}, output / "state" / "refine-progress.safetensors")
    assert run("--resume", output).returncode == 0
    assert json.loads((output / "run.json").read_text())["latents_sha256"] != expected
    for file in ("refine", "encoded", "base"):  # without its latents, all is computed again
        (output / "state" / f"{file}.safetensors").unlink()
    assert run("--resume", output).returncode == 0
    assert json.loads((output / "run.json").read_text())["latents_sha256"] == expected
