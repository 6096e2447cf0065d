"""Batched sampling of the target's own text: each row is what it is alone, however long, hot or short-lived its neighbours."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, greedy, tiny_target

from slipstream.decode.sampling import sample

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20], [8, 4], [30, 31, 32]]


def alone(target, prompt, new):
    return greedy(target, torch.tensor([prompt]), new)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_rows_are_those_of_generate(architecture):
    target = tiny_target(architecture)
    drawn = sample(target, PROMPTS, [0.0] * len(PROMPTS), max_new_tokens=24, stop_ids=[2], seed=0)
    assert drawn == [alone(target, prompt, 24) for prompt in PROMPTS]


def test_rows_end_at_a_stop_token_and_leave_the_others_as_they_are():
    target = tiny_target()
    whole = [alone(target, prompt, 24) for prompt in PROMPTS]
    stops = [whole[0][2], whole[3][5]]
    want = [row[: 1 + next((i for i, token in enumerate(row) if token in stops), len(row))] for row in whole]
    assert len({*map(len, want)}) > 2
    assert sample(target, PROMPTS, [0.0] * len(PROMPTS), max_new_tokens=24, stop_ids=stops, seed=0) == want


def test_prompts_of_one_token_need_no_forward_of_their_own():
    target = tiny_target()
    prompts = [[5], [9]]
    want = [alone(target, prompt, 8) for prompt in prompts]
    assert sample(target, prompts, [0.0, 0.0], max_new_tokens=8, stop_ids=[2], seed=0) == want


def test_draws_depend_on_the_seed_and_a_cold_row_on_nothing():
    target = tiny_target()

    def drawn(seed):
        return sample(target, PROMPTS, [1.0, 0.0, 1.0, 0.7, 0.0], max_new_tokens=16, stop_ids=[], seed=seed)

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert first == again
    assert [a == b for a, b in zip(first, other, strict=True)] == [False, True, False, False, True]
    assert first[1] == alone(target, PROMPTS[1], 16)


def test_draws_follow_the_target():
    """The first token of many equal prompts, against the target's distribution."""
    target, draws = tiny_target(), 20_000
    logits = target.forward(torch.tensor([PROMPTS[0]])).logits[0, -1]
    drawn = sample(target, [PROMPTS[0]] * draws, [1.0] * draws, max_new_tokens=1, stop_ids=[], seed=3)
    counts = torch.tensor([row[0] for row in drawn]).bincount(minlength=len(logits)).float()
    expected = torch.softmax(logits, -1) * draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    degrees = len(logits) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5
