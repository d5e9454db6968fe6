"""What is saved, opened by other programs or laid out as servers read it, without any of our code."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny_models import CHINESE, ENGLISH
from tokenizers import Tokenizer

FAMILIES = ("bert", "xlm_roberta", "qwen2", "llama")
ENCODERS = FAMILIES[:2]
PAIRS = [(ENGLISH[1], ENGLISH[2]), (CHINESE[0], CHINESE[1]), ("water", " ".join(ENGLISH)), ("what is it?", "😀")]


@pytest.fixture(scope="module")
def saved(load_tiny, tmp_path_factory):
    """`saved(family)`: a scorer and the folder that it was saved in."""
    made = {}

    def scorer_and_folder(family: str):
        if family not in made:
            scorer, folder = load_tiny(family), tmp_path_factory.mktemp(family)
            scorer.save_pretrained(folder)
            made[family] = scorer, folder
        return made[family]

    return scorer_and_folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_is_that_of_a_classifier_with_one_label_and_a_raw_score(saved, family):
    """text-embeddings-inference takes a *Classification architecture with one entry in id2label for a reranker, and
    needs the two ids; vLLM gives raw scores for problem_type regression, and for the Identity of the last field."""
    _, folder = saved(family)
    config = json.loads((folder / "config.json").read_text())
    (architecture,) = config["architectures"]
    assert architecture.endswith("ForSequenceClassification")
    assert len(config["id2label"]) == 1 and config["label2id"] == {config["id2label"]["0"]: 0}
    assert config["problem_type"] == "regression"
    assert config["sentence_transformers"] == {"activation_fn": "torch.nn.modules.linear.Identity"}
    assert type(config["max_position_embeddings"]) is int and type(config["pad_token_id"]) is int


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_are_one_safetensors_file_with_a_score_of_one_row(saved, family):
    scorer, folder = saved(family)
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert not list(folder.glob("*.bin"))
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert set(weights.keys()) == set(scorer.model.state_dict())
        head = [name for name in weights.keys() if name.startswith(("classifier", "score")) and name.endswith("weight")]  # noqa: SIM118
        assert weights.get_tensor(head[-1]).shape[0] == 1


@pytest.mark.parametrize("family", ENCODERS)
def test_tokenizer_json_alone_lays_out_a_pair_as_here(saved, family):
    """As text-embeddings-inference does it: the file's post-processor, without transformers."""
    scorer, folder = saved(family)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    for pair, encoded in zip(PAIRS, scorer.pair_encoder.encode(PAIRS), strict=True):
        assert tokenizer.encode(*pair).ids == encoded.ids.tolist()


@pytest.mark.parametrize("family", ENCODERS)
def test_the_text_classification_pipeline_of_transformers_gives_the_raw_score(saved, family):
    from transformers import pipeline

    scorer, folder = saved(family)
    classify = pipeline("text-classification", str(folder), device="cpu")
    found = [classify({"text": query, "text_pair": document})["score"] for query, document in PAIRS]
    torch.testing.assert_close(torch.tensor(found), scorer.compute_score(PAIRS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ENCODERS)
def test_flag_reranker_gives_equal_scores(saved, family):
    """But for texts with unknown tokens: with transformers 5 it tokenizes texts, decodes them and tokenizes again."""
    pytest.importorskip("FlagEmbedding", exc_type=ImportError)
    from FlagEmbedding import FlagReranker

    scorer, folder = saved(family)
    pairs = PAIRS[:3]
    theirs = FlagReranker(str(folder), use_fp16=False, devices=["cpu"])
    scores = torch.tensor(theirs.compute_score([list(pair) for pair in pairs]))
    torch.testing.assert_close(scores, scorer.compute_score(pairs), atol=1e-5, rtol=0)
