"""Two gloo processes on one machine against the single-process loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rlo_core import CE, Rooted, RootedConvex, link_linear_cross_entropy
from rlo_core.linear import vocab_parallel_linear_cross_entropy
from torch import Tensor, nn

RANKS = 2
TOKENS, WIDTH, CLASSES = 23, 8, 31
FIRST = (0, 17)  # shards of 17 and 14 classes


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    target = torch.randint(CLASSES, (TOKENS,), generator=generator)
    target[::6] = -100
    return normal(TOKENS, WIDTH), normal(CLASSES, WIDTH), normal(CLASSES), target


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def start(rank: int, body: Callable[[int], None], store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        body(rank)
        dist.barrier()  # a rank that leaves early can hang the other in torch 2.6
    finally:
        dist.destroy_process_group()


def on_two_ranks(body: Callable[[int], None], folder: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    mp.spawn(start, (body, str(folder / "store")), nprocs=RANKS)


def shards(rank: int) -> None:
    """Every option, on plain shards of unequal size."""
    hidden, weight, bias, target = problem()
    mine = slice(FIRST[rank], FIRST[rank] + (17, 14)[rank])
    token_weight = torch.rand(
        TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    for link in (CE(), Rooted(3.0), RootedConvex(2.0)):
        for reduction in ("mean", "sum", "none"):
            for smoothing, cap in ((0.0, None), (0.1, None), (0.0, 4.0), (0.2, 4.0)):
                h = hidden.clone().requires_grad_()
                w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
                expected = link_linear_cross_entropy(
                    h,
                    w,
                    target,
                    link,
                    bias=b,
                    label_smoothing=smoothing,
                    softcap=cap,
                    token_weight=token_weight,
                    reduction=reduction,
                    impl="torch",
                )
                expected.sum().backward()
                h2 = hidden.clone().requires_grad_()
                w2 = weight[mine].clone().requires_grad_()
                b2 = bias[mine].clone().requires_grad_()
                found = vocab_parallel_linear_cross_entropy(
                    h2,
                    w2,
                    target,
                    link,
                    first_class=FIRST[rank],
                    classes=CLASSES,
                    bias=b2,
                    label_smoothing=smoothing,
                    softcap=cap,
                    token_weight=token_weight,
                    reduction=reduction,
                    memory_budget=7 * 17 * 8,
                )
                found.sum().backward()
                close(found, expected)
                close(h2.grad, h.grad)
                close(w2.grad, w.grad[mine])
                close(b2.grad, b.grad[mine])


def test_two_shards_of_the_vocabulary_give_the_loss_and_gradients_of_the_whole(tmp_path):
    on_two_ranks(shards, tmp_path)


def dtensors(rank: int) -> None:
    """The head as torch's own tensor parallelism lays it out, then by hand, then unsharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    hidden, weight, bias, target = problem()
    h = hidden.clone().requires_grad_()
    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    expected = link_linear_cross_entropy(h, w, target, Rooted(3.0), bias=b, impl="torch")
    expected.backward()
    mesh = init_device_mesh("cpu", (RANKS,))
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    parallelize_module(
        head, mesh, ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    )
    h2 = hidden.clone().requires_grad_()
    found = link_linear_cross_entropy(h2, head.weight, target, Rooted(3.0), bias=head.bias)
    found.backward()
    close(found, expected)
    close(h2.grad, h.grad)
    close(head.weight.grad.full_tensor(), w.grad)
    close(head.bias.grad.full_tensor(), b.grad)

    # hidden as sequence parallelism has it: each rank some of the tokens
    h3 = distribute_tensor(hidden.clone(), mesh, [Shard(0)]).requires_grad_()
    link_linear_cross_entropy(h3, head.weight, target, Rooted(3.0), bias=head.bias).backward()
    close(h3.grad.full_tensor(), h.grad)

    whole = distribute_tensor(weight.clone(), mesh, [Replicate()]).requires_grad_()
    close(
        link_linear_cross_entropy(hidden, whole, target, Rooted(3.0), bias=bias), expected.detach()
    )
    split = distribute_tensor(weight.clone(), mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"must be Shard\(0\) or Replicate, got S"):
        link_linear_cross_entropy(hidden, split, target, Rooted(3.0))
    with pytest.raises(ValueError, match="needs impl='chunked' or 'two-pass', got 'torch'"):
        link_linear_cross_entropy(hidden, head.weight, target, Rooted(3.0), impl="torch")


@pytest.mark.slow
def test_a_dtensor_head_gives_the_loss_and_gradients_of_the_whole(tmp_path):
    on_two_ranks(dtensors, tmp_path)


class Model(nn.Module):
    """An embedding, a layer and a head whose loss is fused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(CLASSES, WIDTH, dtype=torch.float64)
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.embed(tokens)))
        return link_linear_cross_entropy(hidden, self.head.weight, tokens, Rooted(3.0), shift=True)


def batches() -> Tensor:
    return torch.randint(CLASSES, (RANKS, 3, 9), generator=torch.Generator().manual_seed(9))


def data_parallel(rank: int) -> None:
    """DDP and FSDP2 average the gradients; all ranks have as many tokens, so it is the mean."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    reference = Model()
    torch.stack([reference(batch) for batch in batches()]).mean().backward()

    replicated = DistributedDataParallel(Model())
    replicated(batches()[rank]).backward()
    for found, expected in zip(replicated.parameters(), reference.parameters(), strict=True):
        close(found.grad, expected.grad)

    sharded = Model()
    fully_shard(sharded)
    for _ in range(2):  # twice: the second step starts from parameters that were sharded again
        sharded.zero_grad()
        sharded(batches()[rank]).backward()
    for found, expected in zip(sharded.parameters(), reference.parameters(), strict=True):
        close(found.grad.full_tensor(), expected.grad)


@pytest.mark.slow
def test_ddp_and_fsdp2_train_through_the_fused_loss(tmp_path):
    on_two_ranks(data_parallel, tmp_path)


def test_a_shard_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"the shard must lie in \[0, 31\), got classes 20 to 36"):
        vocab_parallel_linear_cross_entropy(
            torch.zeros(2, 3),
            torch.zeros(17, 3),
            torch.zeros(2, dtype=torch.int64),
            CE(),
            first_class=20,
            classes=31,
        )
    with pytest.raises(ValueError, match=r"needs torch\.distributed to be initialised"):
        vocab_parallel_linear_cross_entropy(
            torch.zeros(2, 3),
            torch.zeros(17, 3),
            torch.zeros(2, dtype=torch.int64),
            CE(),
            first_class=0,
            classes=31,
        )


def _an_empty_shard(rank: int) -> None:
    hidden, weight, bias, target = problem()
    split = (0, CLASSES) if rank == 0 else (CLASSES, CLASSES)
    for smoothing in (0.0, 0.1):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        expected = link_linear_cross_entropy(
            h, w, target, Rooted(3.0), bias=bias, label_smoothing=smoothing
        )
        expected.backward()
        hr = hidden.clone().requires_grad_()
        wr = weight[slice(*split)].clone().requires_grad_()
        found = vocab_parallel_linear_cross_entropy(
            hr,
            wr,
            target,
            Rooted(3.0),
            first_class=split[0],
            classes=CLASSES,
            bias=bias[slice(*split)],
            label_smoothing=smoothing,
        )
        found.backward()
        close(found, expected)
        assert hr.grad is not None
        assert wr.grad is not None
        assert h.grad is not None
        assert w.grad is not None
        close(hr.grad, h.grad)
        close(wr.grad, w.grad[slice(*split)])


def test_a_rank_with_no_class_of_a_small_vocabulary_takes_part(tmp_path: Path) -> None:
    on_two_ranks(_an_empty_shard, tmp_path)
