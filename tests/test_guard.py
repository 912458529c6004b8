"""The markers: what the guard takes for more than a quick test may start, and what it says."""

import pytest

from tests.examples import pytest_on
from tests.guard import starts


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("/usr/bin/ray start --head", "Ray"),
        ("/x/ray/core/src/ray/gcs/gcs_server --port=1", "Ray"),
        ("/x/raylet --node", "Ray"),
        ("python -m sglang.launch_server --port 1", "a server"),
        ("python tests/launch/serving/fake_server.py 1 good", "a server"),
        ("python launch/limi.py run=x", "`limi.py train`"),
        ("python launch/limi.py sanity run=x", "`limi.py sanity`"),
        ("python tests/launch/train_only.py run=x", "`train_only.py train`"),
        ("make train MODEL=x", "`make train`"),
        ("make help", None),
        ("make -n train", None),
        ("make train dry_run=true", None),
        ("python launch/limi.py plan run=train", None),
        ("python -m tests.recipes.imports", None),
        ("git log", None),
    ],
)
def test_what_a_command_starts(words, what):
    assert starts(words.split()) == what


def test_a_test_without_a_marker_that_starts_ray_fails_and_is_told_which(tmp_path):
    done = pytest_on(tmp_path, "starting", "-p", "tests.guard")
    said = "starts Ray, which a quick test may not; mark it with @pytest.mark.run"
    assert f"Failed: test_starting.py::test_unmarked {said}" in done.stdout
    assert f"Failed: test_starting.py::test_unmarked_with_a_fixture {said}" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 failed, 3 passed, 1 error in "), done.stdout
