/* Batches that are submitted, cancelled and awaited in any order, to be run under -fsanitize=thread. Usage: workers ROUNDS */
#include "../../shards/kernels/kernels.h"

#include <stdio.h>
#include <stdlib.h>

enum { SAMPLES = 40, HEIGHT = 33, WIDTH = 47, BATCHES = 6, MOST = 37, SIDE = 16, BYTES = HEIGHT * WIDTH * 3 };

struct row { /* of workers.c */
    uint64_t offset, xxh3;
    uint32_t length, shard;
    uint16_t height, width;
    uint8_t raw, unused[3];
};

void *dermscale_engine_open(const struct row *, int64_t, const uint8_t *const *, const int64_t *, int32_t, int32_t);
void dermscale_engine_close(void *);
void *dermscale_batch_submit(void *, int32_t, const int64_t *, const int32_t *, const uint8_t *, int64_t, int32_t,
                             double, uint8_t *, const int64_t *, int64_t (*)[3], int32_t *);
int32_t dermscale_batch_done(void *, void *);
void dermscale_batch_wait(void *, void *);
void dermscale_batch_cancel(void *, void *);
void dermscale_batch_free(void *);

static uint8_t shard[SAMPLES * BYTES], out[BATCHES][MOST * SIDE * SIDE * 3], symmetry[BATCHES][MOST];
static int64_t samples[BATCHES][MOST];
static int32_t boxes[BATCHES][MOST][4], status[BATCHES][MOST];
static struct row rows[SAMPLES];

int main(int argc, char **argv)
{
    const uint8_t *const shards[1] = {shard};
    const int64_t sizes[1] = {sizeof shard};
    for (size_t i = 0; i < sizeof shard; i++)
        shard[i] = (uint8_t)rand();
    for (int i = 0; i < SAMPLES; i++)
        rows[i] = (struct row){.offset = (uint64_t)i * BYTES, .xxh3 = dermscale_xxh3(shard + i * BYTES, BYTES, 0),
                               .length = BYTES, .height = HEIGHT, .width = WIDTH, .raw = 1};
    for (int round = 0; round < (argc > 1 ? atoi(argv[1]) : 1); round++) {
        void *engine = dermscale_engine_open(rows, SAMPLES, shards, sizes, 1, 1 + round % 5), *batch[BATCHES];
        if (!engine)
            return 0; /* the processor has no kernel */
        for (int k = 0; k < BATCHES; k++) {
            const int count = 1 + rand() % MOST;
            for (int i = 0; i < count; i++) {
                const int32_t box[4] = {rand() % 10, rand() % 10, 20, 30};
                samples[k][i] = rand() % SAMPLES;
                symmetry[k][i] = (uint8_t)(i % 8);
                for (int side = 0; side < 4; side++)
                    boxes[k][i][side] = box[side];
            }
            batch[k] = dermscale_batch_submit(engine, 0, samples[k], boxes[k][0], symmetry[k], count, SIDE, 0, out[k],
                                              NULL, NULL, status[k]);
            if (rand() % 3 == 0)
                dermscale_batch_cancel(engine, batch[rand() % (k + 1)]);
        }
        for (int k = 0; k < BATCHES; k++) {
            if (!dermscale_batch_done(engine, batch[k]))
                dermscale_batch_wait(engine, batch[k]);
            for (int i = 0; i < MOST; i++)
                if (status[k][i])
                    return 1;
            dermscale_batch_free(batch[k]);
        }
        dermscale_engine_close(engine);
    }
    return 0;
}
