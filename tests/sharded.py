"""Runs under torchrun: targets of all architectures in shards give, to the bit, what whole ones give.

torchrun --nproc_per_node 2 tests/sharded.py
"""

import torch
from launched import held
from test_plan import peak
from tiny import ARCHITECTURES, tiny_target

from slipstream.distill.shards import shard
from slipstream.distill.target import Target
from slipstream.train.footprint import sharded_bytes

CPU = torch.device("cpu")


def assert_same(target: Target, whole: Target, ids: torch.Tensor) -> None:
    """Hold states, embeddings and logits of texts to those of a whole target."""
    mine, theirs = target.capture(ids), whole.capture(ids)
    pairs = [*zip(mine, theirs, strict=True), (target.embeddings(ids), whole.embeddings(ids))]
    pairs.append((target.logits(mine.hidden[0]), whole.logits(theirs.hidden[0])))
    assert all(torch.equal(a, b) for a, b in pairs)


def main() -> None:
    torch.distributed.init_process_group("gloo")
    processes, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    for architecture in ARCHITECTURES:
        target, whole = tiny_target(architecture), tiny_target(architecture)
        shard(target, CPU)
        for length in (20, 12):
            assert_same(target, whole, torch.randint(3, 90, (2, length + 3 * rank)))  # of other length in each
            assert abs(held(target) - 1 / processes) < 0.01, architecture
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    target, whole = tiny_target(**wide), tiny_target(**wide)
    _, gathered = sharded_bytes(whole, processes)
    shard(target, CPU)
    ids = torch.randint(3, 90, (1, 8))
    target.capture(ids)
    more = peak(lambda: target.capture(ids)) - peak(lambda: whole.capture(ids))
    assert 0.95 * gathered < more < 1.05 * gathered


if __name__ == "__main__":
    main()
