/* Decodes the codes of LANES bit streams at the same time, for jpeg_decode.c and jpeg_whole.c. It is fast because:
 *
 * - The streams do not depend on each other, so the processor works on one lane while it waits for the look-up of
 *   another.
 * - In a step each lane decodes one code. A lane whose block has ended takes no bits until all four blocks have ended.
 *   So four blocks share one branch that is hard to predict.
 * - One look-up gives a code and the value behind it, where both fit FAST_BITS, and the end of the block if it follows.
 * - The zeros that are stuffed behind FF are removed before decoding, so loading bits needs no test of the bytes.
 *
 * Behind each stream is room for one MCU of the longest codes, so its end is checked once per MCU.
 */
#ifndef DERMSCALE_JPEG_LANES_H
#define DERMSCALE_JPEG_LANES_H
#include <string.h>

#include "jpeg_head.h"

#define SLACK 2369 /* bytes behind a stream that may be read; 6 blocks of 64 codes of 27 bits have 1,296 */
#define STEPS 4    /* AC codes between two loads of bits: at least 57 bits, and a DC code before */

#ifdef X86
#include <immintrin.h>
#define TARGET_BMI2 __attribute__((target("avx2,bmi,bmi2")))
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif
#define EACH(i) _Pragma("GCC unroll 4") for (int i = 0; i < LANES; i++)

/* LANES streams: where their bits are and end, both in bits from `bits` on, and where their pixels go. */
struct group {
    const struct head *heads[LANES];
    const int16_t *quantisers[3];     /* as `head` has them, each lane's own */
    const uint8_t *bits;
    uint32_t at[LANES], end[LANES];
    int32_t last_dc[3][LANES];
    uint8_t *to[3][LANES];
    int64_t stride[3], offset[3][4]; /* offset: of the blocks in an MCU */
};

static INLINE uint64_t big64(const uint8_t *at)
{
    return (uint64_t)at[0] << 56 | (uint64_t)at[1] << 48 | (uint64_t)at[2] << 40 | (uint64_t)at[3] << 32 |
           (uint64_t)at[4] << 24 | (uint64_t)at[5] << 16 | (uint64_t)at[6] << 8 | (uint64_t)at[7];
}

/* Copy the bits of a scan up to a marker or the end of `bytes`, without the zeros stuffed behind FF. taken: the bytes
 * before that. Returns how many were written. */
static inline int64_t copy_bits_plain(const uint8_t *from, int64_t bytes, uint8_t *to, int64_t *taken)
{
    const uint8_t *const start = to;
    int64_t i = 0;
    for (; i < bytes; i++) {
        if (from[i] == 0xFF) {
            if (i + 1 >= bytes || from[i + 1] != 0)
                break;
            *to++ = from[i++];
        } else {
            *to++ = from[i];
        }
    }
    *taken = i;
    return to - start;
}

#ifdef X86
/* The same. readable: bytes that may be read, from `from` on. Up to 32 bytes more are written. */
TARGET_BMI2 static inline int64_t copy_bits_avx2(const uint8_t *from, int64_t bytes, int64_t readable, uint8_t *to,
                                                 int64_t *taken)
{
    const __m256i marks = _mm256_set1_epi8(-1);
    const uint8_t *const start = to, *const first = from;
    while (bytes > 0 && readable >= 32) {
        const __m256i some = _mm256_loadu_si256((const __m256i *)from);
        uint32_t found = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(some, marks));
        int64_t used = bytes < 32 ? bytes : 32, kept = used;
        found = _bzhi_u32(found, (uint32_t)used);
        _mm256_storeu_si256((__m256i *)to, some);
        if (found) {
            kept = __builtin_ctz(found) + 1;
            used = kept + 1;
            if (used > bytes || from[kept] != 0) {
                *taken = from + kept - 1 - first;
                return to + kept - 1 - start;
            }
        }
        to += kept;
        from += used;
        bytes -= used;
        readable -= used;
    }
    const int64_t rest = copy_bits_plain(from, bytes, to, taken);
    *taken += from - first;
    return to - start + rest;
}
#endif

static inline int64_t copy_bits(const uint8_t *from, int64_t bytes, int64_t readable, uint8_t *to, int64_t *taken,
                                int32_t level)
{
#ifdef X86
    if (level >= AVX2)
        return copy_bits_avx2(from, bytes, readable, to, taken);
#endif
    (void)readable;
    (void)level;
    return copy_bits_plain(from, bytes, to, taken);
}

/* Decode `mcus` MCUs of LANES streams to the samples of their blocks, and move the group behind them. same: whether the
 * lanes have the same headers. coefficients: zeros before and after. */
static INLINE int32_t decode_mcus(struct group *group, int32_t same, int32_t mcus, int16_t *coefficients, int32_t level)
{
    const struct head *const head = group->heads[0];
    const uint8_t *const bits = group->bits;
    const int32_t luma_blocks = head->across * head->down, blocks = luma_blocks + 2;
    uint32_t at[LANES], bad = 0;
    int32_t last_dc[3][LANES], beyond = 0;
    int64_t offset[3] = {0};
    int32_t most[3][LANES]; /* values that DC may have */
    const struct code *codes[3][2][LANES];
    memcpy(last_dc, group->last_dc, sizeof last_dc);
    for (int32_t c = 0; c < 3; c++)
        EACH(i) {
            const struct head *const own = group->heads[i];
            codes[c][0][i] = &own->codes[own->dc[c]];
            codes[c][1][i] = &own->codes[own->ac[c]];
            most[c][i] = own->most_dc[c];
        }
    EACH(i) at[i] = group->at[i];
    /* The lowest bit of a window is always 1: its position says how far the window was shifted. */
#define LOAD(i) (big64(bits + (at[i] >> 3)) << (at[i] & 7) | 1)
#define DC(i) (same ? dc0 : dc[i])
#define AC(i) (same ? ac0 : ac[i])
#define TAKEN(i) (uint32_t)__builtin_ctzll(window[i])
    for (int32_t mcu = 0; mcu < mcus; mcu++) {
        for (int32_t block = 0; block < blocks; block++) {
            const int32_t c = block < luma_blocks ? 0 : block - luma_blocks + 1;
            const struct code *const *const dc = codes[c][0], *const *const ac = codes[c][1];
            const struct code *const dc0 = dc[0], *const ac0 = ac[0];
            uint64_t window[LANES];
            uint64_t entry[LANES];
            int64_t place[LANES];

            EACH(i) {
                window[i] = LOAD(i);
                entry[i] = DC(i)->fast[window[i] >> (64 - FAST_BITS)];
            }
            if ((entry[0] | entry[1] | entry[2] | entry[3]) & LONG) {
                EACH(i) if (entry[i] & LONG) {
                    entry[i] = dermscale_long_code(DC(i), window[i], FULL, 0);
                    bad |= MOVE_OF(entry[i]) != 1;
                    at[i] += LENGTH_OF(entry[i]);
                    window[i] = LOAD(i);
                    entry[i] &= ~(uint64_t)0xFF;
                }
            }
            EACH(i) {
                const int32_t value = last_dc[c][i] += VALUE_OF(entry[i]);
                const int32_t most_dc = same ? head->most_dc[c] : most[c][i];
                beyond |= (most_dc - value) | (most_dc + value);
                coefficients[i * ROW] = (int16_t)value;
                window[i] <<= entry[i] & 63;
                place[i] = FIRST;
            }
            for (;;) {
#pragma GCC unroll 8
                for (int step = 0; step < STEPS; step++) {
                    EACH(i) entry[i] = AC(i)->fast[window[i] >> (64 - FAST_BITS)] & (uint64_t)(place[i] >> 63);
                    EACH(i) {
                        window[i] <<= entry[i] & 63;
                        place[i] += MOVE_OF(entry[i]);
                        coefficients[AC(i)->order[FULL + place[i]] + i * ROW] |= VALUE_OF(entry[i]);
                    }
                }
                EACH(i) at[i] += TAKEN(i);
                if ((entry[0] | entry[1] | entry[2] | entry[3]) & LONG) {
                    EACH(i) if (entry[i] & LONG) {
                        const uint16_t *const by = (same ? head : group->heads[i])->zigzag_quantisers[c];
                        entry[i] = dermscale_long_code(AC(i), LOAD(i), (int32_t)place[i], by);
                        at[i] += LENGTH_OF(entry[i]);
                        place[i] += MOVE_OF(entry[i]);
                        coefficients[AC(i)->order[FULL + place[i]] + i * ROW] |= VALUE_OF(entry[i]);
                    }
                }
                if ((place[0] | place[1] | place[2] | place[3]) >= 0)
                    break;
                EACH(i) window[i] = LOAD(i);
            }
            int32_t used = 0;
            uint8_t *to[LANES];
            EACH(i) {
                const int32_t own = (int32_t)((place[i] - 1) & 63) + 1;
                used = own > used ? own : used;
                bad |= (uint64_t)place[i] - 1 < 63 || place[i] > END_OF_BLOCK;
                if (place[i] == END_OF_BLOCK) /* the block is full: the bits that look like its end are the next's */
                    at[i] -= (uint32_t)AC(i)->end_bits;
                to[i] = group->to[c][i] + offset[c] + group->offset[c][block & 3];
            }
            bad |= dermscale_inverse_dct(coefficients, group->quantisers[c], used, to, group->stride[c], level) != 0;
        }
        EACH(i) bad |= at[i] > group->end[i];
        if (bad || beyond < 0)
            return DECLINED;
        for (int32_t c = 0; c < 3; c++)
            offset[c] += c ? ROW : head->across * ROW;
    }
    EACH(i) group->at[i] = at[i];
    memcpy(group->last_dc, last_dc, sizeof last_dc);
    return DECODED;
#undef LOAD
#undef TAKEN
}

/* Whether only the ones that fill a lane's last byte are left of its stream. */
static inline int32_t ends_well(const struct group *group, int32_t lane)
{
    const uint32_t end = group->end[lane], left = end - group->at[lane];
    return left <= 7 && !(~(uint32_t)group->bits[(end >> 3) - 1] & ((1u << left) - 1));
}
#endif
