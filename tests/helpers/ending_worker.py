"""Short runs of two processes each (gloo), one after the other; prints the exit codes of all processes.

python ending_worker.py FOLDER "returns"|"destroys the group"|"starved" ...

The processes are forks, so that the imports are paid once. Exit code 3: a thread of gloo was alive at the end, when all
that is registered with `atexit` had run. With "starved" that is not looked at; the threads get the processor only when
nobody else wants it, so that what they do late they do very late.
"""

import atexit
import os
import socket
import sys
from pathlib import Path


def gloo_threads() -> list[int]:
    tasks = Path("/proc/self/task").iterdir()
    return [int(task.name) for task in tasks if (task / "comm").read_text().strip() == "pt_gloo_runloop"]


@atexit.register  # before hf_gr is imported: runs last
def require_no_threads() -> None:
    if how != "starved" and not hasattr(sys, "last_value") and gloo_threads():
        os._exit(3)


import torch.distributed as dist
from transformers import TrainerCallback

from helpers import toys
from hf_gr import GRConfig, GRTrainer


class AtWork(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        threads = gloo_threads()
        assert threads, "no thread has the name that is looked for"
        if how == "starved":
            for thread in threads:
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def train() -> GRTrainer:
    settings = {"max_steps": 2, "ddp_backend": "gloo", "gr_warmup": "none", "optim": "sgd"}
    args = GRConfig(**toys.arguments(folder, **settings))
    trainer = GRTrainer(toys.llama(), args, train_dataset=toys.text(8), callbacks=[AtWork()])
    trainer.train()
    return trainer


def fork_pair() -> list[int]:
    """Process ids of the children; in a child, none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in "01":
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            return []
        children.append(child)
    return children


folder, *runs = sys.argv[1:]
codes = []
for how in runs:
    if not (children := fork_pair()):
        trainer = train()  # stays alive, as in a script without functions
        if how == "destroys the group":
            dist.destroy_process_group()
        break
    codes += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
else:
    sys.stdout.write(" ".join(map(str, codes)))
