"""Fills a model stage from weights: a BAGEL folder, a checkpoint of ours, Qwen2.5 and SigLIP folders, or from scratch.

Every rank reads only the slices that it holds. Run checkpoints (optimizer, moving average) are not this file's matter.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.names import LM_HEAD, Rule, fill_shard, rule_for
from megabagel.checkpoint.released import TorchDistSource
from megabagel.checkpoint.sources import Pretrained, SafetensorsFolder, Scratch
from megabagel.checkpoint.upcycling import Upcycled, check_experts, dense_twin
from megabagel.config.folder import LATENT_TABLE, VIT_TABLE, is_checkpoint
from megabagel.config.schema import Config, ModelConfig
from megabagel.models.bagel import Bagel
from megabagel.models.expert_mark import is_expert

AnySource = SafetensorsFolder | TorchDistSource | Pretrained | Scratch | Upcycled

logger = logging.getLogger(__name__)


def open_source(config: Config) -> AnySource:
    """The source of initial weights that `config.checkpoint` names.

    Raises CheckpointError when a folder or its files are missing or damaged.
    """
    wanted, model = config.checkpoint, config.model
    scratch = Scratch(config.training.seed, model.init_std)
    if wanted.init_from:
        stems = ("ema", "model") if wanted.load_ema else ("model", "ema")
        if is_checkpoint(Path(wanted.init_from)):
            source = TorchDistSource(wanted.init_from, model, stems[0])
        else:
            source = SafetensorsFolder(wanted.init_from, stems)
    elif wanted.init_llm or wanted.init_vit:
        llm, vit = (SafetensorsFolder(f) if f else None for f in (wanted.init_llm, wanted.init_vit))
        source = Pretrained(llm, vit, scratch)
    else:
        return scratch
    check_experts(source.names(), model, source.folder)
    return Upcycled(source, scratch) if model.has_sparse_experts else source


def stage_rules(stage: Bagel) -> dict[str, Rule]:
    """The tensor map of every parameter of a stage: parameter name -> rule."""
    offset = get_transformer_layer_offset(stage.config, stage.vp_stage)
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    ep_rank = parallel_state.get_expert_model_parallel_rank()
    ep_size = parallel_state.get_expert_model_parallel_world_size()
    return {
        name: rule_for(
            name, parameter.shape, offset, tp_size, stage.model_config, is_expert(parameter), (ep_rank, ep_size)
        )
        for name, parameter in stage.named_parameters()
    }


@torch.no_grad()
def load_weights(stages: Sequence[Bagel], source: AnySource) -> None:
    """Fill every parameter of this rank's stages; every rank must call it.

    Besides the parameters, a rank holds one slice of one tensor at a time.
    Raises CheckpointError on the first tensor that is missing or has another shape.
    """
    model = stages[0].model_config
    rules = [stage_rules(stage) for stage in stages]
    _check_tables(source, model)
    _warn_about_unused(source, {name for of_stage in rules for rule in of_stage.values() for name in rule.names}, model)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    for stage, of_stage in zip(stages, rules, strict=True):
        for name, parameter in stage.named_parameters():
            if hasattr(parameter, "get_high_precision_init_val"):
                _fill_fp8(parameter, source, of_stage[name], tp_rank, tp_size)
            else:
                fill_shard(parameter, source, of_stage[name], tp_rank, tp_size)
    if isinstance(source, Upcycled) and source.has_copied and dist.get_rank() == 0:
        logger.warning(f"{source.folder} has dense MLPs: sparse experts start as copies of them, with new routers")


def _fill_fp8(parameter: torch.Tensor, source: AnySource, rule: Rule, tp_rank: int, tp_size: int) -> None:
    """A parameter kept in FP8: the optimizer's main parameter starts from the unrounded copy of it."""
    value = torch.empty(parameter.shape)
    fill_shard(value, source, rule, tp_rank, tp_size)
    parameter.copy_(value)
    parameter.get_high_precision_init_val().copy_(value)


def _check_tables(source: AnySource, model: ModelConfig) -> None:
    """The fixed position tables are recomputed, but their sizes tell what the weights were trained with."""
    for name, side, setting in (
        (LATENT_TABLE, model.max_latent_size, "model.max_latent_size"),
        (VIT_TABLE, model.vit.max_num_patch_per_side, "model.vit.max_num_patch_per_side"),
    ):
        if name not in source.names():
            continue
        rows = source.shape(name)[0]
        if rows != side**2:
            raise CheckpointError(
                f"the position table {name} in {source.folder} has {rows} rows, but {setting} is {side}, which makes "
                f"{side**2}; set {setting} to {math.isqrt(rows)}, which these weights were trained with"
            )


def _warn_about_unused(source: AnySource, on_this_stage: set[str], model: ModelConfig) -> None:
    """One warning about stored tensors that no stage of the model takes, whichever experts a rank holds of it."""
    group = parallel_state.get_expert_tensor_model_pipeline_parallel_group()
    stages = [on_this_stage] * group.size()
    dist.all_gather_object(stages, on_this_stage, group=group)
    taken = set().union(*stages)
    taken |= {dense_twin(name) for name in taken}  # experts may be copies of it
    unused = source.names() - taken - {LATENT_TABLE, VIT_TABLE}
    if model.tie_word_embeddings:
        unused.discard(LM_HEAD)
    if unused and dist.get_rank() == 0:
        some = ", ".join(sorted(unused)[:3])
        logger.warning(
            f"{source.folder} holds {len(unused)} tensors that the configured model does not have ({some}"
            f"{', ...' if len(unused) > 3 else ''}); they are ignored"
        )
