"""The data of an embedder's run: what is refused or reported, full steps, and lengths of texts."""

import logging

import numpy as np
import pytest
from training_runs import write_jsonl

from rag_retrieval.train.embedding.config import EmbeddingConfig
from rag_retrieval.train.embedding.run_data import open_training_files, report_steps, step_shape
from rag_retrieval.train.embedding.training_data import EmbeddingSteps, SamplingOptions
from rag_retrieval.train.steps import CarriedSteps


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RETRIEVAL_CACHE", str(tmp_path / "cache"))

    def make(*files, **changes) -> EmbeddingConfig:
        paths = [write_jsonl(tmp_path / f"{place}.jsonl", records) for place, records in enumerate(files)]
        return EmbeddingConfig(model_name_or_path="m", output_dir="out", train_dataset=paths, **changes)

    return make


def pairs(count: int, name: str = "q") -> list[dict]:
    return [{"query": f"{name}{place}", "pos": [f"d{place}"]} for place in range(count)]


def test_data_without_any_positive_are_refused_and_a_few_are_reported(config, caplog):
    without = [{"query": "q", "content": "d", "label": 0}, {"query": "r", "hits": [{"content": "d", "label": 0}]}]
    with pytest.raises(ValueError, match=r"0\.jsonl.*2 of 2 queries have no positive"):
        open_training_files(config(without))
    with caplog.at_level(logging.WARNING):
        (file,) = open_training_files(config(without + pairs(3)))
    assert "2 of 5 queries" in caplog.text and len(file.records) == 3


def test_grades_that_the_loss_does_not_read_are_reported(config, caplog):
    graded = [{"query": "q", "hits": [{"content": "d", "label": 2}, {"content": "e", "label": 1}]}]
    with caplog.at_level(logging.WARNING):
        open_training_files(config(graded))
        assert "info_nce reads which documents are positives" in caplog.text
        caplog.clear()
        open_training_files(config(graded, loss_type="cosent"))
        open_training_files(config(pairs(2)))
    assert not caplog.text


def test_files_take_their_names_and_samples(config):
    files = open_training_files(config(pairs(9), pairs(4, "r"), max_example_num_per_dataset=5))
    assert [(file.name, len(file.records)) for file in files] == [("0.jsonl", 5), ("1.jsonl", 4)]


def test_every_step_is_full_and_the_log_says_how_the_last_one_is_completed(config, caplog):
    settings = config(pairs(10), epochs=3, batch_size=2, gradient_accumulation_steps=2)
    (file,) = open_training_files(settings)
    for processes, size in ((1, 4), (2, 8)):
        shape = step_shape(settings, file, processes, 0)
        assert shape.steps_per_epoch == -(-30 // size) and shape.records == shape.steps_per_epoch * size
    steps = EmbeddingSteps(file, None, step_shape(settings, file, 1, 0), SamplingOptions(1, 8))
    with caplog.at_level(logging.INFO):
        report_steps([file], settings, CarriedSteps({"": steps}, 3))
    assert "8 steps of 4 records" in caplog.text and "2 records of a further pass" in caplog.text


def test_the_teacher_s_file_has_a_row_for_each_text(config, tmp_path):
    texts = [{"query": f"text {place}"} for place in range(6)]

    def files(*sizes: int, **changes):
        paths = [tmp_path / f"{place}.f32" for place in range(len(sizes))]
        for path, size in zip(paths, sizes, strict=True):
            np.zeros(size, np.float32).tofile(path)
        distilled = {"loss_type": "stella", "teacher_embedding_dim": 4, "train_dataset_vec": list(map(str, paths))}
        return open_training_files(config(*[texts] * len(sizes), **distilled | changes))

    assert [len(file.records) for file in files(24, 24)] == [6, 6]
    for sizes, width in (((25,), 4), ((0,), 4), ((24,), 3)):
        with pytest.raises(ValueError, match=rf"train_dataset_vec: .*0\.f32 has .* bytes; expected 6 texts x {width}"):
            files(*sizes, teacher_embedding_dim=width)
    with pytest.raises(ValueError, match="train_dataset_vec"):
        files(24, train_dataset_vec=None)
    with pytest.raises(ValueError, match="teacher_embedding_dim"):
        files(24, teacher_embedding_dim=None)


def test_a_loss_on_a_teacher_s_scores_needs_one_for_each_document(config):
    records = [{"query": "q", "pos": ["d"], "neg": ["e"], "pos_scores": [2], "neg_scores": [1]}, *pairs(1)]
    with pytest.raises(ValueError, match=r"0\.jsonl:2: .*pos_scores"):
        open_training_files(config(records, loss_type="kl_distillation"))
    (file,) = open_training_files(config(records[:1], teacher_loss_type="margin_mse"))
    assert file.store.teacher_scores.tolist() == [2, 1]


def test_several_teachers_are_one_of_their_average(config):
    hits = [{"content": f"d{i}", "label": 1 - i, "large": 3.0 * (1 - i), "small": 0.5 * i} for i in range(2)]
    keys = {"teacher_loss_type": "margin_mse", "teacher_score_key": ["large", "small"]}
    (file,) = open_training_files(config([{"query": "q", "hits": hits}], **keys))
    # of two documents each teacher gets the margin of the first one, here in opposite directions
    assert file.store.teacher_scores.tolist() == pytest.approx([1.5, 1.5], abs=1e-3)


def test_graded_pairs_need_different_labels_that_the_loss_can_read(config):
    def graded(*labels):
        return [{"query": f"q{place}", "content": "d", "label": label} for place, label in enumerate(labels)]

    with pytest.raises(ValueError, match="all labels are 0.5"):
        open_training_files(config(graded(0.5, 0.5), loss_type="cosent"))
    with pytest.raises(ValueError, match=r"0\.jsonl:2: label is 5; expected a value in \[-1, 1\]: correct it\."):
        open_training_files(config(graded(0.5, 5), loss_type="cosine_regression"))
    assert len(open_training_files(config(graded(0.5, 5), loss_type="cosent"))[0].records) == 2


def test_a_query_with_one_document_teaches_a_teacher_s_scores_nothing(config, caplog):
    alone = [{"query": "q", "pos": ["d"], "scores": [2]}]
    with pytest.raises(ValueError, match="1 of 1 queries have one document alone, so kl_distillation"):
        open_training_files(config(alone, loss_type="kl_distillation"))
    several = [{"query": "r", "pos": ["d", "e"], "scores": [2, 1]}]
    with caplog.at_level(logging.WARNING):
        open_training_files(config(alone + several, teacher_loss_type="kl_distillation"))
    assert "1 of 2 queries have one document alone" in caplog.text


def test_a_step_larger_than_its_file_is_reported(config, caplog):
    settings = config(pairs(3), batch_size=8)
    (file,) = open_training_files(settings)
    steps = EmbeddingSteps(file, None, step_shape(settings, file, 1, 0), SamplingOptions(1, 8))
    with caplog.at_level(logging.WARNING):
        report_steps([file], settings, CarriedSteps({"": steps}, 1))
    assert "a step has 8 records and the file 3" in caplog.text
