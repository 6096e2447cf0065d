"""How to launch the engines with an exported head: the text of its SERVING.md.

Flags as in SGLang's `server_args.py` and docs/advanced_features/speculative_decoding, vLLM's
docs/features/speculative_decoding/eagle and SafeAILab's `eagle/model/ea_model.py`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def serving_notes(
    name: str, kind: str, folder: Path, target: str, *, depth: int, top_k: int, nodes: int, tuned: bool
) -> str:
    """Launch lines for the engines that take this export.

    Args:
        name: The engine it was exported to, one of `ENGINES`.
        kind: Of the head.
        folder: Where the export is.
        target: A folder or hub id that the engine can load.
        depth: Draft tokens on the longest path.
        top_k: Children per node.
        nodes: Nodes verified at once, the root included.
        tuned: Whether these three were tuned for the head, and are not the defaults.
    """
    # A tree of this depth has no more nodes than one level of top_k and further levels of top_k * top_k each.
    nodes = min(nodes, 1 + top_k + (depth - 1) * top_k**2)
    method = "eagle" if kind == "eagle1" else "eagle3"
    speculative = {"method": method, "model": str(folder), "num_speculative_tokens": depth}
    vllm = f"vllm serve {target} --speculative-config '{json.dumps(speculative)}'"
    sglang = (
        f"python -m sglang.launch_server --model-path {target} --speculative-algorithm {method.upper()} "
        f"--speculative-draft-model-path {folder} --speculative-num-steps {depth} "
        f"--speculative-eagle-topk {top_k} --speculative-num-draft-tokens {nodes}"
    )
    # EAGLE drafts one level before it counts `depth` more.
    eagle = (
        f'EaModel.from_pretrained(base_model_path="{target}", ea_model_path="{folder}", use_eagle3={kind == "eagle3"}, '
        f"total_token={nodes}, depth={depth - 1}, top_k={top_k})"
    )
    lines = {
        "eagle": (("SafeAILab's EAGLE", "python", eagle), ("vLLM", "sh", vllm)),
        "sglang": (("SGLang", "sh", sglang), ("vLLM", "sh", vllm)),
        "vllm": (("vLLM", "sh", vllm),),
        "speculators": (("vLLM", "sh", vllm),),
    }[name]
    blocks = "\n".join(f"## {engine}\n\n```{language}\n{line}\n```\n" for engine, language, line in lines)
    origin = (
        "These numbers are the head's tuned policy (`decode.json`), for one request at a time on the device that tuned it"
        if tuned
        else "These numbers are defaults, no policy was tuned for this head"
    )
    return f"""# Serving this draft head

Target: `{target}`. Where that is no folder or hub id of your server, put the right one into the lines below.

{blocks}
{origin}: drafts {depth} tokens deep, {top_k} per node, {nodes} nodes verified at once, the root included. A server that
answers many requests at once does better with fewer. vLLM drafts a chain, so it is given the depth only. The copies from the
text that slipstream may put beside these nodes are not part of them: a head tuned with copies may do better with a deeper tree.

These engines verify exactly: greedy output is the target's own, sampled output has the target's distribution. MARS and
other relaxed rules are not part of them, and its settings in `decode.json` have no effect there. (SGLang relaxes
verification only where `--speculative-accept-threshold-single` or `--speculative-accept-threshold-acc` is set below 1.)
"""
