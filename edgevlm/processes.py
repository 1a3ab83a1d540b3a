"""One process or many: who is the main one, and where all of them meet.

`accelerate launch` and `torchrun` start the same command several times and number the processes in the environment.
Without them everything here says "one, and it is the main one", and torch is not even imported.
"""

import os
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

TIMEOUT = timedelta(hours=24)
"""How long a process waits for the others. A dead one is noticed by the launcher, which ends them all; a slow one (it
writes a checkpoint, or evaluates) is worth waiting for."""


def world_size() -> int:
    """Processes in all."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


def join() -> None:
    """Join the other processes: NCCL where each has a GPU, gloo on CPUs. Nothing to do for one process or twice."""
    if world_size() == 1:
        return
    import torch
    from accelerate import PartialState

    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    cpu = asked or not torch.accelerator.is_available()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and not torch.distributed.is_initialized():
        from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

        # The launcher's store still holds the addresses of the processes that died: a restart needs names of its own.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*address, is_master=False, timeout=timedelta(minutes=10))
        device = "cpu" if cpu else torch.accelerator.current_accelerator().type  # pyright: ignore[reportOptionalMemberAccess]
        torch.distributed.init_process_group(
            torch.distributed.get_default_backend_for_device(device),
            store=PrefixStore(f"attempt-{attempt}", store),
            rank=rank(),
            world_size=world_size(),
            timeout=TIMEOUT,
        )
    # Without cpu=True accelerate takes a launch on a machine without accelerators for single processes.
    PartialState(cpu=cpu, timeout=TIMEOUT)


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        from accelerate import PartialState

        join()
        PartialState().wait_for_everyone()


def from_main(value: T) -> T:
    """What the main process passed, in every process."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    join()
    return broadcast_object_list([value])[0]


def gathered(value: T) -> list[T]:
    """What each process passed, in order, in every process."""
    if world_size() == 1:
        return [value]
    from accelerate.utils import gather_object

    join()
    return gather_object([value])
