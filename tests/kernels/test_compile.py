"""The operator under torch.compile: whole graphs, from the first call of a process on, and few of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from linattn.feature_maps import make
from linattn.kernels import dispatch, kernel_attention


def test_compiled_graphs_serve_many_lengths() -> None:
    """Fewer graphs than lengths: torch.compile gives up after eight."""
    torch.compiler.reset()
    phi = make("hedgehog", 4, num_heads=2)
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel_attention(q, k, v, feature_map=phi, window=4, sinks=1).out

    lengths = (65, 70, 100, 101, 127, 130, 150, 200, 300)
    for length in lengths:
        q, k, v = torch.randn(3, 1, length, 2, 4)
        want = kernel_attention(q, k, v, feature_map=phi, window=4, sinks=1).out
        torch.testing.assert_close(compiled(q, k, v), want)
    assert len(graphs) <= len(lengths) / 2


def test_the_first_call_of_a_process_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(dispatch, "_announced", set())
    phi = make("elu", 4)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel_attention(q, k, v, feature_map=phi).out

    q, k, v = torch.randn(3, 1, 5, 2, 4)
    torch.testing.assert_close(compiled(q, k, v), kernel_attention(q, k, v, feature_map=phi).out)


def test_compiles_under_autocast() -> None:
    torch.compiler.reset()
    phi = make("hedgehog", 4, num_heads=2)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return kernel_attention(q, k, v, feature_map=phi, window=3).out

    q, k, v = torch.randn(3, 1, 40, 2, 4)
    torch.testing.assert_close(compiled(q, k, v), kernel_attention(q, k, v, feature_map=phi, window=3).out)
