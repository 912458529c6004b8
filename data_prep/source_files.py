"""Locate the inputs of the data stage on this machine: the tokenizer, and trajectories (fetched from the Hugging Face hub if
needed)."""

import re
from pathlib import Path

from data_prep.hub import Repository, download, listing, write_record
from recipes.errors import DataError, PreflightError


def is_hub_id(path: str) -> bool:
    """Return whether `path` has the form of a Hugging Face hub id, `ORG/NAME`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None


def data_set(path: str, root: str) -> Repository:
    """Return a hub data set with its folder and record under `cluster.root`."""
    folder = Path(root) / "data-sources" / path.replace("/", "--")
    # The record lies next to the folder: the data file may have any name.
    return Repository(path, "dataset", folder, folder.with_name(f"{folder.name}.json"))


def local(path: str, root: str, option: str = "data.path") -> Path:
    """Return the local path, or the path of the one data file of a hub data set (`GAIR/LIMI`).

    The file is fetched once into `data-sources/` of `cluster.root`; later calls do not contact the hub. Raise `DataError` if
    neither exists, or if the data set does not have exactly one JSON file. option: the option that gave the path, for
    messages.
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
        remote = listing(repository)
        data = [f for f in remote.files if f.name.endswith((".json", ".jsonl")) and f.name != "dataset_infos.json"]
        if len(data) == 1:
            write_record(remote, data, download(remote, data))
            return repository.folder / data[0].name
    except PreflightError as error:
        raise DataError(f"'{path}' is not a local file, and {error}", f"or write {option}=FILE") from error
    raise DataError(
        f"'{path}' on the Hugging Face hub has {len(data)} JSON files ({', '.join(f.name for f in data[:5]) or 'none'}) where "
        f"one was expected",
        f"download the one you want and write {option}=FILE",
    )


def check_tokenizer(checkpoint: Path) -> None:
    """Raise `DataError` if the folder `model.checkpoint` has no tokenizer.json."""
    if not (checkpoint / "tokenizer.json").is_file():
        raise DataError(
            f"no tokenizer.json in '{checkpoint}'",
            "write model.checkpoint=FOLDER of a Hugging Face checkpoint on this machine",
        )
