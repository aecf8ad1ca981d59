"""The UMT5 encoder against transformers' UMT5EncoderModel, tokenizer and prompts against Diffusers'
WanPipeline."""

import pytest
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from oracle import relative, seeded
from parity import peak_memory, randomise, write_checkpoint
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

from model import (
    TextEncoder,
    checkpoint_name,
    clean_prompt,
    encode_prompt,
    load_tokenizer,
    tokenize,
)

CONFIG = dict(
    d_model=64,
    d_kv=16,
    num_heads=6,
    d_ff=112,
    num_layers=3,
    vocab_size=500,
    feed_forward_proj="gated-gelu",
    relative_attention_num_buckets=32,
    relative_attention_max_distance=128,
)

LENGTHS = [
    512,
    1,
    300,
    37,
]  # tokens of text in a row of 512: far beyond the 128 where relative positions saturate


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A random encoder, sharded so that even one layer lies in several files."""
    folder = tmp_path_factory.mktemp("text_encoder")
    model = randomise(UMT5EncoderModel(UMT5Config(**CONFIG)))
    for block in model.encoder.block:
        block.layer[
            0
        ].SelfAttention.relative_attention_bias.weight.data *= (
            5  # positions matter as much as contents
        )
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 4
    return folder


@torch.no_grad()
def reference(folder, ids, mask, dtype):
    model = UMT5EncoderModel.from_pretrained(folder, torch_dtype=dtype)
    return model(ids, mask).last_hidden_state.float()


@torch.no_grad()
def ours(folder, ids, mask, dtype):
    return TextEncoder.from_pretrained(folder, dtype=dtype)(ids, mask).float()


def random_texts():
    ids = torch.randint(3, CONFIG["vocab_size"], (len(LENGTHS), 512), generator=seeded(5))
    mask = (torch.arange(512) < torch.tensor(LENGTHS)[:, None]).long()
    return ids * mask, mask


def test_float32(encoder_folder):
    ids, mask = random_texts()
    expected, result = (run(encoder_folder, ids, mask, torch.float32) for run in (reference, ours))
    for row, length in enumerate(LENGTHS):
        assert relative(result[row, :length], expected[row, :length]) <= 1e-5


def test_bfloat16(encoder_folder):
    """No farther from the float32 result than transformers, give or take a fifth."""
    ids, mask = random_texts()
    exact = reference(encoder_folder, ids, mask, torch.float32)
    theirs, result = (run(encoder_folder, ids, mask, torch.bfloat16) for run in (reference, ours))
    for row, length in enumerate(LENGTHS):
        error, allowed = (relative(x[row, :length], exact[row, :length]) for x in (result, theirs))
        print(
            f"{length} tokens: relative error in bfloat16 {error:.5f}, transformers' {allowed:.5f}"
        )
        assert 0 < error <= 1.2 * allowed


def test_padding_is_not_seen(encoder_folder):
    """A text has the same embeddings whatever follows it and however long its row is."""
    ids, mask = random_texts()
    other = torch.where(mask == 1, ids, 499)
    result, same = (ours(encoder_folder, tokens, mask, torch.float32) for tokens in (ids, other))
    for row, length in enumerate(LENGTHS):
        alone = ours(
            encoder_folder, ids[row : row + 1, :length], mask[row : row + 1, :length], torch.float32
        )
        assert relative(same[row, :length], result[row, :length]) == 0
        assert relative(alone[0], result[row, :length]) <= 1e-5


def test_forward_leaves_nothing_in_memory(encoder_folder):
    encoder = TextEncoder.from_pretrained(encoder_folder)
    ids, mask = random_texts()
    first = encoder(ids, mask)
    assert all(parameter.is_meta for parameter in encoder.parameters())
    assert torch.equal(encoder(ids, mask), first)


STREAM = """
encoder = model.TextEncoder.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
ids = torch.arange(0, 32000, 1000)[None]
print(encoder(ids, torch.ones_like(ids)).shape)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Half a gigabyte of encoder: its folder, and the bytes of all, of the embedding table and of
    one layer."""
    folder = tmp_path_factory.mktemp("large")
    config = UMT5Config(
        d_model=512, d_kv=64, num_heads=8, d_ff=2048, num_layers=24, vocab_size=32000
    ).to_dict()
    with torch.device("meta"):
        model = TextEncoder(config)

    def size(part):
        return sum(4 * parameter.numel() for parameter in part.parameters())

    shapes = {
        checkpoint_name(TextEncoder, name): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    return (
        folder,
        write_checkpoint(folder, config, shapes, shards=8),
        size(model.shared),
        size(model.layers[0]),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_streamed(large, dtype):
    """The peak is the embedding table and two layers at most, in float32 as they lie in the file:
    pages of the file count while it is mapped, and a cast makes a second, smaller, copy of what is
    in use."""
    folder, total, table, layer = large
    peak = peak_memory(STREAM, folder, dtype)
    print(
        f"{dtype}: peak {peak / 1e6:.0f} MB of {total / 1e6:.0f}; table "
        f"{table / 1e6:.0f}, layer {layer / 1e6:.0f}"
    )
    assert layer / 2 < peak <= table + 2 * layer < total / 4


# --------------------------------------------------------------------------------------------------

TEXTS = [
    "A cat walks on the grass, realistic.",
    "Two fish swim over a sandy floor!",
    "“Quotes” & <brackets>; dashes —",
    "一只猫在草地上行走,写实风格。",
    "過曝，靜態，細節模糊",
    "Café, naïve, Übung",
    "emoji 🐟🐠 and more",
    "3.5 x 4 = 14",
]

PROMPTS = {
    "plain": "A cat walks on the grass, realistic.",
    "curly quotes": "“Two” cats in ‘comfy’ gear… it’s fine",
    "full-width": "一只猫，在草地上：行走！（写实）１２３ＡＢＣ",
    "ligatures": "ﬁsh ﬂoat ﬀ ½ № ™",
    "entities": "fish &amp; chips &lt;b&gt; &quot;x&quot; &#39;y&#39; &eacute; &nbsp;.",
    "escaped twice": "fish &amp;amp; chips &amp;lt;b&amp;gt; &amp;#39;",
    "escaped thrice": "&amp;amp;lt;",
    # ftfy resolves nothing beside a tag
    "escaped twice, and a tag": "<b>fish</b> &amp;amp; chips &amp;lt; bread",
    "emoji": "🐟🐠 a family 👩‍👩‍👧 swims 👍🏽",
    "mojibake": "CafÃ© naÃ¯ve â€œquotesâ€\x9d âœ” schÃ¶n",
    "white space": " \t two \n\n lines\r\nand\u00a0more \u3000 \u2003 ",
    "control": "a\x00b\x07c\x1b[31md\u200be\ufefff",
    "special": "a cat</s> and <pad> a <extra_id_0> dog <unk>",
    "empty": "",
    "only spaces": "  \n\t ",
    "long": "A cat walks on the grass, 过曝，静态 & more. " * 80,
    "one long word": "grass" * 700,
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """A small tokenizer of UMT5's kind, trained on the spot: Unigram, <pad> 0, </s> 1, <unk> 2."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=350,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=10).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_cleaned(name):
    assert clean_prompt(PROMPTS[name]) == prompt_clean(PROMPTS[name])


def test_tokens(tokenizer_folder):
    """All prompts at once, as transformers pads and cuts them: 512 tokens, the end of text always
    kept."""
    theirs = T5TokenizerFast.from_pretrained(tokenizer_folder)
    expected = theirs(
        [prompt_clean(prompt) for prompt in PROMPTS.values()],
        padding="max_length",
        max_length=512,
        truncation=True,
        return_tensors="pt",
    )
    ids, mask = tokenize(load_tokenizer(tokenizer_folder), list(PROMPTS.values()))
    assert ids.dtype == mask.dtype == torch.int64
    for row, name in enumerate(PROMPTS):
        assert torch.equal(ids[row], expected.input_ids[row]), name
        assert torch.equal(mask[row], expected.attention_mask[row]), name
    lengths = dict(zip(PROMPTS, mask.sum(dim=1).tolist(), strict=True))
    assert (
        lengths["empty"] == lengths["only spaces"] == 1 and lengths["long"] == 512
    )  # the cases are what they say
    assert 1 < lengths["plain"] < 512


def test_prompt_embeddings_are_the_pipelines(encoder_folder, tokenizer_folder):
    pipeline = WanPipeline(
        tokenizer=T5TokenizerFast.from_pretrained(tokenizer_folder),
        text_encoder=UMT5EncoderModel.from_pretrained(encoder_folder),
        transformer=None,
        vae=None,
        scheduler=None,
    )
    prompts = list(PROMPTS.values())
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=512
        )
    tokenizer = load_tokenizer(tokenizer_folder)
    embeddings = encode_prompt(TextEncoder.from_pretrained(encoder_folder), tokenizer, prompts)
    ends = tokenize(tokenizer, prompts)[1].sum(dim=1)
    for row, name in enumerate(PROMPTS):
        assert relative(embeddings[row], expected[row]) <= 1e-5, name
        assert (
            embeddings[row, ends[row] :].eq(0).all()
            and embeddings[row, : ends[row]].ne(0).any(dim=-1).all()
        ), name
