"""What the data stage reads, found on this machine: trajectories, fetched from the Hugging Face hub where need be, and a
tokenizer."""

import re
from pathlib import Path

from recipes.errors import DataError


def is_hub_id(path: str) -> bool:
    """Whether it reads like a data set's id on the Hugging Face hub."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) is not None


def local(path: str, option: str = "data.path") -> Path:
    """The local path, or the one data file of a hub data set (`GAIR/LIMI`), fetched once into the hub's own cache.

    Raises `DataError` where neither is there, or where a data set has more than one JSON file to choose from; it names the
    option that gave the path.
    """
    if path and Path(path).exists():
        return Path(path)
    if not is_hub_id(path):
        raise DataError(
            f"no file '{path}'; write {option}=FILE of trajectories, or a Hugging Face id as {option}=GAIR/LIMI"
        )
    # Here, not at the top: a local path must not pay for it.
    from huggingface_hub import HfApi, hf_hub_download

    try:
        there = HfApi().dataset_info(path)
        files = [f.rfilename for f in there.siblings or []]
        data = [f for f in files if f.endswith((".json", ".jsonl")) and f != "dataset_infos.json"]
        if len(data) == 1:
            return Path(hf_hub_download(path, data[0], repo_type="dataset", revision=there.sha))
    except Exception as error:  # the hub's own errors, and its HTTP library's
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"'{path}' is no local file, and the Hugging Face hub could not give it: {first}; write {option}=FILE, or set "
            "HF_TOKEN where the data set is gated"
        ) from error
    raise DataError(
        f"'{path}' on the Hugging Face hub has {len(data)} JSON files ({', '.join(data[:5]) or 'none'}) where one was "
        f"expected; download the one you want and write {option}=FILE"
    )


def check_tokenizer(checkpoint: Path) -> None:
    """Raises `DataError` where `model.checkpoint` is no folder with a tokenizer."""
    if not (checkpoint / "tokenizer.json").is_file():
        raise DataError(
            f"no tokenizer.json in '{checkpoint}'; write model.checkpoint=FOLDER of a Hugging Face checkpoint on this machine"
        )
