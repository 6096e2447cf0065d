"""The model card of a draft head: the header the hub reads, how to use the head, what was measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from slipstream.configs.errors import SlipstreamError
from slipstream.configs.files import write_atomic
from slipstream.decode.report import markdown_table
from slipstream.distill.gguf import EMBEDDED, EMBEDDED_ON_HUB
from slipstream.distill.tensors import read_json

FILE = "README.md"

_LOADS = re.compile(r'^decoder = slipstream\.load\("[^"\n]*", "path/to/this/folder"[^\n]*$', re.MULTILINE)
_MEASURED = re.compile(r"^(?:Measured on |Not measured yet\.)[^\n]*$[\s\S]*?(?=^#|\Z)", re.MULTILINE)

_BODY = """\
# Draft head for {target}

A head for speculative decoding (EAGLE), made by slipstream. It drafts, the target decides. Tree and rules are in
`decode.json`, data and recipe in `provenance.json`.

```python
import slipstream

decoder = slipstream.load("{target}", "path/to/this/folder"{compiled})  # or this repository's name
```

"""


def model_card(target: str, *, license: str | None = None, results: dict[str, Any] | None = None) -> str:
    """A head's README: the header, and in words what it is for, how to use it, and what was measured.

    Args:
        target: The target's name; one that is no hub id is left out of the header.
        license: A licence's identifier on the hub; None leaves it out.
        results: The content of a `results.json`; None says that nothing was measured.
    """
    measured, compiled = "Not measured yet.\n", ""
    if results is not None:
        compiled = ", compiled=True" if results["device"].endswith("compiled") else ""  # as it was tuned and measured
        measured = (
            f"Measured on {results['device']}, {results['dtype']}, {results['date']}:\n\n{markdown_table(results)}"
        )
    body = _BODY.format(target=target, compiled=compiled) + measured
    return f"---\n{_header(target, license).to_yaml()}\n---\n\n{body}"


def write_card(folder: Path, target: str, *, license: str | None = None, results: dict[str, Any] | None = None) -> None:
    """Write a head's README; of one that is there, nothing changes but what was measured, up to the next heading.

    `target` is named as the head's config.json names it, where it does.
    """
    place, config = folder / FILE, folder / "config.json"
    named = (read_json(config).get("target_name") if config.is_file() else None) or target
    text = model_card(named, license=license, results=results)
    if place.is_file():
        fresh, card = ModelCard(text, ignore_metadata_errors=True), ModelCard.load(place, ignore_metadata_errors=True)
        told = {"license": license} if license else {}
        card.data = ModelCardData(**{**fresh.data.to_dict(), **card.data.to_dict(), **told})
        card.text = _updated(card.text, fresh.text)
        text = str(card)
    write_atomic(place, text)


def _updated(text: str, fresh: str) -> str:
    """A card's text with what a fresh one says of measurements, and how it loads the head."""
    line, section = (pattern.findall(fresh)[0] for pattern in (_LOADS, _MEASURED))
    loading = _LOADS.sub(lambda _: line, text)
    told, places = _MEASURED.subn(lambda found: section + "\n" * (found.end() < len(loading)), loading, count=1)
    return told if places else f"{loading.rstrip()}\n\n{section}"


def publishable_card(text: str, *, was: str, target: str, license: str | None) -> str:
    """A card as the hub wants it: `target` in the place of the name `was`, and a header that names it and the licence.

    Raises:
        SlipstreamError: If neither the card nor the caller names a licence, or the target is no hub id.
    """
    card = ModelCard(text, ignore_metadata_errors=True)
    header = _header(target, license or card.data.to_dict().get("license"))
    if header.license is None:
        raise SlipstreamError("the model card names no licence; give --license, such as apache-2.0")
    if header.base_model is None:
        raise SlipstreamError(
            f"target {target!r} is no hub id (owner/name), so that nobody could load it; give --target"
        )
    card.data = ModelCardData(**{**card.data.to_dict(), **header.to_dict()})
    for place in ("head for {}\n", 'slipstream.load("{}"'):
        card.text = card.text.replace(place.format(was), place.format(target))
    return str(card)


def _header(target: str, license: str | None) -> ModelCardData:
    name = EMBEDDED_ON_HUB if target == EMBEDDED else target
    return ModelCardData(
        base_model=name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists() else None,
        license=license,
        library_name="slipstream",
        pipeline_tag="text-generation",
        tags=["draft-head", "eagle", "speculative-decoding"],
    )
