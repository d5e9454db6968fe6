"""Whole runs of the reranker trainer in this process, against plain loops written here."""

import gzip
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny_models import tiny_llama, tiny_qwen2
from training_runs import (
    final_weights,
    grouped_records,
    pointwise_records,
    read_metrics,
    train,
    write_jsonl,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rag_retrieval.core.distributed import StartError
from rag_retrieval.data.sampling import epoch_order, pair_order
from rag_retrieval.models import cpu_products
from rag_retrieval.models.cross_encoder import CrossEncoder
from rag_retrieval.models.llm_decoder import LLMDecoder
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.train import run as run_module
from rag_retrieval.train.card import read_run_record
from rag_retrieval.train.reranker.config import RerankerConfig
from rag_retrieval.train.reranker.run import run as run_reranker
from rag_retrieval.train.run_folder import folder_lock
from rag_retrieval.train.task import TrainingError

EPSILON = 1e-3  # Adam divides rounding noise by itself where a gradient is zero, as that of key biases is
LOSSES = ("point_ce", "point_mse", "pairwise_ranknet", "listwise_ce")


# --- the same steps as a plain loop ---


def plain_loss(loss_type: str, groups: list[tuple[torch.Tensor, list[float]]]) -> torch.Tensor:
    """The mean loss of (scores, labels) groups, pair by pair and group by group, straight from the
    formulas."""
    terms = []
    for scores, labels in groups:
        for place, label in enumerate(labels):
            probability = torch.sigmoid(scores[place])
            if loss_type == "point_ce":
                terms.append(-(label * torch.log(probability) + (1 - label) * torch.log(1 - probability)))
            elif loss_type == "point_mse":
                terms.append((probability - label) ** 2)
            elif loss_type == "listwise_ce" and label == 1:
                terms.append(-torch.log(torch.exp(scores[place]) / torch.exp(scores).sum()))
            elif loss_type == "pairwise_ranknet":
                for other, higher in enumerate(labels):
                    if label < higher:
                        difference = scores[place] - scores[other]
                        terms.append((higher - label) * torch.log(1 + torch.exp(difference)))
    return sum(terms) / len(terms) if terms else groups[0][0].sum() * 0


def plain_run(values: dict, records: list[dict], steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of `steps` optimizer steps on whole groups or pairs, in the trainer's
    order."""
    torch.manual_seed(42)
    model = AutoModelForSequenceClassification.from_pretrained(values["model_name_or_path"], num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(values["model_name_or_path"])
    decayed = [p for p in model.parameters() if p.dim() > 1]
    spared = [p for p in model.parameters() if p.dim() == 1]  # biases, LayerNorm
    head = {id(p) for p in model.classifier.parameters()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in members if (id(p) in head) == new], "lr": rate, "weight_decay": decay}
            for members, decay in ((decayed, 0.01), (spared, 0.0))
            for new, rate in ((False, 1e-3), (True, 1e-2))
        ],
        eps=values["adam_epsilon"],
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    per_step = values["batch_size"] * values.get("gradient_accumulation_steps", 1)
    per_epoch = -(-len(records) // per_step)
    losses = []
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        order = drawn_order(records, epoch)[place * per_step : (place + 1) * per_step]
        loss = plain_loss(values["loss_type"], [scored(model, tokenizer, records[row]) for row in order])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        total = per_epoch * values["epochs"]
        factor = 0.5 * (1 + np.cos(np.pi * step / total))  # no warmup
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.step()
    return losses, model.state_dict()


def drawn_order(records: list[dict], epoch: int) -> list[int]:
    """The trainer's order: of groups, or of pairs that stand sorted by the first appearance of their
    query."""
    if "hits" in records[0]:
        return epoch_order(42, epoch, len(records)).tolist()
    rows_of: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        rows_of.setdefault(record["query"], []).append(row)
    rows = [row for of_query in rows_of.values() for row in of_query]
    return [rows[place] for place in pair_order(42, epoch, np.array([len(r) for r in rows_of.values()]))]


def scored(model, tokenizer, record: dict) -> tuple[torch.Tensor, list[float]]:
    hits = record.get("hits", [record])
    queries, documents = [record["query"]] * len(hits), [hit["content"] for hit in hits]
    batch = tokenizer(queries, documents, padding=True, truncation=True, max_length=48, return_tensors="pt")
    return model(**batch).logits[:, 0], [hit["label"] for hit in hits]


def equal_labels(record: dict) -> dict:
    return {**record, "hits": [hit | {"label": 0} for hit in record["hits"]]}


def records_for(loss_type: str) -> list[dict]:
    if loss_type.startswith("point"):
        return pointwise_records(22, labels=(0, 0.25, 1))
    if loss_type == "listwise_ce":
        return grouped_records(22)
    # labels over three levels; many groups without an ordered pair, so that whole steps have none
    records = grouped_records(22, levels=(0, 1, 2), sizes=(1, 2, 5))
    return [record if place % 5 == 0 else equal_labels(record) for place, record in enumerate(records)]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_five_steps_equal_a_plain_loop(settings, loss_type, accumulation):
    records = records_for(loss_type)
    values = settings(
        loss_type,
        records,
        batch_size=2,
        gradient_accumulation_steps=accumulation,
        epochs=2,
        warmup_proportion=0.0,
        adam_epsilon=EPSILON,
    )
    steps = 2 * -(-22 // (2 * accumulation))
    losses, weights = plain_run(values, records, steps)
    train(values)
    logged = [line["loss"] for line in read_metrics(Path(values["output_dir"]), "train")]
    assert len(logged) == steps >= 5
    assert logged == pytest.approx(losses, abs=1e-5)
    if loss_type == "pairwise_ranknet" and accumulation == 1:
        assert 0.0 in losses, "a step without an ordered pair belongs to the test"
    for name, value in final_weights(values["output_dir"]).items():
        torch.testing.assert_close(value, weights[name], atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("loss_type", LOSSES)
def test_accumulation_changes_nothing(settings, loss_type, tmp_path):
    records = pointwise_records(90) if loss_type.startswith("point") else grouped_records(90)
    at_once = settings(loss_type, records, batch_size=32, adam_epsilon=EPSILON)
    in_parts = at_once | {"batch_size": 8, "gradient_accumulation_steps": 4, "output_dir": str(tmp_path / "parts")}
    train(at_once), train(in_parts)
    first, second = (final_weights(values["output_dir"]) for values in (at_once, in_parts))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=0)
    logs = [read_metrics(Path(values["output_dir"]), "train") for values in (at_once, in_parts)]
    assert [line["loss"] for line in logs[0]] == pytest.approx([line["loss"] for line in logs[1]], abs=1e-5)


def test_triples_train_and_validate_as_equal_pos_neg_groups_do(settings, tmp_path):
    records = [
        {"query": one["query"], "pos": [hits[0]], "neg": hits[1:]}
        for one in grouped_records(20, sizes=(3, 5))
        for hits in [list(dict.fromkeys(hit["content"] for hit in one["hits"]))]
    ]
    lines = ["\t".join((one["query"], one["pos"][0], text)) + "\n" for one in records for text in one["neg"]]
    (tmp_path / "train.tsv").write_text("".join(lines))
    (tmp_path / "dev.tsv.gz").write_bytes(gzip.compress("".join(lines).encode()))
    for loss_type in ("listwise_ce", "point_ce"):
        values = settings(loss_type, records, epochs=1, batch_size=4)
        values |= {"val_dataset": values["train_dataset"], "output_dir": str(tmp_path / f"{loss_type}-records")}
        triples = values | {"train_dataset": str(tmp_path / "train.tsv"), "val_dataset": str(tmp_path / "dev.tsv.gz")}
        triples |= {"output_dir": str(tmp_path / f"{loss_type}-triples")}
        train(values), train(triples)
        first, second = (Path(run["output_dir"]) for run in (values, triples))
        for name, weight in final_weights(first).items():
            assert torch.equal(weight, final_weights(second)[name])
        (expected,), (found,) = (read_metrics(folder, "eval") for folder in (first, second))
        assert [found[name] for name in ("ndcg@10", "loss")] == [expected[name] for name in ("ndcg@10", "loss")]


# --- resuming ---


class Killed(Exception):
    pass


def train_and_die(values: dict, after: int, monkeypatch) -> None:
    from rag_retrieval.train.loop import Trainer

    take_step = Trainer.train_step

    def step_or_die(self, micro_batches):
        if self.state.step == after:
            raise Killed
        take_step(self, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_or_die)
        with pytest.raises(Killed):
            train(values)


def log_without_speed(output_dir: str) -> list[dict]:
    lines = map(json.loads, (Path(output_dir) / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "pairs_per_second"} for line in lines]


@pytest.mark.parametrize(("num_workers", "after"), [(0, 4), (0, 8), (2, 8)])
def test_a_resumed_run_has_the_bits_of_one_never_stopped(
    settings, tmp_path, bert_with_dropout, monkeypatch, num_workers, after
):
    values = settings(
        records=grouped_records(37, sizes=(3, 7, 12)),
        model_name_or_path=bert_with_dropout,
        epochs=2,
        batch_size=4,
        gradient_accumulation_steps=2,
        num_workers=num_workers,
        save_steps=3,
        train_group_size=4,
        shuffle_rate=0.5,
        val_dataset=write_jsonl(tmp_path / "val.jsonl", grouped_records(8, seed=3)),
        log_interval=2,
    )
    cut = values | {"output_dir": str(tmp_path / "cut")}
    train(values)
    train_and_die(cut, after, monkeypatch)
    assert train(cut | {"resume": "auto"}).step == 10
    whole, resumed = final_weights(values["output_dir"]), final_weights(cut["output_dir"])
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert log_without_speed(values["output_dir"]) == log_without_speed(cut["output_dir"])


def test_resuming_from_a_folder_and_from_another_runs_checkpoint(settings, tmp_path):
    values = settings(epochs=2, save_steps=4, num_max_checkpoints=9)
    train(values)
    expected = final_weights(values["output_dir"])
    checkpoint = str(Path(values["output_dir"]) / "checkpoint-4")
    elsewhere = values | {"resume": checkpoint, "output_dir": str(tmp_path / "elsewhere")}
    assert train(elsewhere).step == train(values | {"resume": checkpoint}).step == 10
    for output_dir in (elsewhere["output_dir"], values["output_dir"]):
        found = final_weights(output_dir)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_finished_run_is_left_alone(settings, caplog):
    values = settings()
    train(values)
    caplog.set_level(logging.INFO, "rag_retrieval")
    assert train(values | {"resume": "auto"}) is None
    assert "finished; nothing to resume" in caplog.text


def test_a_second_run_is_refused_before_anything_is_loaded(settings):
    values = settings()
    train(values)
    with pytest.raises(StartError, match="already holds a run"):
        train(values | {"model_name_or_path": "/nowhere"})
    assert train(values | {"overwrite_output_dir": True}).step == 5


def test_a_run_that_cannot_start_leaves_the_earlier_one_whole(settings):
    values = settings(save_on_epoch_end=True)
    train(values)
    before = sorted(Path(values["output_dir"]).rglob("*"))
    with pytest.raises(StartError):
        train(values | {"overwrite_output_dir": True, "freeze_layers": 9})
    assert sorted(Path(values["output_dir"]).rglob("*")) == before


def test_overwriting_a_run_does_not_remove_the_model_to_start_from(settings):
    values = settings()
    train(values)
    model = str(Path(values["output_dir"]) / "model")
    with pytest.raises(StartError, match="is a result of the run in output_dir"):
        train(values | {"overwrite_output_dir": True, "model_name_or_path": model})


# --- validation ---


@pytest.fixture
def validated(settings, tmp_path):
    def make(loss_type="listwise_ce", records=None, validation=None, **changes) -> dict:
        validation = validation if validation is not None else grouped_records(6, seed=9)
        return settings(loss_type, records, val_dataset=write_jsonl(tmp_path / "val.jsonl", validation), **changes)

    return make


def test_the_model_of_the_best_evaluation_is_the_result(validated):
    values = validated(epochs=3, metric_for_best_model="loss", lr=0.05, num_max_checkpoints=1)
    state = train(values)
    evaluated = {line["step"]: line["loss"] for line in read_metrics(Path(values["output_dir"]), "eval")}
    assert state.best_step == min(evaluated, key=evaluated.get) and state.best_metric == evaluated[state.best_step]
    model = Path(values["output_dir"]) / "model"
    best = Path(values["output_dir"]) / f"checkpoint-{state.best_step}" / "model"
    assert (model / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()


def test_a_metric_that_is_not_logged_otherwise_may_decide(validated):
    values = validated(epochs=2, metric_for_best_model="err@3", lr=0.05)
    state = train(values)
    evaluated = {line["step"]: line["err@3"] for line in read_metrics(Path(values["output_dir"]), "eval")}
    assert state.best_step == max(evaluated, key=evaluated.get) and state.best_metric == max(evaluated.values())


def test_a_ranking_metric_that_cannot_be_measured_gives_way_to_the_loss(validated, caplog):
    values = validated("point_ce", validation=pointwise_records(1) + [{"query": "other", "content": "d", "label": 0}])
    state = train(values)
    assert "metric_for_best_model: ndcg@10 cannot be measured" in caplog.text
    (evaluation,) = read_metrics(Path(values["output_dir"]), "eval")
    assert evaluation.keys() == {"step", "kind", "loss"} and state.best_metric == evaluation["loss"]


def test_groups_without_any_relevant_document_give_way_to_the_loss(validated, caplog):
    records = [
        {**record, "hits": [hit | {"label": hit["label"] - 1} for hit in record["hits"]]}  # no label of 1 or more
        for record in grouped_records(4)
    ]
    values = validated("pairwise_ranknet", validation=records)
    assert train(values).best_metric > 0.0
    assert "cannot be measured" in caplog.text


# --- failures ---


def poison(monkeypatch, value: float, step: int) -> None:
    forward, calls = CrossEncoder.forward, []

    def poisoned(self, batch):
        calls.append(1)
        scores = forward(self, batch)
        return scores + value if len(calls) == step else scores

    monkeypatch.setattr(CrossEncoder, "forward", poisoned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_scores_that_are_not_finite_stop_every_loss(settings, loss_type, value, monkeypatch):
    poison(monkeypatch, value, step=3)
    values = settings(loss_type, save_steps=2)
    with pytest.raises(TrainingError) as caught:
        train(values)
    at_fault, _, first_batch = str(caught.value).partition("The first of these micro-batches")
    assert "the loss of step 3 is nan" in at_fault
    lines, of_first = (list(map(int, re.findall(r"train\.jsonl:(\d+)", text))) for text in (at_fault, first_batch))
    per_step = values["batch_size"]
    records = [json.loads(line) for line in Path(values["train_dataset"]).read_text().splitlines()]
    order = drawn_order(records, 0)[2 * per_step : 3 * per_step]
    assert sorted(lines) == sorted(place + 1 for place in order)
    assert of_first and set(of_first) <= set(lines)


def test_a_validation_score_that_is_not_finite_is_named(validated, monkeypatch):
    poison(monkeypatch, float("nan"), step=6)
    with pytest.raises(TrainingError, match=r"of 23 validation pairs have a score that is not finite, on lines \d"):
        train(validated())


# --- the watch for a model that learns nothing ---


def test_a_model_that_gives_every_pair_the_same_score_is_reported_once(settings, monkeypatch, caplog):
    forward = CrossEncoder.forward
    monkeypatch.setattr(CrossEncoder, "forward", lambda self, batch: forward(self, batch) * 1e-4)
    train(settings("listwise_ce", epochs=4, lr=1e-7))
    assert caplog.text.count("gives every pair nearly the same score") == 1
    assert "head_lr (1e-3)" in caplog.text


def test_a_run_that_learns_is_not_suspected(settings, caplog):
    train(settings("listwise_ce", epochs=6))
    assert "same score" not in caplog.text


# --- precision, parameters, LoRA ---


def test_bf16_trains_float32_weights_with_a_float32_loss(settings, monkeypatch):
    seen = []
    forward = CrossEncoder.forward

    def watched(self, batch):
        inside = []
        linear = self.model.bert.encoder.layer[0].intermediate.dense
        hook = linear.register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
        scores = forward(self, batch)
        hook.remove()
        seen.append((linear.weight.dtype, *inside, scores.dtype))
        return scores

    monkeypatch.setattr(CrossEncoder, "forward", watched)
    values = settings(mixed_precision="bf16")
    train(values)
    assert set(seen) == {(torch.float32, torch.bfloat16, torch.float32)}
    assert {value.dtype for value in final_weights(values["output_dir"]).values()} == {torch.float32}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without an accelerator")
def test_fp16_without_a_gpu_is_refused(settings):
    from rag_retrieval.train.launch import LaunchError

    with pytest.raises(LaunchError, match="fp16 needs a GPU"):
        train(settings(mixed_precision="fp16"))


def base_weights(folder: str) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).state_dict()


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in after if not torch.equal(before[name], after[name])}


def test_frozen_parts_do_not_change_and_all_others_do(settings, bert):
    values = settings(freeze_embeddings=True, freeze_layers=1, weight_decay=0.5)
    train(values)
    after = final_weights(values["output_dir"])
    frozen = {name for name in after if "embeddings" in name or ".layer.0." in name}
    assert changed(base_weights(bert), after) == after.keys() - frozen


def test_bitfit_changes_biases_and_the_new_head_alone(settings, bert, decoder, tmp_path):
    values = settings(fine_tune_type="bitfit")
    train(values)
    after = final_weights(values["output_dir"])
    expected = {name for name in after if name.endswith(".bias") or name.startswith("classifier.")}
    # a key's bias moves all of a token's attention alike, and its gradient is 0
    assert changed(base_weights(bert), after) - expected == set()
    assert expected - changed(base_weights(bert), after) <= {name for name in after if name.endswith("key.bias")}
    model = tiny_llama(tmp_path / "llama")
    with pytest.raises(StartError, match="fine_tune_type bitfit: a Llama.* has no biases"):
        train(decoder(fine_tune_type="bitfit", model_name_or_path=model, output_dir=str(tmp_path / "refused")))


def test_freezing_all_layers_is_refused(settings):
    with pytest.raises(StartError, match="freeze_layers 2: this model has 2 layers"):
        train(settings(freeze_layers=2))


def test_weight_decay_is_applied(settings, tmp_path):
    plain = settings(weight_decay=0.0, freeze_layers=1)
    decayed = plain | {"weight_decay": 10.0, "output_dir": str(tmp_path / "decayed")}
    train(plain), train(decayed)
    name = "bert.encoder.layer.1.output.dense.weight"
    assert final_weights(decayed["output_dir"])[name].norm() < 0.99 * final_weights(plain["output_dir"])[name].norm()


def test_clipping_is_applied_and_none_switches_it_off(settings, tmp_path):
    """A tiny norm makes the gradient vanish beside Adam's epsilon; a huge epsilon makes that visible."""
    runs = {}
    for name, limit in (("none", None), ("large", 1e6), ("tiny", 1e-6)):
        values = settings(max_grad_norm=limit, adam_epsilon=1.0, output_dir=str(tmp_path / name), weight_decay=0.0)
        train(values)
        runs[name] = final_weights(values["output_dir"])
    name = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(runs["none"][name], runs["large"][name])
    assert not torch.equal(runs["none"][name], runs["tiny"][name])


def learning_rates_of_head_and_body(values: dict, monkeypatch) -> tuple[set[float], set[float]]:
    from rag_retrieval.train.loop import Trainer

    found = []

    def look(self):
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for group, rate in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            found.extend(("classifier" in names[id(p)], rate) for p in group["params"])
        return self.state

    monkeypatch.setattr(Trainer, "train", look)
    monkeypatch.setattr(run_module, "write_card", lambda *arguments: None)  # there is no model
    train(values)
    return {rate for head, rate in found if head}, {rate for head, rate in found if not head}


def test_a_new_head_learns_at_its_own_rate(settings, monkeypatch):
    assert learning_rates_of_head_and_body(settings(lr=1e-4, head_lr=3e-3), monkeypatch) == ({3e-3}, {1e-4})


def test_a_trained_head_learns_at_the_rate_of_the_body(settings, tmp_path, monkeypatch):
    first = settings(output_dir=str(tmp_path / "first"))
    train(first)
    values = settings(lr=1e-4, head_lr=3e-3, model_name_or_path=str(tmp_path / "first" / "model"))
    assert learning_rates_of_head_and_body(values, monkeypatch) == ({1e-4}, {1e-4})


@pytest.fixture
def decoder(settings, qwen2):
    return lambda *loss, **changes: settings(
        *loss, **{"model_name_or_path": qwen2, "model_type": "llm_decoder", "max_len": 64} | changes
    )


LORA = {"lora_r": 4, "lora_target_modules": "all-linear"}


def test_layers_multiply_in_the_same_way_when_they_are_computed_again(settings, tmp_path, monkeypatch):
    products, multiply = [], cpu_products.product
    monkeypatch.setattr(cpu_products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(cpu_products, "product", lambda *tensors: products.append(1) or multiply(*tensors))
    plain = settings(max_tokens_per_batch=10**6)
    saving = plain | {"gradient_checkpointing": True, "output_dir": str(tmp_path / "saving")}
    counts = []
    for values in (plain, saving):
        train(values)
        counts.append(len(products))
    assert 0 < counts[0] < counts[1] - counts[0]
    first, second = (final_weights(values["output_dir"]) for values in (plain, saving))
    assert all(torch.equal(first[name], second[name]) for name in first)


def count_layer_runs(monkeypatch, family: str) -> list[int]:
    """A list that grows by one with each run of a transformer layer in training."""
    from transformers.models.bert.modeling_bert import BertIntermediate
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    part, runs = {"bert": BertIntermediate, "qwen2": Qwen2MLP}[family], []
    forward = part.forward

    def counting(self, hidden):
        if torch.is_grad_enabled():  # loading checks a few pairs without
            runs.append(1)
        return forward(self, hidden)

    monkeypatch.setattr(part, "forward", counting)
    return runs


@pytest.mark.parametrize("lora", [{}, LORA])
@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(
    settings, decoder, tmp_path, family, lora, monkeypatch
):
    make = settings if family == "bert" else decoder
    plain = make(**lora, max_tokens_per_batch=10**6)  # one forward pass in each step
    saving = plain | {"gradient_checkpointing": True, "output_dir": str(tmp_path / "saving")}
    runs = count_layer_runs(monkeypatch, family)
    train(plain)
    assert len(runs) == 5 * 2  # steps, layers
    train(saving)
    # the last layer is not computed again: its activations would be the first that the backward needs
    assert len(runs) == 5 * 2 + 5 * (2 + 1)
    first, second = (final_weights(values["output_dir"]) for values in (plain, saving))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_compiled_layers_take_the_same_steps(settings, decoder, tmp_path, family, monkeypatch):
    make = settings if family == "bert" else decoder
    plain = make(adam_epsilon=1e-3)  # Adam divides rounding noise by itself where a gradient is zero: key biases
    compiled = plain | {"torch_compile": True, "output_dir": str(tmp_path / "compiled")}
    # the graphs, forward and backward, run as they are traced: generating their code takes minutes and is torch's part
    calls, compile_module = [], torch.nn.Module.compile

    def compile_and_note(self, **how):
        calls.append(how)
        compile_module(self, backend="aot_eager", **how)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_and_note)
    train(plain)
    assert not calls
    train(compiled)
    assert calls == [{"dynamic": True}] * 2  # layers
    first, second = (final_weights(values["output_dir"]) for values in (plain, compiled))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=0)


def pairs_to_score() -> list[tuple[str, str]]:
    return [(record["query"], record["content"]) for record in pointwise_records(12, seed=77)]


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_lora_trains_adapters_and_head_and_writes_merged_and_adapter(settings, decoder, bert, qwen2, tmp_path, family):
    from peft import PeftModel

    make, base, loader = (settings, bert, CrossEncoder) if family == "bert" else (decoder, qwen2, LLMDecoder)
    values = make(**LORA, lr=1e-2, head_lr=1e-2, epochs=2)
    train(values)
    output_dir = Path(values["output_dir"])
    merged = loader.from_pretrained(str(output_dir / "model")).compute_score(pairs_to_score())
    scorer: PairScorer = loader.from_pretrained(base, max_length=values["max_len"])
    untrained = {name: value.clone() for name, value in scorer.model.state_dict().items()}
    PeftModel.from_pretrained(scorer.model, str(output_dir / "adapter"))  # puts the adapter into the model
    torch.testing.assert_close(merged, scorer.compute_score(pairs_to_score()), atol=1e-4, rtol=1e-4)
    after = final_weights(output_dir)
    assert all("embed" not in name and "orm" not in name for name in changed(untrained, after))
    assert {"classifier.weight", "score.weight"} & changed(untrained, after)


def test_lora_resumes_to_the_same_bits(settings, tmp_path, bert_with_dropout, monkeypatch):
    values = settings(**LORA, lora_dropout=0.2, model_name_or_path=bert_with_dropout, epochs=2, save_steps=3)
    cut = values | {"output_dir": str(tmp_path / "cut")}
    train(values)
    train_and_die(cut, 7, monkeypatch)
    train(cut | {"resume": "auto"})
    whole, resumed = final_weights(values["output_dir"]), final_weights(cut["output_dir"])
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_frozen_layers_get_no_adapter_training(settings, bert):
    values = settings(**LORA, freeze_layers=1)
    train(values)
    differing = changed(base_weights(bert), final_weights(values["output_dir"]))
    assert not any(".layer.0." in name for name in differing) and any(".layer.1." in name for name in differing)


def test_a_checkpoint_of_a_lora_run_holds_the_adapter_alone(settings):
    values = settings(**LORA, save_on_epoch_end=True)
    train(values)
    folder = Path(values["output_dir"]) / "checkpoint-5" / "model"
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists()


# --- what a run leaves behind ---


def test_a_finished_run_has_a_card_with_the_figures_of_its_model(settings, tmp_path):
    validation = write_jsonl(tmp_path / "dev.jsonl", grouped_records(6, seed=1))
    state = train(settings(records=grouped_records(8), val_dataset=validation, batch_size=2, epochs=2))
    out = tmp_path / "run"
    text = (out / "model" / "README.md").read_text()
    best = next(line for line in read_metrics(out, "eval") if line["step"] == state.best_step)
    data = ModelCard(text).data
    assert data.model_name == "run" and data.base_model is None, "a folder's name is not one of the hub"
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results["ndcg@10"] == round(best["ndcg@10"], 4) and results["loss"] == round(best["loss"], 4)
    assert re.search(r"training: train.jsonl\n  records +8\n", text) and "validation: dev.jsonl" in text
    assert str(tmp_path) not in text and "lr: 0.001" in text
    assert json.loads((out / "run.json").read_text())["model_step"] == state.best_step
    assert read_run_record(out).provenance["processes"] == 1


def test_a_run_leaves_model_configuration_and_metrics(settings):
    values = settings(log_interval=2, save_on_epoch_end=True)
    train(values)
    output_dir = Path(values["output_dir"])
    names = {path.name for path in output_dir.iterdir()}
    records = {"metrics.jsonl", "run.json", "training_config.yaml", "provenance.json", "data_summary.json"}
    assert names == {"model", "checkpoint-5"} | records
    assert yaml.safe_load((output_dir / "training_config.yaml").read_text())["head_lr"] == 1e-2
    lines = read_metrics(output_dir, "train")
    assert [(line["step"], line["epoch"]) for line in lines] == [(2, 0.4), (4, 0.8), (5, 1.0)]
    expected = {
        "step",
        "kind",
        "epoch",
        "loss",
        "lr",
        "pairs_per_second",
        "grad_norm",
        "chance_loss",
        "score_std",
    }
    assert lines[0].keys() == expected


def test_the_trained_model_ranks_better_than_chance(validated):
    values = validated(records=grouped_records(60), epochs=4, lr=2e-3)
    state = train(values)
    assert state.best_metric > 0.9
    scores = CrossEncoder.from_pretrained(str(Path(values["output_dir"]) / "model"))
    assert scores.settings.max_len == 48


def test_a_decoder_trains_and_loads_with_its_formats(decoder, tmp_path):
    values = decoder(model_name_or_path=tiny_qwen2(tmp_path / "other", seed=3), special_token=" score", epochs=2)
    train(values)
    loaded = LLMDecoder.from_pretrained(str(Path(values["output_dir"]) / "model"))
    assert loaded.settings.special_token == " score" and loaded.settings.max_len == 64
    assert torch.isfinite(loaded.compute_score(pairs_to_score())).all()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_token_budget_cuts_more_micro_batches_and_changes_no_step(settings, loss_type):
    runs = []
    for budget in (None, 64):
        values = settings(loss_type, warmup_proportion=0.0, adam_epsilon=EPSILON, max_tokens_per_batch=budget)
        values["output_dir"] += f"-{budget}"
        train(values)
        runs.append((read_metrics(Path(values["output_dir"]), "train"), final_weights(values["output_dir"])))
    (whole_lines, whole), (cut_lines, cut) = runs
    assert [line["loss"] for line in cut_lines] == pytest.approx([line["loss"] for line in whole_lines], abs=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["bert", "qwen2"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_packed_batches_take_the_same_steps_as_padded_ones(settings, decoder, loss_type, family, caplog):
    caplog.set_level(logging.INFO)
    make = settings if family == "bert" else decoder
    runs = []
    for attention, said in (("sdpa", "padded: attn_implementation sdpa was asked for"), (None, "batches are packed")):
        values = make(
            loss_type,
            warmup_proportion=0.0,
            adam_epsilon=EPSILON,
            gradient_accumulation_steps=2,
            max_tokens_per_batch=150,
            attn_implementation=attention,
        )
        values["output_dir"] += f"-{attention}"
        train(values)
        assert said in caplog.text
        runs.append((read_metrics(Path(values["output_dir"]), "train"), final_weights(values["output_dir"])))
    (padded_lines, padded), (packed_lines, packed) = runs
    expected = [line["loss"] for line in padded_lines]
    assert [line["loss"] for line in packed_lines] == pytest.approx(expected, abs=1e-5)
    for name, value in padded.items():
        torch.testing.assert_close(packed[name], value, atol=1e-5, rtol=0)


# --- data that can teach or measure nothing, and a folder that is in use ---


@pytest.mark.parametrize(
    ("loss_type", "record"),
    [
        ("pairwise_ranknet", {"query": "q", "hits": [{"content": "a", "label": 2}, {"content": "b", "label": 2}]}),
        ("pairwise_ranknet", {"query": "q", "content": "a", "label": 1}),
        ("listwise_ce", {"query": "q", "pos": ["a"]}),
    ],
)
def test_data_that_can_teach_the_loss_nothing_are_refused(settings, loss_type, record):
    records = [{**record, "query": f"q{number}"} for number in range(8)]
    values = settings(loss_type, records)
    with pytest.raises(StartError, match=f"8 of 8 groups have documents of one label only, so {loss_type}"):
        train(values)
    assert not Path(values["output_dir"]).exists(), "no empty folder stays behind"


def test_groups_that_teach_nothing_are_counted_once(settings, caplog):
    records = grouped_records(6, levels=(0, 1, 2), sizes=(3,))
    train(settings("pairwise_ranknet", [*records[:4], *map(equal_labels, records[4:])], epochs=2))
    assert caplog.text.count("2 of 6 groups have documents of one label only: they teach pairwise_ranknet") == 1


def test_validation_data_that_measure_nothing_are_refused(settings, tmp_path):
    validation = write_jsonl(tmp_path / "val.jsonl", [equal_labels(record) for record in grouped_records(4)])
    with pytest.raises(StartError, match="measures nothing"):
        train(settings("pairwise_ranknet", val_dataset=validation))


def test_a_folder_in_which_another_process_trains_is_refused(settings):
    values = settings("listwise_ce")
    with folder_lock(Path(values["output_dir"])), pytest.raises(StartError, match="another process is training"):
        train(values)
    train(values)


def test_weights_that_the_last_step_spoiled_are_not_saved(settings):
    values = settings("listwise_ce", batch_size=100, lr=1e38, head_lr=1e38, warmup_proportion=0.0, epochs=1)
    with pytest.raises(TrainingError, match="after step 1 weights are not finite"):
        train(values)
    assert not (Path(values["output_dir"]) / "model").exists()


def test_a_label_out_of_all_proportion_is_named_with_its_record(settings):
    records = grouped_records(20, levels=(0, 1))
    records[7]["hits"][0]["label"] = 1e38
    with pytest.raises(TrainingError) as caught:
        train(settings("pairwise_ranknet", records))
    assert "labels 0 to 1e+38" in str(caught.value) and "train.jsonl:8" in str(caught.value)


def test_a_second_run_in_one_process_may_have_another_precision(settings, tmp_path):
    for precision in ("no", "bf16"):
        values = settings(mixed_precision=precision, output_dir=str(tmp_path / precision))
        assert run_reranker(RerankerConfig(**values)).step == 5
