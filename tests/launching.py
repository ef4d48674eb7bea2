"""How tests start several processes that share one work, with gloo."""

import os
import socket

# By `accelerate launch`, as users do. With --cpu it starts several processes by MPI alone; these find no GPU. Port 0 is
# any that is free.
TWO_PROCESSES = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--main_process_ip", "127.0.0.1", "--main_process_port", "0"),
)


def free_port() -> int:
    """A port at which processes of this machine can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def take_place(rank: int, processes: int, port: int) -> None:
    """Make this process one of several, as a launcher does."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
