"""What is said of a start of slime that failed, by the end of its log."""

import errno
import os
import shutil

import pytest

from launch.run.run_folder import RunFolder
from launch.slime.failure import NAME, failure, leave
from recipes.errors import CheckpointError, DivergedError, PreflightError, TrainError
from tests.launch.support import recipe_of

NAN = (
    "RuntimeError: Rank 0, node n, device cpu, iteration -1: Unexpected result nan (message='found NaN in local grad norm for "
    "bucket #0 in backward pass before data-parallel communication collective')"
)


@pytest.fixture
def said(root, tmp_path):
    """What the end of a log gives: `said(text of earlier starts, text of this one)`."""
    run = RunFolder(*recipe_of(root, "run=failures"))
    run.root.mkdir(parents=True, exist_ok=True)
    log = tmp_path / "train.log"

    def of(before, text, status=1):
        log.write_text(before + text)
        return failure(run, log, len(before), status, 7)

    of.run = run
    return of


@pytest.mark.parametrize("cause", ["NaN in local grad norm", "Inf in local grad norm", "NaN in local forward loss"])
def test_a_gradient_that_megatron_finds_not_finite_is_a_divergence(said, cause):
    error = said("", NAN.replace("NaN in local grad norm", cause) + "\nTimer actor_train end\n")
    assert type(error) is DivergedError
    assert f"step 7: Megatron found {cause}, which was not applied; try a smaller optim.lr" in str(error)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_cannot_be_written_is_not_tried_again(said, code):
    error = said("", f"OSError: {OSError(code, os.strerror(code))}\n" + "RuntimeError: collective failed\n" * 20)
    assert type(error) is CheckpointError, "retries are for TrainError"
    assert os.strerror(code) in str(error) and "make room there" in str(error)


def test_a_disk_so_full_that_the_log_was_cut(said, monkeypatch):
    assert type(said("", "Timer save_mo")) is TrainError
    full = shutil.disk_usage("/")._replace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    error = said("", "Timer save_mo")
    assert type(error) is CheckpointError
    assert "the disk is full; 0 MB are free" in str(error)


@pytest.mark.parametrize("kind", [TrainError, DivergedError, CheckpointError, PreflightError])
def test_an_error_of_the_projects_own_comes_as_it_was_raised(said, kind):
    run = said.run.root
    raised = kind("step 3: loss 9.0; over 5 times", "write engine.spike=null")
    leave(run, raised)
    try:
        error = said("", "RayTaskError(TrainError): a wording of Ray's\n" + NAN)
    finally:
        (run / NAME).unlink()
    assert type(error) is kind and (error.problem, error.fix) == (raised.problem, raised.fix)
    leave(run, ValueError("of others' code"))
    assert not (run / NAME).exists()


def test_an_earlier_start_is_not_blamed(said):
    earlier = NAN + "\n"
    error = said(earlier, "", status=-9)
    assert type(error) is TrainError
    assert "slime ended with status -9" in str(error)


def test_the_cause_with_a_name_is_found_under_what_followed_it(said):
    text = (
        "torch.OutOfMemoryError: CUDA out of memory.\n" + "DistBackendError: NCCL error: remote process exited\n" * 5000
    )
    assert "slime failed: OutOfMemoryError: CUDA out of memory." in str(said("", text))
    text = "ImportError: no flash attention\n" + "loaded\n" * 500
    assert "slime ended with status 1" in str(said("", text)), "long before, and gone on from"


def test_only_the_end_of_a_long_log_is_read(said):
    text = "OSError: [Errno 28] No space left on device\n" + "fine\n" * (1 << 20) + "ValueError: three\n"
    assert "slime failed: ValueError: three" in str(said("", text))
