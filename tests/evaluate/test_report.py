import json
import re
from html.parser import HTMLParser

import pytest
from beir_samples import write, write_toy

from rag_retrieval.cli import main
from rag_retrieval.metrics import METRICS

pytest.importorskip("matplotlib")
pytest.importorskip("bm25s")

from rag_retrieval.evaluate.report import find_run, read_curves, training_figure  # noqa: E402

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Open tags, images and texts of a page; fails where tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.texts, self.addresses = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.addresses += [values[name] for name in ("src", "href") if name in values]
        if tag == "img":
            self.images.append(values["alt"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def out(tmp_path_factory, model_folders):
    """An evaluation with its report: a run's model, a query with markup, and Chinese."""
    root = tmp_path_factory.mktemp("report")
    toy = write_toy(root / "toy")
    queries = [json.loads(line) for line in (toy / "queries.jsonl").read_text().splitlines()]
    queries[8]["text"], queries[9]["text"] = "<b>window & 8</b>", "北京在哪里"
    write(toy / "queries.jsonl", "".join(json.dumps(query) + "\n" for query in queries))
    lines = [{"step": 1, "kind": "train", "loss": 2.0, "lr": 0.1}, {"step": 1, "kind": "eval", "loss": 1.0, "map": 0.5}]
    write(root / "run" / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    options = ["--data", str(toy), "--training_run", str(root / "run"), "--output_dir", str(root / "out")]
    assert main(["evaluate", "--model", model_folders["bert"], *options, "--report", "true"]) == 0
    return root / "out"


def test_the_page_holds_every_figure_and_loads_nothing(out):
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert page.images == ["gains", "training", "scores", "reliability", "grades", "tokens"]
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"<script|@import|url\(", (out / "report.html").read_text(encoding="utf-8"))


def test_every_figure_is_a_png_file_too(out):
    files = sorted(path.name for path in (out / "figures").iterdir())
    assert files == ["gains.png", "grades.png", "reliability.png", "scores.png", "tokens.png", "training.png"]
    assert all((out / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in files)


def test_texts_of_the_data_are_shown_as_text_and_never_as_markup(out):
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert "b" not in page.open
    rows = [json.loads(line) for line in (out / "per_query.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0]["query"] == "<b>window & 8</b>"
    shown = "".join(page.texts)
    for row in rows[:2]:  # both are among the three that gained most
        assert row["ndcg@10"] > row["baseline"]["ndcg@10"] and row["query"] in shown


def test_the_page_has_the_means_that_the_result_has(out):
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    shown = Page((out / "report.html").read_text(encoding="utf-8")).texts
    for system in ("model", "baseline", "ceiling"):
        assert f"{result[system]['ndcg@10']:.4f}" in shown


# ---- the curves of the run ---------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    lines = [
        {"step": 10, "kind": "train", "loss": 1.5, "lr": 1e-4},
        {"step": 10, "kind": "eval", "loss": 1.2, "ndcg@10": 0.5, "queries": 3, "pair_accuracy": 0.5},
        {"step": 20, "kind": "train", "loss": 0.5, "lr": 5e-5},
    ]
    write(tmp_path / "run" / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 30, "ki')
    (tmp_path / "run" / "model").mkdir()
    return tmp_path / "run"


def test_training_and_validation_are_separate_curves_without_a_cut_last_line(run):
    assert read_curves(run) == {
        ("loss", "training"): [(10, 1.5), (20, 0.5)],
        ("learning rate", "learning rate"): [(10, 1e-4), (20, 5e-5)],
        ("loss", "validation"): [(10, 1.2)],
        ("validation", "ndcg@10"): [(10, 0.5)],
    }


def test_every_metric_has_its_own_curve_and_colour(run):
    names = [metric.pattern.replace("@k", "@5") for metric in METRICS.values()]
    line = {"step": 1, "kind": "eval", "loss": 1.0, **dict.fromkeys(names, 0.5)}
    write(run / "metrics.jsonl", json.dumps(line) + "\n")
    figure = training_figure(read_curves(run))
    (panel,) = [axes for axes in figure.axes if axes.get_title(loc="left") == "validation"]
    assert [line.get_label() for line in panel.lines] == names
    assert len({line.get_color() for line in panel.lines}) == len(names)


def test_a_run_is_found_beside_its_model_or_by_name(run, tmp_path):
    assert find_run(None, str(run / "model")) == run
    assert find_run(str(run), "package:x") == run
    assert find_run(None, "package:x") is None and find_run(None, str(tmp_path / "run")) is None
    with pytest.raises(ValueError, match="training_run: .* has no metrics.jsonl"):
        find_run(str(tmp_path), "package:x")
