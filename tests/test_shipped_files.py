"""Every file that ships is read, and every command that a README names is the one that is tested."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from page_blocks import blocks

from rag_retrieval.core.config_reader import load_config
from rag_retrieval.data.beir import read_folder, read_qrels
from rag_retrieval.data.readers import SUFFIXES
from rag_retrieval.data.store import RecordStore, open_store
from rag_retrieval.train.reranker.config import RerankerConfig

ROOT = Path(__file__).resolve().parents[1]
TRAINER = ROOT / "rag_retrieval" / "train" / "reranker"
TRAINING_FILES = sorted((TRAINER / "config").glob("*.yaml"))
ACCELERATE_FILES = sorted((ROOT / "config").rglob("*.yaml"))
EXAMPLES = ROOT / "example_data"
EXAMPLE_FILES = sorted(file for file in EXAMPLES.iterdir() if file.name.endswith(SUFFIXES))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_files_that_users_type_are_there():
    assert {file.name for file in TRAINING_FILES} >= {"training_bert.yaml", "training_llm.yaml"}
    assert {name_of(file) for file in ACCELERATE_FILES} >= {
        "config/xlmroberta_default_config.yaml",
        "config/default_fsdp.yaml",
        "config/fsdp_qwen.yaml",
        "config/fsdp_two_nodes.yaml",
        "config/ddp.yaml",
        *(f"config/deepspeed/deepspeed_zero{stage}.yaml" for stage in range(4)),
        "config/deepspeed/deepspeed_zero3_two_nodes.yaml",
    }
    assert len(EXAMPLE_FILES) >= 6


@pytest.mark.parametrize("file", TRAINING_FILES, ids=name_of)
def test_a_shipped_configuration_is_valid_from_any_folder(file, tmp_path, monkeypatch):
    for folder in (ROOT, TRAINER, tmp_path):
        monkeypatch.chdir(folder)
        config = load_config(RerankerConfig, str(file))
        assert all(Path(alone.train_dataset).is_file() for alone, _ in config.files)
        assert config.val_dataset is None or Path(config.val_dataset).is_file()


@pytest.mark.parametrize("file", TRAINING_FILES, ids=name_of)
def test_a_shipped_configuration_validates_on_the_label_levels_that_it_trains_on(file):
    config = load_config(RerankerConfig, str(file))
    for alone, _ in config.files:
        train = open_store(alone.train_dataset)
        assert alone.max_label in (None, train.labels.max())
        if config.val_dataset is not None and alone.loss_type == config.loss_type:
            assert set(open_store(config.val_dataset).labels) == set(train.labels)


@pytest.mark.parametrize("file", TRAINING_FILES, ids=name_of)
def test_options_that_switch_model_or_data_type_work_on_a_shipped_configuration(file):
    """What the file says for the other type is ignored and named; the rest holds."""
    for model_type in ("bert_encoder", "llm_decoder"):
        for dataset_type, loss in (("pointwise", "point_mse"), ("grouped", "lambda_loss")):
            switches = ["--model_type", model_type, "--train_dataset_type", dataset_type, "--loss_type", loss]
            as_shipped = load_config(RerankerConfig, str(file))
            switched = load_config(RerankerConfig, str(file), switches)
            assert (switched.model_type, switched.train_dataset_type) == (model_type, dataset_type)
            assert switched.loss_type == loss and (switched.lr, switched.seed) == (as_shipped.lr, as_shipped.seed)
            given = yaml.safe_load(file.read_text()).keys()
            unused = {"seq", "special_token", "head", "instruction", "yes_token", "no_token"} & given
            assert all(name in switched.ignored for name in unused if model_type == "bert_encoder")
            if dataset_type == "pointwise" and "train_group_size" in given:
                assert "train_group_size" in switched.ignored


def test_the_graded_dev_file_shares_no_text_with_the_training_files():
    dev, *training = (
        open_store(file, group_by_query=True)
        for file in [EXAMPLES / "stdlib_pointwise.dev.jsonl", *EXAMPLES.glob("stdlib_*.train.jsonl")]
    )
    assert (dev.num_pairs, dev.num_groups, len(training)) == (341, 60, 5)
    for store in training:
        assert texts_of(dev).isdisjoint(texts_of(store))


def test_the_example_triples_are_the_first_questions_of_the_pos_neg_file():
    triples = open_store(EXAMPLES / "stdlib_triples.train.tsv", group_by_query=True)
    records = open_store(EXAMPLES / "stdlib_pos_neg.train.jsonl")
    assert triples.num_groups == 60
    for index in range(60):
        found, expected = triples.group(index), records.group(index)
        assert (found.query, found.labels.tolist()) == (expected.query, expected.labels.tolist())
        assert found.documents == [" ".join(document.split()) for document in expected.documents]


def texts_of(store: RecordStore) -> set[str]:
    groups = [store.group(index) for index in range(store.num_groups)]
    return {text for group in groups for text in (group.query, *group.documents)}


@pytest.mark.parametrize("file", ACCELERATE_FILES, ids=name_of)
def test_accelerate_reads_a_shipped_launch_file(file):
    settings = load_config_from_file(str(file))
    assert settings.num_processes == 2
    assert settings.mixed_precision == "no", "the training file decides the precision"
    assert settings.num_machines == (2 if "two_nodes" in file.name else 1)
    if settings.fsdp_config:
        assert settings.fsdp_config["fsdp_version"] == 2
        assert "fsdp_transformer_layer_cls_to_wrap" not in settings.fsdp_config, "layers follow the model"


@pytest.mark.parametrize(
    "one, two",
    [
        ("default_fsdp", "fsdp_two_nodes"),
        ("deepspeed/deepspeed_zero3", "deepspeed/deepspeed_zero3_two_nodes"),
    ],
)
def test_a_two_node_file_differs_from_the_one_node_file_only_there(one, two):
    expected, found = (yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text()) for name in (one, two))
    nodes = {"num_machines", "main_process_ip", "main_process_port", "same_network", "rdzv_backend"}
    assert {key for key in found if found[key] != expected.get(key)} == nodes


@pytest.mark.parametrize("file", EXAMPLE_FILES, ids=name_of)
def test_an_example_file_is_read_without_a_complaint(file):
    store = open_store(file)
    assert store.num_pairs >= store.num_groups >= 40


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_the_example_folder_has_the_grouped_files_questions_and_answers(split):
    folder = read_folder(EXAMPLES / "stdlib_beir")
    asked = {}
    for query, grades in read_qrels(folder, split).items():
        ((answer, grade),) = grades.items()
        assert grade == 1
        asked[folder.queries[query]] = folder.documents[answer]
    records = map(json.loads, (EXAMPLES / f"stdlib_grouped.{split}.jsonl").read_text(encoding="utf-8").splitlines())
    answers = {record["query"]: [hit["content"] for hit in record["hits"] if hit["label"] == 1] for record in records}
    assert asked == {query: " ".join(answer.split("\n", 1)) for query, (answer,) in answers.items()}


def test_the_readme_s_test_command_is_what_ci_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python3 -m venv .*$", readme, flags=re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("rag-retrieval quickstart")
    assert commands[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_constraints_pin_exactly_one_version_of_everything():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in lines
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9_.]+", line) for line in lines)


PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / folder / "README.md"
                for folder in ("config", "example_data", "benchmarks"))])  # fmt: skip


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_of_the_pages_leads_somewhere():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", page.read_text(encoding="utf-8")):
            file = page.parent / target if target else page
            assert file.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors_of(file), f"{page}: {target}#{anchor}"


def test_every_file_beside_the_code_is_installed_with_it():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {ROOT.joinpath(*package.split(".")): patterns for package, patterns in settings["package-data"].items()}
    installed = {file for folder, patterns in folders.items() for each in patterns for file in folder.glob(each)}
    files = {file for file in (ROOT / "rag_retrieval").rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    others = {file for file in files if file.suffix != ".py" and file.name != ".gitkeep"}
    assert set(map(name_of, others)) == set(map(name_of, installed))


def test_the_json_and_yaml_blocks_of_the_pages_are_valid():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL):
            assert [json.loads(line) for line in block.splitlines()]
        for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL):
            assert yaml.safe_load(block)


def code_blocks(page: Path) -> list[str]:
    """Blocks of commands, Python, JSON and YAML, without comments and the texts of examples."""
    found = blocks(page.read_text(encoding="utf-8"))
    return [re.sub(r"\s*# .*", "", content) for language, content in found if language in ("bash", "json", "yaml")]


def test_both_readmes_are_short_and_show_the_same_commands():
    english, chinese = ROOT / "README.md", ROOT / "README_zh.md"
    assert code_blocks(english) == code_blocks(chinese)
    links = [re.findall(r"\]\(((?!README)[^)]*)\)", page.read_text(encoding="utf-8")) for page in (english, chinese)]
    assert sorted(links[0]) == sorted(link.replace("_zh.md", ".md") for link in links[1])
    assert all(page.read_text(encoding="utf-8").count("\n") < 170 for page in (english, chinese))


def test_a_translated_page_has_the_blocks_and_links_of_the_english_one():
    """So that the test that runs the English page covers both."""
    translated = list((ROOT / "docs").glob("*_zh.md"))
    assert translated
    for page in translated:
        original = page.with_stem(page.stem.removesuffix("_zh"))
        texts = [each.read_text(encoding="utf-8") for each in (page, original)]
        assert blocks(texts[0]) == blocks(texts[1]) != []
        links = [re.findall(r"\]\(([^)]*)\)", text) for text in texts]
        assert {*links[0], page.name} == {*links[1], original.name}, "each names the other"


def run_in(folder: Path, command: list[str], **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, **kwargs)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_answers(arguments):
    done = run_in(ROOT, [sys.executable, "-m", "rag_retrieval.cli", *arguments])
    assert done.returncode == 0
    assert "train" in done.stdout


def test_an_unknown_subcommand_is_a_mistake_that_lists_the_known_ones():
    done = run_in(ROOT, [sys.executable, "-m", "rag_retrieval.cli", "trian"])
    assert done.returncode == 2
    assert "unknown command 'trian'" in done.stderr and "quickstart" in done.stderr
    assert "Traceback" not in done.stderr
