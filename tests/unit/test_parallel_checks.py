"""Layouts that cannot work are refused with the sizes and the legal alternatives, and legal ones are not."""

import pytest
import yaml

from megabagel.config.checks import ConfigError, check_layout
from megabagel.config.schema import Config, ModelConfig, ParallelConfig, TrainingConfig

SHORT = {
    "tp": "tensor_model_parallel_size",
    "cp": "context_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "first": "num_layers_in_first_pipeline_stage",
    "last": "num_layers_in_last_pipeline_stage",
    "split": "pipeline_split",
    "und_ranks": "und_expert_ranks",
}
MODEL = set(ModelConfig.__dataclass_fields__)
TRAINING = set(TrainingConfig.__dataclass_fields__)


def check(options: str) -> None:
    """The released 7B model (28 layers, 28 heads, 4 kv heads) with `name=value` options, by default as one replica."""
    settings = {name: yaml.safe_load(value) for name, value in (option.split("=") for option in options.split())}
    processes = settings.pop("processes", None)
    parallel = {SHORT.get(k, k): v for k, v in settings.items() if k not in MODEL | TRAINING}
    config = Config(
        model=ModelConfig(**{k: v for k, v in settings.items() if k in MODEL}),
        parallel=ParallelConfig(**parallel),
        training=TrainingConfig(**{"global_batch_size": 8, **{k: v for k, v in settings.items() if k in TRAINING}}),
    )
    replica = settings.get("tp", 1) * settings.get("cp", 1) * settings.get("pp", 1)
    check_layout(config, processes or replica)


LEGAL = [
    "tp=4 cp=7",  # more ranks than key and value heads
    "tp=2 cp=7",
    "tp=2 cp=14",
    "cp=28",
    "tp=4 sequence_parallel=true pp=4 vp=7 cp=7",
    "pp=4 first=4",
    "pp=4 first=5 last=5",
    "pp=4 vp=2 first=4",
    "pp=2 last=27",
    "pp=2 first=13 last=15",
    "pp=5 split=auto",
    "pp=4 vp=2 split=auto",
    "pp=14 vp=2 global_batch_size=14",
    "ep=4 processes=4",
    "ep=4 und_ranks=1 processes=4",
    "tp=2 cp=2 ep=8 processes=8",  # expert ranks come out of tensor, context and data parallel ranks
    "tp=2 ep=2 layer_variant=moe",
    "ep=2 freeze_llm=true processes=2",
    "ep=4 gen_num_experts=8 processes=4",
    "ep=4 und_num_experts=4 gen_num_experts=8 freeze_und=true processes=4",
    "und_num_experts=4 layer_variant=dense",
    "tp=4 und_num_experts=4 gen_num_experts=4 ffn_hidden_size=130",  # sparse experts are never cut
    "tp=2 ep=2 ffn_hidden_size=129",  # nor are modality experts
    "pp=4 first=4 recompute_granularity=full recompute_num_layers=4",
    "pp=4 first=4 recompute_granularity=full recompute_method=block recompute_num_layers=7",
    "recompute_granularity=selective recompute_modules=[mlp,layernorm] recompute_vit=true",
    "moe_router_topk=1",  # unused without sparse experts
]


@pytest.mark.parametrize("options", LEGAL)
def test_legal_layouts_pass(options):
    check(options)


PIPELINE = [
    ("pp=5", "model.num_layers 28 does not divide by parallel.pipeline_model_parallel_size 5; sizes that do are "
     "1, 2, 4, 7, 14, 28, or set parallel.pipeline_split to auto."),
    ("pp=4 vp=2", "virtual_pipeline_model_parallel_size 2 does not divide the 7 layers of a pipeline stage "
     "(model.num_layers 28 / pipeline_model_parallel_size 4); sizes that do are 7, or set parallel.pipeline_split"),
    ("pp=28 vp=2", "model.num_layers 28 is less than the 56 pieces of the pipeline"),
    ("pp=16 vp=2 split=auto", "model.num_layers 28 is less than the 32 pieces of the pipeline (pipeline_model"
     "_parallel_size 16 x virtual_pipeline_model_parallel_size 2), which need a layer each"),
    ("vp=2", "virtual_pipeline_model_parallel_size 2 interleaves pipeline stages, but parallel.pipeline_model"
     "_parallel_size is 1; raise that or leave the virtual size out."),
    ("pp=4 vp=1", "virtual_pipeline_model_parallel_size is 1, which is no interleaving; leave it out or set 2"),
    ("pp=4 vp=0", "parallel.virtual_pipeline_model_parallel_size is 0, but must be greater than 0"),
    ("first=14", "num_layers_in_first_pipeline_stage 14 is set, but parallel.pipeline_model_parallel_size is 1"),
    ("pp=2 first=0", "parallel.num_layers_in_first_pipeline_stage is 0, but must be greater than 0"),
    ("pp=4 last=4 split=auto", "num_layers_in_last_pipeline_stage 4 is set, but parallel.pipeline_split auto"),
    ("pp=4 first=5", "num_layers_in_first_pipeline_stage 5 leaves 23 of model.num_layers 28 for the other stages "
     "(3 of pipeline_model_parallel_size 4), which cannot be shared out evenly; num_layers_in_first_pipeline_stage may "
     "be 1, 4, 7, 10, 13, 16, 19, 22, 25 here."),
    ("pp=2 last=28", "num_layers_in_last_pipeline_stage may be 1 to 27 here"),
    ("pp=2 first=13 last=14", "leave 1 of model.num_layers 28 for the other stages (0 of pipeline_model_parallel"
     "_size 2), which cannot be shared out evenly; num_layers_in_first_pipeline_stage may be 14 here."),
    ("pp=4 vp=2 last=3", "evenly in 2 equal chunks each (virtual_pipeline_model_parallel_size); num_layers_in_"
     "last_pipeline_stage may be 4, 10, 16, 22 here."),
    ("pp=3 vp=3 first=3 last=2", "no number does here: leave it out and set pipeline_split to auto"),
    ("pp=4 vp=7 global_batch_size=6", "training.global_batch_size 6 gives each of the 1 model replicas 6 packs a "
     "step, but the interleaved pipeline (virtual_pipeline_model_parallel_size 7) takes them in groups of pipeline_"
     "model_parallel_size 4; set it to a multiple of 4."),
    ("pp=4 vp=7 global_batch_size=4 processes=8", "each of the 2 model replicas 2 packs a step"),
    ("recompute_granularity=full recompute_num_layers=3 pp=4 first=4", "recompute_num_layers 3 does not divide "
     "the 4 or 8 layers of a pipeline stage into equal chunks; sizes that do are 1, 2, 4, or set"),
    ("recompute_granularity=full recompute_num_layers=14 pp=2 vp=2", "does not divide the 7 layers"),
    ("recompute_granularity=full recompute_method=block recompute_num_layers=8 pp=4", "recompute_num_layers "
     "8 is more than the 7 layers of a pipeline stage; allowed are 1 to 7."),
    ("recompute_num_layers=0", "training.recompute_num_layers is 0, but must be greater than 0"),
    ("recompute_granularity=selective recompute_modules=[]", "training.recompute_modules is empty"),
    ("recompute_vit=true freeze_vit=true", "training.recompute_vit is true, but model.freeze_vit freezes the ViT"),
    ("recompute_vit=true freeze_und=true", "training.recompute_vit is true, but model.freeze_und freezes the ViT"),
    ("recompute_vit=true visual_und=false", "training.recompute_vit is true, but model.visual_und is false"),
]  # fmt: skip

TENSORS = [
    ("tp=3", "model.num_attention_heads 28 does not divide by parallel.tensor_model_parallel_size 3; sizes that do "
     "are 1, 2, 4."),
    ("tp=7", "model.num_query_groups 4 does not divide by parallel.tensor_model_parallel_size 7; sizes that do are "
     "1, 2, 4."),
    ("tp=4 cp=2", "context_parallel_size 2 does not divide the 7 query heads of a tensor-parallel rank (model.num_"
     "attention_heads 28 / tensor_model_parallel_size 4), of which every context-parallel rank takes whole ones in "
     "attention; sizes that do are 1, 7 (key and value heads are replicated and do not limit it)."),
    ("cp=8", "sizes that do are 1, 2, 4, 7, 14, 28 (key"),
    ("cp=0", "parallel.context_parallel_size is 0, but must be greater than 0"),
    ("tp=2 ffn_hidden_size=129", "model.ffn_hidden_size 129 does not divide by parallel.tensor_model_parallel"),
    ("tp=2 ffn_hidden_size=129 gen_num_experts=4", "model.ffn_hidden_size 129 does not divide"),
    ("tp=2 gen_num_experts=4 moe_shared_expert_intermediate_size=65", "intermediate_size 65 does not divide by"),
    ("tp=2 cp=2 pp=2 processes=12", "12 processes do not divide into model replicas of 8 (tensor_model_parallel"
     "_size 2 x context_parallel_size 2 x pipeline_model_parallel_size 2); start a multiple of 8 processes"),
]  # fmt: skip

EXPERTS = [
    ("ep=3 processes=4", "expert_model_parallel_size 3 does not divide the 4 ranks of a pipeline stage (tensor_"
     "model_parallel_size 1 x context_parallel_size 1 x 4 model replicas), over which experts are laid; sizes that do "
     "are 1, 2, 4."),
    ("ep=2", "does not divide the 1 ranks of a pipeline stage"),
    ("ep=4 und_ranks=4 processes=4", "und_expert_ranks is 4, but of the 4 expert-parallel ranks (expert_model_"
     "parallel_size) at least one must hold und's MLPs and one gen's; allowed are 1 to 3."),
    ("ep=4 und_ranks=0 processes=4", "parallel.und_expert_ranks is 0, but must be greater than 0"),
    ("und_ranks=1", "but parallel.expert_model_parallel_size is 1; raise that to 2 or more"),
    ("ep=2 layer_variant=dense processes=2", "expert_model_parallel_size 2 needs several MLPs per layer, but "
     "model.layer_variant dense has one; set layer_variant to mot or moe"),
    ("ep=2 freeze_und=true processes=2", "model.freeze_und leaves the ranks that hold und's MLPs"),
    ("ep=4 und_num_experts=6 gen_num_experts=8 processes=4", "model.und_num_experts 6 does not divide by "
     "parallel.expert_model_parallel_size 4; sizes that do are 1, 2."),
    ("ep=2 und_ranks=1 gen_num_experts=8 processes=2", "but model.gen_num_experts makes sparse experts, which"),
    ("gen_num_experts=4 layer_variant=dense", "model.gen_num_experts is 4, but with model.layer_variant dense "
     "both streams use und's MLP; set und_num_experts alone"),
    ("gen_num_experts=1", "model.gen_num_experts is 1, but sparse experts are at least 2"),
    ("und_num_experts=0", "model.und_num_experts is 0, but must be greater than 0"),
    ("gen_num_experts=4 moe_router_topk=5", "model.moe_router_topk 5 is more than model.gen_num_experts 4; allowed "
     "are 2 to 4."),
    ("gen_num_experts=4 moe_router_topk=1", "so the router would learn nothing from the losses; set 2 or more"),
    ("moe_aux_loss_coeff=-1.0", "model.moe_aux_loss_coeff is -1.0, but must not be negative"),
    ("moe_z_loss_coeff=-1.0", "model.moe_z_loss_coeff is -1.0, but must not be negative"),
    ("moe_ffn_hidden_size=0", "model.moe_ffn_hidden_size is 0, but must be greater than 0"),
]  # fmt: skip

ILLEGAL = [*PIPELINE, *TENSORS, *EXPERTS]


@pytest.mark.parametrize(("options", "fragment"), ILLEGAL, ids=[options for options, _ in ILLEGAL])
def test_illegal_layouts_are_refused_in_one_sentence_that_says_what_is_legal(options, fragment):
    with pytest.raises(ConfigError) as error:
        check(options)
    message = str(error.value)
    assert fragment in message
    assert "\n" not in message and message.endswith(".")
