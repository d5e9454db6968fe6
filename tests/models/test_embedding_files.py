"""Folders of embedding models: of sentence-transformers, of known models, plain, damaged; and what ours hold."""

import json
import shutil

import pytest
import torch
from embedder_samples import (
    FAMILIES,
    LEGACY_POOLING,
    PROMPTS,
    TEXTS,
    assert_equal_elsewhere,
    copy_as,
    save_by_sentence_transformers,
    vectors_of,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import ENGLISH

from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.embedding_files import KNOWN_EMBEDDERS
from rag_retrieval.models.open import open_embedder
from rag_retrieval.models.options import POOLINGS, EmbedderOptions


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("pooling", LEGACY_POOLING)
def test_a_folder_of_sentence_transformers_opens_with_equal_vectors(base_folders, pooling, legacy, tmp_path):
    save_by_sentence_transformers(base_folders["xlm_roberta"], tmp_path, pooling, PROMPTS, legacy=legacy)
    model = EmbeddingModel.from_pretrained(tmp_path)
    assert model.settings.max_length == 24 and model.settings.prompts == PROMPTS
    assert_equal_elsewhere(model, tmp_path)


def test_a_decoder_of_sentence_transformers_is_asked_as_there(base_folders, tmp_path):
    save_by_sentence_transformers(base_folders["qwen2"], tmp_path, "lasttoken", PROMPTS)
    # an empty text has no token there, and its vector depends on its neighbours
    assert_equal_elsewhere(EmbeddingModel.from_pretrained(tmp_path), tmp_path, [text for text in TEXTS if text])


def test_a_decoder_that_asks_for_eos_gets_it(base_folders, tmp_path):
    save_by_sentence_transformers(base_folders["qwen2"], tmp_path, "lasttoken")
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_eos_token": True}))
    encoder = EmbeddingModel.from_pretrained(tmp_path).text_encoder
    assert {text.ids[-1] for text in encoder.encode(TEXTS)} == {encoder.tokenizer.eos_token_id}


def test_dense_modules_are_opened_and_saved(base_folders, tmp_path):
    from sentence_transformers.base.modules.dense import Dense

    dense = [Dense(32, 48), Dense(48, 8, bias=False, activation_function=torch.nn.Identity())]
    save_by_sentence_transformers(base_folders["bert"], tmp_path / "theirs", "mean", dense=dense)
    model = EmbeddingModel.from_pretrained(tmp_path / "theirs")
    assert model.dim == 8
    assert_equal_elsewhere(model, tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    assert_equal_elsewhere(model, tmp_path / "ours")
    assert torch.equal(vectors_of(EmbeddingModel.from_pretrained(tmp_path / "ours")), vectors_of(model))


def test_a_reranker_is_refused(model_folders):
    with pytest.raises(ValueError, match="is a reranker"):
        EmbeddingModel.from_pretrained(model_folders["bert"])


def test_a_plain_encoder_pools_by_the_mean_with_one_warning(base_folders, caplog):
    model = open_embedder(base_folders["bert"])
    assert model.settings.pooling == "mean" and not model.training
    assert [record.getMessage() for record in caplog.records if record.name.startswith("rag_retrieval")] == [
        f"{base_folders['bert']} does not say how it pools, and is taken to pool by the mean; give pooling"
    ]


def test_options_say_what_a_plain_folder_does_not(base_folders, caplog):
    options = EmbedderOptions(pooling="last", prompts={"query": "ask: "}, max_length=33, normalize=False)
    model = open_embedder(base_folders["qwen2"], options)
    settings = model.settings
    assert (settings.pooling, settings.prompts, settings.max_length) == ("last", {"query": "ask: "}, 33)
    assert not settings.normalize and model.text_encoder.encode(["a"])[0].ids[-1] == model.tokenizer.eos_token_id
    assert not [record for record in caplog.records if record.name.startswith("rag_retrieval")]


def test_an_unknown_decoder_must_be_told_how_it_pools(base_folders):
    with pytest.raises(ValueError, match="give pooling"):
        open_embedder(base_folders["qwen2"])


@pytest.mark.parametrize(
    ("name", "pooling", "prompts"),
    [
        ("bge-small-zh-v1.5", "cls", {"query": "为这个句子生成表示以用于检索相关文章："}),
        ("multilingual-e5-small", "mean", {"query": "query: ", "document": "passage: "}),
        ("bce-embedding-base_v1", "cls", {}),
    ],
)
def test_a_known_model_is_asked_as_its_card_says(base_folders, tmp_path, name, pooling, prompts):
    settings = open_embedder(copy_as(base_folders["bert"], name, tmp_path)).settings
    assert (settings.pooling, settings.prompts) == (pooling, prompts)
    cached = tmp_path / f"models--owner--{name}" / "snapshots" / "0123"
    shutil.copytree(base_folders["bert"], cached)
    assert open_embedder(cached).settings == settings


def test_a_known_decoder_gets_its_own_eos(base_folders, tmp_path):
    model = open_embedder(copy_as(base_folders["qwen2"], "Qwen3-Embedding-0.6B", tmp_path))
    text = model.text_encoder.encode(["what is a panda?"], "query")[0]
    assert model.tokenizer.decode(text.ids) == (
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\n"
        "Query:what is a panda?<|endoftext|>"
    )


def test_a_folder_that_has_prompts_is_not_taken_for_the_model_of_its_name(base_folders, tmp_path):
    folder = tmp_path / "bge-small-en"
    save_by_sentence_transformers(base_folders["bert"], folder, "mean", {"query": "ask: "})
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


def test_weights_that_are_not_numbers_are_refused(base_folders, tmp_path):
    model = EmbeddingModel.from_pretrained(base_folders["bert"])
    model.model.embeddings.word_embeddings.weight.data[3, 3] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="finite"):
        open_embedder(tmp_path)


def test_modules_that_are_not_known_are_refused(base_folders, tmp_path):
    EmbeddingModel.from_pretrained(base_folders["bert"]).save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "modules.json").read_text())
    entries[1]["type"] = "sentence_transformers.sparse_encoder.modules.SpladePooling"
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="SpladePooling"):
        open_embedder(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_has_the_layout_that_servers_read(base_folders, tmp_path, family):
    """text-embeddings-inference and vLLM: the class without a head, the keys before sentence-transformers 5.4."""
    model = EmbeddingModel.from_pretrained(base_folders[family], pooling="mean", max_length=99)
    model.save_pretrained(tmp_path)

    def read(name):
        return json.loads((tmp_path / name).read_text())

    assert read("config.json")["architectures"] == [type(model.model).__name__]
    assert type(model.model).__name__.endswith("Model")
    assert [(each["path"], each["type"]) for each in read("modules.json")] == [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
        ("2_Normalize", "sentence_transformers.models.Normalize"),
    ]
    pooling = read("1_Pooling/config.json")
    assert pooling.pop("word_embedding_dimension") == 32 and pooling.pop("include_prompt") is True
    assert pooling == {
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": False,
    }
    assert read("sentence_bert_config.json") == {"max_seq_length": 99, "do_lower_case": False}
    options = read("config_sentence_transformers.json")
    assert options["prompts"] == {"query": "", "document": ""} and options["similarity_fn_name"] == "cosine"
    assert read("tokenizer_config.json")["model_max_length"] == 99 and (tmp_path / "tokenizer.json").is_file()
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        assert set(tensors.keys()) == model.model.state_dict().keys()


def test_an_empty_prompt_that_is_given_stays_empty(base_folders, tmp_path):
    save_by_sentence_transformers(base_folders["bert"], tmp_path / "theirs", "mean", {"query": "q: ", "passage": "p: "})
    assert EmbeddingModel.from_pretrained(tmp_path / "theirs").text_encoder.prompt_for("document") == "p: "
    model = EmbeddingModel.from_pretrained(tmp_path / "theirs", prompts={"document": ""})
    assert model.text_encoder.prompt_for("document") == "" and model.text_encoder.prompt_for("query") == "q: "
    model.save_pretrained(tmp_path / "ours")
    assert EmbeddingModel.from_pretrained(tmp_path / "ours").text_encoder.prompt_for("document") == ""


def test_missing_weights_are_refused_where_a_trained_model_is_opened(base_folders, tmp_path):
    EmbeddingModel.from_pretrained(base_folders["bert"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="encoder.layer.1.output.dense.weight"):
        open_embedder(tmp_path)


def test_a_model_that_was_made_from_a_known_one_pools_as_that_does(base_folders, tmp_path):
    folder = copy_as(base_folders["bert"], "mine", tmp_path)
    (tmp_path / "mine" / "README.md").write_text("---\nbase_model: BAAI/bge-base-en-v1.5\n---\n# mine\n")
    assert open_embedder(folder).settings.pooling == "cls"


def test_vectors_that_are_not_normalized_stay_so_elsewhere(base_folders, tmp_path):
    model = EmbeddingModel.from_pretrained(base_folders["bert"], normalize=False)
    model.save_pretrained(tmp_path)
    assert not EmbeddingModel.from_pretrained(tmp_path).settings.normalize
    assert (vectors_of(model, normalize=False).norm(dim=1) - 1).abs().max() > 0.5
    assert_equal_elsewhere(model, tmp_path)


def test_a_querys_own_limit_is_saved(base_folders, tmp_path):
    EmbeddingModel.from_pretrained(base_folders["bert"], max_length=40, query_max_length=9).save_pretrained(tmp_path)
    encoder = EmbeddingModel.from_pretrained(tmp_path).text_encoder
    assert [len(encoder.encode([" ".join(ENGLISH)], kind)[0]) for kind in ("query", "document")] == [9, 40]


def test_a_limit_that_is_given_holds_for_queries_too(base_folders, tmp_path):
    EmbeddingModel.from_pretrained(base_folders["bert"], max_length=40, query_max_length=30).save_pretrained(tmp_path)
    for given, expected in ((20, 20), (35, 30), (None, 30)):
        encoder = EmbeddingModel.from_pretrained(tmp_path, max_length=given).text_encoder
        assert encoder.max_length_of("query") == expected
    both = EmbeddingModel.from_pretrained(tmp_path, max_length=20, query_max_length=25).text_encoder
    assert both.max_length_of("query") == 25


def test_weights_of_another_shape_are_named(base_folders, tmp_path):
    folder = copy_as(base_folders["bert"], "other", tmp_path)
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["encoder.layer.0.attention.self.query.weight"] = torch.zeros(16, 32)
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit the BertModel .*query.weight is \[16, 32\], needed \[32, 32\]"):
        open_embedder(folder)


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "max"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "cls and mean"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, "nothing"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Mish"}, "Mish"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "token_embeddings"),
        ("2_Dense/config.json", {"use_residual": True}, "2_Dense"),
        ("2_Dense/config.json", {"out_features": 7}, "2_Dense"),
        ("2_Dense/config.json", {"out_features": "wide"}, "2_Dense"),
        ("config_sentence_transformers.json", {"prompts": ["query: "]}, "config_sentence_transformers"),
        ("embedder_config.json", {"cls_interval": "many"}, "embedder_config"),
        ("modules.json", None, "modules.json"),
        ("1_Pooling/config.json", None, "1_Pooling"),
        ("2_Dense/model.safetensors", None, "2_Dense"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_the_file(base_folders, tmp_path, file, change, named):
    EmbeddingModel.from_pretrained(base_folders["bert"], dims=[48], query_max_length=9).save_pretrained(tmp_path)
    if change is None:
        (tmp_path / file).write_bytes(b"{")
    else:
        values = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=named):
        open_embedder(tmp_path)


@pytest.mark.parametrize(("file", "named"), [("1_Pooling/config.json", "nothing"), ("2_Dense/model.safetensors", "2_")])
def test_a_missing_file_of_a_module_is_an_error(base_folders, tmp_path, file, named):
    EmbeddingModel.from_pretrained(base_folders["bert"], dims=[48]).save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=named):
        open_embedder(tmp_path)
