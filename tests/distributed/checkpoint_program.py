"""Run by test_checkpoint.py in several layouts: a small decoder of megatron-core's own layers, trained, saved, loaded.

Usage: MODE OUTPUT.json RUN_DIR TP PP [bf16]; rank 0 writes what it found to OUTPUT.json.
"""

import json
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megabagel.checkpoint import distributed as checkpoint
from megabagel.checkpoint import folder
from megabagel.checkpoint.saver import Saver
from megabagel.checkpoint.torch_dist_writer import PieceWriter
from megabagel.config.schema import OptimizerConfig, ParallelConfig, TrainingConfig
from megabagel.runtime import failure
from megabagel.runtime.distributed import Layout, destroy, initialize
from megabagel.runtime.overlap import whole_parameters

from megatron.core import parallel_state  # isort: skip  after the adapter
from megatron.core.enums import ModelType  # isort: skip
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # isort: skip
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip
from megatron.core.transformer.module import MegatronModule  # isort: skip
from megatron.core.transformer.transformer_block import TransformerBlock  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip

from megabagel.training.ema import ShardedEma  # isort: skip
from megabagel.training.optimizer import build_optimizer, set_learning_rate  # isort: skip
from megabagel.training.schedule import lr_at  # isort: skip
from megabagel.training.wrap import wrap  # isort: skip

HIDDEN, LENGTH, PACKS, DECAY = 16, 6, 4, 0.9


class Stage(MegatronModule):
    """One pipeline stage: input projection, decoder layers (SwiGLU), output projection."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.pre_process = parallel_state.is_pipeline_first_stage()
        self.post_process = parallel_state.is_pipeline_last_stage()
        dtype = config.params_dtype
        if self.pre_process:
            self.project_in = nn.Linear(HIDDEN, HIDDEN, dtype=dtype)
            self.project_in.bias.requires_grad_(False)
        self.block = TransformerBlock(
            config,
            get_gpt_layer_local_spec(),
            pre_process=self.pre_process,
            post_process=self.post_process,
            post_layer_norm=True,
        )
        if self.post_process:
            self.project_out = nn.Linear(HIDDEN, HIDDEN, dtype=dtype)

    def set_input_tensor(self, tensor: list[Tensor]) -> None:
        self.block.set_input_tensor(tensor[0])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.project_in(x) if self.pre_process else None
        hidden = self.block(hidden, torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool())
        return self.project_out(hidden) if self.post_process else hidden


class Run:
    """Model, optimizer and average of a run in the given layout."""

    def __init__(self, layout: Layout, parallel: ParallelConfig, dtype: str = "fp32", num_layers: int = 4):
        self.layout, self.step, self.records = layout, 0, []
        self.config = OptimizerConfig(lr=1e-2, lr_warmup_steps=2, clip_grad=0.5, ema_decay=DECAY)
        torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        config = TransformerConfig(
            num_layers=num_layers,
            hidden_size=HIDDEN,
            ffn_hidden_size=32,
            num_attention_heads=4,
            num_query_groups=2,
            gated_linear_unit=True,
            activation_func=nn.functional.silu,
            add_bias_linear=False,
            add_qkv_bias=True,
            hidden_dropout=0.1,
            attention_dropout=0.0,
            bias_dropout_fusion=False,
            tensor_model_parallel_size=layout.tp_size,
            pipeline_model_parallel_size=layout.pp_size,
            pipeline_dtype=torch_dtype,
            params_dtype=torch_dtype,
            bf16=dtype == "bf16",
            calculate_per_token_loss=True,
            gradient_accumulation_fusion=False,
        )
        self.dtype = torch_dtype
        self.chunks = wrap([Stage(config).to(torch_dtype)], parallel)
        self.optimizer = build_optimizer(self.config, TrainingConfig(params_dtype=dtype), parallel, self.chunks)
        self.ema = ShardedEma(self.optimizer)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """This rank's (input, target) of the step; the global batch is the same in every layout."""
        generator = torch.Generator().manual_seed(self.step)
        whole = torch.randn(PACKS, 2, LENGTH, 1, HIDDEN, generator=generator)
        mine = whole[self.layout.dp_rank :: self.layout.dp_size]
        return [(x.to(self.dtype), y.to(self.dtype)) for x, y in mine]

    def forward_step(self, data, model: nn.Module):
        x, target = next(data)

        def loss_function(output: Tensor):
            loss = (output - target).float().square().sum() / (PACKS * LENGTH)
            return loss, torch.tensor(1, dtype=torch.int), {"loss": loss.detach().clone()}

        return model(x), loss_function

    def train(self, steps: int) -> None:
        for _ in range(steps):
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            batches = self.batches()
            losses = get_forward_backward_func()(
                forward_step_func=self.forward_step,
                data_iterator=iter(batches),
                model=self.chunks,
                num_microbatches=len(batches),
                seq_length=LENGTH,
                micro_batch_size=1,
                forward_only=False,
            )
            total = sum((part["loss"] for part in losses), torch.zeros(()))
            dist.all_reduce(total)
            set_learning_rate(self.optimizer, lr_at(self.step, self.config, 100))
            _, norm, _ = self.optimizer.step()
            self.ema.update(DECAY)
            self.step += 1
            self.records.append((float(total) / self.layout.tp_size, float(norm)))

    def save(self, run_dir: Path, saver: Saver | None = None) -> None:
        state = {"counts": [self.step]}
        checkpoint.save(
            run_dir, self.step, self.chunks, self.optimizer, self.ema, data_state=state,
            counters={"samples": self.step * PACKS}, config_yaml="model: small", saver=saver,
        )  # fmt: skip

    def load(self, run_dir: Path) -> checkpoint.RunState | None:
        state = checkpoint.load(run_dir, self.chunks, self.optimizer, self.ema)
        self.step = state.step if state else 0
        return state

    def tensors(self) -> list[Tensor]:
        """Everything that must be equal to the bit after a resume."""
        inner = self.optimizer.chained_optimizers[0].optimizer
        state = [t for s in inner.state.values() for t in (s["exp_avg"], s["exp_avg_sq"])]
        mains = [p for group in inner.param_groups for p in group["params"]]
        with whole_parameters(self.chunks):
            return [t.detach().clone() for t in [*self.chunks[0].parameters(), *mains, *state, *self.ema.shards]]


def main(mode: str, output: Path, run_dir: Path, tp: int, pp: int, dtype: str) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    if mode == "overlap":
        parallel.overlap_grad_reduce = parallel.overlap_param_gather = True
    layout = initialize(parallel, seed=7)
    found = globals()[mode](layout, parallel, run_dir, dtype)
    if layout.rank == 0:
        output.write_text(json.dumps(found))
    destroy()


def resume(layout: Layout, parallel: ParallelConfig, run_dir: Path, dtype: str) -> dict:
    """Train 4 steps; what 2 made is saved while the others go on. A new run continues from there without saving: all
    tensors and losses equal to the bit."""
    first = Run(layout, parallel, dtype)
    frozen = [p.clone() for p in first.chunks[0].parameters() if not p.requires_grad]
    start = [s.clone() for s in first.ema.shards]
    expected = [s.clone() for s in start]
    for _ in range(2):
        first.train(1)
        mains = first.ema._main_shards()
        expected = [DECAY * e + (1 - DECAY) * m for e, m in zip(expected, mains, strict=True)]
    for mine, plain in zip(first.ema.shards, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(start, first.ema.shards, strict=True)) or not start
    saver, may_write = Saver(background=True), threading.Event()
    write = PieceWriter.write
    PieceWriter.write = lambda *arguments: may_write.wait() and write(*arguments)
    first.save(run_dir, saver)
    first.train(2)
    assert folder.steps_to_try(run_dir) == []
    may_write.set()
    saver.wait()
    second = Run(layout, parallel, dtype)
    torch.rand(3)  # disturbs the generators
    state = second.load(run_dir)
    assert (state.step, state.counters, state.config_yaml) == (2, {"samples": 2 * PACKS}, "model: small")
    assert state.data_state == {"counts": [2]}
    second.train(2)
    assert second.records == first.records[2:], (second.records, first.records)
    for a, b in zip(first.tensors(), second.tensors(), strict=True):
        assert torch.equal(a, b)
    for p, before in zip((p for p in second.chunks[0].parameters() if not p.requires_grad), frozen, strict=True):
        assert torch.equal(p, before)
    weights = second.tensors()
    with second.ema.applied():
        table = second.ema.by_parameter()
        for parameter, (_, start_, end) in table.items():
            swapped = table[parameter][0]  # holds the weights while the average is applied
            assert not torch.equal(parameter.detach().float().flatten()[start_:end], swapped) or swapped.numel() == 0
    for a, b in zip(weights, second.tensors(), strict=True):
        assert torch.equal(a, b)
    for run in (first, second):
        run.chunks[0].eval()  # the two share the generators of dropout
        run.train(1)
    assert second.records[-1] == first.records[-1]
    return {"records": first.records}


overlap = resume


def continue_from(layout: Layout, parallel: ParallelConfig, run_dir: Path, dtype: str) -> dict:
    """Load what another layout saved, save it again from this one, and train on. A folder without a whole checkpoint
    is refused, one without any is a new run's."""
    run = Run(layout, parallel, dtype)
    state = run.load(run_dir)
    copy = run_dir.with_name(f"{run_dir.name}-from-{layout.world_size}")
    run.save(copy)
    assert checkpoint.load(copy / "empty", run.chunks, run.optimizer, run.ema) is None
    if layout.rank == 0:
        (copy / folder.LATEST).write_text("garbage")
    assert run.load(copy).step == state.step
    if layout.rank == 0:
        (folder.step_folder(copy, run.step) / folder.FILES).unlink()
    try:
        run.load(copy)
    except checkpoint.CheckpointError as error:
        assert "none of the 1 checkpoints" in str(error)
    else:
        raise AssertionError("a checkpoint without its table of files was loaded")
    run.chunks[0].eval()  # dropout draws differ between layouts
    run.train(2)
    return {"records": run.records, "data_state": state.data_state, "copy": str(copy)}


def stuck(layout: Layout, parallel: ParallelConfig, run_dir: Path, dtype: str) -> None:
    """Fails while a save hangs, as on a dead disk."""
    run = Run(layout, parallel, dtype)
    PieceWriter.write = lambda *_: threading.Event().wait()
    run.save(run_dir, Saver(background=True))
    run.train(1)
    raise ValueError("something else")


if __name__ == "__main__":
    with failure.guard(ValueError):
        mode_, output_, run_dir_, tp_, pp_, *rest = sys.argv[1:]
        main(mode_, Path(output_), Path(run_dir_), int(tp_), int(pp_), rest[0] if rest else "fp32")
