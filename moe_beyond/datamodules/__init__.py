"""The LightningDataModule that streams trace sets, and the plan of its batches."""

from moe_beyond.datamodules.batch_plan import BatchingSettings, Segment, plan_batches
from moe_beyond.datamodules.traces import TraceDataModule, whole_sequences

__all__ = ["BatchingSettings", "Segment", "TraceDataModule", "plan_batches", "whole_sequences"]
