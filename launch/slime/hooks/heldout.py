"""The held-out loss on slime's trainers, computed with slime's own forward pass and loss."""

import math
from functools import partial
from typing import Any

from launch.run.run_plan import Plan
from recipes.layout import data_parallel, micro_batch_multiple
from recipes.schedule.schedule import MicroBatch

# The keys that slime's batch and its loss read.
_KEYS = ("tokens", "multimodal_train_inputs", "total_lengths", "response_lengths", "loss_masks", "rollout_mask_sums")


def loss(args: Any, model: Any, plan: Plan) -> float | None:
    """Return the mean loss per supervised token over the whole held-out data set, or None on ranks without the last layers.

    All ranks call this together. model: slime's list of chunks.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from slime.backends.megatron_utils.data import get_data_iterator

    try:
        from slime.observability.train_metric_utils import reduce_train_step_metrics
    except ModuleNotFoundError:  # before 624b824
        from slime.backends.megatron_utils.cp_utils import reduce_train_step_metrics

    device = next(model[0].parameters()).device
    batches = micro_batches(plan, parallel_state.get_data_parallel_rank(with_context_parallel=False))
    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        losses = get_forward_backward_func()(
            forward_step_func=partial(_forward, args),
            data_iterator=get_data_iterator(_rollout(plan, batches, device)),
            model=model,
            num_microbatches=len(batches),
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=True,
        )
    for chunk in model:
        chunk.train()
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    reduced = reduce_train_step_metrics(
        losses,
        calculate_per_token_loss=True,
        step_global_batch_size=1,
        cp_size=parallel_state.get_context_parallel_world_size(),
        dp_with_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    return reduced["loss"]


def micro_batches(plan: Plan, rank: int) -> tuple[MicroBatch, ...]:
    """Return the held-out micro-batches of a data-parallel rank. If there are fewer sequences than ranks, every rank runs all of them,
    which does not change the mean."""
    assert plan.heldout is not None
    count = len(plan.heldout.lengths)
    if count >= data_parallel(plan.recipe):
        return plan.heldout_schedule.step(0).ranks[rank]
    multiple = micro_batch_multiple(plan.recipe.layout)
    return tuple((s,) for s in range(count)) * (multiple // math.gcd(multiple, count))


def _rollout(plan: Plan, batches: tuple[MicroBatch, ...], device: Any) -> dict[str, Any]:
    """Return the data for slime's iterator, one entry per sequence. device: where tensors of this rank are."""
    import torch

    from launch.slime.hooks.rollout import loss_mask, places

    assert plan.heldout is not None
    data = plan.heldout
    sequences = [s for batch in batches for s in batch]
    masks = [torch.tensor(loss_mask(data, s), dtype=torch.int, device=device) for s in sequences]
    return {
        "tokens": [torch.tensor(data.tokens(s), dtype=torch.long, device=device) for s in sequences],
        "loss_masks": masks,
        "total_lengths": [data.lengths[s] for s in sequences],
        "response_lengths": [len(mask) for mask in masks],
        "micro_batch_indices": places(batches),
    }


def _forward(args: Any, iterator: Any, chunk: Any) -> tuple[Any, Any]:
    """Run one forward step, as slime does in training."""
    from slime.backends.megatron_utils.data import get_batch
    from slime.backends.megatron_utils.loss import loss_function

    batch = get_batch(iterator, _KEYS, args.data_pad_size_multiplier, args.allgather_cp)
    output = chunk(
        input_ids=batch["tokens"],
        position_ids=None,
        attention_mask=None,
        labels=None,
        packed_seq_params=batch["packed_seq_params"],
        loss_mask=batch["full_loss_masks"],
    )
    return output, partial(loss_function, args, batch, 1, 1)
