"""What the predictor under training is worth under a memory budget, at every validation and test."""

from typing import Any

import lightning as L
import torch

from moe_beyond.errors import UserError
from moe_beyond.evaluation.sources import from_predictor
from moe_beyond.evaluation.strategies import REFERENCES, strategy
from moe_beyond.geometry import Geometry, budget_slots
from moe_beyond.lookahead import Lookahead, parse_lookahead
from moe_beyond.metrics.names import of_budget
from moe_beyond.predictors.batch import Batch
from moe_beyond.simulator import Replay, ReplaySettings, Result
from moe_beyond.simulator.devices import load_device
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.tasks.base import PredictorTask
from moe_beyond.traces.manifest import Manifest

PREFIXES = ("", *(f"{policy}_" for policy in REFERENCES))
"""What the figures of the policy with prefetch, and of each reference, begin with."""
SHOWN = ("hit_rate", "bytes_ratio")
"""Fields of a `Result` that are logged, and of the first budget shown on the progress bar."""


class CacheReplay(L.Callback):
    """Replays the sequences of each validation (or test) through the cache under a budget.

    Logs, in one section per budget, ``hit_rate`` and ``bytes_ratio`` of the policy with prefetch, and those of LRU and
    Belady without: ``val_budget_10pct/hit_rate``, ``val_budget_10pct/lru_hit_rate``. A `ModelCheckpoint` can monitor
    any of them. With a device it also logs ``tokens_per_second`` of each. The sanity check is skipped. A strategy that
    reads no scores is replayed at a fit's first validation only, as the sequences stay the same.

    Args:
        budget: Memory for experts: ``10%``, ``166`` (slots), ``2.9GB`` or ``2.7GiB``.
        budgets: Further budgets.
        policy: Eviction policy.
        prefetch: Prefetcher; ``top<K>`` by default, with the model's K.
        lookahead: Which of the predictor's lookaheads to ask by; its first by default.
        scope: ``global`` or ``per-layer``.
        warmup_tokens: Tokens at a sequence's start that do not count.
        first_layer_prefetch: Whether layers whose scores exist when the token starts are prefetched then.
        device: A preset of `moe-beyond devices`, or a JSON file, for times.

    Attributes:
        results: Of the last validation or test, budget by budget: the policy with prefetch, LRU, Belady.
    """

    def __init__(
        self,
        budget: str = "10%",
        policy: str = "lru",
        prefetch: str | None = None,
        lookahead: str | int | None = None,
        scope: str = "global",
        warmup_tokens: int = 0,
        first_layer_prefetch: bool = True,
        device: str | None = None,
        budgets: list[str] | None = None,
    ) -> None:
        self.budget, self.policy, self.prefetch, self.budgets = budget, policy, prefetch, tuple(budgets or ())
        self.lookahead: Lookahead | None = None if lookahead is None else parse_lookahead(lookahead)
        self.scope, self.warmup_tokens, self.first_layer_prefetch = scope, warmup_tokens, first_layer_prefetch
        self.device = None if device is None else load_device(device)
        self.results: list[Result] = []
        self._strategies: list[ReplaySettings] = []
        self._replays: dict[ReplaySettings, Replay] = {}
        self._known: dict[ReplaySettings, Result] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Settle what to replay, before anything runs.

        Raises:
            UserError: The predictor does not have the lookahead, or the budget or a name cannot be read.
        """
        assert isinstance(pl_module, PredictorTask)
        predictor, manifest = pl_module.predictor, pl_module.data.manifest
        lookaheads = predictor.information.lookaheads
        lookahead = lookaheads[0] if self.lookahead is None else self.lookahead
        if lookahead not in lookaheads:
            known = ", ".join(map(str, lookaheads))
            raise UserError(f"CacheReplay: the predictor has no lookahead {lookahead}; it has {known}")
        bits = manifest.quantization_bits
        slots = list(self._budgets(predictor.geometry, bits))
        common = ReplaySettings(
            slots=slots[0],
            scope=self.scope,
            warmup_tokens=self.warmup_tokens,
            first_layer_prefetch=self.first_layer_prefetch,
            device=self.device,
            bits=bits,
        )
        prefetch = self.prefetch or f"top{predictor.geometry.top_k}"
        source = from_predictor(predictor, predictor.architecture)
        self._strategies = []
        for budget in slots:
            self._strategies.append(strategy(common, budget, self.policy, prefetch, source, lookahead))
            self._strategies += [strategy(common, budget, name) for name in REFERENCES]
        self._known = {}
        self._begin(pl_module)

    def _begin(self, task: PredictorTask) -> None:
        geometry = task.predictor.geometry
        self._replays = {one: Replay(geometry, one) for one in self._strategies if one not in self._known}

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from nothing."""
        assert isinstance(pl_module, PredictorTask)
        self._begin(pl_module)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from nothing."""
        self.on_validation_epoch_start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Replay a batch's sequences with the probabilities that the step returned."""
        if trainer.sanity_checking:
            return
        scores, experts = outputs.float().cpu().numpy(), batch.experts.cpu().numpy()
        assert isinstance(pl_module, PredictorTask)
        geometry = pl_module.predictor.geometry
        for row, length in enumerate(batch.lengths.tolist()):
            sequence = ReplaySequence(geometry, experts[row, :length], scores[row, :length])
            for replaying in self._replays.values():
                replaying.add_sequence(sequence)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Replay a batch's sequences with the probabilities that the step returned."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log, before `ModelCheckpoint` looks."""
        if not trainer.sanity_checking:
            self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log."""
        self._log(pl_module, "test")

    def _log(self, task: L.LightningModule, stage: str) -> None:
        found = self._known | {one: replaying.result() for one, replaying in self._replays.items()}
        self._known = {one: result for one, result in found.items() if one.predictor is None}
        self.results = [found[one] for one in self._strategies]
        assert isinstance(task, PredictorTask)
        for names, result in zip(self.names(stage, task.data.manifest), self.results, strict=True):
            for figure, name in names.items():
                value = torch.tensor(getattr(result, figure), device=task.device)
                shown = result is self.results[0] and figure in SHOWN
                task.log(name, value, prog_bar=shown, sync_dist=True)

    def names(self, stage: str, manifest: Manifest) -> list[dict[str, str]]:
        """Name what a stage logs.

        Args:
            stage: ``val`` or ``test``.
            manifest: Manifest of the traces to replay.

        Returns:
            For each of `results`, the names by field of `Result`.
        """
        figures = SHOWN if self.device is None else (*SHOWN, "tokens_per_second")
        budgets = self._budgets(manifest.geometry, manifest.quantization_bits).values()
        return [
            {figure: of_budget(stage, budget, prefix + figure) for figure in figures}
            for budget in budgets
            for prefix in PREFIXES
        ]

    def _budgets(self, geometry: Geometry, bits: float) -> dict[int, str]:
        """Return the different budgets by slots, each as the first text that means so many."""
        budgets: dict[int, str] = {}
        for text in (self.budget, *self.budgets):
            budgets.setdefault(budget_slots(text, geometry, bits), str(text))
        return budgets
