"""The loop: draft a tree per row, run the target over them once, keep what the rule lets through."""

from __future__ import annotations

import time
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

from slipstream.configs.errors import SlipstreamError
from slipstream.decode.batch import Batch, Unread
from slipstream.decode.cache import FixedCaches, TreeCache
from slipstream.decode.drafters import Drafter, NoDrafter, Round, last_tokens
from slipstream.decode.faults import explain
from slipstream.decode.policy import Policy
from slipstream.decode.processors import (
    TreeProcessors,
    check_config,
    check_inputs,
    make_config,
    make_criteria,
    make_processors,
)
from slipstream.decode.stats import Stats, mark, seconds
from slipstream.decode.tree import Tree, root_only
from slipstream.decode.verify import NotFiniteError, Spent, Token, Verdict, Verifier, verify
from slipstream.distill.compilation import SIZES, Compilation
from slipstream.distill.relaxation import never_relaxed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

    from slipstream.decode.recorder import Observer
    from slipstream.decode.tree import TreeShape
    from slipstream.distill.target import Target


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
        sequences: Prompts and new tokens, [B, n + new], rows padded on the right; what transformers' `generate` returns.
        rows: The new tokens of each row with their tags, margins and regrets.
        stats: Counts and times, all rows together.
    """

    sequences: Tensor
    rows: list[list[Token]]
    stats: Stats

    @property
    def tokens(self) -> list[Token]:
        """The new tokens of the first row."""
        return self.rows[0]


@dataclass
class _Request:
    """What stays the same over the rounds of one call; lists are per row."""

    verifier: Verifier
    processors: TreeProcessors
    temperature: float
    generators: list[torch.Generator]
    stops: frozenset[int]
    never_relax: Tensor
    given: Tensor  # the prompts as they came, padding included, [B, n]
    criteria: StoppingCriteriaList
    spent: list[Spent]
    observer: Observer | None


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
        self._caches = FixedCaches.of(target)

    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        verify: str | Verifier | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        seed: int = 0,
        streamer: BaseStreamer | None = None,
        on_tokens: Callable[[list[Token]], None] | None = None,
        observer: Observer | None = None,
        **options: Any,
    ) -> Generation:
        """Continue one prompt or several.

        Args:
            input_ids: Prompts, [B, n]; shorter ones padded on either side.
            attention_mask: [B, n], 0 on padding; None where every row is whole.
            max_new_tokens: Exact to the token; 256 where neither this nor a config says how many.
            temperature: 0, or nothing, is greedy.
            top_k: Sample among the k most likely tokens.
            top_p: Sample within this share of probability.
            verify: `exact`, `mars` (the policy's tuned relaxed rule), a `Verifier`, or None for the policy's rule.
            logits_processor: transformers' processors; each node of a tree is processed with its own prefix.
            stopping_criteria: transformers' criteria, asked after every token.
            generation_config: Settings as `generate` takes them: what the call names itself goes before them, and the
                target's own generation config fills in what they leave open.
            seed: Of the draws, at T > 0; row b draws from seed + b.
            streamer: A transformers streamer, for one prompt; gets the new tokens of each round.
            on_tokens: Called with the tagged tokens of each round, for one prompt.
            observer: Shown every round as it was verified, `recorder.record` makes one.
            **options: Any other setting of transformers' `GenerationConfig` that shapes the logits or the end:
                `min_p`, `repetition_penalty`, `bad_words_ids`, `eos_token_id`, `stop_strings`, `max_time`, ..

        Raises:
            SlipstreamError: If a prompt is empty or longer than the context, an option cannot be honoured, or logits are not
                finite.
        """
        if not isinstance(input_ids, Tensor):
            raise SlipstreamError(f"input_ids must be a tensor of token ids, [B, n], not {type(input_ids).__name__}")
        named = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        length = input_ids.shape[-1]
        config = make_config(
            self.target, generation_config, {k: v for k, v in named.items() if v is not None} | options, length
        )
        check_config(config)
        return self._generate(
            input_ids,
            attention_mask,
            config.max_length - length,
            config,
            make_processors(self.target, config, length, attention_mask, logits_processor),
            make_criteria(self.target, config, stopping_criteria),
            verify,
            seed,
            streamer,
            on_tokens,
            observer,
        )

    def custom_generate(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """For transformers users: `model.generate(ids, custom_generate=decoder.custom_generate, ...)`.

        Takes what `generate` prepared (processors, stopping criteria, defaults of the model's generation config) and
        decodes with this decoder's draft and rule. At T > 0 the draws are seeded by torch's own generator.

        Raises:
            SlipstreamError: If `model` is not this decoder's target, or a setting cannot be honoured.
        """
        if model is not self.target.model:
            raise SlipstreamError(f"custom_generate was called for another model than {self.target.name}")
        check_config(generation_config)
        check_inputs(input_ids, model_kwargs)
        config, limit, others = copy(generation_config), generation_config.max_length, StoppingCriteriaList()
        for criterion in stopping_criteria:
            if isinstance(criterion, MaxLengthCriteria):  # of `generate`, or the caller's own in its place
                limit = criterion.max_length
            elif isinstance(criterion, EosTokenCriteria):
                config.eos_token_id = criterion.eos_token_id.flatten().tolist()
            else:
                others.append(criterion)
        seed = int(torch.randint(2**31, ())) if generation_config.do_sample else 0
        out = self._generate(
            input_ids,
            model_kwargs.get("attention_mask"),
            limit - input_ids.shape[1],
            config,
            logits_processor,
            others,
            None,
            seed,
            streamer,
            None,
            None,
        )
        return out.sequences

    def _generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        limit: int,
        config: GenerationConfig,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        rule: str | Verifier | None,
        seed: int,
        streamer: BaseStreamer | None,
        on_tokens: Callable[[list[Token]], None] | None,
        observer: Observer | None,
    ) -> Generation:
        target, device = self.target, self.target.device
        prompts = self._prompts(input_ids, attention_mask)
        if len(prompts) > 1 and (streamer is not None or on_tokens is not None):
            raise SlipstreamError(f"a stream follows one prompt, not {len(prompts)}")
        stop = config.eos_token_id
        stops = [] if stop is None else [stop] if isinstance(stop, int) else [int(token) for token in stop]
        if not -(2**63) <= seed < 2**63 - len(prompts):
            raise SlipstreamError(f"seed must fit into 64 bits, not {seed}")
        request = _Request(
            verifier=self.policy.rule(rule),
            processors=TreeProcessors(processors, len(prompts)),
            temperature=float(config.temperature or 1.0) if config.do_sample else 0.0,
            generators=[torch.Generator(device).manual_seed(seed + row) for row in range(len(prompts))],
            stops=frozenset(stops),
            never_relax=torch.tensor(never_relaxed(target, stops), device=device),
            given=input_ids.to(device),
            criteria=criteria,
            spent=[Spent() for _ in prompts],
            observer=observer,
        )
        if observer is not None:
            observer.begin(len(prompts), request.verifier, request.never_relax, config, processors)
        room = [max(0, min(limit, target.context - len(prompt))) for prompt in prompts]
        batch = Batch.begin(prompts, room, device)
        stats = Stats(prompt_tokens=sum(batch.prompts))
        rows: list[list[Token]] = [[] for _ in prompts]
        if streamer is not None:
            streamer.put(input_ids.cpu())
        with torch.no_grad() if target.compiled else torch.inference_mode():
            for place, new in self._rounds(batch, request, stats):
                rows[place] += new
                if streamer is not None:
                    streamer.put(torch.tensor([token.id for token in new]))
                if on_tokens is not None:
                    on_tokens(new)
        if streamer is not None:
            streamer.end()
        stats.new_tokens = sum(map(len, rows))
        relaxed = [token for row in rows for token in row if token.tag == "relaxed"]
        stats.relaxed, stats.regret = len(relaxed), sum(token.regret for token in relaxed)
        return Generation(_padded(input_ids, rows, config.pad_token_id, stops), rows, stats)

    def _prompts(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
        """The prompts without their padding."""
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise SlipstreamError(f"input_ids must be prompts, [B, n] with n > 0, but is {list(input_ids.shape)}")
        if attention_mask is None:
            prompts = list(input_ids)
        elif attention_mask.shape != input_ids.shape:
            raise SlipstreamError(
                f"attention_mask is {list(attention_mask.shape)}, but input_ids {list(input_ids.shape)}"
            )
        else:
            real = attention_mask.bool().to(input_ids.device)
            prompts = [ids[keep] for ids, keep in zip(input_ids, real, strict=True)]
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise SlipstreamError(f"prompt {row} is empty: its attention mask is all 0")
            if len(prompt) >= self.target.context:
                raise SlipstreamError(
                    f"the prompt has {len(prompt)} tokens, the context of {self.target.name} is {self.target.context}"
                )
        return prompts

    def _judge(self, request: _Request, batch: Batch, tree: Tree, logits: Tensor) -> Verdict:
        processed, raw = None, logits
        if request.temperature or request.processors:
            prefixes = [
                torch.cat([request.given[place], ids[start:end]])
                for place, ids, start, end in zip(batch.places, batch.ids, batch.prompts, batch.lengths, strict=True)
            ]
            processed = request.processors(batch.places, prefixes, tree, logits)
        if not request.temperature and processed is not None:
            logits, processed = processed, None
        try:
            return verify(
                request.verifier,
                tree,
                logits,
                processed=processed,
                generators=[request.generators[place] for place in batch.places],
                spent=[request.spent[place] for place in batch.places],
                never_relax=request.never_relax,
            )
        except NotFiniteError as error:
            row, path = error.row, error.path
            text = torch.cat([batch.ids[row, : batch.lengths[row]], tree.tokens[row, path[1:]]])
            told = explain(self.target, batch.places[row], text, raw[row, path[-1]])
            raise SlipstreamError(told) from error

    def _prefill(self, batch: Batch, compiled: Compilation | None) -> tuple[TreeCache, Tensor, Tensor]:
        """Run the prompts: a cache of them, their features [B, n, A*Ht], and the logits at each one's end, [B, 1, V].

        Padding stands on the right, where causality alone hides it.
        """
        if compiled:  # trees may be padded to these sizes, and schedules may grow them
            cache = self._caches.take(batch.ids.shape[1] + max(SIZES[-1], self.policy.tree.size))
        else:
            cache = TreeCache(self.target.config.num_hidden_layers, len(batch.places), batch.ids.device)
        last = torch.tensor(batch.lengths, device=batch.ids.device) - 1
        ends = last.unique()
        out = self.target.forward(batch.ids[:, : max(batch.lengths)], cache=cache, logits_to_keep=ends)
        cache.commit_first(batch.lengths)
        cache.compiled = compiled
        rows = torch.arange(len(last), device=last.device)
        return cache, out.features, out.logits[rows, torch.searchsorted(ends, last)][:, None]

    def _rounds(self, batch: Batch, request: _Request, stats: Stats) -> Iterator[tuple[int, list[Token]]]:
        """Place and new tokens of each row after the prompts' forward, then after each round, until all rows are done."""
        if max(batch.room) <= 0:
            return
        begun = clock = time.perf_counter()
        target, drafter = self.target, self.drafter
        drafter.begin(len(batch.places))
        compiled = target.compiled if len(batch.places) == 1 else None
        static = compiled is not None and compiled.static
        cache, features, logits = self._prefill(batch, compiled)
        unread = Unread(features, list(batch.lengths))
        controller = self.policy.speculation.controller(self.policy.tree, target)
        tree = root_only(last_tokens(batch.ids, batch.lengths))
        verdict = self._judge(request, batch, tree, logits)
        seen = time.perf_counter()  # by the observer, so far
        stats.target_seconds += seen - clock
        if request.observer is not None:
            request.observer.round(batch.places, tree, logits, verdict, (0.0, seen - clock, 0.0))
            begun, seen = begun + time.perf_counter() - seen, time.perf_counter()  # watching is not counted
        while True:
            cut = [_cut(request, batch, row, tokens) for row, tokens in enumerate(verdict.tokens)]
            new, ended = [tokens for tokens, _ in cut], [over for _, over in cut]
            if stats.nodes:  # not the prompts' own forward
                stats.accept_lengths += map(len, new)
            batch.extend(new)
            away = time.perf_counter()
            stats.seconds = away - begun
            yield from zip(batch.places, new, strict=True)
            away = time.perf_counter() - away  # with the caller, which shows the text
            begun, seen = begun + away, seen + away
            going = [row for row, over in enumerate(ended) if not over]
            if not going:
                return
            if len(going) < len(new):
                for part in (batch, cache, drafter, unread):
                    part.keep(going)
            clock = mark(batch.ids.device)
            shape = controller.shape()
            if shape is None:
                tree = root_only(last_tokens(batch.ids, batch.lengths))
            else:
                left = target.context - max(batch.lengths)
                shape = shape.within(left if static or request.temperature else min(left, max(batch.room)))
                tree = drafter.propose(
                    Round(
                        ids=batch.ids,
                        text=batch.text,
                        lengths=batch.lengths,
                        features=unread.features,
                        fresh=unread.counts,
                        shape=shape,
                        temperature=request.temperature,
                        generators=[request.generators[place] for place in batch.places],
                        enough=controller.enough,
                        filler=min(request.stops, default=0),
                        static=static,
                    )
                )
                unread.clear()
            fed = _filled(tree, shape, compiled)
            drafted = mark(batch.ids.device)
            plain = fed.nodes == 1 and cache.rows.even and not compiled
            out = target.forward(
                fed.tokens,
                position_ids=fed.depths + cache.rows.tensor[:, None],
                visible=None if plain else cache.visible(fed.ancestors),
                cache=cache,
            )
            logits = out.logits[:, : tree.nodes]
            verified = mark(batch.ids.device)
            verdict = self._judge(request, batch, tree, logits)  # which waits for a card
            spent = seconds(clock, drafted), seconds(drafted, verified)
            stats.count(*spent, tree.nodes * len(going))
            cache.commit(verdict.paths)
            controller.observe(tree, verdict.paths, *spent)
            if request.observer is not None:
                judged = time.perf_counter()
                request.observer.round(batch.places, tree, logits, verdict, (*spent, judged - seen - sum(spent)))
                begun, seen = begun + time.perf_counter() - judged, time.perf_counter()
            unread.add(out.features, verdict.paths)


def _filled(tree: Tree, shape: TreeShape | None, compiled: Compilation | None) -> Tree:
    """The tree as a graph wants it; what fills it up is neither judged nor accepted."""
    if compiled is None:
        return tree
    expected = shape.size if shape is not None and tree.nodes > 1 else 0
    return tree.padded(compiled.size(tree.nodes, expected))


def _cut(request: _Request, batch: Batch, row: int, tokens: list[Token]) -> tuple[list[Token], bool]:
    """The tokens up to the row's room and up to the first one that ends it, and whether it has ended."""
    room = batch.room[row]
    for i, token in enumerate(tokens[:room]):
        over = token.id in request.stops
        if request.criteria and not over:
            decided = batch.ids[row, batch.prompts[row] : batch.lengths[row]]
            new = torch.tensor([token.id for token in tokens[: i + 1]], device=decided.device)
            sequence = torch.cat([request.given[batch.places[row]], decided, new])
            over = bool(request.criteria(sequence[None], None).any())  # type: ignore[arg-type]
        if over:
            return tokens[: i + 1], True
    return tokens[:room], len(tokens) >= room


def _padded(input_ids: Tensor, rows: list[list[Token]], pad: int | None, stops: list[int]) -> Tensor:
    """Prompts as they came and new tokens, rows padded on the right as `generate` does."""
    fill = pad if pad is not None else stops[0] if stops else 0
    out = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.long, device=input_ids.device)
    for line, tokens in zip(out, rows, strict=True):
        line[: len(tokens)] = torch.tensor([token.id for token in tokens], dtype=torch.long)
    return torch.cat([input_ids, out], dim=1)
