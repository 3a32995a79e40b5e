/* The headers of a baseline JPEG (ITU-T T.81), and look-up tables for its Huffman codes (jpeg_head.c). */
#ifndef DERMSCALE_JPEG_HEAD_H
#define DERMSCALE_JPEG_HEAD_H
#include "jpeg_pixels.h"

#define MOST_SIDE 65500 /* of an image, px */
#define FAST_BITS 11

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

/* A Huffman table. */
struct code {
    uint32_t fast[1 << FAST_BITS];
    uint16_t order[1 + 64 + 64 + 64 + 16]; /* a copy of jpeg_head.c's, so that one register addresses both */
    uint16_t starts[1 << FAST_BITS]; /* length << 8 | symbol of the code that the bits start with; 0 if it is longer */
    int32_t beyond[17];              /* as 16 bits, where codes of a length end; they start where shorter ones end */
    int32_t first[17];               /* index of the first symbol of a length, less its code */
    uint8_t symbols[256];
    int32_t end_bits;                /* length of the code that ends a block */
    int32_t fast_size;               /* that it was built for; 0 before */
    uint8_t counts[16];
};

/* What the headers say. */
struct head {
    int64_t bytes;             /* up to the scan; 0 before the first file, and where the last one was declined */
    int64_t frame;             /* where SOF0 starts */
    int32_t height, width;     /* px */
    int32_t across, down;      /* pixels per chroma sample */
    int32_t interval;          /* MCUs in a run */
    int32_t dc[3], ac[3];      /* the components' tables in `codes` */
    int16_t quantisers[3][ROW * LANES * ROW] __attribute__((aligned(64)));
    uint16_t zigzag_quantisers[3][64];
    int32_t most_dc[3];        /* values that DC may have */
    struct code codes[4];      /* DC 0, DC 1, AC 0, AC 1 */
};

static inline int64_t aligned(int64_t bytes)
{
    return (bytes + 63) & ~(int64_t)63;
}

int32_t dermscale_read_head(struct head *head, const uint8_t *text, int64_t bytes, int32_t others);
uint32_t dermscale_long_code(const struct code *code, uint64_t bits, int32_t place, const uint16_t *quantisers);
#endif
