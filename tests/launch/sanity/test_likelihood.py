"""Held-out loss by a server: every supervised token is asked for, and the figures made of the answers say what they should."""

import base64
import itertools
import json
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from launch.checks import Outcome
from launch.sanity.likelihood import bootstrap, retention
from launch.sanity.likelihood import likelihood_plot as likelihood_page
from launch.sanity.likelihood.likelihood_checks import beside_base, beside_trainer
from launch.sanity.likelihood.scores import Scores, measure_likelihood
from launch.serving import weight_swap
from launch.serving.server import Server
from recipes.compose.recipe import compose_recipe
from recipes.errors import ConfigError, SanityError
from tests.launch.support import recipe_of

RECIPE = compose_recipe(["sanity.max_above_base=0"])


class Stub:
    """Answers as SGLang does; the loss of a token is a hundredth of its position. `change` spoils the entries."""

    def __init__(self, cache=4096, change=lambda at, entry: entry, wait=0.0, fails_at=None):
        self.info = {"dtype": "float32", "max_total_num_tokens": cache, "max_req_input_len": cache - 6}
        self.change, self.wait, self.fails_at = change, wait, fails_at
        self.lock, self.asked, self.now, self.most = threading.Lock(), [], [], 0

    def get(self, path):
        assert path == "/server_info"
        return self.info

    def post(self, path, body):
        assert path == "/generate"
        assert body["return_logprob"]
        assert body["sampling_params"]["max_new_tokens"] == 0
        tokens, start = body["input_ids"], body["logprob_start_len"]
        with self.lock:
            self.asked.append(body)
            self.now.append(len(tokens))
            self.most = max(self.most, sum(self.now))
            if self.fails_at == len(self.asked):
                raise SanityError("SGLang answered 500 to /generate")
        time.sleep(self.wait)
        with self.lock:
            self.now.remove(len(tokens))
        entries = [[None if at == start else -at / 100, tokens[at], None] for at in range(start, len(tokens))]
        return {"meta_info": {"input_token_logprobs": [self.change(start + n, e) for n, e in enumerate(entries)]}}


@pytest.fixture(scope="module")
def heldout(root):
    return recipe_of(root, "model=qwen3-tiny")[2]


@pytest.fixture(scope="module")
def training(root):
    return recipe_of(root, "model=qwen3-tiny")[1]


def checks(trained, base, trainers, recipe):
    alone = retention.compare(trained, None).whole
    beside = beside_base(retention.compare(trained, base), base, recipe) if base else []
    return [beside_trainer(trained, alone, trainers, recipe), *beside]


def outcomes(done):
    return {c.name: c.outcome for c in done}


def test_every_supervised_token_is_scored_once_at_its_place(root):
    _, training, _ = recipe_of(root, "model=qwen3-tiny", "data.max_tokens=1000", "data.too_long=split")
    stub, seen = Stub(), []
    scores = measure_likelihood(stub, training, lambda: seen.append(1))
    assert len(seen) == len(stub.asked) == len(training.ids)
    assert len(scores.nll) == sum(training.supervised)
    assert np.array_equal(scores.nll, scores.position / 100), "each loss is of the token at its own position"
    places = list(zip(scores.sequence, scores.position, strict=True))
    assert places == [(row, p) for row in range(len(training.ids)) for a, b in training.spans(row) for p in range(a, b)]
    for number in set(training.trajectory):
        turns = scores.turn[scores.trajectory == number]
        spans = [s for row, t in enumerate(training.trajectory) if t == number for s in training.spans(row)]
        assert turns.tolist() == [n for n, (a, b) in enumerate(spans, 1) for _ in range(a, b)]
    assert any(training.trajectory.count(t) > 1 for t in training.trajectory), "a trajectory of several sequences"
    rows = {tuple(training.tokens(r)[: training.spans(r)[-1][1]].tolist()): r for r in range(len(training.ids))}
    for body in stub.asked:
        assert body["logprob_start_len"] == training.spans(rows[tuple(body["input_ids"])])[0][0] - 1


@pytest.mark.parametrize("cache", [1850, 2500, 1 << 20])
def test_no_more_tokens_are_in_flight_than_the_cache_holds_and_several_sequences_where_they_fit(training, cache):
    stub = Stub(cache, wait=0.02)
    measure_likelihood(stub, training, lambda: None)
    assert max(training.lengths) < stub.most <= cache


def test_a_sequence_longer_than_the_server_takes_is_named_and_nothing_is_asked(heldout):
    longest = max(heldout.lengths)
    where = heldout.ids[heldout.lengths.index(longest)]
    stub = Stub(longest + 6)
    with pytest.raises(
        SanityError, match=f"^1 sequences are .* The longest, {where}, sequence 0, has {longest} up to"
    ) as error:
        measure_likelihood(stub, heldout, lambda: None)
    assert not stub.asked
    assert f"--context-length {longest + 7} " in str(error.value)
    assert f"data.max_tokens={longest - 1} data.too_long=split" in str(error.value)
    measure_likelihood(Stub(longest + 7), heldout, lambda: None)


def test_an_error_ends_it_at_once(training):
    stub = Stub(1850, wait=0.3, fails_at=2)
    with pytest.raises(SanityError, match="500"):
        measure_likelihood(stub, training, lambda: None)
    time.sleep(0.5)
    assert len(stub.asked) <= 4, "what was waiting is not asked any more"


@pytest.mark.parametrize(
    "change",
    [lambda at, entry: [entry[0], entry[1] + 1, None], lambda at, entry: [None, 0, None] if at == 400 else entry],
)
def test_scores_of_other_tokens_than_were_sent_are_refused(heldout, change):
    with pytest.raises(SanityError, match="which are not the"):
        measure_likelihood(Stub(change=change), heldout, lambda: None)


@pytest.mark.parametrize("number", [None, math.nan, -math.inf])
@pytest.mark.parametrize("spoiled", ["trained", "base"])
def test_a_token_without_a_score_fails_one_check_and_is_named(heldout, number, spoiled):
    at = heldout.spans(1)[1][0]
    bad = measure_likelihood(Stub(change=lambda n, e: [number, *e[1:]] if n == at else e), heldout, lambda: None)
    good = measure_likelihood(Stub(), heldout, lambda: None)
    trained, base = (bad, good) if spoiled == "trained" else (good, bad)
    done = checks(trained, base, float(good.nll.mean()), RECIPE)
    failed = [c for c in done if c.outcome is Outcome.failed]
    assert [c.name for c in failed] == ["held-out loss" if spoiled == "trained" else "held-out loss beside the base"]
    first = min(r for r in range(len(heldout.ids)) if any(a <= at < b for a, b in heldout.spans(r)))
    assert f"{heldout.ids[first]}, sequence 0, turn " in failed[0].detail
    assert failed[0].detail.endswith(f"token {at}")
    written = retention.as_json(retention.compare(trained, base))
    json.dumps(written, allow_nan=False)
    assert sum(written["without_a_score"].values()) == len(bad.lost) > 0
    assert written["whole"]["tokens"] == len(good.nll) - len(bad.lost)


def test_no_score_at_all_fails_and_is_still_written(heldout):
    bad = measure_likelihood(Stub(change=lambda n, e: [None, *e[1:]]), heldout, lambda: None)
    done = checks(bad, measure_likelihood(Stub(), heldout, lambda: None), 1.0, RECIPE)
    assert outcomes(done)["held-out loss"] is outcomes(done)["held-out loss beside the base"] is Outcome.failed
    assert likelihood_page.plot(retention.as_json(retention.compare(bad, bad))) == ""


def drawn(rng, trajectories, longest=4000, sigma=1.0, late=0.0, shift=0.0, spread=0.3, own=0.2):
    """Scores by two models of trajectories of very different lengths. spread, own: what a trajectory's loss differs by, for
    both models and for each; late: what the trained weights lose beyond 2k; shift: what they lose everywhere."""
    columns = {"trajectory": [], "turn": [], "position": [], "trained": [], "base": []}
    for t in range(trajectories):
        tokens = int(np.clip(np.exp(rng.normal(np.log(longest / 8), sigma)), 20, longest)) // 4
        position = 4 * np.arange(tokens)
        base = rng.exponential(1.0, tokens) + rng.normal(0, spread)
        trained = base + rng.normal(0, 0.3, tokens) + rng.normal(shift, own) + late * (position >= 2048)
        for name, values in [("trajectory", np.full(tokens, t)), ("turn", 1 + np.arange(tokens) // 50),
                             ("position", position), ("trained", trained), ("base", base)]:  # fmt: skip
            columns[name].append(values)
    c = {name: np.concatenate(values) for name, values in columns.items()}
    data = SimpleNamespace(ids=[f"t{t}" for t in range(trajectories)], segments=[0] * trajectories)
    at = (c["trajectory"], c["trajectory"], c["turn"], c["position"])
    return Scores(data, True, c["trained"], *at), Scores(data, True, c["base"], *at)


def test_the_mean_is_token_weighted_and_parts_hold_every_token_once():
    trained, base = drawn(np.random.default_rng(3), 30, longest=600_000, sigma=2.0)
    found = retention.compare(trained, base)
    assert found.whole.trained.mean == pytest.approx(trained.nll.sum() / len(trained.nll), rel=1e-12)
    assert found.whole.difference.mean == pytest.approx((trained.nll - base.nll).mean(), rel=1e-9)
    for parts, at in ((found.turns, trained.turn), (found.positions, trained.position)):
        assert sum(p.tokens for p in parts) == len(trained.nll)
        for p in parts:
            inside = (at >= p.first) & (at < (math.inf if p.end is None else p.end))
            assert p.tokens == inside.sum()
            assert p.trajectories == len(set(trained.trajectory[inside]))
            assert p.trained.mean == pytest.approx(trained.nll[inside].mean(), rel=1e-9)
            assert p.base.mean == pytest.approx(base.nll[inside].mean(), rel=1e-9)
    names = [p.name for p in found.positions]
    assert names == [
        "0–1k",
        "1k–2k",
        "2k–4k",
        "4k–8k",
        "8k–16k",
        "16k–32k",
        "32k–64k",
        "64k–128k",
        "128k–152k",
        "152k and more",
    ]
    assert [p.name for p in found.turns][-5:] == ["9–16", "17–32", "33–64", "65–128", "129 and more"]


def test_the_same_scores_give_the_same_intervals():
    pair = drawn(np.random.default_rng(4), 9)
    assert retention.as_json(retention.compare(*pair)) == retention.as_json(retention.compare(*pair))


@pytest.mark.run
@pytest.mark.parametrize(("trajectories", "level"), [(5, 0.95), (12, 0.95), (60, 0.95), (5, 0.994), (12, 0.994)])
def test_the_interval_covers_the_truth_as_often_as_it_says(trajectories, level):
    """Quantiles of the draws themselves cover it in 82% and 89% of the first and the fourth."""
    rng, trials = np.random.default_rng(5), 500
    covered = 0
    for _ in range(trials):
        tokens = np.ceil(np.exp(rng.normal(7, 0.8, trajectories)))
        truth = rng.normal(0, 1, trajectories) + rng.exponential(1, trajectories) - 1
        found = bootstrap.resampled((tokens * truth)[:, None], tokens)[0].interval(level)
        covered += found.low <= 0 <= found.high
    error = math.sqrt(level * (1 - level) / trials)
    assert covered / trials > level - max(3 * error, 0.015), covered / trials


def test_one_trajectory_has_no_interval_and_the_checks_say_so():
    trained, base = drawn(np.random.default_rng(6), 1, shift=1.0)
    found = retention.compare(trained, base)
    assert found.whole.difference.low is found.whole.difference.high is None
    done = checks(trained, base, None, RECIPE)
    assert {c.outcome for c in done} == {Outcome.passed}
    assert "no interval for one trajectory" in done[0].detail
    assert done[1].detail == "difference: no interval for one trajectory"
    assert likelihood_page.plot(retention.as_json(retention.compare(trained, base)))


def test_pairs_tell_what_two_unpaired_intervals_cannot():
    trained, base = drawn(np.random.default_rng(7), 30, shift=-0.25, spread=1.0)
    whole = retention.compare(trained, base).whole
    assert whole.difference.high < 0
    assert whole.trained.high > whole.base.low, "apart, the intervals overlap"
    assert (whole.difference.high - whole.difference.low) < 0.5 * (whole.trained.high - whole.trained.low)


def test_student_s_quantiles():
    for share, freedom, table in [(0.975, 1, 12.706), (0.975, 4, 2.7764), (0.995, 9, 3.2498), (0.975, 1e6, 1.9600)]:
        assert bootstrap.student(share, freedom) == pytest.approx(table, rel=1e-3)
        assert bootstrap.student(1 - share, freedom) == pytest.approx(-table, rel=1e-3)


def test_the_trainer_s_figure_is_held_to_its_tolerance():
    trained, _ = drawn(np.random.default_rng(8), 8)
    mean = float(trained.nll.mean())
    bf16 = compose_recipe(["engine.dtype=bf16"])
    served_bf16 = Scores(
        trained.data, False, *(getattr(trained, n) for n in ("nll", "sequence", "trajectory", "turn", "position"))
    )
    for scores, recipe, off, outcome in [
        (trained, RECIPE, 0.0009, Outcome.passed),
        (trained, RECIPE, 0.0011, Outcome.failed),
        (trained, bf16, 0.011, Outcome.passed),
        (served_bf16, RECIPE, 0.011, Outcome.passed),
        (served_bf16, bf16, 0.013, Outcome.failed),
        (trained, RECIPE, math.nan, Outcome.failed),
    ]:
        (check,) = checks(scores, None, mean + off, recipe)
        assert check.outcome is outcome, check
    (check,) = checks(trained, None, None, RECIPE)
    assert check.outcome is Outcome.passed
    assert "not known" in check.limit


def test_what_is_worse_than_the_base_warns_by_the_recipe_s_limit():
    trained, base = drawn(np.random.default_rng(9), 40, shift=0.3)
    assert outcomes(checks(trained, base, None, RECIPE)) == {
        "held-out loss": Outcome.passed,
        "held-out loss beside the base": Outcome.warned,
        "loss by turn": Outcome.passed,
        "loss by position": Outcome.passed,
    }
    lenient = compose_recipe(["sanity.max_above_base=0.5"])
    assert outcomes(checks(trained, base, None, lenient))["held-out loss beside the base"] is Outcome.passed
    with pytest.raises(ConfigError, match="sanity.max_above_base=-1.0 is below 0"):
        compose_recipe(["sanity.max_above_base=-1"])


def test_what_was_lost_late_is_named_while_the_whole_is_better():
    trained, base = drawn(np.random.default_rng(10), 40, longest=32_000, sigma=0.4, shift=-1.2, late=1.6)
    found = {c.name: c for c in checks(trained, base, None, RECIPE)}
    assert found["held-out loss beside the base"].outcome is Outcome.passed
    late = found["loss by position"]
    assert late.outcome is Outcome.warned
    assert late.detail.startswith("2k–4k: ")
    assert "1k–2k" not in late.detail
    assert found["loss by turn"].outcome is Outcome.warned
    assert found["loss by turn"].detail.startswith("17–32: ")


@pytest.mark.slow
def test_good_checkpoints_seldom_warn_by_chance():
    """Nowhere better or worse in truth: each check may warn of 1 in 40."""
    rng, warned = np.random.default_rng(11), dict.fromkeys(["turn", "position"], 0)
    for number in range(120):
        found = checks(*drawn(rng, (6, 12, 24)[number % 3]), None, RECIPE)
        for name in warned:
            warned[name] += outcomes(found)[f"loss by {name}"] is Outcome.warned
    assert max(warned.values()) <= 8, warned


def test_the_plot_is_a_picture_of_both():
    pair = drawn(np.random.default_rng(12), 30, longest=155_648, sigma=2.0)
    for written in (retention.as_json(retention.compare(*pair)), retention.as_json(retention.compare(pair[0], None))):
        image = likelihood_page.plot(json.loads(json.dumps(written)))
        assert base64.b64decode(image.split("base64,")[1].split('"')[0]).startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3-tiny", "glm4.5-tiny"])
def test_scores_of_the_real_server_are_those_of_transformers_for_either_weights(root, model, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    recipe, _, heldout = recipe_of(root, f"model={model}")
    other, _, _ = recipe_of(root, f"model={model}", "seed=1")
    scores = []
    with Server(recipe, Path(recipe.model.checkpoint), tmp_path / "log", True) as server:
        scores.append(measure_likelihood(server, heldout, lambda: None))
        weight_swap.load(server, other.model.checkpoint)
        scores.append(measure_likelihood(server, heldout, lambda: None))
        weight_swap.load(server, recipe.model.checkpoint)
        scores.append(measure_likelihood(server, heldout, lambda: None))
    assert scores[0].fp32
    assert np.abs(scores[2].nll - scores[0].nll).max() < 1e-4, (
        "the weights came back, and nothing of the other's cache is left"
    )
    assert np.abs(scores[1].nll - scores[0].nll).max() > 0.01
    for found, folder in zip(scores, (recipe.model.checkpoint, other.model.checkpoint), strict=False):
        net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        expected = []
        for row in range(len(heldout.ids)):
            tokens = torch.tensor(heldout.tokens(row).tolist())[None]
            with torch.no_grad():
                logprobs = net(tokens).logits[0].log_softmax(-1)
            places = list(itertools.chain.from_iterable(range(a, b) for a, b in heldout.spans(row)))
            expected += [-logprobs[p - 1, tokens[0, p]].item() for p in places]
        assert np.abs(found.nll - np.array(expected)).max() < 1e-4
    json.dumps(retention.as_json(retention.compare(scores[1], scores[0])), allow_nan=False)
    same = outcomes(checks(scores[2], scores[0], float(scores[0].nll.mean()), recipe))
    assert set(same.values()) == {Outcome.passed}, same
