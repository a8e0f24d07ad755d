"""An official BAGEL command becomes a configuration that the trainer reads; what has no equivalent is named."""

import dataclasses
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]

import translate_bagel_args  # noqa: E402
from migration.command import DEFAULTS, CommandError, read_command  # noqa: E402
from migration.flags import NO_EQUIVALENT, SAME_MEANING, translate  # noqa: E402
from migration.registry import read_registry  # noqa: E402

from megabagel.config.checks import check_config  # noqa: E402
from megabagel.config.datasets import load_dataset_groups  # noqa: E402
from megabagel.config.load import load_config  # noqa: E402
from megabagel.config.schema import Config  # noqa: E402
from tests.tiny_data import CHECKPOINT, write_data  # noqa: E402

FINE_TUNE = """
# fine-tuning, two nodes
export NCCL_DEBUG=INFO
torchrun \\
  --nnodes=2 --node_rank=$node_rank \\
  --nproc_per_node=8 \\
  train/pretrain_unified_navit.py \\
  --dataset_config_file {data} \\
  --model_path {model} \\
  --layer_module Qwen2MoTDecoderLayer \\
  --max_latent_size 8 \\
  --resume-from {model} --finetune_from_hf True --resume-model-only True --finetune-from-ema True \\
  --auto_resume True --log_every 1 --lr=2e-5 --num_worker 1 \\
  --expected_num_tokens 150 --max_num_tokens 260 --max_num_tokens_per_sample 200 \\
  --num_shard 16 --sharding_strategy HYBRID_SHARD --wandb_project mine --cpu_offload True --freeze_vae False \\
  --checkpoint_dir out/ckpt --my_flag 3
"""
REGISTRY = """
import os
from .t2i_dataset import T2IIterableDataset
from .vlm_dataset import SftJSONLIterableDataset

raise RuntimeError("this file is never run")
ROOT = "{root}"
DATASET_REGISTRY = {{
    "t2i_pretrain": T2IIterableDataset,
    "chat_sft": SftJSONLIterableDataset,
    "robots": robots.RobotDataset,
}}
DATASET_INFO = {{
    "t2i_pretrain": {{"t2i": {{"data_dir": os.path.join(ROOT, "t2i_pretrain"), "json_dir": "x"}}}},
    "chat_sft": {{
        "llava": {{"data_dir": f"{{ROOT}}/vlm_sft", "jsonl_path": ROOT + "/vlm_sft/rows.jsonl"}},
    }},
}}
"""


@pytest.fixture
def official(tmp_path) -> dict[str, Path]:
    """A repository's files over tiny data."""
    ours = yaml.safe_load(write_data(tmp_path / "tiny", rows=3).read_text())
    jsonl = Path(ours["vlm_sft"]["datasets"]["tiny"]["jsonl_path"])
    root = tmp_path / "tiny"
    groups = {
        "t2i_pretrain": {
            "dataset_names": ["t2i"],
            "image_transform_args": ours["t2i_pretrain"]["image_transform_args"],
            "is_mandatory": True,
            "num_used_data": [10],
            "weight": 2.0,
            "colour": "red",
        },
        "chat_sft": {
            "dataset_names": ["llava"],
            "image_transform_args": ours["vlm_sft"]["image_transform_args"],
            "shuffle_lines": True,
        },
        "robots": {"dataset_names": ["arm"]},
    }
    files = {name: tmp_path / name for name in ("example.yaml", "dataset_info.py", "train.sh", "run.yaml")}
    files["example.yaml"].write_text(yaml.safe_dump(groups))
    files["dataset_info.py"].write_text(REGISTRY.format(root=root).replace("/vlm_sft/rows.jsonl", f"/{jsonl}"))
    files["train.sh"].write_text(FINE_TUNE.format(data=files["example.yaml"], model=CHECKPOINT))
    return files


def run(official: dict[str, Path]) -> int:
    arguments = ("--script", "train.sh"), ("--dataset-info", "dataset_info.py"), ("--out", "run.yaml")
    return translate_bagel_args.main([text for flag, name in arguments for text in (flag, str(official[name]))])


def test_a_fine_tuning_script_becomes_a_run_that_may_start(official, capsys):
    assert run(official) == 0
    printed = capsys.readouterr().out
    config = load_config(["--config", str(official["run.yaml"])])
    check_config(config, 16)
    assert config.training.global_batch_size == 16  # a pack per GPU
    assert (config.optimizer.lr, config.data.num_workers, config.checkpoint.auto_resume) == (2e-5, 1, True)
    assert config.model.folder == config.checkpoint.init_from == str(CHECKPOINT)
    assert config.checkpoint.load_ema and config.checkpoint.run_dir == "out/ckpt"
    assert config.optimizer.min_lr == 0  # the constant schedule has none
    for flag in ("num_shard", "sharding_strategy", "cpu_offload", "wandb_project", "freeze_vae", "my_flag"):
        assert f"  --{flag}: " in printed
    for flag in ("lr", "num_workers", "backward_prefetch", "max_latent_size"):
        assert f"--{flag}: " not in printed


def test_the_data_file_holds_the_registrys_paths(official, capsys):
    run(official)
    groups = load_dataset_groups(str(official["run.yaml"].with_name("run_data.yaml")))
    assert {name: group.format for name, group in groups.items()} == {
        "t2i_pretrain": "t2i_pretrain", "chat_sft": "vlm_sft",
    }  # fmt: skip
    t2i = groups["t2i_pretrain"]
    assert (t2i.weight, t2i.is_mandatory, t2i.num_used_data) == (2.0, True, [10])
    assert Path(t2i.datasets["t2i"].data_dir).is_dir()
    assert Path(groups["chat_sft"].datasets["llava"].jsonl_path).is_file()
    printed = capsys.readouterr().out
    assert "--robots: the group is read by RobotDataset" in printed
    assert "--t2i_pretrain.colour: " in printed and "--t2i_pretrain.t2i.json_dir: " in printed


def test_official_defaults_that_differ_from_ours_are_written_out():
    settings = translate(read_command("torchrun train/pretrain_unified_navit.py --llm_path L --vae_path V")).settings
    assert settings["optimizer.lr"] == 1e-4 and settings["model.max_latent_size"] == 32
    assert settings["logging.log_interval"] == 10 and settings["checkpoint.auto_resume"] is False
    assert settings["checkpoint.init_llm"] == settings["data.tokenizer"] == "L"
    assert settings["checkpoint.init_vae"] == "V" and "checkpoint.init_from" not in settings
    assert settings["training.global_batch_size"] == 1


def test_every_official_flag_is_translated_or_explained():
    rules = (
        "model_path llm_path vit_path vae_path layer_module vit_select_layer vit_rope min_lr dataset_config_file "
        "results_dir checkpoint_dir exp_checkpoint_dir exp_name resume_from resume_model_only finetune_from_ema "
        "finetune_from_hf gradient_accumulation_steps freeze_vae copy_init_moe"
    )
    assert set(rules.split()) | SAME_MEANING.keys() | NO_EQUIVALENT.keys() == DEFAULTS.keys()


def test_every_setting_exists():
    for setting in SAME_MEANING.values():
        place = Config()
        for name in setting.split("."):
            assert name in {field.name for field in dataclasses.fields(place)}
            place = getattr(place, name)


@pytest.mark.parametrize("flags, setting, value", [
    ("--lr_scheduler cosine --min_lr 1e-6", "optimizer.min_lr", 1e-6),
    ("--layer_module Qwen2MoEDecoderLayer", "model.layer_variant", "moe"),
    ("--ema 0", "optimizer.ema_decay", None),
    ("--gradient_accumulation_steps 4", "training.global_batch_size", 4),
    ("--exp_checkpoint_dir runs --exp_name a", "checkpoint.run_dir", "runs/a"),
    ("--resume_from C --resume_model_only True", "checkpoint.load_ema", False),
])  # fmt: skip
def test_a_flag_means(flags, setting, value):
    assert translate(read_command(f"train/pretrain_unified_navit.py {flags}")).settings[setting] == value


@pytest.mark.parametrize("flags, flag", [
    ("--resume_from C", "resume_from"), ("--vit_rope True", "vit_rope"), ("--copy_init_moe False", "copy_init_moe"),
    ("--layer_module Mine", "layer_module"), ("--vit_select_layer -1", "vit_select_layer"),
    ("--lr_scheduler wsd", "lr_scheduler"), ("--results_dir logs", "results_dir"),
])  # fmt: skip
def test_what_is_lost_says_why(flags, flag):
    lost = dict(translate(read_command(f"train/pretrain_unified_navit.py {flags}")).lost)
    assert list(lost) == [flag] and len(lost[flag]) > 15


@pytest.mark.parametrize("text, sentence", [
    ("python train.py", "0 commands with pretrain_unified_navit.py were found"),
    ("a/pretrain_unified_navit.py --lr 1 ; b/pretrain_unified_navit.py", "2 commands with "),
    ("torchrun --nnodes=$NOPE x/pretrain_unified_navit.py", "--nnodes is `$NOPE`, which is no number"),
    ("x/pretrain_unified_navit.py --lr fast", "--lr is `fast`, but the official script takes a value of type float."),
    ("x/pretrain_unified_navit.py --visual_gen maybe", "--visual_gen is `maybe`"),
    ("x/pretrain_unified_navit.py 'unclosed", "the command cannot be read: no closing quotation."),
])  # fmt: skip
def test_a_command_that_cannot_be_read_is_one_sentence(text, sentence):
    with pytest.raises(CommandError) as error:
        read_command(text)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, sentence", [
    ("DATASET_REGISTRY = {}\nDATASET_INFO = build()", "line 2: `build()` is not a plain value; write the value out."),
    ("DATASET_REGISTRY = {}", "does not assign DATASET_INFO"),
    ("def", "is no Python file"),
])  # fmt: skip
def test_a_registry_that_is_no_plain_table_is_one_sentence(text, sentence, tmp_path):
    path = tmp_path / "dataset_info.py"
    path.write_text(text)
    with pytest.raises(CommandError, match="^[^\n]*\\.$") as error:
        read_registry(path)
    assert sentence in str(error.value)


def test_a_missing_variable_is_named(capsys, tmp_path):
    out = tmp_path / "run.yaml"
    command = ["torchrun", "--nproc_per_node=4", "train/pretrain_unified_navit.py", "--llm_path", "$LLM_OF_NOBODY"]
    assert translate_bagel_args.main(["--out", str(out), "--", *command]) == 0
    printed = capsys.readouterr().out
    assert "data.tokenizer is `$LLM_OF_NOBODY`" in printed and "was not translated" in printed
    assert yaml.safe_load(out.read_text())["training"]["global_batch_size"] == 4
