/* The table of operations on tensors: the only place where tensor data is touched.
 *
 * A backend fills the table with ref/ first (plain C, double arithmetic, any dtype: the specification) and overrides
 * what it does faster, so every fast kernel has a reference twin that kernels_test.c compares it with. A backend of a device
 * takes nothing from ref/: it has all operations, on memory of its own that nobody else may follow a pointer into.
 *
 * What holds for every operation:
 *  1. It is deterministic: the same operands give the same bits for any number of threads. For a backend of a device the same
 *     operands are those at addresses of the same alignment to 16 bytes; tensors of an arena have it always.
 *  2. It allocates no tensor memory. Scratch that a backend needs is its own, grows seldom and is counted
 *     (kernels_scratch_bytes).
 *  3. Outputs may hold anything before, NaN included, unless the comment says += .
 *  4. Operands do not overlap unless the comment says that they may.
 *  5. dtypes: `float` below stands for one of f32, bf16, f64 of the operand's own choosing; `real` is f32, or f64 where
 *     the floats are f64. Sums are kept in f32 or better. Fast backends may pass anything with f64 on to ref/.
 *  6. Shapes are checked with CHECK: a wrong one is our own mistake.
 *
 * Letters as in docs/MAP.md: S = B*T tokens, D width, F expert width, H query heads, G key-value heads, P head width,
 * V vocabulary, E experts, K experts per token, N = S*K routed rows.
 */
#pragma once

#include "kernels/outer_wire.h"
#include "tensor/tensor.h"

/* One attention problem: B sequences, each of query_count queries against key_count >= query_count keys; query i sees
 * keys 0 .. key_count - query_count + i. Head h reads key-value head h / (H/G). */
struct attention_shape {
    int64_t batch, query_count, key_count;
    int head_count, kv_head_count, head_dim;
    double scale; /* of the scores, 1/sqrt(P) */
};

/* y [rows,out] = x w^T; dx [rows,in] = dy w; dw [out,in], f32, = dy^T x. */
enum dense_form { DENSE_FORWARD, DENSE_INPUT, DENSE_WEIGHT };

/* Weights as the products of one backend read them: a matrix [out,in], or `groups` of them. What lies at `data` is known
 * to the backend that packed it only; the memory is the caller's. */
struct packed {
    void *data;       /* NULL: absent */
    enum dtype dtype; /* of the products' operands */
    int64_t groups, out, in;
    bool backward; /* arranged for product_backward_input, too */
};

/* A box of a tensor of up to three dimensions: the elements from first[dim] on along each. How many, says the call. */
struct box {
    struct tensor tensor;
    int64_t first[3];
};

struct adamw_settings {
    double lr, beta1, beta2, epsilon, weight_decay;
    int64_t step;      /* 1 for the first update: bias correction */
    double grad_scale; /* gradients are multiplied by it first: clipping */
};

/* Where hashes of what an update wrote go (base/hash.h): one for each block of HASH_BLOCK_BYTES of a tensor; NULL: none. */
struct update_hashes {
    uint64_t *param, *m, *v;
};

/* The gradient that the router's two losses add: d(loss)/d(prob[s,e]) += balance_scale * count[e] and
 * d(loss)/d(logit[s,e]) += 2 * z_scale * logsumexp(logits[s]) * prob[s,e]. */
struct router_loss_scales {
    double balance_scale, z_scale;
};

/* Where the choices of S tokens go when the experts are divided over R ranks. A *pair* is a token and a rank that has one
 * or more of its experts: what travels once. Pairs are in the order of rank, then token; rows (one a choice) in that of
 * rank, token, choice. C = min(K, R) is the most pairs of a token. All i32. */
struct pair_plan {
    struct tensor rank_pair, rank_row; /* [R+1]: first pair and first row for each rank, then how many there are */
    struct tensor pair_token;          /* [S*C]; of this and of pair_row the entries after the last pair are undefined */
    struct tensor pair_row;            /* [S*C + 1]: first row of each pair; after the last pair N */
    struct tensor row_wire;            /* [N,2]: pair, counted from its rank's first; expert, from its rank's first */
    struct tensor row_slot;            /* [N]: s*K + k */
    struct tensor slot_row;            /* [S,K]: the inverse */
    struct tensor token_pair;          /* [S,C]: pairs of a token in the order of the first choice in each, then -1 */
};

/* Rows that arrived at the rank of E experts from `sources` ranks, one source after the other: rows source_row[s] ..
 * source_row[s+1]-1 are of source s, whose pairs have the places source_pair[s] .. source_pair[s+1]-1 here; the first of
 * them calls itself first_pair[s]. Host arrays of sources+1, sources+1 and sources. C columns of pair_row are enough for
 * the rows of any pair. All tensors i32. */
struct arrivals {
    int sources;
    const int64_t *source_row, *source_pair, *first_pair;
    struct tensor wire;     /* in  [N,2]: as row_wire of the source's plan; ascending pairs in each source */
    struct tensor offsets;  /* out [E+1] */
    struct tensor row_wire; /* out [N]: which of the arrived rows stands in row r */
    struct tensor wire_row; /* out [N]: the inverse */
    struct tensor row_pair; /* out [N]: the place of row r's pair */
    struct tensor pair_row; /* out [P,C]: rows of each pair in the order of arrival, then -1 */
};

/* What outer_encode counts. */
enum {
    OUTER_SQUARES, /* sum of the squares of the differences that were not refused, to 1e-6 */
    OUTER_FLUSHED, /* differences that are not 0 and became 0 */
    OUTER_REFUSED, /* differences that no message may carry */
    OUTER_STATS
};

struct outer_settings {
    int replica_count; /* whose differences were summed */
    double lr, momentum;
};

/* The gradient of what a router and its experts read, before it is summed, see routed_norm_backward. */
struct routed_gradient {
    struct tensor rows, slot_row;  /* of the experts: float [N,D]; i32 [S,K], as combine_rows has them */
    struct tensor dlogits, weight; /* of the router: real [S,E], [E,D] */
};

/* One product of a sum of them, see product_backward_inputs. */
struct product_term {
    struct tensor dy;
    struct packed w;
};
enum { PRODUCT_TERMS_MAX = 3 };

struct kernel_ops {
    const char *name;
    bool gemm_mixes_dtypes;  /* gemm takes operands of two dtypes */
    int64_t logits_elements; /* of a chunk of logits that keeps the backend busy; 0: as a processor's caches have it */
    int64_t experts_most, head_dim_most; /* of a model that the backend can run; 0: whatever there is memory for */

    /* ---- products ---------------------------------------------------------------------------------------------- */

    /* C [M,N] = op(A) op(B), or += with accumulate. op transposes: A is [M,K], or [K,M] with transpose_a; B is [K,N],
     * or [N,K] with transpose_b. A and B have one dtype; C has it too or is real. M, N or K may be 0 (K = 0: C = 0). */
    void (*gemm)(struct tensor a, bool transpose_a, struct tensor b, bool transpose_b, struct tensor c,
                 bool accumulate);

    /* Weights [O,I] or [E,O,I], float, into the arrangements that the products read; packed_bytes says how much memory
     * that takes. `to` is filled but for its contents. */
    size_t (*packed_bytes)(struct packed shape);
    void (*pack)(struct tensor w, struct packed to);

    /* Grouped products over ragged groups. Group e is rows offsets[e] .. offsets[e+1]-1 of the routed rows; offsets is
     * i32 [E+1], ascending from 0 to N; groups may be empty, one may hold everything. No offsets: one group, a dense
     * product. `rows`, i32 [N] or none, says which row of the operand stands for routed row r (gathered in place, no
     * copy); none means row r itself.
     *
     * forward:          y [N,O] = x[rows] w_e^T, or +=      x [any,I]
     * backward_input:   dx [N,I] = dy[rows] w_e, or +=      dy [any,O]; w.backward
     * backward_weight:  dw [O,I] or [E,O,I] = dy[dy_rows]^T x[x_rows] over each group, or +=    dy [any,O], x [any,I]; dw real;
     *                   of a group without rows = is zeros
     * x, dy and w of a call have one dtype; y and dx have it too or are real. */
    void (*product_forward)(struct tensor x, struct tensor rows, struct tensor offsets, struct packed w,
                            struct tensor y, bool accumulate);
    void (*product_backward_input)(struct tensor dy, struct tensor rows, struct tensor offsets, struct packed w,
                                   struct tensor dx, bool accumulate);
    void (*product_backward_weight)(struct tensor dy, struct tensor dy_rows, struct tensor x, struct tensor x_rows,
                                    struct tensor offsets, struct tensor dw, bool accumulate);

    /* Several of these at once; NULL where a backend has nothing better than one after the other.
     *
     * product_swiglu_forward: gate, up [N,F] = x[rows] gate_e^T, x[rows] up_e^T;  act [N,F] = what swiglu_forward makes of
     * them and row_weight (real [N] or none). All of x's dtype; act none: gate and up alone.
     * product_swiglu_backward: with dact [N,F] = dy[rows] w_e, the gradient of that act: act = again, gate and up = their
     * gradients, drow_weight [N] = (none when row_weight is none). dact [N,F], of dy's dtype, is scratch.
     * product_forward_onto: y [S,O] = base + x w^T, dense; base and y real.
     * product_backward_inputs: dx [N,I] = sum over the terms of dy_t w_t, or +=; 1 to PRODUCT_TERMS_MAX terms. */
    void (*product_swiglu_forward)(struct tensor x, struct tensor rows, struct tensor offsets, struct packed gate_weight,
                                   struct packed up_weight, struct tensor row_weight, struct tensor gate, struct tensor up,
                                   struct tensor act);
    void (*product_swiglu_backward)(struct tensor dy, struct tensor rows, struct tensor offsets, struct packed w,
                                    struct tensor gate, struct tensor up, struct tensor row_weight, struct tensor act,
                                    struct tensor dact, struct tensor drow_weight);
    void (*product_forward_onto)(struct tensor x, struct packed w, struct tensor base, struct tensor y);
    void (*product_backward_inputs)(const struct product_term *terms, int term_count, struct tensor offsets, struct tensor dx,
                                    bool accumulate);

    /* ---- simple -------------------------------------------------------------------------------------------------- */

    void (*fill)(struct tensor t, double value);
    void (*cast)(struct tensor from, struct tensor to); /* same shape, any float to any float */
    void (*add)(struct tensor x, struct tensor y);      /* y += x; same shape, float, or both i32 */
    void (*sum_squares)(struct tensor x, struct tensor sum); /* sum f64 [1] += sum of x^2; NaN and inf carry over */
    /* The same of `count` tensors, any floats, each onto its element of sums f64 [count]; NULL where a backend has nothing better
     * than one after the other. */
    void (*sum_squares_each)(const struct tensor *x, int count, struct tensor sums);
    /* to[i] = from[index[i]], flat; both real, or both i32; index i32 */
    void (*gather_scalars)(struct tensor from, struct tensor index, struct tensor to);
    /* to[i,:] = from[index[i],:]; both float of one dtype; from [any,D], index i32 [M], to [M,D] */
    void (*gather_rows)(struct tensor from, struct tensor index, struct tensor to);

    /* Boxes of `count` elements along each dimension, all inside their tensors: to = (or += with accumulate) the sum of
     * the terms, in their order; one term is a copy. term_count >= 1; all float, each of a dtype of its own. Summed in f32,
     * or in f64 where an operand is f64, and rounded once. `to` may be one of the terms, in the same place. */
    void (*sum_boxes)(const struct box *terms, int term_count, const int64_t count[3], struct box to, bool accumulate);

    /* ---- normalisation and position ------------------------------------------------------------------------------ */

    /* y [R,D] = x * rstd * weight, rstd [R] = 1/sqrt(mean(x^2) + epsilon). x, y float; weight [D], rstd real. */
    void (*rmsnorm_forward)(struct tensor x, struct tensor weight, double epsilon, struct tensor y,
                            struct tensor rstd);
    /* dx [R,D] = (or += with accumulate), dweight [D] += . dx may be dy itself when not accumulating and of its
     * dtype. */
    void (*rmsnorm_backward)(struct tensor dy, struct tensor x, struct tensor weight, struct tensor rstd,
                             struct tensor dx, bool accumulate, struct tensor dweight);
    /* The same, dx real, and dx_cast [R,D], float, = dx; NULL where a backend has nothing better than a cast behind it. */
    void (*rmsnorm_backward_cast)(struct tensor dy, struct tensor x, struct tensor weight, struct tensor rstd,
                                  struct tensor dx, bool accumulate, struct tensor dweight, struct tensor dx_cast);
    /* The same of a dy that nobody has yet: what combine_rows makes of rows and slot_row, + dlogits weight, weight being the
     * router's. dy [S,D], real, is scratch; NULL where a backend has nothing better than to write it before. */
    void (*routed_norm_backward)(struct routed_gradient from, struct tensor dy, struct tensor x, struct tensor weight,
                                 struct tensor rstd, struct tensor dx, bool accumulate, struct tensor dweight,
                                 struct tensor dx_cast);

    /* Per-head RMS norm, then rotary position (half-split: pair j is elements j and j + P/2).
     * x, y [S, heads*P] float; weight [P] real; table real [positions, P]: P/2 cosines, then P/2 sines; rstd
     * [S*heads] real. Row s has position first_position + s % sequence_length. */
    void (*qknorm_rope_forward)(struct tensor x, struct tensor weight, double epsilon, struct tensor table,
                                int64_t sequence_length, int64_t first_position, struct tensor y, struct tensor rstd);
    /* dx =, may be dy itself; dweight [P] += . */
    void (*qknorm_rope_backward)(struct tensor dy, struct tensor x, struct tensor weight, struct tensor rstd,
                                 struct tensor table, int64_t sequence_length, int64_t first_position,
                                 struct tensor dx, struct tensor dweight);

    /* ---- attention ----------------------------------------------------------------------------------------------- */

    /* Causal softmax attention without the T x T matrix. q, out [B*query_count, H*P]; k, v [B*key_count, G*P]; float
     * of one dtype; logsumexp [B*query_count, H] real: of the scaled scores, kept for backward. A key or value that is not
     * finite may reach all queries of its sequence. */
    void (*attention_forward)(struct attention_shape shape, struct tensor q, struct tensor k, struct tensor v,
                              struct tensor out, struct tensor logsumexp);
    /* The same of one sequence (B = 1) that grows, of which only the operation finds out how long it is: kept, i32 [1], of its keys
     * are there before those of the queries. shape.key_count is how many there may be, kept + query_count at least; what lies
     * behind those is not read. */
    void (*attention_kept)(struct attention_shape shape, struct tensor q, struct tensor k, struct tensor v, struct tensor kept,
                           struct tensor out, struct tensor logsumexp);
    /* Keys and values that join those that are kept: keys[kept + i,:] = key[i,:], values likewise. key, value [M,G*P]; keys, values
     * [capacity,G*P], kept + M <= capacity; float of one dtype. */
    void (*attention_keep)(struct tensor key, struct tensor value, struct tensor kept, struct tensor keys, struct tensor values);
    /* dq, dk, dv = (not +=), dtype of q. Requires query_count == key_count. */
    void (*attention_backward)(struct attention_shape shape, struct tensor dout, struct tensor q, struct tensor k,
                               struct tensor v, struct tensor out, struct tensor logsumexp, struct tensor dq,
                               struct tensor dk, struct tensor dv);

    /* ---- routing ------------------------------------------------------------------------------------------------- */

    /* prob [S,E] = softmax(logits [S,E]); expert i32 [S,K] = the K best by logit, best first, on a tie the lower
     * index; weight [S,K] = their probabilities, divided by their sum with `normalize`. All real. 1 <= K <= E. */
    void (*router_topk_forward)(struct tensor logits, bool normalize, struct tensor prob, struct tensor expert,
                                struct tensor weight);
    /* dlogits [S,E] = from dweight [S,K] and the router's losses; count i32 [E] are the rows of each expert, of all
     * tokens that share the balance loss. */
    void (*router_topk_backward)(struct tensor dweight, struct tensor logits, struct tensor prob,
                                 struct tensor expert, struct tensor weight, bool normalize, struct tensor count,
                                 struct router_loss_scales scales, struct tensor dlogits);
    /* stats f64 [2 + 2E] += sum of logsumexp^2, sum of the entropy of prob (nats), sum of prob [E], rows [E]. */
    void (*router_stats)(struct tensor logits, struct tensor prob, struct tensor expert, struct tensor stats);

    /* Order the N = S*K choices by expert, stable: count, prefix sum, place. expert i32 [S,K] in. All i32 out:
     * count [E]; offsets [E+1]; row_slot [N]: which s*K+k stands in row r; row_token [N]: its s; slot_row [S,K]: the
     * inverse. */
    void (*route_sort)(struct tensor expert, struct tensor count, struct tensor offsets, struct tensor row_slot,
                       struct tensor row_token, struct tensor slot_row);

    /* y [S,D] = (or +=) sum over k, in order, of rows[slot_row[s,k]], without those that are negative; rows [N,D] float, y
     * float. */
    void (*combine_rows)(struct tensor rows, struct tensor slot_row, struct tensor y, bool accumulate);
    /* y [S,D] = base + the same sum; base and y float of one dtype. NULL where a backend has nothing better than a cast of base
     * before combine_rows. */
    void (*combine_rows_onto)(struct tensor rows, struct tensor slot_row, struct tensor base, struct tensor y);

    /* ---- routing to other ranks ---------------------------------------------------------------------------------- */

    /* Pairs and rows of S tokens for rank_count ranks, of which rank r has the experts range_part(expert_count, rank_count,
     * r); linear in the number of choices. expert i32 [S,K] in, plan out. */
    void (*route_pairs)(struct tensor expert, int64_t expert_count, int rank_count, struct pair_plan plan);
    /* Order the rows that arrived by expert, stable; linear in their number. */
    void (*sort_arrivals)(struct arrivals arrivals);

    /* ---- expert -------------------------------------------------------------------------------------------------- */

    /* act [N,F] = silu(gate) * up * row_weight[n]; row_weight real [N] or none (1). act may be gate or up itself. */
    void (*swiglu_forward)(struct tensor gate, struct tensor up, struct tensor row_weight, struct tensor act);
    /* From dact [N,F], the gradient of act: dgate and dup = (they may be gate and up, or dact, themselves),
     * drow_weight [N] = (none when row_weight is none). */
    void (*swiglu_backward)(struct tensor dact, struct tensor gate, struct tensor up, struct tensor row_weight,
                            struct tensor dgate, struct tensor dup, struct tensor drow_weight);

    /* ---- embedding and loss -------------------------------------------------------------------------------------- */

    /* x [S,D] = table[ids]; ids i32 [S] in 0..V-1; table [V,D] float. */
    void (*embedding_forward)(struct tensor ids, struct tensor table, struct tensor x);
    /* dtable [V,D] real += dx [S,D], summed in the order of s. */
    void (*embedding_backward)(struct tensor ids, struct tensor dx, struct tensor dtable);

    /* Softmax cross entropy. logits [R,V] real; target i32 [R], negative = ignored. loss_sum f64 [1] += sum of
     * -log p(target) in nats; row_loss real [R] or none = per row (0 where ignored);
     * dlogits [R,V] float or none = scale * (p - onehot), 0 where ignored; it may be logits itself. */
    void (*cross_entropy)(struct tensor logits, struct tensor target, double scale, struct tensor loss_sum,
                          struct tensor row_loss, struct tensor dlogits);

    /* ---- optimizer ----------------------------------------------------------------------------------------------- */

    /* AdamW, decoupled decay, one pass: param, grad, m, v real, same number of elements; `packed`, with data or without,
     * gets the new parameters as `pack` would. Of `hashes` those of whole blocks are written while these are in a cache; which
     * ones the backend finds it good to hash is its own matter: the others stay as they are. Source: arXiv 1711.05101. */
    void (*adamw)(struct tensor param, struct tensor grad, struct tensor m, struct tensor v,
                  struct adamw_settings settings, struct packed packed, struct update_hashes hashes);

    /* ---- outer step ---------------------------------------------------------------------------------------------- */

    /* Tensors of n elements, f32; messages of outer_wire_bytes(format, n) bytes at any address, as kernels/outer_wire.h
     * has them. The same bits from every backend, but for the f64 sums, which differ in the order of their terms.
     *
     * encode: the differences global - local (old minus new), rounded to f32, into `wire`; stats f64 [OUTER_STATS] += . A
     * difference that is NaN or of magnitude 2^127 or more is refused, in every format: it is counted and encoded as 0. A
     * message with refused ones is not to be sent. */
    void (*outer_encode)(struct tensor global, struct tensor local, enum outer_format format, void *wire,
                         struct tensor stats);
    /* sum [n] = the differences of a message, or += with accumulate: one addition in f32 for each. Who adds the messages of
     * all replicas in the order of their ranks gets the same bits everywhere. */
    void (*outer_decode_add)(const void *wire, enum outer_format format, struct tensor sum, bool accumulate);
    /* SGD with Nesterov momentum; every operation rounded to f32, nothing fused:
     *     delta = sum / replica_count;  momentum = mu momentum + delta;  global = global - lr (delta + mu momentum)
     * sum in, the others inout. With lr 1, mu 0 and one replica's difference in f32, global ends as the old local wherever
     * global - local was exact (always within a factor of 2 of each other); elsewhere it is off by at most half a unit in the
     * last place of the difference and half a one of the result. Source: arXiv 2501.18512, algorithm 2. */
    void (*outer_update)(struct tensor sum, struct outer_settings settings, struct tensor global, struct tensor momentum);
    /* local = keep local + (1 - keep) global, 0 <= keep <= 1; for keep = 0 a copy. As above: rounded, not fused. */
    void (*outer_mix)(struct tensor global, double keep, struct tensor local);
    /* sums f64 [3] += a.b, a.a, b.b of the n differences of two messages: the cosine between replicas is
     * a.b / sqrt(a.a b.b). */
    void (*outer_dot)(const void *a, const void *b, enum outer_format format, int64_t n, struct tensor sums);

    /* ---- roof ---------------------------------------------------------------------------------------------------- */

    /* Multiply-adds of operands of a dtype on registers only, by the fastest unit that the products use, on the calling
     * thread; on a device products of large matrices, whose memory is held until it is asked for 0 rounds. Returns the operations
     * done, two a multiply-add. */
    double (*multiply_registers)(enum dtype dtype, int64_t rounds);
    const char *(*multiply_unit)(enum dtype dtype); /* what that unit is called */
    /* A whole dense product of this form by a library that only measures, of operands and into a result of its own. False: there
     * is none, or it does not do this one. NULL where products are not measured by a library. */
    bool (*multiply_dense)(enum dtype dtype, enum dense_form form, int64_t rows, int64_t out, int64_t in);
};

/* The specification: plain C, runs anywhere, slow. */
const struct kernel_ops *kernels_ref(void);

/* The fastest table that this processor can run, or the one named: "auto", "ref", "portable", "avx2", "avx512",
 * "avx512bf16", "amx". Fails with STATUS_USAGE for a name that is unknown or that this processor cannot run. */
enum status kernels_choose(const char *name, const struct kernel_ops **out) MUST_USE;

/* Names that kernels_choose accepts and this processor runs, NULL at the end; "auto" is not among them. */
const char *const *kernels_available(void);

/* True when products of bf16 run faster than those of f32 on this processor. */
bool kernels_prefer_bf16(void);

/* The same for tensors of a device: of the processor as kernels_choose says; of CUDA devices "auto" or "cuda". */
struct device;
enum status kernels_choose_for(const struct device *device, const char *name, const struct kernel_ops **out) MUST_USE;
bool kernels_device_prefers_bf16(const struct device *device);

/* Bytes of scratch that the backends hold now. */
size_t kernels_scratch_bytes(void);
