"""Functions run on several gloo processes of this machine; what each returns or raises."""

import os
import pickle
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LATE = ["torch.distributed.fsdp", "torch._dynamo", "torch.fx.experimental.symbolic_shapes"]
LIMIT = 120.0  # seconds that a run may take on a busy machine


def on_ranks(size, function, folder: Path, *arguments):
    """What `function(rank, *arguments)` yielded last on each rank, or the text of what it raised.

    A rank that dies before it gives None.
    """
    folder.mkdir(exist_ok=True)
    context = mp.get_context("forkserver")  # which loads torch, and what it loads late, once
    context.set_forkserver_preload([*LATE, "bilevel", function.__module__])
    processes = [
        context.Process(target=_run, args=(rank, size, function, str(folder), arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(end - time.monotonic(), 0.1))
        if process.is_alive():
            process.kill()
    return [_told(folder / f"{rank}.pickle") for rank in range(size)]


def _told(path):
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _run(rank, size, function, folder, arguments):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    try:
        for found in function(rank, *arguments):
            _tell(folder, rank, found)
    except Exception as error:
        _tell(folder, rank, f"{error}\n{traceback.format_exc()}")
    os._exit(0)  # a rank whose peers are dead would wait for them


def _tell(folder, rank, found):
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
