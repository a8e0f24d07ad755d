"""Every rule of `checks.py` and `checks_files.py` fires on a run that breaks it, and on no other."""

import json
import shutil

import pytest
import yaml

from megabagel.config.checks import ConfigError, check_config
from megabagel.config.load import load_config
from tests.tiny_data import CHECKPOINT, training_options, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), rows=3)


def check(data_file, *overrides: str, world_size: int = 1) -> None:
    check_config(load_config([*training_options(data_file, "unused"), *overrides]), world_size)


def fault(data_file, *overrides: str, world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as error:
        check(data_file, *overrides, world_size=world_size)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".") or str(error.value).endswith(").")
    return str(error.value)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_legal_run_passes(world_size, data):
    check(data, world_size=world_size)
    check(data, "--training.params_dtype=bf16")
    check(data, "--parallel.tensor_model_parallel_size=2", "--parallel.sequence_parallel=true", world_size=2)


SHAPE = "--model.folder=null"  # the shape from the fields, so that overrides count
TINY = ["--config=tiny", SHAPE]

ONE_SETTING = [
    # ranges
    ("--optimizer.lr=0", "optimizer.lr is 0.0, but must be greater than 0"),
    ("--optimizer.lr=inf", "expected float, found inf"),
    ("--optimizer.adam_eps=0", "optimizer.adam_eps is 0.0"),
    ("--optimizer.clip_grad=-1", "optimizer.clip_grad is -1.0"),
    ("--optimizer.adam_beta1=1", "optimizer.adam_beta1 is 1.0, but must lie in 0 .. 1, 1 excluded"),
    ("--optimizer.adam_beta2=-0.1", "optimizer.adam_beta2 is -0.1"),
    ("--optimizer.ema_decay=1.5", "optimizer.ema_decay is 1.5"),
    ("--optimizer.weight_decay=-1", "optimizer.weight_decay is -1.0, but must not be negative"),
    ("--optimizer.lr_warmup_steps=-1", "optimizer.lr_warmup_steps is -1"),
    ("--optimizer.min_lr=1", "optimizer.min_lr 1.0 is above optimizer.lr 0.001"),
    ("--optimizer.lr_decay_steps=0", "optimizer.lr_decay_steps 0 must be more than optimizer.lr_warmup_steps 0"),
    ("--training.train_steps=0", "training.train_steps is 0"),
    ("--training.global_batch_size=0", "training.global_batch_size is 0"),
    ("--training.mse_weight=-1", "training.mse_weight is -1.0"),
    ("--data.text_cond_dropout_prob=1.1", "data.text_cond_dropout_prob is 1.1, but a probability lies in 0 .. 1"),
    ("--data.vit_cond_dropout_prob=-1", "data.vit_cond_dropout_prob is -1.0"),
    ("--data.vae_cond_dropout_prob=2", "data.vae_cond_dropout_prob is 2.0"),
    ("--data.num_workers=-1", "data.num_workers is -1"),
    ("--data.max_buffer_size=-1", "data.max_buffer_size is -1"),
    ("--data.prefetch_mib=0", "data.prefetch_mib is 0"),
    ("--checkpoint.save_interval=-1", "checkpoint.save_interval is -1"),
    ("--logging.log_interval=0", "logging.log_interval is 0"),
    ("--logging.peak_tflops=0", "logging.peak_tflops is 0.0"),
    ("--parallel.tensor_model_parallel_size=0", "parallel.tensor_model_parallel_size is 0"),
    # budgets
    ("--data.expected_num_tokens=300", "data.expected_num_tokens 300 is more than data.max_num_tokens 260"),
    ("--data.max_num_tokens_per_sample=300", "data.max_num_tokens_per_sample 300 is more than data.max_num_tokens 260"),
    ("--data.max_num_tokens_per_sample=17", "the largest picture takes 18 tokens, more than data.max_num_tokens"),
    # parallel
    ("--parallel.sequence_parallel=true", "parallel.sequence_parallel needs parallel.tensor_model_parallel_size above"),
    ("--parallel.overlap_param_gather=true", "parallel.overlap_param_gather needs parallel.overlap_grad_reduce"),
    ("--parallel.tensor_model_parallel_size=3", "model.num_attention_heads 4 does not divide by parallel.tensor_model"),
    ("--parallel.tensor_model_parallel_size=4", "model.num_query_groups 2 does not divide by parallel.tensor_model"
     "_parallel_size 4; sizes that do are 1, 2."),
    ("--parallel.pipeline_model_parallel_size=3", "model.num_layers 4 does not divide by parallel.pipeline_model"
     "_parallel_size 3; sizes that do are 1, 2, 4, or set"),
    ("--parallel.tensor_model_parallel_size=2", "1 processes do not divide into model replicas of 2"),
    # what is trained
    ("--training.ce_weight=0 --training.mse_weight=0", "training.ce_weight and training.mse_weight are both 0"),
    # files
    ("--checkpoint.init_llm=/x", "checkpoint.init_from and checkpoint.init_llm are both set"),
    ("--checkpoint.init_vit=/x", "checkpoint.init_from and checkpoint.init_vit are both set"),
    ("--checkpoint.init_from=null --checkpoint.init_llm=/x", "checkpoint.init_llm: there is no folder /x"),
    ("--checkpoint.init_from=null --checkpoint.init_llm=.", "checkpoint.init_llm: . holds no *.safetensors file"),
    ("--checkpoint.init_from=/x", "checkpoint.init_from: there is no folder /x"),
    ("--checkpoint.init_from=.", "checkpoint.init_from: . holds neither ema.safetensors nor model.safetensors"),
    ("--checkpoint.init_from=null", "no autoencoder is named, but model.visual_gen is true"),
    ("--checkpoint.init_vae=/x", "checkpoint.init_vae: there is no autoencoder at /x"),
    ("--data.tokenizer=/x", "data.tokenizer: there is no folder /x"),
    ("--data.tokenizer=.", "data.tokenizer: . holds neither tokenizer.json nor vocab.json with merges.txt"),
    ("--data.dataset_config_file=null", "data.dataset_config_file is not set"),
    ("--data.dataset_config_file=/x", "data file /x cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "fragment"), ONE_SETTING, ids=[o for o, _ in ONE_SETTING])
def test_settings_that_no_run_may_have(overrides, fragment, data):
    assert fragment in fault(data, *overrides.split())


SHAPES = [
    ("--model.hidden_size=66", "model.hidden_size 66 does not divide into model.num_attention_heads 4"),
    ("--model.hidden_size=60", "attention heads are 15 wide"),
    ("--model.hidden_size=6 --model.num_attention_heads=3 --model.num_query_groups=1", "6 is not divisible by 4"),
    ("--model.num_query_groups=3", "model.num_attention_heads 4 does not divide into model.num_query_groups 3"),
    ("--model.vit.num_attention_heads=5", "model.vit.hidden_size 48 does not divide into model.vit.num_attention"),
    ("--model.connector_act=swish2", "model.connector_act `swish2` is unknown; allowed are gelu_pytorch_tanh"),
    ("--model.vae.downsample=4", "model.vae.downsample is 4, but model.vae.ch_mult [1, 1, 1, 1] halves the picture"),
    ("--model.vae.num_groups=24", "layers of 32 channels, which do not divide into model.vae.num_groups 24"),
    ("--model.timestep_shift=0", "model.timestep_shift is 0.0"),
    ("--model.max_latent_size=6", "model.max_latent_size is 6, but the weights in"),
    ("--model.vit.max_num_patch_per_side=9", "model.vit.max_num_patch_per_side is 9, but the weights in"),
    ("--model.vocab_size=1024", "was made for vocab_size x hidden_size 512 x 64, but the model has 1024 x 64"),
    ("--model.vae.z_channels=8", "model.vae.z_channels is 8, but"),
    ("--model.vocab_size=384 --checkpoint.init_from=null", "model.vocab_size is 384, but the tokenizer in"),
    ("--model.ffn_hidden_size=129 --parallel.tensor_model_parallel_size=2", "model.ffn_hidden_size 129 does not"),
    ("--model.vocab_size=513 --parallel.tensor_model_parallel_size=2", "model.vocab_size 513 does not divide by"),
    ("--model.freeze_und=true --model.tie_word_embeddings=true", "model.freeze_und trains the vocabulary head and"),
    ("--model.visual_gen=false --model.freeze_und=true", "model.freeze_und trains only what generates pictures"),
    ("--model.visual_gen=false --model.visual_und=false --model.freeze_llm=true", "leaves nothing to train"),
    ("--model.visual_gen=false --training.ce_weight=0", "no loss is left"),
    ("--model.visual_gen=false", "group `t2i_pretrain` makes pictures, but model.visual_gen is false"),
    ("--model.visual_und=false", "group `unified_edit` reads pictures through the ViT, but model.visual_und is false"),
    ("--model.visual_und=false --checkpoint.init_from=null --checkpoint.init_vit=.", "checkpoint.init_vit is set, but"),
    ("--model.max_latent_size=3 --checkpoint.init_from=null",
     "max_image_size 64 makes 4 tokens per side, more than model.max_latent_size 3; set max_image_size to at most 48"),
    ("--model.vit.max_num_patch_per_side=3 --checkpoint.init_from=null",
     "max_image_size 56 makes 4 tokens per side, more than model.vit.max_num_patch_per_side 3; set max_image"),
    ("--model.latent_patch_size=4 --checkpoint.init_from=null",
     "image_stride 16 is not a multiple of the 32 pixels that one token covers (model.vae.downsample 8 x model.latent"),
    ("--model.vit.patch_size=8 --checkpoint.init_from=null",
     "image_stride 14 is not a multiple of the 8 pixels that one token covers (model.vit.patch_size 8)"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "fragment"), SHAPES, ids=[o for o, _ in SHAPES])
def test_shapes_that_do_not_fit_together(overrides, fragment, data):
    sources = [f"--data.tokenizer={CHECKPOINT}", f"--checkpoint.init_vae={CHECKPOINT}"]
    with pytest.raises(ConfigError) as error:
        options = [*training_options(data, "unused"), *TINY, *training_options(data, "unused"), SHAPE, *sources]
        check_config(load_config([*options, *overrides.split()]), 1 if "parallel" not in overrides else 2)
    assert fragment in str(error.value)


def test_no_tokenizer_anywhere(data):
    sources = ["--checkpoint.init_from=null", f"--checkpoint.init_vae={CHECKPOINT}"]
    assert "no tokenizer is named; set data.tokenizer" in fault(data, *sources)


def test_the_batch_must_divide_over_the_replicas(data):
    message = fault(data, world_size=4)
    assert "training.global_batch_size 2 does not divide by the 4 model replicas (4 processes / 1)" in message


def test_pictures_beyond_the_table_are_legal_when_positions_are_interpolated(data):
    sources = [f"--data.tokenizer={CHECKPOINT}", f"--checkpoint.init_vae={CHECKPOINT}", "--checkpoint.init_from=null"]
    small = ["--model.max_latent_size=3", "--model.interpolate_pos=true", SHAPE]
    options = [*TINY, *training_options(data, "unused"), *sources, *small]
    check_config(load_config(options), 1)


# --- the data file and damaged files


@pytest.mark.parametrize(
    ("group", "changes", "fragment"),
    [
        ("t2i_pretrain", {"weight": -1.0}, "group `t2i_pretrain`: weight is -1.0, but must not be negative"),
        ("t2i_pretrain", {"num_used_data": [0]}, "data set `tiny`: num_used_data is 0, but must be at least 1"),
        ("t2i_pretrain", {"datasets": {"tiny": {"data_dir": "no"}}}, "/no is not a folder (relative paths count from"),
        ("t2i_pretrain", {"datasets": {"tiny": {"data_dir": "vlm_sft"}}}, "vlm_sft holds no *.parquet file"),
        ("t2i_pretrain", {"datasets": {"tiny": {"data_dir": "t2i_pretrain", "parquet_info_path": "i"}}},
         "/i is not a file; leave the key out to do without"),
        ("vlm_sft", {"datasets": {"tiny": {"data_dir": ".", "jsonl_path": "no.jsonl"}}}, "/no.jsonl is not a file"),
        ("vlm_sft", {"frame_sampler_args": {"max_num_frames": 2, "min_num_frames": 8}}, "must be positive and in that"),
        ("t2i_pretrain", {"image_transform_args": {"image_stride": 0, "max_image_size": 64, "min_image_size": 32}},
         "image_transform_args: image_stride is 0, but must be at least 1"),
        ("t2i_pretrain", {"image_transform_args": {"image_stride": 16, "max_image_size": 32, "min_image_size": 64}},
         "min_image_size 64 is more than max_image_size 32"),
    ],
)  # fmt: skip
def test_faults_of_the_data_file(group, changes, fragment, data, tmp_path):
    shutil.copytree(data.parent, tmp_path, dirs_exist_ok=True)
    content = yaml.safe_load(data.read_text())
    content[group] |= changes
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    assert fragment in fault(tmp_path / "data.yaml")


def test_a_data_file_without_any_weight(data, tmp_path):
    shutil.copytree(data.parent, tmp_path, dirs_exist_ok=True)
    content = {name: group | {"weight": 0.0} for name, group in yaml.safe_load(data.read_text()).items()}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    assert "no group has a weight above 0" in fault(tmp_path / "data.yaml")


def copied(tmp_path):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "ckpt")
    return folder, [f"--model.folder={CHECKPOINT}", f"--checkpoint.init_from={folder}"]


def test_damaged_weights_tokenizer_and_index_are_named(data, tmp_path):
    folder, options = copied(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer.json is not a readable tokenizer file" in fault(data, *options)
    content["model"]["vocab"]["late"] = 600
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert "has 601 tokens; set it to 640 or more" in fault(data, *options)
    (folder / "ae.safetensors").unlink()
    assert "checkpoint.init_from: there is no autoencoder at" in fault(data, *options)
    (folder / "ema.safetensors").rename(folder / "part-1.safetensors")
    index = folder / "ema.safetensors.index.json"
    index.write_text("[]")
    assert "ema.safetensors.index.json is not a readable weight index" in fault(data, *options)
    index.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}))
    assert "there is no autoencoder at" in fault(data, *options)
    (folder / "part-1.safetensors").write_bytes(b"")
    assert "part-1.safetensors is not a readable safetensors file" in fault(data, *options)
