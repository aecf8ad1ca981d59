"""The command: what it writes, what it refuses, and what it does with a clip."""

import contextlib
import json
import os
import shutil

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from command import ROOT, SMALL, latents, parse, record, run, run_here
from parity import split_weights
from PIL import Image
from safetensors.torch import load_file, save_file

import model
import sample
from support import hub, media
from support.plan import make_plan
from support.presets import BUNDLED


@pytest.fixture(scope="session")
def first_run(checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "output"
    status, text, errors = run(
        "--model", checkpoint, "--output", output, *SMALL, "--prompt", "a red shark", "--compare"
    )
    assert status == 0, errors
    return output, text, "\n".join(errors)


def test_it_writes_what_it_says(first_run):
    output, text, errors = first_run
    assert sorted(file.name for file in output.iterdir()) == [
        "base.mp4",
        "comparison.png",
        "freeswim.mp4",
        "run.json",
        "state",
    ]
    assert imageio.imread(output / "base.mp4").shape == (5, 128, 192, 3)
    assert imageio.imread(output / "freeswim.mp4").shape == (5, 144, 224, 3)
    strips = ("upscaled", "FreeSwim", "full attention", "clipped window", "inward window")
    assert imageio.imread(output / "comparison.png").shape == (len(strips) * 144, 4 * 224, 3)
    for file in ("base.mp4", "freeswim.mp4", "comparison.png", "run.json"):
        assert str(output / file) in text
    for stage in ("base", "decode base", "encode", "refine", "full attention", "decode refine"):
        assert f"{stage}: 100%" in errors, "a progress bar that runs to its end"
    assert "never seen the words: shark" in errors
    assert "--compare refines at flow shift 6, where windows alone go wrong" in errors
    modes = {file.stat().st_mode for file in (*output.glob("*.*"), *(output / "state").iterdir())}
    assert len(modes) == 1  # the state is as readable as the video


def test_run_json_tells_everything(first_run):
    content = record(first_run[0])
    expected = {
        "prompt": "a red shark",
        "negative_prompt": "",
        "size": "224x144",
        "frames": 5,
        "steps": 4,
        "seed": 0,
        "strength": 0.7,
        "guidance": 2.0,
        "flow_shift": 6.0,  # with --compare, one at which windows alone go wrong
        "cache_interval": 5,
        "fps": 16,
        "device": "cpu",
        "dtype": "float32",
        "base_video": None,
    }
    for name, value in expected.items():
        assert content["settings"][name] == value
    assert content["versions"]["torch"] == torch.__version__
    for name in ("text", "load", "base", "encode", "refine", "decode refine", "write"):
        stage = content["stages"][name]
        assert stage["seconds"] >= 0
        assert stage["peak_memory_gib"] > 0


def test_a_stages_peak_is_that_of_all_its_tries(checkpoint, monkeypatch, tmp_path):
    """Files are written three times, first before the clip is encoded."""
    falling = iter(range(1000, 0, -1))
    monkeypatch.setattr("support.run.peak_memory", lambda device: next(falling) * 2**30)
    run_here("--model", checkpoint, "--output", tmp_path, *SMALL)
    stages = record(tmp_path)["stages"]
    assert stages["write"]["peak_memory_gib"] > stages["encode"]["peak_memory_gib"]


def test_the_cache_is_gone_when_the_vae_decodes(checkpoint, monkeypatch, tmp_path):
    decode = sample.decode
    outputs = []

    def seen(plan, models, *rest):
        outputs.append(len(models.cache))
        return decode(plan, models, *rest)

    monkeypatch.setattr(sample, "decode", seen)
    run_here("--model", checkpoint, "--output", tmp_path, *SMALL)
    assert outputs == [0]


def test_a_seed_gives_the_same_latents_bit_for_bit(checkpoint, tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        run_here("--model", checkpoint, "--output", tmp_path / name, *SMALL, "--seed", seed)
    assert latents(tmp_path / "one") == latents(tmp_path / "again") != latents(tmp_path / "other")


def test_shards_are_read_and_long_prompts_are_cut(checkpoint, tmp_path, capsys):
    """What BROKEN breaks works when it is whole."""
    shutil.copytree(checkpoint, tmp_path / "model")
    shard(tmp_path / "model" / T)
    run_here(
        "--model",
        tmp_path / "model",
        "--output",
        tmp_path / "run",
        "--steps",
        2,
        "--frames",
        1,
        "--prompt",
        "a fish " * 40,
    )
    assert "too long, 32 tokens are read; cut off is: fish a fish" in capsys.readouterr().err


def test_help_shows_the_words_and_the_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    file = ROOT / "tiny" / "tokenizer" / "tokenizer.json"
    vocabulary = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
    known = [word for word in vocabulary if word[0] != "<" and word not in BUNDLED.untrained_words]
    words = text.split("knows the words: ")[1].split(". Try")[0].split()
    assert sorted(words) == sorted(known)
    assert all(f"(default: {default})" in text for default in (2, 5, 0, "output"))


# --------------------------------------------------------------------------------------------------
# Bad input: one line that names the value and the fix, before a weight is read

REFUSED = [  # what is typed, and what the answer must name
    (["--size", "200x131"], ["200x131", "200x132"]),
    (["--size", "128x64"], ["128x64", "192x128"]),
    (["--size", "128x160"], ["128x160", "128x192"]),
    (["--size", "large"], ["large", "384x256"]),
    (["--size", ""], ["--size is empty"]),
    (["--scale", "0.5"], ["192x128"]),
    (["--frames", "8"], ["8", "4k + 1", "9"]),
    (["--frames", "-3"], ["-3", "from 1"]),
    (["--strength", "0"], ["strength 0"]),
    (["--strength", "1.5"], ["strength 1.5"]),
    (["--steps", "1"], ["steps 1", "at least one"]),
    (["--cache-interval", "0"], ["cache-interval 0"]),
    (["--guidance", "-1"], ["guidance -1"]),
    (["--seed", "x"], ["seed", "x"]),
    (["--prompt", " "], ["--prompt ' ' is empty"]),
    (["--prompt", "&nbsp;"], ["&nbsp;", "is empty"]),
    (["--device", "abacus"], ["abacus", "cpu"]),
    (["--device", "cpu:1"], ["cpu:1", "choose cpu"]),
    (["--device", "cuda:99"], ["cuda:99", "choose cpu"]),
    (["--dtype", "int8"], ["int8", "bfloat16"]),
    (["--model", "/nosuch"], ["/nosuch", "no such folder"]),
    (["--model", "no/such/folder"], ["no/such/folder", "hub id"]),
    (["--model", ""], ["--model is empty"]),
    (["--model", str(ROOT / "tests")], ["transformer/config.json"]),
    (["--model", "nobody/nothing"], ["nobody/nothing", "hub"]),
    (["--prompt", "a red fish", "--base-video", str(ROOT / "README.md")], ["README.md", "video"]),
    (["--prompt", "a red fish", "--base-video", "nowhere.mp4"], ["nowhere.mp4", "no file"]),
    (["--prompt", "a red fish", "--base-video", ""], ["--base-video is empty"]),
    (
        ["--prompt", "a red fish", "--base-video", "http://example.com/clip.mp4"],
        ["clip.mp4", "no file"],
    ),
    (["--prompt", "a red fish", "--base-video", str(ROOT / "tests")], ["a folder"]),
    (["--sizes", "1x1"], ["--sizes"]),
    (["--resume", "nowhere"], ["nowhere", "run.json"]),
    (["--resume", str(ROOT), "--steps", "9"], [str(ROOT), "run.json"]),
    (["--output", str(ROOT / "README.md" / "run")], ["README.md", "choose another"]),
    (["--output", ""], ["--output is empty"]),
    (["--frames", "401", "--size", "80000x80000"], ["GiB", "--size"]),
    (["--scale", "nan"], ["scale nan"]),
    (["--scale", "1e9"], ["scale 1000000000.0", "100"]),
    (["--steps", "1000000"], ["steps 1000000", "1000"]),
    (["--seed", "-1"], ["seed -1"]),
    (["--guidance", "nan"], ["guidance nan"]),
    (["--strength", "0.01", "--steps", "50"], ["strength 0.01", "at least one"]),
    (["--no-cache", "--cache-interval", "2"], ["--cache-interval", "--no-cache"]),
    (["--shard-weights"], ["--shard-weights", "torchrun"]),
    (["--offload", "--device", "cpu"], ["--offload", "GPU"]),
    (["--vae-dtype", "float16", "--device", "cpu"], ["--vae-dtype float16", "float32"]),
]


@contextlib.contextmanager
def refused(capsys, *named):
    """One line that names all of these is what the code under it ends with."""
    with pytest.raises((ValueError, SystemExit)) as caught:
        yield
    printed = capsys.readouterr().err
    message = printed if caught.type is SystemExit else str(caught.value)
    for words in named:
        assert words in message
    is_user_error = issubclass(caught.type, ValueError)
    assert is_user_error or caught.value.code == 2 and len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, named", REFUSED, ids=[" ".join(arguments)[-30:] for arguments, _ in REFUSED]
)
def test_bad_input_is_named_before_any_work(
    checkpoint, tmp_path, monkeypatch, capsys, arguments, named
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(model, "safe_open", lambda *_: pytest.fail("weights were opened"))
    standard = (
        [] if "--resume" in arguments else ["--model", checkpoint, "--output", tmp_path / "run"]
    )
    with refused(capsys, *named):
        run_here(*standard, *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("row", [0, 5, 13, 19, 26, 30])
def test_the_command_says_it_in_one_line(checkpoint, tmp_path, row):
    arguments, named = REFUSED[row]
    status, _, errors = run("--model", checkpoint, "--output", tmp_path / "run", *arguments)
    assert status == 2
    assert len(errors) == 1
    assert all(words in errors[0] for words in named)
    assert not (tmp_path / "run").exists()


def test_from_the_hub_weights_come_last(checkpoint, tmp_path, monkeypatch, capsys):
    """A bad --frames fetches no weight, a good one fetches descriptions, then weights."""
    fetched = []

    def snapshot_download(name, *, revision, allow_patterns):
        fetched.append(allow_patterns)
        folder = tmp_path / "hub"
        weights = any(pattern.endswith("safetensors") for pattern in allow_patterns)
        shutil.copytree(
            checkpoint,
            folder,
            dirs_exist_ok=True,
            ignore=None if weights else shutil.ignore_patterns("*.safetensors"),
        )
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    arguments = ["--model", "some/one", "--output", tmp_path / "run", *SMALL]
    with refused(capsys, "--frames 6"):
        run_here(*arguments, "--frames", 6)
    assert not fetched
    assert not [*tmp_path.rglob("*.safetensors")]
    run_here(*arguments)
    assert len(fetched) == 2
    assert (tmp_path / "run" / "freeswim.mp4").is_file()


def test_a_full_disk_while_fetching_is_called_so(tmp_path, monkeypatch, capsys):
    def snapshot_download(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with refused(capsys, "some/one", "No space left"):
        run_here("--model", "some/one", "--output", tmp_path / "run")


# --------------------------------------------------------------------------------------------------
# Broken checkpoints


def rewrite(file, **changes):
    """Change fields of a JSON file; None removes one."""
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(
        json.dumps({key: value for key, value in content.items() if value is not None}),
        encoding="utf-8",
    )


def retensor(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def shard(folder, **changes):
    """Split a part's file into two shards with an index, then change the index: {tensor: file or
    None}."""
    split_weights(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"] | changes
    rewrite(index, weight_map={name: file for name, file in weight_map.items() if file is not None})


NORM = "blocks.0.attn2.norm_k.weight"
BIAS = "proj_out.bias"
T = "transformer"
V = "vae"
E = "text_encoder"
BROKEN = {  # what is done to a checkpoint, and what the one line of the answer must name
    **{
        f"{part} is missing": (lambda folder, part=part: shutil.rmtree(folder / part), [part])
        for part in (T, V, E)
    },
    **{
        f"{part} has no weights": (
            lambda folder, part=part: (folder / part / "model.safetensors").unlink(),
            [part, "none"],
        )
        for part in (T, V, E)
    },
    **{
        f"{part} is empty": (
            lambda folder, part=part: (folder / part / "model.safetensors").write_bytes(b""),
            [part, "fetch it again"],
        )
        for part in (T, V, E)
    },
    **{
        f"{part} is cut off": (
            lambda folder, part=part: os.truncate(folder / part / "model.safetensors", 9000),
            [part, "fetch it again"],
        )
        for part in (T, V, E)
    },
    **{
        f"{part} holds NaN": (
            lambda folder, part=part, name=name: retensor(
                folder / part / "model.safetensors",
                lambda t: t[name].view(-1)[0].fill_(float("nan")),
            ),
            [part, "not finite"],
        )
        for part, name in (
            (T, NORM),
            (V, "quant_conv.bias"),
            (E, "encoder.final_layer_norm.weight"),
        )
    },
    "infinite": (
        lambda f: retensor(f / T / "model.safetensors", lambda t: t[BIAS][3].fill_(float("inf"))),
        [BIAS, "not finite"],
    ),
    "not safetensors": (
        lambda f: (f / T / "model.safetensors").write_text("hello, " * 1000, encoding="utf-8"),
        ["fetch it again"],
    ),
    "a pickle": (
        lambda f: (f / T / "model.safetensors").rename(f / T / "model.bin"),
        ["model.bin", "safetensors"],
    ),
    "tensor missing": (
        lambda f: retensor(f / T / "model.safetensors", lambda t: t.pop(NORM)),
        [NORM, "missing"],
    ),
    "tensor extra": (
        lambda f: retensor(f / V / "model.safetensors", lambda t: t.update(stray=torch.ones(2))),
        ["stray", "not part"],
    ),
    "tensor misshapen": (
        lambda f: retensor(f / T / "model.safetensors", lambda t: t.update({NORM: torch.ones(7)})),
        [NORM, "(7,)"],
    ),
    "tensor of integers": (
        lambda f: retensor(f / T / "model.safetensors", lambda t: t.update({NORM: t[NORM].long()})),
        [NORM, "I64"],
    ),
    "config not JSON": (
        lambda f: (f / T / "config.json").write_text("{", encoding="utf-8"),
        ["config.json", "not JSON"],
    ),
    "config a list": (
        lambda f: (f / V / "config.json").write_text("[1]", encoding="utf-8"),
        ["config.json", "not an object"],
    ),
    "field missing": (
        lambda f: rewrite(f / T / "config.json", num_layers=None),
        ["num_layers", "None"],
    ),
    "field a word": (
        lambda f: rewrite(f / T / "config.json", ffn_dim="wide"),
        ["ffn_dim", "'wide'"],
    ),
    "field negative": (
        lambda f: rewrite(f / E / "config.json", num_layers=-1),
        ["num_layers", "-1"],
    ),
    "field absurd": (
        lambda f: rewrite(f / T / "config.json", num_layers=10**9),
        ["num_layers", "1000000000"],
    ),
    "vocabulary absurd": (
        lambda f: rewrite(f / E / "config.json", vocab_size=10**15),
        ["vocab_size"],
    ),
    "means too few": (
        lambda f: rewrite(f / V / "config.json", latents_mean=[0.0]),
        ["latents_mean", "16"],
    ),
    "std zero": (lambda f: rewrite(f / V / "config.json", latents_std=[0.0] * 16), ["latents_std"]),
    "another width": (
        lambda f: rewrite(f / T / "config.json", num_attention_heads=3),
        ["144 wide"],
    ),
    "image to video": (
        lambda f: rewrite(f / T / "config.json", image_dim=1280),
        ["image_dim", "1280"],
    ),
    "image to video, by index": (
        lambda f: (f / "model_index.json").write_text(
            '{"_class_name": "WanImageToVideoPipeline"}', encoding="utf-8"
        ),
        ["WanImageToVideoPipeline", "text-to-video"],
    ),
    "VACE": (
        lambda f: rewrite(f / T / "config.json", _class_name="WanVACETransformer3DModel"),
        ["WanVACE"],
    ),
    "Wan2.2": (
        lambda f: (f / "model_index.json").write_text(
            '{"_class_name": "WanPipeline", '
            '"transformer_2": ["diffusers", "WanTransformer3DModel"]}',
            encoding="utf-8",
        ),
        ["boundary_ratio"],
    ),
    "Wan2.2's VAE": (lambda f: rewrite(f / V / "config.json", z_dim=48), ["z_dim", "48"]),
    "no tokenizer": (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "tokenizer broken": (
        lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8"),
        ["tokenizer.json"],
    ),
    "index points outside": (
        lambda f: shard(f / T, **{NORM: "../../secret.safetensors"}),
        [NORM, "secret"],
    ),
    "index points to nothing": (
        lambda f: shard(f / T, **{NORM: "c.safetensors"}),
        ["c.safetensors"],
    ),
    "index leaves one out": (lambda f: shard(f / T, **{NORM: None}), [NORM]),
    "index has one too many": (lambda f: shard(f / T, stray="a.safetensors"), ["stray"]),
    "two files, no index": (
        lambda f: shutil.copy(f / T / "model.safetensors", f / T / "more.safetensors"),
        ["2", "index"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_named(checkpoint, tmp_path, capsys, name):
    change, named = BROKEN[name]
    shutil.copytree(checkpoint, tmp_path / "model")
    change(tmp_path / "model")
    with refused(capsys, *named):
        run_here("--model", tmp_path / "model", "--output", tmp_path / "run", "--prompt", "a fish")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["text_encoder holds NaN", "tensor missing", "Wan2.2"])
def test_the_command_names_it_in_one_line(checkpoint, tmp_path, name):
    change, named = BROKEN[name]
    shutil.copytree(checkpoint, tmp_path / "model")
    change(tmp_path / "model")
    status, _, errors = run(
        "--model", tmp_path / "model", "--output", tmp_path / "run", "--prompt", "a fish"
    )
    assert status == 2
    assert len(errors) == 1
    assert all(words in errors[0] for words in named)
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------
# Sizes and clips


def planned(checkpoint, tmp_path, *arguments):
    return make_plan(parse("--model", checkpoint, "--output", tmp_path / "run", *arguments))


@pytest.mark.parametrize(
    "arguments, target, computed, native",
    [
        ([], (256, 384), (256, 384), (128, 192)),
        (["--scale", "1.3"], (166, 250), (176, 256), (128, 192)),
        (["--size", "410x270"], (270, 410), (272, 416), (128, 192)),
        (["--size", "256x384"], (384, 256), (384, 256), (192, 128)),
        (["--size", "300x300"], (300, 300), (304, 304), (128, 192)),
    ],
)
def test_sizes(checkpoint, tmp_path, arguments, target, computed, native):
    args = planned(checkpoint, tmp_path, *arguments)
    assert (args.target, args.computed, tuple(args.native)) == (target, computed, native)


@pytest.mark.parametrize(
    "size, warned",
    [
        ("384x256", []),
        ("256x384", ["higher than wide"]),
        ("1000x128", ["is far from"]),
        ("970x660", ["is far from"]),
        ("960x640", []),
    ],
)
def test_sizes_that_a_model_has_not_seen_are_warned_about(checkpoint, tmp_path, size, warned):
    notes = [
        note
        for note in planned(checkpoint, tmp_path, "--size", size).notes
        if "cropped" not in note
    ]
    assert len(notes) == len(warned)
    assert all(words in note for words, note in zip(warned, notes, strict=True))


@pytest.mark.parametrize("size", ["230x150", "150x230"])
def test_a_video_has_exactly_the_size_asked_for(checkpoint, tmp_path, size):
    run_here("--model", checkpoint, "--output", tmp_path / "run", *SMALL, "--size", size)
    width, height = map(int, size.split("x"))
    assert imageio.imread(tmp_path / "run" / "freeswim.mp4").shape == (5, height, width, 3)
    base = imageio.imread(tmp_path / "run" / "base.mp4").shape
    assert base == ((5, 128, 192, 3) if width > height else (5, 192, 128, 3))
    content = record(tmp_path / "run")
    assert content["settings"]["size"] == size
    assert content["computed"] == ("240x160" if width > height else "160x240")


def write_clip(file, shape=(12, 180, 320), fps=60):
    """A white disc on a dark gradient; what distorts it makes an ellipse of it."""
    count, height, width = shape
    row, column = np.indices((height, width))
    dy = row - height / 2
    dx = column - width / 2
    disc = dx**2 + dy**2 < (height / 4) ** 2
    disc = disc[..., None]
    frames = []
    for index in range(count):
        blue = np.full_like(row, 9 * index)
        gradient = np.stack([column * 80 // width, row * 80 // height, blue], axis=-1)
        frames.append(np.where(disc, 255, gradient).astype(np.uint8))
    if file.suffix == ".mp4":
        video = media.to_video(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2))
        media.write_video(file, video, fps)
    else:
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(file, save_all=True, append_images=images[1:], duration=40)
    return file


def test_a_clip_is_not_distorted(checkpoint, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4")
    args = planned(
        checkpoint, tmp_path, "--prompt", "a red fish", "--base-video", clip, "--frames", 9
    )
    height, width = args.target
    assert abs(width / height - 320 / 180) < 0.02
    assert abs(width * height / (4 * 192 * 128) - 1) < 0.02
    assert args.fps == 60
    assert list(args.notes) == ["of the clip's 12 frames, the last 3 are left out"]
    assert (
        planned(
            checkpoint,
            tmp_path,
            "--prompt",
            "a red fish",
            "--base-video",
            clip,
            "--frames",
            9,
            "--fps",
            8,
        ).fps
        == 8
    )
    args = planned(
        checkpoint,
        tmp_path,
        "--prompt",
        "a red fish",
        "--base-video",
        clip,
        "--frames",
        9,
        "--size",
        "384x256",
    )
    assert args.target == (256, 384)
    assert args.notes[-1] == "the base clip, 320x180, is cropped in the middle to 270x180"
    run_here(
        "--model",
        checkpoint,
        "--prompt",
        "a red fish",
        "--base-video",
        clip,
        "--frames",
        5,
        "--size",
        "384x256",
        "--steps",
        2,
        "--device",
        "cpu",
        "--output",
        tmp_path / "run",
        "--no-cache",
    )
    assert media.count_frames(tmp_path / "run" / "freeswim.mp4") == 5
    upscaled = imageio.imread(tmp_path / "run" / "comparison.png")[:256, :384]
    assert Image.fromarray(upscaled).size == (384, 256)
    disc = upscaled.min(axis=-1) > 160
    rows = disc[40:].any(1).sum()
    columns = disc[40:].any(0).sum()  # below the label
    assert abs(rows / columns - 1) < 0.05
    assert record(tmp_path / "run")["settings"]["cache_interval"] is None


@pytest.mark.parametrize(
    "shape, arguments, named",
    [
        ((5, 16, 16), [], ["16x16", "far below", "192x128"]),
        ((5, 400, 600), ["--size", "384x256"], ["600x400", "larger", "--size"]),
        ((6, 128, 192), [], ["has 6 frames", "--frames 5"]),
    ],
)
def test_clips_that_do_not_fit_are_refused(checkpoint, tmp_path, capsys, shape, arguments, named):
    clip = write_clip(tmp_path / "clip.mp4", shape)
    with refused(capsys, *named):
        run_here(
            "--model",
            checkpoint,
            "--output",
            tmp_path / "run",
            "--prompt",
            "a red fish",
            "--base-video",
            clip,
            "--frames",
            9 if shape[0] == 6 else 5,
            *arguments,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a b é.mp4", "no suffix"])
def test_all_kinds_of_clips_are_read(tmp_path, name):
    written = write_clip(tmp_path / (name if "." in name else "a.mp4"))
    read = media.read_clip(written.rename(tmp_path / name), 9)
    clip = read.frames
    fps = read.fps
    assert clip.shape == (9, 3, 180, 320)
    assert clip.dtype == torch.uint8
    assert fps == (60 if written.suffix == ".mp4" else 25)
    reference = media.read_clip(write_clip(tmp_path / "reference.png"), 9).frames
    assert (clip.float() - reference.float()).abs().mean() < 12


def test_alpha_grey_and_odd_pictures_are_read(tmp_path):
    pixels = np.full((33, 51, 4), 200, np.uint8)
    pixels[:, :25, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "alpha.png")
    read = media.read_clip(tmp_path / "alpha.png", 1)
    clip = read.frames
    fps = read.fps
    assert clip.shape == (1, 3, 32, 50)
    assert fps is None  # H.264 wants even sides
    assert clip[..., :25].max() == 0
    assert (clip[..., 25:].float() - 157).abs().max() <= 1
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    assert media.read_clip(tmp_path / "grey.png", 1).frames.eq(200).all()


def test_a_picture_is_refined_to_a_picture(checkpoint, tmp_path):
    picture = write_clip(tmp_path / "picture.png", (1, 128, 192))
    run_here(
        "--model",
        checkpoint,
        "--output",
        tmp_path / "run",
        "--prompt",
        "a red fish",
        "--base-video",
        picture,
        "--frames",
        1,
        "--steps",
        2,
        "--device",
        "cpu",
    )
    assert imageio.imread(tmp_path / "run" / "freeswim.png").shape == (256, 384, 3)


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text("hi\n" * 99, encoding="utf-8"),
        lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)),
    ],
)
def test_what_is_no_clip_is_refused(tmp_path, make):
    make(tmp_path / "clip.mp4")
    with pytest.raises(ValueError, match="clip.mp4: (is|cannot)"):
        media.read_clip(tmp_path / "clip.mp4", 5)
