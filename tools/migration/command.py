"""The official training command as it stands in a shell script: the launcher's numbers and the flags with values.

Flags are those of the official `train/pretrain_unified_navit.py`; its defaults are the ones that its guide states.
"""

import os
import shlex
from dataclasses import dataclass, field

SCRIPT = "pretrain_unified_navit.py"
_LAUNCHER = {"nnodes": 1, "nproc_per_node": 1}
_ENDS = {";", "&", "&&", "||", "|", ">", ">>", "2>&1"}

DEFAULTS: dict[str, object] = {
    # model
    "model_path": "hf/BAGEL-7B-MoT", "llm_path": "hf/Qwen2.5-0.5B-Instruct/", "llm_qk_norm": True,
    "tie_word_embeddings": False, "layer_module": "Qwen2MoTDecoderLayer", "vae_path": "flux/vae/ae.safetensors",
    "vit_path": "hf/siglip-so400m-14-980-flash-attn2-navit/", "max_latent_size": 32, "latent_patch_size": 2,
    "vit_patch_size": 14, "vit_max_num_patch_per_side": 70, "connector_act": "gelu_pytorch_tanh",
    "interpolate_pos": False, "vit_select_layer": -2, "vit_rope": False, "text_cond_dropout_prob": 0.1,
    "vae_cond_dropout_prob": 0.3, "vit_cond_dropout_prob": 0.3,
    # data
    "dataset_config_file": "data/configs/example.yaml", "prefetch_factor": 2, "num_workers": 4,
    "max_num_tokens_per_sample": 16384, "max_num_tokens": 36864, "prefer_buffer_before": 16384,
    "max_buffer_size": 50, "data_seed": 42, "batch_size": 16,
    # training
    "visual_gen": True, "visual_und": True, "results_dir": "results", "checkpoint_dir": "results/checkpoints",
    "exp_checkpoint_dir": None, "exp_name": "run", "save_dtype": None, "wandb_project": "bagel", "wandb_name": "run",
    "wandb_runid": "0", "wandb_resume": "allow", "wandb_offline": False, "global_seed": 4396, "auto_resume": False,
    "resume_from": None, "resume_model_only": False, "finetune_from_ema": False, "finetune_from_hf": False,
    "log_every": 10, "save_every": 2000, "total_steps": 500_000, "warmup_steps": 2000, "lr_scheduler": "constant",
    "lr": 1e-4, "min_lr": 1e-7, "beta1": 0.9, "beta2": 0.95, "eps": 1e-15, "ema": 0.9999, "max_grad_norm": 1.0,
    "timestep_shift": 1.0, "mse_weight": 1.0, "ce_weight": 1.0, "ce_loss_reweighting": False,
    "expected_num_tokens": 32768, "gradient_accumulation_steps": 1, "num_replicate": 1, "num_shard": 8,
    "sharding_strategy": "HYBRID_SHARD", "backward_prefetch": "BACKWARD_PRE", "cpu_offload": False,
    "freeze_llm": False, "freeze_vit": False, "freeze_vae": True, "freeze_und": False, "copy_init_moe": True,
    "use_flex": False,
}  # fmt: skip


class CommandError(ValueError):
    """A command line that cannot be read; the message is one sentence for the user."""


@dataclass
class Command:
    """`given`: official flags as typed values; `unknown`: flags that the official script does not have."""

    gpus: int
    given: dict[str, object] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, flag: str) -> object:
        return self.given.get(flag, DEFAULTS[flag])


def read_command(text: str) -> Command:
    """The one official training command in the text of a shell script; variables come from the environment.

    Raises CommandError where there is none, more than one, or a value that does not fit its flag.
    """
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise CommandError(f"the command cannot be read: {str(error).lower()}.") from None
    starts = [i for i, word in enumerate(words) if word.endswith(SCRIPT)]
    if len(starts) != 1:
        raise CommandError(
            f"{len(starts)} commands with {SCRIPT} were found, but exactly one is translated; cut the text to that one."
        )
    launcher = _flags(words[: starts[0]])
    end = next((i for i in range(starts[0], len(words)) if words[i] in _ENDS), len(words))
    sizes = {name: _number(launcher.get(name, str(default)), name) for name, default in _LAUNCHER.items()}
    command = Command(sizes["nnodes"] * sizes["nproc_per_node"])
    for name, value in _flags(words[starts[0] + 1 : end]).items():
        flag = _full_name(name)
        if flag is None:
            command.unknown[name] = value
        else:
            command.given[flag] = _typed(value, DEFAULTS[flag], flag)
    return command


def _flags(words: list[str]) -> dict[str, str]:
    """`--a 1 --b=2 --c` -> values by name, dashes as underscores; a flag without a value is `True`."""
    flags, name = {}, None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            flags[name] = os.path.expandvars(value) if equals else "True"
            name = None if equals else name
        elif name is not None:
            flags[name], name = os.path.expandvars(word), None
    return flags


def _full_name(name: str) -> str | None:
    """argparse takes beginnings of flags, where only one flag begins so."""
    if name in DEFAULTS:
        return name
    longer = [flag for flag in DEFAULTS if flag.startswith(name)]
    return longer[0] if len(longer) == 1 else None


def _number(value: str, name: str) -> int:
    if value.isdecimal():
        return int(value)
    raise CommandError(f"--{name} is `{value}`, which is no number; set the variable in the environment or write it.")


def _typed(value: str, default: object, flag: str) -> object:
    try:
        if isinstance(default, bool):
            return {"true": True, "t": True, "yes": True, "y": True, "1": True, "false": False, "f": False,
                    "no": False, "n": False, "0": False}[value.lower()]  # fmt: skip
        if isinstance(default, int):
            return int(value)
        return float(value) if isinstance(default, float) else value
    except (ValueError, KeyError):
        kind = type(default).__name__
        raise CommandError(f"--{flag} is `{value}`, but the official script takes a value of type {kind}.") from None
