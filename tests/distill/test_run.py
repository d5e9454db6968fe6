"""Whole runs: output in order in the trainer's format, the same bytes after a stop and from two processes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from record_samples import random_records, read, write
from tiny_models import ENGLISH, tiny_bert, tiny_qwen2
from training_runs import (
    ROOT,
    engine_command,
    grouped_records,
    launch,
    pointwise_records,
    train,
    without_dropout,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from yes_no_samples import YES_NO, tiny_causal

from rag_retrieval import CrossEncoder, LLMDecoder, Reranker
from rag_retrieval.cli import main
from rag_retrieval.core.files import lock_file_of, locked
from rag_retrieval.data.records import DataError, Record
from rag_retrieval.distill import run as run_module
from rag_retrieval.distill.config import DistillConfig
from rag_retrieval.distill.run import Part, PartReader, TeacherError, distill, load_teachers, mean_logits, plan_parts
from rag_retrieval.infer.torch_backend import TorchBackend


@pytest.fixture
def keys(tmp_path, model_folders) -> dict:
    """A small run over records of all formats."""
    data = write(tmp_path / "data.jsonl", list(random_records(3, 60)))
    return {
        "dataset": str(data),
        "teachers": [model_folders["bert"]],
        "output": str(tmp_path / "out.jsonl"),
        "pairs_per_part": 10,
    }


def test_pairs_of_every_format_get_teacher_scores_in_input_order(keys, model_folders):
    summary = distill(DistillConfig(**keys))
    before = read(keys["dataset"])
    after = read(keys["output"], label_key="teacher_score")
    assert [(one.query, one.documents) for one in after] == [(one.query, one.documents) for one in before]
    assert [one.labels for one in read(keys["output"])] == [one.labels for one in before]
    kinds = [("pointwise" if one.format == "pointwise" else "hits") for one in before]
    assert [one.format for one in after] == kinds and set(kinds) == {"pointwise", "hits"}
    pairs = [(one.query, document) for one in before for document in one.documents]
    expected = CrossEncoder.from_pretrained(model_folders["bert"]).compute_score(pairs)
    found = torch.tensor([score for one in after for score in one.labels])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (summary.records, summary.pairs) == (60, len(pairs))
    probabilities = torch.tensor(
        [value for one in read(keys["output"], label_key="teacher_probability") for value in one.labels]
    )
    torch.testing.assert_close(probabilities, found.sigmoid(), atol=1e-6, rtol=0)


def test_the_data_are_never_written_over_and_a_folder_is_no_data(keys, tmp_path):
    before = Path(keys["dataset"]).read_bytes()
    with pytest.raises(ValueError, match="output: .*data.jsonl is the dataset, whose other keys would be lost"):
        distill(DistillConfig(**keys | {"output": keys["dataset"], "overwrite": True}))
    assert Path(keys["dataset"]).read_bytes() == before
    with pytest.raises(DataError, match="found a folder; expected a file that ends in"):
        distill(DistillConfig(**keys | {"dataset": str(tmp_path)}))


@pytest.mark.parametrize("max_len", [16, None])
def test_truncated_pairs_of_a_teacher_are_reported(keys, tmp_path, caplog, max_len):
    hits = [{"content": "river " * 30, "label": 1}, {"content": "a", "label": 0}, {"content": "b", "label": 0}]
    data = write_jsonl(tmp_path / "long.jsonl", [{"query": "river", "hits": hits}] * 2)
    distill(DistillConfig(**keys | {"dataset": str(data), "max_len": max_len}))
    truncated = [line for line in caplog.messages if "are cut" in line]
    expected = "33.3% of the first 6 pairs are longer than 16 tokens and are cut; max_length sets another limit"
    assert truncated == ([expected] if max_len else [])


def stop_after(monkeypatch, parts: int) -> list[int]:
    """Let scoring fail once so many parts are written; the list has the pairs of each part that was scored."""
    scored, whole = [], run_module.mean_logits

    def failing(teachers, pairs, batch_size):
        if len(scored) == parts:
            raise KeyboardInterrupt
        scored.append(len(pairs))
        return whole(teachers, pairs, batch_size)

    monkeypatch.setattr(run_module, "mean_logits", failing)
    return scored


def record(documents: int, query: str = "q") -> Record:
    return Record(query, ["d"] * documents, [1.0] * documents, [True] * documents, "hits", 1)


def test_a_part_is_closed_by_the_record_that_fills_it():
    plan = plan_parts(map(record, [2, 1, 4, 9, 1, 1]), pairs_per_part=3)
    assert plan == [Part(0, 2, 3), Part(2, 1, 4), Part(3, 1, 9), Part(4, 2, 2)]
    assert plan_parts([record(3)], 3) == [Part(0, 1, 3)]
    assert plan_parts([], 3) == []


@pytest.mark.parametrize("order, passes", [([0, 1, 2, 3], 1), ([1, 3], 1), ([3, 1, 2], 2), ([2, 2], 2)])
def test_the_records_of_parts_are_found_in_any_order_and_in_rising_order_in_one_pass(order, passes):
    records = [record(documents, f"q{place}") for place, documents in enumerate([2, 1, 4, 9, 1, 1])]
    plan, opened = plan_parts(records, 3), []
    reader = PartReader(lambda: opened.append(0) or iter(records))
    expected = [["q0", "q1"], ["q2"], ["q3"], ["q4", "q5"]]
    for place in order:
        assert [one.query for one in reader.records_of(plan[place])] == expected[place]
    assert len(opened) == passes


def test_a_stopped_run_continues_to_the_same_bytes(keys, tmp_path, monkeypatch):
    config = DistillConfig(**keys)
    distill(config)
    whole = Path(keys["output"]).read_bytes()
    stopped = DistillConfig(**keys | {"output": str(tmp_path / "stopped.jsonl")})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        first = stop_after(patch, 3)
        distill(stopped)
    assert len(first) == 3 and not Path(stopped.output).exists()
    with monkeypatch.context() as patch:
        rest = stop_after(patch, 10**6)
        distill(stopped)
    assert Path(stopped.output).read_bytes() == whole
    assert sum(first) + sum(rest) == sum(len(one.documents) for one in read(keys["dataset"]))
    assert not list(tmp_path.glob("*.parts"))


def test_other_data_or_teachers_do_not_reuse_finished_parts(keys, monkeypatch, model_folders):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        distill(DistillConfig(**keys))
    with pytest.raises(ValueError, match=r"work of a run that differs:\n  teachers: was \['bert [0-9a-f]{32}'\]"):
        distill(DistillConfig(**keys | {"teachers": [model_folders["xlm_roberta"]]}))
    with open(keys["dataset"], "a") as file:
        file.write(json.dumps({"query": "q", "content": "d", "label": 1}) + "\n")
    with pytest.raises(ValueError, match=r"finished work of a run that differs:\n  dataset: was '[0-9a-f]{8}', now"):
        distill(DistillConfig(**keys))
    distill(DistillConfig(**keys, overwrite=True))
    assert len(read(keys["output"])) == 61


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: text.partition("\n")[2]])
def test_a_damaged_part_is_named_and_scored_again_once_it_is_deleted(keys, tmp_path, monkeypatch, damage):
    config = DistillConfig(**keys)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        distill(config)
    file = tmp_path / "out.jsonl.parts" / "shard-000001" / "scored.jsonl"
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match=f"{file}: damaged.*a line for each; delete {file.parent}, and"):
        distill(config)
    assert not Path(keys["output"]).exists()
    shutil.rmtree(file.parent)
    assert distill(config).records == 60


def test_data_that_change_while_they_are_scored_are_refused(keys, monkeypatch):
    def shorten(config, parts, planned):
        lines = Path(keys["dataset"]).read_text().splitlines(keepends=True)
        Path(keys["dataset"]).write_text("".join(lines[:30]))
        return open_teachers(config, parts, planned)

    open_teachers = run_module.open_teachers
    monkeypatch.setattr(run_module, "open_teachers", shorten)
    with pytest.raises(DataError, match="data.jsonl: changed while it was scored"):
        distill(DistillConfig(**keys))


def test_a_worker_on_another_kind_of_device_than_planned_is_refused(keys):
    with pytest.raises(ValueError, match="device: a worker computes on cpu, and the first process on cuda"):
        run_module.open_teachers(DistillConfig(**keys), [], planned="cuda")


def test_a_folder_of_something_else_where_parts_go_is_refused_and_kept(keys, tmp_path):
    (tmp_path / "out.jsonl.parts").mkdir()
    (tmp_path / "out.jsonl.parts" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="out.jsonl.parts .*notes.txt"):
        distill(DistillConfig(**keys, overwrite=True))
    assert (tmp_path / "out.jsonl.parts" / "notes.txt").read_text() == "mine"


def test_an_output_that_is_a_folder_is_refused_whatever_may_be_overwritten(keys):
    Path(keys["output"]).mkdir()
    with pytest.raises(ValueError, match="out.jsonl is a folder; give the name of a file"):
        distill(DistillConfig(**keys, overwrite=True))


def test_a_second_run_on_one_output_is_refused(keys):
    output = Path(keys["output"])
    with locked(lock_file_of(output), "busy"), pytest.raises(ValueError, match=f"another.*{output}"):
        distill(DistillConfig(**keys, overwrite=True))


def test_existing_output_and_bad_lines_are_refused_before_loading_a_teacher(keys, monkeypatch):
    monkeypatch.setattr(run_module, "load_teachers", None)
    Path(keys["output"]).write_text("precious")
    with pytest.raises(ValueError, match="out.jsonl exists; take another output, or overwrite: true"):
        distill(DistillConfig(**keys))
    Path(keys["dataset"]).write_text('{"query": "q"}\n{"query": "q", "content": "d", "label": 1}\n')
    with pytest.raises(DataError, match="data.jsonl:1: found the keys 'query'"):
        distill(DistillConfig(**keys, overwrite=True))
    assert Path(keys["output"]).read_text() == "precious"


def test_the_command_prints_a_summary_and_says_what_is_wrong(keys, capsys):
    keys["dataset"] = write_jsonl(Path(keys["dataset"]), grouped_records(60))
    arguments = [word for key, value in keys.items() for word in (f"--{key}", value if key != "teachers" else value[0])]
    assert main(["distill", *map(str, arguments)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{keys['output']}: 60 records, ") and "  label 0 " in text and "  label 1 " in text
    assert main(["distill", *map(str, arguments)]) == 2
    assert "exists; take another output" in capsys.readouterr().err
    assert main(["distill", "--teacher", "x"]) == 2
    assert "--teacher: unknown key; did you mean teachers?" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pointwise", "grouped"])
@pytest.mark.parametrize("loss", ["point_ce", "point_mse"])
def test_a_student_learns_from_the_soft_labels_of_an_output(tmp_path, model_folders, kind, loss):
    """The teacher is the student with its head turned round, so that it says no where the student says yes."""
    teacher = CrossEncoder.from_pretrained(model_folders["bert"])
    with torch.no_grad():
        teacher.model.classifier.weight.neg_()
    teacher.save_pretrained(tmp_path / "teacher")
    records = pointwise_records(40) if kind == "pointwise" else grouped_records(8)
    data, output = write_jsonl(tmp_path / "hard.jsonl", records), str(tmp_path / "soft.jsonl")
    distill(DistillConfig(dataset=data, teachers=str(tmp_path / "teacher"), output=output))
    values = {
        "model_name_or_path": without_dropout(str(shutil.copytree(model_folders["bert"], tmp_path / "student"))),
        "model_type": "bert_encoder",
        "max_len": 64,
        "train_dataset": output,
        "train_dataset_type": "pointwise",
        "train_label_key": "teacher_probability",
        "loss_type": loss,
        "output_dir": str(tmp_path / "run"),
        "batch_size": 8,
        "epochs": 4,
        "lr": 1e-3,
        "num_workers": 0,
    }
    train(values)
    pairs = [(one.query, document) for one in read(data) for document in one.documents]
    wanted = teacher.compute_score(pairs, normalize=True)
    before, after = (
        CrossEncoder.from_pretrained(folder).compute_score(pairs, normalize=True)
        for folder in (model_folders["bert"], tmp_path / "run" / "model")
    )
    assert (after - wanted).abs().mean() < 0.25 * (before - wanted).abs().mean()


# --- several processes ---


def command(keys: dict, tmp_path: Path) -> list[str]:
    file = tmp_path / "distill.yaml"
    file.write_text(json.dumps(keys))
    return ["rag_retrieval.cli", "distill", "--config", str(file)]


# a process that waits in its fourth part, to be killed
HELD = """
import sys, time
from rag_retrieval.cli import main
from rag_retrieval.distill import run
score, scored = run.mean_logits, []
def held_score(*arguments):
    scored.append(arguments)
    if len(scored) > 3:
        time.sleep(300)
    return score(*arguments)
run.mean_logits = held_score
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_one_killed_process_ends_both_and_the_next_run_continues_to_the_bytes_of_one(keys, tmp_path):
    keys |= {"dataset": write_jsonl(tmp_path / "many.jsonl", grouped_records(60)), "pairs_per_part": 20}
    distill(DistillConfig(**keys))
    whole = Path(keys["output"]).read_bytes()
    keys["output"] = str(tmp_path / "two.jsonl")
    held = tmp_path / "held.py"
    held.write_text(HELD)
    _, *options = command(keys, tmp_path)
    two = [sys.executable, "-m", *engine_command("config/ddp.yaml", 2, str(held)), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(two, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    parts = Path(keys["output"] + ".parts")
    while process.poll() is None and len(list(parts.glob("shard-*"))) < 6:
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    workers[0].kill()
    _, errors = process.communicate(timeout=600)
    assert process.returncode != 0 and b"SIGKILL" in errors and not any(worker.is_running() for worker in workers)
    assert len(list(parts.glob("shard-*"))) == 6 and not Path(keys["output"]).exists()
    done = launch([*engine_command("config/ddp.yaml", 2, "-m"), *command(keys, tmp_path)])
    assert done.returncode == 0, done.stderr
    assert Path(keys["output"]).read_bytes() == whole
    assert done.stdout.count("60 records") == 1, "one process tells"
    assert " pairs were done before" in done.stderr


@pytest.mark.slow
def test_ray_workers_write_the_bytes_of_one_process_and_none_is_left(keys, tmp_path):
    distill(DistillConfig(**keys))
    whole = Path(keys["output"]).read_bytes()
    keys["output"] = str(tmp_path / "ray.jsonl")
    keys["dataset"] = str(Path(keys["dataset"]).relative_to(tmp_path))  # found from the current folder
    _, *options = command(keys, tmp_path)
    started = [sys.executable, "-c", LISTED, *options, "--engine", "ray", "--ray_workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(started, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert Path(keys["output"]).read_bytes() == whole
    assert done.stdout.splitlines()[-1] == "children: []" and "60 records" in done.stdout


# the command, and then the processes that it started and left
LISTED = """
import sys
import psutil
from rag_retrieval.cli import main
code = main(sys.argv[1:])
print("children:", [child.cmdline() for child in psutil.Process().children(recursive=True)])
sys.exit(code)
"""


@pytest.mark.slow
def test_a_mistake_ends_both_processes_and_is_printed(keys, tmp_path):
    keys["teachers"] = [str(tmp_path)]
    (tmp_path / "config.json").write_text("{}")
    done = launch([*engine_command("config/ddp.yaml", 2, "-m"), *command(keys, tmp_path)])
    assert done.returncode != 0 and not Path(keys["output"]).exists()
    assert f": teachers: {tmp_path}: " in done.stderr


# --- teachers: rerankers of ours and of others, and language models that are asked ---

PAIRS = [(query, document) for query in ENGLISH[:3] for document in ENGLISH[3:6]]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CPU = torch.device("cpu")


def config(*teachers, **changes) -> DistillConfig:
    keys = {"dataset": "d.jsonl", "output": "o.jsonl", "yes_token": "1", "no_token": "0"}
    return DistillConfig(**keys | {"teachers": [str(name) for name in teachers]} | changes)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> str:
    folder = tiny_causal(tmp_path_factory.mktemp("chat"), "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def test_a_language_model_is_asked_in_its_own_chat_template(chat_model):
    prompt = "Is this right? {instruction}\nQ: {query}\nD: {document}\n1 or 0?"
    asked = config(chat_model, system="Be strict.", instruction="find facts", prompt=prompt)
    scores = mean_logits(load_teachers(asked, CPU), PAIRS, 4)
    tokenizer, model = AutoTokenizer.from_pretrained(chat_model), AutoModelForCausalLM.from_pretrained(chat_model)
    yes, no = tokenizer.convert_tokens_to_ids(["1", "0"])
    for (query, document), score in zip(PAIRS, scores.tolist(), strict=True):
        user = f"Is this right? find facts\nQ: {query}\nD: {document}\n1 or 0?"
        messages = [{"role": "system", "content": "Be strict."}, {"role": "user", "content": user}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            probabilities = model.eval()(ids).logits[0, -1].double().softmax(dim=0)
        expected = (probabilities[yes] / probabilities[no]).log().float()
        torch.testing.assert_close(torch.tensor(score), expected, atol=1e-5, rtol=1e-5)


def test_the_language_changes_the_question(chat_model):
    english, chinese = (
        mean_logits(load_teachers(config(chat_model, language=language), CPU), PAIRS, 9) for language in ("en", "zh")
    )
    assert not np.allclose(english, chinese, atol=1e-3)


def test_a_reranker_saved_here_brings_its_own_question_and_others_are_ignored_by_name(tmp_path, chat_model, caplog):
    LLMDecoder.from_pretrained(chat_model, **YES_NO).save_pretrained(tmp_path)
    (teacher,) = load_teachers(config(tmp_path, prompt="Other {query} {document}"), CPU)
    (line,) = [line for line in caplog.messages if "question" in line]
    assert str(tmp_path) in line and "prompt" in line
    caplog.clear()
    asked = dict(system="Be strict.", instruction="find facts", prompt="Other {query} {document} ")
    load_teachers(config(chat_model, **asked), CPU)
    assert not any("question" in line for line in caplog.messages)
    settings = teacher.backend.scorer.settings
    assert settings.query_format == YES_NO["query_format"] and settings.yes_token == "a"
    expected = LLMDecoder.from_pretrained(tmp_path).compute_score(PAIRS).tolist()
    assert mean_logits([teacher], PAIRS, 9).tolist() == expected


def test_scores_of_several_teachers_are_the_mean_of_their_logits(model_folders, load_tiny, chat_model, tmp_path):
    load_tiny("llama").save_pretrained(tmp_path)
    teachers = load_teachers(config(model_folders["bert"], tmp_path, chat_model, max_len=200), CPU)
    scorers = [teacher.backend.scorer for teacher in teachers]
    assert [type(scorer) for scorer in scorers] == [CrossEncoder, LLMDecoder, LLMDecoder]
    assert [scorer.settings.head for scorer in scorers] == [None, None, "yes_no"]
    expected = sum(scorer.compute_score(PAIRS).double() for scorer in scorers) / 3
    np.testing.assert_allclose(mean_logits(teachers, PAIRS, 256), expected.numpy(), rtol=1e-6)
    assert {teacher.max_length for teacher in teachers} == {200}


def test_what_cannot_teach_is_refused(tmp_path, chat_model):
    with pytest.raises(ValueError, match="teachers: .*BertModel.*Give a reranker"):
        load_teachers(config(tiny_bert(tmp_path / "base")), CPU)
    with pytest.raises(ValueError, match="yes_token 'yes' must be one token.*'1' and '0', 'A' and 'B'"):
        load_teachers(config(chat_model, yes_token="yes"), CPU)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        load_teachers(config(tiny_qwen2(tmp_path / "no-chat")), CPU)


def test_half_precision_weights_are_loaded_on_request(model_folders):
    (teacher,) = load_teachers(config(model_folders["bert"], dtype="bfloat16"), CPU)
    assert teacher.backend.scorer.model.dtype == torch.bfloat16


def test_a_score_that_is_not_finite_stops_the_run(load_tiny):
    teacher = load_tiny("bert")
    with torch.no_grad():
        teacher.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(TeacherError, match="query 'A reranker reads.*nan"):
        mean_logits([Reranker.from_backend(TorchBackend(teacher))], PAIRS, 9)
