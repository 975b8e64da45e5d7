"""Several processes that read anchors together, as `torchrun` starts them."""

from __future__ import annotations

import atexit
import os

import torch.distributed as dist


def join() -> tuple[int, int]:
    """This process's rank and how many there are; joins the group that `torchrun` announces."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        # Its threads would end the process with SIGABRT now and then.
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()
