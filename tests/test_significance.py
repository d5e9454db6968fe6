from itertools import product

import numpy as np
import pytest

from rag_retrieval.significance import compare

BEFORE = [0.2, 0.5, 0.5, 0.1, 0.9, 0.3, 0.4, 0.0]
AFTER = [0.6, 0.4, 0.5, 0.3, 1.0, 0.7, 0.5, 0.3]


def figures(values):
    return {"ndcg@10": {f"q{place}": value for place, value in enumerate(values)}}


def test_the_randomization_test_of_few_queries_is_that_of_all_signs():
    (comparison,) = compare(figures(BEFORE), figures(AFTER), "randomization", seed=0)
    differences = np.array(AFTER) - np.array(BEFORE)
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=len(differences))]
    assert comparison.p_value == pytest.approx(np.mean(np.array(sums) >= abs(differences.sum()) - 1e-9))
    assert comparison.difference == pytest.approx(differences.mean())
    assert (comparison.gained, comparison.lost, comparison.same) == (6, 1, 1)
    assert (comparison.before, comparison.after) == pytest.approx((np.mean(BEFORE), np.mean(AFTER)))


def test_the_t_test_and_its_interval_equal_the_formula():
    (comparison,) = compare(figures(BEFORE), figures(AFTER), "t", seed=0)
    differences = np.array(AFTER) - np.array(BEFORE)
    half = 2.364624 * differences.std(ddof=1) / np.sqrt(8)  # Student's 97.5% quantile, 7 degrees of freedom
    interval = (differences.mean() - half, differences.mean() + half)
    assert (comparison.low, comparison.high) == pytest.approx(interval, rel=1e-5)
    assert 0.01 < comparison.p_value < 0.05 and comparison.low > 0


def test_the_bootstrap_interval_holds_the_middle_of_the_resampled_means():
    draw = np.random.default_rng(3)
    differences = draw.normal(0.05, 0.2, 60)
    (comparison,) = compare(figures(np.zeros(60)), figures(differences), "randomization", seed=1)
    resampled = [draw.choice(differences, 60).mean() for _ in range(4000)]
    assert (comparison.low, comparison.high) == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.006)


def test_the_same_seed_gives_the_same_figures_and_another_one_others():
    draw = np.random.default_rng(0)
    before, after = figures(draw.random(40)), figures(draw.random(40))
    first, same, other = (compare(before, after, "randomization", seed) for seed in (5, 5, 6))
    assert first == same != other


@pytest.mark.parametrize("significance", ["randomization", "t"])
def test_equal_systems_differ_by_nothing_and_rounding_is_no_difference(significance):
    after = [value + 1e-16 for value in BEFORE]
    (comparison,) = compare(figures(BEFORE), figures(after), significance, seed=0)
    assert (comparison.p_value, comparison.low, comparison.high, comparison.same) == (1.0, 0.0, 0.0, 8)


def test_one_query_is_no_sample():
    with pytest.raises(ValueError, match="at least two queries, found 1"):
        compare(figures([0.5]), figures([0.7]), "t", seed=0)
