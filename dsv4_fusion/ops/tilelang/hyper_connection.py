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

import tilelang
import tilelang.language as T
import torch

from .hc_finish import finish, finish_shape
from .hc_project import BF16, F32, ROWS, padded, project, project_shape

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


def _program(hidden: int, hc: int, placed: bool, mixes: str, norm: bool, wide: bool):
    """The program of one operator: ``placed``, it puts an output into the streams; ``mixes``: "pre", "head" or ""."""
    mix = {"pre": (2 + hc) * hc, "head": hc, "": 0}[mixes]
    _, warps, chunks = project_shape(hc, mix, hidden, wide)
    _, threads, _ = finish_shape(hc, hidden)
    tokens = T.dynamic("tokens")
    finishing = tokens  # blocks of the second launch
    if mixes == "pre":
        finishing = tokens + T.ceildiv(tokens, 32 if wide else 1)
    # Functions, because one annotation object given to two parameters makes them one buffer.
    Streams = lambda: T.Tensor((tokens, hc, hidden), BF16)  # noqa: E731
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
                    hc,
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
                    streams, (output, post, comb), fn, new_streams, partial, chunk, group, groups, tokens, hidden, hc,
                    mix, wide,
                )  # fmt: skip
            with T.Kernel(finishing, threads=threads) as block:
                finish(
                    new_streams, partial, base, scale, norm_weight, new_post, new_comb, collapsed, block, tokens,
                    rms_eps, hc_eps, norm_eps, iterations, hidden, hc, mix, norm, wide,
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
                project(streams, None, fn, None, partial, chunk, group, groups, tokens, hidden, hc, mix, wide)
            with T.Kernel(finishing, threads=threads) as block:
                finish(
                    streams, partial, base, scale, norm_weight, post, comb, collapsed, block, tokens, rms_eps, hc_eps,
                    norm_eps, iterations, hidden, hc, mix, norm, wide,
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
                    streams, (output, post, comb), fn, new_streams, partial, chunk, group, groups, tokens, hidden, hc,
                    mix, wide,
                )  # fmt: skip
            with T.Kernel(finishing, threads=threads) as block:
                finish(
                    new_streams, partial, base, scale, norm_weight, None, None, collapsed, block, tokens, rms_eps,
                    hc_eps, norm_eps, 0, hidden, hc, mix, norm, wide,
                )  # fmt: skip

        return hc_post_head

    @T.prim_func
    def hc_head(
        streams: Streams(), fn: Fn, base: Base, scale: Scale, norm_weight: Weight, partial: Partial,
        collapsed: Vectors(), groups: T.int32, rms_eps: T.float32, hc_eps: T.float32, norm_eps: T.float32,
    ):  # fmt: skip
        with T.Kernel(chunks, groups, threads=32 * warps) as (chunk, group):
            project(streams, None, fn, None, partial, chunk, group, groups, tokens, hidden, hc, mix, wide)
        with T.Kernel(finishing, threads=threads) as block:
            finish(
                streams, partial, base, scale, norm_weight, None, None, collapsed, block, tokens, rms_eps, hc_eps,
                norm_eps, 0, hidden, hc, mix, norm, wide,
            )  # fmt: skip

    return hc_head


# Compile, once for each static key: no token count is among them


@functools.cache
def _entry(hidden: int, hc: int, placed: bool, mixes: str, norm: bool, wide: bool):
    """The host function that launches both kernels of a program; TileLang keeps the compiled code on disk."""
    program = _program(hidden, hc, placed, mixes, norm, wide)
    kernel = tilelang.compile(program, execution_backend="tvm_ffi", pass_configs=PASS_CONFIGS)
    executable = kernel.adapter.get_exportable_executable()
    # The adapter's own call costs 4 µs more: it handles outputs that it allocates, and there are none here.
    return (executable.jit() if hasattr(executable, "jit") else executable).main


@functools.cache
def _entries(*key):
    """The programs for few tokens and for many; both at the first call, so that no later token count compiles."""
    return tuple(_entry(*key, wide) for wide in (False, True))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _plan(hidden: int, hc: int, mix: int, device: torch.device) -> tuple[int, int, int, int, int]:
    """From how many tokens the wide program is used; then groups of blocks at most and workspace rows of both."""
    _, warps, chunks = project_shape(hc, mix, hidden, True)
    _, _, slices = project_shape(hc, mix, hidden, False)
    groups = max(1, _processors(device) // chunks)
    return groups * warps * ROWS, groups, chunks, max(1, 3 * _processors(device) // slices), slices


# Launch


def _dense(tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """As the kernels read it: this dtype and shape, contiguous, at an address that 16 bytes divide."""
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    if tensor.shape != shape:
        tensor = tensor.reshape(shape)
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _run(placing, hidden_streams, mixes, parameters, norm_weight, scalars, results):
    """Launch one operator.

    Args:
        placing: (output, post, comb) or None.
        hidden_streams: [..., HC, D].
        mixes: "pre", "head" or "".
        parameters: (fn, base, scale), or None if ``mixes`` is "".
        norm_weight: [D] or None.
        scalars: what the program takes after its tensors and the number of groups.
        results: new outputs of the second launch, in the program's order.

    Returns:
        The new streams, or None without ``placing``.
    """
    *lead, hc, hidden = hidden_streams.shape
    tokens = hidden_streams.numel() // (hc * hidden)
    mix = {"pre": (2 + hc) * hc, "head": hc, "": 0}[mixes]
    new = torch.empty_like(hidden_streams, memory_format=torch.contiguous_format) if placing else None
    if tokens == 0:
        return new
    device = hidden_streams.device
    many, *plan = _plan(hidden, hc, mix, device)
    wide = tokens >= many
    groups, rows = plan[:2] if wide else plan[2:]
    _, warps, _ = project_shape(hc, mix, hidden, wide)
    groups = min(-(-tokens // (ROWS * warps)), groups)
    streams = _dense(hidden_streams, torch.bfloat16, (tokens, hc, hidden))
    arguments = [streams]
    if placing:
        output, post, comb = placing
        arguments = [
            _dense(output, torch.bfloat16, (tokens, hidden)),
            streams,
            _dense(post, torch.float32, (tokens, hc)),
            _dense(comb, torch.float32, (tokens, hc, hc)),
        ]
    if mix:
        fn, base, scale = parameters
        base = _dense(base, torch.float32, (mix,))
        arguments += [
            _dense(fn, torch.float32, (mix, hc * hidden)),
            base,
            _dense(scale, torch.float32, scale.shape),
            base if norm_weight is None else _dense(norm_weight, torch.float32, (hidden,)),
            torch.empty((tokens, rows, padded(mix) + 8), dtype=torch.float32, device=device),
        ]
    if placing:
        arguments.append(new.view(streams.shape) if lead != [tokens] else new)
    if lead != [tokens]:
        results = [result.view((tokens, *result.shape[len(lead) :])) for result in results]
    launch = _entries(hidden, hc, placing is not None, mixes, norm_weight is not None)[wide]
    if device.index == torch.cuda.current_device():
        launch(*arguments, *results, groups, *scalars)
    else:
        with torch.cuda.device(device):
            launch(*arguments, *results, groups, *scalars)
    return new


def hc_pre(
    hidden_streams, fn, base, scale, norm_weight=None, *, rms_eps=1e-6, hc_eps=1e-6, sinkhorn_iters=20, norm_eps=1e-6
):
    *lead, hc, hidden = hidden_streams.shape
    post = hidden_streams.new_empty((*lead, hc), dtype=torch.float32)
    comb = hidden_streams.new_empty((*lead, hc, hc), dtype=torch.float32)
    collapsed = hidden_streams.new_empty((*lead, hidden))
    results = (post, comb, collapsed)
    scalars = (sinkhorn_iters, rms_eps, hc_eps, norm_eps)
    _run(None, hidden_streams, "pre", (fn, base, scale), norm_weight, scalars, results)
    return results


def hc_post(output, hidden_streams, post, comb):
    return _run((output, post, comb), hidden_streams, "", None, None, (), ())


def hc_post_pre(
    output, hidden_streams, post, comb, fn, base, scale, norm_weight=None, *,
    rms_eps=1e-6, hc_eps=1e-6, sinkhorn_iters=20, norm_eps=1e-6,
):  # fmt: skip
    *lead, hc, hidden = hidden_streams.shape
    new_post = hidden_streams.new_empty((*lead, hc), dtype=torch.float32)
    new_comb = hidden_streams.new_empty((*lead, hc, hc), dtype=torch.float32)
    collapsed = hidden_streams.new_empty((*lead, hidden))
    results = (new_post, new_comb, collapsed)
    scalars = (sinkhorn_iters, rms_eps, hc_eps, norm_eps)
    new = _run((output, post, comb), hidden_streams, "pre", (fn, base, scale), norm_weight, scalars, results)
    return new, *results


def hc_head(hidden_streams, fn, base, scale, norm_weight=None, *, rms_eps=1e-6, hc_eps=1e-6, norm_eps=1e-6):
    *lead, _, hidden = hidden_streams.shape
    collapsed = hidden_streams.new_empty((*lead, hidden))
    scalars = (rms_eps, hc_eps, norm_eps)
    _run(None, hidden_streams, "head", (fn, base, scale), norm_weight, scalars, (collapsed,))
    return collapsed


def hc_post_head(
    output, hidden_streams, post, comb, fn, base, scale, norm_weight=None, *, rms_eps=1e-6, hc_eps=1e-6, norm_eps=1e-6
):
    *lead, _, hidden = hidden_streams.shape
    collapsed = hidden_streams.new_empty((*lead, hidden))
    scalars = (rms_eps, hc_eps, norm_eps)
    _run((output, post, comb), hidden_streams, "head", (fn, base, scale), norm_weight, scalars, (collapsed,))
    return collapsed
