"""The versions of slime and Megatron-LM that this project was checked with, slime's images, and the packages that the project imports
inside slime."""

from typing import NamedTuple


class Version(NamedTuple):
    """A slime to train with.

    commits: those whose code was compared with `contract.py`; messages name the first. An image is built before the commit that
    names its tag, so that its own commit is one of several. image: the published image with it; None if there is none.
    """

    name: str
    commits: tuple[str, ...]
    image: str | None


# Tags: slime's `docker/version.txt` and `docker/justfile` at these commits.
PINNED = Version("21 August 2026", ("624b824a898ab0ec1fcb4d373004c7f3852bf515",), None)
NEWEST_IMAGE = Version(
    "10 August 2026",
    ("a74ae3a0ad16bd8b769d5386738e8ae3d1269d7e", "06ffdbe22be068b52f9ed0fc318c473f7030197e"),
    "slimerl/slime:nightly-dev-20260810a-cu129",
)
V0_3_1 = Version(
    "v0.3.1",
    (
        "a6272da0d4f3d0a08520c99a2f3b4f6c887960dc",
        "f655e13d9b262748441e836983deaddfe4715e22",
        "2a60f00dd27f716f8761464086f02b02061adff1",
    ),
    "slimerl/slime:nightly-dev-20260804a",
)
VERSIONS = (PINNED, NEWEST_IMAGE, V0_3_1)
IMAGE = str(NEWEST_IMAGE.image)

# In slime's Dockerfile, the same at all of these commits.
MEGATRON = "1dcf0dafa884ad52ffb243625717a3471643e087"
NUMPY = "1.26.4"
TRANSFORMER_ENGINE = "2.16.1"
# Import name: the name for pip.
PACKAGES = {
    "hydra": "hydra-core", "omegaconf": "omegaconf", "pydantic": "pydantic", "rich": "rich", "pyarrow": "pyarrow",
    "psutil": "psutil", "jinja2": "jinja2", "jsonschema": "jsonschema", "safetensors": "safetensors",
    "tokenizers": "tokenizers", "transformers": "transformers", "tensorboard": "tensorboard", "matplotlib": "matplotlib",
    "huggingface_hub": "huggingface_hub", "referencing": "referencing", "yaml": "PyYAML", "requests": "requests",
    "aiohttp": "aiohttp", "numpy": "numpy", "ray": "ray", "torch": "torch",
}  # fmt: skip


def version_of(commit: str) -> Version | None:
    """Return the version that the commit belongs to; None if it was not checked."""
    return next((version for version in VERSIONS if commit in version.commits), None)
