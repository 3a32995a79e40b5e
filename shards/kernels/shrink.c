/* Reduction of a uint8 RGB image to two thirds, 600×450 → 400×300, and the sums of its channels: `area_shrink` and
 * `channel_sums` of shards/encode.py in one pass over the pixels each, value for value. Rows are mixed first, then
 * columns, rounded both times; thirds never lie half way between two values, so no rule of rounding can differ. */
#include "kernels.h"

#include <string.h>

#ifdef X86
#include <immintrin.h>

#define THIRD 21846 /* 65536 / 3, rounded up: sum * THIRD >> 16 is sum / 3, rounded down, for sums below 32,768 */

/* (2 near + far) / 3, rounded, of sixteen values. */
__attribute__((target("avx2"))) static inline __m256i mixed(__m256i near, __m256i far)
{
    const __m256i sum = _mm256_add_epi16(_mm256_add_epi16(near, near), _mm256_add_epi16(far, _mm256_set1_epi16(1)));
    return _mm256_mulhi_epu16(sum, _mm256_set1_epi16(THIRD));
}

__attribute__((target("avx2"))) static inline __m256i sixteen(const uint8_t *at)
{
    return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)at));
}

__attribute__((target("avx2"))) static void mix_rows(const uint8_t *near, const uint8_t *far, int64_t count, uint8_t *out)
{
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m256i low = mixed(sixteen(near + i), sixteen(far + i));
        const __m256i high = mixed(sixteen(near + i + 16), sixteen(far + i + 16));
        const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xD8);
        _mm256_storeu_si256((__m256i *)(out + i), both);
    }
    for (; i < count; i++)
        out[i] = (uint8_t)((2 * near[i] + far[i] + 1) / 3);
}

/* Three pixels become two. row: may be read 16 bytes beyond its `groups` of three pixels. */
__attribute__((target("avx2"))) static void mix_columns(const uint8_t *row, int32_t groups, uint8_t *out)
{
    const __m256i outer = _mm256_setr_epi8(0, -1, 1, -1, 2, -1, 6, -1, 7, -1, 8, -1, -1, -1, -1, -1, 0, -1, 1, -1, 2, -1,
                                           6, -1, 7, -1, 8, -1, -1, -1, -1, -1);
    const __m256i middle = _mm256_setr_epi8(3, -1, 4, -1, 5, -1, 3, -1, 4, -1, 5, -1, -1, -1, -1, -1, 3, -1, 4, -1, 5, -1,
                                            3, -1, 4, -1, 5, -1, -1, -1, -1, -1);
    for (int32_t k = 0; k < groups; k += 2) {
        const __m128i first = _mm_loadu_si128((const __m128i *)(row + (int64_t)k * 9));
        const __m128i second = _mm_loadu_si128((const __m128i *)(row + (int64_t)k * 9 + (k + 1 < groups ? 9 : 0)));
        const __m256i two = _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
        const __m256i sums = mixed(_mm256_shuffle_epi8(two, outer), _mm256_shuffle_epi8(two, middle));
        const __m256i bytes = _mm256_packus_epi16(sums, sums);
        const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
        uint8_t *to = out + (int64_t)k * 6;
        if (k + 2 < groups) { /* two bytes too many, which the next six write over */
            _mm_storel_epi64((__m128i *)to, low);
            _mm_storel_epi64((__m128i *)(to + 6), high);
        } else { /* nothing beyond the row may be written */
            uint8_t end[16];
            _mm_storel_epi64((__m128i *)end, low);
            _mm_storel_epi64((__m128i *)(end + 6), high);
            memcpy(to, end, k + 1 < groups ? 12 : 6);
        }
    }
}

/* source: (height, width, 3) uint8, contiguous, both sides multiples of 3. out: (height * 2 / 3, width * 2 / 3, 3).
 * scratch: width * 3 + 16 bytes. Needs AVX2 (`dermscale_resample_level`). */
void dermscale_two_thirds(const uint8_t *source, int32_t height, int32_t width, uint8_t *out, uint8_t *scratch)
{
    const int64_t count = (int64_t)width * 3, made = count / 3 * 2;
    memset(scratch + count, 0, 16);
    for (int32_t k = 0; k < height / 3; k++) {
        const uint8_t *upper = source + k * 3 * count, *middle = upper + count, *lower = middle + count;
        mix_rows(upper, middle, count, scratch);
        mix_columns(scratch, width / 3, out + 2 * k * made);
        mix_rows(lower, middle, count, scratch);
        mix_columns(scratch, width / 3, out + (2 * k + 1) * made);
    }
}

#define UNFLUSHED 256 /* times that 255 can be added in 16 bits, and 255² in 32 */

/* pixels: (count, 3) uint8. sums: of the three channels, then of their squares. Needs AVX2. */
__attribute__((target("avx2"))) void dermscale_channel_sums(const uint8_t *pixels, int64_t count, int64_t *sums)
{
    const __m256i zero = _mm256_setzero_si256();
    int64_t at = 0, bytes = count * 3;
    memset(sums, 0, 6 * sizeof(int64_t));
    while (bytes - at >= 48) {
        /* 48 bytes are 16 pixels, so a value of a vector is of the same channel every time. */
        __m256i plain[3] = {zero, zero, zero}, low[3] = {zero, zero, zero}, high[3] = {zero, zero, zero};
        for (int32_t turn = 0; turn < UNFLUSHED && bytes - at >= 48; turn++, at += 48)
            for (int32_t k = 0; k < 3; k++) {
                const __m256i values = sixteen(pixels + at + k * 16), squares = _mm256_mullo_epi16(values, values);
                plain[k] = _mm256_add_epi16(plain[k], values);
                low[k] = _mm256_add_epi32(low[k], _mm256_unpacklo_epi16(squares, zero));
                high[k] = _mm256_add_epi32(high[k], _mm256_unpackhi_epi16(squares, zero));
            }
        for (int32_t k = 0; k < 3; k++) {
            uint16_t once[16];
            uint32_t lower[8], upper[8];
            _mm256_storeu_si256((__m256i *)once, plain[k]);
            _mm256_storeu_si256((__m256i *)lower, low[k]);
            _mm256_storeu_si256((__m256i *)upper, high[k]);
            for (int32_t i = 0; i < 16; i++) {
                const int32_t channel = (k * 16 + i) % 3, half = i / 8 * 4 + i % 4; /* unpacking works on halves */
                sums[channel] += once[i];
                sums[3 + channel] += (i % 8 < 4 ? lower : upper)[half];
            }
        }
    }
    for (; at < bytes; at++) {
        sums[at % 3] += pixels[at];
        sums[3 + at % 3] += pixels[at] * pixels[at];
    }
}
#endif
