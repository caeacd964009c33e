"""Lightning callbacks, one a file."""

from moe_beyond.callbacks.export import ExportBest
from moe_beyond.callbacks.interrupt import SaveOnInterrupt
from moe_beyond.callbacks.push import PushBest
from moe_beyond.callbacks.replay import CacheReplay
from moe_beyond.callbacks.scores import WriteScores
from moe_beyond.callbacks.tracking import TrackWandb

__all__ = ["CacheReplay", "ExportBest", "PushBest", "SaveOnInterrupt", "TrackWandb", "WriteScores"]
