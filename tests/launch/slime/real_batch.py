"""Run by the Python that slime runs in, `real_batch.py '[LENGTHS, TP, CP]'`: prints, as JSON, the batch that slime's own `get_batch`
makes of rows 1 to n on each context-parallel rank."""

import json
import sys

from launch.slime.hooks import cpu

cpu.install()

import torch  # noqa: E402
from megatron.core import mpu  # noqa: E402
from slime.backends.megatron_utils.data import get_batch  # noqa: E402


class Rows:
    """An iterator of slime's with one micro-batch."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def get_next(self, keys: list[str]) -> dict:
        return {
            "tokens": [torch.arange(1, n + 1) for n in self.lengths],
            "loss_masks": [torch.ones(max(n - 1, 1), dtype=torch.int) for n in self.lengths],
            "total_lengths": self.lengths,
            "response_lengths": [max(n - 1, 1) for n in self.lengths],
        }


lengths, tp, cp = json.loads(sys.argv[1])
found = []
for rank in range(cp):
    mpu.get_tensor_model_parallel_world_size = lambda: tp
    mpu.get_context_parallel_world_size = lambda: cp
    mpu.get_context_parallel_rank = lambda rank=rank: rank
    batch = get_batch(Rows(lengths), ["tokens", "loss_masks", "total_lengths", "response_lengths"], 128)
    params = batch["packed_seq_params"]
    names = ("cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv", "qkv_format")
    fields = {name: getattr(params, name) for name in names}
    shown = {k: v.tolist() if torch.is_tensor(v) else v for k, v in fields.items()}
    others = {k: v for k, v in vars(params).items() if k not in fields and v is not None}
    found.append({"tokens": batch["tokens"].tolist(), **shown, **{k: str(v) for k, v in others.items()}})
print(json.dumps(found))
