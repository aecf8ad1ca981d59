"""Wan2.2-T2V-A14B: two transformers, one for high noise and one for low noise. Only one of them is
in memory at a time."""

import gc

import torch


class Experts:
    """Takes the place of a WanTransformer in freeswim.generate and freeswim.refine. The transformer
    `transformer` serves timesteps from `boundary` on, `transformer_2` those below.

    `load(name)` returns one of them. No reference to it leaves this class: each is loaded when its
    steps begin, after the other is freed.
    """

    def __init__(self, load, boundary, like):
        """`like` is a transformer of their kind; it needs no weights."""
        self.load = load
        self.boundary = boundary  # a timestep, from 0 to 1000
        self.head_dim = like.head_dim
        self.full_attention = like.full_attention
        self.name = None
        self.transformer = None

    def select_expert(self, timestep):
        """Load the transformer for this timestep, if it is not the one in memory."""
        name = "transformer" if timestep >= self.boundary else "transformer_2"
        if name == self.name:
            return
        self.name = None  # if loading fails, none is there
        self.transformer = None
        gc.collect()  # its parts may refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.transformer = self.load(name)
        self.name = name

    @property
    def blocks(self):
        return self.transformer.blocks

    def prefetch(self, blocks):
        return self.transformer.prefetch(blocks)

    def embed(self, latents, timestep, text):
        return self.transformer.embed(latents, timestep, text)

    def unembed(self, tokens, time_emb, grid):
        return self.transformer.unembed(tokens, time_emb, grid)

    def __call__(self, latents, timestep, text, attend=None):
        return self.transformer(latents, timestep, text, attend)
