"""Fills a model stage from released weights: a BAGEL folder, Qwen2.5 and SigLIP folders, or from scratch.

Every rank reads only the slices that it holds. Run checkpoints (optimizer, moving average) are not this file's matter.
"""

import logging
import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.names import LM_HEAD, Rule, import_shard, rule_for
from megabagel.checkpoint.sources import Pretrained, SafetensorsFolder, Scratch
from megabagel.config.schema import Config, ModelConfig
from megabagel.models.bagel import Bagel

AnySource = SafetensorsFolder | Pretrained | Scratch

LATENT_TABLE, VIT_TABLE = "latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"
logger = logging.getLogger(__name__)


def open_source(config: Config) -> AnySource:
    """The source of initial weights that `config.checkpoint` names.

    Raises CheckpointError when a folder or its files are missing or damaged.
    """
    wanted = config.checkpoint
    if wanted.init_from:
        other = "model" if wanted.init_weights == "ema" else "ema"
        return SafetensorsFolder(wanted.init_from, (wanted.init_weights, other))
    scratch = Scratch(config.training.seed, config.model.init_std)
    if wanted.init_llm or wanted.init_vit:
        llm, vit = (SafetensorsFolder(f) if f else None for f in (wanted.init_llm, wanted.init_vit))
        return Pretrained(llm, vit, scratch)
    return scratch


def stage_rules(stage: Bagel) -> dict[str, Rule]:
    """The tensor map of every parameter of a stage: parameter name -> rule."""
    offset = get_transformer_layer_offset(stage.config)
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    return {
        name: rule_for(name, parameter.shape, offset, tp_size, stage.model_config)
        for name, parameter in stage.named_parameters()
    }


@torch.no_grad()
def load_weights(stage: Bagel, source: AnySource) -> None:
    """Fill every parameter of `stage`; every rank must call it.

    Raises CheckpointError on the first tensor that is missing or has another shape.
    """
    rules = stage_rules(stage)
    _check_tables(source, stage.model_config)
    _warn_about_unused(source, {name for rule in rules.values() for name in rule.names}, stage.model_config)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    for name, parameter in stage.named_parameters():
        parameter.copy_(import_shard(source, rules[name], tp_rank, tp_size))


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
    """One warning about stored tensors that no stage of the model takes."""
    stages = [on_this_stage] * parallel_state.get_pipeline_model_parallel_world_size()
    dist.all_gather_object(stages, on_this_stage, group=parallel_state.get_pipeline_model_parallel_group())
    unused = source.names() - set().union(*stages) - {LATENT_TABLE, VIT_TABLE}
    if model.tie_word_embeddings:
        unused.discard(LM_HEAD)
    if unused and dist.get_rank() == 0:
        some = ", ".join(sorted(unused)[:3])
        logger.warning(
            f"{source.folder} holds {len(unused)} tensors that the configured model does not have ({some}"
            f"{', ...' if len(unused) > 3 else ''}); they are ignored"
        )
