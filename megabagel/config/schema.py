"""Every setting of a run, as typed dataclasses grouped by what they describe.

Defaults are those of fine-tuning BAGEL. Which combinations are legal is decided in `checks.py`, never here.
"""

from dataclasses import dataclass, field
from typing import Literal

from megabagel.config.autoencoder import AutoencoderConfig


@dataclass
class VisionConfig:
    """SigLIP NaViT tower (und images in). `num_layers` counts the layers that are used (26 of SigLIP so400m's 27)."""

    hidden_size: int = 1152
    num_layers: int = 26
    num_attention_heads: int = 16
    ffn_hidden_size: int = 4304
    patch_size: int = 14
    max_num_patch_per_side: int = 70  # side of the learned table and of the sine-cosine table
    layernorm_epsilon: float = 1e-6


@dataclass
class ModelConfig:
    """Shape of the model, what it can see and make, and which parts stay frozen."""

    folder: str | None = None  # read the shape from this BAGEL folder's JSON files instead of from the fields below
    layer_variant: Literal["mot", "moe", "dense"] = "mot"  # weights per modality: whole layers, MLPs only, or none
    hidden_size: int = 3584
    num_layers: int = 28
    num_attention_heads: int = 28
    num_query_groups: int = 4  # key and value heads
    ffn_hidden_size: int = 18944
    vocab_size: int = 152064
    rotary_base: float = 1e6
    layernorm_epsilon: float = 1e-6
    qk_layernorm: bool = True  # RMSNorm on queries and keys, per head
    tie_word_embeddings: bool = False
    vit: VisionConfig = field(default_factory=VisionConfig)
    vae: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    connector_act: str = "gelu_pytorch_tanh"
    interpolate_pos: bool = False  # squeeze every picture into the whole position table instead of its corner
    latent_patch_size: int = 2  # latent pixels per side of one image token
    max_latent_size: int = 64  # side of the latent position table, in latent patches
    timestep_shift: float = 1.0  # s of s*t/(1+(s-1)t): above 1, training sees more noise
    visual_und: bool = True  # pictures enter through the ViT
    visual_gen: bool = True  # pictures are generated: VAE tokens and the latent head
    freeze_llm: bool = False
    freeze_vit: bool = False
    freeze_vae: Literal[True] = True  # the autoencoder is never trained here
    freeze_und: bool = False  # train only what generates pictures (gen weights, latent projections, timestep embedder)
    init_std: float = 0.02  # of weights that start from scratch, except those of the ViT and the connector
    und_num_experts: int | None = None  # sparse experts in place of the und stream's MLP; null: one dense MLP
    gen_num_experts: int | None = None  # the same for the gen stream
    moe_router_topk: int = 2  # experts per token; their weights are normalised to sum 1
    moe_aux_loss_coeff: float = 0.0  # of the load-balancing loss, averaged over packs
    moe_z_loss_coeff: float = 0.0  # of the router's z-loss, averaged over packs
    moe_ffn_hidden_size: int | None = None  # of each sparse expert; null: ffn_hidden_size
    moe_shared_expert_intermediate_size: int | None = None  # width of an expert that every token passes; null: none

    @property
    def has_sparse_experts(self) -> bool:
        """Whether a stream's MLP is made of experts that a router chooses from."""
        return self.und_num_experts is not None or self.gen_num_experts is not None


@dataclass
class ParallelConfig:
    """How the model is laid out over ranks; what is left of the world size is data parallel."""

    tensor_model_parallel_size: int = 1  # ranks that split every layer
    pipeline_model_parallel_size: int = 1  # ranks that split the stack of layers
    virtual_pipeline_model_parallel_size: int | None = None  # interleaved pieces of the stack per rank; null: one piece
    num_layers_in_first_pipeline_stage: int | None = None  # null: as many as the others
    num_layers_in_last_pipeline_stage: int | None = None  # null: as many as the others
    pipeline_split: Literal["even", "auto"] = "even"  # auto: fewer layers where the ViT, embedding and heads cost time
    context_parallel_size: int = 1  # ranks that split every pack's tokens; they exchange heads for tokens in attention
    expert_model_parallel_size: int = 1  # ranks that hold different MLPs: und's and gen's, or sparse experts
    und_expert_ranks: int | None = None  # of those ranks, how many hold und's MLPs, the others gen's; null: half
    sequence_parallel: bool = False  # shard activations between tensor-parallel layers too
    overlap_grad_reduce: bool = False  # reduce gradients while the backward pass runs
    overlap_param_gather: bool = False  # gather updated parameters while the forward pass runs


@dataclass
class DataConfig:
    """What is read and how it is packed. `dataset_config_file` holds the groups (official BAGEL YAML, paths inside)."""

    dataset_config_file: str | None = None
    tokenizer: str | None = None  # folder with tokenizer.json; null: the BAGEL folder given in checkpoint.init_from
    expected_num_tokens: int = 32768  # greedy: a pack is closed once it holds this many tokens
    max_num_tokens: int = 36864  # and never holds more than this many
    max_num_tokens_per_sample: int = 16384
    prefer_buffer_before: int = 16384  # greedy: below this fill, samples that wait are tried first
    max_buffer_size: int = 50  # over-long samples that wait for the next pack
    packing: Literal["greedy", "best_fit", "balanced"] = (
        "greedy"  # waiting samples in turn; those that fill a pack best; those, then equal work in all packs of a step
    )
    over_long: Literal["skip", "truncate_text", "shrink_image"] = "skip"  # samples above max_num_tokens_per_sample
    max_image_pixels: int = 100_000_000  # larger pictures are skipped before they are decoded
    max_bad_fraction: float = 0.05  # of a group's rows; the run stops above it
    text_cond_dropout_prob: float = 0.1  # a condition is left out this often, for guidance
    vit_cond_dropout_prob: float = 0.3  # the same for ViT pictures
    vae_cond_dropout_prob: float = 0.3  # the same for clean VAE pictures
    num_workers: int = 1  # decoding processes per reader; 0 decodes in the training process
    prefetch_mib: int = 1024  # decoded pictures waiting per reader
    token_cache: str | None = None  # folder for token ids of texts met before; null: none
    seed: int = 42  # order, mixture, dropout, timesteps and noise


@dataclass
class OptimizerConfig:
    """AdamW, its schedule (in steps), clipping and the exponential moving average of the weights."""

    lr: float = 2e-5
    min_lr: float = 0.0
    lr_decay_style: Literal["constant", "cosine", "linear"] = "constant"
    lr_warmup_steps: int = 2000  # linear, from 0
    lr_decay_steps: int | None = None  # null: training.train_steps
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-15
    weight_decay: float = 0.0
    clip_grad: float = 1.0  # global L2 norm
    ema_decay: float | None = 0.9999  # null: no moving average


@dataclass
class TrainingConfig:
    """Length, batch, precision and losses."""

    train_steps: int = 500_000  # updates in all, resumed ones included
    global_batch_size: int = 1  # packs per step over all data-parallel ranks
    params_dtype: Literal["bf16", "fp32"] = "bf16"  # bf16 keeps fp32 main parameters in the optimizer
    ce_weight: float = 1.0  # of the text loss
    mse_weight: float = 1.0  # of the picture loss
    ce_loss_reweighting: bool = False  # weigh each text by 1/sqrt(length + 1)
    recompute_granularity: Literal["full", "selective"] | None = None  # activations computed again in the backward pass
    recompute_method: Literal["uniform", "block"] = "uniform"  # full: all layers in chunks, or only the first layers
    recompute_num_layers: int = 1  # full: layers per chunk (uniform), or how many layers per stage (block)
    recompute_modules: list[Literal["core_attn", "mlp", "layernorm"]] = field(
        default_factory=lambda: ["core_attn"]
    )  # selective: what is computed again
    recompute_vit: bool = False  # recompute the layers of a trainable ViT
    seed: int = 4396  # initial weights
    deterministic: bool = False  # the same run gives the same bits again on the same machines; slower on a GPU


@dataclass
class KernelConfig:
    """Which kernels compute the layers, and in what precision their matrices are multiplied."""

    transformer_impl: Literal["auto", "transformer_engine", "local"] = (
        "auto"  # auto: Transformer Engine for bf16 where it works, else megatron-core's own linears
    )
    attention_backend: Literal["auto", "sdpa", "varlen", "flex"] = "auto"  # auto: varlen on a GPU, else sdpa
    cross_entropy_chunk_rows: int = 2048  # loss rows whose logits are in memory at once
    fp8: Literal["hybrid", "e4m3"] | None = None  # number format of matrix products; hybrid: e5m2 gradients; null: none
    fp8_recipe: Literal["delayed", "current", "blockwise", "mxfp8"] = "current"  # how scales are chosen
    fp8_param_gather: bool = False  # parameters are kept, and gathered over data-parallel ranks, in FP8
    num_layers_at_start_in_bf16: int = 0  # first layers that stay out of FP8
    num_layers_at_end_in_bf16: int = 0  # last layers that stay out of FP8


@dataclass
class CheckpointConfig:
    """Where the run starts from and what it writes."""

    init_from: str | None = None  # BAGEL folder, run folder or iter_... folder; null with no other: from scratch
    load_ema: bool = True  # init_from: start from its moving average where it has one; false: from its live weights
    init_llm: str | None = None  # Qwen2.5 folder
    init_vit: str | None = None  # SigLIP folder
    init_vae: str | None = None  # autoencoder file or folder (FLUX ae.safetensors)
    run_dir: str = "runs/default"  # checkpoints, metrics.jsonl, tensorboard and the resolved config go here
    save_interval: int = 2000  # steps; a checkpoint is also written after the last step; 0: never
    async_save: bool = True  # train on while a checkpoint is written, from a copy in host memory; false: wait for it
    verify: bool = True  # compare checksums at loading: every rank reads its share of the files once more
    keep_last: int | None = None  # newest checkpoints that stay; this and the next two null: all stay
    keep_every: int | None = None  # those of steps that are multiples of this stay too
    keep_best: int | None = None  # so many with the lowest best_metric stay too
    best_metric: str = "validation/loss"  # what keep_best and validation.patience go by; less is better
    local_dir: str | None = None  # on a disk of every node: each rank also keeps its own state there, for fast resumes
    local_save_interval: int = 100  # steps between those
    auto_resume: bool = True  # continue from the newest checkpoint of run_dir when there is one


@dataclass
class ValidationConfig:
    """Losses on held-out data while the run goes on; training does not notice them."""

    dataset_config_file: str | None = None  # groups of held-out data, in the form of data.dataset_config_file
    interval: int = 0  # steps between two validations, the last step's included; 0: never
    packs: int = 64  # at most so many, the same each time; fewer where all samples fit into fewer
    weights: Literal["model", "ema", "both"] = "model"  # which weights are looked at: live ones, their moving average
    patience: int | None = None  # end after this many validations without a better checkpoint.best_metric; null: never
    seed: int = 42  # order of the samples, their timesteps and noise


@dataclass
class SamplesConfig:
    """Pictures and answers to look at while the run goes on; training does not notice them."""

    prompts_file: str | None = None  # YAML or JSONL list: prompt or question of each, and images shown before it
    interval: int = 0  # steps between two samplings, the last step's included; 0: never
    weights: Literal["model", "ema"] = "ema"  # which weights are asked: live ones or their moving average
    batch_size: int = 8  # requests that are worked on together, per replica of the model
    seed: int = 0  # of the first request; the next ones count on
    num_timesteps: int = 50  # times from noise to picture; one step less
    timestep_shift: float = 3.0  # above 1: smaller steps while there is much noise
    cfg_text_scale: float = 4.0  # guidance by the prompt; 1: off
    cfg_img_scale: float = 1.5  # guidance by the pictures; 1: off
    max_tokens: int = 128  # of an answer


@dataclass
class FaultsConfig:
    """What a run does about steps that go wrong, and when it stops before its end."""

    nonfinite_patience: int = 10  # steps in a row without a finite loss and gradient, then the run stops for good
    spike_action: Literal["none", "log", "rollback"] = (
        "log"  # about losses far above the last ones; rollback: to the last checkpoint, leaving the data since then out
    )
    spike_window: int = 128  # last steps that a loss is compared with; none is judged before there are so many
    spike_threshold: float = 10.0  # above their median, in standard deviations (robust: 1.4826 MAD)
    max_rollbacks: int = 3  # of a run; it stops for good at the next spike
    hang_seconds: float | None = (
        900.0  # without progress, then all ranks say where they are and leave; first step, saves, validation: 4 times
    )
    max_restarts_without_progress: int | None = 3  # more starts in a row without a new checkpoint: it gives up
    time_limit_margin: float | None = 300.0  # seconds before the end of a SLURM job at which it saves and stops


@dataclass
class LoggingConfig:
    """What is shown and written while the run goes on."""

    log_interval: int = 1  # steps between two lines of the console and the logs
    tensorboard: bool = True  # event files in RUN_DIR/tensorboard
    progress_bar: bool = True  # on a terminal; plain lines elsewhere
    straggler_interval: int = 100  # steps between two comparisons of the ranks' own times; 0: never
    straggler_factor: float = 1.3  # a rank that takes so many times as long as most others is named
    peak_tflops: float | None = None  # of one device at the training precision; null: from a table, else no MFU
    histogram_interval: int = 0  # steps between two histograms of gradients and parameters; 0: none
    wandb_project: str | None = None  # Weights & Biases, with TensorBoard's names; needs the extra wandb; null: off
    prometheus_port: int | None = None  # serves the newest values; needs the extra prometheus; 0: a free one; null: off


@dataclass
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
