"""What a start of slime shows: missing nodes, and how long a stop takes."""

import io
import time

from rich.console import Console

from launch.run import metrics
from launch.run.run_folder import RunFolder
from launch.slime.hooks import nodes, stop
from launch.slime.watch import Lines, Watch
from tests.launch.support import recipe_of


def watch(root, tmp_path, *words):
    recipe, data, heldout = recipe_of(root, "engine=slime", f"cluster.root={tmp_path}", *words)
    run, said = RunFolder(recipe, data, heldout), io.StringIO()
    run.open()
    return Watch(recipe, run, 20, Console(file=said, width=300), lambda line: None), run, said


def test_missing_nodes_are_shown_once_and_do_not_count_as_silence(root, tmp_path):
    seen, run, said = watch(root, tmp_path, "engine.timeout=1", "engine.node_timeout=60")
    (run.root / nodes.SHORTAGE).write_text("1 of 2 nodes")
    for _ in range(4):
        seen.look()
        time.sleep(0.5)
    (run.root / nodes.SHORTAGE).write_text("")
    seen.look()
    assert said.getvalue() == "1 of 2 nodes; waiting for engine.node_timeout=60 s\nevery node is in the cluster again\n"


def test_a_stop_is_requested_once_and_says_how_long_it_takes(root, tmp_path):
    seen, run, said = watch(root, tmp_path, "cluster.disk_gb_s=0.001")
    (run.root / metrics.NAME).write_text(
        '{"step": 1, "loss": 1, "time": {"step_s": 40}}\n{"step": 2, "loss": 1, "time": {"step_s": 61}}\n'
    )
    for _ in range(2):
        seen.request_stop("SIGTERM")
    assert (run.root / stop.REQUEST).exists()
    assert said.getvalue().count("SIGTERM") == 1
    assert "slime saves after step 3 and ends (a step took up to 61 s, a save takes about" in said.getvalue()
    assert "the run goes on from its base" in said.getvalue()


def test_lines_are_shown_once_they_are_whole(tmp_path):
    path = tmp_path / metrics.NAME
    path.write_bytes(b'{"step": 1}\n')
    lines = Lines(path)
    assert lines.read() == []
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + bytes(12) + b'\n{"step')  # as NFS may show it
    assert lines.read() == [{"step": 2}]
    assert lines.read() == []
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 33}\n{"step": 4}\n')
    assert lines.read() == [{"step": 33}, {"step": 4}]
