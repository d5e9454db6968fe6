"""Options for opening a model: other spellings, one clear error, a configuration that inherits them."""

import pytest
import torch
from pydantic import Field

from rag_retrieval.models.options import ModelOptions, model_options


class CommandConfig(ModelOptions):
    model: str = Field(description="A model.")


def test_every_spelling_of_a_number_format_means_one():
    for given in ("bf16", "bfloat16", torch.bfloat16):
        assert model_options(dtype=given).dtype == "bf16"
    for given in ("fp32", "float32", "no", torch.float32, False):
        assert model_options(precision=given).precision == "fp32"


def test_a_configuration_that_inherits_gives_the_options_alone():
    config = CommandConfig(model="m", max_len=64, devices="cpu,cuda:0", no_token="")
    assert config.model_options() == ModelOptions(max_length=64, devices=["cpu", "cuda:0"], no_token="")


def test_a_wrong_option_is_named_with_what_was_expected():
    wrong = (("head", "x", "yes_no"), ("max_length", 0, "at least 1"), ("max_lenght", 3, "max_length"))
    for name, value, word in wrong:
        with pytest.raises(ValueError, match=f"^{name}: .*{word}"):
            model_options(**{name: value})
