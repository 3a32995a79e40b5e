/* What the programs of this folder share: random numbers, the images to start from, the kernels that they call, and how
 * a resized image must look. */
#ifndef DERMSCALE_FUZZ_H
#define DERMSCALE_FUZZ_H

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../shards/kernels/kernels.h"

/* The entry points that Python declares (shards/kernels/load.py), and `struct row`, the statuses and results of
 * workers.c. */
struct row {
    uint64_t offset, xxh3;
    uint32_t length, shard;
    uint16_t height, width;
    uint8_t raw, unused[3];
};
enum { LOADED = 0, LEFT = 1, OTHER_CHECKSUM = 2, OTHER_SIZE = 3, OUTSIDE = 4, LOST = 5 };
enum { CROPS = 0, IMAGES = 1, PAYLOADS = 2, RESULTS = 3 };
struct engine;
struct batch;
int32_t dermscale_check(const uint8_t *payload, int64_t length, uint64_t xxh3);
struct engine *dermscale_engine_open(const struct row *rows, int64_t row_count, const uint8_t *const *shards,
                                     const int64_t *sizes, int32_t shard_count, int32_t threads, int32_t cubic);
void dermscale_engine_close(struct engine *engine);
struct batch *dermscale_batch_submit(struct engine *engine, int32_t result, const int64_t *samples,
                                     const int32_t *boxes, const uint8_t *symmetry, int64_t count, int32_t side,
                                     double worth, uint8_t *out, const int64_t *places, int64_t (*found)[3],
                                     int32_t *status);
struct batch *dermscale_batch_draw(struct engine *engine, const struct source *source, uint64_t epoch,
                                   const int64_t *positions, int64_t count, int32_t side, const struct drawn *to);
int32_t dermscale_batch_done(struct engine *engine, const struct batch *batch);
void dermscale_batch_wait(struct engine *engine, const struct batch *batch);
void dermscale_batch_cancel(struct engine *engine, struct batch *batch);
int32_t dermscale_batch_free(struct batch *batch);

#define FAIL(...) (fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), abort())

/* splitmix64 (Steele, Lea and Flood, OOPSLA 2014): a number below `limit`, from a state of one's own. */
static inline int64_t draw_from(uint64_t *state, int64_t limit)
{
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return limit < 2 ? 0 : (int64_t)((z ^ z >> 31) % (uint64_t)limit);
}

/* A JPEG, its right pixels, and a region that was cut out of it. tests/fuzz/run.py writes them. */
struct image {
    int32_t height, width, length; /* px, px, bytes */
    int32_t table;                 /* where the headers behind the restart table start; 0 if there is no table */
    int32_t box[4];                /* y, x, height, width of the region, px */
    int32_t corner[2], cut_length; /* of the file that was cut: top and left, px; bytes, 0 if there is none */
    uint8_t *file, *pixels, *cut;
};

struct corpus {
    struct augment augment;
    int32_t count, whole_count;
    struct image *images, *whole; /* as they are packed; and behind them files without restart markers */
};

static inline void *exactly(const void *from, int64_t bytes)
{
    void *const to = malloc(bytes > 0 ? (size_t)bytes : 1);
    if (!to)
        FAIL("no memory");
    if (from && bytes > 0)
        memcpy(to, from, (size_t)bytes);
    return to;
}

static inline void *read_exactly(FILE *from, int64_t bytes)
{
    void *const to = exactly(NULL, bytes);
    if (fread(to, 1, (size_t)bytes, from) != (size_t)bytes)
        FAIL("the corpus ends early");
    return to;
}

static inline void read_corpus(struct corpus *to, const char *path)
{
    FILE *const from = fopen(path, "rb");
    if (!from || fread(&to->augment, sizeof to->augment, 1, from) != 1 || fread(&to->count, 4, 1, from) != 1 ||
        fread(&to->whole_count, 4, 1, from) != 1)
        FAIL("%s cannot be read", path);
    const int32_t all = to->count + to->whole_count;
    to->images = calloc((size_t)all, sizeof *to->images);
    to->whole = to->images + to->count;
    for (struct image *image = to->images; image < to->images + all; image++) {
        if (fread(image, 11 * sizeof(int32_t), 1, from) != 1)
            FAIL("the corpus ends early");
        image->file = read_exactly(from, image->length);
        image->pixels = read_exactly(from, (int64_t)image->height * image->width * 3);
        image->cut = read_exactly(from, image->cut_length);
    }
    fclose(from);
}

static inline void free_corpus(struct corpus *corpus)
{
    for (struct image *image = corpus->images; image < corpus->whole + corpus->whole_count; image++) {
        free(image->file);
        free(image->pixels);
        free(image->cut);
    }
    free(corpus->images);
}

/* The lines of the source that a line of the result is mixed of, as resample.c says, and their weights in 1 / 2^bits.
 * Returns their number. */
static inline int32_t source_lines(int32_t line, int32_t size, int32_t side, int32_t cubic, int32_t bits,
                                   int64_t *places, int64_t *weights)
{
    const int64_t at = (2 * (int64_t)line + 1) * size - side, unit = 2 * (int64_t)side, one = (int64_t)1 << bits;
    const int64_t low = at < 0 ? -1 : at / unit, after = (((at - low * unit) << bits) + side) / unit;
    const int64_t before = one - after, product = (before * after + one / 2) >> bits;
    const int64_t first = (product * before + one) >> (bits + 1), last = (product * after + one) >> (bits + 1);
    const int64_t four[4] = {-first, before + 2 * first - last, after + 2 * last - first, -last};
    const int32_t lines = cubic ? 4 : 2;
    for (int32_t k = 0; k < lines; k++) {
        const int64_t place = low + k - lines / 2 + 1;
        places[k] = place < 0 ? 0 : place < size ? place : size - 1;
        weights[k] = cubic ? four[k] : k ? after : before;
    }
    return lines;
}

/* The result of `dermscale_resample`, one value after the other: does out (side, side, 3) equal it? */
static inline int is_resized(const uint8_t *source, int64_t stride, int32_t height, int32_t width, int32_t channels,
                             int32_t side, int32_t cubic, int32_t symmetry, const uint8_t *out)
{
    const int32_t row_bits = cubic ? 14 : 15;
    for (int32_t line = 0; line < side; line++) {
        int64_t rows[4], columns[4], of_rows[4], of_columns[4];
        const int32_t lines = source_lines(line, height, side, cubic, row_bits, rows, of_rows);
        for (int32_t column = 0; column < side; column++) {
            source_lines(column, width, side, cubic, 14, columns, of_columns);
            int32_t i = symmetry & 4 ? column : line, j = symmetry & 4 ? line : column;
            i = symmetry & 2 ? side - 1 - i : i;
            j = symmetry & 1 ? side - 1 - j : j;
            const uint8_t *const found = out + ((int64_t)i * side + j) * 3;
            for (int32_t c = 0; c < 3; c++) {
                int64_t sum = 1 << 19;
                for (int32_t k = 0; k < lines; k++) {
                    int64_t mixed = 1 << (row_bits - 7);
                    for (int32_t r = 0; r < lines; r++)
                        mixed += source[rows[r] * stride + columns[k] * channels + c] * of_rows[r];
                    sum += (mixed >> (row_bits - 6)) * of_columns[k];
                }
                sum >>= 20;
                if (found[c] != (sum < 0 ? 0 : sum > 255 ? 255 : sum))
                    return 0;
            }
        }
    }
    return 1;
}

#endif
