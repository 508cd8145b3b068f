"""Collectives, alone and between two processes of this machine."""

import torch
from torch import multiprocessing

from pattern_bench.processes import collectives


def test_alone_everything_is_returned_as_it_is():
    tensor = torch.arange(3.0)
    for collective in (collectives.all_reduce, collectives.reduce, collectives.broadcast):
        assert collective(tensor) is tensor
    assert collectives.broadcast_text("grüße") == "grüße"
    assert (collectives.rank(), collectives.world_size(), collectives.is_rank_zero()) == (0, 1, True)
    collectives.barrier()


def exchange(rank, file, answers):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    own = torch.tensor([1.0, 10.0]) * (rank + 1)
    answers.put(
        (
            (collectives.rank(), collectives.world_size(), collectives.is_rank_zero()),
            collectives.all_reduce(own.clone()).tolist(),
            collectives.reduce(own.clone()).tolist(),
            collectives.broadcast(own.clone()).tolist(),
            collectives.broadcast_text("grüße" if rank == 1 else ""),
            collectives.broadcast_text(""),
        )
    )
    collectives.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_exchange_tensors_and_text(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    started = [context.Process(target=exchange, args=(rank, tmp_path / "store", answers)) for rank in range(2)]
    for process in started:
        process.start()
    first, second = sorted(answers.get() for _ in started)
    for process in started:
        process.join()
    assert (first[0], second[0]) == ((0, 2, True), (1, 2, False))
    for answer in (first, second):
        assert answer[1] == [3.0, 30.0]
        assert answer[3] == [1.0, 10.0]
        assert answer[4:] == ("grüße", "")
    assert first[2] == [3.0, 30.0]
