"""What the Hugging Face hub refuses, and its HTTP library raises, in words that say what fixes it; and the token it is asked with."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from recipes.errors import PreflightError


def token() -> str | Literal[False]:
    """`HF_TOKEN` of the environment; False keeps huggingface_hub from looking for one elsewhere."""
    found = os.environ.get("HF_TOKEN", "").strip()
    # A header cannot hold it, and the HTTP library's error would show it.
    if not re.fullmatch(r"[!-~]*", found):
        raise PreflightError("HF_TOKEN holds blanks or letters that no token has", "set it to the token alone")
    return found or False


@contextmanager
def explained(kind: str, name: str) -> Iterator[None]:
    """Raises `PreflightError` where the block asked the hub for this `model` or `dataset` and did not get it."""
    from httpx2 import HTTPError
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    it, may = f"the {kind} {name}", "the token in HF_TOKEN may not read it" if token() else "HF_TOKEN is not set"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise PreflightError(f"HF_HUB_OFFLINE is set, and {it} is not on this machine", "unset it to fetch") from error
    except GatedRepoError as error:
        raise PreflightError(
            f"{it} is gated, and {may}", "accept its terms on the hub and set HF_TOKEN to a token of that account"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise PreflightError(
            f"the hub has no {kind} {name}, or it is private and {may}", "fix the id or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise PreflightError(
            f"the commit at which {it} was begun is no longer on the hub", "remove its folder to fetch the newest"
        ) from error
    except (HfHubHTTPError, HTTPError) as error:
        gave = "did not give" if isinstance(error, HfHubHTTPError) else "could not be reached for"
        raise PreflightError(
            f"the hub at {constants.ENDPOINT} {gave} {it}: {_first_line(error)}",
            "the same command goes on from what has come",
        ) from error


def _first_line(error: Exception) -> str:
    """Without the token, and without the signatures that the hub's addresses of large files end with."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"(https?://[^\s?']+)\?[^\s']*", r"\1", said.replace(token() or "\n", "***"))
