"""The command, as the tests run it: in a process of its own, as a person does, or in this one,
which is faster."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import sample
from support import UserError
from support.options import parse_arguments
from support.processes import fail

ROOT = Path(__file__).parent.parent
SMALL = ["--size", "224x144", "--frames", "5", "--steps", "4", "--device", "cpu"]


def start(*arguments, env=None, **options):
    """A started `python sample.py …`; `env` is added to its environment."""
    return subprocess.Popen(
        [sys.executable, ROOT / "sample.py", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})},
        **options,
    )


def run(*arguments, **options):
    """A finished one: its exit status, what it printed, and its messages line by line."""
    process = start(*arguments, **options)
    output, errors = process.communicate()
    return process.returncode, output, errors.replace("\r", "\n").splitlines()


def parse(*arguments):
    return parse_arguments(sample.__doc__, [str(argument) for argument in arguments], fail)


def run_here(*arguments):
    """The same in this process; errors are raised as exceptions."""
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        sample.main(parse(*arguments))
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


@contextmanager
def refused(*named):
    """What the code under it asks for is refused in one line, which names all of these."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for words in named:
        assert str(words) in message


def record(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def latents(folder):
    """The fingerprint of a run's refined latents."""
    return record(folder)["latents_sha256"]
