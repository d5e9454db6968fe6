"""The table of embedding losses, and objectives made of it."""

import inspect
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from step_samples import gradients, random_step

from rag_retrieval.losses.embedding import EMBEDDING_LOSSES, objective_of

WITH_FUNCTION = {name: loss for name, loss in EMBEDDING_LOSSES.items() if not loss.parts}
every_function = pytest.mark.parametrize("loss", WITH_FUNCTION.values(), ids=WITH_FUNCTION.keys())


def half_the_distance(step):
    """A user's own loss."""
    return (1 - step.positive_scores()) / 2


def mean_distance(step):
    return half_the_distance(step).mean()


def test_the_table_has_the_documented_names():
    assert list(EMBEDDING_LOSSES) == [
        "info_nce", "qwen3_info_nce", "cosent", "cosine_regression", "margin_mse", "kl_distillation", "m3_distillation",
        "teacher_cosine", "teacher_similarity", "teacher_triplet", "stella",
    ]  # fmt: skip


def test_the_table_is_read_without_torch():
    code = "import sys, rag_retrieval.losses.embedding; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@every_function
def test_the_options_are_keyword_arguments_of_the_function_with_the_same_defaults(loss):
    first, *options = inspect.signature(loss.function).parameters.values()
    assert first.name == "step"
    assert {option.name: option.default for option in options} == {o.name: o.default for o in loss.options}
    assert loss.option_values.keys() <= {option.name for option in loss.options}
    assert loss.function.__doc__


@every_function
def test_a_loss_of_own_texts_is_the_same_whatever_else_is_in_the_step(loss):
    step = random_step()
    if loss.reads == "teacher_vectors":
        taught = np.random.default_rng(0).normal(size=(7, 12)).astype(np.float32)
        step = replace(step, records=replace(step.records, teacher_vectors=taught))
    records = step.records
    own = records.negative_ids[: records.negative_offsets[2]].tolist() + records.positive_ids[:2].tolist()
    other_queries = ~np.isin(step.query_ids, records.query_ids[:2])[:, None]
    other_documents = ~np.isin(step.document_ids, own)[:, None]
    changed = replace(
        step,
        queries=step.queries + torch.from_numpy(other_queries) * torch.randn(step.queries.shape),
        documents=step.documents + torch.from_numpy(other_documents) * torch.randn(step.documents.shape),
    )
    objective = objective_of({loss.name: 1.0})
    same = torch.equal(gradients(step, objective).losses[:2], gradients(changed, objective).losses[:2])
    assert same == loss.own_texts


def test_a_sum_of_losses_has_their_weights_options_and_needs():
    stella = EMBEDDING_LOSSES["stella"]
    terms = objective_of({"stella": 0.5}, {"triplet_margin": 0.1}).terms
    assert {loss.name: weight for loss, weight in terms} == {
        "teacher_cosine": 5.0, "teacher_similarity": 100.0, "teacher_triplet": 10.0,
    }  # fmt: skip
    assert dict(terms[2][0].option_values) == {"triplet_margin": 0.1}
    assert {EMBEDDING_LOSSES[part].reads for part in stella.parts} == {stella.reads}
    assert list(stella.options) == [option for part in stella.parts for option in EMBEDDING_LOSSES[part].options]


def test_an_option_goes_to_the_losses_that_have_it():
    wanted = objective_of({"info_nce": 1.0, "kl_div": 0.5}, {"temperature": 0.1, "teacher_temperature": 2.0})
    (first, weight), (second, other) = wanted.terms
    assert (first.name, weight, dict(first.option_values)) == ("info_nce", 1.0, {"temperature": 0.1})
    assert (second.name, other) == ("kl_distillation", 0.5)
    assert dict(second.option_values) == {"temperature": 0.1, "teacher_temperature": 2.0}
    assert wanted.reads == {"positives", "teacher_score"}


def test_an_option_set_by_hand_wins_over_the_one_of_the_entry():
    ((loss, _),) = objective_of({"qwen3_info_nce": 1.0}, {"false_negative_margin": 0.3}).terms
    assert loss.option_values["false_negative_margin"] == 0.3
    assert "query_to_query" in loss.option_values["directions"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (({"info_nse": 1.0},), "info_nse.*info_nce.*stella"),
        (({"cosent": 1.0}, {"margin": 0.2}), "margin.*cosent"),
        (({"info_nce": 1.0}, {"directions": ("doc_to_doc",)}), "doc_to_doc.*query_to_doc"),
        (({"info_nce": 1.0}, {}, [64, 32], [1.0]), "matryoshka_weights has 1.*2"),
    ],
)
def test_mistakes_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        objective_of(*arguments)


def test_an_own_function_is_a_loss_beside_the_shipped_ones():
    step = random_step()
    own = gradients(step, objective_of({f"{__name__}:half_the_distance": 2.0}))
    assert own.losses.tolist() == pytest.approx((1 - positive_cosines(step)).tolist(), abs=1e-6)
    contrastive = gradients(step, objective_of({"info_nce": 1.0}))
    both = gradients(step, objective_of({f"{__name__}:half_the_distance": 2.0, "info_nce": 1.0}))
    torch.testing.assert_close(both.queries, own.queries + contrastive.queries)


def test_an_own_function_that_is_no_loss_is_refused():
    with pytest.raises(ValueError, match="mean_distance.*one value for each of 7 records"):
        gradients(random_step(), objective_of({f"{__name__}:mean_distance": 1.0}))
    with pytest.raises(ValueError, match="no_such_module:loss.*cannot be imported"):
        objective_of({"no_such_module:loss": 1.0})
    with pytest.raises(ValueError, match="expected a function of step"):
        objective_of({f"{__name__}:test_the_table_is_read_without_torch": 1.0})


def positive_cosines(step):
    query_of = {key: row for row, key in enumerate(step.query_ids.tolist())}
    document_of = {key: column for column, key in enumerate(step.document_ids.tolist())}
    queries = step.queries[[query_of[key] for key in step.records.query_ids.tolist()]]
    positives = step.documents[[document_of[key] for key in step.records.positive_ids.tolist()]]
    return torch.nn.functional.cosine_similarity(queries, positives)
