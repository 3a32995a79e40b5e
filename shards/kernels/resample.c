/* Bilinear or bicubic resize of a uint8 image to a square, one of its eight symmetries, and the drop of a fourth channel,
 * in one pass over the pixels: what OpenCV does in three (resize, flip or rotate, convert), within 1 of its bilinear
 * values. For its bicubic ones it has other weights (shards/engines/resample.py says why).
 *
 * A row of the result is mixed of two source rows, or four, to 16 bits (6 of them fraction), then of pairs of its columns
 * to 32 bits, and rounded once. AVX2 and AVX-512 compute the same integers; with neither, OpenCV is faster than plain C
 * would be.
 */
#include "kernels.h"

#include <string.h>

#ifdef X86
#include <immintrin.h>

#define FRACTION 6        /* bits below 1 in the mixed row */
#define WEIGHT_BITS 14    /* of the weights of columns */
#define SHIFT (FRACTION + WEIGHT_BITS)
#define SLACK 64          /* elements that may be read or written beyond a buffer's end, or before a mixed row */
#define GROUP 8           /* columns of the result that AVX2 makes at once */
#define BLOCK 16          /* values of the result that AVX-512 makes at once, out of 2 * REACH values of the mixed row */
#define REACH 32

/* What a result's columns are mixed of; the same for all rows of an image. */
struct columns {
    int32_t count, blocks;     /* columns, a multiple of GROUP; blocks of 4 values a column */
    int16_t *weights;          /* AVX2: 8 a column */
    int16_t *outer_weights;    /* AVX2, bicubic: of the second pair of pixels, 8 a column */
    int32_t *offsets;          /* AVX2: of the leftmost pixel in the mixed row, a column */
    int16_t *block_weights;    /* AVX-512: a pair for each value */
    int16_t *block_outer;      /* AVX-512, bicubic: the same of the second pair of pixels */
    uint16_t *block_picks;     /* AVX-512: a pair for each value, counted from its block's start */
    int32_t *block_starts;     /* AVX-512 */
    uint8_t *rows;             /* four finished rows, `row_bytes` each */
    int64_t row_bytes;
    int16_t *mixed[2];
};

/* Lay the tables out in memory that starts at a multiple of 64. Returns the bytes that they take. */
static int64_t lay_out(struct columns *to, int64_t start, int32_t width, int32_t side)
{
    to->count = (side + GROUP - 1) / GROUP * GROUP;
    to->blocks = (to->count * 4 + BLOCK - 1) / BLOCK;
    to->row_bytes = (int64_t)to->count * 4 + SLACK;
    int64_t at = start;
#define TAKE(field, bytes) (to->field = (void *)(intptr_t)at, at += ((int64_t)(bytes) + 63) / 64 * 64)
    TAKE(weights, to->count * 16);
    TAKE(outer_weights, to->count * 16);
    TAKE(offsets, to->count * 4);
    TAKE(block_weights, to->blocks * BLOCK * 4);
    TAKE(block_outer, to->blocks * BLOCK * 4);
    TAKE(block_picks, to->blocks * BLOCK * 4);
    TAKE(block_starts, to->blocks * 4);
    TAKE(rows, to->row_bytes * 4);
    TAKE(mixed[0], ((int64_t)width * 4 + 2 * SLACK) * 2);
    TAKE(mixed[1], ((int64_t)width * 4 + 2 * SLACK) * 2);
#undef TAKE
    to->mixed[0] += SLACK;
    to->mixed[1] += SLACK;
    return at - start;
}

/* Bytes of scratch memory that `dermscale_resample` needs. */
int64_t dermscale_scratch_bytes(int32_t width, int32_t side)
{
    struct columns columns;
    return lay_out(&columns, 0, width, side) + 64;
}

/* The source line that a line of the result lies behind, and the weight of the next one in 1 / 2^bits, rounded: its
 * place is ((2 line + 1) size / side - 1) / 2. 0 at both edges. Integers, so that every machine computes the same. */
static void place(int32_t line, int32_t size, int32_t side, int bits, int32_t *low, int32_t *weight)
{
    const int32_t at = (2 * line + 1) * size - side, unit = 2 * side; /* sizes below 65,536, sides up to 4,096 */
    *low = at < 0 ? 0 : (int32_t)((uint32_t)at / (uint32_t)unit);
    *weight = 0;
    if (at >= 0 && *low < size - 1)
        *weight = (int32_t)((((uint32_t)(at - *low * unit) << bits) + (uint32_t)side) / (uint32_t)unit);
}

/* The first of the four source lines that a line of the result is mixed of, from -2 up to size - 2, and their weights in
 * 1 / 2^WEIGHT_BITS: those of cubic convolution with a = -1/2 (Keys 1981), t behind the second line. They are bilinear
 * weights and a correction: with p = t (1 - t), outer weights -p (1 - t) / 2 and -p t / 2. Their sum is exactly 1. */
static void place_cubic(int32_t line, int32_t size, int32_t side, int32_t *first, int32_t *weights)
{
    const int32_t unit = 2 * side, at = (2 * line + 1) * size + side; /* one line further, so that it is not negative */
    const int32_t second = at / unit, rest = at - second * unit;
    const int32_t t = (int32_t)((((uint32_t)rest << WEIGHT_BITS) + (uint32_t)side) / (uint32_t)unit);
    const int32_t u = (1 << WEIGHT_BITS) - t, p = (t * u + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS;
    const int32_t before = (p * u + (1 << WEIGHT_BITS)) >> (WEIGHT_BITS + 1);
    const int32_t after = (p * t + (1 << WEIGHT_BITS)) >> (WEIGHT_BITS + 1);
    *first = second - 2;
    weights[0] = -before;
    weights[1] = u + 2 * before - after;
    weights[2] = t + 2 * after - before;
    weights[3] = -after;
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

__attribute__((target("avx512f,avx512bw"))) static void mix_rows_512(const uint8_t *upper, const uint8_t *lower,
                                                                     int32_t weight, int64_t count, int16_t *mixed)
{
    const __m512i share = _mm512_set1_epi16((int16_t)weight);
    for (int64_t i = 0; i < count; i += 32) {
        __m256i near, far;
        if (count - i >= 32) {
            near = _mm256_loadu_si256((const __m256i *)(upper + i));
            far = _mm256_loadu_si256((const __m256i *)(lower + i));
        } else { /* nothing beyond the row may be read; what is written beyond is zero and slack */
            const __mmask64 part = (1ull << (count - i)) - 1;
            near = _mm512_castsi512_si256(_mm512_maskz_loadu_epi8(part, upper + i));
            far = _mm512_castsi512_si256(_mm512_maskz_loadu_epi8(part, lower + i));
        }
        __m512i a = _mm512_cvtepu8_epi16(near), b = _mm512_cvtepu8_epi16(far);
        __m512i step = _mm512_slli_epi16(_mm512_sub_epi16(b, a), FRACTION);
        __m512i sum = _mm512_add_epi16(_mm512_slli_epi16(a, FRACTION), _mm512_mulhrs_epi16(step, share));
        _mm512_storeu_si512((void *)(mixed + i), sum);
    }
}

/* Four source rows with these weights. count: values in a row. */
__attribute__((target("avx2"))) static void mix_four_rows(const uint8_t *const *rows, const int32_t *weights,
                                                          int64_t count, int16_t *mixed)
{
    const int shift = WEIGHT_BITS - FRACTION;
    const __m256i inner = _mm256_set1_epi32(weights[1] << 16 | (weights[0] & 0xffff));
    const __m256i outer = _mm256_set1_epi32((int32_t)((uint32_t)weights[3] << 16) | weights[2]);
    const __m256i half = _mm256_set1_epi32(1 << (shift - 1));
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m128i a = _mm_loadu_si128((const __m128i *)(rows[0] + i)), b = _mm_loadu_si128((const __m128i *)(rows[1] + i));
        __m128i c = _mm_loadu_si128((const __m128i *)(rows[2] + i)), d = _mm_loadu_si128((const __m128i *)(rows[3] + i));
#define SUM(unpack)                                                                                                  \
    _mm256_srai_epi32(                                                                                               \
        _mm256_add_epi32(_mm256_add_epi32(_mm256_madd_epi16(_mm256_cvtepu8_epi16(unpack(a, b)), inner),              \
                                          _mm256_madd_epi16(_mm256_cvtepu8_epi16(unpack(c, d)), outer)),             \
                         half),                                                                                      \
        shift)
        __m256i sums = _mm256_packs_epi32(SUM(_mm_unpacklo_epi8), SUM(_mm_unpackhi_epi8)); /* 0 2 | 1 3, of four each */
#undef SUM
        _mm256_storeu_si256((__m256i *)(mixed + i), _mm256_permute4x64_epi64(sums, 0xd8));
    }
    for (; i < count; i++) {
        int32_t sum = 1 << (shift - 1);
        for (int k = 0; k < 4; k++)
            sum += rows[k][i] * weights[k];
        mixed[i] = (int16_t)(sum >> shift);
    }
}

#define TWO(k, from)                                                                                                \
    _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)((from) + offset[k]))),         \
                            _mm_loadu_si128((const __m128i *)((from) + offset[k + 4])), 1)
#define PAIRS(k, from, weights)                                                                                     \
    _mm256_madd_epi16(_mm256_shuffle_epi8(TWO(k, from), pairs),                                                     \
                      _mm256_loadu_si256((const __m256i *)((weights) + (k) * 16)))
#define MIXED(k)                                                                                                    \
    _mm256_srai_epi32(_mm256_add_epi32(cubic ? _mm256_add_epi32(PAIRS(k, mixed, weight),                            \
                                                                PAIRS(k, mixed + 2 * channels, outer))              \
                                             : PAIRS(k, mixed, weight),                                             \
                                       half),                                                                       \
                      SHIFT)

/* One row of the result from the mixed row. pixel_bytes: 3, or 4 with the fourth byte 0. cubic: a constant. */
__attribute__((target("avx2"), always_inline)) static inline void
mix_columns_by(const struct columns *of, const int16_t *mixed, int32_t channels, int32_t side, int32_t pixel_bytes,
               uint8_t *row, const int cubic)
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
    for (int32_t j = 0; j < of->count; j += GROUP) {
        const int32_t *offset = of->offsets + j;
        const int16_t *weight = of->weights + j * 8, *outer = of->outer_weights + j * 8;
        __m256i first = _mm256_packs_epi32(MIXED(0), MIXED(1));  /* 0 1 | 4 5 */
        __m256i second = _mm256_packs_epi32(MIXED(2), MIXED(3)); /* 2 3 | 6 7 */
        __m256i pixels = _mm256_packus_epi16(first, second);     /* 0 1 2 3 | 4 5 6 7 */
        if (pixel_bytes == 4) {
            _mm256_storeu_si256((__m256i *)(row + j * 4), pixels);
            continue;
        }
        pixels = _mm256_shuffle_epi8(pixels, dense);
        uint8_t end[GROUP * 4]; /* nothing beyond the row may be written */
        uint8_t *to = j + 2 * GROUP <= side ? row + j * 3 : end;
        _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(pixels));
        _mm_storeu_si128((__m128i *)(to + 12), _mm256_extracti128_si256(pixels, 1));
        if (to == end)
            memcpy(row + j * 3, end, (size_t)(side - j < GROUP ? side - j : GROUP) * 3);
    }
}

__attribute__((target("avx2"))) static void mix_columns(const struct columns *of, const int16_t *mixed, int32_t channels,
                                                        int32_t side, int32_t pixel_bytes, uint8_t *row, int cubic)
{
    if (cubic)
        mix_columns_by(of, mixed, channels, side, pixel_bytes, row, 1);
    else
        mix_columns_by(of, mixed, channels, side, pixel_bytes, row, 0);
}

/* The same out of 2 * REACH values around each block of the result: `far` where REACH are not enough. */
__attribute__((target("avx512f,avx512bw"), always_inline)) static inline void
mix_columns_512_by(const struct columns *of, const int16_t *mixed, int far, int32_t channels, int32_t bytes,
                   uint8_t *row, const int cubic)
{
    const __m512i half = _mm512_set1_epi32(1 << (SHIFT - 1)), outwards = _mm512_set1_epi16((int16_t)(2 * channels));
    for (int32_t k = 0; k * BLOCK < bytes; k++) {
        const int16_t *from = mixed + of->block_starts[k];
        __m512i picks = _mm512_load_si512((const void *)(of->block_picks + k * BLOCK * 2));
        __m512i weights = _mm512_load_si512((const void *)(of->block_weights + k * BLOCK * 2));
        __m512i near = _mm512_loadu_si512((const void *)from);
#define PICKED(places)                                                                                          \
    (far ? _mm512_permutex2var_epi16(near, places, _mm512_loadu_si512((const void *)(from + REACH)))            \
         : _mm512_permutexvar_epi16(places, near))
        __m512i sums = _mm512_add_epi32(_mm512_madd_epi16(PICKED(picks), weights), half);
        if (cubic) { /* it may be below 0 or above 255 */
            weights = _mm512_load_si512((const void *)(of->block_outer + k * BLOCK * 2));
            picks = _mm512_add_epi16(picks, outwards);
            sums = _mm512_add_epi32(sums, _mm512_madd_epi16(PICKED(picks), weights));
            sums = _mm512_max_epi32(_mm512_srai_epi32(sums, SHIFT), _mm512_setzero_si512());
            sums = _mm512_min_epi32(sums, _mm512_set1_epi32(255));
        } else {
            sums = _mm512_srli_epi32(sums, SHIFT);
        }
#undef PICKED
        const int32_t left = bytes - k * BLOCK; /* nothing beyond the row may be written */
        if (left >= BLOCK) {
            _mm_storeu_si128((__m128i *)(row + k * BLOCK), _mm512_cvtepi32_epi8(sums));
        } else {
            uint8_t end[BLOCK];
            _mm_storeu_si128((__m128i *)end, _mm512_cvtepi32_epi8(sums));
            memcpy(row + k * BLOCK, end, (size_t)left);
        }
    }
}

__attribute__((target("avx512f,avx512bw"))) static void mix_columns_512(const struct columns *of, const int16_t *mixed, int far,
                                                                        int32_t channels, int32_t bytes, uint8_t *row,
                                                                        int cubic)
{
    if (cubic)
        mix_columns_512_by(of, mixed, far, channels, bytes, row, 1);
    else
        mix_columns_512_by(of, mixed, far, channels, bytes, row, 0);
}

/* Fill the tables of AVX-512. Returns how many values of the mixed row the widest block needs. */
static int32_t place_blocks(struct columns *of, int32_t side, int32_t channels, int32_t pixel_bytes, int cubic)
{
    const int32_t taken = (cubic ? 4 : 2) * channels;

    int32_t widest = 0;
    for (int32_t k = 0; k * BLOCK < side * pixel_bytes; k++) {
        int32_t first = k * BLOCK / pixel_bytes, last = (k * BLOCK + BLOCK - 1) / pixel_bytes;
        if (last >= side)
            last = side - 1;
        /* Places go up or, where the image is mirrored, down. */
        int32_t low = of->offsets[first], high = of->offsets[last];
        if (low > high) {
            low = of->offsets[last];
            high = of->offsets[first];
        }
        of->block_starts[k] = low;
        if (high + taken - low > widest)
            widest = high + taken - low;
    }
    for (int32_t column = 0, v = 0; column < side; column++) {
        const int32_t at = ((column & ~7) + (column & 3) * 2 + ((column >> 2) & 1)) * 8;
        const int16_t *weight = of->weights + at, *outer = of->outer_weights + at;
        for (int32_t c = 0; c < pixel_bytes; c++, v++) {
            /* The fourth value of a pixel is zero: any two values, with no weight. */
            const uint16_t pick = (uint16_t)(of->offsets[column] - of->block_starts[v / BLOCK] + (c < 3 ? c : 0));
            of->block_picks[2 * v] = pick;
            of->block_picks[2 * v + 1] = (uint16_t)(pick + channels);
            of->block_weights[2 * v] = c < 3 ? weight[0] : 0;
            of->block_weights[2 * v + 1] = c < 3 ? weight[1] : 0;
            if (cubic) {
                of->block_outer[2 * v] = c < 3 ? outer[0] : 0;
                of->block_outer[2 * v + 1] = c < 3 ? outer[1] : 0;
            }
        }
    }
    return widest;
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

/* What this processor can run: 0, AVX2 or AVX512. */
int32_t dermscale_resample_level(void)
{
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx2"))
        return AVX512;
    return __builtin_cpu_supports("avx2") ? AVX2 : 0;
}

/* source: (height, width, channels) uint8, rows `stride` bytes apart, channels 3, or 4 of which the last is dropped.
 * out: (side, side, 3) uint8. cubic: 0 for bilinear. symmetry: bit 4 transposes, then 1 mirrors columns and 2 mirrors
 * rows. scratch: dermscale_scratch_bytes(width, side). level: AVX2 or AVX512. */
void dermscale_resample(const uint8_t *source, int64_t stride, int32_t height, int32_t width, int32_t channels,
                        int32_t side, int32_t cubic, int32_t symmetry, uint8_t *out, uint8_t *scratch, int32_t level)
{
    const int32_t turned = symmetry & 4, mirror_columns = symmetry & 1, mirror_rows = symmetry & 2;
    /* A transposed image's columns are rows here: what mirrors them then mirrors the other axis before. */
    const int32_t backwards = turned ? mirror_rows : mirror_columns;
    const int32_t upwards = turned ? mirror_columns : mirror_rows;
    const int32_t pixel_bytes = turned ? 4 : 3;
    const int64_t count = (int64_t)width * channels;
    struct columns to;
    lay_out(&to, ((intptr_t)scratch + 63) & ~(intptr_t)63, width, side);

    for (int32_t j = 0; j < to.count; j++) {
        int32_t low = 0, second = 0, four[4] = {0};
        const int32_t column = backwards ? side - 1 - j : j, at = ((j & ~7) + (j & 3) * 2 + ((j >> 2) & 1)) * 8;
        if (j < side && cubic) {
            place_cubic(column, width, side, &low, four);
        } else if (j < side) {
            place(column, width, side, WEIGHT_BITS, &low, &second);
            four[0] = (1 << WEIGHT_BITS) - second;
            four[1] = second;
        }
        to.offsets[j] = low * channels;
        for (int32_t k = at; k < at + 8; k += 2) {
            to.weights[k] = (int16_t)four[0];
            to.weights[k + 1] = (int16_t)four[1];
        }
        for (int32_t k = at; cubic && k < at + 8; k += 2) {
            to.outer_weights[k] = (int16_t)four[2];
            to.outer_weights[k + 1] = (int16_t)four[3];
        }
    }
    for (int k = 0; k < 2; k++) /* the pixel beyond the last one: read with weight 0 */
        memset(to.mixed[k] + count, 0, SLACK * sizeof(int16_t));
    const int32_t reach = level == AVX512 ? place_blocks(&to, side, channels, pixel_bytes, cubic) : 0;

    for (int32_t next = 0; next <= side; next++) {
        /* Rows are mixed one ahead: what has just been written cannot be read at other places without a stall. */
        if (next < side && cubic) {
            int16_t *const mixed = to.mixed[next & 1];
            const uint8_t *rows[4];
            int32_t first, weights[4];
            place_cubic(next, height, side, &first, weights);
            for (int32_t k = 0; k < 4; k++)
                rows[k] = source + (first + k < 0 ? 0 : first + k < height ? first + k : height - 1) * stride;
            mix_four_rows(rows, weights, count, mixed);
            for (int64_t k = 0; k < 2 * channels; k++) { /* beyond its ends, the pixels at its ends */
                mixed[k - 2 * channels] = mixed[k % channels];
                mixed[count + k] = mixed[count - channels + k % channels];
            }
        } else if (next < side) {
            int32_t low, weight;
            place(next, height, side, 15, &low, &weight);
            const uint8_t *upper = source + low * stride, *lower = low + 1 < height ? upper + stride : upper;
            if (weight > 32767)
                weight = 32767;
            (level == AVX512 ? mix_rows_512 : mix_rows)(upper, lower, weight, count, to.mixed[next & 1]);
        }
        if (next == 0)
            continue;
        const int32_t i = next - 1;
        const int16_t *mixed = to.mixed[i & 1];
        /* Rows of a transposed image wait until there are four: they become four columns. */
        const int32_t group = i & 3, waiting = i - group, filled = side - waiting < 4 ? side - waiting : 4;
        uint8_t *row = turned ? to.rows + (upwards ? filled - 1 - group : group) * to.row_bytes
                              : out + (int64_t)(upwards ? side - 1 - i : i) * side * 3;
        if (level == AVX512 && reach <= 2 * REACH)
            mix_columns_512(&to, mixed, reach > REACH, channels, side * pixel_bytes, row, cubic);
        else
            mix_columns(&to, mixed, channels, side, pixel_bytes, row, cubic);
        if (turned && group == filled - 1)
            turn(to.rows, to.row_bytes, filled, side, out + (int64_t)(upwards ? side - waiting - filled : waiting) * 3);
    }
}

#else
int32_t dermscale_resample_level(void)
{
    return 0;
}
#endif
