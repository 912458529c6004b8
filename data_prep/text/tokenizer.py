"""A checkpoint's own tokenizer and chat template, from its local files."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_prep.source_files import check_tokenizer
from recipes import json_file
from recipes.checkpoint.checkpoint_config import AGAIN
from recipes.errors import DataError


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """Load the checkpoint's own tokenizer and chat template from its local files.

    Raise `DataError` if they are missing or broken.
    """
    check_tokenizer(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise arbitrary exceptions for broken files
        _check_readable(checkpoint)
        raise DataError(
            f"no tokenizer can be loaded from '{checkpoint}': {type(error).__name__}: {error}", AGAIN
        ) from error
    # A tokenizer.json can enable truncation. `tokenizer(text)` disables it per call; the backend tokenizer does not.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if not tokenizer.chat_template:
        raise DataError(f"'{checkpoint}' has no chat template", "add its chat_template.jinja")
    return tokenizer


def _check_readable(checkpoint: Path) -> None:
    """Raise `DataError` for the first tokenizer file that is unreadable."""
    for name in (
        "config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ):
        if (checkpoint / name).is_file():
            json_file.read_json(checkpoint / name, AGAIN, DataError)
    for path in checkpoint.rglob("*.jinja"):
        raw = path.read_bytes()
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise DataError(
                f"'{path}' is not UTF-8 in line {line}, and a chat template belongs there", AGAIN
            ) from error
