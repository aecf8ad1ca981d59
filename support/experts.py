"""Wan2.2-T2V-A14B: two transformers, one for high noise and one for low noise. Only one of them is
in memory at a time."""

import gc

import torch


class Experts:
    """Takes the place of a WanTransformer in freeswim.generate and freeswim.refine. The transformer
    `transformer` serves timesteps from `boundary` on, `transformer_2` those below.

    `load(name)` returns one of them. Each is loaded when its steps begin, after the other has gone.
    """

    def __init__(self, load, boundary, like):
        """`like` is a transformer of their kind; it needs no weights."""
        self.load = load
        self.boundary = boundary  # a timestep, from 0 to 1000
        self.head_dim = like.head_dim
        self.full_attention = like.full_attention
        self.name = None
        self.network = None

    def expert(self, timestep):
        """The transformer for a timestep. Drop it before the next call: otherwise it stays in
        memory beside the other."""
        name = "transformer" if timestep >= self.boundary else "transformer_2"
        if name != self.name:
            self.network = None
            gc.collect()  # its blocks may refer to each other, as in support/parallel.py
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.network = self.load(name)
            self.name = name
        return self.network
