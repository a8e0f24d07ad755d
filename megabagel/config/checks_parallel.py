"""Rules about the layout over ranks: tensor, context, pipeline and data parallelism, and what is recomputed.

Rules about experts are in `checks_experts.py`. Each rule names the sizes it saw and those that are legal.
"""

from collections.abc import Iterator

from megabagel.config.errors import divisors, listed
from megabagel.config.pipeline_split import is_legal_split, stage_layers
from megabagel.config.schema import Config


def layout_faults(config: Config) -> Iterator[str]:
    """Faults that do not depend on the number of processes, in order of importance."""
    yield from _tensor(config)
    yield from _context(config)
    stages_fit = True
    for fault in _pipeline(config):
        stages_fit = False
        yield fault
    if stages_fit:
        yield from _recompute(config)


def world_faults(config: Config, world_size: int) -> Iterator[str]:
    """The layout against the number of processes and the batch. Everything else must be legal by now."""
    parallel, batch = config.parallel, config.training.global_batch_size
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pp, vp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    replica = tp * cp * pp
    if world_size % replica:
        yield (
            f"{world_size} processes do not divide into model replicas of {replica} (tensor_model_parallel_size {tp} x "
            f"context_parallel_size {cp} x pipeline_model_parallel_size {pp}); start a multiple of {replica} processes "
            f"or change the sizes."
        )
    replicas = world_size // replica
    ep = parallel.expert_model_parallel_size
    if (holders := tp * cp * replicas) % ep:
        yield (
            f"parallel.expert_model_parallel_size {ep} does not divide the {holders} ranks of a pipeline stage "
            f"(tensor_model_parallel_size {tp} x context_parallel_size {cp} x {replicas} model replicas), over which "
            f"experts are laid; {divisors(holders)}."
        )
    if batch % replicas:
        yield (
            f"training.global_batch_size {batch} does not divide by the {replicas} model replicas ({world_size} "
            f"processes / {replica}); set it to a multiple of {replicas}."
        )
    if vp is not None and (packs := batch // replicas) % pp:
        yield (
            f"training.global_batch_size {batch} gives each of the {replicas} model replicas {packs} packs a step, but "
            f"the interleaved pipeline (virtual_pipeline_model_parallel_size {vp}) takes them in groups of "
            f"pipeline_model_parallel_size {pp}; set it to a multiple of {replicas * pp}."
        )


def _tensor(config: Config) -> Iterator[str]:
    """What every tensor-parallel rank must get an equal share of."""
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    shares = {"num_attention_heads": model.num_attention_heads, "num_query_groups": model.num_query_groups}
    sparse_streams = sum(experts is not None for experts in (model.und_num_experts, model.gen_num_experts))
    has_dense_mlp = sparse_streams == 1 and model.layer_variant != "dense"
    if has_dense_mlp or (sparse_streams == 0 and parallel.expert_model_parallel_size == 1):  # experts are never cut
        shares["ffn_hidden_size"] = model.ffn_hidden_size
    if sparse_streams and model.moe_shared_expert_intermediate_size is not None:
        shares["moe_shared_expert_intermediate_size"] = model.moe_shared_expert_intermediate_size
    shares["vocab_size"] = model.vocab_size
    for name, value in shares.items():
        if value % tp:
            yield (
                f"model.{name} {value} does not divide by parallel.tensor_model_parallel_size {tp}; "
                f"{divisors(*shares.values())}."
            )
    if parallel.sequence_parallel and tp == 1:
        yield (
            "parallel.sequence_parallel needs parallel.tensor_model_parallel_size above 1, for it shards activations "
            "over the tensor-parallel ranks; raise the size or turn it off."
        )
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield "parallel.overlap_param_gather needs parallel.overlap_grad_reduce; set both to true or both to false."


def _context(config: Config) -> Iterator[str]:
    """Ulysses: in attention a context-parallel rank holds all tokens of some query heads."""
    heads = config.model.num_attention_heads
    tp, cp = config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size
    if heads % tp == 0 and heads % (tp * cp):
        per_rank = heads // tp
        yield (
            f"parallel.context_parallel_size {cp} does not divide the {per_rank} query heads of a tensor-parallel rank "
            f"(model.num_attention_heads {heads} / tensor_model_parallel_size {tp}), of which every context-parallel "
            f"rank takes whole ones in attention; {divisors(per_rank)} (key and value heads are replicated and do not "
            f"limit it)."
        )


def _pipeline(config: Config) -> Iterator[str]:
    """Every stage holds at least one layer; unless the split is automatic, a rank's virtual stages equally many."""
    layers, parallel = config.model.num_layers, config.parallel
    pp, vp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    if vp == 1:
        yield (
            "parallel.virtual_pipeline_model_parallel_size is 1, which is no interleaving; leave it out or set 2 or "
            "more."
        )
    if vp is not None and pp == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size {vp} interleaves pipeline stages, but "
            f"parallel.pipeline_model_parallel_size is 1; raise that or leave the virtual size out."
        )
    ends = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
    given = [f"parallel.{name} {value}" for name, value in ends.items() if value is not None]
    if given and pp == 1:
        yield f"{given[0]} is set, but parallel.pipeline_model_parallel_size is 1; raise that or leave it out."
    if given and parallel.pipeline_split == "auto":
        yield (
            f"{given[0]} is set, but parallel.pipeline_split auto decides the layers of every stage itself; leave one "
            f"of the two out."
        )
    pieces = pp * (vp or 1)
    if layers < pieces:
        yield (
            f"model.num_layers {layers} is less than the {pieces} pieces of the pipeline (pipeline_model_parallel_size "
            f"{pp} x virtual_pipeline_model_parallel_size {vp or 1}), which need a layer each; lower the sizes."
        )
    if parallel.pipeline_split == "auto" or is_legal_split(layers, pp, vp, first, last):
        return
    chunks = f" in {vp} equal chunks each (virtual_pipeline_model_parallel_size)" if vp else ""
    if given:
        yield (
            f"{' and '.join(given)} {'leave' if len(given) > 1 else 'leaves'} {layers - (first or 0) - (last or 0)} of "
            f"model.num_layers {layers} for the other stages ({pp - len(given)} of pipeline_model_parallel_size {pp}), "
            f"which cannot be shared out evenly{chunks}; {_legal_ends(config)}."
        )
    elif vp and layers % pp == 0:
        sizes = [n for n in range(2, layers // pp + 1) if layers // pp % n == 0]
        legal = f"sizes that do are {listed(sizes)}" if sizes else "no size does: leave it out"
        yield (
            f"parallel.virtual_pipeline_model_parallel_size {vp} does not divide the {layers // pp} layers of a "
            f"pipeline stage (model.num_layers {layers} / pipeline_model_parallel_size {pp}); {legal}, or set "
            f"parallel.pipeline_split to auto."
        )
    else:
        yield (
            f"model.num_layers {layers} does not divide by parallel.pipeline_model_parallel_size {pp}; "
            f"{divisors(layers)}, or set parallel.pipeline_split to auto."
        )


def _legal_ends(config: Config) -> str:
    """Which number of layers at an end would do, the other end as it is."""
    layers, parallel = config.model.num_layers, config.parallel
    pp, vp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    name = "first" if first is not None else "last"
    sizes = range(1, layers + 1)
    legal = [n for n in sizes if is_legal_split(layers, pp, vp, *((n, last) if first is not None else (None, n)))]
    if legal:
        return f"num_layers_in_{name}_pipeline_stage may be {listed(legal)} here"
    return "no number does here: leave it out and set pipeline_split to auto"


def _recompute(config: Config) -> Iterator[str]:
    """Chunks of recomputed layers lie within a (virtual) stage."""
    model, training = config.model, config.training
    granularity, number = training.recompute_granularity, training.recompute_num_layers
    counts = sorted(set(stage_layers(model, config.data, config.parallel)))
    held = " or ".join(map(str, counts))
    if granularity == "full" and training.recompute_method == "uniform" and any(n % number for n in counts):
        # megatron-core's last chunk would reach beyond the last layer
        yield (
            f"training.recompute_num_layers {number} does not divide the {held} layers of a pipeline stage into equal "
            f"chunks; {divisors(*counts)}, or set training.recompute_method to block."
        )
    if granularity == "full" and training.recompute_method == "block" and number > counts[-1]:
        yield (
            f"training.recompute_num_layers {number} is more than the {held} layers of a pipeline stage; allowed are "
            f"{listed(range(1, counts[-1] + 1))}."
        )
    if granularity == "selective" and not training.recompute_modules:
        yield (
            "training.recompute_modules is empty, so selective recomputation would do nothing; name core_attn, mlp or "
            "layernorm, or set training.recompute_granularity to null."
        )
    frozen = [name for name in ("freeze_vit", "freeze_und") if getattr(model, name)]
    if training.recompute_vit and not model.visual_und:
        yield "training.recompute_vit is true, but model.visual_und is false: there is no ViT; set one of them."
    if training.recompute_vit and frozen:
        yield (
            f"training.recompute_vit is true, but model.{frozen[0]} freezes the ViT, which then keeps no activations; "
            f"set recompute_vit to false."
        )
