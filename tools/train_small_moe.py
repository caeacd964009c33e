"""Train the small mixture of experts that the package ships, from text to card.

    python tools/train_small_moe.py --text DOCS --text SOURCE --work WORK --out checkpoints/small-moe

Whole text files are held out: one in twenty, selected by the hash of its name, is never trained on. The bundled
prompts come from these files. The optimiser's state is saved in WORK, and the same command resumes an interrupted
training.
"""

import argparse
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedTokenizerFast

from moe_beyond.files import replacing_folder

SUFFIXES = (".txt", ".rst", ".py")
HELD_OUT_ONE_IN = 20
SPECIAL = ("<s>", "</s>", "<pad>")
CONTEXT = 128
PROMPT_TOKENS = 200
TEXT_LICENCE = "TEXT-LICENSE.txt"
# A weak balancing loss: all experts stay in use but remain specialised (1e-2 is the usual strength).
BALANCE = 3e-3


def read_files(roots: list[Path]) -> dict[str, str]:
    """Read every text file under the roots, by name relative to its root."""
    files: dict[str, str] = {}
    for root in roots:
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix in SUFFIXES:
                text = path.read_text(encoding="utf-8", errors="replace")
                if len(text) > 500:
                    files[f"{root.name}/{path.relative_to(root)}"] = text
    if not files:
        raise SystemExit(f"no {', '.join(SUFFIXES)} file of 500 characters under {', '.join(map(str, roots))}")
    return files


def is_held_out(name: str) -> bool:
    """Check whether a file is held out."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer that puts ``<s>`` before a text."""
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def pack(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Encode texts one after another into rows ``(N, CONTEXT)`` int64, each text ended by ``</s>``."""
    ids = [i for encoding in tokenizer.encode_batch(texts) for i in [*encoding.ids, 1]]
    rows = len(ids) // CONTEXT
    return torch.tensor(ids[: rows * CONTEXT]).view(rows, CONTEXT)


def build(vocab_size: int, tiny: bool) -> DeepseekV2ForCausalLM:
    """Build the untrained model: one dense layer, then MoE layers with one shared expert each."""
    size: dict[str, int] = (
        {"hidden_size": 32, "num_hidden_layers": 3, "n_routed_experts": 4, "num_experts_per_tok": 2}
        if tiny
        else {"hidden_size": 128, "num_hidden_layers": 9, "n_routed_experts": 24, "num_experts_per_tok": 3}
    )
    config = DeepseekV2Config(
        vocab_size=vocab_size,
        intermediate_size=3 * size["hidden_size"],
        moe_intermediate_size=size["hidden_size"] // 2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **size,
    )
    model = DeepseekV2ForCausalLM(config)
    for router in routers(model).values():  # transformers starts routers at zero, where every expert ties
        nn.init.normal_(router.weight, std=0.02)
    return model


def routers(model: nn.Module) -> dict[str, Any]:
    """Find the routers by name."""
    return {name: module for name, module in model.named_modules() if type(module).__name__.endswith("TopkRouter")}


def balance_loss(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return Switch Transformer's balancing loss (arXiv 2101.03961, eq. 4): E * sum of share chosen x mean probability.

    Args:
        logits: ``(N, E)`` router logits.
        chosen: ``(N, K)`` int64 experts.
    """
    experts = logits.shape[-1]
    share = torch.bincount(chosen.reshape(-1), minlength=experts) / chosen.numel()
    return experts * (share * logits.softmax(-1).mean(0)).sum()


class RouterTap:
    """Keeps the outputs of all routers in the last forward pass: ``{name: (logits (N, E), chosen (N, K))}``."""

    def __init__(self, model: nn.Module) -> None:
        """Hook the model's routers."""
        self.last: dict[str, tuple[Tensor, Tensor]] = {}
        for name, router in routers(model).items():
            router.register_forward_hook(lambda _m, _a, out, name=name: self.last.update({name: (out[0], out[2])}))


def held_out_loss(model: nn.Module, rows: Tensor) -> float:
    """Mean cross-entropy in nats per token over ``rows``."""
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() for part in rows.split(32)]
    model.train()
    return float(np.mean(losses))


def train(model: DeepseekV2ForCausalLM, rows: Tensor, held: Tensor, args: argparse.Namespace, work: Path) -> None:
    """Train for ``args.steps`` steps; a second call resumes from the checkpoint in ``work``."""
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warmup = max(1, args.steps // 20)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / args.steps)))

    first, state = 0, work / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        print(f"resumed at step {first}", flush=True)
    tap, began = RouterTap(model), time.time()
    for step in range(first, args.steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        batch = rows[torch.randint(len(rows), (args.batch,), generator=generator)]
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate(step)
        loss = model(input_ids=batch, labels=batch).loss
        balance = torch.stack([balance_loss(*seen) for seen in tap.last.values()]).sum()
        (loss + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % 20 == 0 or done == args.steps:
            speed = (done - first) * batch.numel() / (time.time() - began)
            print(
                f"step {done}/{args.steps} loss {loss.item():.3f} "
                f"balance {balance.item() / len(tap.last):.3f} {speed:.0f} tokens/s",
                flush=True,
            )
        if done % 100 == 0 or done == args.steps:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            torch.save(saved, work / "state.tmp")
            (work / "state.tmp").replace(state)
            print(f"held-out loss {held_out_loss(model, held[:64]):.3f}", flush=True)


def measure(model: DeepseekV2ForCausalLM, held: Tensor, args: argparse.Namespace, params: int) -> dict[str, Any]:
    """Measure the finished model on held-out rows: perplexity, and use and skew of each layer's experts."""
    tap, config = RouterTap(model), model.config
    counts = np.zeros((len(tap.last) or len(routers(model)), config.n_routed_experts), np.int64)
    shared = np.zeros(len(counts))
    losses = []
    model.eval()
    with torch.no_grad():
        for part in held.split(32):
            losses.append(model(input_ids=part, labels=part).loss.item())
            for layer, (_, chosen) in enumerate(tap.last.values()):
                counts[layer] += np.bincount(chosen.flatten().numpy(), minlength=counts.shape[1])
                rows = chosen.view(len(part), CONTEXT, -1)
                shared[layer] += (rows[:, 1:, :, None] == rows[:, :-1, None, :]).sum().item()
    share = counts / counts.sum(1, keepdims=True)
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(1) / math.log(counts.shape[1])
    pairs = held.shape[0] * (CONTEXT - 1) * config.num_experts_per_tok
    return {
        "parameters": params,
        "tokens_trained_on": args.steps * args.batch * CONTEXT,
        "held_out_tokens": held.numel(),
        "held_out_perplexity": round(math.exp(float(np.mean(losses))), 2),
        "unused_experts": int((counts == 0).sum()),
        "by_layer": [
            {
                "layer": layer + 1,
                "busiest_share": round(float(share[layer].max()), 4),
                "least_share": round(float(share[layer].min()), 4),
                "normalized_entropy": round(float(entropy[layer]), 4),
                "token_to_token_reuse": round(float(shared[layer] / pairs), 4),
            }
            for layer in range(len(counts))
        ],
    }


def choose_prompts(files: dict[str, str], tokenizer: Tokenizer, count: int) -> list[dict[str, str]]:
    """Cut prompts of about `PROMPT_TOKENS` tokens out of held-out files, evenly, each starting at a line."""
    held = [name for name in files if is_held_out(name)]
    prompts: list[dict[str, str]] = []
    for turn in range(count):
        name = held[turn % len(held)]
        lines = files[name].splitlines(keepends=True)
        start = (turn // len(held) + 1) * len(lines) // (2 + count // len(held))
        text = "".join(lines[start : start + 60])
        ids = tokenizer.encode(text).ids[1 : PROMPT_TOKENS + 1]
        if len(ids) >= PROMPT_TOKENS // 2:
            prompts.append({"id": f"{len(prompts):03d}", "source": name, "text": tokenizer.decode(ids)})
    return prompts[:count]


def card(measured: dict[str, Any], args: argparse.Namespace) -> str:
    """Write the model card."""
    rows = "\n".join(
        f"| {r['layer']} | {r['busiest_share']:.1%} | {r['least_share']:.1%} | {r['normalized_entropy']:.3f} "
        f"| {r['token_to_token_reuse']:.1%} |"
        for r in measured["by_layer"]
    )
    return f"""---
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
tags: [moe, deepseek_v2, routing]
language: [en]
---

# small-moe

A mixture-of-experts language model of {measured["parameters"] / 1e6:.1f} M parameters, small enough to ship inside
`moe_beyond`. Its routing uses all experts, so it can demonstrate an expert cache and a predictor. It uses transformers'
DeepSeek-V2 architecture: one dense layer, then MoE layers with one shared expert and top-k routing without groups.

## Data

{args.data_note}
The text keeps its own licence (`{TEXT_LICENCE}`), and so do the excerpts in `prompts.jsonl`.
One file in {HELD_OUT_ONE_IN}, selected by the hash of its name, was never trained on.
`prompts.jsonl` (excerpts with their file names) comes only from those files.

## Recipe

```
python tools/train_small_moe.py --text DOCS --text SOURCE --work WORK --out checkpoints/small-moe \\
    --data-note "..." --text-licence LICENSE.txt \\
    --steps {args.steps} --batch {args.batch} --lr {args.lr} --seed {args.seed} --vocab {args.vocab}
```

{measured["tokens_trained_on"]:,} tokens in rows of {CONTEXT}. AdamW, weight decay 0.1, cosine to 5 % after a warm-up of
5 % of the steps. Switch Transformer's balancing loss at {BALANCE}. Stored as float16.

## Figures

On {measured["held_out_tokens"]:,} held-out tokens: perplexity {measured["held_out_perplexity"]} (over its own
{args.vocab}-token vocabulary), {measured["unused_experts"]} unused experts. By layer:

| layer | busiest expert | least used | entropy (1 = uniform) | token-to-token reuse |
|---|---|---|---|---|
{rows}

## Use and limits

For demonstrations and tests of routing, caching and prediction. Its text is poor and unreliable, and its routing does
not represent that of a large model.
"""


def main() -> None:
    """Parse the options, train, measure and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, action="append", required=True, help="folder of text files (repeatable)")
    parser.add_argument("--data-note", default="", help="sentence of the card that names the text and its licence")
    parser.add_argument("--text-licence", type=Path, help="licence of the text, shipped with the prompts cut from it")
    parser.add_argument("--work", type=Path, required=True, help="folder for the training state")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32, help=f"rows of {CONTEXT} tokens per step (default: 32)")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--tiny", action="store_true", help="tiny model for tests")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)

    files = read_files(args.text)
    training = [text for name, text in files.items() if not is_held_out(name)]
    held_out = [text for name, text in files.items() if is_held_out(name)]
    if not held_out:
        raise SystemExit("no file is held out; give more text files")
    saved_tokenizer = args.work / "tokenizer.json"
    if not saved_tokenizer.exists():
        train_tokenizer(iter(training), args.vocab).save(str(saved_tokenizer))
    tokenizer = Tokenizer.from_file(str(saved_tokenizer))
    rows, held = pack(tokenizer, training), pack(tokenizer, held_out)
    print(f"{len(files)} files, {rows.numel():,} training tokens, {held.numel():,} held-out tokens", flush=True)

    model = build(tokenizer.get_vocab_size(), args.tiny)
    params = sum(p.numel() for p in model.parameters())
    print(f"{params:,} parameters", flush=True)
    held = held[torch.randperm(len(held), generator=torch.Generator().manual_seed(0))]
    train(model, rows, held, args, args.work)
    measured = measure(model.half().float(), held[:512], args, params)

    with replacing_folder(args.out, overwrite=True) as folder:
        model.half().save_pretrained(folder)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
        fast.save_pretrained(folder)
        lines = (json.dumps(prompt) for prompt in choose_prompts(files, tokenizer, args.prompts))
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        if args.text_licence:
            shutil.copyfile(args.text_licence, folder / TEXT_LICENCE)
        (folder / "README.md").write_text(card(measured, args))
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
