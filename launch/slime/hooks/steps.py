"""The project's code around each optimizer step on slime's trainers. It compares the learning rate with the plan's, computes the
held-out loss, and writes `metrics.jsonl`.

slime calls `before` through `--custom-megatron-before-train-step-hook-path`. The code after a step wraps two functions that slime
then calls: the scheduler's `step`, on every rank, and the trackers' `log` of the step's figures, on one rank.
"""

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

from launch.run import metrics
from launch.run.run_plan import Plan
from launch.slime.hooks import heldout
from launch.slime.hooks.rollout import in_order, run_plan
from recipes.checkpoint.tensors import links
from recipes.config import Recipe
from recipes.errors import DivergedError, TrainError
from recipes.paths import run_folder
from recipes.plan.saves import saves_optimizer
from recipes.schedule.learning_rate import learning_rate


class Steps:
    """One trainer's state for the run, created before its first step. step: that step, from 0."""

    def __init__(self, args: Any, planned_run: Plan, model: Any, scheduler: Any, step: int) -> None:
        from slime.backends.megatron_utils.initialize import is_megatron_main_rank
        from slime.backends.megatron_utils.model import logging_utils

        self.args, self.plan, self.model = args, planned_run, model
        self.log = Log(args, planned_run, step, logging_utils) if is_megatron_main_rank() else None
        _restore_expert_bias(model, planned_run.recipe)
        if step == 0:
            self._evaluate(0)
            if self.log:
                self.log.flush()
        self.step = step
        # Megatron's scheduler counts sequences, and slime counts one sequence per step and data-parallel rank. A checkpoint of another
        # layout has another count, so set it from the step.
        scheduler.num_steps = step * args.global_batch_size
        scheduler.step(0)
        original_step = scheduler.step

        def step_and_after(increment: int) -> None:
            original_step(increment)
            self._after()

        scheduler.step = step_and_after

    def before(self, step: int, optimizer: Any) -> None:
        """Prepare step `step`, from 0. Raise `TrainError` if its learning rates are not the planned ones."""
        self.step = step
        wanted = learning_rate(self.plan.recipe.optim, step, self.plan.schedule.num_steps)
        for group in optimizer.param_groups:
            if not math.isclose(group["lr"], wanted, rel_tol=1e-9, abs_tol=1e-15):
                raise TrainError(
                    f"step {step + 1}: Megatron's learning rate is {group['lr']!r}, but the planned one is {wanted!r}"
                )
        # Megatron reads it when it saves, after this step.
        self.args.no_save_optim = not saves_optimizer(self.plan.recipe, step + 1, self.plan.schedule.num_steps)
        if self.log:
            self.log.begin(wanted)

    def _after(self) -> None:
        peak = _peak_gb(next(self.model[0].parameters()).device)
        if self.log:
            self.log.end(peak)
        done, every = self.step + 1, self.plan.recipe.optim.eval_steps
        if done % every == 0 or done == self.plan.schedule.num_steps:
            self._evaluate(done)

    def _evaluate(self, step: int) -> None:
        if self.plan.heldout is None:
            return
        loss = heldout.loss(self.args, self.model, self.plan)
        if self.log:
            self.log.heldout = {"step": step, "heldout_loss": loss}


class Log:
    """Writes `metrics.jsonl` from the figures that slime passes to its trackers: one line per step, and one per held-out loss."""

    def __init__(self, args: Any, planned_run: Plan, completed: int, trackers: Any) -> None:
        """Start to listen. trackers: slime's `logging_utils`; its `log` is wrapped. completed: steps of the run so far."""
        self.args, self.plan = args, planned_run
        root = run_folder(planned_run.recipe)
        self.metrics = metrics.Metrics(root, completed)
        self.recent = deque(metrics.losses(root), maxlen=10)
        self.heldout: dict[str, Any] | None = None
        self.completed = completed
        self.lr, self.started, self.took, self.peak_gb = 0.0, 0.0, 0.0, 0.0
        self._slime_log = trackers.log
        trackers.log = self._log

    def begin(self, lr: float) -> None:
        """Record a step's learning rate, and start its clock."""
        self.lr, self.started = lr, time.perf_counter()

    def end(self, peak_gb: float) -> None:
        """Stop the step's clock and record its peak memory, before any held-out loss is computed."""
        self.took, self.peak_gb = time.perf_counter() - self.started, peak_gb

    def _log(self, args: Any, metrics: dict[str, Any], step_key: str) -> None:
        """Replace slime's `log`: call it, then record a step's figures."""
        self._slime_log(args, metrics, step_key)
        if step_key == "train/step":
            self._step(metrics[step_key], float(metrics["train/loss"]), float(metrics["train/grad_norm"]))
            self.flush()

    def _step(self, number: int, loss: float, grad_norm: float) -> None:
        if number != self.completed:
            raise TrainError(f"slime reports step {number + 1} after step {self.completed}")
        data, sequences = self.plan.data, in_order(self.plan.schedule.step(number))
        line = {
            "step": number + 1,
            "lr": self.lr,
            "loss": loss,
            "grad_norm": grad_norm,
            "tokens": sum(data.lengths[s] for s in sequences),
            "supervised_tokens": sum(end - start for s in sequences for start, end in data.spans(s)),
        }
        if not math.isfinite(loss + grad_norm):
            raise DivergedError(
                f"step {number + 1}: {metrics.shown(line)}, which is not finite",
                "try a smaller optim.lr with run=OTHER",
            )
        self.metrics.add({**line, "time": {"step_s": self.took, "peak_gb": self.peak_gb}})
        self.completed += 1
        spike = self.plan.recipe.engine.spike
        if spike and self.recent and line["loss"] > spike * max(self.recent):
            raise DivergedError(
                f"step {number + 1}: {metrics.shown(line)}, above engine.spike={spike} times the largest loss of the previous ten "
                "steps. The update is already applied; the last checkpoint is from before it",
                "write engine.spike=null to continue anyway",
            )
        self.recent.append(line["loss"])

    def flush(self) -> None:
        """Write the held-out loss computed since the last line, if any. Raise `DivergedError` if it is not finite."""
        if self.heldout is not None:
            if not math.isfinite(self.heldout["heldout_loss"]):
                raise DivergedError(
                    f"held-out loss {self.heldout['heldout_loss']} after step {self.heldout['step']}, which is not finite",
                    "try a smaller optim.lr with run=OTHER",
                )
            self.metrics.add(self.heldout)
            figures = {"heldout/loss": self.heldout["heldout_loss"], "train/step": self.heldout["step"]}
            self._slime_log(self.args, figures, "train/step")
            self.heldout = None


def before(args: Any, rollout_id: int, step_id: int, model: Any, optimizer: Any, scheduler: Any) -> None:
    """Run before optimizer step `rollout_id` (from 0), as slime's hook."""
    steps = getattr(scheduler, "limi", None)
    if steps is None:
        steps = scheduler.limi = Steps(args, run_plan(), model, scheduler, rollout_id)
    steps.before(rollout_id, optimizer)


def _peak_gb(device: Any) -> float:
    """Return the peak memory of any rank so far, in GB: of its GPU, or of its process on a CPU. All ranks call this together.

    device: where tensors of this rank are.
    """
    import resource

    import torch

    if torch.cuda.is_available():
        local_peak = torch.cuda.max_memory_allocated()
    else:
        local_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.tensor(float(local_peak), device=device)
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    return float(peak) / 1e9


def _restore_expert_bias(model: Any, recipe: Recipe) -> None:
    """Set every router's expert bias to the base's exact fp32 values. slime loads them into a buffer that is bf16 until the first
    forward pass."""
    if not recipe.model.experts:
        return
    import torch

    from launch.weights import hf_names
    from launch.weights.safetensors_folder import SafetensorsFolder

    base, table = SafetensorsFolder(Path(recipe.model.checkpoint)), links(recipe.model)
    for name, tensor in hf_names.global_tensors([_inner(chunk) for chunk in model], recipe.model):
        if name.endswith("expert_bias"):
            tensor.data = base.read(next(iter(table[name].hf))).to(tensor.device, torch.float32)


def _inner(chunk: Any) -> Any:
    """Return Megatron's model without its wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
