/* Threads that load batches into a buffer: they verify the checksum of each sample, and then make of it what the batch
 * asks for (`enum result`). They live as long as their engine and never touch Python, so work goes on whoever holds
 * Python's lock. Python submits a batch in one call, and waits for it in another.
 *
 * What these threads cannot decode (files of other packers, damaged ones) they leave to Python, sample by sample: each
 * sample has a status. */
#define _GNU_SOURCE
#include "kernels.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define TOGETHER 4   /* samples that a thread takes at once: taking costs a lock */
#define COLD_FOR 16  /* batches after a page that was not in memory, whose pages are asked for ahead of use */

/* A row of the index, as shards/kernels/workers.py lays it out. */
struct row {
    uint64_t offset, xxh3;   /* of the payload: its first byte in the shard; its checksum */
    uint32_t length, shard;  /* bytes of the payload; number of the shard */
    uint16_t height, width;  /* px */
    uint8_t raw, unused[3];  /* 1 for a .npy payload, 0 for a JPEG */
};

/* What became of a sample. */
enum { LOADED = 0, LEFT = 1, OTHER_CHECKSUM = 2, OTHER_SIZE = 3, OUTSIDE = 4, LOST = 5 };

/* What is made of the samples of a batch:
 * CROPS: the box of each, resized to (side, side) and turned: out is (count, side, side, 3).
 * IMAGES: all pixels of each, (height, width, 3) from out + places[i] on.
 * PAYLOADS: a JPEG file with the box (the packed one, or a part of it), or the pixels of a raw sample's box, from
 * out + places[i] on: at most as many bytes as the packed payload. found[i]: their number, and where in the image the
 * first row and column of the part are. */
enum result { CROPS = 0, IMAGES = 1, PAYLOADS = 2 };

struct batch {
    struct batch *next;
    const int64_t *samples;  /* numbers of rows */
    const int32_t *boxes;    /* y, x, height, width of each */
    const uint8_t *symmetry;
    const struct source *source; /* NULL, or what the threads plan the samples from before they load them */
    struct drawn plan;
    uint64_t epoch;
    uint8_t *out;
    const int64_t *places;
    int64_t (*found)[3];
    int32_t *status;
    int64_t count, taken, done;
    int32_t incomplete;      /* whether a sample has another status than LOADED */
    double worth;            /* PAYLOADS: a part is cut out where it has at most this share of the image */
    int32_t side;
    enum result result;
};

struct engine {
    pthread_mutex_t lock;
    pthread_cond_t work, finished;
    struct batch *first, *last; /* those with samples that no thread has taken */
    const struct row *rows;
    const uint8_t *const *shards; /* the first byte of each, NULL where it is not mapped */
    const int64_t *sizes;
    int64_t row_count;
    int32_t shard_count, cubic, level, decode_level, threads, stopping;
    int32_t cold;               /* batches whose pages are still asked for ahead of use */
    int64_t page;               /* bytes */
    pthread_t *ids;
};

/* A mapped file that was truncated since has pages that cannot be read: the system sends SIGBUS to the thread that tries.
 * While this library reads a payload, the signal leads back to where it began; at any other time it goes where it went
 * before. */
static __thread sigjmp_buf *volatile way_back;
static struct sigaction handled_before;

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    if (way_back)
        siglongjmp(*way_back, 1);
    if (handled_before.sa_flags & SA_SIGINFO)
        handled_before.sa_sigaction(number, info, context);
    else if (handled_before.sa_handler != SIG_DFL && handled_before.sa_handler != SIG_IGN)
        handled_before.sa_handler(number);
    else
        signal(SIGBUS, SIG_DFL); /* the same instruction fails again, and ends the process as it would have */
}

static void handle_bus_errors(void)
{
    struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &handled_before);
}

static void handle_bus_errors_once(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, handle_bus_errors);
}

/* Compare the checksum of a mapped payload: LOADED where it is `xxh3`, OTHER_CHECKSUM, LEFT for one that is too short
 * for this library, or LOST where the file has become shorter. */
int32_t dermscale_check(const uint8_t *payload, int64_t length, uint64_t xxh3)
{
    if (length < XXH3_LEAST)
        return LEFT;
    handle_bus_errors_once();
    sigjmp_buf here;
    if (sigsetjmp(here, 0)) {
        way_back = NULL;
        return LOST;
    }
    way_back = &here;
    const uint64_t found = dermscale_xxh3(payload, length, dermscale_resample_level());
    way_back = NULL;
    return found == xxh3 ? LOADED : OTHER_CHECKSUM;
}

/* Memory of one thread between the payload and the batch. */
struct scratch {
    uint8_t *decode, *resample;
    int64_t decode_bytes, resample_bytes;
};

/* Have at least `bytes`, all zero where they are new. Returns 0 if there is no such memory. */
static int reserve(uint8_t **memory, int64_t *have, int64_t bytes)
{
    if (*have >= bytes)
        return 1;
    free(*memory);
    *memory = calloc(1, (size_t)bytes);
    *have = *memory ? bytes : 0;
    return *memory != NULL;
}

/* The row of a sample whose payload lies within its shard, and the payload; NULL for all others. */
static const struct row *row_of(const struct engine *engine, int64_t sample, const uint8_t **payload)
{
    if (sample < 0 || sample >= engine->row_count)
        return NULL;
    const struct row *row = engine->rows + sample;
    if (row->shard >= (uint32_t)engine->shard_count || !engine->shards[row->shard])
        return NULL;
    const uint64_t size = (uint64_t)engine->sizes[row->shard];
    if (row->offset > size || row->length > size - row->offset)
        return NULL;
    *payload = engine->shards[row->shard] + row->offset;
    return row;
}

/* The box (y, x, h, w) of a sample's pixels; `stride` bytes from row to row. */
static int32_t decode(const struct engine *engine, struct scratch *scratch, const struct row *row,
                      const uint8_t *payload, const int32_t *box, const uint8_t **pixels, int64_t *stride)
{
    if (row->raw) {
        *stride = (int64_t)row->width * 3;
        *pixels = payload + row->length - *stride * row->height + box[0] * *stride + box[1] * 3;
        return LOADED;
    }
    if (!engine->decode_level) /* plain C is slower than libjpeg-turbo */
        return LEFT;
    if (!reserve(&scratch->decode, &scratch->decode_bytes, dermscale_decode_scratch(row->height, row->width)))
        return LEFT;
    const int32_t declined =
        dermscale_decode_box(payload, row->length, row->height, row->width, box[0], box[1], box[2], box[3],
                             scratch->decode, scratch->decode_bytes, pixels, stride, engine->decode_level);
    return declined ? LEFT : LOADED;
}

static void copy_rows(const uint8_t *from, int64_t stride, int32_t rows, int64_t bytes, uint8_t *to)
{
    for (int32_t row = 0; row < rows; row++)
        memcpy(to + row * bytes, from + row * stride, (size_t)bytes);
}

static int32_t load(const struct engine *engine, struct scratch *scratch, const struct batch *batch, int64_t place)
{
    const uint8_t *payload, *pixels;
    const struct row *row = row_of(engine, batch->samples[place], &payload);
    if (!row)
        return OUTSIDE;
    if (row->length < XXH3_LEAST || (batch->result == CROPS && !batch->side))
        return LEFT;
    if (dermscale_xxh3(payload, row->length, engine->level) != row->xxh3)
        return OTHER_CHECKSUM;
    const int32_t height = row->height, width = row->width, whole[4] = {0, 0, height, width};
    const int32_t *box = batch->boxes ? batch->boxes + 4 * place : whole;
    const int32_t y = box[0], x = box[1], h = box[2], w = box[3];
    if (y < 0 || x < 0 || h < 1 || w < 1 || h > height || w > width || y > height - h || x > width - w)
        return OTHER_SIZE;
    if (row->raw && (int64_t)height * width * 3 > row->length)
        return OTHER_SIZE;

    int64_t stride;
    if (batch->result == PAYLOADS) {
        uint8_t *const to = batch->out + batch->places[place];
        int64_t *const found = batch->found[place];
        found[1] = found[2] = 0;
        if (row->raw) {
            decode(engine, scratch, row, payload, box, &pixels, &stride);
            copy_rows(pixels, stride, h, found[0] = (int64_t)w * 3, to);
            found[0] *= h;
            return LOADED;
        }
        int32_t corner[2] = {0, 0};
        found[0] = dermscale_cut(payload, row->length, height, width, y, x, h, w, batch->worth, to, corner);
        if (found[0] == 0) {
            memcpy(to, payload, row->length);
            found[0] = row->length;
        } else {
            found[1] = corner[0];
            found[2] = corner[1];
        }
        return LOADED;
    }
    const int32_t status = decode(engine, scratch, row, payload, box, &pixels, &stride);
    if (status != LOADED)
        return status;
    if (batch->result == IMAGES) {
        copy_rows(pixels, stride, h, (int64_t)w * 3, batch->out + batch->places[place]);
        return LOADED;
    }
#ifdef X86
    if (!reserve(&scratch->resample, &scratch->resample_bytes, dermscale_scratch_bytes(w, batch->side)))
        return LEFT;
    dermscale_resample(pixels, stride, h, w, 3, batch->side, engine->cubic, batch->symmetry[place],
                       batch->out + place * 3 * batch->side * batch->side, scratch->resample, engine->level);
    return LOADED;
#else
    return LEFT;
#endif
}

/* The plan of a drawn sample, where there is such a sample. */
static void plan(const struct engine *engine, const struct batch *batch, int64_t place)
{
    const struct source *source = batch->source;
    const struct drawn *to = &batch->plan;
    const int64_t sample = batch->samples[place];
    if (sample < 0 || sample >= engine->row_count)
        return;
    const struct row *row = engine->rows + sample;
    int32_t *const box = to->boxes + 4 * place;
    uint8_t *const symmetry = to->symmetry + place;
    float *const colour = to->colour + 12 * place;
    if (!row->height || !row->width)
        memset(box, 0, 4 * sizeof *box); /* no plan has such an image: it gets its error for the box */
    else if (source->train)
        dermscale_plan_sample(source->seed, batch->epoch, (uint64_t)sample, row->height, row->width, source->augment,
                              box, symmetry, colour);
    else
        dermscale_evaluation_sample(row->height, row->width, source->augment, box, symmetry, colour);
}

static int32_t load_or_lose(const struct engine *engine, struct scratch *scratch, const struct batch *batch,
                            int64_t place)
{
    sigjmp_buf here;
    if (sigsetjmp(here, 0)) {
        way_back = NULL;
        return LOST;
    }
    way_back = &here;
    const int32_t status = load(engine, scratch, batch, place);
    way_back = NULL;
    return status;
}

/* Ask the system to read the payloads of `count` samples now: it then reads many at once, and not one after the other as
 * the threads come to them. */
static void ask_for_pages(const struct engine *engine, const int64_t *samples, int64_t count)
{
    for (int64_t place = 0; place < count; place++) {
        const uint8_t *payload;
        const struct row *row = row_of(engine, samples[place], &payload);
        if (!row)
            continue;
        const intptr_t first = (intptr_t)payload & -(intptr_t)engine->page;
        madvise((void *)first, (size_t)((intptr_t)payload + row->length - first), MADV_WILLNEED); /* only a hint */
    }
}

/* How often this thread has waited for a page of a file. */
static long pages_awaited(void)
{
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_majflt : 0;
}

static void *run(void *argument)
{
    struct engine *engine = argument;
    struct scratch scratch = {0};
    long awaited = pages_awaited();
    pthread_mutex_lock(&engine->lock);
    for (;;) {
        struct batch *batch;
        while (!(batch = engine->first) && !engine->stopping)
            pthread_cond_wait(&engine->work, &engine->lock);
        if (!batch)
            break;
        const int64_t from = batch->taken, count = batch->count;
        const int64_t some = count - from < TOGETHER ? count - from : TOGETHER;
        batch->taken += some;
        if (batch->taken == batch->count && !(engine->first = batch->next))
            engine->last = NULL;
        const int32_t cold = from == 0 && engine->cold > 0 && engine->cold--;
        pthread_mutex_unlock(&engine->lock);
        if (cold)
            ask_for_pages(engine, batch->samples, count); /* batch->count may change once the lock is free */
        int32_t incomplete = 0;
        for (int64_t place = from; place < from + some; place++) {
            if (batch->source)
                plan(engine, batch, place);
            batch->status[place] = load_or_lose(engine, &scratch, batch, place);
            incomplete |= batch->status[place] != LOADED;
        }
        const long now_awaited = pages_awaited();
        pthread_mutex_lock(&engine->lock);
        if (now_awaited != awaited)
            engine->cold = COLD_FOR;
        awaited = now_awaited;
        batch->incomplete |= incomplete;
        batch->done += some;
        if (batch->done == batch->count)
            pthread_cond_broadcast(&engine->finished);
    }
    pthread_mutex_unlock(&engine->lock);
    free(scratch.decode);
    free(scratch.resample);
    return NULL;
}

/* Finish the batches that were submitted, stop the threads and free the engine. Nobody may be waiting for a batch. */
void dermscale_engine_close(struct engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    engine->stopping = 1;
    pthread_cond_broadcast(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    for (int32_t i = 0; i < engine->threads; i++)
        pthread_join(engine->ids[i], NULL);
    pthread_cond_destroy(&engine->work);
    pthread_cond_destroy(&engine->finished);
    pthread_mutex_destroy(&engine->lock);
    free(engine->ids);
    free(engine);
}

/* An engine of `threads` threads; NULL where they cannot be had, or the processor has no kernel for resizing. rows,
 * shards and sizes are read as long as it lives. cubic: how CROPS are resized, as for `dermscale_resample`. */
struct engine *dermscale_engine_open(const struct row *rows, int64_t row_count, const uint8_t *const *shards,
                                     const int64_t *sizes, int32_t shard_count, int32_t threads, int32_t cubic)
{
    const int32_t level = dermscale_resample_level();
    struct engine *engine = level ? calloc(1, sizeof *engine) : NULL;
    if (!engine)
        return NULL;
    handle_bus_errors_once();
    engine->rows = rows;
    engine->row_count = row_count;
    engine->shards = shards;
    engine->sizes = sizes;
    engine->shard_count = shard_count;
    engine->cold = COLD_FOR;
    engine->cubic = cubic;
    engine->page = sysconf(_SC_PAGESIZE);
    engine->level = level;
    engine->decode_level = dermscale_decode_level();
    pthread_mutex_init(&engine->lock, NULL);
    pthread_cond_init(&engine->work, NULL);
    pthread_cond_init(&engine->finished, NULL);
    engine->ids = malloc(sizeof *engine->ids * (size_t)threads);
    while (engine->ids && engine->threads < threads &&
           pthread_create(engine->ids + engine->threads, NULL, run, engine) == 0)
        engine->threads++;
    if (engine->threads < threads) {
        dermscale_engine_close(engine);
        return NULL;
    }
    return engine;
}

/* A batch of these samples; NULL where the shard of one is not mapped yet, or there is no memory. */
static struct batch *new_batch(const struct engine *engine, const int64_t *samples, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        if (samples[i] < 0 || samples[i] >= engine->row_count)
            continue;
        const uint32_t shard = engine->rows[samples[i]].shard;
        if (shard < (uint32_t)engine->shard_count && !engine->shards[shard])
            return NULL;
    }
    struct batch *batch = calloc(1, sizeof *batch);
    if (batch) {
        batch->samples = samples;
        batch->count = count;
    }
    return batch;
}

static struct batch *start(struct engine *engine, struct batch *batch)
{
    pthread_mutex_lock(&engine->lock);
    if (engine->last)
        engine->last->next = batch;
    else
        engine->first = batch;
    engine->last = batch;
    pthread_cond_broadcast(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    return batch;
}

/* Load `count` samples, one at least: their numbers, boxes (count, 4; NULL for whole images) and symmetries, as
 * `enum result` says, and what became of each into status. The arrays must stay until the batch is finished or
 * cancelled; those that the result has no use for are NULL. NULL where a shard is not mapped yet, or there is no
 * memory. */
struct batch *dermscale_batch_submit(struct engine *engine, int32_t result, const int64_t *samples,
                                     const int32_t *boxes, const uint8_t *symmetry, int64_t count, int32_t side,
                                     double worth, uint8_t *out, const int64_t *places, int64_t (*found)[3],
                                     int32_t *status)
{
    struct batch *batch = new_batch(engine, samples, count);
    if (!batch)
        return NULL;
    batch->result = (enum result)result;
    batch->boxes = boxes;
    batch->symmetry = symmetry;
    batch->side = side;
    batch->worth = worth;
    batch->out = out;
    batch->places = places;
    batch->found = found;
    batch->status = status;
    return start(engine, batch);
}

/* Draw `count` samples, one at least: those at `positions` of the source. The threads plan each for this epoch and load
 * it as CROPS. With side 0 they only plan it, and its status is LEFT. The arrays must stay as for
 * `dermscale_batch_submit`, and NULL means the same. */
struct batch *dermscale_batch_draw(struct engine *engine, const struct source *source, uint64_t epoch,
                                   const int64_t *positions, int64_t count, int32_t side, const struct drawn *to)
{
    for (int64_t i = 0; i < count; i++) {
        const int64_t position = positions[i];
        const int there = position >= 0 && position < source->count;
        to->samples[i] = there ? source->samples[position] : -1;
        to->labels[i] = there ? source->labels[position] : -1;
    }
    struct batch *batch = new_batch(engine, to->samples, count);
    if (!batch)
        return NULL;
    batch->source = source;
    batch->epoch = epoch;
    batch->plan = *to;
    batch->result = CROPS;
    batch->boxes = to->boxes;
    batch->symmetry = to->symmetry;
    batch->side = side;
    batch->out = to->images;
    batch->status = to->status;
    return start(engine, batch);
}

/* Whether a batch is done. It waits for nothing, so it may be asked while Python's lock is held. */
int32_t dermscale_batch_done(struct engine *engine, const struct batch *batch)
{
    pthread_mutex_lock(&engine->lock);
    const int32_t done = batch->done == batch->count;
    pthread_mutex_unlock(&engine->lock);
    return done;
}

/* Wait until a batch is done. */
void dermscale_batch_wait(struct engine *engine, const struct batch *batch)
{
    pthread_mutex_lock(&engine->lock);
    while (batch->done < batch->count)
        pthread_cond_wait(&engine->finished, &engine->lock);
    pthread_mutex_unlock(&engine->lock);
}

/* Take back the samples of a batch that no thread has begun. `dermscale_batch_wait` then waits for the others alone. */
void dermscale_batch_cancel(struct engine *engine, struct batch *batch)
{
    pthread_mutex_lock(&engine->lock);
    if (batch->taken < batch->count) {
        struct batch **at = &engine->first, *before = NULL;
        for (; *at != batch; at = &(*at)->next)
            before = *at;
        *at = batch->next;
        if (engine->last == batch)
            engine->last = before;
        batch->count = batch->taken;
        pthread_cond_broadcast(&engine->finished); /* perhaps it is done now */
    }
    pthread_mutex_unlock(&engine->lock);
}

/* Free a batch that is done. Returns whether a sample of it has another status than LOADED. */
int32_t dermscale_batch_free(struct batch *batch)
{
    const int32_t incomplete = batch->incomplete;
    free(batch);
    return incomplete;
}
