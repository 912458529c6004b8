"""The versions in slime's Dockerfile with which this project was checked, and the packages that its code imports inside slime."""

SLIME = "624b824a898ab0ec1fcb4d373004c7f3852bf515"
MEGATRON = "1dcf0dafa884ad52ffb243625717a3471643e087"
NUMPY = "1.26.4"
TRANSFORMER_ENGINE = "2.16.1"
# Import name: the name for pip.
PACKAGES = {
    "hydra": "hydra-core", "omegaconf": "omegaconf", "pydantic": "pydantic", "rich": "rich", "pyarrow": "pyarrow",
    "psutil": "psutil", "jinja2": "jinja2", "jsonschema": "jsonschema", "safetensors": "safetensors",
    "tokenizers": "tokenizers", "transformers": "transformers", "tensorboard": "tensorboard", "matplotlib": "matplotlib",
}  # fmt: skip
