import json
import math
import shutil

import pytest
import torch

from rag_retrieval import CrossEncoder, LLMDecoder, score_over_processes
from rag_retrieval.models.calibration import CALIBRATION_FILE, Calibration, write_calibration

PAIRS = [["where is Paris", "Paris is in France"], ["感冒", "发烧"], ["a", ""]]


@pytest.mark.parametrize(("family", "kind"), [("bert", CrossEncoder), ("qwen2", LLMDecoder)])
def test_a_saved_calibration_is_used_for_probabilities_and_the_result_says_so(family, kind, model_folders, tmp_path):
    folder = shutil.copytree(model_folders[family], tmp_path / "model")
    plain = kind.from_pretrained(folder).probabilities(PAIRS)
    assert not plain.calibrated and plain.calibration is None
    write_calibration(folder, Calibration(2.0, -0.5, "dev", 10))
    scorer = kind.from_pretrained(folder)
    scores, found = scorer.compute_score(PAIRS), scorer.probabilities(PAIRS, batch_size=2)
    assert found.calibrated and found.calibration == Calibration(2.0, -0.5, "dev", 10)
    wanted = [1 / (1 + math.exp(-(score / 2.0 - 0.5))) for score in scores.tolist()]
    assert found.values.tolist() == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(plain.values, scores.sigmoid()) and plain.score_type == "sigmoid"
    assert found.score_type == "calibrated"
    assert torch.equal(scorer.compute_score(PAIRS, normalize=True, batch_size=2), found.values)
    assert torch.equal(score_over_processes(scorer, PAIRS, normalize=True, batch_size=2), found.values)


def test_saving_a_model_leaves_no_calibration_beside_weights_that_may_be_others(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["bert"], tmp_path / "model")
    write_calibration(folder, Calibration(2.0, -0.5, "dev", 10))
    scorer = CrossEncoder.from_pretrained(folder)
    scorer.save_pretrained(folder)
    scorer.save_pretrained(tmp_path / "other")
    assert not (folder / CALIBRATION_FILE).exists() and not (tmp_path / "other" / CALIBRATION_FILE).exists()


@pytest.mark.parametrize("text", ["{", '{"temperature": 2}', '{"temperature": 0, "bias": 0, "data": "", "pairs": 1}'])
def test_a_damaged_calibration_is_refused_with_its_file(text, model_folders, tmp_path):
    folder = shutil.copytree(model_folders["bert"], tmp_path / "model")
    (folder / CALIBRATION_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"calibration\.json: .*calibrate again"):
        CrossEncoder.from_pretrained(folder)


def test_the_file_is_plain_json(tmp_path):
    write_calibration(tmp_path, Calibration(1.5, 0.25, "cmrc dev", 326))
    assert json.loads((tmp_path / CALIBRATION_FILE).read_text()) == {
        "temperature": 1.5, "bias": 0.25, "data": "cmrc dev", "pairs": 326,
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == [CALIBRATION_FILE]
