/* megatron_gpt2.c - Megatron-LM (Shoeybi et al., arXiv 1909.08053) in one C file.
 *
 * A GPT-2 that trains, evaluates and generates with the paper's tensor parallelism, and with the pipeline and data
 * parallelism that Megatron grew around it. Every GPU is a thread. Read it from top to bottom with the paper beside
 * you: [§3 eq.3] names a place in the paper, [P12] a statement about it that test_gpt2.c checks, "code A" and "code V"
 * are Megatron's own code of August 2019 and of version 1.0. doc/ holds the longer derivations.
 *
 *     1 ground          2 operators (the seam)   3 ranks, collectives   4 shapes, parameters
 *     5 transformer     6 stages, pipeline       7 optimisation         8 text, data
 *     9 evaluation     10 generation            11 checkpoints         12 planner, trace     13 command line
 *
 * Letters: B sequences in a micro-batch, T tokens in a sequence, N = B*T rows; C hidden size, H heads, D = C/H,
 * F = 4C width of the MLP, L layers, V words; t x p x d ranks. A p behind a letter means this rank's part: Cp = C/t.
 *
 * The t x p x d grid of ranks [App. B.1, Fig. 8], here t = 2, p = 2, d = 2:
 *
 *              stage 0                stage 1           tensor group:   0-1, 2-3, 4-5, 6-7   share every layer
 *     replica 0   | 0 1 |   ----->    | 4 5 |           pipeline group: 0-4, 1-5, 2-6, 3-7   share the layers
 *     replica 1   | 2 3 |   ----->    | 6 7 |           data group:     0-2, 1-3, 4-6, 5-7   share the batch
 *
 * Contracts: outputs come first, then inputs, then dimensions. Backward functions write dx and add to dw. Matrices are
 * row-major, and their shapes stand beside them. No global changes; all state is in a Rank. Bad input ends in die(),
 * broken invariants in assert(). This text is C11 and, chapter 2 apart, C++17: the CUDA twin megatron_gpt2.cu compiles
 * it with operators of its own. */

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


/* ================================================================================================================
 * Chapter 1. Ground: what every later chapter stands on
 * ============================================================================================================= */

#ifndef REAL
#define REAL float
#endif
typedef REAL real; /* the arithmetic: float; double where test_gpt2.c takes finite differences */
#ifndef GPT2_OPERATORS
typedef real act; /* weights, activations and their gradients; the CUDA twin may make it bf16 or fp16 */
#endif

#ifdef __cplusplus /* the twin compiles all but chapter 2 as C++17 */
#define restrict __restrict__
#endif

#ifndef PROGRAM
#define PROGRAM "megatron_gpt2" /* whose messages these are: convert.c includes this file */
#endif

static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }

/* Ends the program for the user's sake: one line on stderr that says what was seen, what was expected and what to do.
 * Several ranks often meet the same bad input at once: the first one speaks, the others wait for the end. */
__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...)
{
    static int spoken;
    while (__atomic_exchange_n(&spoken, 1, __ATOMIC_SEQ_CST)) pause();
    char line[2 * PATH_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    for (char *c = line; *c; c++) /* names in files and paths may hold anything; the message stays one line */
        if ((unsigned char)*c < ' ' || *c == 0x7F) *c = '?';
    fflush(stdout);
    fprintf(stderr, PROGRAM ": %s\n", line);
    _exit(1); /* not exit(): other ranks still run, and must not meet torn-down libraries */
}

/* Zeroed host memory for count objects of size bytes; dies instead of returning NULL. */
static void *xcalloc(size_t count, size_t size)
{
    void *p = calloc(count ? count : 1, size ? size : 1);
    if (!p) die("out of memory: %zu objects of %zu bytes were asked for; try a smaller model or batch", count, size);
    return p;
}

/* An arena is one block of memory that holds everything of one lifetime (weights, gradients, moments, activations).
 * The same carving code runs twice: over a NULL base it only measures, over a real one it places. */
typedef struct {
    char *base;
    size_t used; /* bytes */
} Arena;

/* The next count objects of size bytes, 64-byte aligned; NULL while measuring. */
static void *carve(Arena *arena, size_t count, size_t size)
{
    void *p = arena->base ? arena->base + arena->used : NULL;
    arena->used += (count * size + 63) / 64 * 64;
    return p;
}

/* ---- Files ----------------------------------------------------------------------------------------------------- */

typedef struct {
    const char *data;
    size_t size; /* bytes */
} Map;

/* Maps a whole regular file read-only; dies if there is none. An empty file gives data "" and size 0. */
static Map map_file(const char *path)
{
    Map map = {"", 0};
    struct stat st;
    int fd = open(path, O_RDONLY);
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

/* "folder/name" in a buffer of PATH_MAX bytes; dies if it does not fit. Returns the buffer. */
static char *join_path(char path[PATH_MAX], const char *folder, const char *name)
{
    if (snprintf(path, PATH_MAX, "%s/%s", folder, name) >= PATH_MAX) die("the path %s/%s is too long", folder, name);
    return path;
}

static int file_exists(const char *folder, const char *name)
{
    char path[PATH_MAX];
    return access(join_path(path, folder, name), F_OK) == 0;
}

/* ---- Random numbers -------------------------------------------------------------------------------------------- */

/* Philox4x32-10 (Salmon et al. 2011; also PyTorch's and cuRAND's on GPUs): four random words as a pure function of a
 * key and a counter. There is no state to save, and any rank, in any layout, in any order, draws the same number for
 * the same (seed, site, step, index): masks and initial weights do not depend on how the model is cut.
 * DEVIATION from [App. B.2], where each GPU owns a generator: see drop() in chapter 5. */
static inline void philox(uint32_t out[4], uint64_t seed, uint64_t block, uint32_t site, uint32_t step)
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = site, c3 = step;
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53 * c0, p1 = (uint64_t)0xCD9E8D57 * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* Sites keep the streams apart: dropout sites count up from 0 (chapter 5), the others carry a high bit. */
enum { SITE_INIT = 0x40000000, SITE_SHUFFLE = 0x20000000, SITE_SAMPLE = 0x10000000 };

/* Word number index of a stream. */
static inline uint32_t random_word(uint64_t seed, uint32_t site, uint32_t step, uint64_t index)
{
    uint32_t word[4];
    philox(word, seed, index / 4, site, step);
    return word[index % 4];
}

/* Uniform in (0, 1): 32 bits, never 0 and never 1. */
static inline double uniform(uint32_t word) { return (word + 0.5) * 0x1p-32; }

/* out[i] = normal variate number first + i of a stream, i < n, by Box and Muller: four words give four variates. */
static void random_normals(real *out, uint64_t seed, uint32_t site, size_t first, size_t n)
{
    for (size_t i = first; i < first + n;) {
        uint32_t word[4];
        double z[4];
        philox(word, seed, i / 4, site, 0);
        for (int pair = 0; pair < 4; pair += 2) {
            double r = sqrt(-2 * log(uniform(word[pair]))), angle = 2 * M_PI * uniform(word[pair + 1]);
            z[pair] = r * cos(angle);
            z[pair + 1] = r * sin(angle);
        }
        do out[i - first] = (real)z[i % 4];
        while (++i % 4 && i < first + n);
    }
}

/* Which elements a dropout site zeroes. Element i of a tensor is kept if word first + i of the stream (seed, site,
 * step) is at least p * 2^32, and is then scaled by 1 / (1 - p). */
typedef struct {
    uint64_t seed;
    uint32_t site, step;
    real p;       /* 0: no dropout */
    size_t first; /* global index of the tensor's element 0: what makes a slice draw the mask of the whole */
    size_t heads; /* attention only: heads of the whole layer, so that sequence b starts at first + b*heads*T*T */
} Dropout;

/* ---- JSON ------------------------------------------------------------------------------------------------------ */

typedef enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonType;

typedef struct {
    JsonType type;
    const char *key;    /* in an object: the member's name, NUL-terminated; else NULL */
    const char *string; /* JSON_STRING: UTF-8, NUL-terminated */
    size_t length;      /* JSON_STRING: bytes; JSON_ARRAY, JSON_OBJECT: children */
    double number;      /* JSON_NUMBER */
    size_t end;         /* index of the next value after this one and all it contains: steps to the next sibling */
} JsonValue;

/* A strict reader (RFC 8259) for config.json, vocab.json, safetensors headers and .jsonl lines. All values of a
 * document lie in one array, children behind their container. Hostile input dies with one line that names `what`: bad
 * syntax, bad escapes, \u0000, invalid UTF-8, numbers beyond double, depth over 40, duplicate keys, trailing text.
 * Time is O(n log n), memory a few values for each comma and bracket. To visit the children of value[p]:
 *
 *     for (size_t i = p + 1; i < value[p].end; i = value[i].end) */
typedef struct {
    JsonValue *value; /* value[0] is the root */
    char *text;       /* decoded strings */
    const char *what; /* the file, for messages */
} Json;

typedef struct {
    Json json;
    const char *text;
    size_t size, at;
    size_t n;  /* values so far */
    char *out; /* where the next decoded string goes */
} JsonReader;

enum { JSON_DEPTH = 40, SHOWN = 64 };

/* The first characters of a string from a file, fit to stand in a message of one line. */
static char *printable(char shown[SHOWN], const char *s)
{
    size_t n = 0;
    for (; s[n] && n + 1 < SHOWN; n++) shown[n] = (unsigned char)s[n] < ' ' || s[n] == 0x7F ? '?' : s[n];
    if (s[n]) memcpy(&shown[n - 2], "..", 2);
    shown[n] = 0;
    return shown;
}

static int json_peek(const JsonReader *r) { return r->at < r->size ? (unsigned char)r->text[r->at] : -1; }

__attribute__((noreturn)) static void json_expected(const JsonReader *r, const char *expected)
{
    int c = json_peek(r);
    const char *what = r->json.what;
    if (c < 0) die("%s is not valid JSON: at byte %zu %s was expected, but it ends there", what, r->at, expected);
    if (c > ' ' && c < 0x7F)
        die("%s is not valid JSON: at byte %zu %s was expected, not '%c'", what, r->at, expected, c);
    die("%s is not valid JSON: at byte %zu %s was expected, not the byte 0x%02x", what, r->at, expected, (unsigned)c);
}

static void json_space(JsonReader *r)
{
    while (json_peek(r) == ' ' || json_peek(r) == '\n' || json_peek(r) == '\r' || json_peek(r) == '\t') r->at++;
}

static void json_take(JsonReader *r, const char *word)
{
    for (const char *c = word; *c; c++, r->at++)
        if (json_peek(r) != *c) json_expected(r, word);
}

/* Bytes of the well-formed UTF-8 character (RFC 3629) at s, of which n bytes exist; 0 if there is none. */
static size_t utf8_length(const char *s, size_t n)
{
    static const uint32_t lowest[5] = {0, 0, 0x80, 0x800, 0x10000};
    unsigned char first = n ? (unsigned char)*s : 0xFF;
    size_t length = first < 0x80 ? 1 : first < 0xC0 ? 5 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : first < 0xF8 ? 4 : 5;
    if (length == 1) return 1;
    if (length > 4 || length > n) return 0;
    uint32_t code = first & (0x7Fu >> length);
    for (size_t i = 1; i < length; i++) {
        if (((unsigned char)s[i] & 0xC0) != 0x80) return 0;
        code = code << 6 | ((unsigned char)s[i] & 0x3F);
    }
    return code < lowest[length] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000) ? 0 : length;
}

static char *put_utf8(char *out, uint32_t code)
{
    if (code < 0x80) *out++ = (char)code;
    else if (code < 0x800) *out++ = (char)(0xC0 | code >> 6), *out++ = (char)(0x80 | (code & 0x3F));
    else {
        if (code < 0x10000) *out++ = (char)(0xE0 | code >> 12);
        else *out++ = (char)(0xF0 | code >> 18), *out++ = (char)(0x80 | (code >> 12 & 0x3F));
        *out++ = (char)(0x80 | (code >> 6 & 0x3F)), *out++ = (char)(0x80 | (code & 0x3F));
    }
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
        else if (c > 0 && letter >= 'a' && letter <= 'f') unit = unit << 4 | (uint32_t)(letter - 'a' + 10);
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
        *r->out++ = meanings[letter - letters], r->at += 2;
        return;
    }
    uint32_t code = json_unit(r), low;
    if (code >= 0xD800 && code < 0xDC00) { /* a surrogate pair stands for one character */
        low = json_unit(r);
        if (low < 0xDC00 || low > 0xDFFF) json_expected(r, "the second half of a surrogate pair before this");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xDC00 && code < 0xE000) json_expected(r, "the first half of a surrogate pair before this");
    if (!code) json_expected(r, "anything but \\u0000 before this");
    r->out = put_utf8(r->out, code);
}

/* Decoded strings take no more room than their text with its two quotes: `text` is as large as the document. */
static const char *json_string(JsonReader *r, size_t *length)
{
    char *start = r->out;
    json_take(r, "\"");
    for (int c; (c = json_peek(r)) != '"';) {
        if (c == '\\') {
            json_escape(r);
            continue;
        }
        size_t n = c < ' ' ? 0 : utf8_length(r->text + r->at, r->size - r->at);
        if (!n) json_expected(r, "a character of a string, in UTF-8,");
        memcpy(r->out, r->text + r->at, n);
        r->out += n, r->at += n;
    }
    r->at++;
    *length = (size_t)(r->out - start);
    *r->out++ = 0;
    return start;
}

static void json_digits(JsonReader *r)
{
    if (json_peek(r) < '0' || json_peek(r) > '9') json_expected(r, "a digit");
    while (json_peek(r) >= '0' && json_peek(r) <= '9') r->at++;
}

static double json_number_value(JsonReader *r)
{
    char copy[512]; /* for strtod: the text has no NUL */
    size_t start = r->at;
    if (json_peek(r) == '-') r->at++;
    else if (json_peek(r) < '0' || json_peek(r) > '9') json_expected(r, "a value");
    if (json_peek(r) == '0') r->at++; /* nothing may follow a leading zero */
    else json_digits(r);
    if (json_peek(r) == '.') r->at++, json_digits(r);
    if (json_peek(r) == 'e' || json_peek(r) == 'E') {
        r->at++;
        if (json_peek(r) == '+' || json_peek(r) == '-') r->at++;
        json_digits(r);
    }
    size_t length = r->at - start;
    if (length >= sizeof copy) die("%s: the number at byte %zu has %zu digits", r->json.what, start, length);
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
    char close = type == JSON_OBJECT ? '}' : ']';
    const char *key = NULL;
    if (depth >= JSON_DEPTH) die("%s: at byte %zu JSON is more than %d levels deep", r->json.what, r->at, JSON_DEPTH);
    r->at++;
    json_space(r);
    for (; json_peek(r) != close; r->json.value[self].length++) {
        if (r->json.value[self].length) {
            if (json_peek(r) != ',') json_expected(r, type == JSON_OBJECT ? "',' or '}'" : "',' or ']'");
            r->at++;
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

static void json_value(JsonReader *r, const char *key, int depth)
{
    JsonValue *v = &r->json.value[r->n++];
    v->key = key;
    json_space(r);
    switch (json_peek(r)) {
    case '{': json_container(r, v->type = JSON_OBJECT, depth); break;
    case '[': json_container(r, v->type = JSON_ARRAY, depth); break;
    case '"': v->type = JSON_STRING, v->string = json_string(r, &v->length); break;
    case 't': v->type = JSON_TRUE, json_take(r, "true"); break;
    case 'f': v->type = JSON_FALSE, json_take(r, "false"); break;
    case 'n': v->type = JSON_NULL, json_take(r, "null"); break;
    default: v->type = JSON_NUMBER, v->number = json_number_value(r);
    }
    v->end = r->n;
    json_space(r);
}

/* Reads a document of size bytes. `what` must live as long as the result. */
static Json json_parse(const char *text, size_t size, const char *what)
{
    JsonReader r = {{NULL, NULL, what}, text, size, 0, 0, NULL};
    size_t most = 2; /* a value follows a comma or a bracket, or is the root; one more for a value that is missing */
    for (size_t i = 0; i < size; i++) most += text[i] == ',' || text[i] == '[' || text[i] == '{';
    r.json.value = (JsonValue *)xcalloc(most, sizeof *r.json.value);
    r.json.text = r.out = (char *)xcalloc(size, 1);
    json_value(&r, NULL, 0);
    if (r.at < size) json_expected(&r, "the end");
    return r.json;
}

static void json_free(Json *json)
{
    free(json->value), free(json->text);
    json->value = NULL, json->text = NULL;
}

/* Member `key` of object, or NULL. */
static const JsonValue *json_get(const Json *json, const JsonValue *object, const char *key)
{
    if (object->type != JSON_OBJECT) return NULL;
    for (const JsonValue *v = object + 1; v < json->value + object->end; v = json->value + v->end)
        if (!strcmp(v->key, key)) return v;
    return NULL;
}

/* A number in [low, high]; absent or null: the fallback, or death if that is negative. */
static double json_number(const Json *json, const JsonValue *object, const char *key, double low, double high,
                          double fallback)
{
    const JsonValue *v = json_get(json, object, key);
    if ((!v || v->type == JSON_NULL) && fallback >= 0) return fallback;
    if (!v || v->type == JSON_NULL) die("%s: \"%s\" is missing", json->what, key);
    if (v->type != JSON_NUMBER) die("%s: \"%s\" is not a number", json->what, key);
    if (v->number < low || v->number > high)
        die("%s: \"%s\" is %.17g: from %.17g to %.17g is possible", json->what, key, v->number, low, high);
    return v->number;
}

/* The same for integers up to 2^53. */
static long long json_integer(const Json *json, const JsonValue *object, const char *key, long long low,
                              long long high, long long fallback)
{
    double number = json_number(json, object, key, (double)low, (double)high, (double)fallback);
    if (number != floor(number)) die("%s: \"%s\" is %.17g: an integer was expected", json->what, key, number);
    return (long long)number;
}

/* true or false; absent or null: the fallback. */
static int json_flag(const Json *json, const JsonValue *object, const char *key, int fallback)
{
    const JsonValue *v = json_get(json, object, key);
    if (!v || v->type == JSON_NULL) return fallback;
    if (v->type != JSON_TRUE && v->type != JSON_FALSE) die("%s: \"%s\" is neither true nor false", json->what, key);
    return v->type == JSON_TRUE;
}

/* Writes a string as JSON. Bytes that are not UTF-8 (a path may hold any) become U+FFFD. */
static void json_write_string(FILE *out, const char *s, size_t left)
{
    fputc('"', out);
    for (size_t n; left; s += n, left -= n) {
        n = utf8_length(s, left);
        if (!n) n = 1, fputs("\\ufffd", out);
        else if ((unsigned char)*s < ' ') fprintf(out, "\\u%04x", (unsigned)*s);
        else if (*s == '"' || *s == '\\') fprintf(out, "\\%c", *s);
        else fwrite(s, 1, n, out);
    }
    fputc('"', out);
}

/* ---- Progress -------------------------------------------------------------------------------------------------- */

static double now(void) /* seconds */
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Long work on stderr: a bar on a terminal, else a line now and then. */
typedef struct {
    const char *unit;    /* "step", "window", .. */
    size_t first, total; /* units done before the start, and at the end */
    size_t tokens;       /* in a unit */
    int terminal;
    double start, shown; /* seconds */
} Meter;

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

/* Shows how far the work is, and one value of its own, if it is time to. */
static void meter_show(Meter *m, size_t done, const char *name, double value)
{
    double t = now(), rate = meter_rate(m, done), left = (double)(m->total - done) * (double)m->tokens / fmax(rate, 1e-9);
    char bar[33] = "................................";
    if (done < m->total && t - m->shown < (m->terminal ? 0.1 : 10)) return;
    m->shown = t;
    for (size_t i = 0; m->total && i < 32 * done / m->total; i++) bar[i] = '#';
    fprintf(stderr, "%s%s%s%s %zu/%zu  %s %.4f  %.0f tokens/s  %.0f:%02.0f left%s", m->terminal ? "\r[" : "",
            m->terminal ? bar : "", m->terminal ? "] " : "", m->unit, done, m->total, name, value, rate,
            floor(left / 60), floor(fmod(left, 60)), m->terminal && done < m->total ? "\033[K" : "\n");
}

/* ---- Types that both machines' operators share ----------------------------------------------------------------- */

typedef enum { GELU_TANH, GELU_ERF } Gelu;
typedef enum { SUM, MAX } Op;
typedef enum { ACT, REAL_ARRAY, DOUBLE_ARRAY } Type; /* of an array's elements; only the twin's act is not real */

typedef struct {
    double lr, beta1, beta2, eps, decay;
    double grad_scale; /* multiplies every gradient: 1 / loss scale, clipping */
    size_t step;       /* counts from 1 */
} AdamW;

#ifdef GPT2_OPERATORS
#include GPT2_OPERATORS
#else

/* ================================================================================================================
 * Chapter 2. Operators [§2.2]: the seam between one text and two machines. This is the CPU's side
 * ================================================================================================================
 *
 * Each operator is a function of pointers and dimensions; it knows no ranks and keeps no state. Outputs come first.
 * Backward writes dx and adds to dw. Threads share out work that is cut the same way however many there are, and no
 * two threads add to one number: results do not depend on the number of OpenMP threads, bit for bit.
 *
 * Letters: N = B*T rows (batch x time), C channels, I inputs and O outputs of a linear layer, H heads of size D. */

/* ---- Memory ---------------------------------------------------------------------------------------------------- */

/* Zeroed, 64-byte aligned; dies when there is none. */
static void *device_calloc(size_t bytes)
{
    void *p = aligned_alloc(64, (max_size(bytes, 1) + 63) / 64 * 64);
    if (!p) die("out of memory: %zu bytes were asked for", bytes);
    return memset(p, 0, bytes);
}

static void device_free(void *p) { free(p); }
static void device_select(int rank, int ranks) { (void)rank, (void)ranks; } /* the twin: which GPU is this rank's */
static void device_synchronize(void) {} /* the twin: wait for this rank's stream */
static void device_zero(void *p, size_t bytes) { memset(p, 0, bytes); }
static void device_copy(void *to, const void *from, size_t bytes) { memmove(to, from, bytes); }
static void device_upload(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
static void device_download(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
static void act_upload(act *to, const real *from, size_t n) { memcpy(to, from, n * sizeof *to); }
static void act_download(real *to, const act *from, size_t n) { memcpy(to, from, n * sizeof *to); }

enum { SMALL = 16384 }; /* numbers that one thread has done with before others would wake up */

/* n reals of working space, 64-byte aligned and not zeroed; free() it. */
static real *scratch(size_t n)
{
    void *p = aligned_alloc(64, n * sizeof(real) / 64 * 64 + 64);
    if (!p) die("out of memory: %zu bytes of scratch were asked for", n * sizeof(real));
    return (real *)p;
}

/* ---- Functions of one number ----------------------------------------------------------------------------------- */

static inline real square_root(real x) { return sizeof x == sizeof(float) ? sqrtf((float)x) : (real)sqrt(x); }

/* e^x in a form that compilers vectorise: e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln(2)/2, and for e^r a
 * polynomial that is within 0.06 ulp of it. Error: at most 1.02 ulp, for all floats. 0 below -86.5 (e^x < 2^-124);
 * inf above 88.72283, where floats end; NaN stays NaN. Adding 1.5 * 2^23 leaves n in the sum's low bits. 2^(n-1)
 * times a doubled polynomial reaches the last binade, where 2^n alone would not exist. */
static inline real exponential(real x)
{
    if (sizeof x != sizeof(float)) return (real)exp(x);
    float f = (float)x, shifted = f * 1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f, scale;
    float r = (f - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts: n * the first is exact */
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
    return f < -86.5f ? 0 : f > 89 ? INFINITY : y;
}

/* Phi(x), through erfc: 1 + erf would cancel on the left. */
static inline real normal_cdf(real x)
{
    return sizeof x == sizeof(float) ? erfcf((float)x * -(float)M_SQRT1_2) / 2 : (real)(erfc(x * -M_SQRT1_2) / 2);
}

/* GeLU [§2.2]: x * Phi(x). Megatron's tanh form, x/2 (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3), equals
 * x / (1 + e^-2u): one exponential, no tanh. GELU_ERF is the exact form [P41]. */
static inline real gelu(real x, Gelu kind)
{
    if (kind == GELU_ERF) return x * normal_cdf(x);
    return x / (1 + exponential((real)-1.5957691216057308 * x * (1 + (real)0.044715 * x * x)));
}

/* d gelu / dx = s + x s(1-s) 2u' with s = 1 / (1 + e^-2u); s(1-s) is even in u, and t = e^-|2u| cannot overflow. */
static inline real gelu_slope(real x, Gelu kind)
{
    if (kind == GELU_ERF) return normal_cdf(x) + x * (real)0.3989422804014327 * exponential(-x * x / 2); /* + x phi */
    real xx = x * x, v = (real)1.5957691216057308 * x * (1 + (real)0.044715 * xx);                       /* 2u */
    real t = exponential(v < 0 ? v : -v), s = 1 / (1 + t), rise = t * s * s;
    return (v < 0 ? t * s : s) + x * rise * (real)1.5957691216057308 * (1 + 3 * (real)0.044715 * xx);
}

/* The largest of top and x (n); NaNs are passed over. Lane by lane: not every compiler reorders a maximum. */
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

/* ---- Dropout --------------------------------------------------------------------------------------------------- */

/* A word below this drops its element; p < 1. */
static inline uint32_t dropout_threshold(real p) { return (uint32_t)ceil(p * 0x1p32); }

/* 0 or 1/(1-p), for element index of a tensor. */
static inline real dropout_factor(Dropout d, size_t index)
{
    uint32_t word = random_word(d.seed, d.site, d.step, d.first + index);
    return word >= dropout_threshold(d.p) ? 1 / (1 - d.p) : 0;
}

/* The same for n elements from index on: philox() on many blocks side by side, round by round, so that it
 * vectorises. Ones, and no numbers drawn, where there is no dropout. */
static void dropout_factors(real *out, Dropout d, size_t index, size_t n)
{
    enum { SIDE = 32 }; /* blocks, of four words each */
    const uint32_t threshold = dropout_threshold(d.p);
    const real scale = 1 / (1 - d.p);
    for (size_t i = 0; d.p == 0 && i < n; i++) out[i] = 1;
    if (d.p == 0) return;
    size_t skip = (d.first + index) % 4; /* words of the first block that come before ours */
    for (uint64_t block = (d.first + index) / 4; n > 0; block += SIDE) {
        uint32_t c0[SIDE], c1[SIDE], c2[SIDE], c3[SIDE], k0 = (uint32_t)d.seed, k1 = (uint32_t)(d.seed >> 32);
        real factor[4 * SIDE];
        for (int i = 0; i < SIDE; i++) {
            c0[i] = (uint32_t)(block + (uint64_t)i), c1[i] = (uint32_t)((block + (uint64_t)i) >> 32);
            c2[i] = d.site, c3[i] = d.step;
        }
        for (int round = 0; round < 10; round++, k0 += 0x9E3779B9, k1 += 0xBB67AE85)
#pragma omp simd
            for (int i = 0; i < SIDE; i++) {
                uint64_t p0 = (uint64_t)0xD2511F53 * c0[i], p1 = (uint64_t)0xCD9E8D57 * c2[i];
                c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0;
                c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
                c1[i] = (uint32_t)p1;
                c3[i] = (uint32_t)p0;
            }
        for (int i = 0; i < SIDE; i++) {
            factor[4 * i] = c0[i] >= threshold ? scale : 0;
            factor[4 * i + 1] = c1[i] >= threshold ? scale : 0;
            factor[4 * i + 2] = c2[i] >= threshold ? scale : 0;
            factor[4 * i + 3] = c3[i] >= threshold ? scale : 0;
        }
        size_t count = min_size(n, 4 * SIDE - skip);
        memcpy(out, factor + skip, count * sizeof *out);
        out += count, n -= count, skip = 0;
    }
}

/* ---- Matrix product -------------------------------------------------------------------------------------------- */

/* C (M,N) = A (M,K) B (K,N), nine tenths of all time. One product serves X W', dY W and dY' X, because A and B are
 * read through a (row, column) stride. It makes C in tiles of 6 rows x TILE_VECS vectors:
 *
 *                   TILE_COLS              in registers  the tile of C, and one row of B's panel at a time
 *              B   +--+==+--+--+           in L1         a 6 x K_BLOCK strip of A (9 KB)
 *          K_BLOCK |  |##|  |  |           in L2         a K_BLOCK x TILE_COLS panel of B (96 KB), which all strips
 *                  +--+==+--+--+                         meet before the next panel comes
 *     A  K_BLOCK                           in L3         ROW_BLOCK x K_BLOCK of A (2.3 MB), read strip by strip
 *      +========+  +--+--+--+--+
 *    6 |########|  |  |##|  |  | C         For each k a tile loads TILE_VECS vectors of B and 6 numbers of A, and
 *      +========+  +--+--+--+--+           makes 6 * TILE_VECS multiply-adds of vectors: the arithmetic units never
 *      |        |  |  |  |  |  |           wait for the loads.
 *
 * Strips and panels are packed: copied so that the tile's loop reads memory in order, whatever the strides. Threads
 * take equal runs of tiles, down the columns of C. A tile's sum over k has one order, whoever makes it. */

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
typedef real loose_vec __attribute__((vector_size(VEC_BYTES), aligned(sizeof(real)), may_alias)); /* any address */

enum {
    LANES = VEC_BYTES / sizeof(real),
    TILE_ROWS = 6,
    TILE_COLS = TILE_VECS * LANES,
    SQUARE = 16,
    K_BLOCK = 384,    /* a multiple of SQUARE */
    ROW_BLOCK = 1536, /* a multiple of TILE_ROWS */
};

typedef struct {
    const act *p; /* element (i, j) is p[i * row + j * col] */
    size_t row, col;
} Mat;

/* What happens to an element of C when its sum is complete. */
typedef struct {
    enum { PLAIN, BIAS, BIAS_GELU, GELU_SLOPE } kind;
    const act *bias; /* BIAS, BIAS_GELU: (N) */
    act *pre;        /* BIAS_GELU: (M,N) gets C + bias, or NULL. GELU_SLOPE: C is multiplied by gelu'(pre) */
    Gelu gelu;
} Epilogue;

static size_t ceil_div(size_t n, size_t d) { return (n + d - 1) / d; }
static size_t round_up(size_t n, size_t d) { return (n + d - 1) / d * d; }

/* c (6, vecs vectors) [+]= a (6,K) b (K, vecs vectors). */
static inline __attribute__((always_inline)) void tile_of(const size_t vecs, real *c, size_t c_row, Mat a,
                                                          const real *b, size_t b_row, size_t K, int add)
{
    vec t[TILE_ROWS][TILE_VECS] = {{{0}}};
    for (size_t i = 0; i < TILE_ROWS; i++)
        for (size_t j = 0; j < vecs; j++) __builtin_prefetch(c + i * c_row + j * LANES, 1);
    for (size_t k = 0; k < K; k++, a.p += a.col, b += b_row)
        for (size_t i = 0; i < TILE_ROWS; i++)
            for (size_t j = 0; j < vecs; j++) t[i][j] += a.p[i * a.row] * *(const loose_vec *)(b + j * LANES);
    for (size_t i = 0; i < TILE_ROWS; i++)
        for (size_t j = 0; j < vecs; j++) {
            loose_vec *to = (loose_vec *)(c + i * c_row + j * LANES);
            if (add) t[i][j] += *to;
            *to = t[i][j];
        }
}

/* c (6,n) [+]= a (6,K) b (K,n), n <= TILE_COLS rounded up to whole vectors. */
static void tile(real *c, size_t c_row, Mat a, const real *b, size_t b_row, size_t n, size_t K, int add)
{
    switch (ceil_div(n, LANES)) {
    case 1: tile_of(1, c, c_row, a, b, b_row, K, add); break;
    case 2: tile_of(2, c, c_row, a, b, b_row, K, add); break;
    case 3: tile_of(TILE_VECS - 1, c, c_row, a, b, b_row, K, add); break;
    default: tile_of(TILE_VECS, c, c_row, a, b, b_row, K, add);
    }
}

/* to (16,16) = the transpose of from (16,16): two perfect shuffles of a deck dealt to four piles, which compilers
 * make vector permutations of. Each cache line of `from` is touched once: rows a power of two apart share few
 * places in L1. */
static inline void transpose_square(real *to, size_t to_row, const real *from, size_t from_row)
{
    enum { PILE = SQUARE * SQUARE / 4 };
    real deck[3][4 * PILE] __attribute__((aligned(64)));
    for (size_t i = 0; i < SQUARE; i++) memcpy(deck[0] + i * SQUARE, from + i * from_row, SQUARE * sizeof(real));
    for (int pass = 0; pass < 2; pass++)
#pragma omp simd
        for (size_t i = 0; i < PILE; i++) {
            deck[pass + 1][4 * i] = deck[pass][i];
            deck[pass + 1][4 * i + 1] = deck[pass][i + PILE];
            deck[pass + 1][4 * i + 2] = deck[pass][i + 2 * PILE];
            deck[pass + 1][4 * i + 3] = deck[pass][i + 3 * PILE];
        }
    for (size_t k = 0; k < SQUARE; k++) memcpy(to + k * to_row, deck[2] + k * SQUARE, SQUARE * sizeof(real));
}

/* out (K,width) = the transpose of from (n,K), and zeros from column n on. width is a constant where this is
 * inlined. */
static inline __attribute__((always_inline)) void pack(real *out, Mat from, size_t n, const size_t width, size_t K)
{
    size_t k = 0;
    if (from.col == 1 && n == width && width % SQUARE == 0)
        for (; k + SQUARE <= K; k += SQUARE)
            for (size_t i = 0; i < width; i += SQUARE)
                transpose_square(out + k * width + i, width, from.p + i * from.row + k, from.row);
    if (from.row == 1 && n == width)
        for (; k < K; k++) memcpy(out + k * width, from.p + k * from.col, width * sizeof *out);
    for (; k < K; k++)
        for (size_t i = 0; i < width; i++) out[k * width + i] = i < n ? from.p[i * from.row + k * from.col] : 0;
}

/* x (n) = gelu(x). The two kinds are apart because only the first vectorises: the other calls libm. */
static void gelu_row(act *x, size_t n, Gelu kind)
{
    if (kind == GELU_ERF)
        for (size_t i = 0; i < n; i++) x[i] = gelu(x[i], GELU_ERF);
    else
#pragma omp simd
        for (size_t i = 0; i < n; i++) x[i] = gelu(x[i], GELU_TANH);
}

/* dx (n) *= gelu'(x). */
static void gelu_slope_row(act *dx, const act *x, size_t n, Gelu kind)
{
    if (kind == GELU_ERF)
        for (size_t i = 0; i < n; i++) dx[i] *= gelu_slope(x[i], GELU_ERF);
    else
#pragma omp simd
        for (size_t i = 0; i < n; i++) dx[i] *= gelu_slope(x[i], GELU_TANH);
}

/* The epilogue on rows x cols elements of C, row by row, the first of them element `at` of C and column `col`. */
static void finish(act *c, size_t at, size_t col, size_t rows, size_t cols, size_t N, const Epilogue *e)
{
    for (size_t i = 0; i < rows; i++, at += N) {
        act *x = c + at, *pre = e->pre ? e->pre + at : NULL;
        const act *bias = e->bias ? e->bias + col : NULL;
        if (bias)
#pragma omp simd
            for (size_t j = 0; j < cols; j++) x[j] += bias[j];
        if (e->kind == BIAS_GELU && pre) memcpy(pre, x, cols * sizeof *x);
        if (e->kind == BIAS_GELU) gelu_row(x, cols, e->gelu);
        if (e->kind == GELU_SLOPE) gelu_slope_row(x, pre, cols, e->gelu);
    }
}

/* c (m,n) [+]= strip (6,K) panel (K,TILE_COLS). A tile on C's edge takes a detour, for it is larger than what is
 * left. */
static void tile_of_matrix(act *c, size_t c_row, size_t m, size_t n, const real *strip, const real *panel, size_t K,
                           int add)
{
    const Mat a = {strip, 1, TILE_ROWS};
    if (m == TILE_ROWS && n % LANES == 0) {
        tile(c, c_row, a, panel, TILE_COLS, n, K, add);
        return;
    }
    real edge[TILE_ROWS * TILE_COLS];
    tile(edge, TILE_COLS, a, panel, TILE_COLS, n, K, 0);
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++) c[i * c_row + j] = edge[i * TILE_COLS + j] + (add ? c[i * c_row + j] : 0);
}

/* c (M,N) [+]= a (M,K) b (K,N), and e, which may be NULL. */
static void matmul(act *c, Mat a, Mat b, size_t M, size_t N, size_t K, int add, const Epilogue *e)
{
    const size_t depth = round_up(ceil_div(K, ceil_div(K, K_BLOCK)), SQUARE);
    const size_t height = min_size(ROW_BLOCK, round_up(M, TILE_ROWS));
    real *strips = scratch(height * depth);
#pragma omp parallel if (M * N * K > 8 * SMALL)
    for (size_t i0 = 0; i0 < M; i0 += height)
        for (size_t k0 = 0; k0 < K; k0 += depth) {
            const size_t rows = min_size(height, M - i0), count = ceil_div(rows, TILE_ROWS);
            const size_t k = min_size(depth, K - k0);
            const Mat a_block = {a.p + i0 * a.row + k0 * a.col, a.row, a.col};
#pragma omp for schedule(static)
            for (size_t s = 0; s < count; s++)
                pack(strips + s * TILE_ROWS * k, (Mat){a_block.p + s * TILE_ROWS * a.row, a.row, a.col},
                     min_size(TILE_ROWS, rows - s * TILE_ROWS), TILE_ROWS, k);
            real panel[K_BLOCK * TILE_COLS] __attribute__((aligned(64)));
            size_t packed = N; /* the column at which panel begins */
#pragma omp for schedule(static)
            for (size_t t = 0; t < count * ceil_div(N, TILE_COLS); t++) {
                const size_t i = i0 + t % count * TILE_ROWS, j = t / count * TILE_COLS;
                const size_t m = min_size(TILE_ROWS, M - i), n = min_size(TILE_COLS, N - j);
                if (packed != j) pack(panel, (Mat){b.p + k0 * b.row + j * b.col, b.col, b.row}, n, TILE_COLS, k);
                packed = j;
                tile_of_matrix(c + i * N + j, N, m, n, strips + t % count * TILE_ROWS * k, panel, k, add || k0 > 0);
                if (e && k0 + k == K) finish(c, i * N + j, j, m, n, N, e);
            }
        }
    free(strips);
}

/* ---- Linear layers ([§3 eq.1-3] are made of these) ------------------------------------------------------------- */

static real dot(const real *a, const real *b, size_t n)
{
    enum { CHAINS = 4 }; /* independent sums hide the latency of the adder */
    vec s[CHAINS] = {{0}};
    real sum = 0;
    size_t i = 0;
    for (; i + CHAINS * LANES <= n; i += CHAINS * LANES)
        for (int j = 0; j < CHAINS; j++)
            s[j] += *(const loose_vec *)(a + i + j * LANES) * *(const loose_vec *)(b + i + j * LANES);
    s[0] = (s[0] + s[1]) + (s[2] + s[3]);
    for (int lane = 0; lane < LANES; lane++) sum += s[0][lane];
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* y (N,O) = x (N,I) w' + b; w (O,I); b (O) or NULL. */
static void linear_forward(act *y, const act *x, const act *w, const act *b, size_t N, size_t I, size_t O)
{
    const Epilogue bias = {BIAS, b, NULL, GELU_TANH};
    if (N >= 4) {
        matmul(y, (Mat){x, I, 1}, (Mat){w, 1, I}, N, O, I, 0, &bias);
        return;
    }
    /* Generation: one token's product runs at the speed at which w is read, so w is read once and as it lies. */
#pragma omp parallel for schedule(static) if (O * I > SMALL)
    for (size_t o = 0; o < O; o++)
        for (size_t n = 0; n < N; n++) y[n * O + o] = dot(x + n * I, w + o * I, I) + (b ? b[o] : 0);
}

enum { COLUMN_BLOCK = 64 }; /* columns a thread takes at a time where sums run down the rows */

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

/* dx (N,I) = dy w; dw (O,I) += dy' x; db (O) += column sums of dy. NULL: not wanted. */
static void linear_backward(act *dx, act *dw, act *db, const act *dy, const act *x, const act *w, size_t N, size_t I,
                            size_t O)
{
    if (dx) matmul(dx, (Mat){dy, O, 1}, (Mat){w, I, 1}, N, I, O, 0, NULL);
    if (dw) matmul(dw, (Mat){dy, 1, O}, (Mat){x, I, 1}, O, I, N, 1, NULL);
    if (db) add_column_sums(db, dy, N, O);
}

/* pre (N,O) = x w' + b; y = gelu(pre) [§3 eq.1; eq.3 where w is one rank's columns]. pre may be NULL (inference). */
static void linear_gelu_forward(act *y, act *pre, const act *x, const act *w, const act *b, size_t N, size_t I,
                                size_t O, Gelu kind)
{
    const Epilogue e = {BIAS_GELU, b, pre, kind};
    if (N >= 4) {
        matmul(y, (Mat){x, I, 1}, (Mat){w, 1, I}, N, O, I, 0, &e);
    } else {
        linear_forward(y, x, w, b, N, I, O);
        const Epilogue only_gelu = {BIAS_GELU, NULL, pre, kind};
        finish(y, 0, 0, N, O, O, &only_gelu);
    }
}

/* Backward of y = gelu(pre), z = y w': dpre (N,I) = (dz w) * gelu'(pre); dw (O,I) += dz' y. z has no bias: w is
 * row-parallel, and its bias comes after g [§3, Z = sum of Y_i B_i]. */
static void gelu_linear_backward(act *dpre, act *dw, const act *dz, const act *y, const act *pre, const act *w,
                                 size_t N, size_t I, size_t O, Gelu kind)
{
    const Epilogue slope = {GELU_SLOPE, NULL, (act *)pre, kind};
    matmul(dpre, (Mat){dz, O, 1}, (Mat){w, I, 1}, N, I, O, 0, &slope);
    matmul(dw, (Mat){dz, 1, O}, (Mat){y, I, 1}, O, I, N, 1, NULL);
}

/* ---- Embeddings ------------------------------------------------------------------------------------------------ */

/* x (N,C) = row tokens[n] - v0 of wte (Vp,C) where this slice [v0, v0+Vp) of the vocabulary owns the token, else
 * 0. */
static void token_embedding_forward(act *x, const int *tokens, const act *wte, size_t N, size_t C, size_t v0,
                                    size_t Vp)
{
#pragma omp parallel for schedule(static) if (N * C > SMALL)
    for (size_t n = 0; n < N; n++) {
        const size_t row = (size_t)tokens[n] - v0; /* below v0 it wraps to a huge number */
        if (row < Vp)
            memcpy(x + n * C, wte + row * C, C * sizeof *x);
        else
            memset(x + n * C, 0, C * sizeof *x);
    }
}

/* dwte[tokens[n] - v0] += dx[n]. A token may repeat, so threads take columns, not rows. */
static void token_embedding_backward(act *dwte, const act *dx, const int *tokens, size_t N, size_t C, size_t v0,
                                     size_t Vp)
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

enum { KEEP_BLOCK = 512 }; /* dropout factors at a time: they stay in L1 */

/* x (C) *= the mask of elements index .. index+C-1. */
static void drop_row(act *x, size_t C, Dropout d, size_t index)
{
    real keep[KEEP_BLOCK];
    for (size_t c0 = 0; c0 < C; c0 += KEEP_BLOCK) {
        const size_t count = min_size(KEEP_BLOCK, C - c0);
        dropout_factors(keep, d, index + c0, count);
#pragma omp simd
        for (size_t c = 0; c < count; c++) x[c0 + c] *= keep[c];
    }
}

/* x (B,T,C) = dropout(x + wpe[past + t]), in place. */
static void position_embedding_forward(act *x, const act *wpe, size_t B, size_t T, size_t C, size_t past, Dropout d)
{
#pragma omp parallel for schedule(static) if (B * T * C > SMALL)
    for (size_t n = 0; n < B * T; n++) {
        act *row = x + n * C;
        const act *position = wpe + (past + n % T) * C;
#pragma omp simd
        for (size_t c = 0; c < C; c++) row[c] += position[c];
        if (d.p > 0) drop_row(row, C, d, n * C);
    }
}

/* dx = mask * dx in place: the gradient of the token embedding's output. dwpe[t] += its sum over b. */
static void position_embedding_backward(act *dx, act *dwpe, size_t B, size_t T, size_t C, Dropout d)
{
#pragma omp parallel for schedule(static) if (B * T * C > SMALL)
    for (size_t t = 0; t < T; t++)
        for (size_t b = 0; b < B; b++) {
            const size_t n = b * T + t;
            if (d.p > 0) drop_row(dx + n * C, C, d, n * C);
#pragma omp simd
            for (size_t c = 0; c < C; c++) dwpe[t * C + c] += dx[n * C + c];
        }
}

/* ---- LayerNorm ------------------------------------------------------------------------------------------------- */

/* y (C) = (x - mean) * rstd * g + b. Two passes over x (it is in L1): no cancellation, unlike E[x^2] - E[x]^2. */
static void layernorm_row(act *y, real *mean, real *rstd, const act *x, const act *g, const act *b, size_t C,
                          real eps)
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
    *mean = m, *rstd = r;
}

/* y (N,C); mean, rstd (N) are kept for backward. */
static void layernorm_forward(act *y, real *mean, real *rstd, const act *x, const act *g, const act *b, size_t N,
                              size_t C, real eps)
{
#pragma omp parallel for schedule(static) if (N * C > SMALL)
    for (size_t n = 0; n < N; n++) layernorm_row(y + n * C, mean + n, rstd + n, x + n * C, g, b, C, eps);
}

/* dx = dres + the gradient through LayerNorm (dres NULL: none; dres may be dx itself); dg, db (C) += . With h = the
 * normalised x: dh = dy * g, dx = rstd * (dh - mean(dh) - h * mean(dh * h)). */
static void layernorm_backward(act *dx, act *dg, act *db, const act *dy, const act *x, const act *g, const real *mean,
                               const real *rstd, const act *dres, size_t N, size_t C)
{
#pragma omp parallel for schedule(static) if (N * C > SMALL)
    for (size_t c0 = 0; c0 < C; c0 += COLUMN_BLOCK) { /* dx may overwrite dy's or x's buffer: this comes first */
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
        for (size_t c = 0; c < count; c++) dg[c0 + c] += sum_g[c], db[c0 + c] += sum_b[c];
    }
#pragma omp parallel for schedule(static) if (N * C > SMALL)
    for (size_t n = 0; n < N; n++) {
        act *dx_n = dx + n * C;
        const act *dy_n = dy + n * C, *x_n = x + n * C, *dres_n = dres ? dres + n * C : NULL;
        const real m = mean[n], r = rstd[n];
        real sum = 0, sum_h = 0;
#pragma omp simd reduction(+ : sum, sum_h)
        for (size_t c = 0; c < C; c++) {
            sum += dy_n[c] * g[c];
            sum_h += dy_n[c] * g[c] * ((x_n[c] - m) * r);
        }
        sum /= (real)C, sum_h /= (real)C;
#pragma omp simd
        for (size_t c = 0; c < C; c++)
            dx_n[c] = (dres_n ? dres_n[c] : 0) + r * (dy_n[c] * g[c] - sum - (x_n[c] - m) * r * sum_h);
    }
}

/* ---- Bias + dropout + residual (+ LayerNorm) ------------------------------------------------------------------- */

/* out (C) = residual + mask * (y + bias), for elements index .. index+C-1. */
static void bias_dropout_add_row(act *out, const act *y, const act *bias, const act *residual, size_t C, Dropout d,
                                 size_t index)
{
    if (d.p == 0) {
#pragma omp simd
        for (size_t c = 0; c < C; c++) out[c] = residual[c] + (y[c] + bias[c]);
        return;
    }
    real keep[KEEP_BLOCK];
    for (size_t c0 = 0; c0 < C; c0 += KEEP_BLOCK) {
        const size_t end = min_size(c0 + KEEP_BLOCK, C);
        dropout_factors(keep, d, index + c0, end - c0);
#pragma omp simd
        for (size_t c = c0; c < end; c++) out[c] = residual[c] + (y[c] + bias[c]) * keep[c - c0];
    }
}

/* out (N,C) = residual + dropout(y + bias). The bias is added once, after g: inside the partial sums it would come t
 * times [P4]. out may be y or residual. */
static void bias_dropout_add_forward(act *out, const act *y, const act *bias, const act *residual, size_t N, size_t C,
                                     Dropout d)
{
#pragma omp parallel for schedule(static) if (N * C > SMALL)
    for (size_t n = 0; n < N; n++) bias_dropout_add_row(out + n * C, y + n * C, bias, residual + n * C, C, d, n * C);
}

/* The same, and the LayerNorm that follows it, while the row is in L1: res as above, ln = LN(res). */
static void bias_dropout_add_layernorm_forward(act *ln, act *res, real *mean, real *rstd, const act *y,
                                               const act *bias, const act *residual, const act *g, const act *b,
                                               size_t N, size_t C, real eps, Dropout d)
{
#pragma omp parallel for schedule(static) if (N * C > SMALL)
    for (size_t n = 0; n < N; n++) {
        bias_dropout_add_row(res + n * C, y + n * C, bias, residual + n * C, C, d, n * C);
        layernorm_row(ln + n * C, mean + n, rstd + n, res + n * C, g, b, C, eps);
    }
}

/* dy = mask * dout; dbias (C) += column sums of dy. The residual's gradient is dout itself. */
static void bias_dropout_add_backward(act *dy, act *dbias, const act *dout, size_t N, size_t C, Dropout d)
{
#pragma omp parallel for schedule(static) if (N * C > SMALL)
    for (size_t n = 0; n < N; n++) {
        if (dy != dout) memcpy(dy + n * C, dout + n * C, C * sizeof *dy);
        if (d.p > 0) drop_row(dy + n * C, C, d, n * C);
    }
    add_column_sums(dbias, dy, N, C);
}

/* ---- Causal self-attention [§3 Fig. 3b] ------------------------------------------------------------------------ */

/* For one head: S = Q K' / sqrt(D), P = softmax of each row i over the keys j <= i, out = dropout(P) V. The T x T
 * matrices never exist: a block of QUERIES rows meets the keys KEYS at a time, and the softmax is kept as a
 * running maximum m, a running sum l of e^(s-m) and a running out, the last two shrunk by e^(old m - new m) when m
 * grows. Blocks above the diagonal are skipped. What remains for backward is lse = m + log l, for P = e^(S - lse)
 * [Milakov & Gimelshein 2018, Dao et al. 2022]. The products are matmul's tiles; a thread's extra memory is O(T
 * D). */
enum {
    QUERIES = 48,            /* a multiple of TILE_ROWS */
    KEYS = 128,              /* a multiple of TILE_COLS */
    P_ROW = KEYS + TILE_ROWS /* P' is read TILE_ROWS rows at a time: the last ones of P stay 0 */
};

/* The right-hand side of block_product: panels of TILE_COLS columns, `panel` numbers apart. */
typedef struct {
    const real *p;
    size_t row, panel;
} Panels;

/* c (M,N) [+]= a (M,K) b (K,N), all in cache. Touches whole tiles: M rounded up to TILE_ROWS, N rounded up to
 * LANES. */
static void block_product(real *c, size_t c_row, Mat a, Panels b, size_t M, size_t N, size_t K, int add)
{
    for (size_t j = 0; j < N; j += TILE_COLS, b.p += b.panel)
        for (size_t i = 0; i < M; i += TILE_ROWS)
            tile(c + i * c_row + j, c_row, (Mat){a.p + i * a.row, a.row, a.col}, b.p, b.row,
                 min_size(TILE_COLS, N - j), K, add);
}

/* to (rows up to a multiple of TILE_ROWS, Dp) = from (rows, D) * scale, and zeros around it. */
static void copy_rows(real *to, const act *from, size_t from_row, size_t rows, size_t D, size_t Dp, real scale)
{
    memset(to, 0, round_up(rows, TILE_ROWS) * Dp * sizeof *to);
    for (size_t i = 0; i < rows; i++)
#pragma omp simd
        for (size_t c = 0; c < D; c++) to[i * Dp + c] = from[i * from_row + c] * scale;
}

/* to = the transpose of from (rows, D), in panels of TILE_COLS rows: what block_product multiplies by for Q K'. */
static void transpose_rows(real *to, const act *from, size_t from_row, size_t rows, size_t D)
{
    for (size_t j = 0; j < rows; j += TILE_COLS, to += D * TILE_COLS)
        pack(to, (Mat){from + j * from_row, from_row, 1}, min_size(TILE_COLS, rows - j), TILE_COLS, D);
}

/* How many of the keys j0 .. j0+keys-1 query i may see. */
static size_t visible(size_t i, size_t j0, size_t keys) { return i < j0 ? 0 : min_size(i + 1 - j0, keys); }

/* The dropout stream of head h of sequence b. */
static Dropout head_dropout(Dropout d, size_t b, size_t h, size_t T)
{
    d.first += (b * d.heads + h) * T * T;
    return d;
}

/* One row of scores s (n) becomes dropped-out probabilities relative to e^m; the row's m, l and o (Dp) follow. */
static void online_softmax_row(real *s, size_t n, real *m, real *l, real *o, size_t Dp, Dropout d, size_t index)
{
    real sum = 0, keep[KEYS];
    const real top = largest(s, n, *m);
    const real shrink = exponential(*m - top); /* 0 the first time, when m = -inf */
#pragma omp simd reduction(+ : sum)
    for (size_t j = 0; j < n; j++) {
        s[j] = exponential(s[j] - top);
        sum += s[j];
    }
    *l = *l * shrink + sum; /* the softmax is of all scores: dropout comes after it */
    *m = top;
    if (d.p > 0) {
        dropout_factors(keep, d, index, n);
#pragma omp simd
        for (size_t j = 0; j < n; j++) s[j] *= keep[j];
    }
    if (shrink != 1)
#pragma omp simd
        for (size_t c = 0; c < Dp; c++) o[c] *= shrink;
}

/* Rows i0 .. i0+rows-1 of one head: o (QUERIES,Dp), m and l (QUERIES), from qs = Q / sqrt(D) (QUERIES,Dp), the
 * transposed kt and v (T,Dp); p (QUERIES,P_ROW) is working space. */
static void attend(real *o, real *m, real *l, real *p, const real *qs, const real *kt, const real *v, size_t i0,
                   size_t rows, size_t T, size_t D, size_t Dp, Dropout d)
{
    memset(o, 0, QUERIES * Dp * sizeof *o);
    for (size_t i = 0; i < rows; i++) m[i] = -INFINITY, l[i] = 0;
    for (size_t j0 = 0; j0 < i0 + rows; j0 += KEYS) {
        const size_t keys = min_size(KEYS, i0 + rows - j0);
        const Panels kt_block = {kt + j0 * D, TILE_COLS, D * TILE_COLS}, v_block = {v + j0 * Dp, Dp, TILE_COLS};
        block_product(p, P_ROW, (Mat){qs, Dp, 1}, kt_block, rows, keys, D, 0);
        for (size_t i = 0; i < rows; i++) {
            const size_t n = visible(i0 + i, j0, keys);
            if (n > 0) online_softmax_row(p + i * P_ROW, n, m + i, l + i, o + i * Dp, Dp, d, (i0 + i) * T + j0);
            for (size_t j = n; j < keys; j++) p[i * P_ROW + j] = 0;
        }
        block_product(o, Dp, (Mat){p, P_ROW, 1}, v_block, rows, Dp, keys, 1);
    }
}

/* out (B,T,H*D), lse (B,H,T) log-sum-exp of scaled scores; qkv (B,T,3*H*D): [Q;K;V], each H heads of D [P11].
 * Dropout element (b,h,i,j) has index d.first + ((b*d.heads + h)*T + i)*T + j. A task is a few blocks of queries
 * of one head, the longest first: threads end together. */
static void attention_forward(act *out, real *lse, const act *qkv, size_t B, size_t T, size_t H, size_t D, Dropout d)
{
    enum { TASK = 5 * QUERIES };
    const size_t C = H * D, Dp = round_up(D, LANES), Tp = round_up(T, KEYS), slices = ceil_div(T, TASK);
    const real scale = 1 / square_root((real)D);
#pragma omp parallel if (B * H * T * D > SMALL)
    {
        real *kt = scratch(Tp * D + (Tp + 2 * QUERIES) * Dp + QUERIES * P_ROW);
        real *v = kt + Tp * D, *qs = v + Tp * Dp, *o = qs + QUERIES * Dp, *p = o + QUERIES * Dp;
        real m[QUERIES], l[QUERIES];
#pragma omp for schedule(dynamic)
        for (size_t task = 0; task < B * H * slices; task++) {
            const size_t b = task / H % B, h = task % H;
            const size_t first = (slices - 1 - task / (B * H)) * TASK, end = min_size(first + TASK, T);
            const act *q_head = qkv + b * T * 3 * C + h * D;
            transpose_rows(kt, q_head + C, 3 * C, end, D);
            copy_rows(v, q_head + 2 * C, 3 * C, end, D, Dp, 1);
            for (size_t i0 = first; i0 < end; i0 += QUERIES) {
                const size_t rows = min_size(QUERIES, end - i0);
                copy_rows(qs, q_head + i0 * 3 * C, 3 * C, rows, D, Dp, scale);
                attend(o, m, l, p, qs, kt, v, i0, rows, T, D, Dp, head_dropout(d, b, h, T));
                for (size_t i = 0; i < rows; i++) {
                    for (size_t c = 0; c < D; c++) out[(b * T + i0 + i) * C + h * D + c] = o[i * Dp + c] / l[i];
                    lse[(b * H + h) * T + i0 + i] = m[i] + (real)log((double)l[i]);
                }
            }
        }
        free(kt);
    }
}

/* One row: scores s become the dropped-out P, and dp = dO V' becomes dS = P (mask dp - delta). */
static void softmax_backward_row(real *s, real *dp, size_t n, real lse, real delta, Dropout d, size_t index)
{
    real keep[KEYS];
    dropout_factors(keep, d, index, n);
#pragma omp simd
    for (size_t j = 0; j < n; j++) {
        const real p = exponential(s[j] - lse);
        s[j] = p * keep[j];
        dp[j] = s[j] * dp[j] - p * delta;
    }
}

/* One head's working space: rows are padded to Dp columns, and their number to tiles. */
typedef struct {
    real *qs, *k, *go, *dq, *dk, *dv; /* (T,Dp) Q / sqrt(D), K, dO and the three gradients */
    real *kt, *vt;                    /* K and V transposed */
    real *p, *ds;                     /* (QUERIES,P_ROW) */
} HeadBackward;

/* Query block i0 meets key block j0: dV += P' dO, dK += dS' Q, dQ += dS K. */
static void attend_backward(const HeadBackward *w, const real *lse, const real *delta, size_t i0, size_t j0, size_t T,
                            size_t D, size_t Dp, Dropout d)
{
    const size_t rows = min_size(QUERIES, T - i0), keys = min_size(KEYS, T - j0);
    const Panels kt = {w->kt + j0 * D, TILE_COLS, D * TILE_COLS}, vt = {w->vt + j0 * D, TILE_COLS, D * TILE_COLS};
    const Panels q = {w->qs + i0 * Dp, Dp, TILE_COLS}, go = {w->go + i0 * Dp, Dp, TILE_COLS};
    const Panels k = {w->k + j0 * Dp, Dp, TILE_COLS};
    block_product(w->p, P_ROW, (Mat){q.p, Dp, 1}, kt, rows, keys, D, 0);
    block_product(w->ds, P_ROW, (Mat){go.p, Dp, 1}, vt, rows, keys, D, 0);
    for (size_t i = 0; i < rows; i++) {
        real *p = w->p + i * P_ROW, *ds = w->ds + i * P_ROW;
        const size_t n = visible(i0 + i, j0, keys);
        softmax_backward_row(p, ds, n, lse[i0 + i], delta[i0 + i], d, (i0 + i) * T + j0);
        for (size_t j = n; j < keys; j++) p[j] = ds[j] = 0;
    }
    block_product(w->dv + j0 * Dp, Dp, (Mat){w->p, 1, P_ROW}, go, keys, Dp, rows, 1);
    block_product(w->dk + j0 * Dp, Dp, (Mat){w->ds, 1, P_ROW}, q, keys, Dp, rows, 1);
    block_product(w->dq + i0 * Dp, Dp, (Mat){w->ds, P_ROW, 1}, k, rows, Dp, keys, 1);
}

/* dqkv is written. delta (B,H,T): scratch, sum over c of dout * out = sum over j of P mask dO V'. A head is one task, so
 * that dK and dV are summed in one order. */
static void attention_backward(act *dqkv, real *delta, const act *dout, const act *out, const real *lse,
                               const act *qkv, size_t B, size_t T, size_t H, size_t D, Dropout d)
{
    const size_t C = H * D, Dp = round_up(D, LANES), Tp = T + 2 * TILE_ROWS, Tt = round_up(T, KEYS);
    const real scale = 1 / square_root((real)D);
#pragma omp parallel if (B * H * T * D > SMALL)
    {
        real *space = scratch(6 * Tp * Dp + 2 * Tt * D + 2 * QUERIES * P_ROW), *at = space;
        HeadBackward w; /* dq, dk and dv are neighbours: one memset clears them */
        w.qs = at, w.k = at += Tp * Dp, w.go = at += Tp * Dp;
        w.dq = at += Tp * Dp, w.dk = at += Tp * Dp, w.dv = at += Tp * Dp;
        w.kt = at += Tp * Dp, w.vt = at += Tt * D;
        w.p = at += Tt * D, w.ds = at += QUERIES * P_ROW;
        memset(w.p, 0, 2 * QUERIES * P_ROW * sizeof *w.p);
#pragma omp for schedule(dynamic)
        for (size_t task = 0; task < B * H; task++) {
            const size_t b = task / H, h = task % H, q_head = b * T * 3 * C + h * D, o_head = b * T * C + h * D;
            copy_rows(w.qs, qkv + q_head, 3 * C, T, D, Dp, scale);
            copy_rows(w.k, qkv + q_head + C, 3 * C, T, D, Dp, 1);
            copy_rows(w.go, dout + o_head, C, T, D, Dp, 1);
            transpose_rows(w.kt, qkv + q_head + C, 3 * C, T, D);
            transpose_rows(w.vt, qkv + q_head + 2 * C, 3 * C, T, D);
            memset(w.dq, 0, 3 * Tp * Dp * sizeof *w.dq);
            for (size_t i = 0; i < T; i++) delta[task * T + i] = dot(dout + o_head + i * C, out + o_head + i * C, D);
            for (size_t j0 = 0; j0 < T; j0 += KEYS)
                for (size_t i0 = j0 / QUERIES * QUERIES; i0 < T; i0 += QUERIES)
                    attend_backward(&w, lse + task * T, delta + task * T, i0, j0, T, D, Dp, head_dropout(d, b, h, T));
            for (size_t i = 0; i < T; i++)
                for (size_t c = 0; c < D; c++) {
                    act *to = dqkv + q_head + i * 3 * C + c;
                    to[0] = w.dq[i * Dp + c] * scale;
                    to[C] = w.dk[i * Dp + c]; /* Q was scaled already */
                    to[2 * C] = w.dv[i * Dp + c];
                }
        }
        free(space);
    }
}

/* Generation, one sequence: n new rows qkv (n,3*H*D) at positions past .. past+n-1. Appends their K and V to the
 * caches (positions, H*D) and attends to everything so far; out (n,H*D). */
static void attention_cached_forward(act *out, act *k_cache, act *v_cache, const act *qkv, size_t n, size_t past,
                                     size_t H, size_t D)
{
    const size_t C = H * D;
    const Dropout none = {0, 0, 0, 0, 0, H};
    for (size_t i = 0; i < n; i++) {
        memcpy(k_cache + (past + i) * C, qkv + i * 3 * C + C, C * sizeof *k_cache);
        memcpy(v_cache + (past + i) * C, qkv + i * 3 * C + 2 * C, C * sizeof *v_cache);
    }
    if (past == 0 && n > 1) { /* a prompt: nothing but itself to attend to */
        real *lse = scratch(H * n);
        attention_forward(out, lse, qkv, 1, n, H, D, none);
        free(lse);
        return;
    }
#pragma omp parallel for schedule(static) if (n * (past + n) * C > SMALL)
    for (size_t h = 0; h < H; h++) {
        real *p = scratch(past + n);
        for (size_t i = 0; i < n; i++) {
            const act *q = qkv + i * 3 * C + h * D;
            act *o = out + i * C + h * D;
            real l = 0, m = -INFINITY;
            for (size_t j = 0; j <= past + i; j++) {
                p[j] = dot(q, k_cache + j * C + h * D, D) / square_root((real)D);
                m = p[j] > m ? p[j] : m;
            }
#pragma omp simd reduction(+ : l)
            for (size_t j = 0; j <= past + i; j++) {
                p[j] = exponential(p[j] - m);
                l += p[j];
            }
            for (size_t c = 0; c < D; c++) o[c] = 0;
            for (size_t j = 0; j <= past + i; j++) {
                const act *v = v_cache + j * C + h * D;
                const real weight = p[j] / l;
#pragma omp simd
                for (size_t c = 0; c < D; c++) o[c] += weight * v[c];
            }
        }
        free(p);
    }
}

/* ---- Softmax and cross entropy over a slice of the vocabulary [§3] --------------------------------------------- */

/* This rank's columns are the words v0 .. v0+Vp-1; the first `valid` are real, the rest padding that takes part in
 * nothing. Between these steps chapter 5 reduces max, sum and target_logit over the ranks: three numbers a row travel
 * where the logits would be V. */

/* max (N) of the valid logits (N,Vp); -inf if there are none. */
static void logits_max(real *max, const act *logits, size_t N, size_t Vp, size_t valid)
{
#pragma omp parallel for schedule(static) if (N * Vp > SMALL)
    for (size_t n = 0; n < N; n++) max[n] = largest(logits + n * Vp, valid, -INFINITY);
}

/* sum = sum of e^(z - max) over the valid words; target_logit = z[target] - max if this slice owns it, else 0. Summed
 * in double: the only error left is the exponential's, 1.02 ulp of each term, 1.3e-7 [P16]. */
static void logits_sum_exp(real *sum, real *target_logit, const act *logits, const real *max, const int *targets,
                           size_t N, size_t Vp, size_t valid, size_t v0)
{
#pragma omp parallel for schedule(static) if (N * Vp > SMALL)
    for (size_t n = 0; n < N; n++) {
        const act *z = logits + n * Vp;
        const size_t target = (size_t)targets[n] - v0;
        const real top = max[n];
        double total = 0;
#pragma omp simd reduction(+ : total)
        for (size_t v = 0; v < valid; v++) total += (double)exponential(z[v] - top);
        sum[n] = (real)total;
        target_logit[n] = target < valid ? z[target] - top : 0;
    }
}

/* loss (N) = log(sum) - target_logit, both summed over the ranks by now: -log softmax(z)[target]. */
static void cross_entropy_loss(real *loss, const real *sum, const real *target_logit, size_t N)
{
    for (size_t n = 0; n < N; n++) loss[n] = (real)(log((double)sum[n]) - (double)target_logit[n]);
}

/* In place: logits (N,Vp) become (softmax - onehot) * weight[n] * scale; padding becomes 0. */
static void cross_entropy_backward(act *logits, const real *max, const real *sum, const int *targets,
                                   const real *weight, real scale, size_t N, size_t Vp, size_t valid, size_t v0)
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

/* ---- Optimiser's and collectives' inner loops ------------------------------------------------------------------ */

/* AdamW on n parameters: p -= lr * (m^ / (sqrt(v^) + eps) + decay * p) [P32], m^ and v^ free of the bias of their
 * zero start. master: float weights behind narrower ones; NULL: w itself. */
static void adamw(act *w, real *master, real *m, real *v, const act *g, size_t n, AdamW h)
{
    const real lr = (real)h.lr, decay = (real)h.decay, eps = (real)h.eps, grad_scale = (real)h.grad_scale;
    const real b1 = (real)h.beta1, b2 = (real)h.beta2, r1 = (real)(1 - h.beta1), r2 = (real)(1 - h.beta2);
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

/* Sum of squares, in double over a fixed number of runs: the order depends on n alone. */
static double sum_squares(const act *x, size_t n)
{
    enum { RUNS = 64 };
    double part[RUNS], total = 0;
#pragma omp parallel for schedule(static) if (n > SMALL)
    for (size_t r = 0; r < RUNS; r++) {
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t i = n / RUNS * r + min_size(r, n % RUNS); i < n / RUNS * (r + 1) + min_size(r + 1, n % RUNS); i++)
            sum += (double)x[i] * (double)x[i];
        part[r] = sum;
    }
    for (size_t r = 0; r < RUNS; r++) total += part[r];
    return total;
}

/* The loop of all_reduce: elements [begin, begin+n) of all P arrays become op over the P arrays, in rank order. A NaN
 * wins every MAX. */
static void reduce_slice(void *const *x, int P, size_t begin, size_t n, Type type, Op op)
{
    enum { RUN = 1024 };      /* elements that stay in L1 while the ranks' arrays pass by */
    if (type == DOUBLE_ARRAY) /* a few scalars */
        for (size_t i = begin; i < begin + n; i++) {
            double total = ((double *)x[0])[i];
            for (int r = 1; r < P; r++) {
                const double a = ((double *)x[r])[i];
                total = op == SUM ? total + a : a > total || a != a ? a : total;
            }
            for (int r = 0; r < P; r++) ((double *)x[r])[i] = total;
        }
    else
#pragma omp parallel for schedule(static) if (n > SMALL)
        for (size_t i0 = begin; i0 < begin + n; i0 += RUN) {
            const size_t count = min_size(RUN, begin + n - i0);
            real total[RUN];
            memcpy(total, (real *)x[0] + i0, count * sizeof *total);
            for (int r = 1; r < P; r++) {
                const real *a = (real *)x[r] + i0;
#pragma omp simd
                for (size_t i = 0; i < count; i++)
                    total[i] = op == SUM ? total[i] + a[i] : a[i] > total[i] || a[i] != a[i] ? a[i] : total[i];
            }
            for (int r = 0; r < P; r++) memcpy((real *)x[r] + i0, total, count * sizeof *total);
        }
}

#endif /* GPT2_OPERATORS */
