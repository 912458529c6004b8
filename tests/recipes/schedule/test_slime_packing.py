import pytest

from recipes.errors import ConfigError
from recipes.schedule.slime_packing import divided, first_fit


def test_first_fit_keeps_the_order_and_the_cap_but_for_one_that_is_longer():
    assert first_fit([40, 70, 50, 120, 10], 100) == [[0, 2, 4], [1], [3]]


def test_the_fullest_batches_are_halved_until_their_number_divides():
    batches = divided([[0, 1, 2], [3]], [30, 20, 10, 50], 4)
    assert sorted(map(sorted, batches)) == [[0], [1], [2], [3]]
    assert divided([[0], [1]], [1, 1], 2) == [[0], [1]]


def test_a_step_that_cannot_be_dealt_is_refused():
    with pytest.raises(ConfigError, match="2 sequences cannot be dealt to 3"):
        divided([[0], [1]], [1, 1], 3)
