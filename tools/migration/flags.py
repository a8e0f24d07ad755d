"""What each official flag is called here, and why some have no equivalent: plain tables, few rules between flags."""

from dataclasses import dataclass, field

from megabagel.config.folder import LAYER_VARIANTS
from migration.command import DEFAULTS, Command

SAME_MEANING = {  # official flag -> our setting
    "llm_qk_norm": "model.qk_layernorm",
    "tie_word_embeddings": "model.tie_word_embeddings",
    "max_latent_size": "model.max_latent_size",
    "latent_patch_size": "model.latent_patch_size",
    "vit_patch_size": "model.vit.patch_size",
    "vit_max_num_patch_per_side": "model.vit.max_num_patch_per_side",
    "connector_act": "model.connector_act",
    "interpolate_pos": "model.interpolate_pos",
    "visual_gen": "model.visual_gen",
    "visual_und": "model.visual_und",
    "timestep_shift": "model.timestep_shift",
    "freeze_llm": "model.freeze_llm",
    "freeze_vit": "model.freeze_vit",
    "freeze_und": "model.freeze_und",
    "text_cond_dropout_prob": "data.text_cond_dropout_prob",
    "vae_cond_dropout_prob": "data.vae_cond_dropout_prob",
    "vit_cond_dropout_prob": "data.vit_cond_dropout_prob",
    "num_workers": "data.num_workers",
    "expected_num_tokens": "data.expected_num_tokens",
    "max_num_tokens": "data.max_num_tokens",
    "max_num_tokens_per_sample": "data.max_num_tokens_per_sample",
    "prefer_buffer_before": "data.prefer_buffer_before",
    "max_buffer_size": "data.max_buffer_size",
    "data_seed": "data.seed",
    "lr": "optimizer.lr",
    "warmup_steps": "optimizer.lr_warmup_steps",
    "lr_scheduler": "optimizer.lr_decay_style",
    "beta1": "optimizer.adam_beta1",
    "beta2": "optimizer.adam_beta2",
    "eps": "optimizer.adam_eps",
    "max_grad_norm": "optimizer.clip_grad",
    "ema": "optimizer.ema_decay",
    "total_steps": "training.train_steps",
    "mse_weight": "training.mse_weight",
    "ce_weight": "training.ce_weight",
    "ce_loss_reweighting": "training.ce_loss_reweighting",
    "global_seed": "training.seed",
    "save_every": "checkpoint.save_interval",
    "auto_resume": "checkpoint.auto_resume",
    "log_every": "logging.log_interval",
}
# with a BAGEL folder these are facts of its files, which here nothing overrides
OF_THE_FOLDER = {"llm_qk_norm", "tie_word_embeddings", "latent_patch_size", "max_latent_size", "connector_act",
                 "vit_patch_size", "vit_max_num_patch_per_side"}  # fmt: skip
_SHARDING = (
    "FSDP's way to shard; here the optimizer state is always sharded over data-parallel ranks and parallel.* says how "
    "the model is split: `python tools/plan_parallelism.py` finds a layout"
)
_WANDB = "losses are written as TensorBoard events and metrics.jsonl to checkpoint.run_dir"
NO_EQUIVALENT = {  # flag -> why
    "prefetch_factor": "read-ahead is bounded by memory, data.prefetch_mib, not by a number of batches",
    "batch_size": "the official script does not use it: a rank's batch is one pack",
    "num_replicate": _SHARDING,
    "num_shard": _SHARDING,
    "sharding_strategy": _SHARDING,
    "backward_prefetch": _SHARDING,
    "cpu_offload": _SHARDING,
    "use_flex": "attention kernels are kernels.attention_backend (auto: the fastest that is installed; flex is there)",
    "save_dtype": "checkpoints hold what training holds; an exported BAGEL folder is bf16",
    "wandb_project": _WANDB,
    "wandb_name": _WANDB,
    "wandb_runid": _WANDB,
    "wandb_resume": _WANDB,
    "wandb_offline": _WANDB,
}


@dataclass
class Translation:
    """Our settings by dotted name; what was lost, as (flag, reason); what the user should look at."""

    settings: dict[str, object] = field(default_factory=dict)
    lost: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def translate(command: Command) -> Translation:
    """All settings that the command implies, its defaults included, which differ from ours."""
    out = Translation()
    from_folder = bool(command["finetune_from_hf"])
    for flag, setting in SAME_MEANING.items():
        if not (from_folder and flag in OF_THE_FOLDER):
            out.settings[setting] = command[flag]
        elif flag in command.given and flag != "max_latent_size":
            out.lost.append((flag, "the files of model_path decide, which model.folder names"))
    # the official constant schedule does not look at min_lr
    out.settings["optimizer.min_lr"] = command["min_lr"] if command["lr_scheduler"] == "cosine" else 0.0
    out.settings["training.global_batch_size"] = command.gpus * command["gradient_accumulation_steps"]
    (_released if from_folder else _from_parts)(command, out)
    _folders(command, out)
    _special(command, out)
    for flag, reason in NO_EQUIVALENT.items():
        if flag in command.given:
            out.lost.append((flag, reason))
    out.lost += [(flag, "the official script has no such flag") for flag in command.unknown]
    for setting, value in out.settings.items():
        if isinstance(value, str) and "$" in value:
            out.notes.append(f"{setting} is `{value}`: put in what the shell's variable stands for.")
    return out


def _released(command: Command, out: Translation) -> None:
    """--finetune_from_hf: shape and autoencoder from model_path, weights from resume_from."""
    folder, weights = command["model_path"], command["resume_from"] or command["model_path"]
    out.settings["model.folder"] = folder
    out.settings["checkpoint.init_from"] = weights
    if str(weights).rstrip("/") != str(folder).rstrip("/"):
        out.settings["data.tokenizer"] = out.settings["checkpoint.init_vae"] = folder
    if command["resume_from"] is None:
        out.notes.append("without resume_from the official script starts from random weights; here model_path's.")
    out.settings["checkpoint.load_ema"] = command["finetune_from_ema"] and command["resume_model_only"]
    _optimizer_state(command, out)


def _from_parts(command: Command, out: Translation) -> None:
    """Pre-training: language model, ViT and autoencoder apart, or a checkpoint of an earlier stage."""
    if command["resume_from"] is None:
        out.settings["checkpoint.init_llm"] = command["llm_path"]
        if command["visual_und"]:
            out.settings["checkpoint.init_vit"] = command["vit_path"]
    else:
        out.settings["checkpoint.init_from"] = command["resume_from"]
        out.settings["checkpoint.load_ema"] = command["finetune_from_ema"] and command["resume_model_only"]
        _optimizer_state(command, out)
    if command["visual_gen"]:
        out.settings["checkpoint.init_vae"] = command["vae_path"]
    out.settings["data.tokenizer"] = command["llm_path"]
    out.notes.append(
        "model.hidden_size and the other sizes come from the JSON files of llm_path and vit_path; where those could "
        "not be read they are BAGEL-7B's: compare them."
    )


def _optimizer_state(command: Command, out: Translation) -> None:
    if command["resume_from"] is not None and not command["resume_model_only"]:
        out.lost.append(
            ("resume_from", "an official checkpoint's optimizer, schedule and data state cannot be read: weights only")
        )


def _folders(command: Command, out: Translation) -> None:
    """Checkpoints and logs share one run folder here."""
    if command["exp_checkpoint_dir"] is not None:
        out.settings["checkpoint.run_dir"] = f"{command['exp_checkpoint_dir']}/{command['exp_name']}"
        return
    out.settings["checkpoint.run_dir"] = command["checkpoint_dir"]
    if "results_dir" in command.given:
        out.lost.append(("results_dir", "logs lie beside the checkpoints, in checkpoint.run_dir"))


def _special(command: Command, out: Translation) -> None:
    """Flags whose values say whether they can be translated."""
    module = command["layer_module"]
    if module in LAYER_VARIANTS:
        out.settings["model.layer_variant"] = LAYER_VARIANTS[module]
    else:
        out.lost.append(("layer_module", f"`{module}` is unknown; known are {', '.join(LAYER_VARIANTS)}"))
    if not command["freeze_vae"]:
        out.lost.append(("freeze_vae", "the autoencoder is never trained here"))
    if command["vit_rope"]:
        out.lost.append(("vit_rope", "the ViT has learned positions only"))
    if not command["copy_init_moe"]:
        out.lost.append(("copy_init_moe", "gen weights that no file holds always start as copies of und's"))
    if command["vit_select_layer"] != DEFAULTS["vit_select_layer"]:
        out.lost.append(("vit_select_layer", "set model.vit.num_layers to the number of ViT layers that are used"))
    if command["lr_scheduler"] not in ("constant", "cosine"):
        out.lost.append(("lr_scheduler", f"`{command['lr_scheduler']}` is neither constant nor cosine"))
        out.settings["optimizer.lr_decay_style"] = "constant"
    if not command["ema"]:
        out.settings["optimizer.ema_decay"] = None
