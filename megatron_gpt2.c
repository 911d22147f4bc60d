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

/* ================================================================================================================
 * Chapter 8. Text and data [§4.1]
 *
 * Text becomes numbers by GPT-2's byte-level byte-pair encoding. A text is cut into words; a word is a row of bytes,
 * of which neighbours merge by a list of pairs, the list's first pair first, until no pair of the list is left in it.
 * As every byte is a token, any bytes can be encoded, and decoding gives them back. Documents, with <|endoftext|>
 * between them, are joined and cut into samples of T + 1 tokens: T inputs, and the same shifted by one as labels.
 * ============================================================================================================= */

#include "dev/unicode/classes.h" /* class_starts[]: which code points are letters, numbers, white space */

static const char END_OF_TEXT[] = "<|endoftext|>";

/* Room for one element more in a growing array of n elements: p itself, or p moved into twice the capacity. */
static void *grow(void *p, size_t n, size_t *capacity, size_t size)
{
    if (n < *capacity) return p;
    *capacity = *capacity ? 2 * *capacity : 64;
    p = realloc(p, *capacity * size);
    if (!p) die("out of memory: %zu objects of %zu bytes were asked for; give less text", *capacity, size);
    return p;
}

typedef struct {
    int *id;
    size_t n, capacity;
} Tokens; /* starts as {NULL, 0, 0}; free(id) ends it */

static void push_token(Tokens *tokens, int id)
{
    tokens->id = (int *)grow(tokens->id, tokens->n, &tokens->capacity, sizeof(int));
    tokens->id[tokens->n++] = id;
}

/* ---- Words: the pre-tokeniser ---------------------------------------------------------------------------------- */

enum { NOT_A_CHARACTER = 0x110000 }; /* one past the last code point: stands for a byte that is not UTF-8 */

/* The character that begins at text, n > 0 bytes left: its code point, and its length in bytes as the result. A byte
 * that begins no well-formed character counts as one character by itself. */
static size_t next_character(uint32_t *code, const char *text, size_t n)
{
    size_t length = utf8_length(text, n);
    unsigned char first = (unsigned char)*text;
    *code = length == 1 ? first : length ? first & (0x7Fu >> length) : (uint32_t)NOT_A_CHARACTER;
    for (size_t i = 1; i < length; i++) *code = *code << 6 | (text[i] & 0x3F);
    return max_size(length, 1);
}

/* CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE or CLASS_OTHER. */
static int class_of(uint32_t code)
{
    size_t low = 0, high = sizeof(class_starts) / sizeof(class_starts[0]); /* the answer is in [low, high) */
    if (code < 0x80 && (code | 32) - 'a' < 26u) return CLASS_LETTER;       /* most of most texts */
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (class_starts[middle] >> 2 <= code) low = middle;
        else high = middle;
    }
    return class_starts[low] & 3;
}

/* Bytes of 's 't 're 've 'm 'll 'd at text, or 0. */
static size_t contraction(const char *text, size_t n)
{
    if (n < 2 || text[0] != '\'') return 0;
    if (memchr("stmd", text[1], 4)) return 2;
    return n > 2 && (!memcmp(text + 1, "re", 2) || !memcmp(text + 1, "ve", 2) || !memcmp(text + 1, "ll", 2)) ? 3 : 0;
}

/* The end of the word that begins at start < n: what GPT-2's regular expression
 *     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 * would match there. A word is a run of one class, and may take along one blank before it. */
static size_t word_end(const char *text, size_t n, size_t start)
{
    uint32_t code;
    size_t end = start, last = start, length; /* last: where the run's last character begins */
    int kind;

    if ((length = contraction(text + start, n - start))) return start + length;
    length = next_character(&code, text + start, n - start);
    kind = class_of(code);
    if (code == ' ' && start + 1 < n) {
        uint32_t after;
        next_character(&after, text + start + 1, n - start - 1);
        if (class_of(after) != CLASS_SPACE) kind = class_of(after), end = start + 1; /* " word" */
    }
    while (end < n) {
        length = next_character(&code, text + end, n - end);
        if (class_of(code) != kind) break;
        last = end, end += length;
    }
    /* White space before a word leaves its last character to that word: \s+(?!\S). */
    return kind == CLASS_SPACE && end < n && last > start ? last : end;
}

/* ---- Byte-pair encoding ---------------------------------------------------------------------------------------- */

typedef struct {
    const char *bytes;
    size_t n;
    int id;
} Token;

typedef struct {
    uint32_t left, right; /* these two neighbouring tokens .. */
    uint32_t rank, id;    /* .. merge into this one, the lowest rank first */
} Merge;

typedef struct {
    size_t vocabulary;
    int end_of_text;  /* id of <|endoftext|>, -1 if there is none */
    Token *token;     /* (vocabulary) by id */
    char *bytes;      /* what they point into */
    int byte_id[256]; /* the token of a single byte */
    Merge *merge;     /* sorted by left, then right: every look-up is a binary search, so no input makes it slow */
    size_t *row;      /* (vocabulary + 1) where each left token's merges begin in it */
} Tokenizer;

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

/* A word while it is merged: a linked list of symbols, each at the position of its first byte, and a heap of the
 * merges that are possible. A word of n bytes takes O(n log n), be it one letter a million times. The heap holds 2n
 * entries at most: n - 1 at first, and each merge takes one away and adds two. */
typedef struct {
    uint32_t *id, *before, *after; /* (capacity) token and neighbours; after = n: none */
    uint64_t *heap;                /* (2 capacity) rank << 32 | position of the left symbol, the smallest on top */
    size_t capacity, n, entries;
} Word;

static const uint32_t MERGED = UINT32_MAX; /* the id at a position whose symbol went into its left neighbour */

/* The merge of the symbol at position i with the next one, or NULL. */
static const Merge *merge_at(const Word *w, const Tokenizer *t, uint32_t i)
{
    if (w->id[i] == MERGED || w->after[i] >= w->n) return NULL;
    return find_merge(t, w->id[i], w->id[w->after[i]]);
}

/* Puts the merge at position i, if there is one, onto the heap. */
static void heap_push(Word *w, const Tokenizer *t, uint32_t i)
{
    const Merge *merge = merge_at(w, t, i);
    size_t at;
    if (!merge) return;
    uint64_t key = (uint64_t)merge->rank << 32 | i;
    for (at = w->entries++; at > 0 && w->heap[(at - 1) / 2] > key; at = (at - 1) / 2)
        w->heap[at] = w->heap[(at - 1) / 2];
    w->heap[at] = key;
}

static uint64_t heap_pop(Word *w)
{
    uint64_t top = w->heap[0], key = w->heap[--w->entries];
    size_t at = 0, child;
    while ((child = 2 * at + 1) < w->entries) {
        if (child + 1 < w->entries && w->heap[child + 1] < w->heap[child]) child++;
        if (w->heap[child] >= key) break;
        w->heap[at] = w->heap[child], at = child;
    }
    w->heap[at] = key;
    return top;
}

static void encode_word(Tokens *out, const Tokenizer *t, Word *w, const char *text, size_t n)
{
    if (n > UINT32_MAX / 2) die("a word of %zu bytes: a text with so long a word cannot be encoded", n);
    if (n > w->capacity) {
        free(w->id), free(w->heap);
        w->capacity = max_size(n, 2 * w->capacity);
        w->id = (uint32_t *)xcalloc(3 * w->capacity, sizeof(uint32_t));
        w->before = w->id + w->capacity, w->after = w->before + w->capacity;
        w->heap = (uint64_t *)xcalloc(2 * w->capacity, sizeof(uint64_t));
    }
    w->n = n, w->entries = 0;
    for (uint32_t i = 0; i < n; i++)
        w->id[i] = (uint32_t)t->byte_id[(unsigned char)text[i]], w->before[i] = i - 1, w->after[i] = i + 1;
    for (uint32_t i = 0; i + 1 < n; i++) heap_push(w, t, i);
    while (w->entries) {
        uint64_t key = heap_pop(w);
        uint32_t i = (uint32_t)key, j;
        const Merge *merge = merge_at(w, t, i);
        if (!merge || merge->rank != key >> 32) continue; /* an entry from before a neighbour merged */
        j = w->after[i];
        w->id[i] = merge->id, w->id[j] = MERGED, w->after[i] = w->after[j];
        if (w->after[i] < n) w->before[w->after[i]] = i;
        heap_push(w, t, i);
        if (i > 0) heap_push(w, t, w->before[i]);
    }
    for (uint32_t i = 0; i < n; i = w->after[i]) push_token(out, (int)w->id[i]);
}

/* Appends the tokens of a text. <|endoftext|> in it is the one special token, as in Hugging Face's tokenizers. */
static void encode_part(Tokens *out, const Tokenizer *t, const char *text, size_t n)
{
    Word word = {NULL, NULL, NULL, NULL, 0, 0, 0};
    size_t special = sizeof(END_OF_TEXT) - 1;
    for (size_t start = 0; start < n;) {
        const char *found = NULL;
        if (t->end_of_text >= 0) found = (const char *)memmem(text + start, n - start, END_OF_TEXT, special);
        size_t stop = found ? (size_t)(found - text) : n;
        for (size_t end; start < stop; start = end) {
            end = word_end(text, stop, start);
            encode_word(out, t, &word, text + start, end - start);
        }
        if (found) push_token(out, t->end_of_text), start += special;
    }
    free(word.id), free(word.heap);
}

/* The same, a long text in parts side by side. A part ends between a visible ASCII character and white space: there
 * every word ends, whatever comes after. */
static void encode(Tokens *out, const Tokenizer *t, const char *text, size_t n)
{
    enum { PART = 1 << 17 }; /* bytes */
    Tokens *part = (Tokens *)xcalloc(n / PART + 1, sizeof(Tokens));
    size_t *start = (size_t *)xcalloc(n / PART + 2, sizeof(size_t)), parts = 0;
    while (start[parts] < n) {
        size_t end = min_size(start[parts] + PART, n);
        while (end < n && !((text[end] == ' ' || text[end] == '\n') && text[end - 1] > ' ' && text[end - 1] < 0x7F))
            end++;
        start[++parts] = end;
    }
#pragma omp parallel for schedule(dynamic) if (parts > 1)
    for (size_t i = 0; i < parts; i++) encode_part(&part[i], t, text + start[i], start[i + 1] - start[i]);
    for (size_t i = 0; i < parts; i++) {
        for (size_t j = 0; j < part[i].n; j++) push_token(out, part[i].id[j]);
        free(part[i].id);
    }
    free(part), free(start);
}

/* The n bytes of a token; none for an id outside the vocabulary (a model's has padding behind it). */
static const char *decode(size_t *n, const Tokenizer *t, int id)
{
    int known = id >= 0 && (size_t)id < t->vocabulary;
    *n = known ? t->token[id].n : 0;
    return known ? t->token[id].bytes : "";
}

/* ---- vocab.json and merges.txt --------------------------------------------------------------------------------- */

/* These files write a byte as one printable character: itself where it is one in Latin-1, else U+0100 and up. */
enum { BYTE_CHARACTERS = 324 };

static void byte_characters(int byte_of[BYTE_CHARACTERS]) /* -1: no byte is written so */
{
    int next = 256;
    for (int c = 0; c < BYTE_CHARACTERS; c++) byte_of[c] = -1;
    for (int b = 0; b < 256; b++)
        byte_of[(b >= '!' && b <= '~') || (b >= 0xA1 && b != 0xAD && b <= 0xFF) ? b : next++] = b;
}

/* Reads a token's name as bytes into out; returns how many, 0 if the name is empty or not of this alphabet. */
static size_t bytes_of_name(char *out, const int byte_of[BYTE_CHARACTERS], const char *name, size_t n)
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
    const Token *found = (const Token *)bsearch(&key, sorted, vocabulary, sizeof(Token), compare_tokens);
    return found ? found->id : -1;
}

/* {"!": 0, "\"": 1, ..}: n tokens whose ids are 0..n-1. */
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
    t->bytes = (char *)xcalloc(map.size, 1); /* a byte takes one character, so all names together fit */
    for (size_t i = 1; i < root->end; i = json.value[i].end) {
        const JsonValue *v = &json.value[i];
        size_t n = bytes_of_name(t->bytes + used, byte_of, v->key, strlen(v->key));
        Token token = {t->bytes + used, n, 0};
        double id = v->type == JSON_NUMBER ? v->number : -1;
        printable(shown, v->key);
        if (!n) die("%s: \"%s\" is not in GPT-2's alphabet of byte-level tokens", path, shown);
        if (id < 0 || id >= (double)root->length || id != floor(id))
            die("%s: the id of \"%s\" must be an integer below %zu, the number of tokens", path, shown, root->length);
        token.id = (int)id;
        if (t->token[token.id].n) die("%s: the id %d is given twice, now to \"%s\"", path, token.id, shown);
        t->token[token.id] = token;
        used += n;
    }
    json_free(&json);
    unmap_file(map);
}

/* A line "left right" for each merge, the first merge first; above them perhaps a line "#version: .." */
static void load_merges(Tokenizer *t, const char *path, const int byte_of[BYTE_CHARACTERS], const Token *sorted)
{
    Map map = map_file(path);
    char *pair = (char *)xcalloc(map.size, 1); /* the bytes of left and right, one after the other */
    size_t n = 0, capacity = 0, number = 0;
    for (const char *line = map.data, *stop = line + map.size, *next; line < stop; line = next) {
        const char *end = (const char *)memchr(line, '\n', (size_t)(stop - line));
        next = end ? end + 1 : stop;
        end = end ? end : stop;
        if (end > line && end[-1] == '\r') end--;
        if (number++ == 0 && end - line >= 8 && !memcmp(line, "#version", 8)) continue;
        if (end == line) continue;

        const char *blank = (const char *)memchr(line, ' ', (size_t)(end - line));
        size_t left = blank ? bytes_of_name(pair, byte_of, line, (size_t)(blank - line)) : 0;
        size_t right = left ? bytes_of_name(pair + left, byte_of, blank + 1, (size_t)(end - blank - 1)) : 0;
        if (!right) die("%s line %zu: expected two byte-level tokens with one blank between them", path, number);
        int a = token_id(sorted, t->vocabulary, pair, left);
        int b = token_id(sorted, t->vocabulary, pair + left, right);
        int ab = token_id(sorted, t->vocabulary, pair, left + right);
        if (a < 0 || b < 0 || ab < 0)
            die("%s line %zu: %s is not in the vocabulary: do both files belong to one tokenizer?", path, number,
                a < 0 ? "the left token" : b < 0 ? "the right token" : "what the two tokens merge into");
        Merge merge = {(uint32_t)a, (uint32_t)b, (uint32_t)n, (uint32_t)ab};
        t->merge = (Merge *)grow(t->merge, n, &capacity, sizeof(Merge));
        t->merge[n++] = merge;
    }
    if (n) qsort(t->merge, n, sizeof(Merge), compare_merges);
    for (size_t i = 0; i < n; i++) {
        if (i && !compare_merges(&t->merge[i - 1], &t->merge[i]))
            die("%s: merges %u and %u are of the same two tokens", path, t->merge[i - 1].rank, t->merge[i].rank);
        t->row[t->merge[i].left + 1]++;
    }
    for (size_t i = 0; i < t->vocabulary; i++) t->row[i + 1] += t->row[i];
    free(pair);
    unmap_file(map);
}

/* Reads the tokenizer of a folder: vocab.json and merges.txt, or by their older names encoder.json and vocab.bpe. */
static Tokenizer *tokenizer_open(const char *folder)
{
    Tokenizer *t = (Tokenizer *)xcalloc(1, sizeof(Tokenizer));
    int old = !file_exists(folder, "vocab.json") && file_exists(folder, "encoder.json"), byte_of[BYTE_CHARACTERS];
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
        if (t->byte_id[b] < 0) die("%s has no token for the byte 0x%02X: all 256 are expected", path, (unsigned)b);
    }
    t->end_of_text = token_id(sorted, t->vocabulary, END_OF_TEXT, sizeof(END_OF_TEXT) - 1);
    load_merges(t, join_path(path, folder, old ? "vocab.bpe" : "merges.txt"), byte_of, sorted);
    free(sorted);
    return t;
}

/* Where there is no tokenizer: ids 0..255 are bytes, 256 is <|endoftext|>. */
static Tokenizer *tokenizer_bytes(void)
{
    Tokenizer *t = (Tokenizer *)xcalloc(1, sizeof(Tokenizer));
    t->vocabulary = 257, t->end_of_text = 256;
    t->token = (Token *)xcalloc(257, sizeof(Token));
    t->bytes = (char *)xcalloc(256, 1);
    t->row = (size_t *)xcalloc(258, sizeof(size_t));
    for (int b = 0; b < 256; b++) {
        Token token = {t->bytes + b, 1, b};
        t->bytes[b] = (char)b, t->byte_id[b] = b, t->token[b] = token;
    }
    Token special = {END_OF_TEXT, sizeof(END_OF_TEXT) - 1, 256};
    t->token[256] = special;
    return t;
}

static void tokenizer_close(Tokenizer *t)
{
    free(t->token), free(t->bytes), free(t->merge), free(t->row), free(t);
}

/* ---- Documents ------------------------------------------------------------------------------------------------- */

/* A run of tokens in memory. Where a document does not end with <|endoftext|>, one is read behind its last token. */
typedef struct {
    const char *data;      /* uint16_t or int32_t, little-endian as every machine this runs on */
    size_t width;          /* bytes of a token there: 2 or 4 */
    size_t stored, length; /* tokens there; tokens in the document, with the <|endoftext|> that is added */
} Document;

static int document_token(const Document *d, size_t i, int end_of_text)
{
    if (i >= d->stored) return end_of_text;
    return d->width == 2 ? ((const uint16_t *)d->data)[i] : ((const int32_t *)d->data)[i];
}

/* What documents point into: the tokens of a text, or a mapped PREFIX.bin. */
typedef struct {
    int *id;
    Map map;
} Storage;

typedef struct {
    Document *document; /* all that are not empty, in the order of the paths */
    Storage *storage;
    size_t documents, document_capacity, stores, storage_capacity;
    size_t tokens;     /* in all documents */
    size_t vocabulary; /* every token is below it */
    int end_of_text;   /* -1: documents follow each other unmarked */
} Corpus;

static void add_storage(Corpus *c, int *id, Map map)
{
    Storage storage = {id, map};
    c->storage = (Storage *)grow(c->storage, c->stores, &c->storage_capacity, sizeof(Storage));
    c->storage[c->stores++] = storage;
}

/* prefix and suffix in one path. */
static char *extend_path(char path[PATH_MAX], const char *prefix, const char *suffix)
{
    if (snprintf(path, PATH_MAX, "%s%s", prefix, suffix) >= PATH_MAX) die("the path %s is too long", prefix);
    return path;
}

static void add_document(Corpus *c, const char *path, const char *data, size_t width, size_t n)
{
    Document d = {data, width, n, n};
    uint32_t largest = 0;
    if (n == 0) return;
#pragma omp parallel for reduction(max : largest) if (n > 1 << 20)
    for (size_t i = 0; i < n; i++) {
        uint32_t id = (uint32_t)document_token(&d, i, 0); /* a negative one becomes very large */
        largest = id > largest ? id : largest;
    }
    if (largest >= c->vocabulary)
        die("%s has the token %d, but the vocabulary %zu tokens: it needs another tokenizer or model", path,
            (int)largest, c->vocabulary);
    d.length += c->end_of_text >= 0 && document_token(&d, n - 1, 0) != c->end_of_text;
    c->document = (Document *)grow(c->document, c->documents, &c->document_capacity, sizeof(Document));
    c->document[c->documents++] = d;
    c->tokens += d.length;
}

/* A text is encoded here, once. A document ends at <|endoftext|> or at the end of the file. */
static void add_text(Corpus *c, const Tokenizer *t, const char *path)
{
    Tokens text = {NULL, 0, 0};
    Map map = map_file(path), none = {"", 0};
    encode(&text, t, map.data, map.size);
    unmap_file(map);
    add_storage(c, text.id, none);
    for (size_t start = 0, end; start < text.n; start = end + 1) {
        for (end = start; end < text.n && text.id[end] != c->end_of_text;) end++;
        add_document(c, path, (const char *)(text.id + start), sizeof(int), end - start);
    }
}

static uint64_t little_endian(const char *p, size_t bytes)
{
    uint64_t x = 0;
    memcpy(&x, p, bytes);
    return x;
}

/* Megatron's indexed dataset, version 1. PREFIX.bin holds the tokens. PREFIX.idx holds, little-endian and unaligned:
 *
 *     "MMIDIDX\0\0"   u64 version = 1   u8 type of a token   u64 n sequences   u64 m marks
 *     i32 tokens[n]   i64 byte in PREFIX.bin[n]   i64 mark[m]: document i is the sequences mark[i] .. mark[i+1] - 1
 */
enum { INDEX_HEADER = 34, TYPE_INT32 = 4, TYPE_UINT16 = 8 };
static const char INDEX_MAGIC[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};

static void add_indexed(Corpus *c, const char *prefix)
{
    static const char *const types[8] = {"no type", "uint8", "int8", "int16", "int32", "int64", "float32", "float64"};
    char path[PATH_MAX];
    Map bin = map_file(extend_path(path, prefix, ".bin")), index = map_file(extend_path(path, prefix, ".idx"));
    const char *p = index.data;
    add_storage(c, NULL, bin);

    if (index.size < INDEX_HEADER || memcmp(p, INDEX_MAGIC, sizeof(INDEX_MAGIC)) || little_endian(p + 9, 8) != 1)
        die("%s is not a Megatron indexed dataset of version 1, which begins with MMIDIDX", path);
    int type = (unsigned char)p[17];
    size_t n = little_endian(p + 18, 8), m = little_endian(p + 26, 8), width = type == TYPE_UINT16 ? 2 : 4, end = 0;
    if (type != TYPE_UINT16 && type != TYPE_INT32)
        die("%s has tokens of type %d (%s); only int32 (4) and uint16 (8) are read", path, type,
            type < 8 ? types[type] : "unknown");
    if (n > index.size / 12 || m > index.size / 8 || INDEX_HEADER + 12 * n + 8 * m != index.size)
        die("%s has %zu bytes, which is not what %zu sequences and %zu document marks take: it is damaged", path,
            index.size, n, m);

    const char *sizes = p + INDEX_HEADER, *pointers = sizes + 4 * n, *marks = pointers + 8 * n;
    for (size_t i = 0; i < n; i++) {
        size_t size = little_endian(sizes + 4 * i, 4); /* a negative one becomes very large */
        if (little_endian(pointers + 8 * i, 8) != end || size > (bin.size - end) / width)
            die("%s: sequence %zu must begin where the one before ends, and end within the %zu bytes of %s.bin", path,
                i, bin.size, prefix);
        end += size * width;
    }
    if (end != bin.size) die("%s describes %zu bytes of %s.bin, which has %zu", path, end, prefix, bin.size);
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

/* ---- Where documents are found --------------------------------------------------------------------------------- */

/* Why a folder's entry is not read as text; NULL if it is, or is a folder. */
static const char *why_skipped(const char *path, const char *name)
{
    struct stat st, link;
    char head[4096];
    if (name[0] == '.') return "hidden";
    if (lstat(path, &link) || stat(path, &st)) return strerror(errno);
    if (S_ISDIR(st.st_mode)) return S_ISLNK(link.st_mode) ? "a link to a folder" : NULL; /* they may run in circles */
    if (!S_ISREG(st.st_mode)) return "not a regular file";
    FILE *f = fopen(path, "rb");
    if (!f) return strerror(errno);
    size_t n = fread(head, 1, sizeof(head), f);
    fclose(f);
    return memchr(head, 0, n) ? "not text: it has zero bytes" : NULL;
}

static int by_name(const struct dirent **a, const struct dirent **b) { return strcmp((*a)->d_name, (*b)->d_name); }

/* All text files of a folder and of the folders in it, in the order of their names. Paths grow behind `path`. */
static void add_folder(Corpus *c, const Tokenizer *t, char path[PATH_MAX])
{
    struct dirent **entry;
    struct stat st;
    size_t length = strlen(path);
    int n = scandir(path, &entry, NULL, by_name);
    if (n < 0) die("cannot read the folder %s: %s", path, strerror(errno));
    for (int i = 0; i < n; i++) {
        const char *name = entry[i]->d_name, *why;
        if (strcmp(name, ".") && strcmp(name, "..")) {
            if (length + 1 + strlen(name) >= PATH_MAX) die("the path %s/%s is too long", path, name);
            path[length] = '/', strcpy(path + length + 1, name);
            if ((why = why_skipped(path, name))) fprintf(stderr, "skipped %s: %s\n", path, why);
            else if (!stat(path, &st) && S_ISDIR(st.st_mode)) add_folder(c, t, path);
            else add_text(c, t, path);
        }
        free(entry[i]);
    }
    free(entry);
}

/* A text file, a folder of them, or the prefix of PREFIX.bin and PREFIX.idx (or one of these two names). */
static void add_path(Corpus *c, const Tokenizer *t, const char *name)
{
    char path[PATH_MAX], index[PATH_MAX];
    struct stat st;
    size_t n = strlen(extend_path(path, name, ""));
    int found = !stat(path, &st), half = n > 4 && (!strcmp(path + n - 4, ".bin") || !strcmp(path + n - 4, ".idx"));
    if (half) path[n - 4] = 0;
    if (found && S_ISDIR(st.st_mode)) add_folder(c, t, extend_path(path, name, ""));
    else if ((half || !found) && !access(extend_path(index, path, ".idx"), F_OK)) add_indexed(c, path);
    else if (found) add_text(c, t, name);
    else die("there is no %s: expected a text, a folder, or the prefix of an indexed dataset's .bin and .idx", name);
}

/* Reads and checks everything that n paths name. Dies if a token is not in the vocabulary: the model's, or where no
 * model is at hand the tokenizer's own. */
static Corpus *corpus_open(const char *const *paths, size_t n, const Tokenizer *t, size_t vocabulary)
{
    Corpus *c = (Corpus *)xcalloc(1, sizeof(Corpus));
    c->vocabulary = vocabulary, c->end_of_text = t->end_of_text;
    if (t->end_of_text >= 0 && (size_t)t->end_of_text >= vocabulary)
        die("<|endoftext|> is token %d of the tokenizer, but the model has %zu tokens", t->end_of_text, vocabulary);
    for (size_t i = 0; i < n; i++) add_path(c, t, paths[i]);
    if (!c->tokens) die("there is no text in %s%s", n ? paths[0] : "no paths", n > 1 ? " and the other paths" : "");
    return c;
}

static void corpus_close(Corpus *c)
{
    for (size_t i = 0; i < c->stores; i++) free(c->storage[i].id), unmap_file(c->storage[i].map);
    free(c->storage), free(c->document), free(c);
}

/* Appends all tokens of a corpus. */
static void corpus_tokens(Tokens *out, const Corpus *c)
{
    for (size_t i = 0; i < c->documents; i++)
        for (size_t j = 0; j < c->document[i].length; j++)
            push_token(out, document_token(&c->document[i], j, c->end_of_text));
}

/* ---- Writing an indexed dataset -------------------------------------------------------------------------------- */

static void put(FILE *f, uint64_t x, size_t bytes) { fwrite(&x, bytes, 1, f); } /* finish_file() sees errors */

static FILE *create_file(const char *path)
{
    FILE *f = fopen(path, "wb");
    if (!f) die("cannot create %s: %s", path, strerror(errno));
    return f;
}

/* Makes sure that what was written is on the disk. */
static void finish_file(FILE *f, const char *path)
{
    if (fflush(f) || ferror(f) || fsync(fileno(f)) || fclose(f)) {
        int error = errno;
        unlink(path);
        die("cannot write %s: %s", path, strerror(error));
    }
}

/* Writes PREFIX.bin and PREFIX.idx, a sequence for each document, <|endoftext|> included. The index comes last: where
 * it exists, both files are whole, whenever the program was killed. */
static void corpus_write(const Corpus *c, const char *prefix)
{
    char bin_path[PATH_MAX], idx_path[PATH_MAX], bin_new[PATH_MAX], idx_new[PATH_MAX];
    FILE *bin = create_file(extend_path(bin_new, prefix, ".bin.tmp"));
    FILE *idx = create_file(extend_path(idx_new, prefix, ".idx.tmp"));
    size_t width = c->vocabulary < 65500 ? 2 : 4, end = 0; /* Megatron's limit */

    fwrite(INDEX_MAGIC, sizeof(INDEX_MAGIC), 1, idx);
    put(idx, 1, 8), put(idx, width == 2 ? TYPE_UINT16 : TYPE_INT32, 1);
    put(idx, c->documents, 8), put(idx, c->documents + 1, 8);
    for (size_t i = 0; i < c->documents; i++) {
        const Document *d = &c->document[i];
        if (d->length > INT32_MAX) die("a document of %zu tokens is too long to be written: split it", d->length);
        for (size_t j = 0; j < d->length; j++) put(bin, (uint32_t)document_token(d, j, c->end_of_text), width);
        put(idx, d->length, 4);
    }
    for (size_t i = 0; i < c->documents; i++) put(idx, end, 8), end += c->document[i].length * width;
    for (size_t i = 0; i <= c->documents; i++) put(idx, i, 8);

    finish_file(bin, bin_new), finish_file(idx, idx_new);
    unlink(extend_path(idx_path, prefix, ".idx")); /* an older one does not fit the new tokens */
    if (rename(bin_new, extend_path(bin_path, prefix, ".bin")) || rename(idx_new, idx_path))
        die("cannot rename %s to %s: %s", bin_new, bin_path, strerror(errno));
}

/* ---- Samples --------------------------------------------------------------------------------------------------- */

typedef struct {
    Document *document; /* (documents) of the training part, or of the held-out part */
    size_t documents, tokens, T;
    size_t samples; /* in an epoch */
    uint64_t seed;
    int end_of_text;
    pthread_mutex_t lock; /* of the rest: the order of an epoch, which follows from (seed, epoch) alone */
    size_t epoch;         /* SIZE_MAX: none yet */
    size_t *order;        /* (documents) shuffled */
    size_t *start;        /* (documents + 1) where each of them begins in the row of all tokens */
    size_t *sample;       /* (samples) shuffled */
} Dataset;

/* The last valid_percent (0..100) of the tokens are held out. The dataset has those, or the others (held_out 0). */
static Dataset *dataset_open(const Corpus *c, double valid_percent, int held_out, size_t T, uint64_t seed)
{
    Dataset *d = (Dataset *)xcalloc(1, sizeof(Dataset));
    size_t cut = c->tokens - min_size((size_t)((double)c->tokens * valid_percent / 100), c->tokens);
    size_t first = held_out ? cut : 0, last = held_out ? c->tokens : cut, at = 0;

    d->tokens = last - first, d->T = T, d->seed = seed, d->end_of_text = c->end_of_text;
    if (d->tokens < T + 1)
        die("the %s text has %zu tokens, but a sample of %zu needs %zu: give more text, or a smaller --seq",
            held_out ? "held-out" : "training", d->tokens, T, T + 1);
    d->samples = (d->tokens - 1) / T;
    d->document = (Document *)xcalloc(c->documents, sizeof(Document));
    for (size_t i = 0; i < c->documents; at += c->document[i++].length) {
        Document part = c->document[i];
        size_t begin = max_size(first, at), end = min_size(last, at + part.length);
        if (begin >= end) continue;
        part.data += (begin - at) * part.width;
        part.stored -= begin - at; /* may be more than length now: what is behind that is not read */
        part.length = end - begin;
        d->document[d->documents++] = part;
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
    free(d->order), free(d->start), free(d->sample), free(d->document), free(d);
}

/* x = a permutation of 0..n-1 (Fisher and Yates). DEVIATION: Megatron shuffles with NumPy's RandomState [code V]. */
static void shuffle(size_t *x, size_t n, uint64_t seed, uint32_t site, uint32_t epoch)
{
    for (size_t i = 0; i < n; i++) x[i] = i;
    for (size_t i = n; i > 1; i--) {
        uint32_t word[4];
        philox(word, seed, i, site, epoch);
        size_t j = ((uint64_t)word[0] << 32 | word[1]) % i, swap = x[j];
        x[j] = x[i - 1], x[i - 1] = swap;
    }
}

/* Documents in a shuffled order form one row of tokens, which is cut every T tokens; the pieces are shuffled too. */
static void start_epoch(Dataset *d, size_t epoch)
{
    shuffle(d->order, d->documents, d->seed, SITE_SHUFFLE, (uint32_t)epoch);
    shuffle(d->sample, d->samples, d->seed, SITE_SHUFFLE + 1, (uint32_t)epoch);
    for (size_t i = 0; i < d->documents; i++) d->start[i + 1] = d->start[i] + d->document[d->order[i]].length;
    d->epoch = epoch;
}

/* Sample number n of a whole run, in which epochs follow each other without end: to resume, that number is enough.
 * tokens (T + 1): T inputs and one label more, the first input of the next piece [code V data/gpt2_dataset.py]. Ranks
 * may call this at the same time. */
static void dataset_sample(Dataset *d, size_t n, int *tokens)
{
    size_t low = 0, high = d->documents; /* the first document is in [low, high) */
    pthread_mutex_lock(&d->lock);
    if (d->epoch != n / d->samples) start_epoch(d, n / d->samples);

    size_t at = d->sample[n % d->samples] * d->T, stop = at + d->T + 1;
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (d->start[middle] <= at) low = middle;
        else high = middle;
    }
    for (; at < stop; low++)
        for (const Document *doc = &d->document[d->order[low]]; at < stop && at < d->start[low + 1]; at++)
            *tokens++ = document_token(doc, at - d->start[low], d->end_of_text);
    pthread_mutex_unlock(&d->lock);
}

/* ================================================================================================================
 * Chapter 9. Evaluation [§5.2, App. E]
 * ============================================================================================================= */

/* ---- WikiText-103 [§5.2, App. E; code V tasks/zeroshot_gpt2] --------------------------------------------------- */

/* Bytes of the white-space character at text, 0 if none begins there. Python's str.isspace(), which its strip(),
 * split() and \s follow, has four control characters more than White_Space. */
static size_t space_at(const char *text, size_t n)
{
    uint32_t code;
    size_t length = n ? next_character(&code, text, n) : 0;
    return length && (class_of(code) == CLASS_SPACE || (code >= 0x1C && code <= 0x1F)) ? length : 0;
}

/* Bytes of the white-space character that ends the n bytes of text, 0 if none does. */
static size_t space_before(const char *text, size_t n)
{
    for (size_t back = 1; back <= 4 && back <= n; back++)
        if (space_at(text + n - back, back) == back) return back;
    return 0;
}

/* The text without white space at both ends, as str.strip(): its begin, and its length in *n. */
static const char *strip(const char *text, size_t *n)
{
    size_t length;
    while ((length = space_before(text, *n))) *n -= length;
    while ((length = space_at(text, *n))) text += length, *n -= length;
    return text;
}

/* T_o, what the paper's perplexity is normalised by: len(text.strip().split(" ")) [P51]. */
static size_t wikitext_original_tokens(const char *text, size_t n)
{
    size_t count = 1;
    text = strip(text, &n);
    for (size_t i = 0; i < n; i++) count += text[i] == ' ';
    return count;
}

/* Both of these work in place, from left to right, and return the new length, which is not larger. */
static size_t replace_all(char *text, size_t n, const char *from, const char *to)
{
    size_t from_length = strlen(from), to_length = strlen(to), out = 0;
    for (size_t i = 0; i < n;)
        if (text[i] == from[0] && n - i >= from_length && !memcmp(text + i, from, from_length)) {
            memcpy(text + out, to, to_length);
            out += to_length, i += from_length;
        } else text[out++] = text[i++];
    return out;
}

/* "( a )" -> "(a)": from each opening sign to the next closing one, re.sub(r"\(\s*([^\)]*?)\s*\)", r"(\1)", text). */
static size_t strip_inside(char *text, size_t n, char opening, char closing)
{
    size_t out = 0, i = 0;
    const char *begin, *end;
    while ((begin = (const char *)memchr(text + i, opening, n - i)) &&
           (end = (const char *)memchr(begin + 1, closing, n - (size_t)(begin + 1 - text)))) {
        size_t before = (size_t)(begin + 1 - text) - i, length = (size_t)(end - begin - 1);
        const char *inside = strip(begin + 1, &length);
        memmove(text + out, text + i, before), out += before;
        memmove(text + out, inside, length), out += length;
        text[out++] = closing;
        i = (size_t)(end + 1 - text);
    }
    memmove(text + out, text + i, n - i);
    return out + n - i;
}

/* WikiText's tokens back into text, in place; returns the new length. The order matters: rules see what earlier ones
 * left. (Megatron's second rule, /' [0-9]/, has slashes that never match: it is left out.) */
static size_t wikitext_detokenise(char *text, size_t n)
{
    static const char *const rules[][2] = {
        {"s '", "s'"},
        {" @-@ ", "-"}, {" @,@ ", ","}, {" @.@ ", "."},
        {" : ", ": "}, {" ; ", "; "}, {" . ", ". "}, {" ! ", "! "}, {" ? ", "? "}, {" , ", ", "},
        {"(", ")"}, {"[", "]"}, {"{", "}"}, {"\"", "\""}, {"'", "'"}, /* strip inside these */
        {"= = = =", "===="}, {"= = =", "==="}, {"= =", "=="},
        {" \xC2\xB0 ", "\xC2\xB0"}, /* degrees */
        {" \n", "\n"}, {"\n ", "\n"}, {" N ", " 1 "}, {" 's", "'s"},
    };
    for (size_t i = 0; i < sizeof(rules) / sizeof(rules[0]); i++)
        if (!rules[i][0][1]) n = strip_inside(text, n, rules[i][0][0], rules[i][1][0]);
        else n = replace_all(text, n, rules[i][0], rules[i][1]);
    return n;
}

/* Window i of T tokens begins at token overlap * i. Window 0 scores all its targets; a later one only the last
 * `overlap`, each of which has at least T - overlap tokens before it. The count is Megatron's: it takes the first
 * window to score `overlap` targets, not T, so that the last windows have none to score [P52]. 0 < overlap <= T. */
static size_t window_count(size_t targets, size_t overlap)
{
    return targets ? (targets - 1) / overlap + 1 : 1;
}

/* tokens (T + 1), weight (T) of window i over a text of n tokens: target t is tokens[t + 1], and counts weight[t].
 * Behind the text stands pad. */
static void window_fill(int *tokens, real *weight, const int *text, size_t n, size_t i, size_t T, size_t overlap,
                        int pad)
{
    size_t start = i * overlap, left = start < n ? n - start : 0;
    for (size_t t = 0; t <= T; t++) tokens[t] = t < left ? text[start + t] : pad;
    for (size_t t = 0; t < T; t++) weight[t] = t + 1 < left && (i == 0 || t >= T - overlap) ? 1 : 0;
}

/* ---- LAMBADA [§5.2; code V, --strict-lambada] ------------------------------------------------------------------ */

/* The last word is to be predicted from the text before it: right if all of its tokens are the most probable ones. */
typedef struct {
    size_t first, context, label; /* tokens[first ..]: the context's, then the last word's */
} LambadaExample;

typedef struct {
    Tokens tokens;
    LambadaExample *example; /* (n) */
    size_t n, capacity;
} Lambada;

static void lambada_add(Lambada *l, const Tokenizer *t, const char *text, size_t n, const char *what)
{
    LambadaExample e = {l->tokens.n, 0, 0};
    text = strip(text, &n);
    size_t word = n, context;
    while (word > 0 && !space_before(text, word)) word--;
    context = word;
    strip(text, &context);
    if (!context) die("%s: the text needs two words at least: the last is predicted from those before it", what);
    char *label = (char *)xcalloc(n - word + 1, 1); /* " word" */
    label[0] = ' ';
    memcpy(label + 1, text + word, n - word);
    encode(&l->tokens, t, text, context);
    e.context = l->tokens.n - e.first;
    encode(&l->tokens, t, label, n - word + 1);
    e.label = l->tokens.n - e.first - e.context;
    free(label);
    l->example = (LambadaExample *)grow(l->example, l->n, &l->capacity, sizeof(LambadaExample));
    l->example[l->n++] = e;
}

/* Reads {"text": ".."} lines. */
static Lambada lambada_open(const char *path, const Tokenizer *t)
{
    Lambada l = {{NULL, 0, 0}, NULL, 0, 0};
    Map map = map_file(path);
    char what[PATH_MAX + 32];
    size_t number = 0, length;
    for (const char *line = map.data, *stop = line + map.size, *next; line < stop; line = next) {
        const char *end = (const char *)memchr(line, '\n', (size_t)(stop - line));
        next = end ? end + 1 : stop;
        length = (size_t)(next - line);
        number++;
        strip(line, &length);
        if (!length) continue;
        snprintf(what, sizeof(what), "%s line %zu", path, number);
        Json json = json_parse(line, (size_t)(next - line), what);
        const JsonValue *text = json_get(&json, json.value, "text");
        if (!text || text->type != JSON_STRING) die("%s: expected {\"text\": \"..\"}", what);
        lambada_add(&l, t, text->string, text->length, what);
        json_free(&json);
    }
    unmap_file(map);
    if (!l.n) die("%s has no examples: expected lines of {\"text\": \"..\"}", path);
    return l;
}

static void lambada_close(Lambada *l)
{
    free(l->tokens.id), free(l->example);
}

/* tokens (T + 1), weight (T) of example i, as window_fill(). Of one that is longer than T + 1 the end counts. */
static void lambada_fill(int *tokens, real *weight, const Lambada *l, size_t i, size_t T, int pad)
{
    LambadaExample e = l->example[i];
    size_t n = e.context + e.label, cut = n > T + 1 ? n - (T + 1) : 0;
    for (size_t t = 0; t <= T; t++) tokens[t] = cut + t < n ? l->tokens.id[e.first + cut + t] : pad;
    for (size_t t = 0; t < T; t++) weight[t] = cut + t + 1 >= e.context && cut + t + 1 < n ? 1 : 0;
}
