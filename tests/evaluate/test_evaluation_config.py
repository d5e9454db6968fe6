import pytest

from rag_retrieval.evaluate.evaluation_config import describe_options, load_evaluation_config

NEEDED = ["--model", "m", "--data", "d"]


def test_options_win_over_the_file(tmp_path):
    (tmp_path / "eval.yaml").write_text("model: runs/a/model\ndata: folder\ndepth: 20\nmeasures: [map, p@3]\n")
    config = load_evaluation_config(
        ["--config", str(tmp_path / "eval.yaml"), "--depth=50", "--report", "--split", "dev"]
    )
    assert (config.model, config.depth, config.report, config.split) == ("runs/a/model", 50, True, "dev")
    assert config.measures == ("map", "p@3")


def test_measures_are_a_list_between_commas_and_each_stands_once():
    assert load_evaluation_config([*NEEDED, "--measures", "map, ndcg@5,map"]).measures == ("map", "ndcg@5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m"], "data: is missing; Folder in BEIR layout"),
        ([*NEEDED, "--dept", "3"], "dept: unknown key; did you mean depth?"),
        ([*NEEDED, "--depth", "0"], "depth: input should be greater than or equal to 1, found '0'"),
        ([*NEEDED, "--measures", "ndgc@10"], "measures: found 'ndgc@10'; expected ndcg@k"),
        ([*NEEDED, "--depth"], "--depth: needs a value"),
        (["m", *NEEDED], "m: unexpected; options are written --key value"),
        (["--config", "gone.yaml"], "gone.yaml: no such file"),
    ],
)
def test_a_mistake_is_told_with_its_key(arguments, message):
    with pytest.raises(ValueError) as error:
        load_evaluation_config(arguments)
    assert message in str(error.value)


def test_help_has_every_key_with_its_default():
    text = describe_options()
    assert "--depth [100]" in text and "--model (required)" in text and "--measures [ndcg@10,mrr@10,map" in text
