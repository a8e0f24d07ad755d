"""Which classes a layer is built of, fused norms in training and checkpoints, and FP8's settings, rules and contexts.

Transformer Engine's classes are stood in for (`stand_ins.py`): nothing here ran on its kernels.
"""

import contextlib
import dataclasses
import logging
from unittest import mock

import pytest
import torch

from megabagel.checkpoint import hf
from megabagel.checkpoint.hf import stage_rules
from megabagel.checkpoint.names import Rule
from megabagel.config.checks import ConfigError, check_model
from megabagel.config.precision import RECIPES, rows_per_tile
from megabagel.config.schema import Config, KernelConfig, ParallelConfig
from megabagel.models import precision
from megabagel.models.build import transformer_config
from megabagel.models.modality_experts import ModalityExchange
from megabagel.models.precision import Capability
from megabagel.models.specs import layer_spec
from megabagel.runtime import distributed
from tests.distributed.layouts.gradients import reduced_gradients
from tests.distributed.layouts.run import make_trainer, tiny_config
from tests.unit.stand_ins import CLASSES, HOPPER

from megatron.core.extensions import transformer_engine  # isort: skip  after the adapter
from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip
from megatron.core.transformer import transformer_block  # isort: skip

IMPLEMENTATIONS = ("local", "transformer_engine")
STEPS = (("mixed", "three images"),) * 2
BF16 = {"training.params_dtype": "bf16"}
FP8 = {**BF16, "kernels.fp8": "hybrid"}


@pytest.fixture
def engine(monkeypatch):
    """A machine with Transformer Engine on a GPU of the Hopper generation, as far as our code can tell."""
    for name, stand_in in CLASSES.items():
        monkeypatch.setattr(transformer_engine, name, stand_in)
    monkeypatch.setattr(precision, "probe", lambda: HOPPER)


def trainer(implementation: str, options: dict | None = None, steps=STEPS):
    distributed.destroy()
    return make_trainer({"kernels.transformer_impl": implementation, **(options or {})}, steps)


def released(trainer) -> dict[str, torch.Tensor]:
    """Every parameter, by the names of the released tensors behind it."""
    rules = stage_rules(trainer.stages[0].module)
    return {rules[n].names: p.detach().clone() for n, p in trainer.stages[0].module.named_parameters()}


@pytest.fixture(scope="module", autouse=True)
def leave():
    yield
    distributed.destroy()


# --------------------------------------------------------------------------------------------- classes, as data
NAMES = ("input_layernorm", "linear_qkv", "linear_proj", "pre_mlp_layernorm")  # then linear_fc1, linear_fc2
LOCAL = ("RMSNorm", "ColumnParallelLinear", "RowParallelLinear", "RMSNorm", "ColumnParallelLinear", "RowParallelLinear")
FUSED = ("Identity", "TELayerNormColumnParallelLinear", "TERowParallelLinear")
APART = ("RMSNorm", "TEColumnParallelLinear", "TERowParallelLinear")
LAYERNORM = {"training.recompute_granularity": "selective", "training.recompute_modules": ["layernorm"]}
SPARSE = {"model.und_num_experts": 2, "model.gen_num_experts": 2}


def classes(options: dict, capability: Capability = HOPPER, expert_rank: int = 0) -> list[tuple[str, ...]]:
    """Of each stream: class names of its norms and linears."""
    config = tiny_config({**BF16, **options})
    with mock.patch.object(precision, "probe", lambda: capability):
        spec = layer_spec(transformer_config(config), config.model, config.parallel, expert_rank).submodules
    found = []
    for stream in (spec.und, spec.gen):
        names = [getattr(stream, name).module[1] for name in NAMES]
        inner = stream.mlp.submodules if stream.mlp else None
        names += [getattr(inner, name).module[1] for name in ("linear_fc1", "linear_fc2")] if inner else []
        found.append(tuple(names))
    return found


@pytest.mark.parametrize(
    "options, und, gen",
    [
        ({"kernels.transformer_impl": "local"}, LOCAL, LOCAL),
        ({}, FUSED * 2, FUSED * 2),
        *[({**FP8, "kernels.fp8_recipe": recipe}, FUSED * 2, FUSED * 2) for recipe in RECIPES],
        ({"model.layer_variant": "dense"}, FUSED * 2, FUSED * 2),
        ({"model.layer_variant": "moe"}, FUSED + APART, FUSED + APART),  # one norm before two MLPs
        (LAYERNORM, APART * 2, APART * 2),
        (SPARSE, FUSED + APART[:1], FUSED + APART[:1]),
        ({"model.gen_num_experts": 2}, FUSED * 2, FUSED + APART[:1]),
        ({"parallel.expert_model_parallel_size": 2}, FUSED + APART, FUSED + APART[:1]),  # gen's MLP is elsewhere
    ],
)
def test_classes_of_both_streams(options, und, gen):
    assert classes(options) == [und, gen]


def test_auto_takes_what_the_machine_has():
    assert classes({}, Capability("it is not installed", (9, 0), (13, 0))) == [LOCAL, LOCAL]
    assert classes({"kernels.transformer_impl": "transformer_engine"}) == classes({}) != [LOCAL, LOCAL]
    assert classes({"training.params_dtype": "fp32"}) == [LOCAL, LOCAL]  # which it would round to TF32


def test_every_class_exists():
    from megabagel.models import linears

    for paths in linears._CLASSES.values():
        for path in paths.values():
            module, _, name = path.rpartition(".")
            assert hasattr(__import__(module, fromlist=[name]), name), path


# ------------------------------------------------------------------------------------- training with fused norms
@pytest.mark.parametrize("variant", ["mot", "moe", "dense", "sparse", "layernorm"])
def test_losses_and_gradients_are_those_of_the_local_layers(variant, engine):
    options = {"sparse": SPARSE, "layernorm": LAYERNORM}.get(variant, {"model.layer_variant": variant})
    found = []
    for implementation in IMPLEMENTATIONS:
        run = trainer(implementation, options)
        values = [run.train_step() for _ in STEPS]
        found.append(([v[loss] for v in values for loss in ("ce", "mse", "grad_norm")], reduced_gradients(run)))
    modules = {type(module).__name__ for module in run.stages[0].modules()}
    assert {"Column", "Row"} & modules and ("NormColumn" in modules) == (variant != "layernorm")
    assert ("Grouped" in modules) == (variant == "sparse")
    (losses, gradients), (fused_losses, fused_gradients) = found
    torch.testing.assert_close(fused_losses, losses, rtol=1e-5, atol=0)
    assert set(fused_gradients) == set(gradients)
    for name, (gradient, _) in gradients.items():
        assert (fused_gradients[name][0] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize("first, then", [IMPLEMENTATIONS, IMPLEMENTATIONS[::-1]])
def test_a_checkpoint_continues_under_the_other_implementation(first, then, engine, tmp_path):
    options = {"checkpoint.run_dir": str(tmp_path), "checkpoint.auto_resume": True, "optimizer.ema_decay": 0.5}
    saved = trainer(first, options, STEPS * 2)
    saved.train_step()
    saved.save()
    loaded = trainer(then, options, STEPS * 2)
    assert loaded.step == 1
    before, after = released(saved), released(loaded)
    assert set(before) == set(after) and all(torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.equal(*pair) for pair in zip(_state(saved), _state(loaded), strict=True))
    torch.testing.assert_close(loaded.train_step()["ce"], saved.train_step()["ce"], rtol=1e-5, atol=0)


def _state(run) -> list[torch.Tensor]:
    """Main parameters, both moments and the average of every parameter, in the order of released names."""
    rules, averages = stage_rules(run.stages[0].module), run.ema.by_parameter()
    (adam,) = run.optimizer.chained_optimizers
    tensors = {}
    for name, parameter in run.stages[0].module.named_parameters():
        if parameter not in averages:
            continue
        group, order = adam.model_param_group_index_map[parameter]
        main = adam.optimizer.param_groups[group]["params"][order]
        moments = adam.optimizer.state[main]
        tensors[rules[name].names] = [main.detach(), moments["exp_avg"], moments["exp_avg_sq"], averages[parameter][0]]
    return [tensor for names in sorted(tensors) for tensor in tensors[names]]


def test_released_weights_fill_fused_norms(engine):
    local, fused = (released(trainer(implementation)) for implementation in IMPLEMENTATIONS)
    assert set(local) == set(fused) and all(torch.equal(fused[names], value) for names, value in local.items())


# -------------------------------------------------------------------------------------------------------- FP8
@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_of_a_recipe(recipe):
    options = {"kernels.fp8_recipe": recipe}
    if RECIPES[recipe].bf16_layers:
        options |= {"kernels.num_layers_at_start_in_bf16": 1, "kernels.num_layers_at_end_in_bf16": 2}
    settings = transformer_config(tiny_config({**FP8, **options}))
    assert (settings.fp8, settings.fp8_recipe) == ("hybrid", RECIPES[recipe].megatron_name)
    assert settings.first_last_layers_bf16 == RECIPES[recipe].bf16_layers
    if RECIPES[recipe].bf16_layers:
        assert (settings.num_layers_at_start_in_bf16, settings.num_layers_at_end_in_bf16) == (1, 2)
    assert transformer_config(tiny_config(BF16)).fp8 is None


def test_layers_enter_the_fp8_context_by_their_number_and_have_legal_shapes(engine, monkeypatch):
    asked = []

    def context(config, layer_no=-1, is_init=False):
        asked.append((layer_no, is_init))
        return contextlib.nullcontext()

    monkeypatch.setattr(transformer_block, "get_fp8_context", context)
    monkeypatch.setattr(precision, "probe", lambda: dataclasses.replace(HOPPER, compute=(10, 0)))
    run = trainer("auto", {**FP8, "kernels.fp8_recipe": "mxfp8"})
    assert asked == [(layer, True) for layer in range(4)]
    run.train_step()
    assert asked[4:] == [(layer, False) for _ in STEPS[0] for layer in range(4)]
    asked.clear()
    trainer("auto", {**FP8, "kernels.fp8_recipe": "delayed"}).train_step()
    assert asked[4:] == [(-1, False)] * len(STEPS[0])  # one region around all layers


def test_a_recomputed_mlp_runs_again_with_its_scales(engine, monkeypatch):
    ran = []

    def te_checkpoint(function, distributes, tracker, group, *tensors):
        ran.append(len(tensors))
        return function(*tensors)

    monkeypatch.setattr("megabagel.models.recompute.te_checkpoint", te_checkpoint)
    selective = {"training.recompute_granularity": "selective", "training.recompute_modules": ["mlp", "core_attn"]}
    trainer("auto", {**FP8, **selective}).train_step()
    assert ran == [2] * 4 * len(STEPS[0])


def test_rows_that_travel_to_their_mlp_are_padded():
    distributed.destroy()
    distributed.initialize(ParallelConfig(), 0)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    exchange = ModalityExchange(transformer_config(tiny_config(FP8)), 1, groups)
    seen = []

    def mlp(rows):
        seen.append(len(rows))
        return rows * 2, None

    und = torch.randn(10, 1, 64, dtype=torch.bfloat16)
    out, _ = exchange(und, und[:0], mlp)
    assert seen == [16] and torch.equal(out, und * 2)


def test_an_fp8_parameter_keeps_the_unrounded_value_for_the_optimizer():
    weight, kept = torch.nn.Parameter(torch.zeros(3)), torch.full((3,), torch.nan)
    weight.get_high_precision_init_val = lambda: kept
    source = mock.Mock(read=lambda *_: torch.tensor([1.0, 2.0, 3.0]))
    with torch.no_grad():
        hf._fill_fp8(weight, source, Rule(("norm.weight",), ((3,),), None, 1), 0, 1)
    assert kept.tolist() == weight.tolist() == [1, 2, 3]


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.gathers_parameters])
def test_parameters_kept_in_fp8_are_told_to_data_parallelism_and_optimizer(recipe, engine):
    run = trainer("auto", {**FP8, "kernels.fp8_recipe": recipe, "kernels.fp8_param_gather": True})
    assert run.stages[0].module.config.fp8_param and run.stages[0].ddp_config.fp8_param_gather
    assert run.optimizer.config.fp8_recipe == RECIPES[recipe].megatron_name
    assert trainer("auto", FP8).optimizer.config.fp8_recipe is None


def test_tiles_follow_the_recipe():
    assert rows_per_tile(KernelConfig()) == 16
    assert [rows_per_tile(KernelConfig(fp8="e4m3", fp8_recipe=recipe)) for recipe in RECIPES] == [16, 16, 16, 32]


# ------------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"kernels.fp8_param_gather": True}, "kernels.fp8_param_gather is true, but kernels.fp8 is null"),
        ({"kernels.num_layers_at_end_in_bf16": 1}, "kernels.num_layers_at_end_in_bf16 is 1, but kernels.fp8 is null"),
        ({"kernels.num_layers_at_end_in_bf16": -1}, "num_layers_at_end_in_bf16 is -1, but must not be negative"),
        ({**FP8, "kernels.transformer_impl": "local"}, "needs Transformer Engine, but kernels.transformer_impl is loc"),
        ({"kernels.fp8": "e4m3"}, "kernels.fp8 e4m3 needs bf16 parameters, but training.params_dtype is fp32"),
        ({**FP8, **LAYERNORM}, "recompute_modules names layernorm, which saves nothing with kernels.fp8"),
        (
            {**FP8, "kernels.fp8_recipe": "mxfp8", "kernels.fp8_param_gather": True},
            "does not work with kernels.fp8_recipe mxfp8; allowed are delayed, current, blockwise.",
        ),
        (
            {**FP8, "kernels.fp8_recipe": "delayed", "kernels.num_layers_at_start_in_bf16": 1},
            "num_layers_at_start_in_bf16 1 does not work with kernels.fp8_recipe delayed, whose scales come from all "
            "layers together; allowed are current, blockwise, mxfp8.",
        ),
        (
            {**FP8, "kernels.num_layers_at_start_in_bf16": 2, "kernels.num_layers_at_end_in_bf16": 2},
            "kernels.num_layers_at_start_in_bf16 2 and kernels.num_layers_at_end_in_bf16 2 leave none of "
            "model.num_layers 4 in FP8",
        ),
        (
            {**FP8, "kernels.num_layers_at_end_in_bf16": 3, "parallel.pipeline_model_parallel_size": 2},
            "kernels.num_layers_at_end_in_bf16 3 is more than the 2 layers of a pipeline stage",
        ),
        (
            {**FP8, "kernels.fp8_recipe": "mxfp8", "parallel.tensor_model_parallel_size": 2},
            "model.num_attention_heads 8 with num_query_groups 2 / parallel.tensor_model_parallel_size 2 makes "
            "matrices 48 wide on a rank, but kernels.fp8_recipe mxfp8 multiplies multiples of 32",
        ),
        ({**FP8, "model.ffn_hidden_size": 100}, "model.ffn_hidden_size 100 makes matrices 100 wide"),
        (
            {**FP8, "parallel.tensor_model_parallel_size": 2, "model.ffn_hidden_size": 48},
            "model.ffn_hidden_size 48 / parallel.tensor_model_parallel_size 2 makes matrices 24 wide",
        ),
        ({**FP8, **SPARSE, "model.moe_ffn_hidden_size": 40}, "model.moe_ffn_hidden_size 40 makes matrices 40 wide"),
        (
            {**FP8, **SPARSE, "model.moe_shared_expert_intermediate_size": 24},
            "model.moe_shared_expert_intermediate_size 24 makes matrices 24 wide",
        ),
    ],
)
def test_what_no_machine_can_run_is_refused(options, sentence):
    with pytest.raises(ConfigError) as error:
        check_model(tiny_config(options))
    assert sentence in str(error.value) and "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("recipe", RECIPES)
def test_bagel_7b_may_be_planned_in_fp8_without_a_device(recipe):
    for tp in (1, 2, 4):
        config = Config(kernels=KernelConfig(fp8="hybrid", fp8_recipe=recipe))
        config.parallel.tensor_model_parallel_size = tp
        check_model(config)


NO_ENGINE = Capability("it is not installed", (9, 0), (13, 0))


@pytest.mark.parametrize(
    "kernels, capability, sentence",
    [
        (
            {"transformer_impl": "transformer_engine"},
            NO_ENGINE,
            "kernels.transformer_impl is transformer_engine, but Transformer Engine cannot run here: it is not "
            "installed; on a machine with a CUDA device install it with `pip install --no-build-isolation "
            '"transformer_engine[pytorch,core_cu13]>=2.9,<2.12"`',
        ),
        ({"fp8": "hybrid"}, NO_ENGINE, "kernels.fp8 is hybrid, but Transformer Engine cannot run here"),
        ({"fp8": "hybrid"}, Capability("there is no CUDA device", None, None), "there is no CUDA device"),
        (
            {"fp8": "hybrid"},
            Capability(None, (8, 0), (12, 8)),
            "kernels.fp8_recipe current needs compute capability 8.9 or higher, but this device has 8.0 and CUDA 12.8; "
            "set kernels.fp8 to null.",
        ),
        (
            {"fp8": "hybrid", "fp8_recipe": "blockwise"},
            Capability(None, (9, 0), (12, 8)),
            "needs compute capability 9.0 or higher and CUDA 12.9, but this device has 9.0 and CUDA 12.8; allowed are "
            "delayed, current.",
        ),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, HOPPER, "10.0 or higher and below 12.0, but this device has 9.0"),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, Capability(None, (12, 0), (13, 0)), "allowed are delayed, current"),
    ],
)
def test_what_this_machine_cannot_run_is_refused_at_the_start(kernels, capability, sentence):
    with pytest.raises(ConfigError) as error:
        precision.require(KernelConfig(**kernels), capability)
    assert sentence in str(error.value) and "\n" not in str(error.value) and str(error.value).endswith(".")


def test_what_this_machine_can_run_passes():
    for recipe, capability in (
        ("delayed", Capability(None, (8, 9), (12, 4))), ("current", HOPPER), ("blockwise", HOPPER),
        ("mxfp8", Capability(None, (10, 3), (12, 8))),
    ):  # fmt: skip
        precision.require(KernelConfig(fp8="hybrid", fp8_recipe=recipe), capability)
    precision.require(KernelConfig(), NO_ENGINE)


def test_the_fallback_is_said_once(caplog):
    precision._say_once.cache_clear()
    with caplog.at_level(logging.WARNING), mock.patch.object(precision, "probe", lambda: NO_ENGINE):
        for _ in range(2):
            trainer("auto")
        trainer("local")
    (message,) = [r.getMessage() for r in caplog.records if r.name == "megabagel.models.precision"]
    assert message.startswith("Transformer Engine cannot run (it is not installed), layers use megatron-core's own ")
    assert "slower" in message and "no FP8" in message and "pip install" in message


def test_a_broken_installation_is_told_from_a_missing_one(monkeypatch, tmp_path):
    assert precision._lacking() == "it is not installed"
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libcudnn.so.9 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    assert precision._lacking() == "it is installed but cannot be imported (libcudnn.so.9 is missing)"
