"""`reranker_onnx.json`: what is written comes back, and damage is reported with the file and what is wrong."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import bert_tokenizer

from rag_retrieval.infer.onnx_folder import (
    RerankerDescription,
    forwards,
    padded_inputs,
    pair_encoder,
    read_description,
    write_description,
)
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder, PairTemplate, encoder_template
from rag_retrieval.models.token_batch import make_batch

DECODER = PairTemplate([1], [7, 8], [9], None, "query: ", "document: ", "?", " ", (4,), (5, 6), "<s>")
DESCRIPTION = RerankerDescription(
    model_type="llm_decoder",
    max_length=64,
    template=DECODER,
    pad_token_id=0,
    inputs=("input_ids", "attention_mask"),
    precision="float32",
    source={"model": "runs/a/model"},
    verification={"pairs": 3},
)


@pytest.fixture
def folder(tmp_path):
    bert_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    write_description(tmp_path, DESCRIPTION)
    return tmp_path


def test_a_description_comes_back_as_it_was(folder):
    assert read_description(folder, RerankerDescription) == DESCRIPTION
    template = encoder_template(bert_tokenizer())
    encoder = replace(
        DESCRIPTION, template=template, model_type="bert_encoder", inputs=(*DESCRIPTION.inputs, "token_type_ids")
    )
    write_description(folder, encoder)
    assert read_description(folder, RerankerDescription) == encoder and template.types is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "format .*should be 1"),
        ({"model_type": "bert"}, "model_type .*'bert_encoder' or 'llm_decoder'.*'bert'"),
        ({"precision": "fp4"}, "precision .*'fp4'"),
        ({"max_length": "64"}, "max_length .*integer.*'64'"),
        ({"pad_token_id": -1}, "pad_token_id .*-1"),
        ({"inputs": ["input_ids"]}, r"inputs are \['input_ids'\]; expected \['input_ids', 'attention_mask'\]"),
        ({"template": {"prefix": [1]}}, "template.middle"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_a_damaged_description_is_reported_with_file_and_reason(folder, change, reason):
    file = folder / RerankerDescription.file
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"{RerankerDescription.file}: damaged .*{reason}.*export the model again"):
        read_description(folder, RerankerDescription)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"a"'])
def test_a_file_that_is_no_description_is_damaged(folder, text):
    (folder / RerankerDescription.file).write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        read_description(folder, RerankerDescription)


def test_lists_of_other_things_than_token_ids_are_damaged(folder):
    file = folder / RerankerDescription.file
    values = json.loads(file.read_text())
    for name, part in (("prefix", ["[CLS]"]), ("suffix", 9), ("query_end", [-1]), ("types", [[0], 0, [0], "1", [1]])):
        file.write_text(json.dumps(values | {"template": values["template"] | {name: part}}))
        with pytest.raises(ValueError, match=f"template.{name}"):
            read_description(folder, RerankerDescription)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", RerankerDescription.file])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"no {name}"):
        read_description(folder, RerankerDescription)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=f"no {RerankerDescription.file} that can be read"):
        read_description(folder, RerankerDescription)


def test_pairs_are_encoded_as_with_transformers(folder):
    texts = [("how do I open a file?", "Iterate over it. 逐行读取"), ("", "water")]
    template = encoder_template(bert_tokenizer())
    description = replace(DESCRIPTION, template=template)
    expected = PairEncoder(bert_tokenizer(), template, 16).encode(texts)
    for pair, own in zip(pair_encoder(folder, description, 16).encode(texts), expected, strict=True):
        assert (pair.ids.tolist(), pair.types.tolist()) == (own.ids.tolist(), own.types.tolist())


def test_more_tokens_than_were_exported_are_refused(folder):
    with pytest.raises(ValueError, match="max_length 65 is more than the 64 tokens"):
        pair_encoder(folder, DESCRIPTION, 65)


def test_a_damaged_tokenizer_is_reported(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: no tokenizer that can be read"):
        pair_encoder(folder, DESCRIPTION)


# ---- padded batches -----------------------------------------------------------------------------------

NAMES = ("input_ids", "attention_mask", "token_type_ids")


def pair(*ids: int) -> EncodedPair:
    return EncodedPair(np.array(ids, np.int32), np.ones(len(ids), np.int32), truncated=False, document_start=1)


def test_pairs_are_padded_at_the_right():
    inputs = padded_inputs(make_batch([pair(5, 6, 7), pair(8)]), NAMES, pad_token_id=9)
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert inputs["token_type_ids"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {values.dtype for values in inputs.values()} == {np.dtype(np.int64)}
    assert list(padded_inputs(make_batch([pair(1)]), NAMES[:2], 0)) == list(NAMES[:2])


def test_scores_come_in_input_order_and_no_forward_is_beyond_its_bounds():
    pairs = [pair(*range(100 * place, 100 * place + length)) for place, length in enumerate((3, 1, 6, 2, 6, 1, 4))]
    shapes = []

    def run(inputs):
        shapes.append(inputs["input_ids"].shape)
        return [inputs["input_ids"][:, 0].astype(np.float32)]

    for batch_size, max_tokens in ((1, 100), (3, 100), (256, 12), (256, 1), (2, 7)):
        shapes.clear()
        scores = np.zeros(7)
        for forward in forwards(run, lambda batch: padded_inputs(batch, NAMES, 0), pairs, batch_size, max_tokens):
            (scores[forward.places],) = forward.outputs
            assert forward.batch.lengths.tolist() == [len(pairs[place]) for place in forward.places]
        assert scores.tolist() == [0, 100, 200, 300, 400, 500, 600]
        assert sum(rows for rows, _ in shapes) == 7
        assert all(rows <= batch_size and (rows * longest <= max_tokens or rows == 1) for rows, longest in shapes)
        assert [longest for _, longest in shapes] == sorted((longest for _, longest in shapes), reverse=True)


def test_no_pairs_give_no_forward():
    assert not list(forwards(lambda inputs: pytest.fail("a forward of nothing"), lambda batch: {}, [], 8, 100))


def test_tokens_that_expand_a_query_are_not_attended_to():
    query = replace(pair(5, 6, 3, 3), is_query=True, expansion=2)
    inputs = padded_inputs(make_batch([query, pair(8)]), NAMES[:2], 0, unattended=np.array([2, 0]))
    assert inputs["input_ids"].tolist() == [[5, 6, 3, 3], [8, 0, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
