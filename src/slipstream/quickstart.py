"""The whole way of the data, once: conversations, draft vocabulary, training, tuning, measuring, report."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import require_writable, write_atomic
from slipstream.configs.progress import console
from slipstream.configs.recipe import Recipe
from slipstream.data.batches import Batches
from slipstream.data.conversations import load
from slipstream.data.regenerate import regenerate
from slipstream.data.synthesize import self_prompts, topic_prompts
from slipstream.data.vocabulary import coverage, draft_vocabulary
from slipstream.decode.budget import Budget
from slipstream.decode.card import write_card
from slipstream.decode.drafters import HeadDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.evaluate import compare, identical_outputs, interval, simulated_acceptance_length
from slipstream.decode.fidelity import measure_likelihood
from slipstream.decode.frontier import FILE as FRONTIER
from slipstream.decode.frontier import gain, load_frontier, save_frontier
from slipstream.decode.policy import Policy
from slipstream.decode.report import require_figures, results_table, write_report
from slipstream.decode.sampling import sample
from slipstream.decode.signals import signal_samples
from slipstream.decode.suite import header, judged_rows, sample_answer, sampled
from slipstream.decode.tasks import encode_first, read_prompts, tuning_prompts
from slipstream.decode.tree import TreeShape
from slipstream.decode.tune import tune
from slipstream.distill.compilation import require_compiler
from slipstream.distill.gguf import EMBEDDED, EMBEDDED_LICENSE
from slipstream.distill.heads import describe_target, load_head, new_head, save_head
from slipstream.distill.target import Target, find_device, load_target
from slipstream.train.trainer import Trainer

if TYPE_CHECKING:
    from slipstream.distill.draft import DraftHead

_DISK_MB = 500
_PROBE = 6  # batches that are timed
_SLOWER = 1.05  # a step of the training, against those timed, whose batches come again: 1.03 was seen
_CAPTURE_SHARE = 0.3  # of the training, spent in the target
_FEATURE_BYTES = 2.5e9
_SMOKE_MINUTES = 4.0  # below this, fewer prompts are measured


class Quickstart:
    """The stages of one run in one folder; each leaves a file, and a stage whose file is there is not done again."""

    def __init__(self, out: Path, minutes: float, fresh: bool, recipe: Recipe) -> None:
        self.out = out
        self.minutes = minutes
        self.fresh = fresh
        self.recipe = recipe
        self.prompts = read_prompts(limit=None if minutes >= _SMOKE_MINUTES else 6)
        self.tune_prompts = tuning_prompts()
        self.new_tokens = 96 if minutes >= _SMOKE_MINUTES else 48

    def claim(self) -> bool:
        """Take the folder; returns whether the run in it is finished already.

        Raises:
            SlipstreamError: If the folder holds something else, or cannot be written.
        """
        mine = {"minutes": self.minutes, "fresh": self.fresh}
        place = self.out / "quickstart.json"
        if place.is_file():
            theirs = json.loads(place.read_text())
            if theirs != mine:
                raise SlipstreamError(f"{self.out} holds a run of other settings ({theirs}); give another --out")
            return (self.out / "report.html").is_file()
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise SlipstreamError(f"{self.out} exists and is no quickstart run; give another --out")
        require_writable(self.out, _DISK_MB)
        write_atomic(place, json.dumps(mine))
        return False

    def conversations(self, target: Target) -> str | None:
        """The shipped conversations (None), or with `--fresh` a file made anew."""
        if not self.fresh:
            return None
        count = max(64, round(330 * self.minutes))
        prompts, file = self.out / "prompts.jsonl", self.out / "conversations.jsonl"
        seed = self.recipe.train.seed
        tokenizer = target.chat_tokenizer
        self_prompts(target.name, partial(sample, target), tokenizer, count=count // 3, seed=seed, out=prompts)
        rows = topic_prompts(count - count // 3, seed) + read_prompts(prompts)
        regenerate(
            target.name,
            partial(sample, target),
            tokenizer,
            rows,
            stop_ids=target.stop_ids(),
            temperatures=[0.0, 0.7, 1.0],
            max_new_tokens=320,
            seed=seed,
            think=self.recipe.data.think,
            context=target.context,
            out=file,
        )
        return str(file)

    def compile(self, target: Target) -> None:
        """Compile what decodes, where that can be done here."""
        if self.minutes < _SMOKE_MINUTES:
            return
        try:
            require_compiler(target.device)
        except SlipstreamError as error:
            console.print(str(error))
        else:
            target.compile()

    def train(self, target: Target) -> None:
        """Train the head into `draft/`, for about the minutes asked for on this machine."""
        if (self.out / "draft" / "model.safetensors").is_file():
            return
        recipe = replace(self.recipe, data=replace(self.recipe.data, conversations=self.conversations(target)))
        tokens = load(recipe.data, target.chat_tokenizer)
        vocabulary = draft_vocabulary(tokens, recipe.head.draft_vocab_size, target.vocab_size, target.stop_ids())
        share = coverage(tokens, vocabulary, target.vocab_size)
        console.print(f"{len(tokens):,} conversations; the draft vocabulary covers {share:.1%} of the target's tokens")

        def fresh_head() -> DraftHead:
            return new_head(target, vocabulary, recipe.head, seed=recipe.train.seed)

        def batches(limit: int) -> Batches:
            return Batches(tokens, recipe.data.batch_tokens, recipe.train.seed, limit)

        plan = self._plan(recipe, target, fresh_head(), batches(_PROBE))
        recipe = replace(
            recipe,
            data=replace(recipe.data, batches=plan["batches"]),
            distill=replace(recipe.distill, keep_features=True),
            train=replace(recipe.train, max_steps=plan["steps"]),
        )
        trainer = Trainer(recipe, target, fresh_head(), batches(plan["batches"]), self.out / "train")
        rows = trainer.run()
        write_atomic(self.out / "training.json", json.dumps({"curve": rows, "coverage": share}))
        provenance = {
            **describe_target(target),
            "conversations": recipe.data.conversations or "shipped with slipstream",
            "recipe": recipe.to_dict(),
            "seed": recipe.train.seed,
            "tokens": rows[-1]["tokens"],
        }
        head = trainer.result()
        assert head is not None  # the quickstart is one process
        save_head(head, self.out / "draft", provenance)

    def _plan(self, recipe: Recipe, target: Target, head: DraftHead, batches: Batches) -> dict[str, int]:
        """How many batches and steps take the minutes asked for: each kind of work is timed once, on a head thrown away.

        A part of the time goes into capturing features, which are kept; the rest into steps on them.
        """
        place = self.out / "plan.json"
        if not place.is_file():
            probe = replace(
                recipe,
                data=replace(recipe.data, batches=_PROBE),
                distill=replace(recipe.distill, keep_features=True, single=0.5),
                train=replace(recipe.train, max_steps=4 * _PROBE, trackers=()),
            )
            begun = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                trainer = Trainer(probe, target, head, batches, Path(folder))
                target.capture(batches[0].input_ids.to(target.device))
                first, single, full = (trainer.time_steps(_PROBE) for _ in range(3))
            left = (60 * self.minutes - (time.monotonic() - begun)) / _SLOWER
            capture = max(first - single, 0.1 * first)
            row = 2 * (len(target.layer_ids) + 1) * target.config.hidden_size * recipe.data.batch_tokens
            kept = min(_CAPTURE_SHARE * left / capture, _FEATURE_BYTES / row)
            share = recipe.distill.single
            steps = (left - kept * capture) / (share * single + (1 - share) * full)
            write_atomic(place, json.dumps({"batches": max(4, round(kept)), "steps": max(4, round(steps))}))
        return dict(json.loads(place.read_text()))

    def tune(self, decoder: Decoder) -> None:
        """Tune tree and rule into `draft/decode.json`; the points it was chosen from are written last, beside it."""
        prompts = self.tune_prompts if self.minutes >= _SMOKE_MINUTES else self.tune_prompts[:2]
        tokens = 64 if self.minutes >= _SMOKE_MINUTES else 32
        policy, frontier = tune(decoder, prompts, budget=Budget("regret", 0.02), max_new_tokens=tokens)
        policy.save(self.out / "draft")
        save_frontier(self.out / "draft", frontier)
        if gained := gain(policy.measured):
            console.print(gained)

    def identity(self, head_folder: Path, target_name: str) -> dict[str, Any]:
        """fp32 on every held-out prompt: exact against `generate`, and measured against simulated chain tau."""
        target = load_target(target_name, dtype=torch.float32, think=self.recipe.data.think)
        head = load_head(head_folder)
        decoder = Decoder(target, HeadDrafter(head, target), Policy.load(head_folder))
        rules = ("autoregressive", "exact")
        pairs = [(decoder, rule) for rule in rules]
        records = compare(pairs, self.prompts, max_new_tokens=self.new_tokens // 3, label="identity in fp32")
        steps = self.recipe.distill.steps
        chain = Decoder(target, HeadDrafter(head, target), Policy(tree=TreeShape(steps, 1, steps + 1)))
        alone = [(chain, "exact")]
        (chained,) = compare(alone, self.prompts, max_new_tokens=self.new_tokens // 3, label="chain in fp32")
        answers = [
            (encode_first(target, row), record.outputs[0]) for row, record in zip(self.prompts, records[0], strict=True)
        ]
        lengths = [n for record in chained for n in record.accept_lengths]
        return {
            "identical": identical_outputs(records, rules),
            "checked": {"dtype": "float32", "prompts": len(self.prompts), "tokens": self.new_tokens // 3},
            "simulated_acceptance_length": round(simulated_acceptance_length(head, target, answers, steps), 4),
            "measured_chain_acceptance_length": round(sum(lengths) / len(lengths), 4),
        }

    def _head_alone(self, decoder: Decoder) -> dict[str, float] | None:
        """Exact decoding without the copies of the tuned tree, on some of the prompts; None where it has none."""
        tree = decoder.policy.tree
        if not tree.copied:
            return None
        prompts = self.prompts[::3]
        variant = Decoder(decoder.target, decoder.drafter, replace(decoder.policy, tree=replace(tree, copied=0)))
        pairs = [(variant, "autoregressive"), (variant, "exact")]
        base, records = compare(pairs, prompts, max_new_tokens=self.new_tokens, label="the head alone")
        lengths = [n for record in records for n in record.accept_lengths]
        return {
            "prompts": len(prompts),
            "acceptance_length": round(sum(lengths) / len(lengths), 3),
            "speedup": round(interval(base, records, self.recipe.train.seed)[0], 3),
        }

    def measure(self, decoder: Decoder) -> dict[str, Any]:
        """Every rule on the held-out prompts; writes `results.json`."""
        target = decoder.target
        identity = self.identity(self.out / "draft", target.name)
        rules = ("autoregressive", "engine", "exact", "mars")
        pairs = [(decoder, rule) for rule in rules]
        records = compare(pairs, self.prompts, max_new_tokens=self.new_tokens, label="measure")
        measure_likelihood(target, self.prompts, records)
        alone = self._head_alone(decoder)
        training = json.loads((self.out / "training.json").read_text())
        identical, checked = identity.pop("identical"), identity.pop("checked")
        rows = judged_rows(decoder, rules, records, seed=self.recipe.train.seed, identical=identical)
        for row in rows:
            row["identity_dtype"] = checked["dtype"]
        results = {
            **header(target, str(self.out / "draft"), self.recipe.train.seed),
            "rows": rows,
            "identity": checked,
            "policy": decoder.policy.to_dict(),
            "frontier": load_frontier(self.out / "draft", decoder.policy),
            "training": {
                **training,
                **identity,
                "minutes": round(training["curve"][-1]["seconds"] / 60, 1),
                "tokens": training["curve"][-1]["tokens"],
            },
            "distributions": signal_samples(target, self.prompts, records[0]),
            "samples": [
                sample_answer(target, self.prompts[i], rules[k], records[k][i])
                for i in sampled(self.prompts)
                for k in (2, 3)
            ],
            "head_alone": alone,
            "limits": limits(rows, alone),
        }
        write_atomic(self.out / "results.json", json.dumps(results, indent=1))
        return results


def limits(rows: list[dict[str, Any]], alone: dict[str, float] | None) -> str:
    """What keeps exact decoding from being faster, in words, from its time split; and what is the head's own part."""
    exact = next(row for row in rows if row["rule"] == "exact")
    engine = next(row for row in rows if row["rule"] == "engine")
    split, total = exact["time_split"], sum(exact["time_split"].values())
    rounds = exact["tokens"] / exact["acceptance_length"]
    wide, narrow = 1000 * split["target"] / rounds, 1000 * engine["time_split"]["target"] / engine["tokens"]
    return (
        f"Of exact decoding's time the target takes {split['target'] / total:.0%}, the draft head "
        f"{split['draft'] / total:.0%}, everything else {split['rest'] / total:.0%}. Verifying a tree costs {wide:.0f} ms "
        f"a round against {narrow:.0f} ms for a single token, and a round yields {exact['acceptance_length']:.2f} tokens: "
        "a better trained head, not a larger tree, is what would raise the speed."
    ) + (
        f" The tree holds copies from the text beside the head's drafts; on {alone['prompts']} of the prompts the head "
        f"alone gives {alone['acceptance_length']:.2f} tokens a round and {alone['speedup']:.2f} times the speed of "
        "transformers' generate."
        if alone
        else ""
    )


def quickstart(out: Path = Path("runs/quickstart"), minutes: float = 12.0, fresh: bool = False) -> None:
    """Distil, train, tune, measure and report a draft head for the embedded target.

    Args:
        out: Folder of the run: `draft/`, `results.json`, `report.html`.
        minutes: Minutes of training; the rest takes some six more.
        fresh: Make the conversations anew instead of reading those that ship with the package.
    """
    if minutes <= 0:
        raise SlipstreamError(f"--minutes must be above 0, not {minutes:g}")
    require_figures()
    job = Quickstart(out, minutes, fresh, Recipe())
    if job.claim():
        results = json.loads((out / "results.json").read_text())
        console.print(f"this run is finished; nothing was changed. Report: {out / 'report.html'}")
        console.print(results_table(results))
        return
    # At once where training would take it: a run that goes on behind its training decodes where a whole one does.
    target = load_target(EMBEDDED, device=find_device(None), think=job.recipe.data.think)
    job.train(target)
    head = load_head(out / "draft", dtype=target.dtype, device=target.device)
    job.compile(target)
    if not (out / "draft" / FRONTIER).is_file():
        job.tune(Decoder(target, HeadDrafter(head, target)))
    if not (out / "results.json").is_file():
        job.measure(Decoder(target, HeadDrafter(head, target), Policy.load(out / "draft")))
    results = json.loads((out / "results.json").read_text())
    write_card(out / "draft", target.name, license=EMBEDDED_LICENSE, results=results)
    write_report(out / "report.html", results)
    console.print(results_table(results))
    console.print(f"draft head: {out / 'draft'}   report: {out / 'report.html'}")
