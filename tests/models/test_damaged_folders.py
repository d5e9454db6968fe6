"""Folders that are damaged, half there or hostile: one error that names the file, within seconds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_models import qwen2_tokenizer, save_tiny, tiny_bert, tiny_qwen2
from tokenizers import AddedToken
from transformers import AutoTokenizer, Qwen2MoeConfig
from yes_no_samples import tiny_causal

from rag_retrieval import CrossEncoder, LLMDecoder, load_reranker
from rag_retrieval.models.open import holds_token_vectors
from rag_retrieval.models.prompts import names_in, render
from rag_retrieval.models.settings import ModelFiles, read_settings

PAIR = ["where is Paris?", "Paris is in France"]
FORMATS = dict(query_format="Q: {}", document_format="D: {}", seq="\n", special_token=" ?")


@pytest.fixture
def bert(model_folders, tmp_path) -> Path:
    return Path(shutil.copytree(model_folders["bert"], tmp_path / "bert"))


@pytest.fixture
def decoder(tmp_path) -> Path:
    return Path(tiny_causal(tmp_path / "decoder", "qwen2"))


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


SIDE_FILES = {
    "modules.json": ("{", "{}", "5", '["x"]', '[{"type": 5}]', '[{"path": []}]', "[" * 100_000),
    "config_sentence_transformers.json": ("{", "[]", '{"prompts": []}', '{"default_prompt_name": 5}',
                                          '{"prompts": {"a": 5}, "default_prompt_name": "a"}'),
    "sentence_bert_config.json": ("{", "[]", '{"max_seq_length": "long"}', '{"max_seq_length": true}'),
    "calibration.json": ("{", "[]", '{"temperature": "a"}', '{"temperature": 0, "bias": 0, "data": "d", "pairs": 1}',
                         '{"temperature": 1e999, "bias": 0, "data": "d", "pairs": 1}',
                         '{"temperature": 1%s, "bias": 0, "data": "d", "pairs": 1}' % ("0" * 400)),
    "reranker_config.json": ("{", "[]", "{}", "null"),
    "tokenizer_config.json": ('{"model_max_length": "x"}', '{"model_max_length": [5]}'),
}  # fmt: skip


def test_a_damaged_side_file_is_named(bert):
    for name, contents in SIDE_FILES.items():
        for content in contents:
            (bert / name).write_text(content)
            with pytest.raises(ValueError, match=f"{name}.*damaged"):
                load_reranker(bert, device="cpu")
        (bert / name).unlink()


def test_damaged_settings_of_an_answer_are_named(decoder):
    module = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"
    (decoder / "modules.json").write_text(json.dumps([{"path": "1_LogitScore", "type": module}]))
    (decoder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    (decoder / "1_LogitScore").mkdir()
    for content in ("{", "[]", "{}", '{"true_token_id": "yes"}', '{"true_token_id": -1}', '{"true_token_id": 1e99}',
                    '{"true_token_id": 99999999999999}', '{"true_token_id": 999999}'):  # fmt: skip
        (decoder / "1_LogitScore" / "config.json").write_text(content)
        with pytest.raises(ValueError, match="LogitScore"):
            load_reranker(decoder, device="cpu")


def test_a_chat_template_that_is_broken_fails_or_never_ends_is_named(tmp_path):
    folder = Path(tiny_qwen2(tmp_path / "decoder", head_labels=1))
    endless = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    for template in ("{% for", "{{ 1 / 0 }}", endless, "{{ 9 ** 9 ** 9 }}", "{{ [9**(9**9)] }}"):
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(ValueError, match="chat template"):
            load_reranker(folder, device="cpu")


def test_options_of_a_call_in_a_chat_template_are_no_power(tmp_path):
    tokenizer = qwen2_tokenizer()
    tokenizer.chat_template = "{% set options = {'sep': ''} %}{{ dict(a=1, **options) | length }}{{ dict(**options) }}"
    assert render(tokenizer, [{"role": "user", "content": "a"}]) == "2{'sep': ''}"


def test_a_tokenizer_class_that_does_not_exist_is_named(bert, caplog):
    change(bert / "tokenizer_config.json", tokenizer_class="NoSuchTokenizerFast")
    load_reranker(bert, device="cpu")
    (line,) = [line for line in caplog.messages if "tokenizer_class" in line]
    assert "NoSuchTokenizerFast" in line and str(bert) in line
    caplog.clear()
    for known in ("BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", None):
        change(bert / "tokenizer_config.json", tokenizer_class=known)
        load_reranker(bert, device="cpu")
    assert "tokenizer_class" not in caplog.text


def test_feed_forward_layers_in_chunks_are_refused_when_the_folder_is_opened(bert):
    change(bert / "config.json", chunk_size_feed_forward=7)
    with pytest.raises(ValueError, match=f"{bert}.*chunk_size_feed_forward is 7"):
        load_reranker(bert, device="cpu")
    change(bert / "config.json", chunk_size_feed_forward=1)
    assert len(load_reranker(bert, device="cpu").compute_score([PAIR])) == 1


def test_an_alias_bomb_in_a_card_takes_no_time_and_names_nothing(bert):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (bert / "README.md").write_text("---\n" + "\n".join([*lines, "base_model: *a11"]) + "\n---\n# Title\n")
    assert names_in(ModelFiles(str(bert))) == "# Title"
    (bert / "README.md").write_text("---\nbase_model: {a: [b]}\nx: 2026-99-99\n---\n")
    assert names_in(ModelFiles(str(bert))) == ""


def test_a_pointer_of_git_lfs_is_called_one(bert):
    for name in ("model.safetensors", "tokenizer.json"):
        content = (bert / name).read_bytes()
        (bert / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
        for load in (load_reranker, CrossEncoder.from_pretrained):
            with pytest.raises(ValueError, match=f"{name}: a pointer of Git LFS"):
                load(bert)
        (bert / name).write_bytes(content)


def test_a_vocabulary_in_sentencepiece_alone_says_what_to_install(bert, monkeypatch):
    (bert / "tokenizer.json").rename(bert / "spm.model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="spm.model.*pip install sentencepiece"):
        load_reranker(bert, device="cpu")


def test_a_tokenizer_with_tokens_beyond_the_embedding_is_refused_with_their_names(bert, decoder):
    for folder, load in ((bert, CrossEncoder.from_pretrained), (decoder, LLMDecoder.from_pretrained)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows = len(tokenizer)
        tokenizer.add_tokens([AddedToken("[new]"), AddedToken("[newer]")])
        tokenizer.save_pretrained(folder)
        with pytest.raises(ValueError, match=rf"beyond the {rows} rows.*'\[new\]' \({rows}\), '\[newer\]'"):
            load(folder)


def test_a_configuration_without_a_pad_token_is_given_one(load_tiny):
    scorer = load_tiny("bert")
    from rag_retrieval.models.loading import set_encoder_pad_token

    del scorer.model.config.pad_token_id
    set_encoder_pad_token(scorer.model, scorer.tokenizer)
    assert scorer.model.config.pad_token_id == scorer.tokenizer.pad_token_id


def test_weights_of_layers_that_the_configuration_leaves_out_are_refused(bert, tmp_path):
    change(bert / "config.json", num_hidden_layers=1)
    for load in (load_reranker, CrossEncoder.from_pretrained):
        with pytest.raises(ValueError, match=r"fewer layers.*layer\.1\."):
            load(bert)
    base = Path(tiny_bert(tmp_path / "base"))  # whose names lack the prefix
    change(base / "config.json", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"fewer layers.*layer\.1\."):
        CrossEncoder.from_pretrained(base)
    change(Path(base) / "config.json", num_hidden_layers=0)
    with pytest.raises(ValueError, match=r"fewer layers.*layer\.0\."):
        CrossEncoder.from_pretrained(base)
    decoder = Path(tiny_qwen2(tmp_path / "decoder", head_labels=1))
    change(decoder / "config.json", num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(ValueError, match=r"fewer layers.*layers\.1\."):
        load_reranker(decoder, device="cpu", **FORMATS)


def test_unused_weights_of_another_head_are_normal(bert):
    weights = load_file(bert / "model.safetensors")
    more = {"cls.predictions.bias": torch.zeros(5), "bert.embeddings.position_ids": torch.zeros(5)}
    save_file(weights | more, bert / "model.safetensors", metadata={"format": "pt"})
    assert load_reranker(bert, device="cpu").new_parameters == set()


def test_an_encoder_that_is_set_up_as_a_decoder_is_refused(bert):
    change(bert / "config.json", is_decoder=True)
    for load in (load_reranker, CrossEncoder.from_pretrained):
        with pytest.raises(ValueError, match="is_decoder: true"):
            load(bert)


def test_an_untrained_head_is_refused_by_the_opener_though_not_by_from_pretrained(bert):
    weights = load_file(bert / "model.safetensors")
    for name in ("classifier.weight", "bert.encoder.layer.1.output.dense.weight"):
        kept = {key: value for key, value in weights.items() if key != name}
        save_file(kept, bert / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"no trained head in it.*{name}"):
            load_reranker(bert, device="cpu")
    assert CrossEncoder.from_pretrained(bert).new_parameters


def test_experts_with_gates_of_one_output_score_in_half_precision(tmp_path):
    tokenizer = qwen2_tokenizer()
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        shared_expert_intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=256, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    folder = save_tiny(tmp_path, config, tokenizer, head_labels=1)
    exact = load_reranker(folder, device="cpu", **FORMATS).compute_score(PAIR)
    half = load_reranker(folder, device="cpu", dtype="bf16", **FORMATS).compute_score(PAIR)
    torch.testing.assert_close(half, exact, atol=0.5, rtol=0.2)


def test_a_decoder_whose_class_is_called_lm_head_model_is_a_language_model(decoder):
    change(decoder / "config.json", architectures=["Qwen2LMHeadModel"])
    assert ModelFiles(str(decoder)).is_language_model


# ---- a hub that cannot be reached -----------------------------------------------------------------------


@pytest.fixture
def cached(load_tiny, tmp_path, monkeypatch):
    """`cached(*names)`: the cache of the hub with these files of `me/model`, as transformers fetches them."""
    load_tiny("qwen2", special_token=" score:", max_length=64).save_pretrained(tmp_path / "source")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--me--model"

    def make(*names: str, absent: tuple[str, ...] = ()) -> Path:
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        for name in names:
            source = tmp_path / "source" / name
            (snapshot / name).write_bytes(source.read_bytes() if source.is_file() else b"")
        for name in absent:
            (repository / ".no_exist" / ("0" * 40)).mkdir(parents=True, exist_ok=True)
            (repository / ".no_exist" / ("0" * 40) / name).touch()
        return snapshot

    return make


def test_settings_that_cannot_be_looked_up_are_an_error_and_no_default(cached):
    cached("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    with pytest.raises(ValueError, match="me/model: the hub cannot be reached.*reranker_config.json.*hf download"):
        read_settings("me/model")
    for load in (load_reranker, LLMDecoder.from_pretrained):
        with pytest.raises(ValueError, match="me/model: the hub cannot be reached"):
            load("me/model")


def test_settings_in_the_cache_are_read_and_known_absence_is_absence(cached):
    cached("config.json", absent=("reranker_config.json",))
    assert read_settings("me/model") is None


def test_a_reranker_in_the_cache_is_not_asked_for_the_files_of_an_embedder(cached):
    snapshot = cached("config.json", absent=("reranker_config.json", "modules.json"))
    assert not holds_token_vectors(ModelFiles("me/model"))
    change(snapshot / "config.json", architectures=["Qwen2ForCausalLM"])
    assert not holds_token_vectors(ModelFiles("me/model"))


def test_a_cache_of_all_files_shows_which_are_absent(cached):
    cached("config.json", "reranker_config.json", ".gitattributes")
    assert read_settings("me/model").special_token == " score:"
    from rag_retrieval.models.calibration import read_calibration

    assert read_calibration("me/model") is None


def test_a_name_that_is_neither_folder_nor_on_the_hub_is_refused():
    with pytest.raises(ValueError, match="no/such: no such folder"):
        read_settings("no/such")
