"""Processes: how many there are, which one speaks, what they tell each other, and what ends them.

torchrun starts several and numbers them in the environment. One that was started by hand is alone.
PyTorch is imported only where several of them talk: what the command needs first, messages,
signals and streams, has to work before that import, which takes seconds.
"""

import atexit
import os
import select
import signal
import sys
from datetime import timedelta

from support import UserError

# --------------------------------------------------------------------------------------------------
# How many processes there are

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def are_several():
    """Whether torchrun has started several processes. A stray RANK does not mean that it has."""
    has_started_this = all(name in os.environ for name in TORCHRUN)
    return has_started_this and os.environ["WORLD_SIZE"] != "1"


def rank():
    """The number of this process, of all hosts."""
    return int(os.environ["RANK"]) if are_several() else 0


def local_rank():
    """Its number on this host."""
    return int(os.environ["LOCAL_RANK"]) if are_several() else 0


def world_size():
    """How many processes there are, on all hosts."""
    return int(os.environ["WORLD_SIZE"]) if are_several() else 1


def local_world_size():
    """How many of them are on this host."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if are_several() else 1


def is_first():
    """Whether this is the process that reads, writes and prints; it is, if there is only one."""
    return rank() == 0


# --------------------------------------------------------------------------------------------------
# Messages


def printable(line):
    """A line without control characters, which could change a terminal."""
    shown = []
    for character in line:
        if not character.isprintable():
            character = character.encode("unicode_escape", "surrogatepass").decode()
        shown.append(character)
    return "".join(shown)


def say(line):
    """Print a line to stderr, above a progress bar if there is one, in the first process only."""
    if is_first():
        from tqdm import tqdm

        tqdm.write(printable(line), file=sys.stderr)


def fail(message, status=2):
    """Print an error in one line, in the first process only, and exit. For what all processes find
    alike, as they have the same command line."""
    if is_first():
        print_error(message)
    raise SystemExit(status)


def fail_once(message, status=2):
    """The same for what may be found in any process: of those that fail alike, one prints it."""
    if is_first_to_report(message):
        print_error(message)
    raise SystemExit(status)


def print_error(message):
    line = printable(" ".join(message.split()))
    print(f"sample.py: {line}", file=sys.stderr)


def is_first_to_report(message):
    """Whether no other process has reported this. The store that all of them share decides."""
    if not are_several():
        return True
    import torch.distributed as dist

    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(f"error: {message}", 1) == 1
    except (RuntimeError, ValueError):  # the store has gone with the process that kept it
        return True


# --------------------------------------------------------------------------------------------------
# Signals and streams


def handle_signals(hint="nothing had been computed yet"):
    """From now on Ctrl-C and SIGTERM end the command with one line and this hint."""

    def stop(number, frame):
        if is_first():
            print_without_waiting(f"\nsample.py: stopped; {printable(hint)}\n")
        raise SystemExit(128 + number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def print_without_waiting(message):
    """Print to stderr if its reader takes it at once, and discard further output: a pipe that
    nobody empties would keep the process from ending."""
    _, writable, _ = select.select([], [sys.stderr.fileno()], [], 0)
    if writable:
        try:
            os.write(sys.stderr.fileno(), message.encode(errors="backslashreplace"))
        except OSError:
            pass
    for stream in (sys.stdout, sys.stderr):
        discard_output(stream.fileno())


def discard_output(descriptor):
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)


class PatientStream:
    """An output stream that never ends a run. What it cannot encode is escaped; when its reader has
    gone away, further output is discarded."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            return self.discard(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.discard("")

    def discard(self, text):
        discard_output(self.stream.fileno())  # at exit, Python flushes this descriptor too
        return len(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def protect_streams():
    """Keep the command running when standard output or standard error is slow, closed, or cannot
    encode a character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed: the descriptor must not be given to another file
            stream = open(os.devnull, "w", encoding="utf-8")
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, PatientStream(stream))


def set_allocator():
    """Let the segments of PyTorch's GPU memory grow, so that less of it is lost between tensors:
    81 frames of 3840x2160 fit into 24 GB only then. To be called before PyTorch is imported; what
    the user has set stays."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second one is older
    is_set = any(name in os.environ for name in names)
    if sys.platform == "linux" and not is_set:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


# --------------------------------------------------------------------------------------------------
# Several processes


def start():
    """Join the other processes, if torchrun has started several. They wait for one another as long
    as it takes."""
    if not are_several():
        return
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "cpu:gloo"
    dist.init_process_group(backend, timeout=timedelta(days=30))
    # Otherwise its threads may abort a process that ends before the others.
    atexit.register(dist.destroy_process_group)


def device_of(name):
    """The device of this process, from that of the run. Of several processes on a host, each has a
    GPU of its own. Raises UserError if there are too few."""
    import torch

    device = torch.device(name)
    if device.type == "cuda" and are_several():
        here = local_world_size()
        count = torch.cuda.device_count()
        if here > count:
            raise UserError(
                f"torchrun has started {here} processes on a host with {count} GPUs; use "
                f"--nproc-per-node {max(count, 1)}"
            )
        device = torch.device("cuda", local_rank())
    if device.index is not None:
        torch.cuda.set_device(device)  # some libraries start their kernels on the current one
    return device


def from_first(compute):
    """What `compute()` gives in the first process, in every process. If it fails there, all end,
    and the first one raises the error."""
    if not are_several():
        return compute()
    import torch.distributed as dist

    result = None
    error = None
    if is_first():
        try:
            result = compute()
        except Exception as caught:
            error = caught
    outcome = [result, None if error is None else str(error)]
    dist.broadcast_object_list(outcome, device="cpu")
    result, message = outcome
    if message is None:
        return result
    if is_first():
        raise error
    raise SystemExit(2)


def once_per_host(compute):
    """What `compute()` gives, in every process, but first in one of each host: the others then find
    its work done."""
    if not are_several():
        return compute()
    import torch
    import torch.distributed as dist

    if local_rank() == 0:
        result = compute()
    dist.all_reduce(torch.zeros(1))  # on the CPU: a barrier
    if local_rank() != 0:
        result = compute()
    return result


def check_equal(value, message):
    """Raise UserError(message) unless all processes have the same value, as on several hosts they
    may not."""
    if not are_several():
        return
    import torch.distributed as dist

    values = [None] * world_size()
    dist.all_gather_object(values, value)
    if any(other != value for other in values):
        raise UserError(message)
