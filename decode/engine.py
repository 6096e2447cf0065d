"""The loop: draft a tree, run the target over it once, keep what the rule lets through."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from slipstream.configs.errors import SlipstreamError
from slipstream.decode.cache import TreeCache
from slipstream.decode.drafters import Drafter, NoDrafter
from slipstream.decode.policy import Policy
from slipstream.decode.stats import Stats
from slipstream.decode.tree import Tree, root_only
from slipstream.decode.verify import Spent, Token, Verdict, Verifier, verify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers.generation.streamers import BaseStreamer

    from slipstream.distill.target import Target


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
        sequences: Prompt and new tokens, [1, n + new]; what transformers' `generate` returns.
        tokens: The new tokens with their tags, margins and regrets.
        stats: Counts and times.
    """

    sequences: Tensor
    tokens: list[Token]
    stats: Stats


@dataclass(frozen=True)
class _Request:
    """What stays the same over the rounds of one generation."""

    verifier: Verifier
    processors: LogitsProcessorList
    sampling: bool
    generator: torch.Generator
    stops: frozenset[int]
    special: frozenset[int]
    spent: Spent


def warpers(temperature: float, top_k: int | None, top_p: float | None) -> LogitsProcessorList:
    """transformers' own processors for sampling, in the order `generate` applies them."""
    out = LogitsProcessorList()
    if temperature < 0:
        raise SlipstreamError(f"temperature must not be negative, but is {temperature}")
    if temperature not in (0, 1):
        out.append(TemperatureLogitsWarper(temperature))
    if top_k:
        out.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        out.append(TopPLogitsWarper(top_p))
    return out


def process(processors: LogitsProcessorList, sequence: Tensor, tree: Tree, logits: Tensor) -> Tensor:
    """Logits [N, V] after the processors, each node seen with its own prefix.

    Args:
        processors: transformers' processors.
        sequence: Tokens decided so far, the root last, [n].
        tree: N nodes.
        logits: Raw logits, [N, V].
    """
    out = logits.float()
    if not processors:
        return out
    for depth in tree.depths.unique().tolist():  # prefixes of one depth have one length
        nodes = (tree.depths == depth).nonzero().squeeze(1)
        paths = tree.ancestors[nodes].nonzero()[:, 1].view(len(nodes), depth + 1)[:, 1:]
        prefix = torch.cat([sequence.expand(len(nodes), -1), tree.tokens[paths]], dim=1)
        out[nodes] = processors(prefix, out[nodes])  # type: ignore[arg-type]
    return out


class Decoder:
    """A target with a drafter and a policy.

    Attributes:
        target: The target.
        drafter: Who proposes.
        policy: Tree and rules used where the caller names none.
    """

    def __init__(self, target: Target, drafter: Drafter | None = None, policy: Policy | None = None) -> None:
        self.target = target
        self.drafter = drafter or NoDrafter()
        self.policy = policy or Policy()

    def generate(
        self,
        input_ids: Tensor,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        verify: str | Verifier | None = None,
        logits_processor: LogitsProcessorList | None = None,
        seed: int = 0,
        streamer: BaseStreamer | None = None,
        on_tokens: Callable[[list[Token]], None] | None = None,
    ) -> Generation:
        """Continue one prompt.

        Args:
            input_ids: The prompt, [1, n].
            max_new_tokens: Exact to the token.
            temperature: 0 is greedy.
            top_k: Sample among the k most likely tokens.
            top_p: Sample within this share of probability.
            verify: `exact`, `mars` (the policy's tuned relaxed rule), a `Verifier`, or None for the policy's rule.
            logits_processor: transformers' processors; each node of a tree is processed with its own prefix.
            seed: Of the draws, at T > 0.
            streamer: A transformers streamer; gets the new tokens of each round.
            on_tokens: Called with the tagged tokens of each round.

        Raises:
            SlipstreamError: If the prompt is empty, no batch of one, or longer than the context.
        """
        if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
            raise SlipstreamError(f"input_ids must be one prompt, [1, n] with n > 0, but is {list(input_ids.shape)}")
        if input_ids.shape[1] >= self.target.context:
            raise SlipstreamError(
                f"the prompt has {input_ids.shape[1]} tokens, the context of {self.target.name} is {self.target.context}"
            )
        if max_new_tokens < 0:
            raise SlipstreamError(f"max_new_tokens must not be negative, but is {max_new_tokens}")
        tokenizer = self.target.tokenizer
        stops = frozenset(self.target.stop_ids())
        processors = LogitsProcessorList([*(logits_processor or []), *warpers(temperature, top_k, top_p)])
        request = _Request(
            verifier=self.policy.rule(verify),
            processors=processors,
            sampling=temperature > 0,
            generator=torch.Generator(self.target.device).manual_seed(seed),
            stops=stops,
            special=stops | frozenset(tokenizer.all_special_ids if tokenizer else ()),
            spent=Spent(),
        )
        room = min(max_new_tokens, self.target.context - input_ids.shape[1])
        stats = Stats(prompt_tokens=input_ids.shape[1])
        sequence = input_ids[0].to(self.target.device)
        tokens: list[Token] = []
        if streamer is not None:
            streamer.put(input_ids.cpu())
        with torch.inference_mode():
            for new in self._rounds(sequence, room, request, stats):
                tokens += new
                if streamer is not None:
                    streamer.put(torch.tensor([t.id for t in new]))
                if on_tokens is not None:
                    on_tokens(new)
        if streamer is not None:
            streamer.end()
        ids = torch.tensor([[t.id for t in tokens]], dtype=torch.long, device=input_ids.device)
        stats.new_tokens = len(tokens)
        stats.relaxed, stats.regret = request.spent.relaxed, request.spent.regret
        return Generation(torch.cat([input_ids, ids], dim=1), tokens, stats)

    def _judge(self, request: _Request, sequence: Tensor, tree: Tree, logits: Tensor) -> Verdict:
        processed = None
        if request.sampling or request.processors:
            processed = process(request.processors, sequence, tree, logits)
        if not request.sampling and processed is not None:
            logits, processed = processed, None
        return verify(
            request.verifier,
            tree,
            logits,
            processed=processed,
            generator=request.generator,
            spent=request.spent,
            never_relax=request.special,
        )

    def _rounds(self, sequence: Tensor, room: int, request: _Request, stats: Stats) -> Iterator[list[Token]]:
        """The new tokens of the prompt's forward, then of each round, cut at the first stop token and at `room`."""
        if room <= 0:
            return
        begun = clock = time.perf_counter()
        self.drafter.reset()
        cache = TreeCache(self.target.config.num_hidden_layers)
        out = self.target.forward(sequence[None], cache=cache, logits_to_keep=1)
        cache.commit(range(len(sequence)))
        features, logits = out.features[0], out.logits[0].clone()
        verdict = self._judge(request, sequence[:-1], root_only(sequence[-1]), logits)
        stats.target_seconds += time.perf_counter() - clock
        first = True
        while True:
            new = _cut(verdict.tokens, room, request.stops)
            room -= len(new)
            if not first:
                stats.accept_lengths.append(len(new))
            first = False
            done = room == 0 or new[-1].id in request.stops
            stats.seconds = time.perf_counter() - begun
            yield new
            if done:
                return
            sequence = torch.cat([sequence, torch.tensor([t.id for t in new], device=sequence.device)])
            clock = time.perf_counter()
            tree = self.drafter.propose(sequence, features, self.policy.tree.within(room))
            drafted = time.perf_counter()
            committed = torch.ones(len(tree), cache.length, dtype=torch.bool, device=sequence.device)
            out = self.target.forward(
                tree.tokens[None],
                position_ids=(tree.depths + cache.length)[None],
                visible=torch.cat([committed, tree.ancestors], dim=1)[None] if len(tree) > 1 else None,
                cache=cache,
            )
            stats.draft_seconds += drafted - clock
            stats.target_seconds += time.perf_counter() - drafted
            stats.nodes += len(tree)
            verdict = self._judge(request, sequence, tree, out.logits[0])
            cache.commit(verdict.path)
            features = out.features[0, verdict.path]


def _cut(tokens: list[Token], room: int, stops: frozenset[int]) -> list[Token]:
    """The tokens up to `room`, and up to the first stop token."""
    for i, token in enumerate(tokens[:room]):
        if token.id in stops:
            return tokens[: i + 1]
    return tokens[:room]
