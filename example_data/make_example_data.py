"""Writes every data file of this folder. Run it from anywhere: `python example_data/make_example_data.py`.

It needs bm25s, PyStemmer and jieba, and for the Chinese files the sources named in `cloud_api_passages.py`;
README.md has the versions and the command. The same Python and the same packages give the same bytes. What a
reader would get wrong: training and held-out questions share no document, because whole top-level modules of
the library go to one side, and each side's candidates are searched among that side's passages alone.
"""

import argparse
import json
import logging
from pathlib import Path

import bm25s
import jieba
import numpy
import Stemmer
from cloud_api_passages import ApiPassage, api_passages
from stdlib_passages import Passage, Question, documented_objects, passages_of, questions_of, stable_number

MAX_PASSAGES = 10  # an object with more is a manual (pdb): its passages hardly name what they are about
HELD_OUT = {"test": range(0, 20), "dev": range(20, 35)}  # percent of the top-level modules; the rest trains
QUESTIONS = {"grouped": 1200, "pointwise": 600, "pos_neg": 300, "pos_neg_scores": 300}
HELD_OUT_QUESTIONS = {"dev": 100, "test": 200}
POINTWISE_DEV_QUESTIONS = 60
TRIPLE_QUESTIONS = 60
CANDIDATES = 20  # per held-out question
NEGATIVES = 6  # per training question, BM25's best
ZH_QUESTIONS = {"grouped": 200, "pointwise": 120, "dev": 60}
ZH_CANDIDATES = 10
ZH_NEGATIVES = 3


class Search:
    """BM25 (k1 1.2, b 0.75) over documents: English stems, or Chinese words as jieba cuts them."""

    def __init__(self, documents: list[str], chinese: bool = False):
        self.chinese = chinese
        self.stemmer = None if chinese else Stemmer.Stemmer("english")
        self.index = bm25s.BM25(k1=1.2, b=0.75)
        self.index.index(self._tokens(documents), show_progress=False)

    def _tokens(self, texts: list[str]) -> list[list[str]]:
        if self.chinese:
            texts = [" ".join(jieba.lcut(text)) for text in texts]
        options = {"stopwords": None, "token_pattern": r"\w+"} if self.chinese else {"stopwords": "en"}
        return bm25s.tokenize(texts, stemmer=self.stemmer, return_ids=False, show_progress=False, **options)

    def best(self, query: str, count: int) -> list[tuple[int, float]]:
        """(document number, score), best first, of equal scores the earlier document; words must match."""
        scores = self.index.get_scores(self._tokens([query])[0])
        order = numpy.argsort(-scores, kind="stable")[:count]
        return [(int(i), float(scores[i])) for i in order if scores[i] > 0]


def split_of(name: str) -> str:
    """`train`, `dev` or `test`, from the top-level module alone."""
    percent = stable_number("split " + name.partition(".")[0]) % 100
    return next((split for split, share in HELD_OUT.items() if percent in share), "train")


def shuffled(questions: list, key) -> list:
    """In an order that depends on the texts alone."""
    return sorted(questions, key=lambda question: stable_number("order " + key(question)))


def relevance(candidate: Passage, answer: Passage) -> int:
    """2 for the answer, 1 for another passage of the same object, 0 for the rest."""
    return 2 if candidate == answer else int(candidate.name == answer.name)


def held_out_groups(questions: list[Question], passages: list[Passage], count: int) -> list[dict]:
    """BM25's best CANDIDATES in BM25's order, for questions whose answer is among them (nearly all)."""
    search = Search([p.document for p in passages])
    groups = []
    for question in questions:
        found = [passages[i] for i, _ in search.best(question.query, CANDIDATES)]
        if question.answer in found:
            hits = [{"content": p.document, "label": int(p == question.answer)} for p in found]
            groups.append({"query": question.query, "hits": hits})
    print(f"  answer among BM25's {CANDIDATES}: {len(groups)} of {len(questions)} questions")
    return groups[:count]


def english_rows(questions: list[Question], passages: list[Passage]) -> list[tuple]:
    """(question, [(wrong passage, BM25 score), ...] best first, the answer's BM25 score) per question."""
    search = Search([p.document for p in passages])
    number = {p: i for i, p in enumerate(passages)}
    rows = []
    for question in questions:
        found = search.best(question.query, len(passages))
        wrong = [(passages[i], score) for i, score in found if i != number[question.answer]]
        rows.append((question, wrong, dict(found).get(number[question.answer], 0.0)))
    return rows


def grouped(rows) -> list[dict]:
    """One label 1 and NEGATIVES labels 0: what listwise cross entropy asks for."""
    return [
        {
            "query": question.query,
            "hits": [{"content": question.answer.document, "label": 1}]
            + [{"content": p.document, "label": 0} for p, _ in wrong[:NEGATIVES]],
        }
        for question, wrong, _ in rows
    ]


def pointwise(rows) -> list[dict]:
    """Graded pairs: the answer (2), up to two passages of the same object (1), three of other objects (0)."""
    records = []
    for question, wrong, _ in rows:
        same = [p for p, _ in wrong if p.name == question.answer.name][:2]
        other = [p for p, _ in wrong if p.name != question.answer.name][:3]
        for p in (question.answer, *same, *other):
            label = relevance(p, question.answer)
            records.append({"query": question.query, "content": p.document, "label": label})
    return records


def pos_neg(rows) -> list[dict]:
    return [
        {"query": q.query, "pos": [q.answer.document], "neg": [p.document for p, _ in wrong[:NEGATIVES]]}
        for q, wrong, _ in rows
    ]


def triples(records: list[dict]) -> list[str]:
    """The lines of pos/neg records with one positive, as MS MARCO writes them: each text on one line."""
    return [
        "\t".join(" ".join(text.split()) for text in (record["query"], *record["pos"], negative))
        for record in records
        for negative in record["neg"]
    ]


def pos_neg_scores(rows) -> list[dict]:
    """pos_neg with scores in [0, 1]: 0.6 * relevance / 2 + 0.4 * BM25 / (BM25 of the best in the list).

    They stand in for a teacher model's scores, which would differ from one machine to the next.
    """
    records = []
    for record, (question, wrong, answer_score) in zip(pos_neg(rows), rows, strict=True):
        candidates = [(question.answer, answer_score), *wrong[:NEGATIVES]]
        best = max(score for _, score in candidates)
        mixed = [round(0.3 * relevance(p, question.answer) + 0.4 * s / best, 3) for p, s in candidates]
        records.append({**record, "pos_scores": mixed[:1], "neg_scores": mixed[1:]})
    return records


def english_files() -> dict[str, list[dict]]:
    """File name -> records, from the standard library of the Python that runs this."""
    cut = [passages_of(*found) for found in documented_objects()]
    passages = [p for of_object in cut if len(of_object) <= MAX_PASSAGES for p in of_object]
    passages = list(dict.fromkeys(passages))
    parts = {split: [p for p in passages if split_of(p.name) == split] for split in ("train", "dev", "test")}
    asked = {split: shuffled(questions_of(part), lambda q: q.query) for split, part in parts.items()}
    print({split: f"{len(parts[split])} passages, {len(asked[split])} questions" for split in parts})
    files = {
        f"stdlib_grouped.{split}.jsonl": held_out_groups(asked[split], parts[split], count)
        for split, count in HELD_OUT_QUESTIONS.items()
    }
    rows = english_rows(asked["train"], parts["train"])
    for form in (grouped, pointwise, pos_neg, pos_neg_scores):
        files[f"stdlib_{form.__name__}.train.jsonl"] = form(rows[: QUESTIONS[form.__name__]])
    files["stdlib_triples.train.tsv"] = triples(files["stdlib_pos_neg.train.jsonl"][:TRIPLE_QUESTIONS])
    rows = english_rows(asked["dev"][:POINTWISE_DEV_QUESTIONS], parts["dev"])
    files["stdlib_pointwise.dev.jsonl"] = pointwise(rows)
    return files | beir_files({split: files[f"stdlib_grouped.{split}.jsonl"] for split in parts}, passages)


def beir_files(groups: dict[str, list[dict]], passages: list[Passage]) -> dict[str, list]:
    """A folder in BEIR layout: all passages, and the questions of the grouped files with their answers."""
    name = {passage.document: f"d{number}" for number, passage in enumerate(passages, 1)}
    corpus = {name[p.document]: {"_id": name[p.document], "title": p.name, "text": p.text} for p in passages}
    queries, files = [], {}
    for split, records in groups.items():
        judged = ["query-id\tcorpus-id\tscore"]
        for record in records:
            queries.append({"_id": f"q{len(queries) + 1}", "text": record["query"]})
            answers = [name[hit["content"]] for hit in record["hits"] if hit["label"]]
            judged += [f"{queries[-1]['_id']}\t{answer}\t1" for answer in answers]
        files[f"stdlib_beir/qrels/{split}.tsv"] = judged
    return {"stdlib_beir/corpus.jsonl": list(corpus.values()), "stdlib_beir/queries.jsonl": queries} | files


def chinese_files() -> dict[str, list[dict]]:
    """File name -> records. Held-out questions have candidates of their own, as in English."""
    order = shuffled(api_passages(), lambda passage: passage.query)
    held_out, training = order[: len(order) // 4], order[len(order) // 4 :]
    rows = chinese_rows(training)
    files = {"zh_grouped.train.jsonl": [], "zh_pointwise.train.jsonl": [], "zh_grouped.dev.jsonl": []}
    for answer, found in rows[: ZH_QUESTIONS["grouped"]]:
        hits = [answer, *(p for p in found if p != answer)][: 1 + ZH_NEGATIVES]
        files["zh_grouped.train.jsonl"].append(chinese_group(answer, hits))
    for answer, found in rows[: ZH_QUESTIONS["pointwise"]]:
        for p in [answer, *(p for p in found if p != answer)][: 1 + ZH_NEGATIVES]:
            record = {"query": answer.query, "content": p.document, "label": int(p == answer)}
            files["zh_pointwise.train.jsonl"].append(record)
    for answer, found in chinese_rows(held_out):
        if answer in found and len(found) == ZH_CANDIDATES:
            files["zh_grouped.dev.jsonl"].append(chinese_group(answer, found))
    files["zh_grouped.dev.jsonl"] = files["zh_grouped.dev.jsonl"][: ZH_QUESTIONS["dev"]]
    return files


def chinese_rows(passages: list[ApiPassage]) -> list[tuple[ApiPassage, list[ApiPassage]]]:
    """Each passage with BM25's best ZH_CANDIDATES passages for its query."""
    search = Search([p.document for p in passages], chinese=True)
    return [(p, [passages[i] for i, _ in search.best(p.query, ZH_CANDIDATES)]) for p in passages]


def chinese_group(answer: ApiPassage, hits: list[ApiPassage]) -> dict:
    return {"query": answer.query, "hits": [{"content": p.document, "label": int(p == answer)} for p in hits]}


def write(path: Path, records: list[dict] | list[str]) -> None:
    """JSON lines, or the lines as they are where they are text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    print(f"{path.name}: {len(records)} lines, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent, help="where to write")
    folder = parser.parse_args().output
    jieba.setLogLevel(logging.ERROR)
    for name, records in {**english_files(), **chinese_files()}.items():
        write(folder / name, records)


if __name__ == "__main__":
    main()
