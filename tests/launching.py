"""How tests start two processes that share one work, with gloo: by `accelerate launch`, as users do."""

# With --cpu accelerate starts several processes by MPI alone; these find no GPU. Port 0 is any that is free.
TWO_PROCESSES = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--main_process_ip", "127.0.0.1", "--main_process_port", "0"),
)
