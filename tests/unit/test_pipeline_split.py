"""The automatic pipeline split is the best one there is under its costs, and megatron-core accepts its layout."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megabagel.config.load import load_config
from megabagel.config.pipeline_split import TokenMix, megatron_layout, split_layers, stage_costs
from megabagel.config.schema import DataConfig, ModelConfig

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
