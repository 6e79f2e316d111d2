"""Position embedding modules: tables and slopes that are kept, one call into ``trinix.ops.rope`` or ``trinix.ops.alibi_bias``."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from trinix import dispatch, ops
from trinix.layers.arguments import check_sizes, check_use_triton
from trinix.ops.alibi import triton_can_run as triton_can_bias
from trinix.ops.rope import triton_can_run as triton_can_rotate


class FastRoPEPositionEmbedding(nn.Module):
    """Rotates q and k: ``q, k = embedding(q, k)`` with q ``[B, S, H, D]``, k ``[B, S, Hk, D]``; see ``trinix.ops.rope``.

    The table (cos, sin) is float32 whatever the model's dtype, lies where the module lies, and is no part of the state_dict.
    It grows when ``offset + S`` asks for it, not for positions given as a tensor: these have to be below
    ``max_position_embeddings``, or call ``grow(length)`` first. On a CPU others are a ValueError; on a GPU, where nobody looks,
    their results are NaN. A CUDA graph goes on reading the table of its capture:
    let it be long enough then for all that will run beside the graph, since a longer one takes its place and frees it.

    Args:
        dim: R, the rotated channels of a head (all of them for R = D), even.
        max_position_embeddings: the table's first length.
        base: theta.
        use_triton: None lets trinix choose, False means PyTorch, True means trinix's own kernels wherever they can run.
        interleaved: pairs are channels (2i, 2i + 1), not (i, i + R/2).
        scaling: as in ``trinix.ops.rope_table``.
    """

    def __init__(
        self,
        dim: int,
        max_position_embeddings: int = 2048,
        base: float = 10000.0,
        use_triton: bool | None = None,
        *,
        interleaved: bool = False,
        scaling: dict | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        if type(dim) is not int or dim < 2 or dim % 2:
            raise ValueError(f"{name}: dim must be an even int from 2 on, got {dim!r}")
        check_sizes(name, max_position_embeddings=max_position_embeddings)
        if not isinstance(base, int | float) or base <= 0:
            raise ValueError(f"{name}: base must be a number above 0, got {base!r}")
        check_use_triton(name, use_triton)
        dispatch.flags(name, interleaved=interleaved)
        self.dim = dim
        self.max_position_embeddings = max_position_embeddings
        self.base = base
        self.use_triton = use_triton
        self.interleaved = interleaved
        self.scaling = scaling
        cos, sin = ops.rope_table(max_position_embeddings, dim, base=base, scaling=scaling)
        self.register_buffer("first_cos", cos, persistent=False)
        self.register_buffer("first_sin", sin, persistent=False)
        # (cos, sin) once it has grown: no buffer, for DistributedDataParallel writes rank 0's over every rank's, of whatever length
        self.longer: tuple[Tensor, Tensor] | None = None
        # a compiled call without gradients made it, in inference mode perhaps, which nobody can ask there: autograd may refuse to save it
        self.evaluated = False

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        position_ids: Tensor | None = None,
        offset: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        *,
        inplace: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """q' or (q', k'); the arguments are those of ``trinix.ops.rope``."""
        if k is not None and not isinstance(k, Tensor):
            raise TypeError(
                f"FastRoPEPositionEmbedding: k must be a tensor or None, got {k!r}; .table(length) returns cos and sin"
            )
        counted = position_ids is None and isinstance(offset, (int, torch.SymInt)) and offset >= 0
        counted = counted and isinstance(q, Tensor) and q.dim() > 2
        cos, sin = self.grow(offset + q.shape[-3]) if counted else self._tables()
        return ops.rope(
            q, k, cos, sin, interleaved=self.interleaved, position_ids=position_ids, offset=offset,
            cu_seqlens=cu_seqlens, inplace=inplace, backend=self._backend(q, k, cos, sin),
        )  # fmt: skip

    @property
    def cos(self) -> Tensor:
        """The table as long as it is, ``[P, R/2]``."""
        return self._tables()[0]

    @property
    def sin(self) -> Tensor:
        return self._tables()[1]

    def _tables(self) -> tuple[Tensor, Tensor]:
        longer = self.longer  # DataParallel's replicas have that of the first card
        if longer is None or longer[0].device != self.first_cos.device:
            return self.first_cos, self.first_sin
        if self.evaluated and torch.is_grad_enabled():
            self.longer = longer = self._made(longer[0].shape[0])
            self.evaluated = False
        return longer

    def table(self, length: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), ``[length, R/2]`` each."""
        cos, sin = self.grow(length)
        return cos[:length], sin[:length]

    def grow(self, length: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) of ``length`` rows at least; it grows by a half at least, so that a growing cache seldom does it."""
        whole = isinstance(length, (int, torch.SymInt)) or hasattr(length, "__index__")  # NumPy's
        if not whole or length < 0:
            raise ValueError(f"{type(self).__name__}: length must be an int from 0 on, got {length!r}")
        cos, sin = self._tables()
        if length <= cos.shape[0]:
            return cos, sin
        if self._traced():  # what is made here belongs to the trace: not kept
            return self._made(int(length) if torch.jit.is_tracing() else length)
        self.longer = longer = self._made(max(length, cos.shape[0] * 3 // 2))
        self.evaluated = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        return longer

    def apply_rotary_pos_emb(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(q', k') with tables that the caller brings, ``[P, R/2]`` or with repeated halves ``[P, D]``."""
        backend = self._backend(q, k, cos, sin)
        return ops.rope(q, k, cos, sin, interleaved=self.interleaved, position_ids=position_ids, backend=backend)

    def _backend(self, *tensors: Tensor | None) -> str:
        if self.use_triton is None:
            return "auto"
        if not self.use_triton:
            return "torch"
        return "triton" if triton_can_rotate(*tensors) else "auto"

    def _traced(self) -> bool:
        return torch.compiler.is_exporting() or torch.jit.is_tracing() or type(self.first_cos) is not Tensor

    @torch.inference_mode(False)  # autograd refuses to save a table that an evaluation made
    def _made(self, length: int) -> tuple[Tensor, Tensor]:
        options = {"base": self.base, "scaling": self.scaling, "device": self.first_cos.device}
        if torch.compiler.is_dynamo_compiling() or self._traced():
            return ops.rope_table(length, self.dim, **options)
        with _disable_current_modes(), torch._C._DisableFuncTorch():  # their wrappers would stay behind in the module
            return ops.rope_table(length, self.dim, **options)

    def _apply(self, fn, recurse=True):
        """half() would round the table, to_empty() would lose it: what moves is computed anew where it went."""
        before = self.first_cos
        super()._apply(fn, recurse)
        if self.first_cos is not before:
            self.first_cos, self.first_sin = self._made(before.shape[0])
            self.longer, self.evaluated = self.longer and self._made(self.longer[0].shape[0]), False
        return self

    def extra_repr(self) -> str:
        shown = f"{self.dim}, max_position_embeddings={self.max_position_embeddings}, base={self.base}"
        shown += ", interleaved=True" if self.interleaved else ""
        shown += f", scaling={self.scaling}" if self.scaling else ""
        return shown + (f", use_triton={self.use_triton}" if self.use_triton is not None else "")


class FastALiBiPositionEmbedding(nn.Module):
    """The bias that attention adds to its scores: ``bias = embedding(seq_len, batch_size)``; see ``trinix.ops.alibi_bias``.

    Args:
        num_heads: H.
        max_seq_len: accepted for the sake of the seed documents' signature; not needed and not checked.
        use_triton: None lets trinix choose, False means PyTorch, True means trinix's own kernels wherever they can run.
        causal: -inf for keys after the query.
        trainable: the slopes are a parameter, in the state_dict, with a gradient; otherwise a constant and in no state_dict.
    """

    def __init__(
        self,
        num_heads: int,
        max_seq_len: int | None = None,
        use_triton: bool | None = None,
        *,
        causal: bool = False,
        trainable: bool = False,
    ):
        super().__init__()
        check_sizes(type(self).__name__, num_heads=num_heads)
        check_use_triton(type(self).__name__, use_triton)
        dispatch.flags(type(self).__name__, causal=causal, trainable=trainable)
        self.num_heads = num_heads
        self.max_seq_len = max_seq_len
        self.use_triton = use_triton
        self.causal = causal
        slopes = ops.alibi_slopes(num_heads)
        if trainable:
            self.slopes = nn.Parameter(slopes)
        else:
            self.register_buffer("slopes", slopes, persistent=False)

    def forward(
        self, seq_len: int, batch_size: int = 1, seq_k: int | None = None, *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The bias ``[batch_size, H, seq_len, seq_k]`` (seq_len keys if None), the batch a view of stride 0.

        With a cache ``seq_len`` counts the new queries and ``seq_k`` all keys.
        """
        if not isinstance(batch_size, (int, torch.SymInt)) or batch_size < 0:
            raise ValueError(
                f"{type(self).__name__}: batch_size must be an int from 0 on, got {batch_size!r}; pass x.shape[0]"
            )
        backend = "auto"
        if self.use_triton is not None:
            wanted = self.use_triton and triton_can_bias(self.slopes, dtype)
            backend = "triton" if wanted else "auto" if self.use_triton else "torch"
        bias = ops.alibi_bias(self.slopes, seq_len, seq_k, causal=self.causal, dtype=dtype, backend=backend)
        return bias.expand(batch_size, *bias.shape)

    def _apply(self, fn, recurse=True):
        """As FastRoPEPositionEmbedding's for constant slopes; trainable ones follow the model, as all parameters."""
        before = self.slopes
        super()._apply(fn, recurse)
        if self.slopes is not before and not isinstance(self.slopes, nn.Parameter):
            self.slopes = ops.alibi_slopes(self.num_heads, self.slopes.device)
        return self

    def extra_repr(self) -> str:
        shown = {"causal": self.causal or None, "max_seq_len": self.max_seq_len, "use_triton": self.use_triton}
        shown["trainable"] = isinstance(self.slopes, nn.Parameter) or None
        return ", ".join([str(self.num_heads), *(f"{n}={v}" for n, v in shown.items() if v is not None)])
