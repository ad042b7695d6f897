"""On a GPU: every layer shape of the published models, modules and CUDA graphs. Skipped where there is none."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_problems import ALL_CODES, problem
from kernel_products import ALL_TOKENS, check_product, one_hot_rows

from toolchain.bench.shapes import PUBLISHED, matrix_shapes
from toolchain.checkpoint.modules import VQEmbedding, VQLinear
from toolchain.errors import EnvironmentMismatch, UsageError
from toolchain.native import launch
from toolchain.native.choice import torch_decode
from toolchain.native.library import KernelLibrary, find_library
from toolchain.values import CODES

pytestmark = pytest.mark.gpu

# Heads apart: 150,000 rows by 3,584 columns decode for minutes in NumPy.
SHAPES = sorted({shape for name in PUBLISHED for shape in matrix_shapes(name).values() if shape[0] < 50_000})
# Every shape, with codes and token counts interleaved to them in turn; both lists come round several times.
CASES = [
    (shape, code, tokens)
    for shape, code, tokens in zip(
        itertools.chain.from_iterable(itertools.repeat(SHAPES, 3)),
        itertools.cycle(ALL_CODES),
        itertools.cycle(ALL_TOKENS),
    )
]


class OnGpu:
    device = "cuda"

    def __init__(self, library: KernelLibrary) -> None:
        self.library = library

    @property
    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    path = find_library()
    if path is None:
        pytest.skip("the kernels are not built: mgvq kernels build")
    return OnGpu(KernelLibrary(path))


@pytest.mark.parametrize(("shape", "code", "tokens"), CASES, ids=str)
def test_every_layer_shape(gpu, shape, code, tokens):
    check_product(gpu, problem((code, shape[1]), rows=shape[0]), tokens)


@pytest.mark.parametrize("tokens", ALL_TOKENS)
@pytest.mark.parametrize("code", ALL_CODES, ids=str)
def test_every_code_with_every_number_of_tokens(gpu, code, tokens):
    check_product(gpu, problem((code, 528), rows=400, seed=tokens), tokens)


@pytest.mark.parametrize("code", ALL_CODES, ids=str)
def test_probes_of_a_whole_layer(gpu, code):
    given = problem((code, 1536), rows=2048)
    expected = torch.from_numpy(given.decoded()).half().cuda()
    weight = given.weight("cuda")
    assert torch.equal(launch.dequantize(gpu.library, weight, gpu.stream), expected)
    for x in one_hot_rows(1536, "cuda"):
        y = launch.linear(gpu.library, x, weight, None, gpu.stream)
        assert torch.equal(y, expected[:, x.float().argmax(dim=1)].T)


@pytest.mark.parametrize("tokens", [1, 8, 64, 512])
def test_a_hundred_repeats_are_the_same_bits(gpu, tokens):
    weight = problem((CODES["2,4,8"], 8960), rows=1536).weight("cuda")
    x = torch.randn(tokens, 8960, device="cuda").half()
    once = launch.linear(gpu.library, x, weight, None, gpu.stream)
    for _ in range(100):
        assert torch.equal(launch.linear(gpu.library, x, weight, None, gpu.stream), once)


def filled(kind: type, dtype: torch.dtype, rows: int = 512, columns: int = 1536):
    given = problem((CODES["2,4,8"], columns), rows=rows)
    module = kind(given.codes[0], rows, columns, "t0", dtype)
    module.codes, module.codebook, module.scales = (
        torch.from_numpy(a[0]) for a in (given.stored, given.tables, given.scales)
    )
    return module.cuda()


@pytest.mark.parametrize("dtype", launch.ACTIVATIONS)
def test_modules_agree_with_torchs_decoding(gpu, dtype):
    linear, embedding = filled(VQLinear, dtype), filled(VQEmbedding, dtype)
    before = linear.state_dict()["codes"].clone()
    x, ids = torch.randn(3, 1536, device="cuda").to(dtype), torch.tensor([0, 511, 7], device="cuda")
    ours, rows = linear(x), embedding(ids)
    with torch_decode():
        torch.testing.assert_close(ours, linear(x), rtol=2e-2, atol=2e-2 * ours.abs().max().item())
        assert torch.equal(rows, embedding(ids))
    assert torch.equal(linear.state_dict()["codes"], before)
    with pytest.raises(EnvironmentMismatch, match="move the model"):
        VQLinear(CODES["2,4,8"], 512, 1536, "t0", dtype)(x)


@pytest.mark.parametrize("dtype", launch.ACTIVATIONS)
def test_a_cuda_graph_holds_a_module(gpu, dtype):
    module = filled(VQLinear, dtype)
    x = torch.randn(1, 1536, device="cuda").to(dtype)
    cold = filled(VQLinear, dtype)
    with pytest.raises(UsageError, match="run the model once first"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        cold(x)
    torch.cuda.synchronize()
    expected = module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


def test_gradients_come_back_through_the_kernels(gpu):
    module = filled(VQLinear, torch.float32)
    x = torch.randn(4, 1536, device="cuda", requires_grad=True)
    module(x).sum().backward()
    expected = module.weight.sum(0).expand(4, 1536)
    torch.testing.assert_close(x.grad, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
