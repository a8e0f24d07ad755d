"""Run by test_loss.py on 4 ranks: the vocabulary loss on sharded classes and rows against PyTorch's on whole ones."""

import itertools

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from megabagel.config.schema import ParallelConfig
from megabagel.runtime import failure
from megabagel.runtime.distributed import destroy, initialize

from megatron.core import parallel_state  # isort: skip  after the adapter

from megabagel.models.loss_rows import share_rows  # isort: skip
from megabagel.models.vocabulary_head import vocabulary_loss  # isort: skip

TENSOR_PARALLEL = (1, 2, 4)
LENGTH, CLASSES, WIDTH = 32, 40, 6
CASES = {
    "rows everywhere": [*range(0, 32, 3)],
    "rows on one rank": [24, 25, 27, 30],
    "uneven": [0, 1, 2, 9, 17, 18, 31],
    "no row": [],
}


def check(rows: list[int], sequence_parallel: bool, chunk_rows: int) -> None:
    group = parallel_state.get_tensor_model_parallel_group()
    rank, ranks = group.rank(), group.size()
    generator = torch.Generator().manual_seed(len(rows))
    stream, weight = (torch.randn(n, WIDTH, generator=generator, requires_grad=True) for n in (LENGTH, CLASSES))
    labels = torch.randint(CLASSES, (len(rows),), generator=generator)
    row_weights = torch.rand(len(rows), generator=generator)
    of_rows = cross_entropy(stream[rows] @ weight.T, labels, reduction="none")
    expected = (of_rows * row_weights).sum()
    of_stream, of_weight = torch.autograd.grad(expected, [stream, weight])

    shares = (rank, ranks) if sequence_parallel else (0, 1)
    own, own_weight = (own_part(t, *s) for t, s in ((stream, shares), (weight, (rank, ranks))))
    shared = share_rows(torch.tensor(rows, dtype=torch.int64), LENGTH, *shares)
    hidden = shared.gather(own, group, sequence_parallel)
    total, losses = vocabulary_loss(hidden, own_weight, labels, row_weights, group, chunk_rows)
    total.backward()
    for found, wanted in (
        (losses, of_rows),
        (total, expected),
        (own.grad, own_part(of_stream, *shares)),
        (own_weight.grad, own_part(of_weight, rank, ranks)),
    ):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-6, atol=1e-6)


def own_part(whole: Tensor, rank: int, ranks: int) -> Tensor:
    return whole.detach().chunk(ranks)[rank].clone().requires_grad_(True)


def main() -> None:
    for tensor in TENSOR_PARALLEL:
        initialize(ParallelConfig(tensor_model_parallel_size=tensor), seed=1)
        for rows, sequence_parallel, chunk_rows in itertools.product(CASES.values(), (False, True), (3, 64)):
            check(rows, sequence_parallel, chunk_rows)
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        print(f"losses ok on {TENSOR_PARALLEL} ranks", flush=True)
    destroy()


if __name__ == "__main__":
    with failure.guard():
        main()
