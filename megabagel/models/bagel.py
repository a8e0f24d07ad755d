"""One pipeline stage of a BAGEL model: vision tower and embeddings (first stage), decoder layers, heads (last stage).

Holds no data logic, no losses' normalisation and no optimizer; every stage receives the plan of its micro-batch.
"""

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor
from torch.nn.functional import pad

from megabagel.config.schema import Config
from megabagel.models.embeddings import InputEmbeddings, StreamInputs
from megabagel.models.flow import FlowTokens, flow_tokens
from megabagel.models.heads import ChunkLosses, OutputHeads
from megabagel.models.loss_rows import loss_rows
from megabagel.models.routing import Routing, route
from megabagel.models.specs import block_spec
from megabagel.models.vision import VisionTower, is_frozen
from megabagel.models.vision_spread import mark_partial, spread_features
from megabagel.packing.chunk import chunk_of
from megabagel.packing.plan import PackPlan


class Bagel(MegatronModule):
    """A stage; `pre_process` and `post_process` say whether it is the first and the last.

    `vp_stage`: which of this rank's stages it is under interleaved pipeline parallelism, None without. A frozen vision
    tower, `vision`, is on every rank, in its first stage, because it encodes pictures before the pipeline runs.
    """

    def __init__(
        self,
        config: TransformerConfig,
        run: Config,
        groups: ProcessGroupCollection,
        vp_stage: int | None = None,
    ):
        super().__init__(config)
        model = self.model_config = run.model
        self.kernels = run.kernels
        self.vp_stage = vp_stage  # read by the pipeline schedules
        self.cp_rank, self.cp_size = groups.cp.rank(), groups.cp.size()
        position = {"ignore_virtual": False, "vp_stage": vp_stage}
        self.pre_process = pre_process = parallel_state.is_pipeline_first_stage(**position)
        self.post_process = post_process = parallel_state.is_pipeline_last_stage(**position)
        self.model_type = ModelType.encoder_or_decoder  # read by the pipeline schedules
        self.share_embeddings_and_output_weights = model.tie_word_embeddings  # read by finalize_model_grads
        self.tp_cp_group, self.tp_size, self.tp_rank = groups.tp_cp, groups.tp.size(), groups.tp.rank()
        self.vision = None
        if model.visual_und and (pre_process or (is_frozen(model) and not vp_stage)):
            self.vision = VisionTower(model.vit, config.params_dtype, run.training.recompute_vit)
            if not is_frozen(model):
                mark_partial(self.vision)
        if pre_process:
            self.embeddings = InputEmbeddings(config, model, groups.tp)
        layers = get_num_layers_to_build(config, vp_stage, groups.pp.rank())
        self.decoder = TransformerBlock(
            config,
            block_spec(config, model, run.parallel, groups.ep.rank(), layers),
            post_layer_norm=False,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if post_process:
            own_lm_head = not (model.tie_word_embeddings and pre_process)
            self.heads = OutputHeads(config, run, groups.tp, own_lm_head)
        if model.tie_word_embeddings and groups.pp.size() > 1 and (pre_process or post_process):
            weight = self.shared_embedding_or_output_weight()
            weight.shared_embedding = True
            weight.shared = not pre_process  # count its gradient norm on the first stage only

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The tied vocabulary weight of this stage; called by megatron-core when it sums the tied gradients."""
        return self.embeddings.und.word_embeddings.weight if self.pre_process else self.heads.lm_head.weight

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor | None) -> None:
        """Called by the pipeline schedule with the previous stage's output."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, plan: PackPlan, inputs: StreamInputs | None) -> Tensor | ChunkLosses:
        """plan on the CPU; inputs on the device (first and last stage). -> hidden [rows, 1, hidden] or losses."""
        config = self.config
        device = torch.device(next(self.parameters()).device)
        chunk = chunk_of(plan, self.cp_rank, self.cp_size)
        routing = route(
            plan,
            chunk,
            self.cp_rank,
            self.cp_size,
            config.kv_channels,
            self.model_config.rotary_base,
            self.kernels.attention_backend,
            device,
            config.params_dtype,
        )
        flow = self._flow(routing, inputs)
        hidden = None
        if self.pre_process:
            hidden = self.embeddings(routing.plan, routing.chunk, flow, self._image_features(plan, inputs))
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=routing)
        if not self.post_process:
            return hidden
        shares = (self.tp_rank, self.tp_size) if config.sequence_parallel else (0, 1)
        rows = loss_rows(chunk, *shares).to(device)
        tied = self.model_config.tie_word_embeddings and self.pre_process
        return self.heads(hidden, routing, rows, flow, self.shared_embedding_or_output_weight() if tied else None)

    def _flow(self, routing: Routing, inputs: StreamInputs | None) -> FlowTokens | None:
        """The latent tokens of this rank's chunk; None on a stage without use for them."""
        model = self.model_config
        if not (model.visual_gen and (self.pre_process or self.post_process)):
            return None
        dtype = self.config.params_dtype
        return flow_tokens(routing.plan, routing.chunk.latents, inputs.latents, inputs.noise, model, dtype)

    def _image_features(self, plan: PackPlan, inputs: StreamInputs) -> Tensor | None:
        """Of the ViT tokens of this rank's chunk, and a row of zeros behind them; None for a model without a ViT."""
        if self.vision is None:
            return None
        if inputs.vit_features is not None:
            return pad(inputs.vit_features, (0, 0, 0, 1))
        return spread_features(self.vision, inputs.vit_patches, plan, self.tp_cp_group, self.tp_size)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """megatron-core's description of this stage's shards; a tied head of its own is a replica of the embedding, and
        a vision tower after the first stage one of the first stage's."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for key, shard in sharded.items():
            if key.startswith(f"{prefix}vision."):
                shard.replica_id = (parallel_state.get_pipeline_model_parallel_rank(), *shard.replica_id[1:])
        if self.model_config.tie_word_embeddings and self.post_process and not self.pre_process:
            replica = (1, 0, parallel_state.get_data_parallel_rank(with_context_parallel=True))
            sharded[f"{prefix}heads.lm_head.weight"] = make_tp_sharded_tensor_for_checkpoint(
                self.heads.lm_head.weight, f"{prefix}embeddings.und.word_embeddings.weight", replica_id=replica
            )
        return sharded
