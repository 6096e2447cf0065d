"""Compiled decoding without inductor (test_target.py and test_gpu.py have that): shapes, addresses, who waits for a card."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
import torch
from tiny import ARCHITECTURES, HEADS, VOCAB, greedy, tiny_head, tiny_target
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch.utils._python_dispatch import TorchDispatchMode

import slipstream
from slipstream.configs.errors import SlipstreamError
from slipstream.configs.recipe import Recipe
from slipstream.decode.cache import TreeCache, causal
from slipstream.decode.drafters import HeadDrafter, NGramDrafter
from slipstream.decode.engine import Decoder, Generation
from slipstream.decode.policy import Policy
from slipstream.decode.speculation import Confidence, Speculation
from slipstream.decode.suite import header
from slipstream.decode.tree import TreeShape, make_tree
from slipstream.decode.verify import Verifier
from slipstream.distill.compilation import SIZES, Compilation
from slipstream.distill.target import Target
from slipstream.quickstart import Quickstart

TREES = {  # of sizes that need no filling, unless nothing is copied: a token that fills up may be accepted
    "eagle-2": TreeShape(3, 3, 8),
    "chain": TreeShape.chain(3),
    "fixed": TreeShape.fixed((1, 3, 1)),
    "with copies": TreeShape(2, 2, 5, copied=3),
}
QUICK = {"gemma3_text", "gpt2", "llama4_text", "qwen2_moe"}  # of the architectures: windows, chunks, Conv1D, experts
ANYTHING = Verifier("mars", "margin", 1e9, rank=VOCAB)  # the deepest path passes, so that fresh tokens vary in number


@pytest.fixture
def shapes(monkeypatch) -> dict[str, list[tuple]]:
    """Shapes of all calls of what is said to be compiled, by whose function it is.

    It runs as it is, but, as with CUDA graphs, every call spoils what the call before it returned.
    """
    seen: dict[str, list[tuple]] = {"Target": [], "HeadDrafter": []}
    last: list[torch.Tensor] = []

    def compile(function, **given):
        def called(*args):
            seen[type(function.__self__).__name__].append(tuple(x.shape for x in args if isinstance(x, torch.Tensor)))
            for spoilt in last:
                spoilt.fill_(torch.nan)
            last[:] = function(*args)
            return tuple(last)

        return called

    monkeypatch.setattr(torch, "compile", compile)
    return seen


@pytest.fixture
def traced(monkeypatch):
    """`torch.compile` with a backend that leaves the graphs, which are kept here, to torch."""
    graphs, real = [], torch.compile

    def keep(graph, inputs, **given):
        graphs.append(graph)
        return graph.forward

    def compile(function, *, options, dynamic=None):
        kept = {"guard_filter_fn": options["guard_filter_fn"]}
        return real(function, dynamic=dynamic, backend=keep, options=kept)

    monkeypatch.setattr(torch, "compile", compile)
    torch._dynamo.reset()
    return graphs


def prompt(tokens: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(0))


def headed(kind: str = "eagle3") -> tuple[Target, HeadDrafter]:
    target = tiny_target("qwen3", num_hidden_layers=3)
    target = target.reading([3]) if HEADS[kind].get("kind") == "eagle1" else target
    return target, HeadDrafter(tiny_head(target, **HEADS[kind]), target)


def times(out: Generation) -> dict[str, float]:
    return {name: value for name, value in asdict(out.stats).items() if name.endswith("seconds")}


def tagged(out: Generation) -> list[tuple[int, str]]:
    """Tokens and tags but those of the last rounds, whose eager trees are no deeper than the text may grow."""
    return [(token.id, token.tag) for token in out.tokens[:25]]


@pytest.mark.parametrize(
    ("kind", "tree"),
    [*((kind, "eagle-2") for kind in HEADS), *(("eagle3", tree) for tree in TREES if tree != "eagle-2")],
)
def test_static_shapes_change_no_token(shapes, kind, tree):
    target, drafter = headed(kind)
    decoder = Decoder(target, drafter, Policy(tree=TREES[tree]))
    eager = {rule: decoder.generate(prompt(), max_new_tokens=30, verify=rule) for rule in ("exact", ANYTHING)}
    target.compile(static=True)
    static = {rule: decoder.generate(prompt(), max_new_tokens=30, verify=rule) for rule in eager}
    assert static["exact"].sequences.tolist() == greedy(target, prompt(), 30).tolist()
    if not TREES[tree].copied:
        assert list(map(tagged, static.values())) == list(map(tagged, eager.values()))
    assert max(static[ANYTHING].stats.accept_lengths) >= 3 > min(static["exact"].stats.accept_lengths)
    assert len(set(shapes["Target"])) == 1
    steps = 0 if HEADS[kind].get("kind") == "parallel" else 2 if tree == "fixed" else 1
    assert len(set(shapes["HeadDrafter"])) == 1 + steps


@pytest.mark.parametrize("schedule", ["heuristic", "confidence", "cost"])
def test_schedules_keep_to_few_shapes(shapes, schedule):
    target, drafter = headed()
    policy = Policy(tree=TreeShape(3, 3, 12), speculation=Speculation(schedule))
    target.compile(static=True)
    out = Decoder(target, drafter, policy).generate(prompt(), max_new_tokens=60)
    assert out.sequences.tolist() == greedy(target, prompt(), 60).tolist()
    # Which of the sizes occur is up to the clock under `cost`; others never do, and steps are as wide as the tree.
    assert {ids[1] for ids, *_ in shapes["HeadDrafter"]} <= {3, *SIZES}
    assert {ids[1] for ids, *_ in shapes["Target"]} <= {1, *SIZES}
    per_size = Counter(ids for ids, *_ in set(shapes["HeadDrafter"]))
    assert set(per_size.values()) == {1}  # masks and caches of one size each


def test_a_request_after_another_uses_the_same_buffers(shapes):
    target, drafter = headed()
    target.compile(static=True)
    decoder = Decoder(target, drafter, Policy(tree=TREES["eagle-2"]))
    first = decoder.generate(prompt(), max_new_tokens=30).sequences.tolist()
    buffers = [*decoder._caches._caches.values(), *drafter._caches._caches.values()]
    addresses = [(x.rows.tensor.data_ptr(), x.layers[0].keys.data_ptr()) for x in buffers]
    buffers[0].layers[0].values.fill_(torch.nan)
    decoder.generate(prompt(12), max_new_tokens=20)
    assert decoder.generate(prompt(), max_new_tokens=30).sequences.tolist() == first
    assert [(x.rows.tensor.data_ptr(), x.layers[0].keys.data_ptr()) for x in buffers] == addresses
    assert buffers == [*decoder._caches._caches.values(), *drafter._caches._caches.values()]


def test_a_draft_that_slept_takes_in_what_it_missed(shapes):
    target, drafter = headed()
    shape = TREES["eagle-2"]
    awake = [True, *[False] * 70, True, True]

    class Sleepy(Speculation):
        def controller(self, given, target):
            controller = super().controller(given, target)
            left = iter(awake)
            controller.shape = lambda: shape if next(left) else None
            return controller

    decoder = Decoder(target, drafter, Policy(tree=shape, speculation=Sleepy()))
    eager = decoder.generate(prompt(), max_new_tokens=74)
    target.compile(static=True)
    assert tagged(decoder.generate(prompt(), max_new_tokens=74)) == tagged(eager)


def test_graphs_are_kept_for_the_next_requests(traced):
    target, drafter = headed()
    target.compile(static=True)
    decoder = Decoder(target, drafter, Policy(tree=TREES["eagle-2"]))
    out = decoder.generate(prompt(), max_new_tokens=30)
    assert out.sequences.tolist() == greedy(target, prompt(), 30).tolist()
    assert len(traced) == 3  # the target's, and the head's with target features and without
    out = decoder.generate(prompt(17), max_new_tokens=40, verify=ANYTHING)
    assert len(out.rows[0]) == 40
    assert len(traced) == 3


@pytest.mark.parametrize("kind", HEADS)
def test_one_graph_serves_trees_and_texts_of_all_sizes(traced, kind):
    target, drafter = headed(kind)
    target.compile(static=False)
    for tree in (TREES["eagle-2"], TREES["with copies"], TreeShape(4, 2, 6), TreeShape(1, 5, 6)):
        for tokens in (3, 30, 100):
            decoder = Decoder(target, drafter, Policy(tree=tree))
            for rule in ("exact", ANYTHING):
                out = decoder.generate(prompt(tokens), max_new_tokens=20, verify=rule).sequences.tolist()
                if rule == "exact":
                    assert out == greedy(target, prompt(tokens), 20).tolist()
    assert len(traced) == 1
    for drafter in (NGramDrafter(), None):
        out = Decoder(target, drafter, Policy(tree=TreeShape.chain(5))).generate(prompt(), max_new_tokens=30)
        assert out.sequences.tolist() == greedy(target, prompt(), 30).tolist()
    assert len(traced) == 1


@pytest.mark.parametrize("static", [False, True])
def test_what_fills_a_tree_is_never_judged(shapes, static):
    """Where nothing is drafted, nothing passes as a draft, no rule refuses the tree, and draws are those of eager decoding."""
    target, drafter = headed()
    chain = TreeShape.chain(3, sampled=True)
    block = {"temperature": 1.0, "verify": "block"}
    runs = [
        (Decoder(target), {"verify": ANYTHING}),
        (Decoder(target, NGramDrafter(), Policy(tree=TreeShape.chain(5))), {"verify": ANYTHING}),
        (Decoder(target, policy=Policy(tree=chain)), block),
        (Decoder(target, drafter, Policy(tree=chain)), block),
        (Decoder(target, drafter, Policy(tree=TREES["with copies"])), {"verify": ANYTHING}),
        (Decoder(target, drafter, Policy(tree=TREES["with copies"])), {"temperature": 1.0}),
    ]
    eager = [decoder.generate(prompt(), max_new_tokens=30, **options) for decoder, options in runs]
    target.compile(static=static)
    for wanted, (decoder, options) in zip(eager, runs, strict=True):
        got = decoder.generate(prompt(), max_new_tokens=30, **options)
        assert tagged(got) == tagged(wanted)
    assert {token.tag for token in eager[0].tokens} == {"bonus"}


@pytest.mark.parametrize("schedule", ["heuristic", "confidence", "entropy", "cost"])
def test_schedules_decide_as_ever_in_a_graph_of_all_sizes(traced, schedule):
    target, drafter = headed()
    decoder = Decoder(target, drafter, Policy(tree=TreeShape(3, 3, 12), speculation=Speculation(schedule)))
    eager = decoder.generate(prompt(), max_new_tokens=60)
    target.compile(static=False)
    out = decoder.generate(prompt(), max_new_tokens=60)
    assert out.sequences.tolist() == eager.sequences.tolist()
    if schedule != "cost":  # which goes by the clock
        assert out.stats == replace(eager.stats, **times(out))
    assert len(traced) == 1


def test_models_of_the_same_sizes_have_graphs_of_their_own(traced):
    decoders = []
    for seed, architecture in enumerate(("llama", "llama", "olmo2")):
        target = tiny_target(architecture, seed)
        target.compile(static=False)
        head = HeadDrafter(tiny_head(target, seed=seed), target)
        decoders.append(Decoder(target, head, Policy(tree=TREES["eagle-2"])))
    for decoder in [*decoders, *decoders]:
        out = decoder.generate(prompt(), max_new_tokens=20).sequences.tolist()
        assert out == greedy(decoder.target, prompt(), 20).tolist()


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in ARCHITECTURES],
)
def test_one_graph_serves_other_architectures(traced, architecture):
    target = tiny_target(architecture)
    drafter = HeadDrafter(tiny_head(target), target)
    target.compile(static=False)
    for tokens in (5, 30):
        decoder = Decoder(target, drafter, Policy(tree=TreeShape(3, 3, 8)))
        out = decoder.generate(prompt(tokens), max_new_tokens=30).sequences.tolist()
        assert out == greedy(target, prompt(tokens), 30).tolist()
    assert len(traced) <= (3 if architecture == "llama4_text" else 1)  # that one reads the length of its cache


def test_what_a_graph_writes_to_stays_where_it_is(monkeypatch):
    """inductor's condition for CUDA graphs: each input that is written to is a static one."""
    real, found = torch.compile, []

    def look(graph, inputs):
        meta = TracingContext.get().fw_metadata
        written = {i for i, info in enumerate(meta.input_info) if info.mutates_data}
        found.append((written, set(meta.static_input_indices)))
        return graph.forward

    backend = aot_autograd(fw_compiler=look, inference_compiler=look, keep_inference_input_mutations=True)
    monkeypatch.setattr(torch, "compile", lambda function, **given: real(function, dynamic=False, backend=backend))
    torch._dynamo.reset()
    target, _ = headed()
    target.compile(static=True)
    cache = TreeCache(3, 1, "cpu", 256)
    target.forward(prompt(), cache=cache)
    cache.commit_first([9])
    cache.compiled = target.compiled
    cache.mark_static()
    visible = cache.visible(causal(4, 1, torch.device("cpu")))
    positions = torch.arange(9, 13)[None]
    target.forward(prompt(4), position_ids=positions, visible=visible, cache=cache)
    ((written, static),) = found
    assert len(written) == 2 * 3  # keys and values
    assert written <= static


def test_every_shape_is_compiled_however_many_there_are(traced):
    class Double:
        def run(self, x):
            return x + x

    double = Compilation(static=True).apply(Double().run, torch.device("cpu"))
    for size in range(2, 14):
        assert double(torch.ones(size)).sum() == 2 * size
    assert len(traced) == 12


def test_where_nothing_can_be_compiled_it_is_said_in_one_line(monkeypatch, tmp_path, capsys):
    def broken(function, **given):
        raise RuntimeError("\nno g++ here\nand more about it")

    monkeypatch.setattr(torch, "compile", broken)
    target = tiny_target()
    with pytest.raises(SlipstreamError, match=r"nothing can be compiled for cpu here, decode without: no g\+\+ here$"):
        slipstream.load(target, compiled=True)
    Quickstart(tmp_path, 12.0, False, Recipe()).compile(target)
    assert "no g++ here" in " ".join(capsys.readouterr().err.split())
    assert target.compiled is None


def test_results_say_whether_forwards_were_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", lambda function, **given: function)
    target = tiny_target()
    assert not header(target, "none", 0)["device"].endswith("compiled")
    Quickstart(tmp_path, 1.0, False, Recipe()).compile(target)  # a look that takes a minute
    assert target.compiled is None
    Quickstart(tmp_path, 12.0, False, Recipe()).compile(target)
    assert header(target, "none", 0)["device"].endswith("threads), compiled")
    assert slipstream.load(target, compiled=True).target._compiled is target._compiled  # what is compiled stays


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a card: reading a number, or a size that depends on numbers."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "isin")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += name in self.WAITING or by_mask
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch) -> Reads:
    reads, lists, make = Reads(), torch.Tensor.tolist, torch.tensor

    def tolist(self):
        reads.count += 1
        return lists(self)

    def tensor(*args, device=None, **kwargs):  # with a device, a copy that is waited for
        reads.count += device is not None
        return make(*args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    monkeypatch.setattr(torch, "tensor", tensor)
    return reads


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("verify", ["exact", Verifier("mars", "margin", 3.0, regret=5.0)])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize(
    ("kind", "temperature"), [("eagle3", 0.0), ("parallel", 0.0), ("n-gram", 0.0), ("eagle3", 1.0), ("parallel", 1.0)]
)
def test_a_round_waits_once_for_the_card(shapes, reads, kind, temperature, tree, verify, compiled):
    target, drafter = (tiny_target(), NGramDrafter()) if kind == "n-gram" else headed(kind)
    if compiled:
        target.compile(static=True)
    decoder = Decoder(target, drafter, Policy(tree=tree))
    counts: list[int] = []
    with reads:
        out = decoder.generate(
            prompt(),
            max_new_tokens=30,
            temperature=temperature,
            verify=verify,
            on_tokens=lambda _: counts.append(reads.count),
        )
    rounds = [after - before for before, after in pairwise(counts)]
    assert len(rounds) == len(out.stats.accept_lengths) >= 5
    assert set(rounds) == {1}


def test_what_a_round_taught_the_confidence_schedule_is_read_at_once(reads):
    tokens, parents = torch.arange(6).expand(3, -1), torch.tensor([0, 0, 0, 1, 1, 3]).expand(3, -1)
    tree = make_tree(tokens, parents, -tokens.float(), levels=3)
    schedule = Confidence(TreeShape(), 0.4)
    with reads:
        schedule.observe(tree, [[0], [0, 1, 3], [0, 2]], 0.0, 0.0)
    assert reads.count == 1
    assert [passed for _, passed in schedule.seen] == [False, True, True, False, False, False]
