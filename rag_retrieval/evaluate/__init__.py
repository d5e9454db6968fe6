"""How well a reranker ranks: data with judgments, scores, figures, comparisons, calibration, report."""
