"""WKV-7 in chunks of 16 tokens on the tensor cores: NVIDIA GPUs of compute capability 8.0 and up.

Three kernels, through the Triton route of Pallas (the equations are those of `chunked_xla`):

    forward    one program for each head of each sequence; it goes through the chunks with the state
               in registers, and for the backward pass writes S, the state of every chunk
    backward   1. `D`: one program for each head of each sequence; it goes backwards through the
                  chunks with the state's cotangent in registers, and writes D, the cotangent at
                  the end of every chunk times half its decay
               2. gradients: all chunks in parallel; given S and D, a chunk needs no other one

`kernels` has their bodies, `call` their BlockSpecs, calls and derivative rule, `tuning` how they
are launched on which GPU, `backend` what comes from `jax.experimental.pallas.triton`.

Only D → dU → dX → D is sequential in a backward pass. The work outside of that loop is three
quarters of the whole, and there are up to T/16 times more programs for it.

Cost. A token of one head, N = 64, 16-bit operands (an [N] vector is 128 bytes), without padding:

                  bytes read                          written                   matrix FLOPs
    forward       r w k v a b             768         y 128 + states 512        56 k      1408 B
    backward 1    r w a b dy              640         D 512                     40 k      1152 B
    backward 2    r w k v a b dy S D     1920         six gradients 768        146 k      2688 B

Critical path. In a forward chunk, two dependent products lie between the state before it and the
operands that update it (S ãᵀ, the solve); the update is a third. It is the same for D (D b̃ᵀ, the
solve, the update). But a Triton program has one instruction stream: it also contains what needs no
state, in all ten dependent products a chunk (the sums of decays, b̃ᵀã, six of the inverse, the
solve, the update). The second backward kernel has twelve, and its chunks do not wait for each
other.

Occupancy. Forward and `D` have B·H programs: 96 at 0.1b's micro_bsz 8, 192 at 16, for an H100's
132 cores. At 96 each program has a core to itself, at 192 two share each of 60 cores; three fit.
More programs could share the value rows, but each would compute again all that is local to a chunk,
which is most of the stream. The second backward kernel has B·H·T/128 programs (3072 at 96), two on
a core. docs/wkv7-kernel.md has the lengths of the streams; docs/log.md the designs that were
weighed.

Layout. Arrays stay [B,T,H,N] in memory. In registers every tile is transposed, channels by tokens
[N, L]. Each of N/16 warps then owns 16 rows, the state's rows (values) never leave their warp, and
an accumulator is the left operand of the next product without a trip through shared memory.

Numbers. Operands have the inputs' dtype for float32 and bfloat16, and bfloat16 for float16 (in
which the gradients of a mean over a batch underflow). Accumulators, decays and the carried state
are float32. W, the product of decays, is counted from the middle of a chunk: 1/128 < W < 128.
(I − A)⁻¹ comes from block doubling, which stays accurate when all keys align. Sums over tokens of
log decays and of their gradients are products with a triangle of ones, of both halves of a
bfloat16 pair (15 bits).
"""

from pallas_kernels.wkv7.triton.call import refusal, wkv7_pallas_triton

__all__ = ["refusal", "wkv7_pallas_triton"]
