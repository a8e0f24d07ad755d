"""The tensor map and the sources of released weights: slices, merges, twins, and every message about a bad folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megabagel.checkpoint.errors import CheckpointError
from megabagel.checkpoint.names import Rule, export_shard, fill_shard, rule_for
from megabagel.checkpoint.sources import PATCH_EMBEDDING, Pretrained, SafetensorsFolder, Scratch
from megabagel.config.schema import ModelConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "public-basic" / "ckpt"
MODEL = ModelConfig(
    hidden_size=64, num_layers=4, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=96, vocab_size=128
)
HEAD = 8  # width of an attention head of MODEL
LAYER = "language_model.model.layers.3."


class Memory:
    """A source over a dict; records what was read."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.values_read = 0

    def read(self, name, shape, dim, start, stop):
        tensor = self.tensors[name]
        assert tuple(tensor.shape) == shape
        part = tensor if dim is None else tensor.narrow(dim, start, stop - start)
        self.values_read += part.numel()
        return part


def released(name_and_shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in name_and_shapes.items()}


PARAMETERS = {  # parameter -> whole shape in our model, released shapes
    "decoder.layers.1.gen.linear_qkv.weight": (
        (128, 64),
        {f"{LAYER}self_attn.{p}_proj_moe_gen.weight": (n, 64) for p, n in (("q", 64), ("k", 32), ("v", 32))},
    ),
    "decoder.layers.1.und.linear_qkv.bias": (
        (128,),
        {f"{LAYER}self_attn.{p}_proj.bias": (n,) for p, n in (("q", 64), ("k", 32), ("v", 32))},
    ),
    "decoder.layers.1.und.mlp.linear_fc1.weight": (
        (192, 64),
        {f"{LAYER}mlp.{p}_proj.weight": (96, 64) for p in ("gate", "up")},
    ),
    "decoder.layers.1.gen.mlp.linear_fc2.weight": ((64, 96), {f"{LAYER}mlp_moe_gen.down_proj.weight": (64, 96)}),
    "decoder.layers.1.und.linear_proj.weight": ((64, 64), {f"{LAYER}self_attn.o_proj.weight": (64, 64)}),
    "decoder.layers.1.gen.q_layernorm.weight": ((8,), {f"{LAYER}self_attn.q_norm_moe_gen.weight": (8,)}),
    "decoder.layers.1.gen.pre_mlp_layernorm.weight": (
        (64,),
        {f"{LAYER}post_attention_layernorm_moe_gen.weight": (64,)},
    ),
    "embeddings.und.word_embeddings.weight": ((128, 64), {"language_model.model.embed_tokens.weight": (128, 64)}),
    "heads.lm_head.weight": ((128, 64), {"language_model.lm_head.weight": (128, 64)}),
    "heads.gen_norm.weight": ((64,), {"language_model.model.norm_moe_gen.weight": (64,)}),
    "heads.llm2vae.bias": ((16,), {"llm2vae.bias": (16,)}),
    "embeddings.gen.time_embedder.mlp.2.weight": ((64, 64), {"time_embedder.mlp.2.weight": (64, 64)}),
    "embeddings.und.connector.fc1.weight": ((64, 48), {"connector.fc1.weight": (64, 48)}),
    "vision.layers.1.self_attn.q_proj.bias": (
        (48,),
        {"vit_model.vision_model.encoder.layers.1.self_attn.q_proj.bias": (48,)},
    ),
    "vision.patch_embedding.weight": (
        (48, 588),
        {"vit_model.vision_model.embeddings.patch_embedding.weight": (48, 588)},
    ),
}


def local_shape(parameter: str, tp_size: int) -> list[int]:
    shape = list(PARAMETERS[parameter][0])
    dim = rule_for(parameter, shape, 2, 1, MODEL).tp_dim
    if dim is not None:
        shape[dim] //= tp_size
    return shape


def rule_of(parameter: str, tp_size: int) -> Rule:
    return rule_for(parameter, local_shape(parameter, tp_size), 2, tp_size, MODEL)


def filled(shape: list[int], source: Memory, rule: Rule, tp_rank: int, tp_size: int) -> torch.Tensor:
    out = torch.full(shape, torch.nan)
    fill_shard(out, source, rule, tp_rank, tp_size)
    return out


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("parameter", PARAMETERS)
def test_import_and_export_are_inverse_and_read_only_the_slice(parameter, tp_size):
    whole_shape, shapes = PARAMETERS[parameter]
    rule = rule_of(parameter, tp_size)
    assert dict(zip(rule.names, rule.shapes, strict=True)) == shapes
    tensors = released(shapes)
    exported = {name: [] for name in shapes}
    for rank in range(tp_size):
        source = Memory(tensors)
        shard = filled(local_shape(parameter, tp_size), source, rule, rank, tp_size)
        assert source.values_read == shard.numel()
        assert shard.numel() == torch.Size(whole_shape).numel() // (1 if rule.tp_dim is None else tp_size)
        for name, (part, dim) in export_shard(shard, rule).items():
            exported[name].append(part)
            assert dim == rule.tp_dim
    for name, parts in exported.items():
        for part in parts if rule.tp_dim is None else [torch.cat(parts, dim=rule.tp_dim)]:
            assert torch.equal(part, tensors[name])


def test_qkv_rows_stand_group_by_group():
    parameter = "decoder.layers.1.gen.linear_qkv.weight"
    tensors = released(PARAMETERS[parameter][1])
    q, k, v = tensors.values()
    merged = filled(
        local_shape(parameter, 2), Memory(tensors), rule_of(parameter, 2), 1, 2
    )  # groups 2 and 3, two q heads each
    assert torch.equal(merged[: 2 * HEAD], q[4 * HEAD : 6 * HEAD])
    assert torch.equal(merged[2 * HEAD : 3 * HEAD], k[2 * HEAD : 3 * HEAD])
    assert torch.equal(merged[3 * HEAD : 4 * HEAD], v[2 * HEAD : 3 * HEAD])
    assert torch.equal(merged[4 * HEAD : 6 * HEAD], q[6 * HEAD :])


def test_tied_head_reads_the_embedding():
    tied = ModelConfig(hidden_size=64, vocab_size=128, tie_word_embeddings=True)
    (name,) = rule_for("heads.lm_head.weight", (128, 64), 0, 1, tied).names
    assert name == "language_model.model.embed_tokens.weight"


def test_unknown_parameter_is_a_bug_with_its_name():
    with pytest.raises(KeyError, match="decoder.layers.0.und.surprise"):
        rule_for("decoder.layers.0.und.surprise", (1,), 0, 1, MODEL)


# ---------------------------------------------------------------------------------------------------------- folders
def test_missing_tensor_is_named(tmp_path):
    save_file({"a.weight": torch.zeros(2, 3)}, tmp_path / "ema.safetensors")
    source = SafetensorsFolder(tmp_path, ("ema", "model"))
    with pytest.raises(CheckpointError, match="has no tensor b.weight, which the configured model needs"):
        source.read("b.weight", (2, 3), None, 0, 0)
    with pytest.raises(CheckpointError, match=r"a.weight in .*ema.safetensors has shape \[2, 3\].* expects \[4, 3\]"):
        source.read("a.weight", (4, 3), 0, 0, 2)


def test_position_table_of_another_side_says_what_to_set(tmp_path):
    name = "vit_model.vision_model.embeddings.position_embedding.weight"
    save_file({name: torch.zeros(27 * 27, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="set model.vit.max_num_patch_per_side to 27"):
        SafetensorsFolder(tmp_path).read(name, (4900, 4), None, 0, 0)


def test_truncated_file_is_named_with_its_size(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "ema.safetensors")
    whole = (tmp_path / "ema.safetensors").read_bytes()
    (tmp_path / "ema.safetensors").write_bytes(whole[:2000])
    with pytest.raises(CheckpointError, match=r"ema.safetensors is not a whole .* 2000 bytes instead of 4072"):
        SafetensorsFolder(tmp_path, ("ema",))


def test_folder_without_weights_and_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="holds neither ema.safetensors or model.safetensors nor an index"):
        SafetensorsFolder(tmp_path, ("ema", "model"))
    with pytest.raises(CheckpointError, match="there is no folder"):
        SafetensorsFolder(tmp_path / "nowhere")


def test_sharded_folder_is_read_through_its_index(tmp_path):
    tensors = released({"a": (4, 2), "b": (2, 2)})
    save_file({"a": tensors["a"]}, tmp_path / "model-1.safetensors")
    save_file({"b": tensors["b"]}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = SafetensorsFolder(tmp_path, ("ema", "model"))
    assert torch.equal(source.read("a", (4, 2), 0, 1, 3), tensors["a"][1:3])
    assert torch.equal(source.read("b", (2, 2), 1, 0, 1), tensors["b"][:, :1])
    with pytest.raises(CheckpointError, match="model-3.safetensors is missing, although the index"):
        source.read("c", (1,), None, 0, 0)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not an index of safetensors files"):
        SafetensorsFolder(tmp_path)


# ---------------------------------------------------------------------------------------------------------- scratch
@pytest.mark.parametrize("dim", [0, 1])
def test_scratch_draws_do_not_depend_on_the_layout(dim, monkeypatch):
    monkeypatch.setattr("megabagel.checkpoint.sources._CHUNK", 100)  # several chunks
    source = Scratch(seed=3, std=0.02)
    whole = source.read("x.weight", (64, 16), None, 0, 0)
    size = whole.shape[dim] // 4
    parts = [source.read("x.weight", (64, 16), dim, r * size, (r + 1) * size) for r in range(4)]
    assert torch.equal(torch.cat(parts, dim=dim), whole)
    assert abs(whole.std().item() - 0.02) < 0.002
    assert not torch.equal(whole, source.read("y.weight", (64, 16), None, 0, 0))
    assert not torch.equal(whole, Scratch(4, 0.02).read("x.weight", (64, 16), None, 0, 0))


@pytest.mark.parametrize("name", [PATCH_EMBEDDING, "connector.fc1.weight", "connector.fc2.weight"])
def test_scratch_keeps_the_variance_of_what_is_added_to_position_tables(name):
    drawn = Scratch(seed=3, std=0.02).read(name, (256, 64), None, 0, 0)
    out = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) @ drawn.t()
    assert abs(out.std().item() - 1) < 0.05


def test_scratch_starts_twins_equal_and_the_latent_head_at_zero():
    source = Scratch(seed=3, std=0.02)
    und = source.read("language_model.model.layers.0.mlp.up_proj.weight", (8, 4), None, 0, 0)
    gen = source.read("language_model.model.layers.0.mlp_moe_gen.up_proj.weight", (8, 4), None, 0, 0)
    assert torch.equal(und, gen)
    assert not source.read("llm2vae.weight", (8, 4), None, 0, 0).any()
    assert not source.read("vae2llm.bias", (8,), None, 0, 0).any()
    assert (source.read("language_model.model.norm_moe_gen.weight", (4,), None, 0, 0) == 1).all()


# ----------------------------------------------------------------------------------------------- Qwen2.5 and SigLIP
@pytest.fixture
def pretrained(tmp_path):
    qwen = released({"model.embed_tokens.weight": (16, 8), "model.layers.0.mlp.up_proj.weight": (12, 8)})
    siglip = released(
        {
            "vision_model.embeddings.patch_embedding.weight": (8, 3, 2, 2),
            "vision_model.post_layernorm.weight": (8,),
            "text_model.head.weight": (2, 2),
        }
    )
    for folder, tensors in (("qwen", qwen), ("siglip", siglip)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    source = Pretrained(SafetensorsFolder(tmp_path / "qwen"), SafetensorsFolder(tmp_path / "siglip"), Scratch(1, 0.02))
    return source, qwen, siglip


def test_pretrained_parts_appear_under_bagel_names(pretrained):
    source, qwen, siglip = pretrained
    up = qwen["model.layers.0.mlp.up_proj.weight"]
    for part in ("mlp", "mlp_moe_gen"):
        name = f"language_model.model.layers.0.{part}.up_proj.weight"
        assert torch.equal(source.read(name, (12, 8), 0, 3, 6), up[3:6])
    # no head in a tied model, no norms on q and k in Qwen2.5, nothing of the generator in either
    head = source.read("language_model.lm_head.weight", (16, 8), None, 0, 0)
    assert torch.equal(head, qwen["model.embed_tokens.weight"])
    assert (source.read("language_model.model.layers.0.self_attn.q_norm_moe_gen.weight", (4,), None, 0, 0) == 1).all()
    assert not source.read("llm2vae.weight", (4, 8), None, 0, 0).any()
    assert source.read("vae2llm.weight", (8, 4), None, 0, 0).any()
    norm = source.read("vit_model.vision_model.post_layernorm.weight", (8,), None, 0, 0)
    assert torch.equal(norm, siglip["vision_model.post_layernorm.weight"])
    with pytest.raises(CheckpointError, match="has no tensor model.norm.weight"):
        source.read("language_model.model.norm.weight", (8,), None, 0, 0)


def test_siglip_convolution_becomes_the_linear_patch_embedding(pretrained):
    source, _, siglip = pretrained
    conv = siglip["vision_model.embeddings.patch_embedding.weight"]
    linear = source.read("vit_model.vision_model.embeddings.patch_embedding.weight", (8, 12), None, 0, 0)
    picture = torch.randn(3, 2, 2)
    patch = picture.permute(1, 2, 0).reshape(-1)  # row, column, channel
    expected = torch.nn.functional.conv2d(picture[None], conv)[0, :, 0, 0]
    assert torch.allclose(linear @ patch, expected, atol=1e-6)
