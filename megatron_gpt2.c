/* megatron_gpt2.c - Megatron-LM (Shoeybi et al., arXiv 1909.08053) in one C file.
 *
 * A GPT-2 that trains, evaluates and generates, cut over many GPUs as the paper cuts it, with the
 * pipeline and data parallelism that Megatron has around it. Where the paper has a GPU, this
 * program has a rank, which is a thread. This line builds it, and nothing but this file is needed:
 *
 *     cc -O3 -march=native -fopenmp megatron_gpt2.c -lm -lpthread -o megatron_gpt2
 *
 * HOW TO READ IT. Part I is the paper. Read its 3,000 lines from top to bottom, with the paper
 * beside you, and stop where Part II begins. Every formula of the paper has its code in Part I.
 * Part II makes the code fast and connects the ranks; Part III reads files, encodes text and
 * prints.
 *
 *     Part I, the paper      1 operators, what they compute [§2.2]     2 ranks and groups [§2.3]
 *                            3 the model-parallel transformer [§3]     4 operators, how they do it
 *                            5 parameters, checkpoints [§4.2, §5.1]    6 optimisation [§4.2]
 *                            7 data and the training loop [§4.1]       8 recomputation, pipeline
 *                            9 evaluation [§5.2, App. E]              10 generation [App. C]
 *     Part II, the machine   11 products, vector loops, memory        12 ranks as threads
 *     Part III, the program  13 errors, memory, small tools     14 files     15 text
 *     around it              16 planner, trace                   17 command line
 *
 * TAGS. [§3 eq.3] is a place in the paper. [P12] is a statement about it that a test checks:
 * ./test_gpt2 P12. "Code A" and "code V" are Megatron's own code of August 2019 and of version 1.0;
 * DEVIATION marks where this program departs from it on purpose. doc/ has the longer derivations.
 *
 * LEFT OUT: BERT [§5.3], the filtering of the training text [§4.1], other models, interleaved
 * pipelines, sequence parallelism, ZeRO.
 *
 * FOR GPUS there is megatron_gpt2.cu. It defines OTHER_OPERATORS and includes this file; then the
 * operators of chapters 4 and 11 are not compiled, and the .cu has functions of the same names.
 *
 * LETTERS. B sequences in a micro-batch, T tokens in a sequence, N = B*T rows; C hidden size, H
 * heads, D = C/H their size, F = 4C width of the MLP, L layers, P positions, V tokens in the
 * vocabulary; t x p x d ranks. Cp = C/t, Hp = H/t, Fp = F/t: this rank's part; Vp: of the padded V.
 *
 * THE GRID of t x d ranks [App. B.1, Fig. 8], and p stages; here t = 2, p = 2, d = 2:
 *
 *               stage 0       stage 1
 *     replica 0  | 0 1 |  ---> | 4 5 |   tensor groups:    0-1, 2-3, 4-5, 6-7   cut the matrices
 *     replica 1  | 2 3 |  ---> | 6 7 |   pipeline groups:  0-4, 1-5, 2-6, 3-7   other layers
 *                                        data groups:      0-2, 1-3, 4-6, 5-7   other sequences
 *
 * CONTRACTS. Outputs mostly come first, then inputs, dimensions, options; before them the rank or
 * group that a function works for. Backward functions write dx and add to dw. Matrices are
 * row-major, and their shapes stand beside them. An array has a singular name, its length the
 * plural: tensor [tensors]. Bad input ends in die(): one line on stderr, exit status 1. Two global
 * variables change: `spoken` (chapter 13: an error is told once) and `interrupted` (chapter 17:
 * Ctrl-C). The source compiles as C11 and as C++17. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __clang__ /* it warns where errno, which sqrt may set, keeps a loop from being vectorised */
#pragma clang diagnostic ignored "-Wpass-failed"
#endif

/* =================================================================================================
 *
 * PART I. THE PAPER
 *
 * ============================================================================================== */

#ifndef REAL
#define REAL float
#endif
typedef REAL real; /* sums and statistics: float; double where a test takes finite differences */

#ifndef ACT_TYPE
#define ACT_TYPE real /* megatron_gpt2.cu may make it bf16 or fp16 */
#endif
typedef ACT_TYPE act; /* weights, activations and their gradients */

#ifndef HOST_DEVICE
#define HOST_DEVICE /* megatron_gpt2.cu: its kernels call these functions, too */
#endif

static inline HOST_DEVICE size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }
static size_t ceil_div(size_t n, size_t d) { return (n + d - 1) / d; }
static size_t round_up(size_t n, size_t d) { return ceil_div(n, d) * d; }

/* ---- What Part I takes from Parts II and III ------------------------------------------------- */

/* Chapter 13: errors and memory. An arena is one block of memory for everything of one lifetime.
 * carve() returns its next part. The same calls run twice: with base NULL they measure the arena,
 * then they place its parts. */
typedef struct {
    char *base;
    size_t used; /* bytes */
} Arena;

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...);
static void *xcalloc(size_t count, size_t size);                     /* zeroed */
static void *grow(void *p, size_t n, size_t *capacity, size_t size); /* room for element n */
static void *carve(Arena *arena, size_t count, size_t size);

/* Progress of long work, on stderr. */
typedef struct {
    const char *unit;    /* "step", "window", .. */
    size_t first, total; /* units done before the start, and at the end */
    size_t tokens;       /* in a unit */
    int terminal;
    double start, shown; /* seconds */
} Meter;

static void meter_show(Meter *m, size_t done, const char *name, double value);

/* Chapter 14: model.safetensors of a folder. */
typedef struct Safetensors Safetensors;

/* Chapter 15: text and tokens. Tokens starts as {NULL, 0, 0}; free(id) ends it. */
typedef struct {
    int *id;
    size_t n, capacity;
} Tokens;

typedef struct Tokenizer Tokenizer;
static void push_token(Tokens *tokens, int id);
static void encode(Tokens *out, const Tokenizer *t, const char *text, size_t n);
/* Bytes of the white-space character at the end of text (n); 0 if there is none. */
static size_t space_before(const char *text, size_t n);
/* The begin of text without the white space at both ends; *n becomes its length. */
static const char *strip(const char *text, size_t *n);

/* Chapter 11: memory of a device. On the CPU that is memory as usual; in megatron_gpt2.cu it is the
 * memory of this rank's GPU. Sizes in bytes; act_upload and act_download convert n numbers. */
static void *device_calloc(size_t bytes); /* zeroed */
static void device_free(void *p);
static void device_zero(void *p, size_t bytes);
static void device_copy(void *to, const void *from, size_t bytes); /* device to device */
static void device_upload(void *to, const void *from, size_t bytes);
static void device_download(void *to, const void *from, size_t bytes);
static void act_upload(act *to, const real *from, size_t n);
static void act_download(real *to, const act *from, size_t n);
static void device_synchronize(void);           /* waits until this rank's device has no work */
static void device_select(int rank, int ranks); /* gives this rank its device */
static const char *device_kind(void);           /* "cores", "GPUs": for messages */
static int device_count(void);
static double device_memory(void); /* bytes of all of them; 0: unknown */

/* =================================================================================================
 * Chapter 1. Operators, what they compute [§2.2]
 * =================================================================================================
 *
 * An operator is a function of pointers and dimensions. It knows no ranks and keeps no state. This
 * chapter says what each one computes; chapter 4 has the code. Each sum, or each of a fixed number
 * of its parts, is made by a single thread, so results do not depend on the number of threads, bit
 * for bit.
 *
 * Shapes stand behind the names, rows first. N = B*T rows, C channels; a linear layer has I inputs
 * and O outputs, attention H heads of size D. On a tensor rank these are the rank's own numbers: an
 * operator sees one rank's part of a matrix as a matrix. In formulas w' is w transposed, gelu'(x) a
 * derivative; a b is a product of matrices, a * b one element by element. */

/* ---- Linear layers --------------------------------------------------------------------------- */

/* Weights are stored [out, in]: the paper's A is w'. Chapter 3 calls these functions on one rank's
 * part of w. If that part is rows of w, and so columns of A, y is X A_i [§3 eq.3]. If it is columns
 * of w, and so rows of the paper's B, y is Y_i B_i, one term of the sum Z [§3]; then b is NULL, and
 * the bias is added after the sum. */

/* y (N,O) = x (N,I) w' + b; w (O,I); b (O), or NULL for none. */
static void linear_forward(act *y, const act *x, const act *w, const act *b, size_t N, size_t I,
                           size_t O);

/* dx (N,I) = dy (N,O) w; dw (O,I) += dy' x; db (O) += column sums of dy. NULL: not wanted. */
static void linear_backward(act *dx, act *dw, act *db, const act *dy, const act *x, const act *w,
                            size_t N, size_t I, size_t O);

/* Two forms of GeLU, x Phi(x): by tanh, as in the paper's code, or exactly, by erf [P41]. */
typedef enum { GELU_TANH, GELU_ERF } Gelu;

/* pre (N,O) = x w' + b; y = gelu(pre) [§3 eq.1; eq.3 where w is one rank's part]. pre is kept for
 * the backward pass; NULL: not wanted. */
static void linear_gelu_forward(act *y, act *pre, const act *x, const act *w, const act *b,
                                size_t N, size_t I, size_t O, Gelu kind);

/* Backward through two steps of the MLP, y = gelu(pre) and z (N,O) = y (N,I) w': dpre (N,I) = (dz
 * w) * gelu'(pre); dw (O,I) += dz' y. z has no bias here: it is a term of a sum over the ranks. */
static void gelu_linear_backward(act *dpre, act *dw, const act *dz, const act *y, const act *pre,
                                 const act *w, size_t N, size_t I, size_t O, Gelu kind);

/* ---- Dropout --------------------------------------------------------------------------------- */

/* A dropout site's mask. Element i of a tensor is kept if the random word number first + i of the
 * stream (seed, site, step) is at least p * 2^32; what is kept is divided by 1 - p. So a mask is a
 * function of these numbers alone. Those of the attention's probabilities differ between tensor
 * ranks, the others are equal (see "Dropout's masks" in chapter 3). */
typedef struct {
    uint64_t seed;
    uint32_t site, step;
    real p;       /* 0: no dropout */
    size_t first; /* index of element 0 in the whole tensor: a slice gets its part of the mask */
    size_t heads; /* attention only: heads of the whole layer */
} Dropout;

/* ---- Embeddings ------------------------------------------------------------------------------ */

/* x[n] = wte[tokens[n] - v0] if this slice of the vocabulary has the token, v0 <= tokens[n] <
 * v0+Vp; else 0. x (N,C), wte (Vp,C). */
static void token_embedding_forward(act *x, const int *tokens, const act *wte, size_t N, size_t C,
                                    size_t v0, size_t Vp);

/* dwte[tokens[n] - v0] += dx[n], for the tokens of this slice. */
static void token_embedding_backward(act *dwte, const act *dx, const int *tokens, size_t N,
                                     size_t C, size_t v0, size_t Vp);

/* x (B,T,C) = dropout(x + wpe[past + t]), in place. wpe (P,C). */
static void position_embedding_forward(act *x, const act *wpe, size_t B, size_t T, size_t C,
                                       size_t past, Dropout d);

/* dx (B,T,C) = mask * dx, in place: the gradient of the token embedding's output. dwpe[t] += sum
 * over b of dx[b,t]. */
static void position_embedding_backward(act *dx, act *dwpe, size_t B, size_t T, size_t C,
                                        Dropout d);

/* ---- LayerNorm ------------------------------------------------------------------------------- */

/* y (N,C) = (x - mean) * rstd * g + b for each row, with rstd = 1 / sqrt(variance + eps). mean and
 * rstd (N) are kept for the backward pass. */
static void layernorm_forward(act *y, real *mean, real *rstd, const act *x, const act *g,
                              const act *b, size_t N, size_t C, real eps);

/* With x^ = (x - mean) * rstd, the normalised x, and dx^ = dy * g [doc/layernorm.md]:
 *
 *     dx = dres + rstd * (dx^ - avg(dx^) - x^ * avg(dx^ * x^))     avg: over the C numbers of a row
 *     dg += sum of dy * x^       db += sum of dy                   sum: over the N rows
 *
 * dres is the gradient of the residual connection, which goes around LayerNorm. NULL: none; it may
 * be dx itself. */
static void layernorm_backward(act *dx, act *dg, act *db, const act *dy, const act *x, const act *g,
                               const real *mean, const real *rstd, const act *dres, size_t N,
                               size_t C);

/* ---- Bias + dropout + residual (+ LayerNorm) ------------------------------------------------- */

/* out (N,C) = residual + dropout(y + bias). out may be y or residual. */
static void bias_dropout_add_forward(act *out, const act *y, const act *bias, const act *residual,
                                     size_t N, size_t C, Dropout d);

/* The same, and the LayerNorm that follows: res = residual + dropout(y + bias), ln = LN(res). res
 * may be y. */
static void bias_dropout_add_layernorm_forward(act *ln, act *res, real *mean, real *rstd,
                                               const act *y, const act *bias, const act *residual,
                                               const act *g, const act *b, size_t N, size_t C,
                                               real eps, Dropout d);

/* dy (N,C) = mask * dout; dbias (C) += column sums of dy. The residual's gradient is dout. dy may
 * be dout. */
static void bias_dropout_add_backward(act *dy, act *dbias, const act *dout, size_t N, size_t C,
                                      Dropout d);

/* ---- Causal self-attention [§3 Fig. 3b] ------------------------------------------------------ */

/* For each head, with Q, K, V (T,D):
 *
 *     S = Q K' / sqrt(D)     P = softmax of row i of S over the keys j <= i     out = (mask * P) V
 *
 * qkv (B,T,3*H*D): a row is [Q, K, V], each of H heads of D numbers [P11]. out (B,T,H*D). lse
 * (B,H,T) = log of the sum of e^S over a row, kept for the backward pass; NULL: not wanted. P of
 * (b,h,i,j) is element ((b * d.heads + h) * T + i) * T + j of the mask. */
static void attention_forward(act *out, real *lse, const act *qkv, size_t B, size_t T, size_t H,
                              size_t D, Dropout d);

/* dqkv (B,T,3*H*D) is written. For each head, with O = out and dO = dout:
 *
 *     dV = (mask * P)' dO      dS = P * (mask * (dO V') - delta) / sqrt(D)      dQ = dS K
 *     delta = sum over a row of dO * O      (B,H,T), working space              dK = dS' Q */
static void attention_backward(act *dqkv, real *delta, const act *dout, const act *out,
                               const real *lse, const act *qkv, size_t B, size_t T, size_t H,
                               size_t D, Dropout d);

/* Generation, one sequence: n new rows qkv (n,3*H*D) at positions past .. past+n-1. Appends their
 * keys and values to the caches, of room for past + n rows of H*D numbers, and attends to all so
 * far. out (n,H*D). */
static void attention_cached_forward(act *out, act *key_cache, act *value_cache, const act *qkv,
                                     size_t n, size_t past, size_t H, size_t D);

/* ---- Softmax and cross entropy over a slice of the vocabulary [§3] --------------------------- */

/* A rank's columns of the logits are the tokens v0 .. v0+Vp-1. The first `valid` of them exist; the
 * rest pads the vocabulary and takes part in nothing. Between these steps chapter 3 reduces max,
 * sum and target_logit over the ranks: three numbers a row, where the logits would be V. */

/* max (N) of the valid logits (N,Vp); -infinity if there are none. */
static void logits_max(real *max, const act *logits, size_t N, size_t Vp, size_t valid);

/* With z the logits of a row, sum (N) = sum of e^(z - max) over the valid tokens; target_logit (N)
 * = z[target] - max if this slice has the target, else 0. */
static void logits_sum_exp(real *sum, real *target_logit, const act *logits, const real *max,
                           const int *targets, size_t N, size_t Vp, size_t valid, size_t v0);

/* loss (N) = log(sum) - target_logit = -log softmax(z)[target], of numbers that have been reduced
 * over the ranks. */
static void cross_entropy_loss(real *loss, const real *sum, const real *target_logit, size_t N);

/* In place: logits (N,Vp) become their gradient (softmax(z) - onehot(target)) * weight[n] * scale;
 * padding becomes 0. */
static void cross_entropy_backward(act *logits, const real *max, const real *sum,
                                   const int *targets, const real *weight, real scale, size_t N,
                                   size_t Vp, size_t valid, size_t v0);

/* ---- The optimiser [§4.2] -------------------------------------------------------------------- */

typedef struct {
    double lr, beta1, beta2, eps, decay;
    double grad_scale; /* multiplies every gradient: 1 / loss scale, clipping */
    size_t step;       /* counts from 1 */
} AdamW;

/* AdamW on n parameters [P32], with gradients g:
 *
 *     m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
 *     w -= lr * (mh / (sqrt(vh) + eps) + decay * w)
 *
 * mh = m / (1 - beta1^step) and vh = v / (1 - beta2^step) make up for the start of m and v at 0.
 * master: float weights, of which the narrower w are a copy; NULL: w itself is updated. */
static void adamw(act *w, real *master, real *m, real *v, const act *g, size_t n, AdamW h);

/* Sum of squares of x (n), in double. The order of the sum depends on n alone. */
static double sum_squares(const act *x, size_t n);

/* =================================================================================================
 * Chapter 2. Ranks and groups [§2.3, App. B.1, Fig. 8]
 * =================================================================================================
 *
 * Rank code is written as if the rank were alone. Ranks meet only in the collectives below, which
 * are named as in MPI and NCCL. Chapter 12 connects ranks that are threads of this process.
 *
 * A rank belongs to these groups [Fig. 8 has tp and dp]: the ranks between which its layers'
 * matrices are divided (tp), the stages of its pipeline (pp), the replicas that hold the same
 * slices (dp), all (world), and one for the word embedding, below. */

/* ---- The grid -------------------------------------------------------------------------------- */

/* t x p x d ranks. Tensor ranks talk most, so they are neighbours; then come the replicas, then the
 * stages, as in Megatron [P22, P23]: rank = (stage * d + replica) * t + tensor rank. */
typedef struct {
    int tp, pp, dp;
} Layout;

static int world_size(Layout s) { return s.tp * s.pp * s.dp; }
static int tp_rank(Layout s, int rank) { return rank % s.tp; }
static int dp_rank(Layout s, int rank) { return rank / s.tp % s.dp; }
static int pp_rank(Layout s, int rank) { return rank / (s.tp * s.dp); }

/* Ranks of equal color form a group: its color says what they have in common. */
static int tp_color(Layout s, int rank) { return rank / s.tp; }
static int dp_color(Layout s, int rank) { return pp_rank(s, rank) * s.tp + tp_rank(s, rank); }
static int pp_color(Layout s, int rank) { return rank % (s.tp * s.dp); }

/* The first stage looks up the word embedding, the last one makes the logits with it [§3]: both
 * hold it, and form a pair (Megatron's embedding group). Any other rank is alone in its group. */
static int embedding_color(Layout s, int rank)
{
    int stage = pp_rank(s, rank);
    return stage == 0 || stage == s.pp - 1 ? pp_color(s, rank) : s.tp * s.dp + rank;
}

/* ---- Collectives ----------------------------------------------------------------------------- */

enum { MAX_RANKS = 64 }; /* threads that one machine may be asked for */

typedef enum { SUM, MAX } Op;

/* Type of a message's elements. ACT and REAL_ARRAY are arrays of the device; DOUBLE_ARRAY is a few
 * numbers of the host. */
typedef enum { ACT, REAL_ARRAY, DOUBLE_ARRAY } Type;

/* Where in the model a rank is at work. Only error messages and `trace` read it. */
typedef struct {
    const char *operation; /* "attention", "loss", .. */
    const char *edge;      /* "g forward", "f backward" [§3 Fig.3], or "" */
    const char *paper;     /* the place in the paper, "[§3 Fig.3b]" */
    int layer;             /* -1 outside of the layers */
} Place;

typedef struct Trace Trace; /* chapter 12: a list of all calls */
typedef struct Board Board; /* chapter 12: what the ranks of a group share */

/* One rank's view of a group. */
typedef struct {
    int rank, size;
    Board *board;
    const char *name;   /* "tp", .. */
    int world_rank;     /* this rank's number in the whole run */
    const Place *place; /* NULL: unknown */
    Trace *trace;       /* NULL: calls are not recorded */
} Comm;

/* All ranks of a group make the same call, with the same n, type and op; else the program ends and
 * names the two calls that differ. n counts elements. */

/* x[i] = x_0[i] op x_1[i] op .. over the ranks of the group, in place, on all ranks. Sums run in
 * rank order and are rounded to the elements' type once. So a run repeats bit for bit, and all
 * ranks hold the same bits afterwards. Rank r reduces slice r for all: each rank moves 2(t-1)/t n
 * elements, as in a ring [P8]. */
static void all_reduce(Comm *c, void *x, size_t n, Type type, Op op);

/* out (size * n): out[r * n + i] = x[i] of rank r. */
static void all_gather(Comm *c, void *out, void *x, size_t n, Type type);

/* x (n) of every rank = x of the root. */
static void broadcast(Comm *c, void *x, size_t n, Type type, int root);

/* Point to point. There is a mailbox for each (from, to). send waits until it is empty, copies x
 * (n) into it and returns. recv waits until it is full. */
static void send(Comm *c, const void *x, size_t n, Type type, int to);
static void recv(Comm *c, void *x, size_t n, Type type, int from);

/* Returns when all ranks of the group have called it. */
static void barrier(Comm *c);

/* As MPI_Comm_split: ranks of parent that pass the same color form a group, in the order of their
 * ranks in parent. All of parent call it. comm_free ends a group; all of the group call it. */
static Comm comm_split(Comm *parent, int color, const char *name);
static void comm_free(Comm *c);

/* Runs body(world, arg) as n ranks, and returns when all have returned. */
static void run_ranks(int n, void (*body)(Comm *world, void *arg), void *arg);

/* Is this the one rank of all that prints, writes files, and locks folders? world is NULL before
 * the ranks have started. */
static int is_writer(const Comm *world);

/* =================================================================================================
 * Chapter 3. The model-parallel transformer [§3]
 * =================================================================================================
 *
 * Why columns, then rows. The MLP is Z = GeLU(X A) B. If A is cut by rows, and X by columns, X A =
 * X_1 A_1 + X_2 A_2 is a sum over the ranks. It must be complete before GeLU, because GeLU(a + b)
 * is not GeLU(a) + GeLU(b) [eq.2, P3]. If A is cut by columns, [Y_1, Y_2] = [GeLU(X A_1), GeLU(X
 * A_2)], and each rank goes on alone [eq.3, P2]. Its Y_i are columns of Y, and B cut by rows fits
 * them: Z = Y_1 B_1 + Y_2 B_2 is a sum over the ranks, needed once, at the end. The bias of such a
 * row-parallel matrix is added once, after the sum: in each rank's term it would be added t times
 * [P4]. Attention is cut in the same way: Q, K and V by columns, in whole heads, since a head needs
 * no other head; the matrix of its output by rows [Fig. 3b].
 *
 * ([Y_1, Y_2] are side by side. Weights are stored transposed: columns of A are rows of w here.)
 *
 * f and g [Code 1, Fig. 3] stand at the two ends of such a region:
 *
 *            forward                                backward
 *     f      identity: all ranks have X             all-reduce: dX is a sum over the ranks, since
 *                                                   each has the contribution of its columns
 *     g      all-reduce: Z is a sum over the ranks  identity: all ranks have dZ
 *
 * Between f and g no rank talks [P7]. A layer has two such regions, so it needs two all-reduces
 * forward and two backward [Fig. 4, P5]. Recomputation [§4.2] runs the forward pass again, and
 * needs two more. With the g of the embedding and the f of the logits, a micro-batch that goes
 * forward and backward through L layers needs 4L + 2 all-reduces of N*C numbers, with recomputation
 * 6L + 2 [P6]. The paper counts the 4L.
 *
 * Outside of these regions all ranks of a tensor group hold the same activations and do the same
 * work: LayerNorm, the residual, and bias and dropout after g are duplicated, and so are their
 * parameters. These stay equal without a message. Each rank has the same inputs, since g leaves the
 * same bits on all, and the same incoming gradients, since f's all-reduce does so, too. So it
 * computes the same gradients and makes the same update [§3]. */

/* ---- What a rank owns ------------------------------------------------------------------------ */

/* The shape of a model. In Hugging Face's config.json: n_layer, n_embd, n_head, n_inner,
 * n_positions, vocab_size. */
typedef struct {
    size_t L, C, H, F, P, V; /* see the letters on the first screen */
    Gelu gelu;
    real eps; /* LayerNorm's */
    real embd_pdrop, attn_pdrop, resid_pdrop;
} Config;

/* One layer [Fig. 2], as one tensor rank holds it: weights [out, in]. Cp = C/t, Fp = F/t. */
typedef struct {
    act *ln1_g, *ln1_b;   /* (C)            whole on all tensor ranks */
    act *qkv_w, *qkv_b;   /* (3Cp,C) (3Cp)  column-parallel: Q, K, V of whole heads */
    act *proj_w, *proj_b; /* (C,Cp) (C)     row-parallel; the bias is whole */
    act *ln2_g, *ln2_b;   /* (C)            whole */
    act *fc_w, *fc_b;     /* (Fp,C) (Fp)    column-parallel: the paper's A */
    act *out_w, *out_b;   /* (C,Fp) (C)     row-parallel: the paper's B; the bias is whole */
} Layer;

/* All parameters of a rank, or their gradients. A stage has its own part; other fields are NULL. */
typedef struct {
    act *wte;           /* (Vp,C) rows of the vocabulary; on the last stage, too, for the logits */
    act *wpe;           /* (P,C) */
    Layer *layer;       /* [depth] this stage's layers */
    act *lnf_g, *lnf_b; /* (C) */
} Params;

/* What a layer keeps of one micro-batch for the backward pass. N = B*T; Cp, Fp, Hp: this rank's. */
typedef struct {
    act *x;                              /* (N,C)     the layer's input: the residual stream */
    act *ln1;                            /* (N,C)     LayerNorm of x */
    act *qkv;                            /* (N,3Cp)   */
    act *att;                            /* (N,Cp)    attention of this rank's heads */
    act *res;                            /* (N,C)     x + attention's output */
    act *ln2;                            /* (N,C)     LayerNorm of res */
    act *pre, *gelu;                     /* (N,Fp)    before and after GeLU */
    real *mean1, *rstd1, *mean2, *rstd2; /* (N)       */
    real *lse;                           /* (B,Hp,T)  log-sum-exp of each row of scores */
} Saved;

/* One micro-batch on its way through a stage. */
typedef struct {
    int *tokens, *targets; /* (N) input; targets are the same text one token later */
    real *weight;          /* (N) 1: the target counts. 0: padding, or context that is not scored */
    size_t sequence;       /* number of its first sequence in the global batch: the dropout masks'
                              counters start from it */
    Saved *layer;          /* [depth + 1]; of the last one only x exists: the stage's output */
    real *meanf, *rstdf;   /* (N) last stage: final LayerNorm */
    act *lnf, *logits;     /* (N,C) (N,Vp) */
    real *max, *sum, *target_logit, *loss; /* (N) */
} MicroBatch;

/* Keys and values of all earlier positions, for generation. */
typedef struct {
    act **keys, **values; /* [depth] arrays of (room,Cp), room for k->T positions */
    size_t past;          /* positions filled */
} Cache;

typedef struct Tensor Tensor; /* chapter 5: one parameter's name, shape and slice */

/* All that one GPU owns. The variable is called k everywhere. */
typedef struct {
    Config config;
    Layout layout;
    Comm world, tp, pp, dp, embedding; /* the groups this rank belongs to */
    Place place;                       /* where it is at work */

    size_t B, T;               /* sequences in a micro-batch, tokens in a sequence, now */
    size_t Cp, Hp, Fp, D;      /* this rank's columns, heads, MLP columns; size of a head */
    size_t Vp, v0, valid;      /* its tokens are v0 .. v0+Vp-1; the first `valid` are no padding */
    size_t depth, first_layer; /* this stage's layers */
    int first_stage, last_stage;

    Tensor *tensor;           /* [tensors] its slices */
    size_t tensors, elements; /* elements of each arena of parameters */
    Params w, g;              /* pointers to each of the weights, and to their gradients */
    act *weights, *gradients; /* the arenas of these */
    real *m, *v;              /* AdamW's moments */
    real *master;             /* float weights where act is narrower; else NULL */

    MicroBatch *flight;      /* [in_flight] micro-batches whose backward pass is still to come */
    int in_flight;           /* slots for them */
    int peak_in_flight;      /* most slots ever in use [P57] */
    act *dx, *dy;            /* (N,C) gradient of the residual stream; of a branch */
    act *dpre, *dqkv, *datt; /* (N,Fp) (N,3Cp) (N,Cp) */
    real *delta;             /* (B,Hp,T) attention's backward pass */
    void *activations;       /* the arena of flight, dx .. delta */
    real *host;              /* (2,N) on the host: weights on their way in; losses, weights out */
    int *host_ids;           /* (2,N) on the host: tokens, targets */
    Cache *cache;            /* generation only */

    int recompute; /* recompute activations in the backward pass [§4.2] */
    int training;  /* dropout is on */
    uint64_t seed;
    uint32_t step; /* dropout draws new masks in each step */
} Rank;

/* For error messages and `trace`; nothing else depends on it. */
static void set_place(Rank *k, const char *operation, const char *paper, int layer)
{
    Place place = {operation, "", paper, layer};
    k->place = place;
}

/* ---- f and g [§3, Code 1, Fig. 3; P1] -------------------------------------------------------- */

/* x and dx have n elements. The all-reduces work in place. */

static void f_forward(Rank *k, act *x, size_t n) { (void)k, (void)x, (void)n; /* identity */ }

static void f_backward(Rank *k, act *dx, size_t n)
{
    k->place.edge = "f backward";
    all_reduce(&k->tp, dx, n, ACT, SUM);
}

static void g_forward(Rank *k, act *x, size_t n)
{
    k->place.edge = "g forward";
    all_reduce(&k->tp, x, n, ACT, SUM);
}

static void g_backward(Rank *k, act *dx, size_t n) { (void)k, (void)dx, (void)n; /* identity */ }

/* ---- Dropout's masks [App. B.2] -------------------------------------------------------------- */

/* Sites of dropout: one at the embedding, three in each layer. */
enum { SITE_EMBEDDING = 0, SITE_ATTENTION = 1, SITE_ATTENTION_OUTPUT = 2, SITE_MLP_OUTPUT = 3 };

/* Outside of the regions between f and g, all tensor ranks must draw equal masks, since they
 * duplicate work. Inside, ranks have different heads, and their masks must differ [P25]. Here each
 * element draws by its index in the whole tensor, which gives both. Recomputation draws by the same
 * index again, so it has the same masks [P26].
 * DEVIATION: in the paper each GPU has a generator with a state. Megatron seeds that of the
 * attention with seed + 2718 + tensor rank, so its masks depend on t [P24]. Here they do not. */

static Dropout replicated_dropout(const Rank *k, int site, size_t layer, const MicroBatch *mb)
{
    const real p = site == SITE_EMBEDDING ? k->config.embd_pdrop : k->config.resid_pdrop;
    const size_t first = mb->sequence * k->T * k->config.C;
    const uint32_t stream = (uint32_t)(3 * layer) + (uint32_t)site;
    const Dropout d = {k->seed, stream, k->step, k->training ? p : 0, first, 0};
    return d;
}

static Dropout attention_dropout(const Rank *k, size_t layer, const MicroBatch *mb)
{
    const size_t H = k->config.H, first_head = (size_t)k->tp.rank * k->Hp;
    const size_t first = (mb->sequence * H + first_head) * k->T * k->T;
    const uint32_t stream = (uint32_t)(3 * layer) + SITE_ATTENTION;
    const Dropout d = {k->seed, stream, k->step, k->training ? k->config.attn_pdrop : 0, first, H};
    return d;
}

/* ---- One layer [Fig. 2, Fig. 3, Fig. 4] ------------------------------------------------------ */

/* Layer l of this stage, from mb->layer[l].x to mb->layer[l + 1].x. What stands between f and g is
 * this rank's part only:
 *
 *     x -> LN -> f -> QKV, attention, output -> g -> + bias, dropout, + x   -> res      Fig. 3b
 *   res -> LN -> f -> A_i, GeLU, B_i         -> g -> + bias, dropout, + res -> next x   Fig. 3a */
static void block_forward(Rank *k, size_t l, MicroBatch *mb)
{
    const Layer *w = &k->w.layer[l];
    Saved *a = &mb->layer[l];
    act *out = mb->layer[l + 1].x;
    const size_t B = k->B, T = k->T, N = B * T, C = k->config.C, layer = k->first_layer + l;
    const real eps = k->config.eps;
    const Dropout after_attention = replicated_dropout(k, SITE_ATTENTION_OUTPUT, layer, mb);
    const Dropout after_mlp = replicated_dropout(k, SITE_MLP_OUTPUT, layer, mb);

    /* Fig. 3b. This rank has Hp whole heads: qkv (N,3Cp) = ln1 (N,C) times its columns. */
    set_place(k, "attention", "[§3 Fig.3b]", (int)layer);
    layernorm_forward(a->ln1, a->mean1, a->rstd1, a->x, w->ln1_g, w->ln1_b, N, C, eps);
    f_forward(k, a->ln1, N * C);
    linear_forward(a->qkv, a->ln1, w->qkv_w, w->qkv_b, N, C, 3 * k->Cp);
    if (k->cache)
        attention_cached_forward(a->att, k->cache->keys[l], k->cache->values[l], a->qkv, T,
                                 k->cache->past, k->Hp, k->D);
    else
        attention_forward(a->att, a->lse, a->qkv, B, T, k->Hp, k->D,
                          attention_dropout(k, layer, mb));
    linear_forward(a->res, a->att, w->proj_w, NULL, N, k->Cp, C); /* partial sums, summed by g */
    g_forward(k, a->res, N * C);
    bias_dropout_add_layernorm_forward(a->ln2, a->res, a->mean2, a->rstd2, a->res, w->proj_b, a->x,
                                       w->ln2_g, w->ln2_b, N, C, eps, after_attention);

    /* Fig. 3a. Y_i = GeLU(X A_i), then Y_i B_i. */
    set_place(k, "mlp", "[§3 Fig.3a]", (int)layer);
    f_forward(k, a->ln2, N * C);
    linear_gelu_forward(a->gelu, a->pre, a->ln2, w->fc_w, w->fc_b, N, C, k->Fp, k->config.gelu);
    linear_forward(out, a->gelu, w->out_w, NULL, N, k->Fp, C); /* partial sums, summed by g */
    g_forward(k, out, N * C);
    bias_dropout_add_forward(out, out, w->out_b, a->res, N, C, after_mlp);
}

/* The steps of block_forward in reverse order. On entry k->dx is the gradient of the layer's
 * output, on return that of its input; k->dy is the gradient within a branch. Adds to the gradients
 * of the layer's weights. */
static void block_backward(Rank *k, size_t l, const MicroBatch *mb)
{
    const Layer *w = &k->w.layer[l], *g = &k->g.layer[l];
    const Saved *a = &mb->layer[l];
    const size_t B = k->B, T = k->T, N = B * T, C = k->config.C, layer = k->first_layer + l;
    const Dropout after_attention = replicated_dropout(k, SITE_ATTENTION_OUTPUT, layer, mb);
    const Dropout after_mlp = replicated_dropout(k, SITE_MLP_OUTPUT, layer, mb);
    act *dx = k->dx, *dy = k->dy;

    set_place(k, "mlp", "[§3 Fig.3a]", (int)layer);
    bias_dropout_add_backward(dy, g->out_b, dx, N, C, after_mlp);
    g_backward(k, dy, N * C);
    gelu_linear_backward(k->dpre, g->out_w, dy, a->gelu, a->pre, w->out_w, N, k->Fp, C,
                         k->config.gelu);
    linear_backward(dy, g->fc_w, g->fc_b, k->dpre, a->ln2, w->fc_w, N, C, k->Fp);
    f_backward(k, dy, N * C);
    layernorm_backward(dx, g->ln2_g, g->ln2_b, dy, a->res, w->ln2_g, a->mean2, a->rstd2, dx, N, C);

    set_place(k, "attention", "[§3 Fig.3b]", (int)layer);
    bias_dropout_add_backward(dy, g->proj_b, dx, N, C, after_attention);
    g_backward(k, dy, N * C);
    linear_backward(k->datt, g->proj_w, NULL, dy, a->att, w->proj_w, N, k->Cp, C);
    attention_backward(k->dqkv, k->delta, k->datt, a->att, a->lse, a->qkv, B, T, k->Hp, k->D,
                       attention_dropout(k, layer, mb));
    linear_backward(dy, g->qkv_w, g->qkv_b, k->dqkv, a->ln1, w->qkv_w, N, C, 3 * k->Cp);
    f_backward(k, dy, N * C);
    layernorm_backward(dx, g->ln1_g, g->ln1_b, dy, a->x, w->ln1_g, a->mean1, a->rstd1, dx, N, C);
}

/* ---- Both ends: the embedding and the cross entropy, cut by the vocabulary [§3] -------------- */

/* x (N,C) = dropout(word embedding + position embedding). Each rank looks up the tokens that it has
 * and leaves zeros for the others; g adds up the ranks [P15]. */
static void embedding_forward(Rank *k, act *x, const MicroBatch *mb)
{
    const size_t N = k->B * k->T, C = k->config.C, past = k->cache ? k->cache->past : 0;
    set_place(k, "embedding", "[§3 input embedding]", -1);
    token_embedding_forward(x, mb->tokens, k->w.wte, N, C, k->v0, k->Vp);
    g_forward(k, x, N * C);
    position_embedding_forward(x, k->w.wpe, k->B, k->T, C, past,
                               replicated_dropout(k, SITE_EMBEDDING, 0, mb));
}

/* From k->dx, the gradient of embedding_forward's x. All ranks have it, so each adds to the rows of
 * its tokens, and no message is needed. */
static void embedding_backward(Rank *k, const MicroBatch *mb)
{
    const size_t N = k->B * k->T, C = k->config.C;
    position_embedding_backward(k->dx, k->g.wpe, k->B, k->T, C,
                                replicated_dropout(k, SITE_EMBEDDING, 0, mb));
    g_backward(k, k->dx, N * C);
    token_embedding_backward(k->g.wte, k->dx, mb->tokens, N, C, k->v0, k->Vp);
}

/* Final LayerNorm, then the logits of this rank's tokens, for some rows of x (rows,C). The output
 * layer is the word embedding again [§3]; this rank's rows of wte are columns of the paper's E, so
 * it begins with an f. */
static void logits_forward(Rank *k, MicroBatch *mb, const act *x, size_t rows)
{
    const size_t C = k->config.C;
    set_place(k, "logits", "[§3 output embedding]", -1);
    layernorm_forward(mb->lnf, mb->meanf, mb->rstdf, x, k->w.lnf_g, k->w.lnf_b, rows, C,
                      k->config.eps);
    f_forward(k, mb->lnf, rows * C);
    linear_forward(mb->logits, mb->lnf, k->w.wte, NULL, rows, C, k->Vp);
}

/* loss (N) = log sum_j e^(z_j) - z_target, where a rank has the logits z of its own tokens only.
 * Gathering the logits would move N*V numbers. This moves 3N: the largest logit, the sum, and the
 * target's logit, in three all-reduces. The paper says N = b*s; its code moves 3N, too [§3, P17,
 * P18; doc/cross_entropy.md].
 * DEVIATION: in Megatron the tokens that pad the vocabulary take part in the softmax. Here they do
 * not, so the loss does not depend on t, and is that of Hugging Face's GPT-2. */
static void cross_entropy_forward(Rank *k, MicroBatch *mb)
{
    const size_t N = k->B * k->T;
    set_place(k, "cross entropy", "[§3 output embedding]", -1);
    logits_max(mb->max, mb->logits, N, k->Vp, k->valid);
    all_reduce(&k->tp, mb->max, N, REAL_ARRAY, MAX);
    logits_sum_exp(mb->sum, mb->target_logit, mb->logits, mb->max, mb->targets, N, k->Vp, k->valid,
                   k->v0);
    all_reduce(&k->tp, mb->sum, N, REAL_ARRAY, SUM);
    all_reduce(&k->tp, mb->target_logit, N, REAL_ARRAY, SUM);
    cross_entropy_loss(mb->loss, mb->sum, mb->target_logit, N);
}

/* k->dx = gradient of scale * sum over n of weight[n] * loss[n], with respect to the last layer's
 * output x (N,C). The softmax needs no message [P17]; the f of the logits needs one all-reduce. */
static void logits_backward(Rank *k, MicroBatch *mb, const act *x, real scale)
{
    const size_t N = k->B * k->T, C = k->config.C;
    set_place(k, "logits", "[§3 output embedding]", -1);
    cross_entropy_backward(mb->logits, mb->max, mb->sum, mb->targets, mb->weight, scale, N, k->Vp,
                           k->valid, k->v0);
    linear_backward(k->dy, k->g.wte, NULL, mb->logits, mb->lnf, k->w.wte, N, C, k->Vp);
    f_backward(k, k->dy, N * C);
    layernorm_backward(k->dx, k->g.lnf_g, k->g.lnf_b, k->dy, x, k->w.lnf_g, mb->meanf, mb->rstdf,
                       NULL, N, C);
}

/* =================================================================================================
 * Chapter 4. Operators, how they do it [§2.2, Fig. 2, 3]
 * =================================================================================================
 *
 * The code of chapter 1's contracts, forward beside backward. First what the CPU and the GPU share;
 * then the CPU's operators, from #ifndef OTHER_OPERATORS on, in whose place megatron_gpt2.cu has
 * its own. */

/* ---- Random numbers -------------------------------------------------------------------------- */

/* A round of Philox on the counter c0..c3. */
static inline HOST_DEVICE void philox_round(uint32_t *c0, uint32_t *c1, uint32_t *c2, uint32_t *c3,
                                            uint64_t seed, uint32_t round)
{
    const uint32_t k0 = (uint32_t)seed + round * 0x9E3779B9;
    const uint32_t k1 = (uint32_t)(seed >> 32) + round * 0xBB67AE85;
    const uint64_t p0 = (uint64_t)0xD2511F53 * *c0;
    const uint64_t p1 = (uint64_t)0xCD9E8D57 * *c2;
    *c0 = (uint32_t)(p1 >> 32) ^ *c1 ^ k0;
    *c2 = (uint32_t)(p0 >> 32) ^ *c3 ^ k1;
    *c1 = (uint32_t)p1;
    *c3 = (uint32_t)p0;
}

/* Philox4x32-10 (Salmon et al. 2011; also PyTorch's and cuRAND's on GPUs): four random words as a
 * pure function of a key and a counter. There is no state to save. Any rank, in any layout, in any
 * order, draws the same word for the same (seed, site, step, index), so masks and initial weights
 * do not depend on how the model is cut. */
static inline HOST_DEVICE void philox(uint32_t out[4], uint64_t seed, uint64_t block, uint32_t site,
                                      uint32_t step)
{
    out[0] = (uint32_t)block;
    out[1] = (uint32_t)(block >> 32);
    out[2] = site;
    out[3] = step;
    for (uint32_t round = 0; round < 10; round++)
        philox_round(out, out + 1, out + 2, out + 3, seed, round);
}

/* Sites keep the streams apart. Those of dropout count up from 0; the others have a high bit. */
enum {
    SITE_INIT = 0x40000000,
    SITE_SHUFFLE_DOCUMENTS = 0x20000000,
    SITE_SHUFFLE_SAMPLES = 0x20000001,
    SITE_SAMPLE = 0x10000000
};

/* Word number index of a stream. */
static inline uint32_t random_word(uint64_t seed, uint32_t site, uint32_t step, uint64_t index)
{
    uint32_t word[4];
    philox(word, seed, index / 4, site, step);
    return word[index % 4];
}

/* Uniform in (0, 1): 32 bits, never 0 and never 1. */
static inline double uniform(uint32_t word) { return (word + 0.5) * 0x1p-32; }

/* A word below this drops its element; p < 1. */
static inline uint32_t dropout_threshold(real p) { return (uint32_t)ceil(p * 0x1p32); }

/* ---- GeLU [§2.2] ----------------------------------------------------------------------------- */

/* doc/accuracy.md has the error bounds of these functions, in units in the last place. */

static HOST_DEVICE real exponential(real x); /* e^x; chapter 11 */

static inline real square_root(real x)
{
    return sizeof x == sizeof(float) ? sqrtf((float)x) : (real)sqrt(x);
}

/* Phi(x) = erfc(-x / sqrt(2)) / 2. Through 1 + erf it would lose digits for x < 0. */
static inline HOST_DEVICE real normal_cdf(real x)
{
    if (sizeof x == sizeof(float)) return erfcf((float)x * -(float)M_SQRT1_2) / 2;
    return (real)(erfc(x * -M_SQRT1_2) / 2);
}

/* x * Phi(x). Megatron's tanh form, x/2 (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3), equals
 * x / (1 + e^-2u): one exponential, no tanh [P41]. Both forms are NaN at -infinity. */
static inline HOST_DEVICE real gelu(real x, Gelu kind)
{
    if (kind == GELU_ERF) return x * normal_cdf(x);
    return x / (1 + exponential((real)-1.5957691216057308 * x * (1 + (real)0.044715 * x * x)));
}

/* d gelu / dx. tanh: s + x s(1-s) 2u' with t = e^-2u, s = 1 / (1 + t), 1-s = t s. erf: Phi(x) + x
 * phi(x). x is clamped first: gelu' is 0, or negligible, at `low`, and 1 at 40; t stays finite. */
static inline HOST_DEVICE real gelu_slope(real x, Gelu kind)
{
    const real low = kind == GELU_ERF ? -40 : -10;
    if (x > 40) x = 40;
    else if (x < low) x = low;
    if (kind == GELU_ERF)
        return normal_cdf(x) + x * (real)0.3989422804014327 * exponential(-x * x / 2);
    const real xx = x * x;
    const real t = exponential((real)-1.5957691216057308 * x * (1 + (real)0.044715 * xx));
    const real s = 1 / (1 + t);
    return s + x * (t * s) * s * (real)1.5957691216057308 * (1 + 3 * (real)0.044715 * xx);
}

#ifndef OTHER_OPERATORS /* what follows is the CPU's; megatron_gpt2.cu has the GPU's */

enum { SMALL = 16384 }; /* a loop over fewer numbers is not worth waking other threads */
static_assert(sizeof(act) == sizeof(real), "the CPU's operators use reals as act");

/* ---- What this chapter takes from chapter 11 ------------------------------------------------- */

/* A matrix: element (i, j) is p[i * row + j * col]. */
typedef struct {
    const act *p;
    size_t rows, cols;
    size_t row, col; /* from one row to the next, from one column to the next; elements */
} Matrix;

static inline Matrix matrix(const act *p, size_t rows, size_t cols, size_t row)
{
    Matrix m = {p, rows, cols, row, 1};
    return m;
}

static inline Matrix transposed(Matrix m)
{
    Matrix t = {m.p, m.cols, m.rows, m.col, m.row};
    return t;
}

typedef enum { WRITE, ADD } Store; /* c = a b, or c += a b */

/* What is done to an element of a product when its sum is complete. */
typedef enum { BIAS, BIAS_GELU, GELU_SLOPE } EpilogueKind;
typedef struct {
    EpilogueKind kind;
    const act *bias; /* BIAS, BIAS_GELU: (columns) is added; NULL for none */
    act *pre;        /* BIAS_GELU: gets the sum before gelu(), unless NULL.
                        GELU_SLOPE: the element is multiplied by gelu_slope(pre) */
    Gelu gelu;
} Epilogue;

/* c (rows of a, columns of b) = or += a b, on all threads; then e, unless it is NULL. */
static void matmul(act *c, Matrix a, Matrix b, Store store, const Epilogue *e);

/* The same on the calling thread, for attention's blocks. Rows of c are c_row apart. */
static void matmul_block(act *c, size_t c_row, Matrix a, Matrix b, Store store);

static real dot(const act *a, const act *b, size_t n);  /* a' b */
static real largest(const real *x, size_t n, real top); /* of top and x (n) */

/* out[i] = 1/(1-p) if random_word(seed, site, step, first + index + i) is kept, else 0; i < n. */
static void dropout_factors(real *out, Dropout d, size_t index, size_t n);

/* ---- Linear layers [§3 eq.1-3] --------------------------------------------------------------- */

static void linear_forward(act *y, const act *x, const act *w, const act *b, size_t N, size_t I,
                           size_t O)
{
    const Epilogue bias = {BIAS, b, NULL, GELU_TANH};
    matmul(y, matrix(x, N, I, I), transposed(matrix(w, O, I, I)), WRITE, &bias);
}

enum { COLUMN_BLOCK = 64 }; /* columns a thread takes at a time where it sums over rows */

/* db (C) += column sums of x (N,C). */
static void add_column_sums(act *db, const act *x, size_t N, size_t C)
{
#pragma omp parallel for schedule(static) if (N * C > SMALL)
    for (size_t c0 = 0; c0 < C; c0 += COLUMN_BLOCK) {
        real sum[COLUMN_BLOCK] = {0};
        const size_t count = min_size(COLUMN_BLOCK, C - c0);
        for (size_t n = 0; n < N; n++)
#pragma omp simd
            for (size_t c = 0; c < count; c++) sum[c] += x[n * C + c0 + c];
        for (size_t c = 0; c < count; c++) db[c0 + c] += sum[c];
    }
}

static void linear_backward(act *dx, act *dw, act *db, const act *dy, const act *x, const act *w,
                            size_t N, size_t I, size_t O)
{
    const Matrix DY = matrix(dy, N, O, O);
    if (dx) matmul(dx, DY, matrix(w, O, I, I), WRITE, NULL);
    if (dw) matmul(dw, transposed(DY), matrix(x, N, I, I), ADD, NULL);
    if (db) add_column_sums(db, dy, N, O);
}

static void linear_gelu_forward(act *y, act *pre, const act *x, const act *w, const act *b,
                                size_t N, size_t I, size_t O, Gelu kind)
{
    const Epilogue bias_gelu = {BIAS_GELU, b, pre, kind};
    matmul(y, matrix(x, N, I, I), transposed(matrix(w, O, I, I)), WRITE, &bias_gelu);
}

static void gelu_linear_backward(act *dpre, act *dw, const act *dz, const act *y, const act *pre,
                                 const act *w, size_t N, size_t I, size_t O, Gelu kind)
{
    const Matrix DZ = matrix(dz, N, O, O);
    const Epilogue slope = {GELU_SLOPE, NULL, (act *)pre, kind};
    matmul(dpre, DZ, matrix(w, O, I, I), WRITE, &slope);
    matmul(dw, transposed(DZ), matrix(y, N, I, I), ADD, NULL);
}

/* ---- Embeddings ------------------------------------------------------------------------------ */

static void token_embedding_forward(act *x, const int *tokens, const act *wte, size_t N, size_t C,
                                    size_t v0, size_t Vp)
{
#pragma omp parallel for schedule(static) if (N * C > SMALL)
    for (size_t n = 0; n < N; n++) {
        const size_t row = (size_t)tokens[n] - v0; /* a token below v0 wraps to a huge number */
        if (row < Vp) memcpy(x + n * C, wte + row * C, C * sizeof *x);
        else memset(x + n * C, 0, C * sizeof *x);
    }
}

/* A token may occur several times, so each thread has columns of its own, not rows. */
static void token_embedding_backward(act *dwte, const act *dx, const int *tokens, size_t N,
                                     size_t C, size_t v0, size_t Vp)
{
#pragma omp parallel for schedule(static) if (N * C > SMALL)
    for (size_t c0 = 0; c0 < C; c0 += COLUMN_BLOCK)
        for (size_t n = 0; n < N; n++) {
            const size_t row = (size_t)tokens[n] - v0, end = min_size(c0 + COLUMN_BLOCK, C);
            if (row < Vp)
#pragma omp simd
                for (size_t c = c0; c < end; c++) dwte[row * C + c] += dx[n * C + c];
        }
}

enum { KEEP_BLOCK = 512 }; /* dropout factors at a time: they stay in the L1 cache */

/* x (C) *= the mask of elements index .. index+C-1. */
static void dropout_row(act *x, size_t C, Dropout d, size_t index)
{
    real keep[KEEP_BLOCK];
    for (size_t c0 = 0; c0 < C; c0 += KEEP_BLOCK) {
        const size_t count = min_size(KEEP_BLOCK, C - c0);
        dropout_factors(keep, d, index + c0, count);
#pragma omp simd
        for (size_t c = 0; c < count; c++) x[c0 + c] *= keep[c];
    }
}

/* out (C) = residual + mask * (y + bias), with the mask of elements index .. index+C-1. residual
 * NULL: none. */
static void bias_dropout_add_row(act *out, const act *y, const act *bias, const act *residual,
                                 size_t C, Dropout d, size_t index)
{
    real keep[KEEP_BLOCK];
    for (size_t c0 = 0; c0 < C; c0 += KEEP_BLOCK) {
        const size_t end = min_size(c0 + KEEP_BLOCK, C);
        dropout_factors(keep, d, index + c0, end - c0);
#pragma omp simd
        for (size_t c = c0; c < end; c++)
            out[c] = (residual ? residual[c] : 0) + (y[c] + bias[c]) * keep[c - c0];
    }
}

static void position_embedding_forward(act *x, const act *wpe, size_t B, size_t T, size_t C,
                                       size_t past, Dropout d)
{
#pragma omp parallel for schedule(static) if (B * T * C > SMALL)
    for (size_t n = 0; n < B * T; n++) {
        act *row = x + n * C;
        bias_dropout_add_row(row, row, wpe + (past + n % T) * C, NULL, C, d, n * C);
    }
}

static void position_embedding_backward(act *dx, act *dwpe, size_t B, size_t T, size_t C, Dropout d)
{
#pragma omp parallel for schedule(static) if (B * T * C > SMALL)
    for (size_t t = 0; t < T; t++)
        for (size_t b = 0; b < B; b++) {
            const size_t n = b * T + t;
            if (d.p > 0) dropout_row(dx + n * C, C, d, n * C);
#pragma omp simd
            for (size_t c = 0; c < C; c++) dwpe[t * C + c] += dx[n * C + c];
        }
}

/* ---- LayerNorm ------------------------------------------------------------------------------- */

/* One row y (C). The variance takes a second pass over x, which is in the L1 cache then: E[x^2] -
 * E[x]^2 would lose digits [doc/accuracy.md]. */
static void layernorm_row(act *y, real *mean, real *rstd, const act *x, const act *g, const act *b,
                          size_t C, real eps)
{
    real sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t c = 0; c < C; c++) sum += x[c];
    const real m = sum / (real)C;
#pragma omp simd reduction(+ : squares)
    for (size_t c = 0; c < C; c++) squares += (x[c] - m) * (x[c] - m);
    const real r = 1 / square_root(squares / (real)C + eps);
#pragma omp simd
    for (size_t c = 0; c < C; c++) y[c] = (x[c] - m) * r * g[c] + b[c];
    *mean = m;
    *rstd = r;
}

static void layernorm_forward(act *y, real *mean, real *rstd, const act *x, const act *g,
                              const act *b, size_t N, size_t C, real eps)
{
#pragma omp parallel for schedule(static) if (N * C > SMALL)
    for (size_t n = 0; n < N; n++)
        layernorm_row(y + n * C, mean + n, rstd + n, x + n * C, g, b, C, eps);
}

static void layernorm_backward(act *dx, act *dg, act *db, const act *dy, const act *x, const act *g,
                               const real *mean, const real *rstd, const act *dres, size_t N,
                               size_t C)
{
#pragma omp parallel for schedule(static) if (N * C > SMALL)
    for (size_t c0 = 0; c0 < C; c0 += COLUMN_BLOCK) {
        real sum_g[COLUMN_BLOCK] = {0}, sum_b[COLUMN_BLOCK] = {0};
        const size_t count = min_size(COLUMN_BLOCK, C - c0);
        for (size_t n = 0; n < N; n++) {
            const act *dy_n = dy + n * C + c0, *x_n = x + n * C + c0;
            const real m = mean[n], r = rstd[n];
#pragma omp simd
            for (size_t c = 0; c < count; c++) {
                sum_g[c] += dy_n[c] * ((x_n[c] - m) * r);
                sum_b[c] += dy_n[c];
            }
        }
        for (size_t c = 0; c < count; c++) {
            dg[c0 + c] += sum_g[c];
            db[c0 + c] += sum_b[c];
        }
    }
#pragma omp parallel for schedule(static) if (N * C > SMALL)
    for (size_t n = 0; n < N; n++) {
        act *dx_n = dx + n * C;
        const act *dy_n = dy + n * C, *x_n = x + n * C, *dres_n = dres ? dres + n * C : NULL;
        const real m = mean[n], r = rstd[n];
        real sum = 0, sum_hat = 0; /* of dx^; of dx^ * x^ */
#pragma omp simd reduction(+ : sum, sum_hat)
        for (size_t c = 0; c < C; c++) {
            sum += dy_n[c] * g[c];
            sum_hat += dy_n[c] * g[c] * ((x_n[c] - m) * r);
        }
        sum /= (real)C;
        sum_hat /= (real)C;
#pragma omp simd
        for (size_t c = 0; c < C; c++)
            dx_n[c] =
                (dres_n ? dres_n[c] : 0) + r * (dy_n[c] * g[c] - sum - (x_n[c] - m) * r * sum_hat);
    }
}

/* ---- Bias + dropout + residual (+ LayerNorm) ------------------------------------------------- */

static void bias_dropout_add_forward(act *out, const act *y, const act *bias, const act *residual,
                                     size_t N, size_t C, Dropout d)
{
#pragma omp parallel for schedule(static) if (N * C > SMALL)
    for (size_t n = 0; n < N; n++)
        bias_dropout_add_row(out + n * C, y + n * C, bias, residual + n * C, C, d, n * C);
}

/* The LayerNorm reads each row while it is in the L1 cache. */
static void bias_dropout_add_layernorm_forward(act *ln, act *res, real *mean, real *rstd,
                                               const act *y, const act *bias, const act *residual,
                                               const act *g, const act *b, size_t N, size_t C,
                                               real eps, Dropout d)
{
#pragma omp parallel for schedule(static) if (N * C > SMALL)
    for (size_t n = 0; n < N; n++) {
        bias_dropout_add_row(res + n * C, y + n * C, bias, residual + n * C, C, d, n * C);
        layernorm_row(ln + n * C, mean + n, rstd + n, res + n * C, g, b, C, eps);
    }
}

static void bias_dropout_add_backward(act *dy, act *dbias, const act *dout, size_t N, size_t C,
                                      Dropout d)
{
#pragma omp parallel for schedule(static) if (N * C > SMALL)
    for (size_t n = 0; n < N; n++) {
        if (dy != dout) memcpy(dy + n * C, dout + n * C, C * sizeof *dy);
        if (d.p > 0) dropout_row(dy + n * C, C, d, n * C);
    }
    add_column_sums(dbias, dy, N, C);
}

/* ---- Causal self-attention, fused [§3 Fig. 3b] ----------------------------------------------- */

/* The T x T matrices of a head, S and P, never exist as a whole. A block of QUERIES rows meets the
 * keys KEYS at a time. Three values are kept for each row:
 *
 *     m    the largest score so far
 *     l    the sum of e^(score - m) so far
 *     out  the sum of e^(score - m) * mask * value so far
 *
 * When m grows, l and out shrink by e^(old m - new m). In the end P is e^(score - m) / l, so out is
 * divided by l. The backward pass makes P again, as e^(score - lse) with lse = m + log l [Milakov &
 * Gimelshein 2018, Dao et al. 2022; doc/attention.md]. Blocks of keys that no query of the block
 * may see are skipped. */
enum { QUERIES = 48, KEYS = 384 };
static_assert(KEYS % QUERIES == 0,
              "every query of a block must see the first key of each block of keys");

/* One row of attention_forward: s (n), products q k', becomes the dropped-out e^(score - m); m, l
 * and out (D) of the row are updated. index: of s[0] in the mask. */
static void online_softmax_row(real *s, size_t n, real scale, real *m, real *l, act *out, size_t D,
                               Dropout d, size_t index)
{
    real sum = 0, keep[KEYS];
    const real top = fmax(*m, largest(s, n, -INFINITY) * scale);
    const real shrink = exponential(*m - top); /* 0 the first time, when m is -infinity */
    dropout_factors(keep, d, index, n);
#pragma omp simd reduction(+ : sum)
    for (size_t j = 0; j < n; j++) {
        const real e = exponential(s[j] * scale - top);
        sum += e;
        s[j] = e * keep[j];
    }
    *l = *l * shrink + sum; /* the softmax is of all scores: dropout comes after it */
    *m = top;
    if (shrink != 1)
#pragma omp simd
        for (size_t c = 0; c < D; c++) out[c] *= shrink;
}

/* A task is a block of queries of one head. Of a head's tasks those with the most keys come first:
 * so the threads end together. */
static void attention_forward(act *out, real *lse, const act *qkv, size_t B, size_t T, size_t H,
                              size_t D, Dropout d)
{
    const size_t C = H * D, row = 3 * C, blocks = ceil_div(T, QUERIES);
    const real scale = 1 / square_root((real)D);
#pragma omp parallel for schedule(dynamic) if (B * H * T * D > SMALL)
    for (size_t task = 0; task < B * H * blocks; task++) {
        const size_t b = task / blocks / H, h = task / blocks % H;
        const size_t i0 = (blocks - 1 - task % blocks) * QUERIES, rows = min_size(QUERIES, T - i0);
        const act *head = qkv + b * T * row + h * D;
        const Matrix queries = matrix(head + i0 * row, rows, D, row);
        act *o = out + (b * T + i0) * C + h * D;
        real s[QUERIES * KEYS], m[QUERIES], l[QUERIES];
        for (size_t i = 0; i < rows; i++) {
            m[i] = -INFINITY;
            l[i] = 0;
            memset(o + i * C, 0, D * sizeof *o);
        }
        for (size_t j0 = 0; j0 < i0 + rows; j0 += KEYS) {
            const size_t count = min_size(KEYS, i0 + rows - j0);
            const Matrix keys = matrix(head + C + j0 * row, count, D, row);
            const Matrix values = matrix(head + 2 * C + j0 * row, count, D, row);
            matmul_block(s, KEYS, queries, transposed(keys), WRITE);
            for (size_t i = 0; i < rows; i++) {
                const size_t n = min_size(i0 + i + 1 - j0, count); /* keys that query i sees */
                const size_t index = ((b * d.heads + h) * T + i0 + i) * T + j0;
                online_softmax_row(s + i * KEYS, n, scale, m + i, l + i, o + i * C, D, d, index);
                memset(s + i * KEYS + n, 0, (count - n) * sizeof *s);
            }
            matmul_block(o, C, matrix(s, rows, count, KEYS), values, ADD);
        }
        for (size_t i = 0; i < rows; i++) {
            for (size_t c = 0; c < D; c++) o[i * C + c] /= l[i];
            if (lse) lse[(b * H + h) * T + i0 + i] = m[i] + (real)log((double)l[i]);
        }
    }
}

/* One row of attention_backward: s (n), products q k', becomes mask * P; dp (n), products dO v',
 * becomes dS. index: of s[0] in the mask. */
static void softmax_backward_row(real *s, real *dp, size_t n, real scale, real lse, real delta,
                                 Dropout d, size_t index)
{
    real keep[KEYS];
    dropout_factors(keep, d, index, n);
#pragma omp simd
    for (size_t j = 0; j < n; j++) {
        const real p = exponential(s[j] * scale - lse);
        s[j] = p * keep[j];
        dp[j] = (s[j] * dp[j] - p * delta) * scale;
    }
}

/* A head is one task, so that dk and dv are summed in one order. */
static void attention_backward(act *dqkv, real *delta, const act *dout, const act *out,
                               const real *lse, const act *qkv, size_t B, size_t T, size_t H,
                               size_t D, Dropout d)
{
    const size_t C = H * D, row = 3 * C;
    const real scale = 1 / square_root((real)D);
#pragma omp parallel for schedule(dynamic) if (B * H * T * D > SMALL)
    for (size_t head = 0; head < B * H; head++) {
        const size_t b = head / H, h = head % H;
        const act *q = qkv + b * T * row + h * D, *k = q + C, *v = k + C;
        const act *o = out + b * T * C + h * D, *d_o = dout + b * T * C + h * D;
        act *dq = dqkv + b * T * row + h * D, *dk = dq + C, *dv = dk + C;
        real p[QUERIES * KEYS], ds[QUERIES * KEYS];
        for (size_t i = 0; i < T; i++) {
            delta[head * T + i] = dot(d_o + i * C, o + i * C, D);
            memset(dq + i * row, 0, D * sizeof *dq);
            memset(dk + i * row, 0, D * sizeof *dk);
            memset(dv + i * row, 0, D * sizeof *dv);
        }
        for (size_t j0 = 0; j0 < T; j0 += KEYS)
            for (size_t i0 = j0; i0 < T; i0 += QUERIES) {
                const size_t rows = min_size(QUERIES, T - i0);
                const size_t count = min_size(KEYS, i0 + rows - j0);
                const Matrix queries = matrix(q + i0 * row, rows, D, row);
                const Matrix keys = matrix(k + j0 * row, count, D, row);
                const Matrix values = matrix(v + j0 * row, count, D, row);
                const Matrix douts = matrix(d_o + i0 * C, rows, D, C);
                const Matrix probabilities = matrix(p, rows, count, KEYS);
                const Matrix dscores = matrix(ds, rows, count, KEYS);
                matmul_block(p, KEYS, queries, transposed(keys), WRITE);
                matmul_block(ds, KEYS, douts, transposed(values), WRITE);
                for (size_t i = 0; i < rows; i++) {
                    const size_t n = min_size(i0 + i + 1 - j0, count), at = head * T + i0 + i;
                    const size_t index = ((b * d.heads + h) * T + i0 + i) * T + j0;
                    softmax_backward_row(p + i * KEYS, ds + i * KEYS, n, scale, lse[at], delta[at],
                                         d, index);
                    memset(p + i * KEYS + n, 0, (count - n) * sizeof *p);
                    memset(ds + i * KEYS + n, 0, (count - n) * sizeof *ds);
                }
                matmul_block(dv + j0 * row, row, transposed(probabilities), douts, ADD);
                matmul_block(dk + j0 * row, row, transposed(dscores), queries, ADD);
                matmul_block(dq + i0 * row, row, dscores, keys, ADD);
            }
    }
}

static void attention_cached_forward(act *out, act *key_cache, act *value_cache, const act *qkv,
                                     size_t n, size_t past, size_t H, size_t D)
{
    const size_t C = H * D;
    const real scale = 1 / square_root((real)D);
    const Dropout none = {0, 0, 0, 0, 0, H};
    for (size_t i = 0; i < n; i++) {
        memcpy(key_cache + (past + i) * C, qkv + i * 3 * C + C, C * sizeof *key_cache);
        memcpy(value_cache + (past + i) * C, qkv + i * 3 * C + 2 * C, C * sizeof *value_cache);
    }
    if (past == 0 && n > 1) { /* a prompt: it has only itself to attend to */
        attention_forward(out, NULL, qkv, 1, n, H, D, none);
        return;
    }
#pragma omp parallel for schedule(static) if (n * (past + n) * C > SMALL)
    for (size_t task = 0; task < n * H; task++) {
        const size_t i = task / H, h = task % H, count = past + i + 1;
        const act *query = qkv + i * 3 * C + h * D;
        act *o = out + i * C + h * D;
        real s[KEYS], m = -INFINITY, l = 0;
        memset(o, 0, D * sizeof *o);
        for (size_t j0 = 0; j0 < count; j0 += KEYS) {
            const size_t rows = min_size(KEYS, count - j0);
            const act *key = key_cache + j0 * C + h * D, *value = value_cache + j0 * C + h * D;
            for (size_t j = 0; j < rows; j++) s[j] = dot(query, key + j * C, D);
            online_softmax_row(s, rows, scale, &m, &l, o, D, none, 0);
            for (size_t j = 0; j < rows; j++)
#pragma omp simd
                for (size_t c = 0; c < D; c++) o[c] += s[j] * value[j * C + c];
        }
        for (size_t c = 0; c < D; c++) o[c] /= l;
    }
}

/* ---- Softmax and cross entropy over a slice of the vocabulary [§3] --------------------------- */

static void logits_max(real *max, const act *logits, size_t N, size_t Vp, size_t valid)
{
#pragma omp parallel for schedule(static) if (N * Vp > SMALL)
    for (size_t n = 0; n < N; n++) max[n] = largest(logits + n * Vp, valid, -INFINITY);
}

/* Summed in double, since V is large: the errors of exponential() remain, and the sum's rounding to
 * real [P16]. */
static void logits_sum_exp(real *sum, real *target_logit, const act *logits, const real *max,
                           const int *targets, size_t N, size_t Vp, size_t valid, size_t v0)
{
#pragma omp parallel for schedule(static) if (N * Vp > SMALL)
    for (size_t n = 0; n < N; n++) {
        const act *z = logits + n * Vp;
        const size_t target = (size_t)targets[n] - v0; /* a token below v0: a huge number */
        const real top = max[n];
        double total = 0;
#pragma omp simd reduction(+ : total)
        for (size_t v = 0; v < valid; v++) total += (double)exponential(z[v] - top);
        sum[n] = (real)total;
        target_logit[n] = target < valid ? z[target] - top : 0;
    }
}

static void cross_entropy_loss(real *loss, const real *sum, const real *target_logit, size_t N)
{
    for (size_t n = 0; n < N; n++) loss[n] = (real)(log((double)sum[n]) - (double)target_logit[n]);
}

static void cross_entropy_backward(act *logits, const real *max, const real *sum,
                                   const int *targets, const real *weight, real scale, size_t N,
                                   size_t Vp, size_t valid, size_t v0)
{
#pragma omp parallel for schedule(static) if (N * Vp > SMALL)
    for (size_t n = 0; n < N; n++) {
        act *z = logits + n * Vp;
        const size_t target = (size_t)targets[n] - v0;
        const real top = max[n], w = weight[n] * scale, w_over_sum = w / sum[n];
#pragma omp simd
        for (size_t v = 0; v < valid; v++) z[v] = exponential(z[v] - top) * w_over_sum;
        for (size_t v = valid; v < Vp; v++) z[v] = 0;
        if (target < valid) z[target] -= w;
    }
}

/* ---- The optimiser [§4.2] -------------------------------------------------------------------- */

static void adamw(act *w, real *master, real *m, real *v, const act *g, size_t n, AdamW h)
{
    const real lr = (real)h.lr, decay = (real)h.decay, eps = (real)h.eps;
    const real grad_scale = (real)h.grad_scale;
    const real b1 = (real)h.beta1, r1 = (real)(1 - h.beta1);
    const real b2 = (real)h.beta2, r2 = (real)(1 - h.beta2);
    const real c1 = (real)(1 / (1 - pow(h.beta1, (double)h.step)));
    const real c2 = (real)(1 / (1 - pow(h.beta2, (double)h.step)));
    real *p = master ? master : w;
#pragma omp parallel for simd schedule(static) if (n > SMALL)
    for (size_t i = 0; i < n; i++) {
        const real gi = g[i] * grad_scale;
        m[i] = b1 * m[i] + r1 * gi;
        v[i] = b2 * v[i] + r2 * gi * gi;
        p[i] -= lr * (m[i] * c1 / (square_root(v[i] * c2) + eps) + decay * p[i]);
        w[i] = p[i];
    }
}

/* In a fixed number of parts, however many threads there are: so the order of the sum is fixed. */
static double sum_squares(const act *x, size_t n)
{
    enum { PARTS = 64 };
    double part[PARTS], total = 0;
#pragma omp parallel for schedule(static) if (n > SMALL)
    for (size_t r = 0; r < PARTS; r++) {
        const size_t begin = n / PARTS * r + min_size(r, n % PARTS);
        const size_t end = n / PARTS * (r + 1) + min_size(r + 1, n % PARTS);
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t i = begin; i < end; i++) sum += (double)x[i] * (double)x[i];
        part[r] = sum;
    }
    for (size_t r = 0; r < PARTS; r++) total += part[r];
    return total;
}

#endif /* OTHER_OPERATORS */

/* =================================================================================================
 * Chapter 5. Parameters, and what a checkpoint holds [§4.2, §5.1, Tables 1 and 2]
 * =================================================================================================
 *
 * One table, `specs`, says for each tensor of the model what its name and shape are, how tensor
 * ranks share it, and how it starts. Arenas, slices, initialisation, weight decay, the global norm,
 * checkpoints and convert.c follow this table.
 *
 * A checkpoint is a folder. config.json has the shape; model.safetensors the weights;
 * trainer.safetensors AdamW's two moments of each weight, and where the run stands: steps, updates,
 * samples, loss scale, options. The tokenizer's files lie beside them. Tensors are whole, in float,
 * under Hugging Face's names, and nothing in them depends on the ranks that wrote them: each rank
 * finds its slices by whole_row() and whole_col() below. So a run can go on in any other layout. No
 * state of generators is stored: masks follow from seed and step, the order of samples from seed
 * and sample number. Chapter 14 has the code. */

/* ---- Shapes ---------------------------------------------------------------------------------- */

typedef struct {
    const char *name, *what;
    size_t L, C, H, P, V;
} Preset;

/* The paper pads its vocabulary to 51,200 in its GPT-2 experiments [§5.1]. In its presets all
 * 51,200 are tokens here: the 943 of the padding take part in the softmax. 124M, 774M and 1558M are
 * OpenAI's GPT-2. */
/* clang-format off */
static const Preset presets[] = {
    {"tiny", "the demo: text as bytes", 4, 128, 4, 64, 257},
    {"124M", "GPT-2", 12, 768, 12, 1024, 50257},
    {"355M", "Table 2", 24, 1024, 16, 1024, 51200},
    {"774M", "GPT-2", 36, 1280, 20, 1024, 50257},
    {"1558M", "GPT-2", 48, 1600, 25, 1024, 50257},
    {"1.2B", "Table 1", 40, 1536, 16, 1024, 51200},
    {"2.5B", "Tables 1 and 2", 54, 1920, 20, 1024, 51200},
    {"4.2B", "Table 1", 64, 2304, 24, 1024, 51200},
    {"8.3B", "Table 2", 72, 3072, 24, 1024, 51200},
    {"8.3B-scaling", "Table 1", 72, 3072, 32, 1024, 51200},
};
/* clang-format on */
enum { N_PRESETS = sizeof presets / sizeof *presets };

/* A model of this shape with the paper's other choices [§4.2, P41]. */
static Config make_config(size_t L, size_t C, size_t H, size_t P, size_t V)
{
    const real dropout = (real)0.1;
    Config c = {L, C, H, 4 * C, P, V, GELU_TANH, (real)1e-5, dropout, dropout, dropout};
    return c;
}

static Config find_preset(const char *name)
{
    char known[256] = "";
    for (int i = 0; i < N_PRESETS; i++) {
        const Preset *p = &presets[i];
        if (!strcmp(p->name, name)) return make_config(p->L, p->C, p->H, p->P, p->V);
        snprintf(known + strlen(known), sizeof known - strlen(known), " %s", p->name);
    }
    die("--config %s is not known; there are:%s", name, known);
}

/* The vocabulary is padded to a multiple of 128 t: all tensor ranks hold equally many tokens, in
 * products of a size that suits GPUs [§5.1, P14]. */
static size_t padded_vocab(size_t V, int tp) { return round_up(V, 128 * (size_t)tp); }

/* Dies unless the model can be cut this way. */
static void check_layout(const Config *c, Layout s)
{
    if (s.tp < 1 || s.pp < 1 || s.dp < 1)
        die("--tp %d --pp %d --dp %d: each must be at least 1", s.tp, s.pp, s.dp);
    if (s.tp > MAX_RANKS || s.pp > MAX_RANKS || s.dp > MAX_RANKS || world_size(s) > MAX_RANKS)
        die("--tp %d --pp %d --dp %d: at most %d ranks are possible", s.tp, s.pp, s.dp, MAX_RANKS);
    if (c->H % s.tp)
        die("--tp %d does not divide %zu heads: choose a divisor, since each rank owns whole heads",
            s.tp, c->H);
    if (c->F % s.tp) die("--tp %d does not divide the MLP width %zu: choose a divisor", s.tp, c->F);
    if (c->L % s.pp)
        die("--pp %d does not divide %zu layers: choose a divisor, since stages are equally deep",
            s.pp, c->L);
}

/* ---- The table of tensors -------------------------------------------------------------------- */

/* How a tensor is divided between tensor ranks [§3]. Weights are [out, in], the paper's matrices
 * transposed: the paper's columns are rows here. */
typedef enum {
    WHOLE,           /* every rank has all of it */
    COLUMN_PARALLEL, /* rank r has the r-th part of the rows: outputs, or the vocabulary's tokens */
    QKV,             /* the same for Q, K and V separately: [Q_r; K_r; V_r], in whole heads [P11] */
    ROW_PARALLEL     /* rank r has the r-th part of the columns: inputs */
} Split;

typedef enum { ONE, DIM_C, DIM_3C, DIM_F, DIM_P, DIM_V } Dim;

typedef enum { INIT_ZERO, INIT_ONE, INIT_NORMAL, INIT_SCALED } Init;

/* The order of `specs` is that of safetensors files. convert.c relies on it, too: two embeddings,
 * then pairs of weight and bias. */
typedef struct {
    const char *name; /* Hugging Face's, without "transformer." before it; %zu is the layer */
    size_t field;     /* where its pointer is in Layer, or in Params if not in_layer */
    int in_layer;
    Dim rows, cols; /* [out, in] */
    Split split;
    Init init;
    int decay;  /* weight decay: matrices and embeddings; not biases, not LayerNorm [P31] */
    int conv1d; /* Hugging Face stores it transposed, [in, out], after OpenAI's Conv1D */
} Spec;

/* clang-format off */
#define TOP(field) offsetof(Params, field), 0
#define LAYER(field) offsetof(Layer, field), 1
static const Spec specs[] = {
    /* name                      field          rows    cols   split            init decay conv1d */
    {"wte.weight",               TOP(wte),      DIM_V,  DIM_C, COLUMN_PARALLEL, INIT_NORMAL, 1, 0},
    {"wpe.weight",               TOP(wpe),      DIM_P,  DIM_C, WHOLE,           INIT_NORMAL, 1, 0},
    {"h.%zu.ln_1.weight",        LAYER(ln1_g),  DIM_C,  ONE,   WHOLE,           INIT_ONE,    0, 0},
    {"h.%zu.ln_1.bias",          LAYER(ln1_b),  DIM_C,  ONE,   WHOLE,           INIT_ZERO,   0, 0},
    {"h.%zu.attn.c_attn.weight", LAYER(qkv_w),  DIM_3C, DIM_C, QKV,             INIT_NORMAL, 1, 1},
    {"h.%zu.attn.c_attn.bias",   LAYER(qkv_b),  DIM_3C, ONE,   QKV,             INIT_ZERO,   0, 0},
    {"h.%zu.attn.c_proj.weight", LAYER(proj_w), DIM_C,  DIM_C, ROW_PARALLEL,    INIT_SCALED, 1, 1},
    {"h.%zu.attn.c_proj.bias",   LAYER(proj_b), DIM_C,  ONE,   WHOLE,           INIT_ZERO,   0, 0},
    {"h.%zu.ln_2.weight",        LAYER(ln2_g),  DIM_C,  ONE,   WHOLE,           INIT_ONE,    0, 0},
    {"h.%zu.ln_2.bias",          LAYER(ln2_b),  DIM_C,  ONE,   WHOLE,           INIT_ZERO,   0, 0},
    {"h.%zu.mlp.c_fc.weight",    LAYER(fc_w),   DIM_F,  DIM_C, COLUMN_PARALLEL, INIT_NORMAL, 1, 1},
    {"h.%zu.mlp.c_fc.bias",      LAYER(fc_b),   DIM_F,  ONE,   COLUMN_PARALLEL, INIT_ZERO,   0, 0},
    {"h.%zu.mlp.c_proj.weight",  LAYER(out_w),  DIM_C,  DIM_F, ROW_PARALLEL,    INIT_SCALED, 1, 1},
    {"h.%zu.mlp.c_proj.bias",    LAYER(out_b),  DIM_C,  ONE,   WHOLE,           INIT_ZERO,   0, 0},
    {"ln_f.weight",              TOP(lnf_g),    DIM_C,  ONE,   WHOLE,           INIT_ONE,    0, 0},
    {"ln_f.bias",                TOP(lnf_b),    DIM_C,  ONE,   WHOLE,           INIT_ZERO,   0, 0},
};
#undef TOP
#undef LAYER
/* clang-format on */
enum { N_SPECS = sizeof specs / sizeof *specs, NAME_SIZE = 64 };

static size_t dim_size(const Config *c, Dim dim)
{
    switch (dim) {
    case DIM_C: return c->C;
    case DIM_3C: return 3 * c->C;
    case DIM_F: return c->F;
    case DIM_P: return c->P;
    case DIM_V: return c->V;
    default: return 1;
    }
}

/* Parameters of the whole model, without padding: 12 L C^2 (1 + 13/(12C) + (V+P)/(12 L C)) + 2C
 * [P42, P43]. */
static size_t count_parameters(const Config *c)
{
    size_t total = 0;
    for (int i = 0; i < N_SPECS; i++) {
        const Spec *s = &specs[i];
        total += dim_size(c, s->rows) * dim_size(c, s->cols) * (s->in_layer ? c->L : 1);
    }
    return total;
}

/* ---- A rank's slices ------------------------------------------------------------------------- */

/* One tensor, as one rank holds it. */
struct Tensor {
    const Spec *spec;
    size_t layer;                  /* its number in the whole model */
    size_t rows, cols;             /* of the whole tensor, [out, in]; wte without padding */
    size_t local_rows, local_cols; /* of this rank's slice; wte with padding */
    size_t offset, n;              /* place of the slice in the arenas, and its size; elements */
    int counted;                   /* 1 on one rank of each data replica: what several ranks hold
                                      counts once in a sum over all ranks [P27] */
};

/* The row of the whole tensor that is local row i of tensor rank r's slice. */
static size_t whole_row(const Tensor *t, int r, size_t i)
{
    const size_t rows = t->local_rows, third = rows / 3; /* QKV: rows of Q_r, of K_r, of V_r */
    if (t->spec->split == COLUMN_PARALLEL) return (size_t)r * rows + i;
    if (t->spec->split == QKV) return i / third * (t->rows / 3) + (size_t)r * third + i % third;
    return i;
}

/* The column of the whole tensor that is the slice's first. */
static size_t whole_col(const Tensor *t, int r)
{
    return t->spec->split == ROW_PARALLEL ? (size_t)r * t->local_cols : 0;
}

/* Local rows that are no padding of the vocabulary. The padding stays zero for ever. */
static size_t unpadded_rows(const Tensor *t, int r)
{
    if (t->spec->rows != DIM_V) return t->local_rows;
    const size_t first = (size_t)r * t->local_rows;
    return first >= t->rows ? 0 : min_size(t->local_rows, t->rows - first);
}

/* The name, with the layer filled in. */
static char *tensor_name(char name[NAME_SIZE], const Tensor *t)
{
    if (t->spec->in_layer) snprintf(name, NAME_SIZE, t->spec->name, t->layer);
    else snprintf(name, NAME_SIZE, "%s", t->spec->name);
    return name;
}

/* Does this stage hold the tensor? The first stage has both embeddings, the last one the final
 * LayerNorm and a copy of the word embedding, for the logits. */
static int on_stage(const Spec *spec, int stage, int stages)
{
    const int first = stage == 0, last = stage == stages - 1;
    if (spec->in_layer) return 1;
    if (spec->field == offsetof(Params, wte)) return first || last;
    return spec->field == offsetof(Params, wpe) ? first : last;
}

/* The slice that this rank holds of one tensor: its sizes, and its place in the arena, from *offset
 * on. whole_row() and whole_col() say which part of the whole tensor it is. */
static Tensor make_tensor(size_t *offset, const Config *c, const Spec *spec, size_t layer, Layout s,
                          int rank)
{
    const int is_wte = !spec->in_layer && spec->field == offsetof(Params, wte);
    const int copied = is_wte && pp_rank(s, rank) > 0; /* the last stage's copy */
    Tensor t = {spec, layer, dim_size(c, spec->rows), dim_size(c, spec->cols), 0, 0, 0, 0, 0};
    t.local_rows = spec->rows == DIM_V ? padded_vocab(t.rows, s.tp) : t.rows;
    t.local_cols = t.cols;
    if (spec->split == COLUMN_PARALLEL || spec->split == QKV) t.local_rows /= (size_t)s.tp;
    if (spec->split == ROW_PARALLEL) t.local_cols /= (size_t)s.tp;
    t.n = t.local_rows * t.local_cols;
    t.offset = *offset;
    t.counted = !copied && (spec->split != WHOLE || tp_rank(s, rank) == 0);
    *offset += round_up(t.n, 64); /* every tensor starts on a cache line, whatever its type */
    return t;
}

/* Lists the tensors of one rank, in the order of the table, layer by layer. list NULL: they are
 * only counted. Returns their number; *elements, unless NULL, is the size of an arena for them. */
static size_t list_tensors(Tensor *list, size_t *elements, const Config *c, Layout s, int rank)
{
    const int stage = pp_rank(s, rank);
    const size_t depth = c->L / (size_t)s.pp, first = (size_t)stage * depth;
    size_t n = 0, offset = 0;
    for (int i = 0, end; i < N_SPECS; i = end) {
        const size_t repeats = specs[i].in_layer ? depth : 1;
        end = i + 1; /* a layer's specs are neighbours, and repeat together */
        while (specs[i].in_layer && end < N_SPECS && specs[end].in_layer) end++;
        for (size_t l = 0; l < repeats; l++)
            for (int j = i; j < end; j++) {
                if (!on_stage(&specs[j], stage, s.pp)) continue;
                const size_t layer = specs[j].in_layer ? first + l : 0;
                const Tensor t = make_tensor(&offset, c, &specs[j], layer, s, rank);
                if (list) list[n] = t;
                n++;
            }
    }
    if (elements) *elements = offset;
    return n;
}

/* Points the fields of p into an arena at base; Spec.field says where in its struct a tensor's
 * pointer is. first_layer is the number of p->layer[0] in the model. */
static void place_params(Params *p, act *base, const Tensor *list, size_t n, size_t first_layer)
{
    for (size_t i = 0; i < n; i++) {
        const Tensor *t = &list[i];
        char *owner = t->spec->in_layer ? (char *)&p->layer[t->layer - first_layer] : (char *)p;
        *(act **)(void *)(owner + t->spec->field) = base + t->offset;
    }
}

/* ---- Initialisation [§4.2] ------------------------------------------------------------------- */

/* out[i] = normal variate number first + i of a stream, i < n, by Box and Muller: four words give
 * four variates. */
static void random_normals(real *out, uint64_t seed, uint32_t site, size_t first, size_t n)
{
    double z[4];
    for (size_t i = first; i < first + n; i++) {
        if (i == first || i % 4 == 0) {
            uint32_t word[4];
            philox(word, seed, i / 4, site, 0);
            for (int pair = 0; pair < 4; pair += 2) {
                const double r = sqrt(-2 * log(uniform(word[pair])));
                const double angle = 2 * M_PI * uniform(word[pair + 1]);
                z[pair] = r * cos(angle);
                z[pair + 1] = r * sin(angle);
            }
        }
        out[i - first] = (real)z[i % 4];
    }
}

/* The slice's part of a row of initial weights: cols elements, the first of which is element
 * `first` of the whole tensor. */
static void init_row(real *x, Init init, double std, uint64_t seed, uint32_t site, size_t first,
                     size_t cols)
{
    if (init == INIT_NORMAL || init == INIT_SCALED) {
        random_normals(x, seed, site, first, cols);
        for (size_t col = 0; col < cols; col++) x[col] = (real)std * x[col];
    } else {
        for (size_t col = 0; col < cols; col++) x[col] = init == INIT_ONE;
    }
}

/* Draws the initial weights of tensor rank r: N(0, 0.02), those of a branch's last matrix scaled by
 * 1/sqrt(2L); biases 0, LayerNorm 1 and 0 [§4.2, P40]. An element's value depends on the tensor and
 * the element's place in the whole of it, so every layout draws the same model [P13].
 * DEVIATION: for that Megatron draws the whole matrix on every rank, and keeps a slice. */
static void init_params(act *base, const Tensor *list, size_t n, const Config *c, uint64_t seed,
                        int r)
{
    for (size_t i = 0; i < n; i++) {
        const Tensor *t = &list[i];
        const size_t number = t->layer * N_SPECS + (size_t)(t->spec - specs);
        const uint32_t site = SITE_INIT + (uint32_t)number;
        const double std = t->spec->init == INIT_SCALED ? 0.02 / sqrt(2.0 * (double)c->L) : 0.02;
        const size_t cols = t->local_cols, rows = unpadded_rows(t, r), at_once = 1024;
        real *block = (real *)xcalloc(min_size(rows, at_once) * cols, sizeof *block);
        for (size_t row0 = 0; row0 < rows; row0 += at_once) { /* padding stays zero */
            const size_t count = min_size(at_once, rows - row0);
#pragma omp parallel for
            for (size_t row = 0; row < count; row++) {
                const size_t first = whole_row(t, r, row0 + row) * t->cols + whole_col(t, r);
                init_row(block + row * cols, t->spec->init, std, seed, site, first, cols);
            }
            act_upload(base + t->offset + row0 * cols, block, count * cols);
        }
        free(block);
    }
}

/* =================================================================================================
 * Chapter 6. Optimisation [§4.2]
 * =================================================================================================
 *
 * One step: gradients of all micro-batches, their sum over the data replicas, the global norm,
 * clipping, AdamW. train_step(), at the end, has the order. */

typedef enum { DECAY_PAPER, DECAY_MEGATRON, DECAY_COSINE } Decay;

typedef struct {
    double lr, min_lr;
    size_t warmup, decay_steps;
    Decay decay; /* of the learning rate */
    double beta1, beta2, eps, weight_decay;
    double clip;       /* largest norm of the gradient; 0: any */
    double loss_scale; /* fixed; 0: dynamic */
} Optimizer;

/* Learning rate of update n, counted from 0: lr * n / warmup, then a cosine down to min_lr. With a
 * warm-up the first update has rate 0, as in Megatron, and changes no weight [P33]. Three
 * readings of "cosine":
 *
 *     paper      lr (cos(pi (n - warmup) / (end - warmup)) + 1) / 2, never below min_lr [P35]
 *     megatron   code V: the period is `end`, so min_lr comes later [P34]
 *     cosine     from lr down to min_lr itself: Megatron today, and most others */
static double learning_rate(const Optimizer *o, size_t n)
{
    const double w = (double)o->warmup, end = (double)o->decay_steps, i = (double)n;
    if (n <= o->warmup && o->warmup > 0) return o->lr * i / w;
    if (o->decay == DECAY_MEGATRON)
        return fmax(o->lr / 2 * (cos(M_PI * (fmin(i, end - w) - w) / end) + 1), o->min_lr);
    const double fall = end > w ? (cos(M_PI * (fmin(i, end) - w) / (end - w)) + 1) / 2 : 1;
    if (o->decay == DECAY_PAPER) return fmax(o->lr * fall, o->min_lr);
    return o->min_lr + (o->lr - o->min_lr) * fall;
}

/* Dynamic loss scaling keeps fp16 gradients from underflow: the loss is multiplied by the largest
 * factor that does not overflow. 1000 steps without an overflow double it. The second overflow
 * after that halves it (hysteresis), and each further one [P36-P38]. */
typedef struct {
    double scale;
    int dynamic, hysteresis;
    long long iteration, last_overflow; /* -1: none; the first doubling is at iteration 999 */
} LossScaler;

enum { SCALE_WINDOW = 1000, HYSTERESIS = 2 };

static LossScaler make_loss_scaler(double fixed) /* 0: dynamic */
{
    LossScaler s = {fixed > 0 ? fixed : 0x1p32, fixed <= 0, HYSTERESIS, 0, -1};
    return s;
}

static void loss_scaler_update(LossScaler *s, int overflow)
{
    if (s->dynamic && overflow) {
        if (s->hysteresis == 1) s->scale = fmax(s->scale / 2, 1);
        else s->hysteresis--;
        s->last_overflow = s->iteration;
    } else if (s->dynamic && (s->iteration - s->last_overflow) % SCALE_WINDOW == 0) {
        s->scale *= 2;
        s->hysteresis = HYSTERESIS;
    }
    s->iteration++;
}

/* Where a run stands: what resuming needs beside weights and moments. */
typedef struct {
    size_t step;    /* steps done, skipped ones included; dropout's masks follow from it */
    size_t updates; /* steps that changed the weights: the clock of AdamW and learning rate [P39] */
    size_t samples; /* sequences consumed */
    LossScaler scaler;
} Progress;

/* Sums what is still partial. The word embedding is used twice, for tokens on the first stage and
 * for logits on the last one: both gradients are added. Then come the data replicas, which had
 * other sequences [§2.3]. Within a tensor group nothing is summed: there the gradients of
 * replicated parameters are equal already (see chapter 3). */
static void reduce_gradients(Rank *k)
{
    if (k->first_stage || k->last_stage) {
        set_place(k, "tied embedding", "[beyond the paper]", -1);
        all_reduce(&k->embedding, k->g.wte, k->Vp * k->config.C, ACT, SUM);
    }
    set_place(k, "data parallel", "[§2.3]", -1);
    all_reduce(&k->dp, k->gradients, k->elements, ACT, SUM);
}

/* 2-norm of the whole model's gradient, equal on all ranks. Every distinct element must count once
 * [P27]: slices on each tensor rank, replicated tensors on the first one, the last stage's copy of
 * the word embedding not at all (Tensor.counted). Data replicas hold equal gradients by now, so
 * only the first one counts. The norm is infinite or NaN if any element is. */
static double gradient_norm(Rank *k)
{
    double sum = 0;
    set_place(k, "gradient norm", "[§4.2]", -1);
    for (size_t i = 0, end; i < k->tensors; i = end) {
        const Tensor *t = &k->tensor[i];
        size_t n = 0; /* t and its neighbours, at once: there are only zeros between them */
        for (end = i; end < k->tensors && k->tensor[end].counted == t->counted; end++)
            n = k->tensor[end].offset + k->tensor[end].n - t->offset;
        if (t->counted && k->dp.rank == 0) sum += sum_squares(k->gradients + t->offset, n);
    }
    all_reduce(&k->world, &sum, 1, DOUBLE_ARRAY, SUM);
    return sqrt(sum);
}

/* Each rank updates its own slices, and its own copy of what is replicated; nothing is sent [§3].
 * Decay is decoupled from the gradient; biases and LayerNorm have none [P31, P32]. */
static void update_weights(Rank *k, const Optimizer *o, size_t update, double gradient_scale)
{
    AdamW h = {learning_rate(o, update), o->beta1, o->beta2, o->eps, 0, gradient_scale, update + 1};
    for (size_t i = 0; i < k->tensors; i++) {
        const Tensor *t = &k->tensor[i];
        const size_t at = t->offset;
        h.decay = t->spec->decay ? o->weight_decay : 0;
        adamw(k->weights + at, k->master ? k->master + at : NULL, k->m + at, k->v + at,
              k->gradients + at, t->n, h);
    }
}

/* Where a step's micro-batches come from: fills tokens, targets, weight and sequence of mb, number
 * i of the step on this rank. Training has one feed (chapter 7), `trace` and tests have others. */
typedef void (*Feed)(void *source, Rank *k, MicroBatch *mb, size_t i);

/* Chapter 8: forward and backward pass of m micro-batches through all stages. Returns the sum of
 * this rank's losses. */
static double pipeline_step(Rank *k, size_t m, Feed feed, void *source, real scale);

typedef struct {
    double loss, lr, grad_norm, loss_scale;
    int skipped; /* an overflow: the weights did not change */
} StepResult;

/* One training step, in the order of Megatron's code (code A, pretrain_gpt2.py and fp16.py). The
 * gradient is clipped by the factor min(1, clip / (norm + 1e-6)) [P28]. DEVIATION: the loss is the
 * mean over all targets of the global batch, and so is its gradient: each target has the share
 * 1/targets, on whichever replica it is [P29, P30]. Megatron takes the mean on each replica and
 * divides gradients by d before their sum. Overflows are seen in the norm; Megatron reduces a
 * separate flag. */
static StepResult train_step(Rank *k, const Optimizer *o, Progress *p, size_t micro_batches,
                             Feed feed, void *source)
{
    StepResult r;
    const size_t sequences = k->B * micro_batches * (size_t)k->dp.size;
    const double targets = (double)(sequences * k->T);
    k->step = (uint32_t)p->step;
    r.loss_scale = p->scaler.scale;
    r.lr = learning_rate(o, p->updates);

    device_zero(k->gradients, k->elements * sizeof(act));
    const real scale = (real)(r.loss_scale / targets);
    r.loss = pipeline_step(k, micro_batches, feed, source, scale) / targets;
    reduce_gradients(k);
    r.grad_norm = gradient_norm(k) / r.loss_scale;
    r.skipped = !isfinite(r.grad_norm); /* all ranks have the same norm, so all skip [P39] */
    set_place(k, "logged loss", "[§4.2]", -1);
    all_reduce(&k->world, &r.loss, 1, DOUBLE_ARRAY, SUM);

    const double clip = o->clip > 0 ? fmin(o->clip / (r.grad_norm + 1e-6), 1) : 1;
    loss_scaler_update(&p->scaler, r.skipped);
    if (!r.skipped) {
        update_weights(k, o, p->updates, clip / r.loss_scale);
        p->updates++;
    }
    p->step++;
    p->samples += sequences;
    return r;
}

/* =================================================================================================
 * Chapter 7. Data and the training loop [§4.1]
 * =================================================================================================
 *
 * Documents are joined into one stream of tokens, with <|endoftext|> after each. The stream is
 * cut into samples of T inputs; the labels are the same tokens shifted by one [code V
 * data/gpt2_dataset.py]. Each data replica takes its part of every batch; all tensor ranks of a
 * replica read the same. */

/* ---- Documents and samples ------------------------------------------------------------------- */

/* The tokens of a document. Where it does not end with <|endoftext|>, document_token() adds one. */
typedef struct {
    const char *data;      /* uint16_t or int32_t, little-endian */
    size_t width;          /* bytes of a token in data: 2 or 4 */
    size_t stored, length; /* tokens in data; tokens with the <|endoftext|> that is added */
} Document;

static int document_token(const Document *d, size_t i, int end_of_text)
{
    if (i >= d->stored) return end_of_text;
    return d->width == 2 ? ((const uint16_t *)d->data)[i] : ((const int32_t *)d->data)[i];
}

typedef struct Storage Storage; /* chapter 15: what documents point into */

/* Everything that --data names; chapter 15 reads it. */
typedef struct {
    Document *document; /* all that are not empty, in the order of the paths */
    Storage *storage;
    size_t documents, document_capacity, stores, storage_capacity;
    size_t tokens;     /* in all documents */
    size_t vocabulary; /* every token is below it */
    int end_of_text;   /* -1: documents follow each other unmarked */
} Corpus;

/* The training part of a corpus, or the held-out part. */
typedef struct {
    Document *document; /* [documents] */
    size_t documents, tokens, T;
    size_t samples; /* in an epoch */
    uint64_t seed;
    int end_of_text;
    pthread_mutex_t lock; /* protects what follows: an epoch's order, made from (seed, epoch) */
    size_t epoch;         /* SIZE_MAX: none yet */
    size_t *order;        /* [documents] shuffled */
    size_t *start;        /* [documents + 1] where each of them begins in the stream */
    size_t *sample;       /* [samples] shuffled */
} Dataset;

/* The last valid_percent (0..100) of the tokens are held out. held_out 1: the dataset is this part;
 * 0: it is all before it. */
static Dataset *dataset_open(const Corpus *c, double valid_percent, int held_out, size_t T,
                             uint64_t seed)
{
    Dataset *d = (Dataset *)xcalloc(1, sizeof(Dataset));
    const size_t part = (size_t)((double)c->tokens * valid_percent / 100);
    const size_t cut = c->tokens - min_size(part, c->tokens);
    const size_t first = held_out ? cut : 0, last = held_out ? c->tokens : cut;

    d->tokens = last - first;
    d->T = T;
    d->seed = seed;
    d->end_of_text = c->end_of_text;
    if (d->tokens < T + 1)
        die("the %s text has %zu tokens, but a sample of %zu needs %zu: give more text, a smaller "
            "--seq, or a %s --valid-percent",
            held_out ? "held-out" : "training", d->tokens, T, T + 1,
            held_out ? "larger" : "smaller");
    d->samples = (d->tokens - 1) / T;
    d->document = (Document *)xcalloc(c->documents, sizeof(Document));
    for (size_t i = 0, at = 0; i < c->documents; i++) {
        Document doc = c->document[i];
        const size_t begin = max_size(first, at), end = min_size(last, at + doc.length);
        const size_t skip = begin - at; /* tokens of the document that come before this part */
        at += doc.length;
        if (begin >= end) continue;
        doc.data += skip * doc.width;
        doc.stored -= skip; /* may be larger than length now: later tokens are never read */
        doc.length = end - begin;
        d->document[d->documents] = doc;
        d->documents++;
    }
    d->epoch = SIZE_MAX;
    d->order = (size_t *)xcalloc(d->documents, sizeof(size_t));
    d->start = (size_t *)xcalloc(d->documents + 1, sizeof(size_t));
    d->sample = (size_t *)xcalloc(d->samples, sizeof(size_t));
    pthread_mutex_init(&d->lock, NULL);
    return d;
}

static void dataset_close(Dataset *d)
{
    pthread_mutex_destroy(&d->lock);
    free(d->order);
    free(d->start);
    free(d->sample);
    free(d->document);
    free(d);
}

/* x = a permutation of 0..n-1 (Fisher and Yates).
 * DEVIATION: Megatron shuffles with NumPy's RandomState [code V]. */
static void shuffle(size_t *x, size_t n, uint64_t seed, uint32_t site, uint32_t epoch)
{
    for (size_t i = 0; i < n; i++) x[i] = i;
    for (size_t i = n; i > 1; i--) {
        uint32_t word[4];
        philox(word, seed, i, site, epoch);
        const size_t j = ((uint64_t)word[0] << 32 | word[1]) % i, swap = x[j];
        x[j] = x[i - 1];
        x[i - 1] = swap;
    }
}

/* The documents in a shuffled order form the stream; its pieces are shuffled, too. */
static void start_epoch(Dataset *d, size_t epoch)
{
    shuffle(d->order, d->documents, d->seed, SITE_SHUFFLE_DOCUMENTS, (uint32_t)epoch);
    shuffle(d->sample, d->samples, d->seed, SITE_SHUFFLE_SAMPLES, (uint32_t)epoch);
    for (size_t i = 0; i < d->documents; i++)
        d->start[i + 1] = d->start[i] + d->document[d->order[i]].length;
    d->epoch = epoch;
}

/* tokens (T + 1) of sample n of a whole run: T inputs and one label more, which is the first input
 * of the next piece. One epoch follows another without end, so n is all that a resumed run needs.
 * Ranks may call this at the same time. */
static void dataset_sample(Dataset *d, size_t n, int *tokens)
{
    size_t low = 0, high = d->documents; /* the first document is in [low, high) */
    pthread_mutex_lock(&d->lock);
    if (d->epoch != n / d->samples) start_epoch(d, n / d->samples);

    size_t at = d->sample[n % d->samples] * d->T;
    const size_t stop = at + d->T + 1;
    while (high - low > 1) {
        const size_t middle = (low + high) / 2;
        if (d->start[middle] <= at) low = middle;
        else high = middle;
    }
    for (; at < stop; low++) {
        const Document *doc = &d->document[d->order[low]];
        for (; at < stop && at < d->start[low + 1]; at++)
            *tokens++ = document_token(doc, at - d->start[low], d->end_of_text);
    }
    pthread_mutex_unlock(&d->lock);
}

/* ---- The feed -------------------------------------------------------------------------------- */

/* Gives a rank its tokens. Row b of the micro-batch predicts tokens[1..T] from tokens[0..T-1].
 * tokens (B,T+1), weight (B,T), all on the host; weight NULL: all ones. */
static void set_tokens(Rank *k, MicroBatch *mb, const int *tokens, const real *weight)
{
    const size_t N = k->B * k->T;
    int *ids = k->host_ids;
    for (size_t n = 0; n < N; n++) {
        const size_t at = n / k->T * (k->T + 1) + n % k->T;
        ids[n] = tokens[at];
        ids[N + n] = tokens[at + 1];
        k->host[n] = weight ? weight[n] : 1;
    }
    device_upload(mb->tokens, ids, N * sizeof *ids);
    device_upload(mb->targets, ids + N, N * sizeof *ids);
    device_upload(mb->weight, k->host, N * sizeof *k->host);
}

/* What feed_samples() reads from. */
typedef struct {
    Dataset *data;
    const Progress *progress;
    size_t micro_batches;
    int *tokens; /* (B,T+1) */
} Samples;

/* Data replica r takes the r-th contiguous part of the global batch.
 * DEVIATION: every rank reads its samples from the shared memory. In Megatron the first tensor rank
 * reads them and broadcasts. */
static void feed_samples(void *source, Rank *k, MicroBatch *mb, size_t i)
{
    const Samples *s = (const Samples *)source;
    mb->sequence = ((size_t)k->dp.rank * s->micro_batches + i) * k->B;
    for (size_t b = 0; b < k->B; b++) {
        const size_t sample = s->progress->samples + mb->sequence + b;
        dataset_sample(s->data, sample, s->tokens + b * (k->T + 1));
    }
    set_tokens(k, mb, s->tokens, NULL);
}

/* ---- The training loop ----------------------------------------------------------------------- */

/* What a run asks of its ranks. */
typedef struct {
    Config config;
    Layout layout;
    size_t micro_batch;   /* sequences in a micro-batch */
    size_t micro_batches; /* of a step, on one data replica */
    size_t seq;           /* tokens in a sequence */
    int training;         /* with gradients and moments, and dropout */
    int recompute;
    uint64_t seed;
} RankOptions;

/* Chapter 8. */
static Rank *rank_create(Comm *world, const RankOptions *o);
static void init_rank(Rank *k); /* new weights */
static void rank_free(Rank *k);
static void stage_forward(Rank *k, MicroBatch *mb);
static double sum_losses(const Rank *k, const MicroBatch *mb);

/* Mean loss over the held-out samples [Fig. 6]. batches 0: each sample once; else only the first
 * `batches` micro-batches of each data replica. All ranks call it between steps, when no
 * micro-batch is in flight; dropout is off. */
static double held_out_loss(Rank *k, Dataset *held_out, size_t batches)
{
    MicroBatch *mb = &k->flight[0];
    const size_t B = k->B, T = k->T, together = B * (size_t)k->dp.size;
    size_t samples = held_out->samples;
    if (batches) samples = min_size(samples, batches * together);
    int *tokens = (int *)xcalloc(B * (T + 1), sizeof *tokens);
    real *weight = (real *)xcalloc(B * T, sizeof *weight);
    double sum = 0;
    const int training = k->training;
    k->training = 0;
    for (size_t first = 0; first < samples; first += together) {
        for (size_t b = 0; b < B; b++) {
            const size_t i = first + (size_t)k->dp.rank * B + b;
            dataset_sample(held_out, min_size(i, samples - 1), tokens + b * (T + 1));
            for (size_t t = 0; t < T; t++) weight[b * T + t] = i < samples;
        }
        set_tokens(k, mb, tokens, weight);
        stage_forward(k, mb);
        sum += sum_losses(k, mb);
    }
    k->training = training;
    set_place(k, "validation loss", "[§5.2]", -1);
    all_reduce(&k->world, &sum, 1, DOUBLE_ARRAY, SUM);
    free(tokens);
    free(weight);
    return sum / (double)(samples * T);
}

typedef struct Report Report; /* chapter 17 */

/* What all ranks of a training run share. */
typedef struct {
    RankOptions ranks;
    Optimizer optimizer;
    Progress progress; /* where to begin; at the end, where it stands */
    size_t steps;
    size_t save_every;                  /* steps between saves; 0: at the end only */
    size_t eval_every;                  /* steps between held-out losses; 0: never */
    size_t eval_iters;                  /* batches of each of them; 0: all */
    Dataset *data, *held_out;           /* held_out NULL: there is none */
    const Safetensors *model, *trainer; /* to start from; NULL: new weights, zero moments */
    Report *report;
} Run;

/* Chapter 14: fills a rank's weights and, unless trainer is NULL, its moments. */
static void load_rank(Rank *k, const Safetensors *model, const Safetensors *trainer);

/* Chapter 17: the log, the progress, the loss curve; checkpoints; Ctrl-C. */
static void report_start(const Run *run);
static void report_step(const Run *run, const Progress *p, const StepResult *r, double held_out);
static void report_end(const Run *run);
static void save_run(const Run *run, Rank *k, const Progress *p); /* all ranks call it */
static int is_interrupted(Rank *k);                               /* on any rank; all call it */

enum { DIVERGED = 10 }; /* skipped steps in a row, at the smallest loss scale */

/* One rank's training run. */
static void train_rank(Comm *world, void *arg)
{
    Run *run = (Run *)arg;
    Rank *k = rank_create(world, &run->ranks);
    Progress p = run->progress;
    Samples samples = {run->data, &p, run->ranks.micro_batches, NULL};
    int skipped_in_a_row = 0, stop = 0;

    samples.tokens = (int *)xcalloc(k->B * (k->T + 1), sizeof(int));
    if (run->model) load_rank(k, run->model, run->trainer);
    else init_rank(k);

    if (is_writer(world)) report_start(run);
    while (p.step < run->steps && !stop) {
        double held_out = NAN;
        const StepResult r =
            train_step(k, &run->optimizer, &p, run->ranks.micro_batches, feed_samples, &samples);
        const int last = p.step == run->steps;
        const int at_smallest_scale = !p.scaler.dynamic || p.scaler.scale <= 1;
        skipped_in_a_row = r.skipped && at_smallest_scale ? skipped_in_a_row + 1 : 0;
        if (skipped_in_a_row == DIVERGED)
            die("step %zu: loss or gradient has not been finite for %d steps: the run has "
                "diverged; try a smaller --lr",
                p.step, DIVERGED);
        stop = is_interrupted(k);
        if (run->held_out && run->eval_every && (last || p.step % run->eval_every == 0))
            held_out = held_out_loss(k, run->held_out, run->eval_iters);
        if (is_writer(world)) report_step(run, &p, &r, held_out);
        if (stop || last || (run->save_every && p.step % run->save_every == 0))
            save_run(run, k, &p);
    }
    if (is_writer(world)) {
        report_end(run);
        run->progress = p;
    }
    free(samples.tokens);
    rank_free(k);
}

/* =================================================================================================
 * Chapter 8. Stages, recomputation [§4.2], 1F1B (beyond the paper: arXiv 2104.04473 §2.2)
 * =================================================================================================
 *
 * How a micro-batch goes through a stage, forward and backward; in which order the micro-batches of
 * a step do so (1F1B: one forward, one backward); and what a rank keeps in memory for that. */

/* ---- One micro-batch through one stage ------------------------------------------------------- */

/* Reads the tokens (first stage), or receives the output of the previous stage. Sends its own
 * output to the next stage, or makes the losses (last stage). */
static void stage_forward(Rank *k, MicroBatch *mb)
{
    const size_t n = k->B * k->T * k->config.C;
    set_place(k, "pipeline", "[beyond the paper]", -1);
    if (k->first_stage) embedding_forward(k, mb->layer[0].x, mb);
    else recv(&k->pp, mb->layer[0].x, n, ACT, k->pp.rank - 1);

    for (size_t l = 0; l < k->depth; l++) block_forward(k, l, mb);

    if (k->last_stage) {
        logits_forward(k, mb, mb->layer[k->depth].x, k->B * k->T);
        cross_entropy_forward(k, mb);
    } else {
        set_place(k, "pipeline", "[beyond the paper]", -1);
        send(&k->pp, mb->layer[k->depth].x, n, ACT, k->pp.rank + 1);
    }
}

/* The way back. scale is loss_scale / targets: the gradient of the step's scaled loss with respect
 * to one target's loss. Recomputation [§4.2] keeps only the input x of each layer, and runs the
 * layer's whole forward pass again just before its backward pass, as Megatron does: the same code,
 * with the same masks, so gradients are equal bit for bit [P26]. It costs one more forward pass,
 * and its messages [P6]. */
static void stage_backward(Rank *k, MicroBatch *mb, real scale)
{
    const size_t n = k->B * k->T * k->config.C;
    set_place(k, "pipeline", "[beyond the paper]", -1);
    if (k->last_stage) logits_backward(k, mb, mb->layer[k->depth].x, scale);
    else recv(&k->pp, k->dx, n, ACT, k->pp.rank + 1);

    for (size_t l = k->depth; l-- > 0;) {
        if (k->recompute) block_forward(k, l, mb);
        block_backward(k, l, mb);
    }

    if (k->first_stage) embedding_backward(k, mb);
    else {
        set_place(k, "pipeline", "[beyond the paper]", -1);
        send(&k->pp, k->dx, n, ACT, k->pp.rank - 1);
    }
}

/* Sum over this rank's targets of weight * loss, in double. Tensor ranks hold equal copies of the
 * losses, so only the first one counts them; stages before the last have none. A loss of weight 0
 * may be NaN, and is not looked at. */
static double sum_losses(const Rank *k, const MicroBatch *mb)
{
    const size_t N = k->B * k->T;
    real *loss = k->host, *weight = k->host + N;
    double sum = 0;
    if (!k->last_stage || k->tp.rank > 0) return 0;
    device_download(loss, mb->loss, N * sizeof *loss);
    device_download(weight, mb->weight, N * sizeof *weight);
    for (size_t n = 0; n < N; n++) sum += weight[n] == 0 ? 0 : (double)loss[n] * weight[n];
    return sum;
}

/* ---- 1F1B ------------------------------------------------------------------------------------ */

/* Stage i of p (from 0) has at most p - i micro-batches in flight: forward done, backward still to
 * come [P57]. */
static int most_in_flight(const Rank *k, size_t micro_batches)
{
    const int stage = pp_rank(k->layout, k->world.world_rank);
    return (int)min_size((size_t)(k->layout.pp - stage), micro_batches);
}

/* A step's m micro-batches on stage i: p - i - 1 forward passes to warm up, then one forward, one
 * backward, in turns, then the backward passes that are left. Stages idle for (p-1)/m of the ideal
 * time, as in GPipe, where all forward passes come first; but there m micro-batches are in flight,
 * and here p - i [P56, P57; doc/pipeline.md draws it]. After the warm-up each forward pass is
 * followed by the backward pass of the micro-batch p - i - 1 earlier. So slots of k->flight can be
 * reused in turn: the micro-batch p - i earlier has finished its backward pass.
 *
 * A stage receives, works and sends; recv waits for the other stage, and nothing else needs to keep
 * the order. send waits only while the message before it is still in the mailbox; doc/pipeline.md
 * shows that the stages cannot all wait for each other. Returns the sum of this rank's weighted
 * losses. */
static double pipeline_step(Rank *k, size_t m, Feed feed, void *source, real scale)
{
    const size_t warmup = min_size((size_t)(k->pp.size - k->pp.rank - 1), m);
    const size_t slots = (size_t)k->in_flight;
    size_t started = 0, finished = 0;
    double loss = 0;
    while (finished < m) {
        if (started < m) {
            MicroBatch *mb = &k->flight[started % slots];
            feed(source, k, mb, started);
            started++;
            stage_forward(k, mb);
            loss += sum_losses(k, mb);
            const int in_flight = (int)(started - finished);
            if (in_flight > k->peak_in_flight) k->peak_in_flight = in_flight;
        }
        if (started > warmup || started == m) {
            stage_backward(k, &k->flight[finished % slots], scale);
            finished++;
        }
    }
    return loss;
}

/* ---- What a rank keeps ----------------------------------------------------------------------- */

/* Fills in what follows from the shape of the model, the layout and the rank's number. */
static void shape_rank(Rank *k, const Config *c, Layout s, int rank, size_t B, size_t T,
                       int recompute)
{
    const size_t t = (size_t)s.tp, stage = (size_t)pp_rank(s, rank);
    k->config = *c;
    k->layout = s;
    k->B = B;
    k->T = T;
    k->recompute = recompute;
    k->D = c->C / c->H;
    k->Hp = c->H / t;
    k->Cp = c->C / t;
    k->Fp = c->F / t;
    k->Vp = padded_vocab(c->V, s.tp) / t;
    k->v0 = (size_t)tp_rank(s, rank) * k->Vp;
    k->valid = k->v0 >= c->V ? 0 : min_size(k->Vp, c->V - k->v0);
    k->depth = c->L / (size_t)s.pp;
    k->first_layer = stage * k->depth;
    k->first_stage = stage == 0;
    k->last_stage = stage == (size_t)s.pp - 1;
}

static act *carve_acts(Arena *arena, size_t n) { return (act *)carve(arena, n, sizeof(act)); }
static real *carve_reals(Arena *arena, size_t n) { return (real *)carve(arena, n, sizeof(real)); }

static void carve_saved(Saved *a, const Rank *k, Arena *arena)
{
    const size_t N = k->B * k->T, C = k->config.C;
    a->ln1 = carve_acts(arena, N * C);
    a->qkv = carve_acts(arena, N * 3 * k->Cp);
    a->att = carve_acts(arena, N * k->Cp);
    a->res = carve_acts(arena, N * C);
    a->ln2 = carve_acts(arena, N * C);
    a->pre = carve_acts(arena, N * k->Fp);
    a->gelu = carve_acts(arena, N * k->Fp);
    a->mean1 = carve_reals(arena, N);
    a->rstd1 = carve_reals(arena, N);
    a->mean2 = carve_reals(arena, N);
    a->rstd2 = carve_reals(arena, N);
    a->lse = carve_reals(arena, N * k->Hp);
}

/* The activations of all micro-batches in flight. With recomputation each layer keeps its input,
 * and all layers share the rest. flight has k->in_flight entries of depth + 1 layers. Without
 * gradients (inference) there is only what the forward pass writes. */
static void carve_activations(Rank *k, MicroBatch *flight, Arena *arena, int gradients)
{
    const size_t N = k->B * k->T, C = k->config.C;
    Saved shared;
    if (k->recompute) carve_saved(&shared, k, arena);
    for (int i = 0; i < k->in_flight; i++) {
        MicroBatch *mb = &flight[i];
        mb->tokens = (int *)carve(arena, N, sizeof(int));
        mb->targets = (int *)carve(arena, N, sizeof(int));
        mb->weight = carve_reals(arena, N);
        for (size_t l = 0; l <= k->depth; l++) {
            Saved *a = &mb->layer[l];
            if (l < k->depth && k->recompute) *a = shared;
            else if (l < k->depth) carve_saved(a, k, arena);
            a->x = carve_acts(arena, N * C);
        }
        if (!k->last_stage) continue;
        mb->lnf = carve_acts(arena, N * C);
        mb->logits = carve_acts(arena, N * k->Vp);
        mb->meanf = carve_reals(arena, N);
        mb->rstdf = carve_reals(arena, N);
        mb->max = carve_reals(arena, N);
        mb->sum = carve_reals(arena, N);
        mb->target_logit = carve_reals(arena, N);
        mb->loss = carve_reals(arena, N);
    }
    if (!gradients) return;
    k->dx = carve_acts(arena, N * C);
    k->dy = carve_acts(arena, N * C);
    k->dpre = carve_acts(arena, N * k->Fp);
    k->dqkv = carve_acts(arena, N * 3 * k->Cp);
    k->datt = carve_acts(arena, N * k->Cp);
    k->delta = carve_reals(arena, N * k->Hp);
}

static MicroBatch *flight_create(const Rank *k)
{
    MicroBatch *flight = (MicroBatch *)xcalloc((size_t)k->in_flight, sizeof *flight);
    for (int i = 0; i < k->in_flight; i++)
        flight[i].layer = (Saved *)xcalloc(k->depth + 1, sizeof(Saved));
    return flight;
}

static void flight_free(const Rank *k, MicroBatch *flight)
{
    for (int i = 0; i < k->in_flight; i++) free(flight[i].layer);
    free(flight);
}

/* Bytes of one rank's activations. `plan` prints them, and rank_create() allocates exactly as many.
 * Not counted are small things: working space of the operators, mailboxes, a micro-batch's tokens
 * on the host. */
static size_t activation_bytes(const Config *c, Layout s, int rank, size_t B, size_t T,
                               int recompute, size_t micro_batches)
{
    Rank k;
    Arena measure = {NULL, 0};
    memset(&k, 0, sizeof k);
    shape_rank(&k, c, s, rank, B, T, recompute);
    k.world.world_rank = rank;
    k.in_flight = most_in_flight(&k, micro_batches);
    MicroBatch *flight = flight_create(&k);
    carve_activations(&k, flight, &measure, 1);
    flight_free(&k, flight);
    return measure.used;
}

/* The rank's groups. */
static void join_groups(Rank *k, Comm *world, Layout s)
{
    const int rank = world->rank;
    k->world = *world;
    k->tp = comm_split(world, tp_color(s, rank), "tp");
    k->pp = comm_split(world, pp_color(s, rank), "pp");
    k->dp = comm_split(world, dp_color(s, rank), "dp");
    k->embedding = comm_split(world, embedding_color(s, rank), "embedding");
    Comm *groups[] = {&k->world, &k->tp, &k->pp, &k->dp, &k->embedding};
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) groups[i]->place = &k->place;
    set_place(k, "-", "", -1);
}

/* Arenas of weights, gradients and moments. */
static void create_params(Rank *k, int training)
{
    k->tensors = list_tensors(NULL, &k->elements, &k->config, k->layout, k->world.rank);
    k->tensor = (Tensor *)xcalloc(k->tensors, sizeof *k->tensor);
    list_tensors(k->tensor, NULL, &k->config, k->layout, k->world.rank);
    k->w.layer = (Layer *)xcalloc(k->depth, sizeof(Layer));
    k->weights = (act *)device_calloc(k->elements * sizeof(act));
    place_params(&k->w, k->weights, k->tensor, k->tensors, k->first_layer);
    if (!training) return;
    k->g.layer = (Layer *)xcalloc(k->depth, sizeof(Layer));
    k->gradients = (act *)device_calloc(k->elements * sizeof(act));
    place_params(&k->g, k->gradients, k->tensor, k->tensors, k->first_layer);
    k->m = (real *)device_calloc(k->elements * sizeof(real));
    k->v = (real *)device_calloc(k->elements * sizeof(real));
    if (sizeof(act) < sizeof(real)) k->master = (real *)device_calloc(k->elements * sizeof(real));
}

/* A rank with all its memory; its weights are zero (see init_rank, load_rank). All ranks of the
 * world call it. In inference layers share their activations as in recomputation, though nothing is
 * computed again. */
static Rank *rank_create(Comm *world, const RankOptions *o)
{
    Rank *k = (Rank *)xcalloc(1, sizeof *k);
    Arena measure = {NULL, 0}, arena = {NULL, 0};
    shape_rank(k, &o->config, o->layout, world->rank, o->micro_batch, o->seq,
               o->recompute || !o->training);
    k->seed = o->seed;
    k->training = o->training;
    join_groups(k, world, o->layout);
    create_params(k, o->training);

    k->in_flight = o->training ? most_in_flight(k, o->micro_batches) : 1;
    k->flight = flight_create(k);
    carve_activations(k, k->flight, &measure, o->training);
    arena.base = (char *)device_calloc(measure.used);
    k->activations = arena.base;
    carve_activations(k, k->flight, &arena, o->training);
    k->host = (real *)xcalloc(2 * k->B * k->T, sizeof *k->host);
    k->host_ids = (int *)xcalloc(2 * k->B * k->T, sizeof *k->host_ids);
    return k;
}

/* New weights. Where act is narrower, the float weights begin as copies of the narrower ones, as in
 * Megatron (code A fp16.py). */
static void init_rank(Rank *k)
{
    init_params(k->weights, k->tensor, k->tensors, &k->config, k->seed, k->tp.rank);
    if (!k->master) return;
    for (size_t i = 0; i < k->tensors; i++) {
        const Tensor *t = &k->tensor[i];
        real *slice = (real *)xcalloc(t->n, sizeof *slice);
        act_download(slice, k->weights + t->offset, t->n);
        device_upload(k->master + t->offset, slice, t->n * sizeof *slice);
        free(slice);
    }
}

/* All ranks of the world call it. */
static void rank_free(Rank *k)
{
    Comm *groups[] = {&k->tp, &k->pp, &k->dp, &k->embedding};
    void *arenas[] = {k->weights, k->gradients, k->m, k->v, k->master, k->activations};
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++) comm_free(groups[i]);
    for (size_t i = 0; i < sizeof arenas / sizeof *arenas; i++) device_free(arenas[i]);
    flight_free(k, k->flight);
    free(k->w.layer);
    free(k->g.layer);
    free(k->tensor);
    free(k->host);
    free(k->host_ids);
    free(k);
}

/* =================================================================================================
 * Chapter 9. Evaluation [§5.2, App. E]
 * =================================================================================================
 *
 * The paper's two tests, without training on them: perplexity on WikiText-103,
 *
 *     PPL = exp(-1/T_o * sum over t of log P(t | 0:t-1))                                  [eq.4]
 *
 * over all tokens t of the model, but with T_o, the number of original tokens; and LAMBADA's
 * accuracy, the share of texts whose last word the model predicts. */

/* ---- WikiText-103 [App. E; code V tasks/zeroshot_gpt2] --------------------------------------- */

/* T_o, the number of original tokens: len(text.strip().split(" ")) [P51]. */
static size_t wikitext_original_tokens(const char *text, size_t n)
{
    size_t count = 1;
    text = strip(text, &n);
    for (size_t i = 0; i < n; i++) count += text[i] == ' ';
    return count;
}

/* replace_all() and strip_inside() work in place, from left to right, and return the new length,
 * which is not larger. */
static size_t replace_all(char *text, size_t n, const char *from, const char *to)
{
    const size_t from_length = strlen(from), to_length = strlen(to);
    size_t out = 0, i = 0;
    while (i < n)
        if (text[i] == from[0] && n - i >= from_length && !memcmp(text + i, from, from_length)) {
            memcpy(text + out, to, to_length);
            out += to_length;
            i += from_length;
        } else {
            text[out] = text[i];
            out++;
            i++;
        }
    return out;
}

/* "( a )" -> "(a)": from each opening sign to the next closing one, as Python's
 * re.sub(r"\(\s*([^\)]*?)\s*\)", r"(\1)", text). */
static size_t strip_inside(char *text, size_t n, char opening, char closing)
{
    size_t out = 0, i = 0;
    for (;;) {
        const char *begin = (const char *)memchr(text + i, opening, n - i);
        const size_t inside_at = begin ? (size_t)(begin + 1 - text) : n;
        const char *end = (const char *)memchr(text + inside_at, closing, n - inside_at);
        if (!begin || !end) break;
        size_t length = (size_t)(end - begin - 1);
        const char *inside = strip(begin + 1, &length);
        memmove(text + out, text + i, inside_at - i);
        out += inside_at - i;
        memmove(text + out, inside, length);
        out += length;
        text[out] = closing;
        out++;
        i = (size_t)(end + 1 - text);
    }
    memmove(text + out, text + i, n - i);
    return out + n - i;
}

/* WikiText's tokens back into text, in place; returns the new length. The order of the rules
 * matters, because a rule sees what earlier ones left. A rule of two single signs strips white
 * space inside of them. (Megatron's second rule, /' [0-9]/, never matches because of its slashes,
 * and is left out.) */
static size_t wikitext_detokenise(char *text, size_t n)
{
    /* clang-format off */
    static const char *const rules[][2] = {
        {"s '", "s'"}, {" @-@ ", "-"}, {" @,@ ", ","}, {" @.@ ", "."},
        {" : ", ": "}, {" ; ", "; "}, {" . ", ". "}, {" ! ", "! "}, {" ? ", "? "}, {" , ", ", "},
        {"(", ")"}, {"[", "]"}, {"{", "}"}, {"\"", "\""}, {"'", "'"},
        {"= = = =", "===="}, {"= = =", "==="}, {"= =", "=="},
        {" \xC2\xB0 ", "\xC2\xB0"}, /* the sign of degrees */
        {" \n", "\n"}, {"\n ", "\n"}, {" N ", " 1 "}, {" 's", "'s"},
    };
    /* clang-format on */
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) {
        const char *from = rules[i][0], *to = rules[i][1];
        if (!from[1]) n = strip_inside(text, n, from[0], to[0]);
        else n = replace_all(text, n, from, to);
    }
    return n;
}

/* A text that is longer than the model's context is scored in windows of T tokens. Window i begins
 * at token overlap * i (the paper's o = 32). Window 0 scores all its targets; a later one its last
 * `overlap` only, each of which has at least T - overlap tokens before it. So each target is scored
 * once. The count is Megatron's: it assumes that window 0 scores only `overlap` targets, so the
 * last windows score nothing [P52]. 0 < overlap <= T. */
static size_t window_count(size_t targets, size_t overlap)
{
    return targets ? (targets - 1) / overlap + 1 : 1;
}

/* tokens (T + 1), weight (T) of window i of a text of n tokens: target t is tokens[t + 1], and
 * counts weight[t]. After the text comes pad. */
static void window_fill(int *tokens, real *weight, const int *text, size_t n, size_t i, size_t T,
                        size_t overlap, int pad)
{
    const size_t start = i * overlap, left = start < n ? n - start : 0;
    for (size_t t = 0; t <= T; t++) tokens[t] = t < left ? text[start + t] : pad;
    for (size_t t = 0; t < T; t++) weight[t] = t + 1 < left && (i == 0 || t >= T - overlap);
}

typedef struct {
    double loss; /* mean over the targets, nats */
    size_t targets;
} Score;

/* Mean loss of a text in its first `limit` windows [App. E]. Needs pp = dp = 1; all ranks call
 * it. */
static Score text_loss(Rank *k, const Tokens *text, size_t overlap, size_t limit, int pad,
                       Meter *meter)
{
    MicroBatch *mb = &k->flight[0];
    const size_t B = k->B, T = k->T;
    const size_t windows = min_size(window_count(text->n - 1, overlap), limit);
    int *tokens = (int *)xcalloc(B * (T + 1), sizeof *tokens);
    real *weight = (real *)xcalloc(B * T, sizeof *weight);
    double sum = 0;
    Score score = {0, 0};
    for (size_t first = 0; first < windows; first += B) {
        size_t scored = 0;
        for (size_t b = 0; b < B; b++) {
            real *w = weight + b * T;
            if (first + b < windows)
                window_fill(tokens + b * (T + 1), w, text->id, text->n, first + b, T, overlap, pad);
            else memset(w, 0, T * sizeof *w); /* the last batch is not full */
            for (size_t t = 0; t < T; t++) scored += w[t] != 0;
        }
        if (scored) {
            set_tokens(k, mb, tokens, weight);
            stage_forward(k, mb);
            sum += sum_losses(k, mb);
        }
        score.targets += scored;
        score.loss = sum / (double)max_size(score.targets, 1);
        if (meter && is_writer(&k->world))
            meter_show(meter, min_size(first + B, windows), "loss", score.loss);
    }
    free(tokens);
    free(weight);
    all_reduce(&k->tp, &sum, 1, DOUBLE_ARRAY, SUM); /* sum_losses() is 0 except on the first rank */
    score.loss = sum / (double)max_size(score.targets, 1);
    return score;
}

/* exp(loss) [App. E eq.4], with Megatron's cap on the exponent. */
static double perplexity(double loss) { return exp(fmin(loss, 20)); }

/* The exponent of [App. E eq.4]: the sum of all losses divided by T_o in the paper, by T_o - 1 in
 * Megatron's code and here [P53]. */
static double adjusted_loss(double loss, size_t targets, size_t original_tokens)
{
    return loss * (double)targets / (double)max_size(original_tokens - 1, 1);
}

/* ---- LAMBADA [§5.2; code V, --strict-lambada] ------------------------------------------------ */

/* The last word of a text is to be predicted from the text before it. It counts as right if each of
 * its tokens is the most probable one, given the true tokens before it. */
typedef struct {
    size_t first, context, label; /* tokens[first ..]: those of the context, then of the word */
} LambadaExample;

typedef struct {
    Tokens tokens;
    LambadaExample *example; /* [n] */
    size_t n, capacity;
} Lambada;

/* Adds a text of n bytes. Context and " word" are encoded one by one. `what` names the text in
 * messages. */
static void lambada_add(Lambada *l, const Tokenizer *t, const char *text, size_t n,
                        const char *what)
{
    LambadaExample e = {l->tokens.n, 0, 0};
    text = strip(text, &n);
    size_t word = n, context;
    while (word > 0 && !space_before(text, word)) word--;
    context = word;
    strip(text, &context);
    if (!context)
        die("%s: the text needs two words at least: the last is predicted from those before it",
            what);
    char *label = (char *)xcalloc(n - word + 1, 1);
    label[0] = ' ';
    memcpy(label + 1, text + word, n - word);
    encode(&l->tokens, t, text, context);
    e.context = l->tokens.n - e.first;
    encode(&l->tokens, t, label, n - word + 1);
    e.label = l->tokens.n - e.first - e.context;
    free(label);
    l->example = (LambadaExample *)grow(l->example, l->n, &l->capacity, sizeof(LambadaExample));
    l->example[l->n] = e;
    l->n++;
}

/* tokens (T + 1), weight (T) of example i, as in window_fill(). If it is longer than T + 1 tokens,
 * its last T + 1 tokens are used. */
static void lambada_fill(int *tokens, real *weight, const Lambada *l, size_t i, size_t T, int pad)
{
    const LambadaExample e = l->example[i];
    const size_t n = e.context + e.label, cut = n > T + 1 ? n - (T + 1) : 0;
    for (size_t t = 0; t <= T; t++) tokens[t] = cut + t < n ? l->tokens.id[e.first + cut + t] : pad;
    for (size_t t = 0; t < T; t++) weight[t] = cut + t + 1 >= e.context && cut + t + 1 < n;
}

/* id[i] = the most probable token after row row[i] of the micro-batch, i < n. Each tensor rank
 * finds the best of its own tokens, and all compare. Of equal ones the first counts, as in argmax.
 * Needs pp = dp = 1; all ranks call it. */
static void most_probable(Rank *k, const MicroBatch *mb, const size_t *row, size_t n, int *id)
{
    const size_t Vp = k->Vp, t = (size_t)k->tp.size;
    real *logits = (real *)xcalloc(Vp, sizeof *logits);
    double *mine = (double *)xcalloc(2 * n, sizeof *mine); /* [n] logit, token */
    double *all = (double *)xcalloc(2 * n * t, sizeof *all);
    for (size_t i = 0; i < n; i++) {
        double *best = &mine[2 * i];
        act_download(logits, mb->logits + row[i] * Vp, Vp);
        best[0] = -INFINITY;
        for (size_t v = 0; v < k->valid; v++)
            if (logits[v] > best[0]) {
                best[0] = logits[v];
                best[1] = (double)(k->v0 + v);
            }
    }
    all_gather(&k->tp, all, mine, 2 * n, DOUBLE_ARRAY);
    for (size_t i = 0; i < n; i++) {
        const double *best = &all[2 * i];
        for (size_t r = 1; r < t; r++)
            if (all[2 * (r * n + i)] > best[0]) best = &all[2 * (r * n + i)];
        id[i] = (int)best[1];
    }
    free(logits);
    free(mine);
    free(all);
}

typedef struct {
    size_t examples;
    size_t correct;      /* all tokens of the last word right */
    size_t last_correct; /* its last token right [P55] */
} Accuracy;

/* Of the first `limit` examples. Needs pp = dp = 1; all ranks call it. */
static Accuracy lambada_accuracy(Rank *k, const Lambada *l, size_t limit, int pad, Meter *meter)
{
    MicroBatch *mb = &k->flight[0];
    const size_t B = k->B, T = k->T, examples = min_size(l->n, limit);
    int *tokens = (int *)xcalloc(B * (T + 1), sizeof *tokens);
    int *best = (int *)xcalloc(B * T, sizeof *best);
    real *weight = (real *)xcalloc(B * T, sizeof *weight);
    size_t *row = (size_t *)xcalloc(B * T, sizeof *row); /* rows that predict a token of a word */
    Accuracy a = {0, 0, 0};
    for (size_t first = 0; first < examples; first += B) {
        size_t longest = 1, n = 0;
        for (size_t b = 0; b < B && first + b < examples; b++) {
            const LambadaExample e = l->example[first + b];
            longest = max_size(longest, e.context + e.label - 1);
        }
        k->T = min_size(longest, T); /* no more padding than this batch needs */
        memset(weight, 0, B * T * sizeof *weight);
        for (size_t b = 0; b < B; b++) { /* the last batch is filled up with copies */
            const size_t i = min_size(first + b, examples - 1);
            lambada_fill(tokens + b * (k->T + 1), weight + b * k->T, l, i, k->T, pad);
        }
        set_tokens(k, mb, tokens, weight);
        stage_forward(k, mb);
        for (size_t i = 0; i < B * k->T; i++)
            if (weight[i] != 0) {
                row[n] = i;
                n++;
            }
        most_probable(k, mb, row, n, best);
        int right = 1; /* all tokens of the word so far */
        for (size_t i = 0; i < n; i++) {
            const size_t b = row[i] / k->T;
            const int last = i + 1 == n || row[i + 1] / k->T != b;
            const int hit = best[i] == tokens[b * (k->T + 1) + row[i] % k->T + 1];
            if (first + b >= examples) break; /* a copy */
            right = right && hit;
            if (!last) continue;
            a.examples++;
            a.correct += (size_t)right;
            a.last_correct += (size_t)hit;
            right = 1;
        }
        k->T = T;
        if (meter && is_writer(&k->world))
            meter_show(meter, min_size(first + B, examples), "accuracy",
                       (double)a.correct / (double)a.examples);
    }
    free(tokens);
    free(best);
    free(weight);
    free(row);
    return a;
}

/* =================================================================================================
 * Chapter 10. Generation [App. C]
 * =================================================================================================
 *
 * A text grows token by token: each is drawn from the softmax of the logits after the last one. */

/* ---- Sampling -------------------------------------------------------------------------------- */

typedef struct {
    double temperature; /* 0: always the most probable token */
    size_t top_k;       /* draw from the top_k most probable tokens; 0: from all */
    double top_p;       /* draw from the fewest most probable tokens whose sum is top_p; 1: all */
    uint64_t seed;
} Sampler;

typedef struct {
    double p;
    int id;
} Candidate;

/* More probable; of equals, the earlier token. */
static int better(Candidate a, Candidate b) { return a.p > b.p || (a.p == b.p && a.id < b.id); }

/* Restores the heap (no child is better than its parent) below place i. */
static void sift_down(Candidate *heap, size_t n, size_t i)
{
    for (size_t child = 2 * i + 1; child < n; child = 2 * i + 1) {
        if (child + 1 < n && better(heap[child + 1], heap[child])) child++;
        if (!better(heap[child], heap[i])) return;
        const Candidate swap = heap[i];
        heap[i] = heap[child];
        heap[child] = swap;
        i = child;
    }
}

/* Moves the best tokens of heap (V) to its end, the very best last: as many as top-k and top-p
 * allow, and one at least. Returns how many; *mass is the sum of their p. Only these get sorted. */
static size_t keep_best(Candidate *heap, size_t V, const Sampler *s, double total, double *mass)
{
    size_t kept = 0;
    *mass = 0;
    for (size_t i = V / 2; i-- > 0;) sift_down(heap, V, i);
    while (kept < V) {
        const int more = (s->top_k == 0 || kept < s->top_k) && *mass < s->top_p * total;
        if (kept > 0 && !more) break;
        const size_t left = V - kept - 1;
        const Candidate top = heap[0];
        heap[0] = heap[left];
        sift_down(heap, left, 0);
        heap[left] = top;
        *mass += top.p;
        kept++;
    }
    return kept;
}

/* The next token from its logits z (V): softmax(z / temperature), cut by top-k and top-p. Token
 * number `index` of a text draws its own random number, whatever came before. heap: (V) working
 * space. */
static int sample_token(const real *z, size_t V, const Sampler *s, size_t index, Candidate *heap)
{
    size_t best = 0, kept = V;
    double total = 0, u = uniform(random_word(s->seed, SITE_SAMPLE, 0, index));
    for (size_t i = 0; i < V; i++) best = z[i] > z[best] ? i : best;
    if (s->temperature == 0) return (int)best;
    for (size_t i = 0; i < V; i++) {
        heap[i].p = exp(((double)z[i] - z[best]) / s->temperature);
        heap[i].id = (int)i;
        total += heap[i].p;
    }
    double mass = total;
    if ((s->top_k > 0 && s->top_k < V) || s->top_p < 1) kept = keep_best(heap, V, s, total, &mass);
    for (size_t i = V - kept; i < V; i++) {
        u -= heap[i].p / mass;
        if (u < 0) return heap[i].id;
    }
    return heap[V - 1].id; /* the sum was a little less than 1 by rounding */
}

/* ---- A text, token by token ------------------------------------------------------------------ */

typedef struct {
    Rank *k;
    Cache cache;
    act *slices;     /* (t,Vp) all tensor ranks' logits of one row */
    real *logits;    /* (t*Vp) the same on the host; the first V are no padding */
    Candidate *heap; /* (V) */
} Generator;

/* For a rank with B = 1: keys and values of up to T positions. */
static Generator *generator_create(Rank *k)
{
    Generator *g = (Generator *)xcalloc(1, sizeof *g);
    const size_t all = (size_t)k->tp.size * k->Vp;
    g->k = k;
    g->cache.keys = (act **)xcalloc(k->depth, sizeof(act *));
    g->cache.values = (act **)xcalloc(k->depth, sizeof(act *));
    for (size_t l = 0; l < k->depth; l++) {
        g->cache.keys[l] = (act *)device_calloc(k->T * k->Cp * sizeof(act));
        g->cache.values[l] = (act *)device_calloc(k->T * k->Cp * sizeof(act));
    }
    g->slices = (act *)device_calloc(all * sizeof(act));
    g->logits = (real *)xcalloc(all, sizeof(real));
    g->heap = (Candidate *)xcalloc(k->config.V, sizeof(Candidate));
    k->cache = &g->cache;
    return g;
}

static void generator_free(Generator *g)
{
    for (size_t l = 0; l < g->k->depth; l++) {
        device_free(g->cache.keys[l]);
        device_free(g->cache.values[l]);
    }
    g->k->cache = NULL;
    device_free(g->slices);
    free(g->cache.keys);
    free(g->cache.values);
    free(g->logits);
    free(g->heap);
    free(g);
}

/* Reads n more tokens, at positions past .. past+n-1, and leaves the logits of the token that
 * follows in g->logits, on all tensor ranks. Their keys and values join the cache, so nothing is
 * computed twice. */
static void generator_read(Generator *g, const int *tokens, size_t n)
{
    Rank *k = g->k;
    MicroBatch *mb = &k->flight[0];
    const size_t T = k->T, C = k->config.C;
    k->T = n;
    device_upload(mb->tokens, tokens, n * sizeof *tokens);
    embedding_forward(k, mb->layer[0].x, mb);
    for (size_t l = 0; l < k->depth; l++) block_forward(k, l, mb);
    logits_forward(k, mb, mb->layer[k->depth].x + (n - 1) * C, 1);
    all_gather(&k->tp, g->slices, mb->logits, k->Vp, ACT);
    act_download(g->logits, g->slices, (size_t)k->tp.size * k->Vp);
    g->cache.past += n;
    k->T = T;
}

/* Appends up to `count` tokens to text, which is not empty, and calls emit for each. It ends early
 * at end_of_text, which is appended but not emitted. Needs pp = dp = 1; all ranks call it, and get
 * the same tokens. The prompt is read at once, then one token at a time. There is room for k->T
 * positions: of a longer prompt the last ones are read. When all are full, the last (k->T + 1) / 2
 * tokens are read again from position 0, because keys and values in the cache belong to their
 * positions. */
static void generate(Generator *g, Tokens *text, size_t count, const Sampler *s, int end_of_text,
                     void (*emit)(void *arg, int id), void *arg)
{
    const size_t room = g->k->T, stop = text->n + count;
    size_t unread = min_size(text->n, room);
    g->cache.past = 0;
    while (text->n < stop) {
        if (g->cache.past + unread > room) {
            g->cache.past = 0;
            unread = (room + 1) / 2;
        }
        generator_read(g, text->id + text->n - unread, unread);
        double next = sample_token(g->logits, g->k->config.V, s, text->n, g->heap);
        broadcast(&g->k->tp, &next, 1, DOUBLE_ARRAY, 0); /* all drew the same; to be sure */
        push_token(text, (int)next);
        if ((int)next == end_of_text) return;
        if (emit) emit(arg, (int)next);
        unread = 1;
    }
}

/* =================================================================================================
 *
 * PART II. THE MACHINE
 *
 * ============================================================================================== */

/* =================================================================================================
 * Chapter 11. Products, vector loops, memory
 * ============================================================================================== */

/* ---- Cores and threads ----------------------------------------------------------------------- */

/* Cores that this process may use. */
static int cores(void)
{
    long n = sysconf(_SC_NPROCESSORS_ONLN);
#ifdef __linux__
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set)) n = CPU_COUNT(&set);
#endif
    return n > 0 ? (int)n : 1;
}

/* Threads that a parallel loop of this rank gets. */
static int openmp_threads(void)
{
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

/* ---- Vector loops ---------------------------------------------------------------------------- */

/* e^x in a form that compilers vectorise: e^x = 2^n e^r, with n = round(x / ln 2), |r| <= ln(2)/2,
 * and a polynomial for e^r. Error: at most 1.02 ulp [doc/accuracy.md]. Below -86.5 (e^x < 2^-124)
 * it is 0, above 88.72283, where floats end, infinity; NaN stays NaN. Adding 1.5 * 2^23 leaves n in
 * the low bits of the sum. 2^(n-1) times the doubled polynomial reaches the largest floats, where
 * 2^n itself would overflow. */
static inline HOST_DEVICE real exponential(real x)
{
    if (sizeof x != sizeof(float)) return (real)exp(x);
    float f = (float)x, shifted = f * 1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f, scale;
    float r = f - n * 0.693359375f; /* ln 2 in two parts; n times the first is exact */
    r = r + n * 2.12194440e-4f;
    float q = 0.001381446547f;
    q = q * r + 0.008368780424f;
    q = q * r + 0.04166839425f;
    q = q * r + 0.1666652011f;
    q = q * r + 0.4999999341f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits + 126) << 23;
    memcpy(&scale, &bits, 4);
    float y = (1 + (r + r * r * q)) * 2 * scale;
    if (f > 89) y = INFINITY;
    return f < -86.5f ? 0 : y;
}

#ifndef OTHER_OPERATORS

/* NaNs are passed over. Lane by lane, since not every compiler reorders a maximum. */
static real largest(const real *x, size_t n, real top)
{
    enum { SIDE = 32 };
    real side[SIDE];
    for (size_t j = 0; j < SIDE; j++) side[j] = top;
    for (; n >= SIDE; n -= SIDE, x += SIDE)
#pragma omp simd
        for (size_t j = 0; j < SIDE; j++) side[j] = x[j] > side[j] ? x[j] : side[j];
    for (size_t j = 0; j < n; j++) side[j] = x[j] > side[j] ? x[j] : side[j];
    for (size_t j = 0; j < SIDE; j++) top = side[j] > top ? side[j] : top;
    return top;
}

/* out (n) = 0 or 1/(1-p), for elements index .. index+n-1 of a tensor. It is philox() on SIDE
 * blocks at once, round by round, so that it vectorises. Without dropout no words are drawn. */
static inline void dropout_factors(real *out, Dropout d, size_t index, size_t n)
{
    enum { SIDE = 32 }; /* blocks of four words */
    if (d.p == 0) {
        for (size_t i = 0; i < n; i++) out[i] = 1;
        return;
    }
    const uint32_t threshold = dropout_threshold(d.p);
    const real scale = 1 / (1 - d.p);
    size_t skip = (d.first + index) % 4; /* words of the first block before element index */
    for (uint64_t block = (d.first + index) / 4; n > 0; block += SIDE) {
        uint32_t c[4][SIDE];
        real factor[4 * SIDE];
        for (int i = 0; i < SIDE; i++) {
            const uint64_t counter = block + (uint64_t)i;
            c[0][i] = (uint32_t)counter;
            c[1][i] = (uint32_t)(counter >> 32);
            c[2][i] = d.site;
            c[3][i] = d.step;
        }
        for (uint32_t round = 0; round < 10; round++)
#pragma omp simd
            for (int i = 0; i < SIDE; i++)
                philox_round(&c[0][i], &c[1][i], &c[2][i], &c[3][i], d.seed, round);
        for (int i = 0; i < SIDE; i++)
            for (int j = 0; j < 4; j++) factor[4 * i + j] = c[j][i] >= threshold ? scale : 0;
        const size_t count = min_size(n, 4 * SIDE - skip);
        memcpy(out, factor + skip, count * sizeof *out);
        out += count;
        n -= count;
        skip = 0;
    }
}

/* The loop of all_reduce: elements [begin, begin+n) of all arrays become x[0] op x[1] op .., one
 * array for each rank, in their order. A NaN wins every MAX. type is ACT or REAL_ARRAY; they differ
 * on a GPU only. */
static void reduce_slice(void *const *x, int ranks, size_t begin, size_t n, Type type, Op op)
{
    enum { RUN = 1024 }; /* elements that stay in the L1 cache while the ranks' arrays pass by */
    (void)type;
#pragma omp parallel for schedule(static) if (n > SMALL)
    for (size_t i0 = begin; i0 < begin + n; i0 += RUN) {
        const size_t count = min_size(RUN, begin + n - i0);
        real total[RUN];
        memcpy(total, (real *)x[0] + i0, count * sizeof *total);
        for (int r = 1; r < ranks; r++) {
            const real *a = (real *)x[r] + i0;
#pragma omp simd
            for (size_t i = 0; i < count; i++) {
                const real larger = a[i] > total[i] || a[i] != a[i] ? a[i] : total[i];
                total[i] = op == SUM ? total[i] + a[i] : larger;
            }
        }
        for (int r = 0; r < ranks; r++) memcpy((real *)x[r] + i0, total, count * sizeof *total);
    }
}

/* ---- Memory ---------------------------------------------------------------------------------- */

/* 64-byte aligned; dies when there is no memory. Large arrays ask for pages of 2 MB, so that
 * addresses are translated faster. */
static void *device_calloc(size_t bytes)
{
    const size_t huge = (size_t)2 << 20, align = bytes < huge ? 64 : huge;
    void *p = aligned_alloc(align, round_up(max_size(bytes, 1), align));
    if (!p) die("out of memory: %zu bytes were asked for", bytes);
#ifdef MADV_HUGEPAGE
    if (align == huge) madvise(p, bytes, MADV_HUGEPAGE);
#endif
    return memset(p, 0, bytes);
}

static void device_free(void *p) { free(p); }
static void device_zero(void *p, size_t bytes) { memset(p, 0, bytes); }
static void device_copy(void *to, const void *from, size_t bytes) { memmove(to, from, bytes); }
static void device_upload(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
static void device_download(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
static void act_upload(act *to, const real *from, size_t n) { memcpy(to, from, n * sizeof *to); }
static void act_download(real *to, const act *from, size_t n) { memcpy(to, from, n * sizeof *to); }
static void device_synchronize(void) {}
static void device_select(int rank, int ranks) { (void)rank, (void)ranks; }
static const char *device_kind(void) { return "cores"; }
static int device_count(void) { return cores(); }

static double device_memory(void)
{
    return (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
}

/* n reals of working space, 64-byte aligned and not zeroed; free() it. */
static real *scratch(size_t n)
{
    void *p = aligned_alloc(64, n * sizeof(real) / 64 * 64 + 64);
    if (!p) die("out of memory: %zu bytes of scratch were asked for", n * sizeof(real));
    return (real *)p;
}

/* ---- The packed product ---------------------------------------------------------------------- */

/* C (M,N) = A (M,K) B (K,N) takes four fifths of all time. (In this section M, N, K are the sizes
 * of a product.) One product serves X W', dY W and dY' X, because a Matrix has two strides. It
 * makes C in tiles of 6 rows x TILE_VECS vectors:
 *
 *                 TILE_COLS          in registers: the tile of C, and a row of B's panel at a time
 *            B   +--+==+--+--+
 *        K_BLOCK |  |##|  |  |       in L1, L2: a K_BLOCK x TILE_COLS panel of B (24 KB with AVX2,
 *                +--+==+--+--+       96 KB with AVX-512); all strips meet it before the next panel
 *     A  K_BLOCK
 *     +========+ +--+--+--+--+       in L2, L3: ROW_BLOCK x K_BLOCK of A (1.8 MB), in strips of 6
 *   6 |########| |  |##|  |  | C     rows (9 KB), which are read one after the other
 *     +========+ +--+--+--+--+
 *     |        | |  |  |  |  |       for each k a tile loads TILE_VECS vectors of B and 6 numbers
 *                                    of A, and makes 6 * TILE_VECS multiply-adds of vectors: the
 *                                    arithmetic units never wait for loads
 *
 * Strips and panels are packed: copied such that the tile's loop reads them in order, whatever the
 * strides. Each thread makes a rectangle of C from copies of its own, so no thread waits for
 * another before the end, and a sum over k has one order, whichever thread makes it. (dot(), for C
 * of less than 4 rows, has another order.) doc/matmul.md gets here step by step. */

#if defined __AVX512F__
enum { VEC_BYTES = 64, TILE_VECS = 4 };
#elif defined __AVX__
enum { VEC_BYTES = 32, TILE_VECS = 2 };
#elif defined __aarch64__
enum { VEC_BYTES = 16, TILE_VECS = 4 };
#else
enum { VEC_BYTES = 16, TILE_VECS = 2 };
#endif
typedef real vec __attribute__((vector_size(VEC_BYTES)));
typedef real loose_vec /* at any address */
    __attribute__((vector_size(VEC_BYTES), aligned(sizeof(real)), may_alias));

enum {
    LANES = VEC_BYTES / sizeof(real),
    TILE_ROWS = 6,
    TILE_COLS = TILE_VECS * LANES,
    K_RUN = 16, /* steps of k that are packed at a time */
    K_BLOCK = 384,
    ROW_BLOCK = 1152, /* 1,024 rows need one copy of B */
};
static_assert(K_BLOCK % K_RUN == 0 && ROW_BLOCK % TILE_ROWS == 0, "blocks are whole runs, strips");
static_assert(TILE_ROWS % 2 == 0, "pack() takes two rows at a time");

static inline Matrix from_element(Matrix m, size_t i, size_t j) /* m from row i and column j on */
{
    Matrix part = {m.p + i * m.row + j * m.col, m.rows - i, m.cols - j, m.row, m.col};
    return part;
}

/* out (ceil(n/width), K, width) = the first n rows and K columns of `from`, in strips of width
 * rows, each transposed, the last filled up with zeros. Two rows at a time, because compilers store
 * pairs then. width is even, and a constant where this is inlined. */
static inline __attribute__((always_inline)) void pack(real *out, Matrix from, size_t n,
                                                       const size_t width, size_t K)
{
    /* Steps of k before the next strip: K_RUN where that strip continues the cache lines that this
     * one began. */
    const size_t stretch = from.col == 1 ? K : (size_t)K_RUN;
    for (size_t k0 = 0; k0 < K; k0 += stretch)
        for (size_t i = 0; i < n; i += width)
            for (size_t k = k0; k < min_size(k0 + stretch, K); k += K_RUN) {
                const Matrix m = from_element(from, i, k);
                const size_t run = min_size(K_RUN, K - k), rows = min_size(width, n - i);
                const int whole = rows == width && run == K_RUN;
                real *to = out + i * K + k * width;
                if (whole && m.col == 1)
                    for (size_t r = 0; r < width; r += 2) {
                        const real *x = m.p + r * m.row, *y = x + m.row;
                        __builtin_prefetch(x + 2 * K_RUN);
                        __builtin_prefetch(y + 2 * K_RUN);
                        for (size_t c = 0; c < K_RUN; c++) {
                            to[c * width + r] = x[c];
                            to[c * width + r + 1] = y[c];
                        }
                    }
                else if (whole && m.row == 1)
                    for (size_t c = 0; c < K_RUN; c++) {
                        __builtin_prefetch(m.p + c * m.col + 2 * K_RUN); /* helps A's next strips */
                        memcpy(to + c * width, m.p + c * m.col, width * sizeof *to);
                    }
                else
                    for (size_t c = 0; c < run; c++)
                        for (size_t r = 0; r < width; r++)
                            to[c * width + r] = r < rows ? m.p[r * m.row + c * m.col] : 0;
            }
}

/* The epilogue on rows x cols elements of C, whose rows are c_row apart. The first is element `at`
 * of C, in column `col`. Each GeLU has loops of its own, because only the tanh form vectorises; the
 * other calls libm. */
static void finish(act *c, size_t c_row, size_t at, size_t col, size_t rows, size_t cols,
                   const Epilogue *e)
{
    const int forward = e->kind == BIAS_GELU, backward = e->kind == GELU_SLOPE;
    const int erf_form = e->gelu == GELU_ERF;
    for (size_t i = 0; i < rows; i++, at += c_row) {
        act *x = c + at, *pre = e->pre ? e->pre + at : NULL;
        if (e->bias)
#pragma omp simd
            for (size_t j = 0; j < cols; j++) x[j] += e->bias[col + j];
        if (forward && pre) memcpy(pre, x, cols * sizeof *x);
        if (forward && erf_form)
            for (size_t j = 0; j < cols; j++) x[j] = gelu(x[j], GELU_ERF);
        else if (forward)
#pragma omp simd
            for (size_t j = 0; j < cols; j++) x[j] = gelu(x[j], GELU_TANH);
        else if (backward && erf_form)
            for (size_t j = 0; j < cols; j++) x[j] *= gelu_slope(pre[j], GELU_ERF);
        else if (backward)
#pragma omp simd
            for (size_t j = 0; j < cols; j++) x[j] *= gelu_slope(pre[j], GELU_TANH);
    }
}

/* c (m,n) = or += strip' panel, with strip (K,6) and panel (K,TILE_COLS). n fits into vecs vectors,
 * a constant where this is inlined. A tile of less than 6 rows, or less wide than vecs vectors,
 * goes through `edge`. */
static inline __attribute__((always_inline)) void tile_of(const size_t vecs, act *c, size_t c_row,
                                                          size_t m, size_t n, const real *strip,
                                                          const real *panel, size_t K, int add)
{
    vec t[TILE_ROWS][TILE_VECS] = {{{0}}};
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < vecs; j++) __builtin_prefetch(c + i * c_row + j * LANES, 1);
#pragma GCC unroll 8 /* gcc leaves it to us: 4% */
    for (size_t k = 0; k < K; k++, strip += TILE_ROWS, panel += TILE_COLS)
        for (size_t i = 0; i < TILE_ROWS; i++)
            for (size_t j = 0; j < vecs; j++)
                t[i][j] += strip[i] * *(const vec *)(panel + j * LANES);
    const int whole = m == TILE_ROWS && n == vecs * LANES;
    const size_t row = whole ? c_row : (size_t)TILE_COLS;
    real edge[TILE_ROWS * TILE_COLS], *to = whole ? c : edge;
    for (size_t i = 0; i < TILE_ROWS; i++, to += row)
        for (size_t j = 0; j < vecs; j++) {
            if (whole && add) t[i][j] += *(loose_vec *)(to + j * LANES);
            *(loose_vec *)(to + j * LANES) = t[i][j];
        }
    for (size_t i = 0; i < m && !whole; i++)
        for (size_t j = 0; j < n; j++)
            c[i * c_row + j] = edge[i * TILE_COLS + j] + (add ? c[i * c_row + j] : 0);
}

/* Tiles of 2, 3 and 4 vectors where TILE_VECS is 4, of 1 and 2 where it is 2. Not inlined: its
 * loops need all registers, and gcc spills sums where other loops are near. */
static __attribute__((noinline)) void tile(act *c, size_t c_row, size_t m, size_t n,
                                           const real *strip, const real *panel, size_t K, int add)
{
    const size_t vecs = ceil_div(n, LANES);
    if (vecs <= TILE_VECS / 2) tile_of(TILE_VECS / 2, c, c_row, m, n, strip, panel, K, add);
    else if (vecs < TILE_VECS) tile_of(TILE_VECS - 1, c, c_row, m, n, strip, panel, K, add);
    else tile_of(TILE_VECS, c, c_row, m, n, strip, panel, K, add);
}

/* Rows i0 .. i1-1 and columns j0 .. j1-1 of C. */
typedef struct {
    size_t i0, i1, j0, j1;
} Rectangle;

/* One rectangle of c = or += a b, and e on it, unless it is NULL. a.cols > 0. strips: room for
 * min(ROW_BLOCK, i1 - i0) rows, rounded up to whole strips, of min(K_BLOCK, a.cols) numbers. */
static void product(act *c, size_t c_row, Matrix a, Matrix b, Rectangle part, Store store,
                    const Epilogue *e, real *strips)
{
    const size_t K = a.cols;
    const size_t block = round_up(ceil_div(K, ceil_div(K, K_BLOCK)), K_RUN); /* all about equal */
    const Matrix columns = transposed(b);
    real panel[K_BLOCK * TILE_COLS] __attribute__((aligned(64)));
    for (size_t i0 = part.i0; i0 < part.i1 && part.j0 < part.j1; i0 += ROW_BLOCK)
        for (size_t k0 = 0; k0 < K; k0 += block) {
            const size_t end = min_size(i0 + ROW_BLOCK, part.i1), depth = min_size(block, K - k0);
            const int add = store == ADD || k0 > 0, last = e && k0 + depth == K;
            pack(strips, from_element(a, i0, k0), end - i0, TILE_ROWS, depth);
            for (size_t j = part.j0; j < part.j1; j += TILE_COLS) {
                const size_t n = min_size(TILE_COLS, part.j1 - j);
                pack(panel, from_element(columns, j, k0), n, TILE_COLS, depth);
                for (size_t i = i0; i < end; i += TILE_ROWS) {
                    const size_t m = min_size(TILE_ROWS, end - i), at = i * c_row + j;
                    for (size_t r = 0; r < m && last && e->pre; r++)
                        for (size_t q = 0; q < n; q += LANES)
                            __builtin_prefetch(e->pre + at + r * c_row + q);
                    tile(c + at, c_row, m, n, strips + (i - i0) * depth, panel, depth, add);
                    if (last) finish(c, c_row, at, j, m, n, e);
                }
            }
        }
}

/* One of a's sizes is QUERIES at most, the other KEYS, or else it is cut into blocks of K_BLOCK. */
static void matmul_block(act *c, size_t c_row, Matrix a, Matrix b, Store store)
{
    real strips[QUERIES * KEYS];
    const Rectangle all = {0, a.rows, 0, b.cols};
    product(c, c_row, a, b, all, store, NULL, strips);
}
static_assert((int)KEYS == (int)K_BLOCK, "QUERIES rows of K_BLOCK numbers fit into strips");
static_assert(QUERIES % TILE_ROWS == 0 && KEYS % TILE_ROWS == 0, "so do whole strips");
static_assert(QUERIES % K_RUN == 0 && KEYS % K_RUN == 0, "whole runs are packed faster");

static real dot(const real *a, const real *b, size_t n)
{
    /* Independent sums hide the adder's latency. AHEAD, because the hardware's prefetcher stops at
     * the end of a page. */
    enum { CHAINS = 4, AHEAD = 2048 };
    vec s[CHAINS] = {{0}};
    real sum = 0;
    size_t i = 0;
    for (; i + CHAINS * LANES <= n; i += CHAINS * LANES)
        for (int j = 0; j < CHAINS; j++) {
            const real *x = a + i + j * LANES, *y = b + i + j * LANES;
            __builtin_prefetch(y + AHEAD);
            s[j] += *(const loose_vec *)x * *(const loose_vec *)y;
        }
    s[0] = (s[0] + s[1]) + (s[2] + s[3]);
    for (int lane = 0; lane < LANES; lane++) sum += s[0][lane];
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* C of less than 4 rows, as in generation, is made at the speed at which b is read: b is read once,
 * as it lies. Else C is cut into down x (parts / down) rectangles, one for each thread, such that a
 * thread copies as little as possible of A and B. */
static void matmul(act *c, Matrix a, Matrix b, Store store, const Epilogue *e)
{
    const size_t M = a.rows, N = b.cols, K = a.cols;
    if (M < 4 && a.col == 1 && b.row == 1) {
#pragma omp parallel for schedule(static) if (N * K > SMALL)
        for (size_t j = 0; j < N; j++)
            for (size_t i = 0; i < M; i++)
                c[i * N + j] =
                    dot(a.p + i * a.row, b.p + j * b.col, K) + (store == ADD ? c[i * N + j] : 0);
        if (e) finish(c, N, 0, 0, M, N, e);
        return;
    }
    const size_t parts = M * N * K > 8 * SMALL ? (size_t)openmp_threads() : 1;
    size_t down = 1, rows = 0, cols = 0, least = SIZE_MAX;
    for (size_t d = 1; d <= parts; d++) {
        const size_t high = round_up(ceil_div(M, d), TILE_ROWS);
        const size_t wide = round_up(ceil_div(N, parts / d), TILE_COLS);
        const size_t copied = high + wide * ceil_div(high, ROW_BLOCK);
        if (parts % d || copied >= least) continue;
        down = d;
        rows = high;
        cols = wide;
        least = copied;
    }
#pragma omp parallel for schedule(static) if (parts > 1)
    for (size_t part = 0; part < parts; part++) {
        const size_t i0 = part % down * rows, j0 = part / down * cols;
        const Rectangle mine = {i0, min_size(i0 + rows, M), j0, min_size(j0 + cols, N)};
        real *strips = scratch(min_size(rows, ROW_BLOCK) * min_size(K, K_BLOCK));
        product(c, N, a, b, mine, store, e, strips);
        free(strips);
    }
}

#else
static void reduce_slice(void *const *x, int ranks, size_t begin, size_t n, Type type, Op op);
#endif /* OTHER_OPERATORS */

/* =================================================================================================
 * Chapter 12. Ranks as threads
 * =================================================================================================
 *
 * Chapter 2's list of collectives, for ranks that are threads of this process. Another back end
 * defines OTHER_RANKS, includes this file, and has functions of its own in the place of those
 * below.
 *
 * A group's Board is what its ranks share. The protocol of every collective is the same:
 *
 *     1. each rank posts its pointer and its arguments on the board
 *     2. barrier: now all posts can be read
 *     3. each rank reads the others' arrays and does its part
 *     4. barrier: now the arrays are their owners' again */

static size_t type_size(Type type)
{
    if (type == ACT) return sizeof(act);
    return type == REAL_ARRAY ? sizeof(real) : sizeof(double);
}

/* One call of a collective, as `trace` prints it. */
typedef struct {
    const char *op, *group;
    size_t elements, bytes; /* of the message: what each rank passes in */
    Place place;
} Event;

struct Trace {
    Event *event;
    size_t n, capacity;
};

static void record(Comm *c, const char *op, size_t n, Type type)
{
    static const Place nowhere = {"-", "", "", -1};
    Trace *trace = c->trace;
    if (!trace) return;
    trace->event = (Event *)grow(trace->event, trace->n, &trace->capacity, sizeof *trace->event);
    Event event = {op, c->name, n, n * type_size(type), c->place ? *c->place : nowhere};
    trace->event[trace->n++] = event;
}

/* reduce_slice for a few doubles in the host's memory. */
static void reduce_scalars(void *const *x, int ranks, size_t begin, size_t n, Op op)
{
    for (size_t i = begin; i < begin + n; i++) {
        double total = ((double *)x[0])[i];
        for (int r = 1; r < ranks; r++) {
            const double a = ((double *)x[r])[i];
            if (op == SUM) total += a;
            else if (a > total || a != a) total = a;
        }
        for (int r = 0; r < ranks; r++) ((double *)x[r])[i] = total;
    }
}

#ifndef OTHER_RANKS

/* ---- The board ------------------------------------------------------------------------------- */

/* A one-way channel between two ranks, with room for one message: send waits while it is full, recv
 * while it is empty. */
typedef struct {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int full;
    void *data;
    size_t capacity, bytes;
} Mailbox;

/* What one rank posts, beside its pointer. */
typedef struct {
    const char *op;
    size_t n;
    int type, world_rank;
} Post;

struct Board {
    int size;
    int spin;            /* barrier: how often a rank looks before it sleeps */
    int arrived;         /* barrier: ranks that wait */
    unsigned generation; /* barrier: how often it has opened */
    pthread_mutex_t mutex;
    pthread_cond_t opened;
    Post *post;       /* [size] */
    void **x;         /* [size] the ranks' pointers */
    Mailbox *mailbox; /* [from * size + to] */
};

static Board *board_create(int size, int spin)
{
    Board *board = (Board *)xcalloc(1, sizeof *board);
    board->size = size;
    board->spin = spin;
    board->post = (Post *)xcalloc((size_t)size, sizeof *board->post);
    board->x = (void **)xcalloc((size_t)size, sizeof *board->x);
    board->mailbox = (Mailbox *)xcalloc((size_t)size * size, sizeof *board->mailbox);
    pthread_mutex_init(&board->mutex, NULL);
    pthread_cond_init(&board->opened, NULL);
    for (int i = 0; i < size * size; i++) {
        pthread_mutex_init(&board->mailbox[i].mutex, NULL);
        pthread_cond_init(&board->mailbox[i].changed, NULL);
    }
    return board;
}

/* One rank calls it, after the last barrier of the group. */
static void board_destroy(Board *board)
{
    for (int i = 0; i < board->size * board->size; i++) device_free(board->mailbox[i].data);
    free(board->post);
    free(board->x);
    free(board->mailbox);
    free(board);
}

/* Looks a while, since ranks are usually close together, and then sleeps. */
static void barrier(Comm *c)
{
    Board *b = c->board;
    unsigned generation = __atomic_load_n(&b->generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&b->arrived, 1, __ATOMIC_ACQ_REL) == b->size) {
        __atomic_store_n(&b->arrived, 0, __ATOMIC_RELAXED);
        pthread_mutex_lock(&b->mutex); /* no rank falls asleep between its last look and our call */
        __atomic_store_n(&b->generation, generation + 1, __ATOMIC_RELEASE);
        pthread_cond_broadcast(&b->opened);
        pthread_mutex_unlock(&b->mutex);
        return;
    }
    for (int i = 0; i < b->spin; i++)
        if (__atomic_load_n(&b->generation, __ATOMIC_ACQUIRE) != generation) return;
    pthread_mutex_lock(&b->mutex);
    while (__atomic_load_n(&b->generation, __ATOMIC_ACQUIRE) == generation)
        pthread_cond_wait(&b->opened, &b->mutex);
    pthread_mutex_unlock(&b->mutex);
}

/* Steps 1 and 2 of the protocol. If ranks disagree on what comes next, the program is broken: say
 * which ranks. */
static void meet(Comm *c, const char *op, void *x, size_t n, Type type)
{
    const Post mine = {op, n, (int)type, c->world_rank};
    c->board->post[c->rank] = mine;
    c->board->x[c->rank] = x;
    device_synchronize();
    barrier(c);
    for (int r = 0; r < c->size; r++) {
        const Post *other = &c->board->post[r];
        if (other->n != n || other->type != (int)type || strcmp(other->op, op))
            die("ranks disagree in group %s: rank %d calls %s of %zu elements, rank %d calls %s of "
                "%zu",
                c->name, c->world_rank, op, n, other->world_rank, other->op, other->n);
    }
    record(c, op, n, type);
}

/* Step 4. */
static void leave(Comm *c)
{
    device_synchronize();
    barrier(c);
}

/* ---- Collectives ----------------------------------------------------------------------------- */

/* Rank r reduces slice r of all arrays, and writes it to all. */
static void all_reduce(Comm *c, void *x, size_t n, Type type, Op op)
{
    if (c->size == 1) return;
    const size_t size = (size_t)c->size, begin = n * c->rank / size;
    const size_t count = n * (c->rank + 1) / size - begin;
    meet(c, op == SUM ? "all_reduce" : "all_reduce_max", x, n, type);
    if (type == DOUBLE_ARRAY) reduce_scalars(c->board->x, c->size, begin, count, op);
    else reduce_slice(c->board->x, c->size, begin, count, type, op);
    leave(c);
}

/* n elements of another rank's array, or of this one's. */
static void copy_array(void *to, const void *from, size_t n, Type type)
{
    if (type == DOUBLE_ARRAY) memmove(to, from, n * type_size(type));
    else device_copy(to, from, n * type_size(type));
}

static void all_gather(Comm *c, void *out, void *x, size_t n, Type type)
{
    if (c->size == 1) {
        copy_array(out, x, n, type);
        return;
    }
    meet(c, "all_gather", x, n, type);
    for (int r = 0; r < c->size; r++)
        copy_array((char *)out + r * n * type_size(type), c->board->x[r], n, type);
    leave(c);
}

static void broadcast(Comm *c, void *x, size_t n, Type type, int root)
{
    if (c->size == 1) return;
    meet(c, "broadcast", x, n, type);
    if (c->rank != root) copy_array(x, c->board->x[root], n, type);
    leave(c);
}

static void send(Comm *c, const void *x, size_t n, Type type, int to)
{
    Mailbox *box = &c->board->mailbox[c->rank * c->size + to];
    const size_t bytes = n * type_size(type);
    record(c, "send", n, type);
    pthread_mutex_lock(&box->mutex);
    while (box->full) pthread_cond_wait(&box->changed, &box->mutex);
    if (bytes > box->capacity) { /* the first message only: later steps allocate nothing */
        device_free(box->data);
        box->data = device_calloc(bytes);
        box->capacity = bytes;
    }
    device_copy(box->data, x, bytes);
    device_synchronize();
    box->bytes = bytes;
    box->full = 1;
    pthread_cond_broadcast(&box->changed);
    pthread_mutex_unlock(&box->mutex);
}

static void recv(Comm *c, void *x, size_t n, Type type, int from)
{
    Mailbox *box = &c->board->mailbox[from * c->size + c->rank];
    const size_t bytes = n * type_size(type);
    record(c, "recv", n, type);
    pthread_mutex_lock(&box->mutex);
    while (!box->full) pthread_cond_wait(&box->changed, &box->mutex);
    if (box->bytes != bytes)
        die("rank %d receives %zu bytes in group %s, but %zu were sent", c->world_rank, bytes,
            c->name, box->bytes);
    device_copy(x, box->data, bytes);
    device_synchronize();
    box->full = 0;
    pthread_cond_broadcast(&box->changed);
    pthread_mutex_unlock(&box->mutex);
}

/* ---- Groups, and the start of the ranks ------------------------------------------------------ */

/* Colors are posted as n. The first rank of each color makes its group's board. */
static Comm comm_split(Comm *parent, int color, const char *name)
{
    Board *board = parent->board;
    Comm c = {0, 0, NULL, name, parent->world_rank, NULL, NULL};
    int leader = -1;
    board->post[parent->rank].n = (size_t)color;
    barrier(parent);
    for (int r = 0; r < parent->size; r++) {
        if (board->post[r].n != (size_t)color) continue;
        if (leader < 0) leader = r;
        if (r == parent->rank) c.rank = c.size;
        c.size++;
    }
    if (leader == parent->rank) board->x[leader] = board_create(c.size, board->spin);
    barrier(parent);
    c.board = (Board *)board->x[leader];
    barrier(parent); /* the posts may be used again only when all have read them */
    return c;
}

/* The last rank to leave the barrier destroys the board: the others no longer touch it. */
static void comm_free(Comm *c)
{
    barrier(c);
    const int last = __atomic_add_fetch(&c->board->arrived, 1, __ATOMIC_ACQ_REL) == c->size;
    if (last) board_destroy(c->board);
}

static int is_writer(const Comm *world) { return !world || world->rank == 0; }

typedef struct {
    pthread_t thread;
    Comm world;
    void (*body)(Comm *world, void *arg);
    void *arg;
} Start;

static void *start_rank(void *arg)
{
    Start *start = (Start *)arg;
    device_select(start->world.rank, start->world.size);
#ifdef _OPENMP
    const int share = cores() / start->world.size; /* the ranks share the cores */
    omp_set_num_threads(share > 1 ? share : 1);
#endif
    start->body(&start->world, start->arg);
    return NULL;
}

/* A barrier spins only where every rank has a core of its own. */
static void run_ranks(int n, void (*body)(Comm *world, void *arg), void *arg)
{
    if (n < 1 || n > MAX_RANKS) die("%d ranks were asked for: 1 to %d are possible", n, MAX_RANKS);
    Start *start = (Start *)xcalloc((size_t)n, sizeof *start);
    Board *board = board_create(n, n <= cores() ? 4096 : 0);
    for (int r = 0; r < n; r++) {
        const Comm world = {r, n, board, "world", r, NULL, NULL};
        start[r].world = world;
        start[r].body = body;
        start[r].arg = arg;
        if (pthread_create(&start[r].thread, NULL, start_rank, &start[r]))
            die("cannot start a thread for rank %d of %d", r, n);
    }
    for (int r = 0; r < n; r++) pthread_join(start[r].thread, NULL);
    board_destroy(board);
    free(start);
}

#endif /* OTHER_RANKS */

/* =================================================================================================
 *
 * PART III. THE PROGRAM AROUND IT
 *
 * ============================================================================================== */

/* =================================================================================================
 * Chapter 13. Ground
 *
 * What the other chapters stand on: messages and memory, files, progress.
 * ============================================================================================== */

#ifndef PROGRAM
#define PROGRAM "megatron_gpt2" /* whose messages these are: convert.c includes this file */
#endif

static int is_control(char c) { return (unsigned char)c < ' ' || c == 0x7F; }

/* Ends the program with one line on stderr. Several ranks often meet the same bad input at once.
 * The first one prints its message; the others wait until the process ends. _exit() ends it at
 * once: exit() would first shut libraries down, which other ranks are still using. */
__attribute__((noreturn)) static void end_with(int status, const char *format, va_list args)
{
    static int spoken; /* has a rank begun? All threads share it: a global, beside Ctrl-C's flag */
    char line[2 * PATH_MAX];
    while (__atomic_exchange_n(&spoken, 1, __ATOMIC_SEQ_CST)) pause();
    vsnprintf(line, sizeof line, format, args);
    /* Paths and names from files may hold any bytes, but the message must stay one line. */
    for (char *c = line; *c; c++)
        if (is_control(*c)) *c = '?';
    fflush(stdout);
    fprintf(stderr, PROGRAM ": %s\n", line);
    _exit(status);
}

/* Bad input. The message says what was seen, what was expected, and what to do. Exit status 1. */
__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    end_with(1, format, args);
}

/* Wrong use of the command line: exit status 2. */
__attribute__((noreturn, format(printf, 1, 2))) static void usage_error(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    end_with(2, format, args);
}

enum { SHOWN = 64 };

/* The first characters of a string from a file, for a message of one line. Returns `shown`. */
static char *printable(char shown[SHOWN], const char *s)
{
    size_t n = 0;
    for (; s[n] && n + 1 < SHOWN; n++) shown[n] = is_control(s[n]) ? '?' : s[n];
    if (s[n]) memcpy(&shown[n - 2], "..", 2);
    shown[n] = 0;
    return shown;
}

/* Zeroed host memory for count objects of size bytes; dies instead of returning NULL. */
static void *xcalloc(size_t count, size_t size)
{
    void *p = calloc(count ? count : 1, size ? size : 1);
    if (!p)
        die("out of memory: %zu objects of %zu bytes were asked for; try a smaller model or batch",
            count, size);
    return p;
}

/* Makes room for element n of an array; the capacity may double. Returns where the array is now. */
static void *grow(void *p, size_t n, size_t *capacity, size_t size)
{
    if (n < *capacity) return p;
    *capacity = *capacity ? 2 * *capacity : 64;
    p = realloc(p, *capacity * size);
    if (!p)
        die("out of memory: %zu objects of %zu bytes were asked for; give less text", *capacity,
            size);
    return p;
}

/* The arena's next count objects of size bytes, 64-byte aligned; NULL while it only measures. */
static void *carve(Arena *arena, size_t count, size_t size)
{
    void *p = arena->base ? arena->base + arena->used : NULL;
    arena->used += round_up(count * size, 64);
    return p;
}

/* ---- Files ----------------------------------------------------------------------------------- */

typedef struct {
    const char *data;
    size_t size; /* bytes */
} Map;

/* Maps a whole file for reading; dies if it is no regular file. An empty file gives "" and 0. */
static Map map_file(const char *path)
{
    Map map = {"", 0};
    struct stat st;
    int fd = open(path, O_RDONLY | O_NONBLOCK); /* without it, a pipe makes us wait for a writer */
    if (fd < 0) die("cannot open %s: %s", path, strerror(errno));
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) die("%s is not a regular file", path);
    if (st.st_size > 0) {
        map.size = (size_t)st.st_size;
        map.data = (const char *)mmap(NULL, map.size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map.data == (const char *)MAP_FAILED) die("cannot map %s: %s", path, strerror(errno));
    }
    close(fd);
    return map;
}

static void unmap_file(Map map)
{
    if (map.size) munmap((void *)map.data, map.size);
}

/* Cuts the first line off a text, with its '\n' if it has one. */
static Map next_line(Map *text)
{
    const char *end = (const char *)memchr(text->data, '\n', text->size);
    Map line = {text->data, end ? (size_t)(end + 1 - text->data) : text->size};
    text->data += line.size;
    text->size -= line.size;
    return line;
}

/* Writes "folder/name" to path, and returns path; dies if it does not fit. */
static char *join_path(char path[PATH_MAX], const char *folder, const char *name)
{
    if (snprintf(path, PATH_MAX, "%s/%s", folder, name) >= PATH_MAX)
        die("the path %s/%s is too long", folder, name);
    return path;
}

/* The same for a prefix and a suffix, without '/' between them. */
static char *extend_path(char path[PATH_MAX], const char *prefix, const char *suffix)
{
    if (snprintf(path, PATH_MAX, "%s%s", prefix, suffix) >= PATH_MAX)
        die("the path %s is too long", prefix);
    return path;
}

static int file_exists(const char *folder, const char *name)
{
    char path[PATH_MAX];
    return access(join_path(path, folder, name), F_OK) == 0;
}

/* ---- Progress -------------------------------------------------------------------------------- */

static double now(void) /* seconds */
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static Meter meter_start(const char *unit, size_t first, size_t total, size_t tokens)
{
    double t = now();
    Meter m = {unit, first, total, tokens, isatty(STDERR_FILENO), t, t};
    return m;
}

static double meter_rate(const Meter *m, size_t done) /* tokens a second so far */
{
    return (double)(done - m->first) * (double)m->tokens / fmax(now() - m->start, 1e-9);
}

/* Shows how much is done, and one value of the work, unless the last time was just now. */
static void meter_show(Meter *m, size_t done, const char *name, double value)
{
    double t = now(), rate = meter_rate(m, done);
    double left = (double)(m->total - done) * (double)m->tokens / fmax(rate, 1e-9); /* seconds */
    char bar[33] = "................................";
    if (done < m->total && t - m->shown < (m->terminal ? 0.1 : 10)) return;
    m->shown = t;
    for (size_t i = 0; m->total && i < 32 * done / m->total; i++) bar[i] = '#';
    if (m->terminal) fprintf(stderr, "\r[%s] ", bar);
    fprintf(stderr, "%s %zu/%zu  %s %.4f  %.0f tokens/s  %.0f:%02.0f left%s", m->unit, done,
            m->total, name, value, rate, floor(left / 60), floor(fmod(left, 60)),
            m->terminal && done < m->total ? "\033[K" : "\n");
}

/* =================================================================================================
 * Chapter 14. Files: JSON, safetensors, config.json, checkpoints
 *
 * A model is a folder in Hugging Face's format: config.json has its sizes, model.safetensors its
 * weights; large models have shards and an index instead. A checkpoint is a model's folder with one
 * more file: trainer.safetensors has AdamW's moments and the state of training.
 *
 * Anyone may have made these files: nothing is used before it has been checked.
 * ============================================================================================== */

/* ---- JSON ------------------------------------------------------------------------------------ */

typedef enum {
    JSON_NULL,
    JSON_FALSE,
    JSON_TRUE,
    JSON_NUMBER,
    JSON_STRING,
    JSON_ARRAY,
    JSON_OBJECT
} JsonType;

typedef struct {
    JsonType type;
    const char *key;    /* in an object: the member's name, NUL-terminated; else NULL */
    const char *string; /* JSON_STRING: UTF-8, NUL-terminated */
    size_t length;      /* JSON_STRING: bytes; JSON_ARRAY, JSON_OBJECT: children */
    double number;      /* JSON_NUMBER */
    size_t end;         /* index of the value behind this one and its children: the next sibling */
} JsonValue;

/* A strict reader (RFC 8259) for config.json, vocab.json, safetensors headers and .jsonl lines. All
 * values of a document lie in one array, children behind their container. These end the program
 * with a line that names `what`: bad syntax, bad escapes, \u0000, invalid UTF-8, numbers too large
 * for a double, more than 40 levels, duplicate keys, text behind the end. Time is O(n log n);
 * memory is one value for each comma and bracket. To visit the children of value[p]:
 *
 *     for (size_t i = p + 1; i < value[p].end; i = value[i].end) */
typedef struct {
    JsonValue *value; /* value[0] is the root */
    char *text;       /* decoded strings */
    const char *what; /* the document's name in messages: mostly a file's path */
} Json;

typedef struct {
    Json json;
    const char *text;
    size_t size, at;
    size_t n;  /* values so far */
    char *out; /* where the next decoded string goes */
} JsonReader;

enum { JSON_DEPTH = 40 };

static int json_peek(const JsonReader *r)
{
    return r->at < r->size ? (unsigned char)r->text[r->at] : -1;
}

/* Dies: at this byte something else was expected. */
__attribute__((noreturn)) static void json_expected(const JsonReader *r, const char *expected)
{
    int c = json_peek(r);
    char seen[32] = "but it ends there";
    if (c > ' ' && c < 0x7F) snprintf(seen, sizeof seen, "not '%c'", c);
    else if (c >= 0) snprintf(seen, sizeof seen, "not the byte 0x%02x", (unsigned)c);
    die("%s is not valid JSON: at byte %zu %s was expected, %s", r->json.what, r->at, expected,
        seen);
}

static void json_space(JsonReader *r)
{
    while (memchr(" \n\r\t", json_peek(r), 4)) r->at++;
}

/* Goes past a word that must stand here. */
static void json_take(JsonReader *r, const char *word)
{
    for (const char *c = word; *c; c++, r->at++)
        if (json_peek(r) != *c) json_expected(r, word);
}

/* *code = the UTF-8 character (RFC 3629) that begins s (n). Returns its length; 0: malformed. */
static size_t read_utf8(uint32_t *code, const char *s, size_t n)
{
    static const uint32_t lowest[5] = {0, 0, 0x80, 0x800, 0x10000}; /* for each length */
    unsigned first = n ? (unsigned char)*s : 0xFF;
    size_t length = 0; /* the number of ones that first begins with */
    *code = first;
    if (first < 0x80) return 1;
    while (first << length & 0x80) length++;
    if (length < 2 || length > 4 || length > n) return 0;
    *code &= 0x7Fu >> length;
    for (size_t i = 1; i < length; i++) {
        if (((unsigned char)s[i] & 0xC0) != 0x80) return 0;
        *code = *code << 6 | ((unsigned char)s[i] & 0x3F);
    }
    int surrogate = *code >= 0xD800 && *code < 0xE000;
    return *code < lowest[length] || *code > 0x10FFFF || surrogate ? 0 : length;
}

/* The length alone. */
static size_t utf8_length(const char *s, size_t n)
{
    uint32_t code;
    return read_utf8(&code, s, n);
}

/* Writes a character in UTF-8, and returns the place behind it. */
static char *put_utf8(char *out, uint32_t code)
{
    static const unsigned begin[4] = {0, 0xC0, 0xE0, 0xF0};
    int more = (code >= 0x80) + (code >= 0x800) + (code >= 0x10000); /* bytes, of 6 bits each */
    *out++ = (char)(begin[more] | code >> 6 * more);
    for (int i = more - 1; i >= 0; i--) *out++ = (char)(0x80 | (code >> 6 * i & 0x3F));
    return out;
}

/* \uXXXX, one UTF-16 unit. */
static uint32_t json_unit(JsonReader *r)
{
    uint32_t unit = 0;
    json_take(r, "\\u");
    for (int i = 0; i < 4; i++, r->at++) {
        int c = json_peek(r), letter = c | 32;
        if (c >= '0' && c <= '9') unit = unit << 4 | (uint32_t)(c - '0');
        else if (c > 0 && letter >= 'a' && letter <= 'f')
            unit = unit << 4 | (uint32_t)(letter - 'a' + 10);
        else json_expected(r, "a hexadecimal digit");
    }
    return unit;
}

static void json_escape(JsonReader *r)
{
    static const char letters[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    int c = r->at + 1 < r->size ? r->text[r->at + 1] : 0;
    const char *letter = c ? strchr(letters, c) : NULL;
    if (letter) {
        *r->out++ = meanings[letter - letters];
        r->at += 2;
        return;
    }
    uint32_t code = json_unit(r);
    if (code >= 0xD800 && code < 0xDC00) { /* a surrogate pair stands for one character */
        uint32_t low = json_unit(r);
        if (low < 0xDC00 || low > 0xDFFF)
            json_expected(r, "the second half of a surrogate pair before this");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xDC00 && code < 0xE000)
        json_expected(r, "the first half of a surrogate pair before this");
    if (!code) json_expected(r, "anything but \\u0000 before this");
    r->out = put_utf8(r->out, code);
}

/* A decoded string with its NUL is never longer than its text with two quotes. So json.text, which
 * is as large as the document, has room for all strings. */
static const char *json_string(JsonReader *r, size_t *length)
{
    char *start = r->out;
    json_take(r, "\"");
    while (json_peek(r) != '"') {
        if (json_peek(r) == '\\') {
            json_escape(r);
            continue;
        }
        size_t n = json_peek(r) < ' ' ? 0 : utf8_length(r->text + r->at, r->size - r->at);
        if (!n) json_expected(r, "a character of a string, in UTF-8,");
        memcpy(r->out, r->text + r->at, n);
        r->out += n;
        r->at += n;
    }
    r->at++;
    *length = (size_t)(r->out - start);
    *r->out++ = 0;
    return start;
}

static int json_at_digit(const JsonReader *r) { return json_peek(r) >= '0' && json_peek(r) <= '9'; }

static void json_digits(JsonReader *r)
{
    if (!json_at_digit(r)) json_expected(r, "a digit");
    while (json_at_digit(r)) r->at++;
}

/* Goes past one of these characters, if it stands here; returns whether it did. */
static int json_skip(JsonReader *r, const char *any)
{
    int c = json_peek(r), found = c > 0 && strchr(any, c);
    r->at += (size_t)found;
    return found;
}

static double json_number_value(JsonReader *r)
{
    char copy[512]; /* for strtod: the text has no NUL */
    size_t start = r->at;
    if (!json_skip(r, "-") && !json_at_digit(r)) json_expected(r, "a value");
    if (!json_skip(r, "0")) json_digits(r); /* nothing may follow a leading zero */
    if (json_skip(r, ".")) json_digits(r);
    if (json_skip(r, "eE")) {
        json_skip(r, "+-");
        json_digits(r);
    }
    size_t length = r->at - start;
    if (length >= sizeof copy)
        die("%s: the number at byte %zu has %zu digits", r->json.what, start, length);
    memcpy(copy, r->text + start, length);
    copy[length] = 0;
    double number = strtod(copy, NULL);
    if (!isfinite(number)) die("%s: the number at byte %zu is too large", r->json.what, start);
    return number;
}

static int compare_strings(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static void json_refuse_duplicates(const JsonReader *r, size_t object)
{
    const JsonValue *value = r->json.value;
    size_t n = 0;
    char shown[SHOWN];
    const char **key = (const char **)xcalloc(value[object].length, sizeof *key);
    for (size_t i = object + 1; i < r->n; i = value[i].end) key[n++] = value[i].key;
    qsort(key, n, sizeof *key, compare_strings);
    for (size_t i = 1; i < n; i++)
        if (!strcmp(key[i - 1], key[i]))
            die("%s: the key \"%s\" occurs twice", r->json.what, printable(shown, key[i]));
    free(key);
}

static void json_value(JsonReader *r, const char *key, int depth);

static void json_container(JsonReader *r, JsonType type, int depth)
{
    size_t self = r->n - 1, unused;
    int close = type == JSON_OBJECT ? '}' : ']';
    const char *key = NULL;
    r->json.value[self].type = type;
    if (depth >= JSON_DEPTH)
        die("%s: at byte %zu JSON is more than %d levels deep", r->json.what, r->at, JSON_DEPTH);
    r->at++;
    json_space(r);
    for (; json_peek(r) != close; r->json.value[self].length++) {
        if (r->json.value[self].length) {
            if (!json_skip(r, ","))
                json_expected(r, type == JSON_OBJECT ? "',' or '}'" : "',' or ']'");
            json_space(r);
        }
        if (type == JSON_OBJECT) {
            key = json_string(r, &unused);
            json_space(r);
            json_take(r, ":");
        }
        json_value(r, key, depth + 1);
    }
    r->at++;
    if (type == JSON_OBJECT) json_refuse_duplicates(r, self);
}

static void json_word(JsonReader *r, JsonValue *v, JsonType type, const char *word)
{
    v->type = type;
    json_take(r, word);
}

static void json_value(JsonReader *r, const char *key, int depth)
{
    JsonValue *v = &r->json.value[r->n++];
    v->key = key;
    json_space(r);
    switch (json_peek(r)) {
    case '{': json_container(r, JSON_OBJECT, depth); break;
    case '[': json_container(r, JSON_ARRAY, depth); break;
    case '"':
        v->type = JSON_STRING;
        v->string = json_string(r, &v->length);
        break;
    case 't': json_word(r, v, JSON_TRUE, "true"); break;
    case 'f': json_word(r, v, JSON_FALSE, "false"); break;
    case 'n': json_word(r, v, JSON_NULL, "null"); break;
    default: v->type = JSON_NUMBER; v->number = json_number_value(r);
    }
    v->end = r->n;
    json_space(r);
}

/* Reads a document of size bytes. `what` must exist as long as the result. */
static Json json_parse(const char *text, size_t size, const char *what)
{
    JsonReader r = {{NULL, NULL, what}, text, size, 0, 0, NULL};
    size_t most = 2; /* values: the root, one behind each comma and bracket, and a missing one */
    for (size_t i = 0; i < size; i++) most += text[i] == ',' || text[i] == '[' || text[i] == '{';
    r.json.value = (JsonValue *)xcalloc(most, sizeof *r.json.value);
    r.json.text = r.out = (char *)xcalloc(size, 1);
    json_value(&r, NULL, 0);
    if (r.at < size) json_expected(&r, "the end");
    return r.json;
}

static void json_free(Json *json)
{
    free(json->value);
    free(json->text);
}

/* Member `key` of object, or NULL. */
static const JsonValue *json_get(const Json *json, const JsonValue *object, const char *key)
{
    if (object->type != JSON_OBJECT) return NULL;
    for (const JsonValue *v = object + 1; v < json->value + object->end; v = json->value + v->end)
        if (!strcmp(v->key, key)) return v;
    return NULL;
}

/* The string that is member `key` of object; NULL if there is none, or it is no string. */
static const char *json_text(const Json *json, const JsonValue *object, const char *key)
{
    const JsonValue *v = json_get(json, object, key);
    return v && v->type == JSON_STRING ? v->string : NULL;
}

/* Is v a whole number from 0 to most? */
static int json_is_count(const JsonValue *v, double most)
{
    return v->type == JSON_NUMBER && v->number >= 0 && v->number <= most &&
           v->number == floor(v->number);
}

/* Member `key`, a number in [low, high]. If it is absent or null: the fallback; if that is
 * negative, the program ends. */
static double json_number(const Json *json, const JsonValue *object, const char *key, double low,
                          double high, double fallback)
{
    const JsonValue *v = json_get(json, object, key);
    int absent = !v || v->type == JSON_NULL;
    if (absent && fallback >= 0) return fallback;
    if (absent) die("%s: \"%s\" is missing", json->what, key);
    if (v->type != JSON_NUMBER) die("%s: \"%s\" is not a number", json->what, key);
    if (v->number < low || v->number > high)
        die("%s: \"%s\" is %.17g: from %.17g to %.17g is possible", json->what, key, v->number, low,
            high);
    return v->number;
}

/* The same for integers up to 2^53. */
static long long json_integer(const Json *json, const JsonValue *object, const char *key,
                              long long low, long long high, long long fallback)
{
    double number = json_number(json, object, key, (double)low, (double)high, (double)fallback);
    if (number != floor(number))
        die("%s: \"%s\" is %.17g: an integer was expected", json->what, key, number);
    return (long long)number;
}

/* Member `key`, true or false; the fallback if it is absent or null. */
static int json_flag(const Json *json, const JsonValue *object, const char *key, int fallback)
{
    const JsonValue *v = json_get(json, object, key);
    if (!v || v->type == JSON_NULL) return fallback;
    if (v->type != JSON_TRUE && v->type != JSON_FALSE)
        die("%s: \"%s\" is neither true nor false", json->what, key);
    return v->type == JSON_TRUE;
}

/* Writes a string as JSON. Bytes that are not UTF-8 (a path may hold any) become U+FFFD. */
static void json_write_string(FILE *out, const char *s, size_t left)
{
    fputc('"', out);
    while (left) {
        size_t n = utf8_length(s, left);
        if (!n) fputs("\\ufffd", out);
        else if ((unsigned char)*s < ' ') fprintf(out, "\\u%04x", (unsigned)*s);
        else if (*s == '"' || *s == '\\') fprintf(out, "\\%c", *s);
        else fwrite(s, 1, n, out);
        n = max_size(n, 1);
        s += n;
        left -= n;
    }
    fputc('"', out);
}

/* ---- A result, as text or as JSON ------------------------------------------------------------ */

/* Describes each value of a result once, for both: by its key, which is NULL for an element of an
 * array, and by a piece of text, a printf format, which is NULL where only JSON has the value. */
typedef struct {
    FILE *out;
    int json, text; /* one of them; neither in a process that does not write */
    int depth;      /* brackets that are open */
    int comma;      /* is there a value before the next one? */
} Emitter;

static Emitter make_emitter(FILE *out, int json)
{
    int writes = is_writer(NULL);
    Emitter e = {out, writes && json, writes && !json, 0, 0};
    return e;
}

__attribute__((format(printf, 2, 3))) static void emit_text(Emitter *e, const char *format, ...)
{
    va_list args;
    if (!e->text) return;
    va_start(args, format);
    vfprintf(e->out, format, args);
    va_end(args);
}

/* Only JSON has keys and brackets. Returns whether the value is to follow. */
static int emit_key(Emitter *e, const char *key)
{
    if (!e->json) return 0;
    if (e->comma) fputs(", ", e->out);
    if (key) fprintf(e->out, "\"%s\": ", key);
    e->comma = 1;
    return 1;
}

static void emit_open(Emitter *e, const char *key, char bracket)
{
    if (!emit_key(e, key)) return;
    fputc(bracket, e->out);
    e->depth++;
    e->comma = 0;
}

static void emit_close(Emitter *e, char bracket)
{
    if (!e->json) return;
    fputc(bracket, e->out);
    e->depth--;
    e->comma = 1;
    if (e->depth == 0) fputc('\n', e->out);
}

static void emit_bytes(Emitter *e, const char *key, const char *bytes, size_t n)
{
    if (emit_key(e, key)) json_write_string(e->out, bytes, n);
}

static void emit_string(Emitter *e, const char *key, const char *format, const char *s)
{
    emit_bytes(e, key, s, strlen(s));
    if (e->text && format) fprintf(e->out, format, s);
}

static void emit_count(Emitter *e, const char *key, const char *format, size_t n)
{
    if (emit_key(e, key)) fprintf(e->out, "%zu", n);
    if (e->text && format) fprintf(e->out, format, n);
}

/* null in JSON for what it has no number for. */
static void emit_number(Emitter *e, const char *key, const char *format, double x)
{
    if (emit_key(e, key)) {
        if (isfinite(x)) fprintf(e->out, "%.15g", x);
        else fputs("null", e->out);
    }
    if (e->text && format) fprintf(e->out, format, x);
}

/* JSON only. */
static void emit_flag(Emitter *e, const char *key, int flag)
{
    if (emit_key(e, key)) fputs(flag ? "true" : "false", e->out);
}

/* ---- Reading safetensors --------------------------------------------------------------------- */

/* A safetensors file: 8 bytes, the length of the header; the header, a JSON object with the type,
 * shape and place of each tensor; the tensors, little-endian, row by row, without gaps. */

/* Real numbers come first. */
typedef enum { F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL_, N_DTYPES } Dtype;
static const char *const dtype_name[] = {"F64", "F32", "F16", "BF16", "I64",
                                         "I32", "I16", "I8",  "U8",   "BOOL"};
static const size_t dtype_size[] = {8, 4, 2, 2, 8, 4, 2, 1, 1, 1};

enum { MAX_DIMS = 8, SHAPE_TEXT = 24 * MAX_DIMS };
enum { MAX_HEADER = 100000000 }; /* the format's own limit */

typedef struct {
    const char *path;
    Map map, data; /* the whole file; the part behind the header */
    Json header;
} StoredFile;

typedef struct {
    const char *name; /* without "transformer." */
    const char *path; /* its file */
    Dtype dtype;
    size_t dims, shape[MAX_DIMS];
    size_t n, bytes;  /* elements; bytes */
    const char *data; /* in the mapped file; not aligned */
    int expected;     /* a mark: the index, then the model, has this tensor too */
} StoredTensor;

struct Safetensors {
    StoredFile *file;
    size_t files;
    StoredTensor *tensor; /* sorted by name */
    size_t tensors;
};

/* Hugging Face's names have "transformer." before them, or not. */
static const char *strip_prefix(const char *name)
{
    static const char prefix[] = "transformer.";
    return strncmp(name, prefix, sizeof prefix - 1) ? name : name + sizeof prefix - 1;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(((const StoredTensor *)a)->name, ((const StoredTensor *)b)->name);
}

static int compare_places(const void *a, const void *b)
{
    const StoredTensor *x = (const StoredTensor *)a, *y = (const StoredTensor *)b;
    int order = strcmp(x->path, y->path);
    if (!order) order = (x->data > y->data) - (x->data < y->data);
    if (!order) order = (x->bytes > y->bytes) - (x->bytes < y->bytes);
    return order;
}

/* The tensor of this name, or NULL. */
static StoredTensor *find_stored(const Safetensors *s, const char *name)
{
    StoredTensor key;
    key.name = strip_prefix(name);
    return (StoredTensor *)bsearch(&key, s->tensor, s->tensors, sizeof key, compare_names);
}

static char *shape_text(char text[SHAPE_TEXT], size_t dims, const size_t *shape)
{
    size_t n = (size_t)snprintf(text, SHAPE_TEXT, "[");
    for (size_t i = 0; i < dims; i++)
        n += (size_t)snprintf(text + n, SHAPE_TEXT - n, i ? ", %zu" : "%zu", shape[i]);
    snprintf(text + n, SHAPE_TEXT - n, "]");
    return text;
}

/* Reads member `key` of a tensor's entry, `most` whole numbers at most. Returns their number. */
static size_t read_sizes(size_t *size, size_t most, const StoredFile *f, const JsonValue *entry,
                         const char *key)
{
    const JsonValue *array = json_get(&f->header, entry, key);
    char name[SHOWN];
    if (!array || array->type != JSON_ARRAY || array->length > most)
        die("%s: tensor %s has no \"%s\" of %zu numbers at most", f->path,
            printable(name, entry->key), key, most);
    for (size_t i = 0; i < array->length; i++) {
        const JsonValue *v = array + 1 + i;
        if (!json_is_count(v, 0x1p53))
            die("%s: \"%s\" of tensor %s is not of whole numbers", f->path, key,
                printable(name, entry->key));
        size[i] = (size_t)v->number;
    }
    return array->length;
}

/* Reads and checks one tensor's entry in the header. */
static StoredTensor read_entry(const StoredFile *f, const JsonValue *entry)
{
    StoredTensor t;
    const char *dtype = json_text(&f->header, entry, "dtype");
    size_t place[2], type = 0;
    char name[SHOWN], other[SHOWN];
    memset(&t, 0, sizeof t);
    t.path = f->path;
    t.name = strip_prefix(entry->key);
    printable(name, entry->key);
    if (!dtype) die("%s: tensor %s has no \"dtype\"", f->path, name);
    while (type < N_DTYPES && strcmp(dtype_name[type], dtype)) type++;
    if (type == N_DTYPES)
        die("%s: tensor %s is of type %s, which is not supported", f->path, name,
            printable(other, dtype));
    t.dtype = (Dtype)type;
    t.dims = read_sizes(t.shape, MAX_DIMS, f, entry, "shape");
    t.n = 1;
    int overflow = 0;
    for (size_t i = 0; i < t.dims; i++) overflow |= __builtin_mul_overflow(t.n, t.shape[i], &t.n);
    overflow |= __builtin_mul_overflow(t.n, dtype_size[type], &t.bytes);
    if (overflow) die("%s: tensor %s would have more than 2^64 bytes", f->path, name);
    if (read_sizes(place, 2, f, entry, "data_offsets") != 2 || place[0] > place[1] ||
        place[1] > f->data.size)
        die("%s: \"data_offsets\" of tensor %s are no range of the %zu bytes of data", f->path,
            name, f->data.size);
    if (place[1] - place[0] != t.bytes)
        die("%s: tensor %s has %zu bytes, but shape and type make %zu", f->path, name,
            place[1] - place[0], t.bytes);
    t.data = f->data.data + place[0];
    return t;
}

/* Maps a file and reads its header. */
static void open_file(StoredFile *f, const char *path)
{
    uint64_t length = 0;
    f->path = strdup(path);
    if (!f->path) die("out of memory");
    f->map = map_file(path);
    if (f->map.size < 8) die("%s is no safetensors file: it has only %zu bytes", path, f->map.size);
    memcpy(&length, f->map.data, 8);
    if (length > MAX_HEADER || length > f->map.size - 8)
        die("%s is no safetensors file: its header would have %llu bytes", path,
            (unsigned long long)length);
    f->data.data = f->map.data + 8 + length;
    f->data.size = f->map.size - 8 - (size_t)length;
    f->header = json_parse(f->map.data + 8, (size_t)length, f->path);
    if (f->header.value[0].type != JSON_OBJECT)
        die("%s is no safetensors file: its header is no object", path);
}

/* Appends the file's tensors to the list. They must cover its data without holes and overlaps. */
static void list_file(Safetensors *s, const StoredFile *f)
{
    const JsonValue *root = f->header.value;
    const char *at = f->data.data, *end = at + f->data.size;
    size_t first = s->tensors;
    char name[SHOWN];
    for (size_t i = 1; i < root->end; i = root[i].end)
        if (strcmp(root[i].key, "__metadata__")) s->tensor[s->tensors++] = read_entry(f, &root[i]);
    qsort(s->tensor + first, s->tensors - first, sizeof *s->tensor, compare_places);
    for (size_t i = first; i < s->tensors; i++) {
        const StoredTensor *t = &s->tensor[i];
        if (t->data != at)
            die("%s: tensor %s %s", f->path, printable(name, t->name),
                t->data < at ? "overlaps another" : "follows a hole that no tensor covers");
        at += t->bytes;
    }
    if (at != end) die("%s: %zu bytes at its end belong to no tensor", f->path, (size_t)(end - at));
}

/* May an index name this file? It must be a plain name, in the index's own folder. */
static int is_file_name(const char *name)
{
    for (const char *c = name; *c; c++)
        if (*c == '/' || is_control(*c)) return 0;
    return *name && *name != '.';
}

/* The names of the files in an index's "weight_map", sorted, each once; the caller frees them. */
static const char **indexed_files(size_t *files, const Json *index, const JsonValue *map)
{
    char shown[SHOWN];
    size_t n = 0;
    *files = 0;
    if (!map || map->type != JSON_OBJECT || !map->length)
        die("%s has no \"weight_map\"", index->what);
    const char **name = (const char **)xcalloc(map->length, sizeof *name);
    for (const JsonValue *v = map + 1; v < index->value + map->end; v = index->value + v->end) {
        if (v->type != JSON_STRING || !is_file_name(v->string))
            die("%s: tensor %s is not in a file of the same folder", index->what,
                printable(shown, v->key));
        name[n++] = v->string;
    }
    qsort(name, n, sizeof *name, compare_strings);
    for (size_t i = 0; i < n; i++) {
        if (i && !strcmp(name[*files - 1], name[i])) continue;
        name[*files] = name[i];
        ++*files;
    }
    return name;
}

/* Opens the shards of an index. */
static void open_shards(Safetensors *s, const char *folder, const Json *index, const JsonValue *map)
{
    char path[PATH_MAX];
    size_t n;
    const char **name = indexed_files(&n, index, map);
    s->file = (StoredFile *)xcalloc(n, sizeof *s->file);
    for (; s->files < n; s->files++)
        open_file(&s->file[s->files], join_path(path, folder, name[s->files]));
    free(name);
}

/* Index and shards must agree on where every tensor is. */
static void check_index(const Safetensors *s, const char *folder, const Json *index,
                        const JsonValue *map)
{
    char path[PATH_MAX], name[SHOWN], file[SHOWN];
    for (const JsonValue *v = map + 1; v < index->value + map->end; v = index->value + v->end) {
        StoredTensor *t = find_stored(s, v->key);
        if (!t || t->expected || strcmp(t->path, join_path(path, folder, v->string)))
            die("%s: tensor %s is not in %s", index->what, printable(name, v->key),
                printable(file, v->string));
        t->expected = 1;
    }
    for (size_t i = 0; i < s->tensors; i++) {
        StoredTensor *t = &s->tensor[i];
        if (!t->expected)
            die("%s: tensor %s is not in %s", t->path, printable(name, t->name), index->what);
        t->expected = 0;
    }
}

/* Opens a safetensors file, or the one of a model's folder, or its shards; lists the tensors. */
static Safetensors safetensors_open(const char *path)
{
    static const char whole[] = "model.safetensors", sharded[] = "model.safetensors.index.json";
    Safetensors s = {NULL, 0, NULL, 0};
    char file[PATH_MAX], name[SHOWN];
    struct stat st;
    Map map = {"", 0};
    Json index = {NULL, NULL, file};
    const JsonValue *weight_map = NULL;
    if (stat(path, &st)) die("cannot open %s: %s", path, strerror(errno));
    int folder = S_ISDIR(st.st_mode);
    if (folder && !file_exists(path, whole)) {
        if (!file_exists(path, sharded))
            die("%s holds no %s; convert reads other formats", path, whole);
        map = map_file(join_path(file, path, sharded));
        index = json_parse(map.data, map.size, file);
        weight_map = json_get(&index, index.value, "weight_map");
        open_shards(&s, path, &index, weight_map);
    } else {
        s.file = (StoredFile *)xcalloc(1, sizeof *s.file);
        s.files = 1;
        open_file(s.file, folder ? join_path(file, path, whole) : path);
    }
    size_t most = 0;
    for (size_t i = 0; i < s.files; i++) most += s.file[i].header.value[0].length;
    s.tensor = (StoredTensor *)xcalloc(most, sizeof *s.tensor);
    for (size_t i = 0; i < s.files; i++) list_file(&s, &s.file[i]);
    qsort(s.tensor, s.tensors, sizeof *s.tensor, compare_names);
    for (size_t i = 1; i < s.tensors; i++)
        if (!compare_names(&s.tensor[i - 1], &s.tensor[i]))
            die("%s: tensor %s is there twice, in two files or with and without \"transformer.\"",
                s.tensor[i].path, printable(name, s.tensor[i].name));
    if (weight_map) check_index(&s, path, &index, weight_map);
    json_free(&index);
    unmap_file(map);
    return s;
}

static void safetensors_close(Safetensors *s)
{
    for (size_t i = 0; i < s->files; i++) {
        unmap_file(s->file[i].map);
        json_free(&s->file[i].header);
        free((void *)s->file[i].path);
    }
    free(s->file);
    free(s->tensor);
    memset(s, 0, sizeof *s);
}

static float half_to_float(uint16_t h)
{
    uint32_t sign = h >> 15, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (!exponent) return (sign ? -1.0f : 1.0f) * (float)mantissa * 0x1p-24f; /* subnormal, or 0 */
    exponent = exponent == 31 ? 255 : exponent + 112; /* 31: infinity or NaN */
    uint32_t bits = sign << 31 | exponent << 23 | mantissa << 13;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* Element i of a tensor of real numbers. */
static real stored_value(const StoredTensor *t, size_t i)
{
    uint16_t half;
    uint32_t bits;
    float x;
    double y;
    switch (t->dtype) {
    case F64: memcpy(&y, t->data + 8 * i, 8); return (real)y;
    case F32: memcpy(&x, t->data + 4 * i, 4); return (real)x;
    case F16: memcpy(&half, t->data + 2 * i, 2); return (real)half_to_float(half);
    default: /* BF16: the upper half of a float */
        memcpy(&half, t->data + 2 * i, 2);
        bits = (uint32_t)half << 16;
        memcpy(&x, &bits, 4);
        return (real)x;
    }
}

/* ---- config.json ----------------------------------------------------------------------------- */

/* The activation function of this name, three for tanh, one for erf; returns 0 if not known. */
static int find_gelu(Gelu *gelu, const char *name)
{
    *gelu = strcmp(name, "gelu") ? GELU_TANH : GELU_ERF;
    return *gelu == GELU_ERF || !strcmp(name, "gelu_new") || !strcmp(name, "gelu_fast") ||
           !strcmp(name, "gelu_pytorch_tanh");
}

/* Reads a config.json. *tied: the word embedding also makes the logits [§3 output embedding]. */
static Config read_config_file(const char *path, int *tied)
{
    char shown[SHOWN];
    Map map = map_file(path);
    Json json = json_parse(map.data, map.size, path);
    const JsonValue *root = json.value, *gelu = json_get(&json, root, "activation_function");
    const char *type = json_text(&json, root, "model_type");
    if (!type || strcmp(type, "gpt2"))
        die("%s: \"model_type\" is not \"gpt2\": only GPT-2 models can be loaded", path);
    if (!json_flag(&json, root, "scale_attn_weights", 1))
        die("%s: \"scale_attn_weights\" must be true", path);
    if (json_flag(&json, root, "scale_attn_by_inverse_layer_idx", 0))
        die("%s: \"scale_attn_by_inverse_layer_idx\" is true, which is not supported", path);

    /* Within these limits a model has fewer than 2^51 parameters: no size can overflow. */
    long long P = json_integer(&json, root, "n_ctx", 1, 1 << 20, 0); /* n_positions' older name */
    P = json_integer(&json, root, "n_positions", 1, 1 << 20, P ? P : -1);
    long long L = json_integer(&json, root, "n_layer", 1, 1 << 12, -1);
    long long C = json_integer(&json, root, "n_embd", 1, 1 << 17, -1);
    long long H = json_integer(&json, root, "n_head", 1, 1 << 12, -1);
    long long V = json_integer(&json, root, "vocab_size", 1, 1 << 24, -1);
    Config c = make_config((size_t)L, (size_t)C, (size_t)H, (size_t)P, (size_t)V);
    c.F = (size_t)json_integer(&json, root, "n_inner", 1, 1 << 20, 4 * C);
    if (C % H) die("%s: \"n_embd\" %lld is no multiple of \"n_head\" %lld", path, C, H);
    if (gelu && gelu->type != JSON_STRING) die("%s: \"activation_function\" is no string", path);
    if (gelu && !find_gelu(&c.gelu, gelu->string))
        die("%s: \"activation_function\" is %s, but gelu_new, gelu_fast, gelu_pytorch_tanh or gelu "
            "is expected",
            path, printable(shown, gelu->string));
    c.eps = (real)json_number(&json, root, "layer_norm_epsilon", 1e-12, 1, 1e-5);
    c.embd_pdrop = (real)json_number(&json, root, "embd_pdrop", 0, 0.99, 0.1);
    c.attn_pdrop = (real)json_number(&json, root, "attn_pdrop", 0, 0.99, 0.1);
    c.resid_pdrop = (real)json_number(&json, root, "resid_pdrop", 0, 0.99, 0.1);
    *tied = json_flag(&json, root, "tie_word_embeddings", 1);
    json_free(&json);
    unmap_file(map);
    return c;
}

static Config read_config(const char *folder, int *tied)
{
    char path[PATH_MAX];
    return read_config_file(join_path(path, folder, "config.json"), tied);
}

/* The shortest decimal number that is read as x: 0.1, not 0.100000001. */
static char *real_text(char text[32], real x)
{
    for (int digits = 1; digits <= 17; digits++) {
        snprintf(text, 32, "%.*g", digits, (double)x);
        if ((real)strtod(text, NULL) == x) break;
    }
    return text;
}

/* The text of config.json, as transformers writes it; the caller frees it. gelu, dtype: its names
 * of the activation function and of the weights' type; end_of_text: that token's id, or -1. */
static char *config_text_as(size_t *size, const Config *c, const char *gelu, const char *dtype,
                            int end_of_text)
{
    char *text = NULL, token[16] = "null", embd[32], attn[32], resid[32], eps[32];
    FILE *out = open_memstream(&text, size);
    if (!out) die("out of memory");
    if (end_of_text >= 0) snprintf(token, sizeof token, "%d", end_of_text);
    fprintf(out, "{\n  \"activation_function\": \"%s\",\n", gelu);
    fprintf(out, "  \"architectures\": [\n    \"GPT2LMHeadModel\"\n  ],\n");
    fprintf(out, "  \"attn_pdrop\": %s,\n", real_text(attn, c->attn_pdrop));
    fprintf(out, "  \"bos_token_id\": %s,\n", token);
    fprintf(out, "  \"embd_pdrop\": %s,\n", real_text(embd, c->embd_pdrop));
    fprintf(out, "  \"eos_token_id\": %s,\n  \"initializer_range\": 0.02,\n", token);
    fprintf(out, "  \"layer_norm_epsilon\": %s,\n  \"model_type\": \"gpt2\",\n",
            real_text(eps, c->eps));
    fprintf(out, "  \"n_ctx\": %zu,\n  \"n_embd\": %zu,\n  \"n_head\": %zu,\n", c->P, c->C, c->H);
    fprintf(out, "  \"n_inner\": %zu,\n  \"n_layer\": %zu,\n  \"n_positions\": %zu,\n", c->F, c->L,
            c->P);
    fprintf(out, "  \"resid_pdrop\": %s,\n  \"scale_attn_weights\": true,\n",
            real_text(resid, c->resid_pdrop));
    fprintf(out, "  \"summary_activation\": null,\n  \"summary_first_dropout\": 0.1,\n");
    fprintf(out, "  \"summary_proj_to_labels\": true,\n  \"summary_type\": \"cls_index\",\n");
    fprintf(out, "  \"summary_use_proj\": true,\n");
    if (end_of_text == 50256)
        fprintf(out, "  \"tokenizer_class\": \"GPT2TokenizerFast\",\n"); /* GPT-2's own */
    fprintf(out, "  \"torch_dtype\": \"%s\",\n  \"use_cache\": true,\n", dtype);
    fprintf(out, "  \"vocab_size\": %zu\n}\n", c->V);
    if (fclose(out)) die("out of memory");
    return text;
}

static char *config_text(size_t *size, const Config *c, int end_of_text)
{
    return config_text_as(size, c, c->gelu == GELU_ERF ? "gelu" : "gelu_new", "float32",
                          end_of_text);
}

/* ---- Slices: between a rank's arenas and whole tensors in files ------------------------------ */

/* Files hold whole tensors and know nothing of ranks. Each rank reads its slices from the mapped
 * file, and writes them into it: so a checkpoint saved in one layout can be loaded in any other. */

/* The arrays of a rank that are saved, and what the names of their tensors begin with. */
typedef enum { WEIGHTS, FIRST_MOMENTS, SECOND_MOMENTS } ArrayKind;
static const char *const stored_prefix[] = {"transformer.", "m.", "v."};

static char *stored_name(char name[NAME_SIZE], ArrayKind kind, const Tensor *t)
{
    char plain[NAME_SIZE];
    snprintf(name, NAME_SIZE, "%s%.40s", stored_prefix[kind], tensor_name(plain, t));
    return name;
}

/* Such an array, as reals; NULL if the weights are there only as act. */
static real *stored_array(const Rank *k, ArrayKind kind)
{
    real *const arrays[] = {k->master, k->m, k->v};
    return arrays[kind];
}

/* The shape in the file; returns the number of dimensions. Conv1D's weights are [in, out] there. */
static size_t stored_shape(size_t shape[2], const Tensor *t)
{
    shape[0] = t->spec->conv1d ? t->cols : t->rows;
    shape[1] = t->spec->conv1d ? t->rows : t->cols;
    return t->spec->cols == ONE ? 1 : 2;
}

/* Where local row i of tensor rank r's slice lies in the stored tensor: column j is element at + j
 * * step. Conv1D's weights are [in, out] there. */
typedef struct {
    size_t at, step;
} StoredRow;

static inline StoredRow stored_row(const Tensor *t, int r, size_t i)
{
    const size_t y = whole_row(t, r, i), x = whole_col(t, r);
    const StoredRow as_it_is = {y * t->cols + x, 1}, transposed = {x * t->rows + y, t->rows};
    return t->spec->conv1d ? transposed : as_it_is;
}

/* read_slice() and write_slice() go through a slice in tiles, so that neither side is read or
 * written in long leaps where the file has it transposed. Padding is left alone. */
enum { SLICE_TILE = 64 };

static void read_slice(real *slice, const StoredTensor *from, const Tensor *t, int r)
{
    const size_t rows = unpadded_rows(t, r), cols = t->local_cols;
#pragma omp parallel for if (t->n >= 1 << 16)
    for (size_t i0 = 0; i0 < rows; i0 += SLICE_TILE)
        for (size_t j0 = 0; j0 < cols; j0 += SLICE_TILE)
            for (size_t i = i0; i < min_size(i0 + SLICE_TILE, rows); i++) {
                const StoredRow row = stored_row(t, r, i);
                for (size_t j = j0; j < min_size(j0 + SLICE_TILE, cols); j++)
                    slice[i * cols + j] = stored_value(from, row.at + j * row.step);
            }
}

static void write_slice(float *to, const real *slice, const Tensor *t, int r)
{
    const size_t rows = unpadded_rows(t, r), cols = t->local_cols;
#pragma omp parallel for if (t->n >= 1 << 16)
    for (size_t i0 = 0; i0 < rows; i0 += SLICE_TILE)
        for (size_t j0 = 0; j0 < cols; j0 += SLICE_TILE)
            for (size_t i = i0; i < min_size(i0 + SLICE_TILE, rows); i++) {
                const StoredRow row = stored_row(t, r, i);
                for (size_t j = j0; j < min_size(j0 + SLICE_TILE, cols); j++)
                    to[row.at + j * row.step] = (float)slice[i * cols + j];
            }
}

/* Is none of n values NaN, infinite, or too large for a float? */
static int is_finite_slice(const real *x, size_t n)
{
    int finite = 1;
#pragma omp parallel for reduction(& : finite) if (n >= 1 << 16)
    for (size_t i = 0; i < n; i++) finite &= isfinite((float)x[i]) != 0;
    return finite;
}

/* ---- Loading --------------------------------------------------------------------------------- */

/* The tensors of the whole model, in the order of chapter 5's table; the caller frees them. */
static Tensor *list_model(size_t *n, const Config *c)
{
    static const Layout one = {1, 1, 1};
    Tensor *list = (Tensor *)xcalloc(list_tensors(NULL, NULL, c, one, 0), sizeof *list);
    *n = list_tensors(list, NULL, c, one, 0);
    return list;
}

/* Dies unless the file has all tensors of this array with the right shapes; marks them expected. */
static void expect_tensors(const Safetensors *s, const char *path, const Config *c, ArrayKind kind)
{
    size_t n;
    Tensor *list = list_model(&n, c);
    for (size_t i = 0; i < n; i++) {
        char name[NAME_SIZE], seen[SHAPE_TEXT], wanted[SHAPE_TEXT];
        size_t shape[2], dims = stored_shape(shape, &list[i]);
        StoredTensor *t = find_stored(s, stored_name(name, kind, &list[i]));
        shape_text(wanted, dims, shape);
        if (!t) die("%s: tensor %s %s of config.json is missing", path, strip_prefix(name), wanted);
        shape_text(seen, t->dims, t->shape);
        if (t->dims != dims || memcmp(t->shape, shape, dims * sizeof *shape))
            die("%s: tensor %s is %s, but config.json asks for %s", t->path, t->name, seen, wanted);
        if (t->dtype > BF16)
            die("%s: tensor %s is of type %s: real numbers are expected", t->path, t->name,
                dtype_name[t->dtype]);
        t->expected = 1;
    }
    free(list);
}

/* Older files also hold h.N.attn.bias, the causal mask, and h.N.attn.masked_bias: no weights. */
static int is_mask(const char *name)
{
    int n = 0;
    sscanf(name, "h.%*u.attn.%n", &n);
    return n && (!strcmp(name + n, "bias") || !strcmp(name + n, "masked_bias"));
}

/* Opens a model's folder, and checks all but the values of its weights. */
static Safetensors open_model(Config *c, const char *folder)
{
    int tied;
    char name[SHOWN];
    *c = read_config(folder, &tied);
    Safetensors s = safetensors_open(folder);
    expect_tensors(&s, folder, c, WEIGHTS);
    const StoredTensor *wte = find_stored(&s, "wte.weight");
    const StoredTensor *head = find_stored(&s, "lm_head.weight");
    for (size_t i = 0; i < s.tensors; i++) {
        const StoredTensor *t = &s.tensor[i];
        if (!t->expected && t != head && !is_mask(t->name))
            die("%s: tensor %s has no place in the model of config.json", t->path,
                printable(name, t->name));
    }
    if (head && (head->dtype != wte->dtype || head->bytes != wte->bytes ||
                 memcmp(head->data, wte->data, wte->bytes)))
        die("%s: lm_head.weight differs from wte.weight: untied embeddings are not supported",
            head->path);
    if (!tied && !head)
        die("%s: \"tie_word_embeddings\" is false, but lm_head.weight is missing", folder);
    return s;
}

/* Fills one array of a rank from a file that expect_tensors() has checked. */
static void load_array(Rank *k, const Safetensors *file, ArrayKind kind)
{
    real *to = stored_array(k, kind);
    for (size_t i = 0; i < k->tensors; i++) {
        const Tensor *t = &k->tensor[i];
        char name[NAME_SIZE];
        const StoredTensor *stored = find_stored(file, stored_name(name, kind, t));
        real *slice = (real *)xcalloc(t->n, sizeof *slice); /* padding stays zero */
        read_slice(slice, stored, t, tp_rank(k->layout, k->world.rank));
        if (!is_finite_slice(slice, t->n))
            die("%s: tensor %s has a value that is NaN, infinite or too large", stored->path,
                stored->name);
        if (kind == WEIGHTS) act_upload(k->weights + t->offset, slice, t->n);
        if (to) device_upload(to + t->offset, slice, t->n * sizeof *slice);
        free(slice);
    }
}

static void load_rank(Rank *k, const Safetensors *model, const Safetensors *trainer)
{
    load_array(k, model, WEIGHTS);
    if (!trainer) return;
    load_array(k, trainer, FIRST_MOMENTS);
    load_array(k, trainer, SECOND_MOMENTS);
}

/* Opens trainer.safetensors of a checkpoint and checks it against the model. */
static Safetensors open_trainer(const char *folder, const Config *c)
{
    char path[PATH_MAX], name[SHOWN];
    if (!file_exists(folder, "trainer.safetensors"))
        die("%s holds no trainer.safetensors: it cannot be resumed, but is a model to --init from",
            folder);
    Safetensors s = safetensors_open(join_path(path, folder, "trainer.safetensors"));
    expect_tensors(&s, path, c, FIRST_MOMENTS);
    expect_tensors(&s, path, c, SECOND_MOMENTS);
    for (size_t i = 0; i < s.tensors; i++)
        if (!s.tensor[i].expected)
            die("%s: tensor %s is no moment of the model", path, printable(name, s.tensor[i].name));
    return s;
}

/* The state of training stands in the file's metadata, as text: "step": "1000". */
typedef struct {
    const char *key;
    char value[32];
} Metadata;

/* The value of this key in the metadata; dies if there is none. */
static const char *find_metadata(const Safetensors *trainer, const char *key)
{
    const Json *header = &trainer->file[0].header;
    const JsonValue *metadata = json_get(header, header->value, "__metadata__");
    const char *text = metadata ? json_text(header, metadata, key) : NULL;
    if (!text) die("%s: its metadata has no \"%s\"", header->what, key);
    return text;
}

/* The same, a number in [low, high]. */
static double metadata_number(const Safetensors *trainer, const char *key, double low, double high)
{
    const char *text = find_metadata(trainer, key);
    char *end, shown[SHOWN];
    double x = strtod(text, &end);
    if (end == text || *end || !(x >= low && x <= high))
        die("%s: \"%s\" is \"%s\": a number from %.17g to %.17g is expected", trainer->file[0].path,
            key, printable(shown, text), low, high);
    return x;
}

/* The same, a whole number up to 2^53. */
static size_t metadata_count(const Safetensors *trainer, const char *key)
{
    double x = metadata_number(trainer, key, 0, 0x1p53);
    if (x != floor(x))
        die("%s: \"%s\" is %.17g, which is not whole", trainer->file[0].path, key, x);
    return (size_t)x;
}

/* ---- Folders: how a checkpoint replaces the last one ----------------------------------------- */

/* A save fills DIR.tmp, and one system call exchanges it with DIR: at any moment DIR is one whole
 * checkpoint. Systems without that call need two steps: DIR becomes DIR.old, then DIR.tmp becomes
 * DIR. If the program is killed between them, recover_checkpoint() makes DIR of DIR.old again. Only
 * files of these names are ever deleted. */
static const char *const our_files[] = {"config.json", "model.safetensors", "trainer.safetensors",
                                        "vocab.json", "merges.txt"};
enum { N_OUR_FILES = sizeof our_files / sizeof *our_files };

static int is_ours(const char *name)
{
    for (int i = 0; i < N_OUR_FILES; i++)
        if (!strcmp(name, our_files[i])) return 1;
    return 0;
}

typedef struct {
    char dir[PATH_MAX], tmp[PATH_MAX], old[PATH_MAX], parent[PATH_MAX];
} SavePaths;

static SavePaths save_paths(const char *dir)
{
    SavePaths p;
    char *resolved = realpath(dir, NULL); /* the folder itself is replaced, not a link to it */
    const char *path = resolved ? resolved : dir;
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    if (!n || n + sizeof ".tmp" > PATH_MAX) die("\"%s\" cannot be the name of a folder", dir);
    snprintf(p.dir, PATH_MAX, "%.*s", (int)n, path);
    snprintf(p.tmp, PATH_MAX, "%.*s.tmp", (int)n, path);
    snprintf(p.old, PATH_MAX, "%.*s.old", (int)n, path);
    while (n && path[n - 1] != '/') n--;
    snprintf(p.parent, PATH_MAX, "%.*s", n ? (int)n : 1, n ? path : ".");
    free(resolved);
    return p;
}

static int is_dots(const char *name) { return !strcmp(name, ".") || !strcmp(name, ".."); }

/* The name of a folder's next entry, without "." and ".."; NULL at the end. */
static const char *next_name(DIR *stream)
{
    struct dirent *entry = readdir(stream);
    while (entry && is_dots(entry->d_name)) entry = readdir(stream);
    return entry ? entry->d_name : NULL;
}

/* Counts the entries of a folder; 0 if there is no folder. name: one of them. *foreign: some are
 * not ours, and so is this one. */
static size_t look_into(const char *folder, char name[SHOWN], int *foreign)
{
    size_t n = 0;
    DIR *stream = opendir(folder);
    if (!stream && errno != ENOENT)
        die("%s cannot be opened as a folder: %s", folder, strerror(errno));
    *foreign = 0;
    if (!stream) return 0;
    for (const char *entry = next_name(stream); entry; entry = next_name(stream)) {
        n++;
        if (*foreign) continue;
        *foreign = !is_ours(entry);
        printable(name, entry);
    }
    closedir(stream);
    return n;
}

/* Deletes a folder that we wrote, if it exists. Files that a user has put there move to `keep`. */
static void delete_folder(const char *folder, const char *keep)
{
    DIR *stream = opendir(folder);
    if (!stream && errno == ENOENT) return;
    const char *name = stream ? next_name(stream) : NULL;
    for (; name; name = next_name(stream)) {
        char from[PATH_MAX], to[PATH_MAX];
        join_path(from, folder, name);
        if (is_ours(name)) unlink(from);
        else if (keep && !file_exists(keep, name)) rename(from, join_path(to, keep, name));
    }
    if (stream) closedir(stream);
    if (rmdir(folder) && errno != ENOENT)
        die("cannot delete %s, which a save left behind: %s; move it away", folder,
            strerror(errno));
}

/* Completes an exchange that was interrupted. Call it before looking for a checkpoint in dir. */
static void recover_checkpoint(const char *dir)
{
    if (!is_writer(NULL)) return;
    SavePaths p = save_paths(dir);
    int between = access(p.dir, F_OK) && !access(p.old, F_OK) && !access(p.tmp, F_OK);
    if (between && rename(p.old, p.dir))
        die("cannot rename %s to %s: %s", p.old, p.dir, strerror(errno));
}

static int same_place(const struct stat *a, const struct stat *b)
{
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

/* No two runs may save to one folder: each locks the empty file DIR.lock, which stays. */
static void lock_save_folder(const SavePaths *p)
{
    char path[PATH_MAX];
    struct flock lock;
    memset(&lock, 0, sizeof lock); /* from the beginning to the end */
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    snprintf(path, sizeof path, "%.*s.lock", PATH_MAX - 6, p->dir);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666); /* stays open */
    if (fd < 0) die("cannot create %s: %s", path, strerror(errno));
    if (fcntl(fd, F_SETLK, &lock))
        die("another run is saving to %s: wait for its end, or choose another folder", p->dir);
}

/* Dies unless dir can be created, or is empty, or is the checkpoint that the run resumed from
 * (NULL: none). Called at the start: no run shall fail at its first save, hours later, and none
 * shall overwrite a folder that is not its own. */
static void check_save_folder(const char *dir, const char *resumed)
{
    struct stat own, other;
    char name[SHOWN];
    int foreign;
    recover_checkpoint(dir);
    SavePaths p = save_paths(dir);
    int exists = !stat(p.dir, &own);
    if (!exists && !lstat(p.dir, &own))
        die("%s is a link to what is not there: remove it, or save elsewhere", dir);
    int is_resumed = exists && resumed && !stat(resumed, &other) && same_place(&own, &other);
    if (look_into(p.dir, name, &foreign) && !is_resumed)
        die("%s holds %s already: save to a new folder%s", dir, name,
            foreign ? "" : ", or --resume this one");
    if (exists && !stat(".", &other) && same_place(&own, &other))
        die("%s is the working folder: save to a folder in it, since saving replaces the whole "
            "folder",
            dir);
    if ((look_into(p.tmp, name, &foreign) && foreign) ||
        (look_into(p.old, name, &foreign) && foreign))
        die("saving to %s needs the name %s.tmp or .old, but there is %s in it: move it away", dir,
            p.dir, name);
    lock_save_folder(&p);
    delete_folder(p.tmp, NULL);
    if (mkdir(p.tmp, 0777) || stat(p.tmp, &other))
        die("cannot create %s: %s", p.tmp, strerror(errno));
    rmdir(p.tmp);
    if (exists && own.st_dev != other.st_dev)
        die("%s is a mount point: save to a folder in it", dir);
}

/* Exchanges two folders in one step. Returns 0, or another number if the system cannot. */
static int exchange_folders(const char *a, const char *b)
{
#if defined __linux__ && defined SYS_renameat2
    return (int)syscall(SYS_renameat2, AT_FDCWD, a, AT_FDCWD, b, 2u /* RENAME_EXCHANGE */);
#else
    (void)a;
    (void)b;
    return -1;
#endif
}

/* Replaces DIR by DIR.tmp in two steps. */
static void step_aside(const SavePaths *p)
{
    delete_folder(p->old, p->dir);
    if (rename(p->dir, p->old) || rename(p->tmp, p->dir))
        die("cannot replace %s: %s", p->dir, strerror(errno));
}

static void sync_path(const char *path)
{
    int fd = open(path, O_RDONLY);
    if (fd < 0 || (fsync(fd) && errno != EINVAL))
        die("cannot bring %s to the disk: %s", path, strerror(errno));
    close(fd);
}

/* DIR.tmp is complete and becomes DIR. The last checkpoint is deleted after that is on the disk. */
static void put_in_place(const SavePaths *p)
{
    char path[PATH_MAX];
    for (int i = 0; i < N_OUR_FILES; i++)
        if (file_exists(p->tmp, our_files[i])) sync_path(join_path(path, p->tmp, our_files[i]));
    sync_path(p->tmp);
    if (rename(p->tmp, p->dir)) { /* succeeds if there is no DIR, or an empty one */
        if (errno != EEXIST && errno != ENOTEMPTY)
            die("cannot create %s: %s", p->dir, strerror(errno));
        if (exchange_folders(p->tmp, p->dir)) step_aside(p);
    }
    sync_path(p->parent);
    delete_folder(p->tmp, p->dir);
    delete_folder(p->old, p->dir);
}

/* ---- Saving ---------------------------------------------------------------------------------- */

/* Makes a new file n bytes long and reserves space on the disk. Returns 0 or an error number. */
static int reserve(int fd, size_t n)
{
#if defined _POSIX_ADVISORY_INFO && _POSIX_ADVISORY_INFO > 0
    int error = posix_fallocate(fd, 0, (off_t)n);
    int cannot = error == EINVAL || error == EOPNOTSUPP; /* n is 0, or this disk does not reserve */
    if (!cannot) return error;
#endif
    return ftruncate(fd, (off_t)n) ? errno : 0;
}

/* Writes a new file: n bytes, and space for `more`. A full disk is noticed before any harm. */
static void write_file(const char *folder, const char *name, const char *data, size_t n,
                       size_t more)
{
    char path[PATH_MAX];
    int fd = open(join_path(path, folder, name), O_WRONLY | O_CREAT | O_EXCL, 0666);
    int error = fd < 0 ? errno : reserve(fd, n + more);
    for (size_t done = 0; !error && done < n;) {
        ssize_t written = write(fd, data + done, n - done);
        if (written > 0) done += (size_t)written;
        else if (errno != EINTR) error = errno;
    }
    if (fd >= 0 && close(fd) && !error) error = errno;
    if (!error) return;
    delete_folder(folder, NULL);
    die("cannot save %s of %zu bytes: %s; an earlier checkpoint is as it was", path, n + more,
        strerror(error));
}

/* Creates a safetensors file for the whole model's arrays first .. last, without values yet. */
static void create_tensors(const char *folder, const char *name, const Config *c, int first,
                           int last, const Metadata *metadata, size_t entries)
{
    char *text = NULL, shape_shown[SHAPE_TEXT], stored[NAME_SIZE];
    size_t size = 0, begin = 0, n;
    FILE *out = open_memstream(&text, &size);
    if (!out) die("out of memory");
    Tensor *list = list_model(&n, c);
    fputs("LENGTH..{\"__metadata__\":{\"format\":\"pt\"", out); /* LENGTH..: see below */
    for (size_t i = 0; i < entries; i++) {
        fputc(',', out);
        json_write_string(out, metadata[i].key, strlen(metadata[i].key));
        fputc(':', out);
        json_write_string(out, metadata[i].value, strlen(metadata[i].value));
    }
    fputc('}', out);
    for (int kind = first; kind <= last; kind++)
        for (size_t i = 0; i < n; i++) {
            size_t shape[2], dims = stored_shape(shape, &list[i]);
            size_t end = begin + list[i].rows * list[i].cols * sizeof(float);
            fprintf(out, ",\"%s\":{\"dtype\":\"F32\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
                    stored_name(stored, (ArrayKind)kind, &list[i]),
                    shape_text(shape_shown, dims, shape), begin, end);
            begin = end;
        }
    fputc('}', out);
    fflush(out);
    fprintf(out, "%*s", (int)((64 - size % 64) % 64), ""); /* tensors start on a cache line */
    if (fclose(out)) die("out of memory");
    uint64_t length = size - 8;
    memcpy(text, &length, 8);
    write_file(folder, name, text, size, begin);
    free(text);
    free(list);
}

/* Copies vocab.json and merges.txt, which OpenAI called encoder.json and vocab.bpe. */
static void copy_tokenizer(const char *to, const char *from)
{
    static const char *const names[2][2] = {{"vocab.json", "encoder.json"},
                                            {"merges.txt", "vocab.bpe"}};
    for (int i = 0; i < 2; i++) {
        const char *name = names[i][!file_exists(from, names[i][0])];
        char path[PATH_MAX];
        if (!file_exists(from, name)) continue;
        Map map = map_file(join_path(path, from, name));
        write_file(to, names[i][0], map.data, map.size, 0);
        unmap_file(map);
    }
}

/* Writes this rank's slices of the arrays first .. last; of equal slices, one rank writes one. */
static void save_arrays(const Rank *k, const char *folder, const char *name, int first, int last)
{
    char path[PATH_MAX], key[NAME_SIZE];
    /* The header tells where each tensor lies. */
    Safetensors file = safetensors_open(join_path(path, folder, name));
    Map map = file.file[0].map;
    int fd = open(path, O_RDWR);
    if (fd < 0) die("cannot open %s: %s", path, strerror(errno));
    char *base = (char *)mmap(NULL, map.size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == (char *)MAP_FAILED) die("cannot map %s: %s", path, strerror(errno));
    close(fd);
    for (int kind = first; kind <= last; kind++)
        for (size_t i = 0; i < k->tensors; i++) {
            const Tensor *t = &k->tensor[i];
            const real *from = stored_array(k, (ArrayKind)kind);
            const StoredTensor *stored = find_stored(&file, stored_name(key, (ArrayKind)kind, t));
            if (!t->counted) continue;
            real *slice = (real *)xcalloc(t->n, sizeof *slice);
            if (from) device_download(slice, from + t->offset, t->n * sizeof *slice);
            else act_download(slice, k->weights + t->offset, t->n);
            if (!is_finite_slice(slice, t->n))
                die("%s has become NaN or infinite: not saved; an earlier checkpoint is as it was",
                    key);
            float *to = (float *)(void *)(base + (stored->data - map.data));
            write_slice(to, slice, t, tp_rank(k->layout, k->world.rank));
            free(slice);
        }
    if (msync(base, map.size, MS_SYNC)) die("cannot write %s: %s", path, strerror(errno));
    munmap(base, map.size);
    safetensors_close(&file);
}

/* Saves a checkpoint; without moments, only a model. All ranks call it together, after
 * check_save_folder(). tokenizer: the folder of vocab.json and merges.txt, or NULL; end_of_text:
 * that token's id, or -1. */
static void save_checkpoint(Rank *k, const char *dir, const char *tokenizer, int end_of_text,
                            const Metadata *metadata, size_t entries)
{
    SavePaths p = save_paths(dir);
    barrier(&k->world); /* all have resolved the paths before rank 0 changes the folders */
    if (is_writer(&k->world)) {
        size_t size;
        char *config = config_text(&size, &k->config, end_of_text);
        delete_folder(p.tmp, NULL);
        if (mkdir(p.tmp, 0777)) die("cannot create %s: %s", p.tmp, strerror(errno));
        write_file(p.tmp, "config.json", config, size, 0);
        create_tensors(p.tmp, "model.safetensors", &k->config, WEIGHTS, WEIGHTS, NULL, 0);
        if (k->m)
            create_tensors(p.tmp, "trainer.safetensors", &k->config, FIRST_MOMENTS, SECOND_MOMENTS,
                           metadata, entries);
        if (tokenizer) copy_tokenizer(p.tmp, tokenizer);
        free(config);
    }
    barrier(&k->world);
    if (dp_rank(k->layout, k->world.rank) == 0) {
        save_arrays(k, p.tmp, "model.safetensors", WEIGHTS, WEIGHTS);
        if (k->m) save_arrays(k, p.tmp, "trainer.safetensors", FIRST_MOMENTS, SECOND_MOMENTS);
    }
    barrier(&k->world);
    if (is_writer(&k->world)) put_in_place(&p);
    barrier(&k->world);
}

/* ---- info ------------------------------------------------------------------------------------ */

static void print_config(Emitter *e, const Config *c)
{
    emit_open(e, "config", '{');
    emit_count(e, "layers", "GPT-2: %zu layers, ", c->L);
    emit_count(e, "hidden", "hidden size %zu, ", c->C);
    emit_count(e, "heads", "%zu heads, ", c->H);
    emit_count(e, "mlp", "MLP width %zu, ", c->F);
    emit_count(e, "positions", "%zu positions, ", c->P);
    emit_count(e, "vocab", "%zu tokens; ", c->V);
    emit_count(e, "parameters", "%zu parameters\n", count_parameters(c));
    emit_close(e, '}');
}

static void print_tensor(Emitter *e, const StoredTensor *t)
{
    char shape[SHAPE_TEXT], name[SHOWN];
    emit_open(e, NULL, '{');
    emit_text(e, "%-32s ", printable(name, t->name));
    emit_string(e, "name", NULL, t->name);
    emit_string(e, "dtype", "%-4s ", dtype_name[t->dtype]);
    emit_text(e, "%-14s ", shape_text(shape, t->dims, t->shape));
    emit_open(e, "shape", '[');
    for (size_t i = 0; i < t->dims; i++) emit_count(e, NULL, NULL, t->shape[i]);
    emit_close(e, ']');
    emit_count(e, "bytes", "%12zu bytes\n", t->bytes);
    emit_close(e, '}');
}

/* Prints the tensors of a model's folder or of one file, in the file's order. */
static void print_info(const char *path, int json)
{
    Safetensors s = safetensors_open(path);
    size_t elements = 0, bytes = 0;
    int tied, is_model = file_exists(path, "config.json");
    Config c = is_model ? read_config(path, &tied) : make_config(0, 0, 0, 0, 0);
    Emitter e = make_emitter(stdout, json);
    emit_open(&e, NULL, '{');
    if (is_model) print_config(&e, &c);
    emit_open(&e, "tensors", '[');
    qsort(s.tensor, s.tensors, sizeof *s.tensor, compare_places);
    for (size_t i = 0; i < s.tensors; i++) {
        print_tensor(&e, &s.tensor[i]);
        elements += s.tensor[i].n;
        bytes += s.tensor[i].bytes;
    }
    emit_close(&e, ']');
    emit_open(&e, "totals", '{');
    emit_count(&e, "tensors", "%zu tensors, ", s.tensors);
    emit_count(&e, "elements", "%zu elements, ", elements);
    emit_count(&e, "bytes", "%zu bytes\n", bytes);
    emit_close(&e, '}');
    emit_close(&e, '}');
    safetensors_close(&s);
}

/* =================================================================================================
 * Chapter 15. Text
 *
 * GPT-2's byte-level byte-pair encoding makes numbers of text. A text is cut into words, and a word
 * begins as a row of bytes. A list of pairs says which neighbours merge into one token: the pair
 * that stands first in the list merges first, until no pair of the list is left in the word. Every
 * byte is a token: so any bytes can be encoded, and decoding gives them back.
 *
 * Texts and indexed datasets are read here into the documents of a Corpus; chapter 7 makes samples
 * of them.
 * ============================================================================================== */

enum { CLASS_OTHER, CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE }; /* of characters */
static int class_of(uint32_t code);

static const char END_OF_TEXT[] = "<|endoftext|>";

static void push_token(Tokens *tokens, int id)
{
    tokens->id = (int *)grow(tokens->id, tokens->n, &tokens->capacity, sizeof(int));
    tokens->id[tokens->n++] = id;
}

/* ---- Words: the pre-tokeniser ---------------------------------------------------------------- */

enum { NOT_A_CHARACTER = 0x110000 }; /* behind the last code point: a byte that is not UTF-8 */

/* The character that begins the n > 0 bytes of text: its code point; returns its length in bytes. A
 * byte that begins no well-formed character is a character by itself. */
static size_t next_character(uint32_t *code, const char *text, size_t n)
{
    size_t length = read_utf8(code, text, n);
    if (!length) *code = NOT_A_CHARACTER;
    return max_size(length, 1);
}

/* The length of the white-space character at text, 0 if it is another one. Python's strip(),
 * split() and \s know four control characters more than White_Space; so does this. */
static size_t space_at(const char *text, size_t n)
{
    uint32_t code;
    if (!n) return 0;
    size_t length = next_character(&code, text, n);
    return class_of(code) == CLASS_SPACE || (code >= 0x1C && code <= 0x1F) ? length : 0;
}

/* The length of the white-space character that ends the n bytes of text, 0 if none does. */
static size_t space_before(const char *text, size_t n)
{
    for (size_t back = 1; back <= 4 && back <= n; back++)
        if (space_at(text + n - back, back) == back) return back;
    return 0;
}

/* Python's str.strip(): no white space at both ends. Returns the new begin; *n: the new length. */
static const char *strip(const char *text, size_t *n)
{
    while (space_before(text, *n)) *n -= space_before(text, *n);
    const char *end = text + *n;
    while (space_at(text, (size_t)(end - text))) text += space_at(text, (size_t)(end - text));
    *n = (size_t)(end - text);
    return text;
}

/* The length of the contraction that begins the text, or 0. */
static size_t contraction(const char *text, size_t n)
{
    static const char *const endings[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    if (*text != '\'') return 0;
    for (size_t i = 0; i < sizeof endings / sizeof *endings; i++) {
        size_t length = strlen(endings[i]);
        if (n >= length && !memcmp(text, endings[i], length)) return length;
    }
    return 0;
}

/* The end of the word that begins at start < n. GPT-2 finds words by a regular expression,
 *     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 * A word is a run of characters of one class, perhaps with one blank before it. */
static size_t word_end(const char *text, size_t n, size_t start)
{
    size_t end = start + contraction(text + start, n - start);
    if (end > start) return end;

    uint32_t code;
    size_t last = start; /* where the run's last character begins */
    next_character(&code, text + start, n - start);
    if (code == ' ' && start + 1 < n) {
        next_character(&code, text + start + 1, n - start - 1);
        if (class_of(code) != CLASS_SPACE) end = start + 1; /* " word" */
    }
    int kind = class_of(code);
    while (end < n) {
        size_t length = next_character(&code, text + end, n - end);
        if (class_of(code) != kind) break;
        last = end;
        end += length;
    }
    /* The last white space before a word belongs to that word: \s+(?!\S). */
    return kind == CLASS_SPACE && end < n && last > start ? last : end;
}

/* ---- Byte-pair encoding ---------------------------------------------------------------------- */

typedef struct {
    const char *bytes;
    size_t n;
    int id;
} Token;

typedef struct {
    uint32_t left, right; /* two neighbours that .. */
    uint32_t rank, id;    /* .. merge into this token, the lowest rank first */
} Merge;

struct Tokenizer {
    size_t vocabulary;
    int end_of_text;  /* id of <|endoftext|>, -1 if there is none */
    Token *token;     /* (vocabulary) by id */
    char *bytes;      /* the tokens' bytes */
    int byte_id[256]; /* the token of a single byte */
    Merge *merge;     /* sorted by left, then right, for binary search: no input makes it slow */
    size_t *row;      /* (vocabulary + 1) where in `merge` those of each left token begin */
};

/* The merge of two neighbours, or NULL. */
static const Merge *find_merge(const Tokenizer *t, uint32_t left, uint32_t right)
{
    size_t low = t->row[left], high = t->row[left + 1];
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (t->merge[middle].right == right) return &t->merge[middle];
        if (t->merge[middle].right < right) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

/* A word while its symbols merge: a linked list of symbols, each at the position of its first byte,
 * and a heap of all merges that are possible now. A word of n bytes takes O(n log n), even if it is
 * one letter a million times. The heap never has more than 2n entries: it begins with n - 1, and
 * each merge takes one away and adds two. */
typedef struct {
    uint32_t *id, *before, *after; /* (capacity) token and neighbours; after = n: no more */
    uint64_t *heap; /* (2 capacity) rank << 32 | position of the left symbol, the smallest first */
    size_t capacity, n, entries;
} Word;

static const uint32_t MERGED = UINT32_MAX; /* the id of a symbol that is part of its left one now */

/* The merge of the symbol at position i with the next one, or NULL. */
static const Merge *merge_at(const Word *w, const Tokenizer *t, uint32_t i)
{
    if (w->id[i] == MERGED || w->after[i] >= w->n) return NULL;
    return find_merge(t, w->id[i], w->id[w->after[i]]);
}

/* Adds the merge at position i to the heap, if there is one. */
static void heap_push(Word *w, const Tokenizer *t, uint32_t i)
{
    const Merge *merge = merge_at(w, t, i);
    if (!merge) return;
    uint64_t key = (uint64_t)merge->rank << 32 | i;
    size_t at = w->entries++;
    for (; at > 0 && w->heap[(at - 1) / 2] > key; at = (at - 1) / 2)
        w->heap[at] = w->heap[(at - 1) / 2];
    w->heap[at] = key;
}

/* Takes the smallest entry off the heap. */
static uint64_t heap_pop(Word *w)
{
    w->entries--;
    uint64_t top = w->heap[0], key = w->heap[w->entries];
    size_t at = 0;
    for (size_t child = 1; child < w->entries; child = 2 * at + 1) {
        if (child + 1 < w->entries && w->heap[child + 1] < w->heap[child]) child++;
        if (w->heap[child] >= key) break;
        w->heap[at] = w->heap[child];
        at = child;
    }
    w->heap[at] = key;
    return top;
}

/* Appends the tokens of one word. */
static void encode_word(Tokens *out, const Tokenizer *t, Word *w, const char *text, size_t n)
{
    if (n > UINT32_MAX / 2)
        die("a word of %zu bytes: a text with so long a word cannot be encoded", n);
    if (n > w->capacity) {
        free(w->id);
        free(w->heap);
        w->capacity = max_size(n, 2 * w->capacity);
        w->id = (uint32_t *)xcalloc(3 * w->capacity, sizeof(uint32_t));
        w->before = w->id + w->capacity;
        w->after = w->before + w->capacity;
        w->heap = (uint64_t *)xcalloc(2 * w->capacity, sizeof(uint64_t));
    }
    w->n = n;
    w->entries = 0;
    for (uint32_t i = 0; i < n; i++) {
        w->id[i] = (uint32_t)t->byte_id[(unsigned char)text[i]];
        w->before[i] = i - 1;
        w->after[i] = i + 1;
    }
    for (uint32_t i = 0; i + 1 < n; i++) heap_push(w, t, i);
    while (w->entries) {
        uint64_t key = heap_pop(w);
        uint32_t i = (uint32_t)key;
        const Merge *merge = merge_at(w, t, i);
        if (!merge || merge->rank != key >> 32) continue; /* old: a neighbour has merged since */
        uint32_t next = w->after[i];
        w->id[i] = merge->id;
        w->id[next] = MERGED;
        w->after[i] = w->after[next];
        if (w->after[i] < n) w->before[w->after[i]] = i;
        heap_push(w, t, i);
        if (i > 0) heap_push(w, t, w->before[i]);
    }
    for (uint32_t i = 0; i < n; i = w->after[i]) push_token(out, (int)w->id[i]);
}

/* Appends the tokens of a text. <|endoftext|> is the one special token, as in Hugging Face's. */
static void encode_part(Tokens *out, const Tokenizer *t, const char *text, size_t n)
{
    Word word = {NULL, NULL, NULL, NULL, 0, 0, 0};
    size_t special = sizeof(END_OF_TEXT) - 1;
    for (size_t start = 0; start < n;) {
        const char *found = NULL;
        if (t->end_of_text >= 0)
            found = (const char *)memmem(text + start, n - start, END_OF_TEXT, special);
        size_t stop = found ? (size_t)(found - text) : n;
        for (size_t end; start < stop; start = end) {
            end = word_end(text, stop, start);
            encode_word(out, t, &word, text + start, end - start);
        }
        if (!found) continue;
        push_token(out, t->end_of_text);
        start += special;
    }
    free(word.id);
    free(word.heap);
}

/* Does a word end between these two bytes, whatever the text before and behind them is? */
static int may_end_part(char a, char b) { return a > ' ' && a < 0x7F && (b == ' ' || b == '\n'); }

/* Appends the tokens of a text. Threads encode parts of a long one at the same time. */
static void encode(Tokens *out, const Tokenizer *t, const char *text, size_t n)
{
    enum { PART = 1 << 17 }; /* bytes */
    Tokens *part = (Tokens *)xcalloc(n / PART + 1, sizeof(Tokens));
    size_t *start = (size_t *)xcalloc(n / PART + 2, sizeof(size_t)), parts = 0;
    while (start[parts] < n) {
        size_t end = min_size(start[parts] + PART, n);
        while (end < n && !may_end_part(text[end - 1], text[end])) end++;
        parts++;
        start[parts] = end;
    }
#pragma omp parallel for schedule(dynamic) if (parts > 1)
    for (size_t i = 0; i < parts; i++)
        encode_part(&part[i], t, text + start[i], start[i + 1] - start[i]);
    for (size_t i = 0; i < parts; i++) {
        for (size_t j = 0; j < part[i].n; j++) push_token(out, part[i].id[j]);
        free(part[i].id);
    }
    free(part);
    free(start);
}

/* The n bytes of a token; none for an id that only the model's larger vocabulary has. */
static const char *decode(size_t *n, const Tokenizer *t, int id)
{
    int known = id >= 0 && (size_t)id < t->vocabulary;
    *n = known ? t->token[id].n : 0;
    return known ? t->token[id].bytes : "";
}

/* ---- vocab.json and merges.txt --------------------------------------------------------------- */

enum { BYTE_CHARACTERS = 324 };

/* These files write each byte as one character: itself if it is visible in Latin-1, else one from
 * U+0100 on. byte_of: the byte of each character, -1 if there is none. */
static void byte_characters(int byte_of[BYTE_CHARACTERS])
{
    int next = 256;
    for (int c = 0; c < BYTE_CHARACTERS; c++) byte_of[c] = -1;
    for (int b = 0; b < 256; b++) {
        if ((b >= '!' && b <= '~') || (b >= 0xA1 && b != 0xAD)) byte_of[b] = b;
        else byte_of[next++] = b;
    }
}

/* out = the bytes that a token's name stands for. Returns how many; 0: it is no such name. */
static size_t bytes_of_name(char *out, const int byte_of[BYTE_CHARACTERS], const char *name,
                            size_t n)
{
    size_t count = 0;
    uint32_t code;
    for (size_t i = 0; i < n; count++) {
        i += next_character(&code, name + i, n - i);
        if (code >= BYTE_CHARACTERS || byte_of[code] < 0) return 0;
        out[count] = (char)byte_of[code];
    }
    return count;
}

static int compare_tokens(const void *a, const void *b)
{
    const Token *x = (const Token *)a, *y = (const Token *)b;
    int order = memcmp(x->bytes, y->bytes, min_size(x->n, y->n));
    return order ? order : (x->n > y->n) - (x->n < y->n);
}

static int compare_merges(const void *a, const void *b)
{
    const Merge *x = (const Merge *)a, *y = (const Merge *)b;
    uint64_t p = (uint64_t)x->left << 32 | x->right, q = (uint64_t)y->left << 32 | y->right;
    return (p > q) - (p < q);
}

/* The id of the token of these bytes, -1 if there is none. */
static int token_id(const Token *sorted, size_t vocabulary, const char *bytes, size_t n)
{
    Token key = {bytes, n, 0};
    const Token *found =
        (const Token *)bsearch(&key, sorted, vocabulary, sizeof(Token), compare_tokens);
    return found ? found->id : -1;
}

/* Reads {"!": 0, "\"": 1, ..}: n tokens with the ids 0 .. n-1. */
static void load_vocabulary(Tokenizer *t, const char *path, const int byte_of[BYTE_CHARACTERS])
{
    Map map = map_file(path);
    Json json = json_parse(map.data, map.size, path);
    const JsonValue *root = json.value;
    size_t used = 0;
    char shown[SHOWN];

    if (root->type != JSON_OBJECT || !root->length || root->length > INT_MAX)
        die("%s is not a JSON object of tokens with their ids", path);
    t->vocabulary = root->length;
    t->token = (Token *)xcalloc(t->vocabulary, sizeof(Token));
    t->bytes = (char *)xcalloc(map.size, 1); /* a token is never longer than its name in the file */
    for (size_t i = 1; i < root->end; i = json.value[i].end) {
        const JsonValue *v = &json.value[i];
        size_t n = bytes_of_name(t->bytes + used, byte_of, v->key, strlen(v->key));
        printable(shown, v->key);
        if (!n) die("%s: \"%s\" is not in GPT-2's alphabet of byte-level tokens", path, shown);
        if (!json_is_count(v, (double)(root->length - 1)))
            die("%s: the id of \"%s\" must be an integer below %zu, the number of tokens", path,
                shown, root->length);
        Token token = {t->bytes + used, n, (int)v->number};
        if (t->token[token.id].n)
            die("%s: the id %d is given twice, now to \"%s\"", path, token.id, shown);
        t->token[token.id] = token;
        used += n;
    }
    json_free(&json);
    unmap_file(map);
}

/* Reads a line "left right" for each merge, the lowest rank first, after "#version: .." or not. */
static void load_merges(Tokenizer *t, const char *path, const int byte_of[BYTE_CHARACTERS],
                        const Token *sorted)
{
    static const char *const which[] = {"the left token", "the right token",
                                        "what the two tokens merge into"};
    Map map = map_file(path), rest = map;
    char *pair = (char *)xcalloc(map.size, 1); /* the bytes of left, and behind them of right */
    size_t n = 0, capacity = 0;
    for (size_t number = 1; rest.size; number++) {
        Map line = next_line(&rest);
        const char *end = line.data + line.size;
        if (end > line.data && end[-1] == '\n') end--;
        if (end > line.data && end[-1] == '\r') end--;
        if (number == 1 && end - line.data >= 8 && !memcmp(line.data, "#version", 8)) continue;
        if (end == line.data) continue;

        const char *blank = (const char *)memchr(line.data, ' ', (size_t)(end - line.data));
        size_t left = 0, right = 0;
        if (blank) left = bytes_of_name(pair, byte_of, line.data, (size_t)(blank - line.data));
        if (left) right = bytes_of_name(pair + left, byte_of, blank + 1, (size_t)(end - blank - 1));
        if (!right)
            die("%s line %zu: expected two byte-level tokens with one blank between them", path,
                number);
        int id[3] = {token_id(sorted, t->vocabulary, pair, left),
                     token_id(sorted, t->vocabulary, pair + left, right),
                     token_id(sorted, t->vocabulary, pair, left + right)};
        for (int i = 0; i < 3; i++)
            if (id[i] < 0)
                die("%s line %zu: %s is not in the vocabulary: do both files belong to one "
                    "tokenizer?",
                    path, number, which[i]);
        Merge merge = {(uint32_t)id[0], (uint32_t)id[1], (uint32_t)n, (uint32_t)id[2]};
        t->merge = (Merge *)grow(t->merge, n, &capacity, sizeof(Merge));
        t->merge[n++] = merge;
    }
    if (n) qsort(t->merge, n, sizeof(Merge), compare_merges);
    for (size_t i = 0; i < n; i++) {
        if (i && !compare_merges(&t->merge[i - 1], &t->merge[i]))
            die("%s: merges %u and %u are of the same two tokens", path, t->merge[i - 1].rank,
                t->merge[i].rank);
        t->row[t->merge[i].left + 1]++;
    }
    for (size_t i = 0; i < t->vocabulary; i++) t->row[i + 1] += t->row[i];
    free(pair);
    unmap_file(map);
}

/* Reads a folder's vocab.json and merges.txt, or encoder.json and vocab.bpe, their older names. */
static Tokenizer *tokenizer_open(const char *folder)
{
    Tokenizer *t = (Tokenizer *)xcalloc(1, sizeof(Tokenizer));
    int old = !file_exists(folder, "vocab.json") && file_exists(folder, "encoder.json");
    int byte_of[BYTE_CHARACTERS];
    char path[PATH_MAX];

    byte_characters(byte_of);
    load_vocabulary(t, join_path(path, folder, old ? "encoder.json" : "vocab.json"), byte_of);
    t->row = (size_t *)xcalloc(t->vocabulary + 1, sizeof(size_t));
    Token *sorted = (Token *)xcalloc(t->vocabulary, sizeof(Token)); /* by bytes */
    memcpy(sorted, t->token, t->vocabulary * sizeof(Token));
    qsort(sorted, t->vocabulary, sizeof(Token), compare_tokens);
    for (int b = 0; b < 256; b++) {
        char byte = (char)b;
        t->byte_id[b] = token_id(sorted, t->vocabulary, &byte, 1);
        if (t->byte_id[b] < 0)
            die("%s has no token for the byte 0x%02X: all 256 are expected", path, (unsigned)b);
    }
    t->end_of_text = token_id(sorted, t->vocabulary, END_OF_TEXT, sizeof(END_OF_TEXT) - 1);
    load_merges(t, join_path(path, folder, old ? "vocab.bpe" : "merges.txt"), byte_of, sorted);
    free(sorted);
    return t;
}

/* For models without a tokenizer: ids 0..255 are the bytes, 256 is <|endoftext|>. */
static Tokenizer *tokenizer_bytes(void)
{
    Tokenizer *t = (Tokenizer *)xcalloc(1, sizeof(Tokenizer));
    t->vocabulary = 257;
    t->end_of_text = 256;
    t->token = (Token *)xcalloc(257, sizeof(Token));
    t->bytes = (char *)xcalloc(256, 1);
    t->row = (size_t *)xcalloc(258, sizeof(size_t));
    for (int b = 0; b < 256; b++) {
        Token token = {t->bytes + b, 1, b};
        t->bytes[b] = (char)b;
        t->byte_id[b] = b;
        t->token[b] = token;
    }
    Token special = {END_OF_TEXT, sizeof(END_OF_TEXT) - 1, 256};
    t->token[256] = special;
    return t;
}

static void tokenizer_close(Tokenizer *t)
{
    free(t->token);
    free(t->bytes);
    free(t->merge);
    free(t->row);
    free(t);
}

/* ---- Documents ------------------------------------------------------------------------------- */

/* The memory of documents' tokens: those of a text, or a mapped PREFIX.bin. */
struct Storage {
    int *id;
    Map map;
};

static void add_storage(Corpus *c, int *id, Map map)
{
    Storage storage = {id, map};
    c->storage = (Storage *)grow(c->storage, c->stores, &c->storage_capacity, sizeof(Storage));
    c->storage[c->stores++] = storage;
}

static void add_document(Corpus *c, const char *path, const char *data, size_t width, size_t n)
{
    Document d = {data, width, n, n};
    uint32_t largest = 0;
    if (n == 0) return;
#pragma omp parallel for reduction(max : largest) if (n > 1 << 20)
    for (size_t i = 0; i < n; i++) {
        uint32_t id = (uint32_t)document_token(&d, i, 0); /* a negative one becomes very large */
        if (id > largest) largest = id;
    }
    if (largest >= c->vocabulary)
        die("%s has the token %d, but the vocabulary %zu tokens: it needs another tokenizer or "
            "model",
            path, (int)largest, c->vocabulary);
    d.length += c->end_of_text >= 0 && document_token(&d, n - 1, 0) != c->end_of_text;
    c->document =
        (Document *)grow(c->document, c->documents, &c->document_capacity, sizeof(Document));
    c->document[c->documents++] = d;
    c->tokens += d.length;
}

/* Encodes a text and adds its documents: each ends at <|endoftext|> or at the end of the file. */
static void add_text(Corpus *c, const Tokenizer *t, const char *path)
{
    Tokens text = {NULL, 0, 0};
    Map map = map_file(path), none = {"", 0};
    encode(&text, t, map.data, map.size);
    unmap_file(map);
    add_storage(c, text.id, none);
    size_t end;
    for (size_t start = 0; start < text.n; start = end + 1) {
        end = start;
        while (end < text.n && text.id[end] != c->end_of_text) end++;
        add_document(c, path, (const char *)(text.id + start), sizeof(int), end - start);
    }
}

static uint64_t little_endian(const char *p, size_t bytes)
{
    uint64_t x = 0;
    memcpy(&x, p, bytes);
    return x;
}

/* Megatron's indexed dataset, version 1. PREFIX.bin holds the tokens. PREFIX.idx holds,
 * little-endian and unaligned:
 *
 *     "MMIDIDX\0\0"   u64 version = 1   u8 type of a token   u64 n sequences   u64 m marks
 *     i32 tokens[n]   i64 byte in PREFIX.bin[n]   i64 mark[m]
 *
 * Document i is the sequences mark[i] .. mark[i+1] - 1. */
enum { INDEX_HEADER = 34, TYPE_INT32 = 4, TYPE_UINT16 = 8 };
static const char INDEX_MAGIC[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};

static void add_indexed(Corpus *c, const char *prefix)
{
    static const char *const types[8] = {"no type", "uint8", "int8",    "int16",
                                         "int32",   "int64", "float32", "float64"};
    char path[PATH_MAX];
    Map bin = map_file(extend_path(path, prefix, ".bin"));
    Map index = map_file(extend_path(path, prefix, ".idx"));
    const char *p = index.data;
    add_storage(c, NULL, bin);

    if (index.size < INDEX_HEADER || memcmp(p, INDEX_MAGIC, sizeof(INDEX_MAGIC)) ||
        little_endian(p + 9, 8) != 1)
        die("%s is not a Megatron indexed dataset of version 1, which begins with MMIDIDX", path);
    int type = (unsigned char)p[17];
    size_t n = little_endian(p + 18, 8), m = little_endian(p + 26, 8);
    size_t width = type == TYPE_UINT16 ? 2 : 4, end = 0;
    if (type != TYPE_UINT16 && type != TYPE_INT32)
        die("%s has tokens of type %d (%s); only int32 (4) and uint16 (8) are read", path, type,
            type < 8 ? types[type] : "unknown");
    if (n > index.size / 12 || m > index.size / 8 || INDEX_HEADER + 12 * n + 8 * m != index.size)
        die("%s has %zu bytes, which is not what %zu sequences and %zu document marks take: it is "
            "damaged",
            path, index.size, n, m);

    const char *sizes = p + INDEX_HEADER, *pointers = sizes + 4 * n, *marks = pointers + 8 * n;
    for (size_t i = 0; i < n; i++) {
        size_t size = little_endian(sizes + 4 * i, 4); /* a negative one becomes very large */
        if (little_endian(pointers + 8 * i, 8) != end || size > (bin.size - end) / width)
            die("%s: sequence %zu must begin where the one before ends, and end within the %zu "
                "bytes of %s.bin",
                path, i, bin.size, prefix);
        end += size * width;
    }
    if (end != bin.size)
        die("%s describes %zu bytes of %s.bin, which has %zu", path, end, prefix, bin.size);
    if (m == 0 || little_endian(marks, 8) != 0 || little_endian(marks + 8 * (m - 1), 8) != n)
        die("%s: the document marks must go from 0 to the number of sequences, %zu", path, n);
    for (size_t i = 0, begin = 0; i + 1 < m; i++) {
        size_t mark = little_endian(marks + 8 * i, 8), next = little_endian(marks + 8 * i + 8, 8);
        if (next > n || next < mark) die("%s: document mark %zu is out of order", path, i + 1);
        size_t stop = next < n ? little_endian(pointers + 8 * next, 8) : end;
        add_document(c, prefix, bin.data + begin, width, (stop - begin) / width);
        begin = stop;
    }
    unmap_file(index);
}

/* ---- Where documents are found --------------------------------------------------------------- */

/* Why this entry of a folder is not read; NULL for texts and folders. */
static const char *why_skipped(const char *path, const char *name)
{
    struct stat st, link;
    char head[4096];
    if (name[0] == '.') return "hidden";
    if (lstat(path, &link) || stat(path, &st)) return strerror(errno);
    if (S_ISDIR(st.st_mode))
        return S_ISLNK(link.st_mode) ? "a link to a folder" : NULL; /* links may go in circles */
    if (!S_ISREG(st.st_mode)) return "not a regular file";
    FILE *f = fopen(path, "rb");
    if (!f) return strerror(errno);
    size_t n = fread(head, 1, sizeof(head), f);
    fclose(f);
    return memchr(head, 0, n) ? "not text: it has zero bytes" : NULL;
}

static int is_listed(const struct dirent *entry) { return !is_dots(entry->d_name); }

static int by_name(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

/* Adds all texts in a folder and in its folders, in the order of their names. The names are
 * appended to `path` itself: a buffer for each level could overflow the stack. */
static void add_folder(Corpus *c, const Tokenizer *t, char path[PATH_MAX])
{
    struct dirent **entry;
    struct stat st;
    size_t length = strlen(path);
    int n = scandir(path, &entry, is_listed, by_name);
    if (n < 0) die("cannot read the folder %s: %s", path, strerror(errno));
    for (int i = 0; i < n; i++) {
        const char *name = entry[i]->d_name;
        if (length + 1 + strlen(name) >= PATH_MAX) die("the path %s/%s is too long", path, name);
        path[length] = '/';
        strcpy(path + length + 1, name);
        const char *why = why_skipped(path, name);
        if (why) fprintf(stderr, "skipped %s: %s\n", path, why);
        else if (!stat(path, &st) && S_ISDIR(st.st_mode)) add_folder(c, t, path);
        else add_text(c, t, path);
        path[length] = 0;
        free(entry[i]);
    }
    free(entry);
}

/* Adds a text, a folder of texts, or an indexed dataset: its PREFIX, or one of its two files. */
static void add_path(Corpus *c, const Tokenizer *t, const char *name)
{
    char path[PATH_MAX], index[PATH_MAX];
    struct stat st;
    size_t n = strlen(extend_path(path, name, ""));
    int found = !stat(path, &st);
    int half = n > 4 && (!strcmp(path + n - 4, ".bin") || !strcmp(path + n - 4, ".idx"));
    if (half) path[n - 4] = 0;
    if (found && S_ISDIR(st.st_mode)) add_folder(c, t, extend_path(path, name, ""));
    else if ((half || !found) && !access(extend_path(index, path, ".idx"), F_OK))
        add_indexed(c, path);
    else if (found) add_text(c, t, name);
    else
        die("there is no %s: expected a text, a folder, or the prefix of an indexed dataset's .bin "
            "and .idx",
            name);
}

/* Reads and checks all data under n > 0 paths. Dies if a token is not in the vocabulary: the
 * model's, or the tokenizer's if there is no model. */
static Corpus *corpus_open(const char *const *paths, size_t n, const Tokenizer *t,
                           size_t vocabulary)
{
    Corpus *c = (Corpus *)xcalloc(1, sizeof(Corpus));
    c->vocabulary = vocabulary;
    c->end_of_text = t->end_of_text;
    if (t->end_of_text >= 0 && (size_t)t->end_of_text >= vocabulary)
        die("<|endoftext|> is token %d of the tokenizer, but the model has %zu tokens",
            t->end_of_text, vocabulary);
    for (size_t i = 0; i < n; i++) add_path(c, t, paths[i]);
    if (!c->tokens) die("there is no text in %s%s", paths[0], n > 1 ? " and the other paths" : "");
    return c;
}

static void corpus_close(Corpus *c)
{
    for (size_t i = 0; i < c->stores; i++) {
        free(c->storage[i].id);
        unmap_file(c->storage[i].map);
    }
    free(c->storage);
    free(c->document);
    free(c);
}

/* Appends all tokens of a corpus to out. */
static void corpus_tokens(Tokens *out, const Corpus *c)
{
    for (size_t i = 0; i < c->documents; i++)
        for (size_t j = 0; j < c->document[i].length; j++)
            push_token(out, document_token(&c->document[i], j, c->end_of_text));
}

/* ---- Writing an indexed dataset -------------------------------------------------------------- */

/* Writes the lowest bytes of a number, little-endian; finish_file() sees errors. */
static void put(FILE *f, uint64_t x, size_t bytes) { fwrite(&x, bytes, 1, f); }

static FILE *create_file(const char *path)
{
    FILE *f = fopen(path, "wb");
    if (!f) die("cannot create %s: %s", path, strerror(errno));
    return f;
}

/* Closes a file; dies unless all of it is on the disk. */
static void finish_file(FILE *f, const char *path)
{
    if (fflush(f) || ferror(f) || fsync(fileno(f)) || fclose(f)) {
        int error = errno;
        unlink(path);
        die("cannot write %s: %s", path, strerror(error));
    }
}

/* Writes PREFIX.bin and PREFIX.idx: one sequence for each document, with its <|endoftext|>. The
 * index gets its name last: if it exists, both files are complete, even after a kill. */
static void corpus_write(const Corpus *c, const char *prefix)
{
    char bin_path[PATH_MAX], idx_path[PATH_MAX], bin_new[PATH_MAX], idx_new[PATH_MAX];
    FILE *bin = create_file(extend_path(bin_new, prefix, ".bin.tmp"));
    FILE *idx = create_file(extend_path(idx_new, prefix, ".idx.tmp"));
    size_t width = c->vocabulary < 65500 ? 2 : 4, end = 0; /* Megatron's limit */

    fwrite(INDEX_MAGIC, sizeof(INDEX_MAGIC), 1, idx);
    put(idx, 1, 8);
    put(idx, width == 2 ? TYPE_UINT16 : TYPE_INT32, 1);
    put(idx, c->documents, 8);
    put(idx, c->documents + 1, 8);
    for (size_t i = 0; i < c->documents; i++) {
        const Document *d = &c->document[i];
        if (d->length > INT32_MAX)
            die("a document of %zu tokens is too long to be written: split it", d->length);
        for (size_t j = 0; j < d->length; j++)
            put(bin, (uint32_t)document_token(d, j, c->end_of_text), width);
        put(idx, d->length, 4);
    }
    for (size_t i = 0; i < c->documents; i++) {
        put(idx, end, 8);
        end += c->document[i].length * width;
    }
    for (size_t i = 0; i <= c->documents; i++) put(idx, i, 8);

    finish_file(bin, bin_new);
    finish_file(idx, idx_new);
    unlink(extend_path(idx_path, prefix, ".idx")); /* an older one does not fit the new tokens */
    if (rename(bin_new, extend_path(bin_path, prefix, ".bin")) || rename(idx_new, idx_path))
        die("cannot rename %s and %s to %s and %s: %s", bin_new, idx_new, bin_path, idx_path,
            strerror(errno));
}

/* ---- LAMBADA's file -------------------------------------------------------------------------- */

/* Reads lines of {"text": ".."}. */
static Lambada lambada_open(const char *path, const Tokenizer *t)
{
    Lambada l = {{NULL, 0, 0}, NULL, 0, 0};
    Map map = map_file(path), rest = map;
    char what[PATH_MAX + 32];
    for (size_t number = 1; rest.size; number++) {
        Map line = next_line(&rest);
        size_t length = line.size;
        strip(line.data, &length);
        if (!length) continue;
        snprintf(what, sizeof(what), "%s line %zu", path, number);
        Json json = json_parse(line.data, line.size, what);
        const char *text = json_text(&json, json.value, "text");
        if (!text) die("%s: expected {\"text\": \"..\"}", what);
        lambada_add(&l, t, text, strlen(text), what);
        json_free(&json);
    }
    unmap_file(map);
    if (!l.n) die("%s has no examples: expected lines of {\"text\": \"..\"}", path);
    return l;
}

static void lambada_close(Lambada *l)
{
    free(l->tokens.id);
    free(l->example);
}

/* ---- Unicode: which characters are letters, numbers, white space ----------------------------- */

/* An entry is a code point << 2 | class: so are the characters from there to the next entry. */
/* clang-format off */ /* make_classes.py writes from here .. */
static const uint32_t class_starts[] = { /* Unicode 16.0.0 */
    0x0, 0x27, 0x38, 0x83, 0x84, 0xC2, 0xE8, 0x105, 0x16C, 0x185, 0x1EC, 0x217, 0x218, 0x283, 0x284,
    0x2A9, 0x2AC, 0x2CA, 0x2D0, 0x2D5, 0x2D8, 0x2E6, 0x2E9, 0x2EC, 0x2F2, 0x2FC, 0x301, 0x35C,
    0x361, 0x3DC, 0x3E1, 0xB08, 0xB19, 0xB48, 0xB81, 0xB94, 0xBB1, 0xBB4, 0xBB9, 0xBBC, 0xDC1,
    0xDD4, 0xDD9, 0xDE0, 0xDE9, 0xDF8, 0xDFD, 0xE00, 0xE19, 0xE1C, 0xE21, 0xE2C, 0xE31, 0xE34,
    0xE39, 0xE88, 0xE8D, 0xFD8, 0xFDD, 0x1208, 0x1229, 0x14C0, 0x14C5, 0x155C, 0x1565, 0x1568,
    0x1581, 0x1624, 0x1741, 0x17AC, 0x17BD, 0x17CC, 0x1881, 0x192C, 0x1982, 0x19A8, 0x19B9, 0x19C0,
    0x19C5, 0x1B50, 0x1B55, 0x1B58, 0x1B95, 0x1B9C, 0x1BB9, 0x1BC2, 0x1BE9, 0x1BF4, 0x1BFD, 0x1C00,
    0x1C41, 0x1C44, 0x1C49, 0x1CC0, 0x1D35, 0x1E98, 0x1EC5, 0x1EC8, 0x1F02, 0x1F29, 0x1FAC, 0x1FD1,
    0x1FD8, 0x1FE9, 0x1FEC, 0x2001, 0x2058, 0x2069, 0x206C, 0x2091, 0x2094, 0x20A1, 0x20A4, 0x2101,
    0x2164, 0x2181, 0x21AC, 0x21C1, 0x2220, 0x2225, 0x223C, 0x2281, 0x2328, 0x2411, 0x24E8, 0x24F5,
    0x24F8, 0x2541, 0x2544, 0x2561, 0x2588, 0x259A, 0x25C0, 0x25C5, 0x2604, 0x2615, 0x2634, 0x263D,
    0x2644, 0x264D, 0x26A4, 0x26A9, 0x26C4, 0x26C9, 0x26CC, 0x26D9, 0x26E8, 0x26F5, 0x26F8, 0x2739,
    0x273C, 0x2771, 0x2778, 0x277D, 0x2788, 0x279A, 0x27C1, 0x27C8, 0x27D2, 0x27E8, 0x27F1, 0x27F4,
    0x2815, 0x282C, 0x283D, 0x2844, 0x284D, 0x28A4, 0x28A9, 0x28C4, 0x28C9, 0x28D0, 0x28D5, 0x28DC,
    0x28E1, 0x28E8, 0x2965, 0x2974, 0x2979, 0x297C, 0x299A, 0x29C0, 0x29C9, 0x29D4, 0x2A15, 0x2A38,
    0x2A3D, 0x2A48, 0x2A4D, 0x2AA4, 0x2AA9, 0x2AC4, 0x2AC9, 0x2AD0, 0x2AD5, 0x2AE8, 0x2AF5, 0x2AF8,
    0x2B41, 0x2B44, 0x2B81, 0x2B88, 0x2B9A, 0x2BC0, 0x2BE5, 0x2BE8, 0x2C15, 0x2C34, 0x2C3D, 0x2C44,
    0x2C4D, 0x2CA4, 0x2CA9, 0x2CC4, 0x2CC9, 0x2CD0, 0x2CD5, 0x2CE8, 0x2CF5, 0x2CF8, 0x2D71, 0x2D78,
    0x2D7D, 0x2D88, 0x2D9A, 0x2DC0, 0x2DC5, 0x2DCA, 0x2DE0, 0x2E0D, 0x2E10, 0x2E15, 0x2E2C, 0x2E39,
    0x2E44, 0x2E49, 0x2E58, 0x2E65, 0x2E6C, 0x2E71, 0x2E74, 0x2E79, 0x2E80, 0x2E8D, 0x2E94, 0x2EA1,
    0x2EAC, 0x2EB9, 0x2EE8, 0x2F41, 0x2F44, 0x2F9A, 0x2FCC, 0x3015, 0x3034, 0x3039, 0x3044, 0x3049,
    0x30A4, 0x30A9, 0x30E8, 0x30F5, 0x30F8, 0x3161, 0x316C, 0x3175, 0x3178, 0x3181, 0x3188, 0x319A,
    0x31C0, 0x31E2, 0x31FC, 0x3201, 0x3204, 0x3215, 0x3234, 0x3239, 0x3244, 0x3249, 0x32A4, 0x32A9,
    0x32D0, 0x32D5, 0x32E8, 0x32F5, 0x32F8, 0x3375, 0x337C, 0x3381, 0x3388, 0x339A, 0x33C0, 0x33C5,
    0x33CC, 0x3411, 0x3434, 0x3439, 0x3444, 0x3449, 0x34EC, 0x34F5, 0x34F8, 0x3539, 0x353C, 0x3551,
    0x355C, 0x3562, 0x357D, 0x3588, 0x359A, 0x35E4, 0x35E9, 0x3600, 0x3615, 0x365C, 0x3669, 0x36C8,
    0x36CD, 0x36F0, 0x36F5, 0x36F8, 0x3701, 0x371C, 0x379A, 0x37C0, 0x3805, 0x38C4, 0x38C9, 0x38D0,
    0x3901, 0x391C, 0x3942, 0x3968, 0x3A05, 0x3A0C, 0x3A11, 0x3A14, 0x3A19, 0x3A2C, 0x3A31, 0x3A90,
    0x3A95, 0x3A98, 0x3A9D, 0x3AC4, 0x3AC9, 0x3AD0, 0x3AF5, 0x3AF8, 0x3B01, 0x3B14, 0x3B19, 0x3B1C,
    0x3B42, 0x3B68, 0x3B71, 0x3B80, 0x3C01, 0x3C04, 0x3C82, 0x3CD0, 0x3D01, 0x3D20, 0x3D25, 0x3DB4,
    0x3E21, 0x3E34, 0x4001, 0x40AC, 0x40FD, 0x4102, 0x4128, 0x4141, 0x4158, 0x4169, 0x4178, 0x4185,
    0x4188, 0x4195, 0x419C, 0x41B9, 0x41C4, 0x41D5, 0x4208, 0x4239, 0x423C, 0x4242, 0x4268, 0x4281,
    0x4318, 0x431D, 0x4320, 0x4335, 0x4338, 0x4341, 0x43EC, 0x43F1, 0x4924, 0x4929, 0x4938, 0x4941,
    0x495C, 0x4961, 0x4964, 0x4969, 0x4978, 0x4981, 0x4A24, 0x4A29, 0x4A38, 0x4A41, 0x4AC4, 0x4AC9,
    0x4AD8, 0x4AE1, 0x4AFC, 0x4B01, 0x4B04, 0x4B09, 0x4B18, 0x4B21, 0x4B5C, 0x4B61, 0x4C44, 0x4C49,
    0x4C58, 0x4C61, 0x4D6C, 0x4DA6, 0x4DF4, 0x4E01, 0x4E40, 0x4E81, 0x4FD8, 0x4FE1, 0x4FF8, 0x5005,
    0x59B4, 0x59BD, 0x5A03, 0x5A05, 0x5A6C, 0x5A81, 0x5BAC, 0x5BBA, 0x5BC5, 0x5BE4, 0x5C01, 0x5C48,
    0x5C7D, 0x5CC8, 0x5D01, 0x5D48, 0x5D81, 0x5DB4, 0x5DB9, 0x5DC4, 0x5E01, 0x5ED0, 0x5F5D, 0x5F60,
    0x5F71, 0x5F74, 0x5F82, 0x5FA8, 0x5FC2, 0x5FE8, 0x6042, 0x6068, 0x6081, 0x61E4, 0x6201, 0x6214,
    0x621D, 0x62A4, 0x62A9, 0x62AC, 0x62C1, 0x63D8, 0x6401, 0x647C, 0x651A, 0x6541, 0x65B8, 0x65C1,
    0x65D4, 0x6601, 0x66B0, 0x66C1, 0x6728, 0x6742, 0x676C, 0x6801, 0x685C, 0x6881, 0x6954, 0x6A02,
    0x6A28, 0x6A42, 0x6A68, 0x6A9D, 0x6AA0, 0x6C15, 0x6CD0, 0x6D15, 0x6D34, 0x6D42, 0x6D68, 0x6E0D,
    0x6E84, 0x6EB9, 0x6EC2, 0x6EE9, 0x6F98, 0x7001, 0x7090, 0x7102, 0x7128, 0x7135, 0x7142, 0x7169,
    0x71F8, 0x7201, 0x722C, 0x7241, 0x72EC, 0x72F5, 0x7300, 0x73A5, 0x73B4, 0x73B9, 0x73D0, 0x73D5,
    0x73DC, 0x73E9, 0x73EC, 0x7401, 0x7700, 0x7801, 0x7C58, 0x7C61, 0x7C78, 0x7C81, 0x7D18, 0x7D21,
    0x7D38, 0x7D41, 0x7D60, 0x7D65, 0x7D68, 0x7D6D, 0x7D70, 0x7D75, 0x7D78, 0x7D7D, 0x7DF8, 0x7E01,
    0x7ED4, 0x7ED9, 0x7EF4, 0x7EF9, 0x7EFC, 0x7F09, 0x7F14, 0x7F19, 0x7F34, 0x7F41, 0x7F50, 0x7F59,
    0x7F70, 0x7F81, 0x7FB4, 0x7FC9, 0x7FD4, 0x7FD9, 0x7FF4, 0x8003, 0x802C, 0x80A3, 0x80A8, 0x80BF,
    0x80C0, 0x817F, 0x8180, 0x81C2, 0x81C5, 0x81C8, 0x81D2, 0x81E8, 0x81FD, 0x8202, 0x8228, 0x8241,
    0x8274, 0x8409, 0x840C, 0x841D, 0x8420, 0x8429, 0x8450, 0x8455, 0x8458, 0x8465, 0x8478, 0x8491,
    0x8494, 0x8499, 0x849C, 0x84A1, 0x84A4, 0x84A9, 0x84B8, 0x84BD, 0x84E8, 0x84F1, 0x8500, 0x8515,
    0x8528, 0x8539, 0x853C, 0x8542, 0x860D, 0x8616, 0x8628, 0x9182, 0x9270, 0x93AA, 0x9400, 0x9DDA,
    0x9E50, 0xB001, 0xB394, 0xB3AD, 0xB3BC, 0xB3C9, 0xB3D0, 0xB3F6, 0xB3F8, 0xB401, 0xB498, 0xB49D,
    0xB4A0, 0xB4B5, 0xB4B8, 0xB4C1, 0xB5A0, 0xB5BD, 0xB5C0, 0xB601, 0xB65C, 0xB681, 0xB69C, 0xB6A1,
    0xB6BC, 0xB6C1, 0xB6DC, 0xB6E1, 0xB6FC, 0xB701, 0xB71C, 0xB721, 0xB73C, 0xB741, 0xB75C, 0xB761,
    0xB77C, 0xB8BD, 0xB8C0, 0xC003, 0xC004, 0xC015, 0xC01E, 0xC020, 0xC086, 0xC0A8, 0xC0C5, 0xC0D8,
    0xC0E2, 0xC0ED, 0xC0F4, 0xC105, 0xC25C, 0xC275, 0xC280, 0xC285, 0xC3EC, 0xC3F1, 0xC400, 0xC415,
    0xC4C0, 0xC4C5, 0xC63C, 0xC64A, 0xC658, 0xC681, 0xC700, 0xC7C1, 0xC800, 0xC882, 0xC8A8, 0xC922,
    0xC940, 0xC946, 0xC980, 0xCA02, 0xCA28, 0xCAC6, 0xCB00, 0xD001, 0x13700, 0x13801, 0x29234,
    0x29341, 0x293F8, 0x29401, 0x29834, 0x29841, 0x29882, 0x298A9, 0x298B0, 0x29901, 0x299BC,
    0x299FD, 0x29A78, 0x29A81, 0x29B9A, 0x29BC0, 0x29C5D, 0x29C80, 0x29C89, 0x29E24, 0x29E2D,
    0x29F38, 0x29F41, 0x29F48, 0x29F4D, 0x29F50, 0x29F55, 0x29F74, 0x29FC9, 0x2A008, 0x2A00D,
    0x2A018, 0x2A01D, 0x2A02C, 0x2A031, 0x2A08C, 0x2A0C2, 0x2A0D8, 0x2A101, 0x2A1D0, 0x2A209,
    0x2A2D0, 0x2A342, 0x2A368, 0x2A3C9, 0x2A3E0, 0x2A3ED, 0x2A3F0, 0x2A3F5, 0x2A3FC, 0x2A402,
    0x2A429, 0x2A498, 0x2A4C1, 0x2A51C, 0x2A581, 0x2A5F4, 0x2A611, 0x2A6CC, 0x2A73D, 0x2A742,
    0x2A768, 0x2A781, 0x2A794, 0x2A799, 0x2A7C2, 0x2A7E9, 0x2A7FC, 0x2A801, 0x2A8A4, 0x2A901,
    0x2A90C, 0x2A911, 0x2A930, 0x2A942, 0x2A968, 0x2A981, 0x2A9DC, 0x2A9E9, 0x2A9EC, 0x2A9F9,
    0x2AAC0, 0x2AAC5, 0x2AAC8, 0x2AAD5, 0x2AADC, 0x2AAE5, 0x2AAF8, 0x2AB01, 0x2AB04, 0x2AB09,
    0x2AB0C, 0x2AB6D, 0x2AB78, 0x2AB81, 0x2ABAC, 0x2ABC9, 0x2ABD4, 0x2AC05, 0x2AC1C, 0x2AC25,
    0x2AC3C, 0x2AC45, 0x2AC5C, 0x2AC81, 0x2AC9C, 0x2ACA1, 0x2ACBC, 0x2ACC1, 0x2AD6C, 0x2AD71,
    0x2ADA8, 0x2ADC1, 0x2AF8C, 0x2AFC2, 0x2AFE8, 0x2B001, 0x35E90, 0x35EC1, 0x35F1C, 0x35F2D,
    0x35FF0, 0x3E401, 0x3E9B8, 0x3E9C1, 0x3EB68, 0x3EC01, 0x3EC1C, 0x3EC4D, 0x3EC60, 0x3EC75,
    0x3EC78, 0x3EC7D, 0x3ECA4, 0x3ECA9, 0x3ECDC, 0x3ECE1, 0x3ECF4, 0x3ECF9, 0x3ECFC, 0x3ED01,
    0x3ED08, 0x3ED0D, 0x3ED14, 0x3ED19, 0x3EEC8, 0x3EF4D, 0x3F4F8, 0x3F541, 0x3F640, 0x3F649,
    0x3F720, 0x3F7C1, 0x3F7F0, 0x3F9C1, 0x3F9D4, 0x3F9D9, 0x3FBF4, 0x3FC42, 0x3FC68, 0x3FC85,
    0x3FCEC, 0x3FD05, 0x3FD6C, 0x3FD99, 0x3FEFC, 0x3FF09, 0x3FF20, 0x3FF29, 0x3FF40, 0x3FF49,
    0x3FF60, 0x3FF69, 0x3FF74, 0x40001, 0x40030, 0x40035, 0x4009C, 0x400A1, 0x400EC, 0x400F1,
    0x400F8, 0x400FD, 0x40138, 0x40141, 0x40178, 0x40201, 0x403EC, 0x4041E, 0x404D0, 0x40502,
    0x405E4, 0x4062A, 0x40630, 0x40A01, 0x40A74, 0x40A81, 0x40B44, 0x40B86, 0x40BF0, 0x40C01,
    0x40C82, 0x40C90, 0x40CB5, 0x40D06, 0x40D09, 0x40D2A, 0x40D2C, 0x40D41, 0x40DD8, 0x40E01,
    0x40E78, 0x40E81, 0x40F10, 0x40F21, 0x40F40, 0x40F46, 0x40F58, 0x41001, 0x41278, 0x41282,
    0x412A8, 0x412C1, 0x41350, 0x41361, 0x413F0, 0x41401, 0x414A0, 0x414C1, 0x41590, 0x415C1,
    0x415EC, 0x415F1, 0x4162C, 0x41631, 0x4164C, 0x41651, 0x41658, 0x4165D, 0x41688, 0x4168D,
    0x416C8, 0x416CD, 0x416E8, 0x416ED, 0x416F4, 0x41701, 0x417D0, 0x41801, 0x41CDC, 0x41D01,
    0x41D58, 0x41D81, 0x41DA0, 0x41E01, 0x41E18, 0x41E1D, 0x41EC4, 0x41EC9, 0x41EEC, 0x42001,
    0x42018, 0x42021, 0x42024, 0x42029, 0x420D8, 0x420DD, 0x420E4, 0x420F1, 0x420F4, 0x420FD,
    0x42158, 0x42162, 0x42181, 0x421DC, 0x421E6, 0x42201, 0x4227C, 0x4229E, 0x422C0, 0x42381,
    0x423CC, 0x423D1, 0x423D8, 0x423EE, 0x42401, 0x4245A, 0x42470, 0x42481, 0x424E8, 0x42601,
    0x426E0, 0x426F2, 0x426F9, 0x42702, 0x42740, 0x4274A, 0x42801, 0x42804, 0x42841, 0x42850,
    0x42855, 0x42860, 0x42865, 0x428D8, 0x42902, 0x42924, 0x42981, 0x429F6, 0x429FC, 0x42A01,
    0x42A76, 0x42A80, 0x42B01, 0x42B20, 0x42B25, 0x42B94, 0x42BAE, 0x42BC0, 0x42C01, 0x42CD8,
    0x42D01, 0x42D58, 0x42D62, 0x42D81, 0x42DCC, 0x42DE2, 0x42E01, 0x42E48, 0x42EA6, 0x42EC0,
    0x43001, 0x43124, 0x43201, 0x432CC, 0x43301, 0x433CC, 0x433EA, 0x43401, 0x43490, 0x434C2,
    0x434E8, 0x43502, 0x43529, 0x43598, 0x435BD, 0x43618, 0x43982, 0x439FC, 0x43A01, 0x43AA8,
    0x43AC1, 0x43AC8, 0x43B09, 0x43B14, 0x43C01, 0x43C76, 0x43C9D, 0x43CA0, 0x43CC1, 0x43D18,
    0x43D46, 0x43D54, 0x43DC1, 0x43E08, 0x43EC1, 0x43F16, 0x43F30, 0x43F81, 0x43FDC, 0x4400D,
    0x440E0, 0x4414A, 0x441C0, 0x441C5, 0x441CC, 0x441D5, 0x441D8, 0x4420D, 0x442C0, 0x44341,
    0x443A4, 0x443C2, 0x443E8, 0x4440D, 0x4449C, 0x444DA, 0x44500, 0x44511, 0x44514, 0x4451D,
    0x44520, 0x44541, 0x445CC, 0x445D9, 0x445DC, 0x4460D, 0x446CC, 0x44705, 0x44714, 0x44742,
    0x44769, 0x4476C, 0x44771, 0x44774, 0x44786, 0x447D4, 0x44801, 0x44848, 0x4484D, 0x448B0,
    0x448FD, 0x44904, 0x44A01, 0x44A1C, 0x44A21, 0x44A24, 0x44A29, 0x44A38, 0x44A3D, 0x44A78,
    0x44A7D, 0x44AA4, 0x44AC1, 0x44B7C, 0x44BC2, 0x44BE8, 0x44C15, 0x44C34, 0x44C3D, 0x44C44,
    0x44C4D, 0x44CA4, 0x44CA9, 0x44CC4, 0x44CC9, 0x44CD0, 0x44CD5, 0x44CE8, 0x44CF5, 0x44CF8,
    0x44D41, 0x44D44, 0x44D75, 0x44D88, 0x44E01, 0x44E28, 0x44E2D, 0x44E30, 0x44E39, 0x44E3C,
    0x44E41, 0x44ED8, 0x44EDD, 0x44EE0, 0x44F45, 0x44F48, 0x44F4D, 0x44F50, 0x45001, 0x450D4,
    0x4511D, 0x4512C, 0x45142, 0x45168, 0x4517D, 0x45188, 0x45201, 0x452C0, 0x45311, 0x45318,
    0x4531D, 0x45320, 0x45342, 0x45368, 0x45601, 0x456BC, 0x45761, 0x45770, 0x45801, 0x458C0,
    0x45911, 0x45914, 0x45942, 0x45968, 0x45A01, 0x45AAC, 0x45AE1, 0x45AE4, 0x45B02, 0x45B28,
    0x45B42, 0x45B90, 0x45C01, 0x45C6C, 0x45CC2, 0x45CF0, 0x45D01, 0x45D1C, 0x46001, 0x460B0,
    0x46281, 0x46382, 0x463CC, 0x463FD, 0x4641C, 0x46425, 0x46428, 0x46431, 0x46450, 0x46455,
    0x4645C, 0x46461, 0x464C0, 0x464FD, 0x46500, 0x46505, 0x46508, 0x46542, 0x46568, 0x46681,
    0x466A0, 0x466A9, 0x46744, 0x46785, 0x46788, 0x4678D, 0x46790, 0x46801, 0x46804, 0x4682D,
    0x468CC, 0x468E9, 0x468EC, 0x46941, 0x46944, 0x46971, 0x46A28, 0x46A75, 0x46A78, 0x46AC1,
    0x46BE4, 0x46F01, 0x46F84, 0x46FC2, 0x46FE8, 0x47001, 0x47024, 0x47029, 0x470BC, 0x47101,
    0x47104, 0x47142, 0x471B4, 0x471C9, 0x47240, 0x47401, 0x4741C, 0x47421, 0x47428, 0x4742D,
    0x474C4, 0x47519, 0x4751C, 0x47542, 0x47568, 0x47581, 0x47598, 0x4759D, 0x475A4, 0x475A9,
    0x47628, 0x47661, 0x47664, 0x47682, 0x476A8, 0x47B81, 0x47BCC, 0x47C09, 0x47C0C, 0x47C11,
    0x47C44, 0x47C49, 0x47CD0, 0x47D42, 0x47D68, 0x47EC1, 0x47EC4, 0x47F02, 0x47F54, 0x48001,
    0x48E68, 0x49002, 0x491BC, 0x49201, 0x49510, 0x4BE41, 0x4BFC4, 0x4C001, 0x4D0C0, 0x4D105,
    0x4D11C, 0x4D181, 0x50FEC, 0x51001, 0x5191C, 0x58401, 0x58478, 0x584C2, 0x584E8, 0x5A001,
    0x5A8E4, 0x5A901, 0x5A97C, 0x5A982, 0x5A9A8, 0x5A9C1, 0x5AAFC, 0x5AB02, 0x5AB28, 0x5AB41,
    0x5ABB8, 0x5AC01, 0x5ACC0, 0x5AD01, 0x5AD10, 0x5AD42, 0x5AD68, 0x5AD6E, 0x5AD88, 0x5AD8D,
    0x5ADE0, 0x5ADF5, 0x5AE40, 0x5B501, 0x5B5B4, 0x5B5C2, 0x5B5E8, 0x5B901, 0x5BA02, 0x5BA5C,
    0x5BC01, 0x5BD2C, 0x5BD41, 0x5BD44, 0x5BE4D, 0x5BE80, 0x5BF81, 0x5BF88, 0x5BF8D, 0x5BF90,
    0x5C001, 0x61FE0, 0x62001, 0x63358, 0x633FD, 0x63424, 0x6BFC1, 0x6BFD0, 0x6BFD5, 0x6BFF0,
    0x6BFF5, 0x6BFFC, 0x6C001, 0x6C48C, 0x6C4C9, 0x6C4CC, 0x6C541, 0x6C54C, 0x6C555, 0x6C558,
    0x6C591, 0x6C5A0, 0x6C5C1, 0x6CBF0, 0x6F001, 0x6F1AC, 0x6F1C1, 0x6F1F4, 0x6F201, 0x6F224,
    0x6F241, 0x6F268, 0x733C2, 0x733E8, 0x74B02, 0x74B50, 0x74B82, 0x74BD0, 0x74D82, 0x74DE4,
    0x75001, 0x75154, 0x75159, 0x75274, 0x75279, 0x75280, 0x75289, 0x7528C, 0x75295, 0x7529C,
    0x752A5, 0x752B4, 0x752B9, 0x752E8, 0x752ED, 0x752F0, 0x752F5, 0x75310, 0x75315, 0x75418,
    0x7541D, 0x7542C, 0x75435, 0x75454, 0x75459, 0x75474, 0x75479, 0x754E8, 0x754ED, 0x754FC,
    0x75501, 0x75514, 0x75519, 0x7551C, 0x75529, 0x75544, 0x75549, 0x75A98, 0x75AA1, 0x75B04,
    0x75B09, 0x75B6C, 0x75B71, 0x75BEC, 0x75BF1, 0x75C54, 0x75C59, 0x75CD4, 0x75CD9, 0x75D3C,
    0x75D41, 0x75DBC, 0x75DC1, 0x75E24, 0x75E29, 0x75EA4, 0x75EA9, 0x75F0C, 0x75F11, 0x75F30,
    0x75F3A, 0x76000, 0x77C01, 0x77C7C, 0x77C95, 0x77CAC, 0x780C1, 0x781B8, 0x78401, 0x784B4,
    0x784DD, 0x784F8, 0x78502, 0x78528, 0x78539, 0x7853C, 0x78A41, 0x78AB8, 0x78B01, 0x78BB0,
    0x78BC2, 0x78BE8, 0x79341, 0x793B0, 0x793C2, 0x793E8, 0x79741, 0x797B8, 0x797C1, 0x797C6,
    0x797EC, 0x79F81, 0x79F9C, 0x79FA1, 0x79FB0, 0x79FB5, 0x79FBC, 0x79FC1, 0x79FFC, 0x7A001,
    0x7A314, 0x7A31E, 0x7A340, 0x7A401, 0x7A510, 0x7A52D, 0x7A530, 0x7A542, 0x7A568, 0x7B1C6,
    0x7B2B0, 0x7B2B6, 0x7B2C0, 0x7B2C6, 0x7B2D4, 0x7B406, 0x7B4B8, 0x7B4BE, 0x7B4F8, 0x7B801,
    0x7B810, 0x7B815, 0x7B880, 0x7B885, 0x7B88C, 0x7B891, 0x7B894, 0x7B89D, 0x7B8A0, 0x7B8A5,
    0x7B8CC, 0x7B8D1, 0x7B8E0, 0x7B8E5, 0x7B8E8, 0x7B8ED, 0x7B8F0, 0x7B909, 0x7B90C, 0x7B91D,
    0x7B920, 0x7B925, 0x7B928, 0x7B92D, 0x7B930, 0x7B935, 0x7B940, 0x7B945, 0x7B94C, 0x7B951,
    0x7B954, 0x7B95D, 0x7B960, 0x7B965, 0x7B968, 0x7B96D, 0x7B970, 0x7B975, 0x7B978, 0x7B97D,
    0x7B980, 0x7B985, 0x7B98C, 0x7B991, 0x7B994, 0x7B99D, 0x7B9AC, 0x7B9B1, 0x7B9CC, 0x7B9D1,
    0x7B9E0, 0x7B9E5, 0x7B9F4, 0x7B9F9, 0x7B9FC, 0x7BA01, 0x7BA28, 0x7BA2D, 0x7BA70, 0x7BA85,
    0x7BA90, 0x7BA95, 0x7BAA8, 0x7BAAD, 0x7BAF0, 0x7C402, 0x7C434, 0x7EFC2, 0x7EFE8, 0x80001,
    0xA9B80, 0xA9C01, 0xADCE8, 0xADD01, 0xAE078, 0xAE081, 0xB3A88, 0xB3AC1, 0xBAF84, 0xBAFC1,
    0xBB978, 0xBE001, 0xBE878, 0xC0001, 0xC4D2C, 0xC4D41, 0xC8EC0,
};
/* .. to here. */ /* clang-format on */

/* The class of a code point. */
static int class_of(uint32_t code)
{
    size_t low = 0, high = sizeof class_starts / sizeof *class_starts; /* it is in [low, high) */
    if (code < 0x80 && (code | 32) - 'a' < 26u) return CLASS_LETTER;   /* most of most texts */
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (class_starts[middle] >> 2 <= code) low = middle;
        else high = middle;
    }
    return class_starts[low] & 3;
}

/* =================================================================================================
 * Chapter 16. Planner [§5.1, Fig. 4]: what a training run will cost, without running it
 *
 * All numbers come from shapes alone: parameters and memory from the table of chapter 5, messages
 * from the places where chapters 3, 6 and 8 call collectives, floating point operations from the
 * sizes of the products.
 * ============================================================================================== */

/* All doubles, for one table to print; exact up to 2^53. "per_rank": of the rank that has most. */
typedef struct {
    double parameters, parameters_per_rank, replication;
    double bytes_per_rank, weights_bytes, gradient_bytes, moment_bytes, master_bytes;
    double activation_bytes, paper_bytes, paper_activation_bytes;
    double zero1_bytes, zero2_bytes, zero3_bytes;
    double micro_batches, in_flight, bubble, bubble_formula, bubble_gpipe, bubble_interleaved;
    double flops_per_iteration, flops_formula, tokens_per_iteration;
    double all_reduces_per_iteration, all_reduce_bytes, bytes_sent_per_rank, busiest_stage;
    double v100_seconds, v100_efficiency, v100_days, seconds, efficiency;
} Plan;

/* Sequences of a step, on all data ranks. */
static size_t batch_size(const RankOptions *in)
{
    return in->micro_batch * in->micro_batches * (size_t)in->layout.dp;
}

/* Dies unless the run can be cut this way. More ranks may be planned than check_layout() allows. */
static void check_plan(const RankOptions *in)
{
    Layout s = in->layout, tensor = {s.tp, 1, 1}, pipeline = {1, s.pp, 1};
    check_layout(&in->config, tensor);
    check_layout(&in->config, pipeline);
    if (s.dp < 1 || s.dp > 65536) die("--dp %d: 1 to 65536 data ranks can be planned", s.dp);
    if (in->micro_batch < 1 || in->micro_batch > 65536)
        die("--micro-batch %zu: 1 to 65536 can be planned", in->micro_batch);
    if (in->micro_batches < 1 || in->micro_batches > 65536)
        die("--batch %zu makes %zu micro-batches: at most 65536 can be planned", batch_size(in),
            in->micro_batches);
    if (in->seq < 1 || in->seq > in->config.P)
        die("--seq %zu: the model has %zu positions", in->seq, in->config.P);
    /* No product of these sizes overflows. */
    const Config *c = &in->config;
    double width = (double)c->V + 16.0 * (double)c->C + 2.0 * (double)c->F + (double)c->H;
    double height = (double)in->micro_batch * (double)in->seq + (double)c->C + (double)c->P;
    if (c->L > 100000 || width * height * (double)(c->L + 1) * s.pp > 1e15)
        die("a model of %zu layers of %zu is too large to plan at this batch", c->L, c->C);
}

/* ---- Arithmetic ------------------------------------------------------------------------------ */

/* F = 96 B s l h^2 (1 + s/(6h) + V/(16 l h)) with recomputation, 72 and V/(12 l h) without
 * [arXiv 2104.04473 (3), P46]. */
static double flops_formula(const Config *c, size_t batch, size_t seq, int recompute)
{
    double B = (double)batch, s = (double)seq, l = (double)c->L, h = (double)c->C, V = (double)c->V;
    /* A backward pass costs two forward ones; only the layers are recomputed. */
    double passes = recompute ? 4 : 3;
    return 24 * passes * B * s * l * h * h * (1 + s / (6 * h) + V / (4 * passes * l * h));
}

/* The same, counted product by product: 2 a b c for (a, b) times (b, c), with the scores that the
 * causal mask hides and with the vocabulary's padding. A backward pass counts as two forward ones,
 * as everywhere in the literature; chapter 4 makes five products for attention's two, since it
 * computes the scores again instead of keeping them. */
static double flops_exact(const Config *c, int tp, size_t batch, size_t seq, int recompute)
{
    double C = (double)c->C, F = (double)c->F, s = (double)seq, rows = (double)batch * s;
    /* Q K V, output, and the MLP's two; scores, and probabilities times V, over all heads. */
    double linear = 2 * rows * (C * 3 * C + C * C + C * F + F * C);
    double attention = 2 * rows * (s * C + s * C);
    double logits = 2 * rows * C * (double)padded_vocab(c->V, tp);
    return (recompute ? 4 : 3) * (double)c->L * (linear + attention) + 3 * logits;
}

/* Bytes of a parameter with fp16 and Adam: weight 2, gradient 2, float weight and moments 12. ZeRO
 * stage 1 shares the twelve out among the d data ranks, stage 2 the gradients too, stage 3 the
 * weights too [arXiv 1910.02054, P60]. */
static double zero_bytes(int stage, double d)
{
    return 2 / (stage >= 3 ? d : 1) + 2 / (stage >= 2 ? d : 1) + 12 / (stage >= 1 ? d : 1);
}

/* Bytes of one layer's activations as Megatron keeps them, fp16, masks of one byte, scores in full:
 * s b h (10 + 24/t + 5 a s / (h t)); with recomputation only the input, 2 s b h [arXiv 2205.05198
 * (2), P58]. */
static double megatron_activation_bytes(const Config *c, int tp, size_t b, size_t seq,
                                        int recompute)
{
    double s = (double)seq, h = (double)c->C, t = tp;
    return s * (double)b * h * (recompute ? 2 : 10 + 24 / t + 5 * (double)c->H * s / (h * t));
}

/* 8 FLOPs for each token and parameter, recomputation included [arXiv 2104.04473 (4), P61]. */
static double training_days(double tokens, double parameters, double gpus, double flops)
{
    return 8 * tokens * parameters / (gpus * flops) / 86400;
}

/* ---- Messages -------------------------------------------------------------------------------- */

typedef struct {
    const char *group, *op, *what, *paper;
    size_t ranks;    /* in the group */
    size_t count;    /* calls of one rank in one iteration */
    size_t elements; /* of each call */
    Type type;
} Message;

enum { MAX_MESSAGES = 16 };

/* Elements a rank sends in one call. A ring all-reduce is a reduce-scatter and an all-gather, in
 * which each rank passes on (t-1)/t of the buffer: together 2 (t-1)/t of it [P8, P59]. */
static double elements_sent(const Message *m)
{
    double n = (double)m->elements, t = (double)m->ranks;
    if (!strcmp(m->op, "recv")) return 0;
    return strcmp(m->op, "send") ? 2 * (t - 1) / t * n : n;
}

static size_t message_bytes(const Message *m) { return m->elements * type_size(m->type); }

/* list (MAX_MESSAGES) = what a rank of a stage sends and receives in a step. Returns how many. */
static size_t list_messages(Message *list, const RankOptions *in, int stage)
{
    const Config *c = &in->config;
    Layout s = in->layout;
    size_t t = (size_t)s.tp, p = (size_t)s.pp, d = (size_t)s.dp, ranks = t * p * d, n = 0, arena;
    size_t m = in->micro_batches, bs = in->micro_batch * in->seq, bsh = bs * c->C;
    size_t both = 2 * m * (c->L / p), again = in->recompute ? both : 0; /* attention's and MLP's */
    size_t first = stage == 0 ? m : 0, last = stage == s.pp - 1 ? m : 0, end = first || last;
    size_t after_first = m - first, before_last = m - last;
    size_t tied = padded_vocab(c->V, s.tp) / t * c->C, pair = p > 1 ? 2 : 1;
    list_tensors(NULL, &arena, c, s, stage * s.tp * s.dp);
    /* clang-format off */
    const Message all[] = {
        {"tp", "all_reduce", "g: embedding", "[§3]", t, first, bsh, ACT},
        {"tp", "all_reduce", "g: attention, MLP; forward", "[§3 Fig.4]", t, both, bsh, ACT},
        {"tp", "all_reduce", "g: the same, recomputed", "[§4.2]", t, again, bsh, ACT},
        {"tp", "all_reduce", "f: attention, MLP; backward", "[§3 Fig.4]", t, both, bsh, ACT},
        {"tp", "all_reduce", "f: logits; backward", "[§3]", t, last, bsh, ACT},
        {"tp", "all_reduce_max", "cross entropy: largest logit", "[§3]", t, last, bs, REAL_ARRAY},
        {"tp", "all_reduce", "cross entropy: sum, target", "[§3]", t, 2 * last, bs, REAL_ARRAY},
        {"pp", "recv", "activations", "", p, after_first, bsh, ACT},
        {"pp", "send", "activations", "", p, before_last, bsh, ACT},
        {"pp", "recv", "gradients of activations", "", p, before_last, bsh, ACT},
        {"pp", "send", "gradients of activations", "", p, after_first, bsh, ACT},
        {"embedding", "all_reduce", "gradient of the tied embedding", "", pair, end, tied, ACT},
        {"dp", "all_reduce", "gradients", "[§2.3]", d, 1, arena, ACT},
        {"world", "all_reduce", "gradient norm", "[§4.2]", ranks, 1, 1, DOUBLE_ARRAY},
        {"world", "all_reduce", "loss", "", ranks, 1, 1, DOUBLE_ARRAY},
    };
    /* clang-format on */
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i].ranks > 1 && all[i].count > 0) list[n++] = all[i];
    return n;
}

/* ---- The pipeline's schedules, pass by pass (beyond the paper: arXiv 2104.04473 §2.2) -------- */

/* GPipe: all forward passes, then all backward passes. 1F1B: chapter 8. Interleaved 1F1B cuts the
 * model into v p parts and gives each of the p stages v of them, its "chunks": every micro-batch
 * goes round v times. */
typedef enum { GPIPE, ONE_F_ONE_B } Schedule;

typedef struct {
    int backward;
    size_t chunk, micro_batch;
} Pass;

/* Pass number j of stage i: w forward passes to warm up, then one forward and one backward pass in
 * turns, then the other backward passes. With chunks, p micro-batches at a time pass through one
 * chunk before the next. */
static Pass nth_pass(Schedule kind, size_t p, size_t m, size_t v, size_t i, size_t j)
{
    size_t all = m * v, warmup = v > 1 ? 2 * (p - i - 1) + (v - 1) * p : p - i - 1;
    size_t w = kind == GPIPE ? all : min_size(warmup, all);
    size_t n = j; /* number among the forward passes, or among the backward ones */
    Pass pass;
    pass.backward = j >= 2 * all - w || (j >= w && (j - w) % 2);
    if (j >= 2 * all - w) n = j - all;
    else if (j >= w) n = (j - w) / 2 + (pass.backward ? 0 : w);
    pass.chunk = n % (p * v) / p;
    if (pass.backward) pass.chunk = v - 1 - pass.chunk;
    pass.micro_batch = n / (p * v) * p + n % p;
    return pass;
}

/* A run of m micro-batches through p stages of v chunks. A whole stage takes tf > 0 forward and
 * tb > 0 backward, messages take no time, and a pass starts when its stage and its input are ready.
 * Returns the bubble: idle time / time of the work. most_in_flight (p): chunks whose backward pass
 * is still to come, at most, on each stage. v > 1: m is a multiple of p. */
static double simulate_pipeline(size_t *most_in_flight, Schedule kind, size_t p, size_t m, size_t v,
                                double tf, double tb)
{
    size_t parts = v * p, left = 2 * m * parts, before = left + 1;
    double *forward = (double *)xcalloc(2 * parts * m, sizeof *forward), end = 0;
    double *backward = forward + parts * m; /* (parts, m) when each pass ended; 0: not yet */
    double *clock = (double *)xcalloc(p, sizeof *clock); /* when each stage's last pass ended */
    size_t *done = (size_t *)xcalloc(2 * p, sizeof *done), *in_flight = done + p; /* done: passes */
    memset(most_in_flight, 0, p * sizeof *most_in_flight);
    while (left > 0) {
        if (left == before)
            die("the schedule of %zu stages and %zu micro-batches does not end", p, m);
        before = left;
        for (size_t i = 0; i < p; i++)
            for (; done[i] < 2 * m * v; done[i]++, left--) {
                Pass pass = nth_pass(kind, p, m, v, i, done[i]);
                size_t part = pass.chunk * p + i, here = part * m + pass.micro_batch;
                const double *input = NULL; /* the first part has its tokens */
                if (pass.backward) input = part + 1 == parts ? &forward[here] : &backward[here + m];
                else if (part > 0) input = &forward[here - m];
                if (input && *input == 0) break;
                if (input) clock[i] = fmax(clock[i], *input);
                clock[i] += (pass.backward ? tb : tf) / (double)v;
                (pass.backward ? backward : forward)[here] = clock[i];
                if (pass.backward) in_flight[i]--;
                else in_flight[i]++;
                most_in_flight[i] = max_size(most_in_flight[i], in_flight[i]);
            }
    }
    for (size_t i = 0; i < p; i++) end = fmax(end, clock[i]);
    free(forward);
    free(clock);
    free(done);
    return end / ((double)m * (tf + tb)) - 1;
}

/* ---- Projection ------------------------------------------------------------------------------ */

/* FLOP/s of one V100 [§5.1], iterations of an epoch [Table 2], tokens of an iteration [§4.2] */
static const double PAPER_RATE = 39e12, EPOCH = 68507, PAPER_BATCH = 512 * 1024;

typedef struct {
    double flops;   /* sustained, of one rank */
    double bus;     /* bytes/s that a rank sends in a ring inside a server */
    double network; /* bytes/s in and out of a server */
    double latency; /* seconds, of one message */
    int server;     /* ranks in a server */
    size_t act_size;
} Machine;

/* The paper's DGX-2H [§5]. 39 TFLOP/s is what it measured for 1.2B on one V100, products and all
 * else. NVSwitch moves 300 GB/s, in and out together; that a ring sustains 130 of the 150 out is
 * our assumption. Servers are joined at 100 GB/s. */
static const Machine v100 = {39e12, 130e9, 100e9, 15e-6, 16, 2};

/* Groups other than tp leave the server; the rings of its tensor ranks share its network. */
static double message_seconds(const Machine *machine, const Message *m, Layout s)
{
    int tensor = !strcmp(m->group, "tp"), span = tensor ? s.tp : world_size(s);
    double bandwidth = machine->bus;
    if (span > machine->server) bandwidth = machine->network / (tensor ? 1 : s.tp);
    double size = m->type == ACT ? (double)machine->act_size : (double)type_size(m->type);
    return (double)m->count * (elements_sent(m) * size / bandwidth + machine->latency);
}

/* Seconds of an iteration = (FLOPs / (ranks * rate) + tp and pp messages) * (1 + bubble) + all
 * other messages, on the stage that talks most; nothing overlaps, as in the paper. It does not see
 * that narrow products are slower, nor the duplicated LayerNorms: it flatters large t. */
static double project(const RankOptions *in, const Machine *machine, double flops, double bubble)
{
    double worst = 0;
    for (int stage = 0; stage < in->layout.pp; stage++) {
        Message list[MAX_MESSAGES];
        size_t n = list_messages(list, in, stage);
        double pass = flops / (world_size(in->layout) * machine->flops), rest = 0;
        for (const Message *m = list; m < list + n; m++) {
            double time = message_seconds(machine, m, in->layout);
            if (!strcmp(m->group, "tp") || !strcmp(m->group, "pp")) pass += time;
            else rest += time;
        }
        worst = fmax(worst, pass * (1 + bubble) + rest);
    }
    return worst;
}

/* ---- The plan -------------------------------------------------------------------------------- */

/* Parameters and memory of the stage that has most. */
static void plan_memory(Plan *plan, const RankOptions *in)
{
    const Config *c = &in->config;
    Layout s = in->layout;
    double stored = 0;
    Tensor *list = (Tensor *)xcalloc(N_SPECS * c->L, sizeof *list); /* more than any stage has */
    for (int stage = 0; stage < s.pp; stage++) {
        int rank = stage * s.tp * s.dp; /* the first of the stage; all are alike */
        size_t elements, count = list_tensors(list, &elements, c, s, rank);
        double parameters = 0, n = (double)elements;
        for (size_t i = 0; i < count; i++) parameters += (double)list[i].n;
        stored += parameters * s.tp;
        plan->parameters_per_rank = fmax(plan->parameters_per_rank, parameters);
        size_t activations = activation_bytes(c, s, rank, in->micro_batch, in->seq, in->recompute,
                                              (size_t)plan->micro_batches);
        double master = sizeof(act) < sizeof(real) ? n * sizeof(real) : 0;
        double total = n * (2 * sizeof(act) + 2 * sizeof(real)) + master + (double)activations;
        if (total <= plan->bytes_per_rank) continue;
        plan->bytes_per_rank = total;
        plan->weights_bytes = n * sizeof(act);
        plan->gradient_bytes = n * sizeof(act);
        plan->moment_bytes = 2 * n * sizeof(real);
        plan->master_bytes = master;
        plan->activation_bytes = (double)activations;
    }
    free(list);
    plan->replication = stored / plan->parameters;
    /* fp16 weight and gradient, the same in float, two moments [§4.2] */
    plan->paper_bytes = 20 * plan->parameters_per_rank;
    plan->paper_activation_bytes =
        megatron_activation_bytes(c, s.tp, in->micro_batch, in->seq, in->recompute) *
        (double)(c->L / (size_t)s.pp) * plan->in_flight;
    plan->zero1_bytes = zero_bytes(1, s.dp) * plan->parameters_per_rank;
    plan->zero2_bytes = zero_bytes(2, s.dp) * plan->parameters_per_rank;
    plan->zero3_bytes = zero_bytes(3, s.dp) * plan->parameters_per_rank;
}

/* Stages take equally long; a backward pass takes two forward ones, recomputed three. */
static void plan_pipeline(Plan *plan, const RankOptions *in)
{
    size_t p = (size_t)in->layout.pp, m = (size_t)plan->micro_batches;
    size_t *most = (size_t *)xcalloc(p, sizeof *most);
    double tb = in->recompute ? 3 : 2;
    plan->bubble_formula = (double)(p - 1) / (double)m; /* [P56] */
    plan->bubble_gpipe = simulate_pipeline(most, GPIPE, p, m, 1, 1, tb);
    plan->bubble_interleaved = NAN;
    if (m % p == 0 && in->config.L % (2 * p) == 0)
        plan->bubble_interleaved = simulate_pipeline(most, ONE_F_ONE_B, p, m, 2, 1, tb);
    plan->bubble = simulate_pipeline(most, ONE_F_ONE_B, p, m, 1, 1, tb);
    plan->in_flight = (double)most[0];
    free(most);
}

/* all_reduces_per_iteration counts as the paper does: those of b*s*h that one micro-batch meets on
 * its way through all stages. The paper's 4 a layer leave out embedding, logits and recomputation:
 * 4l+2, with it 6l+2 [P6]. */
static void plan_messages(Plan *plan, const RankOptions *in)
{
    Message list[MAX_MESSAGES];
    size_t bsh = in->micro_batch * in->seq * in->config.C;
    for (int stage = 0; stage < in->layout.pp; stage++) {
        size_t n = list_messages(list, in, stage);
        double sent = 0;
        for (const Message *m = list; m < list + n; m++) {
            sent += (double)m->count * elements_sent(m) * (double)type_size(m->type);
            if (strcmp(m->group, "tp") || m->elements != bsh) continue;
            plan->all_reduces_per_iteration += (double)m->count / plan->micro_batches;
            plan->all_reduce_bytes = (double)message_bytes(m);
        }
        if (sent <= plan->bytes_sent_per_rank) continue;
        plan->bytes_sent_per_rank = sent;
        plan->busiest_stage = stage;
    }
}

static Plan make_plan(const RankOptions *in)
{
    Plan plan;
    const Config *c = &in->config;
    size_t batch = batch_size(in);
    double ranks = world_size(in->layout);
    memset(&plan, 0, sizeof plan);
    plan.parameters = (double)count_parameters(c);
    plan.micro_batches = (double)in->micro_batches;
    plan_pipeline(&plan, in);
    plan_memory(&plan, in);
    plan_messages(&plan, in);
    plan.tokens_per_iteration = (double)batch * (double)in->seq;
    plan.flops_formula = flops_formula(c, batch, in->seq, in->recompute);
    plan.flops_per_iteration = flops_exact(c, in->layout.tp, batch, in->seq, in->recompute);
    plan.v100_seconds = project(in, &v100, plan.flops_per_iteration, plan.bubble);
    plan.v100_efficiency = plan.flops_per_iteration / (ranks * v100.flops) / plan.v100_seconds;
    plan.v100_days = training_days(300000 * PAPER_BATCH, plan.parameters, ranks,
                                   v100.flops * plan.v100_efficiency);
    plan.seconds = NAN;
    plan.efficiency = NAN;
    return plan;
}

/* Projects the plan on a machine whose ranks sustain so many FLOP/s, and bytes/s in a ring. */
static void project_yours(Plan *plan, const RankOptions *in, double flops, double bandwidth)
{
    Machine yours = {flops, bandwidth, 0, 15e-6, INT_MAX, sizeof(act)};
    double ranks = world_size(in->layout);
    plan->seconds = project(in, &yours, plan->flops_per_iteration, plan->bubble);
    plan->efficiency = plan->flops_per_iteration / (ranks * flops) / plan->seconds;
}

/* ---- Printing -------------------------------------------------------------------------------- */

/* One number of a plan: its JSON key, and how to tell it to people. */
typedef struct {
    const char *key;
    size_t field; /* its place in Plan */
    const char *what;
    double unit;
    int decimals;
} Figure;

#define FIGURE(name) #name, offsetof(Plan, name)

/* clang-format off */
static const Figure figures[] = {
    {FIGURE(parameters), "parameters [P42]", 1, 0},
    {FIGURE(parameters_per_rank), "parameters of a rank, padded vocabulary [P44]", 1, 0},
    {FIGURE(replication), "parameters of all tensor ranks and stages / parameters", 1, 5},
    {FIGURE(bytes_per_rank), "memory of a rank, GB", 1e9, 3},
    {FIGURE(weights_bytes), "    weights, GB", 1e9, 3},
    {FIGURE(gradient_bytes), "    gradients, GB", 1e9, 3},
    {FIGURE(moment_bytes), "    AdamW's moments, GB", 1e9, 3},
    {FIGURE(master_bytes), "    float copy of narrower weights, GB", 1e9, 3},
    {FIGURE(activation_bytes), "    activations, GB", 1e9, 3},
    {FIGURE(paper_bytes), "the paper's 20 bytes a parameter (fp16 and float), GB", 1e9, 3},
    {FIGURE(paper_activation_bytes), "Megatron's activations in the layers, fp16, GB", 1e9, 3},
    {FIGURE(zero1_bytes), "ZeRO stage 1 (of 16 bytes a parameter), GB", 1e9, 3},
    {FIGURE(zero2_bytes), "ZeRO stage 2, GB", 1e9, 3},
    {FIGURE(zero3_bytes), "ZeRO stage 3, GB", 1e9, 3},
    {FIGURE(tokens_per_iteration), "tokens of an iteration", 1, 0},
    {FIGURE(micro_batches), "micro-batches of a data rank", 1, 0},
    {FIGURE(in_flight), "micro-batches in flight on the first stage", 1, 0},
    {FIGURE(bubble), "pipeline bubble / ideal time, 1F1B simulated", 1, 4},
    {FIGURE(bubble_formula), "    (p-1)/m", 1, 4},
    {FIGURE(bubble_gpipe), "    GPipe simulated", 1, 4},
    {FIGURE(bubble_interleaved), "    interleaved, 2 chunks a stage, simulated", 1, 4},
    {FIGURE(flops_per_iteration), "TFLOP of an iteration, all ranks, products counted", 1e12, 3},
    {FIGURE(flops_formula), "    by formula, without the padding", 1e12, 3},
    {FIGURE(all_reduces_per_iteration), "all-reduces of b*s*h a micro-batch", 1, 0},
    {FIGURE(all_reduce_bytes), "    bytes of each", 1, 0},
    {FIGURE(bytes_sent_per_rank), "bytes sent by a rank, iteration, GB", 1e9, 3},
    {FIGURE(busiest_stage), "    on stage", 1, 0},
    {FIGURE(v100_seconds), "on the paper's V100s (39 TFLOP/s, 130 GB/s): s/iteration", 1, 3},
    {FIGURE(v100_efficiency),
     "    efficiency: the share of it that is not messages or bubble", 1, 3},
    {FIGURE(v100_days), "    days for the paper's 157 G tokens, 8TP/(nX)", 1, 1},
    {FIGURE(seconds), "on yours (--peak, --bandwidth): s/iteration", 1, 3},
    {FIGURE(efficiency), "    efficiency: the share of it that is not messages or bubble", 1, 3},
};
/* clang-format on */

static void print_messages(Emitter *e, const RankOptions *in, int stage)
{
    Message list[MAX_MESSAGES];
    size_t n = list_messages(list, in, stage);
    emit_text(e, "\n%-10s %-14s %-30s %-10s %6s %11s %12s\n", "group", "op", "what", "paper",
              "calls", "bytes", "sent, each");
    emit_open(e, "messages", '[');
    for (const Message *m = list; m < list + n; m++) {
        int section = strstr(m->paper, "§") != NULL; /* § has two bytes, but takes one column */
        emit_open(e, NULL, '{');
        emit_string(e, "group", "%-10s ", m->group);
        emit_string(e, "op", "%-14s ", m->op);
        emit_string(e, "what", "%-30s ", m->what);
        emit_string(e, "paper", section ? "%-11s " : "%-10s ", m->paper);
        emit_count(e, "ranks", NULL, m->ranks);
        emit_count(e, "count", "%6zu ", m->count);
        emit_count(e, "elements", NULL, m->elements);
        emit_count(e, "bytes", "%11zu ", message_bytes(m));
        emit_number(e, "bytes_sent", "%12.0f\n", elements_sent(m) * (double)type_size(m->type));
        emit_close(e, '}');
    }
    emit_close(e, ']');
}

static void print_plan(const RankOptions *in, const Plan *plan, int json)
{
    const Config *c = &in->config;
    Layout s = in->layout;
    Emitter e = make_emitter(stdout, json);
    emit_text(&e, "%zu layers, hidden %zu, %zu heads, vocabulary %zu; ", c->L, c->C, c->H, c->V);
    emit_text(&e, "tp %d pp %d dp %d; batch %zu of %zu tokens, %zu a pass%s\n\n", s.tp, s.pp, s.dp,
              batch_size(in), in->seq, in->micro_batch, in->recompute ? ", recomputed" : "");
    emit_open(&e, NULL, '{');
    for (size_t i = 0; i < sizeof figures / sizeof *figures; i++) {
        const Figure *f = &figures[i];
        double x = *(const double *)(const void *)((const char *)plan + f->field);
        emit_number(&e, f->key, NULL, x);
        if (!isnan(x)) emit_text(&e, "%-60s %20.*f\n", f->what, f->decimals, x / f->unit);
    }
    print_messages(&e, in, (int)plan->busiest_stage);
    emit_close(&e, '}');
}

/* ---- `plan --paper`: the paper's tables, beside what this chapter derives -------------------- */

/* A number of a table: its JSON key; its heading, and so many decimals, -1: with exponent. */
typedef struct {
    const char *key, *heading;
    int decimals;
    double x;
} TableCell;

enum { MAX_ROWS = 4, MAX_CELLS = 11 };

typedef struct {
    TableCell cell[MAX_CELLS];
    size_t n;
} TableRow;

static void add(TableRow *row, const char *key, const char *heading, int decimals, double x)
{
    TableCell cell = {key, heading, decimals, x};
    row->cell[row->n++] = cell;
}

/* The scaling study: layers recomputed, a batch of 8 for each group of tensor ranks [§5.1]. */
static RankOptions paper_input(const char *preset, int tp)
{
    RankOptions in = {find_preset(preset), {tp, 1, 1}, 8, 1, 1024, 1, 1, 0};
    return in;
}

/* The same with 64 data ranks. */
static Plan plan_512(RankOptions in)
{
    in.layout.dp = 64;
    return make_plan(&in);
}

static void table_1(TableRow *row, const char *preset, int r)
{
    RankOptions in = paper_input(preset, 1 << r);
    Plan plan = make_plan(&in);
    double h = (double)in.config.C, heads = (double)in.config.H;
    add(row, "hidden", "hidden", 0, h);
    add(row, "heads", "heads", 0, heads);
    add(row, "head_size", "h/heads", 0, h / heads);
    add(row, "layers", "layers", 0, (double)in.config.L);
    add(row, "parameters", "parameters", 0, plan.parameters);
    add(row, "gpus", "GPUs", 0, 1 << r);
    add(row, "parameters_per_rank", "  per rank", 0, plan.parameters_per_rank);
    add(row, "replication", "  sum/P", 5, plan.replication);
    add(row, "flops_8", " FLOP(8)", -1, plan.flops_per_iteration);
    add(row, "flops_512", "FLOP(512)", -1, plan_512(in).flops_per_iteration);
}

static void figure_4(TableRow *row, const char *preset, int r)
{
    RankOptions in = paper_input(preset, 1 << r), plain = in; /* plain: without recomputation */
    size_t bs = in.micro_batch * in.seq, bsh = bs * in.config.C;
    double message = 0, sent = 0, cross_entropy = 0;
    Message list[MAX_MESSAGES];
    plain.recompute = 0;
    size_t n = list_messages(list, &plain, 0);
    for (const Message *m = list; m < list + n; m++) {
        if (m->elements == bs) cross_entropy += (double)(m->count * bs);
        if (m->elements != bsh) continue;
        message = 2 * (double)bsh;
        sent = 4 * 2 * elements_sent(m);
    }
    add(row, "layers", "layers", 0, (double)in.config.L);
    add(row, "gpus", "GPUs", 0, 1 << r);
    add(row, "paper", "4l", 0, r > 0 ? 4 * (double)in.config.L : 0);
    add(row, "plain", "4l+2", 0, make_plan(&plain).all_reduces_per_iteration);
    add(row, "recomputed", "6l+2", 0, make_plan(&in).all_reduces_per_iteration);
    add(row, "message_bytes", "message, B", 0, message);
    add(row, "layer_bytes_sent", "sent/layer, B", 0, sent);
    add(row, "cross_entropy", "cross entropy", 0, cross_entropy);
    add(row, "logits", "   logits", 0, (double)(bs * in.config.V));
}

static void table_2(TableRow *row, const char *preset, int r)
{
    static const double gpus[] = {64, 128, 512}, days[] = {0.86, 2.27, 2.10};
    Config c = find_preset(preset);
    double h = (double)c.C, heads = (double)c.H, seconds = days[r] * 86400 / EPOCH;
    double flops = flops_formula(&c, 512, 1024, 1);
    add(row, "layers", "layers", 0, (double)c.L);
    add(row, "hidden", "hidden", 0, h);
    add(row, "heads", "heads", 0, heads);
    add(row, "head_size", "h/heads", 0, h / heads);
    add(row, "parameters", "parameters", 0, (double)count_parameters(&c));
    add(row, "gpus", "GPUs", 0, gpus[r]);
    add(row, "days_per_epoch", "days", 2, days[r]);
    add(row, "seconds", "s/iter", 3, seconds);
    add(row, "flops", "    FLOP", -1, flops);
    add(row, "pflops", "PFLOP/s", 2, flops / seconds / 1e15);
    add(row, "tflops_gpu", "TF/GPU", 1, flops / seconds / gpus[r] / 1e12);
}

static void table_7(TableRow *row, const char *label, int r)
{
    static const double percent[] = {82, 80, 77};
    RankOptions in = paper_input("8.3B", 8);
    double heads = atoi(label);
    in.config.H = (size_t)heads;
    add(row, "head_size", "h/heads", 0, (double)in.config.C / heads);
    add(row, "paper_percent", "paper %", 0, percent[r]);
    add(row, "tflops_gpu", "TF/GPU", 1, percent[r] / 100 * PAPER_RATE / 1e12);
    add(row, "flops", "    FLOP", -1, make_plan(&in).flops_per_iteration);
    add(row, "scores", "scores/GPU", 0, heads / in.layout.tp * 8 * 1024 * 1024);
}

static void table_8(TableRow *row, const char *label, int r)
{
    static const double speedup[] = {1, 1.64, 2.34, 2.98};
    RankOptions in = paper_input("1.2B", atoi(label));
    double gpus = in.layout.tp, efficiency = make_plan(&in).v100_efficiency;
    add(row, "paper_speedup", "paper", 2, speedup[r]);
    add(row, "paper_percent", "paper %", 2, 100 * speedup[r] / gpus);
    add(row, "speedup", "we", 2, gpus * efficiency);
    add(row, "percent", "we %", 2, 100 * efficiency);
    add(row, "tflops_gpu", "TF/GPU", 1, speedup[r] / gpus * PAPER_RATE / 1e12);
}

static void figure_5(TableRow *row, const char *preset, int r)
{
    static const double percent[] = {100, 95, 82, 77}, percent_dp[] = {96, 83, 79, 74};
    RankOptions in = paper_input(preset, 1 << r);
    double gpus = in.layout.tp;
    double rate = percent[r] / 100 * PAPER_RATE, rate_dp = percent_dp[r] / 100 * PAPER_RATE;
    add(row, "gpus", "GPUs", 0, gpus);
    add(row, "paper_percent", "paper %", 0, percent[r]);
    add(row, "percent", "we %", 1, 100 * make_plan(&in).v100_efficiency);
    add(row, "tflops_gpu", "TF/GPU", 1, rate / 1e12);
    add(row, "pflops", "PFLOP/s", 4, gpus * rate / 1e15);
    add(row, "gpus_dp", "GPUs", 0, 64 * gpus);
    add(row, "paper_percent_dp", "paper %", 0, percent_dp[r]);
    add(row, "percent_dp", "we %", 1, 100 * plan_512(in).v100_efficiency);
    add(row, "tflops_gpu_dp", "TF/GPU", 1, rate_dp / 1e12);
    add(row, "pflops_dp", "PFLOP/s", 2, 64 * gpus * rate_dp / 1e15);
}

static void paper_totals(TableRow *row, const char *label, int r)
{
    (void)label;
    (void)r;
    add(row, "tokens_per_epoch", "tokens/epoch", 0, EPOCH * PAPER_BATCH);
    add(row, "tokens", "300k iterations", 0, 300000 * PAPER_BATCH);
    add(row, "epochs", "epochs", 3, 300000 / EPOCH);
    add(row, "abstract_share", "15.1 PFLOP/s", 3, 15.1e15 / (512 * PAPER_RATE));
    add(row, "figure5_pflops", "74%, PFLOP/s", 2, 0.74 * 512 * PAPER_RATE / 1e15);
}

typedef struct {
    const char *key;
    void (*fill)(TableRow *row, const char *label, int r); /* r: the row's number */
    const char *label[MAX_ROWS];
    const char *title, *remark; /* remark: where paper, code and arithmetic disagree */
} Table;

/* clang-format off */
static const Table tables[] = {
    {"table1", table_1, {"1.2B", "2.5B", "4.2B", "8.3B-scaling"},
     "Table 1. Models of the scaling study; batch 8, with data parallelism 512 [P42, P44-P46]",
     "per rank: parameters of a tensor rank; sum/P: those of all ranks, replicas too, to the "
     "model's."},
    {"figure4", figure_4, {"1.2B", "2.5B", "4.2B", "8.3B-scaling"},
     "Figure 4. All-reduces of an iteration, batch 8, fp16 [P5, P6, P9, P10, P18]",
     "The paper counts 4 a layer; embedding and logits add 2, recomputation 2 a layer. "
     "For the cross\nentropy it counts b*s numbers; its code, and this one, move 3*b*s. "
     "Gathered logits would be b*s*V."},
    {"table2", table_2, {"355M", "2.5B", "8.3B"},
     "Table 2. GPT-2 models trained; batch 512; an epoch is 68,507 iterations [P45, P47]",
     "Days give seconds, and with the FLOPs of [P46] a rate: 13.8 PFLOP/s for 8.3B in training, "
     "15.1 in\nthe abstract; the paper does not say how it counts. 8.3B has 24 heads of 128, "
     "in Table 1 32 of 96."},
    {"table7", table_7, {"16 heads", "24 heads", "32 heads"},
     "Table 7. 8.3B on 8 GPUs with heads of different size, batch 8 [P45]",
     "Neither products nor messages change; the scores do, a*b*s*s a layer, so softmax and "
     "dropout do too."},
    {"table8", table_8, {"1 GPU", "2 GPUs", "4 GPUs", "8 GPUs"},
     "Table 8. Strong scaling of 1.2B, batch 8; \"we\": the projection of `plan` [P49]",
     "The projection knows messages only, not that narrow products are slow and LayerNorms are "
     "duplicated."},
    {"figure5", figure_5, {"1.2B", "2.5B", "4.2B", "8.3B-scaling"},
     "Figure 5. Weak scaling, % of 39 TFLOP/s; \"we\": the projection of `plan` [P48, P50]",
     "The abstract's 15.1 PFLOP/s on 512 GPUs are 75.6%, it says 76%; the figure's 74% are 14.8 "
     "PFLOP/s."},
    {"totals", paper_totals, {"8.3B"},
     "Totals [P47, P48]",
     "The abstract's 15.1 PFLOP/s and Figure 5's 74%, both of 512 GPUs, disagree."},
};
/* clang-format on */

static void print_table(Emitter *e, const Table *t)
{
    emit_open(e, t->key, '[');
    emit_text(e, "%s\n%-12s", t->title, "");
    for (int r = 0; r < MAX_ROWS && t->label[r]; r++) {
        TableRow row;
        row.n = 0;
        t->fill(&row, t->label[r], r);
        const TableCell *end = row.cell + row.n;
        if (r == 0)
            for (const TableCell *c = row.cell; c < end; c++) emit_text(e, "  %6s", c->heading);
        emit_open(e, NULL, '{');
        emit_string(e, "name", "\n%-12s", t->label[r]);
        for (const TableCell *c = row.cell; c < end; c++) {
            int width = (int)max_size(6, strlen(c->heading));
            emit_number(e, c->key, NULL, c->x);
            if (c->decimals < 0) emit_text(e, "  %*.2e", width, c->x);
            else emit_text(e, "  %*.*f", width, c->decimals, c->x);
        }
        emit_close(e, '}');
    }
    emit_text(e, "\n%s\n\n", t->remark);
    emit_close(e, ']');
}

static void print_paper(int json)
{
    Emitter e = make_emitter(stdout, json);
    emit_open(&e, NULL, '{');
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) print_table(&e, &tables[i]);
    emit_close(&e, '}');
}

/* ---- Trace: what the ranks really said ------------------------------------------------------- */

/* What a stage's ranks say by group and operation: count calls, and elements of all of them
 * together. total has room for MAX_MESSAGES; returns how many there are. */
static size_t total_messages(Message *total, const RankOptions *in, int stage)
{
    size_t n = list_messages(total, in, stage), totals = 0;
    for (size_t j = 0; j < n; j++) {
        Message m = total[j];
        size_t i = 0;
        m.elements *= m.count;
        while (i < totals && (strcmp(total[i].group, m.group) || strcmp(total[i].op, m.op))) i++;
        if (i < totals) {
            total[i].count += m.count;
            total[i].elements += m.elements;
        } else total[totals++] = m;
    }
    return totals;
}

/* The same over a trace, for one group and operation. */
static Message sum_events(const Trace *trace, const Message *total)
{
    Message sum = *total;
    sum.count = 0;
    sum.elements = 0;
    for (const Event *e = trace->event; e < trace->event + trace->n; e++) {
        if (strcmp(e->group, total->group) || strcmp(e->op, total->op)) continue;
        sum.count++;
        sum.elements += e->elements;
    }
    return sum;
}

/* Do a rank's events add up to what the plan lists, by group and operation? Says where not. */
static int trace_agrees(const Trace *trace, const RankOptions *in, int stage)
{
    Message total[MAX_MESSAGES];
    size_t n = total_messages(total, in, stage), events = 0;
    int agrees = 1;
    for (const Message *m = total; m < total + n; m++) {
        Message sum = sum_events(trace, m);
        events += sum.count;
        if (sum.count == m->count && sum.elements == m->elements) continue;
        fprintf(stderr,
                "stage %d, %s %s: %zu calls of %zu elements in all, but the plan has %zu of %zu\n",
                stage, m->group, m->op, sum.count, sum.elements, m->count, m->elements);
        agrees = 0;
    }
    return agrees && events == trace->n; /* and nothing was said that the plan does not know */
}

/* Every collective of a rank. */
static void print_events(Emitter *e, const Trace *trace, int stage)
{
    for (const Event *v = trace->event; v < trace->event + trace->n; v++) {
        char layer[16] = "-";
        if (v->place.layer >= 0) snprintf(layer, sizeof layer, "%d", v->place.layer);
        emit_text(e, "%5d  %5s  %-14s  %-10s  %-14s  %-9s  %10zu  %11zu  %s\n", stage, layer,
                  v->place.operation, v->place.edge, v->op, v->group, v->elements, v->bytes,
                  v->place.paper);
        emit_open(e, NULL, '{');
        emit_count(e, "stage", NULL, (size_t)stage);
        emit_string(e, "op", NULL, v->op);
        emit_string(e, "group", NULL, v->group);
        emit_count(e, "elements", NULL, v->elements);
        emit_count(e, "bytes", NULL, v->bytes);
        emit_number(e, "layer", NULL, v->place.layer);
        emit_string(e, "where", NULL, v->place.operation);
        emit_string(e, "edge", NULL, v->place.edge);
        emit_string(e, "paper", NULL, v->place.paper);
        emit_close(e, '}');
    }
}

static void print_layer(Emitter *e, const Trace *trace, int layer)
{
    size_t calls = 0, elements = 0;
    for (const Event *v = trace->event; v < trace->event + trace->n; v++) {
        if (v->place.layer != layer) continue;
        calls++;
        elements += v->elements;
    }
    emit_open(e, NULL, '{');
    emit_count(e, "layer", "  layer %-3zu                 ", (size_t)layer);
    emit_count(e, "calls", "%5zu calls  ", calls);
    emit_count(e, "elements", "%12zu elements\n", elements);
    emit_close(e, '}');
}

/* A stage's totals by group and operation, and by layer. Returns whether they are the plan's. */
static int print_totals(Emitter *e, const Trace *trace, const RankOptions *in, int stage)
{
    int depth = (int)in->config.L / in->layout.pp, agrees = trace_agrees(trace, in, stage);
    Message total[MAX_MESSAGES];
    size_t n = total_messages(total, in, stage);
    emit_open(e, NULL, '{');
    emit_count(e, "stage", "\nstage %zu\n", (size_t)stage);
    emit_flag(e, "agrees_with_plan", agrees);
    for (const Message *m = total; m < total + n; m++) {
        Message sum = sum_events(trace, m);
        char key[64];
        snprintf(key, sizeof key, "%s_%s", sum.group, sum.op);
        emit_open(e, key, '{');
        emit_text(e, "  %-9s  %-14s  ", sum.group, sum.op);
        emit_count(e, "calls", "%5zu calls  ", sum.count);
        emit_count(e, "elements", "%12zu elements  ", sum.elements);
        emit_text(e, "%13zu bytes\n", sum.elements * type_size(sum.type));
        emit_close(e, '}');
    }
    emit_open(e, "layers", '[');
    for (int i = 0; i < depth && in->layout.tp > 1; i++) print_layer(e, trace, stage * depth + i);
    emit_close(e, ']');
    emit_text(e, "  %s\n", agrees ? "equal to what `plan` lists" : "NOT what `plan` lists");
    emit_close(e, '}');
    return agrees;
}

/* The first rank of each stage. Returns whether all totals are the plan's. */
static int print_trace(const Trace *trace, const RankOptions *in, int json)
{
    int agrees = 1, stage_ranks = in->layout.tp * in->layout.dp;
    Emitter e = make_emitter(stdout, json);
    emit_text(&e, "%5s  %5s  %-14s  %-10s  %-14s  %-9s  %10s  %11s  %s\n", "stage", "layer",
              "where", "edge", "op", "group", "elements", "bytes", "paper");
    emit_open(&e, NULL, '{');
    emit_open(&e, "events", '[');
    for (int s = 0; s < in->layout.pp; s++) print_events(&e, &trace[s * stage_ranks], s);
    emit_close(&e, ']');
    emit_open(&e, "totals", '[');
    for (int s = 0; s < in->layout.pp; s++)
        agrees &= print_totals(&e, &trace[s * stage_ranks], in, s);
    emit_close(&e, ']');
    emit_close(&e, '}');
    return agrees;
}

/* =================================================================================================
 * Chapter 17. Command line
 * ============================================================================================== */

#ifndef LOSS_SCALE
#define LOSS_SCALE "1" /* --loss-scale, if it is not given */
#endif

enum { TRAIN = 1, EVAL = 2, GENERATE = 4, TOKENIZE = 8, PLAN = 16, TRACE = 32, INFO = 64 };
enum { SHAPED = TRAIN | PLAN | TRACE, RUNS = TRAIN | EVAL | GENERATE | TRACE, ALL = 127 };
enum { MAX_PATHS = 256 };

typedef struct {
    const char *name, *arguments, *what;
    int bit;
} Command;

static const Command commands[] = {
    {"train", "--data FILE|DIR|PREFIX..", "trains a model on text", TRAIN},
    {"eval", "--model DIR (--data .. | --wikitext FILE | --lambada FILE)",
     "measures loss, perplexity, accuracy", EVAL},
    {"generate", "--model DIR --prompt TEXT", "continues a text", GENERATE},
    {"tokenize", "[--tokenizer DIR] IN OUT", "text -> Megatron's indexed dataset OUT.bin, OUT.idx",
     TOKENIZE},
    {"plan", "[--config NAME] [--paper]", "parameters, memory, FLOPs, messages of a run", PLAN},
    {"trace", "[--config NAME] [--tp P ..]", "one training step; every collective, in order",
     TRACE},
    {"info", "DIR|FILE", "tensors, shapes, types, config", INFO},
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

typedef enum { FLAG, COUNT, NUMBER, TEXT, PATHS } Kind;

typedef struct {
    const Command *command;
    int json, recompute, paper;
    const char *paths[MAX_PATHS]; /* of --data */
    size_t n_paths;
    const char *operand[2]; /* IN and OUT, or DIR|FILE */
    size_t operands;
    const char *config, *activation, *tokenizer, *init, *resume, *save, *log;
    const char *model, *wikitext, *lambada, *prompt, *lr_decay;
    Optimizer optimizer; /* its decay: see make_optimizer() */
    size_t layers, hidden, heads, seq, vocab, batch, micro_batch, steps, seed;
    size_t tp, pp, dp, save_every, eval_every, eval_iters, overlap, limit, tokens, top_k;
    double dropout, valid_percent, temperature, top_p, peak, bandwidth;
    unsigned char given[64]; /* by number in options[]: was it on the command line? */
} Options;

/* From this table come parsing, help, defaults, and what a checkpoint remembers. */
typedef struct {
    const char *name, *argument, *help;
    int commands;
    Kind kind;
    size_t field;
    double low, high;     /* of a COUNT or NUMBER */
    const char *fallback; /* as it would stand on the command line; NULL: none */
    int remembered;       /* saved with a checkpoint, and taken from there by --resume */
} Option;

/* clang-format off */
#define AT(field) offsetof(Options, field)
static const double HUGE_COUNT = 9007199254740992.0; /* 2^53: exact as a double */
static const Option options[] = {
    {"--data",          "PATH..", "text files, folders of them, or prefixes of indexed datasets",
     TRAIN | EVAL, PATHS, AT(paths), 0, 0, NULL, 0},
    {"--config",        "NAME", "tiny 124M 355M 774M 1558M 1.2B 2.5B 4.2B 8.3B 8.3B-scaling",
     SHAPED, TEXT, AT(config), 0, 0, "tiny", 0},
    {"--layers",        "N",    "transformer layers",
     SHAPED, COUNT, AT(layers), 1, 10000, NULL, 0},
    {"--hidden",        "N",    "hidden size",
     SHAPED, COUNT, AT(hidden), 1, 1 << 20, NULL, 0},
    {"--heads",         "N",    "attention heads",
     SHAPED, COUNT, AT(heads), 1, 1 << 16, NULL, 0},
    {"--seq",           "N",    "tokens in a sequence; of a new model, its positions",
     SHAPED | EVAL, COUNT, AT(seq), 1, 1 << 20, NULL, 1},
    {"--vocab",         "N",    "vocabulary of a new model, if larger than the tokenizer's",
     SHAPED, COUNT, AT(vocab), 1, 1 << 24, NULL, 0},
    {"--activation",    "NAME", "gelu_new (tanh, the paper's) or gelu (erf)",
     TRAIN | TRACE, TEXT, AT(activation), 0, 0, NULL, 0},
    {"--batch",         "N",    "sequences in a step, on all data ranks together",
     SHAPED, COUNT, AT(batch), 1, 1 << 30, "8", 1},
    {"--micro-batch",   "N",    "sequences in one pass; default: batch/dp, or 1 with --pp",
     SHAPED | EVAL, COUNT, AT(micro_batch), 1, 1 << 20, NULL, 0},
    {"--steps",         "N",    "training steps in all",
     TRAIN, COUNT, AT(steps), 1, HUGE_COUNT, "1000", 1},
    {"--lr",            "X",    "peak learning rate",
     TRAIN, NUMBER, AT(optimizer.lr), 0, 1e3, "1.5e-4", 1},
    {"--min-lr",        "X",    "floor of its decay; default: --lr / 15, the paper's ratio",
     TRAIN, NUMBER, AT(optimizer.min_lr), 0, 1e3, NULL, 1},
    {"--warmup",        "N",    "steps of linear warm-up; default: a hundredth of --decay-steps",
     TRAIN, COUNT, AT(optimizer.warmup), 0, HUGE_COUNT, NULL, 1},
    {"--decay-steps",   "N",    "where the cosine ends; default: --steps",
     TRAIN, COUNT, AT(optimizer.decay_steps), 1, HUGE_COUNT, NULL, 1},
    {"--lr-decay",      "NAME", "paper, megatron or cosine: what its cosine spans",
     TRAIN, TEXT, AT(lr_decay), 0, 0, "paper", 1},
    {"--beta1",         "X",    "AdamW",
     TRAIN, NUMBER, AT(optimizer.beta1), 0, 0.999999, "0.9", 1},
    {"--beta2",         "X",    "AdamW",
     TRAIN, NUMBER, AT(optimizer.beta2), 0, 0.999999, "0.999", 1},
    {"--adam-eps",      "X",    "AdamW",
     TRAIN, NUMBER, AT(optimizer.eps), 1e-30, 1, "1e-8", 1},
    {"--weight-decay",  "X",    "decoupled; not for biases and LayerNorm",
     TRAIN, NUMBER, AT(optimizer.weight_decay), 0, 1e3, "0.01", 1},
    {"--clip",          "X",    "largest norm of the whole gradient; 0: any",
     TRAIN, NUMBER, AT(optimizer.clip), 0, 1e30, "1", 1},
    {"--dropout",       "X",    "at all four sites; default: the model's, 0.1 of a new one",
     TRAIN | TRACE, NUMBER, AT(dropout), 0, 0.99, NULL, 0},
    {"--loss-scale",    "X",    "fixed; 0: dynamic, from 2^32",
     TRAIN, NUMBER, AT(optimizer.loss_scale), 0, 0x1p64, LOSS_SCALE, 1},
    {"--seed",          "N",    "of weights, order of samples, dropout, tokens drawn",
     TRAIN | GENERATE | TRACE, COUNT, AT(seed), 0, HUGE_COUNT, "1234", 1},
    {"--tp",            "P",    "tensor-parallel ranks [§3]",
     RUNS | PLAN, COUNT, AT(tp), 1, 64, "1", 0},
    {"--pp",            "S",    "pipeline stages",
     SHAPED, COUNT, AT(pp), 1, 64, "1", 0},
    {"--dp",            "D",    "data-parallel replicas [§2.3]",
     SHAPED, COUNT, AT(dp), 1, 65536, "1", 0},
    {"--recompute",     NULL,   "keep only each layer's input; compute the rest again",
     SHAPED, FLAG, AT(recompute), 0, 0, NULL, 0},
    {"--tokenizer",     "DIR",  "vocab.json, merges.txt; default: the model's, else bytes",
     TRAIN | EVAL | GENERATE | TOKENIZE, TEXT, AT(tokenizer), 0, 0, NULL, 0},
    {"--init",          "DIR",  "start from this model",
     TRAIN, TEXT, AT(init), 0, 0, NULL, 0},
    {"--resume",        "DIR",  "go on from this checkpoint, with its options",
     TRAIN, TEXT, AT(resume), 0, 0, NULL, 0},
    {"--save",          "DIR",  "save here, a folder in Hugging Face layout; default: --resume's",
     TRAIN, TEXT, AT(save), 0, 0, NULL, 0},
    {"--save-every",    "N",    "steps between saves; 0: at the end only",
     TRAIN, COUNT, AT(save_every), 0, HUGE_COUNT, "0", 0},
    {"--eval-every",    "N",    "steps between losses on held-out text; 0: never",
     TRAIN, COUNT, AT(eval_every), 0, HUGE_COUNT, "0", 0},
    {"--eval-iters",    "N",    "held-out batches each time; 0: all of the held-out text",
     TRAIN, COUNT, AT(eval_iters), 0, HUGE_COUNT, "0", 0},
    {"--valid-percent", "X",    "held-out end of the text; default: 5 with --eval-every, else 0",
     TRAIN, NUMBER, AT(valid_percent), 0, 99, NULL, 1},
    {"--log",           "FILE", "one JSON line a step, appended",
     TRAIN, TEXT, AT(log), 0, 0, NULL, 0},
    {"--model",         "DIR",  "a GPT-2 in Hugging Face layout",
     EVAL | GENERATE, TEXT, AT(model), 0, 0, NULL, 0},
    {"--wikitext",      "FILE", "WikiText-103's test set, as the paper scores it [App. E]",
     EVAL, TEXT, AT(wikitext), 0, 0, NULL, 0},
    {"--lambada",       "FILE", "LAMBADA, .jsonl [§5.2]",
     EVAL, TEXT, AT(lambada), 0, 0, NULL, 0},
    {"--overlap",       "N",    "new targets in each window; default: 32 for --wikitext, else all",
     EVAL, COUNT, AT(overlap), 1, 1 << 20, NULL, 0},
    {"--limit",         "N",    "only the first N windows or examples; 0: only count them",
     EVAL, COUNT, AT(limit), 0, HUGE_COUNT, NULL, 0},
    {"--prompt",        "TEXT", "what to continue",
     GENERATE, TEXT, AT(prompt), 0, 0, "", 0},
    {"--tokens",        "N",    "how many to generate at most",
     GENERATE, COUNT, AT(tokens), 1, HUGE_COUNT, "100", 0},
    {"--temperature",   "X",    "0: always the most probable token",
     GENERATE, NUMBER, AT(temperature), 0, 1e3, "1", 0},
    {"--top-k",         "K",    "draw from the K most probable; 0: from all",
     GENERATE, COUNT, AT(top_k), 0, 1 << 24, "0", 0},
    {"--top-p",         "X",    "draw from the most probable that make up X",
     GENERATE, NUMBER, AT(top_p), 0, 1, "1", 0},
    {"--paper",         NULL,   "the paper's tables beside what follows from the shapes",
     PLAN, FLAG, AT(paper), 0, 0, NULL, 0},
    {"--peak",          "X",    "your machine: TFLOP/s that a rank sustains",
     PLAN, NUMBER, AT(peak), 1e-6, 1e6, NULL, 0},
    {"--bandwidth",     "X",    "your machine: GB/s between ranks",
     PLAN, NUMBER, AT(bandwidth), 1e-6, 1e6, NULL, 0},
    {"--json",          NULL,   "JSON on stdout",
     ALL, FLAG, AT(json), 0, 0, NULL, 0},
};
#undef AT
/* clang-format on */
enum { N_OPTIONS = sizeof options / sizeof *options };
static_assert((size_t)N_OPTIONS <= sizeof((Options *)NULL)->given, "given[] has room for all");

/* Lists the options that one of these commands has; the first column is so wide. */
static void print_options(const Option *table, int n, int bits, int width)
{
    for (const Option *o = table; o < table + n; o++) {
        char head[40];
        if (!(o->commands & bits)) continue;
        snprintf(head, sizeof head, "%s %s", o->name, o->argument ? o->argument : "");
        printf("  %-*s %s", width, head, o->help);
        if (o->fallback && *o->fallback) printf(" [%s]", o->fallback);
        putchar('\n');
    }
}

static void print_help(const Command *only) /* NULL: of all commands */
{
    if (!is_writer(NULL)) return;
    printf("Megatron-LM GPT-2 (arXiv 1909.08053) in one C file.\n\n");
    for (int i = 0; i < N_COMMANDS; i++)
        if (!only || only == &commands[i])
            printf("  megatron_gpt2 %-8s %-60s %s\n", commands[i].name, commands[i].arguments,
                   commands[i].what);
    printf(only ? "\n" : "\n  megatron_gpt2 COMMAND --help lists the options of one command.\n\n");
    print_options(options, N_OPTIONS, only ? only->bit : ALL, 20);
}

/* Stores the text of an option's argument; says what is wrong with it, or NULL. */
static const char *set_option(void *o, const Option *option, const char *text)
{
    char *field = (char *)o + option->field, *end;
    if (option->kind == TEXT) {
        *(const char **)(void *)field = text;
        return NULL;
    }
    errno = 0;
    double x = strtod(text, &end);
    if (end == text || *end || errno || !(x >= option->low && x <= option->high))
        return option->kind == COUNT ? "a whole number" : "a number";
    if (option->kind == NUMBER) *(double *)(void *)field = x;
    else if (x != floor(x)) return "a whole number";
    else *(size_t *)(void *)field = (size_t)x;
    return NULL;
}

/* Stores the option at argv[i] in o, unless it takes PATHS, and counts it in given[] by its number
 * in the table. command: the name and bit of the one that is given options. Returns the index of
 * the last word used. */
static int parse_option(void *o, unsigned char *given, const Option *table, int n,
                        const char *command, int bit, int argc, char **argv, int i)
{
    int number = 0;
    while (number < n && strcmp(table[number].name, argv[i])) number++;
    if (number == n) usage_error("%s knows no %s", command, argv[i]);
    const Option *option = &table[number];
    if (!(option->commands & bit)) usage_error("%s has no option %s", command, option->name);
    if (given[number]) usage_error("%s is given twice", option->name);
    given[number] = 1;
    if (option->kind == FLAG) *(int *)(void *)((char *)o + option->field) = 1;
    else if (i + 1 == argc) usage_error("%s needs %s", option->name, option->argument);
    if (option->kind == FLAG || option->kind == PATHS) return i;
    i++;
    const char *wrong = set_option(o, option, argv[i]);
    if (wrong)
        usage_error("%s %s: %s from %.16g to %.16g is expected", option->name, argv[i], wrong,
                    option->low, option->high);
    return i;
}

/* Was this option, which the table has, on the command line? */
static int given(const Options *o, const char *name)
{
    int i = 0;
    while (strcmp(options[i].name, name)) i++;
    return o->given[i];
}

/* The value of an option that is a COUNT or a NUMBER. */
static double option_number(const Option *option, const Options *o)
{
    const void *field = (const char *)o + option->field;
    return option->kind == COUNT ? (double)*(const size_t *)field : *(const double *)field;
}

static int asks_help(const char *word) { return !strcmp(word, "--help") || !strcmp(word, "-h"); }

/* The words from argv[i] to the next option are paths of --data. Returns the index of the last. */
static int parse_paths(Options *o, int argc, char **argv, int i)
{
    for (; i < argc && strncmp(argv[i], "--", 2); i++) {
        if (o->n_paths == MAX_PATHS)
            usage_error("more than %d paths; name their folder instead", MAX_PATHS);
        o->paths[o->n_paths++] = argv[i];
    }
    return i - 1;
}

/* Fills o from the command line. Returns 0 if it asked for help, which is printed then. */
static int parse_options(Options *o, int argc, char **argv)
{
    memset(o, 0, sizeof *o);
    if (argc < 2) usage_error("a command is expected: try megatron_gpt2 --help");
    if (asks_help(argv[1]) || !strcmp(argv[1], "help")) {
        print_help(NULL);
        return 0;
    }
    for (int i = 0; i < N_COMMANDS; i++)
        if (!strcmp(argv[1], commands[i].name)) o->command = &commands[i];
    const Command *command = o->command;
    if (!command) usage_error("there is no command %s: try megatron_gpt2 --help", argv[1]);
    for (int i = 0; i < N_OPTIONS; i++)
        if (options[i].fallback) set_option(o, &options[i], options[i].fallback);
    for (int i = 2; i < argc; i++) {
        if (asks_help(argv[i])) {
            print_help(command);
            return 0;
        }
        if (argv[i][0] != '-' && command->bit & (TOKENIZE | INFO)) {
            if (o->operands == (command->bit == TOKENIZE ? 2 : 1))
                usage_error("%s is one argument too many", argv[i]);
            o->operand[o->operands++] = argv[i];
            continue;
        }
        int is_data = !strcmp(argv[i], "--data");
        i = parse_option(o, o->given, options, N_OPTIONS, command->name, command->bit, argc, argv,
                         i);
        if (is_data) i = parse_paths(o, argc, argv, i + 1);
    }
    return 1;
}

/* ---- What the commands share ----------------------------------------------------------------- */

/* A line on stderr about the whole run: one process writes it. */
__attribute__((format(printf, 1, 2))) static void note(const char *format, ...)
{
    va_list args;
    if (!is_writer(NULL)) return;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
}

static Layout make_layout(const Options *o)
{
    Layout s = {(int)o->tp, (int)o->pp, (int)o->dp};
    return s;
}

/* The shape of a new model: a preset, changed by --layers and so on. */
static Config new_config(const Options *o)
{
    Config c = find_preset(o->config);
    size_t L = o->layers ? o->layers : c.L;
    size_t C = o->hidden ? o->hidden : c.C;
    size_t H = o->heads ? o->heads : c.H;
    c = make_config(L, C, H, o->seq ? o->seq : c.P, o->vocab ? o->vocab : c.V);
    if (C % H) die("--hidden %zu is no multiple of --heads %zu: heads must be of equal size", C, H);
    if (o->activation && strcmp(o->activation, "gelu_new") && strcmp(o->activation, "gelu"))
        die("--activation %s is not known: gelu_new or gelu is expected", o->activation);
    if (o->activation && !strcmp(o->activation, "gelu")) c.gelu = GELU_ERF;
    return c;
}

/* Sequences in one pass. */
static size_t micro_batch_size(const Options *o)
{
    size_t micro = o->micro_batch;
    if (!micro) micro = o->pp > 1 ? 1 : max_size(o->batch / o->dp, 1);
    if (o->batch % (o->dp * micro))
        die("--batch %zu is no multiple of --dp %zu times --micro-batch %zu: every data rank must "
            "do whole passes",
            o->batch, o->dp, micro);
    return micro;
}

/* Tokens in a sequence. */
static size_t sequence_length(const Options *o, const Config *c)
{
    size_t seq = o->seq ? o->seq : c->P;
    if (seq > c->P) die("--seq %zu is more than the model's %zu positions", seq, c->P);
    return seq;
}

static RankOptions training_ranks(const Options *o, const Config *c)
{
    size_t micro = micro_batch_size(o), micro_batches = o->batch / micro / o->dp;
    RankOptions r = {*c, make_layout(o), micro,  micro_batches, sequence_length(o, c),
                     1,  o->recompute,   o->seed};
    return r;
}

static void set_dropout(Config *c, const Options *o)
{
    if (!given(o, "--dropout")) return;
    c->embd_pdrop = (real)o->dropout;
    c->attn_pdrop = (real)o->dropout;
    c->resid_pdrop = (real)o->dropout;
}

/* Under today's names or OpenAI's. */
static int has_tokenizer(const char *folder)
{
    return file_exists(folder, "vocab.json") || file_exists(folder, "encoder.json");
}

/* The tokenizer named, or the one in the model's folder, or bytes. */
static Tokenizer *find_tokenizer(const char *named, const char *model, const Config *c)
{
    if (named) return tokenizer_open(named);
    if (model && has_tokenizer(model)) return tokenizer_open(model);
    if (model && c->V != 256 && c->V != 257)
        die("%s has no vocab.json, and its %zu tokens are not bytes: name the folder of its "
            "tokenizer with --tokenizer DIR",
            model, c->V);
    return tokenizer_bytes();
}

static void check_tokenizer(const Tokenizer *t, const Config *c)
{
    if (t->vocabulary > c->V)
        die("the tokenizer has %zu tokens, but the model's vocabulary only %zu: name the model's "
            "own tokenizer, or, for a new model, a larger --vocab",
            t->vocabulary, c->V);
}

/* What is padded: with <|endoftext|> where there is one. */
static int padding(const Tokenizer *t) { return t->end_of_text >= 0 ? t->end_of_text : 0; }

/* Dies if the ranks of a training run do not fit into the memory of this machine, where all are. */
static void check_memory(const RankOptions *o)
{
    double total = 0, have = device_memory();
    for (int r = 0; r < world_size(o->layout); r++) {
        size_t elements;
        list_tensors(NULL, &elements, &o->config, o->layout, r);
        total += (double)elements * (2 * sizeof(act) + 2 * sizeof(real));
        if (sizeof(act) < sizeof(real)) total += (double)elements * sizeof(real);
        total += (double)activation_bytes(&o->config, o->layout, r, o->micro_batch, o->seq,
                                          o->recompute, o->micro_batches);
    }
    if (have > 0 && total > have)
        die("the run takes %.1f GB in all, and this machine has %.1f: a smaller model, "
            "--micro-batch or --seq, or --recompute, takes less",
            total / 1e9, have / 1e9);
}

static void warn_if_crowded(Layout s)
{
    int ranks = world_size(s), devices = device_count();
    if (ranks > devices)
        note("%d ranks share %d %s: results are the same, but it takes longer\n", ranks, devices,
             device_kind());
}

/* ---- train ----------------------------------------------------------------------------------- */

enum { CURVE_WIDTH = 72, CURVE_HEIGHT = 14 };

/* Mean losses of equal parts of a run. */
typedef struct {
    double sum[CURVE_WIDTH];
    size_t n[CURVE_WIDTH];
} Curve;

/* What the writer tells of a training run. */
struct Report {
    Meter meter;
    int json;
    FILE *log; /* NULL: none */
    Curve curve;
    double last_loss, seconds; /* the last step's loss; how long all steps took */
    size_t skipped;
};

/* A training run, and what is around it. `run` comes first: save_run() finds the rest from it. */
typedef struct {
    Run run;
    Report report;
    const Options *o;
    Tokenizer *tokenizer;
    const char *tokenizer_folder; /* its files go with the model; NULL: bytes */
    Safetensors model, trainer;   /* to start from; else empty */
    size_t text_tokens; /* in all of the text: to notice when a run resumes with other text */
} TrainCommand;

/* Where a run saves; NULL: nowhere. */
static const char *save_folder(const Options *o) { return o->save ? o->save : o->resume; }

/* One JSON line for a step. held_out: NaN if there was no evaluation. */
static void print_step(FILE *f, size_t step, const StepResult *r, double rate, double held_out)
{
    Emitter e = make_emitter(f, 1);
    emit_open(&e, NULL, '{');
    emit_count(&e, "step", NULL, step);
    emit_number(&e, "loss", NULL, r->loss);
    emit_number(&e, "lr", NULL, r->lr);
    emit_number(&e, "grad_norm", NULL, r->grad_norm);
    emit_number(&e, "loss_scale", NULL, r->loss_scale);
    emit_number(&e, "tokens_per_second", NULL, floor(rate));
    if (!isnan(held_out)) emit_number(&e, "val_loss", NULL, held_out);
    emit_close(&e, '}');
    if (fflush(f) || ferror(f))
        die("cannot write a step to %s: %s", f == stdout ? "stdout" : "--log", strerror(errno));
}

/* The loss curve as a picture in characters, on stdout. */
static void draw_curve(const Curve *c, size_t first, size_t last)
{
    double mean[CURVE_WIDTH], low = INFINITY, high = -INFINITY;
    for (int x = 0; x < CURVE_WIDTH; x++) {
        mean[x] = c->n[x] ? c->sum[x] / (double)c->n[x] : NAN;
        low = fmin(low, mean[x]);
        high = fmax(high, mean[x]);
    }
    if (!(low < high)) return; /* too short */
    printf("\nloss\n");
    for (int y = CURVE_HEIGHT - 1; y >= 0; y--) {
        printf("%7.3f |", low + (high - low) * y / (CURVE_HEIGHT - 1));
        for (int x = 0; x < CURVE_WIDTH; x++) {
            double height = (mean[x] - low) / (high - low) * (CURVE_HEIGHT - 1);
            putchar(floor(height + 0.5) == y ? '*' : ' ');
        }
        putchar('\n');
    }
    printf("        +");
    for (int x = 0; x < CURVE_WIDTH; x++) putchar('-');
    printf(" steps %zu..%zu\n", first + 1, last);
}

static Metadata number_fact(const char *key, double value)
{
    Metadata fact = {key, ""};
    snprintf(fact.value, sizeof fact.value, "%.17g", value);
    return fact;
}

/* What a checkpoint says beside its tensors: where the run stands, and the options it remembers. */
static void save_run(const Run *run, Rank *k, const Progress *p)
{
    const TrainCommand *t = (const TrainCommand *)run;
    const LossScaler *s = &p->scaler;
    const char *dir = save_folder(t->o);
    if (!dir) return;
    Metadata fact[9 + N_OPTIONS] = {
        number_fact("step", (double)p->step),
        number_fact("updates", (double)p->updates),
        number_fact("samples", (double)p->samples),
        number_fact("loss_scale_now", s->scale),
        number_fact("loss_scale_dynamic", s->dynamic),
        number_fact("loss_scale_hysteresis", s->hysteresis),
        number_fact("loss_scale_iteration", (double)s->iteration),
        number_fact("loss_scale_last_overflow", (double)s->last_overflow),
        number_fact("text_tokens", (double)t->text_tokens),
    };
    size_t n = 9;
    for (const Option *option = options; option < options + N_OPTIONS; option++) {
        if (!option->remembered) continue;
        const char *key = option->name + 2; /* without -- */
        if (option->kind != TEXT) fact[n] = number_fact(key, option_number(option, t->o));
        else { /* a known name: make_optimizer() has seen it */
            const void *field = (const char *)t->o + option->field;
            fact[n].key = key;
            snprintf(fact[n].value, sizeof fact[n].value, "%s", *(char *const *)field);
        }
        n++;
    }
    save_checkpoint(k, dir, t->tokenizer_folder, t->tokenizer->end_of_text, fact, n);
}

/* Ctrl-C: the run ends after this step, and a save; at the second Ctrl-C it ends at once. */
static int interrupted; /* any thread may take the signal, and all read it */
static void interrupt(int signal_number)
{
    __atomic_store_n(&interrupted, 1, __ATOMIC_RELAXED);
    signal(signal_number, SIG_DFL);
}

/* Does any rank know of an interruption? All must stop after the same step. */
static int is_interrupted(Rank *k)
{
    double flag = __atomic_load_n(&interrupted, __ATOMIC_RELAXED);
    set_place(k, "interruption", "", -1);
    all_reduce(&k->world, &flag, 1, DOUBLE_ARRAY, MAX);
    return flag > 0;
}

static void report_start(const Run *run)
{
    size_t tokens = batch_size(&run->ranks) * run->ranks.seq;
    run->report->meter = meter_start("step", run->progress.step, run->steps, tokens);
}

static void report_step(const Run *run, const Progress *p, const StepResult *r, double held_out)
{
    Report *report = run->report;
    Meter *meter = &report->meter;
    Curve *curve = &report->curve;
    size_t column = (p->step - 1 - meter->first) * CURVE_WIDTH / (meter->total - meter->first);
    report->last_loss = r->loss;
    report->skipped += (size_t)r->skipped;
    if (isfinite(r->loss)) {
        curve->sum[column] += r->loss;
        curve->n[column]++;
    }
    if (report->json) print_step(stdout, p->step, r, meter_rate(meter, p->step), held_out);
    if (report->log) print_step(report->log, p->step, r, meter_rate(meter, p->step), held_out);
    if (!isnan(held_out) && !report->json)
        printf("%sstep %zu: loss %.4f, held-out loss %.4f\n", meter->terminal ? "\r\033[K" : "",
               p->step, r->loss, held_out);
    meter_show(meter, p->step, "loss", r->loss);
}

static void report_end(const Run *run) { run->report->seconds = now() - run->report->meter.start; }

/* The checkpoint's options take the place of those that the command line does not give. */
static void resume_options(Options *o, const Safetensors *trainer)
{
    Options saved = *o;
    for (int i = 0; i < N_OPTIONS; i++) {
        const Option *option = &options[i];
        if (!option->remembered) continue;
        const char *text = find_metadata(trainer, option->name + 2);
        const char *wrong = set_option(o->given[i] ? &saved : o, option, text);
        if (wrong)
            die("%s: \"%s\" is %s, but %s from %g to %g is expected", o->resume, option->name + 2,
                text, wrong, option->low, option->high);
        if (o->given[i] && option->kind != TEXT &&
            option_number(option, o) != option_number(option, &saved))
            note("%s is new: the checkpoint was trained with %s\n", option->name, text);
    }
}

static void resume_run(TrainCommand *t, Options *o)
{
    const Safetensors *trainer = &t->trainer;
    const double most = 0x1p53;
    Progress *p = &t->run.progress;
    LossScaler *s = &p->scaler;
    resume_options(o, trainer);
    p->step = metadata_count(trainer, "step");
    p->updates = metadata_count(trainer, "updates");
    p->samples = metadata_count(trainer, "samples");
    s->scale = metadata_number(trainer, "loss_scale_now", 0x1p-100, 0x1p120);
    s->dynamic = (int)metadata_number(trainer, "loss_scale_dynamic", 0, 1);
    s->hysteresis = (int)metadata_number(trainer, "loss_scale_hysteresis", 1, HYSTERESIS);
    s->iteration = (long long)metadata_number(trainer, "loss_scale_iteration", 0, most);
    s->last_overflow = (long long)metadata_number(trainer, "loss_scale_last_overflow", -1, most);
    t->text_tokens = metadata_count(trainer, "text_tokens");
    t->run.trainer = trainer;
}

/* A resumed run does some steps again, if they were not saved: they go out of its log. So do lines
 * that are no steps, and half a line, if the run was killed. */
static FILE *open_log(const char *path, size_t step)
{
    if (step > 0 && access(path, F_OK) == 0) {
        Map log = map_file(path), rest = log;
        char path_new[PATH_MAX], begin[64];
        FILE *f = fopen(extend_path(path_new, path, ".tmp"), "w");
        while (f && rest.size) {
            Map line = next_line(&rest);
            size_t number;
            snprintf(begin, sizeof begin, "%.*s", (int)min_size(line.size, 63), line.data);
            if (line.data[line.size - 1] == '\n' && sscanf(begin, "{\"step\": %zu", &number) == 1 &&
                number <= step)
                fwrite(line.data, 1, line.size, f);
        }
        if (!f || ferror(f) || fclose(f) || rename(path_new, path))
            die("cannot rewrite %s: %s", path, strerror(errno));
        unmap_file(log);
    }
    FILE *f = fopen(path, "a");
    if (!f) die("cannot write %s: %s", path, strerror(errno));
    return f;
}

/* The options' optimizer, with the decay that --lr-decay names. */
static Optimizer make_optimizer(const Options *o)
{
    static const char *const decay[] = {"paper", "megatron", "cosine"}; /* in the order of Decay */
    Optimizer a = o->optimizer;
    int d = 0;
    while (d < 3 && strcmp(o->lr_decay, decay[d])) d++;
    if (d == 3)
        die("--lr-decay %s is not known: paper, megatron or cosine is expected", o->lr_decay);
    a.decay = (Decay)d;
    return a;
}

/* Shape, weights to start from, and options: from the command line, a model, or a checkpoint. */
static void prepare_model(TrainCommand *t, Options *o)
{
    static const char *const shape[] = {"--config", "--layers", "--hidden",
                                        "--heads",  "--vocab",  "--activation"};
    const char *from = o->init ? o->init : o->resume;
    Config *c = &t->run.ranks.config;
    if (o->init && o->resume)
        die("--init and --resume exclude each other: start from a model, or go on from a "
            "checkpoint");
    for (size_t i = 0; from && i < sizeof shape / sizeof *shape; i++)
        if (given(o, shape[i]))
            die("%s cannot be combined with %s: the shape is that of %s", shape[i],
                o->init ? "--init" : "--resume", from);
    t->run.progress.scaler = make_loss_scaler(o->optimizer.loss_scale);
    if (from) {
        recover_checkpoint(from);
        t->model = open_model(c, from);
        t->run.model = &t->model;
    }
    if (o->resume) {
        t->trainer = open_trainer(o->resume, c);
        resume_run(t, o);
    }
    t->tokenizer = find_tokenizer(o->tokenizer, from, c);
    if (!from) {
        if (!o->vocab) o->vocab = t->tokenizer->vocabulary;
        *c = new_config(o);
    }
    check_tokenizer(t->tokenizer, c);
    t->tokenizer_folder = o->tokenizer;
    if (!o->tokenizer && from && has_tokenizer(from)) t->tokenizer_folder = from;
    set_dropout(c, o);
    o->seq = sequence_length(o, c);
}

/* Defaults that depend on other options, and all that the ranks need but the text. */
static void prepare_training(TrainCommand *t, Options *o)
{
    RankOptions *r = &t->run.ranks;
    Optimizer *a = &o->optimizer;
    if (!a->decay_steps) a->decay_steps = o->steps;
    if (!o->resume && !given(o, "--min-lr")) a->min_lr = a->lr / 15;
    if (!o->resume && !given(o, "--warmup")) a->warmup = a->decay_steps / 100; /* 3k of 300k */
    if (!o->resume && !given(o, "--valid-percent")) o->valid_percent = o->eval_every ? 5 : 0;
    if (a->min_lr > a->lr)
        die("--min-lr %g is above --lr %g: the floor must be below the peak", a->min_lr, a->lr);
    if (o->eval_every && o->valid_percent == 0)
        die("--eval-every needs text to be held out: give --valid-percent");
    check_layout(&r->config, make_layout(o));
    t->o = o;
    t->run.optimizer = make_optimizer(o);
    t->run.steps = o->steps;
    t->run.save_every = o->save_every;
    t->run.eval_every = o->eval_every;
    t->run.eval_iters = o->eval_iters;
    *r = training_ranks(o, &r->config);
    check_memory(r);
}

static Corpus *prepare_text(TrainCommand *t, const Options *o)
{
    Corpus *c = corpus_open(o->paths, o->n_paths, t->tokenizer, t->run.ranks.config.V);
    if (t->text_tokens && t->text_tokens != c->tokens)
        note("the checkpoint was trained on %zu tokens, this text has %zu: samples come in another "
             "order\n",
             t->text_tokens, c->tokens);
    t->text_tokens = c->tokens;
    t->run.data = dataset_open(c, o->valid_percent, 0, o->seq, o->seed);
    t->run.held_out = o->eval_every ? dataset_open(c, o->valid_percent, 1, o->seq, o->seed) : NULL;
    return c;
}

static void print_beginning(const TrainCommand *t)
{
    const Config *c = &t->run.ranks.config;
    Layout s = t->run.ranks.layout;
    note("%zu layers, hidden %zu, %zu heads, vocabulary %zu: %zu parameters; ", c->L, c->C, c->H,
         c->V, count_parameters(c));
    note("tp %d, pp %d, dp %d on %d %s; ", s.tp, s.pp, s.dp, device_count(), device_kind());
    note("%zu tokens of text; %zu sequences of %zu tokens a step\n", t->run.data->tokens,
         t->o->batch, t->o->seq);
    warn_if_crowded(s);
}

static void print_summary(const TrainCommand *t, size_t first)
{
    const Options *o = t->o;
    const Report *r = &t->report;
    size_t last = t->run.progress.step, steps = last - first;
    if (!is_writer(NULL)) return;
    if (!o->json) {
        draw_curve(&r->curve, first, last);
        printf("%zu steps in %.1f s, %.0f tokens/s; loss %.4f\n", steps, r->seconds,
               (double)(steps * o->batch * o->seq) / r->seconds, r->last_loss);
        if (save_folder(o)) printf("saved: %s\n", save_folder(o));
    }
    if (r->skipped) note("%zu of %zu steps overflowed and were skipped\n", r->skipped, steps);
    if (last < o->steps) note("interrupted after step %zu of %zu\n", last, o->steps);
}

/* All that is left to do of a run. */
static void train(TrainCommand *t, Options *o)
{
    const char *dir = save_folder(o);
    size_t first = t->run.progress.step;
    prepare_training(t, o);
    if (dir && is_writer(NULL)) check_save_folder(dir, o->resume);
    Corpus *corpus = prepare_text(t, o);
    if (o->log && is_writer(NULL)) t->report.log = open_log(o->log, first);
    t->report.json = o->json;
    t->run.report = &t->report;
    print_beginning(t);
    signal(SIGINT, interrupt);

    run_ranks(world_size(t->run.ranks.layout), train_rank, &t->run);
    print_summary(t, first);
    if (t->report.log && fclose(t->report.log)) die("cannot write %s: %s", o->log, strerror(errno));
    if (t->run.held_out) dataset_close(t->run.held_out);
    dataset_close(t->run.data);
    corpus_close(corpus);
}

static void run_train(Options *o)
{
    TrainCommand t;
    memset(&t, 0, sizeof t);
    if (!o->n_paths) usage_error("train needs --data");
    prepare_model(&t, o);
    if (t.run.progress.step < o->steps) train(&t, o);
    else /* not an error: a script may resume until all is done */
        note("%s has done its %zu steps; --steps asks for more\n", o->resume, t.run.progress.step);
    tokenizer_close(t.tokenizer);
    safetensors_close(&t.model);
    safetensors_close(&t.trainer);
}

/* ---- eval, generate -------------------------------------------------------------------------- */

/* A model for inference on tensor ranks, and the work they do with it. */
typedef struct {
    const Options *o;
    RankOptions ranks;
    Safetensors model;
    Tokenizer *tokenizer;
    Tokens text; /* to score, or the prompt */
    Lambada lambada;
    size_t overlap, units; /* units: windows or examples to run */
    Score score;
    Accuracy accuracy;
} Inference;

static void open_inference(Inference *in, const Options *o, size_t batch)
{
    Layout s = make_layout(o);
    memset(in, 0, sizeof *in);
    if (!o->model) usage_error("%s needs --model", o->command->name);
    recover_checkpoint(o->model);
    in->o = o;
    in->model = open_model(&in->ranks.config, o->model);
    check_layout(&in->ranks.config, s);
    in->tokenizer = find_tokenizer(o->tokenizer, o->model, &in->ranks.config);
    check_tokenizer(in->tokenizer, &in->ranks.config);
    warn_if_crowded(s);
    in->ranks.layout = s;
    in->ranks.seq = sequence_length(o, &in->ranks.config);
    in->ranks.micro_batch = batch;
    if (!batch) in->ranks.micro_batch = max_size(2048 / in->ranks.seq, 1); /* work for all cores */
    in->ranks.micro_batches = 1;
    in->ranks.seed = o->seed;
}

static Rank *inference_rank(Comm *world, const Inference *in)
{
    Rank *k = rank_create(world, &in->ranks);
    load_rank(k, &in->model, NULL);
    return k;
}

static void close_inference(Inference *in)
{
    tokenizer_close(in->tokenizer);
    safetensors_close(&in->model);
    free(in->text.id);
}

static void eval_rank(Comm *world, void *arg)
{
    Inference *in = (Inference *)arg;
    Rank *k = inference_rank(world, in);
    int pad = padding(in->tokenizer);
    Meter meter = meter_start(in->lambada.n ? "example" : "window", 0, in->units, k->T);
    if (in->lambada.n) {
        Accuracy a = lambada_accuracy(k, &in->lambada, in->units, pad, &meter);
        if (is_writer(world)) in->accuracy = a;
    } else {
        Score s = text_loss(k, &in->text, in->overlap, in->units, pad, &meter);
        if (is_writer(world)) in->score = s;
    }
    rank_free(k);
}

static void print_accuracy(const Inference *in, const size_t labels[6])
{
    const Accuracy *a = &in->accuracy;
    double n = (double)a->examples;
    Emitter e = make_emitter(stdout, in->o->json);
    emit_text(&e, "%zu examples; last words of 1, 2, 3, 4, 5, more tokens:", in->lambada.n);
    for (int i = 0; i < 6; i++) emit_text(&e, " %zu", labels[i]);
    emit_text(&e, "\n");
    emit_open(&e, NULL, '{');
    if (!in->units) emit_count(&e, "examples", NULL, in->lambada.n);
    if (in->units) {
        emit_count(&e, "examples", "%zu run: ", a->examples);
        emit_count(&e, "correct", "%zu whole last words right, ", a->correct);
        emit_number(&e, "accuracy", "accuracy %.4f ", (double)a->correct / n);
        emit_number(&e, "last_token_accuracy", "(last token only: %.4f)\n",
                    (double)a->last_correct / n);
    }
    emit_open(&e, "label_tokens", '[');
    for (int i = 0; i < 6; i++) emit_count(&e, NULL, NULL, labels[i]);
    emit_close(&e, ']');
    emit_close(&e, '}');
}

static void eval_lambada(Inference *in)
{
    size_t labels[6] = {0}; /* how many last words have 1, 2, 3, 4, 5, more tokens */
    const Options *o = in->o;
    in->lambada = lambada_open(o->lambada, in->tokenizer);
    for (size_t i = 0; i < in->lambada.n; i++) {
        size_t label = in->lambada.example[i].label;
        labels[min_size(label, 6) - 1]++;
        if (label > in->ranks.seq)
            die("%s: the last word of example %zu has %zu tokens, which do not fit into --seq %zu",
                o->lambada, i + 1, label, in->ranks.seq);
    }
    in->units = given(o, "--limit") ? min_size(o->limit, in->lambada.n) : in->lambada.n;
    if (in->units) run_ranks(world_size(in->ranks.layout), eval_rank, in);
    print_accuracy(in, labels);
    lambada_close(&in->lambada);
}

/* Encodes --wikitext, detokenised, or --data. Returns --wikitext's original tokens, or 0. */
static size_t read_text(Inference *in)
{
    const Options *o = in->o;
    size_t original = 0;
    if (o->wikitext) {
        Map map = map_file(o->wikitext);
        char *text = (char *)xcalloc(map.size + 1, 1);
        memcpy(text, map.data, map.size);
        original = wikitext_original_tokens(text, map.size);
        encode(&in->text, in->tokenizer, text, wikitext_detokenise(text, map.size));
        free(text);
        unmap_file(map);
    } else {
        Corpus *corpus = corpus_open(o->paths, o->n_paths, in->tokenizer, in->ranks.config.V);
        corpus_tokens(&in->text, corpus);
        corpus_close(corpus);
    }
    if (in->text.n < 2)
        die("%s is too short: one token to predict from and one to predict are needed",
            o->wikitext ? o->wikitext : o->paths[0]);
    return original;
}

static void print_score(const Inference *in, size_t windows, size_t original)
{
    size_t targets = in->text.n - 1;
    double loss = in->score.loss;
    Emitter e = make_emitter(stdout, in->o->json);
    emit_open(&e, NULL, '{');
    emit_count(&e, "tokens", "%zu tokens, ", in->text.n);
    emit_count(&e, "targets", "%zu targets, ", targets);
    emit_count(&e, "windows", "%zu windows ", windows);
    emit_text(&e, "of %zu tokens", in->ranks.seq);
    if (original) emit_count(&e, "original_tokens", "; %zu original tokens", original);
    if (in->units) {
        emit_text(&e, "\n%zu windows run, ", in->units);
        emit_count(&e, "scored_targets", "%zu targets: ", in->score.targets);
        emit_number(&e, "loss", "loss %.4f, ", loss);
        emit_number(&e, "ppl", "perplexity %.4f", perplexity(loss));
    }
    if (in->units && original) {
        double adjusted = adjusted_loss(loss, targets, original);
        emit_number(&e, "adjusted_ppl", ", adjusted to original tokens %.4f [App. E]",
                    perplexity(adjusted));
    }
    emit_text(&e, "\n");
    emit_close(&e, '}');
}

static void eval_text(Inference *in)
{
    const Options *o = in->o;
    size_t T = in->ranks.seq, original = read_text(in);
    in->overlap = o->wikitext ? min_size(32, T) : T;
    if (o->overlap) in->overlap = o->overlap;
    if (in->overlap > T)
        die("--overlap %zu is more than the %zu tokens of a window", in->overlap, T);
    size_t windows = window_count(in->text.n - 1, in->overlap);
    in->units = given(o, "--limit") ? min_size(o->limit, windows) : windows;
    in->ranks.micro_batch = min_size(in->ranks.micro_batch, max_size(in->units, 1));
    if (in->units) run_ranks(world_size(in->ranks.layout), eval_rank, in);
    print_score(in, windows, original);
}

static void run_eval(Options *o)
{
    Inference in;
    if ((o->n_paths > 0) + (o->wikitext != NULL) + (o->lambada != NULL) != 1)
        usage_error("eval needs exactly one of --data, --wikitext and --lambada");
    if (o->lambada && given(o, "--overlap"))
        usage_error("--overlap is for running text, not for --lambada");
    open_inference(&in, o, o->micro_batch);
    if (o->lambada) eval_lambada(&in);
    else eval_text(&in);
    close_inference(&in);
}

static void print_token(void *arg, int id)
{
    size_t n;
    const char *bytes = decode(&n, (const Tokenizer *)arg, id);
    fwrite(bytes, 1, n, stdout);
    fflush(stdout);
}

/* As text only the last line's end: the rest came token by token. */
static void print_generated(const Inference *in, const int *id, size_t n)
{
    char *bytes = NULL;
    size_t size = 0, length;
    Emitter e = make_emitter(stdout, in->o->json);
    FILE *f = open_memstream(&bytes, &size);
    if (!f) die("out of memory");
    for (size_t i = 0; i < n; i++) {
        const char *piece = decode(&length, in->tokenizer, id[i]);
        fwrite(piece, 1, length, f);
    }
    if (fclose(f)) die("out of memory");
    emit_text(&e, "\n");
    emit_open(&e, NULL, '{');
    emit_string(&e, "prompt", NULL, in->o->prompt);
    emit_bytes(&e, "text", bytes, size);
    emit_open(&e, "tokens", '[');
    for (size_t i = 0; i < n; i++) emit_count(&e, NULL, NULL, (size_t)id[i]);
    emit_close(&e, ']');
    emit_close(&e, '}');
    free(bytes);
}

static void generate_rank(Comm *world, void *arg)
{
    const Inference *in = (const Inference *)arg;
    const Options *o = in->o;
    Rank *k = inference_rank(world, in);
    Generator *g = generator_create(k);
    Sampler sampler = {o->temperature, o->top_k, o->top_p, o->seed};
    Tokens text = {NULL, 0, 0};
    int streams = is_writer(world) && !o->json;
    for (size_t i = 0; i < in->text.n; i++) push_token(&text, in->text.id[i]);
    double start = now();
    generate(g, &text, o->tokens, &sampler, in->tokenizer->end_of_text,
             streams ? print_token : NULL, in->tokenizer);
    if (is_writer(world)) {
        size_t n = text.n - in->text.n;
        fprintf(stderr, "%s%zu tokens, %.1f tokens/s\n", streams ? "\n" : "", n,
                (double)n / (now() - start));
        print_generated(in, text.id + in->text.n, n);
    }
    free(text.id);
    generator_free(g);
    rank_free(k);
}

static void run_generate(Options *o)
{
    Inference in;
    Emitter e = make_emitter(stdout, o->json);
    open_inference(&in, o, 1);
    encode(&in.text, in.tokenizer, o->prompt, strlen(o->prompt));
    if (!in.text.n) push_token(&in.text, padding(in.tokenizer)); /* as if a document began */
    if (in.text.n > in.ranks.seq)
        note("the prompt has %zu tokens: the model sees the last %zu\n", in.text.n, in.ranks.seq);
    emit_text(&e, "%s", o->prompt);
    run_ranks(world_size(in.ranks.layout), generate_rank, &in);
    close_inference(&in);
}

/* ---- tokenize, plan, trace, info ------------------------------------------------------------- */

static void run_tokenize(Options *o)
{
    if (o->operands != 2) usage_error("tokenize needs two operands, IN and OUT");
    const char *out = o->operand[1];
    Tokenizer *t = find_tokenizer(o->tokenizer, NULL, NULL);
    Corpus *corpus = corpus_open(o->operand, 1, t, t->vocabulary);
    corpus_write(corpus, out);
    Emitter e = make_emitter(stdout, o->json);
    emit_text(&e, "%s.bin, %s.idx: ", out, out);
    emit_open(&e, NULL, '{');
    emit_count(&e, "documents", "%zu documents, ", corpus->documents);
    emit_count(&e, "tokens", "%zu tokens\n", corpus->tokens);
    emit_close(&e, '}');
    corpus_close(corpus);
    tokenizer_close(t);
}

static void run_plan(Options *o)
{
    if (o->paper) {
        for (int i = 0; i < N_OPTIONS; i++)
            if (o->given[i] && strcmp(options[i].name, "--paper") &&
                strcmp(options[i].name, "--json"))
                usage_error("--paper prints the paper's own runs: it cannot be combined with %s",
                            options[i].name);
        print_paper(o->json);
        return;
    }
    if (given(o, "--peak") != given(o, "--bandwidth"))
        usage_error("--peak and --bandwidth go together");
    Config c = new_config(o);
    RankOptions in = training_ranks(o, &c);
    check_plan(&in);
    Plan plan = make_plan(&in);
    if (o->peak > 0) project_yours(&plan, &in, o->peak * 1e12, o->bandwidth * 1e9);
    print_plan(&in, &plan, o->json);
}

typedef struct {
    RankOptions ranks;
    Trace *trace; /* of every rank */
} Traced;

/* Any tokens do: a step's messages do not depend on them. */
static void feed_random(void *source, Rank *k, MicroBatch *mb, size_t i)
{
    int *tokens = (int *)source;
    mb->sequence = i * k->B;
    for (size_t n = 0; n < k->B * (k->T + 1); n++)
        tokens[n] = (int)(random_word(k->seed, SITE_SAMPLE, (uint32_t)i, n) % k->config.V);
    set_tokens(k, mb, tokens, NULL);
}

static void trace_rank(Comm *world, void *arg)
{
    Traced *t = (Traced *)arg;
    Optimizer optimizer = {1e-4, 0, 0, 1, DECAY_PAPER, 0.9, 0.999, 1e-8, 0.01, 1, 1};
    Progress p = {0, 0, 0, make_loss_scaler(1)};
    Rank *k = rank_create(world, &t->ranks);
    int *tokens = (int *)xcalloc(k->B * (k->T + 1), sizeof *tokens);
    init_params(k->weights, k->tensor, k->tensors, &k->config, k->seed, k->tp.rank);
    Comm *const groups[] = {&k->world, &k->tp, &k->pp, &k->dp, &k->embedding};
    for (int i = 0; i < 5; i++) groups[i]->trace = &t->trace[world->rank];
    train_step(k, &optimizer, &p, t->ranks.micro_batches, feed_random, tokens);
    free(tokens);
    rank_free(k);
}

static void run_trace(Options *o)
{
    Config c = new_config(o);
    set_dropout(&c, o);
    Traced t = {training_ranks(o, &c), NULL};
    int ranks = world_size(t.ranks.layout);
    check_plan(&t.ranks);
    check_layout(&c, t.ranks.layout);
    check_memory(&t.ranks);
    warn_if_crowded(t.ranks.layout);
    t.trace = (Trace *)xcalloc((size_t)ranks, sizeof *t.trace);
    run_ranks(ranks, trace_rank, &t);
    if (is_writer(NULL) && !print_trace(t.trace, &t.ranks, o->json))
        die("the trace is not what `plan` lists: one of the two is wrong");
    for (int r = 0; r < ranks; r++) free(t.trace[r].event);
    free(t.trace);
}

static void run_info(Options *o)
{
    if (o->operands != 1)
        usage_error("info needs one operand, a model's folder or a safetensors file");
    print_info(o->operand[0], o->json);
}

/* Idle OpenMP threads spin for a long time by default, and take the cores from other ranks and
 * programs. The runtimes (GCC's, LLVM's) read how long only when a program starts: so set it, and
 * start once more. */
static void spin_briefly(char **argv)
{
#if defined __linux__ && defined _OPENMP
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT") || getenv("KMP_BLOCKTIME")) return;
    setenv("GOMP_SPINCOUNT", "10000", 1);
    setenv("KMP_BLOCKTIME", "0", 1);
    execv("/proc/self/exe", argv); /* if this fails, spin on */
#else
    (void)argv;
#endif
}

int main(int argc, char **argv)
{
    Options o;
    spin_briefly(argv);
    int command = parse_options(&o, argc, argv) ? o.command->bit : 0;
    if (!(command & RUNS) && !is_writer(NULL)) return 0; /* without ranks, one process works */
    switch (command) {
    case TRAIN: run_train(&o); break;
    case EVAL: run_eval(&o); break;
    case GENERATE: run_generate(&o); break;
    case TOKENIZE: run_tokenize(&o); break;
    case PLAN: run_plan(&o); break;
    case TRACE: run_trace(&o); break;
    case INFO: run_info(&o); break;
    }
    if (fflush(stdout) || ferror(stdout)) die("cannot write to stdout: %s", strerror(errno));
    return 0;
}
