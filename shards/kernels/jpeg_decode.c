/* Decodes a box of a JPEG with a restart table (FORMAT.md). The pixels are those of libjpeg-turbo's accurate decoder.
 *
 * It takes the files that shards/jpeg.py writes: baseline (ITU-T T.81), 8 bit, YCbCr in 4:4:4, 4:2:2 or 4:2:0, one
 * scan. All other files are DECLINED, and need a general decoder. It is faster than a general decoder because only the
 * runs under the box are decoded, LANES at the same time (jpeg_lanes.h).
 *
 * Nothing is read outside the file or written outside the scratch memory, whatever the bytes are. A run's bits are
 * copied to scratch memory.
 */
#include "jpeg_lanes.h"

#include <string.h>

#define MOST_HEAD 2048   /* bytes of the headers behind the restart table */
#define MOST_INTERVAL 16 /* MCUs in a run; shards/jpeg.py aims at 4 */
#define MOST_RUN 0xFFFF  /* bytes */

struct scratch {
    struct head head;        /* all files of a shard set have the same headers, so they are read once */
    uint8_t text[MOST_HEAD]; /* the headers */
    int16_t coefficients[(ROW + 1) * LANES * ROW] __attribute__((aligned(64))); /* the last row: values of no place */
    uint8_t runs[LANES][MOST_RUN + SLACK];
};

/* Whether the headers are those that were read last, but for the image's height and width. */
static int32_t same_head(const struct scratch *own, const uint8_t *text, int32_t bytes, int32_t frame)
{
    return own->head.bytes == bytes && own->head.frame == frame && memcmp(own->text, text, (size_t)frame + 5) == 0 &&
           memcmp(own->text + frame + 9, text + frame + 9, (size_t)(bytes - frame - 9)) == 0;
}

/* Read the headers, which are `bytes` long and have SOF0 at `frame`, unless they are those that were read last. */
static int32_t read_head(struct scratch *own, const uint8_t *text, int32_t bytes, int32_t frame)
{
    if (same_head(own, text, bytes, frame))
        return DECODED;
    if (dermscale_read_head(&own->head, text, bytes, 0) || own->head.bytes != bytes || own->head.frame != frame) {
        own->head.bytes = 0;
        return DECLINED;
    }
    memcpy(own->text, text, (size_t)bytes);
    return DECODED;
}

static int32_t decode_group_plain(struct group *group, int32_t mcus, int16_t *coefficients)
{
    return decode_mcus(group, 1, mcus, coefficients, 0);
}

#ifdef X86
TARGET_BMI2 static int32_t decode_group_bmi2(struct group *group, int32_t mcus, int16_t *coefficients, int32_t level)
{
    return decode_mcus(group, 1, mcus, coefficients, level);
}
#endif

/* Decode LANES runs of `mcus` MCUs. coefficients: zeros before and after. */
static int32_t decode_group(struct group *group, int32_t mcus, int16_t *coefficients, int32_t level)
{
    memset(group->last_dc, 0, sizeof group->last_dc);
    int32_t bad;
#ifdef X86
    if (level >= AVX2)
        bad = decode_group_bmi2(group, mcus, coefficients, level);
    else
#endif
        bad = decode_group_plain(group, mcus, coefficients);
    (void)level;
    for (int32_t lane = 0; lane < LANES && !bad; lane++)
        bad = !ends_well(group, lane);
    return bad ? DECLINED : DECODED;
}

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
    int64_t taken;
    const int64_t copied = copy_bits(from, bytes - 2, readable, to, &taken, level);
    if (copied < 1 || taken != bytes - 2)
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
    if (read_head(own, file + table.head, table.head_bytes, table.frame))
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
    for (int32_t i = 0; i < LANES; i++)
        group.heads[i] = head;
    for (int32_t c = 0; c < 3; c++)
        group.quantisers[c] = head->quantisers[c];
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
        if (decode_group(&group, head->interval, own->coefficients, level))
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
