"""Attention by blocks against torch's own."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import VOCAB, tiny_target
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slipstream.distill import blocks
from slipstream.distill.target import Target


def draw(*sizes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 5, 64, 150])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_causal_attention_is_torchs(groups, length, dtype, close):
    query, key, value = draw((2, 4, length, 16), (2, groups, length, 16), (2, groups, length, 24), dtype=dtype)
    ours = blocks.attend(query, key, value, None, 0.3, causal=True)
    plain = scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, plain, rtol=close, atol=close)


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("kind", ["added", "bool", "of each head", "one row for all", None])
def test_masks_mean_what_they_mean_to_torch(rows, kind):
    query, key, value, added = draw((2, 4, rows, 16), (2, 2, 90, 16), (2, 2, 90, 16), (2, 4, rows, 90))
    sees = added[:, :1] > 0
    sees[..., 0] = True
    mask = {
        "added": torch.zeros(2, 1, rows, 90).masked_fill(~sees, torch.finfo(torch.float32).min),
        "bool": sees,
        "of each head": added,
        "one row for all": sees[:, :, :1],
        None: None,
    }[kind]
    ours = blocks.attend(query, key, value, mask, 0.25, causal=False)
    plain = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_targets_in_several_threads_do_not_see_each_other():
    ids = torch.randint(3, 90, (2, 100), generator=torch.Generator().manual_seed(0))
    targets = [tiny_target(seed=seed) for seed in (0, 1)]
    want = [target.forward(ids).logits for target in targets]
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(target.forward, ids) for _ in range(20) for target in targets]
    for future, logits in zip(found, want * 20, strict=True):
        assert torch.allclose(future.result().logits, logits, atol=1e-5)


def test_a_target_runs_through_it_and_leaves_the_model_as_it_was(monkeypatch):
    target = tiny_target()
    ids = torch.arange(3, 83)[None] % VOCAB
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    plain = target.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    calls = []
    attend = blocks.attend
    monkeypatch.setattr(blocks, "attend", lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs))
    captured = target.capture(ids)
    assert len(calls) == target.config.num_hidden_layers
    torch.testing.assert_close(captured.hidden, plain.hidden_states[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target.forward(ids).logits, plain.logits, rtol=1e-4, atol=1e-5)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is stock


@pytest.mark.parametrize(
    ("amx", "dtype", "blocked"), [(True, "bfloat16", 0), (False, "bfloat16", 4), (True, "float32", 4)]
)
def test_a_cpu_with_amx_reads_texts_by_torchs_kernel(monkeypatch, amx, dtype, blocked):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    calls = []
    attend = blocks.attend
    monkeypatch.setattr(blocks, "attend", lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs))
    target = Target(tiny_target().model.to(getattr(torch, dtype)))
    target.capture(torch.arange(3, 83)[None] % VOCAB)
    assert len(calls) == blocked


def test_texts_in_a_row_stay_apart_under_torchs_kernel_too(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    target = Target(tiny_target().model.to(torch.bfloat16))
    ids = torch.randint(3, VOCAB, (1, 120), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([[0] * 70 + [70] * 50])
    row = target.capture(ids, starts).hidden
    alone = torch.cat([target.capture(ids[:, :70]).hidden, target.capture(ids[:, 70:]).hidden], 1)
    torch.testing.assert_close(row, alone, rtol=0.05, atol=0.1)
