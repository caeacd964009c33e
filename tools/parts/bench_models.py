"""Ways to run a model whose experts do not fit into memory, for `bench_run.py`."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe_beyond.cache.prefetchers import parse_prefetch
from moe_beyond.geometry import Geometry
from moe_beyond.runtime import OffloadedRun, load_offloaded
from moe_beyond.simulator.settings import reads_scores


@dataclass(frozen=True)
class Options:
    """Options that all rows share.

    Attributes:
        model: Folder of the model.
        geometry: Geometry of the model.
        slots: Budget in experts.
        threads: Number of threads that compute.
        predictor: Predictor for strategies that read scores, a folder or a name.
        profile: Usage profile for policies that need it, a folder or a name.
        readers: Number of threads that read experts.
    """

    model: Path
    geometry: Geometry
    slots: int
    threads: int
    predictor: str
    profile: str
    readers: int

    @property
    def expert_bytes(self) -> int:
        """Size of an expert in bytes."""
        return 2 * self.geometry.params_per_expert


@dataclass(frozen=True)
class Text:
    """Tokens to decode, with their routing.

    Attributes:
        token_ids: Ids of the model's tokenizer, ``(T,)`` int64.
        experts: Recorded choice, ``(T, L, K)`` int64.
    """

    token_ids: Tensor
    experts: Tensor

    def first(self, tokens: int | None) -> "Text":
        """Return the first tokens; all of them for None."""
        return Text(self.token_ids[:tokens], self.experts[:tokens])


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to decode.

    Attributes:
        model: Model of the DeepSeek-V2 architecture.
        expert_bytes: Memory for experts in bytes.
        before_token: Function that runs before each token, outside the measured time (default: nothing).
        run: Run of a model in slots (default: None).
    """

    model: PreTrainedModel
    expert_bytes: int
    before_token: Callable[[], None] = lambda: None
    run: OffloadedRun | None = None


@contextmanager
def accelerate(options: Options) -> Iterator[Loaded]:
    """Load the model with experts on disk.

    Args:
        options: Options of the run.
    """
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model))
    layers = max(1, options.slots // options.geometry.num_experts)
    experts = [name for name, _ in empty.named_modules() if name.endswith(".experts")]
    others = [name for name, module in empty.named_modules() if not any(module.children()) and ".experts." not in name]
    device_map = dict.fromkeys([*others, *experts[: layers - 1]], "cpu") | dict.fromkeys(experts[layers - 1 :], "disk")
    with tempfile.TemporaryDirectory(prefix="accelerate-", dir=options.model.parent) as folder:
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype="auto", device_map=device_map, offload_folder=folder
        )

        def drop_pages() -> None:
            for path in Path(folder).iterdir():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        os.sync()  # only pages that are on disk can leave the page cache
        yield Loaded(model, layers * options.geometry.num_experts * options.expert_bytes, drop_pages)


@contextmanager
def unmodified(options: Options) -> Iterator[Loaded]:
    """Load the whole model into memory.

    Args:
        options: Options of the run.
    """
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    yield Loaded(model, options.geometry.total_experts * options.expert_bytes)


@contextmanager
def in_slots(options: Options, slots: int, policy: str, prefetch: str = "none") -> Iterator[Loaded]:
    """Load the model without its experts, which are read into slots with direct I/O.

    Args:
        options: Options of the run.
        slots: Number of slots.
        policy: Name of the eviction policy.
        prefetch: Prefetcher (default: ``"none"``).
    """
    scores = reads_scores(policy) or parse_prefetch(prefetch).prefetcher.reads_scores
    profile = options.profile if reads_scores(policy) else None
    with load_offloaded(
        options.model, budget=slots, policy=policy, prefetch=prefetch, profile=profile, device="cpu",
        predictor=options.predictor if scores else None, readers=options.readers, direct_io=True,
    ) as run:  # fmt: skip
        yield Loaded(run.model, run.pool.nbytes + run.store.nbytes, run=run)


ROWS: dict[str, Callable[[Options], AbstractContextManager[Loaded]]] = {
    "accelerate": accelerate,
    "resident": lambda options: in_slots(options, options.geometry.total_experts, "lru"),
    "unmodified": unmodified,
}
"""Ways to run the model besides those of a strategy in slots."""


def load(row: str, options: Options) -> AbstractContextManager[Loaded]:
    """Load the model of a row.

    Args:
        row: Key of `ROWS`, ``POLICY`` or ``POLICY+PREFETCH``.
        options: Options of the run.
    """
    if row in ROWS:
        return ROWS[row](options)
    policy, _, prefetch = row.partition("+")
    return in_slots(options, options.slots, policy, prefetch or "none")
