"""Records of a step by id: rows, columns, padding, and what is no negative."""

import numpy as np
import pytest
from step_samples import step_records

from rag_retrieval.data.step_records import first_of_each
from rag_retrieval.losses.step_targets import targets_of


def ids(*values: int) -> np.ndarray:
    # beyond int64, as real digests are
    return np.array(values, np.uint64) + np.uint64(2**63)


def test_texts_are_found_by_id_whatever_their_order():
    records = step_records(ids(7, 3), ids(20, 10), [ids(30), ids(40, 20)])
    targets = targets_of(ids(3, 7), ids(40, 10, 30, 20), [records])
    assert targets.queries.tolist() == [1, 0]
    assert targets.positives.tolist() == [3, 1]
    assert targets.negatives.tolist() == [[2, -1], [0, 3]]
    assert targets.own == slice(0, 2)


def test_a_negative_that_is_the_positive_is_padding():
    records = step_records(ids(1), ids(10), [ids(20, 10)])
    assert targets_of(ids(1), ids(10, 20), [records]).negatives.tolist() == [[1, -1]]


def test_known_positives_of_any_process_are_excluded_for_documents_and_queries():
    first = step_records(ids(1), ids(10), known=[ids(10, 20, 99)])
    second = step_records(ids(2, 3), ids(20, 30))
    every = [ids(1, 2, 3), ids(10, 20, 30), [first, second]]
    targets = targets_of(*every, process=0)
    assert targets.own == slice(0, 1)
    assert targets.excluded.tolist() == [[0], [1]]  # document 20 is a positive of query 1; 99 is not in the step
    assert targets.excluded_queries.tolist() == [[], []]
    targets = targets_of(*every, process=1)
    assert targets.own == slice(1, 3)
    assert targets.excluded.tolist() == [[], []]
    assert targets.excluded_queries.tolist() == [[0], [0]]  # the positive of its first record is one of query 1, too


def test_two_records_of_one_query_do_not_have_each_others_positive_as_negative():
    records = step_records(ids(1, 1), ids(10, 20))
    targets = targets_of(ids(1), ids(10, 20), [records])
    assert targets.queries.tolist() == [0, 0]
    assert targets.excluded.tolist() == [[0, 1], [1, 0]]


def test_teacher_scores_stand_beside_positive_and_negatives():
    records = step_records(ids(1, 2), ids(10, 20), [ids(), ids(30)], positive_scores=[5, 6], negative_scores=[-1])
    targets = targets_of(ids(1, 2), ids(10, 20, 30), [records])
    assert targets.teacher_scores.tolist() == [[5, 0], [6, -1]]
    assert targets.negatives.tolist() == [[-1], [2]]


def test_labels_and_vectors_are_those_of_all_processes():
    parts = [step_records(ids(n), ids(10 + n), labels=[n / 2]) for n in (1, 2)]
    assert targets_of(ids(1, 2), ids(11, 12), parts, process=1).labels.tolist() == [0.5, 1.0]
    alone = [step_records(ids(n), ids(n), teacher_vectors=[[n, n, n]]) for n in (1, 2)]
    targets = targets_of(ids(1, 2), ids(), alone, process=1)
    assert targets.teacher_vectors.tolist() == [[1, 1, 1], [2, 2, 2]]
    assert targets.positives.tolist() == [-1, -1]


def test_a_process_without_records_has_targets_without_rows():
    full, empty = step_records(ids(1), ids(10), [ids(20)]), step_records(ids(), ids())
    targets = targets_of(ids(1), ids(10, 20), [full, empty], process=1)
    assert targets.negatives.shape == (0, 0)
    assert targets.queries.tolist() == [0]
    assert targets.own == slice(1, 1)


def test_distinct_takes_the_first_copy_in_order():
    assert first_of_each(ids(5, 9, 5, 1, 9))[0].tolist() == [0, 1, 3]


def test_a_text_that_the_step_does_not_have_is_an_error_of_ours():
    with pytest.raises(AssertionError, match="missing"):
        targets_of(ids(1), ids(11), [step_records(ids(1), ids(10))])
    with pytest.raises(AssertionError, match="distinct"):
        targets_of(ids(1, 1), ids(10), [step_records(ids(1), ids(10))])
