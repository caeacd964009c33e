"""Experts to keep in GPU memory, in the forms that llama.cpp and ktransformers read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_beyond.errors import UserError
from moe_beyond.files import creating

if TYPE_CHECKING:
    from moe_beyond.evaluation.pins import Pins  # imports what a replay needs


@dataclass(frozen=True)
class Placement:
    """What an engine keeps in GPU memory.

    Attributes:
        layers: Model layers with experts in GPU memory -> number of these experts.
        share: Share of the uses that these experts have, 0 to 1.
        usage: Options with which the engine reads the file.
    """

    layers: dict[int, int]
    share: float
    usage: str


@dataclass(frozen=True)
class PinFormat:
    """A form of pins.

    Attributes:
        summary: Content of the file, for help texts.
        write: Function that writes pins to a new file.
    """

    summary: str
    write: Callable[[Pins, str | Path], Placement]


def whole_layers(pins: Pins) -> list[int]:
    """Choose layers whose experts all fit into the memory of the pinned experts, for engines that place whole layers.

    A token uses K experts of every layer, so that every whole layer saves the same. The layers of the smallest experts
    come first; ties are decided by more pinned experts, then by the lower layer.

    Args:
        pins: Experts to pin.

    Returns:
        Model layers, ascending.
    """
    sizes = pins.expert_bytes or [1] * len(pins.layers)
    left = sum(size * len(experts) for size, experts in zip(sizes, pins.layers.values(), strict=True))
    order = sorted(zip(sizes, pins.layers.items(), strict=True), key=lambda item: (item[0], -len(item[1][1])))
    chosen = []
    for size, (layer, _) in order:
        if size * pins.num_experts <= left:
            left -= size * pins.num_experts
            chosen.append(int(layer))
    return sorted(chosen)


def write_llama_cpp(pins: Pins, out: str | Path) -> Placement:
    """Write the value of llama.cpp's option ``--override-tensor``: the experts of all other layers go to host memory.

    The experts of a layer are one tensor per matrix, such as ``blk.3.ffn_up_exps.weight``, so a layer's experts are
    placed together. The pattern is that of ``--n-cpu-moe`` for a choice of layers (llama.cpp: ``LLM_FFN_EXPS_REGEX`` in
    common/common.h). It is searched in the names of all tensors (src/llama-model-loader.cpp).

    Args:
        pins: Experts to pin.
        out: Path of the new file.

    Raises:
        UserError: All layers fit, or the file exists.
    """
    chosen = whole_layers(pins)
    others = [layer for layer in pins.layers if int(layer) not in chosen]
    if not others:
        raise UserError(f"{out}: all experts of {pins.model} are pinned; run llama.cpp without an override")
    pattern = rf"blk\.({'|'.join(others)})\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"
    with creating(out) as temporary:
        temporary.write_text(pattern + "\n", encoding="utf-8")
    return _of_whole_layers(pins, chosen, f'--gpu-layers 999 --override-tensor "$(cat {out})"')


def write_ktransformers(pins: Pins, out: str | Path) -> Placement:
    """Write activation counts for ktransformers' expert placement by frequency (kt-kernel in SGLang).

    The engine keeps the experts with the highest counts of all layers (``_init_kt_gpu_experts_masks`` in
    python/sglang/srt/layers/moe/kt_ep_wrapper.py of kvcache-ai/sglang). It reads ``logical_count``, a tensor
    ``(1, layers, E)`` with a row for every layer of the model, dense ones too. In each layer, the most used of the
    pinned experts counts E, the next one E - 1, and so on. All other experts count 0.

    Args:
        pins: Experts to pin.
        out: Path of the new file, which ends with ``.pt``.

    Raises:
        UserError: The name does not end with ``.pt``, or the file exists.
    """
    import torch  # here, because help texts need no torch

    if Path(out).suffix != ".pt":
        raise UserError(f"{out}: ktransformers reads activation counts from a .pt file; choose such a name")
    counts = torch.zeros(1, 1 + max(map(int, pins.layers)), pins.num_experts, dtype=torch.int32)
    for layer, experts in pins.layers.items():
        for place, expert in enumerate(experts):
            counts[0, int(layer), expert] = pins.num_experts - place
    with creating(out) as temporary:
        torch.save({"logical_count": counts}, temporary)
    # The engine rounds ratio * experts down, so that half an expert more gives the number exactly.
    ratio = (pins.experts + 0.5) / (len(pins.layers) * pins.num_experts)
    return Placement(
        {int(layer): len(experts) for layer, experts in pins.layers.items() if experts},
        pins.uses_share,
        f"--kt-expert-placement-strategy frequency --init-expert-location {out} "
        f"--kt-gpu-experts-ratio {min(ratio, 1.0):.9f}",
    )


def write_ktransformers_rules(pins: Pins, out: str | Path) -> Placement:
    """Write injection rules of ktransformers before kt-kernel, which placed whole layers.

    The first rule that matches a module is applied (``gen_optimize_config`` in ktransformers/optimize/optimize.py), so
    the rule must come before that of all experts. Its operator and device are those of doc/en/FAQ.md.

    Args:
        pins: Experts to pin.
        out: Path of the new file.

    Raises:
        UserError: No whole layer fits, or the file exists.
    """
    chosen = whole_layers(pins)
    if not chosen:
        raise UserError(
            f"{out}: the rule places whole layers, and {pins.experts} pinned experts are fewer than one layer's "
            f"{pins.num_experts}; plan a larger budget, or export --to ktransformers"
        )
    # A string of JSON is one of YAML, too.
    name = json.dumps(rf"^model\.layers\.({'|'.join(map(str, chosen))})\.[^.]+\.experts$")
    rule = f"""- match:
    name: {name}
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs:
      generate_device: "cuda:0"
      generate_op: "KExpertsMarlin"
  recursive: False
"""
    with creating(out) as temporary:
        temporary.write_text(rule, encoding="utf-8")
    return _of_whole_layers(pins, chosen, f"put {out} before the other rules of --optimize_config_path")


def _of_whole_layers(pins: Pins, chosen: list[int], usage: str) -> Placement:
    return Placement(dict.fromkeys(chosen, pins.num_experts), len(chosen) / len(pins.layers), usage)


PIN_FORMATS = {
    "llama.cpp": PinFormat("value of --override-tensor, for whole layers", write_llama_cpp),
    "ktransformers": PinFormat("activation counts (.pt) for kt-kernel, expert by expert", write_ktransformers),
    "ktransformers-rules": PinFormat(
        "YAML injection rule of older versions, for whole layers", write_ktransformers_rules
    ),
}
"""Engine, as ``--to`` names it -> form of its pins."""
