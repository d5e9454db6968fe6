"""Passages of the Python standard library's documentation strings, and questions that one passage answers.

A docstring is cut into passages by what they say: what the object is for, what it returns, how it fails, what
one argument means, on which platforms it works, an example. A question names an object and asks for one of
these, so the answer is a passage of the right object AND of the right kind. What a reader would get wrong: a
question is only asked when exactly one passage of the object is of that kind, else an unlabelled passage
would answer it too.
"""

import hashlib
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

# Not documentation of the library (test, idlelib, ...), a side effect on import (this, antigravity), or an
# optional part that some builds of Python lack, which would change the files from one machine to the next.
SKIPPED_MODULES = frozenset(
    ["__main__", "antigravity", "curses", "dbm", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3"]
    + ["nis", "ossaudiodev", "posix", "pydoc_data", "readline", "spwd", "test", "this", "tkinter", "turtle"]
    + ["turtledemo"]
)
MAX_CHARACTERS = 250
MAX_PIECES = 40  # words, digits and signs, about what a tokenizer makes of the text: short pairs train fast
MIN_CHARACTERS = 25

# The first pattern that matches decides the kind. The order matters: "Raises ValueError if sub is not found"
# also looks like an argument's description.
KINDS = (
    ("example", re.compile(r">>>|^\s*(For example|Examples?\b|e\.g\.|Usage\b)", re.I)),
    ("errors", re.compile(r"\b[Rr]aises?\b|\b(is|are|be) raised\b")),
    ("platforms", re.compile(r"\b(Unix|UNIX|POSIX|Windows|macOS|Mac OS|platforms?|Linux)\b")),
    ("returns", re.compile(r"^\W*(The )?(method |function )?[Rr]eturn(s|ed|ing)?\b|\b(is|are) returned\b")),
)
ARGUMENT_OPENING = r"(If|When|The|With|Optional|By default,?)?\W*(the |optional )*\W*"
PIECE = re.compile(r"[A-Za-z]+|\d|[^\w\s]|_")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z*'\"`(])")

# Percent of the possible questions that are asked. These two kinds are the most frequent and the easiest (the
# shortest passage; the argument's name); asked in full, they would be three quarters of all questions.
ASKED = {"purpose": 33, "argument": 50}

TEMPLATES = {
    "purpose": ("What is {} for?", "What does {} do?", "purpose of {}", "When would I use {}?"),
    "returns": ("What does {} give back?", "What is the result of {}?", "output of {}", "return value of {}"),
    "errors": ("When does {} fail?", "What can go wrong with {}?", "error conditions of {}", "{} exceptions"),
    "platforms": ("Does {} work on every operating system?", "{} on Windows and Linux", "Is {} portable?"),
    "example": ("How do I use {}?", "sample code for {}", "Show {} in use", "{} example"),
    "argument": ("What does {argument} mean in {}?", "How does {argument} change {}?", "{} {argument}"),
}


@dataclass(frozen=True)
class Passage:
    """One piece of one object's docstring; `kind` is a key of TEMPLATES or "details"."""

    name: str
    kind: str
    text: str
    argument: str = ""

    @property
    def document(self) -> str:
        """The text that is ranked: the object's full name, then the passage."""
        return f"{self.name}\n{self.text}"


@dataclass(frozen=True)
class Question:
    """A query and the one passage that answers it."""

    query: str
    answer: Passage


def documented_objects() -> list[tuple[str, str, tuple[str, ...]]]:
    """(full name, docstring, argument names) of every public object, each docstring once.

    Of aliases and inherited docstrings the shortest name stays: asyncio.Event, not asyncio.locks.Event.
    """
    found = {}
    for module in _modules():
        for name, thing in _members(module):
            doc = thing.__doc__
            if isinstance(doc, str) and len(doc.strip()) >= MIN_CHARACTERS:
                found[name] = (name, inspect.cleandoc(doc), _arguments(thing))
    unique = {}
    for name in sorted(found, key=lambda name: (name.count("."), len(name), name)):
        unique.setdefault(re.sub(r"\W+", " ", found[name][1]), found[name])
    return sorted(unique.values())


def _modules() -> Iterator:
    for top in sorted(name for name in sys.stdlib_module_names if not name.startswith("_")):
        if top in SKIPPED_MODULES:
            continue
        module = _import(top)
        if module is None:
            continue
        yield module
        found = pkgutil.walk_packages(getattr(module, "__path__", []), top + ".")
        for name in sorted(info.name for info in found):
            if not any(part.startswith("_") or part == "test" for part in name.split(".")):
                submodule = _import(name)
                if submodule is not None:
                    yield submodule


def _import(name: str):
    """The module, or None where this platform does not have it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


def _members(module) -> Iterator[tuple[str, object]]:
    """The module, its own public functions and classes, and their public methods and properties."""
    yield module.__name__, module
    for key, thing in sorted(vars(module).items()):
        if key.startswith("_") or not callable(thing) or not _is_own(module, key, thing):
            continue
        yield f"{module.__name__}.{key}", thing
        if inspect.isclass(thing):
            for method, value in sorted(vars(thing).items()):
                value = getattr(value, "__func__", value)
                if not method.startswith("_") and (callable(value) or inspect.isdatadescriptor(value)):
                    yield f"{module.__name__}.{key}.{method}", value


def _is_own(module, key: str, thing) -> bool:
    """Whether the module publishes the object, rather than having imported it."""
    public = getattr(module, "__all__", None)
    if public is not None:
        return key in public
    return getattr(thing, "__module__", None) in (module.__name__, "_" + module.__name__)


def _arguments(thing) -> tuple[str, ...]:
    try:
        names = tuple(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return ()
    return tuple(name for name in names if name not in ("self", "cls", "args", "kwargs") and len(name) > 2)


def passages_of(name: str, doc: str, arguments: tuple[str, ...]) -> list[Passage]:
    """The docstring in passages, in order. The first sentence is the purpose, or what is returned."""
    own = re.escape(name.rpartition(".")[2])
    doc = re.sub(rf"^(\w+\.)*{own}\(.*\)[^\n]*\n+", "", doc)  # a signature line tells nothing
    pieces = []
    for paragraph in re.split(r"\n\s*\n", doc):
        for text in _sentences(paragraph):
            kind, argument = _kind(text, arguments) if pieces else _first_kind(text)
            if pieces and _continues(pieces[-1], kind, argument, text, paragraph):
                pieces[-1][2] += "\n" + text
            else:
                pieces.append([kind, argument, text, paragraph])
    passages = [Passage(name, kind, _cut(text), argument) for kind, argument, text, _ in pieces]
    return [passage for passage in passages if len(passage.text) >= MIN_CHARACTERS]


def _continues(piece: list, kind: str, argument: str, text: str, paragraph: str) -> bool:
    """Whether the text belongs to the passage before it rather than opening a new one."""
    if (kind, argument) == (piece[0], piece[1]):
        return len(piece[2]) + len(text) < MAX_CHARACTERS
    return kind == "details" and paragraph is piece[3]


def _sentences(paragraph: str) -> list[str]:
    """Sentences of prose; code and lists stay whole."""
    if ">>>" in paragraph or re.search(r"\n\s+\S|\n[-*]", paragraph) or "::" in paragraph:
        return [paragraph.strip()]
    return [s for s in SENTENCE_END.split(re.sub(r"\s+", " ", paragraph).strip()) if s]


def _first_kind(text: str) -> tuple[str, str]:
    return ("returns" if re.match(r"Returns?\b", text) else "purpose"), ""


def _kind(text: str, arguments: tuple[str, ...]) -> tuple[str, str]:
    """The kind of a later passage, and which argument it describes."""
    for kind, pattern in KINDS:
        if pattern.search(text):
            return kind, ""
    for argument in arguments:
        if re.match(rf"{ARGUMENT_OPENING}{argument}\b", text):
            return "argument", argument
    return "details", ""


def _cut(text: str) -> str:
    """At most MAX_CHARACTERS and MAX_PIECES, ending at a line or sentence where one is near."""
    pieces = [match.end() for match in PIECE.finditer(text)]
    limit = min(MAX_CHARACTERS, pieces[MAX_PIECES - 1] if len(pieces) > MAX_PIECES else len(text))
    if len(text) <= limit:
        return text
    head = text[:limit]
    end = max(head.rfind("\n"), head.rfind(". ") + 1)
    return head[: end if end > limit // 2 else head.rfind(" ")].rstrip()


def questions_of(passages: list[Passage]) -> list[Question]:
    """Every question that exactly one passage of its object answers, for objects of two passages or more."""
    per_object = Counter(p.name for p in passages)
    per_kind = Counter((p.name, p.kind, p.argument) for p in passages)
    short = Counter(_short(name) for name in per_object)
    asked = []
    for p in passages:
        alone = per_object[p.name] > 1 and per_kind[p.name, p.kind, p.argument] == 1
        chosen = stable_number("asked " + p.document) % 100 < ASKED.get(p.kind, 100)
        if p.kind != "details" and alone and chosen:
            name = _short(p.name) if short[_short(p.name)] == 1 else p.name
            asked.append(Question(_ask(p, name), p))
    return asked


def _short(name: str) -> str:
    """The last two parts, as people write them: Path.read_text."""
    return ".".join(name.split(".")[-2:])


def _ask(passage: Passage, name: str) -> str:
    templates = TEMPLATES[passage.kind]
    return templates[stable_number(passage.document) % len(templates)].format(name, argument=passage.argument)


def stable_number(text: str) -> int:
    """The same large number for the same text in every run, unlike hash()."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
