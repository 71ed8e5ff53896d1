/* Antialiased resizing, first along the rows, then along the columns.
 *
 * The definition is Pillow's: every output is a weighted mean of the inputs around its centre, the
 * kernel as wide as the output's pixels where the image shrinks, cut off at the ends of the axis.
 * Weights have 14 bits, sums 32, and each of the two passes rounds to 8. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "native.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { BITS = 14, ONE = 1 << BITS, HALF = ONE / 2 };

static double bilinear(double x) {
    x = fabs(x);
    return x < 1 ? 1 - x : 0;
}

/* Keys' cubic convolution (1981) with a = -1/2. */
static double bicubic(double x) {
    x = fabs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
    return 0;
}

static int clamp(int value, int low, int high) {
    return value < low ? low : value > high ? high : value;
}

static double weigh(Kernel kernel, double x) {
    return kernel == BILINEAR ? bilinear(x) : bicubic(x);
}

/* As floor and lrint do, for numbers that an int holds, and without a call. */
static int round_down(double x) {
    int whole = (int)x;
    return whole - (whole > x);
}

static int round_nearest(double x) {
#if defined(__x86_64__)
    return _mm_cvtsd_si32(_mm_set_sd(x));
#else
    return (int)lrint(x);
#endif
}

/* The inputs that output i depends on, of `count` from `origin` on, as [*first, *last). */
static void support(double start, double scale, double radius, int i, int origin, int count,
                    int *first, int *last) {
    double centre = start + (i + 0.5) * scale;
    *first = clamp(round_down(centre - radius + 0.5), origin, origin + count - 1);
    *last = clamp(round_down(centre + radius + 0.5), *first + 1, origin + count);
}

/* Outputs [from, to) of `outputs` that share the inputs [start, start + extent) evenly. */
Status axis_create(Axis *axis, double start, double extent, int outputs, int from, int to,
                   Kernel kernel) {
    double scale = extent / outputs, width = scale > 1 ? scale : 1;
    double radius = (kernel == BILINEAR ? 1 : 2) * width;
    int origin = (int)floor(start), count = (int)ceil(start + extent) - origin;
    int taps = 4, first, last;
    memset(axis, 0, sizeof *axis);
    for (int i = from; i < to; i++) {
        support(start, scale, radius, i, origin, count, &first, &last);
        if (last - first > taps) taps = last - first;
    }
    taps = (taps + 1) / 2 * 2;
    axis->size = to - from;
    axis->taps = taps;
    axis->first = malloc(sizeof(int) * (size_t)axis->size);
    axis->weights = calloc((size_t)axis->size * (size_t)taps, sizeof(int16_t));
    double *exact = malloc(sizeof(double) * (size_t)taps);
    if (axis->first == NULL || axis->weights == NULL || exact == NULL) {
        free(exact);
        axis_destroy(axis);
        return NO_MEMORY;
    }
    for (int i = from; i < to; i++) {
        double centre = start + (i + 0.5) * scale, total = 0;
        int16_t *row = axis->weights + (size_t)(i - from) * (size_t)taps;
        support(start, scale, radius, i, origin, count, &first, &last);
        for (int t = 0; t < last - first; t++)
            total += exact[t] = weigh(kernel, (first + t + 0.5 - centre) / width);
        /* Rounded so that the weights add up to one: flat areas stay what they are. */
        double carried = 0;
        int sum = 0;
        for (int t = 0; t < last - first; t++) {
            carried += exact[t] / total * ONE;
            row[t] = (int16_t)(round_nearest(carried) - sum);
            sum += row[t];
        }
        axis->first[i - from] = first;
        if (i == from || first < axis->begin) axis->begin = first;
        if (i == from || last > axis->end) axis->end = last;
    }
    free(exact);
    return DONE;
}

void axis_destroy(Axis *axis) {
    free(axis->first);
    free(axis->weights);
    memset(axis, 0, sizeof *axis);
}

static uint8_t rounded(int sum) { return (uint8_t)clamp((sum + HALF) >> BITS, 0, 255); }

static void rows_plain(const Axis *axis, const uint8_t *input, uint8_t *out, int flip) {
    for (int x = 0; x < axis->size; x++, out += 3) {
        int i = flip ? axis->size - 1 - x : x;
        const int16_t *weights = axis->weights + (size_t)i * (size_t)axis->taps;
        const uint8_t *pixel = input + (size_t)(axis->first[i] - axis->begin) * PIXEL;
        int sums[3] = {0, 0, 0};
        for (int t = 0; t < axis->taps; t++, pixel += PIXEL)
            for (int c = 0; c < 3; c++) sums[c] += weights[t] * pixel[c];
        for (int c = 0; c < 3; c++) out[c] = rounded(sums[c]);
    }
}

static void columns_plain(const Axis *axis, const uint8_t *input, size_t length, size_t from,
                          uint8_t *out) {
    int rows = axis->end - axis->begin;
    for (int y = 0; y < axis->size; y++, out += length) {
        const int16_t *weights = axis->weights + (size_t)y * (size_t)axis->taps;
        int first = axis->first[y] - axis->begin;
        int taps = rows - first < axis->taps ? rows - first : axis->taps;
        for (size_t x = from; x < length; x++) {
            int sum = 0;
            for (int t = 0; t < taps; t++)
                sum += weights[t] * input[(size_t)(first + t) * length + x];
            out[x] = rounded(sum);
        }
    }
}

#if defined(__x86_64__)

#define AVX2 __attribute__((target("avx2")))

enum { TOGETHER = 4 /* rows */, COLUMNS = 32 /* bytes */ };

/* Two weights side by side, as often as there is room. */
AVX2 static inline __m256i weight_pair(const int16_t *weights) {
    int both;
    memcpy(&both, weights, sizeof both);
    return _mm256_set1_epi32(both);
}

/* Add four weighted pixels of two rows, or two, to their sums: red, green, blue, X of each. */
AVX2 static inline __m256i add_pixels(__m256i sums, const uint8_t *lower, const uint8_t *upper,
                                      const int16_t *weights, int four) {
    /* Of two pixels: their reds side by side as 16 bits, their greens, blues, and X. */
    const __m256i pair = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
    const __m256i next = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
    __m256i pixels = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)lower));
    pixels = _mm256_inserti128_si256(pixels, _mm_loadu_si128((const __m128i *)upper), 1);
    __m256i two = _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, pair), weight_pair(weights));
    if (!four) return _mm256_add_epi32(sums, two);
    __m256i more = _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, next), weight_pair(weights + 2));
    return _mm256_add_epi32(_mm256_add_epi32(sums, two), more);
}

/* Output i of four rows as RGBX: of rows 0 and 2 in the lower half, of 1 and 3 in the upper. */
AVX2 static inline __m256i pixel_avx2(const Axis *axis, const uint8_t *const *rows, int i) {
    const int16_t *weights = axis->weights + (size_t)i * (size_t)axis->taps;
    size_t at = (size_t)(axis->first[i] - axis->begin) * PIXEL;
    __m256i sums = _mm256_set1_epi32(HALF), others = sums;
    int t = 0;
    for (; t + 4 <= axis->taps; t += 4, at += 4 * PIXEL) {
        sums = add_pixels(sums, rows[0] + at, rows[1] + at, weights + t, 1);
        others = add_pixels(others, rows[2] + at, rows[3] + at, weights + t, 1);
    }
    if (t < axis->taps) {
        sums = add_pixels(sums, rows[0] + at, rows[1] + at, weights + t, 0);
        others = add_pixels(others, rows[2] + at, rows[3] + at, weights + t, 0);
    }
    sums = _mm256_packs_epi32(_mm256_srai_epi32(sums, BITS), _mm256_srai_epi32(others, BITS));
    return _mm256_packus_epi16(sums, sums);
}

/* Write outputs `x` to `x` + 3 of four rows: 12 bytes each, and 4 that come to lie behind them. */
AVX2 static inline void put_four(const __m256i *rgbx, uint8_t *const *out, size_t x) {
    const __m256i without_x = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    __m256i first = _mm256_unpacklo_epi32(rgbx[0], rgbx[1]);
    __m256i last = _mm256_unpacklo_epi32(rgbx[2], rgbx[3]);
    __m256i early = _mm256_shuffle_epi8(_mm256_unpacklo_epi64(first, last), without_x);
    __m256i late = _mm256_shuffle_epi8(_mm256_unpackhi_epi64(first, last), without_x);
    _mm_storeu_si128((__m128i *)(out[0] + 3 * x), _mm256_castsi256_si128(early));
    _mm_storeu_si128((__m128i *)(out[1] + 3 * x), _mm256_extracti128_si256(early, 1));
    _mm_storeu_si128((__m128i *)(out[2] + 3 * x), _mm256_castsi256_si128(late));
    _mm_storeu_si128((__m128i *)(out[3] + 3 * x), _mm256_extracti128_si256(late, 1));
}

/* The same of a single output. */
AVX2 static inline void put_one(__m256i rgbx, uint8_t *const *out, size_t x) {
    __m128i even = _mm256_castsi256_si128(rgbx), odd = _mm256_extracti128_si256(rgbx, 1);
    int pixels[TOGETHER] = {_mm_cvtsi128_si32(even), _mm_cvtsi128_si32(odd),
                            _mm_extract_epi32(even, 1), _mm_extract_epi32(odd, 1)};
    for (int i = 0; i < TOGETHER; i++) memcpy(out[i] + 3 * x, &pixels[i], 3);
}

AVX2 static void rows_avx2(const Axis *axis, const uint8_t *const rows[TOGETHER],
                           uint8_t *const out[TOGETHER], int flip) {
    /* Copies that no write to a pixel can alter stay in registers. */
    const Axis own = *axis;
    const uint8_t *const in[TOGETHER] = {rows[0], rows[1], rows[2], rows[3]};
    uint8_t *const to[TOGETHER] = {out[0], out[1], out[2], out[3]};
    int x = 0;
    for (; x + 5 < own.size; x += 4) { /* what lies behind four is written again by others */
        __m256i rgbx[4];
        for (int i = 0; i < 4; i++)
            rgbx[i] = pixel_avx2(&own, in, flip ? own.size - 1 - (x + i) : x + i);
        put_four(rgbx, to, (size_t)x);
    }
    for (; x < own.size; x++)
        put_one(pixel_avx2(&own, in, flip ? own.size - 1 - x : x), to, (size_t)x);
}

/* 32 bytes of a row that is the weighted sum of `taps` rows from `top` on. */
AVX2 static inline __m256i column_avx2(const uint8_t *top, size_t length, const int16_t *weights,
                                       int taps) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i sums[4];
    for (int i = 0; i < 4; i++) sums[i] = _mm256_set1_epi32(HALF);
    for (int t = 0; t < taps; t += 2, top += 2 * length) {
        __m256i above = _mm256_loadu_si256((const __m256i *)top), below = above;
        if (t + 1 < taps) below = _mm256_loadu_si256((const __m256i *)(top + length));
        __m256i low = _mm256_unpacklo_epi8(above, below), both = weight_pair(weights + t);
        __m256i high = _mm256_unpackhi_epi8(above, below);
        __m256i words[4] = {_mm256_unpacklo_epi8(low, zero), _mm256_unpackhi_epi8(low, zero),
                            _mm256_unpacklo_epi8(high, zero), _mm256_unpackhi_epi8(high, zero)};
        for (int i = 0; i < 4; i++)
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(words[i], both));
    }
    for (int i = 0; i < 4; i++) sums[i] = _mm256_srai_epi32(sums[i], BITS);
    return _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]),
                               _mm256_packs_epi32(sums[2], sums[3]));
}

AVX2 static size_t columns_avx2(const Axis *axis, const uint8_t *input, size_t length,
                                uint8_t *out) {
    int rows = axis->end - axis->begin;
    size_t whole = length / COLUMNS * COLUMNS;
    for (int y = 0; y < axis->size; y++, out += length) {
        const int16_t *weights = axis->weights + (size_t)y * (size_t)axis->taps;
        int first = axis->first[y] - axis->begin;
        int taps = rows - first < axis->taps ? rows - first : axis->taps;
        while (taps > 1 && weights[taps - 1] == 0) taps--; /* they only fill up */
        const uint8_t *top = input + (size_t)first * length;
        for (size_t x = 0; x < whole; x += COLUMNS)
            _mm256_storeu_si256((__m256i *)(out + x), column_avx2(top + x, length, weights, taps));
    }
    return whole;
}

#endif

static int has_avx2(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2");
#else
    return 0;
#endif
}

void resample_rows(const Axis *axis, const uint8_t *const *inputs, int rows, uint8_t *out,
                   size_t stride, int flip) {
    int row = 0;
#if defined(__x86_64__)
    for (; row < rows && has_avx2(); row += TOGETHER) {
        const uint8_t *in[TOGETHER];
        uint8_t *to[TOGETHER];
        for (int i = 0; i < TOGETHER; i++) {
            int other = row + i < rows ? row + i : rows - 1;
            in[i] = inputs[other];
            to[i] = out + (size_t)other * stride;
        }
        rows_avx2(axis, in, to, flip);
    }
#endif
    for (; row < rows; row++) rows_plain(axis, inputs[row], out + (size_t)row * stride, flip);
}

void resample_columns(const Axis *axis, const uint8_t *input, size_t length, uint8_t *out) {
    size_t done = 0;
#if defined(__x86_64__)
    if (has_avx2()) done = columns_avx2(axis, input, length, out);
#endif
    if (done < length) columns_plain(axis, input, length, done, out);
}
