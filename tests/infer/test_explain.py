"""The table and the page of an explanation, of two short texts whose similarities are written by hand."""

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from rag_retrieval.infer.explain import Explanation
from rag_retrieval.infer.pair_scores import PairScores

SIMILARITY = np.array([[0.25, 0.9, 0.1, -0.5], [0.5, 0.75, 0.125, 0.0], [-0.2, -0.1, -0.3, -0.4]], np.float32)


@pytest.fixture
def explanation() -> Explanation:
    one = np.array([0.5], np.float32)
    return Explanation(
        query="熊猫 <b>",
        document="The panda is a bear",
        scores=PairScores(None, one, 2 * one, 3 * one),
        query_tokens=["熊", "猫", "<b>"],
        document_tokens=["the", "panda", "is", "bear & co"],
        similarity=SIMILARITY,
        common={"panda": (2.0, 0.5), "a": (1.0, 0.25)},
    )


class Page(HTMLParser):
    """The tags of a page, each closed by its own, and the texts of its cells."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.cells, self.framed = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)
            if self.tags[-1][1].get("class") == "best":
                self.framed.append(data)


def test_each_query_token_meets_its_most_similar_document_token(explanation):
    assert explanation.best.tolist() == [1, 1, 1]
    np.testing.assert_allclose(explanation.received, [0, 0.9 + 0.75 - 0.1, 0, 0], rtol=1e-6)
    assert explanation.received.sum() == pytest.approx(SIMILARITY.max(axis=1).sum())


def test_the_table_names_both_tokens_and_their_similarity(explanation):
    lines = [line.split() for line in str(explanation).splitlines()]
    assert ["熊", "panda", "1", "0.900"] in lines and ["<b>", "panda", "1", "-0.100"] in lines
    assert ["panda", "2.000", "0.500", "1.000"] in lines and ["a", "1.000", "0.250", "0.250"] in lines
    assert ["lexical", "0.5000", "multi_vector", "1.0000", "ensemble", "1.5000"] in lines


def test_a_long_document_is_cut_at_the_end_of_the_terminal(explanation):
    long = replace(explanation, document="The panda \x1b[31m is\n a bear. " * 9)
    lines = long.table(50).splitlines()
    assert lines[1].startswith("document  The panda [31m is a bear.") and len(lines[1]) <= 50


def test_the_page_needs_nothing_else_and_escapes_texts(explanation, tmp_path):
    page = Page(explanation.to_html())
    assert page.framed == ["0.90", "0.75", "-0.10"]
    assert "<b>" in page.cells and "bear & co" in page.cells
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "b"})
    assert not any(name in ("src", "href") for _, attributes in page.tags for name in attributes)
    explanation.save(tmp_path / "why.html")
    assert (tmp_path / "why.html").read_text(encoding="utf-8") == explanation._repr_html_()


def test_lexical_weights_alone_are_explained_too(explanation):
    none = np.zeros((0, 0), np.float32)
    alone = replace(explanation, query_tokens=[], document_tokens=[], similarity=none)
    assert "meets" not in str(alone) and "product" in str(alone)
    assert "grid" not in [attributes.get("class") for _, attributes in Page(alone.to_html()).tags]
