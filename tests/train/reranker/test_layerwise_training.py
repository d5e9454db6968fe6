"""Heads at several layers are trained together, as a plain loop over transformers' hidden states trains them."""

from pathlib import Path

import pytest
import torch
from pair_samples import some_pairs
from plain_training import clip, parameter_groups, step_groups
from tiny_models import tiny_qwen2
from training_runs import final_weights, read_metrics, train
from transformers import AutoModelForSequenceClassification

from rag_retrieval import LLMDecoder
from rag_retrieval.models.layerwise import WEIGHT
from rag_retrieval.train.optim import warmup_stable_cosine
from rag_retrieval.train.reranker.config import RerankerConfig

LAYERS, START = 3, 1


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return tiny_qwen2(tmp_path_factory.mktemp("layerwise") / "base", head_labels=1, layers=LAYERS)


@pytest.fixture
def layered(settings, base):
    fixed = {"model_name_or_path": base, "model_type": "llm_decoder", "start_layer": START, "adam_epsilon": 1e-3}
    return lambda **changes: settings(**fixed | {"max_len": 64} | changes)


def plain_layerwise_training(values: dict, steps: int) -> tuple[list[float], dict[str, torch.Tensor], torch.Tensor]:
    """Losses, weights and heads of a plain loop, one document at a time.

    loss = mean over the heads of the listwise cross entropy + weight x mean over the shallow heads of
    KL(softmax of the deepest head's scores, without gradient || softmax of the head's scores), per group.
    """
    config = RerankerConfig(**values)
    model = AutoModelForSequenceClassification.from_pretrained(config.model_name_or_path, num_labels=1).train()
    heads = torch.nn.Parameter(model.score.weight.detach().repeat(LAYERS - START, 1))
    groups_of = parameter_groups(model, config.model_copy(update={"head_lr": config.lr}))
    new = {"params": [heads], "lr": config.head_lr, "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW([*groups_of, new], eps=config.adam_epsilon, fused=False, foreach=False)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step, groups in zip(range(steps), step_groups(config, config.batch_size), strict=False):
        total = torch.zeros(())
        for ids, _, labels, _ in groups:
            scores = torch.stack([scores_of(model, heads, document) for document in ids])  # [documents, heads]
            logs, positive = scores.log_softmax(0), labels.index(1)
            teacher = logs[:, -1].detach()
            divergence = (teacher.exp()[:, None] * (teacher[:, None] - logs[:, :-1])).sum(0).mean()
            total = total - logs[positive].mean() + config.layer_distillation * divergence
        loss = total / len(groups)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        clip([parameter.grad for parameter in [*model.parameters(), heads]], config.max_grad_norm)
        factor = warmup_stable_cosine(step, steps, config.warmup_proportion, config.stable_proportion)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.step()
    return losses, model.state_dict(), heads.detach()


def scores_of(model, heads: torch.Tensor, ids: list[int]) -> torch.Tensor:
    states = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    shallow = [model.model.norm(states[layer])[0, -1] @ heads[layer - START] for layer in range(START, LAYERS)]
    return torch.stack([*shallow, model.score(states[LAYERS][0, -1])[0]])


def test_the_steps_are_those_of_a_plain_loop(layered):
    values = layered(epochs=1, layer_distillation=0.7, log_interval=1)
    train(values)
    lines = read_metrics(Path(values["output_dir"]), "train")
    losses, weights, heads = plain_layerwise_training(values, len(lines))
    assert [line["loss"] for line in lines] == pytest.approx(losses, abs=1e-5)
    trained = final_weights(values["output_dir"])
    torch.testing.assert_close(trained.pop(WEIGHT), heads, atol=1e-5, rtol=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(trained[name], weight, atol=1e-5, rtol=1e-4)


def test_every_cutoff_of_the_trained_model_scores(layered):
    values = layered()
    train(values)
    folder = f"{values['output_dir']}/model"
    assert LLMDecoder.from_pretrained(folder).new_parameters == set()
    for layer in range(START, LAYERS + 1):
        assert LLMDecoder.from_pretrained(folder, cutoff_layer=layer).compute_score(some_pairs(5)).isfinite().all()


@pytest.mark.parametrize("changes", [{"gradient_accumulation_steps": 2, "batch_size": 2}, {"max_tokens_per_batch": 64}])
def test_accumulation_and_token_budgets_change_no_step(layered, changes):
    whole = layered()
    cut = layered(**{"output_dir": f"{whole['output_dir']}-cut"} | changes)
    train(whole), train(cut)
    one, two = final_weights(whole["output_dir"]), final_weights(cut["output_dir"])
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)


def test_pointwise_heads_learn_from_the_deepest_s_probability(layered):
    values = layered(loss_type="point_ce")
    train(values)
    assert WEIGHT in final_weights(values["output_dir"])


def test_lora_trains_and_saves_the_heads(layered):
    pytest.importorskip("peft")
    values = layered(lora_r=4)
    train(values)
    folder = f"{values['output_dir']}/model"
    scorer = LLMDecoder.from_pretrained(folder)
    assert scorer.new_parameters == set() and scorer.settings.start_layer == START
    own = scorer.model.score.weight.expand(LAYERS - START, -1)
    assert not torch.equal(scorer.model.layer_scores.weight, own), "they were trained"
