"""Steering: experts that are forced on or off while a model is recorded."""

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

SHOWN_CHARACTERS = 60
"""Characters of an invalid value that an error message shows."""

Expert = tuple[int, int]
"""Index of the layer in the model, and expert id."""


@dataclass(frozen=True)
class Steering:
    """Experts that are forced on or off for every token, as in SteerMoE (arXiv 2509.09660).

    Attributes:
        on: Experts to which every token is routed, ascending.
        off: Experts to which no token is routed, ascending.
    """

    on: tuple[Expert, ...] = ()
    off: tuple[Expert, ...] = ()

    def __str__(self) -> str:
        """Return the numbers of experts: ``3 experts on, 2 off``."""
        first, *others = [(len(experts), word) for experts, word in ((self.on, "on"), (self.off, "off")) if experts]
        experts = f"{first[0]:,} expert{'' if first[0] == 1 else 's'} {first[1]}"
        return ", ".join([experts, *(f"{count:,} {word}" for count, word in others)])

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with forced experts, ascending."""
        return tuple(sorted({layer for layer, _ in (*self.on, *self.off)}))

    def of_layer(self, layer: int) -> tuple[list[int], list[int]]:
        """Return the experts of a layer that are forced on, and those that are forced off.

        Args:
            layer: Index of the layer in the model.
        """
        on, off = ([expert for at, expert in experts if at == layer] for experts in (self.on, self.off))
        return on, off

    def to_json(self) -> dict[str, list[list[int]]]:
        """Return the plain dictionary that `from_json` reads."""
        return {"on": [list(expert) for expert in self.on], "off": [list(expert) for expert in self.off]}

    @classmethod
    def from_json(cls, content: Any, *, source: str) -> "Steering":
        """Parse ``{"on": [[layer, expert], ...], "off": [[layer, expert], ...]}``; one key may be missing.

        Args:
            content: Dictionary of that form.
            source: Path of the dictionary, for error messages.

        Raises:
            UserError: It has another form, has no expert, or forces one expert both on and off.
        """
        if not isinstance(content, Mapping):
            raise UserError(
                f'{source}: must be an object {{"on": [[layer, expert], ...], "off": [[layer, expert], ...]}}'
            )
        for key in content:
            if key not in ("on", "off"):
                raise UserError(f"{source}: {unknown('key', key, ('on', 'off'))}")
        on, off = (_experts(content.get(key, []), key, source) for key in ("on", "off"))
        if both := sorted(on & off):
            raise UserError(f"{source}: expert {both[0][1]} of layer {both[0][0]} is both on and off; choose one")
        if not on | off:
            raise UserError(f"{source}: has no expert; add one, or remove the steering")
        return cls(tuple(sorted(on)), tuple(sorted(off)))

    def check_fits(self, geometry: Geometry, source: str = "--steer") -> None:
        """Check that a model of a given shape can be steered like this.

        Args:
            geometry: Shape of the model.
            source: Path or name of the steering, for error messages.

        Raises:
            UserError: The model lacks a layer or an expert, or a layer has too many experts forced on or off.
        """
        layers = geometry.moe_layers
        for layer, expert in (*self.on, *self.off):
            if layer not in layers:
                choices = ", ".join(map(str, layers))
                raise UserError(f"{source}: layer {layer} of {geometry.model} has no experts; choose from {choices}")
            if expert >= geometry.num_experts:
                raise UserError(
                    f"{source}: layer {layer} of {geometry.model} has no expert {expert}; choose from "
                    f"0..{geometry.num_experts - 1}"
                )
        for layer in self.layers:
            on, off = self.of_layer(layer)
            if len(on) > geometry.top_k:
                raise UserError(
                    f"{source}: {len(on)} experts of layer {layer} are on, but a token is routed to {geometry.top_k}; "
                    f"force at most {geometry.top_k} on"
                )
            if (remaining := geometry.num_experts - len(off)) < geometry.top_k:
                raise UserError(
                    f"{source}: {remaining} of the {geometry.num_experts} experts of layer {layer} remain, but a token "
                    f"is routed to {geometry.top_k}; force fewer off"
                )

    def check_obeyed(self, experts: npt.NDArray[np.integer[Any]], geometry: Geometry) -> None:
        """Check that a recording follows the steering.

        Args:
            experts: ``(T, L, K)`` expert ids of the recording.
            geometry: Shape of the model.

        Raises:
            UserError: A token was not routed to an expert that is on, or was routed to one that is off.
        """
        forced = [(*expert, "on", "do not use it") for expert in self.on]
        forced += [(*expert, "off", "use it") for expert in self.off]
        for layer, expert, state, violation in forced:
            used = (experts[:, geometry.moe_layers.index(layer)] == expert).any(-1)
            if violations := int((used != (state == "on")).sum()):
                raise UserError(
                    f"--steer: expert {expert} of layer {layer} was forced {state}, but {violations:,} of "
                    f"{len(used):,} tokens {violation}; the router of {geometry.model} cannot be steered like this"
                )


def read_steering(path: str | Path) -> Steering:
    """Read a steering from a JSON file.

    Args:
        path: Path of the file.

    Raises:
        UserError: The file cannot be read, or is not a steering.
    """
    return Steering.from_json(read_json(path), source=str(path))


def _experts(content: Any, key: str, source: str) -> set[Expert]:
    rule = "an expert is a pair of whole numbers, [layer, expert]"
    if not isinstance(content, list):
        raise UserError(f"{source}: {key!r} must be a list (got {json.dumps(content)[:SHOWN_CHARACTERS]}); {rule}")
    for pair in content:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)):
            raise UserError(f"{source}: {key!r} holds {json.dumps(pair)[:SHOWN_CHARACTERS]}; {rule}")
    return {(layer, expert) for layer, expert in content}
