"""The process group of a fit under `torchrun`, whose processes share the anchors."""

from __future__ import annotations

import atexit
import os

import torch.distributed as dist


def join() -> tuple[int, int]:
    """This process's rank and the number of processes; joins torchrun's group when there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        # At exit its threads otherwise abort the process (SIGABRT) now and then.
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()
