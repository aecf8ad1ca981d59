"""What only a GPU can show: the FlexAttention window, in float32 and bfloat16, and the refinement
that runs on it."""

import os

import pytest
import torch
import torch.nn.functional as F
from command import ROOT, run
from oracle import relative, seeded, token_mask, window_attention
from references import REFERENCE, REFINEMENTS, interval_of, load, refined

from freeswim import flex_window, generate, grouped_window
from model import WanTransformer, WanVAE, build, full_attention
from support import attention, compiled, media, offload
from support.experts import Experts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def exact_float32():
    """No TF32 in convolutions either (in matrix products it is off by default): float32 shall mean
    float32."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def tokens(grid, head_dim, heads=3):
    frames, height, width = grid
    draw = seeded(frames)
    return torch.randn(3, 2, heads, frames * height * width, head_dim, generator=draw).cuda()


# A kernel is compiled for each, in about 15 seconds.
@pytest.mark.parametrize(
    "prepare, border, grid, window, head_dim",
    [
        (flex_window, "inward", (3, 8, 14), (5, 7), 32),
        (flex_window, "inward", (2, 9, 7), (3, 5), 20),
        (flex_window, "inward", (2, 5, 33), (3, 9), 64),
        (flex_window, "inward", (3, 6, 10), (9, 3), 32),  # the window larger than one axis
        (flex_window, "inward", (2, 4, 5), (7, 9), 32),  # and than both
        (flex_window, "inward", (4, 7, 9), (1, 1), 32),
        (flex_window, "inward", (21, 9, 8), (5, 5), 128),
        (flex_window, "clipped", (3, 8, 14), (5, 7), 32),
        (flex_window, "clipped", (3, 6, 10), (9, 3), 32),
        (attention.tuned_window, "inward", (2, 9, 7), (3, 5), 20),
        (attention.tuned_window, "inward", (3, 6, 10), (9, 3), 32),
        (attention.tuned_window, "inward", (2, 4, 5), (7, 9), 32),
        (attention.tuned_window, "inward", (21, 9, 8), (5, 5), 128),
        (attention.tuned_window, "clipped", (3, 8, 14), (5, 7), 32),
    ],
)
def test_windows_are_the_textbooks(prepare, border, grid, window, head_dim):
    query, key, value = tokens(grid, head_dim)
    expected = window_attention(
        query, key, value, token_mask(grid, window, border).cuda(), scale=0.37
    )
    attend = prepare(grid, window, scale=0.37, border=border, device="cuda")
    assert relative(attend(query, key, value), expected) <= 1e-5


@pytest.mark.parametrize("prepare", [flex_window, attention.tuned_window])
def test_windows_in_bfloat16(prepare):
    grid = (5, 45, 60)
    window = (31, 53)
    query, key, value = tokens(grid, head_dim=128, heads=1)
    mask = token_mask(grid, window, "inward").cuda()
    expected = window_attention(query, key, value, mask)
    query = query.bfloat16()
    key = key.bfloat16()
    value = value.bfloat16()
    attend = prepare(grid, window, device="cuda")
    attended = attend(query, key, value)
    assert attended.dtype == torch.bfloat16
    error = relative(attended, expected)
    assert error <= 1e-2
    assert error <= 1.2 * relative(
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask), expected
    )


@pytest.mark.parametrize("prepare", [flex_window, attention.tuned_window])
def test_windows_at_the_size_they_are_for(monkeypatch, prepare):
    """1088 x 1920 x 81: equal to the groups, and far from holding a mask of (T*H*W)^2, which would
    take 27 GiB; even after more grids than torch.compile, unasked, compiles one function for."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    prepare((1, 4, 8), (3, 3), device="cuda")(*tokens((1, 4, 8), head_dim=16))
    grid = (21, 68, 120)
    window = (31, 53)
    query, key, value = torch.randn(
        3, 1, 1, 21 * 68 * 120, 128, device="cuda", dtype=torch.bfloat16
    )
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attended = prepare(grid, window, device="cuda")(query, key, value)
    assert torch.cuda.max_memory_allocated() - before <= 2 * 2**30
    assert (
        relative(attended, grouped_window(grid, window, device="cuda")(query, key, value)) <= 1e-2
    )


@pytest.mark.parametrize("name, tensor", REFINEMENTS)
def test_whole_refinement(name, tensor):
    case = on_gpu(name)
    case.transformer.cuda()
    assert (
        relative(refined(case, cache_interval=interval_of(tensor)), case.expected[tensor]) <= 1e-3
    )


def on_gpu(name):
    case = load(name)
    case.expected = {key: value.cuda() for key, value in case.expected.items()}
    return case


def load_streamed(device):
    folder = REFERENCE / "odd" / "transformer"
    return offload.load_streamed(folder, torch.device(device), torch.float32)


def test_cache_and_weights_on_the_cpu():
    """Copied beside the computation, they are the same, bit for bit."""
    case = on_gpu("odd")
    streamed = on_gpu("odd")
    case.transformer.cuda()
    streamed.transformer = load_streamed("cuda")
    expected = refined(case, cache_interval=3)
    for _ in range(3):
        assert torch.equal(
            refined(case, cache_interval=3, cross_attention_cache=offload.CacheOnCPU("cuda")),
            expected,
        )
        assert torch.equal(refined(streamed, cache_interval=3), expected)


def cuda_command(tmp_path, checkpoint, *more, **environment):
    """Run the whole command on the GPU with empty compiler caches; its messages."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": tmp_path / "inductor", "TRITON_CACHE_DIR": tmp_path / "t"}
    changes = {name: str(value) for name, value in (caches | environment).items()}
    arguments = ["--model", checkpoint, "--output", tmp_path / "run", "--size", "224x144"]
    arguments += ["--frames", "5", "--steps", "4", "--device", "cuda", "--prompt", "a red fish"]
    status, _, errors = run(*arguments, *more, env=changes)
    assert status == 0, errors
    assert (tmp_path / "run" / "freeswim.mp4").is_file()
    return "\n".join(errors)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_without_a_c_compiler_the_whole_command_finishes(checkpoint, tmp_path, dtype):
    """As in a slim container: Triton cannot build its launcher."""
    errors = cuda_command(tmp_path, checkpoint, "--dtype", dtype, CC="/nonexistent")
    assert "window attention by groups of queries" in errors
    assert "transformer blocks run uncompiled" in errors


def test_without_triton_the_whole_command_finishes(checkpoint, tmp_path):
    """As on Windows."""
    (tmp_path / "site" / "triton").mkdir(parents=True)
    (tmp_path / "site" / "triton" / "__init__.py").write_text(
        "raise ImportError('no Triton here')\n"
    )
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    errors = cuda_command(tmp_path, checkpoint, PYTHONPATH=path)
    assert "window attention by groups of queries" in errors
    assert "transformer blocks run uncompiled" in errors


def has_flash_attention():
    try:
        import flash_attn.cute  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.skipif(not has_flash_attention(), reason="needs flash-attn-4")
def test_full_attention_through_flash_attention():
    """At 1080p, for more heads than are computed at once, as near to float32 as cuDNN is."""
    draw = torch.Generator("cuda").manual_seed(0)
    shape = (3, 1, 6, 21 * 34 * 60, 128)
    parts = torch.randn(shape, generator=draw, device="cuda", dtype=torch.bfloat16)
    sample = slice(1000, 1200)
    query, key, value = parts.float()
    expected = F.scaled_dot_product_attention(query[:, :, sample], key, value, scale=0.1)
    flash = attention.flash_full_attention(*parts, scale=0.1)[:, :, sample]
    cudnn = F.scaled_dot_product_attention(*parts, scale=0.1)[:, :, sample]
    assert relative(flash, expected) <= 1.2 * relative(cudnn, expected)
    chosen = attention.choose_full_attention(torch.device("cuda"), torch.bfloat16, 128)
    assert chosen is attention.flash_full_attention


@pytest.mark.parametrize("tiles_at_once", [1, 4])
def test_the_fast_vae_is_the_vae(tiles_at_once):
    folder = REFERENCE / "wide" / "vae"
    device = torch.device("cuda")
    plain = WanVAE.from_pretrained(folder, device)
    video = torch.rand(1, 3, 9, 400, 600, generator=seeded(0)) * 2 - 1
    latents = plain.encode(video)
    decoded = plain.decode(latents)
    quick = compiled.load_vae(folder, device, False, tiles_at_once=tiles_at_once)
    assert type(quick) is compiled.FastVAE
    assert relative(quick.encode(video), latents) <= 1e-5
    assert relative(quick.decode(latents), decoded) <= 1e-5


def test_the_bundled_vae_in_float16_is_within_a_grey_level():
    """This is why float16 is the default."""
    device = torch.device("cuda")
    folder = ROOT / "tiny" / "vae"
    plain = WanVAE.from_pretrained(folder, device)
    half = compiled.load_vae(folder, device, True, tiles_at_once=4)
    clip = media.read_clip(ROOT / "tiny" / "sample.webp", 17).frames
    video = media.to_video(clip)[:, :, : (len(clip) - 1) // 4 * 4 + 1, :256, :384]
    latents = plain.encode(video)
    assert relative(half.encode(video), latents) <= 1e-2
    difference = (half.decode(latents) - plain.decode(latents)).abs() * 127.5
    print(f"grey levels: mean {difference.mean():.3f}, largest {difference.max():.1f}")
    assert difference.mean() < 1


def test_a_cropped_video_is_written_without_a_copy(tmp_path):
    """A GPU that the video half fills can write it."""
    video = torch.zeros(1, 3, 81, 1088, 1920, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    media.write_video(tmp_path / "out.mp4", media.center_crop(video, 1080, 1920), 16)
    of_frame = 3 * 1080 * 1920 * 4  # bytes
    assert torch.cuda.max_memory_allocated() - before <= 4 * 4 * of_frame  # in four threads


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_copies_use_the_streams_of_their_device():
    """With --device cuda:1, while cuda:0 is current."""
    case = on_gpu("odd")
    streamed = on_gpu("odd")
    for each in (case, streamed):
        each.expected = {key: value.to("cuda:1") for key, value in each.expected.items()}
    case.transformer.to("cuda:1")
    streamed.transformer = load_streamed("cuda:1")
    expected = refined(case, cache_interval=3)
    for _ in range(3):
        cache = offload.CacheOnCPU("cuda:1")
        assert torch.equal(refined(case, cache_interval=3, cross_attention_cache=cache), expected)
        assert torch.equal(refined(streamed, cache_interval=3), expected)


def test_experts_are_not_in_memory_together():
    """By the peak of allocated memory."""
    folder = REFERENCE / "wide" / "transformer"
    like = build(WanTransformer, folder)
    config = like.config | {"num_attention_heads": 16, "attention_head_dim": 64, "num_layers": 8}

    def load_one(name):
        with torch.device("cuda"):
            return WanTransformer(config).eval().requires_grad_(False)

    one = load_one("transformer")
    size = sum(parameter.numel() * parameter.element_size() for parameter in one.parameters())
    del one
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    text = torch.randn(1, 12, config["text_dim"], device="cuda")
    experts = Experts(load_one, 875, like)
    generate(experts, text, text, (1, 16, 1, 8, 8), steps=6, flow_shift=5.0)
    assert torch.cuda.max_memory_allocated() - before <= 1.3 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fast_window_works_here(dtype, capsys):
    found = attention.choose_window(torch.device("cuda"), dtype, 128)
    assert found is not grouped_window
    assert capsys.readouterr().err.startswith("window attention by ")


def test_a_compiled_transformer_is_the_same():
    case = on_gpu("odd")
    case.transformer.cuda()
    expected = refined(case, cache_interval=2)
    device = torch.device("cuda")
    block = compiled.choose_block(device, torch.float32)
    assert block is compiled.CompiledBlock
    # flash-attn-4 has no float32
    assert attention.choose_full_attention(device, torch.float32, 20) is full_attention
    folder = REFERENCE / "odd" / "transformer"
    case.transformer = WanTransformer.from_pretrained(folder, "cuda", block=block)
    assert relative(refined(case, cache_interval=2), expected) <= 1e-4
