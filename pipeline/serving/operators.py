"""The operators that a dense program may call. All are functions of their arguments: none writes to one, to a file, or draws.

A fusion that needs another one adds it here; jobs.export refuses a program with operators that are not listed.
"""

# Of torch.ops.aten.
ALLOWED = frozenset({
    "__and__.Tensor", "__or__.Tensor", "add.Scalar", "add.Tensor", "addcmul.default", "addmm.default", "amax.default",
    "amin.default", "arange.default", "arange.start", "arange.start_step", "argmax.default", "argsort.default",
    "baddbmm.default", "bitwise_and.Tensor", "bitwise_not.default", "bitwise_or.Tensor", "bmm.default", "cat.default",
    "chunk.default", "clamp.Tensor", "clamp.default", "clamp_max.default", "clamp_min.default", "clone.default",
    "contiguous.default", "cumsum.default", "div.Scalar", "div.Tensor", "einsum.default", "eq.Scalar", "eq.Tensor",
    "exp.default", "expand.default", "expand_as.default", "expm1.default", "eye.default", "eye.m", "flatten.using_ints",
    "floor_divide.default", "full.default", "full_like.default", "gather.default", "ge.Scalar", "ge.Tensor",
    "gelu.default", "gt.Scalar", "gt.Tensor", "index.Tensor", "index_add.default", "index_copy.default", "index_select.default",
    "layer_norm.default", "le.Scalar", "le.Tensor", "leaky_relu.default", "linear.default", "linspace.default",
    "log.default", "log1p.default", "log_softmax.int", "logical_and.default", "logical_not.default", "logsumexp.default",
    "lt.Scalar", "lt.Tensor", "masked_fill.Scalar", "masked_fill.Tensor", "matmul.default", "maximum.default",
    "mean.default", "mean.dim", "minimum.default", "mm.default", "mul.Scalar", "mul.Tensor", "narrow.default", "ne.Scalar",
    "ne.Tensor", "neg.default", "new_full.default", "new_ones.default", "new_zeros.default", "one_hot.default",
    "ones.default", "ones_like.default", "pad.default", "permute.default", "pow.Scalar", "pow.Tensor_Scalar",
    "prod.dim_int", "reciprocal.default", "relu.default", "repeat.default", "repeat_interleave.self_int",
    "reshape.default", "rsqrt.default", "rsub.Scalar", "scaled_dot_product_attention.default", "select.int",
    "sigmoid.default", "silu.default", "slice.Tensor", "softmax.int", "softplus.default", "split.Tensor",
    "split_with_sizes.default", "sqrt.default", "square.default", "squeeze.default", "squeeze.dim", "stack.default",
    "std.correction", "sub.Scalar", "sub.Tensor", "sum.default", "sum.dim_IntList", "sym_size.int", "t.default",
    "tanh.default", "tile.default", "to.dtype", "transpose.int", "tril.default", "triu.default", "unbind.int",
    "unflatten.int", "unsqueeze.default", "var.correction", "view.default", "view_as.default", "where.self",
    "zeros.default", "zeros_like.default",
})  # fmt: skip
# Give their first argument: there is no gradient, no write and no dropout.
PASSED_ON = frozenset({
    "alias.default", "detach.default", "detach_.default", "dropout.default", "lift_fresh_copy.default",
})  # fmt: skip
# Checks of the exporter, without a result.
LEFT_OUT = frozenset({"_assert_tensor_metadata.default", "promote_types.default"})
# Of those that make a tensor of a size that is an argument, or repeat their first one so often: the place of that argument.
REPEATING = {"one_hot.default": 1, "repeat.default": 1, "repeat_interleave.self_int": 1, "tile.default": 1}
SIZES = REPEATING | {
    "arange.default": 0, "arange.start": 0, "arange.start_step": 0, "eye.default": 0, "eye.m": 0, "full.default": 0,
    "linspace.default": 2, "new_full.default": 1, "new_ones.default": 1, "new_zeros.default": 1, "ones.default": 0,
    "zeros.default": 0,
}  # fmt: skip
