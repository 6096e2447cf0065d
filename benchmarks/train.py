"""One training step, ours against a plain implementation of the papers': tokens per second and peak memory.

    python benchmarks/train.py
    python benchmarks/train.py --device cuda --lengths "[2048]" --random llama-8b --random_length 2048

The plain one computes the target's logits everywhere, keeps the draft's logits of all unroll steps, attends densely
([B, heads, L, L + k] scores that autograd holds) and takes a mean over the mask. Each measurement is a process of its own,
and the two take turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from slipstream.configs.recipe import DistillSettings, HeadSettings
from slipstream.distill.draft import DraftHead
from slipstream.distill.heads import new_head
from slipstream.distill.target import Target, load_target
from slipstream.distill.unroll import Distillation, labelled_rows
from slipstream.train.launch import keep_freed_memory

SHAPES = {  # of Llamas with random weights and the vocabulary of Llama 3: a small one, and Llama 3.1 itself
    "wide": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def random_target(name: str, device: str) -> Target:
    """A target of one of the `SHAPES`."""
    config = LlamaConfig(**{"vocab_size": 128256, "max_position_embeddings": 8192, **SHAPES[name]})
    with torch.device(device):  # where billions of random numbers are made soonest
        return Target(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), name=name)


def plain_loss(head: DraftHead, target: Target, ids: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Forward KL over some unroll steps, nothing saved: what a first implementation of the paper does."""
    out = target.forward(ids)
    teacher = torch.softmax(out.logits.float()[..., head.vocabulary()], -1)  # [B, L, Vd]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)

    def attend(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        keys.append(key.repeat_interleave(groups, 1))
        values.append(value.repeat_interleave(groups, 1))
        causal = (query @ keys[0].transpose(-1, -2)).masked_fill(future, float("-inf"))
        own = [(query * k).sum(-1, keepdim=True) for k in keys[1:]]
        weights = torch.softmax(torch.cat([causal, *own], -1).float() * query.shape[-1] ** -0.5, -1)
        out = weights[..., : len(future)] @ values[0].float()
        for i, v in enumerate(values[1:], len(future)):
            out = out + weights[..., i, None] * v.float()
        return out

    at = torch.arange(ids.shape[1], device=ids.device)
    embedded = head.embed(target.embeddings(ids))
    hidden, logits = head.fuse(out.features.float()), []
    for step in range(steps):
        hidden = head(embedded.roll(-1 - step, 1), hidden, (at + step).expand(len(ids), -1), attend)
        logits.append(torch.log_softmax(head.logits(hidden).float(), -1))
    loss = torch.zeros((), device=ids.device)
    for step, log_q in enumerate(logits):
        rows = -(teacher.roll(-1 - step, 1) * log_q).sum(-1)
        loss = loss + 0.8**step * (rows * mask.roll(-2 - step, 1)).sum() / mask.sum()
    return loss


def _peak(device: str) -> int:
    """Most memory held so far, kB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() // 1024
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def _forget_peak(device: str) -> None:
    """Count from what is held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def one(kind: str, case: str, length: int, steps: int, rounds: int, device: str) -> None:
    """One measurement, printed as JSON."""
    small = case == "smollm2"
    target = load_target("smollm2-135m-instruct", device=device) if small else random_target(case, device)
    vocabulary = torch.arange(min(8192 if small else 32000, target.vocab_size))
    head = new_head(target, vocabulary, HeadSettings(), seed=0).train().to(device)
    module = Distillation(head, target, DistillSettings(objectives={"forward_kl": 1.0}), autocast=True)
    last = min(30000, target.vocab_size)
    ids = torch.randint(100, last, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, : length // 5] = False  # prompts
    scale = torch.tensor([0.8**k for k in range(steps)], device=device) / labelled_rows(mask, steps).sum()
    if device == "cpu":
        keep_freed_memory()  # as a training does, for both
    _forget_peak(device)
    before = _peak(device)
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        if kind == "ours":
            loss, _ = module(ids, mask, scale, target.capture(ids))
        else:
            with torch.autocast(device, torch.bfloat16):
                loss = plain_loss(head, target, ids, mask, steps)
        loss.backward()
        head.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    peak = (_peak(device) - before) / 1024
    print(json.dumps({"tokens_per_second": length / statistics.median(seconds[1:]), "peak_mb": peak}))


def main(
    kind: str | None = None,
    case: str = "smollm2",
    length: int = 1024,
    lengths: list[int] = [512, 1024, 2048, 4096],  # noqa: B006 (jsonargparse copies defaults)
    random: str = "wide",
    random_length: int = 1024,
    steps: int = 7,
    rounds: int = 4,
    repeats: int = 3,
    device: str = "cpu",
) -> None:
    """Print a Markdown table.

    Args:
        kind: `plain` or `ours`: one measurement only, as JSON; this script calls itself so.
        case: Of that measurement, `smollm2`, `wide` or `llama-8b`.
        length: And its length.
        lengths: Tokens of the one conversation of a batch, for SmolLM2.
        random: The other target, of random weights and a vocabulary of 128k: `wide`, or `llama-8b`, which wants a card.
        random_length: Tokens of its one conversation.
        steps: Unroll steps; 7 in the paper (EAGLE-3).
        rounds: Training steps of a measurement; the first is not counted.
        repeats: Measurements of each of the two; the ratio is of two that follow one another.
        device: `cpu` or `cuda`, whose memory is then the one that counts.
    """
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks/train.py --device cuda needs a CUDA device, and there is none")
    if kind is not None:
        one(kind, case, length, steps, rounds, device)
        return
    columns = (
        "target | length | plain, tokens/s | ours, tokens/s | ratio (all) | plain, peak MB above models | ours | ratio"
    )
    print(f"| {columns} |\n|---{'|--:' * columns.count('|')}|", flush=True)
    for name, tokens in [*(("smollm2", n) for n in lengths), (random, random_length)]:
        options = ["--case", name, "--length", str(tokens), "--steps", str(steps), "--rounds", str(rounds)]
        pairs = [
            [_measured(which, [*options, "--device", device]) for which in ("plain", "ours")] for _ in range(repeats)
        ]
        plain, ours = (
            {key: statistics.median(x[key] for x in found) for key in found[0]} for found in zip(*pairs, strict=True)
        )
        gained = sorted(mine["tokens_per_second"] / theirs["tokens_per_second"] for theirs, mine in pairs)
        speeds = f"{plain['tokens_per_second']:.0f} | {ours['tokens_per_second']:.0f} | {statistics.median(gained):.2f}"
        peaks = f"{plain['peak_mb']:,.0f} | {ours['peak_mb']:,.0f} | {ours['peak_mb'] / plain['peak_mb']:.2f}"
        print(f"| {name} | {tokens} | {speeds} ({gained[0]:.2f}–{gained[-1]:.2f}) | {peaks} |", flush=True)


def _measured(kind: str, options: list[str]) -> dict[str, float]:
    """What a process of its own measures."""
    command = [sys.executable, __file__, "--kind", kind, *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
