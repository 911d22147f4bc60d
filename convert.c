/* convert.c - GPT-2 checkpoints: Megatron-LM's to Hugging Face's and back, without Python and
 * without trust.
 *
 *     gcc -O3 -march=native -fopenmp convert.c -o convert -lz -lm -lpthread
 *     convert megatron_lm_345m_v0.0.zip gpt2-345m            makes a Hugging Face folder
 *     convert gpt2-345m ranks --tp 2 --pp 4                  makes a Megatron checkpoint for 8 GPUs
 *     convert inspect megatron_lm_345m_v0.0.zip [--pickle]   shows what is in it
 *
 * A checkpoint is read in five layers, one chapter each. The first three are enough to read any .pt
 * file:
 *
 *     1 zip       an archive of files, with its table of contents at the end
 *     2 pickle    a program for a stack machine that builds Python objects
 *     3 storages  what torch puts beside the pickle: plain numbers, and views of them with strides
 *     4 ranks     a folder and a file for each rank of a training run
 *     5 eras      what Megatron called its tensors, and when
 *
 * Chapter 6 finds the shape of the model, chapter 7 the place of every tensor in it. Chapter 8 is
 * the arithmetic of all conversions: where element (row, column) lies in each arrangement. Chapters
 * 9 and 10 write, 11 inspects, 12 is the command line.
 *
 * The input is mapped, not loaded; the output is written tensor by tensor. No file is trusted: its
 * contents are checked before they are used, and every size is compared with the bytes that are
 * really there. This file includes megatron_gpt2.c, and uses its one table of tensors (chapter
 * 4). */

#define PROGRAM "convert"
#define main megatron_gpt2_main
#include "megatron_gpt2.c"
#undef main
#include <ftw.h>
#include <signal.h>
#include <sys/wait.h>
#include <zlib.h>

/* A file that includes this one, as dev/fuzz/fuzz.c does, has its own main(). */
#ifndef CONVERT_MAIN
#define CONVERT_MAIN main
#endif

/* A copy of a string; the caller frees it. */
static char *keep_string(const char *s, size_t length)
{
    char *copy = (char *)xcalloc(length + 1, 1);
    memcpy(copy, s, length);
    return copy;
}

/* Is the word in a list that ends with NULL? */
static int is_one_of(const char *word, const char *const *words)
{
    while (*words && strcmp(word, *words)) words++;
    return *words != NULL;
}

/* A string of a pickle, for printf's %.*s: it does not end with NUL. die() keeps it on one line. */
#define SHOW(node) (int)min_size((node)->length, 120), (node)->is.string

/* How an input is read, and how much memory and work it may still take. */
typedef struct {
    const char *scratch; /* folder for what must be inflated */
    FILE *listing;       /* where pickles are listed as they run, or NULL */
    /* What is left of two limits: bytes of memory for the objects that the files describe, and
     * bytes to inflate. Weights compress by about a tenth: what inflates twentyfold is no model. */
    size_t objects_left;
    long long inflation_left;
} Reading;

enum { MAX_OBJECT_BYTES = 1 << 27, MAX_INFLATION = 20, MIN_INFLATED = 1 << 26 };

/* Counts n objects of some size; dies if an input describes too many. */
static void charge(Reading *r, const char *path, size_t n, size_t size)
{
    if (n > r->objects_left / size)
        die("%s describes more objects than any checkpoint has: it is damaged or hostile", path);
    r->objects_left -= n * size;
}

/* =================================================================================================
 * Chapter 1. Zip
 *
 * An archive is read from its end:
 *
 *     | local header, data | local header, data | .. | directory     | zip64 end | locator | end |
 *             ^------------------^--------------------- entry, entry ..    ^---------'        |
 *                                                        ^------------------------------------'
 *
 * The end record says where the directory begins and how many entries it has. An entry holds a
 * member's name, method (0 stored, 8 deflated), checksum, sizes, and the place of its local header.
 * The numbers have 32 bits. A number that does not fit is all ones; its 64-bit value is in the
 * zip64 end record or, for an entry, in extra field number 1.
 *
 * A local header repeats the entry. But if the writer did not know sizes and checksum yet, as with
 * torch, they are 0 there: only the directory counts. Only the local header tells where the data
 * begins, because its extra field has its own length. torch fills that field so that the data
 * starts at a multiple of 64 bytes and can be used in place.
 *
 * An entry of the directory, in two rows, and a local header; the numbers are bytes from its start:
 *
 *      0      4    6    8     10     12   14   16  20     24
 *     |PK\1\2|made|need|flags|method|time|date|crc|packed|size|
 *      28          30           32             34   36   38         42           46
 *     |name length|extra length|comment length|disk|kind|attributes|local header|name, extra, ..
 *
 *      0      4    6     8      10   12   14  18     22   26          28           30
 *     |PK\3\4|need|flags|method|time|date|crc|packed|size|name length|extra length|name, extra, ..
 * ============================================================================================== */

typedef struct {
    char *name;
    int method;
    uint32_t crc;                   /* 0: unknown; torch can be told not to compute it */
    size_t packed, size;            /* bytes in the archive, and after inflating */
    const char *start, *data, *end; /* local header, data, and the byte behind it, in the map */
    int wanted;                     /* a tensor needs it */
    Map opened;                     /* its bytes, once they were read */
} Member;

typedef struct {
    const char *path;
    Map map;
    Reading *reading;
    Member *member; /* sorted by name */
    size_t members;
} Zip;

static int is_zip(Map map) { return map.size >= 4 && !memcmp(map.data, "PK\3\4", 4); }

__attribute__((noreturn)) static void bad_zip(const Zip *z, const char *member, const char *what)
{
    die("%s is a damaged or unsafe zip archive: %.120s%s%s; fetch it again", z->path, member,
        *member ? " " : "", what);
}

typedef struct {
    uint64_t count, size, offset; /* entries, bytes, first byte */
} Directory;

/* Where the central directory lies; it ends before the records that point to it. */
static Directory find_directory(const Zip *z)
{
    const char *data = z->map.data, *end = NULL;
    /* a comment may follow the end record */
    for (size_t back = 22; back <= min_size(z->map.size, 22 + 65535) && !end; back++) {
        const char *at = data + z->map.size - back;
        if (!memcmp(at, "PK\5\6", 4) && 22 + little_endian(at + 20, 2) == back) end = at;
    }
    if (!end) bad_zip(z, "", "its end record is missing, so it is cut short or no zip archive");
    Directory d = {little_endian(end + 10, 2), little_endian(end + 12, 4),
                   little_endian(end + 16, 4)};
    size_t limit = (size_t)(end - data);
    if (little_endian(end + 4, 4) || little_endian(end + 8, 2) != d.count)
        bad_zip(z, "", "is one of several volumes");
    if (limit >= 20 && !memcmp(end - 20, "PK\6\7", 4)) {
        uint64_t at = little_endian(end - 12, 8);
        if (at > limit - 20 || limit - 20 - at < 56 || memcmp(data + at, "PK\6\6", 4))
            bad_zip(z, "", "its zip64 end record is missing");
        Directory wide = {little_endian(data + at + 32, 8), little_endian(data + at + 40, 8),
                          little_endian(data + at + 48, 8)};
        if ((d.count != 0xFFFF && d.count != wide.count) ||
            (d.size != 0xFFFFFFFF && d.size != wide.size) ||
            (d.offset != 0xFFFFFFFF && d.offset != wide.offset))
            bad_zip(z, "", "its two end records disagree");
        d = wide;
        limit = at;
    }
    if (d.offset > limit || d.size > limit - d.offset)
        bad_zip(z, "", "its directory would lie outside the file");
    if (d.count > d.size / 46)
        bad_zip(z, "", "its directory is too small for the entries that it announces");
    return d;
}

/* Of n fields, replaces each that is all ones by its 64-bit value in the extra field. */
static void read_wide_fields(uint64_t *field, int n, const char *extra, size_t left)
{
    for (size_t length; left >= 4; extra += 4 + length, left -= 4 + length) {
        length = little_endian(extra + 2, 2);
        if (length > left - 4) return;
        if (little_endian(extra, 2) != 1) continue;
        for (size_t i = 0, at = 0; i < (size_t)n && at + 8 <= length; i++)
            if (field[i] == 0xFFFFFFFF) {
                field[i] = little_endian(extra + 4 + at, 8);
                at += 8;
            }
        return;
    }
}

/* No file is ever created under a member's name. But an archive with such a name is hostile. */
static int is_unsafe_name(const char *name)
{
    if (!*name || *name == '/' || strchr(name, '\\')) return 1;
    for (const char *c = name; *c; c++)
        if ((unsigned char)*c < ' ') return 1;
    for (const char *part = name; part; part = strchr(part, '/')) {
        part += *part == '/';
        if (!strncmp(part, "..", 2) && (!part[2] || part[2] == '/')) return 1;
    }
    return 0;
}

/* Reads the directory's entry at `at` and the local header it points to; returns the next entry. */
static const char *read_member(Member *m, const Zip *z, const char *at, const char *end,
                               size_t directory)
{
    enum { ENCRYPTED = 1, UNIX = 3 };
    if (end - at < 46 || memcmp(at, "PK\1\2", 4))
        bad_zip(z, "", "an entry of its directory is missing");
    size_t name = little_endian(at + 28, 2), extra = little_endian(at + 30, 2);
    size_t comment = little_endian(at + 32, 2);
    if ((size_t)(end - at) < 46 + name + extra + comment)
        bad_zip(z, "", "an entry of its directory is cut short");
    uint64_t field[3] = {little_endian(at + 24, 4), little_endian(at + 20, 4),
                         little_endian(at + 42, 4)};
    read_wide_fields(field, 3, at + 46 + name, extra);
    m->name = keep_string(at + 46, name);
    m->method = (int)little_endian(at + 10, 2);
    m->crc = (uint32_t)little_endian(at + 16, 4);
    m->size = field[0];
    m->packed = field[1];
    if (strlen(m->name) != name || is_unsafe_name(m->name))
        bad_zip(z, m->name, "is the name of a member, which could lead out of a folder");
    if (little_endian(at + 4, 2) >> 8 == UNIX && S_ISLNK(little_endian(at + 40, 2)))
        bad_zip(z, m->name, "is a symbolic link");

    if (field[2] > directory || directory - field[2] < 30)
        bad_zip(z, m->name, "would lie outside the file");
    const char *local = z->map.data + field[2];
    size_t header = 30 + little_endian(local + 26, 2) + little_endian(local + 28, 2);
    if (memcmp(local, "PK\3\4", 4) || little_endian(local + 26, 2) != name ||
        directory - field[2] < header || memcmp(local + 30, m->name, name) ||
        little_endian(local + 8, 2) != (uint64_t)m->method)
        bad_zip(z, m->name, "is not what its entry in the directory points to");
    if (m->packed > directory - field[2] - header) bad_zip(z, m->name, "is longer than the file");
    if ((little_endian(at + 8, 2) | little_endian(local + 6, 2)) & ENCRYPTED)
        bad_zip(z, m->name, "is encrypted");
    if (m->method == 0 && m->packed != m->size) bad_zip(z, m->name, "has two sizes");
    m->start = local;
    m->data = local + header;
    m->end = m->data + m->packed;
    return at + 46 + name + extra + comment;
}

static int compare_starts(const void *a, const void *b)
{
    const Member *x = (const Member *)a, *y = (const Member *)b;
    return (x->start > y->start) - (x->start < y->start);
}

static int compare_members(const void *a, const void *b)
{
    return strcmp(((const Member *)a)->name, ((const Member *)b)->name);
}

static Zip zip_open(const char *path, Map map, Reading *reading)
{
    Zip z = {path, map, reading, NULL, 0};
    Directory d = find_directory(&z);
    charge(reading, path, d.count, sizeof *z.member);
    charge(reading, path, d.size, 1); /* for the names */
    const char *at = map.data + d.offset, *end = at + d.size;
    z.member = (Member *)xcalloc(d.count, sizeof *z.member);
    for (; z.members < d.count; z.members++)
        at = read_member(&z.member[z.members], &z, at, end, d.offset);
    if (at != end) bad_zip(&z, "", "its directory has more entries than it announces");
    qsort(z.member, z.members, sizeof *z.member, compare_starts);
    for (size_t i = 1; i < z.members; i++)
        if (z.member[i].start < z.member[i - 1].end)
            bad_zip(&z, z.member[i].name, "overlaps another member");
    qsort(z.member, z.members, sizeof *z.member, compare_members);
    for (size_t i = 1; i < z.members; i++)
        if (!compare_members(&z.member[i - 1], &z.member[i]))
            bad_zip(&z, z.member[i].name, "is there twice");
    return z;
}

/* The member of this name, or NULL. */
static Member *zip_find(const Zip *z, const char *name)
{
    Member key;
    key.name = (char *)name;
    return (Member *)bsearch(&key, z->member, z->members, sizeof key, compare_members);
}

/* Memory of n bytes in a nameless file, so that it can be paged out: 700 MB for a 345M model. */
static Map scratch_memory(const char *folder, size_t n)
{
    char path[PATH_MAX];
    Map map = {"", 0};
    int fd = mkstemp(join_path(path, folder, "convert.XXXXXX"));
    if (fd < 0) die("cannot create a file in %s: %s", folder, strerror(errno));
    unlink(path);
    int error = reserve(fd, n);
    if (error) die("cannot inflate %zu bytes into a file in %s: %s", n, folder, strerror(error));
    if (n) {
        map.size = n;
        map.data = (const char *)mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    }
    if (map.data == (const char *)MAP_FAILED)
        die("cannot map a file in %s: %s", folder, strerror(errno));
    close(fd);
    return map;
}

/* Deflate expands one byte to at most 1032, so a larger size is false, and is refused before any
 * work. A true size may still be more than is left for this input. */
static Map inflate_member(const Zip *z, const Member *m)
{
    enum { STEP = 1 << 30 }; /* zlib counts in 32 bits */
    int status = Z_OK;
    z_stream s;
    if (m->size / 1032 > m->packed) bad_zip(z, m->name, "claims to inflate to more than it can");
    if (__atomic_sub_fetch(&z->reading->inflation_left, (long long)m->size, __ATOMIC_RELAXED) < 0)
        bad_zip(z, m->name, "would inflate to far more bytes than a model has");
    Map map = scratch_memory(z->reading->scratch, m->size);
    memset(&s, 0, sizeof s);
    if (inflateInit2(&s, -MAX_WBITS) != Z_OK) die("out of memory");
    s.next_in = (Bytef *)m->data;
    s.next_out = (Bytef *)map.data; /* an address even for no bytes: zlib wants one */
    while (status == Z_OK) {
        s.avail_in = (uInt)min_size(STEP, m->packed - s.total_in);
        s.avail_out = (uInt)min_size(STEP, m->size - s.total_out);
        status = inflate(&s, Z_NO_FLUSH);
    }
    int complete = s.total_in == m->packed && s.total_out == m->size;
    inflateEnd(&s);
    if (status != Z_STREAM_END || !complete)
        bad_zip(z, m->name, "does not inflate to as many bytes as its entry says");
    return map;
}

/* CRC-32 of n bytes. All cores compute parts of it, which zlib combines. */
static uint32_t crc_of(const char *data, size_t n)
{
    enum { PARTS = 64 };
    size_t step = n / PARTS + 1;
    uLong part[PARTS], crc = 0;
#pragma omp parallel for schedule(dynamic) if (step > 1 << 14)
    for (size_t i = 0; i < PARTS; i++) {
        size_t at = min_size(i * step, n);
        part[i] = crc32_z(0, (const Bytef *)data + at, min_size(step, n - at));
    }
    for (size_t i = 0; i < PARTS; i++)
        crc = crc32_combine(crc, part[i], (z_off_t)min_size(step, n - min_size(i * step, n)));
    return (uint32_t)crc;
}

/* The bytes of a member, checked against their checksum. */
static Map zip_read(const Zip *z, Member *m)
{
    if (m->opened.data) return m->opened;
    if (m->method != 0 && m->method != 8)
        bad_zip(z, m->name, "is compressed by a method other than deflate");
    Map stored = {m->data, m->size};
    m->opened = m->method ? inflate_member(z, m) : stored;
    if (m->crc && m->crc != crc_of(m->opened.data, m->size))
        bad_zip(z, m->name, "has a wrong checksum");
    return m->opened;
}

static void zip_close(Zip *z)
{
    for (size_t i = 0; i < z->members; i++) {
        if (z->member[i].method && z->member[i].opened.data) unmap_file(z->member[i].opened);
        free(z->member[i].name);
    }
    free(z->member);
    z->member = NULL;
    z->members = 0;
}

/* =================================================================================================
 * Chapter 2. Pickle
 *
 * A pickle is a program, not data. It runs on a machine with a stack and a numbered memo; an
 * instruction is one byte, and its argument. The program builds an object from the inside out and
 * leaves it on the stack:
 *
 *                                                                     the stack, top on the right
 *     }                      EMPTY_DICT   push an empty dictionary      {}
 *     X 04 00 00 00 'bias'   BINUNICODE   push "bias"                   {}  "bias"
 *     K 07                   BININT1      push 7                        {}  "bias"  7
 *     s                      SETITEM      put both in the dictionary    {"bias": 7}
 *
 * Two instructions make it dangerous. GLOBAL pushes anything that Python can import, by name;
 * REDUCE calls it. With "os\nsystem" and a string, an attacker makes the reader run any command.
 * But the format needs both: a tensor is stored as GLOBAL torch._utils._rebuild_tensor_v2, its
 * arguments, REDUCE.
 *
 * This machine imports nothing and calls nothing. It knows a few names, and what a call of them
 * would return. Any other name, and every object built with it, becomes an opaque node, and changes
 * of an opaque node have no effect: checkpoints hold random states, enumerations and loss scalers,
 * which a model does not need. An opaque node is an error only where a weight or a number is
 * expected. `convert inspect FILE --pickle` lists the program and says what each instruction does.
 *
 * torch writes 32 different instructions, so no other is accepted. An attacker can still lie about
 * sizes, or ask for much memory and time. So every length is compared with the bytes that are
 * there, the number of objects is limited, and every walk is bounded in depth and in steps: a
 * dictionary can hold itself, or hold the next one twice, and so on for 30 levels.
 * ============================================================================================== */

enum { MAX_NODES = 1 << 20, MAX_DEPTH = 40, MAX_NAME = 1024 };

/* The number of a node. Node 0 is the mark. Node 0 also means 'not found': no caller expects its
 * type, so a caller that asks for item 3 of a tuple of 2 needs no separate test. */
typedef uint32_t Ref;

/* clang-format off */
typedef enum {
    N_MARK, N_NONE, N_FLAG, N_INTEGER, N_REAL, N_STRING, N_TUPLE, N_LIST, N_DICT, N_GLOBAL,
    N_STORAGE, N_TENSOR, N_NAMESPACE, N_OPAQUE
} NodeType;
static const char *const node_name[] = {
    "mark", "None", "bool", "integer", "float", "string", "tuple", "list", "dict", "name",
    "storage", "tensor", "namespace", "opaque"};
/* clang-format on */

typedef struct {
    NodeType type;
    uint32_t length;      /* of a string in bytes; of a container in items (keys are items) */
    uint32_t first, last; /* cells of a container; first of a tensor: its arguments */
    union {
        long long integer; /* also a flag; of a storage its number */
        double real;
        const char *string; /* in the pickle, not NUL-terminated; of a name "module\nname" */
    } is;
} Node;

typedef struct {
    Ref value;
    uint32_t next; /* number of a cell; 0: none */
} Cell;

/* What a persistent id means: an array of numbers outside the pickle. */
typedef struct {
    const char *key; /* not NUL-terminated */
    size_t key_length;
    Dtype dtype;
    size_t n;            /* elements */
    size_t view, view_n; /* its slice that is used: first element, and number */
    const char *data;    /* NULL: not found yet */
} TorchStorage;

typedef struct {
    const char *path;
    Map map;
    size_t start, at; /* of the program, and of the next instruction */
    Node *node;
    Cell *cell;
    Ref *stack;
    Ref *memo; /* by number; 0: nothing is there */
    TorchStorage *storage;
    size_t nodes, cells, depth, storages;
    size_t node_room, cell_room, stack_room, memo_room, storage_room;
    Reading *reading;
} Pickle;

__attribute__((noreturn, format(printf, 2, 3))) static void bad_pickle(const Pickle *p,
                                                                       const char *format, ...)
{
    char what[256];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    die("%s: its pickle is malformed at byte %zu: %s", p->path, p->at, what);
}

/* ---- Instructions ---------------------------------------------------------------------------- */

/* clang-format off */
typedef enum {
    NO_ARGUMENT, UNSIGNED_1, UNSIGNED_2, UNSIGNED_4, SIGNED_4, LONG, BIG_ENDIAN_REAL, BYTES_4, LINES
} Argument;

enum {
    PROTO = 0x80, STOP = '.', MARK = '(', NONE = 'N', NEWTRUE = 0x88, NEWFALSE = 0x89, BININT = 'J',
    BININT1 = 'K', BININT2 = 'M', LONG1 = 0x8A, BINFLOAT = 'G', BINUNICODE = 'X', EMPTY_DICT = '}',
    EMPTY_LIST = ']', EMPTY_TUPLE = ')', TUPLE = 't', TUPLE1 = 0x85, TUPLE2 = 0x86, TUPLE3 = 0x87,
    APPEND = 'a', APPENDS = 'e', SETITEM = 's', SETITEMS = 'u', BINPUT = 'q', LONG_BINPUT = 'r',
    BINGET = 'h', LONG_BINGET = 'j', GLOBAL = 'c', REDUCE = 'R', NEWOBJ = 0x81, BUILD = 'b',
    BINPERSID = 'Q'
};

typedef struct {
    int code;
    const char *name;
    Argument argument;
    const char *effect;
} Opcode;

static const Opcode opcodes[] = {
#define OP(code, argument, effect) {code, #code, argument, effect}
    OP(PROTO, UNSIGNED_1, "the program is written in this protocol"),
    OP(STOP, NO_ARGUMENT, "the program ends; its result is on the stack"),
    OP(MARK, NO_ARGUMENT, "push a mark: the items above it will belong together"),
    OP(NONE, NO_ARGUMENT, "push None"),
    OP(NEWTRUE, NO_ARGUMENT, "push True"),
    OP(NEWFALSE, NO_ARGUMENT, "push False"),
    OP(BININT, SIGNED_4, "push an integer"),
    OP(BININT1, UNSIGNED_1, "push an integer"),
    OP(BININT2, UNSIGNED_2, "push an integer"),
    OP(LONG1, LONG, "push an integer of up to 255 bytes"),
    OP(BINFLOAT, BIG_ENDIAN_REAL, "push a float"),
    OP(BINUNICODE, BYTES_4, "push a string"),
    OP(EMPTY_DICT, NO_ARGUMENT, "push an empty dict"),
    OP(EMPTY_LIST, NO_ARGUMENT, "push an empty list"),
    OP(EMPTY_TUPLE, NO_ARGUMENT, "push an empty tuple"),
    OP(TUPLE, NO_ARGUMENT, "pop the items above the mark, push a tuple of them"),
    OP(TUPLE1, NO_ARGUMENT, "pop an item, push a tuple of it"),
    OP(TUPLE2, NO_ARGUMENT, "pop two items, push a tuple of them"),
    OP(TUPLE3, NO_ARGUMENT, "pop three items, push a tuple of them"),
    OP(APPEND, NO_ARGUMENT, "pop an item, append it to the list below"),
    OP(APPENDS, NO_ARGUMENT, "pop the items above the mark, append them to the list below"),
    OP(SETITEM, NO_ARGUMENT, "pop key and value, put them into the dict below"),
    OP(SETITEMS, NO_ARGUMENT, "pop keys and values above the mark, put them into the dict below"),
    OP(BINPUT, UNSIGNED_1, "remember the top of the stack under this number"),
    OP(LONG_BINPUT, UNSIGNED_4, "remember the top of the stack under this number"),
    OP(BINGET, UNSIGNED_1, "push what is remembered under this number"),
    OP(LONG_BINGET, UNSIGNED_4, "push what is remembered under this number"),
    OP(GLOBAL, LINES, "push what Python imports by this name; here, the name"),
    OP(REDUCE, NO_ARGUMENT, "pop arguments and a callable, push what the call returns"),
    OP(NEWOBJ, NO_ARGUMENT, "pop arguments and a class, push a new object of it"),
    OP(BUILD, NO_ARGUMENT, "pop a state, give it to the object below"),
    OP(BINPERSID, NO_ARGUMENT, "pop an id, push what the file has under it outside of the pickle"),
    /* Instructions of other protocols, or never written by torch: a refusal says their names. */
#define REFUSED(code, name) {code, name, NO_ARGUMENT, NULL}
    REFUSED('0', "POP"), REFUSED('1', "POP_MARK"), REFUSED('2', "DUP"), REFUSED('F', "FLOAT"),
    REFUSED('I', "INT"), REFUSED('L', "LONG"), REFUSED('P', "PERSID"), REFUSED('S', "STRING"),
    REFUSED('T', "BINSTRING"), REFUSED('U', "SHORT_BINSTRING"), REFUSED('V', "UNICODE"),
    REFUSED('d', "DICT"), REFUSED('g', "GET"), REFUSED('i', "INST"), REFUSED('l', "LIST"),
    REFUSED('o', "OBJ"), REFUSED('p', "PUT"), REFUSED(0x82, "EXT1"), REFUSED(0x83, "EXT2"),
    REFUSED(0x84, "EXT4"), REFUSED(0x8B, "LONG4"), REFUSED('B', "BINBYTES"),
    REFUSED('C', "SHORT_BINBYTES"), REFUSED(0x8C, "SHORT_BINUNICODE"), REFUSED(0x8D, "BINUNICODE8"),
    REFUSED(0x8E, "BINBYTES8"), REFUSED(0x8F, "EMPTY_SET"), REFUSED(0x90, "ADDITEMS"),
    REFUSED(0x91, "FROZENSET"), REFUSED(0x92, "NEWOBJ_EX"), REFUSED(0x93, "STACK_GLOBAL"),
    REFUSED(0x94, "MEMOIZE"), REFUSED(0x95, "FRAME"), REFUSED(0x96, "BYTEARRAY8"),
    REFUSED(0x97, "NEXT_BUFFER"), REFUSED(0x98, "READONLY_BUFFER"),
#undef REFUSED
#undef OP
};
enum { N_OPCODES = sizeof opcodes / sizeof *opcodes };
/* clang-format on */

typedef struct {
    const Opcode *op;
    long long integer;
    double real;
    const char *bytes; /* of a string, a name or a long integer */
    size_t length;
} Instruction;

static const Opcode *find_opcode(const Pickle *p, int code)
{
    const Opcode *op = opcodes;
    while (op < opcodes + N_OPCODES && op->code != code) op++;
    int known = op < opcodes + N_OPCODES;
    if (known && op->effect) return op;
    bad_pickle(p, "instruction 0x%02x (%s) is none that torch.save writes in protocol 2",
               (unsigned)code, known ? op->name : "unknown");
}

/* Returns the next n bytes, and steps over them. */
static const char *take(Pickle *p, size_t n)
{
    if (n > p->map.size - p->at)
        bad_pickle(p, "%zu more bytes are announced, %zu are left", n, p->map.size - p->at);
    p->at += n;
    return p->map.data + p->at - n;
}

/* Steps over a line of visible characters; returns its length. */
static size_t take_line(Pickle *p)
{
    const char *start = p->map.data + p->at;
    const char *end = (const char *)memchr(start, '\n', p->map.size - p->at);
    size_t n = end ? (size_t)(end - start) : 0;
    for (size_t i = 0; i < n; i++)
        if (start[i] <= ' ' || start[i] > '~') n = 0;
    if (!n || n > 255) bad_pickle(p, "a name was expected");
    p->at += n + 1;
    return n;
}

static Instruction next_instruction(Pickle *p)
{
    static const size_t widths[] = {0, 1, 2, 4, 4, 1, 8, 4, 0};
    Instruction in = {find_opcode(p, (unsigned char)*take(p, 1)), 0, 0, NULL, 0};
    size_t width = widths[in.op->argument];
    in.integer = (long long)little_endian(take(p, width), width);
    switch (in.op->argument) {
    case SIGNED_4: in.integer = (int32_t)(uint32_t)in.integer; break;
    case BIG_ENDIAN_REAL: {
        uint64_t bits = __builtin_bswap64((uint64_t)in.integer);
        memcpy(&in.real, &bits, 8);
        break;
    }
    case LONG:
    case BYTES_4:
        in.length = (size_t)in.integer;
        in.bytes = take(p, in.length);
        break;
    case LINES:
        in.bytes = p->map.data + p->at;
        in.length = take_line(p);
        in.length += 1 + take_line(p);
        break;
    default: break;
    }
    return in;
}

enum { VISIBLE = 164 };

/* A string or name from a file, at most `most` bytes of it, on one line. Returns text. */
static char *visible(char text[VISIBLE], const char *s, size_t length, size_t most)
{
    size_t n = min_size(length, most);
    for (size_t i = 0; i < n; i++) {
        text[i] = s[i] >= ' ' && s[i] <= '~' ? s[i] : '?';
        if (s[i] == '\n') text[i] = '.';
    }
    strcpy(text + n, length > most ? ".." : "");
    return text;
}

static void list_instruction(const Pickle *p, size_t at, const Instruction *in)
{
    FILE *f = p->reading->listing;
    char text[VISIBLE];
    fprintf(f, "%9zu  %-11s ", at, in->op->name);
    switch (in->op->argument) {
    case NO_ARGUMENT: break;
    case BYTES_4: fprintf(f, "\"%s\"", visible(text, in->bytes, in->length, 60)); break;
    case LINES: fputs(visible(text, in->bytes, in->length, 120), f); break;
    case BIG_ENDIAN_REAL: fprintf(f, "%.12g", in->real); break;
    case LONG: fprintf(f, "(%zu bytes)", in->length); break;
    default: fprintf(f, "%lld", in->integer);
    }
    fprintf(f, "%s%s", in->op->argument == NO_ARGUMENT ? "" : "   ", in->op->effect);
}

/* ---- Objects --------------------------------------------------------------------------------- */

static Ref new_node(Pickle *p, NodeType type)
{
    if (p->nodes >= MAX_NODES || p->storages >= MAX_NODES)
        bad_pickle(p, "it builds more than %d objects", MAX_NODES);
    charge(p->reading, p->path, 1, sizeof *p->node);
    p->node = (Node *)grow(p->node, p->nodes, &p->node_room, sizeof *p->node);
    memset(&p->node[p->nodes], 0, sizeof *p->node);
    p->node[p->nodes].type = type;
    return (Ref)p->nodes++;
}

static void push(Pickle *p, Ref ref)
{
    if (p->depth >= MAX_NODES) bad_pickle(p, "its stack is higher than %d", MAX_NODES);
    p->stack = (Ref *)grow(p->stack, p->depth, &p->stack_room, sizeof *p->stack);
    p->stack[p->depth++] = ref;
}

/* The item with `below` others above it on the stack; never a mark. */
static Ref peek(const Pickle *p, size_t below)
{
    if (p->depth <= below || !p->stack[p->depth - 1 - below])
        bad_pickle(p, "its stack is empty where an item was expected");
    return p->stack[p->depth - 1 - below];
}

static Ref pop(Pickle *p)
{
    Ref top = peek(p, 0);
    p->depth--;
    return top;
}

/* The number of items above the topmost mark. */
static size_t count_marked(const Pickle *p)
{
    size_t n = 0;
    while (n < p->depth && p->stack[p->depth - 1 - n]) n++;
    if (n == p->depth) bad_pickle(p, "there is no mark on its stack");
    return n;
}

static void append(Pickle *p, Ref container, Ref value)
{
    Cell cell = {value, 0};
    if (!p->cells) p->cells = 1; /* 0 means none */
    if (p->cells >= MAX_NODES) bad_pickle(p, "its containers have more than %d items", MAX_NODES);
    charge(p->reading, p->path, 1, sizeof *p->cell);
    p->cell = (Cell *)grow(p->cell, p->cells, &p->cell_room, sizeof *p->cell);
    p->cell[p->cells] = cell;
    Node *c = &p->node[container];
    if (c->length) p->cell[c->last].next = (uint32_t)p->cells;
    else c->first = (uint32_t)p->cells;
    c->last = (uint32_t)p->cells;
    c->length++;
    p->cells++;
}

/* Moves the top n items into a container. In a dict, every other one is a key. An opaque value
 * drops all. */
static void move_items(Pickle *p, Ref container, NodeType wanted, size_t n)
{
    NodeType type = p->node[container].type;
    if (type != N_OPAQUE && type != wanted)
        bad_pickle(p, "a %s was expected, not a %s", node_name[wanted], node_name[type]);
    if (wanted == N_DICT && n % 2) bad_pickle(p, "a dict gets a key without a value");
    for (size_t i = 0; i < n; i++) {
        Ref item = peek(p, n - 1 - i);
        NodeType key = p->node[item].type;
        if (wanted == N_DICT && i % 2 == 0 && (key == N_LIST || key == N_DICT))
            bad_pickle(p, "a %s cannot be a key", node_name[key]);
        if (type == wanted) append(p, container, item);
    }
    p->depth -= n;
}

/* Replaces the top n items by a tuple of them. */
static void push_tuple(Pickle *p, size_t n)
{
    Ref tuple = new_node(p, N_TUPLE);
    move_items(p, tuple, N_TUPLE, n);
    push(p, tuple);
}

/* Item i of a container, 0 if it has fewer. */
static Ref item_at(const Pickle *p, Ref container, size_t i)
{
    const Node *c = &p->node[container];
    if (i >= c->length || c->type < N_TUPLE || c->type > N_DICT) return 0;
    uint32_t cell = c->first;
    while (i--) cell = p->cell[cell].next;
    return p->cell[cell].value;
}

static int is_string(const Pickle *p, Ref ref, NodeType type, const char *s)
{
    const Node *n = &p->node[ref];
    return n->type == type && n->length == strlen(s) && !memcmp(n->is.string, s, n->length);
}

/* The value under a key of a dict or namespace, or 0. */
static Ref dict_get(const Pickle *p, Ref dict, const char *key)
{
    const Node *d = &p->node[dict];
    if (d->type != N_DICT && d->type != N_NAMESPACE) return 0;
    for (uint32_t cell = d->first; cell;) {
        uint32_t value = p->cell[cell].next;
        if (is_string(p, p->cell[cell].value, N_STRING, key)) return p->cell[value].value;
        cell = p->cell[value].next;
    }
    return 0;
}

/* torch numbers the objects that it remembers from 0 up: an array is enough. */
static void memo_put(Pickle *p, size_t index, Ref value)
{
    if (index >= MAX_NODES) bad_pickle(p, "it remembers more than %d objects", MAX_NODES);
    while (index >= p->memo_room) {
        size_t room = p->memo_room;
        p->memo = (Ref *)grow(p->memo, room, &p->memo_room, sizeof *p->memo);
        memset(p->memo + room, 0, (p->memo_room - room) * sizeof *p->memo);
    }
    p->memo[index] = value;
}

static Ref memo_get(const Pickle *p, size_t index)
{
    if (index >= p->memo_room || !p->memo[index])
        bad_pickle(p, "nothing is remembered under number %zu", index);
    return p->memo[index];
}

/* ---- Storages and tensors, as far as the pickle describes them ------------------------------- */

/* A tensor in a file. Element (i, j, ..) is element i * stride[0] + j * stride[1] + .. of t.data.
 * Nothing is copied: a transposed matrix has its two strides exchanged, and a slice of a larger
 * matrix has the strides of that matrix. */
typedef struct {
    StoredTensor t;
    size_t stride[MAX_DIMS]; /* elements */
    size_t storage, offset;  /* number of the storage; element of it that comes first */
    const Spec *spec;        /* which tensor of a GPT-2 it is (chapter 5); NULL: none */
    size_t layer;
    int era;
} View;

/* The name of each type: that of torch's storage, torch's own, and that for --dtype. */
static const struct {
    const char *storage, *torch, *option;
} type_names[N_DTYPES] = {{"Double", "float64", "fp64"}, {"Float", "float32", "fp32"},
                          {"Half", "float16", "fp16"},   {"BFloat16", "bfloat16", "bf16"},
                          {"Long", "int64", ""},         {"Int", "int32", ""},
                          {"Short", "int16", ""},        {"Char", "int8", ""},
                          {"Byte", "uint8", ""},         {"Bool", "bool", ""}};

/* A whole number from 0 up. */
static size_t size_of_node(const Pickle *p, Ref ref, const char *what)
{
    const Node *n = &p->node[ref];
    if (!ref || n->type != N_INTEGER || n->is.integer < 0)
        bad_pickle(p, "%s is no whole number from 0 up", what);
    return (size_t)n->is.integer;
}

static Dtype storage_dtype(const Pickle *p, Ref name)
{
    char wanted[64];
    for (int i = 0; i < N_DTYPES; i++) {
        snprintf(wanted, sizeof wanted, "torch\n%sStorage", type_names[i].storage);
        if (is_string(p, name, N_GLOBAL, wanted)) return (Dtype)i;
    }
    bad_pickle(p, "a storage is of an unknown type");
}

/* ('storage', torch.HalfStorage, key, 'cuda:0', elements[, view]): the device does not matter. */
static Ref new_storage(Pickle *p, Ref id)
{
    TorchStorage s;
    Ref key = item_at(p, id, 2), view = item_at(p, id, 5);
    size_t bytes, n = p->node[id].length;
    memset(&s, 0, sizeof s);
    if (p->node[id].type != N_TUPLE || n < 5 || n > 6 ||
        !is_string(p, item_at(p, id, 0), N_STRING, "storage") || p->node[key].type != N_STRING ||
        p->node[key].length > 32 /* keys are small numbers */ ||
        p->node[item_at(p, id, 3)].type != N_STRING)
        bad_pickle(p, "a persistent id is not ('storage', type, key, location, elements)");
    s.key = p->node[key].is.string;
    s.key_length = p->node[key].length;
    s.dtype = storage_dtype(p, item_at(p, id, 1));
    s.n = s.view_n = size_of_node(p, item_at(p, id, 4), "the size of a storage");
    if (__builtin_mul_overflow(s.n, dtype_size[s.dtype], &bytes))
        bad_pickle(p, "a storage has more than 2^64 bytes");
    /* (key, offset, elements): a slice of a root storage */
    if (n == 6 && p->node[view].type != N_NONE) {
        s.view = size_of_node(p, item_at(p, view, 1), "the offset of a storage's view");
        s.view_n = size_of_node(p, item_at(p, view, 2), "the size of a storage's view");
        if (s.view > s.n || s.view_n > s.n - s.view)
            bad_pickle(p, "the view of a storage reaches beyond it");
    }
    Ref ref = new_node(p, N_STORAGE);
    p->node[ref].is.integer = (long long)p->storages;
    charge(p->reading, p->path, 1, sizeof s);
    p->storage = (TorchStorage *)grow(p->storage, p->storages, &p->storage_room, sizeof s);
    p->storage[p->storages++] = s;
    return ref;
}

/* The view that _rebuild_tensor_v2(storage, offset, size, stride, ..) makes, without its data; dies
 * unless all of it lies in the storage. */
static View describe_tensor(const Pickle *p, Ref args)
{
    View v;
    Ref storage = item_at(p, args, 0), size = item_at(p, args, 2), stride = item_at(p, args, 3);
    memset(&v, 0, sizeof v);
    if (p->node[storage].type != N_STORAGE || p->node[size].type != N_TUPLE ||
        p->node[stride].type != N_TUPLE)
        bad_pickle(p, "a tensor is not made of storage, offset, size and stride");
    v.storage = (size_t)p->node[storage].is.integer;
    const TorchStorage *s = &p->storage[v.storage];
    v.offset = size_of_node(p, item_at(p, args, 1), "the offset of a tensor");
    v.t.path = p->path;
    v.t.dtype = s->dtype;
    v.t.dims = p->node[size].length;
    if (v.t.dims > MAX_DIMS)
        bad_pickle(p, "a tensor has %zu dimensions: %d at most are possible", v.t.dims, MAX_DIMS);
    if (v.t.dims != p->node[stride].length)
        bad_pickle(p, "a tensor has %zu sizes but %u strides", v.t.dims, p->node[stride].length);
    size_t last = v.offset, step;
    int wrong = 0;
    v.t.n = 1;
    for (size_t i = 0; i < v.t.dims; i++) {
        v.t.shape[i] = size_of_node(p, item_at(p, size, i), "the size of a tensor");
        v.stride[i] = size_of_node(p, item_at(p, stride, i), "the stride of a tensor");
        wrong |= __builtin_mul_overflow(v.t.n, v.t.shape[i], &v.t.n) ||
                 (v.t.shape[i] > 1 && !v.stride[i]);
        if (!v.t.shape[i]) continue;
        wrong |= __builtin_mul_overflow(v.t.shape[i] - 1, v.stride[i], &step) ||
                 __builtin_add_overflow(last, step, &last);
    }
    if (wrong || v.t.n > s->view_n || (v.t.n ? last >= s->view_n : v.offset > s->view_n))
        bad_pickle(p, "a tensor reaches beyond the %zu elements of its storage, or overlaps itself",
                   s->view_n);
    v.offset += s->view;
    v.t.bytes = v.t.n * dtype_size[v.t.dtype];
    return v;
}

/* ---- The machine ----------------------------------------------------------------------------- */

/* The object that a call would return. */
static Ref call(Pickle *p, Ref callable, Ref args)
{
    static const char *const rebuilds[] = {"torch._utils\n_rebuild_tensor_v2",
                                           "torch._utils\n_rebuild_tensor"};
    static const char *const wraps[] = {"torch._utils\n_rebuild_parameter",
                                        "torch._utils\n_rebuild_parameter_with_state"};
    if (p->node[callable].type != N_GLOBAL && p->node[callable].type != N_OPAQUE)
        bad_pickle(p, "a %s is called", node_name[p->node[callable].type]);
    if (p->node[args].type != N_TUPLE) bad_pickle(p, "a call has no tuple of arguments");
    for (int i = 0; i < 2; i++) {
        if (is_string(p, callable, N_GLOBAL, rebuilds[i])) {
            describe_tensor(p, args);
            Ref tensor = new_node(p, N_TENSOR);
            p->node[tensor].first = args;
            return tensor;
        }
        if (is_string(p, callable, N_GLOBAL, wraps[i]) &&
            p->node[item_at(p, args, 0)].type == N_TENSOR)
            return item_at(p, args, 0);
    }
    if (p->node[args].length) return new_node(p, N_OPAQUE);
    if (is_string(p, callable, N_GLOBAL, "collections\nOrderedDict")) return new_node(p, N_DICT);
    int is_namespace = is_string(p, callable, N_GLOBAL, "types\nSimpleNamespace") ||
                       is_string(p, callable, N_GLOBAL, "argparse\nNamespace");
    return new_node(p, is_namespace ? N_NAMESPACE : N_OPAQUE);
}

/* Gives the object on top of the stack its state. The state of a namespace is a dict of its fields.
 * Other states are not needed: a dict's _metadata, or those of opaque values. */
static void build(Pickle *p)
{
    const Node *state = &p->node[pop(p)];
    Node *object = &p->node[peek(p, 0)];
    if (object->type == N_NAMESPACE && !object->length && state->type == N_DICT) {
        object->first = state->first;
        object->last = state->last;
        object->length = state->length;
    } else if (object->type != N_OPAQUE && object->type != N_DICT && object->type != N_TENSOR)
        bad_pickle(p, "a %s gets a %s as its state", node_name[object->type],
                   node_name[state->type]);
}

/* Two's complement, low byte first. More than 64 bits are no number that we could need. */
static void read_long(Node *n, const Instruction *in)
{
    n->type = in->length > 8 ? N_OPAQUE : N_INTEGER;
    if (n->type == N_OPAQUE) return;
    n->is.integer = (long long)little_endian(in->bytes, in->length);
    if (in->length && in->length < 8 && in->bytes[in->length - 1] & 0x80)
        n->is.integer -= 1LL << 8 * in->length;
}

static int is_utf8(const char *s, size_t n)
{
    while (n) {
        size_t step = utf8_length(s, n);
        if (!step) return 0;
        s += step;
        n -= step;
    }
    return 1;
}

static void push_literal(Pickle *p, const Instruction *in)
{
    Ref ref = new_node(p, N_INTEGER); /* BININT, BININT1, BININT2 */
    Node *n = &p->node[ref];
    n->is.integer = in->integer;
    switch (in->op->code) {
    case NONE: n->type = N_NONE; break;
    case NEWTRUE:
    case NEWFALSE:
        n->type = N_FLAG;
        n->is.integer = in->op->code == NEWTRUE;
        break;
    case EMPTY_DICT: n->type = N_DICT; break;
    case EMPTY_LIST: n->type = N_LIST; break;
    case EMPTY_TUPLE: n->type = N_TUPLE; break;
    case BINFLOAT:
        n->type = N_REAL;
        n->is.real = in->real;
        break;
    case LONG1: read_long(n, in); break;
    case GLOBAL:
    case BINUNICODE:
        n->type = in->op->code == GLOBAL ? N_GLOBAL : N_STRING;
        n->is.string = in->bytes;
        n->length = (uint32_t)in->length;
        if (n->type == N_STRING && !is_utf8(in->bytes, in->length))
            bad_pickle(p, "a string is not UTF-8");
    }
    push(p, ref);
}

static void list_call(const Pickle *p, Ref callable, Ref result)
{
    const Node *name = &p->node[callable], *made = &p->node[result];
    char text[VISIBLE];
    visible(text, name->is.string, name->type == N_GLOBAL ? name->length : 0, 120);
    fprintf(p->reading->listing,
            made->type == N_OPAQUE ? ": %s is not called" : ": %s is known: a %s", text,
            node_name[made->type]);
}

static void execute(Pickle *p, const Instruction *in)
{
    Ref top, callable, result;
    size_t n;
    switch (in->op->code) {
    case PROTO:
        if (in->integer != 2)
            bad_pickle(p, "it is written in protocol %lld, not in torch.save's 2", in->integer);
        break;
    case STOP: break;
    case MARK: push(p, 0); break;
    case TUPLE:
        push_tuple(p, count_marked(p));
        top = pop(p);
        p->depth--; /* the mark under the tuple */
        push(p, top);
        break;
    case TUPLE1: push_tuple(p, 1); break;
    case TUPLE2: push_tuple(p, 2); break;
    case TUPLE3: push_tuple(p, 3); break;
    case APPEND: move_items(p, peek(p, 1), N_LIST, 1); break;
    case SETITEM: move_items(p, peek(p, 2), N_DICT, 2); break;
    case APPENDS:
    case SETITEMS:
        n = count_marked(p);
        move_items(p, peek(p, n + 1), in->op->code == APPENDS ? N_LIST : N_DICT, n);
        p->depth--; /* the mark */
        break;
    case BINPUT:
    case LONG_BINPUT: memo_put(p, (size_t)in->integer, peek(p, 0)); break;
    case BINGET:
    case LONG_BINGET: push(p, memo_get(p, (size_t)in->integer)); break;
    case REDUCE:
    case NEWOBJ:
        top = pop(p);
        callable = pop(p);
        result = call(p, callable, top);
        if (p->reading->listing) list_call(p, callable, result);
        push(p, result);
        break;
    case BUILD: build(p); break;
    case BINPERSID: push(p, new_storage(p, pop(p))); break;
    default: push_literal(p, in);
    }
}

/* Orders two strings that do not end with NUL. */
static int compare_bytes(const char *a, size_t a_length, const char *b, size_t b_length)
{
    int order = memcmp(a, b, min_size(a_length, b_length));
    return order ? order : (a_length > b_length) - (a_length < b_length);
}

/* Orders keys by type and value. A key that is neither a number nor a string equals only itself. */
static int compare_keys(const void *a, const void *b)
{
    const Node *x = *(const Node *const *)a, *y = *(const Node *const *)b;
    int order = (x->type > y->type) - (x->type < y->type);
    if (order) return order;
    if (x->type < N_STRING)
        return (x->is.integer > y->is.integer) - (x->is.integer < y->is.integer);
    if (x->type != N_STRING) return (x > y) - (x < y);
    return compare_bytes(x->is.string, x->length, y->is.string, y->length);
}

/* In Python the second value would silently win. */
static void refuse_duplicate_keys(const Pickle *p, Ref dict)
{
    size_t n = 0;
    const Node **key = (const Node **)xcalloc(p->node[dict].length, sizeof *key);
    for (uint32_t cell = p->node[dict].first; cell; cell = p->cell[p->cell[cell].next].next) {
        const Node *name = &p->node[p->cell[cell].value];
        if (name->type == N_STRING && name->length > MAX_NAME) /* it would be slow to compare */
            bad_pickle(p, "a dict has a key of %u bytes", name->length);
        key[n++] = name;
    }
    qsort(key, n, sizeof *key, compare_keys);
    for (size_t i = 1; i < n; i++)
        if (!compare_keys(&key[i - 1], &key[i])) {
            if (key[i]->type != N_STRING)
                bad_pickle(p, "a dict has one %s twice as a key", node_name[key[i]->type]);
            bad_pickle(p, "a dict has the key %.*s twice", SHOW(key[i]));
        }
    free(key);
}

/* Runs the program at p->at, which builds `what`, and returns its result. Earlier objects stay. */
static Ref run_pickle(Pickle *p, const char *what)
{
    Instruction in;
    size_t first = p->nodes;
    FILE *listing = p->reading->listing;
    if (listing) fprintf(listing, "%s: a pickle that builds %s\n", p->path, what);
    p->start = p->at;
    if (!p->nodes) new_node(p, N_MARK);
    do {
        size_t at = p->at;
        in = next_instruction(p);
        if ((in.op->code == PROTO) != (at == p->start))
            bad_pickle(p, "PROTO belongs at the start, and only there");
        if (listing) list_instruction(p, at, &in);
        execute(p, &in);
        if (listing) fputc('\n', listing);
    } while (in.op->code != STOP);
    Ref result = pop(p);
    if (p->depth) bad_pickle(p, "%zu items are left on its stack", p->depth);
    for (size_t i = first; i < p->nodes; i++)
        if (p->node[i].type == N_DICT) refuse_duplicate_keys(p, (Ref)i);
    free(p->stack);
    free(p->memo);
    p->stack = p->memo = NULL;
    p->stack_room = p->memo_room = 0;
    return result;
}

/* =================================================================================================
 * Chapter 3. torch.save: a pickle and storages
 *
 * The numbers are not in the pickle. They lie beside it as storages, plain little-endian arrays,
 * each under a key. The pickle holds an id for each, and tensors are views of them, with offset,
 * size and strides in elements:
 *
 *     storage '7'  a b c d e f g h i j k l
 *     a matrix             size (3, 4)  stride (4, 1)  offset 0     a b c d / e f g h / i j k l
 *     its transpose        size (4, 3)  stride (1, 4)  offset 0     a e i / b f j / c g k / d h l
 *     its right half       size (3, 2)  stride (4, 1)  offset 2     c d / g h / k l
 *
 * Several tensors may share a storage, and need not use all of it: the reader must follow the
 * strides. This program builds a matrix of 16 x 8. `convert inspect FILE --pickle` lists it like
 * this, with other words behind the lines:
 *
 *     GLOBAL      torch._utils._rebuild_tensor_v2     what will be called ..
 *     MARK                                            .. with these arguments:
 *     MARK                                            the id of a storage is a tuple of
 *     BINUNICODE  "storage"
 *     GLOBAL      torch.FloatStorage                  its type,
 *     BINUNICODE  "0"                                 its key: the numbers are in NAME/data/0,
 *     BINUNICODE  "cpu"                               where it was,
 *     BININT1     128                                 its elements
 *     TUPLE
 *     BINPERSID                                       the tuple gives way to the storage
 *     BININT1     0                                   offset
 *     BININT1     16, BININT1 8, TUPLE2               size
 *     BININT1     8, BININT1 1, TUPLE2                stride
 *     NEWFALSE                                        no gradient is wanted
 *     GLOBAL      collections.OrderedDict             no hooks: a call makes an empty dict, too
 *     EMPTY_TUPLE, REDUCE
 *     TUPLE                                           all arguments
 *     REDUCE                                          the call
 *
 * There are two containers. Until torch 1.5 a file was five pickles and the storages, back to back:
 *
 *     | magic number | 1001 | {little_endian: ..} | the object | [keys] | count, numbers | ..
 *
 * Since torch 1.6 it is a zip archive NAME/data.pkl, NAME/data/0, NAME/data/1, .., NAME/version;
 * newer versions add NAME/byteorder and more.
 * ============================================================================================== */

enum { MAX_TENSORS = 1 << 16 };

/* A file of tensors: a rank file of Megatron's, or a file of Hugging Face's. */
typedef struct {
    const char *path;
    Map map;
    Zip zip;        /* of a zip container */
    char name[256]; /* its NAME */
    Pickle pickle;
    Ref root;   /* the object */
    View *view; /* the tensors of the model, in the pickle's order, with full names */
    size_t views, view_room;
} TensorFile;

/* The first pickle of a legacy file: protocol 2, a long of 10 bytes (the magic number), stop. */
static const char legacy_start[] = "\x80\x02\x8A\x0A\x6C\xFC\x9C\x46\xF9\x20\x6A\xA8\x50\x19.";
enum { LEGACY_START = sizeof legacy_start - 1 };

static int is_legacy(Map map)
{
    return map.size >= LEGACY_START && !memcmp(map.data, legacy_start, LEGACY_START);
}

static int compare_storages(const void *a, const void *b)
{
    const TorchStorage *x = *(const TorchStorage *const *)a, *y = *(const TorchStorage *const *)b;
    return compare_bytes(x->key, x->key_length, y->key, y->key_length);
}

/* Lists the storages by key. Tensors that share a storage each name it, and must agree on it. */
static TorchStorage **sort_storages(const Pickle *p)
{
    TorchStorage **list = (TorchStorage **)xcalloc(p->storages, sizeof *list);
    for (size_t i = 0; i < p->storages; i++) list[i] = &p->storage[i];
    qsort(list, p->storages, sizeof *list, compare_storages);
    for (size_t i = 1; i < p->storages; i++)
        if (!compare_storages(&list[i - 1], &list[i]) &&
            (list[i - 1]->n != list[i]->n || list[i - 1]->dtype != list[i]->dtype))
            bad_pickle(p, "two tensors disagree on type or size of their storage");
    return list;
}

/* Gives the storages with this key their data, which starts at p->at, and steps over it. */
static void place_storage(Pickle *p, TorchStorage *const *list, const Node *name)
{
    TorchStorage key, *wanted = &key;
    key.key = name->is.string;
    key.key_length = name->length;
    if (name->type != N_STRING) die("%s: a key of its list of storages is no string", p->path);
    TorchStorage *const *at =
        (TorchStorage *const *)bsearch(&wanted, list, p->storages, sizeof *list, compare_storages);
    if (!at) die("%s: storage %.*s is listed, but belongs to no tensor", p->path, SHOW(name));
    if ((*at)->data) die("%s: storage %.*s is listed twice", p->path, SHOW(name));
    size_t count = (size_t)little_endian(take(p, 8), 8);
    size_t bytes = (*at)->n * dtype_size[(*at)->dtype];
    if (count != (*at)->n)
        die("%s: storage %.*s begins with a count of %zu elements, but its tensors ask for %zu",
            p->path, SHOW(name), count, (*at)->n);
    if (bytes > p->map.size - p->at)
        die("%s: storage %.*s needs %zu bytes, but the file ends after %zu: it is cut short",
            p->path, SHOW(name), bytes, p->map.size - p->at);
    const char *data = take(p, bytes);
    while (at > list && !compare_storages(at - 1, &wanted)) at--;
    for (; at < list + p->storages && !compare_storages(at, &wanted); at++)
        ((TorchStorage *)*at)->data = data;
}

static void open_legacy(TensorFile *file)
{
    Pickle *p = &file->pickle;
    run_pickle(p, "the magic number");
    Ref version = run_pickle(p, "the version of the protocol");
    if (p->node[version].type != N_INTEGER || p->node[version].is.integer != 1001)
        die("%s: its protocol is not 1001, the only one that torch.save has written", file->path);
    Ref machine = run_pickle(p, "what is known of the machine");
    const Node *little = &p->node[dict_get(p, machine, "little_endian")];
    if (little->type != N_FLAG || !little->is.integer)
        die("%s: it does not say that it is little-endian: only such files can be read",
            file->path);
    file->root = run_pickle(p, "the object");
    Ref keys = run_pickle(p, "the list of storages");
    if (p->node[keys].type != N_LIST) die("%s: its list of storages is missing", file->path);
    TorchStorage **list = sort_storages(p);
    for (uint32_t cell = p->node[keys].first; cell; cell = p->cell[cell].next)
        place_storage(p, list, &p->node[p->cell[cell].value]);
    for (size_t i = 0; i < p->storages; i++)
        if (!p->storage[i].data)
            die("%s: a tensor's storage is not in the list of storages", file->path);
    free(list); /* bytes behind the last storage are allowed, as in torch */
}

/* Member NAME/what of a zip container, or NULL. */
static Member *torch_member(const TensorFile *file, const char *what)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%.200s", file->name, what);
    return zip_find(&file->zip, path);
}

static Member *storage_member(const TensorFile *file, const TorchStorage *storage)
{
    char path[SHOWN];
    snprintf(path, sizeof path, "data/%.*s", (int)storage->key_length, storage->key);
    return torch_member(file, path);
}

/* Is this a zip container? Finds its NAME: the folder of its only data.pkl. */
static int find_torch_name(char name[256], const Zip *z)
{
    static const char pickle[] = "/data.pkl";
    int found = 0;
    for (size_t i = 0; i < z->members; i++) {
        const char *member = z->member[i].name, *slash = strchr(member, '/');
        if (!slash || strcmp(slash, pickle) || slash - member >= 256) continue;
        if (found) die("%s holds two pickles, %s%s and %s", z->path, name, pickle, member);
        found = 1;
        snprintf(name, 256, "%.*s", (int)(slash - member), member);
    }
    return found;
}

static void open_container(TensorFile *file)
{
    Pickle *p = &file->pickle;
    Member *order = torch_member(file, "byteorder");
    if (torch_member(file, "constants.pkl"))
        die("%s is a TorchScript archive, a program: a checkpoint written by torch.save is "
            "expected",
            file->path);
    if (order) {
        Map map = zip_read(&file->zip, order);
        if (map.size != 6 || memcmp(map.data, "little", 6))
            die("%s: its byteorder is not little: it cannot be read", file->path);
    }
    p->map = zip_read(&file->zip, torch_member(file, "data.pkl"));
    file->root = run_pickle(p, "the object");
    if (p->at < p->map.size)
        die("%s: %zu bytes follow its pickle's end", file->path, p->map.size - p->at);
    free(sort_storages(p));
    for (size_t i = 0; i < p->storages; i++) {
        const TorchStorage *storage = &p->storage[i];
        const Member *m = storage_member(file, storage);
        if (!m) die("%s: the member that is storage %zu of its tensors is missing", file->path, i);
        if (m->size != storage->n * dtype_size[storage->dtype])
            die("%s: member %s has %zu bytes, but its tensors ask for %zu", file->path, m->name,
                m->size, storage->n * dtype_size[storage->dtype]);
    }
}

/* Lists a tensor of the file under a name, of which it keeps a copy. */
static void add_view(TensorFile *file, View v, const char *name)
{
    if (file->views >= MAX_TENSORS) die("%s holds more than %d tensors", file->path, MAX_TENSORS);
    if (file->pickle.reading) charge(file->pickle.reading, file->path, 1, sizeof v + strlen(name));
    file->view = (View *)grow(file->view, file->views, &file->view_room, sizeof v);
    v.t.name = keep_string(name, strlen(name));
    file->view[file->views++] = v;
}

/* Collects the tensors of a state dict, and of the dicts in it. The keys that lead to a tensor,
 * joined by dots, are its name. */
static void collect_tensors(TensorFile *file, Ref dict, char name[MAX_NAME], int depth,
                            size_t *steps)
{
    const Pickle *p = &file->pickle;
    size_t start = strlen(name);
    if (depth >= MAX_DEPTH)
        die("%s: its dicts are more than %d levels deep, or one contains itself", file->path,
            MAX_DEPTH);
    for (uint32_t cell = p->node[dict].first, value; cell; cell = p->cell[value].next) {
        const Node *key = &p->node[p->cell[cell].value];
        value = p->cell[cell].next;
        if (key->type != N_STRING)
            die("%s: a %s is the name of a tensor in %s", file->path, node_name[key->type],
                start ? name : "it");
        ++*steps;
        if (*steps > p->nodes) die("%s: its dicts contain one another too often", file->path);
        if (start + key->length + 2 > MAX_NAME || memchr(key->is.string, 0, key->length))
            die("%s: the name %.*s of a tensor is too long", file->path, SHOW(key));
        snprintf(name + start, MAX_NAME - start, "%s%.*s", start ? "." : "", (int)key->length,
                 key->is.string);
        const Node *node = &p->node[p->cell[value].value];
        size_t n = strlen(name), extra = sizeof "_extra_state" - 1;
        if (n >= extra && !strcmp(name + n - extra, "_extra_state"))
            continue; /* TransformerEngine's, of FP8 training */
        if (node->type == N_DICT)
            collect_tensors(file, p->cell[value].value, name, depth + 1, steps);
        else if (node->type == N_TENSOR) add_view(file, describe_tensor(p, node->first), name);
        else
            die("%s: under the name %.120s a tensor is expected, not a value of type %s",
                file->path, name, node_name[node->type]);
    }
    name[start] = 0;
}

/* Finds the values of all tensors, in members that are inflated and checked in parallel. */
static void find_values(TensorFile *file)
{
    for (size_t i = 0; i < file->views; i++) {
        const TorchStorage *storage = &file->pickle.storage[file->view[i].storage];
        if (!storage->data) storage_member(file, storage)->wanted = 1;
    }
#pragma omp parallel for schedule(dynamic) /* the time goes into inflating and checking */
    for (size_t i = 0; i < file->zip.members; i++)
        if (file->zip.member[i].wanted) zip_read(&file->zip, &file->zip.member[i]);
    size_t viewed = 0, stored = file->zip.members ? 0 : file->map.size;
    for (size_t i = 0; i < file->views; i++) {
        View *v = &file->view[i];
        TorchStorage *storage = &file->pickle.storage[v->storage];
        if (!storage->data)
            storage->data = zip_read(&file->zip, storage_member(file, storage)).data;
        v->t.data = storage->data + v->offset * dtype_size[v->t.dtype];
        viewed += v->t.bytes;
    }
    for (size_t i = 0; i < file->zip.members; i++)
        if (file->zip.member[i].wanted) stored += file->zip.member[i].size;
    /* tied weights count twice; but with 65536 views of one storage we would be busy for hours */
    if (viewed > 4 * stored)
        die("%s: its tensors have %zu bytes, but are views of only %zu", file->path, viewed,
            stored);
}

/* Opens a file of torch.save, whose path and map are set already. The caller unmaps it. */
static void tensor_file_open(TensorFile *file, Reading *reading)
{
    const char *path = file->path;
    file->pickle.path = path;
    file->pickle.map = file->map;
    file->pickle.reading = reading;
    if (is_legacy(file->map)) open_legacy(file);
    else {
        const char *start = "version https://git-", *hint = "";
        if (file->map.size > 20 && !memcmp(file->map.data, start, 20))
            hint = "; it is a git-lfs pointer: fetch the file itself with git lfs pull";
        if (!is_zip(file->map))
            die("%s is neither a zip archive nor written by torch.save%s", path, hint);
        file->zip = zip_open(path, file->map, reading);
        if (!find_torch_name(file->name, &file->zip))
            die("%s is a zip archive without a pickle data.pkl", path);
        open_container(file);
    }
    char name[MAX_NAME] = "";
    size_t steps = 0;
    Ref model = dict_get(&file->pickle, file->root, "model");
    if (dict_get(&file->pickle, file->root, "model0"))
        die("%s holds parts of a virtual pipeline (model0, ..): load and save it in Megatron "
            "without one",
            path);
    if (!model) model = file->root; /* pytorch_model.bin is nothing but a state dict */
    if (file->pickle.node[model].type != N_DICT)
        die("%s: a dict of tensors is expected, not a %s", path,
            node_name[file->pickle.node[model].type]);
    collect_tensors(file, model, name, 0, &steps);
    find_values(file);
}

/* Lists the tensors of a safetensors file, or of a folder of them, in the same form. */
static void add_safetensors(TensorFile *file, const Safetensors *from)
{
    for (size_t i = 0; i < from->tensors; i++) {
        View v;
        memset(&v, 0, sizeof v);
        v.t = from->tensor[i];
        for (size_t d = v.t.dims, step = 1; d-- > 0; step *= v.t.shape[d]) v.stride[d] = step;
        add_view(file, v, v.t.name);
    }
}

static void tensor_file_close(TensorFile *file)
{
    for (size_t i = 0; i < file->views; i++) free((void *)file->view[i].t.name);
    free(file->view);
    free(file->pickle.node);
    free(file->pickle.cell);
    free(file->pickle.storage);
    zip_close(&file->zip);
    free((void *)file->path);
}

/* =================================================================================================
 * Chapter 4. Rank files: how to find the file of each rank (chapter 7 joins them)
 *
 *     ROOT/latest_checkpointed_iteration.txt          "release", or the number of an iteration
 *     ROOT/release/                                   or iter_0500000/
 *         mp_rank_00/model_optim_rng.pt               tensor rank 0; with stages mp_rank_00_000
 *         mp_rank_01/model_optim_rng.pt
 *
 * NVIDIA distributes this tree as a zip archive. A folder further down may be named instead of the
 * root. From 2022 to 2023, if the optimizer was distributed, the file was called model_rng.pt, and
 * beside its folder there were others with an optim.pt for each data rank, which were named
 * mp_rank_00_000, too. So the name of the file decides, not the name of the folder.
 * ============================================================================================== */

static const char tracker[] = "latest_checkpointed_iteration.txt";
enum { MAX_RANK_FILES = 4096, MAX_TRACKER = 64 };

/* The input, and its files of tensors: rank files, or the files of a Hugging Face model. */
typedef struct {
    const char *path;
    const char *container; /* in words */
    Reading reading;
    Map map;     /* of a file */
    Zip archive; /* which may be a zip archive of a checkpoint */
    Safetensors safetensors;
    Layout layout;
    int folder; /* it is a Hugging Face folder, with a config.json */
    size_t files, room;
    TensorFile *file;
} Source;

/* The paths in a folder or an archive. */
typedef struct {
    char **path;
    size_t n, room;
} Paths;

static void list_path(Paths *list, const char *path)
{
    list->path = (char **)grow(list->path, list->n, &list->room, sizeof *list->path);
    list->path[list->n++] = keep_string(path, strlen(path));
}

static int is_iteration(const char *name)
{
    return !strcmp(name, "release") ||
           (!strncmp(name, "iter_", 5) && name[5] && !name[5 + strspn(name + 5, "0123456789")]);
}

/* The numbers in mp_rank_00 or mp_rank_00_000. Returns how many there are, 0 in another name. */
static int rank_numbers(const char *name, size_t number[3])
{
    int n = 0;
    if (strncmp(name, "mp_rank", 7)) return 0;
    for (name += 7; *name == '_' && n < 3; n++) {
        name++;
        size_t digits = strspn(name, "0123456789");
        if (digits < (n ? 3 : 2) || digits > 6) return 0;
        number[n] = (size_t)atoi(name);
        name += digits;
    }
    return *name && *name != '/' ? 0 : n;
}

/* Lists a folder, and the folders of iterations and ranks in it. below: "" or "release/", .. */
static void list_folder(Paths *list, const char *root, const char *below, int depth)
{
    char path[PATH_MAX];
    size_t number[3];
    DIR *stream = opendir(join_path(path, root, below));
    if (!stream && !depth) die("cannot open the folder %s: %s", root, strerror(errno));
    const char *name = stream ? next_name(stream) : NULL;
    for (; name; name = next_name(stream)) {
        if (snprintf(path, sizeof path, "%s%s", below, name) >= PATH_MAX - 1)
            die("a path in %s is too long", root);
        list_path(list, path);
        if (depth == 2 || (!is_iteration(name) && !rank_numbers(name, number))) continue;
        strcat(path, "/");
        list_folder(list, root, path, depth + 1);
    }
    if (stream) closedir(stream);
}

static const char *base_name(const char *path)
{
    return strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
}

/* Reads a tracker. Its word becomes part of a path, so only the two forms are accepted. */
static void read_tracker(char iteration[MAX_TRACKER], const char *path, Map map)
{
    char word[MAX_TRACKER] = "";
    size_t n = min_size(map.size, sizeof word - 1);
    memcpy(word, map.data, n);
    while (n && strchr(" \r\n", word[n - 1])) word[--n] = 0;
    size_t digits = strspn(word, "0123456789");
    int release = !strcmp(word, "release");
    if (map.size >= MAX_TRACKER || strlen(word) != n ||
        (!release && (!n || digits < n || n > 9 || !atoi(word))))
        die("%s: %s holds neither \"release\" nor the number of an iteration from 1 up", path,
            tracker);
    if (release) memcpy(iteration, word, sizeof word);
    else snprintf(iteration, MAX_TRACKER, "iter_%07d", atoi(word));
}

/* The folder that the outermost tracker names, with a slash; "" if there is no tracker. */
static void follow_tracker(char iteration[PATH_MAX], const Paths *list, const Source *s)
{
    const char *found = NULL;
    char name[MAX_TRACKER], path[PATH_MAX];
    const Zip *archive = s->archive.members ? &s->archive : NULL;
    for (size_t i = 0; i < list->n; i++)
        if (!strcmp(base_name(list->path[i]), tracker) &&
            (!found || strlen(list->path[i]) < strlen(found)))
            found = list->path[i];
    *iteration = 0;
    if (!found) return;
    Map map = archive ? zip_read(archive, zip_find(archive, found))
                      : map_file(join_path(path, s->path, found));
    read_tracker(name, s->path, map);
    if (!archive) unmap_file(map);
    int length = (int)(base_name(found) - found);
    if (snprintf(iteration, PATH_MAX, "%.*s%s/", length, found, name) >= PATH_MAX)
        die("a path in %s is too long", s->path);
}

/* A rank file. */
typedef struct {
    const char *path;
    int numbers; /* in its folder's name; 0: it is no rank's folder */
    size_t tp, pp;
    size_t iteration; /* length of its path, up to the iteration's folder */
} RankFile;

/* Is this a rank file? Files of other names belong to the optimizer. */
static int is_rank_file(RankFile *file, const char *path)
{
    const char *base = base_name(path), *parent = base > path ? base - 1 : base;
    size_t number[3] = {0, 0, 0};
    if (strcmp(base, "model_optim_rng.pt") && strcmp(base, "model_rng.pt")) return 0;
    while (parent > path && parent[-1] != '/') parent--;
    memset(file, 0, sizeof *file);
    file->path = path;
    file->numbers = rank_numbers(parent, number);
    file->tp = number[0];
    file->pp = file->numbers > 1 ? number[1] : 0;
    file->iteration = (size_t)((file->numbers ? parent : base) - path);
    return 1;
}

__attribute__((noreturn)) static void no_checkpoint(const Paths *list, const char *folder,
                                                    const char *iteration)
{
    for (size_t i = 0; i < list->n; i++)
        if (strstr(list->path[i], ".distcp") || !strcmp(base_name(list->path[i]), "metadata.json"))
            die("%s is a torch_dist checkpoint: load it in Megatron, and save it with "
                "--ckpt-format torch",
                folder);
    die("%s: no mp_rank_.. folder%s%s holds a model_optim_rng.pt or model_rng.pt: it is no "
        "checkpoint",
        folder, *iteration ? " in " : "", iteration);
}

/* The rank files of a checkpoint, all tensor ranks of stage 0 first. The caller frees the list. */
static const char **find_rank_files(Source *s, const Paths *list)
{
    char iteration[PATH_MAX];
    size_t n = 0, tp = 1, pp = 1;
    RankFile *file = (RankFile *)xcalloc(list->n, sizeof *file);
    follow_tracker(iteration, list, s);
    for (size_t i = 0; i < list->n; i++)
        if (!strncmp(list->path[i], iteration, strlen(iteration)))
            n += (size_t)is_rank_file(&file[n], list->path[i]);
    if (!n) no_checkpoint(list, s->path, iteration);
    for (size_t i = 0; i < n; i++) {
        tp = max_size(tp, file[i].tp + 1);
        pp = max_size(pp, file[i].pp + 1);
        if (file[i].iteration != file[0].iteration ||
            strncmp(file[i].path, file[0].path, file[0].iteration))
            die("%s holds several iterations, of %s and of %s, and no %s: name one of them",
                s->path, file[0].path, file[i].path, tracker);
        if (file[i].numbers == 3 || file[i].numbers != file[0].numbers)
            die("%s: %s does not fit its neighbours: all mp_rank_00 or all mp_rank_00_000 is "
                "expected",
                s->path, file[i].path);
    }
    if (n > MAX_RANK_FILES || tp * pp > n)
        die("%s: the folders' numbers go up to %zu tensor ranks x %zu stages, but %zu have a model",
            s->path, tp, pp, n);
    const char **ordered = (const char **)xcalloc(tp * pp, sizeof *ordered);
    for (size_t i = 0; i < n; i++) {
        const char **slot = &ordered[file[i].pp * tp + file[i].tp];
        if (*slot) die("%s: %s and %s are of one and the same rank", s->path, *slot, file[i].path);
        *slot = file[i].path;
    }
    free(file);
    s->layout.tp = (int)tp;
    s->layout.pp = (int)pp;
    return ordered;
}

/* ---- The input, whatever it is --------------------------------------------------------------- */

/* Adds a file of tensors, still to be opened. */
static void add_file(Source *s, const char *path, Map map)
{
    s->file = (TensorFile *)grow(s->file, s->files, &s->room, sizeof *s->file);
    TensorFile *file = &s->file[s->files++];
    memset(file, 0, sizeof *file);
    file->path = keep_string(path, strlen(path));
    file->map = map;
}

static Map map_input(Source *s, const char *path)
{
    Map map = map_file(path);
    s->reading.inflation_left += MAX_INFLATION * (long long)map.size;
    return map;
}

/* Adds a file of the input, which is a folder or an archive. */
static void add_named_file(Source *s, const char *name)
{
    char path[PATH_MAX];
    join_path(path, s->path, name);
    if (s->archive.members) add_file(s, path, zip_read(&s->archive, zip_find(&s->archive, name)));
    else add_file(s, path, map_input(s, path));
}

static void open_all(Source *s)
{
    for (size_t i = 0; i < s->files; i++) tensor_file_open(&s->file[i], &s->reading);
    s->container = is_legacy(s->file[0].map) ? "torch.save, legacy" : "torch.save, zip";
}

/* Every tensor must be in the shard that the index names, and in no other. */
static void check_bin_index(const Source *s, const Json *index, const JsonValue *map)
{
    Safetensors all = {NULL, 0, NULL, 0};
    size_t room = 0;
    for (size_t i = 0; i < s->files; i++)
        for (size_t j = 0; j < s->file[i].views; j++) {
            all.tensor = (StoredTensor *)grow(all.tensor, all.tensors, &room, sizeof *all.tensor);
            all.tensor[all.tensors] = s->file[i].view[j].t;
            all.tensor[all.tensors++].name = strip_prefix(s->file[i].view[j].t.name);
        }
    if (all.tensors) qsort(all.tensor, all.tensors, sizeof *all.tensor, compare_names);
    check_index(&all, s->path, index, map);
    free(all.tensor);
}

/* Opens the shards of a pytorch_model.bin. */
static void open_bin_shards(Source *s)
{
    char what[PATH_MAX];
    size_t n;
    Map text = map_file(join_path(what, s->path, "pytorch_model.bin.index.json"));
    Json index = json_parse(text.data, text.size, what);
    const JsonValue *map = json_get(&index, index.value, "weight_map");
    const char **name = indexed_files(&n, &index, map);
    for (size_t i = 0; i < n; i++) add_named_file(s, name[i]);
    open_all(s);
    check_bin_index(s, &index, map);
    json_free(&index);
    unmap_file(text);
    free(name);
}

/* Opens a Hugging Face folder: config.json and weights. Returns 0 if this is none. */
static int open_hugging_face(Source *s)
{
    static const char *const weights[] = {"model.safetensors", "model.safetensors.index.json",
                                          "pytorch_model.bin", "pytorch_model.bin.index.json"};
    int found = 0;
    while (found < 4 && !file_exists(s->path, weights[found])) found++;
    if (found == 4) return 0;
    if (!file_exists(s->path, "config.json"))
        die("%s holds %s, but no config.json", s->path, weights[found]);
    s->folder = 1;
    if (found < 2) {
        Map none = {"", 0};
        s->safetensors = safetensors_open(s->path);
        s->container = "safetensors";
        add_file(s, s->path, none);
        add_safetensors(&s->file[0], &s->safetensors);
    } else if (found == 2) {
        add_named_file(s, weights[found]);
        open_all(s);
    } else open_bin_shards(s);
    return 1;
}

/* Opens a checkpoint of Megatron's, a folder or an archive. */
static void open_rank_files(Source *s)
{
    Paths list = {NULL, 0, 0};
    for (size_t i = 0; i < s->archive.members; i++) list_path(&list, s->archive.member[i].name);
    if (!s->archive.members) list_folder(&list, s->path, "", 0);
    const char **file = find_rank_files(s, &list);
    for (int i = 0; i < s->layout.tp * s->layout.pp; i++) add_named_file(s, file[i]);
    for (size_t i = 0; i < list.n; i++) free(list.path[i]);
    free(list.path);
    free(file);
    open_all(s);
}

/* Opens a file or folder; its contents tell which kind it is. scratch: a folder for what must be
 * inflated; listing: where pickles are listed as they run, or NULL. */
static void source_open(Source *s, const char *path, const char *scratch, FILE *listing)
{
    struct stat st;
    char name[256];
    memset(s, 0, sizeof *s);
    s->path = path;
    s->layout.tp = s->layout.pp = s->layout.dp = 1;
    s->reading.scratch = scratch;
    s->reading.listing = listing;
    s->reading.objects_left = MAX_OBJECT_BYTES;
    s->reading.inflation_left = MIN_INFLATED;
    if (stat(path, &st)) die("cannot open %s: %s", path, strerror(errno));
    if (S_ISDIR(st.st_mode)) {
        if (!open_hugging_face(s)) open_rank_files(s);
        return;
    }
    s->map = map_input(s, path);
    if (is_zip(s->map)) s->archive = zip_open(path, s->map, &s->reading);
    if (s->archive.members && !find_torch_name(name, &s->archive)) {
        open_rank_files(s);
        return;
    }
    zip_close(&s->archive);
    add_file(s, path, s->map);
    open_all(s);
}

static void source_close(Source *s)
{
    for (size_t i = 0; i < s->files; i++) {
        /* otherwise it belongs to the archive, or is the input itself */
        if (!s->map.size) unmap_file(s->file[i].map);
        tensor_file_close(&s->file[i]);
    }
    zip_close(&s->archive);
    unmap_file(s->map);
    if (s->safetensors.file) safetensors_close(&s->safetensors);
    free(s->file);
}

/* =================================================================================================
 * Chapter 5. Eras: what Megatron called its tensors
 *
 * The model has not changed since 2019, but the names of its tensors have. An era lists them in the
 * order of the table in chapter 5 of megatron_gpt2.c, once for each weight and its bias: "weight"
 * or "bias" is added. TransformerEngine fuses a LayerNorm with the matrix after it, so its
 * parameters are named after that matrix.
 *
 * The names do not tell the order of the rows of Q, K and V; the checkpoint's version does (chapter
 * 7).
 * ============================================================================================== */

typedef struct {
    const char *when, *embedding, *body; /* prefixes of the embeddings and of everything else */
    const char *name[7];                 /* of each weight and its bias, in the table's order */
} Era;

static const char *const embedding_names[] = {"word_embeddings.", "position_embeddings."};

/* clang-format off */
static const Era eras[] = {
    {"July 2019, flat", "", "transformer.",
     {"input_layernorm.", "attention.query_key_value.", "attention.dense.",
      "post_attention_layernorm.", "mlp.dense_h_to_4h.", "mlp.dense_4h_to_h.", "final_layernorm."}},
    {"October 2019, transformer", "language_model.embedding.", "language_model.transformer.",
     {"input_layernorm.", "attention.query_key_value.", "attention.dense.",
      "post_attention_layernorm.", "mlp.dense_h_to_4h.", "mlp.dense_4h_to_h.", "final_layernorm."}},
    {"January 2021, encoder", "language_model.embedding.", "language_model.encoder.",
     {"input_layernorm.", "self_attention.query_key_value.", "self_attention.dense.",
      "post_attention_layernorm.", "mlp.dense_h_to_4h.", "mlp.dense_4h_to_h.", "final_layernorm."}},
    {"September 2023, encoder", "language_model.embedding.", "language_model.encoder.",
     {"input_norm.", "self_attention.query_key_value.", "self_attention.dense.",
      "post_attention_norm.", "mlp.dense_h_to_4h.", "mlp.dense_4h_to_h.", "final_norm."}},
    {"2023, encoder with TransformerEngine", "language_model.embedding.", "language_model.encoder.",
     {"self_attention.layernorm_qkv.layer_norm_", "self_attention.layernorm_qkv.",
      "self_attention.proj.", "layernorm_mlp.layer_norm_", "layernorm_mlp.fc1_",
      "layernorm_mlp.fc2_", "final_layernorm."}},
    {"Megatron-Core", "embedding.", "decoder.",
     {"input_layernorm.", "self_attention.linear_qkv.", "self_attention.linear_proj.",
      "pre_mlp_layernorm.", "mlp.linear_fc1.", "mlp.linear_fc2.", "final_layernorm."}},
    {"Megatron-Core with TransformerEngine", "embedding.", "decoder.",
     {"self_attention.linear_qkv.layer_norm_", "self_attention.linear_qkv.",
      "self_attention.linear_proj.", "mlp.linear_fc1.layer_norm_", "mlp.linear_fc1.",
      "mlp.linear_fc2.", "final_layernorm."}},
};
/* clang-format on */
enum { N_ERAS = sizeof eras / sizeof *eras, HUGGING_FACE = N_ERAS, WRITTEN_ERA = 2 };

/* The name of a tensor in an era. */
static char *era_name(char name[MAX_NAME], const Era *era, const Spec *spec, size_t layer)
{
    const char *last = strrchr(spec->name, '.') + 1; /* "weight" or "bias" */
    size_t i = (size_t)(spec - specs);
    int is_embedding = i < 2; /* these have no bias */
    const char *own = is_embedding ? embedding_names[i] : era->name[i / 2 - 1];
    const char *prefix = is_embedding ? era->embedding : era->body;
    if (spec->in_layer) snprintf(name, MAX_NAME, "%slayers.%zu.%s%s", prefix, layer, own, last);
    else snprintf(name, MAX_NAME, "%s%s%s", prefix, own, last);
    return name;
}

/* The number of the layer in a name: the first number between two dots, or 0. */
static size_t layer_in_name(const char *name)
{
    for (const char *dot = strchr(name, '.'); dot; dot = strchr(dot + 1, '.')) {
        size_t digits = strspn(dot + 1, "0123456789");
        if (digits && digits < 6 && dot[1 + digits] == '.') return (size_t)atoi(dot + 1);
    }
    return 0;
}

/* Finds out which tensor of the table a view is, and in which era it had this name. */
static void identify(View *v)
{
    const char *name = v->t.name, *plain = strip_prefix(name);
    char candidate[MAX_NAME];
    Tensor t;
    memset(&t, 0, sizeof t);
    v->layer = layer_in_name(name);
    t.layer = v->layer;
    for (v->era = 0; v->era <= N_ERAS; v->era++)
        for (int i = 0; i < N_SPECS; i++) {
            const Era *era = v->era < N_ERAS ? &eras[v->era] : NULL;
            if (era && strncmp(name, era->body, strlen(era->body)) &&
                strncmp(name, era->embedding, strlen(era->embedding)))
                break;
            v->spec = &specs[i];
            t.spec = v->spec;
            if (v->era == HUGGING_FACE && !strcmp(plain, tensor_name(candidate, &t))) return;
            if (era && !strcmp(name, era_name(candidate, era, &specs[i], v->layer))) return;
        }
    v->spec = NULL;
}

static void identify_all(Source *s)
{
    for (size_t i = 0; i < s->files; i++)
        for (size_t j = 0; j < s->file[i].views; j++) identify(&s->file[i].view[j]);
}

/* Is it a copy of the word embedding, for the logits [§3]? The last of several stages holds one;
 * some tools write one although it is not needed. */
static int is_head(const char *name)
{
    static const char *const names[] = {"word_embeddings_for_head.weight", "output_layer.weight",
                                        "language_model.output_layer.weight", "lm_head.weight",
                                        NULL};
    return is_one_of(name, names);
}

/* =================================================================================================
 * Chapter 6. The shape of the model
 *
 * Checkpoints since March 2020 hold the arguments of the training run. Older ones do not tell the
 * number of heads, and no tensor shows it. Then --config must name a config.json, unless the shape
 * is that of a preset.
 * ============================================================================================== */

/* The command line; chapter 12 fills it. */
typedef struct {
    int inspect, pickle, keep_padding, force, json;
    const char *operand[2];
    size_t operands;
    const char *to, *dtype, *config, *tokenizer;
    size_t tp, pp, vocab_size, shard_size;
    double checkpoint_version, qkv_version; /* -1: not given */
    unsigned char given[32];                /* by number in the table */
} Choices;

/* What stands beside the model in a file; 0 if it is absent, or the file has no pickle. */
static Ref find_entry(const TensorFile *file, const char *key)
{
    return file->pickle.nodes ? dict_get(&file->pickle, file->root, key) : 0;
}

/* An argument of the training run; 0 if it is absent or None. */
static Ref find_argument(const TensorFile *file, const char *name)
{
    const Pickle *p = &file->pickle;
    Ref args = find_entry(file, "args"), value = args ? dict_get(p, args, name) : 0;
    return value && p->node[value].type != N_NONE ? value : 0;
}

/* A whole number from 1 to `most`. If it is absent, the fallback; dies if that is 0. */
static size_t count_argument(const TensorFile *file, const char *name, size_t most, size_t fallback)
{
    Ref ref = find_argument(file, name);
    const Node *n = &file->pickle.node[ref];
    if (!ref && fallback) return fallback;
    if (!ref) die("%s: its args have no %s; give --config FILE", file->path, name);
    if (n->type != N_INTEGER || n->is.integer < 1 || (unsigned long long)n->is.integer > most)
        die("%s: args.%s is no whole number from 1 to %zu", file->path, name, most);
    return (size_t)n->is.integer;
}

/* The value of a number, NaN for anything else. */
static double node_value(const Node *n)
{
    if (n->type == N_INTEGER) return (double)n->is.integer;
    return n->type == N_REAL ? n->is.real : NAN;
}

static double real_argument(const TensorFile *file, const char *name, double low, double high,
                            double fallback)
{
    Ref ref = find_argument(file, name);
    if (!ref) return fallback;
    double x = node_value(&file->pickle.node[ref]);
    if (!(x >= low && x <= high))
        die("%s: args.%s is no number from %g to %g", file->path, name, low, high);
    return x;
}

static int flag_argument(const TensorFile *file, const char *name)
{
    Ref ref = find_argument(file, name);
    if (ref && file->pickle.node[ref].type != N_FLAG)
        die("%s: args.%s is neither True nor False", file->path, name);
    return ref && file->pickle.node[ref].is.integer;
}

/* Refuses models that have GPT-2's tensors, or more, but not its arithmetic. */
static void refuse_other_models(const TensorFile *file)
{
    /* clang-format off */
    static const char *const flags[] = {
        "swiglu", "squared_relu", "apply_layernorm_1p", "apply_residual_connection_post_layernorm",
        "untie_embeddings_and_output_weights", "group_query_attention", "multi_latent_attention",
        "use_rotary_position_embeddings"};
    /* clang-format on */
    static const char *const words[][2] = {{"position_embedding_type", "learned_absolute"},
                                           {"normalization", "LayerNorm"}};
    static const char *const counts[] = {"num_experts", "virtual_pipeline_model_parallel_size"};
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
        if (flag_argument(file, flags[i]))
            die("%s: args.%s is True: this is no GPT-2", file->path, flags[i]);
    for (size_t i = 0; i < 2; i++) {
        Ref ref = find_argument(file, words[i][0]);
        if (ref && !is_string(&file->pickle, ref, N_STRING, words[i][1]))
            die("%s: args.%s is not %s: this is no GPT-2", file->path, words[i][0], words[i][1]);
        if (find_argument(file, counts[i]) && count_argument(file, counts[i], SIZE_MAX / 2, 1) > 1)
            die("%s: args.%s is more than 1, which is not supported", file->path, counts[i]);
    }
}

/* The activation as config.json calls it. Until April 2020, all used the tanh formula, unsaid. */
static const char *activation_argument(const TensorFile *file)
{
    int tanh_formula = flag_argument(file, "openai_gelu") || !find_argument(file, "openai_gelu");
    /* the tanh formula, fused with the bias */
    if (flag_argument(file, "bias_gelu_fusion")) return "gelu_fast";
    return tanh_formula ? "gelu_new" : "gelu";
}

static Config config_from_arguments(const TensorFile *file)
{
    size_t C = count_argument(file, "hidden_size", 1 << 17, 0);
    size_t H = count_argument(file, "num_attention_heads", 1 << 12, 0);
    Config c = make_config(count_argument(file, "num_layers", 1 << 12, 0), C, H,
                           count_argument(file, "max_position_embeddings", 1 << 20, 0), 1);
    c.F = count_argument(file, "ffn_hidden_size", 1 << 20, 4 * C);
    c.eps = (real)real_argument(file, "layernorm_epsilon", 1e-12, 1, 1e-5);
    c.attn_pdrop = (real)real_argument(file, "attention_dropout", 0, 0.99, 0.1);
    c.embd_pdrop = c.resid_pdrop = (real)real_argument(file, "hidden_dropout", 0, 0.99, 0.1);
    find_gelu(&c.gelu, activation_argument(file));
    if (C % H)
        die("%s: args.hidden_size %zu is no multiple of args.num_attention_heads %zu", file->path,
            C, H);
    if (count_argument(file, "kv_channels", 1 << 17, C / H) != C / H)
        die("%s: args.kv_channels is not hidden_size / num_attention_heads, as in GPT-2",
            file->path);
    return c;
}

/* The first view of a tensor in a file, by its name in the table; NULL if there is none. */
static const View *find_view(const TensorFile *file, const char *name)
{
    for (size_t i = 0; i < file->views; i++)
        if (file->view[i].spec && !file->view[i].layer && !strcmp(file->view[i].spec->name, name))
            return &file->view[i];
    return NULL;
}

static size_t rows_of(const TensorFile *file, const char *name)
{
    const View *v = find_view(file, name);
    if (!v || !v->t.dims)
        die("%s: it has no tensor that could be a GPT-2's %.20s", file->path, name);
    return v->t.shape[0];
}

/* The shape of the first file's tensors; a preset of as many layers and channels tells the
 * heads. */
static Config config_from_shapes(const TensorFile *file, Layout layout)
{
    size_t L = 0, P = rows_of(file, "wpe.weight"), C = rows_of(file, "h.%zu.ln_1.weight"), H = 0;
    for (size_t i = 0; i < file->views; i++)
        if (file->view[i].spec) L = max_size(L, (file->view[i].layer + 1) * (size_t)layout.pp);
    for (int i = 0; i < N_PRESETS; i++) {
        if (presets[i].L != L || presets[i].C != C || i == 0) continue;
        if (H && H != presets[i].H) H = SIZE_MAX;
        else H = presets[i].H;
    }
    if (!H || H == SIZE_MAX || P > 1 << 20)
        die("%s: it has no args, and its shape (%zu layers, %zu channels) does not tell the "
            "number of heads; give --config FILE",
            file->path, L, C);
    return make_config(L, C, H, P, 1);
}

/* =================================================================================================
 * Chapter 7. The order of the rows of Q, K and V, and the place of every tensor
 *
 * The weight of Q, K and V is one matrix of 3C rows, and over the years its rows have been stored
 * in three orders. With s = 0, 1, 2 for Q, K, V, head h of H, and row j of the D rows of a head,
 * row s H D + h D + j of [Q; K; V] is stored as row
 *
 *     version 0   (s H + h) D + j    version 1   (h D + j) 3 + s    version 2, 3   (h 3 + s) D + j
 *
 * For two heads of two rows each, q01 being row 1 of head 0's Q:
 *
 *     version 0   q00 q01 q10 q11  k00 k01 k10 k11  v00 v01 v10 v11    as Hugging Face: Q, K, V
 *     version 1   q00 k00 v00  q01 k01 v01  q10 k10 v10  q11 k11 v11   row by row
 *     version 2   q00 q01 k00 k01 v00 v01  q10 q11 k10 k11 v10 v11     head by head; 3 as well
 *
 * A rank owns whole heads, with the three parts of each. In versions 1 to 3 the parts of a head are
 * together: the whole matrix is rank 0's above rank 1's. In version 0 it is not: the parts Q of all
 * ranks come first, then the parts K, then the parts V:
 *
 *     version 0   rank 0: q00 q01 k00 k01 v00 v01     rank 1: q10 q11 k10 k11 v10 v11
 *                 joined: q00 q01 q10 q11  k00 k01 k10 k11  v00 v01 v10 v11
 *     version 2   rank 0: q00 q01 k00 k01 v00 v01     rank 1: q10 q11 k10 k11 v10 v11
 *                 joined: q00 q01 k00 k01 v00 v01  q10 q11 k10 k11 v10 v11
 *
 * If a file is read in the wrong order, all shapes are right, but the model writes garbage.
 *
 * The other tensors are cut as in the paper [§3]. The table says how: COLUMN_PARALLEL (h_to_4h and
 * the word embedding) or ROW_PARALLEL (dense and 4h_to_h). A WHOLE tensor is on every rank, and all
 * copies must agree. For two ranks:
 *
 *     COLUMN_PARALLEL                                ROW_PARALLEL
 *     rank 0   rank 1   joined                       rank 0   rank 1   joined
 *      a b      e f      a b                          a b      c d      a b c d
 *      c d      g h      c d                          e f      g h      e f g h
 *                        e f
 *                        g h
 *
 * The vocabulary is padded to a multiple of 128 t, with rows that no token uses. The padding comes
 * last: of 380 tokens on two ranks, rank 0 holds 0 .. 255, and rank 1 holds 256 .. 379 and 132 rows
 * of padding.
 * ============================================================================================== */

/* How a model is laid out in files. */
typedef struct {
    Layout layout;
    int version;      /* order of the rows of Q, K, V */
    int hugging_face; /* 1: one rank holds all, and Conv1D's matrices are [in, out] */
    size_t padded;    /* rows of the word embedding, on all tensor ranks together */
} Arrangement;

/* The row of a rank's stored matrix, of `heads` heads of D rows, that holds row i of [Q; K; V]. */
static size_t qkv_row(int version, size_t heads, size_t D, size_t i)
{
    size_t s = i / (heads * D), h = i / D % heads, j = i % D; /* part, head, row of the head */
    if (version == 0) return i;
    return version == 1 ? (h * D + j) * 3 + s : (h * 3 + s) * D + j;
}

/* The inverse: the row of [Q; K; V] that row i of the stored matrix holds. With two heads of two
 * rows, row 4 of version 2 is v00, row 8 of [Q; K; V]: i / D % 3 = 2 is the part, i / (3 D) = 0 the
 * head, i % D = 0 the row. */
static size_t qkv_row_stored(int version, size_t heads, size_t D, size_t i)
{
    if (version == 0) return i;
    if (version == 1) return i % 3 * heads * D + i / 3;
    return i / D % 3 * heads * D + i / (3 * D) * D + i % D;
}

/* The inverse of whole_row(): the local row, and the rank that holds it. */
static size_t local_row(const Tensor *t, size_t row, int *rank)
{
    size_t third = t->rows / 3, local_third = t->local_rows / 3; /* the rows of Q, of K or of V */
    *rank = 0;
    if (t->spec->split == COLUMN_PARALLEL) {
        *rank = (int)(row / t->local_rows);
        return row % t->local_rows;
    }
    if (t->spec->split != QKV) return row;
    *rank = (int)(row % third / local_third);
    return row / third * local_third + row % local_third;
}

/* The tensors of one rank of an arrangement; the caller frees them. */
static Tensor *list_rank(size_t *n, const Config *c, const Arrangement *a, int rank)
{
    Tensor *list = (Tensor *)xcalloc(list_tensors(NULL, NULL, c, a->layout, rank), sizeof *list);
    *n = list_tensors(list, NULL, c, a->layout, rank);
    for (size_t i = 0; i < *n; i++)
        if (list[i].spec->rows == DIM_V) {
            list[i].local_rows = a->padded / (size_t)a->layout.tp;
            list[i].n = list[i].local_rows * list[i].local_cols;
        }
    return list;
}

/* The tensors of a rank. The table begins with the embeddings: the word embedding is tensor 0 of
 * the first and the last stage, the position embedding is tensor 1 of the first. */
typedef struct {
    Tensor *tensor;
    const View **view; /* of each, where the input has it */
    size_t tensors;
    const View *head; /* a copy of the word embedding, if there is one */
} Part;

typedef struct {
    const char *path;
    Config config;
    const char *gelu; /* as in config.json */
    Arrangement how;
    int untied;    /* config.json says so: then there must be an equal lm_head */
    size_t stated; /* tokens without padding, as the input states; SIZE_MAX: it does not */
    Part *part;    /* of each rank */
} Model;

/* The number of a rank's tensor of this spec and layer; part->tensors if there is none. */
static size_t find_tensor(const Part *part, const Spec *spec, size_t layer)
{
    size_t i = 0, in_layer = 0;
    for (int j = 0; j < N_SPECS; j++) in_layer += (size_t)specs[j].in_layer;
    while (i < part->tensors && part->tensor[i].spec != spec) i++; /* in the rank's first layer */
    if (i < part->tensors) i += (layer - part->tensor[i].layer) * in_layer;
    if (i >= part->tensors || part->tensor[i].spec != spec) return part->tensors;
    return part->tensor[i].layer == layer ? i : part->tensors;
}

/* The strides of a view's rows and columns as [out, in]. */
static void view_strides(size_t *row, size_t *col, const View *v, const Tensor *t, int hugging_face)
{
    int transposed = hugging_face && t->spec->conv1d;
    *row = v->stride[transposed];
    *col = v->t.dims == 2 ? v->stride[!transposed] : 0;
}

static void check_shape(const View *v, const Tensor *t, int hugging_face)
{
    int transposed = hugging_face && t->spec->conv1d;
    size_t shape[2] = {transposed ? t->local_cols : t->local_rows,
                       transposed ? t->local_rows : t->local_cols};
    size_t dims = t->spec->cols == ONE ? 1 : 2;
    char seen[SHAPE_TEXT], wanted[SHAPE_TEXT];
    if (v->t.dims != dims || memcmp(v->t.shape, shape, dims * sizeof *shape))
        die("%s: tensor %.120s is %s, but the model's shape asks for %s", v->t.path, v->t.name,
            shape_text(seen, v->t.dims, v->t.shape), shape_text(wanted, dims, shape));
    if (v->t.dtype > BF16)
        die("%s: tensor %.120s is of type %s: real numbers are expected", v->t.path, v->t.name,
            dtype_name[v->t.dtype]);
}

/* Are two views equal, bit for bit? */
static int same_values(const View *a, const View *b)
{
    size_t size = dtype_size[a->t.dtype], cols = a->t.dims == 2 ? a->t.shape[1] : 1;
    if (a->t.dtype != b->t.dtype || a->t.dims != b->t.dims) return 0;
    if (a->t.dims > 2 || memcmp(a->t.shape, b->t.shape, a->t.dims * sizeof *a->t.shape)) return 0;
    size_t width = cols == 1 || (a->stride[1] == 1 && b->stride[1] == 1) ? cols : 1;
    for (size_t i = 0; i < a->t.n; i += width) {
        size_t row = i / cols, col = i % cols;
        const char *x = a->t.data + (row * a->stride[0] + col * a->stride[1]) * size;
        if (memcmp(x, b->t.data + (row * b->stride[0] + col * b->stride[1]) * size, width * size))
            return 0;
    }
    return 1;
}

static void refuse_difference(const View *a, const View *b, const char *why)
{
    if (a && b && a != b && !same_values(a, b))
        die("%s: tensor %.120s differs from %.120s of %s: %s", a->t.path, a->t.name, b->t.name,
            b->t.path, why);
}

/* Finds the tensor of this rank for every view of a file. */
static void place_views(Model *m, int rank, const TensorFile *file)
{
    Part *part = &m->part[rank];
    Layout layout = m->how.layout;
    size_t first = (size_t)pp_rank(layout, rank) * (m->config.L / (size_t)layout.pp);
    for (size_t i = 0; i < file->views; i++) {
        const View *v = &file->view[i];
        size_t at = part->tensors;
        if (v->spec && (v->era == HUGGING_FACE) == m->how.hugging_face)
            at = find_tensor(part, v->spec, v->spec->in_layer ? first + v->layer : 0);
        if (is_mask(strip_prefix(v->t.name))) continue;
        if (is_head(v->t.name)) {
            refuse_difference(v, part->head, "both would make the logits");
            part->head = v;
        } else if (at == part->tensors)
            die("%s: tensor %.120s has no place in a GPT-2 of this shape", file->path, v->t.name);
        else if (part->view[at])
            die("%s: tensor %.120s is there twice, also as %.120s", file->path, v->t.name,
                part->view[at]->t.name);
        else part->view[at] = v;
    }
}

/* The word embedding must equal its copies: those on the same rank, and that on the last stage. */
static void check_heads(Model *m)
{
    Layout s = m->how.layout;
    for (int rank = 0; rank < s.tp * s.pp; rank++) {
        Part *part = &m->part[rank];
        size_t wte = find_tensor(part, &specs[0], 0);
        if (wte == part->tensors) continue;
        if (!part->view[wte] && pp_rank(s, rank) > 0) part->view[wte] = part->head;
        refuse_difference(part->head, part->view[wte], "untied embeddings are not supported");
        refuse_difference(part->view[wte], m->part[tp_rank(s, rank)].view[0],
                          "the last stage must hold a copy of the first one's");
    }
}

/* Every tensor must be there, have the shape that is asked for, and be the same on all its
 * ranks. */
static void check_parts(const Model *m, const Source *source)
{
    Layout s = m->how.layout;
    char name[NAME_SIZE];
    for (int rank = 0; rank < s.tp * s.pp; rank++) {
        const Part *part = &m->part[rank], *first = &m->part[pp_rank(s, rank) * s.tp];
        for (size_t i = 0; i < part->tensors; i++) {
            const Tensor *t = &part->tensor[i];
            const View *v = part->view[i], *other = first->view[i];
            if (!v)
                die("%s: the tensor that Hugging Face calls %s is missing",
                    m->how.hugging_face ? m->path : source->file[rank].path, tensor_name(name, t));
            check_shape(v, t, m->how.hugging_face);
            if (v->t.dtype != other->t.dtype)
                die("%s: tensor %.120s is of type %s, but of type %s in %s", v->t.path, v->t.name,
                    dtype_name[v->t.dtype], dtype_name[other->t.dtype], other->t.path);
            if (t->spec->split == WHOLE)
                refuse_difference(v, other, "these are shards of different checkpoints");
        }
    }
}

/* ---- Opening --------------------------------------------------------------------------------- */

/* The version tells the order of the rows of Q, K, V. If it is absent, it is 0. But Megatron of
 * September 2020 wrote versions 1 and 2 without saying so; its args have a bias_gelu_fusion. */
static int find_version(const TensorFile *file, double chosen)
{
    const Pickle *p = &file->pickle;
    Ref ref = find_entry(file, "checkpoint_version");
    double version = node_value(&p->node[ref]);
    if (ref && version != 0 && version != 1 && version != 2 && version != 3)
        die("%s: its checkpoint_version is none of 0, 1, 2, 3", file->path);
    if (ref && chosen >= 0 && version != chosen)
        die("%s: its checkpoint_version is %g, not %g", file->path, version, chosen);
    if (!ref && chosen < 0 && find_argument(file, "bias_gelu_fusion"))
        die("%s: it has no checkpoint_version, and is of a time when the order of its Q, K, V "
            "changed: give --checkpoint-version 0, 1 or 2",
            file->path);
    return (int)(ref ? version : fmax(chosen, 0));
}

/* Is a value the same in two files? Values that are no numbers are not compared. */
static int same_nodes(const Pickle *p, Ref a, const Pickle *q, Ref b)
{
    const Node *x = &p->node[a], *y = &q->node[b];
    if (!a || !b || x->type != y->type) return !a && !b;
    /* is.integer and is.real share their bits */
    return (x->type != N_INTEGER && x->type != N_REAL) || x->is.integer == y->is.integer;
}

static int compare_files(const void *a, const void *b)
{
    Map x = (*(const TensorFile *const *)a)->map, y = (*(const TensorFile *const *)b)->map;
    if (x.size == y.size) return memcmp(x.data, y.data, x.size);
    return x.size > y.size ? 1 : -1;
}

static void refuse_copies(const Source *s)
{
    const TensorFile **list = (const TensorFile **)xcalloc(s->files, sizeof *list);
    for (size_t i = 0; i < s->files; i++) list[i] = &s->file[i];
    qsort(list, s->files, sizeof *list, compare_files);
    for (size_t i = 1; i < s->files; i++)
        if (!compare_files(&list[i - 1], &list[i]))
            die("%s is a copy of %s, although ranks hold different parts", list[i]->path,
                list[i - 1]->path);
    free(list);
}

/* All rank files must be of one run and of one iteration. */
static void check_agreement(const Source *s)
{
    /* clang-format off */
    static const char *const names[] = {
        "iteration", "checkpoint_version", /* and these of the args: */
        "num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings",
        "ffn_hidden_size", "layernorm_epsilon", "make_vocab_size_divisible_by", "orig_vocab_size"};
    /* clang-format on */
    const TensorFile *first = &s->file[0];
    for (size_t rank = 0; rank < s->files; rank++) {
        const TensorFile *file = &s->file[rank];
        const char *differs = NULL;
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
            Ref a = i < 2 ? find_entry(first, names[i]) : find_argument(first, names[i]);
            Ref b = i < 2 ? find_entry(file, names[i]) : find_argument(file, names[i]);
            if (!same_nodes(&first->pickle, a, &file->pickle, b)) differs = names[i];
        }
        if (differs)
            die("%s and %s disagree on %s: they are of different checkpoints", first->path,
                file->path, differs);
    }
}

/* The args of a rank file must agree with its place among the folders. */
static void check_ranks(const Source *s)
{
    size_t tp = (size_t)s->layout.tp, pp = (size_t)s->layout.pp;
    for (size_t rank = 0; rank < s->files; rank++) {
        const TensorFile *file = &s->file[rank];
        /* the first is its name until October 2020 */
        size_t stated_tp = count_argument(file, "model_parallel_size", 1 << 20, tp);
        stated_tp = count_argument(file, "tensor_model_parallel_size", 1 << 20, stated_tp);
        size_t stated_pp = count_argument(file, "pipeline_model_parallel_size", 1 << 20, pp);
        if (stated_tp != tp || stated_pp != pp)
            die("%s: its args tell of %zu tensor ranks x %zu stages, but here are %zu x %zu; "
                "name the folder that holds all",
                file->path, stated_tp, stated_pp, tp, pp);
        /* Hugging Face's script writes rank 0 into every file, but no world_size */
        Ref own = find_argument(file, "world_size") ? find_argument(file, "rank") : 0;
        if (own && size_of_node(&file->pickle, own, "args.rank") % tp != rank % tp)
            die("%s: its args are of rank %lld: it does not belong into this folder", file->path,
                file->pickle.node[own].is.integer);
    }
}

/* The shape from --config, the folder's config.json, the args, or the tensors. */
static void find_shape(Model *m, const Source *source, const Choices *o)
{
    const TensorFile *first = &source->file[0];
    int has_args = find_argument(first, "num_layers") != 0, tied = 1;
    for (size_t i = 0; i < source->files; i++) refuse_other_models(&source->file[i]);
    if (o->config || source->folder) {
        if (o->config) m->config = read_config_file(o->config, &tied);
        else m->config = read_config(source->path, &tied);
        m->gelu = m->config.gelu == GELU_ERF ? "gelu" : "gelu_new";
        if (!tied && !m->how.hugging_face)
            die("%s: \"tie_word_embeddings\" is false, but Megatron's GPT-2 ties them", o->config);
        m->untied = !tied;
        m->stated = m->config.V;
    } else {
        if (has_args) m->config = config_from_arguments(first);
        else m->config = config_from_shapes(first, source->layout);
        m->gelu = activation_argument(first);
        m->stated = count_argument(first, "orig_vocab_size", SIZE_MAX / 2, SIZE_MAX);
    }
    Config *c = &m->config, a = has_args ? config_from_arguments(first) : *c;
    if (a.L != c->L || a.C != c->C || a.H != c->H || a.F != c->F || a.P != c->P)
        die("%s: its shape is not that of the args in %s", o->config, first->path);
    size_t tp = (size_t)source->layout.tp, pp = (size_t)source->layout.pp;
    if (c->H % tp || c->F % tp || c->L % pp)
        die("%s: %zu heads, an MLP of width %zu and %zu layers cannot have been cut for "
            "%zu tensor ranks x %zu stages",
            m->path, c->H, c->F, c->L, tp, pp);
}

/* The number of a tokenizer's tokens. With padding, they must make the rows of the model: otherwise
 * the tokenizer is of another model. */
static size_t count_tokens(const TensorFile *file, const Model *m, const char *folder)
{
    Tokenizer *t = tokenizer_open(folder);
    size_t V = t->vocabulary, multiple = (size_t)m->how.layout.tp;
    multiple *= count_argument(file, "make_vocab_size_divisible_by", 1 << 20, 128);
    if (m->stated != V && round_up(V, multiple) != m->how.padded)
        die("%s: there are %zu rows for tokens, but the tokenizer's %zu would be padded to a "
            "multiple of %zu: give --vocab-size N",
            m->path, m->how.padded, V, multiple);
    tokenizer_close(t);
    return V;
}

/* How many rows of the word embedding are tokens. */
static size_t find_vocabulary(const TensorFile *file, const Model *m, const Choices *o)
{
    size_t padded = m->how.padded, V = m->stated, tokens = SIZE_MAX;
    if (o->vocab_size) V = o->vocab_size;
    if (o->keep_padding) V = padded;
    if (o->tokenizer && !o->vocab_size) tokens = count_tokens(file, m, o->tokenizer);
    if (V == SIZE_MAX) V = tokens;
    if (V == SIZE_MAX && padded == padded_vocab(50257, m->how.layout.tp)) V = 50257; /* GPT-2's */
    if (V == SIZE_MAX)
        die("%s: %zu tokens with padding, and how many are real is not told: give "
            "--vocab-size N, --tokenizer DIR or --keep-padding",
            m->path, padded);
    if (V > padded)
        die("%s: there are %zu tokens, fewer than the %zu that are asked for", m->path, padded, V);
    return V;
}

static void model_close(Model *m)
{
    for (int rank = 0; m->part && rank < m->how.layout.tp * m->how.layout.pp; rank++) {
        free(m->part[rank].tensor);
        free(m->part[rank].view);
    }
    free(m->part);
}

/* Finds the model in the input, and checks all of it but the values. */
static void model_open(Model *m, Source *source, const Choices *o)
{
    TensorFile *first = &source->file[0];
    memset(m, 0, sizeof *m);
    identify_all(source);
    const View *wte = find_view(first, "wte.weight");
    m->path = source->path;
    m->how.layout = source->layout;
    m->how.hugging_face = source->folder || (wte && wte->era == HUGGING_FACE);
    if (!m->how.hugging_face) {
        m->how.version = find_version(first, o->checkpoint_version);
        check_agreement(source);
        refuse_copies(source);
        check_ranks(source);
    }
    find_shape(m, source, o);
    size_t tp = (size_t)source->layout.tp, ranks = tp * (size_t)source->layout.pp;
    m->how.padded = source->folder ? m->stated : rows_of(first, "wte.weight") * tp;
    m->config.V = find_vocabulary(first, m, o);
    m->part = (Part *)xcalloc(ranks, sizeof *m->part);
    for (size_t rank = 0; rank < ranks; rank++) {
        Part *part = &m->part[rank];
        size_t wanted = list_tensors(NULL, NULL, &m->config, m->how.layout, (int)rank);
        size_t views = source->file[rank].views;
        /* so that a few bytes cannot ask for a long list */
        if (!m->how.hugging_face && 2 * views + 64 < wanted)
            die("%s: it holds %zu tensors, but the shape of the model asks for %zu",
                source->file[rank].path, views, wanted);
        part->tensor = list_rank(&part->tensors, &m->config, &m->how, (int)rank);
        part->view = (const View **)xcalloc(part->tensors, sizeof *part->view);
    }
    for (size_t i = 0; i < source->files; i++)
        place_views(m, m->how.hugging_face ? 0 : (int)i, &source->file[i]);
    check_heads(m);
    check_parts(m, source);
    if (m->untied && !m->part[0].head)
        die("%s: \"tie_word_embeddings\" is false, but lm_head.weight is missing", m->path);
}

/* =================================================================================================
 * Chapter 8. The arithmetic of all conversions
 *
 * An arrangement answers one question: where is element (row, column) of the whole matrix [out,
 * in], with Q, K, V in Hugging Face's order? On which rank, in which row and column there, at which
 * address? A conversion asks this twice, for the output and for the input. So one function serves
 * both directions, any split, any version.
 *
 * Why are Hugging Face's matrices transposed? OpenAI wrote the layer as a convolution of width 1,
 * so W is [in, out] and y = x W. Megatron uses PyTorch's Linear: W is [out, in], and y = x W^T. The
 * numbers are the same, in another order:
 *
 *     [out, in] = [2, 3]   a b c     in memory a b c d e f     next output: +3, next input: +1
 *                          d e f
 *     [in, out] = [3, 2]   a d       in memory a d b e c f     next output: +1, next input: +2
 *                          b e
 *                          c f
 * ============================================================================================== */

static uint16_t float_to_bf16(float x) /* to nearest, ties to even; never finite if x is not */
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((isfinite(x) ? bits + 0x7FFF + (bits >> 16 & 1) : bits) >> 16);
}

static uint16_t float_to_half(float x) /* the same */
{
    uint32_t bits, sign, rest;
    memcpy(&bits, &x, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7FFFFFFF;
    if (bits >= 0x47800000) return (uint16_t)(sign | 0x7C00); /* 65536 and more */
    if (bits >= 0x38800000) { /* normal: from 2^-14 up; 65520 and more round to infinity */
        rest = bits + 0xFFF + (bits >> 13 & 1);
        return (uint16_t)(sign | (rest - 0x38000000) >> 13);
    }
    float scaled = fabsf(x) * 0x1p24f + 0x1p23f; /* adding 2^23 rounds to multiples of 2^-24 */
    memcpy(&bits, &scaled, 4);
    return (uint16_t)(sign | (bits & 0x7FFFFF));
}

/* Rounds a double to a float, and sets the float's last bit if it is not exact. Rounding that float
 * to 16 bits then gives the same as rounding the double once. */
static float round_to_odd(double x)
{
    float y = (float)x;
    uint32_t bits;
    memcpy(&bits, &y, 4);
    if (!isfinite(y) || y == x) return y;
    if (fabs((double)y) > fabs(x)) bits--;
    bits |= 1;
    memcpy(&y, &bits, 4);
    return y;
}

/* Stores n values as another type. */
static void store_values(char *to, Dtype dtype, const StoredTensor *from, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        double y;
        if (from->dtype == F64) memcpy(&y, from->data + 8 * i, 8);
        else y = (double)stored_value(from, i);
        if (dtype == F64) memcpy(to + 8 * i, &y, 8);
        else if (dtype == F32) {
            float x = (float)y;
            memcpy(to + 4 * i, &x, 4);
        } else {
            float x = round_to_odd(y);
            uint16_t half = dtype == F16 ? float_to_half(x) : float_to_bf16(x);
            memcpy(to + 2 * i, &half, 2);
        }
    }
}

/* One tensor of the input, in parts: number `index` on ranks first, first + 1, .. */
typedef struct {
    const Model *m;
    int first;
    size_t index;
} Input;

static const View *input_view(const Input *in, int r)
{
    return in->m->part[in->first + r].view[in->index];
}

static Input find_input(const Model *m, const Tensor *t)
{
    size_t depth = m->config.L / (size_t)m->how.layout.pp, stage = t->layer / depth;
    if (!t->spec->in_layer)
        stage = on_stage(t->spec, 0, m->how.layout.pp) ? 0 : (size_t)m->how.layout.pp - 1;
    int first = (int)stage * m->how.layout.tp;
    Input in = {m, first, find_tensor(&m->part[first], t->spec, t->layer)};
    return in;
}

/* The side of a block: its elements in the input and in the output fit into the first cache. */
enum { SIDE = 64 };

/* A block of the output: element (i, j) comes from element row[i] + j * step of a tensor of the
 * input, and goes to element i * to_row + j * to_col. */
typedef struct {
    size_t rows, cols, to_row, to_col;
    size_t row[SIDE], step;
} Block;

/* Copies a block in tiles of 16 x 16, which stay in the first cache even if rows are a multiple of
 * a page apart. The inner loop writes to neighbouring addresses. */
static inline void move_block(char *to, const char *from, const Block *b, size_t size)
{
    enum { TILE = 16 };
    for (size_t top = 0; top < b->rows; top += TILE)
        for (size_t left = 0; left < b->cols; left += TILE) {
            size_t bottom = min_size(b->rows, top + TILE), right = min_size(b->cols, left + TILE);
            if (b->to_row == 1)
                for (size_t j = left; j < right; j++)
                    for (size_t i = top; i < bottom; i++)
                        memcpy(to + (i + j * b->to_col) * size,
                               from + (b->row[i] + j * b->step) * size, size);
            else
                for (size_t i = top; i < bottom; i++)
                    for (size_t j = left; j < right; j++)
                        memcpy(to + (i * b->to_row + j) * size,
                               from + (b->row[i] + j * b->step) * size, size);
        }
}

static void copy_block(char *to, const char *from, const Block *b, size_t size)
{
    if (b->to_col == 1 && b->step == 1)
        for (size_t i = 0; i < b->rows; i++)
            memcpy(to + i * b->to_row * size, from + b->row[i] * size, b->cols * size);
    else if (size == 2) move_block(to, from, b, 2);
    else if (size == 4) move_block(to, from, b, 4);
    else move_block(to, from, b, 8);
}

/* Copies columns col .. col + n - 1 of some rows of the whole tensor: it is cut by rows or by
 * columns, not both. */
static void gather_rows(char *to, const Input *in, const size_t *row, size_t rows, size_t to_row,
                        size_t to_col, size_t col, size_t n)
{
    const Model *m = in->m;
    const Tensor *t = &m->part[in->first].tensor[in->index];
    size_t heads = m->config.H / (size_t)m->how.layout.tp, row_stride;
    size_t size = dtype_size[input_view(in, 0)->t.dtype];
    Block b = {0, 0, to_row, to_col, {0}, 0};
    for (size_t i = 0; i < rows; i += b.rows)
        for (size_t done = 0; done < n; done += b.cols) {
            size_t x = col + done;
            int rank, other;
            local_row(t, row[i], &rank);
            if (t->spec->split == ROW_PARALLEL) rank = (int)(x / t->local_cols);
            x -= whole_col(t, rank);
            b.cols = min_size(n - done, t->local_cols - x);
            const View *v = input_view(in, rank);
            view_strides(&row_stride, &b.step, v, t, m->how.hugging_face);
            for (b.rows = 0; i + b.rows < rows; b.rows++) {
                size_t local = local_row(t, row[i + b.rows], &other);
                if (t->spec->split != ROW_PARALLEL && other != rank) break;
                if (t->spec->split == QKV)
                    local = qkv_row(m->how.version, heads, m->config.C / m->config.H, local);
                b.row[b.rows] = local * row_stride + x * b.step;
            }
            copy_block(to + (i * to_row + done * to_col) * size, v->t.data, &b, size);
        }
}

/* Is every number finite? Those that are not have an exponent of all ones. */
static int all_finite(const char *data, Dtype dtype, size_t n)
{
    int bad = 0;
    uint16_t half, exponent = dtype == F16 ? 0x7C00 : 0x7F80;
    uint32_t single;
    double x;
    if (dtype == F64)
        for (size_t i = 0; i < n; i++) {
            memcpy(&x, data + 8 * i, 8);
            bad |= !isfinite(x);
        }
    else if (dtype == F32)
        for (size_t i = 0; i < n; i++) {
            memcpy(&single, data + 4 * i, 4);
            bad |= (single & 0x7F800000) == 0x7F800000;
        }
    else
        for (size_t i = 0; i < n; i++) {
            memcpy(&half, data + 2 * i, 2);
            bad |= (half & exponent) == exponent;
        }
    return !bad;
}

/* Fills rows first .. last - 1 of the matrix that tensor rank r of an arrangement stores. Padding
 * of the vocabulary repeats the last token, as in Hugging Face's script: <|endoftext|>, which is
 * improbable within a text. Zeros would be worse, because Megatron's softmax includes the padding:
 * it would have logits of 0, and GPT-2's are far below 0. */
static void fill_rows(char *to, const Input *in, const Tensor *t, const Arrangement *a, int r,
                      size_t first, size_t last)
{
    int transposed = a->hugging_face && t->spec->conv1d;
    size_t heads = in->m->config.H / (size_t)a->layout.tp, D = in->m->config.C / in->m->config.H;
    size_t row[SIDE], size = dtype_size[input_view(in, 0)->t.dtype];
    size_t begin = transposed ? 0 : first;
    size_t end = transposed ? t->local_rows : last;
    for (size_t top = begin; top < end; top += SIDE) {
        size_t n = min_size(SIDE, end - top);
        for (size_t i = 0; i < n; i++) {
            size_t local = top + i;
            if (t->spec->split == QKV) local = qkv_row_stored(a->version, heads, D, local);
            row[i] = min_size(whole_row(t, r, local), t->rows - 1);
        }
        if (transposed)
            gather_rows(to + top * size, in, row, n, 1, t->local_rows, whole_col(t, r) + first,
                        last - first);
        else
            gather_rows(to + (top - begin) * t->local_cols * size, in, row, n, t->local_cols, 1,
                        whole_col(t, r), t->local_cols);
    }
}

/* A tensor's place in a file, and the CRC-32 of its bytes there. */
typedef struct {
    Dtype dtype;
    size_t at;
    uint32_t crc;
} Output;

static void write_at(const char *path, int fd, const char *data, size_t n, size_t at)
{
    while (n) {
        ssize_t written = pwrite(fd, data, n, (off_t)at);
        if (written < 0 && errno != EINTR) die("cannot write %s: %s", path, strerror(errno));
        if (written <= 0) continue;
        data += written;
        at += (size_t)written;
        n -= (size_t)written;
    }
}

/* Writes the part of a tensor that tensor rank r of an arrangement stores, some rows at a time, so
 * that they stay in the cache. */
static void write_tensor(const char *path, int fd, Output *out, const Tensor *t,
                         const Arrangement *a, int r, const Model *m, int want_crc)
{
    Input in = find_input(m, t);
    StoredTensor from = input_view(&in, 0)->t;
    Dtype dtype = out->dtype;
    int transposed = a->hugging_face && t->spec->conv1d;
    size_t rows = transposed ? t->local_cols : t->local_rows;
    size_t cols = transposed ? t->local_rows : t->local_cols;
    size_t row_size = cols * dtype_size[dtype];
    size_t step = min_size(rows, max_size((1 << 19) / row_size, 16));
    char *values = (char *)xcalloc(step * cols, dtype_size[from.dtype]), *bytes = values;
    char name[NAME_SIZE];
    if (dtype != from.dtype) bytes = (char *)xcalloc(step, row_size);
    from.data = values;
    for (size_t first = 0; first < rows; first += step) {
        size_t n = min_size(step, rows - first);
        fill_rows(values, &in, t, a, r, first, first + n);
        if (bytes != values) store_values(bytes, dtype, &from, n * cols);
        if (!all_finite(bytes, dtype, n * cols))
            die("%s: %s has a value that is NaN, infinite or too large for %s", from.path,
                tensor_name(name, t), dtype_name[dtype]);
        if (want_crc) out->crc = (uint32_t)crc32_z(out->crc, (const Bytef *)bytes, n * row_size);
        write_at(path, fd, bytes, n * row_size, out->at + first * row_size);
    }
    if (bytes != values) free(bytes);
    free(values);
}

/* Writes n tensors to their places in a file, each on one core. */
static void write_tensors(const char *path, FILE *f, Output *out, const Tensor *list, size_t n,
                          const Arrangement *a, int r, const Model *m, int want_crc)
{
#pragma omp parallel for schedule(dynamic)
    for (size_t i = 0; i < n; i++)
        write_tensor(path, fileno(f), &out[i], &list[i], a, r, m, want_crc);
}

/* =================================================================================================
 * Chapter 9. Writing a Hugging Face folder
 * ============================================================================================== */

/* A full disk shows here. There is no fsync(): after a crash, a conversion can be repeated. */
static void close_file(FILE *f, const char *path)
{
    int failed = ferror(f);
    if (fclose(f) || failed) die("cannot write %s: %s", path, strerror(errno));
}

static void write_text(const char *folder, const char *name, const char *text)
{
    char path[PATH_MAX];
    FILE *f = create_file(join_path(path, folder, name));
    fputs(text, f);
    close_file(f, path);
}

static FILE *open_memory(char **text, size_t *size)
{
    FILE *f = open_memstream(text, size);
    if (!f) die("out of memory");
    return f;
}

/* The type to write: the input's, unless --dtype names another. */
static Dtype output_dtype(const Choices *o, const Model *m, const Tensor *t)
{
    Input in = find_input(m, t);
    for (int i = F32; i <= BF16; i++)
        if (!strcmp(o->dtype, type_names[i].option)) return (Dtype)i;
    return input_view(&in, 0)->t.dtype;
}

/* What has been written, for the message at the end. */
typedef struct {
    size_t files, tensors, bytes;
} Written;

/* Writes n tensors into one safetensors file, with the types in `out`. */
static void write_safetensors(const char *path, const Tensor *list, Output *out, size_t n,
                              const Arrangement *a, const Model *m)
{
    char *header = NULL, shape_shown[SHAPE_TEXT], key[NAME_SIZE];
    size_t size = 0, begin = 0;
    FILE *text = open_memory(&header, &size), *f = create_file(path);
    fprintf(text, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (size_t i = 0; i < n; i++) {
        size_t shape[2], dims = stored_shape(shape, &list[i]);
        size_t end = begin + list[i].n * dtype_size[out[i].dtype];
        fprintf(text, ",\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
                stored_name(key, WEIGHTS, &list[i]), dtype_name[out[i].dtype],
                shape_text(shape_shown, dims, shape), begin, end);
        out[i].at = begin;
        begin = end;
    }
    fputc('}', text);
    fflush(text);
    /* so that the tensors start on a cache line */
    fprintf(text, "%*s", (int)((64 - (8 + size) % 64) % 64), "");
    if (fclose(text)) die("out of memory");
    put(f, size, 8);
    fwrite(header, 1, size, f);
    for (size_t i = 0; i < n; i++) out[i].at += 8 + size;
    write_tensors(path, f, out, list, n, a, 0, m, 0);
    free(header);
    close_file(f, path);
}

/* Which token ends a text is known of GPT-2's vocabulary only. */
static void write_config(const char *folder, const Model *m, Dtype dtype)
{
    size_t size;
    int end = m->config.V > 50256 ? 50256 : -1;
    char *text = config_text_as(&size, &m->config, m->gelu, type_names[dtype].torch, end);
    write_text(folder, "config.json", text);
    free(text);
}

/* Writes config.json and model.safetensors. If that file would be too large, writes shards and an
 * index of their tensors. */
static Written write_hugging_face(const char *folder, const Model *m, const Choices *o)
{
    Arrangement a = {{1, 1, 1}, 0, 1, m->config.V};
    Written w = {0, 0, 0};
    size_t size, used = 0;
    char *text = NULL, path[PATH_MAX], name[64], key[NAME_SIZE];
    Tensor *list = list_rank(&w.tensors, &m->config, &a, 0);
    Output *out = (Output *)xcalloc(w.tensors, sizeof *out);
    /* the first tensor of each file; at the end, the number of tensors */
    size_t *first = (size_t *)xcalloc(w.tensors + 1, sizeof *first);
    for (size_t i = 0; i < w.tensors; i++) {
        out[i].dtype = output_dtype(o, m, &list[i]);
        size_t bytes = list[i].n * dtype_size[out[i].dtype];
        if (!i || used + bytes > o->shard_size * 1000000) {
            first[w.files++] = i;
            used = 0;
        }
        used += bytes;
        w.bytes += bytes;
    }
    first[w.files] = w.tensors;
    write_config(folder, m, out[0].dtype);
    FILE *index = open_memory(&text, &size);
    fprintf(index, "{\"metadata\": {\"total_size\": %zu}, \"weight_map\": {", w.bytes);
    for (size_t i = 0; i < w.files; i++) {
        if (w.files == 1) snprintf(name, sizeof name, "model.safetensors");
        else snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", i + 1, w.files);
        write_safetensors(join_path(path, folder, name), list + first[i], out + first[i],
                          first[i + 1] - first[i], &a, m);
        for (size_t j = first[i]; j < first[i + 1]; j++)
            fprintf(index, "%s\"%s\": \"%s\"", j ? ", " : "", stored_name(key, WEIGHTS, &list[j]),
                    name);
    }
    fputs("}}\n", index);
    if (fclose(index)) die("out of memory");
    if (w.files > 1) write_text(folder, "model.safetensors.index.json", text);
    free(text);
    free(first);
    free(out);
    free(list);
    return w;
}

/* =================================================================================================
 * Chapter 10. Writing a Megatron checkpoint
 *
 * What torch.save would write: for each rank a zip container whose pickle is the program that
 * builds
 *
 *     {'args': Namespace(..), 'checkpoint_version': 3.0, 'iteration': 0,
 *      'model': {'language_model': {'embedding': {'word_embeddings': {'weight': tensor}, ..},
 *                                   'encoder': {'layers.0.input_layernorm.weight': tensor, ..}},
 *                'word_embeddings_for_head': {'weight': tensor}}}
 *
 * The names are those of January 2021. The last of several stages holds the copy of the word
 * embedding. Under `release` Megatron looks for no optimizer.
 * ============================================================================================== */

/* Writes instructions, byte by byte. */
#define PUT_CODES(f, ...)                                                                          \
    do {                                                                                           \
        const unsigned char codes[] = {__VA_ARGS__};                                               \
        fwrite(codes, 1, sizeof codes, f);                                                         \
    } while (0)

static void put_string(FILE *f, const char *s)
{
    fputc(BINUNICODE, f);
    put(f, strlen(s), 4);
    fputs(s, f);
}

static void put_integer(FILE *f, size_t x)
{
    int wide = x > INT32_MAX;
    if (wide) PUT_CODES(f, LONG1, 8);
    else PUT_CODES(f, BININT);
    put(f, x, wide ? 8 : 4);
}

static void put_real(FILE *f, double x)
{
    uint64_t bits;
    memcpy(&bits, &x, 8);
    fputc(BINFLOAT, f);
    put(f, __builtin_bswap64(bits), 8);
}

static void put_global(FILE *f, const char *module, const char *name)
{
    fprintf(f, "%c%s\n%s\n", GLOBAL, module, name);
}

/* _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks), with its own storage. */
static void put_tensor(FILE *f, size_t key, Dtype dtype, const Tensor *t)
{
    char name[32], number[32];
    int matrix = t->spec->cols != ONE, tuple = matrix ? TUPLE2 : TUPLE1;
    snprintf(name, sizeof name, "%sStorage", type_names[dtype].storage);
    snprintf(number, sizeof number, "%zu", key);
    put_global(f, "torch._utils", "_rebuild_tensor_v2");
    PUT_CODES(f, MARK, MARK);
    put_string(f, "storage");
    put_global(f, "torch", name);
    put_string(f, number);
    put_string(f, "cpu");
    put_integer(f, t->n);
    PUT_CODES(f, TUPLE, BINPERSID);
    put_integer(f, 0); /* offset */
    put_integer(f, t->local_rows);
    if (matrix) put_integer(f, t->local_cols);
    fputc(tuple, f); /* size */
    if (matrix) put_integer(f, t->local_cols);
    put_integer(f, 1);
    fputc(tuple, f); /* stride */
    fputc(NEWFALSE, f);
    put_global(f, "collections", "OrderedDict");
    PUT_CODES(f, EMPTY_TUPLE, REDUCE, TUPLE, REDUCE);
}

static void put_flag(FILE *f, const char *key, int value)
{
    put_string(f, key);
    fputc(value ? NEWTRUE : NEWFALSE, f);
}

static void put_count(FILE *f, const char *key, size_t value)
{
    put_string(f, key);
    put_integer(f, value);
}

static void put_fraction(FILE *f, const char *key, real value)
{
    char text[32];
    put_string(f, key);
    put_real(f, strtod(real_text(text, value), NULL)); /* 0.1, not the float next to it */
}

/* The arguments that Megatron compares with its own when it loads, and those that convert needs for
 * the way back. Two flags tell the activation; version 0 is older than the second:
 *
 *     gelu_new    openai_gelu       the tanh formula
 *     gelu_fast   bias_gelu_fusion  the same, fused with the bias
 *     gelu        neither           the erf
 */
static void put_arguments(FILE *f, const Model *m, const Arrangement *a, int rank, Dtype dtype)
{
    const Config *c = &m->config;
    size_t tp = (size_t)a->layout.tp, pp = (size_t)a->layout.pp;
    int fused = !strcmp(m->gelu, "gelu_fast");
    put_global(f, "argparse", "Namespace");
    PUT_CODES(f, EMPTY_TUPLE, NEWOBJ, EMPTY_DICT, MARK);
    put_count(f, "num_layers", c->L);
    put_count(f, "hidden_size", c->C);
    put_count(f, "num_attention_heads", c->H);
    put_count(f, "ffn_hidden_size", c->F);
    put_count(f, "kv_channels", c->C / c->H);
    put_count(f, "max_position_embeddings", c->P);
    put_count(f, "seq_length", c->P);
    put_count(f, "make_vocab_size_divisible_by", 128);
    put_count(f, "padded_vocab_size", a->padded);
    /* Hugging Face's script writes this, Megatron does not: how many tokens are real */
    put_count(f, "orig_vocab_size", c->V);
    put_string(f, "tokenizer_type");
    put_string(f, "GPT2BPETokenizer");
    put_count(f, "tensor_model_parallel_size", tp);
    put_count(f, "pipeline_model_parallel_size", pp);
    put_count(f, "data_parallel_size", 1);
    put_count(f, "world_size", tp * pp);
    put_count(f, "rank", (size_t)rank);
    put_fraction(f, "layernorm_epsilon", c->eps);
    put_fraction(f, "attention_dropout", c->attn_pdrop);
    put_fraction(f, "hidden_dropout", c->resid_pdrop);
    put_fraction(f, "init_method_std", (real)0.02);
    put_flag(f, "apply_residual_connection_post_layernorm", 0);
    put_flag(f, "openai_gelu", c->gelu == GELU_TANH && !(fused && a->version));
    if (a->version) put_flag(f, "bias_gelu_fusion", fused);
    put_flag(f, "fp16", dtype == F16);
    put_flag(f, "bf16", dtype == BF16);
    put_string(f, "params_dtype");
    put_global(f, "torch", type_names[dtype].torch);
    PUT_CODES(f, SETITEMS, BUILD);
}

/* Puts {'weight': tensor} under a key of the dict below. */
static void put_weight(FILE *f, const char *key, size_t i, Dtype dtype, const Tensor *t)
{
    put_string(f, key);
    fputc(EMPTY_DICT, f);
    put_string(f, "weight");
    put_tensor(f, i, dtype, t);
    PUT_CODES(f, SETITEM, SETITEM);
}

/* The nested dicts of one rank's model; storages are numbered in the order of its tensors. */
static void put_model(FILE *f, const Part *part, const Output *out, int stage)
{
    char name[MAX_NAME];
    const Era *era = &eras[WRITTEN_ERA];
    const Tensor *t = part->tensor;
    int has_wte = t->spec->rows == DIM_V;
    size_t prefix = strlen(era->body), i = (size_t)has_wte;
    fputc(EMPTY_DICT, f);
    put_string(f, "language_model");
    fputc(EMPTY_DICT, f);
    if (stage == 0) {
        put_string(f, "embedding");
        fputc(EMPTY_DICT, f);
        put_weight(f, "word_embeddings", 0, out[0].dtype, &t[0]);
        put_weight(f, "position_embeddings", 1, out[1].dtype, &t[1]);
        fputc(SETITEM, f);
        i = 2;
    }
    put_string(f, "encoder");
    PUT_CODES(f, EMPTY_DICT, MARK);
    size_t first = t[i].layer; /* each stage counts from 0 */
    for (; i < part->tensors; i++) {
        size_t layer = t[i].spec->in_layer ? t[i].layer - first : 0;
        put_string(f, era_name(name, era, t[i].spec, layer) + prefix);
        put_tensor(f, i, out[i].dtype, &t[i]);
    }
    PUT_CODES(f, SETITEMS, SETITEM, SETITEM);
    if (stage > 0 && has_wte) put_weight(f, "word_embeddings_for_head", 0, out[0].dtype, &t[0]);
}

/* ---- Writing zip archives -------------------------------------------------------------------- */

typedef struct {
    FILE *f, *directory;
    char *entries; /* of the directory, which comes last */
    size_t size, count, offset;
} ZipWriter;

/* Extra field 1, with the numbers that need more than 32 bits. */
static size_t write_wide_fields(char extra[28], const uint64_t *field, int n)
{
    size_t length = 0;
    for (int i = 0; i < n; i++) {
        if (field[i] < 0xFFFFFFFF) continue;
        memcpy(extra + 4 + length, &field[i], 8);
        length += 8;
    }
    uint16_t head[2] = {1, (uint16_t)length};
    memcpy(extra, head, 4);
    return length ? 4 + length : 0;
}

/* A number in 32 bits. If it needs more, they are all ones, and it is in extra field 1. */
static void put_narrow(FILE *f, uint64_t x) { put(f, min_size(x, 0xFFFFFFFF), 4); }

/* The fields that a local header and an entry of the directory have in common. */
static void put_member(FILE *f, const char *name, size_t n, uint32_t crc, size_t extra)
{
    put(f, 45, 2);     /* needs version 4.5 of the format */
    put(f, 0x0800, 2); /* the name is UTF-8 */
    put(f, 0, 2);      /* stored */
    put(f, 0, 2);      /* midnight */
    put(f, 0x21, 2);   /* of 1980-01-01 */
    put(f, crc, 4);
    put_narrow(f, n);
    put_narrow(f, n);
    put(f, strlen(name), 2);
    put(f, extra, 2);
}

/* Where the data of a stored member starts: at the next multiple of 64 behind its local header. */
static size_t zip_data(size_t offset, const char *name, size_t n)
{
    return round_up(offset + 30 + strlen(name) + (n >= 0xFFFFFFFF ? 20 : 0) + 4, 64);
}

/* Adds a member: local header, and entry in the directory. Its data belongs at zip_data(). */
static void zip_add(ZipWriter *z, const char *name, size_t n, uint32_t crc)
{
    char extra[28];
    uint64_t field[3] = {n, n, z->offset};
    FILE *f = z->f, *d = z->directory;
    size_t data = zip_data(z->offset, name, n), wide = write_wide_fields(extra, field, 2);
    size_t gap = data - (z->offset + 30 + strlen(name) + wide + 4);
    fseeko(f, (off_t)z->offset, SEEK_SET);
    fputs("PK\3\4", f);
    put_member(f, name, n, crc, wide + 4 + gap);
    fputs(name, f);
    fwrite(extra, 1, wide, f);
    fputs("FB", f); /* what torch calls its padding */
    put(f, gap, 2);
    fprintf(f, "%*s", (int)gap, "");

    wide = write_wide_fields(extra, field, 3);
    fputs("PK\1\2", d);
    put(d, 45, 2); /* made by version 4.5 */
    put_member(d, name, n, crc, wide);
    put(d, 0, 8); /* no comment, the first disk, no attributes */
    put(d, 0, 2);
    put_narrow(d, z->offset);
    fputs(name, d);
    fwrite(extra, 1, wide, d);
    z->count++;
    z->offset = data + n;
}

static void zip_add_bytes(ZipWriter *z, const char *name, const char *data, size_t n)
{
    zip_add(z, name, n, (uint32_t)crc32_z(0, (const Bytef *)data, n));
    fwrite(data, 1, n, z->f);
}

/* The directory, and the three records that lead to it. */
static void zip_finish(ZipWriter *z, const char *path)
{
    FILE *f = z->f;
    size_t count = min_size(z->count, 0xFFFF);
    if (fclose(z->directory)) die("out of memory");
    fseeko(f, (off_t)z->offset, SEEK_SET);
    fwrite(z->entries, 1, z->size, f);
    fputs("PK\6\6", f); /* zip64 end record, of 44 bytes more */
    put(f, 44, 8);
    put(f, 45, 2); /* made by and needs version 4.5 */
    put(f, 45, 2);
    put(f, 0, 8); /* the first disk */
    put(f, z->count, 8);
    put(f, z->count, 8);
    put(f, z->size, 8);
    put(f, z->offset, 8);
    fputs("PK\6\7", f); /* locator: disk and place of that record, number of disks */
    put(f, 0, 4);
    put(f, z->offset + z->size, 8);
    put(f, 1, 4);
    fputs("PK\5\6", f); /* end record: the same in short, and no comment */
    put(f, 0, 4);
    put(f, count, 2);
    put(f, count, 2);
    put_narrow(f, z->size);
    put_narrow(f, z->offset);
    put(f, 0, 2);
    close_file(f, path);
    free(z->entries);
}

static char *storage_path(char path[40], size_t key)
{
    snprintf(path, 40, "archive/data/%zu", key);
    return path;
}

/* Writes the program that builds a rank's object. */
static void put_pickle(char **program, size_t *size, const Model *m, const Arrangement *a, int rank,
                       const Part *part, const Output *out)
{
    FILE *f = open_memory(program, size);
    PUT_CODES(f, PROTO, 2, EMPTY_DICT, MARK);
    put_string(f, "args");
    put_arguments(f, m, a, rank, out[0].dtype); /* the first tensor's type is the model's */
    if (a->version) {
        put_string(f, "checkpoint_version");
        put_real(f, a->version);
    }
    put_count(f, "iteration", 0);
    put_string(f, "model");
    put_model(f, part, out, pp_rank(a->layout, rank));
    PUT_CODES(f, SETITEMS, STOP);
    if (fclose(f)) die("out of memory");
}

/* Writes one rank file, into a folder that exists. */
static void write_rank(Written *w, const char *folder, const Model *m, const Arrangement *a,
                       int rank, const Choices *o)
{
    char path[PATH_MAX], member[40], *program = NULL;
    size_t size = 0;
    ZipWriter z;
    Part part;
    memset(&z, 0, sizeof z);
    memset(&part, 0, sizeof part);
    part.tensor = list_rank(&part.tensors, &m->config, a, rank);
    Output *out = (Output *)xcalloc(part.tensors, sizeof *out);
    for (size_t i = 0; i < part.tensors; i++) out[i].dtype = output_dtype(o, m, &part.tensor[i]);
    put_pickle(&program, &size, m, a, rank, &part, out);
    z.f = create_file(join_path(path, folder, "model_optim_rng.pt"));
    z.directory = open_memory(&z.entries, &z.size);
    zip_add_bytes(&z, "archive/data.pkl", program, size);
    zip_add_bytes(&z, "archive/byteorder", "little", 6);
    size_t at = z.offset;
    for (size_t i = 0; i < part.tensors; i++) {
        size_t bytes = part.tensor[i].n * dtype_size[out[i].dtype];
        out[i].at = zip_data(at, storage_path(member, i), bytes);
        at = out[i].at + bytes;
        w->bytes += bytes;
    }
    w->tensors += part.tensors;
    write_tensors(path, z.f, out, part.tensor, part.tensors, a, tp_rank(a->layout, rank), m, 1);
    for (size_t i = 0; i < part.tensors; i++)
        zip_add(&z, storage_path(member, i), part.tensor[i].n * dtype_size[out[i].dtype],
                out[i].crc);
    zip_add_bytes(&z, "archive/version", "3\n", 2);
    zip_finish(&z, path);
    w->files++;
    free(program);
    free(out);
    free(part.tensor);
}

static void make_folder(char path[PATH_MAX], const char *folder, const char *name)
{
    if (mkdir(join_path(path, folder, name), 0777))
        die("cannot create %s: %s", path, strerror(errno));
}

static Written write_megatron(const char *folder, const Model *m, const Choices *o)
{
    Layout s = {(int)o->tp, (int)o->pp, 1};
    char name[64], path[PATH_MAX];
    check_layout(&m->config, s);
    Arrangement a = {s, (int)o->qkv_version, 0, padded_vocab(m->config.V, s.tp)};
    Written w = {0, 0, 0};
    write_text(folder, tracker, "release");
    make_folder(path, folder, "release");
    for (int rank = 0; rank < s.tp * s.pp; rank++) {
        int tp = tp_rank(s, rank), pp = pp_rank(s, rank);
        if (s.pp == 1) snprintf(name, sizeof name, "release/mp_rank_%02d", tp);
        else snprintf(name, sizeof name, "release/mp_rank_%02d_%03d", tp, pp);
        make_folder(path, folder, name);
        write_rank(&w, path, m, &a, rank, o);
    }
    return w;
}

/* =================================================================================================
 * Chapter 11. What is in a file
 * ============================================================================================== */

/* CRC-32 of a tensor's values, row by row, whatever its strides. */
static uint32_t checksum(const View *v, size_t dim, size_t at, uint32_t crc)
{
    size_t size = dtype_size[v->t.dtype], n = dim < v->t.dims ? v->t.shape[dim] : 1;
    const Bytef *data = (const Bytef *)v->t.data + at * size;
    if (dim == v->t.dims) return (uint32_t)crc32_z(crc, data, size);
    if (dim + 1 == v->t.dims && v->stride[dim] == 1) return (uint32_t)crc32_z(crc, data, n * size);
    for (size_t i = 0; v->t.n && i < n; i++)
        crc = checksum(v, dim + 1, at + i * v->stride[dim], crc);
    return crc;
}

static const char *find_era(const Source *s)
{
    int era = -1; /* eras share names: the latest that a tensor needs is the checkpoint's */
    for (size_t i = 0; i < s->files; i++)
        for (size_t j = 0; j < s->file[i].views; j++)
            if (s->file[i].view[j].spec && s->file[i].view[j].era > era)
                era = s->file[i].view[j].era;
    if (era < 0) return "unknown";
    return era == HUGGING_FACE ? "Hugging Face" : eras[era].when;
}

/* A value of a pickle; its text is JSON, too. */
static void print_node(Emitter *e, const char *key, const Pickle *p, Ref ref)
{
    const Node *n = &p->node[ref];
    char name[VISIBLE];
    if (e->json) emit_key(e, key);
    if (!ref || n->type == N_NONE) fputs("null", e->out);
    else if (n->type == N_INTEGER) fprintf(e->out, "%lld", n->is.integer);
    else if (n->type == N_REAL && isfinite(n->is.real)) fprintf(e->out, "%.12g", n->is.real);
    else if (n->type == N_FLAG) fputs(n->is.integer ? "true" : "false", e->out);
    else if (n->type == N_STRING) json_write_string(e->out, n->is.string, n->length);
    else if (n->type == N_GLOBAL)
        fprintf(e->out, "\"%s\"", visible(name, n->is.string, n->length, 120));
    else fprintf(e->out, "\"(%s)\"", node_name[n->type]);
}

static void print_arguments(Emitter *e, const TensorFile *file)
{
    const Pickle *p = &file->pickle;
    Ref args = find_entry(file, "args");
    char name[VISIBLE];
    emit_open(e, "args", '{');
    if (args) emit_text(e, "args:");
    for (uint32_t cell = args ? p->node[args].first : 0, value; cell; cell = p->cell[value].next) {
        const Node *key = &p->node[p->cell[cell].value];
        value = p->cell[cell].next;
        if (key->type != N_STRING) continue;
        emit_text(e, " %s=", visible(name, key->is.string, key->length, 120));
        emit_bytes(e, NULL, key->is.string, key->length); /* a key that may need escapes */
        if (e->json) fputs(": ", e->out);
        e->comma = 0;
        print_node(e, NULL, p, p->cell[value].value);
    }
    if (args) emit_text(e, "\n");
    emit_close(e, '}');
}

/* A shape or strides; their text is JSON, too. */
static void print_sizes(Emitter *e, const char *key, const char *format, size_t n,
                        const size_t *size)
{
    char text[SHAPE_TEXT];
    if (e->json) emit_key(e, key);
    fprintf(e->out, e->json ? "%s" : format, shape_text(text, n, size));
}

static void print_views(Emitter *e, const TensorFile *file)
{
    char name[VISIBLE], crc[16];
    emit_open(e, "tensors", '[');
    for (size_t i = 0; i < file->views; i++) {
        const View *v = &file->view[i];
        snprintf(crc, sizeof crc, "%08x", (unsigned)checksum(v, 0, 0, 0));
        emit_open(e, NULL, '{');
        emit_text(e, "  %-72s ", visible(name, v->t.name, strlen(v->t.name), 160));
        emit_string(e, "name", NULL, v->t.name);
        emit_string(e, "dtype", "%-4s ", dtype_name[v->t.dtype]);
        print_sizes(e, "shape", "%-14s ", v->t.dims, v->t.shape);
        print_sizes(e, "strides", "strides %-12s ", v->t.dims, v->stride);
        emit_string(e, "crc32", "crc32 %s\n", crc);
        emit_close(e, '}');
    }
    emit_close(e, ']');
}

static void inspect(const Choices *o)
{
    Source s;
    const char *scratch = getenv("TMPDIR");
    source_open(&s, o->operand[0], scratch && *scratch ? scratch : "/tmp",
                o->pickle ? stdout : NULL);
    identify_all(&s);
    const TensorFile *first = &s.file[0];
    const Pickle *p = &first->pickle;
    Emitter e = make_emitter(stdout, o->json);
    emit_open(&e, NULL, '{');
    emit_string(&e, "container", "%s, ", s.container);
    emit_flag(&e, "archive", s.archive.members > 0);
    emit_string(&e, "names", "names of %s; ", find_era(&s));
    emit_count(&e, "tp", "%zu tensor ranks x ", (size_t)s.layout.tp);
    emit_count(&e, "pp", "%zu stages; ", (size_t)s.layout.pp);
    emit_text(&e, "checkpoint_version ");
    print_node(&e, "checkpoint_version", p, find_entry(first, "checkpoint_version"));
    emit_text(&e, ", iteration ");
    print_node(&e, "iteration", p, find_entry(first, "iteration"));
    emit_text(&e, "\n");
    print_arguments(&e, first);
    emit_open(&e, "files", '[');
    for (size_t i = 0; i < s.files; i++) {
        emit_open(&e, NULL, '{');
        emit_string(&e, "path", "%s\n", s.file[i].path);
        print_views(&e, &s.file[i]);
        emit_close(&e, '}');
    }
    emit_close(&e, ']');
    emit_close(&e, '}');
    source_close(&s);
}

/* =================================================================================================
 * Chapter 12. Command line
 *
 * A child process does the work in a new folder beside OUT. When the folder is complete, it takes
 * OUT's name. If the child ends before (bad input, a full disk, Ctrl-C, no memory), its parent
 * removes the folder.
 * ============================================================================================== */

/* The commands that an option is for; the last three are kinds of conversion. */
enum { CONVERT = 1, INSPECT = 2, TO_MEGATRON = 5, TO_HF = 9, FROM_MEGATRON = 17 };

/* clang-format off */
#define AT(field) offsetof(Choices, field)
static const Option choices[] = {
    {"--to",                 "FORMAT",  "hf or megatron; default: what IN is not",
     CONVERT, TEXT, AT(to), 0, 0, NULL, 0},
    {"--dtype",              "TYPE",    "keep, fp32, fp16 or bf16",
     CONVERT, TEXT, AT(dtype), 0, 0, "keep", 0},
    {"--config",             "FILE",    "a config.json with the shape, if IN has no args",
     CONVERT, TEXT, AT(config), 0, 0, NULL, 0},
    {"--tokenizer",          "DIR",     "copies vocab.json and merges.txt from there",
     CONVERT, TEXT, AT(tokenizer), 0, 0, NULL, 0},
    {"--vocab-size",         "N",       "how many tokens are real, without padding",
     CONVERT, COUNT, AT(vocab_size), 1, 1 << 24, NULL, 0},
    {"--keep-padding",       NULL,      "keep the padding of the vocabulary as tokens",
     FROM_MEGATRON, FLAG, AT(keep_padding), 0, 0, NULL, 0},
    {"--checkpoint-version", "V",       "order of Q, K, V: 0, 1, 2, 3; if IN does not tell",
     FROM_MEGATRON, NUMBER, AT(checkpoint_version), 0, 3, NULL, 0},
    {"--tp",                 "P",       "write for P tensor ranks",
     TO_MEGATRON, COUNT, AT(tp), 1, 64, "1", 0},
    {"--pp",                 "S",       "write for S pipeline stages",
     TO_MEGATRON, COUNT, AT(pp), 1, 64, "1", 0},
    {"--qkv-version",        "V",       "order of Q, K, V to write",
     TO_MEGATRON, NUMBER, AT(qkv_version), 0, 3, "3", 0},
    {"--shard-size",         "MB",      "a larger model.safetensors is cut",
     TO_HF, COUNT, AT(shard_size), 1, 1e9, "5000", 0},
    {"--force",              NULL,      "replace OUT, which becomes OUT.old",
     CONVERT, FLAG, AT(force), 0, 0, NULL, 0},
    {"--pickle",             NULL,      "list the instructions of the pickles",
     INSPECT, FLAG, AT(pickle), 0, 0, NULL, 0},
    {"--json",               NULL,      "JSON on stdout",
     CONVERT | INSPECT, FLAG, AT(json), 0, 0, NULL, 0},
};
#undef AT
/* clang-format on */
enum { N_CHOICES = sizeof choices / sizeof *choices };

__attribute__((noreturn)) static void print_usage(void)
{
    printf("GPT-2 checkpoints: Megatron-LM's to Hugging Face's, and back.\n\n"
           "  convert IN OUT [options]             IN: a .zip, a .pt, a folder of either kind; "
           "OUT: a new folder\n"
           "  convert inspect IN [--pickle]        what is in it\n\n");
    print_options(choices, N_CHOICES, CONVERT | INSPECT, 24);
    exit(0);
}

static void parse_choices(Choices *o, int argc, char **argv)
{
    static const char *const formats[] = {"hf", "megatron", NULL};
    static const char *const types[] = {"keep", "fp32", "fp16", "bf16", NULL};
    memset(o, 0, sizeof *o);
    o->checkpoint_version = -1;
    for (int i = 0; i < N_CHOICES; i++)
        if (choices[i].fallback) set_option(o, &choices[i], choices[i].fallback);
    o->inspect = argc > 1 && !strcmp(argv[1], "inspect");
    size_t operands = o->inspect ? 1 : 2;
    for (int i = 1 + o->inspect; i < argc; i++) {
        if (asks_help(argv[i])) print_usage();
        if (argv[i][0] == '-')
            i = parse_option(o, o->given, choices, N_CHOICES,
                             o->inspect ? "inspect" : "a conversion",
                             o->inspect ? INSPECT : CONVERT, argc, argv, i);
        else if (o->operands == operands) usage_error("%s is one argument too many", argv[i]);
        else o->operand[o->operands++] = argv[i];
    }
    if (argc < 2) print_usage();
    if (o->operands < operands)
        usage_error(o->inspect ? "inspect needs IN" : "IN and OUT are needed");
    if (o->to && !is_one_of(o->to, formats))
        usage_error("--to %s: hf or megatron is expected", o->to);
    if (!is_one_of(o->dtype, types))
        usage_error("--dtype %s: keep, fp32, fp16 or bf16 is expected", o->dtype);
    if (o->qkv_version != floor(o->qkv_version) ||
        o->checkpoint_version != floor(o->checkpoint_version))
        usage_error("--qkv-version and --checkpoint-version are 0, 1, 2 or 3");
    if (o->pickle && o->json) usage_error("--pickle and --json exclude each other");
    if (o->vocab_size && o->keep_padding)
        usage_error("--vocab-size and --keep-padding exclude each other");
}

/* ---- The folder OUT -------------------------------------------------------------------------- */

static void check_output(const SavePaths *out, const Choices *o)
{
    const char *name = o->operand[1];
    struct stat st;
    int exists = !lstat(out->dir, &st);
    if (exists && !o->force)
        die("%s exists already: choose another name, or give --force, which moves it to %s", name,
            out->old);
    if (exists && !file_exists(out->dir, "config.json") && !file_exists(out->dir, tracker))
        die("%s holds neither config.json nor %s, so it is no model to replace: choose another "
            "name",
            name, tracker);
    if (o->force && !lstat(out->old, &st))
        die("%s is there, but --force needs the name: move it away", out->old);
}

/* Gives the new folder its name. Nothing is deleted: a folder that --force replaces becomes
 * OUT.old. If another program has made OUT meanwhile, rename() replaces it only if it is empty. */
static void put_output(const char *temporary, const SavePaths *out, int force)
{
    mode_t mask = umask(0);
    umask(mask);
    chmod(temporary, 0777 & ~mask);
    int moved = force && !rename(out->dir, out->old);
    if (force && !moved && errno != ENOENT)
        die("cannot rename %s to %s: %s", out->dir, out->old, strerror(errno));
    if (!rename(temporary, out->dir)) return;
    int error = errno;
    if (moved) rename(out->old, out->dir);
    die("cannot rename %s to %s: %s", temporary, out->dir, strerror(error));
}

static int remove_entry(const char *path, const struct stat *st, int type, struct FTW *place)
{
    (void)st;
    (void)type;
    (void)place;
    return remove(path);
}

/* ---- The work -------------------------------------------------------------------------------- */

static void print_result(const Choices *o, const Source *s, const Model *m, const char *to,
                         const Written *w)
{
    static const char *const orders[] = {"0", "1", "2 or 3"};
    const Config *c = &m->config;
    size_t version = (size_t)m->how.version;
    Emitter e = make_emitter(stdout, o->json);
    emit_open(&e, NULL, '{');
    emit_string(&e, "from", NULL, m->how.hugging_face ? "hf" : "megatron");
    emit_string(&e, "container", "read: %s, ", s->container);
    emit_string(&e, "names", "names of %s, ", find_era(s));
    emit_count(&e, "tp", "%zu x ", (size_t)s->layout.tp);
    emit_count(&e, "pp", "%zu ranks", (size_t)s->layout.pp);
    emit_count(&e, "version", NULL, version);
    if (!m->how.hugging_face) emit_text(&e, ", Q K V of version %s", orders[min_size(version, 2)]);
    emit_count(&e, "layers", "\nGPT-2: %zu layers, ", c->L);
    emit_count(&e, "hidden", "hidden size %zu, ", c->C);
    emit_count(&e, "heads", "%zu heads, ", c->H);
    emit_count(&e, "positions", "%zu positions, ", c->P);
    emit_count(&e, "vocab", "%zu tokens; ", c->V);
    emit_count(&e, "parameters", "%zu parameters\n", count_parameters(c));
    emit_string(&e, "to", NULL, to);
    emit_text(&e, "written: %s, %zu tensors in ", o->operand[1], w->tensors);
    emit_count(&e, "files", "%zu files, ", w->files);
    emit_count(&e, "tensors", NULL, w->tensors);
    emit_count(&e, "bytes", "%zu bytes\n", w->bytes);
    emit_close(&e, '}');
}

static void convert(const Choices *o, const char *folder, const SavePaths *out)
{
    Source source;
    Model model;
    if (o->tokenizer && !file_exists(o->tokenizer, "vocab.json") &&
        !file_exists(o->tokenizer, "encoder.json"))
        die("--tokenizer %s: this folder holds no vocab.json", o->tokenizer);
    source_open(&source, o->operand[0], folder, NULL);
    model_open(&model, &source, o);
    int megatron = o->to ? !strcmp(o->to, "megatron") : model.how.hugging_face;
    const char *to = megatron ? "megatron" : "hf";
    for (int i = 0; i < N_CHOICES; i++) {
        const int only = choices[i].commands;
        if (!o->given[i]) continue;
        if (only == (megatron ? TO_HF : TO_MEGATRON))
            usage_error("%s is for writing a checkpoint of %s", choices[i].name,
                        megatron ? "Hugging Face's" : "Megatron's");
        if (only == FROM_MEGATRON && model.how.hugging_face)
            usage_error("%s is for reading a checkpoint of Megatron's", choices[i].name);
    }
    Written w;
    if (megatron) w = write_megatron(folder, &model, o);
    else w = write_hugging_face(folder, &model, o);
    if (o->tokenizer) copy_tokenizer(folder, o->tokenizer);
    put_output(folder, out, o->force);
    print_result(o, &source, &model, to, &w);
    model_close(&model);
    source_close(&source);
}

static pid_t child;
static void pass_on(int signal_number) { kill(child, signal_number); }

int CONVERT_MAIN(int argc, char **argv)
{
    static Choices o;
    static const int stops[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};
    enum { STOPS = sizeof stops / sizeof *stops };
    char temporary[PATH_MAX];
    int status = 0;
    parse_choices(&o, argc, argv);
    if (o.inspect) {
        inspect(&o);
        if (fflush(stdout) || ferror(stdout)) die("cannot write to stdout: %s", strerror(errno));
        return 0;
    }
    SavePaths out = save_paths(o.operand[1]);
    check_output(&out, &o);
    sigset_t blocked, before; /* until there is a child to pass them on to */
    sigemptyset(&blocked);
    for (int i = 0; i < STOPS; i++) sigaddset(&blocked, stops[i]);
    sigprocmask(SIG_BLOCK, &blocked, &before);
    /* if it was ignored when we were started, waitpid() could not tell how the child ended */
    signal(SIGCHLD, SIG_DFL);
    snprintf(temporary, sizeof temporary, "%.*s.XXXXXX", PATH_MAX - 8, out.dir);
    if (!mkdtemp(temporary)) die("cannot create a folder beside %s: %s", out.dir, strerror(errno));
    fflush(stdout);
    child = fork();
    for (int i = 0; child > 0 && i < STOPS; i++) signal(stops[i], pass_on);
    sigprocmask(SIG_SETMASK, &before, NULL);
    if (child == 0) {
        convert(&o, temporary, &out);
        if (fflush(stdout) || ferror(stdout)) die("cannot write to stdout: %s", strerror(errno));
        return 0;
    }
    int error = errno; /* of fork() */
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    int unfinished = !access(temporary, F_OK);
    if (unfinished) nftw(temporary, remove_entry, 16, FTW_DEPTH | FTW_PHYS);
    if (child < 0) die("cannot start another process: %s", strerror(error));
    if (WIFSIGNALED(status) && unfinished)
        die("stopped by signal %d; nothing is written", WTERMSIG(status));
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
