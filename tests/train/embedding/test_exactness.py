"""A step of an embedder is the same however it is cut and on any engine, and that of a plain loop
(tests/plain_embedding.py). All cases of an engine run in one launch, made by the first test that asks for it.
"""

import json
from pathlib import Path

import pytest
import torch
import unified_runs
from plain_embedding import plain_training
from safetensors.torch import load_file
from training_runs import (
    embedding_records,
    engine_command,
    final_weights,
    launch,
    read_metrics,
    train,
    write_jsonl,
)

from rag_retrieval.models.embedder import EmbeddingModel

# 5 steps: warmup of round(0.4 * 5) = 2, constant to round(0.6 * 5) = 3, then half a cosine over 2
SCHEDULE = {"warmup_proportion": 0.4, "stable_proportion": 0.2}
FACTORS = [0.5, 1.0, 1.0, 1.0, 0.5]
STEP = 32
CUTS = {
    "kept": {},
    "recomputed": {"max_tokens_with_graph": 0},
    "accumulated": {"batch_size": 8, "gradient_accumulation_steps": 4},
    "cut": {"max_tokens_per_batch": 100},
    "cut and recomputed": {"max_tokens_per_batch": 100, "max_tokens_with_graph": 0},
    "cut and half kept": {"max_tokens_per_batch": 100, "max_tokens_with_graph": 600},
    "padded": {"max_tokens_per_batch": 300, "attn_implementation": "sdpa"},
    "checkpointed": {"gradient_checkpointing": True},
}


LAUNCH_FILES = ["ddp", "default_fsdp", *(f"deepspeed/deepspeed_zero{stage}" for stage in (1, 2, 3))]
PROCESSES = 2


@pytest.fixture(scope="module")
def values(tmp_path_factory, bert) -> dict:
    folder = tmp_path_factory.mktemp("exactness")
    return SCHEDULE | {
        "task": "embedding",
        "model_name_or_path": bert,
        "query_max_len": 24,
        "passage_max_len": 48,
        "train_dataset": write_jsonl(folder / "train.jsonl", embedding_records(5 * STEP)),
        "loss_type": "info_nce",
        "temperature": 0.05,
        "output_dir": str(folder / "run"),
        "overwrite_output_dir": True,
        "batch_size": STEP,
        "lr": 1e-3,
        "adam_epsilon": 1e-3,  # Adam divides rounding noise by itself where a gradient is zero: key biases
        "max_grad_norm": 0.5,
        "num_workers": 0,
        "log_interval": 1,
        "save_on_epoch_end": False,
    }


@pytest.fixture(scope="module")
def plain(values):
    return plain_training(values, STEP, FACTORS)


def outcome(values: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = [line["loss"] for line in read_metrics(Path(values["output_dir"]), "train")]
    return losses, final_weights(values["output_dir"])


def assert_same(found, expected, tolerance: float) -> None:
    """Relatively; weights below 0.1 count as that large: those of a bias are sums of gradients, with their rounding."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for name, value in found[1].items():
        torch.testing.assert_close(value, expected[1][name], rtol=tolerance, atol=0.1 * tolerance)


@pytest.fixture(scope="module")
def kept(values):
    train(values)
    return outcome(values)


@pytest.mark.parametrize("cut", CUTS)
def test_five_steps_equal_a_plain_loop_however_they_are_cut(values, plain, kept, cut):
    train(values | CUTS[cut])
    found = outcome(values)
    assert_same(found, plain, 1e-5)
    assert_same(found, kept, 1e-6)


def test_without_in_batch_negatives_a_query_has_its_own_alone(values):
    changes = {"use_inbatch_neg": False, "max_tokens_per_batch": 100}
    train(values | changes)
    assert_same(outcome(values), plain_training(values | changes, STEP, FACTORS), 1e-5)


def test_the_data_hold_documents_that_are_no_negatives(values, kept):
    train(values)
    assert sum(line["masked_negatives"] for line in read_metrics(Path(values["output_dir"]), "train")) > 5


# --- engines, with two processes ---


@pytest.fixture(scope="module")
def validation(tmp_path_factory) -> dict:
    """Of two blocks of texts, which take an unlike number of forwards: engines that exchange weights need fillers."""
    path = tmp_path_factory.mktemp("validation") / "val.jsonl"
    return {"val_dataset": write_jsonl(path, embedding_records(30, seed=3)), "max_tokens_per_batch": 100}


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory, bert) -> str:
    """A model that attends to latent vectors and projects its own to 48 numbers."""
    folder = tmp_path_factory.mktemp("heads") / "model"
    model = EmbeddingModel.from_pretrained(bert, pooling="latent_attention", dims=(16, 48))
    for name, each in model.heads.named_parameters():
        if each.dim() > 1:  # some begin as zeros, which would keep the gradients of others at zero
            torch.nn.init.normal_(each, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    return str(folder)


def head_weights(output_dir: str | Path) -> dict[str, torch.Tensor]:
    files = sorted((Path(output_dir) / "model").glob("*/model.safetensors"))
    return {f"{file.parent.name}.{name}": value for file in files for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def several(tmp_path_factory, bert) -> dict[str, dict]:
    """Of several representations, of SPLADE and of ColBERT."""
    return unified_runs.settings(tmp_path_factory.mktemp("several"), bert)


@pytest.fixture(scope="module")
def one_process(several, tmp_path_factory) -> dict[str, tuple]:
    """What each of these comes to, and the evaluations of the first."""
    folder, found = tmp_path_factory.mktemp("one"), {}
    for kind, keys in several.items():
        train(keys | {"output_dir": str(folder / kind)})
        found[kind] = (*unified_runs.outcome({"output_dir": folder / kind}), evaluations(folder / kind))
    return found


@pytest.fixture(scope="module")
def cases(values, bert_with_dropout, with_heads, validation, several) -> dict[str, dict]:
    """The configuration of each case, but for its output folder."""
    on_two = values | {"batch_size": STEP // PROCESSES, "overwrite_output_dir": False}
    dropout = on_two | {"model_name_or_path": bert_with_dropout, "max_tokens_per_batch": 100}
    return {
        **{cut: on_two | CUTS[cut] for cut in CUTS if "accumulated" not in cut},
        "alone": on_two | {"negatives_cross_device": False, "max_tokens_per_batch": 100},
        "accumulated": on_two | {"batch_size": 4, "gradient_accumulation_steps": 4},
        "lora": on_two | LORA,
        "heads": on_two | {"model_name_or_path": with_heads} | HEADS,
        "validated": on_two | validation,
        "bf16": on_two | {"mixed_precision": "bf16", "max_tokens_per_batch": 100, "max_tokens_with_graph": 600},
        "dropout": dropout | {"save_steps": 2, "num_max_checkpoints": 9},
        "dropout and recomputed": dropout | {"max_tokens_with_graph": 0},
        "dropout and half kept": dropout | {"max_tokens_with_graph": 300},
        **{kind: keys | {"batch_size": unified_runs.STEP // PROCESSES} | HALF for kind, keys in several.items()},
    }


HALF = {"max_tokens_per_batch": 100, "max_tokens_with_graph": 300}
HEADS = {"use_mrl": True, "mrl_dims": [16, 48], "max_tokens_per_batch": 100, "max_tokens_with_graph": 600}
LORA = {"lora_r": 4, "lora_target_modules": "all-linear", "gradient_checkpointing": True, "max_tokens_per_batch": 100}


@pytest.fixture(scope="module", params=LAUNCH_FILES)
def outputs(request, cases, tmp_path_factory) -> Path:
    """A folder with the finished run of each case, under its name."""
    if "deepspeed" in request.param:
        pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("engine")
    runs = {case: keys | {"output_dir": str(folder / case)} for case, keys in cases.items()}
    checkpoint = str(folder / "dropout" / "checkpoint-2")
    runs["resumed"] = runs["dropout"] | {"output_dir": str(folder / "resumed"), "resume": checkpoint}
    (folder / "cases.json").write_text(json.dumps(runs))
    command = engine_command(f"config/{request.param}.yaml", PROCESSES, "tests/engine_runs.py")
    done = launch([*command, str(folder / "cases.json")])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
def test_two_processes_of_every_engine_take_the_same_five_steps(outputs, plain, kept, cut):
    found = outcome({"output_dir": outputs / cut})
    assert_same(found, plain, 1e-5)
    assert_same(found, kept, 1e-6)


@pytest.mark.slow
def test_without_negatives_of_other_processes_a_step_is_the_mean_of_both(outputs, values):
    expected = plain_training(values, STEP, FACTORS, parts=PROCESSES)
    assert_same(outcome({"output_dir": outputs / "alone"}), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dropout and recomputed", "dropout and half kept", "resumed"])
def test_every_engine_gives_the_same_bits_with_dropout(outputs, case):
    found, expected = (final_weights(outputs / each) for each in (case, "dropout"))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.slow
def test_lora_and_bf16_on_every_engine_take_the_steps_of_one_process(outputs, values, request):
    for case, changes in (("lora", LORA), ("bf16", {"mixed_precision": "bf16"})):
        train(values | changes)
        zero3 = "zero3" in request.node.name and case == "bf16"  # its own linear function rounds once more
        losses, expected = (outcome({"output_dir": folder})[0] for folder in (outputs / case, values["output_dir"]))
        assert losses == pytest.approx(expected, rel=1e-6 if case == "lora" else 5e-2 if zero3 else 1e-2), case


@pytest.mark.slow
def test_every_engine_trains_latent_attention_and_projection_as_one_process(outputs, values, with_heads):
    train(values | {"model_name_or_path": with_heads} | HEADS)
    one, found = outcome(values), outcome({"output_dir": outputs / "heads"})
    heads, before = head_weights(values["output_dir"]), head_weights(Path(with_heads).parent)
    assert len(heads) == len(before) == 15 and not any(torch.equal(heads[name], before[name]) for name in before)
    assert_same((found[0], found[1] | head_weights(outputs / "heads")), (one[0], one[1] | heads), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", unified_runs.KINDS)
def test_every_engine_trains_and_measures_several_representations_splade_and_colbert(outputs, one_process, kind):
    *expected, figures = one_process[kind]
    found = unified_runs.outcome({"output_dir": outputs / kind})
    unified_runs.assert_same(found, expected, unified_runs.TOLERANCES[kind])
    found = evaluations(outputs / kind)
    assert len(found) == len(figures) == (2 if kind == "unified" else 0)
    for line, other in zip(found, figures, strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def evaluations(folder: Path) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "kind"} for line in read_metrics(folder, "eval")]


@pytest.mark.slow
def test_every_engine_measures_the_same_before_and_after_training(outputs, values, validation):
    train(values | validation)
    found, expected = (read_metrics(Path(folder), "eval") for folder in (outputs / "validated", values["output_dir"]))
    assert [line["step"] for line in found] == [0, 5] and found[0]["loss"] != found[1]["loss"]
    for line, other in zip(found, expected, strict=True):
        assert line.pop("kind") == other.pop("kind")
        assert line == pytest.approx(other, rel=1e-4)
