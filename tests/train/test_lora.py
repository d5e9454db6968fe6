"""LoRA on families whose heads differ: what is trained is saved, loaded and merged, or refused at the start."""

from pathlib import Path

import pytest
import torch
from tiny_models import HIDDEN, bert_tokenizer, tiny_xlm_roberta, xlm_roberta_tokenizer
from training_runs import final_weights, grouped_records, train
from transformers import (
    AlbertConfig,
    BigBirdConfig,
    CamembertConfig,
    ElectraConfig,
    LongformerConfig,
    RobertaConfig,
)
from transformers import AutoModelForSequenceClassification as Model

from rag_retrieval.core.distributed import StartError
from rag_retrieval.train import lora

SHAPE = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def tiny(folder: Path, config_class, **options) -> str:
    """A model of the family without a head of its own."""
    xlm = config_class in (CamembertConfig, LongformerConfig, RobertaConfig)
    tokenizer = xlm_roberta_tokenizer() if xlm else bert_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 0, "eos_token_id": 2} if xlm else {}
    config = config_class(vocab_size=len(tokenizer), max_position_embeddings=130, **SHAPE | ids | options)
    torch.manual_seed(0)
    Model.from_config(config).base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


FAMILIES = {
    "xlm-roberta": None,
    "roberta": RobertaConfig,
    "camembert": CamembertConfig,
    "electra": ElectraConfig,
    "big_bird": BigBirdConfig,
    "longformer": LongformerConfig,
    "albert": AlbertConfig,
}


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"], ids=["named", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_with_lora_ends_with_a_merged_model_and_resumes(settings, tmp_path, family, targets):
    config_class = FAMILIES[family]
    # BigBird's other attention draws random numbers when it is switched off for short texts
    extra = {"longformer": {"attention_window": 16}, "big_bird": {"attention_type": "original_full"}}.get(family, {})
    folder = tmp_path / "tiny"
    model = tiny_xlm_roberta(folder) if config_class is None else tiny(folder, config_class, **extra)
    values = settings(
        records=grouped_records(8), model_name_or_path=model, lora_r=4, lora_target_modules=targets, save_steps=1
    )
    train(values)
    merged = final_weights(values["output_dir"])
    assert not [name for name in merged if "lora" in name or "modules_to_save" in name]
    resumed = values | {"output_dir": str(tmp_path / "b"), "resume": str(Path(values["output_dir"]) / "checkpoint-1")}
    train(resumed)
    for name, value in final_weights(resumed["output_dir"]).items():
        torch.testing.assert_close(value, merged[name], atol=1e-6, rtol=0)


def test_a_model_that_cannot_be_merged_is_refused_before_the_first_step(settings, monkeypatch):
    monkeypatch.setattr(lora, "outermost_new_modules", lambda model, new: ["classifier.dense", "classifier.out_proj"])
    values = settings(records=grouped_records(8), lora_r=4)
    values["model_name_or_path"] = tiny(Path(values["output_dir"]).parent / "tiny", RobertaConfig)
    with pytest.raises(StartError, match="lora_r: the adapter of this RobertaForSequenceClassification cannot be"):
        train(values)
    assert not Path(values["output_dir"], "run.json").exists()


def test_the_rehearsal_changes_no_weight(bert):
    from accelerate import Accelerator

    from rag_retrieval import CrossEncoder
    from rag_retrieval.train.config import TrainingConfig
    from rag_retrieval.train.setup import prepare_for_training

    scorer = CrossEncoder.from_pretrained(bert)
    config = TrainingConfig(model_name_or_path=bert, output_dir="x", lora_r=4)
    adapter = prepare_for_training(scorer, config, Accelerator(cpu=True))
    before = {name: value.clone() for name, value in scorer.state_dict().items()}
    lora.SavedModel(scorer, None, adapter).rehearse()
    assert all(torch.equal(value, before[name]) for name, value in scorer.state_dict().items())


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"lora_target_modules": ["q_proj"]}, ["lora_target_modules", "q_proj", "query", "value", "all-linear"]),
        ({"lora_r": 65536}, ["lora_r", "65536", str(HIDDEN)]),
    ],
)
def test_what_the_model_has_not_is_refused_with_its_own_names(settings, keys, named):
    with pytest.raises(StartError) as caught:
        train(settings(lora_r=4) | keys)
    assert all(word in str(caught.value) for word in named)


def test_a_family_unknown_to_peft_lists_its_module_names(settings, monkeypatch):
    import peft.utils

    monkeypatch.setattr(peft.utils, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", {})
    with pytest.raises(StartError, match="peft has no choice for the family bert; give some of .*query.*all-linear"):
        train(settings(lora_r=4))


def test_layers_that_share_their_weights_cannot_be_frozen_one_by_one(settings, tmp_path):
    with pytest.raises(StartError, match="freeze_layers: a Albert.* has no separate layers"):
        train(settings(model_name_or_path=tiny(tmp_path / "tiny", AlbertConfig), freeze_layers=1))
