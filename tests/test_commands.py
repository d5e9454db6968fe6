"""The commands that the documents name, run as they stand there, on a tiny model so that they end soon."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from tiny_models import tiny_bert, tiny_qwen2

from rag_retrieval import CrossEncoder, LLMDecoder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TRAINER = ROOT / "rag_retrieval" / "train" / "reranker"


def commands_of(readme: Path, start: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith(start)]


def run_command(command: str, folder: Path, options: str, timeout: int = 280, threads: str | None = "1") -> str:
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


TRAINER_COMMANDS = commands_of(TRAINER / "README.md", "accelerate launch")


def test_the_trainer_s_readme_names_the_three_ways_to_launch():
    assert len(TRAINER_COMMANDS) == 3
    assert any("xlmroberta_default_config.yaml" in command for command in TRAINER_COMMANDS)
    assert any("deepspeed_zero1.yaml" in command for command in TRAINER_COMMANDS)


@pytest.mark.parametrize("command", TRAINER_COMMANDS)
def test_a_launch_command_of_the_trainer_s_readme_trains_a_model_that_loads(command, tmp_path):
    if "deepspeed" in command:
        pytest.importorskip("deepspeed")
    log = re.search(r" > (\S+)", command)
    run_command(command, TRAINER, small_run(tiny_bert(tmp_path / "base"), tmp_path / "out"))
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
    options = small_run(tiny_qwen2(tmp_path / "base"), tmp_path / "out") + " --log_with None"
    run_command(f"rag-retrieval train --config {name}.yaml", TRAINER, options)
    assert LLMDecoder.from_pretrained(str(tmp_path / "out" / "model")).compute_score(["q", "d"]).isfinite().all()


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


@pytest.mark.timeout(1500)
def test_the_quickstart_prints_the_three_rows_and_examples(tmp_path):
    options = f"--output_dir {tmp_path / 'quick'}"
    text = run_command("rag-retrieval quickstart", ROOT, options, timeout=1400, threads=None)
    rows = dict(re.findall(r"^  (\S.*?)\s{2,}(0\.\d{4})\s+0\.\d{4}$", text, flags=re.MULTILINE))
    assert list(rows) == ["BM25's order", "the base's embeddings, cosine", "the trained reranker"]
    before = max(float(rows["BM25's order"]), float(rows["the base's embeddings, cosine"]))
    assert float(rows["the trained reranker"]) >= before + 0.05
    assert text.count("query: ") == 3 and str(tmp_path / "quick" / "model") in text


def test_the_readme_s_evaluation_runs_and_writes_its_report(tmp_path):
    pytest.importorskip("matplotlib")
    (command,) = commands_of(ROOT / "README.md", "rag-retrieval evaluate")
    options = f"--model {tiny_bert(tmp_path / 'base', head_labels=1)} --output_dir {tmp_path / 'out'}"
    text = run_command(command, ROOT, options)
    assert "200 queries, 3,977 pairs" in text and "probabilities, calibrated on stdlib_grouped.dev.jsonl" in text
    assert (tmp_path / "out" / "report.html").is_file() and (tmp_path / "base" / "calibration.json").is_file()
