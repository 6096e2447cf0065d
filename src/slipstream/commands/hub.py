"""Commands that reach the hub: `push`."""

from __future__ import annotations

from pathlib import Path


def push(draft: Path, repo: str, private: bool = False, target: str | None = None, license: str | None = None) -> None:
    """Upload a head's folder to the hub: weights, decode policy, provenance and model card.

    Args:
        draft: The head's folder; it stays as it is.
        repo: Repository on the hub, owner/name; made where there is none.
        private: Make it a private one.
        target: Hub id of the target, where the head was trained on a folder of yours.
        license: Licence of the head as the hub spells it, such as apache-2.0; default: the one its model card names.
    """
    import json
    import sys
    import tempfile
    from fnmatch import fnmatch

    from slipstream.decode.card import FILE as CARD
    from slipstream.decode.card import model_card, publishable_card
    from slipstream.distill import hub
    from slipstream.distill.heads import check_head

    check_head(draft)
    config = json.loads((draft / "config.json").read_text())
    was = config.get("target_name", "")
    name = target or was
    card = draft / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else model_card(was)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / CARD).write_text(publishable_card(text, was=was, target=name, license=license), encoding="utf-8")
        (place / "config.json").write_text(json.dumps({**config, "target_name": name}, indent=2) + "\n")
        for file in draft.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in hub.FILES) and not (place / file.name).exists():
                (place / file.name).symlink_to(file.resolve())
        address = hub.push(place, repo, private=private)
    print(f"pushed to {address}", file=sys.stderr)
