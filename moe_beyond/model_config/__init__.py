"""Reading the geometry of an MoE from a Hugging Face ``config.json``, without transformers.

Every architecture has its own fields for the layers with experts, their number, their width and their matrices; some
of it is only in the architecture's code. `FAMILIES` describes how each architecture reads its fields, as transformers 5
builds the modules; a test compares both for all of them. A field whose name suggests an effect on experts is refused
by name, unless the architecture is known to read or ignore it.
"""

from moe_beyond.model_config.fields import MOST_LAYERS
from moe_beyond.model_config.mixture import MOST_EXPERTS, Mixture, read_mixture

__all__ = ["MOST_EXPERTS", "MOST_LAYERS", "Mixture", "read_mixture"]
