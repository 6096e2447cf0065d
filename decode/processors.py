"""`generate`'s settings, stopping criteria and logits processors; these on trees, where each node has its own prefix."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import MaxTimeCriteria, StopStringCriteria

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.suggest import near

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import LogitsProcessor

    from slipstream.decode.tree import Tree
    from slipstream.distill.target import Target

_BY_TOKEN = (  # they look at nothing but the logits
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.SuppressTokensLogitsProcessor,
)
_STATEFUL = (  # they count on one call per token
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    logits_process.ClassifierFreeGuidanceLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
)
_NEW_TOKENS = 256  # where nobody says how many
_SEARCHES = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "constraints": None,
    "force_words_ids": None,
    "num_return_sequences": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "token_healing": False,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
}
_INPUTS = (  # what `generate` itself hands over beside the prompts
    "attention_mask",
    "position_ids",
    "past_key_values",
    "cache_position",
    "logits_to_keep",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
)


def check_config(config: GenerationConfig) -> None:
    """Refuse the generation settings that tree decoding cannot honour.

    Raises:
        SlipstreamError: On beam search, plain, in groups or constrained, several sequences per prompt, or another assisted
            method.
    """
    for name, plain in _SEARCHES.items():
        if getattr(config, name, plain) not in (plain, None):
            raise SlipstreamError(f"generation setting {name}={getattr(config, name)} does not go with tree decoding")


def check_inputs(input_ids: Tensor, given: dict[str, Any]) -> None:
    """Refuse inputs of `generate` beside the prompts that would change its answer: they are not read here.

    Raises:
        SlipstreamError: On embeddings, images, positions other than the mask's, or tokens that are only in a cache.
    """
    for name, value in given.items():
        nothing = value is None or (name == "token_type_ids" and not value.any())
        if name not in _INPUTS and not nothing:
            raise SlipstreamError(f"model input {name!r} does not go with tree decoding, which reads input_ids alone")
    past = given.get("past_key_values")
    held = past.get_seq_length() if past is not None else 0
    if held >= input_ids.shape[1]:
        raise SlipstreamError(f"past_key_values holds {held} tokens: give all of them in input_ids, which are run anew")
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if positions is not None and positions.shape == input_ids.shape:
        real = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device)
        if ((real.cumsum(1) - 1 != positions) & real.bool()).any():
            raise SlipstreamError(
                "position_ids must count the tokens of attention_mask from 0; others are not honoured"
            )


def make_config(
    target: Target, given: GenerationConfig | None, named: dict[str, Any], prompt_length: int
) -> GenerationConfig:
    """The settings of one call; `max_length` says where it ends.

    Args:
        target: Whose stop tokens, and, beside a given config, whose own generation config fill in what is left open.
        given: The caller's generation config; without one, decoding is greedy and nothing is filtered.
        named: Settings that the call names: they take precedence. A temperature turns sampling on, or, if 0, off.
        prompt_length: Tokens, padding included.

    Raises:
        SlipstreamError: On a setting that transformers does not know, or a value that cannot be.
    """
    known = vars(GenerationConfig())
    for name in named:
        if name not in known:
            raise SlipstreamError(f"unknown generation option {name!r}{near(name, list(known))}")
    for name in ("max_new_tokens", "temperature"):
        if named.get(name, 0) < 0:
            raise SlipstreamError(f"{name} must not be negative, but is {named[name]}")
    named = dict(named)
    limit = named.pop("max_new_tokens", None)  # may be 0, which a GenerationConfig may not say
    if "temperature" in named:
        named.setdefault("do_sample", named["temperature"] > 0)
    if given is None:
        named = {"do_sample": False, "top_k": 0, "top_p": 1.0} | named
    if not named.get("do_sample", True):
        named = {name: value for name, value in named.items() if name not in ("temperature", "top_k", "top_p")}
    own = target.model.generation_config or GenerationConfig()
    config = GenerationConfig() if given is None else copy.deepcopy(given)
    try:
        config.update(**named)
        if given is not None:
            config.update(**own.to_dict(), defaults_only=True)
        config.update(eos_token_id=target.stop_ids() or None, pad_token_id=own.pad_token_id, defaults_only=True)
        limit = limit if limit is not None else config.max_new_tokens
        if limit is None:
            limit = _NEW_TOKENS if config.max_length is None else max(0, config.max_length - prompt_length)
        config.update(**own._get_default_generation_params(), defaults_only=True)
    except ValueError as error:
        raise SlipstreamError(f"generation options: {str(error).splitlines()[0]}") from error
    for name in ("eos_token_id", "pad_token_id"):
        if name in named:  # an explicit None too
            setattr(config, name, named[name])
    config.max_length = prompt_length + limit
    return config


def make_processors(
    target: Target,
    config: GenerationConfig,
    prompt_length: int,
    attention_mask: Tensor | None = None,
    extra: LogitsProcessorList | None = None,
) -> LogitsProcessorList:
    """The processors `generate` would apply, in its order."""
    target.model._prepare_special_tokens(config, True, device=target.device)  # some processors read its tensors
    try:
        return target.model._get_logits_processor(
            config,
            input_ids_seq_length=prompt_length,
            logits_processor=extra,
            device=target.device,
            model_kwargs={"attention_mask": attention_mask},
        )
    except ValueError as error:
        raise SlipstreamError(f"generation options: {str(error).splitlines()[0]}") from error


def make_criteria(target: Target, config: GenerationConfig, extra: StoppingCriteriaList | None) -> StoppingCriteriaList:
    """The criteria that end a row beside its length and its stop tokens, `generate`'s own before the caller's.

    Raises:
        SlipstreamError: If stop strings are given for a target without a tokenizer.
    """
    criteria = StoppingCriteriaList()
    if config.max_time is not None:
        criteria.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings is not None:
        criteria.append(StopStringCriteria(target.chat_tokenizer, config.stop_strings))
    criteria.extend(extra or ())
    return criteria


def _of_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """What a processor of a whole batch does to one row of it."""
    if isinstance(processor, logits_process.RepetitionPenaltyLogitsProcessor):
        if isinstance(processor.prompt_ignore_length, Tensor):
            return type(processor)(processor.penalty, int(processor.prompt_ignore_length[row]))
    elif isinstance(processor, logits_process.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return type(processor)(lambda _, ids: allowed(row, ids), 1)
    return processor


class TreeProcessors:
    """Processors for the nodes of a batch of trees.

    Attributes:
        prefixed: Per row of the call, processors that may look at the tokens before; called once per row and depth.
        by_token: Those behind them that do not, called once.
    """

    def __init__(self, processors: LogitsProcessorList, batch: int) -> None:
        for processor in processors:
            if isinstance(processor, _STATEFUL):
                raise SlipstreamError(
                    f"{type(processor).__name__} keeps a state from token to token, which a tree has not; "
                    "use transformers' generate for it"
                )
        split = len(processors)
        while split and isinstance(processors[split - 1], _BY_TOKEN):
            split -= 1
        self.prefixed = [LogitsProcessorList(_of_row(p, row) for p in processors[:split]) for row in range(batch)]
        self.by_token: list[LogitsProcessor] = list(processors[split:])

    def __bool__(self) -> bool:
        return bool(self.prefixed[0] or self.by_token)

    def __call__(self, places: Sequence[int], prefixes: Sequence[Tensor], tree: Tree, logits: Tensor) -> Tensor:
        """Processed logits [B, N, V].

        Args:
            places: Which row of the call each row of the batch is.
            prefixes: Tokens decided so far of each row, the root last, each [n].
            tree: N nodes per row.
            logits: Raw logits, [B, N, V]; not changed.
        """
        out = logits.to(torch.float32, copy=True)
        for row, (place, prefix) in enumerate(zip(places, prefixes, strict=True)):
            if not self.prefixed[place]:
                break
            for depth in range(tree.levels + 1):  # prefixes of one depth have one length
                nodes = (tree.depths[row] == depth).nonzero().squeeze(1)
                if len(nodes):
                    lines = tree.ancestors[row, nodes].nonzero()[:, 1].view(len(nodes), depth + 1)[:, 1:]
                    seen = torch.cat([prefix.expand(len(nodes), -1), tree.tokens[row, lines]], dim=1)
                    out[row, nodes] = self.prefixed[place](seen, out[row, nodes])  # type: ignore[arg-type]
        flat = out.flatten(0, 1)
        for processor in self.by_token:
            flat = processor(prefixes[0][None], flat)  # type: ignore[arg-type]
        return flat.view_as(out)
