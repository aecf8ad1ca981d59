"""The transformer with its blocks' parts compiled: norms, modulation, rotation and residuals in few passes over memory.

The loop of the method stays as it is, and so does the attention, whose kernel is the caller's. The first step of each
kind takes a minute longer.
"""
import torch

from model import Block, WanTransformer


class CompiledBlock(Block):
    self_attention = torch.compile(Block.self_attention, dynamic=False)
    cross_attention = torch.compile(Block.cross_attention, dynamic=False)
    feed_forward = torch.compile(Block.feed_forward, dynamic=False)


class CompiledTransformer(WanTransformer):
    block = CompiledBlock
