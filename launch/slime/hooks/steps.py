"""What slime's trainers do around each optimizer step: hold the rate against the plan's, take the held-out loss, write
`metrics.jsonl`.

slime calls `before` by `--custom-megatron-before-train-step-hook-path`. What comes after a step hangs on two functions that slime then
calls: it moves Megatron's scheduler on, on every rank, and it hands the step's figures to its trackers, on one.
"""

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

from launch.run import metrics
from launch.run.run_plan import Plan
from launch.slime.hooks import heldout
from launch.slime.hooks.rollout import in_order, plan
from recipes.checkpoint.tensors import links
from recipes.config import Recipe
from recipes.errors import DivergedError, TrainError
from recipes.paths import run_folder
from recipes.schedule.learning_rate import learning_rate


class Steps:
    """One trainer's part in the run, from the first step that it trains."""

    def __init__(self, args: Any, here: Plan, model: Any, scheduler: Any, step: int) -> None:
        from slime.backends.megatron_utils.initialize import is_megatron_main_rank
        from slime.backends.megatron_utils.model import logging_utils

        self.args, self.plan, self.model = args, here, model
        self.log = Log(args, here, step, logging_utils) if is_megatron_main_rank() else None
        _keep_expert_bias(model, here.recipe)
        if step == 0:
            self._evaluate(0)
            if self.log:
                self.log.flush()
        self.step = step
        # Megatron counts sequences, slime as many a step as there are data-parallel ranks: of a checkpoint's layout perhaps others.
        scheduler.num_steps = step * args.global_batch_size
        scheduler.step(0)
        moved_on = scheduler.step

        def after(increment: int) -> None:
            moved_on(increment)
            self._after()

        scheduler.step = after

    def before(self, step: int, optimizer: Any) -> None:
        """Raises `TrainError` where the rates of step `step`, from 0, are not the plan's."""
        self.step = step
        wanted = learning_rate(self.plan.recipe.optim, step, self.plan.schedule.num_steps)
        for group in optimizer.param_groups:
            if not math.isclose(group["lr"], wanted, rel_tol=1e-9, abs_tol=1e-15):
                raise TrainError(f"step {step + 1}: Megatron's learning rate is {group['lr']!r}, the plan's {wanted!r}")
        if self.log:
            self.log.begin(wanted)

    def _after(self) -> None:
        peak = _peak_gb()
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
    """Writes `metrics.jsonl` of what slime hands to its trackers: a line a step, and one for each held-out loss."""

    def __init__(self, args: Any, here: Plan, completed: int, trackers: Any) -> None:
        """trackers: slime's `logging_utils`, by whose `log` the figures of a step are heard."""
        self.args, self.plan = args, here
        root = run_folder(here.recipe)
        self.metrics = metrics.Metrics(root, completed)
        self.recent = deque(metrics.losses(root), maxlen=10)
        self.heldout: dict[str, Any] | None = None
        self.completed = completed
        self.lr, self.started, self.took, self.peak_gb = 0.0, 0.0, 0.0, 0.0
        self._pass_on = trackers.log
        trackers.log = self._heard

    def begin(self, lr: float) -> None:
        """Of a step: its rate; its time counts from here."""
        self.lr, self.started = lr, time.perf_counter()

    def end(self, peak_gb: float) -> None:
        """Of a step, before the held-out loss that may follow."""
        self.took, self.peak_gb = time.perf_counter() - self.started, peak_gb

    def _heard(self, args: Any, metrics: dict[str, Any], step_key: str) -> None:
        """In the place of slime's `log`."""
        self._pass_on(args, metrics, step_key)
        if step_key == "train/step":
            self._step(metrics[step_key], float(metrics["train/loss"]), float(metrics["train/grad_norm"]))
            self.flush()

    def _step(self, number: int, loss: float, grad_norm: float) -> None:
        if number != self.completed:
            raise TrainError(f"slime tells of step {number + 1} after step {self.completed}")
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
                f"step {number + 1}: {metrics.shown(line)}, over engine.spike={spike} times the largest loss of the ten steps before. "
                "It has been applied, the last checkpoint is from before it",
                "write engine.spike=null to go on all the same",
            )
        self.recent.append(line["loss"])

    def flush(self) -> None:
        """Writes the held-out loss that was taken since the last line. Raises `DivergedError` where it is not finite."""
        if self.heldout is not None:
            if not math.isfinite(self.heldout["heldout_loss"]):
                raise DivergedError(
                    f"held-out loss {self.heldout['heldout_loss']} after step {self.heldout['step']}, which is not finite",
                    "try a smaller optim.lr with run=OTHER",
                )
            self.metrics.add(self.heldout)
            figures = {"heldout/loss": self.heldout["heldout_loss"], "train/step": self.heldout["step"]}
            self._pass_on(self.args, figures, "train/step")
            self.heldout = None


def before(args: Any, rollout_id: int, step_id: int, model: Any, optimizer: Any, scheduler: Any) -> None:
    """slime's hook before optimizer step `rollout_id`, from 0."""
    steps = getattr(scheduler, "limi", None)
    if steps is None:
        steps = scheduler.limi = Steps(args, plan(), model, scheduler, rollout_id)
    steps.before(rollout_id, optimizer)


def _peak_gb() -> float:
    """The most that any rank's GPU has held so far, or its process on a CPU. Every rank calls it."""
    import resource

    import torch
    from slime.utils import accelerator

    if torch.cuda.is_available():
        here = torch.cuda.max_memory_allocated()
    else:
        here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.tensor(float(here), device=accelerator.current_device())
    torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    return float(peak) / 1e9


def _keep_expert_bias(model: Any, recipe: Recipe) -> None:
    """Sets every router's expert bias to the base's fp32 value, bit for bit: slime loads it into a buffer that is bf16 until the
    first forward pass."""
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
    """Megatron's model inside the wrappers around it."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
