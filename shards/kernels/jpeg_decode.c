/* Decodes a box of a JPEG with a restart table (FORMAT.md). The pixels are those of libjpeg-turbo's accurate decoder.
 *
 * It takes the files that shards/jpeg.py writes: baseline (ITU-T T.81), 8 bit, YCbCr in 4:4:4, 4:2:2 or 4:2:0, one
 * scan. All other files are DECLINED, and need a general decoder. It is faster than a general decoder because:
 *
 * - Only the runs under the box are decoded.
 * - Four runs (lanes) are decoded at the same time, block by block. Their bit streams do not depend on each other, so
 *   the processor works on one lane while it waits for the look-up of another.
 * - In a step each lane decodes one code. A lane whose block has ended takes no bits until all four blocks have ended.
 *   So four blocks share one branch that is hard to predict.
 * - One look-up gives a code and the value behind it, where both fit FAST_BITS, and the end of the block if it follows.
 * - The zeros that are stuffed behind FF are removed before decoding, so loading bits needs no test of the bytes.
 *
 * Nothing is read outside the file or written outside the scratch memory, whatever the bytes are. A run's bits are
 * copied to scratch memory. Behind them is room for one MCU of the longest codes, so the end is checked once per MCU.
 */
#include "jpeg_pixels.h"
#include "kernels.h"

#include <string.h>

#define MOST_HEAD 2048   /* bytes of the headers behind the restart table */
#define MOST_INTERVAL 16 /* MCUs in a run; shards/jpeg.py aims at 4 */
#define MOST_SIDE 65500  /* of an image, px */
#define MOST_RUN 0xFFFF  /* bytes */
#define RUN_SLACK 2369   /* bytes behind a run that may be read; 6 blocks of 64 codes of 27 bits have 1,296 */
#define MOST_VALUE 4095  /* of a coefficient times its quantiser; images have up to about 1,024 */
#define FAST_BITS 11
#define STEPS 4          /* AC codes between two loads of bits: at least 57 bits, and a DC code before */

#ifdef X86
#include <immintrin.h>
#define TARGET_BMI2 __attribute__((target("avx2,bmi,bmi2")))
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif

/* A code: the bits that it and its value take, how far the place in the block moves (run + 1), and the value. */
#define ENTRY(bits, move, value) ((uint32_t)(bits) | (uint32_t)(uint16_t)(value) << 8 | (uint32_t)(move) << 24)
#define LENGTH_OF(entry) ((uint32_t)(entry) & 0xFF)
#define VALUE_OF(entry) ((int16_t)((entry) >> 8))
#define MOVE_OF(entry) ((entry) >> 24)
#define LONG 0x80        /* in place of an entry's length: the code needs `long_code` */
/* A lane's place in its block is negative until the block has ended: the next coefficient in zigzag order, less 64. */
#define FULL 64
#define FIRST (-63)      /* behind DC */
#define END_OF_BLOCK 128 /* the move of the code that ends a block, to the places 65 … 127 */
#define NO_CODE ENTRY(0, 64, 0) /* moves to the places 1 … 63, where no sound block ends */

/* Where the coefficient before each place stands among LANES blocks, from place -64 on. Behind a block's end there is
 * none, but for places that the code of the last coefficient and the code that ends the block lead to in one step. */
#define AT(row, column) ((row) * LANES * ROW + (column))
#define NONE AT(8, 0)
#define NONE16 NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE, NONE
#define ZIGZAG \
    AT(0, 0), AT(0, 1), AT(1, 0), AT(2, 0), AT(1, 1), AT(0, 2), AT(0, 3), AT(1, 2), \
    AT(2, 1), AT(3, 0), AT(4, 0), AT(3, 1), AT(2, 2), AT(1, 3), AT(0, 4), AT(0, 5), \
    AT(1, 4), AT(2, 3), AT(3, 2), AT(4, 1), AT(5, 0), AT(6, 0), AT(5, 1), AT(4, 2), \
    AT(3, 3), AT(2, 4), AT(1, 5), AT(0, 6), AT(0, 7), AT(1, 6), AT(2, 5), AT(3, 4), \
    AT(4, 3), AT(5, 2), AT(6, 1), AT(7, 0), AT(7, 1), AT(6, 2), AT(5, 3), AT(4, 4), \
    AT(3, 5), AT(2, 6), AT(1, 7), AT(2, 7), AT(3, 6), AT(4, 5), AT(5, 4), AT(6, 3), \
    AT(7, 2), AT(7, 3), AT(6, 4), AT(5, 5), AT(4, 6), AT(3, 7), AT(4, 7), AT(5, 6), \
    AT(6, 5), AT(7, 4), AT(7, 5), AT(6, 6), AT(5, 7), AT(6, 7), AT(7, 6), AT(7, 7)
static const uint16_t order[1 + 64 + 64 + 64 + 16] = {NONE, ZIGZAG, NONE16, NONE16, NONE16, NONE16, ZIGZAG, NONE16};

struct code {
    uint32_t fast[1 << FAST_BITS];
    uint16_t order[sizeof order / sizeof *order]; /* a copy, so that one register addresses both */
    uint16_t starts[1 << FAST_BITS]; /* length << 8 | symbol of the code that the bits start with; 0 if it is longer */
    int32_t beyond[17];              /* as 16 bits, where codes of a length end; they start where shorter ones end */
    int32_t first[17];               /* index of the first symbol of a length, less its code */
    uint8_t symbols[256];
    int32_t end_bits;                /* length of the code that ends a block */
    int32_t fast_size;               /* that it was built for; 0 before */
    uint8_t counts[16];
};

/* The contents of the headers. All files of a shard set have the same headers, so they are read once. */
struct head {
    int64_t bytes;             /* of `text`; 0 before the first file */
    int32_t frame;             /* where SOF0 starts in `text` */
    int32_t across, down;      /* pixels per chroma sample */
    int32_t interval;          /* MCUs in a run */
    int32_t dc[3], ac[3];      /* the components' tables in `codes` */
    int16_t quantisers[3][ROW * LANES * ROW] __attribute__((aligned(64)));
    uint16_t zigzag_quantisers[3][64];
    int32_t most_dc[3];        /* values that DC may have */
    uint8_t text[MOST_HEAD];
    struct code codes[4];      /* DC 0, DC 1, AC 0, AC 1 */
};

struct scratch {
    struct head head;
    int16_t coefficients[(ROW + 1) * LANES * ROW] __attribute__((aligned(64))); /* the last row: values of no place */
    uint8_t runs[LANES][MOST_RUN + RUN_SLACK];
};

static INLINE uint64_t big64(const uint8_t *at)
{
    return (uint64_t)at[0] << 56 | (uint64_t)at[1] << 48 | (uint64_t)at[2] << 40 | (uint64_t)at[3] << 32 |
           (uint64_t)at[4] << 24 | (uint64_t)at[5] << 16 | (uint64_t)at[6] << 8 | (uint64_t)at[7];
}

static int64_t aligned(int64_t bytes)
{
    return (bytes + 63) & ~(int64_t)63;
}

/* The entry of a symbol whose code is the first `length` of `bits`. NO_CODE: baseline does not have the symbol. */
static uint32_t entry_of(int32_t symbol, int32_t length, uint64_t bits, int32_t dc)
{
    const int32_t size = symbol & 15, run = symbol >> 4;
    if (!dc && (size > 10 || (size == 0 && run != 0 && run != 15)))
        return NO_CODE;
    if (size == 0)
        return ENTRY(length, dc ? 1 : run ? 16 : END_OF_BLOCK, 0);
    const int32_t value = (int32_t)(bits << length >> (64 - size)), half = 1 << (size - 1);
    return ENTRY(length + size, run + 1, value < half ? value - 2 * half + 1 : value);
}

/* A code that is too long for the fast look-up, or whose value is. place: in the block, FULL for DC. */
static uint32_t long_code(const struct code *code, uint64_t bits, int32_t place, const uint16_t *quantisers)
{
    int32_t length = code->starts[bits >> (64 - FAST_BITS)] >> 8;
    int32_t symbol = code->starts[bits >> (64 - FAST_BITS)] & 255;
    if (length == 0) {
        const int32_t ahead = (int32_t)(bits >> 48);
        for (length = FAST_BITS + 1; length <= 16 && ahead >= code->beyond[length]; length++)
            ;
        if (length > 16)
            return NO_CODE;
        symbol = code->symbols[(code->first[length] + (ahead >> (16 - length))) & 255];
    }
    const uint32_t entry = entry_of(symbol, length, bits, place == FULL);
    const int32_t value = VALUE_OF(entry), coefficient = FULL + place + (int32_t)MOVE_OF(entry) - 1;
    if (place == FULL || value == 0)
        return entry;
    if (coefficient > 63 || (value < 0 ? -value : value) * quantisers[coefficient] > MOST_VALUE)
        return NO_CODE;
    return entry;
}

/* Join the code of a block's last coefficient and the code of the block's end in one look-up, where both fit. */
static void join_ends(struct code *code)
{
    int32_t at = 0;
    while (at < 1 << FAST_BITS && (code->fast[at] & LONG || MOVE_OF(code->fast[at]) != END_OF_BLOCK))
        at++;
    if (at == 1 << FAST_BITS)
        return;
    const uint32_t end = code->fast[at];
    code->end_bits = (int32_t)LENGTH_OF(end);
    for (int32_t i = 0; i < 1 << FAST_BITS; i++) {
        const uint32_t entry = code->fast[i], taken = LENGTH_OF(entry);
        if (VALUE_OF(entry) == 0 || taken + LENGTH_OF(end) > FAST_BITS)
            continue;
        if (code->fast[i << taken & ((1 << FAST_BITS) - 1)] == end)
            code->fast[i] = entry + ENTRY(LENGTH_OF(end), END_OF_BLOCK, 0);
    }
}

/* Look-up tables of a Huffman table of a DHT segment. fast_size: bits that the value of a fast look-up may have. */
static int32_t build_code(struct code *code, const uint8_t *counts, const uint8_t *symbols, int32_t dc,
                          int32_t fast_size)
{
    int32_t next = 0, index = 0;
    for (int32_t i = 0; i < 16; i++)
        index += counts[i];
    if (code->fast_size == fast_size && memcmp(code->counts, counts, 16) == 0 &&
        memcmp(code->symbols, symbols, (size_t)index) == 0)
        return DECODED;
    memset(code, 0, sizeof *code);
    memcpy(code->order, order, sizeof order);
    memcpy(code->counts, counts, 16);
    memcpy(code->symbols, symbols, (size_t)index);
    for (int32_t i = 0; i < 1 << FAST_BITS; i++)
        code->fast[i] = ENTRY(LONG, 0, 0);
    index = 0;
    for (int32_t length = 1; length <= 16; length++, next *= 2) {
        code->first[length] = index - next;
        for (int32_t i = 0; i < counts[length - 1]; i++, index++, next++) {
            if (next >= (1 << length) - 1 || (dc && symbols[index] > 11)) /* no code is all ones */
                return DECLINED;
            if (length > FAST_BITS)
                continue;
            const int32_t symbol = symbols[index], size = symbol & 15;
            const int32_t from = next << (FAST_BITS - length), to = (next + 1) << (FAST_BITS - length);
            for (int32_t j = from; j < to; j++) {
                code->starts[j] = (uint16_t)(length << 8 | symbol);
                if (length + size <= FAST_BITS && (dc || size <= fast_size))
                    code->fast[j] = entry_of(symbol, length, (uint64_t)j << (64 - FAST_BITS), dc);
            }
        }
        code->beyond[length] = next << (16 - length);
    }
    if (!dc)
        join_ends(code);
    code->fast_size = fast_size;
    return DECODED;
}

/* Read the headers, `bytes` of them from behind the restart table to the first run. */
static int32_t read_head(struct head *head, const uint8_t *text, int32_t bytes, int32_t frame)
{
    const uint8_t *tables[4] = {0}, *quantisers[4] = {0}, *scan = 0; /* tables: Huffman tables, as `codes` has them */
    int32_t at = 0, seen_frame = 0;
    head->bytes = head->interval = 0;
    while (!scan) {
        if (at + 4 > bytes || text[at] != 0xFF)
            return DECLINED;
        const int32_t marker = text[at + 1], end = at + 2 + big16(text + at + 2);
        const uint8_t *from = text + at + 4;
        if (end > bytes || end < at + 4)
            return DECLINED;
        const uint8_t *const behind = text + end;
        if (marker == 0xDB) { /* DQT */
            for (; from + 65 <= behind && from[0] < 4; from += 65)
                quantisers[from[0]] = from + 1;
            if (from != behind)
                return DECLINED;
        } else if (marker == 0xC4) { /* DHT */
            while (from < behind) {
                int32_t symbols = 0;
                if (behind - from < 17 || (from[0] & ~0x11))
                    return DECLINED;
                for (int32_t length = 1; length <= 16; length++)
                    symbols += from[length];
                if (symbols > 256 || behind - from < 17 + symbols)
                    return DECLINED;
                tables[(from[0] >> 4) * 2 + (from[0] & 1)] = from + 1;
                from += 17 + symbols;
            }
        } else if (marker == 0xC0) { /* SOF0: baseline */
            if (seen_frame || at != frame || end != at + 19 || from[0] != 8 || from[5] != 3)
                return DECLINED;
            seen_frame = 1;
        } else if (marker == 0xDD) { /* DRI */
            if (end != at + 6)
                return DECLINED;
            head->interval = big16(from);
        } else if (marker == 0xDA) { /* SOS */
            scan = from;
            if (end != at + 14 || end != bytes)
                return DECLINED;
        } else {
            return DECLINED;
        }
        at = end;
    }
    if (!seen_frame || scan[0] != 3 || scan[7] != 0 || scan[8] != 63 || scan[9] != 0)
        return DECLINED;

    const uint8_t *components = text + frame + 10; /* id, sampling factors, quantisers: three of each */
    int32_t most = 1;
    for (int32_t c = 0; c < 3; c++, components += 3, scan += 2) {
        const int32_t table = components[2], dc = scan[2] >> 4, ac = scan[2] & 15;
        if (components[0] != c + 1 || scan[1] != c + 1 || (c && components[1] != 0x11))
            return DECLINED;
        if (c == 0) {
            head->across = components[1] >> 4;
            head->down = components[1] & 15;
        }
        if (table > 3 || !quantisers[table] || dc > 1 || ac > 1 || !tables[dc] || !tables[2 + ac])
            return DECLINED;
        head->most_dc[c] = quantisers[table][0] ? MOST_VALUE / quantisers[table][0] : 0;
        for (int32_t k = 0; k < 64; k++) {
            const int32_t quantiser = quantisers[table][k];
            if (quantiser == 0)
                return DECLINED;
            most = quantiser > most ? quantiser : most;
            head->zigzag_quantisers[c][k] = (uint16_t)quantiser;
            for (int32_t lane = 0; lane < LANES; lane++)
                head->quantisers[c][order[k + 1] + lane * ROW] = (int16_t)quantiser;
        }
        head->dc[c] = dc;
        head->ac[c] = 2 + ac;
    }
    if (head->across > 2 || head->across < 1 || head->down < 1 || head->down > head->across)
        return DECLINED;
    int32_t fast_size = 1;
    while (((2 << fast_size) - 1) * most <= MOST_VALUE)
        fast_size++;
    for (int32_t i = 0; i < 4; i++)
        if (tables[i] && build_code(&head->codes[i], tables[i], tables[i] + 16, i < 2, fast_size))
            return DECLINED;
    memcpy(head->text, text, (size_t)bytes);
    head->bytes = bytes;
    head->frame = frame;
    return DECODED;
}

/* Whether the headers are those that were read last, but for the image's height and width. */
static int32_t same_head(const struct head *head, const uint8_t *text, int32_t bytes, int32_t frame)
{
    return head->bytes == bytes && head->frame == frame && memcmp(head->text, text, (size_t)frame + 5) == 0 &&
           memcmp(head->text + frame + 9, text + frame + 9, (size_t)(bytes - frame - 9)) == 0;
}

/* Copy a run of `bytes`, without the zeros stuffed behind FF. Returns the bytes left; -1 where there is a marker. */
static int32_t copy_run(const uint8_t *from, int32_t bytes, uint8_t *to)
{
    uint8_t *start = to;
    for (int32_t i = 0; i < bytes; i++) {
        *to++ = from[i];
        if (from[i] == 0xFF && (++i == bytes || from[i] != 0))
            return -1;
    }
    return (int32_t)(to - start);
}

#ifdef X86
/* The same. readable: bytes that may be read, from `from` on. Up to 32 bytes more are written. */
TARGET_BMI2 static int32_t copy_run_avx2(const uint8_t *from, int32_t bytes, int64_t readable, uint8_t *to)
{
    const __m256i marks = _mm256_set1_epi8(-1);
    const uint8_t *const start = to;
    while (bytes > 0 && readable >= 32) {
        const __m256i some = _mm256_loadu_si256((const __m256i *)from);
        uint32_t found = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(some, marks));
        int32_t taken = bytes < 32 ? bytes : 32, kept = taken;
        found = _bzhi_u32(found, (uint32_t)taken);
        _mm256_storeu_si256((__m256i *)to, some);
        if (found) {
            kept = __builtin_ctz(found) + 1;
            taken = kept + 1;
            if (taken > bytes || taken > readable || from[kept] != 0)
                return -1;
        }
        to += kept;
        from += taken;
        bytes -= taken;
        readable -= taken;
    }
    const int32_t rest = copy_run(from, bytes, to);
    return rest < 0 ? -1 : (int32_t)(to - start) + rest;
}
#endif

/* LANES runs: where their bits are and end, both in bits from `bits` on, and where their pixels go. */
struct group {
    const uint8_t *bits;
    uint32_t at[LANES], end[LANES];
    uint8_t *to[3][LANES];
    int64_t stride[3], offset[3][4]; /* offset: of the blocks in an MCU */
};

#define EACH(i) for (int i = 0; i < LANES; i++)

/* Decode LANES runs to the samples of their blocks. coefficients: zeros before and after. */
static INLINE int32_t decode_group(const struct head *head, const struct group *group, int16_t *coefficients,
                                   int32_t level)
{
    const uint8_t *const bits = group->bits;
    const int32_t luma_blocks = head->across * head->down, blocks = luma_blocks + 2;
    uint32_t at[LANES], bad = 0;
    int32_t last_dc[3][LANES] = {{0}}, beyond = 0;
    int64_t offset[3] = {0};
    const struct code *codes[3][2];
    for (int32_t c = 0; c < 3; c++) {
        codes[c][0] = &head->codes[head->dc[c]];
        codes[c][1] = &head->codes[head->ac[c]];
    }
    EACH(i) at[i] = group->at[i];
    /* The lowest bit of a window is always 1: its position says how far the window was shifted. */
#define LOAD(i) (big64(bits + (at[i] >> 3)) << (at[i] & 7) | 1)
#define TAKEN(i) (uint32_t)__builtin_ctzll(window[i])
    for (int32_t mcu = 0; mcu < head->interval; mcu++) {
        for (int32_t block = 0; block < blocks; block++) {
            const int32_t c = block < luma_blocks ? 0 : block - luma_blocks + 1;
            const struct code *const dc = codes[c][0], *const ac = codes[c][1];
            const int32_t most_dc = head->most_dc[c];
            uint64_t window[LANES];
            uint64_t entry[LANES];
            int64_t place[LANES];

            EACH(i) {
                window[i] = LOAD(i);
                entry[i] = dc->fast[window[i] >> (64 - FAST_BITS)];
            }
            if ((entry[0] | entry[1] | entry[2] | entry[3]) & LONG) {
                EACH(i) if (entry[i] & LONG) {
                    entry[i] = long_code(dc, window[i], FULL, 0);
                    bad |= MOVE_OF(entry[i]) != 1;
                    at[i] += LENGTH_OF(entry[i]);
                    window[i] = LOAD(i);
                    entry[i] &= ~(uint64_t)0xFF;
                }
            }
            EACH(i) {
                const int32_t value = last_dc[c][i] += VALUE_OF(entry[i]);
                beyond |= (most_dc - value) | (most_dc + value);
                coefficients[i * ROW] = (int16_t)value;
                window[i] <<= entry[i] & 63;
                place[i] = FIRST;
            }
            for (;;) {
#pragma GCC unroll 8
                for (int step = 0; step < STEPS; step++) {
                    EACH(i) entry[i] = ac->fast[window[i] >> (64 - FAST_BITS)] & (uint64_t)(place[i] >> 63);
                    if ((entry[0] | entry[1] | entry[2] | entry[3]) & LONG) {
                        EACH(i) if (entry[i] & LONG) {
                            at[i] += TAKEN(i);
                            entry[i] = long_code(ac, LOAD(i), (int32_t)place[i], head->zigzag_quantisers[c]);
                            at[i] += LENGTH_OF(entry[i]);
                            window[i] = LOAD(i);
                            entry[i] &= ~(uint64_t)0xFF;
                        }
                    }
                    EACH(i) {
                        window[i] <<= entry[i] & 63;
                        place[i] += MOVE_OF(entry[i]);
                        coefficients[ac->order[FULL + place[i]] + i * ROW] |= VALUE_OF(entry[i]);
                    }
                }
                EACH(i) at[i] += TAKEN(i);
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
                    at[i] -= (uint32_t)ac->end_bits;
                to[i] = group->to[c][i] + offset[c] + group->offset[c][block & 3];
            }
            bad |= dermscale_inverse_dct(coefficients, head->quantisers[c], used, to, group->stride[c], level) != 0;
        }
        EACH(i) bad |= at[i] > group->end[i];
        if (bad || beyond < 0)
            return DECLINED;
        for (int32_t c = 0; c < 3; c++)
            offset[c] += c ? ROW : head->across * ROW;
    }
    /* Behind the last code are only the ones that fill its byte. */
    EACH(i) {
        const uint32_t left = group->end[i] - at[i];
        bad |= left > 7 || (~(uint32_t)bits[(group->end[i] >> 3) - 1] & ((1u << left) - 1));
    }
    return bad ? DECLINED : DECODED;
#undef LOAD
#undef TAKEN
}

static int32_t decode_group_plain(const struct head *head, const struct group *group, int16_t *coefficients)
{
    return decode_group(head, group, coefficients, 0);
}

#ifdef X86
TARGET_BMI2 static int32_t decode_group_bmi2(const struct head *head, const struct group *group, int16_t *coefficients,
                                             int32_t level)
{
    return decode_group(head, group, coefficients, level);
}
#endif

/* What this processor can run: 0, AVX2 or AVX512. */
int32_t dermscale_decode_level(void)
{
#ifdef X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") ? AVX512 : AVX2;
#endif
    return 0;
}

static int64_t pixel_stride(int32_t count)
{
    return aligned((int64_t)count * 3) + 64;
}

/* Bytes of scratch for one thread, for images and boxes of at most these sides. */
int64_t dermscale_decode_scratch(int32_t height, int32_t width)
{
    const int64_t rows = ((int64_t)height + 15) / 16 * 16, columns = ((int64_t)width + 15) / 16 * 16;
    return aligned(sizeof(struct scratch)) + 2 * aligned((columns + 4 * MARGIN) * 2) +
           3 * aligned((columns + 2 * MARGIN) * rows) + pixel_stride(width + 1) * height + ROW_SLACK + 64;
}

/* A file's restart table, and where its headers and its scan start. */
struct table {
    int32_t mcu_height, mcu_width, run_width; /* px */
    int32_t interval, rows, columns;          /* MCUs in a run; rows of runs, and runs in a row */
    int32_t frame, head_bytes;
    int64_t head, scan;
};

static int32_t read_table(struct table *to, const uint8_t *file, int64_t length, int32_t height, int32_t width)
{
    if (length < LENGTHS || memcmp(file, "\xFF\xD8\xFF\xE0\0\x10JFIF\0\1", 12) != 0 ||
        memcmp(file + APP0_END, "\xFF\xEF", 2) != 0 || memcmp(file + APP0_END + 4, "DSRST1", 7) != 0)
        return DECLINED;
    to->mcu_height = file[FIELDS];
    to->mcu_width = file[FIELDS + 1];
    to->interval = big16(file + FIELDS + 2);
    to->frame = big16(file + FIELDS + 4);
    to->head_bytes = big16(file + FIELDS + 6);
    if (to->mcu_height < 1 || to->mcu_width < 1 || to->interval < 1 || to->interval > MOST_INTERVAL)
        return DECLINED;
    to->run_width = to->mcu_width * to->interval;
    to->rows = (height + to->mcu_height - 1) / to->mcu_height;
    to->columns = (width + to->run_width - 1) / to->run_width;
    to->head = LENGTHS + (int64_t)2 * to->rows * to->columns;
    to->scan = to->head + to->head_bytes;
    if ((width + to->mcu_width - 1) / to->mcu_width != to->columns * to->interval)
        return DECLINED;
    if (big16(file + APP0_END + 2) != to->head - APP0_END - 2 || to->scan > length || to->head_bytes > MOST_HEAD)
        return DECLINED;
    const uint8_t *const frame = file + to->head + to->frame;
    if (to->frame + 19 > to->head_bytes || big16(frame + 5) != height || big16(frame + 7) != width)
        return DECLINED;
    return DECODED;
}

/* Copy a run into a lane. marker: the one that ends it. readable: bytes of the file, from `from` on. */
static int32_t fill_lane(struct group *group, struct scratch *own, int32_t lane, const uint8_t *from, int32_t bytes,
                         int64_t readable, int32_t marker, int32_t level)
{
    if (bytes < 3 || from[bytes - 2] != 0xFF || from[bytes - 1] != marker)
        return DECLINED;
    uint8_t *const to = own->runs[lane];
    int32_t copied;
#ifdef X86
    if (level >= AVX2)
        copied = copy_run_avx2(from, bytes - 2, readable, to);
    else
#endif
        copied = copy_run(from, bytes - 2, to);
    (void)readable;
    (void)level;
    if (copied < 1)
        return DECLINED;
    memset(to + copied, 0, 16);
    group->at[lane] = (uint32_t)(sizeof own->runs[0] * 8) * (uint32_t)lane;
    group->end[lane] = group->at[lane] + (uint32_t)copied * 8;
    return DECODED;
}

/* The pixels of the box (y, x, h, w) of a file of `length` bytes with a restart table, an image of (height, width) px:
 * RGB uint8. On DECODED, `pixels` points (into scratch) at the box's first pixel, and `stride` is the number of bytes
 * between its rows. DECLINED: the file is not of this packer's kind, or is damaged where the box is.
 *
 * scratch: dermscale_decode_scratch() bytes for this image's sides or larger ones, all zeros before its first use. It
 * keeps the contents of the last file's headers. level: 0, AVX2 or AVX512, or less where the processor lacks it. */
int32_t dermscale_decode_box(const uint8_t *file, int64_t length, int32_t height, int32_t width, int32_t y, int32_t x,
                             int32_t h, int32_t w, uint8_t *scratch, int64_t scratch_bytes, const uint8_t **pixels,
                             int64_t *stride, int32_t level)
{
    struct table table;
    if (height < 1 || width < 1 || height > MOST_SIDE || width > MOST_SIDE || y < 0 || x < 0 || h < 1 || w < 1 ||
        h > height - y || w > width - x || scratch_bytes < dermscale_decode_scratch(height, width) ||
        read_table(&table, file, length, height, width))
        return DECLINED;
    const int32_t supported = dermscale_decode_level();
    level = level < supported ? level : supported;
    int64_t free_at = ((intptr_t)scratch + 63) & ~(intptr_t)63;
    struct scratch *const own = (struct scratch *)(intptr_t)free_at;
    struct head *const head = &own->head;
    if (!same_head(head, file + table.head, table.head_bytes, table.frame) &&
        read_head(head, file + table.head, table.head_bytes, table.frame))
        return DECLINED;
    const int32_t mcu_height = table.mcu_height, run_width = table.run_width;
    if (table.interval != head->interval || mcu_height != 8 * head->down || table.mcu_width != 8 * head->across)
        return DECLINED;

    /* The runs under the box, with one pixel more on each side for the upsampling of chroma. */
    const int32_t row0 = (y > 0 ? y - 1 : 0) / mcu_height, column0 = (x > 0 ? x - 1 : 0) / run_width;
    const int32_t row1 = (y + h < height ? y + h : height - 1) / mcu_height + 1;
    const int32_t column1 = (x + w < width ? x + w : width - 1) / run_width + 1;
    const int32_t last_run = (row1 - 1) * table.columns + column1 - 1;

    /* The parts of the scratch memory. */
    struct part part = {.height = height, .width = width, .top = row0 * mcu_height, .left = column0 * run_width,
                        .across = head->across - 1, .down = head->down - 1};
    const int64_t part_width = (int64_t)(column1 - column0) * run_width, part_height = (row1 - row0) * mcu_height;
    free_at += aligned(sizeof *own);
    for (int32_t c = 0; c < 2; c++) {
        part.sums[c] = (int16_t *)(intptr_t)free_at + MARGIN;
        free_at += aligned((part_width + 4 * MARGIN) * 2);
    }
    for (int32_t c = 0; c < 3; c++) {
        part.stride[c] = (part_width >> (c ? part.across : 0)) + 2 * MARGIN;
        part.plane[c] = (uint8_t *)(intptr_t)free_at + MARGIN;
        free_at += aligned(part.stride[c] * (part_height >> (c ? part.down : 0)));
    }
    const int32_t x0 = x & ~part.across, count = x + w - x0; /* pixels of a row, from a chroma sample's first on */
    uint8_t *const rgb = (uint8_t *)(intptr_t)free_at;
    const int64_t rgb_stride = pixel_stride(count);

    struct group group = {.bits = own->runs[0], .stride = {part.stride[0], part.stride[1], part.stride[2]}};
    for (int32_t block = 0; block < head->across * head->down; block++)
        group.offset[0][block] = block / head->across * ROW * part.stride[0] + block % head->across * ROW;
    memset(own->coefficients, 0, sizeof own->coefficients);

    const uint8_t *lengths = file + LENGTHS;
    int64_t from = table.scan;
    int32_t lane = 0, done_to = y; /* lane: how many are filled; done_to: the rows of pixels before it are made */
    for (int32_t number = 0; number < table.rows * table.columns; number++, lengths += 2) {
        const int32_t row = number / table.columns, column = number % table.columns;
        const int32_t bytes = lengths[0] | lengths[1] << 8;
        if (bytes > length - from)
            return DECLINED;
        const uint8_t *const run = file + from;
        const int64_t readable = length - from;
        from += bytes;
        if (row < row0 || row >= row1 || column < column0 || column >= column1)
            continue;
        const int32_t marker = number == table.rows * table.columns - 1 ? 0xD9 : 0xD0 + (number & 7); /* EOI, RSTn */
        if (fill_lane(&group, own, lane, run, bytes, readable, marker, level))
            return DECLINED;
        for (int32_t c = 0; c < 3; c++) {
            const int32_t down = (row * mcu_height - part.top) >> (c ? part.down : 0);
            const int32_t across = (column * run_width - part.left) >> (c ? part.across : 0);
            group.to[c][lane] = part.plane[c] + down * part.stride[c] + across;
        }
        if (++lane < LANES && number != last_run)
            continue;
        for (; lane < LANES; lane++) { /* too few are left: one is decoded several times */
            group.at[lane] = group.at[0];
            group.end[lane] = group.end[0];
            for (int32_t c = 0; c < 3; c++)
                group.to[c][lane] = group.to[c][0];
        }
        lane = 0;
        int32_t declined;
#ifdef X86
        if (level >= AVX2)
            declined = decode_group_bmi2(head, &group, own->coefficients, level);
        else
#endif
            declined = decode_group_plain(head, &group, own->coefficients);
        if (declined)
            return DECLINED;
        /* Make the rows of pixels whose samples are all there, while those are in the cache. */
        int32_t ready = y + h;
        if (number != last_run) {
            ready = (column == column1 - 1 ? row + 1 : row) * mcu_height - part.down;
            ready = ready < y + h ? ready : y + h;
        }
        for (; done_to < ready; done_to++)
            dermscale_pixel_row(&part, done_to, x0, count, rgb + (done_to - y) * rgb_stride, level);
    }
    if (from != length)
        return DECLINED;
    *pixels = rgb + 3 * (x - x0);
    *stride = rgb_stride;
    return DECODED;
}
