"""Values for the log, and warnings, from sums over records."""

import pytest

from rag_retrieval.losses.embedding_report import (
    log_values,
    no_terms_problem,
    same_direction_problem,
    zero_loss_problem,
)


def of(name, **values):
    """Sums of one representation's scores."""
    return {f"{name}/{value}": number for value, number in values.items()}


DENSE = {"loss": 8.0, "positive_rank": 6.0, "positive_score": 2.0, "negative_score": 3.0, "negatives": 12.0,
         "masked": 5.0}  # fmt: skip
SUMS = {"records": 4.0, "near_zero": 1.0, **of("dense", **DENSE)}


def test_values_are_means_over_records_and_over_negatives():
    assert log_values(SUMS) == {
        "zero_loss_share": 0.25, "positive_cosine": 0.5, "negative_cosine": 0.25, "positive_rank": 1.5,
        "masked_negatives": 5.0,
    }  # fmt: skip


def test_what_a_loss_does_not_have_is_left_out():
    pairs = {**SUMS, **of("dense", negatives=0.0, negative_score=0.0)}
    assert log_values(pairs).keys() == {"zero_loss_share", "positive_cosine"}
    alone = dict.fromkeys(SUMS, 0.0) | {"records": 4.0}
    assert log_values(alone) == {"zero_loss_share": 0.0}
    assert log_values(dict.fromkeys(SUMS, 0.0)) == {}


def test_each_of_several_representations_has_its_values_and_its_loss():
    several = {**SUMS, **of("lexical", **{**DENSE, "loss": 2.0, "positive_score": 10.0})}
    assert log_values(several) == log_values(SUMS) | {
        "dense/loss": 2.0, "lexical/loss": 0.5, "lexical/positive_score": 2.5, "lexical/negative_score": 0.25,
        "lexical/positive_rank": 1.5, "lexical/masked_negatives": 5.0,
    }  # fmt: skip


def test_lexical_weights_alone_are_no_cosines_and_their_terms_are_counted():
    terms = {"query_terms": 30.0, "query_texts": 4.0, "document_terms": 0.0, "document_texts": 10.0}
    alone = {"records": 4.0, "near_zero": 4.0, **of("lexical", **DENSE), **terms}
    values = log_values(alone)
    assert (values["query_terms"], values["document_terms"]) == (7.5, 0.0)
    assert values["lexical/positive_score"] == 0.5 and not {"positive_cosine", "lexical/loss"} & values.keys()
    assert "the score of positives is 0.50" in zero_loss_problem(alone)
    assert same_direction_problem(alone) is None
    assert "no document has a lexical weight above 0" in no_terms_problem(alone)
    assert "no query and no document has" in no_terms_problem({**alone, "query_terms": 0.0})
    assert no_terms_problem({**alone, "document_terms": 1.0}) is None


def test_no_problem_in_a_run_that_learns():
    assert zero_loss_problem(SUMS) is None
    assert same_direction_problem(SUMS) is None
    assert no_terms_problem(SUMS) is None


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (of("dense", negatives=0.0), ["neg", "use_inbatch_neg", "batch_size"]),
        ({}, ["cosine", "0.25", "mine", "temperature"]),
    ],
)
def test_a_loss_of_zero_is_reported_with_the_remedy(changed, named):
    problem = zero_loss_problem({**SUMS, "near_zero": 4.0, **changed})
    assert all(word in problem for word in ["100%", *named])


def test_vectors_of_one_direction_are_reported_with_the_remedy():
    collapsed = {**SUMS, **of("dense", positive_score=3.98, negative_score=11.93)}
    problem = same_direction_problem(collapsed)
    assert all(word in problem for word in ["0.9942", "0.9950", "lr", "pooling"])
    # a high level alone is none: a base decoder has it, and positives still stand out
    assert same_direction_problem({**collapsed, "dense/positive_score": 4.0}) is None
