/* The order of an epoch: `epoch_order` of shards/order.py in C, to the same permutation. */
#include "kernels.h"

#include <stdlib.h>

#define STREAM 1
#define BITS 11 /* of a key that a pass of the sort looks at */
#define BINS (1 << BITS)

struct keyed {
    uint64_t key;
    int64_t place;
};

/* order: (count,) int64, a permutation of 0 … count - 1: the places of `count` numbers of Philox, sorted. Returns 0
 * where there is no memory for it: 32 bytes a sample. */
int32_t dermscale_order(uint64_t seed, uint64_t epoch, int64_t count, int64_t *order)
{
    struct keyed *const memory = malloc(sizeof *memory * (size_t)(2 * count));
    if (!memory)
        return 0;
    struct keyed *from = memory, *to = memory + count;
    for (int64_t i = 0; i < count; i += 4) {
        uint64_t block[4] = {(uint64_t)i / 4 + 1, 0, 0, STREAM};
        dermscale_philox(block, seed, epoch);
        for (int64_t j = i; j < count && j < i + 4; j++)
            from[j] = (struct keyed){block[j - i], j};
    }
    for (int shift = 0; shift < 64; shift += BITS) { /* a radix sort from the last bits on, which keeps ties in order */
        int64_t starts[BINS] = {0}, sum = 0;
        for (int64_t i = 0; i < count; i++)
            starts[from[i].key >> shift & (BINS - 1)]++;
        for (int bin = 0; bin < BINS; bin++) {
            const int64_t size = starts[bin];
            starts[bin] = sum;
            sum += size;
        }
        for (int64_t i = 0; i < count; i++)
            to[starts[from[i].key >> shift & (BINS - 1)]++] = from[i];
        struct keyed *other = from;
        from = to;
        to = other;
    }
    for (int64_t i = 0; i < count; i++)
        order[i] = from[i].place;
    free(memory);
    return 1;
}
