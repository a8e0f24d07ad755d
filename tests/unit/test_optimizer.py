"""AdamW, clipping, frozen parameters and the moving average against plain PyTorch, in one process."""

import pytest
import torch
from torch import nn

from megabagel.config.schema import OptimizerConfig, ParallelConfig, TrainingConfig
from megabagel.runtime.distributed import destroy, initialize
from megabagel.training.adam import AdamW
from megabagel.training.ema import ShardedEma
from megabagel.training.optimizer import build_optimizer, set_learning_rate, update
from megabagel.training.wrap import wrap

from megatron.core.transformer.module import MegatronModule  # isort: skip
from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip


@pytest.fixture
def one_process():
    initialize(ParallelConfig(), seed=3)
    yield
    destroy()


class Small(MegatronModule):
    """Two linear layers, the first one's bias frozen."""

    def __init__(self, dtype=torch.float32):
        config = TransformerConfig(
            num_layers=1, hidden_size=4, num_attention_heads=1, calculate_per_token_loss=True, params_dtype=dtype
        )
        super().__init__(config)
        self.first, self.second = nn.Linear(4, 8, dtype=dtype), nn.Linear(8, 2, dtype=dtype)
        self.first.bias.requires_grad_(False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("eps", [1e-8, 1e-15])
def test_adamw_equals_torch(weight_decay, eps):
    torch.manual_seed(0)
    mine, theirs = [[nn.Parameter(torch.arange(12.0).view(3, 4) + i) for i in range(2)] for _ in range(2)]
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": eps, "weight_decay": weight_decay}
    optimizers = AdamW(mine, **settings), torch.optim.AdamW(theirs, foreach=True, **settings)
    for _ in range(5):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(3, 4)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert optimizers[0].param_groups[0]["step"] == 5


def test_steps_clip_and_average_equal_the_plain_formulas(one_process):
    config = OptimizerConfig(lr=1e-3, clip_grad=0.1, adam_eps=1e-15)
    model, plain = Small(), Small()
    plain.load_state_dict(model.state_dict())
    frozen = model.first.bias.clone()
    chunks = wrap([model], ParallelConfig())
    optimizer = build_optimizer(config, TrainingConfig(params_dtype="fp32"), ParallelConfig(), chunks)
    ema = ShardedEma(optimizer)
    trainable = [p for p in plain.parameters() if p.requires_grad]
    reference = torch.optim.AdamW(trainable, lr=1e-3, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)
    averages = [p.detach().clone() for p in trainable]
    for step in range(5):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        chunks[0](x).square().sum().backward()
        model.config.finalize_model_grads_func(chunks, torch.tensor(5))
        set_learning_rate(optimizer, 1e-3)
        norm = update(optimizer)
        ema.update(0.9)
        reference.zero_grad()
        plain(x).square().sum().backward()
        total = torch.stack([p.grad.norm() for p in trainable]).norm()
        assert norm == pytest.approx(float(total), rel=1e-5) and norm > 0.1
        for p in trainable:
            p.grad.mul_(0.1 / (total + 1e-6))
        reference.step()
        averages = [0.9 * a + 0.1 * p.detach() for a, p in zip(averages, trainable, strict=True)]
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    weights = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    with ema.applied():
        for parameter, average in zip((p for p in model.parameters() if p.requires_grad), averages, strict=True):
            torch.testing.assert_close(parameter.detach(), average, rtol=1e-5, atol=1e-6)
        assert torch.equal(model.first.bias, frozen)
    for parameter, before in zip((p for p in model.parameters() if p.requires_grad), weights, strict=True):
        assert torch.equal(parameter, before)


def test_trainable_parameters_of_two_types_are_refused(one_process):
    model = Small(torch.bfloat16)
    model.second.float()
    chunks = wrap([model], ParallelConfig())
    with pytest.raises(ValueError, match=r"parameter second.weight is torch.float32; all that train must be"):
        build_optimizer(OptimizerConfig(), TrainingConfig(params_dtype="bf16"), ParallelConfig(), chunks)


def test_a_config_that_would_average_gradients_is_refused(one_process):
    model = Small()
    model.config.calculate_per_token_loss = False
    with pytest.raises(ValueError, match="calculate_per_token_loss"):
        wrap([model], ParallelConfig())
