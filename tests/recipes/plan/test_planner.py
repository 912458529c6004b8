import io
import json

import pytest
from rich.console import Console

from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError
from recipes.layout import check_layout
from recipes.paths import CONF
from recipes.plan import planner
from recipes.plan.memory import Verdict
from recipes.plan.search import Sequences
from recipes.plan.shown import plan_page, plan_summary, plan_table
from recipes.schedule import lengths

LIMI = lengths.quantiles()
MODELS, CLUSTERS = (sorted(p.stem for p in (CONF / group).glob("*.yaml")) for group in ("model", "cluster"))
REAL = [m for m in MODELS if "tiny" not in m]


def sequences(*wanted):
    return Sequences(range(len(wanted)), wanted, "a test")


def planned(*words):
    return planner.make_plan(compose_recipe(list(words)), sequences(*LIMI))


# Why a shipped combination may not be planned; everything else must be.
REFUSED = {
    "does not fit": lambda model, cluster, experiment: cluster in ("h100x1", "h200x1", "h100x8", "h200x8"),
    "does not divide": lambda model, cluster, experiment: "64" not in cluster,
    "experiment=released is of": lambda model, cluster, experiment: experiment == "released" and "tiny" in model,
    "nothing is predicted": lambda model, cluster, experiment: cluster == "local",
    "reaches 8,192": lambda model, cluster, experiment: "tiny" in model,
}


@pytest.mark.run
@pytest.mark.parametrize("experiment", ["none", pytest.param("released", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("model", MODELS)
def test_every_shipped_combination_is_planned_or_refused_for_a_named_reason(model, cluster, experiment):
    try:
        overlay = [] if experiment == "none" else [f"experiment={experiment}"]
        made = planned(f"model={model}", f"cluster={cluster}", *overlay)
    except ConfigError as error:
        assert any(why in str(error) and allowed(model, cluster, experiment) for why, allowed in REFUSED.items()), error
        return
    check_layout(made.recipe)
    summary = plan_summary.summary(made, "none")
    assert json.loads(json.dumps(summary)) == summary
    assert summary["steps"]["count"] == (8 if experiment == "released" else 20)
    assert summary["time"]["seconds"] > 0
    risky = {("glm4.5", "a100x64"), ("glm4.5", "h200x32"), ("qwen3-32b", "h100x8")}
    tight = (model, cluster) in risky
    assert made.verdict is (Verdict.risky if tight else Verdict.fits) or experiment == "released"


@pytest.mark.parametrize("model", REAL)
def test_a_real_model_fits_its_default_cluster(model):
    made = planned(f"model={model}")
    assert made.verdict is Verdict.fits
    assert made.seen() == [4] * 78
    assert not [w for w in map(str, planner.warnings(made)) if "warm-up" in w or "over the cap" in w]


@pytest.mark.parametrize("model", REAL)
def test_the_released_recipe_is_what_its_scripts_do(model):
    made = planned(f"model={model}", "experiment=released", "cluster=h100x64")
    p = made.recipe.layout
    assert (p.tp, p.sp, p.max_tokens_per_gpu * p.cp) == (8, True, 131_072)
    assert len(made.steps) == 8 and {len(s.trajectories) for s in made.steps} == {64}
    said = "\n".join(map(str, planner.warnings(made)))
    assert "warm-up takes 7.2 of 8 steps (90%)" in said
    assert "1 of 78 sequences are over the cap of 131,072 tokens" in said
    assert "the first step's rate is zero" in said
    assert max(made.learning_rates()) < made.recipe.optim.lr == 1e-5
    assert sum(made.seen()) == 512, "8 batches of 64, 3.28 epochs of 156 rows"


ODD = {
    "tensor parallel": (
        ["model=qwen3-32b", "cluster=h100x64", "cluster.gpus_per_node=4", "layout=data_parallel", "layout.tp=8", "layout.sp=true",
         "layout.max_tokens_per_gpu=155648", "optim.batch_size=32"],
        "tp 8 spans nodes of 4 GPUs", "write layout.tp=4"),
    "pipeline": (
        ["model=qwen3-32b", "cluster=h100x8", "layout=data_parallel", "layout.pp=8", "layout.max_tokens_per_gpu=155648",
         "optim.batch_size=2"],
        "pipeline stages wait for ", "write optim.batch_size=4"),
    "host memory": (
        ["model=qwen3-4b", "cluster=h100x8", "cluster.host_memory_gb=120", "layout.optimizer_state=offloaded"],
        "a node's host needs ", "write layout.optimizer_state=resident"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_machines_make_odd_is_warned_of_with_the_override_that_mends_it(name):
    words, problem, fix = ODD[name]
    found = {w.name: w for w in planner.warnings(planned(*words))}
    assert found[name].problem.startswith(problem) and found[name].fix.startswith(fix)
    assert str(found[name]) == f"{found[name].problem}; {found[name].fix}"
    fixed = found[name].fix.removeprefix("write ").split()[0]
    kept = [w for w in words if w.partition("=")[0] != fixed.partition("=")[0]]
    again = {w.name: w for w in planner.warnings(planned(*kept, fixed))}
    assert name not in again or name == "pipeline"


def test_a_warm_up_says_the_highest_rate_and_its_step():
    """The rates are the plan's own, exactly."""
    made = planned("model=qwen3-4b", "optim.warmup_steps=30")
    (one,) = (w for w in planner.warnings(made) if w.name == "learning rate")
    rates = made.learning_rates()
    assert max(rates) == rates[19] == pytest.approx(1e-5 * 20 / 31)
    assert one.problem == (
        "warm-up takes 30 of 20 steps (150%), more than half: the highest rate is 6.45e-06, in step 20, and never optim.lr 1e-05"
    )
    assert one.fix == "write optim.warmup_steps=2"
    assert not [
        w for w in planner.warnings(planned("model=qwen3-4b", "optim.warmup_steps=10")) if w.name == "learning rate"
    ]


def test_glm_as_released_takes_some_800_gb_of_each_host():
    """FACTS of the release: eight nodes, optimizer on the host, slime's copy of the weights."""
    host = planned("model=glm4.5", "experiment=released").host
    assert 750e9 < host.optimizer + host.weights_copy < 850e9
    assert host.optimizer == pytest.approx(16 * 352.8e9 / 8, rel=0.05)


@pytest.mark.run
def test_the_released_recipe_stands_beside_ours_with_the_speed_up():
    made = planned("model=qwen3-32b")
    beside = planner.released(made)
    assert not isinstance(beside, str)
    summary = plan_summary.summary(made, beside)
    assert summary["released"]["speed_up"] > 1
    assert summary["layout"]["reasons"]["tp"].endswith("x the time")
    assert len(summary["alternatives"]) == 10
    assert "does not divide 8 ranks" in planner.released(planned("model=qwen3-8b"))
    few = planner.make_plan(compose_recipe(["model=glm4.5"]), sequences(*[15_000] * 9))
    assert "no batch of 64 from 18 rows" in planner.released(few)
    odd = planned("model=qwen3-32b", "cluster.nodes=12")
    assert "does not divide 96 ranks" in planner.released(odd)
    same = planned("model=qwen3-8b", "cluster.nodes=8")
    assert not isinstance(planner.released(same), str)


def test_a_model_that_cannot_fit_says_what_would():
    with pytest.raises(ConfigError, match=r"glm4\.5-air .* does not fit 8 x h100: .* it fits with cluster\.nodes=3"):
        planned("model=glm4.5-air", "cluster=h100x8")
    made = planned("model=qwen3-14b", "layout=data_parallel", "layout.tp=8", "layout.max_tokens_per_gpu=155648")
    with pytest.raises(
        ConfigError,
        match=r"does not fit: the fullest rank, of stage 0, needs .*layout=auto and no other layout\. words; it finds tp",
    ):
        planner.refuse_too_large(made)


def test_what_the_command_line_fixes_stays():
    made = planned("model=qwen3-32b", "layout.tp=2", "layout.pp=4")
    assert (made.recipe.layout.tp, made.recipe.layout.pp) == (2, 4)


def test_nothing_is_predicted_for_a_cpu():
    made = planner.make_plan(compose_recipe([]), sequences(*[500] * 20))
    assert made.clock is None and made.step_seconds == []
    assert plan_summary.summary(made, "none")["time"] is None
    assert made.verdict is Verdict.fits


@pytest.mark.parametrize("words", [["model=glm4.5"], ["model=qwen3-8b", "gpu.hour_price=2.5"]])
def test_table_and_page_show_the_plan(words):
    made = planned(*words)
    summary = plan_summary.summary(made, planner.released(made))
    console = Console(width=100, file=io.StringIO())
    for part in plan_table.plan_tables(summary):
        console.print(part)
    text = console.file.getvalue()
    for said in (
        "fits",
        "Layout",
        "Memory of a rank",
        "learning rate by step",
        "The best layouts",
        "released",
        "calibrated on",
    ):
        assert said in text
    assert ("gpu.hour_price" in text) is (words[-1] == "gpu.hour_price=2.5")
    page = plan_page.render(summary)
    assert page.count("<img") == 3 and "</html>" in page
    assert f"The check at the end: {summary['server']}." in page
    assert summary["model"]["name"] in page
