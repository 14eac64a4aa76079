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
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import tilelang
import tilelang.language as T
import torch

from .._library import compiling, layout, several
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


DEFAULTS = {"sinkhorn_iters": 20, "rms_eps": 1e-6, "hc_eps": 1e-6, "norm_eps": 1e-6}  # of the operators' schemas


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
    kept = wide and held <= 4  # more streams have no register left for the policy
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
                    False,
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
                    held, 1, mix, wide, kept,
                )  # fmt: skip
            with T.Kernel(finishing, threads=threads) as block:
                finish(
                    new_streams, partial, base, scale, norm_weight, new_post, new_comb, collapsed, block, tokens,
                    rms_eps, hc_eps, norm_eps, iterations, hidden, held, hc, mix, norm, wide, kept,
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
                    streams, None, fn, None, partial, chunk, group, groups, tokens, hidden, held, hc // held, mix, wide,
                    False,
                )  # fmt: skip
            with T.Kernel(finishing, threads=threads) as block:
                finish(
                    streams, partial, base, scale, norm_weight, post, comb, collapsed, block, tokens, rms_eps, hc_eps,
                    norm_eps, iterations, hidden, held, hc, mix, norm, wide, False,
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
                    held, 1, mix, wide, False,
                )  # fmt: skip
            with T.Kernel(finishing, threads=threads) as block:
                finish(
                    new_streams, partial, base, scale, norm_weight, None, None, collapsed, block, tokens, rms_eps,
                    hc_eps, norm_eps, 0, hidden, held, hc, mix, norm, wide, False,
                )  # fmt: skip

        return hc_post_head

    @T.prim_func
    def hc_head(
        streams: Streams(), fn: Fn, base: Base, scale: Scale, norm_weight: Weight, partial: Partial,
        collapsed: Vectors(), groups: T.int32, rms_eps: T.float32, hc_eps: T.float32, norm_eps: T.float32,
    ):  # fmt: skip
        with T.Kernel(chunks, groups, threads=32 * warps) as (chunk, group):
            project(
                streams, None, fn, None, partial, chunk, group, groups, tokens, hidden, held, hc // held, mix, wide,
                False,
            )  # fmt: skip
        with T.Kernel(finishing, threads=threads) as block:
            finish(
                streams, partial, base, scale, norm_weight, None, None, collapsed, block, tokens, rms_eps, hc_eps,
                norm_eps, 0, hidden, held, hc, mix, norm, wide, False,
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
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _fix(tensor: torch.Tensor, dtype: torch.dtype, lead: int, tokens: int) -> Callable[..., torch.Tensor] | None:
    """What makes of a tensor like this one what the kernels read; None if it is that already.

    They read this dtype, contiguous, at an address that 16 bytes divide; tokens in one dimension, not in ``lead``.
    """
    copied = tensor.dtype is not dtype or not tensor.is_contiguous() or tensor.data_ptr() % 16
    if not copied and lead == 1:
        return None

    def fix(tensor: torch.Tensor) -> torch.Tensor:
        if copied:
            tensor = tensor.to(dtype, memory_format=torch.contiguous_format, copy=True)
        return tensor if lead == 1 else tensor.view(tokens, *tensor.shape[lead:])

    return fix


class _Operator:
    """One operator: called as its public function without ``implementation``.

    Args:
        placed: it puts an output into the streams.
        mixes: what it takes out of them: "pre" for a sublayer's input, "head" for the end, "" for nothing.
    """

    def __init__(self, placed: bool, mixes: str) -> None:
        self.placed, self.mixes = placed, mixes
        self.parameters_at = 4 if placed else 1
        self.arity = self.parameters_at + (4 if mixes else 0)

    def __call__(self, *tensors, norm_weight=None, **options):
        if len(tensors) < self.arity:
            tensors = (*tensors, norm_weight)
        return self.bind(*tensors, **options)(*tensors)

    def key(self, *tensors, norm_weight=None, **_) -> tuple:
        """Of its programs: what they are compiled for."""
        *_, held, hidden = tensors[1 if self.placed else 0].shape
        hc = tensors[self.parameters_at].shape[1] // hidden if self.mixes else held
        norm = norm_weight is not None or (len(tensors) == self.arity and tensors[-1] is not None)
        return hidden, held, hc, self.placed, self.mixes, norm and bool(self.mixes)

    def prepare(self, *tensors, **options) -> None:
        """Begin to compile what any number of tokens will need; the tensors may be fake."""
        _begin(*self.key(*tensors, **options))

    def bind(self, *tensors, norm_weight=None, **options) -> Callable:
        """A function that does this for tensors with the same metadata, and the same options, as quickly as it can."""
        short = len(tensors) < self.arity
        if short:
            tensors = (*tensors, norm_weight)
        key = hidden, held, hc, _, _, norm = self.key(*tensors)
        streams = tensors[1 if self.placed else 0]
        lead = streams.shape[:-2]
        tokens, device = math.prod(lead), streams.device
        mix = {"pre": (2 + hc) * hc, "head": hc, "": 0}[self.mixes]
        results = [layout(tuple(streams.shape), torch.bfloat16)] if self.placed else []
        if self.mixes == "pre":
            results += [layout((*lead, hc), torch.float32), layout((*lead, hc, hc), torch.float32)]
        if self.mixes:
            results.append(layout((*lead, hidden), torch.bfloat16))
        unseen = int(self.placed and self.mixes == "head")  # results that are not returned
        if tokens == 0:
            return lambda *_: _returned(several(results, device)[unseen:])

        _, warps, chunks = project_shape(held, mix, hidden, True)
        groups = max(1, _processors(device) // chunks)
        wide = tokens >= groups * warps * ROWS  # each of its warps has a tile
        if not wide:
            _, warps, chunks = project_shape(held, mix, hidden, False)
            groups = min(-(-tokens // (ROWS * warps)), max(1, PROJECTING * _processors(device) // chunks))
        workspace = [layout((tokens, chunks, padded(mix) + 8), torch.float32)] if mix else []
        names = {"pre": ("sinkhorn_iters", "rms_eps", "hc_eps", "norm_eps"), "head": ("rms_eps", "hc_eps", "norm_eps")}
        scalars = [options.get(name, DEFAULTS[name]) for name in names.get(self.mixes, ())]
        dtypes = [torch.bfloat16] * (2 if self.placed else 1) + [torch.float32] * 6
        leads = [len(lead)] * self.parameters_at + [1] * 4
        fixes = [
            (index, fix)
            for index, tensor in enumerate(tensors)
            if tensor is not None and (fix := _fix(tensor, dtypes[index], leads[index], tokens)) is not None
        ]
        entry = _begin(*key)[wide].result()
        made, numbers, unseen = [*workspace, *results], (groups, *scalars), len(workspace) + unseen
        plain = not (fixes or short or len(lead) != 1 or (mix and not norm))

        def fixed(tensors, outputs) -> list:
            given = [*tensors, None] if short else list(tensors)
            for index, fix in fixes:
                given[index] = fix(given[index])
            if mix and not norm:
                given[-1] = given[self.parameters_at + 1]  # stands in, and is not read
            room, outputs = outputs[: len(workspace)], outputs[len(workspace) :]
            return [*given, *room, *(out.view(tokens, *out.shape[len(lead) :]) for out in outputs)]

        def launch(*tensors):
            outputs = several(made, device)
            entry(*(tensors + tuple(outputs) if plain else fixed(tensors, outputs)), *numbers)
            return _returned(outputs[unseen:])

        return launch


def _returned(outputs: list[torch.Tensor]) -> Any:
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


hc_pre = _Operator(False, "pre")
hc_post = _Operator(True, "")
hc_post_pre = _Operator(True, "pre")
hc_head = _Operator(False, "head")
hc_post_head = _Operator(True, "head")
