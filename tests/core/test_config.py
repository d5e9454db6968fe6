"""What a configuration does with values, from a file, options or Python."""

import subprocess
import sys
from typing import Annotated

import pytest
from annotated_types import Lt
from core.config_samples import Sample
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rag_retrieval.core.config import EngineOptions, expected, shown_value


def test_values_are_converted_and_the_rest_has_defaults():
    config = Sample(model="m", lr="5e-4", epochs="3", save="off", teachers="a,b", val=None, kind="None")
    assert (config.lr, config.epochs, config.save, config.teachers) == (5e-4, 3, False, ["a", "b"])
    assert (config.val, config.kind, config.max_norm, config.head_lr) == (None, "encoder", 1.0, 5e-3)
    assert Sample(model="m", save=0).save is False and Sample(model="m", save=1).save is True


def test_none_is_a_value_only_where_the_default_is_another_one():
    assert Sample(model="m", max_norm=None).max_norm is None
    assert Sample(model="m", epochs=None).epochs == 1


def test_a_key_that_does_not_apply_is_ignored_by_name_and_takes_its_default():
    config = Sample(model="m", seq="x")
    assert config.seq is None and "seq" in config.ignored and "kind decoder" in config.ignored
    assert Sample(model="m").ignored is None and Sample(model="m", seq=None).ignored is None
    decoder = Sample(model="m", kind="decoder", seq="x")
    assert decoder.seq == "x" and decoder.ignored is None and Sample(model="m", kind="decoder").seq == "\n"


def test_a_configuration_can_be_made_from_another_one():
    config = Sample(model="m", kind="decoder", max_norm=None, teachers=["a"])
    assert Sample(**config.model_dump()) == config


def test_wrong_values_come_together_and_then_those_that_do_not_fit():
    with pytest.raises(ValidationError) as caught:
        Sample(model="m", lr=-1, epochs=0, val="owner/same")
    assert {error["loc"][0] for error in caught.value.errors()} == {"lr", "epochs"}
    with pytest.raises(ValidationError) as caught:
        Sample(model="m", lr=1, epochs=2, val="owner/same")
    assert {error["loc"][0]: error["msg"] for error in caught.value.errors()} == {
        "lr": "expected at most 1 over all {epochs}, found 2", "val": "is the training data"
    }  # fmt: skip


def test_both_names_of_a_key_are_a_mistake_and_each_alone_is_not():
    assert Sample(model="m", epoch=2).epochs == 2
    with pytest.raises(ValidationError, match="given twice"):
        Sample(model="m", epoch=2, epochs=2)


def test_a_number_that_no_library_could_take_is_refused():
    for number in (10**400, "9" * 5000, 2**63, -(10**5000)):
        with pytest.raises(ValidationError):
            Sample(model="m", epochs=number)
    for number in ("1e400", "nan", "inf", float("nan")):
        with pytest.raises(ValidationError):
            Sample(model="m", lr=number)


def test_what_a_key_takes_is_described_in_words():
    fields = Sample.model_fields
    assert expected(fields["epochs"]) == "a whole number of at least 1"
    assert expected(fields["max_norm"]) == "a number above 0 and below 10"
    assert expected(fields["kind"]) == "one of encoder, decoder, no"
    assert expected(fields["save"]) == "true or false"
    assert expected(FieldInfo.from_annotation(Annotated[int, Lt(2**32)])) == "a whole number below 4,294,967,296"
    assert expected(fields["model"]) == "non-empty text" and expected(fields["seq"]) == "text"
    assert expected(fields["teachers"]) == expected(fields["train"]) == "a name or names between commas"


def test_a_long_value_is_shown_in_part():
    assert shown_value("many") == "many" and shown_value("two words") == '"two words"' and shown_value("") == '""'
    assert len(shown_value("x" * 500)) <= 60 and shown_value("x" * 500).endswith(" ...")
    assert "too long" in shown_value(10**5000)


def test_reading_a_configuration_imports_nothing_heavy():
    code = "import sys; import rag_retrieval.core.config_reader as reader; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "set()", done.stderr


def test_what_only_ray_reads_is_ignored_by_name_elsewhere():
    assert "ray_workers (only for engine ray)" in EngineOptions(ray_workers=2).ignored
    assert EngineOptions(engine="ray", ray_workers=2).ignored is None
