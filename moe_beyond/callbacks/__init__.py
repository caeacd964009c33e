"""Lightning callbacks, one per file."""

from moe_beyond.callbacks.cache_replay import CacheReplay
from moe_beyond.callbacks.epoch_summary import EpochSummary
from moe_beyond.callbacks.export import ExportBest
from moe_beyond.callbacks.interrupt import SaveOnInterrupt
from moe_beyond.callbacks.push import PushBest
from moe_beyond.callbacks.save_config import SaveConfig
from moe_beyond.callbacks.wandb import TrackWandb
from moe_beyond.callbacks.write_scores import WriteScores

__all__ = [
    "CacheReplay",
    "EpochSummary",
    "ExportBest",
    "PushBest",
    "SaveConfig",
    "SaveOnInterrupt",
    "TrackWandb",
    "WriteScores",
]
