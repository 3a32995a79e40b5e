/* Uses the threads of workers.c from several threads at the same time, for ThreadSanitizer. Usage: threads SEED ROUNDS
 * CORPUS
 *
 * A round opens an engine. Several threads submit many small batches to it, wait for them, ask whether they are done,
 * cancel some, and leave some for the end. Another thread cancels batches that are being waited for. Then the engine is
 * closed while it still has work, which it must finish. The pixels of all loaded samples are compared. A round that
 * hangs ends the process. */
#include "fuzz.h"

#include <unistd.h>

#define SUBMITTERS 3
#define TURNS 30       /* of a submitter: a batch each */
#define AHEAD 4        /* batches that a submitter has under way */
#define MOST_COUNT 9   /* samples in a batch */
#define MOST_SIDE 12   /* px */
#define HANGS_AFTER 90 /* s */

const char *__tsan_default_options(void)
{
    return "halt_on_error=1";
}

static struct corpus corpus;
static struct row *rows; /* of the index: each image as JPEG, then each as .npy */
static const uint8_t **shards;
static int64_t *sizes;

struct task {
    struct batch *batch; /* NULL where there is none */
    int64_t samples[MOST_COUNT], places[MOST_COUNT], found[MOST_COUNT][3], count;
    int32_t boxes[4 * MOST_COUNT], status[MOST_COUNT], result, side, cancelled;
    uint8_t symmetry[MOST_COUNT], *out;
    int64_t positions[MOST_COUNT], labels[MOST_COUNT];
    float colour[12 * MOST_COUNT];
};
static struct source source; /* each sample at the position of its number */

struct submitter {
    pthread_t id;
    struct engine *engine;
    struct task tasks[AHEAD];
    uint64_t state;
    pthread_mutex_t lock; /* of `waited_for` */
    struct task *waited_for;
};

struct canceller {
    pthread_t id;
    struct engine *engine;
    struct submitter *submitters;
    uint64_t state;
    pthread_mutex_t lock;
    int32_t stopping;
};

static void submit(struct submitter *by, struct task *task)
{
    task->count = 1 + draw_from(&by->state, MOST_COUNT);
    task->side = 1 + (int32_t)draw_from(&by->state, MOST_SIDE);
    task->cancelled = 0;
    task->result = (int32_t)draw_from(&by->state, RESULTS);
    int64_t bytes = 0;
    for (int64_t k = 0; k < task->count; k++) {
        const struct image *const image =
            corpus.images + (task->samples[k] = draw_from(&by->state, 2 * corpus.count)) % corpus.count;
        int32_t *const box = task->boxes + 4 * k;
        box[0] = (int32_t)draw_from(&by->state, image->height);
        box[1] = (int32_t)draw_from(&by->state, image->width);
        box[2] = 1 + (int32_t)draw_from(&by->state, image->height - box[0]);
        box[3] = 1 + (int32_t)draw_from(&by->state, image->width - box[1]);
        task->symmetry[k] = (uint8_t)draw_from(&by->state, 8);
        task->status[k] = -1;
        task->places[k] = bytes;
        bytes += task->result == CROPS ? 3 * (int64_t)task->side * task->side
                 : task->result == IMAGES ? 3 * (int64_t)image->height * image->width : sizes[task->samples[k]];
    }
    task->out = exactly(NULL, bytes);
    const struct drawn to = {task->out, task->samples, task->labels, task->boxes, task->symmetry, task->colour,
                             task->status};
    memcpy(task->positions, task->samples, sizeof task->samples);
    if (task->result == CROPS && draw_from(&by->state, 2))
        task->batch = dermscale_batch_draw(by->engine, &source, 1, task->positions, task->count, task->side, &to);
    else
        task->batch = dermscale_batch_submit(by->engine, task->result, task->samples,
                                             task->result == IMAGES ? NULL : task->boxes, task->symmetry, task->count,
                                             task->side, 0.5, task->out, task->places, task->found, task->status);
    if (!task->batch)
        FAIL("no memory for a batch");
}

/* Compare a batch that is done, and free it. */
static void finish(struct task *task)
{
    for (int64_t k = 0; k < task->count; k++) {
        const int64_t sample = task->samples[k];
        const struct image *const image = corpus.images + sample % corpus.count;
        const int32_t all[4] = {0, 0, image->height, image->width};
        const int32_t *const box = task->result == IMAGES ? all : task->boxes + 4 * k;
        const int32_t raw = sample >= corpus.count, is_payload = task->result == PAYLOADS;
        const int32_t right = raw || is_payload || image->table ? LOADED : LEFT;
        if (task->status[k] == -1 && task->cancelled)
            continue;
        /* Without AVX2's bit operations all JPEGs are left to Python. */
        if (task->status[k] != right && (task->status[k] != LEFT || dermscale_decode_level() > 0))
            FAIL("a sample has the status %d instead of %d", task->status[k], right);
        const int64_t stride = (int64_t)image->width * 3, line = (int64_t)box[3] * 3;
        const uint8_t *const pixels = image->pixels + box[0] * stride + (int64_t)box[1] * 3;
        const uint8_t *const made = task->out + task->places[k];
        if (task->status[k] != LOADED)
            continue;
        if (task->result == CROPS) {
            if (!is_resized(pixels, stride, box[2], box[3], 3, task->side, 0, task->symmetry[k], made))
                FAIL("a loaded sample has other pixels");
        } else if (is_payload && !raw) {
            const int64_t size = task->found[k][0];
            if (size < 1 || size > sizes[sample] || made[0] != 0xFF || made[size - 1] != 0xD9)
                FAIL("a payload is no JPEG");
        } else {
            for (int32_t row = 0; row < box[2]; row++)
                if (memcmp(made + row * line, pixels + row * stride, (size_t)line) != 0)
                    FAIL("a loaded image has other pixels");
        }
    }
    free(task->out);
    dermscale_batch_free(task->batch);
    task->batch = NULL;
}

static void wait_for(struct submitter *by, struct task *task, int32_t open_to_others)
{
    if (open_to_others) {
        pthread_mutex_lock(&by->lock);
        by->waited_for = task;
        pthread_mutex_unlock(&by->lock);
    }
    dermscale_batch_wait(by->engine, task->batch);
    if (!dermscale_batch_done(by->engine, task->batch))
        FAIL("a batch that was waited for is not done");
    pthread_mutex_lock(&by->lock);
    by->waited_for = NULL;
    pthread_mutex_unlock(&by->lock);
    finish(task);
}

static void *submit_many(void *argument)
{
    struct submitter *const by = argument;
    for (int32_t turn = 0; turn < TURNS; turn++) {
        struct task *const task = by->tasks + turn % AHEAD;
        if (task->batch) {
            const int64_t how = draw_from(&by->state, 8);
            if (how == 0) {
                dermscale_batch_cancel(by->engine, task->batch);
                task->cancelled = 1;
            }
            if (how == 1)
                while (!dermscale_batch_done(by->engine, task->batch))
                    ;
            wait_for(by, task, how > 3);
        }
        submit(by, task);
        if (draw_from(&by->state, 6) == 0) { /* at once, and perhaps twice */
            for (int64_t times = 1 + draw_from(&by->state, 2); times > 0; times--)
                dermscale_batch_cancel(by->engine, task->batch);
            task->cancelled = 1;
        }
    }
    return NULL;
}

static void *cancel_some(void *argument)
{
    struct canceller *const by = argument;
    for (;;) {
        pthread_mutex_lock(&by->lock);
        const int32_t stopping = by->stopping;
        pthread_mutex_unlock(&by->lock);
        if (stopping)
            return NULL;
        struct submitter *const from = by->submitters + draw_from(&by->state, SUBMITTERS);
        pthread_mutex_lock(&from->lock);
        if (from->waited_for && draw_from(&by->state, 3) == 0) {
            dermscale_batch_cancel(by->engine, from->waited_for->batch);
            from->waited_for->cancelled = 1;
        }
        pthread_mutex_unlock(&from->lock);
        usleep((useconds_t)draw_from(&by->state, 200));
    }
}

static void play(uint64_t *state)
{
    struct engine *const engine = dermscale_engine_open(rows, 2 * corpus.count, shards, sizes, 2 * corpus.count,
                                                        1 + (int32_t)draw_from(state, 4), 0);
    if (!engine)
        FAIL("no engine");
    struct submitter *const submitters = calloc(SUBMITTERS, sizeof *submitters);
    struct canceller canceller = {.engine = engine, .submitters = submitters, .state = *state + 1};
    pthread_mutex_init(&canceller.lock, NULL);
    for (int32_t i = 0; i < SUBMITTERS; i++) {
        submitters[i].engine = engine;
        submitters[i].state = (uint64_t)draw_from(state, INT64_MAX);
        pthread_mutex_init(&submitters[i].lock, NULL);
        if (pthread_create(&submitters[i].id, NULL, submit_many, submitters + i))
            FAIL("no thread");
    }
    if (pthread_create(&canceller.id, NULL, cancel_some, &canceller))
        FAIL("no thread");
    for (int32_t i = 0; i < SUBMITTERS; i++)
        pthread_join(submitters[i].id, NULL);
    pthread_mutex_lock(&canceller.lock);
    canceller.stopping = 1;
    pthread_mutex_unlock(&canceller.lock);
    pthread_join(canceller.id, NULL);
    pthread_mutex_destroy(&canceller.lock);
    dermscale_engine_close(engine); /* the last batches of each submitter are under way */
    for (int32_t i = 0; i < SUBMITTERS; i++) {
        for (struct task *task = submitters[i].tasks; task < submitters[i].tasks + AHEAD; task++)
            finish(task);
        pthread_mutex_destroy(&submitters[i].lock);
    }
    free(submitters);
}

#define MANY 20000 /* samples */

struct waiter {
    struct engine *engine;
    struct batch *batch;
};

static void *wait_only(void *argument)
{
    const struct waiter *const by = argument;
    dermscale_batch_wait(by->engine, by->batch);
    return NULL;
}

static struct batch *submit_crops(struct engine *engine, const int64_t *samples, const int32_t *boxes,
                                  const uint8_t *symmetry, int64_t count, uint8_t *out, int32_t *status)
{
    return dermscale_batch_submit(engine, CROPS, samples, boxes, symmetry, count, 1, 0, out, NULL, NULL, status);
}

/* Who waits for a batch when it is cancelled must not wait for the batch before it. */
static void cancel_behind_a_long_one(void)
{
    struct engine *const engine = dermscale_engine_open(rows, 2 * corpus.count, shards, sizes, 2 * corpus.count, 1, 0);
    int64_t *const samples = malloc(MANY * sizeof *samples);
    int32_t *const boxes = malloc(MANY * 4 * sizeof *boxes), *const status = malloc((MANY + 1) * sizeof *status);
    uint8_t *const symmetry = calloc(MANY, 1), *const out = malloc((MANY + 1) * 3);
    if (!engine || !samples || !boxes || !status || !symmetry || !out)
        FAIL("no engine or no memory");
    for (int32_t k = 0; k < MANY; k++) {
        samples[k] = k % (2 * corpus.count);
        memcpy(boxes + 4 * k, (const int32_t[4]){0, 0, 1, 1}, 4 * sizeof *boxes);
    }
    struct batch *const first = submit_crops(engine, samples, boxes, symmetry, MANY, out, status);
    struct waiter waiter = {engine, submit_crops(engine, samples, boxes, symmetry, 1, out + MANY * 3, status + MANY)};
    pthread_t id;
    if (!first || !waiter.batch || pthread_create(&id, NULL, wait_only, &waiter))
        FAIL("no batch or no thread");
    usleep(20000);
    dermscale_batch_cancel(engine, waiter.batch);
    pthread_join(id, NULL);
    if (dermscale_batch_done(engine, first))
        FAIL("the end of a cancelled batch waited for the batch before it");
    dermscale_batch_cancel(engine, first);
    dermscale_batch_wait(engine, first);
    dermscale_batch_free(first);
    dermscale_batch_free(waiter.batch);
    dermscale_engine_close(engine);
    free(samples);
    free(boxes);
    free(status);
    free(symmetry);
    free(out);
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    uint64_t state = strtoull(argv[1], NULL, 10);
    read_corpus(&corpus, argv[3]);
    rows = calloc(2 * (size_t)corpus.count, sizeof *rows);
    shards = calloc(2 * (size_t)corpus.count, sizeof *shards);
    sizes = calloc(2 * (size_t)corpus.count, sizeof *sizes);
    int64_t *const numbers = calloc(2 * (size_t)corpus.count, sizeof *numbers);
    for (int32_t i = 0; i < 2 * corpus.count; i++)
        numbers[i] = i;
    source = (struct source){.samples = numbers, .labels = numbers, .count = 2 * corpus.count,
                             .augment = &corpus.augment, .seed = 1, .train = 1};
    for (int32_t i = 0; i < 2 * corpus.count; i++) {
        const struct image *const image = corpus.images + i % corpus.count;
        const int64_t pixels = (int64_t)image->height * image->width * 3;
        const int32_t raw = i >= corpus.count;
        sizes[i] = raw ? XXH3_LEAST + pixels : image->length;
        uint8_t *const payload = exactly(raw ? NULL : image->file, sizes[i]);
        if (raw) {
            memset(payload, 0, XXH3_LEAST);
            memcpy(payload + XXH3_LEAST, image->pixels, (size_t)pixels);
        }
        shards[i] = payload;
        rows[i] = (struct row){.xxh3 = dermscale_xxh3(payload, sizes[i], 0), .length = (uint32_t)sizes[i],
                               .shard = (uint32_t)i, .height = (uint16_t)image->height,
                               .width = (uint16_t)image->width, .raw = (uint8_t)raw};
    }
    const int64_t rounds = dermscale_resample_level() ? strtoll(argv[2], NULL, 10) : 0;
    alarm(HANGS_AFTER);
    if (rounds)
        cancel_behind_a_long_one();
    for (int64_t round = 0; round < rounds; round++) {
        alarm(HANGS_AFTER);
        play(&state);
    }
    printf("%lld batches\n", (long long)rounds * SUBMITTERS * TURNS);
    for (int32_t i = 0; i < 2 * corpus.count; i++)
        free((void *)(uintptr_t)shards[i]);
    free(rows);
    free(shards);
    free(sizes);
    free_corpus(&corpus);
    return 0;
}
