"""How an embedder's training goes: values for the log from the sums of `StepGradients.report`, and their warnings."""

from collections.abc import Mapping

from rag_retrieval.losses.embedding import DENSE

SAME_DIRECTION, NO_DIFFERENCE = 0.99, 0.005  # cosines: of negatives at least, and positive minus negatives at most
LEARNS_NOTHING = 0.99  # share of records whose loss is near zero


def log_values(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over the records of some steps; sums: of `StepGradients.report`, over processes and steps.

    zero_loss_share: of records whose loss is below 1e-4. positive_rank: of the positive among its candidates by cosine,
    1 is the best. positive_cosine, negative_cosine: over all positives and all negatives, at the full width.
    masked_negatives: how many candidates were left out, a count. These are of dense vectors; of lexical weights, token
    vectors and the ensemble they are there as lexical/positive_rank, lexical/positive_score and so on, and of several
    also the loss of each, dense/loss. query_terms, document_terms: entries above 0 of a text's lexical weights. What
    the loss does not have, such as cosines of texts alone, is not there either.
    """
    records = sums["records"]
    if not records:
        return {}
    values = {"zero_loss_share": sums["near_zero"] / records}
    names = _representations(sums)
    for name in names:
        prefix, score = _names_in_log(name)
        if len(names) > 1:
            values[f"{name}/loss"] = sums[f"{name}/loss"] / records
        if sums[f"{name}/positive_rank"]:
            values[f"{prefix}positive_{score}"] = sums[f"{name}/positive_score"] / records
        if sums[f"{name}/negatives"]:
            values[f"{prefix}negative_{score}"] = sums[f"{name}/negative_score"] / sums[f"{name}/negatives"]
            values[f"{prefix}positive_rank"] = sums[f"{name}/positive_rank"] / records
            values[f"{prefix}masked_negatives"] = sums[f"{name}/masked"]
    for side in ("query", "document"):
        if texts := sums.get(f"{side}_texts"):
            values[f"{side}_terms"] = sums[f"{side}_terms"] / texts
    return values


def _representations(sums: Mapping[str, float]) -> list[str]:
    """Those of the objective, in its order."""
    return [key.removesuffix("/negatives") for key in sums if key.endswith("/negatives")]


def _names_in_log(representation: str) -> tuple[str, str]:
    """What stands before a value's name, and the name of a score."""
    return ("", "cosine") if representation == DENSE else (f"{representation}/", "score")


def zero_loss_problem(sums: Mapping[str, float]) -> str | None:
    """What to do where almost every record of the first steps has no loss to learn from; None where all is well."""
    values = log_values(sums)
    if values.get("zero_loss_share", 0.0) < LEARNS_NOTHING:
        return None
    found = f"the loss is 0 for {values['zero_loss_share']:.0%} of {sums['records']:.0f} records from the start"
    name = _representations(sums)[0]
    if sums[f"{name}/positive_rank"] and not sums[f"{name}/negatives"]:
        return (
            f"{found}: no query has a negative; give the records `neg`, or set use_inbatch_neg to true and batch_size "
            "above 1"
        )
    if sums[f"{name}/negatives"]:
        prefix, score = _names_in_log(name)
        return (
            f"{found}: the {score} of positives is {values[f'{prefix}positive_{score}']:.2f}, of negatives "
            f"{values[f'{prefix}negative_{score}']:.2f}; mine harder negatives (rag-retrieval mine), or raise "
            "batch_size or temperature"
        )
    return f"{found}; check that the data have something to learn"


def same_direction_problem(sums: Mapping[str, float]) -> str | None:
    """What to do where negatives have a cosine near 1, as high as positives have; None where all is well."""
    values = log_values(sums)
    negative = values.get("negative_cosine", 0.0)
    if negative < SAME_DIRECTION or values["positive_cosine"] - negative > NO_DIFFERENCE:
        return None
    return (
        f"all vectors point the same way: the mean cosine of negatives is {negative:.4f}, of positives "
        f"{values['positive_cosine']:.4f}; lower lr or raise warmup_proportion, and check pooling and the base model"
    )


def no_terms_problem(sums: Mapping[str, float]) -> str | None:
    """What to do where no query, or no document, has a lexical weight above 0, below which ReLU has no gradient; None
    where all is well."""
    values = log_values(sums)
    without = [side for side in ("query", "document") if values.get(f"{side}_terms") == 0]
    if not without:
        return None
    return (
        f"no {' and no '.join(without)} has a lexical weight above 0, so that lexical weights learn nothing; begin "
        "anew with a lower lr or head_lr, another seed, or smaller lambda_query and lambda_document"
    )
