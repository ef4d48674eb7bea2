"""Processes that score together: they wait for each other, and torchmetrics adds up what each has seen."""

from __future__ import annotations

from dit_accel.generation.processes import Process, meet


class Processes(Process):
    """This process, joined to the others."""

    @classmethod
    def join(cls, device: str) -> Processes:
        """Meet the others, if a launcher started several.

        Args:
            device: as asked for; "cpu" keeps off GPUs that are there.
        """
        state = meet(device)
        return cls(state.process_index, state.num_processes, state.local_process_index)

    def wait(self) -> None:
        """Until all are here."""
        meet().wait_for_everyone()
