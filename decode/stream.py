"""A generation on the terminal: text as it comes, coloured by how each token got there."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from slipstream.decode.stats import Stats
    from slipstream.decode.verify import Token

_STYLES = {"exact": "green", "relaxed": "yellow underline", "bonus": ""}


class TagStream:
    """Prints tagged tokens of each round; bytes that do not make a character yet wait for the next round."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> None:
        self.tokenizer = tokenizer
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.plain = plain or not self.console.is_terminal
        self._ids: list[int] = []
        self._printed = ""

    def put(self, tokens: list[Token]) -> None:
        """Print one round."""
        for token in tokens:
            self._ids.append(token.id)
            text = self.tokenizer.decode(self._ids, skip_special_tokens=True)
            if text.endswith("\ufffd"):
                continue
            fresh, self._printed = text[len(self._printed) :], text
            style = "" if self.plain else _STYLES[token.tag]
            self.console.print(Text(fresh, style=style), end="")
        self.console.file.flush()

    def end(self) -> None:
        """End the line."""
        self.console.print()

    def statistics(self, stats: Stats) -> None:
        """One line on stderr."""
        share = stats.relaxed / max(1, stats.new_tokens)
        Console(stderr=True).print(
            f"{stats.new_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, "
            f"acceptance length {stats.acceptance_length:.2f}, relaxed {share:.1%}",
            style="dim",
        )
