"""Sparse experts by released names, from sparse weights, from scratch and as copies of dense ones."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.names import export_shard, fill_shard, rule_for
from megabagel.checkpoint.sources import Pretrained, SafetensorsFolder, Scratch
from megabagel.checkpoint.upcycling import Upcycled, check_experts, dense_twin, density_fault, experts_in
from megabagel.config.schema import ModelConfig

MODEL = ModelConfig(
    hidden_size=8, num_layers=4, num_attention_heads=2, num_query_groups=2, ffn_hidden_size=12, gen_num_experts=8
)
LAYER = "language_model.model.layers.3."
GEN = f"{LAYER}mlp_moe_gen."


def rule(parameter: str, shape: tuple[int, ...], rank: int = 0, ranks: int = 1, tp_size: int = 1):
    return rule_for(f"decoder.layers.1.gen.mlp.{parameter}", shape, 2, tp_size, MODEL, False, (rank, ranks))


@pytest.mark.parametrize(
    "parameter, shape, names",
    [
        ("router.weight", (8, 8), ["gate"]),
        ("experts.local_experts.1.linear_fc1.weight", (24, 8), ["experts.5.gate_proj", "experts.5.up_proj"]),
        ("experts.local_experts.1.linear_fc2.weight", (8, 12), ["experts.5.down_proj"]),
        ("experts.linear_fc1.weight1", (24, 8), ["experts.5.gate_proj", "experts.5.up_proj"]),
        ("experts.linear_fc2.weight1", (8, 12), ["experts.5.down_proj"]),
    ],
)
def test_experts_are_numbered_over_all_ranks_and_whole_on_one(parameter, shape, names):
    found = rule(parameter, shape, rank=2, ranks=4, tp_size=2)
    assert found.names == tuple(f"{GEN}{name}.weight" for name in names)
    assert found.tp_dim is None and sum(s[0] for s in found.shapes) == shape[0]


def test_a_shared_expert_is_split_as_a_dense_mlp_is():
    first = rule("shared_experts.linear_fc1.weight", (12, 8), tp_size=2)
    second = rule("shared_experts.linear_fc2.weight", (8, 3), tp_size=2)
    assert first.names == (f"{GEN}shared_expert.gate_proj.weight", f"{GEN}shared_expert.up_proj.weight")
    assert second.names == (f"{GEN}shared_expert.down_proj.weight",)
    assert (first.tp_dim, first.shapes) == (0, ((12, 8), (12, 8))) and (second.tp_dim, second.shapes) == (1, ((8, 6),))


def test_a_dense_mlp_that_is_whole_on_its_rank_is_read_whole():
    found = rule_for("decoder.layers.0.und.mlp.linear_fc1.weight", (24, 8), 0, 2, MODEL, whole_on_rank=True)
    assert found.tp_dim is None and found.shapes == ((12, 8), (12, 8))


def test_import_and_export_of_an_expert_are_inverse(tmp_path):
    names = [f"{GEN}experts.7.{p}_proj.weight" for p in ("gate", "up")]
    tensors = {name: torch.randn(12, 8) for name in names}
    save_file(tensors, tmp_path / "model.safetensors")
    found = rule("experts.local_experts.3.linear_fc1.weight", (24, 8), rank=1, ranks=2, tp_size=2)
    merged = torch.full((24, 8), torch.nan)
    fill_shard(merged, SafetensorsFolder(tmp_path), found, 1, 2)
    assert torch.equal(merged, torch.cat([tensors[name] for name in names]))
    exported = export_shard(merged, found)
    assert all(dim is None and torch.equal(part, tensors[name]) for name, (part, dim) in exported.items())


def test_twins_of_sparse_names():
    assert dense_twin(f"{GEN}experts.3.up_proj.weight") == f"{GEN}up_proj.weight"
    assert dense_twin(f"{GEN}gate.weight") == f"{GEN}gate_proj.weight"
    assert dense_twin(f"{LAYER}mlp.shared_expert.down_proj.weight") == f"{LAYER}mlp.down_proj.weight"
    for name in (f"{GEN}gate_proj.weight", f"{LAYER}self_attn.o_proj.weight", "vit_model.x.mlp.fc1.weight"):
        assert dense_twin(name) is None


# ---------------------------------------------------------------------------------------------------------- upcycling
def dense_tensors(mlp: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}
    return {f"{mlp}{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def read(source, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return source.read(name, shape, None, 0, 0)


def folder(path, tensors) -> SafetensorsFolder:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return SafetensorsFolder(path)


def test_experts_are_copies_and_what_is_new_changes_no_output(tmp_path):
    tensors, scratch = dense_tensors(GEN), Scratch(1, 0.02)
    source = Upcycled(folder(tmp_path / "dense", tensors), scratch)
    assert not source.has_copied
    for expert in (0, 7):
        for part in ("gate", "up", "down"):
            copied = tensors[f"{GEN}{part}_proj.weight"]
            name = f"{GEN}experts.{expert}.{part}_proj.weight"
            assert torch.equal(read(source, name, tuple(copied.shape)), copied)
            assert torch.equal(source.read(name, tuple(copied.shape), 1, 2, 6), copied[:, 2:6])
    assert source.has_copied
    assert torch.equal(read(source, f"{GEN}gate.weight", (8, 8)), read(scratch, f"{GEN}gate.weight", (8, 8)))
    assert read(source, f"{GEN}gate.weight", (8, 8)).std() > 0.01
    assert read(source, f"{GEN}shared_expert.up_proj.weight", (6, 8)).std() > 0.01
    assert not read(source, f"{GEN}shared_expert.down_proj.weight", (8, 6)).any()


def test_sparse_weights_are_read_as_they_are(tmp_path):
    name = f"{GEN}experts.0.up_proj.weight"
    tensors = {name: torch.randn(5, 8), f"{GEN}gate.weight": torch.randn(2, 8)}
    source = Upcycled(folder(tmp_path / "sparse", tensors), Scratch(1, 0.02))
    assert all(torch.equal(read(source, n, tuple(t.shape)), t) for n, t in tensors.items())
    assert not source.has_copied
    with pytest.raises(CheckpointError, match=r"has no tensor .*experts\.9\.up_proj"):
        read(source, f"{GEN}experts.9.up_proj.weight", (5, 8))


def test_experts_of_another_width_cannot_be_copies(tmp_path):
    source = Upcycled(folder(tmp_path / "dense", dense_tensors(GEN)), Scratch(1, 0.02))
    for name, shape in (("experts.1.up_proj", (5, 8)), ("experts.1.down_proj", (8, 5))):
        with pytest.raises(CheckpointError, match="whose width is 12, because theirs is 5; leave model.moe_ffn_hidden"):
            read(source, f"{GEN}{name}.weight", shape)


def test_experts_of_both_streams_are_copies_of_a_language_model(tmp_path):
    llm = folder(tmp_path / "llm", dense_tensors("model.layers.3.mlp."))
    source = Upcycled(Pretrained(llm, None, Scratch(1, 0.02)), Scratch(1, 0.02))
    expected = read(llm, "model.layers.3.mlp.up_proj.weight", (12, 8))
    for mlp in (f"{LAYER}mlp.", GEN):
        assert torch.equal(read(source, f"{mlp}experts.2.up_proj.weight", (12, 8)), expected)
    assert source.has_copied


def test_without_a_language_model_experts_differ_from_each_other(tmp_path):
    vit = folder(tmp_path / "vit", {"vision_model.post_layernorm.weight": torch.ones(4)})
    source = Upcycled(Pretrained(None, vit, Scratch(1, 0.02)), Scratch(1, 0.02))
    first, second = (read(source, f"{GEN}experts.{e}.up_proj.weight", (12, 8)) for e in (0, 1))
    assert not torch.equal(first, second) and not source.has_copied
    assert torch.equal(first, read(source, f"{LAYER}mlp.experts.0.up_proj.weight", (12, 8)))


# --------------------------------------------------------------------------------------- dense and sparse do not mix
def test_weights_with_another_number_of_experts_are_refused_with_the_number(tmp_path):
    names = {f"{GEN}experts.{e}.up_proj.weight" for e in range(12)} | {f"{LAYER}mlp.up_proj.weight"}
    assert experts_in(names) == {"gen": 12} and experts_in(dense_tensors(GEN)) == {}
    with pytest.raises(CheckpointError, match="12 sparse experts in the gen stream, but the configured model has 8"):
        check_experts(names, MODEL, tmp_path)
    dense = dataclasses.replace(MODEL, gen_num_experts=None)
    with pytest.raises(CheckpointError, match=r"has a dense MLP \(model.gen_num_experts null\).* to 12$"):
        check_experts(names, dense, tmp_path)
    check_experts(names, dataclasses.replace(MODEL, gen_num_experts=12), tmp_path)
    check_experts(dense_tensors(GEN), MODEL, tmp_path)


def test_a_checkpoint_of_the_other_kind_is_said_to_be_one():
    dense = {"decoder.layers.und.mlp.linear_fc1.weight", "decoder.layers.gen.mlp.linear_fc1.weight"}
    sparse = {"decoder.layers.gen.mlp.experts.experts.linear_fc1.weight", "heads.lm_head.weight"}
    assert "experts (gen stream); make a start checkpoint of it with tools/upcycle_ch" in density_fault(dense, sparse)
    assert "set model.gen_num_experts as in the run that wrote it" in density_fault(sparse, dense)
    assert density_fault(dense, dense) is None and density_fault(sparse, sparse) is None
