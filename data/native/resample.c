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

/* The inputs that output i depends on, of `count` from `origin` on, as [*first, *last). */
static void support(double start, double scale, double radius, int i, int origin, int count,
                    int *first, int *last) {
    double centre = start + (i + 0.5) * scale;
    *first = clamp((int)floor(centre - radius + 0.5), origin, origin + count - 1);
    *last = clamp((int)floor(centre + radius + 0.5), *first + 1, origin + count);
}

/* Outputs [from, to) of `outputs` that share the inputs [start, start + extent) evenly. */
Status axis_create(Axis *axis, double start, double extent, int outputs, int from, int to,
                   Kernel kernel) {
    double (*weigh)(double) = kernel == BILINEAR ? bilinear : bicubic;
    double scale = extent / outputs, width = scale > 1 ? scale : 1;
    double radius = (kernel == BILINEAR ? 1 : 2) * width;
    int origin = (int)floor(start), count = (int)ceil(start + extent) - origin;
    int taps = 4, first, last;
    memset(axis, 0, sizeof *axis);
    for (int i = from; i < to; i++) {
        support(start, scale, radius, i, origin, count, &first, &last);
        if (last - first > taps) taps = last - first;
    }
    taps = (taps + 3) / 4 * 4;
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
            total += exact[t] = weigh((first + t + 0.5 - centre) / width);
        /* Rounded so that the weights add up to one: flat areas stay what they are. */
        double carried = 0;
        int sum = 0;
        for (int t = 0; t < last - first; t++) {
            carried += exact[t] / total * ONE;
            row[t] = (int16_t)((int)lrint(carried) - sum);
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

/* Two rows at a time, one in each half of the registers; four inputs a step. */
__attribute__((target("avx2"))) static void rows_avx2(const Axis *axis, const uint8_t *one,
                                                      const uint8_t *two, uint8_t *out_one,
                                                      uint8_t *out_two, int flip) {
    /* Of two pixels: their reds side by side as 16 bits, their greens, blues, and X. */
    const __m256i pair = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
    const __m256i next = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
    const __m256i half = _mm256_set1_epi32(HALF);
    int taps = axis->taps;
    for (int x = 0; x < axis->size; x++) {
        int i = flip ? axis->size - 1 - x : x;
        const int16_t *weights = axis->weights + (size_t)i * (size_t)taps;
        size_t offset = (size_t)(axis->first[i] - axis->begin) * PIXEL;
        __m256i sums = half;
        for (int t = 0; t < taps; t += 4, offset += 4 * PIXEL) {
            __m256i pixels = _mm256_inserti128_si256(
                _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(one + offset))),
                _mm_loadu_si128((const __m128i *)(two + offset)), 1);
            int weight[2];
            memcpy(weight, weights + t, sizeof weight);
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, pair),
                                                            _mm256_set1_epi32(weight[0])));
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, next),
                                                            _mm256_set1_epi32(weight[1])));
        }
        sums = _mm256_srai_epi32(sums, BITS);
        sums = _mm256_packs_epi32(sums, sums);
        sums = _mm256_packus_epi16(sums, sums);
        int rgbx[2] = {_mm256_extract_epi32(sums, 0), _mm256_extract_epi32(sums, 4)};
        /* Of the fourth byte the next pixel takes the place. */
        size_t length = x + 1 < axis->size ? 4 : 3;
        memcpy(out_one + 3 * x, rgbx, length);
        memcpy(out_two + 3 * x, rgbx + 1, length);
    }
}

__attribute__((target("avx2"))) static size_t columns_avx2(const Axis *axis, const uint8_t *input,
                                                           size_t length, uint8_t *out) {
    const __m256i half = _mm256_set1_epi32(HALF);
    int rows = axis->end - axis->begin;
    size_t whole = length / 16 * 16;
    for (int y = 0; y < axis->size; y++, out += length) {
        const int16_t *weights = axis->weights + (size_t)y * (size_t)axis->taps;
        int first = axis->first[y] - axis->begin;
        int taps = rows - first < axis->taps ? rows - first : axis->taps;
        const uint8_t *top = input + (size_t)first * length;
        for (size_t x = 0; x < whole; x += 16) {
            __m256i low = half, high = half;
            for (int t = 0; t < taps; t += 2) {
                const uint8_t *above = top + (size_t)t * length + x;
                const uint8_t *below = t + 1 < taps ? above + length : above;
                __m128i a = _mm_loadu_si128((const __m128i *)above);
                __m128i b = _mm_loadu_si128((const __m128i *)below);
                int weight;
                memcpy(&weight, weights + t, sizeof weight);
                __m256i both = _mm256_set1_epi32(weight);
                low = _mm256_add_epi32(
                    low, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b)), both));
                high = _mm256_add_epi32(
                    high, _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b)), both));
            }
            __m256i words =
                _mm256_packs_epi32(_mm256_srai_epi32(low, BITS), _mm256_srai_epi32(high, BITS));
            words = _mm256_permute4x64_epi64(words, 0xD8);
            __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words),
                                             _mm256_extracti128_si256(words, 1));
            _mm_storeu_si128((__m128i *)(out + x), bytes);
        }
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
    if (has_avx2())
        for (; row < rows; row += 2) {
            int other = row + 1 < rows ? row + 1 : row;
            rows_avx2(axis, inputs[row], inputs[other], out + (size_t)row * stride,
                      out + (size_t)other * stride, flip);
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
