import importlib.util
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# the scripts import each other by bare name, as Python runs them
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import speed
import speed_checkouts
import speed_data
import speed_embedding_training
import speed_floor
import speed_report
import speed_training
import speed_works


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("speed")
    names = ("tiny_xlm_roberta", "tiny_qwen2")
    return {name: speed_data.make_model_folder(name, root / name, "cpu") for name in names}


@pytest.fixture(scope="module")
def tokenizers(folders):
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


# --- lengths and texts ---


def test_lengths_are_log_normal_and_stay_within_their_bounds():
    lengths = sorted(speed_data.draw_lengths(20_000, 16, random.Random(0)))
    assert lengths[10_000] == pytest.approx(114, rel=0.02)
    assert lengths[19_000] == pytest.approx(436, rel=0.03)
    assert lengths[0] == 16 and lengths[-1] == 512
    # 84th percentile of a log-normal: median x (p95 / median)^(1 / 1.645)
    assert lengths[round(0.8413 * 20_000)] == pytest.approx(114 * (436 / 114) ** (1 / 1.6449), rel=0.03)


def test_the_same_seed_draws_the_same_pairs():
    first, second = (speed_data.draw_examples(3, 2, ["a", "b"], 3, random.Random(5)) for _ in range(2))
    assert first == second != speed_data.draw_examples(3, 2, ["a", "b"], 3, random.Random(6))


def test_a_pair_of_an_encoder_has_exactly_the_drawn_number_of_tokens(tokenizers):
    tokenizer = tokenizers["tiny_xlm_roberta"]
    words = speed_data.single_token_words(tokenizer)
    examples = speed_data.draw_examples(40, 1, words, fixed_tokens=4, numbers=random.Random(1))
    drawn = [4 + 12 + len(example.documents[0].split()) for example in examples]  # <s> </s></s> </s>, query, document
    pairs = speed_data.text_pairs(examples, None)
    assert speed_data.token_lengths(tokenizer, pairs, 512) == drawn
    assert [len(tokenizer(*pair)["input_ids"]) for pair in pairs] == drawn
    assert {example.labels[0] for example in examples} == {0.0, 1.0}


def test_a_decoder_reads_85_prompt_tokens_and_equal_ids_on_both_sides(folders, tokenizers):
    from rag_retrieval import LLMDecoder

    formats = speed_data.prompt_formats()
    scorer = LLMDecoder.from_pretrained(folders["tiny_qwen2"], max_length=1024, **formats._asdict())
    tokenizer = tokenizers["tiny_qwen2"]
    assert len(tokenizer(formats.query_format.format(""))["input_ids"]) == 85
    examples = speed_data.draw_examples(
        2, 3, speed_data.single_token_words(tokenizer), fixed_tokens=0, numbers=random.Random(3)
    )
    plain, formatted = speed_data.text_pairs(examples, None), speed_data.text_pairs(examples, formats)
    theirs = [tokenizer(*pair)["input_ids"] for pair in formatted]
    assert [encoded.ids.tolist() for encoded in scorer.pair_encoder.encode(plain)] == theirs
    # prompt, query and document; "document", ":" and "relevance" of the formats
    words = [85 + 12 + len(text.split()) + 3 for _, text in plain]
    assert speed_data.token_lengths(tokenizer, formatted, 1024) == words


# --- models and the floor ---


def test_attention_dropout_is_off_and_the_copy_has_none_at_all(folders, tmp_path):
    folder = folders["tiny_xlm_roberta"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["attention_probs_dropout_prob"], config["hidden_dropout_prob"]) == (0.0, 0.1)
    copy = speed_data.without_dropout(folder, tmp_path / "copy")
    assert json.loads((copy / "config.json").read_text())["hidden_dropout_prob"] == 0.0
    assert json.loads((folder / "config.json").read_text()) == config
    assert (copy / "model.safetensors").samefile(folder / "model.safetensors")


def test_forward_flops_are_those_of_hand_arithmetic():
    # 2 x 10 weights x (3 + 5) tokens + 2 layers x 4 x (9 + 25) x width 6
    cost = speed_floor.ModelCost(matmul_parameters=10, layers=2, attention_width=6, causal=False)
    assert cost.forward_flops([3, 5]) == 160 + 1632
    causal = speed_floor.ModelCost(matmul_parameters=10, layers=2, attention_width=6, causal=True)
    assert causal.forward_flops([3, 5]) == 160 + 816


def test_the_weights_of_products_are_counted_per_layer(folders):
    # hidden 64, inner 128, 2 layers: q, k, v, o and the two of the feed-forward layer
    encoder = speed_floor.ModelCost(2 * (4 * 64 * 64 + 2 * 64 * 128), 2, 64, causal=False)
    assert speed_floor.model_cost(folders["tiny_xlm_roberta"]) == encoder
    # one of two heads for k and v, and a gate in the feed-forward layer
    decoder = speed_floor.ModelCost(2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128), 2, 64, causal=True)
    assert speed_floor.model_cost(folders["tiny_qwen2"]) == decoder


# --- rounds ---


def took(seconds: float, cpu: float) -> speed_training.Took:
    return speed_training.Took(seconds, cpu, None)


def test_rounds_are_summed_up_by_ratios_of_the_same_round():
    ours = [took(2, 2), took(4, 4), took(1, 1)]
    theirs = [took(10, 6), took(12, 12), took(7, 2)]
    summary = speed_report.summary_of_side(theirs, ours, floors=[1.0, 1.0, 1.0], units=2)
    assert summary["seconds"] == {"median": 5, "least": 3.5, "most": 6}
    assert summary["times_ours"] == {"median": 5, "least": 3, "most": 7}  # of 5, 3, 7
    assert summary["cpu_times_ours"] == {"median": 3, "least": 2, "most": 3}  # of 3, 3, 2
    assert summary["share_of_floor"]["median"] == pytest.approx(1 / 5)


def test_sides_take_turns_in_reversed_order_every_other_round(monkeypatch):
    monkeypatch.setattr(speed_works, "gemm_shapes", lambda *rest: [])
    rates = iter([(1.0, "a"), (3.0, "b"), (2.0, "c")])
    monkeypatch.setattr(speed_works, "gemm_rate", lambda *rest: next(rates))
    order = []

    def turn_of(name):
        def turn(number):
            if name == "plain loop" and number == 1:
                raise torch.OutOfMemoryError("no room")
            order.append((number, name))
            return took(number, 0)

        return turn

    names = ("ours", "sentence-transformers", "plain loop")
    job = SimpleNamespace(model=None, device="cpu", dtype="float32")
    rounds, gemm = speed_works.take_turns(job, {name: turn_of(name) for name in names}, 3)
    assert order == [(0, names[0]), (0, names[1]), (0, names[2]), (1, names[1]), (1, names[0]), *(
        (2, name) for name in names[:2]
    )]  # fmt: skip
    assert list(rounds) == ["ours", "sentence-transformers"]
    assert gemm == {"flops_per_second": 3.0, "shape": "b"}


def test_the_clock_times_the_steps_after_the_warmup(monkeypatch):
    clock = speed_training.StepClock(steps=2, device="cpu")
    times = iter([10.0, 16.0])
    monkeypatch.setattr(speed_training, "now", lambda device: next(times))
    for _ in range(3):
        assert not clock.finished
        clock.step_done()
    assert clock.finished and clock.took().seconds == 6.0


@pytest.mark.parametrize("documents", [1, 8])
def test_planned_steps_are_our_trainers_but_not_sorted_by_length(folders, tmp_path, documents):
    examples = speed_data.draw_examples(80 // documents, documents, ["a", "b"], 4, random.Random(4))
    job = speed_training.Job(
        model=folders["tiny_xlm_roberta"],
        file=tmp_path / "examples.jsonl",
        examples=examples,
        formats=None,
        max_len=512,
        dtype="float32",
        device="cpu",
        workers=0,
        scratch=tmp_path,
    )
    speed_data.write_examples(examples, job.file)
    seconds = speed_training.plan_steps(job)
    assert [len(step) * documents for step in job.steps] == [32, 32, 16] and seconds > 0
    assert sorted(example for step in job.steps for example in step) == sorted(examples)
    longest = [max(map(len, example.documents)) for example in job.steps[0]]
    assert longest != sorted(longest, reverse=True)
    rows = speed_training.their_rows(job, 1, 1)
    assert [row["query"] for row in rows] == [example.query for example in job.steps[1]]


@pytest.mark.slow
def test_another_checkout_trains_and_scores_in_a_process_of_its_own(folders, tmp_path):
    examples = speed_data.draw_examples(64, 1, ["a", "b"], 4, random.Random(4))
    job = speed_training.Job(
        model=folders["tiny_xlm_roberta"],
        file=tmp_path / "examples.jsonl",
        examples=examples,
        formats=None,
        max_len=512,
        dtype="float32",
        device="cpu",
        workers=0,
        scratch=tmp_path,
    )
    speed_data.write_examples(examples, job.file)
    checkout = Path(speed.__file__).parents[1]
    assert speed_checkouts.train_checkout(checkout, job, 0, 1).seconds > 0
    pairs = speed_data.text_pairs(examples[:8], None)
    took, scores = speed_checkouts.score_checkout(checkout, job, pairs, 1)
    assert took.seconds > 0 and torch.equal(scores, speed_works.our_scorer(job)(pairs))
    with pytest.raises(RuntimeError, match="No module named 'speed_works'"):
        speed_checkouts.train_checkout(tmp_path, job, 0, 1)


def test_sides_that_disagree_are_refused():
    assert speed_works.check_agreement("losses", [0.5, 0.7], [0.5, 0.7005], "float32") == pytest.approx(5e-4)
    for wrong in (0.702, math.nan):
        with pytest.raises(speed_works.Disagreement, match="losses: ours 0.700000, theirs .* at place 1"):
            speed_works.check_agreement("losses", [0.5, 0.7], [0.5, wrong], "float32")


def test_a_gpu_gets_large_bf16_models_and_work_without_data(capsys):
    options = speed.parse(["--device", "cuda", "--out", "file"])
    assert (options.encoder, options.decoder, options.dtype) == ("xlm_roberta_large", "qwen2.5_1.5b", "bf16")
    rerankers = ["train_lognormal", "train_decoder", "score_many", "score_query", "score_prompt"]
    assert options.work == [*rerankers, "train_embedding", "encode"]
    with pytest.raises(SystemExit):
        speed.parse(["--device", "cuda", "--dtype", "float32", "--out", "file"])
    assert "half precision" in capsys.readouterr().err


# --- end to end ---


@pytest.fixture
def settings_restored(monkeypatch):
    before = torch.get_num_threads()
    changed = "OMP_NUM_THREADS RAYON_NUM_THREADS TOKENIZERS_PARALLELISM CUDA_VISIBLE_DEVICES RAG_RETRIEVAL_CACHE"
    for name in changed.split():
        monkeypatch.setenv(name, "replaced")  # monkeypatch then undoes what the benchmark sets itself
    yield
    torch.set_num_threads(before)


def check_result(row: dict, sides: list[str]) -> None:
    assert list(row["sides"]) == sides
    for side in row["sides"].values():
        assert 0 < side["seconds"]["least"] <= side["seconds"]["median"] <= side["seconds"]["most"]
        assert side["share_of_floor"]["median"] > 0 and side["cpu_seconds"]["median"] > 0
    assert row["sides"]["ours"]["times_ours"] == {"median": 1, "least": 1, "most": 1}
    assert row["agreement"]["largest_difference"] < 1e-4
    assert row["machine"]["cores"] and row["versions"]["torch"] and "--threads 1" in row["command"]


@pytest.mark.slow
@pytest.mark.usefixtures("settings_restored")
def test_a_small_run_of_both_sides_end_to_end(tmp_path, capsys):
    pytest.importorskip("sentence_transformers")
    out = tmp_path / "speed.jsonl"
    works = ["train_lognormal", "train_decoder", "train_medquad", "score_many", "score_prompt", "encode"]
    tiny = ["--encoder", "tiny_xlm_roberta", "--decoder", "tiny_qwen2", "--threads", "1", "--st-batch", "8"]
    sizes = ["--rounds", "2", "--steps", "1", "--pairs", "40", "--texts", "50", "--repeats", "3"]
    speed.main(["--work", *works, *tiny, *sizes, "--out", str(out)])
    rows = {row["work"]: row for row in map(json.loads, out.read_text().splitlines())}
    trained, scored = ["ours", "sentence-transformers 8 x 4", "plain loop"], ["ours", "sentence-transformers"]
    for work in ("train_lognormal", "train_decoder"):
        check_result(rows.pop(work), trained)
    assert rows["encode"]["pairs"] == 50 and 30 < rows["encode"]["tokens_of_a_pair"] <= 256
    assert rows["score_many"]["pairs"] == 40 and rows["score_prompt"]["pairs"] == 100
    for row in rows.values():
        check_result(row, scored)
    assert rows["score_prompt"]["tokens_of_a_pair"] > 85 + 16  # the shortest drawn pair
    printed = capsys.readouterr().out
    assert "train_medquad: skipped, it needs --data" in printed and "times ours in CPU s" in printed


# --- training an embedder ---


@pytest.mark.slow
@pytest.mark.usefixtures("settings_restored")
def test_an_embedders_step_beside_both_losses_end_to_end(tmp_path):
    pytest.importorskip("sentence_transformers")
    out = tmp_path / "speed.jsonl"
    sizes = ["--rounds", "2", "--steps", "1", "--queries-per-step", "4", "--st-batch", "2", "--threads", "1"]
    speed.main(["--work", "train_embedding", "--encoder", "tiny_xlm_roberta", *sizes, "--out", str(out)])
    row = json.loads(out.read_text())
    sides = ["ours", "sentence-transformers", "sentence-transformers, cached 2"]
    sides += ["FlagEmbedding"] if importlib.util.find_spec("FlagEmbedding") else []
    check_result(row, sides)
    assert row["queries"] == 4 and row["pairs"] == 4 * (1 + 1 + 3) and list(row["cpu_share_of_floor"]) == sides
    assert all(share["least"] > 0 for share in row["cpu_share_of_floor"].values())


def test_losses_or_gradients_that_disagree_stop_the_work(monkeypatch):
    job = SimpleNamespace(dtype="float32")
    monkeypatch.setattr(speed_embedding_training, "our_first_step", lambda job: (2.0, 10.0))
    for theirs, wrong in (((2.0001, 10.0), None), ((2.0003, 10.0), "loss"), ((2.0, 10.002), "gradient norm")):
        first_steps = {"side": lambda theirs=theirs: theirs}
        if wrong is None:
            found = speed_embedding_training.compare_first_steps(job, first_steps)
            assert found["largest_difference"] == pytest.approx(5e-5)  # 0.0001 / 2
        else:
            with pytest.raises(speed_works.Disagreement, match=f"^{wrong} of the first step: ours .* side"):
                speed_embedding_training.compare_first_steps(job, first_steps)


def test_no_text_of_an_embedders_step_stands_in_two_of_its_records(monkeypatch):
    import quality

    from rag_retrieval.data import beir

    texts = [("q", "abcd"), ("q", "efgh"), ("r", "aijk"), ("s", "lmn"), ("t", "opuv")]  # taken: first and last
    records = [{"query": query, "pos": [of[0]], "neg": list(of[1:])} for query, of in texts]
    monkeypatch.setattr(quality, "training_records", lambda *of, **options: records)
    monkeypatch.setattr(beir, "read_folder", lambda folder: None)
    options = SimpleNamespace(data=Path("folder"))
    examples = speed_embedding_training.make_examples(options, 2, None)
    assert [(example.query, "".join(example.documents)) for example in examples] == [("q", "abcd"), ("t", "opuv")]
    with pytest.raises(ValueError, match="folder gives 2 queries; 3 are needed"):
        speed_embedding_training.make_examples(options, 3, None)
