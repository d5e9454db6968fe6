"""A loss that couples all records of a step is trained by the same loop: see tests/contrastive_runs.py."""

import contrastive_runs as runs
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from training_runs import launch, read_metrics

STEP = 8  # records of a step: two whole steps, and a last one of 6


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a plain loop, whose step is one batch with one graph."""
    model = runs.new_model()
    optimizer = runs.new_optimizer(model)
    data, losses = runs.ContrastiveSteps(None), []
    for start in range(0, runs.RECORDS, STEP):
        queries, documents = model(data.queries[start : start + STEP]), model(data.documents[start : start + STEP])
        loss = nn.functional.cross_entropy(runs.SCALE * queries @ documents.T, torch.arange(len(queries)))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses, model.state_dict()


def assert_same(folder, plain) -> None:
    losses, weights = plain
    assert [line["loss"] for line in read_metrics(folder, "train")] == pytest.approx(losses, abs=1e-6)
    for name, value in torch.load(folder / "model" / "weights").items():
        torch.testing.assert_close(value, weights[name.removeprefix("module.")], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4)])
def test_accumulation_changes_nothing(tmp_path, plain, batch_size, accumulation):
    AcceleratorState._reset_state(True)
    runs.run(tmp_path / "run", batch_size, accumulation)
    assert_same(tmp_path / "run", plain)


@pytest.mark.slow
def test_two_processes_that_accumulate_change_nothing(tmp_path, plain):
    arguments = [str(tmp_path / "run"), "2", "2"]
    done = launch(
        ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "tests/contrastive_runs.py", *arguments],
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", plain)
