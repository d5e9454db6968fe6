"""Folders of other programs, with lexical weights and token vectors: opened and written, with equal scores there."""

import json
from pathlib import Path

import pytest
import torch
from embedder_samples import TEXTS
from safetensors.torch import load_file, save_file
from tiny_models import ENGLISH, HIDDEN
from transformers import AutoModel, AutoTokenizer, BertTokenizer

from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.open import open_embedder
from rag_retrieval.models.representations import Representations
from rag_retrieval.models.token_batch import make_batch


@torch.no_grad()
def representations_of(model: EmbeddingModel, texts=TEXTS, kind=None) -> Representations:
    return model.eval()(make_batch(model.text_encoder.encode(texts, kind)))


def dict_of_each(lexical) -> list[dict[int, float]]:
    """Of each text its ids with their weights, those of 0 left out."""
    parts = zip(*(values.split(lexical.counts.tolist()) for values in (lexical.ids, lexical.weights)), strict=True)
    return [{i: w for i, w in zip(ids.tolist(), weights.tolist(), strict=True) if w} for ids, weights in parts]


def assert_close(found: list[dict[int, float]], expected: list[dict[int, float]], atol: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        ids = one.keys() | other.keys()
        assert max((abs(one.get(i, 0) - other.get(i, 0)) for i in ids), default=0) < atol


# ---- BGE-M3 ---------------------------------------------------------------------------------------------

DENSE_ST = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": True},
    "sentence_bert_config.json": {"max_seq_length": 48},
}


def bge_m3(base: str, folder: Path, colbert_dim: int = 24) -> Path:
    """As FlagEmbedding saves it: the model, the files of sentence-transformers, the two linear layers."""
    AutoModel.from_pretrained(base).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    for name, values in DENSE_ST.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    torch.manual_seed(3)
    torch.save(torch.nn.Linear(HIDDEN, colbert_dim).state_dict(), folder / "colbert_linear.pt")
    torch.save(torch.nn.Linear(HIDDEN, 1).state_dict(), folder / "sparse_linear.pt")
    return folder


@torch.no_grad()
def slow_bge_m3(folder: Path, text: str) -> tuple[torch.Tensor, dict[int, float], torch.Tensor]:
    """One text, token by token, as the paper's section 3.1 and FlagEmbedding's layers have it."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    ids = tokenizer(text, truncation=True, max_length=48)["input_ids"]
    states = model(torch.tensor([ids])).last_hidden_state[0]
    sparse, colbert = (torch.load(folder / f"{name}_linear.pt") for name in ("sparse", "colbert"))
    weights: dict[int, float] = {}
    for token, state in zip(ids, states, strict=True):
        weight = max(0.0, float(sparse["weight"][0] @ state + sparse["bias"]))
        if weight and token not in tokenizer.all_special_ids:
            weights[token] = max(weight, weights.get(token, 0.0))
    vectors = [colbert["weight"] @ state + colbert["bias"] for state in states[1:]]
    return states[0], weights, torch.stack([vector / vector.norm() for vector in vectors])


@pytest.mark.parametrize("family", ["bert", "xlm_roberta"])
def test_a_bge_m3_folder_gives_the_three_representations(base_folders, tmp_path, family):
    folder = bge_m3(base_folders[family], tmp_path / "theirs")
    model = open_embedder(folder)
    assert model.packs and model.settings.representations == ("dense", "lexical", "multi_vector")
    assert model.settings.pooling == "cls" and model.settings.multi_vector_mean
    found = representations_of(model)
    expected = [slow_bge_m3(folder, text) for text in TEXTS]
    torch.testing.assert_close(found.dense, torch.stack([each[0] for each in expected]), atol=1e-5, rtol=0)
    assert_close(dict_of_each(found.lexical), [each[1] for each in expected])
    vectors = found.multi_vector.vectors.split(found.multi_vector.counts.tolist())
    for one, (_, _, other) in zip(vectors, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "ours")
    names = {file.name for file in (tmp_path / "ours").iterdir()}
    assert {"colbert_linear.pt", "sparse_linear.pt", "modules.json", "embedder_config.json"} <= names
    for one, other in zip(slow_bge_m3(tmp_path / "ours", ENGLISH[0]), slow_bge_m3(folder, ENGLISH[0]), strict=True):
        assert one == other if isinstance(one, dict) else torch.equal(one, other)
    again = open_embedder(tmp_path / "ours")
    assert again.settings == model.settings and not again.new_parameters
    assert torch.equal(representations_of(again).multi_vector.vectors, found.multi_vector.vectors)


def test_outputs_that_are_not_asked_for_are_not_computed(base_folders, tmp_path):
    model = open_embedder(bge_m3(base_folders["bert"], tmp_path))
    batch = make_batch(model.text_encoder.encode(TEXTS))
    with torch.no_grad():
        everything, dense = model(batch), model(batch, outputs=["dense"])
    assert dense.lexical is None and dense.multi_vector is None
    torch.testing.assert_close(dense.dense, everything.dense, atol=1e-5, rtol=0)


# ---- SparseEncoder of sentence-transformers -------------------------------------------------------------


def open_sparse_elsewhere(folder):
    from sentence_transformers import SparseEncoder

    return SparseEncoder(str(folder), device="cpu")


def sparse_elsewhere(encoded: torch.Tensor) -> list[dict[int, float]]:
    return [{int(i): float(row[i]) for i in row.nonzero()[:, 0]} for row in encoded.to_dense()]


def assert_equal_sparse_elsewhere(model: EmbeddingModel, folder: Path, texts=TEXTS) -> None:
    other = open_sparse_elsewhere(folder)
    for kind, encode in (("query", other.encode_query), ("document", other.encode_document), (None, other.encode)):
        assert_close(dict_of_each(representations_of(model, texts, kind).lexical), sparse_elsewhere(encode(texts)))


@pytest.mark.parametrize("family", ["bert", "xlm_roberta", "qwen2"])
def test_splade_alone_opens_as_a_sparse_encoder(base_folders, tmp_path, family):
    options = {"representations": ["lexical"], "lexical": "splade", "max_length": 40}
    model = EmbeddingModel.from_pretrained(base_folders[family], prompts={"query": "query: "}, **options)
    assert model.packs and not model.token_heads
    model.save_pretrained(tmp_path)
    assert_equal_sparse_elsewhere(model, tmp_path)
    pooling = json.loads((tmp_path / "1_SpladePooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == model.config.vocab_size
    again = open_embedder(tmp_path)
    assert again.settings == model.settings
    assert_close(dict_of_each(representations_of(again).lexical), dict_of_each(representations_of(model).lexical), 1e-7)


def test_a_sparse_encoder_of_sentence_transformers_is_opened(base_folders, tmp_path):
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    transformer = Transformer(base_folders["bert"], transformer_task="fill-mask", max_seq_length=24)
    theirs = SparseEncoder(modules=[transformer, SpladePooling("max")], prompts={"query": "q: "}, device="cpu")
    theirs.save(str(tmp_path / "theirs"))
    model = open_embedder(tmp_path / "theirs")
    assert (model.settings.representations, model.settings.lexical) == (("lexical",), "splade")
    assert_equal_sparse_elsewhere(model, tmp_path / "theirs")
    file = tmp_path / "theirs" / "1_SpladePooling" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pooling_strategy": "sum"}))
    with pytest.raises(ValueError, match="pooling_strategy 'sum'"):
        open_embedder(tmp_path / "theirs")


# ---- ColBERT: MultiVectorEncoder of sentence-transformers, PyLate, Stanford -----------------------------


def open_multi_vector_elsewhere(folder):
    from sentence_transformers import MultiVectorEncoder

    return MultiVectorEncoder(str(folder), device="cpu")


def assert_equal_multi_vector_elsewhere(model: EmbeddingModel, folder: Path, texts=TEXTS) -> None:
    """Vectors, and MaxSim of all pairs."""
    other, vectors = open_multi_vector_elsewhere(folder), {}
    for kind, encode in (("query", other.encode_query), ("document", other.encode_document)):
        found = representations_of(model, texts, kind).multi_vector
        vectors[kind] = found.vectors.split(found.counts.tolist())
        for one, expected in zip(vectors[kind], encode(texts), strict=True):
            torch.testing.assert_close(one, expected, atol=2e-5, rtol=0)
    scores = [[(q @ d.T).amax(1).sum() for d in vectors["document"]] for q in vectors["query"]]
    expected = other.similarity(other.encode_query(texts), other.encode_document(texts))
    torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", ["bert", "xlm_roberta", "qwen2"])
def test_token_vectors_alone_open_as_a_multi_vector_encoder(base_folders, tmp_path, family):
    model = EmbeddingModel.from_pretrained(
        base_folders[family],
        representations=["multi_vector"],
        colbert_dim=16,
        max_length=40,
        query_max_length=20,
        attend_to_expansion_tokens=family == "xlm_roberta",
    )
    model.save_pretrained(tmp_path)
    assert_equal_multi_vector_elsewhere(model, tmp_path)
    again = open_embedder(tmp_path)
    assert again.settings == model.settings and not again.new_parameters
    assert torch.equal(representations_of(again).multi_vector.vectors, representations_of(model).multi_vector.vectors)
    options = json.loads((tmp_path / "config_sentence_transformers.json").read_text())
    expected = {"model_type": "ColBERT", "query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 20}
    assert expected.items() <= options.items()


def save_multi_vector_encoder(base: str, folder: Path, **options) -> None:
    """As sentence-transformers 6 saves its own."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    plain = {"bias": False, "activation_function": torch.nn.Identity(), "use_residual": True}
    plain |= {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    layers = [Dense(HIDDEN, 24, **plain), Dense(24, 24, **plain)]
    modules = [Transformer(base, **options), *layers, MultiVectorMask([".", "?"]), Normalize("token_embeddings")]
    MultiVectorEncoder(modules=modules, prompts={"query": "q: ", "document": "d: "}, device="cpu").save(str(folder))


@pytest.mark.parametrize("expansion", [{"strategy": "fixed", "attend": True, "length": 20}, None])
def test_a_multi_vector_encoder_of_sentence_transformers_is_opened(base_folders, tmp_path, expansion):
    lengths = {"document_length": 30} | ({} if expansion else {"query_length": 12})
    save_multi_vector_encoder(base_folders["bert"], tmp_path / "theirs", query_expansion=expansion, **lengths)
    model = open_embedder(tmp_path / "theirs")
    query_length = 20 if expansion else 12
    assert model.settings.is_colbert and model.settings.max_lengths == {"document": 30, "query": query_length}
    assert model.settings.skiplist_words == (".", "?") and model.settings.query_expansion == bool(expansion)
    assert_equal_multi_vector_elsewhere(model, tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    assert_equal_multi_vector_elsewhere(model, tmp_path / "ours")


def test_a_multi_vector_encoder_that_is_not_known_is_refused(base_folders, tmp_path):
    save_multi_vector_encoder(base_folders["bert"], tmp_path)
    with pytest.raises(ValueError, match="from 2 layers, which cannot be saved beside other representations"):
        EmbeddingModel.from_pretrained(tmp_path, representations=["dense", "multi_vector"])
    file = tmp_path / "3_MultiVectorMask" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"keep_only_token_ids": [5]}))
    with pytest.raises(ValueError, match="keep_only_token_ids"):
        open_embedder(tmp_path)


def pylate(base: str, folder: Path, **options) -> Path:
    """As PyLate 1.3 saves it: plain added tokens, a Dense, the rest in one file."""
    model, tokenizer = AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["[Q] ", "[D] "])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    torch.manual_seed(4)
    (folder / "1_Dense").mkdir()
    save_file({"linear.weight": torch.randn(16, HIDDEN)}, folder / "1_Dense" / "model.safetensors")
    values = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Dense", "type": "pylate.models.Dense.Dense"},
        ],
        "1_Dense/config.json": {
            "in_features": HIDDEN, "out_features": 16, "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity", "use_residual": False,
        },
        "sentence_bert_config.json": {"max_seq_length": 23, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {}, "default_prompt_name": None, "similarity_fn_name": "MaxSim", "query_prefix": "[Q] ",
            "document_prefix": "[D] ", "query_length": 24, "document_length": 30, "attend_to_expansion_tokens": False,
            "skiplist_words": [".", ",", "?"], "do_query_expansion": True, "model_type": "ColBERT",
        } | options,
    }  # fmt: skip
    for name, content in values.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@torch.no_grad()
def slow_pylate(folder: Path, text: str, is_query: bool) -> torch.Tensor:
    """The prefix token inserted after cls, queries filled up with mask tokens that none attends to."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    length, prefix = (24, "[Q] ") if is_query else (30, "[D] ")
    cls, *ids = tokenizer(text, truncation=True, max_length=length - 1)["input_ids"]
    ids = [cls, tokenizer.convert_tokens_to_ids(prefix), *ids]
    attended = len(ids)
    ids += [tokenizer.mask_token_id] * (length - len(ids) if is_query else 0)
    mask = torch.tensor([[place < attended for place in range(len(ids))]])
    states = model(torch.tensor([ids]), attention_mask=mask.long()).last_hidden_state[0]
    skipped = [] if is_query else tokenizer.convert_tokens_to_ids([".", ",", "?"])
    weight = load_file(folder / "1_Dense" / "model.safetensors")["linear.weight"]
    vectors = [weight @ state for state, token in zip(states, ids, strict=True) if token not in skipped]
    return torch.stack([vector / vector.norm() for vector in vectors])


def test_a_colbert_of_pylate_is_opened(base_folders, tmp_path):
    folder = pylate(base_folders["bert"], tmp_path / "theirs")
    model = open_embedder(folder)
    assert model.packs and model.settings.prompts == {"query": "[Q] ", "document": "[D] "}
    for kind in ("query", "document"):
        found = representations_of(model, TEXTS, kind).multi_vector
        for text, vectors in zip(TEXTS, found.vectors.split(found.counts.tolist()), strict=True):
            torch.testing.assert_close(vectors, slow_pylate(folder, text, kind == "query"), atol=1e-5, rtol=0)
    assert_equal_multi_vector_elsewhere(model, folder)
    model.save_pretrained(tmp_path / "ours")
    assert_equal_multi_vector_elsewhere(model, tmp_path / "ours")
    torch.testing.assert_close(
        slow_pylate(tmp_path / "ours", ENGLISH[0], True), slow_pylate(folder, ENGLISH[0], True), atol=1e-6, rtol=0
    )


def test_a_colbert_of_pylate_without_expansion_and_prefixes(base_folders, tmp_path):
    folder = pylate(base_folders["bert"], tmp_path, do_query_expansion=False, query_prefix="", document_prefix="")
    model = open_embedder(folder)
    assert not model.settings.query_expansion and not model.settings.prompts
    assert_equal_multi_vector_elsewhere(model, folder)


def test_a_colbert_of_stanford_is_opened(base_folders, tmp_path):
    folder, base = tmp_path / "theirs", AutoModel.from_pretrained(base_folders["bert"])
    markers = {50: "[unused0]", 51: "[unused1]"}  # in the vocabulary, but no special tokens
    vocabulary = AutoTokenizer.from_pretrained(base_folders["bert"]).get_vocab()
    tokenizer = BertTokenizer(vocab={markers.get(place, token): place for token, place in vocabulary.items()})
    folder.mkdir()
    base.config.architectures = ["HF_ColBERT"]
    base.config.save_pretrained(folder), tokenizer.save_pretrained(folder)
    weights = {f"bert.{name}": value for name, value in base.state_dict().items()}
    torch.manual_seed(5)
    save_file(weights | {"linear.weight": torch.randn(16, HIDDEN)}, folder / "model.safetensors", {"format": "pt"})
    values = {"query_maxlen": 24, "doc_maxlen": 30, "attend_to_mask_tokens": False}
    (folder / "artifact.metadata").write_text(json.dumps(values))
    model = open_embedder(folder)
    assert model.settings.prompts == {"query": "[unused0] ", "document": "[unused1] "}
    assert model.text_encoder.encode(["water"], "query")[0].ids[1] == 50 and model.settings.query_expansion
    assert_equal_multi_vector_elsewhere(model, folder)
    model.save_pretrained(tmp_path / "ours")
    assert_equal_multi_vector_elsewhere(model, tmp_path / "ours")
    assert open_embedder(tmp_path / "ours").settings == model.settings
