"""Speculation schedules: the output stays `generate`'s, and the tree follows how the drafts fare."""

import pytest
import torch
from tiny import OracleDrafter, greedy, tiny_head, tiny_target

from slipstream.configs.errors import SlipstreamError
from slipstream.decode.drafters import HeadDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.policy import Policy
from slipstream.decode.speculation import SCHEDULES, Confidence, CostAware, Entropy, Heuristic, Speculation
from slipstream.decode.tree import TreeShape, graft, make_tree


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", [TreeShape.chain(4), TreeShape(4, 3, 12), TreeShape.fixed((3, 2, 1))])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_output_stays_that_of_generate(schedule, shape, batch):
    target = tiny_target()
    prompts = torch.randint(3, 90, (batch, 7), generator=torch.Generator().manual_seed(2))
    truth = greedy(target, prompts, 40)
    policy = Policy(tree=shape, speculation=Speculation(schedule))
    for drafter in (HeadDrafter(tiny_head(target), target), OracleDrafter(truth)):
        out = Decoder(target, drafter, policy).generate(prompts, max_new_tokens=40)
        assert out.sequences.tolist() == truth[:, : out.sequences.shape[1]].tolist()


@pytest.mark.parametrize("nodes", [12, 60])
def test_costs_are_measured_within_a_short_context(nodes):
    """Learned positions end with it; a tree may have more nodes than it has tokens."""
    target = tiny_target("gpt2", n_positions=48, max_position_embeddings=48)
    policy = Policy(tree=TreeShape(4, 4, nodes), speculation=Speculation("cost"))
    prompt = torch.arange(3, 9)[None]
    out = Decoder(target, HeadDrafter(tiny_head(target), target), policy).generate(prompt, max_new_tokens=12)
    assert out.sequences.tolist() == greedy(target, prompt, 12).tolist()


def _chain(scores):
    """A chain whose drafts have these probabilities."""
    count = len(scores) + 1
    total = torch.tensor([[1.0, *scores]]).log().cumsum(1)
    return make_tree(torch.arange(count)[None], (torch.arange(count) - 1).clamp(min=0)[None], total, len(scores))


def test_the_heuristic_goes_two_deeper_after_full_acceptance_and_one_back_otherwise():
    schedule = Heuristic(TreeShape.chain(3))
    depths = []
    for accepted in (3, 5, 2, 0, 5):
        depths.append(schedule.shape().depth)
        schedule.observe(_chain([0.5] * depths[-1]), [list(range(accepted + 1))], 0.0, 0.0)
    assert depths == [3, 5, 7, 6, 5]
    assert schedule.shape() == TreeShape.chain(7)


def test_confidence_and_entropy_stop_where_the_draft_is_unsure():
    sure, unsure = torch.tensor([0.9, 0.05, 0.05]).log(), torch.full((3,), 1 / 3).log()
    for schedule in (Confidence(TreeShape(), 0.4), Entropy(TreeShape(), 0.7)):
        assert not schedule.enough(torch.stack([unsure, sure])[None])
        assert schedule.enough(unsure[None, None])


def test_the_confidence_threshold_moves_to_where_drafts_stop_being_worth_it():
    low, high = Confidence(TreeShape.chain(1), 0.4), Confidence(TreeShape.chain(1), 0.4)
    for i in range(60):
        sure = i % 2
        low.observe(_chain([0.3 if sure else 0.1]), [[0, 1] if sure else [0]], 0.0, 0.0)
        high.observe(_chain([0.9 if sure else 0.7]), [[0, 1] if sure else [0]], 0.0, 0.0)
    assert 0.1 < low.threshold <= 0.3
    assert 0.7 < high.threshold <= 0.9


def _learnt_slowly(tree, paths):
    """What `Confidence` learns from a round, node by node."""
    seen = []
    for row, path in enumerate(paths):
        for depth in range(1, min(len(path), tree.levels) + 1):
            level = [
                n for n in range(tree.nodes) if int(tree.depths[row, n]) == depth and tree.scores[row, n].isfinite()
            ]
            if not level:
                break
            node = max(level, key=lambda n: float(tree.scores[row, n]))
            own = (tree.scores[row, node] - tree.scores[row, tree.parents[row, node]]).exp()
            seen.append((pytest.approx(float(own)), node in path))
    return seen


@pytest.mark.parametrize("copied", [0, 3])
def test_confidence_learns_from_the_likeliest_draft_of_each_level(copied):
    draw = torch.Generator().manual_seed(copied)
    for _ in range(20):
        parents = torch.stack([torch.randint(0, max(1, n), (2,), generator=draw) for n in range(12)], 1)
        scores = torch.zeros(2, 12)
        for node in range(1, 12):
            step = torch.rand(2, generator=draw).log()
            scores[:, node] = scores.gather(1, parents[:, node, None])[:, 0] + step
        tree = make_tree(torch.zeros(2, 12, dtype=torch.long), parents, scores, levels=11)
        if copied:
            tree = graft(tree, torch.ones(2, 14, dtype=torch.long), copied)
        leaves = torch.randint(0, tree.nodes, (2,), generator=draw)
        paths = [tree.ancestors[row, leaf].nonzero()[:, 0].tolist() for row, leaf in enumerate(leaves)]
        schedule = Confidence(TreeShape(), 0.4)
        schedule.observe(tree, paths, 0.0, 0.0)
        assert schedule.seen == _learnt_slowly(tree, paths)


def _rounds(schedule, accepted, rounds=40):
    """Drive a schedule with drafts of probability .6 of which `accepted` pass; times of 1 ms a level."""
    shapes = []
    for _ in range(rounds):
        shape = schedule.shape()
        shapes.append(shape)
        if shape is None:
            schedule.observe(
                make_tree(*(torch.zeros(1, 1, dtype=torch.long),) * 2, torch.zeros(1, 1), 0), [[0]], 0.0, 0.010
            )
            continue
        depth = shape.depth
        path = list(range(min(accepted, depth) + 1))
        schedule.observe(_chain([0.6] * depth), [path], 0.001 * (depth + 1), schedule.costs[depth + 1])
    return shapes


def test_cost_aware_speculation_switches_itself_off_and_looks_again_now_and_then():
    costs = {1: 0.010, 4: 0.011, 8: 0.012, 2: 0.010, 3: 0.010, 5: 0.011}
    shapes = _rounds(CostAware(TreeShape(4, 1, 5), costs), accepted=0)
    assert sum(shape is None for shape in shapes) > 30
    assert shapes[-9:].count(None) < 40
    assert any(shape is not None for shape in shapes[10:])


def test_cost_aware_speculation_drafts_deep_where_drafts_pass_and_stops_where_verifying_gets_dear():
    flat = {1: 0.010, 4: 0.010, 5: 0.010, 2: 0.010, 3: 0.010}
    assert _rounds(CostAware(TreeShape(4, 1, 5), flat), accepted=4)[-1].depth == 4
    steep = {1: 0.010, 2: 0.011, 3: 0.02, 4: 0.05, 5: 0.1}
    last = _rounds(CostAware(TreeShape(4, 1, 5), steep), accepted=4, rounds=31)[-1]
    assert last is None or last.depth < 4


def test_a_schedule_survives_the_policy_file_and_wrong_ones_are_named(tmp_path):
    policy = Policy(tree=TreeShape.fixed((2, 1)), speculation=Speculation("confidence", 0.5))
    policy.save(tmp_path)
    assert Policy.load(tmp_path) == policy
    with pytest.raises(SlipstreamError, match="did you mean 'entropy'"):
        Speculation("entrophy")
    with pytest.raises(SlipstreamError, match="out of range"):
        Speculation("confidence", 1.5)
