"""Loading a configuration: files, presets, overrides, help, BAGEL folders, and the sentence about what is unknown."""

import json
import shutil

import pytest
import yaml

from megabagel.config.datasets import load_dataset_groups
from megabagel.config.errors import ConfigError
from megabagel.config.folder import read_model_config
from megabagel.config.help import dotted_fields, meanings
from megabagel.config.load import load_config, preset_names, to_yaml
from megabagel.config.schema import Config, ModelConfig
from tests.tiny_data import CHECKPOINT, GOLDEN, VAE_ARGS, VIT_ARGS

CASES = ("public-basic", "public-wide")


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_no_argument_gives_the_defaults():
    assert load_config([]) == Config()


def test_overrides_win_over_files_and_later_files_over_earlier_ones(tmp_path):
    first = write(tmp_path / "a.yaml", {"optimizer": {"lr": 1e-3, "min_lr": 1e-5}, "model": {"vit": {"patch_size": 7}}})
    second = write(tmp_path / "b.yaml", {"optimizer": {"lr": 2e-3}})
    config = load_config(
        ["--config", first, f"--config={second}", "--optimizer.min_lr", "1e-6", "--data.tokenizer=null"]
    )
    assert (config.optimizer.lr, config.optimizer.min_lr, config.model.vit.patch_size) == (2e-3, 1e-6, 7)
    assert config.model.vit.hidden_size == Config().model.vit.hidden_size


def test_a_switch_without_a_value_is_true():
    off = ["--checkpoint.load_ema=false", "--model.qk_layernorm", "false", "--model.freeze_llm=false"]
    config = load_config(off)
    assert not (config.checkpoint.load_ema or config.model.qk_layernorm or config.model.freeze_llm)
    config = load_config(
        [*off, "--checkpoint.load_ema", "--model.freeze_llm", "--data.seed", "5", "--model.qk_layernorm"]
    )
    assert config.checkpoint.load_ema and config.model.qk_layernorm and config.model.freeze_llm


def test_numbers_like_1e_minus_5_and_lists_are_read_from_yaml(tmp_path):
    file = write(tmp_path / "a.yaml", "optimizer: {lr: 1e-5}\nmodel: {vae: {ch_mult: [1, 2]}}\n")
    config = load_config(["--config", file])
    assert config.optimizer.lr == 1e-5
    assert config.model.vae.ch_mult == (1, 2)


@pytest.mark.parametrize("preset", ["bagel_7b_mot", "demo", "tiny"])
def test_presets_load_and_survive_yaml(preset, tmp_path):
    assert preset in preset_names()
    config = load_config(["--config", preset])
    assert load_config(["--config", write(tmp_path / "resolved.yaml", to_yaml(config))]) == config


def test_the_7b_preset_has_the_shape_of_the_defaults():
    model = load_config(["--config", "bagel_7b_mot"]).model
    assert model == ModelConfig()


def test_help_explains_every_commented_field_and_shows_an_example(capsys):
    with pytest.raises(SystemExit) as exit_:
        load_config(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Example: python -m megabagel.train --config" in text
    for name in dotted_fields(Config):
        assert f"--{name}" in text
    explained = meanings(Config)
    assert len(explained) > 30
    for comment in ("key and value heads", "null: no moving average", "ranks that split every layer"):
        assert comment in text


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (
            {"model": {"hiddn_size": 3}},
            "unknown key `model.hiddn_size`, did you mean `hidden_size`? (allowed here: folder,",
        ),
        ({"modell": {}}, "unknown key `modell`, did you mean `model`? (allowed here: model, parallel,"),
        ({"model": {"vit": {"qqq": 3}}}, "unknown key `model.vit.qqq` (allowed here: hidden_size"),
        ({"model": 3}, "`model` is a group and must hold settings, found 3"),
        ("model: {hidden_size: [}", "is not valid YAML: while parsing"),
        (
            "- 1",
            "must hold groups of settings (model, parallel, data, optimizer, training, kernels, checkpoint, "
            "validation, samples, faults, logging)",
        ),
        ({"model": {"hidden_size": "abc"}}, 'setting "model.hidden_size": expected int, found abc'),
        ({"model": {"layer_variant": "x"}}, "setting \"model.layer_variant\": expected one of ['mot', 'moe', 'dense']"),
        ({"model": {"freeze_vae": False}}, 'setting "model.freeze_vae": expected one of [True], found False'),
    ],
)
def test_faults_of_a_config_file_are_one_sentence_with_its_name(content, fragment, tmp_path):
    file = write(tmp_path / "run.yaml", content)
    with pytest.raises(ConfigError) as error:
        load_config(["--config", file])
    assert fragment in str(error.value)
    assert "\n" not in str(error.value)
    if "setting" not in fragment:
        assert file in str(error.value)


@pytest.mark.parametrize(
    ("argv", "fragment"),
    [
        (
            ["--config", "nowhere.yaml"],
            "config file nowhere.yaml cannot be read (No such file or directory); give a file or",
        ),
        (["--training.sed", "1"], "command line: unknown key `training.sed`, did you mean `seed`?"),
        (
            ["--trainig.seed", "1"],
            "command line: unknown option `--trainig.seed`; options are --config and --group.key",
        ),
        (["--training.seed", "x"], 'setting "training.seed": expected int, found x; see --help.'),
        (["--training.seed"], "--training.seed: expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
        (["--model.folder", "/nowhere"], "model.folder: there is no folder /nowhere"),
    ],
)
def test_faults_of_the_command_line_are_one_sentence(argv, fragment):
    with pytest.raises(ConfigError) as error:
        load_config(argv)
    assert fragment in str(error.value)
    assert "\n" not in str(error.value)


# --- BAGEL folders


@pytest.mark.parametrize("case", CASES)
def test_the_shape_of_a_golden_folder_is_read_from_its_json_files(case):
    stated = json.loads((GOLDEN / case / "meta.json").read_text())["config"]
    model = load_config(["--model.folder", str(GOLDEN / case / "ckpt"), "--model.freeze_llm", "true"]).model
    llm = stated["llm_config"]
    assert (model.hidden_size, model.num_layers) == (llm["hidden_size"], llm["num_hidden_layers"])
    assert (model.num_attention_heads, model.num_query_groups) == (
        llm["num_attention_heads"],
        llm["num_key_value_heads"],
    )
    assert (model.ffn_hidden_size, model.vocab_size) == (llm["intermediate_size"], llm["vocab_size"])
    assert (model.rotary_base, model.layernorm_epsilon) == (llm["rope_theta"], llm["rms_norm_eps"])
    assert model.vit.num_layers == stated["vit_layers_used"] == stated["vit_config"]["num_hidden_layers"] - 1
    assert model.vit.hidden_size == stated["vit_config"]["hidden_size"]
    assert model.vit.max_num_patch_per_side == stated["vit_max_num_patch_per_side"]
    assert (model.max_latent_size, model.timestep_shift) == (stated["max_latent_size"], stated["timestep_shift"])
    assert {**vars(model.vae), "ch_mult": list(model.vae.ch_mult)}.items() >= stated["ae_params"].items()
    assert (model.layer_variant, model.freeze_llm) == ("mot", True)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / "public-basic" / "ckpt", tmp_path / "ckpt")


def edit(file, **changes):
    """Rewrite a JSON file with some keys changed; None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("name", "variant"),
    [("Qwen2MoTDecoderLayer", "mot"), ("Qwen2MoEDecoderLayer", "moe"), ("Qwen2DecoderLayer", "dense"), (None, "moe")],
)
def test_the_layer_variant_follows_layer_module_and_stays_when_there_is_none(name, variant, folder):
    (folder / "config.json").unlink()
    edit(folder / "llm_config.json", layer_module=name)
    assert read_model_config(str(folder), ModelConfig(layer_variant="moe")).layer_variant == variant


def test_the_latent_table_of_the_weights_wins_over_config_json(folder):
    edit(folder / "config.json", max_latent_size=32)
    assert read_model_config(str(folder), ModelConfig()).max_latent_size == 8
    (folder / "ema.safetensors").unlink()
    assert read_model_config(str(folder), ModelConfig()).max_latent_size == 32
    (folder / "config.json").unlink()
    assert read_model_config(str(folder), ModelConfig()).max_latent_size == 64


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (
            lambda f: (f / "llm_config.json").unlink(),
            "llm_config.json cannot be read (No such file or directory); a BAGEL",
        ),
        (lambda f: (f / "vit_config.json").write_text("{"), "vit_config.json is not valid JSON"),
        (lambda f: (f / "vit_config.json").write_text("[]"), "vit_config.json must hold a JSON object, found list"),
        (lambda f: edit(f / "llm_config.json", rope_theta=None), "key `rope_theta` is missing"),
        (lambda f: edit(f / "llm_config.json", hidden_size="64"), "`hidden_size` must be a number, found '64'"),
        (lambda f: edit(f / "llm_config.json", layer_module="X"), "layer_module `X` is unknown; known are Qwen2MoT"),
        (lambda f: edit(f / "ae_params.json", chn=1), "ae_params.json: unknown key `chn`, did you mean `ch`?"),
        (lambda f: (f / "ema.safetensors").write_bytes(b"123"), "ema.safetensors is not a readable safetensors file"),
    ],
)
def test_faults_of_a_folder_are_one_sentence(damage, fragment, folder):
    damage(folder)
    with pytest.raises(ConfigError) as error:
        read_model_config(str(folder), ModelConfig())
    assert fragment in str(error.value)
    assert "\n" not in str(error.value)


# --- the data file


def data_file(**changes) -> dict:
    t2i = {"dataset_names": ["a"], "datasets": {"a": {"data_dir": "pictures"}}, "image_transform_args": dict(VAE_ARGS)}
    return {"t2i_pretrain": t2i | changes}


def test_paths_of_the_data_file_count_from_its_folder(tmp_path):
    vlm = {
        "datasets": {"b": {"jsonl_path": "b/b.jsonl"}, "unused": {"jsonl_path": "/x"}},
        "dataset_names": ["b"],
        "image_transform_args": VIT_ARGS,
    }
    file = write(tmp_path / "data.yaml", data_file(weight=2, num_used_data=[10]) | {"vlm_sft": vlm})
    groups = load_dataset_groups(file)
    assert list(groups) == ["t2i_pretrain", "vlm_sft"]
    assert groups["t2i_pretrain"].datasets["a"].data_dir == str(tmp_path / "pictures")
    assert (groups["t2i_pretrain"].weight, groups["t2i_pretrain"].num_used_data) == (2.0, [10])
    assert list(groups["vlm_sft"].datasets) == ["b"]
    assert groups["vlm_sft"].datasets["b"].data_dir == str(tmp_path / "b")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("", "must map names to groups of data sets; it holds none"),
        ("a: [", "is not valid YAML"),
        ({"t2i": {}}, "group `t2i`: `t2i` is not a format; set `format` to one of t2i_pretrain"),
        ({"t2i_pretrain": 3}, "group `t2i_pretrain` must be a mapping of keys to values, found 3 (int)"),
        (data_file(is_mandatry=True), "group `t2i_pretrain`: unknown key `is_mandatry`, did you mean `is_mandatory`?"),
        (data_file(is_mandatory=1), "key `is_mandatory` must be true or false, found 1 (int)"),
        (data_file(weight="x"), "key `weight` must be a number, found 'x' (str)"),
        (data_file(num_used_data=10), "key `num_used_data` must be a list, found 10 (int)"),
        (data_file(num_used_data=[1, 2]), "`num_used_data` has 2 entries for 1 data sets; give one for each"),
        (data_file(dataset_names=["z"]), "`dataset_names` has `z`, which `datasets` does not describe (a)"),
        (data_file(datasets={}, dataset_names=[]), "`datasets` is empty; describe at least one data set"),
        (data_file(datasets=[1]), "key `datasets` must be a mapping, found [1] (list)"),
        (data_file(datasets={"a": {}}), "data_dir` is missing; t2i_pretrain reads the parquet files of a folder"),
        (data_file(datasets={"a": {"dir": "x"}}), "unknown key `dir`, did you mean `data_dir`?"),
        (data_file(image_transform_args={"image_stride": 16}), "key `max_image_size` is missing; add it"),
        ({"unified_edit": data_file()["t2i_pretrain"]}, "key `vit_image_transform_args` is missing"),
        ({"vlm_sft": data_file()["t2i_pretrain"]}, "key `jsonl_path` is missing; vlm_sft reads conversations"),
    ],
)
def test_faults_of_the_data_file_are_one_sentence_with_its_name(content, fragment, tmp_path):
    file = write(tmp_path / "data.yaml", content)
    with pytest.raises(ConfigError) as error:
        load_dataset_groups(file)
    assert fragment in str(error.value)
    assert file in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_data_file_is_one_sentence():
    with pytest.raises(ConfigError, match="data file nowhere.yaml cannot be read"):
        load_dataset_groups("nowhere.yaml")


def test_switches_can_differ_from_what_the_folder_says_but_its_shape_stays():
    argv = [f"--model.folder={CHECKPOINT}", "--model.timestep_shift=3", "--model.visual_gen=false"]
    model = load_config([*argv, "--model.hidden_size=4096"]).model
    assert (model.timestep_shift, model.visual_gen, model.visual_und, model.hidden_size) == (3.0, False, True, 64)
