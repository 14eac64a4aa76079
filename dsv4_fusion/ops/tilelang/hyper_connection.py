"""TileLang kernels of the hyper-connection operators: two launches for all token counts, the same bits for all of them.

The first launch (``hc_project``) streams over the tokens once: it mixes the old streams and the sublayer's output into
the new streams, writes them, and multiplies them with ``fn``. A block owns a chunk of the hidden dimension, so that it
holds its part of ``fn`` in shared memory and reads it once, however many tokens pass by. Its partial sums go to a
workspace of 4 % of the streams' bytes. The second launch (``hc_finish``), a block a token, adds the partial sums, runs
Sinkhorn, collapses the new streams and normalises.

Batch invariance holds by construction: a partial sum is one warp's over 32 hidden columns of all streams, from zero,
with one tensor-core instruction; these are added in an order that depends on the hidden size alone. The token count
decides only which block does which tile. There are no atomics.

Accuracy: ``fn`` is cut into three bf16 numbers that add up to it exactly (8 + 8 + 8 bits of significand), and the
streams are bf16 already, so every product is exact and the sum is accumulated in fp32.
"""

import functools  # no postponed annotations here: TileLang evaluates a program's annotations where it is defined
import math
import threading
from concurrent.futures import Future
from dataclasses import dataclass

import tilelang
import tilelang.language as T
import torch

from .._library import compiling
from .hc_finish import finish, finish_shape
from .hc_project import BF16, F32, PROJECTING, ROWS, padded, project, project_shape

PASS_CONFIGS = {
    # Both kernels are written thread by thread, with their own barriers, bounds and copies.
    tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True,
    tilelang.PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,
    tilelang.PassConfigKey.TL_DISABLE_WARP_SPECIALIZED: True,
    tilelang.PassConfigKey.TL_DISABLE_DATA_RACE_CHECK: True,
    tilelang.PassConfigKey.TL_DISABLE_SHARED_MEMORY_REUSE: True,
    # ldg128 brings whole lines into L2: a warp's own reads are halves of them.
    tilelang.PassConfigKey.TL_DEVICE_COMPILE_FLAGS: ["-DTL_ENABLE_L2_PREFETCH=1"],
}


# Programs: both launches behind one host function


def _program(hidden: int, held: int, hc: int, placed: bool, mixes: str, norm: bool, wide: bool):
    """The program of one operator.

    Args:
        held: streams in memory; fewer than ``hc``, that is one, if all of them are the same.
        placed: it puts an output into the streams.
        mixes: "pre", "head" or "".
        norm: of the collapsed stream.
        wide: for many tokens.
    """
    mix = {"pre": (2 + hc) * hc, "head": hc, "": 0}[mixes]
    _, warps, chunks = project_shape(held, mix, hidden, wide)
    _, threads, _ = finish_shape(held, hidden)
    tokens = T.dynamic("tokens")
    finishing = tokens  # blocks of the second launch
    if mixes == "pre":
        finishing = tokens + T.ceildiv(tokens, 32 if wide else 1)
    # Functions, because one annotation object given to two parameters makes them one buffer.
    Streams = lambda: T.Tensor((tokens, held, hidden), BF16)  # noqa: E731
    Vectors = lambda: T.Tensor((tokens, hidden), BF16)  # noqa: E731
    Post = lambda: T.Tensor((tokens, hc), F32)  # noqa: E731
    Comb = lambda: T.Tensor((tokens, hc, hc), F32)  # noqa: E731
    Fn, Base, Scale = T.Tensor((mix, hc * hidden), F32), T.Tensor((mix,), F32), T.Tensor((1 if mix == hc else 3,), F32)
    Weight = T.Tensor((hidden if norm else mix,), F32)  # without a norm, ``base`` stands in
    Partial = T.Tensor((tokens, chunks, padded(mix) + 8), F32)

    if mixes == "":

        @T.prim_func
        def hc_post(
            output: Vectors(), streams: Streams(), post: Post(), comb: Comb(), new_streams: Streams(), groups: T.int32
        ):
            with T.Kernel(chunks, groups, threads=32 * warps) as (chunk, group):
                project(
                    streams,
                    (output, post, comb),
                    None,
                    new_streams,
                    None,
                    chunk,
                    group,
                    groups,
                    tokens,
                    hidden,
                    held,
                    1,
                    0,
                    wide,
                )

        return hc_post

    if mixes == "pre" and placed:

        @T.prim_func
        def hc_post_pre(
            output: Vectors(), streams: Streams(), post: Post(), comb: Comb(), fn: Fn, base: Base, scale: Scale,
            norm_weight: Weight, partial: Partial, new_streams: Streams(), new_post: Post(), new_comb: Comb(),
            collapsed: Vectors(), groups: T.int32, iterations: T.int32, rms_eps: T.float32, hc_eps: T.float32,
            norm_eps: T.float32,
        ):  # fmt: skip
            with T.Kernel(chunks, groups, threads=32 * warps) as (chunk, group):
                project(
                    streams, (output, post, comb), fn, new_streams, partial, chunk, group, groups, tokens, hidden,
                    held, 1, mix, wide,
                )  # fmt: skip
            with T.Kernel(finishing, threads=threads) as block:
                finish(
                    new_streams, partial, base, scale, norm_weight, new_post, new_comb, collapsed, block, tokens,
                    rms_eps, hc_eps, norm_eps, iterations, hidden, held, hc, mix, norm, wide,
                )  # fmt: skip

        return hc_post_pre

    if mixes == "pre":

        @T.prim_func
        def hc_pre(
            streams: Streams(), fn: Fn, base: Base, scale: Scale, norm_weight: Weight, partial: Partial, post: Post(),
            comb: Comb(), collapsed: Vectors(), groups: T.int32, iterations: T.int32, rms_eps: T.float32,
            hc_eps: T.float32, norm_eps: T.float32,
        ):  # fmt: skip
            with T.Kernel(chunks, groups, threads=32 * warps) as (chunk, group):
                project(
                    streams, None, fn, None, partial, chunk, group, groups, tokens, hidden, held, hc // held, mix, wide
                )
            with T.Kernel(finishing, threads=threads) as block:
                finish(
                    streams, partial, base, scale, norm_weight, post, comb, collapsed, block, tokens, rms_eps, hc_eps,
                    norm_eps, iterations, hidden, held, hc, mix, norm, wide,
                )  # fmt: skip

        return hc_pre

    if placed:

        @T.prim_func
        def hc_post_head(
            output: Vectors(), streams: Streams(), post: Post(), comb: Comb(), fn: Fn, base: Base, scale: Scale,
            norm_weight: Weight, partial: Partial, new_streams: Streams(), collapsed: Vectors(), groups: T.int32,
            rms_eps: T.float32, hc_eps: T.float32, norm_eps: T.float32,
        ):  # fmt: skip
            with T.Kernel(chunks, groups, threads=32 * warps) as (chunk, group):
                project(
                    streams, (output, post, comb), fn, new_streams, partial, chunk, group, groups, tokens, hidden,
                    held, 1, mix, wide,
                )  # fmt: skip
            with T.Kernel(finishing, threads=threads) as block:
                finish(
                    new_streams, partial, base, scale, norm_weight, None, None, collapsed, block, tokens, rms_eps,
                    hc_eps, norm_eps, 0, hidden, held, hc, mix, norm, wide,
                )  # fmt: skip

        return hc_post_head

    @T.prim_func
    def hc_head(
        streams: Streams(), fn: Fn, base: Base, scale: Scale, norm_weight: Weight, partial: Partial,
        collapsed: Vectors(), groups: T.int32, rms_eps: T.float32, hc_eps: T.float32, norm_eps: T.float32,
    ):  # fmt: skip
        with T.Kernel(chunks, groups, threads=32 * warps) as (chunk, group):
            project(streams, None, fn, None, partial, chunk, group, groups, tokens, hidden, held, hc // held, mix, wide)
        with T.Kernel(finishing, threads=threads) as block:
            finish(
                streams, partial, base, scale, norm_weight, None, None, collapsed, block, tokens, rms_eps, hc_eps,
                norm_eps, 0, hidden, held, hc, mix, norm, wide,
            )  # fmt: skip

    return hc_head


# Compile, once for each static key: no token count is among them

_lock = threading.Lock()
_compiled: dict[tuple, Future] = {}


def _compile(*key):
    """The host function that launches both kernels of a program; TileLang keeps the compiled code on disk."""
    program = _program(*key)
    kernel = tilelang.compile(program, execution_backend="tvm_ffi", pass_configs=PASS_CONFIGS)
    executable = kernel.adapter.get_exportable_executable()
    # The adapter's own call costs 4 µs more: it handles outputs that it allocates, and there are none here.
    return (executable.jit() if hasattr(executable, "jit") else executable).main


def _begin(*key) -> list[Future]:
    """Compile the programs for few tokens and for many, side by side, so that no later token count compiles."""
    with _lock:
        for wide in (False, True):
            if (*key, wide) not in _compiled:
                _compiled[*key, wide] = compiling().submit(_compile, *key, wide)
        return [_compiled[*key, wide] for wide in (False, True)]


@functools.cache
def _entries(*key):
    return tuple(future.result() for future in _begin(*key))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class _Plan:
    """All that a call needs to know beyond its tensors; computed once for a shape."""

    flat: bool  # one leading dimension
    tokens: int
    results: tuple  # (size, stride, dtype) of each output
    workspace: tuple
    groups: int  # of blocks in the first launch
    key: tuple  # of the programs
    wide: bool


def _layout(*shape: int, dtype: torch.dtype) -> tuple:
    return shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))), dtype


@functools.lru_cache(4096)
def _plan(shape: torch.Size, hc: int, placed: bool, mixes: str, norm: bool, device: torch.device) -> _Plan:
    """The wide program from as many tokens as give every block of it work; the narrow one below."""
    *lead, held, hidden = shape
    tokens = math.prod(lead)
    mix = {"pre": (2 + hc) * hc, "head": hc, "": 0}[mixes]
    _, warps, chunks = project_shape(held, mix, hidden, True)
    most = max(1, _processors(device) // chunks)
    wide = tokens >= most * warps * ROWS
    if not wide:
        _, warps, chunks = project_shape(held, mix, hidden, False)
        most = max(1, PROJECTING * _processors(device) // chunks)
    results = [_layout(*shape, dtype=torch.bfloat16)] if placed else []
    if mixes == "pre":
        results += [_layout(*lead, hc, dtype=torch.float32), _layout(*lead, hc, hc, dtype=torch.float32)]
    if mixes:
        results += [_layout(*lead, hidden, dtype=torch.bfloat16)]
    return _Plan(
        flat=len(lead) == 1,
        tokens=tokens,
        results=tuple(results),
        workspace=_layout(tokens, chunks, padded(mix) + 8, dtype=torch.float32),
        groups=min(-(-tokens // (ROWS * warps)), most),
        key=(hidden, held, hc, placed, mixes, norm),
        wide=wide,
    )


# Launch


def _new(layout: tuple, device: torch.device) -> torch.Tensor:
    """An empty tensor; ``empty_strided`` takes half the time of ``new_empty``."""
    size, stride, dtype = layout
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def _dense(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As the kernels read it: of this dtype, contiguous, at an address that 16 bytes divide."""
    if tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _run(placing, hidden_streams, mixes, parameters, norm_weight, scalars):
    """Launch one operator.

    Args:
        placing: (output, post, comb) or None.
        hidden_streams: [..., HC, D], or [..., 1, D].
        mixes: "pre", "head" or "".
        parameters: (fn, base, scale), or None if ``mixes`` is "".
        norm_weight: [D] or None.
        scalars: what the program takes after its tensors and the number of groups.

    Returns:
        A list: the new streams if there is ``placing``; post and comb if ``mixes`` is "pre"; collapsed if ``mixes``.
    """
    device, shape = hidden_streams.device, hidden_streams.shape
    hc = parameters[0].shape[1] // shape[-1] if mixes else shape[-2]
    plan = _plan(shape, hc, placing is not None, mixes, norm_weight is not None, device)
    results = [_new(layout, device) for layout in plan.results]
    if plan.tokens == 0:
        return results
    streams = _dense(hidden_streams, torch.bfloat16)
    given, outputs = [streams], results
    if placing:
        output, post, comb = placing
        given = [
            _dense(output, torch.bfloat16),
            streams,
            _dense(post, torch.float32),
            _dense(comb, torch.float32),
        ]
    if not plan.flat:
        lead = streams.dim() - 2
        given = [tensor.view(plan.tokens, *tensor.shape[lead:]) for tensor in given]
        outputs = [tensor.view(plan.tokens, *tensor.shape[lead:]) for tensor in outputs]
    if mixes:
        fn, base, scale = parameters
        base = _dense(base, torch.float32)
        given += [
            _dense(fn, torch.float32),
            base,
            _dense(scale, torch.float32),
            base if norm_weight is None else _dense(norm_weight, torch.float32),
            _new(plan.workspace, device),
        ]
    launch = _entries(*plan.key)[plan.wide]
    if device.index == torch.cuda.current_device():
        launch(*given, *outputs, plan.groups, *scalars)
    else:
        with torch.cuda.device(device):
            launch(*given, *outputs, plan.groups, *scalars)
    return results


# Operators


def hc_pre(
    hidden_streams, fn, base, scale, norm_weight=None, *, rms_eps=1e-6, hc_eps=1e-6, sinkhorn_iters=20, norm_eps=1e-6
):
    scalars = (sinkhorn_iters, rms_eps, hc_eps, norm_eps)
    return tuple(_run(None, hidden_streams, "pre", (fn, base, scale), norm_weight, scalars))


def hc_post(output, hidden_streams, post, comb):
    return _run((output, post, comb), hidden_streams, "", None, None, ())[0]


def hc_post_pre(
    output, hidden_streams, post, comb, fn, base, scale, norm_weight=None, *,
    rms_eps=1e-6, hc_eps=1e-6, sinkhorn_iters=20, norm_eps=1e-6,
):  # fmt: skip
    scalars = (sinkhorn_iters, rms_eps, hc_eps, norm_eps)
    return tuple(_run((output, post, comb), hidden_streams, "pre", (fn, base, scale), norm_weight, scalars))


def hc_head(hidden_streams, fn, base, scale, norm_weight=None, *, rms_eps=1e-6, hc_eps=1e-6, norm_eps=1e-6):
    return _run(None, hidden_streams, "head", (fn, base, scale), norm_weight, (rms_eps, hc_eps, norm_eps))[0]


def hc_post_head(
    output, hidden_streams, post, comb, fn, base, scale, norm_weight=None, *, rms_eps=1e-6, hc_eps=1e-6, norm_eps=1e-6
):
    scalars = (rms_eps, hc_eps, norm_eps)
    return _run((output, post, comb), hidden_streams, "head", (fn, base, scale), norm_weight, scalars)[-1]


# What a launch will need, compiled in the background; the arguments may be fake tensors


def _prepare(placed: bool, mixes: str, *tensors, norm_weight=None, **_):
    *_, held, hidden = tensors[1 if placed else 0].shape
    hc = tensors[4 if placed else 1].shape[1] // hidden if mixes else held
    if len(tensors) == (8 if placed else 5):
        norm_weight = tensors[-1]
    _begin(hidden, held, hc, placed, mixes, norm_weight is not None)


prepare_pre = functools.partial(_prepare, False, "pre")
prepare_post = functools.partial(_prepare, True, "")
prepare_post_pre = functools.partial(_prepare, True, "pre")
prepare_head = functools.partial(_prepare, False, "head")
prepare_post_head = functools.partial(_prepare, True, "head")
