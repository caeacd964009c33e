"""Replaying traces through the cache core, on a device's clock, and the record of what came of it."""

from moe_beyond.replay.replay import Replay
from moe_beyond.replay.result import Result
from moe_beyond.replay.settings import ReplaySettings

__all__ = ["Replay", "ReplaySettings", "Result"]
