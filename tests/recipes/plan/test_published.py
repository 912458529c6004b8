import re

from recipes.compose.recipe import compose_recipe
from recipes.paths import REPO
from recipes.plan import published


def test_the_model_is_calibrated_on_one_figure_and_judged_by_another():
    found = published.calibration(compose_recipe(["cluster=h100x8", "engine=slime", "layout=data_parallel"]))
    fitted, held, unknown = published.figures()
    assert found.factor * published.predicted(fitted) == fitted.tflops
    error = found.factor * published.predicted(held) / held.tflops - 1
    assert f"{error:+.0%} on {held.name}" in found.text
    assert abs(error) < 0.25
    assert unknown.recipe is None and "cannot be compared" in published.published_rows()[2][3]


def test_no_figure_is_no_calibration():
    h200, a100 = (
        published.calibration(compose_recipe([f"cluster={c}", "engine=slime", "layout=data_parallel"]))
        for c in ("h200x8", "a100x64")
    )
    assert h200.text.startswith("uncalibrated") and a100.text.startswith("uncalibrated")
    assert h200.factor < 1.0 == a100.factor


def test_the_embedded_engine_runs_at_the_rates_of_its_own_measurement():
    for cluster, said in (
        ("h200x1", "rates of one H200, where"),
        ("h100x8", "rates of one H200, whose chip is the same"),
    ):
        words = [f"cluster={cluster}", "engine=megatron", "layout=data_parallel"]
        found = published.calibration(compose_recipe(words))
        assert found.factor == 1.0 and found.text.startswith(said)


def test_its_error_is_that_of_the_measured_rows():
    table = (REPO / "launch" / "bench" / "GPU.md").read_text(encoding="utf-8")
    off = [int(found) for found in re.findall(r"^\| [\d.]+B, .* \| ([+-]\d+)% \|$", table, re.M)]
    text = published.calibration(compose_recipe(["cluster=h200x1", "engine=megatron", "layout=data_parallel"])).text
    assert len(off) >= 3 and f"steps were {max(off)}% longer to {-min(off)}% shorter than measured" in text
