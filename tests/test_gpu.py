"""On a card: the same tokens as `generate` gives there, in fp32 without TF32."""

import warnings
from itertools import pairwise

import pytest
import torch
from tiny import HEADS, VOCAB, greedy, tiny_head, tiny_target
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import get_manager

from slipstream.configs.recipe import DistillSettings
from slipstream.data.batches import join
from slipstream.decode.drafters import HeadDrafter, NGramDrafter
from slipstream.decode.engine import Decoder
from slipstream.decode.policy import Policy
from slipstream.decode.speculation import Speculation
from slipstream.decode.tree import TreeShape
from slipstream.decode.verify import Verifier
from slipstream.distill.target import Target
from slipstream.distill.unroll import Distillation

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("schedule", ["fixed", "cost"])
def test_decoding_on_a_card_gives_what_generate_gives_there(architecture, schedule):
    torch.backends.cuda.matmul.allow_tf32 = False
    target = Target(tiny_target(architecture).model.cuda(), name=architecture)
    head = tiny_head(target).cuda()
    prompts = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(0)).cuda()
    truth = greedy(target, prompts, 24)
    policy = Policy(tree=TreeShape(3, 3, 12), speculation=Speculation(schedule))
    for drafter in (HeadDrafter(head, target), NGramDrafter()):
        out = Decoder(target, drafter, policy).generate(prompts, max_new_tokens=24)
        assert out.sequences.tolist() == truth[:, : out.sequences.shape[1]].tolist()
        mask = torch.ones_like(prompts)  # on the card, where the prompts need not be
        again = Decoder(target, drafter, policy).generate(prompts.cpu(), attention_mask=mask, max_new_tokens=4)
        assert again.sequences.tolist() == truth[:, : again.sequences.shape[1]].tolist()


def test_sampling_on_a_card_depends_on_nothing_but_the_seed():
    target = Target(tiny_target().model.cuda())
    decoder = Decoder(target, HeadDrafter(tiny_head(target).cuda(), target))
    prompt = torch.tensor([[5, 6, 7]]).cuda()
    first, again, other = (
        decoder.generate(prompt, max_new_tokens=20, temperature=1.0, seed=seed).sequences.tolist() for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("kind", ["eagle3", "eagle1", "parallel"])
def test_compiled_decoding_on_a_card_runs_as_cuda_graphs(kind):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    counters.clear()
    target = Target(tiny_target().model.cuda(), layer_ids=[4] if kind == "eagle1" else None)
    decoder = Decoder(target, HeadDrafter(tiny_head(target, kind=kind).cuda(), target), Policy(tree=TreeShape(3, 3, 8)))
    prompts = [torch.randint(3, 90, (1, n), generator=torch.Generator().manual_seed(n)).cuda() for n in (5, 9, 14, 30)]
    anything = Verifier("mars", "margin", 1e9, rank=97)  # long paths, so that much is moved in the cache
    eager = [decoder.generate(prompt, max_new_tokens=40, verify=anything).sequences.tolist() for prompt in prompts]
    target.compile()
    for prompt, relaxed in zip(prompts, eager, strict=True):  # warm-up, recording, replay
        decoder = Decoder(target, decoder.drafter, decoder.policy)  # as evaluation and tuning make them
        out = decoder.generate(prompt, max_new_tokens=40)
        assert out.sequences.tolist() == greedy(target, prompt, 40).tolist()
        assert decoder.generate(prompt, max_new_tokens=40, verify=anything).sequences.tolist() == relaxed
    assert counters["inductor"]["cudagraph_skips"] == 0
    manager = get_manager(0, create_if_none_exists=False)
    assert manager is not None
    functions = 2 if kind == "parallel" else 3  # the target, and the head with target features and without
    assert len(manager.roots) == functions
    assert all(len(nodes) == 1 for nodes in manager.roots.values())  # none was recorded again


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("verify", ["exact", Verifier("mars", "margin", 1.0)])
@pytest.mark.parametrize("tree", [TreeShape(3, 3, 8), TreeShape.fixed((1, 3, 1)), TreeShape(2, 2, 5, copied=3)])
def test_a_round_waits_once_for_the_card(compiled, tree, verify, recwarn):
    warnings.simplefilter("always")  # `recwarn` itself keeps the first from a place only
    target = Target(tiny_target().model.cuda())
    decoder = Decoder(target, HeadDrafter(tiny_head(target).cuda(), target), Policy(tree=tree))
    if compiled:
        target.compile()
    prompt = torch.tensor([[5, 6, 7]]).cuda()
    waits = []

    def watch(tokens):
        torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in recwarn))
        torch.cuda.set_sync_debug_mode("warn")

    for _ in range(3):  # compiling and recording wait as well
        decoder.generate(prompt, max_new_tokens=30, verify=verify)
    try:
        out = decoder.generate(prompt, max_new_tokens=30, verify=verify, on_tokens=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rounds = [after - before for before, after in pairwise(waits)]
    assert len(rounds) == len(out.stats.accept_lengths)
    assert set(rounds) == {1}


def test_the_times_of_a_card_are_those_it_took():
    target = Target(tiny_target(hidden_size=1024, intermediate_size=4096).model.cuda())
    decoder = Decoder(target, HeadDrafter(tiny_head(target).cuda(), target), Policy(tree=TreeShape(3, 3, 16)))
    prompt = torch.tensor([[5, 6, 7]]).cuda()
    for _ in range(2):
        stats = decoder.generate(prompt, max_new_tokens=40).stats
    assert stats.draft_seconds > 0
    assert 0 < stats.target_seconds < stats.draft_seconds + stats.target_seconds <= stats.seconds


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("packed", [False, True])
def test_training_on_a_card_has_the_loss_and_the_gradients_it_has_on_a_cpu(kind, packed):
    torch.backends.cuda.matmul.allow_tf32 = False
    draw = torch.Generator().manual_seed(0)
    lengths = (30, 7, 18) if packed else (30,)
    texts = [torch.randint(3, VOCAB, (length,), generator=draw) for length in lengths]
    rows = [{"input_ids": ids, "mask": torch.arange(len(ids)) > 2} for ids in texts]
    batch = join(rows, list(range(len(rows))))  # type: ignore[arg-type]
    found = []
    for device in ("cpu", "cuda"):
        target = tiny_target()
        head = tiny_head(target, **HEADS[kind]).to(device).train()
        target = Target(target.model.to(device), layer_ids=head.layer_ids)
        here = batch.to(torch.device(device))
        module = Distillation(head, target, DistillSettings(steps=3), autocast=False)
        total, out = module(here.input_ids, here.mask, torch.ones(3, device=device), starts=here.starts)
        total.backward()
        slopes = {name: p.grad.cpu() for name, p in head.named_parameters() if p.grad is not None}
        found.append((total.item(), out.rows.tolist(), out.hits.tolist(), slopes))
    (loss, *counts, slopes), (there, *counts_there, slopes_there) = found
    assert there == pytest.approx(loss, rel=1e-4)
    assert counts_there == counts
    assert slopes.keys() == slopes_there.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(slopes_there[name], slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()), msg=name)
