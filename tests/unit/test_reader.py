"""The reader as a whole: independence of workers, exact resume everywhere, no sample lost or repeated."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from megabagel.data.faults import DataError
from megabagel.packing.plan import CAUSAL
from tests.unit.data_fixtures import (
    DROPOUT_OFF,
    edit_group,
    make_reader,
    same_pack,
    t2i_group,
    vlm_group,
    vlm_line,
)


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """All three formats; conversations are mandatory and one of them is broken."""
    folder = tmp_path_factory.mktemp("data")
    lines = [vlm_line(n) for n in range(8)]
    lines[3] = "{broken"
    return {
        "t2i_pretrain": t2i_group(folder, weight=2.0),
        "unified_edit": edit_group(folder),
        "vlm_sft": vlm_group(folder, lines, is_mandatory=True, weight=0.5),
    }


def read(reader, number):
    """Packs and the state after each, the state before the first one in front."""
    states, packs = [reader.state_dict()], []
    for _ in range(number):
        packs.append(next(reader))
        states.append(json.loads(json.dumps(reader.state_dict())))
    return packs, states


@pytest.fixture(scope="module")
def reference(groups):
    with make_reader(groups) as reader:
        return read(reader, 24)


def test_packs_keep_limits_and_start_with_the_mandatory_group(reference):
    packs, states = reference
    assert any(state["buffer"] for state in states)  # or the tests below would prove little
    for pack in packs:
        assert 100 < pack.plan.sequence_length <= 130
        assert pack.groups[0] == "vlm_sft"
        assert len(pack.groups) == len(pack.keys) == len(pack.origins) == pack.plan.sample_lens.numel()
        assert len(pack.vae_images) == len(pack.plan.latent_grids) == len(pack.plan.image_keys)
        assert len(pack.vit_images) == len(pack.plan.vit_seqlens)
        for image, (rows, columns) in zip(pack.vae_images, pack.plan.latent_grids.tolist(), strict=True):
            assert image.shape == (3, rows * 16, columns * 16) and image.is_contiguous()
        for key in pack.plan.image_keys.tolist():
            assert tuple(key[:-1]) in pack.keys
    assert {group for pack in packs for group in pack.groups} == {"t2i_pretrain", "unified_edit", "vlm_sft"}


@pytest.mark.parametrize("num_workers", [1, 4])
def test_packs_and_states_do_not_depend_on_workers(groups, reference, num_workers):
    with make_reader(groups, num_workers=num_workers) as reader:
        packs, states = read(reader, 24)
    assert states == reference[1]
    assert all(same_pack(a, b) for a, b in zip(packs, reference[0], strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_exact_at_every_position(groups, reference, num_workers):
    packs, states = reference
    with make_reader(groups, num_workers=num_workers) as reader:
        for position in [*range(22), 3]:  # also back
            reader.load_state_dict(json.loads(json.dumps(states[position])))
            assert reader.state_dict() == states[position]
            for offset in range(2):
                assert same_pack(next(reader), packs[position + offset])
                assert reader.state_dict() == states[position + offset + 1]


def test_resume_is_exact_in_the_middle_of_a_pack(groups, reference):
    """The open pack is part of the state too, so a state taken between two samples continues as well."""
    with make_reader(groups) as reader:
        next(reader)
        packer, entry = reader._packer, reader._packer.fetch
        calls = Counter()

        def interrupted(group):
            calls[group] += 1
            if sum(calls.values()) == 4:
                raise InterruptedError
            return entry(group)

        packer.fetch = interrupted
        with pytest.raises(InterruptedError):
            next(reader)
        state = reader._snapshot()
    assert len(state["open"]) >= 2
    with make_reader(groups) as reader:
        reader.load_state_dict(state)
        assert same_pack(next(reader), reference[0][1])


@pytest.mark.parametrize("size", [1, 2])
def test_no_sample_is_lost_or_repeated_in_a_pass(groups, size):
    used = Counter()
    for rank in range(size):
        with make_reader({"t2i_pretrain": groups["t2i_pretrain"]}, rank, size) as reader:
            while reader.state_dict()["counts"][0] < 60 // size:  # two passes of 24 and a half, some still waiting
                used.update(next(reader).keys)
            state = reader.state_dict()
        assert all(position % size == rank for _, position in state["buffer"])
    assert [used[0, row, visit] for visit in range(2) for row in range(24)] == [1] * 48


def test_passes_differ_in_order_and_draws(groups):
    with make_reader({"t2i_pretrain": groups["t2i_pretrain"]}, **DROPOUT_OFF) as reader:
        keys = [key for _ in range(16) for key in next(reader).keys]
    rows = {visit: [key[1] for key in keys if key[2] == visit] for visit in range(2)}
    assert rows[0][:10] != rows[1][:10]


def test_condition_dropout_follows_its_probabilities(groups):
    lone = {"t2i_pretrain": groups["t2i_pretrain"]}
    with make_reader(lone, text_cond_dropout_prob=0.4) as reader:
        packs = [next(reader) for _ in range(40)]
    samples = sum(pack.plan.sample_lens.numel() for pack in packs)
    texts = sum(int((pack.plan.split_modes == CAUSAL).sum()) for pack in packs)
    assert 0.3 < 1 - texts / samples < 0.5
    assert all(len(pack.vae_images) == pack.plan.sample_lens.numel() for pack in packs)


@pytest.mark.parametrize("lines", [None, "text only", "no loss"])
def test_packs_may_lack_any_modality(tmp_path, groups, lines):
    if lines is None:  # no text loss, no ViT picture
        chosen = {"t2i_pretrain": groups["t2i_pretrain"]}
    else:
        turns = vlm_line(0)["conversations"]
        content = [{"conversations": turns if lines == "text only" else turns[:1]}]
        chosen = {"vlm_sft": vlm_group(tmp_path, content)}
    with make_reader(chosen) as reader:
        pack = next(reader)
    plan = pack.plan
    assert not pack.vit_images and not plan.vit_seqlens.numel()
    assert bool(pack.vae_images) == (lines is None) == bool(plan.gen_index.numel()) == bool(plan.mse_rows.numel())
    assert bool(plan.ce_rows.numel()) == (lines == "text only")
    assert plan.gen_length >= 16


def test_foreign_states_are_refused(groups, reference):
    state = reference[1][3]
    with make_reader(groups, 0, 2) as reader:
        with pytest.raises(
            DataError, match=r"data_parallel \[0, 1\], this run has \[0, 2\]; resume with the same number"
        ):
            reader.load_state_dict(state)
    with make_reader({"vlm_sft": groups["vlm_sft"]}) as reader:
        with pytest.raises(DataError, match="resume with the same groups"):
            reader.load_state_dict(state)


def test_fault_counts_belong_to_the_packs_handed_out(groups, reference):
    final = reference[1][-1]
    passes = final["counts"][2] / 8  # one broken line in each pass of 8
    assert int(passes) <= final["faults"]["num_bad"]["vlm_sft"]["broken_json"] <= passes + 1
    with make_reader(groups, num_workers=1) as reader:
        reader.load_state_dict(reference[1][20])
        assert reader.fault_counts() == reference[1][20]["faults"]["num_bad"]


KILLED = """
import sys, os
from pathlib import Path
from tests.unit.data_fixtures import make_reader, t2i_group

def main():
    reader = make_reader({"t2i_pretrain": t2i_group(Path(sys.argv[1]))}, num_workers=2)
    next(reader)
    print(*reader._loader._pool._processes, flush=True)
    os.kill(os.getpid(), 9)

if __name__ == "__main__":
    main()
"""


def test_workers_do_not_outlive_a_killed_trainer(tmp_path):
    program = tmp_path / "killed.py"
    program.write_text(KILLED)
    process = subprocess.run(
        [sys.executable, program, tmp_path],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        timeout=60,
    )
    assert process.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in process.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker still runs 10 s after its trainer was killed"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_worker_is_one_sentence(tmp_path):
    with make_reader({"t2i_pretrain": t2i_group(tmp_path)}, num_workers=1) as reader:
        next(reader)
        os.kill(next(iter(reader._loader._pool._processes)), signal.SIGKILL)
        with pytest.raises(DataError, match="a data worker process died, most likely killed for lack of host memory"):
            for _ in range(50):
                next(reader)
