/* Bilinear resize of a uint8 image to a square, one of its eight symmetries, and the drop of a fourth channel, in one
 * pass over the pixels: what OpenCV does in three (resize, flip or rotate, convert), within 1 of its values.
 *
 * A row of the result is mixed of two source rows to 16 bits (6 of them fraction), then of pairs of its columns to
 * 32 bits, and rounded once. Needs AVX2, which the caller asks for first; where there is none, OpenCV is faster than
 * plain C would be. Called without Python's lock (ctypes lets go of it): nothing here may touch a Python object.
 */
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define FRACTION 6        /* bits below 1 in the mixed row */
#define WEIGHT_BITS 14    /* of the weights of columns */
#define SHIFT (FRACTION + WEIGHT_BITS)
#define SLACK 32          /* elements that may be read or written beyond a buffer's end */
#define GROUP 8           /* columns of the result made at once */

/* Bytes of scratch memory that `dermscale_resample` needs; a multiple of 64. */
int64_t dermscale_scratch_bytes(int32_t width, int32_t side)
{
    int64_t columns = (side + GROUP - 1) / GROUP * GROUP;
    int64_t bytes = columns * 4                    /* offsets */
                    + columns * 16                 /* weights */
                    + ((int64_t)width * 4 + SLACK) * 2 /* the mixed row */
                    + (columns * 4 + SLACK) * 4;   /* four finished rows */
    return (bytes + 63 + 64) / 64 * 64;
}

/* The source line that a line of the result lies behind, and the weight of the next one in 1 / 2^bits, rounded: its
 * place is ((2 line + 1) size / side - 1) / 2. 0 at both edges. Integers, so that every machine computes the same. */
static void place(int64_t line, int64_t size, int64_t side, int bits, int32_t *low, int32_t *weight)
{
    const int64_t at = (2 * line + 1) * size - side, unit = 2 * side;
    *low = at < 0 ? 0 : (int32_t)(at / unit);
    *weight = 0;
    if (at >= 0 && *low < size - 1)
        *weight = (int32_t)((((at - *low * unit) << bits) + side) / unit);
}

/* Two source rows in proportion (32768 - weight) : weight. count: values in a row. */
__attribute__((target("avx2"))) static void mix_rows(const uint8_t *upper, const uint8_t *lower, int32_t weight,
                                                     int64_t count, int16_t *mixed)
{
    const __m256i share = _mm256_set1_epi16((int16_t)weight);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(upper + i)));
        __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(lower + i)));
        __m256i step = _mm256_slli_epi16(_mm256_sub_epi16(b, a), FRACTION);
        __m256i sum = _mm256_add_epi16(_mm256_slli_epi16(a, FRACTION), _mm256_mulhrs_epi16(step, share));
        _mm256_storeu_si256((__m256i *)(mixed + i), sum);
    }
    for (; i < count; i++) {
        int32_t step = (lower[i] - upper[i]) * (1 << FRACTION);
        mixed[i] = (int16_t)(upper[i] * (1 << FRACTION) + ((step * weight + 0x4000) >> 15));
    }
}

#define TWO(k)                                                                                                      \
    _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(mixed + offset[k]))),          \
                            _mm_loadu_si128((const __m128i *)(mixed + offset[k + 4])), 1)
#define MIXED(k)                                                                                                    \
    _mm256_srai_epi32(_mm256_add_epi32(_mm256_madd_epi16(_mm256_shuffle_epi8(TWO(k), pairs),                        \
                                                         _mm256_loadu_si256((const __m256i *)(weight + (k) * 16))), \
                                       half),                                                                       \
                      SHIFT)

/* One row of the result from a mixed row. pixel_bytes: 3, or 4 with the fourth byte 0. */
__attribute__((target("avx2"))) static void mix_columns(const int16_t *mixed, const int32_t *offsets,
                                                        const int16_t *weights, int32_t columns, int32_t channels,
                                                        int32_t pixel_bytes, uint8_t *row)
{
    /* Of two neighbouring pixels: each channel's two values next to each other, and zeros for the fourth channel. */
    const __m256i pairs =
        channels == 4 ? _mm256_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, -1, -1, -1, -1, 0, 1, 8, 9, 2, 3, 10,
                                         11, 4, 5, 12, 13, -1, -1, -1, -1)
                      : _mm256_setr_epi8(0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, -1, -1, -1, -1, 0, 1, 6, 7, 2, 3, 8, 9,
                                         4, 5, 10, 11, -1, -1, -1, -1);
    const __m256i dense = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1, 0, 1, 2, 4, 5, 6, 8,
                                           9, 10, 12, 13, 14, -1, -1, -1, -1);
    const __m256i half = _mm256_set1_epi32(1 << (SHIFT - 1));
    for (int32_t j = 0; j < columns; j += GROUP) {
        const int32_t *offset = offsets + j;
        const int16_t *weight = weights + j * 8;
        __m256i first = _mm256_packs_epi32(MIXED(0), MIXED(1));  /* 0 1 | 4 5 */
        __m256i second = _mm256_packs_epi32(MIXED(2), MIXED(3)); /* 2 3 | 6 7 */
        __m256i pixels = _mm256_packus_epi16(first, second);     /* 0 1 2 3 | 4 5 6 7 */
        if (pixel_bytes == 4) {
            _mm256_storeu_si256((__m256i *)(row + j * 4), pixels);
        } else {
            pixels = _mm256_shuffle_epi8(pixels, dense);
            _mm_storeu_si128((__m128i *)(row + j * 3), _mm256_castsi256_si128(pixels));
            _mm_storeu_si128((__m128i *)(row + j * 3 + 12), _mm256_extracti128_si256(pixels, 1));
        }
    }
}

/* Write up to four rows of 4-byte pixels as neighbouring columns of 3-byte ones, from the first pixel of `out` on. */
__attribute__((target("avx2"))) static void turn(const uint8_t *rows, int64_t row_bytes, int32_t count,
                                                 int32_t side, uint8_t *out)
{
    const __m128i dense = _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
    const int64_t stride = (int64_t)side * 3;
    int32_t j = 0;
    for (; count == 4 && j + 4 <= side; j += 4) {
        __m128i a = _mm_loadu_si128((const __m128i *)(rows + j * 4));
        __m128i b = _mm_loadu_si128((const __m128i *)(rows + row_bytes + j * 4));
        __m128i c = _mm_loadu_si128((const __m128i *)(rows + 2 * row_bytes + j * 4));
        __m128i d = _mm_loadu_si128((const __m128i *)(rows + 3 * row_bytes + j * 4));
        __m128i ab0 = _mm_unpacklo_epi32(a, b), ab1 = _mm_unpackhi_epi32(a, b);
        __m128i cd0 = _mm_unpacklo_epi32(c, d), cd1 = _mm_unpackhi_epi32(c, d);
        __m128i column[4] = {_mm_unpacklo_epi64(ab0, cd0), _mm_unpackhi_epi64(ab0, cd0), _mm_unpacklo_epi64(ab1, cd1),
                             _mm_unpackhi_epi64(ab1, cd1)};
        for (int32_t k = 0; k < 4; k++) {
            __m128i pixels = _mm_shuffle_epi8(column[k], dense);
            uint8_t *target = out + (j + k) * stride;
            int32_t last = _mm_extract_epi32(pixels, 2);
            _mm_storel_epi64((__m128i *)target, pixels);
            memcpy(target + 8, &last, 4);
        }
    }
    for (; j < side; j++)
        for (int32_t k = 0; k < count; k++)
            memcpy(out + j * stride + k * 3, rows + k * row_bytes + j * 4, 3);
}

/* Whether this processor can run `dermscale_resample`. */
int32_t dermscale_can_resample(void)
{
    return __builtin_cpu_supports("avx2");
}

/* source: (height, width, channels) uint8, rows `stride` bytes apart, channels 3, or 4 of which the last is dropped.
 * out: (side, side, 3) uint8. symmetry: bit 4 transposes, then 1 mirrors columns and 2 mirrors rows. scratch:
 * dermscale_scratch_bytes(width, side). */
void dermscale_resample(const uint8_t *source, int64_t stride, int32_t height, int32_t width, int32_t channels,
                        int32_t side, int32_t symmetry, uint8_t *out, uint8_t *scratch)
{
    const int32_t columns = (side + GROUP - 1) / GROUP * GROUP;
    const int32_t turned = symmetry & 4, mirror_columns = symmetry & 1, mirror_rows = symmetry & 2;
    /* A transposed image's columns are rows here: what mirrors them then mirrors the other axis before. */
    const int32_t backwards = turned ? mirror_rows : mirror_columns;
    const int32_t upwards = turned ? mirror_columns : mirror_rows;
    uint8_t *start = (uint8_t *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
    int16_t *weights = (int16_t *)start;
    int32_t *offsets = (int32_t *)(start + (int64_t)columns * 16);
    uint8_t *rows = (uint8_t *)(offsets + columns);
    int16_t *mixed = (int16_t *)(rows + ((int64_t)columns * 4 + SLACK) * 4);
    const int64_t row_bytes = (int64_t)columns * 4 + SLACK, count = (int64_t)width * channels;

    for (int32_t j = 0; j < columns; j++) {
        int32_t low = 0, second = 0;
        if (j < side)
            place(backwards ? side - 1 - j : j, width, side, WEIGHT_BITS, &low, &second);
        int16_t *weight = weights + ((j & ~7) + (j & 3) * 2 + ((j >> 2) & 1)) * 8;
        offsets[j] = low * channels;
        for (int32_t k = 0; k < 8; k += 2) {
            weight[k] = (int16_t)((1 << WEIGHT_BITS) - second);
            weight[k + 1] = (int16_t)second;
        }
    }
    memset(mixed + count, 0, SLACK * sizeof(int16_t)); /* the pixel beyond the last one: read with weight 0 */

    for (int32_t i = 0; i < side; i++) {
        int32_t low, weight;
        place(i, height, side, 15, &low, &weight);
        const uint8_t *upper = source + low * stride, *lower = low + 1 < height ? upper + stride : upper;
        if (weight > 32767)
            weight = 32767;
        /* Rows of a transposed image wait until there are four: they become four columns. */
        const int32_t group = i & 3, waiting = i - group, filled = side - waiting < 4 ? side - waiting : 4;
        uint8_t *row = turned ? rows + (upwards ? filled - 1 - group : group) * row_bytes : rows;
        mix_rows(upper, lower, weight, count, mixed);
        mix_columns(mixed, offsets, weights, columns, channels, turned ? 4 : 3, row);
        if (!turned) {
            memcpy(out + (int64_t)(upwards ? side - 1 - i : i) * side * 3, row, (size_t)side * 3);
        } else if (group == filled - 1) {
            turn(rows, row_bytes, filled, side, out + (int64_t)(upwards ? side - waiting - filled : waiting) * 3);
        }
    }
}

#else
int32_t dermscale_can_resample(void)
{
    return 0;
}
#endif
