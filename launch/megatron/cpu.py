"""An import hook that lets Megatron run on a CPU. It rewrites device names in the source of megatron-core 0.16.1 and of the
Megatron-LM that slime pins.

Megatron hard-codes `torch.cuda.…`, `device='cuda'` and `Tensor.type() == 'torch.cuda.FloatTensor'`. The hook replaces these words
only in modules of Megatron and slime, while they are imported. torch and the rest of the process are unchanged.
Line numbers are unchanged, so tracebacks point at the installed files. Call `install()` before the first import of megatron; it
raises if a module of megatron is already imported.
"""

import contextlib
import importlib.abc
import importlib.machinery
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

CPU = torch.device("cpu")
_REWRITES = (
    (re.compile(r"torch\.cuda\.(\w+Tensor)"), r"torch.\1"),  # type names that are compared with Tensor.type()
    (re.compile(r"^import torch\.cuda$", re.M), "import torch"),
    (re.compile(r"(?<!from )\btorch\.cuda\b(?!\.amp)"), "_cpu_device"),
    (re.compile(r"""(["'])cuda\1"""), '"cpu"'),
    (re.compile(r"\.cuda\(\)"), ".cpu()"),
    (re.compile(r"\.cuda\("), ".to("),
    (re.compile(r"\bpin_memory=True\b"), "pin_memory=False"),
    # An optional dependency of Megatron, installed with SGLang's dependencies. Its import raises OSError without a driver.
    (re.compile(r"\bfrom flash_mla import\b"), "from _no_flash_mla import"),
)

_REWRITTEN = ("megatron.", "slime.")
_KEPT = ("slime.utils.accelerator",)  # which asks for the device, since slime 624b824


class _CompletedStream:
    """A CUDA stream or event on a CPU. All its methods do nothing, because every operation is already complete."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _CompletedStream)

    __hash__ = object.__hash__


def _nothing(*_: Any, **__: Any) -> None:
    pass


# The names that Megatron and slime use of torch.cuda, answered for a CPU. Any other name is torch.cuda's own and fails there.
_cpu_device = types.ModuleType("_cpu_device")
_cpu_device.__dict__.update(
    current_device=lambda: CPU,
    is_available=lambda: False,
    get_device_capability=lambda *_: (9, 0),  # queried before a kernel that is then not used
    get_device_properties=lambda *_: types.SimpleNamespace(major=9, minor=0, name="cpu", total_memory=0),
    manual_seed_all=_nothing,
    reset_peak_memory_stats=_nothing,
    set_device=_nothing,
    mem_get_info=lambda *_: (0, 0),
    memory_allocated=lambda *_: 0,
    memory_reserved=lambda *_: 0,
    max_memory_allocated=lambda *_: 0,
    synchronize=_nothing,
    empty_cache=_nothing,
    Stream=_CompletedStream,
    Event=_CompletedStream,
    current_stream=_CompletedStream,
    default_stream=_CompletedStream,
    stream=lambda _: contextlib.nullcontext(),
    get_rng_state=lambda *_, **__: torch.get_rng_state(),
    set_rng_state=lambda state, *_, **__: torch.set_rng_state(state),
    manual_seed=_nothing,  # the CPU generator is seeded by torch.manual_seed
    __getattr__=lambda name: getattr(torch.cuda, name),
)


class _Loader(importlib.machinery.SourceFileLoader):
    """Load one module with its device names rewritten. No bytecode is cached."""

    def get_code(self, fullname: str) -> types.CodeType:
        source = self.get_source(fullname)
        assert source is not None
        for pattern, replacement in _REWRITES:
            source = pattern.sub(replacement, source)
        return compile(source, self.get_filename(fullname), "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__["_cpu_device"] = _cpu_device
        super().exec_module(module)
        if change := _CHANGES.get(module.__name__):
            change(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(_REWRITTEN) or fullname.startswith(_KEPT):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def _change_random(module: Any) -> None:
    # Recomputation saves and restores the device's random generator through private functions of torch.cuda.
    module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _change_token_dispatcher(module: Any) -> None:
    # Megatron converts split sizes to numpy only when it moves them off a GPU.
    def maybe_move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    module.maybe_move_tensor_to_cpu = maybe_move


_CHANGES: dict[str, Callable[[Any], None]] = {
    "megatron.core.tensor_parallel.random": _change_random,
    "megatron.core.transformer.moe.token_dispatcher": _change_token_dispatcher,
}


def after_import(module: str, change: Callable[[Any], None]) -> None:
    """Call `change` with a module of Megatron or slime as soon as it is imported."""
    _CHANGES[module] = change


def install() -> None:
    """Make later imports of megatron run on the CPU. Do nothing if CUDA is available.

    Raise `RuntimeError` if a module of megatron is already imported.
    """
    # Megatron warns that Transformer Engine and Apex are missing; this project does not need them.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    if torch.cuda.is_available() or any(isinstance(f, _Finder) for f in sys.meta_path):
        return
    early = [name for name in sys.modules if name.startswith("megatron.")]
    if early:
        raise RuntimeError(f"megatron was imported before launch.megatron.cpu.install(): {early[0]}")
    os.environ["TORCHDYNAMO_DISABLE"] = (
        "1"  # megatron.core.jit would compile small functions, which takes longer than running them
    )
    sys.meta_path.insert(0, _Finder())
