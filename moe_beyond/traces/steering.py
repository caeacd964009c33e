"""Which experts a model was made to use, or not to use, while its routing was recorded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_beyond.errors import UserError, unknown
from moe_beyond.files import read_json
from moe_beyond.geometry import Geometry

SHOWN = 60
"""Characters of what cannot be read that a message shows."""

Expert = tuple[int, int]
"""A layer's index in the model, and an expert of it."""


@dataclass(frozen=True)
class Steering:
    """Experts that are forced, of every token, as SteerMoE does (arXiv 2509.09660).

    Attributes:
        on: Those that every token is routed to, ascending.
        off: Those that no token is routed to, ascending.
    """

    on: tuple[Expert, ...] = ()
    off: tuple[Expert, ...] = ()

    def __str__(self) -> str:
        """Say how many there are: ``3 experts on, 2 off``."""
        words = [f"{len(experts):,} {word}" for experts, word in ((self.on, "on"), (self.off, "off")) if experts]
        first, _, word = words[0].partition(" ")
        return ", ".join([f"{first} expert{'' if first == '1' else 's'} {word}", *words[1:]])

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it names, ascending."""
        return tuple(sorted({layer for layer, _ in (*self.on, *self.off)}))

    def of_layer(self, layer: int) -> tuple[list[int], list[int]]:
        """Return the experts of a layer that are on, and those that are off."""
        on, off = ([expert for at, expert in experts if at == layer] for experts in (self.on, self.off))
        return on, off

    def to_json(self) -> dict[str, list[list[int]]]:
        """Return the plain dictionary that `from_json` reads."""
        return {"on": [list(one) for one in self.on], "off": [list(one) for one in self.off]}

    @classmethod
    def from_json(cls, content: Any, *, source: str) -> "Steering":
        """Read ``{"on": [[layer, expert], ...], "off": [[layer, expert], ...]}``; either may be left out.

        Args:
            content: The dictionary.
            source: Where it came from, for error messages.

        Raises:
            UserError: It is something else, names no expert, or names one as on and off.
        """
        if not isinstance(content, Mapping):
            raise UserError(f'{source}: is no object {{"on": [[layer, expert], ...], "off": [[layer, expert], ...]}}')
        for key in content:
            if key not in ("on", "off"):
                raise UserError(f"{source}: {unknown('key', key, ('on', 'off'))}")
        on, off = (_experts(content.get(key, []), key, source) for key in ("on", "off"))
        if both := sorted(on & off):
            raise UserError(f"{source}: expert {both[0][1]} of layer {both[0][0]} is both on and off; choose one")
        if not on | off:
            raise UserError(f"{source}: names no expert; leave it out, or name one")
        return cls(tuple(sorted(on)), tuple(sorted(off)))

    def check_fits(self, geometry: Geometry, source: str = "--steer") -> None:
        """Refuse what a model of this shape cannot do.

        Args:
            geometry: The shape.
            source: Path or name of the steering, for error messages.

        Raises:
            UserError: It has no such layer or expert, routes to fewer than are on, or is left too few.
        """
        layers = geometry.moe_layers
        for layer, expert in (*self.on, *self.off):
            if layer not in layers:
                known = ", ".join(map(str, layers))
                raise UserError(f"{source}: layer {layer} of {geometry.model} holds no experts; those that do: {known}")
            if expert >= geometry.num_experts:
                raise UserError(
                    f"{source}: layer {layer} of {geometry.model} has no expert {expert}; its experts are "
                    f"0 to {geometry.num_experts - 1}"
                )
        for layer in self.layers:
            on, off = self.of_layer(layer)
            if len(on) > geometry.top_k:
                raise UserError(
                    f"{source}: {len(on)} experts of layer {layer} are on, and a token is routed to {geometry.top_k}; "
                    f"leave {geometry.top_k} or fewer"
                )
            if (left := geometry.num_experts - len(off)) < geometry.top_k:
                raise UserError(
                    f"{source}: {left} of the {geometry.num_experts} experts of layer {layer} are left, and a token is "
                    f"routed to {geometry.top_k}; turn fewer off"
                )

    def check_obeyed(self, experts: npt.NDArray[np.integer[Any]], geometry: Geometry) -> None:
        """Refuse a recording that does not show it.

        Args:
            experts: ``(T, L, K)`` ids.
            geometry: Which layers they are of.

        Raises:
            UserError: A token was not routed to an expert that is on, or was routed to one that is off.
        """
        named = [(*one, "on", "do without it") for one in self.on] + [(*one, "off", "use it") for one in self.off]
        for layer, expert, forced, wrongly in named:
            used = (experts[:, geometry.moe_layers.index(layer)] == expert).any(-1)
            if wrong := int((used != (forced == "on")).sum()):
                raise UserError(
                    f"--steer: expert {expert} of layer {layer} was forced {forced}, and {wrong:,} of {len(used):,} "
                    f"tokens {wrongly} all the same; the router of {geometry.model} cannot be steered so"
                )


def read_steering(path: str | Path) -> Steering:
    """Read a steering from a JSON file.

    Raises:
        UserError: It cannot be read, or is none.
    """
    return Steering.from_json(read_json(path), source=str(path))


def _experts(content: Any, key: str, source: str) -> set[Expert]:
    wanted = "an expert is a pair of whole numbers, [layer, expert]"
    if not isinstance(content, list):
        raise UserError(f"{source}: {key!r} is no list: {json.dumps(content)[:SHOWN]}; {wanted}")
    for one in content:
        if not (isinstance(one, list) and len(one) == 2 and all(type(number) is int and number >= 0 for number in one)):
            raise UserError(f"{source}: {key!r} holds {json.dumps(one)[:SHOWN]}; {wanted}")
    return {(layer, expert) for layer, expert in content}
