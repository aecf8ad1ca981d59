"""The porting kit: the NumPy port agrees, the file of steps is ours, and port_check finds each trap
at its place."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import port_check
import port_numpy
import port_traps
import pytest
import torch
import write_steps
from oracle import relative
from references import REFERENCE, REFINEMENTS, interval_of, names
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
PORT = HERE / "port_numpy.py"


@pytest.fixture(scope="module")
def port():
    return port_numpy.steps()


def check(*arguments):
    return subprocess.run(
        [sys.executable, HERE / "port_check.py", *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
    )


def test_every_step_of_the_port(port):
    lines = port_check.compare(port)
    assert not [line for wrong, _, line in lines if wrong]
    assert len(lines) == len(port) and {name.split(".")[0] for name in port} == {
        "dit",
        "unipc",
        "refine",
    }
    assert {
        name for name in load_file(HERE / "steps.safetensors") if name.startswith("dit")
    } <= port.keys()


@pytest.mark.parametrize("case, tensor", REFINEMENTS)
def test_whole_refinements_of_the_port(case, tensor):
    weights, config, meta, given = port_numpy.load(case)
    *_, latents = port_numpy.refine(
        weights,
        config,
        meta,
        given["init_latents"],
        given["text"],
        given["negative"],
        interval_of(tensor),
    )
    assert port_check.off(latents, given[tensor]) <= 1e-3


def test_the_port_is_short_and_stands_alone():
    lines = PORT.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 350
    script = (
        f"import sys; sys.path.insert(0, {str(PORT.parent)!r}); import port_numpy; "
        f"print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True
    ).stdout.split()
    assert "numpy" in loaded and not {"torch", "model", "freeswim", "scipy"} & set(loaded)


def test_the_file_of_steps_is_what_the_script_writes():
    expected, written = load_file(HERE / "steps.safetensors"), write_steps.steps()
    assert expected.keys() == written.keys()
    assert (HERE / "steps.safetensors").stat().st_size <= 2 * 2**20
    for name, value in expected.items():
        assert relative(written[name], torch.from_numpy(value)) <= 1e-5 or not value.any(), name


@pytest.mark.parametrize("trap", port_traps.TRAPS)
def test_traps_are_found_at_their_place(trap):
    """The first fault is where the trap is, and all that comes before it is right."""
    where, *changes = port_traps.TRAPS[trap]
    steps = port_traps.altered(PORT, *changes).steps()
    lines = port_check.compare(steps)
    assert lines[0][1] == where
    assert re.match(r"WRONG .*; see \w+\.py: \w+", lines[0][2])
    before = list(port_check.reference())
    before = [name for name in before[: before.index(where)] if name in steps]
    assert all(f"right {name}:" in " ".join(line for *_, line in lines) for name in before)


def test_the_other_traps_matter():
    assert port_traps.without_zeros(port_numpy) > 1e-2
    errors = {
        name: port_check.off(wrong.numpy(), right.numpy())
        for name, wrong, right in port_traps.vae_traps()
    }
    harmless = errors.pop("upsampling with antialiasing")  # when enlarging; the others are not
    assert harmless <= 1e-6 and min(errors.values()) > 1e-2


def test_the_command(port, tmp_path):
    save_file(
        {name: port[name][None] for name in ("dit.patches", "dit.text")},
        tmp_path / "right.safetensors",
    )
    process = check(tmp_path / "right.safetensors")
    assert (process.returncode, process.stdout.count("right ")) == (0, 2)
    wrong = {
        "dit.text": port["dit.text"],
        "unipc.levels": port["unipc.levels"][1:],
        "dit.query": port["dit.text"],
        "dit.velocity": -port["dit.velocity"],
        "refine.step0": np.full_like(port["refine.step0"], np.nan),
    }
    save_file(wrong, tmp_path / "wrong.safetensors")
    process = check(tmp_path / "wrong.safetensors")
    lines = process.stdout.splitlines()
    assert process.returncode == 1
    assert [line.split()[:2] for line in lines] == [
        ["UNKNOWN", "dit.query:"],
        ["WRONG", "unipc.levels:"],
        ["WRONG", "dit.velocity:"],
        ["WRONG", "refine.step0:"],
        ["right", "dit.text:"],
    ]
    assert "(5,)" in lines[1] and "unembed" in lines[2] and "refine" in lines[3]


def test_the_authors_outputs_can_be_compared_too():
    given = load_file(REFERENCE / "odd" / "expected.safetensors")
    outputs = {
        name: given[name]
        for name in (
            "mask",
            "dual_full",
            "guide_window",
            "reuse_window",
            "window_only_negative",
            "dual_window_negative",
            "encoded",
            "init_latents",
            "decoded",
        )
    }
    assert [wrong for wrong, *_ in port_check.compare(outputs)] == len(outputs) * [False]
    outputs["reuse_window"] = given["dual_window"]
    assert port_check.compare(outputs)[0][:2] == (True, "reuse_window")
    for place in port_check.PLACES.values():  # files and names are there
        file, names_there = place.split(";")[0].split(": ")
        text = (HERE.parent.parent / file).read_text(encoding="utf-8")
        assert all(
            re.search(rf"(def|class) {name.split('.')[-1]}\b", text)
            for name in names_there.split(", ")
            if re.fullmatch(r"[\w.]+", name)
        ), place


def test_bad_input_to_the_command(tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors", encoding="utf-8")
    save_file({}, tmp_path / "empty.safetensors")
    for file in (tmp_path / "absent.safetensors", tmp_path / "text.safetensors"):
        process = check(file)
        assert (
            process.returncode == 2
            and process.stderr.count("\n") == 1
            and str(file) in process.stderr
        )
    assert (
        check(tmp_path / "empty.safetensors").returncode
        == check().returncode
        == check("--what").returncode
        == 2
    )
    assert check("--help").returncode == 0


def test_every_tensor_is_described():
    """In tests/reference/README.md, by a name in which `*` stands for any part."""
    described = re.findall(
        r"^\| `([^`]+)`", (REFERENCE / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    patterns = [re.compile(re.escape(name).replace(r"\*", ".+")) for name in described]
    all_names = {*names("odd"), *names("wide"), *load_file(HERE / "steps.safetensors")}
    assert not [
        name for name in all_names if not any(pattern.fullmatch(name) for pattern in patterns)
    ]
    assert not [
        name
        for name, pattern in zip(described, patterns, strict=True)
        if not any(map(pattern.fullmatch, all_names))
    ]
