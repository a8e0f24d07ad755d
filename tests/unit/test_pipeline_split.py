"""The automatic pipeline split is the best one there is under its costs, and megatron-core accepts its layout."""

from dataclasses import replace
from itertools import combinations, pairwise, product

import pytest
import torch
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megabagel.config.load import load_config
from megabagel.config.pipeline_split import (
    TokenMix,
    is_legal_split,
    megatron_layout,
    split_layers,
    stage_costs,
    stage_layers,
)
from megabagel.config.schema import DataConfig, ModelConfig, ParallelConfig

QUESTIONS = TokenMix(vit=90, vae=0, ce=5, mse=0)  # packs of questions about pictures: the ViT counts
TEXT = TokenMix(vit=0, vae=0, ce=95, mse=0)  # packs of text: the vocabulary head counts
LIGHT_ENDS = replace(ModelConfig(), freeze_vit=True, vocab_size=128)  # nothing of weight beside the layers


def every_split(layers: int, stages: int) -> list[list[int]]:
    return [[b - a for a, b in pairwise([0, *cuts, layers])] for cuts in combinations(range(1, layers), stages - 1)]


def costs(model: ModelConfig, counts: list[int], mix: TokenMix) -> list[int]:
    layer, first, last = stage_costs(model, None, mix)
    values = [count * layer for count in counts]
    values[0] += first
    values[-1] += last
    return values


@pytest.mark.parametrize("mix", [TokenMix(), QUESTIONS, TEXT], ids=["recipe", "questions", "text"])
@pytest.mark.parametrize(("layers", "stages"), [(7, 2), (9, 3), (8, 4), (11, 4), (12, 6), (5, 5)])
def test_no_split_has_a_cheaper_worst_stage_or_is_more_even(layers, stages, mix):
    model = replace(ModelConfig(), num_layers=layers)

    def badness(counts: list[int]) -> tuple[int, int]:
        values = costs(model, counts, mix)
        return max(values), sum(value**2 for value in values)

    found = split_layers(model, None, stages, mix)
    assert sum(found) == layers and min(found) >= 1
    assert badness(found) == min(map(badness, every_split(layers, stages)))


def test_released_model_has_fewer_layers_where_the_rest_costs_as_much_as_one():
    config = load_config(["--config=bagel_7b_mot"])
    # ViT and embeddings cost 0.8 of a layer, the heads 0.04: four stages of 7 stay the best, larger ones would be 8
    assert split_layers(config.model, config.data, 4) == [7, 7, 7, 7]
    assert split_layers(config.model, config.data, 8) == [3, 3, 3, 4, 4, 4, 4, 3]
    assert split_layers(config.model, config.data, 4, QUESTIONS) == [5, 8, 8, 7]
    assert split_layers(config.model, config.data, 4, TEXT) == [7, 7, 8, 6]
    assert split_layers(config.model, config.data, 1) == [28]


def test_without_costly_ends_layers_are_even_and_the_ends_are_spared():
    for layers, stages, wanted in [(8, 4, [2, 2, 2, 2]), (5, 2, [2, 3]), (6, 4, [1, 2, 2, 1]), (3, 3, [1, 1, 1])]:
        assert split_layers(replace(LIGHT_ENDS, num_layers=layers), None, stages) == wanted


def test_costs_follow_what_is_trained_and_what_is_there():
    model = ModelConfig()
    layer, first, last = stage_costs(model, None)
    frozen_vit = stage_costs(replace(model, freeze_vit=True), None)
    assert frozen_vit[0] == layer and frozen_vit[2] == last and frozen_vit[1] < 0.1 * first
    assert stage_costs(replace(model, freeze_llm=True), None)[0] == pytest.approx(layer * 2 / 3)
    blind = stage_costs(replace(model, visual_und=False, visual_gen=False), None)
    assert blind[1] == 0 and 0 < blind[2] < last
    assert stage_costs(model, DataConfig(expected_num_tokens=512))[0] < layer
    # two experts of half the width do the work of the dense MLP; a shared expert comes on top
    sparse = replace(model, und_num_experts=8, gen_num_experts=8, moe_ffn_hidden_size=model.ffn_hidden_size // 2)
    assert stage_costs(sparse, None)[0] == layer
    assert stage_costs(replace(sparse, moe_shared_expert_intermediate_size=64), None)[0] > layer


def test_more_stages_than_layers_is_an_error():
    with pytest.raises(ValueError, match="4 layers cannot be split over 5 stages"):
        split_layers(replace(ModelConfig(), num_layers=4), None, 5)


def test_megatron_core_reads_the_layout_with_chunks_in_the_order_of_the_layers():
    layout = megatron_layout([1, 2, 3, 2])
    read = PipelineParallelLayerLayout(layout, pipeline_model_parallel_size=2)
    read.validate_layer_layout(num_layers=8, mtp_num_layers=None)
    chunks = [[stage.count(stage[-1] if len(stage) == 1 else stage[1]) for stage in rank] for rank in read.layout]
    assert chunks == [[1, 3], [2, 2]]  # rank 0 holds virtual stages 0 and 2, rank 1 the others


def built_by_megatron_core(layers: int, parallel: ParallelConfig) -> list[int] | None:
    """Layers of every virtual stage as megatron-core builds them; None when it refuses."""
    pp, vp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    try:
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_dtype=torch.float32,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vp,
            num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
            num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        )
        return [get_num_layers_to_build(config, chunk, rank) for chunk, rank in product(range(vp or 1), range(pp))]
    except (ValueError, AssertionError):
        return None


@pytest.mark.parametrize("vp", [None, 2, 3])
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_even_and_uneven_splits_are_those_of_megatron_core(pp, vp):
    ends = [None, 1, 2, 3, 4, 6]
    seen = set()
    for layers, first, last in product([6, 8, 12], ends, ends):
        parallel = ParallelConfig(
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vp,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
        )
        wanted = built_by_megatron_core(layers, parallel)
        legal = wanted is not None and min(wanted) >= 1
        assert is_legal_split(layers, pp, vp, first, last) == legal, (layers, first, last)
        if legal:
            assert stage_layers(replace(ModelConfig(), num_layers=layers), None, parallel) == wanted
        seen.add(legal)
    assert seen == {True, False}


def test_an_automatic_split_counts_virtual_stages():
    parallel = ParallelConfig(
        pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2, pipeline_split="auto"
    )
    assert stage_layers(ModelConfig(), None, parallel) == split_layers(ModelConfig(), None, 8)
