"""What the data stage reads, found on this machine: trajectories, fetched from the Hugging Face hub where need be, and a
tokenizer."""

import re
from pathlib import Path

from data_prep.hub import Repository, download, listing, write_record
from recipes.errors import DataError, PreflightError


def is_hub_id(path: str) -> bool:
    """Whether it reads like a data set's id on the Hugging Face hub."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None


def data_set(path: str, root: str) -> Repository:
    """A hub data set's place under `cluster.root`."""
    folder = Path(root) / "data-sources" / path.replace("/", "--")
    # Beside the folder: a data set's one file may have any name.
    return Repository(path, "dataset", folder, folder.with_name(f"{folder.name}.json"))


def local(path: str, root: str, option: str = "data.path") -> Path:
    """The local path, or the one data file of a hub data set (`GAIR/LIMI`), fetched once into `data-sources/` of
    `cluster.root`; after that the hub is not asked.

    Raises `DataError` where neither is there, or where a data set has more than one JSON file to choose from; it names the
    option that gave the path.
    """
    if path and Path(path).exists():
        return Path(path)
    if not is_hub_id(path):
        raise DataError(
            f"no file '{path}'", f"write {option}=FILE of trajectories, or a Hugging Face id as {option}=GAIR/LIMI"
        )
    repository = data_set(path, root)
    if fetched := repository.files():
        return fetched[0]
    try:
        there = listing(repository)
        data = [f for f in there.files if f.name.endswith((".json", ".jsonl")) and f.name != "dataset_infos.json"]
        if len(data) == 1:
            write_record(there, data, download(there, data))
            return repository.folder / data[0].name
    except PreflightError as error:
        raise DataError(f"'{path}' is no local file, and {error}", f"or write {option}=FILE") from error
    raise DataError(
        f"'{path}' on the Hugging Face hub has {len(data)} JSON files ({', '.join(f.name for f in data[:5]) or 'none'}) where "
        f"one was expected",
        f"download the one you want and write {option}=FILE",
    )


def check_tokenizer(checkpoint: Path) -> None:
    """Raises `DataError` where `model.checkpoint` is no folder with a tokenizer."""
    if not (checkpoint / "tokenizer.json").is_file():
        raise DataError(
            f"no tokenizer.json in '{checkpoint}'",
            "write model.checkpoint=FOLDER of a Hugging Face checkpoint on this machine",
        )
