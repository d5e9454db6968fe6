"""Heads at several layers: scores of transformers' own hidden states, one pair at a time."""

import pytest
import torch
from pair_samples import some_pairs
from safetensors import safe_open
from tiny_models import tiny_bert, tiny_llama, tiny_qwen2
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rag_retrieval import LLMDecoder, Reranker
from rag_retrieval.models.layerwise import WEIGHT
from rag_retrieval.models.token_batch import make_batch

LAYERS, START = 4, 2


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def trained(request, tmp_path_factory) -> str:
    """A folder of a decoder of four layers with heads at 2, 3 and 4, with other weights in each head."""
    folder = tmp_path_factory.mktemp(request.param)
    make = {"qwen2": tiny_qwen2, "llama": tiny_llama}[request.param]
    scorer = LLMDecoder.from_pretrained(make(folder / "base", head_labels=1, layers=LAYERS), start_layer=START)
    with torch.no_grad():
        scorer.model.layer_scores.weight.normal_(generator=torch.Generator().manual_seed(1))
    scorer.save_pretrained(folder / "model")
    return str(folder / "model")


def scores_by_hand(folder: str, pairs) -> torch.Tensor:
    """[pairs, layers]: transformers' hidden states after each layer, its final norm, a product with each head."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    with safe_open(f"{folder}/model.safetensors", "pt") as tensors:
        heads = [*tensors.get_tensor(WEIGHT), model.score.weight[0]]
    scores = []
    for query, document in pairs:
        ids = tokenizer(f"query: {query}\ndocument: {document}\nrelevance", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = model.model(ids, output_hidden_states=True).hidden_states
        after = [model.model.norm(states[layer])[0, -1] for layer in range(START, LAYERS)] + [states[LAYERS][0, -1]]
        scores.append(torch.stack([state @ head for state, head in zip(after, heads, strict=True)]))
    return torch.stack(scores)


def test_every_head_reads_the_states_of_its_layer_packed_and_padded(trained):
    pairs = some_pairs(12)
    expected = scores_by_hand(trained, pairs)
    for options in ({}, {"attn_implementation": "eager"}):
        scorer = LLMDecoder.from_pretrained(trained, **options).eval()
        assert scorer.settings.start_layer == START and scorer.packs == (not options)
        batch = make_batch(scorer.pair_encoder.encode(pairs))
        with torch.no_grad():
            scores = scorer(batch, all_layers=True)
            assert torch.allclose(scores, expected, atol=1e-4)
            assert torch.equal(scores[:, -1], scorer(batch)), "the deepest is the model's own score"


def test_a_cutoff_scores_at_that_layer_and_saves_the_smaller_model(trained, tmp_path):
    pairs = some_pairs(12)
    expected = scores_by_hand(trained, pairs)
    for place, layer in enumerate(range(START, LAYERS + 1)):
        cut = LLMDecoder.from_pretrained(trained, cutoff_layer=layer)
        assert len(cut.model.model.layers) == layer
        assert torch.allclose(cut.compute_score(pairs), expected[:, place], atol=1e-4)
        assert torch.allclose(torch.tensor(Reranker(trained, cutoff_layer=layer).compute_score(pairs)),
                              expected[:, place], atol=1e-4)  # fmt: skip
    cut = LLMDecoder.from_pretrained(trained, cutoff_layer=3)
    cut.save_pretrained(tmp_path / "small")
    again = Reranker(tmp_path / "small")
    assert torch.allclose(torch.tensor(again.compute_score(pairs)), expected[:, 1], atol=1e-4)
    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as tensors:
        assert not [name for name in tensors.keys() if "layers.3" in name or name == WEIGHT]  # noqa: SIM118


def test_a_call_may_name_the_layers_and_leaves_the_model_as_it_is(trained):
    pairs = some_pairs(12)
    expected = scores_by_hand(trained, pairs)
    for options in ({}, {"attn_implementation": "eager"}, {"devices": ["cpu", "cpu"]}):
        reranker = Reranker(trained, **options)
        whole, weights = reranker.compute_score(pairs), len(reranker.backend.scorer.state_dict())
        for place, layer in enumerate(range(START, LAYERS + 1)):
            scores = reranker.compute_score(pairs, cutoff_layers=[layer])
            assert torch.allclose(torch.tensor(scores), expected[:, place], atol=1e-4)
        both = reranker.compute_score(pairs, cutoff_layers=[START, LAYERS])
        assert torch.allclose(torch.tensor(both), expected[:, [0, -1]].T, atol=1e-4)
        documents = [document for _, document in pairs if document.strip()]
        ranked = reranker.at_layer(START).rerank("water", documents)
        scores = reranker.compute_score([("water", document) for document in documents], cutoff_layers=START)
        assert [result.document_index for result in ranked] == (-scores).argsort(kind="stable").tolist()
        assert (reranker.compute_score(pairs) == whole).all()
        assert len(reranker.backend.scorer.state_dict()) == weights
        assert len(reranker.backend.scorer.model.model.layers) == LAYERS


def test_a_cut_scorer_shares_the_weights_and_prunes_its_own_last_layer(trained):
    scorer = LLMDecoder.from_pretrained(trained).eval()
    cut = scorer.at_layer(3)
    assert cut.model.model.layers[0] is scorer.model.model.layers[0]
    shared = {parameter.data_ptr() for parameter in scorer.parameters()}
    assert {parameter.data_ptr() for parameter in cut.model.model.parameters()} <= shared
    assert "forward" in vars(cut.model.model.layers[2]) and "forward" not in vars(scorer.model.model.layers[2])
    assert cut.settings.start_layer is None and cut.config.num_hidden_layers == 3


def test_layers_of_a_call_that_do_not_fit_are_refused(trained, model_folders):
    reranker = Reranker(trained)
    wrong = ([1], "2 to 4"), ([5], "2 to 4"), ([], "at least one layer"), (["2"], "found '2'"), ("2", "a list")
    for layers, named in wrong:
        with pytest.raises(ValueError, match=named):
            reranker.compute_score(["a", "b"], cutoff_layers=layers)
    for family in ("bert", "qwen2"):
        with pytest.raises(ValueError, match="cutoff_layers: .* one head|cutoff_layers: .* last layer alone"):
            Reranker(model_folders[family], query_format="{}", document_format="{}", seq=" ", special_token="x",
                     ).compute_score(["a", "b"], cutoff_layers=[2])  # fmt: skip


def test_other_libraries_open_the_folder_with_the_deepest_head(trained):
    scorer = LLMDecoder.from_pretrained(trained)
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    assert torch.equal(model.score.weight, scorer.model.score.weight)


def test_new_heads_begin_as_the_model_s_own_and_are_refused_untrained(tmp_path):
    folder = tiny_qwen2(tmp_path / "plain", head_labels=1, layers=LAYERS)
    scorer = LLMDecoder.from_pretrained(folder, start_layer=1)
    assert scorer.new_parameters == {WEIGHT}
    assert torch.equal(scorer.model.layer_scores.weight, scorer.model.score.weight.expand(3, -1))
    bare = LLMDecoder.from_pretrained(tiny_qwen2(tmp_path / "bare", layers=LAYERS), start_layer=1)
    bare.save_pretrained(tmp_path / "saved")
    for key in ("score.weight", WEIGHT):
        assert key in bare.new_parameters


def test_layers_that_do_not_fit_are_refused(trained, tmp_path):
    plain = tiny_qwen2(tmp_path / "plain", head_labels=1, layers=LAYERS)
    for start in (0, LAYERS):
        with pytest.raises(ValueError, match=f"start_layer {start}: .* 4 layers"):
            LLMDecoder.from_pretrained(plain, start_layer=start)
    with pytest.raises(ValueError, match="cutoff_layer 1: .* 2 to 4"):
        LLMDecoder.from_pretrained(trained, cutoff_layer=1)
    with pytest.raises(ValueError, match="cutoff_layer: .* last layer alone"):
        LLMDecoder.from_pretrained(plain, cutoff_layer=2)
    with pytest.raises(ValueError, match=r"layer_scores.weight is \[2, 32\], needed \[3, 32\]"):
        LLMDecoder.from_pretrained(trained, start_layer=1)


def test_a_cutoff_of_an_encoder_is_ignored_with_a_warning(tmp_path, caplog):
    Reranker(tiny_bert(tmp_path / "bert", head_labels=1), cutoff_layer=2)
    assert "cutoff_layer is for decoders" in caplog.text
