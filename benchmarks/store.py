"""What a store's dtype costs: the error of the states, and the simulated acceptance length of heads that read them.

python benchmarks/store.py --drafts "[runs/bf16/draft, runs/fp8/draft]"

Heads trained from a bf16 and from an fp8 store of the same recipe, compared in the rows `target`, say what training loses;
the rows of one head say how much it minds the rounding itself.
"""

from __future__ import annotations

import torch
from jsonargparse import auto_cli
from torch import Tensor

from slipstream.data.conversations import tokenize
from slipstream.data.sources import read
from slipstream.decode.evaluate import simulated_acceptance_length
from slipstream.distill.capture import bytes_per_token
from slipstream.distill.heads import load_head
from slipstream.distill.store import decode, encode
from slipstream.distill.target import Captured, Target, load_target


class _Stored(Target):
    """The target, its states as a store gives them back."""

    kept_in = "bfloat16"

    def capture(self, input_ids: Tensor, starts: Tensor | None = None) -> Captured:
        return decode(encode(super().capture(input_ids, starts), self.kept_in), self.dtype)


def _answers(
    target: Target, conversations: str | None, count: int, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Prompt and first answer of the last `count` conversations, token ids."""
    tokens = tokenize(read(conversations), target.chat_tokenizer, max_length)
    pairs = []
    for row in tokens.select(range(max(0, len(tokens) - count), len(tokens))):
        begin = int(row["mask"].argmax())
        length = int(row["mask"][begin:].cumprod().sum())
        ids = row["input_ids"].tolist()
        pairs.append((ids[:begin], ids[begin : begin + length]))
    return pairs


def _error(target: Target, stored: Target, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """Relative error (Frobenius) of features and of hidden states over the first eight answers."""
    ratios = []
    for prompt, answer in pairs[:8]:
        ids = torch.tensor([prompt + answer])
        exact, rounded = target.capture(ids), stored.capture(ids)
        ratios.append(
            [float((a.float() - b.float()).norm() / a.float().norm()) for a, b in zip(exact, rounded, strict=True)]
        )
    return torch.tensor(ratios).mean(0).tolist()


def main(
    drafts: list[str],
    target: str = "smollm2-135m-instruct",
    conversations: str | None = None,
    count: int = 100,
    steps: int = 5,
    max_length: int = 512,
) -> None:
    """Print a Markdown table, one row per head and dtype.

    Args:
        drafts: Folders of draft heads.
        target: The target model, in bf16.
        conversations: Held-out conversations; None takes the last of those that ship with the package.
        count: How many.
        steps: Drafts of a chain.
        max_length: Longer conversations are cut, tokens.
    """
    print("| head | states | bytes a token | error of features | of hidden | simulated tau | change |")
    print("|---|---|--:|--:|--:|--:|--:|")
    exact = load_target(target)
    pairs = _answers(exact, conversations, count, max_length)
    for draft in drafts:
        head = load_head(draft)
        base = Target(exact.model, exact.tokenizer, name=exact.name, layer_ids=head.layer_ids)
        tau = simulated_acceptance_length(head, base, pairs, steps)
        print(f"| {draft} | target | | | | {tau:.4f} | |")
        for dtype in ("bfloat16", "float8_e4m3fn"):
            stored = _Stored(exact.model, exact.tokenizer, name=exact.name, layer_ids=head.layer_ids)
            stored.kept_in = dtype
            errors = " | ".join(f"{error:.4f}" for error in _error(base, stored, pairs))
            rounded = simulated_acceptance_length(head, stored, pairs, steps)
            size = bytes_per_token(base, dtype)
            print(f"| {draft} | {dtype} | {size:,} | {errors} | {rounded:.4f} | {rounded / tau - 1:+.2%} |")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
