"""What test_parallel.py runs: `torchrun --nproc-per-node N tests/ranks.py`. Every rank first does all the work alone,
then its share of it, and compares."""
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from freeswim import generate, refine, upsample
from model import WanTransformer, WanVAE, load_sharded, share_tiles, share_tokens
from oracle import relative

REFERENCE = Path(__file__).parent / "reference"


def refined(transformer, case, cache_interval):
    meta = json.loads((REFERENCE / case / "meta.json").read_text())
    expected = load_file(REFERENCE / case / "expected.safetensors")
    settings = {name: meta[name] for name in ("native", "steps", "strength", "flow_shift", "guidance")}
    return refine(
        transformer, expected["encoded"], expected["text"], expected["negative"], **settings,
        scale_tokens=meta["attention_base_tokens"], generator=torch.Generator().manual_seed(meta["noise_seed"]),
        cache_interval=cache_interval,
    )


def main():
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    for case, interval in (("wide", 2), ("odd", None)):
        alone, shared = (WanTransformer.from_pretrained(REFERENCE / case / "transformer") for _ in range(2))
        sharded = load_sharded(REFERENCE / case / "transformer", "cpu", torch.float32)
        expected = refined(alone, case, interval)
        seen = []
        shared.blocks[0].ffn.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
        for transformer in (shared, sharded):
            share_tokens(transformer)
            assert relative(refined(transformer, case, interval), expected) <= 1e-5
        frames, height, width = json.loads((REFERENCE / case / "meta.json").read_text())["grid"]
        assert max(seen) <= -(-frames * height * width // ranks)  # only its own tokens
        own = sum(parameter.to_local().numel() for parameter in sharded.blocks.parameters())
        whole = sum(parameter.numel() for parameter in alone.blocks.parameters())
        assert own <= 1.2 * whole / ranks + 1000  # only its share of the weights

    config = {**alone.config, "num_attention_heads": 5, "attention_head_dim": 12}  # heads that cannot be shared evenly
    transformer, vae = WanTransformer(config).eval(), WanVAE.from_pretrained(REFERENCE / "wide" / "vae")
    text, negative = torch.randn(2, 2, 7, config["text_dim"])
    video = upsample(torch.rand(1, 3, 5, 40, 48) * 2 - 1, 264, 400)

    def results():
        draw = torch.Generator().manual_seed(1)
        base = generate(transformer, text, negative, (2, 16, 3, 10, 14), steps=3, generator=draw)
        latents = vae.encode(video)
        return base, latents, vae.decode(latents)

    expected = results()
    share_tokens(transformer)
    share_tiles(vae)
    for result, alone in zip(results(), expected):
        assert relative(result, alone) <= 1e-5
    print(f"rank {dist.get_rank()} of {ranks} agrees")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
