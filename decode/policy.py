"""The decode policy that travels with a head: tree, rule, and what was measured with them (`decode.json`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import write_atomic
from slipstream.configs.suggest import near
from slipstream.decode.speculation import Speculation
from slipstream.decode.tree import TreeShape
from slipstream.decode.verify import Verifier
from slipstream.distill.tensors import read_json

if TYPE_CHECKING:
    from pathlib import Path

FILE = "decode.json"


@dataclass(frozen=True)
class Policy:
    """How a head is to be used.

    Attributes:
        tree: The tree to draft. The default suits a CPU, where some 16 nodes are nearly free to verify.
        verify: The rule when the caller names none: exact.
        relaxed: The rule when the caller says `mars`.
        speculation: How the tree changes from round to round.
        measured: What tuning saw, for people.
    """

    tree: TreeShape = field(default_factory=TreeShape)
    verify: Verifier = field(default_factory=Verifier)
    relaxed: Verifier = field(default_factory=lambda: Verifier(rule="mars"))
    speculation: Speculation = field(default_factory=Speculation)
    measured: dict[str, Any] = field(default_factory=dict)

    def rule(self, verify: str | Verifier | None) -> Verifier:
        """The verifier a caller means: None is the policy's own, `mars` the tuned relaxed rule."""
        if verify is None:
            return self.verify
        return self.relaxed if verify == "mars" else Verifier.of(verify)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "tree": asdict(self.tree),
            "verify": self.verify.to_dict(),
            "relaxed": self.relaxed.to_dict(),
            "speculation": self.speculation.to_dict(),
            "measured": self.measured,
        }

    def save(self, folder: Path) -> None:
        """Write `decode.json` into a head's folder."""
        write_atomic(folder / FILE, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Policy:
        """The policy in a head's folder, or the default where none was tuned.

        Raises:
            SlipstreamError: If the file cannot be read, or has an unknown key or value.
        """
        if not (folder / FILE).is_file():
            return cls()
        data = read_json(folder / FILE)
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                raise SlipstreamError(f"{folder / FILE}: unknown key {key!r}{near(key, known)}")
        try:
            return cls(
                TreeShape(**data.get("tree", {})),
                Verifier.from_dict(data.get("verify", {})),
                Verifier.from_dict(data.get("relaxed", {"rule": "mars"})),
                Speculation(**data.get("speculation", {})),
                data.get("measured", {}),
            )
        except (TypeError, SlipstreamError) as error:  # TypeError: no such setting, or a value of another type
            raise SlipstreamError(f"{folder / FILE}: {error}") from error
