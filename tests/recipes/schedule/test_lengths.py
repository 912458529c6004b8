from recipes.schedule import lengths


def test_quantiles_have_limis_ends_and_mean():
    found = lengths.quantiles()
    assert (len(found), found[0], found[-1]) == (78, 13_000, 152_000)
    assert found == sorted(found)
    assert abs(sum(found) / len(found) / 42_400 - 1) < 0.02, "42.4k on average (arXiv 2509.17567)"


def test_drawn_lengths_are_the_seeds():
    assert lengths.drawn(50, 1) == lengths.drawn(50, 1) != lengths.drawn(50, 2)
    assert all(13_000 <= n <= 152_000 for n in lengths.drawn(500, 0))
