"""Published measurements that the time model is fitted to and judged by.

Two of the same work (BAGEL-7B on 32 H100, data parallel over all of them, 34.1k tokens a GPU, everything computed
again) and one of dense language models. Whoever finds more adds a row.
"""

from dataclasses import dataclass

from megabagel.config.pipeline_split import RECIPE
from megabagel.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from planning.cluster import cluster_of
from planning.timing import Case, step_time


@dataclass(frozen=True)
class Peer:
    """A published step: seconds, and MFU by the publisher's own count of FLOPs."""

    name: str
    seconds: float
    mfu: float
    ema: bool


TOKENS = 34_100
BRIDGE = Peer("Megatron-Bridge BAGEL", 7.697, 0.237, ema=False)
OFFICIAL = Peer("official BAGEL", 10.168, 0.179, ema=True)
DENSE_MFU = (0.41, 0.48)  # Megatron-LM, dense language models up to 462 B on H100


def peer_case(peer: Peer, lost: float = 0.0) -> Case:
    """The peers' work in our terms. They shard weights over all GPUs (FSDP): what is gathered is gathered twice, which
    hides behind computation as our gather does."""
    config = Config(
        parallel=ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True),
        data=DataConfig(expected_num_tokens=TOKENS, max_num_tokens=36_864),
        optimizer=OptimizerConfig(ema_decay=0.9999 if peer.ema else None),
        training=TrainingConfig(global_batch_size=32, recompute_granularity="full"),
    )
    return Case(config, cluster_of("H100", 32), RECIPE, lost)


def dense_case(lost: float = 0.0) -> Case:
    """A dense 70 B language model on 512 H100 in a usual layout: TP 8, SP, PP 4 interleaved, 4 M tokens a step."""
    model = ModelConfig(
        layer_variant="dense", hidden_size=8192, num_layers=80, num_attention_heads=64, num_query_groups=8,
        ffn_hidden_size=28672, vocab_size=128256, visual_und=False, visual_gen=False,
    )  # fmt: skip
    parallel = ParallelConfig(
        tensor_model_parallel_size=8, sequence_parallel=True, pipeline_model_parallel_size=4,
        virtual_pipeline_model_parallel_size=5, overlap_grad_reduce=True, overlap_param_gather=True,
    )  # fmt: skip
    mix = type(RECIPE)(vit=0, vae=0, ce=100, mse=0, keys=2048)
    config = Config(
        model=model,
        parallel=parallel,
        data=DataConfig(expected_num_tokens=4096, max_num_tokens=4096, max_num_tokens_per_sample=4096),
        training=TrainingConfig(global_batch_size=1024, recompute_granularity="selective"),
    )
    config.data.packing = "balanced"
    return Case(config, cluster_of("H100", 512), mix, lost)


def fitted_loss(peer: Peer = BRIDGE) -> float:
    """What the peer's step takes beyond the model, as a share of the model's time."""
    return peer.seconds / step_time(peer_case(peer)).step - 1
