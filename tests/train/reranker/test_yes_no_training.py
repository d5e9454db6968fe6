"""A yes/no head is trained like any other and stays a causal model. By every engine: tests/train/test_exactness.py."""

from pathlib import Path

import pytest
import torch
from training_runs import final_weights, read_metrics, train
from transformers import AutoModelForCausalLM
from yes_no_samples import YES_NO, tiny_causal, transformers_scores

from rag_retrieval import LLMDecoder

PAIRS = [("what?", "It is."), ("open a file", "in Python, line by line"), ("water", "boils at 100 degrees")]


@pytest.fixture(scope="session")
def causal(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("causal")
    return {"tied": tiny_causal(root / "tied", "qwen3", tied=True), "untied": tiny_causal(root / "untied", "qwen2")}


@pytest.fixture
def answering(settings, causal):
    """Keys of a small run with a yes/no head."""
    return lambda kind="tied", **changes: settings(
        model_name_or_path=causal[kind], model_type="llm_decoder", max_len=200, **YES_NO, adam_epsilon=1e-3, **changes
    )


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_training_changes_the_score_and_leaves_a_causal_model_that_gives_it(answering, causal, kind):
    values = answering(kind, epochs=2)
    train(values)
    folder = Path(values["output_dir"]) / "model"
    lines = read_metrics(Path(values["output_dir"]), "train")
    assert lines[-1]["loss"] < lines[0]["loss"]
    trained = LLMDecoder.from_pretrained(folder)
    assert trained.settings.head == "yes_no" and trained.settings.query_format == YES_NO["query_format"]
    before = LLMDecoder.from_pretrained(causal[kind], **YES_NO).compute_score(PAIRS)
    assert (trained.compute_score(PAIRS) - before).abs().min() > 0.01
    torch.testing.assert_close(trained.compute_score(PAIRS), transformers_scores(folder, PAIRS), atol=1e-5, rtol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(folder)
    embeddings = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert torch.equal(*embeddings) == (kind == "tied")


def test_a_trained_folder_is_trained_on_without_repeating_its_question(answering, tmp_path):
    first = answering("untied")
    train(first)
    second = {key: value for key, value in first.items() if key not in YES_NO} | {
        "head": "yes_no",
        "model_name_or_path": str(Path(first["output_dir"]) / "model"),
        "output_dir": str(tmp_path / "second"),
    }
    train(second)
    one, two = (LLMDecoder.from_pretrained(f"{values['output_dir']}/model").settings for values in (first, second))
    assert one == two


def test_a_resumed_run_ends_as_one_that_was_not_stopped(answering, tmp_path):
    values = answering(epochs=2, save_on_epoch_end=True)
    train(values)
    resumed = values | {"output_dir": str(tmp_path / "resumed"), "resume": f"{values['output_dir']}/checkpoint-5"}
    train(resumed)
    expected = final_weights(values["output_dir"])
    for name, value in final_weights(resumed["output_dir"]).items():
        assert torch.equal(value, expected[name])


def test_lora_is_merged_into_a_causal_model(answering):
    values = answering("untied", lora_r=4, lora_target_modules="all-linear", lr=1e-2)
    train(values)
    folder = Path(values["output_dir"]) / "model"
    scores = LLMDecoder.from_pretrained(folder).compute_score(PAIRS)
    torch.testing.assert_close(scores, transformers_scores(folder, PAIRS), atol=1e-5, rtol=1e-5)
    base = LLMDecoder.from_pretrained(values["model_name_or_path"], **YES_NO).compute_score(PAIRS)
    assert (scores - base).abs().min() > 1e-3
