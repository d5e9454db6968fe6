"""The graph of every family: scores of the model at odd sizes, at the right positions, in padded batches."""

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx  # noqa: E402
import torch  # noqa: E402
from exported_samples import write_graph_once  # noqa: E402
from tiny_models import (  # noqa: E402
    bert_tokenizer,
    llama_tokenizer,
    qwen2_tokenizer,
    save_tiny,
    xlm_roberta_tokenizer,
)
from transformers import (  # noqa: E402
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Qwen3Config,
    RobertaConfig,
)
from yes_no_samples import YES_NO, tiny_causal  # noqa: E402

from rag_retrieval import CrossEncoder, LLMDecoder  # noqa: E402
from rag_retrieval.export import onnx_graph  # noqa: E402
from rag_retrieval.export.onnx_graph import ScoreGraph, last_products, write_graph  # noqa: E402
from rag_retrieval.infer.onnx_backend import open_session  # noqa: E402
from rag_retrieval.infer.onnx_folder import INPUTS, padded_inputs  # noqa: E402
from rag_retrieval.models.pair_encoding import EncodedPair  # noqa: E402
from rag_retrieval.models.token_batch import make_batch  # noqa: E402

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.2)
RELATIVE = dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False, type_vocab_size=0)
MODERN = SHAPE | dict(pad_token_id=0, local_attention=16, global_attn_every_n_layers=2)
ROBERTA = SHAPE | dict(pad_token_id=1, type_vocab_size=1, max_position_embeddings=514)
DECODER = SHAPE | dict(num_key_value_heads=1, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None)
FAMILIES = {
    "deberta-v2": (bert_tokenizer, lambda size: DebertaV2Config(**SHAPE, **RELATIVE, vocab_size=size)),
    "distilbert": (
        bert_tokenizer,
        lambda size: DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=size),
    ),
    "electra": (bert_tokenizer, lambda size: ElectraConfig(**SHAPE, embedding_size=16, vocab_size=size)),
    "modernbert": (bert_tokenizer, lambda size: ModernBertConfig(**MODERN, vocab_size=size)),
    "roberta": (xlm_roberta_tokenizer, lambda size: RobertaConfig(**ROBERTA, vocab_size=size)),
    "qwen3": (qwen2_tokenizer, lambda size: Qwen3Config(**DECODER, head_dim=16, vocab_size=size)),
    "mistral": (qwen2_tokenizer, lambda size: MistralConfig(**DECODER, sliding_window=12, vocab_size=size)),
    "gemma": (qwen2_tokenizer, lambda size: GemmaConfig(**DECODER, head_dim=16, vocab_size=size)),
    "llama": (llama_tokenizer, lambda size: LlamaConfig(**DECODER, vocab_size=size)),
}
DECODERS = ("qwen3", "mistral", "gemma", "llama")
FAST = ("bert", "xlm_roberta", "qwen2")  # of the session's folders
SIZES = ((1, 1), (1, 2), (2, 1), (7, 33), (64, 512))  # pairs, tokens of the longest


def load(family: str, folder):
    if family == "yes_no":
        return LLMDecoder.from_pretrained(tiny_causal(folder, "qwen2", tied=True), **YES_NO)
    make_tokenizer, make_config = FAMILIES[family]
    tokenizer = make_tokenizer()
    save_tiny(folder, make_config(len(tokenizer)), tokenizer, head_labels=1)
    return (LLMDecoder if family in DECODERS else CrossEncoder).from_pretrained(folder)


def random_pairs(scorer, count: int, longest: int, draw: np.random.Generator) -> list[EncodedPair]:
    """Token ids from all over the vocabulary, padding tokens among them; one pair is as long as `longest`."""
    lengths = [longest, *draw.integers(1, longest + 1, count - 1).tolist()]
    typed = scorer.pair_encoder.template.types is not None
    return [
        EncodedPair(
            draw.integers(0, min(scorer.config.vocab_size, len(scorer.tokenizer)), length, np.int32),
            np.repeat(np.array([0, 1], np.int32), (length // 2, length - length // 2)) if typed else None,
            truncated=False,
            document_start=1,
        )
        for length in lengths
    ]


@pytest.mark.parametrize("family", FAST)
def test_scores_are_those_of_torch_at_any_number_of_pairs_and_tokens(load_tiny, tmp_path, family):
    check_scores(load_tiny(family), tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["yes_no", *FAMILIES])
def test_scores_of_other_families_are_those_of_torch(tmp_path, family):
    scorer = load(family, tmp_path / "model")
    check_scores(scorer, tmp_path / "model.onnx")
    if family == "yes_no":
        assert head_shapes(tmp_path / "model.onnx") == [{2, 32}]


def check_scores(scorer, file) -> None:
    draw = np.random.default_rng(1)
    batches = [random_pairs(scorer, *size, draw) for size in SIZES]
    expected = [own_scores(scorer, pairs) for pairs in batches]
    names = write_scores_once(scorer, file)
    session = open_session(file, "cpu", 1)
    assert [node.name for node in session.get_inputs()] == list(names)
    for pairs, wanted in zip(batches, expected, strict=True):
        (found,) = session.run(["scores"], padded_inputs(make_batch(pairs), names, scorer.tokenizer.pad_token_id))
        assert found.shape == wanted.shape and found.dtype == np.float32
        assert np.abs(found - wanted).max() < 1e-4 * max(1, np.abs(wanted).max())


def write_scores_once(scorer, file) -> tuple[str, ...]:
    """Names of the inputs."""
    names = INPUTS if scorer.pair_encoder.template.types is not None else INPUTS[:2]
    write_graph_once(ScoreGraph(scorer), names, file)
    return names


def own_scores(scorer, pairs: list[EncodedPair]) -> np.ndarray:
    """Each pair alone, without padding, so that a mask or a position that is wrong shows."""
    with torch.no_grad():
        return np.array([scorer(make_batch([pair])).item() for pair in pairs], np.float32)


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_the_score_head_is_the_one_last_product(load_tiny, tmp_path, family):
    write_scores_once(load_tiny(family), tmp_path / "model.onnx")
    assert head_shapes(tmp_path / "model.onnx") == [{1, 32}]


def head_shapes(file) -> list[set[int]]:
    """Rows and columns of the weights of each product that is called a score head."""
    model = onnx.load(file)
    shapes = {value.name: set(value.dims) for value in model.graph.initializer}
    shapes |= {value.name: {dim.dim_value for dim in value.type.tensor_type.shape.dim}
               for value in model.graph.value_info}  # fmt: skip
    heads = last_products(model, "scores")
    return [shapes[node.input[1]] for node in model.graph.node if node.name in heads]


@pytest.mark.slow
def test_weights_of_a_large_model_stand_beside_the_graph(load_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "EXTERNAL_FROM", 1)
    scorer = load_tiny("bert")
    pairs = random_pairs(scorer, 3, 9, np.random.default_rng(0))
    expected = own_scores(scorer, pairs)
    write_graph(ScoreGraph(scorer), INPUTS, tmp_path / "model.onnx")
    weights = sum(value.nbytes for value in scorer.model.parameters())
    assert (tmp_path / "model.onnx.data").stat().st_size > 0.9 * weights
    session = open_session(tmp_path / "model.onnx", "cpu", 1)
    names = [node.name for node in session.get_inputs()]
    (found,) = session.run(["scores"], padded_inputs(make_batch(pairs), names, 0))
    assert np.abs(found - expected).max() < 1e-4


def test_a_family_that_cannot_be_traced_is_named(load_tiny, tmp_path, monkeypatch):
    scorer = load_tiny("bert")

    def fail(*arguments, **options):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(onnx_graph.torch.onnx, "export", fail)
    with pytest.raises(ValueError, match="a bert cannot be written as ONNX .*RuntimeError: no such operator"):
        write_graph(ScoreGraph(scorer), INPUTS, tmp_path / "model.onnx")


def test_a_file_that_cannot_be_written_is_not_taken_for_the_family_s_fault(load_tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        write_graph(ScoreGraph(load_tiny("bert")), INPUTS, tmp_path / "gone" / "model.onnx")
