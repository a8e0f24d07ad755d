"""The pre-flight check names the node and rank of every fault, and stops a run only for what must stop it."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools")]

import preflight  # noqa: E402
from node_checks import gpus, judge, machine  # noqa: E402

from megabagel.runtime import events  # noqa: E402
from tests.tiny_data import training_options, write_data  # noqa: E402

NODE_OF = {0: "node1", 1: "node1", 2: "node2", 3: "node2"}


def results(key: str, *values: float) -> dict:
    return {rank: {key: value} for rank, value in enumerate(values)}


def test_a_node_that_differs_from_the_others_is_named():
    assert judge.disagreement({"a": "1", "b": "1"}, "code") == []
    assert judge.disagreement({"a": "1", "b": "2", "c": "1"}, "code") == [
        "b has other code than 2 of 3 nodes: 2 instead of 1."
    ]


def test_the_same_fault_of_many_nodes_is_one_sentence():
    said = judge.by_node({f"node{n}": ["it is full."] for n in range(10)} | {"node99": []})
    assert said == ["node0, node1, node2, node3, node4, node5, node6, node7 and 2 more: it is full."]


def test_silent_ranks_are_named_with_their_nodes():
    assert judge.missing([2, 3], NODE_OF, "start", 60) == ["node2: rank 2, 3 did not start within 60 s."]


def test_wrong_results_and_slow_ranks_are_named():
    assert judge.wrong_sums(results("wrong", 0, 0, 5, 0), NODE_OF) == [
        "node2: rank 2 got a wrong sum in an all-reduce."
    ]
    assert "on all 4 ranks" in judge.wrong_sums(results("wrong", 1, 1, 1, 1), NODE_OF)[0]
    assert judge.wrong_products(results("product", 5.0, 5.0, 5.0001, 5.0), NODE_OF) == []
    for bad in (7.0, float("nan"), float("inf")):
        (said,) = judge.wrong_products(results("product", 5.0, bad, 5.0, 5.0), NODE_OF)
        assert said.startswith("node1: rank 1 computes wrongly")
    (said,) = judge.slow(results("link", 9.0, 10.0, 4.0, 11.0), NODE_OF, "link", "its best link has", "GB/s")
    assert said == "node2: rank 2 is slow: its best link has 4 GB/s, the median is 9.5."
    assert judge.slow(results("link", 1.0, 10.0), NODE_OF, "link", "", "") == []  # who of two is slow?


def test_what_nvidia_smi_knows_becomes_sentences():
    rows = ["0, 4, 0, No, No, Not Active", "1, 30000, 0, No, No, Not Active", "2, 4, 7, Yes, No, Active"]
    table = "\n".join([*rows, "3, 4, [N/A], [N/A], Yes, Not Active", ""])
    said = gpus.faults_of_table(table)
    assert [sentence.split()[1] for sentence in said] == ["1", "2", "2", "2", "3"]
    assert "GPU 2 had 7 uncorrectable memory errors since its driver was loaded." in said
    assert "GPU 1 has 30000 MiB in use by another process." in said


def test_a_driver_that_lacks_a_field_is_asked_without_it(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    known = gpus.FIELDS[:-1]
    smi.write_text(f"""#!/bin/sh
case "$1" in --query-gpu={",".join(known)}) echo "0, 4, 9, No, No";; *{gpus.HOT}*) echo 'Field "{gpus.HOT}" is not a valid field to query.'; exit 2;; *) exit 1;; esac
""")  # noqa: E501
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(gpus, "_reported_by_the_kernel", list)
    assert gpus.faults(2) == [
        "GPU 0 had 9 uncorrectable memory errors since its driver was loaded.",
        "1 GPUs answer, but 2 processes start here.",
    ]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("preflight")
    return training_options(write_data(folder / "data"), folder / "run")


def test_a_sound_machine_passes(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    report, run_dir = tmp_path / "report.json", tmp_path / "run"
    preflight.main(["--report", str(report), *settings, f"--checkpoint.run_dir={run_dir}"])
    assert "1 nodes, 1 ranks are ready" in capsys.readouterr().out
    assert json.loads(report.read_text())["code"] == 0
    (event,) = events.read(run_dir)
    assert event["kind"] == "preflight" and event["seconds"] > 0
    assert not list(run_dir.glob(".preflight-*"))


def test_a_wrong_setting_is_no_case_for_another_try(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    report = tmp_path / "report.json"
    preflight.main(["--report", str(report), *settings, f"--checkpoint.run_dir={tmp_path}", "--optimizer.lr=0"])
    assert json.loads(report.read_text())["code"] == 78
    assert "error: " in capsys.readouterr().out


def test_files_that_cannot_be_read_and_full_disks_are_said(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_named_files", lambda config: [tmp_path / "gone.parquet"])
    monkeypatch.setattr(machine.folder, "shortage", lambda run_dir, what, needed: f"{what} needs {needed} bytes")
    found = machine.facts([*settings, "--checkpoint.save_interval=5"], 1)
    assert found["faults"][0] == f"{tmp_path}/gone.parquet cannot be read (No such file or directory)."
    assert found["faults"][1].startswith("a checkpoint needs ") and len(found["faults"]) == 2
