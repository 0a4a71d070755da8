"""On what keys are computed: unlike machines give keys that differ by rounding."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from nearest.encode.encoder import Encoder
from nearest.errors import FolderError
from nearest.store.records import MachineRecord


def machine_of(encoder: Encoder) -> MachineRecord:
    """Describe this machine, as far as it decides how keys are rounded."""
    device = encoder.model.device
    gpu = device.type != "cpu"
    return MachineRecord(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        torch=str(torch.__version__),
        threads=1 if gpu else torch.get_num_threads(),
        simd="" if gpu else torch.backends.cpu.get_cpu_capability(),
        batch_size=encoder.batch_size,
    )


@contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Let torch use so many threads while the context is open."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_all_alike(made_on: Iterable[tuple[str, MachineRecord | None]]) -> None:
    """Refuse keys of unlike machines (FolderError), each said to be somewhere; None: not known."""
    known = [(where, machine) for where, machine in made_on if machine is not None]
    for where, machine in known[1:]:
        check_alike(machine, known[0][1], where)


def check_alike(one: MachineRecord, other: MachineRecord, where: str) -> None:
    """Refuse keys of two machines that round otherwise (FolderError)."""
    for name in MachineRecord.__struct_fields__:
        was, now = getattr(one, name), getattr(other, name)
        if was != now:
            raise FolderError(
                f"keys of {where} were made with {name} {was}, and others with {now}: they would "
                "differ by rounding from those of one machine. Make all of them alike, or accept "
                "that (--allow-mixed): distances then agree only within float tolerance"
            )
