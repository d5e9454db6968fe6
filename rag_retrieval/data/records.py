"""One ranking record, a query with its documents and their labels: what is accepted, and what is refused how.

Each record has one of four formats, recognized by its keys (other keys are ignored):

    {"query": "q", "content": "d", "label": 1}                                  pointwise
    {"query": "q", "hits": [{"content": "d", "label": 1}, ...]}                 hits
    {"query": "q", "pos": ["d", ...], "neg": [...], "pos_scores": [...], "neg_scores": [...]}    pos/neg
    {"query": "q", "positive": "d", "negative": "d"}                            triple

A teacher's score stands beside the label in pointwise records and in hits, under `teacher_score` or the key that
`teacher_key` names; it is read only where a loss learns from it. In pos/neg records pos_scores and neg_scores are the
labels, but where teacher scores are read they are these, and the labels are 1 and 0:

    {"query": "q", "hits": [{"content": "d", "label": 1, "teacher_score": 6.2}, ...]}

For embedders (`for_embedder`) a record may also have a `prompt` (or `prompt_for_query`) before its query, the scores of
a record without `neg` may be under `scores`, and hits may have a teacher's scores alone: their labels are 1. Where
vectors of a teacher are learned, a record is its query alone (`texts_alone`).

A positive is not a label above 0 but one above the lowest of its group, and in pos/neg records what stands in `pos`,
whatever its score. An empty document is legal, an empty query is not.
"""

import difflib
import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

FLOAT32_MAX = 3.4028234663852886e38
MAX_SHOWN = 20  # bad lines that an error shows; the rest is counted
ONE_POSITIVE_EXPECTED = "expected exactly one 1 and the rest 0 for listwise cross entropy."


class DataError(ValueError):
    """Ranking data that cannot be used; the message has one line for each bad line of the source."""


class RecordError(ValueError):
    """What is wrong with one record; `readers.read_records` puts the file and the line before it."""


class BadLines:
    """The faults of a source, for one error that shows the first MAX_SHOWN and counts the rest."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, problem: str, last: bool = False) -> None:
        """last: reading ended there, so it is shown in any case."""
        self.count += 1
        if self.count <= MAX_SHOWN:
            self.shown.append(problem)
        elif last:
            self.shown[-1] = problem

    def raise_any(self) -> None:
        """Raises DataError unless there are none."""
        if more := self.count - len(self.shown):
            self.shown.append(f"... and {more} more bad line{'s' if more > 1 else ''}")
        if self.shown:
            raise DataError("\n".join(self.shown))


@dataclass(frozen=True)
class RecordRules:
    """What a record must satisfy beyond its format.

    label_key: name of the label's key in pointwise records and in hits.
    min_label, max_label: the allowed range, both ends included; None leaves that end open.
    exactly_one_positive: every hits record has one label 1 and the rest 0 (listwise cross entropy).
    teacher_key: name of the key of the teacher's score beside the label; None: teacher scores are not read. Several
        names: of several teachers, whose scores a store averages.
    needs_teacher: every document must have one; otherwise what is absent is NaN.
    teacher_range: the allowed range of teacher scores, both ends included; None: any finite number.
    for_embedder: prompts of records are read, and `scores`; stores have ids of texts.
    texts_alone: of each record the query alone is read; it is stored with one empty document.
    """

    label_key: str = "label"
    min_label: float | None = None
    max_label: float | None = None
    exactly_one_positive: bool = False
    teacher_key: str | tuple[str, ...] | None = None
    needs_teacher: bool = False
    teacher_range: tuple[float, float] | None = None
    for_embedder: bool = False
    texts_alone: bool = False


@dataclass(slots=True)
class Record:
    """A valid record. `documents`, `labels` and `positive` have one entry per document, at least one.

    labels: exact float32 values. pos/neg records without scores, and triples, have 1.0 and 0.0.
    teacher_scores: NaN where a document has none; None where they are not read. Of several teachers: all scores of a
        document, then those of the next.
    positive: membership in `pos`, being the positive of a triple, and for the other formats `positives(labels)`.
    format: "pointwise", "hits", "pos_neg", "triple" or "text".
    line: counted from 1; the row for Parquet and hub datasets.
    prompt: of an embedder, before the query in place of the model's own; "" where there is none.
    """

    query: str
    documents: list[str]
    labels: list[float]
    positive: list[bool]
    format: str
    line: int
    teacher_scores: list[float] | None = None
    prompt: str = ""


def positives(labels: list[float]) -> list[bool]:
    """True for labels above the lowest of their group; where all are equal, for labels above 0."""
    lowest = min(labels)
    threshold = lowest if max(labels) > lowest else 0.0
    return [label > threshold for label in labels]


def describe_labels(labels: Iterable[float]) -> str:
    """At most ten labels for an error message: `1, 0.5, 0`."""
    labels = list(labels)
    return ", ".join(f"{label:.6g}" for label in labels[:10]) + (", ..." if len(labels) > 10 else "")


def parse_record(data: object, line: int, rules: RecordRules) -> Record:
    """Validate one decoded JSON value, Parquet row or dataset row; RecordError on the first fault found."""
    if not isinstance(data, dict):
        raise RecordError(f"found {_kind(data)}; expected an object with the keys of one record.")
    query = text_of(data, "query")
    if not query.strip():
        raise RecordError("query is empty; expected text.")
    prompt = _prompt(data) if rules.for_embedder else ""
    if rules.texts_alone:
        return Record(query, [""], [0.0], [False], "text", line, prompt=prompt)
    if rules.for_embedder and data.get("pos") is not None and data.get("scores") is not None:
        data = _with_pos_scores(data)
    format_ = _format(data)
    if format_ == "pointwise":
        documents = [_text(data["content"], "content")]
        labels = [_label(_required(data, rules.label_key, is_label=True), rules.label_key, rules)]
    elif format_ == "hits":
        documents, labels = _hits(data["hits"], rules)
    elif format_ == "pos_neg":
        documents, labels, positive = _pos_neg(data, rules)
    else:
        documents, positive = [text_of(data, "positive"), text_of(data, "negative")], [True, False]
        labels = _binary_labels(1, 1, rules)
    labels = array("f", labels).tolist()
    if format_ in ("pointwise", "hits"):
        positive = positives(labels)
    teacher_scores = None if rules.teacher_key is None else _teacher_scores(data, format_, len(documents), rules)
    return Record(query, documents, labels, positive, format_, line, teacher_scores, prompt)


def _prompt(data: dict) -> str:
    given = [key for key in ("prompt", "prompt_for_query") if data.get(key) is not None]
    if len(given) > 1 and data[given[0]] != data[given[1]]:
        raise RecordError("found both prompt and prompt_for_query, and they differ; keep one.")
    return _text(data[given[0]], given[0]) if given else ""


def _with_pos_scores(data: dict) -> dict:
    """`scores` are those of `pos` where that is all the record has."""
    if data.get("neg") or data.get("pos_scores") is not None:
        raise RecordError("found scores; expected them beside pos alone: use pos_scores and neg_scores with neg.")
    return data | {"pos_scores": data["scores"]}


def _format(data: dict) -> str:
    """The record's format by its main key. Columnar sources give absent keys as null, so null is absent."""
    formats = {"content": "pointwise", "hits": "hits", "pos": "pos_neg"}
    present = [key for key in formats if data.get(key) is not None]
    if len(present) > 1:
        raise RecordError(f"found both {_quoted(present)}; expected one format: keep one of these keys.")
    if not present and data.get("positive") is not None:
        return "triple"
    present = present or [key for key in formats if key in data]
    if present:
        return formats[present[0]]
    for key in formats:
        if found := _nearest(key, data):
            raise RecordError(f"found no {key!r} but {found!r}; rename it to {key!r}.")
    raise RecordError(f"found the keys {_quoted(data)}; expected one of 'content', 'hits', 'pos', 'positive'.")


def _hits(hits: object, rules: RecordRules) -> tuple[list[str], list[float]]:
    documents, labels = [], []
    hits = _filled_list(hits, "hits", "objects")
    scores_alone = rules.for_embedder and not any(isinstance(hit, dict) and rules.label_key in hit for hit in hits)
    keys = teacher_keys(rules)
    scores_alone = scores_alone and bool(keys) and all(isinstance(hit, dict) and hit.keys() >= {*keys} for hit in hits)
    for index, hit in enumerate(hits):
        name = f"hits[{index}]"
        if not isinstance(hit, dict):
            raise RecordError(f"{name} is {_kind(hit)}; expected an object with content and label.")
        documents.append(_text(_required(hit, "content", name), f"{name}.content"))
        label = 1 if scores_alone else _required(hit, rules.label_key, name, is_label=True)
        labels.append(_label(label, f"{name}.{rules.label_key}", rules))
    if rules.exactly_one_positive and (labels.count(1) != 1 or labels.count(0) != len(labels) - 1):
        raise RecordError(f"hits has the labels {describe_labels(labels)}; {ONE_POSITIVE_EXPECTED}")
    return documents, labels


def _pos_neg(data: dict, rules: RecordRules) -> tuple[list[str], list[float], list[bool]]:
    for key in ("neg", "pos_scores", "neg_scores"):
        if key not in data and (found := _misspelt_optional(key, data)):
            raise RecordError(f"found {found!r}, which looks like {key!r}; rename it.")
    pos = [_text(text, f"pos[{i}]") for i, text in enumerate(_filled_list(data["pos"], "pos", "strings"))]
    neg = _list([] if data.get("neg") is None else data["neg"], "neg", "strings")
    neg = [_text(text, f"neg[{i}]") for i, text in enumerate(neg)]
    positive = [True] * len(pos) + [False] * len(neg)
    scores = None if rules.teacher_key else _pos_neg_scores(data, len(pos), len(neg))  # else they are the teacher's
    if scores is None:
        return pos + neg, _binary_labels(len(pos), len(neg), rules), positive
    return pos + neg, [_label(score, name, rules) for name, score in scores], positive


def _binary_labels(num_pos: int, num_neg: int, rules: RecordRules) -> list[float]:
    labels = [1.0] * num_pos + [0.0] * num_neg
    hint = " (positives and negatives without scores count as 1 and 0)"
    return [_label(label, "the label of a document", rules, hint) for label in labels]


def _pos_neg_scores(data: dict, num_pos: int, num_neg: int) -> list[tuple[str, object]] | None:
    """(name, score) of each document, or None where there are no scores. Scores on one side only would mix a teacher's
    scale with 1 and 0: an error."""
    pos_scores, neg_scores = data.get("pos_scores"), data.get("neg_scores")
    if pos_scores is None and neg_scores is None:
        return None
    if pos_scores is None:
        raise RecordError("found neg_scores without pos_scores; give both or neither.")
    if neg_scores is None and num_neg:
        raise RecordError(f"found pos_scores without neg_scores for {num_neg} neg; give both or neither.")
    named = []
    for side, count, scores in (("pos", num_pos, pos_scores), ("neg", num_neg, neg_scores or [])):
        name = f"{side}_scores"
        if len(_list(scores, name, "numbers")) != count:
            found = f"{side} has {count} document{'' if count == 1 else 's'} but {name} has {len(scores)}"
            raise RecordError(f"{found}; give one score per document.")
        named += [(f"{name}[{i}]", score) for i, score in enumerate(scores)]
    return named


def teacher_keys(rules: RecordRules) -> tuple[str, ...]:
    return (rules.teacher_key,) if isinstance(rules.teacher_key, str) else rules.teacher_key or ()


def _teacher_scores(data: dict, format_: str, count: int, rules: RecordRules) -> list[float]:
    """`Record.teacher_scores` of a record that is valid otherwise, exact float32."""
    keys = teacher_keys(rules)
    if format_ == "pointwise":
        named = [(key, data.get(key)) for key in keys]
    elif format_ == "hits":
        hits = enumerate(data["hits"])
        named = [(f"hits[{index}].{key}", hit.get(key)) for index, hit in hits for key in keys]
    elif format_ == "triple":
        named = [("teacher score of a triple", None)] * (count * len(keys))
    else:
        num_pos = len(data["pos"])
        scores = _pos_neg_scores(data, num_pos, count - num_pos)
        if scores and len(keys) > 1:
            raise RecordError(
                f"pos_scores and neg_scores are of one teacher, teacher_score_key names {', '.join(keys)}; give hits "
                "with the scores of all of them."
            )
        named = scores or [("pos_scores", None)] * (count * len(keys))
    return array("f", [_teacher_score(score, name, rules) for name, score in named]).tolist()


def _teacher_score(value: object, name: str, rules: RecordRules) -> float:
    if value is None:
        if not rules.needs_teacher:
            return float("nan")
        raise RecordError(
            f"found no {name}, which the loss learns from; add the teacher's score (rag-retrieval distill writes it), "
            "or set teacher_score_key to the key that holds it."
        )
    value = _number(value, name)
    low, high = rules.teacher_range or (-FLOAT32_MAX, FLOAT32_MAX)
    if not low <= value <= high:
        raise RecordError(
            f"{name} is {value:g}; expected a value in [{low:g}, {high:g}]: give the teacher's probabilities (set "
            "teacher_score_key to their key), or learn from logits with margin_mse or kl_distillation on groups."
        )
    return value


def _number(value: object, name: str) -> float:
    if type(value) not in (int, float):  # not isinstance: a bool is an int
        raise RecordError(f"{name} is {_kind(value)}; expected a number.")
    if not abs(value) <= FLOAT32_MAX:  # false for NaN too
        raise RecordError(f"{name} is {str(value)[:20]}; expected a finite number that float32 can hold.")
    return float(value)


def _label(value: object, name: str, rules: RecordRules, hint: str = "") -> float:
    number = _number(value, name)
    low = -float("inf") if rules.min_label is None else rules.min_label
    high = float("inf") if rules.max_label is None else rules.max_label
    if not low <= number <= high:
        raise RecordError(
            f"{name} is {value}{hint}; expected a value in [{low:g}, {high:g}]: correct it"
            f"{'' if rules.for_embedder else ', or change min_label and max_label'}."
        )
    return number


def text_of(data: dict, key: str) -> str:
    """The string under `key`. Raises RecordError where it is missing, no string, or half of a character pair."""
    return _text(_required(data, key), key)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{name} is {_kind(value)}; expected a string.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a pair: "\ud83d"
            half = ascii(value[error.start])
            raise RecordError(f"{name} has half of a character ({half}); expected its pair too.") from None
    return value


def _list(value: object, name: str, of: str) -> list:
    if not isinstance(value, list):
        raise RecordError(f"{name} is {_kind(value)}; expected a list of {of}.")
    return value


def _filled_list(value: object, name: str, of: str) -> list:
    if not _list(value, name, of):
        raise RecordError(f"{name} is an empty list; expected at least one document.")
    return value


def _required(data: dict, key: str, where: str = "", is_label: bool = False) -> object:
    if key in data:
        return data[key]
    place = f" in {where}" if where else ""
    if found := _nearest(key, data):
        raise RecordError(f"found no {key!r}{place} but {found!r}; rename it to {key!r}.")
    other = ", or name the key that holds the label (train_label_key, val_label_key; distill: label_key)"
    remedy = "add it" + (other if is_label else "")
    raise RecordError(f"found no {key!r}{place} among the keys {_quoted(data)}; {remedy}.")


def _nearest(key: str, data: dict) -> str | None:
    return next(iter(difflib.get_close_matches(key, data, n=1, cutoff=0.6)), None)


def _misspelt_optional(key: str, data: dict) -> str | None:
    """A key that likely means the absent optional `key` ("negs", "pos_score"): data lost if ignored."""
    others = [other for other in data if other not in ("query", "pos", "neg", "pos_scores", "neg_scores")]
    longer = [other for other in others if other.lower().startswith(key)]
    return next(iter(longer or difflib.get_close_matches(key, others, n=1, cutoff=0.8)), None)


def _kind(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {str(value)[:20]}"
    if isinstance(value, str):
        return f"the string {value if len(value) <= 30 else value[:30] + '...'!r}"
    return {list: "a list", dict: "an object"}.get(type(value), f"of type {type(value).__name__}")


def _quoted(keys: Iterable[str]) -> str:
    return ", ".join(map(repr, keys)) or "(none)"
