"""What the parity tests share: random weights that hide nothing, large checkpoints, and the memory
that a script needs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from oracle import seeded
from safetensors.torch import load_file, save_file

from model import TextEncoder, WanTransformer, WanVAE, checkpoint_name
from tiny import world

TESTS = Path(__file__).parent


@torch.no_grad()
def randomise(model, seed=0):
    """Every parameter of `model` at random: gains around one, biases and tables around zero,
    matrices so that signals keep their size. Freshly built references have many zeros and ones,
    behind which an error could hide."""
    draw = seeded(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if "scale_shift_table" in name or name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif "gamma" in name or parameter.ndim == 1:
            parameter.copy_(1 + 0.3 * noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def empty_transformer(**changes):
    """A transformer of the 1.3B's dimensions, or with `changes` of its config, without memory."""
    file = TESTS / "wan2.1-t2v-1.3b" / "transformer" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    with torch.device("meta"):
        return WanTransformer(config | changes)


def empty_vae():
    """A VAE of the published dimensions, without memory."""
    file = TESTS / "wan2.1-t2v-1.3b" / "vae" / "config.json"
    with torch.device("meta"):
        return WanVAE(json.loads(file.read_text(encoding="utf-8")))


def plan_for(transformer, vae, grid, **options):
    """As much of a plan as expected memory depends on: these models, a clip of `grid` tokens, and
    `options`."""
    frames, height, width = grid
    defaults = {"cache_device": None, "offload": None, "cache_interval": 5}
    defaults |= {"dtype": "bfloat16", "vae_dtype": "float16", "shard_weights": False}
    return SimpleNamespace(
        options=SimpleNamespace(**(defaults | options)),
        parts=SimpleNamespace(transformer=transformer, vae=vae, token_size=16),
        computed=(16 * height, 16 * width),
        latent_frames=frames,
    )


def peak_memory(script, *arguments):
    """How many bytes the peak of a process rises above what the imports take while it runs
    `script`.

    What counts is what the kernel calls the resident set: everything the process allocated, and
    those pages of mapped checkpoint files that it has read and still maps. `script` runs in a
    process of its own, one thread, with `model` imported, and finds `arguments` in sys.argv[1:].
    """
    prelude = """
import sys
import torch
import model
torch.set_num_threads(1)
torch.nn.functional.conv3d(torch.rand(1, 4, 3, 8, 8), torch.rand(4, 4, 3, 3, 3)) @ torch.rand(6, 6)
torch.randn(1, device="meta") / 2  # the first one makes torch import 70 MB of itself

def status(field):
    for line in open("/proc/self/status", encoding="utf-8"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

before = status("VmRSS")
"""
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            prelude + script + "\nprint(status('VmHWM') - before)",
            *map(str, arguments),
        ],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        encoding="utf-8",
        env={
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },  # freed memory goes back at once: no fragments count
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout.split()[-1])


def write_checkpoint(folder, config, shapes, shards):
    """A checkpoint for measuring: tensors of the given names and shapes, spread over `shards` files
    of about the same size, with an index. Never more than one file in memory. Returns the bytes of
    its tensors, float32."""
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    total = 4 * sum(math.prod(shape) for shape in shapes.values())
    sizes = []
    files = [{} for _ in range(shards)]
    for name, shape in shapes.items():
        files[min(shards - 1, sum(sizes) * shards // total)][name] = shape
        sizes.append(4 * math.prod(shape))
    index = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({name: torch.full(shape, 0.01) for name, shape in names.items()}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index}), encoding="utf-8"
    )
    return total


def write_random_model(folder, heads, head_dim):
    """A whole model, Diffusers layout, of random weights: a transformer of one layer, the
    reference's VAE, a small text encoder, and the bundled model's words."""
    (folder / "tokenizer").mkdir()
    words = world.build_tokenizer(folder / "tokenizer" / "tokenizer.json")
    reference = TESTS / "reference" / "wide"
    published = TESTS / "wan2.1-t2v-1.3b"
    transformer = json.loads(
        (reference / "transformer" / "config.json").read_text(encoding="utf-8")
    )
    transformer |= {"num_attention_heads": heads, "attention_head_dim": head_dim, "num_layers": 1}
    vae = json.loads((reference / "vae" / "config.json").read_text(encoding="utf-8"))
    text = json.loads((published / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    text |= {
        "vocab_size": words,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
    }
    torch.manual_seed(0)
    for part, cls, config in (
        ("transformer", WanTransformer, transformer),
        ("vae", WanVAE, vae),
        ("text_encoder", TextEncoder, text),
    ):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config), encoding="utf-8")
        state = cls(config).state_dict()
        weights = {checkpoint_name(cls, name): value for name, value in state.items()}
        save_file(weights, folder / part / "model.safetensors")


def split_weights(folder):
    """Split the one file of a part into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {}
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for file, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map}), encoding="utf-8"
    )
