"""What traces of tuning's own tree take: bytes a round, and seconds to replay 100,000 of them.

    python benchmarks/traces.py

Trees of 48 nodes over a vocabulary of 49,152 are drawn with their logits, which are rounded to bf16 as a target's are; nothing
but that rounding can be compressed. One part of the trace (1,024 rounds) is recorded, in some minutes, and then repeated: parts
are compressed apart, so that the file is as large as if all of them had been drawn.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from slipstream.decode.drafters import NoDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.policy import Policy
from slipstream.decode.recorder import record
from slipstream.decode.replay import replay
from slipstream.decode.search import LARGEST
from slipstream.decode.trace import Trace, join
from slipstream.decode.tree import Tree, TreeBuilder, TreeShape
from slipstream.decode.verify import Verifier, verify
from slipstream.distill.target import Target

VOCABULARY = 49_152
LENGTH = 32  # rounds of a request
RELAXED = Verifier("mars", "margin", 0.5)
SMALLER = TreeShape(4, 4, 16)


def drawn_trees(rows: int, shape: TreeShape, generator: torch.Generator) -> Tree:
    """Trees that grow as a head's do, from drawn tokens and log-probabilities."""

    def children(count: int) -> tuple[Tensor, Tensor]:
        """Tokens of the likeliest children of so many nodes of each row, and their log-probabilities, [rows, count, k]."""
        logp = (3 * torch.randn(rows, count, 512, generator=generator)).log_softmax(-1).topk(shape.top_k).values
        return torch.randint(0, VOCABULARY, logp.shape, generator=generator), logp

    builder = TreeBuilder()
    tokens, logp = children(1)
    scores = logp[:, 0]
    above = builder.add(tokens[:, 0], torch.full_like(tokens[:, 0], -1), scores)
    for _ in range(1, shape.depth):
        tokens, logp = children(shape.top_k)
        candidates = (scores[:, :, None] + logp).flatten(1)
        ids = builder.add(tokens.flatten(1), above.repeat_interleave(shape.top_k, 1), candidates)
        scores, kept = candidates.topk(shape.top_k)
        above = ids.gather(1, kept)
    return builder.build(torch.randint(0, VOCABULARY, (rows,), generator=generator), shape.nodes)


def drawn_logits(tree: Tree, generator: torch.Generator) -> Tensor:
    """Logits as large as a target's, in bf16, [B, N, V]; a seventh of the drafts is near the top."""
    rows = len(tree.tokens)
    logits = 12 + 3 * torch.randn(rows, tree.nodes, VOCABULARY, generator=generator)
    chance = torch.rand(rows, tree.nodes - 1, generator=generator)
    own = (24 + 2 * torch.randn(chance.shape, generator=generator)).masked_fill(chance > 1 / 7, 14)
    logits[torch.arange(rows)[:, None], tree.parents[:, 1:], tree.tokens[:, 1:]] = own
    return logits.bfloat16()


def record_drawn(path: Path, rounds: int, rows: int = 8) -> int:
    """Record at least so many drawn rounds; how many requests they are of."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=1
    )
    target = Target(LlamaForCausalLM(config).to(torch.bfloat16), None, name="drawn")
    generator, requests = torch.Generator().manual_seed(0), 0
    with record(path, Decoder(target, NoDrafter(), Policy(tree=LARGEST)), draft="drawn") as recorder:
        while recorder.rounds < rounds:
            recorder.begin(rows, Verifier(), torch.tensor([0, 1, 2]), GenerationConfig(), LogitsProcessorList())
            requests += rows
            for _ in range(LENGTH):
                tree = drawn_trees(rows, LARGEST, generator)
                logits = drawn_logits(tree, generator)
                seconds = torch.rand(3, generator=generator).tolist()
                verdict = verify(Verifier(), tree, logits)
                recorder.round(range(rows), tree, logits, verdict, (seconds[0], seconds[1], seconds[2]))
    return requests


def main(rounds: int = 100_000, part: int = 1024) -> None:
    """Print a Markdown table.

    Args:
        rounds: Of the whole trace.
        part: Of them, drawn; the others repeat these.
    """
    with tempfile.TemporaryDirectory() as folder:
        one, whole = Path(folder) / "one.arrow", Path(folder) / "whole.arrow"
        requests = record_drawn(one, part)
        parts = -(-rounds // len(Trace.open(one)))
        join(whole, [(one, range(i * requests, (i + 1) * requests)) for i in range(parts)])
        trace = Trace.open(whole)
        count, size = len(trace), whole.stat().st_size
        print("| | |")
        print("|---|--:|")
        print(f"| rounds | {count:,} |")
        print(f"| bytes a round | {size / count:,.0f} |")
        print(f"| MB | {size / 1e6:,.1f} |")
        steps = {
            "read": lambda: sum(len(rounds.counts) for rounds in trace.rounds()),
            "replay exactly": lambda: replay(trace, Verifier()),
            f"replay under {RELAXED.label}": lambda: replay(trace, RELAXED),
            f"the same on trees of {SMALLER.nodes} nodes": lambda: replay(trace, RELAXED, SMALLER),
        }
        for name, step in steps.items():
            begun, busy = time.perf_counter(), time.process_time()
            step()
            seconds, busy = time.perf_counter() - begun, time.process_time() - busy
            rate = f"{count / seconds:,.0f} rounds/s"
            print(f"| {name} | {seconds:.1f} s ({busy:.1f} s of processors), {rate} |", flush=True)


if __name__ == "__main__":
    auto_cli(main)
