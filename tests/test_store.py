"""The feature store: what was captured is what is read, a kill costs nothing, and what does not fit is refused."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_target
from torch.testing._internal.two_tensor import TwoTensor

from slipstream.cli import main
from slipstream.configs.errors import SlipstreamError
from slipstream.configs.recipe import DataSettings
from slipstream.data.batches import Batches
from slipstream.data.conversations import tokenize
from slipstream.data.sources import read
from slipstream.distill import capture
from slipstream.distill.capture import bytes_per_token, claim, cut, finish, plan_store, write_shards
from slipstream.distill.features import StoredFeatures
from slipstream.distill.store import Store, decode, encode, weights_fingerprint
from slipstream.distill.target import Captured, Target, load_target

if TYPE_CHECKING:
    from pathlib import Path

    from datasets import Dataset

LENGTH = 48
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target(tiny_target_folder) -> Target:
    return load_target(str(tiny_target_folder), dtype="bfloat16")


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> Path:
    """Twenty conversations of many lengths, some cut, as JSON lines."""
    file = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    texts = [("Hi " * (1 + i % 7), "Yo hello " * (2 + i * i % 11)) for i in range(20)]
    rows = [{"messages": [{"role": "user", "content": u}, {"role": "assistant", "content": a}]} for u, a in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def tokens(conversations, target) -> Dataset:
    return tokenize(read(conversations), target.chat_tokenizer, LENGTH)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch, target):
    """Some 150 tokens a shard."""
    monkeypatch.setattr(capture, "SHARD_BYTES", 150 * bytes_per_token(target, "bfloat16"))


def write(target, tokens, folder, dtype="bfloat16", share=slice(None), batch_tokens=128, **settings) -> int:
    """Write some shards of a store; returns how many are missing then."""
    manifest = plan_store(target, tokens, DataSettings(**{"max_length": LENGTH, **settings}), dtype)
    claim(folder, manifest)
    write_shards(target, tokens, folder, manifest, range(len(manifest.shards))[share], batch_tokens)
    return finish(folder, manifest)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, target, tokens) -> Path:
    """A store, not to be changed."""
    folder = tmp_path_factory.mktemp("stores") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "SHARD_BYTES", 150 * bytes_per_token(target, "bfloat16"))
        assert write(target, tokens, folder) == 0
    return folder


@pytest.fixture
def copied(tmp_path, finished) -> Path:
    """A copy of the store, to be spoilt."""
    return shutil.copytree(finished, tmp_path / "copy")


def other_target(target: Target, what: str) -> Target:
    """The target with one thing changed."""
    model, tokenizer, layers = copy.deepcopy(target.model), copy.deepcopy(target.chat_tokenizer), target.layer_ids
    if what == "weights":
        model.base_model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    elif what == "target_dtype":
        model.float()
    elif what == "layer_ids":
        layers = [0, 2, 3]
    elif what == "template":
        tokenizer.chat_template += "\n"
    return Target(model, tokenizer, name=f"other {what}", layer_ids=layers)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# Reading and writing


def test_a_store_gives_back_what_the_target_gave(target, tokens, tmp_path):
    write(target, tokens, tmp_path / "store", batch_tokens=1)
    store = Store(tmp_path / "store")
    assert (store.manifest.rows, len(store.tokens)) == (20, 20)
    assert len(store.manifest.shards) > 3
    for row, (mine, theirs) in enumerate(zip(store.tokens, tokens, strict=True)):
        assert mine["input_ids"].tolist() == theirs["input_ids"].tolist()
        assert mine["mask"].tolist() == theirs["mask"].tolist()
        alone = target.capture(torch.tensor(theirs["input_ids"])[None])
        for stored, captured in zip(store.read(row), alone, strict=True):
            assert torch.equal(stored, captured[0])


def test_batches_of_a_store_are_those_of_the_conversations_with_zeros_behind(finished, tokens):
    store = Store(finished)
    mine, theirs = Batches(store.tokens, 128, 3), Batches(tokens, 128, 3)
    for index in range(2 * theirs.per_epoch):
        rows = theirs.rows(index)
        assert mine.rows(index) == rows
        assert all(torch.equal(a, b) for a, b in zip(mine[index][:2], theirs[index][:2], strict=True))
        batch = store.batch(rows, theirs.width(rows))
        assert batch.features.shape == (*theirs[index].input_ids.shape, 3 * 32)
        for i, row in enumerate(rows):
            length = len(tokens[row]["input_ids"])
            assert torch.equal(batch.hidden[i, :length], store.read(row).hidden)
            assert not batch.features[i, length:].any()


def test_batches_come_in_any_order_whatever_was_announced(finished):
    store = Store(finished)
    features = StoredFeatures(store, Batches(store.tokens, 128, 0))
    for index, then in [(0, [1, 2]), (1, [2, 4]), (2, [3]), (3, [0, 5, 0]), (0, [0]), (0, []), (0, range(50, 60))]:
        captured = features.of(index, features.batches[index], then)
        assert [*features._coming] == [*dict.fromkeys(then)]
        rows = features.batches.rows(index)
        assert torch.equal(captured.features, store.batch(rows, features.batches.width(rows)).features)


@given(st.lists(st.integers(1, 30), min_size=1), st.integers(1, 60))
def test_shards_hold_every_row_once_in_order_and_no_more_than_they_may(lengths, limit):
    parts = cut(lengths, limit)
    assert [row for part in parts for row in part] == list(range(len(lengths)))
    assert all(len(part) == 1 or sum(lengths[row] for row in part) <= limit for part in parts)
    for first, second in pairwise(parts):
        assert sum(lengths[row] for row in first) + lengths[second[0]] > limit


def test_a_target_spread_over_devices_gives_its_states_on_one():
    target = tiny_target()
    for module in (*target.model.base_model.layers[2:], target.model.base_model.norm):
        add_hook_to_module(module, AlignDevicesHook(execution_device="meta"))
        module.to("meta")  # the only second device of every machine
    captured = target.capture(torch.arange(12)[None])
    assert captured.features.shape == (1, 12, 96)
    assert {captured.features.device.type, captured.hidden.device.type} == {"meta"}


# fp8


@settings(deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(-30, 12), min_size=3, max_size=3))
def test_the_error_of_fp8_is_bounded_value_by_value_whatever_the_size_of_a_layer(seed, exponents):
    draw = torch.Generator().manual_seed(seed)
    layers = torch.randn(4, 5, 3, 16, generator=draw) * torch.tensor([2.0**e for e in exponents])[:, None]
    layers[..., 0] *= 300  # an outlier, as targets have them
    exact = Captured(layers.flatten(-2), layers[..., 1, :])
    rounded = decode(encode(exact, "float8_e4m3fn"), torch.float32)
    top = layers.abs().amax(-1, keepdim=True)
    bound = torch.maximum(layers.abs() / 16, top / 458752) * 1.0001
    assert ((rounded.features.view_as(layers) - layers).abs() <= bound).all()
    assert torch.equal(rounded.hidden, rounded.features.view_as(layers)[..., 1, :])


def test_an_fp8_store_takes_half_and_is_three_percent_off(target, tokens, tmp_path, finished):
    write(target, tokens, tmp_path / "fp8", "float8_e4m3fn")
    exact, rounded = Store(finished), Store(tmp_path / "fp8")
    assert bytes_per_token(target, "float8_e4m3fn") < 0.6 * bytes_per_token(target, "bfloat16")
    for row in range(20):
        for a, b in zip(exact.read(row), rounded.read(row), strict=True):
            assert b.dtype == torch.bfloat16
            assert float((a.float() - b.float()).norm() / a.float().norm()) < 0.03


def test_zeros_stay_zeros_in_fp8():
    zeros = Captured(torch.zeros(2, 6), torch.zeros(2, 3))
    assert not any(values.any() for values in decode(encode(zeros, "float8_e4m3fn"), torch.float32))


# Many processes, kills


def test_shares_write_the_store_of_one_process_byte_for_byte(target, tokens, tmp_path, finished):
    folder = tmp_path / "shared"
    assert write(target, tokens, folder, share=slice(1, None, 2)) > 0
    with pytest.raises(SlipstreamError, match="is not finished; give its slipstream capture command again"):
        Store(folder)
    assert write(target, tokens, folder, share=slice(0, None, 2)) == 0
    assert contents(folder) == contents(finished)


def options(target: Target, conversations: Path) -> list[str]:
    given = {"target.name": target.name, "data.conversations": conversations, "data.max_length": LENGTH}
    return [f"--{name}={value}" for name, value in {**given, "data.batch_tokens": 128}.items()]


def test_a_killed_capture_goes_on_to_the_store_of_an_uninterrupted_one(target, conversations, tmp_path, finished):
    folder = tmp_path / "killed"
    code = (
        "import os, sys, time, torch\nfrom slipstream.cli import main\nfrom slipstream.distill import capture\n"
        f"torch.set_num_threads({torch.get_num_threads()})\ncapture.SHARD_BYTES = {capture.SHARD_BYTES}\n"
        "sync, calls = os.fsync, []\n"
        "def slow(file):\n"
        "    calls.append(file)\n"
        "    if len(calls) == 4: print('in the third shard', flush=True); time.sleep(600)\n"
        "    sync(file)\n"
        "os.fsync = slow\nmain(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, "capture", *options(target, conversations), f"--out={folder}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the third shard\n"
        process.send_signal(signal.SIGKILL)
    names = sorted(contents(folder))
    assert [name[:11] for name in names] == [".shard-0000", "manifest.js", "shard-00000", "shard-00001"]
    before = (folder / names[2]).stat()
    assert main(["capture", *options(target, conversations), f"--out={folder}"]) == 0
    assert contents(folder) == contents(finished)
    assert (folder / names[2]).stat() == before


def test_a_finished_store_says_so_and_stays(capsys, target, conversations, finished):
    before = {file: file.stat() for file in finished.iterdir()}
    assert main(["capture", *options(target, conversations), f"--out={finished}"]) == 0
    assert "this store is finished; nothing was changed" in capsys.readouterr().err
    assert {file: file.stat() for file in finished.iterdir()} == before


def test_ranks_and_machines_divide_the_work_and_the_last_finishes(
    capsys, monkeypatch, target, conversations, tmp_path, finished
):
    told = []
    for machine in range(2):
        for rank in range(2):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "2")
            arguments = [*options(target, conversations), f"--out={tmp_path / 'store'}", f"--shard={machine}/2"]
            assert main(["capture", *arguments]) == 0
            told.append(capsys.readouterr().err)
    manifest = Store(finished).manifest
    count, size = len(manifest.shards), manifest.tokens
    assert (
        f"20 conversations, {size} tokens of 261 bytes: 1 MB in {count} files; 1 MB are to be written here" in told[0]
    )
    assert f"this share is written; 3 files of {tmp_path / 'store'} are still to come from others\n" in told[0]
    assert told[-1].strip() == f"store: {tmp_path / 'store'}"
    assert contents(tmp_path / "store") == contents(finished)


@pytest.mark.slow
def test_accelerate_launches_a_capture(target, conversations, tmp_path, finished):
    run = "from slipstream.distill import capture\nfrom slipstream.cli import main\nimport sys, torch\n"
    run += f"torch.set_num_threads({torch.get_num_threads()})\ncapture.SHARD_BYTES = {capture.SHARD_BYTES}\n"
    (tmp_path / "run.py").write_text(run + "main(sys.argv[1:])\n")
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes=2",
        str(tmp_path / "run.py"),
    ]
    subprocess.run([*launch, "capture", *options(target, conversations), f"--out={tmp_path / 'store'}"], check=True)
    assert contents(tmp_path / "store") == contents(finished)


# Damage


def shard_with(store: Store, row: int) -> tuple[Path, int]:
    """A row's file, and how many rows stand in the files before it."""
    first = 0
    for shard in store.manifest.shards:
        if row < first + shard.rows:
            return store.folder / shard.file, first
        first += shard.rows
    raise AssertionError


def flip(file: Path, what: str, share: float) -> None:
    """Change one byte of a tensor."""
    content = bytearray(file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + size])[what]["data_offsets"]
    content[8 + size + begin + int(share * (end - begin))] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("what", ["features", "hidden"])
def test_a_changed_byte_of_states_is_found_when_the_row_is_read(copied, what):
    file, first = shard_with(Store(copied), 9)
    flip(file, what, 0.999)
    store = Store(copied)
    last = max(row for row in range(20) if shard_with(store, row)[0] == file)
    for row in range(20):
        if row != last:
            store.read(row)
    with pytest.raises(
        SlipstreamError, match=rf"{file.name} is damaged: .* conversation {last + 1} do not match"
    ) as caught:
        store.batch([first, last], LENGTH)
    assert "delete it and give the store's slipstream capture command again" in str(caught.value)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("input_ids", "token ids are not those in manifest.json"),
        ("mask", "token ids are not those"),
        ("lengths", "token ids are not those"),
        ("checksums", "checksums are not those in manifest.json"),
    ],
)
def test_a_changed_byte_of_anything_else_is_found_when_the_store_is_opened(copied, what, told):
    file, _ = shard_with(Store(copied), 9)
    flip(file, what, 0.5)
    with pytest.raises(SlipstreamError, match=f"{file.name} is damaged: .*{told}"):
        Store(copied)


def test_a_shard_that_was_cut_short_or_is_of_another_store_is_told(copied, tmp_path, target, tokens):
    file, _ = shard_with(Store(copied), 0)
    write(other_target(target, "weights"), tokens, tmp_path / "other")
    whole = file.read_bytes()
    for content, told in [
        (whole[:-9], "damaged"),
        (b"", "damaged"),
        ((tmp_path / "other" / file.name).read_bytes(), "another store"),
    ]:
        file.write_bytes(content)
        with pytest.raises(SlipstreamError, match=told):
            Store(copied)


def test_a_shard_that_was_deleted_is_missed_and_written_again(copied, target, conversations, finished):
    file, _ = shard_with(Store(copied), 9)
    file.unlink()
    with pytest.raises(SlipstreamError, match=f"{file.name} is missing; give the store's slipstream capture command"):
        Store(copied)
    assert main(["capture", *options(target, conversations), f"--out={copied}"]) == 0
    assert contents(copied) == contents(finished)


# What does not fit


@pytest.mark.parametrize("what", ["weights", "target_dtype", "layer_ids", "template", "max_length", "think"])
def test_a_store_that_does_not_fit_is_refused_by_what_differs(finished, target, what):
    other = other_target(target, what)
    data = DataSettings(max_length=LENGTH + (what == "max_length"), think=True if what == "think" else None)
    with pytest.raises(SlipstreamError) as caught:
        Store(finished).require(other, data)
    message = str(caught.value)
    assert f"({what}: " in message
    assert f"store {finished} of target {target.name!r} does not fit target 'other {what}'" in message
    assert message.endswith("; give another data.features, or capture again")
    Store(finished).require(Target(target.model, target.tokenizer, name="elsewhere"), DataSettings(max_length=LENGTH))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"dtype": "float8_e4m3fn"}, r"\(dtype: 'bfloat16' there, 'float8_e4m3fn' here\); give another --out"),
        ({"max_length": 32}, r"\(max_length: 48 there, 32 here\)"),
        ({"tokens": 19}, r"\(conversations: other ones\)"),
    ],
)
def test_a_store_is_not_continued_with_other_settings(copied, target, tokens, changed, told):
    before = contents(copied)
    kept = tokens.select(range(changed.pop("tokens", 20)))
    with pytest.raises(SlipstreamError, match=told):
        write(target, kept, copied, **changed)
    assert contents(copied) == before


def test_a_manifest_without_shards_is_none(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, "shards": []}))
    with pytest.raises(SlipstreamError, match=r"manifest\.json is no manifest of a feature store \('shards'\)"):
        Store(copied)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "holds no feature store: manifest.json is missing"),
        ('{"format": 2}', "is of format 2; this slipstream reads 1"),
        ("{", "is no manifest of a feature store"),
        ("[]", "is no manifest of a feature store"),
    ],
)
def test_a_folder_that_is_no_store_says_so(tmp_path, content, told):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(SlipstreamError, match=told):
        Store(tmp_path)


def test_a_capture_leaves_a_folder_of_something_else_alone(capsys, target, conversations, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["capture", *options(target, conversations), f"--out={tmp_path}"]) == 2
    assert "exists and holds no feature store; give another --out" in capsys.readouterr().err
    assert main(["capture", *options(target, conversations), f"--out={tmp_path / 'mine.txt'}"]) == 2
    assert "is a file; give another --out" in capsys.readouterr().err
    assert contents(tmp_path) == {"mine.txt": b"mine"}


@pytest.mark.parametrize("shard", ["1", "2/2", "-1/2", "a/b", "0/0"])
def test_a_share_that_cannot_be_is_told(capsys, target, conversations, tmp_path, shard):
    assert main(["capture", *options(target, conversations), f"--out={tmp_path}", f"--shard={shard}"]) == 2
    assert f"--shard is I/N with I from 0 to below N, such as 0/4, not {shard!r}" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_told_before_a_shard_is_written(
    capsys, monkeypatch, target, conversations, tmp_path
):
    usage = namedtuple("usage", "total used free")(2**40, 2**40, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert main(["capture", *options(target, conversations), f"--out={tmp_path}"]) == 2
    assert "has 0 MB free, 1 MB are needed" in capsys.readouterr().err
    assert list(contents(tmp_path)) == ["manifest.json"]


def test_states_that_are_not_finite_are_not_kept(target, tokens, tmp_path):
    broken = other_target(target, "weights")
    broken.model.base_model.layers[2].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(SlipstreamError, match=r"are not finite in torch.bfloat16; try --target.dtype bfloat16"):
        write(broken, tokens, tmp_path / "store")
    assert list(contents(tmp_path / "store")) == ["manifest.json"]


def test_weights_in_parts_are_known_by_their_parts():
    """torchao's are tensors of plain ones: values, and their scales."""
    target = tiny_target()
    layer = target.inner.layers[0].mlp.down_proj
    whole, scale = layer.weight.detach(), torch.ones_like(layer.weight)
    prints = [weights_fingerprint(target)]
    for parts in ((whole, scale), (2 * whole, scale), (whole, 2 * scale)):
        layer.weight = torch.nn.Parameter(TwoTensor(*parts), requires_grad=False)
        prints += [weights_fingerprint(target), weights_fingerprint(target)]
    assert len(set(prints)) == 4
    assert prints[1::2] == prints[2::2]
