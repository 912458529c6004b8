"""What recipes/ does without."""

import subprocess
import sys

from recipes.paths import REPO


def test_recipes_need_neither_torch_nor_ray():
    done = subprocess.run([sys.executable, "-m", "tests.recipes.imports"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
