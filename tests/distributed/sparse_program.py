"""Run by test_sparse_experts.py: two sparse layers in several layouts, against plain PyTorch; then their checkpoints.

sparse_program.py RUN_DIR TENSOR,CONTEXT,EXPERT,SEQUENCE...
Prints one JSON line per layout, and "resumed" when checkpoints of the first of `RESUMED` do what they shall.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from megabagel.checkpoint import distributed as checkpoint
from megabagel.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megabagel.runtime import failure
from megabagel.runtime.distributed import Layout, destroy, initialize

from megatron.core import parallel_state  # isort: skip  after the adapter
from megatron.core.enums import ModelType  # isort: skip
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip
from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip
from megatron.core.transformer.module import MegatronModule  # isort: skip

from megabagel.models.build import transformer_config  # isort: skip
from megabagel.models.sparse_experts import SparseMLP  # isort: skip
from megabagel.training.ema import ShardedEma  # isort: skip
from megabagel.training.expert_losses import set_auxiliary_loss_scale, take_expert_losses  # isort: skip
from megabagel.training.optimizer import build_optimizer, set_learning_rate  # isort: skip
from megabagel.training.wrap import wrap  # isort: skip
from tests.sparse_reference import sparse_mlp  # isort: skip

HIDDEN, ROWS, PACKS, EXPERTS = 16, 32, 4, 4
LR, CLIP, EPS, DECAY = 1e-2, 100.0, 1e-3, 0.9  # this eps keeps rounding in gradients near 0 from becoming whole updates
MODEL = ModelConfig(
    hidden_size=HIDDEN, num_layers=2, num_attention_heads=2, num_query_groups=2, ffn_hidden_size=24, moe_router_topk=2,
    moe_aux_loss_coeff=0.3, moe_z_loss_coeff=0.1, moe_ffn_hidden_size=20, moe_shared_expert_intermediate_size=12,
    gen_num_experts=EXPERTS,
)  # fmt: skip
SHAPES = {
    "router.weight": (EXPERTS, HIDDEN),
    "shared_experts.linear_fc1.weight": (24, HIDDEN),
    "shared_experts.linear_fc2.weight": (HIDDEN, 12),
} | {
    f"experts.local_experts.{e}.linear_fc{n}.weight": shape
    for e in range(EXPERTS)
    for n, shape in ((1, (40, HIDDEN)), (2, (HIDDEN, 20)))
}


RESUMED = ("1,2,2,0", "2,1,4,1", "2,1,1,0")  # the first saves and resumes, the others load what it saved


def initial_weights() -> list[dict[str, Tensor]]:
    """Whole weights of both layers, equal on all ranks; no row chooses the last expert."""
    generator = torch.Generator().manual_seed(1)
    layers = [{n: torch.randn(s, generator=generator) * 0.2 for n, s in SHAPES.items()} for _ in range(2)]
    for layer in layers:
        layer["router.weight"][-1] = -1
    return layers


def pack(step: int, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, a loss weight per value (0 on padding), and padding; pack 1 holds no token."""
    generator = torch.Generator().manual_seed(100 * step + number)
    rows, weights = 1 + torch.randn(ROWS, HIDDEN, generator=generator), torch.randn(ROWS, HIDDEN, generator=generator)
    padding = torch.arange(ROWS) >= (0 if number == 1 else 20 + 3 * number)
    return rows, weights * ~padding[:, None], padding


class Stage(MegatronModule):
    """Two residual sparse layers."""

    def __init__(self, config, groups: ProcessGroupCollection):
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.pre_process = self.post_process = True
        self.first, self.second = (SparseMLP(config, EXPERTS, MODEL, groups) for _ in range(2))

    def set_input_tensor(self, tensor: object) -> None: ...

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = x + layer(x, padding)[0]
        return x


class Run:
    """The two layers in one layout, with optimizer and average."""

    def __init__(self, layout: Layout, parallel: ParallelConfig):
        self.layout, self.parallel, self.step = layout, parallel, 0
        training = TrainingConfig(params_dtype="fp32")
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        stage = Stage(transformer_config(Config(MODEL, parallel, training=training)), self.groups)
        for layer, weights in zip((stage.first, stage.second), initial_weights(), strict=True):
            for name, parameter in layer.named_parameters():
                parameter.data.copy_(self.mine(name, weights))
        self.chunks = wrap([stage], parallel)
        settings = OptimizerConfig(lr=LR, clip_grad=CLIP, adam_eps=EPS)
        self.optimizer = build_optimizer(settings, training, parallel, self.chunks)
        self.ema = ShardedEma(self.optimizer)

    def mine(self, name: str, weights: dict[str, Tensor]) -> Tensor:
        """This rank's part of a layer's whole weights, under the name that it has here."""
        parts, rank, size = name.split("."), self.layout.tp_rank, self.layout.tp_size
        if parts[0] == "experts":
            parts[2] = str(int(parts[2]) + self.groups.ep.rank() * EXPERTS // self.groups.ep.size())
        whole = weights[".".join(parts)]
        if parts[0] == "shared_experts":
            if parts[1] == "linear_fc2":
                return whole.chunk(size, dim=1)[rank]
            return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])
        return whole

    def rows(self, values: Tensor) -> Tensor:
        """This rank's rows of a pack."""
        part = values.chunk(self.groups.cp.size())[self.groups.cp.rank()]
        return part.chunk(self.layout.tp_size)[self.layout.tp_rank] if self.parallel.sequence_parallel else part

    def train(self) -> list[float]:
        """One step -> loss, load balancing, z, gradient norm."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        set_auxiliary_loss_scale(PACKS, self.layout.device)
        packs = [pack(self.step, n) for n in range(self.layout.dp_rank, PACKS, self.layout.dp_size)]

        def forward_step(batches, stage):
            x, weights, padding = (self.rows(values) for values in next(batches))

            def loss_function(output: Tensor):
                loss = (output[:, 0] * weights).sum() / PACKS
                return loss, torch.tensor(1, dtype=torch.int), {"loss": loss.detach().clone()}

            return stage(x[:, None], padding), loss_function

        reports = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter(packs), model=self.chunks,
            num_microbatches=len(packs), seq_length=ROWS, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        total = torch.stack([report["loss"] for report in reports]).sum()
        torch.distributed.all_reduce(total)
        if not self.parallel.sequence_parallel:
            total /= self.layout.tp_size  # each tensor-parallel rank has counted the same rows
        losses = take_expert_losses(self.chunks, MODEL, PACKS, self.layout.device)
        set_learning_rate(self.optimizer, LR)
        _, norm, _ = self.optimizer.step()
        self.ema.update(DECAY)
        self.step += 1
        return [float(total), losses.balance, losses.z, float(norm)]

    def furthest(self, expected: list[dict[str, Tensor]]) -> float:
        """Largest difference of any weight from the expected ones, over all ranks."""
        module = self.chunks[0].module
        worst = torch.stack(
            [
                (parameter - self.mine(name, weights)).abs().max().detach()
                for layer, weights in zip((module.first, module.second), expected, strict=True)
                for name, parameter in layer.named_parameters()
            ]
        ).max()
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        return float(worst)

    def tensors(self) -> list[Tensor]:
        """Everything that must be equal to the bit after a resume."""
        state = [
            t
            for optimizer in self.optimizer.chained_optimizers
            for s in optimizer.optimizer.state.values()
            for t in (s["exp_avg"], s["exp_avg_sq"])
        ]
        return [t.detach().clone() for t in [*self.chunks[0].parameters(), *state, *self.ema.shards]]

    def save(self, run_dir: Path) -> None:
        checkpoint.save(
            run_dir, self.step, self.chunks, self.optimizer, self.ema, data_state=None, counters={}, config_yaml=""
        )

    def load(self, run_dir: Path) -> None:
        self.step = checkpoint.load(run_dir, self.chunks, self.optimizer, self.ema).step


def plain(steps: int) -> tuple[list[list[float]], list[dict[str, Tensor]]]:
    """The same training in plain PyTorch: values of each step, and the weights after the last."""
    layers = [{n: nn.Parameter(w) for n, w in layer.items()} for layer in initial_weights()]
    parameters = [w for layer in layers for w in layer.values()]
    optimizer = torch.optim.Adam(parameters, LR, betas=(0.9, 0.95), eps=EPS)
    values = []
    for step in range(steps):
        optimizer.zero_grad()
        sums = torch.zeros(3)
        for number in range(PACKS):
            x, weights, padding = pack(step, number)
            losses = torch.zeros(2)
            for layer in layers:
                out, balance, z = sparse_mlp(layer, x, padding, MODEL.moe_router_topk)
                x, losses = x + out, losses + torch.stack([balance, z])
            sums += torch.cat([(x * weights).sum()[None], losses]) / PACKS
        (sums[0] + 0.3 * sums[1] + 0.1 * sums[2]).backward()
        norm = nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        values.append([*sums.tolist(), float(norm)])
    return values, [{n: w.detach() for n, w in layer.items()} for layer in layers]


def start(sizes: str) -> Run:
    tensor, context, expert, sequence = map(int, sizes.split(","))
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor, context_parallel_size=context, expert_model_parallel_size=expert,
        sequence_parallel=bool(sequence),
    )  # fmt: skip
    return Run(initialize(parallel, seed=7), parallel)


def layouts(*all_sizes: str) -> None:
    expected, weights = plain(steps=3)
    for sizes in all_sizes:
        run = start(sizes)
        values = [run.train() for _ in expected]
        error = max(abs(a - b) / max(abs(b), 1) for found, want in zip(values, expected, strict=True)
                    for a, b in zip(found, want, strict=True))  # fmt: skip
        line = {"layout": sizes, "values": error, "weights": run.furthest(weights)}
        if run.layout.rank == 0:
            print(json.dumps(line), flush=True)
        parallel_state.destroy_model_parallel()


def resume(run_dir: Path, first: str, *others: str) -> None:
    """After 2 steps of 4 the first layout saves; a new run goes on equally to the bit, other layouts to rounding."""
    run = start(first)
    for _ in range(2):
        run.train()
    run.save(run_dir)
    expected = [run.train() for _ in range(2)]
    again = Run(run.layout, run.parallel)
    torch.rand(3)  # disturbs the generators
    again.load(run_dir)
    assert [again.train() for _ in range(2)] == expected
    assert all(torch.equal(a, b) for a, b in zip(run.tensors(), again.tensors(), strict=True))
    parallel_state.destroy_model_parallel()
    for sizes in others:
        other = start(sizes)
        other.load(run_dir)
        torch.testing.assert_close(
            torch.tensor([other.train() for _ in range(2)]), torch.tensor(expected), rtol=1e-5, atol=1e-6
        )
        parallel_state.destroy_model_parallel()
    print("resumed", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with failure.guard():
        layouts(*sys.argv[2:])
        resume(Path(sys.argv[1]), *RESUMED)
        destroy()
