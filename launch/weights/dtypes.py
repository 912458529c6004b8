"""The dtypes that can be trained and exported, by their names in safetensors."""

import torch

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
