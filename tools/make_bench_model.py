"""Make a DeepSeek-V2 model with random weights, whose routing can be forced from a trace set.

    python tools/make_bench_model.py --data TRACE_SET --out DIR [--seed 0]

The trace set determines the MoE layers, experts, top K, vocabulary and tokenizer. All widths are half of those of
DeepSeek-V2-Lite by default: with its routing, 1,664 experts of 4.3 MB. Weights are bfloat16 under the names of the
original checkpoints, one safetensors file per layer. The tool keeps one layer in memory.
"""

import argparse
import shutil
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV2Config

from moe_beyond.errors import UserError
from moe_beyond.files import replacing_folder, write_json
from moe_beyond.geometry import Geometry
from moe_beyond.traces.manifest import TOKENIZER_FILE, Manifest
from moe_beyond.traces.reader import TraceSet

HEAD = 64
"""Width of an attention head without its rotary part."""


def main() -> None:
    """Parse the options, and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="trace set")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    parser.add_argument("--hidden-size", type=int, default=1024, help="width of the model (default: 1024)")
    parser.add_argument("--expert-width", type=int, default=704, help="width of an expert (default: 704)")
    args = parser.parse_args()
    began = time.perf_counter()
    traces = TraceSet(args.data)
    config = model_config(traces.manifest, args.hidden_size, args.expert_width)
    with replacing_folder(args.out) as folder:
        write_model(folder, config, torch.Generator().manual_seed(args.seed), Path(args.data) / TOKENIZER_FILE)
    params = traces.geometry.total_experts * 3 * args.hidden_size * args.expert_width
    Console(width=120).print(
        f"{args.out}: {traces.geometry.total_experts:,} experts, {params * 2 / 1e9:.2f} GB, "
        f"in {time.perf_counter() - began:.0f} s"
    )


def model_config(manifest: Manifest, hidden_size: int, expert_width: int) -> DeepseekV2Config:
    """Return the configuration of a model with the routing of a trace set.

    Args:
        manifest: Manifest of the trace set.
        hidden_size: Width of the model, a multiple of `HEAD`.
        expert_width: Width of an expert.

    Raises:
        UserError: The MoE layers are not the last layers, or the width is no multiple of `HEAD`.
    """
    geometry: Geometry = manifest.geometry
    first, last = geometry.moe_layers[0], geometry.moe_layers[-1]
    if geometry.moe_layers != tuple(range(first, last + 1)):
        raise UserError(f"--data: DeepSeek-V2 has MoE layers without gaps (got {geometry.moe_layers}); use another set")
    if hidden_size % HEAD:
        raise UserError(f"--hidden-size must be a multiple of {HEAD} (got {hidden_size})")
    return DeepseekV2Config(
        architectures=["DeepseekV2ForCausalLM"],
        dtype="bfloat16",
        vocab_size=manifest.tokenizer.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=8 * expert_width,
        moe_intermediate_size=expert_width,
        num_hidden_layers=last + 1,
        first_k_dense_replace=first,
        n_routed_experts=geometry.num_experts,
        num_experts_per_tok=geometry.top_k,
        n_shared_experts=2,
        num_attention_heads=hidden_size // HEAD,
        q_lora_rank=None,
        kv_lora_rank=hidden_size // 4,
        qk_nope_head_dim=HEAD,
        qk_rope_head_dim=HEAD // 2,
        v_head_dim=HEAD,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )


def write_model(
    folder: Path, config: DeepseekV2Config, generator: torch.Generator, tokenizer: Path | None = None
) -> None:
    """Write a model with random weights.

    Args:
        folder: Empty folder for the model.
        config: Configuration of the model.
        generator: Source of the weights, on the device that draws them.
        tokenizer: Tokenizer to copy, if the file exists (default: one with a word per id).
    """
    config.save_pretrained(folder)
    with torch.device(generator.device):
        write_weights(folder, config, generator)
    if tokenizer is not None and tokenizer.is_file():
        shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)
    else:  # a model cannot be loaded without one
        words = {f"<{number}>": number for number in range(config.vocab_size)}
        Tokenizer(WordLevel(words, unk_token="<0>")).save(str(folder / TOKENIZER_FILE))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_weights(folder: Path, config: DeepseekV2Config, generator: torch.Generator) -> None:
    """Write all weights and their index.

    Args:
        folder: Folder of the model.
        config: Configuration of the model.
        generator: Source of the weights.
    """
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    files = [list(names) for _, names in groupby(parameters, key=layer_of)]
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {
            stored: random_weight(shape, config, generator)
            for name in names
            for stored, shape in checkpoint_names(name, parameters[name].shape)
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def layer_of(name: str) -> str:
    """Return the number of the layer that a parameter belongs to, or the empty string."""
    return name.partition("layers.")[2].partition(".")[0]


def checkpoint_names(name: str, shape: torch.Size) -> Iterator[tuple[str, torch.Size]]:
    """Yield names and shapes of a parameter in a checkpoint, which stores every expert on its own.

    Args:
        name: Name of the parameter in the model.
        shape: Shape of the parameter.
    """
    module, _, fused = name.rpartition(".experts.")
    if not module:
        yield name, shape
        return
    experts, rows, columns = shape
    matrices = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
    for expert in range(experts):
        for matrix in matrices:
            yield f"{module}.experts.{expert}.{matrix}.weight", torch.Size((rows // len(matrices), columns))


def random_weight(shape: torch.Size, config: DeepseekV2Config, generator: torch.Generator) -> Tensor:
    """Return a random matrix; ones for the vector of a norm."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=config.initializer_range, generator=generator)


if __name__ == "__main__":
    main()
