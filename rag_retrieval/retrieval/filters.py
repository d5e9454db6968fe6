"""Conditions on the metadata of documents: which documents a search is done among.

    {"language": "zh", "year": {"gte": 2020, "lt": 2024}, "source": {"in": ["a", "b"]}, "tags": {"ne": "draft"}}

All conditions hold. Others are combined by {"$or": [...]}, {"$and": [...]} and {"$not": {...}}, which hold conditions
themselves and stand beside fields.

A value is equality. A field that holds a list has each of its elements as a value, and a field inside an object is
called `author.name`. Numbers are compared as numbers, strings by their characters, so that dates compare as YYYY-MM-DD;
true is no number. null is for documents in which the field is null, an empty list, or missing.

The metadata are JSON on the disk. A field becomes a column in memory when it is first asked for, by one pass through
all documents, and later conditions on it read the column alone.
"""

import json
import math
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from rag_retrieval.data.corpus import Corpus

AND, OR, NOT = "$and", "$or", "$not"
MOST_NESTED = 20  # groups in each other
MOST_CONDITIONS = 256  # each takes a pass over the documents
RANGE = ("gt", "gte", "lt", "lte")
OPERATORS = (*RANGE, "in", "ne")
KINDS = {bool: "true or false", float: "a number", str: "a string"}
KIND_OF = {bool: bool, int: float, float: float, str: str, type(None): None}
EXPECTED = 'a string, a number, true, false, null, or an object such as {"gte": 2020} or {"in": ["a", "b"]}'
BLOCK = 4096  # documents read at once
NAMED = 20  # fields in a message
# what a document has in a field: one value; a list of values; else an object, a list with null, lists or objects, what
# is inside such a list, or what has a name with a point
ONE, LIST, OTHER = "one value", "a list", "an object or a list of other than values"


class FilterError(ValueError):
    """What is wrong with a condition, and with which field."""


class Condition(NamedTuple):
    """Of one field. equal: a value, and has_equal whether there is one, since null is a value too. operators: by name,
    of `OPERATORS`."""

    field: str
    has_equal: bool
    equal: Any
    operators: Mapping[str, Any]

    @property
    def values(self) -> list[Any]:
        """All that the field is compared with."""
        operators = dict(self.operators)
        return [self.equal] * self.has_equal + list(operators.pop("in", ())) + list(operators.values())


class Group(NamedTuple):
    """operator: `AND`, `OR` or `NOT`. members: conditions that all hold together; of NOT one."""

    operator: str
    members: "list[Conditions]"


Conditions = list[Condition | Group]  # all of which hold


def parse_where(where: Mapping[str, Any] | None) -> Conditions:
    """Raises FilterError that names the field and what is expected."""
    conditions = [] if where is None else _parse_all("where", where, MOST_NESTED)
    if len(list(single_conditions(conditions))) > MOST_CONDITIONS:
        raise FilterError(f"where: at most {MOST_CONDITIONS} conditions are taken; in takes many values in one")
    return conditions


def single_conditions(conditions: Conditions) -> Iterator[Condition]:
    """All of them, with those in groups."""
    for one in conditions:
        if isinstance(one, Group):
            for member in one.members:
                yield from single_conditions(member)
        else:
            yield one


def _parse_all(place: str, where: Any, levels: int) -> Conditions:
    if not isinstance(where, Mapping) or not all(isinstance(field, str) for field in where):
        raise FilterError(f'{place}: expected an object such as {{"year": {{"gte": 2020}}}}, found {shown(where)}')
    beginning = f"{place}: " if place == "where" else f"{place}."
    return [
        _parse_group(beginning + field, field, value, levels)
        if field in (AND, OR, NOT)
        else _parse(beginning + field, field, value)
        for field, value in where.items()
    ]


def _parse_group(place: str, operator: str, members: Any, levels: int) -> Group:
    if not levels:
        raise FilterError(f"where: at most {MOST_NESTED} of {AND}, {OR} and {NOT} are taken in each other")
    if operator == NOT:
        placed = [(place, members)]
    elif isinstance(members, Sequence) and not isinstance(members, (str, bytes)) and members:
        placed = [(f"{place}[{number}]", member) for number, member in enumerate(members)]
    else:
        raise FilterError(f'{place}: expected a list of objects such as {{"year": 2020}}, found {shown(members)}')
    parsed = [_parse_all(place, member, levels - 1) for place, member in placed]
    if [] in parsed:
        raise FilterError(f"{placed[parsed.index([])][0]}: expected at least one condition, found none")
    return Group(operator, parsed)


def _parse(place: str, field: str, value: Any) -> Condition:
    if not isinstance(value, Mapping):
        return Condition(field, True, _checked(place, value, EXPECTED), {})
    unknown = [name for name in value if name not in OPERATORS]
    if unknown or not value:
        found = f"found {shown(unknown[0])}" if unknown else "found none"
        inside = f"; a field inside an object is written {field}.NAME" if unknown else ""
        raise FilterError(f"{place}: expected operators among {', '.join(OPERATORS)}, {found}{inside}")
    operators = dict(value)
    for name in operators.keys() & set(RANGE):
        _checked(f"{place}.{name}", operators[name], "a number or a string", takes=(float, str))
    if len({kind_of(operators[name]) for name in operators.keys() & set(RANGE)}) > 1:
        raise FilterError(f"{place}: expected bounds of one kind, numbers or strings; found {shown(value)}")
    if "in" in operators:
        if isinstance(operators["in"], (str, bytes, Mapping)) or not isinstance(operators["in"], Sequence):
            raise FilterError(f"{place}.in: expected a list of values, found {shown(operators['in'])}")
        for number, one in enumerate(operators["in"]):
            _checked(f"{place}.in[{number}]", one, "a string, a number, true, false or null")
    if "ne" in operators:
        _checked(f"{place}.ne", operators["ne"], "a string, a number, true, false or null")
    return Condition(field, False, None, operators)


def _checked(place: str, value: Any, expected: str, takes: Sequence[type | None] = (None, bool, float, str)) -> Any:
    if kind_of(value) not in takes or (isinstance(value, float) and not math.isfinite(value)):
        raise FilterError(f"{place}: expected {expected}, found {shown(value)}")
    return value


def kind_of(value: Any) -> type | None:
    """A key of KINDS, None for null; the value's own type where it is none of these."""
    return KIND_OF.get(type(value), type(value))


def shown(value: Any) -> str:
    return f"{json.dumps(value, ensure_ascii=False, default=repr):.100}"


# ---- columns of values


class Column:
    """The values of one field. A code is the place of a value among the different ones in their order: true and false,
    numbers, strings. rows, codes: int32 [values], in the order of the documents. shapes: `ONE`, `LIST` or `OTHER`,
    those that documents have there. values: the different ones by kind, rising."""

    def __init__(self, count: int):
        self.count = count
        self.shapes: set[str] = set()
        self.rows, self.codes = array("i"), array("i")
        self.values: dict[type, list] = {}
        self._codes: dict[tuple[type, Any], int] = {}

    def add(self, row: int, value: Any) -> None:
        self.rows.append(row)
        self.codes.append(self._codes.setdefault((kind_of(value), value), len(self._codes)))

    def finish(self) -> None:
        """Put the codes in the order of the values."""
        self.values = {kind: sorted(value for of, value in self._codes if of is kind) for kind in KINDS}
        places = np.zeros(len(self._codes), np.int32)
        for kind, values in self.values.items():
            for place, value in enumerate(values, self._first(kind)):
                places[self._codes[kind, value]] = place
        self.rows, self.codes = np.array(self.rows, np.int32), places[np.array(self.codes, np.int32)]
        self._codes = {}

    def _first(self, kind: type) -> int:
        """The code of the least value of the kind."""
        before = list(KINDS)[: list(KINDS).index(kind)]
        return sum(len(self.values[other]) for other in before)

    def matching(self, condition: Condition) -> np.ndarray:
        """bool [documents]"""
        self.check_kinds(condition)
        if condition.has_equal:
            return self._have([condition.equal])
        operators, matching = condition.operators, np.ones(self.count, bool)
        if operators.keys() & set(RANGE):
            matching &= self._of_codes(self._in_range(operators))
        if "in" in operators:
            matching &= self._have(operators["in"])
        if "ne" in operators:
            matching &= ~self._have([operators["ne"]])
        return matching

    @property
    def kinds(self) -> list[type]:
        """Of the values, keys of KINDS."""
        return [kind for kind, values in self.values.items() if values]

    def check_kinds(self, condition: Condition) -> None:
        """A value of a kind that the field never has is a mistake, and finding nothing would hide it: FilterError."""
        kinds = self.kinds
        for value in condition.values:
            if value is not None and kind_of(value) not in kinds:
                expected = " or ".join(KINDS[kind] for kind in kinds)
                example = shown(self.values[kinds[0]][0])
                raise FilterError(
                    f"where: {condition.field}: expected {expected}, as the documents have there, such as {example}; "
                    f"found {shown(value)}"
                )

    def _have(self, values: Sequence[Any]) -> np.ndarray:
        """Whether a document has one of the values; null is for no value at all."""
        codes = [code for value in values if value is not None for code in self._codes_of(value)]
        matching = self._of_codes(np.isin(self.codes, codes))
        return matching | ~self._of_codes(slice(None)) if None in values else matching

    def _codes_of(self, value: Any) -> range:
        kind = kind_of(value)
        places = self.values[kind], value
        return range(self._first(kind) + bisect_left(*places), self._first(kind) + bisect_right(*places))

    def _in_range(self, operators: Mapping[str, Any]) -> np.ndarray:
        """bool [values]; one element of a list has to keep all bounds."""
        kind = kind_of(next(value for name, value in operators.items() if name in RANGE))
        values, first = self.values[kind], self._first(kind)
        low, high = first, first + len(values)
        for name, find in (("gt", bisect_right), ("gte", bisect_left)):
            if name in operators:
                low = max(low, first + find(values, operators[name]))
        for name, find in (("lt", bisect_left), ("lte", bisect_right)):
            if name in operators:
                high = min(high, first + find(values, operators[name]))
        return (self.codes >= low) & (self.codes < high)

    def _of_codes(self, chosen: np.ndarray | slice) -> np.ndarray:
        """bool [documents]: which have one of the chosen values."""
        matching = np.zeros(self.count, bool)
        matching[self.rows[chosen]] = True
        return matching


class Filters:
    """The documents of a corpus that a condition holds for. Several threads may call one."""

    def __init__(self, documents: Corpus):
        self.documents = documents
        self._columns: dict[str, Column] = {}
        self._fields: dict[str, None] | None = None  # of all documents; None before the first pass
        self._lock = threading.Lock()

    def rows(self, where: Mapping[str, Any] | None) -> np.ndarray | None:
        """int64, rising; None without a condition. Raises FilterError as `parse_where`, for a field in which no
        document has a value, and for a value of another kind than all of the field's."""
        conditions = parse_where(where)
        if not conditions:
            return None
        columns = self._read([condition.field for condition in single_conditions(conditions)])
        return np.flatnonzero(self._matching(conditions, columns))

    def column(self, field: str) -> Column:
        """Raises FilterError for a field in which no document has a value."""
        return self._read([field])[field]

    def _matching(self, conditions: Conditions, columns: Mapping[str, Column]) -> np.ndarray:
        """bool [documents]: for which all hold."""
        matching = np.ones(len(self.documents), bool)
        for one in conditions:
            if isinstance(one, Condition):
                matching &= columns[one.field].matching(one)
            elif one.operator == OR:
                matching &= self._any_matching(one.members, columns)
            else:
                all_hold = self._matching(list(chain.from_iterable(one.members)), columns)
                matching &= ~all_hold if one.operator == NOT else all_hold
        return matching

    def _any_matching(self, members: Sequence[Conditions], columns: Mapping[str, Column]) -> np.ndarray:
        matching = np.zeros(len(self.documents), bool)
        for member in members:
            matching |= self._matching(member, columns)
        return matching

    def _read(self, fields: Sequence[str]) -> dict[str, Column]:
        """Fields that were read before wait for no other thread."""
        if not self._columns.keys() >= set(fields):
            with self._lock:
                self._read_new([field for field in fields if field not in self._columns])
        for field in fields:
            if not len(self._columns[field].rows):
                raise self._no_value(field)
        return {field: self._columns[field] for field in fields}

    def _read_new(self, fields: Sequence[str]) -> None:
        for field in fields:
            if self._fields is not None and field not in self._fields:
                raise self._no_value(field)
        if fields:  # else another thread has read them meanwhile
            columns = {field: Column(len(self.documents)) for field in fields}
            self._fields = dict.fromkeys(self._fill(columns))
            self._columns |= columns

    def _no_value(self, field: str) -> FilterError:
        return FilterError(f"where: {field}: no document has a value there; {_describe(self._fields, field)}")

    def _fill(self, columns: Mapping[str, Column]) -> dict[str, Any]:
        """Read the columns. Keys of what is returned: all fields of the documents."""
        row, fields = 0, {}
        for block in self.documents.metadata_blocks(BLOCK):
            for metadata in block:
                fields.update(metadata)
                for name, value in metadata.items():
                    if type(value) is dict or type(value) is list:
                        for field, one in values_of(name, value):
                            fields[field] = None
                            if field in columns:
                                columns[field].add(row, one)
                        if any(f"{field}.".startswith(f"{name}.") for field in columns):
                            for field, shape in shapes_of(name, value):
                                if field in columns:
                                    columns[field].shapes.add(OTHER if "." in name else shape)
                    elif name in columns and value is not None:
                        columns[name].add(row, value)
                        columns[name].shapes.add(OTHER if "." in name else ONE)
                row += 1
        for column in columns.values():
            column.finish()
        return fields


def values_of(field: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(field, value) of all that are in a value and are not null."""
    if isinstance(value, list):
        for one in value:
            yield from values_of(field, one)
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from values_of(f"{field}.{name}", one)
    elif value is not None:
        yield field, value


def shapes_of(field: str, value: Any) -> Iterator[tuple[str, str]]:
    """(field, shape) of all that are in a value and are not null."""
    if isinstance(value, list):
        yield field, LIST if all(kind_of(one) in KINDS for one in value) else OTHER
        inside = [found for one in value for found in shapes_of(field, one)]
        yield from ((name, OTHER) for name, _ in inside if name != field)
    elif isinstance(value, dict):
        yield field, OTHER
        for name, one in value.items():
            for inner, shape in shapes_of(f"{field}.{name}", one):
                yield inner, OTHER if "." in name else shape
    elif value is not None:
        yield field, ONE


def _describe(fields: Mapping[str, None], wanted: str) -> str:
    if not fields:
        return "none of the documents has metadata"
    close = get_close_matches(wanted, fields, n=3)
    names = [field for field in dict.fromkeys([*close, *fields]) if field != wanted]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"the fields are {', '.join(names[:NAMED])}{more}"
