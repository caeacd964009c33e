"""Lightning callbacks, one a file."""

from moe_beyond.callbacks.export import ExportBest
from moe_beyond.callbacks.push import PushBest
from moe_beyond.callbacks.replay import CacheReplay
from moe_beyond.callbacks.scores import WriteScores

__all__ = ["CacheReplay", "ExportBest", "PushBest", "WriteScores"]
