"""The keys of representations: what they mean, their defaults, what does not apply, and other trainers' names."""

import shlex

import pytest
from other_trainers import FLAG_EMBEDDING_M3, RAG_COLBERT
from pydantic import ValidationError
from training_runs import write_jsonl

from rag_retrieval.core.config_reader import ConfigError, load_config
from rag_retrieval.train.embedding.config import EmbeddingConfig

ALL = ["dense", "lexical", "multi_vector"]
REQUIRED = {"model_name_or_path": "owner/model", "train_dataset": "train.jsonl", "output_dir": "out"}


def config(**changes) -> EmbeddingConfig:
    return EmbeddingConfig(**REQUIRED | changes)


def problems(**changes) -> dict[str, str]:
    """Messages by key."""
    with pytest.raises(ValidationError) as caught:
        config(**changes)
    return {entry["loc"][0]: entry["msg"] for entry in caught.value.errors()}


def test_a_text_becomes_a_dense_vector_unless_the_file_says_more():
    found = config()
    assert found.representations == ["dense"] and found.temperature == 0.02 and found.ignored is None
    unused = ("lexical_method", "colbert_dim", "representation_weights", "ensemble_weights", "lambda_query")
    assert [getattr(found, name) for name in unused] == [None] * 5


def test_representations_are_a_list_or_names_between_commas_in_one_order():
    for names in (["multi_vector", "dense"], "multi_vector, dense", ["dense", "multi_vector", "dense"]):
        assert config(representations=names).representations == ["dense", "multi_vector"]
    assert problems(representations="dense,sparse").keys() == {"representations"}
    assert problems(representations=[]).keys() == {"representations"}


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("representations", "dense,sparse", "one or several of dense, lexical, multi_vector, between commas, found"),
        ("ensemble_weights", "dense 1", 'numbers by name, as {"lexical": 0.1}, found "dense 1"'),
        ("ensemble_weights", "[1, 2, 3]", 'numbers by name, as {"lexical": 0.1}, found [1, 2, 3]'),
        ("representation_weights", '{"dense": NaN}', 'numbers by name, as {"lexical": 0.1}, found NaN'),
    ],
)
def test_the_command_line_says_what_a_wrong_value_should_have_been(option, value, expected):
    with pytest.raises(ConfigError) as caught:
        load_config(EmbeddingConfig, None, [f"--{option}", value])
    assert f"--{option}: expected {expected}" in str(caught.value)


def test_weights_that_are_not_given_are_those_of_bge_m3():
    found = config(representations=ALL, use_self_distill=True)
    assert found.representation_weights == {"dense": 1, "lexical": 0.1, "multi_vector": 1, "ensemble": 1}
    assert found.ensemble_weights == {"dense": 1, "lexical": 0.3, "multi_vector": 1}
    assert found.self_distill_weights == {"dense": 1, "lexical": 0.1, "multi_vector": 1}
    assert (found.self_distill_start_step, found.lexical_method, found.lambda_query) == (-1, "linear", None)
    given = config(representations="dense,lexical", ensemble_weights='{"lexical": 0.5}')
    assert given.ensemble_weights == {"dense": 1, "lexical": 0.5}
    assert given.representation_weights == {"dense": 1, "lexical": 0.1, "ensemble": 1}
    assert EmbeddingConfig(**given.model_dump()) == given


@pytest.mark.parametrize(
    "weights", [{"multi_vector": 1}, {"sparse": 1}, {"dense": -1}, {"dense": 0, "lexical": 0}, "1,2", [1]]
)
def test_weights_of_what_is_not_trained_and_weights_that_cannot_be_are_refused(weights):
    assert problems(representations="dense,lexical", ensemble_weights=weights).keys() == {"ensemble_weights"}


@pytest.mark.parametrize(
    ("key", "value", "without"),
    [
        ("ensemble_weights", {"dense": 1}, "dense"),
        ("representation_weights", {"dense": 1}, "dense"),
        ("use_self_distill", True, "lexical"),
        ("self_distill_start_step", 3, "dense,lexical"),
        ("self_distill_weights", {"dense": 1}, "dense,lexical"),
        ("lexical_method", "splade", "dense,multi_vector"),
        ("lambda_query", 0.1, "dense,lexical"),
        ("lambda_document", 0.1, "dense,lexical"),
        ("flops_ramp_steps", 5, "lexical"),
        ("colbert_dim", 64, "dense,lexical"),
        ("mean_maxsim", True, "dense,multi_vector"),
        ("query_expansion", True, "dense,multi_vector"),
        ("attend_to_expansion_tokens", True, "dense"),
        ("skiplist_words", ["a"], "lexical"),
        ("pooling", "cls", "lexical,multi_vector"),
        ("use_mrl", True, "multi_vector"),
    ],
)
def test_a_key_of_what_is_not_trained_is_named_as_ignored(key, value, without):
    found = config(representations=without, **{key: value})
    assert f"{key} (only for" in found.ignored and not getattr(found, key)


@pytest.mark.parametrize(
    ("changes", "temperature"),
    [
        ({"representations": "dense"}, 0.02),
        ({"representations": ALL}, 0.02),
        ({"representations": "lexical"}, 0.02),
        ({"representations": "lexical", "lexical_method": "splade"}, 1.0),
        ({"representations": "multi_vector"}, 1.0),
        ({"representations": "multi_vector", "mean_maxsim": True}, 0.02),
        ({"representations": "multi_vector", "temperature": 0.5}, 0.5),
        ({"representations": "multi_vector", "loss_type": "cosent"}, 1.0),
    ],
)
def test_the_temperature_is_one_where_scores_are_sums(changes, temperature):
    assert config(**changes).temperature == temperature


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 128),
        ({"representations": ALL}, 128),
        ({"representations": "multi_vector"}, 32),
        ({"representations": "multi_vector", "query_expansion": False}, 128),
        ({"representations": "multi_vector", "query_max_len": 48}, 48),
    ],
)
def test_queries_that_are_filled_up_are_short(changes, length):
    assert config(**changes).query_max_len == length


def test_words_without_vectors_are_a_list_that_may_be_empty():
    found = [config(representations="multi_vector", skiplist_words=words) for words in (None, "", "the,!", [",", "!"])]
    assert [each.skiplist_words for each in found] == [None, [], ["the", "!"], [",", "!"]]


def test_what_does_not_go_together_is_refused():
    assert problems(fix_encoder=True).keys() == {"fix_encoder"}
    assert problems(fix_encoder=True, representations="lexical", lexical_method="splade").keys() == {"fix_encoder"}
    assert problems(fix_encoder=True, representations=ALL, lora_r=4).keys() == {"fix_encoder"}
    assert config(fix_encoder=True, representations=ALL).fix_encoder
    taught = {"train_dataset_vec": ["v"], "teacher_embedding_dim": 8, "loss_type": "stella"}
    assert problems(representations="dense,lexical", **taught).keys() == {"representations"}


def test_any_measured_representation_may_decide_which_checkpoint_is_best():
    several = {"representations": "dense,lexical", "val_dataset": "val.jsonl"}
    assert config(**several).metric_for_best_model == "ndcg@10"
    assert config(**several, metric_for_best_model="lexical/mrr@10").metric_for_best_model == "lexical/mrr@10"
    wrong = {"multi_vector/ndcg@10": several, "lexical/precise": several, "/ndcg@10": several}
    wrong["dense/ndcg@10"] = {"val_dataset": "val.jsonl"}
    for name, changes in wrong.items():
        assert problems(metric_for_best_model=name, **changes).keys() == {"metric_for_best_model"}, name


def test_a_file_and_an_option_may_say_weights_and_the_written_configuration_is_read_back(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"query": "q", "pos": ["d"]}])
    lines = ["model_name_or_path: owner/model", "output_dir: out", "train_dataset: train.jsonl",
             "representations: [dense, lexical]", "ensemble_weights:", "  lexical: 0.5"]  # fmt: skip
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    found = load_config(EmbeddingConfig, str(tmp_path / "a.yaml"), ["--representation_weights", '{"ensemble": 2}'])
    assert found.ensemble_weights == {"dense": 1, "lexical": 0.5}
    assert found.representation_weights == {"dense": 1, "lexical": 0.1, "ensemble": 2}
    found.save(tmp_path / "written.yaml")
    assert load_config(EmbeddingConfig, str(tmp_path / "written.yaml")) == found


# ---- other trainers

@pytest.fixture
def read(tmp_path, monkeypatch):
    """The configuration of a command typed where its files are."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", [{"query": "q", "pos": ["d"], "neg": ["e"]}])
    return lambda command: load_config(EmbeddingConfig, None, shlex.split(command))


def test_a_command_of_flag_embedding_s_m3_trainer_trains_all_three(read):
    found = read(FLAG_EMBEDDING_M3)
    assert found.representations == ALL and found.loss_type == "m3_distillation"
    assert (found.use_self_distill, found.self_distill_start_step, found.fix_encoder) == (True, 0, False)
    assert (found.colbert_dim, found.pooling, found.temperature) == (None, "cls", 0.02)
    for name in ("cache_dir", "cache_path", "small_threshold", "drop_threshold", "deepspeed"):
        assert name in found.ignored
    alone = read(FLAG_EMBEDDING_M3.replace("--unified_finetuning True", "--unified_finetuning False"))
    assert alone.representations == ["dense"] and "use_self_distill" in alone.ignored


def test_a_command_of_rag_retrieval_s_colbert_trainer_trains_token_vectors(read):
    found = read(RAG_COLBERT)
    assert (found.representations, found.colbert_dim, found.mean_maxsim) == (["multi_vector"], 768, True)
    assert (found.train_group_size, found.temperature) == (16, 0.02)
    assert (found.query_max_len, found.passage_max_len) == (128, 512)
    assert (found.query_expansion, found.skiplist_words) == (False, [])
    assert (found.query_instruction, found.document_instruction) == ("", "")
    assert found.train_files[0].endswith("train.jsonl") and found.ignored is None
    assert read(RAG_COLBERT + " --query_instruction ask: --query_expansion").query_expansion is True
    with_more = read(RAG_COLBERT + " --representations dense,multi_vector")
    assert (with_more.representations, with_more.colbert_dim, with_more.mean_maxsim) == (ALL[::2], 768, None)
