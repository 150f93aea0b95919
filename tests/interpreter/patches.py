"""What the interpreter of triton 3.6 gets wrong, corrected for the test process only. ``test_patches.py`` tests this.

bf16 values are held as uint16 and computed with as integers: ``tl.dot`` multiplies the bit patterns, additions, maxima
and comparisons take them for integers, conversions from fp32 truncate, and conversions from and to other types keep
the integer. Here bf16 is decoded to fp32, computed with, and rounded to nearest even, as the hardware does.

A maximum or minimum that is to ignore NaN keeps it; the hardware's does not.

A fused multiply-add in fp32 rounds the product too.

A loop with run-time bounds asks numpy to make an integer of an array, which numpy deprecates and, from 2.4 on, refuses.

Every call of a device function looks through all of triton's language for what to replace, a third of the tests' time.
Here what is replaced stays so, and is looked for once.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)

original_dot = Builder.create_dot
original_cast = Builder.cast_impl
original_fp_to_fp = Builder.create_fp_to_fp
original_binary = Builder.binary_op
original_patch_tensor = interpreter._patch_lang_tensor
original_patch_lang = interpreter._patch_lang


def decode(bits: np.ndarray) -> np.ndarray:
    """bf16 held as uint16 to fp32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values: np.ndarray) -> np.ndarray:
    """fp32 to bf16 held as uint16, rounded to nearest even; overflow becomes Inf and NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def is_bf16(handle: Handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def wide(handle: Handle) -> Handle:
    return Handle(decode(handle.data), tl.float32) if is_bf16(handle) else handle


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    return original_dot(self, wide(a), wide(b), d, input_precision, max_num_imprecise_acc)


def cast_impl(self, src, dst_type):
    src = wide(src)
    if dst_type.scalar != tl.bfloat16:
        return original_cast(self, src, dst_type)
    return Handle(encode(src.data.astype(np.float32)), tl.bfloat16)


def create_fp_to_fp(self, src, dst_type, rounding_mode):
    if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
        assert rounding_mode != interpreter._ir.ROUNDING_MODE.RTZ, "no kernel truncates to bf16"
        return self.cast_impl(src, dst_type)
    return original_fp_to_fp(self, src, dst_type, rounding_mode)


def binary_op(self, lhs, rhs, op):
    if not (is_bf16(lhs) and is_bf16(rhs)):
        return original_binary(self, lhs, rhs, op)
    output = op(decode(lhs.data), decode(rhs.data))
    return Handle(output, tl.int1) if op in COMPARISONS else Handle(encode(output), tl.bfloat16)


def create_fma(self, x, y, z):
    if z.dtype.scalar != tl.float32:
        return Handle(x.data * y.data + z.data, z.dtype.scalar)
    # fp64 holds the product exactly, and has 29 more bits for the sum
    total = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
    return Handle(total.astype(np.float32), tl.float32)


def get_bf16(self, value):
    return Handle(encode(np.array([value])), tl.bfloat16)


def patch_tensor(tensor, scope):
    original_patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


class Kept(interpreter._LangPatchScope):
    """What stays replaced behind a launch."""

    def restore(self) -> None:
        self._changes.clear()


replaced: set[tuple[bool, bool]] = set()  # of the modules tl and tl.core
seen: dict[int, tuple[bool, bool]] = {}  # what a kernel's module has of them, by its globals


def patch_lang(fn):
    names = seen.get(id(fn.__globals__))
    if names is None:
        values = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        names = seen[id(fn.__globals__)] = (tl in values, tl.core in values)
    if names not in replaced:
        original_patch_lang(fn)
        replaced.add(names)
    return Kept()


def install() -> None:
    """Patches the interpreter of this process."""
    Builder.create_dot = create_dot
    Builder.cast_impl = cast_impl
    Builder.create_fp_to_fp = create_fp_to_fp
    Builder.binary_op = binary_op
    Builder.get_bf16 = get_bf16
    Builder.create_fma = create_fma
    Builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    Builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    interpreter._patch_lang_tensor = patch_tensor
    interpreter._patch_lang = patch_lang
