"""Training-time test against a naive loop, and the numbers it reports."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import HEADS, VOCAB, tiny_head, tiny_target

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.recipe import DistillSettings
from slipstream.data.batches import join
from slipstream.decode.evidence import LogitEvidence
from slipstream.decode.tree import make_tree
from slipstream.decode.verify import Spent, Verifier, decide_greedily
from slipstream.distill import attention, loss
from slipstream.distill.attention import UnrollAttention
from slipstream.distill.objectives import (
    MARGIN_AWARE,
    OBJECTIVES,
    Teacher,
    forward_kl,
    lk_lambda,
    lk_margin,
    margin_mass,
    overlap,
    total_variation,
    tree_hinge,
)
from slipstream.distill.relaxation import Relaxation
from slipstream.distill.unroll import Distillation, labelled_rows, unroll


def naive(head, target, ids, mask, steps, objective):
    """One conversation [L], row by row, step by step, with every attention written out; sums like `unroll`."""
    length = len(ids)
    out = target.forward(ids[None])
    embedded = target.embeddings(ids)
    attn = head.midlayer.self_attn
    kv = {}  # (step, row, layer) -> key, value per head

    def run(step, row, hidden):
        """The head at one row of one step; hidden [H]."""
        at = row + 1 + step
        e = embedded[at] if at < length else torch.zeros_like(embedded[0])

        def attend(q, k, v, layer):
            kv[step, row, layer] = (k[0, :, 0], v[0, :, 0])
            seen = [(0, r, layer) for r in range(row + 1)] + [(s, row, layer) for s in range(1, step + 1)]
            groups = q.shape[1] // k.shape[1]
            result = torch.zeros_like(q)
            for h in range(q.shape[1]):
                keys = torch.stack([kv[i][0][h // groups] for i in seen])
                values = torch.stack([kv[i][1][h // groups] for i in seen])
                result[0, h, 0] = torch.softmax(keys @ q[0, h, 0] / attn.head_dim**0.5, 0) @ values
            return result

        e, hidden = head.embed(e)[None, None], hidden[None, None]
        if step and head.config.kind == "parallel":
            e, hidden = head.masks(1, 1)
        return head(e, hidden, torch.tensor([[row + step]]), attend)[0, 0]

    hidden = {row: head.fuse(out.features[0, row]) for row in range(length)}
    losses, rows, hits = [0.0] * steps, [0] * steps, [0] * steps
    counting = [p for p in range(length - 2) if mask[p + 2]]
    alive = dict.fromkeys(counting, True)
    whole = {p for p in counting if p + 1 + steps < length and all(mask[p + 2 : p + 2 + steps])}
    for step in range(steps):
        hidden = {row: run(step, row, hidden[row]) for row in range(length)}
        for p in counting:
            label = p + 2 + step
            if label >= length or not mask[label]:
                alive[p] = False
                continue
            p_full = torch.softmax(out.logits[0, label - 1], -1)
            inside, best = p_full[head.vocabulary()], p_full.argmax()
            logits = head.logits(hidden[p])
            if head.t2d[best]:
                teacher = Teacher(inside[None], best[None], torch.tensor([True]))
                losses[step] += float(objective(logits[None], teacher))
                rows[step] += 1
            alive[p] = alive[p] and bool(head.vocabulary()[logits.argmax()] == best)
            hits[step] += alive[p] and p in whole
    return torch.tensor(losses), torch.tensor(rows), torch.tensor(hits), len(whole)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("name", "multiple"), [("forward_kl", 1), ("lk_lambda", 32)])
def test_unroll_equals_a_naive_loop_over_rows_and_steps(name, multiple, kind, monkeypatch):
    monkeypatch.setattr("slipstream.distill.unroll.MULTIPLE", multiple)  # rows that count alone, or all of them
    target = tiny_target()
    head = tiny_head(target, **HEADS[kind])
    target = target.reading(head.layer_ids)
    torch.manual_seed(3)
    ids = torch.randint(3, VOCAB, (12,))
    mask = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1]).bool()
    out = unroll(head, target, ids[None], mask[None], scale=torch.ones(3), objective=OBJECTIVES[name])
    with torch.no_grad():
        losses, rows, hits, tried = naive(head, target, ids, mask, 3, OBJECTIVES[name])
    torch.testing.assert_close(out.loss.detach(), losses, rtol=1e-4, atol=1e-4)
    assert out.rows.tolist() == rows.tolist()
    assert out.hits.tolist() == hits.tolist()
    assert int(out.tried) == tried


def attend_densely(query, key, value, keys, values):
    """Causal attention with a diagonal by its definition: [L, L + k] scores under one softmax."""
    groups = query.shape[1] // key.shape[1]
    key, value, keys, values = (x.repeat_interleave(groups, -3) for x in (key, value, keys, values))
    length = query.shape[2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    causal = (query @ key.transpose(-1, -2)).float().masked_fill(future, float("-inf"))
    diagonal = (query * keys).sum(-1).movedim(0, -1).float()  # [B, heads, L, k]
    weights = torch.softmax(torch.cat([causal, diagonal], -1) * query.shape[-1] ** -0.5, -1).to(query.dtype)
    own = weights[..., length:].movedim(-1, 0).unsqueeze(-1) * values
    return weights[..., :length] @ value + own.sum(0)


@pytest.mark.parametrize(("length", "groups"), [(5, 2), (64, 4), (150, 1), (800, 2)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("amx", [True, False])
def test_merged_attention_and_its_gradients_are_those_of_the_definition(dtype, close, length, groups, amx, monkeypatch):
    monkeypatch.setattr(attention, "has_amx", lambda x: amx)
    draw = torch.Generator().manual_seed(0)
    sizes = [(2, length, 4, 16), *[(2, length, groups, 16)] * 6]
    parts = [torch.randn(size, generator=draw).to(dtype).requires_grad_() for size in sizes]
    query, key, value, *later = (part.transpose(1, 2) for part in parts)  # as projections come
    attend = UnrollAttention()
    first = attend(query, key, value, 0)
    attend(query, later[0], later[1], 0)
    third = attend(query, later[2], later[3], 0)
    none = torch.empty(0, *key.shape, dtype=dtype)
    for ours, own in ((first, (none, none)), (third, (torch.stack(later[::2]), torch.stack(later[1::2])))):
        plain = attend_densely(query, key, value, *own)
        torch.testing.assert_close(ours, plain, rtol=close, atol=close)
        weight = torch.randn(ours.shape, generator=draw).to(dtype)
        which = parts if ours is third else parts[:3]
        for mine, theirs in zip(*(torch.autograd.grad((x * weight).sum(), which) for x in (ours, plain)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=close, atol=close * theirs.abs().max().item())


def test_padding_and_neighbours_in_the_batch_change_nothing():
    target = tiny_target()
    head = tiny_head(target)
    torch.manual_seed(4)
    a, b = torch.randint(3, VOCAB, (9,)), torch.randint(3, VOCAB, (14,))
    ids, mask = torch.zeros(2, 14, dtype=torch.long), torch.zeros(2, 14, dtype=torch.bool)
    ids[0, :9], ids[1] = a, b
    mask[0, 4:9], mask[1, 6:] = True, True
    both = unroll(head, target, ids, mask, scale=torch.ones(3), objective=forward_kl)
    one = unroll(head, target, a[None], mask[:1, :9], scale=torch.ones(3), objective=forward_kl)
    two = unroll(head, target, b[None], mask[1:], scale=torch.ones(3), objective=forward_kl)
    torch.testing.assert_close(both.loss, one.loss + two.loss, rtol=1e-4, atol=1e-4)
    assert both.rows.tolist() == (one.rows + two.rows).tolist()


@pytest.mark.parametrize(("kind", "amx"), [*((kind, False) for kind in HEADS), ("eagle3", True)])
def test_conversations_in_one_row_teach_what_each_teaches_alone(kind, amx, monkeypatch):
    monkeypatch.setattr(attention, "has_amx", lambda x: amx)
    target = tiny_target()
    head = tiny_head(target, **HEADS[kind])
    target = target.reading(head.layer_ids)
    draw = torch.Generator().manual_seed(4)
    texts = [torch.randint(3, VOCAB, (length,), generator=draw) for length in (9, 70, 2, 1, 80, 5)]
    masks = [torch.rand(len(text), generator=draw) < 0.7 for text in texts]
    masks[1][0] = masks[4][:3] = True  # the assistant's from the first token on, behind another conversation's end
    joined = join([{"input_ids": text, "mask": mask} for text, mask in zip(texts, masks, strict=True)], [*range(6)])
    settings = {"scale": torch.tensor([1.0, 0.8, 0.6]), "objective": forward_kl}

    def gradients(total: torch.Tensor) -> dict[str, torch.Tensor]:
        head.zero_grad()
        total.backward()
        return {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}

    packed = unroll(head, target, joined.input_ids, joined.mask, starts=joined.starts, **settings)
    alone = [unroll(head, target, ids[None], mask[None], **settings) for ids, mask in zip(texts, masks, strict=True)]
    torch.testing.assert_close(packed.loss, sum(out.loss for out in alone), rtol=1e-4, atol=1e-4)
    for name in ("rows", "hits", "tried"):
        assert torch.equal(getattr(packed, name), sum(getattr(out, name) for out in alone)), name
    assert torch.equal(packed.accepted, torch.cat([out.accepted for out in alone]))
    assert torch.equal(
        labelled_rows(joined.mask, 3, joined.starts), sum(labelled_rows(mask[None], 3) for mask in masks)
    )
    mine, theirs = gradients(packed.total), gradients(sum(out.total for out in alone))
    for name, grad in theirs.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-3, atol=1e-4)


def test_the_mask_belongs_to_the_predicted_token():
    # Tokens 3 and 4 are the assistant's. Row 1 predicts token 3, row 2 predicts token 4; row 3 would predict token 5.
    target = tiny_target()
    mask = torch.tensor([[0, 0, 0, 1, 1]]).bool()
    out = unroll(
        tiny_head(target, VOCAB), target, torch.arange(3, 8)[None], mask, scale=torch.ones(2), objective=forward_kl
    )
    assert out.positions[1].tolist() == [1, 2]
    assert out.rows.tolist() == [2, 1]  # at the second step only row 1 still has a label (token 4)


@pytest.mark.parametrize("part", [loss.PART, 40])
def test_gradients_of_the_chunked_loss_are_those_of_autograd(part, monkeypatch):
    monkeypatch.setattr(loss, "PART", part)
    target = tiny_target()
    head = tiny_head(target)
    ids, mask = torch.arange(3, 23)[None], torch.ones(1, 20, dtype=torch.bool)
    unroll(head, target, ids, mask, scale=torch.ones(1), objective=lk_lambda).total.backward()
    chunked = {n: p.grad.clone() for n, p in head.named_parameters()}
    head.zero_grad()
    out = target.forward(ids)
    attend = UnrollAttention()
    e = torch.cat([target.embeddings(ids)[:, 1:], torch.zeros(1, 1, 32)], 1)
    hidden = head(e, head.fuse(out.features), torch.arange(20)[None], attend)[0, :18]
    p = torch.softmax(out.logits[0, 1:19], -1)
    best = p.argmax(-1)
    teacher = Teacher(p[:, head.vocabulary()], best, head.t2d[best])
    (lk_lambda(head.logits(hidden), teacher) * teacher.covered).sum().backward()
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(chunked[name], parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [3, 700])
def test_forward_kl_written_out_is_that_by_autograd(rows, monkeypatch):
    monkeypatch.setattr(loss, "sizes", lambda kind: loss.Sizes(90 * 16, 40, 2**20))
    draw = torch.Generator().manual_seed(0)
    p = torch.softmax(4 * torch.randn(20, 90, generator=draw), -1)
    p = torch.cat(
        [p * torch.linspace(0, 1, 20)[:, None], torch.eye(90)[:1]]
    )  # some, or all, lies outside, or on one token
    teacher = Teacher(p, p.argmax(-1), torch.ones(21, dtype=torch.bool))
    which, scale = torch.arange(rows) % 21, torch.rand(rows, generator=draw) * (torch.arange(rows) % 4 > 0)
    parts = [3 * torch.randn(rows, 12, generator=draw), torch.randn(90, 12, generator=draw)]
    parts[0][0] *= 40  # logits in the hundreds
    results = []
    for objective in (forward_kl, lambda logits, teacher: forward_kl(logits, teacher)):
        for wanted in (True, False):
            hidden, output = (part.clone().requires_grad_(wanted) for part in parts)
            total, losses, guess = loss._ChunkedLoss.apply(hidden, output, teacher, which, scale, objective)
            gradients = torch.autograd.grad(total, (hidden, output)) if wanted else parts
            results.append((total.detach(), losses, guess, *(results[0][3:] if not wanted else gradients)))
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_batch_without_a_label_teaches_nothing():
    target = tiny_target()
    head = tiny_head(target)
    ids = torch.arange(3, 23)[None]
    out = unroll(head, target, ids, torch.zeros_like(ids).bool(), scale=torch.ones(3), objective=forward_kl)
    out.total.backward()
    assert (out.total.item(), out.tried.item(), out.rows.tolist()) == (0.0, 0, [0, 0, 0])
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())


def test_the_feature_weight_adds_smooth_l1_to_the_targets_own_state_of_the_predicted_token():
    target = tiny_target()
    head = tiny_head(target, VOCAB)
    ids, mask = torch.arange(3, 13)[None], torch.ones(1, 10, dtype=torch.bool)
    settings = {"scale": torch.ones(1), "objective": forward_kl}
    plain = unroll(head, target, ids, mask, **settings)
    both = unroll(head, target, ids, mask, feature_weight=2.0, **settings)
    aim = target.model.base_model(input_ids=ids).last_hidden_state[
        0, 1:9
    ]  # row p predicts token p+2, as state p+1 does
    e = torch.cat([target.embeddings(ids)[:, 1:], torch.zeros(1, 1, 32)], 1)
    hidden = head(e, head.fuse(target.forward(ids).features), torch.arange(10)[None], UnrollAttention())[0, :8]
    size = aim.square().mean(-1, keepdim=True).sqrt()
    distance = torch.nn.functional.smooth_l1_loss(head.norm(hidden) / size, aim / size, reduction="none").mean(-1).sum()
    torch.testing.assert_close(both.loss[0], plain.loss[0] + 2 * distance, rtol=1e-4, atol=1e-4)


PLAIN = [name for name in OBJECTIVES if name not in MARGIN_AWARE]


@pytest.mark.parametrize("name", PLAIN)
def test_every_objective_is_summed_over_the_rows_that_count(name):
    target = tiny_target()
    head = tiny_head(target)
    ids = torch.randint(3, VOCAB, (12,), generator=torch.Generator().manual_seed(5))
    mask = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1]).bool()
    out = unroll(head, target, ids[None], mask[None], scale=torch.ones(2), objective=OBJECTIVES[name])
    with torch.no_grad():
        losses = naive(head, target, ids, mask, 2, OBJECTIVES[name])[0]
    torch.testing.assert_close(out.loss.detach(), losses, rtol=1e-4, atol=1e-4)


NEVER = (3, 4, 5, 6, 7, 8, 9, 10)
RELAXATIONS = [Relaxation("margin", 0.7, NEVER), Relaxation("ratio", 0.6, NEVER), Relaxation("odds", 0.5, NEVER)]


@pytest.mark.parametrize("relaxation", RELAXATIONS, ids=lambda relaxation: relaxation.signal)
def test_what_training_calls_acceptable_is_what_the_verifier_accepts(relaxation):
    logits = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    verifier = Verifier("mars", relaxation.signal, relaxation.threshold)
    accepted = relaxation.acceptable(logits)
    seen = 0
    for row, (top, other) in zip(logits, accepted.tolist(), strict=True):
        for token in row.topk(3).indices.tolist():  # a tree of one draft: is it accepted?
            tree = make_tree(torch.tensor([[0, token]]), torch.tensor([[0, 0]]), torch.zeros(1, 2), 1)
            evidence = LogitEvidence(tree, torch.stack([row, row])[None])
            decision = decide_greedily(verifier, tree, evidence, [Spent()], torch.tensor(NEVER))
            assert (int(decision.counts) == 2) == (token in (top, other))
            seen += token == other
    assert 0 < seen < 64
    freely = replace(relaxation, never=()).acceptable(logits)
    assert seen < int((freely[:, 1] >= 0).sum())


def test_margin_aware_objectives_by_hand():
    # Tokens 0 and 2 would be accepted; of the second row only token 1, the third has none in the draft vocabulary.
    acceptable = torch.tensor([[0, 2], [1, -1], [-1, -1]])
    inside = torch.tensor([[0.5, 0.1, 0.4], [0.1, 0.8, 0.1], [0.2, 0.2, 0.2]])
    teacher = Teacher(inside, torch.tensor([0, 1, 7]), torch.tensor([True, True, False]), acceptable)
    q = torch.tensor([[0.2, 0.5, 0.3], [0.3, 0.6, 0.1], [0.3, 0.3, 0.4]])
    logits = q.log().requires_grad_()
    mass = margin_mass(logits, teacher)
    assert mass[:2].tolist() == pytest.approx([-math.log(0.5), -math.log(0.6)])
    lam = math.exp(-3 * 0.5)
    kl = -(0.5 * math.log(0.2) + 0.1 * math.log(0.5) + 0.4 * math.log(0.3))
    assert lk_margin(logits, teacher)[0].item() == pytest.approx(lam * kl - (1 - lam) * math.log(0.5), rel=1e-5)
    # Three tokens: the fourth likeliest is the last one, 0.2 and 0.1; the best of R is 0.3 and 0.6.
    hinge = [max(0.0, 1 + math.log(0.2) - math.log(0.3)), max(0.0, 1 + math.log(0.1) - math.log(0.6))]
    assert tree_hinge(logits, teacher)[:2].tolist() == pytest.approx(hinge, rel=1e-5)
    sum(part(logits, teacher)[:2].sum() for part in (margin_mass, lk_margin, tree_hinge)).backward()
    assert torch.isfinite(logits.grad).all()


def test_a_margin_aware_recipe_trains_and_needs_a_known_signal():
    target = tiny_target()
    settings = DistillSettings(objectives={"lk_margin": 1.0, "tree_hinge": 0.1}, relaxed_threshold=2.0)
    module = Distillation(tiny_head(target), target, settings, autocast=False)
    loss, _ = module(torch.arange(3, 23)[None], torch.ones(1, 20, dtype=torch.bool), torch.ones(2))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in module.head.parameters())
    with pytest.raises(SlipstreamError, match="did you mean 'margin'"):
        Distillation(tiny_head(target), target, replace(settings, relaxed_signal="margn"), autocast=False)


def test_objectives_by_hand():
    teacher = Teacher(torch.tensor([[0.5, 0.25]]), torch.tensor([0]), torch.tensor([True]))  # a quarter lies outside
    q = torch.tensor([[0.8, 0.2]])
    assert overlap(q.log(), teacher).item() == pytest.approx(0.5 + 0.2)
    assert total_variation(q.log(), teacher).item() == pytest.approx(0.3)
    expected = -(2 / 3 * q[0, 0].log() + 1 / 3 * q[0, 1].log()).item()
    assert forward_kl(q.log(), teacher).item() == pytest.approx(expected)
    lam = torch.exp(torch.tensor(-3 * 0.7)).item()
    assert lk_lambda(q.log(), teacher).item() == pytest.approx(lam * expected + (1 - lam) * 0.3)
