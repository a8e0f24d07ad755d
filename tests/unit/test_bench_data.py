"""The data benchmark runs: the reader and the plain pipeline read the same files, and its memory mode ends."""

import json

import pytest

from tools import bench_data


@pytest.mark.parametrize(
    ("options", "ratio"),
    [(("--latents",), "stored moments, features / plain"), (("--memory",), "MiB at the end / after a fifth")],
)
def test_a_short_run_ends_in_its_ratios(options, ratio, tmp_path, capsys):
    bench_data.main(["--smoke", "--folder", str(tmp_path), *options])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["bench"] == "data" and result["ratios"][ratio] > 0
    assert all(value > 0 for value in result["ratios"].values())
