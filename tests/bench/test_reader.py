"""Reading and nothing else: every byte once, on every device."""

import pathlib
import re

import pytest
import torch

from csfast import ops
from csfast.bench.reader import MOST_BUFFERS, Reader

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not ops.cuda_available(), reason="needs a CUDA device"),
        ],
    ),
]


def drawn(*sizes, device="cpu"):
    """Buffers of random words."""
    g = torch.Generator().manual_seed(len(sizes))
    return [
        torch.randint(-(2**31), 2**31, (size,), generator=g).to(torch.int32).to(device)
        for size in sizes
    ]


def sum_of(words):
    return sum(int(w.long().sum()) for w in words) % 2**32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "sizes",
    [
        (4,),
        (8, 4, 16),
        (16_384, 16_384),  # whole chunks of a block
        (16_384 * 3 + 4, 12, 16_380, 16_384 * 2 - 4),
        (4 * 1_000_003,),
        tuple(4 * (1 + i % 5) for i in range(MOST_BUFFERS)),
    ],
    ids=lambda sizes: f"{len(sizes)} of {max(sizes)}",
)
def test_every_word_is_read_once(sizes, device):
    """Words of which one is left out, or read twice, have another sum."""
    words = drawn(*sizes, device=device)
    read = Reader(words)
    assert read.n_bytes == 4 * sum(sizes)
    read()
    assert sum_of([read.sums]) == sum_of(words)
    words[-1][-1] += 1  # the last one, too
    words[0][0] += 1
    read()
    assert sum_of([read.sums]) == sum_of(words)


def test_tensors_of_any_type_are_read():
    halves = torch.arange(4096, dtype=torch.int16).view(torch.bfloat16)
    codes = torch.arange(256, dtype=torch.uint8).repeat(4)
    read = Reader([halves, codes])
    read()
    words = [halves.view(torch.int32), codes.view(torch.int32)]
    assert sum_of([read.sums]) == sum_of(words)
    assert read.n_bytes == 2 * 4096 + 1024


def test_the_number_of_threads_changes_nothing():
    words = drawn(100_004)
    read = Reader(words)
    found = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        read()
        found.append(int(read.sums))
    torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_buffers_are_kept_alive():
    read = Reader(drawn(1 << 20))
    read()
    first = int(read.sums)
    torch.zeros(1 << 20, dtype=torch.int32)  # would take their place
    read()
    assert int(read.sums) == first


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ([], r"^\[read\] 0 buffers on \[\], .*: want 1 to 240 contiguous ones on one device\.$"),
        ([torch.zeros(8, 8)[:, 4:]], r"^\[read\] 1 buffers on .*, of strides \[\(8, 1\)\] where"),
        (
            [torch.zeros(4), torch.zeros(4, device="meta")],
            r"^\[read\] 2 buffers on \['cpu', 'meta'\]",
        ),
    ],
)
def test_refuses_what_has_no_address(buffers, message):
    with pytest.raises(ValueError, match=message):
        Reader(buffers)


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        ([torch.zeros(4), torch.zeros(8)[1:5]], r"^\[read\] buffer 1 begins 4 bytes past a mult"),
        ([torch.zeros(5)], r"^\[read\] buffer 0 of 20 bytes: want a multiple of 16 from 16 to"),
        ([torch.zeros(0)], r"^\[read\] buffer 0 of 0 bytes: want a multiple of 16"),
        ([torch.zeros(4)] * (MOST_BUFFERS + 1), r"^\[read\] 241 buffers: want 1 to 240\.$"),
    ],
)
def test_refuses_what_is_not_of_whole_vectors(buffers, message):
    with pytest.raises(ValueError, match=message):
        Reader(buffers)()


def test_as_many_buffers_as_the_native_half_takes():
    text = (ROOT / "cpp" / "include" / "csfast" / "read.h").read_text(encoding="utf-8")
    assert int(re.search(r"kMaxSpans = (\d+);", text)[1]) == MOST_BUFFERS


@pytest.mark.skipif(ops.cuda_available(), reason="csfast has CUDA")
def test_without_cuda_it_says_so():
    from csfast import _native

    # Built without it, or with it for a machine that has no device.
    with pytest.raises(ops.BackendError, match=r"^\[read\] (csfast was built without|.*cuda)"):
        _native.read_sums(True)


@pytest.mark.gpu
@pytest.mark.skipif(not ops.cuda_available(), reason="needs a CUDA device")
def test_a_graph_reads_what_is_there_when_it_is_replayed():
    words = drawn(1 << 16, device="cuda")
    read = Reader(words)
    read()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        read()
    words[0][7] += 5
    graph.replay()
    assert sum_of([read.sums]) == sum_of(words)
