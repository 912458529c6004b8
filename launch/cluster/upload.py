"""The size of the checkout that a job is sent."""

import logging
from collections import Counter
from pathlib import Path

from ray._private import ray_constants
from ray._private.runtime_env import packaging

from recipes.errors import PreflightError

LIMIT = ray_constants.DASHBOARD_CLIENT_MAX_SIZE  # largest upload that Ray's dashboard accepts, in bytes


def check_size(checkout: Path) -> None:
    """Raise `PreflightError` if the files that Ray would send exceed its limit. Checked before they are packed."""
    sizes: Counter[Path] = Counter()

    def count(path: Path) -> None:
        if path.is_file():
            for part in (path, *path.parents):
                if part == checkout:
                    break
                sizes[part] += path.stat().st_size
            sizes[checkout] += path.stat().st_size

    # Ray's own walk, so that exactly the files are counted that are sent.
    skipped = packaging._get_excludes(checkout, ray_constants.get_runtime_env_default_excludes())
    packaging._dir_travel(checkout, [skipped], count, include_gitignore=True, logger=logging.getLogger(__name__))
    total = sizes.pop(checkout, 0)
    if total > LIMIT:
        raise PreflightError(
            f"the checkout has {total / 1e6:,.0f} MB to send, but Ray accepts at most {LIMIT / 1e6:,.0f} MB",
            f"the largest are {', '.join(_largest(sizes, total))}: move them under cluster.root, or list them in .rayignore",
        )


def _largest(sizes: Counter[Path], total: int) -> list[str]:
    """Return up to three paths with at least a tenth of the total size. Name a folder only if no single item in it dominates."""
    dominated = {path.parent for path, size in sizes.items() if size > 0.9 * sizes[path.parent]}
    named = [(p, s) for p, s in sizes.most_common() if s >= total / 10 and p not in dominated]
    return [f"{path} ({size / 1e6:,.0f} MB)" for path, size in named[:3]]
