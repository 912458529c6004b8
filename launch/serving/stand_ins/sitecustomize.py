"""Stand-ins for packages that SGLang 0.5.23 imports everywhere but uses only on GPUs: triton, torchvision, sgl_kernel.

Python imports this file at start-up if its folder is on PYTHONPATH; only the server's process has it there. Names of a stand-in can be
imported, subclassed and used as decorators; any other call of them raises.
Libraries that only probe for the real package find it absent.
"""

import importlib.abc
import importlib.machinery
import sys
import types

ABSENT = ("triton", "torchvision")  # replaced only if they are not installed
# Replaced even if it is installed: importing it loads the driver's library, and there may be no driver.
ALWAYS = ("sgl_kernel",)
# Files that probe for these packages and would mistake a stand-in for the real one.
PROBES = ("transformers/utils/import_utils.py", "torch/utils/_triton.py", "torch/_inductor", "torch/_dynamo")


class _Kernel:
    """A function decorated with @triton.jit. Plain Python calls, as of helpers, work; launching it raises."""

    def __init__(self, function):
        self.function = function
        self.__name__ = getattr(function, "__name__", "kernel")
        self.__doc__ = getattr(function, "__doc__", None)

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    def __getitem__(self, grid):
        raise RuntimeError(f"triton kernel {self.__name__} was launched, but there is no GPU here")


class _StandIn(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name[:1].isupper():
            value = type(name, (), {"__module__": self.__name__, "__init__": lambda self, *args, **kwargs: None})
        else:
            value = _StandIn(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args, **kwargs):
        if not self.__name__.startswith("triton"):
            raise RuntimeError(f"{self.__name__} was called, but it needs a GPU")
        if len(args) == 1 and callable(args[0]) and not kwargs:  # @triton.jit
            return _Kernel(args[0])
        return lambda function: function  # @triton.autotune(...)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    torch_has_looked = False

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in self.names or self._probed():
            return None
        if name == "triton" and not self.torch_has_looked:
            # torch must find that there is no triton before a stand-in exists.
            _Finder.torch_has_looked = True
            import torch._dynamo
            import torch._inductor.runtime.hints
            import torch._inductor.utils
            import torch.utils._triton

            torch.utils._triton.has_triton_package()
            torch.utils._triton.has_triton()
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    @staticmethod
    def _probed():
        frame = sys._getframe(2)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        return frame is not None and any(probe in frame.f_code.co_filename for probe in PROBES)

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        module.__version__ = "0.0.0"
        if module.__name__ == "triton":
            module.cdiv = lambda a, b: -(-a // b)
            module.next_power_of_2 = lambda n: 1 << max(n - 1, 0).bit_length()


sys.meta_path.insert(0, _Finder(ALWAYS))
sys.meta_path.append(_Finder(ABSENT))
