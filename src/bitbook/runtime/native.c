/* Products with packed weights.  Codes are fields of `bits` bits in 32-bit words; lane l of a word belongs to row
   16 b + l of the matrix, so that one vector instruction serves 16 rows and sums never cross lanes:

       words[block of 16 rows][word][lane]         code k of a row: bits k * bits … of the row's own words

   native.py compiles this file for the processor it runs on; loops.py has the same loops for where there is no
   compiler, packing.py the layout in torch. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define MOST_SUMS 8 /* that a row block has at once */
#define INLINE static inline __attribute__((always_inline))
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef floats loose_floats __attribute__((aligned(4), may_alias));
typedef ints loose_ints __attribute__((aligned(4), may_alias));
typedef words loose_words __attribute__((aligned(4), may_alias));

/* Codes that fill whole words: 32 / gcd(bits, 32). */
INLINE long codes_per_unit(int bits) { return bits % 2 ? 32 : bits % 4 ? 16 : bits % 8 ? 8 : bits % 16 ? 4 : bits % 32 ? 2 : 1; }
INLINE long words_per_unit(int bits) { return codes_per_unit(bits) * bits / 32; }
static long words_per_row(long cols, int bits) {
    long unit = codes_per_unit(bits);
    return (cols + unit - 1) / unit * words_per_unit(bits);
}

/* Code k of a unit, with whatever lies above it in the higher bits. */
INLINE words field(const loose_words *unit, int k, int bits) {
    int at = k * bits / 32, shift = k * bits % 32;
    words low = unit[at] >> shift;
    return shift + bits <= 32 ? low : low | unit[at + 1] << (32 - shift);
}

/* What all products are asked for: y (n, rows) = x (n, cols) · wᵀ + bias, which may be NULL. */
typedef struct {
    const float *bias, *x;
    long n;
    float *y;
    long threads;
} call_t;

/* Calls `tasks`, whose loops threads share, in `c->threads` of them.  A parallel region of one thread would take as
   long as a small product does. */
#define IN_THREADS(tasks)                                         \
    if (c->threads > 1) {                                         \
        _Pragma("omp parallel num_threads(c->threads)") { tasks; } \
    } else                                                        \
        tasks

/* The first `count` of 16 values, or all of them. */
INLINE floats load(const float *from, long count) {
    floats values = {0};
    if (count >= LANES) return *(const loose_floats *)from;
    memcpy(&values, from, count * sizeof(float));
    return values;
}
INLINE void store(float *to, floats values, long count) {
    if (count >= LANES)
        *(loose_floats *)to = values;
    else
        memcpy(to, &values, count * sizeof(float));
}

/* -- levels ---------------------------------------------------------------------------------------------------- */

enum { FLOAT32, BFLOAT16 }; /* types of scales and offsets */

typedef struct {
    const loose_words *codes;
    const float *levels;  /* 16 times or 32 levels, repeated to fill them; NULL: a code plus `first` is its level */
    const void *scales;   /* (row blocks, col blocks) */
    const void *offsets; /* alike, added to each weight in units of the scale; NULL: none */
    long rows, cols;
    long block_rows, block_cols; /* that share a scale; block_cols a multiple of a unit, or all columns */
    int bits, first, scale_type, offset_type;
} levels_t;

INLINE float value_at(const void *values, int type, long i) {
    if (type == FLOAT32) return ((const float *)values)[i];
    uint32_t high = (uint32_t)((const uint16_t *)values)[i] << 16;
    float value;
    memcpy(&value, &high, 4);
    return value;
}

enum { FEW, MORE, ITSELF };

INLINE floats level(words code, int kind, int bits, int first, floats low, floats high) {
    if (kind == ITSELF) return __builtin_convertvector((ints)(code & ((1u << bits) - 1)) + first, floats);
#ifdef __AVX512F__
    if (kind == FEW) return (floats)_mm512_permutexvar_ps((__m512i)code, (__m512)low);
    return (floats)_mm512_permutex2var_ps((__m512)low, (__m512i)code, (__m512)high);
#else
    float table[32];
    floats value;
    memcpy(table, &low, 64);
    memcpy(table + 16, &high, 64);
    for (int l = 0; l < LANES; l++) value[l] = table[code[l] & (kind == FEW ? 15 : 31)];
    return value;
#endif
}

/* sum[n] += what `units` units of a row block stand for, times x (columns, batch). */
INLINE void levels_dot(int bits, int kind, int batch, int first, const loose_words *w, long units, const float *x, floats low,
                       floats high, floats *sum) {
    int unit = codes_per_unit(bits), chains = batch == 1 ? 4 : 1; /* sums that do not wait for each other */
    floats part[MOST_SUMS] = {{0}};
    for (long u = 0; u < units; u++, w += words_per_unit(bits), x += unit * batch) {
#pragma GCC unroll 32
        for (int k = 0; k < unit; k++) {
            floats value = level(field(w, k, bits), kind, bits, first, low, high);
#pragma GCC unroll 8
            for (int n = 0; n < batch; n++) part[n * chains + k % chains] += value * x[k * batch + n];
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < batch; n++)
#pragma GCC unroll 4
        for (int c = 0; c < chains; c++) sum[n] += part[n * chains + c];
}

/* One row block times a tile of the batch. */
INLINE void levels_block(int bits, int kind, int batch, const levels_t *w, const loose_words *codes, const floats *scales,
                         const floats *offsets, const float *x, const float *totals, floats *y) {
    long unit = codes_per_unit(bits), units = (w->cols + unit - 1) / unit;
    long step = w->block_cols < w->cols ? w->block_cols / unit : units, groups = (units + step - 1) / step;
    floats low = {0}, high = {0};
    if (w->levels) {
        memcpy(&low, w->levels, 64);
        memcpy(&high, w->levels + (kind == MORE ? 16 : 0), 64);
    }
    for (long g = 0; g < groups; g++) {
        long start = g * step, count = start + step < units ? step : units - start;
        floats sum[MOST_SUMS] = {{0}};
        levels_dot(bits, kind, batch, w->first, codes + start * words_per_unit(bits), count, x + start * unit * batch, low, high, sum);
#pragma GCC unroll 8
        for (int n = 0; n < batch; n++) y[n] += scales[g] * (offsets ? sum[n] + offsets[g] * totals[g * batch + n] : sum[n]);
    }
}

typedef void block_function(const levels_t *, const loose_words *, const floats *, const floats *, const float *, const float *,
                            floats *);
#define BLOCK(bits, kind, batch)                                                                                        \
    static void block_##bits##_##kind##_##batch(const levels_t *w, const loose_words *codes, const floats *scales,           \
                                                const floats *offsets, const float *x, const float *totals, floats *y) { \
        levels_block(bits, kind, batch, w, codes, scales, offsets, x, totals, y);                                      \
    }
#define BLOCKS(bits, kind) BLOCK(bits, kind, 1) BLOCK(bits, kind, 8)
#define NAMES(bits, kind) {block_##bits##_##kind##_1, block_##bits##_##kind##_8}
BLOCKS(1, FEW) BLOCKS(2, FEW) BLOCKS(3, FEW) BLOCKS(4, FEW) BLOCKS(5, MORE)
BLOCKS(6, ITSELF) BLOCKS(7, ITSELF) BLOCKS(8, ITSELF)
static block_function *const blocks[][2] = {
    NAMES(1, FEW), NAMES(2, FEW), NAMES(3, FEW), NAMES(4, FEW), NAMES(5, MORE),
    NAMES(6, ITSELF), NAMES(7, ITSELF), NAMES(8, ITSELF),
};

/* How many of the batch go together, their values in a column side by side; zeros after the last. */
static const int TILES[] = {1, 8};
static int tile_of(long n) { return n > 1; }

/* to[j * stride + b] = x[b * cols + j], for `count` <= 8 inputs, of whatever fills 32 bits. */
static void interleave(const void *x, int count, long cols, void *to, long stride) {
    if (stride == 1) {
        memcpy(to, x, cols * sizeof(uint32_t));
        return;
    }
    typedef uint32_t word __attribute__((may_alias));
    const word *from = x;
    word *into = to;
    long j = 0;
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
    typedef uint32_t eight __attribute__((vector_size(32), aligned(4), may_alias));
#define LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH(a, b) __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define FIRST(a, b) __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define SECOND(a, b) __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define LEFT(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define RIGHT(a, b) __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
    for (; count == 8 && j + 8 <= cols; j += 8) {
        eight r[8], t[8], u[8];
        for (int b = 0; b < 8; b++) r[b] = *(const eight *)(from + b * cols + j);
        for (int b = 0; b < 8; b += 2) t[b] = LOW(r[b], r[b + 1]), t[b + 1] = HIGH(r[b], r[b + 1]);
        for (int b = 0; b < 8; b += 4)
            for (int k = 0; k < 2; k++) u[b + 2 * k] = FIRST(t[b + k], t[b + k + 2]), u[b + 2 * k + 1] = SECOND(t[b + k], t[b + k + 2]);
        for (int k = 0; k < 4; k++) {
            *(eight *)(into + (j + k) * stride) = LEFT(u[k], u[k + 4]);
            *(eight *)(into + (j + k + 4) * stride) = RIGHT(u[k], u[k + 4]);
        }
    }
#endif
#endif
    for (; j < cols; j++)
        for (int b = 0; b < count; b++) into[j * stride + b] = from[b * cols + j];
}

/* Inputs in tiles of `batch`, and their sums over each group of columns where there are offsets. */
typedef struct {
    int batch;
    long cols, tiles, step, groups;
    float *packed, *totals;
    int failed;
} levels_input_t;

static void levels_tasks(const levels_t *w, const call_t *c, levels_input_t *in) {
    long row_blocks = (w->rows + LANES - 1) / LANES, size = words_per_row(w->cols, w->bits), groups = in->groups;
    block_function *function = blocks[w->bits - 1][in->batch > 1];
#pragma omp for
    for (long t = 0; t < in->tiles; t++) {
        const float *x = c->x + t * in->batch * w->cols;
        int count = c->n - t * in->batch < in->batch ? (int)(c->n - t * in->batch) : in->batch;
        interleave(x, count, w->cols, in->packed + t * in->batch * in->cols, in->batch);
        for (long b = 0; w->offsets && b < count; b++)
            for (long g = 0; g < groups; g++) {
                float sum = 0;
                for (long j = g * in->step; j < (g + 1) * in->step && j < w->cols; j++) sum += x[b * w->cols + j];
                in->totals[(t * groups + g) * in->batch + b] = sum;
            }
    }
    floats *scales = aligned_alloc(64, 2 * groups * sizeof(floats)), *offsets = scales + groups;
    if (!scales) {
#pragma omp atomic write
        in->failed = 1;
    }
#pragma omp for schedule(dynamic, 4)
    for (long i = 0; i < row_blocks; i++) {
        if (!scales) continue;
        long most = w->rows - i * LANES < LANES ? w->rows - i * LANES : LANES;
        for (int l = 0; l < LANES; l++) {
            long at = (i * LANES + (l < most ? l : 0)) / w->block_rows * groups;
            for (long g = 0; g < groups; g++) {
                scales[g][l] = value_at(w->scales, w->scale_type, at + g);
                if (w->offsets) offsets[g][l] = value_at(w->offsets, w->offset_type, at + g);
            }
        }
        floats bias = c->bias ? load(c->bias + i * LANES, most) : (floats){0};
        for (long t = 0; t < in->tiles; t++) {
            floats sum[MOST_SUMS] = {{0}};
            function(w, w->codes + i * size, scales, w->offsets ? offsets : NULL, in->packed + t * in->batch * in->cols,
                     in->totals + t * groups * in->batch, sum);
            for (int b = 0; b < in->batch && t * in->batch + b < c->n; b++)
                store(c->y + (t * in->batch + b) * w->rows + i * LANES, sum[b] + bias, most);
        }
    }
    free(scales);
}

/* Returns 0 where memory is short, as all products do. */
int levels_linear(const levels_t *w, const call_t *c) {
    int batch = TILES[tile_of(c->n)];
    long unit = codes_per_unit(w->bits), cols = (w->cols + unit - 1) / unit * unit, tiles = (c->n + batch - 1) / batch;
    long step = w->block_cols < w->cols ? w->block_cols : cols, groups = (cols + step - 1) / step;
    float *packed = calloc(tiles * batch * (cols + groups) + LANES, 4);
    if (!packed) return 0;
    levels_input_t in = {batch, cols, tiles, step, groups, packed, packed + tiles * batch * cols, 0};
    IN_THREADS(levels_tasks(w, c, &in));
    free(packed);
    return !in.failed;
}

/* -- integers -------------------------------------------------------------------------------------------------- */

typedef struct {
    const loose_words *codes;
    const float *scales;  /* (rows,) of the weights */
    const int32_t *zeros; /* (rows,): the code of zero */
    const int32_t *sums;  /* (rows,): of codes less their zeros */
    long rows, cols;
    int bits, factor;        /* factor: a weight is factor · code - zero */
    int symmetric, most;     /* largest code of an input; if symmetric, -most is the smallest, otherwise 0 */
    int rule;                /* by which an input's scale and zero point follow from it */
    float in_scale, in_zero; /* if they are GIVEN */
} integers_t;

enum { GIVEN, MINMAX, ABSMAX };

typedef struct {
    float low, high;
    int broken; /* whether some value is infinite or not a number */
} range_t;

INLINE floats least(floats a, floats b) {
    ints below = a < b;
    return (floats)((below & (ints)a) | (~below & (ints)b));
}

static range_t range_of(const float *x, long count) {
    enum { CHAINS = 4 }; /* that do not wait for each other */
    floats low[CHAINS], minus_high[CHAINS], nothing[CHAINS] = {{0}};
    range_t range = {INFINITY, -INFINITY, 0};
    for (int k = 0; k < CHAINS; k++) low[k] = minus_high[k] = (floats){0} + INFINITY;
    for (long i = 0; i < count; i += CHAINS * LANES)
#pragma GCC unroll 4
        for (int k = 0; k < CHAINS; k++) {
            long left = count - i - k * LANES;
            if (left <= 0) continue;
            floats value = load(x + i + k * LANES, left);
            if (left < LANES)
                for (long l = left; l < LANES; l++) value[l] = value[0];
            low[k] = least(value, low[k]), minus_high[k] = least(-value, minus_high[k]), nothing[k] += value - value;
        }
    for (int k = 1; k < CHAINS; k++)
        low[0] = least(low[k], low[0]), minus_high[0] = least(minus_high[k], minus_high[0]), nothing[0] += nothing[k];
    for (int l = 0; l < LANES; l++) {
        range.low = low[0][l] < range.low ? low[0][l] : range.low;
        range.high = -minus_high[0][l] > range.high ? -minus_high[0][l] : range.high;
        range.broken |= nothing[0][l] != 0;
    }
    return range;
}

/* Scale and zero point of an input whose values lie between those of `ranges`. */
static void find_scale(const integers_t *w, const range_t *ranges, long count, float *scale, float *zero) {
    float smallest = 1e-8f, low = INFINITY, high = -INFINITY, most = w->most;
    int broken = 0;
    for (const range_t *range = ranges; range < ranges + count; range++) {
        low = range->low < low ? range->low : low, high = range->high > high ? range->high : high;
        broken |= range->broken;
    }
    *zero = 0;
    if (!w->symmetric) {
        low = low > 0 ? 0 : low, high = high < 0 ? 0 : high;
        *scale = (high - low) / most;
    } else
        *scale = w->rule == MINMAX ? (high - low) / (2 * most) : (-low > high ? -low : high) / most;
    *scale = broken ? NAN : *scale < smallest ? smallest : *scale;
    if (!w->symmetric) {
        *zero = rintf(-low / *scale);
        *zero = *zero < 0 ? 0 : *zero > most ? most : *zero;
    }
}

/* What is taken from codes of an input, so that they are bytes with a sign. */
static int shift_of(const integers_t *w) { return !w->symmetric && w->most > 127 ? 128 : 0; }

/* Whole numbers of an input, and their sum.  Bytes may be anything's, so the compiler is told that these are not. */
static int32_t round_row(const float *restrict x, long count, float scale, float zero, float low, float high, int shift,
                         int8_t *restrict rounded) {
    int32_t total = 0;
    for (long j = 0; j < count; j++) {
        float step = rintf(x[j] / scale) + zero;
        step = step < low ? low : step;
        step = step > high ? high : step;
        int32_t whole = (int32_t)step - shift;
        rounded[j] = (int8_t)whole;
        total += whole;
    }
    return total;
}

/* Four codes of each lane, in bytes: those of the columns that `order` names. */
INLINE words quad(const loose_words *unit, int q, int bits) {
    words mask = {0}, value;
    mask += 0x01010101u * ((1u << bits) - 1);
    if (8 % bits == 0) return *(unit + q / (8 / bits)) >> (q % (8 / bits) * bits) & mask;
    value = field(unit, 4 * q, bits) & ((1u << bits) - 1);
    for (int m = 1; m < 4; m++) value |= (field(unit, 4 * q + m, bits) & ((1u << bits) - 1)) << (8 * m);
    return value;
}
/* The column of a unit that is byte k of its quads. */
static int order(int k, int bits) {
    int q = k / 4, m = k % 4;
    return 8 % bits ? k : q / (8 / bits) * (32 / bits) + m * (8 / bits) + q % (8 / bits);
}

INLINE ints dot4(ints sum, words codes, int32_t x) {
#ifdef __AVX512VNNI__
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(x));
#else
    for (int m = 0; m < 4; m++) sum += (ints)(codes >> (8 * m) & 255) * (int32_t)(int8_t)(x >> (8 * m));
    return sum;
#endif
}

INLINE void integers_dot(int bits, int batch, const loose_words *w, long units, const int32_t *x, ints *sum) {
    int quads = codes_per_unit(bits) / 4, chains = batch == 1 ? 4 : 1;
    ints part[16] = {{0}};
    for (long u = 0; u < units; u++, w += words_per_unit(bits), x += quads * batch) {
#pragma GCC unroll 8
        for (int q = 0; q < quads; q++) {
            words codes = quad(w, q, bits);
#pragma GCC unroll 16
            for (int n = 0; n < batch; n++) part[n * chains + q % chains] = dot4(part[n * chains + q % chains], codes, x[q * batch + n]);
        }
    }
    for (int n = 0; n < batch; n++)
        for (int c = 0; c < chains; c++) sum[n] += part[n * chains + c];
}

typedef void dot_function(const loose_words *, long, const int32_t *, ints *);
#define DOT(bits, batch)                                                                                                 \
    static void dot_##bits##_##batch(const loose_words *w, long units, const int32_t *x, ints *sum) {                         \
        integers_dot(bits, batch, w, units, x, sum);                                                                    \
    }
#define DOTS(bits) DOT(bits, 1) DOT(bits, 8) DOT(bits, 16)
DOTS(1) DOTS(2) DOTS(3) DOTS(4) DOTS(5) DOTS(6) DOTS(7) DOTS(8)
#define DOT_NAMES(bits) {dot_##bits##_1, dot_##bits##_8, dot_##bits##_16}
static dot_function *const dots[][3] = {DOT_NAMES(1), DOT_NAMES(2), DOT_NAMES(3), DOT_NAMES(4),
                                        DOT_NAMES(5), DOT_NAMES(6), DOT_NAMES(7), DOT_NAMES(8)};

/* Inputs as whole numbers, a row after the other, and in tiles: four columns of an input after those of another. */
typedef struct {
    int tile, batch;
    long tiles, quads;
    range_t *ranges;
    int32_t *totals, *packed;
    int8_t *rounded;
} integers_input_t;

/* Up to eight inputs from `start` on. */
static void round_inputs(const integers_t *w, const call_t *c, const integers_input_t *in, long start, float scale, float zero) {
    float low = w->symmetric ? -w->most : 0, high = w->most;
    long unit = codes_per_unit(w->bits), width = 4 * in->quads, stop = c->n - start < 8 ? c->n : start + 8;
    int places[32], in_order = 8 % w->bits || w->bits == 8;
    for (int k = 0; k < unit; k++) places[k] = order(k, w->bits);
    for (long b = start; b < stop; b++) {
        int8_t *own = in->rounded + b * width, plain[32];
        in->totals[b] = round_row(c->x + b * w->cols, w->cols, scale, zero, low, high, shift_of(w), own);
        memset(own + w->cols, 0, width - w->cols);
        for (long j = 0; !in_order && j < width; j += unit) {
            memcpy(plain, own + j, unit);
            for (int k = 0; k < unit; k++) own[j + k] = plain[places[k]];
        }
    }
    interleave(in->rounded + start * width, (int)(stop - start), in->quads,
               in->packed + start / in->batch * in->batch * in->quads + start % in->batch, in->batch);
}

static void integers_tasks(const integers_t *w, const call_t *c, const integers_input_t *in) {
    int batch = in->batch;
    long size = words_per_row(w->cols, w->bits), units = 4 * in->quads / codes_per_unit(w->bits);
    long row_blocks = (w->rows + LANES - 1) / LANES;
    float scale = w->in_scale, zero = w->in_zero;
    if (w->rule != GIVEN) {
#pragma omp for
        for (long b = 0; b < c->n; b += 8)
            in->ranges[b / 8] = range_of(c->x + b * w->cols, (c->n - b < 8 ? c->n - b : 8) * w->cols);
        find_scale(w, in->ranges, (c->n + 7) / 8, &scale, &zero);
    }
#pragma omp for
    for (long b = 0; b < c->n; b += 8) round_inputs(w, c, in, b, scale, zero);
    int32_t beyond = shift_of(w) - (int)zero;
#pragma omp for collapse(2) schedule(dynamic, 8)
    for (long i = 0; i < row_blocks; i++)
        for (long t = 0; t < in->tiles; t++) {
            long first = t * batch, count = c->n - first < batch ? c->n - first : batch, row = i * LANES, most = w->rows - row;
            floats scales = scale * load(w->scales + row, most);
            floats bias = c->bias ? load(c->bias + row, most) : (floats){0}, product[16];
            ints zeros = (ints)load((const float *)w->zeros + row, most), sum[16] = {{0}};
            ints sums = beyond * (ints)load((const float *)w->sums + row, most);
            dots[w->bits - 1][in->tile](w->codes + i * size, units, in->packed + first * in->quads, sum);
            for (long b = 0; b < count; b++) {
                ints whole = w->factor * sum[b] - zeros * in->totals[first + b] + sums;
                product[b] = __builtin_convertvector(whole, floats) * scales;
            }
            __asm__("" : "+m"(product)); /* a fused multiply-add would not round the product */
            for (long b = 0; b < count; b++) store(c->y + (first + b) * w->rows + row, product[b] + bias, most);
        }
}

/* Of x rounded to integers, whose sums of products are exact. */
int integers_linear(const integers_t *w, const call_t *c) {
    if (!c->n) return 1;
    int tile = c->n == 1 ? 0 : c->n <= 8 ? 1 : 2, batch = tile < 2 ? TILES[tile] : 16;
    long unit = codes_per_unit(w->bits), quads = (w->cols + unit - 1) / unit * unit / 4, tiles = (c->n + batch - 1) / batch;
    range_t *ranges = malloc(c->n * (sizeof(range_t) + sizeof(int32_t)));
    int8_t *rounded = malloc((c->n + tiles * batch) * quads * sizeof(int32_t));
    int made = ranges && rounded;
    if (made) {
        int32_t *packed = (int32_t *)rounded + c->n * quads;
        memset(packed + (tiles - 1) * batch * quads, 0, batch * quads * sizeof(int32_t)); /* may be more than the inputs */
        integers_input_t in = {tile, batch, tiles, quads, ranges, (int32_t *)(ranges + c->n), packed, rounded};
        IN_THREADS(integers_tasks(w, c, &in));
    }
    free(ranges), free(rounded);
    return made;
}

/* -- vectors --------------------------------------------------------------------------------------------------- */

typedef struct {
    const loose_words *codes;
    const float *table;     /* (dims, stride): one coordinate of all codewords after the other */
    const float *codewords; /* (codewords, dims) */
    long rows, cols, dims, stride;
    int bits;
} vectors_t;

INLINE floats look_up(const float *table, words code) {
#ifdef __AVX512F__
    return (floats)_mm512_i32gather_ps((__m512i)code, table, 4);
#else
    floats value;
    for (int l = 0; l < LANES; l++) value[l] = table[code[l]];
    return value;
#endif
}

INLINE void look_up_units(int bits, const loose_words *w, long units, const float *tables, long stride, floats *sum) {
    int unit = codes_per_unit(bits);
    floats part[4] = {{0}};
    for (long u = 0; u < units; u++, w += words_per_unit(bits))
#pragma GCC unroll 32
        for (int k = 0; k < unit; k++, tables += stride) {
            words code = field(w, k, bits) & ((1u << bits) - 1);
            part[k % 4] += bits <= 4 ? level(code, FEW, bits, 0, *(const loose_floats *)tables, (floats){0})
                                     : look_up(tables, code);
        }
    *sum += part[0] + part[1] + part[2] + part[3];
}

static void any_units(int bits, const loose_words *w, long units, const float *tables, long stride, floats *sum) {
    switch (bits) {
    case 4: look_up_units(4, w, units, tables, stride, sum); break;
    case 8: look_up_units(8, w, units, tables, stride, sum); break;
    default: look_up_units(bits, w, units, tables, stride, sum);
    }
}

enum { TASK = 16, /* row blocks that go over the tables together */ NEAR = 4096 /* floats of tables in the nearest cache */ };

static void vectors_tasks(const vectors_t *w, const call_t *c, float *tables) {
    long unit = codes_per_unit(w->bits), vectors = w->cols / w->dims, units = (vectors + unit - 1) / unit;
    long size = words_per_row(vectors, w->bits), row_blocks = (w->rows + LANES - 1) / LANES, stride = w->stride;
    long step = NEAR / (stride * unit) < 1 ? 1 : NEAR / (stride * unit);
    for (long b = 0; b < c->n; b++) {
#pragma omp for schedule(static)
        for (long j = 0; j < vectors; j++) {
            const float *part = c->x + b * w->cols + j * w->dims;
            float *table = tables + j * stride;
            for (long k = 0; k < stride; k++) table[k] = part[0] * w->table[k];
            for (long e = 1; e < w->dims; e++)
                for (long k = 0; k < stride; k++) table[k] += part[e] * w->table[e * stride + k];
        }
#pragma omp for schedule(dynamic)
        for (long i = 0; i < row_blocks; i += TASK) {
            floats sum[TASK] = {{0}};
            for (long u = 0; u < units; u += step) {
                long count = u + step < units ? step : units - u;
                for (long k = i; k < i + TASK && k < row_blocks; k++)
                    any_units(w->bits, w->codes + k * size + u * words_per_unit(w->bits), count, tables + u * unit * stride,
                              stride, sum + k - i);
            }
            for (long r = i * LANES; r < w->rows && r < (i + TASK) * LANES; r++)
                c->y[b * w->rows + r] = sum[r / LANES - i][r % LANES] + (c->bias ? c->bias[r] : 0.0f);
        }
    }
}

/* By tables of every codeword's product with each part of x. */
int vectors_look_up(const vectors_t *w, const call_t *c) {
    long unit = codes_per_unit(w->bits), vectors = w->cols / w->dims, all = (vectors + unit - 1) / unit * unit;
    float *tables = aligned_alloc(64, (all * w->stride + LANES) / LANES * LANES * sizeof(float));
    if (!tables) return 0;
    memset(tables + vectors * w->stride, 0, (all - vectors) * w->stride * sizeof(float));
    IN_THREADS(vectors_tasks(w, c, tables));
    free(tables);
    return 1;
}

INLINE void vectors_row(const vectors_t *w, long dims, const uint32_t *from, float *to) {
    uint64_t waiting = 0;
    int count = 0;
    for (long j = 0; j < w->cols / dims; j++, to += dims) {
        if (count < w->bits) waiting |= (uint64_t)*from << count, from += LANES, count += 32;
        const float *codeword = w->codewords + (waiting & ((1u << w->bits) - 1)) * dims;
        for (long e = 0; e < dims; e++) to[e] = codeword[e];
        waiting >>= w->bits, count -= w->bits;
    }
}

/* rows start … stop of w as floats, (stop - start, cols). */
void vectors_rows(const vectors_t *w, long start, long stop, float *out, int threads) {
    long size = words_per_row(w->cols / w->dims, w->bits);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long r = start; r < stop; r++) {
        const uint32_t *from = (const uint32_t *)(w->codes + r / LANES * size) + r % LANES;
        float *to = out + (r - start) * w->cols;
        switch (w->dims) {
        case 2: vectors_row(w, 2, from, to); break;
        case 4: vectors_row(w, 4, from, to); break;
        case 8: vectors_row(w, 8, from, to); break;
        default: vectors_row(w, w->dims, from, to);
        }
    }
}

/* -- rows ------------------------------------------------------------------------------------------------------ */

typedef struct {
    const loose_floats *panels; /* [block of 16 centroids][column]: a column of all sixteen */
    const int32_t *labels;      /* (rows,) */
    long rows, cols, centroids;
} rows_t;

/* out[n * stride + lane] of `count` neighbouring blocks of centroids, for a tile of inputs. */
INLINE void panels_dot(int batch, int count, const loose_floats *panels, long cols, const float *const *x, float *out,
                       long stride) {
    int chains = batch == 1 ? 4 : 1; /* sums that do not wait for each other */
    floats sum[16] = {{0}};
    long whole = cols - cols % chains;
    for (long j = 0; j < whole; j += chains)
#pragma GCC unroll 4
        for (int c = 0; c < chains; c++)
#pragma GCC unroll 2
            for (int k = 0; k < count; k++) {
                floats column = panels[k * cols + j + c];
#pragma GCC unroll 8
                for (int n = 0; n < batch; n++) sum[(n * chains + c) * count + k] += column * x[n][j + c];
            }
    for (long j = whole; j < cols; j++)
        for (int k = 0; k < count; k++) sum[k] += panels[k * cols + j] * x[0][j];
#pragma GCC unroll 8
    for (int n = 0; n < batch; n++)
#pragma GCC unroll 2
        for (int k = 0; k < count; k++) {
            floats total = sum[n * chains * count + k];
#pragma GCC unroll 4
            for (int c = 1; c < chains; c++) total += sum[(n * chains + c) * count + k];
            *(loose_floats *)(out + n * stride + k * LANES) = total;
        }
}

/* One output: of each row the product (centroids,) with its centroid. */
static void rows_gather(const rows_t *w, const float *bias, const float *products, float *y) {
    long r = 0, second = w->centroids - LANES;
    if (second <= LANES) { /* so few that two registers hold them */
        floats low = load(products, w->centroids), high = second > 0 ? load(products + LANES, second) : low;
        for (; r + LANES <= w->rows; r += LANES) {
            floats own = level(*(const loose_words *)(w->labels + r), MORE, 5, 0, low, high);
            *(loose_floats *)(y + r) = bias ? own + *(const loose_floats *)(bias + r) : own;
        }
    }
    for (; r < w->rows; r++) y[r] = products[w->labels[r]] + (bias ? bias[r] : 0.0f);
}

static void rows_tasks(const rows_t *w, const call_t *c, float *products) {
    long cols = w->cols, blocks = (w->centroids + LANES - 1) / LANES, stride = blocks * LANES, n = c->n;
    int batch = TILES[tile_of(n)];
#pragma omp for collapse(2) schedule(dynamic)
    for (long i = 0; i < blocks; i += 2)
        for (long first = 0; first < n; first += batch) {
            const loose_floats *panels = w->panels + i * cols;
            const float *x[8];
            for (int b = 0; b < batch; b++) x[b] = c->x + (first + b < n ? first + b : n - 1) * cols;
            float *out = products + first * stride + i * LANES;
            int two = i + 1 < blocks;
            if (batch == 1)
                two ? panels_dot(1, 2, panels, cols, x, out, stride) : panels_dot(1, 1, panels, cols, x, out, stride);
            else
                two ? panels_dot(8, 2, panels, cols, x, out, stride) : panels_dot(8, 1, panels, cols, x, out, stride);
        }
#pragma omp for
    for (long b = 0; b < n; b++) rows_gather(w, c->bias, products + b * stride, c->y + b * w->rows);
}

/* A product with the centroids, and of each row that of its own. */
int rows_linear(const rows_t *w, const call_t *c) {
    float *products = malloc((c->n + 7) * (w->centroids + LANES) * sizeof(float));
    if (!products) return 0;
    IN_THREADS(rows_tasks(w, c, products));
    free(products);
    return 1;
}

static void gather_tasks(const rows_t *w, const call_t *c) {
#pragma omp for
    for (long b = 0; b < c->n; b++) rows_gather(w, c->bias, c->x + b * w->centroids, c->y + b * w->rows);
}

/* The same, x being the products (n, centroids). */
int gather_linear(const rows_t *w, const call_t *c) {
    IN_THREADS(gather_tasks(w, c));
    return 1;
}

/* -- the layout ------------------------------------------------------------------------------------------------ */

/* Codes (rows, cols), of 1 or 4 bytes, less `low`, to words of zeros. */
void pack(const void *codes, int bytes, int32_t low, long rows, long cols, int bits, uint32_t *out, int threads) {
    long size = words_per_row(cols, bits);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long r = 0; r < rows; r++) {
        uint32_t *to = out + r / LANES * size * LANES + r % LANES;
        uint64_t waiting = 0;
        int count = 0;
        for (long j = 0; j < cols; j++) {
            int32_t code = bytes == 1 ? ((const uint8_t *)codes)[r * cols + j] : ((const int32_t *)codes)[r * cols + j];
            waiting |= (uint64_t)(uint32_t)(code - low) << count, count += bits;
            if (count >= 32) *to = (uint32_t)waiting, to += LANES, waiting >>= 32, count -= 32;
        }
        if (count) *to = (uint32_t)waiting;
    }
}

/* Rows start … stop of what `pack` made. */
void unpack(const uint32_t *words, long start, long stop, long cols, int bits, int32_t low, void *codes, int bytes,
            int threads) {
    long size = words_per_row(cols, bits);
    uint32_t mask = bits == 32 ? ~0u : (1u << bits) - 1;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (long r = start; r < stop; r++) {
        const uint32_t *from = words + r / LANES * size * LANES + r % LANES;
        uint64_t waiting = 0;
        int count = 0;
        for (long j = 0; j < cols; j++) {
            if (count < bits) waiting |= (uint64_t)*from << count, from += LANES, count += 32;
            int32_t code = (int32_t)((uint32_t)waiting & mask) + low;
            waiting >>= bits, count -= bits;
            if (bytes == 1)
                ((uint8_t *)codes)[(r - start) * cols + j] = (uint8_t)code;
            else
                ((int32_t *)codes)[(r - start) * cols + j] = code;
        }
    }
}
