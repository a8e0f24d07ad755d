"""What validation reads, how losses of rows become numbers, and when a run ends for want of progress."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megabagel.config.checks_validation import validation_faults
from megabagel.config.schema import Config, TrainingConfig
from megabagel.models.fp8_history import forgotten
from megabagel.models.heads import ChunkLosses
from megabagel.models.loss_rows import loss_rows
from megabagel.packing.chunk import chunk_of
from megabagel.packing.geometry import geometry_of
from megabagel.training import held_out
from megabagel.training.best import Best
from megabagel.training.console import Console
from megabagel.training.loss_table import LossTable, metric_names
from tests.distributed.layouts.packs import SPECIAL, make_pack
from tests.distributed.layouts.run import tiny_config
from tests.tiny_data import write_data

GROUPS = ["a", "b"]
SHIFT = 3.0


def pack_and_groups(kind: str):
    pack = make_pack(kind, (0, 0), geometry_of(tiny_config({}).model, SPECIAL), 64, None)
    return pack.plan, [GROUPS[place % 2] for place in range(len(pack.groups))]


def table_of(plan, groups, cp: int = 1, tp: int = 1, sequence_parallel: bool = False) -> LossTable:
    """Every row's loss is its position in the sequence, on ranks that each report what they would; summed up."""
    tables = []
    for cp_rank in range(cp):
        for tp_rank in range(tp):
            layout = SimpleNamespace(cp_rank=cp_rank, cp_size=cp, tp_rank=tp_rank, tp_size=tp)
            table = LossTable(GROUPS, SHIFT, layout, sequence_parallel)
            chunk = chunk_of(plan, cp_rank, cp)
            rows = loss_rows(chunk, *((tp_rank, tp) if sequence_parallel else (0, 1)))
            ce = plan.und_index[chunk.ce_rows + cp_rank * chunk.und_length].float()
            mse = plan.gen_index[rows.latents + chunk.latents.start].float()
            table.add(plan, groups, ChunkLosses(ce.sum(), mse.sum(), ce, mse))
            tables.append(table)
    for other in tables[1:]:
        tables[0].take(tables[0].sums() + other.sums())
    return tables[0]


def expected(plan, groups) -> dict[str, list[float]]:
    """Name -> losses, row by row."""
    found: dict[str, list[float]] = {}
    bounds = [0, *plan.sample_lens.cumsum(0).tolist()]
    for kind, index, rows in (("ce", plan.und_index, plan.ce_rows), ("mse", plan.gen_index, plan.mse_rows)):
        for row in rows.tolist():
            position = int(index[row])
            sample = next(s for s in range(len(groups)) if bounds[s] <= position < bounds[s + 1])
            names = [kind, f"groups/{groups[sample]}/{kind}"]
            if kind == "mse":
                t = 1 / (1 + math.exp(-float(plan.timesteps[row])))
                t = SHIFT * t / (1 + (SHIFT - 1) * t)
                names.append(f"mse_t{math.floor(t * 10) / 10:.1f}-{math.floor(t * 10 + 1) / 10:.1f}")
            for name in names:
                found.setdefault(name, []).append(float(position))
    return found


@pytest.mark.parametrize("kind", ["many samples", "mixed", "frames", "three images", "no image", "no image, no loss"])
@pytest.mark.parametrize("ranks", [{}, {"cp": 2}, {"tp": 2}, {"cp": 2, "tp": 2, "sequence_parallel": True}])
def test_every_row_counts_once_for_its_group_and_its_time(kind, ranks):
    plan, groups = pack_and_groups(kind)
    values = table_of(plan, groups, **ranks).values(TrainingConfig(ce_weight=0.5))
    rows = expected(plan, groups)
    means = {name: sum(losses) / len(losses) for name, losses in rows.items()}
    assert set(values) == set(metric_names(GROUPS))
    for name, value in values.items():
        kind = name.split("/")[-1]
        if kind.startswith(("ce", "mse")):
            assert value == (pytest.approx(means[name]) if name in means else None), name
    for prefix in ("", "groups/a/", "groups/b/"):
        ce, mse = means.get(f"{prefix}ce"), means.get(f"{prefix}mse")
        parts = [weight * value for weight, value in ((0.5, ce), (1.0, mse)) if value is not None]
        assert values[f"{prefix}loss"] == (pytest.approx(sum(parts)) if parts else None)
        assert values[f"{prefix}perplexity"] == (None if ce is None else pytest.approx(math.exp(ce)))


def test_a_text_that_fills_an_empty_pack_counts_nothing():
    plan, _ = pack_and_groups("no image, no loss")
    assert set(table_of(plan, ["blank"]).values(TrainingConfig()).values()) == {None}


def test_times_of_the_last_bin_stay_in_it():
    plan, groups = pack_and_groups("gen loss only")
    plan.timesteps.fill_(40.0)  # a time of 1 after rounding
    assert table_of(plan, groups).values(TrainingConfig())["mse_t0.9-1.0"] is not None


@pytest.mark.parametrize(
    ("packs", "batch", "replicas", "pipeline", "virtual", "step"),
    [
        (64, 1024, 4, 1, None, 64),
        (5, 1024, 4, 1, None, 8),
        (64, 8, 4, 1, None, 8),
        (1, 16, 2, 4, 2, 8),
        (9, 64, 2, 4, 2, 16),
    ],
)
def test_a_step_of_held_out_packs_suits_the_layout(packs, batch, replicas, pipeline, virtual, step):
    config = Config()
    config.validation.packs, config.training.global_batch_size = packs, batch
    config.parallel.pipeline_model_parallel_size = pipeline
    config.parallel.virtual_pipeline_model_parallel_size = virtual
    assert held_out.held_out_config(config, replicas).training.global_batch_size == step
    assert config.data.text_cond_dropout_prob == 0.1 and config.training.global_batch_size == batch


def test_training_files_among_the_held_out_ones_are_found(tmp_path):
    ours, theirs = (held_out.held_out_groups(str(write_data(tmp_path / name, rows=1))) for name in ("a", "b"))
    assert held_out.shared_files(ours, theirs) == []
    theirs["vlm_sft"] = ours["vlm_sft"]
    assert held_out.shared_files(ours, theirs) == [str(tmp_path / "a" / "vlm_sft" / "rows.jsonl")]
    assert all(group.repeats == 1 for group in ours.values())


def test_a_run_ends_when_it_has_not_got_better_for_long_enough():
    best = Best("validation/ce", patience=2)
    history = [3.0, 2.0, 2.5, 1.9, math.nan, None]
    better = [best.update(step, {"validation/ce": value}) for step, value in enumerate(history, 1)]
    assert better == [True, True, False, True, False, False]
    assert best.is_exhausted and (best.value, best.step) == (1.9, 4)
    assert "1.9 after step 4" in best.sentence() and "validation.patience" in best.sentence()
    resumed = Best("validation/ce", patience=3)
    resumed.load_state_dict({"samples": 7, **best.state_dict()})
    assert not resumed.is_exhausted and (resumed.value, resumed.step, resumed.stale) == (1.9, 4, 2)
    assert not resumed.update(7, {"validation/ce": 1.9}) and resumed.is_exhausted
    resumed.load_state_dict({"samples": 7})  # of a run without validation
    assert resumed.update(8, {"validation/ce": 50.0})


def test_without_patience_a_run_never_ends_early():
    best = Best("validation/ce")
    for step in range(1, 50):
        best.update(step, {"validation/ce": float(step)})
    assert best.stale == 48 and not best.is_exhausted


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"interval": -1}, "validation.interval is -1"),
        ({"interval": 5}, "validation.dataset_config_file is not set"),
        ({"packs": 0}, "validation.packs is 0"),
        ({"patience": 0}, "validation.patience is 0"),
        ({"patience": 3}, "validation.interval 0"),
        ({"interval": 5, "dataset_config_file": "x", "weights": "ema", "ema_decay": None}, "optimizer.ema_decay null"),
        ({"keep_best": 2}, "checkpoint.keep_best is 2, but validation.interval 0"),
        (
            {"interval": 3, "dataset_config_file": "x", "keep_best": 2, "save_interval": 10},
            "save_interval 10 is not a multiple of validation.interval 3",
        ),
    ],
)
def test_contradictions_are_one_sentence(changes, fragment):
    config = Config()
    homes = {name: home for home in (config.optimizer, config.checkpoint, config.validation) for name in vars(home)}
    for name, value in changes.items():
        setattr(homes[name], name, value)
    (fault, *_) = validation_faults(config)
    assert fragment in fault and fault.endswith(".")


def test_the_default_configuration_has_no_fault():
    assert list(validation_faults(Config())) == []


def test_a_validation_is_a_line_of_the_console(capsys):
    console = Console(0, 10, progress_bar=False)
    names = ("loss", "ce", "perplexity", "mse")
    console.show_validation(4, {f"validation/{name}": 1.5 for name in names} | {"validation/seconds": 2.0})
    console.show_validation(6, {f"validation/ema/{name}": None for name in names})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "validation after step 4 | loss 1.5000 | ce 1.5000 | perplexity 1.5000 | mse 1.5000"
    assert second == "validation of the average after step 6 | loss - | ce - | perplexity - | mse -"


def test_delayed_scaling_learns_nothing_from_held_out_data():
    """A stand-in for Transformer Engine's modules, which note the largest values of each forward pass."""
    seen, other = nn.Module(), nn.Module()
    seen.fp8_meta = {"scaling_fwd": SimpleNamespace(amax_history=torch.tensor([[1.0, 2.0], [3.0, 4.0]]))}
    other.fp8_meta = {"scaling_fwd": SimpleNamespace()}  # of a recipe without history
    history = seen.fp8_meta["scaling_fwd"].amax_history
    with forgotten([nn.Sequential(seen, other, nn.Linear(2, 2))]):
        history[0] = 9.0
    assert history.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_the_table_of_an_empty_pass_has_no_loss():
    layout = SimpleNamespace(cp_rank=0, cp_size=1, tp_rank=0, tp_size=1, device=torch.device("cpu"))
    assert LossTable(GROUPS, SHIFT, layout, False).values(TrainingConfig())["loss"] is None
