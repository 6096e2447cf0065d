"""Training-time test against a naive loop, and the numbers it reports."""

import pytest
import torch
from tiny import HEADS, VOCAB, tiny_head, tiny_target

from slipstream.distill.attention import UnrollAttention
from slipstream.distill.objectives import OBJECTIVES, Teacher, forward_kl, lk_lambda, overlap, total_variation
from slipstream.distill.unroll import unroll


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
@pytest.mark.parametrize("name", OBJECTIVES)
def test_unroll_equals_a_naive_loop_over_rows_and_steps(name, kind):
    target = tiny_target()
    head = tiny_head(target, **HEADS[kind])
    target = target.reading(head.layer_ids)
    torch.manual_seed(3)
    ids = torch.randint(3, VOCAB, (12,))
    mask = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1]).bool()
    out = unroll(head, target, ids[None], mask[None], steps=3, objective=OBJECTIVES[name])
    with torch.no_grad():
        losses, rows, hits, tried = naive(head, target, ids, mask, 3, OBJECTIVES[name])
    torch.testing.assert_close(out.loss.detach(), losses, rtol=1e-4, atol=1e-4)
    assert out.rows.tolist() == rows.tolist()
    assert out.hits.tolist() == hits.tolist()
    assert int(out.tried) == tried


def test_padding_and_neighbours_in_the_batch_change_nothing():
    target = tiny_target()
    head = tiny_head(target)
    torch.manual_seed(4)
    a, b = torch.randint(3, VOCAB, (9,)), torch.randint(3, VOCAB, (14,))
    ids, mask = torch.zeros(2, 14, dtype=torch.long), torch.zeros(2, 14, dtype=torch.bool)
    ids[0, :9], ids[1] = a, b
    mask[0, 4:9], mask[1, 6:] = True, True
    both = unroll(head, target, ids, mask, steps=3, objective=forward_kl)
    one = unroll(head, target, a[None], mask[:1, :9], steps=3, objective=forward_kl)
    two = unroll(head, target, b[None], mask[1:], steps=3, objective=forward_kl)
    torch.testing.assert_close(both.loss, one.loss + two.loss, rtol=1e-4, atol=1e-4)
    assert both.rows.tolist() == (one.rows + two.rows).tolist()


def test_the_mask_belongs_to_the_predicted_token():
    # Tokens 3 and 4 are the assistant's. Row 1 predicts token 3, row 2 predicts token 4; row 3 would predict token 5.
    target = tiny_target()
    mask = torch.tensor([[0, 0, 0, 1, 1]]).bool()
    out = unroll(tiny_head(target, VOCAB), target, torch.arange(3, 8)[None], mask, steps=2, objective=forward_kl)
    assert out.positions[1].tolist() == [1, 2]
    assert out.rows.tolist() == [2, 1]  # at the second step only row 1 still has a label (token 4)


def test_gradients_of_the_chunked_loss_are_those_of_autograd():
    target = tiny_target()
    head = tiny_head(target)
    ids, mask = torch.arange(3, 23)[None], torch.ones(1, 20, dtype=torch.bool)
    unroll(head, target, ids, mask, steps=1, objective=lk_lambda).loss.sum().backward()
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


def test_the_feature_weight_adds_smooth_l1_to_the_targets_own_state_of_the_predicted_token():
    target = tiny_target()
    head = tiny_head(target, VOCAB)
    ids, mask = torch.arange(3, 13)[None], torch.ones(1, 10, dtype=torch.bool)
    settings = {"steps": 1, "objective": forward_kl}
    plain = unroll(head, target, ids, mask, **settings)
    both = unroll(head, target, ids, mask, feature_weight=2.0, **settings)
    aim = target.model.base_model(input_ids=ids).last_hidden_state[
        0, 1:9
    ]  # row p predicts token p+2, as state p+1 does
    e = torch.cat([target.embeddings(ids)[:, 1:], torch.zeros(1, 1, 32)], 1)
    hidden = head(e, head.fuse(target.forward(ids).features), torch.arange(10)[None], UnrollAttention())[0, :8]
    size = aim.square().mean().sqrt()
    distance = torch.nn.functional.smooth_l1_loss(head.norm(hidden) / size, aim / size, reduction="none").mean(-1).sum()
    torch.testing.assert_close(both.loss[0], plain.loss[0] + 2 * distance, rtol=1e-4, atol=1e-4)


def test_objectives_by_hand():
    teacher = Teacher(torch.tensor([[0.5, 0.25]]), torch.tensor([0]), torch.tensor([True]))  # a quarter lies outside
    q = torch.tensor([[0.8, 0.2]])
    assert overlap(q.log(), teacher).item() == pytest.approx(0.5 + 0.2)
    assert total_variation(q.log(), teacher).item() == pytest.approx(0.3)
    expected = -(2 / 3 * q[0, 0].log() + 1 / 3 * q[0, 1].log()).item()
    assert forward_kl(q.log(), teacher).item() == pytest.approx(expected)
    lam = torch.exp(torch.tensor(-3 * 0.7)).item()
    assert lk_lambda(q.log(), teacher).item() == pytest.approx(lam * expected + (1 - lam) * 0.3)
