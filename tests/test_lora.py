"""LoRA files, merged as Diffusers merges them, or by the formula where Diffusers does not know the
format."""

import json
import math

import pytest
import torch
from command import SMALL, latents, record, run_here
from oracle import relative, seeded
from references import REFERENCE
from safetensors.torch import save_file
from test_experts import write_experts

import model
from model import WanTransformer, checkpoint_name
from support import UserError, lora

FOLDER = REFERENCE / "wide" / "transformer"
RANK = 3


def transformer():
    return WanTransformer.from_pretrained(FOLDER)


def matrices():
    """Our names of what LoRAs usually change: attention and feed-forward network of the blocks."""
    found = []
    for name, tensor in transformer().state_dict().items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            found.append(name)
    return found


def wan_name(ours):
    """By Wan's own code: blocks.0.self_attn.q, blocks.0.ffn.0, ..."""
    for part, theirs in lora.WAN_NAMES.items():
        ours = ours.replace(part, theirs)
    return ours


def draw_pairs(names=None, rank=RANK):
    """{our name: (up, down)}."""
    draw = seeded(5)
    shapes = {name: tensor.shape for name, tensor in transformer().state_dict().items()}
    pairs = {}
    for name in names or matrices():
        rows, *columns = shapes[name]
        up = torch.randn(rows, rank, generator=draw)
        down = torch.randn(rank, math.prod(columns), generator=draw)
        pairs[name] = (0.1 * up, 0.1 * down)
    return pairs


def file_of(tmp_path, entries, metadata=None, name="lora.safetensors"):
    file = tmp_path / name
    save_file({key: value.clone().contiguous() for key, value in entries.items()}, file, metadata)
    return file


def merged(*loras):
    changes = lora.find_changes(transformer(), loras)

    def adjust(name, tensor):
        return lora.merge(changes, "cpu", name, tensor)

    return WanTransformer.from_pretrained(FOLDER, adjust=adjust).state_dict()


def check(result, pairs, scale):
    """W + scale * up @ down, and all else as it was."""
    for name, tensor in transformer().state_dict().items():
        expected = tensor
        if name in pairs:
            up, down = pairs[name]
            expected = tensor + scale * (up @ down).view_as(tensor)
        assert relative(result[name], expected) <= 1e-6, name


# How each format names a matrix: the start of a name from ours, then its endings.
FORMATS = {
    "Diffusers": (lambda name: "transformer." + diffusers_name(name), "lora_A", "lora_B"),
    "PEFT": (lambda name: "base_model.model." + diffusers_name(name), "lora_A", "lora_B"),
    "PEFT with adapter": (lambda name: diffusers_name(name), "lora_A.default", "lora_B.default"),
    "Wan": (wan_name, "lora_down", "lora_up"),
    "Wan in ComfyUI": (lambda name: "diffusion_model." + wan_name(name), "lora_down", "lora_up"),
    "Wan, A and B": (lambda name: "diffusion_model." + wan_name(name), "lora_A", "lora_B"),
    "kohya": (
        lambda name: "lora_unet_" + wan_name(name).removesuffix(".weight").replace(".", "_") + ".",
        "lora_down",
        "lora_up",
    ),
}


def diffusers_name(ours):
    return checkpoint_name(WanTransformer, ours)


def entries_of(form, pairs, alpha=None):
    start, down_ending, up_ending = FORMATS[form]
    entries = {}
    for name, (up, down) in pairs.items():
        module = start(name).removesuffix("weight").removesuffix(".")
        entries[f"{module}.{down_ending}.weight"] = down
        entries[f"{module}.{up_ending}.weight"] = up
        if alpha is not None:
            entries[f"{module}.alpha"] = torch.tensor(float(alpha))
    return entries


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("alpha", [None, 2])
def test_formats_by_the_formula(tmp_path, form, alpha):
    pairs = draw_pairs()
    file = file_of(tmp_path, entries_of(form, pairs, alpha))
    scale = 1 if alpha is None else alpha / RANK
    check(merged(lora.Lora("--lora", file, 0.7)), pairs, 0.7 * scale)


@pytest.mark.parametrize(
    "form, alpha",
    [
        ("Diffusers", None),
        ("Wan in ComfyUI", None),
        ("Wan in ComfyUI", 2),
        ("Wan, A and B", None),
        ("kohya", 2),
    ],
)
@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_formats_by_diffusers(tmp_path, form, alpha, weight):
    file = file_of(tmp_path, entries_of(form, draw_pairs(), alpha))
    compare_with_diffusers(file, weight)


def compare_with_diffusers(file, weight):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    theirs = diffusers.WanTransformer3DModel.from_pretrained(FOLDER)
    pipeline = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=theirs
    )
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="one")
    pipeline.set_adapters("one", weight)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    expected = pipeline.transformer.state_dict()
    result = merged(lora.Lora("--lora", file, weight))
    changed = 0
    before = transformer().state_dict()
    for name, tensor in result.items():
        assert relative(tensor, expected[diffusers_name(name)]) <= 1e-6, name
        changed += not torch.equal(tensor, before[name])
    assert changed == len(matrices())


def test_alpha_in_the_metadata(tmp_path):
    """As Diffusers saves it."""
    config = {"transformer.r": RANK, "transformer.lora_alpha": 5}
    config["transformer.target_modules"] = ["to_q"]
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    pairs = draw_pairs(["blocks.0.self_attn.to_q.weight"])
    file = file_of(tmp_path, entries_of("Diffusers", pairs), metadata)
    check(merged(lora.Lora("--lora", file, 1.0)), pairs, 5 / RANK)


def test_differences_and_everything_else_that_files_hold(tmp_path):
    """`diff`, `diff_b` and `diff_m`, and LoRAs of other layers."""
    state = transformer().state_dict()
    draw = seeded(6)
    names = {
        "diffusion_model.blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
        "diffusion_model.blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "diffusion_model.blocks.1.ffn.0.diff_b": "blocks.1.ffn.0.bias",
        "diffusion_model.blocks.1.diff_m": "blocks.1.scale_shift_table",
        "diffusion_model.head.diff_m": "scale_shift_table",
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
        "diffusion_model.time_projection.1.diff_b": "time_proj.bias",
    }
    entries = {key: torch.randn(state[name].shape, generator=draw) for key, name in names.items()}
    pairs = draw_pairs(["proj_out.weight", "text_embedder.0.weight", "time_embedder.2.weight"])
    entries |= entries_of("Wan in ComfyUI", pairs, alpha=1)
    up, down = draw_pairs(["patch_embedding.weight"])["patch_embedding.weight"]
    shape = state["patch_embedding.weight"].shape
    entries["diffusion_model.patch_embedding.lora_up.weight"] = up.view(*up.shape, 1, 1, 1)
    entries["diffusion_model.patch_embedding.lora_down.weight"] = down.view(RANK, *shape[1:])
    result = merged(lora.Lora("--lora", file_of(tmp_path, entries), 0.5))
    for name, tensor in state.items():
        expected = tensor.clone()
        for key, changed in names.items():
            if changed == name:
                expected += 0.5 * entries[key]
        if name in pairs:
            expected += 0.5 / RANK * (pairs[name][0] @ pairs[name][1])
        if name == "patch_embedding.weight":
            expected += 0.5 * (up @ down).view(shape)
        assert relative(result[name], expected) <= 1e-6, name


def test_several_files_add_up(tmp_path):
    pairs = draw_pairs()
    one = file_of(tmp_path, entries_of("Wan", pairs))
    two = file_of(tmp_path, entries_of("kohya", pairs, alpha=1), name="two.safetensors")
    loras = (lora.Lora("--lora", one, 1.0), lora.Lora("--lora", two, -2.0))
    check(merged(*loras), pairs, 1 - 2 / RANK)


def test_half_precision_rounds_once(tmp_path):
    """The sum is made in float32 and cast at the end, although the file is bfloat16."""
    pairs = {}
    for name, (up, down) in draw_pairs().items():
        pairs[name] = (up.bfloat16(), down.bfloat16())
    file = file_of(tmp_path, entries_of("Wan", pairs))
    changes = lora.find_changes(transformer(), [lora.Lora("--lora", file, 1.0)])

    def adjust(name, tensor):
        return lora.merge(changes, "cpu", name, tensor)

    result = WanTransformer.from_pretrained(FOLDER, dtype=torch.bfloat16, adjust=adjust)
    for name, tensor in transformer().state_dict().items():
        if name in pairs:
            up, down = pairs[name]
            expected = (tensor + up.float() @ down.float()).bfloat16()
            assert torch.equal(result.state_dict()[name], expected)


# --------------------------------------------------------------------------------------------------
# What is refused, from headers alone

Q = "diffusion_model.blocks.0.self_attn.q"


def bad_files():
    """{what is wrong: (entries, metadata, words of the answer)}."""
    pairs = draw_pairs(["blocks.0.self_attn.to_q.weight"])
    good = entries_of("Wan in ComfyUI", pairs)
    up, down = pairs["blocks.0.self_attn.to_q.weight"]
    up_key = f"{Q}.lora_up.weight"
    down_key = f"{Q}.lora_down.weight"
    dora = {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})}
    rank_stabilised = {"lora_adapter_metadata": json.dumps({"transformer.use_rslora": True})}
    pattern = {"lora_adapter_metadata": json.dumps({"transformer.alpha_pattern": {"to_q": 2}})}
    return {
        "no LoRA": ({"a.weight": up}, None, ["holds no LoRA", "a.weight"]),
        "empty": ({}, None, ["holds no LoRA"]),
        "alpha alone": ({f"{Q}.alpha": torch.ones(())}, None, ["holds no LoRA"]),
        "a stray key": (good | {"a.weight": up}, None, ["a.weight fits nothing", "another model"]),
        "a block too many": (
            good | {up_key.replace("0", "9"): up},
            None,
            ["blocks.9", "fits nothing", "another model"],
        ),
        "an image model's": (
            good | {"diffusion_model.blocks.0.cross_attn.k_img.lora_up.weight": up},
            None,
            ["k_img", "another model"],
        ),
        "a text encoder's": (good | {"lora_te_q.lora_up.weight": up}, None, ["lora_te_q"]),
        "up misshapen": (good | {up_key: up[:-1]}, None, [up_key, "does not fit"]),
        "down misshapen": (good | {down_key: down[:, :-1]}, None, ["does not fit"]),
        "ranks differ": (good | {down_key: down[:-1]}, None, ["do not fit each other"]),
        "up is a vector": (good | {up_key: up[:, 0]}, None, ["do not fit each other"]),
        "half a pair": ({up_key: up}, None, [up_key, "not the down matrix"]),
        "the other half": ({down_key: down}, None, [down_key, "not the up matrix"]),
        "alpha without matrices": (
            good | {"diffusion_model.blocks.0.self_attn.k.alpha": torch.ones(())},
            None,
            ["k.alpha has no matrices"],
        ),
        "alpha a vector": (good | {f"{Q}.alpha": torch.ones(2)}, None, [".alpha", "one number"]),
        "difference misshapen": (good | {f"{Q}.diff": up}, None, [f"{Q}.diff", "should be"]),
        "integers": (good | {up_key: up.long()}, None, ["I64", "floating-point"]),
        "twice the same": (
            good | {f"{Q}.lora_B.weight": up},
            None,
            ["are the same"],
        ),
        "DoRA": (good | {f"{Q}.dora_scale": up}, None, ["DoRA", "not supported"]),
        "DoRA of PEFT": (
            good | {f"{Q}.lora_magnitude_vector": up},
            None,
            ["DoRA", "not supported"],
        ),
        "LoHa": ({f"{Q}.hada_w1_a": up}, None, ["LoHa", "not supported"]),
        "LoKr": ({f"{Q}.lokr_w1": up}, None, ["LoKr", "not supported"]),
        "LoCon": (good | {f"{Q}.lora_mid.weight": up}, None, ["LoCon", "not supported"]),
        "DoRA by metadata": (good, dora, ["DoRA", "not supported"]),
        "rsLoRA without alpha": (good, rank_stabilised, ["use_rslora", "no lora_alpha"]),
        "alpha pattern without alpha": (good, pattern, ["alpha_pattern", "no lora_alpha"]),
        "metadata broken": (good, {"lora_adapter_metadata": "{"}, ["metadata"]),
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_files_are_refused_from_their_headers(tmp_path, monkeypatch, name):
    entries, metadata, named = bad_files()[name]
    file = file_of(tmp_path, entries, metadata)
    opened = model.safe_open

    class HeaderOnly:
        def __init__(self, *arguments):
            self.tensors = opened(*arguments)

        def __enter__(self):
            self.file = self.tensors.__enter__()
            return self

        def __exit__(self, *error):
            self.tensors.__exit__(*error)

        def get_tensor(self, name):
            pytest.fail("a tensor was read")

        def __getattr__(self, name):
            return getattr(self.file, name)

    net = transformer()
    monkeypatch.setattr(model, "safe_open", HeaderOnly)
    with pytest.raises(UserError) as caught:
        lora.find_changes(net, [lora.Lora("--lora", file, 1.0)])
    message = str(caught.value)
    assert message.startswith(f"--lora {file}: ")
    assert "\n" not in message
    assert all(words in message for words in named), message


@pytest.mark.parametrize("content", [b"", b"hello" * 100, bytes(100)])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    file = tmp_path / "lora.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"--lora {file}"):
        lora.find_changes(transformer(), [lora.Lora("--lora", file, 1.0)])


@pytest.mark.parametrize(
    "text, weight",
    [("x.safetensors", 1), ("x.safetensors:0.5", 0.5), ("x.safetensors:-1", -1), ("x:2e-1", 0.2)],
)
def test_weights_of_files(tmp_path, monkeypatch, text, weight):
    monkeypatch.chdir(tmp_path)
    for name in ("x.safetensors", "x"):
        (tmp_path / name).touch()
    found = lora.find("--lora", lora.absolute("--lora", text))
    assert found.weight == weight
    assert found.file.parent == tmp_path


@pytest.mark.parametrize("weight", ["", "high", "nan", "inf", "1,5"])
def test_weights_that_are_no_numbers(tmp_path, weight):
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(UserError, match="is not a number"):
        lora.absolute("--lora", f"{tmp_path}/x.safetensors:{weight}")


def test_files_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def hf_hub_download(repository, path):
        asked.append((repository, path))
        return str(tmp_path / "cached.safetensors")

    monkeypatch.setattr(lora, "hf_hub_download", hf_hub_download)
    name = "owner/name/folder/file.safetensors"
    written = lora.absolute("--lora", f"{name}:0.5")
    assert asked == []  # it is fetched after all other checks
    found = lora.find("--lora", written)
    assert asked == [("owner/name", "folder/file.safetensors")]
    assert found == lora.Lora("--lora", tmp_path / "cached.safetensors", 0.5, name)
    monkeypatch.setattr(lora, "hf_hub_download", lambda *_: (_ for _ in ()).throw(OSError("off")))
    with pytest.raises(UserError, match="--lora owner/name/file.safetensors: no such file, and"):
        lora.find("--lora", "owner/name/file.safetensors")
    with pytest.raises(UserError, match="--lora nowhere.safetensors: no such file"):
        lora.absolute("--lora", "nowhere.safetensors")


# --------------------------------------------------------------------------------------------------
# Files as public trainers write them


def changed_names(form, pairs):
    """The same LoRA with the names of a trainer."""
    plain = {}
    for ours, (up, down) in pairs.items():
        wan = wan_name(ours).removesuffix(".weight")
        diffusers = diffusers_name(ours).removesuffix(".weight")
        start, down_ending, up_ending = {
            "two prefixes": ("base_model.model.diffusion_model." + wan, "lora_A", "lora_B"),
            "DiffSynth": ("pipe.dit." + wan, "lora_A.default", "lora_B.default"),
            "a named adapter": ("transformer." + diffusers, "lora_A.my_style", "lora_B.my_style"),
            "VideoX-Fun": ("lora_unet__" + wan.replace(".", "_"), "lora_down", "lora_up"),
            "kohya of Diffusers": (
                "lora_unet_" + diffusers.replace(".", "_"),
                "lora_down",
                "lora_up",
            ),
        }[form]
        plain[f"{start}.{down_ending}.weight"] = down
        plain[f"{start}.{up_ending}.weight"] = up
        plain[f"{start}.alpha"] = torch.tensor(2, dtype=torch.int64)  # whole numbers too
    return plain


@pytest.mark.parametrize(
    "form",
    ["two prefixes", "DiffSynth", "a named adapter", "VideoX-Fun", "kohya of Diffusers"],
)
def test_names_of_public_trainers(tmp_path, form):
    pairs = draw_pairs()
    file = file_of(tmp_path, changed_names(form, pairs))
    check(merged(lora.Lora("--lora", file, 0.7)), pairs, 0.7 * 2 / RANK)


@pytest.mark.parametrize(
    "metadata, scale",
    [
        ({"lora_alpha": "6"}, 6 / RANK),
        ({"alpha": "6", "rank": str(RANK)}, 6 / RANK),
        ({"alpha": "6"}, 1),  # of what rank, it does not say
        ({"something": "else"}, 1),
    ],
)
def test_alpha_in_a_files_own_header(tmp_path, metadata, scale):
    pairs = draw_pairs()
    file = file_of(tmp_path, entries_of("Wan", pairs), metadata)
    check(merged(lora.Lora("--lora", file, 1.0)), pairs, scale)


# PEFT's settings: LoraConfig's arguments. Patterns are for names of Diffusers' modules.
PEFT_SETTINGS = {
    "alpha": {"r": 4, "lora_alpha": 16},
    "rsLoRA": {"r": 4, "lora_alpha": 16, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 16,
        "rank_pattern": {"attn1.to_q": 2, "blocks.1.attn1.to_k": 8},
        "alpha_pattern": {"attn1.to_q": 32, "^blocks.0.attn2.to_v": 2},
    },
    "patterns and rsLoRA": {
        "r": 4,
        "lora_alpha": 16,
        "use_rslora": True,
        "rank_pattern": {"to_q": 2},
        "alpha_pattern": {"to_k": 32},
    },
    "bias": {"r": 4, "lora_alpha": 16, "lora_bias": True},
}


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize("name", PEFT_SETTINGS)
def test_what_peft_saves_is_merged_as_peft_merges_it(tmp_path, name, form):
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    base = diffusers.WanTransformer3DModel.from_pretrained(FOLDER)
    config = peft.LoraConfig(
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        init_lora_weights=False,
        **PEFT_SETTINGS[name],
    )
    torch.manual_seed(3)
    theirs = peft.get_peft_model(base, config)
    for key, parameter in theirs.named_parameters():
        if "lora_B" in key and key.endswith("bias"):
            torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs.merge_and_unload().state_dict()

    given = tmp_path / "adapter"
    if form == "file":
        given = given / "adapter_model.safetensors"
    result = merged(lora.find("--lora", lora.absolute("--lora", str(given))))
    before = transformer().state_dict()
    changed = 0
    for ours, tensor in result.items():
        assert relative(tensor, expected[diffusers_name(ours)]) <= 1e-6, ours
        changed += not torch.equal(tensor, before[ours])
    assert changed >= 8 * 2


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"peft_type": "LOHA"}, "is a LOHA"),
        ({"use_dora": True}, "use_dora (DoRA)"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"lora_alpha": "x"}, "lora_alpha 'x'"),
        ({"alpha_pattern": {"(": 2}, "lora_alpha": 2}, "no pattern"),
    ],
)
def test_settings_of_peft_that_are_not_supported(tmp_path, settings, named):
    pairs = draw_pairs(["blocks.0.self_attn.to_q.weight"])
    file = file_of(tmp_path, entries_of("PEFT", pairs), name="adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        merged(lora.find("--lora", str(file)))
    assert named in str(caught.value)
    assert str(caught.value).startswith(f"--lora {file}")


def test_a_changed_adapter_config_is_another_lora(tmp_path):
    pairs = draw_pairs(["blocks.0.self_attn.to_q.weight"])
    file = file_of(tmp_path, entries_of("PEFT", pairs), name="adapter_model.safetensors")
    fingerprints = set()
    for alpha in (1, 2):
        config = json.dumps({"lora_alpha": alpha})
        (tmp_path / "adapter_config.json").write_text(config, encoding="utf-8")
        fingerprints.add(lora.find("--lora", str(file)).fingerprint())
    assert len(fingerprints) == 2


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda up, down: {"lora_up.weight": up[:, :0], "lora_down.weight": down[:0]}, "rank 0"),
        (
            lambda up, down: {
                "lora_up.weight": up.to(torch.float8_e4m3fn),
                "lora_down.weight": down.to(torch.float8_e4m3fn),
            },
            "float8",
        ),
    ],
)
def test_matrices_that_cannot_be_merged(tmp_path, change, named):
    up, down = draw_pairs(["blocks.0.self_attn.to_q.weight"])["blocks.0.self_attn.to_q.weight"]
    file = file_of(tmp_path, {f"{Q}.{end}": x for end, x in change(up, down).items()})
    with pytest.raises(UserError, match=named):
        merged(lora.Lora("--lora", file, 1.0))


@pytest.mark.parametrize("part", ["lora_up.weight", "lora_down.weight", "alpha"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_the_loras(tmp_path, part, value):
    pairs = draw_pairs(["blocks.0.self_attn.to_q.weight"])
    entries = entries_of("Wan in ComfyUI", pairs, alpha=1)
    entries[f"{Q}.{part}"].view(-1)[0] = value
    file = file_of(tmp_path, entries)
    with pytest.raises(UserError, match=f"--lora {file}: .*{part} holds numbers"):
        merged(lora.Lora("--lora", file, 1.0))


def test_a_weight_that_overflows_is_the_loras(tmp_path):
    file = file_of(tmp_path, entries_of("Wan", draw_pairs()))
    with pytest.raises(UserError, match=f"--lora {file}: changes .* is its weight, 1e\\+39, too"):
        merged(lora.Lora("--lora", file, 1e39))


@pytest.mark.parametrize("metadata", ["[" * 5000, '{"transformer.lora_alpha": [1]}', "3", "{"])
def test_metadata_that_is_none(tmp_path, metadata):
    pairs = draw_pairs(["blocks.0.self_attn.to_q.weight"])
    file = file_of(tmp_path, entries_of("Wan", pairs), {"lora_adapter_metadata": metadata})
    with pytest.raises(UserError, match="its metadata"):
        merged(lora.Lora("--lora", file, 1.0))


@pytest.mark.parametrize(
    "key, named",
    [
        ("lora_te1_text_model_q.lora_up.weight", "for the text encoder"),
        ("text_encoder.block.0.lora_A.weight", "for the text encoder"),
        ("diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight", "image layers"),
        ("diffusion_model.img_emb.proj.1.diff", "image layers"),
    ],
)
def test_keys_of_other_models_are_called_so(tmp_path, key, named):
    pairs = draw_pairs(["blocks.0.self_attn.to_q.weight"])
    file = file_of(tmp_path, entries_of("Wan", pairs) | {key: torch.ones(2, 2)})
    with pytest.raises(UserError, match=named):
        merged(lora.Lora("--lora", file, 1.0))


# --------------------------------------------------------------------------------------------------
# The command


def lora_for(checkpoint, file, seed=0):
    net = WanTransformer.from_pretrained(checkpoint / "transformer")
    draw = seeded(seed)
    entries = {}
    for ours, tensor in net.state_dict().items():
        if ".self_attn.to_" in ours and tensor.ndim == 2:
            name = wan_name(ours).removesuffix(".weight")
            entries[f"{name}.lora_up.weight"] = torch.randn(len(tensor), 2, generator=draw)
            entries[f"{name}.lora_down.weight"] = torch.randn(2, len(tensor), generator=draw)
    save_file(entries, file)
    return file


def test_the_command(checkpoint, tmp_path, capsys):
    file = lora_for(checkpoint, tmp_path / "my lora.safetensors")
    arguments = ["--model", checkpoint, "--size", "224x144", "--frames", 5, "--device", "cpu"]
    run_here(*arguments, "--steps", 4, "--output", tmp_path / "without")
    capsys.readouterr()
    run_here(*arguments, "--steps", 4, "--output", tmp_path / "with", "--lora", f"{file}:0.5")
    assert "distilled" not in capsys.readouterr().err  # --steps was typed
    assert latents(tmp_path / "with") != latents(tmp_path / "without")
    content = record(tmp_path / "with")
    assert content["settings"]["lora"] == [f"{file}:0.5"]
    assert f"lora {file}" in content["fingerprints"]

    before = latents(tmp_path / "with")
    (tmp_path / "with" / "state" / "refine.safetensors").unlink()
    run_here("--resume", tmp_path / "with")
    assert latents(tmp_path / "with") == before
    with pytest.raises(UserError, match="--lora cannot change"):
        run_here("--resume", tmp_path / "with", "--lora", file)
    lora_for(checkpoint, file, seed=1)
    with pytest.raises(UserError, match="its lora .* is not what it began with"):
        run_here("--resume", tmp_path / "with")
    file.unlink()
    with pytest.raises(UserError, match="no such file"):
        run_here("--resume", tmp_path / "with")


def test_a_weight_of_many_digits_is_kept(checkpoint, tmp_path):
    file = lora_for(checkpoint, tmp_path / "lora.safetensors")
    arguments = ["--model", checkpoint, "--size", "192x128", "--frames", 1, "--device", "cpu"]
    weight = "0.12345678901234567"
    run_here(*arguments, "--steps", 2, "--output", tmp_path / "run", "--lora", f"{file}:{weight}")
    before = latents(tmp_path / "run")
    (tmp_path / "run" / "state" / "refine.safetensors").unlink()
    run_here("--resume", tmp_path / "run")
    assert latents(tmp_path / "run") == before
    assert record(tmp_path / "run")["settings"]["lora"] == [f"{file}:{float(weight)!r}"]


def test_a_lora_that_overflows_ends_the_run(checkpoint, tmp_path):
    file = lora_for(checkpoint, tmp_path / "lora.safetensors")
    arguments = ["--model", checkpoint, "--size", "192x128", "--frames", 1, "--device", "cpu"]
    with pytest.raises(UserError, match='in the stage "base", latents are not finite'):
        run_here(*arguments, "--output", tmp_path / "run", "--lora", f"{file}:1e36")
    assert not [*(tmp_path / "run").glob("*.mp4")]


def test_notes_on_experts(checkpoint, tmp_path, capsys):
    folder = write_experts(checkpoint, tmp_path / "model")
    file = lora_for(checkpoint, tmp_path / "lora.safetensors")
    few = ["--model", folder, "--size", "192x128", "--frames", 1, "--steps", 2, "--device", "cpu"]
    run_here(*few, "--lora", file, "--output", tmp_path / "one")
    assert "the other has none without --lora-2" in capsys.readouterr().err
    shifts = ["--flow-shift", 1000, "--base-shift", 1000]
    run_here(*few, "--lora-2", file, *shifts, "--output", tmp_path / "two")
    assert "--lora-2 has no effect: no step is left" in capsys.readouterr().err


def test_a_line_tells_how_distilled_loras_want_to_be_run(checkpoint, tmp_path, capsys):
    file = lora_for(checkpoint, tmp_path / "lora.safetensors")
    arguments = ["--model", checkpoint, "--size", "192x128", "--frames", 1, "--device", "cpu"]
    run_here(*arguments, "--output", tmp_path / "run", "--lora", file)
    line = "--steps 4 --guidance 1 --flow-shift 5 --base-shift 5"
    assert line in capsys.readouterr().err
    run_here(*arguments, "--output", tmp_path / "few", "--lora", file, *line.split())
    settings = record(tmp_path / "few")["settings"]
    assert (settings["steps"], settings["guidance"]) == (4, 1)
    assert (settings["flow_shift"], settings["base_shift"]) == (5, 5)


def test_each_expert_has_its_own(checkpoint, tmp_path):
    folder = write_experts(checkpoint, tmp_path / "model")
    file = lora_for(checkpoint, tmp_path / "lora.safetensors")
    arguments = ["--model", folder, *SMALL, "--flow-shift", 9]
    results = set()
    for index, options in enumerate([[], ["--lora", file], ["--lora-2", file]]):
        run_here(*arguments, "--output", tmp_path / str(index), *options)
        results.add(latents(tmp_path / str(index)))
    assert len(results) == 3
    with pytest.raises(UserError, match="--lora-2: this model has one transformer"):
        run_here("--model", checkpoint, "--lora-2", file, "--output", tmp_path / "run")
