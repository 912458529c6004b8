"""Prints the versions of SGLang's kernels and of torchvision that this process finds: stand-ins, or what is installed."""

import sgl_kernel
import torchvision

if __name__ == "__main__":
    print(sgl_kernel.__version__, torchvision.__version__)
