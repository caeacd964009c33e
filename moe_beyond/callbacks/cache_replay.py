"""A replay under memory budgets at every validation and test of a fit."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from moe_beyond.datamodules.ranks import gather, rank_and_ranks
from moe_beyond.errors import UserError
from moe_beyond.evaluation.sources import from_predictor
from moe_beyond.evaluation.strategies import BASELINES, strategy
from moe_beyond.geometry import Geometry, budget_slots
from moe_beyond.lookahead import Lookahead, parse_lookahead
from moe_beyond.metrics.names import of_budget
from moe_beyond.predictors.batch import Batch
from moe_beyond.simulator import Replay, ReplaySettings, Result
from moe_beyond.simulator.devices import load_device
from moe_beyond.simulator.sequence import ReplaySequence
from moe_beyond.tasks.base import PredictorTask
from moe_beyond.traces.manifest import Manifest

PREFIXES = ("", *(f"{policy}_" for policy in BASELINES))
"""Prefixes of the figures: none for the policy with prefetch, then one per baseline."""
FIGURES = ("hit_rate", "bytes_ratio")
"""Fields of a `Result` that are logged; those of the first budget are on the progress bar."""


class CacheReplay(L.Callback):
    """Replays the sequences of each validation or test under one or more budgets.

    It logs ``hit_rate`` and ``bytes_ratio`` of the policy with prefetch, and of LRU and Belady without prefetch, in one
    section per budget: ``val_budget_10pct/hit_rate``, ``val_budget_10pct/lru_hit_rate``. A `ModelCheckpoint` can
    monitor each figure. With a device it also logs ``tokens_per_second``. The sanity check is skipped. A strategy
    without scores is replayed only at the first validation of a fit, because the sequences stay the same; one line then
    shows its figures.
    Ranks replay the sequences that they validate; their counts are added.

    Args:
        budget: Memory for experts: a share (``10%``), a number of slots (``166``) or memory (``2.9GB``, ``2.7GiB``).
        budgets: Further budgets (default: none).
        policy: Name of the eviction policy (default: ``lru``).
        prefetch: Prefetcher (default: ``top<K>`` with the model's K).
        lookahead: Lookahead of the scores that the prefetcher reads (default: the predictor's first).
        scope: ``global`` for one pool of slots, ``per-layer`` for one pool per layer (default: ``global``).
        warmup_tokens: Number of tokens at the start of a sequence that do not count (default: 0).
        first_layer_prefetch: Whether layers with scores at the start of a token are prefetched then (default: True).
        device: Preset of `moe-beyond devices`, or a JSON file, for the timing model (default: none).

    Attributes:
        results: Results of the last validation or test, per budget: the policy with prefetch, LRU, Belady.
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
        self._scoreless: dict[ReplaySettings, Result] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Resolve budgets and strategies, before the first batch.

        Raises:
            UserError: The predictor does not have the lookahead, or a budget or name is invalid.
        """
        assert isinstance(pl_module, PredictorTask)
        predictor, manifest = pl_module.predictor, pl_module.data.manifest
        lookaheads = predictor.information.lookaheads
        lookahead = lookaheads[0] if self.lookahead is None else self.lookahead
        if lookahead not in lookaheads:
            choices = ", ".join(map(str, lookaheads))
            raise UserError(f"CacheReplay: the predictor has no lookahead {lookahead}; choose one of {choices}")
        bits = manifest.bits
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
            self._strategies += [strategy(common, budget, name) for name in BASELINES]
        self._scoreless = {}
        self._begin(pl_module)

    def _begin(self, task: PredictorTask) -> None:
        geometry = task.predictor.geometry
        self._replays = {
            settings: Replay(geometry, settings) for settings in self._strategies if settings not in self._scoreless
        }

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start new replays."""
        assert isinstance(pl_module, PredictorTask)
        self._begin(pl_module)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start new replays."""
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
        """Replay the sequences of a batch with the probabilities that the step returned."""
        if trainer.sanity_checking:
            return
        scores, experts = outputs.float().cpu().numpy(), batch.experts.cpu().numpy()
        assert isinstance(pl_module, PredictorTask)
        geometry = pl_module.predictor.geometry
        for row, length in enumerate(batch.lengths.tolist()):
            sequence = ReplaySequence(geometry, experts[row, :length], scores[row, :length])
            for replay in self._replays.values():
                replay.add_sequence(sequence)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Replay the sequences of a batch with the probabilities that the step returned."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the figures, before `ModelCheckpoint` reads them."""
        if not trainer.sanity_checking:
            self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the figures."""
        self._log(pl_module, "test")

    def _log(self, task: L.LightningModule, stage: str) -> None:
        assert isinstance(task, PredictorTask)
        if task.data.is_shared(stage):
            self._add_other_ranks()
        first = not self._scoreless
        results = self._scoreless | {settings: replay.result() for settings, replay in self._replays.items()}
        self._scoreless = {settings: result for settings, result in results.items() if settings.predictor is None}
        self.results = [results[settings] for settings in self._strategies]
        if first and stage == "val":
            self._show_baselines(task.data.manifest)
        for names, result in zip(self.names(stage, task.data.manifest), self.results, strict=True):
            for figure, name in names.items():
                value = torch.tensor(getattr(result, figure), device=task.device)
                on_bar = result is self.results[0] and figure in FIGURES
                task.log(name, value, prog_bar=on_bar, sync_dist=True, reduce_fx="max")  # equal on all ranks

    def _show_baselines(self, manifest: Manifest) -> None:
        """Print the figures that stay the same in every epoch, one line per budget."""
        budgets = self._budgets(manifest.geometry, manifest.bits).values()
        for number, budget in enumerate(budgets, 1):
            results = self.results[len(PREFIXES) * (number - 1) + 1 : len(PREFIXES) * number]
            figures = (f"{result.policy} {result.hit_rate:.4f} @ {result.bytes_ratio:.4f}" for result in results)
            rank_zero_info(f"without prefetch at {budget}, hit_rate @ bytes_ratio: {', '.join(figures)}")

    def _add_other_ranks(self) -> None:
        """Add the sequences that the other ranks replayed."""
        rank = rank_and_ranks()[0]
        totals = gather([replay.totals() for replay in self._replays.values()])
        for other in totals[:rank] + totals[rank + 1 :]:
            for replay, of_replay in zip(self._replays.values(), other, strict=True):
                replay.absorb(of_replay)

    def names(self, stage: str, manifest: Manifest) -> list[dict[str, str]]:
        """Return the names of the logged figures.

        Args:
            stage: ``val`` or ``test``.
            manifest: Manifest of the replayed traces.

        Returns:
            For each of `results`, the names by field of `Result`.
        """
        figures = FIGURES if self.device is None else (*FIGURES, "tokens_per_second")
        budgets = self._budgets(manifest.geometry, manifest.bits).values()
        return [
            {figure: of_budget(stage, budget, prefix + figure) for figure in figures}
            for budget in budgets
            for prefix in PREFIXES
        ]

    def _budgets(self, geometry: Geometry, bits: float) -> dict[int, str]:
        """Return the distinct budgets: number of slots -> the first text that means it."""
        budgets: dict[int, str] = {}
        for text in (self.budget, *self.budgets):
            budgets.setdefault(budget_slots(text, geometry, bits), str(text))
        return budgets
