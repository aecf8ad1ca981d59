"""The documents say what is true: the Python example runs as printed, links and options exist,
numbers are those that are computed."""

import os
import re
import subprocess
import sys

import pytest
import speed
import torch
from command import ROOT, parse
from parity import empty_transformer, plan_for
from test_fast import pretend_to_be_one_of

from support.offload import memory_needed

DOCUMENTS = sorted(
    file for file in ROOT.rglob("*.md") if not {".venv", ".pytest_cache"} & set(file.parts)
)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example(tmp_path):
    """It runs word for word, and prints what the README says."""
    code, following = re.search(r"```python\n(.*?)```\n(.*?)\n\n", README, re.DOTALL).groups()
    printed = re.search(r"It prints `(.*)`", following + README.split("```python")[1]).group(1)
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == printed
    assert (tmp_path / "fish.mp4").stat().st_size > 1000


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    text = file.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        linked = file.parent / path if path else file
        assert linked.exists(), f"{file}: {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in headings], target


def test_options_in_documents_exist(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    known = set(re.findall(r"--[a-z-]+[a-z0-9]", capsys.readouterr().out))
    for file in DOCUMENTS:
        for command in re.findall(r"sample\.py[^`\n]*", file.read_text(encoding="utf-8")):
            for option in re.findall(r"--[a-z-]+[a-z0-9]", command.partition("sample.py")[2]):
                assert option in known, f"{file}: {option}"


def test_programs_in_documents_exist():
    for file in DOCUMENTS:
        text = file.read_text(encoding="utf-8")
        for program in re.findall(r"(?:python|pytest) ([\w/]+\.py)", text):
            assert (ROOT / program).is_file(), f"{file}: {program}"
        for module in re.findall(r"python -m (tiny\.\w+)", text):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"{file}: {module}"


def test_lengths_of_files():
    for name, lines in re.findall(r"^\| \[`([\w./]+)`\].*?\| (\d+) \|", README, re.MULTILINE):
        path = ROOT / name
        files = [path] if path.is_file() else list(path.glob("*.py"))
        count = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        assert round(count, -2) == int(lines), f"{name} has {count} lines"


# --------------------------------------------------------------------------------------------------
# Numbers of tests/README.md that can be computed again without a GPU

MEASUREMENTS = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
PLACES = ((False, False), (True, False), (True, True))  # cache on the CPU, weights on the CPU


def expected_gib(transformer, grid, place):
    return f"{speed.expected_memory(transformer, grid, *place) / 2**30:.2f}"


def test_expected_memory_is_near_what_was_measured(monkeypatch):
    """Never lower than the peak, and at most 15 % higher."""
    pairs = re.findall(r"(\d+\.\d\d), expected (\d+\.\d\d)", MEASUREMENTS)
    for peak, expected in pairs:
        assert 1 <= float(expected) / float(peak) <= 1.15
    computed = []
    for place in PLACES:
        small = empty_transformer(num_layers=4)
        large = empty_transformer(num_layers=4, **speed.B14)
        computed.append(expected_gib(small, speed.HD, place))
        computed.append(expected_gib(small, speed.UHD, place))
        computed.append(expected_gib(large, speed.HD, place))
    for ranks in ("2", "2", "4", "4"):
        pretend_to_be_one_of(monkeypatch, ranks)
        computed.append(expected_gib(empty_transformer(num_layers=3), speed.HD, PLACES[0]))
    assert [expected for _, expected in pairs] == computed


def test_expected_cpu_memory():
    """That of both READMEs, which nobody measured."""
    cases = [
        ({}, speed.HD),
        ({}, speed.UHD),
        (speed.B5, speed.B5_HD),
        (speed.B5, (31, 68, 120)),  # 3840x2160 is cropped from 3840x2176
    ]
    caches = []
    totals = []
    for changes, grid in cases:
        plan = plan_for(empty_transformer(**changes), torch.nn.Module(), grid)
        needed = memory_needed(plan)
        cache = needed.on_cpu(cache_on_cpu=True, stream_weights=False)
        total = needed.on_cpu(cache_on_cpu=True, stream_weights=True)
        caches.append(f"{cache / 2**30:.1f}")
        totals.append(f"{total / 2**30:.1f}")
    assert f"| cache | {' | '.join(caches)} |" in MEASUREMENTS
    assert f"| cache and weights | {' | '.join(totals)} |" in MEASUREMENTS
    small = round(float(totals[1]))
    large = round(float(totals[3]))
    assert f"there are {small} or {large} GiB of CPU memory" in README


def test_the_projection_is_what_is_computed(capsys):
    speed.projection_table()
    rows = capsys.readouterr().out.strip().splitlines()
    assert len(rows) == 6
    for row in rows:
        assert row.replace("| 16 |", "| 16, two hosts |") in MEASUREMENTS
