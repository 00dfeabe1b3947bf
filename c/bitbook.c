/* The bitbook file in C99: bytes ─► header ─► plan ─► groups of streams ─► codes ─► floats.
 *
 * What the bytes mean is in src/bitbook/artifact/FORMAT.md and src/bitbook/coding/FORMAT.md, and so are the reasons
 * for every check.  Sizes are checked against the file, and elements are counted, before anything of that size is
 * allocated.  Recursion follows JSON (at most DEEPEST levels) and recipes (at most NESTED).  Arithmetic on codes is in
 * whole numbers; that on weights is float or double, operation by operation as the Python reader has it, so that the
 * bits are the same wherever float is IEEE single and not computed in wider registers (FLT_EVAL_METHOD 0) or fused. */

#include "bitbook.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF /* gcc has it off with -std=c99, and does not know the pragma */
#endif

enum { NEWEST = 2, DEEPEST = 64, NESTED = 8, MOST_AXES = 64, MOST_FIELDS = 6 };

#define FREE_ELEMENTS ((uint64_t)1 << 24)
#define ELEMENTS_PER_BYTE 4096
#define MOST_ELEMENTS ((uint64_t)1 << 48) /* so that no product of a few such numbers has to be checked */
#define MOST_HEADER 100000000
#define LARGEST_CODE 2147483647

#define TRY(call) \
    do { \
        if (!(call)) return false; \
    } while (0)

/* -- memory and errors ------------------------------------------------------------------------------------------- */

typedef union cell {
    union cell *before;
    double number;
    int64_t whole;
} cell;

typedef struct {
    bitbook_error *error;
    const char *about; /* what is being read, for messages */
    size_t about_length;
    cell *cells; /* memory until this work is done */
    cell *kept;  /* memory of the book */
    uint64_t limit, left; /* elements that the file may claim, and may still claim */
} work;

static bool fail(work *w, bitbook_status status, const char *format, ...) {
    char *at = w->error->message;
    size_t size = sizeof w->error->message;
    size_t length = w->about_length < 80 ? w->about_length : 80;
    for (size_t i = 0; i < length; i++) *at++ = (unsigned char)w->about[i] < 32 ? '?' : w->about[i];
    if (length) {
        *at++ = ':';
        *at++ = ' ';
    }
    va_list values;
    va_start(values, format);
    vsnprintf(at, size - (size_t)(at - w->error->message), format, values);
    va_end(values);
    w->error->status = status;
    return false;
}

#define CORRUPT(...) fail(w, BITBOOK_CORRUPT, __VA_ARGS__)

static void about(work *w, const char *name, size_t length) {
    w->about = name;
    w->about_length = length;
}

static void about_word(work *w, const char *word) {
    about(w, word, strlen(word));
}

static void *allocate(work *w, cell **chain, uint64_t count, size_t size) {
    if (count > (SIZE_MAX - sizeof(cell)) / size) {
        fail(w, BITBOOK_NO_MEMORY, "%" PRIu64 " times %zu bytes are more than there can be", count, size);
        return NULL;
    }
    cell *fresh = calloc(1, sizeof(cell) + (size_t)count * size);
    if (fresh == NULL) {
        fail(w, BITBOOK_NO_MEMORY, "%" PRIu64 " times %zu bytes are more than there are", count, size);
        return NULL;
    }
    fresh->before = *chain;
    *chain = fresh;
    return fresh + 1;
}

/* Zeroed memory until the work is done, or `release`d; NULL where there is none. */
static void *room(work *w, uint64_t count, size_t size) {
    return allocate(w, &w->cells, count, size);
}

/* Zeroed memory that the book keeps. */
static void *keep(work *w, uint64_t count, size_t size) {
    return allocate(w, &w->kept, count, size);
}

/* Frees all that was allocated after `mark`. */
static void release(cell **chain, const cell *mark) {
    while (*chain != mark) {
        cell *last = *chain;
        *chain = last->before;
        free(last);
    }
}

/* Makes place for one more in an array of `count` out of `*most`. */
static bool grow(work *w, cell **chain, void **array, size_t count, size_t *most, size_t size) {
    if (count < *most) return true;
    size_t more = *most ? 2 * *most : 16;
    void *fresh = allocate(w, chain, more, size);
    TRY(fresh);
    if (count) memcpy(fresh, *array, count * size);
    *array = fresh;
    *most = more;
    return true;
}

/* -- whole numbers ----------------------------------------------------------------------------------------------- */

static int64_t floor_divided(int64_t a, int64_t b) { /* b > 0 */
    return a / b - (a % b < 0);
}

static int64_t shifted(int64_t a, int bits) { /* rounded down, which C leaves open for negative numbers */
    return a < 0 ? ~(~a >> bits) : a >> bits;
}

static int64_t clipped(int64_t a, int64_t low, int64_t high) {
    return a < low ? low : a > high ? high : a;
}

static int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int sign_of(int64_t a) {
    return (a > 0) - (a < 0);
}

static uint64_t product(uint64_t a, uint64_t b) { /* UINT64_MAX if it is no less */
    return a && b > UINT64_MAX / a ? UINT64_MAX : a * b;
}

static uint64_t at_least_one(uint64_t a) {
    return a ? a : 1;
}

static int bit_length(uint64_t a) {
    int bits = 0;
    while (a) {
        a >>= 1;
        bits++;
    }
    return bits;
}

static uint64_t little(const uint8_t *data, int bytes) {
    uint64_t number = 0;
    for (int i = 0; i < bytes; i++) number |= (uint64_t)data[i] << 8 * i;
    return number;
}

static uint32_t crc_of(uint32_t crc, const uint8_t *data, size_t size, const uint32_t table[256]) {
    crc = ~crc;
    for (size_t i = 0; i < size; i++) crc = table[(crc ^ data[i]) & 255] ^ crc >> 8;
    return ~crc;
}

static void make_crc_table(uint32_t table[256]) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++) crc = crc & 1 ? 0xEDB88320u ^ crc >> 1 : crc >> 1;
        table[i] = crc;
    }
}

/* Counts elements that the file claims; an empty axis counts as 1. */
static bool take(work *w, uint64_t elements) {
    if (elements > w->left) {
        w->left = 0;
        return fail(w, BITBOOK_TOO_MANY, "the file claims more than %" PRIu64 " elements", w->limit);
    }
    w->left -= elements;
    return true;
}

/* -- JSON, in its one canonical form ----------------------------------------------------------------------------- */

typedef struct {
    uint32_t start, stop; /* in the text; of a string without its quotes */
    uint32_t next;        /* the first node that is not within this one */
    char type;            /* { [ " and 0 for whole numbers, . for others, t f n */
} node;

typedef struct {
    const char *text;
    size_t size, at;
    node *nodes;
    size_t count, most;
} document;

/* Text in UTF-8 without surrogates, as short as it can be. */
static bool is_utf8(const uint8_t *text, size_t size) {
    for (size_t i = 0; i < size;) {
        uint32_t first = text[i++], code;
        int more = first < 0x80 ? 0 : first < 0xC2 ? -1 : first < 0xE0 ? 1 : first < 0xF0 ? 2 : first < 0xF5 ? 3 : -1;
        if (more < 0 || (size_t)more > size - i) return false;
        code = more ? first & (0x3Fu >> more) : first;
        for (int k = 0; k < more; k++) {
            if ((text[i] & 0xC0) != 0x80) return false;
            code = code << 6 | (text[i++] & 0x3F);
        }
        if ((more == 2 && code < 0x800) || (more == 3 && (code < 0x10000 || code > 0x10FFFF))) return false;
        if (code >= 0xD800 && code < 0xE000) return false;
    }
    return true;
}

/* The byte at `*at` of a string that was parsed, its escape undone. */
static char unescaped(const char *text, uint32_t *at) {
    char c = text[(*at)++];
    if (c != '\\') return c;
    c = text[(*at)++];
    switch (c) {
        case 'b': return '\b';
        case 'f': return '\f';
        case 'n': return '\n';
        case 'r': return '\r';
        case 't': return '\t';
        case 'u':
            *at += 4; /* 00xx */
            c = text[*at - 1];
            return (char)((text[*at - 2] == '1' ? 16 : 0) + (c <= '9' ? c - '0' : c - 'a' + 10));
        default: return c;
    }
}

/* As memcmp, of the texts that two strings stand for. */
static int compare_strings(const document *d, const node *a, const node *b) {
    uint32_t i = a->start, j = b->start;
    while (i < a->stop && j < b->stop) {
        unsigned char x = (unsigned char)unescaped(d->text, &i), y = (unsigned char)unescaped(d->text, &j);
        if (x != y) return x < y ? -1 : 1;
    }
    return (i < a->stop) - (j < b->stop);
}

static bool is_word(const document *d, size_t n, const char *word) {
    const node *s = &d->nodes[n];
    return s->type == '"' && s->stop - s->start == strlen(word) && memcmp(d->text + s->start, word, strlen(word)) == 0;
}

static bool is_text(const document *d, size_t n, const char *text) { /* quotes and brackets included */
    const node *v = &d->nodes[n];
    size_t quote = v->type == '"', start = v->start - quote, size = v->stop - v->start + 2 * quote;
    return size == strlen(text) && memcmp(d->text + start, text, size) == 0;
}

static size_t first_child(size_t n) {
    return n + 1;
}

static size_t after(const document *d, size_t n) {
    return d->nodes[n].next;
}

/* How many values a list holds, or keys and values an object. */
static size_t members(const document *d, size_t n) {
    size_t count = 0;
    for (size_t i = first_child(n); i < after(d, n); i = after(d, i)) count++;
    return count;
}

static int64_t whole(const document *d, size_t n) {
    const node *v = &d->nodes[n];
    bool negative = d->text[v->start] == '-';
    int64_t number = 0;
    for (uint32_t i = v->start + negative; i < v->stop; i++) number = 10 * number + (d->text[i] - '0');
    return negative ? -number : number;
}

/* `digits` times ten to the power of `exponent`; without a decimal point, whose form depends on the locale. */
static double decimal(uint64_t digits, int exponent) {
    char text[40];
    snprintf(text, sizeof text, "%" PRIu64 "e%d", digits, exponent);
    return strtod(text, NULL);
}

static double real(const document *d, size_t n) {
    const node *v = &d->nodes[n];
    uint64_t digits = 0;
    int exponent = 0;
    bool negative = d->text[v->start] == '-', point = false;
    for (uint32_t i = v->start + negative; i < v->stop; i++) {
        char c = d->text[i];
        if (c == 'e' || c == 'E') {
            bool below = d->text[i + 1] == '-';
            int power = 0;
            i += below || d->text[i + 1] == '+' ? 2 : 1;
            for (; i < v->stop; i++) {
                power = (int)smaller(10 * power + (d->text[i] - '0'), 9999);
            }
            exponent += below ? -power : power;
            break;
        }
        if (c == '.') {
            point = true;
        } else if (digits > UINT64_MAX / 10 - 1) {
            return 0; /* more digits than any shortest form has: found not to be canonical */
        } else {
            digits = 10 * digits + (uint64_t)(c - '0');
            exponent -= point;
        }
    }
    double value = decimal(digits, exponent);
    return negative ? -value : value;
}

/* The shortest decimal that gives `x` again, as double or, if `single`, as float, in the words of Python's repr. */
static void shortest(double x, bool single, char out[64]) {
    char text[32];
    int precision = 0, exponent = 0;
    uint64_t digits = 0;
    double size = x < 0 ? -x : x;
    out[0] = 0; /* what no text is */
    if (!isfinite(x)) return;
    if (size > 0) {
        for (bool found = false; !found && precision < 17;) {
            snprintf(text, sizeof text, "%.*e", precision++, size);
            const char *c = text;
            for (digits = 0; *c != 'e'; c++) {
                if (*c >= '0' && *c <= '9') digits = 10 * digits + (uint64_t)(*c - '0');
            }
            exponent = atoi(c + 1);
            for (int more = 0; more < 2 && !found; more++) { /* beside a power of two, the nearest may be too far */
                double back = decimal(digits + (uint64_t)more, exponent - precision + 1);
                found = single ? (float)back == (float)size : back == size;
                if (found) digits += (uint64_t)more;
            }
        }
        while (digits % 10 == 0) digits /= 10;
    }
    int count = snprintf(text, 24, "%" PRIu64, digits);
    const char *minus = x < 0 || (x == 0 && signbit(x)) ? "-" : "";
    if (exponent < -4 || exponent >= 16) {
        const char *point = count > 1 ? "." : "";
        snprintf(out, 64, "%s%c%s%s%s%02d", minus, text[0], point, text + 1, exponent < 0 ? "e-" : "e+", abs(exponent));
    } else if (exponent < 0) {
        snprintf(out, 64, "%s0.%.*s%s", minus, -exponent - 1, "000", text);
    } else if (count <= exponent + 1) {
        snprintf(out, 64, "%s%s%.*s.0", minus, text, exponent + 1 - count, "0000000000000000");
    } else {
        snprintf(out, 64, "%s%.*s.%s", minus, exponent + 1, text, text + exponent + 1);
    }
}

static bool is_shortest(const document *d, size_t n, double x, bool single) {
    char text[64];
    shortest(x, single, text);
    return is_text(d, n, text);
}

static bool json_value(work *w, document *d, int depth);

/* Whether an escape, of which `rest` begins behind the backslash, is the canonical one; its length. */
static size_t escape_length(const char *rest, size_t size) {
    if (size && rest[0] && strchr("\"\\bfnrt", rest[0])) return 1;
    if (size < 5 || memcmp(rest, "u00", 3) != 0 || (rest[3] != '0' && rest[3] != '1')) return 0;
    return rest[4] && strchr(rest[3] == '0' ? "01234567bef" : "0123456789abcdef", rest[4]) ? 5 : 0;
}

static bool json_string(work *w, document *d, node *v) {
    v->type = '"';
    v->start = (uint32_t)++d->at;
    for (; d->at < d->size && d->text[d->at] != '"'; d->at++) {
        if ((unsigned char)d->text[d->at] < 32) return CORRUPT("a string holds a character below 32");
        if (d->text[d->at] != '\\') continue;
        size_t length = escape_length(d->text + d->at + 1, d->size - d->at - 1);
        if (length == 0) return CORRUPT("an escape is not canonical JSON");
        d->at += length;
    }
    if (d->at == d->size) return CORRUPT("a string does not end");
    v->stop = (uint32_t)d->at++;
    return true;
}

static size_t json_digits(document *d) {
    size_t start = d->at;
    while (d->at < d->size && d->text[d->at] >= '0' && d->text[d->at] <= '9') d->at++;
    return d->at - start;
}

static bool json_next(document *d, char c) {
    if (d->at == d->size || d->text[d->at] != c) return false;
    d->at++;
    return true;
}

static bool json_number(work *w, document *d, node *v) {
    v->type = '0';
    json_next(d, '-');
    size_t start = d->at, digits = json_digits(d);
    if (digits == 0 || (digits > 1 && d->text[start] == '0')) return CORRUPT("a value is not canonical JSON");
    if (json_next(d, '.')) {
        v->type = '.';
        if (json_digits(d) == 0) return CORRUPT("a number is not canonical JSON");
    }
    if (json_next(d, 'e')) {
        v->type = '.';
        if (!json_next(d, '+')) json_next(d, '-');
        if (json_digits(d) == 0) return CORRUPT("a number is not canonical JSON");
    }
    v->stop = (uint32_t)d->at;
    size_t size = v->stop - v->start, n = d->count - 1;
    if (v->type == '0' && size > 18) return CORRUPT("a number has more than 18 digits");
    if (v->type == '0' && is_text(d, n, "-0")) return CORRUPT("a number is -0");
    if (v->type == '.' && (size > 32 || !is_shortest(d, n, real(d, n), false))) {
        return CORRUPT("a number is not canonical JSON");
    }
    return true;
}

/* The members of a list or object, up to the bracket that closes it. */
static bool json_members(work *w, document *d, size_t n, int depth) {
    bool object = d->nodes[n].type == '{';
    char close = object ? '}' : ']';
    size_t key, before = 0;
    d->at++;
    if (json_next(d, close)) return true;
    do {
        if (object) {
            key = d->count;
            if (d->at == d->size || d->text[d->at] != '"') return CORRUPT("a key is not a string");
            TRY(json_value(w, d, depth + 1));
            if (before && compare_strings(d, &d->nodes[before], &d->nodes[key]) >= 0) {
                return CORRUPT("keys are not sorted, or not unique");
            }
            before = key;
            if (!json_next(d, ':')) return CORRUPT("a key has no value");
        }
        TRY(json_value(w, d, depth + 1));
    } while (json_next(d, ','));
    return json_next(d, close) ? true : CORRUPT("a list or object does not end, or holds spaces");
}

static bool json_value(work *w, document *d, int depth) {
    static const char *const words[] = {"true", "false", "null"};
    if (depth > DEEPEST) return CORRUPT("it is nested too deeply");
    void *nodes = d->nodes;
    TRY(grow(w, &w->cells, &nodes, d->count, &d->most, sizeof(node)));
    d->nodes = nodes;
    size_t n = d->count++;
    node *v = &d->nodes[n];
    v->start = (uint32_t)d->at;
    char c = d->at < d->size ? d->text[d->at] : 0;
    if (c == '{' || c == '[') {
        v->type = c;
        TRY(json_members(w, d, n, depth));
        v = &d->nodes[n]; /* the array may have moved */
        v->stop = (uint32_t)d->at;
    } else if (c == '"') {
        TRY(json_string(w, d, v));
    } else {
        for (int i = 0; i < 3 && v->type == 0; i++) {
            size_t length = strlen(words[i]);
            if (d->size - d->at >= length && memcmp(d->text + d->at, words[i], length) == 0) {
                v->type = c;
                d->at += length;
                v->stop = (uint32_t)d->at;
            }
        }
        if (v->type == 0) TRY(json_number(w, d, v));
    }
    d->nodes[n].next = (uint32_t)d->count;
    return true;
}

/* Parses an object that is all of the text. */
static bool parse_json(work *w, document *d, const char *text, size_t size) {
    memset(d, 0, sizeof *d);
    if (size > MOST_HEADER || !is_utf8((const uint8_t *)text, size)) return CORRUPT("it is not JSON in UTF-8");
    d->text = text;
    d->size = size;
    TRY(json_value(w, d, 0));
    if (d->at != size || d->nodes[0].type != '{') return CORRUPT("it is not one JSON object");
    return true;
}

/* A copy of a string without its escapes, and a zero behind it. */
static bool copy_string(work *w, const document *d, size_t n, const char **copy, size_t *length) {
    const node *v = &d->nodes[n];
    char *out = keep(w, (uint64_t)(v->stop - v->start) + 1, 1);
    TRY(out);
    *copy = out;
    for (uint32_t i = v->start; i < v->stop;) *out++ = unescaped(d->text, &i);
    *length = (size_t)(out - *copy);
    return true;
}

/* The value of a key in an object; 0, which is no value's place, if there is none. */
static size_t lookup(const document *d, size_t object, const char *key) {
    for (size_t i = first_child(object); i < after(d, object); i = after(d, after(d, i))) {
        if (is_word(d, i, key)) return after(d, i);
    }
    return 0;
}

/* -- arithmetic coding: the range coder, odds, and counters that are mixed (range_coder.py, logistic.py, mixing.py) - */

enum { LIMIT = 12 * 256 - 1, GROUP_SMALL = 0, GROUP_FAST = 1, UNARY = 14 };

typedef struct {
    uint16_t squash[2 * LIMIT + 1]; /* chance in 1/65536 of log odds in 1/256 */
    int16_t stretch[65536];         /* log odds of a chance */
    int32_t logs[2048 + 64];        /* 256 ln of mantissas, then of powers of two */
    uint32_t crc[256];
} tables;

/* Numbers of 160 bits, 32 in each part, the lowest first: exp(x) · 2^80 up to x = 40. */
enum { PARTS = 5 };

static void divide_big(uint32_t a[PARTS], uint32_t by) {
    uint64_t rest = 0;
    for (int i = PARTS - 1; i >= 0; i--) {
        rest = rest << 32 | a[i];
        a[i] = (uint32_t)(rest / by);
        rest %= by;
    }
}

static void add_big(uint32_t a[PARTS], const uint32_t b[PARTS]) {
    uint64_t carry = 0;
    for (int i = 0; i < PARTS; i++) {
        carry += (uint64_t)a[i] + b[i];
        a[i] = (uint32_t)carry;
        carry >>= 32;
    }
}

/* a times b over 2^80, rounded down. */
static void multiply_big(uint32_t a[PARTS], const uint32_t b[PARTS]) {
    uint32_t all[2 * PARTS] = {0};
    for (int i = 0; i < PARTS; i++) {
        uint64_t carry = 0;
        for (int j = 0; j < PARTS; j++) {
            carry += (uint64_t)a[i] * b[j] + all[i + j];
            all[i + j] = (uint32_t)carry;
            carry >>= 32;
        }
        all[i + PARTS] = (uint32_t)carry;
    }
    for (int i = 0; i < PARTS; i++) a[i] = all[i + 2] >> 16 | all[i + 3] << 16;
}

/* e · 2^16 over 2^80 + e, rounded down. */
static uint32_t chance_of(const uint32_t e[PARTS]) {
    uint32_t rest[PARTS], below[PARTS] = {0, 0, 1u << 16, 0, 0}, chance = 0;
    memcpy(rest, e, sizeof rest);
    add_big(below, e);
    for (int bit = 0; bit < 16; bit++) {
        add_big(rest, rest);
        int i = PARTS - 1;
        while (i > 0 && rest[i] == below[i]) i--;
        bool fits = rest[i] >= below[i];
        if (fits) {
            int64_t borrow = 0;
            for (i = 0; i < PARTS; i++) {
                borrow += (int64_t)rest[i] - below[i];
                rest[i] = (uint32_t)borrow;
                borrow = borrow < 0 ? -1 : 0;
            }
        }
        chance = chance << 1 | fits;
    }
    return chance;
}

static void make_tables(tables *t) {
    static const uint32_t one[PARTS] = {0, 0, 1u << 16, 0, 0};
    uint32_t step[PARTS], term[PARTS], e[PARTS];
    memcpy(step, one, sizeof one);
    memcpy(term, one, sizeof one);
    memcpy(e, one, sizeof one);
    for (uint32_t i = 1; i < 30; i++) {
        divide_big(term, 256 * i);
        add_big(step, term);
    }
    /* `e` runs through exp(x / 256); `reached` is how many mantissas, then powers of two, are below it */
    int mantissa = 2048, power = 0;
    for (int x = 0; x < 40 * 256; x++) {
        if (x <= LIMIT) {
            uint32_t chance = chance_of(e);
            chance = chance < 1 ? 1 : chance > 65535 ? 65535 : chance;
            t->squash[LIMIT + x] = (uint16_t)chance;
            t->squash[LIMIT - x] = (uint16_t)(65536 - chance);
        }
        /* what is below e in units of 2^80, rounded up: numbers from it on have a logarithm of x or more */
        uint64_t least = (uint64_t)e[2] >> 16 | (uint64_t)e[3] << 16 | (uint64_t)e[4] << 48;
        least += e[0] || e[1] || (e[2] & 0xFFFF);
        for (; mantissa < 4096 && (uint64_t)mantissa < least; mantissa++) t->logs[mantissa - 2048] = x - 1;
        for (; power < 64 && (uint64_t)1 << (power < 57 ? power : 57) < least; power++) t->logs[2048 + power] = x - 1;
        multiply_big(e, step);
    }
    int place = 0;
    for (int chance = 0; chance < 65536; chance++) {
        while (place < 2 * LIMIT && t->squash[place] < chance) place++;
        t->stretch[chance] = (int16_t)(place - LIMIT);
    }
    make_crc_table(t->crc);
}

static int64_t squashed(const tables *t, int64_t x) {
    return t->squash[clipped(x, -LIMIT, LIMIT) + LIMIT];
}

/* 256 ln of a whole number from 1 to 2^58, to within 2. */
static int64_t logarithm(const tables *t, int64_t x) {
    int shift = 0;
    if (x >= (int64_t)1 << 40) {
        x >>= 28;
        shift += 28;
    }
    if (x >= 1 << 26) {
        x >>= 14;
        shift += 14;
    }
    if (x >= 1 << 19) {
        x >>= 7;
        shift += 7;
    }
    for (; x >= 4096; shift++) x >>= 1;
    for (; x < 2048; shift--) x <<= 1;
    return shift >= 0 ? t->logs[x - 2048] + t->logs[2048 + shift] : t->logs[x - 2048] - t->logs[2048 - shift];
}

#define WINDOW ((uint64_t)1 << 48)

typedef struct {
    uint64_t low, span, offset; /* the interval, and how far into it the bytes point */
    uint64_t position;          /* bytes that were read, those beyond the end included, which are zeros */
    const uint8_t *data;
    size_t size;
} coder;

static uint64_t next_byte(coder *c) {
    uint64_t at = c->position++;
    return at < c->size ? c->data[at] : 0;
}

static void start_coder(coder *c, const uint8_t *data, size_t size) {
    *c = (coder){0, WINDOW, 0, 0, data, size};
    for (int i = 0; i < 6; i++) c->offset = c->offset << 8 | next_byte(c);
}

static void narrow(coder *c, uint64_t start, uint64_t span) {
    c->low = (c->low + start) & (WINDOW - 1);
    c->offset -= start;
    for (; span < WINDOW >> 8; span <<= 8) {
        c->low = c->low << 8 & (WINDOW - 1);
        c->offset = c->offset << 8 | next_byte(c);
    }
    c->span = span;
}

static int read_bit(coder *c, int64_t one) {
    uint64_t bound = (c->span >> 16) * (uint64_t)(65536 - one);
    bool bit = c->offset >= bound;
    narrow(c, bit ? bound : 0, bit ? c->span - bound : bound);
    return bit;
}

static uint32_t read_uniform(coder *c, uint64_t alphabet) { /* of at most 65536 */
    uint64_t share = c->span / alphabet, symbol = c->offset / share;
    if (symbol >= alphabet - 1) symbol = alphabet - 1;
    narrow(c, symbol * share, symbol < alphabet - 1 ? share : c->span - symbol * share);
    return (uint32_t)symbol;
}

/* Whether the bytes end as an encoder ends them: the number in the interval with the fewest bytes before its zeros. */
static bool is_finished(const coder *c) {
    uint64_t number = 0;
    for (int zeros = 48; zeros >= 0; zeros -= 8) {
        number = (c->low + ((uint64_t)1 << zeros) - 1) >> zeros << zeros;
        if (number < c->low + c->span) break;
    }
    return number - c->low == c->offset && c->size <= c->position && (c->size == 0 || c->data[c->size - 1]);
}

typedef struct {
    int32_t odds, seen; /* of a one, in 1/2^22; bits seen */
} counter;

static void fresh_counters(counter *counters, size_t count) {
    for (size_t i = 0; i < count; i++) counters[i] = (counter){1 << 21, 0};
}

static void learn(counter *c, int bit, int limit) {
    c->odds += (int32_t)floor_divided(((int64_t)(bit << 22) - c->odds) * 10, 10 * c->seen + 16);
    if (c->seen < limit) c->seen++;
}

static int read_counted(coder *c, counter *counted, int limit) {
    int bit = read_bit(c, clipped(counted->odds >> 6, 32, 65536 - 32));
    learn(counted, bit, limit);
    return bit;
}

enum { MOST_MIXED = 11 };

static int read_mixed(
    coder *c, const tables *t, counter *counters, const size_t *at, int64_t *weights, int count, int rate, int limit
) {
    int64_t inputs[MOST_MIXED], total = 0;
    for (int i = 0; i < count; i++) {
        inputs[i] = t->stretch[counters[at[i]].odds >> 6];
        total += weights[i] * inputs[i];
    }
    int64_t one = clipped(squashed(t, shifted(total, 16)), 32, 65536 - 32);
    int bit = read_bit(c, one);
    int64_t error = ((int64_t)(bit << 16) - one) * rate;
    for (int i = 0; i < count; i++) {
        weights[i] += shifted(inputs[i] * error + (1 << 17), 18);
        learn(&counters[at[i]], bit, limit);
    }
    return bit;
}

static int64_t read_golomb(coder *c, counter *counters) {
    int length = 0;
    while (length < 30 && read_counted(c, &counters[length], 255)) length++;
    int64_t number = 1;
    while (length--) number = number << 1 | read_bit(c, 32768);
    return number - 1;
}

/* -- coded text (text.py) ---------------------------------------------------------------------------------------- */

enum { CONTEXTS = 5, SLOTS = 1 << 16, LONGEST_TEXT = 1 << 20 };

/* With ' for ". */
static const char EXAMPLE[] =
    "{'coder':'Fixed','recipes':['Binary'],'tensors':{'weight':[[2,3],0]}}\n"
    "{'recipes':[['ECSQ',3,{'points':['Uniform',6]}],['Uniform',8,{'scale':['Float','float16']}]],"
    "'tensors':{'layers.0.bias':[[6],0],'layers.0.weight':[[6,5],1],"
    "'layers.1.bias':[[7],0],'layers.1.weight':[[7,6],1]}}\n"
    "{'coder':'Context','recipes':[['Codebook',256,{'block':[1,-1],'centroids':['Uniform',5]}],'Ternary'],"
    "'tensors':{'conv1.bias':[[16],'F32'],'conv1.weight':[[16,3,3,3],0],'conv2.bias':[[32],'F32'],"
    "'conv2.weight':[[32,16,3,3],0],'fc.bias':[[10],'F32'],'fc.weight':[[10,64],1]}}\n"
    "{'activations':[['Uniform',8,{'symmetric':false}],"
    "{'range':'calibrated','recipe':['Uniform',4],'rule':'absmax'}],"
    "'aliases':{'decoder.weight':'embedding.weight'},'inputs':{'linear1':0,'linear2':1},"
    "'recipes':[['Pruned',100,{'values':['Uniform',4,{'block':[1,-1],'pad':true,'scale':['Float','bfloat16']}]}]],"
    "'tensors':{'embedding.weight':[[9,8],0],'encoder.norm1.bias':[[8],'BF16'],"
    "'encoder.norm1.num_batches_tracked':[[],'I64'],'encoder.norm1.running_mean':[[8],'F16'],"
    "'encoder.norm1.running_var':[[8],'F16'],'encoder.norm1.weight':[[8],'F32']}}\n";

typedef struct {
    uint16_t chances[CONTEXTS * SLOTS];
    uint8_t uses[CONTEXTS * SLOTS];
    int64_t weights[CONTEXTS + 1][CONTEXTS + 1];
    int64_t recent, word;  /* the last 6 bytes; the word */
    int64_t depth, commas; /* brackets that are open, commas in the innermost */
} reader;

static void fresh_reader(reader *r) {
    memset(r, 0, sizeof *r);
    for (size_t i = 0; i < CONTEXTS * SLOTS; i++) r->chances[i] = 1 << 15;
    for (int i = 0; i <= CONTEXTS; i++) {
        for (int j = 0; j <= CONTEXTS; j++) r->weights[i][j] = 1 << 14;
    }
    r->word = '\n';
}

/* The next byte, read from `c`, or, where that is NULL, given; the model learns it. */
static int read_byte(reader *r, const tables *t, coder *c, int byte) {
    int64_t hashes[CONTEXTS] = {
        r->recent & 0xFF, r->recent & 0xFFFF, r->recent & 0xFFFFFFFF, r->recent,
        r->word * 31 + r->commas * 977 + r->depth * 7,
    };
    for (int i = 0; i < CONTEXTS; i++) {
        int64_t rest = hashes[i] - floor_divided(hashes[i], 1000003) * 1000003;
        hashes[i] = (rest * 7919 + i * 104729) % 1000003;
    }
    int symbol = 1;
    for (int shift = 7; shift >= 0; shift--) {
        int64_t inputs[CONTEXTS + 1], dot = 0;
        size_t slots[CONTEXTS];
        int seen = 0;
        for (int i = 0; i < CONTEXTS; i++) {
            uint64_t hash = (uint64_t)(hashes[i] * 256 + symbol) * 0x9E3779B1u >> 24;
            slots[i] = (size_t)i * SLOTS + (size_t)(hash % SLOTS);
            inputs[i] = r->uses[slots[i]] ? t->stretch[r->chances[slots[i]]] : 0;
            seen += r->uses[slots[i]] > 0;
        }
        inputs[CONTEXTS] = 256;
        for (int i = 0; i <= CONTEXTS; i++) dot += inputs[i] * r->weights[seen][i];
        int64_t one = squashed(t, shifted(dot, 16));
        int bit = c ? read_bit(c, one) : byte >> shift & 1;
        int64_t error = (int64_t)(bit << 16) - one;
        for (int i = 0; i <= CONTEXTS; i++) r->weights[seen][i] += shifted(inputs[i] * error * 24, 18);
        for (int i = 0; i < CONTEXTS; i++) {
            int used = (int)smaller(r->uses[slots[i]] + 1, 72), chance = r->chances[slots[i]];
            r->uses[slots[i]] = (uint8_t)used;
            r->chances[slots[i]] = (uint16_t)(chance + floor_divided((bit * 65535 - chance) * 2, 2 * used + 1));
        }
        symbol = symbol << 1 | bit;
    }
    byte = symbol & 255;
    r->recent = (r->recent << 8 & 0xFFFFFFFFFFFF) | byte;
    if ((byte >= '0' && byte <= '9') || (byte >= 'A' && byte <= 'Z') || (byte >= 'a' && byte <= 'z') || byte == '_') {
        r->word = (r->word * 271 + byte) & ((1 << 30) - 1);
        return byte;
    }
    r->word = byte;
    if (byte == ':') r->depth = r->commas = 0;
    if (byte == '[') {
        r->depth++;
        r->commas = 0;
    }
    r->depth -= byte == ']';
    r->commas += byte == ',';
    return byte;
}

static bool read_text(work *w, const tables *t, const uint8_t *data, size_t size, const char **text, size_t *length) {
    reader *r = room(w, 1, sizeof *r);
    char *out = room(w, LONGEST_TEXT, 1);
    TRY(r && out);
    fresh_reader(r);
    for (const char *c = EXAMPLE; *c; c++) read_byte(r, t, NULL, *c == '\'' ? '"' : *c);
    coder c;
    start_coder(&c, data, size);
    *text = out;
    for (*length = 0;; ++*length) {
        int byte = read_byte(r, t, &c, 0);
        if (byte == '\n') break;
        if (*length == LONGEST_TEXT) return CORRUPT("a text does not end within %d bytes", LONGEST_TEXT);
        out[*length] = (char)byte;
    }
    return is_finished(&c) ? true : CORRUPT("a text ends before its bytes do, or after them");
}

/* -- code streams, and fixed width (fixed.py) -------------------------------------------------------------------- */

typedef struct {
    uint64_t rows, cols;
    uint64_t alphabet; /* 0: without, codes are signed */
    int64_t centre;    /* the code that stands for zero */
    int states;        /* of the machine that says which codes are even; 0 without one */
    uint32_t *codes;   /* rows × cols; signed ones in two's complement */
} stream;

static uint64_t symbols_of(const stream *s) {
    return s->rows * s->cols;
}

static bool costs_nothing(const stream *s) {
    return symbols_of(s) == 0 || s->alphabet == 1;
}

/* The state after `state` and a choice: Ungerboeck's machines of 4 to 256 states, by their parity checks. */
static void make_machine(int states, uint8_t next[256][2]) {
    static const int checks[][3] = {
        {4, 05, 02}, {8, 013, 04}, {16, 023, 04}, {32, 045, 010}, {64, 0103, 024}, {128, 0235, 0126}, {256, 0515, 0362},
    };
    int i = 0;
    while (checks[i][0] != states) i++;
    for (int state = 0; state < states; state++) {
        for (int choice = 0; choice < 2; choice++) {
            int after = state >> 1 ^ (state & 1 ? checks[i][1] >> 1 : 0) ^ (choice ? checks[i][2] >> 1 : 0);
            next[state][choice] = (uint8_t)after;
        }
    }
}

/* Bit 1 of a level less its parity: which of the two ways on a machine takes. */
static int choice_of(int64_t level, int parity) {
    return (int)(shifted(level - parity, 1) & 1);
}

typedef struct {
    int group, bits; /* symbols per word, and its bits; plain: 1 */
    int tail_bits;   /* of the last word where it holds fewer symbols */
    uint64_t size;   /* bytes of all */
} packing;

/* Bits of numbers below alphabet^count; 65 where that is beyond 64. */
static int word_bits(uint64_t alphabet, uint64_t count) {
    uint64_t power = 1;
    for (uint64_t i = 0; i < count; i++) {
        if (power > UINT64_MAX / alphabet) return 65;
        power *= alphabet;
    }
    return bit_length(power - 1);
}

static packing packed(uint64_t alphabet, uint64_t count, int group, int bits) {
    packing p = {group, bits, word_bits(alphabet, count % (uint64_t)group), 0};
    p.size = (count / (uint64_t)group * (uint64_t)bits + (uint64_t)p.tail_bits + 7) / 8;
    return p;
}

/* How `count` symbols of an alphabet of 1 to 2^32 are packed. */
static packing packing_of(uint64_t alphabet, uint64_t count) {
    int width = bit_length(alphabet - 1), group = 1, bits = width;
    packing plain = packed(alphabet, count, 1, width);
    if ((alphabet & (alphabet - 1)) == 0) return plain;
    for (int symbols = 2;; symbols++) {
        int needed = word_bits(alphabet, (uint64_t)symbols);
        if (needed > 64) break;
        if (needed * group < bits * symbols) {
            group = symbols;
            bits = needed;
        }
    }
    packing grouped = packed(alphabet, count, group, bits);
    return grouped.size < plain.size ? grouped : plain;
}

/* `count` bits from place `at` on, lowest first. */
static uint64_t bits_at(const uint8_t *data, size_t size, uint64_t at, int count) {
    size_t byte = (size_t)(at / 8);
    int skip = (int)(at % 8);
    if (count == 0) return 0;
    uint64_t number = little(data + byte, (int)smaller(8, (int64_t)(size - byte))) >> skip;
    if (skip + count > 64) number |= (uint64_t)data[byte + 8] << (64 - skip);
    return count == 64 ? number : number & (((uint64_t)1 << count) - 1);
}

/* One stream at fixed width, all of `data`, whose size was found to be right. */
static bool unpack(work *w, const uint8_t *data, size_t size, uint64_t alphabet, uint64_t count, uint32_t *codes) {
    packing p = packing_of(alphabet, count);
    uint64_t at = 0;
    if (size == 0) return true;
    for (uint64_t i = 0; i < count; i += (uint64_t)p.group) {
        int group = (int)smaller(p.group, (int64_t)(count - i)), bits = group < p.group ? p.tail_bits : p.bits;
        uint64_t word = bits_at(data, size, at, bits);
        at += (uint64_t)bits;
        for (int k = 0; k < group - 1; k++) {
            codes[i + (uint64_t)k] = (uint32_t)(word % alphabet);
            word /= alphabet;
        }
        if (word >= alphabet) return CORRUPT("a code is not in [0, %" PRIu64 ")", alphabet);
        codes[i + (uint64_t)group - 1] = (uint32_t)word;
    }
    if (at % 8 && data[size - 1] >> at % 8) return CORRUPT("the unused bits of the last byte are not zero");
    return true;
}

static bool fixed_size(work *w, const stream *s, size_t count, uint64_t *size) {
    *size = 0;
    for (size_t i = 0; i < count; i++) {
        if (s[i].alphabet == 0) return CORRUPT("codes without a bound are said to be of fixed width");
        *size += packing_of(s[i].alphabet, symbols_of(&s[i])).size;
    }
    return true;
}

static bool read_fixed(work *w, const uint8_t *data, size_t size, stream *s, size_t count) {
    uint64_t needed;
    TRY(fixed_size(w, s, count, &needed));
    if (needed != size) return CORRUPT("the codes take %" PRIu64 " bytes, but there are %zu", needed, size);
    for (size_t i = 0; i < count; i++) {
        size_t own = (size_t)packing_of(s[i].alphabet, symbols_of(&s[i])).size;
        TRY(unpack(w, data, own, s[i].alphabet, symbols_of(&s[i]), s[i].codes));
        data += own;
    }
    return true;
}

/* -- rANS (rans.py, rans_loops.py) ------------------------------------------------------------------------------- */

typedef struct {
    const uint8_t *at, *end;
} bytes;

/* A number of seven bits a byte; false where it is cut off, too long or not in its shortest form. */
static bool read_number(bytes *b, uint64_t *number) {
    *number = 0;
    for (int i = 0; i < 5 && b->at < b->end; i++) {
        uint8_t byte = *b->at++;
        *number |= (uint64_t)(byte & 127) << 7 * i;
        if (byte < 128) return i == 0 || byte;
    }
    return false;
}

enum { MOST_SYMBOLS = 1 << 12 };

typedef struct {
    uint32_t code, step, offset;
} slot;

/* One table of frequencies, spread over 2^precision slots. */
static bool read_table(work *w, bytes *b, const stream *s, int precision, int parity, slot *slots) {
    uint64_t most = (uint64_t)(b->end - b->at), count, number, dense;
    int64_t *symbols = room(w, MOST_SYMBOLS, sizeof *symbols);
    TRY(symbols);
    if (b->at == b->end || *b->at++ != precision) return CORRUPT("the table of frequencies is not one");
    if (most > MOST_SYMBOLS) most = MOST_SYMBOLS; /* which is no more than 2^precision */
    if (!read_number(b, &count) || count < 1 || count > most || !read_number(b, &number)) {
        return CORRUPT("the table of frequencies is not one");
    }
    symbols[0] = number % 2 ? -(int64_t)(number / 2) - 1 : (int64_t)(number / 2);
    if (!read_number(b, &dense)) return CORRUPT("the table of frequencies is not one");
    for (uint64_t i = 1; i < count; i++) {
        number = 0;
        if (!dense && !read_number(b, &number)) return CORRUPT("the table of frequencies is not one");
        symbols[i] = symbols[i - 1] + 1 + (int64_t)number;
    }
    int64_t least = s->alphabet ? 0 : -LARGEST_CODE, largest = s->alphabet ? (int64_t)s->alphabet - 1 : LARGEST_CODE;
    bool gapless = symbols[count - 1] - symbols[0] == (int64_t)count - 1;
    if (dense != gapless || symbols[0] < least || symbols[count - 1] > largest) {
        return CORRUPT("the table of frequencies is not one");
    }
    uint64_t start = 0, total = (uint64_t)1 << precision;
    for (uint64_t i = 0; i < count; i++) {
        number = total - start - 1;
        if (i < count - 1 && !read_number(b, &number)) return CORRUPT("the table of frequencies is not one");
        if (number >= total - start) return CORRUPT("the frequencies are more than there can be");
        if (parity >= 0 && (symbols[i] & 1) != parity) return CORRUPT("even and odd codes share a table");
        for (uint64_t k = 0; k <= number; k++) {
            slots[start + k] = (slot){(uint32_t)symbols[i], (uint32_t)number + 1, (uint32_t)k};
        }
        start += number + 1;
    }
    return true;
}

static bool read_words(work *w, bytes table, const uint8_t *data, uint64_t words, stream *s) {
    int precision = *table.at;
    if (precision != 12 && precision != 14 && precision != 16) return CORRUPT("frequencies of %d bits", precision);
    uint64_t state[4], at = 8, mask = ((uint64_t)1 << precision) - 1;
    uint8_t next[256][2];
    cell *mark = w->cells;
    slot *slots = room(w, (uint64_t)2 << precision, sizeof *slots);
    TRY(slots);
    for (int parity = 0; parity < (s->states ? 2 : 1); parity++) {
        TRY(read_table(w, &table, s, precision, s->states ? parity : -1, slots + ((size_t)parity << precision)));
    }
    if (table.at != table.end) return CORRUPT("the table of frequencies is not one");
    if (words < 8) return CORRUPT("%" PRIu64 " words are fewer than the states take", words);
    if (s->states) make_machine(s->states, next);
    bool same = true;
    for (int i = 0; i < 4; i++) {
        state[i] = little(data + 4 * i, 4);
        same = same && state[i] >= 1 << 16;
    }
    uint64_t count = symbols_of(s);
    int place = 0;
    for (uint64_t i = 0; i < count && same; i++) {
        uint64_t x = state[i % 4];
        int parity = place & 1;
        const slot *found = &slots[((size_t)parity << precision) + (x & mask)];
        s->codes[i] = found->code;
        if (s->states) place = next[place][choice_of((int32_t)found->code, parity)];
        x = found->step * (x >> precision) + found->offset;
        if (x < 1 << 16) {
            same = at < words;
            if (same) x = x << 16 | little(data + 2 * at++, 2);
        }
        state[i % 4] = x;
    }
    for (int i = 0; i < 4; i++) same = same && state[i] == 1 << 16;
    release(&w->cells, mark);
    return same && at == words ? true : CORRUPT("the words are not of these codes");
}

/* Codes at fixed width, those without an alphabet modulo 2^32. */
static bool read_plain(work *w, const uint8_t *data, uint64_t size, stream *s) {
    uint64_t count = symbols_of(s);
    TRY(unpack(w, data, (size_t)size, s->alphabet ? s->alphabet : (uint64_t)1 << 32, count, s->codes));
    uint8_t next[256][2];
    int place = 0;
    if (s->states) make_machine(s->states, next);
    for (uint64_t i = 0; i < count && s->alphabet == 0; i++) {
        int32_t code = (int32_t)s->codes[i];
        if (code < -LARGEST_CODE) return CORRUPT("a code of -2^31");
        if (s->states && (code & 1) != (place & 1)) return CORRUPT("the codes are no path through a machine");
        if (s->states) place = next[place][choice_of(code, place & 1)];
    }
    return true;
}

/* The streams at the beginning of `b`, which goes on behind them. */
static bool read_rans(work *w, bytes *b, stream *s, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint64_t size, words;
        if (costs_nothing(&s[i])) continue;
        if (!read_number(b, &size)) return CORRUPT("a number is cut off or too long");
        if (size > (uint64_t)(b->end - b->at)) return CORRUPT("a table of %" PRIu64 " bytes does not fit", size);
        bytes table = {b->at, b->at + size};
        b->at += size;
        if (table.at == table.end) {
            size = packing_of(s[i].alphabet ? s[i].alphabet : (uint64_t)1 << 32, symbols_of(&s[i])).size;
        } else {
            if (!read_number(b, &words)) return CORRUPT("a number is cut off or too long");
            size = 2 * words;
        }
        if (size > (uint64_t)(b->end - b->at)) return CORRUPT("codes of %" PRIu64 " bytes do not fit", size);
        if (table.at == table.end) {
            TRY(read_plain(w, b->at, size, &s[i]));
        } else {
            TRY(read_words(w, table, b->at, words, &s[i]));
        }
        b->at += size;
    }
    return true;
}

/* -- adaptive coding (context.py) -------------------------------------------------------------------------------- */

enum {
    FAST_ZERO = 4 * 8 * 8,
    FAST_CONTEXTS = FAST_ZERO + 9 + 4 * UNARY,
    SMALL_SIGNS = 117,
    SMALL_SIZES = 64 * UNARY + 32,
    FACTORS = 14, /* of the zero flag in *small* */
    SIGN_MODELS = 11,
    SIZE_MODELS = 7,
    LINKS = 8,
    LIST = 32,
    TREE = 12
};

typedef struct {
    uint64_t length;
    int8_t *classes; /* of the members of an axis of this length, by their non-zeros */
} link;

typedef struct {
    coder coder;
    const tables *t;
    bool small;
    counter signs[SMALL_SIGNS + 3], sizes[SMALL_SIZES + UNARY];
    int64_t sign_weights[SIGN_MODELS], size_weights[4][SIZE_MODELS];
    link *links;
    size_t link_count, most_links;
} context;

/* What a stream of numbers is decoded into: with a machine, halves of levels, and the signs of odd levels. */
typedef struct {
    int64_t rows, cols, low, high;
    int32_t *codes;
    int8_t *odd; /* NULL without a machine */
    uint8_t next[256][2];
} grid;

static bool is_number(const stream *s) {
    return s->alphabet == 0 || s->centre > 0 || s->alphabet == 2;
}

static void read_uniforms(coder *c, uint64_t alphabet, uint32_t *codes, uint64_t count) {
    uint64_t parts = (alphabet + 65535) >> 16;
    for (uint64_t i = 0; i < count; i++) {
        uint32_t high = parts > 1 ? read_uniform(c, parts) : 0;
        codes[i] = high << 16 | read_uniform(c, alphabet < 65536 ? alphabet : 65536);
    }
}

/* Labels, bit by bit from the top: paths in a tree for all, and after each left and each upper label (labels.py). */
static bool read_labels(work *w, context *x, const stream *s, int width) {
    int tree = width < TREE ? width : TREE, context_bits = width + tree < 16 ? width + tree : 16;
    int shift = width + tree - context_bits, models = x->small ? 3 : 1;
    size_t left_start = (size_t)1 << tree, above_start = left_start + ((size_t)1 << context_bits), at[3];
    size_t count = above_start + ((size_t)1 << context_bits);
    int64_t weights[3] = {180 << 8, 50 << 8, 50 << 8};
    cell *mark = w->cells;
    counter *counters = room(w, count, sizeof *counters);
    TRY(counters);
    fresh_counters(counters, count);
    if (!x->small) weights[0] = 1 << 16;
    for (uint64_t i = 0; i < s->rows; i++) {
        for (uint64_t j = 0; j < s->cols; j++) {
            uint32_t *code = &s->codes[i * s->cols + j];
            size_t left = j > 0 ? code[-1] >> shift : 0, above = i > 0 ? *(code - s->cols) >> shift : 0;
            uint64_t path = 1;
            for (int k = 0; k < tree; k++) {
                at[0] = (size_t)path;
                at[1] = left_start + (left << tree) + (size_t)path;
                at[2] = above_start + (above << tree) + (size_t)path;
                path = path << 1 | (unsigned)read_mixed(&x->coder, x->t, counters, at, weights, models, 2, 255);
            }
            for (int k = tree; k < width; k++) path = path << 1 | (unsigned)read_bit(&x->coder, 32768);
            *code = (uint32_t)(path - ((uint64_t)1 << width));
        }
    }
    release(&w->cells, mark);
    return true;
}

/* -- the profile *fast* (fast.py) -------------------------------------------------------------------------------- */

typedef struct {
    int32_t slow, fast, seen;
} estimate;

static int fast_bit(coder *c, estimate *e) {
    int bit = read_bit(c, clipped((e->slow + e->fast) >> 1, 16, 65536 - 16));
    int32_t target = bit << 16;
    bool fresh = e->seen < 1 << 5;
    if (e->seen < 1 << 8) {
        e->slow += (int32_t)floor_divided((target - e->slow) * 2, 2 * e->seen + 3);
        e->seen++;
    } else {
        e->slow += (int32_t)shifted(target - e->slow, 8);
    }
    e->fast = fresh ? e->slow : e->fast + (int32_t)shifted(target - e->fast, 5);
    return bit;
}

static int activity_class(int activity) {
    static const int ends[] = {64, 128, 256, 512, 1024, 1600, 2600};
    int k = 0;
    while (k < 7 && activity >= ends[k]) k++;
    return k;
}

static int sign_class(int64_t value) {
    return value == 0 ? 0 : value > 0 ? 1 : 2;
}

static bool read_fast(work *w, coder *c, grid *g) {
    static const counter even = {1 << 21, 0};
    cell *mark = w->cells;
    estimate *all = room(w, 2 * FAST_CONTEXTS + 1, sizeof *all);
    int *columns = room(w, (uint64_t)g->cols, sizeof *columns);
    counter escapes[32];
    bool outside = false;
    int place = 0;
    TRY(all && columns);
    for (int i = 0; i < 32; i++) escapes[i] = even;
    for (int i = 0; i <= 2 * FAST_CONTEXTS; i++) {
        bool zero = i < 2 * FAST_CONTEXTS && i % FAST_CONTEXTS < FAST_ZERO;
        all[i].slow = all[i].fast = zero ? 1 << 13 : 1 << 15;
    }
    for (int64_t j = 0; j < g->cols; j++) columns[j] = 512;
    for (int64_t i = 0; i < g->rows; i++) {
        int row = 512;
        int64_t left = 0;
        for (int64_t j = 0; j < g->cols; j++) {
            int32_t *code = &g->codes[i * g->cols + j];
            int64_t above = i > 0 ? *(code - g->cols) : 0;
            int parity = g->odd ? place & 1 : 0;
            estimate *mine = all + parity * FAST_CONTEXTS;
            int near_zero = (activity_class(row) * 8 + activity_class(columns[j])) * 4;
            near_zero += (left ? 2 : 0) + (above ? 1 : 0);
            if (!fast_bit(c, mine + near_zero)) {
                row -= row >> 5;
                columns[j] -= columns[j] >> 4;
                left = 0;
                if (g->odd) {
                    int sign = parity ? 1 - 2 * fast_bit(c, all + 2 * FAST_CONTEXTS) : 0;
                    g->odd[i * g->cols + j] = (int8_t)sign;
                    place = g->next[place][choice_of(sign, parity)];
                }
                continue;
            }
            row += (4096 - row) >> 5;
            columns[j] += (4096 - columns[j]) >> 4;
            bool negative = g->low < 0;
            if (g->low < 0 && g->high > 0) {
                negative = fast_bit(c, mine + FAST_ZERO + 3 * sign_class(left) + sign_class(above));
            }
            int64_t most = negative ? -g->low : g->high, k = 1;
            int near = (int)smaller((imaxabs(left) + imaxabs(above) + 1) >> 1, 3);
            while (k < UNARY && k < most && fast_bit(c, mine + FAST_ZERO + 9 + 4 * (k - 1) + near)) k++;
            if (k == UNARY && k < most) {
                k += read_golomb(c, escapes);
                outside = outside || k > most;
                k = smaller(k, most);
            }
            left = negative ? -k : k;
            *code = (int32_t)left;
            if (g->odd) {
                int sign = negative ? -parity : parity;
                g->odd[i * g->cols + j] = (int8_t)sign;
                place = g->next[place][choice_of(2 * left + sign, parity)];
            }
        }
    }
    release(&w->cells, mark);
    return outside ? CORRUPT("codes are not in [%" PRId64 ", %" PRId64 "]", g->low, g->high) : true;
}

/* -- the profile *small* (small.py), whose names these are; counts and expectations are in 1/4096 ---------------- */

enum {
    Q = 12,
    PRIOR_9 = 19 << 8, PRIOR_5 = 12 << 8, PRIOR_3 = 19 << 8, PRIOR_1 = 23 << 8,
    PRIOR_LINK = 32 << 8, PRIOR_BEFORE = 53 << 8, PRIOR_ROW = 1 << 8,
    PRIOR_NEAR = 27 << 8, PRIOR_WIDE = 32 << 8, PRIOR_PATTERN = 12 << 8, PRIOR_ABOVE = 13 << 8,
    UNITY = 2839
};

#define MOST_FOUND ((int64_t)1 << 34)

static int64_t ratio(const tables *t, int64_t found, int64_t expected, int64_t prior) {
    return logarithm(t, found + prior) - logarithm(t, expected + prior);
}

static int excess_class(int64_t x) {
    int k = 0;
    for (; x > 1024 && k < 6; k++) x >>= 1;
    return k;
}

typedef struct {
    int64_t *found, *balance, *excess; /* per column: non-zeros, signs, magnitudes beyond 1 */
    int64_t *held;                     /* how many there ever were in its list */
    int64_t *blurred[2], *weights[2], *line[2], *densities[4], *expected;
} columns;

/* Binomial blurs over 5 and 3 columns each way, unnormalised, and their weights. */
static void blur(columns *c, int64_t cols, int64_t stride) {
    static const int five[] = {1, 4, 6, 4, 1}, three[] = {0, 1, 2, 1, 0};
    for (int64_t j = 0; j < cols; j++) {
        c->line[0][j] = c->line[1][j] = 0;
        for (int k = -2; k <= 2; k++) {
            if (j + k < 0 || j + k >= cols) continue;
            c->line[0][j] += five[k + 2] * c->found[j + k];
            c->line[1][j] += three[k + 2] * c->found[j + k];
        }
    }
    for (int64_t j = 0; j < cols; j++) {
        if (stride == 1) {
            c->blurred[0][j] = c->line[0][j];
            c->blurred[1][j] = c->line[1][j];
            c->weights[0][j] = 16;
            c->weights[1][j] = 4;
            continue;
        }
        c->blurred[0][j] = c->blurred[1][j] = c->weights[0][j] = c->weights[1][j] = 0;
        for (int k = -2; k <= 2; k++) {
            int64_t q = j + k * stride;
            if (q < 0 || q >= cols) continue;
            c->blurred[0][j] += five[k + 2] * c->line[0][q];
            c->blurred[1][j] += three[k + 2] * c->line[1][q];
            c->weights[0][j] += 16 * five[k + 2];
            c->weights[1][j] += 4 * three[k + 2];
        }
    }
}

/* Log of each column's share of the non-zeros so far, by scale from coarse to fine. */
static void find_densities(const tables *t, columns *c, int64_t cols, int64_t total, int64_t stride) {
    int64_t mean = total / cols;
    if (stride) blur(c, cols, stride);
    for (int64_t j = 0; j < cols; j++) {
        int64_t r3 = 1 << 16, last = UNITY;
        if (stride) {
            const int64_t beside[] = {j - 3, j + 3, j - 3 * stride, j + 3 * stride};
            int64_t t9 = 2 * c->blurred[0][j], w9 = 2 * c->weights[0][j];
            for (int k = 0; k < 4; k++) {
                if (beside[k] < 0 || beside[k] >= cols) continue;
                t9 += c->blurred[0][beside[k]];
                w9 += c->weights[0][beside[k]];
            }
            int64_t r9 = ((t9 + (PRIOR_9 << 3)) << 16) / (mean * w9 + (PRIOR_9 << 3));
            int64_t r5 = (c->blurred[0][j] << 16) + (PRIOR_5 << 3) * r9;
            r5 /= mean * c->weights[0][j] + (PRIOR_5 << 3);
            r3 = (c->blurred[1][j] << 16) + (PRIOR_3 << 2) * r5;
            r3 /= mean * c->weights[1][j] + (PRIOR_3 << 2);
            int64_t l9 = logarithm(t, r9 + 1), l5 = logarithm(t, r5 + 1);
            last = logarithm(t, r3 + 1);
            c->densities[0][j] = l9 - UNITY;
            c->densities[1][j] = l5 - l9;
            c->densities[2][j] = last - l5;
        }
        int64_t r1 = ((c->found[j] << 16) + PRIOR_1 * r3) / (mean + PRIOR_1);
        c->densities[3][j] = logarithm(t, r1 + 1) - last;
    }
}

/* The code at a place, 0 outside the grid. */
static int64_t code_at(const grid *g, int64_t i, int64_t j) {
    return i >= 0 && j >= 0 && j < g->cols ? g->codes[i * g->cols + j] : 0;
}

typedef struct {
    int64_t near_found, near, wide_found, wide; /* non-zeros found and expected, weighted by nearness and not */
    int64_t signs;                              /* weighted by nearness and added, halved towards zero */
} surroundings;

/* What is before (i, j) within 3 columns and 3 image rows. */
static surroundings surroundings_of(const grid *g, const int64_t *expected, int64_t i, int64_t j, int64_t stride) {
    surroundings s = {0, 0, 0, 0, 0};
    for (int y = 0; y < (stride > 1 ? 4 : 1); y++) {
        for (int x = -3; x < (y ? 4 : 0); x++) {
            int64_t q = j - y * stride + x, code;
            if (q < 0 || q >= j) continue;
            int weight = (y ? 5 : 4) - y - abs(x);
            if (weight < 0) weight = 0;
            code = g->codes[i * g->cols + q];
            s.wide += expected[q];
            s.near += weight * expected[q];
            s.wide_found += code ? 1 << Q : 0;
            s.near_found += code ? weight << Q : 0;
            s.signs += weight * sign_of(code);
        }
    }
    s.signs /= 2;
    return s;
}

static bool read_small(work *w, context *x, grid *g, int64_t stride, const int8_t *row_links, const int8_t *col_links) {
    static const int zero_weights[FACTORS] = {175, 256, 58, 115, 86, 128, 331, 14, 76, 100, 64, 89, 28, 105};
    static const int sign_start[SIGN_MODELS] = {0, 1, 10, 17, 24, 31, 40, 53, 80, 93, 104};
    coder *c = &x->coder;
    const tables *t = x->t;
    int64_t rows = g->rows, cols = g->cols, weights[FACTORS], f[FACTORS] = {0};
    int64_t link_found[2][LINKS] = {{0}}, link_expected[2][LINKS] = {{0}};
    int64_t pattern_found[3][64] = {{0}}, pattern_expected[3][64] = {{0}};
    int64_t nonzeros[2] = {3 << Q, 3 << Q}, symbols[2] = {3 << Q << 4, 3 << Q << 4}; /* of even and of odd levels */
    int64_t total = 0, row_found = 0, row_expected = 0, touches = 0;
    int64_t list = smaller(LIST, rows); /* no column holds more before its last row */
    bool outside = false;
    int place = 0, parity = 0;
    columns k;
    cell *mark = w->cells;
    int64_t *room_of_columns = room(w, product(15, (uint64_t)cols), sizeof(int64_t));
    int64_t *holders = room(w, (uint64_t)(cols * list), sizeof *holders); /* rows of a column's latest non-zeros */
    int64_t *touched = room(w, (uint64_t)rows, sizeof *touched);           /* rows that share something with this one */
    int64_t *shared = room(w, (uint64_t)rows, sizeof *shared);             /* non-zeros shared, with each row before */
    int64_t *agreement = room(w, (uint64_t)rows, sizeof *agreement);       /* equal signs less unequal ones */
    TRY(room_of_columns && holders && touched && shared && agreement);
    int64_t **parts[] = {
        &k.found, &k.balance, &k.excess, &k.held, &k.blurred[0], &k.blurred[1], &k.weights[0], &k.weights[1],
        &k.line[0], &k.line[1], &k.densities[0], &k.densities[1], &k.densities[2], &k.densities[3], &k.expected,
    };
    for (int i = 0; i < 15; i++) *parts[i] = room_of_columns + i * cols;
    for (int i = 0; i < FACTORS; i++) weights[i] = zero_weights[i] << 8;

    for (int64_t i = 0; i < rows; i++) {
        if (total) find_densities(t, &k, cols, total, stride);
        int64_t before = ratio(t, row_found, row_expected, PRIOR_BEFORE), row_balance = 0, row_excess = 0;
        row_found = row_expected = 0;
        while (touches) {
            touches--;
            shared[touched[touches]] = agreement[touched[touches]] = 0;
        }
        int row_link = row_links ? row_links[i] : -1;
        for (int64_t j = 0; j < cols; j++) {
            int col_link = col_links ? col_links[j] : -1;
            if (g->odd) parity = place & 1;
            for (int n = 0; n < 4; n++) f[1 + n] = k.densities[n][j];
            int64_t odds = weights[0] * t->stretch[(nonzeros[parity] << 16) / symbols[parity]];
            odds += weights[1] * f[1] + weights[2] * f[2] + weights[3] * f[3] + weights[4] * f[4];
            int64_t by_column = squashed(t, shifted(odds, 16)) >> 4;
            f[5] = row_link < 0 ? 0 : ratio(t, link_found[0][row_link], link_expected[0][row_link], PRIOR_LINK);
            f[6] = col_link < 0 ? 0 : ratio(t, link_found[1][col_link], link_expected[1][col_link], PRIOR_LINK);
            odds += weights[5] * f[5] + weights[6] * f[6];
            int64_t by_link = squashed(t, shifted(odds, 16)) >> 4;
            f[7] = before;
            f[8] = ratio(t, row_found, row_expected, PRIOR_ROW);
            odds += weights[7] * f[7] + weights[8] * f[8];
            k.expected[j] = squashed(t, shifted(odds, 16)) >> 4;
            surroundings around = surroundings_of(g, k.expected, i, j, stride);
            f[9] = ratio(t, around.near_found, around.near, PRIOR_NEAR);
            f[10] = ratio(t, around.wide_found, around.wide, PRIOR_WIDE);
            odds += weights[9] * f[9] + weights[10] * f[10];
            int64_t by_surroundings = squashed(t, shifted(odds, 16)) >> 4;

            bool image = stride > 1;
            int64_t left = code_at(g, i, j - 1), left2 = code_at(g, i, j - 2);
            int64_t up = code_at(g, i, image ? j - stride : j - 3), up2 = image ? code_at(g, i, j - 2 * stride) : 0;
            int64_t up_left = code_at(g, i, image ? j - stride - 1 : j - 4);
            int64_t up_right = image ? code_at(g, i, j - stride + 1) : 0;
            int64_t above = code_at(g, i - 1, j), above2 = code_at(g, i - 2, j);
            int a = (left ? 1 : 0) + (up ? 2 : 0) + (up_left ? 4 : 0);
            a += (up_right ? 8 : 0) + (left2 ? 16 : 0) + (up2 ? 32 : 0);
            int b = (above ? 1 : 0) + (above2 ? 2 : 0);
            b += (code_at(g, i - 1, j - 1) ? 4 : 0) + (code_at(g, i - 1, j + 1) ? 8 : 0);
            int64_t nearest = imaxabs(left) + imaxabs(up);
            int64_t further = imaxabs(up_left) + imaxabs(up_right) + imaxabs(left2) + imaxabs(up2);
            int d = (int)(smaller(nearest, 7) * 8 + smaller(further, 7));
            f[11] = ratio(t, pattern_found[0][a], pattern_expected[0][a], PRIOR_PATTERN);
            f[12] = ratio(t, pattern_found[1][b], pattern_expected[1][b], PRIOR_ABOVE);
            f[13] = ratio(t, pattern_found[2][d], pattern_expected[2][d], PRIOR_PATTERN);
            odds += weights[11] * f[11] + weights[12] * f[12] + weights[13] * f[13];

            int64_t one = squashed(t, shifted(odds, 16));
            int nonzero = read_bit(c, one);
            int64_t error = ((int64_t)(nonzero << 16) - one) * 14;
            for (int n = 1; n < FACTORS; n++) weights[n] += shifted(f[n] * error + (1 << 17), 18);
            int64_t count = nonzero ? 1 << Q : 0;
            symbols[parity] += 1 << Q;
            nonzeros[parity] += count;
            row_expected += by_link;
            row_found += count;
            if (row_link >= 0) {
                link_expected[0][row_link] += by_column;
                link_found[0][row_link] += count;
            }
            if (col_link >= 0) {
                link_expected[1][col_link] += by_column;
                link_found[1][col_link] += count;
            }
            pattern_expected[0][a] += by_surroundings;
            pattern_expected[1][b] += by_surroundings;
            pattern_expected[2][d] += by_surroundings;
            pattern_found[0][a] += count;
            pattern_found[1][b] += count;
            pattern_found[2][d] += count;
            if (!nonzero) {
                if (g->odd) {
                    int sign = 0;
                    if (parity) sign = 1 - 2 * read_counted(c, &x->signs[SMALL_SIGNS + 1 + sign_of(left)], 45);
                    g->odd[i * cols + j] = (int8_t)sign;
                    place = g->next[place][choice_of(sign, parity)];
                }
                continue;
            }

            int64_t held = smaller(k.held[j], list), *holder = holders + j * list;
            bool negative = g->low < 0;
            if (g->low < 0 && g->high > 0) {
                int64_t beside = 0, alike = 0, asked = 1;
                if (stride) beside = (j ? k.balance[j - 1] : 0) + (j + 1 < cols ? k.balance[j + 1] : 0);
                if (image) {
                    beside += j >= stride ? k.balance[j - stride] : 0;
                    beside += j + stride < cols ? k.balance[j + stride] : 0;
                }
                /* rows that agreed with this one so far, asked about this column */
                for (int64_t n = 0; n < held; n++) {
                    alike += agreement[holder[n]] * sign_of(g->codes[holder[n] * cols + j]);
                    asked += shared[holder[n]];
                }
                int nearer = sign_of(left) + sign_of(up);
                int farther = sign_of(up_left) + sign_of(up_right) + sign_of(left2) + sign_of(up2);
                const int64_t seen[SIGN_MODELS] = {
                    0,
                    3 * sign_of(left) + sign_of(up) + 4,
                    clipped(row_balance, -3, 3) + 3,
                    clipped(k.balance[j], -3, 3) + 3,
                    clipped(beside, -3, 3) + 3,
                    3 * sign_of(above) + sign_of(above2) + 4,
                    clipped(2 * nearer + farther, -6, 6) + 6,
                    9 * clipped(nearer, -1, 1) + 3 * clipped(farther, -1, 1) + clipped(row_balance, -1, 1) + 13,
                    clipped(alike, -6, 6) + 6,
                    clipped(around.signs, -5, 5) + 5,
                    clipped(floor_divided(alike * 12, asked), -6, 6) + 6,
                };
                size_t at[SIGN_MODELS];
                for (int n = 0; n < SIGN_MODELS; n++) at[n] = (size_t)(sign_start[n] + seen[n]);
                negative = read_mixed(c, t, x->signs, at, x->sign_weights, SIGN_MODELS, 22, 45);
            }

            int64_t most = negative ? -g->low : g->high, size = 1;
            int size_row = row_found > 1 << Q ? excess_class((row_excess << Q) / ((row_found >> Q) - 1)) : 0;
            int size_col = k.found[j] ? excess_class((k.excess[j] << Q) / (k.found[j] >> Q)) : 0;
            int64_t likely = shifted(odds, 16) + 8 * 192;
            likely = likely < 0 ? 0 : smaller(likely / 192, 11);
            for (; size < UNARY && size < most; size++) {
                int64_t first = 64 * (size - 1);
                const size_t at[SIZE_MODELS] = {
                    (size_t)(parity ? SMALL_SIZES + size - 1 : first),
                    (size_t)(first + 1 + negative),
                    (size_t)(first + 3 + smaller(nearest, 5)),
                    (size_t)(first + 10 + size_row),
                    (size_t)(first + 17 + size_col),
                    (size_t)(first + 24 + likely),
                    (size_t)(first + 36 + 4 * smaller(imaxabs(above), 3) + smaller(further, 3)),
                };
                int64_t *mixer = x->size_weights[smaller(size - 1, 3)];
                if (!read_mixed(c, t, x->sizes, at, mixer, SIZE_MODELS, 14, 73)) break;
            }
            if (size == UNARY && size < most) {
                size += read_golomb(c, x->sizes + 64 * UNARY);
                outside = outside || size > most;
                size = smaller(size, most);
            }
            int sign = negative ? -1 : 1;
            g->codes[i * cols + j] = (int32_t)(sign * size);
            if (g->odd) {
                g->odd[i * cols + j] = (int8_t)(sign * parity);
                place = g->next[place][choice_of(2 * sign * size + sign * parity, parity)];
            }
            row_balance += sign;
            row_excess += smaller(size - 1, 255);
            for (int64_t n = 0; n < held; n++) {
                if (!shared[holder[n]]) touched[touches++] = holder[n];
                shared[holder[n]]++;
                agreement[holder[n]] += sign * sign_of(g->codes[holder[n] * cols + j]);
            }
            holder[k.held[j]++ % list] = i;
        }
        for (int64_t j = 0; j < cols; j++) {
            int64_t code = g->codes[i * cols + j];
            if (code == 0) continue;
            k.found[j] = smaller(k.found[j] + (1 << Q), MOST_FOUND);
            k.balance[j] += sign_of(code);
            k.excess[j] += smaller(imaxabs(code) - 1, 255);
            total += 1 << Q;
        }
    }
    release(&w->cells, mark);
    return outside ? CORRUPT("codes are not in [%" PRId64 ", %" PRId64 "]", g->low, g->high) : true;
}

static int8_t *find_link(const context *x, uint64_t length) {
    for (size_t i = 0; i < x->link_count; i++) {
        if (x->links[i].length == length) return x->links[i].classes;
    }
    return NULL;
}

/* Remembers the classes of rows, or of columns, by how many non-zeros each has. */
static bool remember(work *w, context *x, const grid *g, bool rows) {
    int64_t length = rows ? g->rows : g->cols, across = rows ? g->cols : g->rows;
    int64_t step = rows ? g->cols : 1, along = rows ? 1 : g->cols;
    int8_t *classes = find_link(x, (uint64_t)length);
    if (classes == NULL) {
        void *links = x->links;
        TRY(grow(w, &w->cells, &links, x->link_count, &x->most_links, sizeof(link)));
        x->links = links;
        classes = room(w, (uint64_t)length, 1);
        TRY(classes);
        x->links[x->link_count++] = (link){(uint64_t)length, classes};
    }
    for (int64_t i = 0; i < length; i++) {
        int64_t found = 0;
        for (int64_t j = 0; j < across; j++) found += g->codes[i * step + j * along] != 0;
        classes[i] = (int8_t)smaller(bit_length((uint64_t)found), 6);
    }
    return true;
}

static bool read_numbers(work *w, context *x, stream *s) {
    grid g = {(int64_t)s->rows, (int64_t)s->cols, -LARGEST_CODE, LARGEST_CODE, (int32_t *)s->codes, NULL, {{0}}};
    coder *c = &x->coder;
    uint64_t count = symbols_of(s);
    int64_t stride = 0;
    if (s->alphabet) {
        g.low = -s->centre;
        g.high = (int64_t)s->alphabet - 1 - s->centre;
    }
    if (s->states) {
        g.low = floor_divided(g.low, 2) + 1;
        g.high = g.high / 2;
        g.odd = room(w, count, 1);
        TRY(g.odd);
        make_machine(s->states, g.next);
    }
    if (s->alphabet && s->alphabet <= 1 << 16 && read_bit(c, 1 << 12)) {
        read_uniforms(c, s->alphabet, s->codes, count);
        return true;
    }
    if (!x->small) {
        TRY(read_fast(w, c, &g));
    } else {
        uint64_t longest = (uint64_t)smaller(g.cols - 1, 255);
        if (s->cols >= 3 && read_uniform(c, 2)) stride = 1 + (int64_t)read_uniform(c, longest);
        const int8_t *rows = find_link(x, s->rows), *cols = find_link(x, s->cols);
        TRY(read_small(w, x, &g, stride, rows, cols));
        TRY(remember(w, x, &g, true) && remember(w, x, &g, false));
    }
    for (uint64_t i = 0; i < count; i++) {
        if (s->alphabet) g.codes[i] += (int32_t)s->centre;
        if (s->states) g.codes[i] = 2 * g.codes[i] + g.odd[i];
    }
    return true;
}

static bool read_context(work *w, const tables *t, const uint8_t *data, size_t size, stream *s, size_t count) {
    static const int sign_weights[SIGN_MODELS] = {5, 71, 29, 35, 49, 36, 80, 60, 60, 17, 50};
    static const int size_weights[SIZE_MODELS] = {-87, 128, 105, 41, 50, 33, 29};
    if (count == 0) return size ? CORRUPT("there are no streams, but %zu bytes", size) : true;
    context *x = room(w, 1, sizeof *x);
    TRY(x);
    x->t = t;
    start_coder(&x->coder, data, size);
    uint32_t profile = read_uniform(&x->coder, 4);
    if (profile > GROUP_FAST) return CORRUPT("the codes are written by another coder");
    x->small = profile == GROUP_SMALL;
    fresh_counters(x->signs, SMALL_SIGNS + 3);
    fresh_counters(x->sizes, SMALL_SIZES + UNARY);
    for (int i = 0; i < SIGN_MODELS; i++) x->sign_weights[i] = sign_weights[i] * 256;
    for (int i = 0; i < SIZE_MODELS; i++) {
        for (int k = 0; k < 4; k++) x->size_weights[k][i] = size_weights[i] * 256;
    }
    for (size_t i = 0; i < count; i++) {
        uint64_t symbols = symbols_of(&s[i]), alphabet = s[i].alphabet;
        if (costs_nothing(&s[i])) continue;
        if (is_number(&s[i])) {
            TRY(read_numbers(w, x, &s[i]));
            continue;
        }
        bool expected = symbols >= 64 && alphabet <= 1 << 12;
        bool modelled = read_bit(&x->coder, 1 << 12) != expected;
        if (modelled) {
            TRY(read_labels(w, x, &s[i], bit_length(alphabet - 1)));
        } else {
            read_uniforms(&x->coder, alphabet, s[i].codes, symbols);
        }
        for (uint64_t n = 0; n < symbols; n++) {
            if (s[i].codes[n] >= alphabet) return CORRUPT("a code is not in [0, %" PRIu64 ")", alphabet);
        }
    }
    return is_finished(&x->coder) ? true : CORRUPT("the %zu bytes of the codes do not end where the codes do", size);
}

/* -- the smallest coder for each stream (choose.py) -------------------------------------------------------------- */

typedef enum { FIXED, RANS, CONTEXT, SMALLEST, CODERS } coder_name;

static const char *const CODER_NAMES[CODERS] = {"Fixed", "Rans", "Context", "Smallest"};

static bool read_whole_rans(work *w, const uint8_t *data, size_t size, stream *s, size_t count) {
    bytes b = {data, data + size};
    TRY(read_rans(w, &b, s, count));
    return b.at == b.end ? true : CORRUPT("%zu bytes are left behind the codes", (size_t)(b.end - b.at));
}

static bool read_mixed_group(work *w, const tables *t, const uint8_t *data, size_t size, stream *s, size_t count) {
    stream choices = {1, 0, 3, 0, 0, NULL};
    size_t used[3] = {0, 0, 0};
    for (size_t i = 0; i < count; i++) choices.cols += !costs_nothing(&s[i]);
    size_t start = 1 + (size_t)packing_of(3, choices.cols).size;
    if (size < start) return CORRUPT("%" PRIu64 " choices of coders do not fit into %zu bytes", choices.cols, size - 1);
    choices.codes = room(w, choices.cols, sizeof(uint32_t));
    stream *parts[3];
    for (int k = 0; k < 3; k++) {
        parts[k] = room(w, choices.cols, sizeof(stream));
        TRY(parts[k]);
    }
    TRY(choices.codes && read_fixed(w, data + 1, start - 1, &choices, 1));
    const uint32_t *choice = choices.codes;
    for (size_t i = 0; i < count; i++) {
        if (costs_nothing(&s[i])) continue;
        parts[*choice][used[*choice]++] = s[i];
        choice++;
    }
    if ((used[0] > 0) + (used[1] > 0) + (used[2] > 0) < 2) return CORRUPT("a group of several coders has only one");
    uint64_t fixed;
    TRY(fixed_size(w, parts[0], used[0], &fixed));
    bytes b = {data + start, data + size};
    if (fixed > size - start) return CORRUPT("codes of %" PRIu64 " bytes do not fit into %zu", fixed, size - start);
    TRY(read_fixed(w, b.at, (size_t)fixed, parts[0], used[0]));
    b.at += fixed;
    TRY(read_rans(w, &b, parts[1], used[1]));
    return read_context(w, t, b.at, (size_t)(b.end - b.at), parts[2], used[2]);
}

/* Fills the codes of all streams, which have room for them and hold zeros. */
static bool read_group(
    work *w, const tables *t, coder_name name, const uint8_t *data, size_t size, stream *s, size_t count
) {
    if (name == SMALLEST) {
        int first = size ? data[0] : 0;
        if (count == 0 || first < 128) {
            name = CONTEXT;
        } else if (first == 129) {
            return read_mixed_group(w, t, data, size, s, count);
        } else if (first % 64) {
            return CORRUPT("the codes begin with %d, which names no coder", first);
        } else {
            name = first == 128 ? RANS : FIXED;
            data++;
            size--;
        }
    }
    if (name == FIXED) return read_fixed(w, data, size, s, count);
    if (name == RANS) return read_whole_rans(w, data, size, s, count);
    return read_context(w, t, data, size, s, count);
}

/* -- recipes (plan.py, quantizer.py and every quantizer) --------------------------------------------------------- */

typedef enum {
    FLOAT, INTEGER, UNIFORM, BINARY, TERNARY, TABLE, POWERS_OF_TWO, PRUNED, ECSQ, CODEBOOK, RESIDUAL, SIGN_MAGNITUDE,
    GAIN_SHAPE, TRELLIS, TCQ, LATTICE, E8P, ROTATED, BALANCED, PERMUTED, ROW_SCALED, KINDS
} kind_name;

typedef enum { NOTHING, WHOLE, SWITCH, REAL, WORD, BLOCK, RECIPE, STAGES, LEVELS } field_type;

typedef struct {
    int64_t number, other; /* a whole number, 0 or 1, the number of a word, rows and columns, a count */
    const void *data;      /* a recipe, several of them, or levels */
} argument;

typedef struct {
    kind_name kind;
    argument fields[MOST_FIELDS]; /* in the order of its kind */
} recipe;

#define REQUIRED INT64_MIN

typedef struct {
    const char *name;
    field_type type;
    int64_t usual, other;  /* the default, REQUIRED where there is none */
    int64_t least, most;   /* of a whole number */
    const recipe *recipe;  /* the default */
    const char *words;     /* all words in order, or the default recipe's JSON */
} field;

typedef struct {
    const char *name;
    field fields[MOST_FIELDS]; /* the first is the one that may be given by place */
} description;

static const recipe FLOAT32 = {FLOAT, {{0, 0, NULL}}};
static const recipe BFLOAT16 = {FLOAT, {{1, 0, NULL}}};
static const recipe PLAIN_ECSQ = {ECSQ, {{1, 0, NULL}, {-1, -1, NULL}, {0, 0, &BFLOAT16}}};

#define WHOLE_FIELD(name, usual, least, most) {name, WHOLE, usual, 0, least, most, NULL, NULL}
#define SWITCH_FIELD(name, usual) {name, SWITCH, usual, 0, 0, 0, NULL, NULL}
#define WORD_FIELD(name, usual, words) {name, WORD, usual, 0, 0, 0, NULL, words}
#define BLOCK_FIELD(rows, cols) {"block", BLOCK, rows, cols, 0, 0, NULL, NULL}
#define RECIPE_FIELD(name, usual, text) {name, RECIPE, 0, 0, 0, 0, usual, text}
#define IN_FLOAT32(name) RECIPE_FIELD(name, &FLOAT32, "\"Float\"")
#define IN_BFLOAT16(name) RECIPE_FIELD(name, &BFLOAT16, "[\"Float\",\"bfloat16\"]")
#define INNER RECIPE_FIELD("inner", NULL, NULL)
#define PAD SWITCH_FIELD("pad", 0)
#define STATES WHOLE_FIELD("states", 8, 4, 256)
#define DEAD_ZONE OTHER_FIELD("dead_zone", REAL, 0)
#define BITS(least, most) WHOLE_FIELD("bits", REQUIRED, least, most)
#define SIZE WHOLE_FIELD("size", REQUIRED, 1, MOST_WHOLE)
#define WHOLE_BLOCK BLOCK_FIELD(-1, -1)
#define OTHER_FIELD(name, type, usual) {name, type, usual, 0, 0, 0, NULL, NULL}
#define MOST_WHOLE 999999999999999999

static const description KIND[KINDS] = {
    {"Float", {WORD_FIELD("dtype", 0, "float32 bfloat16 float16")}},
    {"Integer", {WHOLE_FIELD("alphabet", REQUIRED, 1, 65536)}},
    {"Uniform", {BITS(1, 8), WHOLE_BLOCK, SWITCH_FIELD("symmetric", 1), IN_FLOAT32("scale"), PAD}},
    {"Binary", {WHOLE_BLOCK, IN_FLOAT32("scale"), PAD}},
    {"Ternary", {WHOLE_BLOCK, IN_FLOAT32("scale"), PAD}},
    {"Table", {OTHER_FIELD("levels", LEVELS, REQUIRED), WHOLE_BLOCK, IN_FLOAT32("scale"), PAD}},
    {"PowersOfTwo", {BITS(2, 5), WHOLE_BLOCK, IN_FLOAT32("scale"), PAD}},
    {"Pruned", {WHOLE_FIELD("keep", REQUIRED, 1, MOST_WHOLE), IN_FLOAT32("values")}},
    {"ECSQ", {WHOLE_FIELD("size", 1, 1, 255), WHOLE_BLOCK, IN_BFLOAT16("points"), PAD, DEAD_ZONE}},
    {"Codebook", {SIZE, BLOCK_FIELD(1, 4), IN_FLOAT32("centroids"), PAD}},
    {"Residual", {OTHER_FIELD("stages", STAGES, REQUIRED), WHOLE_FIELD("beam", 8, 1, 256)}},
    {"SignMagnitude", {INNER}},
    {"GainShape", {SIZE, BLOCK_FIELD(1, 4), IN_FLOAT32("centroids"), IN_FLOAT32("gains"), PAD}},
    {"Trellis", {STATES, WHOLE_FIELD("size", 0, 0, 127), WHOLE_BLOCK, IN_BFLOAT16("step"), IN_BFLOAT16("points"), PAD}},
    {"TCQ", {BITS(1, 7), STATES, WHOLE_BLOCK, IN_BFLOAT16("points"), PAD}},
    {"Lattice", {WORD_FIELD("kind", 1, "D4 E8"), WHOLE_BLOCK, IN_BFLOAT16("scale"), PAD}},
    {"E8P", {WHOLE_BLOCK, IN_BFLOAT16("scale"), PAD}},
    {"Rotated", {INNER, WHOLE_FIELD("seed", 0, 0, 0xFFFFFFFF)}},
    {"Balanced", {INNER, IN_BFLOAT16("rows"), IN_BFLOAT16("cols")}},
    {"Permuted", {INNER}},
    {"RowScaled", {INNER, RECIPE_FIELD("rows", &PLAIN_ECSQ, "\"ECSQ\"")}},
};

static bool parse_recipe(work *w, const document *d, size_t n, int depth, const recipe **found);

/* The place of a field of this kind; -1 if there is none. */
static int field_of(kind_name k, const char *name) {
    for (int i = 0; i < MOST_FIELDS && KIND[k].fields[i].name; i++) {
        if (strcmp(KIND[k].fields[i].name, name) == 0) return i;
    }
    return -1;
}

static int64_t number_of(const recipe *r, const char *name) {
    return r->fields[field_of(r->kind, name)].number;
}

static const recipe *part_of(const recipe *r, const char *name) {
    return r->fields[field_of(r->kind, name)].data;
}

static bool is_whole(const document *d, size_t n, int64_t least, int64_t most) {
    return d->nodes[n].type == '0' && whole(d, n) >= least && whole(d, n) <= most;
}

/* Levels in ascending order; apart, and shortest decimals of float. */
static bool parse_levels(work *w, const document *d, size_t n, argument *v) {
    size_t count = d->nodes[n].type == '[' ? members(d, n) : 0, at = first_child(n);
    double gap = 0, before = 0;
    if (count < 2 || count > 256) return CORRUPT("a table has %zu levels, not 2 to 256", count);
    float *levels = keep(w, count, sizeof *levels);
    TRY(levels);
    for (size_t i = 0, k = at; i < count; i++, k = after(d, k)) {
        double level = d->nodes[k].type == '.' ? real(d, k) : 1e31, size = fabs(level);
        if (!(size <= 1e30) || !is_shortest(d, k, (float)level, true) || (level == 0 && signbit(level))) {
            return CORRUPT("a level is not the shortest decimal of a float");
        }
        if (1e-5 * size > gap) gap = 1e-5 * size;
        levels[i] = (float)level;
    }
    for (size_t i = 0; i < count; i++, at = after(d, at)) {
        double level = real(d, at);
        if (gap == 0 || (i && !(level - before > gap))) return CORRUPT("levels are not ascending, or too near");
        before = level;
    }
    *v = (argument){(int64_t)count, 0, levels};
    return true;
}

/* The value of one field, which must not be the default. */
static bool parse_field(work *w, const document *d, size_t n, int depth, const field *f, argument *v) {
    size_t k = first_child(n), i = 0;
    const node *given = &d->nodes[n];
    const char *name = f->name;
    const recipe *part;
    switch (f->type) {
        case WHOLE:
            if (!is_whole(d, n, f->least, f->most)) break;
            v->number = whole(d, n);
            return v->number != f->usual ? true : CORRUPT("%s is the default", name);
        case SWITCH:
            if (given->type != (f->usual ? 'f' : 't')) break;
            v->number = !f->usual;
            return true;
        case REAL: /* an encoder's business */
            if (given->type != '.' || !(real(d, n) > 0.5 && real(d, n) < 1)) break;
            return true;
        case WORD:
            for (const char *word = f->words; given->type == '"' && *word; i++) {
                size_t length = strcspn(word, " ");
                if (given->stop - given->start == length && memcmp(d->text + given->start, word, length) == 0) {
                    v->number = (int64_t)i;
                    return v->number != f->usual ? true : CORRUPT("%s is the default", name);
                }
                word += length + (word[length] == ' ');
            }
            break;
        case BLOCK:
            if (given->type != '[' || members(d, n) != 2) break;
            if (!is_whole(d, k, -1, MOST_WHOLE) || !is_whole(d, after(d, k), -1, MOST_WHOLE)) break;
            v->number = whole(d, k);
            v->other = whole(d, after(d, k));
            if (v->number == 0 || v->other == 0) break;
            return v->number != f->usual || v->other != f->other ? true : CORRUPT("%s is the default", name);
        case RECIPE:
            if (f->words && is_text(d, n, f->words)) return CORRUPT("%s is the default", name);
            TRY(parse_recipe(w, d, n, depth + 1, &part));
            v->data = part;
            return true;
        case STAGES: {
            size_t count = given->type == '[' ? members(d, n) : 0;
            if (count < 2 || count > 16) break;
            const recipe **stages = keep(w, count, sizeof *stages);
            TRY(stages);
            for (; i < count; i++, k = after(d, k)) TRY(parse_recipe(w, d, k, depth + 1, &stages[i]));
            *v = (argument){(int64_t)count, 0, stages};
            return true;
        }
        case LEVELS: return parse_levels(w, d, n, v);
        case NOTHING: break;
    }
    return CORRUPT("%s is not what a recipe may have there", name);
}

/* [name, argument, {fields}], or the name alone; what is left out has its default, and what has its default is out. */
static bool parse_recipe(work *w, const document *d, size_t n, int depth, const recipe **found) {
    size_t name = n, first = 0, fields = 0, count = 1;
    if (depth > NESTED) return CORRUPT("recipes are nested more than %d deep", NESTED);
    if (d->nodes[n].type == '[') {
        count = members(d, n);
        name = first_child(n);
        if (count < 2 || count > 3) return CORRUPT("a recipe is not [name, argument, {fields}]");
        first = after(d, name);
        if (count == 3) fields = after(d, first);
        if (count == 2 && d->nodes[first].type == '{') {
            fields = first;
            first = 0;
        }
    }
    recipe *r = keep(w, 1, sizeof *r);
    TRY(r);
    while (r->kind < KINDS && !is_word(d, name, KIND[r->kind].name)) r->kind++;
    if (r->kind == KINDS) return CORRUPT("a recipe has a name that this reader does not know");
    const description *k = &KIND[r->kind];
    for (int i = 0; i < MOST_FIELDS; i++) {
        r->fields[i] = (argument){k->fields[i].usual, k->fields[i].other, k->fields[i].recipe};
    }
    about_word(w, k->name);
    if (first) {
        TRY(parse_field(w, d, first, depth, &k->fields[0], &r->fields[0]));
        about_word(w, k->name);
    }
    if (fields) {
        if (d->nodes[fields].type != '{' || members(d, fields) == 0) return CORRUPT("its fields are no object");
        for (size_t at = first_child(fields); at < after(d, fields); at = after(d, after(d, at))) {
            int i = 1;
            while (i < MOST_FIELDS && k->fields[i].name && !is_word(d, at, k->fields[i].name)) i++;
            if (i == MOST_FIELDS || k->fields[i].name == NULL) return CORRUPT("it has no such field by name");
            TRY(parse_field(w, d, after(d, at), depth, &k->fields[i], &r->fields[i]));
            about_word(w, k->name);
        }
    }
    for (int i = 0; i < MOST_FIELDS && k->fields[i].name; i++) {
        bool missing = k->fields[i].type == RECIPE ? r->fields[i].data == NULL : r->fields[i].number == REQUIRED;
        if (missing) return CORRUPT("%s is missing", k->fields[i].name);
    }
    if (r->kind == UNIFORM && number_of(r, "bits") == 1 && number_of(r, "symmetric")) {
        return CORRUPT("one bit has no level but zero");
    }
    if (r->kind == SIGN_MAGNITUDE) { /* both streams of signs would have one name */
        const recipe *inner = part_of(r, "inner");
        while (inner->kind >= ROTATED) inner = part_of(inner, "inner");
        if (inner->kind == SIGN_MAGNITUDE) return CORRUPT("signs have signs");
    }
    if (r->kind == TRELLIS || r->kind == TCQ) {
        int64_t states = number_of(r, "states");
        if (states & (states - 1)) return CORRUPT("there is no machine of %" PRId64 " states", states);
    }
    *found = r;
    return true;
}

/* A matrix cut into R × C blocks of r × c, the last ones padded where allowed (blocks.py). */
typedef struct {
    uint64_t rows, cols, r, c, R, C;
} blocks;

static bool cut(work *w, uint64_t rows, uint64_t cols, int64_t r, int64_t c, bool pad, blocks *b) {
    *b = (blocks){rows, cols, r < 0 ? at_least_one(rows) : (uint64_t)r, c < 0 ? at_least_one(cols) : (uint64_t)c, 0, 0};
    if (!pad && rows % b->r) return CORRUPT("%" PRIu64 " rows do not divide into blocks of %" PRIu64, rows, b->r);
    if (!pad && cols % b->c) return CORRUPT("%" PRIu64 " columns do not divide into blocks of %" PRIu64, cols, b->c);
    b->R = rows / b->r + (rows % b->r > 0);
    b->C = cols / b->c + (cols % b->c > 0);
    return true;
}

static bool has_block(const recipe *r) {
    return field_of(r->kind, "block") >= 0;
}

static bool blocks_of(work *w, const recipe *r, uint64_t rows, uint64_t cols, blocks *b) {
    const argument *block = &r->fields[field_of(r->kind, "block")];
    return cut(w, rows, cols, block->number, block->other, number_of(r, "pad"), b);
}

/* Vectors of d neighbours in a row, which do not cross the edges of what shares a scale (vectors.py). */
static bool vectors_of(work *w, const recipe *r, uint64_t rows, uint64_t cols, blocks *vectors, blocks *scales) {
    int64_t d = r->kind == LATTICE && number_of(r, "kind") == 0 ? 4 : 8;
    TRY(cut(w, rows, cols, 1, d, number_of(r, "pad"), vectors) && blocks_of(w, r, rows, cols, scales));
    return scales->C > 1 && scales->c % (uint64_t)d ? CORRUPT("blocks cut vectors of %d", (int)d) : true;
}

/* A block's number, for an element or, divided by the vectors' length, a vector. */
static uint64_t block_at(const blocks *b, uint64_t row, uint64_t col) {
    return row / b->r * b->C + col / b->c;
}

typedef struct {
    const char *name;
    bool numbered; /* as all are within a residual, so that names differ */
    const recipe *recipe;
    uint64_t rows, cols;
} child;

typedef struct {
    child *all;
    size_t count, most;
} children;

static const recipe BYTE = {INTEGER, {{256, 0, NULL}}};

static bool add_child(work *w, children *list, const char *name, const recipe *r, uint64_t rows, uint64_t cols) {
    void *all = list->all;
    TRY(grow(w, &w->cells, &all, list->count, &list->most, sizeof(child)));
    list->all = all;
    list->all[list->count++] = (child){name, false, r, rows, cols};
    return true;
}

enum { MOST_PERMUTED = 1 << 14 };

/* Bytes of n! - 1: n! as a mantissa of 49 bits and its length, exact enough for the lengths of all that are allowed. */
static uint64_t rank_bytes(uint64_t n) {
    uint64_t mantissa = 1, shifts = 0;
    if (n < 3) return n == 2;
    for (uint64_t i = 2; i <= n; i++) {
        for (mantissa *= i; mantissa >> 49; shifts++) mantissa >>= 1;
    }
    return (shifts + (uint64_t)bit_length(mantissa) + 7) / 8;
}

/* The side tensors of a matrix, in file order. */
static bool add_children(work *w, const recipe *r, uint64_t rows, uint64_t cols, children *list) {
    blocks b = {0, 0, 0, 0, 0, 0}, vectors;
    size_t first = list->count;
    if (has_block(r)) TRY(blocks_of(w, r, rows, cols, &b));
    switch (r->kind) {
        case FLOAT:
        case INTEGER:
        case KINDS: return true;
        case UNIFORM:
            TRY(add_child(w, list, "scale", part_of(r, "scale"), b.R, b.C));
            if (!number_of(r, "symmetric")) {
                recipe *zero = room(w, 1, sizeof *zero);
                TRY(zero);
                *zero = (recipe){INTEGER, {{(int64_t)1 << number_of(r, "bits"), 0, NULL}}};
                TRY(add_child(w, list, "zero_point", zero, b.R, b.C));
            }
            return true;
        case BINARY:
        case TERNARY:
        case TABLE:
        case POWERS_OF_TWO: return add_child(w, list, "scale", part_of(r, "scale"), b.R, b.C);
        case PRUNED: return add_child(w, list, "values", part_of(r, "values"), 1, (uint64_t)number_of(r, "keep"));
        case ECSQ:
            return add_child(w, list, "points", part_of(r, "points"), b.R * b.C, (uint64_t)number_of(r, "size"));
        case CODEBOOK:
        case GAIN_SHAPE:
            TRY(add_child(w, list, "centroids", part_of(r, "centroids"), (uint64_t)number_of(r, "size"), b.r * b.c));
            return r->kind == CODEBOOK ? true : add_child(w, list, "gains", part_of(r, "gains"), b.R, b.C);
        case TRELLIS: {
            uint64_t size = (uint64_t)number_of(r, "size");
            TRY(add_child(w, list, "step", part_of(r, "step"), b.R, b.C));
            return size ? add_child(w, list, "points", part_of(r, "points"), 1, 2 * size + 1) : true;
        }
        case TCQ:
            return add_child(w, list, "points", part_of(r, "points"), b.R * b.C, (uint64_t)1 << number_of(r, "bits"));
        case LATTICE:
        case E8P:
            TRY(vectors_of(w, r, rows, cols, &vectors, &b));
            return add_child(w, list, "scale", part_of(r, "scale"), b.R, b.C);
        case RESIDUAL: {
            const recipe *const *stages = r->fields[0].data;
            for (int64_t i = 0; i < r->fields[0].number; i++) TRY(add_children(w, stages[i], rows, cols, list));
            for (size_t i = first; i < list->count; i++) list->all[i].numbered = true;
            return true;
        }
        case SIGN_MAGNITUDE: return add_children(w, part_of(r, "inner"), rows, cols, list);
        case ROTATED: break;
        case BALANCED:
            TRY(add_child(w, list, "rows", part_of(r, "rows"), rows, 1));
            TRY(add_child(w, list, "cols", part_of(r, "cols"), 1, cols));
            break;
        case PERMUTED:
            if (cols > MOST_PERMUTED) return CORRUPT("%" PRIu64 " columns cannot be permuted", cols);
            if (cols > 1) TRY(add_child(w, list, "rank", &BYTE, 1, rank_bytes(cols)));
            break;
        case ROW_SCALED: TRY(add_child(w, list, "rows", part_of(r, "rows"), rows, 1));
    }
    size_t own = list->count;
    TRY(add_children(w, part_of(r, "inner"), rows, cols, list));
    for (size_t i = first; i < own; i++) {
        for (size_t j = own; j < list->count; j++) {
            if (!list->all[j].numbered && strcmp(list->all[i].name, list->all[j].name) == 0) {
                return CORRUPT("two side tensors have the name %s", list->all[i].name);
            }
        }
    }
    return true;
}

typedef struct {
    stream *all;
    size_t count, most;
} streams;

static bool add_stream(
    work *w, streams *list, uint64_t rows, uint64_t cols, uint64_t alphabet, int64_t centre, int64_t states
) {
    void *all = list->all;
    if (alphabet > (uint64_t)1 << 32) return CORRUPT("an alphabet of %" PRIu64 " symbols", alphabet);
    TRY(grow(w, &w->kept, &all, list->count, &list->most, sizeof(stream)));
    list->all = all;
    list->all[list->count++] = (stream){rows, cols, alphabet, centre, (int)states, NULL};
    return take(w, product(at_least_one(rows), at_least_one(cols)));
}

/* Where the level of zero is; 0 where there is none. */
static int64_t zero_level(const recipe *r) {
    const float *levels = r->fields[0].data;
    if (r->kind == POWERS_OF_TWO) return ((int64_t)1 << (number_of(r, "bits") - 1)) - 1;
    for (int64_t i = 0; i < r->fields[0].number; i++) {
        if (levels[i] == 0) return i;
    }
    return 0;
}

/* The code streams of a matrix itself, in file order. */
static bool add_codes(work *w, const recipe *r, uint64_t rows, uint64_t cols, streams *list) {
    blocks b = {0, 0, 0, 0, 0, 0}, scales;
    if (has_block(r)) TRY(blocks_of(w, r, rows, cols, &b));
    int64_t bits = field_of(r->kind, "bits") >= 0 ? number_of(r, "bits") : 1, half = (int64_t)1 << (bits - 1);
    switch (r->kind) {
        case FLOAT: return add_stream(w, list, rows, cols, (uint64_t)1 << (number_of(r, "dtype") ? 16 : 32), 0, 0);
        case INTEGER: return add_stream(w, list, rows, cols, (uint64_t)number_of(r, "alphabet"), 0, 0);
        case UNIFORM:
            if (!number_of(r, "symmetric")) return add_stream(w, list, rows, cols, (uint64_t)1 << bits, 0, 0);
            return add_stream(w, list, rows, cols, (uint64_t)(2 * half - 1), half - 1, 0);
        case BINARY: return add_stream(w, list, rows, cols, 2, 0, 0);
        case TERNARY: return add_stream(w, list, rows, cols, 3, 1, 0);
        case TABLE: return add_stream(w, list, rows, cols, (uint64_t)r->fields[0].number, zero_level(r), 0);
        case POWERS_OF_TWO: return add_stream(w, list, rows, cols, (uint64_t)(2 * half - 1), half - 1, 0);
        case PRUNED: return add_stream(w, list, rows, cols, 2, 0, 0);
        case ECSQ: return add_stream(w, list, rows, cols, 0, 0, 0);
        case CODEBOOK:
        case GAIN_SHAPE: return add_stream(w, list, b.R, b.C, (uint64_t)number_of(r, "size"), 0, 0);
        case TRELLIS: return add_stream(w, list, cols, rows, 0, 0, number_of(r, "states"));
        case TCQ: return add_stream(w, list, cols, rows, (uint64_t)1 << bits, 0, 0);
        case LATTICE:
            TRY(vectors_of(w, r, rows, cols, &b, &scales));
            if (number_of(r, "kind") == 1) TRY(add_stream(w, list, b.R, b.C, 2, 0, 0));
            TRY(add_stream(w, list, b.R, b.C * (b.c - 1), 0, 0, 0));
            return add_stream(w, list, b.R, b.C, 0, 0, 0);
        case E8P:
            TRY(vectors_of(w, r, rows, cols, &b, &scales));
            TRY(add_stream(w, list, b.R, b.C, 256, 0, 0));
            return add_stream(w, list, b.R, b.C, 256, 0, 0);
        case RESIDUAL: {
            const recipe *const *stages = r->fields[0].data;
            for (int64_t i = 0; i < r->fields[0].number; i++) TRY(add_codes(w, stages[i], rows, cols, list));
            return true;
        }
        case SIGN_MAGNITUDE:
            TRY(add_codes(w, part_of(r, "inner"), rows, cols, list));
            return add_stream(w, list, rows, cols, 2, 0, 0);
        case ROTATED:
        case BALANCED:
        case PERMUTED:
        case ROW_SCALED: return add_codes(w, part_of(r, "inner"), rows, cols, list);
        case KINDS: break;
    }
    return true;
}

/* Counts the elements of the blocks that a decoder may lay a matrix out on. */
static bool take_blocks(work *w, const recipe *r, uint64_t rows, uint64_t cols) {
    blocks b;
    if (r->kind == RESIDUAL) {
        const recipe *const *stages = r->fields[0].data;
        for (int64_t i = 0; i < r->fields[0].number; i++) TRY(take_blocks(w, stages[i], rows, cols));
        return true;
    }
    if (field_of(r->kind, "inner") >= 0) return take_blocks(w, part_of(r, "inner"), rows, cols);
    if (!has_block(r)) return true;
    TRY(blocks_of(w, r, rows, cols, &b));
    uint64_t across = product(at_least_one(b.C), b.c), down = product(at_least_one(b.R), b.r);
    return take(w, product(down, across));
}

/* All code streams of a matrix, those of its side tensors first; counts what they claim. */
static bool add_streams(work *w, const recipe *r, uint64_t rows, uint64_t cols, streams *list) {
    children side = {NULL, 0, 0};
    cell *mark = w->cells;
    TRY(take(w, product(at_least_one(rows), at_least_one(cols))));
    TRY(take_blocks(w, r, rows, cols) && add_children(w, r, rows, cols, &side));
    for (size_t i = 0; i < side.count; i++) {
        TRY(add_streams(w, side.all[i].recipe, side.all[i].rows, side.all[i].cols, list));
    }
    release(&w->cells, mark);
    return add_codes(w, r, rows, cols, list);
}

/* -- codes and side tensors to weights (the `decode` of every quantizer) ----------------------------------------- */

/* What is left of the side tensors and codes of a matrix; each quantizer takes its own from the front. */
typedef struct {
    const float *const *side;
    const stream *codes;
} supply;

static float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static float float_of_half(uint32_t bits) {
    uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return float_of_bits(sign | 0x7F800000 | mantissa << 13);
    if (exponent) return float_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    float x = (float)mantissa / 16777216; /* exact */
    return sign ? -x : x;
}

static float at_least_zero(float x) { /* keeps NaN and -0, as torch does */
    return x < 0 ? 0 : x;
}

static bool decode_pruned(work *w, supply *s, uint64_t rows, uint64_t cols, uint64_t keep, float *out) {
    const float *values = *s->side++;
    const uint32_t *mask = s->codes++->codes;
    uint64_t found = 0;
    for (uint64_t i = 0; i < rows * cols; i++) found += mask[i];
    if (found != keep) return CORRUPT("a mask of %" PRIu64 " weights stands beside %" PRIu64 " values", found, keep);
    for (uint64_t i = 0; i < rows * cols; i++) out[i] = mask[i] ? *values++ : 0;
    return true;
}

static void decode_ecsq(supply *s, const blocks *b, int64_t size, float *out) {
    const float *points = *s->side++;
    const int32_t *codes = (const int32_t *)s->codes++->codes;
    bool far = false; /* then every weight has a term for what is beyond, be it zero */
    for (uint64_t i = 0; i < b->rows * b->cols; i++) far = far || imaxabs(codes[i]) > size;
    for (uint64_t i = 0; i < b->rows; i++) {
        for (uint64_t j = 0; j < b->cols; j++) {
            const float *own = points + block_at(b, i, j) * (uint64_t)size;
            int32_t code = *codes++;
            int64_t magnitude = imaxabs(code), within = smaller(magnitude, size);
            float value = within ? own[within - 1] : 0;
            if (far) {
                float distance = own[size - 1] - (size > 1 ? own[size - 2] : 0);
                float beyond = (float)(magnitude - within) * distance;
                value = value + beyond;
            }
            *out++ = code < 0 ? -value : value;
        }
    }
}

/* Codewords, each times the gain of its block where there are gains. */
static void decode_codebook(supply *s, const blocks *b, bool gains, float *out) {
    const float *words = *s->side++, *gain = gains ? *s->side++ : NULL;
    const uint32_t *codes = s->codes++->codes;
    uint64_t size = b->r * b->c;
    for (uint64_t i = 0; i < b->rows; i++) {
        for (uint64_t j = 0; j < b->cols; j++) {
            uint64_t block = block_at(b, i, j);
            float value = words[codes[block] * size + i % b->r * b->c + j % b->c];
            *out++ = gain ? at_least_zero(gain[block]) * value : value;
        }
    }
}

static void decode_trellis(supply *s, const blocks *b, int64_t size, float *out) {
    const float *step = *s->side++, *points = size ? *s->side++ : NULL;
    const int32_t *codes = (const int32_t *)s->codes++->codes;
    for (uint64_t i = 0; i < b->rows; i++) {
        for (uint64_t j = 0; j < b->cols; j++) {
            int64_t level = codes[j * b->rows + i], place = clipped(level, -size, size);
            float value = (float)level;
            if (points) value = points[place + size] + (float)(level - place);
            *out++ = value * step[block_at(b, i, j)];
        }
    }
}

static void decode_tcq(supply *s, const blocks *b, int64_t bits, int64_t states, float *out) {
    const float *points = *s->side++;
    const uint32_t *codes = s->codes++->codes;
    uint8_t next[256][2];
    int64_t count = (int64_t)1 << bits;
    int place = 0;
    make_machine((int)states, next);
    for (uint64_t j = 0; j < b->cols; j++) {
        for (uint64_t i = 0; i < b->rows; i++) {
            uint32_t code = *codes++;
            const float *own = points + block_at(b, i, j) * (uint64_t)count;
            int64_t level = 2 * (int64_t)code + (place & 1) - count;
            out[i * b->cols + j] = level < 0 ? -own[-level - 1] : own[level];
            place = next[place][code & 1];
        }
    }
}

/* The scale of a vector. */
static double scale_of(const blocks *vectors, const blocks *scales, const float *scale, uint64_t row, uint64_t vector) {
    return (double)scale[block_at(scales, row, vector * vectors->c)];
}

static void write_vector(const blocks *v, uint64_t row, uint64_t vector, const double *x, double scale, float *out) {
    uint64_t first = vector * v->c;
    for (uint64_t k = 0; k < v->c && first + k < v->cols; k++) out[row * v->cols + first + k] = (float)(x[k] * scale);
}

/* In each column of vectors, codes stand sorted by kind: `place[i]` becomes where row i's are. */
static void sorted_places(const uint8_t *kinds, uint64_t rows, uint64_t *place) {
    uint64_t at = 0;
    for (uint8_t k = 0; k < 4; k++) {
        for (uint64_t i = 0; i < rows; i++) {
            if (kinds[i] == k) place[i] = at++;
        }
    }
}

static bool decode_lattice(work *w, supply *s, const blocks *v, const blocks *scales, float *out) {
    const float *scale = *s->side++;
    const uint32_t *coset = v->c == 8 ? s->codes++->codes : NULL;
    const int32_t *free = (const int32_t *)s->codes++->codes, *last = (const int32_t *)s->codes++->codes;
    uint64_t d = v->c;
    uint8_t *kinds = room(w, v->R, 1);
    uint64_t *place = room(w, v->R, sizeof *place), *place_of_last = room(w, v->R, sizeof *place_of_last);
    TRY(kinds && place && place_of_last);
    for (uint64_t j = 0; j < v->C; j++) {
        for (uint64_t i = 0; i < v->R; i++) kinds[i] = coset ? (uint8_t)coset[i * v->C + j] : 0;
        sorted_places(kinds, v->R, place);
        for (uint64_t i = 0; i < v->R; i++) {
            const int32_t *own = free + (place[i] * v->C + j) * (d - 1);
            uint32_t parity = 0;
            for (uint64_t k = 0; k < d - 1; k++) parity ^= (uint32_t)own[k] & 1;
            kinds[i] = (uint8_t)(2 * kinds[i] + parity);
        }
        sorted_places(kinds, v->R, place_of_last);
        for (uint64_t i = 0; i < v->R; i++) {
            const int32_t *own = free + (place[i] * v->C + j) * (d - 1);
            double point[8], half = kinds[i] & 2 ? 0.5 : 0;
            for (uint64_t k = 0; k < d - 1; k++) point[k] = own[k] + half;
            point[d - 1] = 2 * (double)last[place_of_last[i] * v->C + j] + (kinds[i] & 1) + half;
            write_vector(v, i, j, point, scale_of(v, scales, scale, i, j), out);
        }
    }
    return true;
}

/* Twice the 256 patterns: odd numbers by the sum of their squares, up to 48, then in lexicographic order. */
static void make_patterns(uint8_t patterns[256][8]) {
    int count = 0;
    for (int norm = 8; norm <= 48; norm += 8) {
        for (int i = 0; i < 6561 && count < 256; i++) {
            int sum = 0, rest = i;
            for (int k = 7; k >= 0; k--, rest /= 3) {
                int odd = 2 * (rest % 3) + 1;
                patterns[count][k] = (uint8_t)odd;
                sum += odd * odd;
            }
            count += sum == norm;
        }
    }
}

static void decode_e8p(supply *s, const blocks *v, const blocks *scales, float *out) {
    const float *scale = *s->side++;
    const uint32_t *codes = s->codes++->codes, *signs = s->codes++->codes;
    uint8_t patterns[256][8];
    make_patterns(patterns);
    for (uint64_t i = 0; i < v->R; i++) {
        for (uint64_t j = 0; j < v->C; j++) {
            const uint8_t *twice = patterns[*codes++];
            uint32_t bits = *signs++;
            double point[8], shift = bits & 128 ? -0.25 : 0.25;
            int parity = 0;
            for (int k = 0; k < 8; k++) parity += twice[k];
            parity /= 2;
            for (int k = 0; k < 8; k++) {
                bool negative = k < 7 ? bits >> k & 1 : parity & 1;
                point[k] = (negative ? -twice[k] : twice[k]) / 2.0 + shift;
                parity += negative;
            }
            write_vector(v, i, j, point, scale_of(v, scales, scale, i, j), out);
        }
    }
}

static uint64_t split_mix(uint64_t seed, uint64_t k) {
    uint64_t z = seed + (k + 1) * 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

/* The p values from `x` on times the matrix (-1)^popcount(i & j) / sqrt(p). */
static void hadamard(double *x, uint64_t p) {
    for (uint64_t span = 1; span < p; span *= 2) {
        for (uint64_t i = 0; i < p; i++) {
            if (i & span) continue;
            double a = x[i], b = x[i + span];
            x[i] = a + b;
            x[i + span] = a - b;
        }
    }
    double share = 1 / sqrt((double)p);
    for (uint64_t i = 0; i < p; i++) x[i] *= share;
}

static bool rotate_back(work *w, uint64_t rows, uint64_t cols, uint64_t seed, float *x) {
    if (rows * cols == 0) return true;
    uint64_t p = (uint64_t)1 << (bit_length(cols) - 1), passes = cols == p ? 1 : 3;
    uint64_t words = (passes * cols + 63) / 64, *signs = room(w, words, sizeof *signs);
    double *row = room(w, cols, sizeof *row);
    TRY(signs && row);
    for (uint64_t k = 0; k < words; k++) signs[k] = split_mix(seed, k);
    for (uint64_t i = 0; i < rows; i++, x += cols) {
        for (uint64_t j = 0; j < cols; j++) row[j] = (double)x[j];
        for (uint64_t pass = passes; pass-- > 0;) {
            hadamard(row + (pass == 1 ? cols - p : 0), p);
            for (uint64_t j = 0; j < cols; j++) {
                uint64_t at = pass * cols + j;
                if (signs[at / 64] >> at % 64 & 1) row[j] = -row[j];
            }
        }
        for (uint64_t j = 0; j < cols; j++) x[j] = (float)row[j];
    }
    return true;
}

/* The order of n columns from its number: divided by 1, 2, … n, it leaves how many smaller ones come later. */
static bool read_order(work *w, const float *digits, uint64_t n, uint32_t *order) {
    uint64_t count = rank_bytes(n), size = (count + 3) / 4;
    uint32_t *rank = room(w, size, sizeof *rank), *left = room(w, n, sizeof *left);
    TRY(rank && left);
    for (uint64_t i = 0; i < count; i++) rank[i / 4] |= (uint32_t)digits[i] << 8 * (i % 4);
    for (uint64_t i = 1; i <= n; i++) {
        uint64_t rest = 0;
        while (size && rank[size - 1] == 0) size--;
        for (uint64_t k = size; k-- > 0;) {
            rest = rest << 32 | rank[k];
            rank[k] = (uint32_t)(rest / i);
            rest %= i;
        }
        order[n - i] = (uint32_t)rest;
    }
    for (uint64_t k = 0; k < size; k++) {
        if (rank[k]) return CORRUPT("the order of %" PRIu64 " columns has a number of %" PRIu64 "! or more", n, n);
    }
    for (uint64_t i = 0; i < n; i++) left[i] = (uint32_t)i;
    for (uint64_t i = 0; i < n; i++) {
        uint32_t place = order[i];
        order[i] = left[place];
        memmove(left + place, left + place + 1, (n - i - 1 - place) * sizeof *left);
    }
    return true;
}

static bool permute_back(work *w, supply *own, uint64_t rows, uint64_t cols, float *x) {
    if (cols < 2) return true;
    uint32_t *order = room(w, cols, sizeof *order);
    float *row = room(w, cols, sizeof *row);
    TRY(order && row && read_order(w, *own->side, cols, order));
    for (uint64_t i = 0; i < rows; i++, x += cols) {
        memcpy(row, x, cols * sizeof *row);
        for (uint64_t j = 0; j < cols; j++) x[order[j]] = row[j];
    }
    return true;
}

/* What a quantizer makes of its codes; takes its side tensors and codes from the front of the supply. */
static bool decode_codes(work *w, const recipe *r, uint64_t rows, uint64_t cols, supply *s, float *out) {
    uint64_t count = rows * cols;
    blocks b = {0, 0, 0, 0, 0, 0}, vectors;
    supply own = *s;
    if (has_block(r)) TRY(blocks_of(w, r, rows, cols, &b));
    switch (r->kind) {
        case FLOAT: {
            const uint32_t *bits = s->codes++->codes;
            int64_t type = number_of(r, "dtype");
            for (uint64_t i = 0; i < count; i++) {
                out[i] = type == 2 ? float_of_half(bits[i]) : float_of_bits(type == 1 ? bits[i] << 16 : bits[i]);
            }
            return true;
        }
        case INTEGER: {
            const uint32_t *codes = s->codes++->codes;
            for (uint64_t i = 0; i < count; i++) out[i] = (float)codes[i];
            return true;
        }
        case UNIFORM:
        case BINARY:
        case TERNARY:
        case TABLE:
        case POWERS_OF_TWO: {
            bool signless = r->kind == UNIFORM && !number_of(r, "symmetric");
            const float *scale = *s->side++, *zeros = signless ? *s->side++ : NULL, *levels = r->fields[0].data;
            const stream *own_codes = s->codes++;
            for (uint64_t i = 0; i < rows; i++) {
                for (uint64_t j = 0; j < cols; j++) {
                    uint64_t block = block_at(&b, i, j);
                    int64_t code = own_codes->codes[i * cols + j], power = code - own_codes->centre;
                    float level = (float)power;
                    if (zeros) level = (float)code - zeros[block];
                    if (r->kind == BINARY) level = code ? 1 : -1;
                    if (r->kind == TABLE) level = levels[code];
                    if (r->kind == POWERS_OF_TWO && power) {
                        level = (float)ldexp(power < 0 ? -1 : 1, (int)(imaxabs(power) - own_codes->centre));
                    }
                    out[i * cols + j] = level * scale[block];
                }
            }
            return true;
        }
        case PRUNED: return decode_pruned(w, s, rows, cols, (uint64_t)number_of(r, "keep"), out);
        case ECSQ: decode_ecsq(s, &b, number_of(r, "size"), out); return true;
        case CODEBOOK:
        case GAIN_SHAPE: decode_codebook(s, &b, r->kind == GAIN_SHAPE, out); return true;
        case TRELLIS: decode_trellis(s, &b, number_of(r, "size"), out); return true;
        case TCQ: decode_tcq(s, &b, number_of(r, "bits"), number_of(r, "states"), out); return true;
        case LATTICE:
            TRY(vectors_of(w, r, rows, cols, &vectors, &b));
            return decode_lattice(w, s, &vectors, &b, out);
        case E8P: TRY(vectors_of(w, r, rows, cols, &vectors, &b)); decode_e8p(s, &vectors, &b, out); return true;
        case RESIDUAL: {
            const recipe *const *stages = r->fields[0].data;
            float *more = room(w, count, sizeof *more);
            TRY(more && decode_codes(w, stages[0], rows, cols, s, out));
            for (int64_t k = 1; k < r->fields[0].number; k++) {
                TRY(decode_codes(w, stages[k], rows, cols, s, more));
                for (uint64_t i = 0; i < count; i++) out[i] = out[i] + more[i];
            }
            return true;
        }
        case SIGN_MAGNITUDE: {
            TRY(decode_codes(w, part_of(r, "inner"), rows, cols, s, out));
            const uint32_t *signs = s->codes++->codes;
            for (uint64_t i = 0; i < count; i++) out[i] = signs[i] ? -at_least_zero(out[i]) : at_least_zero(out[i]);
            return true;
        }
        case ROTATED:
            TRY(decode_codes(w, part_of(r, "inner"), rows, cols, s, out));
            return rotate_back(w, rows, cols, (uint64_t)number_of(r, "seed"), out);
        case BALANCED:
            s->side += 2;
            TRY(decode_codes(w, part_of(r, "inner"), rows, cols, s, out));
            for (uint64_t i = 0; i < count; i++) {
                float scale = own.side[0][i / cols] * own.side[1][i % cols];
                out[i] = out[i] * scale;
            }
            return true;
        case PERMUTED:
            s->side += cols > 1;
            TRY(decode_codes(w, part_of(r, "inner"), rows, cols, s, out));
            return permute_back(w, &own, rows, cols, out);
        case ROW_SCALED:
            s->side++;
            TRY(decode_codes(w, part_of(r, "inner"), rows, cols, s, out));
            for (uint64_t i = 0; i < rows; i++) {
                float scale = (float)exp2((double)own.side[0][i]);
                for (uint64_t j = 0; j < cols; j++) out[i * cols + j] = out[i * cols + j] * scale;
            }
            return true;
        case KINDS: break;
    }
    return true;
}

/* A matrix from its streams, those of its side tensors first; takes them from the front of `codes`. */
static bool decode_matrix(work *w, const recipe *r, uint64_t rows, uint64_t cols, const stream **codes, float *out) {
    children side = {NULL, 0, 0};
    streams own = {NULL, 0, 0};
    cell *mark = w->cells;
    TRY(add_children(w, r, rows, cols, &side));
    const float **values = room(w, side.count, sizeof *values);
    TRY(values);
    for (size_t i = 0; i < side.count; i++) {
        const child *c = &side.all[i];
        uint64_t count = c->rows * c->cols;
        float *value = room(w, count, sizeof *value);
        TRY(value && decode_matrix(w, c->recipe, c->rows, c->cols, codes, value));
        for (uint64_t k = 0; k < count; k++) {
            if (!isfinite(value[k])) return CORRUPT("its %s holds values that are not finite", c->name);
        }
        values[i] = value;
    }
    TRY(add_codes(w, r, rows, cols, &own));
    supply s = {values, *codes};
    *codes += own.count;
    TRY(decode_codes(w, r, rows, cols, &s, out));
    release(&w->cells, mark);
    return true;
}

/* -- the file (contents.py, per_tensor.py, one.py) --------------------------------------------------------------- */

typedef struct {
    const char *name;
    int bytes;
} dense_type;

static const dense_type TYPES[] = {
    {"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8},
    {"I32", 4}, {"I16", 2}, {"I8", 1},  {"U8", 1},   {"BOOL", 1},
};

enum { F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL, TYPE_COUNT };

typedef struct {
    const char *name;
    size_t length;
    size_t axes;
    const uint64_t *shape;
    uint64_t rows, cols;
    const recipe *recipe; /* NULL: dense */
    int type;             /* of a dense one */
    const uint8_t *data;  /* of a dense one, or the group of codes; NULL where codes are decoded */
    size_t size;
    const stream *codes;
    size_t target;
} tensor;

typedef struct {
    const char *name;
    size_t length;
    const recipe *recipe; /* NULL where each batch gives the range: nothing is stored */
} input;

struct bitbook {
    cell *kept;
    tables tables;
    coder_name coder;
    tensor *tensors; /* by name, then aliases by name */
    size_t stored, count;
    input *inputs;
    size_t input_count;
};

static int compare_names(const char *a, size_t a_length, const char *b, size_t b_length) {
    int order = memcmp(a, b, a_length < b_length ? a_length : b_length);
    return order ? order : (a_length > b_length) - (a_length < b_length);
}

/* The number of a stored tensor; `book->stored` if there is none of this name. */
static size_t find_tensor(const bitbook *book, const char *name, size_t length) {
    size_t low = 0, high = book->stored;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = compare_names(book->tensors[middle].name, book->tensors[middle].length, name, length);
        if (order == 0) return middle;
        if (order < 0) low = middle + 1;
        else high = middle;
    }
    return book->stored;
}

static bool is_name(const char *name, size_t length, const char *word) {
    return compare_names(name, length, word, strlen(word)) == 0;
}

static int find_type(const document *d, size_t n) {
    int type = 0;
    while (type < TYPE_COUNT && !is_word(d, n, TYPES[type].name)) type++;
    return type;
}

static bool parse_shape(work *w, const document *d, size_t n, tensor *t) {
    if (d->nodes[n].type != '[' || members(d, n) > MOST_AXES) return CORRUPT("a shape is not a list of numbers");
    t->axes = members(d, n);
    uint64_t *shape = keep(w, t->axes, sizeof *shape);
    TRY(shape);
    t->shape = shape;
    for (size_t i = 0, k = first_child(n); i < t->axes; i++, k = after(d, k)) {
        if (!is_whole(d, k, 0, MOST_WHOLE)) return CORRUPT("a shape is not a list of whole numbers");
        shape[i] = (uint64_t)whole(d, k);
    }
    return true;
}

/* Bytes of a dense tensor, as far as 64 bits go. */
static uint64_t dense_size(const tensor *t) {
    uint64_t size = (uint64_t)TYPES[t->type].bytes;
    for (size_t i = 0; i < t->axes; i++) {
        if (t->shape[i] == 0) return 0;
    }
    for (size_t i = 0; i < t->axes; i++) size = product(size, t->shape[i]);
    return size;
}

/* Counts a tensor's elements, an empty axis as 1, and finds its rows and columns. */
static bool take_tensor(work *w, tensor *t) {
    uint64_t elements = 1;
    for (size_t i = 0; i < t->axes; i++) elements = product(elements, at_least_one(t->shape[i]));
    TRY(take(w, elements));
    t->rows = t->axes < 2 ? 1 : t->shape[0];
    t->cols = 1;
    for (size_t i = t->axes < 2 ? 0 : 1; i < t->axes; i++) t->cols *= t->shape[i];
    return true;
}

/* A table of recipes or activations, to which names refer by number. */
typedef struct {
    const recipe **recipes;
    bool *stored; /* whether an activation has side tensors in the file */
    size_t count, used;
} recipe_table;

static bool parse_activation(work *w, const document *d, size_t n, const recipe **r, bool *stored) {
    size_t recipe_node = n;
    *stored = false;
    if (d->nodes[n].type == '{') {
        size_t range = lookup(d, n, "range"), rule = lookup(d, n, "rule");
        recipe_node = lookup(d, n, "recipe");
        size_t known = (range ? 1u : 0) + (rule ? 1u : 0) + (recipe_node ? 1u : 0);
        if (!recipe_node || known < 2 || 2 * known != members(d, n)) return CORRUPT("it is not {recipe, range, rule}");
        if (range && !is_word(d, range, "running") && !is_word(d, range, "calibrated")) {
            return CORRUPT("its range is unknown");
        }
        if (rule && !is_word(d, rule, "minmax") && !is_word(d, rule, "absmax") && !is_word(d, rule, "mean")) {
            return CORRUPT("its rule is unknown");
        }
        *stored = range > 0;
    }
    TRY(parse_recipe(w, d, recipe_node, 0, r));
    const argument *block = has_block(*r) ? &(*r)->fields[field_of((*r)->kind, "block")] : NULL;
    if (((*r)->kind != UNIFORM && (*r)->kind != BINARY) || block->number != -1 || block->other != -1) {
        return CORRUPT("it cannot quantize activations");
    }
    return true;
}

static int compare_texts(const void *a, const void *b) {
    const char *const *x = a, *const *y = b; /* beginning and end of each */
    return compare_names(x[0], (size_t)(x[1] - x[0]), y[0], (size_t)(y[1] - y[0]));
}

static bool parse_table(work *w, const document *d, size_t n, bool activations, recipe_table *table) {
    memset(table, 0, sizeof *table);
    if (n == 0) return true;
    table->count = members(d, n);
    table->recipes = room(w, table->count, sizeof *table->recipes);
    table->stored = room(w, table->count, sizeof *table->stored);
    const char **texts = room(w, product(2, table->count), sizeof *texts);
    TRY(table->recipes && table->stored && texts);
    for (size_t i = 0, k = first_child(n); i < table->count; i++, k = after(d, k)) {
        about_word(w, activations ? "an activation" : "a recipe");
        if (activations) TRY(parse_activation(w, d, k, &table->recipes[i], &table->stored[i]));
        else TRY(parse_recipe(w, d, k, 0, &table->recipes[i]));
        texts[2 * i] = d->text + d->nodes[k].start;
        texts[2 * i + 1] = d->text + d->nodes[k].stop;
    }
    about_word(w, "plan");
    qsort(texts, table->count, 2 * sizeof *texts, compare_texts);
    for (size_t i = 1; i < table->count; i++) {
        if (compare_texts(&texts[2 * i - 2], &texts[2 * i]) == 0) return CORRUPT("a recipe is listed twice");
    }
    return true;
}

/* The entry that a number refers to; entries are listed in the order of their first use. */
static bool use(work *w, const document *d, size_t n, recipe_table *table, size_t *place) {
    if (!is_whole(d, n, 0, (int64_t)table->used) || (size_t)whole(d, n) >= table->count) {
        return CORRUPT("recipes and activations are not numbered in the order of their first use");
    }
    *place = (size_t)whole(d, n);
    table->used += *place == table->used;
    return true;
}

static bool all_used(work *w, const recipe_table *table) {
    return table->used == table->count ? true : CORRUPT("a recipe or activation is listed, but not used");
}

static bool is_reserved(const char *name, size_t length) {
    return is_name(name, length, "__inputs__") || is_name(name, length, "__metadata__");
}

/* The plan: tensors and inputs become the book's, dense ones among them where the plan names those. */
static bool parse_plan(work *w, const document *d, coder_name usual, bool dense, bitbook *book) {
    static const char *const keys[] = {"activations", "aliases", "coder", "inputs", "recipes", "tensors"};
    static const char types[] = "[{\"{[{";
    size_t at[6] = {0}, known = 0;
    for (int i = 0; i < 6; i++) {
        at[i] = lookup(d, 0, keys[i]);
        known += at[i] > 0;
        if (at[i] == 0) continue;
        char type = d->nodes[at[i]].type;
        bool empty = type != '"' && members(d, at[i]) == 0;
        if (type != types[i] || empty) return CORRUPT("its %s are empty, or none", keys[i]);
    }
    if (2 * known != members(d, 0)) return CORRUPT("it has unknown keys");
    book->coder = usual;
    if (at[2]) {
        book->coder = FIXED;
        while (book->coder < CODERS && !is_word(d, at[2], CODER_NAMES[book->coder])) book->coder++;
        if (book->coder == CODERS || book->coder == usual) return CORRUPT("the coder is unknown, or the default one");
    }
    recipe_table recipes, activations;
    TRY(parse_table(w, d, at[4], false, &recipes) && parse_table(w, d, at[0], true, &activations));
    size_t count = at[5] ? members(d, at[5]) / 2 : 0, place;
    tensor *tensors = room(w, count, sizeof *tensors);
    TRY(tensors);
    book->tensors = tensors;
    book->stored = count;
    for (size_t i = 0, k = at[5] ? first_child(at[5]) : 0; i < count; i++, k = after(d, after(d, k))) {
        tensor *t = &tensors[i];
        size_t claim = after(d, k), shape = first_child(claim);
        TRY(copy_string(w, d, k, &t->name, &t->length));
        about(w, t->name, t->length);
        if (is_reserved(t->name, t->length)) return CORRUPT("this name is reserved");
        if (d->nodes[claim].type != '[' || members(d, claim) != 2) return CORRUPT("it is not [shape, recipe]");
        size_t stored = after(d, shape);
        TRY(parse_shape(w, d, shape, t));
        if (dense && d->nodes[stored].type == '"') {
            t->type = find_type(d, stored);
            if (t->type == TYPE_COUNT) return CORRUPT("its type is unknown");
            continue;
        }
        TRY(use(w, d, stored, &recipes, &place));
        t->recipe = recipes.recipes[place];
        if (t->recipe->kind == FLOAT) return CORRUPT("a float tensor is stored as such, never as codes");
    }
    about_word(w, "plan");
    TRY(all_used(w, &recipes));
    book->input_count = at[3] ? members(d, at[3]) / 2 : 0;
    book->inputs = keep(w, book->input_count, sizeof *book->inputs);
    TRY(book->inputs);
    for (size_t i = 0, k = at[3] ? first_child(at[3]) : 0; i < book->input_count; i++, k = after(d, after(d, k))) {
        input *in = &book->inputs[i];
        TRY(copy_string(w, d, k, &in->name, &in->length) && use(w, d, after(d, k), &activations, &place));
        if (activations.stored[place]) in->recipe = activations.recipes[place];
    }
    return all_used(w, &activations);
}

/* Appends tied names to the tensors, which become the book's. */
static bool add_aliases(work *w, const document *d, bitbook *book) {
    size_t aliases = lookup(d, 0, "aliases"), count = aliases ? members(d, aliases) / 2 : 0;
    tensor *all = keep(w, (uint64_t)book->stored + count, sizeof *all);
    TRY(all);
    if (book->stored) memcpy(all, book->tensors, book->stored * sizeof *all);
    book->tensors = all;
    for (size_t i = 0; i < book->stored; i++) all[i].target = i;
    book->count = book->stored;
    for (size_t k = aliases ? first_child(aliases) : 0; count--; k = after(d, after(d, k))) {
        tensor alias = {0}, target = {0};
        if (d->nodes[after(d, k)].type != '"') return CORRUPT("an alias is not a name");
        TRY(copy_string(w, d, k, &alias.name, &alias.length));
        TRY(copy_string(w, d, after(d, k), &target.name, &target.length));
        size_t place = find_tensor(book, target.name, target.length);
        bool hides = find_tensor(book, alias.name, alias.length) < book->stored;
        hides = hides || is_reserved(alias.name, alias.length);
        if (place == book->stored || hides) {
            about(w, alias.name, alias.length);
            return CORRUPT("this alias is not a new name for a stored tensor");
        }
        tensor *added = &all[book->count++];
        *added = all[place];
        added->name = alias.name;
        added->length = alias.length;
    }
    return true;
}

/* Room for the codes of streams. */
static bool make_room(work *w, cell **chain, stream *s, size_t count) {
    for (size_t i = 0; i < count; i++) {
        s[i].codes = allocate(w, chain, symbols_of(&s[i]), sizeof(uint32_t));
        TRY(s[i].codes);
    }
    return true;
}

static bool add_input_streams(work *w, const bitbook *book, streams *list) {
    for (size_t i = 0; i < book->input_count; i++) {
        const input *in = &book->inputs[i];
        children side = {NULL, 0, 0};
        if (in->recipe == NULL) continue;
        about(w, in->name, in->length);
        TRY(add_children(w, in->recipe, 1, 1, &side));
        for (size_t k = 0; k < side.count; k++) TRY(add_streams(w, side.all[k].recipe, 1, 1, list));
    }
    return true;
}

/* Decodes the side tensors of all inputs, only to see that they can be. */
static bool check_inputs(work *w, const bitbook *book, const stream *codes) {
    for (size_t i = 0; i < book->input_count; i++) {
        const input *in = &book->inputs[i];
        children side = {NULL, 0, 0};
        float value;
        if (in->recipe == NULL) continue;
        about(w, in->name, in->length);
        TRY(add_children(w, in->recipe, 1, 1, &side));
        for (size_t k = 0; k < side.count; k++) {
            TRY(decode_matrix(w, side.all[k].recipe, 1, 1, &codes, &value));
            if (!isfinite(value)) return CORRUPT("its %s holds values that are not finite", side.all[k].name);
        }
    }
    return true;
}

/* Format 2: everything behind the plan is one group of codes, then the dense tensors. */
static bool read_rest_of_one(work *w, bitbook *book, const uint8_t *data, size_t size) {
    uint64_t dense = 0;
    streams list = {NULL, 0, 0};
    size_t *first = room(w, book->stored, sizeof *first);
    TRY(first);
    for (size_t i = 0; i < book->stored; i++) {
        tensor *t = &book->tensors[i];
        about(w, t->name, t->length);
        if (t->recipe == NULL) {
            uint64_t own = dense_size(t);
            if (own > size - dense) return CORRUPT("dense tensors take more than the %zu bytes that are there", size);
            dense += own;
        }
        TRY(take_tensor(w, t));
        first[i] = list.count;
        if (t->recipe == NULL) continue;
        w->left += product(at_least_one(t->rows), at_least_one(t->cols)); /* counted once more with its streams */
        TRY(add_streams(w, t->recipe, t->rows, t->cols, &list));
    }
    size_t before = list.count, at = size - (size_t)dense;
    TRY(add_input_streams(w, book, &list));
    about_word(w, "codes");
    if (list.count == 0 && at) return CORRUPT("there are %zu bytes of codes, and the plan names none", at);
    if (list.count) {
        TRY(make_room(w, &w->kept, list.all, list.count));
        TRY(read_group(w, &book->tables, book->coder, data, at, list.all, list.count));
    }
    TRY(check_inputs(w, book, list.all + before));
    for (size_t i = 0; i < book->stored; i++) {
        tensor *t = &book->tensors[i];
        if (t->recipe) {
            t->codes = list.all + first[i];
            continue;
        }
        t->data = data + at;
        t->size = (size_t)dense_size(t);
        at += t->size;
    }
    return true;
}

static bool newer(work *w, uint32_t format) {
    const char *text = "written by a newer bitbook, in format %" PRIu32 "; this one reads up to %d";
    return fail(w, BITBOOK_NEWER, text, format, NEWEST);
}

static bool parse_one(work *w, bitbook *book, const uint8_t *data, size_t size, size_t header) {
    const uint8_t *behind = data + 8 + header;
    size_t left = size - 8 - header, used = 0, length = 0;
    char expected[128];
    int expected_size = snprintf(
        expected, sizeof expected, "{\"bitbook\":{\"data_offsets\":[0,%zu],\"dtype\":\"U8\",\"shape\":[%zu]}}", left,
        left
    );
    if (header != (size_t)expected_size || memcmp(data + 8, expected, header) != 0) {
        return CORRUPT("the header does not say that one entry holds the %zu bytes behind it", left);
    }
    if (left < 5) return CORRUPT("an entry of %zu bytes is too short", left);
    if (behind[0] > NEWEST) {
        return newer(w, behind[0]);
    }
    if (behind[0] != 2) return CORRUPT("unknown format version %d; a file of one entry says 2", behind[0]);
    static const uint8_t zeros[4] = {0};
    uint32_t crc = crc_of(0, data, 8 + header + 1, book->tables.crc);
    crc = crc_of(crc, zeros, 4, book->tables.crc);
    crc = crc_of(crc, behind + 5, left - 5, book->tables.crc);
    if (crc != little(behind + 1, 4)) return CORRUPT("the checksum does not match: the file was altered");
    behind += 5;
    left -= 5;
    about_word(w, "plan");
    for (;; used++) {
        if (used == 4 || used == left) return CORRUPT("its length does not end within 4 bytes");
        length |= (size_t)(behind[used] & 127) << 7 * used;
        if (behind[used] < 128) break;
    }
    if (used && behind[used] == 0) return CORRUPT("its length is not written in the shortest form");
    used++;
    if (length > left - used) return CORRUPT("it claims %zu bytes; %zu are there", length, left - used);
    const char *text;
    size_t text_size;
    document d;
    TRY(read_text(w, &book->tables, behind + used, length, &text, &text_size));
    TRY(parse_json(w, &d, text, text_size) && parse_plan(w, &d, SMALLEST, true, book));
    TRY(read_rest_of_one(w, book, behind + used + length, left - used - length));
    return add_aliases(w, &d, book);
}

typedef struct {
    tensor tensor;
    size_t offsets; /* node of the claim */
    bool coded;
    tensor *plan; /* what the plan says, where it is coded; NULL for the inputs' group */
} entry;

/* Where all entries are: dense ones by falling alignment, then coded ones, by name where equal; without holes. */
static bool place_entries(work *w, const document *d, entry *entries, size_t count, const uint8_t *data, size_t size) {
    uint64_t start = 0;
    for (int size_of_one = 8; size_of_one >= 0; size_of_one /= 2) {
        for (size_t i = 0; i < count; i++) {
            entry *e = &entries[i];
            tensor *t = &e->tensor;
            if (size_of_one != (e->coded ? 0 : TYPES[t->type].bytes)) continue;
            about(w, t->name, t->length);
            uint64_t own = dense_size(t);
            size_t first = first_child(e->offsets);
            if (own > size - start) return CORRUPT("its data ends behind the file's %zu bytes", size);
            if (d->nodes[e->offsets].type != '[' || members(d, e->offsets) != 2 || !is_whole(d, first, 0, MOST_WHOLE) ||
                !is_whole(d, after(d, first), 0, MOST_WHOLE) || (uint64_t)whole(d, first) != start ||
                (uint64_t)whole(d, after(d, first)) != start + own) {
                return CORRUPT("without holes its data is at [%" PRIu64 ", %" PRIu64 "]", start, start + own);
            }
            if (e->coded && (t->type != U8 || t->axes != 1)) return CORRUPT("its codes are not one row of type U8");
            t->data = data + start;
            t->size = (size_t)own;
            start += own;
        }
        if (size_of_one == 0) break;
    }
    about(w, NULL, 0);
    return start == size ? true : CORRUPT("entries end at %" PRIu64 ", but there are %zu bytes of data", start, size);
}

static bool read_entries(
    work *w, const document *index, const document *plan, bitbook *book, const uint8_t *data, size_t size
) {
    size_t count = members(index, 0) / 2 - 1, found = 0, n = 0;
    entry *entries = room(w, count, sizeof *entries);
    TRY(entries);
    streams list = {NULL, 0, 0};
    for (size_t i = 0; i < book->stored; i++) {
        tensor *t = &book->tensors[i];
        about(w, t->name, t->length);
        TRY(take_tensor(w, t));
        w->left += product(at_least_one(t->rows), at_least_one(t->cols)); /* counted once more with its streams */
        list.count = 0;
        TRY(add_streams(w, t->recipe, t->rows, t->cols, &list));
    }
    list.count = 0;
    TRY(add_input_streams(w, book, &list));
    const entry *inputs = NULL;
    for (size_t k = first_child(0); k < after(index, 0); k = after(index, after(index, k))) {
        if (is_word(index, k, "__metadata__")) continue;
        entry *e = &entries[n++];
        tensor *t = &e->tensor;
        size_t claim = after(index, k), type = lookup(index, claim, "dtype"), shape = lookup(index, claim, "shape");
        TRY(copy_string(w, index, k, &t->name, &t->length));
        about(w, t->name, t->length);
        e->offsets = index->nodes[claim].type == '{' ? lookup(index, claim, "data_offsets") : 0;
        if (!e->offsets || !type || !shape || members(index, claim) != 6) {
            return CORRUPT("its entry does not have 'data_offsets', 'dtype', 'shape' and no others");
        }
        t->type = find_type(index, type);
        if (t->type == TYPE_COUNT) return CORRUPT("its type is unknown");
        TRY(parse_shape(w, index, shape, t));
        size_t place = find_tensor(book, t->name, t->length);
        if (is_name(t->name, t->length, "__inputs__")) {
            if (list.count == 0) return CORRUPT("it can only hold the side tensors of inputs, and the plan names none");
            inputs = e;
            e->coded = true;
        } else if (place < book->stored) {
            e->plan = &book->tensors[place];
            e->coded = true;
            found++;
        } else {
            TRY(take_tensor(w, t));
        }
    }
    about(w, NULL, 0);
    if (found < book->stored || (list.count && !inputs)) return CORRUPT("a tensor of the plan is not in the index");
    TRY(place_entries(w, index, entries, count, data, size));
    if (inputs) {
        about_word(w, "__inputs__");
        TRY(make_room(w, &w->cells, list.all, list.count));
        TRY(read_group(w, &book->tables, book->coder, inputs->tensor.data, inputs->tensor.size, list.all, list.count));
        TRY(check_inputs(w, book, list.all));
    }
    tensor *all = room(w, count, sizeof *all);
    TRY(all);
    n = 0;
    for (size_t i = 0; i < count; i++) { /* what the plan says of the coded ones, where they are from the index */
        if (&entries[i] == inputs) continue;
        all[n] = entries[i].coded ? *entries[i].plan : entries[i].tensor;
        all[n].data = entries[i].tensor.data;
        all[n++].size = entries[i].tensor.size;
    }
    book->tensors = all;
    book->stored = n;
    return add_aliases(w, plan, book);
}

static bool parse_per_tensor(work *w, bitbook *book, const uint8_t *data, size_t size, size_t header) {
    const char *text = (const char *)data + 8;
    size_t length = header, crc_at;
    document index, plan;
    about_word(w, "header");
    while (length && text[length - 1] == ' ') length--;
    TRY(parse_json(w, &index, text, length));
    if (header != (length + 7) / 8 * 8) return CORRUPT("it is not filled with spaces to a multiple of 8 bytes");
    size_t metadata = lookup(&index, 0, "__metadata__");
    if (metadata && index.nodes[metadata].type != '{') return CORRUPT("__metadata__ is not an object");
    size_t version = metadata ? lookup(&index, metadata, "bitbook") : 0;
    if (version == 0) return CORRUPT("this is no bitbook file: its header does not say 'bitbook'");
    if (!is_word(&index, version, "1")) {
        const node *v = &index.nodes[version];
        bool number = v->type == '"' && v->stop - v->start < 7 && v->stop > v->start && text[v->start] != '0';
        uint32_t format = 0;
        for (uint32_t i = v->start; number && i < v->stop; i++) {
            number = text[i] >= '0' && text[i] <= '9';
            format = 10 * format + (uint32_t)(text[i] - '0');
        }
        if (number && format > NEWEST) return newer(w, format);
        return CORRUPT("unknown format version; a file of several entries says \"1\"");
    }
    size_t crc = lookup(&index, metadata, "crc32"), planned = lookup(&index, metadata, "plan");
    bool texts = crc && planned && index.nodes[crc].type == '"' && index.nodes[planned].type == '"';
    if (!texts || members(&index, metadata) != 6) {
        return CORRUPT("__metadata__ does not hold the texts 'bitbook', 'crc32', 'plan' and no others");
    }
    if (index.nodes[crc].stop - index.nodes[crc].start != 8) return CORRUPT("its checksum does not have 8 digits");
    crc_at = 8 + index.nodes[crc].start;
    char digits[9];
    uint32_t sum = crc_of(0, data, crc_at, book->tables.crc);
    sum = crc_of(sum, (const uint8_t *)"00000000", 8, book->tables.crc);
    sum = crc_of(sum, data + crc_at + 8, size - crc_at - 8, book->tables.crc);
    snprintf(digits, sizeof digits, "%08" PRIx32, sum);
    about(w, NULL, 0);
    if (memcmp(digits, data + crc_at, 8) != 0) return CORRUPT("the checksum does not match: the file was altered");
    about_word(w, "plan");
    const char *line;
    size_t line_size;
    TRY(copy_string(w, &index, planned, &line, &line_size));
    TRY(parse_json(w, &plan, line, line_size) && parse_plan(w, &plan, FIXED, false, book));
    return read_entries(w, &index, &plan, book, data + 8 + header, size - 8 - header);
}

static bool parse_file(work *w, bitbook *book, const uint8_t *data, size_t size) {
    static const char opening[] = "{\"bitbook\":";
    if (size < 8) return CORRUPT("a file of %zu bytes is too short: the header's length alone takes 8", size);
    uint64_t header = little(data, 8);
    if (header > size - 8 || header > MOST_HEADER) {
        const char *text = "the header claims %" PRIu64 " bytes; %zu are there, and %d are allowed";
        return CORRUPT(text, header, size - 8, MOST_HEADER);
    }
    make_tables(&book->tables);
    bool one = header >= sizeof opening - 1 && memcmp(data + 8, opening, sizeof opening - 1) == 0;
    return (one ? parse_one : parse_per_tensor)(w, book, data, size, (size_t)header);
}

/* -- what bitbook.h promises ------------------------------------------------------------------------------------- */

static work start_work(bitbook_error *error, bitbook_error *unused) {
    work w = {error ? error : unused, NULL, 0, NULL, NULL, UINT64_MAX, UINT64_MAX};
    w.error->status = BITBOOK_OK;
    w.error->message[0] = 0;
    return w;
}

/* `own`: the file's bytes, if the book is to free them; they are the first that it keeps. */
static bitbook *open_bytes(const uint8_t *data, size_t size, cell *own, uint64_t most, bitbook_error *error) {
    bitbook_error unused;
    work w = start_work(error, &unused);
    bitbook *book = calloc(1, sizeof *book);
    uint64_t by_size = product(ELEMENTS_PER_BYTE, size);
    w.limit = most ? most : by_size > FREE_ELEMENTS ? by_size : FREE_ELEMENTS;
    w.limit = w.left = w.limit < MOST_ELEMENTS ? w.limit : MOST_ELEMENTS;
    w.kept = own;
    bool read = book ? parse_file(&w, book, data, size) : fail(&w, BITBOOK_NO_MEMORY, "no memory for a book");
    release(&w.cells, NULL);
    if (read) {
        book->kept = w.kept;
        return book;
    }
    release(&w.kept, NULL);
    free(book);
    return NULL;
}

bitbook *bitbook_open_memory(const void *data, size_t size, uint64_t max_elements, bitbook_error *error) {
    return open_bytes(data, size, NULL, max_elements, error);
}

bitbook *bitbook_open(const char *path, uint64_t max_elements, bitbook_error *error) {
    bitbook_error unused;
    work w = start_work(error, &unused);
    FILE *file = fopen(path, "rb");
    long size = -1;
    uint8_t *data = NULL;
    about_word(&w, path);
    if (file && fseek(file, 0, SEEK_END) == 0) size = ftell(file);
    if (size >= 0 && fseek(file, 0, SEEK_SET) == 0) data = keep(&w, (uint64_t)size, 1);
    bool read = data && fread(data, 1, (size_t)size, file) == (size_t)size;
    if (file) fclose(file);
    if (read) return open_bytes(data, (size_t)size, w.kept, max_elements, error);
    if (w.error->status == BITBOOK_OK) fail(&w, BITBOOK_UNREADABLE, "this file cannot be read");
    release(&w.kept, NULL);
    return NULL;
}

void bitbook_close(bitbook *book) {
    if (book == NULL) return;
    release(&book->kept, NULL);
    free(book);
}

size_t bitbook_count(const bitbook *book) {
    return book->count;
}

const char *bitbook_name(const bitbook *book, size_t i, size_t *length) {
    if (length) *length = book->tensors[i].length;
    return book->tensors[i].name;
}

size_t bitbook_axes(const bitbook *book, size_t i) {
    return book->tensors[i].axes;
}

const uint64_t *bitbook_shape(const bitbook *book, size_t i) {
    return book->tensors[i].shape;
}

uint64_t bitbook_elements(const bitbook *book, size_t i) {
    return book->tensors[i].rows * book->tensors[i].cols;
}

const char *bitbook_stored_as(const bitbook *book, size_t i) {
    const tensor *t = &book->tensors[i];
    return t->recipe ? KIND[t->recipe->kind].name : TYPES[t->type].name;
}

size_t bitbook_target(const bitbook *book, size_t i) {
    return book->tensors[i].target;
}

static bool decode_dense(work *w, const tensor *t, float *out) {
    uint64_t count = t->rows * t->cols;
    const uint8_t *at = t->data;
    for (uint64_t i = 0; i < count; i++, at += TYPES[t->type].bytes) {
        uint64_t bits = little(at, TYPES[t->type].bytes);
        double number;
        switch (t->type) {
            case F64:
                memcpy(&number, &bits, sizeof number);
                out[i] = (float)number;
                break;
            case F32: out[i] = float_of_bits((uint32_t)bits); break;
            case F16: out[i] = float_of_half((uint32_t)bits); break;
            case BF16: out[i] = float_of_bits((uint32_t)bits << 16); break;
            case I64: out[i] = (float)(int64_t)bits; break;
            case I32: out[i] = (float)(int32_t)bits; break;
            case I16: out[i] = (float)(int16_t)bits; break;
            case I8: out[i] = (float)(int8_t)bits; break;
            default:
                if (t->type == BOOL && bits > 1) return CORRUPT("a boolean is neither 0 nor 1");
                out[i] = (float)bits;
        }
    }
    return true;
}

static bool decode_tensor(work *w, const bitbook *book, const tensor *t, float *out) {
    const stream *codes = t->codes;
    if (t->recipe == NULL) return decode_dense(w, t, out);
    if (t->data) {
        streams list = {NULL, 0, 0};
        TRY(add_streams(w, t->recipe, t->rows, t->cols, &list) && make_room(w, &w->cells, list.all, list.count));
        TRY(read_group(w, &book->tables, book->coder, t->data, t->size, list.all, list.count));
        codes = list.all;
    }
    return decode_matrix(w, t->recipe, t->rows, t->cols, &codes, out);
}

bitbook_status bitbook_decode(const bitbook *book, size_t i, float *out, bitbook_error *error) {
    bitbook_error unused;
    work w = start_work(error, &unused);
    if (i >= book->count) {
        fail(&w, BITBOOK_NO_SUCH, "there is no tensor %zu of %zu", i, book->count);
    } else {
        about(&w, book->tensors[i].name, book->tensors[i].length);
        decode_tensor(&w, book, &book->tensors[i], out);
    }
    release(&w.cells, NULL);
    release(&w.kept, NULL);
    return w.error->status;
}
