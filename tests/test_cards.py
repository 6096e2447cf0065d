"""What is done for a card, as far as a CPU can tell: calls are looked at, and tensors that claim to lie on one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_plan import recipe
from tiny import VOCAB, tiny_head, tiny_target
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from slipstream import quickstart as quick
from slipstream.configs.recipe import Recipe
from slipstream.decode import evaluate
from slipstream.decode import plan as measuring
from slipstream.decode.costs import PROBES, CostProbe
from slipstream.decode.plan import Contender, Plan
from slipstream.decode.speculation import target_costs
from slipstream.decode.suite import header
from slipstream.distill import attention, loss
from slipstream.distill.compilation import STATIC, Compilation
from slipstream.distill.objectives import forward_kl
from slipstream.distill.unroll import unroll
from slipstream.train.footprint import batch_bytes

CUDA = torch.device("cuda")
ROWS = [{"question_id": i, "category": "", "task": "all", "turns": ["Hi", "Yo"]} for i in range(3)]


def test_cudnn_does_not_attend_where_a_target_lies_on_a_card(monkeypatch):
    told: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", told.append)
    target = tiny_target()
    target.place(torch.device("cpu"))
    assert told == []
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)
    target.place(CUDA)
    assert told == [False]
    monkeypatch.setattr(type(target.model), "device", CUDA)
    target.reading([1])  # is made anew
    assert told == [False, False]


def test_of_masked_attention_groups_are_laid_out_on_a_card(monkeypatch):
    query, key, value = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    visible = torch.rand(2, 5, 9) > 0.4
    visible[..., 0] = True
    calls: list[tuple[int, int, bool]] = []

    def kernel(query, key, value, attn_mask, enable_gqa):
        calls.append((key.shape[1], value.shape[1], enable_gqa))
        return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, enable_gqa=enable_gqa)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", kernel)
    grouped = attention.attend_masked(query, key, value, visible)
    laid_out = attention.attend_masked(query, *(x.repeat_interleave(2, 1) for x in (key, value)), visible)
    torch.testing.assert_close(grouped, laid_out)
    with FakeTensorMode():
        there = (torch.empty(x.shape, device="cuda") for x in (query, key, value))
        out = attention.attend_masked(*there, torch.empty(visible.shape, dtype=torch.bool, device="cuda"))
    assert out.shape == query.shape
    assert calls == [(3, 3, True), (6, 6, False), (6, 6, False)]


def test_batches_that_are_timed_are_where_the_target_is(tmp_path, monkeypatch):
    seen = []
    config = SimpleNamespace(hidden_size=8)
    target = SimpleNamespace(
        device=torch.device("meta"), layer_ids=[1], config=config, capture=lambda ids: seen.append(ids.device)
    )
    monkeypatch.setattr(quick, "Trainer", lambda *given: SimpleNamespace(time_steps=lambda count: 1.0))
    job = quick.Quickstart(tmp_path, 1.0, False, Recipe())
    job._plan(job.recipe, target, None, [SimpleNamespace(input_ids=torch.ones(1, 4, dtype=torch.long))])
    assert seen == [target.device]


def test_a_quickstart_that_goes_on_decodes_where_a_fresh_one_does(tmp_path, monkeypatch):
    """All but the tuning and measuring was done before."""
    places, decoders = [], []

    def load(name, *, device, **given):
        places.append(device)
        return SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16, name="target")

    def load_head(folder, *, dtype, device):
        places.append(str(device))

    monkeypatch.setattr(quick, "find_device", lambda asked: "cuda:0")
    monkeypatch.setattr(quick, "load_target", load)
    monkeypatch.setattr(quick, "load_head", load_head)
    monkeypatch.setattr(quick, "HeadDrafter", lambda head, target: None)
    monkeypatch.setattr(quick, "Decoder", lambda target, *given: target)
    monkeypatch.setattr(quick.Policy, "load", lambda folder: None)
    for name in ("write_card", "write_report", "results_table"):
        monkeypatch.setattr(quick, name, lambda *given, **named: "")
    for stage in ("train", "compile"):
        monkeypatch.setattr(quick.Quickstart, stage, lambda job, target: None)
    monkeypatch.setattr(quick.Quickstart, "tune", lambda job, decoder: decoders.append(decoder.device))

    def measure(job, decoder):
        decoders.append(decoder.device)
        (job.out / "results.json").write_text("{}")

    monkeypatch.setattr(quick.Quickstart, "measure", measure)
    quick.quickstart(tmp_path / "run", 1.0)
    assert places == ["cuda:0", "cuda:0"]
    assert decoders == [torch.device("cuda:0")] * 2


def _decoder(how: Compilation | None):
    return SimpleNamespace(target=SimpleNamespace(compiled=how))


@pytest.mark.parametrize("how", [None, Compilation(static=False), STATIC])
def test_where_graphs_are_recorded_every_row_is_answered_before_any_is_timed(how, monkeypatch):
    asked = []

    def answer_batch(decoder, rule, rows, *, max_new_tokens, **given):
        asked.append(([row["question_id"] for row in rows], len(rows[0]["turns"]), max_new_tokens))
        return [evaluate.Record("all")] * len(rows)

    monkeypatch.setattr(evaluate, "answer_batch", answer_batch)
    evaluate.compare([(_decoder(how), "exact")], ROWS, max_new_tokens=20, label="")
    whole = [([i], 2, 20) for i in range(3)]
    assert asked == ([*whole, *whole] if how is STATIC else [([0], 1, 8), *whole])


@pytest.mark.parametrize("how", [None, STATIC])
def test_all_contenders_are_warm_before_a_setting_is_measured(how, tmp_path, monkeypatch):
    asked = []

    def answering(kind):
        def answer_batch(decoder, rule, rows, *, temperature, **given):
            asked.append((kind, rule, temperature, len(rows)))
            return [evaluate.Record("all")] * len(rows)

        return answer_batch

    monkeypatch.setattr(evaluate, "answer_batch", answering("warm"))
    monkeypatch.setattr(measuring, "answer_batch", answering("timed"))
    contenders = [Contender(rule, None, _decoder(how)) for rule in ("engine", "exact")]
    plan = Plan(temperatures=(0.0, 1.0), batch_sizes=(2,))
    measuring.measure(contenders, ROWS, plan, tmp_path / "journal", tmp_path / "parts", {})
    sizes = (1,) if how is STATIC else (2,)  # batches run without graphs
    assert asked == [
        call
        for heat in (0.0, 1.0)
        for call in (
            *(("warm", rule, heat, size) for rule in ("engine", "exact") for size in sizes),
            *(("timed", rule, heat, size) for size in (2, 1) for rule in ("engine", "exact")),
        )
    ]


@pytest.mark.parametrize("how", [None, STATIC])
def test_every_probe_has_run_before_one_is_timed(how, monkeypatch):
    short, long = torch.ones(1, 4), torch.ones(1, 300)  # whose caches are of two sizes
    probe, untimed = CostProbe(_decoder(how), [long, torch.ones(1, 6), short]), []

    def run(shape, rule, tokens, clock=None, prompt=None):
        if clock is not None:
            clock.prompts.append(1.0)
            clock.seconds.append((1.0, 1.0, 1.0))
            return
        assert not any(clock.seconds for clock in probe._clocks.values())
        untimed.append((shape, rule, prompt))

    monkeypatch.setattr(probe, "_run", run)
    probe.measure()
    wanted = [(shape, rule, prompt) for prompt in (long, short) for rule in ("exact", "mars") for shape in PROBES]
    assert untimed == (wanted if how is STATIC else [(PROBES[-1], "mars", None)])


def test_a_compiled_forward_of_many_nodes_finds_room(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **given: function)
    target = tiny_target(max_position_embeddings=1024)
    target.compile(static=True)
    assert target_costs(target, 300, repeats=1)[300] > 0


def test_results_name_the_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    target = SimpleNamespace(
        device=torch.device("cuda:1"), compiled=STATIC, name="target", dtype=torch.bfloat16, think=None
    )
    assert header(target, "none", 0)["device"] == "cuda:1 (card 1), compiled"


def test_the_loss_in_a_cards_chunks_is_that_in_a_cpus(monkeypatch):
    target = tiny_target()
    head, ids = tiny_head(target), torch.randint(3, VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    found = []
    for sizes in (loss.sizes("cpu"), loss.sizes("cuda"), loss.Sizes(3 * VOCAB, 7, 5 * VOCAB)):
        monkeypatch.setattr(loss, "sizes", lambda device, sizes=sizes: sizes)
        mask, head.lm_head.weight.grad = torch.ones(2, 30, dtype=torch.bool), None
        out = unroll(head, target, ids, mask, scale=torch.ones(2), objective=forward_kl)
        out.total.backward()
        found.append((out.total.detach(), head.lm_head.weight.grad))
    for total, slope in found[1:]:
        torch.testing.assert_close(total, found[0][0])
        torch.testing.assert_close(slope, found[0][1], rtol=1e-4, atol=1e-5)


def test_what_a_card_makes_at_once_is_planned_for():
    target = tiny_target()
    settings = recipe(".")
    settings = replace(settings, data=replace(settings.data, batch_tokens=2**16))
    head = tiny_head(target)
    cpu, card = loss.sizes("cpu"), loss.sizes("card")
    assert tuple(cpu) == (2**20, 1024, 3 * 2**20)
    before, after = (batch_bytes(settings, target, head, kind) for kind in ("cpu", "card"))
    more = card.teacher // target.vocab_size - cpu.teacher // target.vocab_size
    assert after["teacher"] > before["teacher"]
    assert after["teacher"] - before["teacher"] <= more * target.vocab_size * (
        loss.TEACHER_GROUP * target.dtype.itemsize + 4
    )
    assert after["unrolled head"] > before["unrolled head"]
