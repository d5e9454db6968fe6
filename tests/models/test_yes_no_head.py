"""The yes/no head: the scores of transformers' own causal model, packed as padded, saved in the model's own form."""

import copy
import json
import logging
import pickle

import pytest
import torch
from pair_samples import some_pairs
from tiny_models import CHINESE, ENGLISH, tiny_bert, tiny_qwen2
from transformers import AutoModelForCausalLM
from yes_no_samples import TEXTS, YES_NO, tiny_causal, transformers_scores

from rag_retrieval import LLMDecoder
from rag_retrieval.models.prompts import answer_tokens
from rag_retrieval.models.token_batch import make_batch

QUERIES = ["what?", "How do I open a file in Python", "天气怎么样？", "a line.\nand one more!"]
DOCUMENTS = ["Water boils at 100 degrees.", "2 words", ENGLISH[0] + "\n" + ENGLISH[1], "".join(CHINESE), "(no)"]
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]
MODELS = [(family, tied) for family in ("qwen2", "qwen3", "llama") for tied in (False, True)]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("causal"), {}

    def folder(family: str, tied: bool = False) -> str:
        if (family, tied) not in made:
            made[family, tied] = tiny_causal(root / f"{family}-{tied}", family, tied=tied)
        return made[family, tied]

    return folder


@pytest.mark.parametrize("family, tied", MODELS)
def test_scores_are_those_of_transformers_with_the_same_prompt(folder_of, family, tied):
    folder = folder_of(family, tied)
    scorer = LLMDecoder.from_pretrained(folder, **YES_NO)
    expected = transformers_scores(folder, PAIRS)
    assert scorer.packs and scorer.shares_queries and expected.std() > 0.1
    torch.testing.assert_close(scorer.compute_score(PAIRS), expected, atol=1e-5, rtol=1e-5)


def test_a_family_that_caps_its_logits_is_followed(tmp_path):
    folder = tiny_causal(tmp_path, "gemma2", final_logit_softcapping=0.5, sliding_window=64)
    scorer = LLMDecoder.from_pretrained(folder, **YES_NO)
    torch.testing.assert_close(scorer.compute_score(PAIRS), transformers_scores(folder, PAIRS), atol=1e-5, rtol=1e-5)


def test_a_family_that_scales_its_logits_in_another_way_is_refused(tmp_path):
    folder = tiny_causal(tmp_path, "qwen2")
    (tmp_path / "config.json").write_text(
        json.dumps(
            json.loads((tmp_path / "config.json").read_text())
            | {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "logits_scaling": 8.0}
        )
    )
    with pytest.raises(ValueError, match="GraniteForCausalLM changes its logits in a way that is not known here"):
        LLMDecoder.from_pretrained(folder, **YES_NO)


def test_the_sigmoid_of_the_score_is_the_probability_of_yes_among_the_two(folder_of):
    scorer = LLMDecoder.from_pretrained(folder_of("qwen3"), **YES_NO)
    swapped = LLMDecoder.from_pretrained(folder_of("qwen3"), **YES_NO | {"yes_token": "b", "no_token": "a"})
    probabilities = scorer.compute_score(PAIRS, normalize=True) + swapped.compute_score(PAIRS, normalize=True)
    torch.testing.assert_close(probabilities, torch.ones(len(PAIRS)))


@pytest.mark.parametrize("family, tied", MODELS)
def test_a_saved_folder_opens_as_a_causal_model_with_the_logits_it_had(folder_of, tmp_path, family, tied, caplog):
    folder = folder_of(family, tied)
    scorer = LLMDecoder.from_pretrained(folder, **YES_NO, max_length=177)
    scorer.save_pretrained(tmp_path)
    before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (folder, tmp_path))
    ids = torch.tensor([[1, 5, 60, 70, 3]])
    assert torch.equal(before(ids).logits, after(ids).logits)
    assert before.state_dict().keys() == after.state_dict().keys()
    settings = json.loads((tmp_path / "reranker_config.json").read_text())
    assert settings == {"model_type": "llm_decoder", "max_len": 177, **YES_NO}
    with caplog.at_level(logging.WARNING):
        again = LLMDecoder.from_pretrained(tmp_path)
    assert caplog.records == []
    assert torch.equal(again.compute_score(PAIRS), scorer.compute_score(PAIRS))


@pytest.mark.parametrize("family, tied", MODELS)
def test_packed_gradients_are_those_of_padded_batches_and_reach_the_output_embedding(folder_of, family, tied):
    scorer = LLMDecoder.from_pretrained(folder_of(family, tied), **YES_NO)
    batch = make_batch(scorer.pair_encoder.encode(PAIRS))
    weights = torch.linspace(-1, 1, len(PAIRS))
    gradients = []
    for forward in (scorer.packed_scores, scorer.padded_scores):
        scorer.zero_grad()
        (forward(batch) * weights).sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in scorer.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-3)
    if not tied:
        rows = scorer.model.lm_head.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist()
        assert sorted(rows) == sorted(answer_tokens(scorer.tokenizer, "a", "b"))


def test_no_more_than_two_logits_are_ever_computed(folder_of):
    scorer = LLMDecoder.from_pretrained(folder_of("qwen3"), **YES_NO)
    widths = []
    scorer.model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape))
    scorer.compute_score(PAIRS)
    scorer.padded_scores(make_batch(scorer.pair_encoder.encode(PAIRS)))
    assert widths and all(shape[-1] == 2 and len(shape) == 2 for shape in widths)
    assert sum(shape[0] for shape in widths) == 2 * len(PAIRS), "one row for each pair, none for other tokens"


def test_the_documents_of_a_query_compute_it_once(folder_of):
    scorer = LLMDecoder.from_pretrained(folder_of("qwen2"), **YES_NO)
    batch = make_batch(scorer.pair_encoder.encode(PAIRS[: len(DOCUMENTS)]))
    shared = batch.shared[1:]
    assert min(shared) == max(shared) > 20, "the whole prompt up to the document"
    computed = []
    scorer.model.model.layers[0].register_forward_hook(lambda module, inputs, output: computed.append(inputs[0].shape))
    scorer(batch)
    assert computed[0][1] == sum(batch.lengths) - sum(shared)


def test_scores_stay_float32_under_autocast(folder_of):
    scorer = LLMDecoder.from_pretrained(folder_of("qwen2"), **YES_NO)
    half = scorer.compute_score(PAIRS, precision="bf16")
    assert half.dtype == torch.float32 and not torch.equal(half, half.bfloat16().float())
    torch.testing.assert_close(half, scorer.compute_score(PAIRS), atol=0.1, rtol=0.05)


def test_a_copy_and_a_pickle_score_alike(folder_of):
    scorer = LLMDecoder.from_pretrained(folder_of("qwen3", tied=True), **YES_NO)
    expected = scorer.compute_score(PAIRS)
    for other in (copy.deepcopy(scorer), pickle.loads(pickle.dumps(scorer))):
        assert torch.equal(other.compute_score(PAIRS), expected)
        with torch.no_grad():
            other.model.lm_head.weight.zero_()
        assert other.compute_score(PAIRS).abs().max() == 0, "it reads its own weights"
    assert torch.equal(scorer.compute_score(PAIRS), expected)


def test_long_pairs_are_cut_in_their_texts_and_keep_the_whole_prompt(folder_of):
    scorer = LLMDecoder.from_pretrained(folder_of("qwen2"), **YES_NO, max_length=180)
    pair = (" ".join(ENGLISH), " ".join(ENGLISH[::-1]))
    (encoded,) = scorer.pair_encoder.encode([pair])
    text = scorer.tokenizer.decode(encoded.ids)
    assert len(encoded) == 180 and encoded.truncated
    assert text.startswith("<|im_start|>system\nJudge. Answer a or b.<|im_end|>\n<|im_start|>user\n<Instruct>: find")
    assert text.endswith(TEXTS["special_token"]) and "\n<Document>: Trains leave" in text
    pairs = [*some_pairs(5), pair]
    single = torch.cat([scorer.compute_score(one) for one in pairs])
    torch.testing.assert_close(scorer.compute_score(pairs), single, atol=1e-5, rtol=0)


def test_what_cannot_answer_yes_or_no_is_refused(tmp_path, folder_of):
    with pytest.raises(ValueError, match="is a bert, an encoder; head: yes_no needs a causal language model"):
        LLMDecoder.from_pretrained(tiny_bert(tmp_path / "bert"), **YES_NO | {"yes_token": "1", "no_token": "0"})
    classifier = tiny_qwen2(tmp_path / "classifier", head_labels=1)
    with pytest.raises(ValueError, match=r"it has no lm_head.weight; use head: scalar"):
        LLMDecoder.from_pretrained(classifier, **YES_NO)
    with pytest.raises(ValueError, match="head: .*scalar, yes_no, found linear"):
        LLMDecoder.from_pretrained(folder_of("qwen2"), head="linear")


def test_the_other_head_does_not_take_over_the_saved_question(folder_of, tmp_path, caplog):
    LLMDecoder.from_pretrained(folder_of("qwen2"), **YES_NO).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        scalar = LLMDecoder.from_pretrained(tmp_path, head="scalar")
    assert "head='scalar' given, but the model was saved with 'yes_no'" in caplog.text
    assert (scalar.settings.query_format, scalar.settings.head) == ("query: {}", None)


def test_another_instruction_than_the_saved_one_changes_the_scores(folder_of, tmp_path, caplog):
    scorer = LLMDecoder.from_pretrained(folder_of("qwen2"), **YES_NO)
    scorer.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        other = LLMDecoder.from_pretrained(tmp_path, instruction="find what contradicts it")
    assert "instruction='find what contradicts it' given" in caplog.text
    assert other.settings.query_format == TEXTS["query_format"]
    assert not torch.allclose(other.compute_score(PAIRS), scorer.compute_score(PAIRS), atol=1e-3)
