"""Locate the inputs of the data stage on this machine: the tokenizer, and trajectories (fetched from the Hugging Face hub if
needed)."""

import re
from dataclasses import dataclass
from pathlib import Path

from data_prep.hub import File, Repository, download, listing, write_record
from recipes.config import Data
from recipes.errors import DataError, PreflightError

_DATA_FILE = re.compile(r"\.(jsonl?|ndjson|parquet)(\.gz|\.zst)?$")
_NO_DATA = ("dataset_infos.json", "dataset_info.json", "state.json", "config.json")


def is_hub_id(path: str) -> bool:
    """Return whether `path` has the form of a Hugging Face hub id, `ORG/NAME`."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None


@dataclass(frozen=True)
class HubPart:
    """Which part of a hub data set is read.

    revision: a commit, tag or branch; None is the newest commit. split: such as train; None means that it has only one.
    """

    revision: str | None = None
    split: str | None = None


def hub_part(data: Data, option: str = "data.path") -> HubPart:
    """Return the part that the recipe names. `data.split` is of `data.path` alone."""
    return HubPart(data.revision, data.split if option == "data.path" else None)


def data_set(path: str, root: str, part: HubPart = HubPart()) -> Repository:  # it cannot change
    """Return a hub data set with its folder and record under `cluster.root`."""
    name = "--".join(filter(None, (path, part.revision, part.split))).replace("/", "--")
    folder = Path(root) / "data-sources" / name
    # The record lies next to the folder: the data file may have any name.
    return Repository(path, "dataset", folder, folder.with_name(f"{folder.name}.json"), part.revision)


def fetched_path(repository: Repository) -> Path | None:
    """Return the file of a fetched data set, or its folder if it has several; None if it was not fetched."""
    files = repository.files()
    return None if not files else files[0] if len(files) == 1 else repository.folder


def local(path: str, root: str, option: str = "data.path", part: HubPart = HubPart()) -> Path:
    """Return the local path, or the path of the files of a hub data set (`GAIR/LIMI`): a file, or a folder of several.

    They are fetched once into `data-sources/` of `cluster.root`; later calls do not contact the hub. option: the option that gave the
    path, for messages. Raise `DataError` if the path does not exist, or if it is not certain which files of the data set are meant.
    """
    if path and Path(path).exists():
        return Path(path)
    if not is_hub_id(path):
        raise DataError(
            f"no file '{path}'", f"write {option}=FILE of trajectories, or a Hugging Face id as {option}=GAIR/LIMI"
        )
    repository = data_set(path, root, part)
    if there := fetched_path(repository):
        return there
    try:
        remote = listing(repository)
        files = _of_split(path, remote.files, part.split)
        write_record(remote, files, download(remote, files))
    except PreflightError as error:
        raise DataError(f"'{path}' is not a local file, and {error}", f"or write {option}=FILE") from error
    there = fetched_path(repository)
    assert there is not None, "the record was just written"
    return there


def _of_split(path: str, files: list[File], split: str | None) -> list[File]:
    """Return the data files of a split: `SPLIT.jsonl`, `SPLIT-00000-of-00005.parquet`, or those in a folder of its name.

    Raise `DataError` if there are none, or if the split is not certain.
    """
    data = [f for f in files if _DATA_FILE.search(f.name) and Path(f.name).name not in _NO_DATA]
    splits: dict[tuple[str, str], list[File]] = {}  # by folder and name
    for file in data:
        shard = re.fullmatch(r"(.+?)[-_.]\d{3,}(-of-\d+)?", _stem(file.name))
        key = str(Path(file.name).parent), shard[1] if shard else _stem(file.name)
        splits.setdefault(key, []).append(file)
    names = {key: key[1] if [k[1] for k in splits].count(key[1]) == 1 else f"{key[0]}/{key[1]}" for key in splits}
    fitting = [k for k in splits if split in (None, names[k], k[1]) or split in Path(k[0]).parts]
    if len(fitting) == 1:
        return splits[fitting[0]]
    listed = ", ".join([*names.values()][:10]) or "none"
    found = ", ".join(f.name for f in data[:5]) or "none"
    what = f"{len(fitting)} fit data.split={split}" if split else f"{len(splits)} of them, where one was expected"
    raise DataError(
        f"'{path}' on the Hugging Face hub has the data files {found}; its splits are {listed}: {what}",
        f"write data.split=NAME, one of {listed}" if splits else "write data.path=FILE",
    )


def _stem(name: str) -> str:
    return _DATA_FILE.sub("", Path(name).name)


def check_tokenizer(checkpoint: Path) -> None:
    """Raise `DataError` if the folder `model.checkpoint` has no tokenizer.json."""
    if not (checkpoint / "tokenizer.json").is_file():
        raise DataError(
            f"no tokenizer.json in '{checkpoint}'",
            "write model.checkpoint=FOLDER of a Hugging Face checkpoint on this machine",
        )
