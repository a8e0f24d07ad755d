"""The planner: what it finds is legal, fits and is read by the trainer; time follows peers, failures follow theory."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]

import plan_parallelism  # noqa: E402
from layouts.choice import parse_choice  # noqa: E402
from planning import peers  # noqa: E402
from planning.cluster import cluster_of  # noqa: E402
from planning.failures import Schedule, best_interval, daly, simulate, young  # noqa: E402
from planning.report import layout_name  # noqa: E402
from planning.search import search, with_layout  # noqa: E402
from planning.timing import step_time, vit_imbalance  # noqa: E402
from planning.work import pack_work  # noqa: E402

from megabagel.config.checks import check_config, check_layout  # noqa: E402
from megabagel.config.load import load_config  # noqa: E402
from megabagel.config.pipeline_split import RECIPE  # noqa: E402
from megabagel.config.schema import ParallelConfig  # noqa: E402
from megabagel.training.cost_model import cost_model  # noqa: E402
from tests.tiny_data import CHECKPOINT, training_options, write_data  # noqa: E402


def released(packs: int):
    config = load_config(["--config", "bagel_7b_mot"])
    config.training.global_batch_size = packs
    return config


@pytest.fixture(scope="module")
def found():
    return search(released(32), cluster_of("H100", 32), RECIPE, lost=0.0, reserve=6e9)


def test_every_plan_is_legal_fits_and_comes_in_order_of_time(found):
    plans, smallest = found
    assert len(plans) > 20
    for plan in plans:
        check_layout(plan.case.config, 32)
        assert plan.fits and plan.budget.total <= 80e9
    steps = [plan.time.step for plan in plans]
    assert steps == sorted(steps)
    assert smallest.budget.total <= min(plan.budget.total for plan in plans)
    for plan in plans:  # 88 GB of weights and gradients have to be split
        assert max(plan.case.sizes.tp, plan.case.sizes.pp, plan.case.sizes.ep) > 1


def test_a_plans_name_gives_the_same_layout_again(found):
    for plan in found[0][:20]:
        choice = parse_choice(layout_name(plan.case.config))
        again = with_layout(plan.case.config, ParallelConfig(**choice.parallel), choice.recompute)
        assert again == plan.case.config


def test_parts_of_a_plan_add_up(found):
    best = found[0][0]
    time = best.time
    assert time.step == pytest.approx(sum(v for n, v in vars(time).items() if n != "mfu"))
    assert best.budget.weights * 2 == best.budget.gradients
    # model FLOPs over what 32 GPUs could do in that time
    work = pack_work(best.case.config, RECIPE, 32768)
    assert time.mfu == pytest.approx(work.model * 32 / (time.step * 32 * 989e12))


def test_a_packs_work_is_what_training_counts():
    config = released(1)
    each = cost_model(config.model)
    work = pack_work(config, RECIPE, 10_000)
    assert work.linears == each.und_token * 3700 + each.gen_token * 6300
    assert work.heads == each.ce_row * 200 + each.mse_row * 4200
    assert pack_work(config, RECIPE, 10_000, stored=True).autoencoder == 0 < work.autoencoder


def test_more_of_everything_helps(found):
    """More memory keeps more plans; slower links, more padding and a pipeline with few packs cost time."""
    best = found[0][0].case
    roomy, _ = search(released(32), cluster_of("H200", 32), RECIPE, 0.0, 6e9)
    assert len(roomy) > len(found[0])
    assert roomy[0].time.step < found[0][0].time.step
    slow = replace(best, cluster=replace(best.cluster, nvlink=best.cluster.nvlink / 4))
    assert step_time(slow).tensor == pytest.approx(4 * step_time(best).tensor)
    piped = with_layout(best.config, ParallelConfig(pipeline_model_parallel_size=4), "full")
    few, many = (replace(best, config=piped) for _ in range(2))
    many.config.training.global_batch_size = 32
    few = replace(few, config=with_layout(piped, piped.parallel, "full"))
    few.config.training.global_batch_size = 8
    share = [step_time(case).bubble / step_time(case).step for case in (few, many)]
    assert share[0] > share[1] > 0


def test_a_modality_expert_with_most_rows_sets_the_pace():
    config = released(32)
    times = {}
    for und in (1, 2, 3):
        parallel = ParallelConfig(expert_model_parallel_size=4, und_expert_ranks=und)
        case = replace(peers.peer_case(peers.BRIDGE), config=with_layout(config, parallel, "full"))
        times[und] = step_time(case).compute
    assert times[2] < times[1] < times[3]  # of 100 rows 37 are und's


def test_links_beyond_a_node_share_its_network_cards():
    cluster = cluster_of("H100", 64)
    assert cluster.ring(8, 1) == cluster.nvlink
    assert cluster.ring(64, 1) == 8 * cluster.network
    assert cluster.ring(16, 4) == 2 * cluster.network
    assert cluster.exchange(4, 1) == cluster.nvlink
    assert cluster.network < cluster.exchange(16, 1) < cluster.nvlink
    with pytest.raises(ValueError, match="^--gpu X1 is not in the table .* --network.$"):
        cluster_of("X1", 8, memory=1e9)
    assert cluster_of("X1", 8, memory=1e9, peak=1e12, bandwidth=1e9, nvlink=1e9, network=1e9).peak == 1e12


def test_vision_imbalance_goes_through_the_measured_points():
    assert [vit_imbalance(n) for n in (1, 2, 3, 4, 8, 64)] == pytest.approx([1, 1.08, 1.34, 1.6, 3.2, 8])


def test_the_time_model_follows_what_peers_published():
    lost = peers.fitted_loss()
    bridge = step_time(peers.peer_case(peers.BRIDGE, lost))
    assert bridge.step == pytest.approx(peers.BRIDGE.seconds)
    assert bridge.mfu == pytest.approx(peers.BRIDGE.mfu, rel=0.15)  # they count pairs that a mask hides
    # not fitted: the official code scatters and gathers, waits for data and pads pictures, which nothing here knows
    official = step_time(peers.peer_case(peers.OFFICIAL, lost))
    assert -0.3 < official.step / peers.OFFICIAL.seconds - 1 < 0
    # not fitted either: dense models, where nothing beyond the model is lost
    low, high = peers.DENSE_MFU
    assert low <= step_time(peers.dense_case()).mfu <= high


def test_the_written_configuration_is_what_training_accepts(tmp_path, capsys):
    data = write_data(tmp_path / "data", rows=3)
    others = [*training_options(data, tmp_path / "run"), "--training.params_dtype=bf16"]
    out = tmp_path / "run.yaml"
    arguments = ["--model", str(CHECKPOINT), "--gpu", "H100", "--gpus", "4", "--packs", "8", "--write", str(out)]
    assert plan_parallelism.main([*arguments, *others]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = load_config(["--config", str(out)])
    assert layout_name(written) == result["layout"]
    check_config(written, 4)


@pytest.mark.parametrize("arguments, sentence", [
    (["--gpus", "1", "--packs", "1"], "no layout fits into 80 GB on 1 GPUs: "),
    (["--gpus", "8", "--layout", "tp=8"], "model.num_attention_heads 28 does not divide by parallel.tensor_model_para"),
    (["--gpus", "8", "--mix", "vae=90"], "--mix vae=90 has more than 100 "),
    (["--gpus", "8", "--mix", "pixels=1"], "`pixels=1` in --mix is unknown"),
    (["--model", "tiny"], "the planner counts bf16 training"),
    (["--gpu", "H1"], "--gpu H1 is not in the table"),
])  # fmt: skip
def test_what_cannot_be_planned_is_one_sentence(arguments, sentence, capsys):
    assert plan_parallelism.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(sentence) and printed.err.count("\n") == 1 and not printed.out


def schedule(**changed) -> Schedule:
    return replace(Schedule(16384, 50_000 * 3600, 5, 0, 300), **changed)


@pytest.mark.parametrize("gpus", [256, 4096, 16384])
def test_the_best_interval_is_youngs_and_dalys(gpus):
    one = schedule(gpus=gpus)
    interval, effective = best_interval(one, step=1)
    assert interval == pytest.approx(young(one), rel=0.3) and interval == pytest.approx(daly(one), rel=0.3)
    # the optimum is flat: what the closed form's interval loses is next to nothing
    assert effective.useful - simulate(one, daly(one)).useful < 5e-4
    for other in (interval / 4, interval * 4):
        assert simulate(one, other).useful < effective.useful
    assert effective.useful + effective.stall + effective.repeated + effective.down == pytest.approx(1)


def test_effective_time_follows_its_closed_form():
    """Daly's expected time of a run with exponential failures; independent draws agree within their spread."""
    from math import exp, expm1

    one = schedule(stall=30)
    mean, interval = one.mean_uptime, 900.0
    expected = interval / (mean * exp(one.restart / mean) * expm1((interval + one.stall) / mean))
    for seed in (1, 2):
        assert simulate(one, interval, failures=100_000, seed=seed).useful == pytest.approx(expected, rel=2e-3)


def test_slower_checkpoints_and_restarts_cost_time():
    best = simulate(schedule(), 600).useful
    for changed in ({"durable": 300}, {"restart": 1200}, {"stall": 60}, {"mtbf": 10_000 * 3600}):
        assert simulate(schedule(**changed), 600).useful < best


def test_simulation_prints_the_interval_in_steps(capsys):
    assert plan_parallelism.main(["--simulate", "--gpus", "1024", "--step", "8", "--interval", "3600"]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert f"every {round(result['interval_s'] / 8)} steps of 8.00 s" in printed
    assert "| 256 |" in printed and "| 1024 |" in printed
