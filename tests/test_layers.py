"""Imports go one way, as the design says. Read from the source, so that lazy imports count too."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "rag_retrieval"
LEVELS = [
    {"core"},
    {"metrics"},
    {"data", "significance"},
    {"models", "losses"},
    {"train", "infer"},
    {"retrieval"},
    {"evaluate"},
    {"distill", "mining", "export", "serve", "integrations"},
    {"quickstart"},
    {"cli"},
]
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}


def file_of(module: str) -> Path:
    return PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")


def imported_modules(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; scripts here run from their own folder"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {node.module, *(name for name in members if file_of(name).is_file())}
    return names


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


SOURCES = sorted(file for file in PACKAGE.rglob("*.py") if part_of(file) != "__init__")


def test_a_module_imports_only_from_its_own_part_and_from_lower_ones():
    assert len(SOURCES) > 20
    for file in SOURCES:
        own = part_of(file)
        for module in imported_modules(file):
            if module.startswith("rag_retrieval."):
                part = module.split(".")[1]
                assert part == own or LEVEL_OF[part] < LEVEL_OF[own], f"{file} imports {module}"


def test_no_module_imports_itself_through_others():
    names = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in SOURCES}
    imports = {name: imported_modules(file) & names.keys() for name, file in names.items()}
    assert sum(map(len, imports.values())) > 500
    TopologicalSorter(imports).prepare()  # raises CycleError, with the modules of a circle


def test_losses_import_torch_numpy_and_the_standard_library_alone():
    for file in (PACKAGE / "losses").glob("*.py"):
        tops = {module.split(".")[0] for module in imported_modules(file)}
        assert tops <= {"torch", "numpy", "rag_retrieval", *sys.stdlib_module_names}, file


LOOP = ("loop", "task", "steps", "step_checks", "optim", "checkpoints", "resume", "tracking",
        "launch", "failures", "provenance", "run_folder")  # fmt: skip


def test_what_trainers_share_knows_none_of_them():
    for file in (PACKAGE / "train").glob("*.py"):
        models = ("rag_retrieval.models", "rag_retrieval.losses") if file.stem in LOOP else ()
        trainers = ("rag_retrieval.train.reranker", "rag_retrieval.train.embedding", "rag_retrieval.train.pretrain")
        unknown = (*trainers, *models)
        assert not [module for module in imported_modules(file) if module.startswith(unknown)], file


def test_a_script_folder_shadows_no_library():
    libraries = {"torch", "datasets", "transformers", "evaluate", "logging", "types", "accelerate", "yaml"}
    for trainer in ("reranker", "embedding", "pretrain"):
        assert not {file.stem for file in (PACKAGE / "train" / trainer).glob("*.py")} & libraries
