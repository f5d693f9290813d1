"""The Gram matrix of bfloat16 inputs, on CPUs that multiply these: twice as many products a second as in float32.

``vdpbf16ps`` adds two products of bfloat16, which are exact, to each of sixteen float32 sums. Tokens are packed in
pairs, panels of columns beside each other; a tile of the result stays in registers while all pairs pass. A sum is made
in the order of the tokens, whatever the number of threads.

Legend: T tokens, P pairs of tokens, C input channels.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from billhook.kernels.compiled import compiled

VECTOR = 16
"""Sums in a register."""
TILE_ROWS, PANEL = 8, 2 * VECTOR
"""Rows and columns of a tile, whose sums, with a row of the panel and the tile's rows, fit the 32 registers."""
PASS_TOKENS = 512
"""Tokens that are packed at once."""


def add_gram(gram_CC: Tensor, x_TC: Tensor) -> None:
    """Add ``X^T X`` to the lower triangle of ``gram_CC``, in place; the part above the diagonal is left alone.

    gram_CC: [C, C] float32, contiguous. x_TC: [T, C] bfloat16. Works on as many threads as torch does.
    """
    tokens, columns = x_TC.shape
    assert (gram_CC.is_contiguous(), gram_CC.dtype) == (True, torch.float32), gram_CC.dtype
    gram, x = gram_CC.numpy(), x_TC.contiguous().view(torch.int16).numpy()
    panels = -(-columns // PANEL)
    threads = min(torch.get_num_threads(), panels)
    packed_CPJ = np.empty((panels, -(-min(tokens, PASS_TOKENS) // 2), PANEL), dtype=np.int32)
    for start in range(0, tokens, PASS_TOKENS):
        part = x[start : start + PASS_TOKENS]

        def work(panel: int, loop: Any, part: Any = part) -> None:
            loop(part, packed_CPJ, panel, gram)

        for loop in (compiled(_pack_loop), compiled(_panel_loop)):
            if threads == 1:
                for panel in range(panels):
                    work(panel, loop)
            else:
                with ThreadPoolExecutor(threads) as pool:
                    for _ in pool.map(work, range(panels), [loop] * panels):
                        pass


def _pack_loop(x: Any, packed: Any, panel: int, gram: Any) -> None:
    """Pack two tokens' values of each column into one word, the first token's in its lower half; zeros fill up."""
    tokens, columns = x.shape
    first = panel * PANEL
    count = min(PANEL, columns - first)
    for pair in range((tokens + 1) // 2):
        even, odd = x[2 * pair], x[min(2 * pair + 1, tokens - 1)]
        keep = 0 if 2 * pair + 1 == tokens else -1
        for j in range(count):
            packed[panel, pair, j] = (np.int32(even[first + j]) & 0xFFFF) | ((np.int32(odd[first + j]) & keep) << 16)
        for j in range(count, PANEL):
            packed[panel, pair, j] = 0


def _panel_loop(x: Any, packed: Any, panel: int, gram: Any) -> None:
    """Add to the columns of one panel, from the diagonal down."""
    columns = gram.shape[0]
    pairs, stride = (x.shape[0] + 1) // 2, packed.shape[1] * PANEL
    corner = np.empty((TILE_ROWS, PANEL), dtype=np.float32)
    left = panel * PANEL
    for top in range(left, columns, TILE_ROWS):
        rows = top // PANEL * stride + top % PANEL
        if left + PANEL <= top + 1 and top + TILE_ROWS <= columns:
            _add_tile(packed, rows, panel * stride, pairs, gram, top * columns + left, columns)
            continue
        corner[:] = 0.0
        _add_tile(packed, rows, panel * stride, pairs, corner, 0, PANEL)
        for i in range(top, min(top + TILE_ROWS, columns)):
            for j in range(left, min(left + PANEL, i + 1)):
                gram[i, j] += corner[i - top, j - left]


class _BFloat(ir.Type):  # type: ignore[misc]
    """What llvmlite has no type for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _tile(
    typing: Any, packed: Any, rows: Any, columns: Any, pairs: Any, out: Any, place: Any, stride: Any
) -> tuple[Any, Any]:
    """Return the type and the code of ``_add_tile(packed, rows, columns, pairs, out, place, stride)``.

    It adds the products of TILE_ROWS columns of X with PANEL columns of X to a tile of ``out``. rows, columns: index of
    the first word of these in ``packed``; the next pair's is PANEL words further on. place, stride: index of the tile's
    first entry in ``out``, and from row to row. There must be a pair.
    """
    index = types.int64
    signature = types.void(packed, index, index, index, out, index, index)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, columns, pairs, place, stride = (arguments[each] for each in (1, 2, 3, 5, 6))
        words = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        sums = context.make_array(signature.args[4])(context, builder, arguments[4]).data
        integer, lane = ir.IntType(64), ir.IntType(32)
        vector, lanes = ir.VectorType(ir.FloatType(), VECTOR), ir.VectorType(lane, VECTOR)
        halves = ir.VectorType(_BFloat(), 2 * VECTOR)
        product = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector, halves, halves]), "llvm.x86.avx512bf16.dpbf16ps.512"
        )
        tile = [(i, v) for i in range(TILE_ROWS) for v in range(PANEL // VECTOR)]

        before, loop, after = builder.block, builder.append_basic_block("pairs"), builder.append_basic_block("add")
        builder.branch(loop)
        builder.position_at_end(loop)
        pair = builder.phi(integer)
        pair.add_incoming(integer(0), before)
        registers = [builder.phi(vector) for _ in tile]
        for register in registers:
            register.add_incoming(ir.Constant(vector, [0.0] * VECTOR), before)
        line = builder.mul(pair, integer(PANEL))
        left, top = builder.add(columns, line), builder.add(rows, line)
        panel = [
            builder.bitcast(
                builder.load(
                    builder.bitcast(builder.gep(words, [builder.add(left, integer(v * VECTOR))]), lanes.as_pointer()),
                    align=4,
                ),
                halves,
            )
            for v in range(PANEL // VECTOR)
        ]
        everywhere = ir.Constant(lanes, [0] * VECTOR)
        undefined = ir.Constant(lanes, ir.Undefined)
        row = []
        for i in range(TILE_ROWS):
            word = builder.load(builder.gep(words, [builder.add(top, integer(i))]))
            spread = builder.insert_element(undefined, word, lane(0))
            row.append(builder.bitcast(builder.shuffle_vector(spread, undefined, everywhere), halves))
        totals = [
            builder.call(product, [register, row[i], panel[v]])
            for register, (i, v) in zip(registers, tile, strict=True)
        ]
        following = builder.add(pair, integer(1))
        pair.add_incoming(following, loop)
        for register, total in zip(registers, totals, strict=True):
            register.add_incoming(total, loop)
        builder.cbranch(builder.icmp_signed("<", following, pairs), loop, after)

        builder.position_at_end(after)
        for total, (i, v) in zip(totals, tile, strict=True):
            at = builder.add(place, builder.add(builder.mul(stride, integer(i)), integer(v * VECTOR)))
            pointer = builder.bitcast(builder.gep(sums, [at]), vector.as_pointer())
            builder.store(builder.fadd(builder.load(pointer, align=4), total), pointer, align=4)
        return context.get_dummy_value()

    return signature, generate


_add_tile: Any = intrinsic(_tile)
