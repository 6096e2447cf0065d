"""`slipstream ...`: typed functions are the command line (jsonargparse), one recipe drives training."""

from __future__ import annotations

import errno
import inspect
import json
import logging
import re
import sys
import warnings
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import docstring_parser
from datasets.utils import logging as datasets_logging
from jsonargparse import ArgumentError, ArgumentParser
from transformers.utils import logging as transformers_logging

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.recipe import Recipe
from slipstream.configs.suggest import near
from slipstream.quickstart import quickstart

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Dtype = Literal["bfloat16", "float16", "float32"]
Schedule = Literal["fixed", "heuristic", "confidence", "entropy", "cost"]


def synthesize(
    out: Path, target: str = "smollm2-135m-instruct", topics: int = 1000, own: int = 500, seed: int = 1
) -> None:
    """Write prompts: sampled from the target, and crossed from the topics that ship with the package.

    Args:
        out: JSONL file of Spec-Bench rows.
        target: Who writes the prompts.
        topics: Prompts from the list of topics and tasks.
        own: Prompts by the target itself.
        seed: The same seed gives the same prompts.
    """
    from slipstream.configs.files import write_atomic
    from slipstream.data.synthesize import self_prompts, topic_prompts
    from slipstream.decode.evaluate import read_prompts
    from slipstream.distill.target import load_target

    out.parent.mkdir(parents=True, exist_ok=True)
    rows = topic_prompts(topics, seed)
    if own:
        loaded = load_target(target)
        sampled = out.with_name(out.stem + ".own.jsonl")
        self_prompts(loaded.model, loaded.chat_tokenizer, count=own, seed=seed, out=sampled)
        rows += [{k: v for k, v in row.items() if k != "unit"} for row in read_prompts(sampled)]
    write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def regenerate(
    prompts: Path,
    out: Path,
    target: str = "smollm2-135m-instruct",
    temperatures: list[float] = [0.0, 0.7, 1.0],  # noqa: B006 (jsonargparse copies defaults)
    max_new_tokens: int = 320,
    max_response_tokens: int | None = None,
    batch_size: int = 160,
    seed: int = 1,
) -> None:
    """Let the target answer prompts; resumable to the batch.

    Args:
        prompts: JSONL file of Spec-Bench rows.
        out: JSONL file of conversations, or a Parquet file, which is written from the JSONL beside it at the end.
        target: Who answers.
        temperatures: Dealt out to the prompts in turn; 0 is greedy.
        max_new_tokens: Per answer.
        max_response_tokens: Begin no batch once this many are there.
        batch_size: Prompts answered at once.
        seed: Of the draws and of the order.
    """
    from slipstream.data.conversations import pack
    from slipstream.data.regenerate import regenerate as answer_all
    from slipstream.decode.evaluate import read_prompts
    from slipstream.distill.target import load_target

    journal = out.with_suffix(".jsonl")
    rows = read_prompts(prompts)
    loaded = load_target(target)
    answer_all(
        loaded.model,
        loaded.chat_tokenizer,
        rows,
        stop_ids=loaded.stop_ids(),
        temperatures=temperatures,
        max_new_tokens=max_new_tokens,
        max_response_tokens=max_response_tokens,
        batch_size=batch_size,
        seed=seed,
        out=journal,
    )
    if out.suffix == ".parquet":
        pack(journal, out)


def train(recipe: Recipe, out: Path) -> None:
    """Train a head by a recipe into OUT/draft; goes on where an interrupted run stopped."""
    from slipstream.configs.files import require_writable
    from slipstream.data.batches import Batches
    from slipstream.data.conversations import read, tokenize
    from slipstream.data.vocabulary import draft_vocabulary
    from slipstream.distill.heads import new_head, save_head
    from slipstream.distill.target import load_target
    from slipstream.train.trainer import Trainer

    if (out / "draft" / "model.safetensors").is_file():
        trained = json.loads((out / "draft" / "provenance.json").read_text())["recipe"]
        if trained != json.loads(json.dumps(asdict(recipe))):
            raise SlipstreamError(f"{out} holds a head of another recipe; give another --out")
        print(f"this run is finished; nothing was changed. Draft head: {out / 'draft'}", file=sys.stderr)
        return
    require_writable(out, 500)
    target = load_target(recipe.target.name, dtype=recipe.target.dtype, adapter=recipe.target.adapter)
    tokens = tokenize(read(recipe.data.conversations), target.chat_tokenizer, recipe.data.max_length)
    vocabulary = draft_vocabulary(tokens, recipe.head.draft_vocab_size, target.vocab_size, target.stop_ids())
    head = new_head(target, vocabulary, seed=recipe.train.seed, from_target=recipe.head.from_target)
    batches = Batches(tokens, recipe.data.batch_tokens, recipe.train.seed, recipe.data.batches)
    trainer = Trainer(recipe, target, head, batches, out / "train")
    rows = trainer.run()
    if trainer.accelerator.is_main_process:
        provenance = {"target": target.name, "recipe": asdict(recipe), "tokens": rows[-1]["tokens"]}
        save_head(trainer.accelerator.unwrap_model(trainer.head), out / "draft", provenance)
        print(f"draft head: {out / 'draft'}", file=sys.stderr)


def generate(
    prompt: str | None = None,
    target: str = "smollm2-135m-instruct",
    draft: str = "none",
    verify: str | None = None,
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    seed: int = 0,
    dtype: Dtype = "bfloat16",
    schedule: Schedule | None = None,
    compiled: bool = False,
    quiet: bool = False,
) -> None:
    """Answer a prompt, or chat; accepted tokens are coloured by tag.

    Args:
        prompt: The user's message. Without one, standard input is the message; on a terminal, a chat begins, which an
            empty line or Ctrl-D ends.
        target: The target model.
        draft: A head's folder or hub id, `ngram` (prompt look-up), a causal LM with the same tokenizer, or `none`.
        verify: `exact`, `mars`, another rule, or the one in the head's decode.json.
        temperature: 0 is greedy.
        max_new_tokens: Per answer, exact to the token.
        seed: Of the draws.
        dtype: Of target and draft.
        schedule: How the tree changes from round to round; default: as in the head's decode.json.
        compiled: Run the target through torch.compile: minutes at first, then faster on long texts.
        quiet: Only the text: no colours, no line of statistics.
    """
    from dataclasses import replace

    import torch

    import slipstream
    from slipstream.data.template import encode_prompt
    from slipstream.decode.speculation import Speculation
    from slipstream.decode.stream import TagStream

    chat = prompt is None and sys.stdin.isatty()
    if prompt is None and not chat:
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise SlipstreamError("no prompt: give --prompt, or write one to standard input")
    decoder = slipstream.load(target, draft, dtype=dtype, compiled=compiled)
    if schedule is not None:
        decoder.policy = replace(decoder.policy, speculation=Speculation(schedule))
    tokenizer = decoder.target.chat_tokenizer
    messages: list[dict[str, str]] = []
    while message := prompt if prompt is not None else _ask():
        messages.append({"role": "user", "content": message})
        stream = TagStream(tokenizer, plain=quiet or draft == "none")
        out = decoder.generate(
            torch.tensor([encode_prompt(tokenizer, messages)]),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            verify=verify,
            seed=seed,
            on_tokens=stream.put,
        )
        stream.end()
        if not quiet:
            stream.statistics(out.stats)
        if not chat:
            return
        text = tokenizer.decode([token.id for token in out.tokens], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})


def _ask() -> str:
    """The next message of a chat; empty at its end."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def evaluate(
    out: Path,
    target: str = "smollm2-135m-instruct",
    draft: str = "none",
    prompts: Path | None = None,
    rules: list[str] = ["exact", "mars"],  # noqa: B006 (jsonargparse copies defaults)
    limit: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    dtype: Dtype = "bfloat16",
    seed: int = 0,
) -> None:
    """Measure rules against transformers' generate on the same prompts: results.json, answers.jsonl, report.html.

    Args:
        out: Folder for the results.
        target: The target model.
        draft: A head's folder or hub id, or `none`.
        prompts: JSONL of Spec-Bench rows; default: the held-out prompts that ship with the package.
        rules: Beside the two baselines.
        limit: Only the first prompts.
        max_new_tokens: Per turn.
        temperature: 0 is greedy.
        dtype: Of target and head; whether outputs are identical is only claimed in float32.
        seed: Of draws and intervals.
    """
    import slipstream
    from slipstream.configs.files import require_writable
    from slipstream.decode.evaluate import read_prompts
    from slipstream.decode.suite import evaluate as measure

    if (out / "results.json").exists():
        raise SlipstreamError(f"{out} holds the results of another run; give another --out")
    rows = read_prompts(prompts, limit)
    decoder = slipstream.load(target, draft, dtype=dtype)
    require_writable(out, 10)
    measure(
        decoder, draft, rows, rules if draft != "none" else [], out,
        max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
    )  # fmt: skip


def tune(
    draft: Path,
    target: str = "smollm2-135m-instruct",
    prompts: Path | None = None,
    regret: float = 0.02,
    max_new_tokens: int = 64,
    dtype: Dtype = "bfloat16",
) -> None:
    """Choose tree and relaxed rule by real runs on this device; writes decode.json into the head's folder.

    Args:
        draft: The head's folder.
        target: The target model.
        prompts: JSONL of Spec-Bench rows; default: the tuning prompts that ship with the package.
        regret: Mean regret the relaxed rule may cost, nats per token.
        max_new_tokens: Per turn.
        dtype: Of target and head.
    """
    import slipstream
    from slipstream.decode.evaluate import read_prompts, tuning_prompts
    from slipstream.decode.tune import frontier_table
    from slipstream.decode.tune import tune as search

    rows = read_prompts(prompts) if prompts is not None else tuning_prompts()
    decoder = slipstream.load(target, str(draft), dtype=dtype)
    policy, points = search(decoder, rows, regret_budget=regret, max_new_tokens=max_new_tokens)
    policy.save(draft)
    from slipstream.configs.progress import console

    console.print(frontier_table(points))


def doctor() -> None:
    """Print versions, devices, what is missing, and the command that installs it."""
    from slipstream.doctor import examine

    examine()


COMMANDS: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (quickstart, synthesize, regenerate, train, generate, evaluate, tune, doctor)
}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="slipstream",
        description="Train, tune and run draft heads.",
        version=version("slipstream"),
        exit_on_error=False,
    )
    commands = parser.add_subcommands(dest="command", required=True)
    for name, function in COMMANDS.items():
        summary = (function.__doc__ or "").split("\n")[0]
        sub = ArgumentParser(description=summary, exit_on_error=False)
        if function is train:
            sub.add_argument("--config", action="config", help="a recipe in YAML")
            sub.add_class_arguments(Recipe, as_group=False)
            sub.add_argument("--out", type=Path, required=True, help="folder of the run")
        else:
            flags: set[str | int] = {
                p.name for p in inspect.signature(function).parameters.values() if p.default is False
            }
            sub.add_function_arguments(function, as_group=False, skip=flags)
            for about in docstring_parser.parse(function.__doc__ or "").params:
                if about.arg_name in flags:  # jsonargparse would want a value
                    sub.add_argument(f"--{about.arg_name}", action="store_true", help=about.description)
        commands.add_subcommand(name, sub, help=summary)
    return parser


def _known(command: str | None) -> list[str]:
    """Options of a command, or the commands."""
    if command is None:
        return list(COMMANDS)
    if command != "train":
        return list(inspect.signature(COMMANDS[command]).parameters)
    sections = {section.name: section.default_factory for section in fields(Recipe)}
    return ["config", "out", *(f"{name}.{f.name}" for name, kind in sections.items() for f in fields(kind))]  # type: ignore[arg-type]


def _explain(message: str, command: str | None) -> str:
    """jsonargparse's message in one line, with the near name where a key is unknown."""
    line = " ".join(message.split())
    found = re.search(r"(?:[Kk]ey|[Oo]ption|arguments:) ['\"]?(?:--)?([\w.]+)", line)
    if found and re.search(r"not expected|nrecognized|not accepted|does not accept", line):
        key = found.group(1)
        return f"unknown key {key!r}{near(key, _known(command))}"
    return line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends with one line on stderr and status 2."""
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate|datasets")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    datasets_logging.disable_progress_bar()
    datasets_logging.set_verbosity(logging.CRITICAL)
    try:
        parser = _parser()
        settings = parser.instantiate(parser.parse_args(arguments))
        values = vars(settings[settings.command])
        if settings.command == "train":
            train(Recipe(**{field.name: values[field.name] for field in fields(Recipe)}), values["out"])
        else:
            COMMANDS[settings.command](**values)
    except (SlipstreamError, ArgumentError) as error:
        command = next((a for a in (arguments if arguments is not None else sys.argv[1:]) if a in COMMANDS), None)
        told = _explain(str(error), command) if isinstance(error, ArgumentError) else error
        print(f"slipstream: {told}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"slipstream: cannot write {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("slipstream: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
