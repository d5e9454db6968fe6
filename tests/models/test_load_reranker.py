import pytest

from rag_retrieval import CrossEncoder, LLMDecoder, load_reranker


@pytest.mark.parametrize(
    ("family", "kind"),
    [("bert", CrossEncoder), ("xlm_roberta", CrossEncoder), ("qwen2", LLMDecoder), ("llama", LLMDecoder)],
)
def test_the_kind_of_a_plain_folder_is_read_off_its_model(family, kind, model_folders):
    scorer = load_reranker(model_folders[family], max_length=40)
    assert type(scorer) is kind and scorer.pair_encoder.max_length == 40


def test_a_folder_of_ours_says_itself_what_it_is(load_tiny, tmp_path):
    load_tiny("qwen2", query_format="Q: {}").save_pretrained(tmp_path)
    scorer = load_reranker(tmp_path)
    assert type(scorer) is LLMDecoder and scorer.settings.query_format == "Q: {}"
