"""What an evaluation prints: within the columns of the terminal, in any language."""

from types import SimpleNamespace

from rich.cells import cell_len

from rag_retrieval.core.terminal import rendered
from rag_retrieval.evaluate.calibration import ProbabilityErrors
from rag_retrieval.evaluate.output import change_lines, describe_probabilities
from rag_retrieval.evaluate.systems import QueryChange, RankChange
from rag_retrieval.models.calibration import Calibration


def test_texts_are_cut_to_the_terminal_with_two_column_characters():
    data = SimpleNamespace(
        queries={"q": "中国的首都\n在哪里？" * 9},
        documents={"a": "北京是中国的首都，" * 9, "b": "[red]water[/red] :smile:", "c": "short"},
    )
    changes = [RankChange("a", 1, 3, 1), RankChange("b", None, 1, None), RankChange("c", 0, None, 12)]
    texts = change_lines(SimpleNamespace(data=data), QueryChange("q", 0.25, 0.75, changes))
    lines = rendered(texts, 60).splitlines()
    assert [cell_len(line) <= 60 for line in lines] == [True] * 4
    assert lines[0].startswith("  +0.500") and "中国的首都 在哪里" in lines[0] and lines[0].endswith("…")
    assert lines[1].startswith("    grade 1   rank 3 -> 1  ") and cell_len(lines[1]) >= 59
    assert "grade -   rank 1 -> -" in lines[2] and lines[2].endswith("[red]water[/red] :smile:")
    assert "grade 0   rank - -> 12" in lines[3]


def test_probabilities_say_what_made_them():
    plain = ProbabilityErrors("sigmoid", None, 0.5, 0.25, 0.5, 0.25)
    assert "sigmoid, not calibrated" in describe_probabilities(plain) and "0.5000" in describe_probabilities(plain)
    made = ProbabilityErrors("calibrated", Calibration(2.0, -1.0, "toy dev", 9), 0.125, 0.0625, 0.5, 0.25)
    text = describe_probabilities(made)
    assert all(part in text for part in ("toy dev", "2.000", "-1.000", "0.1250", "0.0625", "0.5000", "0.2500"))
