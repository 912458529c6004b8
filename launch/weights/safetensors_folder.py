"""A Hugging Face folder of safetensors, read one tensor at a time."""

from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from launch.weights import safetensors_file
from launch.weights.hf_folder import INDEX, weight_map
from launch.weights.safetensors_file import Entry
from recipes.checkpoint.checkpoint_config import AGAIN
from recipes.errors import CheckpointError


class SafetensorsFolder:
    """The tensors of a folder. Raise `CheckpointError` if its files or index are missing or broken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def files(self) -> dict[str, str]:
        """{tensor: file name}, from the index or from the single file."""
        if (self.folder / INDEX).is_file():
            return weight_map(self.folder)
        single = self.folder / "model.safetensors"
        if not single.is_file():
            raise CheckpointError(
                f"no safetensors in '{self.folder}'", "write model.checkpoint=FOLDER of a Hugging Face checkpoint"
            )
        return dict.fromkeys(safetensors_file.entries(single), single.name)

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Dtype, shape and offset of every tensor, from the file headers."""
        there = {name: safetensors_file.entries(self.folder / name) for name in sorted(set(self.files.values()))}
        if missing := [name for name, file in self.files.items() if name not in there[file]]:
            raise CheckpointError(f"'{self.folder}' lacks {missing[0]}, which its index names", "copy the folder anew")
        return {name: there[file][name] for name, file in self.files.items()}

    def read(self, name: str) -> Tensor:
        """Return one tensor by name. Raise `CheckpointError` if it is missing or unreadable."""
        if name not in self.files:
            raise CheckpointError(f"'{self.folder}' has no tensor {name}", "check model.* against its config.json")
        path = self.folder / self.files[name]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{name} cannot be read from '{path}': {error}", AGAIN) from error
