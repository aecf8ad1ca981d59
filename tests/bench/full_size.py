"""At full size, on a GPU: `python tests/bench/full_size.py [FOLDER]` writes a random checkpoint in
the exact layout of Wan2.1-T2V-1.3B with Diffusers (float32, two transformer shards), loads it with
ours, and compares.

Prints the relative errors, seconds and peak memory; fails if ours misses a bound. Takes about two
minutes on an H200, 6 GB of disk, 30 GB of GPU memory.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
from oracle import relative

from model import WanTransformer, WanVAE

REAL = TESTS / "wan2.1-t2v-1.3b"


def write(cls, part, folder):
    """A random model of the real configuration, every parameter away from its initial zeros and
    ones."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        net = cls.from_config(json.loads((REAL / part / "config.json").read_text(encoding="utf-8")))
        for parameter in net.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    net.save_pretrained(folder / part, max_shard_size="5GB")
    for file in sorted((folder / part).glob("*.safetensors")):
        print(f"{part}/{file.name}: {file.stat().st_size} bytes")


def measure(label, run):
    run()  # once for the kernels' sake
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.time()
    result = run()
    torch.cuda.synchronize()
    print(
        f"{label}: {time.time() - start:.2f} s, peak "
        f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    )
    return result


@torch.no_grad()
def main(folder):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(torch.cuda.get_device_name(), "torch", torch.__version__)

    write(WanTransformer3DModel, "transformer", folder)
    latents = torch.randn(1, 16, 21, 60, 104, device="cuda")  # 480 x 832 x 81
    timestep = torch.tensor([899], device="cuda")
    text = torch.randn(1, 512, 4096, device="cuda")
    text[:, 40:] = 0
    inputs = latents, timestep, text

    ours = WanTransformer.from_pretrained(folder / "transformer", "cuda")
    expected = measure("transformer, float32, ours", lambda: ours(*inputs))
    del ours
    theirs = WanTransformer3DModel.from_pretrained(folder / "transformer").cuda()
    exact = relative(
        expected, measure("transformer, float32, diffusers", lambda: theirs(*inputs).sample)
    )
    del theirs
    start = time.time()
    ours = WanTransformer.from_pretrained(folder / "transformer", "cuda", torch.bfloat16)
    print(f"transformer, bfloat16, loaded by ours in {time.time() - start:.1f} s")
    error = relative(measure("transformer, bfloat16, ours", lambda: ours(*inputs)), expected)
    del ours
    theirs = WanTransformer3DModel.from_pretrained(
        folder / "transformer", torch_dtype=torch.bfloat16
    ).cuda()
    low = latents.bfloat16(), timestep, text.bfloat16()
    their_error = relative(
        measure("transformer, bfloat16, diffusers", lambda: theirs(*low).sample), expected
    )
    del theirs
    print(
        f"transformer: float32 from diffusers' {exact:.2e}; bfloat16 from float32: ours "
        f"{error:.3e}, "
        f"diffusers' {their_error:.3e}"
    )

    write(AutoencoderKLWan, "vae", folder)
    video = torch.rand(1, 3, 17, 480, 832, device="cuda") * 2 - 1
    ours = WanVAE.from_pretrained(folder / "vae", "cuda")
    theirs = AutoencoderKLWan.from_pretrained(folder / "vae").cuda()
    theirs.enable_tiling()
    mean = ours.mean.cuda()
    std = ours.std.cuda()
    encoded = measure("vae encode 480x832x17, ours", lambda: ours.encode(video))
    their_mode = measure(
        "vae encode 480x832x17, diffusers", lambda: theirs.encode(video).latent_dist.mode()
    )
    encode_error = relative(encoded, (their_mode - mean) / std)
    decoded = measure("vae decode 480x832x17, ours", lambda: ours.decode(encoded))
    their_video = measure(
        "vae decode 480x832x17, diffusers", lambda: theirs.decode(encoded * std + mean).sample
    )
    decode_error = relative(decoded, their_video.clamp(-1, 1))
    print(
        f"vae: encode {encode_error:.2e}, decode {decode_error:.2e} from diffusers'; "
        f"{(decoded.abs() < 1).float().mean():.0%} of the pixels not clamped"
    )

    assert exact <= 1e-5
    assert error <= 1.2 * their_error
    assert encode_error <= 1e-5
    assert decode_error <= 1e-5


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
