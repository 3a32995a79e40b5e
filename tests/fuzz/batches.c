/* Gives batches of damaged payloads, index rows and boxes to the threads of workers.c, for kernels.c. The threads can
 * be run at each level, and lose a file while they read it. */
#define _GNU_SOURCE
#include "inputs.h"

#include <math.h>
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#define ROWS 24                /* of the index, and most samples of a batch */
#define LOST_FILE ROWS         /* shards behind those of the rows: a file that has become shorter, */
#define ENDING_FILE (ROWS + 1) /* one that becomes shorter while it is decoded, */
#define SHARDS (ROWS + 2)
#define FILE_BYTES 16384

int32_t told_level;

int32_t __wrap_dermscale_resample_level(void)
{
    return told_level;
}

int32_t __wrap_dermscale_decode_level(void)
{
    const int32_t level = __real_dermscale_decode_level();
    return level < told_level ? level : told_level;
}

/* A mapped file that has become shorter, and one that does so as soon as its checksum has been compared. */
const uint8_t *lost;
static struct {
    uint8_t *mapped;
    int fd;
} ending;

int32_t __wrap_dermscale_decode_box(const uint8_t *file, int64_t length, int32_t height, int32_t width, int32_t y,
                                    int32_t x, int32_t h, int32_t w, uint8_t *scratch, int64_t scratch_bytes,
                                    const uint8_t **pixels, int64_t *stride, int32_t level)
{
    if (file == ending.mapped && ftruncate(ending.fd, 0))
        FAIL("a file cannot be made shorter");
    return __real_dermscale_decode_box(file, length, height, width, y, x, h, w, scratch, scratch_bytes, pixels, stride,
                                       level);
}

int64_t __wrap_dermscale_cut(const uint8_t *raw, int64_t length, int32_t height, int32_t width, int32_t y, int32_t x,
                             int32_t h, int32_t w, double worth, uint8_t *out, int32_t *corner)
{
    if (raw == ending.mapped && ftruncate(ending.fd, 0))
        FAIL("a file cannot be made shorter");
    return __real_dermscale_cut(raw, length, height, width, y, x, h, w, worth, out, corner);
}

/* An engine at each level, and the index and shards that it reads. */
struct bench {
    struct engine *engine;
    struct row *rows;
    const uint8_t **shards;
    int64_t *sizes;
    int32_t level, cubic;
};
static struct bench benches[LEVELS];

static uint8_t *map_file(int *fd)
{
    *fd = memfd_create("shard", 0);
    if (*fd < 0 || ftruncate(*fd, FILE_BYTES))
        FAIL("no file in memory");
    uint8_t *const mapped = mmap(NULL, FILE_BYTES, PROT_READ, MAP_SHARED, *fd, 0);
    if (mapped == MAP_FAILED)
        FAIL("a file cannot be mapped");
    return mapped;
}

static void open_bench(struct bench *to, int32_t level)
{
    to->rows = calloc(ROWS, sizeof *to->rows);
    to->shards = calloc(SHARDS, sizeof *to->shards);
    to->sizes = calloc(SHARDS, sizeof *to->sizes);
    to->shards[LOST_FILE] = lost;
    to->shards[ENDING_FILE] = ending.mapped;
    to->sizes[LOST_FILE] = to->sizes[ENDING_FILE] = FILE_BYTES;
    told_level = to->level = level;
    to->cubic = (int32_t)draw(2);
    to->engine = dermscale_engine_open(to->rows, ROWS, to->shards, to->sizes, SHARDS, 1 + (int32_t)draw(3), to->cubic);
    if ((to->engine != NULL) != (level > 0))
        WRONG("an engine at level %d", level);
}

static void close_bench(struct bench *of)
{
    if (of->engine)
        dermscale_engine_close(of->engine);
    free(of->rows);
    free(of->shards);
    free(of->sizes);
    memset(of, 0, sizeof *of);
}

void open_benches(void)
{
    int lost_fd;
    lost = map_file(&lost_fd);
    ending.mapped = map_file(&ending.fd);
    if (ftruncate(lost_fd, 0))
        FAIL("a file cannot be made shorter");
    for (int32_t level = 0; level <= __real_dermscale_resample_level(); level++)
        open_bench(benches + level, level);
}

void close_benches(void)
{
    for (int32_t level = 0; level < LEVELS; level++)
        close_bench(benches + level);
}

/* A batch, as it is submitted. */
struct request {
    int32_t result, side;
    double worth;
    int64_t *samples, *places, (*found)[3];
    int32_t *boxes, *status;
    uint8_t *symmetry, *out;
};

/* What must become of a sample of a batch, found out slowly. On LOADED what was made of it is compared, too. */
static int32_t right_status(const struct bench *of, const struct request *in, int64_t place,
                            const struct payload *payload)
{
    const int64_t sample = in->samples[place];
    if (sample < 0 || sample >= ROWS)
        return OUTSIDE;
    const struct row *const row = of->rows + sample;
    if (row->shard >= SHARDS || !of->shards[row->shard] ||
        (unsigned __int128)row->offset + row->length > (unsigned __int128)of->sizes[row->shard])
        return OUTSIDE;
    if (row->length < XXH3_LEAST)
        return LEFT;
    if (row->shard == LOST_FILE || row->shard == ENDING_FILE)
        return LOST;
    const uint8_t *const bytes = of->shards[row->shard] + row->offset;
    if (dermscale_xxh3(bytes, row->length, 0) != row->xxh3)
        return OTHER_CHECKSUM;
    const int32_t all[4] = {0, 0, row->height, row->width}, *const box = in->boxes ? in->boxes + 4 * place : all;
    const int64_t whole = (int64_t)row->height * row->width * 3;
    int64_t stride = (int64_t)row->width * 3;
    if (!is_inside(box, row->height, row->width) || (row->raw && whole > row->length))
        return OTHER_SIZE;
    const uint8_t *const made = in->result == CROPS ? in->out + place * in->side * in->side * 3
                                                    : in->out + in->places[place];
    if (in->result == PAYLOADS && !row->raw) {
        int32_t corner[2] = {0, 0};
        uint8_t *const cut = exactly(NULL, row->length);
        int64_t size = __real_dermscale_cut(bytes, row->length, row->height, row->width, box[0], box[1], box[2], box[3],
                                            in->worth, cut, corner);
        const uint8_t *const right = size ? cut : bytes;
        size = size ? size : row->length;
        const int64_t found[3] = {size, size == row->length ? 0 : corner[0], size == row->length ? 0 : corner[1]};
        if (memcmp(found, in->found[place], sizeof found) != 0 || memcmp(made, right, (size_t)size) != 0)
            WRONG("another payload");
        free(cut);
        return LOADED;
    }
    const uint8_t *pixels;
    if (row->raw) {
        pixels = bytes + row->length - whole + box[0] * stride + (int64_t)box[1] * 3;
    } else {
        const struct payload stored = {.of = payload->of, .bytes = (uint8_t *)(uintptr_t)bytes, .length = row->length,
                                       .height = row->height, .width = row->width};
        pixels = decode_box(&stored, box, 1, &stride);
        decoded += pixels != NULL;
        if (!pixels)
            return LEFT;
    }
    if (in->result == CROPS) {
        if (!is_resized(pixels, stride, box[2], box[3], 3, in->side, of->cubic, in->symmetry[place], made))
            WRONG("a loaded sample has other pixels");
        return LOADED;
    }
    for (int32_t k = 0; k < box[2]; k++)
        if (memcmp(made + (int64_t)k * box[3] * 3, pixels + k * stride, (size_t)box[3] * 3) != 0)
            WRONG("a loaded image has other pixels");
    const int64_t found[3] = {(int64_t)box[2] * box[3] * 3, 0, 0};
    if (in->result == PAYLOADS && memcmp(found, in->found[place], sizeof found) != 0)
        WRONG("another size of a payload");
    return LOADED;
}

/* Write a damaged row of the index. */
static void damage_row(struct row *row)
{
    switch (draw(9)) {
    case 0:
        row->shard = one_in(2) ? SHARDS : UINT32_MAX - (uint32_t)draw(2);
        break;
    case 1:
        row->offset = one_in(2) ? (uint64_t)draw(1 << 14) : UINT64_MAX - (uint64_t)draw(1 << 14);
        break;
    case 2:
        row->length = one_in(2) ? (uint32_t)draw(1 << 14) : UINT32_MAX - (uint32_t)draw(2);
        break;
    case 3:
        row->length += 1 - 2 * (uint32_t)draw(2);
        break;
    case 4:
        row->height = (uint16_t)(one_in(4) ? draw(65536) : draw(MOST_SIDE));
        break;
    case 5:
        row->width = (uint16_t)(one_in(4) ? draw(65536) : draw(MOST_SIDE));
        break;
    case 6:
        row->height = row->width = (uint16_t)(one_in(2) ? 65535 : 0);
        break;
    case 7:
        row->raw = (uint8_t)draw(3);
        break;
    default:
        row->shard = LOST_FILE;
        row->offset = (uint64_t)draw(FILE_BYTES / 2);
        row->length = XXH3_LEAST + (uint32_t)draw(2000);
    }
}

#define GAP 64           /* bytes between what is made of two samples, which may not be written */
#define MOST_MADE 300000 /* bytes that are made of a sample here; only a damaged index asks for more */

/* Make the arrays of a batch's result. */
static void make_room(struct request *to, const struct bench *of, int64_t count)
{
    const int is_crops = to->result == CROPS;
    int64_t at = 0, most[ROWS];
    to->places = is_crops ? NULL : exactly(NULL, 8 * count);
    to->found = to->result == PAYLOADS ? exactly(NULL, 24 * count) : NULL;
    for (int64_t k = 0; k < count; k++) {
        const int64_t sample = to->samples[k];
        const struct row *const row = of->rows + (sample >= 0 && sample < ROWS ? sample : 0);
        most[k] = is_crops ? 3 * (int64_t)to->side * to->side
                           : to->result == IMAGES ? 3 * (int64_t)row->height * row->width : row->length;
        most[k] = most[k] < MOST_MADE ? most[k] : MOST_MADE;
        if (!is_crops)
            to->places[k] = at;
        at += is_crops ? most[k] : (most[k] + GAP + 7) / 8 * 8;
    }
    to->out = exactly(NULL, at);
    for (int64_t k = 0; k < count && !is_crops; k++)
        ASAN_POISON_MEMORY_REGION(to->out + to->places[k] + most[k], GAP);
}

/* Store a payload in a shard of its own, and write its row of the index. Returns the shard's memory. */
static uint8_t *store(struct bench *bench, int32_t number, const struct payload *of, int *is_ending)
{
    struct row *const row = bench->rows + number;
    const int bad_row = one_in(8);
    const int64_t before = draw(70), behind = one_in(4) ? draw(70) : 0, bytes = before + of->length + behind;
    uint8_t *const block = exactly(NULL, bytes);
    fill(block, before);
    memcpy(block + before, of->bytes, (size_t)of->length);
    fill(block + before + of->length, behind);
    bench->shards[number] = block;
    bench->sizes[number] = bytes;
    *row = (struct row){.offset = (uint64_t)before, .length = (uint32_t)of->length, .shard = (uint32_t)number,
                        .height = (uint16_t)of->height, .width = (uint16_t)of->width, .raw = (uint8_t)of->raw};
    if (bad_row) {
        damage_row(row);
    } else if (!*is_ending && of->sound && of->of->table && !of->raw && of->length < FILE_BYTES && one_in(4)) {
        *is_ending = 1;
        if (ftruncate(ending.fd, FILE_BYTES) || pwrite(ending.fd, of->bytes, (size_t)of->length, 0) != of->length)
            FAIL("a file cannot be written");
        row->shard = ENDING_FILE;
        row->offset = 0;
    }
    const uint64_t size = row->shard < SHARDS ? (uint64_t)bench->sizes[row->shard] : 0;
    if (row->shard == ENDING_FILE)
        row->xxh3 = dermscale_xxh3(of->bytes, of->length, 0);
    else if (row->shard == (uint32_t)number && row->offset <= size && row->length <= size - row->offset &&
             row->length >= XXH3_LEAST && !one_in(40))
        row->xxh3 = dermscale_xxh3(block + row->offset, row->length, 0);
    if (!bad_row) {
        ASAN_POISON_MEMORY_REGION(block, (size_t)before);
        ASAN_POISON_MEMORY_REGION(block + before + of->length, (size_t)behind);
    }
    return block;
}

/* What a drawn batch needs beside its request. */
struct order {
    struct source source;
    struct drawn to;
    uint64_t epoch;
    int64_t *positions, *wanted; /* wanted: the samples at these positions */
    int64_t *samples, *labels;   /* of the source */
};

static struct order some_order(const struct request *in, int64_t count)
{
    struct order order = {.epoch = (uint64_t)draw(100)};
    order.samples = exactly(in->samples, 8 * count);
    order.labels = exactly(in->samples, 8 * count); /* any numbers */
    order.positions = exactly(NULL, 8 * count);
    order.wanted = exactly(NULL, 8 * count);
    for (int64_t k = 0; k < count; k++) { /* each sample once: its payload is at its place */
        const int outside = one_in(60);
        order.positions[k] = !outside ? k : one_in(2) ? count + draw(9) : -1 - draw(INT64_MAX);
        order.wanted[k] = outside ? -1 : in->samples[k];
    }
    memset(in->samples, 0, (size_t)(8 * count));
    order.source = (struct source){.samples = order.samples, .labels = order.labels, .count = count,
                                   .augment = &corpus.augment, .seed = (uint64_t)draw(INT64_MAX), .train = draw(2)};
    order.to = (struct drawn){.images = in->out, .samples = in->samples, .labels = exactly(NULL, 8 * count),
                              .boxes = in->boxes, .symmetry = in->symmetry, .colour = exactly(NULL, 48 * count),
                              .status = in->status};
    return order;
}

static void check_plan(const struct bench *of, const struct order *order, const struct request *in, int64_t place)
{
    const int64_t sample = in->samples[place];
    if (sample != order->wanted[place] || order->to.labels[place] != sample)
        WRONG("another sample was drawn");
    if (sample < 0 || sample >= ROWS || !of->rows[sample].height || !of->rows[sample].width)
        return;
    const int32_t *const box = in->boxes + 4 * place;
    if (!is_inside(box, of->rows[sample].height, of->rows[sample].width) || in->symmetry[place] > 7)
        WRONG("a plan outside the image");
    for (int64_t k = 12 * place; k < 12 * place + 12; k++)
        if (!isfinite(order->to.colour[k]))
            WRONG("a colour that is no number");
}

static void free_order(struct order *order)
{
    free(order->samples);
    free(order->labels);
    free(order->positions);
    free(order->wanted);
    free(order->to.labels);
    free(order->to.colour);
}

/* A batch for the threads. */
int64_t try_batch(void)
{
    struct bench *const bench = benches + 1 + draw(LEVELS - 1);
    if (!bench->engine)
        return 1;
    const int64_t count = 1 + draw(ROWS), cancelled = one_in(10), drawn = one_in(3);
    struct request in = {.result = drawn || one_in(2) ? CROPS : 1 + (int32_t)draw(RESULTS - 1)};
    struct payload payloads[ROWS];
    uint8_t *blocks[ROWS];
    int is_ending = 0;
    in.worth = (double)draw(101) / 100;
    in.side = in.result == CROPS ? 1 + (int32_t)draw(one_in(10) ? 90 : 20) : 0;
    in.samples = exactly(NULL, 8 * count);
    in.boxes = in.result == IMAGES ? NULL : exactly(NULL, 16 * count);
    in.symmetry = in.result == CROPS ? exactly(NULL, count) : NULL;
    in.status = exactly(NULL, 4 * count);
    for (int32_t k = 0; k < count; k++) {
        payloads[k] = some_payload();
        blocks[k] = store(bench, k, payloads + k, &is_ending);
        if (in.boxes) {
            some_box(payloads[k].height, payloads[k].width, in.boxes + 4 * k);
            if (bench->rows[k].shard == ENDING_FILE) /* any box inside the image */
                memcpy(in.boxes + 4 * k, payloads[k].of->box, 4 * sizeof *in.boxes);
        }
        in.samples[k] = one_in(60) ? (one_in(2) ? ROWS : -1 - draw(INT64_MAX)) : k;
        if (in.symmetry)
            in.symmetry[k] = (uint8_t)draw(one_in(8) ? 256 : 8);
        in.status[k] = -1;
    }
    make_room(&in, bench, count);
    struct order order = {.source = {0}};
    if (drawn)
        order = some_order(&in, count);
    struct batch *const batch =
        drawn ? dermscale_batch_draw(bench->engine, &order.source, order.epoch, order.positions, count, in.side,
                                     &order.to)
              : dermscale_batch_submit(bench->engine, in.result, in.samples, in.boxes, in.symmetry, count, in.side,
                                       in.worth, in.out, in.places, in.found, in.status);
    if (!batch)
        WRONG("no memory for a batch");
    if (cancelled)
        dermscale_batch_cancel(bench->engine, batch);
    dermscale_batch_wait(bench->engine, batch);
    if (!dermscale_batch_done(bench->engine, batch))
        WRONG("a batch that was waited for is not done");
    dermscale_batch_free(batch);
    for (int64_t k = 0; k < count; k++) {
        if (in.status[k] == -1 && cancelled)
            continue;
        if (drawn)
            check_plan(bench, &order, &in, k);
        const int32_t right = right_status(bench, &in, k, payloads + k);
        if (in.status[k] != right)
            WRONG("sample %lld of a batch has the status %d instead of %d", (long long)k, in.status[k], right);
    }
    for (int64_t k = 0; k < count; k++) {
        free(payloads[k].bytes);
        free(blocks[k]);
        bench->shards[k] = NULL;
        bench->sizes[k] = 0;
    }
    if (drawn)
        free_order(&order);
    free(in.samples);
    free(in.boxes);
    free(in.status);
    free(in.symmetry);
    free(in.out);
    free(in.places);
    free(in.found);
    if (one_in(200)) {
        close_bench(bench);
        open_bench(bench, (int32_t)(bench - benches));
    }
    return count;
}
