"""Replaying traces through the cache core, on a device's clock, and the record of what came of it."""

from moe_beyond.simulator.replay import Replay
from moe_beyond.simulator.result import Result
from moe_beyond.simulator.settings import ReplaySettings

__all__ = ["Replay", "ReplaySettings", "Result"]
