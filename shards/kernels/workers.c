/* Threads that load batches: checksum, cut, decode, crop, resize and turn, into the batch's buffer. They live as long as
 * their engine and never touch Python, so work goes on whoever holds Python's lock. Python submits a batch in one call,
 * and waits for it in another.
 *
 * What these threads cannot decode (files of other packers, damaged ones) they leave to Python, sample by sample: each
 * sample has a status. */
#include "kernels.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>

#define TOGETHER 4 /* samples that a thread takes at once: taking costs a lock */

/* A row of the index, as shards/engines/native.py lays it out. */
struct row {
    uint64_t offset, xxh3;   /* of the payload: its first byte in the shard; its checksum */
    uint32_t length, shard;  /* bytes of the payload; number of the shard */
    uint16_t height, width;  /* px */
    uint8_t raw, unused[3];  /* 1 for a .npy payload, 0 for a JPEG */
};

/* What became of a sample. */
enum { LOADED = 0, LEFT = 1, OTHER_CHECKSUM = 2, OTHER_SIZE = 3, OUTSIDE = 4, LOST = 5 };

struct batch {
    struct batch *next;
    const int64_t *samples;  /* numbers of rows */
    const int32_t *boxes;    /* y, x, height, width of each */
    const uint8_t *symmetry;
    uint8_t *out;            /* (count, side, side, 3) */
    int32_t *status;
    int64_t count, taken, done;
    int32_t side;
};

struct engine {
    pthread_mutex_t lock;
    pthread_cond_t work, finished;
    struct batch *first, *last; /* those with samples that no thread has taken */
    const struct row *rows;
    const uint8_t *const *shards; /* the first byte of each, NULL where it is not mapped */
    const int64_t *sizes;
    int64_t row_count;
    int32_t shard_count, level, decode_level, threads, stopping;
    pthread_t *ids;
};

/* A mapped file that was truncated since has pages that cannot be read: the system sends SIGBUS to the thread that tries.
 * While this library reads a payload, the signal leads back to where it began; at any other time it goes where it went
 * before. */
static __thread sigjmp_buf *way_back;
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

static int32_t load(const struct engine *engine, struct scratch *scratch, const struct batch *batch, int64_t place)
{
    const int64_t sample = batch->samples[place];
    if (sample < 0 || sample >= engine->row_count)
        return OUTSIDE;
    const struct row *row = engine->rows + sample;
    if (row->shard >= (uint32_t)engine->shard_count || !engine->shards[row->shard])
        return OUTSIDE;
    const uint64_t size = (uint64_t)engine->sizes[row->shard];
    if (row->offset > size || row->length > size - row->offset)
        return OUTSIDE;
    const uint8_t *payload = engine->shards[row->shard] + row->offset;
    if (row->length < XXH3_LEAST)
        return LEFT;
    if (dermscale_xxh3(payload, row->length, engine->level) != row->xxh3)
        return OTHER_CHECKSUM;
    const int32_t *box = batch->boxes + 4 * place, height = row->height, width = row->width;
    const int32_t y = box[0], x = box[1], h = box[2], w = box[3];
    if (y < 0 || x < 0 || h < 1 || w < 1 || h > height || w > width || y > height - h || x > width - w)
        return OTHER_SIZE;

    const uint8_t *pixels;
    int64_t stride = (int64_t)width * 3;
    if (row->raw) {
        if (stride * height > row->length)
            return OTHER_SIZE;
        pixels = payload + row->length - stride * height + y * stride + x * 3;
    } else {
        if (!engine->decode_level) /* plain C is slower than libjpeg-turbo */
            return LEFT;
        if (!reserve(&scratch->decode, &scratch->decode_bytes, dermscale_decode_scratch(height, width)))
            return LEFT;
        if (dermscale_decode_box(payload, row->length, height, width, y, x, h, w, scratch->decode,
                                 scratch->decode_bytes, &pixels, &stride, engine->decode_level) != DECODED)
            return LEFT;
    }
#ifdef HAVE_RESAMPLE
    if (!reserve(&scratch->resample, &scratch->resample_bytes, dermscale_scratch_bytes(w, batch->side)))
        return LEFT;
    dermscale_resample(pixels, stride, h, w, 3, batch->side, batch->symmetry[place],
                       batch->out + place * 3 * batch->side * batch->side, scratch->resample, engine->level);
    return LOADED;
#else
    (void)pixels;
    return LEFT;
#endif
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

static void *run(void *argument)
{
    struct engine *engine = argument;
    struct scratch scratch = {0};
    pthread_mutex_lock(&engine->lock);
    for (;;) {
        struct batch *batch;
        while (!(batch = engine->first) && !engine->stopping)
            pthread_cond_wait(&engine->work, &engine->lock);
        if (!batch)
            break;
        const int64_t from = batch->taken, left = batch->count - from, some = left < TOGETHER ? left : TOGETHER;
        batch->taken += some;
        if (batch->taken == batch->count && !(engine->first = batch->next))
            engine->last = NULL;
        pthread_mutex_unlock(&engine->lock);
        for (int64_t place = from; place < from + some; place++)
            batch->status[place] = load_or_lose(engine, &scratch, batch, place);
        pthread_mutex_lock(&engine->lock);
        batch->done += some;
        if (batch->done == batch->count)
            pthread_cond_broadcast(&engine->finished);
    }
    pthread_mutex_unlock(&engine->lock);
    free(scratch.decode);
    free(scratch.resample);
    return NULL;
}

/* Stop the threads and free the engine. No batch may be under way. */
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
 * shards and sizes are read as long as it lives. */
struct engine *dermscale_engine_open(const struct row *rows, int64_t row_count, const uint8_t *const *shards,
                                     const int64_t *sizes, int32_t shard_count, int32_t threads)
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

/* Load `count` samples, one at least: their numbers, boxes (count, 4) and symmetries, into out (count, side, side, 3),
 * and what became of each into status. The arrays must stay until the batch is finished or cancelled. NULL where there
 * is no memory. */
struct batch *dermscale_batch_submit(struct engine *engine, const int64_t *samples, const int32_t *boxes,
                                     const uint8_t *symmetry, int64_t count, int32_t side, uint8_t *out,
                                     int32_t *status)
{
    struct batch *batch = calloc(1, sizeof *batch);
    if (!batch)
        return NULL;
    batch->samples = samples;
    batch->boxes = boxes;
    batch->symmetry = symmetry;
    batch->count = count;
    batch->side = side;
    batch->out = out;
    batch->status = status;
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
    }
    pthread_mutex_unlock(&engine->lock);
}

/* Free a batch that is done. */
void dermscale_batch_free(struct batch *batch)
{
    free(batch);
}
