"""One process of `pool.py`: waits for jobs and runs each as a rank of its own process group, leaving nothing behind.

Importing this file imports all that jobs need, so that the processes forked afterwards start at once.
"""

import faulthandler
import gc
import os
import signal
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the table is about arithmetic: float32 on the CPU, any number of ranks

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker  # noqa: E402

import megabagel.training.setup  # noqa: E402, F401
from megabagel.runtime import cpu_megatron, distributed  # noqa: E402

cpu_megatron.install()
# objects of the imports leave the garbage collector's sight: it would copy their pages into every forked process
gc.collect()
gc.freeze()


def serve(rank: int, connection: Connection, port: int, stack_file: Path) -> None:
    """Answer jobs (name, processes, function, arguments) with (error or None, result), then "leave" with "left".

    Ends when the pool is gone. SIGUSR1 writes all threads' stacks to `stack_file`.
    """
    stacks = stack_file.open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    while True:
        try:
            name, processes, function, arguments = connection.recv()
        except EOFError:
            return
        try:
            dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=processes)
            answer = None, function(*arguments)
        except BaseException:
            answer = traceback.format_exc(), None
        connection.send(answer)
        if connection.recv() == "leave":  # every rank has finished: nobody waits for this one any more
            _forget()
            connection.send("left")


def _forget() -> None:
    """Drop the process groups and what megatron-core keeps in globals beside them."""
    get_moe_layer_wise_logging_tracker().clear()
    distributed.destroy()
    gc.collect()
