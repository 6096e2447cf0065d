"""The frozen target model, of any architecture: logits, hidden states of chosen layers, masks of its own kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.suggest import near
from slipstream.data.template import encode_prompt, thinking
from slipstream.distill import blocks
from slipstream.distill.attention import avoid_cudnn
from slipstream.distill.compilation import Compilation
from slipstream.distill.gguf import EMBEDDED, embedded_gguf, from_gguf
from slipstream.distill.masks import layer_masks
from slipstream.distill.packing import Packing, fold_rows, pack
from slipstream.distill.support import context_of, require_causal, require_row, require_support

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import Cache, PreTrainedConfig, PreTrainedTokenizerBase

    from slipstream.data.template import Message

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def aux_layer_ids(num_layers: int) -> list[int]:
    """Layers whose *entering* states the head is fed: 2, n//2, n-3 (EAGLE-3), kept distinct for shallow targets.

    Worked example: n=30 gives [2, 15, 27], i.e. `hidden_states[2]`, `[15]`, `[27]` of transformers; n=4 gives [1, 2, 3].
    """
    if num_layers >= 7:
        return [2, num_layers // 2, num_layers - 3]
    return list(range(max(0, num_layers - 3), num_layers)) if num_layers >= 3 else list(range(num_layers + 1))


class Captured(NamedTuple):
    """What one forward of the target over whole texts leaves for training.

    Attributes:
        features: [B, L, A * Ht], the aux hidden states side by side, low layer first.
        hidden: The last hidden state, after the model's final norm, [B, L, Ht]; `Target.logits` continues from it.
    """

    features: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class TargetOutput:
    """One forward of the target over Q tokens.

    Attributes:
        logits: [B, Q, V], or [B, kept, V].
        features: [B, Q, A * Ht], the aux hidden states side by side, low layer first; [B, Q, 0] where not wanted.
    """

    logits: Tensor
    features: Tensor


class Target:
    """A frozen causal LM and its tokenizer, with nothing in it that knows an architecture.

    Attributes:
        model: The transformers model, in eval mode, without gradients.
        tokenizer: Its tokenizer; None for a model that was handed over without one.
        name: What the user called it.
        layer_ids: Layers whose entering states are the features.
        think: Whether the chat template is told that answers think; None tells it nothing.
        compiled: How forwards over a cache run through `torch.compile`; None where they do not.
    """

    compiled: Compilation | None = None
    _packing: Packing | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str = "",
        layer_ids: Sequence[int] | None = None,
        think: bool | None = None,
    ) -> None:
        self.name = name or model.config.name_or_path or type(model).__name__
        avoid_cudnn(model.device)
        require_support(model, self.name)
        self.model = model.eval().requires_grad_(False)
        fold_rows(model.get_output_embeddings())
        self.tokenizer = tokenizer
        self.config = model.config.get_text_config()
        self.layer_ids = list(layer_ids) if layer_ids is not None else aux_layer_ids(self.config.num_hidden_layers)
        if max(self.layer_ids) > self.config.num_hidden_layers:
            raise SlipstreamError(
                f"layer {max(self.layer_ids)} was asked for; {self.name} has {self.config.num_hidden_layers}"
            )
        self.think = think
        self._options = {} if think is None else thinking(self.chat_tokenizer, think)

    def reading(self, layer_ids: Sequence[int]) -> Target:
        """This target, with the states that enter other layers for its features; itself, where they are the same."""
        if list(layer_ids) == self.layer_ids:
            return self
        return Target(self.model, self.tokenizer, name=self.name, layer_ids=layer_ids, think=self.think)

    @property
    def device(self) -> torch.device:
        """Where the model's first weights lie."""
        return self.model.device

    @property
    def spread(self) -> bool:
        """Whether the weights lie on several devices, or some of them off every device (accelerate brings those back)."""
        devices = {parameter.device for parameter in self.model.parameters()}
        return len(devices) > 1 or torch.device("meta") in devices

    @property
    def dtype(self) -> torch.dtype:
        """Type of the model's weights."""
        return self.model.dtype

    @property
    def embeddings(self) -> nn.Module:
        """Input embeddings: token ids [..] to [.., Ht]."""
        return cast("nn.Module", self.model.get_input_embeddings())

    @property
    def ends(self) -> list[nn.Module]:
        """What stands before the layers, and behind the last hidden state."""
        return [self.embeddings, *(module for name, module in self.model.named_children() if name != self._inner)]

    @property
    def inner(self) -> nn.Module:
        """What holds the layers."""
        return self.model.get_submodule(self._inner)

    @property
    def _inner(self) -> str:
        """Its name in the model; Llama 4's prefix, for one, is the name of nothing."""
        children = dict(self.model.named_children())
        prefix = self.model.base_model_prefix
        return prefix if prefix in children else next(n for n, m in children.items() if isinstance(m, PreTrainedModel))

    @property
    def vocab_size(self) -> int:
        """Rows of the input embeddings, V."""
        return int(cast("Tensor", self.embeddings.weight).shape[0])

    @property
    def context(self) -> int:
        """Longest text of which every token is the model's own, tokens: what it was made for, or less."""
        return context_of(self.config, self.name)

    def require_room(self, longest: int) -> None:
        """Make sure that conversations of up to `longest` tokens can be learned from.

        Raises:
            SlipstreamError: If they do not fit into the model's context.
        """
        if longest > self.context:
            raise SlipstreamError(
                f"a conversation has {longest} tokens, the context of {self.name} is {self.context}: set data.max_length to "
                f"{self.context} or less"
            )

    @property
    def chat_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, where one is needed.

        Raises:
            SlipstreamError: If the target came without one.
        """
        if self.tokenizer is None:
            raise SlipstreamError(f"{self.name} came without a tokenizer; pass one to Target(model, tokenizer)")
        return self.tokenizer

    def encode_prompt(self, messages: list[Message]) -> list[int]:
        """Token ids of a chat up to the opening of the assistant's next turn, told to `think` or not."""
        return encode_prompt(self.chat_tokenizer, messages, **self._options)

    def stop_ids(self) -> list[int]:
        """End-of-sequence tokens, from the generation config, else from the config."""
        generation = self.model.generation_config
        stop = generation.eos_token_id if generation is not None else None
        stop = stop if stop is not None else self.config.eos_token_id
        return [stop] if isinstance(stop, int) else list(stop or [])

    def place(self, device: torch.device, *, layers: bool = True) -> None:
        """Move the model to a device, or its ends alone; what is spread stays."""
        if self.spread:
            return
        avoid_cudnn(device)
        for module in [self.model] if layers else self.ends:
            module.to(device)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        visible: Tensor | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        features: bool = True,
    ) -> TargetOutput:
        """Run the target over `input_ids` [B, Q].

        Args:
            input_ids: Token ids.
            position_ids: [B, Q]; needed where tokens are not consecutive.
            visible: Bool [B, Q, K], which of the K cached and new tokens each query may see; None is plain causal.
            cache: Keys and values so far; None computes without one. Over a `TreeCache` that is `compiled`, after
                `compile()`, it runs through `torch.compile`, and needs positions and `visible`.
            logits_to_keep: As in transformers: the last n, or the indices [kept] whose logits are wanted.
            features: Whether they are wanted, which keeps the states of all layers in memory until the forward ends.
        """
        mask = None if visible is None else layer_masks(self.config, self.dtype, visible, position_ids, cache)
        if cache is None:
            with blocks.used():
                return TargetOutput(*self._run(input_ids, mask, position_ids, cache, logits_to_keep, features))
        self._packing = self._packing or pack(self.model)
        how: Compilation | None = getattr(cache, "compiled", None)
        if how is not None:
            assert self.compiled is not None and position_ids is not None and mask is not None and visible is not None
            cast("Any", cache).hand_out(visible.shape[2])
            for ids in (input_ids, position_ids):
                how.vary(ids, 1)
            for kind in mask.values() if isinstance(mask, dict) else [mask]:
                how.vary(kind, 2, 3)
            with self._packing.used():
                return TargetOutput(*self._compiled(input_ids, mask, position_ids, cache, logits_to_keep))
        with blocks.used(), self._packing.used():
            return TargetOutput(*self._run(input_ids, mask, position_ids, cache, logits_to_keep, features))

    @torch.no_grad()
    def capture(self, input_ids: Tensor, starts: Tensor | None = None) -> Captured:
        """Run the target over whole texts for training: everything but the output layer.

        Args:
            input_ids: [B, L], padded on the right, or several texts in one row.
            starts: Where each token's text begins in that row, [1, L]; None where every row is one.
        """
        mask, positions, masks = None, None, []
        if starts is not None:
            require_row(self.config, self.name, input_ids.shape[1])
            at = torch.arange(input_ids.shape[1], device=input_ids.device)
            positions = at - starts
            own = (at <= at[:, None]) & (at >= starts[:, :, None])
            mask = layer_masks(self.config, self.dtype, own, positions, None)
            masks = [*mask.values()] if isinstance(mask, dict) else [mask]
        with blocks.used(starts, masks):
            out = self.inner(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                output_hidden_states=True,
            )
        return Captured(self._features(out.hidden_states, out.last_hidden_state.device), out.last_hidden_state)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [R, V] of rows of `Captured.hidden`, [R, Ht], by whatever the model does behind its last layer."""
        name, inner = self._inner, self.inner
        self.model._modules[name] = _Given(hidden[None])
        try:
            ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            return self.model(input_ids=ids, use_cache=False).logits[0].to(hidden.device)
        finally:
            self.model._modules[name] = inner

    def compile(self, static: bool | None = None) -> None:
        """Let forwards of a tree run through `torch.compile`.

        On a CPU that takes a C++ compiler, and, for SmolLM2 on two cores, a minute at the first forward; what it makes is
        kept on disk, and read again in a fifth of that.

        Args:
            static: Whether every shape has a graph of its own; None where that is the faster way, on a card. What such a
                forward returns is good until the next one.
        """
        self.compiled = Compilation.on(self.device) if static is None else Compilation(static)
        self._compiled = self.compiled.apply(self._run, self.device)
        self.__dict__.pop("_costs", None)  # of forwards as they were

    def _run(
        self,
        input_ids: Tensor,
        mask: Tensor | dict[str, Tensor] | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        logits_to_keep: int | Tensor,
        features: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Logits and features, [B, Q, 0] where they are not wanted."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=features,
            logits_to_keep=logits_to_keep,
        )
        if not features:
            return out.logits, out.logits.new_empty(*input_ids.shape, 0)
        return out.logits, self._features(out.hidden_states, out.logits.device)

    def _features(self, states: Sequence[Tensor], device: torch.device) -> Tensor:
        """The chosen layers' states side by side; a target that is spread over devices leaves them on several."""
        return torch.cat([states[i].to(device) for i in self.layer_ids], dim=-1)


class _Given(nn.Module):
    """Stands in for a model's layers: their output is known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> _GivenOutput:
        return _GivenOutput(last_hidden_state=self.hidden)


class _GivenOutput(BaseModelOutputWithPast):
    """Architectures look for further outputs of their layers (router logits, cross attentions): there are none."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _locate(name: str) -> str:
    """A folder or hub id that transformers can load, for any way of naming a target."""
    if name == EMBEDDED:
        return str(from_gguf(embedded_gguf()))
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(from_gguf(path))
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.exists()
    if looks_local and not (path / "config.json").is_file():
        what = "has no config.json" if path.exists() else "does not exist"
        raise SlipstreamError(
            f"target {name!r} {what}; give a model folder, a .gguf file, a hub id (owner/name) or {EMBEDDED!r}"
        )
    return str(path) if looks_local else name


def target_config(name: str) -> PreTrainedConfig:
    """The config of a target's language model, without its weights.

    Raises:
        SlipstreamError: If there is no such target.
    """
    try:
        return AutoConfig.from_pretrained(_locate(name)).get_text_config()
    except (OSError, ValueError) as error:
        raise SlipstreamError(f"target {name!r} cannot be read: {str(error).splitlines()[0]}") from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a target.

    Raises:
        SlipstreamError: If there is none.
    """
    return _tokenizer(name, _locate(name))


def _tokenizer(name: str, place: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a target that was located."""
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise SlipstreamError(f"target {name!r} has no tokenizer: {str(error).splitlines()[0]}") from error


def find_device(asked: str | None, index: int = 0) -> str:
    """The device asked for, if it is here; by default a card where there is one, of several the given one.

    Raises:
        SlipstreamError: If it is not here.
    """
    cards = torch.cuda.device_count()
    if asked is None:
        return f"cuda:{index}" if cards else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise SlipstreamError(f"unknown device {asked!r}; give cpu, cuda, cuda:1, ..") from error
    here = {"cuda": (device.index or 0) < cards, "mps": torch.backends.mps.is_available()}
    if not here.get(device.type, True):
        raise SlipstreamError(f"device {asked!r} is not here: this machine has {cards} CUDA devices")
    return asked


def load_target(
    name: str,
    *,
    dtype: torch.dtype | str = torch.bfloat16,
    device: str | torch.device = "cpu",
    layer_ids: Sequence[int] | None = None,
    adapter: str | None = None,
    think: bool | None = None,
    known: bool = False,
) -> Target:
    """Load a target: a local folder, a GGUF file, a hub id, or `smollm2-135m-instruct`; with a peft adapter if named.

    Raises:
        SlipstreamError: If there is no such target, it is no causal LM (it is run to see that, unless `known` to be one),
            or its template has no option to think where `think` is set.
    """
    place = _locate(name)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise SlipstreamError(f"unknown dtype {dtype!r}{near(dtype, DTYPES)}")
        dtype = DTYPES[dtype]
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, device_map=device, output_loading_info=True
        )
    except (OSError, SafetensorError) as error:
        raise SlipstreamError(f"target {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise SlipstreamError(f"target {name!r} is no causal language model: {str(error).splitlines()[0]}") from error
    if missing := sorted(info["missing_keys"])[:3]:
        raise SlipstreamError(f"target {name!r} is no whole model: weights {missing} are missing")
    tokenizer = _tokenizer(name, place)
    if adapter is not None:
        from peft import PeftModel  # peft imports slowly

        try:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        except (OSError, ValueError) as error:
            raise SlipstreamError(f"adapter {adapter!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if not known:
        require_causal(model, name)
    model.config.name_or_path = name
    return Target(model, tokenizer, name=name, layer_ids=layer_ids, think=think)
