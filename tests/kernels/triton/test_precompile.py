"""What a first call compiles in threads is what it starts, and nothing is compiled twice."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import triton

from linattn.feature_maps import make
from linattn.kernels import kernel_attention
from linattn.kernels.triton import precompile, runtime

NO_THREADS = "needs triton.AsyncCompileMode: this release of Triton is not made to compile in threads"

FORESEEN = '''
import concurrent.futures, contextlib, json, sys
import torch, triton
from triton.backends.compiler import GPUTarget

class Driver:
    """An NVIDIA GPU that is not there."""
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=0: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

triton.runtime.driver.set_active(Driver())
found = {True: set(), False: set()}

def noted(*, key, fn, is_manual_warmup, **_):
    found[is_manual_warmup].add(f"{fn.name} {key}")
    return True  # which ends it before it compiles

triton.knobs.runtime.jit_cache_hook = noted

from linattn.kernels.triton import launch, ops, plan, precompile
from linattn.kernels.triton.config import Config
from linattn.kernels.triton.launch import Inputs, Options

torch.cuda.device = lambda index: contextlib.nullcontext()
torch.cuda.is_current_stream_capturing = lambda: False
torch.Tensor.get_device = lambda self: 0
precompile._cpus = lambda: 4

def case(length=1024, heads=2, kv_heads=2, dim=64, window=0, sinks=0, map="hedgehog", decay=False, offset=0,
         packed=False, state=False, bias=False, dtype="bfloat16", log=False, fused=True, segment=256, batch=2):
    dtype, f32 = getattr(torch, dtype), torch.float32
    batch = 1 if packed else batch
    def new(*shape, dtype=dtype, offset=offset):
        count = torch.Size(shape).numel()
        return torch.zeros(count + offset, dtype=dtype)[offset:].view(shape)
    q, k, v = new(batch, length, heads, dim), new(batch, length, kv_heads, dim), new(batch, length, kv_heads, dim)
    features, kw, activation = 64, {}, "given"
    if map != "given":
        activation, features = {"hedgehog": "mirrored", "exp": "exp"}[map], 128
        width = 64 if map == "hedgehog" else 128
        kw.update(query_weight=new(1, heads, dim, width, offset=0), key_weight=new(1, kv_heads, dim, width, offset=0))
    log = log or map == "exp"
    if map == "given" and log:
        kw.update(query_log=new(batch, length, heads, dtype=f32), key_log=new(batch, length, kv_heads, dtype=f32))
    if decay:
        kw["decay"] = new(batch, length, kv_heads, dtype=f32)
    if bias:
        kw.update(far_bias=new(heads, dtype=f32), sink_logits=new(heads, dtype=f32))
    if state:
        kw.update(state_kv=new(batch, kv_heads, features, dim, dtype=f32),
                  state_k=new(batch, kv_heads, features, dtype=f32),
                  state_m=new(batch, kv_heads, dtype=f32))
    if packed:
        n, tokens = 3, length // segment + 3
        kw.update(starts=torch.zeros(n + 1, dtype=torch.int64), lengths=torch.zeros(n + 1, dtype=torch.int64),
                  bases=torch.zeros(n + 1, dtype=torch.int64), seg_sequence=torch.zeros(tokens, dtype=torch.int32),
                  seg_first=torch.zeros(n + 1, dtype=torch.int32))
        if sinks:
            kw.update(sink_k=new(n, sinks, kv_heads, dim), sink_v=new(n, sinks, kv_heads, dim))
    o = Options(window, sinks, True, features, dim, activation, log, dim**-0.5, 0.0, 0.0, 0.0, False, segment, fused)
    for t in (q, k, v, *kw.values()):
        if t.is_floating_point():
            t.requires_grad_()
    return Inputs(q=q, k=k, v=v, **kw), o

def launches(options):
    for ran in found.values():
        ran.clear()
    precompile._kinds.clear()
    precompile._compiling.clear()
    x, o = case(**options)
    out = ops.attend(x, o, Config())
    concurrent.futures.wait(precompile._compiling.values())
    forward = {kind: sorted(ran) for kind, ran in found.items()}
    # The backward pass finds its own kernels compiled: those of its kind were foreseen as it is now.
    kinds, precompile._kinds = precompile._kinds, type("All", (set,), {"__contains__": lambda self, kind: True})()
    (out.float().sum()).backward()
    precompile._kinds = kinds
    return forward[True], forward[False], sorted(found[False])

print(json.dumps([launches(options) for options in json.loads(sys.argv[1])]))
'''

CASES: dict[str, dict[str, Any]] = {
    "hybrid": {"window": 128, "sinks": 4, "decay": True},
    "hedgehog": {},
    "given": {"map": "given"},
    "given-log": {"map": "given", "log": True, "window": 64, "bias": True},
    "exp": {"map": "exp", "window": 128, "decay": True},
    "exp-lone": {"map": "exp", "fused": False, "dtype": "float32"},
    "grouped": {"kv_heads": 1, "window": 64, "sinks": 1, "decay": True},
    "unaligned": {"map": "given", "offset": 1, "window": 64},
    "odd": {"length": 1001, "window": 100, "decay": True, "batch": 1},
    "one segment": {"length": 256, "decay": True},
    "two segments": {"length": 512, "window": 64},
    "packed": {"packed": True, "window": 64, "sinks": 4, "decay": True, "bias": True},
    "state": {"state": True, "window": 64, "decay": True},
    "float16": {"dtype": "float16", "length": 17, "heads": 1, "kv_heads": 1},
}


def subprocess_of(code: str, *arguments: str, **environment: str) -> str:
    root = Path(__file__).parents[3]
    given = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(root), *sys.path]),
        **environment,
    }
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=given)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def foreseen() -> dict[str, list[list[str]]]:
    if not hasattr(triton, "AsyncCompileMode"):
        pytest.skip(NO_THREADS)
    return dict(zip(CASES, json.loads(subprocess_of(FORESEEN, json.dumps(list(CASES.values())))), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_compiled_for_the_launches_that_follow(foreseen: dict[str, list[list[str]]], name: str) -> None:
    compiled, forward, both = map(set, foreseen[name])
    assert forward
    assert forward < both  # the backward pass has kernels of its own
    assert both == compiled


FIRST_CALLS = """
import json, sys
import torch, triton

compiled = []
triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, is_manual_warmup, **_: compiled.append(
    (fn.name, is_manual_warmup)
)

from linattn.feature_maps import make
from linattn.kernels import kernel_attention

options = json.loads(sys.argv[1])
phi = make("hedgehog", 64, num_heads=4).cuda()
q, k, v = (torch.randn(2, 1024, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
gates = {"decay": (-torch.rand(2, 1024, 4, device="cuda")).requires_grad_()} if options.pop("decay", False) else {}
out = kernel_attention(q, k, v, feature_map=phi, impl="triton", **options, **gates).out
out.float().sum().backward()
torch.cuda.synchronize()
assert all(bool(t.grad.isfinite().all()) for t in (q, k, v, *gates.values(), *phi.parameters()))
print(json.dumps(compiled))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"window": 128, "sinks": 4, "decay": True}], ids=["pure", "hybrid"])
def test_first_calls_start_what_threads_compiled(options: dict[str, Any], tmp_path: Path) -> None:
    if not precompile.IN_THREADS:
        pytest.skip(NO_THREADS)
    if precompile._cpus() < 2:
        pytest.skip("needs two CPUs")
    compiled = json.loads(subprocess_of(FIRST_CALLS, json.dumps(options), TRITON_CACHE_DIR=str(tmp_path)))
    assert sum(beforehand for _, beforehand in compiled) > 5
    assert [name for name, beforehand in compiled if not beforehand] == []


class Kernel:
    """One that does not compile."""

    arg_names: tuple[str, ...] = ()

    def warmup(self, *args: Any, **options: Any) -> None:
        raise RuntimeError("ptxas is missing")


def test_what_fails_is_left_to_the_call_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    with caplog.at_level(logging.DEBUG, "linattn"):
        precompile._compile(precompile._Launch(Kernel(), (), {}), 0)
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "ptxas is missing" in str(record.exc_info)


def test_calls_survive_what_cannot_be_foreseen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def body(x: torch.Tensor) -> list[torch.Tensor]:
        return [x + x.item()]  # which a meta tensor refuses

    monkeypatch.setattr(precompile, "IN_THREADS", True)
    monkeypatch.setattr(precompile, "_cpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with caplog.at_level(logging.DEBUG, "linattn"):
        precompile.prepare(body, (), [torch.ones(1)])
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert record.exc_info
    assert runtime.local.recorder is None


@pytest.mark.skipif(not runtime.INTERPRETED, reason="needs Triton's interpreter, TRITON_INTERPRET=1")
def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile, "_foreseen", lambda *call: pytest.fail("a call was foreseen"))
    q, k, v = torch.randn(3, 1, 19, 2, 8)
    assert kernel_attention(q, k, v, feature_map=make("hedgehog", 8, num_heads=2), impl="triton").out.isfinite().all()


def test_lengths_that_compile_alike_are_one_kind() -> None:
    def kind(length: int) -> Any:
        return precompile._kind(torch.empty(2, length, 4, 16))

    assert kind(1001) == kind(1003)
    assert kind(1001) != kind(1008)  # which 16 divides
    assert kind(1001) != kind(2001)  # more segments
