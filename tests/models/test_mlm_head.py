"""The head of a masked language model in two parts gives the logits of transformers' own forward, in every family."""

import pytest
import torch
from tiny_models import HIDDEN, bert_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM

from rag_retrieval.models.mlm_head import HEADS, head_states, load_masked_lm

IDS = torch.tensor([[2, 9, 8, 7, 3]])
SHAPE = {
    "hidden_size": HIDDEN, "dim": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_dim": 48,
    "intermediate_size": 48, "max_position_embeddings": 64, "vocab_size": 40, "pad_token_id": 0,
    "initializer_range": 0.3,
}  # fmt: skip


def tiny(family: str):
    config = CONFIG_MAPPING[family]
    known = config().to_dict().keys() | config.attribute_map.keys()
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config(**{name: value for name, value in SHAPE.items() if name in known}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they begin as zeros
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("family", HEADS)
def test_the_parts_give_the_logits_of_the_whole(family):
    model = tiny(family)
    with torch.no_grad():
        states = model.base_model(IDS).last_hidden_state[0]
        found = model.get_output_embeddings()(head_states(model, states))
        torch.testing.assert_close(found, model(IDS).logits[0], rtol=1e-5, atol=1e-5)
    assert found.std() > 0.1


def test_a_folder_without_a_head_gets_a_new_one_over_its_own_embedding(base_folders, tmp_path):
    model, new = load_masked_lm(base_folders["bert"])
    assert {name.split(".")[0] for name in new} == {"cls"} and "cls.predictions.transform.dense.weight" in new
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    bert_tokenizer().save_pretrained(tmp_path)
    again, new = load_masked_lm(str(tmp_path))
    assert not new
    assert torch.equal(again.cls.predictions.transform.dense.weight, model.cls.predictions.transform.dense.weight)


def test_a_decoder_is_refused_with_the_families_that_are_known(base_folders):
    with pytest.raises(ValueError, match="is a qwen2; expected an encoder .*xlm-roberta"):
        load_masked_lm(base_folders["qwen2"])
