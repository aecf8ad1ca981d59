"""Model folders as people have them: other names, variants, leftovers of archives, half of it."""

import json
import os
import shutil

import pytest
import torch
from command import SMALL, latents, refused, run_here
from parity import split_weights
from safetensors.torch import load_file, save_file

from support import hub

T = "transformer"
E = "text_encoder"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "model")


@pytest.fixture(scope="module")
def expected(checkpoint, tmp_path_factory):
    """The latents of the checkpoint as it is, and in half precision."""
    found = {}
    for name in ("plain", "half"):
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(checkpoint, folder / "model")
        if name == "half":
            halve(folder / "model" / T / WEIGHTS, folder / "model" / T / WEIGHTS)
        found[name] = result_of(folder / "model", folder / "run")
    assert found["plain"] != found["half"]
    return found


def halve(file, target):
    tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(tensors, target)


def result_of(folder, output):
    run_here("--model", folder, "--output", output, *SMALL)
    return latents(output)


# --------------------------------------------------------------------------------------------------
# Read as they are


def add_hidden_files(folder):
    for part in (T, E, "vae"):
        (folder / part / "._model.safetensors").write_bytes(b"\0\5\26\7 of macOS")
        (folder / part / ".hidden.safetensors").write_bytes(b"")
        (folder / part / "._config.json").write_bytes(b"\0\5\26\7 of macOS")


def add_variant(folder):
    halve(folder / T / WEIGHTS, folder / T / "model.fp16.safetensors")


def keep_only_variant(folder):
    add_variant(folder)
    (folder / T / WEIGHTS).unlink()


def keep_only_sharded_variant(folder):
    halve(folder / T / WEIGHTS, folder / T / WEIGHTS)
    split_weights(folder / T)
    index = folder / T / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    for old in ("a", "b"):
        new = f"model.fp16-0000{'ab'.index(old) + 1}-of-00002.safetensors"
        (folder / T / f"{old}.safetensors").rename(folder / T / new)
        for name, file in content["weight_map"].items():
            if file == f"{old}.safetensors":
                content["weight_map"][name] = new
    index.unlink()
    index = folder / T / "model.safetensors.index.fp16.json"
    index.write_text(json.dumps(content), encoding="utf-8")


def add_sharded_variant(folder):
    plain = (folder / T / WEIGHTS).read_bytes()
    keep_only_sharded_variant(folder)
    (folder / T / WEIGHTS).write_bytes(plain)


def rename_table(folder):
    tensors = load_file(folder / E / WEIGHTS)
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    save_file(tensors, folder / E / WEIGHTS)


def repeat_table(folder):
    tensors = load_file(folder / E / WEIGHTS)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, folder / E / WEIGHTS)


def name_video_to_video(folder):
    index = {"_class_name": "WanVideoToVideoPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize(
    "change, precision",
    [
        (add_hidden_files, "plain"),
        (add_variant, "plain"),
        (add_sharded_variant, "plain"),
        (keep_only_variant, "half"),
        (keep_only_sharded_variant, "half"),
        (rename_table, "plain"),
        (repeat_table, "plain"),
        (name_video_to_video, "plain"),
    ],
)
def test_what_is_read_as_it_is(folder, expected, tmp_path, change, precision):
    change(folder)
    assert result_of(folder, tmp_path / "run") == expected[precision]


# --------------------------------------------------------------------------------------------------
# Refused, and called what they are


def write_lfs_pointer(file):
    file.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", encoding="utf-8"
    )


def to_float8(folder):
    tensors = load_file(folder / T / WEIGHTS)
    name = "proj_out.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / T / WEIGHTS)


def to_int8(folder):
    tensors = load_file(folder / T / WEIGHTS)
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.int8)
    save_file(tensors, folder / T / WEIGHTS)


def add_quantization(folder):
    file = folder / E / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] = {"load_in_8bit": True}
    file.write_text(json.dumps(config), encoding="utf-8")


def to_pickle(folder):
    (folder / E / WEIGHTS).rename(folder / E / "pytorch_model.bin")


def to_gguf(folder):
    (folder / T / WEIGHTS).rename(folder / T / "wan-q4.gguf")


def make_pipe(folder):
    (folder / "vae" / "config.json").unlink()
    os.mkfifo(folder / "vae" / "config.json")


def make_huge(folder):
    os.truncate(folder / "vae" / "config.json", 6 * 2**30)  # sparse: it takes no disk


@pytest.mark.parametrize(
    "change, named",
    [
        (to_float8, ["proj_out.weight", "F8_E4M3", "float8"]),
        (to_int8, ["proj_out.weight", "I8", "quantized"]),
        (add_quantization, ["text_encoder/config.json", "quantized"]),
        (lambda f: write_lfs_pointer(f / T / WEIGHTS), [WEIGHTS, "Git LFS", "git lfs pull"]),
        (
            lambda f: write_lfs_pointer(f / "tokenizer" / "tokenizer.json"),
            ["tokenizer.json", "git lfs pull"],
        ),
        (to_pickle, ["pytorch_model.bin", "pickle"]),
        (to_gguf, ["GGUF"]),
        (make_pipe, ["vae/config.json", "not an ordinary file"]),
        (make_huge, ["vae/config.json", "too large"]),
    ],
)
def test_what_is_called_what_it_is(folder, tmp_path, change, named):
    change(folder)
    with pytest.raises(ValueError) as caught:
        run_here("--model", folder, "--output", tmp_path / "run", *SMALL)
    message = str(caught.value)
    assert "\n" not in message and all(words in message for words in named), message
    assert not (tmp_path / "run").exists()


def test_what_to_give_instead(folder, tmp_path):
    cache = tmp_path / "hub" / "models--Wan-AI--Wan"
    snapshot = cache / "snapshots" / "0123"
    shutil.copytree(folder, snapshot)
    (snapshot / "model_index.json").write_text("{}", encoding="utf-8")
    (folder / "model_index.json").write_text("{}", encoding="utf-8")
    single = tmp_path / "wan.safetensors"
    shutil.copy(folder / T / WEIGHTS, single)
    gguf = tmp_path / "wan.gguf"
    gguf.write_bytes(b"GGUF")
    wan = tmp_path / "Wan2.1-T2V-1.3B"
    wan.mkdir()
    (wan / "Wan2.1_VAE.pth").write_bytes(b"")
    (wan / "config.json").write_text("{}", encoding="utf-8")
    cases = [
        (cache, ["is a cache of the hub", snapshot]),
        (tmp_path / "hub", [snapshot]),
        (folder.parent, ["no transformer/config.json", folder]),
        (folder / T, ["is one part of a model", folder]),
        (single, ["is one file", "a folder in Diffusers layout"]),
        (gguf, ["is one file", "GGUF"]),
        (tmp_path / "nowhere.gguf", ["no such file", "GGUF"]),
        (wan, ["layout of Wan's own code", "-Diffusers"]),
    ]
    for given, named in cases:
        with refused("--model", *named):
            hub.find_model(str(given))


@pytest.mark.parametrize("name", ["Wan-AI/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.2-T2V-A14B"])
def test_wans_own_repositories_are_named_before_the_network(name, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with refused(f"use {name}-Diffusers"):
        hub.find_model(name)


@pytest.mark.parametrize(
    "name, repository, revision",
    [
        ("some/one@v1.0", "some/one", "v1.0"),
        ("some/one", "some/one", None),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers@main", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "main"),
    ],
)
def test_a_revision_can_be_named(monkeypatch, tmp_path, name, repository, revision):
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    hub.find_model(name)
    assert asked == [(repository, revision)]


def test_a_lora_of_the_hub_is_fetched_last(folder, tmp_path, monkeypatch):
    from support import lora

    monkeypatch.setattr(lora, "hf_hub_download", lambda *_: pytest.fail("fetched"))
    arguments = ["--model", folder, "--output", tmp_path / "run", "--lora", "a/b/c.safetensors"]
    with refused("--size 100x100"):
        run_here(*arguments, "--size", "100x100")
    with refused("--strength"):
        run_here(*arguments, "--steps", 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "base.mp4").touch()
    with refused("base.mp4"):
        run_here(*arguments)
