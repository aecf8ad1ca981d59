"""Loading: every layout a checkpoint comes in, nothing missing or left over, names as published, no
second copy."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from huggingface_hub.utils import filter_repo_objects
from parity import peak_memory, randomise, write_checkpoint
from references import REFERENCE
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from model import TextEncoder, WanTransformer, WanVAE, build, checkpoint_name, read_weights
from support import hub, read_ahead

PUBLISHED = Path(__file__).parent / "wan2.1-t2v-1.3b"

SMALL_TRANSFORMER = dict(
    num_attention_heads=2, attention_head_dim=16, num_layers=2, ffn_dim=64, text_dim=24, freq_dim=32
)
SMALL_ENCODER = dict(
    d_model=32,
    d_kv=8,
    num_heads=4,
    d_ff=64,
    num_layers=2,
    vocab_size=100,
    feed_forward_proj="gated-gelu",
)

# name: (our class, how to build the reference, shard size, a tensor to break)
CHECKPOINTS = {
    "transformer": (
        WanTransformer,
        lambda: WanTransformer3DModel(**SMALL_TRANSFORMER),
        "5GB",
        "blocks.1.attn2.norm_k.weight",
    ),
    "transformer in shards": (
        WanTransformer,
        lambda: WanTransformer3DModel(**SMALL_TRANSFORMER),
        "20KB",
        "blocks.1.attn2.norm_k.weight",
    ),
    "vae": (
        WanVAE,
        lambda: AutoencoderKLWan(base_dim=4, num_res_blocks=1),
        "5GB",
        "decoder.up_blocks.0.upsamplers.0.time_conv.bias",
    ),
    "text encoder in shards": (
        TextEncoder,
        lambda: UMT5EncoderModel(UMT5Config(**SMALL_ENCODER)),
        "20KB",
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
}


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request, tmp_path):
    """Our class, the reference model, its folder, and a tensor with the file it is in."""
    ours, build, shard_size, tensor = CHECKPOINTS[request.param]
    theirs = randomise(build())
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    files = [file for file in tmp_path.glob("*.safetensors") if tensor in load_file(file)]
    assert len(files) == 1
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == ("shards" in request.param)
    return ours, theirs, tmp_path, tensor, files[0]


def test_every_layout_is_read(checkpoint):
    ours, theirs, folder, _, _ = checkpoint
    model = ours.from_pretrained(folder)
    if ours is TextEncoder:  # its weights stay on disk until they are needed
        for name in ("shared", "layers.0", "layers.1", "final_norm"):
            read_weights(model, model.sources, "cpu", None, name + ".")
    expected = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[checkpoint_name(ours, name)]), name


def break_file(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def assert_refused(ours, folder, *words):
    with pytest.raises(ValueError) as error:
        ours.from_pretrained(folder)
    for word in words:
        assert str(word) in str(error.value)


def test_a_missing_tensor_is_named(checkpoint):
    ours, _, folder, tensor, file = checkpoint
    break_file(file, lambda tensors: tensors.pop(tensor))
    assert_refused(ours, folder, tensor, file.name, "missing")
    for index in folder.glob("*.index.json"):  # nor does the index know of it any more
        content = json.loads(index.read_text(encoding="utf-8"))
        del content["weight_map"][tensor]
        index.write_text(json.dumps(content), encoding="utf-8")
        assert_refused(ours, folder, tensor, index.name, "missing")


def test_an_extra_tensor_is_named(checkpoint):
    ours, _, folder, _, file = checkpoint
    break_file(file, lambda tensors: tensors.update({"blocks.7.stray": torch.zeros(3)}))
    assert_refused(ours, folder, "blocks.7.stray", file.name)


def test_a_misshapen_tensor_is_named(checkpoint):
    ours, _, folder, tensor, file = checkpoint
    shape = tuple(load_file(file)[tensor].shape)
    break_file(file, lambda tensors: tensors.update({tensor: torch.zeros(*shape, 1)}))
    assert_refused(ours, folder, tensor, file.name, (*shape, 1), shape)


def test_a_missing_file_is_named(checkpoint):
    ours, _, folder, _, file = checkpoint
    file.unlink()
    assert_refused(ours, folder, file.name if list(folder.glob("*.index.json")) else folder)


# --------------------------------------------------------------------------------------------------


def names_and_shapes(cls, config):
    with torch.device("meta"):
        built = cls(config)
    return {
        checkpoint_name(cls, name): list(tensor.shape)
        for name, tensor in built.state_dict().items()
    }


@pytest.mark.parametrize(
    "part, cls", [("transformer", WanTransformer), ("vae", WanVAE), ("text_encoder", TextEncoder)]
)
def test_names_and_shapes_are_those_published(part, cls):
    config = json.loads((PUBLISHED / part / "config.json").read_text(encoding="utf-8"))
    assert (
        names_and_shapes(cls, config)
        == json.loads((PUBLISHED / "shapes.json").read_text(encoding="utf-8"))[part]
    )


def test_names_and_shapes_of_the_14b():
    config = dict(num_attention_heads=40, attention_head_dim=128, num_layers=40, ffn_dim=13824)
    with torch.device("meta"):
        theirs = WanTransformer3DModel(**config)
    expected = {name: list(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert sum(parameter.numel() for parameter in theirs.parameters()) > 14e9
    assert names_and_shapes(WanTransformer, dict(theirs.config)) == expected


# --------------------------------------------------------------------------------------------------

LOAD = """
transformer = model.WanTransformer.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
for parameter in transformer.parameters():  # a mapped weight takes memory once it is read
    parameter.sum()
"""


@pytest.mark.parametrize("dtype, share", [("float32", 1.0), ("bfloat16", 0.5)])
def test_weights_are_never_held_twice(tmp_path, dtype, share):
    """300 MB of transformer in ten shards. Peak of the resident set: the weights once, and while a
    cast is under way the pages of the one shard that it reads, which are the kernel's to drop. 15%
    are allowed on the weights."""
    config = dict(WanTransformer3DModel(**SMALL_TRANSFORMER).config)
    config |= dict(num_attention_heads=8, attention_head_dim=64, num_layers=18, ffn_dim=2048)
    config["_class_name"] = "WanTransformer3DModel"
    shapes = names_and_shapes(WanTransformer, config)
    total = write_checkpoint(tmp_path, config, shapes, shards=10)
    shard = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    peak = peak_memory(LOAD, tmp_path, dtype)
    print(
        f"{dtype}: peak {peak / 1e6:.0f} MB for {share * total / 1e6:.0f} MB of weights, "
        f"shards of {shard / 1e6:.0f}"
    )
    assert (
        0.95 * share * total <= peak <= 1.15 * share * total + (shard if dtype == "bfloat16" else 0)
    )


# --------------------------------------------------------------------------------------------------

REVISIONS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": json.loads(
        (PUBLISHED / "files.json").read_text(encoding="utf-8")
    )["revision"],
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "38ec498cb3208fb688890f8cc7e94ede2cbd7f68",
    "someone/else": None,  # whatever is newest
}

NEEDED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"text_encoder/model-{number:05}-of-00005.safetensors" for number in range(1, 6)),
    "text_encoder/model.safetensors.index.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
    *(
        f"transformer/diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        for number in range(1, 3)
    ),
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "transformer/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/config.json",
]
NEEDLESS = [
    "README.md",
    ".gitattributes",
    "assets/logo.png",
    "examples/i2v.mp4",
    "transformer/pytorch_model.bin",
    "google/umt5-xxl/spiece.model",
    "Wan2.1_VAE.pth",
]


def test_mutated_checkpoints_load_whole_or_are_refused():
    """A slice of what fuzz.py does, in a process of its own, since a crash is one of the things it
    looks for."""
    command = [sys.executable, Path(__file__).parent / "fuzz.py", "300", "1"]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout[-200:] + result.stderr
    assert "300 mutations" in result.stdout


@pytest.mark.parametrize("name", REVISIONS)
def test_download_fetches_what_is_needed(monkeypatch, tmp_path, name):
    calls = []

    def snapshot_download(repository, **options):
        calls.append((repository, options))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert Path(hub.download(name, weights=True)) == tmp_path
    ((repository, options),) = calls
    assert repository == name
    assert options["revision"] == REVISIONS[name]
    listing = [
        *json.loads((PUBLISHED / "files.json").read_text(encoding="utf-8"))["files"],
        *NEEDLESS,
    ]
    patterns = dict(
        allow_patterns=options.get("allow_patterns"), ignore_patterns=options.get("ignore_patterns")
    )
    assert sorted(filter_repo_objects(listing, **patterns)) == sorted(NEEDED)


def test_a_folder_needs_no_download(monkeypatch, tmp_path):
    monkeypatch.setattr(
        hub, "snapshot_download", lambda *args, **options: pytest.fail("asked the hub")
    )
    assert Path(hub.download(str(tmp_path), weights=True)) == tmp_path


@pytest.mark.parametrize(
    "cls, folder",
    [
        (WanTransformer, REFERENCE / "odd" / "transformer"),
        (WanVAE, REFERENCE / "odd" / "vae"),
        (TextEncoder, REFERENCE / "umt5"),
    ],
)
def test_a_described_model_takes_no_memory(cls, folder):
    """Its parameters are on the meta device."""
    assert all(parameter.is_meta for parameter in build(cls, folder).parameters())


# --------------------------------------------------------------------------------------------------


def cached_model(cache):
    """A model's folder as the hub's library keeps it, with an older snapshot beside it."""
    snapshots = cache / "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers" / "snapshots"
    for age, name in ((100, "old"), (0, "new")):
        write_weights(snapshots / name)
        os.utime(snapshots / name, (10**9 - age, 10**9 - age))
    return snapshots / "new"


def write_weights(folder):
    """Weights of 5, 2 and 3 chunks, the last one of each half full, and another file."""
    for part, count in (("transformer", 5), ("text_encoder", 2), ("vae", 3)):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text("{}")
        size = count * read_ahead.CHUNK - read_ahead.CHUNK // 2
        with open(folder / part / "a.safetensors", "wb") as file:
            file.truncate(size)  # takes no place on the disk


def chunks_by_thread(typed, monkeypatch):
    """What each thread reads, [(file, start)]."""
    chunks = []
    monkeypatch.setattr(read_ahead, "read_chunks", chunks.append)
    for number in range(read_ahead.THREADS):
        read_ahead.read(typed, number)
    return chunks


@pytest.mark.parametrize("revision", ["", "@main"])
def test_weights_are_read_ahead_once(monkeypatch, tmp_path, revision):
    """By all threads together, the transformer's first: of a folder, a model of the hub, and a run
    that goes on."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = cached_model(tmp_path / "hub")
    name = f"Wan-AI/Wan2.1-T2V-1.3B-Diffusers{revision}"
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"settings": {"model": name}}))
    for typed in ({"model": str(folder)}, {"model": name}, {"resume": str(run)}):
        of_threads = chunks_by_thread(typed, monkeypatch)
        assert all(chunks == sorted(chunks, key=expected_order) for chunks in of_threads)
        together = sorted(chain(*of_threads), key=expected_order)
        expected = []
        for part, count in (("transformer", 5), ("text_encoder", 2), ("vae", 3)):
            for index in range(count):
                expected.append((folder / part / "a.safetensors", index * read_ahead.CHUNK))
        assert together == expected


def expected_order(chunk):
    file, start = chunk
    return read_ahead.PARTS.index(file.parent.name), start


def test_half_of_the_free_memory_is_filled(monkeypatch, tmp_path):
    write_weights(tmp_path)
    monkeypatch.setattr(read_ahead, "free_memory", lambda: 6 * read_ahead.CHUNK)
    of_threads = chunks_by_thread({"model": str(tmp_path)}, monkeypatch)
    assert len([*chain(*of_threads)]) == 3


def test_chunks_are_read_to_their_end(tmp_path):
    """As the system counts what this process has read."""
    write_weights(tmp_path)
    chunks = read_ahead.chunks_of(read_ahead.weights_of(tmp_path), most=2**40)
    before = bytes_read()
    read_ahead.read_chunks(chunks)
    assert bytes_read() - before >= (10 - 3 / 2) * read_ahead.CHUNK


def bytes_read():
    for line in Path("/proc/self/io").read_text(encoding="utf-8").splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])


@pytest.mark.parametrize("settings", ["no JSON", "[]", '{"settings": {}}', None])
def test_what_cannot_be_read_ahead_is_left(monkeypatch, tmp_path, settings):
    """To those who need it, and say what is wrong."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    if settings is not None:
        (tmp_path / "run.json").write_text(settings)
    for typed in ({}, {"resume": str(tmp_path)}, {"model": "no/such"}, {"model": str(tmp_path)}):
        assert [*chain(*chunks_by_thread(typed, monkeypatch))] == []
