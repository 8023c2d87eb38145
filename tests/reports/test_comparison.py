import math

import numpy as np
import pytest

from clm_owt.reports.comparison import compare, paired_difference


def test_the_interval_is_student_s_of_the_differences():
    """By hand: differences 1, 2, 3, 4, 5; standard error sqrt(2.5 / 5); t of 4 degrees of freedom 2.7764."""
    found = paired_difference([11, 22, 33, 44, 55], [10, 20, 30, 40, 50])
    assert found.mean == 3.0
    assert (found.low, found.high) == pytest.approx(
        (3 - 2.7764 * math.sqrt(0.5), 3 + 2.7764 * math.sqrt(0.5)), abs=1e-4
    )
    assert found.beyond_chance


def test_what_all_seeds_share_does_not_widen_it():
    hard_seed = [0.0, 5.0, 10.0]
    found = paired_difference([4.1 + s for s in hard_seed], [4.0 + s for s in hard_seed])
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_one_seed_tells_nothing():
    found = paired_difference([1.0], [2.0])
    assert not found.beyond_chance
    assert str(found) == "-1.0000, of one seed: cannot be told from chance"
    with pytest.raises(ValueError, match="no seeds"):
        paired_difference([], [])


def test_what_is_not_beyond_chance_is_said():
    assert str(paired_difference([4.1, 4.0], [4.0, 4.1])).endswith("cannot be told from chance")
    assert str(paired_difference([4.1, 4.11], [4.0, 4.0])) == "+0.1050 [+0.0415, +0.1685]"


def test_a_difference_of_five_deviations_is_found():
    random = np.random.default_rng(0)
    losses = 4.0 + random.normal(0, 0.02, 5) + random.normal(0, 0.01, (3, 5)) + np.array([[0.0], [0.0], [0.05]])
    found = compare({setting: dict(enumerate(row)) for setting, row in enumerate(losses)}, reference=0)
    assert (found[1].beyond_chance, found[2].beyond_chance) == (False, True)


def test_only_seeds_that_both_have_are_paired():
    found = compare({"a": {1: 4.0, 2: 5.0, 3: 4.0}, "b": {2: 5.5, 3: 4.5, 4: 9.0}, "c": {7: 1.0}}, reference="a")
    assert found.keys() == {"b"}
    assert (found["b"].mean, found["b"].pairs) == (0.5, 2)
