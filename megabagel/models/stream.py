"""One modality's weights of one decoder layer: norms, QKV, output projection and MLP.

Everything here is per token and runs densely on its own stream; the streams meet only in `mot_layer.py`.
"""

from dataclasses import dataclass

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megabagel.models.norm import HeadNorm
from megabagel.models.recompute import Recompute

ATTENTION_PARTS = ("input_layernorm", "linear_qkv", "q_layernorm", "k_layernorm", "linear_proj")
PARTS = (*ATTENTION_PARTS, "pre_mlp_layernorm", "mlp")
# what a linear with a fused norm calls the norm's weight -> what a checkpoint calls it, fused or not
_FUSED_NORMS = {"linear_qkv.layer_norm_": "input_layernorm.", "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."}


@dataclass
class StreamSubmodules:
    """Specs of the norms and linears, see `linears.py`; the MLP, None if not held here."""

    input_layernorm: ModuleSpec
    linear_qkv: ModuleSpec
    linear_proj: ModuleSpec
    pre_mlp_layernorm: ModuleSpec
    mlp: ModuleSpec | None


class Stream(MegatronModule):
    """A stream builds its own parts, except those named in `shared`, which are the modules of `owner`.

    Shared modules are reachable as attributes but registered only at their owner: their parameters exist, train and
    are saved once.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: StreamSubmodules,
        groups: ProcessGroupCollection,
        owner: "Stream | None" = None,
        shared: frozenset[str] = frozenset(),
    ):
        super().__init__(config)
        self.submodules, self.groups = submodules, groups
        self.recompute = Recompute(config)
        self.head_dim = config.kv_channels
        for part in PARTS:
            if part in shared:
                self.__dict__[part] = owner._modules[part]
            else:
                self.register_module(part, getattr(self, f"_build_{part}")())

    def _norm(self, spec: ModuleSpec) -> nn.Module:
        config = self.config
        return build_module(
            spec, config.hidden_size, config.layernorm_epsilon, config.params_dtype, config.sequence_parallel
        )

    def _build_input_layernorm(self) -> nn.Module:
        return self._norm(self.submodules.input_layernorm)

    def _build_pre_mlp_layernorm(self) -> nn.Module:
        return self._norm(self.submodules.pre_mlp_layernorm)

    def _build_q_layernorm(self) -> HeadNorm | None:
        # sees this rank's heads only: megatron-core sums its gradient over tensor-parallel ranks by its name
        return HeadNorm(self.head_dim, self.config.params_dtype) if self.config.qk_layernorm else None

    _build_k_layernorm = _build_q_layernorm

    def _build_linear_qkv(self) -> nn.Module:
        config = self.config
        return build_module(
            self.submodules.linear_qkv,
            config.hidden_size,
            (config.num_attention_heads + 2 * config.num_query_groups) * self.head_dim,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.groups.tp,
        )

    def _build_linear_proj(self) -> nn.Module:
        config = self.config
        return build_module(
            self.submodules.linear_proj,
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=self.groups.tp,
        )

    def _build_mlp(self) -> nn.Module | None:
        if self.submodules.mlp is None:
            return None
        return build_module(self.submodules.mlp, config=self.config, pg_collection=self.groups)

    def qkv(self, hidden: Tensor) -> Tensor:
        """[s or s/tp, 1, hidden] -> [s, kv heads * (heads per kv head + 2) * d] of this rank, for `kv_gather`."""
        return self.recompute.through_norm(self.input_layernorm, lambda x: self.linear_qkv(x)[0], hidden)[:, 0]

    def head_norms(self) -> tuple[Tensor | None, Tensor | None]:
        """Weights of the norms on query and key heads; None for a model without them."""
        return tuple(norm and norm() for norm in (self.q_layernorm, self.k_layernorm))

    def project(self, context: Tensor) -> Tensor:
        """Attention result [s, heads, d] of this rank -> [s or s/tp, 1, hidden]."""
        out, _ = self.linear_proj(context.flatten(1)[:, None])
        return out

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """megatron-core's description of this stream's shards, a fused norm's weight by the name of a norm apart."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        apply_prefix_mapping(sharded, {prefix + fused: prefix + apart for fused, apart in _FUSED_NORMS.items()})
        return sharded
