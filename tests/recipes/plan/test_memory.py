from dataclasses import replace

import pytest

from recipes.compose.recipe import compose_recipe
from recipes.config import OptimizerState, Recompute
from recipes.dimensions import parameters
from recipes.plan.activations import activations
from recipes.plan.memory import PINNED_PIECE, Load, Verdict, _in_pieces, gpu_memory, host_memory, memory_limit, verdict

LOAD = Load([[40_000, 152_000, 30_000, 20_000], [50_000, 50_000, 50_000, 50_000]])
DENSE = ["model=qwen3-32b", "layout=released-qwen3"]


def recipe(*words, **changes):
    r = compose_recipe(list(words))
    return replace(r, layout=replace(r.layout, **changes))


def test_a_load_knows_its_largest_batch_and_its_fullest_window():
    assert (LOAD.largest, LOAD.batches) == (152_000, 4)
    assert [LOAD.window(n) for n in (1, 2, 3, 9)] == [152_000, 192_000, 222_000, 242_000]


@pytest.mark.parametrize(("share", "said"), [(0.79, Verdict.fits), (0.8, Verdict.risky), (0.95, Verdict.does_not_fit)])
def test_verdicts(share, said):
    assert verdict(share * 80e9, 80e9) is said


def test_weights_gradients_and_optimizer_of_all_ranks_are_the_models():
    """tp 8 x pp 4 hold it once; its optimizer state lies on all 64."""
    total = parameters(compose_recipe(DENSE).model).total
    stages = gpu_memory(recipe(*DENSE, optimizer_state=OptimizerState.resident), LOAD)
    # Norms lie whole on each of the 8 tensor-parallel ranks.
    assert sum(8 * s.weights for s in stages) == pytest.approx(2 * total, rel=1e-3)
    assert sum(8 * s.gradients for s in stages) == pytest.approx(4 * total, rel=1e-3)
    assert sum(16 * s.optimizer for s in stages) == pytest.approx(12 * total, rel=1e-3)


def test_each_state_of_the_optimizer_is_leaner_than_the_one_before():
    held = [gpu_memory(recipe(*DENSE, optimizer_state=s), LOAD)[0].optimizer for s in OptimizerState]
    assert held[0] / held[1] == 12 / 10 and held[2] == 0.0
    hosts = [host_memory(recipe(*DENSE, optimizer_state=s), LOAD, 10**6).optimizer for s in OptimizerState]
    assert hosts[:2] == [0.0, 0.0] and hosts[2] > 0


def test_each_recomputation_keeps_less():
    kept = [gpu_memory(recipe(*DENSE, recompute=how), LOAD)[0] for how in Recompute]
    none, selective, linear, full = (stage.activations for stage in kept)
    assert none > 2 * selective and selective > linear > full and selective > 2 * full
    assert kept[0].working < kept[3].working, "a layer is whole again while it is computed again"


def test_what_is_offloaded_is_on_the_host_but_for_two_layers():
    words = ["model=qwen3-4b", "cluster=h200x1", "layout=data_parallel"]
    load = Load([[152_000]])
    for how in (Recompute.linear, Recompute.full):
        here, there = (recipe(*words, recompute=how, offload=offload) for offload in (False, True))
        each = 152_000 * activations(here).saved_per_layer(how)  # bytes of one of the 36 layers
        gpu = [gpu_memory(one, load)[0].activations for one in (here, there)]
        assert gpu[0] - gpu[1] == pytest.approx(34 * each)
        on_host = [host_memory(one, load, 0).activations for one in (here, there)]
        assert on_host[0] == 0.0 and 36 * each <= on_host[1] < 2 * 36 * each, (
            "each tensor is rounded up to a power of two"
        )


def test_an_early_stage_holds_more_batches_and_the_last_one_the_logits():
    stages = gpu_memory(recipe(*DENSE), LOAD)
    assert [s.activations for s in stages] == sorted((s.activations for s in stages), reverse=True)
    assert [bool(s.loss) for s in stages] == [False, False, False, True]
    whole = stages[3].loss
    assert gpu_memory(recipe(*DENSE, loss_chunk=4096), LOAD)[3].loss < whole
    assert stages[3].total < sum(vars(stages[3]).values()), "working and loss are not held at once"


def test_context_parallelism_cuts_what_tokens_take():
    two, four = (gpu_memory(recipe(*DENSE, cp=n, pp=2), LOAD)[1] for n in (2, 4))
    assert two.activations == pytest.approx(2 * four.activations)
    assert two.weights == pytest.approx(four.weights, rel=1e-4)


def test_a_gpu_has_its_own_memory_and_a_core_its_share():
    assert memory_limit(compose_recipe(DENSE)) == 81_559 * 2**20
    assert memory_limit(compose_recipe(["cluster.gpus_per_node=4"])) == memory_limit(compose_recipe([])) // 2


def test_pinned_memory_of_offloaded_tensors_is_rounded_in_their_last_piece_alone():
    assert _in_pieces(3 * PINNED_PIECE) == 3 * PINNED_PIECE
    assert _in_pieces(3 * PINNED_PIECE + 5) == 3 * PINNED_PIECE + 8
    assert _in_pieces(1.2e9) < 1.2e9 + PINNED_PIECE and _in_pieces(100) == 128
