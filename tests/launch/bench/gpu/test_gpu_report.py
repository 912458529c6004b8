"""The text that results become, from made-up figures of every kind."""

import json

import pytest

from launch.bench.gpu import gpu_report, table
from launch.bench.gpu.cases import CASES, PUBLISHED, planned
from launch.bench.gpu.measurement import write_case

AT = {"environment": {"torch": "x", "gpu": "NVIDIA H200"}}
LEAST = {
    "seconds": [10.0, 10.0],
    "parts": {"products": 4.0, "attention": 4.0, "attention backward": 2.0},
    "tflops": {"products": 700.0, "attention": 500.0, "attention backward": 400.0},
    **AT,
}
OURS = {"seconds": [12.5, 12.5], "loss": 11.9, "peak": 1e11, "attention": "cudnn", **AT}
THEIRS = OURS | {"seconds": [25.0], "attention": "sdpa, cudnn_attention", "loss_in_chunks": True}
OOM = {"out_of_memory": "CUDA out of memory", **AT}
FAILED = {"failed": "its process was ended by SIGKILL", **AT}


@pytest.fixture(scope="module")
def rows():
    return [planned(case, ["cluster=h200x1"]) for case in CASES]


def test_a_row_shows_what_was_measured_and_what_was_not(rows):
    assert "| 10,486 | 5,243 | 2.00 × | 80% |" in table.line(
        rows[0], {"ours": OURS, "theirs": THEIRS, "roofline": LEAST}
    )
    assert "| out of memory | – |" in table.line(rows[1], {"ours": OURS, "theirs": OOM})
    assert "| failed | not measured |" in table.line(rows[1], {"ours": FAILED})
    assert table.line(rows[2], {}).count("not measured") == 2


def test_the_text_has_verdicts_reasons_and_efficiencies(rows):
    good = {"ours": OURS, "theirs": THEIRS, "roofline": LEAST}
    measured = [good, {"ours": OURS, "theirs": OOM, "roofline": LEAST}, {}, {}, {"ours": OURS}, *[{}] * 5]
    text = gpu_report.tables([*zip(rows, measured, strict=True)])
    assert "- **4B, 32k**: attention by cudnn; transformers with sdpa, cudnn_attention, its loss in chunks" in text
    assert "theirs: CUDA out of memory" in text and "gpu NVIDIA H200" in text
    assert f"matmul_efficiency={700 / 989.4:.2f} flash4_efficiency={500 / 989.4:.2f}" in text and "% on 4B, 8k" in text
    assert f"{PUBLISHED['0.6B-16k'].tokens_s:,.0f} tokens/s on one H100" in text
    assert "| ≥ 1.3 × transformers at 32k | 4B, 32k 2.00 × | yes |" in text
    assert "| ≥ 85% of the roofline | 4B, 32k 80%, 4B, 8k 80% | no |" in text
    assert "| 152k tokens on one GPU | not measured | – |" in text
    nothing = gpu_report.tables([*zip(rows, [{}] * len(rows), strict=True)])
    assert "Nothing has been measured yet." in nothing and "yes" not in nothing


def test_the_longest_row_can_miss_its_target(rows):
    (longest,) = (one for one in rows if one.case.key == "4B-152k")
    for ours, said in ((OURS, "12.5 s a step | yes |"), (OOM, "out of memory | no |"), (FAILED, "failed | no |")):
        assert f"| 152k tokens on one GPU | 4B, 152k {said}" in gpu_report.tables([(longest, {"ours": ours})])


def test_a_results_folder_becomes_the_text(rows, tmp_path, capsys):
    tmp_path = tmp_path / "h200x1"
    for one in rows[1::-1]:
        write_case(tmp_path / one.case.key, one)
    (tmp_path / rows[0].case.key / "ours.json").write_text(json.dumps(OURS))
    checks = [{"name": "a check", "figure": "1 | 2", "passed": True, "seconds": 1, "numbers": {}}]
    (tmp_path / "smoke.json").write_text(json.dumps({**AT, "seconds": 50, "checks": checks}))
    gpu_report.main(tmp_path)
    text = capsys.readouterr().out
    assert "| a check | 1   2 | PASS |" in text and text.index("| 4B, 32k |") < text.index("| 4B, 8k |")
    assert text.count("| not measured | not measured |") == len(CASES) - 1
    with pytest.raises(SystemExit, match="has no row"):
        gpu_report.main(tmp_path / "nowhere")
