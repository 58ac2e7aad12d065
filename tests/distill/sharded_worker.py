"""One rank of a run with FSDP2 on CPU, which accelerate itself offers on accelerators only.

    torchrun --nproc-per-node 2 sharded_worker.py TEACHER STUDENT TEXT (whole | copied | sharded)

One process trains the whole model; several hold copies of it (DDP) or parts of it (FSDP2).
Prints the loss of every step as JSON, from the first rank. Started by test_distributed.py.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from edgekd.distill.data import read_documents
from edgekd.distill.loss_options import LossOptions
from edgekd.distill.losses import LossParts
from edgekd.distill.model import DistillModel, OnlineTeacher
from edgekd.distill.packing import cut, pack
from edgekd.distill.trainer import collate
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import load_causal_lm


def main(teacher: str, student: str, text: str, way: str) -> None:
    """Train six steps of four rows, the ranks sharing the rows."""
    dist.init_process_group("gloo")
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    model = DistillModel(
        load_causal_lm(Path(student), torch.float32),
        OnlineTeacher(load_causal_lm(Path(teacher), torch.float32), 400),
        400,
        LossOptions(),
        torch.float32,
    )
    assert (n_ranks == 1) == (way == "whole")
    trained: Any = DistributedDataParallel(model) if way == "copied" else model
    if way == "sharded":
        for layer in model.student.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    documents = read_documents([text], FileTokenizer(Path(student)), None)
    rows = pack(cut(documents, 32), 32)
    losses = []
    for step in range(6):
        batch = collate(rows[4 * step : 4 * step + 4])
        n_tokens = (batch["shift_labels"] != -100).sum()
        share = {name: value[rank::n_ranks] for name, value in batch.items() if name != "labels"}
        parts = trained(**share)
        assert isinstance(parts, LossParts)
        (parts.loss / n_tokens * n_ranks).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        total = parts.loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total / n_tokens))
    dist.barrier()
    if rank == 0:
        print(json.dumps(losses), flush=True)
    os._exit(0)  # gloo's threads sometimes abort when they are torn down one after the other


if __name__ == "__main__":
    main(*sys.argv[1:])
