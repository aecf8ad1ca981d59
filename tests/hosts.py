"""What test_parallel.py runs: `torchrun … tests/hosts.py FAULT [ARGUMENTS OF sample.py]`. The
command, with a fault in every process but the first, as on a host with other files."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import model
from support import hub, processes


def check_weights(name, folder):
    raise model.CheckpointError(f"{folder}/vae/model.safetensors is damaged here")


def fingerprints_of_model(folder):
    return {"weights": f"of process {processes.rank()}", "configuration": ""}


FAULTS = {"damaged": ("check_weights", check_weights)}
FAULTS["different"] = ("fingerprints_of_model", fingerprints_of_model)

fault = sys.argv.pop(1)
if processes.rank() > 0:
    setattr(hub, *FAULTS[fault])
sys.argv[0] = str(ROOT / "sample.py")
runpy.run_path(sys.argv[0], run_name="__main__")
