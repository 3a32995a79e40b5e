/* From the coefficients of a JPEG's blocks to its pixels: inverse DCT, chroma upsampling, YCbCr to RGB.
 *
 * All of it is fixed integer arithmetic. So every version here gives the pixels of libjpeg-turbo's accurate decoder:
 *
 * - The inverse DCT of Loeffler, Ligtenberg and Moschytz (ICASSP 1989) with constants of 13 bits: first columns,
 *   rounded to 2 bits below 1; then rows, rounded to integers. Between the two roundings the sums are exact, so any
 *   order of evaluation gives the same integers. Here each output is a sum of products with the eight inputs.
 * - Chroma of half the width or height by a triangle filter: 3/4 of the nearest sample and 1/4 of the next nearest,
 *   along rows and columns; the rounding alternates between neighbouring pixels.
 * - JFIF's YCbCr to RGB, with constants of 16 bits, rounded once.
 */
#include "jpeg_pixels.h"

#include <string.h>

/* 8192 times sqrt(2) cos(k pi / 16), as sums of the method's rounded constants. EVENj_k: what input k adds to output j.
 * ODDj: what the inputs 1, 3, 5 and 7 add to output j; the same is subtracted from output 7 - j. */
#define ONE 8192
#define EVEN0_2 10703
#define EVEN0_6 4433
#define EVEN1_2 4433
#define EVEN1_6 (-10704)
#define ODD0 11363, 9633, 6437, 2260
#define ODD1 9633, -2259, -11362, -6436
#define ODD2 6437, -11362, 2261, 9633
#define ODD3 2260, -6436, 9633, -11363
#define FEW 10 /* coefficients in zigzag order: all in the first 4 rows and columns */
#define COLUMN_SHIFT 11
#define ROW_SHIFT 18
/* Files are taken if all samples, less 128, are -512 … 511. Beyond that some implementations saturate and others wrap.
 * Within it, no value between the two transforms is beyond 16,399 (a row of eight values has 11.3 times the length of
 * its samples). So implementations that add two of them in 16 bits are exact, too. */
#define MOST_SAMPLE 0x200

/* One dimension of the transform: of each column of (8, 8) values, written as a row of `out`. */
static void transform(const int32_t *values, int32_t shift, int32_t *out)
{
    static const int32_t odd[4][4] = {{ODD0}, {ODD1}, {ODD2}, {ODD3}};
    const int32_t half = 1 << (shift - 1);
    int32_t done[ROW][ROW];
    for (int32_t i = 0; i < ROW; i++) { /* compilers make vectors of this */
        const int32_t *const in = values + i;
        const int32_t sum = (in[0] + in[4 * ROW]) * ONE + half, difference = (in[0] - in[4 * ROW]) * ONE + half;
        const int32_t even0 = in[2 * ROW] * EVEN0_2 + in[6 * ROW] * EVEN0_6;
        const int32_t even1 = in[2 * ROW] * EVEN1_2 + in[6 * ROW] * EVEN1_6;
        const int32_t even[4] = {sum + even0, difference + even1, difference - even1, sum - even0};
        for (int32_t j = 0; j < 4; j++) {
            const int32_t *const by = odd[j];
            const int32_t rest = in[ROW] * by[0] + in[3 * ROW] * by[1] + in[5 * ROW] * by[2] + in[7 * ROW] * by[3];
            done[j][i] = (even[j] + rest) >> shift;
            done[7 - j][i] = (even[j] - rest) >> shift;
        }
    }
    for (int32_t i = 0; i < ROW; i++)
        for (int32_t j = 0; j < ROW; j++)
            out[i * ROW + j] = done[j][i];
}

static int32_t inverse_dct_plain(int16_t *coefficients, const int16_t *quantisers, uint8_t *to, int64_t stride)
{
    int32_t block[ROW * ROW], beyond = 0;
    for (int32_t row = 0; row < ROW; row++)
        for (int32_t i = 0; i < ROW; i++) { /* of 16 bits, so that no sum is beyond 32 */
            int16_t *const at = coefficients + row * ROW * LANES + i;
            block[row * ROW + i] = (int16_t)(*at * quantisers[row * ROW * LANES + i]);
            *at = 0;
        }
    transform(block, COLUMN_SHIFT, block);
    for (int32_t i = 0; i < ROW * ROW; i++) /* as vectors have it; what does not fit ends beyond MOST_SAMPLE */
        block[i] = block[i] < INT16_MIN ? INT16_MIN : block[i] > INT16_MAX ? INT16_MAX : block[i];
    transform(block, ROW_SHIFT, block);
    for (int32_t row = 0; row < ROW; row++)
        for (int32_t i = 0; i < ROW; i++) {
            const int32_t value = block[row * ROW + i];
            beyond |= (value + MOST_SAMPLE) & ~(2 * MOST_SAMPLE - 1);
            to[row * stride + i] = (uint8_t)(value < -128 ? 0 : value > 127 ? 255 : value + 128);
        }
    return beyond;
}

/* x: blue and red chroma, less 128. */
static void put_pixel(int32_t luma, int32_t blue, int32_t red, uint8_t *rgb)
{
    const int32_t value[3] = {luma + ((91881 * red + 32768) >> 16),
                              luma + ((-22554 * blue - 46802 * red + 32768) >> 16),
                              luma + ((116130 * blue + 32768) >> 16)};
    for (int32_t c = 0; c < 3; c++)
        rgb[c] = (uint8_t)(value[c] < 0 ? 0 : value[c] > 255 ? 255 : value[c]);
}

/* Each chroma sample becomes two pixels: (3 nearest + next + rounding) >> 4, of sums of two rows. luma: from the row's
 * first pixel on. blue, red: sums, from that pixel's chroma sample on. rounding: of the left and the right pixel. */
static void paired_row_plain(const uint8_t *luma, const int16_t *blue, const int16_t *red, const int16_t *rounding,
                             int32_t count, uint8_t *rgb)
{
    for (int32_t i = 0; i < count; i++) {
        const int32_t c = i >> 1, next = i & 1 ? c + 1 : c - 1;
        put_pixel(luma[i], ((3 * blue[c] + blue[next] + rounding[i & 1]) >> 4) - 128,
                  ((3 * red[c] + red[next] + rounding[i & 1]) >> 4) - 128, rgb + 3 * i);
    }
}

static void single_row_plain(const uint8_t *luma, const uint8_t *blue, const uint8_t *red, int32_t count, uint8_t *rgb)
{
    for (int32_t i = 0; i < count; i++)
        put_pixel(luma[i], blue[i] - 128, red[i] - 128, rgb + 3 * i);
}

/* The rows of a chroma plane nearest and next nearest to an image's row, in proportion 3 : 1. */
static void sum_rows_plain(const uint8_t *near, const uint8_t *far, int32_t count, int16_t *sums)
{
    for (int32_t i = 0; i < count; i++)
        sums[i] = (int16_t)(3 * near[i] + far[i]);
}

#ifdef X86
#include <immintrin.h>

/* The same with vectors, out of one text for both widths: PARTS blocks or PARTS times 16 pixels at a time. */
#define TARGET __attribute__((target("avx2,bmi,bmi2")))
#define NAMED(name) name##_avx2
#define PARTS 2 /* of 16 bytes in a vector */
#define VECTOR __m256i
#define OP(name) _mm256_##name
#define BITS(name) _mm256_##name##_si256
#define PART(vector, k) _mm256_extracti128_si256(vector, k)
#define EACH_PART(DO) DO(0) DO(1)
#define REPEATED(part) _mm256_broadcastsi128_si256(part)
#define WIDENED(bytes) _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(bytes)))
#define ANY_ABOVE(a, b) _mm256_movemask_epi8(_mm256_cmpgt_epi16(a, b))
#include "jpeg_vectors.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx2,bmi,bmi2")))
#define NAMED(name) name##_avx512
#define PARTS 4
#define VECTOR __m512i
#define OP(name) _mm512_##name
#define BITS(name) _mm512_##name##_si512
#define PART(vector, k) _mm512_extracti32x4_epi32(vector, k)
#define EACH_PART(DO) DO(0) DO(1) DO(2) DO(3)
#define REPEATED(part) _mm512_broadcast_i32x4(part)
#define WIDENED(bytes) _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(bytes)))
#define ANY_ABOVE(a, b) (int32_t)_mm512_cmpgt_epi16_mask(a, b)
#include "jpeg_vectors.h"

/* Call the version of a function for the level, if it is one of vectors. */
#define WITH_VECTORS(level, function, ...) \
    ((level) >= AVX512 ? (function##_avx512(__VA_ARGS__), 1) : (level) >= AVX2 ? (function##_avx2(__VA_ARGS__), 1) : 0)
#else
#define WITH_VECTORS(level, function, ...) ((void)(level), 0)
#endif

/* Samples of LANES blocks. coefficients, quantisers: (8, LANES, 8), at a multiple of 64; the former become zeros. used:
 * in zigzag order, the coefficients of the blocks beyond the first `used` are 0. to: the place of each block's first
 * sample. Returns whether a sample is beyond those that images have. */
int32_t dermscale_inverse_dct(int16_t *coefficients, const int16_t *quantisers, int32_t used, uint8_t *const *to,
                              int64_t stride, int32_t level)
{
    int32_t beyond = 0;
    if (WITH_VECTORS(level, inverse_dct, coefficients, quantisers, used, to, stride, &beyond))
        return beyond;
    for (int32_t lane = 0; lane < LANES; lane++)
        beyond |= inverse_dct_plain(coefficients + lane * ROW, quantisers + lane * ROW, to[lane], stride);
    return beyond;
}

/* RGB of `count` pixels of one row of the image, from column x on; x is even where chroma is halved. */
void dermscale_pixel_row(const struct part *part, int32_t row, int32_t x, int32_t count, uint8_t *rgb, int32_t level)
{
    const int32_t last_row = ((part->height + part->down) >> part->down) - 1;
    const int32_t last = ((part->width + part->across) >> part->across) - 1; /* chroma sample of a row */
    const int32_t smooth = last >= 2; /* narrower chroma is repeated instead */
    const int32_t near_row = row >> part->down, top = part->top >> part->down, left = part->left >> part->across;
    const int32_t first = x >> part->across, samples = (count + part->across) >> part->across;
    const uint8_t *luma = part->plane[0] + (row - part->top) * part->stride[0] + (x - part->left);
    const uint8_t *near[2], *far[2];
    int32_t far_row = near_row;
    if (part->down && smooth) {
        far_row = row & 1 ? near_row + 1 : near_row - 1;
        far_row = far_row < 0 ? 0 : far_row > last_row ? last_row : far_row;
    }
    for (int32_t c = 0; c < 2; c++) {
        near[c] = part->plane[1 + c] + (near_row - top) * part->stride[1 + c] + (first - left);
        far[c] = part->plane[1 + c] + (far_row - top) * part->stride[1 + c] + (first - left);
    }
    if (!part->across) {
        if (!WITH_VECTORS(level, single_row, luma, near[0], near[1], count, rgb))
            single_row_plain(luma, near[0], near[1], count, rgb);
        return;
    }
    if (!smooth) {
        for (int32_t i = 0; i < count; i++)
            put_pixel(luma[i], near[0][i >> 1] - 128, near[1][i >> 1] - 128, rgb + 3 * i);
        return;
    }
    /* The sums of 4:2:2 are of one row, hence 4 times its samples. */
    const int16_t both[2] = {8, 7}, one[2] = {4, 8}, *rounding = part->down ? both : one;
    for (int32_t c = 0; c < 2; c++) {
        int16_t *sums = part->sums[c];
        if (!WITH_VECTORS(level, sum_rows, near[c] - 1, far[c] - 1, samples + 2, sums - 1))
            sum_rows_plain(near[c] - 1, far[c] - 1, samples + 2, sums - 1);
        /* Beyond the image's edges its last sample is repeated. */
        if (first == 0)
            sums[-1] = sums[0];
        if (first + samples > last)
            sums[last - first + 1] = sums[last - first];
    }
    if (!WITH_VECTORS(level, paired_row, luma, part->sums[0], part->sums[1], rounding, count, rgb))
        paired_row_plain(luma, part->sums[0], part->sums[1], rounding, count, rgb);
}
