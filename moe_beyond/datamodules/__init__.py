"""LightningDataModules that stream trace sets."""

from moe_beyond.datamodules.traces import TraceDataModule

__all__ = ["TraceDataModule"]
