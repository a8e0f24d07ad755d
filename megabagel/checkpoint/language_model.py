"""Writes the understanding language model alone, as a folder that transformers' causal language models load.

A model without norms on queries and keys is a Qwen2ForCausalLM. With them it is a Qwen3ForCausalLM, whose biases cover
the output projection too: that one is written as zero, so both are exact. Pictures and the gen stream stay behind.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.export_side_files import TOKENIZER_FILES
from megabagel.checkpoint.given_weights import GivenWeights
from megabagel.checkpoint.names import EMBEDDING, LM_HEAD
from megabagel.checkpoint.safetensors_file import SafetensorsFile, Spec, divide, make_head
from megabagel.config.folder import LLM_KEYS
from megabagel.data.faults import DataError
from megabagel.data.text import Tokenizer

logger = logging.getLogger(__name__)

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
MAX_FILE_BYTES = 5 * 10**9
_PREFIX, _OUT_WEIGHT, _OUT_BIAS = "language_model.", "self_attn.o_proj.weight", "self_attn.o_proj.bias"
_POSITIONS = 32768  # of Qwen2.5, where a folder does not say


@dataclass(frozen=True)
class Plan:
    """`files`: file name -> name in the folder -> spec. `kind`: a key of ARCHITECTURES."""

    given: GivenWeights
    kind: str
    out: Path
    files: dict[str, dict[str, Spec]]

    @property
    def num_bytes(self) -> int:
        return sum(spec.num_bytes for specs in self.files.values() for spec in specs.values())


def plan(
    given: GivenWeights,
    out: str | Path,
    *,
    kind: str | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Plan:
    """What is written where. `kind` None: the one that is exact; `dtype` None: as stored.

    Raises CheckpointError when no Qwen2 (or the `kind` that is asked for) computes what this model does.
    """
    model = given.model
    exact = "qwen3" if model.qk_layernorm else "qwen2"
    if kind not in (None, exact):
        has, they = ("has", "Qwen2 has not") if model.qk_layernorm else ("lacks", "Qwen3 has")
        raise CheckpointError(
            f"the language model of {given.source.folder} {has} norms on queries and keys, which {they}: as "
            f"{ARCHITECTURES[kind]} it would compute something else; write it as {ARCHITECTURES[exact]} "
            f"(--architecture {exact})"
        )
    if model.und_num_experts is not None:
        raise CheckpointError(
            f"the understanding stream of {given.source.folder} has sparse experts "
            f"(model.und_num_experts {model.und_num_experts}), which neither Qwen2 nor Qwen3 has; only dense ones can "
            "be written"
        )
    specs: dict[str, Spec] = {}
    for name in sorted(_language_names(given)):
        spec = Spec(given.source.shape(name), dtype or given.dtype(name))
        specs[name.removeprefix(_PREFIX)] = spec
        if exact == "qwen3" and name.endswith(_OUT_WEIGHT):
            specs[_bias_of(name)] = Spec(spec.shape[:1], spec.dtype)
    return Plan(given, exact, Path(out), _divide(specs, max_file_bytes))


def export_language_model(plan: Plan, done: Callable[[int], None] = lambda num_bytes: None) -> None:
    """Write the folder of `plan`; `done` is told of bytes as they are written. config.json comes last.

    Raises CheckpointError when the folder holds something or the disk is too small.
    """
    out, files = plan.out, {}
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; take another --out or delete it")
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if plan.num_bytes > free:
        raise CheckpointError(f"{out} has room for {free / 1e9:.1f} GB, but {plan.num_bytes / 1e9:.1f} GB are needed")
    for file_name, specs in plan.files.items():
        file = SafetensorsFile(out / file_name, make_head(specs))
        file.begin()
        files |= dict.fromkeys(specs, file)
    for group in plan.given.groups(_language_names(plan.given)):
        for name, tensor in plan.given.read(group).items():
            for target, value in _translated(name, tensor, plan.kind):
                files[target].write(target, value)
                done(files[target].specs[target].num_bytes)
    _side_files(plan)


def _language_names(given: GivenWeights) -> set[str]:
    """Released names of the und stream's tensors."""
    tied = given.model.tie_word_embeddings
    names = {n for n in given.source.names() if n.startswith(_PREFIX) and "_moe_gen" not in n}
    names -= {LM_HEAD} if tied else set()
    missing = sorted({EMBEDDING, *(() if tied else (LM_HEAD,))} - names)
    if missing:
        raise CheckpointError(f"{given.source.folder} has no tensor {missing[0]}; it holds no whole language model")
    return names


def _translated(name: str, tensor: Tensor, kind: str) -> list[tuple[str, Tensor]]:
    found = [(name.removeprefix(_PREFIX), tensor)]
    if kind == "qwen3" and name.endswith(_OUT_WEIGHT):
        found.append((_bias_of(name), torch.zeros(tensor.shape[0])))
    return found


def _bias_of(name: str) -> str:
    return name.removeprefix(_PREFIX).removesuffix(_OUT_WEIGHT) + _OUT_BIAS


def _divide(specs: dict[str, Spec], max_file_bytes: int) -> dict[str, dict[str, Spec]]:
    parts = divide(specs, max_file_bytes)
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _side_files(plan: Plan) -> None:
    if len(plan.files) > 1:
        weight_map = {name: file for file, specs in plan.files.items() for name in specs}
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": weight_map}
        _write(plan.out / "model.safetensors.index.json", index)
    ends = _copy_tokenizer(plan)
    if ends:
        _write(plan.out / "generation_config.json", ends)
    _write(plan.out / "config.json", _config(plan) | ends)


def _copy_tokenizer(plan: Plan) -> dict[str, int]:
    """Its files; which tokens BAGEL's texts begin and end with, under the keys of a config.json."""
    folder = plan.given.tokenizer
    try:
        special = Tokenizer(str(folder)).special
    except DataError:
        logger.warning("%s holds no tokenizer: copy one into %s yourself", folder, plan.out)
        return {}
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copy(folder / name, plan.out / name)
    return {"bos_token_id": special.bos, "eos_token_id": special.eos}


def _config(plan: Plan) -> dict[str, object]:
    model, theirs = plan.given.model, plan.given.source.folder / "llm_config.json"
    given = json.loads(theirs.read_text(encoding="utf-8")) if plan.given.config is None else {}
    widest = max((spec for specs in plan.files.values() for spec in specs.values()), key=lambda spec: spec.num_bytes)
    qwen3 = {"head_dim": model.hidden_size // model.num_attention_heads, "attention_bias": True}
    return {
        "architectures": [ARCHITECTURES[plan.kind]],
        "model_type": plan.kind,
        "hidden_act": "silu",
        **{key: getattr(model, field) for field, key in LLM_KEYS.items()},
        **(qwen3 if plan.kind == "qwen3" else {}),
        "max_position_embeddings": given.get("max_position_embeddings", _POSITIONS),
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_sliding_window": False,
        "torch_dtype": str(widest.dtype).removeprefix("torch."),
    }


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
