"""Linears with the interface and the limits of Transformer Engine's, composed of megatron-core's own, for the CPU.

They say nothing about Transformer Engine's numbers; they show that what is built around its classes is right.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megabagel.models.precision import Capability
from megabagel.runtime import distributed  # noqa: F401  megatron-core is adapted before it is imported

from megatron.core.dist_checkpointing.mapping import ShardedStateDict  # isort: skip
from megatron.core.process_groups_config import ProcessGroupCollection  # isort: skip
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # isort: skip
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip

HOPPER = Capability(None, (9, 0), (13, 0))


def _check(rows: Tensor, config: TransformerConfig) -> None:
    """FP8 products exist for multiples of 16 (mxfp8: 32) only."""
    alignment = 32 if config.fp8_recipe == "mxfp8" else 16
    if config.fp8 and (rows[..., 0].numel() % alignment or rows.shape[-1] % alignment):
        raise AssertionError(f"FP8 needs multiples of {alignment}, got {tuple(rows.shape)}")


class Column(ColumnParallelLinear):
    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Callable,
        gather_output: bool, bias: bool, skip_bias_add: bool, is_expert: bool, tp_comm_buffer_name: str | None = None,
        tp_group: torch.distributed.ProcessGroup | None = None, stride: int = 1,
    ):  # fmt: skip
        if gather_output:
            raise ValueError("Transformer Engine linear layers do not support gather_output = True")
        super().__init__(
            input_size, output_size, config=config, init_method=init_method, bias=bias, gather_output=False,
            skip_bias_add=skip_bias_add, is_expert=is_expert, tp_comm_buffer_name=tp_comm_buffer_name,
            tp_group=tp_group, stride=stride,
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        _check(x, self.config)
        return super().forward(x)


class NormColumn(Column):
    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, is_expert: bool, **options):
        if is_expert:
            raise ValueError("Transformer Engine linear layers do not yet support MoE")
        super().__init__(input_size, output_size, config=config, is_expert=is_expert, **options)
        self.layer_norm_weight = nn.Parameter(torch.empty(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = self.layer_norm_weight
        return super().forward(nn.functional.rms_norm(x, weight.shape, weight, self.config.layernorm_epsilon))


class Row(RowParallelLinear):
    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Callable, bias: bool,
        input_is_parallel: bool, skip_bias_add: bool, is_expert: bool, tp_comm_buffer_name: str | None = None,
        tp_group: torch.distributed.ProcessGroup | None = None,
    ):  # fmt: skip
        super().__init__(
            input_size, output_size, config=config, init_method=init_method, bias=bias, input_is_parallel=True,
            skip_bias_add=skip_bias_add, is_expert=is_expert, tp_comm_buffer_name=tp_comm_buffer_name,
            tp_group=tp_group,
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        _check(x, self.config)
        return super().forward(x)


class Grouped(nn.Module):
    """Of experts: weights `weight0`, `weight1`, ...; rows sorted by expert."""

    def __init__(
        self, num_gemms: int, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Callable,
        bias: bool, skip_bias_add: bool, is_expert: bool, tp_comm_buffer_name: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):  # fmt: skip
        super().__init__()
        for number in range(num_gemms):
            weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(weight, True, 0, 1)  # whole or not, as Transformer Engine does
            self.register_parameter(f"weight{number}", weight)

    def forward(self, x: Tensor, rows_of_each: list[int]) -> tuple[Tensor, None]:
        parts = zip(x.split(rows_of_each), self.parameters(), strict=True)
        return torch.cat([nn.functional.linear(part, weight) for part, weight in parts]), None

    def sharded_state_dict(self, *where: object) -> ShardedStateDict:
        raise AssertionError("experts' checkpoints are megatron-core's matter")


CLASSES = {
    "TEColumnParallelLinear": Column,
    "TELayerNormColumnParallelLinear": NormColumn,
    "TERowParallelLinear": Row,
    "TEColumnParallelGroupedLinear": Grouped,
    "TERowParallelGroupedLinear": Grouped,
}
