"""What only a GPU can show: the FlexAttention window, in float32 and bfloat16, and the refinement
that runs on it."""

import os

import pytest
import torch
import torch.nn.functional as F
from command import run
from oracle import relative, token_mask, window_attention
from references import REFERENCE, REFINEMENTS, interval_of, load, refined

from freeswim import flex_window, grouped_window
from support import fast, memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def exact_float32():
    """No TF32 in convolutions either (in matrix products it is off by default): float32 shall mean
    float32."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def tokens(grid, head_dim, heads=3):
    frames, height, width = grid
    draw = torch.Generator().manual_seed(frames)
    return torch.randn(3, 2, heads, frames * height * width, head_dim, generator=draw).cuda()


@pytest.mark.parametrize("border", ["inward", "clipped"])
@pytest.mark.parametrize(
    "grid, window, head_dim",
    [
        ((3, 8, 14), (5, 7), 32),
        ((2, 9, 7), (3, 5), 20),
        ((2, 5, 33), (3, 9), 64),
        ((3, 6, 10), (9, 3), 32),  # the window larger than one axis
        ((2, 4, 5), (7, 9), 32),  # and than both
        ((4, 7, 9), (1, 1), 32),
        ((21, 9, 8), (5, 5), 128),
    ],
)
@pytest.mark.parametrize("prepare", [flex_window, fast.tuned_window])
def test_windows_are_the_textbooks(prepare, grid, window, head_dim, border):
    query, key, value = tokens(grid, head_dim)
    expected = window_attention(
        query, key, value, token_mask(grid, window, border).cuda(), scale=0.37
    )
    attend = prepare(grid, window, scale=0.37, border=border, device="cuda")
    assert relative(attend(query, key, value), expected) <= 1e-5


@pytest.mark.parametrize("border", ["inward", "clipped"])
@pytest.mark.parametrize(
    "grid, window, head_dim", [((21, 9, 8), (5, 5), 32), ((5, 45, 60), (31, 53), 128)]
)
@pytest.mark.parametrize("prepare", [flex_window, fast.tuned_window])
def test_windows_in_bfloat16(prepare, grid, window, head_dim, border):
    query, key, value = tokens(grid, head_dim, heads=1)
    mask = token_mask(grid, window, border).cuda()
    expected = window_attention(query, key, value, mask)
    query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    attend = prepare(grid, window, border=border, device="cuda")
    attended = attend(query, key, value)
    assert attended.dtype == torch.bfloat16
    error = relative(attended, expected)
    assert error <= 1e-2
    assert error <= 1.2 * relative(
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask), expected
    )


@pytest.mark.parametrize("prepare", [flex_window, fast.tuned_window])
def test_windows_at_the_size_they_are_for(monkeypatch, prepare):
    """1088 x 1920 x 81: equal to the groups, and far from holding a mask of (T*H*W)^2, which would
    take 27 GiB; even after more grids than torch.compile, unasked, compiles one function for."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    prepare((1, 4, 8), (3, 3), device="cuda")(*tokens((1, 4, 8), head_dim=16))
    grid, window = (21, 68, 120), (31, 53)
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


def test_features_and_weights_on_the_cpu():
    """Copied beside the computation, they are the same, bit for bit."""
    case, streamed = on_gpu("odd"), on_gpu("odd")
    case.transformer.cuda()
    memory.stream_blocks(streamed.transformer, torch.device("cuda"))
    expected = refined(case, cache_interval=3)
    for _ in range(3):
        assert torch.equal(
            refined(case, cache_interval=3, cross_attention_cache=memory.CacheOnCPU("cuda")),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fast_window_works_here(dtype, capsys):
    found = fast.window_for(torch.device("cuda"), dtype, 128)
    assert found is not grouped_window
    assert capsys.readouterr().err.startswith("window attention by ")


def test_a_compiled_transformer_is_the_same():
    case = on_gpu("odd")
    case.transformer.cuda()
    expected = refined(case, cache_interval=2)
    cls = fast.transformer_for(torch.device("cuda"), torch.float32, 20)
    assert cls is fast.CompiledTransformer  # flash-attn-4 has no float32
    folder = REFERENCE / "odd" / "transformer"
    case.transformer = fast.CompiledTransformer.from_pretrained(folder, "cuda")
    assert relative(refined(case, cache_interval=2), expected) <= 1e-4
