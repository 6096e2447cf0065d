"""What a card does: the table of benchmarks/decode.py, larger batches, and a training step; meant to take under ten minutes.

python benchmarks/gpu.py --draft runs/quickstart/draft
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from jsonargparse import auto_cli

# For all alike: cuDNN builds a plan for every new number of queries and keys.
CARD = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}


def commands(draft: str, target: str, compiled: bool, limit: int) -> list[list[str]]:
    """The scripts beside this one, with their options."""
    shared = ["--draft", draft, "--target", target, "--device", "cuda"]
    decoding = ["decode.py", *shared, "--limit", str(limit), "--compiled", str(compiled).lower()]
    batches = [["batch.py", *shared, "--prompts", str(limit), "--batch", str(size)] for size in (4, 10)]
    step = ["train.py", "--device", "cuda", "--lengths", "[2048]", "--repeats", "1"]
    step += ["--random", "llama-8b", "--random_length", "2048"]
    return [decoding, *batches, step]


def main(draft: str, target: str = "smollm2-135m-instruct", compiled: bool = True, limit: int = 10) -> None:
    """Decode the held-out prompts on the first CUDA device, then in batches of 4 and 10; train at length 2048.

    Args:
        draft: A head's folder.
        target: The target model of decoding; a step is measured on SmolLM2 and a random Llama-3.1-8B.
        compiled: Also with target and head compiled, as CUDA graphs.
        limit: Prompts.
    """
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device; benchmarks/decode.py and train.py run on a CPU")
    print(torch.cuda.get_device_name(0), flush=True)
    failed = []
    for script, *options in commands(draft, target, compiled, limit):
        done = subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *options], env=os.environ | CARD)
        if done.returncode:
            failed.append(" ".join([script, *options]))
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
