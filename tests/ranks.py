"""What test_parallel.py runs: `torchrun --nproc-per-node N tests/ranks.py DEVICE`. Every rank first
does all the work alone, then its share of it, and compares: on a CPU through Gloo, on GPUs (`cuda`)
through NCCL."""

import math
import sys
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
from oracle import relative, seeded
from references import REFERENCE, load, refined

from freeswim import flex_window, generate, grouped_window, upsample
from model import Block, WanTransformer, WanVAE, full_attention
from support import processes, sequence_parallel
from support.experts import Experts
from support.sequence_parallel import shard_sizes


def main():
    processes.start()
    device = processes.device_of(sys.argv[1])
    torch.backends.cudnn.allow_tf32 = False
    check_refinement("wide", 2, device)
    check_refinement("odd", None, device)
    check_base_and_vae(device)
    print(f"rank {dist.get_rank()} of {dist.get_world_size()} agrees")


def check_refinement(name, interval, device):
    """The refinement of a reference set: its result, what is sent, and who holds which weights."""
    ranks = dist.get_world_size()
    folder = REFERENCE / name / "transformer"
    case = load(name)
    case.transformer.to(device)
    case.expected = {key: value.to(device) for key, value in case.expected.items()}
    expected = refined(case, cache_interval=interval)
    whole = sum(parameter.numel() for parameter in case.transformer.blocks.parameters())

    for block, spread in product(blocks_for(device), (False, True)):
        case.transformer, window = load_shared(folder, device, spread=spread, block=block)
        settings = {"cache_interval": interval, "window_attention": window}
        assert relative(refined(case, **settings), expected) <= 1e-5
        given = [case.expected[key] for key in ("latents", "timestep", "text")]
        own_tokens = case.transformer.embed(*given)[0].shape[1]
        assert own_tokens <= math.ceil(math.prod(case.meta["grid"]) / ranks)

    steps = len(case.meta["timesteps"])
    attentions = 4 * steps if interval is None else 2 * steps + len(range(0, steps, interval))
    sent = traded(partial(refined, case, **settings))
    assert sent == attentions * formula(case.transformer, case.meta)

    blocks = case.transformer.blocks
    started = count_collectives(lambda: [block.eps for block in blocks])
    assert started == 0  # nobody talks because somebody looks at the blocks
    for block in blocks:
        block.reshard()
    own = sum(parameter.to_local().numel() for parameter in blocks.parameters())
    assert own <= 1.2 * whole / ranks + 1000  # only its share of the weights

    case.transformer, window = load_shared(folder, device, torch.bfloat16, spread=True)
    spread = refined(case, cache_interval=interval, window_attention=window)
    case.transformer, window = load_shared(folder, device, torch.bfloat16)
    shared = refined(case, cache_interval=interval, window_attention=window)
    assert relative(spread, shared) <= 1e-5  # the same weights
    case.transformer = WanTransformer.from_pretrained(folder, device, torch.bfloat16)
    alone = refined(case, cache_interval=interval)
    assert relative(shared, expected) <= 1.1 * relative(alone, expected)

    check_experts(case, folder, device, interval)
    check_exchanges_are_not_compiled(case, folder, device)


def check_base_and_vae(device):
    """`generate`, with heads that cannot be shared evenly, and the VAE."""
    torch.manual_seed(0)
    folder = REFERENCE / "wide" / "transformer"
    config = WanTransformer.from_pretrained(folder).config
    config = config | {"num_attention_heads": 5, "attention_head_dim": 12}
    alone = WanTransformer(config).eval().to(device)
    sequence = sequence_parallel.SequenceParallel(5)
    attention = sequence.attention(full_attention)
    shared = sequence_parallel.SequenceParallelTransformer(config, sequence, attention=attention)
    shared = shared.eval().to(device)
    shared.load_state_dict(alone.state_dict())
    text, negative = torch.randn(2, 2, 7, config["text_dim"]).to(device)
    expected = base_latents(alone, text, negative)
    assert relative(base_latents(shared, text, negative), expected) <= 1e-5

    folder = REFERENCE / "wide" / "vae"
    alone = WanVAE.from_pretrained(folder, device)
    shared = WanVAE.from_pretrained(folder, device, share=sequence_parallel.SharedTiles())
    video = upsample(torch.rand(1, 3, 5, 40, 48).to(device) * 2 - 1, 264, 400)
    latents = alone.encode(video)
    assert relative(shared.encode(video), latents) <= 1e-5
    assert relative(shared.decode(latents), alone.decode(latents)) <= 1e-5


def base_latents(transformer, text, negative):
    draw = seeded(1)
    return generate(transformer, text, negative, (2, 16, 3, 10, 14), steps=3, generator=draw)


def load_shared(folder, device, dtype=torch.float32, spread=False, block=Block):
    """A transformer whose tokens the ranks share, its weights too if `spread`; and the window
    attention that belongs to it."""
    heads = WanTransformer.from_pretrained(folder).heads
    sequence = sequence_parallel.SequenceParallel(heads)
    load = sequence_parallel.SequenceParallelTransformer.from_pretrained
    if spread:
        load = sequence_parallel.load_sharded
    attention = sequence.attention(full_attention)
    transformer = load(folder, device, dtype, sequence=sequence, block=block, attention=attention)
    window = flex_window if device.type == "cuda" else grouped_window
    return transformer, sequence.window_attention(window)


def blocks_for(device):
    """The plain block; on a GPU the compiled one too."""
    blocks = [Block]
    if device.type == "cuda":
        from support import compiled

        blocks.append(compiled.CompiledBlock)
    return blocks


def check_experts(case, folder, device, interval):
    """Wan2.2's way of loading one transformer after the other, with weights spread."""

    windows = {}

    def load_one(name):
        transformer, windows[name] = load_shared(folder, device, spread=True)
        return transformer

    one = load_one("transformer")
    one.boundary = 875  # so that it counts its steps as two do
    case.transformer = one
    window = windows["transformer"]
    expected = refined(case, cache_interval=interval, window_attention=window)

    def load_again(name):
        # The two share a sequence, as in the command.
        return sequence_parallel.load_sharded(
            folder, device, torch.float32, sequence=one.sequence, attention=one.full_attention
        )

    case.transformer = Experts(load_again, 875, like=one)
    again = refined(case, cache_interval=interval, window_attention=window)
    assert relative(again, expected) <= 1e-5


def check_exchanges_are_not_compiled(case, folder, device):
    """The compiler has collectives of its own, which copy what they receive once more."""
    transformer, window = load_shared(folder, device)
    for block in transformer.blocks:
        block.self_attention = torch.compile(block.self_attention, backend="eager")
    case.transformer = transformer
    refined(case, window_attention=window)
    compiled = {metrics.co_name for metrics in torch._dynamo.utils.get_compilation_metrics()}
    assert "self_attention" in compiled
    assert "all_to_all" not in compiled


def formula(transformer, meta):
    """Bytes that all ranks together send for one self-attention in every block: query, key, value
    and the result, but for what each has already: of its tokens, its heads. tests/README.md
    projects from it what more GPUs would give."""
    tokens = math.prod(meta["grid"])
    heads = transformer.heads
    own = 0
    for my_tokens, my_heads in zip(shard_sizes(tokens), shard_sizes(heads), strict=True):
        own += my_tokens * my_heads
    return 4 * len(transformer.blocks) * (tokens * heads - own) * transformer.head_dim * 4


def traded(function):
    """Bytes that all ranks together send to others in the all-to-alls of a function."""
    batch = dist.batch_isend_irecv
    sent = []

    def counted(transfers):
        for transfer in transfers:
            if transfer.op == dist.isend:
                sent.append(transfer.tensor.nbytes)
        return batch(transfers)

    dist.batch_isend_irecv = counted
    function()
    dist.batch_isend_irecv = batch
    total = torch.tensor(sum(sent))
    dist.all_reduce(total)
    return total.item()


def count_collectives(function):
    """How many collective operations a function starts."""
    with torch.profiler.profile() as profile:
        function()
    return sum("gloo:" in event.name or "nccl:" in event.name for event in profile.events())


if __name__ == "__main__":
    main()
