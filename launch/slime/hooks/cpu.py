"""Support for running the real, unmodified slime on a CPU: an accelerator in slime's registry, and stand-ins for GPU packages that
slime imports but does not call in fine-tuning. `launch.megatron.cpu` adapts Megatron-LM; `launch.model.layers` provides the layers.

`install` runs in every process of a job before slime is imported. Ray calls it when it starts a worker.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

from launch.megatron import cpu

# Packages that slime's and Megatron-LM's modules import at their top.
NAMES = ("sglang", "sglang_router", "torch_memory_saver", "triton")


class _Nothing:
    """An attribute of a stand-in. It can serve as a base class, a decorator or an annotation, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __class_getitem__(cls, _: Any) -> type:
        return cls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        decorated = len(args) == 1 and not kwargs and callable(args[0])
        return args[0] if decorated else _Nothing()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()


class _StandIn(types.ModuleType):
    __path__: list[str] = []
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (_Nothing,), {"__module__": self.__name__}) if name[:1].isupper() else _Nothing()
        setattr(self, name, value)
        return value


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder on the path, so that an installed package takes precedence."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".", maxsplit=1)[0] not in NAMES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    """Make slime run on the CPU in this process. A second call does nothing."""
    if any(isinstance(finder, _StandIns) for finder in sys.meta_path):
        return
    cpu.install()
    cpu.after_import("megatron.core.optimizer.distrib_optimizer", _change_optimizer)
    cpu.after_import("slime.utils.reloadable_process_group", _complete_process_groups)
    sys.meta_path.append(_StandIns())
    _register()


def _register() -> None:
    """Register the CPU with slime. Before 624b824 slime has no registry, and rewriting its device names is enough."""
    import psutil
    import torch

    try:
        from slime.utils import accelerator
        from slime.utils.accelerator.base import Accelerator
    except ImportError:
        return

    class Cpu(Accelerator):
        name = device_type = "cpu"
        communication_backend_name = "gloo"

        def is_available(self) -> bool:
            return True

        def device(self, index: Any = None) -> torch.device:
            return cpu.CPU

        def device_name(self, index: Any = None) -> str:
            return "cpu"

        def set_device(self, index: Any) -> None:
            pass

        def current_device(self) -> str:
            return "cpu"

        def device_count(self) -> int:
            return 1

        def synchronize(self, device: Any = None) -> None:
            pass

        def current_stream(self, device: Any = None) -> None:
            return None

        def stream(self, stream: Any) -> Any:
            return contextlib.nullcontext()

        def empty_cache(self) -> None:
            pass

        def mem_get_info(self, device: Any = None) -> tuple[int, int]:
            memory = psutil.virtual_memory()
            return memory.available, memory.total

        def memory_allocated(self, device: Any = None) -> int:
            return psutil.Process().memory_info().rss

        memory_reserved = memory_allocated

        def supports(self, capability: str) -> bool:
            return capability in ("bf16", "requires_cpu_initialization")

        def autocast(self, *args: Any, **kwargs: Any) -> Any:
            return torch.autocast("cpu", *args, **kwargs)

        def distributed_device_id(self, index: Any = None) -> None:
            return None

    accelerator.register_accelerator("cpu", Cpu, lambda: True, priority=-1, communication_backends=())


def _complete_process_groups(module: Any) -> None:
    """Add to slime's process group the methods that torch 2.13 calls and slime's wrapper does not forward."""
    ReloadableProcessGroup = module.ReloadableProcessGroup

    def forwarding(name: str) -> Any:
        return lambda self, *args, **kwargs: self._fwd(name, *args, **kwargs)

    for kind in ("all_gather", "reduce_scatter", "all_to_all"):
        for name in (f"{kind}_single", f"{kind}_single_coalesced"):
            if name not in vars(ReloadableProcessGroup):
                setattr(ReloadableProcessGroup, name, forwarding(name))


def _change_optimizer(module: Any) -> None:
    """Make Megatron's distributed optimizer work with torch's Adam instead of Transformer Engine's.

    torch's Adam has no state before its first step, but Megatron asserts one. It also has one `step` per parameter. Megatron creates
    a single `step` tensor for all parameters, so each parameter would increment the same tensor.
    """
    optimizer = module.DistributedOptimizer
    sharded_state_dict, set_states = optimizer.sharded_state_dict, optimizer._set_main_param_and_optimizer_states

    def with_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return sharded_state_dict(self, *args, **kwargs)

    def with_own_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state and "step" not in tensors:
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        return set_states(self, model_param, tensors)

    optimizer.sharded_state_dict = with_state
    optimizer._set_main_param_and_optimizer_states = with_own_step


def layers(args: Any, config: Any, vp_stage: int | None = None) -> Any:
    """Return the project's layers, for Megatron-LM's `--spec launch.slime.hooks.cpu layers`."""
    from launch.model.layers import block_spec

    return block_spec(config, vp_stage=vp_stage)
