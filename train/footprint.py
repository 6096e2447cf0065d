"""Bytes that training takes on a device and on the disk, from a head's and a target's shapes and the modules themselves.

Not counted: the device's own context, fragmentation, buffers of the communication, decoding by `train.measure_every`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from slipstream.distill.attention import block_size
from slipstream.distill.draft import DraftConfig, DraftMLP
from slipstream.distill.loss import TEACHER_GROUP, part_size, sizes
from slipstream.distill.objectives import forward_kl, weighted
from slipstream.distill.shards import layers_of
from slipstream.distill.unroll import drafted
from slipstream.train.optimizer import make_optimizers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from slipstream.configs.recipe import DataSettings, Recipe, TrainSettings
    from slipstream.distill.draft import DraftHead
    from slipstream.distill.target import Target

ANSWERS = 160  # rows that `slipstream regenerate` answers at once
_OBJECTIVE = {"forward_kl": 5}  # tensors as large as a chunk's logits that it and its gradient make; others, 8
_WRITTEN_OUT = 4  # of forward KL alone, whose gradient is written out
_SCORES = 4  # tensors as large as a block's scores that attention makes on the way back
_STATE = {torch.optim.AdamW: 8, torch.optim.Muon: 4}  # bytes an optimizer keeps of a weight


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum(x.nbytes for x in {id(x): x for x in tensors}.values())


def padded(data: DataSettings) -> tuple[int, int]:
    """Rows and tokens a row of the largest micro-batch."""
    if data.packed:
        return 1, max(data.batch_tokens, data.max_length)
    return max(1, data.batch_tokens // data.max_length), data.max_length


def captured_bytes(target: Target) -> int:
    """Bytes of a token's states as training reads them."""
    return (len(target.layer_ids) + 1) * target.config.hidden_size * target.dtype.itemsize


def forward_bytes(target: Target, data: DataSettings) -> dict[str, int]:
    """What a forward of the target holds at the end of a layer: the states behind every layer, one MLP's, a mask of texts."""
    rows, length = padded(data)
    shape = DraftConfig.for_target(target, 1)
    width = (target.config.num_hidden_layers + 1) * shape.hidden_size + 3 * shape.intermediate_size
    mask = length**2 * (target.dtype.itemsize + 2) if data.packed else 0  # with the bools it is made of
    return {"target's forward": rows * length * (width * target.dtype.itemsize + captured_bytes(target)) + mask}


def sharded_bytes(target: Target, processes: int) -> tuple[int, int]:
    """What a process holds of a target in shards, and what it has for a moment: a layer, and what it and the last came in."""
    layers = layers_of(target)
    shared = size_of(layers.parameters())
    gathered = 3 * max(size_of(layer.parameters()) for layer in layers)
    return size_of(target.model.parameters()) - shared + shared // processes, gathered


def cache_bytes(target: Target, data: DataSettings) -> dict[str, int]:
    """Keys and values of the answers that are written at once."""
    shape = DraftConfig.for_target(target, 1)
    width = 2 * shape.num_key_value_heads * shape.head_dim * target.config.num_hidden_layers
    return {"keys and values": ANSWERS * data.max_length * width * target.dtype.itemsize}


def train_bytes(head: DraftHead, settings: TrainSettings, processes: int = 1, zero: int = 0) -> dict[str, int]:
    """What a process holds of the head's weights, gradients and optimizer state.

    Shards are gathered for use and cut up again: of weights (FSDP2, stage 3) and gradients (these and stage 2) a process
    holds its share and, for a moment, the whole. ZeRO's optimizers hold a copy of their share of the weights.
    """
    weights = size_of([*head.parameters(), *head.buffers(), *head.lm_head.parameters()])  # an eagle1 head's is lent
    gradients = size_of(p for p in head.parameters() if p.requires_grad)
    state = optimizer_bytes(head, settings)
    sharded = zero == 3 or (settings.shard and not zero)
    return {
        "head": weights + (weights // processes if sharded else 0),
        "gradients": gradients + (gradients // processes if sharded or zero == 2 else 0),
        "optimizer": (state + (gradients if zero else 0)) // (processes if sharded or zero else 1),
        **({} if settings.ema is None else {"average": size_of(head.parameters())}),
    }


def optimizer_bytes(head: DraftHead, settings: TrainSettings) -> int:
    """State that the optimizers keep of all trained weights."""
    optimizers = make_optimizers(head, settings)
    return sum(_STATE[type(o)] * p.numel() for o in optimizers for group in o.param_groups for p in group["params"])


def written_bytes(head: DraftHead, settings: TrainSettings) -> int:
    """Checkpoint, best head and head; a file is written beside the one it replaces."""
    weights = size_of([*head.parameters(), *head.buffers()])
    average = weights if settings.ema is not None else 0
    best = weights if settings.measure_every is not None else 0
    return 2 * (weights + optimizer_bytes(head, settings) + average + best) + weights


def batch_bytes(recipe: Recipe, target: Target, head: DraftHead, kind: str) -> dict[str, int]:
    """What a micro-batch takes beside all that: the teacher first, then what the unrolled head keeps for its gradients."""
    rows, length = padded(recipe.data)
    tokens, vocabulary = rows * length, target.vocab_size
    width = target.dtype.itemsize
    lasting = tokens * (captured_bytes(target) + width * head.config.draft_vocab_size)
    at_once = max(1, min(tokens, sizes(kind).teacher // vocabulary))
    teacher = (min(tokens, TEACHER_GROUP * at_once) * width + at_once * 4) * vocabulary
    return {"teacher": lasting + teacher, "unrolled head": lasting + unroll_bytes(recipe, head, kind)}


def unroll_bytes(recipe: Recipe, head: DraftHead, kind: str) -> int:
    """Bytes that the unrolled head takes: it is run over tensors without content, and what its graph keeps is counted.

    Args:
        recipe: Size of a micro-batch, steps and precision.
        head: On the meta device.
        kind: Of the device.
    """
    rows, length = padded(recipe.data)
    config, kept = head.config, {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return x

    def enter(_: nn.Module, args: tuple[Tensor]) -> None:  # what an MLP begins with is kept for its being run again
        keep(args[0])

    twin = copy.deepcopy(head).train()
    if recipe.train.gradient_checkpointing:
        twin.checkpoint_activations()
        for mlp in (x for x in twin.modules() if isinstance(x, DraftMLP)):
            mlp.register_forward_pre_hook(enter)
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin.to_empty(device="cpu")
        own = {x.untyped_storage()._cdata for x in twin.parameters()}
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.mixed_precision == "bf16")
        with mixed, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            features = torch.empty(rows, length, len(head.layer_ids) * config.target_hidden_size)
            hidden, embedded = twin.fuse(features).float(), torch.empty(rows, length, config.hidden_size)
            every, position = torch.arange(rows * length), torch.arange(length).expand(rows, -1)
            output = drafted(twin, embedded, hidden, position, every, every.expand(recipe.distill.steps, -1))
            _ = twin.normed(output.flatten(0, 1))  # a graph lives by its end
    graph = sum(size for storage, size in kept.items() if storage not in own)
    moment = (_loss_bytes(recipe, head, kind), _scores_bytes(recipe, head, kind), _mlp_bytes(recipe, head))
    return features.nbytes + graph + max(moment)


def _loss_bytes(recipe: Recipe, head: DraftHead, kind: str) -> int:
    """The loss makes its gradients on the way forward: of the outputs of all steps, and of the output layer."""
    rows, length = padded(recipe.data)
    width, vocabulary = head.config.hidden_size, head.config.draft_vocab_size
    outputs = recipe.distill.steps * rows * length
    mixed = recipe.train.mixed_precision == "bf16"
    # Of the output layer, beside its gradients and the last part of them.
    precision, copies = (2, 1) if mixed else (4, 0)
    trained = sum(p.numel() for p in head.lm_head.parameters() if p.requires_grad)
    part = part_size(vocabulary, kind) * width * precision if trained else 0
    layer = vocabulary * width * precision * copies + trained * 4 + part
    chunk, group, _ = sizes(kind)
    slopes = min(group, outputs) * vocabulary * precision
    alone = weighted(recipe.distill.objectives) is forward_kl
    made = _WRITTEN_OUT if alone else max(_OBJECTIVE.get(name, 8) for name in recipe.distill.objectives)
    return outputs * width * precision + layer + slopes + made * 4 * min(chunk, outputs * vocabulary)


def _mlp_bytes(recipe: Recipe, head: DraftHead) -> int:
    """What a layer's MLP makes again on the way back, and the gradients of it, where that was not kept."""
    if not recipe.train.gradient_checkpointing:
        return 0
    rows, length = padded(recipe.data)
    precision = 2 if recipe.train.mixed_precision == "bf16" else 4
    return 6 * rows * length * head.config.intermediate_size * precision


def _scores_bytes(recipe: Recipe, head: DraftHead, kind: str) -> int:
    """What attention makes for a block on the way back."""
    rows, length = padded(recipe.data)
    block = min(length, block_size(kind))
    return _SCORES * 4 * rows * head.config.num_attention_heads * block * (length + recipe.distill.steps)
