"""Turn errors of the Hugging Face hub and its HTTP library into messages with a fix; read the access token."""

import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from recipes.errors import PreflightError


def token() -> str | Literal[False]:
    """Return `HF_TOKEN` from the environment, or False: False stops huggingface_hub from looking for a token elsewhere."""
    found = os.environ.get("HF_TOKEN", "").strip()
    # A header cannot contain such a token, and the HTTP library's error would print it.
    if not re.fullmatch(r"[!-~]*", found):
        raise PreflightError("HF_TOKEN contains blanks or characters that no token has", "set it to the token alone")
    return found or False


def http() -> Any:
    """Return the module of the HTTP library that the installed huggingface_hub uses: httpx2, or httpx before its version 2."""
    from huggingface_hub.errors import HfHubHTTPError

    base = next(one for one in HfHubHTTPError.__mro__ if one.__name__ == "HTTPError")
    return importlib.import_module(base.__module__.partition(".")[0])


@contextmanager
def explained(kind: str, name: str) -> Iterator[None]:
    """Raise `PreflightError` if the block requests this repository from the hub and fails. kind: `model` or `dataset`."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, access = (
        f"the {kind} {name}",
        "the token in HF_TOKEN may not read it" if token() else "HF_TOKEN is not set",
    )
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise PreflightError(
            f"HF_HUB_OFFLINE is set, and {repository} is not on this machine", "unset it to fetch"
        ) from error
    except GatedRepoError as error:
        raise PreflightError(
            f"{repository} is gated, and {access}",
            "accept its terms on the hub and set HF_TOKEN to a token of that account",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise PreflightError(
            f"the hub has no {kind} {name}, or it is private and {access}", "fix the id or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise PreflightError(
            f"this revision of {repository}, or the commit of its unfinished download, is no longer on the hub",
            "write another data.revision, or remove its folder to fetch the newest",
        ) from error
    except (HfHubHTTPError, http().HTTPError) as error:
        outcome = "did not give" if isinstance(error, HfHubHTTPError) else "could not be reached for"
        raise PreflightError(
            f"the hub at {constants.ENDPOINT} {outcome} {repository}: {_first_line(error)}",
            "the same command goes on from what has come",
        ) from error


def _first_line(error: Exception) -> str:
    """Return the error's first line without the token and without the signatures in the URLs of large files."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"(https?://[^\s?']+)\?[^\s']*", r"\1", line.replace(token() or "\n", "***"))
