"""The graph of every family: scores of the model at odd sizes, at the right positions, in padded batches."""

import numpy as np
import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx  # noqa: E402
from tiny_models import (  # noqa: E402
    bert_tokenizer,
    llama_tokenizer,
    qwen2_tokenizer,
    save_tiny,
    tiny_bert,
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
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)
from yes_no_samples import YES_NO, tiny_causal  # noqa: E402

from rag_retrieval import CrossEncoder, LLMDecoder  # noqa: E402
from rag_retrieval.export import graph  # noqa: E402
from rag_retrieval.export.graph import score_head, write_graph  # noqa: E402
from rag_retrieval.infer.onnx_backend import open_session  # noqa: E402
from rag_retrieval.infer.padded_scoring import padded_inputs  # noqa: E402
from rag_retrieval.models.pair_encoding import EncodedPair  # noqa: E402

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
    "xlm-roberta": (xlm_roberta_tokenizer, lambda size: XLMRobertaConfig(**ROBERTA, vocab_size=size)),
    "qwen2": (qwen2_tokenizer, lambda size: Qwen2Config(**DECODER, vocab_size=size)),
    "qwen3": (qwen2_tokenizer, lambda size: Qwen3Config(**DECODER, head_dim=16, vocab_size=size)),
    "mistral": (qwen2_tokenizer, lambda size: MistralConfig(**DECODER, sliding_window=12, vocab_size=size)),
    "gemma": (qwen2_tokenizer, lambda size: GemmaConfig(**DECODER, head_dim=16, vocab_size=size)),
    "llama": (llama_tokenizer, lambda size: LlamaConfig(**DECODER, vocab_size=size)),
}
DECODERS = ("qwen2", "qwen3", "mistral", "gemma", "llama")
SIZES = ((1, 1), (1, 2), (2, 1), (7, 33), (64, 512))  # pairs, tokens of the longest


def load(family: str, folder):
    if family == "bert":
        return CrossEncoder.from_pretrained(tiny_bert(folder, head_labels=1))
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
            draw.integers(0, min(scorer.config.vocab_size, len(scorer.tokenizer)), length).tolist(),
            [0] * (length // 2) + [1] * (length - length // 2) if typed else None,
            truncated=False,
            document_start=1,
        )
        for length in lengths
    ]


@pytest.mark.parametrize("family", ["bert", "yes_no", *FAMILIES])
def test_scores_are_those_of_torch_at_any_number_of_pairs_and_tokens(family, tmp_path):
    """Against each pair alone, without padding, so that a mask or a position that is wrong shows."""
    scorer = load(family, tmp_path / "model")
    draw = np.random.default_rng(1)
    batches = [random_pairs(scorer, *size, draw) for size in SIZES]
    expected = [own_scores(scorer, pairs) for pairs in batches]
    write_graph(scorer, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", "cpu", 1)
    names = [node.name for node in session.get_inputs()]
    assert names == list(graph.input_names(scorer))
    for pairs, wanted in zip(batches, expected, strict=True):
        (found,) = session.run(["scores"], padded_inputs(pairs, names, scorer.tokenizer.pad_token_id))
        assert found.shape == wanted.shape and found.dtype == np.float32
        assert np.abs(found - wanted).max() < 1e-4 * max(1, np.abs(wanted).max())


def own_scores(scorer, pairs: list[EncodedPair]) -> np.ndarray:
    """The first 12 and the last of the pairs one by one; for the others whatever comes is taken as right."""
    import torch

    from rag_retrieval.models.pair_batch import make_batch

    with torch.no_grad():
        return np.array([scorer(make_batch([pair])).item() for pair in pairs], np.float32)


def test_the_head_is_the_one_last_product_of_an_encoder_and_of_yes_or_no(tmp_path):
    for family, shape in (("bert", {1, 32}), ("yes_no", {2, 32}), ("qwen2", {1, 32})):
        write_graph(load(family, tmp_path / family), tmp_path / f"{family}.onnx")
        model = onnx.load(tmp_path / f"{family}.onnx")
        (name,) = score_head(model)
        (node,) = [node for node in model.graph.node if node.name == name]
        shapes = {value.name: set(value.dims) for value in model.graph.initializer}
        shapes |= {value.name: {dim.dim_value for dim in value.type.tensor_type.shape.dim}
                   for value in model.graph.value_info}  # fmt: skip
        assert shapes[node.input[1]] == shape


def test_weights_of_a_large_model_stand_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "EXTERNAL_FROM", 1)
    scorer = load("bert", tmp_path / "model")
    pairs = random_pairs(scorer, 3, 9, np.random.default_rng(0))
    expected = own_scores(scorer, pairs)
    write_graph(scorer, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size > 10 * (tmp_path / "model.onnx").stat().st_size / 100
    session = open_session(tmp_path / "model.onnx", "cpu", 1)
    names = [node.name for node in session.get_inputs()]
    (found,) = session.run(["scores"], padded_inputs(pairs, names, 0))
    assert np.abs(found - expected).max() < 1e-4


def test_a_family_that_cannot_be_traced_is_told(tmp_path, monkeypatch):
    scorer = load("bert", tmp_path / "model")
    monkeypatch.setattr(type(scorer), "scores_of", lambda self, inputs, lengths: lengths.tolist()[0])
    with pytest.raises(ValueError, match="a bert cannot be written as ONNX with the installed torch"):
        write_graph(scorer, tmp_path / "model.onnx")
