"""The regression: streaming changes nothing, and the truncated map is the best of its rank."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from awareness_vllm.errors import BadInput
from awareness_vllm.fit.solve import RIDGES, choose_ridge, leading_right_vectors, reduced_rank_ridge
from awareness_vllm.fit.statistics import Statistics

pytestmark = pytest.mark.unit

FEATURES, OUTPUTS, RANK = 24, 16, 3


def planted(rows: int, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows x, and y that is an affine map of rank 3 of them, off centre and of uneven scale."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mix, down, up = random(FEATURES, FEATURES), random(FEATURES, RANK), random(RANK, OUTPUTS)
    x = random(rows, FEATURES) @ mix * torch.logspace(-1, 1, FEATURES) + random(FEATURES)
    y = x @ down @ up
    y = y + noise * y.std(0) * random(rows, OUTPUTS)
    return x, y * torch.logspace(1, -1, OUTPUTS) + random(OUTPUTS)


def gathered(x: Tensor, y: Tensor, chunk: int) -> Statistics:
    # A small sample, so that the provisional means are off and must be taken back.
    statistics = Statistics.start(x[:20], y[:20])
    for begin in range(0, len(x), chunk):
        statistics.add(x[begin : begin + chunk], y[begin : begin + chunk])
    return statistics


@pytest.mark.parametrize("chunk", [1, 7, 300, 999])
def test_chunks_give_the_statistics_of_one_batch(chunk: int) -> None:
    x, y = planted(1000)
    whole, parts = gathered(x, y, 1000), gathered(x, y, chunk)
    assert parts.rows == whole.rows == 1000
    for one, other in zip(whole.covariances(), parts.covariances(), strict=True):
        # Products are summed in bfloat16's precision by chunk: about 2**-8 of their size.
        atol = 0.02 * one.abs().max().item()
        torch.testing.assert_close(other.triu(), one.triu(), atol=atol, rtol=0)
    torch.testing.assert_close(parts.x_sum, whole.x_sum, atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(parts.y_sum, whole.y_sum, atol=1e-2, rtol=1e-4)


def test_two_machines_statistics_add_up() -> None:
    x, y = planted(1000)
    whole = gathered(x, y, 1000)
    # Another sample to start from: other provisional means and scales.
    one, other = gathered(x[:600], y[:600], 300), Statistics.start(x[600:900], y[600:900])
    other.add(x[600:], y[600:])
    one.merge(other)
    assert one.rows == 1000
    for ours, theirs in zip(one.covariances(), whole.covariances(), strict=True):
        atol = 0.02 * theirs.abs().max().item()
        torch.testing.assert_close(ours.triu(), theirs.triu(), atol=atol, rtol=0)


REDUCE = """
import sys
import torch
from safetensors.torch import load_file, save_file
from awareness_vllm.fit.distributed import join
from awareness_vllm.fit.statistics import Statistics

rank, processes = join()
rows = load_file(sys.argv[1])
x, y = rows["x"][rank::processes].contiguous(), rows["y"][rank::processes].contiguous()
statistics = Statistics.start(x[:20], y[:20])
statistics.add(x, y)
total = statistics.all_reduce()
save_file(total.tensors() | {"rows": torch.tensor([total.rows])}, f"{sys.argv[2]}.{rank}")
"""


@pytest.mark.slow
def test_processes_add_up_over_gloo(tmp_path: Path) -> None:
    x, y = planted(1000)
    save_file({"x": x, "y": y}, tmp_path / "rows")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", REDUCE, str(tmp_path / "rows"), str(tmp_path / "out")]
    running = [
        subprocess.Popen(command, env={**os.environ, **group, "RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(60) for process in running] == [0, 0]
    result = [load_file(tmp_path / f"out.{rank}") for rank in range(2)]
    assert all(torch.equal(result[0][name], result[1][name]) for name in result[0])
    rows = int(result[0].pop("rows"))
    assert rows == 1000
    total = Statistics(**result[0], rows=rows)
    # As one process sees it, from the same first sample as the first of the two.
    whole = Statistics.start(x[0:40:2], y[0:40:2])
    whole.add(x, y)
    for ours, theirs in zip(total.covariances(), whole.covariances(), strict=True):
        atol = 0.02 * theirs.abs().max().item()
        torch.testing.assert_close(ours.triu(), theirs.triu(), atol=atol, rtol=0)


def test_centred_statistics_are_covariances() -> None:
    x, y = planted(1000)
    statistics = gathered(x, y, 300)
    standard = (x - statistics.x_mean) / statistics.x_std
    gram, cross = statistics.covariances()
    covariance = torch.cov(standard.T, correction=0)
    torch.testing.assert_close(gram.triu(), covariance.triu(), atol=1e-3, rtol=1e-3)
    both = torch.cov(torch.cat((standard, (y - statistics.y_mean) / statistics.y_std), 1).T)
    torch.testing.assert_close(cross, both[:FEATURES, FEATURES:], atol=2e-2, rtol=0)


def test_a_planted_map_is_recovered() -> None:
    x, y = planted(4000)
    statistics = gathered(x[:3000], y[:3000], 700)
    mean, scale = statistics.x_mean, statistics.x_std
    encode, decode, bias = reduced_rank_ridge(statistics, RANK, 1e-4, torch.ones(OUTPUTS))
    assert encode.shape == (FEATURES, RANK)
    assert decode.shape == (RANK, OUTPUTS)
    result = (x[3000:] - mean) / scale @ encode @ decode + bias
    error = (result - y[3000:]).square().mean(0) / y[3000:].var(0)
    assert error.max() < 1e-3


def test_the_map_keeps_the_means() -> None:
    x, y = planted(2000, noise=1.0)
    statistics = gathered(x, y, 2000)
    mean, scale = statistics.x_mean, statistics.x_std
    encode, decode, bias = reduced_rank_ridge(statistics, 1, 0.5, torch.ones(OUTPUTS))
    result = (x - mean) / scale @ encode @ decode + bias
    torch.testing.assert_close(result.mean(0), y.mean(0), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("rank", [1, 2, 5, OUTPUTS])
@pytest.mark.parametrize("weighted", [False, True])
def test_truncation_is_the_best_of_its_rank(rank: int, weighted: bool) -> None:
    x, y = planted(2000, noise=0.5)
    ridge = 0.05
    weight = torch.linspace(0.5, 3, OUTPUTS) if weighted else torch.ones(OUTPUTS)
    statistics = gathered(x, y, 2000)
    gram, cross = (s.double().numpy() for s in copy.deepcopy(statistics).covariances())
    gram = np.triu(gram) + np.triu(gram, 1).T + ridge * np.eye(FEATURES)
    y_std = statistics.y_std.double().numpy()
    encode, decode, _ = reduced_rank_ridge(statistics, rank, ridge, weight)
    result = (encode.double() @ decode.double()).numpy() / y_std

    w = weight.double().numpy()
    full = np.linalg.solve(gram, cross)
    # In the metric of the fitted values the loss of a map B is |Lᵀ(B - full)·w|².
    metric = np.linalg.cholesky(gram).T
    values = np.linalg.svd(metric @ full * w, compute_uv=False)
    best = (values[rank:] ** 2).sum()
    loss = np.square(metric @ (result - full) * w).sum()
    # The singular vectors are found by random projection, which costs a little where they decay
    # slowly.
    assert best * 0.999 <= loss + 1e-9 <= best * 1.1 + 1e-6 * (values**2).sum()
    assert np.linalg.matrix_rank(result, tol=1e-4 * np.abs(result).max()) <= rank


def test_too_few_rows_are_refused_with_the_number_needed() -> None:
    x, y = planted(FEATURES // 2 - 1)
    with pytest.raises(BadInput, match=rf"Found: 11 .*at least 12 for {FEATURES} features"):
        reduced_rank_ridge(gathered(x, y, 100), 2, 0.1, torch.ones(OUTPUTS))


def test_a_constant_feature_or_target_does_no_harm() -> None:
    x, y = planted(1000)
    x[:, 3], y[:, 2] = 7.0, -1.0
    statistics = gathered(x, y, 1000)
    for tensor in reduced_rank_ridge(statistics, RANK, 0.01, torch.ones(OUTPUTS)):
        assert tensor.isfinite().all()


@pytest.mark.parametrize(
    ("rows", "noise", "expected"), [(200, 3.0, RIDGES[-1]), (4000, 0.0, RIDGES[0])]
)
def test_noise_asks_for_more_ridge(rows: int, noise: float, expected: float) -> None:
    x, y = planted(rows + 500, noise)
    statistics = gathered(x[:rows], y[:rows], 100)
    before = copy.deepcopy(statistics)
    assert choose_ridge(statistics, x[rows:], y[rows:], torch.ones(OUTPUTS)) == expected
    for name, tensor in statistics.tensors().items():
        assert torch.equal(tensor, before.tensors()[name]), name


def test_columns_that_depend_on_each_other_have_a_basis_too() -> None:
    """As of degenerate anchors: few distinct tokens, so that the fitted values have a low rank."""
    column = torch.linspace(-1, 1, 40)[:, None]
    vectors = leading_right_vectors(column @ torch.ones(1, 300), rank=4, seed=0)
    assert vectors.shape == (300, 4)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(4), atol=1e-4, rtol=0)
    share = (vectors.T @ torch.ones(300)).norm() / torch.ones(300).norm()
    assert share > 0.999
