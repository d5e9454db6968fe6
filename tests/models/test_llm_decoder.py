"""LLMDecoder: the score at the special token, pad tokens of every kind, saved folders, formats kept."""

import logging

import pytest
import torch
from tiny_models import CHINESE, ENGLISH, qwen2_tokenizer, save_tiny, tiny_llama, tiny_qwen2
from tokenizers import Tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from rag_retrieval import LLMDecoder
from rag_retrieval.models.loading import NEW_PAD_TOKEN
from rag_retrieval.models.settings import RerankerSettings, read_settings

PAIRS = [
    (ENGLISH[1], ENGLISH[2]),
    (CHINESE[0], CHINESE[1]),
    ("water", " ".join(ENGLISH)),
    (ENGLISH[0], "".join(CHINESE)),
    ("", ""),
    ("what ends here?</s> <|im_end|>", "a text that names <|endoftext|> and <unk>"),
]
SHAPE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.2
)
SHARED = SHAPE | dict(num_key_value_heads=1, bos_token_id=None, max_position_embeddings=1024)
GPT2 = dict(n_embd=32, n_layer=2, n_head=2, initializer_range=0.2, bos_token_id=None)
OTHERS = {
    "qwen3": lambda **ids: Qwen3Config(**SHARED, **ids, head_dim=16),
    "mistral": lambda **ids: MistralConfig(**SHARED, **ids, sliding_window=16),
    "gemma": lambda **ids: GemmaConfig(**SHARED, **ids, head_dim=16),
    "gemma2": lambda **ids: Gemma2Config(**SHARED, **ids, head_dim=16, sliding_window=16),
    "gemma3": lambda **ids: Gemma3TextConfig(**SHARED, **ids, head_dim=16, sliding_window=16),
    "phi3": lambda **ids: Phi3Config(**SHARED, **ids),
    "gpt2": lambda **ids: GPT2Config(**GPT2, **ids),
}
# name: (maker, options of the maker, special token)
PADDING = {
    "qwen2": (tiny_qwen2, {}, "\nrelevance"),
    "qwen2 without a pad token": (tiny_qwen2, {"pad_token": None}, "\nrelevance"),
    "qwen2, pad is eos": (tiny_qwen2, {"pad_token": "<|im_end|>"}, "\nrelevance"),
    "qwen2, special is eos": (tiny_qwen2, {}, "<|im_end|>"),
    "qwen2, special is pad": (tiny_qwen2, {}, "<|endoftext|>"),
    "qwen2, special is eos and pad": (tiny_qwen2, {"pad_token": "<|im_end|>"}, "<|im_end|>"),
    "qwen2, special is eos, no pad": (tiny_qwen2, {"pad_token": None}, "<|im_end|>"),
    "llama without a pad token": (tiny_llama, {}, "\nrelevance"),
    "llama, pad is eos": (tiny_llama, {"pad_token": "</s>"}, "\nrelevance"),
    "llama, special is eos": (tiny_llama, {}, "</s>"),
    "llama, special is eos and pad": (tiny_llama, {"pad_token": "</s>"}, "</s>"),
    "llama, special is bos": (tiny_llama, {}, "<s>"),
    "llama, special is unk": (tiny_llama, {"pad_token": "<unk>"}, "<unk>"),
}


@pytest.fixture(scope="module")
def folder_of(model_folders, tmp_path_factory):
    """`folder_of(family)`: a tiny folder with a score head."""
    root, made = tmp_path_factory.mktemp("decoders"), dict(model_folders)

    def folder(family: str) -> str:
        if family not in made:
            tokenizer = qwen2_tokenizer()
            ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
            config = OTHERS[family](vocab_size=len(tokenizer), **ids)
            made[family] = save_tiny(root / family, config, tokenizer, head_labels=1)
        return made[family]

    return folder


def transformers_scores(folder, scorer: LLMDecoder, side: str) -> torch.Tensor:
    """The folder in transformers, its own head and the same ids, padded at one side by its own tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [pair.ids.tolist() for pair in scorer.pair_encoder.encode(PAIRS)]
    inputs = tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model.eval()(**inputs, position_ids=positions).logits[:, 0]


def assert_scores_hold(scorer: LLMDecoder, folder) -> None:
    """Batch, single pairs, a saved copy and transformers with either padding side all agree."""
    scores = scorer.compute_score(PAIRS)
    single = torch.cat([scorer.compute_score(pair) for pair in PAIRS])
    torch.testing.assert_close(scores, single, atol=1e-5, rtol=0)
    assert scores.std() > 0.05
    scorer.save_pretrained(folder)
    assert torch.equal(LLMDecoder.from_pretrained(folder).compute_score(PAIRS), scores)
    for side in ("right", "left"):
        torch.testing.assert_close(transformers_scores(folder, scorer, side), scores, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", PADDING)
def test_scores_hold_with_every_kind_of_pad_token(tmp_path, case):
    make, options, special_token = PADDING[case]
    folder = make(tmp_path / "base", head_labels=1, **options)
    scorer = LLMDecoder.from_pretrained(folder, special_token=special_token)
    pad = scorer.tokenizer.pad_token_id
    assert pad == scorer.config.pad_token_id and pad != scorer.pair_encoder.template.suffix[-1]
    assert_scores_hold(scorer, tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.pad_token_id == pad and saved.padding_side == "right"


def test_scores_hold_when_the_only_special_token_is_scored_and_padding_needs_a_new_one(tmp_path):
    backend = qwen2_tokenizer().backend_tokenizer.to_str().replace('"special":true', '"special":false')
    only_eos = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend), eos_token="<|im_end|>")
    ids = dict(eos_token_id=only_eos.eos_token_id, pad_token_id=only_eos.eos_token_id)
    config = OTHERS["qwen3"](vocab_size=len(only_eos), **ids)
    folder = save_tiny(tmp_path / "base", config, only_eos, head_labels=1)
    scorer = LLMDecoder.from_pretrained(folder, special_token="<|im_end|>")
    assert scorer.tokenizer.pad_token == NEW_PAD_TOKEN
    assert_scores_hold(scorer, tmp_path / "saved")


@pytest.mark.parametrize("family", OTHERS)
def test_scores_hold_in_every_family(folder_of, tmp_path, family):
    assert_scores_hold(LLMDecoder.from_pretrained(folder_of(family)), tmp_path)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_score_is_the_head_at_the_last_token_of_the_special_token(folder_of, family):
    scorer = LLMDecoder.from_pretrained(folder_of(family), special_token=" relevance of it")
    pair = scorer.pair_encoder.encode([(ENGLISH[0], ENGLISH[1])])[0]
    suffix = scorer.pair_encoder.template.suffix
    assert len(suffix) > 1 and pair.ids[-len(suffix) :].tolist() == suffix
    with torch.no_grad():
        hidden = scorer.model.model(torch.from_numpy(pair.ids[None]).long()).last_hidden_state[0]
        expected = hidden[len(pair) - 1] @ scorer.model.score.weight[0]
    torch.testing.assert_close(scorer.compute_score((ENGLISH[0], ENGLISH[1]))[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_pair_cut_to_max_length_still_ends_with_the_special_token_and_scores_alike_in_a_batch(
    folder_of, family
):
    scorer = LLMDecoder.from_pretrained(folder_of(family), max_length=32)
    long = (" ".join(ENGLISH), " ".join(ENGLISH[::-1]))
    pair = scorer.pair_encoder.encode([long])[0]
    suffix = scorer.pair_encoder.template.suffix
    assert len(pair) == 32 and pair.truncated and pair.ids[-len(suffix) :].tolist() == suffix
    batch = scorer.compute_score([("a", "b"), long])
    torch.testing.assert_close(batch[1:], scorer.compute_score(long), atol=1e-5, rtol=0)


def warnings_in(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_formats_seq_special_token_and_max_length_come_back_without_the_caller(folder_of, tmp_path, caplog):
    formats = dict(
        query_format="问题: {} ?", document_format="<d>{}</d>", seq=" | ", special_token=" yes or no:"
    )
    scorer = LLMDecoder.from_pretrained(folder_of("qwen2"), **formats, max_length=77)
    scorer.save_pretrained(tmp_path)
    assert read_settings(str(tmp_path)) == RerankerSettings("llm_decoder", 77, **formats)
    with caplog.at_level(logging.WARNING):
        again = LLMDecoder.from_pretrained(tmp_path)
    assert warnings_in(caplog) == []
    assert again.settings == scorer.settings and again.pair_encoder.max_length == 77
    assert torch.equal(again.compute_score(PAIRS), scorer.compute_score(PAIRS))


def test_defaults_are_the_documented_ones(folder_of):
    settings = LLMDecoder.from_pretrained(folder_of("qwen2")).settings
    assert settings == RerankerSettings("llm_decoder", 1024, "query: {}", "document: {}", "\n", "\nrelevance")


@pytest.mark.parametrize(
    "name,value",
    [
        ("query_format", "q: {}"),
        ("document_format", "d: {}"),
        ("seq", " "),
        ("special_token", "?"),
        ("max_length", 64),
    ],
)
def test_an_explicit_argument_wins_over_the_saved_one_with_a_warning(
    folder_of, tmp_path, caplog, name, value
):
    LLMDecoder.from_pretrained(folder_of("qwen2")).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        changed = LLMDecoder.from_pretrained(tmp_path, **{name: value})
    assert len(warnings_in(caplog)) == 1
    assert f"{name}={value!r} given, but the model was saved with" in caplog.text
    fresh = LLMDecoder.from_pretrained(folder_of("qwen2"), **{name: value})
    assert torch.equal(changed.compute_score(PAIRS), fresh.compute_score(PAIRS))


def test_arguments_equal_to_the_saved_ones_give_no_warning(folder_of, tmp_path, caplog):
    LLMDecoder.from_pretrained(folder_of("qwen2")).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        LLMDecoder.from_pretrained(tmp_path, query_format="query: {}", seq="\n", special_token="\nrelevance")
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("name", ["query_format", "document_format"])
def test_a_format_without_braces_is_refused_before_the_model_loads(folder_of, tmp_path, name):
    LLMDecoder.from_pretrained(folder_of("qwen2")).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{name} must contain {{}} exactly once"):
        LLMDecoder.from_pretrained(tmp_path, **{name: "text:"})
