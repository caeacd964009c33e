"""The mixture of experts that a Hugging Face ``config.json`` describes, read without transformers.

Which layers hold experts, how many, how wide and of how many matrices is written differently in every architecture, and
partly not written at all: it is in the architecture's code. `FAMILIES` says what the code of each architecture does
with the fields, as transformers 5 builds the modules; a test compares both for all of them. A field that looks as if it
changed one of these, and that the architecture is not known to read, is refused by name.
"""

from moe_beyond.model_config.fields import MOST_LAYERS
from moe_beyond.model_config.mixture import MOST_EXPERTS, Mixture, read_mixture

__all__ = ["MOST_EXPERTS", "MOST_LAYERS", "Mixture", "read_mixture"]
