"""What lies beside the weights in an exported folder: index, configurations, tokenizer, autoencoder."""

import json
import logging
import shutil
from pathlib import Path

from megabagel.checkpoint.bagel_folder import side_files
from megabagel.checkpoint.export_plan import Plan, read_config
from megabagel.config.paths import autoencoder_path, tokenizer_path
from megabagel.config.write_folder import write_model_config

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")


def write_side_files(plan: Plan) -> None:
    """Everything beside the weights: from the base folder, else from the run's configuration."""
    _write_index(plan)
    if plan.base:
        for path in side_files(plan.base):
            shutil.copy(path, plan.out / path.name)
        return
    config = read_config(plan.checkpoint)
    write_model_config(plan.out, plan.model, "float32" if config.training.params_dtype == "fp32" else "bfloat16")
    if config.model.visual_gen and (found := autoencoder_path(config)):
        path = Path(found)
        _copy(path / "ae.safetensors" if path.is_dir() else path, plan.out / "ae.safetensors")
    for name in TOKENIZER_FILES:
        if tokenizer := tokenizer_path(config):
            _copy(Path(tokenizer) / name, plan.out / name)


def _write_index(plan: Plan) -> None:
    """The base folder's indices where they are right for these files; else one that names the (first) weights."""
    found = sorted(plan.base.glob("*.safetensors.index.json")) if plan.base else []
    kept = [path for path in found if _points_to(path, plan)]
    if kept:
        for path in kept:
            shutil.copy(path, plan.out / path.name)
        return
    first = plan.weights[0]
    files = {name: file for name, file in plan.open().items() if plan.weights_of[name] == first}
    total = sum(spec.num_bytes for file in files.values() for spec in file.specs.values())
    weight_map = {tensor: name for name, file in files.items() for tensor in file.specs}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    names = {"model", first} if len(files) > 1 else {"model"}
    for name in names:
        (plan.out / f"{name}.safetensors.index.json").write_text(index + "\n", encoding="utf-8")


def _points_to(index: Path, plan: Plan) -> bool:
    """Whether an index of the base folder is right: the same tensors in the same files, of the same sizes."""
    stated = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    for weights in plan.weights:
        files = plan.base_folder(weights).files
        names = {tensor: name for name, file in files.items() for tensor in file.specs}
        if stated == names and all(plan.files.get(name) == file.head for name, file in files.items()):
            return True
    return False


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        shutil.copy(source, target)
    elif target.name in ("ae.safetensors", "tokenizer.json"):
        logger.warning("%s is not there any more: copy %s into the folder yourself", source, target.name)
