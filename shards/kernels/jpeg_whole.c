/* Decodes whole JPEG files, LANES at the same time. The pixels are those of libjpeg-turbo's accurate decoder.
 *
 * It takes baseline files (ITU-T T.81) of 8 bit, YCbCr in 4:4:4, 4:2:2 or 4:2:0, with one scan and without restart
 * markers, as most cameras write them. All other files are DECLINED and need a general decoder, and so are files with
 * any damage that libjpeg-turbo warns about.
 *
 * A file without restart markers is one stream of bits, so each lane decodes a file of its own (jpeg_lanes.h). The rows
 * of pixels are made after each row of MCUs, while the samples are in the cache.
 *
 * Nothing is read outside the files or written outside the scratch memory and the images, whatever the bytes are.
 */
#include "jpeg_lanes.h"

#include <string.h>

#define MOST_BYTES (1 << 26) /* of a file, so that the places of bits fit 32 bits */

#ifdef X86
/* The first part of the scratch memory. */
struct whole {
    struct head heads[LANES];
    int16_t quantisers[3][ROW * LANES * ROW] __attribute__((aligned(64)));
    int16_t coefficients[(ROW + 1) * LANES * ROW] __attribute__((aligned(64))); /* the last row: values of no place */
};

static int64_t stream_bytes(int64_t longest)
{
    return aligned(longest + SLACK);
}

/* Rows of pixels that wait for their reduction: of one row of MCUs, and up to three left over from the one above. */
static int64_t band_bytes(int32_t width)
{
    return aligned((int64_t)width * 3 * 19 + ROW_SLACK);
}

TARGET_BMI2 static int32_t decode_row(struct group *group, int32_t mcus, int16_t *coefficients, int32_t level)
{
    return decode_mcus(group, 0, mcus, coefficients, level);
}
#endif

/* Read a file's headers; DECLINED if it is not of the usual kind. */
static int32_t read_file(struct head *head, const uint8_t *file, int64_t length)
{
    if (length < 4 || length > MOST_BYTES || file[0] != 0xFF || file[1] != 0xD8 ||
        dermscale_read_head(head, file + 2, length - 2, 1))
        return DECLINED;
    const int32_t usual = head->interval == 0 && head->height >= 1 && head->height <= MOST_SIDE && head->width >= 1 &&
                          head->width <= MOST_SIDE;
    return usual ? DECODED : DECLINED;
}

/* Bytes of scratch for files of at most `longest` bytes and images of at most `width` px. */
int64_t dermscale_files_scratch(int64_t longest, int32_t width)
{
#ifdef X86
    const int64_t columns = ((int64_t)width + 15) / 16 * 16;
    const int64_t lane = stream_bytes(longest) + 3 * aligned((columns + 2 * MARGIN) * 17) + band_bytes(width);
    const int64_t row = 2 * aligned((columns + 4 * MARGIN) * 2) + aligned((int64_t)width * 3 + 16);
    return 64 + aligned(sizeof(struct whole)) + row + LANES * lane;
#else
    return 64 + 0 * (longest + width);
#endif
}

/* Decode `count` files, 1 to LANES, which have `lengths` bytes, are images of (height, width) px and have the same
 * sampling. All are decoded, or all are DECLINED.
 *
 * images: for each, (height, width, 3) RGB uint8 and room for ROW_SLACK bytes more. reduced: as dermscale_two_thirds
 * makes them, (height * 2 / 3, width * 2 / 3, 3); both sides must be multiples of 3. The bytes of a declined file's
 * image may be anything. scratch: dermscale_files_scratch() bytes. level: AVX2 or AVX512, or less where the processor
 * lacks it; 0 declines all files. */
int32_t dermscale_decode_files(const uint8_t *const *files, const int64_t *lengths, int32_t count, int32_t height,
                               int32_t width, int32_t reduced, uint8_t *scratch, int64_t scratch_bytes,
                               uint8_t *const *images, int32_t level)
{
#ifdef X86
    const int32_t supported = dermscale_decode_level();
    level = level < supported ? level : supported;
    int64_t longest = 0;
    if (level < AVX2 || count < 1 || count > LANES || height < 1 || width < 1 || height > MOST_SIDE ||
        width > MOST_SIDE || (reduced && (height % 3 || width % 3)))
        return DECLINED;
    for (int32_t i = 0; i < count; i++)
        longest = lengths[i] > longest ? lengths[i] : longest;
    if (longest > MOST_BYTES || scratch_bytes < dermscale_files_scratch(longest, width))
        return DECLINED;

    int64_t free_at = ((intptr_t)scratch + 63) & ~(intptr_t)63;
    struct whole *const own = (struct whole *)(intptr_t)free_at;
    free_at += aligned(sizeof *own);
    struct group group = {.bits = (const uint8_t *)(intptr_t)free_at};
    memset(own->coefficients, 0, sizeof own->coefficients);
    for (int32_t lane = 0; lane < LANES; lane++) {
        uint8_t *const to = (uint8_t *)(intptr_t)free_at + stream_bytes(longest) * lane;
        struct head *const head = &own->heads[lane];
        if (lane >= count) { /* too few files: one is decoded several times */
            group.heads[lane] = group.heads[0];
            group.at[lane] = group.at[0];
            group.end[lane] = group.end[0];
        } else {
            for (int32_t i = 0; i < 4; i++)
                head->codes[i].fast_size = 0;
            if (read_file(head, files[lane], lengths[lane]) || head->height != height || head->width != width ||
                head->across != own->heads[0].across || head->down != own->heads[0].down)
                return DECLINED;
            const uint8_t *const from = files[lane] + 2 + head->bytes;
            const int64_t rest = lengths[lane] - 2 - head->bytes;
            int64_t taken;
            const int64_t copied = copy_bits(from, rest, rest, to, &taken, level);
            if (copied < 1 || rest - taken < 2 || from[taken + 1] != 0xD9) /* EOI */
                return DECLINED;
            memset(to + copied, 0, SLACK);
            group.heads[lane] = head;
            group.at[lane] = (uint32_t)(to - group.bits) * 8;
            group.end[lane] = group.at[lane] + (uint32_t)copied * 8;
        }
        for (int32_t c = 0; c < 3; c++)
            for (int32_t row = 0; row < ROW; row++)
                memcpy(own->quantisers[c] + (row * LANES + lane) * ROW,
                       group.heads[lane]->quantisers[c] + (row * LANES + lane) * ROW, ROW * sizeof(int16_t));
    }
    free_at += LANES * stream_bytes(longest);

    const struct head *const head = &own->heads[0];
    const int32_t mcu_height = ROW * head->down, mcus = (width + ROW * head->across - 1) / (ROW * head->across);
    struct part part = {.height = height, .width = width, .across = head->across - 1, .down = head->down - 1};
    for (int32_t c = 0; c < 2; c++) {
        part.sums[c] = (int16_t *)(intptr_t)free_at + MARGIN;
        free_at += aligned(((int64_t)mcus * ROW * head->across + 4 * MARGIN) * 2);
    }
    /* Each plane has a row of MCUs, below the last row of samples of the one before. */
    for (int32_t c = 0; c < 3; c++) {
        const int32_t rows = ROW * (c ? 1 : head->down);
        part.stride[c] = group.stride[c] = (int64_t)mcus * ROW * (c ? 1 : head->across) + 2 * MARGIN;
        group.quantisers[c] = own->quantisers[c];
        for (int32_t lane = 0; lane < LANES; lane++) {
            group.to[c][lane] = (uint8_t *)(intptr_t)free_at + MARGIN + part.stride[c];
            free_at += aligned(part.stride[c] * (rows + 1));
        }
    }
    for (int32_t block = 0; block < head->across * head->down; block++)
        group.offset[0][block] = block / head->across * ROW * part.stride[0] + block % head->across * ROW;

    uint8_t *const bands = (uint8_t *)(intptr_t)free_at, *const mixed = bands + LANES * band_bytes(width);
    const int64_t row_bytes = (int64_t)width * 3;
    int32_t done_to = 0, reduced_to = 0; /* the rows of pixels before them are made, and reduced */
    for (part.top = 0; part.top < height; part.top += mcu_height) {
        if (decode_row(&group, mcus, own->coefficients, level))
            return DECLINED;
        const int32_t ready = part.top + mcu_height < height ? part.top + mcu_height - part.down : height;
        const int32_t whole = ready / 3 * 3, first = reduced ? reduced_to : 0; /* first: the row that is at `to` */
        for (int32_t lane = 0; lane < count; lane++) {
            uint8_t *const band = bands + lane * band_bytes(width);
            uint8_t *const to = reduced ? band : images[lane];
            for (int32_t c = 0; c < 3; c++)
                part.plane[c] = group.to[c][lane];
            for (int32_t row = done_to; row < ready; row++)
                dermscale_pixel_row(&part, row, 0, width, to + (row - first) * row_bytes, level);
            if (reduced) {
                uint8_t *const image = images[lane] + first / 3 * 2 * (row_bytes / 3 * 2);
                dermscale_two_thirds(band, whole - first, width, image, mixed);
                memmove(band, band + (whole - first) * row_bytes, (size_t)((ready - whole) * row_bytes));
            }
            for (int32_t c = 0; part.down && c < 3; c++) { /* for the next row of MCUs */
                const int64_t rows = c ? ROW : mcu_height;
                memcpy(part.plane[c] - part.stride[c] - MARGIN, part.plane[c] + (rows - 1) * part.stride[c] - MARGIN,
                       (size_t)part.stride[c]);
            }
        }
        reduced_to = whole;
        done_to = ready;
    }
    for (int32_t lane = 0; lane < count; lane++)
        if (!ends_well(&group, lane))
            return DECLINED;
    return DECODED;
#else
    (void)files, (void)lengths, (void)count, (void)height, (void)width, (void)scratch, (void)scratch_bytes;
    (void)reduced, (void)images, (void)level;
    return DECLINED;
#endif
}
