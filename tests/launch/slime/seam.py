"""The seam between slime and this project's layers, without slime: ranks of the embedded engine whose model, batches and calls are
those that slime makes. A test puts `Seam` in the place of `launch.megatron.ranks.Worker`; Ray's processes import it from here.

After slime 624b824, `backends/megatron_utils`: `model_provider.py` (the model), `data.py` and `cp_utils.py` (a batch), `model.py` (the
call). `test_seam.py` holds batches and calls against slime's own where the checkouts are.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.pack.dataset import Dataset
from launch.megatron import cpu
from launch.megatron.rank_actor import Worker
from recipes.config import Recipe

PAD = 128  # slime's --data-pad-size-multiplier


class Seam(Worker):
    """A rank as slime has it."""

    def build(self, *arguments: Any) -> None:
        cpu.install()  # megatron.core may be imported now
        from launch.megatron import rank

        for name, ours in ("build_chunks", build_chunks), ("pack", pack), ("_forward_step", forward_step):
            setattr(rank, name, ours)
        super().build(*arguments)


def build_chunks(r: Recipe, config: Any) -> list[Any]:
    """slime's `model_provider` with `--spec launch.slime.hooks.cpu layers`, for every chunk of this rank."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    from launch.slime.hooks.cpu import layers

    stages: list[int | None] = list(range(r.layout.vpp)) if r.layout.vpp > 1 else [None]
    return [
        GPTModel(
            config=config,
            transformer_layer_spec=layers(None, config, stage),
            vocab_size=r.model.vocab,
            max_sequence_length=r.model.max_position,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage),
            fp16_lm_cross_entropy=False,
            parallel_output=True,
            share_embeddings_and_output_weights=r.model.tied,
            position_embedding_type="rope",
            rotary_percent=r.model.rope_fraction,
            rotary_base=int(r.model.rope_base),
            rope_scaling=False,
            **({} if stage is None else {"vp_stage": stage}),
        )
        for stage in stages
    ]


def sliced(row: Tensor, ranks: int, rank: int) -> Tensor:
    """slime's `slice_with_cp`: this rank's two chunks of a sequence, padded with zeros at its end."""
    if ranks == 1:
        return row
    chunk = -(-len(row) // (2 * ranks))
    row = F.pad(row, (0, 2 * ranks * chunk - len(row)))
    second = 2 * ranks - 1 - rank
    return torch.cat([row[chunk * rank : chunk * (rank + 1)], row[chunk * second : chunk * (second + 1)]])


def packed(rows: Sequence[Tensor], tp: int, ranks: int, rank: int) -> tuple[Tensor, dict[str, Any]]:
    """slime's `get_batch`: rows of this rank one after another, [1, t], and the fields of its `PackedSeqParams`. What fills the
    batch up to a multiple is a sequence of its own."""
    parts = [sliced(row, ranks, rank) for row in rows]
    if left := -sum(map(len, parts)) % (PAD * tp):
        parts.append(torch.zeros(left, dtype=parts[0].dtype))
    boundaries = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).int() * ranks
    longest = boundaries.diff().max().item()
    fields = {
        "cu_seqlens_q": boundaries,
        "cu_seqlens_kv": boundaries,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
        "qkv_format": "thd",
    }
    return torch.cat(parts)[None], fields


def pack(data: Dataset, sequences: Sequence[int], r: Recipe, cp_rank: int, device: torch.device) -> Any:
    """In the place of `launch.megatron.batch.pack`: the same sequences as slime hands them to its model."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from launch.megatron.batch import Batch

    tokens = [torch.from_numpy(data.tokens(s).astype("int64")) for s in sequences]
    masks = []
    for sequence in sequences:
        mask = torch.zeros(data.lengths[sequence], dtype=torch.bool)
        for start, end in data.spans(sequence):
            mask[start - 1 : end - 1] = True
        masks.append(mask)
    labels = [F.pad(row[1:], (0, 1)) for row in tokens]
    (of_tokens, fields), (of_labels, _), (of_masks, _) = (
        packed(rows, r.layout.tp, r.layout.cp, cp_rank) for rows in (tokens, labels, masks)
    )
    return Batch(of_tokens, of_labels, of_masks, PackedSeqParams(**fields))


def forward_step(batches: Any, model: Any) -> tuple[Tensor, Any]:
    """slime's call of its model; its logits become losses outside."""
    batch = next(batches)
    output = model(
        input_ids=batch.tokens,
        position_ids=None,
        attention_mask=None,
        labels=None,
        packed_seq_params=batch.packed,
        loss_mask=batch.supervised,
    )
    return output, partial(_loss, batch.labels, batch.supervised)


def _loss(labels: Tensor, supervised: Tensor, logits: Tensor) -> Any:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from launch.megatron import rank

    return rank._loss(supervised, vocab_parallel_cross_entropy(logits.float(), labels))
