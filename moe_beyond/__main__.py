"""``python -m moe_beyond`` is ``moe-beyond``."""

from moe_beyond.cli.main import console

console()
