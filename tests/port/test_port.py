"""The porting kit: the NumPy port agrees in everything, the file of steps is ours, and port_check
takes what is right and finds what is wrong, at its place."""

import re
import struct
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
from safetensors.torch import save_file as save_torch_file

HERE = Path(__file__).parent
PORT = HERE / "port_numpy.py"


@pytest.fixture(scope="module")
def port():
    return port_numpy.steps()


def check(*arguments):
    """The command: its exit status, its lines, and its messages."""
    process = subprocess.run(
        [sys.executable, HERE / "port_check.py", *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
    )
    return process.returncode, process.stdout.splitlines(), process.stderr.splitlines()


# --------------------------------------------------------------------------------------------------
# The NumPy port


def test_the_port_agrees_in_everything(port):
    """From the video and the token ids to the refined, decoded clip."""
    lines = port_check.compare(port)
    assert not [line.text for line in lines if line.wrong]
    reference = port_check.reference()
    assert [line.name for line in lines] == list(reference)
    for name, expected in reference.items():
        assert port_check.off(port[name], expected) <= 1.5e-5, name  # the limits leave more room


@pytest.mark.parametrize("case, tensor", REFINEMENTS)
def test_whole_refinements_of_the_port(case, tensor):
    weights, config, meta, given = port_numpy.load(case)
    model = (weights, config, meta, given["init_latents"])
    *_, latents = port_numpy.refine(*model, given["text"], given["negative"], interval_of(tensor))
    assert port_check.off(latents, given[tensor]) <= 1e-4


def test_the_port_stands_alone():
    script = (
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import port_numpy; print(*sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True
    ).stdout
    loaded = set(printed.split())
    assert "numpy" in loaded
    assert not {"torch", "model", "freeswim", "scipy", "support"} & loaded


def test_the_file_of_steps_is_what_the_script_writes():
    expected = load_file(HERE / "steps.safetensors")
    written, order = write_steps.steps()
    assert expected.keys() == written.keys()
    assert order == list(port_check.reference())
    assert (HERE / "steps.safetensors").stat().st_size <= 3 * 2**20
    for name, value in expected.items():
        if value.any():
            assert relative(written[name], torch.from_numpy(value)) <= 1e-5, name
        else:
            assert not written[name].any(), name


def test_the_model_in_bfloat16_is_what_the_script_writes(tmp_path):
    write_steps.write_bfloat16(tmp_path / "bfloat16")
    for file in (tmp_path / "bfloat16").iterdir():
        assert file.read_bytes() == (REFERENCE / "bfloat16" / file.name).read_bytes()


# --------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("trap", port_traps.TRAPS, ids=lambda trap: trap.mistake)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # some mistakes divide by zero
def test_mistakes_are_found_at_their_place(trap):
    """The first one named is where the mistake is, and all that comes before it is right."""
    lines = port_check.compare(port_traps.altered(PORT, *trap.changes).steps())
    assert lines[0].name == trap.seen_in
    assert re.match(r"WRONG .*; see \S+\.py: \w+", lines[0].text)
    order = list(port_check.reference())
    before = set(order[: order.index(trap.seen_in)])
    assert before <= {line.name for line in lines if not line.wrong}


def test_the_table_of_mistakes_is_what_the_script_prints():
    """In tests/port/README.md, but for the figures."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for trap in port_traps.TRAPS:
        assert f"| {trap.mistake} | `{trap.seen_in}` |" in readme, trap.mistake


def test_limits_in_the_readme_are_the_checkers():
    """In the order in which the checker takes them."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*) \| (\de-\d) \|$", readme, re.MULTILINE)
    limits = {}
    for beginnings, limit in rows:
        for name in re.findall(r"`(.*?)`", beginnings) or [""]:
            limits[name.removesuffix("*")] = float(limit)
    assert limits == port_check.LIMITS


def test_tensors_in_the_readme_exist():
    known = port_check.reference()
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for name in re.findall(
        r"`((?:dit|umt5|vae|norm|unipc|base|refine|small|rotary|zeros)\.[\w.*]+)`", readme
    ):
        pattern = re.compile(re.escape(name).replace(r"\*", ".+"))
        assert any(pattern.fullmatch(each) for each in known), name


# --------------------------------------------------------------------------------------------------
# The command


def test_a_whole_port(port, tmp_path):
    """Two tensors of the reference are all zeros."""
    save_file(port, tmp_path / "whole.safetensors")
    status, lines, _ = check(tmp_path / "whole.safetensors")
    assert status == 0
    assert lines[-1] == f"{len(port)} right, 0 wrong, 0 of {len(port)} not given"
    assert len(lines) == len(port) + 1
    zeros = [name for name, value in port_check.reference().items() if not value.any()]
    assert len(zeros) >= 2
    for name in zeros:
        assert any(line.startswith(f"right {name}:") for line in lines)


def test_a_part_of_a_port_is_called_so(port, tmp_path):
    """With a batch of one, too; and what is missing is named."""
    few = {name: port[name][None] for name in ("dit.patches", "dit.text")}
    save_file(few, tmp_path / "few.safetensors")
    status, lines, _ = check(tmp_path / "few.safetensors")
    assert status == 0
    assert lines[2] == f"2 right, 0 wrong, {len(port) - 2} of {len(port)} not given:"
    missing = lines[3].split(", ")
    assert "dit.time" in missing
    assert "vae.encode.history0.*" in missing
    assert "dit.text" not in missing


def test_inputs_and_other_names_are_known(port, tmp_path):
    """Of tests/reference/README.md: the whole file of the set can be compared."""
    given = load_file(REFERENCE / "odd" / "expected.safetensors")
    save_file(given, tmp_path / "given.safetensors")
    status, lines, _ = check(tmp_path / "given.safetensors")
    assert status == 0
    for name in ("text", "nocache.latents", "cache3.latents"):
        assert any(line.startswith(f"right {name}:") for line in lines)


def test_wrong_files(port, tmp_path):
    """Wrong ones first, in the order of the computation; unknown ones last."""
    with_nan = port["refine.step0"].copy()
    with_nan[3, 1, 2, 0] = np.nan
    with_nan[4, 0, 0, 0] = np.inf
    wrong = {
        "dit.text": port["dit.text"],
        "unipc.levels": port["unipc.levels"][1:],
        "dit.txt": port["dit.text"],
        "dit.velocity": -port["dit.velocity"],
        "umt5.layer0": port["umt5.layer0"] * (1 + 5e-5),
        "refine.step0": with_nan,
        "refine.cache2": port["refine.cache2"] * (1 + 5e-4),
    }
    save_file(wrong, tmp_path / "wrong.safetensors")
    status, lines, _ = check(tmp_path / "wrong.safetensors")
    assert status == 1
    assert [line.split()[:2] for line in lines[:7]] == [
        ["WRONG", "umt5.layer0:"],
        ["WRONG", "dit.velocity:"],
        ["WRONG", "unipc.levels:"],
        ["WRONG", "refine.step0:"],
        ["WRONG", "refine.cache2:"],
        ["right", "dit.text:"],
        ["unknown", "dit.txt:"],
    ]
    assert lines[7].startswith("1 right, 5 wrong, ")
    assert "unembed" in lines[1]
    assert "(5,)" in lines[2]
    size = with_nan.size
    assert f"2 of {size} are not finite, first (3, 1, 2, 0); see freeswim.py: refine" in lines[3]
    assert lines[6] == "unknown dit.txt: is it dit.text?"


def test_a_tensor_more_is_a_note(port, tmp_path):
    extra = {"dit.text": port["dit.text"], "of my own": np.ones(3, np.float32)}
    save_file(extra, tmp_path / "port.safetensors")
    status, lines, _ = check(tmp_path / "port.safetensors")
    assert status == 0
    assert lines[1] == "unknown of my own: tests/reference/README.md has all names"


def test_a_figure_can_be_told_from_its_limit():
    expected = np.ones(100)
    line = port_check.compare_one("dit.text", expected * (1 + 1.002e-5), expected)
    assert line.wrong
    assert "1.002e-05 off, at most 1e-05" in line.text


def test_what_should_be_zeros_has_to_be(port, tmp_path):
    (name, *_) = [name for name, value in port_check.reference().items() if not value.any()]
    for value, status in ((1e-7, 0), (1e-3, 1), (np.nan, 1)):
        save_file({name: port[name] + np.float32(value)}, tmp_path / "port.safetensors")
        assert check(tmp_path / "port.safetensors")[0] == status


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_compared(port, tmp_path, dtype):
    """A right port is right in all of them; a wrong one is wrong."""
    tensors = {}
    for name in ("umt5.mask", "dit.patches", "refine.step4", "vae.decoded"):
        tensors[name] = torch.from_numpy(port[name]).to(dtype)
    save_torch_file(tensors, tmp_path / "port.safetensors")
    status, lines, _ = check(tmp_path / "port.safetensors")
    assert status == 0, lines
    tensors["dit.patches"] = 1.02 * tensors["dit.patches"]
    save_torch_file(tensors, tmp_path / "port.safetensors")
    assert check(tmp_path / "port.safetensors")[0] == 1


def test_diffusers_form_of_the_vaes_norm_is_right(port):
    """It divides by the norm, of at least 1e-12, and multiplies by sqrt(C)."""
    vectors = torch.from_numpy(port["norm.input"]).double() * 1e-2
    normed = torch.nn.functional.normalize(vectors, dim=1) * vectors.shape[1] ** 0.5
    assert not port_check.compare({"norm.vae": normed.numpy()})[0].wrong


def test_without_its_packages_a_line_says_so(tmp_path):
    (tmp_path / "safetensors.py").write_text("raise ImportError('no safetensors')\n")
    process = subprocess.run(
        [sys.executable, HERE / "port_check.py", "port.safetensors"],
        capture_output=True,
        encoding="utf-8",
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert process.returncode == 2
    assert process.stderr == "port_check.py: no safetensors; pip install numpy safetensors\n"


def raw_file(header, data=b""):
    return struct.pack("<Q", len(header)) + header + data


BAD_FILES = {  # the content of a file, and words of the answer
    "absent": (None, ["No such file"]),
    "no safetensors": (b"no tensors" * 10, [""]),
    "empty": (b"", [""]),
    "without tensors": (raw_file(b"{}"), ["holds no tensors"]),
    "cut off": (raw_file(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'), [""]),
    "of 8 bits": (
        raw_file(b'{"a":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}', b"12"),
        ["a is of dtype F8_E4M3", "float32"],
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_cannot_be_compared(tmp_path, name):
    content, named = BAD_FILES[name]
    file = tmp_path / "port.safetensors"
    if content is not None:
        file.write_bytes(content)
    status, lines, errors = check(file)
    assert (status, lines, len(errors)) == (2, [], 1)
    assert all(words in errors[0] for words in [str(file), *named])


def test_complex_numbers_are_refused_by_name(tmp_path):
    save_torch_file({"dit.rotary": torch.ones(3, dtype=torch.complex64)}, tmp_path / "p")
    status, lines, errors = check(tmp_path / "p")
    assert (status, lines, len(errors)) == (2, [], 1)
    assert "dit.rotary is of dtype C64" in errors[0]


def test_other_arguments():
    assert check()[0] == check("--what")[0] == check("a", "b")[0] == 2
    assert check("--help")[0] == 0


# --------------------------------------------------------------------------------------------------
# What the documents say


def test_places_exist():
    """Files and names to which the checker points."""
    for place in port_check.PLACES.values():
        for part in place.split("; "):
            if ": " not in part:
                continue
            file, names_there = part.split(": ")
            text = (HERE.parent.parent / file).read_text(encoding="utf-8")
            for name in names_there.split(", "):
                if re.fullmatch(r"[\w.]+", name):
                    last = name.split(".")[-1]
                    assert re.search(rf"(def|class) {last}\b", text), place


def test_every_tensor_is_described():
    """In tests/reference/README.md, by a name in which `*` stands for any part."""
    readme = (REFERENCE / "README.md").read_text(encoding="utf-8")
    described = re.findall(r"^\| `([^`]+)`", readme, re.MULTILINE)
    patterns = [re.compile(re.escape(name).replace(r"\*", ".+")) for name in described]
    all_names = {*names("odd"), *names("wide"), *load_file(HERE / "steps.safetensors")}
    missing = [
        name for name in all_names if not any(pattern.fullmatch(name) for pattern in patterns)
    ]
    assert not missing
    stray = []
    for name, pattern in zip(described, patterns, strict=True):
        if not any(pattern.fullmatch(each) for each in all_names):
            stray.append(name)
    assert not stray
