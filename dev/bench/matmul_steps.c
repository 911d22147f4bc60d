/* matmul_steps.c - from the triple loop to the packed tile in five steps; doc/matmul.md walks
 * through them.
 *
 *     matmul_steps [M I O]..     rows of X, inputs and outputs of a linear layer; without any,
 *                                those of GPT-2
 *
 * Each step computes C (M,N) = A (M,K) B (K,N) and reads A and B through strides. The last step is
 * the project's matmul. First every step is checked against the definition in double, on awkward
 * shapes and on the timed ones; one thread and all threads must give the same bits. If a check
 * fails, the program prints one line and ends with status 1. Then the steps take turns, in rounds.
 * Records go to stdout; matmul.sh makes tables of them. BENCH_TINY=1 takes seconds instead of
 * minutes. */

#define main gpt2_main
#define PROGRAM "matmul_steps"
#include "../../megatron_gpt2.c"
#undef main

/* ---- The steps ------------------------------------------------------------------------------- */

/* A matrix of the steps, whose sizes are M, N, K: element (i, j) is p[i * row + j * col]. */
typedef struct {
    const real *p;
    size_t row, col;
} Mat;

/* Step 1: the definition. */
static void definition(real *c, Mat a, Mat b, size_t M, size_t N, size_t K)
{
#pragma omp parallel for
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++) {
            real sum = 0;
            for (size_t k = 0; k < K; k++)
                sum += a.p[i * a.row + k * a.col] * b.p[k * b.row + j * b.col];
            c[i * N + j] = sum;
        }
}

/* Returns B (K,N) in row-major order: B itself, or a copy that the caller frees. */
static const real *in_rows(real **copy, Mat b, size_t N, size_t K)
{
    *copy = NULL;
    if (b.col == 1 && b.row == N) return b.p;
    *copy = scratch(K * N);
#pragma omp parallel for
    for (size_t k0 = 0; k0 < K; k0 += 16)
        for (size_t j = 0; j < N; j++)
            for (size_t k = k0; k < min_size(K, k0 + 16); k++)
                (*copy)[k * N + j] = b.p[k * b.row + j * b.col];
    return *copy;
}

/* Columns j0 .. N-1 of C, row by row. */
static void rows_from(size_t j0, real *c, Mat a, const real *b, size_t M, size_t N, size_t K)
{
#pragma omp parallel for
    for (size_t i = 0; i < M; i++) {
        for (size_t j = j0; j < N; j++) c[i * N + j] = 0;
        for (size_t k = 0; k < K; k++)
#pragma omp simd
            for (size_t j = j0; j < N; j++)
                c[i * N + j] += a.p[i * a.row + k * a.col] * b[k * N + j];
    }
}

/* Step 2: another order of the loops. The inner one runs along rows of B and C. */
static void rows(real *c, Mat a, Mat b, size_t M, size_t N, size_t K)
{
    real *copy;
    rows_from(0, c, a, in_rows(&copy, b, N, K), M, N, K);
    free(copy);
}

/* c (m,TILE_COLS) [+]= a (m,K) b (K,TILE_COLS), m <= 6. The sums stay in registers. Missing rows
 * repeat the last one. */
static void register_tile(real *c, Mat a, const real *b, size_t m, size_t N, size_t K, int add)
{
    vec t[TILE_ROWS][TILE_VECS] = {{{0}}};
    const real *row[TILE_ROWS];
    for (size_t i = 0; i < TILE_ROWS; i++) row[i] = a.p + min_size(i, m - 1) * a.row;
    for (size_t k = 0; k < K; k++)
        for (size_t i = 0; i < TILE_ROWS; i++)
            for (size_t j = 0; j < TILE_VECS; j++)
                t[i][j] += row[i][k * a.col] * *(const loose_vec *)(b + k * N + j * LANES);
    for (size_t i = 0; i < TILE_ROWS; i++)
        for (size_t j = 0; i < m && j < TILE_VECS; j++) {
            loose_vec *to = (loose_vec *)(c + i * N + j * LANES);
            if (add) t[i][j] += *to;
            *to = t[i][j];
        }
}

/* Step 3: tiles of C, row by row. Step 2 computes what no tile covers. */
static void tiles(real *c, Mat a, Mat b, size_t M, size_t N, size_t K)
{
    real *copy;
    const real *p = in_rows(&copy, b, N, K);
    const size_t whole = N / TILE_COLS * TILE_COLS;
#pragma omp parallel for
    for (size_t i = 0; i < M; i += TILE_ROWS)
        for (size_t j = 0; j < whole; j += TILE_COLS)
            register_tile(c + i * N + j, (Mat){a.p + i * a.row, a.row, a.col}, p + j,
                          min_size(TILE_ROWS, M - i), N, K, 0);
    rows_from(whole, c, a, p, M, N, K);
    free(copy);
}

/* Step 4: all rows of C for one panel of B, K_BLOCK x TILE_COLS, then the next panel. */
static void blocks(real *c, Mat a, Mat b, size_t M, size_t N, size_t K)
{
    real *copy;
    const real *p = in_rows(&copy, b, N, K);
    const size_t whole = N / TILE_COLS * TILE_COLS;
#pragma omp parallel for
    for (size_t j = 0; j < whole; j += TILE_COLS)
        for (size_t k = 0; k < K; k += K_BLOCK)
            for (size_t i = 0; i < M; i += TILE_ROWS)
                register_tile(c + i * N + j, (Mat){a.p + i * a.row + k * a.col, a.row, a.col},
                              p + k * N + j, min_size(TILE_ROWS, M - i), N,
                              min_size(K_BLOCK, K - k), k > 0);
    rows_from(whole, c, a, p, M, N, K);
    free(copy);
}

/* Step 5: strips of A and panels of B are packed. */
static void packed(real *c, Mat a, Mat b, size_t M, size_t N, size_t K)
{
    const Matrix left = {a.p, M, K, a.row, a.col}, right = {b.p, K, N, b.row, b.col};
    matmul(c, left, right, WRITE, NULL);
}

/* ---- The machine's ceilings ------------------------------------------------------------------ */

static volatile real sink; /* results go here, so that the compiler keeps the loops */

#ifdef _OPENMP
static int all_threads(void) { return omp_get_num_procs(); }
#else
static int all_threads(void) { return 1; }
static void omp_set_num_threads(int n) { (void)n; }
#endif

/* GFLOP/s of multiply-adds that stay in registers, in as many chains as a tile has. */
static double fma_rate(size_t repeats, int threads)
{
    const double start = now();
#pragma omp parallel
    {
        const vec zero = {0}, x = zero + (real)uniform(1 << 30), y = x + x;
        vec t[TILE_ROWS][TILE_VECS];
        for (int i = 0; i < TILE_ROWS; i++)
            for (int j = 0; j < TILE_VECS; j++)
                t[i][j] = x * (real)(i * TILE_VECS + j); /* different values */
        for (size_t k = 0; k < repeats; k++)
            for (int i = 0; i < TILE_ROWS; i++)
                for (int j = 0; j < TILE_VECS; j++) t[i][j] = t[i][j] * x + y;
        for (int i = 0; i < TILE_ROWS; i++)
            for (int j = 0; j < TILE_VECS; j++) t[0][0] += t[i][j];
#pragma omp atomic write
        sink = t[0][0][0];
    }
    return 2e-9 * (double)(repeats * TILE_ROWS * TILE_COLS * (size_t)threads) / (now() - start);
}

/* GB/s at which all threads read, each n numbers of its own again and again. n is a multiple of 8 *
 * LANES. */
static double read_rate(const real *x, size_t n, size_t repeats, int threads)
{
    const double start = now();
#pragma omp parallel for
    for (int thread = 0; thread < threads; thread++) {
        vec s[8] = {{0}};
        for (size_t r = 0; r < repeats; r++)
            for (size_t i = 0; i < n; i += 8 * LANES)
                for (size_t j = 0; j < 8; j++)
                    s[j] += *(const vec *)(x + (size_t)thread * n + i + j * LANES);
        for (int j = 1; j < 8; j++) s[0] += s[j];
#pragma omp atomic write
        sink = s[0][0];
    }
    return 1e-9 * (double)(n * sizeof *x * repeats * (size_t)threads) / (now() - start);
}

/* ---- Products, and what they must be --------------------------------------------------------- */

typedef struct {
    const char *name;
    Mat a, b;
    size_t M, N, K;
} Product;

enum { PRODUCTS = 3, STEPS = 5, GUARD = 64 };

static const struct {
    const char *name;
    void (*run)(real *, Mat, Mat, size_t, size_t, size_t);
} steps[STEPS] = {{"definition", definition},
                  {"rows", rows},
                  {"tiles", tiles},
                  {"blocks", blocks},
                  {"packed", packed}};

/* How many rows of C a step computes. The triple loop is equally slow on each row, so some rows are
 * enough. */
static size_t rows_of(int step, size_t M)
{
    return step ? M : min_size(M, max_size(24, (size_t)all_threads()));
}

/* n numbers in (0, 1). Sums of their products never cancel, so an error means the same for each of
 * them. */
static real *numbers(size_t n, uint32_t stream)
{
    real *x = scratch(n);
    for (size_t i = 0; i < n; i++) x[i] = (real)uniform(random_word(1, SITE_INIT, stream, i));
    return x;
}

/* The three products of a linear layer with X (M,I), W (O,I), dY (M,O). Returns room for the
 * largest C. products_free frees all of it. */
static real *products(Product p[PRODUCTS], size_t M, size_t I, size_t O)
{
    const real *x = numbers(M * I, 0), *w = numbers(O * I, 1), *dy = numbers(M * O, 2);
    p[0] = (Product){"XWT", {x, I, 1}, {w, 1, I}, M, O, I};
    p[1] = (Product){"dYW", {dy, O, 1}, {w, I, 1}, M, I, O};
    p[2] = (Product){"dYTX", {dy, 1, O}, {x, I, 1}, O, I, M};
    return scratch(max_size(M * O, max_size(M * I, O * I)) + GUARD);
}

static void products_free(Product p[PRODUCTS], real *c)
{
    free((void *)p[0].a.p);
    free((void *)p[0].b.p);
    free((void *)p[1].a.p);
    free(c);
}

/* exact (M,N) = the definition in double. B's columns are copied first, for speed. */
static void in_double(double *exact, const Product *p)
{
    double *columns = (double *)xcalloc(p->N * p->K, sizeof *columns);
#pragma omp parallel
    {
#pragma omp for
        for (size_t j = 0; j < p->N; j++)
            for (size_t k = 0; k < p->K; k++)
                columns[j * p->K + k] = p->b.p[k * p->b.row + j * p->b.col];
#pragma omp for
        for (size_t i = 0; i < p->M; i++)
            for (size_t j = 0; j < p->N; j++) {
                double sum = 0;
#pragma omp simd reduction(+ : sum)
                for (size_t k = 0; k < p->K; k++)
                    sum += (double)p->a.p[i * p->a.row + k * p->a.col] * columns[j * p->K + k];
                exact[i * p->N + j] = sum;
            }
    }
    free(columns);
}

/* Dies unless every step computes p. Each element must be written and nothing behind C. The norm of
 * the error must be at most 2 sqrt(K) units of 2^-24 of C's norm (doc/matmul.md says why). One
 * thread and all threads must give the same bits. */
static void check(const Product *p, real *c)
{
    const size_t n = p->M * p->N;
    const double bound = 2 * sqrt((double)p->K) * 0x1p-24;
    double *exact = (double *)xcalloc(n, sizeof *exact);
    real *alone = scratch(n);
    omp_set_num_threads(all_threads());
    in_double(exact, p);
    for (int s = 0; s < STEPS; s++) {
        const size_t made = rows_of(s, p->M) * p->N;
        size_t behind = 0;
        double error = 0, norm = 0;
        for (int all = 0; all < 2; all++) {
            omp_set_num_threads(all ? all_threads() : 1);
            for (size_t i = 0; i < n + GUARD; i++) c[i] = NAN;
            steps[s].run(c, p->a, p->b, rows_of(s, p->M), p->N, p->K);
            for (size_t i = made; i < n + GUARD; i++) behind += !isnan(c[i]);
            if (!all) memcpy(alone, c, made * sizeof *c);
        }
        for (size_t i = 0; i < made; i++) {
            error += pow(c[i] - exact[i], 2);
            norm += pow(exact[i], 2);
        }
        error = sqrt(error / norm);
        if (!(error <= bound) || behind || memcmp(alone, c, made * sizeof *c))
            die("step %s, %s, M %zu, N %zu, K %zu: an error of %.3g of C, expected at most %.3g; "
                "%zu numbers written "
                "behind C; bits from one thread and from %d are %s",
                steps[s].name, p->name, p->M, p->N, p->K, error, bound, behind, all_threads(),
                memcmp(alone, c, made * sizeof *c) ? "NOT EQUAL" : "equal");
    }
    free(exact);
    free(alone);
}

/* ---- Measurement ----------------------------------------------------------------------------- */

/* Prints a record for each round, step and number of threads. The first round only warms up. */
static void measure(const Product *p, real *c, int rounds, size_t fma_repeats)
{
    for (int round = -1; round < rounds; round++)
        for (int all = 0; all <= (all_threads() > 1); all++) {
            const int threads = all ? all_threads() : 1;
            omp_set_num_threads(threads);
            const double ceiling = fma_rate(fma_repeats, threads);
            for (int s = 0; s < STEPS; s++) {
                const size_t M = rows_of(s, p->M);
                const double start = now();
                steps[s].run(c, p->a, p->b, M, p->N, p->K);
                const double flops = 2 * (double)M * (double)p->N * (double)p->K;
                const double seconds = now() - start;
                if (round >= 0)
                    printf("rate %s %s %zu %zu %zu %s %.2f %.2f\n", p->name, steps[s].name, p->M,
                           p->N, p->K, all ? "all" : "one", 1e-9 * flops / seconds, ceiling);
            }
        }
}

/* Prints records of the speed at which memory is read: L1, L2, L3 and main memory, on the machines
 * that we know. */
static void measure_reads(int rounds, size_t most)
{
    const size_t bytes[] = {32 << 10, 512 << 10, 8 << 20, most};
    real *x = numbers(most / sizeof(real) * (size_t)all_threads(), 0);
    for (int round = 0; round < rounds; round++)
        for (int level = 0; level < 4; level++)
            for (int all = 0; all <= (all_threads() > 1); all++) {
                const int threads = all ? all_threads() : 1;
                omp_set_num_threads(threads);
                const double rate =
                    read_rate(x, bytes[level] / sizeof *x, most / bytes[level], threads);
                printf("read %zu %s %.1f\n", bytes[level] >> 10, all ? "all" : "one", rate);
            }
    free(x);
}

static size_t size_argument(const char *text)
{
    char *end;
    const unsigned long n = strtoul(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end || n < 1 || n > 1 << 16)
        die("%s is not a size, 1 to 65536", text);
    return n;
}

int main(int argc, char **argv)
{
    static const size_t gpt2[][3] = {{256, 768, 3072},
                                     {256, 3072, 768},
                                     {1024, 768, 3072},
                                     {1024, 3072, 768},
                                     {1024, 1024, 4096}};
    static const size_t awkward[] = {1, 6, 65, 391}; /* 391 is more than a block of K */
    const int is_tiny = getenv("BENCH_TINY") != NULL, rounds = is_tiny ? 3 : 9;
    size_t shapes = is_tiny ? 1 : 5;
    real *c;
    Product p[PRODUCTS];
    if (argc % 3 != 1) usage_error("sizes come in threes: rows of X, inputs, outputs");
    if (argc > 1) shapes = (size_t)argc / 3;
    for (size_t i = 0; i < 64; i++) {
        c = products(p, awkward[i / 16], awkward[i / 4 % 4], awkward[i % 4]);
        for (int which = 0; which < PRODUCTS; which++) check(&p[which], c);
        products_free(p, c);
    }
    printf("program %d %d %s\n", all_threads(), VEC_BYTES, __VERSION__);
    measure_reads(rounds, is_tiny ? 8 << 20 : 128 << 20);
    for (size_t i = 0; i < shapes; i++) {
        size_t size[3];
        for (size_t j = 0; j < 3; j++) {
            if (argc > 1) size[j] = size_argument(argv[1 + 3 * i + j]);
            else size[j] = is_tiny ? (size_t)60 + 30 * j : gpt2[i][j];
        }
        c = products(p, size[0], size[1], size[2]);
        for (int which = 0; which < PRODUCTS; which++) {
            check(&p[which], c);
            measure(&p[which], c, rounds, is_tiny ? 10000 : 500000);
        }
        products_free(p, c);
    }
    return 0;
}
