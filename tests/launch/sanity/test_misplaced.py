"""What the base alone tells of a tensor's place: surely right, surely wrong, or nothing, however far and however training moved it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.checks import Outcome
from launch.sanity.files import misplaced
from launch.sanity.tensors.bands import Bands, bands
from launch.sanity.tensors.compare_worker import BaseDifference, Seen
from launch.sanity.tensors.prints import Taker, Wanted
from recipes.compose.recipe import compose_recipe

ROWS, COLUMNS, HEAD = 48, 32, 12
NAMES = [f"model.layers.{n}.self_attn.{c}_proj.weight" for n in range(3) for c in "qk"]


def of_head(name):
    return Bands(ROWS // HEAD, 0, "head", name.replace("q_", "qkv_").replace("k_", "qkv_"), HEAD, HEAD)


def seen(pairs, divide=of_head, most=1 << 12):
    """What a worker would have seen of {name: (export's, base's)}, which come in blocks."""
    found = []
    for name, (new, base) in pairs.items():
        taker, row = Taker(tuple(new.shape), Wanted(divide(name), most)), math.prod(new.shape[1:])
        for start in range(0, len(new), 7):
            taker.add(new[start : start + 7].flatten(), base[start : start + 7].flatten(), start * row)
        beside = BaseDifference(taker.prints(), equal=bool(torch.equal(new, base)))
        found.append(Seen(name, tuple(new.shape), base=beside))
    return found


def trained(seed, far, rank):
    """{name: (export's, base's)} after a training that moves each by `far` times its size, by a matrix of this rank."""
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for name in NAMES:
        base = 0.02 * torch.randn(ROWS, COLUMNS, generator=g)
        moved = torch.randn(ROWS, rank, generator=g) @ torch.randn(rank, COLUMNS, generator=g)
        pairs[name] = base + far * moved * base.norm() / moved.norm(), base
    return pairs


def swapped(pairs):
    one, other = NAMES[0], NAMES[2]
    return pairs | {one: (pairs[other][0], pairs[one][1]), other: (pairs[one][0], pairs[other][1])}


def changed(pairs, name, change):
    return pairs | {name: (change(pairs[name][0]), pairs[name][1])}


far, rank = st.floats(-3, 3).map(lambda power: 10.0**power), st.sampled_from([1, 3, 32])
WRONG = {
    "another layer's": swapped,
    "heads in another order": lambda p: changed(p, NAMES[0], lambda t: t.roll(HEAD, 0)),
    "two heads in each other's place": lambda p: changed(
        p, NAMES[0], lambda t: torch.cat([t[HEAD : 2 * HEAD], t[:HEAD], t[2 * HEAD :]])
    ),
    "pairs side by side": lambda p: changed(
        p, NAMES[0], lambda t: t.view(-1, 2, HEAD // 2, COLUMNS).transpose(1, 2).reshape(t.shape)
    ),
    "pairs apart": lambda p: changed(
        p, NAMES[0], lambda t: t.view(-1, HEAD // 2, 2, COLUMNS).transpose(1, 2).reshape(t.shape)
    ),
}  # fmt: skip


@settings(deadline=None)
@given(st.integers(0, 2**31), far, rank)
def test_a_good_export_is_never_named(seed, far, rank):
    found = misplaced.find(seen(trained(seed, far, rank)))
    assert not any(f.fault for f in found)
    if far <= 1:
        assert all(f.ordered for f in found), "as far as it was large, and still told"


@settings(deadline=None)
@given(st.integers(0, 2**31), far, rank, st.sampled_from([*WRONG]))
def test_what_is_in_another_place_is_never_taken_for_good(seed, far, rank, what):
    found = {f.name: f for f in misplaced.find(seen(WRONG[what](trained(seed, far, rank))))}
    assert not found[NAMES[0]].ordered
    assert misplaced.placement([*found.values()], ()).outcome is not Outcome.passed
    if far <= 1:
        assert found[NAMES[0]].fault, "as far as it was large, and still found"
    assert not any(found[n].fault for n in NAMES[4:]), "of another layer, and good"


def test_tensors_that_are_alike_in_the_base_cannot_be_told_unless_they_did_not_move():
    names = [f"model.layers.{n}.input_layernorm.weight" for n in range(3)]
    moved = {n: (torch.ones(64) + 0.01 * torch.randn(64), torch.ones(64)) for n in names[:2]}
    found = misplaced.find(
        seen(moved | {names[2]: (torch.ones(64), torch.ones(64))}, lambda name: Bands(1, 0, "", name))
    )
    assert [f.placed for f in found] == [False, False, True] and not any(f.fault for f in found)
    check = misplaced.placement(found, ())
    assert check.outcome is Outcome.warned
    assert check.figure == "1 of 3 confirmed by the base, 1 of them with the order of their parts; 2 cannot be told"
    assert check.detail == (
        "model.layers.0.input_layernorm.weight has a cosine of 1.000 with its own base tensor, and of 1.000 with the most similar "
        "other one: its position cannot be told; and 1 more"
    )
    check = misplaced.placement(found, names[:2])
    assert check.outcome is Outcome.passed and check.figure.endswith("; 2 more by the trainer's checkpoint")


def test_a_few_places_of_a_large_tensor_do():
    g = torch.Generator().manual_seed(0)
    base = {n: torch.randn(512, 512, generator=g) for n in NAMES}
    pairs = {n: (t + 0.01 * torch.randn(512, 512, generator=g), t) for n, t in base.items()}
    good = misplaced.find(seen(pairs, lambda name: Bands(8, 0, "head", name), most=256))
    assert all(f.ordered for f in good)
    wrong = changed(pairs, NAMES[1], lambda t: t.T.contiguous())
    found = {f.name: f for f in misplaced.find(seen(wrong, lambda name: Bands(8, 0, "head", name), most=256))}
    assert found[NAMES[1]].fault == f"{NAMES[1]} is its own transposed"


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("model.layers.1.self_attn.q_proj.weight", (96, 96), (4, 0, "head", 24)),
        ("model.layers.1.self_attn.k_proj.weight", (48, 96), (2, 0, "head", 24)),
        ("model.layers.1.self_attn.v_proj.bias", (48,), (2, 0, "head", 0)),
        ("model.layers.1.self_attn.q_norm.weight", (24,), (1, 0, "", 24)),
        ("model.layers.1.self_attn.o_proj.weight", (96, 96), (4, 1, "head", 0)),
        ("model.layers.1.mlp.gate_proj.weight", (192, 96), (8, 0, "part", 0)),
        ("model.layers.1.mlp.down_proj.weight", (96, 192), (8, 1, "part", 0)),
        ("model.layers.1.mlp.experts.3.up_proj.weight", (96, 96), (8, 0, "part", 0)),
        ("model.layers.1.mlp.gate.weight", (4, 96), (4, 0, "expert", 0)),
        ("model.layers.1.input_layernorm.weight", (96,), (1, 0, "", 0)),
        ("model.embed_tokens.weight", (768, 96), (8, 0, "part", 0)),
        ("model.extra", (2,), (1, 0, "", 0)),
    ],
)
def test_tensors_are_divided_as_heads_and_ranks_share_them(name, shape, wanted):
    found = bands(name, shape, compose_recipe(["model=qwen3-tiny"]).model)
    assert (found.count, found.axis, found.part, found.turned) == wanted
