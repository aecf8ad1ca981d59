"""Compiled transformer blocks and a faster VAE for a GPU, with the same results.

Imported on a GPU only, because importing PyTorch's compiler takes seconds. What works on the
machine is tried at the start of a run, on small inputs.
"""

import copy

import torch
import torch.nn.functional as F

from model import Block, NormSiLU, WanVAE, full_attention, is_finite, rotary_table
from support.attention import summary
from support.processes import say

# --------------------------------------------------------------------------------------------------
# Blocks


class CompiledBlock(Block):
    """A block whose norms, modulation, rotation and residuals take few passes over memory. The
    attention stays the caller's."""

    self_attention = torch.compile(Block.self_attention, dynamic=False)
    cross_attention = torch.compile(Block.cross_attention, dynamic=False)
    # Chunk by chunk: all chunks in one graph would all be held in memory.
    feed_forward_chunk = torch.compile(Block.feed_forward_chunk, dynamic=False)


def choose_block(device, dtype):
    """The compiled block if the compiler works here, else the plain one, and a line says why."""
    try:
        with torch.no_grad():
            block = CompiledBlock(dim=16, heads=1, ffn_dim=16, eps=1e-6).to(device, dtype)
            tokens = torch.zeros(1, 4, 16, dtype=dtype, device=device)
            modulation = torch.zeros(1, 6, 16, device=device)
            rotary = rotary_table((1, 2, 2), 16, device)
            block.self_attention(tokens, modulation, rotary, full_attention)
    except Exception as error:  # a compiler can fail in many ways
        say(f"transformer blocks run uncompiled, and slower: {summary(error)}")
        return Block
    return CompiledBlock


# --------------------------------------------------------------------------------------------------
# The VAE: channels last in memory, as cuDNN wants them, and in float16 if asked for
#
# float16 has as many bits of precision as TF32, in which convolutions run otherwise, but a smaller
# range. Norms are computed in float32, and tiles are blended in float32.


def norm_silu(x, gamma, eps):
    """NormSiLU of positions (M, C), to be compiled into one pass over memory."""
    wide = x.float()
    mean_square = wide.square().mean(dim=1, keepdim=True)
    normed = wide * torch.rsqrt(mean_square + eps) * gamma.flatten()
    return F.silu(normed).to(x.dtype)


# Once for each number of channels. The number of positions is left open.
compiled_norm_silu = torch._dynamo.config.patch(recompile_limit=2**16)(
    torch.compile(norm_silu, dynamic=True)
)


class CompiledNormSiLU(NormSiLU):
    def forward(self, x):
        rows = x.permute(0, 2, 3, 4, 1)  # (B, F, H, W, C), as they are in memory
        positions = rows.reshape(-1, rows.shape[-1]).contiguous()
        # .data, because for a view the compiler also specialises on the shape of its base.
        result = compiled_norm_silu(positions.data, self.gamma, self.EPS)
        return result.view(rows.shape).permute(0, 4, 1, 2, 3)


class FastVAE(WanVAE):
    """The VAE with its tensors channels last in memory; with `half`, it computes in float16."""

    def __init__(self, config, norm=CompiledNormSiLU, **parts):
        super().__init__(config, norm, **parts)
        self.in_float16 = None  # a copy, if that is asked for

    @classmethod
    def from_pretrained(cls, folder, device, half=False, **parts):
        vae = super().from_pretrained(folder, device, **parts)
        vae.use_channels_last()
        if half:
            vae.use_float16()
        return vae

    def use_float16(self):
        self.in_float16 = copy.deepcopy(self).to(torch.float16)

    def use_channels_last(self):
        for parameter in self.parameters():
            if parameter.ndim == 5:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
            elif parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def encode_chunk(self, frames, history):
        frames = frames.contiguous(memory_format=torch.channels_last_3d)
        return super().encode_chunk(frames, history)

    def decode_chunk(self, latents, history):
        latents = self.post_quant_conv(latents)
        latents = latents.contiguous(memory_format=torch.channels_last_3d)
        return self.decoder(latents, history)

    def encode_tiles(self, pixels):
        if self.in_float16 is None:
            return super().encode_tiles(pixels)
        means = list(self.in_float16.encode_tiles(pixels))
        if all(is_finite(mean) for mean in means):
            return means
        return super().encode_tiles(pixels)  # float16 overflowed

    def decode_tiles(self, latents):
        if self.in_float16 is None:
            return super().decode_tiles(latents)
        frames = list(self.in_float16.decode_tiles(latents.half()))
        if all(is_finite(frame) for frame in frames):
            return frames
        return super().decode_tiles(latents)


def load_vae(folder, device, half, **parts):
    """The VAE of a `vae/` folder: the fast one if the compiler works here, else the plain one, in
    float32. `parts` are the constructor's."""
    try:
        norm = CompiledNormSiLU(4).to(device).requires_grad_(False)
        norm(torch.zeros(1, 4, 1, 2, 2, device=device))
    except Exception as error:  # a compiler can fail in many ways
        say(f"the VAE runs uncompiled, and slower: {summary(error)}")
        return WanVAE.from_pretrained(folder, device, **parts)
    return FastVAE.from_pretrained(folder, device, half, **parts)
