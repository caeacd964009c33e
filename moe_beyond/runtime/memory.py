"""Memory of a run: weights that stay, slots, staging buffers, and experts in host memory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from torch import nn

from moe_beyond.collect.devices import input_device
from moe_beyond.runtime.experts import ExpertsLayer
from moe_beyond.runtime.slots.pool import SlotPool
from moe_beyond.runtime.storage.store import ExpertStore, HostStore

HOST = "host"


@dataclass(frozen=True)
class Memory:
    """Memory of a run, in bytes.

    Attributes:
        place: Place of the resident weights and the slots: ``"host"``, or the name of a GPU.
        resident_bytes: Parameters and buffers of the model, without the offloaded experts.
        slots_bytes: Slots of experts.
        staging_bytes: Buffers between the store and the slots, in host memory; each thread that reads has one if the
            device or the store needs it.
        host_bytes: Experts in host memory.
    """

    place: str
    resident_bytes: int
    slots_bytes: int
    staging_bytes: int
    host_bytes: int

    @property
    def totals(self) -> dict[str, int]:
        """Sum of each place, the place of the slots first."""
        on_device, in_host = self.resident_bytes + self.slots_bytes, self.staging_bytes + self.host_bytes
        return {HOST: on_device + in_host} if self.place == HOST else {self.place: on_device, HOST: in_host}

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "total_bytes": self.totals}


def memory_of(
    model: nn.Module, layers: Mapping[int, ExpertsLayer], pool: SlotPool, store: ExpertStore, readers: int
) -> Memory:
    """Return the memory of a run, without activations and the cache of keys and values.

    Args:
        model: Model of the run.
        layers: Experts of the model, which do not count as resident weights if the run has restored them.
        pool: Memory of the slots.
        store: Source of the experts.
        readers: Number of threads that read experts.
    """
    experts = {id(getattr(layer.module, field.name)) for layer in layers.values() for field in layer.layout.fields}
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    in_host, device = isinstance(store, HostStore), input_device(model)
    pinned = readers * pool.stride if device.type == "cuda" and not in_host else 0
    return Memory(
        place=HOST if device.type == "cpu" else str(device),
        resident_bytes=sum(tensor.nbytes for key, tensor in tensors.items() if key not in experts),
        slots_bytes=pool.nbytes,
        staging_bytes=pinned + (0 if in_host else store.nbytes),
        host_bytes=store.nbytes if in_host else 0,
    )
