/* What kernels.c shares with payloads.c, which makes its inputs, batches.c, which gives them to the threads, and
 * files.c, which decodes whole files. */
#ifndef DERMSCALE_FUZZ_INPUTS_H
#define DERMSCALE_FUZZ_INPUTS_H

#include "fuzz.h"

#define LEVELS 3
#define MOST_SIDE 320 /* px, of the images here */
#define WRONG(...) (fprintf(stderr, "input %lld: ", (long long)input), FAIL(__VA_ARGS__))

extern struct corpus corpus;
extern int64_t input, decoded; /* how many there were, and how many of them could be decoded */

/* A payload: what is stored of an image, in memory of exactly its length. */
struct payload {
    const struct image *of;
    uint8_t *bytes;
    int64_t length;
    int32_t height, width, raw, sound; /* px; raw: a .npy file; sound: as it was packed */
};

/* payloads.c */
void seed(uint64_t from);
int64_t draw(int64_t limit); /* a number below it */
int one_in(int64_t many);
void fill(uint8_t *to, int64_t bytes);
int32_t runs_of(const struct image *image);
struct payload some_payload(void);
void damage(struct payload *of); /* change some bytes, move some, or cut the file off */
void some_box(int32_t height, int32_t width, int32_t *box); /* within (height, width), or rarely any */
int is_inside(const int32_t *box, int32_t height, int32_t width);

/* kernels.c */
#define UNALIGNED 1 /* scratch memory starts behind a multiple of 64, so that aligning it takes the most bytes */
uint8_t *new_scratch(int64_t bytes);
void free_scratch(uint8_t *scratch);
/* Decode a box at all levels. Returns the pixels at the first, NULL where the file is declined. */
const uint8_t *decode_box(const struct payload *of, const int32_t *box, int32_t levels, int64_t *stride);

/* batches.c. The linker lets it take the place of the functions whose names follow __wrap_ (-Wl,--wrap). */
int32_t __real_dermscale_resample_level(void);
int32_t __real_dermscale_decode_level(void);
int32_t __real_dermscale_decode_box(const uint8_t *file, int64_t length, int32_t height, int32_t width, int32_t y,
                                    int32_t x, int32_t h, int32_t w, uint8_t *scratch, int64_t scratch_bytes,
                                    const uint8_t **pixels, int64_t *stride, int32_t level);
int64_t __real_dermscale_cut(const uint8_t *raw, int64_t length, int32_t height, int32_t width, int32_t y, int32_t x,
                             int32_t h, int32_t w, double worth, uint8_t *out, int32_t *corner);
extern int32_t told_level;  /* what workers.c is told that the processor can run */
extern const uint8_t *lost; /* a mapped file that has become shorter */
void open_benches(void);
void close_benches(void);
int64_t try_batch(void);

void try_files(void); /* files.c */

#endif
