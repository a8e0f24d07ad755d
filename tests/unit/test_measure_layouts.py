"""What a layout costs: the bytes that are counted, the formulas beside them, and the command line.

Collectives run on torch's fake process group: one process that plays a rank of many.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]

from layouts import activation_formula, memory_formula, traffic_formula  # noqa: E402
from layouts.allocator import AllocatorPeak  # noqa: E402
from layouts.choice import DEFAULT, check_layout, parse_choice  # noqa: E402
from layouts.memory import ActivationMeter  # noqa: E402
from layouts.program import measure  # noqa: E402
from layouts.tables import STATE, ratios  # noqa: E402
from layouts.traffic import Traffic  # noqa: E402
from layouts.traffic_formula import Load  # noqa: E402
from layouts.workload import LOAD, make_packs, small_config  # noqa: E402

from megabagel.config.load import load_config  # noqa: E402
from megabagel.config.schema import ParallelConfig  # noqa: E402
from megabagel.runtime import distributed  # noqa: E402


@pytest.fixture
def four_ranks():
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


def eight_numbers() -> torch.Tensor:
    return torch.ones(8)  # 32 bytes


COLLECTIVES = {  # what rank 1 of 4 sends when each holds eight float32
    "all-reduce": (lambda x: dist.all_reduce(x), 48),
    "all-gather": (lambda x: dist.all_gather_into_tensor(torch.empty(32), x), 96),
    "reduce-scatter": (lambda x: dist.reduce_scatter_tensor(torch.empty(2), x), 24),
    "broadcast": (lambda x: dist.broadcast(x, 0), 24),
    "p2p": (lambda x: dist.batch_isend_irecv([dist.P2POp(dist.isend, x, 2), dist.P2POp(dist.irecv, x, 2)]), 32),
}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_a_collective_counts_what_a_ring_sends(kind, four_ranks):
    action, expected = COLLECTIVES[kind]
    with Traffic() as traffic:
        action(eight_numbers())
    assert dict(traffic.sent) == {kind: expected}


def test_all_to_all_counts_what_is_meant_for_others(four_ranks):
    with Traffic() as even:
        dist.all_to_all_single(torch.empty(8), eight_numbers())
    with Traffic() as uneven:
        dist.all_to_all_single(torch.empty(8), eight_numbers(), [2, 2, 2, 2], [0, 5, 2, 1])
    assert (even.sent["all-to-all"], uneven.sent["all-to-all"]) == (24, 12)


def test_coalesced_collectives_count_all_their_tensors(four_ranks):
    with Traffic() as traffic, dist._coalescing_manager(dist.group.WORLD, async_ops=True):
        dist.all_gather_into_tensor(torch.empty(32), eight_numbers())
        dist.all_gather_into_tensor(torch.empty(32), eight_numbers())
    assert traffic.sent["all-gather"] == 192


def test_a_group_of_one_rank_sends_nothing(four_ranks):
    group = dist.new_group([1])
    with Traffic() as traffic:
        dist.all_reduce(eight_numbers(), group=group)
        dist.barrier(group)
    assert not traffic.sent and not traffic.calls


def test_activations_are_counted_once_and_until_the_backward_pass():
    weight = torch.nn.Linear(16, 16)
    x = torch.ones(4, 16, requires_grad=True)
    with ActivationMeter([weight]) as meter:
        hidden = weight(x)  # keeps x: 256 bytes
        result = hidden * hidden  # keeps hidden twice: 256 bytes
        assert meter.now == meter.peak == 512
        result.sum().backward()
        del hidden, result
        assert meter.now == 0
        weight(x).sum().backward()
    assert meter.peak == 512


def test_the_default_layouts_are_legal_and_compared_with_one_of_them():
    for name in DEFAULT:
        choice = parse_choice(name)
        config = choice.apply(small_config())
        check_layout(config, 8)
        assert choice.baseline in DEFAULT


def test_every_layout_trains_on_the_same_rows():
    lengths = set()
    for name in DEFAULT:
        config = parse_choice(name).apply(small_config())
        packs = make_packs(config, 0, 4)
        lengths |= {(pack.plan.und_length, pack.plan.gen_length) for pack in packs}
        assert sum(len(pack.vae_images) for pack in packs) == 6
    assert lengths == {(256, 256)}


def test_an_unknown_part_of_a_layout_is_one_sentence():
    with pytest.raises(ValueError, match=r"^`tq=2` in --layout sp,tq=2 is unknown; allowed are dp, sp, .*\.$"):
        parse_choice("sp,tq=2")


def released() -> memory_formula.ModelConfig:
    return load_config(["--config", "bagel_7b_mot"]).model


def test_the_released_model_has_the_size_it_is_known_for():
    held = memory_formula.memory(released(), ParallelConfig(), 1)
    assert 14.5e9 < held.parameters / 2 < 14.8e9
    assert held.optimizer == 6 * held.parameters


def test_modality_experts_halve_mlp_weights_but_not_sharded_optimizer_state():
    model = released()
    alone = memory_formula.memory(model, ParallelConfig(), 8)
    pairs = memory_formula.memory(model, ParallelConfig(expert_model_parallel_size=2), 8)
    mlps = 2 * 28 * 2 * 3 * 3584 * 18944
    assert alone.parameters - pairs.parameters == mlps / 2
    assert pairs.optimizer == alone.optimizer
    one_of_four = ParallelConfig(expert_model_parallel_size=4, und_expert_ranks=1)
    quarter = memory_formula.memory(model, one_of_four, 8)
    assert quarter.parameters == pairs.parameters
    assert quarter.optimizer > alone.optimizer  # und's state lies on a quarter of the ranks


def test_tensor_parallel_traffic_grows_with_rows_and_falls_with_context_ranks():
    config = small_config()
    config.parallel = ParallelConfig(tensor_model_parallel_size=2)
    once = traffic_formula.traffic(config, 8, Load(256, 256, 8))["all-reduce"]
    twice = traffic_formula.traffic(config, 8, Load(512, 512, 8))["all-reduce"]
    # 2 of 4 packs' worth: 8 layers, 4 all-reduces of 512 rows of 128 bf16
    assert once == 2 * 8 * 4 * 512 * 128 * 2 and twice == 2 * once
    config.parallel.context_parallel_size = 2
    both = traffic_formula.traffic(config, 8, Load(256, 256, 8))
    assert both["all-reduce"] == once  # half the rows, twice the packs


@pytest.mark.parametrize("heads, kv_heads, ranks, copies", [(28, 4, 4, 4), (28, 4, 7, 28), (7, 1, 7, 7), (8, 4, 8, 8)])
def test_key_heads_travel_once_for_each_rank_that_needs_them(heads, kv_heads, ranks, copies):
    assert traffic_formula.copied_heads(heads, kv_heads, ranks) == copies


def test_what_a_process_keeps_is_what_the_formulas_say():
    choice = parse_choice("dp")
    report = measure(choice, packs_per_step=1)
    distributed.destroy()
    config = choice.apply(small_config())
    expected = memory_formula.memory(config.model, config.parallel, 1)
    for kind in STATE:
        assert getattr(report, kind) == pytest.approx(getattr(expected, kind), rel=1e-3)
    assert report.mlp_parameters == 2 * 8 * 2 * 3 * 128 * 704
    # at least what the formula counts, and little more: logarithms of sums, row statistics, the ends of the model
    kept = 512 * 8 * memory_formula.activation_bytes_per_row(config.model, 1, False, None)
    assert kept < report.activations < 1.2 * kept
    [[held]] = activation_formula.held(config, 1, LOAD)
    assert report.activations < report.peak == pytest.approx(held.total, rel=0.1)
    assert sum(report.sent.values()) == 0


def test_the_allocators_peak_leaves_out_what_follows_the_stop_and_what_was_there():
    before = torch.ones(1 << 20)
    with AllocatorPeak() as allocator:
        big = torch.ones(1 << 18)  # 1 MiB
        small = torch.ones(1 << 16)
        del big
        allocator.stop()
        later = torch.ones(1 << 21)
    assert allocator.peak == (1 << 20) + (1 << 18)
    del before, small, later


@pytest.mark.parametrize("pp, vp, rank, packs, expected", [
    (1, 1, 0, 8, 1), (4, 1, 0, 8, 4), (4, 1, 3, 8, 1), (4, 1, 0, 2, 2), (2, 2, 0, 8, 2.5), (2, 2, 1, 8, 1.5),
])  # fmt: skip
def test_how_many_packs_wait_for_their_backward_pass(pp, vp, rank, packs, expected):
    sizes = memory_formula.Sizes(1, pp, vp, 1, 1, 1)
    assert activation_formula.waiting_chunks(sizes, rank, packs) == expected


def test_frozen_parts_keep_weights_but_no_gradients():
    model = released()
    whole = memory_formula.memory(model, ParallelConfig(), 1)
    model.freeze_vit = True
    tower, _ = memory_formula.vision_parameters(model.vit, model.hidden_size)
    frozen = memory_formula.memory(model, ParallelConfig(), 1)
    assert frozen.parameters == whole.parameters
    assert whole.gradients - frozen.gradients == 4 * tower
    split = memory_formula.memory_of_ranks(model, ParallelConfig(pipeline_model_parallel_size=2), 2)
    assert all(holder.parameters > 2 * tower for stage in split for holder in stage)
    model.freeze_vit, model.freeze_und = False, True
    gen_only = memory_formula.memory(model, ParallelConfig(), 1)
    assert 0.45 < gen_only.gradients / whole.gradients < 0.55


def report(scale: int, sent: dict[str, int]) -> dict:
    kinds = ("parameters", "gradients", "optimizer", "average", "mlp_parameters", "mlp_gradients", "activations")
    return {**dict.fromkeys(kinds, scale), "sent": sent}


def test_ratios_compare_the_fullest_ranks_and_leave_out_what_data_parallelism_does_not_send():
    choices = {name: parse_choice(name) for name in ("dp", "tp=2")}
    halves = [report(5, {"all-reduce": 4}), report(4, {})]
    silent = {"dp": [report(10, {})] * 2, "tp=2": halves}
    assert ratios(silent, choices) == {"tp=2: state": 0.5, "tp=2: mlp_state": 0.5, "tp=2: activations": 0.5}
    sending = {"dp": [report(10, {"all-gather": 8})] * 2, "tp=2": halves}
    assert ratios(sending, choices)["tp=2: sent"] == 0.5
