"""Released weights into a checkpoint without a run, and back: every byte, every key, after kills, from every origin."""

import dataclasses
import filecmp
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megabagel.checkpoint.bagel_folder import BagelFolder
from megabagel.checkpoint.ema import PREFIX as EMA
from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.export import export
from megabagel.checkpoint.export_plan import plan_export
from megabagel.checkpoint.hf import load_weights, open_source
from megabagel.checkpoint.import_folder import import_folder, plan_import
from megabagel.checkpoint.start_folders import StartFolders
from megabagel.checkpoint.torch_dist import TorchDist, checkpoint_folder
from megabagel.config.folder import read_model_config
from megabagel.config.load import load_config
from megabagel.config.paths import autoencoder_path, tokenizer_path
from megabagel.config.schema import CheckpointConfig, Config, KernelConfig, ModelConfig, ParallelConfig, TrainingConfig
from megabagel.models import precision
from megabagel.models.build import build_stages
from megabagel.runtime import distributed
from tests.tiny_data import CHECKPOINT, GOLDEN
from tests.unit.stand_ins import CLASSES, HOPPER

from megabagel.checkpoint.places import placed  # isort: skip  after the adapter
from megabagel.checkpoint.torch_dist_writer import PieceWriter, finish  # isort: skip
from megatron.core.extensions import transformer_engine  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]

import convert_dist_to_hf  # noqa: E402
import convert_hf_to_dist  # noqa: E402
from baseline.random_bagel import write_random_bagel  # noqa: E402

TABLES = {"latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"}


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[distributed.Layout]:
    distributed.destroy()
    yield distributed.initialize(ParallelConfig(), 0)
    distributed.destroy()


def require_equal(left: Path, right: Path) -> None:
    """Both folders hold the same files, byte by byte."""
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    assert filecmp.cmpfiles(left, right, names, shallow=False) == (names, [], [])


def there_and_back(folder: Path, work: Path, **options: object) -> Path:
    import_folder(plan_import(folder, work / "dist", unit_bytes=100_000), **options)
    export(plan_export(work / "dist", work / "back"), **options)
    return work / "back"


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    stored = TorchDist(checkpoint_folder(checkpoint))
    return {key: stored.read(key) for key in stored.shapes}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


def copy_folder(target: Path, stems: dict[str, dict[str, torch.Tensor]]) -> Path:
    """The golden folder with other weights: stem -> tensors."""
    shutil.copytree(CHECKPOINT, target, ignore=shutil.ignore_patterns("*.index.json", "ema.safetensors"))
    for stem, tensors in stems.items():
        save_file(tensors, target / f"{stem}.safetensors")
    return target


@pytest.mark.parametrize("case", ["public-basic", "public-wide"])
def test_a_folder_comes_back_byte_by_byte(case, tmp_path):
    folder = GOLDEN / case / "ckpt"
    assert convert_hf_to_dist.main(["--hf", str(folder), "--out", str(tmp_path / "dist")]) == 0
    assert convert_dist_to_hf.main(["--checkpoint", str(tmp_path / "dist"), "--out", str(tmp_path / "back")]) == 0
    require_equal(folder, tmp_path / "back")


def test_real_names_in_bfloat16_come_back_byte_by_byte_from_several_processes(tmp_path):
    vit = dataclasses.replace(ModelConfig().vit, hidden_size=64, ffn_hidden_size=96, num_layers=3)
    model = ModelConfig(num_layers=2, hidden_size=448, ffn_hidden_size=640, vocab_size=2048, vit=vit)
    write_random_bagel(tmp_path / "hf", model, ("ema", "model"))
    require_equal(tmp_path / "hf", there_and_back(tmp_path / "hf", tmp_path, processes=2))


def weights_of(variant: str) -> dict[str, torch.Tensor]:
    tensors = load_file(CHECKPOINT / "ema.safetensors")
    if variant in ("moe", "dense"):
        tensors = {n: t for n, t in tensors.items() if "_moe_gen" not in n or ".mlp_moe_gen" in n or ".norm_moe" in n}
    if variant == "dense":
        tensors = {n: t for n, t in tensors.items() if "_moe_gen" not in n}
    if variant == "tied":
        del tensors["language_model.lm_head.weight"]
    return tensors


@pytest.mark.parametrize("variant", ["mot", "moe", "dense", "tied", "fused norms"])
def test_keys_and_values_are_those_that_a_model_saves(variant, layout, tmp_path, monkeypatch):
    folder = copy_folder(tmp_path / "hf", {"ema": weights_of(variant)})
    for name in ("llm_config.json", "config.json"):
        content = json.loads((folder / name).read_text())
        for part in (content, content.get("llm_config", {})):
            part.pop("layer_module", None)  # as in the release: the tensors' names tell
            part["tie_word_embeddings"] = variant == "tied"
        (folder / name).write_text(json.dumps(content))
    plan = plan_import(folder, tmp_path / "dist")
    import_folder(plan)
    kernels = KernelConfig()
    if variant == "fused norms":
        for name, stand_in in CLASSES.items():
            monkeypatch.setattr(transformer_engine, name, stand_in)
        monkeypatch.setattr(precision, "probe", lambda: HOPPER)
        kernels = KernelConfig("transformer_engine")
    start = CheckpointConfig(init_from=str(folder))
    config = Config(plan.model, kernels=kernels, training=TrainingConfig(params_dtype="fp32"), checkpoint=start)
    stages = build_stages(config, layout.device)
    load_weights(stages, open_source(config))
    names = " ".join(name for name, _ in stages[0].named_parameters())
    assert ("layer_norm_weight" in names) == (variant == "fused norms")
    (tmp_path / "saved").mkdir()
    pieces = [p for t in placed([SimpleNamespace(module=stages[0])])[0] for p in t.pieces(t.data.detach().view(-1), 0)]
    finish(tmp_path / "saved", [PieceWriter(tmp_path / "saved", 0).write(pieces)], {})
    saved = TorchDist(tmp_path / "saved")
    assert same(tensors_of(tmp_path / "dist"), {key: saved.read(key) for key in saved.shapes})
    export(plan_export(tmp_path / "dist", tmp_path / "back"))
    (tmp_path / "back" / "model.safetensors.index.json").unlink()  # the folder had none
    require_equal(folder, tmp_path / "back")


def test_a_killed_conversion_goes_on(tmp_path):
    plan = plan_import(CHECKPOINT, tmp_path / "dist", unit_bytes=100_000)
    assert len(plan.units) > 8
    for kill_at in (2, 5):  # units finished when the process dies
        child = os.fork()
        if child == 0:
            seen = []

            def done(num_bytes: int, seen: list = seen, kill_at: int = kill_at) -> None:
                seen.append(num_bytes)
                if len(seen) > kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            import_folder(plan, done=done)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    partial = tmp_path / "dist" / "iter_0000000.partial"
    assert partial.is_dir() and not (tmp_path / "dist" / "iter_0000000").exists()
    with (partial / "unfinished.json").open("a") as file:
        file.write('["9", "cut of')
    (partial / "__9_0.distcp").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="beginning of another export or import"):
        import_folder(plan_import(CHECKPOINT, tmp_path / "dist", unit_bytes=100_000, dtype=torch.bfloat16))
    told = []
    import_folder(plan, done=told.append)
    assert told[0] > sum(told) / 4 and sum(told) == plan.num_bytes
    export(plan_export(tmp_path / "dist", tmp_path / "back"))
    require_equal(CHECKPOINT, tmp_path / "back")
    with pytest.raises(CheckpointError, match="is not empty"):
        import_folder(plan)


def test_official_training_checkpoints_have_both_sets_and_configurations_elsewhere(layout, tmp_path):
    average = load_file(CHECKPOINT / "ema.safetensors")
    live = {name: tensor + 1 for name, tensor in average.items()}
    (official := tmp_path / "0002000").mkdir()
    for stem, tensors in (("ema", average), ("model", live)):
        save_file(tensors, official / f"{stem}.safetensors")
    import_folder(plan_import(official, tmp_path / "dist", base=CHECKPOINT))
    found = tensors_of(tmp_path / "dist")
    for key in ("heads.llm2vae.weight", "embeddings.und.word_embeddings.weight"):
        assert torch.equal(found[key], found[EMA + key] + 1)
    export(plan_export(tmp_path / "dist", tmp_path / "back"))
    for stem in ("ema", "model"):
        name = f"{stem}.safetensors"
        assert filecmp.cmp(official / name, tmp_path / "back" / name, shallow=False)
    assert filecmp.cmp(CHECKPOINT / "ae.safetensors", tmp_path / "back" / "ae.safetensors", shallow=False)
    for load_ema, expected in ((True, average), (False, live)):
        start = CheckpointConfig(init_from=str(tmp_path / "dist"), load_ema=load_ema)
        shape = read_model_config(str(tmp_path / "dist"), ModelConfig())
        config = Config(shape, training=TrainingConfig(params_dtype="fp32"), checkpoint=start)
        (stage,) = build_stages(config, layout.device)
        load_weights([stage], open_source(config))
        assert torch.equal(stage.heads.lm_head.weight, expected["language_model.lm_head.weight"])
    import_folder(plan_import(official, tmp_path / "one", base=CHECKPOINT, only="ema"))
    one = tensors_of(tmp_path / "one")
    assert not any(key.startswith(EMA) for key in one)
    assert all(torch.equal(value, found[EMA + key]) for key, value in one.items())


def test_other_dtype(tmp_path):
    import_folder(plan_import(CHECKPOINT, tmp_path / "dist", dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "dist").values()} == {torch.bfloat16}
    export(plan_export(tmp_path / "dist", tmp_path / "back", dtype=torch.bfloat16))
    found, start = (load_file(path / "ema.safetensors") for path in (tmp_path / "back", CHECKPOINT))
    assert same(found, {name: tensor.bfloat16() for name, tensor in start.items()})


def test_a_run_finds_shape_tokenizer_and_autoencoder_in_the_checkpoint(tmp_path):
    import_folder(plan_import(CHECKPOINT, tmp_path / "dist"))
    for path in (tmp_path / "dist", tmp_path / "dist" / "iter_0000000"):
        config = load_config([f"--model.folder={path}", f"--checkpoint.init_from={path}"])
        expected = read_model_config(str(CHECKPOINT), ModelConfig())
        assert dataclasses.replace(config.model, folder=None) == expected
        assert (Path(tokenizer_path(config)) / "tokenizer.json").is_file()
        assert (Path(autoencoder_path(config)) / "ae.safetensors").is_file()


def test_a_start_checkpoint_from_qwen_siglip_and_an_autoencoder(tmp_path):
    """The parts are taken out of the golden folder, under the names that they have on the Hub."""
    tensors = load_file(CHECKPOINT / "ema.safetensors")
    llm = json.loads((CHECKPOINT / "llm_config.json").read_text()) | {"tie_word_embeddings": True}
    llm.pop("layer_module", None)
    vit = json.loads((CHECKPOINT / "vit_config.json").read_text()) | {"image_size": 8 * 14, "patch_size": 14}
    siglip = {n.removeprefix("vit_model."): t for n, t in tensors.items() if n.startswith("vit_model.")}
    patch = "vision_model.embeddings.patch_embedding.weight"
    siglip[patch] = siglip[patch].view(-1, 14, 14, 3).permute(0, 3, 1, 2).contiguous()
    prefix = "language_model."
    qwen = {n.removeprefix(prefix): t.bfloat16() for n, t in tensors.items() if n.startswith(prefix)}
    qwen = {n: t for n, t in qwen.items() if not any(part in n for part in ("_moe_gen", "lm_head", "q_norm", "k_norm"))}
    for name, content, weights in (("qwen", llm, qwen), ("siglip", {"vision_config": vit}, siglip)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
        save_file(weights, tmp_path / name / "model.safetensors")
    shutil.copy(CHECKPOINT / "tokenizer.json", tmp_path / "qwen")
    arguments = ["--llm", tmp_path / "qwen", "--vit", tmp_path / "siglip", "--vae", CHECKPOINT, "--out", tmp_path / "d"]
    assert convert_hf_to_dist.main([str(argument) for argument in [*arguments, "--dtype", "fp32"]]) == 0
    export(plan_export(tmp_path / "d", tmp_path / "back"))
    found = BagelFolder(tmp_path / "back")
    assert found.names() == set(tensors)
    for name in found.names() - TABLES:
        value, und = found.read_whole(name), name.replace("_moe_gen", "")
        if name == "language_model.lm_head.weight":
            und = "language_model.model.embed_tokens.weight"  # the model was tied
        if "q_norm" in name or "k_norm" in name:
            assert (value == 1).all()
        elif und.startswith(prefix):
            assert torch.equal(value, tensors[und].bfloat16().float())
        elif name.startswith("vit_model."):
            assert torch.equal(value, tensors[name])
    assert not found.read_whole("llm2vae.weight").any() and found.read_whole("vae2llm.weight").any()
    shape = read_model_config(str(tmp_path / "d"), ModelConfig())
    assert (shape.vit.num_layers, shape.vit.max_num_patch_per_side) == (vit["num_hidden_layers"] - 1, 8)
    assert filecmp.cmp(CHECKPOINT / "ae.safetensors", tmp_path / "back" / "ae.safetensors", shallow=False)
    with pytest.raises(CheckpointError, match="has no config.json that can be read"):
        StartFolders(tmp_path).model()


def test_what_does_not_fit_is_one_sentence(tmp_path):
    tensors = load_file(CHECKPOINT / "ema.safetensors")
    name = "language_model.model.layers.1.self_attn.v_proj.bias"
    missing = copy_folder(tmp_path / "a", {"ema": {n: t for n, t in tensors.items() if n != name}})
    with pytest.raises(CheckpointError, match=f"has no tensor {name}, which the configured model needs"):
        plan_import(missing, tmp_path / "out")
    narrow = copy_folder(tmp_path / "b", {"ema": tensors | {name: tensors[name][:-1]}})
    with pytest.raises(CheckpointError, match=rf"{name} .* has shape \[31\], .* the model has \[32\]"):
        plan_import(narrow, tmp_path / "out")
    cut = copy_folder(tmp_path / "c", {"ema": tensors})
    (cut / "ema.safetensors").write_bytes((cut / "ema.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file: .* bytes instead of"):
        plan_import(cut, tmp_path / "out")
    with pytest.raises(CheckpointError, match="has no model.safetensors"):
        plan_import(CHECKPOINT, tmp_path / "out", only="model")
    with pytest.raises(CheckpointError, match="holds neither ema.safetensors nor model.safetensors"):
        plan_import(CHECKPOINT.parent, tmp_path / "out")
    assert not (tmp_path / "out").exists()
