"""One rank of the embedded engine: Megatron's model, optimizer and schedule over the recipe's steps.

`rank_actor.py` imports this module after `cpu.install()`, so that megatron.core also runs on a machine without a GPU.
"""

import contextlib
import gc
import itertools
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint.api import CheckpointException

from data_prep.pack.dataset import Dataset
from launch.megatron import checkpoint
from launch.megatron.batch import Batch, pack
from launch.megatron.cpu import CPU
from launch.megatron.host_adam import HostAdam, parts_of
from launch.megatron.rank_export import write_shard
from launch.megatron.rank_place import Place
from launch.model.gpt import build_chunks, transformer_config
from launch.model.offload_streams import CopyStreams
from launch.run.metrics import shown
from launch.weights import hf_names
from recipes.config import Dtype, Layout, OptimizerState, Recipe
from recipes.errors import CheckpointError, DivergedError
from recipes.layout import world_size
from recipes.schedule.learning_rate import learning_rate
from recipes.schedule.schedule import MicroBatch, Schedule


class Rank:
    """The state of one rank between calls. Every method is called on all ranks together."""

    def __init__(
        self,
        recipe: Recipe,
        place: Place,
        train: tuple[Dataset, Schedule],
        heldout: tuple[Dataset, Schedule] | None,
        read: Callable[[str], Tensor],
    ) -> None:
        """Join the process group and build the model. read: returns a tensor of the base by its Hugging Face name."""
        self.recipe, self.place = recipe, place
        (self.train, self.schedule), self.heldout = train, heldout
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else CPU  # Ray makes only one GPU visible
        self._join()
        self._build(read)
        gc.freeze()  # Megatron collects garbage at every checkpoint; this excludes all objects that imports created

    def _join(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.recipe.cluster.gpus_per_node))
        timeout = timedelta(seconds=self.recipe.engine.timeout)
        store = TCPStore(self.place.host, self.place.port, is_master=False, timeout=timeout)
        dist.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=store,
            world_size=world_size(self.recipe),
            rank=self.place.rank,
            timeout=timeout,
        )
        initialize_parallel(self.recipe.layout)

    def _build(self, read: Callable[[str], Tensor]) -> None:
        r = self.recipe
        torch.manual_seed(r.seed)
        # The inference tracker does nothing. That suffices: there is no dropout, and no weight is initialised at random.
        tensor_parallel.model_parallel_cuda_manual_seed(r.seed, inference_rng_tracker=True)
        self.config = transformer_config(r)
        self.chunks = build_chunks(r, self.config)
        hf_names.load(self.chunks, r.model, read)
        self.model, self.optimizer = wrap(r, self.config, self.chunks)
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss

    @staticmethod
    def leave() -> None:
        """Undo what building a rank did to this process, also one that failed half-way, so that another can be built there."""
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.unfreeze()

    def peak_memory(self) -> int:
        """Return the peak memory so far in bytes: allocated memory on a GPU, or on a CPU the resident set of this process with its
        libraries."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def load(self, folder: str) -> int:
        """Load a checkpoint of any layout. Return its number of completed steps."""
        return checkpoint.load(Path(folder), self.chunks, self.optimizer)

    def save(self, folder: str, step: int, optimizer: bool = True) -> None:
        """Write a checkpoint of `step` completed steps. optimizer: whether it holds the optimizer state."""
        with self._writing():
            checkpoint.save(Path(folder), self.chunks, self.optimizer if optimizer else None, step)

    def export(self, folder: str) -> dict[str, str]:
        """Write this rank's Hugging Face tensors. Return {tensor: file} for the tensors it wrote."""
        with self._writing():
            return write_shard(Path(folder), self.chunks, self.recipe.model, self.place.rank)

    def write_gradients(self, folder: str) -> None:
        """Write the last step's gradients under their Hugging Face names.

        They are gathered here first, because the distributed optimizer leaves each rank only its part of the reduced gradients.
        """
        for chunk in self.model:
            for buffer in chunk.buffers + chunk.expert_parallel_buffers:
                group = buffer.data_parallel_group
                for bucket in buffer.buckets:
                    shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)

        def gradient(weight: Tensor) -> Tensor:
            return getattr(weight, "main_grad", weight)  # the expert bias has none

        write_shard(Path(folder), self.chunks, self.recipe.model, self.place.rank, gradient)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Convert errors of the system, torch and safetensors to `CheckpointError`."""
        try:
            yield
        except (OSError, RuntimeError, CheckpointException, SafetensorError) as error:
            raise CheckpointError(f"rank {self.place.rank}: {error}") from error

    def train_step(self, step: int, limit: float = math.inf) -> dict[str, Any]:
        """Run optimizer step `step` (from 0) and return its metrics.

        `loss` is the mean per supervised token, `grad_norm` is the norm before clipping, and `step` is the number of steps completed
        after this one. Raise `DivergedError` on every rank, before any update, if the loss is above `limit` or a number is not
        finite.
        """
        started = time.perf_counter()
        figures = self.gradient(step)
        if not math.isfinite(figures["loss"] + figures["grad_norm"]):
            raise DivergedError(f"{shown(figures)}, which is not finite", "try a smaller optim.lr with run=OTHER")
        if figures["loss"] > limit:
            raise DivergedError(
                f"{shown(figures)}, above {limit:.4g}: engine.spike={self.recipe.engine.spike} times the largest loss of the previous "
                "ten steps",
                "write engine.spike=null to continue anyway",
            )
        lr = learning_rate(self.recipe.optim, step, self.schedule.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return {"step": step + 1, "lr": lr, **figures, "time": {"step_s": time.perf_counter() - started}}

    def gradient(self, step: int) -> dict[str, Any]:
        """Compute the gradient of step `step` without an update. Return loss, gradient norm and token counts."""
        return self._gradient(self.schedule.step(step).ranks[parallel_state.get_data_parallel_rank()])

    def sequence_gradient(self, sequence: int) -> dict[str, Any]:
        """Compute the gradient of one training sequence, as `gradient` does for a step. All data-parallel ranks run the same
        sequence."""
        return self._gradient(((sequence,),) * self.schedule.micro_batch_multiple)

    def _gradient(self, micro_batches: tuple[MicroBatch, ...]) -> dict[str, Any]:
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss, supervised, tokens = self._run(self.train, micro_batches, forward_only=False)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        return {"loss": loss, "grad_norm": grad_norm, "tokens": tokens, "supervised_tokens": supervised}

    def heldout_loss(self) -> float:
        """Return the mean loss per supervised token over the whole held-out data set, without dropout or gradients."""
        assert self.heldout is not None
        for chunk in self.model:
            chunk.eval()
        data, schedule = self.heldout
        micro_batches = schedule.step(0).ranks[parallel_state.get_data_parallel_rank()]
        with torch.no_grad():
            return self._run(data, micro_batches, forward_only=True)[0]

    def _run(
        self, data: Dataset, micro_batches: tuple[MicroBatch, ...], *, forward_only: bool
    ) -> tuple[float, int, int]:
        """Run the forward pass (and the backward pass) over this rank's micro-batches.

        Return the step's mean loss per supervised token, its supervised tokens, and its tokens.
        """
        cp_rank = parallel_state.get_context_parallel_rank()
        # Pack lazily, because the rotary angles of a long micro-batch are large. Every model chunk reads every micro-batch.
        packed = (pack(data, m, self.recipe, cp_rank, self.device) for m in micro_batches)
        batches = itertools.tee(packed, len(self.model))
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=list(batches) if len(self.model) > 1 else batches[0],
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=len(micro_batches),
            seq_length=0,  # unused, because lengths vary
            micro_batch_size=1,
            forward_only=forward_only,
        )
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            for loss, supervised in outputs:
                sums[:2] += torch.stack([loss.double(), supervised.double()])
            sums[2] = sum(data.lengths[s] for m in micro_batches for s in m) / self.recipe.layout.cp
            dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        dist.broadcast(
            sums,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        total, supervised, tokens = sums.tolist()
        return total / supervised, round(supervised), round(tokens)


def initialize_parallel(p: Layout) -> None:
    """Create Megatron's process groups for a layout. All ranks must have joined the default process group."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=p.tp,
        pipeline_model_parallel_size=p.pp,
        virtual_pipeline_model_parallel_size=p.vpp if p.vpp > 1 else None,
        context_parallel_size=p.cp,
        expert_model_parallel_size=p.ep,
        expert_tensor_parallel_size=p.etp,
    )


def _in_bf16(config: TransformerConfig, chunk: GPTModel) -> Float16Module:
    """Convert the chunk to bf16, but restore the router's frozen bias to the base's fp32 values: Megatron rounds it with the rest."""
    fp32_biases = {name: bias.clone() for name, bias in chunk.named_buffers() if name.endswith("expert_bias")}
    wrapped = Float16Module(config, chunk)
    for name, bias in chunk.named_buffers():
        if name in fp32_biases:
            bias.data = fp32_biases[name]
    return wrapped


def wrap(r: Recipe, config: TransformerConfig, chunks: list[GPTModel]) -> tuple[list[DistributedDataParallel], Any]:
    """Return the chunks wrapped in Megatron's data parallelism, and Megatron's distributed optimizer."""
    bf16 = r.engine.dtype is Dtype.bf16
    wrapped = [_in_bf16(config, c) if bf16 else c for c in chunks]
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = [DistributedDataParallel(config, ddp, c, disable_bucketing=i > 0) for i, c in enumerate(wrapped)]
    o, offloaded = r.optim, r.layout.optimizer_state is OptimizerState.offloaded
    adam = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.lr * o.min_lr_ratio,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip_grad,
        bf16=bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=True,
    )
    # Let the optimizer hold the fp32 weights. Megatron's public field for this requires Transformer Engine.
    adam.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = offloaded
    optimizer = get_megatron_optimizer(adam, model, get_standard_config_overrides(adam))
    for part in parts_of(optimizer):
        groups = part.optimizer.param_groups
        if offloaded:
            part.optimizer = HostAdam(groups, CopyStreams(next(chunks[0].parameters()).device))
        for group in groups:
            # foreach would hold the square roots of all second moments at once.
            group["fused"], group["foreach"] = True, False
    return model, optimizer


def _forward_step(batches: Any, model: Any) -> tuple[Tensor, Any]:
    batch: Batch = next(batches)
    losses = model(batch.tokens, None, None, labels=batch.labels, packed_seq_params=batch.packed)
    return losses, partial(_loss, batch.supervised)


def _loss(supervised: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return the loss summed over supervised tokens, and their number. Megatron divides gradients by the number in the whole step."""
    total = (losses.float() * supervised).sum()
    count = supervised.sum(dtype=torch.int)
    return total, count, (total.detach(), count)
