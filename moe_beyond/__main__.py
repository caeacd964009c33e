"""``python -m moe_beyond`` is ``moe-beyond``."""

import sys

from moe_beyond.cli.main import main

sys.exit(main())
