"""Lightning callbacks, one a file."""

from moe_beyond.callbacks.cache_replay import CacheReplay
from moe_beyond.callbacks.export import ExportBest
from moe_beyond.callbacks.interrupt import SaveOnInterrupt
from moe_beyond.callbacks.push import PushBest
from moe_beyond.callbacks.wandb import TrackWandb
from moe_beyond.callbacks.write_scores import WriteScores

__all__ = ["CacheReplay", "ExportBest", "PushBest", "SaveOnInterrupt", "TrackWandb", "WriteScores"]
