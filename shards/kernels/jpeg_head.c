/* Reads the headers of a baseline JPEG (ITU-T T.81), and makes look-up tables of its Huffman codes. */
#include "jpeg_head.h"

#include <string.h>

#define MOST_VALUE 4095 /* of a coefficient times its quantiser; images have up to about 1,024 */

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
uint32_t dermscale_long_code(const struct code *code, uint64_t bits, int32_t place, const uint16_t *quantisers)
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

/* Whether the pixels do not depend on a segment that headers may have, a comment or data of some application. */
static int32_t says_nothing(int32_t marker, const uint8_t *from, int64_t bytes)
{
    if (marker == 0xE0 && bytes >= 6 && memcmp(from, "JFIF", 5) == 0)
        return from[5] == 1; /* libjpeg-turbo warns about other versions */
    /* APP2 may be a colour profile, which libjpeg-turbo checks; APP14 may name another colour space. */
    return marker == 0xFE || (marker >= 0xE0 && marker <= 0xEF && marker != 0xE2 && marker != 0xEE);
}

/* Read headers from the first marker of `text` up to the scan, within `bytes`. others: whether segments may be among
 * them that the pixels do not depend on. DECLINED: no decoder but a general one reads this, or none does. */
int32_t dermscale_read_head(struct head *head, const uint8_t *text, int64_t bytes, int32_t others)
{
    const uint8_t *tables[4] = {0}, *quantisers[4] = {0}, *scan = 0; /* tables: Huffman tables, as `codes` has them */
    int64_t at = 0, frame = -1;
    head->bytes = head->interval = 0;
    while (!scan) {
        if (at + 4 > bytes || text[at] != 0xFF)
            return DECLINED;
        const int32_t marker = text[at + 1];
        const int64_t end = at + 2 + big16(text + at + 2);
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
            if (frame >= 0 || end != at + 19 || from[0] != 8 || from[5] != 3)
                return DECLINED;
            frame = at;
        } else if (marker == 0xDD) { /* DRI */
            if (end != at + 6)
                return DECLINED;
            head->interval = big16(from);
        } else if (marker == 0xDA) { /* SOS */
            scan = from;
            if (end != at + 14)
                return DECLINED;
        } else if (!others || !says_nothing(marker, from, end - at - 4)) {
            return DECLINED;
        }
        at = end;
    }
    if (frame < 0 || scan[0] != 3 || scan[7] != 0 || scan[8] != 63 || scan[9] != 0)
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
    head->height = big16(text + frame + 5);
    head->width = big16(text + frame + 7);
    head->bytes = at;
    head->frame = frame;
    return DECODED;
}
