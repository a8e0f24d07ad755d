"""The table of layouts: how many processes, which settings, and which one-process run they must equal.

A row's `layout` holds settings that may not change a number; its `model` names settings that do, shared with the
reference.
"""

from dataclasses import dataclass
from typing import Any

_NAMES = {
    "tp": "parallel.tensor_model_parallel_size",
    "sp": "parallel.sequence_parallel",
    "pp": "parallel.pipeline_model_parallel_size",
    "vp": "parallel.virtual_pipeline_model_parallel_size",
    "first": "parallel.num_layers_in_first_pipeline_stage",
    "last": "parallel.num_layers_in_last_pipeline_stage",
    "split": "parallel.pipeline_split",
    "cp": "parallel.context_parallel_size",
    "ep": "parallel.expert_model_parallel_size",
    "und": "parallel.und_expert_ranks",
    "reduce": "parallel.overlap_grad_reduce",
    "gather": "parallel.overlap_param_gather",
    "recompute": "training.recompute_granularity",
    "method": "training.recompute_method",
    "recompute_layers": "training.recompute_num_layers",
    "modules": "training.recompute_modules",
    "recompute_vit": "training.recompute_vit",
}
_SPARSE = {
    "model.und_num_experts": 4,
    "model.gen_num_experts": 2,
    "model.moe_ffn_hidden_size": 32,
    "model.moe_aux_loss_coeff": 0.02,
    "model.moe_z_loss_coeff": 0.01,
}
MODELS: dict[str, dict[str, Any]] = {
    "mot": {},  # 8 heads of 8, 2 key-value heads
    "moe": {"model.layer_variant": "moe"},
    "dense": {"model.layer_variant": "dense"},
    "tied": {"model.tie_word_embeddings": True},
    "4 kv heads": {"model.num_query_groups": 4},
    "12 heads, 4 kv": {"model.num_attention_heads": 12, "model.num_query_groups": 4, "model.hidden_size": 96},
    "frozen ViT": {"model.freeze_vit": True},
    "frozen und": {"model.freeze_und": True},
    "weighted CE": {"training.ce_loss_reweighting": True},
    "sparse": _SPARSE,
    "sparse gen, shared": {
        **_SPARSE,
        "model.und_num_experts": None,
        "model.gen_num_experts": 4,
        "model.moe_shared_expert_intermediate_size": 32,
    },
}


@dataclass(frozen=True)
class Row:
    """`settings` uses the short names above."""

    processes: int
    settings: dict[str, Any]
    model: str = "mot"
    bf16: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What the row's processes are configured with."""
        dtype = {"training.params_dtype": "bf16"} if self.bf16 else {}
        return {**MODELS[self.model], **{_NAMES[name]: value for name, value in self.settings.items()}, **dtype}


def row(processes: int, model: str = "mot", bf16: bool = False, **settings: Any) -> Row:
    return Row(processes, settings, model, bf16)


SELECTIVE = {"recompute": "selective", "modules": ["core_attn", "mlp", "layernorm"]}
OVERLAP = {"reduce": True, "gather": True}
TABLE: dict[str, Row] = {
    # tensor and sequence parallelism
    "TP2": row(2, tp=2),
    "TP2+SP": row(2, tp=2, sp=True),
    "TP4+SP": row(4, "4 kv heads", tp=4, sp=True),
    "TP2+SP, moe": row(2, "moe", tp=2, sp=True),
    "TP2+SP, dense": row(2, "dense", tp=2, sp=True),
    "TP2+SP, bf16": row(2, bf16=True, tp=2, sp=True),
    # pipelines
    "PP2": row(2, pp=2),
    "PP4": row(4, pp=4),
    "PP2 x VP2": row(2, pp=2, vp=2),
    "PP2, first stage of 1": row(2, pp=2, first=1, last=3),
    "PP2, last stage of 1": row(2, pp=2, last=1),
    "PP2, automatic split": row(2, pp=2, split="auto"),
    "PP2 x VP2, automatic split": row(2, pp=2, vp=2, split="auto"),
    "PP2, tied": row(2, "tied", pp=2),
    "PP2, frozen ViT": row(2, "frozen ViT", pp=2),
    # data parallelism
    "DP2, overlap": row(2, **OVERLAP),
    "DP4, weighted CE": row(4, "weighted CE"),
    "PP2 x VP2 x DP2, overlap": row(4, pp=2, vp=2, **OVERLAP),
    # context parallelism
    "CP2": row(2, cp=2),
    "CP4": row(4, cp=4),
    "CP2, moe": row(2, "moe", cp=2),
    "CP2, dense": row(2, "dense", cp=2),
    "CP2, frozen ViT": row(2, "frozen ViT", cp=2),
    "CP2, bf16": row(2, bf16=True, cp=2),
    "TP2 x CP2": row(4, tp=2, cp=2),
    "TP2+SP x CP2": row(4, tp=2, sp=True, cp=2),
    "TP2+SP x CP4, 1 kv head per TP rank": row(8, tp=2, sp=True, cp=4),
    "TP2+SP x CP3, heads of two kv groups": row(6, "12 heads, 4 kv", tp=2, sp=True, cp=3),
    # modality experts
    "DP2 x EP2": row(2, ep=2),
    "DP4 x EP4, 1 und rank": row(4, ep=4, und=1),
    "DP4 x EP2, overlap": row(4, ep=2, **OVERLAP),
    "DP2 x EP2, moe": row(2, "moe", ep=2),
    "TP2 x EP2": row(2, tp=2, ep=2),
    "TP2+SP x EP2": row(2, tp=2, sp=True, ep=2),
    "TP2+SP x DP2 x EP4, 1 und rank": row(4, tp=2, sp=True, ep=4, und=1),
    "CP2 x EP2": row(2, cp=2, ep=2),
    "PP2 x DP2 x EP2": row(4, pp=2, ep=2),
    # sparse experts
    "DP2 x EP2, sparse": row(2, "sparse", ep=2),
    "TP2 x EP2, sparse": row(2, "sparse", tp=2, ep=2),
    "TP2+SP x EP2, sparse gen": row(2, "sparse gen, shared", tp=2, sp=True, ep=2),
    "CP2 x EP2, sparse": row(2, "sparse", cp=2, ep=2),
    "PP2 x DP2 x EP2, sparse gen": row(4, "sparse gen, shared", pp=2, ep=2, **OVERLAP),
    # recomputation
    "1 process, full recompute": row(1, recompute="full", recompute_vit=True),
    "TP2+SP, selective recompute": row(2, tp=2, sp=True, recompute_vit=True, **SELECTIVE),
    "CP2, selective recompute": row(2, cp=2, **SELECTIVE),
    "DP2 x EP2, full recompute": row(2, ep=2, recompute="full", recompute_layers=2),
    "PP2 x VP2, full recompute, block": row(2, pp=2, vp=2, recompute="full", method="block"),
    # all together
    "TP2+SP x PP2 x DP2": row(8, tp=2, sp=True, pp=2),
    "TP2 x PP2 x DP2, dense": row(8, "dense", tp=2, pp=2),
    "TP2+SP x DP2, frozen und, overlap": row(4, "frozen und", tp=2, sp=True, **OVERLAP),
    "TP2+SP x CP2 x PP2": row(8, tp=2, sp=True, cp=2, pp=2),
    "TP2+SP x PP2 x VP2 x DP2 x EP2, bf16": row(8, bf16=True, tp=2, sp=True, pp=2, vp=2, ep=2, **SELECTIVE),
}
