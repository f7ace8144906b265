"""How much each of a round's samples counts in its training, learned from the labelled feedback pictures."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from manifests.schema import WEIGHTS, to_table
from manifests.workspace import Workspace, round_file
from training.weighting import Labelled, labelled, learn
from workflows import history
from workflows.console import progress, say
from workflows.probing import prepare
from workflows.stages import Round

TABLE = "weights.parquet"


def sample_weights(space: Workspace, round_: Round, *, write: bool) -> dict[str, float]:
    """By sample id, the weights of a round: those that are stored (a veto, or one taken back, removes them),
    or learned now; ``write`` stores them.

    Samples that the proxy does not look at (beyond 600 of a round, or features of another backbone) are not
    among them and count 1.
    """
    name = round_file(round_.number, TABLE)
    if space.exists(name):
        return {row["sample_id"]: row["weight"] for row in space.read_table(name).to_pylist()}
    with progress(f"round {round_.number}: features to weigh samples by", None, "pictures") as advance:
        ground = prepare(space, round_, advance, squares=True)
    pictures: list[Labelled] = []
    for category in ground.images:
        pictures += labelled(category, ground.judged[category], ground.evidence.scale)
    weights = learn(ground.evidence, pictures)
    ids = [recipe["sample_id"] for recipe in ground.recipes]
    found = dict(zip(ids, weights.tolist(), strict=True))
    if write:
        rows = [{"round": round_.number, "sample_id": key, "weight": value} for key, value in found.items()]
        space.write_table(name, to_table(rows, WEIGHTS))
        means = mean_weights(ground.generators, weights)
        shown = {key: f"{value:.3f}" for key, value in means.items()}
        history.remember(space, round_.number, "weight", shown)
        words = _in_words(means, weights)
        history.remember(space, round_.number, "weighing", {"result": words})
        say(f"round {round_.number}: {words}")
    return found


def mean_weights(generators: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """By generator, sorted by name."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, weight in zip(generators.tolist(), weights.tolist(), strict=True):
        found[name].append(weight)
    return {name: float(np.mean(found[name])) for name in sorted(found)}


def _in_words(means: dict[str, float], weights: np.ndarray) -> str:
    if (weights == 1).all():
        return "no weights do better than equal ones on parts left out: every sample counts the same"
    return "mean weight by generator: " + ", ".join(f"{name} {value:.2f}" for name, value in means.items())
