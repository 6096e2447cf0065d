"""The largest logits, held to torch's own."""

import pytest
import torch

from slipstream.distill.largest import Largest


def drawn(size, dtype, ties):
    x = torch.randn(3, 5, size, generator=torch.Generator().manual_seed(size)) * 4
    return (x.round() if ties else x).to(dtype)


@pytest.mark.parametrize("size", [3, 255, 512, 1000, 1536, 2049])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", [True, False])
def test_the_largest_and_its_first_place_are_those_of_max(size, dtype, ties):
    x = drawn(size, dtype, ties)
    x[0, 0] = x[0, 0].amin()
    x[0, 0, -1] = 9  # in the tail, where there is one
    x[0, 1] = -torch.inf
    value, place = Largest(x).first()
    assert torch.equal(value, x.amax(-1))
    assert torch.equal(place, (x == value[..., None]).long().argmax(-1))
    rows = x[:, 1:4:2]  # with gaps between them
    assert torch.equal(Largest(rows).first()[1], place[:, 1:4:2])


@pytest.mark.parametrize("size", [3, 255, 1000, 1536, 2049])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("ties", [True, False])
def test_the_largest_values_are_those_of_topk(size, count, ties):
    x = drawn(size, torch.bfloat16, ties)
    x[0, 0, -2:] = 90
    x[0, 1] = -torch.inf
    assert torch.equal(Largest(x).values(count), x.topk(count).values)


@pytest.mark.parametrize("place", [0, 300, 2048])
def test_what_is_no_number_counts_as_the_largest(place):
    x = drawn(2049, torch.float32, ties=False)
    x[1, 2, place] = torch.nan
    value, at = Largest(x).first()
    assert int(at[1, 2]) == place
    assert value.isnan().sum() == 1
    assert bool(Largest(x).values(3)[1, 2, 0].isnan())
