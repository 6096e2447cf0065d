"""The table of benchmarks/decode.py on a card, with larger batches; under ten minutes.

python benchmarks/gpu.py --draft runs/quickstart/draft
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from jsonargparse import auto_cli


def main(draft: str, target: str = "smollm2-135m-instruct", compiled: bool = False, limit: int = 20) -> None:
    """Decode the held-out prompts on the first CUDA device, then in batches of 4 and 10.

    Args:
        draft: A head's folder.
        target: The target model.
        compiled: Also with a compiled target.
        limit: Prompts.
    """
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device; benchmarks/decode.py runs on a CPU")
    print(torch.cuda.get_device_name(0), flush=True)
    shared = ["--draft", draft, "--target", target, "--device", "cuda"]
    runs = [["decode.py", "--limit", str(limit), "--compiled", str(compiled).lower()]]
    runs += [["batch.py", "--prompts", str(limit), "--batch", str(size)] for size in (4, 10)]
    for script, *options in runs:
        subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *shared, *options], check=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
