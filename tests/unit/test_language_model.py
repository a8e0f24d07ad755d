"""The understanding language model alone, as transformers loads it: equal to the official numbers and to our model."""

import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.given_weights import open_weights
from megabagel.checkpoint.language_model import export_language_model, plan
from tests.tiny_data import CHECKPOINT, GOLDEN

sys.path.insert(0, str(GOLDEN.parents[1] / "tools"))
import export_qwen2

PREFIX = "language_model."


def without_norms(folder, **llm_changes: object):
    """The golden checkpoint's folder without norms on queries and keys."""
    shutil.copytree(CHECKPOINT, folder)
    tensors = load_file(folder / "ema.safetensors")
    tied = llm_changes.get("tie_word_embeddings", False)
    gone = ("q_norm", "k_norm", "lm_head") if tied else ("q_norm", "k_norm")
    save_file({n: t for n, t in tensors.items() if not any(g in n for g in gone)}, folder / "ema.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    llm = json.loads((folder / "llm_config.json").read_text()) | {"qk_norm": False} | llm_changes
    (folder / "llm_config.json").write_text(json.dumps(llm))
    return folder


def loaded(folder):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    return model.eval()


def text_samples(case: str) -> list[tuple[int, list[int]]]:
    """(place in the golden pack, ids with their frame) of the samples that are one text."""
    meta = json.loads((GOLDEN / case / "meta.json").read_text())
    begins = [sum(meta["sample_lens"][:i]) for i in range(len(meta["samples"]))]
    special = meta["special_token_ids"]
    return [
        (begin, [special["bos_token_id"], *sample["sequence_plan"][0]["text_ids"], special["eos_token_id"]])
        for begin, sample in zip(begins, meta["samples"], strict=True)
        if sample["kind"] == "text"
    ]


@pytest.mark.parametrize("case", ["public-basic", "public-wide"])
def test_the_exported_model_computes_the_official_numbers(case, tmp_path, capsys):
    folder, out = GOLDEN / case / "ckpt", tmp_path / "out"
    assert export_qwen2.main(["--checkpoint", str(folder), "--out", str(out)]) == 0
    assert "a Qwen3ForCausalLM" in capsys.readouterr().out
    model, samples = loaded(out), text_samples(case)
    assert samples and type(model).__name__ == "Qwen3ForCausalLM"
    with safe_open(GOLDEN / case / "expected.safetensors", "pt") as file:
        hidden = file.get_tensor("fwd.last_hidden_state")
    head = load_file(folder / "ema.safetensors")[PREFIX + "lm_head.weight"]
    for begin, ids in samples:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        assert torch.allclose(logits, hidden[begin : begin + len(ids)] @ head.T, atol=1e-4, rtol=0)


def test_tensors_stay_bit_equal_and_the_tokenizer_comes_along(tmp_path):
    from transformers import AutoTokenizer

    given, out = open_weights(CHECKPOINT), tmp_path / "out"
    told = []
    work = plan(given, out, max_file_bytes=200_000)
    export_language_model(work, told.append)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {
        name: tensor for file in set(index["weight_map"].values()) for name, tensor in load_file(out / file).items()
    }
    stored = load_file(CHECKPOINT / "ema.safetensors")
    wanted = {n.removeprefix(PREFIX): t for n, t in stored.items() if n.startswith(PREFIX) and "_moe_gen" not in n}
    added = {f"model.layers.{i}.self_attn.o_proj.bias" for i in range(4)}
    assert found.keys() == index["weight_map"].keys() == wanted.keys() | added
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert not any(found[name].any() for name in added)
    assert sum(told) == work.num_bytes == index["metadata"]["total_size"]
    assert len(set(index["weight_map"].values())) > 2
    ours, theirs = (AutoTokenizer.from_pretrained(folder)("golden tree").input_ids for folder in (out, CHECKPOINT))
    assert ours == theirs
    ends = json.loads((out / "generation_config.json").read_text())
    assert ends == {"bos_token_id": 501, "eos_token_id": 502}
    with pytest.raises(CheckpointError, match="is not empty"):
        export_language_model(work)


@pytest.mark.parametrize("tied", [False, True])
def test_without_norms_it_is_a_qwen2(tied, tmp_path, capsys):
    folder, out = without_norms(tmp_path / "plain", tie_word_embeddings=tied), tmp_path / "out"
    assert export_qwen2.main(["--checkpoint", str(folder), "--out", str(out), "--architecture", "qwen2"]) == 0
    model = loaded(out)
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.config.tie_word_embeddings is tied
    stored = load_file(folder / "ema.safetensors")
    wanted = {n.removeprefix(PREFIX): t for n, t in stored.items() if n.startswith(PREFIX) and "_moe_gen" not in n}
    found = dict(model.named_parameters())
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_what_would_compute_something_else_is_refused(tmp_path, capsys):
    plain = without_norms(tmp_path / "plain")
    for folder, kind, message in (
        (CHECKPOINT, "qwen2", "has norms on queries and keys, which Qwen2 has not.*write it as Qwen3ForCausalLM"),
        (plain, "qwen3", "lacks norms on queries and keys, which Qwen3 has.*write it as Qwen2ForCausalLM"),
    ):
        with pytest.raises(CheckpointError, match=message):
            plan(open_weights(folder), tmp_path / "out", kind=kind)
    assert export_qwen2.main(["--checkpoint", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 1
    assert "there is no folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_other_dtype(tmp_path):
    work = plan(open_weights(CHECKPOINT), tmp_path / "out", dtype=torch.bfloat16)
    export_language_model(work)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
