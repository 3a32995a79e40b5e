/* Restart tables (FORMAT.md): the lengths of a scan's runs, and a region cut out of a JPEG by its table: `_lengths` and
 * `_cut` of shards/jpeg.py in C, byte for byte. */
#include "kernels.h"

#include <string.h>

static void put_big16(uint8_t *at, int32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static int32_t smaller(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

/* raw: a file of `length` bytes, an image of (height, width) px. The box is (y, x, h, w) px. Writes at most `length`
 * bytes to `out` and returns their number, with the part's top and left in `corner`. 0 where the file has no restart
 * table or one that does not fit it, or the box is not inside the image or needs more than the share `worth` of all
 * runs. */
int64_t dermscale_cut(const uint8_t *raw, int64_t length, int32_t height, int32_t width, int32_t y, int32_t x,
                      int32_t h, int32_t w, double worth, uint8_t *out, int32_t *corner)
{
    if (length < LENGTHS || memcmp(raw + APP0_END + 4, "DSRST1", 7) != 0 || y < 0 || x < 0 || h < 1 || w < 1 ||
        h > height || w > width || y > height - h || x > width - w)
        return 0;
    const int32_t block_height = raw[FIELDS], run_width = raw[FIELDS + 1] * big16(raw + FIELDS + 2);
    const int32_t sof = big16(raw + FIELDS + 4), scan = big16(raw + FIELDS + 6);
    if (!block_height || !run_width || scan < sof + 9)
        return 0;
    const int32_t rows = (height + block_height - 1) / block_height, columns = (width + run_width - 1) / run_width;
    /* One pixel more on each side: libjpeg's triangle filter mixes the nearest chroma sample beyond a pixel into it. */
    const int32_t row0 = (y > 0 ? y - 1 : 0) / block_height, row1 = smaller(y + h, height - 1) / block_height + 1;
    const int32_t column0 = (x > 0 ? x - 1 : 0) / run_width, column1 = smaller(x + w, width - 1) / run_width + 1;
    const int64_t end = LENGTHS + (int64_t)2 * rows * columns; /* of the segment */
    if ((double)(row1 - row0) * (column1 - column0) > worth * rows * columns || end + scan > length)
        return 0;

    uint8_t *to = out;
    memcpy(to, raw, APP0_END);
    memcpy(to + APP0_END, raw + end, (size_t)scan);
    put_big16(to + APP0_END + sof + 5, smaller(row1 * block_height, height) - row0 * block_height);
    put_big16(to + APP0_END + sof + 7, smaller(column1 * run_width, width) - column0 * run_width);
    to += APP0_END + scan;

    const uint8_t *lengths = raw + LENGTHS;
    int64_t from = end + scan;
    int32_t number = 0;
    for (int32_t row = 0; row < row1; row++) {
        int64_t start = from, bytes = 0;
        for (int32_t column = 0; column < columns; column++, lengths += 2) {
            int32_t run = lengths[0] | lengths[1] << 8;
            start += column < column0 ? run : 0;
            bytes += column >= column0 && column < column1 ? run : 0;
            from += run;
        }
        if (row < row0)
            continue;
        if (from > length || bytes == 0)
            return 0;
        memcpy(to, raw + start, (size_t)bytes);
        const uint8_t *kept = lengths - 2 * (columns - column0);
        for (int32_t column = column0; column < column1; column++, kept += 2, number++) {
            to += kept[0] | kept[1] << 8;
            to[-1] = (uint8_t)(0xD0 + (number & 7)); /* each run ends in a marker; here they count anew */
        }
    }
    to[-1] = 0xD9; /* the last run ends the image (EOI) */
    corner[0] = row0 * block_height;
    corner[1] = column0 * run_width;
    return to - out;
}

/* scan: the entropy-coded bytes of a JPEG with restart markers, EOI included. Writes the length of each run in bytes,
 * the marker behind it included, and returns their number; 0 where there are more than `most` or a length takes more
 * than 16 bits. */
int64_t dermscale_run_lengths(const uint8_t *scan, int64_t length, uint16_t *lengths, int64_t most)
{
    const uint8_t *at = scan, *from = scan, *end = scan + length - 2; /* where EOI stands */
    int64_t runs = 0;
    while (from <= end) {
        while (at < end && (at = memchr(at, 0xFF, (size_t)(end - at))) && (at[1] & 0xF8) != 0xD0)
            at++;
        if (!at || at > end)
            at = end;
        const int64_t run = at + 2 - from;
        if (runs == most || run > 0xFFFF)
            return 0;
        lengths[runs++] = (uint16_t)run;
        from = at += 2;
    }
    return runs;
}
