import math

import numpy as np
import pytest

from rag_retrieval.evaluate import calibration
from rag_retrieval.evaluate.calibration import (
    calibration_error,
    fit_calibration,
    log_loss,
    probability_errors,
    reliability,
    scored_pairs,
)
from rag_retrieval.models.calibration import Calibration, probabilities_of


def pairs_with(temperature, bias, number=40_000):
    """Scores whose relevance is drawn with the probabilities of a known temperature and bias."""
    draw = np.random.default_rng(0)
    scores = draw.normal(-1, 4, number)
    return scores, draw.random(number) < 1 / (1 + np.exp(-(scores / temperature + bias)))


@pytest.mark.parametrize(("temperature", "bias"), [(1.0, 0.0), (3.0, -1.5), (0.5, 2.0)])
def test_the_temperature_and_bias_that_made_the_data_are_found(temperature, bias):
    fitted = fit_calibration(*pairs_with(temperature, bias), "made")
    assert fitted.temperature == pytest.approx(temperature, rel=0.05)
    assert fitted.bias == pytest.approx(bias, abs=0.1)
    assert (fitted.data, fitted.pairs) == ("made", 40_000)


def test_no_nearby_temperature_or_bias_has_less_log_loss():
    scores, relevant = pairs_with(2.0, 0.5, 5000)
    fitted = fit_calibration(scores, relevant, "made")
    best = log_loss(probabilities_of(scores, fitted).values, relevant)
    for factor, shift in ((1.02, 0), (0.98, 0), (1, 0.03), (1, -0.03)):
        other = Calibration(fitted.temperature * factor, fitted.bias + shift, "", 0)
        assert log_loss(probabilities_of(scores, other).values, relevant) > best


def test_the_scale_and_place_of_the_scores_do_not_matter():
    scores, relevant = pairs_with(1.0, 0.0, 3000)
    fitted, moved = (fit_calibration(values, relevant, "") for values in (scores, 1000 * scores + 5000))
    assert moved.temperature == pytest.approx(1000 * fitted.temperature, rel=1e-3)
    expected = probabilities_of(scores, fitted).values
    assert probabilities_of(1000 * scores + 5000, moved).values == pytest.approx(expected, abs=1e-4)


def test_scores_that_separate_wholly_give_a_finite_temperature():
    fitted = fit_calibration(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([False, False, True, True]), "few")
    assert 0.01 < fitted.temperature < 10
    platt = [0.25, 0.75]  # the targets of two pairs on either side
    assert probabilities_of(np.array([-2.0, 2.0]), fitted).values == pytest.approx(platt, abs=0.1)


def test_what_cannot_be_calibrated_is_refused():
    for relevant, message in (([True] * 3, "dev: 3 of 3"), ([True, False, False], "dev: .* do not score higher")):
        with pytest.raises(ValueError, match=message):
            fit_calibration(np.array([0.0, 1.0, 2.0]), np.array(relevant), "dev")


def test_a_search_that_does_not_arrive_is_an_error_and_no_calibration(monkeypatch):
    monkeypatch.setattr(calibration, "MAX_ITERATIONS", 1)
    with pytest.raises(ValueError, match="dev: no temperature and bias fit 3,000 scored pairs"):
        fit_calibration(*pairs_with(3.0, -1.5, 3000), "dev")


def test_errors_are_those_of_what_normalize_gives_and_say_what_that_is():
    scores, relevant = pairs_with(3.0, -1.5, 3000)
    plain = probability_errors(scores, relevant, None)
    made = probability_errors(scores, relevant, Calibration(3.0, -1.5, "dev", 10))
    assert (plain.score_type, made.score_type) == ("sigmoid", "calibrated")
    assert plain.log_loss == plain.sigmoid_log_loss == made.sigmoid_log_loss > made.log_loss
    assert made.calibration_error < 0.03 < made.sigmoid_calibration_error == plain.calibration_error


def test_loss_bins_and_error_equal_values_by_hand():
    probabilities, relevant = np.array([0.05, 0.09, 0.5, 1.0]), np.array([False, True, True, True])
    assert log_loss(probabilities, relevant) == pytest.approx(-(math.log(0.95) + math.log(0.09) + math.log(0.5)) / 4)
    low, middle, high = reliability(probabilities, relevant)
    assert (low.mean_probability, low.relevant_share, low.pairs) == pytest.approx((0.07, 0.5, 2))
    assert (middle.pairs, high.mean_probability) == (1, 1.0)
    assert calibration_error(probabilities, relevant) == pytest.approx((2 * 0.43 + 0.5 + 0) / 4)


def test_unjudged_candidates_are_irrelevant_and_grades_below_the_threshold_too():
    run = {"a": {"x": 1.0, "y": 2.0, "z": 3.0}}
    scores, relevant = scored_pairs(run, {"a": {"x": 2, "y": 1}}, relevant_from=2)
    assert scores.tolist() == [1, 2, 3] and relevant.tolist() == [True, False, False]
