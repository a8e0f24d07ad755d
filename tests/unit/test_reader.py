"""The reader as a whole: the same packs for any replicas and workers, exact resume, no sample lost or repeated."""

import hashlib
import json
import random
from collections import Counter

import pytest

from megabagel.data import reader, workers
from megabagel.data.faults import DataError
from megabagel.data.loader import SampleMaker
from megabagel.data.mixture import Mixture
from megabagel.data.order import GroupOrder
from megabagel.data.pack import BLANK
from megabagel.data.prepare import Preparer
from megabagel.data.steps import EndOfData
from megabagel.packing.plan import CAUSAL
from tests.unit.data_fixtures import (
    DROPOUT_OFF,
    edit_group,
    make_reader,
    reader_arguments,
    same_pack,
    t2i_group,
    vlm_group,
    vlm_line,
)
from tests.unit.reader_fixtures import Rows, group, replicas

REPEATS = {"a": 2, "b": 1}
SOURCES = {"a": Rows(37, bad=frozenset({3}), late=frozenset({7})), "b": Rows(50)}
GROUPS = {
    "a": group(repeats=REPEATS["a"], weight=2.0, is_mandatory=True),
    "b": group(repeats=REPEATS["b"]),
}
EPOCH = {
    (index, row, visit)
    for index, (name, source) in enumerate(SOURCES.items())
    for row in range(source.num_rows)
    for visit in range(REPEATS[name])
    if row not in source.bad | source.late
}


def fields_of(packing: str) -> dict:
    return {"packing": packing, "max_buffer_size": 6, "text_cond_dropout_prob": 0.0}


def keys(steps: list) -> Counter:
    """How often each sample was handed out."""
    return Counter(key for step in steps for pack in step for key in pack.keys if pack.groups[0] != BLANK)


def same_steps(ours: list, theirs: list) -> bool:
    """Bitwise."""
    return len(ours) == len(theirs) and all(
        same_pack(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.fixture(scope="module", params=["greedy", "best_fit", "balanced"])
def whole(request):
    """Packing, all steps of one replica without workers, and the state before each and after the last."""
    with replicas(GROUPS, SOURCES, **fields_of(request.param)) as alone:
        steps, states = [], [alone.state()]
        while step := alone.steps(1):
            steps += step
            states.append(alone.state())
    return request.param, steps, states


def test_every_sample_comes_once_per_repeat(whole):
    _, steps, states = whole
    assert keys(steps) == Counter(EPOCH)
    assert len(steps) >= 3 and all(len(step) == 12 for step in steps)
    assert any(state["waiting"] for state in states)  # or the tests below would prove little
    faults = states[-1]["faults"]
    assert faults["num_good"] == {"a": 2 * 35, "b": 50}
    assert faults["num_bad"] == {"a": {"bad_row": 2, "undecodable_image": 2}, "b": {}}
    assert states[-1]["counts"] == [74, 50]


@pytest.mark.parametrize(
    ("whole", "size", "workers"),
    [(packing, size, 0) for packing in ("greedy", "best_fit") for size in (2, 3, 4)]
    + [("balanced", size, workers) for size in (1, 2, 3, 4) for workers in (0, 1, 2, 3)],
    indirect=["whole"],
)
def test_packs_and_states_do_not_depend_on_replicas_and_workers(whole, size, workers):
    packing, steps, states = whole
    with replicas(GROUPS, SOURCES, size, num_workers=workers, **fields_of(packing)) as readers:
        for number, step in enumerate(steps):
            ours = readers.next_step()
            if packing == "balanced":  # who gets which pack depends on the number of replicas
                ours, step = (sorted(packs, key=lambda pack: pack.keys) for packs in (ours, step))
            assert same_steps([ours], [step])
            assert readers.state() == states[number + 1]
        assert readers.steps() == []
        assert readers.state() == states[-1]


def test_resume_with_other_replicas_and_workers_completes_the_epoch(whole):
    packing, _, _ = whole
    draw = random.Random(packing)
    for _ in range(7):
        state, steps = None, []
        while state is None or steps[-1:] != [None]:
            size = draw.choice([1, 2, 3, 4])
            with replicas(GROUPS, SOURCES, size, **fields_of(packing)) as readers:
                if state is not None:
                    readers.load(state)
                    assert readers.state() == state
                steps += readers.steps(draw.randint(1, 2)) or [None]
                state = readers.state()
        assert keys(steps[:-1]) == Counter(EPOCH)


def test_resume_in_the_same_layout_gives_the_same_bytes(whole):
    packing, steps, states = whole
    with replicas(GROUPS, SOURCES, 2, **fields_of(packing)) as readers:
        expected = readers.steps()
        for position in [*range(len(steps)), 1]:  # also back
            readers.load(states[position])
            assert readers.state() == states[position]
            assert same_steps(readers.steps(2), expected[position : position + 2])


def test_another_global_batch_continues_the_same_packs():
    with replicas(GROUPS, SOURCES, **fields_of("greedy")) as readers:
        expected = [pack for step in readers.steps() for pack in step]
    with replicas(GROUPS, SOURCES, global_batch_size=4, **fields_of("greedy")) as readers:
        packs = [pack for step in readers.steps(2) for pack in step]
        state = readers.state()
    with replicas(GROUPS, SOURCES, 3, global_batch_size=6, **fields_of("greedy")) as readers:
        readers.load(state)
        packs += [pack for step in readers.steps() for pack in step]
    assert same_steps([packs[: len(expected)]], [expected[: len(packs)]])
    assert keys([packs]) == Counter(EPOCH)


def official_packs(maker: SampleMaker, mixture: Mixture, config, mandatory: list[int], number: int) -> list[list]:
    """BAGEL's packer as its data set class has it, over the samples in order."""
    counts, draws, waiting, packs = Counter(), 0, [], []

    def fetch(index: int):
        while True:
            sample = maker.measure(index, counts[index])
            counts[index] += 1
            if hasattr(sample, "pieces"):
                return sample

    while len(packs) < number:
        pack, fill = [], 0
        for index in mandatory:
            found = next((sample for sample in waiting if sample.key[0] == index), None)
            if found is not None:
                waiting.remove(found)
            sample = found or fetch(index)
            if fill + sample.num_tokens <= config.max_num_tokens:
                pack, fill = [*pack, sample], fill + sample.num_tokens
            else:
                waiting.append(sample)
        while fill < config.expected_num_tokens:
            full = len(waiting) > config.max_buffer_size
            fits = [sample for sample in waiting if fill + sample.num_tokens <= config.max_num_tokens]
            if fits and (full or fill < config.prefer_buffer_before):
                waiting.remove(fits[0])
                pack, fill = [*pack, fits[0]], fill + fits[0].num_tokens
                continue
            if full:
                break
            sample = fetch(mixture.group(draws))
            draws += 1
            if fill + sample.num_tokens <= config.max_num_tokens:
                pack, fill = [*pack, sample], fill + sample.num_tokens
                continue
            waiting.append(sample)
            if len(waiting) > config.max_buffer_size:
                break
        packs.append([sample.key for sample in pack])
    return packs


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """The official formats; conversations are mandatory and one of them is broken."""
    folder = tmp_path_factory.mktemp("data")
    lines = [vlm_line(n) for n in range(8)]
    lines[3] = "{broken"
    return {
        "t2i_pretrain": t2i_group(folder, 16, weight=2.0),
        "unified_edit": edit_group(folder),
        "vlm_sft": vlm_group(folder, lines, is_mandatory=True, weight=0.5),
    }


def next_pack(reader):
    (pack,) = reader.next_step()
    return pack


@pytest.fixture(scope="module")
def reference(groups):
    """24 packs of the official formats and the state before each."""
    with make_reader(groups) as reader:
        states, packs = [], []
        for _ in range(24):
            states.append(json.loads(json.dumps(reader.state_dict())))
            packs.append(next_pack(reader))
    return packs, states


def test_greedy_packs_are_those_of_the_official_packer(groups, reference):
    config, tokenizer, geometry = reader_arguments()
    maker = SampleMaker(groups, Preparer(groups, config, tokenizer, geometry), config.seed)
    mixture = Mixture({name: g.weight for name, g in groups.items()}, config.seed)
    assert [pack.keys for pack in reference[0]] == official_packs(maker, mixture, config, [2], 24)


def test_packs_keep_limits_and_start_with_the_mandatory_group(reference):
    packs, _ = reference
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


def test_packs_never_change(reference):
    """Frozen: a change here breaks resume and reproducibility of every run."""
    digest = hashlib.blake2b(digest_size=8)
    for pack in reference[0]:
        for image in (*pack.vae_images, *pack.vit_images):
            digest.update(image.numpy().tobytes())
        digest.update(pack.plan.text_ids.numpy().tobytes())
    assert digest.hexdigest() == "e065666c24f0e1c6"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_exact_at_every_step(groups, reference, num_workers):
    packs, states = reference
    with make_reader(groups, num_workers=num_workers) as reader:
        for position in [*range(22), 3]:  # also back
            reader.load_state_dict(json.loads(json.dumps(states[position])))
            assert reader.state_dict() == states[position]
            for offset in range(2):
                assert same_pack(next_pack(reader), packs[position + offset])
                assert reader.state_dict() == states[position + offset + 1]


def test_passes_differ_in_order(groups):
    with make_reader({"t2i_pretrain": groups["t2i_pretrain"]}, **DROPOUT_OFF) as reader:
        seen = [key for _ in range(16) for key in next_pack(reader).keys]
    rows = {visit: [key[1] for key in seen if key[2] == visit] for visit in range(2)}
    assert rows[0][:10] != rows[1][:10]


def test_condition_dropout_follows_its_probabilities(groups):
    lone = {"t2i_pretrain": groups["t2i_pretrain"]}
    with make_reader(lone, text_cond_dropout_prob=0.4) as reader:
        packs = [next_pack(reader) for _ in range(40)]
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
        pack = next_pack(reader)
    plan = pack.plan
    assert not pack.vit_images and not plan.vit_seqlens.numel()
    assert bool(pack.vae_images) == (lines is None) == bool(plan.gen_index.numel()) == bool(plan.mse_rows.numel())
    assert bool(plan.ce_rows.numel()) == (lines == "text only")
    assert plan.gen_length >= 16


def test_states_of_other_data_are_refused(groups, reference):
    state = reference[1][3]
    with make_reader({"vlm_sft": groups["vlm_sft"]}) as reader:
        with pytest.raises(DataError, match="resume with the same groups"):
            reader.load_state_dict(state)
    with make_reader(groups) as reader:
        with pytest.raises(DataError, match=r"num_rows \[1, 2, 3\], this run has \[16, 10, 8\]; resume with the same"):
            reader.load_state_dict({**state, "num_rows": [1, 2, 3]})


def test_numbers_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="global_batch_size is 12, but must be a multiple of the 5 data-parallel"):
        with replicas(GROUPS, SOURCES, 5):
            raise AssertionError
    with pytest.raises(ValueError, match="2 readers need an exchange"):
        with replicas(GROUPS, SOURCES):
            make_reader(GROUPS, 0, 2)


def test_groups_end_and_the_others_go_on():
    """A group that has ended is neither drawn nor mandatory."""
    groups = {"a": group(repeats=1, is_mandatory=True, weight=9.0), "b": group(weight=1.0)}
    with replicas(groups, {"a": Rows(20), "b": Rows(30)}, global_batch_size=2) as readers:
        packs = [pack for step in readers.steps(20) for pack in step]
    assert sorted(key[1] for pack in packs for key in pack.keys if key[0] == 0) == list(range(20))
    last = max(number for number, pack in enumerate(packs) if "a" in pack.groups)
    assert all(pack.groups[0] == "a" for pack in packs[:last])
    assert all(set(pack.groups) == {"b"} for pack in packs[last + 1 :])


def test_packs_that_nothing_is_left_for_hold_a_blank_text():
    groups = {"a": group(repeats=1)}
    with replicas(groups, {"a": Rows(4)}, 2) as readers:
        (step,) = readers.steps()
        with pytest.raises(EndOfData, match="as often as it may be"):
            readers.next_step()
    blank = [pack for pack in step if pack.groups == [BLANK]]
    assert len(blank) >= 8 and len(step) == 12 and step[-len(blank) :] == blank
    for pack in blank:
        assert not pack.plan.ce_rows.numel() and not pack.plan.mse_rows.numel() and pack.plan.sequence_length == 2


@pytest.mark.parametrize(("size", "num_workers"), [(1, 0), (2, 0), (2, 1)])
def test_a_limited_number_of_packs_is_the_same_each_time(size, num_workers):
    groups = {"a": group(repeats=1)}
    with replicas(groups, {"a": Rows(60)}, global_batch_size=4) as readers:
        expected = [pack for step in readers.steps() for pack in step][:6]
    assert BLANK not in [name for pack in expected for name in pack.groups]
    fields = {"global_batch_size": 4, "max_packs": 6, "num_workers": num_workers}
    with replicas(groups, {"a": Rows(60)}, size, **fields) as readers:
        start = readers.state()
        for _ in range(2):
            first, second = readers.steps()
            assert same_steps([first + second[:2]], [expected])
            assert [pack.groups for pack in second[2:]] == [[BLANK]] * 2
            readers.load({**start, "faults": readers.state()["faults"]})


def test_a_sample_whose_picture_is_broken_leaves_its_pack():
    broken = Rows(25, late=frozenset({0, 10, 15}))
    whole = {"a": group(repeats=1)}
    with replicas(whole, {"a": broken}, 2, global_batch_size=2) as readers:
        ours = [pack for step in readers.steps() for pack in step]
        assert readers.state()["faults"]["num_bad"] == {"a": {"undecodable_image": 3}}
        assert readers.state()["faults"]["num_good"] == {"a": 22}
    with replicas(whole, {"a": Rows(25)}, 2, global_batch_size=2) as readers:
        theirs = [pack for step in readers.steps() for pack in step]
    left = [[key for key in pack.keys if key[1] not in {-1, *broken.late}] for pack in theirs]
    assert [pack.keys for pack in ours if pack.groups != [BLANK]] == [keys for keys in left if keys]
    for pack in ours:
        assert len(pack.vae_images) == len(pack.plan.latent_grids)


def test_a_pack_that_loses_all_its_samples_holds_a_blank_text():
    source, fields = Rows(6, late=frozenset({0})), {"max_num_tokens_per_sample": 130, "expected_num_tokens": 1}
    with replicas({"a": group(repeats=1)}, {"a": source}, global_batch_size=6, **fields) as readers:
        (step,) = readers.steps()
    assert [len(pack.keys) for pack in step] == [1] * 6
    assert sorted(key[1] for pack in step for key in pack.keys) == [-1, 1, 2, 3, 4, 5]


class RecordingPool:
    """Works here, but only when asked for a result, and remembers what it was asked to load."""

    def __init__(self, maker) -> None:
        self._pool, self.tasks = workers.open_pool(maker, 0), []

    def submit(self, kind, *arguments):
        self.tasks.append(kind)
        return self._pool.submit(kind, *arguments)

    def close(self) -> None:
        self._pool.close()


@pytest.mark.parametrize(("prefetch_mib", "most_ahead"), [(0, 1), (1024, reader.MAX_STEPS_AHEAD)])
def test_reading_ahead_is_bounded_and_starts_with_the_first_step(monkeypatch, prefetch_mib, most_ahead):
    pools = []
    monkeypatch.setattr(reader, "open_pool", lambda maker, _: pools.append(RecordingPool(maker)) or pools[0])
    fields = {"prefetch_mib": prefetch_mib, "num_workers": 1, "global_batch_size": 1, "max_num_tokens_per_sample": 130}
    ahead = []
    with replicas({"a": group()}, {"a": Rows(20)}, expected_num_tokens=1, **fields) as readers:
        assert not pools[0].tasks  # a state may still be loaded
        for done in range(1, 30):
            ((pack,),) = readers.steps(1)
            assert len(pack.keys) == 1
            ahead.append(pools[0].tasks.count("load") - done)
    assert ahead[0] >= 1 and ahead[-1] == max(ahead) == most_ahead


def test_too_many_bad_rows_end_the_run_after_the_steps_before():
    source = Rows(400, bad=frozenset(range(0, 400, 2)))
    with replicas({"a": group()}, {"a": source}, 2, max_bad_fraction=0.3) as readers:
        with pytest.raises(DataError, match=r"group a: \d+ of \d+ rows \(\d+.\d%\) cannot be used \(bad_row"):
            for _ in range(40):
                readers.next_step()
        rows = readers.state()["faults"]
        assert rows["num_bad"]["a"]["bad_row"] + rows["num_good"]["a"] >= 100
    with replicas({"a": group()}, {"a": Rows(30, bad=frozenset(range(30)))}) as readers:
        with pytest.raises(DataError, match="group a: not one of 30 rows of a full pass can be used"):
            readers.next_step()


def test_a_sample_that_waited_and_is_gone_at_resume_is_a_fault():
    with replicas(GROUPS, SOURCES, **fields_of("best_fit")) as readers:
        readers.steps(1)
        state = readers.state()
    index, position = state["waiting"][0]
    name = list(GROUPS)[index]
    _, row = GroupOrder(SOURCES[name].blocks, 42, index).row(position)
    gone = {**SOURCES, name: Rows(SOURCES[name].num_rows, SOURCES[name].bad | {row}, SOURCES[name].late)}
    with replicas(GROUPS, gone, 2, **fields_of("best_fit")) as readers:
        readers.load(state)
        after = readers.state()
        assert len(after["waiting"]) < len(state["waiting"])
        before = state["faults"]["num_good"][name]
        assert after["faults"]["num_good"][name] == before - len(state["waiting"]) + len(after["waiting"])
