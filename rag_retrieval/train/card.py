"""The README.md of a model: what it is, how to use it, the data, the configuration, and what was measured.

Our card has a line MARK and is rewritten only while that line is there; a card without it belongs to the user.
A card goes to other people, so of a path on this machine only the last part is shown; `shown` is for every value that
may be one.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from rag_retrieval import __version__
from rag_retrieval.data.readers import HUB_OPTIONS, is_file
from rag_retrieval.data.summary import StoreSummary, format_summary
from rag_retrieval.metrics import AT_START, P_VALUE
from rag_retrieval.models.settings import PACKAGE_PREFIX
from rag_retrieval.train.run_folder import CONFIGURATION_FILE, DATA_FILE, METRICS_FILE, PROVENANCE_FILE, RUN_FILE

CARD = "README.md"
MARK = "<!-- written by rag_retrieval; remove this line to keep what you change here -->"
EXPORTED = "An ONNX folder, for ONNX Runtime or OpenVINO. First: `hf download {name} --local-dir {name}`"
LOCAL_ONLY_KEYS = {
    *("output_dir", "overwrite_output_dir", "resume", "resume_with_changes"),
    *("num_workers", "wait_minutes", "log_with"),
}


@dataclass(frozen=True)
class DataPart:
    """One file of a run's data. purpose: "training" or "validation". source: its path or its name on the hub."""

    purpose: str
    source: str
    summary: StoreSummary


@dataclass(frozen=True)
class RunRecord:
    """configuration: keys of the YAML. data: in the order of the configuration, validation last.

    provenance: engine, processes, versions. step: the optimizer step of the final model, None where no run says it.
    measured: validation metrics of that step; empty where nothing was measured then.
    """

    configuration: dict[str, Any]
    data: list[DataPart]
    provenance: dict[str, Any]
    step: int | None
    measured: dict[str, float]


@dataclass(frozen=True)
class Kind:
    """What a trainer says of the models that it makes. tag, title: of the hub's kind of task, as an id and in words.
    tags: further ones. use: code for a model's folder, with {name} for the model's. elsewhere: the same of other
    libraries, which open no exported folder. start: how a server is started with it; None where no server takes such
    models. description, meaning: of a model's folder and its run: what it is, and what its output says."""

    tag: str
    title: str
    tags: Sequence[str]
    use: Callable[[Path], str]
    elsewhere: Callable[[Path], str]
    start: Callable[[Path], str] | None
    description: Callable[[Path, RunRecord | None], str]
    meaning: Callable[[Path, RunRecord | None], str]


@dataclass(frozen=True)
class About:
    """What no file of the model says. name: the title, and what is opened in the examples. language: ISO codes.

    license: its id on the hub. evaluations: contents of result.json files of `rag-retrieval evaluate`.
    """

    name: str
    language: Sequence[str] = ()
    license: str | None = None
    evaluations: Sequence[dict[str, Any]] = ()


def write_card(model: Path, run: Path, about: About, kind: Kind) -> None:
    """README.md into a model's folder, from its files and those of its run. ValueError for damaged ones."""
    (model / CARD).write_text(model_card(model, read_run_record(run), about, kind), encoding="utf-8")


def model_card(model: Path, run: RunRecord | None, about: About, kind: Kind) -> str:
    """The text of the card. run: what made the model, where that is known."""
    exported = any(model.glob("*.onnx"))
    sections = [
        f"---\n{front_matter(run, about, kind)}\n---",
        MARK,
        f"# {about.name}",
        kind.description(model, run),
        "## Use",
        *([EXPORTED.format(name=about.name)] if exported else []),
        kind.use(model).format(name=about.name),
        *([] if exported else [kind.elsewhere(model).format(name=about.name)]),
        kind.meaning(model, run),
    ]
    if kind.start is not None:
        sections += ["## Serve", kind.start(model).format(name=about.name)]
    if run is not None:
        sections += training_sections(run)
    measured = [validation_table(run)] if run is not None and run.measured else []
    measured += [evaluation_table(result) for result in about.evaluations]
    if measured:
        sections += ["## Measured", *measured]
    return "\n\n".join(sections) + "\n"


def front_matter(run: RunRecord | None, about: About, kind: Kind) -> str:
    configuration = run.configuration if run is not None else {}
    base = configuration.get("model_name_or_path")
    parts = run.data if run is not None else []
    sources = [part.source for part in parts if part.purpose == "training" and not is_local(part.source)]
    datasets = [HUB_OPTIONS.split(source)[0] for source in sources]
    results = evaluation_results(run, about, kind)
    return ModelCardData(
        base_model=base if base and not is_local(base) else None,
        datasets=datasets or None,
        eval_results=results or None,
        model_name=about.name if results else None,
        language=list(about.language) or None,
        license=about.license,
        library_name="sentence-transformers",
        pipeline_tag=kind.tag,
        tags=[*kind.tags, "rag_retrieval"],
    ).to_yaml()


def evaluation_results(run: RunRecord | None, about: About, kind: Kind) -> list[EvalResult]:
    """For the hub's model-index: validation metrics of the final step, and those of each evaluation."""
    measured = []
    if run is not None and run.measured:
        measured.append((shown(run.configuration["val_dataset"]), "validation", run.measured))
    measured += [(result["data"], result["config"]["split"], result["model"]) for result in about.evaluations]
    return [
        EvalResult(kind.tag, dataset, dataset, name, round(value, 4), task_name=kind.title, dataset_split=split)
        for dataset, split, values in measured
        for name, value in values.items()
        if isinstance(value, float) and not name.endswith((AT_START, P_VALUE))
    ]


def training_sections(run: RunRecord) -> list[str]:
    sections = []
    if run.data:
        sections.append("## Data")
    for part in run.data:
        sections.append(f"```\n{format_summary(part.summary, f'{part.purpose}: {shown(part.source)}')}\n```")
    shown_values = without_paths({key: value for key, value in run.configuration.items() if key not in LOCAL_ONLY_KEYS})
    values = yaml.safe_dump(shown_values, sort_keys=False, allow_unicode=True)
    made = run.provenance
    versions = ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items())
    where = f"{made['engine']}, processes: {made['processes']}; {versions}" if made else f"rag_retrieval {__version__}"
    return [*sections, "## Training", f"```yaml\n{values}```", where]


def validation_table(run: RunRecord) -> str:
    rows = [[name, f"{value:.4f}"] for name, value in run.measured.items() if isinstance(value, float)]
    queries = run.measured.get("queries")
    of = f"`{shown(run.configuration['val_dataset'])}`" + (f", {queries:,} queries" if queries else "")
    return f"Validation on {of}, at step {run.step:,}, which chose this model or ended it:\n\n" + table(
        ["measure", "value"], rows
    )


def evaluation_table(result: dict[str, Any]) -> str:
    compared = {row["measure"]: row for row in result["comparison"]}
    rows = []
    for measure, value in result["model"].items():
        if measure == "name":
            continue
        row = [measure, f"{result['baseline'][measure]:.4f}", f"{value:.4f}"]
        test = compared.get(measure)
        row.append(f"{test['difference']:+.4f} [{test['low']:+.4f}, {test['high']:+.4f}]" if test else "")
        rows.append(row)
    title = f"`{result['data']}`: {result['queries']:,} queries, {result['pairs']:,} pairs"
    heads = ["measure", shown(result["baseline"]["name"]), "this model", "difference, 95% interval"]
    return f"{title}; candidates from {shown(result['candidates'])}:\n\n" + table(heads, rows)


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- what a training run left beside its model --------------------------------------------------------------


def read_run_record(folder: Path) -> RunRecord | None:
    """Of a run's output folder; None where no run wrote one. Whatever else is missing is left out.

    Raises ValueError for a file that is damaged.
    """
    if not (folder / CONFIGURATION_FILE).is_file():
        return None
    configuration = parsed(folder / CONFIGURATION_FILE, yaml.safe_load)
    step = parsed(folder / RUN_FILE).get("model_step")
    lines = parsed(folder / METRICS_FILE, lambda text: list(map(json.loads, text.splitlines())))
    evaluations = [line for line in lines if line["kind"] == "eval" and line["step"] == step]
    last = evaluations[-1] if evaluations else {}
    measured = {name: value for name, value in last.items() if name not in ("step", "kind")}
    data = [part_from(values) for values in parsed(folder / DATA_FILE)]
    return RunRecord(configuration, data, parsed(folder / PROVENANCE_FILE), step, measured)


def parsed(path: Path, parse=json.loads):
    """What the file holds; {} where it is not there."""
    if not path.is_file():
        return {}
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove it, and the card goes without it") from error


def part_from(values: dict[str, Any]) -> DataPart:
    summary = values["summary"]
    histogram = [tuple(bar) for bar in summary["label_histogram"]]
    return DataPart(values["purpose"], values["source"], StoreSummary(**summary | {"label_histogram": histogram}))


def is_local(name: str) -> bool:
    """Whether a model's or data set's name is of this machine, and not of the hub."""
    return name.startswith(PACKAGE_PREFIX) or is_file(name)


def shown(name: str) -> str:
    """A name for other people: of a path its last part, of the model of a run the run's."""
    if not is_local(name) or name.startswith(PACKAGE_PREFIX):
        return name
    path = Path(name)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is absent, each path as `shown`; the entries of a `train_dataset` that is a list likewise."""
    values = {key: value for key, value in values.items() if value is not None}
    if isinstance(values.get("train_dataset"), list):
        entries = values["train_dataset"]
        values["train_dataset"] = [
            shown(entry) if isinstance(entry, str) else without_paths(entry) for entry in entries
        ]
    paths = ("model_name_or_path", "train_dataset", "val_dataset", "path")
    return values | {key: shown(values[key]) for key in paths if isinstance(values.get(key), str)}
