"""What a job is sent of the checkout."""

import logging
from collections import Counter
from pathlib import Path

from ray._private import ray_constants
from ray._private.runtime_env import packaging

from recipes.errors import PreflightError

LIMIT = ray_constants.DASHBOARD_CLIENT_MAX_SIZE  # bytes, of Ray's dashboard


def check_size(checkout: Path) -> None:
    """Raises `PreflightError` where the files that Ray would send are over its limit, before they are packed."""
    sizes: Counter[Path] = Counter()

    def count(path: Path) -> None:
        if path.is_file():
            for part in (path, *path.parents):
                if part == checkout:
                    break
                sizes[part] += path.stat().st_size
            sizes[checkout] += path.stat().st_size

    # Ray's own walk, so that what is counted is what is sent.
    skipped = packaging._get_excludes(checkout, ray_constants.get_runtime_env_default_excludes())
    packaging._dir_travel(checkout, [skipped], count, include_gitignore=True, logger=logging.getLogger(__name__))
    total = sizes.pop(checkout, 0)
    if total > LIMIT:
        raise PreflightError(
            f"the checkout has {total / 1e6:,.0f} MB to send, and Ray takes {LIMIT / 1e6:,.0f} MB",
            f"the largest are "
            f"{', '.join(_largest(sizes, total))}: move them under cluster.root, or name them in .rayignore",
        )


def _largest(sizes: Counter[Path], total: int) -> list[str]:
    """Up to three paths of a tenth of the whole or more, a folder standing for what is spread inside it."""
    inner = {
        path.parent for path, size in sizes.items() if size > 0.9 * sizes[path.parent]
    }  # one thing makes them large
    named = [(p, s) for p, s in sizes.most_common() if s >= total / 10 and p not in inner]
    return [f"{path} ({size / 1e6:,.0f} MB)" for path, size in named[:3]]
