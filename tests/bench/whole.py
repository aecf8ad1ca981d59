"""The whole command on a GPU, with random weights of the real dimensions:

    python tests/bench/whole.py 1.3b 1920x1080 -- --steps 4 --guidance 1

MODEL is 1.3b, 14b or 2.2 (two experts of the 14B, which share one file by a hard link). What comes
after -- goes to sample.py. The text encoder has one layer and the bundled model's words. Prints a
table of the stages, with seconds and peak memory. `--free GIB` leaves only so much of the GPU's
memory to the command, as on a smaller card; with several such numbers it runs once for each, and
prints the least with which it completed. `--layers N` makes fewer blocks, and `--processes N`
runs it on N GPUs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]
import model
from tiny import world

PUBLISHED = TESTS / "wan2.1-t2v-1.3b"
DIMENSIONS = {
    "1.3b": {},
    "14b": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}
TEXT = {"num_layers": 1, "d_ff": 1024, "num_heads": 8}


def write_part(cls, config, folder):
    """Random weights of a part in bfloat16, made on the GPU."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
    torch.manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        tensor = 0.02 * torch.randn(shape, device="cuda")
        if len(shape) == 1 or "gamma" in name:
            tensor = tensor + 1
        state[model.checkpoint_name(cls, name)] = tensor.bfloat16().cpu()
    save_file(state, folder / "model.safetensors")


def write_model(name, layers, folder):
    configs = {}
    for part in ("transformer", "vae", "text_encoder"):
        text = (PUBLISHED / part / "config.json").read_text(encoding="utf-8")
        configs[part] = json.loads(text)
    configs["transformer"] |= DIMENSIONS["1.3b" if name == "1.3b" else "14b"]
    if layers is not None:
        configs["transformer"]["num_layers"] = layers
    (folder / "tokenizer").mkdir(parents=True)
    words = world.build_tokenizer(folder / "tokenizer" / "tokenizer.json")
    configs["text_encoder"] |= TEXT | {"vocab_size": words}
    write_part(model.WanTransformer, configs["transformer"], folder / "transformer")
    write_part(model.WanVAE, configs["vae"], folder / "vae")
    write_part(model.TextEncoder, configs["text_encoder"], folder / "text_encoder")
    if name == "2.2":
        (folder / "transformer_2").mkdir()
        for file in (folder / "transformer").iterdir():
            os.link(file, folder / "transformer_2" / file.name)
        index = {
            "_class_name": "WanPipeline",
            "boundary_ratio": 0.875,
            "transformer_2": ["diffusers", "WanTransformer3DModel"],
        }
        (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def hold_all_but(gibibytes):
    """A tensor that leaves only so much of the GPU's memory free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return torch.empty(free - int(gibibytes * 2**30), dtype=torch.uint8, device="cuda")


def run_sample(processes, folder, size, options, output):
    """Run the command, and print its lines but for progress bars. Returns its exit status, its
    seconds and what it recorded of its stages; the peaks are those of the first process."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(ROOT / "sample.py"), "--model", str(folder), "--size", size]
    command += ["--output", str(output), *options]
    command += ["--prompt", "a large red striped fish swims right above a sandy floor"]
    start = time.time()
    # In text, the carriage returns of progress bars end lines too.
    with subprocess.Popen(command, stderr=subprocess.PIPE, encoding="utf-8") as process:
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


def print_stages(stages):
    print("| stage | seconds | peak, GiB |\n|---|---|---|")
    for name, stage in stages.items():
        print(f"| {name} | {stage['seconds']:.1f} | {stage['peak_memory_gib']:.1f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=("1.3b", "14b", "2.2"))
    parser.add_argument("size", help="WIDTHxHEIGHT")
    parser.add_argument("--free", type=float, nargs="+", metavar="GIB", default=[None])
    parser.add_argument("--processes", type=int, metavar="N", default=1, help="GPUs")
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
            write_model(arguments.model, arguments.layers, folder)
        for number, free in enumerate(arguments.free):
            held = None if free is None else hold_all_but(free)
            output = Path(temporary) / f"run{number}"
            status, seconds, stages = run_sample(
                arguments.processes, folder, arguments.size, options, output
            )
            del held
            print(f"exit status {status}, {seconds:.1f} s")
            print_stages(stages)
            peak = max((stage["peak_memory_gib"] for stage in stages.values()), default=0)
            rows.append(f"| {free} | {status} | {seconds:.0f} | {peak:.1f} |")
            if status == 0:
                completed.append(free)
    if arguments.free != [None]:
        print("\n| GiB free | exit status | seconds | peak, GiB |\n|---|---|---|---|")
        print(*rows, sep="\n")
        print(f"the least with which it completed: {min(completed, default='none')} GiB free")
    return 0 if len(completed) == len(arguments.free) else 1


if __name__ == "__main__":
    sys.exit(main())
