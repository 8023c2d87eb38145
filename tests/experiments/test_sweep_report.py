import dataclasses
import functools
import math

import numpy as np
import pytest

from clm_owt.experiments.sweep_file import SweptRun
from clm_owt.experiments.sweep_report import comparison_row, configurations
from clm_owt.recipe import Recipe

RECIPE = Recipe(
    dataset_name="python-docs",
    train_tokenizer_vocab_size=300,
    effective_batch_size=1,
    learning_rate=1e-3,
    warmup_steps=1,
    max_steps=10,
)


@functools.cache
def with_seed(seed: int) -> Recipe:
    return dataclasses.replace(RECIPE, seed=seed)


def swept(weight: float, seed: int, loss: float, status: str = "finished") -> SweptRun:
    options = {"seed": seed, "penalty_weight": weight}
    return SweptRun(options, [], with_seed(seed), status, {"ce_loss": loss})


def rows(runs: list[SweptRun]) -> dict[str, list[str]]:
    """The rows of the table, by the weight."""
    return {row[0]: row[1:] for row in (comparison_row(["penalty_weight"], c) for c in configurations(runs))}


def test_a_row_is_the_mean_the_deviation_and_the_paired_difference_to_the_first_value():
    runs = [swept(0, 1, 4.0), swept(0.1, 1, 4.1), swept(0, 2, 5.0), swept(0.1, 2, 5.1), swept(0, 3, 4.5)]
    runs.append(swept(0.1, 3, 4.7))
    found = rows(runs)
    assert found["0"] == ["3", "4.5000", "0.5000", "", "", "", "reference"]
    # Differences 0.1, 0.1, 0.2: Student's t of 2 degrees of freedom 4.3027, standard error 0.0333.
    assert found["0.1"] == ["3", "4.6333", "0.5033", "+0.1333", "-0.0101", "+0.2768", "cannot be told from chance"]


def test_a_seed_that_did_not_finish_leaves_its_pair_out_and_is_said():
    runs = [swept(w, s, 4 + w + s) for w in (0, 0.1) for s in (1, 2, 3)]
    runs[1] = swept(0, 2, 2.0, "failed (1)")
    runs[5] = swept(0.1, 3, math.inf)
    found = rows(runs)
    assert found["0"] == ["2", "6.0000", "1.4142", "", "", "", "reference; without seed 2 (failed (1))"]
    assert found["0.1"][3:] == ["+0.1000", "", "", "cannot be told from chance; without seed 3 (not finite)"]
    none_of_both = rows([swept(0, 1, 4.0), swept(0.1, 2, 4.0)])["0.1"]
    assert none_of_both[3:] == ["", "", "", "no seed in common with the reference"]


def test_the_mean_of_fewer_seeds_is_not_the_best():
    """A configuration whose harder seeds failed has the mean of the easier ones."""
    runs = [swept(w, s, 4 + w + s) for w in (0, 0.1) for s in (1, 2, 3)]
    runs[5] = swept(0.1, 3, 0.0, "failed (1)")
    best = min(configurations(runs), key=lambda configuration: configuration.rank)
    assert best.options == {"penalty_weight": 0}


@pytest.mark.parametrize(("settings", "seeds"), [(2, 5), (5, 5), (5, 3)])
def test_of_sweeps_of_equal_configurations_at_most_one_in_twenty_is_called_different(settings, seeds):
    """Of 2,000 simulated ones, with what a seed shares and what is each run's own, within the binomial's error."""
    random, sweeps, called = np.random.default_rng(0), 2000, 0
    for _ in range(sweeps):
        losses = 4.0 + random.normal(0, 0.02, seeds) + random.normal(0, 0.01, (settings, seeds))
        runs = [swept(weight, seed, loss) for weight, row in enumerate(losses) for seed, loss in enumerate(row)]
        called += any(verdict in ("lower", "higher") for *_, verdict in rows(runs).values())
    assert called / sweeps < 0.05 + 4 * math.sqrt(0.05 * 0.95 / sweeps)
    assert called / sweeps > 0.01  # and it is no test that never calls anything
