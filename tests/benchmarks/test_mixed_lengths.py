import sys
from pathlib import Path

import numpy as np
import torch
from tiny_models import tiny_bert

# the scripts import each other by bare name, as Python runs them
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import mixed_lengths


def test_a_long_text_shares_a_step_with_short_ones_without_padding(tmp_path, capsys):
    tiny_bert(tmp_path / "bert")
    sizes = ["--long", "4096", "--short", "16", "--texts", "20", "--rounds", "1"]
    mixed_lengths.main(["--model", str(tmp_path / "bert"), *sizes])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].startswith("long: 1 texts, 4,096 tokens (4,096 padded), ") and lines[-1].startswith("waste: ")
    assert lines[-3].startswith("short: 20 texts, 320 tokens (320 padded), ")
    assert lines[-2].startswith("mixed: 21 texts, 4,416 tokens (86,016 padded), ")  # 21 x 4,096


def test_texts_have_the_vectors_and_gradients_of_steps_of_their_own(tmp_path):
    tiny_bert(tmp_path / "bert")
    model = mixed_lengths.with_positions(str(tmp_path / "bert"), 4096).eval()
    random = np.random.default_rng(0)
    short, long = ([*mixed_lengths.texts_of([length] * count, model, random)] for length, count in ((16, 3), (4096, 1)))
    gradients = []
    for steps in ([short, long], [[*short, *long]]):
        sums = 0.0
        for texts in steps:
            mixed_lengths.train(model, texts)
            sums += model.model.embeddings.position_embeddings.weight.grad
        gradients.append(sums)
    alone, together = gradients
    assert float(alone.abs().max()) > 0
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
