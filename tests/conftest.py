"""The tiny models gain nothing from several threads, and threads that wait for a busy core lose a
lot."""

import pytest
import torch
from parity import write_random_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random model as wide as the bundled one, so that it has its preset, but shallow."""
    folder = tmp_path_factory.mktemp("model")
    write_random_model(folder, heads=5, head_dim=48)
    return folder
