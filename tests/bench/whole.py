"""The whole command on a GPU, with random weights of the real dimensions:

    python tests/bench/whole.py 1.3b 1920x1080 -- --steps 4 --guidance 1

MODEL is 1.3b, 5b (Wan2.2-TI2V-5B), 14b or 2.2 (two experts of the 14B, which share one file by a
hard link). Files have the published sizes in float32; `--small` makes a text encoder of one layer,
and bfloat16. What comes after -- goes to sample.py. Prints a table of the stages, with seconds and
peak memory, and what is left of the seconds from the shell.

`--runs` says how often, and how: "cold" with files that the system has not in memory and a prompt
that was not embedded before, "warm" with files in memory, "again" with the prompt of the run
before. `--free GIB` leaves only so much of the GPU's memory to the command, as on a smaller card;
with several such numbers it runs once for each, and prints the least with which it completed.
`--layers N` makes fewer blocks, `--processes N` runs it on N GPUs, and `--command FILE` runs the
sample.py of another checkout.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]
import model
from tiny import world

PUBLISHED = TESTS / "wan2.1-t2v-1.3b"
PUBLISHED_5B = TESTS / "wan2.2-ti2v-5b"
DIMENSIONS = {
    "1.3b": {},
    "5b": {},
    "14b": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}
SMALL_TEXT = {"num_layers": 1, "d_ff": 1024, "num_heads": 8}
SHARD = 5 * 2**30  # bytes


def write_part(cls, config, folder, dtype):
    """Random weights of a part, made on the GPU, in files of up to SHARD bytes with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model_without_weights = model.build(cls, folder)
    torch.manual_seed(0)
    weight_map = {}
    state = {}
    size = 0
    for name, like in model_without_weights.state_dict().items():
        tensor = 0.02 * torch.randn(like.shape, device="cuda")
        if like.ndim == 1 or "gamma" in name:
            tensor = tensor + 1
        state[model.checkpoint_name(cls, name)] = tensor.to(dtype).cpu()
        size += like.numel() * dtype.itemsize
        if size > SHARD:
            write_shard(state, folder, weight_map)
            size = 0
    write_shard(state, folder, weight_map)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def write_shard(state, folder, weight_map):
    if state:
        file = f"model-{len(list(folder.iterdir()))}.safetensors"
        save_file(state, folder / file)
        weight_map.update(dict.fromkeys(state, file))
        state.clear()


def write_model(name, layers, small, folder):
    dtype = torch.bfloat16 if small else torch.float32
    configs = {}
    for part in ("transformer", "vae", "text_encoder"):
        published = PUBLISHED
        if name == "5b" and part != "text_encoder":
            published = PUBLISHED_5B
        text = (published / part / "config.json").read_text(encoding="utf-8")
        configs[part] = json.loads(text)
    configs["transformer"] |= DIMENSIONS.get(name, DIMENSIONS["14b"])
    if layers is not None:
        configs["transformer"]["num_layers"] = layers
    (folder / "tokenizer").mkdir(parents=True)
    words = world.build_tokenizer(folder / "tokenizer" / "tokenizer.json")
    if small:
        configs["text_encoder"] |= SMALL_TEXT | {"vocab_size": words}
    write_part(model.WanTransformer, configs["transformer"], folder / "transformer", dtype)
    write_part(model.WanVAE, configs["vae"], folder / "vae", dtype)
    write_part(model.TextEncoder, configs["text_encoder"], folder / "text_encoder", dtype)
    index = {"_class_name": "WanPipeline"}
    if name == "2.2":
        (folder / "transformer_2").mkdir()
        for file in (folder / "transformer").iterdir():
            os.link(file, folder / "transformer_2" / file.name)
        index["boundary_ratio"] = 0.875
        index["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
    if name == "5b":
        index["expand_timesteps"] = True
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def forget_files(folder):
    """Drop a model's files from the system's memory."""
    for file in folder.rglob("*.safetensors"):
        with open(file, "rb") as content:
            os.fsync(content.fileno())
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def hold_all_but(gibibytes):
    """A tensor that leaves only so much of the GPU's memory free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return torch.empty(free - int(gibibytes * 2**30), dtype=torch.uint8, device="cuda")


def run_sample(processes, command_file, folder, size, options, output, cache):
    """Run the command, and print its lines but for progress bars. Returns its exit status, its
    seconds and what it recorded of its stages; the peaks are those of the first process. Text
    embeddings are kept in the folder `cache`."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(command_file), "--model", str(folder), "--size", size]
    command += ["--output", str(output), *options]
    command += ["--prompt", "a large red striped fish swims right above a sandy floor"]
    start = time.time()
    # In text, the carriage returns of progress bars end lines too.
    environment = os.environ | {"HF_HOME": str(cache)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, encoding="utf-8", env=environment
    ) as process:
        for line in process.stderr:
            is_unfinished_bar = "%|" in line and "100%|" not in line
            if line.strip() and not is_unfinished_bar:
                print(line.rstrip(), flush=True)
    seconds = time.time() - start
    stages = {}
    record = output / "run.json"
    if record.is_file():
        stages = json.loads(record.read_text(encoding="utf-8"))["stages"]
    return process.returncode, seconds, stages


def print_stages(stages, seconds):
    print("| stage | seconds | peak, GiB |\n|---|---|---|")
    inside = sum(stage["seconds"] for stage in stages.values())
    print(f"| outside the stages | {seconds - inside:.1f} | |")
    for name, stage in stages.items():
        print(f"| {name} | {stage['seconds']:.1f} | {stage['peak_memory_gib']:.1f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=("1.3b", "5b", "14b", "2.2"))
    parser.add_argument("size", help="WIDTHxHEIGHT")
    parser.add_argument("--free", type=float, nargs="+", metavar="GIB", default=[None])
    parser.add_argument("--processes", type=int, metavar="N", default=1, help="GPUs")
    parser.add_argument("--runs", nargs="+", choices=("cold", "warm", "again"), default=["warm"])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--command", type=Path, default=ROOT / "sample.py")
    parser.add_argument("--layers", type=int, metavar="N")
    parser.add_argument("--folder", type=Path, help="of the model; made if it is not there")
    typed = sys.argv[1:]
    options = []  # of sample.py
    if "--" in typed:
        options = typed[typed.index("--") + 1 :]
        typed = typed[: typed.index("--")]
    arguments = parser.parse_args(typed)

    print(*sys.argv[1:], flush=True)
    today = time.strftime("%Y-%m-%d")
    print(torch.cuda.get_device_name(), "PyTorch", torch.__version__, today, flush=True)
    rows = []
    completed = []  # GiB free
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "model"
        if not folder.exists():
            start = time.time()
            write_model(arguments.model, arguments.layers, arguments.small, folder)
            print(f"wrote the model in {time.time() - start:.0f} s", flush=True)
        cache = Path(temporary) / "cache"
        for number, (free, kind) in enumerate(product(arguments.free, arguments.runs)):
            held = None if free is None else hold_all_but(free)
            if kind == "cold":
                forget_files(folder)
            if kind != "again":
                cache = Path(temporary) / f"cache{number}"
            output = Path(temporary) / f"run{number}"
            command = (arguments.processes, arguments.command, folder, arguments.size, options)
            status, seconds, stages = run_sample(*command, output, cache)
            del held
            print(f"{kind}: exit status {status}, {seconds:.1f} s")
            print_stages(stages, seconds)
            peak = max((stage["peak_memory_gib"] for stage in stages.values()), default=0)
            rows.append(f"| {free} | {status} | {seconds:.0f} | {peak:.1f} |")
            if status == 0:
                completed.append(free)
    if arguments.free != [None]:
        print("\n| GiB free | exit status | seconds | peak, GiB |\n|---|---|---|---|")
        print(*rows, sep="\n")
        print(f"the least with which it completed: {min(completed, default='none')} GiB free")
    return 0 if len(completed) == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
