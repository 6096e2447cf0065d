"""A generation on the terminal: text as it comes, coloured by how each token got there."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from slipstream.data.template import written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from slipstream.decode.stats import Stats
    from slipstream.decode.verify import Token

_STYLES = {"exact": "green", "relaxed": "yellow underline", "bonus": ""}


class Pieces:
    """The text that each further token adds: none while its bytes do not make a character yet."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, special: bool) -> None:
        self.tokenizer = tokenizer
        self.special = special
        self._ids: list[int] = []
        self._text = ""

    def add(self, token: int) -> str:
        """The next token's text; special tokens have one where `special` says so."""
        self._ids.append(token)
        text = written(self.tokenizer, self._ids, special=self.special)
        if text.endswith("\ufffd"):
            return ""
        fresh, self._text = text[len(self._text) :], text
        if text.endswith("\n"):  # what comes does not change what was: long answers are not decoded again and again
            self._ids = [token]  # some decoders strip what the first token begins with
            self._text = written(self.tokenizer, self._ids, special=self.special)
        return fresh


class TagStream:
    """Prints tagged tokens of each round; bytes that do not make a character yet wait for the next round."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> None:
        self.pieces = Pieces(tokenizer, special=False)
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.plain = plain or not self.console.is_terminal

    def put(self, tokens: list[Token]) -> None:
        """Print one round."""
        for token in tokens:
            style = "" if self.plain else _STYLES[token.tag]
            self.console.print(Text(self.pieces.add(token.id), style=style), end="")
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
